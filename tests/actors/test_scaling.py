"""How many workers to ask for, and who may leave: the tables, row by row."""

import pytest
from pydantic import ValidationError

from actors.rollout import RolloutConfig
from actors.scaling import Workers, fixed, may_leave, workers_to_add

SIZE = Workers(min=1, max=4, idle_s=10)


@pytest.mark.parametrize(
    ("size", "present", "coming", "queued", "added"),
    [
        (SIZE, 0, 0, 0, 1),  # the least number, also without work
        (SIZE, 1, 0, 0, 0),
        (SIZE, 1, 0, 1, 1),
        (SIZE, 1, 0, 2, 1),  # two items each
        (SIZE, 1, 0, 3, 2),
        (SIZE, 1, 0, 100, 3),  # never above max
        (SIZE, 4, 0, 100, 0),
        (SIZE, 3, 2, 4, 0),  # those that are coming will take it
        (SIZE, 3, 2, 5, 1),
        (SIZE, 0, 0, 9, 4),
        (Workers(min=0, max=2), 0, 0, 0, 0),
        (Workers(min=0, max=2), 0, 0, 1, 1),
        (fixed(3), 2, 0, 0, 1),
        (fixed(3), 3, 0, 50, 0),
    ],
)
def test_workers_to_add(size, present, coming, queued, added):
    assert workers_to_add(size, present, coming, queued, per_worker=2) == added


@pytest.mark.parametrize(
    ("present", "own_place", "items", "queued", "idle_s", "leaves"),
    [
        (2, True, 0, 0, 10, True),
        (2, True, 0, 0, 9.9, False),
        (2, False, 0, 0, 99, False),  # a reserved place is kept anyway
        (1, True, 0, 0, 99, False),
        (2, True, 1, 0, 99, False),
        (2, True, 0, 1, 99, False),
    ],
)
def test_may_leave(present, own_place, items, queued, idle_s, leaves):
    assert may_leave(SIZE, present, own_place, items, queued, idle_s) is leaves


def test_a_number_or_bounds_are_given():
    assert RolloutConfig(workers=3).workers == Workers(min=3, max=3)
    config = RolloutConfig(workers={"min": 1, "max": 5})
    assert len(config.bundles) == 1 and len(config.spare) == 4
    for given, problem in ((0, "give a number above 0"), ({"min": 3, "max": 2}, "min = 3 is above max = 2")):
        with pytest.raises(ValidationError, match=problem):
            RolloutConfig(workers=given)
