"""Prompts and preference pairs from JSONL, JSONL.gz, CSV, Parquet, a directory of them, or a Hugging Face dataset.

data.files gives the rows, data.rows says what one of them means. A bad row is refused with its file and line, or set aside.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ctrlrl.data.files import read_rows
from ctrlrl.data.rejects import BadRows, Reject
from ctrlrl.data.rows import EXPECTED, pair_of, prompt_of
from ctrlrl.errors import DataError


@dataclass(frozen=True)
class Prompt:
    """One prompt: `messages` end with the user's turn; `source` is `file:line` of its first appearance."""

    prompt_id: str
    messages: tuple[dict[str, str], ...]
    source: str


@dataclass(frozen=True)
class PreferencePair:
    """One preference: `chosen` was preferred to `rejected` as the answer to `messages` (a system prompt comes first)."""

    messages: tuple[dict[str, str], ...]
    chosen: str
    rejected: str
    source: str


@dataclass(frozen=True)
class ReadReport:
    """What was read: files, rows (blank lines not counted), repeated prompts, and the rows set aside."""

    files: tuple[str, ...]
    rows: int
    duplicates: int
    rejects: tuple[Reject, ...]

    @property
    def rejected(self) -> int:
        """Number of rows set aside."""
        return len(self.rejects)


@dataclass(frozen=True)
class PromptSet:
    """Distinct prompts in the order of reading, and the report."""

    prompts: tuple[Prompt, ...]
    report: ReadReport

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.prompts)


def prompt_id(messages) -> str:
    """16 hexadecimal digits of the SHA-256 of the roles and contents: the same prompt has the same id everywhere."""
    text = json.dumps([[m["role"], m["content"]] for m in messages], separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_prompts(path_or_name: str | Path, *, skip_bad_rows: bool = False, limit: int | None = None) -> PromptSet:
    """The distinct prompts of a file, a directory or a Hugging Face dataset (`name` or `name:split`), at most `limit`.

    Bad rows raise one DataError with file and line; with `skip_bad_rows` they go to `report.rejects`. No prompt at all raises.
    """
    found: dict[str, Prompt] = {}
    rejects: list[Reject] = []
    bad, files, rows, duplicates = BadRows(rejects if skip_bad_rows else None), {}, 0, 0
    for source, row in read_rows(path_or_name):
        files[source.rpartition(":")[0]] = None
        rows += 1
        try:
            messages = prompt_of(row)
        except DataError as error:
            bad.add(source, error, row)
            continue
        key = prompt_id(messages)
        duplicates += key in found
        found.setdefault(key, Prompt(key, messages, source))
        if limit is not None and len(found) >= limit:
            break
    bad.refuse(rows)
    if not found:
        first = f"; the first of {len(rejects)} bad rows: {rejects[0].source}: {rejects[0].reason}" if rejects else ""
        raise DataError(f"{path_or_name}: no prompt found: {EXPECTED}{first}")
    return PromptSet(tuple(found.values()), ReadReport(tuple(files), rows, duplicates, tuple(rejects)))


def read_pairs(path_or_name: str | Path, *, rejects: list[Reject] | None = None, limit: int | None = None) -> list[PreferencePair]:
    """The preference pairs of a file, a directory or a Hugging Face dataset, in order, at most `limit`.

    Bad rows raise one DataError with file and line; when a list `rejects` is given, they are appended there instead.
    """
    pairs, bad, rows = [], BadRows(rejects), 0
    for source, row in read_rows(path_or_name):
        rows += 1
        try:
            pairs.append(PreferencePair(*pair_of(row), source))
        except DataError as error:
            bad.add(source, error, row)
        if limit is not None and len(pairs) >= limit:
            break
    bad.refuse(rows)
    if not pairs:
        first = f"; the first of {bad.count} bad rows: {rejects[-bad.count].source}: {rejects[-bad.count].reason}" if bad.count else ""
        raise DataError(f'{path_or_name}: no preference pair found: a row needs a prompt and the answers "chosen" and "rejected"{first}')
    return pairs
