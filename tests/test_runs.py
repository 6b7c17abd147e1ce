"""Checkpoints are whole or absent, however their writer is killed; and what a run directory does with them."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from ctrlrl.config import Section
from ctrlrl.data.lock import DirectoryLock
from ctrlrl.errors import DataError, RunError
from ctrlrl.runs import Run, read_metrics

# Forks writers that checkpoint without end, kills each after a random time, and looks at what is left: one Python start for all.
KILLS = """
import os, random, signal, sys, time
from pathlib import Path
from ctrlrl.runs import Run

FILES = [f"part{i}" for i in range(4)] + ["deep/last"]

def write(step, folder):
    (folder / "deep").mkdir()
    for name in FILES:
        (folder / name).write_text(f"{step}" * 20_000)
        time.sleep(0.0005)

def slow_unlink(*arguments, unlink=os.unlink, **options):
    time.sleep(0.001)  # as on a slow disk, so that kills hit removals too
    unlink(*arguments, **options)

def writer(out):
    os.unlink = slow_unlink
    run = Run(Path(out), "{}", 2)
    run.begin()
    last = run.latest()
    step = last[0] if last else 0
    while True:
        step += 1
        run.checkpoint(step, lambda folder: write(step, folder))

def whole(folder):
    step = int(folder.name.removeprefix("step-"))
    return all((folder / name).read_text() == f"{step}" * 20_000 for name in FILES)

out, moved = sys.argv[1], set()
for kill in range(20):
    child = os.fork()
    if not child:
        writer(out)
    pointer, end = Path(out) / "checkpoints" / "latest", time.monotonic() + 5
    before = pointer.exists() and pointer.read_text()
    while kill % 2 and (pointer.exists() and pointer.read_text()) == before and time.monotonic() < end:
        time.sleep(0.001)  # every other one is killed after it has got somewhere, however slow the machine
    time.sleep(0.03 + random.Random(kill).random() * 0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found = sorted((Path(out) / "checkpoints").glob("step-*"))
    broken = [folder.name for folder in found if not whole(folder)]
    assert not broken, f"kill {kill}: {broken}"
    assert len(found) <= 3
    if pointer.exists():
        assert pointer.read_text().strip() in {folder.name for folder in found}
        moved.add(pointer.read_text())
print(len(moved))
"""


class Recipe(Section):
    """A recipe of one key."""

    steps: int = 1


def test_twenty_kills_leave_no_directory_that_looks_complete_and_is_not(tmp_path):
    found = subprocess.run(
        [sys.executable, "-c", KILLS, str(tmp_path / "run")], capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[1]
    )
    assert found.returncode == 0, found.stderr[-2000:]
    assert int(found.stdout) > 3  # runs went on from what the killed ones had left


def test_the_last_k_are_kept_and_a_failed_write_leaves_the_earlier_one(tmp_path):
    run = Run.open(str(tmp_path / "run"), Recipe(), resume=False, keep=2)
    run.begin()
    for step in (1, 2, 1_000_000, 3_000_000):
        run.checkpoint(step, lambda folder, step=step: (folder / "state").write_text(str(step)))
    with pytest.raises(ZeroDivisionError):
        run.checkpoint(3_000_001, lambda folder: (folder / "state").write_text(str(1 / 0)))
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(p.name for p in folder.glob("step-*")) == ["step-1000000", "step-3000000"]
    assert run.latest() == (3_000_000, folder / "step-3000000")
    run.checkpoint(3_000_000, lambda folder: (folder / "state").write_text("again"))  # of a run that died before `latest`
    assert (folder / "step-3000000" / "state").read_text() == "again"
    run.close()


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path):
    run = Run.open(str(tmp_path / "run"), Recipe(), resume=False)
    run.begin()
    for step in range(4):
        run.log(step, {"loss": float(step)})
    run.checkpoint(2, lambda folder: None)
    run.close()
    again = Run.open(str(tmp_path / "run"), Recipe(), resume=True)
    again.begin()
    assert again.latest()[0] == 2
    again.log(2, {"loss": 7.0})
    again.close()
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path / "run")] == [(0, 0.0), (1, 1.0), (2, 7.0)]


class Train(Section):
    layout: str = "auto"


class Trained(Section):
    train: Train = Train()


def test_a_run_whose_layout_had_to_be_packed_goes_on_with_the_automatic_one(tmp_path):
    for layout, change in (("packed", nullcontext()), ("padded", pytest.raises(RunError, match='layout: "padded" -> "auto"'))):
        run = Run.open(str(tmp_path / layout), Trained(train=Train(layout=layout)), resume=False)
        run.begin()
        run.close()
        with change:
            Run.open(str(tmp_path / layout), Trained(), resume=True)


def test_a_run_goes_on_after_its_recipe_got_a_key(tmp_path):
    class Earlier(Section):
        steps: int = 1

    class Now(Earlier):
        chat: dict[str, bool] = {}
        lag: int = 0

    with Run.open(str(tmp_path / "run"), Earlier(), resume=False) as run:
        run.begin()
    with Run.open(str(tmp_path / "run"), Now(), resume=True) as run:
        run.begin()
    with pytest.raises(RunError, match=r"another recipe \(lag: 0 -> 1\)"):
        Run.open(str(tmp_path / "run"), Now(lag=1), resume=True)
    with pytest.raises(RunError, match=r"chat: {} -> null; lag: 0 -> null"):
        Run.open(str(tmp_path / "run"), Earlier(), resume=True)


def test_a_run_is_resumed_with_the_recipe_it_was_started_with(tmp_path):
    run = Run.open(str(tmp_path / "run"), Recipe(), resume=False)
    run.begin()
    run.close()
    assert json.loads((tmp_path / "run" / "recipe.json").read_text()) == {"steps": 1}
    with pytest.raises(RunError, match="add --resume"):
        Run.open(str(tmp_path / "run"), Recipe(), resume=False)
    with pytest.raises(RunError, match=r"another recipe \(steps: 1 -> 2\)"):
        Run.open(str(tmp_path / "run"), Recipe(steps=2), resume=True)
    Run.open(str(tmp_path / "run"), Recipe(steps=2), resume=True, free=("steps",))
    (tmp_path / "run" / "recipe.json").write_text('{"out": "where/it/lay", "steps": 1}')
    Run.open(str(tmp_path / "run"), Recipe(), resume=True)
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step-000009\n")
    again = Run.open(str(tmp_path / "run"), Recipe(), resume=True)
    again.begin()
    with pytest.raises(RunError, match="names 'step-000009', which is missing"):
        again.latest()
    again.close()


def new_run(tmp_path, **options):
    run = Run.open(str(tmp_path / "run"), Recipe(), **{"resume": (tmp_path / "run" / "recipe.json").exists(), **options})
    run.begin()
    return run


def state(step):
    return lambda folder: (folder / "state").write_text(str(step))


def steps_there(tmp_path):
    return sorted(p.name for p in (tmp_path / "run" / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("tail", [b'{"step": 3, "los', b"\0" * 200, b'{"step": 3, "a": "\xc3', b'{"step": 3, "loss": 3.0}'])
def test_a_torn_last_row_is_cut_at_resume(tmp_path, tail):
    with new_run(tmp_path) as run:
        for step in range(3):
            run.log(step, {"loss": float(step)})
        run.checkpoint(2, state(2))
    with (tmp_path / "run" / "metrics.jsonl").open("ab") as file:
        file.write(tail)
    with new_run(tmp_path) as run:
        assert run.latest()[0] == 2
        run.log(2, {"loss": 5.0})
    lines = (tmp_path / "run" / "metrics.jsonl").read_bytes().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [0.0, 1.0, 5.0]


@pytest.mark.parametrize(("damaged", "said"), [(b'{"step": 1, "lo\n', "metrics.jsonl:2 is damaged"), (b'{"loss": 1}\n', "without a step")])
def test_a_damaged_row_in_the_middle_is_named(tmp_path, damaged, said):
    with new_run(tmp_path) as run:
        run.log(0, {"loss": 1.0})
    with (tmp_path / "run" / "metrics.jsonl").open("ab") as file:
        file.write(damaged + b'{"step": 2, "loss": 1.0}\n')
    with new_run(tmp_path) as run, pytest.raises(DataError, match=said):
        run.latest()


def test_foreign_files_and_links_among_the_checkpoints_break_nothing(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    with new_run(tmp_path) as run:
        run.checkpoint(20, state(20))
        for name in ("step-000020-good", "step-", "Step-000030", "step-0000007"):
            (folder / name).mkdir()
        (folder / "step-000050").write_text("a file")
        (tmp_path / "disk").mkdir()
        (folder / "step-000010").symlink_to(tmp_path / "disk")
        (tmp_path / "disk" / "state").write_text("10")
        for step in (40, 50, 60):
            run.checkpoint(step, state(step))
        assert run.latest() == (60, folder / "step-000060")
    assert steps_there(tmp_path) == ["step-", "step-0000007", "step-000020-good", "step-000050", "step-000060"]
    assert (tmp_path / "disk" / "state").exists() and (folder / "Step-000030").is_dir()  # a link alone was removed, not what it means


def test_what_latest_names_is_never_removed_nor_a_newer_one(tmp_path, monkeypatch):
    with new_run(tmp_path, keep=1) as run:
        run.checkpoint(20, state(20))
        monkeypatch.setattr("ctrlrl.runs.write_text", lambda path, text: 1 / 0)  # killed between the rename and `latest`
        with pytest.raises(ZeroDivisionError):
            run.checkpoint(40, state(40))
        monkeypatch.undo()
    with new_run(tmp_path, keep=1) as run:
        assert run.latest()[0] == 20
        run.checkpoint(25, state(25))
        assert steps_there(tmp_path) == ["step-000025", "step-000040"] and run.latest()[0] == 25
        run.checkpoint(40, state("again"))
        assert steps_there(tmp_path) == ["step-000040"] and (run.latest()[1] / "state").read_text() == "again"
    with new_run(tmp_path, keep=4) as run:
        for step in (41, 42, 43, 44, 45):
            run.checkpoint(step, state(step))
        assert steps_there(tmp_path) == [f"step-0000{n}" for n in (42, 43, 44, 45)]


def test_without_what_latest_names_a_run_goes_on_from_the_newest_that_its_metrics_reach_to(tmp_path, capsys):
    with new_run(tmp_path, keep=3) as run:
        for step in range(3):
            run.log(step, {"loss": 1.0})
            run.checkpoint(step + 1, state(step + 1))
    pointer = tmp_path / "run" / "checkpoints" / "latest"
    for lost in (lambda: pointer.write_text("step-000009\n"), lambda: pointer.write_bytes(b"\0\xff"), pointer.unlink):
        lost()
        with new_run(tmp_path, keep=3) as run:
            assert run.latest()[0] == 3
        assert "going on from step-000003, the newest whole checkpoint" in capsys.readouterr().err
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n{"step": 1, "loss": 1.0}\n')
    with new_run(tmp_path, keep=3) as run:
        assert run.latest()[0] == 2  # step 3 would leave a gap in the metrics
    pointer.write_text("step-000009\n")
    for step in (1, 2):
        (tmp_path / "run" / "checkpoints" / f"step-{step:06d}").rename(tmp_path / f"{step}")
    with new_run(tmp_path, keep=3) as run, pytest.raises(RunError, match="names 'step-000009', which is missing: restore it"):
        run.latest()


def test_the_next_run_clears_what_killed_ones_left(tmp_path):
    with new_run(tmp_path) as run:
        run.checkpoint(20, state(20))
    folder = tmp_path / "run" / "checkpoints"
    for name in (".step-000017.partial", ".step-000010.old", ".step-000010.gone", ".step-000020.replaced", ".mine.old"):
        (folder / name / "deep").mkdir(parents=True)
    (folder / ".step-000005.replaced").mkdir()  # killed between the two renames of a replacement
    (folder / ".step-000005.replaced" / "state").write_text("5")
    (folder / ".latest.tmp").write_text("st")
    for name in (".recipe.json.tmp", ".metrics.jsonl.tmp", ".mine.tmp"):
        (tmp_path / "run" / name).write_text("x")
    (tmp_path / "run" / ".model.partial").mkdir()
    new_run(tmp_path).close()
    assert sorted(p.name for p in folder.iterdir()) == [".mine.old", "latest", "step-000005", "step-000020"]
    assert (folder / "step-000005" / "state").read_text() == "5" and (folder / "step-000020" / "state").read_text() == "20"
    assert sorted(p.name for p in (tmp_path / "run").glob(".*")) == [".mine.tmp"]


class Killed(BaseException):
    """Stands for a SIGKILL: nothing in the library catches it."""


def test_killed_at_any_write_or_rename_a_run_goes_on_and_leaves_nothing_behind(tmp_path, monkeypatch):
    """Every fsync, rename and removal of two checkpoints and a model is a moment to die at; the run is resumed after each."""
    real = {name: getattr(os, name) for name in ("fsync", "replace", "rename", "unlink", "rmdir", "mkdir")}
    monkeypatch.setattr("ctrlrl.runs.Board", lambda folder: SimpleNamespace(add=lambda *_: None, close=str))
    countdown = [0]

    def dying(call):
        def step(*arguments, **options):
            countdown[0] -= 1
            if countdown[0] == 0:
                raise Killed
            return call(*arguments, **options)

        return step

    def work():
        with new_run(tmp_path, keep=1) as run:
            last = run.latest()
            done = last[0] if last else 0
            assert not last or (last[1] / "state").read_text() == str(done)
            for step in range(done, 2):
                run.log(step, {"loss": float(step)})
                run.checkpoint(step + 1, state(step + 1))
            for _ in range(2):
                run.whole_directory("model", lambda folder: (folder / "weights").write_text("whole"))

    for moment in range(1, 200):
        (tmp_path / "run").exists() and shutil.rmtree(tmp_path / "run")
        with monkeypatch.context() as patched:
            for name, call in real.items():
                patched.setattr(os, name, dying(call))
            patched.setattr(DirectoryLock, "release", lambda lock: lock._file.close())  # the dead take no file away
            countdown[0] = moment
            try:
                work()
                break
            except Killed:
                pass
            countdown[0] = -1
        work()
        rows = [row["step"] for row in read_metrics(tmp_path / "run")]
        there = sorted(p.relative_to(tmp_path / "run").as_posix() for p in (tmp_path / "run").rglob("*"))
        assert rows == [0, 1], moment
        assert there == [
            "checkpoints", "checkpoints/latest", "checkpoints/step-000002", "checkpoints/step-000002/state",
            "metrics.jsonl", "model", "model/weights", "recipe.json",
        ], moment  # fmt: skip
    assert 30 < moment < 199
