"""Prompts and preference pairs from JSONL, JSONL.gz, CSV, Parquet, a directory of them, or a Hugging Face dataset.

A row gives a prompt as `messages` (list of {"role", "content"}), as `prompt` (text), or as Anthropic HH transcripts in
`chosen` and `rejected`; an optional `system` text comes first. A preference row adds the answers `chosen` and `rejected`.
"""
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ctrlrl.data.files import read_rows
from ctrlrl.errors import DataError
from ctrlrl.prompts import check_messages

_TURN = re.compile(r"\n\n(Human|Assistant):")  # the transcripts of Anthropic HH
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_KEPT_TEXT = 1000  # characters of a bad row that are kept for rejects.jsonl
_EXPECTED = 'a row needs "messages" (list of role and content), "prompt" (text), or HH transcripts in "chosen" and "rejected"'


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
class Reject:
    """A bad row that was set aside: where it stood, why, and its beginning; one line of rejects.jsonl."""

    source: str
    reason: str
    text: str


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

    A bad row raises DataError with file and line; with `skip_bad_rows` it goes to `report.rejects`. No prompt at all raises.
    """
    found: dict[str, Prompt] = {}
    files, rejects, rows, duplicates = {}, [], 0, 0
    for source, row in read_rows(path_or_name):
        files[source.rpartition(":")[0]] = None
        rows += 1
        try:
            messages = _prompt_messages(_mapping(row))
        except DataError as error:
            _reject(rejects if skip_bad_rows else None, source, row, error)
            continue
        key = prompt_id(messages)
        duplicates += key in found
        found.setdefault(key, Prompt(key, messages, source))
        if limit is not None and len(found) >= limit:
            break
    if not found:
        first = f"; the first of {len(rejects)} bad rows: {rejects[0].source}: {rejects[0].reason}" if rejects else ""
        raise DataError(f"{path_or_name}: no prompt found: {_EXPECTED}{first}")
    return PromptSet(tuple(found.values()), ReadReport(tuple(files), rows, duplicates, tuple(rejects)))


def read_pairs(path_or_name: str | Path, *, rejects: list[Reject] | None = None, limit: int | None = None) -> list[PreferencePair]:
    """The preference pairs of a file, a directory or a Hugging Face dataset, in order, at most `limit`.

    A bad row raises DataError with file and line; when a list `rejects` is given, it is appended there instead.
    """
    pairs = []
    for source, row in read_rows(path_or_name):
        try:
            pairs.append(_pair(_mapping(row), source))
        except DataError as error:
            _reject(rejects, source, row, error)
        if limit is not None and len(pairs) >= limit:
            break
    if not pairs:
        raise DataError(f'{path_or_name}: no preference pair found: a row needs a prompt and the answers "chosen" and "rejected"')
    return pairs


def parse_transcript(text: str) -> list[dict[str, str]]:
    """An HH transcript, `\\n\\nHuman: … \\n\\nAssistant: …`, as messages; raises DataError unless the turns alternate, the human first."""
    before, *parts = _TURN.split(text)
    if before.strip() or not parts:
        raise DataError(f'a transcript starts with "\\n\\nHuman:"; got {text[:60]!r}')
    messages = [{"role": _SPEAKERS[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)]
    for index, message in enumerate(messages):
        expected = ("user", "assistant")[index % 2]
        if message["role"] != expected:
            raise DataError(f"turn {index + 1} of a transcript is the {expected}'s; got {message['role']}: {message['content'][:60]!r}")
    return messages


def _prompt_messages(row: dict) -> tuple[dict[str, str], ...]:
    if _given(row, "messages"):
        messages = _message_list(row["messages"])
    elif row.get("prompt") is not None:
        messages = [{"role": "user", "content": _text(row, "prompt")}]
    elif _given(row, "chosen") and _given(row, "rejected"):
        messages, _, _ = _split_transcripts(_text(row, "chosen"), _text(row, "rejected"))
    else:
        raise DataError(f"{_EXPECTED}; this one has {', '.join(str(k) for k in row) or 'nothing'}")
    if _given(row, "system"):
        if messages and messages[0]["role"] == "system":
            raise DataError('a row has its system prompt in "system" or in "messages", not in both')
        messages = [{"role": "system", "content": _text(row, "system")}, *messages]
    check_messages(messages)
    if not messages[-1]["content"].strip():
        raise DataError("the user's message is empty")
    return tuple(messages)


def _pair(row: dict, source: str) -> PreferencePair:
    messages = _prompt_messages(row)
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    if not _given(row, "messages") and row.get("prompt") is None:
        _, chosen, rejected = _split_transcripts(chosen, rejected)
    if not chosen.strip():  # an empty answer may be the worse one, as in UltraFeedback
        raise DataError('the answer "chosen" is empty')
    if chosen == rejected:
        raise DataError('"chosen" and "rejected" are the same answer, which prefers nothing')
    return PreferencePair(messages, chosen, rejected, source)


def _split_transcripts(chosen: str, rejected: str) -> tuple[list[dict[str, str]], str, str]:
    """The shared turns and the two last answers; HH repeats the whole conversation in both columns."""
    good, bad = parse_transcript(chosen), parse_transcript(rejected)
    if len(good) < 2 or good[-1]["role"] != "assistant" or bad[-1]["role"] != "assistant" or good[:-1] != bad[:-1]:
        raise DataError("the transcripts \"chosen\" and \"rejected\" share every turn but the last, which is the assistant's; these do not")
    return good[:-1], good[-1]["content"], bad[-1]["content"]


def _message_list(value) -> list[dict[str, str]]:
    if isinstance(value, str):  # CSV has no lists
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise DataError(f'"messages" is not JSON: {error}') from None
    if not isinstance(value, list) or not all(isinstance(m, dict) for m in value):
        raise DataError(f'"messages" is a list of {{"role", "content"}}; got {str(value)[:80]!r}')
    check_messages(value)
    for message in value:
        _encodable(message["content"], "messages")
    return [{"role": m["role"], "content": m["content"]} for m in value]


def _mapping(row) -> dict:
    if isinstance(row, DataError):
        raise row
    if not isinstance(row, dict):
        raise DataError(f"a row is a JSON object; got {str(row)[:60]!r}")
    return row


def _given(row: dict, name: str) -> bool:
    return row.get(name) not in (None, "", [])


def _text(row: dict, name: str) -> str:
    if not isinstance(row.get(name), str):
        raise DataError(f'"{name}" is a text; got {str(row.get(name))[:60]!r}')
    _encodable(row[name], name)
    return row[name]


def _encodable(text: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair: legal in JSON, storable nowhere
        raise DataError(f'"{name}" holds half a surrogate pair at character {error.start}: not Unicode text') from None


def _reject(rejects: list[Reject] | None, source: str, row, error: DataError) -> None:
    if rejects is None:
        raise DataError(f"{source}: {error}") from None
    text = "" if isinstance(row, DataError) else json.dumps(row, default=str)
    rejects.append(Reject(source, str(error), text[:_KEPT_TEXT]))
