"""Weights from the policy's ranks to the rollout workers on the same devices: who is beside whom, and whose turn it is."""

from collections.abc import Sequence

import ray
from ray.actor import ActorHandle

from actors.broadcast import Taking
from actors.policy import Policy
from actors.waiting import LOST, translate
from ctrlrl.errors import GroupLost, PlacementError, VersionMismatch
from ctrlrl.models.broadcast import BUCKET
from ctrlrl.models.handover import device_name

_PASSES = 3  # of all buckets: engines may have to see them once before they know how to take them


class Handover:
    """Gives a policy's weights to the workers bucket by bucket, each from the rank on its device, in the policy's turn. Nobody keeps them:
    a worker that comes later waits for the next ones.

    patience_s: longest wait for a worker to take a bucket. bucket: its bytes.
    """

    def __init__(self, patience_s: float, bucket: int = BUCKET):
        self._patience_s, self._bucket = patience_s, bucket

    def send(self, policy: Policy, workers: Sequence[ActorHandle], dtype: str, version: int) -> tuple[Taking, None]:
        """Have `workers` take the current weights; there is no source for others."""
        with policy.turn():
            beside = self._beside(policy, workers)
            taking: Taking = {}
            for _ in range(_PASSES):
                if beside:
                    ended = self._passed(policy, beside, dtype, version)
                    taking |= ended
                    beside = {worker: rank for worker, rank in beside.items() if worker not in ended}
            policy.gave()
        if beside:
            raise VersionMismatch(f"weights of version {version}: {len(beside)} workers cannot take them in parts: use another sync")
        return taking, None

    def settled(self, taking: Taking) -> Taking:
        """The same: whether a worker has got them is the pool's to see."""
        return taking

    def _passed(self, policy: Policy, beside: dict[ActorHandle, int], dtype: str, version: int) -> Taking:
        """One pass of all buckets: the last calls of the workers that have all of them, and of those that are lost or late."""
        ended: Taking = {}
        buckets = policy.give(dtype, version, self._bucket, begin=True)
        while True:
            calls = {worker: worker.take.remote(buckets[rank]) for worker, rank in beside.items() if worker not in ended}
            sizes = {worker: self._size(call) for worker, call in calls.items()}
            ended |= {worker: call for worker, call in calls.items() if sizes[worker] != 0}
            if buckets[0].last:
                return ended
            buckets = policy.give(dtype, version, self._bucket, begin=False)

    def _size(self, call: ray.ObjectRef) -> int | None:
        """What `take` says; None where the worker is lost or late, which is the pool's to see."""
        done, _ = ray.wait([call], timeout=self._patience_s)
        if not done:
            return None
        try:
            return ray.get(call)
        except LOST:
            return None
        except Exception as error:
            raise translate(error, "a rollout worker") from error

    def _beside(self, policy: Policy, workers: Sequence[ActorHandle]) -> dict[ActorHandle, int]:
        """For each worker the rank on its device; for one that is lost, any."""
        ranks = {name: rank for rank, name in reversed(list(enumerate(policy.devices())))}
        names = {worker: worker.__ray_call__.remote(own_device) for worker in workers}
        ray.wait(list(names.values()), num_returns=len(names), timeout=self._patience_s) if names else None
        found = {}
        for worker, name in names.items():
            try:
                device = ray.get(name, timeout=0)
            except (*LOST, ray.exceptions.GetTimeoutError):
                device = next(iter(ranks))
            if device not in ranks:
                raise PlacementError('sync = "ipc": a rollout worker has a device that none of the policy\'s ranks has: use another way')
            found[worker] = ranks[device]
        return found


def own_device(_worker) -> str:
    """In a rollout worker: the name of its device."""
    return device_name()


def go_without(_worker, version: int):
    """In a rollout worker that has come later: it waits for the next weights."""
    raise GroupLost(f"the weights of version {version} went from device to device: nobody kept them")
