"""A reward model in training: ranks that fit a sequence classifier with one output."""

import numpy as np

from actors.group import GroupConfig, TrainerGroup
from actors.placement import ClusterConfig, Placement
from ctrlrl.data.batches import TokenBatch
from ctrlrl.models.trainer import ClassifierTrainerConfig


class RewardTrainerConfig(GroupConfig):
    """The backbone, an encoder or a causal model with or without a classifier's head, by local path or hub name."""

    model: str
    train: ClassifierTrainerConfig = ClassifierTrainerConfig()


class RewardTrainer:
    """Typed handle of the ranks; train, export, save, load and the rest are TrainerGroup's."""

    def __init__(self, config: RewardTrainerConfig, placement: Placement, cluster: ClusterConfig, *, seed: int):
        self._group = TrainerGroup("reward_model", "reward", config.model, config, placement, cluster, seed=seed)
        self.train, self.export, self.save, self.load = self._group.train, self._group.export, self._group.save, self._group.load
        self.wait_ready, self.pids, self.close = self._group.wait_ready, self._group.pids, self._group.close
        self.restart = self._group.restart

    def scores(self, batch: TokenBatch) -> np.ndarray:
        """The raw output for each sequence, fp32 [B]."""
        return np.concatenate(self._group.score(batch))
