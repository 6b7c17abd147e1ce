"""A pool of interchangeable workers: one death is one retry of one item.

Items are submitted from any thread and answered through ordinary futures. Each worker has at most `per_worker` items; a worker that
dies or overruns its deadline is replaced and its items are given to others; a worker's own error is raised at once.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import ray
from ray.actor import ActorHandle

from actors.faults import Decision, Failure, Limits, decide
from actors.waiting import classify, translate
from ctrlrl.errors import DeadlineExceeded, WorkerLost

Call = Callable[[ActorHandle], ray.ObjectRef]


@dataclass(eq=False)
class _Item:
    call: Call
    future: Future
    failures: int = 0


@dataclass(eq=False)
class _Worker:
    index: int
    actor: ActorHandle
    started: float
    ready: bool = False
    items: dict[_Item, float] = field(default_factory=dict)


class Pool:
    """`size` workers made by `start(index) -> (actor, ref that is done when it is ready)`."""

    def __init__(
        self,
        name: str,
        start: Callable[[int], tuple[ActorHandle, ray.ObjectRef]],
        size: int,
        *,
        start_deadline_s: float,
        call_deadline_s: float,
        per_worker: int = 2,
        limits: Limits | None = None,
    ):
        self.name, self.replaced = name, 0
        self._start, self._limits, self._per_worker = start, limits or Limits(), per_worker
        self._start_deadline_s, self._call_deadline_s = start_deadline_s, call_deadline_s
        self._lock = threading.RLock()
        self._queue: deque[_Item] = deque()
        self._workers: list[_Worker] = []
        self._broken: Exception | None = None
        self._all_ready: Future = Future()
        for index in range(size):
            self._add(index)
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name=f"{name}-deadlines", daemon=True).start()

    def submit(self, call: Call) -> Future:
        """Queue one item; `call` makes the remote call on the worker that is chosen for it."""
        item = _Item(call, Future())
        with self._lock:
            if self._broken:
                item.future.set_exception(self._broken)
            else:
                self._queue.append(item)
                self._dispatch()
        return item.future

    def wait_ready(self) -> None:
        """Return when all workers have started; raises what a worker raised in starting."""
        self._all_ready.result(self._start_deadline_s + 5)

    def each(self, call: Call) -> list[ray.ObjectRef]:
        """Make a call on every living worker (those still starting too: calls of a worker keep their order)."""
        with self._lock:
            return [call(worker.actor) for worker in self._workers]

    def pids(self) -> list[int]:
        """Process ids of the ready workers."""
        with self._lock:
            return ray.get([worker.actor.pid.remote() for worker in self._workers if worker.ready], timeout=60)

    def close(self) -> None:
        """End all workers; items not answered yet get WorkerLost."""
        self._closed.set()
        self._break(WorkerLost(f"{self.name} workers were closed"))

    def _add(self, index: int) -> None:
        actor, ready = self._start(index)
        worker = _Worker(index, actor, time.monotonic())
        self._workers.append(worker)
        ready.future().add_done_callback(lambda future: self._on_ready(worker, future))

    def _on_ready(self, worker: _Worker, future: Future) -> None:
        with self._lock:
            if worker not in self._workers:
                return
            error = future.exception()
            if error is not None:
                self._failed(worker, None, error)
                return
            worker.ready = True
            if all(w.ready for w in self._workers) and not self._all_ready.done():
                self._all_ready.set_result(None)
            self._dispatch()

    def _dispatch(self) -> None:
        while self._queue:
            free = [w for w in self._workers if w.ready and len(w.items) < self._per_worker]
            if not free:
                return
            worker, item = min(free, key=lambda w: len(w.items)), self._queue.popleft()
            worker.items[item] = time.monotonic()
            item.call(worker.actor).future().add_done_callback(lambda future, w=worker, i=item: self._on_done(w, i, future))

    def _on_done(self, worker: _Worker, item: _Item, future: Future) -> None:
        with self._lock:
            if worker.items.pop(item, None) is None:
                return  # taken away meanwhile: the worker was given up
            error = future.exception()
            if error is not None:
                self._failed(worker, item, error)
            self._dispatch()
        if error is None and not item.future.done():
            item.future.set_result(future.result())

    def _failed(self, worker: _Worker, item: _Item | None, error: Exception) -> None:
        failure = classify(error)
        if item is not None:
            item.failures += 1
        decision = decide("pool", failure, item.failures if item else 1, self.replaced, self._limits)
        told = translate(error, f"{self.name} worker {worker.index}")
        if decision is Decision.RAISE:
            if failure is Failure.USER_ERROR and item is not None:
                item.future.set_exception(told)
            else:
                if item is not None:
                    self._queue.appendleft(item)
                self._break(told)
            return
        if item is not None:
            self._queue.appendleft(item)
        self._replace(worker)

    def _replace(self, worker: _Worker) -> None:
        """Give up a worker: its other items go back to the queue, a new worker takes its place."""
        if worker not in self._workers:
            return
        self._workers.remove(worker)
        self._queue.extendleft(reversed(worker.items))
        worker.items.clear()
        ray.kill(worker.actor)
        self.replaced += 1
        self._add(worker.index)

    def _break(self, error: Exception) -> None:
        with self._lock:
            self._broken = error
            waiting = [*self._queue, *(item for worker in self._workers for item in worker.items)]
            workers, self._workers = self._workers, []
            self._queue.clear()
            if not self._all_ready.done():
                self._all_ready.set_exception(error)
        for item in waiting:
            if not item.future.done():
                item.future.set_exception(error)
        for worker in workers:
            ray.kill(worker.actor)

    def _watch(self) -> None:
        while not self._closed.wait(1.0):
            now = time.monotonic()
            with self._lock:
                for worker in list(self._workers):
                    if not worker.ready and now - worker.started > self._start_deadline_s:
                        self._failed(
                            worker,
                            None,
                            DeadlineExceeded(f"{self.name} worker {worker.index} did not start within {self._start_deadline_s:g} s"),
                        )
                    for item, since in list(worker.items.items()):
                        if now - since > self._call_deadline_s * len(worker.items) and worker in self._workers:
                            worker.items.pop(item)
                            self._failed(
                                worker,
                                item,
                                DeadlineExceeded(f"{self.name} worker {worker.index} did not answer within {self._call_deadline_s:g} s"),
                            )
