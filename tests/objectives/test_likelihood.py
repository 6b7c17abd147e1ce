"""PLM, CLM and the mean over sequences."""
import math

import pytest
import torch

from ctrlrl.data.batches import MicroBatch, TokenOutputs
from ctrlrl.objectives.likelihood import likelihood, sequence_likelihood
from ctrlrl.tensors import token_logprobs


def leaf(*numbers):
    return torch.tensor(numbers, dtype=torch.float64).requires_grad_()


def test_by_hand(cut):
    rows = [(leaf(-1.0, -2.0, -3.0), {}), (leaf(-4.0), {})]
    loss, stats, grads = cut(likelihood, rows, 2)
    assert loss == 10 / 4 and stats == {"loss": 10 / 4, "entropy": 10 / 4}  # the fixture's entropies are the negated logprobs
    assert [grad.tolist() for grad in grads] == [[-0.25] * 3, [-0.25]]
    loss, stats, grads = cut(sequence_likelihood, rows, 2)
    assert loss == (2 + 4) / 2 and stats == {"loss": 3.0}
    assert grads[0].tolist() == pytest.approx([-1 / 6] * 3) and grads[1].tolist() == [-0.5]


def test_one_token(cut):
    for loss in (likelihood, sequence_likelihood):
        assert cut(loss, [(leaf(-3.0), {})], 1)[0] == 3


def test_a_uniform_model_loses_log_v(cut):
    rows = [(leaf(*[-math.log(7)] * n), {}) for n in (2, 5)]
    assert cut(likelihood, rows, 2)[0] == pytest.approx(math.log(7))
    assert cut(sequence_likelihood, rows, 2)[0] == pytest.approx(math.log(7))


def test_equal_lengths_make_the_two_one(cut, rows):
    some = rows([4, 4, 4])
    token, sequence = cut(likelihood, some, 3), cut(sequence_likelihood, some, 3)
    assert token[0] == pytest.approx(sequence[0], rel=1e-12)
    assert all(torch.allclose(a, b) for a, b in zip(token[2], sequence[2], strict=True))


def test_prompt_and_response_against_response_alone():
    # A uniform prompt model and a certain response model: PLM averages over both, CLM sees the response alone.
    logprobs = torch.tensor([[-2.0, -2.0, 0.0, 0.0]])
    prompt_and_response, response = torch.ones(1, 4, dtype=torch.bool), torch.tensor([[False, False, True, True]])
    outputs = TokenOutputs(logprobs, torch.zeros(1, 4))
    assert likelihood(outputs, MicroBatch(prompt_and_response, {}, 4, 1))[0].item() == 1
    assert likelihood(outputs, MicroBatch(response, {}, 2, 1))[0].item() == 0


def test_equals_cross_entropy_through_a_model():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (6, 5))
    targets = torch.randint(0, 5, (6,), generator=generator)
    mine, theirs = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    logprobs, entropy = token_logprobs(hidden, mine, targets, chunk=4)
    loss, _ = likelihood(TokenOutputs(logprobs.view(2, 3), entropy.view(2, 3)), MicroBatch(torch.ones(2, 3, dtype=torch.bool), {}, 6, 2))
    loss.backward()
    expected = torch.nn.functional.cross_entropy(hidden @ theirs.T, targets)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12) and torch.allclose(mine.grad, theirs.grad, atol=1e-14)


@pytest.mark.parametrize("loss", [likelihood, sequence_likelihood])
def test_the_cut_does_not_matter(loss, rows, same_however_cut):
    same_however_cut(loss, rows([3, 1, 4, 1, 5, 9, 2, 6]), [1, 3, 8])


@pytest.mark.parametrize("loss", [likelihood, sequence_likelihood])
@pytest.mark.parametrize("count", [0, 6])
@pytest.mark.parametrize("shape", [(2, 3), (2, 0), (0, 0)])
def test_all_masked_is_zero_and_still_differentiable(loss, shape, count):
    x = torch.full(shape, float("nan")).requires_grad_()
    share, stats = loss(TokenOutputs(x, x.detach()), MicroBatch(torch.zeros(shape, dtype=torch.bool), {}, count, count))
    share.backward()
    assert share.item() == 0 and not x.grad.count_nonzero() and all(value.item() == 0 for value in stats.values())


def test_an_unscored_sequence_counts_and_adds_nothing():
    mask = torch.tensor([[True, True], [False, False]])
    outputs = TokenOutputs(torch.full((2, 2), -3.0), torch.zeros(2, 2))
    assert sequence_likelihood(outputs, MicroBatch(mask, {}, 2, 2))[0].item() == 1.5


@pytest.mark.parametrize("loss", [likelihood, sequence_likelihood])
def test_gradcheck(loss):
    x = (-3 * torch.rand(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).requires_grad_()
    mask = torch.tensor([[True] * 4, [True, True, False, False], [False] * 4])
    batch = MicroBatch(mask, {}, 9, 4)
    assert torch.autograd.gradcheck(lambda x: loss(TokenOutputs(x, -x.detach()), batch)[0], (x,))
