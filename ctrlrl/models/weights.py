"""Weights as one message: what the trainer publishes and the rollout workers load.

numpy has no bfloat16, so such tensors travel as uint16 views; readers must copy from the arrays, which are shared and read-only.
"""

import hashlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ctrlrl.models.loading import DTYPES


@dataclass(frozen=True)
class WeightMessage:
    """All weights of a model under their transformers names, in one dtype, and the policy version they make."""

    version: int
    dtype: str
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    arrays: tuple[np.ndarray, ...]

    @property
    def nbytes(self) -> int:
        """Size of the payload in bytes."""
        return sum(a.nbytes for a in self.arrays)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) pairs over the shared memory: copy from them, never write to them."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # on purpose: torch has no read-only tensors
            flats = [torch.from_numpy(array) for array in self.arrays]
        for name, shape, flat in zip(self.names, self.shapes, flats, strict=True):
            yield name, (flat.view(torch.bfloat16) if self.dtype == "bfloat16" else flat).view(shape)


def pack_weights(named: Iterator[tuple[str, Tensor]], dtype: str, version: int) -> WeightMessage:
    """Cast to `dtype`, move to the host, and make one message."""
    names, shapes, arrays = [], [], []
    for name, tensor in named:
        flat = tensor.detach().to("cpu", DTYPES[dtype]).contiguous().view(-1)
        names.append(name)
        shapes.append(tuple(tensor.shape))
        arrays.append((flat.view(torch.uint16) if dtype == "bfloat16" else flat).numpy())
    return WeightMessage(version, dtype, tuple(names), tuple(shapes), tuple(arrays))


def full_weights(model: nn.Module, gather: Callable[[list[Tensor]], AbstractContextManager] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of a transformers or peft model as an ordinary checkpoint names it; LoRA is merged, the model is not changed.

    gather: makes partitioned (ZeRO-3) parameters whole while its context lasts; then all ranks must iterate together.
    """
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        if ".lora_" in name or ".modules_to_save." in name:
            continue
        owner = modules.get(name.removesuffix(".base_layer.weight")) if name.endswith(".base_layer.weight") else None
        needed = [parameter, *(owner.parameters() if owner is not None else ())]
        with gather(needed) if gather else nullcontext():
            full = parameter.detach()
            if owner is not None:
                full = full + sum(owner.get_delta_weight(adapter).to(full.dtype) for adapter in owner.active_adapters)
            yield name.removeprefix("base_model.model.").replace(".base_layer.", "."), full.clone() if gather else full


def fingerprint(named: Iterator[tuple[str, Tensor]]) -> str:
    """SHA-256 over names and bytes, 16 hex digits; equal exactly when the weights are."""
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
