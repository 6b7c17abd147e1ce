"""Batches that were drawn ahead of the step that trains on them, as a checkpoint keeps them: the weights that drew them are gone."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ctrlrl.data.atomic import write_atomically
from ctrlrl.ppo.types import Query, Samples

_COLUMNS = pa.schema(
    [
        pa.field("step", pa.int64(), nullable=False),  # that trains on it
        pa.field("updates", pa.int64(), nullable=False),  # of the policy, when it was drawn
        pa.field("version", pa.int64(), nullable=False),
        pa.field("chunk", pa.int64(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),  # number of the query
        pa.field("response_ids", pa.list_(pa.int64()), nullable=False),
        pa.field("logprobs", pa.list_(pa.float32()), nullable=False),
        pa.field("finished", pa.bool_(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Drawn:
    """The batch of `step`, drawn when the policy had had `updates` steps: chunks of (query numbers, samples), as the sampler gave them."""

    step: int
    updates: int
    chunks: tuple[tuple[np.ndarray, Samples], ...]


def write_ahead(path: Path, batches: Sequence[Drawn]) -> None:
    """Write `batches`, to the bit, as one Parquet file with checksums. Queries are left out: they are a function of recipe and step."""
    rows = [
        (b.step, b.updates, samples.version, number, int(row), ids, logprobs, bool(finished))
        for b in batches
        for number, (numbers, samples) in enumerate(b.chunks)
        for row, ids, logprobs, finished in zip(numbers, samples.response_ids, samples.sampler_logprobs, samples.finished, strict=True)
    ]
    table = pa.Table.from_pylist([dict(zip(_COLUMNS.names, row, strict=True)) for row in rows], schema=_COLUMNS)
    write_atomically(path, lambda out: pq.write_table(table, out, write_page_checksum=True))


def read_ahead(path: Path, queries: dict[int, list[Query]]) -> list[Drawn]:
    """What `write_ahead` wrote, in the order of the steps. queries: of every step there.

    OSError (pyarrow's) or ValueError if the file is damaged, KeyError if it holds a step of which no queries are given.
    """
    table = pq.read_table(path, page_checksum_verification=True)
    if table.schema != _COLUMNS:
        raise ValueError(f"its columns are {table.schema.names}")
    parts: dict[tuple[int, int], dict[int, list[dict]]] = {}
    for row in table.to_pylist():
        parts.setdefault((row["step"], row["updates"]), {}).setdefault(row["chunk"], []).append(row)
    return [
        Drawn(step, updates, tuple(_chunk(queries[step], chunks[number]) for number in sorted(chunks)))
        for (step, updates), chunks in sorted(parts.items())
    ]


def _chunk(queries: list[Query], rows: list[dict]) -> tuple[np.ndarray, Samples]:
    numbers = np.array([row["row"] for row in rows])
    return numbers, Samples(
        tuple(queries[i] for i in numbers),
        tuple(np.array(row["response_ids"], np.int64) for row in rows),
        tuple(np.array(row["logprobs"], np.float32) for row in rows),
        np.array([row["finished"] for row in rows], bool),
        rows[0]["version"],
    )
