"""DPO and Bradley-Terry against hand-worked numbers and their limits."""
import math

import pytest
import torch

from ctrlrl.data.batches import MicroBatch, TokenOutputs
from ctrlrl.objectives.preference import bradley_terry, dpo


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def leaf(*numbers):
    return torch.tensor(numbers, dtype=torch.float64).requires_grad_()


def with_reference(*pairs):
    return [(leaf(*numbers), {"ref_logprob": reference}) for numbers, reference in pairs]


def on_scores(centre=0.0):
    """Bradley-Terry on rows whose single logprob plays the score."""
    return lambda outputs, batch: bradley_terry(outputs.logprobs_BT[:, 0], batch, centre=centre)


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_dpo_by_hand(cut, beta):
    # Chosen: -3 - -4 = 1 and -1 - -1 = 0; rejected: -2 - -1 = -1 and -5 - -8 = 3. Differences 2 and -3.
    rows = with_reference(((-1.0, -2.0), -4.0), ((-2.0,), -1.0), ((-1.0,), -1.0), ((-2.0, -2.0, -1.0), -8.0))
    loss, stats, grads = cut(lambda o, b: dpo(o, b, beta=beta), rows, 4)
    assert loss == pytest.approx((-math.log(sigmoid(2 * beta)) - math.log(sigmoid(-3 * beta))) / 2)
    expected = {"loss": loss, "accuracy": 0.5, "margin": -0.5 * beta, "chosen_reward": 0.5 * beta, "rejected_reward": beta}
    expected["chosen_nll"] = (1.5 + 1.0) / 2
    assert stats == pytest.approx(expected)
    # -β σ(-margin) / pairs on every chosen token, the opposite on every rejected one.
    push = [beta * sigmoid(-2 * beta) / 2, beta * sigmoid(3 * beta) / 2]
    assert [g.tolist() for g in grads] == [pytest.approx(x) for x in ([-push[0]] * 2, [push[0]], [-push[1]], [push[1]] * 3)]


def test_dpo_with_the_likelihood_of_the_better_answer(cut):
    rows = with_reference(((-1.0, -2.0), -3.0), ((-2.0,), -2.0), ((-1.0,), -1.0), ((-2.0, -2.0), -4.0))
    loss, _, grads = cut(lambda o, b: dpo(o, b, beta=0.2, nll_weight=0.5), rows, 4)
    assert loss == pytest.approx(math.log(2) + 0.5 * (1.5 + 1.0) / 2)
    push, pull = 0.2 / 2 / 2, 0.5 / 2  # of ln σ, of the likelihood, a pair
    expected = ([-push - pull / 2] * 2, [push], [-push - pull], [push] * 2)
    assert [g.tolist() for g in grads] == [pytest.approx(x) for x in expected]


def test_dpo_at_the_reference_is_ln_2(cut, rows):
    some = rows([3, 5, 2, 4])
    some = [(logprobs, {"ref_logprob": logprobs.sum().item()}) for logprobs, _ in some]
    loss, stats, grads = cut(dpo, some, 4)
    assert loss == pytest.approx(math.log(2), rel=1e-12)
    assert stats.pop("chosen_nll") > 0
    assert stats == pytest.approx({"loss": loss, "accuracy": 0, "margin": 0, "chosen_reward": 0, "rejected_reward": 0}, abs=1e-12)
    # The default β = 0.1: -(β/2) / pairs on chosen tokens.
    assert [grad[0].item() for grad in grads] == pytest.approx([-0.025, 0.025, -0.025, 0.025])


def test_a_swapped_pair_turns_the_margin_exactly(cut, rows):
    # As under the opposite system prompt: -log σ(-m) = -log σ(m) + m.
    some = rows([3, 5], ref_logprob=[-4.0, -6.0])
    loss, stats, grads = cut(dpo, some, 2)
    swapped, swapped_stats, swapped_grads = cut(dpo, some[::-1], 2)
    assert swapped == pytest.approx(loss + stats["margin"], rel=1e-12) and swapped_stats["margin"] == -stats["margin"]
    assert swapped_stats["chosen_reward"] == stats["rejected_reward"] and swapped_stats["rejected_reward"] == stats["chosen_reward"]
    assert stats["accuracy"] + swapped_stats["accuracy"] == 1
    # Both rows together (CST trains on both) pull towards no preference: σ(m) - σ(-m) = 2 σ(m) - 1.
    pull = 0.1 * (2 * sigmoid(stats["margin"]) - 1)
    assert (grads[0] + swapped_grads[1]).tolist() == pytest.approx([pull] * 3)


def test_dpo_beta_zero_is_ln_2(cut, rows):
    loss, _, grads = cut(lambda o, b: dpo(o, b, beta=0.0), rows([3, 5], ref_logprob=[-9.0, -1.0]), 2)
    assert loss == pytest.approx(math.log(2)) and not any(grad.count_nonzero() for grad in grads)


def test_extreme_margins_stay_finite(cut):
    rows = with_reference(((-9000.0,), 0.0), ((0.0,), -9000.0))
    loss, stats, grads = cut(dpo, rows, 2)
    assert loss == pytest.approx(1800) and stats["margin"] == pytest.approx(-1800) and grads[0].item() == pytest.approx(-0.1)


@pytest.mark.parametrize("centre", [0.0, 0.01, 0.5])
def test_bradley_terry_by_hand(cut, centre):
    rows = [(leaf(score), {}) for score in (2.0, 0.5, -1.0, 1.0)]
    loss, stats, grads = cut(on_scores(centre), rows, 4)
    # Margins 1.5 and -2; sums 2.5 and 0.
    assert loss == pytest.approx((-math.log(sigmoid(1.5)) - math.log(sigmoid(-2)) + centre * 6.25) / 2)
    assert stats == pytest.approx({"loss": loss, "accuracy": 0.5, "margin": -0.25})
    expected = [-sigmoid(-1.5) / 2 + 2.5 * centre, sigmoid(-1.5) / 2 + 2.5 * centre, -sigmoid(2) / 2, sigmoid(2) / 2]
    assert [grad.item() for grad in grads] == pytest.approx(expected)


def test_bradley_terry_does_not_see_an_offset_and_centring_removes_it(cut):
    def loss(shift, centre):
        return cut(on_scores(centre), [(leaf(score + shift), {}) for score in (2.0, 0.5)], 2)[0]

    assert loss(3.0, 0.0) == pytest.approx(loss(0.0, 0.0))
    # With 2.0 and 0.5 the sum is 0 at a shift of -1.25.
    assert loss(-1.25, 0.1) < min(loss(-1.35, 0.1), loss(-1.15, 0.1))


def test_equal_scores_lose_ln_2_and_are_no_success(cut):
    loss, stats, _ = cut(on_scores(0.25), [(leaf(3.0), {}), (leaf(3.0), {})], 2)
    assert loss == pytest.approx(math.log(2) + 0.25 * 36) and stats["accuracy"] == stats["margin"] == 0


def test_centring_is_off_by_default():
    scores, batch = torch.tensor([3.0, 1.0]), MicroBatch(torch.ones(2, 1, dtype=torch.bool), {}, 2, 2)
    assert bradley_terry(scores, batch)[0].item() == pytest.approx(-math.log(sigmoid(2.0)))


def test_the_cut_does_not_matter(rows, same_however_cut):
    some = rows([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3], ref_logprob=[-4.0, -2.0, -5.0, -1.5] * 4)
    same_however_cut(dpo, some, [2, 6, 16], group=2)
    same_however_cut(on_scores(0.1), some, [2, 6, 16], group=2)


@pytest.mark.parametrize("centre", [0.0, 0.3])
def test_gradcheck(centre):
    x = torch.tensor([[-1.0, -2.0], [-0.5, -3.0], [-2.0, -2.5], [-1.5, 0.0]], dtype=torch.float64).requires_grad_()
    mask = torch.tensor([[True, True], [True, True], [True, False], [True, False]])
    batch = MicroBatch(mask, {"ref_logprob": torch.tensor([-2.0, -4.0, -1.0, -3.0], dtype=torch.float64)}, 6, 4)
    assert torch.autograd.gradcheck(lambda x: dpo(TokenOutputs(x, -x.detach()), batch, beta=0.7)[0], (x,))
    assert torch.autograd.gradcheck(lambda x: bradley_terry(x[:, 0], batch, centre=centre)[0], (x,))


@pytest.mark.parametrize("sequences", [0, 4])
@pytest.mark.parametrize("shape", [(2, 3), (2, 0), (0, 0)])
def test_all_masked_is_zero_and_still_differentiable(shape, sequences):
    batch = MicroBatch(torch.zeros(shape, dtype=torch.bool), {"ref_logprob": torch.zeros(shape[0])}, 0, sequences)
    x, scores = torch.full(shape, float("nan")).requires_grad_(), torch.ones(shape[0]).requires_grad_()
    for leaf_tensor, (share, stats) in ((x, dpo(TokenOutputs(x, x.detach()), batch)), (scores, bradley_terry(scores, batch, centre=1.0))):
        share.backward()
        assert share.item() == 0 and not leaf_tensor.grad.count_nonzero() and all(value.item() == 0 for value in stats.values())


def test_a_pair_with_one_empty_response_is_still_a_pair():
    mask = torch.tensor([[True], [False]])
    batch = MicroBatch(mask, {"ref_logprob": torch.tensor([-1.0, 0.0])}, 1, 2)
    loss, stats = dpo(TokenOutputs(torch.tensor([[-3.0], [-7.0]]), torch.zeros(2, 1)), batch, beta=1.0)
    assert loss.item() == pytest.approx(-math.log(sigmoid(-2.0))) and stats["margin"] == -2


def test_rows_that_are_not_pairs_are_a_bug():
    batch = MicroBatch(torch.ones(3, 1, dtype=torch.bool), {"ref_logprob": torch.zeros(3)}, 3, 3)
    with pytest.raises(AssertionError, match="group = 2"):
        dpo(TokenOutputs(torch.zeros(3, 1), torch.zeros(3, 1)), batch)
