"""A group whose rank hangs or dies: said by name within the deadline, and begun anew."""

import os
import signal

import numpy as np
import pytest

from actors.group import TrainerGroup
from actors.placement import ClusterConfig, Resources, reserve
from actors.policy import Policy, PolicyConfig
from actors.recovery import Restarts
from ctrlrl.data.batches import TokenBatch
from ctrlrl.errors import DeadlineExceeded, GroupLost, WorkerLost
from ctrlrl.models.trainer import TrainerConfig

BATCH = TokenBatch([np.arange(3, 30)], np.array([1]), {}, {})


def test_a_stopped_rank_is_reported_by_name_within_its_deadline_and_a_dead_one_at_once(ray_cluster, models, monkeypatch, caplog):
    met, wait = [], TrainerGroup._wait

    def dies_in_meeting(group, ranks, refs, deadline_s, doing):
        if doing == "naming a meeting point":
            met.append(ranks)
            if len(met) == 1:
                ray_cluster.kill(ranks.actors[0])
                with pytest.raises(ray_cluster.exceptions.RayActorError):  # once it is dead: until then it goes on answering
                    while True:
                        ray_cluster.get(ranks.actors[0].__ray_ready__.remote(), timeout=60)
                refs = [ranks.actors[0].meeting_point.remote()]  # it may have answered before
        return wait(group, ranks, refs, deadline_s, doing)

    cluster = ClusterConfig(placement_deadline_s=120, start_deadline_s=240, call_deadline_s=120)
    train = TrainerConfig(dtype="float32", zero_stage=0)
    config = PolicyConfig(model=models["policy"], ranks=2, train=train, resources=Resources(cpus=0.5))
    place = reserve({"policy": config.bundles}, cluster)
    policy = Policy(config, place, cluster, temperature=1.0, seed=0)
    restarts = Restarts(cluster)
    try:
        policy.wait_ready()
        before = policy.logprobs(BATCH)
        pid = policy.pids()[1]
        os.kill(pid, signal.SIGSTOP)
        with monkeypatch.context() as patch, pytest.raises(GroupLost) as caught:  # a deadline that a busy machine's other calls would miss
            patch.setattr(policy._group, "_cluster", cluster.model_copy(update={"call_deadline_s": 4}))
            policy.logprobs(BATCH)
        text = str(caught.value)
        assert "policy ranks, score: no answer within 4 s" in text
        own = text[text.index("policy rank 1 on node") :]
        assert f"(pid {pid}): last sign of life at " in own and "process is stopped (SIGSTOP)\n" in own and "Thread" in own
        # Of the fresh ranks one dies before they have met: they are lost whole, too, and begin anew once more.
        monkeypatch.setattr(TrainerGroup, "_wait", dies_in_meeting)
        restarts.after(caught.value, 0, [policy])
        assert "policy ranks, naming a meeting point" in caplog.text and len(met) == 2
        assert pid not in policy.pids() and np.array_equal(policy.logprobs(BATCH)[0], before[0])

        os.kill(policy.pids()[1], signal.SIGKILL)  # rank 0 complains of its peer, which is not what is told
        with pytest.raises(GroupLost, match=r"policy rank 1 on node [\d.]+ \(pid \d+\)"):
            policy.logprobs(BATCH)
    finally:
        policy.close()
        place.release()


class Handle:
    """A group that is lost again so many times while it starts."""

    def __init__(self, losses):
        self.losses, self.starts = losses, 0

    def restart(self):
        self.starts += 1

    def wait_ready(self):
        if self.starts <= self.losses:
            raise lost(WorkerLost("rank died"))


def lost(cause):
    error = GroupLost(str(cause))
    error.__cause__ = cause
    if isinstance(cause, WorkerLost):
        cause.__cause__ = ray_error()
    return error


def ray_error():
    from ray.exceptions import ActorDiedError

    return ActorDiedError()


def test_restarts_end():
    restarts, group = Restarts(ClusterConfig()), Handle(1)
    restarts.after(lost(DeadlineExceeded("late")), 7, [group])  # twice: it is lost again in starting
    assert group.starts == 2 and len(restarts.recoveries) == 1
    with pytest.raises(GroupLost, match="rank died"):  # the third time at this step
        restarts.after(lost(WorkerLost("rank died")), 7, [group])
    restarts.after(lost(WorkerLost("rank died")), 8, [group])
    with pytest.raises(GroupLost, match="again"):
        Restarts(ClusterConfig(replacements=0)).after(lost(DeadlineExceeded("again")), 0, [group])
