"""The frozen reference model of PPO's KL penalty."""

import numpy as np
import ray
from pydantic import Field
from ray.actor import ActorHandle

from actors.placement import MODELS, UNCOMPILED, ClusterConfig, Placement, Resources
from actors.policy import Policy
from actors.pool import Pool
from actors.scaling import fixed
from actors.turns import Turn, at_once, have_rest
from ctrlrl.data.batches import TokenBatch
from ctrlrl.models.rest import Rest
from ctrlrl.models.scorer import ReferenceConfig as ReferenceModelConfig
from ctrlrl.models.scorer import ReferenceModel


class ReferenceConfig(ReferenceModelConfig):
    """The reference model and how many workers serve it. adapter: no workers; it is the policy with its LoRA adapter switched off."""

    adapter: bool = False
    workers: int = Field(1, gt=0)
    resources: Resources = Resources()


@ray.remote(max_restarts=0)
class ReferenceWorker:
    """Shell around one ReferenceModel."""

    def build(self, model, config, temperature):
        self.reference, self.aside = ReferenceModel(model, config, temperature), Rest()

    def logprobs(self, batch):
        self.aside.end()
        return self.reference.logprobs(batch)

    def rest(self):
        return self.aside.begin()


class Reference:
    """Typed handle of the reference workers. turn: in which they are called."""

    def __init__(
        self,
        config: ReferenceConfig,
        placement: Placement,
        cluster: ClusterConfig,
        *,
        model: str,
        temperature: float,
        turn: Turn = at_once,
    ):
        self._workers, self.turn, self._patience_s = config.workers, turn, cluster.call_deadline_s
        options = config.resources.environment({} if config.resources.gpus else UNCOMPILED, ("ctrlrl.models.scorer",), MODELS)

        def create(index: int) -> ActorHandle:
            place = placement.at("reference", index)
            return ReferenceWorker.options(scheduling_strategy=place, **options).remote()

        def build(worker: ActorHandle) -> ray.ObjectRef:
            return worker.build.remote(model, config, temperature)

        self.pool = Pool("reference", create, build, fixed(config.workers), cluster)
        self.wait_ready, self.pids, self.close = self.pool.wait_ready, self.pool.pids, self.pool.close

    def logprobs(self, batch: TokenBatch) -> list[np.ndarray]:
        """Logprobs of the scored tokens, one fp32 array a row, in the batch's order."""
        size = max(1, -(-len(batch) // self._workers))
        parts = [batch.select(np.arange(i, min(i + size, len(batch)))) for i in range(0, len(batch), size)]
        name = f"reference logprobs of {size} rows"
        with self.turn():
            futures = [self.pool.submit(lambda worker, part=part: worker.logprobs.remote(part), name) for part in parts]
            return [row for future in futures for row in future.result()]

    def rest(self) -> int:
        """Have the workers set aside on their hosts what they have on their devices, until they are asked; bytes that moved."""
        return have_rest(self.pool.name, self.pool.at_work(), self._patience_s)


class AdapterReference:
    """The policy with its adapter switched off, where a Reference is expected: it needs no worker and no second copy of the weights."""

    def __init__(self, policy: Policy):
        self.logprobs = policy.base_logprobs
