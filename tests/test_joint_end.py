"""Processes that end together, and what they shared."""

import os
import subprocess
import sys
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import pytest

from ctrlrl.joint_end import shared_memory

END = """
import sys
from ctrlrl.joint_end import end_with
end_with([int(sys.argv[1])], lambda pid: print(pid, flush=True))
print("waits", flush=True)
sys.stdin.read()
"""
MAKE = """
import os, sys
from multiprocessing.shared_memory import SharedMemory
from ctrlrl.joint_end import forget_names, names_may_be_gone, shared_memory
kept, forgotten = (SharedMemory(create=True, size=100) for _ in range(2))
kept.buf[0] = forgotten.buf[0] = 7
names_may_be_gone()
forget_names(file for file in shared_memory() if file.name == forgotten.name)
print(kept.name, forgotten.name, [file.name for file in shared_memory()] == [kept.name], forgotten.buf[0], flush=True)
forgotten.close(), forgotten.unlink()
"""


def test_a_process_ends_with_another():
    other = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    one = subprocess.Popen([sys.executable, "-c", END, str(other.pid)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert one.stdout.readline() == "waits\n" and one.poll() is None
    other.kill()
    assert one.stdout.read() == f"{other.pid}\n" and one.wait(60) == other.wait() == -9


def test_memory_without_a_name_stays_open_and_nobody_complains():
    done = subprocess.run([sys.executable, "-c", MAKE], capture_output=True, text=True, timeout=60)
    kept, forgotten, alone, value = done.stdout.split()
    assert (alone, value) == ("True", "7") and not Path("/dev/shm", forgotten).exists()
    assert forgotten not in done.stderr and "1 leaked shared_memory" in done.stderr and not Path("/dev/shm", kept).exists()


@pytest.mark.parametrize("pattern", [None, "vllm_dist_{}-tp:0-[0-1]-cpushm_0"])
def test_what_a_process_has_open_is_known_until_it_is_removed(pattern):
    memory = SharedMemory(create=True, size=100, name=pattern and pattern.format(os.getpid()))
    assert Path("/dev/shm", memory.name) in shared_memory()
    memory.unlink()
    assert Path("/dev/shm", memory.name) not in shared_memory()
    memory.close()
