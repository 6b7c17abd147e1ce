"""What scored answers promise: prompts that MOEC keeps, counted as distillation counts them; why nothing is left; how long answers are."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctrlrl.control import ATTRIBUTES
from ctrlrl.data.calibration import fit_quantile, fit_to_store, fit_within_prompts, within_prompts
from ctrlrl.data.distill import distill
from ctrlrl.data.generation import OPTIMISATION, Layout
from ctrlrl.data.outlook import cut_line, few_kept, outlook, outlook_lines
from ctrlrl.data.schemas import SCORES, conform
from ctrlrl.data.scored import ScoredSamples
from tests.data.test_distill import some_rows, written


def narrow(folder, prompts=12, samples=5, apart=0.0):
    """Samples whose scores lie near 0.5, with raw outputs between -0.3 and 0.3; apart: how far prompts lie from each other, of that."""
    rng = np.random.default_rng(0)
    of_prompts = np.random.default_rng(1).uniform(-apart, apart, (prompts, 2)).repeat(samples, 0)
    raw = rng.uniform(apart - 0.3, 0.3 - apart, (prompts * samples, 2)) + of_prompts
    scores = 1 / (1 + np.exp(-raw))
    cells = {(n // samples, 0, n % samples): tuple(scores[n]) for n in range(len(raw))}
    rows = some_rows(cells)
    source, layout = written(folder, rows, shard_rows=17, prompts=prompts), Layout(folder)
    stores = list(layout.score_stores(OPTIMISATION).values())
    for column, (store, a) in enumerate(zip(stores, ATTRIBUTES, strict=True)):
        with store.open_or_create({"test": 1}, shards=-(-len(rows) // 17)):
            for number, first in enumerate(range(0, len(rows), 17)):
                part = rows[first : first + 17]
                table = {key: [row[key] for row in part] for key in ("prompt_id", "unit", "index")} | {"score": [row[a] for row in part]}
                store.commit(number, conform(pa.table(table | {"raw": raw[first : first + 17, column]}), SCORES, "scores"), {})
            store.finish({})
    return ScoredSamples(source.samples, *stores, source.prompts), raw


def test_the_outlook_is_what_distillation_then_keeps(tmp_path):
    source, raw = narrow(tmp_path, samples=6, apart=0.1)
    stores = dict(zip(ATTRIBUTES, (source.scores[0], source.scores[1]), strict=True))
    found = outlook(stores)
    assert (found.prompts, found.moec) == (12, 0)
    assert distill(source, tmp_path / "plain", method="moec", seed=0)["prompts"]["after"] == 0
    maps = {a: fit_to_store(store) for a, store in stores.items()}
    assert maps["helpful"].knots == fit_quantile(raw[:, 0].astype(np.float32)).knots
    calibrated = ScoredSamples(source.samples, *source.scores, source.prompts, maps=maps)
    report = distill(calibrated, tmp_path / "spread", method="moec", seed=0)
    assert 0 < outlook(stores, maps).moec == report["prompts"]["after"] < 12
    first, second, third = outlook_lines(stores)
    assert "vanilla all 12 prompts; oversampling 4 of 4 classes; moec 0 prompts (0%)" in first
    assert f"--calibrate quantile: moec {report['prompts']['after']} prompts" in second
    places = {a: fit_within_prompts(store) for a, store in stores.items()}
    report = distill(ScoredSamples(source.samples, *source.scores, source.prompts, maps=places), tmp_path / "places", method="moec", seed=0)
    assert outlook(stores, maps).moec < outlook(stores, places).moec == report["prompts"]["after"] and report["calibrate"] == "prompt"
    assert f"--calibrate prompt: moec {report['prompts']['after']} prompts" in third
    for row in pq.read_table(tmp_path / "places" / "train.parquet").to_pylist():  # of six places the first and the last two are extreme
        prompt, _, at = map(int, row["response"].removeprefix("answer ").split("/"))
        for column, attribute in enumerate(ATTRIBUTES):
            others = raw[prompt * 6 : prompt * 6 + 6, column]
            assert row[attribute] == {0: 0.2, 1: 0.2, 4: 1, 5: 1}[int((others < others[at]).sum())]


def test_why_nothing_is_left_names_the_ranges_and_what_mends_it(tmp_path):
    source, _ = narrow(tmp_path)
    report = distill(source, tmp_path / "out", method="moec", seed=0)
    said = few_kept(report)
    assert "moec keeps 0 of 60 samples, of 0 of 12 prompts" in said
    assert "helpful from 0.42 to 0.58 (none is extreme), harmless from 0.42 to 0.58 (none is extreme)" in said
    assert "Add --calibrate quantile" in said and "; or draw more answers" in said
    for calibrated in ({"calibration": {}}, {"calibration": {}, "calibrate": "quantile"}):
        assert ". Take --calibrate prompt" in few_kept(report | calibrated) and "Add" not in few_kept(report | calibrated)
    again = few_kept(report | {"calibration": {}, "calibrate": "prompt"})
    assert "calibrate" not in again and ". Draw more answers" in again


@pytest.mark.parametrize("seed", range(5))
def test_places_within_prompts_are_those_of_a_slow_rival(seed):
    rng = np.random.default_rng(seed)
    prompts = rng.integers(0, 12, 60).astype(np.uint64) * np.uint64(2**59)
    raw = np.where(rng.random(60) < 0.15, np.nan, rng.integers(-3, 4, 60) / 2)
    found = within_prompts(prompts, raw)
    for row, own in enumerate(raw):
        others = raw[(prompts == prompts[row]) & ~np.isnan(raw)]
        if np.isnan(own):
            assert np.isnan(found[row])
        elif len(others) == 1:
            assert found[row] == 0.5
        else:
            assert found[row] == pytest.approx(((others < own).sum() + ((others == own).sum() - 1) / 2) / (len(others) - 1))
    assert within_prompts(np.zeros(0, np.uint64), np.zeros(0)).shape == (0,)


def test_a_store_without_raw_outputs_promises_what_its_scores_do(tmp_path):
    source = written(tmp_path, some_rows({(0, 0, 0): (0.1, 0.9), (0, 0, 1): (0.9, 0.9), (1, 0, 0): (0.1, 0.1)}), 2)
    stores = dict(zip(ATTRIBUTES, (source.scores[0], source.scores[1]), strict=True))
    assert fit_to_store(source.scores[0]) is None
    assert outlook(stores).moec == 1 and len(outlook_lines(stores)) == 1


@pytest.mark.parametrize(
    ("samples", "truncated", "tokens", "said"),
    [
        (100, 5, 3000, None),
        (0, 0, 0, None),
        (10, 10, 640, "none came to an end"),
        # 50 of 100 end within 5,000 tokens, one in 100; 64 + ln(0.5 / 0.05) * 100 = 294.26.
        (100, 50, 5000, "about 295 would let 95 % end"),
    ],
)
def test_answers_that_are_cut_are_warned_of_with_the_length_they_need(samples, truncated, tokens, said):
    line = cut_line(samples, truncated, tokens, 64)
    assert line is None if said is None else said in line and "max_new_tokens = 64" in line


def test_a_distillation_of_nothing_ends_with_exit_code_2(ray_free_layout, tmp_path, capsys):
    from typer.testing import CliRunner

    from ctrlrl.cli import app

    result = CliRunner().invoke(app, ["distill", str(ray_free_layout), "--out", str(tmp_path / "none")])
    output = " ".join(result.output.split())
    assert result.exit_code == 2 and "Add --calibrate quantile" in output and "Traceback" not in output
    assert not (tmp_path / "none" / "report.json").exists() and (tmp_path / "none" / "scores.png").exists()
    result = CliRunner().invoke(app, ["distill", str(ray_free_layout), "--out", str(tmp_path / "some"), "--calibrate", "quantile"])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "some" / "report.json").read_text())
    assert report["prompts"]["after"] > 0 and set(report["calibration"]) == set(ATTRIBUTES)
    result = CliRunner().invoke(app, ["distill", str(ray_free_layout), "--out", str(tmp_path / "x"), "--calibrate", "sigmoid"])
    assert result.exit_code == 2 and "calibrate" in result.output


@pytest.fixture
def ray_free_layout(tmp_path):
    """A directory as of ctrlrl generate, put together without models."""
    (tmp_path / "made").mkdir()
    narrow(tmp_path / "made")
    return tmp_path / "made"
