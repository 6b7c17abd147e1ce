"""Distillation of one, three and five attributes, and of more than two levels, equals a slow, obvious reference."""
from collections import Counter, defaultdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats

from ctrlrl.attributes import FILE, PAPER, read_attributes
from ctrlrl.control import Control, cells, corners
from ctrlrl.data.distill import ScoredSamples, distill
from ctrlrl.data.generation import Layout
from ctrlrl.data.keys import prompt_keys, sample_ranks
from ctrlrl.data.outlook import few_kept, outlook
from ctrlrl.data.schemas import SAMPLES, SCORES, conform, prompts_table
from ctrlrl.data.selection import classes, extremes, level_numbers, quantised
from ctrlrl.data.shards import ShardStore
from ctrlrl.data.sources import Prompt, prompt_id
from ctrlrl.data.tuning import nearest_corner, read_distilled
from ctrlrl.errors import DataError, RunError

NAMES = ("helpful", "harmless", "concise", "formal", "funny")
FIVE = [0.2, 0.4, 0.6, 0.8, 1.0]


def made(count, **settings):
    return read_attributes({name: settings for name in NAMES[:count]}, "here")


CASES = {"one": made(1), "three": made(3), "five": made(5), "levels": made(2, levels=FIVE), "three levels": made(1, levels=[0, 0.5, 1])}


@pytest.fixture(params=CASES)
def source(request, tmp_path):
    """Stores of 400 samples of 20 prompts, scores mostly extreme, and the scores by key."""
    attributes, rng = CASES[request.param], np.random.default_rng(len(request.param))
    scores = np.round(rng.choice([0.0, 0.1, 0.2, 0.5, 0.55, 0.8, 0.95, 1.0], (400, len(attributes))), 2)
    messages = [({"role": "user", "content": f"Question {i}"},) for i in range(20)]
    ids = [prompt_id(m) for m in messages]
    keys = [(ids[i % 20], 0, i // 20) for i in range(400)]
    layout = Layout(tmp_path)
    pq.write_table(prompts_table([Prompt(i, m, "t") for i, m in zip(ids, messages, strict=True)]), layout.prompts)
    stores = [layout.samples().directory, *(tmp_path / "scores" / "optimisation" / a for a in attributes.names)]
    for column, folder in enumerate(stores, -1):
        store = ShardStore(folder)
        with store.open_or_create({}, shards=4):
            for shard in range(4):
                rows = range(100 * shard, 100 * shard + 100)
                table = dict(zip(("prompt_id", "unit", "index"), zip(*(keys[i] for i in rows), strict=True), strict=True))
                if column < 0:
                    table |= {"seed": [0] * 100, "response": [f"{keys[i]}" for i in rows], "finish_reason": ["stop"] * 100}
                    table |= {"token_count": [1] * 100, "policy": ["p"] * 100}
                    store.commit(shard, conform(pa.table(table), SAMPLES, "samples"), {})
                else:
                    store.commit(shard, conform(pa.table(table | {"score": scores[list(rows), column]}), SCORES, "scores"), {})
            store.finish({})
    samples, *given = (ShardStore(folder) for folder in stores)
    return ScoredSamples(samples, *given, layout.prompts, attributes=attributes), dict(zip(keys, scores.tolist(), strict=True))


def slow_level(score, levels):
    if list(levels) == [0.2, 1.0]:
        return 1.0 if score >= 0.5 else 0.2
    return min(levels, key=lambda level: (round(abs(level - score), 9), level))


def slow_extreme(score, levels):
    return score <= 0.2 or score >= 0.8 if len(levels) == 2 else slow_level(score, levels) in (levels[0], levels[-1])


def slow_cells(attributes, by_key):
    found = defaultdict(list)
    for key, scores in by_key.items():
        found[tuple(slow_level(s, a.levels) for s, a in zip(scores, attributes, strict=True))].append(key)
    return found


def rank(key, seed):
    drawn = sample_ranks(prompt_keys(pa.array([key[0]])), np.array([key[1]]), np.array([key[2]]), seed)
    return int(drawn[0])


def written(out, attributes):
    table = read_distilled(out)
    columns = [table[name].to_pylist() for name in ("prompt_id", "unit", "index", *attributes.names)]
    return Counter((row[:3], row[3:]) for row in zip(*columns, strict=True))


def test_every_method_equals_the_slow_reference(source, tmp_path):
    given, by_key = source
    attributes = given.attributes
    vanilla = distill(given, tmp_path / "v", method="vanilla", seed=1)
    assert written(tmp_path / "v", attributes) == Counter((key, tuple(scores)) for key, scores in by_key.items())
    slow = slow_cells(attributes, by_key)
    named = {c.name: len(slow.get(c.levels, [])) for c in cells(attributes)}
    assert vanilla["classes"]["before"] == named and sum(named.values()) == 400

    distill(given, tmp_path / "o", method="oversampling", seed=1)
    most, expected = max(map(len, slow.values())), Counter()
    for levels, keys in slow.items():
        order = sorted(keys, key=lambda key: rank(key, 1))
        expected.update((order[i % len(order)], levels) for i in range(most))
    assert written(tmp_path / "o", attributes) == expected

    report = distill(given, tmp_path / "m", method="moec", seed=1, per_cell=2)
    extreme = {k: s for k, s in by_key.items() if all(slow_extreme(x, a.levels) for x, a in zip(s, attributes, strict=True))}
    by_prompt, expected = defaultdict(dict), Counter()
    for levels, keys in slow_cells(attributes, extreme).items():
        for key in keys:
            by_prompt[key[0]].setdefault(levels, []).append(key)
    for of in by_prompt.values():
        if len(of) >= 2:
            expected.update((key, levels) for levels, keys in of.items() for key in sorted(keys, key=lambda key: rank(key, 1))[:2])
    assert expected and written(tmp_path / "m", attributes) == expected
    assert {levels for _, levels in expected} <= {corner.levels for corner in corners(attributes)}
    stores = dict(zip(attributes.names, given.scores, strict=True))
    assert outlook(stores, attributes=attributes).moec == report["prompts"]["after"] == sum(len(of) >= 2 for of in by_prompt.values())
    assert all(f"{name} from 0.00 to 1.00" in few_kept(report) for name in attributes.names)


def test_entanglement_is_reported_for_every_pair(source, tmp_path):
    given, by_key = source
    report = distill(given, tmp_path / "v", method="vanilla", seed=0)
    scores, names = np.array(list(by_key.values())), given.attributes.names
    pairs = {(a, b) for a in range(len(names)) for b in range(a)}
    if len(names) == 2:
        found = {(1, 0): report["entanglement"]}
    else:
        found = {(b, a): report["entanglement"][f"{names[a]} with {names[b]}"] for b, a in pairs}
        assert len(report["entanglement"]) == len(report["histogram"]) == len(pairs) and set(report["marginals"]) == set(names)
    for b, a in pairs:
        assert found[b, a]["pearson"] == pytest.approx(np.corrcoef(scores[:, a], scores[:, b])[0, 1])
        assert found[b, a]["spearman"] == pytest.approx(stats.spearmanr(scores[:, a], scores[:, b])[0])


def test_a_table_knows_its_attributes(source, tmp_path):
    given, _ = source
    distill(given, tmp_path / "v", method="vanilla", seed=0)
    table = read_distilled(tmp_path / "v")
    assert b"ctrlrl.attributes" in table.schema.metadata and table.take([0]).schema.metadata == table.schema.metadata
    pq.write_table(table.replace_schema_metadata(None), tmp_path / "bare.parquet")
    if given.attributes.names != PAPER.names:
        with pytest.raises(DataError, match="without harmless|with unknown concise"):
            read_distilled(tmp_path / "bare.parquet")


def test_levels_are_quantised_to_the_nearest_and_ties_to_the_lower():
    (five,), (three,) = made(1, levels=FIVE), made(1, levels=[0.0, 0.5, 1.0])
    assert level_numbers(np.array([0.0, 0.29, 0.31, 0.69, 1.0]), five).tolist() == [0, 0, 1, 2, 4]
    assert level_numbers(np.array([0.25, 0.250001, 0.75]), three).tolist() == [0, 1, 1]
    assert level_numbers(np.array([0.49, 0.5]), PAPER.each[0]).tolist() == [0, 1]  # the paper's rule
    scores = np.array([[0.1, 0.2, 0.9], [0.3, 0.9, 0.9], [1.0, 0.0, 0.81]])
    assert classes(scores, made(3)).tolist() == [1, 3, 5] and extremes(scores, made(3)).tolist() == [True, False, True]
    assert quantised(scores, made(3)).tolist() == [[0.2, 0.2, 1], [0.2, 1, 1], [1, 0.2, 1]]
    assert nearest_corner(Control(0.49, 0.5, attributes=made(2, levels=FIVE))).levels == (0.2, 1.0)


def test_a_set_of_scores_is_bound_to_its_attributes(tmp_path):
    layout, three = Layout(tmp_path), made(3)
    layout.set_attributes("optimisation", PAPER)
    assert not (tmp_path / "scores" / "optimisation" / FILE).exists() and layout.attributes("optimisation") == PAPER
    layout.set_attributes("three", three)
    assert layout.attributes("three") == three and list(layout.score_stores("three")) == list(NAMES[:3])
    for name in NAMES[:3]:
        layout.scores("three", name).open_or_create({}, shards=1).close()
    layout.set_attributes("three", three)
    assert layout.score_sets() == {"three": list(NAMES[:3])}
    with pytest.raises(RunError, match=r"scores of other attributes \(helpful and harmless in place of helpful, harmless and concise\)"):
        layout.set_attributes("three", PAPER)


