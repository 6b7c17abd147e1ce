"""Reward-model training on Ray: an encoder with token types, and a causal model with an adapter; learning, resuming, scoring."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ctrlrl.cli import app
from ctrlrl.config import load
from ctrlrl.data.preferences import split_pairs
from ctrlrl.data.sources import read_pairs
from ctrlrl.models.loading import check_reward_model, load_reward_model, load_tokenizer
from ctrlrl.models.scorer import Scorer, ScorerConfig
from ctrlrl.runs import read_metrics
from jobs.reward_model import RewardModelRecipe, encode_pairs, train_reward_model

STEPS = 8


@pytest.fixture(scope="session")
def reward_overrides(pair_file) -> list[str]:
    """Overrides that train a tiny reward model within seconds."""
    settings = {
        "data": pair_file, "epochs": 2, "batch.sequences": 14, "validation.share": 0.2, "validation.every": 4, "checkpoint_every": 4,
        "reward_model.train.dtype": "float32", "reward_model.train.zero_stage": 0, "reward_model.train.learning_rate": 3e-3,
        "cluster.placement_deadline_s": 120, "cluster.start_deadline_s": 240, "cluster.call_deadline_s": 120,
    }  # fmt: skip
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


@pytest.fixture(scope="module")
def finished(ray_cluster, reward_overrides, encoder, tmp_path_factory):
    """An undisturbed run on the encoder, its directory and recipe."""
    out = tmp_path_factory.mktemp("reward") / "run"
    config = load(RewardModelRecipe, None, [*reward_overrides, f"reward_model.model={encoder}", f"out={out}"])
    assert train_reward_model(config) == 0
    return out, config


def held_out(config):
    pairs = read_pairs(config.data)
    _, held = split_pairs(pairs, config.validation.share, config.validation.rows, config.seed, "x")
    return [pairs[i] for i in held]


def scored_accuracy(model, config):
    """Loss and accuracy on the held-out pairs by what every other job scores with."""
    pairs, scorer = held_out(config), Scorer(ScorerConfig(model=model, batch_tokens=100))
    raw = scorer.raw([(p.messages, answer) for p in pairs for answer in (p.chosen, p.rejected)]).reshape(-1, 2)
    margins = torch.from_numpy(raw[:, 0] - raw[:, 1])
    return -torch.nn.functional.logsigmoid(margins).mean().item(), (margins > 0).float().mean().item()


def test_a_new_head_learns_beyond_the_longer_answer(finished):
    out, config = finished
    rows = read_metrics(out)
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    first, last = rows[0], rows[-1]
    assert last["validation/accuracy"] == 1.0 and last["validation/loss"] < 0.5 < first["validation/loss"]
    count = len(held_out(config))
    assert last["validation/accuracy_low"] == pytest.approx(count / (count + 1.959964**2)) and last["validation/accuracy_high"] == 1
    longer = [len(p.chosen) > len(p.rejected) for p in held_out(config)]
    assert last["validation/longer_wins"] == pytest.approx(np.mean(longer)) and 0.2 < np.mean(longer) < 0.8


def test_the_result_scores_as_it_was_trained(finished):
    out, config = finished
    check_reward_model(str(out / "model"))
    last = read_metrics(out)[-1]
    loss, accuracy = scored_accuracy(str(out / "model"), config)
    assert loss == pytest.approx(last["validation/loss"], abs=1e-5) and accuracy == last["validation/accuracy"]


def test_token_types_mark_the_answer_and_a_long_conversation_keeps_opening_and_end(finished, encoder):
    _, config = finished
    tokenizer = load_tokenizer(encoder)
    pair = read_pairs(config.data)[0]
    examples = encode_pairs(config, tokenizer, [pair])
    batch = examples.batch(np.array([0]), 0)
    for tokens, start, answer in zip(batch.tokens, batch.prompt_lengths, (pair.chosen, pair.rejected), strict=True):
        assert tokens[start:].tolist() == [*tokenizer(answer, add_special_tokens=False)["input_ids"], 3] and tokens[start - 1] == 3
    cut = encode_pairs(config.model_copy(update={"max_length": 9}), tokenizer, [pair]).batch(np.array([0]), 0)
    assert cut.tokens[0].tolist() == [2, *batch.tokens[0][-8:]]
    assert 9 - cut.prompt_lengths[0] == len(batch.tokens[0]) - batch.prompt_lengths[0]


def test_a_run_is_bound_to_its_data_and_weights(finished, assert_bound_to_origins):
    out, config = finished
    assert_bound_to_origins(train_reward_model, config, out, {"reward_model.model"}, "data")


@pytest.mark.parametrize(("ranks", "zero_stage", "tolerance"), [(1, 0, 0.0), (2, 2, 1e-6)], ids=["same-ranks", "more-ranks"])
def test_a_resumed_run_equals_an_undisturbed_one(finished, tmp_path, ranks, zero_stage, tolerance):
    out, config = finished
    shutil.copytree(out / "checkpoints" / "step-000004", tmp_path / "run" / "checkpoints" / "step-000004")
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step-000004\n")
    train = config.reward_model.train.model_copy(update={"zero_stage": zero_stage})
    changes = {"out": str(tmp_path / "run"), "reward_model": config.reward_model.model_copy(update={"ranks": ranks, "train": train})}
    again = config.model_copy(update=changes)
    (tmp_path / "run" / "recipe.json").write_text(json.dumps(json.loads((out / "recipe.json").read_text()) | {"out": again.out}))
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(6)))
    assert train_reward_model(again, resume=True) == 0
    assert (tmp_path / "run" / "origins.json").read_text() == (out / "origins.json").read_text()  # which this copy had not
    for resumed, undisturbed in zip(read_metrics(tmp_path / "run")[4:], read_metrics(out)[4:], strict=True):
        figures = {name: value for name, value in undisturbed.items() if "seconds" not in name}
        assert {name: resumed[name] for name in figures} == pytest.approx(figures, rel=0, abs=10 * tolerance)
    a, b = (load_reward_model(str(folder / "model"), "float32").state_dict() for folder in (out, tmp_path / "run"))
    if ranks == 1:  # else weights without effect on a score, such as a key's bias, follow the rounding of their gradient
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_causal_backbone_with_an_adapter(ray_cluster, reward_overrides, models, tmp_path):
    settings = {"reward_model.model": models["policy"], "reward_model.train.lora.rank": 4, "reward_model.train.zero_stage": 1}
    settings |= {"reward_model.train.learning_rate": 1e-2, "out": str(tmp_path / "run")}
    config = load(RewardModelRecipe, None, [*reward_overrides, *(f"{key}={json.dumps(value)}" for key, value in settings.items())])
    assert train_reward_model(config) == 0
    last = read_metrics(tmp_path / "run")[-1]
    assert last["validation/loss"] < 0.6
    loss, accuracy = scored_accuracy(str(tmp_path / "run" / "model"), config)
    assert loss == pytest.approx(last["validation/loss"], abs=1e-4) and accuracy == last["validation/accuracy"]


# --- wrong input, without actors ---


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reward_model.model={two_labels}", "is a classifier with 2 labels; a reward model has exactly 1 output"),
        ("data={bad}", r"bad.jsonl:2: .*\"chosen\""),
        ("data=./gone.jsonl", "gone.jsonl' does not exist"),
        ("reward_model.train.layout=packed", "reward_model.train.layout.*padded"),
        ("reward_model.model=./gone", "model directory './gone' does not exist"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(reward_overrides, models, tmp_path, override, message):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"}) + '\n{"prompt": "q", "chosen": 3, "rejected": "b"}\n')
    arguments = ["reward-model", "--out", str(tmp_path / "run")]
    for setting in (*reward_overrides, f"reward_model.model={models['policy']}", override.format(**models, bad=bad)):
        arguments += ["--set", setting]
    result = CliRunner().invoke(app, arguments)
    output = " ".join(result.output.split())
    assert result.exit_code == 2 and "Traceback" not in output
    assert re.search(message, output), output
    assert not (tmp_path / "run").exists()
