"""A prompt that lacks a score of a set of judges is as if it were not there, for that set; and it is counted."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from ctrlrl.control import CORNERS
from ctrlrl.errors import DataError
from ctrlrl.evaluation.baselines import nearest
from ctrlrl.evaluation.bench import SHARES, bench_figures
from ctrlrl.evaluation.bench_tables import lines
from ctrlrl.evaluation.results import MeasureConfig, results
from jobs.parts.measure import unscored_lines
from tests.evaluation.test_bench import NO, YES, make
from tests.evaluation.test_results import column

FEW = MeasureConfig(draws=20)


def lacking(table, name, *rows):
    """The table with nulls in a column."""
    return column(table, name, [None if i in rows else x for i, x in enumerate(table[name].to_pylist())])


@pytest.mark.parametrize("method", ["control", "prompting"])
def test_the_figures_of_a_set_are_those_of_the_other_prompts(make_answers, method):
    whole = make_answers(9, method)
    each = len(whole) // 9
    some = lacking(whole, "optimisation.helpful", *range(2 * each, 3 * each))
    some = lacking(some, "optimisation.harmless", *range(5 * each, 6 * each))
    without = whole.filter(pc.invert(pc.is_in(whole["prompt_id"], pa.array(["p2", "p5"]))))
    (found, details), (other, besides), (plain, _) = (results(table, FEW, 1) for table in (some, without, whole))
    assert found["optimisation"] == other["optimisation"] and found["held_out"] != other["held_out"]
    assert found["held_out"] == plain["held_out"] or method == "prompting"  # there the best template may be another
    assert details["judges"]["optimisation"] == besides["judges"]["optimisation"]
    scores = [[corner["scores"]["optimisation"] for corner in one["corners"]] for one in (details, besides)]
    assert scores[0] == scores[1] and details["corners"][0]["answers"] == 9
    assert details["unscored"] == {"optimisation": 2} and "unscored" not in besides and details["prompts"] == 9
    assert details["missing"] == ["2 prompts lack optimisation scores, and are left out of these"] and besides["missing"] == []
    assert unscored_lines(details) == ["2 prompts without all their optimisation scores left out"] and unscored_lines(besides) == []
    json.dumps([found, details], allow_nan=False)


def test_one_control_without_a_score_leaves_the_whole_prompt_out_and_all_are_an_error(make_answers):
    whole = make_answers(5)
    some, without = lacking(whole, "held_out.harmless", 6), whole.filter(pc.not_equal(whole["prompt_id"], "p1"))
    assert results(some, FEW, 1)[0]["held_out"] == results(without, FEW, 1)[0]["held_out"]
    with pytest.raises(DataError, match="none of the 5 prompts has its scores in held_out.helpful and held_out.harmless"):
        results(lacking(whole, "held_out.harmless", 0, 5, 10, 15, 16), FEW, 1)


def test_the_figures_of_a_bench_are_those_of_the_other_prompts():
    rng = np.random.default_rng(0)
    unsafe = [True, False, True, True, False, True]
    answers = [[NO if rng.random() < 0.5 else YES for _ in CORNERS] for _ in unsafe]
    scores = {"helpful": rng.random((6, 4)), "harmless": rng.random((6, 4))}
    whole = make(answers, unsafe, scores=scores)
    some = lacking(lacking(whole, "optimisation.helpful", 5), "optimisation.harmless", 14)  # of the prompts 1 and 3
    rest = [0, 2, 4, 5]
    fewer = make([answers[i] for i in rest], [unsafe[i] for i in rest], scores={a: s[rest] for a, s in scores.items()})
    config = MeasureConfig(draws=0)
    every = [bench_figures(table, config, 0) for table in (some, fewer, whole)]
    found, other, plain = (one["sets"]["xs"]["attacks"]["none"] for one in every)
    assert found["unscored"] == {"optimisation": 2} and "unscored" not in other and found["MP"]["optimisation"] == {
        a: {name: x if x is None else pytest.approx(x) for name, x in figure.items()} for a, figure in other["MP"]["optimisation"].items()
    }  # fmt: skip
    of = lambda row, names: [row[name]["value"] for name in names]  # noqa: E731
    for row, same, all_of in zip(found["controls"], other["controls"], plain["controls"], strict=True):
        assert of(row["scores"]["optimisation"], scores) == pytest.approx(of(same["scores"]["optimisation"], scores))
        assert of(row, SHARES[3:]) == pytest.approx(of(same, SHARES[3:])) and SHARES[3:] == ("compliance", "configurable")
        assert of(row, SHARES[:3]) == of(all_of, SHARES[:3])  # refusals need no scores
    said = "prompts without all their scores left out: 2 by optimisation under none"
    assert said in lines("x", every[0]) and said not in lines("x", every[2])
    nothing = bench_figures(lacking(whole, "optimisation.helpful", *range(24)), config, 0)["sets"]["xs"]["attacks"]["none"]
    assert nothing["controls"][0]["compliance"]["value"] is None and nothing["MP"]["optimisation"]["helpful"]["value"] is None
    json.dumps([found, nothing], allow_nan=False)


def test_reranking_chooses_among_the_candidates_with_scores():
    scores = np.array([[[1, np.nan], [0.5, 0.3], [1, 0.9]], [[np.nan, 1], [np.nan, np.nan], [1, np.nan]], [[0.9, 1], [1, np.nan], [1, 1]]])
    assert nearest(scores, np.array([[1, 0.2], [1, 1], [1, 1]])).tolist() == [1, 0, 2]
