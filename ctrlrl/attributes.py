"""Attributes: what an operator can dial, their words and their levels. A recipe's `[attributes]` lists them; by default the paper's two.

    [attributes.helpful]
    [attributes.harmless]
    [attributes.concise]
    words = ["concise", "not concise"]     # of the prompting templates; by default these
    levels = [0.2, 0.6, 1.0]               # by default 0.2 and 1

Source: [SH] Tuan et al., arXiv 2404.01295.
"""

import json
import keyword
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, ValidationError, field_validator

from ctrlrl.config import Section
from ctrlrl.errors import DataError

LOW, HIGH = 0.2, 1.0
MOST = 8  # attributes: their corners are 2^8
FILE = "attributes.json"  # beside what was made for other attributes than the paper's
_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
# Words that stand beside the attributes' names in templates, tables and figures.
_TAKEN = {
    "messages", "message", "tools", "documents", "add_generation_prompt", "strftime_now", "raise_exception", "ctrlrl", "loop", "namespace",
    "prompt_id", "unit", "index", "response", "token_ids", "finish_reason", "prompt", "prompts", "samples", "matched", "entanglement",
    "calibration", "controls", "control", "answers", "tokens", "cut", "characters", "refusals", "scores", "system", "distribution", "keys",
    "prompting", "rerank", "mean", "std", "defined", "none", "true", "false",
}  # fmt: skip


class Attribute(Section):
    """One attribute. words, synonyms: what the third and the fourth prompting template say for a high and for a low level; tag: its name in
    the second; noun: its name in tables and pictures; levels: those that are trained, rising, of which the first and the last are asked for
    in evaluation. name: its key in the recipe."""

    name: str = ""
    words: tuple[str, str] = ("", "")
    synonyms: tuple[str, str] = ("", "")
    tag: str = ""
    noun: str = ""
    levels: tuple[float, ...] = (LOW, HIGH)

    @field_validator("levels")
    @classmethod
    def _rise(cls, levels: tuple[float, ...]) -> tuple[float, ...]:
        if len(levels) < 2 or list(levels) != sorted(set(levels)) or levels[0] < 0 or levels[-1] > 1:
            raise ValueError("are no levels: give two or more numbers from 0 to 1, each larger than the one before")
        return levels

    @property
    def bounds(self) -> tuple[tuple[float, ...], str]:
        """Where a score passes from one level to the next, and the side, as of numpy.searchsorted: half-way and there still the lower one,
        but of the paper's two levels at 0.5 and there the higher one."""
        if self.levels == (LOW, HIGH):
            return (0.5,), "right"
        return tuple((a + b) / 2 for a, b in zip(self.levels, self.levels[1:], strict=False)), "left"

    @property
    def ends(self) -> "Attribute":
        """The same with its first and its last level alone."""
        return self.model_copy(update={"levels": (self.levels[0], self.levels[-1])})


@dataclass(frozen=True)
class Attributes:
    """All attributes of a recipe, in its order."""

    each: tuple[Attribute, ...]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(attribute.name for attribute in self.each)

    @property
    def spoken(self) -> str:
        """Their names in a sentence."""
        return enumerated(self.names)

    @property
    def shown(self) -> tuple[Attribute, ...]:
        """In the order of tables: of the paper's two safety comes first there."""
        return self.each[::-1] if self == PAPER else self.each

    @cached_property
    def openings(self) -> tuple[str, ...]:
        """What a model may take for the opening of a control: the names of attributes and templates, and near-spellings."""
        words = [w for a in self.each for w in (a.name, f"{a.name}ness", a.synonyms[0].lower().replace(" ", ""), a.tag.lower())]
        return tuple(f"[{word}{sign}" for word in dict.fromkeys(words) for sign in "=:")

    def __len__(self) -> int:
        return len(self.each)

    def __iter__(self) -> Iterator[Attribute]:
        return iter(self.each)

    def dumped(self) -> list[dict[str, Any]]:
        """As JSON can hold them; `read_attributes` is the inverse."""
        return [attribute.model_dump(mode="json") for attribute in self.each]


def enumerated(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _named(name: str, given: Attribute) -> Attribute:
    """`given` under its name, with the paper's words where that is one of its two and words of the name else."""
    if not _NAME.fullmatch(name) or len(name) > 32 or name in _TAKEN or keyword.iskeyword(name):
        raise ValueError(f"{name!r} cannot be an attribute's name: give a word of small letters, such as concise")
    plain = {"name": name, "words": (name, f"not {name}"), "tag": name, "noun": name}
    plain |= _PAPER.get(name, {}) | given.model_dump(exclude_defaults=True)
    words = plain["words"]
    return Attribute(**{**plain, "name": name, "synonyms": plain.get("synonyms", words)})


_PAPER = {
    "helpful": {"noun": "helpfulness"},
    "harmless": {"synonyms": ("safe", "not safe"), "tag": "safety", "noun": "safety"},
}
PAPER = Attributes(tuple(_named(name, Attribute()) for name in _PAPER))


def _by_name(given: Any) -> Any:
    """A recipe's section as it is; what `dumped` gave, and attributes themselves, as such a section."""
    given = given.dumped() if isinstance(given, Attributes) else given
    if isinstance(given, list) and all(isinstance(part, Mapping) and "name" in part for part in given):
        return {part["name"]: part for part in given}
    return given


def _settled(given: Mapping[str, Attribute]) -> Attributes:
    if not 1 <= len(given) <= MOST:
        raise ValueError(f"{len(given)} attributes: give 1 to {MOST}")
    return Attributes(tuple(_named(name, attribute) for name, attribute in given.items()))


# The `attributes` of a recipe: an Attributes. The paper's two are no part of a dumped recipe.
AttributesSection = Annotated[
    dict[str, Attribute],
    BeforeValidator(_by_name),
    AfterValidator(_settled),
    PlainSerializer(Attributes.dumped),
    Field(exclude_if=lambda attributes: attributes == PAPER),
]


class _Holder(Section):
    attributes: AttributesSection = PAPER


def read_attributes(dumped: Any, where: object) -> Attributes:
    """The inverse of Attributes.dumped; DataError, naming `where` they are from, if they are none."""
    try:
        return _Holder(attributes=dumped).attributes
    except ValidationError:
        raise DataError(f"{where} names no attributes that this version of ctrlrl can read") from None


def stored(text: str | bytes | None, where: object) -> Attributes:
    """Attributes as JSON text; the paper's two where there is none. DataError as read_attributes."""
    try:
        return PAPER if text is None else read_attributes(json.loads(text), where)
    except ValueError:
        raise DataError(f"{where} is no JSON") from None


def unlike(given: Attributes, due: Attributes) -> str:
    """In what two lists of attributes differ: the names, or the first difference in words or levels; empty if in nothing."""
    if given == due:
        return ""
    if given.names != due.names:
        return f"{given.spoken} in place of {due.spoken}"
    name, key = next((a.name, key) for a, b in zip(given, due, strict=True) for key in a.model_dump() if getattr(a, key) != getattr(b, key))
    mine, yours = (getattr(next(a for a in of if a.name == name), key) for of in (given, due))
    return f"{key} of {name} {json.dumps(mine)} in place of {json.dumps(yours)}"


def check_named(section: str, given: Mapping[str, Any], attributes: Attributes, *, some: bool = False) -> None:
    """ValueError unless `given`, a section of a recipe by attribute, names every attribute (with `some`: any of them) and nothing else."""
    odd = [name for name in given if name not in attributes.names]
    if odd:
        raise ValueError(f"unknown key {f'{section}.{odd[0]}'!r}: the attributes are {attributes.spoken}")
    lacking = [name for name in attributes.names if name not in given]
    if some and not given:
        raise ValueError(f"give {' or '.join(f'{section}.{name}.model' for name in attributes.names)}")
    if lacking and not some:
        raise ValueError(f"'{section}.{lacking[0]}' is required: set it in the recipe or with --set {section}.{lacking[0]}=…")
