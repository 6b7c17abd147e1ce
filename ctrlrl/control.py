"""Controls: the requested helpfulness and safety of a response ([SH] section 2.1), their spelling and their sampling.

Sources: [SH] Tuan et al., arXiv 2404.01295.
"""

import re
from dataclasses import dataclass

import numpy as np

from ctrlrl.errors import ControlError

ATTRIBUTES = ("helpful", "harmless")
LOW, HIGH = 0.2, 1.0
_SPELLED = re.compile(r"\[helpful=([0-9.e+-]+)\]\[harmless=([0-9.e+-]+)\]")
# Names that the prompting templates spell in brackets, and in the cases people write: each is made inert in user text.
_BRACKETED = tuple(spell(name) for name in (*ATTRIBUTES, "safety") for spell in (str.lower, str.title, str.upper))


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
    """`text` with every control-like opening `[name=` turned into `(name=`, so that only the operator sets a control."""
    for name in _BRACKETED:
        text = text.replace(f"[{name}=", f"({name}=")
    return text


def neutralise_jinja(variable: str) -> str:
    """A Jinja expression that does to `variable` what `neutralise` does; for the exported chat template."""
    return variable + "".join(f"|replace('[{name}=', '({name}=')" for name in _BRACKETED)
