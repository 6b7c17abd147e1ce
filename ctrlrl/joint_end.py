"""Processes that are of no use without each other, such as those of an engine: they end together, and leave no shared memory, which nobody
else would remove."""

import os
import re
import select
import signal
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

# In /proc/PID/maps, and not yet removed: of Python's multiprocessing, and that in which vLLM's ranks meet on processors with AVX-512.
_NAMED = re.compile(r" (/dev/shm/(?:psm|vllm_dist)_\S+)$", re.MULTILINE)


def shared_memory(pid: int | str = "self") -> set[Path]:
    """The files of what a process has open."""
    return {Path(name) for name in _NAMED.findall(Path(f"/proc/{pid}/maps").read_text())}


def remove_shared_memory() -> None:
    """Remove what this process has open; those who have it open, too, keep it until they end."""
    for file in shared_memory():
        file.unlink(missing_ok=True)


def forget_names(files: Iterable[Path]) -> None:
    """Remove the files of shared memory that everybody who needs it has open: it ends with the last of them, whichever way they end. Once
    for all processes that share a resource tracker."""
    for file in files:
        file.unlink(missing_ok=True)
        if file.name.startswith("psm_"):  # the tracker knows of Python's alone
            resource_tracker.unregister(f"/{file.name}", "shared_memory")


def names_may_be_gone() -> None:
    """Have this process not complain when it is to remove what has no name any more."""
    unlink = SharedMemory.unlink

    def if_there(memory: SharedMemory) -> None:
        with suppress(FileNotFoundError):
            unlink(memory)

    SharedMemory.unlink = if_there


def end_with(pids: Sequence[int], tell: Callable[[int], None] = lambda pid: None) -> None:
    """Have this process end as soon as one of `pids` does, which is told. Nothing where the system cannot watch processes."""
    if pids and hasattr(os, "pidfd_open"):
        threading.Thread(target=_watch, args=(tuple(pids), tell), daemon=True, name="joint-end").start()


def _watch(pids: Sequence[int], tell: Callable[[int], None]) -> None:
    try:
        files = {os.pidfd_open(pid): pid for pid in pids}
        tell(files[select.select(files, [], [])[0][0]])
    except ProcessLookupError:
        pass  # one had ended before this one looked
    remove_shared_memory()
    os.kill(os.getpid(), signal.SIGKILL)
