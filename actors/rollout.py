"""Rollout workers: a pool of vLLM engines that draw responses with the policy's current weights."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, as_completed

import numpy as np
import ray
from pydantic import Field
from ray.actor import ActorHandle

from actors.member import Entry
from actors.placement import MODELS, ClusterConfig, Placement, Resources
from actors.pool import Pool
from actors.scaling import Workers, fixed
from ctrlrl.config import Section
from ctrlrl.errors import VersionMismatch
from ctrlrl.models.probe import Expectation
from ctrlrl.models.proof import proof_of
from ctrlrl.models.sampler import IMPORTS, Completions, EngineConfig, Request, Sampler, SamplingConfig, environment


class RolloutConfig(Section):
    """chunk: requests of one engine call; its content does not depend on the number of workers, so neither do the samples."""

    workers: Workers = fixed(1)
    chunk: int = Field(64, gt=0)
    engine: EngineConfig = EngineConfig()
    resources: Resources = Resources()

    @property
    def bundles(self) -> list[dict[str, float]]:
        """The Ray resource demand of the workers whose places are reserved."""
        return [self.resources.bundle] * self.workers.min

    @property
    def spare(self) -> list[dict[str, float]]:
        """That of those that are asked for while work waits."""
        return [self.resources.bundle] * (self.workers.max - self.workers.min)


@ray.remote(max_restarts=0)
class RolloutWorker:
    """Shell around one Sampler."""

    def build(self, model, engine):
        proof = proof_of(model, engine)
        self.sampler = Sampler(model, engine)
        proof.check(self.sampler.logprobs)

    def generate(self, requests, sampling):
        return self.sampler.generate(requests, sampling)

    def generate_apart(self, requests, sampling):
        return self.sampler.generate_apart(requests, sampling)

    def load_weights(self, message, probe):
        self.sampler.load_weights(message)
        self.message = message  # keeps it in this node's store too, for those that join after the publisher's node has died
        return message.nbytes, self.sampler.logprobs(probe)


class Rollout:
    """Typed handle of the rollout pool. Its weights are the model directory's (version 0) until `load`."""

    def __init__(self, config: RolloutConfig, model: str, placement: Placement, cluster: ClusterConfig, name: str = "rollout"):
        self._config = config
        self._current: tuple[int, ray.ObjectRef, Expectation] | None = None
        self._bytes = 0
        options = config.resources.environment(environment(config.engine), IMPORTS, MODELS)

        def create(index: int) -> ActorHandle:
            return RolloutWorker.options(scheduling_strategy=placement.at(name, index), **options).remote()

        self.pool = Pool(name, create, lambda w: w.build.remote(model, config.engine), config.workers, cluster, enter=self._enter)
        self.wait_ready, self.pids, self.close = self.pool.wait_ready, self.pool.pids, self.pool.close

    @property
    def dtype(self) -> str:
        """The dtype in which weights are published."""
        return self._config.engine.dtype

    @property
    def version(self) -> int:
        """The policy version that every sample must carry."""
        return self._current[0] if self._current else 0

    @property
    def expected(self) -> Expectation | None:
        """What the trainer says of the probe with the present weights; None before the first publish."""
        return self._current[2] if self._current else None

    def generate(self, requests: Sequence[Request], sampling: SamplingConfig) -> Iterator[tuple[np.ndarray, Completions]]:
        """Draw one response a request; yields (row numbers, completions) of a chunk as it finishes. VersionMismatch for stale samples."""
        futures = {}
        for first in range(0, len(requests), self._config.chunk):
            part = list(requests[first : first + self._config.chunk])
            rows = np.arange(first, first + len(part))
            name = f"drawing responses {first} to {first + len(part) - 1}"
            futures[self.pool.submit(lambda worker, part=part: worker.generate.remote(part, sampling), name)] = rows
        try:
            for future in as_completed(futures):
                completions = future.result()
                if completions.version != self.version:
                    raise VersionMismatch(
                        f"samples of policy version {completions.version} arrived where version {self.version} is required"
                    )
                yield futures[future], completions
        finally:
            for future in futures:
                future.cancel()  # those that nobody waits for any more

    def generate_apart(self, requests: Sequence[Request], sampling: SamplingConfig) -> Future:
        """Completions, without logprobs, of one engine call that depends on nothing but its arguments and the weights."""
        part = list(requests)
        name = f"drawing {len(part)} responses with the seeds {[request.seed for request in part[:2]]}…"
        return self.pool.submit(lambda worker: worker.generate_apart.remote(part, sampling), name)

    def load(self, message: ray.ObjectRef, version: int, expected: Expectation) -> int:
        """Give every worker the weights of `message`, now and when it joins later, and check each against `expected` before it gets work.

        Returns their size in bytes when all that were at work have them. VersionMismatch if a worker's logprobs are not the expected ones.
        """
        self._current = version, message, expected
        self.pool.renew(version)
        return self._bytes

    def _enter(self, worker: ActorHandle) -> Entry | None:
        if self._current is None:
            return None
        version, message, expected = self._current

        def check(answer: tuple[int, list[np.ndarray]]) -> None:
            self._bytes, logprobs = answer
            expected.check(logprobs, version)

        return version, worker.load_weights.remote(message, expected.probe), check
