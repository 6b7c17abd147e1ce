"""PPO end to end on Ray with all five kinds of actors, its resumption, and the ring-1 bookkeeping of a step."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from actors.group import GroupConfig
from ctrlrl.cli import app
from ctrlrl.config import dump, load
from ctrlrl.control import CORNERS, Control
from ctrlrl.data.sources import read_prompts
from ctrlrl.errors import RecipeError, RunError
from ctrlrl.models.loading import load_policy, load_tokenizer
from ctrlrl.ppo.experience import AlgorithmConfig, draw_queries, make_experience, minibatch_rows
from ctrlrl.ppo.types import Query, Samples, Scored, concatenate
from ctrlrl.prompts import render
from ctrlrl.runs import read_metrics
from jobs.parts.cast import demands_of
from jobs.parts.interim import InterimConfig
from jobs.ppo import PPORecipe, headline, recall_chunk, train


def test_every_step_logs_what_the_readme_promises(ppo_run):
    out, config = ppo_run
    rows = read_metrics(out)
    assert [row["step"] for row in rows] == [0, 1]
    for row in rows:
        assert all(np.isfinite(value) for value in row.values())
        for key in (
            *(f"{kind}/{a}" for kind in ("score", "agreement", "binding") for a in ("helpful", "harmless")), "reward/mean",
            *(f"reward/{corner.name}" for corner in CORNERS), "kl/k1", "kl/k3", "beta", "policy/entropy", "policy/clip_fraction",
            "policy/ratio_mean", "policy/ratio_max", "value/explained_variance", "value/value_loss", "mismatch/mean", "response/length",
            "response/truncated", *(f"tokens_per_s/{phase}" for phase in ("generate", "train", "step")),
            *(f"seconds/{phase}" for phase in ("generate", "score", "train", "sync", "step")), "sync/bytes",
        ):  # fmt: skip
            assert key in row, key
        assert row["binding/helpful"] + row["binding/harmless"] == pytest.approx(1)
        assert row["reward/mean"] <= min(row["agreement/helpful"], row["agreement/harmless"]) + 1e-9
        assert row["sync/bytes"] == 4 * sum(p.numel() for p in load_policy(config.policy.model, "float32").parameters())
    assert any(path.name.startswith("events") for path in (out / "tensorboard").iterdir())


def test_the_dashboard_and_the_alerts_read_gauges_that_jobs_set(ppo_run):
    shipped = "".join((Path(__file__).parents[2] / "cluster" / name).read_text() for name in ("grafana.json", "alerts.yaml"))
    columns = {re.sub(r"\W", "_", column) for row in read_metrics(ppo_run[0]) for column in row}
    pools = {f"pool_{pool}_{figure}" for pool in ("rollout", ".+") for figure in ("ready", "coming", "queued", "replaced")}
    offline = {"train_loss", "train_grad_norm_max", "generate_tokens_per_s"}
    assert set(re.findall(r"ray_ctrlrl_(\w[\w.+]*\w)", shipped)) <= columns | pools | offline


def test_first_step_invariants(ppo_run):
    first, second = read_metrics(ppo_run[0])
    assert first["kl/k1"] == pytest.approx(0, abs=1e-4)  # policy = reference
    assert first["policy/first_ratio"] == pytest.approx(1, abs=1e-5)
    assert second["policy/first_ratio"] == pytest.approx(1, abs=1e-5)  # old logprobs are the trainer's own
    assert second["kl/k3"] > 1e-4  # the policy moved
    for row in (first, second):  # ... and the rollout worker moved with it
        assert row["mismatch/max"] < 1e-3


def test_the_result_is_an_ordinary_model_whose_template_takes_the_control(ppo_run, assert_controllable):
    out, config = ppo_run
    assert_controllable(out / "model", config.policy.model)


def test_every_n_steps_the_run_evaluates_its_weights_as_ctrlrl_evaluate_does(ppo_run, tmp_path, evaluated_model):
    out, config = ppo_run
    first, second = read_metrics(out)
    assert not [name for name in first if name.startswith("evaluation/")]
    found = evaluated_model(config.evaluation, config.rollout, config.reward, config.seed, out / "model", tmp_path)
    assert {name: second[name] for name in found} == pytest.approx(found, abs=1e-5)


def test_a_run_is_bound_to_its_data_and_weights(ppo_run, assert_bound_to_origins):
    out, config = ppo_run
    models = {"policy.model", "value.model", "reference.model", "reward.helpful.model", "reward.harmless.model"}
    assert_bound_to_origins(train, config, out, models, "prompts")


# A process of its own that runs the recipe whose overrides it is given, and says which processes its workers are.
RUN = """
import sys
import jobs.ppo, jobs.parts.launch
start, draw = jobs.ppo.start_cast, jobs.ppo.draw_queries
def told(config):
    cast = start(config)
    workers = [pid for handle in (*cast.groups, *cast.pools.values()) for pid in handle.pids()]
    print("workers", cast.reference.pids()[0], *workers, flush=True)
    return cast
def let(prompts, tokenizer, step, *arguments):
    if step == 1:
        print("second", flush=True)
        sys.stdin.readline()
    return draw(prompts, tokenizer, step, *arguments)
jobs.ppo.start_cast, jobs.ppo.draw_queries = told, let
sys.exit(jobs.parts.launch.run_job(jobs.ppo.PPORecipe, jobs.ppo.train, "", sys.argv[1:]))
"""


def interrupt_in_the_second_step(overrides, out, joining):
    """Run two steps in a process of its own; Ctrl-C twice when, after a checkpoint, a worker's call lasts."""
    log = out.with_suffix(".log")
    job = subprocess.Popen(
        [sys.executable, "-c", RUN, *overrides, f"out={out}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("w"),
        text=True, env=os.environ | joining, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    try:
        reference, *workers = map(int, next(line for line in job.stdout if line.startswith("workers")).split()[1:])
        assert "second\n" in job.stdout
        assert (out / "checkpoints" / "latest").exists()
        os.kill(reference, signal.SIGSTOP)  # its next call, of the second step, does not end
        print("go on", file=job.stdin, flush=True)
        time.sleep(2)
        job.send_signal(signal.SIGINT)
        while "stopping after this step (Ctrl-C again to stop at once)" not in log.read_text():
            assert job.poll() is None
            time.sleep(0.01)
        assert job.poll() is None
        job.send_signal(signal.SIGINT)
        assert job.wait(60) == 128 + signal.SIGINT
        end = time.monotonic() + 60
        while alive := [pid for pid in workers if os.path.exists(f"/proc/{pid}")]:
            assert time.monotonic() < end, alive
            time.sleep(0.05)
    finally:
        job.kill()
        job.wait()


def test_a_run_that_is_stopped_at_once_and_resumed_equals_an_undisturbed_one(ppo_run, joining, ppo_overrides, ppo_looks, tmp_path):
    out, _ = ppo_run
    half = load(PPORecipe, None, [*ppo_overrides, f"out={tmp_path / 'run'}"])
    interrupt_in_the_second_step(ppo_overrides, tmp_path / "run", joining)
    (tmp_path / "run" / "metrics.jsonl").open("a").write(json.dumps({"step": 1, "reward/mean": 9}) + "\n")  # of a step that was cut off
    with pytest.raises(RunError, match="add --resume"):
        train(half)
    resume = ["ppo", "--resume", "--out", str(tmp_path / "run")]  # its own settings are stored
    refused = CliRunner().invoke(app, [*resume, "--set", "algorithm.clip=0.3"])
    assert refused.exit_code == 2 and "another recipe (algorithm.clip: 0.2 -> 0.3)" in refused.output
    looked = [part for look in ppo_looks for part in ("--set", look)]
    assert CliRunner().invoke(app, [*resume, *looked, "--set", "sync=gloo"]).exit_code == 0  # which way weights go changes nothing
    for resumed, undisturbed in zip(read_metrics(tmp_path / "run"), read_metrics(out), strict=True):
        timed = {key for key in undisturbed if "second" in key or "tokens_per_s" in key}
        assert {k: (v, undisturbed[k]) for k, v in resumed.items() if k not in timed and v != undisturbed[k]} == {}
    a, b = (load_policy(str(folder / "model"), "float32").state_dict() for folder in (out, tmp_path / "run"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_goes_on_with_more_ranks(ppo_run, assert_resumes_on_two_ranks):
    out, config = ppo_run
    assert_resumes_on_two_ranks(train, config, out, 1, "policy", "value", evaluation=InterimConfig())


def test_values_may_be_a_head_of_the_policy_which_resumes_to_the_bit(ray_cluster, ppo_overrides, tmp_path, caplog):
    whole, parts = (load(PPORecipe, None, [*ppo_overrides, "value=head", f"out={tmp_path / name}"]) for name in ("whole", "parts"))
    assert whole.value.head and not [key for key in whole.models if key.startswith("value")] and demands_of(whole)["value"] == []
    assert train(whole) == 0
    assert train(parts.model_copy(update={"steps": 1})) == 0
    caplog.set_level("INFO", "ctrlrl")
    assert train(parts.model_copy(update={"placement": "shared", "sync": "ipc"}), resume=True) == 0  # by turns it is the same
    size = 4 * sum(p.numel() for p in load_policy(whole.policy.model, "float32").parameters()) / 1e6  # MB of the weights
    turns = re.findall(r"turn to (\w+): the others have moved ([\d.]+) MB", caplog.text)
    assert [turn for turn, _ in turns][-5:] == ["draw", "judge", "train", "draw", "train"]  # of its step, publish, and checkpoint
    assert float(turns[-2][1]) > 2 * size - 0.1  # both moments, at least
    rows = read_metrics(tmp_path / "whole")
    assert rows[0]["value/value_loss"] > 0 and rows[0]["policy/first_ratio"] == pytest.approx(1, abs=1e-5)
    assert rows[0]["value/explained_variance"] <= 0 < abs(rows[1]["value/value_mean"])  # the head starts at zero, and learns
    for name in ("value/value_loss", "policy/loss", "policy/entropy", "samples/digest"):
        assert [row[name] for row in rows] == [row[name] for row in read_metrics(tmp_path / "parts")]
    one, other = (load_policy(str(tmp_path / name / "model"), "float32").state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one) and not [name for name in one if "value" in name]


def test_a_lora_run_with_rloo_rolls_out_its_adapter_and_stops_at_sigterm(ray_cluster, ppo_overrides, tmp_path, monkeypatch):
    import jobs.ppo

    changes = {
        "out": str(tmp_path / "run"), "steps": 50, "checkpoint_every": 50, "algorithm.advantage": "rloo",
        "algorithm.samples_per_query": 2, "algorithm.queries_per_step": 8, "policy.train.lora.rank": 4, "policy.train.zero_stage": 1,
        "reference.adapter": True,
    }  # fmt: skip
    config = load(PPORecipe, None, [*ppo_overrides, *(f"{key}={json.dumps(value)}" for key, value in changes.items())])
    real, calls = jobs.ppo.make_experience, []

    def stop_in_the_second_step(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(jobs.ppo, "make_experience", stop_in_the_second_step)
    assert train(config) == 128 + signal.SIGTERM
    first, second = read_metrics(tmp_path / "run")
    assert first["kl/k3"] == pytest.approx(0, abs=1e-6) and second["kl/k3"] > 1e-5  # the adapter moved the policy
    assert second["mismatch/max"] < 1e-3  # and the rollout worker answered with it
    assert "value/loss" not in second
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step-000002\n"


def test_killed_workers_and_a_killed_policy_rank_change_nothing(ppo_run, ppo_overrides, engine_pids, tmp_path, monkeypatch, caplog):
    """Nor does it that the rollout worker is an engine of two processes, of which one is killed."""
    import jobs.ppo

    out, _ = ppo_run
    casts, parts, killed = [], [], []
    start, score, experience = jobs.ppo.start_cast, jobs.ppo.score_chunk, jobs.ppo.make_experience

    def begin(config):
        casts.append(start(config))
        parts.extend(engine_pids(casts[0].rollout))
        return casts[0]

    def kill(*pids):
        for pid in pids:
            killed.append(pid)
            os.kill(pid, signal.SIGKILL)

    def kill_workers(cast, *arguments):  # once a first chunk is there and the others are under way
        if not killed:
            kill(parts[1], cast.rewards["harmless"].pids()[0], cast.reference.pids()[0])
        return score(cast, *arguments)

    def kill_policy(*arguments):  # of the second step, just before it trains
        made.append(None)
        if len(made) == 2:
            kill(casts[0].policy.pids()[0])
        return experience(*arguments)

    made = []
    monkeypatch.setattr(jobs.ppo, "start_cast", begin)
    monkeypatch.setattr(jobs.ppo, "score_chunk", kill_workers)
    monkeypatch.setattr(jobs.ppo, "make_experience", kill_policy)
    more = [f"out={tmp_path / 'run'}", "rollout.engine.tensor_parallel=2", "sync=gloo"]  # what was lost gets weights that were kept
    config = load(PPORecipe, None, [*ppo_overrides, *more])
    assert train(config) == 0
    assert len(parts) == 2 and len(killed) == 4 and len(made) == 3  # the second step was done again
    assert {name: handle.pool.replaced for name, handle in casts[0].pools.items()} == {
        "rollout": 1, "reward.helpful": 0, "reward.harmless": 1, "reference": 1
    }  # fmt: skip
    assert "all ranks begin anew from the last checkpoint" in caplog.text
    rows, undisturbed = read_metrics(tmp_path / "run"), read_metrics(out)
    assert [row["step"] for row in rows] == [0, 1]
    for row, other in zip(rows, undisturbed, strict=True):
        timed = {key for key in other if "second" in key or "tokens_per_s" in key}
        summed = {key: other[key] for key in other if key.startswith("mismatch/")}  # in another order by two devices
        assert {key: row[key] for key in summed} == pytest.approx(summed, abs=1e-5)
        assert row["sync/bytes"] in (0, other["sync/bytes"])  # nobody takes weights while the only worker is missed
        apart = {*timed, *summed, "policy/version", "sync/bytes"}
        assert {k: (v, other[k]) for k, v in row.items() if k not in apart and v != other[k]} == {}
    assert [row["policy/version"] for row in rows] == [1, 3]  # a version is never used twice
    prompts, tokenizer = list(read_prompts(config.prompts)), load_tokenizer(config.policy.model)
    drawn = [draw_queries(prompts, tokenizer, step, config.algorithm, config.seed) for step in range(2)]
    assert [row["samples/digest"] for row in rows] == [jobs.ppo.digest(queries) for queries in drawn]
    a, b = (load_policy(str(folder / "model"), "float32").state_dict() for folder in (out, tmp_path / "run"))
    assert all(torch.equal(a[name], b[name]) for name in a)


# --- bookkeeping, without actors ---


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["reference.adapter=true"], "needs policy.train.lora.rank above 0"),
        (["reference=adapter"], "needs policy.train.lora.rank above 0"),  # the same in one word
        (["value=head", "algorithm.advantage=rloo", "algorithm.samples_per_query=2"], 'set algorithm.advantage = "gae"'),
        (["value.head=true", "value.model=x"], "leave value.model out"),
        (["reference.adapter=true", "policy.train.lora.rank=4", "reference.model=x"], "no reference.model"),
        (["algorithm.old_logprobs=engine", "sampling.top_p=0.9"], "needs sampling.top_p = 1"),
        (["rollout.engine.tensor_parallel=2", "rollout.resources.gpus=1"], "2 GPUs of one node: set resources.gpus = 2, not 1"),
    ],
)
def test_what_contradicts_itself_is_refused(ppo_overrides, changes, said):
    with pytest.raises(RecipeError, match=said):
        load(PPORecipe, None, [*ppo_overrides, *changes])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["sync=nccl"], 'sync = "nccl" is between GPUs: give policy.resources and rollout.resources gpus'),
        (["sync=ipc"], 'sync = "ipc" is between workers that share a device: set placement = "shared", or sync = "auto"'),
        (["sync=rdma"], "sync.*'auto', 'store', 'gloo', 'nccl' or 'ipc'"),
    ],
)
def test_ways_of_the_weights_that_are_not_there_are_refused(ppo_overrides, changes, said):
    with pytest.raises(RecipeError, match=said):
        load(PPORecipe, None, [*ppo_overrides, *changes])


def test_the_engines_logprobs_spare_the_policy_a_forward():
    samples = scored([(1, 0.2), (0.2, 1)], [(0.9, 0.6), (0.7, 1.0)], [True, True]).samples
    asked = recall_chunk(SimpleNamespace(policy=None, value=None), samples, None, "engine")
    assert asked["old_logprobs"].result() is samples.sampler_logprobs
    assert [len(values) for values in asked["values"].result()] == [2, 3]


def test_queries_cover_every_prompt_once_a_pass_and_depend_on_nothing_else(prompt_file, tokenizer):
    prompts = list(read_prompts(prompt_file))
    config = AlgorithmConfig(queries_per_step=16)
    drawn = [q for step in range(5) for q in draw_queries(prompts, tokenizer, step, config, seed=1)]
    texts = [q.messages[-1]["content"] for q in drawn]
    assert sorted(texts[:40]) == sorted(texts[40:80]) == sorted(p.messages[-1]["content"] for p in prompts)
    assert texts[:40] != texts[40:80]
    assert {q.control for q in drawn} == set(CORNERS)
    assert len({q.seed for q in drawn}) == 80
    assert draw_queries(prompts, tokenizer, 3, config, seed=1) == drawn[48:64]
    twice = draw_queries(prompts, tokenizer, 0, AlgorithmConfig(queries_per_step=3, samples_per_query=2), seed=1)
    assert [q.group for q in twice] == [0, 0, 1, 1, 2, 2] and len({q.seed for q in twice}) == 6


def test_every_sample_of_an_epoch_is_used_exactly_once():
    config = AlgorithmConfig(epochs=3, minibatches=4)
    steps = minibatch_rows(10, 0, config, seed=0)
    assert [len(s) for s in steps] == [3, 3, 2, 2] * 3
    for epoch in range(3):
        assert sorted(np.concatenate(steps[4 * epoch : 4 * epoch + 4])) == list(range(10))
    assert not np.array_equal(np.concatenate(steps[:4]), np.concatenate(steps[4:8]))


def scored(levels, scores, finished, lengths=(2, 3), kl=0.0, samples_per_query=1):
    queries = tuple(
        Query(({"role": "user", "content": "x"},), level and Control(*level), (5, 6), i // samples_per_query, i)
        for i, level in enumerate(levels)
    )
    responses = tuple(np.arange(n) + 10 for n in lengths)
    old = tuple(np.full(n, -1.0, np.float32) for n in lengths)
    samples = Samples(queries, responses, old, np.array(finished), 0)
    return Scored(samples, np.array(scores, np.float32), old, tuple(o - kl for o in old), tuple(np.zeros(n, np.float32) for n in lengths))


def test_experience_by_hand():
    # agreements (0.9, 0.6) and (0.5, 1.0): rewards 0.6 and 0.5, bound by harmless and by helpful
    config = AlgorithmConfig(lam=1.0)
    experience = make_experience(scored([(1, 0.2), (0.2, 1)], [(0.9, 0.6), (0.7, 1.0)], [True, True], kl=0.1), config, beta=0.5)
    assert experience.stats["reward/mean"] == pytest.approx(0.55)
    assert experience.stats["binding/helpful"] == 0.5
    assert experience.stats["reward/helpful=1,harmless=0.2"] == pytest.approx(0.6)
    assert experience.stats["kl/k1"] == pytest.approx((0.2 + 0.3) / 2, abs=1e-6)
    returns = experience.batch.per_token["returns"]
    assert returns[0] == pytest.approx([0.6 - 0.1, 0.6 - 0.05], abs=1e-6)
    assert returns[1] == pytest.approx([0.5 - 0.15, 0.5 - 0.1, 0.5 - 0.05], abs=1e-6)
    advantages = np.concatenate(experience.batch.per_token["advantages"])
    assert advantages.mean() == pytest.approx(0, abs=1e-6) and advantages.std() == pytest.approx(1, rel=0.2)
    assert [list(t) for t in experience.batch.tokens] == [[5, 6, 10, 11], [5, 6, 10, 11, 12]]
    assert list(experience.batch.prompt_lengths) == [2, 2]


def test_group_relative_experience_with_the_kl_in_the_loss_by_hand():
    # Rewards 0.6 and 0.5 of one group: less their mean, over their deviation 0.1 / sqrt(2). The KL stays out of them.
    config = AlgorithmConfig(advantage="grpo", samples_per_query=2, kl={"place": "loss", "estimator": "k3"})
    parts = [(1, 0.2), (1, 0.2)], [(0.9, 0.6), (0.5, 0.2)], [True, True]
    experience = make_experience(scored(*parts, kl=0.1, samples_per_query=2), config, beta=0.5, correction=2.0)
    columns = experience.batch.per_token
    first, second = (row.tolist() for row in columns["advantages"])
    assert first == pytest.approx([2**-0.5] * 2, rel=1e-4) and second == pytest.approx([-(2**-0.5)] * 3, rel=1e-4)
    assert columns["ref_logprobs"][0] == pytest.approx([-1.1, -1.1]) and columns["weights"][1].tolist() == [1, 1, 1]
    assert experience.stats["correction/ess"] == 1 and "old_values" not in columns


def test_a_schedule_ends_with_the_run(ppo_overrides, monkeypatch):
    import jobs.parts.cast

    made = []

    class Started:
        def __init__(self, config, *_, **__):
            made.append(config)

        def wait_ready(self):
            pass

    for name in ("Rollout", "Reference", "Policy", "Value"):
        monkeypatch.setattr(jobs.parts.cast, name, Started)
    monkeypatch.setattr(jobs.parts.cast, "Reward", lambda name, *rest, **_: Started(*rest))
    monkeypatch.setattr(jobs.parts.cast, "connect", lambda *_: None)
    monkeypatch.setattr(jobs.parts.cast, "reserve", lambda *_: None)
    more = ["steps=5", "algorithm.epochs=3", "policy.train.schedule=linear", "value.train.schedule=cosine", "value.train.total_steps=7"]
    config = load(PPORecipe, None, [*ppo_overrides, *more])
    before = dump(config)
    jobs.parts.cast.start_cast(config)
    trained = [group.train.total_steps for group in made if isinstance(group, GroupConfig)]
    assert trained == [5 * 3 * 2, 7] and dump(config) == before
    few = load(PPORecipe, None, [*ppo_overrides, "algorithm.queries_per_step=3", "algorithm.minibatches=16"])
    assert few.optimiser_steps == 2 * 3  # a minibatch has one sample at least


def test_rloo_compares_rewards_with_their_kl_within_a_query_by_hand():
    # rewards 0.6 and 0.5, then 0.8 and 0.2; less β·k1 = 0.05 a token: 0.5 and 0.35, 0.6 and 0.15
    scores = [(0.9, 0.6), (0.5, 0.2), (0.4, 1.0), (0.2, 0.2)]
    given = scored([(1, 0.2)] * 2 + [(0.2, 1)] * 2, scores, [True] * 4, (2, 3, 4, 1), kl=0.1, samples_per_query=2)
    experience = make_experience(given, AlgorithmConfig(advantage="rloo", samples_per_query=2), beta=0.5)
    assert experience.stats["reward/mean"] == pytest.approx(0.525)
    assert experience.batch.per_token.keys() == {"old_logprobs", "advantages"}
    wanted = [[0.15] * 2, [-0.15] * 3, [0.45] * 4, [-0.45]]
    assert [list(row) for row in experience.batch.per_token["advantages"]] == [pytest.approx(row, abs=1e-6) for row in wanted]


@pytest.mark.parametrize(("combine", "rewards"), [("min", (0.6, 0.5)), ("mean", (0.75, 0.7)), ("product", (0.54, 0.45))])
def test_agreements_are_combined_as_the_recipe_says(combine, rewards):
    # agreements (0.9, 0.6) and (0.5, 0.9); the least one binds, whatever is made of them
    given = scored([(1, 0.2), (0.2, 1)], [(0.9, 0.6), (0.7, 0.9)], [True, True])
    experience = make_experience(given, AlgorithmConfig(combine=combine, lam=1.0), beta=0.0)
    assert [list(row) for row in experience.batch.per_token["returns"]] == [
        pytest.approx([reward] * n, abs=1e-6) for reward, n in zip(rewards, (2, 3), strict=True)
    ]
    assert experience.stats["reward/mean"] == pytest.approx(sum(rewards) / 2)
    assert experience.stats["binding/helpful"] == 0.5


def test_a_weighted_sum_is_asked_without_a_control_and_rewards_the_scores_alone(prompt_file, tokenizer):
    prompts = list(read_prompts(prompt_file))
    config = AlgorithmConfig(queries_per_step=16, combine="weighted", weights={"helpful": 0.8, "harmless": 0.2}, lam=1.0)
    drawn = draw_queries(prompts, tokenizer, 0, config, seed=1)
    assert {q.control for q in drawn} == {None}
    assert [q.prompt_ids for q in drawn] == [tuple(render(tokenizer, q.messages)) for q in drawn]
    controlled = draw_queries(prompts, tokenizer, 0, AlgorithmConfig(queries_per_step=16), seed=1)
    assert [(q.messages, q.seed) for q in drawn] == [(q.messages, q.seed) for q in controlled]  # the same prompts in the same order
    given = scored([None, None], [(0.9, 0.6), (0.7, 1.0)], [True, True], kl=0.1)
    experience = make_experience(given, config, beta=0.5)
    assert experience.stats["reward/mean"] == pytest.approx((0.84 + 0.76) / 2)
    assert experience.stats["score/harmless"] == pytest.approx(0.8)
    assert experience.batch.per_token["returns"][0] == pytest.approx([0.84 - 0.1, 0.84 - 0.05], abs=1e-6)
    assert not [name for name in experience.stats if name.startswith(("agreement", "binding", "reward/helpful="))]
    assert headline(experience.stats | {"seconds/step": 2}) == "reward 0.800  helpful 0.800  harmless 0.800  kl 0.25  2.0 s"
    with pytest.raises(ValueError, match="weights are for combine = \"weighted\", not for 'min'"):
        AlgorithmConfig(weights={"helpful": 0.8, "harmless": 0.2})


def test_a_truncated_response_earns_what_the_rule_says():
    given = scored([(1, 1), (1, 1)], [(0.8, 0.9), (0.8, 0.9)], [True, False])
    zero = make_experience(given, AlgorithmConfig(truncated="zero"), beta=0.0)
    kept = make_experience(given, AlgorithmConfig(truncated="score"), beta=0.0)
    assert zero.stats["reward/mean"] == pytest.approx(0.4) and kept.stats["reward/mean"] == pytest.approx(0.8)
    assert zero.stats["response/truncated"] == 0.5


def test_chunks_come_together_in_the_order_of_the_queries():
    whole = scored([(1, 1), (0.2, 1)], [(0.8, 0.9), (0.1, 0.2)], [True, False], lengths=(2, 3))
    parts = []
    for i in (1, 0):
        s = whole.samples
        one = Samples((s.queries[i],), (s.response_ids[i],), (s.sampler_logprobs[i],), s.finished[[i]], 0)
        parts.append(
            (np.array([i]), Scored(one, whole.scores_BA[[i]], (whole.old_logprobs[i],), (whole.ref_logprobs[i],), (whole.values[i],)))
        )
    joined = concatenate(parts)
    assert joined.samples.queries == whole.samples.queries
    assert np.array_equal(joined.scores_BA, whole.scores_BA) and np.array_equal(joined.samples.finished, whole.samples.finished)
    assert all(np.array_equal(a, b) for a, b in zip(joined.samples.response_ids, whole.samples.response_ids, strict=True))
