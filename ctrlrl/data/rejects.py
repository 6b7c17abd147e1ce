"""Bad rows of users' data: refused together in one message, or, if that was allowed, set aside in rejects.jsonl."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ctrlrl.data.atomic import write_atomically
from ctrlrl.errors import DataError

REJECTS = "rejects.jsonl"
_SHOWN = 3  # bad rows that a refusal quotes
_KEPT_TEXT = 1000  # characters of a bad row that are kept


@dataclass(frozen=True)
class Reject:
    """A bad row that was set aside: where it stood, why, and its beginning; one line of rejects.jsonl."""

    source: str
    reason: str
    text: str


class BadRows:
    """The bad rows of one reading: all of them go to the list `kept`; without one they are counted, and refused in the end."""

    def __init__(self, kept: list[Reject] | None):
        self._kept, self._first, self.count = kept, [], 0

    def add(self, source: str, reason: object, row: object = "") -> None:
        """A row that stood at `source`."""
        self.count += 1
        if self._kept is not None:
            self._kept.append(Reject(source, str(reason), excerpt(row)))
        elif len(self._first) < _SHOWN:
            self._first.append(f"{source}: {reason}")

    def refuse(self, rows: int) -> None:
        """Raise the DataError that names the first bad rows, how many of `rows` there are, and the way out; none if all were kept."""
        if self._first:
            share = f"{self.count} of {rows} rows {'is' if self.count == 1 else 'are'} bad"
            way_out = "mend the file, or set bad rows aside in rejects.jsonl with --skip-bad-rows"
            raise DataError(f"{'; '.join(self._first)}{'; …' * (self.count > len(self._first))} ({share}: {way_out})")


def excerpt(row: object) -> str:
    """The beginning of a row as text; of one that was never decoded, nothing."""
    if isinstance(row, (str, DataError)):
        return "" if isinstance(row, DataError) else row[:_KEPT_TEXT]
    try:
        return json.dumps(row, default=str, ensure_ascii=False)[:_KEPT_TEXT]
    except (TypeError, ValueError, RecursionError):  # keys that JSON has not, integers of thousands of digits, depth
        return f"a {type(row).__name__} that cannot be written as JSON"


def write_rejects(directory: Path, rejects: Sequence[Reject]) -> None:
    """Write `directory`/rejects.jsonl, or remove that of an earlier run if there are none.

    Half surrogate pairs become the escapes that JSON has for them.
    """
    if rejects:
        lines = "".join(json.dumps(asdict(reject), ensure_ascii=False) + "\n" for reject in rejects)
        write_atomically(directory / REJECTS, lambda out: out.write(lines.encode("utf-8", "backslashreplace")))
    else:
        (directory / REJECTS).unlink(missing_ok=True)


def aside_line(rejects: Sequence[Reject]) -> str:
    """How many rows were set aside, for the log."""
    return f"{len(rejects):,} bad row{'s' * (len(rejects) != 1)} set aside in {REJECTS}, such as {rejects[0].source}: {rejects[0].reason}"
