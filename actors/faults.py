"""What to do about a failure: a pure table of (what failed, how, how often) -> decision. Knows nothing of Ray."""

from dataclasses import dataclass
from enum import Enum
from typing import Literal


class Failure(Enum):
    """How a remote call failed."""

    WORKER_DIED = "worker died"
    NODE_LOST = "node lost"
    OUT_OF_MEMORY = "out of memory"
    TIMED_OUT = "timed out"
    USER_ERROR = "user error"


class Decision(Enum):
    """What the owner of the worker does next."""

    REPLACE = "replace the worker and retry the item"
    RESTART = "restart all ranks from the last checkpoint"
    RAISE = "give up with an error"


@dataclass(frozen=True)
class Limits:
    """How often a failure may be met before giving up: of one item (pool), of all workers of a crowd."""

    item_attempts: int = 3
    replacements: int = 8


def decide(crowd: Literal["pool", "group"], failure: Failure, item_failures: int, replaced: int, limits: Limits) -> Decision:
    """The decision for a failure, given how often this item failed (this time included) and how many workers were replaced so far."""
    if failure is Failure.USER_ERROR:
        return Decision.RAISE  # the same input would fail again
    if item_failures >= limits.item_attempts or replaced >= limits.replacements:
        return Decision.RAISE
    if crowd == "group":
        return Decision.RESTART
    return Decision.REPLACE
