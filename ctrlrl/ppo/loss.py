"""The losses of proximal policy optimisation: clipped surrogate for the policy, clipped squared error for the value model.

Sources: [PPO] Schulman et al., arXiv 1707.06347; value clipping as in its released code (openai/baselines ppo2); [DAPO] Yu et al., arXiv
2503.14476 (two clip bounds, token mean); [GSPO] Zheng et al., arXiv 2507.18071 (the sequence's ratio); [Dr.] Liu et al., arXiv 2503.20783
(a fixed length); [GRPO] Shao et al., arXiv 2402.03300 (mean over sequences, KL in the loss).
Legend of shape suffixes: B sequences of a micro-batch, T scored tokens of its longest sequence.
Both return this micro-batch's share of the global loss and of the stats: Σ over its scored tokens / batch.tokens. Shares add up;
`_max` is combined by maximum. A micro-batch without scored tokens gives 0 everywhere, with gradients of 0.
"""
import torch
from torch import Tensor

from ctrlrl.data.batches import Loss, MicroBatch, PolicyValueOutputs, TokenOutputs, ValueOutputs
from ctrlrl.errors import RecipeError
from ctrlrl.ppo.reward import kl_k1, kl_k3
from ctrlrl.tensors import masked_row_mean, masked_sum, masked_variance

# e^20 = 5e8 is far outside any clip range, and finite in float32: an infinite ratio times an advantage of 0 would be NaN.
_LARGEST_LOG_RATIO = 20.0


def policy_loss(
    outputs: TokenOutputs,
    batch: MicroBatch,
    *,
    clip: float | tuple[float, float] = 0.2,
    ratio: str = "token",
    mean: str = "token",
    length: int = 0,
    beta: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate objective, negated ([PPO] eq. 7): -(1/tokens) Σ_t min(ρ_t A_t, clip(ρ_t, 1 - ε, 1 + ε) A_t), ρ = π / π_old.

    outputs: logprobs_BT and entropy_BT of the policy, at the temperature of old_logprobs. batch.columns: old_logprobs [B, T], of
    the policy at the start of the step; advantages [B, T], constants; weights [B, T] >= 0, constants, times which every term counts, if the
    samples are of another policy; ref_logprobs [B, T] if beta > 0. clip: ε > 0, or (low, high): clip(ρ, 1 - low, 1 + high) ([DAPO] eq. 10).
    ratio: "token", or "sequence" ([GSPO] eq. 7): ρ of all tokens is exp of the mean of log ρ over the sequence. mean: "token" as above,
    "sequence" ((1/sequences) Σ of the sequences' own means), or "fixed" (Σ / (sequences * length), [Dr.]). beta >= 0: adds β times the
    same mean of k3 of the policy to the reference ([GRPO] eq. 3).

    With π = π_old: ratio 1, clip fraction 0, and the gradient is the plain policy gradient -(1/tokens) Σ A ∇log π. As ε grows the loss
    becomes the unclipped -(1/tokens) Σ ρ A.

    Stats: ratio_mean >= 0; ratio_max >= 0; clip_fraction in [0, 1], tokens with ρ out of the bounds; approx_kl_k1, of either sign, and
    approx_kl_k3 >= 0, both estimates of KL(π_old ‖ π) a token; entropy in [0, log V] a token; kl_loss >= 0 if beta > 0.
    """
    low, high = clip if isinstance(clip, tuple) else (clip, clip)
    mask_BT, denominator = batch.mask_BT, max(batch.tokens, 1)
    # Masked before the exponential: a gradient through exp of what lies elsewhere could be 0 * inf.
    log_ratio_BT = torch.where(mask_BT, outputs.logprobs_BT - batch.columns["old_logprobs"], 0)
    log_ratio_BT = log_ratio_BT.clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)
    ratio_BT = _ratio(log_ratio_BT, mask_BT, ratio)
    advantages_BT = torch.where(mask_BT, batch.columns["advantages"], 0)  # a sequence's ratio has a gradient from every place
    surrogate_BT = torch.minimum(ratio_BT * advantages_BT, ratio_BT.clamp(1 - low, 1 + high) * advantages_BT)
    if "weights" in batch.columns:
        surrogate_BT = surrogate_BT * torch.where(mask_BT, batch.columns["weights"], 0)
    loss, penalty = -_mean(surrogate_BT, batch, mean, length), {}
    if beta:
        penalty["kl_loss"] = _mean(torch.where(mask_BT, kl_k3(outputs.logprobs_BT, batch.columns["ref_logprobs"]), 0), batch, mean, length)
        loss = loss + beta * penalty["kl_loss"]
    ratio_BT, new_BT, zero_BT = ratio_BT.detach(), log_ratio_BT.detach(), torch.zeros_like(log_ratio_BT)
    shares = {
        "ratio_mean": ratio_BT,
        "clip_fraction": ((ratio_BT < 1 - low) | (ratio_BT > 1 + high)).to(ratio_BT.dtype),
        # Logprobs relative to the old policy's: old = 0, new = log ρ.
        "approx_kl_k1": kl_k1(zero_BT, new_BT),
        "approx_kl_k3": kl_k3(zero_BT, new_BT),
        "entropy": outputs.entropy_BT,
    }
    stats = {name: masked_sum(share_BT, mask_BT) / denominator for name, share_BT in shares.items()}
    ratios_BT = torch.where(mask_BT, ratio_BT, 0)
    stats["ratio_max"] = ratios_BT.amax() if ratios_BT.numel() else ratios_BT.sum()
    return loss, stats | {name: share.detach() for name, share in penalty.items()}


def _ratio(log_ratio_BT: Tensor, mask_BT: Tensor, of: str) -> Tensor:
    if of == "sequence":
        return masked_row_mean(log_ratio_BT, mask_BT).exp()[:, None].expand_as(log_ratio_BT)
    if of != "token":
        raise RecipeError(f"ratio = {of!r} is not known: give 'token' or 'sequence'")
    return log_ratio_BT.exp()


def _mean(values_BT: Tensor, batch: MicroBatch, of: str, length: int) -> Tensor:
    """This micro-batch's share of the global mean of `values_BT`."""
    match of:
        case "token":
            return masked_sum(values_BT, batch.mask_BT) / max(batch.tokens, 1)
        case "sequence":
            return masked_row_mean(values_BT, batch.mask_BT).sum() / max(batch.sequences, 1)
        case "fixed" if length > 0:
            return masked_sum(values_BT, batch.mask_BT) / (max(batch.sequences, 1) * length)
    raise RecipeError(f"mean = {of!r} of length {length} is not known: give 'token', 'sequence', or 'fixed' and a length above 0")


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


def policy_value_loss(
    outputs: PolicyValueOutputs, batch: MicroBatch, *, policy: Loss, value: Loss
) -> tuple[Tensor, dict[str, Tensor]]:
    """policy_loss + value_loss of one model with two heads, both with their options given, and the stats of both."""
    of_policy, stats = policy(TokenOutputs(outputs.logprobs_BT, outputs.entropy_BT), batch)
    of_value, value_stats = value(ValueOutputs(outputs.values_BT), batch)
    return of_policy + of_value, stats | value_stats


def explained_variance(values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """1 - Var(G - V) / Var(G) over the scored tokens, a scalar <= 1: 1 for perfect values, 0 for constant ones, below 0 if worse.

    Returns without variance leave nothing to explain: 0. Not a share: give it the whole batch.
    """
    variance = masked_variance(returns_BT, mask_BT)
    residual = masked_variance(returns_BT - values_BT, mask_BT)
    return torch.where(variance > 0, 1 - residual / variance, 0)


def importance_weights(proximal_BT: Tensor, behaviour_BT: Tensor, mask_BT: Tensor, *, cap: float) -> tuple[Tensor, dict[str, float]]:
    """Truncated importance weights w = min(π₀ / β, C) of tokens that β drew and that π₀ starts from ([AReaL] arXiv 2505.24298).

    proximal_BT: logprobs under π₀, the trainer's at the start of the step. behaviour_BT: the sampler's own, when it drew them. cap: C > 0.
    Returns (weights_BT in (0, C], 1 where π₀ = β), and over the scored tokens: correction/mean, /max (before the cap), /capped (share of
    tokens above it), /ess (effective sample size (Σ w)² / Σ w², as a share of the tokens; 1 if all are equal). Nothing is discarded.
    """
    log_BT = torch.where(mask_BT, proximal_BT - behaviour_BT, 0).clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)
    raw_BT, tokens = log_BT.exp(), max(int(mask_BT.sum()), 1)
    weights_BT = raw_BT.clamp(max=cap)
    total, squares = masked_sum(weights_BT, mask_BT), masked_sum(weights_BT.square(), mask_BT)
    stats = {
        "correction/mean": float(total / tokens),
        "correction/max": float(torch.where(mask_BT, raw_BT, 0).max()) if raw_BT.numel() else 0.0,
        "correction/capped": float(masked_sum((raw_BT > cap).to(raw_BT.dtype), mask_BT) / tokens),
        "correction/ess": float(total.square() / squares.clamp(min=1e-300) / tokens),
    }
    return weights_BT, stats
