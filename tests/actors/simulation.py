"""A cluster made of choices: actors, calls, clock and the pool's queue, which a test moves one event at a time.

The pool's thread is the real one, but takes an event from its queue only when it is told to. What happens next (an answer, a death, a
second that passes) is a choice; a byte string holds the choices of one run, so a run is repeated exactly.
"""

import queue
import threading
from collections import deque
from concurrent.futures import Future
from functools import partial
from types import SimpleNamespace

from ray.exceptions import ActorDiedError, NodeDiedError, RayTaskError

from actors.watch import Whereabouts
from ctrlrl.errors import DataError

NODES = ("a", "b", "c")
_STUCK_S = 20.0  # of real time: no event takes so long


class Choices:
    """The numbers of a byte string, then zeros."""

    def __init__(self, data: bytes):
        self._data, self._next = data, 0

    @property
    def over(self) -> bool:
        """Whether all were used."""
        return self._next >= len(self._data)

    def below(self, n: int) -> int:
        """A number from 0 to n - 1."""
        self._next += 1
        return self._data[self._next - 1] % n if self._next <= len(self._data) else 0

    def of(self, things):
        """One of them."""
        return things[self.below(len(things))]


class Clock:
    """The module `time`, with a clock that moves when it is told to."""

    def __init__(self):
        self.now = 1000.0
        self.monotonic = self.time = self.perf_counter = lambda: self.now

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds

    def strftime(self, *_) -> str:
        """A time of day for messages."""
        return "12:00:00"

    localtime = staticmethod(lambda *_: None)


class Ref:
    """An ObjectRef."""

    def __init__(self):
        self.answer = Future()

    def future(self) -> Future:
        """As Ray gives it."""
        return self.answer


class Actor:
    """An actor: answers its calls in order, while it lives. calls: those that are open, each with what it is for."""

    def __init__(self, node: str):
        self.node, self.alive, self.calls = node, True, []

    def call(self, purpose: object) -> Ref:
        """Begin a call; on a dead actor it fails at once."""
        ref = Ref()
        self.calls.append((purpose, ref))
        if not self.alive:
            self.die(ActorDiedError())
        return ref

    def die(self, error: Exception, order: Choices | None = None) -> None:
        """All open calls fail, in any order."""
        self.alive, calls, self.calls = False, self.calls, []
        while calls:
            calls.pop(order.below(len(calls)) if order else 0)[1].answer.set_exception(error)


class Rank(Actor):
    """A TrainerRank."""

    hangs = False

    def __getattr__(self, method: str):
        return SimpleNamespace(remote=lambda *arguments: self.call((method, *arguments)))

    def answer(self, luck: int, cluster: "Cluster") -> None:
        """Do the first call: with the least luck it fails."""
        (method, *arguments), ref = self.calls.pop(0)
        if luck == 11 and method == "build":
            ref.answer.set_exception(RayTaskError("build", "DistNetworkError: code: -98, name: EADDRINUSE", RuntimeError()))
        elif luck == 11 and method == "do":
            ref.answer.set_exception(RayTaskError("do", "", DataError("bad")).as_instanceof_cause())
        else:
            place = cluster.where(self)
            ref.answer.set_result({"locate": place, "meeting_point": (place.address, 1), "do": (self, *arguments[1:])}.get(method))


class Events:
    """A queue whose reader goes on only when the test says so. puts: how many there were, from any thread."""

    def __init__(self):
        self._events, self._idle, self._go = deque(), threading.Semaphore(0), threading.Semaphore(0)
        self.free, self.reader, self.puts = False, None, 0

    def put(self, event) -> None:
        """As queue.Queue has it."""
        self._events.append(event)
        self.puts += 1

    def get(self, timeout: float = 0):
        """The next event when the test says so; queue.Empty if there is none."""
        if self.free:
            threading.Event().wait(0.001)
        else:
            self.reader = threading.current_thread()
            self._idle.release()
            self._go.acquire()
        try:
            return self._events.popleft()
        except IndexError:
            raise queue.Empty from None

    def qsize(self) -> int:
        """How many wait."""
        return len(self._events)

    def begun(self) -> None:
        """Return when the reader waits for the first time."""
        assert self._idle.acquire(timeout=_STUCK_S)

    def step(self) -> None:
        """Let the reader take one event, or find none; return when it waits again or has ended."""
        self._go.release()
        while not self._idle.acquire(timeout=0.002):
            if not self.reader.is_alive():
                return

    def release(self) -> None:
        """Let the reader run freely from now on."""
        self.free = True
        self._go.release()


class Cluster:
    """What the pool's modules take for Ray and the clock; see `put_in_place`."""

    def __init__(self):
        self.clock, self.draining, self.actors, self.queues, self.gone = Clock(), set(), [], [], False
        self.ray = SimpleNamespace(kill=self.kill, ObjectRef=Ref)

    def put_in_place(self, monkeypatch) -> None:
        """Have the modules of actors/ use this cluster until the test ends."""
        import actors.member
        import actors.placement
        import actors.pool
        import actors.watch

        def make_queue() -> Events:
            self.queues.append(Events())
            return self.queues[-1]

        for module in (actors.pool, actors.member, actors.watch):
            monkeypatch.setattr(module, "time", self.clock)
        monkeypatch.setattr(actors.pool, "queue", SimpleNamespace(Queue=make_queue, Empty=queue.Empty))
        monkeypatch.setattr(actors.pool, "ray", self.ray)
        monkeypatch.setattr(actors.pool, "locate", lambda actor: actor.call("locate"))
        monkeypatch.setattr(actors.pool, "draining_nodes", lambda: set(self.draining))
        monkeypatch.setattr(actors.pool, "show_pool", lambda *_: None)
        monkeypatch.setattr(actors.placement, "shortage", lambda: "there is nothing")
        monkeypatch.setattr(actors.placement, "ray", SimpleNamespace(nodes=lambda: [{"Alive": not self.gone}]))
        monkeypatch.setattr(actors.watch.Lifeline, "report", lambda life: str(life))
        monkeypatch.setattr(actors.watch.Lifeline, "shortage", lambda life, sure: "there is no memory" if sure else "")

    def put_group_in_place(self, monkeypatch, choices: "Choices") -> None:
        """Have the modules of groups use this cluster, in which things happen as `choices` say while a group waits."""
        import actors.group
        import actors.placement
        import actors.recovery
        import actors.waiting
        import actors.watch

        monkeypatch.setattr(actors.placement, "ray", SimpleNamespace(nodes=lambda: [{"Alive": not self.gone}]))
        ray = SimpleNamespace(kill=self.kill, get=lambda ref: ref.answer.result(0), put=lambda value: value, ObjectRef=Ref)
        ray.wait = partial(self.wait, choices)
        for module in (actors.waiting, actors.recovery, actors.watch):
            monkeypatch.setattr(module, "time", self.clock)
        for module in (actors.group, actors.waiting):
            monkeypatch.setattr(module, "ray", ray)
        monkeypatch.setattr(actors.group, "locate", lambda actor: actor.call(("locate",)))
        monkeypatch.setattr(actors.waiting, "reports", lambda lives: "".join(map(str, lives)))
        monkeypatch.setattr(actors.group, "TrainerRank", SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self.rank)))

    def rank(self) -> "Rank":
        """A new rank of a group."""
        self.actors.append(Rank(NODES[len(self.actors) % len(NODES)]))
        return self.actors[-1]

    def wait(self, choices: "Choices", refs: list[Ref], num_returns: int, timeout: float) -> tuple[list[Ref], list[Ref]]:
        """ray.wait: things happen until so many are done, or the time is over."""
        end = self.clock.now + timeout
        while sum(ref.answer.done() for ref in refs) < num_returns and self.clock.now < end:
            living = [a for a in self.actors if a.alive]
            able = [a for a in living if not a.hangs and a.calls]
            disasters = ["dies", "hangs", "node lost"] * bool(living and not choices.over)
            match choices.of(["answers"] * 12 * bool(able) + ["time passes"] + disasters):
                case "answers":
                    choices.of(able).answer(choices.below(12), self)
                case "time passes":
                    self.clock.sleep(min(1.0, end - self.clock.now))
                case "dies":
                    choices.of(living).die(ActorDiedError(), choices)
                case "hangs":
                    choices.of(living).hangs = True
                case "node lost":
                    self.lose(choices.of(living).node)
        done = [ref for ref in refs if ref.answer.done()][:num_returns]
        return done, [ref for ref in refs if ref not in done]

    def lose(self, node: str) -> None:
        """A node dies with its actors."""
        for actor in [a for a in self.actors if a.alive and a.node == node]:
            actor.die(NodeDiedError("node lost"))

    def kill(self, actor: Actor) -> None:
        """ray.kill."""
        actor.die(ActorDiedError())

    def where(self, actor: Actor) -> Whereabouts:
        """The answer of `locate`."""
        return Whereabouts(actor.node, "10.0.0.1", self.actors.index(actor))
