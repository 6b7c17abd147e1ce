"""Studies: one chain of jobs in several variants, and one table of how far each variant's answers follow the control.

    ctrlrl study synthesis --world runs/demo/world --out runs/studies/synthesis

The steps are the ordinary jobs, called here one after the other on one Ray cluster. Variants with a step in common share its work, and a
second call reuses what is finished and continues what is not (jobs/parts/variants.py).
"""

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from actors.crew import demands_of as crew_demands
from actors.placement import Demands, connect
from ctrlrl.config import dump
from ctrlrl.data.atomic import write_json, write_text
from ctrlrl.data.sources import read_prompts
from ctrlrl.errors import RunError
from ctrlrl.evaluation.files import METRICS_FILE, RECIPE, STUDY, TRAINING, read_json
from ctrlrl.models.loading import check_policy
from ctrlrl.runs import only_writer
from jobs.distill import DistillRecipe, distill
from jobs.evaluate import EvaluateRecipe, check_measured, evaluate
from jobs.finetune import FinetuneRecipe, check_reused, finetune
from jobs.generate import GenerateRecipe, generate
from jobs.parts.cast import demands_of as cast_demands
from jobs.parts.launch import Out, Set, SkipBadRows, run_job
from jobs.parts.measure import summary_lines
from jobs.parts.variants import RECIPES, Step, StudyRecipe, plan
from jobs.ppo import PPORecipe, train

StudyName = Annotated[str, typer.Argument(help="A TOML file, or one of: synthesis, scale, models, reward, baseline, attributes.")]
WorldFolder = Annotated[str, typer.Option("--world", help="Run on this demo world instead, with the demo's recipes.")]


def run_study(study: StudyRecipe) -> int:
    """Do what is not finished yet, one variant after the other, and print the table; returns the exit code."""
    planned = plan(study)
    steps = list({step.folder: step for chain in planned.values() for step in chain}.values())
    check(steps)
    with only_writer(study.out) as out:
        if any((out / name).exists() for name in (TRAINING, METRICS_FILE)):  # its recipe.json would be overwritten
            raise RunError(f"{study.out!r} holds a training run or an evaluation: give another out")
        return run_variants(study, planned, steps, out)


def run_variants(study: StudyRecipe, planned: dict[str, list[Step]], steps: list[Step], out: Path) -> int:
    """The steps that are not finished, in the study's directory; returns the exit code."""
    write_text(out / RECIPE, dump(study) + "\n")
    rows = [{"name": name, "run": str(chain[-1].folder.relative_to(out))} for name, chain in planned.items()]
    # Before the first step: a report on a study that is under way shows the variants that are evaluated, and names the others.
    write_json(out / STUDY, {"title": study.title, "note": study.note, "rows": rows})
    if not all(step.finished for step in steps):
        connect(study.cluster, {"study": [most_demanded(steps)]})
    for number, (name, chain) in enumerate(planned.items(), 1):
        for step in chain:
            done = reused(step)
            print(f"\n[{number}/{len(planned)}] {name}: {step.folder.name}{', reused' * done}", flush=True)
            if not done and (code := run(step)):
                return code
    measured = {name: read_json(chain[-1].folder / METRICS_FILE) for name, chain in planned.items()}
    print("\n".join(["", study.title, *summary_lines(measured, study.attributes), "", f"Report: ctrlrl report {out}"]), flush=True)
    return 0


def reused(step: Step) -> bool:
    """Whether a step is finished; RunError if it was made from another table or model than the steps before it have made since."""
    if not step.finished:
        return False
    match step.config:
        case FinetuneRecipe():
            check_reused(step.config)
        case EvaluateRecipe():
            check_measured(step.config)
    return True


def run(step: Step) -> int:
    """Do a step, or continue it; returns the exit code."""
    begun = (step.folder / RECIPE).exists()
    match step.config:
        case GenerateRecipe():
            return generate(step.config)
        case DistillRecipe():
            return distill(step.config)
        case FinetuneRecipe():
            return finetune(step.config, resume=begun)
        case PPORecipe():
            return train(step.config, resume=begun)
        case EvaluateRecipe():
            return evaluate(step.config)


def check(steps: list[Step]) -> None:
    """Refuse missing prompts and models before anything starts; what an earlier step will make is not there to be checked yet."""
    policies, judges, prompts = set(), [], set()
    for step in steps:
        match step.config:
            case GenerateRecipe(policy=policy) | EvaluateRecipe(model=policy):
                policies.add(policy)
            case FinetuneRecipe(policy=policy) | PPORecipe(policy=policy):
                policies.add(policy.model)
        match step.config:
            case GenerateRecipe(reward=reward, prompts=asked, max_prompts=limit, skip_bad_rows=skip):
                judges.append(reward)
                prompts.add((asked, limit, skip))
            case PPORecipe(reward=reward, prompts=asked, skip_bad_rows=skip):
                judges.append(reward)
                prompts.add((asked, None, skip))
            case EvaluateRecipe(judges=given, prompts=asked, max_prompts=limit, skip_bad_rows=skip):
                judges += given.given.values()
                prompts.add((asked, limit, skip))
    made = tuple(str(step.folder) for step in steps)
    for policy in sorted(name for name in policies if not name.startswith(made)):
        check_policy(policy)
    for reward in {dump(reward): reward for models in judges for reward in models.values()}.values():
        reward.check()
    for name, limit, skip in sorted(prompts, key=str):
        read_prompts(name, limit=limit, skip_bad_rows=skip)


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
        case EvaluateRecipe(judges=judges, rollout=rollout):
            rewards = {f"{judge}.{a}": reward for judge, models in judges.given.items() for a, reward in models.items()}
            return crew_demands(rewards, rollout) | {"spare": rollout.spare}
    return {}


def main(
    recipe: StudyName, overrides: Set = None, out: Out = "", world: WorldFolder = "", skip_bad_rows: SkipBadRows = False
) -> None:
    """Run every variant of a study, and print its table."""
    shipped = RECIPES / "studies" / f"{recipe}.toml"
    options = {"world": world, "skip_bad_rows": skip_bad_rows}
    raise typer.Exit(run_job(StudyRecipe, run_study, str(shipped) if shipped.is_file() else recipe, overrides, out, options))


if __name__ == "__main__":
    typer.run(main)
