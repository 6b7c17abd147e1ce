"""One writer at a time for a directory: a second process is refused by name, and waits for nobody who is dead."""
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ctrlrl.config import Section
from ctrlrl.data.lock import LOCK, DirectoryLock
from ctrlrl.errors import RunError
from ctrlrl.runs import Run, only_writer, read_metrics
from jobs.report import report

HOLDER = """
import sys
from ctrlrl.config import Section
from ctrlrl.runs import Run
class Recipe(Section):
    steps: int = 1
run = Run.open(sys.argv[1], Recipe(), resume=True)
run.begin()
run.latest()
run.log(0, {"loss": 1.0})
print("holds", flush=True)
sys.stdin.read()
"""


class Recipe(Section):
    """A recipe of one key."""

    steps: int = 1


@pytest.fixture
def holder(tmp_path):
    """A process that writes a run in tmp_path/run."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    assert process.stdout.readline() == b"holds\n"
    yield process
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def test_the_second_process_is_refused_by_name_until_the_first_is_dead(holder, tmp_path):
    out = str(tmp_path / "run")
    said = rf"run is being written by process {holder.pid} on {os.uname().nodename} since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d UTC: wait for it"
    for refused in (
        lambda: Run.open(out, Recipe(), resume=True),
        lambda: Run.open(out, Recipe(), resume=False),
        lambda: only_writer(out).__enter__(),
        lambda: report([out], out),
    ):
        with pytest.raises(RunError, match=said):
            refused()
    assert [row["loss"] for row in read_metrics(tmp_path / "run")] == [1.0]  # reading is free, and nothing was cut
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert str(holder.pid) in (tmp_path / "run" / LOCK).read_text()
    with Run.open(out, Recipe(), resume=True) as run:
        run.begin()
        assert run.latest() is None and read_metrics(tmp_path / "run") == []
    assert not (tmp_path / "run" / LOCK).exists()


def test_a_writer_whose_lock_was_taken_away_stops_before_it_writes(tmp_path):
    """As where machines do not see each other's locks: the later writer gets in, the earlier one finds its name."""
    with Run.open(str(tmp_path / "run"), Recipe(), resume=False) as first:
        first.begin()
        (tmp_path / "run" / LOCK).unlink()
        with DirectoryLock(tmp_path / "run"):
            with pytest.raises(RunError, match=f"is being written by process {os.getpid()} on .* too: this one stops"):
                first.checkpoint(1, lambda folder: None)
            with pytest.raises(RunError, match="too: this one stops"):
                first.whole_directory("model", lambda folder: None)
            first.close()
            assert (tmp_path / "run" / LOCK).exists()  # it is the other's
    assert not (tmp_path / "run" / "checkpoints").exists() and not (tmp_path / "run" / LOCK).exists()


def test_a_lock_that_was_removed_while_it_was_awaited_counts_for_nothing(tmp_path, monkeypatch):
    import fcntl

    real, first = fcntl.flock, DirectoryLock(tmp_path).take()

    def late(file, how):
        if first.held:
            first.release()  # it ends, and takes its file away, between our look at the file and our lock
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    second = DirectoryLock(tmp_path).take()
    second.check()
    with pytest.raises(RunError, match="is being written"):
        DirectoryLock(tmp_path).take()
    second.release()


def test_what_was_refused_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in ("file", "file/below"):
        with pytest.raises(RunError, match="is a file|Not a directory"):
            Run.open(str(tmp_path / out), Recipe(), resume=False)
    Run.open(str(tmp_path / "run"), Recipe(), resume=False).close()  # as when workers cannot be placed
    assert sorted(os.listdir(tmp_path)) == ["file"]
    with Run.open(str(tmp_path / "run"), Recipe(), resume=False) as run:
        run.begin()
    for inside in ("checkpoints", "model", "model/evaluation"):
        with pytest.raises(RunError, match=r"lies in '\w+' of a run, which replaces it whole: give another out"):
            only_writer(str(tmp_path / "run" / inside)).__enter__()
    with only_writer(str(tmp_path / "run" / "evaluation")) as out:
        assert out == tmp_path / "run" / "evaluation"
