"""The value model of PPO: an engine of its own, with its own learning rate and ZeRO stage. (Or a head of the policy: policy.py.)"""

import numpy as np

from actors.group import GroupConfig, TrainerGroup
from actors.placement import ClusterConfig, Placement
from actors.policy import Policy
from actors.turns import Turn, at_once
from ctrlrl.data.batches import TokenBatch


class ValueConfig(GroupConfig):
    """`model` is a causal backbone; empty means the policy's model. The head starts at zero.

    head: no model and no workers; the values are a second head of the policy, trained with it by the sum of both losses, at the policy's
    learning rate: one forward and backward for both, and no second copy of weights and optimiser. Then nothing else here counts.
    """

    model: str = ""
    head: bool = False


class ValueHead:
    """The second head of the policy, where a Value is expected: it needs no workers, and is trained and kept with the policy."""

    def __init__(self, policy: Policy):
        self.with_logprobs = policy.logprobs_and_values


class Value:
    """Typed handle of the value model's ranks; train, save, load and the rest are TrainerGroup's."""

    def __init__(
        self, config: ValueConfig, placement: Placement, cluster: ClusterConfig, *, model: str, seed: int, turn: Turn = at_once
    ):
        self._group = TrainerGroup("value", "value", model, config, placement, cluster, seed=seed, turn=turn)
        self.train, self.save, self.load = self._group.train, self._group.save, self._group.load
        self.wait_ready, self.pids, self.close = self._group.wait_ready, self._group.pids, self._group.close
        self.restart, self.rest = self._group.restart, self._group.rest

    def values(self, batch: TokenBatch) -> list[np.ndarray]:
        """Value of the state before each scored token, one fp32 array a row."""
        return self._group.score(batch)
