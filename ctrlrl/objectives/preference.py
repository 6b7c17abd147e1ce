"""Objectives on preference pairs: direct preference optimisation of a policy, Bradley-Terry training of a reward model.

Sources: [DPO] Rafailov et al., arXiv 2305.18290; [BT] Bradley and Terry, Biometrika 39 (1952), as used by Ouyang et al.,
arXiv 2203.02155, eq. 1; [CST] Gallego, arXiv 2404.00495; [RPO] Pang et al., arXiv 2404.19733, eq. 1.
Legend of shape suffixes: B sequences of a micro-batch, P = B/2 pairs, T scored tokens of its longest sequence.
Rows are interleaved (chosen, rejected, chosen, rejected, ...), so a TokenBatch of pairs has group = 2. Each function returns this
micro-batch's share of the global loss and of the stats, Σ over its pairs / (batch.sequences / 2); shares add up. A pair without
any scored token is filler: it adds 0, with gradients of 0.
"""
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ctrlrl.data.batches import MicroBatch, TokenOutputs


def dpo(
    outputs: TokenOutputs, batch: MicroBatch, *, beta: float = 0.1, nll_weight: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Direct preference optimisation ([DPO] eq. 7): (1/pairs) Σ [-log σ(r⁺ - r⁻) + nll_weight nll⁺], r = β (log π(y) - log π_ref(y)).

    outputs.logprobs_BT: of the policy, differentiable; log π(y) is their sum over scored tokens. batch.columns: ref_logprob [B], the
    same sum under the reference. beta > 0. With π = π_ref the loss is ln 2 and the gradient -(β/2)(∇log π(y⁺) - ∇log π(y⁻)) a pair;
    swapping a pair, as the opposite system prompt of [CST] does, turns its margin's sign. β = 0 gives ln 2.
    nll_weight >= 0 adds [RPO]'s term, nll⁺ = -log π(y⁺) / |y⁺|: the loss alone may lower both answers, and what they lose goes anywhere.

    Stats: loss >= 0; accuracy in [0, 1], pairs with a positive margin; margin = r⁺ - r⁻; chosen_nll = nll⁺; chosen_reward = r⁺;
    rejected_reward = r⁻.
    """
    logprob_B = torch.where(batch.mask_BT, outputs.logprobs_BT, 0).sum(1)
    chosen_P, rejected_P = _pairs(beta * (logprob_B - batch.columns["ref_logprob"]))
    nll_P = -(logprob_B / batch.mask_BT.sum(1).clamp(min=1))[0::2]
    loss, stats = _pairwise(chosen_P, rejected_P, batch, nll_weight * nll_P)
    stats["chosen_nll"] = _share(nll_P.detach(), batch)
    stats["chosen_reward"] = _share(chosen_P.detach(), batch)
    stats["rejected_reward"] = _share(rejected_P.detach(), batch)
    return loss, stats


def bradley_terry(scores_B: Tensor, batch: MicroBatch, *, centre: float = 0.0) -> tuple[Tensor, dict[str, Tensor]]:
    """Bradley-Terry likelihood of the preferences ([BT]): (1/pairs) Σ [-log σ(f⁺ - f⁻) + centre (f⁺ + f⁻)²].

    scores_B: raw outputs f(x, y) of the reward model, interleaved, differentiable. batch: counts and mask; no columns. centre >= 0:
    preferences leave f free up to a constant; a small centre (0.01) keeps it near 0, so that sigmoid(f) uses all of [0, 1]
    (Eisenstein et al., arXiv 2312.09244). Equal scores f give ln 2 + centre (2f)².

    Stats: loss >= 0; accuracy in [0, 1], pairs with f⁺ > f⁻ (a tie is not a success); margin = f⁺ - f⁻.
    """
    chosen_P, rejected_P = _pairs(scores_B)
    return _pairwise(chosen_P, rejected_P, batch, centre * (chosen_P + rejected_P).square())


def _pairs(values_B: Tensor) -> tuple[Tensor, Tensor]:
    assert len(values_B) % 2 == 0, f"{len(values_B)} rows are not pairs: the batch needs group = 2"
    return values_B[0::2], values_B[1::2]


def _share(values_P: Tensor, batch: MicroBatch) -> Tensor:
    scored_P = batch.mask_BT.any(1).view(-1, 2).any(1)
    return torch.where(scored_P, values_P, 0).sum() / max(batch.sequences / 2, 1)


def _pairwise(chosen_P: Tensor, rejected_P: Tensor, batch: MicroBatch, penalty_P: Tensor | float = 0.0) -> tuple[Tensor, dict[str, Tensor]]:
    margin_P = chosen_P - rejected_P
    loss = _share(penalty_P - logsigmoid(margin_P), batch)
    margin_P = margin_P.detach()
    return loss, {
        "loss": loss.detach(),
        "accuracy": _share(margin_P > 0, batch),
        "margin": _share(margin_P, batch),
    }
