"""The policy: ranks that train it with DeepSpeed and publish its weights."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import ray

from actors.group import GroupConfig, TrainerGroup
from actors.placement import ClusterConfig, Placement
from actors.turns import Turn, at_once
from ctrlrl.attributes import PAPER, Attributes
from ctrlrl.data.batches import TokenBatch
from ctrlrl.models.broadcast import Meeting, again, kept
from ctrlrl.models.handover import Bucket, device_of, gave, give
from ctrlrl.models.loading import save_control_tokenizer
from ctrlrl.models.probe import Probe, probe_batch
from ctrlrl.models.trainer import Trainer


class PolicyConfig(GroupConfig):
    """The model to train, by local path or hub name, and how."""

    model: str


class Policy:
    """Typed handle of the policy's ranks; train, export, save, load and the rest are TrainerGroup's. value_head: it has one."""

    def __init__(
        self,
        config: PolicyConfig,
        placement: Placement,
        cluster: ClusterConfig,
        *,
        temperature: float,
        seed: int,
        value_head: bool = False,
        turn: Turn = at_once,
    ):
        kind = "policy_value" if value_head else "policy"
        self._group = TrainerGroup("policy", kind, config.model, config, placement, cluster, temperature=temperature, seed=seed, turn=turn)
        self.train, self.export, self.save, self.load = self._group.train, self._group.export, self._group.save, self._group.load
        self.wait_ready, self.pids, self.close = self._group.wait_ready, self._group.pids, self._group.close
        self.restart, self.dtype, self.model = self._group.restart, config.train.dtype, config.model
        self.rest, self.turn = self._group.rest, turn

    def export_controllable(self, tokenizer, directory: Path, attributes: Attributes = PAPER) -> None:
        """Write an ordinary transformers directory whose chat template takes the control and makes control-like text of users inert."""
        self.export(directory)
        save_control_tokenizer(tokenizer, directory, attributes)

    def logprobs(self, batch: TokenBatch) -> list[np.ndarray]:
        """Logprobs of the scored tokens under the current weights, one fp32 array a row."""
        return self._group.score(batch)

    def logprobs_and_values(self, batch: TokenBatch) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """`logprobs`, and what the value head says of the state before each of these tokens, in one forward."""
        both = self._group.score(batch, Trainer.score_both)
        return [row[:, 0] for row in both], [row[:, 1] for row in both]

    def base_logprobs(self, batch: TokenBatch) -> list[np.ndarray]:
        """`logprobs` of the model that training with adapters began with."""
        return self._group.score(batch, Trainer.base)

    def probe(self, probe: Probe) -> list[np.ndarray]:
        """Logprobs, at temperature 1, of the probe's tokens under the current weights."""
        return self._group.score(probe_batch(probe), Trainer.probe)

    @property
    def starts(self) -> int:
        """How often its ranks were started."""
        return self._group.starts

    def weights(self, dtype: str, version: int) -> ray.ObjectRef:
        """A reference to one WeightMessage with all current weights."""
        with self._group.turn():  # begun in it: a rank that is told to rest does so afterwards
            return self._group.refs(Trainer.weights, dtype, version)[0]

    def broadcast(self, dtype: str, version: int, meeting: Meeting) -> str:
        """Send all current weights to the members of a group, and keep them; empty, or why not all got them."""
        return self._group.call(Trainer.broadcast, dtype, version, meeting)[0]

    def give(self, dtype: str, version: int, size: int, *, begin: bool) -> list[Bucket]:
        """The next bucket of all current weights from each rank, or the first one, to those on its device."""
        return self._group.call(give, dtype, version, size, begin)

    def gave(self) -> None:
        """All have taken what they were given."""
        self._group.call(gave)

    def devices(self) -> list[str]:
        """The names of the ranks' devices."""
        return self._group.call(device_of)

    def broadcast_again(self, meeting: Meeting) -> str:
        """Send what was sent last to another group; empty, or why not all got it."""
        return self._group.call(again, meeting)[0]

    def kept(self, version: int) -> Callable[[], ray.ObjectRef]:
        """What gives a reference to the WeightMessage that was broadcast, as long as these ranks live and there is no later one."""
        return self._group.later(kept, version)
