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
