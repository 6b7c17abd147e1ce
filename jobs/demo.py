"""The demo: a small world, PPO with the min control reward, and the control it gained on prompts it was not trained on.

Every step is an ordinary job on one local Ray cluster with the real engines; a second call continues or reuses what is there.
"""

import json
import shutil
import time
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import pyarrow.parquet as pq
import typer

from actors.placement import ClusterConfig, connect
from ctrlrl.config import load
from ctrlrl.control import ATTRIBUTES, CORNERS
from ctrlrl.data.atomic import write_text
from ctrlrl.demo.models import DemoWorld, build
from ctrlrl.evaluation.metrics import METRICS
from ctrlrl.evaluation.plots import reward_curve
from ctrlrl.runs import output_directory, read_metrics
from jobs.evaluate import EvaluateRecipe, evaluate, summary_lines
from jobs.launch import mistakes_told
from jobs.ppo import PPORecipe, demands_of, train

RECIPES = Path(__file__).parent / "recipes"


def demo(out: str, seed: int, steps: int | None = None) -> int:
    """Run every step that is not done yet, print the table, and write summary.json and reward.png."""
    began = time.monotonic()
    directory = output_directory(out)
    world = build(directory / "world", seed, report=lambda line: print(line, flush=True))
    ppo = ppo_recipe(world, directory / "ppo", seed, steps)
    connect(ClusterConfig(), demands_of(ppo))

    print("measuring control before training", flush=True)
    before = measured(evaluate_recipe(world, world.policy, directory / "before", seed))
    if not (directory / "ppo" / "model").is_dir():
        print(f"training with PPO: {ppo.steps} steps of {ppo.algorithm.queries_per_step} samples", flush=True)
        code = train(ppo, resume=(directory / "ppo" / "recipe.json").exists())
        if code:
            return code
    print("measuring control after training", flush=True)
    after = measured(evaluate_recipe(world, directory / "ppo" / "model", directory / "after", seed))

    reward_curve(read_metrics(directory / "ppo"), directory / "reward.png")
    methods = {"before": before, "ppo": after}
    write_text(directory / "summary.json", json.dumps(summary(methods), indent=2) + "\n")
    print("\nControl on prompts not trained on (mP, MP, BT: higher is better; Err: lower)\n")
    print("\n".join(summary_lines(methods)))
    print("\n" + "\n".join(four_answers(pq.read_table(directory / "after" / "table.parquet"))))
    print(f"\nReward curve: {directory / 'reward.png'}\nFigures: {directory / 'summary.json'}\nModel: {directory / 'ppo' / 'model'}")
    print(f"{time.monotonic() - began:.0f} s")
    return 0


def ppo_recipe(world: DemoWorld, out: Path, seed: int, steps: int | None) -> PPORecipe:
    """The demo's PPO recipe on the models of `world`."""
    overrides = [
        f'out="{out}"',
        f"seed={seed}",
        f'prompts="{world.train_prompts}"',
        f'policy.model="{world.policy}"',
        *(f'reward.{attribute}.model="{world.reward[attribute]}"' for attribute in ATTRIBUTES),
        *([f"steps={steps}"] if steps else []),
    ]
    return load(PPORecipe, RECIPES / "demo_ppo.toml", overrides)


def evaluate_recipe(world: DemoWorld, model: Path, out: Path, seed: int) -> EvaluateRecipe:
    """The demo's evaluation of `model` on the world's test prompts."""
    judges = {"optimisation": world.reward, "held_out": world.held_out}
    overrides = [
        f'out="{out}"',
        f"seed={seed}",
        f'prompts="{world.test_prompts}"',
        f'model="{model}"',
        *(f'judges.{judge}.{attribute}.model="{models[attribute]}"' for judge, models in judges.items() for attribute in ATTRIBUTES),
    ]
    return load(EvaluateRecipe, RECIPES / "demo_evaluate.toml", overrides)


def measured(config: EvaluateRecipe) -> dict:
    """The metrics of an evaluation, which is run unless its result is there."""
    result = Path(config.out) / "metrics.json"
    if not result.exists():
        evaluate(config)
    return json.loads(result.read_text())


def summary(methods: dict[str, dict]) -> dict:
    """{method: {judge: {attribute: {metric: value}}}}."""
    return {
        method: {judge: {a: {name: figures[a][name]["value"] for name in METRICS} for a in ATTRIBUTES} for judge, figures in judged.items()}
        for method, judged in methods.items()
    }


def four_answers(table: pa.Table) -> list[str]:
    """One prompt of the table and its answers at the four corners, with both scores."""
    rows = [row for row in table.to_pylist() if row["prompt_id"] == table["prompt_id"][0].as_py()]
    lines = [f"Asked: {rows[0]['prompt']}"]
    for corner in CORNERS:
        row = next(r for r in rows if (r["helpful_request"], r["harmless_request"]) == corner.levels)
        scores = f"helpful {row['optimisation.helpful']:.2f}, harmless {row['optimisation.harmless']:.2f}"
        lines.append(f"  {corner.spell():32} {row['response']}  ({scores})")
    return lines


def main(
    out: Annotated[str, typer.Option(help="Run directory.")] = "runs/demo",
    seed: Annotated[int, typer.Option(help="Seed of the world and of training.")] = 0,
    steps: Annotated[int | None, typer.Option(help="PPO steps, fewer for a quick look.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin anew: remove what an earlier call left, but for the world.")] = False,
) -> None:
    """Build the demo world, train with PPO, and show the control that was gained."""
    if fresh:
        for part in ("before", "ppo", "after"):
            shutil.rmtree(Path(out) / part, ignore_errors=True)
    with mistakes_told():
        raise typer.Exit(demo(out, seed, steps))


if __name__ == "__main__":
    typer.run(main)
