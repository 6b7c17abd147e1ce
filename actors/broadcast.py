"""Weights by broadcast, on the job's side: who is in the group with the trainer's rank 0, and what follows when one of them is gone."""

import logging
from collections.abc import Callable, Sequence
from functools import partial

import ray
from ray.actor import ActorHandle

from actors.policy import Policy
from actors.waiting import LOST, translate
from ctrlrl.errors import WorkerLost
from ctrlrl.models.broadcast import Meeting, call_off, meeting_store

ATTEMPTS = 3
_COMPLAINT_S = 5.0  # for a worker to say that the group is of no use
_log = logging.getLogger("ctrlrl")

Source = Callable[[], ray.ObjectRef]  # a WeightMessage
Taking = dict[ActorHandle, ray.ObjectRef]  # of a worker that gets the weights: its call, done when its engine has them


class Store:
    """Puts a policy's weights into Ray's object store, from which the workers read them, without a copy where they are on its node.

    in_turn: the workers have the trainer's devices, and take the weights when it is their turn.
    """

    def __init__(self, in_turn: bool = False):
        self._in_turn = in_turn

    def send(self, policy: Policy, workers: Sequence[ActorHandle], dtype: str, version: int) -> tuple[Taking, Source]:
        """Have `workers` take the current weights when they are there; the source for those that come later."""
        message = policy.weights(dtype, version)
        now = () if self._in_turn else workers
        return {worker: worker.load_weights.remote(message) for worker in now}, lambda: message

    def settled(self, taking: Taking) -> Taking:
        """The same: whether a worker has got them is the pool's to see."""
        return taking


class Broadcast:
    """Sends a policy's weights to rollout workers through a group that is made anew when its members change, or one of them fails.

    backend: torch's name. patience_s: longest wait for a member, and for one bucket.
    """

    def __init__(self, backend: str, patience_s: float):
        self._backend, self._patience_s = backend, patience_s
        self._store = None  # where the members meet
        self._members, self._session = None, 0

    def send(self, policy: Policy, workers: Sequence[ActorHandle], dtype: str, version: int) -> tuple[Taking, Source]:
        """Broadcast the current weights, which stay with the trainer, too: the source for who gets none (it joins later, or the group
        failed too often)."""
        left, taking = list(workers), {}
        for attempt in range(ATTEMPTS):
            meeting = self._meeting(policy, left)
            calls = {worker: worker.receive.remote(dtype, version, meeting, rank) for rank, worker in enumerate(left, start=1)}
            for call in calls.values():
                call.future().add_done_callback(partial(self._heed, meeting.session))
            try:
                reason = policy.broadcast_again(meeting) if attempt else policy.broadcast(dtype, version, meeting)
            except BaseException:
                call_off(self._store, meeting.session, "the trainer is gone")
                raise
            if not reason:
                return {**taking, **calls}, policy.kept(version)
            _log.warning("weights of version %d did not reach all of %d rollout workers: %s", version, len(left), reason)
            left, self._members = self._failed(calls, _COMPLAINT_S), None
            taking |= {worker: call for worker, call in calls.items() if worker not in left}
            if not left:
                break
        return taking, policy.kept(version)

    def settled(self, taking: Taking) -> Taking:
        """The calls of those that have the weights, when all have or have not; without those that lost the group on the way."""
        failed = self._failed(taking, self._patience_s)
        return {worker: call for worker, call in taking.items() if worker not in failed}

    def _meeting(self, policy: Policy, workers: list[ActorHandle]) -> Meeting:
        address = ray.util.get_node_ip_address()
        self._store = self._store or meeting_store(address)
        members = (policy.starts, *workers)
        if members != self._members:
            self._members, self._session = members, self._session + 1
        return Meeting(address, self._store.port, f"session-{self._session}", len(members), self._patience_s, self._backend)

    def _heed(self, session: str, answer) -> None:
        """A worker that cannot come is not waited for."""
        if error := answer.exception():
            call_off(self._store, session, f"{type(error).__name__} of a rollout worker")

    def _failed(self, calls: Taking, wait_s: float) -> list[ActorHandle]:
        """The workers that live and say that they did not get the weights, after `wait_s` seconds at most."""
        done, _ = ray.wait(list(calls.values()), num_returns=len(calls), timeout=wait_s) if calls else ((), ())
        failed = []
        for worker, call in calls.items():
            try:
                if call in done:
                    ray.get(call)
            except LOST:
                pass  # the pool sees to it
            except Exception as error:
                if not isinstance(error, WorkerLost):
                    raise translate(error, "a rollout worker") from error
                self._members = None
                failed.append(worker)
        return failed
