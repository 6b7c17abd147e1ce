"""Progress within a step: what it says, and how often a log hears of it."""

import pytest

from jobs.parts import progress
from jobs.parts.progress import Answers, Steps


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets, and a standard output that is a log."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress.sys.stdout, "isatty", lambda: False, raising=False)
    return now


def test_a_log_hears_of_a_long_step_every_15_seconds(clock, capsys):
    with Steps("ppo", 3) as steps:
        answers = Answers(steps, 32)
        assert capsys.readouterr().out == "ppo 0/3  step 1: 0 of 32 answers drawn, 0 scored\n"
        clock[0] += 10
        answers.drawn(8, 400)
        assert capsys.readouterr().out == ""
        clock[0] += 10
        answers.scored(8)  # a quarter in 20 seconds
        assert capsys.readouterr().out == "ppo 0/3  step 1: 8 of 32 answers drawn, 8 scored  20 tokens/s  60 s left\n"
        clock[0] += 5
        steps.advance("reward 0.5")
        assert capsys.readouterr().out == "ppo 1/3  reward 0.5  25 s, 50 s left\n"


def test_a_log_hears_of_quick_steps_alone(clock, capsys):
    with Steps("ppo", 3) as steps:
        steps.within("beginning")
        capsys.readouterr()
        for _ in range(3):
            clock[0] += 4
            Answers(steps, 4).drawn(4, 10)
            steps.advance("figures")
        assert capsys.readouterr().out.count("\n") == 3


def test_a_batch_ahead_is_told_from_the_step_that_trains(clock, capsys):
    with Steps("ppo", 3) as steps:
        Answers(steps, 4, "batch 2: ")
        assert capsys.readouterr().out == "ppo 0/3  step 1: batch 2: 0 of 4 answers drawn, 0 scored\n"
