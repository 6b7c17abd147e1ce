"""Which samples a distillation keeps, how often, and under which control ([SH] section 2.3, Table 3): vanilla, oversampling, MOEC.

Every method sees all samples twice, as ScoredRows in any batches, and then says how often each row is written. Draws go by
ctrlrl.data.keys.sample_ranks, so they do not depend on the order, the size or the number of shards.
"""
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from ctrlrl.attributes import PAPER, Attribute, Attributes
from ctrlrl.control import cells
from ctrlrl.errors import RecipeError

LOW_END, HIGH_START = 0.2, 0.8
_BUCKET_BITS = 16  # ranks are counted by their upper bits
_COUNTER_BITS = 22  # of all classes together at most
_RECORD = np.dtype([("cell", "<u8"), ("rank", "<u8"), ("row", "<u8")])
# Working bytes per extreme sample while a part is sorted: the record, its three columns, the order, and as much again for the sort.
_WORKING = 128
_MOST_PARTS = 512  # open files


@dataclass(frozen=True)
class ScoredRows:
    """Consecutive samples: `start` is the number of the first among all; the arrays are [n], `scores` [n, A].

    at: which rows of their bundle they are, where samples without a score were left out (those that follow are numbered on without a gap);
    None: all of them.
    """

    start: int
    prompt: np.ndarray  # uint32, number in the PromptIndex
    rank: np.ndarray  # uint64, the sample's seeded draw (ctrlrl.data.keys.sample_ranks)
    scores: np.ndarray
    at: np.ndarray | None = None

    def scored(self) -> "ScoredRows":
        """Those that have all their scores."""
        at = np.flatnonzero(~np.isnan(self.scores).any(1))
        if len(at) == len(self.rank):
            return self
        return ScoredRows(self.start, self.prompt[at], self.rank[at], self.scores[at], at)


class Selection(Protocol):
    """What `distill` asks of a method, in this order."""

    def count(self, rows: ScoredRows) -> None: ...

    def choose(self, rows: ScoredRows) -> None: ...

    def settle(self) -> None: ...

    def copies(self, rows: ScoredRows) -> np.ndarray: ...

    def levels(self, scores: np.ndarray) -> np.ndarray: ...


def level_numbers(scores: np.ndarray, attribute: Attribute) -> np.ndarray:
    """The number of the level of each score, [n]: of the paper's two LOW below 0.5 and HIGH from there on, of others the nearest (of two
    equally near the lower)."""
    bounds, side = attribute.bounds
    return np.searchsorted(np.array(bounds), scores, side=side)


def classes(scores: np.ndarray, attributes: Attributes = PAPER) -> np.ndarray:
    """Number in `cells` of scores [n, A], each quantised to its attribute's levels; with two levels each that is the number of a corner."""
    number = np.zeros(len(scores), np.int64)
    for column, attribute in zip(scores.T, attributes, strict=True):
        number = number * len(attribute.levels) + level_numbers(column, attribute)
    return number


def extremes(scores: np.ndarray, attributes: Attributes = PAPER) -> np.ndarray:
    """Which of scores [n, A] are extreme in every attribute: in [0, 0.2] or [0.8, 1], ends included; of more than two levels those that
    are nearest to the first or to the last."""
    found = np.ones(len(scores), bool)
    for column, attribute in zip(scores.T, attributes, strict=True):
        if len(attribute.levels) == 2:
            found &= (column <= LOW_END) | (column >= HIGH_START)
        else:
            found &= np.isin(level_numbers(column, attribute), (0, len(attribute.levels) - 1))
    return found


def quantised(scores: np.ndarray, attributes: Attributes = PAPER) -> np.ndarray:
    """The level of each score, [n, A]."""
    columns = [np.array(a.levels)[level_numbers(column, a)] for column, a in zip(scores.T, attributes, strict=True)]
    return np.stack(columns, axis=1)


class Vanilla:
    """Every sample once; the control is its scores, rounded to `precision` decimals so that they are spelled in full."""

    def __init__(self, precision: int):
        if not 1 <= precision <= 6:
            raise RecipeError(f"precision = {precision} is not from 1 to 6 digits, which is what a control can spell")
        self._precision = precision

    def count(self, rows: ScoredRows) -> None:
        """Nothing to learn."""

    def choose(self, rows: ScoredRows) -> None:
        """Nothing to learn."""

    def settle(self) -> None:
        """Nothing to learn."""

    def copies(self, rows: ScoredRows) -> np.ndarray:
        """1 for every row."""
        return np.ones(len(rows.scores), np.int64)

    def levels(self, scores: np.ndarray) -> np.ndarray:
        """The rounded scores."""
        return np.round(scores, self._precision)


class Oversampling:
    """Every non-empty class as large as the largest, m: each of a class's n samples m // n times, and m % n drawn ones once more."""

    def __init__(self, attributes: Attributes = PAPER):
        self._attributes, self._classes = attributes, len(cells(attributes))
        self._bits = max(1, min(_BUCKET_BITS, _COUNTER_BITS - (self._classes - 1).bit_length()))
        self._counts = np.zeros((self._classes, 1 << self._bits), np.int64)
        self._in_bucket: list[list[np.ndarray]] = [[] for _ in range(self._classes)]

    def count(self, rows: ScoredRows) -> None:
        """Sizes of the classes, and within each how the ranks spread."""
        np.add.at(self._counts, (classes(rows.scores, self._attributes), _bucket(rows.rank, self._bits)), 1)

    def choose(self, rows: ScoredRows) -> None:
        """Keep the few ranks among which the last drawn one is."""
        of, buckets = classes(rows.scores, self._attributes), _bucket(rows.rank, self._bits)
        for c, (_, _, bucket) in self._wanted().items():
            self._in_bucket[c].append(rows.rank[(of == c) & (buckets == bucket)])

    def settle(self) -> None:
        """The largest rank that is still drawn, by class."""
        sizes = self._counts.sum(axis=1)
        self._whole = np.array([sizes.max() // n if n else 0 for n in sizes])
        self._last = np.zeros(self._classes, np.uint64)
        self._draws = np.zeros(self._classes, bool)
        for c, (drawn, before, _) in self._wanted().items():
            self._draws[c] = True
            self._last[c] = np.sort(np.concatenate(self._in_bucket[c]))[drawn - before - 1]

    def copies(self, rows: ScoredRows) -> np.ndarray:
        """How often each row is written, at least once."""
        of = classes(rows.scores, self._attributes)
        return self._whole[of] + (self._draws[of] & (rows.rank <= self._last[of]))

    def levels(self, scores: np.ndarray) -> np.ndarray:
        """The levels of their class."""
        return quantised(scores, self._attributes)

    def _wanted(self) -> dict[int, tuple[int, int, int]]:
        """For each class of which some are drawn: how many, how many of them lie in lower buckets, and the bucket of the last."""
        sizes, found = self._counts.sum(axis=1), {}
        for c, n in enumerate(sizes):
            drawn = int(sizes.max() % n) if n else 0
            if drawn:
                below = np.cumsum(self._counts[c])
                bucket = int(np.searchsorted(below, drawn))
                found[c] = (drawn, int(below[bucket] - self._counts[c, bucket]), bucket)
        return found


class Moec:
    """More than one extreme case: see `ctrlrl.data.distill.distill`. Grouping by prompt goes through files in `scratch`.

    The samples of a prompt may lie anywhere in the shards. The extreme ones are split by prompt into so many files that sorting one of
    them stays within `memory` bytes; the rows that are kept are marked in a file of one byte a sample, which is mapped, not loaded.
    """

    def __init__(self, per_cell: int, memory: int, scratch: Path, samples: int, prompts: int, attributes: Attributes = PAPER):
        if per_cell < 1:
            raise RecipeError(f"per_cell = {per_cell} keeps nothing: give 1 or more")
        parts = max(-(-samples * _WORKING // memory), 1)
        if parts > _MOST_PARTS:
            least = -(-samples * _WORKING // _MOST_PARTS)
            raise RecipeError(f"memory = {memory} bytes is too little for {samples} samples: give {least} or more")
        self._per_cell, self._prompts, self._attributes = per_cell, max(prompts, 1), attributes
        self._paths = [scratch / f"part-{number:03d}" for number in range(parts)]
        self._files = [open(path, "wb") for path in self._paths]  # noqa: SIM115 (closed by settle)
        self._kept = np.memmap(scratch / "kept", np.bool_, mode="w+", shape=(max(samples, 1),))

    def count(self, rows: ScoredRows) -> None:
        """Nothing to learn."""

    def choose(self, rows: ScoredRows) -> None:
        """Put the extreme samples into the files of their prompts."""
        extreme = np.flatnonzero(extremes(rows.scores, self._attributes))
        records = np.empty(len(extreme), _RECORD)
        prompt = rows.prompt[extreme].astype(np.uint64)
        of = classes(rows.scores[extreme], self._attributes).astype(np.uint64)
        records["cell"] = prompt * np.uint64(len(cells(self._attributes))) + of
        records["rank"] = rows.rank[extreme]
        records["row"] = extreme + rows.start
        part = prompt * np.uint64(len(self._files)) // np.uint64(self._prompts)
        order = np.argsort(part, kind="stable")
        ends = np.searchsorted(part[order], np.arange(len(self._files) + 1))
        for file, first, last in zip(self._files, ends, ends[1:], strict=False):
            if first < last:
                file.write(records[order[first:last]])

    def settle(self) -> None:
        """Mark the rows that are kept, file by file."""
        for file, path in zip(self._files, self._paths, strict=True):
            file.close()
            self._kept[moec(np.fromfile(path, _RECORD), self._per_cell, len(cells(self._attributes)))] = True
            path.unlink()

    def copies(self, rows: ScoredRows) -> np.ndarray:
        """1 for the rows that are kept, else 0."""
        return self._kept[rows.start : rows.start + len(rows.scores)].astype(np.int64)

    def levels(self, scores: np.ndarray) -> np.ndarray:
        """The corner of extreme scores."""
        return quantised(scores, self._attributes)


def moec(records: np.ndarray, per_cell: int, kinds: int) -> np.ndarray:
    """Rows that MOEC keeps of extreme samples: `cell` is `kinds` x prompt + class; all samples of a prompt are among them.

    A prompt with at least two different corners gives, for each of them, the `per_cell` samples of smallest rank.
    """
    if not len(records):
        return np.zeros(0, np.int64)
    order = np.lexsort((records["rank"], records["cell"]))
    cell = records["cell"][order]
    prompt = cell // np.uint64(kinds)
    new_cell, new_prompt = _changes(cell), _changes(prompt)
    place = np.arange(len(cell)) - np.flatnonzero(new_cell)[np.cumsum(new_cell) - 1]
    different = np.add.reduceat(new_cell.astype(np.int64), np.flatnonzero(new_prompt))
    keep = (place < per_cell) & (different[np.cumsum(new_prompt) - 1] >= 2)
    return records["row"][order[keep]].astype(np.int64)


def _bucket(ranks: np.ndarray, bits: int) -> np.ndarray:
    return (ranks >> np.uint64(64 - bits)).astype(np.int64)


def _changes(ordered: np.ndarray) -> np.ndarray:
    return np.concatenate([[True], ordered[1:] != ordered[:-1]])

