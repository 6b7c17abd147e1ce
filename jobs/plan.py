"""What a PPO recipe needs in memory, by worker and phase, whether it fits GPUs of a given size, and what to change if not.

    python jobs/plan.py jobs/recipes/ppo_node.toml --gpus 8 --gpu-gib 80

Nothing is started and no weights are read: models are counted by their configurations, or by descriptions (--sizes).
"""

from collections.abc import Mapping
from functools import partial

import typer
from transformers import PretrainedConfig

from ctrlrl.config import load
from ctrlrl.errors import RecipeError
from ctrlrl.models.footprint import cache_bytes_a_token, parameters_of, total
from ctrlrl.models.scorer_names import weights_of
from ctrlrl.models.sizes import shape_of
from jobs.parts.cast import PPORecipe
from jobs.parts.launch import BesideGib, GpuGib, Gpus, RecipeFile, Set, Sizes, mistakes_told
from jobs.parts.rooms import (
    GIB,
    Changed,
    Worker,
    devices_of,
    gpus_of,
    too_full,
    used,
    what_would_fit,
    what_would_fit_together,
    workers_of,
)

PARTS = ("weights", "gradients", "optimiser", "activations", "cache", "buffers", "CUDA")
_FEWER_GPUS = ("value=head", "reference=adapter")


def plan(recipe: str, overrides: list[str], gpu_gib: float, gpus: int, beside_gib: float, sizes: list[str]) -> int:
    """Print the plan; 0 if everything fits, else 1."""
    config, room = load(PPORecipe, recipe, overrides), int(gpu_gib * GIB)
    shapes = _shapes(config, sizes)
    changed = partial(_changed, recipe, overrides, shapes, int(beside_gib * GIB))
    workers = changed([])
    print("\n".join(_table(workers)))
    print("\n".join([*_notes(config, shapes["policy.model"]), *_turns(workers)]))
    problems = [*_too_full(workers, config, room, gpus, changed), *_too_many(workers, gpus, room, changed)]
    print(f"\n{_devices(workers, room)}")
    print("\n".join(problems) if problems else "Everything fits.", flush=True)
    return 1 if problems else 0


def _shapes(config: PPORecipe, sizes: list[str]) -> dict[str, PretrainedConfig]:
    """The configuration of each model by recipe key; says where each is from. RecipeError for a size of a model that the recipe lacks."""
    models, given = {key: weights for key, name in config.models.items() if (weights := weights_of(name))}, {}
    for text in sizes:
        key, _, size = text.partition("=") if text.split("=")[0].endswith(".model") else ("", "", text)
        if key and key not in models:
            raise RecipeError(f"--sizes {text!r}: {key} is no model of this recipe, which has {', '.join(models)}")
        given[models.get(key, "")] = size  # the same model under another key is as large
    print(f"{'model':24}{'parameters':>12}  from")
    found = {}
    for key, name in models.items():
        found[key], origin = shape_of(name, given.get(name, given.get("", "")))
        print(f"{key:24}{parameters_of(found[key]) / 1e9:11.2f}B  {name}: {origin}")
    return found


def _changed(recipe: str, overrides: list[str], shapes: Mapping[str, PretrainedConfig], beside: int, more: list[str]) -> list[Worker]:
    return workers_of(load(PPORecipe, recipe, [*overrides, *more]), shapes, beside)


def _table(workers: list[Worker]) -> list[str]:
    """One line for each phase of each kind of worker, in GiB."""
    lines = ["", "GiB of one worker" + " " * 19 + "GPUs" + "".join(f"{part:>13}" for part in PARTS) + f"{'sum':>9}"]
    for worker in workers:
        more = f" (to {worker.count + worker.spare})" if worker.spare else ""
        for place, (phase, parts) in enumerate(worker.phases.items()):
            part = f" (1/{worker.parts})" if worker.parts > 1 else ""
            name = f"{worker.count}{more} x {worker.name}{part}" if not place else ""
            gpus = f"{worker.gpus:g}" if not place else ""
            figures = "".join(f"{parts[part] / GIB:13.1f}" if parts.get(part) else f"{'-':>13}" for part in PARTS)
            lines.append(f"{name:26}{phase:9}{gpus:>5}{figures}{total(parts) / GIB:9.1f}")
    return lines


def _notes(config: PPORecipe, policy: PretrainedConfig) -> list[str]:
    """What the cache holds, and what a publish takes of the nodes' own memory."""
    engine = config.rollout.engine
    token = cache_bytes_a_token(policy, engine)
    held = int(engine.kv_cache_gib * GIB) // token
    published = parameters_of(policy) * (4 if engine.dtype == "float32" else 2)
    by_broadcast = "memory of the policy's rank 0 and of each rollout worker, beside their devices'"
    where = by_broadcast if config.sync in ("gloo", "nccl") else "shared memory on a node of the policy and on each node of rollout workers"
    in_place = "In a publish the policy's device has the engine's weights and four buckets, beside its own (publish, under buffers)."
    parts = engine.tensor_parallel
    split = [f"(1/{parts}) is what each of the {parts} devices of a rollout worker has."] if parts > 1 else []
    again = " A worker with several devices has them once more in memory while they are read." if parts > 1 else ""
    return [
        "",
        *split,
        f"The cache has {token / 1024:g} KiB a token: room for {held:,} tokens, {held // engine.max_model_tokens:,} answers at once that "
        f"fill max_model_tokens ({engine.max_model_tokens:,}).",
        in_place if config.sync == "ipc" else f"A publish takes {published / GIB:.1f} GiB of {where}.{again}",
        "Activations include logits. Those of rollout engines, and their CUDA graphs (under buffers), are estimates.",
    ]


def _turns(workers: list[Worker]) -> list[str]:
    """Where devices are shared: whose turns there are, and what lies on the hosts meanwhile."""
    turns: dict[str, list[str]] = {}
    for worker in workers:
        if worker.turn:
            turns.setdefault(worker.turn, []).append(worker.name)
    if not turns:
        return []
    aside = sum(worker.count * worker.aside for worker in workers)
    told = "; ".join(" + ".join(names) for names in turns.values())
    return [f"They take turns: {told}. What rests takes up to {aside / GIB:.1f} GiB of the nodes' own memory, all devices together."]


def _devices(workers: list[Worker], room: int) -> str:
    """Which GPUs there are and how full each is, equal ones in one line."""
    lines: dict[str, int] = {}
    for sharing in devices_of(workers):
        joined = " + " if not sharing[0].turn else ", "
        line = f"{joined.join(worker.name for worker in sharing)}: {used(sharing) / GIB:.1f} of {room / GIB:.1f} GiB"
        lines[line] = lines.get(line, 0) + 1
    host = sum(worker.count * worker.parts * worker.bytes for worker in workers if not worker.gpus)
    told = [f"{number} GPU{'s' * (number > 1)} with {line}" for line, number in lines.items()]
    return "\n".join(told + [f"on the processors: {host / GIB:.1f} GiB of the nodes' memory"] * bool(host))


def _too_full(workers: list[Worker], config: PPORecipe, room: int, gpus: int, changed: Changed) -> list[str]:
    """What does not fit its GPU, with changes that would make it fit."""
    told = []
    for sharing in too_full(workers, room):
        needed = used(sharing)
        names = " + ".join(worker.name for worker in sharing)
        several = {worker.name: worker for worker in sharing}.values()
        found = [change for worker in several for change in what_would_fit(worker, sharing, config, room, gpus, changed)]
        ways = "; or ".join(f"{_sets(overrides)} ({size / GIB:.1f} GiB)" for overrides, size in found)
        if not ways and len(sharing) > 1:
            ways = _sets(what_would_fit_together(sharing, config, room, gpus, changed))
        told.append(f"DOES NOT FIT: {names} needs {needed / GIB:.1f} of {room / GIB:.1f} GiB: {ways or 'a larger GPU, or a smaller model'}")
    return told


def _sets(overrides: list[str]) -> str:
    return " ".join(f"--set {override}" for override in overrides)


def _too_many(workers: list[Worker], gpus: int, room: int, changed: Changed) -> list[str]:
    """What to change if there are fewer GPUs than the workers need."""
    needed = gpus_of(workers)
    if not gpus or needed <= gpus:
        return []
    saving = []
    for override in _FEWER_GPUS:
        try:
            fewer = changed([override])
        except RecipeError:
            continue
        if gpus_of(fewer) < needed:
            full = "" if not too_full(fewer, room) else ", which then is too full"
            saving.append(f"--set {override} ({gpus_of(fewer)} GPUs{full})")
    ways = "; or ".join([*saving, "fewer ranks or workers of the largest of them"])
    return [f"TOO FEW GPUS: {needed} are asked for, {gpus} are there: {ways}"]


def main(
    recipe: RecipeFile, overrides: Set = None, gpu_gib: GpuGib = 80, gpus: Gpus = 0, beside_gib: BesideGib = 1.5, sizes: Sizes = None
) -> None:
    """Print the memory that a PPO recipe needs by worker and phase, and what to change if it does not fit; exit code 1 then."""
    with mistakes_told():
        raise typer.Exit(plan(recipe, overrides or [], gpu_gib, gpus, beside_gib, sizes or []))


if __name__ == "__main__":
    typer.run(main)
