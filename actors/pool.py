"""A pool of interchangeable workers: one death is one retry of one item.

Items are submitted from any thread and answered through ordinary futures. Each worker has at most `per_worker` items; a worker that
dies or overruns its deadline is replaced and its items are given to others; a worker's own error is raised at once. One thread owns
the pool's state and handles its events in turn: Ray's callbacks only post to it, since they must not call Ray themselves.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import ray
from ray.actor import ActorHandle

from actors.faults import Decision, Failure, Limits, decide
from actors.placement import ClusterConfig
from actors.waiting import classify, gather, translate
from ctrlrl.errors import DeadlineExceeded, WorkerLost

Call = Callable[[ActorHandle], ray.ObjectRef]
_TICK_S = 1.0


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
    items: dict[_Item, float] = field(default_factory=dict)  # since when


class Pool:
    """`size` workers made by `start(index) -> (actor, ref that is done when it is ready)`."""

    def __init__(
        self,
        name: str,
        start: Callable[[int], tuple[ActorHandle, ray.ObjectRef]],
        size: int,
        cluster: ClusterConfig,
        *,
        per_worker: int = 2,
        item_attempts: int = 3,
    ):
        self.name, self.replaced = name, 0
        self._start, self._per_worker = start, per_worker
        self._limits = Limits(item_attempts, cluster.replacements)
        self._start_deadline_s, self._call_deadline_s = cluster.start_deadline_s, cluster.call_deadline_s
        self._todo: deque[_Item] = deque()
        self._workers: list[_Worker] = []
        self._broken: Exception | None = None
        self._all_ready: Future = Future()
        self._events: queue.Queue[Callable[[], None]] = queue.Queue()
        for index in range(size):
            self._add(index)
        threading.Thread(target=self._run, name=f"pool-{name}", daemon=True).start()

    def submit(self, call: Call) -> Future:
        """Queue one item; `call` makes the remote call on the worker that is chosen for it."""
        item = _Item(call, Future())
        self._events.put(lambda: self._todo.append(item))
        return item.future

    def wait_ready(self) -> None:
        """Return when all workers have started; raises what a worker raised in starting."""
        self._all_ready.result()

    def each(self, call: Call) -> Future:
        """Make a call on every living worker (those still starting too: a worker keeps the order of its calls); a future of the refs."""
        future: Future = Future()
        self._events.put(lambda: future.set_result([call(worker.actor) for worker in self._workers]))
        return future

    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return gather(self.each(lambda actor: actor.pid.remote()).result(60), 60, f"{self.name} process ids")

    def close(self) -> None:
        """End all workers; items not answered yet get WorkerLost."""
        done: Future = Future()
        self._events.put(lambda: (self._break(WorkerLost(f"{self.name} workers were closed")), done.set_result(None)))
        if not self._broken:
            done.result(60)

    def _run(self) -> None:
        while not self._broken:
            try:
                self._events.get(timeout=_TICK_S)()
            except queue.Empty:
                pass
            except Exception as error:  # a bug of ours must not leave callers waiting for ever
                self._break(error)
            self._check_deadlines()
            self._dispatch()
        while True:  # answer those who come late
            self._events.get()()
            while self._todo:
                self._todo.popleft().future.set_exception(self._broken)

    def _add(self, index: int) -> None:
        actor, ready = self._start(index)
        worker = _Worker(index, actor, time.monotonic())
        self._workers.append(worker)
        ready.future().add_done_callback(lambda future: self._events.put(lambda: self._on_ready(worker, future)))

    def _on_ready(self, worker: _Worker, future: Future) -> None:
        if worker not in self._workers:
            return
        if future.exception() is not None:
            self._failed(worker, None, future.exception())
            return
        worker.ready = True
        if all(w.ready for w in self._workers) and not self._all_ready.done():
            self._all_ready.set_result(None)

    def _dispatch(self) -> None:
        while self._todo:
            free = [w for w in self._workers if w.ready and len(w.items) < self._per_worker]
            if not free:
                return
            worker, item = min(free, key=lambda w: len(w.items)), self._todo.popleft()
            worker.items[item] = time.monotonic()
            done = item.call(worker.actor).future()
            done.add_done_callback(lambda future, w=worker, i=item: self._events.put(lambda: self._on_done(w, i, future)))

    def _on_done(self, worker: _Worker, item: _Item, future: Future) -> None:
        if worker.items.pop(item, None) is None:
            return  # taken away meanwhile: the worker was given up
        for waiting in worker.items:
            worker.items[waiting] = time.monotonic()  # its turn begins now
        if future.exception() is None:
            item.future.set_result(future.result())
        else:
            self._failed(worker, item, future.exception())

    def _failed(self, worker: _Worker, item: _Item | None, error: BaseException) -> None:
        failure = classify(error)
        if item is not None:
            item.failures += 1
        decision = decide("pool", failure, item.failures if item else 1, self.replaced, self._limits)
        if decision is Decision.RAISE:
            told = translate(error, f"{self.name} worker {worker.index}")
            if item is not None:
                item.future.set_exception(told)
            if item is None or failure is not Failure.USER_ERROR:
                self._break(told)
            return
        if item is not None:
            self._todo.appendleft(item)
        self._replace(worker)

    def _replace(self, worker: _Worker) -> None:
        """Give up a worker: its other items go back to the queue, a new worker takes its place."""
        if worker not in self._workers:
            return
        self._workers.remove(worker)
        self._todo.extendleft(reversed(worker.items))
        worker.items.clear()
        ray.kill(worker.actor)
        self.replaced += 1
        self._add(worker.index)

    def _break(self, error: BaseException) -> None:
        if self._broken:
            return
        self._broken = error
        for future in (self._all_ready, *(i.future for i in self._todo), *(i.future for w in self._workers for i in w.items)):
            if not future.done():
                future.set_exception(error)
        self._todo.clear()
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.items.clear()
            ray.kill(worker.actor)

    def _check_deadlines(self) -> None:
        now = time.monotonic()
        for worker in list(self._workers):
            late = None
            if not worker.ready and now - worker.started > self._start_deadline_s:
                late = None, DeadlineExceeded(f"{self.name} worker {worker.index} did not start within {self._start_deadline_s:g} s")
            first = next(iter(worker.items.items()), None)  # a worker answers in order: only the first can be late
            if first and now - first[1] > self._call_deadline_s:
                worker.items.pop(first[0])
                late = first[0], DeadlineExceeded(f"{self.name} worker {worker.index} did not answer within {self._call_deadline_s:g} s")
            if late:
                self._failed(worker, *late)
