"""Studies: one chain of jobs in several variants, and one table of how far each variant's answers follow the control.

    ctrlrl study synthesis --world runs/demo/world --out runs/studies/synthesis

The steps are the ordinary jobs, called here one after the other on one Ray cluster. Variants with a step in common share its work, and a
second call reuses what is finished and continues what is not (jobs/parts/variants.py).
"""

from collections import Counter
from itertools import takewhile
from pathlib import Path
from typing import Annotated

import typer

from actors.crew import demands_of as crew_demands
from actors.placement import ClusterConfig, Demands, check_room, connect
from ctrlrl.config import dump
from ctrlrl.data.atomic import write_json, write_text
from ctrlrl.errors import RecipeError, RunError
from ctrlrl.evaluation.files import METRICS_FILE, RECIPE, STUDY, TRAINING, read_json
from ctrlrl.runs import absolute_out, only_writer
from jobs.calibrate import CalibrateRecipe, calibrate
from jobs.critique import CritiqueRecipe, check_reused_critiques, critique
from jobs.distill import DistillRecipe, distill
from jobs.dpo import DPORecipe, check_reused_dpo, dpo
from jobs.dpo import demands_of as dpo_demands
from jobs.evaluate import EvaluateRecipe, check_measured, evaluate
from jobs.finetune import FinetuneRecipe, check_reused, finetune
from jobs.generate import GenerateRecipe, check_reused_answers, generate
from jobs.parts.beforehand import check_steps
from jobs.parts.cast import demands_of as cast_demands
from jobs.parts.costs import cost_lines, measured_rates
from jobs.parts.launch import Out, Set, SkipBadRows, run_job
from jobs.parts.measure import summary_lines
from jobs.parts.variants import RECIPES, Step, StudyRecipe, plan
from jobs.ppo import PPORecipe, check_reused_ppo, train
from jobs.reward_model import RewardModelRecipe, check_reused_reward_model, train_reward_model

StudyName = Annotated[str, typer.Argument(help="A TOML file, or: synthesis, scale, models, reward, baseline, attributes, paper.")]
WorldFolder = Annotated[str, typer.Option("--world", help="Run on this demo world instead, with the demo's recipes.")]
Only = Annotated[list[str] | None, typer.Option(help="Do this variant alone (may be repeated), or one seed's row of it; the others later.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what it will cost at this machine's measured speed, and end.")]


def run_study(study: StudyRecipe, dry_run: bool = False, only: list[str] | None = None) -> int:
    """Do what is not finished yet, one variant after the other, and print the table; returns the exit code. only: these rows."""
    rows = plan(study)
    planned = chosen(rows, only) if only else rows
    steps = list({step.folder: step for chain in planned.values() for step in chain}.values())
    whole = check_steps(steps)
    if dry_run:
        configs = {str(step.folder.relative_to(absolute_out(study.out))): (step.config, step.finished) for step in steps}
        join_cluster(study.cluster, steps)
        print("\n".join(cost_lines(configs, measured_rates(whole, study.cluster))), flush=True)
        return 0
    with only_writer(study.out) as out:
        if any((out / name).exists() for name in (TRAINING, METRICS_FILE)):  # its recipe.json would be overwritten
            raise RunError(f"{study.out!r} holds a training run or an evaluation: give another out")
        # A report shows the variants of later calls, too: as not evaluated yet, or as they are.
        named = [{"name": name, "run": str(chain[-1].folder.relative_to(out))} for name, chain in rows.items()]
        return run_variants(study, planned, steps, named, out)


def chosen(rows: dict[str, list[Step]], only: list[str]) -> dict[str, list[Step]]:
    """The rows of these names, or of variants of these names, in the study's order; RecipeError for a name that no row has."""
    found = {name: [row for row in rows if row == name or row.startswith(f"{name}, seed ")] for name in only}
    if unknown := [name for name, those in found.items() if not those]:
        raise RecipeError(f"--only {unknown[0]!r} is no variant: {'; '.join(rows)}")
    return {row: chain for row, chain in rows.items() if any(row in those for those in found.values())}


def run_variants(study: StudyRecipe, planned: dict[str, list[Step]], steps: list[Step], rows: list[dict], out: Path) -> int:
    """The steps that are not finished, in the study's directory; returns the exit code. rows: of the study's table."""
    write_text(out / RECIPE, dump(study) + "\n")
    # Before the first step: a report on a study that is under way shows the variants that are evaluated, and names the others.
    write_json(out / STUDY, {"title": study.title, "note": study.note, "rows": rows})
    there = reusable(planned)
    if not all(step.finished for step in steps):
        join_cluster(study.cluster, steps)
    for number, (name, chain) in enumerate(planned.items(), 1):
        for step in chain:
            done = step.folder in there or reused(step)
            print(f"\n[{number}/{len(planned)}] {name}: {step.folder.name}{', reused' * done}", flush=True)
            if not done and (code := run(step)):
                return code
    measured = {name: read_json(chain[-1].folder / METRICS_FILE) for name, chain in planned.items()}
    print("\n".join(["", study.title, *summary_lines(measured, study.attributes), "", f"Report: ctrlrl report {out}"]), flush=True)
    return 0


def reusable(planned: dict[str, list[Step]]) -> set[Path]:
    """The folders of the steps that are finished, with all before them; RunError as of `reused`, before anything is begun."""
    there: set[Path] = set()
    for chain in planned.values():
        there.update(step.folder for step in takewhile(lambda step: step.folder in there or reused(step), chain))
    return there


def reused(step: Step) -> bool:
    """Whether a step is finished; RunError if it was made from other prompts, pairs, tables or models than lie at their paths now."""
    if not step.finished:
        return False
    match step.config:
        case GenerateRecipe():
            check_reused_answers(step.config)
        case CritiqueRecipe():
            check_reused_critiques(step.config)
        case FinetuneRecipe():
            check_reused(step.config)
        case PPORecipe():
            check_reused_ppo(step.config)
        case DPORecipe():
            check_reused_dpo(step.config)
        case RewardModelRecipe():
            check_reused_reward_model(step.config)
        case EvaluateRecipe():
            check_measured(step.config)
    return True


def run(step: Step) -> int:
    """Do a step, or continue it; returns the exit code."""
    begun = (step.folder / RECIPE).exists()
    match step.config:
        case GenerateRecipe():
            return generate(step.config)
        case CalibrateRecipe():
            return calibrate(step.config)
        case DistillRecipe():
            return distill(step.config)
        case FinetuneRecipe():
            return finetune(step.config, resume=begun)
        case PPORecipe():
            return train(step.config, resume=begun)
        case RewardModelRecipe():
            return train_reward_model(step.config, resume=begun)
        case CritiqueRecipe():
            return critique(step.config)
        case DPORecipe():
            return dpo(step.config, resume=begun)
        case EvaluateRecipe():
            return evaluate(step.config)


def join_cluster(cluster: ClusterConfig, steps: list[Step]) -> None:
    """Join or start a Ray cluster on which each step has room."""
    connect(cluster, {"study": [most_demanded(steps)]})
    for step in steps:
        check_room(demands(step), cluster)


def most_demanded(steps: list[Step]) -> dict[str, float]:
    """Of each resource the most that any step asks for: steps are done one after the other, on a cluster that has room for each."""
    most: Counter[str] = Counter()
    for step in steps:
        asked: Counter[str] = Counter()
        for bundle in (bundle for bundles in demands(step).values() for bundle in bundles):
            asked.update(bundle)
        most |= asked
    return dict(most)


def demands(step: Step) -> Demands:
    """The places that a step's workers need."""
    match step.config:
        case GenerateRecipe(reward=reward, rollout=rollout):
            return crew_demands(dict(reward), rollout) | {"spare": rollout.spare}
        case FinetuneRecipe(policy=policy):
            return {"policy": policy.bundles} | step.config.evaluation.demands
        case PPORecipe(rollout=rollout) as config:
            return cast_demands(config) | {"spare": rollout.spare}
        case RewardModelRecipe(reward_model=trained):
            return {"reward_model": trained.bundles}
        case CritiqueRecipe(rollout=rollout):
            return crew_demands({}, rollout) | {"spare": rollout.spare}
        case DPORecipe() as config:
            return dpo_demands(config)
        case EvaluateRecipe(judges=judges, rollout=rollout):
            rewards = {f"{judge}.{a}": reward for judge, models in judges.given.items() for a, reward in models.items()}
            return crew_demands(rewards, rollout) | {"spare": rollout.spare}
    return {}


def main(
    recipe: StudyName,
    overrides: Set = None,
    out: Out = "",
    world: WorldFolder = "",
    skip_bad_rows: SkipBadRows = False,
    only: Only = None,
    dry_run: DryRun = False,
) -> None:
    """Run every variant of a study, and print its table."""
    shipped = RECIPES / "studies" / f"{recipe}.toml"
    file = str(shipped) if shipped.is_file() else recipe
    options = {"world": world, "skip_bad_rows": skip_bad_rows}
    raise typer.Exit(run_job(StudyRecipe, run_study, file, overrides, out, options, dry_run=dry_run, only=only))


if __name__ == "__main__":
    typer.run(main)
