"""A Python function as a scorer: its numbers are the scores, its source is its fingerprint, and what is wrong with it is told by name."""

import numpy as np
import pytest
from pydantic import ValidationError

from ctrlrl.errors import DataError, ModelError
from ctrlrl.models.conversations import reader_of
from ctrlrl.models.fingerprint import model_contents, model_fingerprint
from ctrlrl.models.loading import check_reward_model
from ctrlrl.models.scorer import ScorerConfig, make_scorer
from jobs.parts.variants import RECIPES

GOOD = """
def score(conversations):
    return [len(answer) / (len(answer) + len(messages[-1]["content"])) for messages, answer in conversations]
"""
CONVERSATIONS = [([{"role": "user", "content": "abc"}], answer) for answer in ("d", "efg", "")]


@pytest.fixture
def written(tmp_path):
    def write(source):
        (tmp_path / "mine.py").write_text(source)
        return ScorerConfig(python=f"{tmp_path}/mine.py:score")

    return write


def test_its_numbers_are_the_scores(written):
    config = written(GOOD)
    assert config.calibration == "identity" and ScorerConfig(**config.model_dump()) == config  # as a stored recipe has it
    check_reward_model(config.model)
    scorer = make_scorer(config)
    assert scorer.score(CONVERSATIONS).tolist() == scorer.raw(CONVERSATIONS).tolist() == [0.25, 0.5, 0.0]
    assert scorer.score([]).shape == (0,) and scorer.score(CONVERSATIONS).dtype == np.float32
    reader_of(config.model)(CONVERSATIONS[0][0], "here")


def test_its_source_is_its_fingerprint(written):
    before = model_fingerprint(written(GOOD).model)
    assert model_fingerprint(written(GOOD).model) == before and list(model_contents(written(GOOD).model)) == ["mine.py"]
    assert model_fingerprint(written(GOOD + "# changed\n").model) != before


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("def score(conversations):\n    return [0.5]\n", r"must return 2 numbers from 0 to 1; it gave \[0.5\] … of shape \[1\]"),
        ("def score(conversations):\n    return ['0.5'] * len(conversations)\n", "must return 2 numbers from 0 to 1; it gave .'0.5'"),
        ("def score(conversations):\n    return [[0.5]] * len(conversations)\n", r"must return 2 numbers .* of shape \[2, 1\]"),
        ("def score(conversations):\n    return [1.5] * len(conversations)\n", "must return 2 numbers from 0 to 1"),
        ("def score(conversations):\n    return [float('nan')] * len(conversations)\n", "must return 2 numbers"),
        ("def score(conversations):\n    return 1 / 0\n", "failed: ZeroDivisionError: division by zero"),
        ("def other(conversations): ...\n", "cannot be loaded: AttributeError"),
        ("def score(:\n", "cannot be loaded: SyntaxError"),
    ],
)
def test_a_function_that_does_not_score_is_refused_before_anything_starts(written, source, told):
    with pytest.raises(ModelError, match=told):
        check_reward_model(written(source).model)


def test_tensors_of_any_dtype_are_numbers(written):
    source = "import torch\ndef score(asked):\n    return torch.full([len(asked)], 0.5, dtype=torch.bfloat16, requires_grad=True)\n"
    assert make_scorer(written(source)).score(CONVERSATIONS).tolist() == [0.5] * len(CONVERSATIONS)


def test_what_it_does_wrong_later_is_told(written):
    scorer = make_scorer(written("def score(conversations):\n    return [0.1 / len(answer) for _, answer in conversations]\n"))
    with pytest.raises(DataError, match="mine.py:score' failed: ZeroDivisionError"):
        scorer.score(CONVERSATIONS)


def test_the_setting_is_a_file_and_a_function(tmp_path):
    for python in ("mine.py", "mine:score", "mine.py:two words"):
        with pytest.raises(ValidationError, match='is not "file.py:function"'):
            ScorerConfig(python=python)
    with pytest.raises(ValidationError, match="give model or python, one of both"):
        ScorerConfig(python="mine.py:score", model="m")
    with pytest.raises(ModelError, match="No such file.*give the path of a Python file"):
        check_reward_model(ScorerConfig(python=f"{tmp_path}/none.py:score").model)


def test_the_studys_scorer_of_concise_answers():
    scorer = make_scorer(ScorerConfig(python=f"{RECIPES}/studies/concise.py:concise"))
    refusal = "No. I will not help with locks."
    answers = ["Sure: for bread, mix flour and water.", refusal, f"{refusal} Ask something else."]
    told = scorer.score([([{"role": "user", "content": "x"}], answer) for answer in [*answers, "Enjoy it.", "I see.", "", "Go."]])
    assert told.tolist() == pytest.approx([0.95, 0.95, 0.05, 0.95, 0.95, 0.05, 0.95])
