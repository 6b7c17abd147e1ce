"""Workers are forked from a process that has done their imports, with the environment they asked for; without it another is started."""

import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import ray

from actors.placement import Resources

MODULE = "wave"  # of the standard library, and imported by nothing else here


@pytest.fixture
def tellers(ray_cluster):
    """A function: what so many workers with these resources say. (Their class is a local one, which travels with them.)"""
    actors = []

    class Told:
        def tell(self):
            parent = os.getppid()
            mother = parent if b"--serve" in Path(f"/proc/{parent}/cmdline").read_bytes() else None
            found = {key: os.environ.get(key) for key in ("CTRLRL_MARK", "OMP_NUM_THREADS")}
            return mother, MODULE in sys.modules, found, np.random.random(), os.getpgid(0) == os.getpid()


    def ask(count, resources, mark="a"):
        options = resources.environment({"CTRLRL_MARK": mark}, (MODULE,))
        new = [ray.remote(max_restarts=0)(Told).options(**options).remote() for _ in range(count)]
        actors.extend(new)
        return ray.get([actor.tell.remote() for actor in new], timeout=300)

    yield ask
    for actor in actors:
        ray.kill(actor)


def test_workers_with_the_same_environment_share_a_mother_and_nothing_random(tellers):
    first, second = tellers(2, Resources())
    assert first[0] == second[0] is not None
    assert first[1:3] == second[1:3] == (True, {"CTRLRL_MARK": "a", "OMP_NUM_THREADS": "1"})
    assert first[3] != second[3]
    assert first[4] and second[4]  # or the end of one would end the other
    ((other, _, found, *_),) = tellers(1, Resources(), "b")
    assert other not in (None, first[0]) and found["CTRLRL_MARK"] == "b"
    os.kill(first[0], signal.SIGKILL)
    ((again, imported, *_),) = tellers(1, Resources())
    assert again not in (None, first[0], other) and imported


def test_a_worker_with_threads_is_started_by_itself(tellers):
    ((mother, imported, found, *_),) = tellers(1, Resources(threads=2))
    assert mother is None and not imported and found["OMP_NUM_THREADS"] == "2"
