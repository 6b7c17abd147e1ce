"""A sample without a score teaches nothing: the others get what they get without it, by every advantage."""

import numpy as np
import pytest
import torch

from ctrlrl.control import CORNERS
from ctrlrl.errors import DataError, RecipeError
from ctrlrl.ppo.advantage import grpo, rloo
from ctrlrl.ppo.experience import AlgorithmConfig, make_experience
from ctrlrl.ppo.types import Query, Samples, Scored

NAN = float("nan")
ASIDE = (1, 6)  # rows of a batch of 9, in three groups
OTHERS = [0, 2, 3, 4, 5, 7, 8]


def batch(rows=range(9), aside=()):
    """Some of nine random samples; those `aside` lack one score."""
    rng = np.random.default_rng(0)
    grids = {name: rng.normal(size=(9, 5)).astype(np.float32) for name in ("old", "ref", "values")}
    scores, lengths = rng.random((9, 2)), rng.integers(1, 6, 9)
    for row in aside:
        scores[row, row % 2] = NAN
    of = {name: tuple(grid[row, : lengths[row]] for row in rows) for name, grid in grids.items()}
    queries = tuple(Query(({"role": "user", "content": "x"},), CORNERS[row // 3], (5, 6), row // 3, row) for row in rows)
    tokens = tuple(np.arange(lengths[row]) for row in rows)
    samples = Samples(queries, tokens, of["old"], np.array([row != 4 for row in rows]), 0)
    return Scored(samples, scores[list(rows)].astype(np.float32), of["old"], of["ref"], of["values"])


def made(config, **of):
    return make_experience(batch(**of), AlgorithmConfig(samples_per_query=3, **config), beta=0.1)


CONFIGS = [{}, {"combine": "mean"}, {"advantage": "rloo"}, {"advantage": "grpo"}, {"advantage": "grpo", "deviation": False},
           {"advantage": "rloo", "kl": {"place": "loss", "estimator": "k3"}}]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS)
def test_the_others_get_what_they_get_without_it(config):
    some, without = made(config, aside=ASIDE), made(config, rows=OTHERS)
    for name, columns in some.batch.per_token.items():
        for row, other in zip(OTHERS, without.batch.per_token[name], strict=True):
            assert columns[row].tolist() == pytest.approx(other.tolist(), rel=1e-6, abs=1e-7), (name, row)
        assert all(np.isfinite(column).all() for column in columns)
    for row in ASIDE:
        columns = {name: rows[row] for name, rows in some.batch.per_token.items()}
        assert not columns["advantages"].any()
        if "returns" in columns:
            assert columns["returns"].tolist() == columns["old_values"].tolist()
        if "ref_logprobs" in columns:
            assert columns["ref_logprobs"].tolist() == columns["old_logprobs"].tolist()
    scored = [key for key in without.stats if key.startswith(("reward/", "score/", "agreement/", "binding/", "value/"))]
    assert {key: some.stats[key] for key in scored} == pytest.approx({key: without.stats[key] for key in scored})
    assert some.stats["reward/unscored"] == 2 and "reward/unscored" not in without.stats


def slow(rewards, groups, by):
    found = []
    for reward, group in zip(rewards, groups, strict=True):
        known = [r for r, g in zip(rewards, groups, strict=True) if g == group and r == r]
        if reward != reward or len(known) < 2:
            found.append(0.0)
        elif by == "rloo":
            found.append(reward - (sum(known) - reward) / (len(known) - 1))
        else:
            mean = sum(known) / len(known)
            found.append((reward - mean) / ((sum((r - mean) ** 2 for r in known) / (len(known) - 1)) ** 0.5 + 1e-6))
    return found


@pytest.mark.parametrize("by", ["rloo", "grpo"])
def test_group_advantages_equal_a_slow_rival(by):
    rng = np.random.default_rng(1)
    for _ in range(40):
        groups = rng.permutation(np.repeat(np.arange(5), 3))
        rewards = np.where(rng.random(15) < 0.4, NAN, rng.random(15))  # so that some groups keep one reward, or none
        found = {"rloo": rloo, "grpo": grpo}[by](torch.tensor(rewards), torch.tensor(groups))
        assert found.tolist() == pytest.approx(slow(rewards.tolist(), groups.tolist(), by), abs=1e-12)
    with pytest.raises(RecipeError, match="group 7 has only one"):
        rloo(torch.tensor([0.5, NAN, NAN]), torch.tensor([1, 1, 7]))


def test_a_step_without_any_score_is_refused():
    with pytest.raises(DataError, match="none of the 9 samples of this step has its scores"):
        made({}, aside=range(9))
