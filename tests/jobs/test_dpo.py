"""Preference tuning end to end: ln 2 at the start, learning, the stored reference, a stopped run that resumes to the bit, refusals."""

import json
import math
import os
import shutil
import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file
from test_generate import cli
from transformers import AutoTokenizer

import jobs.dpo
import jobs.parts.offline
from ctrlrl.config import load
from ctrlrl.errors import RunError
from ctrlrl.models.scorer import ReferenceConfig, ReferenceModel
from ctrlrl.runs import read_metrics
from jobs.dpo import DPORecipe, dpo, read_data

PERSONA = {"system": "You are a pirate.", "chosen": "Aye, bread it be.", "rejected": "Mix flour and water."}


@pytest.fixture(scope="session")
def dpo_overrides(critiqued, models, tmp_path_factory) -> list[str]:
    """Overrides for preference tuning on the tiny policy: the session's critiques and a further task at weight 0.5."""
    persona = tmp_path_factory.mktemp("persona") / "rows.jsonl"
    persona.write_text("".join(json.dumps({**PERSONA, "prompt": f"Bread or {i} cakes?"}) + "\n" for i in range(20)))
    settings = {
        "critiques": str(critiqued[0].directory), "policy.model": models["policy"], "seed": 2, "epochs": 2, "steps": 4,
        "batch.sequences": 8, "validation.share": 0.25, "validation.every": 2, "checkpoint_every": 2, "policy.train.dtype": "float32",
        "policy.train.learning_rate": 2e-3, "policy.train.zero_stage": 0, "reference.dtype": "float32", "reference.workers": 2,
        "cluster.placement_deadline_s": 120, "cluster.start_deadline_s": 240, "cluster.call_deadline_s": 120,
    }  # fmt: skip
    further = f'tasks=[{{name = "persona", data = "{persona}", weight = 0.5}}]'
    return [*(f"{key}={json.dumps(value)}" for key, value in settings.items()), further]


def recipe(overrides, out, *more) -> DPORecipe:
    return load(DPORecipe, None, [*overrides, f"out={out}", *more])


@pytest.fixture(scope="session")
def tuned(ray_cluster, dpo_overrides, tmp_path_factory) -> Path:
    """An undisturbed run of four steps."""
    out = tmp_path_factory.mktemp("tuned") / "run"
    assert dpo(recipe(dpo_overrides, out)) == 0
    return out


def test_it_starts_at_ln_2_and_learns(tuned):
    rows = read_metrics(tuned)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert rows[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-5) == rows[0]["validation/loss"]
    assert rows[0]["train/margin"] == pytest.approx(0, abs=1e-4) and rows[0]["validation/loss/s0"] == pytest.approx(math.log(2), abs=1e-5)
    assert rows[4]["validation/loss/persona"] < 0.6 and rows[3]["train/loss"] < 0.65
    assert {"validation/accuracy/s1", "validation/accuracy/s0", "validation/margin/persona"} <= set(rows[4])
    assert "validation/loss" not in rows[1]


def test_the_stored_reference_is_the_models_own(tuned, dpo_overrides, models):
    config = recipe(dpo_overrides, tuned)
    mixture, batch = read_data(config, AutoTokenizer.from_pretrained(models["policy"]))
    scored = ReferenceModel(models["policy"], ReferenceConfig(dtype="float32"), 1.0).logprobs(batch)
    table = pq.read_table(tuned / "reference.parquet")
    sums = [row.sum() for row in scored]
    assert table["chosen"].to_pylist() == pytest.approx(sums[0::2], abs=1e-4)
    assert table["rejected"].to_pylist() == pytest.approx(sums[1::2], abs=1e-4)
    assert len(mixture.pairs) == len(table) and sorted(set(mixture.labels)) == ["persona", "s0", "s1"]


def test_a_stopped_run_resumes_to_the_bit_and_computes_no_reference(tuned, dpo_overrides, monkeypatch, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copy(tuned / "reference.parquet", tmp_path / "run")  # as if the run had been killed before its first step
    monkeypatch.setattr(jobs.dpo, "Reference", None)
    config, real, seen = recipe(dpo_overrides, tmp_path / "run"), jobs.parts.offline._headline, []
    monkeypatch.setattr(
        jobs.parts.offline, "_headline", lambda f: (seen.append(f), len(seen) == 2 and os.kill(os.getpid(), signal.SIGTERM), real(f))[2]
    )
    assert dpo(config) == 128 + signal.SIGTERM
    assert len(read_metrics(tmp_path / "run")) == 2 and not (tmp_path / "run" / "model").exists()
    assert dpo(config, resume=True) == 0
    whole, resumed = (load_file(folder / "model" / "model.safetensors") for folder in (tuned, tmp_path / "run"))
    assert whole.keys() == resumed.keys() and all(whole[name].equal(resumed[name]) for name in whole)
    figures = [[{k: v for k, v in row.items() if "second" not in k} for row in read_metrics(d)] for d in (tuned, tmp_path / "run")]
    assert figures[0] == figures[1]
    (tmp_path / "run" / "reference.parquet").write_bytes(b"")
    with pytest.raises(RunError, match="delete it"):
        dpo(config, resume=True)


def test_a_run_goes_on_with_more_ranks(tuned, dpo_overrides, assert_resumes_on_two_ranks):
    assert_resumes_on_two_ranks(dpo, recipe(dpo_overrides, tuned), tuned, 2, "policy")


def test_a_run_is_bound_to_its_data_and_weights(tuned, dpo_overrides, assert_bound_to_origins):
    assert_bound_to_origins(dpo, recipe(dpo_overrides, tuned), tuned, {"policy.model"}, "pairs", ("critiques", "tasks.0.data"))


def test_the_model_is_an_ordinary_directory_with_its_chat_template(tuned, models):
    own, exported = (AutoTokenizer.from_pretrained(name) for name in (models["policy"], str(tuned / "model")))
    messages = [{"role": "system", "content": "You are a pirate."}, {"role": "user", "content": "Bread?"}]
    assert exported.apply_chat_template(messages, tokenize=False) == own.apply_chat_template(messages, tokenize=False)
    before, after = (load_file(f"{folder}/model.safetensors") for folder in (models["policy"], tuned / "model"))
    assert before.keys() == after.keys() and not all(before[name].equal(after[name]) for name in before)


def test_the_baseline_is_one_line_away(dpo_overrides, critiqued, models):
    tokenizer = AutoTokenizer.from_pretrained(models["policy"])
    alone = [*dpo_overrides, "tasks=[]", "validation.share=0"]
    cst, plain = (read_data(recipe(alone, "x", f"method={m}"), tokenizer)[0] for m in ("cst", "plain"))
    assert len(cst.train) == 2 * len(plain.train) == 2 * len(plain.pairs)
    assert [(p.messages[1:], p.chosen) for p in cst.pairs[0::2]] == [(p.messages, p.chosen) for p in plain.pairs]
    assert len(plain.pairs) == critiqued[0].read_pairs().num_rows


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("critiques=./gone", "is no directory of ctrlrl critique"),
        ("critiques={unfinished}", "is not finished"),
        ("critiques={none}", "holds no usable pair"),
        ("critiques= tasks=[]", "nothing to train on: give critiques, a directory of ctrlrl critique, or tasks"),
        ("critiques= method=plain", "nothing to train on: give critiques, a directory of ctrlrl critique"),
        ('tasks=[{{name = "a", data = "{bad}"}}]', '{bad}:2: "chosen" is a text; got'),
        ('tasks=[{{name = "a", data = "{bad}", weight = 0}}]', "tasks.0.weight: Input should be greater than 0 (given: 0)"),
        ('tasks=[{{name = "a", data = "{bad}", weight = -1}}]', "greater than 0"),
        ('tasks=[{{name = "s1", data = "{bad}"}}]', "the task name 's1' is taken"),
        ("max_length=20", "preference pairs exceed 20 tokens"),
        ("beta=0", "beta: Input should be greater than 0"),
        ("method=dpo", "method: Input should be 'cst' or 'plain'"),
        ('policy.train.lora={{rank = 2, targets = ["nothing"]}}', "lora.targets = ['nothing'] cannot be adapted"),
        ("policy.model={helpful}", "give a causal language model"),
        ("reference.model={helpful}", "is a LlamaForSequenceClassification: give a causal language model"),
        ("reference.model=./gone", "model directory './gone' does not exist"),
    ],
)
def test_mistakes_are_told(dpo_overrides, critiqued, models, tmp_path, override, message):
    names = {name: str(tmp_path / name) for name in ("bad", "unfinished", "none")} | models
    names["bad"] += ".jsonl"
    Path(names["bad"]).write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "rejected": "c"}\n')
    for copy in ("unfinished", "none"):
        shutil.copytree(critiqued[0].directory, names[copy])
    (Path(names["unfinished"]) / "manifest.json").unlink()
    pq.write_table(critiqued[0].read_pairs().slice(0, 0), Path(names["none"]) / "pairs.parquet")
    parts = override.format(**names).split(" ") if override.startswith("critiques= ") else [override.format(**names)]
    options = [part for o in [*dpo_overrides, *parts] for part in ("--set", o)]
    code, output = cli("dpo", "--out", tmp_path / "run", *options)
    assert code == 2 and message.format(**names) in output, output
    assert not (tmp_path / "run").exists()
