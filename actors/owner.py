"""A thread that owns a state: it handles what is posted to it in turn, and answers what it has promised, whatever happens in it."""

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import NoReturn

from ctrlrl.errors import CtrlrlError, WorkerLost

_log = logging.getLogger("ctrlrl")


class _Ended(BaseException):
    """Leaves the event that ended its owner."""


class Owner:
    """A daemon thread that handles the `events` that are posted; `turn` follows each, and is called when none came for `turn_s` seconds.

    Its promises are futures that their events answer, sooner or later, or else its end does, with the error that ended it: exactly once
    each. An event that raises ends it; `last` is what it does then.
    """

    def __init__(self, name: str, events: queue.Queue, turn: Callable[[], None], turn_s: float, last: Callable[[], None]):
        self._name, self._events, self._turn, self._turn_s, self._last = name, events, turn, turn_s, last
        self._lock = threading.Lock()  # of the two that follow
        self._promised: set[Future] = set()
        self.error: BaseException | None = None  # that ended it
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin to handle events."""
        self._thread.start()

    def promise(self, event: Callable[[Future], None]) -> Future:
        """A future, and have `event(future)` handled, which sees to its answer; after the end it is refused at once."""
        future: Future = Future()
        with self._lock:
            if self.error is None:
                self._promised.add(future)
                self._events.put(lambda: event(future))
                return future
        future.set_exception(self.error)
        return future

    def wanted(self, future: Future) -> bool:
        """Whether its holder has not cancelled a promise; from now on that is too late. In the owner's thread, as all below."""
        wanted = future.running() or future.set_running_or_notify_cancel()
        if not wanted:
            self._promised.discard(future)
        return wanted

    def answer(self, future: Future, value: object = None, error: BaseException | None = None) -> None:
        """Answer a promise."""
        self._promised.discard(future)
        if self.wanted(future):
            future.set_exception(error) if error is not None else future.set_result(value)

    def end(self, error: BaseException) -> NoReturn:
        """Refuse all that is promised, and all that is asked for from now on, with `error`; leaves the event, and the thread ends."""
        self._refuse(error)
        raise _Ended

    def join(self, limit_s: float) -> bool:
        """Wait for the thread's end; whether it has come within `limit_s` seconds. From any thread: its own does not wait."""
        own = threading.current_thread() is self._thread
        if not own:
            self._thread.join(limit_s)
        return own or not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while True:
                try:
                    event = self._events.get(timeout=self._turn_s)
                except queue.Empty:
                    event = None
                if event:
                    event()
                self._turn()
        except _Ended:
            pass
        except BaseException as error:  # whatever it is, callers must not wait for ever
            self._refuse(error if isinstance(error, CtrlrlError) else self._fault(error))
        try:
            self._last()
        except Exception as error:  # such as: the cluster is gone
            _log.warning("%s: %s", self._name, error)

    def _refuse(self, error: BaseException) -> None:
        with self._lock:
            self.error, promised = error, list(self._promised)
        for future in promised:
            self.answer(future, error=error)

    def _fault(self, error: BaseException) -> WorkerLost:
        _log.error("%s: an error of its own", self._name, exc_info=error)
        fault = WorkerLost(f"{self._name} ended because of an error of its own ({type(error).__name__}: {error})")
        fault.__cause__ = error
        return fault
