"""A group of ranks in lockstep: one death is everyone's. The ranks of a trained model, and the calls that go to all of them."""

import os
from collections.abc import Callable
from pathlib import Path

import ray
from ray.actor import ActorHandle

from actors.placement import Placement, Resources
from actors.waiting import gather
from ctrlrl.config import Section
from ctrlrl.data.batches import Loss, TokenBatch
from ctrlrl.errors import CtrlrlError
from ctrlrl.models.scorer import in_order
from ctrlrl.models.trainer import CPU_ENVIRONMENT, Trainer, TrainerConfig, combine_shares, join_world


class GroupConfig(Section):
    """The ranks of one trained model."""

    ranks: int = 1
    resources: Resources = Resources()


@ray.remote(max_restarts=0)
class TrainerRank:
    """Shell around one rank's Trainer."""

    def meeting_point(self):
        return ray.util.get_node_ip_address(), _free_port()

    def build(self, rank, world, address, port, timeout_s, trainer_arguments):
        join_world(rank, world, address, port, timeout_s)
        self.trainer = Trainer(*trainer_arguments[0], **trainer_arguments[1])

    def do(self, call, *arguments):
        return call(self.trainer, *arguments)

    def pid(self):
        return os.getpid()


class TrainerGroup:
    """Handle of all ranks of one model; the typed handles Policy and Value own one."""

    def __init__(
        self,
        name: str,
        kind: str,
        model: str,
        trainer: TrainerConfig,
        group: GroupConfig,
        placement: Placement,
        *,
        start_deadline_s: float,
        call_deadline_s: float,
        temperature: float = 1.0,
        seed: int = 0,
    ):
        self.name, self._deadline_s = name, call_deadline_s
        options = group.resources.environment({} if group.resources.gpus else CPU_ENVIRONMENT)
        self._ranks: list[ActorHandle] = [
            TrainerRank.options(name=None, scheduling_strategy=placement.at(name, rank), **options).remote() for rank in range(group.ranks)
        ]
        arguments = ((kind, model, trainer), {"temperature": temperature, "seed": seed})
        address, port = gather([self._ranks[0].meeting_point.remote()], start_deadline_s, f"{name} rank 0 starting")[0]
        self._starting = [
            rank.build.remote(i, group.ranks, address, port, call_deadline_s, arguments) for i, rank in enumerate(self._ranks)
        ]
        self._start_deadline_s = start_deadline_s

    def wait_ready(self) -> None:
        """Return when every rank has built its engine."""
        self._wait(self._starting, self._start_deadline_s, "loading the model")

    def refs(self, call: Callable, *arguments) -> list[ray.ObjectRef]:
        """Start `call(trainer, *arguments)` on every rank; `call` is an unbound method of Trainer."""
        return [rank.do.remote(call, *arguments) for rank in self._ranks]

    def call(self, call: Callable, *arguments) -> list:
        """`call(trainer, *arguments)` on every rank; the results in rank order."""
        return self._wait(self.refs(call, *arguments), self._deadline_s, call.__name__)

    def train(self, batch: TokenBatch, loss: Loss, steps: list) -> list[dict[str, float]]:
        """One optimiser step for each row selection; the stats of the global batches."""
        shares = self.call(Trainer.train, ray.put(batch), loss, steps)
        return [combine_shares(list(ranks)) for ranks in zip(*shares, strict=True)]

    def score(self, batch: TokenBatch) -> list:
        """Logprobs or values of the scored tokens, one fp32 array a row, in the batch's order."""
        parts = self.call(Trainer.score, ray.put(batch))
        rows = [row for part, _ in parts for row in part]
        return in_order(rows, [values for _, results in parts for values in results])

    def export(self, directory: Path) -> None:
        """Write a transformers directory."""
        self.call(Trainer.export, directory)

    def save(self, directory: Path) -> None:
        """Write a checkpoint of weights and optimiser."""
        self.call(Trainer.save, directory)

    def load(self, directory: Path) -> None:
        """Continue from a checkpoint."""
        self.call(Trainer.load, directory)

    def pids(self) -> list[int]:
        """Process ids, in rank order."""
        return gather([rank.pid.remote() for rank in self._ranks], 60, f"{self.name} process ids")

    def close(self) -> None:
        """End all ranks."""
        for rank in self._ranks:
            ray.kill(rank)

    def _wait(self, refs: list[ray.ObjectRef], deadline_s: float, doing: str) -> list:
        try:
            return gather(refs, deadline_s, f"{self.name} ranks, {doing}")
        except CtrlrlError:
            self.close()  # a rank that lives waits in a collective for the one that failed
            raise


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
