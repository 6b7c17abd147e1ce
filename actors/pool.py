"""A pool of interchangeable workers: one death is one retry of one item, and their number follows the work.

Items are submitted from any thread and answered through ordinary futures. A worker that dies or overruns its deadline is replaced and
its items are given to others; a worker's own error is raised at once. One thread owns the pool's state and handles its events in turn:
Ray's callbacks only post to it, since they must not call Ray themselves.

A worker is asked for, gets a place and a process, builds its model, and *enters*: it is brought to the pool's version and checked.
Only then does it get items. It leaves when it is idle beyond the pool's minimum, or when its node is about to be taken away.
"""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

import ray
from ray.actor import ActorHandle

from actors.faults import Decision, Failure, Limits, Losses, counts, decide
from actors.gauges import show_pool
from actors.member import Call, Entry, Item, Member
from actors.placement import ClusterConfig, draining_nodes, shortage
from actors.scaling import Workers, may_leave, workers_to_add
from actors.waiting import classify, translate
from actors.watch import Lifeline, locate
from ctrlrl.errors import PlacementError, WorkerLost

_TICK_S = 1.0
_log = logging.getLogger("ctrlrl")


class Pool:
    """Workers made by `create(index)`, each of which then answers `build(actor)`. Indices below size.min have reserved places."""

    def __init__(
        self,
        name: str,
        create: Callable[[int], ActorHandle],
        build: Call,
        size: Workers,
        cluster: ClusterConfig,
        *,
        enter: Callable[[ActorHandle], Entry | None] = lambda _: None,
        per_worker: int = 2,
        item_attempts: int = 3,
    ):
        self.name, self.replaced, self.recoveries = name, 0, []
        self._create, self._build, self._enter_call, self._size, self._per_worker = create, build, enter, size, per_worker
        self._limits, self._cluster = Limits(item_attempts, cluster.replacements), cluster
        self._todo: deque[Item] = deque()
        self._workers: list[Member] = []
        self._version = 0
        self._next_own = size.min
        self._node_of: dict[int, str] = {}  # reserved place -> node on which its last worker ran
        self._draining: set[str] = set()
        self._losses, self._open_losses = Losses(), deque()  # open: those not made good yet, since when
        self._ticked = self._work_waited = self._placed = time.monotonic()
        self._broken: Exception | None = None
        self._all_ready: Future = Future()
        if size.min == 0:
            self._all_ready.set_result(None)
        self._renewals: list[tuple[Future, set[Member]]] = []
        self._events: queue.Queue[Callable[[], None]] = queue.Queue()
        for _ in range(size.min):
            self._add()
        threading.Thread(target=self._run, name=f"pool-{name}", daemon=True).start()

    def submit(self, call: Call) -> Future:
        """Queue one item; `call` makes the remote call on the worker that is chosen for it. Cancelling the future takes it back."""
        item = Item(call, Future())
        self._events.put(lambda: self._todo.append(item))
        return item.future

    def wait_ready(self) -> None:
        """Return when the least number of workers is ready; raises what a worker raised in starting."""
        self._all_ready.result()

    def renew(self, version: int) -> None:
        """Only workers that entered with `version` get items from now on; returns when those at work have done so or are lost."""
        done: Future = Future()
        self._events.put(lambda: self._begin_renewal(version, done))
        done.result()

    def pids(self) -> list[int]:
        """Process ids of the workers that have a process."""
        found: Future = Future()
        self._events.put(lambda: found.set_result([w.life.where.pid for w in self._workers if w.placed]))
        return found.result(60)

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
                self._dispatch()
                if time.monotonic() - self._ticked >= _TICK_S:
                    self._tick()
            except queue.Empty:
                self._events.put(self._tick)
            except Exception as error:  # a bug of ours must not leave callers waiting for ever
                self._break(error)
        while True:  # answer those who come late
            self._events.get()()
            self._refuse_all()

    def _add(self) -> None:
        taken = {w.index for w in self._workers}
        places = (i for i in range(self._size.min) if i not in taken and self._node_of.get(i) not in self._draining)
        index = next(places, self._next_own)
        self._next_own += index == self._next_own
        worker = Member(index, index >= self._size.min, self._create(index), Lifeline(f"{self.name} worker {index}"))
        self._workers.append(worker)
        self._when(locate(worker.actor), worker, self._on_placed)
        self._when(self._build(worker.actor), worker, lambda worker, _: self._enter(worker))

    def _when(self, ref: ray.ObjectRef, worker: Member, then: Callable[[Member, object], None]) -> None:
        """Call `then(worker, result)` in the pool's thread, unless the call failed or the worker has been given up meanwhile."""

        def done(future: Future) -> None:
            if worker in self._workers and future.exception() is not None:
                self._failed(worker, None, future.exception())
            elif worker in self._workers:
                then(worker, future.result())

        ref.future().add_done_callback(lambda future: self._events.put(lambda: done(future)))

    def _on_placed(self, worker: Member, where) -> None:
        worker.life.where = where
        worker.expect("loading its model", self._cluster.start_deadline_s)
        if not worker.own_place:
            self._node_of[worker.index] = where.node_id

    def _enter(self, worker: Member) -> None:
        entry = self._enter_call(worker.actor)
        if entry is None:
            self._admit(worker, 0)
            return
        version, ref, check = entry
        worker.expect(f"taking version {version}", self._cluster.call_deadline_s)

        def entered(worker: Member, result: object) -> None:
            check(result)  # what it raises ends the pool
            self._admit(worker, version) if version == self._version else self._enter(worker)  # else overtaken by another

        self._when(ref, worker, entered)

    def _admit(self, worker: Member, version: int) -> None:
        worker.version = version
        worker.expect("waiting for work")
        worker.life.alive(f"it entered with version {version}")
        if self._open_losses:
            self.recoveries.append(time.monotonic() - self._open_losses.popleft())
        if sum(w.version is not None for w in self._workers) >= self._size.min and not self._all_ready.done():
            self._all_ready.set_result(None)
        self._settle()

    def _begin_renewal(self, version: int, done: Future) -> None:
        self._version = version
        at_work = [w for w in self._workers if w.version is not None]
        self._renewals.append((done, set(at_work)))
        for worker in at_work:
            worker.version = None
            self._enter(worker)
        self._settle()

    def _settle(self) -> None:
        for done, waiting in self._renewals:
            waiting.intersection_update(w for w in self._workers if w.version is None)
            if not waiting and not self._broken:
                done.set_result(None)
        self._renewals = [r for r in self._renewals if r[1] or self._broken]

    def _dispatch(self) -> None:
        while self._todo and not self._broken:
            free = [w for w in self._workers if w.version is not None and not w.leaving and len(w.items) < self._per_worker]
            if not free:
                return
            worker, item = min(free, key=lambda w: len(w.items)), self._todo.popleft()
            if not item.future.running() and not item.future.set_running_or_notify_cancel():
                continue
            worker.items[item] = time.monotonic()
            done = item.call(worker.actor).future()
            done.add_done_callback(lambda future, w=worker, i=item: self._events.put(lambda: self._on_done(w, i, future)))

    def _on_done(self, worker: Member, item: Item, future: Future) -> None:
        if worker.items.pop(item, None) is None:
            return  # taken away meanwhile: the worker was given up
        for waiting in worker.items:
            worker.items[waiting] = time.monotonic()  # its turn begins now
        if future.exception() is not None:
            self._failed(worker, item, future.exception())
            return
        worker.items_done += 1
        worker.since = time.monotonic()
        self._losses.progress()
        worker.life.alive("an item was done")
        item.future.set_result(future.result())

    def _failed(self, worker: Member, item: Item | None, error: BaseException) -> None:
        failure, now = classify(error), time.monotonic()
        if item is not None:
            item.failures += failure is not Failure.NODE_LOST  # which is not the item's doing
        decision = decide("pool", failure, item.failures if item else 0, self._losses.lately(now), self._limits)
        told = translate(error, str(worker.life))
        if decision is Decision.RAISE:
            if item is not None:
                item.future.set_exception(told)
            if item is None or failure is not Failure.USER_ERROR:
                self._break(told)  # else a bad item: the worker goes on
            return
        self._losses.note(now, counts(worker.own_place, worker.items_done))
        self.replaced += 1
        self._open_losses.append(now)
        _log.warning("%s; its work goes to others", told)
        if item is not None:
            self._todo.appendleft(item)
        self._remove(worker)

    def _remove(self, worker: Member) -> None:
        """End a worker; its items go back to the queue."""
        if worker not in self._workers:
            return
        self._workers.remove(worker)
        self._todo.extendleft(reversed(worker.items))
        worker.items.clear()
        ray.kill(worker.actor)
        self._settle()

    def _break(self, error: BaseException) -> None:
        if self._broken:
            return
        self._broken = error
        self._todo.extend(item for worker in self._workers for item in worker.items)
        self._refuse_all()
        workers, self._workers = self._workers, []
        for worker in workers:
            ray.kill(worker.actor)

    def _refuse_all(self) -> None:
        """Answer everybody who waits with the error that ended the pool."""
        for future in (self._all_ready, *(done for done, _ in self._renewals), *(item.future for item in self._todo)):
            if not future.done():
                future.set_exception(self._broken)
        self._renewals.clear()
        self._todo.clear()

    def _tick(self) -> None:
        """Once a second: deadlines, nodes that are taken away, how many workers there should be."""
        self._ticked = now = time.monotonic()
        for worker in list(self._workers):
            if late := worker.late(now, self._cluster.call_deadline_s):
                self._failed(worker, *late)
            elif worker.to_be_asked(now):  # so that the death of one without work is noticed before there is some
                self._when(locate(worker.actor), worker, Member.answered)
        self._check_places(now)
        self._heed_drains()
        self._resize(now)
        self._dispatch()
        show_pool(self.name, [w.version is not None for w in self._workers], len(self._todo), self.replaced)

    def _check_places(self, now: float) -> None:
        """When somebody waits for workers and none has a place (or, in starting, one has not), there is an end."""
        starting = not self._all_ready.done()
        waited_for = self._todo or self._renewals or starting
        placed = [w.placed for w in self._workers]
        if not waited_for or all(placed if starting else [any(placed)]):
            self._placed = now
        limit = self._cluster.placement_deadline_s + self._cluster.start_deadline_s  # a place, and a process with its imports
        if now - self._placed > limit:
            self._break(PlacementError(f"no place for a {self.name} worker within {limit:g} s: {shortage()}"))

    def _heed_drains(self) -> None:
        self._draining = draining_nodes()
        for worker in list(self._workers):
            if worker.heed(self._draining) and not worker.items:
                self._remove(worker)

    def _resize(self, now: float) -> None:
        if self._todo:
            self._work_waited = now
        staying = [w for w in self._workers if not w.leaving]
        coming = sum(w.version is None for w in staying)
        if now >= self._losses.pause_until and not self._broken:
            for _ in range(workers_to_add(self._size, len(staying), coming, len(self._todo), self._per_worker)):
                self._add()
        for worker in staying:
            idle_s, present = now - max(worker.since, self._work_waited), sum(not w.leaving for w in self._workers)
            if may_leave(self._size, present, worker.own_place, len(worker.items), len(self._todo), idle_s):
                self._remove(worker)
