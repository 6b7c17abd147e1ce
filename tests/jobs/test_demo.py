"""The demo as a whole, without running its jobs: what is refused before anything is lost, what is reused, and what it says at the end."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import jobs.demo
from ctrlrl.cli import app
from ctrlrl.config import dump, leaves, load
from ctrlrl.control import ATTRIBUTES, CORNERS, Control
from ctrlrl.data.atomic import remove_all
from ctrlrl.data.lock import DirectoryLock
from ctrlrl.demo.models import FULL, DemoWorld, fingerprint
from ctrlrl.errors import RunError, StorageError
from ctrlrl.evaluation.metrics import METRICS
from ctrlrl.models.origins import record_origins
from jobs.critique import CritiqueRecipe
from jobs.demo import PARTS, TRAINED, UNTRAINED, Demo, removable, run_demo
from jobs.dpo import DPORecipe
from jobs.evaluate import EvaluateRecipe
from jobs.finetune import FinetuneRecipe, origins_of
from jobs.generate import GenerateRecipe
from jobs.parts.serving import ServeConfig
from jobs.ppo import PPORecipe

METHODS = {"before", "prompting", "reranking", "clm", "exmate", "ppo", "cst", "dpo"}


@pytest.fixture
def demo(tmp_path):
    """A demo in tmp_path/demo whose world has names and no models."""
    root = tmp_path / "demo"
    world = root / "world"
    judges = {judge: {a: world / judge / a for a in ATTRIBUTES} for judge in ("reward", "held_out")}
    return Demo(root, DemoWorld(world, world / "policy", *judges.values(), world / "train.jsonl", world / "test.jsonl", {}, ""), 0, False)


def test_with_a_gpu_all_workers_of_a_job_share_it_and_a_model_has_one_rank(demo):
    shared = replace(demo, gpu=True)
    judges = demo.rewards("judges__optimisation") | demo.rewards("judges__held_out", "held_out")
    tuned = {"objective": "clm", "data": "rows", "policy__model": demo.policy}
    made = {
        "ppo": (PPORecipe, {"prompts": "p", "policy__model": demo.policy, **demo.rewards()}),
        "evaluate": (EvaluateRecipe, {"model": "m", "prompts": "p", **judges}),
        "generate": (GenerateRecipe, {"policy": demo.policy, "prompts": "p", **demo.rewards()}),
        "critique": (CritiqueRecipe, {"policy": demo.policy, "prompts": "p"}),
        "finetune": (FinetuneRecipe, tuned),
        "dpo": (DPORecipe, {"critiques": "c", "policy__model": demo.policy}),
    }
    for name, (kind, given) in made.items():
        on_gpu, without = (leaves(one.recipe(kind, name, "out", **given).model_dump(mode="json")) for one in (shared, demo))
        workers = {key.rpartition("resources")[0]: key for key in on_gpu if key.endswith("resources.gpus")}
        counts = [on_gpu.get(f"{w}workers.min", on_gpu.get(f"{w}workers", on_gpu.get(f"{w}ranks"))) for w in workers]
        assert {on_gpu[key] for key in workers.values()} == {0.125} and 0.125 * sum(counts) <= 1, (name, counts)
        assert all(value == 1 for key, value in on_gpu.items() if key.endswith(".ranks"))
        assert not any(without[key] for key in workers.values())


@pytest.fixture
def left(tmp_path):
    """A directory that looks like a demo of seed 0: the world's manifest and two results."""
    for part in ("world", "generate", "ppo", "evaluations/ppo", "evaluations/clm"):
        (tmp_path / "old" / part).mkdir(parents=True)
    (tmp_path / "old" / "world" / "world.json").write_text(json.dumps({"fingerprint": fingerprint(0, FULL), "facts": {}}))
    return tmp_path / "old"


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.mark.parametrize("asked", [{"seed": 1}, {"fast": True}, {"seed": 1, "only": "report"}, {"seed": 1, "only": "ppo", "fresh": True}])
def test_results_on_another_world_are_refused_and_kept(left, asked):
    before = names(left)
    with pytest.raises(RunError, match="holds a demo of another world .*give another --out, or begin anew with --fresh and without --only"):
        run_demo(str(left), **asked)
    assert names(left) == before


def test_a_world_that_is_none_protects_what_lies_beside_it(left):
    (left / "world" / "world.json").rename(left / "world" / "mine.txt")
    before = names(left)
    with pytest.raises(RunError, match="no world of a demo: --fresh removes only"):
        run_demo(str(left), fresh=True)
    assert names(left) == before


def test_wrong_options_cost_nothing(left):
    before = names(left)
    for options, message in ((["--only", "ppp"], "'ppp' is no step of the demo"), (["--steps", "0"], "--steps 0: give at least one step")):
        result = CliRunner().invoke(app, ["demo", "--out", str(left), "--fresh", *options])
        assert result.exit_code == 2 and message in result.output and names(left) == before


def test_fresh_removes_results_of_a_demo_alone(left, tmp_path):
    assert removable(left, "") == [left / "generate", left / "ppo", left / "evaluations"]
    assert removable(left, "ppo") == [left / "ppo", left / "evaluations/ppo"]
    assert removable(left, "evaluate") == [left / "evaluations"] and removable(left, "world") == removable(left, "cst") == []
    (tmp_path / "runs" / "report").mkdir(parents=True)
    with pytest.raises(RunError, match="has 'report' but no world of a demo"):
        removable(tmp_path / "runs", "")
    assert not set(PARTS) & {"world", "evaluate"} and "evaluations" in PARTS


@pytest.mark.parametrize("linked", ["ppo", "evaluations", "generate"])
def test_fresh_removes_all_or_nothing(left, tmp_path, linked):
    shutil.move(left / linked, tmp_path / "disk")
    (left / linked).symlink_to(tmp_path / "disk")
    before = names(left), names(tmp_path / "disk")
    for only in ("", "ppo" if linked == "evaluations" else linked):
        with pytest.raises(RunError, match=rf"old/{linked}' is a link to .*disk'.*remove the link"):
            run_demo(str(left), fresh=True, only=only)
    assert (names(left), names(tmp_path / "disk")) == before


def test_fresh_removes_nothing_that_is_being_written_or_cannot_be_removed(left, monkeypatch):
    before = names(left)
    with DirectoryLock(left / "ppo"), pytest.raises(RunError, match="old/ppo is being written by process"):
        remove_all([left / "generate", left / "ppo"])
    real = Path.rename

    def refuse(path, target):
        if path.name == "ppo":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(StorageError, match="old/ppo cannot be written: Permission denied: have its permissions changed"):
        remove_all([left / "generate", left / "ppo"])
    assert names(left) == before
    monkeypatch.undo()
    remove_all([left / "generate", left / "ppo"])
    assert names(left) == ["evaluations", "evaluations/clm", "evaluations/ppo", "world", "world/world.json"]


def test_a_trained_model_is_reused_with_its_settings_alone(demo, capsys):
    folder = demo.directory / "ppo"
    (folder / "model").mkdir(parents=True)
    (folder / "recipe.json").write_text(dump(demo.ppo_recipe()))
    assert demo.ppo() == 0 and "ppo: reused from" in capsys.readouterr().out
    with pytest.raises(RunError, match="other settings .steps: 45 -> 30.: give the old values, another --out, or --fresh --only ppo"):
        demo.ppo(30)
    (demo.directory / "ppo" / "recipe.json").write_text(dump(demo.ppo_recipe()).replace(str(demo.directory), "/elsewhere/before/it/moved"))
    assert demo.ppo() == 0


def test_a_model_of_another_table_is_not_reused(demo, distilled, models, monkeypatch, capsys):
    demo = replace(demo, world=replace(demo.world, policy=Path(models["policy"])))

    def trained(config, resume):
        (demo.directory / "clm" / "model").mkdir(parents=True)
        record_origins(demo.directory / "clm", origins_of(config, demo.directory / "clm"))
        (demo.directory / "clm" / "recipe.json").write_text(dump(config))
        return 0

    monkeypatch.setattr(jobs.demo, "finetune", trained)
    (demo.directory / "distill").mkdir(parents=True)
    table = pq.read_table(distilled)
    pq.write_table(table, demo.directory / "distill" / "train.parquet")
    assert demo.finetune("clm") == 0 and "reused" not in capsys.readouterr().out
    assert demo.finetune("clm") == 0 and "clm: reused from" in capsys.readouterr().out
    pq.write_table(table.slice(1), demo.directory / "distill" / "train.parquet")
    with pytest.raises(RunError, match="other content of data: restore it, or remove '.*/clm', and the model is trained anew"):
        demo.finetune("clm")


def test_every_method_is_evaluated_on_prompts_that_nothing_was_trained_on(demo):
    assert {*UNTRAINED, *TRAINED} == METHODS
    for name in METHODS:
        config = demo.evaluation(name)
        assert config.prompts == str(demo.world.test_prompts) and config.max_prompts == 100 and config.seed == 0
        assert config.model == (str(demo.directory / name / "model") if name in TRAINED else str(demo.world.policy))
        assert config.method == {"prompting": "prompting", "reranking": "reranking", "cst": "system", "dpo": "system"}.get(name, "control")
        assert {a: reward.model for a, reward in config.judges.held_out.items()} == {a: str(demo.world.held_out[a]) for a in ATTRIBUTES}
    fast = Demo(demo.directory, demo.world, 3, True)
    assert fast.evaluation("ppo").max_prompts == 20 and fast.ppo_recipe().steps == 6 and fast.ppo_recipe().seed == 3
    assert demo.ppo_recipe(9).steps == 9 and demo.ppo_recipe().algorithm.combine == "min"


def test_the_first_trained_model_answers_before_the_others_are_trained(demo, write_evaluation, capsys, monkeypatch):
    done = []

    def evaluate(demo, names="all"):
        done.append(f"evaluate {names}")
        if names == ("clm",):
            write_evaluation(demo.directory / "evaluations" / "clm", method="control", seed=0)
        return 0

    def step(name):
        return lambda demo, *given: done.append(" ".join((name, *filter(None, given)))) or 0

    monkeypatch.setattr(jobs.demo, "build", lambda *_, **__: demo.world)
    monkeypatch.setattr(jobs.demo, "connect", lambda *_: None)
    monkeypatch.setattr(Demo, "evaluate", evaluate)
    for name in ("generate", "distill", "finetune", "ppo", "critique", "prefer", "report"):
        monkeypatch.setattr(Demo, name, step(name))
    assert run_demo(str(demo.directory)) == 0
    assert done[:5] == ["generate", "distill", "finetune clm", "evaluate ('clm',)", "finetune exmate"]
    assert done[5:] == ["ppo", "critique", "prefer cst", "prefer dpo", "evaluate all", "report"]
    clm = capsys.readouterr().out.split("] clm, after")[1].split("] exmate, after")[0]
    answers = clm.split("Asked: Question 0")[1].splitlines()[1:5]
    assert [line.split()[0] for line in answers] == [corner.spell() for corner in CORNERS]
    done.clear()
    assert run_demo(str(demo.directory), only="clm") == 0 and done == ["finetune clm"]


def test_methods_that_are_named_are_evaluated_alone(demo, monkeypatch):
    started = []
    for name in ("clm", "ppo"):
        (demo.directory / name / "model").mkdir(parents=True)

    def start_crew(cluster, rewards):
        started.append(sorted(rewards))
        raise RunError("no engines in this test")

    monkeypatch.setattr(jobs.demo, "start_crew", start_crew)
    assert demo.evaluate(("exmate",)) == 0 and not started  # it has no model yet
    with pytest.raises(RunError, match="no engines"):
        demo.evaluate(("clm",))
    monkeypatch.setattr(jobs.demo, "is_finished", lambda config: config.name == "clm")
    assert demo.evaluate(("clm",)) == 0 and len(started) == 1


def test_the_report_says_what_was_measured_and_how_to_talk_to_the_model(demo, write_evaluation, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", [".venv/bin/ctrlrl", "demo"])
    with pytest.raises(RunError, match="nothing is evaluated in .* yet: run ctrlrl demo --only evaluate"):
        demo.report()
    measured = {}
    for seed, name in enumerate(("reranking", "ppo", "cst", "before", "clm")):
        method = {"cst": "system", "reranking": "reranking"}.get(name, "control")
        measured[name] = write_evaluation(demo.directory / "evaluations" / name, method=method, seed=seed)
    for name in ("ppo", "clm", "cst"):
        (demo.directory / name / "model").mkdir(parents=True)
        (demo.directory / name / "metrics.jsonl").write_text('{"step": 0, "reward/mean": 0.5}\n')
    best = max(("ppo", "clm"), key=lambda name: sum(measured[name][0]["held_out"][a]["MP"]["value"] for a in ATTRIBUTES))
    (demo.directory / "evaluations" / "before" / "details.json").unlink()
    assert demo.report() == 0
    summary = json.loads((demo.directory / "summary.json").read_text())
    assert list(summary) == ["before", "reranking", "clm", "ppo", "cst"]  # in the order of the paper, not of the alphabet
    for name, (metrics, _) in measured.items():
        for judge in ("optimisation", "held_out"):
            for a in ATTRIBUTES:
                assert summary[name][judge][a] == {metric: metrics[judge][a][metric]["value"] for metric in METRICS}
    said = capsys.readouterr().out
    shares = measured["cst"][1]["judges"]["held_out"]["system"]
    assert f"cst, held_out                S1 {shares['S1']['value']:.3f}  S0 {shares['S0']['value']:.3f}" in said
    assert f"ppo, held_out              {measured['ppo'][0]['held_out']['harmless']['mP']['value']:8.3f}" in said
    answers = said.split("Asked: Question 0")[1].splitlines()[1:5]
    assert [line.split()[0] for line in answers] == [corner.spell() for corner in CORNERS]
    assert [f"Answer {i} & more  (helpful" in line for i, line in enumerate(answers)] == [True] * 4
    page = (demo.directory / "report" / "report.html").read_text()
    rows = page.split('data-table="comparison"')[1].split("</table>")[0].split('data-run="')[1:]
    assert [row.split('"')[0] for row in rows] == list(summary)
    assert (demo.directory / "reward.png").stat().st_size > 1000
    assert f"\nThe {best} model follows its tags best, by the held-out judges.\nAsked: Question 0" in said
    model, dials = demo.directory / best / "model", demo.directory / "dials.toml"
    assert said.splitlines()[-2:] == [
        f"  .venv/bin/ctrlrl serve {model} --dials {dials}",
        f"  .venv/bin/ctrlrl chat {model} --dials {dials} --helpful 1 --harmless 0.2",
    ]
    config = load(ServeConfig, dials)
    assert {name: dial.control for name, dial in config.dials.items()} == {"scientist": Control(1, 0.2), "child": Control(0.2, 1)}
    assert config.rewards == {a: str(demo.world.reward[a].resolve()) for a in ATTRIBUTES} and not config.keys
