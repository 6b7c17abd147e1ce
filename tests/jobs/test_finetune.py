"""Fine-tuning on Ray from a distilled table to a controllable model, its resumption to the bit, and wrong input."""

import json
import math
import os
import re
import shutil
import signal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from ctrlrl.cli import app
from ctrlrl.config import load
from ctrlrl.control import CORNERS
from ctrlrl.models.loading import load_tokenizer
from ctrlrl.runs import read_metrics
from jobs.finetune import FinetuneRecipe, finetune, read_examples, weak_push
from jobs.parts.interim import InterimCrewConfig

STEPS = 6  # three epochs of 60 rows or less in batches of about 32


@pytest.fixture(scope="module")
def finished(ray_cluster, finetune_overrides, models, prompt_file, tmp_path_factory):
    """An undisturbed run with an evaluation every three steps, its directory and recipe."""
    out = tmp_path_factory.mktemp("finetune") / "run"
    looks = {
        "every": 3, "count": 3, "prompts": prompt_file, "sampling.max_new_tokens": 8, "rollout.engine.dtype": "float32",
        "rollout.engine.max_model_tokens": 128, "rollout.engine.kv_cache_gib": 0.05,
        "judges.helpful.model": models["helpful"], "judges.harmless.model": models["harmless"],
    }  # fmt: skip
    asked = [f"evaluation.{key}={json.dumps(value)}" for key, value in looks.items()]
    config = load(FinetuneRecipe, None, [*finetune_overrides, *asked, f"out={out}"])
    assert finetune(config) == 0
    return out, config


def test_every_step_is_logged_with_held_out_figures_by_corner(finished):
    out, config = finished
    _, kept, held = read_examples(config, load_tokenizer(config.policy.model))
    rows = read_metrics(out)
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    for row in rows[:-1]:
        assert row["train/gap"] == pytest.approx(row["train/treated_l"] - row["train/untreated_l"], abs=1e-5)
        assert {"train/loss", "train/grad_norm_max", "data/tokens", "seconds/train"} <= row.keys()
    assert [row["step"] for row in rows if "validation/loss" in row] == [0, 2, 4, 6]
    assert [row["data/epoch"] for row in rows[:-1]] == [0, 0, 0, 1, 1, 1]
    assert sum(row["data/sequences"] for row in rows[:3]) == 2 * len(kept)  # each row and its fake; the ragged tail is used
    assert "train/loss" not in rows[-1] and len(held) >= 4
    assert rows[-1]["validation/loss"] < rows[0]["validation/loss"] - 0.5
    assert sum(f"validation/gap/{corner.name}" in rows[-1] for corner in CORNERS) >= 2
    # A cosine of six steps after one of warm-up.
    rates = [row["train/learning_rate_max"] / 3e-3 for row in rows[:-1]]
    assert rates == pytest.approx([1.0, *(0.5 * (1 + np.cos(np.pi * i / 5)) for i in range(5))])


def test_every_n_steps_the_run_evaluates_its_weights_as_ctrlrl_evaluate_does(finished, tmp_path, evaluated_model):
    out, config = finished
    rows = read_metrics(out)
    assert [row["step"] for row in rows if "evaluation/seconds" in row] == [2, 5]
    looks = config.evaluation
    found = evaluated_model(looks, looks.rollout, looks.judges, config.seed, out / "model", tmp_path)
    assert {name: rows[5][name] for name in found} == pytest.approx(found, abs=1e-5)
    assert {name: rows[2][name] for name in found} != pytest.approx(found, abs=1e-5)  # three steps earlier it was another policy


def test_a_push_that_is_too_weak_for_long_answers_is_named_with_the_weight_that_is_not():
    unread = {"untreated_l": -2.5, "gap": 0.002}
    line = weak_push(unread, 1.0)
    assert "0.08 times as hard" in line and "gap 0.0020" in line and line.endswith("fake_weight = 12.2")
    assert float(line.rpartition(" ")[2]) * math.exp(-2.5) == pytest.approx(1, abs=0.05)
    assert weak_push(unread, 2.0).endswith("fake_weight = 12.2")
    # Strong enough; controls that are read, under which fakes become unlikely and the push fades as it is to; no push at all.
    assert not weak_push(unread, 10.0) and not weak_push({"untreated_l": -6.0, "gap": 3.0}, 1.0) and not weak_push(unread, 0.0)


def test_held_out_prompts_are_not_trained_on(finished):
    _, config = finished
    examples, kept, held = read_examples(config, load_tokenizer(config.policy.model))
    assert sorted([*kept, *held]) == list(range(80))
    trained, asked = (set(pq.read_table(config.data)["prompt_id"].take(pa.array(rows)).to_pylist()) for rows in (kept, held))
    assert not trained & asked


def test_the_result_is_an_ordinary_model_whose_template_takes_the_control(finished, assert_controllable):
    out, config = finished
    assert_controllable(out / "model", config.policy.model)


def test_a_run_is_bound_to_its_data_and_weights(finished, assert_bound_to_origins):
    out, config = finished
    assert_bound_to_origins(finetune, config, out, {"policy.model"}, "data")


def test_a_run_that_is_stopped_and_resumed_equals_an_undisturbed_one(finished, tmp_path, monkeypatch):
    out, config = finished
    shutil.copytree(out / "checkpoints" / "step-000003", tmp_path / "run" / "checkpoints" / "step-000003")
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step-000003\n")
    again = config.model_copy(update={"out": str(tmp_path / "run")})
    recipe = json.loads((out / "recipe.json").read_text()) | {"out": again.out}
    (tmp_path / "run" / "recipe.json").write_text(json.dumps(recipe))
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(5)))  # two steps were cut off

    import jobs.parts.offline

    def stop_in_the_fifth_step(figures, real=jobs.parts.offline._headline):
        if figures["data/epoch"] == 1 and len(read_metrics(tmp_path / "run")) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(figures)

    monkeypatch.setattr(jobs.parts.offline, "_headline", stop_in_the_fifth_step)
    assert finetune(again, resume=True) == 128 + signal.SIGTERM
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step-000005\n"
    for resumed, undisturbed in zip(read_metrics(tmp_path / "run")[3:], read_metrics(out)[3:5], strict=True):
        assert {k: v for k, v in resumed.items() if "seconds" not in k} == {k: v for k, v in undisturbed.items() if "seconds" not in k}
    states = [load_file(folder / "checkpoints/step-000005/trainer/rank-00000.safetensors") for folder in (out, tmp_path / "run")]
    assert {name.partition("/")[0] for name in states[0]} == {"weight", "exp_avg", "exp_avg_sq"}
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not (tmp_path / "run" / "model").exists()


def test_a_run_goes_on_with_more_ranks(finished, assert_resumes_on_two_ranks):
    out, config = finished
    assert_resumes_on_two_ranks(finetune, config, out, 3, "policy", evaluation=InterimCrewConfig())


# --- wrong input, without actors ---


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data=./gone", "gone.*does not exist: give a table or the directory of ctrlrl distill"),
        ("objective=ppo", "objective.*'plm', 'clm' or 'exmate'"),
        ("batch.tokens=100", "set exactly one of the two above 0"),
        ("steps=7", "steps = 7 is more than the 6 steps of epochs = 2"),
        ("policy.train.warmup_steps=3", "both ask for a warm-up"),
        ("max_length=20", r"80 of 80 rows of .* exceed 20 tokens.*set skip_long = true"),
        ("policy.model={helpful}", "give a causal language model"),
        ('policy.train.lora={{rank = 2, targets = ["lm_head"]}}', "lora.targets = .'lm_head'. has the output head"),
        ("policy.train.lora.export=both", "policy.train.lora.export"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(finetune_overrides, models, tmp_path, override, message):
    arguments = ["finetune", "--out", str(tmp_path / "run")]
    for setting in (*finetune_overrides, override.format(**models)):
        arguments += ["--set", setting]
    result = CliRunner().invoke(app, arguments)
    output = " ".join(result.output.split())
    assert result.exit_code == 2 and "Traceback" not in output
    assert re.search(message, output), output
    assert not (tmp_path / "run").exists()


def test_a_table_without_controls(finetune_overrides, distilled, tmp_path):
    pq.write_table(pq.read_table(distilled).drop_columns(["helpful", "harmless"]), tmp_path / "free.parquet")
    arguments = [part for setting in (*finetune_overrides, f"data={tmp_path / 'free.parquet'}") for part in ("--set", setting)]
    result = CliRunner().invoke(app, ["finetune", "--out", str(tmp_path / "run"), *arguments])
    assert result.exit_code == 2 and "without helpful, harmless" in " ".join(result.output.split())
