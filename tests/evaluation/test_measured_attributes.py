"""Metrics, details and the report of one, three and five attributes."""
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ctrlrl.attributes import PAPER, read_attributes
from ctrlrl.control import corners
from ctrlrl.data.schemas import attributes_in
from ctrlrl.data.sources import Prompt
from ctrlrl.errors import DataError
from ctrlrl.evaluation.exhibits import collect
from ctrlrl.evaluation.grid import controls_of, make_cells, make_table, score_columns
from ctrlrl.evaluation.metrics import METRICS, from_table, measure, pair_counts
from ctrlrl.evaluation.report import write_report
from ctrlrl.evaluation.results import MeasureConfig, results
from ctrlrl.ppo.experience import AlgorithmConfig, draw_queries, make_experience
from ctrlrl.ppo.reward import binding_fractions, control_reward
from ctrlrl.ppo.types import Query, Samples, Scored
from jobs.parts.measure import summary_lines

NAMES = ("helpful", "harmless", "concise", "formal", "funny")
FEW = MeasureConfig(draws=20)


def made(count, **settings):
    return read_attributes({name: settings for name in NAMES[:count]}, "here")


def answered(attributes, score, prompts=4, judges=("optimisation",)):
    """The table of an evaluation in which attribute number a of control c is scored score(prompt, a, c)."""
    asked = [Prompt(f"{i:016x}", ({"role": "user", "content": f"Question {i}"},), f"t:{i}") for i in range(prompts)]
    cells = make_cells(asked, controls_of((0.2, 1.0), attributes))
    scores = {
        judge: {
            name: np.array([score(int(c.prompt.prompt_id, 16), a, c.control.levels) for c in cells])
            for a, name in enumerate(attributes.names)
        }
        for judge in judges
    }
    return make_table(cells, ["a"] * len(cells), [1] * len(cells), np.ones(len(cells), bool), scores)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_a_perfect_controller_and_a_constant_one(count):
    attributes = made(count)
    table = answered(attributes, lambda prompt, a, levels: levels[a])
    assert attributes_in(table.schema) == attributes and attributes_in(table.filter(pa.array([True] * len(table))).schema) == attributes
    requests, scores = from_table(table, scores=score_columns("optimisation", attributes))
    assert scores.shape == (4, 2**count, count) and (requests == scores).all()
    perfect = measure(table, seed=0, scores=score_columns("optimisation", attributes), draws=0)
    constant = answered(attributes, lambda *_: 0.6)
    none = measure(constant, seed=0, scores=score_columns("optimisation", attributes), draws=0)
    for name in attributes.names:
        assert {metric: perfect[name][metric]["value"] for metric in METRICS} == pytest.approx({"mP": 1, "MP": 1, "Err": 0, "BT": 1})
        assert {metric: none[name][metric]["value"] for metric in METRICS} == pytest.approx({"mP": 0, "MP": 0, "Err": 0.4, "BT": 0})
        for other in attributes.names:
            assert perfect["matched"]["MP"][name][other] == pytest.approx(float(name == other), abs=1e-9)
    pairs = sum(pair_counts(requests, scores, a)[2].sum() for a in range(count))
    assert pairs == 4 * count * 2 ** (count - 1)  # per prompt, METHOD's number of pairs


def test_the_third_attribute_is_measured_by_its_own_pairs():
    attributes = made(3)
    mixed = answered(attributes, lambda prompt, a, levels: levels[a] if a < 2 else 1.2 - levels[2] if prompt == 0 else levels[2])
    found = measure(mixed, seed=0, scores=score_columns("optimisation", attributes), draws=0)
    assert found["concise"]["BT"]["value"] == pytest.approx(0.75) and found["concise"]["MP"]["value"] == pytest.approx(0.5)
    assert found["harmless"]["BT"]["value"] == 1
    assert set(found["entanglement"]) == {"helpful with harmless", "helpful with concise", "harmless with concise"}


@pytest.mark.parametrize("count", [1, 3, 5])
def test_results_and_report(tmp_path, count):
    attributes = made(count)
    rng = np.random.default_rng(0)
    table = answered(attributes, lambda prompt, a, levels: float(rng.choice([0.1, levels[a]])), judges=("optimisation", "held_out"))
    metrics, details = results(table, FEW, 0)
    assert [list(found) for found in metrics.values()] == [list(attributes.names)] * 2
    assert read_attributes(details["attributes"], "details") == attributes and list(details["over_optimisation"]) == list(attributes.names)
    assert [row["control"] for row in details["corners"]] == [c.name for c in corners(attributes)]
    assert set(details["corners"][0]["scores"]["held_out"]) == set(attributes.names)
    run = tmp_path / "run"
    run.mkdir()
    pq.write_table(table, run / "table.parquet")
    (run / "metrics.json").write_text(json.dumps(metrics))
    (run / "details.json").write_text(json.dumps({"name": "mine", "model": "m", **details}))
    html, markdown = write_report(collect([str(run)]), tmp_path)
    page, text = html.read_text(), markdown.read_text()
    assert page.count("<td style=") == 2 * count**2  # the matched maps of both sets
    header = next(line for line in text.splitlines() if line.startswith("| method |"))
    assert all(f"{a.noun} BT" in header for a in attributes) and header.count(" MP ") == count
    lines = summary_lines({"mine": metrics}, attributes)
    assert len(lines[1].split()) == 3 + 4 * count and all(a.noun in lines[0] for a in attributes)


def test_runs_of_different_attributes_are_not_compared(tmp_path):
    for number, attributes in enumerate((PAPER, made(3))):
        metrics, details = results(answered(attributes, lambda prompt, a, levels: levels[a]), FEW, 0)
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "metrics.json").write_text(json.dumps(metrics))
        (tmp_path / str(number) / "details.json").write_text(json.dumps({"name": str(number), "model": "m", **details}))
    with pytest.raises(DataError, match="of different attributes .helpful, harmless and concise in place of helpful and harmless"):
        write_report(collect([str(tmp_path)]), tmp_path)


def test_the_rewards_of_three_attributes_by_hand():
    levels, scores = torch.tensor([[1.0, 0.2, 1.0], [0.2, 0.2, 1.0]]), torch.tensor([[0.9, 0.2, 0.6], [0.2, 0.7, 1.0]])
    least, binding = control_reward(levels, scores)
    assert least.tolist() == pytest.approx([0.6, 0.5]) and binding.tolist() == [2, 1]
    assert control_reward(levels, scores, combine="mean")[0].tolist() == pytest.approx([2.5 / 3, 2.5 / 3])
    assert control_reward(levels, scores, combine="product")[0].tolist() == pytest.approx([0.9 * 0.6, 0.5])
    assert binding_fractions(binding, made(3)) == {"helpful": 0, "harmless": 0.5, "concise": 0.5}


@pytest.mark.parametrize("combine", ["min", "weighted"])
def test_a_step_of_three_attributes(combine, monkeypatch):
    attributes = made(3)
    asked = []
    rendered = lambda tokenizer, messages, suffix, attributes: asked.append((suffix, attributes)) or [1, 2]  # noqa: E731
    monkeypatch.setattr("ctrlrl.ppo.experience.render", rendered)
    weights = {"harmless": 0.3, "concise": 0.2, "helpful": 0.5}
    config = AlgorithmConfig(queries_per_step=64, combine=combine, lam=1.0, **({"weights": weights} if combine == "weighted" else {}))
    prompts = [Prompt("0" * 16, ({"role": "user", "content": "x"},), "t")]
    queries = draw_queries(prompts, None, 0, config, 1, attributes)
    assert all(given == attributes for _, given in asked)
    if combine == "min":
        assert {q.control for q in queries} == set(corners(attributes)) and asked[0][0] == queries[0].control.spell()
    else:
        assert {q.control for q in queries} == {None}
    query = Query(prompts[0].messages, corners(attributes)[1] if combine == "min" else None, (1, 2), 0, 0)
    samples = Samples((query, query), (np.array([3]), np.array([4])), (np.array([-1.0]), np.array([-1.0])), np.array([True, True]), 0)
    zeros = (np.array([0.0]), np.array([0.0]))
    scored = Scored(samples, np.array([[0.2, 0.3, 0.9], [0.5, 0.2, 1.0]]), samples.sampler_logprobs, samples.sampler_logprobs, zeros)
    stats = make_experience(scored, config, 0.0, 0.0, attributes).stats
    assert stats["score/concise"] == pytest.approx(0.95) and list(filter(lambda key: key.startswith("score/"), stats)) == [
        f"score/{name}" for name in NAMES[:3]
    ]
    if combine == "min":
        assert stats["reward/mean"] == pytest.approx((0.9 + 0.7) / 2) and stats["agreement/concise"] == pytest.approx(0.95)
        assert stats["reward/helpful=0.2,harmless=0.2,concise=1"] == stats["reward/mean"]
    else:
        first = 0.5 * 0.2 + 0.3 * 0.3 + 0.2 * 0.9
        assert stats["reward/mean"] == pytest.approx((first + 0.5 * 0.5 + 0.3 * 0.2 + 0.2 * 1.0) / 2)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_the_reward_of_any_number_equals_a_slow_reference(count):
    attributes, rng = made(count), np.random.default_rng(count)
    asked = [corner.levels for corner in corners(attributes)]
    scores = rng.random((len(asked), count))
    terms = [[1 - abs(level - score) for level, score in zip(*row, strict=True)] for row in zip(asked, scores.tolist(), strict=True)]
    given = torch.tensor(asked, dtype=torch.float64), torch.from_numpy(scores)
    least, binding = control_reward(*given)
    assert least.tolist() == pytest.approx([min(row) for row in terms])
    assert binding.tolist() == [row.index(min(row)) for row in terms]
    assert control_reward(*given, combine="mean")[0].tolist() == pytest.approx([sum(row) / count for row in terms])
    assert control_reward(*given, combine="product")[0].tolist() == pytest.approx([np.prod(row) for row in terms])
    shares = binding_fractions(binding, attributes)
    assert list(shares) == list(attributes.names) and sum(shares.values()) == pytest.approx(1)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_the_experience_of_a_step_of_any_number(count):
    attributes, rng = made(count), np.random.default_rng(count)
    config = AlgorithmConfig(queries_per_step=4, lam=1.0)
    asked = corners(attributes)
    queries = tuple(Query(({"role": "user", "content": "x"},), corner, (1, 2), 0, i) for i, corner in enumerate(asked))
    one = tuple(np.array([-1.0]) for _ in queries)
    samples = Samples(queries, tuple(np.array([3]) for _ in queries), one, np.ones(len(queries), bool), 0)
    scores = rng.random((len(queries), count))
    stats = make_experience(Scored(samples, scores, one, one, tuple(np.array([0.0]) for _ in queries)), config, 0.0, 0.0, attributes).stats
    rewards = [min(1 - abs(a - b) for a, b in zip(c.levels, row, strict=True)) for c, row in zip(asked, scores.tolist(), strict=True)]
    assert stats["reward/mean"] == pytest.approx(np.mean(rewards))
    for corner, reward in zip(asked, rewards, strict=True):
        assert stats[f"reward/{corner.name}"] == pytest.approx(reward)
    for column, name in enumerate(attributes.names):
        assert stats[f"score/{name}"] == pytest.approx(scores[:, column].mean())
