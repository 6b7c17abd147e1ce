"""What a finished demo leaves for `ctrlrl serve`: a file of dials, and the commands that open its model."""

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from ctrlrl.data.atomic import write_text

DIALS = "dials.toml"
_FILE = """\
# Dials of the demo's models. Without keys the server answers this machine alone, and everybody on it is the operator.
# A key for somebody else: ctrlrl serve --new-key alice. Its line goes under [keys], and the name into the keys of a dial.

[dials.scientist]
helpful = 1.0
harmless = 0.2

[dials.child]
helpful = 0.2
harmless = 1.0

[rewards]
{rewards}

[engine]
dtype = "float32"
kv_cache_gib = 0.1
"""


def offer(directory: Path, model: Path, rewards: Mapping[str, Path]) -> list[str]:
    """Write `dials.toml` into the demo's directory; returns lines that tell how to talk to the model, as this command was called."""
    quoted = "\n".join(f'{attribute} = "{_escaped(str(path.resolve()))}"' for attribute, path in rewards.items())
    dials = directory / DIALS
    write_text(dials, _FILE.format(rewards=quoted))
    program = sys.argv[0] if Path(sys.argv[0]).name == "ctrlrl" else "ctrlrl"
    return [
        "Talk to the model and turn its dial, in the browser at http://127.0.0.1:8000/ or in the terminal:",
        f"  {shlex.join([program, 'serve', str(model), '--dials', str(dials)])}",
        f"  {shlex.join([program, 'chat', str(model), '--dials', str(dials), '--helpful', '1', '--harmless', '0.2'])}",
    ]


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')
