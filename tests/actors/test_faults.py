"""The decision table, row by row."""

import pytest

from actors.faults import Decision, Failure, Limits, decide

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
