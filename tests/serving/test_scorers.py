"""The reward models of a server: what may stand in their place, and what has no room beside the server's engine."""

import json

import pytest

from ctrlrl.errors import ModelError, RecipeError
from jobs.parts.serving import load_serving, reward_configs, scores_of
from tests.models.listening import Listening

DIALS = """
[dials.kind]
prompting = true
helpful = 1.0
harmless = 1.0

[rewards]
helpful = {helpful}
harmless = {harmless}
"""


@pytest.fixture
def given(models, tmp_path):
    def write(helpful, harmless):
        (tmp_path / "dials.toml").write_text(DIALS.format(helpful=helpful, harmless=harmless))
        return load_serving(models["policy"], str(tmp_path / "dials.toml"), [], "mine")

    return write


def test_a_service_and_a_function_score_for_a_server(given, models, tmp_path):
    (tmp_path / "mine.py").write_text("def score(conversations):\n    return [0.25] * len(conversations)\n")
    service = Listening(lambda body, _: (200, {}, {"scores": [len(c["answer"]) / 100 for c in body["conversations"]]}))
    try:
        serving = given(f'{{ http = "{service.url}" }}', f'{{ python = "{tmp_path}/mine.py:score" }}')
        scores = scores_of(reward_configs(serving.config))([{"role": "user", "content": "x"}], ["abc", ""])
        assert scores == [{"helpful": 0.03, "harmless": 0.25}, {"helpful": 0.0, "harmless": 0.25}]
    finally:
        service.close()
    with pytest.raises(ModelError, match="cannot be reached"):
        given(f'{{ http = "{service.url}" }}', json.dumps(models["harmless"]))


def test_a_judge_needs_an_engine_that_a_server_does_not_have(given, models):
    with pytest.raises(RecipeError, match="rewards.helpful: a judge needs an engine of its own.*give judge.url"):
        given(f'{{ judge = {{ model = "{models["policy"]}", rubric = "{{answer}}" }} }}', json.dumps(models["harmless"]))
