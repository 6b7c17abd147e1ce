"""The rows of one data file: JSON lines (plain or gzip), CSV, Parquet. Of Parquet only the columns that data.rows looks at are read.

A row that cannot be decoded is given as the DataError that says why; where the rest of a file cannot be trusted, that error is raised.
"""

import csv
import gzip
import json
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ctrlrl.data.rows import COLUMNS, MESSAGE_FIELDS, missing_columns
from ctrlrl.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".parquet")
Rows = Iterator[tuple[int, object]]

_DELIMITERS = ",;\t|"
_POINTER = b"version https://git-lfs"
# How files of other kinds begin, what they are, and what to do.
_FOREIGN = {
    _POINTER: ("a pointer of Git LFS, not the data", "git lfs pull"),
    b"\xff\xfe": ("text in UTF-16", "save it as UTF-8, such as by iconv -f UTF-16 -t UTF-8"),
    b"\xfe\xff": ("text in UTF-16", "save it as UTF-8, such as by iconv -f UTF-16 -t UTF-8"),
    b"\x1f\x8b": ("compressed by gzip", "name it .jsonl.gz if it holds JSON lines, or unpack it"),
    b"PK\x03\x04": ("a zip archive", "unpack it"),
    b"PAR1": ("a Parquet file", "name it .parquet"),
    b"ARROW1": ("an Arrow file", "write it as Parquet"),
    b"<!doctype html": ("a web page", "download the data itself"),
    b"<html": ("a web page", "download the data itself"),
}


def file_rows(path: Path, columns: Sequence[str] = COLUMNS) -> Rows:
    """(line, row) of every row of a file, whose kind is told by its name; DataError names the file that cannot be read.

    columns: those that are looked at.
    """
    kind = path.name.lower()
    if not kind.endswith(SUFFIXES):
        raise DataError(f"{path}: unknown kind of file: give one of {', '.join(SUFFIXES)}")
    try:
        _refuse_foreign(path, text=kind.endswith((".jsonl", ".csv")))
        if kind.endswith(".parquet"):
            yield from _parquet_rows(path, columns)
        elif kind.endswith(".csv"):
            yield from _csv_rows(path, columns)
        else:
            yield from _json_rows(path, gzip.open if kind.endswith(".gz") else open)
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:  # gzip reports a cut file as EOFError
        raise DataError(f"{path}: cannot be read, damaged or not what its name says: {error}") from None


def _refuse_foreign(path: Path, text: bool) -> None:
    """Name what a file is that is not what its name says; of binary kinds their own readers know all but the LFS pointer."""
    with open(path, "rb") as file:
        begins = file.read(64).lstrip(b" \r\n\t").lower()
    for magic, (what, remedy) in _FOREIGN.items():
        if begins.startswith(magic.lower()) and (text or magic == _POINTER):
            raise DataError(f"{path} is {what}: {remedy}")


def _json_rows(path: Path, opener) -> Rows:
    with opener(path, "rb") as lines:
        begun = False
        for number, line in enumerate(lines, 1):
            line = line.removeprefix(b"\xef\xbb\xbf").strip()  # of a file, or of one that was appended to it
            if not line:
                continue
            if not begun and (line[:1] == b"[" or line == b"{"):
                what, way = ("a JSON array", "'.[]'") if line[:1] == b"[" else ("an object over several lines", ".")
                raise DataError(f"{path}:{number}: {what}, where every line is one object: write it by jq -c {way} {path}")
            begun = True
            try:
                yield number, json.loads(line.decode(), object_pairs_hook=_object)
            except DataError as error:
                yield number, error
            except RecursionError:
                yield number, DataError("not a JSON object that can be read: it is nested too deeply")
            except ValueError as error:  # bytes, syntax, or an integer of more than 4300 digits
                yield number, DataError(f"not a JSON object in UTF-8: {error}")


def _object(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        if twice := next((name for name in (*COLUMNS, *MESSAGE_FIELDS) if names.count(name) > 1), None):
            raise DataError(f'an object has the key "{twice}" twice')
    return found


def _csv_rows(path: Path, columns: Sequence[str]) -> Rows:
    csv.field_size_limit(sys.maxsize)  # a conversation is longer than the 128 KiB that csv allows by default
    line = 1
    try:
        with open(path, newline="", encoding="utf-8-sig") as lines:
            delimiter = _delimiter(lines.readline(), columns)
            lines.seek(0)
            reader = csv.reader(_without_nul(lines, path), delimiter=delimiter, strict=True)
            header = next(reader, [])
            if twice := next((name for name in columns if header.count(name) > 1), None):
                raise DataError(f"{path}:1: two columns are named {twice!r}: rename one")
            line = reader.line_num + 1
            for cells in reader:
                if cells and len(cells) != len(header):
                    yield line, DataError(f"{len(cells)} cells under a header of {len(header)}: quote cells that hold commas or line ends")
                elif cells and _swallows(cells, delimiter):
                    yield line, DataError(f"a quoted cell that holds whole rows, to line {reader.line_num}: double the quotes within cells")
                elif cells:
                    yield line, dict(zip(header, cells, strict=True))
                line = reader.line_num + 1
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{_undecodable_line(path)}: not CSV in UTF-8: {error.reason}: save it as UTF-8") from None
    except csv.Error as error:
        raise DataError(
            f"{path}:{line}: not CSV: a quote in the row that begins here leads astray ({error}): "
            "quote a cell that holds quotes as a whole, and double those within"
        ) from None


def _delimiter(header: str, columns: Sequence[str]) -> str:
    """That between the cells of a header line: the one that sets a known column apart (in any case), else the comma."""
    names = {mark: [cell.strip('"').lower() for cell in header.rstrip("\r\n").split(mark)] for mark in _DELIMITERS}
    return next((mark for mark, cells in names.items() if set(cells) & {name.lower() for name in columns}), ",")


def _without_nul(lines: Iterable[str], path: Path) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if "\0" in line:
            raise DataError(f"{path}:{number}: not CSV in UTF-8: it holds NUL bytes: save it as UTF-8")
        yield line


def _swallows(cells: list[str], delimiter: str) -> bool:
    """Whether a quoted cell looks like the rest of its row, whole rows, and the beginning of another: a quote was never closed.

    Rows are told from prose by the number of delimiters in every line, none of which is followed by a space as a comma in prose is. With
    no whole row between, the first cells have to count on, too.
    """
    for place, cell in enumerate(cells):
        lines = cell.replace("\r\n", "\n").split("\n")
        if len(lines) == 1 or len(cells) == 1 or delimiter + " " in cell:
            continue
        marks = [line.count(delimiter) for line in lines]
        if marks == [len(cells) - 1 - place, *[len(cells) - 1] * (len(lines) - 2), place]:
            first, last = cells[0] if place else lines[0].split(delimiter)[0], lines[-1].split(delimiter)[0]
            if len(lines) > 2 or (first.isdecimal() and last.isdecimal() and int(last) == int(first) + 1):
                return True
    return False


def _undecodable_line(path: Path) -> int:
    """The number of the first line that is not UTF-8."""
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 1


def _parquet_rows(path: Path, columns: Sequence[str]) -> Rows:
    with pq.ParquetFile(path) as file:
        names, number = file.schema_arrow.names, 0
        if twice := next((name for name in columns if names.count(name) > 1), None):
            raise DataError(f"{path}: two columns are named {twice!r}: rename one")
        wanted = [name for name in names if name in columns]
        if not wanted:
            yield from ((line, DataError(missing_columns(names))) for line in range(1, file.metadata.num_rows + 1))
            return
        for batch in file.iter_batches(batch_size=4096, columns=_leaves(file, columns)):
            for row in _decoded(batch):
                number += 1
                yield number, row


def _leaves(file: pq.ParquetFile, columns: Sequence[str]) -> list[str]:
    """Paths of what has to be read: of messages their roles and texts alone, since what else they hold may have no Python value."""
    paths = [file.schema.column(i).path for i in range(len(file.schema))]
    own = [path for path in paths if path.split(".")[0] in columns]
    plain = {path.split(".")[0] for path in own if set(path.split(".")[1:]) & set(MESSAGE_FIELDS)}
    return [path for path in own if path.split(".")[0] not in plain or set(path.split(".")[1:]) & set(MESSAGE_FIELDS)]


def _decoded(batch: pa.RecordBatch) -> Iterator[object]:
    """The rows of a batch; one with a value that Python cannot hold is given as a DataError."""
    try:
        yield from batch.to_pylist()
    except (ValueError, OverflowError, pa.ArrowException):  # text that is not UTF-8, dates beyond the year 9999, …
        for index in range(len(batch)):
            try:
                yield batch.slice(index, 1).to_pylist()[0]
            except (ValueError, OverflowError, pa.ArrowException) as error:
                yield DataError(f"its {', '.join(batch.schema.names)} cannot be read: {error}")
