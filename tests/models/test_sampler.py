"""vLLM through the rollout handle: seeded sampling, new weights that are proven to be in use, and a pool that loses no item."""

import gc
import os
import shutil
import signal
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ray
import torch

from actors.handover import Handover
from actors.placement import Resources, reserve
from actors.policy import Policy, PolicyConfig
from actors.rollout import Rollout, RolloutConfig
from actors.sync import publish
from actors.turns import at_once
from ctrlrl.data.batches import TokenBatch
from ctrlrl.errors import ModelError, RecipeError, VersionMismatch
from ctrlrl.joint_end import shared_memory
from ctrlrl.models.forward import PolicyModule, lay_out
from ctrlrl.models.loading import load_config, load_policy
from ctrlrl.models.sampler import EngineConfig, Request, Sampler, SamplingConfig, leave_imports_alone, prompt_room
from ctrlrl.models.trainer import TrainerConfig
from ctrlrl.objectives.likelihood import likelihood

ENGINE = EngineConfig(dtype="float32", max_model_tokens=128, kv_cache_gib=0.05)
TWO = ENGINE.model_copy(update={"tensor_parallel": 2})
SAMPLING = SamplingConfig(temperature=0.7, top_p=1.0, max_new_tokens=12)
REQUESTS = [Request(tuple(range(3, 8 + i % 5)), seed=100 + i) for i in range(20)]


def test_garbage_collections_pass_over_imports_and_look_at_what_comes_later():
    gc.unfreeze()
    leave_imports_alone()
    first, later = gc.get_freeze_count(), [[] for _ in range(1000)]
    leave_imports_alone()
    assert first > 100_000 and gc.get_freeze_count() <= first and sum(map(gc.is_tracked, later)) == 1000


def draw(rollout, requests, sampling=SAMPLING):
    """Responses and logprobs in the order of the requests, and which finished."""
    responses, logprobs, finished = [None] * len(requests), [None] * len(requests), np.zeros(len(requests), bool)
    for rows, completions in rollout.generate(requests, sampling):
        finished[rows] = completions.finished
        for row, response, own in zip(rows, completions.response_ids, completions.logprobs, strict=True):
            responses[row], logprobs[row] = response, own
    return responses, logprobs, finished


def trainer_logprobs(model, requests, responses):
    """Logprobs of the responses under the model directory, at the sampling temperature, by transformers alone."""
    module = PolicyModule(load_policy(model, "float32"), SAMPLING.temperature)
    tokens = [np.concatenate([r.prompt_ids, response]) for r, response in zip(requests, responses, strict=True)]
    batch = TokenBatch(tokens, np.array([len(r.prompt_ids) for r in requests]), {}, {})
    grid = module(lay_out(batch, "padded", torch.device("cpu")))[0].detach().numpy()
    return [grid[i, : len(response)] for i, response in enumerate(responses)]


@contextmanager
def started(model, cluster, workers, engine, sync):
    """A rollout pool that is ready."""
    config = RolloutConfig(workers=workers, chunk=6, engine=engine, resources=Resources(cpus=0.5))
    place = reserve({"rollout": config.bundles}, cluster)
    handle = Rollout(config, model, place, cluster, sync=sync)
    handle.model_name = model
    try:
        handle.wait_ready()
        yield handle
    finally:
        handle.close()
        place.release()


@contextmanager
def taught_policy(model, cluster):
    """A policy whose weights are no longer those of the model's directory."""
    config = PolicyConfig(model=model, train=TrainerConfig(learning_rate=3e-2, dtype="float32", zero_stage=0))
    place = reserve({"policy": [config.resources.bundle]}, cluster)
    policy = Policy(config, place, cluster, temperature=SAMPLING.temperature, seed=0)
    try:
        policy.wait_ready()
        policy.train(TokenBatch([np.arange(3, 30)], np.array([1]), {}, {}), likelihood, [np.arange(1)] * 3)
        yield policy
    finally:
        policy.close()
        place.release()


@pytest.fixture(scope="module", params=["tied", "policy"])
def rollout(request, ray_cluster, models):
    """A rollout pool: for the tied model one worker, an engine of two processes, which gets its weights by broadcast; else two workers."""
    from actors.placement import ClusterConfig

    cluster = ClusterConfig(placement_deadline_s=120, call_deadline_s=120, start_deadline_s=240)
    settings = (1, TWO, "gloo") if request.param == "tied" else (2, ENGINE, "store")
    with started(models[request.param], cluster, *settings) as handle:
        yield handle


def test_samples_depend_on_prompt_and_seed_alone(rollout):
    responses, logprobs, finished = draw(rollout, REQUESTS)
    assert rollout.rest() == 0  # which does nothing on processors
    backwards, _, _ = draw(rollout, REQUESTS[::-1])
    assert all(np.array_equal(a, b) for a, b in zip(responses, backwards[::-1], strict=True))
    other, _, _ = draw(rollout, [Request(r.prompt_ids, r.seed + 1000) for r in REQUESTS])
    assert sum(np.array_equal(a, b) for a, b in zip(responses, other, strict=True)) < 5
    for response, done in zip(responses, finished, strict=True):
        assert done == (response[-1] == 2)  # the end token, kept in the response
        assert done or len(response) == SAMPLING.max_new_tokens
        assert 2 not in response[:-1]
    for own, expected in zip(logprobs, trainer_logprobs(rollout.model_name, REQUESTS, responses), strict=True):
        assert own == pytest.approx(expected, abs=2e-5)


def gone(pids, patience_s=60):
    """Whether all of these processes end in time."""
    end = time.monotonic() + patience_s
    alive = lambda pid: Path(f"/proc/{pid}").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text()  # noqa: E731
    while any(alive(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(alive(pid) for pid in pids)


@pytest.mark.parametrize("rollout", ["policy"], indirect=True)
def test_two_devices_draw_what_one_draws_and_end_together(rollout, engine_pids, cluster_config):
    responses, logprobs, _ = draw(rollout, REQUESTS)
    with started(rollout.model_name, cluster_config, 1, TWO, "store") as two, taught_policy(rollout.model_name, cluster_config) as policy:
        same, own, _ = draw(two, REQUESTS)
        assert all(np.array_equal(a, b) for a, b in zip(responses, same, strict=True))
        assert np.concatenate(own) == pytest.approx(np.concatenate(logprobs), abs=1e-5)
        publish(policy, two, 1)  # whose probe tells a part that has kept its old weights
        shard = [Request(REQUESTS[0].prompt_ids, seed) for seed in range(40)], SAMPLING.model_copy(update={"max_new_tokens": 110})
        wanted = two.generate_apart(*shard).result(120)
        for victim in (1, 2):  # a part of the engine in the middle of a shard, then the worker itself
            pids = [*engine_pids(two), *two.pids()]
            assert len(set(pids)) == 3
            # What they share has no name that could be left over, and is there as long as one of them.
            assert not any(map(shared_memory, pids))
            assert all("/dev/shm/psm_" in Path(f"/proc/{pid}/maps").read_text() for pid in pids)
            os.kill(pids[victim], signal.SIGSTOP)  # it stands still, so that the shard is not over when it is killed, however late that is
            again = two.generate_apart(*shard)
            time.sleep(0.1)
            assert not again.done()
            os.kill(pids[victim], signal.SIGKILL)
            found = again.result(240)
            assert all(np.array_equal(a, b) for a, b in zip(found.response_ids, wanted.response_ids, strict=True)) and found.version == 1
            assert two.pool.replaced == victim and gone(pids)


def test_a_part_that_cannot_load_the_model_says_why(ray_cluster, cluster_config, models, tmp_path):
    shutil.copytree(models["policy"], tmp_path, dirs_exist_ok=True)
    os.truncate(tmp_path / "model.safetensors", 5000)
    began = time.time()
    with pytest.raises(ModelError, match="cannot start with .* on 2 devices: SafetensorError"):
        with started(str(tmp_path), cluster_config, 1, TWO, "store"):
            pass
    until(lambda: not left_behind(began), 60)


def check_in_use(policy, rollout):
    """Responses to the requests, which are drawn with the policy's weights and not with those of the model's directory."""
    responses, logprobs, _ = draw(rollout, REQUESTS)
    tokens = [np.concatenate([r.prompt_ids, x]) for r, x in zip(REQUESTS, responses, strict=True)]
    exact = policy.logprobs(TokenBatch(tokens, np.array([len(r.prompt_ids) for r in REQUESTS]), {}, {}))
    stale = trainer_logprobs(rollout.model_name, REQUESTS, responses)
    assert np.concatenate(logprobs) == pytest.approx(np.concatenate(exact), abs=5e-5)
    assert np.abs(np.concatenate(logprobs) - np.concatenate(stale)).mean() > 0.1
    return responses


def left_behind(since):
    """Files of shared memory that nobody has open."""
    maps, found = [], []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            maps.append((process / "maps").read_text())
    for file in (*Path("/dev/shm").glob("psm_*"), *Path("/dev/shm").glob("vllm_dist_*")):
        with suppress(OSError):
            found += [file] if file.stat().st_ctime > since and not any(file.name in text for text in maps) else []
    return found


def until(true, patience_s):
    """Wait for something to become true."""
    end = time.monotonic() + patience_s
    while not true():
        assert time.monotonic() < end
        time.sleep(0.2)


def test_published_weights_are_in_use_also_by_a_later_worker(rollout, engine_pids, cluster_config):
    with taught_policy(rollout.model_name, cluster_config) as policy:
        before, _, _ = draw(rollout, REQUESTS)
        published = publish(policy, rollout, rollout.version + 1)
        assert published.bytes == 4 * sum(p.numel() for p in load_policy(rollout.model_name, "float32").parameters())
        after = []
        for _ in range(2):
            responses = check_in_use(policy, rollout)
            after.append(responses)
            if len(after) == 1:
                lost = [*engine_pids(rollout), *rollout.pids()][0]
                os.kill(lost, signal.SIGKILL)  # its replacement must have the published weights too
        assert all(np.array_equal(a, b) for a, b in zip(*after, strict=True))
        assert any(not np.array_equal(a, b) for a, b in zip(before, responses, strict=True))
        assert published.version == 1 and rollout.version == 1 and published.shift == 0
        early = rollout.generate(REQUESTS, SAMPLING)
        next(early)
        until(lambda: not any(worker.items for worker in rollout.pool._workers), 60)  # all chunks are drawn
        assert publish(policy, rollout, 1).version == 2  # a version is never used twice
        with pytest.raises(VersionMismatch, match="samples of policy version 1 arrived where version 2 is required"):
            next(early)


@pytest.mark.parametrize("rollout", ["policy"], indirect=True)
def test_weights_go_from_device_to_device_and_nobody_keeps_them(rollout):
    version, size = rollout.version + 1, 4 * sum(p.numel() for p in load_policy(rollout.model_name, "float32").parameters())
    rollout.way = Handover(60, bucket=20_000)
    with taught_policy(rollout.model_name, cluster := rollout.pool._cluster) as policy:
        give, lost = policy.give, rollout.pids()[1]

        def give_and_kill(*arguments, begin):
            if not begin and Path(f"/proc/{lost}").exists():
                os.kill(lost, signal.SIGKILL)  # in the middle of the first pass
            return give(*arguments, begin=begin)

        policy.give = give_and_kill
        assert publish(policy, rollout, version).bytes == size
        check_in_use(policy, rollout)
        until(lambda: sorted(w.barred is None for w in rollout.pool._workers) == [False, True], cluster.start_deadline_s)
        one = rollout.pool.at_work()[0]
        bucket = give("float32", version + 1, 20_000, begin=True)[0]
        assert not bucket.last  # and then the trainer is lost
        assert ray.get([worker.take.remote(bucket) for worker in rollout.pool.at_work()]) == [0, 0]
        policy.train(TokenBatch([np.arange(3, 30)], np.array([1]), {}, {}), likelihood, [np.arange(1)])
        published = publish(policy, rollout, version + 1)
        assert published.bytes == size and published.shift > 0 and one in rollout.pool.at_work()
        assert [w.version for w in rollout.pool._workers] == [version + 1] * 2
        check_in_use(policy, rollout)


def test_wrong_weights_end_the_pool(rollout, cluster_config):
    with taught_policy(rollout.model_name, cluster_config) as policy:
        probe, version = rollout.expected, rollout.version + 1
        with pytest.raises(VersionMismatch, match="its weights are wrong"):  # what the trainer expects is not what the workers answer
            wrong = replace(probe, published=[row - 1 for row in probe.published], before=None)
            rollout.load(partial(policy.weights, "float32", version), version, wrong, {})


def test_what_nobody_takes_has_no_bytes():
    handle = Rollout.__new__(Rollout)
    handle.turn, handle._bytes = at_once, 7  # of the publish before
    handle.pool = SimpleNamespace(renew=lambda version: None)  # nobody is at work
    assert handle.load(None, 1, None, {}) == 0


class Asked(Exception):
    """Ends the start of a pretended engine, and holds what it was asked for."""


@pytest.fixture
def pretended(monkeypatch):
    """A vLLM that ends with the model that it was asked for; `built_for` says for what it is built."""

    def engine(model, **_):
        raise Asked(model)

    found = SimpleNamespace(built_for="cpu")
    platform = SimpleNamespace(is_cpu=lambda: found.built_for == "cpu")
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=engine, __spec__=find_spec("vllm")))  # its sources are looked at
    monkeypatch.setitem(sys.modules, "vllm.config", SimpleNamespace(WeightTransferConfig=dict))
    monkeypatch.setitem(sys.modules, "vllm.platforms", SimpleNamespace(current_platform=platform))
    monkeypatch.setattr("ctrlrl.models.sampler.register_transfer", lambda: None)
    return found


def test_the_engine_gets_a_path_without_a_tilde(models, monkeypatch, pretended):
    monkeypatch.setenv("HOME", str(Path(models["policy"]).parent))
    with pytest.raises(Asked, match=f"^{models['policy']}$"):
        Sampler("~/policy", ENGINE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_an_engine_for_gpus_wants_one(models, pretended):
    pretended.built_for = "cuda"
    with pytest.raises(ModelError, match="built for GPUs, and its worker has none: give the section's resources gpus"):
        Sampler(models["policy"], ENGINE)


def test_the_room_for_a_prompt(models, tmp_path):
    assert prompt_room(models["policy"], EngineConfig(max_model_tokens=512), SAMPLING) == 500
    with pytest.raises(RecipeError, match="engine.max_model_tokens = 12 has no room beside the 12 tokens of an answer"):
        prompt_room(models["policy"], EngineConfig(max_model_tokens=12), SAMPLING)
    with pytest.raises(RecipeError, match="rollout.engine.max_model_tokens = 513, but .* has 512 positions"):
        prompt_room(models["policy"], EngineConfig(max_model_tokens=513), SAMPLING)
    config = load_config(models["policy"])
    config.rope_parameters |= {"rope_type": "linear", "factor": 2.0}  # vLLM takes 1024
    shutil.copytree(models["policy"], tmp_path, dirs_exist_ok=True)
    config.save_pretrained(tmp_path)
    assert prompt_room(str(tmp_path), EngineConfig(max_model_tokens=1024), SAMPLING) == 1012


def test_a_model_that_cannot_be_loaded_is_a_typed_error(ray_cluster, cluster_config, models):
    place = reserve({"rollout": [{"CPU": 0.5}]}, cluster_config)
    handle = Rollout(RolloutConfig(engine=ENGINE, resources=Resources(cpus=0.5)), "./no/such/model", place, cluster_config)
    try:
        with pytest.raises(ModelError, match="does not exist"):
            handle.wait_ready()
    finally:
        handle.close()
        place.release()
