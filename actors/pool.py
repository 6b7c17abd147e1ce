"""A pool of interchangeable workers: one death is one retry of one item, and their number follows the work.

Items are submitted from any thread and answered through ordinary futures. A worker that dies or overruns its deadline is replaced and
its items are given to others; a worker's own error is raised at once. One thread (owner.py) owns the pool's state and handles its events
in turn: Ray's callbacks only post to it, since they must not call Ray themselves.

A worker is asked for, gets a place and a process, builds its model, and *enters*: it is brought to the pool's version and checked.
Only then does it get items. It leaves when it is idle beyond the pool's minimum, or when its node is about to be taken away. If what it
enters with is gone (the node that published the weights was lost), it waits for the next version, and that is nobody's failure.
"""

import logging
import queue
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import NoReturn

import ray
from ray.actor import ActorHandle

from actors.ending import end_all
from actors.faults import Decision, Failure, Limits, Losses, counts, decide
from actors.gauges import show_pool
from actors.member import Call, Entry, Item, Member
from actors.owner import Owner
from actors.placement import ClusterConfig, PlaceWatch, draining_nodes
from actors.renewals import Renewals, out_of_reach
from actors.scaling import Workers, may_leave, workers_to_add
from actors.waiting import classify, explained, input_lost, translate
from actors.watch import Lifeline, locate
from ctrlrl.errors import DeadlineExceeded, WorkerLost

_TICK_S = 1.0
_CLOSE_S = 60.0
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
        self.name = name
        self._create, self._build, self._enter_call, self._size, self._per_worker = create, build, enter, size, per_worker
        self._limits, self._cluster = Limits(item_attempts, cluster.replacements), cluster
        self._todo: deque[Item] = deque()
        self._workers: list[Member] = []
        self._version = 0
        self._next_own = size.min
        self._node_of: dict[int, str] = {}  # reserved place -> node on which its last worker ran
        self._draining: set[str] = set()
        self._losses = Losses()
        self._ticked = self._work_waited = time.monotonic()
        self._places = PlaceWatch(name, cluster, self._ticked)
        self._events: queue.Queue[Callable[[], None]] = queue.Queue()
        self._owner = Owner(f"pool-{name}", self._events, self._turn, _TICK_S, self._end_workers)
        self._renewals = Renewals(self._owner)
        self._least_ready, self._all_ready = False, self._owner.promise(lambda _: None)
        self._events.put(self._tick)  # asks for the first workers
        self._owner.start()

    @property
    def replaced(self) -> int:
        """How many workers were lost and replaced."""
        return self._losses.replaced

    @property
    def recoveries(self) -> list[float]:
        """Seconds from the loss of a worker to the entry of another."""
        return self._losses.recoveries

    def submit(self, call: Call, name: str = "an item") -> Future:
        """Queue one item; `call` makes the remote call on the worker that is chosen for it, `name` is for messages. Cancelling the future
        takes it back."""
        return self._owner.promise(lambda future: self._todo.append(Item(call, future, name)))

    def wait_ready(self) -> None:
        """Return when the least number of workers is ready; raises what a worker raised in starting."""
        self._all_ready.result()

    def at_work(self) -> list[ActorHandle]:
        """The workers that get items, and those that wait for other weights to do so."""
        working = lambda: [w.actor for w in self._workers if w.stands and not w.leaving]  # noqa: E731
        return self._owner.promise(lambda found: self._owner.answer(found, working())).result()

    def renew(self, version: int) -> None:
        """Only workers that entered with `version` get items from now on; returns when those at work have done so or are lost."""
        self._owner.promise(lambda done: self._begin_renewal(version, done)).result()

    def pids(self) -> list[int]:
        """Process ids of the workers that have a process."""
        found = self._owner.promise(lambda found: self._owner.answer(found, [w.life.where.pid for w in self._workers if w.placed]))
        return found.result(60)

    def close(self) -> None:
        """End all workers and the pool's thread; items not answered yet get WorkerLost."""
        self._events.put(lambda: self._break(WorkerLost(f"{self.name} workers were closed")))
        if not self._owner.join(_CLOSE_S):
            raise DeadlineExceeded(f"{self.name} workers were not closed within {_CLOSE_S:g} s")

    def _turn(self) -> None:
        """What follows every event, and every second without one."""
        self._settle()
        self._dispatch()
        if time.monotonic() - self._ticked >= _TICK_S:
            self._tick()
            self._dispatch()

    def _add(self) -> None:
        taken = {w.index for w in self._workers}
        places = (i for i in range(self._size.min) if i not in taken and self._node_of.get(i) not in self._draining)
        index = next(places, self._next_own)
        self._next_own += index == self._next_own
        worker = Member(index, index >= self._size.min, self._create(index), Lifeline(f"{self.name} worker {index}"))
        self._workers.append(worker)
        self._when(locate(worker.actor), worker, self._on_placed)
        self._when(self._build(worker.actor), worker, lambda worker, _: self._enter(worker))

    def _when(self, ref: ray.ObjectRef, worker: Member, then: Callable, without: Callable | None = None) -> None:
        """Call `then(worker, result)` in the pool's thread, unless the call failed or the worker has been given up meanwhile; if what the
        call was given is gone, `without(worker, error)`."""

        def done(future: Future) -> None:
            error = future.exception()
            if worker not in self._workers:
                return
            if error is None:
                then(worker, future.result())
            elif without and input_lost(error):
                without(worker, error)
            else:
                self._failed(worker, None, error)

        ref.future().add_done_callback(lambda future: self._events.put(lambda: done(future)))

    def _on_placed(self, worker: Member, where) -> None:
        worker.life.where = where
        worker.expect("loading its model", self._cluster.start_deadline_s)
        if not worker.own_place:
            self._node_of[worker.index] = where.node_id

    def _enter(self, worker: Member) -> None:
        worker.barred = None
        entry = self._enter_call(worker.actor)
        if entry is None:
            self._admit(worker, 0)
            return
        version, ref, check = entry
        worker.expect(f"taking version {version}", self._cluster.call_deadline_s)

        def entered(worker: Member, result: object) -> None:
            check(result)  # what it raises ends the pool
            self._admit(worker, version) if version == self._version else self._enter(worker)  # else overtaken by another

        def barred(worker: Member, error: BaseException) -> None:
            if version != self._version:
                self._enter(worker)
                return
            _log.warning("%s waits for other weights: those of version %d are gone (%s)", worker.life, version, type(error).__name__)
            worker.expect("waiting for other weights")
            worker.barred = error

        self._when(ref, worker, entered, barred)

    def _admit(self, worker: Member, version: int) -> None:
        worker.entered(version)
        self._losses.made_good(time.monotonic())

    def _begin_renewal(self, version: int, done: Future) -> None:
        self._version = version
        again = [w for w in self._workers if w.stands]
        self._renewals.begin(done, again)
        for worker in again:
            worker.version = None
            self._enter(worker)

    def _settle(self) -> None:
        """Answer whom there is an answer for: all who wait, if no worker can come to the present version."""
        if gone := out_of_reach(self._workers, f"version {self._version} of {self.name}"):
            self._renewals.refuse(gone)
            while self._todo:
                self._owner.answer(self._todo.popleft().future, error=gone)
        self._renewals.settle(self._workers)
        if not self._least_ready and sum(w.stands for w in self._workers) >= self._size.min:
            self._least_ready = True
            self._owner.answer(self._all_ready)

    def _dispatch(self) -> None:
        while self._todo:
            free = [w for w in self._workers if w.version is not None and not w.leaving and len(w.items) < self._per_worker]
            if not free:
                return
            worker, item = min(free, key=lambda w: len(w.items)), self._todo.popleft()
            if not self._owner.wanted(item.future):
                continue
            try:
                ref = item.call(worker.actor)
            except Exception as error:  # it cannot even be sent: the item's fault
                self._owner.answer(item.future, error=translate(error, item.name))
                continue
            worker.items[item] = time.monotonic()
            ref.future().add_done_callback(lambda future, w=worker, i=item: self._events.put(lambda: self._on_done(w, i, future)))

    def _on_done(self, worker: Member, item: Item, future: Future) -> None:
        if item not in worker.items:
            return  # taken away meanwhile: the worker was given up
        error = future.exception()
        if error is not None and classify(error) is not Failure.USER_ERROR:
            item = next(iter(worker.items))  # all its calls fail at once, and only the first was being done
        del worker.items[item]
        for waiting in worker.items:
            worker.items[waiting] = time.monotonic()  # its turn begins now
        if error is not None:
            self._failed(worker, item, error)
            return
        worker.did_one()
        self._losses.progress()
        self._owner.answer(item.future, future.result())

    def _failed(self, worker: Member, item: Item | None, error: BaseException) -> None:
        """A call of `worker` failed, of the item that was being done if one was."""
        failure, now = classify(error), time.monotonic()
        failures = item.note(failure, worker.leaving) if item else 0
        told = translate(error, str(worker.life))
        if decide("pool", failure, failures, self._losses.lately(now), self._limits) is Decision.RAISE:
            if failure in (Failure.WORKER_DIED, Failure.OUT_OF_MEMORY):
                told = explained(told, worker.life.shortage(sure=failure is Failure.OUT_OF_MEMORY))
            if item is not None:
                told = item.given_up(told)
                self._owner.answer(item.future, error=told)
            if item is None or failure is not Failure.USER_ERROR:
                self._break(told)  # else a bad item: the worker goes on
            return
        self._losses.note(now, counts(worker.own_place, worker.items_done))
        _log.warning("%s; its work goes to others", told)
        if item is not None:
            self._todo.appendleft(item)
        self._remove(worker)

    def _remove(self, worker: Member) -> None:
        """End a worker; its items go back to the queue."""
        self._workers.remove(worker)
        self._todo.extendleft(reversed(worker.items))
        worker.items.clear()
        ray.kill(worker.actor)
        self._ticked = float("-inf")  # the next turn looks how many there should be

    def _break(self, error: BaseException) -> NoReturn:
        self._owner.end(error)

    def _end_workers(self) -> None:
        end_all(*(partial(ray.kill, worker.actor) for worker in self._workers))

    def _tick(self) -> None:
        """Once a second: deadlines, nodes that are taken away, how many workers there should be."""
        self._ticked = now = time.monotonic()
        for worker in list(self._workers):
            if late := worker.late(now, self._cluster.call_deadline_s):
                self._failed(worker, *late)
            elif worker.to_be_asked(now):  # so that the death of one without work is noticed before there is some
                self._when(locate(worker.actor), worker, Member.answered)
        waited_for = bool(self._todo or self._renewals or not self._least_ready)
        self._places.look(now, waited_for, not self._least_ready, [w.placed for w in self._workers])
        self._heed_drains()
        self._resize(now)
        show_pool(self.name, [w.version is not None for w in self._workers], len(self._todo), self.replaced)

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
        if now >= self._losses.pause_until:
            for _ in range(workers_to_add(self._size, len(staying), coming, len(self._todo), self._per_worker)):
                self._add()
        for worker in staying:
            idle_s, present = now - max(worker.since, self._work_waited), sum(not w.leaving for w in self._workers)
            if may_leave(self._size, present, worker.own_place, len(worker.items), len(self._todo), idle_s):
                self._remove(worker)
