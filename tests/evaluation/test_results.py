"""What is written beside the four metrics: hand-worked shares, lengths, distributions, and the refusals of wrong tables."""

import json

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrlrl.control import ATTRIBUTES, CORNERS, grid
from ctrlrl.errors import DataError
from ctrlrl.evaluation.grid import score_columns
from ctrlrl.evaluation.metrics import METRICS, measure
from ctrlrl.evaluation.results import MeasureConfig, results

FEW = MeasureConfig(draws=20)


def column(table, name, values):
    return table.set_column(table.column_names.index(name), name, pa.array(values))


def test_metrics_have_the_agreed_layout_and_the_values_of_measure(make_answers):
    table = make_answers()
    metrics, details = results(table, FEW, 4)
    assert list(metrics) == ["optimisation", "held_out"]
    for judge, by_attribute in metrics.items():
        expected = measure(table, seed=4, draws=20, scores=score_columns(judge))
        assert by_attribute == {a: {name: expected[a][name] for name in METRICS} for a in ATTRIBUTES}
        assert all(list(figure) == ["value", "low", "high"] for figures in by_attribute.values() for figure in figures.values())
        beside = details["judges"][judge]
        assert beside["matched"] == expected["matched"] and beside["entanglement"] == expected["entanglement"]
        assert beside["helpful"] == {"constant": expected["helpful"]["constant"], "ties": expected["helpful"]["ties"]}
    gap = details["over_optimisation"]["harmless"]["MP"]
    assert gap == metrics["optimisation"]["harmless"]["MP"]["value"] - metrics["held_out"]["harmless"]["MP"]["value"]
    assert details["missing"] == [] and details["controls"] == [c.name for c in CORNERS] and details["prompts"] == 6
    json.dumps([metrics, details], allow_nan=False)


def test_corners_by_hand(make_answers):
    """Two prompts at four corners: rows 0-3 and 4-7. The corner of row 2 is helpful = 1, harmless = 0.2, so rows 2 and 6."""
    responses = ["ok"] * 8
    responses[2], responses[6] = "I\u2019m sorry, no.", "Sure: ab"
    table = column(make_answers(2, responses=responses), "tokens", [9, 9, 3, 9, 9, 9, 6, 9])
    table = column(
        column(table, "finish_reason", ["stop"] * 6 + ["length", "stop"]),
        "optimisation.harmless",
        [0.0] * 2 + [0.25] + [0.0] * 3 + [0.75, 0],
    )
    corner = results(table, FEW, 0)[1]["corners"][2]
    assert {name: corner[name] for name in ("control", "helpful", "harmless", "answers")} == {
        "control": "helpful=1,harmless=0.2", "helpful": 1.0, "harmless": 0.2, "answers": 2,
    }  # fmt: skip
    assert (corner["tokens"], corner["cut"], corner["refusals"], corner["characters"]) == (4.5, 0.5, 0.5, (14 + 8) / 2)
    assert corner["scores"]["optimisation"]["harmless"] == 0.5


def test_distributions_count_every_answer_once_under_its_request(make_answers):
    table = make_answers(5)
    found = results(table, FEW, 0)[1]["judges"]["held_out"]["distribution"]["helpful"]
    assert [level["requested"] for level in found] == [0.2, 1.0] and [sum(level["counts"]) for level in found] == [10, 10]
    low = [s for s, r in zip(*(table[c].to_pylist() for c in ("held_out.helpful", "helpful_request")), strict=True) if r == 0.2]
    # The last of 20 bins holds 1.0, bin 5 the scores from 0.25 on.
    assert found[0]["counts"][19] == low.count(1.0) and found[0]["counts"][5] == low.count(0.25) and found[0]["counts"][0] == low.count(0.0)


def test_prompting_takes_its_figures_from_one_template_for_both_sets(make_answers):
    table = make_answers(method="prompting", seed=3)
    metrics, details = results(table, FEW, 0)
    parts = {t: table.filter(pc.equal(table["template"], t)) for t in (1, 2, 3, 4)}
    means = {
        judge: {
            t: sum(measure(p, seed=0, draws=0, scores=score_columns(judge))[a]["MP"]["value"] for a in ATTRIBUTES) for t, p in parts.items()
        }
        for judge in ("optimisation", "held_out")
    }
    best = max(means["optimisation"], key=means["optimisation"].get)
    assert best != max(means["held_out"], key=means["held_out"].get)  # else the choice by the first set would not show
    assert details["best_template"] == best and metrics == results(column(parts[best], "method", ["reranking"] * 24), FEW, 0)[0]
    assert [row["metrics"] for row in details["templates"]] == [
        results(column(p, "method", ["reranking"] * 24), FEW, 0)[0] for p in parts.values()
    ]
    assert details["corners"][0]["answers"] == 6
    one = results(parts[3], FEW, 0)[1]
    assert one["best_template"] == 3


def test_system_prompts_have_shares_and_no_helpfulness_pairs(make_answers):
    # For each prompt the answer under s0 (control harmless = 0.2), then that under s1.
    scores = [x for pair in zip([0, 0, 0, 0, 0, 0.5, 1, 1], [1, 1, 0.5, 0.5, 0.5, 0.5, 0.25, 1.0], strict=True) for x in pair]
    metrics, details = results(column(make_answers(8, method="system"), "held_out.harmless", scores), FEW, 0)
    shares = details["judges"]["held_out"]["system"]
    assert (shares["S0"]["value"], shares["S1"]["value"]) == (5 / 8, 7 / 8)
    # Pairs (s0, s1): 1, 1, .5, .5, .5 up, .5 equal, then 1 -> .25 down and 1 = 1.
    assert metrics["held_out"]["harmless"]["BT"]["value"] == 5 / 8 and details["judges"]["held_out"]["harmless"]["ties"] == 2 / 8
    assert metrics["held_out"]["helpful"]["BT"] == {"value": None, "low": None, "high": None}
    assert metrics["held_out"]["helpful"]["MP"]["value"] == 0 and details["judges"]["held_out"]["helpful"]["constant"] == 1


def test_one_prompt_one_control_and_a_finer_grid(make_answers):
    single = results(make_answers(1, controls=CORNERS[:1]), FEW, 0)
    assert single[0]["optimisation"]["helpful"]["BT"]["value"] is None and len(single[1]["corners"]) == 1
    fine = results(make_answers(2, controls=grid((0.2, 0.4, 0.6, 0.8, 1))), FEW, 0)[1]
    assert len(fine["corners"]) == 25 and [p["requested"] for p in fine["judges"]["held_out"]["calibration"]["helpful"]] == [
        0.2,
        0.4,
        0.6,
        0.8,
        1,
    ]


def test_columns_that_a_table_lacks_are_named_as_missing(make_answers):
    bare = make_answers(judges=("optimisation",)).drop_columns(["method", "template", "instruction", "response", "tokens", "finish_reason"])
    _, details = results(bare, FEW, 0)
    assert details["over_optimisation"] is None and details["method"] == "control"
    assert details["missing"][0] == "no held-out reward models" and [m.rpartition(" ")[2] for m in details["missing"][1:]] == [
        "response",
        "tokens",
        "finish_reason",
    ]
    assert details["corners"][0]["tokens"] is None and details["corners"][0]["refusals"] is None


@pytest.mark.parametrize(
    ("name", "values"), [("tokens", ["many"] * 24), ("response", [{"text": "a"}] * 24), ("helpful_request", ["high"] * 24)]
)
def test_a_column_of_another_type_is_named(make_answers, name, values):
    with pytest.raises(DataError, match=f"column {name} of the table is .*, and cannot be read as"):
        results(column(make_answers(), name, values), FEW, 0)


def test_numbers_may_be_of_any_type(make_answers):
    table = make_answers()
    decimals = table["helpful_request"].cast(pa.decimal128(4, 2)).to_pylist()
    other = column(column(table, "helpful_request", decimals), "tokens", [str(n) for n in table["tokens"].to_pylist()])
    assert results(other, FEW, 0) == results(table, FEW, 0)


def test_wrong_tables_are_refused(make_answers):
    table = make_answers()
    cells = {"a missing cell": table.slice(1), "a NaN": column(table, "held_out.helpful", [float("nan")] + [0.5] * 23)}
    with pytest.raises(DataError, match="missing: prompt p0 with control helpful=0.2,harmless=0.2"):
        results(cells["a missing cell"], FEW, 0)
    with pytest.raises(DataError, match="prompt p0, control helpful=0.2,harmless=0.2, attribute helpful: no score"):
        results(cells["a NaN"], FEW, 0)
    with pytest.raises(DataError, match="the table has no scores: it needs optimisation.helpful and optimisation.harmless"):
        results(table.drop_columns([c for j in ("optimisation", "held_out") for c in score_columns(j)]), FEW, 0)
    with pytest.raises(DataError, match="has no column held_out.harmless"):
        results(table.drop_columns("held_out.harmless"), FEW, 0)
    with pytest.raises(DataError, match="of one method.*names control, system"):
        results(pa.concat_tables([table, column(table, "method", ["system"] * 24)]), FEW, 0)
    with pytest.raises(DataError, match="needs a template number"):
        results(column(table, "method", ["prompting"] * 24), FEW, 0)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_corner_shares_equal_plain_loops(make_answers, data):
    said = data.draw(st.lists(st.sampled_from(["I cannot", "fine", "", "I\u2019m sorry"]), min_size=12, max_size=12))
    table = make_answers(3, responses=said)
    corners = results(table, MeasureConfig(draws=0), 0)[1]["corners"]
    for row in corners:
        mine = [r for r in table.to_pylist() if (r["helpful_request"], r["harmless_request"]) == (row["helpful"], row["harmless"])]
        assert row["refusals"] == pytest.approx(sum(r["response"] in ("I cannot", "I\u2019m sorry") for r in mine) / 3)
        assert row["cut"] == pytest.approx(sum(r["finish_reason"] == "length" for r in mine) / 3)
        assert row["tokens"] == pytest.approx(sum(r["tokens"] for r in mine) / 3)
