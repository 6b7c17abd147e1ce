"""PPO, self-generation and fine-tuning on a cluster of several nodes, by the command line, under faults of every kind at random moments.

    .venv/bin/python tests/benchmarks/chaos.py --world runs/demo/world [--seed 0] [--faults 100] [--only ppo] [--report chaos.json]

Faults: SIGKILL and SIGSTOP of workers and ranks, nodes that vanish, the job itself killed with its last line of metrics torn and half a
file left behind, and a full disk (runs lie on a small tmpfs; needs root, left out elsewhere). What ends the job is answered as a user
would: make room, run the same command again. In the end nothing may be lost, doubled or stuck: PPO has trained on every sample of every
step once; the generated samples and scores equal those of an undisturbed run, and so do fine-tuning's metrics and model.
"""

import argparse
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# Before Ray is imported: a folder of its own (socket paths are short), no token, no killing for other processes' memory.
os.environ.update(
    RAY_TMPDIR=tempfile.mkdtemp(prefix="c"), RAY_AUTH_MODE="disabled", RAY_memory_monitor_refresh_ms="0", RAY_USAGE_STATS_ENABLED="0",
    HF_HUB_OFFLINE="1",
)  # fmt: skip
os.environ.pop("RAY_ADDRESS", None)

import pyarrow.parquet as pq  # noqa: E402
from faults import TITLES, Faults, Job, lines, run  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

from ctrlrl.config import load  # noqa: E402
from ctrlrl.data.sources import read_prompts  # noqa: E402
from ctrlrl.models.loading import load_tokenizer  # noqa: E402
from ctrlrl.ppo.experience import draw_queries  # noqa: E402
from ctrlrl.runs import read_metrics  # noqa: E402
from jobs.ppo import PPORecipe, digest  # noqa: E402

ROOT = Path(__file__).parents[2]
FOLDER = Path(os.environ["RAY_TMPDIR"])
DISK = 400 << 20
# A node whose raylet is killed is declared dead after about two seconds, not fourteen.
HEALTH = {
    "health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_timeout_ms": 2000, "health_check_failure_threshold": 3,
}  # fmt: skip


def sets(*settings: str) -> list[str]:
    """As options of the command line."""
    return [part for setting in settings for part in ("--set", setting)]


SMALL = "{ cpus = 0.5 }"
CLUSTER = ("cluster.replacements=1000", "cluster.placement_deadline_s=60", "cluster.start_deadline_s=300", "cluster.call_deadline_s=30")
ROLLOUT = ("rollout.workers={min=1, max=2, idle_s=30}", "rollout.resources={cpus=0.5, custom={rollout=1}}")


def judges(world: Path) -> tuple[str, ...]:
    """Settings of the two reward models."""
    return tuple(
        setting for a in ("helpful", "harmless") for setting in (f'reward.{a}.model="{world}/reward/{a}"', f"reward.{a}.resources={SMALL}")
    )


def ppo(world: Path, out: Path, seed: int, steps: int) -> Job:
    """A PPO run of the demo's models; workers on nodes of their own kind, everything else on the head."""
    settings = (
        f"seed={seed}", f"steps={steps}", "checkpoint_every=5", f'prompts="{world}/train.jsonl"', f'policy.model="{world}/policy"',
        "algorithm.queries_per_step=192", "rollout.chunk=48", *ROLLOUT, *judges(world), f"policy.resources={SMALL}",
        f"value.resources={SMALL}", f"reference.resources={SMALL}", *CLUSTER,
    )  # fmt: skip

    def check() -> None:
        config = load(PPORecipe, ROOT / "jobs/recipes/demo_ppo.toml", [*settings, f'out="{out}"'])
        rows = read_metrics(out)
        assert [row["step"] for row in rows] == list(range(steps)), [row["step"] for row in rows]
        prompts, tokenizer = list(read_prompts(config.prompts)), load_tokenizer(config.policy.model)
        for row in rows:
            queries = draw_queries(prompts, tokenizer, row["step"], config.algorithm, config.seed, config.attributes)
            assert row["samples/digest"] == digest(queries), f"step {row['step']} was not trained on its own samples"
            assert all(math.isfinite(value) for value in row.values()), row

    command = ["ppo", "--recipe", "jobs/recipes/demo_ppo.toml", "--out", str(out), *sets(*settings)]
    kinds = (*(f"{a}:{w}" for a in ("kill", "stop") for w in TITLES), "node", "torn", "full")
    return Job("ppo", command, out, steps, lambda: lines(out / "metrics.jsonl"), kinds, check, ("--resume",))


def generation(world: Path, out: Path, calm: Path, seed: int, scale: int) -> Job:
    """Self-generation; `calm`: the same, undisturbed."""
    settings = (
        f"seed={seed}", f'policy="{world}/policy"', f'prompts="{world}/train.jsonl"', "samples_per_prompt=4", "shard=240", *ROLLOUT,
        *judges(world), *CLUSTER,
    )  # fmt: skip

    def content(folder: Path) -> dict[str, list]:
        tables = {p.relative_to(folder): pq.read_table(p).to_pylist() for p in sorted(folder.rglob("*.parquet")) if p.name[0] != "."}
        return {str(name): rows for name, rows in tables.items()}

    def check() -> None:
        if calm.is_dir():
            ours, theirs = content(out), content(calm)
            assert ours.keys() == theirs.keys() and all(ours[name] == theirs[name] for name in theirs)

    command = [
        "generate", "--recipe", "jobs/recipes/demo_generate.toml", "--scale", f"{scale}x", "--out", str(out), *sets(*settings)
    ]  # fmt: skip
    kinds = (*(f"{a}:{w}" for a in ("kill", "stop") for w in ("rollout", "reward")), "node", "torn", "full")
    return Job("generate", command, out, 10 * scale, lambda: len(list((out / "samples/shards").glob("[0-9]*.json"))), kinds, check)


def finetuning(world: Path, table: Path, out: Path, calm: Path, seed: int, steps: int) -> Job:
    """CLM on two ranks; `calm`: the same, undisturbed."""
    settings = (
        f"seed={seed}", f"steps={steps}", "epochs=100", "checkpoint_every=20", f'data="{table}"', f'policy.model="{world}/policy"',
        "policy.ranks=2", f"policy.resources={SMALL}", *CLUSTER,
    )  # fmt: skip

    def check() -> None:
        if calm.is_dir():
            ours, theirs = ([{k: v for k, v in row.items() if "seconds" not in k} for row in read_metrics(d)] for d in (out, calm))
            assert ours == theirs
            assert (out / "model/model.safetensors").read_bytes() == (calm / "model/model.safetensors").read_bytes()

    command = [
        "finetune", "--objective", "clm", "--recipe", "jobs/recipes/demo_finetune.toml", "--out", str(out), *sets(*settings)
    ]  # fmt: skip
    return Job(
        "finetune",
        command,
        out,
        steps,
        lambda: lines(out / "metrics.jsonl"),
        ("kill:rank", "stop:rank", "torn", "full"),
        check,
        ("--resume",),
    )


def summary(report: list[dict]) -> list[str]:
    """Recovery times by kind of fault."""
    times: dict[str, list[float]] = {}
    for entry in report:
        if entry["met"]:
            times.setdefault(entry["fault"], []).append(entry["went_on_s"])
    return [f"{kind:16} {len(t):3} times, work went on after {sum(t) / len(t):5.1f} s in the mean, {max(t):5.1f} s at most"
            for kind, t in sorted(times.items())]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", type=Path, required=True, help="the demo's world (`make demo` makes runs/demo/world)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=100, help="in all three jobs together")
    parser.add_argument("--only", choices=("ppo", "generate", "finetune"))
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    world, disk, dice = options.world.absolute(), FOLDER / "disk", random.Random(options.seed)
    disk.mkdir()
    mounted = os.geteuid() == 0 and subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", disk]).returncode == 0
    if not mounted:
        print("chaos: no small disk can be mounted here: no faults of a full one")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 6, "include_dashboard": False, "object_store_memory": 200 << 20,
                                                            "_system_config": HEALTH})  # fmt: skip
    for _ in range(3):  # one more than is used: the replacement of one that is lost is there
        cluster.add_node(num_cpus=1, resources={"rollout": 1}, object_store_memory=80 << 20)
    os.environ["RAY_ADDRESS"] = cluster.address  # of the jobs
    faults, report, calm = Faults(cluster, disk, dice), [], FOLDER / "calm"
    share = {"ppo": 0.25, "generate": 0.25, "finetune": 0.5}  # a fault is over when a step is done: 30 steps meet no more than 30
    chosen, asked = [options.only] if options.only else list(share), 0
    try:
        for name in chosen:
            count = options.faults if options.only else round(options.faults * share[name])
            seed, out, asked = options.seed, disk / name, asked + count
            if name == "ppo":
                job = ppo(world, out, seed, 30)
            elif name == "generate":
                run(generation(world, calm / "generate", calm / "none", seed, 4), faults, 0, dice, ())
                job = generation(world, out, calm / "generate", seed, 4)
            else:
                source, table = calm / "generate", calm / "table"
                if not source.is_dir():
                    run(generation(world, source, calm / "none", seed, 1), faults, 0, dice, ())
                distill = [sys.executable, "-m", "ctrlrl.cli", "distill", str(source), "--method", "vanilla", "--out", str(table)]
                subprocess.run(distill, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
                run(finetuning(world, table, calm / "finetune", calm / "none", seed, 400), faults, 0, dice, ())
                job = finetuning(world, table, out, calm / "finetune", seed, 400)
            kinds = tuple(kind for kind in job.kinds if mounted or kind != "full")
            report += run(job, faults, count, dice, kinds)
            shutil.rmtree(out)
        print("\n".join([f"{len(report)} of {asked} faults; nothing lost, doubled or stuck", *summary(report)]))
        if len(report) < asked:  # or nothing is shown
            raise SystemExit("chaos: a job ended before all its faults had struck")
        if options.report:
            options.report.write_text(json.dumps({"seed": options.seed, "faults": report}, indent=2) + "\n")
    finally:
        cluster.shutdown()
        if mounted:
            subprocess.run(["umount", "-l", disk], check=False)
        shutil.rmtree(FOLDER, ignore_errors=True)


if __name__ == "__main__":
    main()
