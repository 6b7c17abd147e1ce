"""ExMATE against hand-worked numbers, its limit at weight 0, and any cut of true and fake rows."""
import math

import numpy as np
import pytest
import torch

from ctrlrl.data.batches import MicroBatch, TokenOutputs
from ctrlrl.objectives.exmate import exmate, exmate_columns
from ctrlrl.objectives.likelihood import sequence_likelihood

TREATED = [1, 0, 1, 0, 0, 1, 1, 0]


def columns(treated):
    return {name: column.tolist() for name, column in exmate_columns(np.array(treated)).items()}


def weighted(weight):
    return lambda outputs, batch: exmate(outputs, batch, weight=weight)


def leaf(*numbers):
    return torch.tensor(numbers, dtype=torch.float64).requires_grad_()


def test_columns():
    found = exmate_columns(np.array([1, 0, 0, 1, 0]))
    assert found["treated"].tolist() == [1, 0, 0, 1, 0]
    assert found["share"].tolist() == pytest.approx([1 / 2, 1 / 3, 1 / 3, 1 / 2, 1 / 3])
    assert exmate_columns(np.ones(4))["share"].tolist() == [0.25] * 4


@pytest.mark.parametrize("weight", [0.0, 0.05, 1.0, 2.0])
def test_by_hand(cut, weight):
    # ℓ: treated -2 and -4; untreated ln(1/2) and ln(1/4).
    named = columns([1, 0, 1, 0])
    numbers = [leaf(-1.0, -3.0), leaf(-math.log(2), -math.log(2)), leaf(-4.0), leaf(-math.log(8), -math.log(2))]
    rows = [(row, {name: named[name][i] for name in named}) for i, row in enumerate(numbers)]
    loss, stats, grads = cut(weighted(weight), rows, 4)
    assert loss == pytest.approx(3 + weight * (1 / 2 + 1 / 4) / 2)
    assert stats == pytest.approx({"loss": loss, "treated_l": -3, "untreated_l": -1.5 * math.log(2), "gap": -3 + 1.5 * math.log(2)})
    # -1/2 shared by the tokens of a treated row; exp ℓ times it, and positive, for an untreated one.
    assert grads[0].tolist() == pytest.approx([-0.25] * 2) and grads[2].tolist() == pytest.approx([-0.5])
    assert grads[1].tolist() == pytest.approx([weight * 0.5 * 0.5 / 2] * 2)
    assert grads[3].tolist() == pytest.approx([weight * 0.5 * 0.25 / 2] * 2)


def test_the_default_weight_is_one(cut, rows):
    some = rows([2, 3, 1, 4, 5, 9, 2, 6], **columns(TREATED))
    at_default, at_one, at_half = (cut(loss, some, 8)[0] for loss in (exmate, weighted(1.0), weighted(0.5)))
    assert at_default == at_one != at_half


def test_weight_zero_is_the_sequence_likelihood_of_the_treated_rows(cut, rows):
    some = rows([2, 3, 1, 4, 5, 9, 2, 6], **columns(TREATED))
    loss, stats, grads = cut(weighted(0.0), some, 8)
    treated = [row for row in some if row[1]["treated"]]
    expected, expected_stats, expected_grads = cut(sequence_likelihood, treated, 4)
    assert loss == pytest.approx(expected, rel=1e-14) and stats["loss"] == pytest.approx(expected_stats["loss"], rel=1e-14)
    assert stats["treated_l"] == pytest.approx(-expected, rel=1e-14)
    found = [grad for grad, row in zip(grads, some, strict=True) if row[1]["treated"]]
    assert all(torch.equal(a, b) for a, b in zip(found, expected_grads, strict=True))
    assert not any(grad.count_nonzero() for grad, row in zip(grads, some, strict=True) if not row[1]["treated"])


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_batch_of_treated_rows_alone_is_the_sequence_likelihood(cut, rows, weight):
    some = rows([2, 3, 1, 4], **columns([1, 1, 1, 1]))
    loss, stats, grads = cut(weighted(weight), some, 4)
    expected, _, expected_grads = cut(sequence_likelihood, some, 4)
    assert loss == pytest.approx(expected, rel=1e-14) and stats["untreated_l"] == 0
    assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))


@pytest.mark.parametrize("treated", [TREATED, [1, 0, 0, 0, 1, 0, 0, 0]])
def test_the_cut_does_not_matter(rows, same_however_cut, treated):
    same_however_cut(exmate, rows([3, 1, 4, 1, 5, 9, 2, 6], **columns(treated)), [1, 3, 8])


def test_long_responses_are_pushed_away_too(cut):
    # The sum of 500 logprobs of -2 is -1000, whose exponential is 0; the mean's is e^-2.
    named = columns([0])
    loss, _, (grad,) = cut(exmate, [(leaf(*[-2.0] * 500), {name: named[name][0] for name in named})], 1)
    assert loss == pytest.approx(math.exp(-2)) and grad.sum().item() == pytest.approx(math.exp(-2))


def test_gradcheck(rows):
    some = rows([3, 3, 3, 3], **columns([1, 0, 0, 1]))
    mask = torch.tensor([[True] * 3, [True, True, False], [True] * 3, [True, False, False]])
    named = {name: torch.tensor([row[1][name] for row in some], dtype=torch.float64) for name in ("treated", "share")}
    batch = MicroBatch(mask, named, 9, 4)
    x = torch.stack([row[0] for row in some]).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: exmate(TokenOutputs(x, -x.detach()), batch, weight=0.7)[0], (x,))


@pytest.mark.parametrize("shape", [(2, 3), (2, 0), (0, 0)])
def test_all_masked_is_zero_and_still_differentiable(shape):
    x = torch.full(shape, float("nan")).requires_grad_()
    named = {"treated": torch.tensor([1.0, 0.0])[: shape[0]], "share": torch.ones(2)[: shape[0]]}
    share, stats = exmate(TokenOutputs(x, x.detach()), MicroBatch(torch.zeros(shape, dtype=torch.bool), named, 0, 0))
    share.backward()
    assert share.item() == 0 and not x.grad.count_nonzero() and all(value.item() == 0 for value in stats.values())


def test_columns_in_single_precision_and_float64_shares_mix():
    x = torch.full((2, 2), -1.0).requires_grad_()
    named = {name: torch.from_numpy(column) for name, column in exmate_columns(np.array([1, 0])).items()}
    loss, stats = exmate(TokenOutputs(x, x.detach()), MicroBatch(torch.ones(2, 2, dtype=torch.bool), named, 4, 2))
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(1 + math.exp(-1)) and stats["gap"].item() == 0
