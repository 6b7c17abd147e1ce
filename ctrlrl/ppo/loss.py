"""The losses of proximal policy optimisation: clipped surrogate for the policy, clipped squared error for the value model.

Source: [PPO] Schulman et al., arXiv 1707.06347; value clipping as in its released code (openai/baselines ppo2).
Legend of shape suffixes: B sequences of a micro-batch, T scored tokens of its longest sequence.
Both return this micro-batch's share of the global loss and of the stats: Σ over its scored tokens / batch.tokens. Shares add up;
`_max` is combined by maximum. A micro-batch without scored tokens gives 0 everywhere, with gradients of 0.
"""
import torch
from torch import Tensor

from ctrlrl.data.batches import MicroBatch, TokenOutputs, ValueOutputs
from ctrlrl.ppo.reward import kl_k1, kl_k3
from ctrlrl.tensors import masked_sum, masked_variance

# e^20 = 5e8 is far outside any clip range, and finite in float32: an infinite ratio times an advantage of 0 would be NaN.
_LARGEST_LOG_RATIO = 20.0


def policy_loss(outputs: TokenOutputs, batch: MicroBatch, *, clip: float = 0.2) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate objective, negated ([PPO] eq. 7): -(1/tokens) Σ_t min(ρ_t A_t, clip(ρ_t, 1 - ε, 1 + ε) A_t), ρ = π / π_old.

    outputs: logprobs_BT and entropy_BT of the policy, at the temperature of old_logprobs. batch.columns: old_logprobs [B, T], of
    the policy that sampled; advantages [B, T], constants. clip: ε > 0. With π = π_old: ratio 1, clip fraction 0, and the gradient
    is the plain policy gradient -(1/tokens) Σ A ∇log π. As ε grows the loss becomes the unclipped -(1/tokens) Σ ρ A.

    Stats: ratio_mean >= 0; ratio_max >= 0; clip_fraction in [0, 1], tokens with |ρ - 1| > ε; approx_kl_k1, of either sign, and
    approx_kl_k3 >= 0, both estimates of KL(π_old ‖ π) a token; entropy in [0, log V] a token.
    """
    mask_BT, denominator = batch.mask_BT, max(batch.tokens, 1)
    # Masked before the exponential: a gradient through exp of what lies elsewhere could be 0 * inf.
    log_ratio_BT = torch.where(mask_BT, outputs.logprobs_BT - batch.columns["old_logprobs"], 0)
    log_ratio_BT = log_ratio_BT.clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)
    ratio_BT = log_ratio_BT.exp()
    advantages_BT = batch.columns["advantages"]
    surrogate_BT = torch.minimum(ratio_BT * advantages_BT, ratio_BT.clamp(1 - clip, 1 + clip) * advantages_BT)
    loss = -masked_sum(surrogate_BT, mask_BT) / denominator
    ratio_BT, new_BT, zero_BT = ratio_BT.detach(), log_ratio_BT.detach(), torch.zeros_like(log_ratio_BT)
    shares = {
        "ratio_mean": ratio_BT,
        "clip_fraction": ((ratio_BT - 1).abs() > clip).to(ratio_BT.dtype),
        # Logprobs relative to the old policy's: old = 0, new = log ρ.
        "approx_kl_k1": kl_k1(zero_BT, new_BT),
        "approx_kl_k3": kl_k3(zero_BT, new_BT),
        "entropy": outputs.entropy_BT,
    }
    stats = {name: masked_sum(share_BT, mask_BT) / denominator for name, share_BT in shares.items()}
    ratios_BT = torch.where(mask_BT, ratio_BT, 0)
    stats["ratio_max"] = ratios_BT.amax() if ratios_BT.numel() else ratios_BT.sum()
    return loss, stats


def value_loss(outputs: ValueOutputs, batch: MicroBatch, *, clip: float = 0.2, factor: float = 0.5) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped value loss: factor (1/tokens) Σ_t max((V_t - G_t)², (clip(V_t, V_old,t - ε, V_old,t + ε) - G_t)²), G the returns.

    outputs: values_BT[b, t], value of the state before token t. batch.columns: old_values, returns [B, T], constants. clip: ε > 0;
    factor >= 0. With V = V_old, and as ε grows, this is factor times the plain mean squared error.

    Stats: value_loss, the loss; value_clip_fraction in [0, 1], tokens with |V - V_old| > ε; value_mean; value_error_sq >= 0, the
    mean squared error.
    """
    mask_BT, denominator = batch.mask_BT, max(batch.tokens, 1)
    values_BT, old_BT, returns_BT = (
        torch.where(mask_BT, column, 0) for column in (outputs.values_BT, batch.columns["old_values"], batch.columns["returns"])
    )
    move_BT = values_BT - old_BT
    error_BT = (values_BT - returns_BT).square()
    clipped_error_BT = (old_BT + move_BT.clamp(-clip, clip) - returns_BT).square()
    loss = factor * masked_sum(torch.maximum(error_BT, clipped_error_BT), mask_BT) / denominator
    stats = {
        "value_loss": loss.detach(),
        "value_clip_fraction": masked_sum((move_BT.abs() > clip).to(values_BT.dtype), mask_BT) / denominator,
        "value_mean": masked_sum(values_BT.detach(), mask_BT) / denominator,
        "value_error_sq": masked_sum(error_BT.detach(), mask_BT) / denominator,
    }
    return loss, stats


def explained_variance(values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """1 - Var(G - V) / Var(G) over the scored tokens, a scalar <= 1: 1 for perfect values, 0 for constant ones, below 0 if worse.

    Returns without variance leave nothing to explain: 0. Not a share: give it the whole batch.
    """
    variance = masked_variance(returns_BT, mask_BT)
    residual = masked_variance(returns_BT - values_BT, mask_BT)
    return torch.where(variance > 0, 1 - residual / variance, 0)
