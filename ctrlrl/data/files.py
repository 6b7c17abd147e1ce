"""The files that a path names, and their rows: one file, all data files of a directory, or a Hugging Face dataset.

Every row comes with the place it stood at, so that whoever refuses it can name file and line.
"""

import json
import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from ctrlrl.data.formats import SUFFIXES, file_rows
from ctrlrl.data.rows import COLUMNS
from ctrlrl.errors import DataError

_HUB_NAME = re.compile(r"(?P<name>[\w-][\w.-]*(/[\w.-]+)?)(@(?P<config>[\w.-]+))?(:(?P<split>\w+))?")
# Data that is not read, which nobody should miss in silence: a directory with such a file is refused.
_PACKED = (".gz", ".zst", ".bz2", ".xz", ".lz4", ".zip")
_UNREAD = (
    *(kind + packed for kind in (".json", ".jsonl", ".csv", ".parquet") for packed in _PACKED if kind + packed not in SUFFIXES),
    *(".ndjson", ".jsonlines", ".tsv", ".arrow", ".feather", ".xls", ".xlsx", ".orc", ".pq", ".parq", ".avro"),
)
_TEMPORARY = ("~", ".part", ".partial", ".tmp", ".incomplete")  # folders that another program is still filling


def read_rows(path_or_name: str | Path, columns: Sequence[str] = COLUMNS) -> Iterator[tuple[str, object]]:
    """(`file:line`, row) of every row; a row that cannot be decoded is given as the DataError that says why. columns: those looked at."""
    name = str(path_or_name)
    if not name.strip():
        raise DataError(f"{name!r} names no data: give a {', '.join(SUFFIXES)} file, a directory of them, or a Hugging Face dataset")
    try:
        path = expanded(name)
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        yield from _absent(name, path)
    except (OSError, ValueError) as error:  # no permission, a loop of links, a name too long; NUL
        raise DataError(f"{name!r} cannot be read: {error}") from None
    else:
        for file in data_files(path) if stat.S_ISDIR(mode) else [path]:
            if not file.is_file():
                raise DataError(f"{_shown(file)} is no regular file, and rows are read more than once: write them to a file")
            shown = _shown(file)
            for line, row in file_rows(file, columns):
                yield f"{shown}:{line}", row


def expanded(name: str | Path) -> Path:
    """`name` as a path, `~` expanded; DataError for the home of nobody."""
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise DataError(f"{str(name)!r} cannot be read: {error} Write ./{name} if it is the name of a file") from None


def data_files(directory: Path) -> list[Path]:
    """The data files below a directory, in order, each real file once. Hidden and temporary ones and what lies in such folders are none."""
    found: dict[tuple[int, int], Path] = {}
    entered = set()
    for folder, folders, names in os.walk(directory, onerror=_refuse, followlinks=True):
        place = os.stat(folder)
        if (place.st_dev, place.st_ino) in entered:  # a link to a folder above or beside it
            folders.clear()
            continue
        entered.add((place.st_dev, place.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not name.endswith(_TEMPORARY))
        for name in sorted(names):
            file = Path(folder, name)
            if name.startswith("."):
                continue
            if name.lower().endswith(_UNREAD) or (name.lower().endswith(".json") and _holds_rows(file)):
                raise DataError(f"{_shown(file)} would not be read: write it as one of {', '.join(SUFFIXES)}, or move it elsewhere")
            if name.lower().endswith(SUFFIXES):
                try:
                    same = os.stat(file)
                except OSError as error:
                    raise DataError(f"{_shown(file)} cannot be read: {error.strerror}") from None
                found.setdefault((same.st_dev, same.st_ino), file)
    if not found:
        raise DataError(f"directory {_shown(directory)!r} holds no {', '.join(SUFFIXES)} file")
    return sorted(found.values())


def _holds_rows(file: Path) -> bool:
    """Whether a .json file looks like data: a list, or a line that is a row. Others tell of a data set."""
    try:
        with open(file, encoding="utf-8-sig") as lines:
            first = lines.readline(1 << 20).strip()
        if first.startswith("["):
            return True
        row = json.loads(first)
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(row, dict) and bool(set(row) & set(COLUMNS))


def _absent(name: str, path: Path) -> Iterator[tuple[str, object]]:
    """The rows of a hub data set, if the name of a path that does not exist can be one."""
    if os.path.islink(path):
        raise DataError(f"{name!r} is a link to {os.readlink(path)!r}, which does not exist")
    # The hub is never asked for what is a local path by its looks: a folder that is there, or that jobs write to.
    local = name.startswith("runs/") or ("/" in name and Path(name).parts[0] not in ("", "/") and Path(Path(name).parts[0]).is_dir())
    if not _HUB_NAME.fullmatch(name) or name.lower().endswith((*SUFFIXES, *_UNREAD, ".json", ".txt")) or local:
        hint = "; patterns are not expanded" if set("*?[") & set(name) else ""
        raise DataError(f"{name!r} does not exist: give a {', '.join(SUFFIXES)} file, a directory of them, or a Hugging Face dataset{hint}")
    return _hub_rows(name)


def _hub_rows(name: str) -> Iterator[tuple[str, object]]:
    os.environ.setdefault("HF_DATASETS_TRUST_REMOTE_CODE", "0")  # no code of a data set is run, and nobody is asked whether it may
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError:
        raise DataError(f"{name!r} is no file or directory here; to read it as a Hugging Face dataset, pip install datasets") from None
    match = _HUB_NAME.fullmatch(name)
    try:
        subset = [match["config"]] if match["config"] else []
        rows = datasets.load_dataset(match["name"], *subset, split=match["split"] or "train")
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(f"{name!r} is no file or directory here, and no Hugging Face dataset that can be loaded: {error}") from None
    for number, row in enumerate(rows, 1):
        yield f"{match['name']}:{number}", row


def _refuse(error: OSError) -> None:
    raise DataError(f"{error.filename!r} cannot be read: {error.strerror}") from None


def _shown(path: Path) -> str:
    """A path as text that can be stored; names need not be UTF-8."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
