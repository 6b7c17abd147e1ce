"""How a model's dial behaves on public safety sets: what it refuses, what it refuses too much, and what is left of it under attack.

    ctrlrl bench runs/ppo/model --on xstest=xstest.csv --on advbench --attacks --out runs/ppo/bench

Without reward models refusals and compliance are measured, with them mean scores, MP and the configurable score, too. Writes table.parquet,
bench.json and cost.json; `ctrlrl report` puts any number of benches, of models and of methods, into one table.
"""

import json
from typing import Annotated, Literal

import typer
from pydantic import Field, model_validator

from actors.crew import Crew
from actors.reward import RewardConfig
from ctrlrl.attributes import PAPER, check_named
from ctrlrl.control import HIGH, LOW, corners
from ctrlrl.data.atomic import write_text
from ctrlrl.data.generation import prompts_fingerprint
from ctrlrl.data.rejects import aside_line
from ctrlrl.data.sources import Prompt
from ctrlrl.errors import RunError
from ctrlrl.evaluation.baselines import SYSTEM_CONTROLS
from ctrlrl.evaluation.bench import ATTACKS, NO_ATTACK, SAFETY, attack_text, bench_figures
from ctrlrl.evaluation.bench_tables import lines
from ctrlrl.evaluation.exhibits import default_name
from ctrlrl.evaluation.files import BENCH, METRICS_FILE, STUDY, TRAINING
from ctrlrl.evaluation.grid import Cell, controls_of
from ctrlrl.evaluation.safety_sets import SafetySet, read_set
from ctrlrl.runs import only_writer
from jobs.parts.asking import AskedRecipe, Asking, JudgeSets, ask
from jobs.parts.launch import Out, Recipe, Set, SkipBadRows, run_job

Model = Annotated[str, typer.Argument(help="Model whose dial is tried: a directory such as runs/mine/model, or a hub name.")]
On = Annotated[list[str] | None, typer.Option("--on", help="A set: xstest (from the hub), or xstest=FILE. Repeatable.")]
Attacks = Annotated[bool, typer.Option("--attacks", help="Ask every prompt again under each built-in attack.")]


class BenchRecipe(AskedRecipe):
    """What is asked: every prompt of `sets`, plainly and under each of `attacks`, under every control of the method.

    method: as in evaluate, or "plain": nothing is asked for (a base model, a soup). template: of prompting and reranking. attacks: name ->
    the text that the user writes, with {prompt} in it; empty for a built-in one. judges: the sets of reward models that score the answers;
    one, both or none. refusal_judge: a classifier in the patterns' place.
    """

    out: str = "runs/bench"
    method: Literal["control", "prompting", "reranking", "system", "plain"] = "control"
    template: Literal[1, 2, 3, 4] = 1
    sets: dict[str, SafetySet] = Field(min_length=1)
    attacks: dict[str, str] = {}
    judges: JudgeSets = JudgeSets()
    refusal_judge: RewardConfig | None = None

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


def asking_of(config: BenchRecipe) -> Asking:
    """The grid of a bench; its columns say of each cell its set, its attack and whether a safe assistant refuses its prompt."""
    template = config.template if config.method in ("prompting", "reranking") else None
    asked_for, names = controls_of(config.levels, config.attributes), config.attributes.names
    controls = {"system": SYSTEM_CONTROLS, "plain": corners(config.attributes)[-1:]}.get(config.method, asked_for)
    attacks = {NO_ATTACK: "", **{name: text or attack_text(name, names) for name, text in config.attacks.items()}}
    asking = Asking.of(config)
    asking.columns = {"set": [], "attack": [], "unsafe": []}
    for name, given in config.sets.items():
        limit = given.max_prompts or config.max_prompts
        found = read_set(name, given.model_copy(update={"max_prompts": limit}), skip_bad_rows=config.skip_bad_rows)
        prompts = asking.add(
            found.read, lambda prompt: [Cell(0, prompt, c, config.method, template, text) for text in attacks.values() for c in controls]
        )
        for prompt in prompts:
            asking.columns["attack"] += [attack for attack in attacks for _ in controls]
            asking.columns["unsafe"] += [bool(found.unsafe[prompt.prompt_id])] * (len(attacks) * len(controls))
        asking.columns["set"] += [name] * (len(prompts) * len(attacks) * len(controls))
    return asking


def bench(config: BenchRecipe, crew: Crew | None = None) -> int:
    """Ask, judge, measure; what an earlier, interrupted call left is continued. Returns the exit code.

    crew: workers that serve config.model and its judges already; by default they are started, and ended, here.
    """
    config.check()
    asking = asking_of(config)
    if asking.rejects:
        print(aside_line(asking.rejects), flush=True)
    with only_writer(config.out) as out:
        if any((out / name).exists() for name in (TRAINING, STUDY, METRICS_FILE)):
            raise RunError(f"{config.out!r} holds a run of another job: give another out, such as {config.out}/bench")
        code, table = ask(config, asking, "bench", origin_of(config, asking), BENCH, crew)
        if code:
            return code
        found = bench_figures(table, config.measure, config.seed)
        name = config.name or default_name(out)
        facts = {"name": name, "model": config.model, "method": config.method, **found}
        write_text(out / BENCH, json.dumps(facts, indent=1, allow_nan=False) + "\n")  # in the order of the recipe
    print("\n".join(lines(name, found)), flush=True)
    return 0


def origin_of(config: BenchRecipe, asking: Asking) -> dict:
    """The fingerprint of all that the answers and their scores depend on."""
    prompts: dict[str, list[Prompt]] = {}
    for name, cell in zip(asking.columns["set"], asking.cells, strict=True):
        if cell.prompt not in prompts.setdefault(name, [])[-1:]:  # its cells are neighbours
            prompts[name].append(cell.prompt)
    return config.made_from(()) | {
        "template": asking.cells[0].template,
        "controls": [control.name for control in dict.fromkeys(cell.control for cell in asking.cells)],
        "attacks": dict(zip(asking.columns["attack"], [cell.attack for cell in asking.cells], strict=True)),
        "sets": {name: prompts_fingerprint(found) for name, found in prompts.items()},
        "refusal_judge": config.refusal_judge and config.refusal_judge.fingerprint(),
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
