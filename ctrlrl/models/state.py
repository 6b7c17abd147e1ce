"""A training's state on disk: for every trained parameter, by name, its fp32 weights and Adam's two moments.

Each rank writes the pieces that it owns, in safetensors; `trainer.json`, written last, says which piece lies where and holds the hashes.
Reading runs no code, and any number of ranks at any ZeRO stage takes the pieces that it needs from files that others wrote. Random
generators have no part in a step (there is no dropout), and frozen weights are those of the model's own directory.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ctrlrl.config import Section
from ctrlrl.data.atomic import file_sha256, write_text
from ctrlrl.data.disk import disk_told
from ctrlrl.errors import RunError

INDEX = "trainer.json"
_WEIGHT, _MOMENTS = "weight", ("exp_avg", "exp_avg_sq")


class Parameter(Section):
    """A trained parameter. adam_step: steps in which it had a gradient; None before the first of them."""

    shape: tuple[int, ...]
    adam_step: float | None


class Shard(Section):
    """One rank's file. pieces: (first element, number of elements) in the flattened parameter of that name."""

    sha256: str
    pieces: dict[str, tuple[int, int]]


class Index(Section):
    """Content of trainer.json, which also holds the `checksum` of the rest."""

    steps: int = Field(ge=0)
    optimizer: str
    parameters: dict[str, Parameter]
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + length) of a flattened parameter. They lie at `offset` in `flat`, an fp32 tensor of the optimiser."""

    name: str
    shape: tuple[int, ...]
    start: int
    length: int
    flat: Tensor
    offset: int

    def of(self, whole: Tensor) -> Tensor:
        """The piece's elements of `flat`, or of a moment of the same layout, as a view."""
        return whole.detach().view(-1).narrow(0, self.offset, self.length)


def pieces_of(engine) -> Iterator[Piece]:
    """This rank's pieces of a DeepSpeed engine's trained parameters. At stage 0 every rank has all of them whole."""
    optimizer, stage, rank = engine.optimizer, engine.zero_optimization_stage(), torch.distributed.get_rank()
    trained = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
    if stage == 0:  # in bf16 the optimiser steps copies
        copies = {id(p): copy for p, copy in _bf16_copies(optimizer)}
        for name, p in trained:
            yield Piece(name, tuple(p.shape), 0, p.numel(), copies.get(id(p), p), 0)
    for name, p in trained if stage in (1, 2) else ():
        if p._hp_mapping is not None:
            mapping, here, there = p._hp_mapping, p._hp_mapping.lp_fragment_address, p._hp_mapping.hp_fragment_address
            flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
            yield Piece(name, tuple(p.shape), here.start, here.numel, flat, there.start)
    for name, p in trained if stage == 3 else ():
        group, offset, size = optimizer.grad_position[optimizer.get_param_id(p)]
        length = min(size, p.ds_numel - rank * size)  # the last ranks' parts are padded
        if length > 0:
            yield Piece(name, tuple(p.ds_shape), rank * size, length, optimizer.fp32_partitioned_groups_flat[group], offset)


def save_state(engine, directory: Path, steps: int) -> None:
    """Write what `load_state` needs into `directory`; collective."""
    rank, world, states = torch.distributed.get_rank(), torch.distributed.get_world_size(), engine.basic_optimizer.state
    mine, adam_steps, tensors = list(pieces_of(engine)), {}, {}
    if engine.zero_optimization_stage() == 0:
        mine = mine[rank::world]
    for piece in mine:
        state = states.get(piece.flat, {})
        adam_steps[piece.name] = float(state["step"]) if state else None
        tensors[f"{_WEIGHT}/{piece.name}"] = piece.of(piece.flat).cpu()
        tensors |= {f"{moment}/{piece.name}": piece.of(state[moment]).cpu() for moment in _MOMENTS if state}
    path = directory / _file(rank)
    with disk_told(path):
        directory.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path)
    found = {p.name: Parameter(shape=p.shape, adam_step=adam_steps[p.name]) for p in mine}
    shard = Shard(sha256=file_sha256(path), pieces={p.name: (p.start, p.length) for p in mine})
    everywhere: list[tuple[dict[str, Parameter], Shard]] = [None] * world
    torch.distributed.all_gather_object(everywhere, (found, shard))
    if rank == 0:
        parameters = {name: parameter for found, _ in everywhere for name, parameter in found.items()}
        index = Index(steps=steps, optimizer=_kind(engine), parameters=parameters, shards=tuple(shard for _, shard in everywhere))
        write_checked(directory / INDEX, index.model_dump(mode="json"))


def load_state(engine, directory: Path) -> int:
    """Put the state in `directory` into the engine, whatever number of ranks and ZeRO stage wrote it; returns the steps done. Collective.

    RunError: a file is damaged or missing, or the state is of another model, LoRA rank or optimiser.
    """
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    index, mine = read_index(directory), list(pieces_of(engine))
    _check_same_model(engine, index, directory)
    for number in range(rank, len(index.shards), world):  # every rank checks its share; the job waits for all of them
        _check_content(directory / _file(number), index.shards[number])
    files = [_Shard(directory / _file(number), shard) for number, shard in enumerate(index.shards)]
    states = engine.basic_optimizer.state
    adam_step = max((p.adam_step for p in index.parameters.values() if p.adam_step is not None), default=None)
    for piece in mine:
        whole = piece.length == len(piece.flat.view(-1))  # a tensor of its own (stage 0), else part of one that holds many parameters
        step = index.parameters[piece.name].adam_step if whole else adam_step
        _fill(piece.of(piece.flat), _WEIGHT, piece, files, directory)
        if step is None:
            states.pop(piece.flat, None)
            continue
        state = states[piece.flat]
        state["step"] = torch.tensor(step, dtype=torch.float32, device=piece.flat.device)
        for moment in _MOMENTS:
            if moment not in state:
                state[moment] = torch.zeros_like(piece.flat)
            if index.parameters[piece.name].adam_step is not None:
                _fill(piece.of(state[moment]), moment, piece, files, directory)
    _refresh(engine)
    return index.steps


def read_index(directory: Path) -> Index:
    """The content of trainer.json; RunError if it is damaged."""
    try:
        return Index.model_validate(read_checked(directory / INDEX))
    except ValidationError as error:
        raise damaged(directory / INDEX, error) from None


def write_checked(path: Path, content: dict) -> None:
    """Write `content` as JSON together with its checksum."""
    write_text(path, json.dumps(content | {"checksum": _checksum(content)}) + "\n")


def read_checked(path: Path) -> dict:
    """What `write_checked` wrote, or an earlier version without a checksum; RunError if it is damaged."""
    try:
        content = json.loads(path.read_text())
        if content.pop("checksum", None) not in (None, _checksum(content)):
            raise ValueError("its content does not match its checksum")
        return content
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise damaged(path, error) from None


def damaged(path: Path, error: object) -> RunError:
    """What to say of a checkpoint's file that cannot be used."""
    checkpoint = next((parent.name for parent in path.parents if parent.name.startswith("step-")), "this")
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return RunError(f"{path} is damaged: {reason}: restore it, or have checkpoints/latest name another checkpoint than {checkpoint}")


class _Shard:
    """A shard's file, open for reading parts of it."""

    def __init__(self, path: Path, shard: Shard):
        self.path, self.pieces = path, shard.pieces
        try:
            self.file = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise damaged(path, error) from None

    def copy(self, target: Tensor, kind: str, piece: Piece) -> int:
        """Copy what this file has of a piece into `target`; returns how many elements it had."""
        start, length = self.pieces.get(piece.name, (0, 0))
        first, last = max(start, piece.start), min(start + length, piece.start + piece.length)
        if first >= last:
            return 0
        try:
            part = self.file.get_slice(f"{kind}/{piece.name}")
            target[first - piece.start : last - piece.start].copy_(part[first - start : last - start])
        except (SafetensorError, RuntimeError) as error:
            raise damaged(self.path, error) from None
        return last - first


def _fill(target: Tensor, kind: str, piece: Piece, files: list[_Shard], directory: Path) -> None:
    found = sum(file.copy(target, kind, piece) for file in files)
    if found != piece.length:
        raise damaged(directory / INDEX, f"it has {found} of the {piece.length} elements of {piece.name}")


def _check_content(path: Path, shard: Shard) -> None:
    try:
        found = file_sha256(path)
    except OSError as error:
        raise damaged(path, error) from None
    if found != shard.sha256:
        raise damaged(path, "its content does not match its hash")


def _check_same_model(engine, index: Index, directory: Path) -> None:
    """RunError, which names the first difference, unless the state is of the engine's own parameters and optimiser."""
    own = {n: tuple(getattr(p, "ds_shape", p.shape)) for n, p in engine.module.named_parameters() if p.requires_grad}
    stored = {name: parameter.shape for name, parameter in index.parameters.items()}
    others = [f"{n} is {_shown(stored.get(n))} there and {_shown(own.get(n))} here" for n in own | stored if own.get(n) != stored.get(n)]
    if index.optimizer != _kind(engine):
        others.insert(0, f"the optimiser is {index.optimizer} there and {_kind(engine)} here")
    if others:
        more = f" (and {len(others) - 1} more differences)" if len(others) > 1 else ""
        raise RunError(f"{directory / INDEX} is of another training: {others[0]}{more}: resume with the model and the recipe that wrote it")


def _shown(shape: tuple[int, ...] | None) -> str:
    return "not trained" if shape is None else f"of shape {list(shape)}"


def _refresh(engine) -> None:
    """Have the weights that the model computes with follow the fp32 ones that the optimiser steps; collective."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 0:
        for parameter, copy in _bf16_copies(optimizer):
            parameter.data.copy_(copy.data)
    elif stage < 3:
        optimizer.update_lp_params()
    else:
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:  # small ones, which every rank keeps whole: they take their new parts
            optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def _bf16_copies(optimizer) -> list[tuple[Tensor, Tensor]]:
    """(parameter, its fp32 copy) at stage 0 in bf16; empty where the parameters themselves are stepped."""
    groups = zip(getattr(optimizer, "fp16_groups", ()), getattr(optimizer, "fp32_groups", ()), strict=True)
    return [pair for parameters, copies in groups for pair in zip(parameters, copies, strict=True)]


def _kind(engine) -> str:
    return type(engine.basic_optimizer).__name__


def _file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _checksum(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
