"""The decision table, row by row."""

import pytest

from actors.faults import WINDOW_S, Decision, Failure, Limits, Losses, counts, decide, pause_s

LIMITS = Limits(item_attempts=3, replacements=4)


@pytest.mark.parametrize(
    ("crowd", "failure", "item_failures", "replaced", "decision"),
    [
        ("pool", Failure.WORKER_DIED, 1, 0, Decision.REPLACE),
        ("pool", Failure.WORKER_DIED, 2, 3, Decision.REPLACE),
        ("pool", Failure.WORKER_DIED, 3, 0, Decision.RAISE),
        ("pool", Failure.WORKER_DIED, 1, 4, Decision.RAISE),
        ("pool", Failure.NODE_LOST, 1, 0, Decision.REPLACE),
        ("pool", Failure.NODE_LOST, 5, 0, Decision.REPLACE),  # machines go without an item's doing ...
        ("pool", Failure.NODE_LOST, 6, 0, Decision.RAISE),  # ... but not always the one that it is on
        ("pool", Failure.TIMED_OUT, 1, 0, Decision.REPLACE),
        ("pool", Failure.OUT_OF_MEMORY, 1, 0, Decision.REPLACE),
        ("pool", Failure.OUT_OF_MEMORY, 2, 0, Decision.REPLACE),
        ("pool", Failure.USER_ERROR, 1, 0, Decision.RAISE),
        ("group", Failure.WORKER_DIED, 1, 0, Decision.RESTART),
        ("group", Failure.NODE_LOST, 2, 3, Decision.RESTART),
        ("group", Failure.TIMED_OUT, 3, 0, Decision.RAISE),
        ("group", Failure.WORKER_DIED, 1, 4, Decision.RAISE),
        ("group", Failure.USER_ERROR, 1, 0, Decision.RAISE),
    ],
)
def test_the_table(crowd, failure, item_failures, replaced, decision):
    assert decide(crowd, failure, item_failures, replaced, LIMITS) is decision


@pytest.mark.parametrize(("own_place", "items_done", "counted"), [(False, 0, True), (False, 9, True), (True, 0, True), (True, 1, False)])
def test_a_spot_worker_that_has_worked_may_go_without_being_counted(own_place, items_done, counted):
    assert counts(own_place, items_done) is counted


def test_losses_are_made_good_in_their_order():
    losses = Losses()
    losses.made_good(5.0)  # a first worker: nothing was lost
    losses.note(10.0)
    losses.note(11.0, counted=False)
    losses.made_good(14.0)
    assert losses.recoveries == [4.0] and losses.replaced == 2
    losses.made_good(20.0)
    assert losses.recoveries == [4.0, 9.0]


def test_pauses_grow_while_nothing_gets_done_and_losses_are_forgotten_after_an_hour():
    assert [pause_s(n) for n in (1, 2, 3, 4, 8, 9, 50)] == [0, 1, 2, 4, 60, 60, 60]
    losses = Losses()
    losses.note(100.0)
    assert (losses.pause_until, losses.lately(100.0)) == (100.0, 1)
    losses.note(100.0)
    losses.note(101.0, counted=False)
    assert (losses.pause_until, losses.lately(101.0)) == (103.0, 2)
    losses.progress()
    losses.note(200.0)
    assert losses.pause_until == 200.0
    assert losses.lately(100.0 + WINDOW_S) == 3 and losses.lately(101.0 + WINDOW_S) == 1
