"""From scores to rewards: agreement with the requested control, the min control reward, the weighted sum without a control, KL-shaped
token rewards and adaptive β.

Sources: [SH] Tuan et al., arXiv 2404.01295; [KL] Ziegler et al., arXiv 1909.08593; [k3] Schulman, "Approximating KL divergence"
(joschu.net/blog/kl-approx.html, 2020).
Legend of shape suffixes: B sequences, A attributes (in the order of the recipe), T scored tokens of the longest sequence.
"""

import math
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor

from ctrlrl.attributes import PAPER, Attributes
from ctrlrl.config import Section
from ctrlrl.errors import DataError, RecipeError, RunError


class KLConfig(Section):
    """The penalty that keeps the policy near the reference: taken from the rewards, or added to the loss.

    estimator: k1 or k3. In the loss k1 is refused: its gradient is ∇ log π, whose mean under π is 0, so that it restrains nothing.
    """

    beta: float = Field(0.05, ge=0, allow_inf_nan=False, description="β at the first step, reward per nat")
    target: float = Field(0.0, ge=0, allow_inf_nan=False, description="KL of a whole response, in nats, that β steers to; 0 keeps β")
    gain: float = Field(0.1, ge=0, allow_inf_nan=False, description="K_β of [KL] 2.2: relative change of β per unit of error")
    place: Literal["reward", "loss"] = "reward"
    estimator: Literal["k1", "k3"] = "k1"

    @model_validator(mode="after")
    def _restrains(self):
        if self.place == "loss" and self.estimator == "k1":
            raise ValueError('k1 in the loss restrains nothing (the mean of its gradient is 0): set estimator = "k3", or place = "reward"')
        return self


def _sum_to_one(weights: dict[str, float]) -> dict[str, float]:
    if not math.isclose(sum(weights.values()), 1):
        raise ValueError(f"the weights sum to {sum(weights.values()):g}, not to 1: a reward, like a score, is a number from 0 to 1")
    return weights


# Shares of the attributes, by name, in the weighted sum; together 1.
Weights = Annotated[dict[str, Annotated[float, Field(ge=0, le=1)]], AfterValidator(_sum_to_one)]
EQUAL = dict.fromkeys(PAPER.names, 1 / len(PAPER))


def agreement(levels_BA: Tensor, scores_BA: Tensor) -> Tensor:
    """1 - |s_a - R_a(x, y)|, elementwise, in [0, 1] (a term of [SH] eq. 4): 1 at the requested level, 0 at the opposite end.

    levels_BA: requested levels in [0, 1]. scores_BA: calibrated scores in [0, 1]; any other score, NaN included, is a DataError.
    """
    _check_calibrated(scores_BA)
    return 1 - (levels_BA - scores_BA).abs()


def control_reward(levels_BA: Tensor, scores_BA: Tensor, *, combine: str = "min") -> tuple[Tensor, Tensor]:
    """The reward of whole responses ([SH] eq. 4): R_min = min over attributes of agreement_a.

    levels_BA, scores_BA: as in `agreement`. combine: "min", or for ablation "mean" or "product" over attributes.
    Returns (reward_B in [0, 1], binding_B: int64 index of the attribute whose agreement is least, the lowest index on ties). The
    reward is 1 if every score is as requested, whatever `combine`; 0 under min and product if one attribute is at the opposite end.
    """
    agreement_BA = agreement(levels_BA, scores_BA)
    match combine:
        case "min":
            reward_B = agreement_BA.amin(1)
        case "mean":
            reward_B = agreement_BA.mean(1)
        case "product":
            reward_B = agreement_BA.prod(1)
        case _:
            raise RecipeError(f"combine = {combine!r} is not known: give 'min', 'mean' or 'product'")
    return reward_B, agreement_BA.argmin(1)


def weighted_reward(scores_BA: Tensor, weights: tuple[float, ...]) -> Tensor:
    """Σ_a w_a R_a(x, y), the reward of whole responses without a control: one trade-off, fixed in training, that nobody can dial later.

    scores_BA: as in `agreement`. weights: one per attribute, not negative, of sum 1. Returns reward_B in [0, 1]; a weight of 1 leaves that
    attribute's score.
    """
    _check_calibrated(scores_BA)
    return scores_BA @ torch.tensor(weights, dtype=scores_BA.dtype, device=scores_BA.device)


def binding_fractions(binding_B: Tensor, attributes: Attributes = PAPER) -> dict[str, float]:
    """Share of responses that each attribute bound, by attribute's name; the shares sum to 1 (all 0 if B = 0)."""
    counts = torch.bincount(binding_B, minlength=len(attributes)).tolist()
    return {name: count / max(len(binding_B), 1) for name, count in zip(attributes.names, counts, strict=True)}


def _check_calibrated(scores_BA: Tensor) -> None:
    outside_BA = ~((scores_BA >= 0) & (scores_BA <= 1))
    if outside_BA.any():
        raise DataError(
            f"score {scores_BA[outside_BA][0].item():g} is outside [0, 1]: calibrate the reward model with 'sigmoid' or 'quantile' "
            "('identity' is for models that give probabilities)"
        )


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log π - log π_ref at tokens drawn from π, elementwise: unbiased for KL(π ‖ π_ref) ([k3]); of either sign, 0 if π = π_ref."""
    return logprobs - ref_logprobs


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """r - 1 - log r with r = π_ref / π, elementwise: unbiased for KL(π ‖ π_ref) like k1, never negative, of less variance ([k3])."""
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


KL = {"k1": kl_k1, "k3": kl_k3}


def shaped_rewards(
    reward_B: Tensor, logprobs_BT: Tensor, ref_logprobs_BT: Tensor, mask_BT: Tensor, *, beta: float, estimator: str = "k1"
) -> Tensor:
    """r_t = -β (log π_t - log π_ref,t), plus the reward of the whole response on its last scored token ([KL] eq. 2).

    reward_B: from `control_reward`. logprobs_BT, ref_logprobs_BT: of policy and reference under the same (x, ζ). mask_BT: scored
    tokens. estimator: "k1" as above, or "k3" in its place. Returns rewards_BT, 0 where masked; each row sums to reward - β ΣKL. β = 0
    leaves the reward alone; a row without a scored token is all 0: it has no place for a reward.
    """
    penalty_BT = torch.where(mask_BT, KL[estimator](logprobs_BT, ref_logprobs_BT), 0)
    # Scored tokens from here to the end of the row; 1 on the last one alone.
    remaining_BT = mask_BT.flip(1).cumsum(1).flip(1)
    last_BT = mask_BT & (remaining_BT == 1)
    return torch.where(last_BT, reward_B[:, None], 0) - beta * penalty_BT


@dataclass(frozen=True)
class AdaptiveKL:
    """β of the KL penalty and its controller ([KL] 2.2); a value: `updated` gives the next one. Saved with every checkpoint."""

    beta: float

    def updated(self, measured_kl: float, config: KLConfig) -> "AdaptiveKL":
        """e = clip(KL / KL_target - 1, -0.2, 0.2), β <- β (1 + gain e); a target of 0 keeps β.

        measured_kl: mean over sequences of the summed k1, in nats; may be negative. One call changes β by at most 20 % of `gain`.
        """
        if not math.isfinite(measured_kl):
            raise RunError(f"KL to the reference is {measured_kl}: training has diverged; resume a checkpoint with a lower learning rate")
        if config.target == 0:
            return self
        error = min(max(measured_kl / config.target - 1, -0.2), 0.2)
        return AdaptiveKL(self.beta * (1 + config.gain * error))

    def to_dict(self) -> dict[str, float]:
        """The state as JSON can hold it; `from_dict` restores it exactly."""
        return asdict(self)

    @classmethod
    def from_dict(cls, state: dict[str, float]) -> "AdaptiveKL":
        """The inverse of `to_dict`."""
        return cls(**state)
