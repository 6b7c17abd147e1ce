"""Workers that share a GPU by turns: who rests has given its memory back, and goes on as if it never had."""

import json

import numpy as np
import pytest
import torch

from actors.placement import reserve
from actors.rollout import Rollout, RolloutConfig
from actors.sync import publish
from ctrlrl.config import load
from ctrlrl.models.probe import TOLERANCE
from ctrlrl.models.sampler import EngineConfig
from ctrlrl.runs import read_metrics
from jobs.ppo import PPORecipe, train
from tests.cuda.conftest import PARAMETERS
from tests.cuda.test_gpu_rollouts import disagreement
from tests.models.test_sampler import REQUESTS, SAMPLING, draw
from tests.models.test_trainer import LOSS, STEPS, ppo_batch, start_policy

pytestmark = pytest.mark.cuda


def free(device) -> int:
    """Bytes of the device that nobody has; on processors nobody knows."""
    return torch.cuda.mem_get_info()[0] if device.type == "cuda" else 0


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_trainer_that_rested_trains_as_one_that_did_not(device, ray_cluster, part, wide, patient, tmp_path, stage):
    policy, place = start_policy(wide, patient, resources=part(0.5), zero_stage=stage, dtype="bfloat16" if stage else "float32")
    try:
        policy.train(ppo_batch(), LOSS, STEPS[:4])
        policy.save(tmp_path)
        undisturbed = [s["loss"] for s in policy.train(ppo_batch(), LOSS, STEPS[4:8])]
        policy.load(tmp_path)
        before = free(device)
        moved = policy.rest()
        given_back = free(device) - before
        found = [s["loss"] for s in policy.train(ppo_batch(), LOSS, STEPS[4:8])]
    finally:
        policy.close()
        place.release()
    in_place = stage == 0 and device.type == "cpu"  # there the weights are where their file was read to
    assert moved >= (8 if in_place else 12) * PARAMETERS and (device.type == "cpu" or given_back > 0.9 * moved)
    assert found == pytest.approx(undisturbed, abs=2e-3) and (device.type == "cuda" or found == undisturbed)


def test_an_engine_that_sleeps_gives_its_memory_back_and_takes_weights_before_its_cache(device, ray_cluster, part, wide, patient):
    from actors.turns import Turns

    engine = EngineConfig(dtype="bfloat16", max_model_tokens=128, kv_cache_gib=0.5)
    config = RolloutConfig(chunk=20, engine=engine, resources=part(0.5))
    place = reserve({"rollout": config.bundles}, patient)
    rollout = Rollout(config, wide, place, patient, turn=Turns().of("draw"))
    policy = None
    try:
        rollout.wait_ready()
        train = {"zero_stage": 1, "dtype": "bfloat16", "temperature": SAMPLING.temperature}
        policy, own = start_policy(wide, patient, resources=part(0.5), **train)
        first, _, _ = draw(rollout, REQUESTS)
        before = free(device)
        rollout.rest()
        assert device.type == "cpu" or free(device) - before > 0.45 * 2**30 + 2 * PARAMETERS  # the cache, and the weights
        again, _, _ = draw(rollout, REQUESTS)  # wakes by itself
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
        rollout.rest()
        policy.train(ppo_batch(), LOSS, STEPS[:4])
        publish(policy, rollout, 1)  # into weights that were woken for it
        responses, logprobs, _ = draw(rollout, REQUESTS)
        assert disagreement(policy, REQUESTS, responses, logprobs) < TOLERANCE["bfloat16"]
    finally:
        rollout.close()
        place.release()
        if policy:
            policy.close()
            own.release()


def test_ppo_on_one_device_by_turns(device, ray_cluster, part, ppo_overrides, tmp_path):
    kinds = ("policy", "value", "rollout", "reference", "reward.helpful", "reward.harmless")
    shared = {f"{kind}.resources.gpus": part(1).gpus for kind in kinds} | {"placement": "shared", "out": str(tmp_path)}
    patience = {"cluster.start_deadline_s": 600, "cluster.call_deadline_s": 300}
    settings = [f"{key}={json.dumps(value)}" for key, value in (shared | patience).items()]
    assert train(load(PPORecipe, None, [*ppo_overrides, *settings])) == 0
    rows = read_metrics(tmp_path)
    assert len(rows) == 2 and all(row["mismatch/max"] < 1e-2 for row in rows)  # float32, on two kinds of kernels
    assert rows[1]["kl/k3"] > 1e-4 and all(row["policy/first_ratio"] == pytest.approx(1, abs=1e-4) for row in rows)
