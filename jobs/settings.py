"""What a job starts from where its command names no recipe: the settings of the run that it resumes, or those that fit the machine."""

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from actors.placement import gpus_of
from ctrlrl.config import AnySection, leaves, load, part_of
from ctrlrl.evaluation.files import RECIPE
from ctrlrl.runs import absolute_out

_RECIPES = Path(__file__).parent / "recipes"


def settled(kind: type[AnySection], recipe: str, overrides: Sequence[str], options: Mapping[str, Any], *, resume: bool) -> AnySection:
    """The config of a job; one that starts workers begins with a line on the terminal that says which settings and why.

    Without `recipe`: with `resume` from what the run in `out` was begun with, else from jobs/recipes/laptop.toml where there is no GPU,
    else from jobs/recipes/node.toml. RecipeError: a mistake in any of it.
    """
    config = load(kind, recipe or None, overrides, options=options)
    if "cluster" not in kind.model_fields:
        return config
    if recipe:
        return _begun_with(config, f"settings: {recipe}")
    begun = absolute_out(config.out) / RECIPE if resume else None
    if begun and begun.is_file():
        known = {key: value for key, value in json.loads(begun.read_text()).items() if key in kind.model_fields}
        return _begun_with(load(kind, None, overrides, known, options), f"settings: those that {config.out!r} was begun with")
    gpus = gpus_of(config.cluster)
    name, why = ("node", f"{gpus:g} GPUs are there") if gpus else ("laptop", "no GPU is there")
    values = part_of(kind, tomllib.loads((_RECIPES / f"{name}.toml").read_text()))
    fitted = load(kind, None, overrides, values, options)
    now, without = (leaves(settings.model_dump(mode="json")) for settings in (fitted, config))
    told = ", ".join(f"{key}={json.dumps(now[key])}" for key in leaves(values) if now[key] != without[key])
    return _begun_with(fitted, f"settings: jobs/recipes/{name}.toml, because {why} and no --recipe is given; --set changes them: {told}")


def _begun_with(config: AnySection, line: str) -> AnySection:
    return config.model_copy(update={"cluster": config.cluster.beginning_with(line)})
