"""A worker of a pool and the items it has: where it is on its way from being asked for to being given up."""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import ray
from ray.actor import ActorHandle

from actors.faults import Failure
from actors.watch import Lifeline
from ctrlrl.errors import CtrlrlError, DeadlineExceeded

_ASK_S = 3.0  # without work
_log = logging.getLogger("ctrlrl")

Call = Callable[[ActorHandle], ray.ObjectRef]
# What brings a worker to the present version: that version, the call's ref, and a check of its result that raises if it is wrong.
Entry = tuple[int, ray.ObjectRef, Callable[[object], None]]


@dataclass(eq=False)
class Item:
    """One piece of work and who waits for it. name: for messages. failures, node_losses: how often it was given up by a worker that did
    it, and by a node that went without notice."""

    call: Call
    future: Future
    name: str
    failures: int = 0
    node_losses: int = 0

    def note(self, failure: Failure, announced: bool) -> int:
        """One more failure; how many of its kind there were. announced: its node was to be taken away, which is nobody's fault."""
        if failure is Failure.NODE_LOST:
            self.node_losses += not announced
            return self.node_losses
        self.failures += 1
        return self.failures

    def given_up(self, error: Exception) -> Exception:
        """What its holder is told after the last attempt, which ended with `error`."""
        tried = self.failures + self.node_losses
        if tried < 2 or not isinstance(error, CtrlrlError):
            return error
        lost = f" ({self.node_losses} of them lost their node)" if self.node_losses else ""
        told = type(error)(f"{self.name} was given up after {tried} attempts{lost}. The last: {error}")
        told.__cause__ = error
        return told


@dataclass(eq=False)
class Member:
    """One worker. own_place: not one of the reserved ones. version: with which it has entered (None: it gets no items).
    barred: what keeps it from entering, until there is another version."""

    index: int
    own_place: bool
    actor: ActorHandle
    life: Lifeline
    version: int | None = None
    barred: BaseException | None = None
    leaving: bool = False
    items_done: int = 0
    items: dict[Item, float] = field(default_factory=dict)  # since when
    since: float = field(default_factory=time.monotonic)
    _doing: str = ""
    _limit_s: float = float("inf")
    _asked: float | None = None  # whether it is alive, since when

    @property
    def placed(self) -> bool:
        """Whether it has a process."""
        return self.life.where is not None

    @property
    def stands(self) -> bool:
        """Whether it has its model, and has entered or would if it could."""
        return self.version is not None or self.barred is not None

    def expect(self, doing: str, limit_s: float = float("inf")) -> None:
        """It is `doing` something from now on, for `limit_s` seconds at most."""
        self._doing, self.since, self._limit_s = doing, time.monotonic(), limit_s

    def entered(self, version: int) -> None:
        """It gets items from now on."""
        self.version = version
        self.expect("waiting for work")
        self.life.alive(f"it entered with version {version}")

    def did_one(self) -> None:
        """It has done an item."""
        self.items_done += 1
        self.since = time.monotonic()
        self.life.alive("an item was done")

    def heed(self, draining: set[str]) -> bool:
        """Whether it leaves, because its node is one of those that are about to be taken away."""
        if self.placed and self.life.where.node_id in draining and not self.leaving:
            self.leaving = True
            _log.warning("%s gets no more work: its node is about to be taken away", self.life)
        return self.leaving

    def to_be_asked(self, now: float) -> bool:
        """Whether to ask if it is alive: when it has nothing to do, and no earlier question is open."""
        asks = self.version is not None and not self.items and self._asked is None and now - self.since >= _ASK_S
        self._asked = now if asks else self._asked
        return asks

    def answered(self, _) -> None:
        """It is alive."""
        self._asked = None
        self.life.alive("it said so")

    def late(self, now: float, call_deadline_s: float) -> tuple[Item | None, DeadlineExceeded] | None:
        """What it is late with: an item (which is taken from it) or its own way in. Waiting for a place is no fault of its."""
        first = next(iter(self.items.items()), None)  # a worker answers in order: only the first can be late
        if first and now - first[1] > call_deadline_s:
            self.items.pop(first[0])
            return first[0], DeadlineExceeded(f"no answer within {call_deadline_s:g} s. {self.life.report()}")
        if self.placed and now - self.since > self._limit_s:
            return None, DeadlineExceeded(f"{self._doing} took over {self._limit_s:g} s. {self.life.report()}")
        if self._asked is not None and not self.items and now - self._asked > call_deadline_s:
            return None, DeadlineExceeded(f"no sign of life within {call_deadline_s:g} s. {self.life.report()}")
        return None
