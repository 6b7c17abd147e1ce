"""The protocol of the pool, explored: the real pool with simulated actors, through thousands of orders of what can happen.

Whatever happens, every future is answered exactly once, no item is done again after its answer or by two living workers, nothing waits
for ever, and the thread and the actors end with the pool.
"""

import threading
from concurrent.futures import Future
from functools import partial

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ray.exceptions import ActorDiedError, NodeDiedError, ObjectLostError
from simulation import NODES, Actor, Choices, Cluster

import actors.waiting
from actors.ending import end_all
from actors.group import GroupConfig, TrainerGroup
from actors.placement import ClusterConfig, Placement
from actors.pool import Pool
from actors.recovery import Restarts, ready
from actors.scaling import Workers, fixed
from ctrlrl.errors import CtrlrlError, DataError, GroupLost, PlacementError, WorkerLost

CLUSTER = ClusterConfig(placement_deadline_s=20, start_deadline_s=20, call_deadline_s=10, replacements=8)
SIZES = (fixed(1), fixed(2), Workers(min=1, max=3, idle_s=5), Workers(min=0, max=2, idle_s=5))
KINDS = ("good", "good", "good", "bad", "kills its worker", "kills its node", "hangs")
LIMIT_S = 900  # of simulated time, to the last answer


class Work:
    """An item, and what has become of it. sent: the actors that it was given to. done: how often one of them has done it."""

    def __init__(self, number: int, kind: str):
        self.number, self.kind, self.sent, self.done, self.future = number, kind, [], 0, None

    def call(self, actor: Actor):
        assert not (self.future and self.future.done()), "given to a worker after its answer"
        assert not any(a.alive for a in self.sent), "given to a second worker while the first lives"
        self.sent.append(actor)
        return actor.call(self)


class Exploration:
    """One run of a pool: `act` does what is chosen, `finish` lets all go well and checks what has become of everything."""

    def __init__(self, choices: Choices, cluster: Cluster):
        self.choices, self.cluster, self.work, self.callers, self.trace = choices, cluster, [], [], []
        self.version, self.gone, self.ever_gone, self.hung = 0, False, False, set()
        self.size = choices.of(SIZES)
        enter = self.enter if choices.below(2) else lambda _: None
        cluster.actors.clear(), cluster.queues.clear(), cluster.draining.clear()
        self.pool = Pool("p", self.create, lambda a: a.call("build"), self.size, CLUSTER, enter=enter)
        self.events = cluster.queues[0]
        self.events.begun()
        self.ready = self.caller(self.pool.wait_ready, posts=False)

    def create(self, _index: int) -> Actor:
        actor = Actor(self.choices.of([n for n in NODES if n not in self.cluster.draining]))
        self.cluster.actors.append(actor)
        return actor

    def enter(self, actor: Actor):
        version = self.version
        return version, actor.call(("enter", version)), lambda answer: None

    def caller(self, wait, posts: bool) -> tuple[threading.Thread, Future]:
        """Somebody who waits in a thread of its own; returns once it has posted what it waits for."""
        outcome, before = Future(), self.events.puts

        def run():
            try:
                outcome.set_result(wait())
            except CtrlrlError as error:
                outcome.set_exception(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        while posts and self.events.puts == before and thread.is_alive():
            thread.join(0.0001)
        self.callers.append((thread, outcome))
        return thread, outcome

    # --- what can happen ---

    def act(self) -> None:
        """One of the things that can happen now."""
        living = [a for a in self.cluster.actors if a.alive]
        open_ = [a for a in living if a.calls and a not in self.hung]
        acts = [self.step] * 3 * bool(self.events.qsize()) + [lambda: self.answer(self.choices.of(open_))] * 4 * bool(open_)
        acts += [self.submit, self.submit, lambda: self.pass_time(1), lambda: self.pass_time(11)]
        if living:
            acts += [lambda: self.die(self.choices.of(living)), lambda: self.lose_node(self.choices.of(living).node)]
            acts += [lambda: self.hung.add(self.choices.of(living)), lambda: self.drain(self.choices.of(living).node)]
        acts += [self.publish, self.lose_weights, self.cancel]
        act = self.choices.of(acts)
        act()

    def step(self) -> None:
        self.events.step()

    def answer(self, actor: Actor) -> None:
        """The actor does the first of its calls."""
        purpose, ref = actor.calls[0]
        match purpose:
            case Work():
                self.do(actor, purpose)
                return
            case "locate":
                answer = self.cluster.where(actor)
            case ("enter", version) if self.gone or version < self.version:
                actor.calls.pop(0)
                ref.answer.set_exception(ObjectLostError("00" * 28, None, ""))
                return
            case _:
                answer = None
        actor.calls.pop(0)
        ref.answer.set_result(answer)

    def do(self, actor: Actor, work: Work) -> None:
        if work.kind == "hangs":
            self.hung.add(actor)
        elif work.kind == "kills its worker":
            self.die(actor)
        elif work.kind == "kills its node":
            self.lose_node(actor.node)
        else:
            ref = actor.calls.pop(0)[1]
            work.done += 1
            ref.answer.set_exception(DataError("bad")) if work.kind == "bad" else ref.answer.set_result(work.number)

    def submit(self) -> None:
        work = Work(len(self.work), self.choices.of(KINDS))
        work.future = self.pool.submit(work.call, f"item {work.number}")
        self.work.append(work)

    def pass_time(self, seconds: float) -> None:
        self.cluster.clock.now += seconds
        if not self.events.qsize():
            self.step()

    def die(self, actor: Actor) -> None:
        actor.die(ActorDiedError(), self.choices)

    def lose_node(self, node: str) -> None:
        for actor in [a for a in self.cluster.actors if a.alive and a.node == node]:
            actor.die(NodeDiedError("node lost"), self.choices)
        self.cluster.draining.discard(node)

    def drain(self, node: str) -> None:
        if not self.cluster.draining:
            self.cluster.draining.add(node)

    def publish(self) -> None:
        self.version, self.gone = self.version + 1, False
        self.caller(partial(self.pool.renew, self.version), posts=True)

    def lose_weights(self) -> None:
        self.gone = self.ever_gone = True

    def cancel(self) -> None:
        if self.work:
            self.choices.of(self.work).future.cancel()

    # --- the end ---

    def waiting(self) -> list:
        """Whoever has no answer."""
        return [w for w in self.work if not w.future.done()] + [t for t, _ in self.callers if t.is_alive()]

    def finish(self) -> None:
        """From now on every actor that does not hang answers at once: everybody must get an answer; then the pool closes."""
        end = self.cluster.clock.now + LIMIT_S
        while self.waiting() and self.cluster.clock.now < end:
            self.settle()
            for thread, _ in self.callers:
                thread.join(0.0002)
        for thread, _ in self.callers:
            thread.join(60)
        assert not self.waiting(), f"waits for ever: {[getattr(w, 'kind', w) for w in self.waiting()]}"
        self.check()
        self.events.release()
        self.pool.close()
        self.events.reader.join(60)
        assert not self.events.reader.is_alive(), "the pool's thread outlives it"
        assert not any(a.alive for a in self.cluster.actors), "a worker outlives its pool"
        late = self.pool.submit(lambda a: a.call("late"))
        assert isinstance(late.exception(0), CtrlrlError)

    def settle(self) -> None:
        """All events are handled and every actor answers one call; where none has one, time passes."""
        while self.events.qsize() and self.events.reader.is_alive():
            self.step()
        open_ = [a for a in self.cluster.actors if a.alive and a.calls and a not in self.hung]
        for actor in open_:
            if actor.alive and actor.calls:
                self.answer(actor)
        if not open_ and self.events.reader.is_alive():
            self.pass_time(2)

    def check(self) -> None:
        """Every answer is the right one."""
        ended = None if self.events.reader.is_alive() else self.pool.submit(lambda a: None).exception(0)
        assert "of its own" not in str(ended), ended
        for _, outcome in self.callers:
            error = outcome.exception(0)
            assert error is None or ended is not None or (self.ever_gone and isinstance(error, GroupLost))
        for work in self.work:
            if work.future.cancelled():
                continue
            error = work.future.exception(0)
            if error is None:
                assert work.kind == "good" and work.future.result() == work.number and work.done >= 1
            elif work.kind == "bad" and type(error) is DataError:
                assert len(work.sent) == work.done == 1 or any(not a.alive for a in work.sent[:-1])
            else:
                assert isinstance(error, CtrlrlError), repr(error)
                assert ended is not None or (self.ever_gone and isinstance(error, GroupLost))
            assert len(work.sent) <= 25, f"an item that {work.kind} was drawn {len(work.sent)} times"


def explore(data: bytes, cluster: Cluster) -> Exploration:
    """The run that `data` chooses."""
    choices = Choices(data)
    exploration = Exploration(choices, cluster)
    while not choices.over:
        exploration.act()
    exploration.finish()
    return exploration


@pytest.fixture
def simulated_cluster(monkeypatch) -> Cluster:
    """In place of Ray and the clock."""
    cluster = Cluster()
    cluster.put_in_place(monkeypatch)
    return cluster


@settings(max_examples=1000, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(st.binary(min_size=4, max_size=60))
def test_whatever_happens_everybody_gets_one_answer(simulated_cluster, data):
    explore(data, simulated_cluster)


def test_an_item_that_takes_its_node_down_every_time_ends_with_its_name_and_spares_those_behind_it(simulated_cluster):
    run = Exploration(Choices(bytes([3, 0])), simulated_cluster)  # workers with places of their own, as on spot nodes
    killer, good = Work(0, "kills its node"), Work(1, "good")
    for number in range(12):  # every worker has done work before it meets the item: its loss is not counted
        first = Work(2 + number, "good")
        run.work.append(first)
        first.future = run.pool.submit(first.call, "a first item")
        if number == 0:
            killer.future, good.future = run.pool.submit(killer.call, "shard 7"), run.pool.submit(good.call, "shard 8")
    with pytest.raises(WorkerLost, match=r"^shard 7 was given up after 6 attempts \(6 of them lost their node\). The last: p worker"):
        while not killer.future.done() and simulated_cluster.clock.now < 1000 + LIMIT_S:
            run.settle()
        killer.future.result(0)
    assert len(killer.sent) <= 12  # six times it was being done; else it waited behind another
    run.work += [killer, good]
    run.finish()


def test_the_end_of_the_cluster_is_said_at_once(simulated_cluster, monkeypatch):
    run = Exploration(Choices(bytes([0, 0])), simulated_cluster)
    work = Work(0, "good")
    work.future = run.pool.submit(work.call)
    began, simulated_cluster.gone = simulated_cluster.clock.now, True
    while not work.future.done():
        run.pass_time(1)
        run.step()
    with pytest.raises(PlacementError, match=r"the cluster is gone.*memory.*The same command \(of a training: with --resume\)"):
        work.future.result(0)
    with pytest.raises(PlacementError, match="the cluster is gone"):
        run.ready[1].result(5)
    assert simulated_cluster.clock.now - began < 5

    cluster = Cluster()
    cluster.put_group_in_place(monkeypatch, Choices(b""))
    group, began = start_group(), cluster.clock.now
    group.wait_ready()
    cluster.gone = True
    for actor in cluster.actors:
        actor.hangs = True
    with pytest.raises(PlacementError, match="the cluster is gone"):
        group.call(step_of, 0)
    assert cluster.clock.now - began <= 10


# --- groups ---


def start_group() -> TrainerGroup:
    return TrainerGroup("policy", "policy", "a model", GroupConfig(ranks=2), Placement(None, {}, {}), CLUSTER, seed=0)


def step_of(trainer, batch):
    """What a rank is told to do."""


@settings(max_examples=500, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(st.binary(min_size=4, max_size=80))
def test_whatever_happens_a_group_answers_in_rank_order_or_is_lost_whole_and_begins_anew(data):
    cluster, choices = Cluster(), Choices(data)
    with pytest.MonkeyPatch.context() as patch:
        cluster.put_group_in_place(patch, choices)
        group, restarts, lost, began = start_group(), Restarts(CLUSTER), False, cluster.clock.now
        try:
            ready([group], CLUSTER)
            for step in range(4):
                try:
                    answers = group.call(step_of, step)
                    assert [where for where, _ in answers] == cluster.actors[-2:] and [n for _, n in answers] == [step] * 2
                except GroupLost as error:
                    assert not any(a.alive for a in cluster.actors)
                    restarts.after(error, step, [group])
                    assert len(group.pids()) == 2
        except CtrlrlError:  # any other ends the job
            lost = True
        assert not lost or not any(a.alive for a in cluster.actors)
        assert not any(a.alive for a in cluster.actors[:-2])  # those of earlier starts
        assert cluster.clock.now - began < 12 * (CLUSTER.placement_deadline_s + 3 * CLUSTER.start_deadline_s + CLUSTER.call_deadline_s)
        group.close()
        group.close()
        assert not any(a.alive for a in cluster.actors)


def test_a_call_that_fails_late_does_not_end_the_ranks_that_came_after(monkeypatch):
    cluster = Cluster()
    cluster.put_group_in_place(monkeypatch, Choices(b""))
    group = start_group()
    group.wait_ready()
    wait = actors.waiting.ray.wait

    def restarted_meanwhile(refs, **given):
        monkeypatch.setattr(actors.waiting.ray, "wait", wait)
        group.restart()
        return wait(refs, **given)

    monkeypatch.setattr(actors.waiting.ray, "wait", restarted_meanwhile)
    with pytest.raises(GroupLost, match="policy rank 0 on node 10.0.0.1 .*: worker died"):
        group.call(step_of, 0)
    group.wait_ready()
    assert [a.alive for a in cluster.actors] == [False, False, True, True]


def test_all_are_closed_and_the_first_error_is_told():
    closed = []

    def fail(name):
        closed.append(name)
        raise WorkerLost(name)

    with pytest.raises(WorkerLost, match="^first$"):
        end_all(partial(fail, "first"), partial(closed.append, "second"), partial(fail, "third"), partial(closed.append, "place"))
    assert closed == ["first", "second", "third", "place"]
