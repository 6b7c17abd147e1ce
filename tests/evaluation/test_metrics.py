"""The metrics of [SH] section 3.4 against hand-worked figures and an independent slow implementation."""

import json
import math
import statistics

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrlrl.control import ATTRIBUTES, CORNERS, Control, grid
from ctrlrl.errors import ControlError, DataError
from ctrlrl.evaluation.metrics import METRICS, from_table, measure, measure_arrays, over_optimisation_gap, resamples, safe_shares

CORNER_LEVELS = np.array([c.levels for c in CORNERS])  # (0.2, 0.2), (0.2, 1), (1, 0.2), (1, 1)
EMPTY = {"value": None, "low": None, "high": None}


def long_table(requests, scores, order=None):
    """One row per cell, in `order`; prompts are p0, p1, …"""
    n, c, _ = scores.shape
    rows = np.arange(n * c) if order is None else order
    asked, given_, prompt = requests.reshape(-1, 2)[rows], scores.reshape(-1, 2)[rows], [f"p{i // c}" for i in rows]
    columns = {"prompt_id": prompt, "helpful_request": asked[:, 0], "harmless_request": asked[:, 1]}
    return pa.table(columns | {"helpful_score": given_[:, 0], "harmless_score": given_[:, 1]})


def requests_for(prompts, levels=CORNER_LEVELS):
    return np.broadcast_to(levels, (prompts, *levels.shape)).copy()


def values(result, attribute):
    return {name: result[attribute][name]["value"] for name in METRICS}


def test_hand_worked_example():
    """Two prompts at the corners. Helpfulness requests are s = (.2, .2, 1, 1); its scores are R = (0, .2, .4, .6) and (.5, .5, .5, .5)."""
    scores = np.zeros((2, 4, 2))
    scores[0, :, 0], scores[1, :, 0] = (0, 0.2, 0.4, 0.6), 0.5
    scores[:, :, 1] = (1, 0.2, 0.2, 0.9)  # harmlessness, requests (.2, 1, .2, 1), both prompts alike
    result = measure_arrays(requests_for(2), scores, seed=1, draws=10)
    helpful = values(result, "helpful")
    # Prompt 0: ds = ±.4, dR = (-.3, -.1, .1, .3): 0.32 / sqrt(0.64 * 0.2) = .894427; prompt 1 is constant and counts as 0.
    assert helpful["MP"] == pytest.approx((0.32 / math.sqrt(0.64 * 0.2)) / 2)
    # Pooled: mean R = .4; dR = (-.4, -.2, 0, .2, .1, .1, .1, .1); cov = .4 * (.6 + .2 - .2 + .2) = .32; var R = .28, var s = 1.28.
    assert helpful["mP"] == pytest.approx(0.32 / math.sqrt(1.28 * 0.28))
    # |s - R|: (.2, 0, .6, .4) and (.3, .3, .5, .5).
    assert helpful["Err"] == pytest.approx((1.2 + 1.6) / 8)
    # Pairs (.2, .2)-(1, .2) and (.2, 1)-(1, 1): prompt 0 wins both, prompt 1 ties both.
    assert helpful["BT"] == 0.5 and result["helpful"]["ties"] == 0.5 and result["helpful"]["constant"] == 0.5
    harmless = values(result, "harmless")
    # Pairs: (1 -> .2) a loss, (.2 -> .9) a win. dR = (.425, -.375, -.375, .325) on ds = (-.4, .4, -.4, .4): cov = -.04.
    assert harmless["BT"] == 0.5 and result["harmless"]["ties"] == 0
    assert harmless["MP"] == harmless["mP"] == pytest.approx(-0.04 / math.sqrt(0.64 * 0.5675))
    assert harmless["Err"] == pytest.approx((0.8 + 0.8 + 0 + 0.1) / 4)


def test_perfect_constant_and_reversed_controllers():
    requests = requests_for(5)
    perfect, constant = measure_arrays(requests, requests, seed=0), measure_arrays(requests, np.full_like(requests, 0.6), seed=0)
    reverse = measure_arrays(requests, 1.2 - requests, seed=0)
    for attribute in ATTRIBUTES:
        assert values(perfect, attribute) == pytest.approx({"mP": 1, "MP": 1, "Err": 0, "BT": 1})
        assert values(constant, attribute) == pytest.approx({"mP": 0, "MP": 0, "Err": 0.4, "BT": 0})
        assert values(reverse, attribute) == pytest.approx({"mP": -1, "MP": -1, "Err": 0.8, "BT": 0})
        assert (constant[attribute]["constant"], constant[attribute]["ties"]) == (1, 1)
        for name in METRICS:  # without variation between prompts the interval is a point
            assert constant[attribute][name]["low"] == pytest.approx(constant[attribute][name]["high"])
    assert constant["entanglement"] == {"pearson": 0, "spearman": 0}


def slow_pearson(a, b):
    if len(set(a)) == 1 or len(set(b)) == 1:
        return 0.0
    return statistics.correlation(a, b)


def slow_metrics(requests, scores, a):
    """Plain loops over prompts, controls and pairs."""
    per_prompt, errors, wins, ties, pairs = [], [], 0, 0, 0
    for s, r in zip(requests.tolist(), scores.tolist(), strict=True):
        per_prompt.append(slow_pearson([x[a] for x in s], [x[a] for x in r]) if len(s) > 1 else 0.0)
        for j in range(len(s)):
            errors.append(abs(s[j][a] - r[j][a]))
            for k in range(len(s)):
                if s[j][a] > s[k][a] and s[j][1 - a] == s[k][1 - a]:
                    pairs += 1
                    wins += r[j][a] > r[k][a]
                    ties += r[j][a] == r[k][a]
    flat = [[x[a] for prompt in table.tolist() for x in prompt] for table in (requests, scores)]
    pooled = slow_pearson(*flat) if len(flat[0]) > 1 else 0.0
    found = {"mP": pooled, "MP": statistics.mean(per_prompt), "Err": statistics.mean(errors), "BT": wins / pairs if pairs else None}
    return found, (ties / pairs if pairs else None)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_equals_the_slow_implementation_on_random_tables(data):
    controls = data.draw(st.sampled_from([CORNERS, CORNERS[:1], CORNERS[1:3], CORNERS[:3], grid((0.2, 0.6, 1.0))]))
    levels = np.array([control.levels for control in controls])
    prompts = data.draw(st.integers(1, 6))
    cells = prompts * len(levels) * 2
    # Few distinct scores, so that ties and constant prompts are frequent.
    drawn = data.draw(st.lists(st.sampled_from([0.0, 0.2, 0.25, 0.8, 1.0]), min_size=cells, max_size=cells))
    scores, requests = np.array(drawn).reshape(prompts, len(levels), 2), requests_for(prompts, levels)
    order = data.draw(st.permutations(range(prompts * len(levels))))
    result = measure(long_table(requests, scores, order), seed=3, draws=5)
    for a, attribute in enumerate(ATTRIBUTES):
        expected, ties = slow_metrics(requests, scores, a)
        assert values(result, attribute) == pytest.approx(expected, abs=1e-9)
        assert result[attribute]["ties"] == pytest.approx(ties)
        assert result["matched"]["mP"][attribute][attribute] == pytest.approx(expected["mP"], abs=1e-9)
        assert result["matched"]["MP"][attribute][attribute] == pytest.approx(expected["MP"], abs=1e-9)


def test_bootstrap_draws_equal_the_metrics_of_the_resampled_table():
    rng = np.random.default_rng(5)
    requests, scores = requests_for(7), rng.choice([0, 0.3, 0.5, 1], size=(7, 4, 2))
    scores[3] = 0.5
    result = measure_arrays(requests, scores, seed=11, draws=150)
    drawn = {name: [] for name in METRICS}
    for counts in np.concatenate(list(resamples(7, 11, 150))):
        rows = np.repeat(np.arange(7), counts.astype(int))
        assert len(rows) == 7
        for name, value in slow_metrics(requests[rows], scores[rows], 0)[0].items():
            drawn[name].append(value)
    for name in METRICS:
        low, high = np.percentile(drawn[name], (2.5, 97.5))
        found = result["helpful"][name]
        assert (found["low"], found["high"]) == pytest.approx((low, high), abs=1e-9)
        assert low < found["value"] < high
    assert measure_arrays(requests, scores, seed=11, draws=150) == result
    assert measure_arrays(requests, scores, seed=12, draws=150)["helpful"]["mP"] != result["helpful"]["mP"]


def test_controls_may_stand_in_any_order_and_differ_by_prompt():
    """Arrays that no grid gives: each prompt has its own controls, in its own order."""
    rng = np.random.default_rng(2)
    requests, scores = rng.choice([0.2, 0.6, 1], size=(6, 5, 2)), rng.random((6, 5, 2))
    requests[0, :2] = (1, 0.2), (0.2, 0.2)  # at least one pair
    result = measure_arrays(requests, scores, seed=1, draws=100)
    for a, attribute in enumerate(ATTRIBUTES):
        assert values(result, attribute) == pytest.approx(slow_metrics(requests, scores, a)[0], abs=1e-9)
        drawn = [
            slow_metrics(requests[rows], scores[rows], a)[0]["mP"]
            for counts in np.concatenate(list(resamples(6, 1, 100)))
            for rows in [np.repeat(np.arange(6), counts.astype(int))]
        ]
        found = result[attribute]["mP"]
        assert (found["low"], found["high"]) == pytest.approx(tuple(np.percentile(drawn, (2.5, 97.5))), abs=1e-9)
    backwards = measure_arrays(requests[:, ::-1], scores[:, ::-1], seed=1, draws=100)
    assert values(backwards, "helpful") == pytest.approx(values(result, "helpful"))


def test_intervals_of_a_share_have_the_textbook_width():
    """BT of n independent wins with probability 1/2 has standard error sqrt(1/4 / n): the interval is ±1.96 of it."""
    n = 4000
    scores = np.zeros((n, 2, 2))
    scores[: n // 2, 1, 0] = 1
    found = measure_arrays(requests_for(n, np.array([[0.2, 1], [1, 1]])), scores, seed=4)["helpful"]["BT"]
    assert found["value"] == 0.5
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * math.sqrt(0.25 / n), rel=0.1)


def test_mismatched_control_and_entanglement():
    requests = requests_for(3)
    swapped = measure_arrays(requests, requests[..., ::-1], seed=0, draws=10)["matched"]
    for kind in ("mP", "MP"):
        assert swapped[kind]["helpful"] == pytest.approx({"helpful": 0, "harmless": 1})
        assert swapped[kind]["harmless"] == pytest.approx({"helpful": 1, "harmless": 0})
    scores = requests.copy()
    scores[..., 0], scores[..., 1] = (0, 0.1, 0.2, 1), (0, 0.5, 0.6, 0.7)
    found = measure_arrays(requests, scores, seed=0, draws=10)["entanglement"]
    assert found == {"pearson": pytest.approx(0.285 / math.sqrt(0.6275 * 0.29)), "spearman": pytest.approx(1)}


def test_calibration_curve():
    requests, scores = requests_for(2), np.zeros((2, 4, 2))
    scores[..., 0] = (0, 0.2, 0.5, 0.7)
    curve = measure_arrays(requests, scores, seed=0, draws=10)["calibration"]["helpful"]
    assert curve == [
        {"requested": 0.2, "mean": pytest.approx(0.1), "std": pytest.approx(0.1), "count": 4},
        {"requested": 1.0, "mean": pytest.approx(0.6), "std": pytest.approx(0.1), "count": 4},
    ]


def test_one_prompt_and_one_control():
    one_prompt = measure_arrays(requests_for(1), requests_for(1), seed=0)
    assert one_prompt["helpful"]["MP"] == {key: pytest.approx(1) for key in ("value", "low", "high")}
    one_control = measure_arrays(requests_for(1, CORNER_LEVELS[:1]), np.full((1, 1, 2), 0.3), seed=0)
    assert one_control["helpful"]["BT"] == EMPTY and one_control["helpful"]["ties"] is None and one_control["helpful"]["constant"] == 1
    assert one_control["helpful"]["MP"] == one_control["helpful"]["mP"] == {"value": 0, "low": 0, "high": 0}
    assert one_control["helpful"]["Err"]["value"] == pytest.approx(0.1)
    json.dumps(one_control, allow_nan=False)


def test_wrong_tables_are_named():
    requests, scores = requests_for(3), requests_for(3)
    whole = long_table(requests, scores)
    with pytest.raises(DataError, match="missing: prompt p1 with control helpful=0.2,harmless=1$"):
        measure(whole.filter(pa.array([i != 5 for i in range(12)])), seed=0)
    with pytest.raises(DataError, match="more than once: prompt p0 with control helpful=0.2,harmless=0.2$"):
        measure(pa.concat_tables([whole, whole.slice(0, 1)]), seed=0)
    with pytest.raises(DataError, match="missing: .* and 1 more"):
        measure(pa.concat_tables([whole.slice(row, 1) for row in (0, 5, 10)]), seed=0)  # 3 x 3 cells, 3 given
    for bad, says in ((math.nan, r"1 bad.*prompt p2, control helpful=1,harmless=0.2, attribute harmless: no score"), (1.5, "outside")):
        wrong = scores.copy()
        wrong[2, 2, 1] = bad
        with pytest.raises(DataError, match=says):
            measure(long_table(requests, wrong), seed=0)
        with pytest.raises(DataError, match="prompt 2, control 2, attribute harmless"):
            measure_arrays(requests, wrong, seed=0)
    with pytest.raises(DataError, match="no score"):
        measure(whole.set_column(3, "helpful_score", pa.array([None, *[0.5] * 11], pa.float32())), seed=0)
    with pytest.raises(DataError, match="is empty"):
        measure(whole.slice(0, 0), seed=0)
    with pytest.raises(DataError, match="no column harmless_score"):
        measure(whole.drop_columns("harmless_score"), seed=0)
    with pytest.raises(DataError, match="needs numbers in helpful_request and harmless_request"):
        measure(whole.set_column(1, "helpful_request", pa.array(["high"] * 12)), seed=0)
    with pytest.raises(ControlError, match="1.2"):
        measure(long_table(requests + 0.2, scores), seed=0)
    with pytest.raises(DataError, match=r"got \(3, 4, 2\) and \(3, 3, 2\)"):
        measure_arrays(requests, scores[:, :3], seed=0)


def test_from_table_keeps_prompt_order_sorts_controls_and_takes_other_score_columns():
    scores = np.random.default_rng(0).random((3, 4, 2))
    table = long_table(requests_for(3), scores, order=[11, 4, 7, 0, 5, 1, 2, 6, 3, 8, 10, 9])
    renamed = table.rename_columns(["prompt_id", "helpful_request", "harmless_request", "a", "b"])
    requests, found = from_table(renamed, scores=("a", "b"))
    assert np.array_equal(requests, requests_for(3)) and np.array_equal(found, scores[[2, 1, 0]])
    assert Control(*requests[0, 1].tolist()) == CORNERS[1]


def test_over_optimisation_gap():
    requests = requests_for(2)
    perfect, constant = (measure_arrays(requests, scores, seed=0, draws=2) for scores in (requests, np.full_like(requests, 0.6)))
    assert over_optimisation_gap(perfect, constant)["harmless"] == pytest.approx({"mP": 1, "MP": 1, "Err": -0.4, "BT": 1})
    constant["harmless"]["BT"] = EMPTY
    assert over_optimisation_gap(perfect, constant)["harmless"]["BT"] is None


def test_safe_shares():
    found = safe_shares(np.array([0.5, 0.9, 0.49, 1]), np.array([0.5, 0, 0.2, 0.49999]), seed=0)
    assert found["S1"]["value"] == 0.75 and found["S0"]["value"] == 0.75
    assert found["S1"]["low"] < 0.75 < found["S1"]["high"]
    with pytest.raises(DataError, match="S0, answer 1: no score"):
        safe_shares(np.array([0.5]), np.array([0.5, np.nan]), seed=0)
    with pytest.raises(DataError, match="S1 needs"):
        safe_shares(np.array([]), np.array([0.5]), seed=0)
