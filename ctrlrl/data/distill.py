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

from ctrlrl.attributes import PAPER, Attributes
from ctrlrl.control import cells
from ctrlrl.data.atomic import file_sha256, write_atomically, write_json
from ctrlrl.data.disk import disk_told
from ctrlrl.data.joint import JointScores
from ctrlrl.data.prompt_index import PromptIndex
from ctrlrl.data.schemas import distilled_schema
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
from ctrlrl.errors import DataError, RecipeError

METHODS = ("vanilla", "oversampling", "moec")
TABLE, REPORT = "train.parquet", "report.json"
_ANSWER = ["response", "token_ids", "finish_reason"]


def distill(
    source: ScoredSamples, out: str | Path, *, method: str, seed: int, per_cell: int = 1, precision: int = 4, memory: int = 1 << 30
) -> dict:
    """Write `out`/train.parquet (schema DISTILLED) and, last, `out`/report.json; return the report.

    method: "vanilla" (every sample; control = its scores rounded to `precision` digits), "oversampling" (scores quantised to 0.2 if
    below 0.5, else 1; samples of rarer classes repeated until all non-empty classes are equally large), or "moec": samples whose
    scores are all extreme, in [0, 0.2] or [0.8, 1] with the ends, quantised to 0.2 or 1; of the prompts with at least two different
    corners, `per_cell` samples drawn for each. Of attributes with other levels than these two see
    data.selection. memory: bytes that grouping by prompt may use.

    A sample that lacks a score (null) is left out of everything, and counted under "unscored" of the report, if there are any.

    Raises RunError for unfinished stores, DataError for shards that do not match, hold bad scores or hold none, RecipeError for bad
    settings, StorageError for a full disk.
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
            attributes, rows = source.attributes, sum(b.rows for b in bundles)
            selection = _selection(method, per_cell, precision, memory, scratch, rows, len(index), attributes)
            counts, joint, unscored = _Counts(len(index), attributes), JointScores(attributes.names), 0
            with open(scratch / "scored", "w+b") as scored:
                for whole in read_ahead(lambda bundle: scored_rows(source, bundle, index, seed), bundles):
                    write_rows(scored, whole)
                    rows = whole.scored()
                    unscored += len(whole.rank) - len(rows.rank)
                    joint.count(rows.scores)
                    counts.before(rows)
                    selection.count(rows)
                if unscored and unscored == sum(b.rows for b in bundles):
                    raise DataError(f"none of the {unscored:,} samples has all its scores: score these samples anew")
                for rows in read_rows_again(scored, bundles, len(attributes)):
                    joint.correlate(rows.scores)
                    selection.choose(rows)
                selection.settle()
                (out / REPORT).unlink(missing_ok=True)  # an old report must not vouch for a new table
                again = read_rows_again(scored, bundles, len(attributes))
                tables = _training_tables(source, again, bundles, index, selection, counts, seed)
                write_atomically(out / TABLE, lambda file: _write_tables(file, tables, distilled_schema(attributes)))
            settings = {"method": method, "seed": seed, "per_cell": per_cell, "precision": precision}
            report = settings | counts.report() | joint.report() | ({"unscored": unscored} if unscored else {})
            report["table_sha256"] = file_sha256(out / TABLE)
            report["sources"] = {name: store.fingerprint for name, store in source.stores.items()}
            report["shards"] = shards_of(source)
            report |= {} if attributes == PAPER else {"attributes": attributes.dumped()}
            if source.maps:
                report["calibrate"] = source.maps[attributes.names[0]].kind
                report["calibration"] = {attribute: source.maps[attribute].content_hash for attribute in attributes.names}
            write_json(out / REPORT, report)
            return report
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def shards_of(source: ScoredSamples) -> dict[str, str]:
    """For each store a hash of its shards: what tells a table of these rows from one of others."""
    stores = {name: store.manifest()["shards"] for name, store in source.stores.items()}
    return {name: hashlib.sha256("".join(s["sha256"] for s in shards).encode()).hexdigest() for name, shards in stores.items()}


def calibrated_by(report: dict) -> str:
    """How the scores of a table were calibrated; reports of older versions do not say it, and knew one way."""
    return report.get("calibrate", "quantile" if "calibration" in report else "")


class _Counts:
    """What the report counts: rows, prompts, and classes before and after."""

    def __init__(self, prompts: int, attributes: Attributes):
        self._attributes, self._cells = attributes, cells(attributes)
        self._seen, self._kept = np.zeros(prompts, bool), np.zeros(prompts, bool)
        self._rows = {"before": 0, "after": 0}
        self._classes = {name: np.zeros(len(self._cells), np.int64) for name in ("before", "extreme", "after")}

    def before(self, rows: ScoredRows) -> None:
        """First pass: what there is."""
        self._seen[rows.prompt] = True
        self._rows["before"] += len(rows.prompt)
        of, extreme = classes(rows.scores, self._attributes), extremes(rows.scores, self._attributes)
        self._classes["before"] += np.bincount(of, minlength=len(self._cells))
        self._classes["extreme"] += np.bincount(of[extreme], minlength=len(self._cells))

    def after(self, rows: ScoredRows, copies: np.ndarray) -> None:
        """Last pass: what is written."""
        self._kept[rows.prompt[copies > 0]] = True
        self._rows["after"] += int(copies.sum())
        of = classes(rows.scores, self._attributes)
        self._classes["after"] += np.bincount(of, copies, minlength=len(self._cells)).astype(np.int64)

    def report(self) -> dict:
        """rows, prompts and classes, for report.json."""
        seen, kept = int(self._seen.sum()), int(self._kept.sum())
        named = {name: dict(zip((c.name for c in self._cells), counts.tolist(), strict=True)) for name, counts in self._classes.items()}
        return {"rows": self._rows, "prompts": {"before": seen, "after": kept, "share": kept / max(seen, 1)}, "classes": named}


def _selection(method, per_cell, precision, memory, scratch, samples, prompts, attributes) -> Selection:
    if method == "vanilla":
        return Vanilla(precision)
    if method == "oversampling":
        return Oversampling(attributes)
    if method == "moec":
        return Moec(per_cell, memory, scratch, samples, prompts, attributes)
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
        answers = answers if rows.at is None else answers.take(pa.array(rows.at))
        check_aligned(rows.rank, answers, np.flatnonzero(copies), seed, source.samples, source.scores[0])
        for taken in _repeats(copies):
            yield _training_rows(answers, rows, taken, index, selection, source.attributes)


def _write_tables(file: BinaryIO, tables: Iterator[pa.Table], schema: pa.Schema) -> None:
    """Row groups of about ROW_GROUP rows, whatever the sizes of the tables."""
    waiting: list[pa.Table] = []
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
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


def _training_rows(
    answers: pa.Table, rows: ScoredRows, taken: np.ndarray, index: PromptIndex, selection: Selection, attributes: Attributes
) -> pa.Table:
    chosen = answers.take(pa.array(taken)).combine_chunks()
    levels = selection.levels(rows.scores[taken])
    columns = {name: chosen[name] for name in (*KEY, *_ANSWER)} | dict(zip(attributes.names, levels.T, strict=True))
    columns["prompt_id"] = columns["prompt_id"].cast(pa.string())
    columns["messages"] = index.messages(rows.prompt[taken])
    schema = distilled_schema(attributes)
    return pa.table([columns[name] for name in schema.names], schema=schema)
