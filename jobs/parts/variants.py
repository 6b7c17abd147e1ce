"""What a study is: one chain of jobs in several variants, and the steps that this makes. Pure: nothing is started or written here.

A step's output folder is named after a hash of its settings, so variants with a step in common share it.
"""

import hashlib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from actors.placement import ClusterConfig
from ctrlrl.attributes import PAPER, AttributesSection
from ctrlrl.config import Section, laid_over, load, part_of
from ctrlrl.data.critique import CritiqueLayout
from ctrlrl.data.files import expanded
from ctrlrl.data.generation import Layout
from ctrlrl.demo.models import DemoWorld
from ctrlrl.demo.models import load as load_world
from ctrlrl.errors import RecipeError
from ctrlrl.evaluation.files import METRICS_FILE
from ctrlrl.runs import absolute_out
from jobs.calibrate import CalibrateRecipe
from jobs.calibrate import is_finished as is_calibrated
from jobs.critique import CritiqueRecipe
from jobs.distill import DistillRecipe
from jobs.distill import is_finished as is_distilled
from jobs.dpo import DPORecipe
from jobs.evaluate import EvaluateRecipe
from jobs.finetune import FinetuneRecipe
from jobs.generate import GenerateRecipe
from jobs.ppo import PPORecipe
from jobs.reward_model import RewardModelRecipe

RECIPES = Path(__file__).parents[1] / "recipes"
KINDS = {
    "reward_model": RewardModelRecipe, "generate": GenerateRecipe, "calibrate": CalibrateRecipe, "distill": DistillRecipe,
    "finetune": FinetuneRecipe, "ppo": PPORecipe, "critique": CritiqueRecipe, "dpo": DPORecipe, "evaluate": EvaluateRecipe,
}  # fmt: skip
SEEDED = ("finetune", "ppo", "dpo")  # whose seed is the variant's
# No part of what a step makes: where, on how much, whether bad rows end it, how often it is saved and looked at.
UNHASHED = {key: True for key in ("out", "cluster", "name", "skip_bad_rows", "evaluation", "checkpoint_every", "keep_checkpoints")} | {
    "rollout": {"workers"}
}
LAPTOP = "laptop"  # in the place of a recipe's file: the settings that fit two cores, for whichever job
Settings = dict[str, dict[str, Any]]
_PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}")


class Variant(Section):
    """A row of the table, or one for each seed. set: what it changes, by step. inputs: in place of the study's. chain, seeds: the
    study's, unless given."""

    name: str = Field(min_length=1)
    set: Settings = {}
    inputs: dict[str, str] = {}
    chain: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()


class StudyRecipe(Section):
    """A chain of steps, what they have in common, and the variants.

    A step is named like its job; `named` gives names of their own to further steps of a job, whose settings are laid over the job's.
    A text in `common` or in a variant's `set` may name `{input}`, or `{step}`, the output folder of an earlier step; `{recipes}` is
    where the recipes are that come along. recipes: the file that a job's settings are laid over, by default the one that comes along,
    or "laptop". seeds: each variant that trains a policy (finetune, ppo, dpo) is trained once with each; what comes before is shared.
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
    named: dict[str, str] = {}
    chain: tuple[str, ...]
    seeds: tuple[int, ...] = ()
    recipes: dict[str, str] = {}
    common: Settings = {}
    with_world: Settings = {}
    cluster: ClusterConfig = ClusterConfig()
    attributes: AttributesSection = PAPER
    variants: tuple[Variant, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _steps_are_known(self):
        for name, job in self.named.items():
            if name in KINDS or not name.isidentifier() or job not in KINDS:
                raise ValueError(f"named.{name} = {job!r}: give a step a name that no job has, and one of {', '.join(KINDS)}")
        known = (*KINDS, *self.named)
        given = {"recipes": self.recipes, "common": self.common, "with_world": self.with_world, "chain": self.chain}
        for i, variant in enumerate(self.variants):
            given |= {f"variants.{i}.set": variant.set, f"variants.{i}.chain": variant.chain}
        for place, names in given.items():
            for name in names:
                if name not in known:
                    raise ValueError(f"{place} names {name!r}, which is no step: {', '.join(known)}")
        for place, seeds in {"seeds": self.seeds, **{f"the seeds of {v.name!r}": v.seeds for v in self.variants}}.items():
            if len(set(seeds)) < len(seeds):
                raise ValueError(f"{place} name one twice: {list(seeds)}")
        return self

    @model_validator(mode="after")
    def _is_consistent(self):
        names = [variant.name for variant in self.variants]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two variants are named {twice[0]!r}: give each a name of its own")
        for variant in self.variants:
            chain = self.chain_of(variant)
            if len(set(chain)) < len(chain) or chain[-1:] != ("evaluate",):
                raise ValueError(f"the chain of {variant.name!r} is {list(chain)}: name each step once, evaluate last")
            if foreign := sorted(set(variant.set) - set(chain)):
                raise ValueError(f"variant {variant.name!r} sets {foreign[0]}, which is not in its chain {list(chain)}")
            if taken := sorted({*KINDS, *self.named} & {*self.inputs, *variant.inputs}):
                raise ValueError(f"an input is named like a step, {taken[0]!r}: give it another name")
        return self

    def job_of(self, step: str) -> str:
        """The job of a step."""
        return self.named.get(step, step)

    def seeds_of(self, variant: Variant) -> tuple[int | None, ...]:
        """The seeds that a variant is trained with; the study's own, unnamed, where there are none or nothing is trained."""
        trains = any(self.job_of(step) in SEEDED for step in self.chain_of(variant))
        return (trains and (variant.seeds or self.seeds)) or (None,)

    def chain_of(self, variant: Variant) -> tuple[str, ...]:
        """The steps of a variant, in order."""
        return variant.chain or self.chain


@dataclass(frozen=True)
class Step:
    """One step of a variant with all its settings; steps with the same folder are the same step."""

    name: str
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
            case CalibrateRecipe():
                return is_calibrated(self.config)
            case CritiqueRecipe():
                layout = CritiqueLayout(self.folder)
                return layout.sources.manifest.exists() and layout.critiques().finished
            case EvaluateRecipe():
                return (self.folder / METRICS_FILE).exists()
        return (self.folder / "model").exists()


def plan(study: StudyRecipe) -> dict[str, list[Step]]:
    """The steps of every row, by its name; RecipeError names the variant and the step whose settings are wrong, or a misspelt
    input."""
    texts = json.dumps([study.common, study.with_world, *(variant.set for variant in study.variants)], default=str)
    used = set(_PLACEHOLDER.findall(texts))
    for name in sorted({*study.inputs, *(name for variant in study.variants for name in variant.inputs)} - used):
        if meant := get_close_matches(name, used, 1, 0.8):
            raise RecipeError(f"inputs.{name} is used by no step: did you mean inputs.{meant[0]}?")
    return {
        variant.name if seed is None else f"{variant.name}, seed {seed}": list(_steps(study, variant, seed))
        for variant in study.variants
        for seed in study.seeds_of(variant)
    }


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


def _steps(study: StudyRecipe, variant: Variant, seed: int | None) -> Iterator[Step]:
    root = absolute_out(study.out)
    world = load_world(expanded(study.world).absolute()) if study.world else None
    places = {"recipes": str(RECIPES)} | study.inputs | (_world_inputs(world) if world else {}) | variant.inputs
    shared = {"seed": study.seed, "cluster": study.cluster.model_dump(exclude_unset=True)}
    shared |= {"attributes": study.attributes} if study.attributes != PAPER else {}
    shared |= {"skip_bad_rows": True} if study.skip_bad_rows else {}  # where it is not asked for, a job's own recipe decides
    for name in study.chain_of(variant):
        job = study.job_of(name)
        kind, recipe = KINDS[job], _recipe(study, job)
        settings = {key: value for key, value in shared.items() if key in kind.model_fields}
        settings |= {"seed": seed} if seed is not None and job in SEEDED else {}
        if recipe == LAPTOP:
            recipe, settings = None, laid_over(part_of(kind, tomllib.loads((RECIPES / "laptop.toml").read_text())), settings)
        for more in (study.common, study.with_world if study.world else {}, variant.set):
            for given in dict.fromkeys((job, name)):
                settings = laid_over(settings, more.get(given, {}))
        try:
            config = load(kind, recipe, settings=filled(settings, places))
        except RecipeError as error:
            raise RecipeError(f"variant {variant.name!r}, {name}: {error}") from None
        folder = root / "steps" / f"{job}-{_digest(config, root, world.fingerprint if world else '')}"
        places = places | {name: str(folder)}
        row = variant.name if seed is None else f"{variant.name}, seed {seed}"
        yield Step(name, folder, config.model_copy(update={"out": str(folder)} | ({"name": row} if job == "evaluate" else {})))


def _digest(config: Section, root: Path, world: str) -> str:
    """Twelve digits that tell settings and worlds apart; where the study lies has no part in them."""
    text = json.dumps(config.model_dump(mode="json", exclude=UNHASHED), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256((world + text.replace(f"{root}/", "")).encode()).hexdigest()[:12]


def _recipe(study: StudyRecipe, job: str) -> str | Path | None:
    demo = RECIPES / f"demo_{job}.toml"
    shipped = demo if study.world and demo.exists() else RECIPES / f"{job}.toml"
    return study.recipes.get(job) or (shipped if shipped.exists() else None)


def _world_inputs(world: DemoWorld) -> dict[str, str]:
    judges = {a: str(world.reward[a]) for a in world.reward} | {f"held_out_{a}": str(world.held_out[a]) for a in world.held_out}
    return judges | {"policy": str(world.policy), "prompts": str(world.train_prompts), "test_prompts": str(world.test_prompts)}
