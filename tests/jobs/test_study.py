"""Studies: how variants become steps that share work, what is refused before anything starts, and one real study on tiny models."""

import json
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow.parquet import read_table, write_table
from typer.testing import CliRunner

from ctrlrl.cli import app
from ctrlrl.config import dump, laid_over, load
from ctrlrl.control import ATTRIBUTES
from ctrlrl.errors import CtrlrlError, PlacementError, RecipeError, RunError
from ctrlrl.evaluation.exhibits import collect
from ctrlrl.models.origins import record_origins
from ctrlrl.models.scorer import ScorerConfig
from jobs.distill import DistillRecipe
from jobs.evaluate import EvaluateRecipe, asking_of, origin_of
from jobs.finetune import FinetuneRecipe, origins_of
from jobs.generate import GenerateRecipe
from jobs.parts.beforehand import check_steps
from jobs.parts.costs import Rates, cost_lines
from jobs.parts.variants import RECIPES, Step, StudyRecipe, plan
from jobs.study import chosen, most_demanded, reused, run_study

STUDIES = sorted(path.stem for path in (RECIPES / "studies").glob("*.toml"))
INPUTS = {"policy": "policy", "prompts": "train.jsonl", "test_prompts": "test.jsonl"} | {a: a for a in ATTRIBUTES}
JUDGED = {a: {"model": f"{{{a}}}"} for a in ATTRIBUTES}
CHAIN = ["generate", "distill", "finetune", "evaluate"]


def settings(**changes) -> dict:
    """A study of three variants on models that are named only: two objectives on one distillation, and another distillation."""
    return {
        "title": "Small", "chain": CHAIN, "inputs": INPUTS,
        "common": {
            "generate": {"policy": "{policy}", "prompts": "{prompts}", "reward": JUDGED},
            "distill": {"data": "{generate}"},
            "finetune": {"policy": {"model": "{policy}"}, "data": "{distill}"},
            "evaluate": {"model": "{finetune}/model", "prompts": "{test_prompts}", "judges": {"optimisation": JUDGED}},
        },
        "variants": [
            {"name": "clm", "set": {"finetune": {"objective": "clm"}}},
            {"name": "exmate", "set": {"finetune": {"objective": "exmate"}}},
            {"name": "vanilla", "set": {"distill": {"method": "vanilla"}}},
        ],
    } | changes  # fmt: skip


def study(*overrides: str, **changes) -> StudyRecipe:
    return load(StudyRecipe, None, overrides, settings(**changes))


def folders(config: StudyRecipe) -> dict[str, dict[str, str]]:
    """variant -> job -> name of the step's folder."""
    return {name: {step.name: step.folder.name for step in steps} for name, steps in plan(config).items()}


# --- planning, without Ray ---


def test_variants_share_the_steps_that_they_have_in_common(tmp_path):
    found = folders(study(f"out={tmp_path}"))
    assert [list(steps) for steps in found.values()] == [CHAIN] * 3
    clm, exmate, vanilla = found.values()
    assert clm["generate"] == exmate["generate"] == vanilla["generate"]
    assert clm["distill"] == exmate["distill"] != vanilla["distill"]
    assert len({v["finetune"] for v in found.values()}) == len({v["evaluate"] for v in found.values()}) == 3  # later steps differ with it
    assert not list(tmp_path.iterdir())


def test_a_step_gets_the_folders_of_earlier_ones_and_the_inputs(tmp_path):
    generate, distill, finetune, evaluate = plan(study(f"out={tmp_path}"))["exmate"]
    assert generate.folder.parent == tmp_path / "steps" and generate.config.out == str(generate.folder)
    assert generate.config.policy == "policy" and generate.config.reward["harmless"].model == "harmless"
    assert distill.config.data == str(generate.folder) and finetune.config.data == str(distill.folder)
    assert evaluate.config.model == f"{finetune.folder}/model" and evaluate.config.name == "exmate"
    assert finetune.config.objective == "exmate" and finetune.config.policy.ranks == 8  # of jobs/recipes/finetune.toml
    assert finetune.config.policy.resources.gpus == 1


def test_a_folder_is_named_after_what_is_made_and_not_after_where_and_on_how_much(tmp_path):
    base = folders(study(f"out={tmp_path / 'a'}"))
    elsewhere = ["cluster.call_deadline_s=5", "title=Other", "common.generate.rollout.workers=2", "common.finetune.checkpoint_every=7"]
    assert base == folders(study(f"out={tmp_path / 'b'}", *elsewhere))
    more = settings()["variants"] + [{"name": "plm", "set": {"finetune": {"objective": "plm"}}}]
    assert {name: steps for name, steps in folders(study(f"out={tmp_path}", variants=more)).items() if name in base} == base
    seeded = folders(study("seed=1"))
    assert all(seeded[name][job] != base[name][job] for name in base for job in CHAIN)
    warmer = folders(study("common.generate.sampling.temperature=0.7"))
    assert all(warmer[name][job] != base[name][job] for name in base for job in CHAIN)  # what follows is made from other answers
    tuned = folders(study("common.finetune.epochs=2"))
    assert [tuned["clm"][job] == base["clm"][job] for job in CHAIN] == [True, True, False, False]


def test_what_a_variant_sets_goes_before_what_is_common_and_that_before_the_recipe(tmp_path):
    mine = tmp_path / "mine.toml"
    mine.write_text('epochs = 3\nfake_weight = 0.5\n[policy]\nmodel = "x"\nranks = 2\n')
    changes = {"recipes": {"finetune": str(mine)}, "cluster": {"call_deadline_s": 7}}
    given = study('common.finetune.objective="plm"', "common.finetune.policy.resources.cpus=3", **changes)
    clm, exmate, vanilla = (plan(given)[name][2].config for name in ("clm", "exmate", "vanilla"))
    assert [clm.objective, exmate.objective, vanilla.objective] == ["clm", "exmate", "plm"]
    assert (clm.epochs, clm.fake_weight, clm.policy.ranks, clm.policy.resources.cpus) == (3, 0.5, 2, 3)
    assert clm.policy.model == "policy" and clm.cluster.call_deadline_s == 7


def test_what_is_set_for_a_world_is_set_with_a_world_alone(tmp_path):
    (tmp_path / "world.json").write_text(json.dumps({"fingerprint": "a", "facts": {}}))
    common = {**settings()["common"], "distill": {"data": "{generate}", "per_cell": 2}}
    extra = {"with_world": {"distill": {"per_cell": 3}}, "common": common}
    alone, there = (plan(study(f"out={tmp_path}", **extra, **world))["clm"] for world in ({}, {"world": str(tmp_path)}))
    assert [alone[1].config.per_cell, there[1].config.per_cell] == [2, 3]
    assert there[0].config.policy == str(tmp_path / "policy") and there[2].config.policy.train.dtype == "float32"  # the demo's recipe


def test_another_world_in_the_same_place_makes_other_steps(tmp_path):
    found = []
    for built in ("a", "b", "a"):
        (tmp_path / "world.json").write_text(json.dumps({"fingerprint": built, "facts": {}}))
        found.append(folders(study(f"out={tmp_path}", world=str(tmp_path))))
    assert found[0] == found[2] and not {*found[0]["clm"].values()} & {*found[1]["clm"].values()}


def test_a_variant_may_have_inputs_and_a_chain_of_its_own():
    variants = [
        {"name": "other", "inputs": {"policy": "other"}},
        {"name": "before", "chain": ["evaluate"], "set": {"evaluate": {"model": "{policy}"}}},
    ]
    other, before = plan(study(variants=variants)).values()
    assert other[0].config.policy == other[2].config.policy.model == "other"
    assert [step.name for step in before] == ["evaluate"] and before[0].config.model == "policy"


def test_the_cluster_has_room_for_the_step_that_asks_for_most():
    common = settings()["common"]
    common["finetune"]["policy"] |= {"ranks": 3, "resources": {"cpus": 2, "gpus": 1}}
    common["generate"] |= {"rollout": {"workers": {"min": 1, "max": 9}, "resources": {"cpus": 1, "gpus": 0, "custom": {"spot": 1}}}}
    for name in ATTRIBUTES:
        common["generate"]["reward"][name] = {"model": name, "resources": {"cpus": 0.5, "gpus": 0}}
    (steps,) = plan(study(common=common, variants=settings()["variants"][:1])).values()
    assert most_demanded(steps) == {"CPU": 10, "GPU": 3, "spot": 9}  # 9 rollout workers and two reward models; three ranks


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chain": ["generate", "align", "evaluate"]}, r"chain names 'align', which is no step: reward_model, generate, calibrate"),
        ({"chain": ["generate", "distill"]}, "the chain of 'clm' is .'generate', 'distill'.: name each step once, evaluate last"),
        ({"chain": ["finetune", "finetune", "evaluate"]}, "name each step once"),
        ({"variants": [{"name": "a"}, {"name": "a"}]}, "two variants are named 'a'"),
        ({"variants": []}, "variants.*at least 1"),
        ({"variants": [{"name": "a", "set": {"ppo": {"steps": 1}}}]}, "variant 'a' sets ppo, which is not in its chain"),
        ({"variants": [{"name": "a", "set": {"distill": {"methd": "moec"}}}]}, "variant 'a', distill: .*unknown key 'methd': did you mean"),
        ({"variants": [{"name": "a", "set": {"evaluate": {"model": "{ppo}/model"}}}]}, r"variant 'a', evaluate: \{ppo\}.*no earlier step"),
        ({"variants": [{"name": "a", "set": {"generate": {"policy": "{evaluate}"}}}]}, r"\{evaluate\} .* no input and no earlier step"),
        ({"inputs": {**INPUTS, "distill": "x"}}, "an input is named like a step, 'distill'"),
        ({"inputs": {"policy": "policy"}}, r"variant 'clm', generate: \{\w+\} in '\{\w+\}' is no input"),
        ({"world": "./gone"}, "gone.*holds no finished demo world"),
        ({"inputs": {**INPUTS, "policy": "./gone"}}, "model directory './gone' does not exist"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2_before_anything_starts(tmp_path, changes, message):
    overrides = [f"{key}={toml(value)}" for key, value in settings(**changes).items()]
    (tmp_path / "empty.toml").write_text("")
    arguments = ["study", str(tmp_path / "empty.toml"), "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(app, [*arguments, *(part for override in overrides for part in ("--set", override))])
    output = " ".join(result.output.split())
    assert result.exit_code == 2 and "Traceback" not in output
    assert re.search(message, output), output
    assert not (tmp_path / "run").exists()


def toml(value) -> str:
    """A value as an inline TOML value."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(part)}" for key, part in value.items()) + "}"
    return "[" + ", ".join(map(toml, value)) + "]" if isinstance(value, list | tuple) else json.dumps(value)


def test_what_was_made_of_another_table_or_model_is_not_reused(models, finetune_overrides, prompt_file, tmp_path):
    tuned, measured, model = (tmp_path / name for name in ("tuned", "measured", "policy"))
    (tuned / "model").mkdir(parents=True)
    config = load(FinetuneRecipe, None, [*finetune_overrides, f"out={tuned}"])
    record_origins(tuned, origins_of(config, tuned))
    (tuned / "recipe.json").write_text(dump(config))
    assert reused(Step("finetune", tuned, config))
    origins = json.loads((tuned / "origins.json").read_text())
    for other in ({"data": {"data": "other"}}, {"models": {"policy.model": {"model.safetensors": "other"}}}):
        (tuned / "origins.json").write_text(json.dumps(origins | other))
        with pytest.raises(RunError, match=f"other content of .*: restore it, or remove '{tuned}', and the model is trained anew"):
            reused(Step("finetune", tuned, config))

    shutil.copytree(models["policy"], model)
    (measured / "answers").mkdir(parents=True)
    (measured / "metrics.json").write_text("{}")
    judges = {a: {"model": models[a]} for a in ATTRIBUTES}
    asked = {"out": str(measured), "model": str(model), "prompts": prompt_file, "judges": {"optimisation": judges}}
    asked |= {"rollout": {"engine": {"max_model_tokens": 512}}, "sampling": {"max_new_tokens": 8}}
    step = Step("evaluate", measured, load(EvaluateRecipe, None, settings=asked))
    origin = origin_of(step.config, asking_of(step.config))
    (measured / "answers" / "store.json").write_text(json.dumps({"fingerprint": origin}))
    assert reused(step)
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(RunError, match=f"recipe: model: .*: restore it, or remove '{measured}', and the model is measured anew"):
        reused(step)


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_that_comes_along_is_whole_with_models_and_with_a_world(name, tmp_path):
    path = RECIPES / "studies" / f"{name}.toml"
    planned = plan(load(StudyRecipe, path))
    assert len(planned) == {"synthesis": 9, "scale": 4, "models": 3, "reward": 3, "baseline": 5, "attributes": 3, "paper": 18}[name]
    assert len({steps[-1].folder for steps in planned.values()}) == len(planned)  # no two variants are the same
    if name == "paper":  # which begins with preference pairs; a world has none
        return
    (tmp_path / "world.json").write_text(json.dumps({"fingerprint": "a", "facts": {}}))
    small = plan(load(StudyRecipe, path, [f"world={tmp_path}"]))
    for steps in small.values():
        for step in steps:
            text = json.dumps(step.config.model_dump(mode="json"))
            assert "path/to" not in text and "hh-rlhf" not in text and '"gpus": 1' not in text
            assert name == "models" or "meta-llama" not in text  # whose variants name models of their own
            if step.name == "evaluate":
                assert step.config.prompts == str(tmp_path / "test.jsonl")
                assert step.config.judges.held_out["harmless"].model == str(tmp_path / "held_out" / "harmless")


def test_a_variant_is_trained_with_each_seed_on_the_same_data(tmp_path):
    variants = [*settings()["variants"][:1], {"name": "one", "seeds": [7]}, {"name": "before", "chain": ["generate", "evaluate"]}]
    variants[2]["set"] = {"evaluate": {"model": "{policy}"}}
    found = plan(study(f"out={tmp_path}", variants=variants, seeds=[0, 1]))
    assert list(found) == ["clm, seed 0", "clm, seed 1", "one, seed 7", "before"]
    zero, one, seven, before = ({step.name: step for step in chain} for chain in found.values())
    assert zero["distill"] == one["distill"] == seven["distill"] and zero["generate"] == before["generate"]
    assert [row["finetune"].config.seed for row in (zero, one, seven)] == [0, 1, 7] and before["evaluate"].config.seed == 0
    assert len({row["evaluate"].folder for row in (zero, one, seven, before)}) == 4
    assert [row["evaluate"].config.name for row in (zero, before)] == ["clm, seed 0", "before"]
    assert list(chosen(found, ["before", "clm"])) == ["clm, seed 0", "clm, seed 1", "before"]
    assert chosen(found, ["one, seed 7"]) == {"one, seed 7": found["one, seed 7"]}
    with pytest.raises(RecipeError, match="--only 'on' is no variant: clm, seed 0; clm, seed 1; one, seed 7; before"):
        chosen(found, ["clm", "on"])


def test_a_job_may_be_several_steps_by_names_of_their_own(tmp_path):
    common = settings()["common"]
    common |= {
        "reward_model": {"epochs": 3, "reward_model": {"model": "base"}},
        "nice": {"data": "nice.jsonl"},
        "safe": {"data": "safe.jsonl", "epochs": 2},
    }
    common["generate"] |= {"reward": {"helpful": {"model": "{nice}/model"}, "harmless": {"model": "{safe}/model"}}}
    given = {"named": dict.fromkeys(("nice", "safe"), "reward_model"), "chain": ["nice", "safe", *CHAIN], "common": common}
    nice, safe, generate, *_ = plan(study(f"out={tmp_path}", recipes={"reward_model": "laptop"}, **given))["clm"]
    assert [(step.config.data, step.config.epochs, step.config.reward_model.model) for step in (nice, safe)] == [
        ("nice.jsonl", 3, "base"), ("safe.jsonl", 2, "base"),
    ]  # fmt: skip
    assert nice.config.reward_model.resources.threads == "cores" and nice.folder.name.startswith("reward_model-")  # the laptop's settings
    assert generate.config.reward["harmless"].model == f"{safe.folder}/model"


# --- one real study ---


@pytest.fixture(scope="module")
def real(generated, models, prompt_file, tmp_path_factory) -> StudyRecipe:
    """Two evaluations of one model, which is fine-tuned for two steps on one distillation."""
    judges = {a: {"model": models[a]} for a in ATTRIBUTES}
    engine = {"dtype": "float32", "max_model_tokens": 128, "kv_cache_gib": 0.05}
    train = {"dtype": "float32", "zero_stage": 0, "gradient_checkpointing": False}
    empty = tmp_path_factory.mktemp("recipes") / "empty.toml"
    empty.write_text("")
    return load(StudyRecipe, None, settings={
        "out": str(tmp_path_factory.mktemp("study") / "run"), "title": "Two evaluations", "chain": ["distill", "finetune", "evaluate"],
        "inputs": {"generated": str(generated[0].directory), "policy": models["policy"], "prompts": prompt_file},
        "recipes": dict.fromkeys(("finetune", "evaluate"), str(empty)),
        "cluster": {"placement_deadline_s": 120, "start_deadline_s": 240, "call_deadline_s": 120},
        "common": {
            "distill": {"data": "{generated}", "method": "vanilla"},
            "finetune": {
                "data": "{distill}", "steps": 2, "batch": {"sequences": 8}, "validation": {"share": 0},
                "policy": {"model": "{policy}", "train": train},
            },
            "evaluate": {
                "model": "{finetune}/model", "prompts": "{prompts}", "max_prompts": 2, "judges": {"optimisation": judges},
                "measure": {"draws": 10}, "rollout": {"engine": engine}, "sampling": {"max_new_tokens": 8},
            },
        },
        "variants": [{"name": "corners"}, {"name": "three levels", "set": {"evaluate": {"levels": [0.2, 0.6, 1.0]}}}],
    })  # fmt: skip


def test_speeds_are_measured_with_what_is_there_already(real, models):
    configs = check_steps([step for chain in plan(real).values() for step in chain])
    assert [config.model for config in configs if isinstance(config, EvaluateRecipe)] == [models["policy"]] * 2  # and not the tuned one


def test_a_judge_of_many_steps_is_tried_once(real, monkeypatch, caplog):
    tried = []
    monkeypatch.setattr(ScorerConfig, "check", lambda judge: tried.append(judge.model))
    both = dict.fromkeys(("optimisation", "held_out"), real.common["evaluate"]["judges"]["optimisation"])
    settings = laid_over(real.model_dump(exclude_unset=True), {"common": {"evaluate": {"judges": both}}})
    check_steps([step for chain in plan(load(StudyRecipe, None, settings=settings)).values() for step in chain])
    assert len(tried) == len(set(tried)) == 2
    assert caplog.text.count("is the one that is optimised") == 2


def test_a_study_shares_its_steps_is_reported_when_partly_done_and_reused(real, ray_cluster, capsys, monkeypatch):
    import jobs.study

    evaluate, called = jobs.study.evaluate, []

    def stop_at_the_second(config):
        called.append(config.name)
        return 143 if len(called) == 2 else evaluate(config)

    monkeypatch.setattr(jobs.study, "evaluate", stop_at_the_second)
    assert run_study(real) == 143
    (partly,) = collect([real.out]).studies
    assert partly.title == "Two evaluations" and [(name, run is not None) for name, run in partly.rows] == [
        ("corners", True), ("three levels", False)
    ]  # fmt: skip

    capsys.readouterr()
    assert run_study(real) == 0
    said = capsys.readouterr().out
    steps = {name: chain for name, chain in plan(real).items()}
    (distilled, tuned, first), (_, _, second) = steps.values()
    assert said.count(f"{distilled.folder.name}, reused") == said.count(f"{tuned.folder.name}, reused") == 2
    assert f"{first.folder.name}, reused" in said and f"[2/2] three levels: {second.folder.name}\n" in said
    assert len(list((first.folder.parent).iterdir())) == 4 and called == ["corners", "three levels", "three levels"]

    assert run_study(real, only=["three levels"]) == 0
    said = capsys.readouterr().out
    assert "[1/1] three levels: " in said and "corners" not in said
    made = {path: path.stat().st_mtime_ns for path in first.folder.parent.rglob("*")}
    monkeypatch.setattr(jobs.study, "connect", None)  # nothing is to be done, so there is no need for a cluster
    assert run_study(real) == 0 and {path: path.stat().st_mtime_ns for path in first.folder.parent.rglob("*")} == made
    (whole,) = collect([real.out]).studies
    table = capsys.readouterr().out
    for (name, run), step in zip(whole.rows, (first, second), strict=True):
        assert run.metrics == json.loads((step.folder / "metrics.json").read_text()) and run.table.num_rows == {"corners": 8}.get(name, 18)
        figures = [run.metrics["optimisation"][a][m]["value"] for a in ("harmless", "helpful") for m in ("mP", "MP", "Err", "BT")]
        line = next(line for line in table.splitlines() if line.startswith(f"{name}, optimisation"))
        assert [float(cell) for cell in line.split()[-8:]] == pytest.approx(figures, abs=6e-4)


@pytest.fixture(scope="module")
def paper(models, encoder, pair_file, prompt_file, tmp_path_factory) -> StudyRecipe:
    """The paper's study with everything tiny: one distillation, and PPO."""
    asked, turned = (tmp_path_factory.mktemp("data") / name for name in ("prompts.jsonl", "turned.jsonl"))
    shutil.copy(prompt_file, asked)
    inputs = {"policy": models["policy"], "prompts": str(asked), "test_prompts": str(asked), "backbone": encoder}
    turned.write_text("".join(open(pair_file)).replace('"chosen"', '"?"').replace('"rejected"', '"chosen"').replace('"?"', '"rejected"'))
    pairs = dict(zip(ATTRIBUTES, (pair_file, str(turned)), strict=True))
    inputs |= {f"{judge}{a}_pairs": pairs[a] for judge in ("", "held_out_") for a in ATTRIBUTES} | {"held_out_backbone": models["policy"]}
    first = ["helpful", "harmless", "held_out_helpful", "held_out_harmless", "generate", "calibrate"]
    variants = [
        {"name": "CLM", "set": {"distill": {"method": "vanilla"}}},
        {"name": "PPO", "seeds": [5], "chain": [*first, "ppo", "evaluate"], "set": {"evaluate": {"model": "{ppo}/model"}}},
    ]
    engine = {"max_model_tokens": 128, "kv_cache_gib": 0.05}
    tiny = {
        "common.reward_model.steps": 2, "common.generate.samples_per_prompt": 2, "common.generate.rollout.engine": engine,
        "common.generate.sampling.max_new_tokens": 8, "common.finetune.steps": 2, "common.ppo.steps": 1,
        "common.ppo.rollout.engine": engine, "common.ppo.sampling.max_new_tokens": 8, "common.ppo.algorithm.queries_per_step": 4,
        "common.ppo.algorithm.minibatches": 2, "common.evaluate.max_prompts": 2,
        "common.evaluate.rollout.engine": engine, "common.evaluate.sampling.max_new_tokens": 8,
        "common.evaluate.measure.draws": 10, "cluster.start_deadline_s": 240, "cluster.placement_deadline_s": 120,
    }  # fmt: skip
    given = {"inputs": inputs, "variants": variants, "seeds": [0], "out": str(tmp_path_factory.mktemp("paper") / "run")} | tiny
    return load(StudyRecipe, RECIPES / "studies" / "paper.toml", [f"{key}={toml(value)}" for key, value in given.items()])


def engine_of(step: str, tokens: int) -> dict:
    """Settings with which the engine of a step has so many tokens."""
    return {"common": {step: {"rollout": {"engine": {"max_model_tokens": tokens}}}}}


TRAINED = {"lora": {"rank": 4, "targets": ["nope"]}}
ONE_PAIR = {"prompt": "Who?", "chosen": "You.", "rejected": "I."}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (engine_of("generate", 1024), "max_model_tokens = 1024, but .* has 512 positions"),
        (engine_of("ppo", 1024), "max_model_tokens = 1024, but .* has 512 positions"),
        (engine_of("evaluate", 12), "prompts exceed 4 tokens"),
        ({"common": {"finetune": {"policy": {"train": TRAINED}}}}, r"lora.targets = \['nope'\] cannot be adapted"),
        ({"inputs": {"held_out_harmless_pairs": "one.jsonl"}}, "one.jsonl.* has 1 prompts, of which 0 rows are held out"),
        ({"inputs": {"prompts": "system.jsonl", "backbone": "unspoken"}}, "system.jsonl:1.*System role not supported"),
        ({"inputs": {"polcy": "x"}}, "inputs.polcy is used by no step: did you mean inputs.policy"),
    ],
)
def test_what_a_later_step_would_refuse_is_refused_before_the_first(paper, encoder, tmp_path, monkeypatch, changes, message):
    import jobs.study

    shutil.copytree(encoder, tmp_path / "unspoken")
    refusal = "{{ raise_exception('System role not supported') }}"
    template = "{% for m in messages %}{% if m.role == 'system' %}" + refusal + "{% endif %}{{ m.content }} {% endfor %}"
    (tmp_path / "unspoken" / "chat_template.jinja").write_text(template)
    (tmp_path / "one.jsonl").write_text(json.dumps(ONE_PAIR) + "\n")
    asked = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]}
    (tmp_path / "system.jsonl").write_text(json.dumps(asked) + "\n")
    inputs = {name: str(tmp_path / value) for name, value in changes.get("inputs", {}).items()}
    changed = laid_over(paper.model_dump(exclude_unset=True), changes | {"inputs": inputs, "out": str(tmp_path / "run")})
    monkeypatch.setattr(jobs.study, "connect", None)  # nothing is begun
    for dry_run in (True, False):
        with pytest.raises(CtrlrlError, match=f"(?s){message}"):
            run_study(load(StudyRecipe, None, settings=changed), dry_run=dry_run)
    assert not (tmp_path / "run").exists()


def test_the_paper_runs_from_pairs_to_its_table_and_says_before_what_it_costs(paper, ray_cluster, tmp_path, capsys, caplog):
    gpu = {"out": str(tmp_path / "run"), "common": {"finetune": {"policy": {"resources": {"gpus": 1}}}}}
    greedy = laid_over(paper.model_dump(exclude_unset=True), gpu)
    with pytest.raises(PlacementError, match="There is no GPU at all"):
        run_study(load(StudyRecipe, None, settings=greedy))
    assert not (tmp_path / "run" / "steps").exists()  # though the judges and the answers need none
    assert run_study(paper, dry_run=True) == 0
    assert "2 of 2 test prompts are also trained on" in caplog.text and "held-out judge" not in caplog.text
    said = capsys.readouterr().out
    told = [line.split() for line in said.splitlines() if line.startswith("steps/")]
    rows = {cells[0].split("/")[1].split("-")[0]: cells[1:] for cells in told}
    prompts = len(open(paper.inputs["prompts"]).readlines())
    assert rows["generate"][0] == str(2 * prompts) and rows["evaluate"][0] == "8"  # two prompts under four controls
    assert rows["ppo"][0] == "16" and rows["ppo"][2] == "2"  # 4 prompts and controls, 4 answers each; two minibatches
    assert rows["reward_model"][2] == "2" and rows["finetune"][2] == "2" and "hours to come: MOEC is reckoned" in said
    assert not (RECIPES / paper.out).exists() and not any(step.finished for chain in plan(paper).values() for step in chain)

    assert run_study(paper) == 0
    steps = {step.folder: step for chain in plan(paper).values() for step in chain}.values()
    assert len(steps) == 11 and all(step.finished for step in steps)
    clm, ppo = (read_table(chain[-1].folder / "table.parquet") for chain in plan(paper).values())
    for table in (clm, ppo):
        assert table.num_rows == 8
        assert {f"{judge}.{a}" for judge in ("optimisation", "held_out") for a in ATTRIBUTES} < {*table.column_names}
    assert 0 < min(clm["optimisation.helpful"].to_pylist()) < max(clm["optimisation.helpful"].to_pylist()) < 1  # calibrated
    assert run_study(paper, dry_run=True) == 0
    assert "\n0.0 hours to come" in capsys.readouterr().out

    prompts = Path(paper.inputs["prompts"])
    rows = prompts.read_text().splitlines()
    prompts.write_text("\n".join([json.dumps({"prompt": "Something else?"}), *rows[1:]]) + "\n")
    for name, message in {
        "generate": "made with another recipe: prompts.sha256: .*: restore it, or remove .*, and it is generated anew",
        "ppo": "started with other content of prompts: restore it, or remove .*, and the model is trained anew",
        "evaluate": "made with another recipe: prompts.sha256: .*: restore it, or remove .*, and the model is measured anew",
    }.items():
        step = next(step for step in steps if step.name == name)
        with pytest.raises(RunError, match=message):
            reused(step)
    with pytest.raises(RunError, match="generate-.* was made with another recipe"):
        run_study(paper)


def test_what_it_costs_to_train_on_a_table_that_is_there_already(tmp_path):
    prompts, table = tmp_path / "prompts.jsonl", tmp_path / "distill" / "train.parquet"
    prompts.write_text("".join(f'{{"prompt": "Number {i}?"}}\n' for i in range(100)))
    judged = [f"reward.{a}.model=a" for a in ATTRIBUTES]
    drawn = ["policy=p", f"prompts={prompts}", "samples_per_prompt=3", f"out={tmp_path / 'g'}"]
    steps = {
        "generate": load(GenerateRecipe, None, [*drawn, *judged]),
        "distill": load(DistillRecipe, None, [f"data={tmp_path / 'g'}", f"out={table.parent}"]),
        "finetune": load(FinetuneRecipe, None, ["policy.model=p", f"data={table.parent}", "epochs=2", "batch={sequences=16}"]),
    }
    rates = Rates(drawn=1.0, trained=1.0, tokens=64.0, texts={})

    def told(*finished) -> list[str]:
        lines = cost_lines({name: (config, name in finished) for name, config in steps.items()}, rates)
        return next(line.split() for line in lines if line.startswith("finetune"))

    assert told() == ["finetune", "0", "0", "38", "0.17"]  # two epochs of 300 answers at most
    steps["generate"] = load(GenerateRecipe, None, [*drawn, *judged, "samples_per_prompt=24"])
    for more, rows in (
        ([], 400),  # one of each corner a prompt
        (["method=oversampling"], 2400),
        (["calibrate=prompt", "per_cell=4"], 417),  # of 24 places the five lowest and the five highest: 2,400 (10 / 24)²
        (["calibrate=prompt"], 400),
        (["calibrate=quantile", "per_cell=4"], 384),  # 2,400 0.4²
    ):
        steps["distill"] = load(DistillRecipe, None, [f"data={tmp_path / 'g'}", f"out={table.parent}", *more])
        assert told()[3] == str(2 * -(-rows // 16)), more
    table.parent.mkdir()
    write_table(pa.table({"response": ["x"] * 40}), table)
    assert told("generate", "distill") == ["finetune", "0", "0", "6", "0.02"]
