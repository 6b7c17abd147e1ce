"""The whole paper in miniature: build a small world, generate, distil, train by every method, evaluate all of them, report.

Every step is an ordinary job on one local Ray cluster with the real engines. A second call continues or reuses what is there.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import pyarrow.parquet as pq
import typer

from actors.crew import start_crew
from actors.placement import ClusterConfig, connect, gpus_of
from ctrlrl.config import AnySection, Section, differences, dump, load
from ctrlrl.control import ATTRIBUTES, CORNERS
from ctrlrl.data.atomic import clear_leftovers, discard, remove_all, write_text
from ctrlrl.demo import corpus
from ctrlrl.demo.dials import offer
from ctrlrl.demo.models import FULL, TINY, DemoWorld, build, holds_another, is_world
from ctrlrl.errors import RecipeError, RunError
from ctrlrl.evaluation.exhibits import collect
from ctrlrl.evaluation.files import DETAILS, METRICS_FILE, RECIPE, TABLE, read_json
from ctrlrl.evaluation.metrics import METRICS
from ctrlrl.evaluation.plots import reward_curve
from ctrlrl.evaluation.report import write_report
from ctrlrl.runs import only_writer, output_directory, read_metrics
from jobs.critique import CritiqueRecipe, critique
from jobs.distill import DistillRecipe, distill
from jobs.dpo import DPORecipe, dpo
from jobs.evaluate import EvaluateRecipe, evaluate, is_finished
from jobs.finetune import FinetuneRecipe, check_reused, finetune
from jobs.generate import GenerateRecipe, generate
from jobs.parts.cast import demands_of
from jobs.parts.launch import mistakes_told
from jobs.parts.measure import summary_lines, system_lines
from jobs.parts.settings import on_one_gpu
from jobs.ppo import PPORecipe, train

RECIPES = Path(__file__).parent / "recipes"
STEPS = ("world", "generate", "distill", "clm", "exmate", "ppo", "critique", "cst", "dpo", "evaluate", "report")
TRAINED = {"clm": "control", "exmate": "control", "ppo": "control", "cst": "system", "dpo": "system"}  # and how each is evaluated
PARTS = (*(step for step in STEPS if step not in ("world", "evaluate")), "evaluations")  # the folders beside the world
FIRST = "clm"  # trained first, so that there is something to see while the others train
UNTRAINED = {"before": "control", "prompting": "prompting", "reranking": "reranking"}
FAST = {"ppo": {"steps": 6}, "generate": {"samples_per_prompt": 4}, "evaluate": {"max_prompts": 20}}  # what --fast changes in the recipes


@dataclass(frozen=True)
class Demo:
    """Where everything lies, and how its jobs are set up. gpu: all workers share one."""

    directory: Path
    world: DemoWorld
    seed: int
    fast: bool
    gpu: bool = False

    def recipe(self, kind: type[AnySection], name: str, out: str, /, **settings) -> AnySection:
        """The recipe demo_`name`.toml with its output in `out`; a double underscore in a setting's name stands for a dot."""
        settings = {"out": str(self.directory / out), "seed": self.seed, **(FAST.get(name, {}) if self.fast else {}), **settings}
        overrides = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in settings.items()]
        path = RECIPES / f"demo_{name}.toml"
        config = load(kind, path if path.exists() else None, overrides)
        shared = on_one_gpu(config) if self.gpu else []
        return load(kind, path if path.exists() else None, [*overrides, *shared]) if shared else config

    @property
    def policy(self) -> str:
        """The world's uncontrolled policy."""
        return str(self.world.policy)

    def rewards(self, prefix: str = "reward", judge: str = "reward") -> dict[str, str]:
        """Settings that name the two reward models of a set (`reward`, `held_out`)."""
        return {f"{prefix}__{a}__model": str(getattr(self.world, judge)[a]) for a in ATTRIBUTES}

    def generate(self) -> int:
        """Answers of the uncontrolled policy, scored."""
        prompts = str(self.world.train_prompts)
        return generate(self.recipe(GenerateRecipe, "generate", "generate", policy=self.policy, prompts=prompts, **self.rewards()))

    def distill(self) -> int:
        """The MOEC table."""
        return distill(self.recipe(DistillRecipe, "distill", "distill", data=str(self.directory / "generate")))

    def finetune(self, objective: str) -> int:
        """CLM or ExMATE on the MOEC table."""
        data = str(self.directory / "distill")
        config = self.recipe(FinetuneRecipe, "finetune", objective, objective=objective, data=data, policy__model=self.policy)
        return self._trained(config, finetune, check_reused)

    def ppo(self, steps: int | None = None) -> int:
        """PPO with the min control reward."""
        return self._trained(self.ppo_recipe(steps), train)

    def ppo_recipe(self, steps: int | None = None) -> PPORecipe:
        """The demo's PPO run."""
        prompts = str(self.world.train_prompts)
        chosen = {} if steps is None else {"steps": steps}
        return self.recipe(PPORecipe, "ppo", "ppo", prompts=prompts, policy__model=self.policy, **self.rewards(), **chosen)

    def critique(self) -> int:
        """Self-critique pairs."""
        words = {"templates__critique": corpus.CRITIQUE, "templates__rewrite": corpus.REWRITE, "templates__marker": corpus.MARKER}
        prompts = str(self.world.train_prompts)
        return critique(self.recipe(CritiqueRecipe, "critique", "critique", policy=self.policy, prompts=prompts, **words))

    def prefer(self, name: str) -> int:
        """CST (`cst`) or plain DPO (`dpo`) on the pairs."""
        method = "cst" if name == "cst" else "plain"
        critiques = str(self.directory / "critique")
        return self._trained(self.recipe(DPORecipe, "dpo", name, method=method, critiques=critiques, policy__model=self.policy), dpo)

    def look(self) -> int:
        """The first trained model's answers to one prompt at the four corners, with their scores: its evaluation, before all others."""
        if code := self.evaluate((FIRST,)):
            return code
        print("\n" + "\n".join(four_answers(pq.read_table(self.directory / "evaluations" / FIRST / TABLE))), flush=True)
        return 0

    def evaluate(self, names: tuple[str, ...] = (*UNTRAINED, *TRAINED)) -> int:
        """Every one of these methods that was trained, and the uncontrolled policy under both baselines."""
        configs = [self.evaluation(name) for name in names]
        todo = [config for config in configs if Path(config.model).is_dir() and not is_finished(config)]
        if not todo:
            return 0
        with start_crew(todo[0].cluster, todo[0].workers) as judges:
            judges.wait_ready()
            for model, group in groupby(todo, lambda config: config.model):
                with judges.answered_by(todo[0].cluster, todo[0].rollout, model) as crew:
                    for config in group:
                        if code := evaluate(config, crew):
                            return code
        return 0

    def evaluation(self, name: str) -> EvaluateRecipe:
        """The evaluation of a method on prompts that nothing was trained on."""
        model = self.directory / name / "model" if name in TRAINED else self.policy
        judges = self.rewards("judges__optimisation") | self.rewards("judges__held_out", "held_out")
        method, prompts = {**UNTRAINED, **TRAINED}[name], str(self.world.test_prompts)
        return self.recipe(
            EvaluateRecipe, "evaluate", f"evaluations/{name}", name=name, model=str(model), method=method, prompts=prompts, **judges
        )

    def report(self) -> int:
        """summary.json, reward.png, the report, and the table on the terminal."""
        found = {name: self.directory / "evaluations" / name for name in (*UNTRAINED, *TRAINED)}
        methods = {name: metrics for name, path in found.items() if (metrics := read_json(path / METRICS_FILE))}
        if not methods:
            raise RunError(f"nothing is evaluated in {str(self.directory)!r} yet: run ctrlrl demo --only evaluate first")
        write_text(self.directory / "summary.json", json.dumps(summary(methods), indent=2) + "\n")
        parts = ["generate", "distill", "critique", *TRAINED, *(f"evaluations/{name}" for name in methods)]
        runs = [str(self.directory / part) for part in parts if (self.directory / part).is_dir()]
        html, _ = write_report(collect(runs), output_directory(str(self.directory / "report")), "ctrlrl demo")
        print("\nControl on prompts not trained on (mP, MP, BT: higher is better; Err: lower)\n")
        print("\n".join(summary_lines(methods)))
        print("\n".join(system_lines({name: told for name in methods if (told := read_json(found[name] / DETAILS))})))
        if "ppo" in methods:
            reward_curve(read_metrics(self.directory / "ppo"), self.directory / "reward.png")
        if best := self.best_dial(methods):
            answers = "\n".join(four_answers(pq.read_table(found[best] / TABLE)))
            print(f"\nThe {best} model follows its tags best, by the held-out judges.\n{answers}")
        print(f"\nReport: {html}\nFigures: {self.directory / 'summary.json'}\nModels: {self.directory}/*/model", flush=True)
        if best:
            print("\n" + "\n".join(offer(self.directory, self.directory / best / "model", self.world.reward)), flush=True)
        return 0

    def best_dial(self, methods: dict[str, dict]) -> str:
        """Of the models trained to follow tags the one with the highest MP, in the mean of the attributes, by the held-out judges."""
        found = [name for name in methods if TRAINED.get(name) == "control" and (self.directory / name / "model").is_dir()]
        return max(found, key=lambda name: sum(methods[name]["held_out"][a]["MP"]["value"] or 0 for a in ATTRIBUTES), default="")

    def _trained(self, config, job: Callable[..., int], check: Callable[..., None] = lambda config: None) -> int:
        """Run a training job, or continue it, unless its model is there; RunError if that was made with other settings, or by `check`."""
        out = Path(config.out)
        if (out / "model").is_dir():
            free = ("cluster", "checkpoint_every", "skip_bad_rows")
            if changed := [change for change in changes(out, config) if not change.startswith(free)]:
                remedy = f"give the old values, another --out, or --fresh --only {out.name}"
                raise RunError(f"{str(out)!r} was made with other settings ({'; '.join(changed)}): {remedy}")
            check(config)
            print(f"{out.name}: reused from {out}", flush=True)
            return 0
        return job(config, resume=(out / RECIPE).exists())


def run_demo(out: str, seed: int = 0, only: str = "", fast: bool = False, ppo_steps: int | None = None, fresh: bool = False) -> int:
    """Run every step, or `only` one of STEPS; what is there is reused, unless `fresh`. Returns the exit code.

    RunError, before anything is changed: the directory holds results on another world (seed, fast, or an older version's).
    """
    if only and only not in STEPS:
        raise RecipeError(f"--only {only!r} is no step of the demo: give one of {', '.join(STEPS)}")
    if ppo_steps is not None and ppo_steps < 1:
        raise RecipeError(f"--steps {ppo_steps}: give at least one step of PPO")
    with only_writer(out) as directory:
        return _run_steps(directory, seed, only, fast, ppo_steps, fresh)


def _run_steps(directory: Path, seed: int, only: str, fast: bool, ppo_steps: int | None, fresh: bool) -> int:
    began, size = time.monotonic(), TINY if fast else FULL
    left = [directory / part for part in PARTS if (directory / part).exists()]
    unwanted = removable(directory, only) if fresh else []
    if set(left) - set(unwanted) and holds_another(directory / "world", seed, size):
        raise RunError(
            f"{str(directory)!r} holds a demo of another world (--seed, --fast or the version differ): give another --out, or begin "
            "anew with --fresh and without --only"
        )
    for folder in (directory, directory / "evaluations"):
        clear_leftovers(folder, {*PARTS, *UNTRAINED}.__contains__)
    for building in directory.glob(".world.*"):  # of a run that was killed while it built the world
        discard(building)
    remove_all(unwanted)
    world = build(directory / "world", seed, report=lambda line: print(line, flush=True), size=size)
    alone = only in ("world", "distill", "report")
    demo = Demo(directory, world, seed, fast, gpu=not alone and gpus_of(ClusterConfig()) > 0)
    actions: dict[str, Callable[[], int]] = {
        "generate": demo.generate,
        "distill": demo.distill,
        "clm": lambda: demo.finetune("clm") or (0 if only else demo.look()),
        "exmate": lambda: demo.finetune("exmate"),
        "ppo": lambda: demo.ppo(ppo_steps),
        "critique": demo.critique,
        "cst": lambda: demo.prefer("cst"),
        "dpo": lambda: demo.prefer("dpo"),
        "evaluate": demo.evaluate,
        "report": demo.report,
    }
    if not alone:
        connect(ClusterConfig(), demands_of(demo.ppo_recipe()))  # the step that needs most; all share the cluster
    for number, step in enumerate(STEPS[1:], 2):
        if only in ("", step):
            print(f"\n[{number}/{len(STEPS)}] {step}, after {time.monotonic() - began:.0f} s", flush=True)
            if code := actions[step]():
                return code
    print(f"{time.monotonic() - began:.0f} s", flush=True)
    return 0


def removable(directory: Path, only: str) -> list[Path]:
    """What --fresh removes: the results of every step, or of the step `only` with their evaluation. RunError where no demo ran."""
    names = {"": PARTS, "world": (), "evaluate": ("evaluations",)}.get(only, (only, f"evaluations/{only}"))
    found = [directory / name for name in names if (directory / name).exists()]
    if found and not is_world(directory / "world"):
        raise RunError(f"{str(directory)!r} has {found[0].name!r} but no world of a demo: --fresh removes only what a demo has left")
    for part in found:
        if elsewhere := next((p for p in (part, *part.parents) if p != directory and directory in p.parents and p.is_symlink()), None):
            raise RunError(
                f"{str(elsewhere)!r} is a link to {str(elsewhere.resolve())!r}: --fresh removes nothing that lies elsewhere; remove the "
                "link, or empty what it points to, and run the same command again"
            )
    return found


def changes(out: Path, config: Section) -> list[str]:
    """What differs between the recipe that a step in `out` was made with and `config`, wherever the demo's directory lay then."""
    old, new = (out / RECIPE).read_text(), dump(config)
    roots = [Path(json.loads(text)["out"]).parent for text in (old, new)]
    return differences(*(json.loads(text.replace(f"{root}/", "")) for text, root in zip((old, new), roots, strict=True)))


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
    only: Annotated[str, typer.Option(help=f"Run one step alone: {', '.join(STEPS)}.")] = "",
    fast: Annotated[bool, typer.Option("--fast", help="A rough world and few steps: see everything run, not learn.")] = False,
    steps: Annotated[int | None, typer.Option(help="PPO steps; fewer for a quick look.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin anew with all but the world; with --only, with one step.")] = False,
) -> None:
    """Run the whole paper in miniature: generate, distil, train by every method, evaluate, report."""
    with mistakes_told():
        raise typer.Exit(run_demo(out, seed, only, fast, steps, fresh))


if __name__ == "__main__":
    typer.run(main)
