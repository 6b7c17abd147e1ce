"""Self-generation end to end: what a row says, interruption by signals and kills, extension, refusals."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import jobs.generate
import jobs.parts.road
from ctrlrl.cli import app
from ctrlrl.config import load
from ctrlrl.data.generation import OPTIMISATION, Layout
from ctrlrl.data.shards import ShardStore
from ctrlrl.data.sources import read_prompts
from ctrlrl.errors import RunError
from ctrlrl.models.fingerprint import model_fingerprint
from ctrlrl.models.loading import load_tokenizer
from ctrlrl.models.scorer import Scorer, ScorerConfig
from ctrlrl.prompts import render
from ctrlrl.seeds import derive_seed
from jobs.generate import GenerateRecipe, fitting, generate

ROOT = Path(__file__).parents[2]


def recipe(overrides, out, *more) -> GenerateRecipe:
    return load(GenerateRecipe, None, [*overrides, f"out={out}", *more])


def cli(*arguments):
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert "Traceback" not in result.output
    return result.exit_code, " ".join(result.output.split())


def test_rows_say_where_they_come_from(generated, all_rows, models, prompt_file):
    layout, config = generated
    rows = all_rows(layout).to_pylist()
    prompts = {p.prompt_id: p for p in read_prompts(prompt_file)}
    keys = [(r["prompt_id"], r["unit"], r["index"]) for r in rows]
    assert set(keys) == {(p, u, i) for p in prompts for u in range(2) for i in range(3)} and len(keys) == 240
    assert all(r["seed"] == derive_seed(5, "generate", int(r["prompt_id"], 16), r["unit"], r["index"]) for r in rows)
    assert {r["policy"] for r in rows} == {model_fingerprint(models["policy"])}
    tokenizer = load_tokenizer(models["policy"])
    for r in rows:
        assert r["token_count"] == len(r["token_ids"]) <= 12
        assert r["response"] == tokenizer.decode(r["token_ids"], skip_special_tokens=True).strip()
        assert (r["finish_reason"] == "stop") == (r["token_ids"][-1] == tokenizer.eos_token_id)
    assert len({tuple(r["token_ids"]) for r in rows}) > 200  # every sample has its own seed
    conversations = [(prompts[r["prompt_id"]].messages, r["response"]) for r in rows]
    for attribute in ("helpful", "harmless"):
        scores = Scorer(ScorerConfig(model=models[attribute])).score(conversations)
        assert [r[attribute] for r in rows] == pytest.approx(scores, abs=1e-6)


def test_the_manifest_tells_all(generated, models):
    layout, config = generated
    manifest = json.loads(layout.manifest.read_text())
    samples = layout.samples()
    tokens = sum(samples.read(i, ["token_count"])["token_count"].to_numpy().sum() for i in range(40))
    assert manifest["counts"] == {"prompts": 40, "samples": 240, "shards": 40, "tokens": tokens}
    assert manifest["recipe"]["sampling"]["temperature"] == 1.0 and manifest["recipe"]["scale"] == "2x"
    assert manifest["fingerprint"]["policy"] == model_fingerprint(models["policy"])
    assert manifest["reward_models"]["helpful"]["sha256"] == model_fingerprint(models["helpful"])
    assert manifest["versions"]["torch"] and 0 < manifest["tokens_per_s"] < 1e6
    scores = np.concatenate([layout.scores(OPTIMISATION, "helpful").read(i)["score"] for i in range(40)])
    assert manifest["mean_score"]["helpful"] == pytest.approx(scores.mean())
    assert model_fingerprint(models["policy"]) != model_fingerprint(models["tied"])


def test_prompts_are_rendered_without_a_control(generate_overrides, prompt_file, models, tmp_path):
    config = recipe(generate_overrides, tmp_path)
    prompts, rendered, long = fitting(config, read_prompts(prompt_file), skip=False)
    assert len(prompts) == 40 and not long
    assert rendered[7].tolist() == render(load_tokenizer(models["policy"]), prompts[7].messages)


def test_a_finished_directory_needs_no_workers_and_another_recipe_is_refused(generated, generate_overrides, models, monkeypatch, tmp_path):
    layout, config = generated
    monkeypatch.setattr(jobs.parts.road, "start_crew", None)
    before = json.loads(layout.manifest.read_text())
    assert generate(config) == 0
    assert generate(config.model_copy(update={"scale": "1x"})) == 0  # contained in what is there
    assert json.loads(layout.manifest.read_text()) == before
    short = tmp_path / "short.jsonl"
    short.write_text('{"prompt": "Hello"}\n')
    for change, named in (
        ("sampling.temperature=0.5", r"sampling.temperature: 1.0 -> 0.5"),
        ("seed=6", "seed: 5 -> 6"),
        (f"prompts={short}", "prompts.count: 40 -> 1"),
        (f"policy={models['tied']}", "policy: "),
        (f"reward.helpful.model={models['harmless']}", "reward.sha256: "),
    ):
        with pytest.raises(RunError, match=named):
            generate(recipe(generate_overrides, layout.directory, change))
    shutil.copytree(layout.directory, tmp_path / "copy")
    with pytest.raises(TypeError):  # more workers are no other recipe: it goes on to start them
        generate(recipe(generate_overrides, tmp_path / "copy", "scale=3x", "rollout.workers=4", "reward.helpful.workers=2"))


def test_stopped_resumed_and_extended_equals_a_fresh_run(
    generated, all_rows, generate_overrides, prompt_file, monkeypatch, tmp_path, capfd
):
    bad = tmp_path / "prompts.jsonl"
    lines = Path(prompt_file).read_text().splitlines()
    bad.write_text("\n".join([*lines[:9], lines[0], '{"promt": "typo"}', json.dumps({"prompt": "loaf " * 200}), *lines[9:]]) + "\n")
    first = recipe(generate_overrides, tmp_path / "run", f"prompts={bad}", "skip_bad_rows=true")
    real = jobs.generate.samples_table
    monkeypatch.setattr(jobs.generate, "samples_table", lambda *a: (os.kill(os.getpid(), signal.SIGTERM), real(*a))[1])
    assert generate(first) == 128 + signal.SIGTERM
    monkeypatch.undo()
    layout = Layout(tmp_path / "run")
    kept = layout.samples().committed()
    assert 1 <= len(kept) <= 8 and not layout.manifest.exists()  # those that were under way, and no more
    assert all(layout.scores(OPTIMISATION, a).committed() == kept for a in ("helpful", "harmless"))
    assert "prompts: 40 of 43 rows in 1 file; 1 repeated, 1 unreadable and 1 overlong set aside" in capfd.readouterr().out
    rejects = [json.loads(line) for line in layout.rejects.read_text().splitlines()]
    assert [r["source"] for r in rejects] == [f"{bad}:11", f"{bad}:12"] and "leaves no room" in rejects[1]["reason"]

    def shards():
        return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / "run").rglob("shards/*") if p.is_file()}

    stopped = shards()
    assert generate(first) == 0
    once = shards()
    assert stopped.items() <= once.items() and layout.samples().committed() == list(range(20))
    second = recipe(generate_overrides, tmp_path / "run", f"prompts={bad}", "skip_bad_rows=true", "scale=2x", "rollout.workers=2")
    assert generate(second) == 0
    assert once.items() <= shards().items()
    assert all_rows(layout).equals(all_rows(generated[0]))  # one worker there, two in the second unit here
    assert json.loads(layout.manifest.read_text())["recipe"]["scale"] == "2x"
    assert "generate 20/20" in (out := capfd.readouterr().out) and "tokens/s" in out and "s left" in out


def test_five_kills_lose_and_double_nothing(generated, all_rows, generate_overrides, joining, monkeypatch, tmp_path):
    """The driver once, rollout and reward workers twice each, at random moments."""
    dice, layout = random.Random(os.urandom(4)), Layout(tmp_path / "run")
    options = [part for override in [*generate_overrides, "scale=2x"] for part in ("--set", override)]
    command = ["generate", "--out", str(layout.directory), *options]
    kill_driver(layout, command, after_shards=dice.randrange(1, 8), delay=dice.random() / 5, joining=joining)
    done = len(layout.samples().committed())
    assert 0 < done < 40 and not layout.manifest.exists()

    crews, start = [], jobs.parts.road.start_crew
    monkeypatch.setattr(jobs.parts.road, "start_crew", lambda *a: crews.append(start(*a)) or crews[0])
    victims = ["rollout", "rollout", "helpful", "harmless"]
    dice.shuffle(victims)
    moments = sorted(dice.sample(range(done, 36), 4))
    killed = []

    def kill_workers():
        for victim, moment in zip(victims, moments, strict=True):
            while len(layout.samples().committed()) < moment or not crews:
                time.sleep(0.01)
            handle = crews[0].rollout if victim == "rollout" else crews[0].rewards[f"reward.{victim}"]
            while not (pids := set(handle.pids()) - set(killed)):
                time.sleep(0.01)
            pid = pids.pop()
            time.sleep(dice.random() / 10)
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    commit = ShardStore.commit

    def not_before(store, index, table, facts):
        """The run does not get far ahead of its killer, however late that is."""
        samples = layout.samples()
        while store.directory == samples.directory and sum(len(samples.committed()) >= moment + 4 for moment in moments) > len(killed):
            time.sleep(0.01)
        return commit(store, index, table, facts)

    monkeypatch.setattr(ShardStore, "commit", not_before)
    killer = threading.Thread(target=kill_workers, daemon=True)
    killer.start()
    assert generate(recipe(generate_overrides, layout.directory, "scale=2x")) == 0
    killer.join(60)
    assert len(set(killed)) == 4, (victims, moments)
    assert all_rows(layout).equals(all_rows(generated[0])), (victims, moments)
    for store in (layout.samples(), *(layout.scores(OPTIMISATION, a) for a in ("helpful", "harmless"))):
        assert store.verify().ok and len(store.manifest()["shards"]) == 40


def kill_driver(layout: Layout, arguments: list[str], after_shards: int, delay: float, joining: dict[str, str]) -> None:
    """Run the command line on the tests' cluster, and kill it when enough shards are there; Ray ends its actors."""
    command = [sys.executable, "-c", "from ctrlrl.cli import main; main()", *arguments]
    with tempfile.TemporaryFile("w+") as log:
        driver = subprocess.Popen(command, cwd=ROOT, env=os.environ | joining, stdout=log, stderr=log)
        try:
            end = time.monotonic() + 240
            while not (layout.samples().directory / "shards").is_dir() or len(layout.samples().committed()) < after_shards:
                assert driver.poll() is None and time.monotonic() < end, log.seek(0) or log.read()
                time.sleep(0.01)
            time.sleep(delay)
        finally:
            driver.kill()
            driver.wait(60)


def test_mistakes_are_told(generate_overrides, models, tmp_path):
    options = [part for override in generate_overrides for part in ("--set", override)]
    out = ["--out", tmp_path / "run"]
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "Hello"}\n{"promt": 1}\n')
    for more, message in (
        (["--scale", "8"], "scale: is not a number of units: write 1x, 8x, … (given: '8')"),
        (["--set", f"prompts={bad}"], f"{bad}:2"),
        (["--set", "rollout.engine.max_model_tokens=513"], "has 512 positions: set rollout.engine.max_model_tokens = 512 or less"),
        (["--set", "sampling.max_new_tokens=127"], "40 of 40 prompts exceed 1 tokens"),
        (["--set", f"reward.harmless.model={models['two_labels']}"], "has 2 labels"),
        (["--set", f"policy={models['helpful']}"], "give a causal language model"),
        (["--set", "reward.helpful.calibration=quantile"], "give both or neither"),
    ):
        code, output = cli("generate", *options, *out, *more)
        assert code == 2 and message in output, output
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("x")
    assert not (tmp_path / "run").exists()
    for command in ("score", "distill", "inspect"):
        code, output = cli(command, tmp_path / "other")
        assert code == 2 and ("is no directory of ctrlrl generate" in output or "'reward' is required" in output), output


def test_a_relative_output_in_a_submitted_job_is_refused(generate_overrides, monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    options = [part for override in generate_overrides for part in ("--set", override)]
    code, output = cli("generate", "--out", "runs/x", *options)
    assert code == 2 and "give an absolute path" in output
