"""Passes over a fixed set of examples: which of them make optimiser step n, as a pure function of the recipe and of n.

An example is one or more sequences that belong together: a response, a response under a true and a fake control, a preference pair.
"""

import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from pydantic import Field, model_validator

from ctrlrl.config import Section
from ctrlrl.data.batches import TokenBatch
from ctrlrl.errors import DataError, RecipeError
from ctrlrl.seeds import derive_seed


class BatchConfig(Section):
    """The global batch of one optimiser step: this many examples, or as many as fit this many tokens (a longer one stands alone)."""

    sequences: int = Field(0, ge=0)
    tokens: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _one_of_both(self):
        if bool(self.sequences) == bool(self.tokens):
            raise ValueError("a batch is counted in sequences or in tokens: set exactly one of the two above 0")
        return self


class Examples(Protocol):
    """What is trained on. lengths [N]: tokens of each example."""

    lengths: np.ndarray

    def batch(self, rows: np.ndarray, epoch: int) -> TokenBatch:
        """The sequences of these examples in this epoch; depends on nothing else."""
        ...


class Subset:
    """Some rows of other examples, numbered anew."""

    def __init__(self, examples: Examples, rows: np.ndarray):
        self._examples, self._rows = examples, rows
        self.lengths = examples.lengths[rows]

    def batch(self, rows: np.ndarray, epoch: int) -> TokenBatch:
        """The sequences of these rows of the subset."""
        return self._examples.batch(self._rows[rows], epoch)


class Epochs:
    """The steps of a number of passes. Each pass has its own seeded order and uses every example exactly once, the ragged tail too."""

    def __init__(self, lengths: np.ndarray, batch: BatchConfig, *, epochs: int, seed: int, steps: int = 0):
        """lengths: tokens of each example. steps: end after this many, 0 for all passes; RecipeError for more than these give."""
        self._lengths, self._batch, self._seed = np.asarray(lengths), batch, seed
        counts = [len(cut_epoch(self._lengths, batch, seed, epoch)) for epoch in range(epochs)]
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        self._epoch, self._cut = -1, []
        if steps > self._starts[-1]:
            raise RecipeError(
                f"steps = {steps} is more than the {self._starts[-1]} steps of epochs = {epochs}: raise epochs or lower steps"
            )
        self.total = steps or int(self._starts[-1])

    def at(self, step: int) -> tuple[int, np.ndarray]:
        """The epoch and the examples of optimiser step `step` (from 0)."""
        epoch = int(np.searchsorted(self._starts, step, side="right")) - 1
        if epoch != self._epoch:
            self._epoch, self._cut = epoch, cut_epoch(self._lengths, self._batch, self._seed, epoch)
        return epoch, self._cut[step - self._starts[epoch]]


def cut_epoch(lengths: np.ndarray, batch: BatchConfig, seed: int, epoch: int) -> list[np.ndarray]:
    """The batches of one pass: a seeded order, cut as `batch` says; every row exactly once."""
    order = np.random.default_rng(derive_seed(seed, "epoch", epoch)).permutation(len(lengths))
    if batch.sequences:
        return [order[i : i + batch.sequences] for i in range(0, len(order), batch.sequences)]
    ends, cut, first = np.cumsum(np.asarray(lengths)[order]), [], 0
    while first < len(order):
        before = ends[first - 1] if first else 0
        after = max(first + 1, int(np.searchsorted(ends, before + batch.tokens, side="right")))
        cut.append(order[first:after])
        first = after
    return cut


def hold_out(keys: Sequence[str], share: float, limit: int, seed: int, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers to train on and to hold out: about `share` of the keys, with all their rows; at most `limit` rows are held out.

    A key's side depends on nothing but itself and the seed, so a grown data set keeps its split. Held-out rows beyond the limit are
    used by neither. share = 0 holds nothing out. DataError if a side that is asked for is empty; `what` names the data.
    """
    places = np.array([_place(key, seed) for key in keys])
    held = np.flatnonzero(places < share)
    kept = np.flatnonzero(places >= share)
    if not len(kept) or (share and not len(held)):
        raise DataError(
            f"{what} has {len(set(keys))} prompts, of which {len(held)} rows are held out and {len(kept)} are left to train on: "
            "give more prompts, or change validation.share (0 holds nothing out)"
        )
    return kept, np.sort(held[np.argsort(places[held], kind="stable")][:limit])


def _place(key: str, seed: int) -> float:
    """Where in [0, 1) the hash of a key lies."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "big") / 2**64
