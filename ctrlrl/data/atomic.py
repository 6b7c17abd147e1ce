"""Files that appear whole or not at all."""
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import BinaryIO

from ctrlrl.data.disk import disk_told
from ctrlrl.data.lock import LOCK, DirectoryLock
from ctrlrl.errors import RunError

_LEFT = re.compile(r"\.(?P<name>.+)\.(?P<kind>tmp|partial|replaced|gone|old)")  # old: of earlier versions


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `path` appear under its name only when its bytes are on the disk: write beside it, flush, rename, flush the directory.

    Whoever is killed on the way leaves `.NAME.tmp`, which counts for nothing. One writer at a time per path. StorageError if the disk
    refuses.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with disk_told(path, place=True):
            with open(temporary, "wb") as out:
                write(out)
                out.flush()
                os.fsync(out.fileno())
            os.replace(temporary, path)
            _flush(path.parent)
    except Exception:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)  # what was begun gives its space back, once the error has told how much is left
        raise


def write_directory(path: Path, write: Callable[[Path], object]) -> None:
    """Let the directory `path` appear under its name only when all that `write(folder)` puts there is on the disk.

    Whoever is killed on the way leaves `.NAME.partial` or `.NAME.replaced`, which clear_leftovers puts right. StorageError if the disk
    refuses, on whichever machine: an earlier directory stays then.
    """
    aside, replaced = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.replaced")
    try:
        with disk_told(path):
            discard(aside)
            aside.mkdir()
            write(aside)
            for place in (*aside.rglob("*"), aside):
                if not place.is_symlink():
                    _flush(place)
    except Exception:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    with disk_told(path):
        if os.path.lexists(path):
            discard(replaced)
            path.rename(replaced)
        aside.rename(path)
        _flush(path.parent)
        discard(replaced)


def remove_directory(path: Path) -> None:
    """Remove a directory, if it is there, in such a way that a half-removed one does not bear its name; of a link, the link alone."""
    gone = path.with_name(f".{path.name}.gone")
    with disk_told(path):
        discard(gone)
        if os.path.lexists(path):
            path.rename(gone)
            discard(gone)


def remove_all(directories: Sequence[Path]) -> None:
    """Remove directories: all of them, or none if one cannot be removed. StorageError names it, RunError a writer that is at work there."""
    with ExitStack() as held:
        for path in directories:
            for folder in {lock.parent for lock in path.rglob(LOCK)}:
                held.enter_context(DirectoryLock(folder))
        moved: list[tuple[Path, Path]] = []
        try:
            for path in directories:
                gone = path.with_name(f".{path.name}.gone")
                with disk_told(path, place=True):
                    discard(gone)
                    path.rename(gone)
                moved.append((path, gone))
        except RunError:
            for path, gone in moved:
                gone.rename(path)
            raise
    for path, gone in moved:
        with disk_told(path):
            discard(gone)


def discard(path: Path) -> None:
    """Remove a file, a link (not what it points to), or a directory with all that is in it, if it is there."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    elif path.exists():
        shutil.rmtree(path)


def clear_leftovers(folder: Path, ours: Callable[[str], bool]) -> None:
    """Remove what killed writers left in `folder` beside the names that are `ours`; to be called by the one writer.

    A directory that was about to be replaced bears its name again, if the new one did not get so far.
    """
    with disk_told(folder):
        for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
            if not (match := _LEFT.fullmatch(entry.name)) or not ours(match["name"]):
                continue
            if match["kind"] == "replaced" and not os.path.lexists(folder / match["name"]):
                entry.rename(folder / match["name"])
            else:
                discard(entry)


def _flush(path: Path) -> None:
    """Have the disk hold what was written to a file or a directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def append_whole(file: BinaryIO, data: bytes) -> None:
    """Append `data` to an unbuffered file, all of it or nothing."""
    end = os.fstat(file.fileno()).st_size
    try:
        while data:
            data = data[file.write(data) :]
    except OSError:
        with suppress(OSError):
            os.ftruncate(file.fileno(), end)
        raise


def write_text(path: Path, text: str) -> None:
    """`text` as UTF-8, atomically."""
    write_atomically(path, lambda out: out.write(text.encode()))


def write_json(path: Path, value: dict) -> None:
    """`value` as indented JSON with sorted keys, atomically; a NaN is a bug of the caller."""
    write_atomically(path, lambda out: out.write(json.dumps(value, indent=1, sort_keys=True, allow_nan=False).encode()))


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()
