"""Shared memory that its maker, killed, has left behind."""

import subprocess
import sys

LEAVE = """
import os, signal, sys
from multiprocessing import resource_tracker, shared_memory
resource_tracker.register = lambda *_: None  # which would remove it: a worker's is killed with it
made = shared_memory.SharedMemory(create=True, size=100)
print("/dev/shm" + made._name, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
REMOVE = """
import sys
from multiprocessing import resource_tracker, shared_memory
from pathlib import Path
from ctrlrl.shared_memory import remember, remove_shared_memory
resource_tracker.register = lambda *_: None
closed, kept = sys.argv[1:]
still_open = shared_memory.SharedMemory(kept.removeprefix("/dev/shm/"))
was_open = shared_memory.SharedMemory(closed.removeprefix("/dev/shm/"))
was_open.close()
remove_shared_memory()
print(Path(closed).exists(), Path(kept).exists())
remember([Path(closed)])
remove_shared_memory()
print(Path(closed).exists(), Path(kept).exists())
"""


def run(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60).stdout.split()


def test_what_was_closed_here_is_removed_once_it_is_remembered():
    left = run(LEAVE) + run(LEAVE)
    assert len(set(left)) == 2
    assert run(REMOVE, *left) == ["True", "False", "False", "False"]
