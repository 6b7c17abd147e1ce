"""PPO that draws ahead: lag 0 is PPO, and with lag 1 nothing that happens on the way changes a bit."""

import json
import os
import shutil
import signal
from concurrent.futures import Future
from threading import Event
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import jobs.ppo_overlap
from ctrlrl.config import load
from ctrlrl.errors import RecipeError, RunError, VersionMismatch
from ctrlrl.models.loading import load_policy
from ctrlrl.ppo.ahead import Drawn, read_ahead, write_ahead
from ctrlrl.ppo.types import Query, Samples
from ctrlrl.runs import read_metrics
from jobs.ppo_overlap import Batch, OverlapRecipe, train

TIMED = ("second", "tokens_per_s", "idle/")
OF_THE_FAULT = ("policy/version", "sync/bytes")  # a publish while no worker is at work sends nothing, and a resumed run counts anew


def untimed(out):
    return [{k: v for k, v in row.items() if not any(part in k for part in TIMED)} for row in read_metrics(out)]


def same_models(a, b):
    a, b = (load_policy(str(folder / "model"), "float32").state_dict() for folder in (a, b))
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def recipe(ppo_overrides):
    """A function: the tiny recipe of this job with overrides."""
    return lambda *changes: load(OverlapRecipe, None, [*ppo_overrides, *changes])


@pytest.fixture(scope="module")
def undisturbed(ray_cluster, recipe, tmp_path_factory):
    """A run of three steps at lag 1."""
    out = tmp_path_factory.mktemp("overlap") / "run"
    assert train(recipe(f"out={out}", "steps=3", "lag=1")) == 0
    return out


def test_at_lag_1_every_batch_is_of_the_policy_one_update_before(undisturbed):
    rows = read_metrics(undisturbed)
    assert [row["policy/lag"] for row in rows] == [0, 1, 1]
    for row in rows:
        assert row["policy/first_ratio"] == pytest.approx(1, abs=1e-5)  # old logprobs are of the step's start
        assert 0 <= row["idle/rollout"] <= 1 and 0 <= row["idle/trainer"] <= 1
        assert 0 < row["correction/ess"] <= 1 and row["correction/capped"] <= 1
    assert rows[0]["mismatch/max"] < 1e-3 and rows[0]["correction/mean"] == pytest.approx(1, abs=1e-4)
    assert rows[1]["mismatch/max"] > 1e-3  # the policy had moved on ...
    assert rows[1]["correction/ess"] < 1 - 1e-6  # ... which is weighed


def test_lag_0_is_ppo_to_the_bit(ppo_run, ppo_looks, recipe, tmp_path, capsys):
    shutil.copytree(ppo_run[0], tmp_path / "ppo")
    capsys.readouterr()
    assert train(recipe(f"out={tmp_path / 'overlap'}", "lag=0", *ppo_looks)) == 0
    assert "step 1: batch 1: 0 of" in capsys.readouterr().out  # before there is anything else to tell
    for row, other in zip(untimed(tmp_path / "overlap"), untimed(tmp_path / "ppo"), strict=True):
        assert row.pop("policy/lag") == 0 and row == other
    assert same_models(tmp_path / "overlap", tmp_path / "ppo")
    with pytest.raises(RunError, match="was begun by ctrlrl ppo, without a lag"):
        train(recipe(f"out={tmp_path / 'ppo'}"), resume=True)


def test_killed_stopped_and_resumed_at_lag_1_a_run_is_the_undisturbed_one(undisturbed, recipe, tmp_path, monkeypatch):
    out, real, learned = tmp_path / "run", jobs.ppo_overlap.learn, []

    def disturbed(config, cast, *arguments, **options):
        learned.append(None)
        if len(learned) == 1:
            os.kill(cast.rollout.pids()[0], signal.SIGKILL)  # while it draws the next batch
        if len(learned) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(config, cast, *arguments, **options)

    monkeypatch.setattr(jobs.ppo_overlap, "learn", disturbed)
    config = recipe(f"out={out}", "steps=3", "lag=1")
    assert train(config) == 128 + signal.SIGTERM
    assert [row["step"] for row in read_metrics(out)] == [0, 1]
    assert train(config, resume=True) == 0
    for row, other in zip(untimed(out), untimed(undisturbed), strict=True):
        assert row.keys() == other.keys()
        assert {k: (v, other[k]) for k, v in row.items() if k not in OF_THE_FAULT and v != other[k]} == {}
    assert same_models(out, undisturbed)


# --- without actors ---


def samples(count, version=3):
    queries = [Query(({"role": "user", "content": "x"},), None, (5, 6), i, i) for i in range(count)]
    generator = np.random.default_rng(0)
    lengths = generator.integers(0, 5, count)
    logprobs = tuple(generator.normal(size=n).astype(np.float32) for n in lengths)
    return queries, Samples(tuple(queries), tuple(np.arange(n) for n in lengths), logprobs, np.arange(count) % 2 == 0, version)


def part(whole, rows):
    return np.array(rows), Samples(
        tuple(whole.queries[i] for i in rows), tuple(whole.response_ids[i] for i in rows), tuple(whole.sampler_logprobs[i] for i in rows),
        whole.finished[rows], whole.version,
    )  # fmt: skip


def test_what_is_on_its_way_survives_a_checkpoint_to_the_bit(tmp_path):
    queries, whole = samples(5)
    batches = [Drawn(7, 6, (part(whole, [0, 1, 2]), part(whole, [3, 4]))), Drawn(8, 6, (part(whole, [0, 1, 2, 3, 4]),))]
    write_ahead(tmp_path / "ahead.parquet", batches)
    found = read_ahead(tmp_path / "ahead.parquet", {7: queries, 8: queries})
    assert [(b.step, b.updates, len(b.chunks)) for b in found] == [(7, 6, 2), (8, 6, 1)]
    for before, after in zip((c for b in batches for c in b.chunks), (c for b in found for c in b.chunks), strict=True):
        assert before[0].tolist() == after[0].tolist() and before[1].queries == after[1].queries
        assert before[1].version == after[1].version and before[1].finished.tolist() == after[1].finished.tolist()
        for name in ("response_ids", "sampler_logprobs"):
            for a, b in zip(getattr(before[1], name), getattr(after[1], name), strict=True):
                assert a.dtype == b.dtype and np.array_equal(a, b)
    write_ahead(tmp_path / "none.parquet", [])
    assert read_ahead(tmp_path / "none.parquet", {}) == []
    with pytest.raises(KeyError):
        read_ahead(tmp_path / "ahead.parquet", {7: queries})
    (tmp_path / "ahead.parquet").write_bytes((tmp_path / "ahead.parquet").read_bytes()[:-20])
    with pytest.raises((OSError, ValueError)):
        read_ahead(tmp_path / "ahead.parquet", {7: queries, 8: queries})


def test_a_batch_older_than_the_lag_is_an_error(recipe):
    from collections import deque

    old = Batch(Drawn(5, 3, ()), (), 0.0)
    with pytest.raises(VersionMismatch, match="drawn after 3 updates came to step 5, where lag = 1 is allowed"):
        jobs.ppo_overlap.overlapped_step(recipe("lag=1"), None, 5, None, deque([old]), None, None, None, Event())


@pytest.mark.parametrize(("gpus", "at_once"), [(0, [0, 0, 3, 4]), (1, [1, 2, 3, 4])])
def test_models_that_share_the_trainers_processors_judge_when_it_waits(recipe, monkeypatch, gpus, at_once):
    config = recipe("lag=1", f"reference.resources.gpus={gpus}", "algorithm.queries_per_step=4")
    monkeypatch.setattr(jobs.ppo_overlap, "collect", lambda queries, rows, completions: int(rows[0]))
    judged, begun, waiting = [], [], Event()

    def judge(cast, samples, *_):
        judged.append(samples)
        return {"scores_BA": Future()}

    def generate(*_):
        for row in range(4):
            if row == 2:
                waiting.set()  # the update is done while the third chunk is drawn
            yield np.array([row]), SimpleNamespace(response_ids=[np.arange(2)])
            begun.append(len(judged))

    monkeypatch.setattr(jobs.ppo_overlap, "judge_chunk", judge)
    cast = SimpleNamespace(rollout=SimpleNamespace(generate=generate))
    queries = SimpleNamespace(prompt_ids=(), seed=0)
    monkeypatch.setattr(jobs.ppo_overlap, "draw_queries", lambda *_: [queries] * 4)
    progress = SimpleNamespace(within=lambda *_: None)
    batch = jobs.ppo_overlap.draw_batch(config, cast, None, None, None, progress, waiting, 1, 0)
    assert begun == at_once and judged == [0, 1, 2, 3] and len(batch.judged) == len(batch.drawn.chunks) == 4


def test_the_lag_is_one_of_three(recipe):
    from ctrlrl.errors import RecipeError

    for wrong in ("lag=3", "lag=-1", "correction=0", "correction=inf"):
        with pytest.raises(RecipeError, match=wrong.partition("=")[0]):
            recipe(wrong)
    assert json.loads(recipe("lag=2").model_dump_json())["correction"] == 2.0


def test_the_engines_logprobs_are_no_old_ones_where_a_batch_is_drawn_ahead(recipe):
    assert recipe("lag=0", "algorithm.old_logprobs=engine").algorithm.old_logprobs == "engine"
    with pytest.raises(RecipeError, match="what an earlier policy said where lag is above 0"):
        recipe("lag=1", "algorithm.old_logprobs=engine")
