"""Whether a directory of shards is sound: every byte against its hash, gaps, strays, and rows that stand twice."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ctrlrl.data.atomic import file_sha256
from ctrlrl.data.keys import prompt_keys, sample_ranks

if TYPE_CHECKING:
    from ctrlrl.data.shards import ShardStore

_KEY = ["prompt_id", "unit", "index"]
_NAMED = 5  # doubled rows named in a report


@dataclass(frozen=True)
class Verification:
    """What a check of every byte found. `duplicates`: keys that stand in more than one row, the first few named in `doubled`."""

    shards: int
    rows: int
    missing: tuple[int, ...]
    damaged: dict[int, str]
    duplicates: int
    doubled: tuple[str, ...]
    strays: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Nothing missing, damaged or doubled. Strays (left by a killed writer) do not count and do no harm."""
        return not (self.missing or self.damaged or self.duplicates)


def verify(store: "ShardStore") -> Verification:
    """Check every byte against its hash, and look for gaps, strays and doubled (prompt_id, unit, index)."""
    good, damaged, rows, keys = [], {}, 0, []
    for index in store.committed():
        if problem := _problem(store, index):
            damaged[index] = problem
            continue
        good.append(index)
        rows += store.record(index).rows
        keys.extend(ranks for _, ranks in _keys(store, index))
    repeated = _repeated(keys)
    doubled = tuple(_named(store, good, repeated)) if len(repeated) else ()
    return Verification(len(good), rows, tuple(store.missing()), damaged, len(repeated), doubled, store.strays())


def _problem(store: "ShardStore", index: int) -> str | None:
    record, path = store.record(index), store.path(index)
    if path.stat().st_size != record.bytes or file_sha256(path) != record.sha256:
        return f"{path} is not the file that was committed: delete it and run the same command again"
    if pq.read_metadata(path).num_rows != record.rows:
        return f"{path} has {pq.read_metadata(path).num_rows} rows, its record says {record.rows}"
    return None


def _keys(store: "ShardStore", index: int) -> Iterator[tuple[pa.Table, np.ndarray]]:
    file = pq.ParquetFile(store.path(index))
    if set(_KEY) <= set(file.schema_arrow.names):
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=_KEY)
            prompt = prompt_keys(table["prompt_id"].combine_chunks())
            yield table, sample_ranks(prompt, table["unit"].to_numpy(), table["index"].to_numpy(), 0)


def _named(store: "ShardStore", indices: list[int], repeated: np.ndarray) -> Iterator[str]:
    """The first rows that stand for a repeated key, with their shards."""
    left = _NAMED
    for index in indices:
        for table, ranks in _keys(store, index):
            for row in np.flatnonzero(np.isin(ranks, repeated))[:left].tolist():
                prompt, unit, number = (table[name][row] for name in _KEY)
                yield f"prompt {prompt}, unit {unit}, index {number} (shard {index})"
                left -= 1
            if not left:
                return


def _repeated(keys: list[np.ndarray]) -> np.ndarray:
    """The distinct numbers that stand more than once."""
    ordered = np.sort(np.concatenate(keys)) if keys else np.zeros(0, np.uint64)
    return np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
