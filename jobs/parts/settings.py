"""What a job starts from where its command names no recipe: the settings of the run that it resumes, or those that fit the machine."""

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from actors.placement import gpus_of
from ctrlrl.config import AnySection, Section, given, leaves, load, part_of
from ctrlrl.errors import RecipeError
from ctrlrl.evaluation.files import RECIPE, read_json
from ctrlrl.runs import absolute_out

GPU_SHARE = 0.125  # of each of a job's workers that share one: eight of them
_STARTS = ("laptop", "node")
_RECIPES = Path(__file__).parents[1] / "recipes"


def settled(kind: type[AnySection], recipe: str, overrides: Sequence[str], options: Mapping[str, Any], *, resume: bool) -> AnySection:
    """The config of a job; one that starts workers begins with a line on the terminal that says which settings and why.

    Without `recipe`: with `resume` from what the run in `out` was begun with, which has all that is required, else from
    jobs/recipes/laptop.toml where there is no GPU, else from jobs/recipes/node.toml. These two are no recipes of one job: a job takes the
    keys that it has, also where `recipe` names one of them. RecipeError: a mistake in any of it.
    """
    if resume and not recipe and (begun := _of_the_run(kind, overrides, options)):
        return begun
    named = next((name for name in _STARTS if recipe and Path(recipe).resolve() == _RECIPES / f"{name}.toml"), "")
    try:
        config = load(kind, None if named else recipe or None, overrides, options=options)
    except RecipeError as error:
        if resume and not recipe:
            raise RecipeError(f"there is no run to resume, and for a new one {error}") from None
        raise
    if "cluster" not in kind.model_fields:
        return config
    if recipe and not named:
        return _begun_with(config, f"settings: {recipe}")
    gpus = 0 if named else gpus_of(config.cluster)
    name, seen = ("node", f"{gpus:g} GPUs are there") if gpus else ("laptop", "no GPU is there")
    name, why = (named, "--recipe says so") if named else (name, f"{seen} and no --recipe is given")
    values = part_of(kind, tomllib.loads((_RECIPES / f"{name}.toml").read_text()))
    values = {key: _of_each(value, getattr(config, key)) for key, value in values.items()}
    fitted = load(kind, None, overrides, values, options)
    now, without = (leaves(settings.model_dump(mode="json")) for settings in (fitted, config))
    told = ", ".join(f"{key}={json.dumps(now[key])}" for key in leaves(values) if now[key] != without[key])
    return _begun_with(fitted, f"settings: jobs/recipes/{name}.toml, because {why}; --set changes them: {told}")


def on_one_gpu(config: Section) -> list[str]:
    """Overrides by which all workers of a job have a share of one GPU each. There, NCCL takes one rank of a model and no more."""
    values = leaves(config.model_dump(mode="json"))
    shares = [f"{key}={GPU_SHARE}" for key in values if key.endswith("resources.gpus")]
    return shares + [f"{key}=1" for key, ranks in values.items() if key.endswith(".ranks") and ranks > 1]


def _of_the_run(kind: type[AnySection], overrides: Sequence[str], options: Mapping[str, Any]) -> AnySection | None:
    """The settings that the run in `out` was begun with, under what the command line says; None if no run is there."""
    out = given(kind, None, overrides, options=options).get("out", kind.model_fields["out"].default)
    begun = read_json(absolute_out(out) / RECIPE)
    if begun is None:
        return None
    known = {key: value for key, value in begun.items() if key in kind.model_fields} | {"out": out}  # a run's directory may be moved
    try:
        return _begun_with(load(kind, None, overrides, known, options), f"settings: those that {out!r} was begun with")
    except RecipeError as error:
        raise RecipeError(f"with the settings that {out!r} was begun with: {error}") from None


def _of_each(value: Any, named: Any) -> Any:
    """Settings of sections by name, such as those of reward models, for the names that are given; one that has none takes the first's."""
    if not isinstance(named, dict) or not isinstance(value, Mapping) or not value:
        return value
    return {name: value.get(name, next(iter(value.values()))) for name in named}


def _begun_with(config: AnySection, line: str) -> AnySection:
    return config.model_copy(update={"cluster": config.cluster.beginning_with(line)})
