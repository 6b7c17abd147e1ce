"""The pool on real Ray actors: order, retries, replacement, deadlines, and clear ends."""

import os
import signal
import time

import pytest

from actors.placement import ClusterConfig, Resources
from actors.pool import Pool
from actors.scaling import Workers, fixed
from ctrlrl.errors import DataError, DeadlineExceeded, PlacementError, VersionMismatch, WorkerLost


@pytest.fixture
def worker_class(ray_cluster):
    """A worker that squares, and can be told to fail in every way."""

    forked = Resources(cpus=0.1).environment({}, ("ctrlrl.errors",))

    @ray_cluster.remote(max_restarts=0, **forked)
    class Worker:
        def build(self, fails):
            if fails:
                raise DataError("cannot start: no file")

        def square(self, x):
            time.sleep(0.01)
            return x * x

        def refuse(self, x):
            raise DataError(f"row {x} is bad")

        def die_once(self, x, marker):
            if not os.path.exists(marker):
                open(marker, "w").close()
                os.kill(os.getpid(), signal.SIGKILL)
            return x

        def die(self):
            os.kill(os.getpid(), signal.SIGKILL)

        def hang(self, seconds):
            time.sleep(seconds)
            return "late"

    return Worker


def make_pool(worker_class, size=2, fails=False, call_deadline_s=60, **settings):
    cluster = ClusterConfig(start_deadline_s=60, call_deadline_s=call_deadline_s)
    size = size if isinstance(size, Workers) else fixed(size)
    return Pool("test", lambda index: worker_class.remote(), lambda worker: worker.build.remote(fails), size, cluster, **settings)


@pytest.fixture
def pools():
    """Pools to close at the end."""
    made = []
    yield made
    for pool in made:
        pool.close()


def test_every_item_is_answered_once_and_in_its_place(worker_class, pools):
    pools.append(pool := make_pool(worker_class, 3))
    pool.wait_ready()
    futures = [pool.submit(lambda w, x=x: w.square.remote(x)) for x in range(50)]
    assert [f.result(60) for f in futures] == [x * x for x in range(50)]
    assert len(set(pool.pids())) == 3 and pool.replaced == 0


def test_killed_workers_are_replaced_and_nothing_is_lost(worker_class, pools):
    pools.append(pool := make_pool(worker_class))
    pool.wait_ready()
    futures = [pool.submit(lambda w, x=x: w.square.remote(x)) for x in range(200)]
    before = pool.pids()
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    assert [f.result(60) for f in futures] == [x * x for x in range(200)]
    assert pool.replaced == 2 and not set(pool.pids()) & set(before)


def test_an_item_that_kills_its_worker_is_retried(worker_class, pools, tmp_path):
    pools.append(pool := make_pool(worker_class, 1))
    marker = str(tmp_path / "died")
    assert pool.submit(lambda w: w.die_once.remote(7, marker)).result(60) == 7
    assert pool.replaced == 1


def test_an_item_that_always_kills_ends_in_a_named_error(worker_class, pools):
    pools.append(pool := make_pool(worker_class, 1, item_attempts=2))
    with pytest.raises(WorkerLost, match=r"test worker 0 on node [\d.]+ \(pid \d+\): worker died"):
        pool.submit(lambda w: w.die.remote()).result(60)
    with pytest.raises(WorkerLost):  # the pool has ended and says so to whoever comes later
        pool.submit(lambda w: w.square.remote(1)).result(60)


def test_a_users_error_is_raised_at_once_and_the_pool_goes_on(worker_class, pools):
    pools.append(pool := make_pool(worker_class, 1))
    with pytest.raises(DataError, match="^row 3 is bad$"):
        pool.submit(lambda w: w.refuse.remote(3)).result(60)
    assert pool.submit(lambda w: w.square.remote(3)).result(60) == 9
    assert pool.replaced == 0


def test_an_error_in_starting_is_told_to_all(worker_class, pools):
    pools.append(pool := make_pool(worker_class, fails=True))
    future = pool.submit(lambda w: w.square.remote(1))
    with pytest.raises(DataError, match="cannot start: no file"):
        pool.wait_ready()
    with pytest.raises(DataError, match="cannot start: no file"):
        future.result(60)


def test_a_worker_that_hangs_is_given_up_at_its_deadline(worker_class, pools):
    pools.append(pool := make_pool(worker_class, 1, call_deadline_s=1, item_attempts=2))
    pool.wait_ready()
    with pytest.raises(
        DeadlineExceeded, match=r"(?s)no answer within 1 s. test worker 0 on node.*sign of life.*is waiting.*Worker.hang \("
    ):
        pool.submit(lambda w: w.hang.remote(300)).result(60)


def test_closing_answers_those_who_wait(worker_class):
    pool = make_pool(worker_class, 1)
    pool.wait_ready()
    futures = [pool.submit(lambda w: w.hang.remote(300)) for _ in range(4)]
    pool.close()
    for future in futures:
        with pytest.raises(WorkerLost, match="closed"):
            future.result(60)


def test_an_elastic_pool_grows_while_work_waits_and_gives_back_what_is_idle(worker_class, pools):
    pools.append(pool := make_pool(worker_class, Workers(min=0, max=2, idle_s=1)))
    pool.wait_ready()  # of nobody
    assert pool.pids() == []
    futures = [pool.submit(lambda w, x=x: w.hang.remote(0.3)) for x in range(12)]
    until(lambda: len(pool.pids()) == 2)
    os.kill(pool.pids()[0], signal.SIGKILL)
    assert [f.result(60) for f in futures] == ["late"] * 12
    until(lambda: pool.pids() == [])
    assert pool.submit(lambda w: w.square.remote(3)).result(60) == 9  # and again
    assert pool.replaced == 1


def test_only_workers_that_entered_with_the_present_version_get_work(worker_class, pools):
    entered, present = [], [0]

    def enter(worker):
        version = present[0]
        return version, worker.square.remote(version), lambda answer: entered.append((version, answer))

    pools.append(pool := make_pool(worker_class, 2, enter=enter))
    pool.wait_ready()
    present[0] = 3
    pool.renew(3)
    assert sorted(entered) == [(0, 0), (0, 0), (3, 9), (3, 9)]
    os.kill(pool.pids()[0], signal.SIGKILL)
    assert [pool.submit(lambda w: w.square.remote(2)).result(60) for _ in range(8)] == [4] * 8
    until(lambda: entered[4:] == [(3, 9)])  # the one that joined later, too

    def refuse(_):
        raise VersionMismatch("wrong weights")

    pools.append(pool := make_pool(worker_class, 1, enter=lambda worker: (0, worker.square.remote(1), refuse)))
    with pytest.raises(VersionMismatch, match="wrong weights"):
        pool.wait_ready()


def test_work_for_which_no_place_is_found_ends_with_what_there_is(worker_class):
    cluster = ClusterConfig(start_deadline_s=1, placement_deadline_s=1)
    pool = Pool(
        "test", lambda _: worker_class.options(num_gpus=4).remote(), lambda w: w.build.remote(False), Workers(min=0, max=2), cluster
    )
    pool.wait_ready()
    with pytest.raises(PlacementError, match="no place for a test worker within 2 s: the cluster has .* 0 of 0 GPU free"):
        pool.submit(lambda w: w.square.remote(1)).result(60)


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
