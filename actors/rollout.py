"""Rollout workers: a pool of vLLM engines that draw responses with the policy's current weights."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, as_completed

import numpy as np
import ray
from pydantic import Field

from actors.placement import ClusterConfig, Placement, Resources
from actors.pool import Pool
from actors.waiting import gather
from ctrlrl.config import Section
from ctrlrl.errors import VersionMismatch
from ctrlrl.models.sampler import Completions, EngineConfig, Request, Sampler, SamplingConfig, environment


class RolloutConfig(Section):
    """chunk: requests of one engine call; its content does not depend on the number of workers, so neither do the samples."""

    workers: int = Field(1, gt=0)
    chunk: int = Field(64, gt=0)
    engine: EngineConfig = EngineConfig()
    resources: Resources = Resources()


@ray.remote(max_restarts=0)
class RolloutWorker:
    """Shell around one Sampler."""

    def build(self, model, engine):
        self.sampler = Sampler(model, engine)

    def generate(self, requests, sampling):
        return self.sampler.generate(requests, sampling)

    def generate_apart(self, requests, sampling):
        return self.sampler.generate_apart(requests, sampling)

    def load_weights(self, message):
        self.sampler.load_weights(message)
        return message.nbytes

    def pid(self):
        return os.getpid()


class Rollout:
    """Typed handle of the rollout pool. Its weights are the model directory's (version 0) until `load`."""

    def __init__(self, config: RolloutConfig, model: str, placement: Placement, cluster: ClusterConfig, name: str = "rollout"):
        self._config, self._cluster = config, cluster
        self._message, self.version = None, 0
        options = config.resources.environment(environment(config.engine))

        def start(index: int):
            worker = RolloutWorker.options(scheduling_strategy=placement.at(name, index), **options).remote()
            built = worker.build.remote(model, config.engine)
            # A worker that joins later has the directory's weights: it gets the current ones before any item.
            return worker, built if self._message is None else worker.load_weights.remote(self._message)

        self._pool = Pool(name, start, config.workers, cluster)
        self.wait_ready, self.pids, self.close = self._pool.wait_ready, self._pool.pids, self._pool.close

    @property
    def dtype(self) -> str:
        """The dtype in which weights are published."""
        return self._config.engine.dtype

    def generate(self, requests: Sequence[Request], sampling: SamplingConfig) -> Iterator[tuple[np.ndarray, Completions]]:
        """Draw one response a request; yields (row numbers, completions) of a chunk as it finishes. VersionMismatch for stale samples."""
        futures = {}
        for first in range(0, len(requests), self._config.chunk):
            part = list(requests[first : first + self._config.chunk])
            futures[self._pool.submit(lambda worker, part=part: worker.generate.remote(part, sampling))] = np.arange(
                first, first + len(part)
            )
        for future in as_completed(futures):
            completions = future.result()
            if completions.version != self.version:
                raise VersionMismatch(f"samples of policy version {completions.version} arrived where version {self.version} is required")
            yield futures[future], completions

    def generate_apart(self, requests: Sequence[Request], sampling: SamplingConfig) -> Future:
        """Completions, without logprobs, of one engine call that depends on nothing but its arguments and the weights."""
        part = list(requests)
        return self._pool.submit(lambda worker: worker.generate_apart.remote(part, sampling))

    def load(self, message: ray.ObjectRef, version: int) -> int:
        """Give every worker the weights of `message`; returns their size in bytes when all have them."""
        self._message, self.version = message, version
        loading = self._pool.each(lambda worker: worker.load_weights.remote(message)).result(self._cluster.call_deadline_s)
        return gather(loading, self._cluster.call_deadline_s, "rollout workers loading weights")[0]
