"""Advantages: generalised advantage estimation over tokens; leave-one-out, and the group's mean, over samples. Whitening is in tensors.py.

Sources: [GAE] Schulman et al., arXiv 1506.02438; [RLOO] Ahmadian et al., arXiv 2402.14740; [GRPO] Shao et al., arXiv 2402.03300; [Dr.]
Liu et al., arXiv 2503.20783.
Legend of shape suffixes: B sequences, T scored tokens of the longest sequence, G distinct groups.
"""
import torch
from torch import Tensor

from ctrlrl.errors import RecipeError


def gae(rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation ([GAE] eq. 16), each response an episode that ends after its last token.

    δ_t = r_t + γ V_{t+1} - V_t, with V = 0 after the last token;  A_t = δ_t + γ λ A_{t+1};  return_t = A_t + V_t.

    rewards_BT: from `shaped_rewards`. values_BT[b, t]: value of the state before token t. mask_BT: true on a prefix of each row, the
    response. gamma, lam in [0, 1]. Returns (advantages_BT, returns_BT), 0 where masked; what lies there, NaN included, has no effect.
    λ = 1 gives Monte-Carlo returns (returns_t = Σ γ^k r_{t+k}, whatever the values), λ = 0 one-step temporal differences.
    """
    assert not (mask_BT[:, 1:] & ~mask_BT[:, :-1]).any(), "the response is not a prefix of its row"
    rewards_BT, values_BT = torch.where(mask_BT, rewards_BT, 0), torch.where(mask_BT, values_BT, 0)
    advantages_BT = torch.zeros_like(values_BT)
    next_value_B = next_advantage_B = values_BT.new_zeros(len(values_BT))
    for t in reversed(range(values_BT.shape[1])):
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        next_advantage_B = delta_B + gamma * lam * next_advantage_B
        advantages_BT[:, t] = next_advantage_B
        next_value_B = values_BT[:, t]
    # After the end rewards and values are 0, so that advantages there are 0 without a mask: the recursion starts from nothing.
    return advantages_BT, advantages_BT + values_BT


def rloo(reward_B: Tensor, groups_B: Tensor) -> Tensor:
    """Leave-one-out advantage ([RLOO]): A_i = R_i - mean of the rewards of the other samples of its group.

    reward_B: rewards of whole responses, NaN for one that has none: it takes part in no baseline, and its advantage is 0; so is that of a
    sample whose group has no other reward. groups_B: int ids, equal for samples of the same (x, ζ), in any order. Returns
    advantages_B, which sum to 0 in each group; equal rewards give 0. A group of one has no baseline: RecipeError.
    """
    reward_B, known_B, group_B, size_G = _groups(reward_B, groups_B, "rloo")
    total_G = _sums(reward_B, group_B, len(size_G))
    return torch.where(known_B, reward_B - (total_G[group_B] - reward_B) / (size_G[group_B] - 1), 0)


def grpo(reward_B: Tensor, groups_B: Tensor, *, deviation: bool = True) -> Tensor:
    """Group-relative advantage ([GRPO] 4.1.2): A_i = (R_i - mean) / std over the samples of its group.

    reward_B, groups_B: as in `rloo`. deviation: whether to divide by the standard deviation (with N - 1, plus 1e-6), or not ([Dr.] 3:
    dividing weighs prompts by how alike their answers are), which is `rloo` times (N - 1) / N. Returns advantages_B, which sum to 0 in
    each group; equal rewards give 0. A group of one has no baseline: RecipeError.
    """
    reward_B, known_B, group_B, size_G = _groups(reward_B, groups_B, "grpo")
    centred_B = torch.where(known_B, reward_B - (_sums(reward_B, group_B, len(size_G)) / size_G)[group_B], 0)
    if not deviation:
        return centred_B
    variance_G = _sums(centred_B.square(), group_B, len(size_G)) / (size_G - 1)
    return centred_B / (variance_G.sqrt() + 1e-6)[group_B]


def _groups(reward_B: Tensor, groups_B: Tensor, advantage: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(reward_B, 0 where unknown; known_B, which can be compared: with a reward, and another in their group; group_B, numbered from 0;
    size_G, of those with a reward, at least 2); RecipeError for a group of one."""
    ids_G, group_B, size_G = torch.unique(groups_B, return_inverse=True, return_counts=True)
    alone_G = size_G == 1
    if alone_G.any():
        raise RecipeError(
            f"advantage {advantage!r} compares samples of the same prompt and control, but group {ids_G[alone_G][0].item()} has only one: "
            "set samples_per_query to 2 or more, or advantage = 'gae'"
        )
    rewarded_B = ~reward_B.isnan()
    size_G = _sums(rewarded_B.long(), group_B, len(size_G))
    known_B = rewarded_B & (size_G[group_B] > 1)
    return torch.where(known_B, reward_B, 0), known_B, group_B, size_G.clamp(min=2)


def _sums(values_B: Tensor, group_B: Tensor, groups: int) -> Tensor:
    return torch.zeros(groups, dtype=values_B.dtype, device=values_B.device).index_add_(0, group_B, values_B)
