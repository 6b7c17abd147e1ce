"""The reward models of a server: what may stand in their place, and what has no room beside the server's engine."""

import asyncio
import json

import pytest

from ctrlrl.control import Control
from ctrlrl.errors import ModelError, RecipeError
from ctrlrl.serving.asked import Refused
from ctrlrl.serving.rerank import chosen
from ctrlrl.serving.service import Service
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
    nothing = Listening(lambda body, _: (200, {}, {"scores": [None if c["answer"] == "?" else 0.5 for c in body["conversations"]]}))
    try:
        serving = given(f'{{ http = "{nothing.url}" }}', f'{{ python = "{tmp_path}/mine.py:score" }}')
        scores = scores_of(reward_configs(serving.config))([{"role": "user", "content": "x"}], ["?", "abc"])
        assert scores == [{"helpful": None, "harmless": 0.25}, {"helpful": 0.5, "harmless": 0.25}]
        drawn = {"choices": [{"index": i, "message": {"content": said}} for i, said in enumerate(["?", "abc"])]}
        assert chosen(drawn, scores, Control(1, 1))["choices"][0]["message"]["content"] == "abc"
        assert chosen(drawn, [scores[0]] * 2, Control(1, 1))["choices"][0]["message"]["content"] == "?"  # none has scores: the first
        service_of = Service(None, None, serving.config, serving.kind, lambda *_: scores[:1])
        with pytest.raises(Refused, match="what scores helpful gives this answer no score"):
            asyncio.run(service_of.score([{"role": "user", "content": "x"}, {"role": "assistant", "content": "?"}]))
    finally:
        nothing.close()
    with pytest.raises(ModelError, match="cannot be reached"):
        given(f'{{ http = "{service.url}" }}', json.dumps(models["harmless"]))


def test_a_judge_needs_an_engine_that_a_server_does_not_have(given, models):
    with pytest.raises(RecipeError, match="rewards.helpful: a judge needs an engine of its own.*give judge.url"):
        given(f'{{ judge = {{ model = "{models["policy"]}", rubric = "{{answer}}" }} }}', json.dumps(models["harmless"]))
