"""What the workers of a PPO recipe need on their devices, who shares one, and which settings would make them fit: no worker is started."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from transformers import PretrainedConfig

from actors.group import GroupConfig
from ctrlrl.errors import RecipeError
from ctrlrl.models.architectures import check_even
from ctrlrl.models.footprint import Phases, frozen, peak, rollout, trained, with_handover
from ctrlrl.models.scorer_names import weights_of
from jobs.parts.cast import PPORecipe
from jobs.parts.sharing import kinds_of, turn_of

GIB = 2**30
_RANKS = (2, 4, 8, 16, 32, 64)
_PARTS = (2, 4, 8)  # of a rollout engine
_LORA_RANK = 16

Changed = Callable[[list[str]], "list[Worker]"]  # the workers of the recipe under overrides


@dataclass(frozen=True)
class Worker:
    """Workers of one kind: their name in the recipe, how many are reserved and how many more may come, GPUs of each, and memory.

    turn: in which they are at work, where devices are shared; they rest in all others. parts: in how many a worker is split; the memory is
    that of one, on a device of its own.
    """

    name: str
    count: int
    spare: int
    gpus: float
    phases: Phases
    turn: str = ""
    parts: int = 1

    @property
    def bytes(self) -> int:
        """The most that one of them has at once."""
        return peak(self.phases)

    @property
    def kept(self) -> int:
        """What stays on the device while it rests: CUDA itself, and an engine's graphs (under buffers)."""
        own = next(iter(self.phases.values()))
        return own.get("CUDA", 0) + (own.get("buffers", 0) if "generate" in self.phases else 0)

    @property
    def aside(self) -> int:
        """What lies on its host while it rests: all that is there between two phases, but for an engine's cache, which is forgotten."""
        own = next(iter(self.phases.values()))
        return sum(own.get(part, 0) for part in ("weights", "gradients", "optimiser")) if self.turn else 0

    def beside(self, size: int) -> "Worker":
        """The same with `size` bytes more in every phase."""
        return replace(self, phases={phase: {**parts, "CUDA": size} for phase, parts in self.phases.items()})


def workers_of(config: PPORecipe, shapes: Mapping[str, PretrainedConfig], beside: int) -> list[Worker]:
    """All workers of a run. shapes: of each model in `config.models`, by recipe key. beside: bytes that each takes of a GPU for itself."""
    policy = shapes["policy.model"]
    found = [_group("policy", config.policy, "policy_value" if config.has_value and config.value.head else "policy", policy)]
    if config.sync == "ipc":
        found[0] = replace(found[0], phases=with_handover(found[0].phases, policy, config.rollout.engine))
    if config.has_value_model:
        found.append(_group("value", config.value, "value", shapes["value.model"]))
    engine, resources = config.rollout.engine, config.rollout.resources
    check_even(config.policy.model, policy, engine.tensor_parallel, "rollout.engine.tensor_parallel")
    count, spare = config.rollout.workers.min, len(config.rollout.spare)
    found.append(Worker("rollout", count, spare, resources.gpus, rollout(policy, engine), parts=engine.tensor_parallel))
    for attribute, reward in config.reward.items():
        phases: Phases = {"score": {}}  # of a function or a service
        if reward.engine:
            phases = rollout(shapes[f"reward.{attribute}.model"], reward.engine)
        elif weights_of(reward.model):
            phases = frozen(shapes[f"reward.{attribute}.model"], "reward", reward.dtype, reward.batch_tokens)
        found.append(Worker(f"reward.{attribute}", reward.workers, 0, reward.resources.gpus, phases))
    if not config.reference.adapter:
        part = config.reference
        phases = frozen(shapes["reference.model"], "reference", part.dtype, part.batch_tokens)
        found.append(Worker("reference", part.workers, 0, part.resources.gpus, phases))
    found = [worker.beside(beside) if worker.gpus else worker for worker in found]
    if config.placement == "separate":
        return found
    kinds = kinds_of(config)
    return [replace(worker, turn=turn_of(worker.name, kinds)) if worker.gpus else worker for worker in found]


def _group(name: str, config: GroupConfig, kind: str, shape: PretrainedConfig) -> Worker:
    return Worker(name, config.ranks, 0, config.resources.gpus, trained(shape, kind, config.train, config.ranks))


def devices_of(workers: list[Worker]) -> list[list[Worker]]:
    """Who is on which GPU: a worker with a whole one or more uses one alone, parts of one are filled up in order, as Ray does; where
    devices are shared, one of each kind is on each. Workers without a GPU are on none."""
    shared = [worker for worker in workers if worker.turn]
    if shared:
        return [[worker for worker in shared if place < worker.count] for place in range(max(worker.count for worker in shared))]
    devices: list[tuple[float, list[Worker]]] = []
    for worker in workers:
        for _ in range(worker.count * worker.parts if worker.gpus else 0):
            place = next((i for i, (free, _) in enumerate(devices) if worker.gpus < 1 and free >= worker.gpus), None)
            if place is None:
                devices.append((1 - worker.gpus if worker.gpus < 1 else 0, [worker]))
            else:
                free, sharing = devices[place]
                devices[place] = free - worker.gpus, [*sharing, worker]
    return [sharing for _, sharing in devices]


def used(sharing: list[Worker]) -> int:
    """Bytes that the workers of one device have on it at the most: all of them their peaks, or those of one turn, while the others rest."""
    turns: dict[str, int] = {}
    for worker in sharing:
        turns[worker.turn] = turns.get(worker.turn, 0) + worker.bytes - worker.kept
    return sum(worker.kept for worker in sharing) + max(turns.values(), default=0)


def gpus_of(workers: list[Worker]) -> int:
    """GPUs that are taken from Ray: more than devices in use where one worker asks for several."""
    several = sum((math.ceil(worker.gpus) - worker.parts) * worker.count for worker in workers if worker.gpus > 1)
    return len(devices_of(workers)) + several


def too_full(workers: list[Worker], room: int) -> list[list[Worker]]:
    """The devices on which the workers need more than `room` bytes, those with the same workers once."""
    full = [sharing for sharing in devices_of(workers) if used(sharing) > room]
    return list({tuple(worker.name for worker in sharing): sharing for sharing in full}.values())


def remedies(worker: Worker, config: PPORecipe) -> Iterator[list[str]]:
    """Changes, as overrides, that lower what this kind of worker needs or take it off a shared GPU: the cheapest first, each alone, then
    several together."""
    name = worker.name
    yield from _of_its_settings(worker, config)
    if 0 < worker.gpus < 1:
        yield [f"{name}.resources.gpus=1"]


def _of_its_settings(worker: Worker, config: PPORecipe) -> Iterator[list[str]]:
    name = worker.name
    if name in ("policy", "value"):
        yield from _of_a_trainer(name, getattr(config, name), config.rollout.engine.max_model_tokens)
        return
    if name == "rollout":
        if config.rollout.engine.dtype == "float32":
            yield ["rollout.engine.dtype=bfloat16"]
        caches = (gib for gib in (64, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1, 0.5) if gib < config.rollout.engine.kv_cache_gib)
        yield from ([f"rollout.engine.kv_cache_gib={gib:g}"] for gib in caches)
        more = (parts for parts in _PARTS if config.rollout.engine.tensor_parallel < parts and worker.gpus)
        yield from ([f"rollout.engine.tensor_parallel={parts}", f"rollout.resources.gpus={parts}"] for parts in more)
        return
    frozen_model = config.reference if name == "reference" else config.reward[name.removeprefix("reward.")]
    smaller = [[f"{name}.dtype=bfloat16"]] if frozen_model.dtype == "float32" else []
    yield from smaller
    fewer = [[f"{name}.batch_tokens={tokens}"] for tokens in (8192, 4096, 2048) if tokens < frozen_model.batch_tokens]
    yield from fewer
    yield from ([*a, *b] for a in smaller for b in fewer)
    if name == "reference" and config.policy.train.lora.rank:
        yield ["reference=adapter"]


def _of_a_trainer(name: str, group: GroupConfig, longest: int) -> Iterator[list[str]]:
    """Of the ranks of a trained model. longest: tokens of a sequence, below which a micro-batch does not go."""
    train = group.train
    halves = (train.micro_batch_tokens // 2**n for n in range(1, 8))
    saved = [] if train.gradient_checkpointing else [f"{name}.train.gradient_checkpointing=true"]
    fewer = [[f"{name}.train.micro_batch_tokens={tokens}"] for tokens in halves if tokens >= min(longest, 2048)]
    parted = [] if train.zero_stage == 3 else [f"{name}.train.zero_stage=3"]
    more = [[*parted, f"{name}.ranks={ranks}"] for ranks in _RANKS if ranks > group.ranks]
    adapters = [] if train.lora.rank else [f"{name}.train.lora.rank={_LORA_RANK}"]
    half = [] if train.dtype == "bfloat16" else [f"{name}.train.dtype=bfloat16"]
    for single in (half, saved):
        if single:
            yield single
    yield from fewer
    yield from more
    yield from ([*saved, *change] for change in (*fewer, *more) if saved)
    if adapters:
        yield [*half, *saved, *adapters]
        yield from ([*half, *saved, *adapters, *change] for change in (*fewer, *more))


def what_would_fit(
    worker: Worker, sharing: list[Worker], config: PPORecipe, room: int, gpus: int, changed: Changed, most: int = 3
) -> list[tuple[list[str], int]]:
    """Up to `most` changes to one kind of worker, of different keys, after which all that are `sharing` a device with it fit theirs, and
    what this worker needs then. gpus: that there are (0: any number)."""
    found: dict[tuple[str, ...], tuple[list[str], int]] = {}
    for overrides, workers in _possible(worker, config, gpus, changed):
        keys = tuple(override.partition("=")[0] for override in overrides)
        if not any(set(known) <= set(keys) for known in found) and _all_fit(sharing, workers, room):
            found[keys] = overrides, _bytes_of(worker.name, workers)
        if len(found) == most:
            break
    return list(found.values())


def what_would_fit_together(sharing: list[Worker], config: PPORecipe, room: int, gpus: int, changed: Changed) -> list[str]:
    """Changes to several of the workers that share a device, of each the one that saves most, until they fit; empty if they never do."""
    together = []
    for worker in sorted(sharing, key=lambda worker: -worker.bytes):
        least = min(_possible(worker, config, gpus, changed), key=lambda way: _bytes_of(worker.name, way[1]), default=None)
        together += least[0] if least else []
        if _all_fit(sharing, changed(together), room):
            return together
    return []


def _possible(worker: Worker, config: PPORecipe, gpus: int, changed: Changed) -> Iterator[tuple[list[str], list[Worker]]]:
    """The remedies of a worker that contradict no other setting and need no more than `gpus`, with the workers as they are then."""
    for overrides in remedies(worker, config):
        try:
            workers = changed(overrides)
        except RecipeError:
            continue
        if not gpus or gpus_of(workers) <= gpus:
            yield overrides, workers


def _all_fit(sharing: list[Worker], workers: list[Worker], room: int) -> bool:
    names = {worker.name for worker in sharing}
    return not any(worker.name in names for full in too_full(workers, room) for worker in full)


def _bytes_of(name: str, workers: list[Worker]) -> int:
    return next((worker.bytes for worker in workers if worker.name == name), 0)
