"""Samples with their scores, from three stores whose shards lie row by row beside each other: read once, checked, and kept on the disk.

Small shards are read in bundles, by two threads, ahead of the work: opening a Parquet file costs as much as decoding a thousand rows.
"""
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ctrlrl.attributes import PAPER, Attributes
from ctrlrl.data.calibration import Calibration, WithinPrompts
from ctrlrl.data.keys import prompt_keys, sample_ranks
from ctrlrl.data.prompt_index import PromptIndex
from ctrlrl.data.selection import ScoredRows
from ctrlrl.data.shards import ROW_GROUP, SOURCE, ShardStore
from ctrlrl.errors import DataError, RunError

KEY = ["prompt_id", "unit", "index"]
T = TypeVar("T")


@dataclass(frozen=True, init=False)
class ScoredSamples:
    """What is distilled: finished stores of samples and of their scores, one for each attribute, row by row aligned, and the Parquet file
    of their prompts.

    maps: calibrations by attribute, of the raw outputs, which take the place of the scores; all or none.
    """

    samples: ShardStore
    scores: tuple[ShardStore, ...]
    prompts: Path
    maps: Mapping[str, Calibration | WithinPrompts] | None
    attributes: Attributes

    def __init__(
        self,
        samples: ShardStore,
        *scores_and_prompts: ShardStore | Path,
        maps: Mapping[str, Calibration | WithinPrompts] | None = None,
        attributes: Attributes = PAPER,
    ):
        *scores, prompts = scores_and_prompts
        given = {"samples": samples, "scores": tuple(scores), "prompts": prompts, "maps": maps, "attributes": attributes}
        for name, value in given.items():
            object.__setattr__(self, name, value)  # the class is frozen

    @property
    def stores(self) -> dict[str, ShardStore]:
        """All stores by name: "samples", and the scores by attribute."""
        return {"samples": self.samples, **dict(zip(self.attributes.names, self.scores, strict=True))}


def rows_of_shards(source: ScoredSamples) -> list[int]:
    """Rows of each sample shard; raises RunError unless every one has a score shard of as many rows in every store."""
    samples = source.samples.manifest()["shards"]
    for store in source.scores:
        scored = store.manifest()["shards"]
        if len(scored) < len(samples):
            raise RunError(f"{store.directory} scores {len(scored)} of {len(samples)} shards of {source.samples.directory}: score the rest")
        for sample, score in zip(samples, scored, strict=False):
            if score["facts"].get(SOURCE, sample["sha256"]) != sample["sha256"]:
                raise DataError(
                    f"shard {sample['index']} of {store.directory} scores other samples than are in {source.samples.directory}: "
                    "score these samples anew"
                )
            if sample["rows"] != score["rows"]:
                raise DataError(
                    f"shard {sample['index']} has {sample['rows']} samples in {source.samples.directory} and {score['rows']} scores in "
                    f"{store.directory}: score these samples anew"
                )
    return [record["rows"] for record in samples]


@dataclass(frozen=True)
class Bundle:
    """Consecutive row groups, (shard, group) each, that are read together."""

    start: int
    rows: int
    groups: tuple[tuple[int, int], ...]


def in_bundles(shards: list[int]) -> list[Bundle]:
    """Bundles of about ROW_GROUP rows, from the number of rows of each shard."""
    found, groups, start, rows = [], [], 0, 0
    for shard, size in enumerate(shards):
        for group in range(-(-size // ROW_GROUP)):
            groups.append((shard, group))
            rows += min(ROW_GROUP, size - group * ROW_GROUP)
            if rows >= ROW_GROUP:
                found.append(Bundle(start, rows, tuple(groups)))
                groups, start, rows = [], start + rows, 0
    return [*found, Bundle(start, rows, tuple(groups))] if groups else found


def read_ahead(one: Callable[[Bundle], T], bundles: Iterable[Bundle]) -> Iterator[T]:
    """What `one` makes of each bundle, in order, with the next ones being read by two threads while one is worked on."""
    with ThreadPoolExecutor(2) as readers:
        coming: deque[Future[T]] = deque()
        for bundle in bundles:
            coming.append(readers.submit(one, bundle))
            if len(coming) > 2:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


def read_bundle(store: ShardStore, bundle: Bundle, columns: list[str]) -> pa.Table:
    """The bundle's rows. Each prompt id is decoded once a row group, as a dictionary, instead of once a sample."""
    tables = []
    for number, group in bundle.groups:
        path = store.path(number)
        try:
            with pa.OSFile(str(path)) as file:  # an open file spares pyarrow the search for a file system, a fifth of the time
                shard = pq.ParquetFile(file, read_dictionary=["prompt_id"], pre_buffer=False)
                tables.append(shard.read_row_group(group, columns=columns, use_threads=False))
        except (OSError, pa.ArrowException) as error:
            raise RunError(f"{path} cannot be read: {error}: run ctrlrl inspect, which says what to do") from None
    return pa.concat_tables(tables, promote_options="default")  # a shard without a null has another schema than one with some


def _ranks(table: pa.Table, seed: int) -> tuple[list[tuple[np.ndarray, np.ndarray]], np.ndarray]:
    """For each row group its distinct prompt keys and which of them each row has; and the ranks of all rows."""
    prompts = [(prompt_keys(chunk.dictionary), chunk.indices.to_numpy()) for chunk in table["prompt_id"].chunks]
    key = np.concatenate([distinct[place] for distinct, place in prompts])
    return prompts, sample_ranks(key, table["unit"].to_numpy(), table["index"].to_numpy(), seed)


def scored_rows(source: ScoredSamples, bundle: Bundle, index: PromptIndex, seed: int) -> ScoredRows:
    """The first pass over a bundle, NaN for a score that is null; raises DataError if the stores of scores hold other samples, or a bad
    score."""
    column = "raw" if source.maps else "score"
    first, *others = tables = [read_bundle(store, bundle, [*KEY, column]) for store in source.scores]
    prompts, rank = _ranks(first, seed)
    for other, store in zip(others, source.scores[1:], strict=True):
        if not first.select(KEY).equals(other.select(KEY)):
            check_aligned(rank, other, np.arange(bundle.rows), seed, store, source.scores[0])
    scores = np.stack([table[column].to_numpy() for table in tables], axis=1)
    if source.maps:
        scores = np.stack([source.maps[a].at(bundle.start, scores[:, i]) for i, a in enumerate(source.attributes.names)], axis=1)
    none = np.stack([table[column].is_null().to_numpy() for table in tables], axis=1)
    bad = np.argwhere(~((scores >= 0) & (scores <= 1) | none))
    if len(bad):
        row, column = bad[0].tolist()
        directory = source.scores[column].directory
        score = f"{scores[row, column]:g} for {_sample(first, row)}"
        raise DataError(f"{directory} holds the score {score}; scores lie in [0, 1]: calibrate the reward model")
    prompt = np.concatenate([index.numbers(distinct)[place] for distinct, place in prompts])
    return ScoredRows(bundle.start, prompt, rank, scores)


def check_aligned(rank: np.ndarray, table: pa.Table, rows: np.ndarray, seed: int, store: ShardStore, scored: ShardStore) -> None:
    """Raise DataError unless `rows` of `table` are the samples of these ranks, in this order."""
    _, other = _ranks(table, seed)
    wrong = rows[other[rows] != rank[rows]]
    if len(wrong):
        raise DataError(
            f"{len(wrong)} of {len(rows)} rows of {store.directory} are other samples than those of {scored.directory}, the first "
            f"{_sample(table, int(wrong[0]))}: score these samples anew"
        )


def _sample(table: pa.Table, row: int) -> str:
    prompt, unit, index = (table[name][row] for name in KEY)
    return f"prompt {prompt}, unit {unit}, index {index}"


def write_rows(scored: BinaryIO, rows: ScoredRows) -> None:
    """Put scored rows on the disk, so that the other passes need not read the shards again."""
    records = np.empty(len(rows.rank), _record(rows.scores.shape[1]))
    records["prompt"], records["rank"], records["scores"] = rows.prompt, rows.rank, rows.scores
    scored.write(records)


def read_rows_again(scored: BinaryIO, bundles: list[Bundle], attributes: int) -> Iterator[ScoredRows]:
    """The scored rows, of so many attributes, again, in the same bundles, without those that lack a score."""
    scored.seek(0)
    record = _record(attributes)
    for bundle in bundles:
        records = np.frombuffer(scored.read(bundle.rows * record.itemsize), record)
        columns = (np.ascontiguousarray(records[name]) for name in ("prompt", "rank", "scores"))
        yield ScoredRows(bundle.start, *columns).scored()


def _record(attributes: int) -> np.dtype:
    return np.dtype([("prompt", "<u4"), ("rank", "<u8"), ("scores", "<f8", (attributes,))])
