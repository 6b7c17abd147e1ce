"""Rollout workers: a pool of vLLM engines that draw responses with the policy's current weights."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, as_completed
from typing import Literal

import numpy as np
import ray
from pydantic import Field, model_validator
from ray.actor import ActorHandle

from actors import kin
from actors.broadcast import Broadcast, Source, Store, Taking
from actors.handover import Handover, go_without
from actors.member import Entry
from actors.placement import MODELS, ClusterConfig, Placement, Resources
from actors.pool import Pool
from actors.scaling import Workers, fixed
from actors.turns import Turn, at_once, have_rest
from ctrlrl.config import Section
from ctrlrl.errors import VersionMismatch
from ctrlrl.models.probe import Expectation
from ctrlrl.models.proof import proof_of
from ctrlrl.models.sampler import IMPORTS, Completions, EngineConfig, Request, Sampler, SamplingConfig, environment

# How weights come to the workers: through Ray's object store, by broadcast (gloo: on CPUs, nccl: between GPUs), or on the device that they
# share with the policy's ranks.
Sync = Literal["auto", "store", "gloo", "nccl", "ipc"]


class RolloutConfig(Section):
    """chunk: requests of one engine call; its content does not depend on the number of workers, so neither do the samples. resources: of
    one worker, all devices of its engine included; its place is on one node."""

    workers: Workers = fixed(1)
    chunk: int = Field(64, gt=0)
    engine: EngineConfig = EngineConfig()
    resources: Resources = Resources()

    @model_validator(mode="after")
    def _a_device_for_each_part(self):
        parts, gpus = self.engine.tensor_parallel, self.resources.gpus
        if parts > 1 and gpus not in (0, parts):
            raise ValueError(f"engine.tensor_parallel = {parts} takes {parts} GPUs of one node: set resources.gpus = {parts}, not {gpus:g}")
        return self

    @property
    def bundles(self) -> list[dict[str, float]]:
        """The Ray resource demand of the workers whose places are reserved."""
        return [self.resources.bundle] * self.workers.min

    @property
    def spare(self) -> list[dict[str, float]]:
        """That of those that are asked for while work waits."""
        return [self.resources.bundle] * (self.workers.max - self.workers.min)


def way_of(sync: Sync, config: RolloutConfig, cluster: ClusterConfig, turn: Turn = at_once) -> Store | Broadcast | Handover:
    """How weights come to the workers; says what it is, if it was left open."""
    if sync == "ipc":
        return Handover(cluster.call_deadline_s / 4)
    if turn is not at_once:
        return Store(in_turn=True)
    if sync == "auto":
        why = "nccl has not run yet on any GPU: choose it by name" if config.resources.gpus else "the rollout workers are on CPUs"
        print(f"sync: store ({why})", flush=True)
    # The trainer must not be late itself while it waits for a member of the group, and again in another group.
    return Broadcast(sync, cluster.call_deadline_s / 4) if sync in ("gloo", "nccl") else Store()


@ray.remote(max_restarts=0)
class RolloutWorker:
    """Shell around one Sampler."""

    def build(self, model, engine, rests):
        proof = proof_of(model, engine)
        self.sampler = Sampler(model, engine, rests, kin.context())
        kin.end_with(self.sampler.pids)
        proof.check(self.sampler.logprobs)

    def rest(self):
        return self.sampler.rest()

    def generate(self, requests, sampling):
        return self.sampler.generate(requests, sampling)

    def generate_apart(self, requests, sampling):
        return self.sampler.generate_apart(requests, sampling)

    def load_weights(self, message):
        self.sampler.load_weights(message)
        self.message = message  # keeps it in this node's store too, for those that join after the publisher's node has died
        return message.nbytes

    def take(self, bucket):
        return self.sampler.take(bucket)

    def receive(self, *arguments):
        return self.sampler.receive_weights(*arguments)

    def answer(self, size, probe):
        return self.sampler.answer(size, probe)


class Rollout:
    """Typed handle of the rollout pool. Its weights are the model directory's (version 0) until `load`. turn: in which its workers draw and
    take weights; `generate_apart` knows of none."""

    def __init__(
        self,
        config: RolloutConfig,
        model: str,
        placement: Placement,
        cluster: ClusterConfig,
        name: str = "rollout",
        sync: Sync = "store",
        turn: Turn = at_once,
    ):
        self._config, self.way, self.turn = config, way_of(sync, config, cluster, turn), turn
        self._patience_s, rests = cluster.call_deadline_s, turn is not at_once
        self._current: tuple[int, Source | None, Expectation] | None = None
        self._offered, self._taking = 0, {}  # the version that was begun last, and those who are taking it
        self._bytes = 0
        options = config.resources.environment(environment(config.engine), IMPORTS, MODELS)

        def create(index: int) -> ActorHandle:
            return RolloutWorker.options(scheduling_strategy=placement.at(name, index), **options).remote()

        self.pool = Pool(name, create, lambda w: w.build.remote(model, config.engine, rests), config.workers, cluster, enter=self._enter)
        self.wait_ready, self.pids, self.close = self.pool.wait_ready, self.pool.pids, self.pool.close

    @property
    def dtype(self) -> str:
        """The dtype in which weights are published."""
        return self._config.engine.dtype

    @property
    def version(self) -> int:
        """The policy version that every sample must carry."""
        return self._offered

    @property
    def expected(self) -> Expectation | None:
        """What the trainer says of the probe with the present weights; None before the first publish."""
        return self._current[2] if self._current else None

    def generate(self, requests: Sequence[Request], sampling: SamplingConfig) -> Iterator[tuple[np.ndarray, Completions]]:
        """Draw one response a request; yields (row numbers, completions) of a chunk as it finishes, or of all when the turn is over.
        VersionMismatch for stale samples."""
        if self.turn is at_once:
            yield from self._drawn(requests, sampling)
            return
        with self.turn():
            drawn = list(self._drawn(requests, sampling))
        yield from drawn

    def _drawn(self, requests: Sequence[Request], sampling: SamplingConfig) -> Iterator[tuple[np.ndarray, Completions]]:
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

    def begin(self, version: int) -> list[ActorHandle]:
        """The workers that are at work, which may be told to take weights of `version`: samples of others are refused from now on."""
        self._offered = version
        return self.pool.at_work()

    def load(self, source: Source | None, version: int, expected: Expectation, taking: Taking) -> int:
        """Give every worker the weights of `source`, now and when it joins later, and check each against `expected` before it gets work.

        source: None where nobody keeps them: who comes later waits for the next ones. taking: the calls of those that were told to take
        them already. Returns their size in bytes when all that were at work have them; 0 if none of these is left.
        VersionMismatch if a worker's logprobs are not the expected ones.
        """
        self._current, self._offered, self._taking = (version, source, expected), version, dict(taking)
        self._bytes = 0
        with self.turn():
            self.pool.renew(version)
        return self._bytes

    def rest(self) -> int:
        """Have the workers give their devices' memory back, until they are called; bytes that moved, where that is known."""
        return have_rest(self.pool.name, self.pool.at_work(), self._patience_s)

    def _enter(self, worker: ActorHandle) -> Entry | None:
        if self._current is None:
            return None
        version, source, expected = self._current

        def check(answer: tuple[int, list[np.ndarray]]) -> None:
            self._bytes, logprobs = answer
            expected.check(logprobs, version)

        size = self._taking.pop(worker, None)
        if size is None:
            size = worker.load_weights.remote(source()) if source else worker.__ray_call__.remote(go_without, version)
        return version, worker.answer.remote(size, expected.probe), check
