"""How far a model's answers follow the requested control ([SH] section 3.4), by the optimisation and the held-out reward models.

    python jobs/evaluate.py --recipe jobs/recipes/evaluate.toml --set model=runs/ppo/model --out runs/ppo/evaluation

Writes table.parquet, metrics.json (mP, MP, Err, BT), details.json (all else that is measured) and cost.json. jobs/parts/measure.py does
what comes after the table without models.
"""

from typing import Annotated, Literal

import typer
from pydantic import Field, model_validator

from actors.crew import Crew
from actors.reward import RewardConfig, RewardModels
from ctrlrl.attributes import HIGH, LOW, PAPER, check_named
from ctrlrl.data.generation import prompts_fingerprint
from ctrlrl.data.rejects import aside_line
from ctrlrl.data.shards import ShardStore
from ctrlrl.data.sources import read_prompts
from ctrlrl.errors import RunError
from ctrlrl.evaluation.baselines import SYSTEM_CONTROLS, TEMPLATES
from ctrlrl.evaluation.exhibits import default_name
from ctrlrl.evaluation.files import METRICS_FILE, RECIPE, STUDY, TRAINING, read_json
from ctrlrl.evaluation.grid import controls_of, make_cells
from ctrlrl.evaluation.results import results
from ctrlrl.runs import absolute_out, only_writer
from jobs.parts.asking import AskedRecipe, Asking, JudgeSets, ask
from jobs.parts.launch import Out, Recipe, Set, SkipBadRows, run_job
from jobs.parts.measure import write_results

Levels = Annotated[str, typer.Option(help="Levels of a finer grid, such as 0.2,0.4,0.6,0.8,1 (the recipe's `levels`).")]


class Judges(JudgeSets):
    """The reward models that training optimised, and a second pair that took part in nothing else (may be absent)."""

    optimisation: RewardModels


class EvaluateRecipe(AskedRecipe):
    """What is evaluated, by which method, on which prompts, under which controls (every combination of `levels`), judged by whom.

    method: "control" (control tokens), "prompting" (each of `templates`, the best counts), "reranking" (`samples` answers by the first
    template, the nearest is kept) or "system" (the two system prompts of CST). refusal_judge: a classifier of refusals that takes the
    place of the patterns of `measure`.
    """

    out: str = "runs/evaluation"
    method: Literal["control", "prompting", "reranking", "system"] = "control"
    templates: tuple[Literal[1, 2, 3, 4], ...] = Field(TEMPLATES, min_length=1)
    prompts: str
    judges: Judges
    refusal_judge: RewardConfig | None = Field(None, exclude_if=lambda judge: judge is None)  # not in the recipes of evaluations without

    @model_validator(mode="after")
    def _attributes_are_scored(self):
        for judge, models in self.judges.given.items():
            check_named(f"judges.{judge}", models, self.attributes)
        return self

    @model_validator(mode="after")
    def _grid_is_the_methods(self):
        if self.method == "system" and self.attributes != PAPER:
            raise ValueError(f"method = 'system' asks for {PAPER.spoken}: leave attributes out")
        if self.method == "system" and self.levels != (LOW, HIGH):
            raise ValueError("method = 'system' has two controls, its two system prompts: leave levels out")
        for what, given in (("levels", self.levels), ("templates", self.templates)):
            if len(set(given)) < len(given):
                raise ValueError(f"{what} names one twice: {list(given)}")
        return self


def evaluate(config: EvaluateRecipe, crew: Crew | None = None) -> int:
    """Answer, score, measure; what an earlier, interrupted call left is continued. Returns the exit code.

    crew: workers that serve config.model and config.judges already; by default they are started, and ended, here.
    """
    config.check()
    asking = asking_of(config)
    if asking.rejects:
        print(aside_line(asking.rejects), flush=True)
    with only_writer(config.out) as out:
        if any((out / name).exists() for name in (TRAINING, STUDY)):  # its recipe.json would be overwritten
            raise RunError(f"{config.out!r} holds a training run or a study: give another out, such as {config.out}/evaluation")
        code, table = ask(config, asking, "evaluate", origin_of(config, asking), METRICS_FILE, crew)
        if not code:
            found = results(table, config.measure, config.seed)
            print("\n".join(write_results(found, out, config.name or default_name(out), config.model)), flush=True)
        return code


def asking_of(config: EvaluateRecipe) -> Asking:
    """The grid of an evaluation: every prompt by every template under every control."""
    templates = {"prompting": sorted(config.templates), "reranking": config.templates[:1]}.get(config.method, (None,))
    controls = SYSTEM_CONTROLS if config.method == "system" else controls_of(config.levels, config.attributes)
    asking = Asking.of(config)
    read = read_prompts(config.prompts, skip_bad_rows=config.skip_bad_rows, limit=config.max_prompts)
    asking.add(read, lambda prompt: make_cells([prompt], controls, config.method, templates))
    return asking


def origin_of(config: EvaluateRecipe, asking: Asking) -> dict:
    """The fingerprint of all that the answers and their scores depend on."""
    prompts = {cell.prompt.prompt_id: cell.prompt for cell in asking.cells}
    return config.made_from(("levels",)) | {
        "templates": sorted({cell.template for cell in asking.cells if cell.template is not None}),
        "prompts": prompts_fingerprint(list(prompts.values())),
        **({"refusal_judge": config.refusal_judge.fingerprint()} if config.refusal_judge else {}),
    }


def is_finished(config: EvaluateRecipe) -> bool:
    """Whether this evaluation is there, measured in this way; RunError if the answers there are of other models, prompts or settings."""
    out = absolute_out(config.out)
    if not (out / METRICS_FILE).exists() or not (out / "answers" / "store.json").exists():
        return False
    if (read_json(out / RECIPE) or {}).get("measure") != config.measure.model_dump(mode="json"):
        return False
    with ShardStore(out / "answers") as store:
        store.open_or_create(origin_of(config, asking_of(config)), shards=store.planned)
        return not store.missing()


def check_measured(config: EvaluateRecipe) -> None:
    """RunError if the figures that lie in the recipe's `out` are of another model, or other prompts or judges, than lie there now."""
    answers = absolute_out(config.out) / "answers"
    if (answers / "store.json").exists():
        remedy = f"restore it, or remove {config.out!r}, and the model is measured anew"
        ShardStore(answers).check_origin(origin_of(config, asking_of(config)), remedy)


def main(
    recipe: Recipe = "",
    overrides: Set = None,
    out: Out = "",
    levels: Levels = "",
    skip_bad_rows: SkipBadRows = False,
) -> None:
    """Measure how far answers follow the requested control."""
    overrides = [*(overrides or []), *([f"levels=[{levels}]"] if levels else [])]
    raise typer.Exit(run_job(EvaluateRecipe, evaluate, recipe, overrides, out, {"skip_bad_rows": skip_bad_rows}))


if __name__ == "__main__":
    typer.run(main)
