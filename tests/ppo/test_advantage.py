"""GAE against a slow double loop and its limits; leave-one-out and the group's mean against loops."""
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrlrl.errors import RecipeError
from ctrlrl.ppo.advantage import gae, grpo, rloo

NAN = float("nan")


def ragged(lengths, width=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths) if width is None else width)
    rewards, values = (torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return rewards, values, torch.arange(shape[1]) < torch.tensor(lengths)[:, None]


def double_loop(rewards, values, gamma, lam):
    """Σ_k (γ λ)^k δ_{t+k} for one response, every sum written out."""
    length = len(rewards)
    delta = [rewards[t] + (gamma * values[t + 1] if t + 1 < length else 0.0) - values[t] for t in range(length)]
    return [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, length)) for t in range(length)]


def test_five_tokens_by_hand():
    # The reward 1 arrives on the last token. γ = 1, λ = 0.5; δ = 0.2, -0.3, 0.4, 0.1, 0.5 from the values below.
    values = torch.tensor([[0.1, 0.3, 0.0, 0.4, 0.5]], dtype=torch.float64)
    rewards = torch.tensor([[0.0, 0.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    advantages, returns = gae(rewards, values, torch.ones(1, 5, dtype=torch.bool), gamma=1.0, lam=0.5)
    # 0.5; 0.1 + 0.25 = 0.35; 0.4 + 0.175 = 0.575; -0.3 + 0.2875 = -0.0125; 0.2 - 0.00625 = 0.19375.
    assert advantages[0].tolist() == pytest.approx([0.19375, -0.0125, 0.575, 0.35, 0.5], rel=1e-12)
    assert returns[0].tolist() == pytest.approx([0.29375, 0.2875, 0.575, 0.75, 1.0], rel=1e-12)


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("lam", [1.0, 0.95, 0.5, 0.0])
def test_equals_a_double_loop(gamma, lam):
    lengths = [1, 5, 3, 7, 0]
    rewards, values, mask = ragged(lengths)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for b, length in enumerate(lengths):
        slow = double_loop(rewards[b, :length].tolist(), values[b, :length].tolist(), gamma, lam)
        assert advantages[b].tolist() == pytest.approx(slow + [0.0] * (7 - length), rel=1e-12, abs=1e-15)
        assert returns[b, :length].tolist() == pytest.approx([a + v for a, v in zip(slow, values[b].tolist(), strict=False)], rel=1e-12)
        assert returns[b, length:].count_nonzero() == 0


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_lambda_one_gives_monte_carlo_returns_whatever_the_values(gamma):
    rewards, values, mask = ragged([4, 6])
    _, returns = gae(rewards, values, mask, gamma=gamma, lam=1.0)
    for b, length in enumerate([4, 6]):
        slow = [sum(gamma ** (k - t) * rewards[b, k].item() for k in range(t, length)) for t in range(length)]
        assert returns[b, :length].tolist() == pytest.approx(slow, rel=1e-12)


def test_lambda_zero_gives_one_step_differences():
    rewards, values, mask = ragged([3])
    advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=0.0)
    r, v = rewards[0].tolist(), values[0].tolist()
    assert advantages[0].tolist() == pytest.approx([r[0] + 0.9 * v[1] - v[0], r[1] + 0.9 * v[2] - v[1], r[2] - v[2]], rel=1e-12)
    assert returns[0].tolist() == pytest.approx([r[0] + 0.9 * v[1], r[1] + 0.9 * v[2], r[2]], rel=1e-12)


@pytest.mark.parametrize("garbage", [NAN, float("inf"), 1e9])
@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_what_lies_after_the_end_has_no_effect(garbage, lam):
    rewards, values, mask = ragged([2, 4, 3])
    expected = gae(rewards, values, mask, gamma=0.99, lam=lam)
    wide = [torch.full((3, 6), garbage, dtype=torch.float64) for _ in range(2)]
    for target, source in zip(wide, (rewards, values), strict=True):
        target[:, :4][mask] = source[mask]
    found = gae(*wide, torch.nn.functional.pad(mask, (0, 2)), gamma=0.99, lam=lam)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, torch.nn.functional.pad(b, (0, 2)))


def test_rows_are_independent():
    rewards, values, mask = ragged([2, 4, 3])
    order = torch.tensor([2, 0, 1])
    whole = gae(rewards, values, mask, gamma=0.9, lam=0.8)
    shuffled = gae(rewards[order], values[order], mask[order], gamma=0.9, lam=0.8)
    assert all(torch.equal(a[order], b) for a, b in zip(whole, shuffled, strict=True))


@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0)])
def test_all_masked_is_zero(shape):
    nothing = torch.full(shape, NAN)
    for found in gae(nothing, nothing, torch.zeros(shape, dtype=torch.bool), gamma=1.0, lam=0.95):
        assert torch.equal(found, torch.zeros(shape))


@pytest.mark.parametrize("mask", [[False, True, True], [True, False, True], [False, False, True]])
def test_a_mask_that_is_not_a_prefix_is_a_bug(mask):
    rewards, values, _ = ragged([3])
    with pytest.raises(AssertionError, match="prefix"):
        gae(rewards, values, torch.tensor([mask]), gamma=1.0, lam=1.0)


def test_inputs_are_left_alone():
    rewards, values, mask = ragged([2, 3])
    before = rewards.clone(), values.clone()
    gae(rewards, values, mask, gamma=0.9, lam=0.9)
    assert torch.equal(rewards, before[0]) and torch.equal(values, before[1])


def test_leave_one_out_by_hand():
    # Group 7: rewards 1, 2, 6; group 3: rewards 5, 1.
    advantages = rloo(torch.tensor([1.0, 5.0, 2.0, 6.0, 1.0]), torch.tensor([7, 3, 7, 7, 3]))
    assert advantages.tolist() == pytest.approx([1 - 4, 5 - 1, 2 - 3.5, 6 - 1.5, 1 - 5])


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.lists(st.tuples(st.integers(-3, 3), st.floats(-10, 10)), min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_leave_one_out_equals_a_loop_in_any_order(rows, random):
    rows = rows + rows[::-1]  # no group of one
    random.shuffle(rows)
    advantages = rloo(torch.tensor([r for _, r in rows], dtype=torch.float64), torch.tensor([g for g, _ in rows]))
    for i, (group, reward) in enumerate(rows):
        others = [r for j, (g, r) in enumerate(rows) if g == group and j != i]
        assert advantages[i].item() == pytest.approx(reward - sum(others) / len(others), abs=1e-9)
    for group in {g for g, _ in rows}:
        assert sum(a for a, (g, _) in zip(advantages.tolist(), rows, strict=True) if g == group) == pytest.approx(0, abs=1e-9)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-10, 10)), min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_group_relative_equals_a_loop_in_any_order(rows, random):
    rows = [*rows, *((group, reward + 1) for group, reward in rows)]  # no group of one, none of equal rewards
    random.shuffle(rows)
    rewards, groups = torch.tensor([float(r) for _, r in rows], dtype=torch.float64), torch.tensor([g for g, _ in rows])
    scaled, centred, apart = grpo(rewards, groups), grpo(rewards, groups, deviation=False), rloo(rewards, groups)
    for i, (group, reward) in enumerate(rows):
        of_group = [float(r) for g, r in rows if g == group]
        difference = reward - statistics.mean(of_group)
        assert centred[i].item() == pytest.approx(difference, abs=1e-9)
        assert scaled[i].item() == pytest.approx(difference / (statistics.stdev(of_group) + 1e-6), abs=1e-9)
        assert centred[i].item() == pytest.approx(apart[i].item() * (len(of_group) - 1) / len(of_group), abs=1e-9)


def test_equal_rewards_have_no_advantage():
    for advantage in (rloo, grpo):
        assert advantage(torch.full((4,), 0.25), torch.tensor([0, 0, 1, 1])).tolist() == [0, 0, 0, 0]


def test_no_samples_give_no_advantages():
    assert rloo(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)


def test_a_group_of_one_names_itself_and_the_remedy():
    with pytest.raises(RecipeError, match="group 9 has only one.*samples_per_query to 2 or more"):
        rloo(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4, 4, 9]))
    with pytest.raises(RecipeError, match="'grpo' compares samples.*group 9 has only one"):
        grpo(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4, 4, 9]))
