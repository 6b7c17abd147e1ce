"""A group of ranks in lockstep: one death is everyone's. The ranks of a trained model, and the calls that go to all of them."""

import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
import ray
from pydantic import Field
from ray.actor import ActorHandle
from ray.exceptions import RayTaskError

from actors.ending import end_all
from actors.faults import Failure
from actors.placement import ClusterConfig, Placement, Resources
from actors.turns import Turn, at_once
from actors.waiting import classify, explained, first_lost, gather
from actors.watch import Lifeline, locate
from ctrlrl.config import Section
from ctrlrl.data.batches import Loss, TokenBatch
from ctrlrl.errors import DeadlineExceeded, GroupLost, WorkerLost
from ctrlrl.models.rest import Rest
from ctrlrl.models.scorer import in_order
from ctrlrl.models.trainer import CPU_ENVIRONMENT, Kind, Trainer, TrainerConfig, combine_shares, join_world

# Keys of a GroupConfig that may change at resume: a step's result does not depend on them.
CHANGEABLE = ("ranks", "resources", "train.zero_stage")

_IMPORTS = ("ctrlrl.models.trainer", "deepspeed")  # of a rank's process
_COMPLAINT_S = 5.0
_PORT_TAKEN = "EADDRINUSE"  # in the text of torch's error


class GroupConfig(Section):
    """The ranks of one trained model, and how it is trained."""

    ranks: int = Field(1, gt=0)
    resources: Resources = Resources()
    train: TrainerConfig = TrainerConfig()

    @property
    def bundles(self) -> list[dict[str, float]]:
        """The Ray resource demand of every rank."""
        return [self.resources.bundle] * self.ranks

    def scheduled(self, steps: int, warmup: int = 0) -> Self:
        """The same with the run's optimiser steps and warm-up in the schedule, where the recipe leaves them open."""
        train = self.train
        filled = {"total_steps": train.total_steps or steps, "warmup_steps": train.warmup_steps or warmup}
        return self.model_copy(update={"train": train.model_copy(update=filled)})


@ray.remote(max_restarts=0)
class TrainerRank:
    """Shell around one rank's Trainer."""

    def meeting_point(self):
        return ray.util.get_node_ip_address(), _free_port()

    def build(self, rank, world, address, port, timeout_s, trainer_arguments):
        join_world(rank, world, address, port, timeout_s)
        self.trainer, self.aside = Trainer(*trainer_arguments), Rest()

    def do(self, call, *arguments):
        self.aside.end()
        return call(self.trainer, *arguments)

    def rest(self):
        return self.aside.begin()


@dataclass(frozen=True)
class Ranks:
    """The actors of one start, in rank order, and what is known of them. A call that fails late ends its own, not those that came after."""

    actors: list[ActorHandle]
    lives: list[Lifeline]

    def end(self) -> None:
        """End all; once more does no harm."""
        end_all(*(partial(ray.kill, actor) for actor in self.actors))


class TrainerGroup:
    """Handle of all ranks of one model. The typed handles (Policy, Value, RewardTrainer) own one and bind what they share.

    name: of the places reserved for it, and in messages. model: local path or hub name. temperature: divides a policy's logits. turn: in
    which its ranks are started and called.
    """

    def __init__(
        self,
        name: str,
        kind: Kind,
        model: str,
        config: GroupConfig,
        placement: Placement,
        cluster: ClusterConfig,
        *,
        seed: int,
        temperature: float = 1.0,
        turn: Turn = at_once,
    ):
        self.name, self._cluster, self._config, self._placement, self.turn = name, cluster, config, placement, turn
        self._arguments = (kind, model, config.train, temperature, seed)
        self.starts = 0
        self._order = threading.Lock()  # of calls from several threads: collectives need the same one on every rank
        with turn():
            self._start()

    def _start(self) -> None:
        """Fresh ranks in the reserved places, and the wish that they build their engines; wait_ready says if they are lost on the way."""
        config, self.starts = self._config, self.starts + 1
        options = config.resources.environment({} if config.resources.gpus else CPU_ENVIRONMENT, _IMPORTS)
        actors = [
            TrainerRank.options(scheduling_strategy=self._placement.at(self.name, rank), **options).remote() for rank in range(config.ranks)
        ]
        self._ranks = Ranks(actors, [Lifeline(f"{self.name} rank {rank}") for rank in range(config.ranks)])
        try:
            self._starting, self._lost = self._meet(), None
        except GroupLost as error:
            self._starting, self._lost = [], error

    def _meet(self) -> list[ray.ObjectRef]:
        """Once all ranks have a place, have them meet and build their engines; the calls that do so."""
        ranks, cluster = self._ranks, self._cluster
        # A place may first have to come back, on a node that replaces a lost one; then a process with its imports.
        placing_s = cluster.placement_deadline_s + cluster.start_deadline_s
        places = self._wait(ranks, [locate(actor) for actor in ranks.actors], placing_s, "getting a place")
        for life, where in zip(ranks.lives, places, strict=True):
            life.where = where
        address, port = self._wait(ranks, [ranks.actors[0].meeting_point.remote()], cluster.start_deadline_s, "naming a meeting point")[0]
        patience_s = 2 * cluster.call_deadline_s  # of ranks with each other: it is the driver that says which of them is late
        size = len(ranks.actors)
        return [actor.build.remote(i, size, address, port, patience_s, self._arguments) for i, actor in enumerate(ranks.actors)]

    def restart(self) -> None:
        """End all ranks and start fresh ones, with the model directory's weights; follow it with wait_ready and load."""
        with self.turn():
            self.close()
            self._start()

    def wait_ready(self) -> None:
        """Return when every rank has built its engine; GroupLost if one died before, or another process took the port they were to meet
        at."""
        if self._lost:
            raise self._lost
        with self.turn():
            self._wait(self._ranks, self._starting, self._cluster.start_deadline_s, "loading the model")

    def rest(self) -> int:
        """Have the ranks set aside on their hosts what they have on their devices, until they are called; bytes that moved."""
        ranks = self._ranks
        with self._order:
            resting = [actor.rest.remote() for actor in ranks.actors]
        return sum(self._wait(ranks, resting, self._cluster.call_deadline_s, "setting their memory aside"))

    def refs(self, call: Callable, *arguments) -> list[ray.ObjectRef]:
        """Start `call(trainer, *arguments)` on every rank; `call` is an unbound method of Trainer."""
        with self._order:
            return [actor.do.remote(call, *arguments) for actor in self._ranks.actors]

    def later(self, call: Callable, *arguments) -> Callable[[], ray.ObjectRef]:
        """What starts `call(trainer, *arguments)` on rank 0 of this start, of no other."""
        first = self._ranks.actors[0]
        return lambda: first.do.remote(call, *arguments)

    def call(self, call: Callable, *arguments) -> list:
        """`call(trainer, *arguments)` on every rank; the results in rank order."""
        with self.turn():
            ranks = self._ranks
            return self._wait(ranks, self.refs(call, *arguments), self._cluster.call_deadline_s, call.__name__)

    def train(self, batch: TokenBatch, loss: Loss, steps: list[np.ndarray]) -> list[dict[str, float]]:
        """One optimiser step for each row selection of `steps`; the stats of each global batch."""
        shares = self.call(Trainer.train, ray.put(batch), loss, steps)
        return [combine_shares(list(ranks)) for ranks in zip(*shares, strict=True)]

    def score(self, batch: TokenBatch, call: Callable = Trainer.score) -> list[np.ndarray]:
        """The model's outputs on the scored tokens, one fp32 array a row, in the batch's order."""
        parts = self.call(call, ray.put(batch))
        rows = [row for part, _ in parts for row in part]
        return in_order(rows, [values for _, results in parts for values in results])

    def export(self, directory: Path) -> None:
        """Write an ordinary transformers model directory (without tokenizer)."""
        self.call(Trainer.export, directory)

    def save(self, directory: Path) -> None:
        """Write a checkpoint of weights and optimiser."""
        self.call(Trainer.save, directory)

    def load(self, directory: Path) -> None:
        """Continue from a checkpoint, by any number of ranks; RunError if it is missing, damaged or of another training."""
        self.call(Trainer.load, directory)

    def pids(self) -> list[int]:
        """Process ids, in rank order."""
        return [life.where.pid for life in self._ranks.lives]

    def close(self) -> None:
        """End all ranks."""
        self._ranks.end()

    def _wait(self, ranks: Ranks, refs: list[ray.ObjectRef], deadline_s: float, doing: str) -> list:
        """The results of `ranks`. Whatever fails, all of them are ended: one that lives waits in a collective for the one that failed."""
        try:
            return gather(refs, deadline_s, f"{self.name} ranks, {doing}", ranks.lives)
        except (WorkerLost, DeadlineExceeded) as error:
            sure = classify(error) is Failure.OUT_OF_MEMORY
            reason = ranks.lives[0].shortage(sure) if sure else ""
            ranks.end()
            raise explained(GroupLost(str(error)), reason) from error
        except Exception as error:
            lost = first_lost(refs, _COMPLAINT_S)  # a rank complains of a dead peer before Ray knows of the death
            ranks.end()
            if lost:
                raise GroupLost(f"{self.name} ranks, {doing}: {ranks.lives[lost[0]]}: {lost[1]}") from lost[1]
            if isinstance(error, RayTaskError) and _PORT_TAKEN in str(error):
                raise GroupLost(f"{self.name} ranks, {doing}: another process took the port that they were to meet at") from None
            raise


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
