"""Work on many numbered shards at once: a bounded number under way, each a script of remote calls, all files written by one thread."""

from collections.abc import Callable, Collection, Generator, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

from jobs.parts.launch import StopRequest

_TICK_S = 1.0  # how soon a request to stop is seen

# How a shard is made, as a generator: it yields the calls that it waits for, and goes on when one of them is done.
Script = Generator[Collection[Future], None, Any]


def flow(shards: Iterable[int], script: Callable[[int], Script], at_once: int, stop: StopRequest | bool = False) -> bool:
    """Run the script of every shard in this thread, at most `at_once` being under way; after a request to stop only those that have begun.

    True if all were run. An error of a call is raised here, by the script that asks for its result.
    """
    todo, waiting = iter(shards), {}  # waiting: the calls of each script that has not come to its end
    following = next(todo, None)
    while waiting or (following is not None and not stop):
        while following is not None and len(waiting) < at_once and not stop:
            _go_on(script(following), waiting)
            following = next(todo, None)
        done = wait({call for calls in waiting.values() for call in calls}, _TICK_S, FIRST_COMPLETED).done
        for each in [each for each, calls in waiting.items() if not done.isdisjoint(calls)]:
            _go_on(each, waiting)
    return following is None


def _go_on(script: Script, waiting: dict[Script, Collection[Future]]) -> None:
    calls = next(script, None)
    if calls is None:
        waiting.pop(script, None)
    else:
        waiting[script] = calls


def all_of(calls: Mapping[Any, Future]) -> Script:
    """In a script, `yield from` this: the results of all calls, by their keys."""
    left = list(calls.values())
    while left:
        yield left
        found = {call: call.result() for call in left if call.done()}  # an error is raised now, whatever else is under way
        left = [call for call in left if call not in found]
    return {key: call.result() for key, call in calls.items()}
