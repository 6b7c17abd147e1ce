"""The demo on a GPU: every job of the paper with the real engines, its workers sharing one device."""

import json
import subprocess
import sys

import pytest

from ctrlrl.config import leaves
from ctrlrl.runs import read_metrics

pytestmark = [pytest.mark.cuda, pytest.mark.timeout(3600)]


def test_the_demo_runs_on_the_gpu_from_its_world_to_its_report(device, tmp_path):
    out = tmp_path / "demo"
    done = subprocess.run([sys.executable, "-m", "ctrlrl.cli", "demo", "--fast", "--out", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    given = leaves(json.loads((out / "ppo" / "recipe.json").read_text()))
    assert {value for key, value in given.items() if key.endswith("resources.gpus")} == {0.125 if device.type == "cuda" else 0.0}
    rows = read_metrics(out / "ppo")
    assert len(rows) == given["steps"]
    assert all(row["policy/first_ratio"] == pytest.approx(1, abs=1e-3) and row["mismatch/mean"] < 1e-3 for row in rows)
    summary = json.loads((out / "summary.json").read_text())
    assert {"before", "clm", "exmate", "ppo", "cst", "dpo"} <= summary.keys() and (out / "report").is_dir()
