"""Trains the demo's tiny policy and reward models with plain PyTorch on one thread: seconds, not engines."""
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from ctrlrl.data.batches import MicroBatch
from ctrlrl.demo.corpus import Conversation, Judged
from ctrlrl.demo.vocabulary import byte_bpe, word_piece
from ctrlrl.objectives.preference import bradley_terry

POSITIONS = 512
PROMPT_WEIGHT = 0.2  # of a prompt token in the policy's loss; the answers are what must read well
CENTRE = 0.02  # pulls the two scores of a pair to opposite sides of 0, so that sigmoid(score) is a probability
SURE = 2.5  # median size of a trained reward model's output: sigmoid(2.5) = 0.92
WARM_UP = 0.05  # share of the steps


def train_policy(folder: Path, rows: list[Conversation], tokens: int, width: int, layers: int, batch: int, seed: int) -> dict:
    """Write a causal language model, pre-trained for one pass over `rows`, and its tokenizer; returns figures."""
    chats = [[*row.messages, {"role": "assistant", "content": row.answer}] for row in rows]
    tokenizer = byte_bpe((message["content"] for chat in chats for message in chat), tokens)
    encoded = _render(tokenizer, chats)
    marker = tokenizer.convert_tokens_to_ids("<|assistant|>")
    openings = torch.tensor([len(ids) for ids in tokenizer([row.opening for row in rows])["input_ids"]])
    emphasis = torch.tensor([row.emphasis for row in rows])
    torch.manual_seed(seed)
    model = LlamaForCausalLM(_llama(tokenizer, width, layers, tie_word_embeddings=False))
    optimiser, schedule = _optimiser(model, 4e-3, len(rows) // batch)
    losses = []
    for ids in _batches(encoded, batch, seed):
        padded = _pad([encoded[i] for i in ids], tokenizer.pad_token_id)
        targets = padded[:, 1:]
        answered = (padded == marker).cumsum(1)[:, :-1]
        weights = torch.where(answered > 0, 1.0, PROMPT_WEIGHT) * (targets != tokenizer.pad_token_id)
        total = weights.sum()  # before emphasis: rare cells count more in their words, openings not less beside them
        weights *= torch.where(answered.cumsum(1) > openings[ids][:, None], emphasis[ids][:, None], 1.0)
        with _fast():
            logits = model(input_ids=padded[:, :-1]).logits.float()
        nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(weights)
        loss = (nll * weights).sum() / total
        _step(model, optimiser, schedule, loss)
        losses.append(float(loss.detach()))
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    _save(folder, model, tokenizer)
    return {"parameters": model.num_parameters(), "loss": float(np.mean(losses[-20:]))}


def train_reward_model(
    folder: Path, pairs: list[tuple[Judged, Judged]], held_out: bool, tokens: int, width: int, batch: int, seed: int
) -> None:
    """Write a reward model trained with Bradley-Terry for one pass over `pairs`, and its tokenizer.

    The optimisation models also learn to predict the intact answers: only so do they notice an answer to another question.
    """
    judged = [side for pair in pairs for side in pair]
    chats = [_chat(row) for row in judged]
    tokenizer = (word_piece if held_out else byte_bpe)((message["content"] for chat in chats for message in chat), tokens)
    encoded, intact = _render(tokenizer, chats), torch.tensor([row.intact for row in judged])
    torch.manual_seed(seed)
    model = BertForSequenceClassification(_bert(tokenizer, width)) if held_out else \
        LlamaForSequenceClassification(_llama(tokenizer, width, 2, num_labels=1))
    optimiser, schedule = _optimiser(model, 1.5e-3 if held_out else 3e-3, len(pairs) // batch)  # at 3e-3 an encoder may learn nothing
    sizes = []
    for ids in _batches([encoded[2 * i] + encoded[2 * i + 1] for i in range(len(pairs))], batch, seed):
        rows = [2 * i + side for i in ids for side in (0, 1)]
        padded = _pad([encoded[i] for i in rows], tokenizer.pad_token_id)
        mask = padded != tokenizer.pad_token_id
        with _fast():
            output = model(input_ids=padded, attention_mask=mask.long(), output_hidden_states=not held_out)
            micro = MicroBatch(mask, {}, int(mask.sum()), len(rows))
            loss, _ = bradley_terry(output.logits[:, 0].float(), micro, centre=CENTRE)
            sizes.append(float(output.logits.detach().abs().median()))
            if not held_out:
                embedding = model.get_input_embeddings().weight
                loss = loss + _reading_loss(output.hidden_states[-1], embedding, padded, mask & intact[rows, None])
        _step(model, optimiser, schedule, loss)
    _sharpen(model, SURE / float(np.median(sizes[-20:])))
    _save(folder, model, tokenizer)


@torch.no_grad()
def _sharpen(model: PreTrainedModel, factor: float) -> None:
    """Scale the outputs, which changes no order: Bradley-Terry stops pulling once pairs are told apart, near 0.8 against 0.2."""
    head = model.score if isinstance(model, LlamaForSequenceClassification) else model.classifier
    for parameter in head.parameters():
        parameter.mul_(factor)


def _reading_loss(hidden_BTD, embedding_VD, tokens_BT, mask_BT) -> torch.Tensor:
    """Mean negative log-likelihood of each masked token after the first, given those before it; the head is the embedding."""
    scored = mask_BT[:, 1:]
    logits = hidden_BTD[:, :-1][scored] @ embedding_VD.T
    return torch.nn.functional.cross_entropy(logits.float(), tokens_BT[:, 1:][scored])


@torch.no_grad()
def raw_scores(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: list[Judged], batch: int = 128) -> np.ndarray:
    """The reward model's outputs before the sigmoid."""
    encoded = _render(tokenizer, [_chat(row) for row in rows])
    scores = np.zeros(len(rows), np.float32)
    for start in range(0, len(rows), batch):
        padded = _pad(encoded[start : start + batch], tokenizer.pad_token_id)
        output = model(input_ids=padded, attention_mask=(padded != tokenizer.pad_token_id).long())
        scores[start : start + batch] = output.logits[:, 0].numpy()
    return scores


def _chat(row: Judged) -> list[dict[str, str]]:
    return [{"role": "user", "content": row.prompt}, {"role": "assistant", "content": row.answer}]


def _llama(tokenizer, width: int, layers: int, **special) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=64 * -(-len(tokenizer) // 64), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=width // 32, num_key_value_heads=width // 32, head_dim=32, max_position_embeddings=POSITIONS,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager", **special)


def _bert(tokenizer, width: int) -> BertConfig:
    return BertConfig(
        vocab_size=64 * -(-len(tokenizer) // 64), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=width // 32, max_position_embeddings=POSITIONS, pad_token_id=tokenizer.pad_token_id, num_labels=1,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="eager")


def _render(tokenizer, chats: list[list[dict[str, str]]]) -> list[list[int]]:
    return tokenizer(tokenizer.apply_chat_template(chats, tokenize=False), add_special_tokens=False)["input_ids"]


def _batches(encoded: list[list[int]], batch: int, seed: int) -> Iterator[np.ndarray]:
    """Row indices, every row once; rows of similar length go together, which halves the padding."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(encoded))
    for chunk in np.array_split(order, max(1, len(order) // (batch * 16))):
        chunk = chunk[np.argsort([len(encoded[i]) for i in chunk], kind="stable")]
        starts = range(0, len(chunk) - batch + 1, batch)
        for start in rng.permutation(list(starts)):
            yield chunk[start : start + batch]


def _pad(rows: list[list[int]], pad: int) -> torch.Tensor:
    longest = max(len(row) for row in rows)
    return torch.tensor([row + [pad] * (longest - len(row)) for row in rows])


def _optimiser(model: torch.nn.Module, peak: float, steps: int):
    optimiser = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    warm = max(1, int(WARM_UP * steps))

    def factor(step: int) -> float:
        return min((step + 1) / warm, 0.02 + 0.98 * (1 + np.cos(np.pi * min(1, step / max(1, steps)))) / 2)

    return optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, factor)


def _fast() -> torch.autocast:
    """bf16 products where the processor has them (1.5 times as fast), fp32 elsewhere; weights stay fp32."""
    able = torch.cpu.get_capabilities()
    return torch.autocast("cpu", torch.bfloat16, enabled=bool(able.get("amx_bf16") or able.get("avx512_bf16")))


def _step(model, optimiser, schedule, loss: torch.Tensor) -> None:
    optimiser.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    schedule.step()


def _save(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    # Not save_pretrained: it imports every training engine that is installed, to look for wrapped models.
    folder.mkdir(parents=True)
    model.config.architectures, model.config.dtype = [type(model).__name__], torch.float32
    model.config.save_pretrained(folder)
    if isinstance(model, LlamaForCausalLM):
        model.generation_config.save_pretrained(folder)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
