"""The control reward, the KL-shaped token rewards, the KL estimators and the controller of β."""

import json
import math

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from ctrlrl.errors import DataError, RecipeError, RunError
from ctrlrl.ppo.reward import (
    EQUAL,
    AdaptiveKL,
    KLConfig,
    Weights,
    agreement,
    binding_fractions,
    control_reward,
    kl_k1,
    kl_k3,
    shaped_rewards,
    weighted_reward,
)

NAN = float("nan")
LEVELS = torch.tensor([[1.0, 0.2], [0.2, 1.0], [1.0, 1.0], [0.0, 1.0]])
SCORES = torch.tensor([[0.5, 0.3], [0.2, 0.25], [1.0, 1.0], [1.0, 0.5]])
AGREEMENT = [[0.5, 0.9], [1.0, 0.25], [1.0, 1.0], [0.0, 0.5]]


def test_agreement_by_hand():
    assert agreement(LEVELS, SCORES).tolist() == [pytest.approx(row) for row in AGREEMENT]
    assert agreement(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]])).tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("combine", "expected"), [("min", [0.5, 0.25, 1.0, 0.0]), ("mean", [0.7, 0.625, 1.0, 0.25]), ("product", [0.45, 0.25, 1.0, 0.0])]
)
def test_control_reward_by_hand(combine, expected):
    reward, binding = control_reward(LEVELS, SCORES, combine=combine)
    assert reward.tolist() == pytest.approx(expected)
    assert binding.tolist() == [0, 1, 0, 0]  # the third is a tie, which goes to the lowest index


def test_min_is_the_default_and_product_is_below_it_and_mean_above():
    scores = torch.rand(200, 2, generator=torch.Generator().manual_seed(0))
    levels = torch.rand(200, 2, generator=torch.Generator().manual_seed(1))
    rewards = {combine: control_reward(levels, scores, combine=combine)[0] for combine in ("min", "mean", "product")}
    assert torch.equal(control_reward(levels, scores)[0], rewards["min"])
    assert (rewards["product"] <= rewards["min"]).all() and (rewards["min"] <= rewards["mean"]).all()
    slow = [min(1 - abs(s - r) for s, r in zip(*pair, strict=True)) for pair in zip(levels.tolist(), scores.tolist(), strict=True)]
    assert rewards["min"].tolist() == pytest.approx(slow)


def test_binding_attribute_does_not_depend_on_the_other_rows():
    order = torch.tensor([2, 0, 3, 1])
    reward, binding = control_reward(LEVELS, SCORES)
    shuffled, shuffled_binding = control_reward(LEVELS[order], SCORES[order])
    assert torch.equal(shuffled, reward[order]) and torch.equal(shuffled_binding, binding[order])


@pytest.mark.parametrize("score", [1.5, -0.01, NAN, math.inf])
def test_scores_that_were_not_calibrated_are_refused(score):
    with pytest.raises(DataError, match=r"outside \[0, 1\].*calibrate"):
        control_reward(torch.tensor([[1.0, 1.0]]), torch.tensor([[0.5, score]]))


def test_unknown_combination_is_refused():
    with pytest.raises(RecipeError, match="'max'.*'min', 'mean' or 'product'"):
        control_reward(LEVELS, SCORES, combine="max")


def test_weighted_reward_by_hand():
    assert weighted_reward(SCORES, (0.5, 0.5)).tolist() == pytest.approx([0.4, 0.225, 1.0, 0.75])
    assert weighted_reward(SCORES.double(), (0.8, 0.2)).tolist() == pytest.approx([0.46, 0.21, 1.0, 0.9])
    assert weighted_reward(SCORES, (0.0, 1.0)).tolist() == SCORES[:, 1].tolist()
    with pytest.raises(DataError, match=r"outside \[0, 1\].*calibrate"):
        weighted_reward(torch.tensor([[0.5, NAN]]), (0.5, 0.5))


def test_weights_sum_to_one():
    given = TypeAdapter(Weights).validate_python
    assert EQUAL == {"helpful": 0.5, "harmless": 0.5} == given(EQUAL)
    assert given({"helpful": 0.9, "concise": 0.1}) == {"helpful": 0.9, "concise": 0.1}
    with pytest.raises(ValidationError, match="sum to 1.2, not to 1"):
        given({"helpful": 0.7, "harmless": 0.5})


def test_binding_fractions():
    assert binding_fractions(torch.tensor([0, 1, 0, 0])) == {"helpful": 0.75, "harmless": 0.25}
    assert binding_fractions(torch.tensor([1])) == {"helpful": 0.0, "harmless": 1.0}
    assert binding_fractions(torch.tensor([], dtype=torch.int64)) == {"helpful": 0.0, "harmless": 0.0}


def test_shaped_rewards_by_hand():
    # Three tokens, one token, none; everything beyond the end is NaN.
    logprobs = torch.tensor([[-1.0, -2.0, -0.5], [-3.0, NAN, NAN], [NAN, NAN, NAN]])
    reference = torch.tensor([[-1.5, -1.0, -0.5], [-2.0, NAN, NAN], [NAN, NAN, NAN]])
    mask = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    rewards = shaped_rewards(torch.tensor([0.75, 0.5, 9.0]), logprobs, reference, mask, beta=0.1)
    assert [row.tolist() for row in rewards] == [pytest.approx([-0.05, 0.1, 0.75]), pytest.approx([0.6, 0, 0]), [0, 0, 0]]


def test_the_reward_lands_once_and_the_rewards_sum_to_reward_minus_penalty():
    generator = torch.Generator().manual_seed(0)
    reward, lengths = torch.rand(8, generator=generator), torch.tensor([1, 2, 3, 4, 5, 6, 6, 1])
    logprobs, reference = -torch.rand(8, 6, generator=generator), -torch.rand(8, 6, generator=generator)
    mask = torch.arange(6) < lengths[:, None]
    alone = shaped_rewards(reward, logprobs, reference, mask, beta=0.0)
    for row, length, value in zip(alone, lengths.tolist(), reward.tolist(), strict=True):
        assert row.nonzero().flatten().tolist() == [length - 1] and row[length - 1].item() == value
    rewards = shaped_rewards(reward, logprobs, reference, mask, beta=0.3)
    for b in range(8):
        divergence = sum((logprobs[b, t] - reference[b, t]).item() for t in range(lengths[b]))
        assert rewards[b].sum().item() == pytest.approx(reward[b].item() - 0.3 * divergence, abs=1e-6)


def test_shaped_rewards_do_not_depend_on_padding():
    reward, logprobs, reference = torch.tensor([0.5]), torch.tensor([[-1.0, -2.0]]), torch.tensor([[-2.0, -2.5]])
    narrow = shaped_rewards(reward, logprobs, reference, torch.tensor([[True, True]]), beta=0.2)
    # Padding on the left and on the right.
    columns = [(logprobs, 7.0), (reference, -7.0), (torch.tensor([[True, True]]), False), (narrow, 0.0)]
    *padded, expected = [torch.nn.functional.pad(column, (1, 2), value=fill) for column, fill in columns]
    assert torch.equal(shaped_rewards(reward, *padded, beta=0.2), expected)


def test_shaped_rewards_of_no_tokens():
    empty = torch.zeros(2, 0)
    assert shaped_rewards(torch.ones(2), empty, empty, empty.bool(), beta=0.1).shape == (2, 0)


def test_kl_estimators_by_hand():
    ours, reference = torch.tensor([math.log(0.5), math.log(0.25), -1.0]), torch.tensor([math.log(0.25), math.log(0.5), -1.0])
    assert kl_k1(ours, reference).tolist() == pytest.approx([math.log(2), -math.log(2), 0])
    # r - 1 - log r with r = 1/2 and 2.
    assert kl_k3(ours, reference).tolist() == pytest.approx([math.log(2) - 0.5, 1 - math.log(2), 0], rel=1e-6)


def test_kl_k3_of_nearly_equal_policies_keeps_its_digits():
    ours, reference = torch.tensor([-1.0], dtype=torch.float64), torch.tensor([-1.0 + 1e-6], dtype=torch.float64)
    assert kl_k3(ours, reference).item() == pytest.approx(5e-13, rel=1e-3)  # x²/2


def test_kl_estimators_agree_with_the_exact_divergence():
    ours, reference = torch.tensor([0.5, 0.2, 0.2, 0.1]).log(), torch.tensor([0.25, 0.25, 0.3, 0.2]).log()
    exact = sum(p * math.log(p / q) for p, q in [(0.5, 0.25), (0.2, 0.25), (0.2, 0.3), (0.1, 0.2)])
    draws = torch.multinomial(ours.exp(), 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    for estimator in (kl_k1, kl_k3):
        estimates = estimator(ours[draws], reference[draws]).double()
        standard_error = estimates.std().item() / len(draws) ** 0.5
        assert standard_error < 0.01 * exact and abs(estimates.mean().item() - exact) < 4 * standard_error
    # Exactly unbiased: the expectation over the categorical itself. The reversed divergence is another number.
    for estimator in (kl_k1, kl_k3):
        assert (ours.exp() * estimator(ours, reference)).sum().item() == pytest.approx(exact, rel=1e-5)
        assert (reference.exp() * estimator(reference, ours)).sum().item() != pytest.approx(exact, rel=1e-2)
    assert kl_k3(ours[draws], reference[draws]).min() >= 0
    assert kl_k3(ours[draws], reference[draws]).var() < kl_k1(ours[draws], reference[draws]).var()


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (6.0, 0.05),  # on target
        (6.6, 0.05 * 1.01),  # e = 0.1
        (5.4, 0.05 * 0.99),
        (60.0, 0.05 * 1.02),  # e is cut at 0.2
        (0.0, 0.05 * 0.98),
        (-3.0, 0.05 * 0.98),  # the k1 estimate can be negative
    ],
)
def test_controller_moves_beta_towards_the_target(measured, expected):
    assert AdaptiveKL(0.05).updated(measured, KLConfig(target=6.0)).beta == pytest.approx(expected, rel=1e-12)


def test_controller_gain_scales_the_step():
    assert AdaptiveKL(0.05).updated(6.6, KLConfig(target=6.0, gain=0.5)).beta == pytest.approx(0.05 * 1.05, rel=1e-12)


def test_target_zero_keeps_beta():
    state = AdaptiveKL(0.05)
    assert state.updated(100.0, KLConfig()) == state


@pytest.mark.parametrize("target", [0.0, 6.0])
@pytest.mark.parametrize("measured", [NAN, math.inf, -math.inf])
def test_a_divergence_that_is_not_finite_is_an_error(measured, target):
    with pytest.raises(RunError, match="diverged"):
        AdaptiveKL(0.05).updated(measured, KLConfig(target=target))


def test_controller_state_survives_a_checkpoint():
    config = KLConfig(target=6.0)
    state = AdaptiveKL(0.05)
    for measured in (3.0, 7.0, 6.1):
        state = state.updated(measured, config)
    restored = AdaptiveKL.from_dict(json.loads(json.dumps(state.to_dict())))
    assert restored == state and restored.updated(6.3, config) == state.updated(6.3, config)
    with pytest.raises(AttributeError):
        state.beta = 1.0


OTHER_WRONG = [{"coefficient": 1}, {"place": "loss"}, {"place": "loss", "estimator": "k1"}, {"estimator": "k2"}]


def test_config_defaults_and_limits():
    rest = {"place": "reward", "estimator": "k1"}
    assert KLConfig().model_dump() == {"beta": 0.05, "target": 0.0, "gain": 0.1, **rest}
    assert KLConfig(beta=0, target=0, gain=0).model_dump() == {"beta": 0, "target": 0, "gain": 0, **rest}
    assert KLConfig(place="loss", estimator="k3").place == "loss"
    for wrong in [{name: value} for name in ("beta", "target", "gain") for value in (-0.1, math.inf, NAN)] + OTHER_WRONG:
        with pytest.raises(ValidationError):
            KLConfig(**wrong)
