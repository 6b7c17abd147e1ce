"""How many workers a pool should have: pure decisions from counts and times. Knows nothing of Ray."""

import math
from typing import Any

from pydantic import Field, model_validator

from ctrlrl.config import Section


class Workers(Section):
    """Number of workers of a pool: a number, or { min, max, idle_s } for a pool that grows and shrinks with the cluster.

    min: workers whose places are reserved together with the rest of the job's. max: further ones are asked for while work waits, each
    with a place of its own, and given back after idle_s seconds without work (in PPO: longer than the training part of a step).
    """

    min: int = Field(ge=0)
    max: int = Field(gt=0)
    idle_s: float = Field(60, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _from_a_number(cls, given: Any) -> Any:
        if isinstance(given, dict | Workers):
            return given
        if not isinstance(given, int) or given <= 0:
            raise ValueError("give a number above 0, or { min, max }")
        return {"min": given, "max": given}

    @model_validator(mode="after")
    def _in_order(self):
        if self.min > self.max:
            raise ValueError(f"min = {self.min} is above max = {self.max}: give a number, or min and max in this order")
        return self


def fixed(number: int) -> Workers:
    """A pool that always has the same number of workers."""
    return Workers(min=number, max=number)


def workers_to_add(size: Workers, present: int, coming: int, queued: int, per_worker: int) -> int:
    """How many workers to ask for. present: all that are not leaving; coming: those of them that take no items yet; queued: items that
    no worker has. What is coming will take its share, so the same need is not asked for twice."""
    lacking = size.min - present
    helpful = math.ceil((queued - coming * per_worker) / per_worker)
    return max(0, min(max(lacking, helpful), size.max - present))


def may_leave(size: Workers, present: int, own_place: bool, items: int, queued: int, idle_s: float) -> bool:
    """Whether a worker is given back: only one beyond min, without items, for which nothing has waited for long enough."""
    return own_place and present > size.min and items == 0 and queued == 0 and idle_s >= size.idle_s
