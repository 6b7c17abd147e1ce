"""A PPO run whose kinds of workers take turns on the same devices: who has which, whose turn it is, and what does not go with it.

There are as many devices as the kind with the most workers has. Each holds one worker of every kind that has so many; while it is another
kind's turn, a worker's memory is on its host. A run without GPUs takes turns on its processors, which saves nothing, and shows how.
"""

from dataclasses import replace

from actors.placement import ClusterConfig, Demands, Placement, Resources
from actors.recovery import ready
from actors.turns import Turn, Turns, at_once
from ctrlrl.config import AnySection

# Kinds of workers by their recipe key: how many are reserved of each, and what one of them asks for.
Kinds = dict[str, tuple[int, Resources]]

DEVICES = "devices"  # the places of those that share
_TURNS = {"policy": "train", "value": "train", "rollout": "draw"}
_REWARD = "reward."
_JUDGE = "judge"  # that of reward models and reference
_PARTS = 10_000  # of a GPU, which Ray counts


def kinds_of(config: AnySection) -> Kinds:
    """Those of a PPO recipe; 0 of those that it does without."""
    return {
        "policy": (config.policy.ranks, config.policy.resources),
        "value": (config.value.ranks if config.has_value_model else 0, config.value.resources),
        "rollout": (config.rollout.workers.min, config.rollout.resources),
        **{f"{_REWARD}{a}": (reward.workers, reward.resources) for a, reward in config.reward.items()},
        "reference": (0 if config.reference.adapter else config.reference.workers, config.reference.resources),
    }


def turn_of(name: str, kinds: Kinds) -> str:
    """The turn of a kind of workers; empty for one that needs none: it has no GPU where others have."""
    return "" if _on_gpus(kinds) and name not in _on_gpus(kinds) else _TURNS.get(name, _JUDGE)


def demands_of(kinds: Kinds, shared: bool) -> Demands:
    """The places of all workers: one for each worker, or for each device that is shared."""
    sharing = _on_gpus(kinds) if shared else {}
    apart = {name: [resources.bundle] * count for name, (count, resources) in kinds.items() if name not in sharing}
    devices = []
    for place in range(max((count for count, _ in sharing.values()), default=0)):
        here = [resources for count, resources in sharing.values() if place < count]
        custom: dict[str, float] = {}
        for resources in here:
            custom |= {key: custom.get(key, 0) + amount for key, amount in resources.custom.items()}
        devices.append({"CPU": sum(resources.cpus for resources in here), "GPU": 1, **custom})
    return {DEVICES: devices, **apart} if devices else apart


def placed(place: Placement, kinds: Kinds) -> Placement:
    """The reserved places, with those of the devices under the name of each kind that shares them."""
    counts = {name: count for name, (count, _) in _on_gpus(kinds).items()}
    if not counts:
        return place
    return replace(place, offsets=place.offsets | dict.fromkeys(counts, place.offsets[DEVICES]), counts=place.counts | counts)


def with_shares(config: AnySection, kinds: Kinds) -> AnySection:
    """A recipe in which each worker asks for its share of a device in place of the whole."""
    names = _on_gpus(kinds)
    share = (_PARTS // max(1, len(names))) / _PARTS

    def shared(section: AnySection) -> AnySection:
        return section.model_copy(update={"resources": section.resources.model_copy(update={"gpus": share})})

    own = {name: shared(getattr(config, name)) for name in names if not name.startswith(_REWARD)}
    rewards = {a: shared(reward) if f"{_REWARD}{a}" in names else reward for a, reward in config.reward.items()}
    return config.model_copy(update={**own, "reward": rewards})


class Sharing:
    """The turns of a run. shared: else everybody is at work at once."""

    def __init__(self, kinds: Kinds, shared: bool):
        self._kinds, self._turns = kinds, Turns() if shared else None

    def turn(self, name: str) -> Turn:
        """What the handle of this kind of workers enters for its calls."""
        turn = turn_of(name, self._kinds) if self._turns else ""
        return self._turns.of(turn) if turn else at_once

    def started(self, name: str, handle, cluster: ClusterConfig) -> None:
        """`handle` has been made, in its turn: from now on it rests when it is that of others. One that shares is waited for, so that no
        two kinds load their models at a time."""
        if self.turn(name) is not at_once:
            ready([handle], cluster)
            self._turns.joined(turn_of(name, self._kinds), handle.rest)


def why_not_shared(config: AnySection) -> str:
    """What in a PPO recipe does not go with turns, and what to change; empty if nothing."""
    kinds, sync, rollout = kinds_of(config), config.sync, config.rollout
    beside = rollout.workers.min <= config.policy.ranks and bool(rollout.resources.gpus) == bool(config.policy.resources.gpus)
    growing, looks = rollout.workers.max > rollout.workers.min, config.evaluation.every > 0
    judges = [attribute for attribute, reward in config.reward.items() if reward.engine]
    parts = [f"{name}.resources.gpus = {resources.gpus:g}" for name, (_, resources) in _on_gpus(kinds).items() if resources.gpus != 1]
    faults = {
        f"rollout.engine.tensor_parallel = {rollout.engine.tensor_parallel}: an engine shares one device: set it to 1, or give the engine "
        'devices of its own (placement = "separate")': rollout.engine.tensor_parallel > 1,
        f"{', '.join(parts)}: where a device is shared, give 1 to each kind that shares it, and Ray will count the parts": bool(parts),
        f'sync = "{sync}" has trainers and rollout workers at work at once: set sync = "auto", or "ipc"': sync in ("gloo", "nccl"),
        f'sync = "ipc" is from a rank of the policy to the rollout worker on its device, and of {rollout.workers.min} workers not each has '
        f'one (policy.ranks = {config.policy.ranks}): set sync = "auto"': sync == "ipc" and not beside,
        "rollout workers that come and go have no device to share: give rollout.workers one number": growing,
        "looks in between (evaluation.every) draw and judge at once: set evaluation.every = 0, and evaluate the model afterwards": looks,
        f"reward.{next(iter(judges), '')}.judge is an engine, which does not rest here: give a reward model or a judge.url": bool(judges),
    }
    return next((fault for fault, there in faults.items() if there), "")


def _on_gpus(kinds: Kinds) -> Kinds:
    return {name: (count, resources) for name, (count, resources) in kinds.items() if count and resources.gpus}
