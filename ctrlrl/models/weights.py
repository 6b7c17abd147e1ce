"""Weights as one message: what the trainer publishes and the rollout workers load.

numpy has no bfloat16, so such tensors travel as uint16 views; readers must copy from the arrays, which are shared and read-only.
"""

import hashlib
import re
import warnings
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)

from ctrlrl.models.loading import DTYPES

Gather = Callable[[list[Tensor]], AbstractContextManager]
_TRAINED_BESIDE = re.compile(r"\.modules_to_save\.[^.]+\.")


@dataclass(frozen=True)
class WeightMessage:
    """All weights of a model as its checkpoint files name them, parameters in one dtype, and the policy version they make."""

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
            yield name, (flat.view(torch.bfloat16) if flat.dtype == torch.uint16 else flat).view(shape)


_ALIGNED = 64  # bytes: where each tensor of several in one piece of memory begins


def offsets(values: Iterable[np.ndarray | Tensor]) -> tuple[list[int], int]:
    """Where in one piece of memory each of several tensors begins, and the bytes that it takes."""
    ends = [0, *accumulate(-(-value.nbytes // _ALIGNED) * _ALIGNED for value in values)]
    return ends[:-1], ends[-1]


# Name, shape and flat values of a tensor, on the host; bfloat16 as uint16.
Packed = Iterator[tuple[str, tuple[int, ...], np.ndarray]]


def cast(named: Iterator[tuple[str, Tensor]], dtype: str, exact: Collection[str] = ()) -> Iterator[tuple[str, Tensor]]:
    """Each tensor in `dtype` (but for what counts in whole numbers, and those named in `exact`), on its device."""
    for name, tensor in named:
        changes = tensor.is_floating_point() and name not in exact
        yield name, tensor.detach().to(DTYPES[dtype] if changes else tensor.dtype)


def packed(named: Iterator[tuple[str, Tensor]], dtype: str, exact: Collection[str] = ()) -> Packed:
    """The same moved to the host."""
    return _on_host(cast(named, dtype, exact))


def _on_host(named: Iterator[tuple[str, Tensor]]) -> Packed:
    for name, tensor in named:
        flat = tensor.to("cpu").contiguous().view(-1)
        yield name, tuple(tensor.shape), (flat.view(torch.uint16) if flat.dtype == torch.bfloat16 else flat).numpy()


def pack_weights(
    named: Iterator[tuple[str, Tensor]], dtype: str, version: int, exact: Collection[str] = ()
) -> WeightMessage:
    """All of `packed` as one message."""
    return WeightMessage(version, dtype, *zip(*packed(named, dtype, exact), strict=True))


def model_weights(
    model: nn.Module, gather: Gather | None = None, merged: torch.dtype = torch.float32
) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and stored buffer of a transformers or peft model under its name in the model without adapters.

    Adapters are added in, in float32, and the sums rounded to `merged`; a module trained beside them stands in its own place; the model
    is not changed. gather: makes partitioned (ZeRO-3) parameters whole while its context lasts; then all ranks must iterate together.
    """
    for name, (tensor, adapted) in _stored(model).items():
        with gather([tensor, *(adapted.parameters() if adapted else ())]) if gather else nullcontext():
            if adapted:
                yield name, dithered(tensor.detach().float() + _update(adapted), merged, name)
            else:
                yield name, tensor.detach().clone() if gather else tensor.detach()


def full_weights(
    model: nn.Module, gather: Gather | None = None, merged: torch.dtype = torch.float32
) -> Iterator[tuple[str, Tensor]]:
    """model_weights in the names and shapes of the model's checkpoint files, which other engines read too: where the model has all
    experts in one tensor, the files may have each apart. Done for the tensors that belong together (save_pretrained: for all at once),
    so that the model is never there twice."""
    causal = _causal(model)
    group_of = {name: group for group in _groups(causal, list(_stored(model))) for name in group.patterns}
    for name, tensor in model_weights(model, gather, merged):
        group_of[name].have[name] = tensor
        if len(group_of[name].have) == len(group_of[name].patterns):
            yield from group_of[name].converted(causal)


def device_weights_of(model: nn.Module, dtype: str, gather: Gather | None = None) -> Iterator[tuple[str, Tensor]]:
    """full_weights in `dtype`, adapters merged, on the model's device; float32 buffers stay what they are."""
    return cast(full_weights(model, gather, DTYPES[dtype]), dtype, _exact_names(model))


def weights_of(model: nn.Module, dtype: str, gather: Gather | None = None) -> Packed:
    """The same on the host."""
    return _on_host(device_weights_of(model, dtype, gather))


def message_of(model: nn.Module, dtype: str, version: int, gather: Gather | None = None) -> WeightMessage:
    """weights_of as one message."""
    return WeightMessage(version, dtype, *zip(*weights_of(model, dtype, gather), strict=True))


def _exact_names(model: nn.Module) -> set[str]:
    """Names in the model's files of the float32 buffers that they hold: no weights, but what must not be rounded, such as the bias by
    which a router chooses its experts, whose steps (1e-3) are less than bfloat16 can tell apart above 0.25."""
    stored = _stored(model)
    kept = {name for name, (tensor, _) in stored.items() if not isinstance(tensor, nn.Parameter) and tensor.dtype == torch.float32}
    return {group.target for group in _groups(_causal(model), list(stored)) if kept >= group.patterns.keys()}


def dithered(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """`tensor` (float32) in `dtype`; bfloat16 is rounded up or down with the odds of what lies between, drawn by the tensor's name.

    A merged weight is one of bfloat16's numbers plus a small update: rounded to the nearest, an update below half a step always
    vanishes (with updates of 3e-5 on weights of 0.02, a third of the whole). So it stays, in the mean; a weight that did not move is
    left as it was, and the same weights always give the same bytes.
    """
    if dtype != torch.bfloat16:
        return tensor.to(dtype)
    draw = torch.Generator(tensor.device).manual_seed(zlib.crc32(name.encode()))
    below = torch.randint(2**16, tensor.shape, generator=draw, dtype=torch.int32, device=tensor.device)
    return ((tensor.contiguous().view(torch.int32) + below) & -(2**16)).view(torch.float32).to(dtype)


def _causal(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside, without the adapters' wrapping."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _stored(model: nn.Module) -> dict[str, tuple[Tensor, nn.Module | None]]:
    """What a checkpoint of a model without its adapters holds, by name: the tensor, and the adapted layer whose weight it is, if any."""
    modules, found = dict(model.named_modules()), {}
    for path, module in modules.items():
        tensors = [*module.named_parameters(recurse=False)]
        tensors += [(name, b) for name, b in module.named_buffers(recurse=False) if name not in module._non_persistent_buffers_set]
        for name, tensor in tensors:
            full = f"{path}.{name}"
            if ".lora_" in full or ".original_module." in full:
                continue  # the adapters themselves, and what a module trained beside them replaces
            plain = full.removeprefix(".").removeprefix("base_model.model.").replace(".base_layer", "")
            adapted = _adapted(modules, path, name)
            found[_TRAINED_BESIDE.sub(".", plain)] = tensor, adapted
    tied = {id(tensor): name for name, (tensor, _) in reversed(found.items())}  # of tied parameters the first name counts
    return {name: found[name] for name in found if tied[id(found[name][0])] == name}


def _adapted(modules: dict[str, nn.Module], path: str, name: str) -> nn.Module | None:
    """The adapted layer around the module at `path` whose weight is its parameter `name`. peft puts a layer around each adapted
    parameter of a module with several, one around the other."""
    while path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
        if getattr(modules[path], "parameter_name", "weight") == name:
            return modules[path]
    return None


def _update(adapted: nn.Module) -> Tensor:
    """What the active adapters add to the weight of their layer, in float32 (peft rounds it to the adapters' dtype)."""
    own = {parameter: parameter.data for name, parameter in adapted.named_parameters() if "lora_" in name}
    try:
        for parameter, data in own.items():
            parameter.data = data.float()
        return sum(adapted.get_delta_weight(adapter).detach() for adapter in adapted.active_adapters)
    finally:
        for parameter, data in own.items():
            parameter.data = data


@dataclass
class _Group:
    """Tensors of a model that make one or several tensors of its files. patterns: the transform's, for each of their names."""

    target: str
    transform: WeightTransform
    patterns: dict[str, str] = field(default_factory=dict)
    have: dict[str, Tensor] = field(default_factory=dict)

    def converted(self, model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the files; the group holds none afterwards."""
        for name, pattern in self.patterns.items():
            self.transform.add_tensor(self.target, name, pattern, self.have.pop(name))
        for name, made in self.transform.convert(self.target, model=model, config=model.config).items():
            yield name, made[0] if isinstance(made, list) else made


def _groups(model: PreTrainedModel, names: list[str]) -> list[_Group]:
    """How transformers writes the tensors `names` of a model to files: its revert_weight_conversion, for names alone."""
    transforms = getattr(model, "_weight_conversions", None)  # those of the files that it was read from
    if transforms is None:
        transforms = [t for t in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(t, PrefixChange)]
    reversed_ = [transform.reverse_transform() for transform in transforms[::-1]]
    renamings = [t for t in reversed_ if isinstance(t, WeightRenaming)]
    converters = [t for t in reversed_ if isinstance(t, WeightConverter)]
    of_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    groups = {}
    for name in sorted(names, key=dot_natural_key):  # a renaming may depend on those before it
        target, pattern = rename_source_key(name, renamings, converters, reverse=True)
        if target not in groups:
            groups[target] = _Group(target, deepcopy(of_pattern[pattern]) if pattern else WeightRenaming(name, target))
        groups[target].patterns[name] = pattern or name
    return list(groups.values())


def precise_buffers(module: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """Owner, name and value of a module's float32 buffers, which stay in float32 when its parameters do not. (At ZeRO stage 3 the model
    is read in the parameters' dtype already, and these are the ones that transformers keeps in float32 when it does that.)

    Rotary frequencies in bfloat16 are .2 % off: at position 500 a whole radian; transformers, too, keeps them as they are.
    """
    return [(m, name, b) for m in module.modules() for name, b in m.named_buffers(recurse=False) if b.dtype == torch.float32]


def fingerprint(named: Iterator[tuple[str, Tensor]]) -> str:
    """SHA-256 over names and bytes, 16 hex digits; equal exactly when the weights are."""
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def cast_parameters(module: nn.Module, dtype: str) -> None:
    """Weights in another dtype. Buffers keep theirs: rotary frequencies in bfloat16 would be wrong by more at every later position."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(DTYPES[dtype])
