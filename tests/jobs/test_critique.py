"""Self-critique end to end: what a row says, a killed driver, refusals, inspection."""

import json
import re
import shutil
from collections import Counter
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_generate import cli, kill_driver

import jobs.parts.road
from ctrlrl.config import load
from ctrlrl.data.critique import CritiqueLayout
from ctrlrl.data.sources import read_prompts
from ctrlrl.errors import RunError
from ctrlrl.models.fingerprint import model_fingerprint
from ctrlrl.seeds import derive_seed
from jobs.critique import CritiqueRecipe, critique


def rows_of(layout: CritiqueLayout) -> pa.Table:
    store = layout.critiques()
    return pa.concat_tables([store.read(i) for i in store.committed()])


def test_every_sample_becomes_a_pair_or_is_set_aside_with_the_reason(critiqued, prompt_file):
    layout, config = critiqued
    rows, prompts = rows_of(layout).to_pylist(), {p.prompt_id: p for p in read_prompts(prompt_file)}
    assert Counter((r["prompt_id"], r["unit"], r["index"]) for r in rows) == Counter((p, 0, i) for p in prompts for i in range(3))
    assert all(r["seed"] == derive_seed(5, "generate", int(r["prompt_id"], 16), 0, r["index"]) for r in rows)
    assert {r["policy"] for r in rows} == {model_fingerprint(config.policy)}
    pairs = pq.read_table(layout.pairs).to_pylist()
    aside = [json.loads(line) for line in layout.aside.read_text().splitlines()]
    assert len(pairs) >= 8 and len(pairs) + len(aside) == 120
    assert [(p["prompt_id"], p["index"]) for p in pairs] == [(r["prompt_id"], r["index"]) for r in rows if not r["aside"]]
    for pair in pairs:
        row = next(r for r in rows if (r["prompt_id"], r["index"]) == (pair["prompt_id"], pair["index"]))
        assert pair["messages"] == list(prompts[pair["prompt_id"]].messages)
        assert (pair["y0"], pair["critique"], pair["y1"]) == (row["y0"], row["critique"], row["y1"])
        assert [part.strip() for part in re.split("[eE]", row["rewrite"])[1:]] == [pair["y1"]]
        assert pair["y0"] and pair["y1"] and pair["y1"] != pair["y0"]
    manifest = json.loads(layout.sources.manifest.read_text())
    assert manifest["aside"] == Counter(a["reason"] for a in aside) and len(manifest["aside"]) >= 3
    assert manifest["counts"] | {"tokens": 0} == {"prompts": 40, "rows": 120, "pairs": len(pairs), "tokens": 0}
    assert manifest["fingerprint"]["templates"]["marker"] == "e" and manifest["versions"]["torch"]


def test_the_turns_of_a_row_are_drawn_with_different_seeds(critiqued):
    rows = rows_of(critiqued[0]).to_pylist()
    assert len({r["y0"] for r in rows}) > 80 and len({r["critique"] for r in rows if r["critique"]}) > 40


def test_a_killed_driver_loses_and_doubles_nothing(critiqued, critique_overrides, joining, tmp_path):
    layout = CritiqueLayout(tmp_path / "run")
    options = [part for override in critique_overrides for part in ("--set", override)]
    killable = SimpleNamespace(samples=layout.critiques)
    kill_driver(killable, ["critique", "--out", str(layout.directory), *options], after_shards=3, delay=0.05, joining=joining)
    done = layout.critiques().committed()
    assert 3 <= len(done) < 14 and not layout.sources.manifest.exists()
    kept = {i: layout.critiques().path(i).stat().st_mtime_ns for i in done}
    assert critique(load(CritiqueRecipe, None, [*critique_overrides, f"out={layout.directory}", "rollout.workers=2"])) == 0
    assert kept == {i: layout.critiques().path(i).stat().st_mtime_ns for i in done}
    assert rows_of(layout).equals(rows_of(critiqued[0]))  # one worker there, two here
    assert layout.critiques().verify().ok
    assert layout.pairs.read_bytes() == critiqued[0].pairs.read_bytes()
    assert layout.aside.read_bytes() == critiqued[0].aside.read_bytes()


def test_a_finished_directory_needs_no_workers_and_another_recipe_is_refused(critiqued, critique_overrides, monkeypatch):
    layout, config = critiqued
    monkeypatch.setattr(jobs.parts.road, "start_crew", None)
    assert critique(config) == 0
    for change, named in (
        ("seed=6", "seed: 5 -> 6"),
        ("templates.marker=M", 'templates.marker: "e" -> "M"'),
        ("sampling.top_p=0.5", "sampling.top_p: 0.95 -> 0.5"),
    ):
        with pytest.raises(RunError, match=named):
            critique(load(CritiqueRecipe, None, [*critique_overrides, f"out={layout.directory}", change]))


def test_inspect_shows_pairs_and_reasons_and_finds_damage(critiqued, tmp_path):
    layout, config = critiqued
    manifest = json.loads(layout.sources.manifest.read_text())
    code, output = cli("inspect", layout.directory, "--examples", 120)
    assert code == 0 and "14 of 14 shards, 120 rows, whole" in output and f"pairs {manifest['counts']['pairs']}" in output
    for reason, count in manifest["aside"].items():
        assert f"set aside: {reason} {count}" in output
    assert output.count("--- prompt") == 120 and output.count(" y1: ") == manifest["counts"]["pairs"]
    shutil.copytree(layout.directory, tmp_path / "copy")
    victim = CritiqueLayout(tmp_path / "copy").critiques().path(3)
    victim.write_bytes(victim.read_bytes()[:-1])
    code, output = cli("inspect", tmp_path / "copy")
    assert code == 1 and "DAMAGED" in output and "000003.parquet is not the file that was committed" in output


def test_mistakes_are_told(critique_overrides, models, tmp_path):
    options = [part for override in critique_overrides for part in ("--set", override)]
    system = tmp_path / "system.jsonl"
    system.write_text('{"prompt": "Hello"}\n{"prompt": "Hello", "system": "Be brief."}\n')
    for more, message in (
        (["templates.critique=Judge it"], "critique lacks {prompt}, {response}"),
        (["templates.marker=*"], "rewrite does not ask for the marker '*'"),
        (["rollout.engine.max_model_tokens=513"], "has 512 positions: set rollout.engine.max_model_tokens = 512 or less"),
        (["sampling.max_new_tokens=255"], "40 of 40 prompts exceed 1 tokens"),
        ([f"prompts={system}"], f"1 of 2 prompts have a system prompt of their own, the first at {system}:2"),
        ([f"policy={models['helpful']}"], "give a causal language model"),
    ):
        code, output = cli("critique", *options, "--out", tmp_path / "run", *(part for o in more for part in ("--set", o)))
        assert code == 2 and message in output, output
    assert not (tmp_path / "run").exists()
