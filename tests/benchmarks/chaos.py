"""A PPO run on a cluster of several nodes in which workers, ranks and whole nodes are killed at random moments.

    .venv/bin/python tests/benchmarks/chaos.py --world runs/demo/world [--seed 0] [--steps 30] [--kills 10] [--report chaos.json]

The run must end; every sample of every step must have been trained on exactly once; all figures must be finite. Prints what was killed
when, and how long it took until its replacement was at work (a rollout, reward or reference worker: goal 30 s on two cores).
"""

import argparse
import json
import math
import os
import random
import shutil
import signal
import tempfile
import threading
import time
from pathlib import Path

# Before Ray is imported: a folder of its own (socket paths are short), no token, no killing for other processes' memory.
os.environ.update(
    RAY_TMPDIR=tempfile.mkdtemp(prefix="c"), RAY_AUTH_MODE="disabled", RAY_memory_monitor_refresh_ms="0", RAY_USAGE_STATS_ENABLED="0"
)
os.environ.pop("RAY_ADDRESS", None)

import ray  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

import jobs.ppo  # noqa: E402
from ctrlrl.config import load  # noqa: E402
from ctrlrl.data.sources import read_prompts  # noqa: E402
from ctrlrl.models.loading import load_tokenizer  # noqa: E402
from ctrlrl.ppo.experience import draw_queries  # noqa: E402
from ctrlrl.runs import read_metrics  # noqa: E402

ROOT = Path(__file__).parents[2]
POOLS = ("rollout", "reward.helpful", "reward.harmless", "reference")
VICTIMS = (*POOLS, "policy", "value", "node", "node")
LIMIT_S = 240  # for one recovery
# A node whose raylet is killed is declared dead after about two seconds, not fourteen.
HEALTH = {
    "health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_timeout_ms": 2000, "health_check_failure_threshold": 3,
}  # fmt: skip


def recipe(world: Path, out: Path, seed: int, steps: int) -> jobs.ppo.PPORecipe:
    """A small PPO run of the demo's models: 1 to 2 rollout workers on nodes of their own kind, everything else on the head."""
    small = "{ cpus = 0.5 }"
    overrides = [
        f'out="{out}"', f"seed={seed}", f"steps={steps}", "checkpoint_every=5", f'prompts="{world}/train.jsonl"',
        f'policy.model="{world}/policy"', f'reward.helpful.model="{world}/reward/helpful"',
        f'reward.harmless.model="{world}/reward/harmless"',
        "algorithm.queries_per_step=192", "rollout.chunk=48", "rollout.workers={min=1, max=2, idle_s=30}",
        "rollout.resources={cpus=0.5, custom={rollout=1}}", f"policy.resources={small}", f"value.resources={small}",
        f"reward.helpful.resources={small}", f"reward.harmless.resources={small}", f"reference.resources={small}",
        "cluster.replacements=20", "cluster.placement_deadline_s=60", "cluster.start_deadline_s=300", "cluster.call_deadline_s=120",
    ]  # fmt: skip
    return load(jobs.ppo.PPORecipe, ROOT / "jobs/recipes/demo_ppo.toml", overrides)


class Chaos(threading.Thread):
    """Kills `kills` victims at random moments, each when the one before has recovered."""

    def __init__(self, cluster: Cluster, config: jobs.ppo.PPORecipe, seed: int, kills: int):
        super().__init__(daemon=True)
        self._cluster, self._config, self._dice = cluster, config, random.Random(seed)
        victims = [*VICTIMS * (kills // len(VICTIMS)), *self._dice.sample(VICTIMS, kills % len(VICTIMS))]
        self._dice.shuffle(victims)
        moments = sorted(self._dice.uniform(0.5, config.steps - 3) for _ in range(kills))
        self._plan = list(zip(moments, victims, strict=True))
        self.nodes = 2 + sum(victim == "node" for _, victim in self._plan)  # one that is lost has its replacement waiting
        self.cast, self.restarts, self.report, self.over = None, None, [], False

    def run(self) -> None:
        for moment, victim in self._plan:
            while (done := self._steps_done()) < int(moment) or self.cast is None:
                if self.over:
                    return
                time.sleep(0.05)
            time.sleep((moment % 1) * 3)
            before, began = self._recovered(), time.monotonic()
            killed = self._kill(victim)
            while self._recovered() <= before and not self.over and time.monotonic() - began < LIMIT_S:
                time.sleep(0.05)
            entry = {"step": done, "victim": victim, "killed": killed, "recovered_s": round(time.monotonic() - began, 1)}
            self.report.append(entry)
            print(f"chaos: step {done}: {victim} ({killed}) killed, replaced after {entry['recovered_s']} s", flush=True)

    def _steps_done(self) -> int:
        metrics = Path(self._config.out) / "metrics.jsonl"
        return metrics.read_text().count("\n") if metrics.exists() else 0

    def _recovered(self) -> int:
        return len(self.restarts.recoveries) + sum(len(handle.pool.recoveries) for handle in self.cast.pools.values())

    def _kill(self, victim: str) -> str:
        if victim == "node":
            hosts = {w.life.where.node_id for w in self.cast.rollout.pool._workers if w.placed and w.version is not None}
            node = next(n for n in self._cluster.worker_nodes if n.node_id in hosts)
            self._cluster.remove_node(node, allow_graceful=False)
            return f"node {node.node_id[:8]}"
        handle = self.cast.pools[victim] if victim in POOLS else getattr(self.cast, victim)
        while not (pids := handle.pids()):
            time.sleep(0.1)
        os.kill(pids[0], signal.SIGKILL)
        return f"pid {pids[0]}"


def check(config: jobs.ppo.PPORecipe) -> None:
    """Every sample of every step once, and every figure finite."""
    rows = read_metrics(Path(config.out))
    assert [row["step"] for row in rows] == list(range(config.steps)), [row["step"] for row in rows]
    prompts, tokenizer = list(read_prompts(config.prompts)), load_tokenizer(config.policy.model)
    for row in rows:
        queries = draw_queries(prompts, tokenizer, row["step"], config.algorithm, config.seed)
        assert row["samples/digest"] == jobs.ppo.digest(queries), f"step {row['step']} was not trained on its own samples"
        assert all(math.isfinite(value) for value in row.values()), row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", type=Path, required=True, help="the demo's world (`make demo` makes runs/demo/world)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    folder = Path(os.environ["RAY_TMPDIR"])
    config = recipe(options.world.absolute(), folder / "run", options.seed, options.steps)
    head = {"num_cpus": 4, "include_dashboard": False, "object_store_memory": 200 << 20, "_system_config": HEALTH}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    chaos = Chaos(cluster, config, options.seed, options.kills)
    for _ in range(chaos.nodes):
        cluster.add_node(num_cpus=1, resources={"rollout": 1}, object_store_memory=80 << 20)
    ray.init(address=cluster.address, namespace="ctrlrl", log_to_driver=False, logging_level="ERROR")
    os.environ["RAY_ADDRESS"] = cluster.address  # a cluster that may grow: places are waited for

    start, restarts = jobs.ppo.start_cast, jobs.ppo.Restarts

    def keep_restarts(given):
        chaos.restarts = restarts(given)
        return chaos.restarts

    def keep_cast(given):
        cast = start(given)
        chaos.cast = cast
        return cast

    jobs.ppo.start_cast, jobs.ppo.Restarts = keep_cast, keep_restarts
    began = time.monotonic()
    chaos.start()
    try:
        code = jobs.ppo.train(config)
        chaos.over = True
        assert code == 0, code
        assert len(chaos.report) == options.kills, f"{len(chaos.report)} of {options.kills} kills were made before the run ended"
        check(config)
        seconds = {
            kind: [e["recovered_s"] for e in chaos.report if pick(e["victim"])]
            for kind, pick in (
                ("worker", lambda v: v in POOLS),
                ("group", lambda v: v in ("policy", "value")),
                ("node", lambda v: v == "node"),
            )
        }
        print(f"{config.steps} steps in {time.monotonic() - began:.0f} s with {len(chaos.report)} kills; every sample once, all finite")
        for kind, times in seconds.items():
            if times:
                print(
                    f"  {kind:6} {len(times)} kills, replaced after {sum(times) / len(times):.1f} s in the mean, {max(times):.1f} s at most"
                )
        if options.report:
            options.report.write_text(json.dumps({"seed": options.seed, "kills": chaos.report}, indent=2) + "\n")
    finally:
        ray.shutdown()
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
