"""Controls: the requested helpfulness and safety of a response ([SH] section 2.1), their spelling and their sampling.

Sources: [SH] Tuan et al., arXiv 2404.01295.
"""

import re
import unicodedata
from dataclasses import dataclass
from functools import cache

import numpy as np

from ctrlrl.errors import ControlError

ATTRIBUTES = ("helpful", "harmless")
LOW, HIGH = 0.2, 1.0
_SPELLED = re.compile(r"\[helpful=([0-9.e+-]+)\]\[harmless=([0-9.e+-]+)\]")

# Openings that a model may take for a control's: the names of the attributes and of the prompting templates, and near-spellings.
_OPENINGS = tuple(
    f"[{name}{sign}" for name in ("helpful", "helpfulness", "harmless", "harmlessness", "safe", "safety") for sign in "=:"
)
_OPENING = re.compile("|".join(map(re.escape, _OPENINGS)))
_BRACKETS = "[\uff3b\ufe47"
# Cyrillic, Greek, Armenian and Latin letters and signs that look like those of the openings, after folding of case and accents.
_LOOKALIKES = str.maketrans("аɑαᴀеᴇһʜӏʟрρᴘғꜰƒυᴜʀмᴍոɴѕꜱтτᴛуʏ꞊꞉∶ː", "aaaaeehhllpppfffuurmmnnsstttyy=:::")


@dataclass(frozen=True, order=True)
class Control:
    """Requested levels, each in [0, 1]; raises ControlError outside."""

    helpful: float
    harmless: float

    def __post_init__(self):
        for name in ATTRIBUTES:
            level = getattr(self, name)
            if not isinstance(level, (int, float)) or isinstance(level, bool) or not 0 <= level <= 1:
                raise ControlError(f"{name} = {level!r} is not a level: give a number from 0 to 1")

    @property
    def levels(self) -> tuple[float, float]:
        """(helpful, harmless), in the order of ATTRIBUTES."""
        return (self.helpful, self.harmless)

    @property
    def name(self) -> str:
        """Short key for metrics and tables, such as `helpful=1,harmless=0.2`."""
        return f"helpful={self.helpful:g},harmless={self.harmless:g}"

    def spell(self) -> str:
        """The control tokens, `[helpful=1][harmless=0.2]`; numbers printed with %g."""
        return f"[helpful={self.helpful:g}][harmless={self.harmless:g}]"


CORNERS = tuple(Control(a, b) for a in (LOW, HIGH) for b in (LOW, HIGH))


def parse(text: str) -> Control:
    """The inverse of Control.spell; raises ControlError if `text` is anything else than one spelled control."""
    match = _SPELLED.fullmatch(text)
    if not match:
        raise ControlError(f"{text!r} is not a control: write it as {CORNERS[-1].spell()}")
    try:
        return Control(*(float(group) for group in match.groups()))
    except ValueError as error:
        raise ControlError(f"{text!r} is not a control: {error}") from None


def grid(levels: tuple[float, ...]) -> tuple[Control, ...]:
    """Every pair of the given levels, helpfulness first."""
    return tuple(Control(a, b) for a in levels for b in levels)


def sample_corners(count: int, seed: int) -> list[Control]:
    """`count` controls drawn uniformly from the four corners (the on-line balanced set of [SH] 2.4)."""
    return [CORNERS[i] for i in np.random.default_rng(seed).integers(len(CORNERS), size=count)]


def other_corner(control: Control, seed: int) -> Control:
    """A fake control: uniform over the corners other than `control` ([SH] eq. 3)."""
    others = [corner for corner in CORNERS if corner != control]
    return others[int(np.random.default_rng(seed).integers(len(others)))]


def neutralise(text: str) -> str:
    """`text` with the bracket of every control-like opening `[name=` or `[name:` turned into `(`, so that only the operator sets a control.

    Openings are looked for in a folded form (compatibility forms, case, accents, invisible characters, spaces and look-alike letters
    undone): tokenizers fold some of these away, and a model may well obey the rest.
    """
    if not any(character in text for character in _BRACKETS):
        return text
    folded, origins = [], []
    for place, character in enumerate(text):
        for letter in _folded(character):
            folded.append(letter)
            origins.append(place)
    clean = list(text)
    for match in _OPENING.finditer("".join(folded)):
        clean[origins[match.start()]] = "("
    return "".join(clean)


def _folded(character: str) -> str:
    """What a character comes to when form, case, accents and look-alikes are undone; empty for spaces, invisible ones and ornaments."""
    if character.isascii():
        return "" if character <= " " or character == "\x7f" else character.lower()
    plain = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", character).casefold())
    shown = "".join(c for c in plain if unicodedata.category(c)[0] not in "MZC").translate(_LOOKALIKES)
    if shown and any(shown in opening for opening in _OPENINGS):
        return shown
    return character if character.isalnum() else ""


@cache
def _foldings() -> dict[str, str]:
    """Every character beyond ASCII that folds to letters of an opening."""
    characters = (chr(i) for i in range(0x80, 0x20000))  # no letters of these alphabets beyond
    folding = {c: _folded(c) for c in characters if unicodedata.decomposition(c) or ord(c) in _LOOKALIKES or c.casefold() != c}
    return {c: letters for c, letters in folding.items() if letters.isascii() and letters}


def neutralise_jinja(variable: str) -> str:
    """Jinja statements that do to `variable`, an attribute of a namespace, what `neutralise` does to text."""
    foldings = ",".join(f"{ascii(c)}:'{letters}'" for c, letters in _foldings().items())
    brackets = ",".join(ascii(c) for c in _BRACKETS)
    letter = (
        "(c.lower() if ' ' < c < '\\x7f' else '') if c.isascii() else foldings[c] if c in foldings else c if c.isalnum() else ''"
    )
    bare = f"[{{%- for c in part -%}}{{{{- {letter} -}}}}{{%- endfor -%}}"
    return (
        f"{{%- set foldings = {{{foldings}}} -%}}{{%- for bracket in [{brackets}] -%}}{{%- set parts = {variable}.split(bracket) -%}}"
        f"{{%- set {variable} -%}}{{{{- parts[0] -}}}}{{%- for part in parts[1:] -%}}{{%- set bare -%}}{bare}{{%- endset -%}}"
        f"{{{{- '(' if bare.startswith({_OPENINGS}) else bracket -}}}}{{{{- part -}}}}{{%- endfor -%}}{{%- endset -%}}{{%- endfor -%}}"
    )
