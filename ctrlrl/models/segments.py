"""Attention within the segments of one packed row, by each layer's own mask: causal, a sliding window, chunks; with sinks and soft caps.

transformers asks a registered function for the mask of each kind of layer and hands what it returns to every attention of that kind.
Here this is a Pattern: the segments of the row, and which of the tokens before it a token sees, read off the model's own mask. So a
model whose masks are made elsewhere, or are of another kind, is an error and never packed by mistake.

Legend: N tokens of the row, n of a segment, H heads, D width of a head.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING, AttentionMaskInterface

from ctrlrl.errors import ModelError

SEGMENTS = "ctrlrl_segments"
_BLOCK = 1024  # rows of a mask looked at together
# What models hand to every attention function and only others act on: a mask or the positions say the same, or it asks for side outputs.
_REDUNDANT = {"is_causal", "position_ids", "position_embeddings", "cache_position", "use_cache", "cache", "deterministic"}


@dataclass(frozen=True)
class Segments:
    """The segments of a packed row. lengths: tokens of each; starts [B + 1], int32 on the row's device: where each begins, and N.

    prompts: for each segment the number of an earlier one that its tokens go on from (the prompt that several responses share), or -1;
    empty if all are -1.
    """

    lengths: list[int]
    starts: Tensor
    prompts: tuple[int, ...] = ()

    @property
    def before(self) -> list[int]:
        """Tokens of each segment's sequence that stand in another segment."""
        return [self.lengths[p] if p >= 0 else 0 for p in self.prompts] or [0] * len(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(n + before for n, before in zip(self.lengths, self.before, strict=True))

    def sequences(self, states_HN: Tensor) -> list[Tensor]:
        """Of states [1, H, N, D], those of each segment's whole sequence."""
        parts = states_HN.split(self.lengths, 2)
        if not self.prompts:
            return list(parts)
        return [part if p < 0 else torch.cat([parts[p], part], 2) for p, part in zip(self.prompts, parts, strict=True)]


@dataclass(frozen=True)
class Pattern:
    """A token sees itself and the tokens of its segment before it: of these the last `window`, or those of its chunk of `chunk`."""

    segments: Segments
    window: int | None = None
    chunk: int | None = None

    def sees(self, reader: Tensor, read: Tensor) -> Tensor:
        """Whether the token at `reader` sees that at `read`, by their positions (they broadcast)."""
        seen = read <= reader
        if self.window:
            seen = seen & (read > reader - self.window)
        if self.chunk:
            seen = seen & (read // self.chunk == reader // self.chunk)
        return seen

    def __getattr__(self, name: str):
        """What models do with masks of their own: none of it can be done with this."""
        kind = AttributeError if name.startswith("__") else ModelError
        raise kind(f"the model works on its attention masks itself ({name})")

    def limits(self, length: int) -> bool:
        """Whether it hides any earlier token in a segment of `length`."""
        return any(limit is not None and limit < length for limit in (self.window, self.chunk))

    def mask(self, length: int, before: int, device: torch.device) -> Tensor:
        """[n, before + n], true where a row's token sees a column's, of which the first `before` are in another segment."""
        places = torch.arange(before + length, device=device)
        return self.sees(places[before:, None], places[None])


_row: ContextVar[Segments | None] = ContextVar("segments of the row under way", default=None)


@contextmanager
def packed_row(segments: Segments | None) -> Iterator[None]:
    """Forwards inside see these segments (None: not a packed row)."""
    token = _row.set(segments)
    try:
        yield
    finally:
        _row.reset(token)


def _read_mask(
    *, batch_size: int, q_length: int, kv_length: int, mask_function: Callable, device, local_size: int | None = None, **_
) -> Pattern:
    """The model's mask as a Pattern; ModelError if it is none. local_size: the width of windows or chunks, as transformers says it."""
    segments = _row.get()
    if segments is None or batch_size != 1 or not q_length == kv_length == int(sum(segments.lengths)):
        raise ModelError(f"the model asks for a mask of {q_length} x {kv_length} tokens, which are not the packed ones")
    if segments.prompts:  # a segment that goes on from another may be too short to show its window
        kinds = [{"window": local_size}]
    else:
        kinds = [{}] if local_size is None else [{}, {"window": local_size}, {"chunk": local_size}]
    for kind in kinds:
        pattern = Pattern(segments, **kind)
        if all(_agree(pattern, mask_function, first, last) for first, last in _blocks(segments, device)):
            return pattern
    raise ModelError("a layer's attention is neither causal nor of a sliding window or chunks")


def _blocks(segments: Segments, device) -> Iterator[tuple[Tensor, Tensor]]:
    """Places in the row of some tokens, and of all tokens of their segment."""
    start = 0
    for length in segments.lengths:
        places = torch.arange(start, start + length, device=device)
        yield from ((part, places) for part in places.split(_BLOCK))
        start += length


def _agree(pattern: Pattern, mask_function: Callable, readers: Tensor, read: Tensor) -> bool:
    """Whether pattern and mask are one, by places in the row (as the model numbers them: the chunks of a segment begin with it)."""
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=read.device)
    readers, read = readers[None, None, :, None], read[None, None, None]
    return bool((mask_function(zero, zero, readers, read) == pattern.sees(readers, read)).all())


def _segment_attention(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, sliding_window=None, softcap=None, s_aux=None, **others
):
    """Attention of one packed row, [1, H, N, D], as `attention_mask` (a Pattern) says; s_aux [H]: sinks; softcap: of the scores.

    Half precision on CUDA takes PyTorch's variable-length flash attention where that can do it; anything else one call a segment, the
    fastest exact form measured on CPU. ModelError for what is asked beyond.
    """
    pattern = attention_mask
    if not isinstance(pattern, Pattern):
        raise ModelError("the model makes its attention masks in a way of its own")
    asked = [n for n, v in others.items() if n not in _REDUNDANT and not n.startswith("output_") and v is not None and v is not False]
    if dropout:
        asked.append("dropout")
    if sliding_window is not None and sliding_window != pattern.window and pattern.segments.longest > sliding_window:
        asked.append("sliding_window")  # its mask says something else
    if asked:
        raise ModelError(f"its attention asks for {', '.join(asked)}")
    flash = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and s_aux is None and softcap is None
    if flash and pattern.chunk is None and query.shape[-1] == value.shape[-1] <= 256:
        return _flash_attention(query, key, value, scaling, pattern), None
    row = pattern.segments
    shapes = list(zip(row.lengths, row.before, strict=True))
    special = s_aux is not None or softcap is not None
    masks = {(n, p): pattern.mask(n, p, query.device) for n, p in set(shapes) if special or p or pattern.limits(n)}
    parts = zip(query.split(row.lengths, 2), row.sequences(key), row.sequences(value), shapes, strict=True)
    if special:
        seen = [_attend_by_scores(q, k, v, masks[shape], scaling, softcap, s_aux) for q, k, v, shape in parts]
    else:
        seen = [_attend(q, k, v, masks.get(shape), scaling) for q, k, v, shape in parts]
    return torch.cat(seen, 2).transpose(1, 2).contiguous(), None


def _attend(query, key, value, mask, scaling) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped)


def _attend_by_scores(query, key, value, mask, scaling, softcap, s_aux) -> Tensor:
    """One segment with capped scores or sinks: one more score a row that takes its share of the softmax and has no value."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query @ key.transpose(2, 3)).float() * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if s_aux is not None:
        scores = torch.cat([scores, s_aux.float().view(1, -1, 1, 1).expand(1, -1, scores.shape[2], 1)], -1)
    return scores.softmax(-1)[..., : key.shape[2]].to(value.dtype) @ value


def _flash_attention(query, key, value, scaling, pattern: Pattern) -> Tensor:
    """Of one packed row, heads before tokens [1, H, N, D]; returns [1, N, H, D]."""
    row = pattern.segments
    starts = read = row.starts
    if row.prompts:  # the last of the tokens read is the last of the readers: so the kernel aligns them
        key, value = (torch.cat(row.sequences(states), 2) for states in (key, value))
        read = F.pad(torch.tensor([n + p for n, p in zip(row.lengths, row.before, strict=True)]).cumsum(0), (1, 0)).to(starts)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    window = (-1, 0) if pattern.window is None else (pattern.window - 1, 0)  # how many before a token, how many after it
    grouped = q.shape[1] != k.shape[1]
    return varlen_attn(
        q, k, v, starts, read, max(row.lengths), row.longest, scale=scaling, window_size=window, enable_gqa=grouped
    )[None]


AttentionInterface.register(SEGMENTS, _segment_attention)
AttentionMaskInterface.register(SEGMENTS, _read_mask)


def why_not_packed(model: PreTrainedModel) -> str | None:
    """What the model itself declares that forbids packing: state along the sequence, attention of its own; None if nothing."""
    if any(part._is_stateful for part in model.modules() if hasattr(part, "_is_stateful")):
        return "its layers carry state along the sequence"
    if any(isinstance(part, nn.Conv1d) for part in model.modules()):
        return "its layers convolve along the sequence"
    strange = _strange_layers(model.config.get_text_config())
    return strange or (None if model._supports_attention_backend else "its class does not support attention from outside")


def why_not_shared(model: PreTrainedModel) -> str | None:
    """What the model itself declares that forbids sharing a prompt in a packed row; None if nothing."""
    config = model.config.get_text_config()
    chunked = getattr(config, "attention_chunk_size", None) or "chunked_attention" in (getattr(config, "layer_types", None) or ())
    return why_not_packed(model) or ("its attention is in chunks, which do not go on from a shared prompt" if chunked else None)


def _strange_layers(config: PretrainedConfig) -> str | None:
    kinds = {"full_attention", "sliding_attention", "chunked_attention"}
    strange = sorted(set(getattr(config, "layer_types", None) or ()) - kinds)
    known = all(kind in LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING for kind in strange)
    return f"it has layers of {'another' if known else 'an unknown'} kind: {', '.join(strange)}" if strange else None
