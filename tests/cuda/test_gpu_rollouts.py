"""A rollout engine and a trainer on GPUs, in bfloat16: they agree on what was drawn, before and after publishes by every way there is."""

import numpy as np
import pytest

from actors.placement import reserve
from actors.rollout import Rollout, RolloutConfig
from actors.sync import publish
from ctrlrl.data.batches import TokenBatch
from ctrlrl.models.probe import TOLERANCE, mean_difference
from ctrlrl.models.sampler import EngineConfig
from tests.models.test_sampler import REQUESTS, SAMPLING, draw
from tests.models.test_trainer import LOSS, STEPS, ppo_batch, start_policy

pytestmark = pytest.mark.cuda


def disagreement(policy, requests, responses, logprobs) -> float:
    """Mean difference between what the engine said of its answers and what the trainer says, as a share of the mean logprob."""
    tokens = [np.concatenate([r.prompt_ids, answer]) for r, answer in zip(requests, responses, strict=True)]
    exact = policy.logprobs(TokenBatch(tokens, np.array([len(r.prompt_ids) for r in requests]), {}, {}))
    return mean_difference(logprobs, exact) / float(np.abs(np.concatenate(exact)).mean())


@pytest.fixture
def pair(device, ray_cluster, gpus, part, models, patient):
    """A function: a policy and a rollout pool of one worker between which weights go by `way`; ended after the test."""
    started = []

    def start(way: str, apart: bool):
        if apart and device.type == "cuda" and gpus < 2:
            pytest.skip("two GPUs are needed, one is here")
        resources = part(1 if apart else 0.5)
        engine = EngineConfig(dtype="bfloat16", max_model_tokens=128, kv_cache_gib=0.1)
        config = RolloutConfig(chunk=20, engine=engine, resources=resources)
        place = reserve({"rollout": config.bundles}, patient)
        started.append(place.release)
        rollout = Rollout(config, models["policy"], place, patient, sync=way)
        started.append(rollout.close)
        train = {"zero_stage": 1, "dtype": "bfloat16", "learning_rate": 3e-3}
        policy, own = start_policy(models["policy"], patient, resources=resources, temperature=SAMPLING.temperature, **train)
        started.extend((own.release, policy.close))
        rollout.wait_ready()
        return policy, rollout

    yield start
    for end in reversed(started):
        end()


def test_sampler_and_trainer_agree_in_bf16_and_the_same_seed_draws_the_same(pair):
    policy, rollout = pair("store", apart=False)
    responses, logprobs, finished = draw(rollout, REQUESTS)
    again, _, _ = draw(rollout, REQUESTS)
    assert all(np.array_equal(a, b) for a, b in zip(responses, again, strict=True))  # one engine call of the same content
    assert len({tuple(answer) for answer in responses}) > len(REQUESTS) // 2
    assert all(done == (answer[-1] == 2) for answer, done in zip(responses, finished, strict=True))
    assert disagreement(policy, REQUESTS, responses, logprobs) < TOLERANCE["bfloat16"]


@pytest.mark.parametrize(("way", "apart"), [("store", False), ("ipc", False), ("nccl", True)])
def test_published_weights_are_in_use_by_every_way(pair, device, way, apart):
    policy, rollout = pair("gloo" if way == "nccl" and device.type == "cpu" else way, apart)
    before, _, _ = draw(rollout, REQUESTS)
    for version in (1, 2):  # the second through what the first has set up
        policy.train(ppo_batch(), LOSS, STEPS)
        published = publish(policy, rollout, version)  # VersionMismatch if the probe says otherwise
        assert published.version == version and (published.shift > 0.01 or version == 1)  # before the first nothing is known
        responses, logprobs, _ = draw(rollout, REQUESTS)
        assert sum(np.array_equal(a, b) for a, b in zip(before, responses, strict=True)) < len(REQUESTS) // 2
        assert disagreement(policy, REQUESTS, responses, logprobs) < TOLERANCE["bfloat16"]
        before = responses


def test_an_engine_on_two_devices_says_what_one_says(device, ray_cluster, gpus, part, models, patient):
    if device.type == "cuda" and gpus < 2:
        pytest.skip("two GPUs are needed, one is here")
    sequences, said = [list(range(3, 60)), list(range(200, 260))], []
    for parts in (1, 2):
        engine = EngineConfig(dtype="bfloat16", max_model_tokens=128, kv_cache_gib=0.1, tensor_parallel=parts)
        config = RolloutConfig(engine=engine, resources=part(parts))
        place = reserve({"rollout": config.bundles}, patient)
        rollout = Rollout(config, models["policy"], place, patient)
        try:
            rollout.wait_ready()
            said.append(rollout.pool.submit(lambda worker: worker.answer.remote(1, sequences)).result()[1])
        finally:
            rollout.close()
            place.release()
    scale = float(np.abs(np.concatenate(said[0])).mean())
    assert 0 < mean_difference(*said) / scale < TOLERANCE["bfloat16"]  # rounded apart, and added
