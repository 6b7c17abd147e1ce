"""How far a model's answers follow the requested control ([SH] section 3.4), by the optimisation and the held-out reward models.

python jobs/evaluate.py --recipe jobs/recipes/evaluate.toml --set model=runs/ppo/model --out runs/ppo/evaluation
"""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import typer
from pydantic import Field

from actors.crew import start_crew
from actors.placement import ClusterConfig
from actors.reward import RewardModels
from actors.rollout import RolloutConfig
from ctrlrl.config import Section
from ctrlrl.control import ATTRIBUTES, HIGH, LOW, grid
from ctrlrl.data.atomic import write_text
from ctrlrl.data.sources import read_prompts
from ctrlrl.evaluation.grid import make_cells, make_table, score_columns
from ctrlrl.evaluation.metrics import measure
from ctrlrl.models.loading import check_policy, check_reward_model, load_tokenizer
from ctrlrl.models.sampler import Request, SamplingConfig
from ctrlrl.prompts import render
from ctrlrl.runs import absolute_out, output_directory
from ctrlrl.seeds import derive_seed
from jobs.launch import Out, Recipe, Set, run_job


class Judges(Section):
    """The reward models that training optimised, and a second pair that took part in nothing else (may be absent)."""

    optimisation: RewardModels
    held_out: RewardModels | None = None


class EvaluateRecipe(Section):
    """What is evaluated, on which prompts, under which controls (every pair of `levels`), judged by whom."""

    out: str = "runs/evaluation"
    seed: int = 0
    model: str
    prompts: str
    max_prompts: int | None = Field(None, gt=0)
    levels: tuple[float, ...] = (LOW, HIGH)
    bootstrap_draws: int = Field(1000, gt=0)
    cluster: ClusterConfig = ClusterConfig()
    judges: Judges
    rollout: RolloutConfig = RolloutConfig()
    sampling: SamplingConfig = SamplingConfig()


def evaluate(config: EvaluateRecipe) -> int:
    """Answer, score, measure; writes table.parquet and metrics.json."""
    check_policy(config.model)
    judges = {judge: models for judge, models in config.judges if models is not None}
    for models in judges.values():
        for _, reward in models:
            check_reward_model(reward.model)
    absolute_out(config.out)  # refused now rather than after the work
    table = answer_and_score(config, judges)
    out = output_directory(config.out)
    pq.write_table(table, out / "table.parquet")
    metrics = {judge: measure(table, seed=config.seed, scores=score_columns(judge), draws=config.bootstrap_draws) for judge in judges}
    write_text(out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    print("\n".join(summary_lines({Path(config.model).name: metrics})))
    return 0


def answer_and_score(config: EvaluateRecipe, judges: dict[str, RewardModels]) -> pa.Table:
    """The evaluation table: every prompt under every control, answered by the rollout pool and scored as chunks finish."""
    prompts = list(read_prompts(config.prompts, limit=config.max_prompts))
    cells = make_cells(prompts, grid(config.levels))
    tokenizer = load_tokenizer(config.model)
    requests = [
        Request(tuple(render(tokenizer, c.prompt.messages, c.control.spell())), derive_seed(config.seed, "evaluate", c.index))
        for c in cells
    ]
    named = {f"judges.{judge}.{a}": reward for judge, models in judges.items() for a, reward in models}
    with start_crew(config.cluster, named, config.rollout, config.model) as crew:
        responses, finished = [""] * len(cells), np.zeros(len(cells), bool)
        scores = {name: np.zeros(len(cells)) for name in named}
        with ThreadPoolExecutor(16) as background:
            waiting = []
            for rows, completions in crew.rollout.generate(requests, config.sampling):
                texts = [text.strip() for text in tokenizer.batch_decode(completions.response_ids, skip_special_tokens=True)]
                for row, text in zip(rows, texts, strict=True):
                    responses[row] = text
                finished[rows] = completions.finished
                conversations = [(cells[row].prompt.messages, responses[row]) for row in rows]
                waiting += [(name, rows, background.submit(reward.score, conversations)) for name, reward in crew.rewards.items()]
            for name, rows, future in waiting:
                scores[name][rows] = future.result()
    return make_table(cells, responses, finished, {j: {a: scores[f"judges.{j}.{a}"] for a in ATTRIBUTES} for j in judges})


def summary_lines(methods: dict[str, dict]) -> list[str]:
    """The comparison table in the paper's layout, one line a method and set of reward models."""
    names = ("mP", "MP", "Err", "BT")
    lines = [f"{'':28}" + "".join(f"{'safety' if a == 'harmless' else 'helpfulness':^30}" for a in ("harmless", "helpful"))]
    lines.append(f"{'method, judged by':28}" + "".join(f"{n:>7}" for n in names) + "  " + "".join(f"{n:>7}" for n in names))
    for judge in ("optimisation", "held_out"):
        for method, metrics in methods.items():
            if judge in metrics:
                values = [[metrics[judge][a][n]["value"] for n in names] for a in ("harmless", "helpful")]
                lines.append(f"{method + ', ' + judge:28}" + "  ".join("".join(f"{v:7.3f}" for v in row) for row in values))
    return lines


def main(recipe: Recipe = "jobs/recipes/evaluate.toml", overrides: Set = None, out: Out = "") -> None:
    """Measure how far answers follow the requested control."""
    raise typer.Exit(run_job(EvaluateRecipe, evaluate, recipe, overrides, out))


if __name__ == "__main__":
    typer.run(main)
