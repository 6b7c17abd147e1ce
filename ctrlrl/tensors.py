"""Tensor arithmetic that the objectives share: token logprobs without the full logits, masked means, whitening, padding.

Legend of shape suffixes: N scored tokens of a micro-batch in one row, D hidden size, V vocabulary, B sequences, T tokens of the
longest sequence, C rows of one chunk.
"""
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def token_logprobs(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, temperature: float = 1.0, bias_V: Tensor | None = None, chunk: int = 1024
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of each distribution, `chunk` rows of logits in memory at a time.

    z_n = (W h_n + b) / temperature;  logprob_n = z_n[y_n] - logsumexp(z_n);  entropy_n = -Σ_v p_n[v] log p_n[v], p_n = softmax(z_n).

    hidden_ND: last hidden states, hidden_ND[n] the state *before* target n. weight_VD, bias_V: the output layer, of the same dtype.
    targets_N: int64 in [0, V). temperature > 0: as it grows, logprobs go to -log V; at 1 the distribution is the model's own.
    Returns (logprobs_N <= 0, differentiable in hidden, weight and bias; entropy_N in [0, log V], not differentiable), both float32,
    or float64 if hidden is. N = 0 gives empty outputs whose gradients are zeros, so that an empty rank still joins collectives.

    The backward pass computes the logits again, chunk by chunk; memory is O(chunk * V) instead of O(N * V). 1024 rows cost 1.18
    times the time of whole logits on a CPU, 128 rows 2.2 times. The weight's gradient is summed over chunks in float32.
    """
    assert temperature > 0, f"temperature = {temperature} must be positive"
    return _TokenLogprobs.apply(hidden_ND, weight_VD, targets_N, bias_V, float(temperature), chunk)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, targets_N, bias_V, temperature, chunk):
        exact = _exact_dtype(hidden_ND)
        logprobs_N, entropy_N, normaliser_N = (hidden_ND.new_empty(len(hidden_ND), dtype=exact) for _ in range(3))
        for start in range(0, len(hidden_ND), chunk):
            rows = slice(start, start + chunk)
            logits_CV = _logits(hidden_ND[rows], weight_VD, bias_V, temperature)
            normaliser_N[rows] = logits_CV.logsumexp(-1)
            logprobs_N[rows] = logits_CV.gather(1, targets_N[rows, None]).squeeze(1) - normaliser_N[rows]
            # log p in place of the logits: the sum of p log p loses fewer digits than logsumexp - Σ p z when logits are large.
            logits_CV.sub_(normaliser_N[rows, None])
            entropy_N[rows] = -logits_CV.exp().mul_(logits_CV).sum(-1)
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N, bias_V, normaliser_N)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.mark_non_differentiable(entropy_N)
        return logprobs_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_N, _):
        hidden_ND, weight_VD, targets_N, bias_V, normaliser_N = ctx.saved_tensors
        for_hidden, for_weight, _, for_bias, *_ = ctx.needs_input_grad
        exact = _exact_dtype(hidden_ND)
        grad_hidden_ND = torch.empty_like(hidden_ND) if for_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=exact) if for_weight else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=exact) if for_bias else None
        for start in range(0, len(hidden_ND), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            # d logprob_n / d (W h_n + b) = (onehot(y_n) - p_n) / temperature.
            scale_C1 = grad_N[rows, None] / ctx.temperature
            grad_CV = _logits(hidden_ND[rows], weight_VD, bias_V, ctx.temperature)
            grad_CV.sub_(normaliser_N[rows, None]).exp_().mul_(-scale_C1).scatter_add_(1, targets_N[rows, None], scale_C1)
            if for_bias:
                grad_bias_V += grad_CV.sum(0)
            grad_CV = grad_CV.to(weight_VD.dtype)
            if for_hidden:
                grad_hidden_ND[rows] = grad_CV @ weight_VD
            if for_weight:
                grad_weight_VD += grad_CV.T @ hidden_ND[rows]
        # Autograd itself casts a gradient to the dtype of its input.
        return grad_hidden_ND, grad_weight_VD, None, grad_bias_V, None, None


def _exact_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _logits(hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, temperature: float) -> Tensor:
    """The tempered logits of some rows, in float32 (float64 for float64 inputs); a new tensor that the caller may overwrite."""
    logits_CV = (hidden_CD @ weight_VD.T).to(_exact_dtype(hidden_CD))
    if bias_V is not None:
        logits_CV += bias_V
    return logits_CV if temperature == 1 else logits_CV.div_(temperature)


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Σ of `values` where `mask` is true (any equal shapes), a scalar; whatever lies elsewhere, NaN included, has no effect."""
    return torch.where(mask, values, 0).sum()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` where `mask` is true (any equal shapes), a scalar; 0 if it is true nowhere."""
    return masked_sum(values, mask) / mask.sum().clamp(min=1)


def masked_row_mean(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over the scored tokens of each row, [B]; 0 for a row without any. Of logprobs this is ℓ of the fine-tuning objectives."""
    return torch.where(mask_BT, values_BT, 0).sum(1) / mask_BT.sum(1).clamp(min=1)


def masked_variance(values: Tensor, mask: Tensor) -> Tensor:
    """Population variance of `values` where `mask` is true, a float64 scalar; 0 for one value, for none, and for equal values.

    Equal up to rounding: a deviation below 16 float32 units in the last place of the largest magnitude counts as none, in any
    dtype, since what is measured here was computed in float32.
    """
    # Double precision: a large mean would leave nothing but rounding of a small deviation.
    wide = torch.where(mask, values, 0).double()
    variance = masked_mean((wide - masked_mean(wide, mask)).square(), mask)
    largest = wide.abs().amax() if wide.numel() else variance
    return torch.where(variance.sqrt() > 16 * torch.finfo(torch.float32).eps * largest, variance, 0)


def whiten(values_BT: Tensor, mask_BT: Tensor, shift_mean: bool = True) -> Tensor:
    """(values - mean) / standard deviation over the whole masked set, 0 where masked; [B, T] like `values_BT`.

    The deviation is `masked_variance`'s root, the population's. With shift_mean=False the mean is added back: variance 1, mean
    unchanged. Without variance (one element, equal values) the result is 0, or the mean if it is added back.
    """
    wide_BT = values_BT.double()
    deviation, mean = masked_variance(wide_BT, mask_BT).sqrt(), masked_mean(wide_BT, mask_BT)
    whitened_BT = torch.where(deviation > 0, (wide_BT - mean) / deviation, 0)
    if not shift_mean:
        whitened_BT = whitened_BT + mean
    return torch.where(mask_BT, whitened_BT, 0).to(values_BT.dtype)


def pad_rows(rows: Sequence[np.ndarray], fill: float = 0) -> Tensor:
    """One-dimensional arrays as a [B, T] tensor, T the longest, `fill` on the right; a copy, in the dtype of the rows."""
    # An empty row is often a float array by numpy's default and must not turn token ids into floats.
    dtype = np.result_type(*([row for row in rows if len(row)] or rows or [np.float32]))
    padded_BT = np.full((len(rows), max((len(row) for row in rows), default=0)), fill, dtype=dtype)
    for padded_T, row in zip(padded_BT, rows, strict=True):
        padded_T[: len(row)] = row
    return torch.from_numpy(padded_BT)
