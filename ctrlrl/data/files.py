"""Rows of the data files users bring: JSONL, JSONL.gz, CSV, Parquet, a directory of them, or a Hugging Face dataset.

Every row comes with the place it stood at, so that whoever refuses it can name file and line.
"""
import csv
import gzip
import json
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ctrlrl.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".parquet")
_HUB_NAME = re.compile(r"(?P<name>[\w-][\w.-]*(/[\w.-]+)?)(:(?P<split>\w+))?")


def read_rows(path_or_name: str | Path) -> Iterator[tuple[str, object]]:
    """(`file:line`, row) of every row; a row that cannot be decoded is given as the DataError that says why."""
    path, name = Path(path_or_name), str(path_or_name)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES) and not p.name.startswith("."))
        if not files:
            raise DataError(f"directory {name!r} holds no {', '.join(SUFFIXES)} file")
        for file in files:
            yield from _file_rows(file)
    elif path.exists():
        yield from _file_rows(path)
    elif _HUB_NAME.fullmatch(name) and not name.endswith(SUFFIXES):
        yield from _hub_rows(name)
    else:
        raise DataError(f"{name!r} does not exist: give a {', '.join(SUFFIXES)} file, a directory of them, or a Hugging Face dataset")


def _file_rows(path: Path) -> Iterator[tuple[str, object]]:
    readers = {".jsonl": _json_rows, ".gz": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
    if not path.name.endswith(SUFFIXES):
        raise DataError(f"{path}: unknown kind of file: give one of {', '.join(SUFFIXES)}")
    try:
        for line, row in readers[path.suffix](path):
            yield f"{path}:{line}", row
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:  # gzip reports a cut file as EOFError
        raise DataError(f"{path}: cannot be read, damaged or not what its name says: {error}") from None


def _json_rows(path: Path) -> Iterator[tuple[int, object]]:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield number, json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                except (json.JSONDecodeError, UnicodeDecodeError) as error:
                    yield number, DataError(f"not a JSON object in UTF-8: {error}")


def _csv_rows(path: Path) -> Iterator[tuple[int, object]]:
    csv.field_size_limit(sys.maxsize)  # a conversation is longer than the 128 KiB that csv allows by default
    with open(path, newline="", encoding="utf-8-sig") as lines:
        reader, line = csv.reader(lines), 1
        try:
            header = next(reader, [])
            line = reader.line_num + 1
            for cells in reader:
                if cells and len(cells) != len(header):
                    yield line, DataError(f"{len(cells)} cells under a header of {len(header)}: quote cells that hold commas or line ends")
                elif cells:
                    yield line, dict(zip(header, cells, strict=True))
                line = reader.line_num + 1
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}:{line}: not CSV in UTF-8: {error}") from None


def _parquet_rows(path: Path) -> Iterator[tuple[int, object]]:
    file, number = pq.ParquetFile(path), 0
    for batch in file.iter_batches(batch_size=4096):
        for row in batch.to_pylist():
            number += 1
            yield number, row


def _hub_rows(name: str) -> Iterator[tuple[str, object]]:
    try:
        import datasets
    except ImportError:
        raise DataError(f"{name!r} is no file or directory here; to read it as a Hugging Face dataset, pip install datasets") from None
    match = _HUB_NAME.fullmatch(name)
    try:
        rows = datasets.load_dataset(match["name"], split=match["split"] or "train")
    except (OSError, ValueError) as error:
        raise DataError(f"{name!r} is no file or directory here, and no Hugging Face dataset that can be loaded: {error}") from None
    for number, row in enumerate(rows, 1):
        yield f"{match['name']}:{number}", row
