"""Scores of sequence classifiers, one a row: padded so that no model can take padding for text, and proven when a model is loaded.

Each architecture finds the state that it scores in its own way: at the first token, at the last one that is not the configuration's
padding token, as a mean. One rule of padding, in training and in scoring alike, suits them all.
"""

import inspect
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ctrlrl.data.batches import TokenBatch
from ctrlrl.errors import ModelError
from ctrlrl.models.conversations import encode_conversation
from ctrlrl.models.reading import load_tokenizer, reading
from ctrlrl.models.vocabulary import counted_positions

# Of a score in a batch and alone, relative to the largest: rounding of the dtype, far below what a wrong state would make.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
_PROOF = (
    ("How do I bake bread?", "Mix flour, water, salt and yeast, wait for two hours, and bake it."),
    ("Hi", "Yes."),
    ("What is the capital of France, and since when?", "Paris."),
    ("Why?", "Since all that is long is made of what is short, one after the other, from the first to the last."),
)
Encoded = dict[str, list[int]]  # what encode_conversation returns


def raw_scores(
    model: PreTrainedModel, ids_BT: Tensor, mask_BT: Tensor, types_BT: Tensor | None, call: Callable, label: int | None = None
) -> Tensor:
    """The outputs [B], fp32, of `call`, which is `model` or what is wrapped around it; rows are padded on the right, mask 1 on text.

    label: of a classifier of several labels, the one whose log odds are the output, so that a sigmoid gives its probability.

    Rows are filled up with a token that ends none of them, which the configuration names as padding for this call: so the last token
    that is not padding is the last one of the text, also where texts end with the token that the model's makers padded with. A model
    that counts positions from its padding token is given that one.
    """
    counted = counted_positions(model)
    lasts = set(ids_BT.gather(1, mask_BT.sum(1, keepdim=True) - 1).flatten().tolist())
    usual = [] if model.config.pad_token_id is None else [model.config.pad_token_id]
    fill = counted[0] if counted else next(i for i in (*usual, *range(len(lasts) + 1)) if i not in lasts)
    inputs = {"input_ids": ids_BT.masked_fill(mask_BT == 0, fill), "attention_mask": mask_BT}
    if types_BT is not None:
        inputs["token_type_ids"] = types_BT
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    configs = {id(config): config for config in (model.config, model.config.get_text_config())}.values()
    before = [config.pad_token_id for config in configs]
    try:
        for config in configs:
            config.pad_token_id = fill
        logits_BK = call(**inputs).logits.float()
        if logits_BK.dim() == 3:  # of a token classifier, each token's: the last one has read the whole text
            logits_BK = logits_BK[torch.arange(len(mask_BT)), mask_BT.sum(1) - 1]
        return logits_BK[:, 0] if label is None else _log_odds(logits_BK, label, model.config.problem_type)
    finally:
        for config, pad in zip(configs, before, strict=True):
            config.pad_token_id = pad


def _log_odds(logits_BK: Tensor, label: int, problem: str | None) -> Tensor:
    """Log odds [B] of one of K labels: its own logit where each label is a question of its own, else against all others together."""
    if problem == "multi_label_classification":
        return logits_BK[:, label]
    others = [i for i in range(logits_BK.shape[1]) if i != label]
    return logits_BK[:, label] - logits_BK[:, others].logsumexp(1)


def conversation_batch(encoded: list[Encoded], typed: bool) -> TokenBatch:
    """Encoded conversations as rows of a batch. typed: whether the model is told which tokens are the second text, the answer; then
    those count as scored (the first token never does)."""
    tokens = [np.array(e["input_ids"], np.int32) for e in encoded]
    return TokenBatch(tokens, np.array([max(1, e["token_type_ids"].count(0)) if typed else 1 for e in encoded]), {}, {})


def check_scores_alone(name: str, model: PreTrainedModel, score: Callable[[list[Encoded]], Sequence[float]], limit: int) -> None:
    """Raise ModelError unless `score` gives each of a few conversations, in one batch, its score of a call alone.

    limit: tokens that a conversation may have. Not so: a model whose layers carry padding into the text, or rows into each other.
    """
    tokenizer = load_tokenizer(name)
    encoded = [encode_conversation(tokenizer, [{"role": "user", "content": q}], a, limit) for q, a in _PROOF]
    with reading(name, "reward model"):  # it runs for the first time: whatever it raises says that it cannot score
        together = np.array(score(encoded))
        alone = np.array([score([row])[0] for row in encoded])
    error = np.abs(together - alone).max() / max(1.0, np.abs(alone).max())
    if not error <= _TOLERANCE[model.dtype]:
        worst = int(np.abs(together - alone).argmax())
        raise ModelError(
            f"reward model {name!r} ({type(model).__name__}) scores a conversation differently beside others: {alone[worst]:.4f} alone, "
            f"{together[worst]:.4f} in a batch: give a model whose score depends on its conversation alone"
        )
