"""Checkpoints are whole or absent, however their writer is killed; and what a run directory does with them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ctrlrl.config import Section
from ctrlrl.errors import RunError
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
    time.sleep(0.03 + random.Random(kill).random() * 0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found = sorted((Path(out) / "checkpoints").glob("step-*"))
    broken = [folder.name for folder in found if not whole(folder)]
    assert not broken, f"kill {kill}: {broken}"
    assert len(found) <= 3
    pointer = Path(out) / "checkpoints" / "latest"
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
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step-000009\n")
    again = Run.open(str(tmp_path / "run"), Recipe(), resume=True)
    again.begin()
    with pytest.raises(RunError, match="names 'step-000009', which is missing"):
        again.latest()
    again.close()
