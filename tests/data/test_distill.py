"""Distillation equals a slow, obvious reference, in any order of shards; its memory does not grow with the data."""
import json
import math
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import ctrlrl.data.atomic
import ctrlrl.data.distill
import ctrlrl.data.joint
import ctrlrl.data.prompt_index
import ctrlrl.data.scored
import ctrlrl.data.selection
import ctrlrl.data.shards
from ctrlrl.control import CORNERS
from ctrlrl.data.distill import METHODS, ScoredSamples, distill
from ctrlrl.data.joint import JointScores
from ctrlrl.data.keys import sample_ranks
from ctrlrl.data.schemas import DISTILLED, SAMPLES, SCORES, conform, prompts_table
from ctrlrl.data.shards import ShardStore
from ctrlrl.data.sources import Prompt, prompt_id
from ctrlrl.errors import DataError, RecipeError, RunError
from ctrlrl.seeds import derive_seed

EDGES = [0.0, 0.1, 0.2, math.nextafter(0.2, 1), 0.25, 0.5, math.nextafter(0.5, 0), 0.75, math.nextafter(0.8, 0), 0.8, 0.9, 1.0]
KEYS = ("prompt_id", "unit", "index")


def a_prompt(number):
    messages = ({"role": "system", "content": "Be kind."}, {"role": "user", "content": f"Question {number}"})
    return Prompt(prompt_id(messages), messages, f"test:{number}")


def some_rows(cells):
    """Samples as dicts from {(prompt number, unit, index): (helpful, harmless)}."""
    return [
        {"prompt_id": a_prompt(p).prompt_id, "unit": u, "index": i, "helpful": a, "harmless": b, "response": f"answer {p}/{u}/{i}"}
        for (p, u, i), (a, b) in cells.items()
    ]


def written(folder, rows, shard_rows, prompts=8):
    """Stores of the rows, in the order given."""
    samples, *scores = (ShardStore(folder / name) for name in ("samples", "helpful", "harmless"))
    source = ScoredSamples(samples, *scores, folder / "prompts.parquet")
    pq.write_table(prompts_table([a_prompt(number) for number in range(prompts)]), source.prompts)
    chunks = [rows[start : start + shard_rows] for start in range(0, len(rows), shard_rows)]
    for store, name in ((source.samples, None), (source.scores[0], "helpful"), (source.scores[1], "harmless")):
        with store.open_or_create({"test": 1}, shards=len(chunks)):
            for number, chunk in enumerate(chunks):
                table = {key: [row[key] for row in chunk] for key in KEYS}
                if name is None:
                    more = {"response": [row["response"] for row in chunk], "token_ids": [[row["index"], 7] for row in chunk]}
                    more |= {"seed": [0] * len(chunk), "finish_reason": ["stop"] * len(chunk), "token_count": [2] * len(chunk)}
                    store.commit(number, conform(pa.table(table | more | {"policy": ["p"] * len(chunk)}), SAMPLES, "samples"), {})
                else:
                    store.commit(number, conform(pa.table(table | {"score": [row[name] for row in chunk]}), SCORES, "scores"), {})
            store.finish({})
    return source


def slow_rank(row, seed):
    """SplitMix64's finaliser on Python's integers."""

    def mix(x):
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    return mix(mix(int(row["prompt_id"], 16) ^ derive_seed(seed, "distill")) ^ (row["unit"] << 32 | row["index"]))


def level(score):
    return 1.0 if score >= 0.5 else 0.2


def slow_vanilla(rows, seed, precision, per_cell):
    return [(row, round(row["helpful"], precision), round(row["harmless"], precision)) for row in rows]


def slow_oversampling(rows, seed, precision, per_cell):
    members = defaultdict(list)
    for row in rows:
        members[level(row["helpful"]), level(row["harmless"])].append(row)
    most, found = max(len(rows) for rows in members.values()), []
    for control, of in members.items():
        by_rank = sorted(of, key=lambda row: slow_rank(row, seed))
        found += [(by_rank[i % len(of)], *control) for i in range(most)]  # round and round in the drawn order
    return found


def slow_moec(rows, seed, precision, per_cell):
    cells = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if all(0 <= score <= 0.2 or 0.8 <= score <= 1 for score in (row["helpful"], row["harmless"])):
            cells[row["prompt_id"]][level(row["helpful"]), level(row["harmless"])].append(row)
    found = []
    for of in cells.values():
        if len(of) >= 2:
            for control, members in of.items():
                found += [(row, *control) for row in sorted(members, key=lambda row: slow_rank(row, seed))[:per_cell]]
    return found


SLOW = {"vanilla": slow_vanilla, "oversampling": slow_oversampling, "moec": slow_moec}


def multiset(triplets):
    return Counter((*(row[key] for key in KEYS), row["response"], a, b) for row, a, b in triplets)


def read(folder):
    return pq.read_table(folder / "train.parquet").to_pylist()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_equals_the_slow_reference_on_random_tables(data):
    prompts, units, k = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5)))
    narrow = data.draw(st.sampled_from([EDGES, [0.1, 0.2, 0.8], [0.2, 0.8], [0.9], [0.3, 0.9]]))  # one-class prompts and empty classes
    score = st.lists(st.sampled_from(narrow), min_size=prompts * units * k, max_size=prompts * units * k)
    keys = [(p, u, i) for u in range(units) for p in range(prompts) for i in range(k)]
    cells = dict(zip(keys, zip(data.draw(score), data.draw(score), strict=True), strict=True))
    rows = data.draw(st.permutations(some_rows(cells)))
    seed, precision, per_cell = data.draw(st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(1, 3)))
    group, memory = data.draw(st.tuples(st.integers(1, 7), st.sampled_from([len(rows) * 40, 1 << 20])))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        for module in (ctrlrl.data.shards, ctrlrl.data.scored, ctrlrl.data.distill):
            patch.setattr(module, "ROW_GROUP", group)
        patch.setattr(ctrlrl.data.selection, "_BUCKET_BITS", data.draw(st.integers(1, 3)))  # several ranks to a bucket
        patch.setattr(ctrlrl.data.prompt_index, "_BATCH", 3)
        patch.setattr(ctrlrl.data.joint, "_FINE", 1 << 14)  # time and memory for a few rows
        patch.setattr(ctrlrl.data.atomic.os, "fsync", lambda _: None)  # 600 stores of a moment
        messages = {a_prompt(p).prompt_id: list(a_prompt(p).messages) for p in range(prompts)}
        source = written(Path(folder), rows, data.draw(st.integers(4, 40)))
        for method in METHODS:
            out = Path(folder) / method
            report = distill(source, out, method=method, seed=seed, precision=precision, per_cell=per_cell, memory=memory)
            expected, found = SLOW[method](rows, seed, precision, per_cell), read(out)
            assert all(row["messages"] == messages[row["prompt_id"]] for row in found)
            assert Counter((*(r[key] for key in KEYS), r["response"], r["helpful"], r["harmless"]) for r in found) == multiset(expected)
            check_report(report, rows, expected)
            assert sorted(path.name for path in out.iterdir()) == ["report.json", "train.parquet"]
            assert json.loads((out / "report.json").read_text()) == report


def check_report(report, rows, expected):
    assert report["rows"] == {"before": len(rows), "after": len(expected)}
    prompts, kept = {row["prompt_id"] for row in rows}, {row["prompt_id"] for row, _, _ in expected}
    assert report["prompts"] == {"before": len(prompts), "after": len(kept), "share": len(kept) / len(prompts)}
    extreme = [row for row in rows if all(min(s, 1 - s) <= 0.2 or s >= 0.8 for s in (row["helpful"], row["harmless"]))]
    extreme = [row for row in extreme if not any(0.2 < s < 0.8 for s in (row["helpful"], row["harmless"]))]
    for name, counted in (("before", rows), ("extreme", extreme), ("after", [row for row, _, _ in expected])):
        classes = Counter((level(row["helpful"]), level(row["harmless"])) for row in counted)
        assert report["classes"][name] == {corner.name: classes[corner.levels] for corner in CORNERS}
    assert sum(map(sum, report["histogram"])) == len(rows)
    columns = [[row[name] for row in rows] for name in ("helpful", "harmless")]
    if all(len(set(column)) > 1 for column in columns):
        # The numbers next to 0.2, 0.5 and 0.8 share a fine bin with them and count as tied.
        columns = [np.round(column, 9) for column in columns]
        if all(len(set(column)) > 1 for column in columns):
            assert report["entanglement"]["pearson"] == pytest.approx(stats.pearsonr(*columns).statistic, abs=1e-6)
            assert report["entanglement"]["spearman"] == pytest.approx(stats.spearmanr(*columns).statistic, abs=1e-6)


def test_moec_by_hand(tmp_path):
    """Prompt 0 has two pairs, prompt 1 two samples of one pair, prompt 2 one pair and a middling sample, prompt 3 ends just outside."""
    cells = {(0, 0, 0): (0.2, 0.8), (0, 0, 1): (1.0, 0.9), (1, 0, 0): (0.9, 0.9), (1, 0, 1): (0.8, 1.0)}
    cells |= {(2, 0, 0): (0.0, 0.0), (2, 0, 1): (0.5, 1.0), (3, 0, 0): (0.1, 0.1), (3, 0, 1): (math.nextafter(0.2, 1), 0.9)}
    report = distill(written(tmp_path, some_rows(cells), 3), tmp_path / "out", method="moec", seed=0)
    found = read(tmp_path / "out")
    assert [(row["response"], row["helpful"], row["harmless"]) for row in found] == [("answer 0/0/0", 0.2, 1.0), ("answer 0/0/1", 1.0, 1.0)]
    assert found[1]["messages"] == list(a_prompt(0).messages) and found[1]["token_ids"] == [1, 7] and found[1]["finish_reason"] == "stop"
    assert pq.read_schema(tmp_path / "out" / "train.parquet") == DISTILLED
    assert report["prompts"]["share"] == 0.25 and report["classes"]["extreme"]["helpful=1,harmless=1"] == 3
    assert report["sources"]["helpful"] == {"test": 1} and report["method"] == "moec"


def test_moec_keeps_per_cell_samples_of_each_pair(tmp_path):
    cells = {(p, 0, i): (0.1, 0.9) if i < 5 else (0.9, 0.9) for p in range(3) for i in range(7)}
    source = written(tmp_path, some_rows(cells), 4)
    for per_cell, kept in ((1, 1 + 1), (2, 2 + 2), (4, 4 + 2), (9, 5 + 2)):
        report = distill(source, tmp_path / "out", method="moec", seed=0, per_cell=per_cell)
        assert Counter(row["prompt_id"] for row in read(tmp_path / "out")) == {a_prompt(p).prompt_id: kept for p in range(3)}
        assert report["classes"]["after"]["helpful=0.2,harmless=1"] == 3 * min(per_cell, 5)


def test_oversampling_repeats_the_rare_and_keeps_the_common(tmp_path):
    cells = {(p, 0, 0): (0.9, 0.9) for p in range(7)} | {(p, 1, 0): (0.1, 0.9) for p in range(3)}
    report = distill(written(tmp_path, some_rows(cells), 4), tmp_path / "out", method="oversampling", seed=0)
    counts = Counter(row["response"] for row in read(tmp_path / "out"))
    assert sorted(counts[f"answer {p}/1/0"] for p in range(3)) == [2, 2, 3]  # 7 = 3 · 2 + 1
    assert all(counts[f"answer {p}/0/0"] == 1 for p in range(7)) and report["classes"]["after"]["helpful=0.2,harmless=1"] == 7


def test_the_draw_depends_on_the_seed_alone(tmp_path):
    rng = np.random.default_rng(0)
    cells = {(p, 0, i): (rng.choice([0.1, 0.9]), rng.choice([0.1, 0.9])) for p in range(8) for i in range(12)}
    rows = some_rows(cells)
    drawn = {}
    for name, (order, shard_rows, seed) in {"a": (rows, 96, 1), "b": (rows[::-1], 10, 1), "c": (rows, 96, 2)}.items():
        (tmp_path / name).mkdir()
        distill(written(tmp_path / name, order, shard_rows), tmp_path / name / "out", method="moec", seed=seed)
        drawn[name] = {row["response"] for row in read(tmp_path / name / "out")}
    assert drawn["a"] == drawn["b"] and len(drawn["a"] & drawn["c"]) < len(drawn["a"])


def test_every_sample_of_a_cell_is_drawn_equally_often():
    key, unit, index = np.full(6, 0xFEDCBA9876543210, np.uint64), np.array([0, 0, 1, 1, 2, 2]), np.array([0, 1, 0, 1, 0, 1])
    first = [int(np.argmin(sample_ranks(key, unit, index, seed))) for seed in range(3000)]
    # 500 expected of each, with a standard deviation of sqrt(3000 · 1/6 · 5/6) = 20.
    assert np.bincount(first, minlength=6) == pytest.approx(500, abs=80)
    everyone = sample_ranks(*(np.tile(part, 2) for part in (key, unit)), np.concatenate([index, index + 2]), 0)
    assert len(np.unique(everyone)) == 12


def test_a_million_copies_are_written_in_slices(monkeypatch):
    monkeypatch.setattr(ctrlrl.data.distill, "ROW_GROUP", 4)
    slices = [part.tolist() for part in ctrlrl.data.distill._repeats(np.array([0, 9, 0, 2]))]
    assert slices == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 3, 3]]


def test_stores_that_do_not_fit_are_refused(tmp_path):
    rows = some_rows({(p, 0, i): (0.1 * p, 0.9) for p in range(4) for i in range(2)})

    def fresh(name, changed=None, **options):
        (tmp_path / name / "other").mkdir(parents=True)
        source = written(tmp_path / name, rows, 3, **options)
        other = source if changed is None else written(tmp_path / name / "other", changed, 3)
        return ScoredSamples(source.samples, source.scores[0], other.scores[1], source.prompts)

    def refused(source, error, says, **options):
        with pytest.raises(error, match=says):
            distill(source, tmp_path / "out", **{"method": "moec", "seed": 0, **options})
        assert not list((tmp_path / "out").iterdir())

    swapped = [*rows[:6], rows[7], rows[6]]
    refused(fresh("a", swapped), DataError, "2 of 8 rows .*other/harmless .* index 1: score these samples anew")
    refused(fresh("b", rows[:6]), RunError, "scores 2 of 3 shards")
    refused(fresh("c", [*rows, *some_rows({(5, 0, 0): (0, 0)})]), DataError, "shard 2 has 2 samples .* and 3 scores")
    refused(fresh("d", [{**row, "harmless": math.nan} if i == 4 else row for i, row in enumerate(rows)]), DataError, "score nan for prompt")
    refused(fresh("e", [{**row, "harmless": 1.5} if i == 4 else row for i, row in enumerate(rows)]), DataError, "score 1.5 .* index 0")
    refused(fresh("f", prompts=3), DataError, f"prompt {a_prompt(3).prompt_id} has samples")
    good = fresh("g")
    samples = ShardStore(tmp_path / "a" / "other" / "samples")
    refused(ScoredSamples(samples, *good.scores, good.prompts), DataError, "2 of 8 rows .*/samples .* than .*/helpful",
            method="vanilla")
    gone = fresh("h")
    gone.scores[0].path(1).unlink()
    refused(gone, RunError, "helpful/shards/000001.parquet cannot be read.*ctrlrl inspect")
    pq.write_table(prompts_table([a_prompt(0), a_prompt(0)]), tmp_path / "twice.parquet")
    refused(ScoredSamples(good.samples, *good.scores, tmp_path / "twice.parquet"), DataError, "1 prompts more than once")
    refused(ScoredSamples(good.samples, *good.scores, tmp_path / "none"), DataError, "not a Parquet file of prompts")
    refused(ScoredSamples(ShardStore(tmp_path / "z"), *good.scores, good.prompts), RunError, "not a directory of shards")
    refused(good, RecipeError, "method = 'mooc' is unknown", method="mooc")
    refused(good, RecipeError, "per_cell = 0", per_cell=0)
    refused(good, RecipeError, "precision = 7", method="vanilla", precision=7)
    refused(good, RecipeError, "memory = 1 bytes is too little for 8 samples: give 2 or more", memory=1)


def test_reading_ahead_is_in_order_and_bounded():
    started = []
    found = ctrlrl.data.scored.read_ahead(lambda item: started.append(item) or item, range(50))
    assert next(found) == 0 and len(started) <= 3
    assert list(found) == list(range(1, 50)) and sorted(started) == list(range(50))


def test_nothing_to_distil_is_an_empty_table(tmp_path):
    rows = some_rows({(0, 0, 0): (0.5, 0.5)})
    source = written(tmp_path, rows, 1)
    report = distill(source, tmp_path / "out", method="moec", seed=0)
    assert read(tmp_path / "out") == [] and report["prompts"] == {"before": 1, "after": 0, "share": 0}
    assert report["entanglement"] == {"pearson": 0, "spearman": 0}


def test_bundles_hold_every_row_group_once(monkeypatch):
    monkeypatch.setattr(ctrlrl.data.scored, "ROW_GROUP", 10)
    found = ctrlrl.data.scored.in_bundles([4, 0, 4, 4, 25, 3])
    groups = [((0, 0), (2, 0), (3, 0)), ((4, 0),), ((4, 1),), ((4, 2), (5, 0))]
    assert [(b.start, b.rows, b.groups) for b in found] == list(zip((0, 12, 22, 32), (12, 10, 10, 8), groups, strict=True))


@pytest.mark.parametrize("kind", ["uniform", "saturated", "narrow", "tied"])
def test_streamed_correlations_equal_those_of_scipy(kind):
    rng = np.random.default_rng(1)
    latent = rng.multivariate_normal([0, 0.5], [[1, 0.6], [0.6, 1]], size=4000)
    scores = {
        "uniform": stats.norm.cdf(latent),
        "saturated": 1 / (1 + np.exp(-8 * latent)),
        "narrow": 0.5 + 0.003 * np.tanh(latent),
        "tied": np.round(stats.norm.cdf(latent), 1),
    }[kind]
    joint = JointScores()
    for batch in np.array_split(scores, 7):
        joint.count(batch)
    for batch in np.array_split(scores[::-1], 3):
        joint.correlate(batch)
    found = joint.correlations()
    assert found["pearson"] == pytest.approx(stats.pearsonr(*scores.T).statistic, abs=1e-9)
    assert found["spearman"] == pytest.approx(stats.spearmanr(*scores.T).statistic, abs=1e-4)
    if kind != "tied":  # numbers on the end of a bin may fall to either side
        assert np.array_equal(joint.histogram, np.histogram2d(*scores.T, bins=50, range=((0, 1), (0, 1)))[0])
    constant = JointScores()
    constant.count(np.full((3, 2), 0.7))
    constant.correlate(np.full((3, 2), 0.7))
    assert constant.correlations() == {"pearson": 0, "spearman": 0}


def test_memory_does_not_grow_with_the_data(tmp_path):
    """600,000 rows more (some 120 MB of keys, scores and answers) may not need much more."""
    script, extra = Path(__file__).parents[1] / "benchmarks" / "distill.py", []
    for rows in ("300000", "900000"):
        command = [sys.executable, str(script), "--rows", rows, "--memory", "4000000", "--folder", str(tmp_path), "--methods", "moec"]
        done = subprocess.run([*command, "--shard-rows", "50000"], capture_output=True, text=True, check=True)
        extra.append(json.loads(done.stdout)["extra_MB"])
    assert extra[1] - extra[0] < 80 and extra[1] < 400
