"""Rows that no job can use: every job refuses them in one message, or with --skip-bad-rows sets them aside, and studies hand that on."""

import json
from importlib import import_module
from pathlib import Path

import pyarrow as pa
import pytest
from typer.testing import CliRunner

import jobs.study
from ctrlrl.cli import app
from ctrlrl.config import load
from ctrlrl.data.schemas import DISTILLED
from ctrlrl.data.tuning import without_bad_rows
from ctrlrl.models.loading import load_tokenizer
from jobs.dpo import DPORecipe, read_data
from jobs.evaluate import EvaluateRecipe, asking_of
from jobs.generate import GenerateRecipe
from jobs.parts.beforehand import check_steps
from jobs.parts.interim import Interim, InterimConfig
from jobs.parts.variants import StudyRecipe, plan
from jobs.ppo import PPORecipe, check_inputs

ASKED = "\n\nHuman: How do I bake?\n\nAssistant: With flour.\n\nHuman: And then?"
TWICE = "\n\nHuman: How do I bake?\n\nAssistant: Let me see.\n\nAssistant: With flour.\n\nHuman: And then?"  # as in HH's harmless-base


def hh(asked: str, chosen: str = "Wait.", rejected: str = "No.") -> dict[str, str]:
    return {column: f"{asked}\n\nAssistant: {answer}" for column, answer in (("chosen", chosen), ("rejected", rejected))}


@pytest.fixture(scope="module")
def strict(models, tmp_path_factory) -> str:
    """The tiny policy with a chat template that refuses a system prompt."""
    folder = tmp_path_factory.mktemp("strict")
    for file in Path(models["policy"]).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tokenizer = load_tokenizer(models["policy"])
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    tokenizer.chat_template = refusal + tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def anthropic(tmp_path) -> str:
    """Lines 1, 4: good; 2: two assistant turns; 3: an empty answer, a good prompt; 5: overlong; 6: a system prompt."""
    long = hh(ASKED + " loaf" * 400)
    rows = [hh(ASKED), hh(TWICE), hh(ASKED + " Quickly?", chosen=""), hh(ASKED + "?"), long, {"system": "S"} | hh(ASKED)]
    path = tmp_path / "harmless-base.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def settings_of(command: str, models: dict[str, str], data: str) -> list[str]:
    """Settings of a job up to its data, for the command line."""
    asked = [f"prompts={data}", "rollout.engine.max_model_tokens=128", "sampling.max_new_tokens=12"]
    judged = [f"{a}.model={models[a]}" for a in ("helpful", "harmless")]
    settings = {
        "ppo": [*asked, f"policy.model={models['policy']}", *(f"reward.{setting}" for setting in judged)],
        "generate": [*asked, f"policy={models['policy']}", *(f"reward.{setting}" for setting in judged)],
        "critique": [*asked, f"policy={models['policy']}"],
        "evaluate": [*asked, f"model={models['policy']}", *(f"judges.optimisation.{setting}" for setting in judged)],
        "dpo": [f"policy.model={models['policy']}", f'tasks=[{{name = "a", data = "{data}"}}]', "max_length=128"],
        "reward-model": [f"data={data}", f"reward_model.model={models['policy']}"],
    }
    return [part for setting in settings[command] for part in ("--set", setting)]


@pytest.mark.parametrize("command", ["ppo", "generate", "critique", "evaluate", "dpo", "reward-model"])
def test_bad_rows_are_refused_in_one_message(models, anthropic, tmp_path, command):
    result = CliRunner().invoke(app, [command, "--out", str(tmp_path / "run"), *settings_of(command, models, anthropic)])
    output = " ".join(result.output.split())
    bad = 2 if command in ("dpo", "reward-model") else 1  # an answer's fault is none of the prompt
    assert result.exit_code == 2 and output.startswith(f"ctrlrl: {anthropic}:2: turn 3 of a transcript is the user's"), output
    share = f"({bad} of 6 rows {'are' if bad > 1 else 'is'} bad"
    assert f"{share}: mend the file, or set bad rows aside in rejects.jsonl with --skip-bad-rows" in output
    assert not (tmp_path / "run").exists() and "Traceback" not in output


JOBS = {name: name for name in ("generate", "critique", "evaluate", "dpo")} | {"ppo": "train", "reward-model": "train_reward_model"}


@pytest.mark.parametrize("command", JOBS)
@pytest.mark.parametrize("flag", [[], ["--skip-bad-rows"]])
def test_the_option_is_the_recipes_key_and_out_is_a_folders_name(models, anthropic, monkeypatch, command, flag):
    seen = []
    monkeypatch.setattr(import_module(f"jobs.{command.replace('-', '_')}"), JOBS[command], lambda config, **_: seen.append(config))
    result = CliRunner().invoke(app, [command, "--out", "2026-11-25", *flag, *settings_of(command, models, anthropic)])
    assert result.exit_code == 0, result.output
    assert seen[0].skip_bad_rows is bool(flag) and seen[0].out == "2026-11-25"


def lines_of(rejects) -> list[tuple[str, str]]:
    """The line and the reason of each reject, in order of lines."""
    return sorted((reject.source.rpartition(":")[2], reject.reason) for reject in rejects)


def test_ppo_and_evaluation_leave_out_what_cannot_be_asked(ppo_overrides, models, strict, anthropic, tmp_path):
    config = load(PPORecipe, None, [*ppo_overrides, f"prompts={anthropic}", f"policy.model={strict}", "skip_bad_rows=true"])
    prompts, _, rejects = check_inputs(config)
    assert [p.source for p in prompts] == [f"{anthropic}:{n}" for n in (1, 3, 4)]
    lines = lines_of(rejects)
    assert [n for n, _ in lines] == ["2", "5", "6"]
    assert "turn 3" in lines[0][1] and "leaves no room" in lines[1][1] and "refuses a conversation of system" in lines[2][1]

    judges = {a: {"model": models[a]} for a in ("helpful", "harmless")}
    settings = {"model": strict, "prompts": anthropic, "skip_bad_rows": True, "judges": {"optimisation": judges}}
    evaluation = EvaluateRecipe(**settings, rollout=config.rollout, sampling=config.sampling)
    asking = asking_of(evaluation)
    assert [cell.prompt.source for cell in asking.cells[::4]] == [p.source for p in prompts] and lines_of(asking.rejects) == lines

    looks = InterimConfig(every=1, prompts=anthropic, count=9, sampling=config.sampling)
    interim = Interim(looks, strict, config.rollout, 0, skip_bad_rows=True)
    assert lines_of(interim.rejects) == lines


def test_dpo_leaves_out_pairs_that_cannot_be_trained_on(strict, anthropic):
    settings = [f'tasks=[{{name = "a", data = "{anthropic}"}}]', f"policy.model={strict}", "skip_long=true", "max_length=128"]
    config, rejects = load(DPORecipe, None, [*settings, "validation.share=0", "skip_bad_rows=true"]), []
    mixture, _ = read_data(config, load_tokenizer(strict), rejects)
    assert [pair.source.rpartition(":")[2] for pair in mixture.pairs] == ["1", "4"]
    assert [n for n, _ in lines_of(rejects)] == ["2", "3", "6"] and '"chosen" is empty' in lines_of(rejects)[1][1]


def test_finetuning_leaves_out_rows_that_teach_nothing(strict):
    ask, system = [{"role": "user", "content": "Hello"}], [{"role": "system", "content": "S"}]
    row = {"prompt_id": "0" * 16, "unit": 0, "index": 0, "helpful": 1.0, "harmless": 1.0, "token_ids": None, "finish_reason": "length"}
    rows = [row | {"messages": m, "response": r} for m, r in ((ask, "Hi"), (ask, " "), (system + ask, "Hi"), (ask, "Ho"))]
    rejects = []
    table = without_bad_rows(pa.Table.from_pylist(rows, DISTILLED), load_tokenizer(strict), rejects)
    assert table["response"].to_pylist() == ["Hi", "Ho"]
    assert [r.source for r in rejects] == ["row 1 of the table", "row 2 of the table"] and "System role" in rejects[1].reason


def test_a_study_hands_it_on_and_reads_all_prompts_before_the_first_step(models, anthropic, tmp_path):
    judged = {a: {"model": models[a]} for a in ("helpful", "harmless")}
    short = {"rollout": {"engine": {"max_model_tokens": 256}}, "sampling": {"max_new_tokens": 8}}
    both = {"optimisation": judged, "held_out": judged}
    settings = {
        "title": "Small", "out": str(tmp_path), "chain": ["generate", "distill", "finetune", "evaluate"],
        "common": {
            "generate": {"policy": models["policy"], "prompts": anthropic, "reward": judged, "skip_bad_rows": False, **short},
            "distill": {"data": "{generate}"},
            "finetune": {"policy": {"model": models["policy"]}, "data": "{distill}"},
            "evaluate": {"model": "{finetune}/model", "prompts": anthropic, "judges": both, "skip_bad_rows": False, **short},
        },
        "variants": [{"name": "one"}],
    }  # fmt: skip
    (plain,) = plan(load(StudyRecipe, None, settings=settings)).values()
    del settings["common"]["generate"]["skip_bad_rows"], settings["common"]["evaluate"]["skip_bad_rows"]
    (skipping,) = plan(load(StudyRecipe, None, settings=settings | {"skip_bad_rows": True})).values()
    assert [step.folder for step in plain] == [step.folder for step in skipping]  # what is there is reused
    assert [getattr(step.config, "skip_bad_rows", None) for step in skipping] == [True, None, True, True]
    with pytest.raises(ValueError, match="harmless-base.jsonl:2: "):
        check_steps(plain)
    check_steps(skipping)


@pytest.mark.parametrize("kind", [PPORecipe, GenerateRecipe, EvaluateRecipe])
def test_the_recipes_that_name_hh_set_its_odd_rows_aside(kind):
    name = {PPORecipe: "ppo", GenerateRecipe: "generate", EvaluateRecipe: "evaluate"}[kind]
    recipe = Path(jobs.study.__file__).parent / "recipes" / f"{name}.toml"
    config = load(kind, recipe, ["policy=x"] if kind is GenerateRecipe else [])
    assert config.prompts.startswith("Anthropic/hh-rlhf") and config.skip_bad_rows


NOBODY = "~nobody-of-that-name/run"
HOMELESS = [
    ["distill", NOBODY], ["inspect", NOBODY], ["score", NOBODY, "--set", "reward.helpful.model=x"], ["calibrate", NOBODY, "--out", "x"],
    ["report", NOBODY], ["report", f"name={NOBODY}"], ["study", "baseline", "--world", NOBODY], ["evaluate", "--table", NOBODY],
    ["ppo", "--recipe", "jobs/recipes/ppo.toml", "--set", f"prompts={NOBODY}", "--set", "policy.model={policy}",
     "--set", "reward.helpful.model={helpful}", "--set", "reward.harmless.model={harmless}",
     "--set", "rollout.engine.max_model_tokens=128", "--set", "sampling.max_new_tokens=12"],
]  # fmt: skip


@pytest.mark.parametrize("arguments", HOMELESS, ids=lambda arguments: " ".join(arguments[:2]))
def test_the_home_of_nobody_is_told_in_one_message(models, arguments, monkeypatch):
    monkeypatch.chdir(Path(jobs.study.__file__).parents[1])
    result = CliRunner().invoke(app, [argument.format(**models) for argument in arguments])
    assert result.exit_code == 2, result.output
    assert "Could not determine home directory" in " ".join(result.output.split())
