"""Weights by broadcast on Ray: who is in the group, and what follows when one of them dies; with the two ends, without their models."""

import os
import signal

import numpy as np
import pytest
import ray

from actors.broadcast import Broadcast
from actors.placement import MODELS, Resources
from actors.waiting import input_lost
from ctrlrl.models.broadcast import Receiver, Sender, again, kept

NEVER_S, PATIENCE_S = 600.0, 120.0  # nobody here is waited for until late: whose patience is over before has failed


def ends():
    """The classes of the two ends; made here, because the actors' processes do not know this file."""

    def tensors(version: int):
        for number in range(3):  # each a bucket
            yield f"w{number}", (9 << 20,), np.full(9 << 20, number + version, np.float32)

    @ray.remote
    class Trainer:
        """Rank 0, which sends. victim: a process that it kills in the middle."""

        def __init__(self):
            self.rank, self.sender = 0, Sender()

        def pid(self):
            return os.getpid()

        def broadcast(self, dtype, version, meeting, victim):
            def weights():
                for number, row in enumerate(tensors(version)):
                    yield row
                    if victim and number == 1:  # a bucket is sent
                        os.kill(victim, signal.SIGKILL)

            return self.sender.send(weights(), dtype, version, meeting)

        def do(self, call, *arguments):
            return call(self, *arguments)

    @ray.remote
    class Worker:
        """A receiver. in_vain: it dies as soon as it is told of a group."""

        def __init__(self, in_vain=False):
            self.receiver, self.in_vain = Receiver(), in_vain

        def pid(self):
            return os.getpid()

        def receive(self, dtype, version, meeting, rank):
            if self.in_vain:
                os._exit(1)
            message = self.receiver.receive(dtype, version, meeting, rank)
            return meeting.session, rank, [float(array[-1]) for array in message.arrays]

    options = Resources(cpus=0).environment({}, (), MODELS)  # forked, with their imports done
    return Trainer.options(**options), Worker.options(**options)


class Policy:
    """Handle of the trainer. victim: a process that it kills in the middle of its next broadcast."""

    def __init__(self, actor):
        self.actor, self.starts, self.victim = actor, 1, None

    def broadcast(self, dtype, version, meeting):
        victim, self.victim = self.victim, None
        return ray.get(self.actor.broadcast.remote(dtype, version, meeting, victim), timeout=PATIENCE_S)

    def broadcast_again(self, meeting):
        return ray.get(self.actor.do.remote(again, meeting), timeout=PATIENCE_S)

    def kept(self, version):
        return lambda: self.actor.do.remote(kept, version)


@pytest.fixture
def started(ray_cluster, monkeypatch):
    """A policy, three workers, and what is between them; ended after the test."""
    monkeypatch.setattr("actors.broadcast._COMPLAINT_S", NEVER_S)  # all that live complain
    trainer, worker = ends()
    policy, workers = Policy(trainer.remote()), [worker.remote() for _ in range(3)]
    ray.get([actor.pid.remote() for actor in (policy.actor, *workers)])
    yield policy, workers, Broadcast("gloo", NEVER_S)
    for actor in (policy.actor, *workers):
        ray.kill(actor)


def took(way, policy, workers, version):
    """Of each worker: the session that it got the weights in, and its rank; all have the right ones."""
    taking, source = way.send(policy, workers, "float32", version)
    found = {}
    for worker, call in way.settled(taking).items():
        try:
            session, rank, last = ray.get(call)
        except ray.exceptions.RayActorError:  # the pool sees to those that are dead
            continue
        assert last == [version, version + 1, version + 2]
        found[worker] = int(session.removeprefix("session-")), rank
    assert ray.get(source()).version == version
    return found


def test_the_group_follows_those_that_are_there(started):
    policy, (one, two, three), way = started
    assert took(way, policy, [one, two], 1) == {one: (1, 1), two: (1, 2)}
    assert took(way, policy, [one, two], 2) == {one: (1, 1), two: (1, 2)}  # the same group
    assert took(way, policy, [one, two, three], 3) == {one: (2, 1), two: (2, 2), three: (2, 3)}  # one joined
    assert took(way, policy, [three], 4) == {three: (3, 1)}  # two left
    assert took(way, policy, [], 5) == {}  # nobody is there: who comes later gets what the trainer keeps
    with pytest.raises(ray.exceptions.RayTaskError, match="weights of version 4 are gone: others were published since") as error:
        ray.get(policy.kept(4)())
    assert input_lost(error.value)  # that is nobody's failure: whoever asked waits for the next
    assert took(way, policy, [three], 6) == {three: (5, 1)}  # a group of one counts, too


def test_one_that_dies_in_the_middle_or_before_it_comes_is_done_without(started):
    policy, (one, two, three), way = started
    assert took(way, policy, [one, two, three], 1).keys() == {one, two, three}
    policy.victim = ray.get(two.pid.remote())
    found = took(way, policy, [one, two, three], 2)
    assert found == {one: (2, 1), three: (2, 2)}
    in_vain = ends()[1].remote(in_vain=True)
    assert took(way, policy, [one, in_vain, three], 3) == {one: (4, 1), three: (4, 2)}  # the group of three was called off
    assert took(way, policy, [one, three], 4) == {one: (4, 1), three: (4, 2)}
