"""How much memory a forward or a training step needs beside weights and their gradients, found without any: the module itself runs on
meta tensors, which have shapes and no data, and every storage that it makes is counted from its making to its end.

So it is what forward.py, transformers and peft really keep, checkpointing, adapters and chunked logits included. Attention alone is put
in by its shapes, as fused kernels keep it (query, key, value, result, one fp32 number a head and token, never the scores): which kernel
runs is decided by the device, and there is none here.
"""

import weakref

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from ctrlrl.models.forward import ModelInputs

COUNTED = "ctrlrl_counted"


class Meter(TorchDispatchMode):
    """Context that counts the bytes of tensors made inside, as they come and go. peak: the most that were there at once."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage(), given)
        return made

    def _count(self, storage, given: set[int]) -> None:
        key = storage._cdata
        if key in self._seen or key in given:
            return
        self._seen.add(key)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._end, key, storage.nbytes())

    def _end(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


class _Attention(torch.autograd.Function):
    """The tensors of a fused attention kernel, forward and backward, [1, H, N, D]."""

    @staticmethod
    def forward(ctx, query, key, value):
        out, normaliser = query.new_empty(*query.shape[:-1], value.shape[-1]), query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, normaliser)
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _counted_attention(module, query, key, value, attention_mask, **_):
    return _Attention.apply(query, key, value).transpose(1, 2).contiguous(), None


AttentionInterface.register(COUNTED, _counted_attention)
AttentionMaskInterface.register(COUNTED, lambda *_, **__: None)


def row_of(tokens: int) -> ModelInputs:
    """A micro-batch of one row in which all tokens but the first are scored, on the meta device."""
    with torch.device("meta"):
        reads, targets = torch.empty(tokens - 1, dtype=torch.long), torch.empty(tokens - 1, dtype=torch.long)
        ids = torch.empty(1, tokens, dtype=torch.long)
        model = {"input_ids": ids, "attention_mask": ids}  # without one, transformers looks for packed rows in what the positions hold
        return ModelInputs(model, reads, targets, torch.empty_like(reads), torch.empty_like(reads), (1, tokens - 1))


def training_peak(module: nn.Module, inputs: ModelInputs) -> int:
    """Bytes beside weights and accumulated gradients of one forward and backward of a module of forward.py, on the meta device.

    The gradient of a parameter that is about to be added to the accumulated one is in it."""
    module.train()
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
    with Meter() as meter:
        sum(output.float().sum() for output in module(inputs) if output.requires_grad).backward()
    return meter.peak


def forward_peak(module: nn.Module, inputs: ModelInputs) -> int:
    """Bytes beside weights of one forward without gradients."""
    module.eval()
    with torch.no_grad(), Meter() as meter:
        module(inputs)
    return meter.peak
