"""Work on many numbered shards at once: a bounded number under way, each a chain of remote calls, all files written by one thread."""

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait

from jobs.parts.launch import StopRequest

_TICK_S = 1.0  # how soon a request to stop is seen


class Flow:
    """Remote calls under way and what follows each. Everything that follows runs in the thread that called `run`."""

    def __init__(self):
        self._following: dict[Future, tuple[int, Callable[[object], None]]] = {}
        self._shard = -1  # whose turn it is

    def after(self, call: Future, then: Callable[[object], None]) -> None:
        """When `call` is done, `then(its result)`; its error is raised by `run`. To be called by `begin` or by such a `then`."""
        self._following[call] = self._shard, then

    def run(self, shards: Iterable[int], begin: Callable[[int], None], at_once: int, stop: StopRequest) -> bool:
        """`begin` every shard, at most `at_once` being open; after a request to stop only those that are. True if all were done.

        A shard is open as long as a call of it is under way, so one for which nothing is left to do never holds up the others.
        """
        todo = iter(shards)
        following = next(todo, None)
        while self._following or (following is not None and not stop):
            while following is not None and self._open() < at_once and not stop:
                self._shard = following
                begin(following)
                following = next(todo, None)
            for call in wait(self._following, _TICK_S, FIRST_COMPLETED).done:
                self._shard, then = self._following.pop(call)
                then(call.result())
        return following is None

    def _open(self) -> int:
        return len({shard for shard, _ in self._following.values()})
