"""What drawing one step ahead is worth: `ctrlrl ppo-overlap` at lag 1 against lag 0, the same recipe, each kind of worker with one thread.

    .venv/bin/python tests/benchmarks/overlap.py --world runs/demo/world [--steps 12] [--epochs 1] [--lags 0,1]
    .venv/bin/python tests/benchmarks/overlap.py --world runs/demo/world --learn 45 --seeds 0,1,2     # and what it costs in MP

One rollout worker and one rank of the policy, so that on two cores each has one; the epochs over a batch make training last about as long
as drawing (`draw` and `train` are printed). Prints samples/s of each lag, the ratio, and who waited for whom; the first two steps are left
out (engines warm up, and a first batch cannot be drawn ahead). With --learn the demo's own PPO recipe runs so many steps at each lag and
seed, and is evaluated on prompts that it did not see: MP with its interval, and whether that of lag 1 lies in it.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from ctrlrl.config import load
from ctrlrl.evaluation.files import METRICS_FILE
from ctrlrl.runs import read_metrics
from jobs.evaluate import EvaluateRecipe, evaluate
from jobs.ppo_overlap import OverlapRecipe, train

RECIPE = Path(__file__).parents[2] / "jobs" / "recipes" / "demo_ppo.toml"


def run(given, lag: int, out: str) -> dict[str, float]:
    """Medians over the steps of one run."""
    world = given.world.absolute()
    rewards = [f"reward.{a}.model={world / 'reward' / a}" for a in ("helpful", "harmless")]
    settings = [
        f"policy.model={given.policy or world / 'policy'}", f"prompts={given.prompts or world / 'train.jsonl'}", *rewards,
        f"out={out}", f"lag={lag}", f"steps={given.steps}",
        "algorithm.old_logprobs=trainer", "checkpoint_every=1000", "rollout.workers=1", "policy.ranks=1",
        "algorithm.advantage=rloo", "algorithm.samples_per_query=2", "algorithm.queries_per_step=128",
        f"algorithm.epochs={given.epochs}", *given.set,
    ]  # fmt: skip
    config = load(OverlapRecipe, RECIPE, settings)
    if train(config):
        raise SystemExit("the run was stopped")
    rows = read_metrics(Path(out))[2:]
    middle = {name: statistics.median(row.get(name, 0.0) for row in rows) for name in rows[0]}
    drawing = 1 - middle["idle/rollout"]
    return {
        "samples/s": config.algorithm.queries_per_step * config.algorithm.samples_per_query / middle["seconds/step"],
        "step s": middle["seconds/step"],
        "draw s": drawing * middle["seconds/step"],
        "train s": middle["seconds/train"],
        "rollouts idle": middle["idle/rollout"],
        "trainers idle": middle["idle/trainer"],
    }


def learned(world: Path, lag: int, seed: int, steps: int, folder: Path) -> dict[str, dict[str, float]]:
    """MP of each attribute, with its interval, after a run of the demo's recipe; a run that is there is gone on with."""
    out = folder / f"lag{lag}-seed{seed}"
    models = {a: world / "reward" / a for a in ("helpful", "harmless")}
    settings = [
        f"policy.model={world / 'policy'}", f"prompts={world / 'train.jsonl'}", *(f"reward.{a}.model={m}" for a, m in models.items()),
        f"out={out}", f"lag={lag}", f"steps={steps}", f"seed={seed}", "algorithm.old_logprobs=trainer",
    ]  # fmt: skip
    if train(load(OverlapRecipe, RECIPE, settings), resume=out.exists()):
        raise SystemExit("the run was stopped")
    settings = [
        f"model={out / 'model'}", f"prompts={world / 'test.jsonl'}", *(f"judges.optimisation.{a}.model={m}" for a, m in models.items()),
        f"out={out / 'evaluation'}",
    ]  # fmt: skip
    evaluate(load(EvaluateRecipe, RECIPE.with_name("demo_evaluate.toml"), settings))
    found = json.loads((out / "evaluation" / METRICS_FILE).read_text())["optimisation"]
    return {a: found[a]["MP"] for a in models}


def learning(world: Path, lags: list[int], seeds: list[int], steps: int, folder: Path) -> None:
    """Print MP of each lag beside that of the first, seed by seed."""
    for seed in seeds:
        found = {lag: learned(world, lag, seed, steps, folder) for lag in lags}
        for attribute, first in found[lags[0]].items():
            for lag in lags:
                mp = found[lag][attribute]
                inside = "" if lag == lags[0] else "  in the interval" if first["low"] <= mp["value"] <= first["high"] else "  OUTSIDE"
                print(f"seed {seed}  {attribute:9} lag {lag}  MP {mp['value']:.3f} [{mp['low']:.3f}, {mp['high']:.3f}]{inside}", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", type=Path, required=True, help="folder of a built demo world")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--policy", default="", help="another policy than the world's, such as SmolLM2-135M, and its --prompts")
    parser.add_argument("--prompts", default="")
    parser.add_argument("--set", action="append", default=[], help="a setting of the recipe, as in ctrlrl ppo-overlap --set")
    parser.add_argument("--lags", default="0,1")
    parser.add_argument("--learn", type=int, default=0)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--out", type=Path, default=Path("runs/overlap"), help="where the runs of --learn lie")
    given = parser.parse_args()
    if given.learn:
        lags, seeds = ([int(number) for number in text.split(",")] for text in (given.lags, given.seeds))
        return learning(given.world.absolute(), lags, seeds, given.learn, given.out.absolute())
    found = {}
    for lag in map(int, given.lags.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            found[lag] = run(given, lag, str(Path(folder, "run")))
        print(f"lag {lag}  " + "   ".join(f"{name} {value:.3g}" for name, value in found[lag].items()), flush=True)
    first, *others = found
    for lag in others:
        print(f"lag {lag} against lag {first}: {found[lag]['samples/s'] / found[first]['samples/s']:.2f} times the samples a second")


if __name__ == "__main__":
    main()
