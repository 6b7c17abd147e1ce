"""What a job starts from where no recipe is named: the run that it resumes, a laptop's settings, or a node's."""

import json
import tomllib
from pathlib import Path

import pytest

from ctrlrl.config import differences, dump, leaves, load, part_of
from ctrlrl.errors import DataError, RecipeError
from jobs.critique import CritiqueRecipe
from jobs.distill import DistillRecipe
from jobs.dpo import DPORecipe
from jobs.evaluate import EvaluateRecipe
from jobs.finetune import FinetuneRecipe
from jobs.generate import GenerateRecipe
from jobs.parts import settings
from jobs.parts.cast import demands_of
from jobs.parts.settings import settled
from jobs.ppo import PPORecipe
from jobs.ppo_overlap import OverlapRecipe
from jobs.reward_model import RewardModelRecipe
from jobs.score import ScoreRecipe

RECIPES = Path(settings.__file__).parents[1] / "recipes"
PPO = ["policy.model=p", "prompts=x.jsonl", "reward.helpful.model=a", "reward.harmless.model=b"]
GIVEN = {
    PPORecipe: PPO,
    OverlapRecipe: PPO,
    GenerateRecipe: ["policy=p", *PPO[1:]],
    CritiqueRecipe: ["policy=p", "prompts=x.jsonl"],
    EvaluateRecipe: ["model=p", "prompts=x.jsonl", "judges.optimisation.helpful.model=a", "judges.optimisation.harmless.model=b"],
    FinetuneRecipe: ["policy.model=p", "data=d"],
    DPORecipe: ["policy.model=p", "critiques=c"],
    RewardModelRecipe: ["reward_model.model=p", "data=d"],
    ScoreRecipe: ["data=d", "reward.helpful.model=a"],  # a section that may be left out: nothing is laid under it
}
RESUMED = (PPORecipe, OverlapRecipe, FinetuneRecipe, DPORecipe, RewardModelRecipe)


@pytest.fixture
def gpus(monkeypatch, request):
    """As many GPUs are there as the test is given."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(settings, "gpus_of", lambda cluster: getattr(request, "param", 0))


@pytest.mark.parametrize("gpus", [0, 8], indirect=True)
@pytest.mark.parametrize("kind", GIVEN, ids=lambda kind: kind.__name__)
def test_each_job_starts_from_settings_that_fit(kind, gpus, capsys, request):
    there = request.node.callspec.params["gpus"]
    config = settled(kind, "", GIVEN[kind], {}, resume=False)
    values = leaves(config.model_dump())
    asked = {gpu for key, gpu in values.items() if key.endswith("resources.gpus") and not key.startswith("judges")}
    assert asked == {1 if there and kind is not ScoreRecipe else 0}
    dtypes = {v for k, v in values.items() if k.endswith(".dtype") and not k.startswith("judges")}
    assert dtypes == {"bfloat16" if there and kind is not ScoreRecipe else "float32"}
    assert values.get("sampling.max_new_tokens", 64) == (64 if not there or "sampling.max_new_tokens" not in values else 512)
    assert capsys.readouterr().out == ""  # a mistake in its input is one message
    config.cluster.begin()
    said = capsys.readouterr().out
    name, why = ("node", "8 GPUs are there") if there else ("laptop", "no GPU is there")
    assert said.startswith(f"settings: jobs/recipes/{name}.toml, because {why}") and said.count("\n") == 1


@pytest.mark.parametrize("gpus", [0, 8], indirect=True)
@pytest.mark.parametrize("kind", GIVEN, ids=lambda kind: kind.__name__)
def test_the_settings_of_all_jobs_may_be_named_like_a_recipe(kind, gpus, capsys, monkeypatch):
    monkeypatch.chdir(RECIPES)
    config = settled(kind, "laptop.toml", GIVEN[kind], {}, resume=False)
    monkeypatch.setattr(settings, "gpus_of", lambda cluster: 0)
    assert dump(config) == dump(settled(kind, "", GIVEN[kind], {}, resume=False))
    config.cluster.begin()
    assert capsys.readouterr().out.startswith("settings: jobs/recipes/laptop.toml, because --recipe says so; ")
    with pytest.raises(RecipeError, match="unknown key 'sed'"):
        settled(kind, "laptop.toml", [*GIVEN[kind], "sed=1"], {}, resume=True)


def test_what_the_command_line_says_stands(gpus, capsys):
    config = settled(PPORecipe, "", [*PPO, "sampling.max_new_tokens=9", "policy.train.dtype=bfloat16"], {"out": "elsewhere"}, resume=False)
    assert (config.sampling.max_new_tokens, config.policy.train.dtype, config.value.train.dtype) == (9, "bfloat16", "float32")
    assert (config.algorithm.queries_per_step, config.out) == (32, "elsewhere")
    config.cluster.begin()
    assert "algorithm.queries_per_step=32" in capsys.readouterr().out


def test_every_key_of_the_two_files_is_one_of_some_job():
    for name in ("laptop", "node"):
        values = tomllib.loads((RECIPES / f"{name}.toml").read_text())
        taken = {key for kind in GIVEN for key in leaves(part_of(kind, values))}
        assert taken == set(leaves(values))


def test_nothing_is_laid_under_a_recipe(gpus, capsys):
    config = settled(PPORecipe, str(RECIPES / "ppo.toml"), [], {}, resume=False)
    assert config.policy.resources.gpus == 1 and config.sampling.max_new_tokens == 512
    config.cluster.begin()
    config.cluster.begin()
    assert capsys.readouterr().out == f"settings: {RECIPES / 'ppo.toml'}\n"  # once


def test_ppo_fits_a_node_of_eight_gpus():
    bundles = demands_of(load(PPORecipe, RECIPES / "ppo.toml"))
    assert sum(bundle.get("GPU", 0) for places in bundles.values() for bundle in places) == 8


@pytest.mark.parametrize("kind", RESUMED, ids=lambda kind: kind.__name__)
def test_a_resumed_run_needs_nothing_but_its_directory(kind, gpus, tmp_path, capsys):
    out = tmp_path / "moved"
    out.mkdir()
    begun = load(kind, None, [*GIVEN[kind], "out=/where/it/began", "seed=7", "checkpoint_every=77"])
    (out / "recipe.json").write_text(dump(begun))
    stored = json.loads(dump(begun)) | {"out": str(out)}
    for overrides, options in (([], {"out": str(out)}), ([f"out={out}"], {})):
        found = settled(kind, "", overrides, options, resume=True)
        assert json.loads(dump(found)) == stored
        found.cluster.begin()
        assert capsys.readouterr().out == f"settings: those that {str(out)!r} was begun with\n"
    changed = json.loads(dump(settled(kind, "", ["seed=8", "cluster.replacements=3"], {"out": str(out)}, resume=True)))
    assert differences(stored, changed) == ["cluster.replacements: 8 -> 3", "seed: 7 -> 8"]
    with pytest.raises(RecipeError, match=r"with the settings that '.*moved' was begun with: unknown key 'sed': did you mean 'seed'"):
        settled(kind, "", ["sed=8"], {"out": str(out)}, resume=True)
    with pytest.raises(RecipeError, match=r"there is no run to resume, and for a new one '.*' is required"):
        settled(kind, "", [], {"out": str(tmp_path / "elsewhere")}, resume=True)


def test_a_run_is_resumed_by_the_settings_of_its_own_job(gpus, tmp_path):
    begun = load(OverlapRecipe, None, [*PPO, f"out={tmp_path}", "lag=2", "sampling.max_new_tokens=77"])
    (tmp_path / "recipe.json").write_text(dump(begun))
    options = {"out": str(tmp_path)}
    assert settled(PPORecipe, "", [], options, resume=True).sampling.max_new_tokens == 77  # the run tells what else differs
    with pytest.raises(RecipeError, match="begun with: 'data' is required"):
        settled(FinetuneRecipe, "", [], options, resume=True)
    assert settled(OverlapRecipe, "", PPO, options, resume=False).sampling.max_new_tokens == 64
    (tmp_path / "recipe.json").write_text('{"out": ')
    with pytest.raises(DataError, match=r"recipe\.json is damaged"):
        settled(PPORecipe, "", [], options, resume=True)


def test_a_job_without_workers_has_nothing_to_fit(gpus, capsys):
    assert settled(DistillRecipe, "", ["data=d"], {}, resume=False) == load(DistillRecipe, None, ["data=d"])
    assert capsys.readouterr().out == ""
