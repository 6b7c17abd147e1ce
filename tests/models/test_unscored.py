"""What may stay without a score: counted over a run, named when it is too much."""

import numpy as np
import pytest
from pydantic import ValidationError

from ctrlrl.errors import DataError
from ctrlrl.models.scorer import ScorerConfig
from ctrlrl.models.unscored import ENOUGH, Unscored, check_unscored, score_or_none


def talks(count):
    return [([{"role": "user", "content": f"Question {i}?"}], f"Answer {i}.") for i in range(count)]


def test_a_run_counts_all_its_answers_and_ends_with_the_first_that_is_one_too_many():
    counted, raw = Unscored("judge:m", 0.05), np.full(100, 0.5)
    assert counted.count(talks(100), raw, {}) == ""
    raw[[7, 9]] = np.nan
    told = counted.count(talks(100), raw, {7: "the judge said 'Hm'", 9: "else"})
    assert told == (
        "judge:m has no score for the answer 'Answer 7.' to 'Question 7?': the judge said 'Hm' (the first that is set aside; "
        "unscored = 0.05 of all may be)"
    )
    raw[:8] = np.nan
    assert counted.count(talks(9), raw[:9], {}) == ""  # 10 of 209: more than 5 % of these 9 alone
    with pytest.raises(DataError, match=r"could not score 11 of 210 answers, and unscored = 0.05 .*'Answer 7.' .*: the judge said 'Hm'"):
        counted.count(talks(1), np.array([np.nan]), {})


def test_early_answers_are_a_share_of_enough_and_zero_allows_none():
    early = Unscored("x", 0.05)
    early.count(talks(10), np.full(10, np.nan), {})
    assert early.unscored == 0.05 * ENOUGH
    with pytest.raises(DataError, match="11 of 11 .*without a reason"):
        early.count(talks(1), np.array([np.nan]), {})
    with pytest.raises(DataError, match="1 of 3 answers, and unscored = 0 .*'Answer 2.' to 'Question 2.': why"):
        Unscored("x", 0).count(talks(3), np.array([0, 0.5, np.nan]), {2: "why"})
    assert Unscored("x", 0).count(talks(3), np.array([0, 0.5, 1.0]), {}) == ""


def test_a_set_of_scores_may_lack_its_share_and_no_more():
    check_unscored("x", 5, 100, 0.05, "mend it")
    with pytest.raises(DataError, match="x has no score for 6 of 100 answers, and unscored = 0.05 .*: mend it"):
        check_unscored("x", 6, 100, 0.05, "mend it")
    assert score_or_none(0.25) == 0.25 and score_or_none(float("nan")) is None


def test_the_share_is_a_setting_of_services_and_judges_and_no_part_of_the_identity():
    of = lambda share: ScorerConfig(http={"url": "https://a.example/", "unscored": share})  # noqa: E731
    assert of(0.1).http.unscored == 0.1 and ScorerConfig(http="https://a.example/").http.unscored == 0.05
    assert of(0.1).fingerprint() == of(0).fingerprint()
    for wrong in (-0.1, 1.1):
        with pytest.raises(ValidationError):
            of(wrong)
    with pytest.raises(ValidationError, match="unscored"):
        ScorerConfig(model="m", unscored=0.1)
