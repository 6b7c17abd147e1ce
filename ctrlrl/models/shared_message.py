"""A WeightMessage where other processes of this machine read it without a copy of their own: in a file that has no name and ends with its
owner."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from ctrlrl.models.weights import WeightMessage, offsets

Row = tuple[str, tuple[int, ...], str, int, int]  # name, shape, numpy's name of the dtype, first byte, bytes


@dataclass(frozen=True)
class Shelf:
    """Where a message lies. path: valid while its owner keeps it there."""

    path: str
    version: int
    dtype: str
    rows: tuple[Row, ...]

    def message(self) -> WeightMessage:
        """The message, over the shared memory: nobody writes to it."""
        content = np.memmap(self.path, np.uint8, "r")
        arrays = tuple(np.frombuffer(content[first : first + size], kind) for _, _, kind, first, size in self.rows)
        return WeightMessage(self.version, self.dtype, tuple(row[0] for row in self.rows), tuple(row[1] for row in self.rows), arrays)


@contextmanager
def shared(message: WeightMessage) -> Iterator[Shelf]:
    """The message for others, while the context lasts; those who have it open keep it."""
    firsts, size = offsets(message.arrays)
    told = zip(message.names, message.shapes, message.arrays, firsts, strict=True)
    rows = tuple((name, shape, array.dtype.str, first, array.nbytes) for name, shape, array, first in told)
    file, path, content = nameless_file(size)
    try:
        for (_, _, kind, first, taken), array in zip(rows, message.arrays, strict=True):
            content[first : first + taken].view(kind)[:] = array
        yield Shelf(path, message.version, message.dtype, rows)
    finally:
        os.close(file)


def nameless_file(size: int) -> tuple[int, str, np.ndarray]:
    """Memory that others can open while this process has it open: its descriptor, the path for others, and its bytes."""
    file = os.memfd_create("ctrlrl-weights")
    os.ftruncate(file, size)
    path = f"/proc/{os.getpid()}/fd/{file}"
    return file, path, np.memmap(path, np.uint8, "r+")
