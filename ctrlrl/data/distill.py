"""Distillation: from samples and their scores to a training table of (prompt, control, response) ([SH] section 2.3, Table 3).

Everything streams: each shard is read once, a few row groups at a time, what the later passes need of it waits on the disk, and no step
needs memory that grows with the number of samples beyond the `memory` setting. Source: [SH] Tuan et al., arXiv 2404.01295.
"""
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ctrlrl.control import ATTRIBUTES, CORNERS
from ctrlrl.data.atomic import file_sha256, write_atomically, write_json
from ctrlrl.data.disk import disk_told
from ctrlrl.data.joint import JointScores
from ctrlrl.data.prompt_index import PromptIndex
from ctrlrl.data.schemas import DISTILLED
from ctrlrl.data.scored import (
    KEY,
    Bundle,
    ScoredSamples,
    check_aligned,
    in_bundles,
    read_ahead,
    read_bundle,
    read_rows_again,
    rows_of_shards,
    scored_rows,
    write_rows,
)
from ctrlrl.data.selection import Moec, Oversampling, ScoredRows, Selection, Vanilla, classes, extremes
from ctrlrl.data.shards import ROW_GROUP
from ctrlrl.errors import RecipeError

METHODS = ("vanilla", "oversampling", "moec")
TABLE, REPORT = "train.parquet", "report.json"
_ANSWER = ["response", "token_ids", "finish_reason"]


def distill(
    source: ScoredSamples, out: str | Path, *, method: str, seed: int, per_cell: int = 1, precision: int = 4, memory: int = 1 << 30
) -> dict:
    """Write `out`/train.parquet (schema DISTILLED) and, last, `out`/report.json; return the report.

    method: "vanilla" (every sample; control = its scores rounded to `precision` digits), "oversampling" (scores quantised to 0.2 if
    below 0.5, else 1; samples of rarer classes repeated until all non-empty classes are equally large), or "moec": samples whose two
    scores are extreme, in [0, 0.2] or [0.8, 1] with the ends, quantised to 0.2 or 1; of the prompts with at least two different pairs,
    `per_cell` samples drawn for each pair. memory: bytes that grouping by prompt may use.

    Raises RunError for unfinished stores, DataError for shards that do not match or hold bad scores, RecipeError for bad settings,
    StorageError for a full disk.
    """
    out = Path(out)
    scratch = out / ".scratch"
    with disk_told(out, place=True):
        try:
            out.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
            scratch.mkdir()
            bundles = in_bundles(rows_of_shards(source))
            index = PromptIndex(source.prompts, scratch)
            selection = _selection(method, per_cell, precision, memory, scratch, sum(b.rows for b in bundles), len(index))
            counts, joint = _Counts(len(index)), JointScores()
            with open(scratch / "scored", "w+b") as scored:
                for rows in read_ahead(lambda bundle: scored_rows(source, bundle, index, seed), bundles):
                    joint.count(rows.scores)
                    counts.before(rows)
                    selection.count(rows)
                    write_rows(scored, rows)
                for rows in read_rows_again(scored, bundles):
                    joint.correlate(rows.scores)
                    selection.choose(rows)
                selection.settle()
                (out / REPORT).unlink(missing_ok=True)  # an old report must not vouch for a new table
                tables = _training_tables(source, read_rows_again(scored, bundles), bundles, index, selection, counts, seed)
                write_atomically(out / TABLE, lambda file: _write_tables(file, tables))
            settings = {"method": method, "seed": seed, "per_cell": per_cell, "precision": precision}
            report = settings | counts.report() | {"entanglement": joint.correlations(), "histogram": joint.histogram.tolist()}
            report["table_sha256"] = file_sha256(out / TABLE)
            report["sources"] = {name: getattr(source, name).fingerprint for name in ("samples", *ATTRIBUTES)}
            report["shards"] = shards_of(source)
            if source.maps:
                report["calibration"] = {attribute: source.maps[attribute].content_hash for attribute in ATTRIBUTES}
            write_json(out / REPORT, report)
            return report
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def shards_of(source: ScoredSamples) -> dict[str, str]:
    """For each of the three stores a hash of its shards: what tells a table of these rows from one of others."""
    stores = {name: getattr(source, name).manifest()["shards"] for name in ("samples", *ATTRIBUTES)}
    return {name: hashlib.sha256("".join(s["sha256"] for s in shards).encode()).hexdigest() for name, shards in stores.items()}


class _Counts:
    """What the report counts: rows, prompts, and classes before and after."""

    def __init__(self, prompts: int):
        self._seen, self._kept = np.zeros(prompts, bool), np.zeros(prompts, bool)
        self._rows = {"before": 0, "after": 0}
        self._classes = {name: np.zeros(len(CORNERS), np.int64) for name in ("before", "extreme", "after")}

    def before(self, rows: ScoredRows) -> None:
        """First pass: what there is."""
        self._seen[rows.prompt] = True
        self._rows["before"] += len(rows.prompt)
        of, extreme = classes(rows.scores), extremes(rows.scores)
        self._classes["before"] += np.bincount(of, minlength=len(CORNERS))
        self._classes["extreme"] += np.bincount(of[extreme], minlength=len(CORNERS))

    def after(self, rows: ScoredRows, copies: np.ndarray) -> None:
        """Last pass: what is written."""
        self._kept[rows.prompt[copies > 0]] = True
        self._rows["after"] += int(copies.sum())
        self._classes["after"] += np.bincount(classes(rows.scores), copies, minlength=len(CORNERS)).astype(np.int64)

    def report(self) -> dict:
        """rows, prompts and classes, for report.json."""
        seen, kept = int(self._seen.sum()), int(self._kept.sum())
        named = {name: dict(zip((c.name for c in CORNERS), counts.tolist(), strict=True)) for name, counts in self._classes.items()}
        return {"rows": self._rows, "prompts": {"before": seen, "after": kept, "share": kept / max(seen, 1)}, "classes": named}


def _selection(method, per_cell, precision, memory, scratch, samples, prompts) -> Selection:
    if method == "vanilla":
        return Vanilla(precision)
    if method == "oversampling":
        return Oversampling()
    if method == "moec":
        return Moec(per_cell, memory, scratch, samples, prompts)
    raise RecipeError(f"method = {method!r} is unknown: use one of {', '.join(METHODS)}")


def _training_tables(
    source: ScoredSamples,
    scored: Iterator[ScoredRows],
    bundles: list[Bundle],
    index: PromptIndex,
    selection: Selection,
    counts: _Counts,
    seed: int,
) -> Iterator[pa.Table]:
    """The last pass: every row that is kept, as often as it is kept, in the order of the shards."""
    wanted: dict[int, tuple[ScoredRows, np.ndarray]] = {}

    def with_rows() -> Iterator[Bundle]:
        for bundle, rows in zip(bundles, scored, strict=True):
            copies = selection.copies(rows)
            counts.after(rows, copies)
            if copies.any():
                wanted[bundle.start] = (rows, copies)
                yield bundle

    def read(bundle: Bundle) -> tuple[Bundle, pa.Table]:
        return bundle, read_bundle(source.samples, bundle, [*KEY, *_ANSWER])

    for bundle, answers in read_ahead(read, with_rows()):
        rows, copies = wanted.pop(bundle.start)
        check_aligned(rows.rank, answers, np.flatnonzero(copies), seed, source.samples, source.helpful)
        for taken in _repeats(copies):
            yield _training_rows(answers, rows, taken, index, selection)


def _write_tables(file: BinaryIO, tables: Iterator[pa.Table]) -> None:
    """Row groups of about ROW_GROUP rows, whatever the sizes of the tables."""
    waiting: list[pa.Table] = []
    with pq.ParquetWriter(file, DISTILLED, compression="zstd") as writer:
        for table in tables:
            waiting.append(table)
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
    chosen = answers.take(pa.array(taken)).combine_chunks()
    levels = selection.levels(rows.scores[taken])
    columns = {name: chosen[name] for name in (*KEY, *_ANSWER)} | dict(zip(ATTRIBUTES, levels.T, strict=True))
    columns["prompt_id"] = columns["prompt_id"].cast(pa.string())
    columns["messages"] = index.messages(rows.prompt[taken])
    return pa.table([columns[name] for name in DISTILLED.names], schema=DISTILLED)
