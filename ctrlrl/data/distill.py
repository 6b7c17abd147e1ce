"""Distillation: from samples and their scores to a training table of (prompt, control, response) ([SH] section 2.3, Table 3).

Everything streams: three passes over the shards, a row group at a time, and no step whose memory grows with the number of samples
beyond the `memory` setting. Sources: [SH] Tuan et al., arXiv 2404.01295.
"""
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ctrlrl.control import ATTRIBUTES, CORNERS
from ctrlrl.data.atomic import file_sha256, write_atomically, write_json
from ctrlrl.data.joint import JointScores
from ctrlrl.data.keys import prompt_keys
from ctrlrl.data.prompt_index import PromptIndex
from ctrlrl.data.schemas import DISTILLED
from ctrlrl.data.selection import Moec, Oversampling, ScoredRows, Selection, Vanilla, classes, extremes
from ctrlrl.data.shards import ROW_GROUP, ShardStore
from ctrlrl.errors import DataError, RecipeError, RunError

METHODS = ("vanilla", "oversampling", "moec")
TABLE, REPORT = "train.parquet", "report.json"
_KEY = ["prompt_id", "unit", "index"]
_ANSWER = ["response", "token_ids", "finish_reason"]


@dataclass(frozen=True)
class ScoredSamples:
    """What is distilled: finished stores of samples and of their scores, row by row aligned, and the Parquet file of their prompts."""

    samples: ShardStore
    helpful: ShardStore
    harmless: ShardStore
    prompts: Path


def distill(
    source: ScoredSamples, out: str | Path, *, method: str, seed: int, per_cell: int = 1, precision: int = 4, memory: int = 1 << 30
) -> dict:
    """Write `out`/train.parquet (schema DISTILLED) and, last, `out`/report.json; return the report.

    method: "vanilla" (every sample; control = its scores rounded to `precision` digits), "oversampling" (scores quantised to 0.2 if
    below 0.5, else 1; samples of rarer classes repeated until all non-empty classes are equally large), or "moec": samples whose two
    scores are extreme, in [0, 0.2] or [0.8, 1] with the ends, quantised to 0.2 or 1; of the prompts with at least two different pairs,
    `per_cell` samples drawn for each pair. memory: bytes that grouping by prompt may use.

    Raises RunError for unfinished stores, DataError for shards that do not match or hold bad scores, RecipeError for bad settings.
    """
    out = Path(out)
    scratch = out / ".scratch"
    out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
    scratch.mkdir()
    try:
        rows = _check_stores(source)
        index = PromptIndex(source.prompts, scratch)
        selection = _selection(method, seed, per_cell, precision, memory, scratch, sum(rows), len(index))
        counts, joint = _Counts(len(index)), JointScores()
        for _, _, batch in _ahead(_scored_rows(source, len(rows), index, check=True)):
            joint.count(batch.scores)
            counts.before(batch)
            selection.count(batch)
        for _, _, batch in _ahead(_scored_rows(source, len(rows), index)):
            joint.correlate(batch.scores)
            selection.choose(batch)
        selection.settle()
        (out / REPORT).unlink(missing_ok=True)  # an old report must not vouch for a new table
        write_atomically(out / TABLE, lambda file: _write_table(file, source, len(rows), index, selection, counts))
        settings = {"method": method, "seed": seed, "per_cell": per_cell, "precision": precision}
        report = settings | counts.report() | {"entanglement": joint.correlations(), "histogram": joint.histogram.tolist()}
        report["table_sha256"] = file_sha256(out / TABLE)
        report["sources"] = {name: getattr(source, name).fingerprint for name in ("samples", *ATTRIBUTES)}
        write_json(out / REPORT, report)
        return report
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


class _Counts:
    """What the report counts: rows, prompts, and classes before and after."""

    def __init__(self, prompts: int):
        self._seen, self._kept = np.zeros(prompts, bool), np.zeros(prompts, bool)
        self._rows = {"before": 0, "after": 0}
        self._classes = {name: np.zeros(len(CORNERS), np.int64) for name in ("before", "extreme", "after")}

    def before(self, rows: ScoredRows) -> None:
        self._seen[rows.prompt] = True
        self._rows["before"] += len(rows.prompt)
        of, extreme = classes(rows.scores), extremes(rows.scores)
        self._classes["before"] += np.bincount(of, minlength=len(CORNERS))
        self._classes["extreme"] += np.bincount(of[extreme], minlength=len(CORNERS))

    def after(self, rows: ScoredRows, copies: np.ndarray) -> None:
        self._kept[rows.prompt[copies > 0]] = True
        self._rows["after"] += int(copies.sum())
        self._classes["after"] += np.bincount(classes(rows.scores), copies, minlength=len(CORNERS)).astype(np.int64)

    def report(self) -> dict:
        seen, kept = int(self._seen.sum()), int(self._kept.sum())
        named = {name: dict(zip((c.name for c in CORNERS), counts.tolist(), strict=True)) for name, counts in self._classes.items()}
        return {"rows": self._rows, "prompts": {"before": seen, "after": kept, "share": kept / max(seen, 1)}, "classes": named}


def _selection(method, seed, per_cell, precision, memory, scratch, samples, prompts) -> Selection:
    if method == "vanilla":
        return Vanilla(precision)
    if method == "oversampling":
        return Oversampling(seed)
    if method == "moec":
        return Moec(seed, per_cell, memory, scratch, samples, prompts)
    raise RecipeError(f"method = {method!r} is unknown: use one of {', '.join(METHODS)}")


def _check_stores(source: ScoredSamples) -> list[int]:
    """Rows of each sample shard; raises RunError unless every one has a score shard of as many rows in both stores."""
    samples = source.samples.manifest()["shards"]
    for name in ATTRIBUTES:
        store = getattr(source, name)
        scored = store.manifest()["shards"]
        if len(scored) < len(samples):
            raise RunError(f"{store.directory} scores {len(scored)} of {len(samples)} shards of {source.samples.directory}: score the rest")
        for sample, score in zip(samples, scored, strict=False):
            if sample["rows"] != score["rows"]:
                raise DataError(
                    f"shard {sample['index']} has {sample['rows']} samples in {source.samples.directory} and {score['rows']} scores in "
                    f"{store.directory}: score these samples anew"
                )
    return [record["rows"] for record in samples]


def _ahead(items: Iterator) -> Iterator:
    """The same items, with the next one being read while this one is worked on."""
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = reader.submit(next, items, None)
            yield item


def _scored_rows(source: ScoredSamples, shards: int, index: PromptIndex, *, check: bool = False) -> Iterator[tuple[int, int, ScoredRows]]:
    """Shard, row group, and its keys and scores, over all; with `check`, that the stores hold the same samples and good scores."""
    start = 0
    for shard in range(shards):
        helpful, harmless, samples = (_open(store, shard) for store in (source.helpful, source.harmless, source.samples))
        for group in range(helpful.num_row_groups):
            keyed = helpful.read_row_group(group, columns=[*_KEY, "score"])
            other = harmless.read_row_group(group, columns=[*_KEY, "score"] if check else ["score"])
            scores = np.stack([table["score"].to_numpy() for table in (keyed, other)], axis=1)
            distinct, place = _prompt_ids(keyed)
            unit, number = keyed["unit"].to_numpy(), keyed["index"].to_numpy()
            rows = ScoredRows(start, index.numbers(distinct)[place], distinct[place], unit, number, scores)
            if check:
                for store, table in ((source.harmless, other.select(_KEY)), (source.samples, samples.read_row_group(group, columns=_KEY))):
                    if not table.equals(keyed.select(_KEY)):
                        _check_aligned(rows, table, source.helpful, store, shard)
                _check_scores(rows, source, shard)
            yield shard, group, rows
            start += len(scores)


def _open(store: ShardStore, shard: int) -> pq.ParquetFile:
    return pq.ParquetFile(store.path(shard), read_dictionary=["prompt_id"])  # each id once a group instead of once a sample


def _prompt_ids(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """The distinct keys of a row group's prompts, and which of them each row has."""
    column = table["prompt_id"].combine_chunks()
    return prompt_keys(column.dictionary), column.indices.to_numpy()


def _check_aligned(rows: ScoredRows, other: pa.Table, store: ShardStore, other_store: ShardStore, shard: int) -> None:
    distinct, place = _prompt_ids(other)
    same = (distinct[place] == rows.key) & (other["unit"].to_numpy() == rows.unit) & (other["index"].to_numpy() == rows.index)
    if not same.all():
        row = int(np.argmin(same))
        raise DataError(
            f"{(~same).sum()} rows of shard {shard} are other samples in {store.directory} than in {other_store.directory}, the first "
            f"that of prompt {rows.key[row]:016x}, unit {rows.unit[row]}, index {rows.index[row]}: score these samples anew"
        )


def _check_scores(rows: ScoredRows, source: ScoredSamples, shard: int) -> None:
    bad = np.argwhere(~((rows.scores >= 0) & (rows.scores <= 1)))
    if len(bad):
        row, column = bad[0]
        raise DataError(
            f"shard {shard} of {getattr(source, ATTRIBUTES[column]).directory} holds the score {rows.scores[row, column]:g} for prompt "
            f"{rows.key[row]:016x}, unit {rows.unit[row]}, index {rows.index[row]}; scores lie in [0, 1]: calibrate the reward model"
        )


def _write_table(
    file: BinaryIO, source: ScoredSamples, shards: int, index: PromptIndex, selection: Selection, counts: _Counts
) -> None:
    """The third pass: every row that is kept, as often as it is kept, in the order of the shards."""
    waiting: list[pa.Table] = []
    with pq.ParquetWriter(file, DISTILLED, compression="zstd") as writer:
        for shard, group, rows in _ahead(_scored_rows(source, shards, index)):
            copies = selection.copies(rows)
            counts.after(rows, copies)
            if not copies.any():
                continue
            answers = _open(source.samples, shard).read_row_group(group, columns=[*_KEY, *_ANSWER])
            for taken in _repeats(copies):
                waiting.append(_training_rows(answers, rows, taken, index, selection))
                if sum(map(len, waiting)) >= ROW_GROUP:
                    writer.write_table(pa.concat_tables(waiting), row_group_size=ROW_GROUP)
                    waiting = []
        if waiting:
            writer.write_table(pa.concat_tables(waiting), row_group_size=ROW_GROUP)


def _repeats(copies: np.ndarray) -> Iterator[np.ndarray]:
    """Row numbers, each as often as `copies` says, at most ROW_GROUP at a time (one row may be wanted a million times)."""
    ends = np.cumsum(copies)
    for first in range(0, int(ends[-1]), ROW_GROUP):
        yield np.searchsorted(ends, np.arange(first, min(first + ROW_GROUP, ends[-1])), side="right")


def _training_rows(answers: pa.Table, rows: ScoredRows, taken: np.ndarray, index: PromptIndex, selection: Selection) -> pa.Table:
    chosen = answers.take(pa.array(taken))
    levels = selection.levels(rows.scores[taken])
    columns = {name: chosen[name] for name in (*_KEY, *_ANSWER)} | dict(zip(ATTRIBUTES, levels.T, strict=True))
    columns["prompt_id"] = columns["prompt_id"].cast(pa.string())
    columns["messages"] = index.messages(rows.prompt[taken])
    return pa.table([columns[name] for name in DISTILLED.names], schema=DISTILLED)
