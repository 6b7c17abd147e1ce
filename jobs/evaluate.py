"""How far a model's answers follow the requested control ([SH] section 3.4), by the optimisation and the held-out reward models.

    python jobs/evaluate.py --recipe jobs/recipes/evaluate.toml --set model=runs/ppo/model --out runs/ppo/evaluation

Writes table.parquet, metrics.json (mP, MP, Err, BT), details.json (all else that is measured) and cost.json. jobs/parts/measure.py does
what comes after the table without models.
"""

import time
from typing import Annotated, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import typer
from pydantic import Field, model_validator

from actors.crew import Crew, start_crew
from actors.placement import ClusterConfig
from actors.reward import RewardConfig, RewardModels
from actors.rollout import RolloutConfig
from ctrlrl.attributes import HIGH, LOW, PAPER, AttributesSection, check_named
from ctrlrl.chat import ChatVariables, with_variables
from ctrlrl.config import Section, dump
from ctrlrl.data.atomic import write_atomically, write_json, write_text
from ctrlrl.data.generation import prompts_fingerprint
from ctrlrl.data.rejects import Reject, aside_line, write_rejects
from ctrlrl.data.shards import ShardStore
from ctrlrl.data.sources import read_prompts
from ctrlrl.errors import RunError
from ctrlrl.evaluation.baselines import SYSTEM_CONTROLS, TEMPLATES
from ctrlrl.evaluation.exhibits import default_name
from ctrlrl.evaluation.files import COST, METRICS_FILE, RECIPE, STUDY, TABLE, TRAINING, read_json
from ctrlrl.evaluation.grid import Cell, controls_of, make_cells
from ctrlrl.evaluation.results import MeasureConfig, results
from ctrlrl.models.exporting import check_attributes
from ctrlrl.models.fingerprint import model_fingerprint
from ctrlrl.models.loading import check_policy, load_tokenizer
from ctrlrl.models.sampler import SamplingConfig, prompt_room
from ctrlrl.runs import absolute_out, only_writer, output_directory
from jobs.parts.asking import REFUSAL_WORKER, Asking, worker_name
from jobs.parts.launch import Out, Recipe, Set, SkipBadRows, run_job
from jobs.parts.measure import write_results
from jobs.parts.reading import askable

Levels = Annotated[str, typer.Option(help="Levels of a finer grid, such as 0.2,0.4,0.6,0.8,1 (the recipe's `levels`).")]


class Judges(Section):
    """The reward models that training optimised, and a second pair that took part in nothing else (may be absent)."""

    optimisation: RewardModels
    held_out: RewardModels | None = None

    @property
    def given(self) -> dict[str, RewardModels]:
        """The sets that are there."""
        return {judge: models for judge, models in self if models is not None}


class EvaluateRecipe(Section):
    """What is evaluated, by which method, on which prompts, under which controls (every combination of `levels`), judged by whom.

    method: "control" (control tokens), "prompting" (each of `templates`, the best counts), "reranking" (`samples` answers by the first
    template, the nearest is kept) or "system" (the two system prompts of CST). name: what tables call it, by default its folder.
    refusal_judge: a classifier of refusals that takes the place of the patterns of `measure`.
    """

    out: str = "runs/evaluation"
    name: str = ""
    seed: int = 0
    model: str
    chat: ChatVariables = {}
    method: Literal["control", "prompting", "reranking", "system"] = "control"
    templates: tuple[Literal[1, 2, 3, 4], ...] = Field(TEMPLATES, min_length=1)
    samples: int = Field(3, gt=1)
    prompts: str
    max_prompts: int | None = Field(None, gt=0)
    skip_bad_rows: bool = False
    levels: tuple[float, ...] = Field((LOW, HIGH), min_length=1)
    attributes: AttributesSection = PAPER
    measure: MeasureConfig = MeasureConfig()
    cluster: ClusterConfig = ClusterConfig()
    judges: Judges
    refusal_judge: RewardConfig | None = Field(None, exclude_if=lambda judge: judge is None)  # not in the recipes of evaluations without
    rollout: RolloutConfig = RolloutConfig()
    sampling: SamplingConfig = SamplingConfig()

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

    crew: workers that serve config.model and config.judges already (see judging_crew); by default they are started, and ended, here.
    """
    check_policy(config.model)
    check_attributes(config.model, config.attributes)
    for reward in reward_workers(config).values():
        reward.check()
    (cells, rejects), room = cells_of(config), prompt_room(config.model, config.rollout.engine, config.sampling)
    if rejects:
        print(aside_line(rejects), flush=True)
    with only_writer(config.out) as out, ShardStore(out / "answers") as store:
        if any((out / name).exists() for name in (TRAINING, STUDY)):  # its recipe.json would be overwritten
            raise RunError(f"{config.out!r} holds a training run or a study: give another out, such as {config.out}/evaluation")
        asking = Asking(
            store,
            cells,
            with_variables(load_tokenizer(config.model), config.chat),
            {judge: {a: reward.load_calibration() for a, reward in models.items()} for judge, models in config.judges.given.items()},
            samples=config.samples if config.method == "reranking" else 1,
            chunk=config.rollout.chunk,
            room=room,
            seed=config.seed,
            refusals=config.refusal_judge and config.refusal_judge.load_calibration(),
        )
        identity = fingerprint(config, cells)
        if (store.directory / "store.json").exists():
            store.open_or_create(identity, shards=asking.shards)  # another recipe is refused now rather than after the workers' start
        if not (store.directory / "store.json").exists() or store.missing():
            (out / METRICS_FILE).unlink(missing_ok=True)  # old figures must not vouch for answers that are made anew
            code = ask(config, asking, store, identity, crew)
            if code:
                return code
        table, cost = asking.finish()
        write_rejects(out, rejects)
        return finish(config, table, cost)


def is_finished(config: EvaluateRecipe) -> bool:
    """Whether this evaluation is there, measured in this way; RunError if the answers there are of other models, prompts or settings."""
    out = absolute_out(config.out)
    if not (out / METRICS_FILE).exists() or not (out / "answers" / "store.json").exists():
        return False
    if (read_json(out / RECIPE) or {}).get("measure") != config.measure.model_dump(mode="json"):
        return False
    with ShardStore(out / "answers") as store:
        store.open_or_create(fingerprint(config, cells_of(config)[0]), shards=store.planned)
        return not store.missing()


def check_measured(config: EvaluateRecipe) -> None:
    """RunError if the figures that lie in the recipe's `out` are of another model than lies at its path now."""
    store = read_json(absolute_out(config.out) / "answers" / "store.json")
    if store is not None and store.get("fingerprint", {}).get("model") != model_fingerprint(config.model):
        raise RunError(f"{config.out!r} measures another model than {config.model!r} is now: remove it, and the model is measured anew")


def ask(config: EvaluateRecipe, asking: Asking, store: ShardStore, identity: dict, crew: Crew | None) -> int:
    """Have the missing answers made by `crew`, or by one that is started for it; returns the exit code."""
    if crew is None:
        began = time.monotonic()
        with judging_crew(config) as started:
            started.wait_ready()
            return _ask_crew(config, asking, store, identity, started, time.monotonic() - began)
    return _ask_crew(config, asking, store, identity, crew, 0.0)


def judging_crew(config: EvaluateRecipe) -> Crew:
    """Start a rollout pool of config.model and the workers of config.judges; a context. Evaluations of the same model can share one."""
    return start_crew(config.cluster, reward_workers(config), config.rollout, config.model)


def reward_workers(config: EvaluateRecipe) -> dict[str, RewardConfig]:
    """The reward models of config.judges, and the judge of refusals, by the names of their workers."""
    workers = {worker_name(judge, a): reward for judge, models in config.judges.given.items() for a, reward in models.items()}
    return workers | ({REFUSAL_WORKER: config.refusal_judge} if config.refusal_judge else {})


def cells_of(config: EvaluateRecipe) -> tuple[list[Cell], list[Reject]]:
    """The grid of an evaluation, and the rows that were set aside."""
    read = read_prompts(config.prompts, skip_bad_rows=config.skip_bad_rows, limit=config.max_prompts)
    templates = {"prompting": sorted(config.templates), "reranking": config.templates[:1]}.get(config.method, (None,))
    controls = SYSTEM_CONTROLS if config.method == "system" else controls_of(config.levels, config.attributes)
    tokenizer = with_variables(load_tokenizer(config.model), config.chat)
    room = prompt_room(config.model, config.rollout.engine, config.sampling)
    forms = lambda prompt: [cell.asked for cell in make_cells([prompt], controls, config.method, templates)]  # noqa: E731
    judges = [reward.model for reward in reward_workers(config).values()]
    prompts, _, aside = askable(tokenizer, read, room, config.skip_bad_rows, forms, judges, config.attributes)
    return make_cells(prompts, controls, config.method, templates), [*read.report.rejects, *aside]


def fingerprint(config: EvaluateRecipe, cells: list[Cell]) -> dict:
    """All that the answers and their scores depend on; where models lie and how many workers serve them is no part of it."""
    judged = {judge: {a: judge_fingerprint(reward) for a, reward in models.items()} for judge, models in config.judges.given.items()}
    prompts = {cell.prompt.prompt_id: cell.prompt for cell in cells}
    return {
        **config.model_dump(mode="json", include={"method", "seed", "levels", "attributes", "sampling", "chat"}),
        "templates": sorted({cell.template for cell in cells if cell.template is not None}),
        "samples": config.samples if config.method == "reranking" else 1,
        "engine": config.rollout.engine.model_dump(mode="json"),
        "chunk": config.rollout.chunk,
        "model": model_fingerprint(config.model),
        "prompts": prompts_fingerprint(list(prompts.values())),
        "judges": judged,
        **({"refusal_judge": judge_fingerprint(config.refusal_judge)} if config.refusal_judge else {}),
    }


def judge_fingerprint(reward: RewardConfig) -> dict:
    """All that the scores of a reward model depend on, by content."""
    return reward.fingerprint()


def finish(config: EvaluateRecipe, table: pa.Table, cost: dict[str, float]) -> int:
    """Write the table and what is measured on it, metrics.json last, and print the comparison's rows."""
    out = output_directory(config.out)
    write_text(out / RECIPE, dump(config) + "\n")
    write_atomically(out / TABLE, lambda file: pq.write_table(table, file))
    write_json(out / COST, cost)
    found = results(table, config.measure, config.seed)
    print("\n".join(write_results(found, out, config.name or default_name(out), config.model)), flush=True)
    return 0


def _ask_crew(config: EvaluateRecipe, asking: Asking, store: ShardStore, identity: dict, crew: Crew, start_s: float) -> int:
    store.open_or_create(identity, shards=asking.shards)
    judges = sum(reward.workers for reward in reward_workers(config).values())
    return asking.run(crew, config.sampling, 2 * (config.rollout.workers.max + judges), start_s)


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
