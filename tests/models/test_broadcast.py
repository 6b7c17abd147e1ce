"""Weights by broadcast, in real processes: whole and equal everywhere; an end, with a reason, when a member is gone or does not come."""

import multiprocessing
import os
import signal

import numpy as np
import pytest

from ctrlrl.errors import WorkerLost
from ctrlrl.models import broadcast
from ctrlrl.models.broadcast import Meeting, Receiver, Sender, call_off, meeting_store
from ctrlrl.models.weights import WeightMessage

SHAPES = {"embed": (300, 7), "router": (5,), "scalar": (), "empty": (0, 3), "head": (41, 11)}
NEVER_S = 600.0  # a patience longer than any of these tests is let be
BUCKET = 500  # bytes: five tensors in three buckets, two of which exceed it


def weights(seed: int):
    """Tensors of three dtypes, as `packed` gives them; how many elements there are depends on the seed."""
    draw = np.random.default_rng(seed)
    for number, (name, shape) in enumerate((SHAPES | {"embed": (300 + seed, 7)}).items()):
        kind = (np.float32, np.uint16, np.int64)[number % 3]
        yield name, shape, draw.integers(0, 60_000, size=int(np.prod(shape))).astype(kind)


def equal(message: WeightMessage, seed: int, version: int) -> bool:
    """Whether a message is `weights(seed)` to the bit."""
    names, shapes, arrays = zip(*weights(seed), strict=True)
    same = all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(message.arrays, arrays, strict=True))
    return message.version == version and message.names == names and message.shapes == shapes and same


def member(line, rank: int) -> None:
    """A receiver in a process of its own: does what it is told, and says how it went."""
    broadcast.BUCKET, receiver = BUCKET, Receiver()
    while True:
        version, meeting, seed = line.recv()
        try:
            line.send(equal(receiver.receive("float32", version, meeting, rank), seed, version))
        except WorkerLost as error:
            line.send(str(error))


class Members:
    """Receivers of ranks 1, 2, …"""

    def __init__(self, count: int):
        context, self.lines, self.processes = multiprocessing.get_context("fork"), [], []
        for rank in range(1, count + 1):
            ours, theirs = context.Pipe()
            self.lines.append(ours)
            self.processes.append(context.Process(target=member, args=(theirs, rank), daemon=True))
            self.processes[-1].start()

    def told(self, ranks, version: int, meeting: Meeting, seed: int) -> None:
        for rank in ranks:
            self.lines[rank - 1].send((version, meeting, seed))

    def said(self, rank: int):
        """What member `rank` answers, within a minute."""
        assert self.lines[rank - 1].poll(60), f"member {rank} says nothing"
        return self.lines[rank - 1].recv()

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


@pytest.fixture
def store():
    return meeting_store("127.0.0.1")


@pytest.fixture
def members():
    """A function: so many receivers, ended after the test."""
    started = []

    def start(count: int) -> Members:
        started.append(Members(count))
        return started[-1]

    yield start
    for some in started:
        some.close()


@pytest.fixture
def meet(store, monkeypatch):
    """A function: a meeting of a session and so many members."""
    monkeypatch.setattr(broadcast, "BUCKET", BUCKET)
    return lambda session, size, patience_s=60.0: Meeting("127.0.0.1", store.port, session, size, patience_s)


def test_all_members_get_the_same_message_and_rank_0_keeps_it(members, meet):
    some, sender = members(2), Sender()
    for version, seed in ((1, 10), (2, 20), (5, 30)):  # one group for all three
        some.told((1, 2), version, meet("a", 3), seed)
        assert sender.send(weights(seed), "float32", version, meet("a", 3)) == ""
        assert some.said(1) is True and some.said(2) is True
        assert equal(sender.message, seed, version) and len(sender._kept) == 3
    late = members(3)  # one more than before: another group, to which what was sent last is sent again
    late.told((1, 2, 3), 5, meet("b", 4), 30)
    assert sender.again(meet("b", 4)) == ""
    assert [late.said(rank) for rank in (1, 2, 3)] == [True] * 3
    late.told((1, 2, 3), 7, meet("b", 4), 40)
    sender.send(weights(40), "float32", 6, meet("b", 4))
    assert "version 6 came where version 7 was to come" in " ".join(str(late.said(rank)) for rank in (1, 2, 3))


def told_of(death: str) -> bool:
    """Whether that says how one of three that died was noticed: by its connection, or since the group was called off."""
    return "a member of the group of 3 is gone or late" in death or death == "the group of 3 was called off: it died"


def test_a_member_that_is_killed_in_the_middle_ends_the_broadcast_and_the_rest_go_on_without_it(members, meet, store):
    some, sender = members(2), Sender()

    def slowly():
        for number, row in enumerate(weights(10)):
            yield row
            if number == 2:  # a bucket is sent
                os.kill(some.processes[1].pid, signal.SIGKILL)
                some.processes[1].join()
                call_off(store, "a", "it died")  # as the job does: gloo itself does not always notice before its deadline

    some.told((1, 2), 1, meet("a", 3, NEVER_S), 10)
    assert told_of(sender.send(slowly(), "float32", 1, meet("a", 3, NEVER_S)))
    assert equal(sender.message, 10, 1)  # it has read all of it
    some.told((1,), 1, meet("b", 2, NEVER_S), 10)
    assert sender.again(meet("b", 2, NEVER_S)) == ""
    assert told_of(some.said(1)) and some.said(1) is True


def test_memory_of_a_message_that_was_given_up_is_not_filled_again(monkeypatch):
    monkeypatch.setattr(broadcast, "BUCKET", BUCKET)

    class Told:
        """In place of a line: writes down what is sent."""

        meeting, said = Meeting("", 0, "a", 2, NEVER_S), []

        def broadcast(self, array):
            self.said.append(array.copy())

    class Telling:
        """In place of a line: says so much of what was written down."""

        meeting = Told.meeting

        def __init__(self, words):
            self.words, self.given = iter(words), []

        def broadcast(self, array):
            self.given.append(array)
            if (word := next(self.words, None)) is None:
                raise WorkerLost("the group of 2 was called off")
            array[:] = word

    sender, receiver = Sender(), Receiver()
    sender._line = Told()
    sender.send(weights(10), "float32", 1, Told.meeting)
    assert len(Told.said) == 10  # of three buckets sizes, head and content, and the end

    def received(words):
        receiver._line = Telling(words)
        return receiver._line, receiver.receive("float32", 1, Told.meeting, 1)

    line, _ = received(Told.said)
    again, _ = received(Told.said)
    assert all(np.shares_memory(a, b) for a, b in zip(line.given[2::3], again.given[2::3], strict=False))  # the same, which saves time
    with pytest.raises(WorkerLost):
        received(Told.said[:5])
    last, message = received(Told.said)
    assert equal(message, 10, 1) and not any(np.shares_memory(a, b) for a in again.given for b in last.given)


def test_a_member_that_stops_is_late(members, meet):
    some, sender, large = members(1), Sender(), [("w", (16 << 20,), np.zeros(16 << 20, np.uint8))]  # more than sockets hold
    some.told((1,), 1, meet("a", 2, 5.0), 10)
    assert sender.send(weights(10), "float32", 1, meet("a", 2, 5.0)) == "" and some.said(1) is True
    os.kill(some.processes[0].pid, signal.SIGSTOP)
    assert "a member of the group of 2 is gone or late" in sender.send(iter(large), "float32", 2, meet("a", 2, 5.0))
    assert sender.message.version == 2


def test_a_member_that_stops_is_not_waited_for_when_the_group_is_called_off(members, meet, store):
    some, sender, large = members(2), Sender(), [("w", (16 << 20,), np.zeros(16 << 20, np.uint8))]
    some.told((1, 2), 1, meet("a", 3, NEVER_S), 10)
    assert sender.send(weights(10), "float32", 1, meet("a", 3, NEVER_S)) == "" and some.said(1) is True and some.said(2) is True
    os.kill(some.processes[1].pid, signal.SIGSTOP)
    some.told((1,), 2, meet("a", 3, NEVER_S), 20)
    call_off(store, "a", "it is ill")
    reasons = sender.send(iter(large), "float32", 2, meet("a", 3, NEVER_S)), some.said(1)
    assert "the group of 3 was called off: it is ill" in reasons
    some.told((1,), 2, meet("b", 2, NEVER_S), 20)  # both ends go on at once
    sender.send(weights(20), "float32", 2, meet("b", 2, NEVER_S))
    assert some.said(1) is True


def test_one_that_does_not_come_is_waited_for_until_it_is_called_off_or_late(members, meet, store):
    some, sender = members(1), Sender()
    call_off(store, "a", "worker 2 died")
    some.told((1,), 1, meet("a", 3), 10)
    assert "called off: worker 2 died" in sender.send(weights(10), "float32", 1, meet("a", 3))
    assert "called off: worker 2 died" in some.said(1)
    assert "members 1, 2 of the group did not come within 0.2 s" in sender.again(meet("b", 3, 0.2))
    some.told((1,), 1, meet("c", 2), 10)
    assert sender.again(meet("c", 2)) == "" and some.said(1) is True
