"""`ctrlrl generate` on a real autoscaling cluster: nodes come while work waits, one is killed and one drained, and all go in the end."""

import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
from autoscaling import AutoscalingCluster
from ray._raylet import GcsClient

from ctrlrl.data.generation import Layout

_PREEMPTION = 2  # Ray's number for the reason
ROOT = Path(__file__).parents[2]


def until(condition, seconds: float, what: str):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, what
        time.sleep(0.1)
    return found


@pytest.mark.timeout(1200)
def test_generation_uses_nodes_that_come_and_survives_those_that_go(generated, all_rows, generate_overrides, tmp_path):
    """Workers {0..2}: one node gets a notice and is then killed, another is killed without; the shards are those of the undisturbed run."""
    layout, log = Layout(tmp_path / "run"), tmp_path / "log"
    more = [
        f"out={layout.directory}", "scale=8x", "rollout.workers={min=0, max=2, idle_s=3}", "rollout.resources={cpus=1, custom={rollout=1}}",
        "reward.helpful.resources={cpus=0.5}", "reward.harmless.resources={cpus=0.5}", "cluster.placement_deadline_s=240",
    ]  # fmt: skip
    options = [part for override in [*generate_overrides, *more] for part in ("--set", override)]
    with AutoscalingCluster({"rollout": {"resources": {"CPU": 1, "rollout": 1}, "max_workers": 2}}, head_cpus=1, idle_s=5) as cluster:
        assert cluster.nodes() == {}
        command = [sys.executable, "-c", "from ctrlrl.cli import main; main()", "generate", *options]
        environment = os.environ | {"RAY_ADDRESS": cluster.address, "RAY_TMPDIR": cluster.folder}
        with log.open("w") as output:
            job = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)

        def while_it_runs(condition):
            assert job.poll() is None, log.read_text()[-3000:]
            return condition()

        try:
            until(lambda: while_it_runs(lambda: committed(layout) >= 5), 400, "no node came, or it was not used")
            first = cluster.nodes()
            GcsClient(address=cluster.address).drain_node(min(first), _PREEMPTION, "spot", int((time.time() + 60) * 1000))
            until(lambda: while_it_runs(lambda: "gets no more work: its node" in log.read_text()), 120, "the notice was not heeded")
            for node, pid in first.items():
                with suppress(ProcessLookupError) if node == min(first) else nullcontext():  # with its notice a node may go by itself
                    os.kill(pid, signal.SIGKILL)
            until(lambda: while_it_runs(lambda: set(cluster.nodes()) - set(first)), 240, "no node came in their place")
            assert job.wait(500) == 0, log.read_text()[-3000:]
        finally:
            job.kill()
        until(lambda: not cluster.nodes(), 180, "nodes that nobody uses were kept")
    stores = [layout.samples(), *(layout.scores("optimisation", a) for a in ("helpful", "harmless"))]
    assert all(store.verify().ok and len(store.manifest()["shards"]) == 160 for store in stores)
    assert all_rows(layout)[: 2 * 120].equals(all_rows(generated[0]))  # 8x contains 2x unchanged


def committed(layout: Layout) -> int:
    return len(layout.samples().committed()) if (layout.samples().directory / "shards").is_dir() else 0
