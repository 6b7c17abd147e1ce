"""`ray job submit` runs jobs/ppo.py on a head that was started by hand, as cluster/README.md says."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest

from ctrlrl.runs import read_metrics

ROOT = Path(__file__).parents[2]
RAY = [sys.executable, "-m", "ray.scripts.scripts"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def head():
    """A Ray head with a job server on free ports, in its own folder; gives the job server's address."""
    folder = tempfile.mkdtemp(prefix="h", dir=os.environ["RAY_TMPDIR"])
    port, dashboard = free_port(), free_port()
    command = [
        *RAY, "start", "--head", "--block", f"--port={port}", "--node-ip-address=127.0.0.1", "--num-cpus=8", "--num-gpus=0",
        "--object-store-memory=100000000", f"--temp-dir={folder}", "--include-dashboard=true", "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard}", "--dashboard-agent-listen-port=0", f"--ray-client-server-port={free_port()}",
        "--disable-usage-stats",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"{address}/api/jobs/", timeout=5).read()
                break
            except OSError:
                time.sleep(0.5)
        else:
            raise TimeoutError("the head did not start")
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def submit(address: str, *arguments: str) -> subprocess.CompletedProcess:
    """`ray job submit … -- python jobs/ppo.py …`."""
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    command = [*RAY, "job", "submit", "--address", address, "--working-dir", str(ROOT), "--", sys.executable, "jobs/ppo.py", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)


@pytest.mark.timeout(600)
def test_a_submitted_job_trains_and_a_mistake_fails_it(head, ppo_overrides, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("seed = 3\n")
    options = [part for override in [*ppo_overrides, "steps=1"] for part in ("--set", override)]
    done = submit(head, "--recipe", str(recipe), "--out", str(tmp_path / "run"), *options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "ppo 1/1" in done.stdout
    assert len(read_metrics(tmp_path / "run")) == 1 and (tmp_path / "run" / "model" / "model.safetensors").exists()
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["seed"] == 3

    refused = submit(head, "--recipe", str(recipe), "--out", "runs/relative", *options)
    assert refused.returncode == 1 and "give an absolute path" in refused.stdout
