"""Maximum likelihood: PLM and CLM over tokens, and the mean over sequences that ExMATE builds on.

Source: [SH] Tuan et al., arXiv 2404.01295, section 2.4.
Legend of shape suffixes: B sequences of a micro-batch, T scored tokens of its longest sequence.
Each returns this micro-batch's share of the global loss and of the stats; shares add up. No scored token: 0, with gradients of 0.
"""
from torch import Tensor

from ctrlrl.data.batches import MicroBatch, TokenOutputs
from ctrlrl.tensors import masked_row_mean, masked_sum


def likelihood(outputs: TokenOutputs, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative log-likelihood a token, -(1/tokens) Σ_bt log P(token | earlier tokens): PLM, and CLM ([SH] eq. 2).

    The two differ in which tokens the batch marks as scored, and in nothing else. CLM: the response, its end token included, given
    (x, ζ): prompt_lengths = length of the rendered prompt. PLM: prompt and response together: prompt_lengths = 1, since the very
    first token has no logprob.

    outputs.logprobs_BT: differentiable. batch.tokens: scored tokens of the global batch. The loss is >= 0; log V for a uniform
    model, 0 for a certain one. Stats: loss; entropy in [0, log V] a token.
    """
    denominator = max(batch.tokens, 1)
    loss = -masked_sum(outputs.logprobs_BT, batch.mask_BT) / denominator
    return loss, {"loss": loss.detach(), "entropy": masked_sum(outputs.entropy_BT, batch.mask_BT) / denominator}


def sequence_likelihood(outputs: TokenOutputs, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative length-normalised log-likelihood, -(1/sequences) Σ_b ℓ_b, ℓ_b the mean logprob of row b's scored tokens.

    Every sequence weighs the same, whatever its length; with equal lengths this is `likelihood`. batch.sequences: rows of the
    global batch; a row without scored tokens counts there and adds 0. Stats: loss >= 0.
    """
    loss = -masked_row_mean(outputs.logprobs_BT, batch.mask_BT).sum() / max(batch.sequences, 1)
    return loss, {"loss": loss.detach()}
