"""Many shards at once: how many are open, what an error and a stop do, and that answers are of the weights that were asked for."""

import types
from concurrent.futures import Future

import pytest

from ctrlrl.errors import DataError, VersionMismatch
from jobs.parts.flow import all_of, flow
from jobs.parts.road import drawn


def now(value):
    call = Future()
    call.set_result(value)
    return call


@pytest.mark.timeout(60)
def test_shards_with_nothing_left_to_do_do_not_hold_up_the_others():
    began, after = [], []

    def script(shard):
        began.append(shard)
        if shard % 3 == 2:
            after.append((yield from all_of({0: now(shard)}))[0])

    assert flow(range(9), script, 1)
    assert began == list(range(9)) and after == [2, 5, 8]


@pytest.mark.timeout(60)
def test_at_most_so_many_shards_are_open_however_many_calls_each_has():
    open_now, most = set(), []

    def script(shard):
        open_now.add(shard)
        most.append(len(open_now))
        yield from all_of({0: now(None)})
        assert (yield from all_of({"a": now(1), "b": now(2)})) == {"a": 1, "b": 2}
        open_now.discard(shard)

    assert flow(range(12), script, 3) and max(most) == 3 and not open_now


@pytest.mark.timeout(60)
def test_an_error_is_raised_while_other_calls_are_under_way_and_a_stop_lets_what_began_end():
    failed, never = Future(), Future()
    failed.set_exception(DataError("refused"))
    with pytest.raises(DataError, match="refused"):
        flow([0], lambda shard: all_of({"a": never, "b": failed}), 1)
    stop, ended = [], []

    def script(shard):
        yield from all_of({0: now(None)})
        stop.append(shard)
        for _ in range(1 + shard):  # one is still under way when the other has ended
            yield from all_of({0: now(None)})
        ended.append(shard)

    assert not flow(range(9), script, 2, stop) and ended == [0, 1]


def test_answers_of_other_weights_than_the_pool_has_are_refused():
    answer = types.SimpleNamespace(version=1)
    found, rollout = [], types.SimpleNamespace(version=1, generate_apart=lambda requests, sampling: now(answer))

    def script(shard):
        found.append((yield from drawn(rollout, [], None)))

    assert flow([0], script, 1) and found == [answer]
    rollout.version = 2
    with pytest.raises(VersionMismatch, match="version 1 arrived where version 2 is required"):
        flow([0], script, 1)
