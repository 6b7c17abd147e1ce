"""Controls: the requested levels of a response's attributes ([SH] section 2.1), their spelling and their sampling.

Sources: [SH] Tuan et al., arXiv 2404.01295.
"""

import re
import unicodedata
from dataclasses import dataclass, field
from functools import cache
from itertools import product

import numpy as np

from ctrlrl.attributes import HIGH, LOW, PAPER, Attributes  # noqa: F401 (the two levels are known by this module)
from ctrlrl.errors import ControlError

ATTRIBUTES = PAPER.names
_FEW = 4  # attributes: of more the corners are too many for a draw to be near to balanced by itself

_BRACKETS = "[\uff3b\ufe47"
# Cyrillic, Greek, Armenian and Latin letters and signs that look like Latin letters, after folding of case and accents.
_LOOKALIKES = str.maketrans(
    "аɑαᴀеᴇһʜӏʟрρᴘғꜰƒυᴜʀмᴍոɴѕꜱтτᴛуʏ꞊꞉∶ː" "сᴄϲԁᴅіɪιоοᴏкκᴋνᴠɡɢјᴊᴡԝᴢхχԛ",
    "aaaaeehhllpppfffuurmmnnsstttyy=:::" "cccddiiiooo" "kkkvvggjjwwzxxq",
)


@dataclass(frozen=True, order=True, init=False, repr=False)
class Control:
    """Requested levels, each in [0, 1], in the order of `attributes`; raises ControlError outside.

    `Control(1, 0.2)` and `Control(helpful=1, harmless=0.2)` are the same; `control.helpful` is the level of that attribute.
    """

    levels: tuple[float, ...]
    attributes: Attributes = field(hash=False)

    def __init__(self, *levels: float, attributes: Attributes = PAPER, **named: float):
        if named:
            levels = (*levels, *(named[name] for name in attributes.names[len(levels) :] if name in named))
        if len(levels) != len(attributes) or not set(named) <= set(attributes.names):
            raise ControlError(f"a control has a level for each of {attributes.spoken}; got {(*levels, *named)}")
        for name, level in zip(attributes.names, levels, strict=True):
            if not isinstance(level, (int, float)) or isinstance(level, bool) or not 0 <= level <= 1:
                raise ControlError(f"{name} = {level!r} is not a level: give a number from 0 to 1")
        object.__setattr__(self, "levels", tuple(levels))
        object.__setattr__(self, "attributes", attributes)

    def __getattr__(self, name: str) -> float:
        if not name.startswith("_") and name in self.attributes.names:
            return self.levels[self.attributes.names.index(name)]
        raise AttributeError(f"a control has no {name!r}")

    def __repr__(self) -> str:
        return f"Control({self.name})"

    @property
    def name(self) -> str:
        """Short key for metrics and tables, such as `helpful=1,harmless=0.2`."""
        return ",".join(f"{name}={level:g}" for name, level in zip(self.attributes.names, self.levels, strict=True))

    def spell(self) -> str:
        """The control tokens, `[helpful=1][harmless=0.2]`; numbers printed with %g."""
        return "".join(f"[{name}={level:g}]" for name, level in zip(self.attributes.names, self.levels, strict=True))


def parse(text: str, attributes: Attributes = PAPER) -> Control:
    """The inverse of Control.spell; raises ControlError if `text` is anything else than one spelled control."""
    match = re.fullmatch("".join(rf"\[{name}=([0-9.e+-]+)\]" for name in attributes.names), text)
    if not match:
        raise ControlError(f"{text!r} is not a control: write it as {corners(attributes)[-1].spell()}")
    try:
        return Control(*(float(group) for group in match.groups()), attributes=attributes)
    except ValueError as error:
        raise ControlError(f"{text!r} is not a control: {error}") from None


def grid(levels: tuple[float, ...], attributes: Attributes = PAPER) -> tuple[Control, ...]:
    """Every combination of the given levels, the first attribute's the slowest."""
    return tuple(Control(*each, attributes=attributes) for each in product(levels, repeat=len(attributes)))


@cache
def corners(attributes: Attributes) -> tuple[Control, ...]:
    """Every combination of the attributes' first and last levels: 2^N controls."""
    return tuple(Control(*each, attributes=attributes) for each in product(*((a.levels[0], a.levels[-1]) for a in attributes)))


@cache
def cells(attributes: Attributes) -> tuple[Control, ...]:
    """Every combination of the attributes' levels; with two levels each these are the corners."""
    return tuple(Control(*each, attributes=attributes) for each in product(*(a.levels for a in attributes)))


CORNERS = corners(PAPER)


def sample_corners(count: int, seed: int, attributes: Attributes = PAPER) -> list[Control]:
    """`count` controls for the on-line balanced set of [SH] 2.4: drawn uniformly from the cells, which are the corners where attributes
    have two levels; of more than four attributes so that each has every level equally often."""
    rng = np.random.default_rng(seed)
    if len(attributes) <= _FEW:
        every = cells(attributes)
        return [every[i] for i in rng.integers(len(every), size=count)]
    columns = [rng.permutation(np.resize(rng.permutation(a.levels), count)).tolist() for a in attributes]
    return [Control(*levels, attributes=attributes) for levels in zip(*columns, strict=True)]


def other_corner(control: Control, seed: int) -> Control:
    """A fake control: uniform over the corners other than `control` ([SH] eq. 3)."""
    others = [corner for corner in corners(control.attributes) if corner != control]
    return others[int(np.random.default_rng(seed).integers(len(others)))]


@cache
def _opening(attributes: Attributes) -> re.Pattern:
    return re.compile("|".join(map(re.escape, attributes.openings)))


def neutralise(text: str, attributes: Attributes = PAPER) -> str:
    """`text` with the bracket of every control-like opening `[name=` or `[name:` turned into `(`, so that only the operator sets a control.

    Openings are looked for in a folded form (compatibility forms, case, accents, invisible characters, spaces and look-alike letters
    undone): tokenizers fold some of these away, and a model may well obey the rest.
    """
    if not any(character in text for character in _BRACKETS):
        return text
    folded, origins = [], []
    for place, character in enumerate(text):
        for letter in _folded(character, attributes.openings):
            folded.append(letter)
            origins.append(place)
    clean = list(text)
    for match in _opening(attributes).finditer("".join(folded)):
        clean[origins[match.start()]] = "("
    return "".join(clean)


def _folded(character: str, openings: tuple[str, ...]) -> str:
    """What a character comes to when form, case, accents and look-alikes are undone; empty for spaces, invisible ones and ornaments."""
    if character.isascii():
        return "" if character <= " " or character == "\x7f" else character.lower()
    plain = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", character).casefold())
    shown = "".join(c for c in plain if unicodedata.category(c)[0] not in "MZC").translate(_LOOKALIKES)
    if shown and any(shown in opening for opening in openings):
        return shown
    return character if character.isalnum() else ""


@cache
def _foldings(attributes: Attributes) -> dict[str, str]:
    """Every character beyond ASCII that folds to letters of an opening."""
    characters = (chr(i) for i in range(0x80, 0x20000))  # no letters of these alphabets beyond
    odd = (c for c in characters if unicodedata.decomposition(c) or ord(c) in _LOOKALIKES or c.casefold() != c)
    folding = {c: _folded(c, attributes.openings) for c in odd}
    return {c: letters for c, letters in folding.items() if letters.isascii() and letters}


def neutralise_jinja(variable: str, attributes: Attributes = PAPER) -> str:
    """Jinja statements that do to `variable`, an attribute of a namespace, what `neutralise` does to text."""
    foldings = ",".join(f"{ascii(c)}:'{letters}'" for c, letters in _foldings(attributes).items())
    brackets = ",".join(ascii(c) for c in _BRACKETS)
    letter = (
        "(c.lower() if ' ' < c < '\\x7f' else '') if c.isascii() else foldings[c] if c in foldings else c if c.isalnum() else ''"
    )
    openings = attributes.openings
    bare = f"[{{%- for c in part -%}}{{{{- {letter} -}}}}{{%- endfor -%}}"
    return (
        f"{{%- set foldings = {{{foldings}}} -%}}{{%- for bracket in [{brackets}] -%}}{{%- set parts = {variable}.split(bracket) -%}}"
        f"{{%- set {variable} -%}}{{{{- parts[0] -}}}}{{%- for part in parts[1:] -%}}{{%- set bare -%}}{bare}{{%- endset -%}}"
        f"{{{{- '(' if bare.startswith({openings}) else bracket -}}}}{{{{- part -}}}}{{%- endfor -%}}{{%- endset -%}}{{%- endfor -%}}"
    )
