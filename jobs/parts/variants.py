"""What a study is: one chain of jobs in several variants, and the steps that this makes. Pure: nothing is started or written here.

A step's output folder is named after a hash of its settings, so variants with a step in common share it.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from actors.placement import ClusterConfig
from ctrlrl.attributes import PAPER, AttributesSection
from ctrlrl.config import Section, laid_over, load
from ctrlrl.data.files import expanded
from ctrlrl.data.generation import Layout
from ctrlrl.demo.models import DemoWorld
from ctrlrl.demo.models import load as load_world
from ctrlrl.errors import RecipeError
from ctrlrl.evaluation.files import METRICS_FILE
from ctrlrl.runs import absolute_out
from jobs.distill import DistillRecipe
from jobs.distill import is_finished as is_distilled
from jobs.evaluate import EvaluateRecipe
from jobs.finetune import FinetuneRecipe
from jobs.generate import GenerateRecipe
from jobs.ppo import PPORecipe

RECIPES = Path(__file__).parents[1] / "recipes"
KINDS = {"generate": GenerateRecipe, "distill": DistillRecipe, "finetune": FinetuneRecipe, "ppo": PPORecipe, "evaluate": EvaluateRecipe}
# What a step has when it is finished; the others look into their stores.
FINISHED = {"finetune": "model", "ppo": "model", "evaluate": METRICS_FILE}
# No part of what a step makes: where, on how much, whether bad rows end it, how often it is saved and looked at.
UNHASHED = {key: True for key in ("out", "cluster", "name", "skip_bad_rows", "evaluation", "checkpoint_every", "keep_checkpoints")} | {
    "rollout": {"workers"}
}
JobName = Literal["generate", "distill", "finetune", "ppo", "evaluate"]
Settings = dict[JobName, dict[str, Any]]
_PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}")


class Variant(Section):
    """A row of the table. set: what it changes, by job. inputs: in place of the study's. chain: the study's, unless given."""

    name: str = Field(min_length=1)
    set: Settings = {}
    inputs: dict[str, str] = {}
    chain: tuple[JobName, ...] = ()


class StudyRecipe(Section):
    """A chain of jobs, what its steps have in common, and the variants.

    A text in `common` or in a variant's `set` may name `{input}`, or `{job}`, the output folder of an earlier step; `{recipes}` is
    where the recipes are that come along. recipes: the file that a job's settings are laid over, by default the one that comes along.
    seed, cluster, attributes: of every job, unless its own settings say otherwise. skip_bad_rows: if true, of
    every job that reads data. world: folder of a demo world, whose models and prompts take the
    place of the inputs, and the demo's recipes that of the others; `with_world` is laid over `common` then.
    """

    out: str = "runs/study"
    title: str
    note: str = ""
    seed: int = 0
    skip_bad_rows: bool = False
    world: str = ""
    inputs: dict[str, str] = {}
    chain: tuple[JobName, ...]
    recipes: dict[JobName, str] = {}
    common: Settings = {}
    with_world: Settings = {}
    cluster: ClusterConfig = ClusterConfig()
    attributes: AttributesSection = PAPER
    variants: tuple[Variant, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _is_consistent(self):
        names = [variant.name for variant in self.variants]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two variants are named {twice[0]!r}: give each a name of its own")
        for variant in self.variants:
            chain = self.chain_of(variant)
            if len(set(chain)) < len(chain) or chain[-1:] != ("evaluate",):
                raise ValueError(f"the chain of {variant.name!r} is {list(chain)}: name each job once, evaluate last")
            if foreign := sorted(set(variant.set) - set(chain)):
                raise ValueError(f"variant {variant.name!r} sets {foreign[0]}, which is not in its chain {list(chain)}")
            if taken := sorted(set(KINDS) & {*self.inputs, *variant.inputs}):
                raise ValueError(f"an input is named like a job, {taken[0]!r}: give it another name")
        return self

    def chain_of(self, variant: Variant) -> tuple[str, ...]:
        """The jobs of a variant, in order."""
        return variant.chain or self.chain


@dataclass(frozen=True)
class Step:
    """One job of a variant with all its settings; steps with the same folder are the same step."""

    job: str
    folder: Path
    config: Section

    @property
    def finished(self) -> bool:
        """Whether its work is there, and made from the shards that are there."""
        match self.config:
            case GenerateRecipe():
                return Layout(self.folder).finished
            case DistillRecipe():
                return is_distilled(self.config)
        return (self.folder / FINISHED[self.job]).exists()


def plan(study: StudyRecipe) -> dict[str, list[Step]]:
    """The steps of every variant, by its name; RecipeError names the variant and the job whose settings are wrong."""
    return {variant.name: list(_steps(study, variant)) for variant in study.variants}


def filled(settings: Any, places: Mapping[str, str]) -> Any:
    """`settings` with every `{name}` in a text replaced; RecipeError if there is no such place."""
    if isinstance(settings, Mapping):
        return {key: filled(value, places) for key, value in settings.items()}
    if isinstance(settings, list):
        return [filled(value, places) for value in settings]
    if not isinstance(settings, str):
        return settings
    if unknown := [name for name in _PLACEHOLDER.findall(settings) if name not in places]:
        raise RecipeError(
            f"{{{unknown[0]}}} in {settings!r} is no input and no earlier step of the chain: it has {', '.join(sorted(places))}"
        )
    return _PLACEHOLDER.sub(lambda found: places[found[1]], settings)


def _steps(study: StudyRecipe, variant: Variant) -> Iterator[Step]:
    root = absolute_out(study.out)
    world = load_world(expanded(study.world).absolute()) if study.world else None
    places = {"recipes": str(RECIPES)} | study.inputs | (_world_inputs(world) if world else {}) | variant.inputs
    shared = {"seed": study.seed, "cluster": study.cluster.model_dump(exclude_unset=True)}
    shared |= {"attributes": study.attributes} if study.attributes != PAPER else {}
    shared |= {"skip_bad_rows": True} if study.skip_bad_rows else {}  # where it is not asked for, a job's own recipe decides
    for job in study.chain_of(variant):
        kind = KINDS[job]
        settings = {key: value for key, value in shared.items() if key in kind.model_fields}
        for more in (study.common, study.with_world if study.world else {}, variant.set):
            settings = laid_over(settings, more.get(job, {}))
        try:
            config = load(kind, _recipe(study, job), settings=filled(settings, places))
        except RecipeError as error:
            raise RecipeError(f"variant {variant.name!r}, {job}: {error}") from None
        folder = root / "steps" / f"{job}-{_digest(config, root, world.fingerprint if world else '')}"
        places = places | {job: str(folder)}
        yield Step(job, folder, config.model_copy(update={"out": str(folder)} | ({"name": variant.name} if job == "evaluate" else {})))


def _digest(config: Section, root: Path, world: str) -> str:
    """Twelve digits that tell settings and worlds apart; where the study lies has no part in them."""
    text = json.dumps(config.model_dump(mode="json", exclude=UNHASHED), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256((world + text.replace(f"{root}/", "")).encode()).hexdigest()[:12]


def _recipe(study: StudyRecipe, job: str) -> str | Path:
    demo = RECIPES / f"demo_{job}.toml"
    return study.recipes.get(job) or (demo if study.world and demo.exists() else RECIPES / f"{job}.toml")


def _world_inputs(world: DemoWorld) -> dict[str, str]:
    judges = {a: str(world.reward[a]) for a in world.reward} | {f"held_out_{a}": str(world.held_out[a]) for a in world.held_out}
    return judges | {"policy": str(world.policy), "prompts": str(world.train_prompts), "test_prompts": str(world.test_prompts)}
