"""From ragged sequences to outputs on their scored tokens: the two layouts, and the model heads.

A micro-batch is laid out *packed* (all sequences in one row, attention within each segment, no padding), *shared* (packed, and a prompt
that several sequences begin with stands there once) or *padded* (one sequence a row, padded on the right); layout.py settles which of
them is exact for a model. A token at position p is scored from the state at p - 1.

Legend: N tokens of the row(s), M scored tokens of the micro-batch, B sequences, T scored tokens of the longest, V vocabulary.
"""

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ctrlrl.data.batches import MicroBatch, PolicyValueOutputs, TokenBatch, TokenOutputs, ValueOutputs, shared_prompts
from ctrlrl.errors import ModelError
from ctrlrl.models.pooling import raw_scores
from ctrlrl.models.segments import SEGMENTS, Segments, packed_row, why_not_packed
from ctrlrl.tensors import pad_rows, token_logprobs


@dataclass(frozen=True)
class ModelInputs:
    """One micro-batch as a model takes it. reads [M]: flat index of the state that scores each token; targets [M]; rows, columns [M]:
    its place in the [B, T] grid. segments: those of a packed row."""

    model: dict
    reads: Tensor
    targets: Tensor
    rows: Tensor
    columns: Tensor
    shape: tuple[int, int]
    segments: Segments | None = None

    def run(self, model: PreTrainedModel, **options):
        """The output of a transformers model on these inputs; ModelError if they would depend on each other. options: of its forward."""
        longest = self.segments.longest if self.segments else self.model["input_ids"].shape[1]
        if (limit := steady_length(model.config)) and longest > limit:
            raise ModelError(
                f"a sequence has {longest} tokens, and the rotary positions of this model change for all of a batch beyond {limit}: "
                f"keep prompt and answer within {limit} tokens"
            )
        with packed_row(self.segments):
            return model(**self.model, use_cache=False, **options)

    def grid(self, values_M: Tensor) -> Tensor:
        """Flat values of the scored tokens as [B, T], 0 elsewhere; differentiable."""
        return values_M.new_zeros(self.shape).index_put((self.rows, self.columns), values_M)


def steady_length(config: PretrainedConfig) -> int | None:
    """Up to how many tokens a model's rotary frequencies are fixed (LongRoPE, dynamic NTK); None: always. Beyond, those of each
    sequence depend on the longest one beside it, and of each token on how long its sequence becomes."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = [kind for kind in (rope, *rope.values()) if isinstance(kind, dict)]
    limits = [kind["original_max_position_embeddings"] for kind in kinds if kind.get("rope_type") == "longrope"]
    if any(kind.get("rope_type") == "dynamic" for kind in kinds):
        limits.append(text.max_position_embeddings)
    return min(limits, default=None)


def lay_out(batch: TokenBatch, layout: str, device: torch.device) -> ModelInputs:
    """Arrange the sequences of one micro-batch as `layout` ("packed" | "shared" | "padded") says."""
    lengths = np.array([len(t) for t in batch.tokens])
    width = int(lengths.max())
    row = _Row(batch, shared_prompts(batch) if layout == "shared" else [None] * len(batch))
    starts = np.arange(len(lengths)) * width if layout == "padded" else row.starts
    scored = batch.scored_lengths
    rows = np.repeat(np.arange(len(lengths)), scored)
    columns = np.concatenate([np.arange(n) for n in scored]) if len(scored) else np.zeros(0, np.int64)
    reads = starts[rows] + batch.prompt_lengths[rows] + columns - 1
    if layout == "shared":
        reads = np.where(columns == 0, row.prompt_ends[rows], reads)
    targets = np.concatenate([t[p:] for t, p in zip(batch.tokens, batch.prompt_lengths, strict=True)])

    def tensor(array) -> Tensor:
        return torch.as_tensor(np.asarray(array, dtype=np.int64), device=device)

    segments = None
    if layout == "padded":
        mask = torch.arange(width)[None] < torch.as_tensor(lengths)[:, None]
        model = {"input_ids": pad_rows(batch.tokens).long().to(device), "attention_mask": mask.long().to(device)}
    else:
        # No attention_mask here: a mask of ones would silently let packed sequences see each other.
        model = {"input_ids": tensor(np.concatenate(row.tokens))[None], "position_ids": tensor(np.concatenate(row.positions))[None]}
        sizes = [len(tokens) for tokens in row.tokens]
        ends = torch.as_tensor(np.concatenate([[0], np.cumsum(sizes)]), dtype=torch.int32, device=device)
        segments = Segments(sizes, ends, tuple(row.prompts) if any(p >= 0 for p in row.prompts) else ())
    shape = (len(lengths), max(int(scored.max(initial=0)), 1))
    return ModelInputs(model, tensor(reads), tensor(targets), tensor(rows), tensor(columns), shape, segments)


class _Row:
    """The segments of a packed row: tokens, positions, and the segment that holds the prompt (-1: none other) of each; and for each
    sequence where its first token would stand if it were in one piece with its last, and where the last token of its prompt stands."""

    def __init__(self, batch: TokenBatch, keys: list[bytes | None]):
        self.tokens, self.positions, self.prompts, where, end = [], [], [], {}, 0
        starts, prompt_ends = [], []
        for tokens, length, key in zip(batch.tokens, batch.prompt_lengths, keys, strict=True):
            own, first, prompt = tokens, 0, -1
            if key is not None:
                if key not in where:
                    where[key] = len(self.tokens), end + int(length) - 1
                    end = self._add(tokens[:length], 0, -1, end)
                own, first, prompt = tokens[length:], int(length), where[key][0]
            starts.append(end - first)
            prompt_ends.append(where[key][1] if key is not None else end + int(length) - 1)
            if len(own):
                end = self._add(own, first, prompt, end)
        self.starts, self.prompt_ends = np.array(starts), np.array(prompt_ends)

    def _add(self, tokens: np.ndarray, first: int, prompt: int, end: int) -> int:
        self.tokens.append(tokens)
        self.positions.append(first + np.arange(len(tokens)))
        self.prompts.append(prompt)
        return end + len(tokens)


def micro_batch(batch: TokenBatch, inputs: ModelInputs, tokens: int, sequences: int) -> MicroBatch:
    """The loss's view of a micro-batch; `tokens` and `sequences` count the global batch."""
    device = inputs.reads.device
    mask = torch.zeros(inputs.shape, dtype=torch.bool, device=device).index_put(
        (inputs.rows, inputs.columns), torch.ones((), dtype=torch.bool, device=device)
    )
    columns = {}
    for name, column in batch.per_token.items():
        flat = torch.as_tensor(np.concatenate(column), device=device)
        columns[name] = inputs.grid(flat)
    for name, column in batch.per_sequence.items():
        columns[name] = torch.as_tensor(np.ascontiguousarray(column), device=device)
    return MicroBatch(mask, columns, tokens, sequences)


def attention_for(layout: str, config: PretrainedConfig) -> str:
    """The transformers attention of a layout, for a model of this configuration, judged by what its class declares; what a declaration
    does not tell, `layout.settle` finds when the model is loaded. ModelError if the model cannot be packed."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    if layout == "padded":
        return "sdpa" if model._supports_sdpa else "eager"
    if reason := why_not_packed(model):
        raise ModelError(f'a {config.model_type} cannot be packed ({reason}): set layout = "auto" or layout = "padded"')
    return SEGMENTS


class PolicyModule(nn.Module):
    """A causal LM whose forward returns logprobs and entropy of the scored tokens, chunked over the vocabulary.

    The head is applied inside forward, which is where ZeRO-3 gathers its weight; and forward returns a tuple, because ZeRO-3 looks
    for tensors in tuples to know when to gather again for the backward. `outputs_type` gives the tuple its names. full_logits: the
    model's own logits are used, right for every head; `layout.settle` clears it where they are the head's outputs and nothing more.
    """

    outputs_type = TokenOutputs

    def __init__(self, model: nn.Module, temperature: float):
        super().__init__()
        self.model = model
        self.temperature = temperature
        self.full_logits = True

    @property
    def causal(self) -> PreTrainedModel:
        """The transformers model inside, without the adapter's wrapping."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def head_weights(self) -> list[nn.Parameter]:
        """What forward reads without calling the head itself: ZeRO-3 has to be told of them."""
        head = self.causal.get_output_embeddings()
        return [] if head is None else list(head.parameters())

    def forward(self, inputs: ModelInputs) -> tuple[Tensor, ...]:
        return self.read(inputs)[:2]

    def read(self, inputs: ModelInputs, states: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        """logprobs and entropy as [B, T], and with `states` the last hidden states [M, H] that they were read from."""
        if self.full_logits:
            output = inputs.run(self.causal, output_hidden_states=states)
            hidden = output.hidden_states[-1].flatten(0, 1)[inputs.reads] if states else None
            logits = output.logits.flatten(0, 1)[inputs.reads].float() / self.temperature
            log_probs = logits.log_softmax(-1)
            logprobs = log_probs.gather(1, inputs.targets[:, None]).squeeze(1)
            entropy = -(log_probs.detach().exp() * log_probs.detach()).sum(-1)
        else:
            hidden = inputs.run(self.causal.base_model).last_hidden_state.flatten(0, 1)[inputs.reads]
            head = self.causal.get_output_embeddings()
            logprobs, entropy = token_logprobs(
                hidden, head.weight, inputs.targets, temperature=self.temperature, bias_V=getattr(head, "bias", None)
            )
        return inputs.grid(logprobs), inputs.grid(entropy), hidden


class PolicyValueModule(PolicyModule):
    """A policy with a second head on its last hidden state, whose forward also returns the value of the state before each scored token.

    The head starts at zero and belongs to training alone: it is in checkpoints, and in no exported model.
    """

    outputs_type = PolicyValueOutputs

    def __init__(self, model: nn.Module, temperature: float):
        super().__init__(model, temperature)
        self.value_head = nn.Linear(self.causal.config.get_text_config().hidden_size, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(self, inputs: ModelInputs) -> tuple[Tensor, Tensor, Tensor]:
        logprobs_BT, entropy_BT, hidden_MH = self.read(inputs, states=True)
        values_M = self.value_head(hidden_MH.to(self.value_head.weight.dtype)).squeeze(-1)
        return logprobs_BT, entropy_BT, inputs.grid(values_M.float())


class ValueModule(nn.Module):
    """A token classifier with one output whose forward returns the value of the state before each scored token (a tuple of one)."""

    outputs_type = ValueOutputs

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    @property
    def causal(self) -> PreTrainedModel:
        """The transformers model inside, without the adapter's wrapping."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def forward(self, inputs: ModelInputs) -> tuple[Tensor]:
        values = inputs.run(self.causal).logits.flatten(0, 1)[inputs.reads, 0]
        return (inputs.grid(values.float()),)


class RewardModule(nn.Module):
    """A sequence classifier with one output whose forward returns the raw score of each sequence (a tuple of one [B]).

    A row's scored tokens are the response's. token_types: whether the model reads which of two texts a token belongs to; then these
    are the second text. The layout is padded: each architecture pools a row in its own way.
    """

    def __init__(self, model: nn.Module, token_types: bool):
        super().__init__()
        self.model = model
        self.token_types = token_types

    @property
    def causal(self) -> PreTrainedModel:
        """The transformers model inside, without the adapter's wrapping."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @staticmethod
    def outputs_type(scores_B: Tensor) -> Tensor:
        """The objective of reward models takes the scores as they are."""
        return scores_B

    def forward(self, inputs: ModelInputs) -> tuple[Tensor]:
        ids, types = inputs.model["input_ids"], None
        if self.token_types:
            types = torch.zeros_like(ids).flatten().index_fill(0, inputs.reads + 1, 1).view_as(ids)
        return (raw_scores(self.causal, ids, inputs.model["attention_mask"], types, self.model),)
