"""Kinds of workers that share devices take turns: while one kind is called, the others have given their memory back.

A handle calls its workers within its turn. Who comes while another turn is under way waits for the end of the calls in it, then has the
other kinds rest; so callers need not know of each other, and none is woken for nothing. Workers wake by themselves when they are called.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress

import ray
from ray.actor import ActorHandle

from actors.waiting import LOST

_log = logging.getLogger("ctrlrl")

Turn = Callable[[], AbstractContextManager]


def at_once() -> AbstractContextManager:
    """The turn of those that share no device: always."""
    return nullcontext()


def have_rest(name: str, workers: Sequence[ActorHandle], limit_s: float) -> int:
    """Have these workers of a pool give their devices' memory back, until they are called; bytes that moved. Who is lost, or not done
    within `limit_s` seconds, is the pool's to see to."""
    resting = [worker.rest.remote() for worker in workers]
    done, late = ray.wait(resting, num_returns=len(resting), timeout=limit_s) if resting else ((), ())
    if late:
        _log.warning("%d of %d %s workers have not given their memory back within %g s", len(late), len(resting), name, limit_s)
    moved = 0
    for answer in done:
        with suppress(*LOST):
            moved += ray.get(answer)
    return moved


class Turns:
    """Whose turn it is. Of several kinds that have one turn together, such as policy and value model, all may be called at once."""

    def __init__(self):
        self._changed = threading.Condition()
        self._now, self._inside = "", 0
        self._rests: dict[str, list[Callable[[], int]]] = {}

    def joined(self, turn: str, rest: Callable[[], int]) -> None:
        """One more kind of workers in `turn`; `rest` has them give their memory back (bytes), and does nothing when they have already."""
        with self._changed:
            self._rests.setdefault(turn, []).append(rest)

    def of(self, turn: str) -> Turn:
        """What a handle enters for its calls."""
        return lambda: self._take(turn)

    @contextmanager
    def _take(self, turn: str) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._now == turn or not self._inside)
            if self._now != turn:
                moved = sum(rest() for other, rests in self._rests.items() if other != turn for rest in rests)
                _log.info("turn to %s: the others have moved %.1f MB to their hosts", turn, moved / 1e6)
                self._now = turn
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()
