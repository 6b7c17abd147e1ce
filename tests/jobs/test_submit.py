"""`ray job submit` and `ctrlrl submit` on a head that was started by hand, as cluster/README.md says; and what is uploaded."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
from autoscaling import end_with_parent, free_port

import jobs.submit as submitting
from actors.nursery import executable
from ctrlrl.runs import read_metrics

ROOT = Path(__file__).parents[2]
RAY = [sys.executable, "-m", "ray.scripts.scripts"]


@pytest.fixture
def head():
    """A Ray head with a job server on free ports, in its own folder; gives the job server's address."""
    folder = tempfile.mkdtemp(prefix="h", dir=os.environ["RAY_TMPDIR"])
    port, dashboard = free_port(), free_port()
    command = [
        *RAY, "start", "--head", "--block", f"--port={port}", "--node-ip-address=127.0.0.1", "--num-cpus=10", "--num-gpus=0",
        "--object-store-memory=100000000", f"--temp-dir={folder}", "--include-dashboard=true", "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard}", "--dashboard-agent-listen-port=0", f"--ray-client-server-port={free_port()}",
        "--disable-usage-stats",
    ]  # fmt: skip
    # The job's `python` is the one that the head finds.
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, preexec_fn=end_with_parent
    )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        for _ in range(480):  # half seconds, on a busy machine
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
            process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def start(*command: str) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def end(process: subprocess.Popen) -> tuple[int, str]:
    output, _ = process.communicate(timeout=800)
    return process.returncode, output


def ctrlrl_submit(address: str, *arguments: str) -> subprocess.Popen:
    return start(sys.executable, "-m", "ctrlrl.cli", "submit", "--address", address, *arguments)


@pytest.mark.timeout(1200)
def test_jobs_run_side_by_side_and_give_their_own_exit_codes(head, ppo_overrides, generate_overrides, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("seed = 3\n")
    ppo = ["--recipe", str(recipe), *(part for override in [*ppo_overrides, "steps=1"] for part in ("--set", override))]
    offline = [part for override in [*generate_overrides, "max_prompts=10"] for part in ("--set", override)]
    forking = json.dumps({"py_executable": executable()})  # its six workers; those of the other job start as on any cluster
    by_ray = [*RAY, "job", "submit", "--address", head, "--working-dir", str(ROOT), "--runtime-env-json", forking]
    by_ray += ["--", "python", "jobs/ppo.py"]
    first = start(*by_ray, *ppo, "--out", str(tmp_path / "run"))
    second = ctrlrl_submit(head, "generate", *offline, "--out", str(tmp_path / "generated"))
    code, output = end(first)
    assert code == 0 and "ppo 1/1" in output, output[-3000:]
    assert len(read_metrics(tmp_path / "run")) == 1 and (tmp_path / "run" / "model" / "model.safetensors").exists()
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["seed"] == 3
    code, output = end(second)
    assert code == 0 and "1x, 30 samples of 10 prompts in 5 shards" in output, output[-3000:]

    refused = ctrlrl_submit(head, "ppo", *ppo, "--out", "runs/relative")
    detached = ctrlrl_submit(head, "--detach", "inspect", str(tmp_path))
    code, output = end(refused)
    assert code == 2 and "give an absolute path" in output, output  # `ray job submit` would say 1
    code, output = end(detached)
    told = [line for line in output.splitlines() if "follow it with: ray job logs" in line]
    assert code == 0 and len(told) == 1, output
    with urllib.request.urlopen(f"{head}/api/jobs/", timeout=30) as jobs:
        assert told[0].split("--follow ")[1].split(";")[0] in {job["submission_id"] for job in json.load(jobs)}


# --- without a cluster ---


def test_a_dry_run_says_what_would_go_without_a_cluster(tmp_path, monkeypatch, capsys):
    (tmp_path / "my.toml").write_text("seed = 3\n")
    (tmp_path / ".env").write_text("TOKEN=x\n")
    monkeypatch.chdir(tmp_path)
    assert submitting.submit("ppo", ["--recipe", "my.toml"], ["ppo"], address="http://127.0.0.1:1", dry_run=True) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(maxsplit=2) for line in lines[:2]] == [["9", "my.toml"], ["left", "out", ".env  (it looks like a secret)"]]
    assert lines[2].startswith("1 files, 9 bytes")


def test_what_cannot_be_submitted_is_said_at_once():
    code, output = end(start(sys.executable, "-m", "ctrlrl.cli", "submit", "genrate"))
    assert code == 2 and output == "ctrlrl: no job 'genrate': did you mean 'generate'?\n"
    code, output = end(ctrlrl_submit(f"http://127.0.0.1:{free_port()}", "generate"))
    assert code == 2 and "no job server at" in output and "Traceback" not in output


class Job:
    """A client of one job that was stopped or runs on."""

    def __init__(self):
        self.stopped = False

    def stop_job(self, _):
        self.stopped = True

    async def tail_job_logs(self, _):
        yield "a\nb\n"

    def get_job_info(self, _):
        return SimpleNamespace(status=SimpleNamespace(is_terminal=lambda: True, value="STOPPED"), driver_exit_code=143, message="")


def test_ctrl_c_leaves_the_job_running_unless_it_is_to_stop(monkeypatch, capsys):
    job = Job()
    assert submitting.interrupted(job, "job_1", "follow it with …") == 130 and not job.stopped  # no terminal to ask on
    assert "follow it with …" in capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", lambda _: "n")
    assert submitting.interrupted(job, "job_1", "") == 143 and job.stopped
    assert capsys.readouterr().out.endswith("a\nb\n")
