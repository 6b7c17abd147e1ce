"""Weights to a rollout engine on the trainer's own device, which they do not leave: bucket by bucket, through memory that both processes
have open.

On a GPU that is another process's memory on it (CUDA IPC, as PyTorch has it), on processors a file without a name. The engine's process
copies a bucket before it says that it has it, and the trainer fills the same memory with the next one: the device has two buckets more,
and never the whole model once more. Each rank of the trainer serves the engine beside it.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ctrlrl.models.broadcast import bucketfuls
from ctrlrl.models.shared_message import nameless_file
from ctrlrl.models.weights import device_weights_of, offsets

Row = tuple[str, tuple[int, ...], torch.dtype, int]  # name, shape, dtype, first byte in the bucket


@dataclass(frozen=True)
class Bucket:
    """What a rank has laid out. handle: of the memory, for other processes of this device; first, last: of these weights."""

    version: int
    handle: tuple
    rows: tuple[Row, ...]
    first: bool
    last: bool


@dataclass(frozen=True)
class Part:
    """A bucket that was copied: tensors on the engine's device."""

    version: int
    named: tuple[tuple[str, Tensor], ...]
    first: bool
    last: bool

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return sum(tensor.nbytes for _, tensor in self.named)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) pairs."""
        return iter(self.named)


class Giver:
    """A rank's part."""

    def __init__(self):
        self._buckets: Iterator[Bucket] = iter(())
        self._memory: _Memory | None = None

    def begin(self, weights: Iterator[tuple[str, Tensor]], version: int, size: int, device: torch.device) -> None:
        """From now on the weights of `version`, in buckets of `size` bytes, or of one tensor that has more."""
        self._buckets = self._laid_out(weights, version, size, device)

    def next(self) -> Bucket:
        """The next bucket, valid until the one after it, or until `end`."""
        return next(self._buckets)

    def end(self) -> None:
        """Give the memory back."""
        self._buckets, self._memory = iter(()), None

    def _laid_out(self, weights, version: int, size: int, device: torch.device) -> Iterator[Bucket]:
        parts = bucketfuls(((name, tuple(tensor.shape), tensor) for name, tensor in weights), size)
        coming, first = next(parts), True
        while coming:
            firsts, filled = offsets(row[2] for row in coming)
            rows = tuple((name, shape, tensor.dtype, at) for (name, shape, tensor), at in zip(coming, firsts, strict=True))
            if self._memory is None or self._memory.size < filled:
                self._memory = None  # before there is another
                self._memory = _Memory(max(filled, size), device)
            for (_, view), (_, _, tensor) in zip(_views(rows, self._memory.content), coming, strict=True):
                view.copy_(tensor)
            del tensor
            coming = next(parts, None)  # with partitioned weights, all ranks gather it
            if device.type == "cuda":
                torch.cuda.synchronize()
            yield Bucket(version, self._memory.handle(), rows, first, coming is None)
            first = False


def give(trainer, dtype: str, version: int, size: int, begin: bool) -> Bucket:
    """On every rank: the next bucket of its weights in `dtype`, or the first one. Collective where they are partitioned."""
    if begin:
        weights = device_weights_of(trainer.module.model, dtype, trainer.gatherer())
        trainer.giver.begin(weights, version, size, trainer.device)
    return trainer.giver.next()


def gave(trainer) -> None:
    """On every rank: all have taken what they were given."""
    trainer.giver.end()


def taken(bucket: Bucket) -> Part:
    """A copy of a bucket, in this process's memory of the device."""
    content = _opened(bucket.handle).clone()
    if content.is_cuda:
        torch.cuda.synchronize()  # the copy is made: the memory may be filled again
    return Part(bucket.version, tuple(_views(bucket.rows, content)), bucket.first, bucket.last)


def device_name() -> str:
    """Of this process's device; two processes that give the same name can hand memory over: the GPU's own, or on processors that of the
    machine, or container."""
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"


def device_of(_trainer) -> str:
    """On every rank: `device_name`."""
    return device_name()


class _Memory:
    """Bytes that another process on this device can open."""

    def __init__(self, size: int, device: torch.device):
        self.size = size
        if device.type == "cuda":
            from torch.multiprocessing.reductions import reduce_tensor

            self.content = torch.empty(size, dtype=torch.uint8, device=device)
            # Anew for each bucket: PyTorch counts who opens it, once for each that was told.
            self.handle = lambda: reduce_tensor(self.content)[1]
        else:
            self._file, path, content = nameless_file(size)
            self.content, self.handle = torch.from_numpy(content), lambda: (path,)

    def __del__(self):
        if hasattr(self, "_file"):
            os.close(self._file)


def _opened(handle: tuple) -> Tensor:
    if isinstance(handle[0], str):
        return torch.from_numpy(np.memmap(handle[0], np.uint8, "c"))  # copied on a write, which does not come: torch has no read-only
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    return rebuild_cuda_tensor(*handle[:6], torch.cuda.current_device(), *handle[7:])  # its number in this process


def _views(rows, content: Tensor) -> Iterator[tuple[str, Tensor]]:
    for name, shape, dtype, first in rows:
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        yield name, content[first : first + size].view(dtype).view(shape)
