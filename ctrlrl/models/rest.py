"""A process that is not at work gives the memory of its device to others: what lies there moves to the host, and back into its place.

Whole storages move, so that whatever shares one goes on sharing it: parameters that are views of a flat buffer, gradients, moments. What is
there is found by Python's garbage collector, not by who is known to own it: an engine's buffers come along, whatever it calls them. On
processors the device is the host, and the same happens within its memory: for nothing, but tested.
"""

import gc

import torch
from torch import Tensor, UntypedStorage


class Rest:
    """What of this process is set aside, and where it belongs. device: that of this process's models, unless one is given."""

    def __init__(self, device: torch.device | None = None):
        self._device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._aside: list[tuple[UntypedStorage, Tensor]] = []

    def begin(self) -> int:
        """Set all tensors of the device aside, which nobody may read until `end`; bytes that the device has got back. Once more: 0."""
        if self._aside:
            return 0
        on_gpu = self._device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize()
        for storage in storages_on(self._device):
            kept = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=on_gpu)
            kept.copy_(_bytes_of(storage))
            storage.resize_(0)
            self._aside.append((storage, kept))
        if on_gpu:
            torch.cuda.empty_cache()
        return sum(kept.numel() for _, kept in self._aside)

    def end(self) -> None:
        """Put all of it back to the byte; nothing where nothing is set aside."""
        while self._aside:
            storage, kept = self._aside.pop()
            storage.resize_(kept.numel())
            _bytes_of(storage).copy_(kept)


def storages_on(device: torch.device) -> list[UntypedStorage]:
    """The storages of all tensors that this process has on a device of this type, each once; without those whose size is not torch's to
    change (of NumPy's arrays, of memory that processes share)."""
    found: dict[int, UntypedStorage] = {}
    for thing in gc.get_objects():
        if not issubclass(type(thing), Tensor):
            continue
        for tensor in (thing, thing.grad if thing.is_leaf else None):
            if tensor is None or tensor.device.type != device.type or tensor.layout is not torch.strided:
                continue
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.resizable():
                found[storage._cdata] = storage
    return list(found.values())


def _bytes_of(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
