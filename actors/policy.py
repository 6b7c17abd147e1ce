"""The policy: ranks that train it with DeepSpeed and publish its weights."""

from pathlib import Path

import numpy as np
import ray

from actors.group import GroupConfig, TrainerGroup
from actors.placement import ClusterConfig, Placement
from ctrlrl.data.batches import Loss, TokenBatch
from ctrlrl.models.trainer import Trainer, TrainerConfig


class PolicyConfig(GroupConfig):
    """The model to train, by local path or hub name, and how."""

    model: str
    train: TrainerConfig = TrainerConfig()


class Policy:
    """Typed handle of the policy's ranks."""

    def __init__(self, config: PolicyConfig, placement: Placement, cluster: ClusterConfig, *, temperature: float, seed: int):
        self._group = TrainerGroup(
            "policy",
            "policy",
            config.model,
            config.train,
            config,
            placement,
            temperature=temperature,
            seed=seed,
            start_deadline_s=cluster.start_deadline_s,
            call_deadline_s=cluster.call_deadline_s,
        )
        self.wait_ready, self.pids, self.close = self._group.wait_ready, self._group.pids, self._group.close

    def train(self, batch: TokenBatch, loss: Loss, steps: list[np.ndarray]) -> list[dict[str, float]]:
        """One optimiser step for each row selection of `steps`; stats of each."""
        return self._group.train(batch, loss, steps)

    def logprobs(self, batch: TokenBatch) -> list[np.ndarray]:
        """Logprobs of the scored tokens under the current weights, one fp32 array a row."""
        return self._group.score(batch)

    def weights(self, dtype: str, version: int) -> ray.ObjectRef:
        """A reference to one WeightMessage with all current weights."""
        return self._group.refs(Trainer.weights, dtype, version)[0]

    def export(self, directory: Path) -> None:
        """Write an ordinary transformers model directory (without tokenizer)."""
        self._group.export(directory)

    def save(self, directory: Path) -> None:
        """Write a checkpoint of weights and optimiser."""
        self._group.save(directory)

    def load(self, directory: Path) -> None:
        """Continue from a checkpoint; RunError if it is missing or of another number of ranks."""
        self._group.load(directory)
