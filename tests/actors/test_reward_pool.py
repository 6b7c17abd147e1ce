"""Scorers of every kind in pools of their own: a slow one holds up no other, is not asked twice, and has its key from the job alone."""

import threading

import numpy as np
import pytest

from actors.crew import start_crew
from actors.reward import RewardConfig, patience_of
from ctrlrl.config import differences
from ctrlrl.errors import DataError
from tests.models.listening import Listening

CONVERSATIONS = [([{"role": "user", "content": f"Question {i}?"}], "x" * i) for i in range(5)]


@pytest.fixture
def slow():
    """A service with a key that answers when `let` is set; a request that has come sets `came`."""
    came, let = threading.Event(), threading.Event()

    def answer(body, headers):
        if headers["Authorization"] != "Bearer s3cret":
            return 401, {}, b""
        came.set()
        let.wait(120)
        return 200, {}, {"scores": [len(c["answer"]) / 8 for c in body["conversations"]]}

    service = Listening(answer)
    service.came, service.let = came, let
    yield service
    let.set()
    service.close()


def test_a_run_that_goes_on_may_ask_more_patiently_but_nobody_else(tmp_path):
    def recipe(url="https://a.example/", rubric="{answer}", **patience):
        rewards = {
            "x": RewardConfig(http={"url": url, **patience}),
            "y": RewardConfig(judge={"url": url, "model": "m", "rubric": rubric, **patience}),
        }
        return rewards, {"reward": {name: reward.model_dump(mode="json") for name, reward in rewards.items()}}

    rewards, before = recipe()
    free = tuple(f"{key}:" for key in patience_of(rewards))
    changed = differences(before, recipe(key="A_KEY", timeout_s=5, attempts=9, longest_wait_s=1, at_once=1, unscored=0.5)[1])
    assert len(changed) == len(free) == 12 and all(change.startswith(free) for change in changed)
    for other in ({"url": "https://b.example/"}, {"rubric": "? {answer}"}):
        assert not any(change.startswith(free) for change in differences(before, recipe(**other)[1]))


def test_answers_without_a_score_are_set_aside_until_they_are_too_many(ray_cluster, cluster_config, tmp_path, capsys):
    def answer(body, _):
        scores = [None if len(c["answer"]) % 2 else len(c["answer"]) / 8 for c in body["conversations"]]
        return 200, {}, {"scores": scores, "reasons": {str(i): "odd" for i in range(len(scores))}}

    service, few = Listening(answer), {"cpus": 0.1}
    rewards = {
        "lenient": RewardConfig(http={"url": service.url}, resources=few),
        "strict": RewardConfig(http={"url": service.url, "unscored": 0}, resources=few),
    }
    try:
        with start_crew(cluster_config, rewards, folder=tmp_path / "run") as crew:
            crew.wait_ready()
            expected = [0.0, None, 0.25, None, 0.5]
            for found in (crew.rewards["lenient"].score(CONVERSATIONS), crew.rewards["lenient"].raw(CONVERSATIONS).result()):
                assert [None if np.isnan(x) else x for x in found.tolist()] == expected
            asked = len(service.asked)
            crew.rewards["lenient"].score(CONVERSATIONS)
            assert len(service.asked) == asked  # nor are they asked for again in this run
            out = capsys.readouterr().out
            assert out.count("no score for the answer 'x' to 'Question 1?': odd (asked 3 times) (the first") == 1
            with pytest.raises(DataError, match="strict: .* could not score 2 of 5 answers, and unscored = 0 .*'x' to 'Question 1.': odd"):
                crew.rewards["strict"].score(CONVERSATIONS)
        (kept,) = (tmp_path / "run" / "remembered").iterdir()
        assert len(kept.read_text().splitlines()) == 3  # a run that goes on asks for the others
    finally:
        service.close()


def test_a_slow_service_holds_up_no_other_and_is_not_asked_twice(ray_cluster, cluster_config, slow, tmp_path, monkeypatch):
    monkeypatch.setenv("CTRLRL_TEST_KEY", "s3cret")  # after the cluster's start, so its workers do not have it
    (tmp_path / "fast.py").write_text("def score(conversations):\n    return [0.5] * len(conversations)\n")
    rewards = {
        "fast": RewardConfig(python=f"{tmp_path}/fast.py:score", resources={"cpus": 0.1}),
        "slow": RewardConfig(http={"url": slow.url, "key": "CTRLRL_TEST_KEY"}, workers=2, resources={"cpus": 0.1}),
    }
    with start_crew(cluster_config, rewards, folder=tmp_path / "run") as crew:
        crew.wait_ready()
        waiting = crew.rewards["slow"].raw(CONVERSATIONS)
        assert slow.came.wait(120)
        assert crew.rewards["fast"].score(CONVERSATIONS).tolist() == [0.5] * 5  # while the other is being asked
        assert crew.rewards["fast"].raw(CONVERSATIONS[:1]).result().tolist() == [0.5] and not waiting.done()
        slow.let.set()
        scores = waiting.result().tolist()
        assert scores == [i / 8 for i in range(5)] and len(slow.asked) == 1
        again = crew.rewards["slow"].score([*CONVERSATIONS[::-1], CONVERSATIONS[0]])
        assert again.tolist() == [*scores[::-1], 0.0] and again.dtype == np.float32 and len(slow.asked) == 1
    (kept,) = (tmp_path / "run" / "remembered").iterdir()
    assert kept.name == f"{rewards['slow'].content_sha256()}.txt" and "s3cret" not in kept.read_text()
    slow.answer = lambda *_: (500, {}, b"asked again")
    with start_crew(cluster_config, {"slow": rewards["slow"]}, folder=tmp_path / "run") as crew:  # the run goes on
        assert crew.rewards["slow"].raw(CONVERSATIONS).result().tolist() == scores and len(slow.asked) == 1
