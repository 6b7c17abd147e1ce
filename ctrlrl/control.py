"""Controls: the requested helpfulness and safety of a response ([SH] section 2.1), their spelling and their sampling.

Sources: [SH] Tuan et al., arXiv 2404.01295.
"""

import re
import unicodedata
from dataclasses import dataclass

import numpy as np

from ctrlrl.errors import ControlError

ATTRIBUTES = ("helpful", "harmless")
LOW, HIGH = 0.2, 1.0
_SPELLED = re.compile(r"\[helpful=([0-9.e+-]+)\]\[harmless=([0-9.e+-]+)\]")

# Names that the prompting templates spell in brackets: none of them opens a bracket in user text.
_NAMES = (*ATTRIBUTES, "safety")
_OPENING = re.compile(rf"\[(?:{'|'.join(_NAMES)})=")
# Cyrillic, Greek and Latin letters that look like those of the names, after folding of case and accents.
_LOOKALIKES = str.maketrans("аɑαᴀеᴇһʜӏʟрρᴘғꜰƒυᴜʀмᴍѕꜱтτᴛуʏ꞊", "aaaaeehhllpppfffuurmmsstttyy=")


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
    """`text` with the bracket of every control-like opening `[name=` turned into `(`, so that only the operator sets a control.

    Openings are looked for in a folded form (compatibility forms, case, accents, invisible characters, spaces and look-alike letters
    undone): tokenizers fold some of these away, and a model may well obey the rest.
    """
    if not any(character in text for character in "[［﹇"):
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
    """What a character comes to when form, case, accents and look-alikes are undone; empty for spaces and invisible ones."""
    if character.isascii():
        return "" if character <= " " or character == "\x7f" else character.lower()
    plain = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", character).casefold())
    shown = "".join(c for c in plain if unicodedata.category(c)[0] not in "MZC")
    return shown.translate(_LOOKALIKES)


def neutralise_jinja(variable: str) -> str:
    """Jinja statements that do to `variable`, an attribute of a namespace, what `neutralise` does to text in ASCII."""
    bare = "part|lower" + "".join(f"|replace('{space}', '')" for space in (" ", "\\t", "\\n", "\\r"))
    starts = " or ".join(f"bare.startswith('{name}=')" for name in _NAMES)
    return (
        f"{{%- set parts = namespace(text='') -%}}{{%- for part in {variable}.split('[') -%}}"
        f"{{%- set bare = {bare} -%}}"
        f"{{%- set parts.text = parts.text ~ ('' if loop.first else '(' if {starts} else '[') ~ part -%}}"
        f"{{%- endfor -%}}{{%- set {variable} = parts.text -%}}"
    )
