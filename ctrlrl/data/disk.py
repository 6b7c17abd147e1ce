"""What a disk refuses, in words: it is full, over quota, read-only, closed to us. The one place that turns such errors into StorageError.

Libraries wrap the system's error: torch and safetensors keep only its text, pyarrow its number, and Ray brings any of them from a worker.
"""

import errno
import os
import re
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ctrlrl.errors import CtrlrlError, StorageError

_REMEDIES = {
    errno.ENOSPC: "free space there",
    errno.EDQUOT: "free some of your quota there, or have it raised",
    errno.EFBIG: "raise the limit on a file's size (ulimit -f, or that of the file system)",
    errno.EROFS: "have it mounted for writing, or choose another directory",
    errno.EACCES: "have its permissions changed, or choose another directory",
    errno.EPERM: "have its permissions changed, or choose another directory",
    errno.EIO: "check the disk, or choose another directory",
    errno.ESTALE: "have the file system mounted again",
    errno.ENAMETOOLONG: "choose a shorter path",
}
_PLACE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP, errno.EINVAL, errno.EBUSY, errno.ENXIO}
# safetensors: "… (os error 28)", "Os { code: 28, kind: …"; Python and pyarrow as text: "[Errno 28]", "[errno 28]".
_NUMBER = re.compile(r"\[errno (\d+)\]|\(os error (\d+)\)|Os \{ code: (\d+),", re.IGNORECASE)
_FILE = re.compile(r"\[Errno \d+\] [^\n:]+: '([^'\n]+)'")
_TORCH = re.compile(r"PytorchStreamWriter failed|unexpected pos \d+ vs \d+")  # torch.save tells neither number nor reason
_LOW = 16 << 20  # bytes: less than a buffer that torch writes at once


def storage_error(error: BaseException, path: str | Path | None = None, place: bool = False) -> StorageError | None:
    """`error` as a StorageError if it, or what it was raised from, is a disk's refusal; else None. path: what was being written.

    place: whether a path that leads through a file, or to nowhere, is one too.
    """
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, StorageError):
            return error
        if isinstance(error, CtrlrlError):
            return None
        number, text = getattr(error, "errno", None), str(error)
        file = path or getattr(error, "filename", None)
        if number is None and (match := _NUMBER.search(text)):
            number = int(next(filter(None, match.groups())))
            file = file or ((match := _FILE.search(text)) and match[1])
        if number is None and _TORCH.search(text):
            number = _guess(path)
        if number in _REMEDIES or (place and number in _PLACE):
            return StorageError(_message(number, file))
        error = getattr(error, "cause", None) or error.__cause__ or error.__context__
    return None


@contextmanager
def disk_told(path: Path, place: bool = False) -> Iterator[None]:
    """Context in which `path` is written: a disk's refusal becomes a StorageError that names it. place: as of storage_error."""
    try:
        yield
    except Exception as error:
        if told := storage_error(error, path, place):
            raise told from None
        raise


def _message(number: int, file: str | Path | None) -> str:
    if file is None:
        return f"a file cannot be read or written: {os.strerror(number)}: {_remedy(number)}, and run the same command again"
    path, said = Path(os.fsdecode(file)).absolute(), os.strerror(number)
    place = next(folder for folder in (path, *path.parents) if folder.exists())
    mount = next(folder for folder in (place, *place.parents) if os.path.ismount(folder))
    if number in (errno.ENOSPC, errno.EDQUOT):
        usage = shutil.disk_usage(mount)
        said += f" ({usage.free / 2**20:,.1f} of {usage.total / 2**20:,.1f} MiB free on {mount})"
    return f"{path} cannot be written: {said}: {_remedy(number)}, and run the same command again; what was finished before is whole"


def _remedy(number: int) -> str:
    return _REMEDIES.get(number, "choose another directory")


def _guess(path: str | Path | None) -> int:
    """Why torch could write only a part."""
    if path is None:
        return errno.ENOSPC
    place = next(folder for folder in (Path(path).absolute(), *Path(path).absolute().parents) if folder.exists())
    if shutil.disk_usage(place).free < _LOW:
        return errno.ENOSPC
    limited = resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY
    return errno.EFBIG if limited else errno.ENOSPC
