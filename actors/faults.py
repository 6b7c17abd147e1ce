"""What to do about a failure: a pure table of (what failed, how, how often) -> decision. Knows nothing of Ray."""

from collections import deque
from dataclasses import dataclass
from enum import Enum
from typing import Literal

WINDOW_S = 3600.0  # failures longer ago are forgotten: runs last days, and machines come and go
_LONGEST_PAUSE_S = 60.0


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
    """How often a failure may be met before giving up: of one item (pool) or step (group), of all workers of a crowd within WINDOW_S.

    node_losses: of a pool's item, whose nodes went without notice while it was being done. Machines are lost without its doing, so there
    may be more of them than of its own failures; but one that takes its machine down every time must come to an end.
    """

    item_attempts: int = 3
    replacements: int = 8
    node_losses: int = 6


def decide(crowd: Literal["pool", "group"], failure: Failure, item_failures: int, replaced: int, limits: Limits) -> Decision:
    """The decision for a failure, given how often this item failed in this way or this step at all (this time included) and how many
    workers were replaced lately (see `counts` and Losses)."""
    if failure is Failure.USER_ERROR:
        return Decision.RAISE  # the same input would fail again
    attempts = limits.node_losses if crowd == "pool" and failure is Failure.NODE_LOST else limits.item_attempts
    if item_failures >= attempts or replaced >= limits.replacements:
        return Decision.RAISE
    if crowd == "group":
        return Decision.RESTART
    return Decision.REPLACE


def counts(own_place: bool, items_done: int) -> bool:
    """Whether the loss of a pool's worker counts towards the limit. One beyond the reserved number that has done work does not: such
    workers run on machines that are taken away, and its items are given to others."""
    return not (own_place and items_done > 0)


class Losses:
    """The losses of one crowd: how many there were lately, and when the next replacement may be asked for. Times are in seconds.

    replaced: all of them. recoveries: how long each took that was made good.
    """

    def __init__(self):
        self.pause_until, self.replaced, self.recoveries = 0.0, 0, []
        self._times, self._in_a_row, self._open = [], 0, deque()

    def lately(self, now: float) -> int:
        """Those that count and are in the window."""
        return sum(now - time <= WINDOW_S for time in self._times)

    def note(self, now: float, counted: bool = True) -> None:
        """One more."""
        self._times += [now] * counted
        self._in_a_row += 1
        self.replaced += 1
        self._open.append(now)
        self.pause_until = now + pause_s(self._in_a_row)

    def made_good(self, now: float) -> None:
        """A worker is at work that was not: the replacement of the first that was lost, if one was."""
        if self._open:
            self.recoveries.append(now - self._open.popleft())

    def progress(self) -> None:
        """Work was done since: the next loss is a first one again."""
        self._in_a_row = 0


def pause_s(failures_in_a_row: int) -> float:
    """Seconds to wait before the next replacement: none after a first failure, then 1, 2, 4 … up to a minute."""
    return 0.0 if failures_in_a_row <= 1 else min(_LONGEST_PAUSE_S, 2.0 ** (failures_in_a_row - 2))
