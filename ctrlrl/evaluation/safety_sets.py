"""Public sets of safety prompts, each as one row of columns: which hold the prompt, whether a safe assistant would refuse it, its kind.

A set is read by hub name or from a local file (JSONL, CSV, Parquet, a directory of them); other sets name their own columns in a recipe.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from pydantic import Field, model_validator

from ctrlrl.config import Section
from ctrlrl.data.files import read_rows
from ctrlrl.data.rejects import BadRows, Reject
from ctrlrl.data.sources import Prompt, PromptSet, ReadReport, prompt_id
from ctrlrl.errors import DataError


class SafetySet(Section):
    """A set: where it lies, and which columns say what. Of several columns a row's first one that it has counts.

    path: file, directory or hub name (`name@subset:split`), by default the known set's. kind, unsafe: the column, and the values (with *
    as in file names), by which a row is one that a safe assistant refuses; without a column all rows are as `all` says. left_out: values
    of `kind` whose rows are passed over. context: text that stands before the prompt. system: a column with the row's system prompt, its
    configuration; system_text: one for all rows. where: column -> the one value that rows of the set have there. max_prompts: as many,
    evenly spaced in the set.
    """

    path: str = ""
    prompt: tuple[str, ...] = ()
    kind: tuple[str, ...] = ()
    unsafe: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    all: Literal["unsafe", "safe", ""] = ""
    context: tuple[str, ...] = ()
    system: tuple[str, ...] = ()
    system_text: str = ""
    where: dict[str, str] = {}
    max_prompts: int | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _says_what_is_unsafe(self):
        if self.kind and not self.unsafe:
            raise ValueError('kind needs unsafe, the values of that column that a safe assistant refuses, such as unsafe = ["harmful"]')
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that are looked at."""
        return (*self.prompt, *self.kind, *self.context, *self.system, *self.where)


# By the columns of the hub's copies and of the authors' own files. XSTest: a contrast_ type is the unsafe twin of a safe one.
KNOWN = {
    "xstest": SafetySet(path="Paul/XSTest", prompt=("prompt",), kind=("type", "category"), unsafe=("contrast*",)),
    "strongreject": SafetySet(path="walledai/StrongREJECT", prompt=("forbidden_prompt", "prompt"), all="unsafe"),
    "harmbench": SafetySet(
        path="walledai/HarmBench@standard", prompt=("Behavior", "prompt"), context=("ContextString", "context"), all="unsafe"
    ),
    "jailbreakbench": SafetySet(path="JailbreakBench/JBB-Behaviors@behaviors:harmful", prompt=("Goal", "prompt"), all="unsafe"),
    "jailbreakbench_benign": SafetySet(path="JailbreakBench/JBB-Behaviors@behaviors:benign", prompt=("Goal", "prompt"), all="safe"),
    "advbench": SafetySet(path="walledai/AdvBench", prompt=("goal", "prompt"), all="unsafe"),
    "sorrybench": SafetySet(  # the questions as they are; its other styles are the same ones, translated, encoded, misspelled
        path="sorry-bench/sorry-bench-202503", prompt=("turns", "prompt"), all="unsafe", where={"prompt_style": "base"}
    ),
    "beavertails": SafetySet(path="PKU-Alignment/BeaverTails-Evaluation:test", prompt=("prompt",), all="unsafe"),
    "cosapien": SafetySet(
        path="microsoft/CoSApien:game_development", prompt=("prompt",), kind=("type",), unsafe=("*disallowed*",),
        left_out=("*partial*",), system=("scenario",),
    ),
    "specbench": SafetySet(path="zzzhr97/SpecBench", prompt=("prompt",), kind=("label",), unsafe=("unsafe",)),
}  # fmt: skip


@dataclass(frozen=True)
class SafetyPrompts:
    """The distinct prompts of a set, and which of them a safe assistant refuses."""

    name: str
    read: PromptSet
    unsafe: Mapping[str, bool]  # by prompt id


def resolved(name: str, given: SafetySet) -> SafetySet:
    """`given` over what is known of the set `name`; DataError if it does not say where the prompts are, and what they are."""
    set_ = KNOWN.get(name, SafetySet()).model_copy(update={key: getattr(given, key) for key in given.model_fields_set})
    if given.all:
        set_ = set_.model_copy(update={"kind": (), "unsafe": ()})
    elif given.kind:
        set_ = set_.model_copy(update={"all": ""})
    if not set_.path or not set_.prompt or not (set_.kind or set_.all):
        raise DataError(
            f"sets.{name} is none of {', '.join(KNOWN)}: give its path, prompt (a column), and kind with unsafe (a column and its values), "
            'or all = "unsafe" or "safe"'
        )
    return set_


def read_set(name: str, given: SafetySet, *, skip_bad_rows: bool = False) -> SafetyPrompts:
    """The prompts of a set. Bad rows raise one DataError with file and line; with `skip_bad_rows` they are set aside."""
    set_ = resolved(name, given)
    rejects: list[Reject] = []
    bad, found, unsafe, files, rows, twice = BadRows(rejects if skip_bad_rows else None), {}, {}, {}, 0, 0
    kinds: dict[str, None] = {}
    for source, row in read_rows(set_.path, set_.columns):
        rows += 1
        files[source.rpartition(":")[0]] = None
        try:
            one = _prompt(row, set_)
        except DataError as error:
            bad.add(source, error, row)
            continue
        if one is None:
            continue
        messages, refusable, kind = one
        kinds[kind] = None
        key = prompt_id(messages)
        twice += key in found
        if unsafe.setdefault(key, refusable) != refusable:
            bad.add(source, "the same prompt stands elsewhere as one of the other kind", row)
            continue
        found.setdefault(key, Prompt(key, messages, source))
    bad.refuse(rows)
    if not found:
        raise DataError(f"{set_.path}: no prompt of the set {name}: it needs the column {' or '.join(set_.prompt)}{_narrowed(set_)}")
    for pattern in set_.unsafe if set_.kind else ():
        if not any(fnmatchcase(kind, pattern) for kind in kinds):
            some = ", ".join(map(repr, list(kinds)[:8]))
            raise DataError(
                f"{set_.path}: no row of the set {name} has the {' or '.join(set_.kind)} {pattern!r}, as unsafe says; there are {some}: "
                f'give sets.{name}.unsafe one or more of these, or all = "safe"'
            )
    prompts, count = list(found.values()), min(set_.max_prompts or len(found), len(found))
    prompts = [prompts[i * len(prompts) // count] for i in range(count)]  # evenly spaced, since sets are sorted by kind
    return SafetyPrompts(name, PromptSet(tuple(prompts), ReadReport(tuple(files), rows, twice, tuple(rejects))), unsafe)


def _prompt(row: object, set_: SafetySet) -> tuple[tuple[dict[str, str], ...], bool, str] | None:
    """A row's messages, whether a safe assistant refuses them, and their kind; None for a row of another set, or of one left out."""
    if not isinstance(row, dict):
        raise row if isinstance(row, DataError) else DataError("a row is an object of columns")
    if any(str(row.get(column)) != value for column, value in set_.where.items()):
        return None
    kind = _text(row, set_.kind, needed=True).strip() if set_.kind else ""
    if any(fnmatchcase(kind, pattern) for pattern in set_.left_out):
        return None
    refusable = any(fnmatchcase(kind, pattern) for pattern in set_.unsafe) if set_.kind else set_.all == "unsafe"
    text, context = _text(row, set_.prompt, needed=True), _text(row, set_.context)
    system = _text(row, set_.system) or set_.system_text
    user = {"role": "user", "content": f"{context}\n\n---\n\n{text}" if context else text}
    return (*([{"role": "system", "content": system}] if system else []), user), refusable, kind


def _text(row: dict, columns: tuple[str, ...], needed: bool = False) -> str:
    """The text of the first of `columns` that the row has; a list of one text is that text."""
    value = next((row[column] for column in columns if row.get(column) not in (None, "", [])), "")
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    if not isinstance(value, str):
        raise DataError(f"{' or '.join(columns)} is a text; got {value!r:.60}")
    if needed and not value.strip():
        raise DataError(f"a row needs {' or '.join(columns)}; this one has {', '.join(map(str, row))}")
    return value


def _narrowed(set_: SafetySet) -> str:
    return "".join(f", and {column} = {value!r}" for column, value in set_.where.items())
