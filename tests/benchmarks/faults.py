"""Faults for jobs that run by the command line: killed and stopped processes, lost nodes, torn files, a full disk; and how a user answers.

Used by chaos.py and, in short, by tests/jobs/test_chaos.py. Processes are found by their title and by RAY_TMPDIR in their environment.
"""

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIMIT_S = 300  # without progress
# What Ray calls the processes of our workers, and what the faults call them.
TITLES = {"rollout": "ray::RolloutWorker", "reward": "ray::RewardWorker", "reference": "ray::ReferenceWorker", "rank": "ray::TrainerRank"}


@dataclass
class Job:
    """A command of ctrlrl that may be run again until it is done. progress: how much of it is done, of `total`."""

    name: str
    command: list[str]
    out: Path
    total: int
    progress: Callable[[], int]
    kinds: tuple[str, ...]
    check: Callable[[], None]
    resume: tuple[str, ...] = ()
    process: subprocess.Popen | None = None
    said_before: int = 0  # bytes of the log that earlier runs wrote

    @property
    def log(self) -> Path:
        """What it prints, over all its runs."""
        return Path(os.environ["RAY_TMPDIR"], f"{self.name}.log")

    def start(self) -> None:
        """Run the command, again if need be."""
        with self.log.open("a") as log:
            self.said_before = log.tell()
            again = self.resume if self.out.exists() else ()
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ctrlrl.cli", *self.command, *again], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
            )

    def said(self) -> str:
        """What it printed since it was last started."""
        return self.log.read_bytes()[self.said_before :].decode(errors="replace")

    def tail(self) -> str:
        """The end of what it printed."""
        return self.log.read_text(errors="replace")[-3000:]


def pids(title: str) -> list[int]:
    """Processes of our cluster whose title begins so."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "cmdline").read_bytes().startswith(title.encode()) and os.environ["RAY_TMPDIR"].encode() in (
                entry / "environ"
            ).read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


class Faults:
    """What can go wrong, and how it is answered. cluster: a ray.cluster_utils.Cluster whose nodes may be lost; disk: a small one."""

    def __init__(self, cluster, disk: Path, dice: random.Random):
        self.cluster, self.disk, self.dice = cluster, disk, dice

    def strike(self, kind: str, job: Job) -> bool:
        """Let one fault happen; False if there was nobody to meet it."""
        action, _, whom = kind.partition(":")
        if action in ("kill", "stop"):
            there = pids(TITLES[whom])
            if there:
                os.kill(self.dice.choice(there), signal.SIGKILL if action == "kill" else signal.SIGSTOP)
            return bool(there)
        if action == "node":
            self.cluster.remove_node(self.dice.choice(list(self.cluster.worker_nodes)), allow_graceful=False)
            self.cluster.add_node(num_cpus=1, resources={"rollout": 1}, object_store_memory=80 << 20)
            return True
        return self._torn(job) if action == "torn" else self._full(job)

    def _torn(self, job: Job) -> bool:
        job.process.kill()
        job.process.wait()
        metrics = job.out / "metrics.jsonl"
        if metrics.is_file() and metrics.stat().st_size:
            with metrics.open("a") as file:
                file.write('{"step": 99, "rew')
        for name in ("checkpoints/.step-000999.partial", "samples/shards/.000000.parquet.tmp"):
            if (job.out / name).parent.is_dir():
                (job.out / name).write_bytes(b"PAR1 half of it")
        job.start()
        return True

    def _full(self, job: Job) -> bool:
        """Fill the disk until the job ends, as it must: with exit code 2 and a message, unless it ends or writes nothing meanwhile."""
        filler = self.disk / "filler"
        with filler.open("wb", buffering=0) as file, suppress(OSError):  # a buffer would be written again when the file is closed
            while True:
                file.write(bytes(1 << 16))
        end, code = time.monotonic() + LIMIT_S, None  # a step may take long on a busy machine
        while code is None and time.monotonic() < end:
            time.sleep(0.1)
            code = job.process.poll()
        filler.unlink()
        if code is None:
            return False
        assert code == 2 and "Traceback" not in job.said() and "space" in job.said(), (code, job.tail())
        job.start()
        return True


def run(job: Job, faults: Faults, count: int, dice: random.Random, kinds: tuple[str, ...]) -> list[dict]:
    """Run the job to its end under `count` faults; returns what happened and how long it took until work went on."""
    report, began = [], time.monotonic()
    planned = [kind for kind, _ in zip(itertools.cycle(dice.sample(kinds, len(kinds))), range(count))]  # noqa: B905 (one is endless)
    dice.shuffle(planned)
    moments = sorted(dice.uniform(0, 0.8 * job.total) for _ in range(count))  # the last must find the job at work
    job.start()
    for moment, kind in zip(moments, planned, strict=True):
        if not waited(job, lambda m=moment: job.progress() >= int(m)):
            break
        end = time.monotonic() + dice.uniform(0, 2)
        while time.monotonic() < end and job.progress() < 0.9 * job.total:  # a fast job would be done before the fault strikes
            time.sleep(0.02)
        before, since = job.progress(), time.monotonic()
        if job.process.poll() is not None:
            break
        met = faults.strike(kind, job)
        waited(job, lambda b=before: job.progress() > b)
        report.append({"job": job.name, "at": before, "fault": kind, "met": met, "went_on_s": round(time.monotonic() - since, 1)})
        print(f"chaos: {job.name} {before}/{job.total}: {kind}{'' if met else ' (nobody there)'}, work went on after "
              f"{report[-1]['went_on_s']} s", flush=True)  # fmt: skip
    assert waited(job, lambda: job.process.poll() is not None) or job.process.poll() is not None, job.tail()
    assert job.process.returncode == 0, job.tail()
    job.check()
    print(f"{job.name}: whole after {time.monotonic() - began:.0f} s and {len(report)} faults", flush=True)
    return report


def waited(job: Job, condition: Callable[[], bool]) -> bool:
    """Wait until `condition`; False if the job ended well before it. An end that no fault of ours explains fails."""
    end, done = time.monotonic() + LIMIT_S, job.progress()
    while not condition():
        code = job.process.poll()
        if code is not None:
            assert code == 0, job.tail()
            return condition()
        if (now := job.progress()) != done:  # a slow machine is not a stuck job
            end, done = time.monotonic() + LIMIT_S, now
        assert time.monotonic() < end, f"{job.name} is stuck at {job.progress()} of {job.total}:\n{job.tail()}"
        time.sleep(0.1)
    return True


def lines(path: Path) -> int:
    """Whole lines of a file that may not be there."""
    return path.read_bytes().count(b"\n") if path.is_file() else 0
