"""Shared memory of processes that are about to be killed: nobody else would remove it."""

import re
from collections.abc import Iterable
from pathlib import Path

# In /proc/PID/maps; of Python's multiprocessing, and not yet removed.
_NAMED = re.compile(r" (/dev/shm/psm_\S+)$", re.MULTILINE)
_SHARED: set[Path] = set()


def shared_memory(pid: int | str = "self") -> set[Path]:
    """The files of what a process has open."""
    return {Path(name) for name in _NAMED.findall(Path(f"/proc/{pid}/maps").read_text())}


def remember(files: Iterable[Path]) -> None:
    """What this process shares with others: to be removed also when it has been closed here, while the one that made it was killed."""
    _SHARED.update(files)


def remove_shared_memory() -> None:
    """Remove what this process has open, and what it remembers; those who have it open, too, keep it until they end."""
    for file in shared_memory() | _SHARED:
        file.unlink(missing_ok=True)
