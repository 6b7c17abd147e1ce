"""Workers are forked from a process that has done their imports, with the environment they asked for; without it another is started."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import ray

from actors import kin
from actors.group import _IMPORTS as RANK
from actors.placement import MODELS, Resources
from ctrlrl.models.sampler import IMPORTS as ROLLOUT

MODULE, COMMON = "wave", "chunk"  # of the standard library, and imported by nothing else here


@pytest.fixture
def tellers(ray_cluster):
    """A function: what so many workers with these resources say: of themselves, and from which process theirs was forked.
    (Their class is a local one, which travels with them.)"""
    actors = []

    class Told:
        def tell(self):
            parent = os.getppid()
            mother = parent if b"--serve" in Path(f"/proc/{parent}/cmdline").read_bytes() else None
            found = {key: os.environ.get(key) for key in ("CTRLRL_MARK", "OMP_NUM_THREADS")}
            return mother, MODULE in sys.modules, found, np.random.random(), os.getpgid(0) == os.getpid()

        def family(self):
            mother = os.getppid()
            grandmother = int(Path(f"/proc/{mother}/stat").read_text().rpartition(")")[2].split()[1])
            return grandmother, mother, os.environ["CTRLRL_MARK"], COMMON in sys.modules and MODULE in sys.modules

        def kin(self, code, watched=False):
            """What a process of its own sends that runs `code`; it begins when this one has been at work, with what this one has."""
            context = kin.context()
            (here, there), lock = context.Pipe(), context.Lock()
            os.environ["LATE"] = "now"
            child = context.Process(target=exec, args=(code, {"told": there, "lock": lock}), daemon=True)
            child.start()
            there.close()
            found = here.recv()
            if watched:
                kin.end_with([child.pid])
            child.join(60)
            if watched:
                time.sleep(60)  # the end comes by another thread, after the child's
            return os.getppid(), child.pid, child.exitcode, found

    def ask(count, resources, mark="a", common=(), call="tell", given=(), **more):
        options = resources.environment({"CTRLRL_MARK": mark, **more}, (MODULE,), common)
        new = [ray.remote(max_restarts=0)(Told).options(**options).remote() for _ in range(count)]
        actors.extend(new)
        return ray.get([getattr(actor, call).remote(*given) for actor in new], timeout=300)

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


def test_kinds_of_workers_share_what_they_import_both(tellers):
    kinds = [("c", {}), ("d", {}), ("d", {"OTHER": "1"}), ("c", {})]
    found = [tellers(1, Resources(), mark, (COMMON,), "family", **more)[0] for mark, more in kinds]
    (first, second, third, again) = found
    assert first[0] == second[0] != third[0]  # each has another mother; a variable that imports may look at, another grandmother
    assert len({first[1], second[1], third[1]}) == 3 and again == first
    assert [mark for _, _, mark, _ in found] == ["c", "d", "d", "c"] and all(imported for *_, imported in found)
    os.kill(first[0], signal.SIGKILL)
    os.kill(second[1], signal.SIGKILL)
    ((grandmother, mother, *_),) = tellers(1, Resources(), "d", (COMMON,), "family")
    assert grandmother not in (first[0], third[0]) and mother not in (first[1], second[1], third[1])


def test_a_worker_has_processes_of_its_own_forked_from_where_it_was(tellers):
    code = f"import os, sys; told.send((os.getpid(), os.getppid(), {MODULE!r} in sys.modules, os.environ['LATE'], lock.acquire()))"
    ((mother, child, ended, found),) = tellers(1, Resources(), call="kin", given=(code,))
    assert found == (child, mother, True, "now", True) and ended is not None
    with pytest.raises(ray.exceptions.RayActorError):  # which ends with it
        tellers(1, Resources(), call="kin", given=("import os; told.send(0); os._exit(1)", True))


def test_threads_do_not_keep_a_worker_from_being_forked(tellers):
    ((mother, imported, found, *_),) = tellers(1, Resources(threads=2))
    assert mother is not None and imported and found["OMP_NUM_THREADS"] == "2"


@pytest.mark.parametrize("imports", [(*MODELS, *ROLLOUT), (*MODELS, *RANK)], ids=["rollout", "rank"])
def test_imports_begin_no_threads(imports):
    """Those that a process to fork from makes: a lock that one of its threads held would be held for ever in its forks."""
    environment = os.environ | Resources(threads=4).environment({})["runtime_env"]["env_vars"]
    said = subprocess.run(
        [sys.executable, "-c", f"import os, {', '.join(imports)}; print('threads', len(os.listdir('/proc/self/task')))"],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert said.stdout.split("threads ")[-1].strip() == "1", said.stdout + said.stderr
