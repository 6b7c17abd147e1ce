"""Turns on shared devices: one kind at a time, the others at rest before it begins, and whoever waits gets in."""

import threading
import time
from types import SimpleNamespace

import pytest

from actors.placement import ClusterConfig
from actors.rollout import RolloutConfig, way_of
from actors.turns import Turns, at_once
from ctrlrl.errors import GroupLost


class Kind:
    """A handle whose worker is awake from a call on until it is told to rest; `device` holds who is awake, whom no other may meet."""

    def __init__(self, turns: Turns, turn: str, name: str, device: set):
        self.turn, self.mine, self.name, self.device, self.rests = turns.of(turn), turn, name, device, 0
        turns.joined(turn, self.rest)

    def rest(self) -> int:
        self.rests += (self.mine, self.name) in self.device
        self.device.discard((self.mine, self.name))
        return 1

    def call(self, seconds: float = 0.0) -> None:
        with self.turn():
            self.device.add((self.mine, self.name))
            time.sleep(seconds)
            assert {turn for turn, _ in self.device} == {self.mine}, self.device


@pytest.fixture
def kinds():
    """A device's workers: two that train, one that draws, one that judges; and the device."""
    turns, device = Turns(), set()
    named = (("train", "policy"), ("train", "value"), ("draw", "rollout"), ("judge", "reward"))
    return [Kind(turns, turn, name, device) for turn, name in named], device


def test_each_turn_begins_when_the_others_rest_and_none_rests_within_its_own(kinds):
    (policy, value, rollout, reward), device = kinds
    for kind in (rollout, rollout, reward, policy, value, policy, rollout):
        kind.call()
    assert device == {("draw", "rollout")}
    assert (policy.rests, value.rests, rollout.rests, reward.rests) == (1, 1, 1, 1)
    with policy.turn(), policy.turn():  # a call that makes calls
        assert device == set()


def test_calls_from_many_threads_never_meet_another_kind_and_all_come_to_an_end(kinds):
    workers, _ = kinds
    failed = []

    def work(kind):
        try:
            for _ in range(5):
                kind.call(0.001)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(kind,)) for kind in workers * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failed and not any(thread.is_alive() for thread in threads)


def test_two_of_one_turn_are_at_work_at_once_while_another_waits(kinds):
    (policy, value, rollout, _), _ = kinds
    both, drawn = threading.Barrier(2), []

    def train(kind):
        with kind.turn():
            both.wait(60)  # neither gets on without the other
            assert not drawn

    threads = [threading.Thread(target=train, args=(kind,)) for kind in (policy, value)]
    with policy.turn():
        threads.append(threading.Thread(target=lambda: rollout.call() or drawn.append(1)))
        for thread in reversed(threads):
            thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join(60)
    assert drawn == [1] and not both.broken


def test_who_cannot_rest_is_told_and_asked_again_by_the_next(kinds):
    turns, asked = Turns(), []

    def rest():
        asked.append(1)
        if len(asked) == 1:
            raise GroupLost("policy rank 0 is gone")
        return 0

    turns.joined("train", rest)
    with turns.of("train")():
        pass
    with pytest.raises(GroupLost, match="rank 0 is gone"):
        with turns.of("draw")():
            raise AssertionError("it is not its turn")
    with turns.of("draw")():
        assert len(asked) == 2


class Worker:
    """What is asked of it is `taken`."""

    def __init__(self):
        self.taken = []
        self.load_weights = SimpleNamespace(remote=lambda message: self.taken.append(message) or "a call")


def test_weights_are_not_sent_to_those_whose_turn_it_is_not():
    worker, policy = Worker(), SimpleNamespace(weights=lambda dtype, version: (dtype, version))
    config, cluster = RolloutConfig(), ClusterConfig()
    way = way_of("auto", config, cluster, Turns().of("draw"))
    taking, source = way.send(policy, [worker], "float32", 3)
    assert taking == {} and worker.taken == [] and source() == ("float32", 3)  # whoever enters in its turn gets them there
    assert way_of("store", config, cluster).send(policy, [worker], "float32", 4)[0] == {worker: "a call"}
    assert worker.taken == [("float32", 4)]


def test_without_sharing_there_is_no_turn_to_wait_for():
    with at_once(), at_once():
        pass
