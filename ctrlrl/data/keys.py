"""Samples as 64-bit numbers, whole columns at a time: keys of prompts, and seeded ranks that do not depend on the order of shards."""
import binascii
import re

import numpy as np
import pyarrow as pa

from ctrlrl.errors import DataError
from ctrlrl.seeds import derive_seed

_DIGITS = 16  # of a prompt_id


def prompt_keys(ids: pa.Array) -> np.ndarray:
    """The numbers that prompt ids spell, uint64 [rows]; raises DataError for an id that is not 16 hexadecimal digits."""
    if not len(ids):
        return np.zeros(0, np.uint64)
    ids = ids.cast(pa.string())
    _, offsets, text = ids.buffers()
    ends = np.frombuffer(offsets, np.int32, len(ids) + 1, ids.offset * 4)
    try:
        if (np.diff(ends) != _DIGITS).any():
            raise binascii.Error
        numbers = binascii.unhexlify(memoryview(text)[ends[0] : ends[-1]])
    except binascii.Error:
        wrong = next(name for name in ids.to_pylist() if not re.fullmatch("[0-9a-fA-F]{16}", name))
        raise DataError(f"prompt_id {wrong} is not 16 hexadecimal digits: take data.sources.prompt_id of its messages") from None
    return np.frombuffer(numbers, ">u8").astype(np.uint64)


def row_keys(ids: pa.ChunkedArray) -> np.ndarray:
    """The same of a column with few different ids, each read once."""
    distinct = ids.combine_chunks().dictionary_encode()
    return prompt_keys(distinct.dictionary)[distinct.indices.to_numpy()]


def sample_ranks(prompt: np.ndarray, unit: np.ndarray, index: np.ndarray, seed: int) -> np.ndarray:
    """A pseudo-random uint64 for each sample (prompt key, unit, index), [rows]: which of several samples is drawn.

    It depends on nothing but its arguments, so a draw by rank is the same for every order and size of shards.
    """
    number = unit.astype(np.uint64) << np.uint64(32) | index.astype(np.uint64)
    return _mix(_mix(prompt ^ np.uint64(derive_seed(seed, "distill"))) ^ number)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014), a bijection of the 64-bit numbers; arithmetic is modulo 2^64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
