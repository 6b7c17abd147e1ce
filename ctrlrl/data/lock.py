"""One writer at a time for a directory: whoever holds its lock may write there, and everybody else is refused by name.

The lock is an advisory lock of the system (flock) on the file `.lock`, which says who holds it. The system frees it when its holder ends,
however it ends, so nobody waits for the dead. Between machines it holds where the file system passes such locks on: NFS 4, NFS 3 with its
lock service, Lustre mounted with `flock`, CephFS, GPFS. Where each machine keeps them to itself (NFS mounted with `nolock` or `local_lock`,
Lustre with `localflock`), the later writer takes over unhindered; the earlier one finds another's name in the file at its next `check`,
and stops before it writes.
"""

import fcntl
import os
import secrets
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from ctrlrl.data.disk import disk_told
from ctrlrl.errors import RunError

LOCK = ".lock"


class DirectoryLock:
    """The right to write in a directory, which is made if need be."""

    def __init__(self, directory: Path):
        self.directory, self._path = directory, directory / LOCK
        self._file: BinaryIO | None = None  # closed, and with it freed, when this object goes
        self._text, self._made = "", False

    @property
    def held(self) -> bool:
        """Whether it was taken, and not released."""
        return self._file is not None

    def take(self) -> "DirectoryLock":
        """Become the one writer until `release`, or until this process ends; RunError names who is that already."""
        if self.held:
            return self
        with disk_told(self._path, place=True):
            if self.directory.exists() and not self.directory.is_dir():
                raise RunError(f"{self.directory} is a file: give a directory")
            self._made = not self.directory.exists()
            file = self._lock()
            since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
            self._text = f"process {os.getpid()} on {socket.gethostname()} since {since} ({secrets.token_hex(4)})"
            os.pwrite(file.fileno(), self._text.encode(), 0)  # before the cut: whoever is refused meanwhile reads a name
            os.ftruncate(file.fileno(), len(self._text))
        self._file = file
        return self

    def check(self) -> None:
        """RunError if the directory has another writer, because the lock file was removed or the file system does not share locks."""
        try:
            found = self._path.read_text(errors="replace")
        except FileNotFoundError:
            found = ""
        if self.held and found != self._text:
            raise RunError(f"{self.directory} is being written by {_named(found)} too: this one stops, so that nothing is written twice")

    def release(self) -> None:
        """Let another process write; a directory that was made for the lock, and holds nothing else, is removed."""
        if self._file is None:
            return
        with suppress(OSError):
            if self._path.read_text() == self._text:
                self._path.unlink()
        self._file.close()
        self._file = None
        if self._made:
            with suppress(OSError):
                self.directory.rmdir()

    def __enter__(self) -> "DirectoryLock":
        return self.take()

    def __exit__(self, *_) -> None:
        self.release()

    def _lock(self) -> BinaryIO:
        """The locked file; one that was removed while it was opened counts for nothing."""
        while True:
            self.directory.mkdir(parents=True, exist_ok=True)
            file = os.fdopen(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b", buffering=0)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = _named(os.pread(file.fileno(), 1000, 0).decode(errors="replace"))
                raise RunError(f"{self.directory} is being written by {owner}: wait for it, or stop it") from None
            except OSError as error:
                raise RunError(f"{self.directory} cannot be locked: {error}: choose a directory whose file system has locks") from None
            if self._path.exists() and os.path.samestat(os.fstat(file.fileno()), self._path.stat()):
                return file
            file.close()


def _named(text: str) -> str:
    return text.rpartition(" (")[0] or text or "a process that gives no name"
