"""Samples that lack a score are as if they were not there: in distillation, in its outlook, in calibrations; and they are counted."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctrlrl.attributes import PAPER
from ctrlrl.control import ATTRIBUTES
from ctrlrl.data.calibration import Calibration, fit_to_store, raw_outputs
from ctrlrl.data.distill import METHODS, distill
from ctrlrl.data.generation import Layout, scores_table
from ctrlrl.data.outlook import outlook, outlook_lines
from ctrlrl.data.scored import ScoredSamples
from ctrlrl.errors import DataError
from jobs.calibrate import CalibrateRecipe, fitted
from jobs.distill import report_lines
from jobs.examine import checked, class_lines, example_lines
from tests.data.test_distill import a_prompt, some_rows, written

SAMPLES, SHARD = 90, 13
LACKING = {0: "helpful", 1: "helpful", 14: "harmless", 15: "harmless", 40: "both", 41: "helpful", 89: "harmless"}


def made(folder, lacking=None, left_out=()):
    """Stores of samples with raw outputs, NaN where `lacking` says so, but for those `left_out`."""
    folder.mkdir(exist_ok=True)
    raw = np.random.default_rng(0).normal(0, 3, (SAMPLES, 2))
    for row, which in (lacking or {}).items():
        raw[row, {"helpful": [0], "harmless": [1], "both": [0, 1]}[which]] = np.nan
    kept = [row for row in range(SAMPLES) if row not in left_out]
    rows = [{**row, "helpful": 0.5, "harmless": 0.5} for row in some_rows({(n // 6, 0, n % 6): (0, 0) for n in range(SAMPLES)})]
    rows, raw = [rows[row] for row in kept], raw[kept]
    source, layout = written(folder, rows, SHARD, prompts=15), Layout(folder)
    stores = [layout.scores("optimisation", a) for a in ATTRIBUTES]
    for column, store in enumerate(stores):
        with store.open_or_create({"test": 1}, shards=-(-len(rows) // SHARD)):
            for number in range(store.planned):
                samples = source.samples.read(number)
                store.commit(number, scores_table(samples, raw[number * SHARD :][: len(samples), column], Calibration("sigmoid")), {})
            store.finish({})
    return ScoredSamples(source.samples, *stores, source.prompts)


def figures(report):
    same = {name: value for name, value in report.items() if name not in ("unscored", "shards", "sources", "table_sha256")}
    return same | {"entanglement": pytest.approx(report["entanglement"], rel=1e-12)}  # summed in other bundles


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scored")
    return made(folder / "some", LACKING), made(folder / "without", left_out=LACKING)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_distillation_is_that_of_the_other_samples(both, method, calibrated, tmp_path, monkeypatch):
    monkeypatch.setattr("ctrlrl.data.scored.ROW_GROUP", 20)  # several bundles
    tables, reports, maps = [], [], None
    if calibrated:  # by the map of the other samples, of which those that lack the other score are some
        maps = {a: fit_to_store(store) for a, store in zip(ATTRIBUTES, both[1].scores, strict=True)}
    for number, source in enumerate(both):
        source = ScoredSamples(source.samples, *source.scores, source.prompts, maps=maps)
        reports.append(distill(source, tmp_path / str(number), method=method, seed=3, per_cell=2))
        tables.append(pq.read_table(tmp_path / str(number) / "train.parquet"))
    some, without = reports
    assert tables[0].to_pylist() == tables[1].to_pylist() and len(tables[0]) > 0
    assert figures(some) == {**figures(without), "entanglement": without["entanglement"]} and some["rows"]["before"] == SAMPLES - 7
    assert some["unscored"] == 7 and "unscored" not in without
    lines = report_lines(some, tmp_path, []), report_lines(without, tmp_path, [])
    assert [line for line in lines[0] if line not in lines[1]] == ["7 samples without all their scores were left out"]


def test_the_outlook_is_that_of_the_other_samples(both):
    stores = [dict(zip(ATTRIBUTES, source.scores, strict=True)) for source in both]
    some, without = map(outlook, stores)
    assert (some.prompts, some.moec, some.classes) == (without.prompts, without.moec, without.classes) and without.moec > 0
    assert (some.unscored, without.unscored) == (7, 0)
    assert "  7 samples without all their scores would be left out" in outlook_lines(stores[0])
    assert not any("left out" in line for line in outlook_lines(stores[1]))


def test_inspect_counts_the_classes_of_the_other_samples(both):
    some, without = (
        list(class_lines("mine", [checked(a, store) for a, store in zip(ATTRIBUTES, source.scores, strict=True)], PAPER)) for source in both
    )
    assert some == [*without, "  without a score, set aside: 7"]
    prompts = {a_prompt(number).prompt_id: [] for number in range(15)}
    scores = {("mine", a): checked(a, store) for a, store in zip(ATTRIBUTES, both[0].scores, strict=True)}
    assert "mine.helpful -  mine.harmless 0." in "\n".join(example_lines(checked("samples", both[0].samples), scores, prompts, SAMPLES))


def test_calibrations_are_fitted_on_the_outputs_that_are_there(both, tmp_path):
    whole = raw_outputs(made(tmp_path).scores[0])
    assert raw_outputs(both[0].scores[0]).tolist() == [x for row, x in enumerate(whole) if LACKING.get(row) not in ("helpful", "both")]
    data = str(both[0].prompts.parent)
    (told, *_) = (told for _, told in fitted(CalibrateRecipe(data=data, out=str(tmp_path / "out"))).values())
    assert told.startswith("86 outputs from ") and told.endswith(" (4 answers without one left out)")


def test_without_any_score_nothing_is_distilled_and_a_nan_that_is_no_null_is_refused(tmp_path):
    source = made(tmp_path, dict.fromkeys(range(SAMPLES), "harmless"))
    with pytest.raises(DataError, match="none of the 90 samples has all its scores"):
        distill(source, tmp_path / "out", method="vanilla", seed=0)
    some = made(tmp_path / "b", LACKING)
    path = some.scores[0].path(1)
    table = pq.read_table(path)
    pq.write_table(table.set_column(3, table.schema.field(3), pa.array([float("nan")] * len(table))), path)
    with pytest.raises(DataError, match="holds the score nan for prompt"):
        distill(some, tmp_path / "out", method="vanilla", seed=0)
