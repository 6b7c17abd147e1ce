"""Wrong input is answered with one clear message and exit code 2: no traceback, nothing half-written; and what doctor says."""

import ast
import importlib
import inspect
import json
import shutil
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ctrlrl import cli
from ctrlrl.cli import app
from ctrlrl.data.generation import Layout
from ctrlrl.data.sources import read_prompts
from ctrlrl.doctor import examine
from ctrlrl.models.loading import load_tokenizer


@pytest.fixture
def run(ppo_overrides, tmp_path):
    """Call `ctrlrl ppo` with the tiny recipe and further overrides; returns (exit code, message)."""

    def call(*overrides, recipe=""):
        arguments = ["ppo", "--out", str(tmp_path / "run"), *(["--recipe", recipe] if recipe else [])]
        for override in (*ppo_overrides, *overrides):
            arguments += ["--set", override]
        result = CliRunner().invoke(app, arguments)
        assert "Traceback" not in result.output
        assert not (tmp_path / "run").exists()
        return result.exit_code, result.output

    return call


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithm.clipp=0.3", r"unknown key 'algorithm.clipp': did you mean 'clip'"),
        ("policy.train.learning_rate=-1", "policy.train.learning_rate.*greater than 0"),
        ("policy.train.learning_rate=fast", "policy.train.learning_rate.*valid number"),
        ("steps", "is not of the form"),
        ("policy.model=./gone", "model directory './gone' does not exist"),
        ("reward.helpful.model={two_labels}", r"has 2 labels; a reward model has exactly 1 output"),
        ("reward.harmless.model={policy}", "give a sequence classifier"),
        ("policy.model={helpful}", "give a causal language model"),
        ("prompts=./gone.jsonl", "gone.jsonl"),
        ("algorithm.advantage=rloo", "set samples_per_query to 2 or more"),
        ("sampling.max_new_tokens=120", "raise rollout.engine.max_model_tokens"),
        ("rollout.engine.tensor_parallel=4", "num_attention_heads = 2.* divide: set rollout.engine.tensor_parallel to 1 or 2$"),
        ("rollout.engine.max_model_tokens=513", "has 512 positions: set rollout.engine.max_model_tokens = 512 or less"),
        ("reference.model={helpful}", "reference '.*helpful' is a LlamaForSequenceClassification: give a causal language model"),
        ("policy.ranks=0", "policy.ranks.*greater than 0"),
        ("value.ranks=0", "value.ranks.*greater than 0"),
    ],
)
def test_a_mistake_in_the_recipe(run, models, override, message):
    import re

    code, output = run(override.format(**models))
    assert code == 2
    assert re.search(message, " ".join(output.split())), output


def test_a_recipe_that_is_missing_or_not_toml(run, tmp_path):
    assert run(recipe="gone.toml") == (2, "ctrlrl: recipe 'gone.toml' does not exist: give the path of a TOML file\n")
    bad = tmp_path / "bad.toml"
    bad.write_text("steps = = 3\n")
    code, output = run(recipe=str(bad))
    assert code == 2 and "is not TOML" in output and "line 1" in output


def test_a_prompt_file_with_a_bad_line_is_named_with_its_line(run, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "Hello"}) + '\n{"promt": "typo"}\n')
    code, output = run(f"prompts={path}")
    assert code == 2 and f"{path}:2" in output.replace("\n", "") and '"prompt"' in output


def test_a_placement_that_the_cluster_cannot_satisfy(run, ray_cluster):
    code, output = run("policy.ranks=2", "policy.resources.gpus=4")
    output = " ".join(output.split())
    assert code == 2 and "policy: 2 x {'CPU': 1, 'GPU': 4.0}" in output and "0 of 0 GPU free" in output and "lower the workers" in output


def test_a_relative_output_in_a_submitted_job_is_refused(ppo_overrides, monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    arguments = [part for override in ppo_overrides for part in ("--set", override)]
    result = CliRunner().invoke(app, ["ppo", "--out", "runs/x", *arguments])
    assert result.exit_code == 2 and "give an absolute path" in result.output


def test_an_evaluation_level_out_of_range(models, prompt_file, tmp_path):
    settings = {"model": models["policy"], "prompts": prompt_file, "levels": [0.2, 1.5]}
    settings |= {f"judges.optimisation.{a}.model": models[a] for a in ("helpful", "harmless")}
    arguments = [part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    result = CliRunner().invoke(app, ["evaluate", "--out", str(tmp_path / "e"), *arguments])
    assert result.exit_code == 2 and "1.5 is not a level: give a number from 0 to 1" in result.output
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize("command", ["ppo", "generate", "evaluate", "dpo", "reward-model"])
def test_a_prompt_that_the_chat_template_refuses(models, tmp_path, command):
    strict, data = tmp_path / "strict", tmp_path / "data.jsonl"
    shutil.copytree(models["policy"], strict)
    tokenizer = load_tokenizer(models["policy"])
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + tokenizer.chat_template
    )
    tokenizer.save_pretrained(strict)
    rows = [{"prompt": "Hello", "chosen": "Hi", "rejected": "No"} | system for system in ({}, {"system": "Be brief."})]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [f"prompts={data}", "rollout.engine.max_model_tokens=512", "sampling.max_new_tokens=12"]
    judged = [f"{a}.model={models[a]}" for a in ("helpful", "harmless")]
    settings = {
        "ppo": [*asked, f"policy.model={strict}", *(f"reward.{setting}" for setting in judged)],
        "generate": [*asked, f"policy={strict}", *(f"reward.{setting}" for setting in judged)],
        "evaluate": [*asked, f"model={strict}", *(f"judges.optimisation.{setting}" for setting in judged)],
        "dpo": [f"policy.model={strict}", f'tasks=[{{name = "a", data = "{data}"}}]'],
        "reward-model": [f"data={data}", f"reward_model.model={strict}", "validation.share=0"],
    }[command]
    options = [part for setting in settings for part in ("--set", setting)]
    result = CliRunner().invoke(app, [command, "--out", str(tmp_path / "run"), *options])
    output = " ".join(result.output.split())
    assert result.exit_code == 2 and "Traceback" not in output, output
    assert f"{data}:2: the chat template of '{strict}' refuses a conversation of system, user" in output
    assert "System role not supported: give prompts that it takes (the system text at the head" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["ppo", "generate", "evaluate", "score", "reward-model"])
def test_a_conversation_that_a_reward_models_chat_template_refuses(models, tmp_path, command):
    strict, data, out = tmp_path / "strict", tmp_path / "data.jsonl", tmp_path / "run"
    shutil.copytree(models["harmless"], strict)
    tokenizer = load_tokenizer(models["policy"])
    tokenizer.chat_template = "{% for m in messages if m.role != 'system' %}<s>{{ m.content }}<end>{% endfor %}"  # drops it
    tokenizer.save_pretrained(strict)
    asked = [{"prompt": "Hello"}, {"system": "Be brief.", "prompt": "Hello"}]
    data.write_text("".join(json.dumps(row | {"chosen": "Hi", "rejected": "No"}) + "\n" for row in asked))
    room = [f"prompts={data}", "rollout.engine.max_model_tokens=512", "sampling.max_new_tokens=12"]
    judged = [f"helpful.model={models['helpful']}", f"harmless.model={strict}"]
    if command == "score":
        out.mkdir()
        layout = Layout(out)
        layout.write_prompts(list(read_prompts(data)))
        with layout.samples().open_or_create({"x": 1}, shards=0) as store:
            store.finish({})
    settings = {
        "ppo": [*room, f"policy.model={models['policy']}", *(f"reward.{setting}" for setting in judged)],
        "generate": [*room, f"policy={models['policy']}", *(f"reward.{setting}" for setting in judged)],
        "evaluate": [*room, f"model={models['policy']}", *(f"judges.optimisation.{setting}" for setting in judged)],
        "score": [f"reward.{setting}" for setting in judged],
        "reward-model": [f"data={data}", f"reward_model.model={strict}", "validation.share=0"],
    }[command]
    options = [part for setting in settings for part in ("--set", setting)]
    result = CliRunner().invoke(app, [command, *([str(out)] if command == "score" else ["--out", str(out)]), *options])
    output = " ".join(result.output.split())
    assert result.exit_code == 2 and "Traceback" not in output, output
    place = f"{data}:2" if command != "score" else f"prompt {list(read_prompts(data))[1].prompt_id}"
    reader = "" if command == "reward-model" else "the reward model cannot read it: "
    assert f"{place}: {reader}the chat template of '{strict}' does not keep the text of system message" in output
    assert "(the system text at the head of the user's message)" in output


def test_doctor_finds_everything_here():
    lines, healthy = examine()
    assert healthy, lines
    named = {line.split()[0] for line in lines}
    assert {"vllm", "torch", "jinja2", "scipy", "safetensors", "rich", "pydantic"} <= named and lines[-1] == "all there"
    assert not {"pytest", "ruff", "nvidia_ml_py"} & named  # of the extras


def test_doctor_names_what_is_missing(monkeypatch):
    import ctrlrl.doctor

    asked = ["no-such-engine[fast]<2,>=1", 'no-such-tool; extra == "dev"']
    monkeypatch.setattr(ctrlrl.doctor, "requires", lambda name: asked)
    lines, healthy = examine()
    assert not healthy and "MISSING         no_such_engine is missing: pip install no-such-engine, or run make install" in lines
    assert "no_such_tool" not in " ".join(lines)
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 1


def test_doctor_says_when_nothing_is_installed(monkeypatch):
    import ctrlrl.doctor

    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(ctrlrl.doctor, "requires", absent)
    lines, healthy = examine()
    assert not healthy and any("ctrlrl is not installed" in line and "make install" in line for line in lines)


def test_a_command_hands_its_job_every_argument_in_its_place():
    """The command line restates what a job takes, so that it starts without it."""
    found = {}
    for function in ast.walk(ast.parse(Path(cli.__file__).read_text())):
        if not isinstance(function, ast.FunctionDef):
            continue
        imported = [node.module for node in ast.walk(function) if isinstance(node, ast.ImportFrom) and node.names[0].asname == "job"]
        calls = [node for node in ast.walk(function) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "job"]
        if imported:
            ((module,), (call,)) = imported, calls
            assert not call.keywords
            found[module] = [argument.id for argument in call.args]
    assert len(found) >= 20
    for module, given in found.items():
        assert given == list(inspect.signature(importlib.import_module(module).main).parameters), module
