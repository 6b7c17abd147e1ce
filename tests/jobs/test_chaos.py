"""The short form of tests/benchmarks/chaos.py: a fine-tuning by the command line through a killed rank, a torn file and a full disk."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from ctrlrl.config import load
from ctrlrl.runs import read_metrics
from jobs.finetune import FinetuneRecipe, finetune

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from faults import Faults, Job, lines, run  # noqa: E402

STEPS = 120


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 24 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("no small disk can be mounted here (root alone can): what a full one does is not tested")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def figures(folder: Path) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in read_metrics(folder)]


def test_a_job_goes_on_through_faults_of_several_kinds(ray_cluster, finetune_overrides, small_disk, joining, tmp_path, monkeypatch):
    overrides = [*finetune_overrides, f"steps={STEPS}", "epochs=200", "checkpoint_every=20", "keep_checkpoints=2", "validation.every=1000"]
    calm, out = tmp_path / "calm", small_disk / "run"
    assert finetune(load(FinetuneRecipe, None, [*overrides, f"out={calm}"])) == 0
    settings = dict(override.split("=", 1) for override in overrides)
    (tmp_path / "recipe.toml").write_text("".join(f"{key} = {value}\n" for key, value in settings.items()))
    for name, value in joining.items():
        monkeypatch.setenv(name, value)
    command = ["finetune", "--recipe", str(tmp_path / "recipe.toml"), "--out", str(out)]
    kinds = ("kill:rank", "torn", "full")
    job = Job("finetune", command, out, STEPS - 40, lambda: lines(out / "metrics.jsonl"), kinds, lambda: None, ("--resume",))
    dice = random.Random(0)
    report = run(job, Faults(None, small_disk, dice), 3, dice, kinds)
    assert sorted(entry["fault"] for entry in report if entry["met"]) == sorted(kinds), json.dumps(report)
    assert figures(out) == figures(calm)
    assert (out / "model/model.safetensors").read_bytes() == (calm / "model/model.safetensors").read_bytes()
    assert not [p.name for p in (out / "checkpoints").iterdir() if p.name.startswith(".")]
