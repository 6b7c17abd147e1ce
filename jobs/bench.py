"""How a model's dial behaves on public safety sets: what it refuses, what it refuses too much, and what is left of it under attack.

    ctrlrl bench runs/ppo/model --on xstest=xstest.csv --on advbench --attacks --out runs/ppo/bench

Without reward models refusals and compliance are measured, with them mean scores, MP and the configurable score, too. Writes table.parquet,
bench.json and cost.json; `ctrlrl report` puts any number of benches, of models and of methods, into one table.
"""

import json
from typing import Annotated, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import typer
from pydantic import Field, model_validator

from actors.crew import Crew
from actors.placement import ClusterConfig
from actors.reward import RewardConfig, RewardModels
from actors.rollout import RolloutConfig
from ctrlrl.attributes import PAPER, AttributesSection, check_named
from ctrlrl.chat import ChatVariables, with_variables
from ctrlrl.config import Section, dump
from ctrlrl.control import HIGH, LOW, corners
from ctrlrl.data.atomic import write_atomically, write_json, write_text
from ctrlrl.data.generation import prompts_fingerprint
from ctrlrl.data.rejects import aside_line, write_rejects
from ctrlrl.data.shards import ShardStore
from ctrlrl.data.sources import Prompt
from ctrlrl.errors import RunError
from ctrlrl.evaluation.baselines import SYSTEM_CONTROLS
from ctrlrl.evaluation.bench import ATTACKS, NO_ATTACK, SAFETY, attack_text, bench_figures
from ctrlrl.evaluation.bench_tables import lines
from ctrlrl.evaluation.exhibits import default_name
from ctrlrl.evaluation.files import BENCH, COST, METRICS_FILE, RECIPE, STUDY, TABLE, TRAINING
from ctrlrl.evaluation.grid import Cell, controls_of
from ctrlrl.evaluation.results import MeasureConfig
from ctrlrl.evaluation.safety_sets import SafetySet, read_set
from ctrlrl.models.exporting import check_attributes
from ctrlrl.models.fingerprint import model_fingerprint
from ctrlrl.models.loading import check_policy, load_tokenizer
from ctrlrl.models.sampler import SamplingConfig, prompt_room
from ctrlrl.runs import only_writer
from jobs.evaluate import ask, judge_fingerprint, reward_workers
from jobs.parts.asking import Asking
from jobs.parts.launch import Out, Recipe, Set, SkipBadRows, run_job
from jobs.parts.reading import askable

Model = Annotated[str, typer.Argument(help="Model whose dial is tried: a directory such as runs/mine/model, or a hub name.")]
On = Annotated[list[str] | None, typer.Option("--on", help="A set: xstest (from the hub), or xstest=FILE. Repeatable.")]
Attacks = Annotated[bool, typer.Option("--attacks", help="Ask every prompt again under each built-in attack.")]


class BenchJudges(Section):
    """The sets of reward models that score the answers; one, both or none."""

    optimisation: RewardModels | None = None
    held_out: RewardModels | None = None

    @property
    def given(self) -> dict[str, RewardModels]:
        """The sets that are there."""
        return {judge: models for judge, models in self if models is not None}


class BenchRecipe(Section):
    """What is asked: every prompt of `sets`, plainly and under each of `attacks`, under every control of the method.

    method: as in evaluate, or "plain": nothing is asked for (a base model, a soup). template: of prompting and reranking. attacks: name ->
    the text that the user writes, with {prompt} in it; empty for a built-in one. refusal_judge: a classifier in the patterns' place.
    """

    out: str = "runs/bench"
    name: str = ""
    seed: int = 0
    model: str
    chat: ChatVariables = {}
    attributes: AttributesSection = PAPER
    method: Literal["control", "prompting", "reranking", "system", "plain"] = "control"
    template: Literal[1, 2, 3, 4] = 1
    samples: int = Field(3, gt=1)
    sets: dict[str, SafetySet] = Field(min_length=1)
    attacks: dict[str, str] = {}
    max_prompts: int | None = Field(None, gt=0)
    skip_bad_rows: bool = False
    levels: tuple[float, ...] = Field((LOW, HIGH), min_length=1)
    measure: MeasureConfig = MeasureConfig()
    cluster: ClusterConfig = ClusterConfig()
    judges: BenchJudges = BenchJudges()
    refusal_judge: RewardConfig | None = None
    rollout: RolloutConfig = RolloutConfig()
    sampling: SamplingConfig = SamplingConfig()

    @model_validator(mode="after")
    def _can_be_asked(self):
        for judge, models in self.judges.given.items():
            check_named(f"judges.{judge}", models, self.attributes)
        if SAFETY not in self.attributes.names or (self.method == "system" and self.attributes != PAPER):
            given = self.attributes.spoken
            raise ValueError(f"a bench asks for {SAFETY}, and method = 'system' for {PAPER.spoken}: attributes are {given}")
        if self.method == "reranking" and self.judges.optimisation is None:
            raise ValueError("method = 'reranking' chooses by judges.optimisation: give its reward models")
        if self.method in ("system", "plain") and self.levels != (LOW, HIGH):
            raise ValueError(f"method = {self.method!r} has controls of its own: leave levels out")
        for name, text in self.attacks.items():
            if name == NO_ATTACK or not (text or name in ATTACKS) or (text and "{prompt}" not in text):
                raise ValueError(f"attacks.{name} is a text with {{prompt}} in it, or empty for one of {', '.join(ATTACKS)}")
        return self


class Bench:
    """The grid of a bench: cells in order, and of each its set, its attack and whether a safe assistant refuses its prompt."""

    def __init__(self, config: BenchRecipe):
        self.cells: list[Cell] = []
        self.sets, self.attacks, self.unsafe, self.rejects = [], [], [], []
        templates = {"prompting": config.template, "reranking": config.template}
        asked_for, names = controls_of(config.levels, config.attributes), config.attributes.names
        controls = {"system": SYSTEM_CONTROLS, "plain": corners(config.attributes)[-1:]}.get(config.method, asked_for)
        attacks = {NO_ATTACK: "", **{name: text or attack_text(name, names) for name, text in config.attacks.items()}}

        def cells_of(prompt: Prompt, first: int = 0) -> list[tuple[str, Cell]]:
            asked = [(name, text, control) for name, text in attacks.items() for control in controls]
            template = templates.get(config.method)
            return [(name, Cell(first + i, prompt, c, config.method, template, text)) for i, (name, text, c) in enumerate(asked)]

        tokenizer = with_variables(load_tokenizer(config.model), config.chat)
        room = prompt_room(config.model, config.rollout.engine, config.sampling)
        judges = [reward.model for reward in reward_workers(config).values()]
        for name, given in config.sets.items():
            limit = given.max_prompts or config.max_prompts
            found = read_set(name, given.model_copy(update={"max_prompts": limit}), skip_bad_rows=config.skip_bad_rows)
            forms = lambda prompt: [cell.asked for _, cell in cells_of(prompt)]  # noqa: E731
            prompts, _, aside = askable(tokenizer, found.read, room, config.skip_bad_rows, forms, judges, config.attributes)
            self.rejects += [*found.read.report.rejects, *aside]
            for prompt in prompts:
                for attack, cell in cells_of(prompt, len(self.cells)):
                    self.cells.append(cell)
                    self.sets.append(name)
                    self.attacks.append(attack)
                    self.unsafe.append(found.unsafe[prompt.prompt_id])

    def marked(self, table: pa.Table) -> pa.Table:
        """The table of the answers, which are in the order of the cells, with what is known of each cell."""
        columns = {"set": pa.array(self.sets), "attack": pa.array(self.attacks), "unsafe": pa.array(np.array(self.unsafe, bool))}
        for name, column in columns.items():
            table = table.append_column(name, column)
        return table


def bench(config: BenchRecipe, crew: Crew | None = None) -> int:
    """Ask, judge, measure; what an earlier, interrupted call left is continued. Returns the exit code.

    crew: workers that serve config.model and its judges already; by default they are started, and ended, here.
    """
    check_policy(config.model)
    check_attributes(config.model, config.attributes)
    for reward in reward_workers(config).values():
        reward.check()
    asked = Bench(config)
    if asked.rejects:
        print(aside_line(asked.rejects), flush=True)
    with only_writer(config.out) as out, ShardStore(out / "answers") as store:
        if any((out / name).exists() for name in (TRAINING, STUDY, METRICS_FILE)):
            raise RunError(f"{config.out!r} holds a run of another job: give another out, such as {config.out}/bench")
        asking = Asking(
            store,
            asked.cells,
            with_variables(load_tokenizer(config.model), config.chat),
            {judge: {a: reward.load_calibration() for a, reward in models.items()} for judge, models in config.judges.given.items()},
            samples=config.samples if config.method == "reranking" else 1,
            chunk=config.rollout.chunk,
            room=prompt_room(config.model, config.rollout.engine, config.sampling),
            seed=config.seed,
            refusals=config.refusal_judge and config.refusal_judge.load_calibration(),
            job="bench",
        )
        identity = fingerprint(config, asked)
        if (store.directory / "store.json").exists():
            store.open_or_create(identity, shards=asking.shards)  # another recipe is refused now rather than after the workers' start
        if not (store.directory / "store.json").exists() or store.missing():
            (out / BENCH).unlink(missing_ok=True)  # old figures must not vouch for answers that are made anew
            if code := ask(config, asking, store, identity, crew):
                return code
        table, cost = asking.finish()
        table = asked.marked(table)
        found = bench_figures(table, config.measure, config.seed)
        write_rejects(out, asked.rejects)
        write_text(out / RECIPE, dump(config) + "\n")
        write_atomically(out / TABLE, lambda file: pq.write_table(table, file))
        write_json(out / COST, cost)
        name = config.name or default_name(out)
        facts = {"name": name, "model": config.model, "method": config.method, **found}
        write_text(out / BENCH, json.dumps(facts, indent=1, allow_nan=False) + "\n")  # in the order of the recipe
    print("\n".join(lines(name, found)), flush=True)
    return 0


def fingerprint(config: BenchRecipe, asked: Bench) -> dict:
    """All that the answers and their scores depend on; where models lie and how many workers serve them is no part of it."""
    prompts: dict[str, list[Prompt]] = {}
    for name, cell in zip(asked.sets, asked.cells, strict=True):
        if cell.prompt not in prompts.setdefault(name, [])[-1:]:  # its cells are neighbours
            prompts[name].append(cell.prompt)
    judges = {judge: {a: judge_fingerprint(reward) for a, reward in models.items()} for judge, models in config.judges.given.items()}
    return {
        **config.model_dump(mode="json", include={"method", "seed", "attributes", "sampling", "chat"}),
        "template": asked.cells[0].template,
        "controls": [control.name for control in dict.fromkeys(cell.control for cell in asked.cells)],
        "attacks": dict(zip(asked.attacks, [cell.attack for cell in asked.cells], strict=True)),
        "samples": config.samples if config.method == "reranking" else 1,
        "engine": config.rollout.engine.model_dump(mode="json"),
        "chunk": config.rollout.chunk,
        "model": model_fingerprint(config.model),
        "sets": {name: prompts_fingerprint(found) for name, found in prompts.items()},
        "judges": judges,
        "refusal_judge": config.refusal_judge and judge_fingerprint(config.refusal_judge),
    }


def main(
    model: Model = "",
    on: On = None,
    recipe: Recipe = "",
    overrides: Set = None,
    out: Out = "",
    attacks: Attacks = False,
    skip_bad_rows: SkipBadRows = False,
) -> None:
    """Try a model's dial on public safety sets."""
    named = {name: {"path": path} if path else {} for name, _, path in (given.partition("=") for given in on or [])}
    options = {"model": model, "sets": named, "attacks": dict.fromkeys(ATTACKS, "") if attacks else {}, "skip_bad_rows": skip_bad_rows}
    raise typer.Exit(run_job(BenchRecipe, bench, recipe, overrides, out, options))


if __name__ == "__main__":
    typer.run(main)
