"""Token logprobs against hand-worked literals, loops and gradcheck; masked means, whitening and padding."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrlrl.tensors import masked_mean, masked_row_mean, masked_sum, masked_variance, pad_rows, token_logprobs, whiten

NAN = float("nan")


def problem(rows=7, hidden=4, vocabulary=5, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = (rows, hidden), (vocabulary, hidden), (vocabulary,)
    states, weight, bias = (torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes)
    return states, weight, torch.randint(0, vocabulary, (rows,), generator=generator), bias


def loop(hidden, weight, targets, bias, temperature):
    """Logprob and entropy of every row with scalars and math.log alone."""
    logprobs, entropies = [], []
    for h, y in zip(hidden.tolist(), targets.tolist(), strict=True):
        logits = [(sum(a * b for a, b in zip(row, h, strict=True)) + c) / temperature for row, c in zip(weight.tolist(), bias, strict=True)]
        total = sum(math.exp(z) for z in logits)
        probabilities = [math.exp(z) / total for z in logits]
        logprobs.append(math.log(probabilities[y]))
        entropies.append(-sum(p * math.log(p) for p in probabilities))
    return logprobs, entropies


def test_a_distribution_worked_by_hand():
    # Logits 0, ln 2, ln 3: probabilities 1/6, 1/3, 1/2.
    hidden, weight = torch.ones(3, 1), torch.tensor([[0.0], [math.log(2)], [math.log(3)]])
    logprobs, entropy = token_logprobs(hidden, weight, torch.tensor([0, 1, 2]))
    assert logprobs.tolist() == pytest.approx([-math.log(6), -math.log(3), -math.log(2)], rel=1e-6)
    assert entropy.tolist() == pytest.approx([math.log(6) / 6 + math.log(3) / 3 + math.log(2) / 2] * 3, rel=1e-6)
    # Temperature 2 takes the square root of the odds; a bias of -ln 2 halves them.
    logprobs, _ = token_logprobs(hidden, weight, torch.tensor([0, 1, 2]), temperature=2.0)
    assert logprobs.exp().tolist() == pytest.approx([w / (1 + 2**0.5 + 3**0.5) for w in (1, 2**0.5, 3**0.5)], rel=1e-6)
    logprobs, _ = token_logprobs(hidden, weight, torch.tensor([0, 1, 2]), bias_V=torch.tensor([0.0, -math.log(2), 0.0]))
    assert logprobs.exp().tolist() == pytest.approx([1 / 5, 1 / 5, 3 / 5], rel=1e-6)


def test_golden_five_tokens():
    # A bigram model: the state after token a is its one-hot, so that the logits of the next token are column a of the weights.
    table = {0: [0.1, 0.2, 0.3, 0.4], 1: [0.25, 0.25, 0.4, 0.1], 2: [0.7, 0.1, 0.1, 0.1], 3: [0.05, 0.05, 0.1, 0.8]}
    weight = torch.tensor([[math.log(table[before][after]) for before in range(4)] for after in range(4)])
    tokens = torch.tensor([0, 1, 2, 0, 3])
    states = torch.nn.functional.one_hot(tokens, 4).float()
    logprobs, _ = token_logprobs(states[:-1], weight, tokens[1:])
    assert logprobs.exp().tolist() == pytest.approx([0.2, 0.4, 0.7, 0.4], rel=1e-6)


@pytest.mark.parametrize("chunk", [1, 3, 7, 1024])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_logprobs_and_entropy_equal_a_loop(chunk, temperature):
    hidden, weight, targets, bias = problem()
    logprobs, entropy = token_logprobs(hidden, weight, targets, temperature=temperature, bias_V=bias, chunk=chunk)
    expected, expected_entropy = loop(hidden, weight, targets, bias.tolist(), temperature)
    assert logprobs.tolist() == pytest.approx(expected, rel=1e-12)
    assert entropy.tolist() == pytest.approx(expected_entropy, rel=1e-12)
    assert logprobs.requires_grad and not entropy.requires_grad


@pytest.mark.parametrize("chunk", [1, 3, 1024])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("frozen", [(), ("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ("weight", "bias")])
def test_gradients(chunk, temperature, frozen):
    hidden, weight, targets, bias = problem()
    for name, tensor in {"hidden": hidden, "weight": weight, "bias": bias}.items():
        tensor.requires_grad_(name not in frozen)
    assert torch.autograd.gradcheck(
        lambda h, w, b: token_logprobs(h, w, targets, temperature=temperature, bias_V=b, chunk=chunk), (hidden, weight, bias)
    )


def test_gradient_without_a_bias():
    hidden, weight, targets, _ = problem()
    assert torch.autograd.gradcheck(lambda h, w: token_logprobs(h, w, targets, chunk=2), (hidden, weight))


def test_no_rows_give_empty_outputs_and_zero_gradients():
    hidden, weight, targets, bias = problem(rows=0)
    logprobs, entropy = token_logprobs(hidden, weight, targets, bias_V=bias)
    assert logprobs.shape == entropy.shape == (0,)
    logprobs.sum().backward()
    assert weight.grad.count_nonzero() == bias.grad.count_nonzero() == 0 and hidden.grad.shape == (0, 4)


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float64])
def test_dtypes(given):
    returned = torch.float64 if given == torch.float64 else torch.float32
    hidden, weight, targets, bias = problem(dtype=given)
    logprobs, entropy = token_logprobs(hidden, weight, targets, bias_V=bias)
    assert logprobs.dtype == entropy.dtype == returned
    logprobs.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == bias.grad.dtype == given


def test_gradients_of_weight_and_bias_are_summed_in_float32():
    # Each row adds 0.5 to the target's gradient and takes 0.5 from the other's; a bfloat16 sum would stall at 128.
    hidden = torch.ones(1024, 1, dtype=torch.bfloat16)
    weight, bias = torch.zeros(2, 1, dtype=torch.bfloat16).requires_grad_(), torch.zeros(2, dtype=torch.bfloat16).requires_grad_()
    logprobs, _ = token_logprobs(hidden, weight, torch.zeros(1024, dtype=torch.int64), bias_V=bias, chunk=1)
    logprobs.sum().backward()
    assert weight.grad.flatten().tolist() == bias.grad.tolist() == [512, -512]


def test_large_logits_stay_exact():
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[3000.0], [3000.0], [0.0]])
    logprobs, entropy = token_logprobs(hidden, weight, torch.tensor([1]))
    assert logprobs.item() == pytest.approx(-math.log(2), rel=1e-3) and entropy.item() == pytest.approx(math.log(2), rel=1e-3)


def test_high_temperature_is_uniform():
    hidden, weight, targets, _ = problem()
    logprobs, entropy = token_logprobs(hidden, weight, targets, temperature=1e9)
    assert logprobs.tolist() == pytest.approx([-math.log(5)] * 7) and entropy.tolist() == pytest.approx([math.log(5)] * 7)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_that_is_not_positive_is_a_bug(temperature):
    hidden, weight, targets, _ = problem()
    with pytest.raises(AssertionError, match="must be positive"):
        token_logprobs(hidden, weight, targets, temperature=temperature)


def test_rows_are_independent_of_their_order():
    hidden, weight, targets, _ = problem()
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4])
    straight, _ = token_logprobs(hidden, weight, targets, chunk=3)
    shuffled, _ = token_logprobs(hidden[order], weight, targets[order], chunk=3)
    assert torch.allclose(straight[order], shuffled, rtol=0, atol=1e-14)


def test_masked_sum_and_mean():
    values, mask = torch.tensor([[1.0, 2.0, NAN], [4.0, math.inf, NAN]]), torch.tensor([[True, True, False], [True, False, False]])
    assert masked_sum(values, mask).item() == 7
    assert masked_mean(values, mask).item() == pytest.approx(7 / 3)
    assert masked_row_mean(values, mask).tolist() == [1.5, 4.0]
    assert masked_variance(values, mask).item() == pytest.approx(14 / 9)  # (16/9 + 1/9 + 25/9) / 3


def test_masked_sum_blocks_gradients():
    values = torch.tensor([2.0, NAN]).requires_grad_()
    (3 * masked_sum(values, torch.tensor([True, False]))).backward()
    assert values.grad.tolist() == [3, 0]


@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0)])
def test_all_masked_is_zero(shape):
    values, mask = torch.full(shape, NAN), torch.zeros(shape, dtype=torch.bool)
    assert masked_sum(values, mask).item() == masked_mean(values, mask).item() == masked_variance(values, mask).item() == 0
    assert masked_row_mean(values, mask).tolist() == [0.0] * shape[0]
    for shift_mean in (True, False):
        assert torch.equal(whiten(values, mask, shift_mean=shift_mean), torch.zeros(shape))


def test_whiten_by_hand():
    # 1, 2, 6 have mean 3 and population variance (4 + 1 + 9) / 3 = 14/3.
    values, mask = torch.tensor([[1.0, 2.0, NAN], [6.0, NAN, NAN]]), torch.tensor([[True, True, False], [True, False, False]])
    deviation = (14 / 3) ** 0.5
    expected = [-2 / deviation, -1 / deviation, 0, 3 / deviation, 0, 0]
    assert whiten(values, mask).flatten().tolist() == pytest.approx(expected, rel=1e-6)
    expected = [3 - 2 / deviation, 3 - 1 / deviation, 0, 3 + 3 / deviation, 0, 0]
    assert whiten(values, mask, shift_mean=False).flatten().tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, -1e6, 1e-30])
@pytest.mark.parametrize("count", [1, 3, 1000])
def test_whiten_without_variance_is_zero(value, count):
    values, mask = torch.full((count, 1), value), torch.ones(count, 1, dtype=torch.bool)
    assert whiten(values, mask).count_nonzero() == 0
    assert whiten(values, mask, shift_mean=False).flatten().tolist() == pytest.approx([value] * count, rel=1e-6)
    # The same constant with the noise of float32 rounding, beside a masked column.
    noisy = values.double() * (1 + 1e-7 * torch.tensor([(-1.0) ** i for i in range(count)])[:, None])
    noisy, mask = torch.cat([noisy, noisy], 1), torch.cat([mask, ~mask], 1)
    assert whiten(noisy.float(), mask).count_nonzero() == whiten(noisy, mask).count_nonzero() == 0


def test_whiten_keeps_small_deviations_from_a_large_mean():
    values, mask = torch.tensor([[1000.0, 1001.0]]), torch.ones(1, 2, dtype=torch.bool)
    assert whiten(values, mask).tolist() == [[-1.0, 1.0]]
    # In float32 these numbers are 1/40 of the deviation apart, and a rounded mean would shift them all.
    values = 4096 + 0.02 * torch.randn(4096, 1, generator=torch.Generator().manual_seed(0))
    exact = values.numpy().astype(np.float64)
    mask = torch.ones(4096, 1, dtype=torch.bool)
    assert masked_variance(values, mask).item() == pytest.approx(exact.var(), rel=1e-12)
    whitened = whiten(values, mask)
    assert whitened.dtype == torch.float32
    assert np.allclose(whitened.numpy(), (exact - exact.mean()) / exact.std(), atol=1e-6)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=12), st.randoms(use_true_random=False), st.floats(0.125, 8, width=32))
def test_whiten_ignores_order_padding_scale_and_shift(numbers, random, scale):
    values = torch.tensor(numbers, dtype=torch.float64)
    mask = torch.ones(1, len(numbers), dtype=torch.bool)
    expected = whiten(values[None], mask)
    order = random.sample(range(len(numbers)), len(numbers))
    padded, padded_mask = torch.full((3, len(numbers) + 2), NAN, dtype=torch.float64), torch.zeros(3, len(numbers) + 2, dtype=torch.bool)
    padded[1, 1:-1], padded_mask[1, 1:-1] = values[order], True
    assert torch.allclose(whiten(padded, padded_mask)[1, 1:-1], expected[0, order], atol=1e-9)
    if expected.count_nonzero() and values.std() > 1e-3:
        assert torch.allclose(whiten(values[None] * scale + 5, mask), expected, atol=1e-6)
        assert expected.mean().abs() < 1e-9 and expected.square().mean().item() == pytest.approx(1)


def test_pad_rows():
    rows = [np.array([1, 2, 3]), np.array([], dtype=np.float64), np.array([4])]
    padded = pad_rows(rows)
    assert padded.tolist() == [[1, 2, 3], [0, 0, 0], [4, 0, 0]] and padded.dtype == torch.int64
    assert pad_rows(rows, fill=-1).tolist() == [[1, 2, 3], [-1, -1, -1], [4, -1, -1]]
    assert pad_rows([np.float32([0.5]), np.float32([1, 2])]).dtype == torch.float32
    assert pad_rows([]).shape == (0, 0) and pad_rows([np.array([])]).shape == (1, 0)


def test_pad_rows_copies_read_only_rows():
    row = np.array([1.0, 2.0])
    row.flags.writeable = False  # as arrays from another process are
    padded = pad_rows([row])
    padded[0, 0] = 9
    assert row.tolist() == [1.0, 2.0]
