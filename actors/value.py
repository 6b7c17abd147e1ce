"""The value model of PPO: an engine of its own, with its own learning rate and ZeRO stage."""

from pathlib import Path

import numpy as np

from actors.group import GroupConfig, TrainerGroup
from actors.placement import ClusterConfig, Placement
from ctrlrl.data.batches import Loss, TokenBatch
from ctrlrl.models.trainer import TrainerConfig


class ValueConfig(GroupConfig):
    """`model` is a causal backbone; empty means the policy's model. The head starts at zero."""

    model: str = ""
    train: TrainerConfig = TrainerConfig()


class Value:
    """Typed handle of the value model's ranks."""

    def __init__(self, config: ValueConfig, placement: Placement, cluster: ClusterConfig, *, model: str, seed: int):
        self._group = TrainerGroup(
            "value",
            "value",
            model,
            config.train,
            config,
            placement,
            seed=seed,
            start_deadline_s=cluster.start_deadline_s,
            call_deadline_s=cluster.call_deadline_s,
        )
        self.wait_ready, self.pids, self.close = self._group.wait_ready, self._group.pids, self._group.close

    def train(self, batch: TokenBatch, loss: Loss, steps: list[np.ndarray]) -> list[dict[str, float]]:
        """One optimiser step for each row selection of `steps`; stats of each."""
        return self._group.train(batch, loss, steps)

    def values(self, batch: TokenBatch) -> list[np.ndarray]:
        """Value of the state before each scored token, one fp32 array a row."""
        return self._group.score(batch)

    def save(self, directory: Path) -> None:
        """Write a checkpoint of weights and optimiser."""
        self._group.save(directory)

    def load(self, directory: Path) -> None:
        """Continue from a checkpoint; RunError if it is missing or of another number of ranks."""
        self._group.load(directory)
