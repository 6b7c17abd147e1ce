"""Files that appear whole or not at all."""
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from ctrlrl.errors import CtrlrlError, RunError


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `path` appear under its name only when its bytes are on the disk: write beside it, flush, rename, flush the directory.

    Whoever is killed on the way leaves `.NAME.tmp`, which counts for nothing. One writer at a time per path. RunError if the disk refuses.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as out:
            write(out)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, path)
        _flush(path.parent)
    except CtrlrlError:
        temporary.unlink(missing_ok=True)
        raise
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunError(f"{path} cannot be written: {error}: free space or choose another directory, and run again") from None


def write_directory(path: Path, write: Callable[[Path], object]) -> None:
    """Let the directory `path` appear under its name only when all that `write(folder)` puts there is on the disk.

    Whoever is killed on the way leaves `.NAME.partial` or `.NAME.old`, which count for nothing and are removed by the next writer.
    """
    aside = path.with_name(f".{path.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    write(aside)
    for place in (*aside.rglob("*"), aside):
        _flush(place)
    remove_directory(path)
    aside.rename(path)
    _flush(path.parent)


def remove_directory(path: Path) -> None:
    """Remove a directory, if it is there, in such a way that a half-removed one does not bear its name."""
    gone = path.with_name(f".{path.name}.old")
    shutil.rmtree(gone, ignore_errors=True)
    if path.exists():
        path.rename(gone)
        shutil.rmtree(gone)


def _flush(path: Path) -> None:
    """Have the disk hold what was written to a file or a directory."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


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
