"""Work on many numbered shards at once: a bounded number under way, each a chain of remote calls, all files written by one thread."""

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait

from jobs.launch import StopRequest

_TICK_S = 1.0  # how soon a request to stop is seen


class Flow:
    """Remote calls under way and what follows each. Everything that follows runs in the thread that called `run`."""

    def __init__(self):
        self._following: dict[Future, Callable[[object], None]] = {}
        self._open: set[int] = set()

    def after(self, call: Future, then: Callable[[object], None]) -> None:
        """When `call` is done, `then(its result)`; its error is raised by `run`."""
        self._following[call] = then

    def close(self, shard: int) -> None:
        """Nothing is left to do for a shard: another may begin."""
        self._open.discard(shard)

    def run(self, shards: Iterable[int], begin: Callable[[int], None], at_once: int, stop: StopRequest) -> bool:
        """`begin` every shard, at most `at_once` being open; after a request to stop only those that are. True if all were done."""
        todo = iter(shards)
        following = next(todo, None)
        while self._following or (following is not None and not stop):
            while following is not None and len(self._open) < at_once and not stop:
                self._open.add(following)
                begin(following)
                following = next(todo, None)
            for call in wait(self._following, _TICK_S, FIRST_COMPLETED).done:
                self._following.pop(call)(call.result())
        return following is None
