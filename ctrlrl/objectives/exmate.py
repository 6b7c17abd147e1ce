"""ExMATE: raise the likelihood of a response under its true control, lower it under a fake one.

Sources: [SH] Tuan et al., arXiv 2404.01295, eq. 3; [MATE] Tuan et al., arXiv 2212.10515.
Legend of shape suffixes: B sequences of a micro-batch, T scored tokens of its longest sequence.
"""
import numpy as np
import torch
from torch import Tensor

from ctrlrl.data.batches import MicroBatch, TokenOutputs
from ctrlrl.tensors import masked_row_mean


def exmate_columns(treated: np.ndarray) -> dict[str, np.ndarray]:
    """The columns `exmate` reads, from the `treated` flags (1 = true control, 0 = fake) of a whole *global* batch, [rows].

    `share` is a row's weight in the mean over the rows of its kind, 1 / (their number): the means stay exact however the batch is
    cut, and whatever the number of fakes (none, one or several a response). Compute it before the batch is cut.
    """
    treated = np.asarray(treated).astype(bool)
    alike = np.where(treated, treated.sum(), (~treated).sum())
    return {"treated": treated.astype(np.float32), "share": 1.0 / alike}


def exmate(outputs: TokenOutputs, batch: MicroBatch, *, weight: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    """L = mean over treated rows of -ℓ + weight * mean over untreated rows of exp ℓ ([SH] eq. 3), ℓ_b the mean logprob of row b.

    Rows are independent: a response under its true control is one, the same response under a fake control another, in any order.
    outputs.logprobs_BT: differentiable. batch.columns: treated [B], 1 for a true control, 0 for a fake one; share [B], from
    `exmate_columns` (batch.tokens and batch.sequences are not read). weight: λ >= 0, 1 by default in ctrlrl, 0.05 in the code of
    [MATE] for its own task. λ = 0, or a batch without fakes, is `sequence_likelihood` on the treated rows.

    ℓ must be the mean, not the sum: exp of a sum over tokens underflows to 0, and with it the gradient λ exp(ℓ) ∇ℓ, which fades as
    the wrong response becomes unlikely and so bounds the push-away. A row without scored tokens adds 0.

    Stats: loss >= 0; treated_l and untreated_l <= 0, the means of ℓ by kind; gap = treated_l - untreated_l, positive when
    the model tells controls apart.
    """
    mean_B = masked_row_mean(outputs.logprobs_BT, batch.mask_BT)
    # An unscored row has ℓ = 0, and exp 0 = 1 would count it as a fake that the model is sure of.
    share_B = torch.where(batch.mask_BT.any(1), batch.columns["share"].to(mean_B), 0)
    treated_B = batch.columns["treated"] > 0
    terms_B = torch.where(treated_B, -mean_B, weight * mean_B.exp())
    loss = (share_B * terms_B).sum()
    weighted_B = (share_B * mean_B).detach()
    treated, untreated = (torch.where(kind_B, weighted_B, 0).sum() for kind_B in (treated_B, ~treated_B))
    return loss, {"loss": loss.detach(), "treated_l": treated, "untreated_l": untreated, "gap": treated - untreated}
