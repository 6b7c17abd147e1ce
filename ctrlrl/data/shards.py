"""Numbered Parquet shards in a directory, each committed exactly once, with a fingerprint at the start and a manifest at the end.

    store.json                fingerprint (recipe, seeds, model hashes) and how many shards are planned; written first
    shards/000000.parquet     rows
    shards/000000.json        rows, bytes and SHA-256 of the Parquet file, and facts; a shard counts from the moment this file is there
    manifest.json             all of it, written last

Every file appears under its name by a rename after its bytes are on disk, so whoever is killed leaves no half file behind a name.
The scale (number of shards) is no part of the fingerprint: a larger one adds shards and leaves the old ones untouched.

Shards may be made from those of another store, one by one (scores from samples). Such a shard notes the SHA-256 of what it was made
from; when that is gone or was made anew, the shard counts as missing, and so does a manifest that lists other shards than are there.
"""
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ctrlrl.config import differences
from ctrlrl.data.atomic import file_sha256, write_atomically, write_json
from ctrlrl.data.disk import disk_told
from ctrlrl.data.lock import DirectoryLock
from ctrlrl.data.verification import Verification, verify
from ctrlrl.errors import RunError

ROW_GROUP = 32_768  # rows that are read at a time; equal for every shard, so that shards of equal rows have equal groups
_OWN_FILES = {"store.json", "manifest.json", "shards", ".lock"}
SOURCE = "samples_sha256"  # the fact that names the shard of the source
_RECORD = re.compile(r"(\d{6,})\.json")
# Columns of few different values. A shard is small, and read many times: snappy, a dictionary for these columns alone and no statistics
# make reading one twice as fast as zstd and the defaults (tests/benchmarks/distill.py).
_REPEATED = ("prompt_id", "unit", "index", "finish_reason", "policy")


@dataclass(frozen=True)
class ShardRecord:
    """What is known of a committed shard: its number, rows, size and SHA-256 of its Parquet file, and what its maker noted."""

    index: int
    rows: int
    bytes: int
    sha256: str
    facts: dict


class ShardStore:
    """A directory of numbered shards. Reading needs no more than the directory; writing starts with `open_or_create`."""

    def __init__(self, directory: str | Path, source: "ShardStore | None" = None):
        self.directory, self._source = Path(directory), source  # source: the store whose shards these are made from
        self._shards = self.directory / "shards"
        self._lock = DirectoryLock(self.directory)
        self._planned: int | None = None  # until open_or_create, as many as the largest scale asked for

    def open_or_create(self, fingerprint: dict, *, shards: int) -> "ShardStore":
        """Become the one writer of the directory, with shards 0 … `shards` − 1 to be there in the end.

        Raises RunError, and leaves the directory as it was, if it was made with another fingerprint (the differences are named), holds
        something else, or is being written by another process.
        """
        fingerprint = json.loads(json.dumps(fingerprint, allow_nan=False))  # as it will be read: tuples are lists
        self._refuse_other(fingerprint)
        self._take_lock()
        known = self._refuse_other(fingerprint)  # once more, now that nobody else can create it
        for folder in (self.directory, self._shards):
            for stale in folder.glob(".*.tmp"):  # of a writer that was killed; ours is the only one now
                stale.unlink()
        if not known or shards > self.planned:
            write_json(self.directory / "store.json", {"fingerprint": fingerprint, "shards": shards})
        self._planned = shards
        return self

    def check_origin(self, fingerprint: dict, remedy: str) -> None:
        """RunError, which names the differences and the remedy, if the directory was made with another fingerprint."""
        self._refuse_other(json.loads(json.dumps(fingerprint, allow_nan=False)), remedy)

    @property
    def fingerprint(self) -> dict:
        """What the directory was made from."""
        return self._read_json("store.json")["fingerprint"]

    @property
    def planned(self) -> int:
        """How many shards the largest scale asked for."""
        return self._read_json("store.json")["shards"]

    def path(self, index: int) -> Path:
        """The Parquet file of a shard, whether it is there or not."""
        return self._shards / f"{index:06d}.parquet"

    def committed(self) -> list[int]:
        """Numbers of the shards that count: the record and the data are there, and made from what is in the source now."""
        present = self._present()
        if self._source is None or not present:
            return present
        there = set(self._source.committed())
        return [i for i in present if i in there and self.record(i).facts.get(SOURCE) == self._source.record(i).sha256]

    def outdated(self) -> list[int]:
        """Numbers of the shards that are there and do not count, because they were made from other shards of the source."""
        return sorted(set(self._present()) - set(self.committed()))

    def missing(self) -> list[int]:
        """Numbers of the planned shards that are not committed."""
        return sorted(set(range(self.planned if self._planned is None else self._planned)) - set(self.committed()))

    def record(self, index: int) -> ShardRecord:
        """The record of a committed shard."""
        return ShardRecord(**self._read_json(f"shards/{index:06d}.json"))

    def read(self, index: int, columns: list[str] | None = None) -> pa.Table:
        """The rows of a committed shard."""
        return pq.read_table(self.path(index), columns=columns)

    def commit(self, index: int, table: pa.Table, facts: dict) -> ShardRecord:
        """Write shard `index` once and for good; if it is already committed, that one stays and its record is returned.

        facts may name under SOURCE the shard of the source that the rows were made from; else it is the one that is there.
        """
        if not self._lock.held or self._planned is None:
            raise RunError(f"{self.directory} is open for reading: call open_or_create before commit")
        self._lock.check()
        if not 0 <= index < self._planned:
            raise RunError(f"shard {index} is not one of the {self._planned} planned ones")
        data, record = self.path(index), self.path(index).with_suffix(".json")
        if self._source is not None:
            facts = {SOURCE: self._source.record(index).sha256} | facts
        if record.exists():
            kept = self.record(index)
            if data.exists() and (self._source is None or kept.facts.get(SOURCE) == facts[SOURCE]):
                return kept
            record.unlink()  # its data was taken away, or is outdated; an old record must not vouch for new data
        repeated = [name for name in _REPEATED if name in table.column_names]
        layout = {"compression": "snappy", "use_dictionary": repeated, "write_statistics": False, "row_group_size": ROW_GROUP}
        write_atomically(data, lambda out: pq.write_table(table, out, **layout))
        entry = ShardRecord(index, table.num_rows, data.stat().st_size, file_sha256(data), facts)
        write_json(record, asdict(entry))
        return entry

    def finish(self, summary: dict) -> dict:
        """Write the manifest, last of all, and return it; raises RunError while planned shards are missing.

        A manifest of a larger scale stays, if it lists the shards that are there: the smaller one is contained in it.
        """
        if missing := self.missing():
            raise RunError(f"{self.directory} lacks {len(missing)} of {self._planned} shards, such as {missing[0]}: run the command again")
        path = self.directory / "manifest.json"
        if (written := self._manifest()) and len(written["shards"]) >= self._planned and not self._untrue(written):
            return written
        records = [asdict(self.record(index)) for index in range(self._planned)]
        rows = sum(record["rows"] for record in records)
        write_json(path, {"fingerprint": self.fingerprint, "rows": rows, "summary": summary, "shards": records})
        return self.manifest()

    def manifest(self) -> dict:
        """fingerprint, rows, summary and shards of a finished directory; RunError says how far an unfinished one is, or what changed."""
        if (written := self._manifest()) is None:
            done = f"{len(self.committed())} of {self.planned}"
            raise RunError(f"{self.directory} is not finished, {done} shards are there: run the command that makes it again")
        if change := self._untrue(written):
            raise RunError(f"{change}: run the command that makes it again, or ctrlrl inspect, which says what to do")
        return written

    def listed(self) -> set[int]:
        """Numbers of the shards that the manifest lists, whether they are there or not; none without a manifest."""
        return {entry["index"] for entry in (self._manifest() or {"shards": []})["shards"]}

    @property
    def finished(self) -> bool:
        """Whether the manifest is there and lists the shards that are there."""
        written = self._manifest()
        return written is not None and not self._untrue(written)

    def strays(self) -> tuple[str, ...]:
        """Files beside the shards that belong to none: what a killed writer left."""
        counted = {name for i in self._present() for name in (self.path(i).name, self.path(i).with_suffix(".json").name)}
        return tuple(sorted(self._names() - counted))

    def verify(self) -> Verification:
        """Check every byte against its hash, and look for gaps, strays and doubled (prompt_id, unit, index)."""
        return verify(self)

    def close(self) -> None:
        """Let another process write."""
        self._lock.release()

    def __enter__(self) -> "ShardStore":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _refuse_other(self, fingerprint: dict, remedy: str = "use a new directory or the old values") -> bool:
        """Whether the directory is already one of shards; raises RunError if it was made from something else or holds something else."""
        if self.directory.exists() and not self.directory.is_dir():
            raise RunError(f"{self.directory} is a file: give a directory")
        if (self.directory / "store.json").exists():
            if changed := "; ".join(differences(self.fingerprint, fingerprint)):
                self.close()
                raise RunError(f"{self.directory} was made with another recipe: {changed}: {remedy}")
            return True
        names = {entry.name for entry in os.scandir(self.directory)} if self.directory.exists() else set()
        foreign = sorted(name for name in names - _OWN_FILES if not name.endswith(".tmp"))
        if foreign:
            raise RunError(f"{self.directory} has no store.json but {foreign[0]}: not a directory of shards; give a new or an empty one")
        return False

    def _take_lock(self) -> None:
        """Keep every other process from writing until `close`."""
        self._lock.take()
        with disk_told(self._shards):
            self._shards.mkdir(exist_ok=True)

    def _present(self) -> list[int]:
        """Numbers of the shards whose record and data are there."""
        names = self._names()
        numbers = (match[1] for name in names if (match := _RECORD.fullmatch(name)))
        return sorted(int(number) for number in numbers if f"{number}.parquet" in names)

    def _manifest(self) -> dict | None:
        return self._read_json("manifest.json") if (self.directory / "manifest.json").exists() else None

    def _untrue(self, manifest: dict) -> str:
        """How the shards that are there differ from those that a manifest lists, in words; empty if they do not."""
        present, there = set(self._present()), set(self.committed())
        for entry in manifest["shards"]:
            index = entry["index"]
            if index not in present:
                return f"{self.path(index)} cannot be read: it is gone, although {self.directory / 'manifest.json'} lists it"
            if index not in there:
                return f"{self.path(index)} was made from other shards than are in {self._source.directory}"
            if entry != asdict(self.record(index)):
                return f"{self.path(index)} was made again since {self.directory / 'manifest.json'} was written"
        return ""

    def _names(self) -> set[str]:
        try:
            return {entry.name for entry in os.scandir(self._shards)}
        except OSError as error:
            raise RunError(f"{self.directory} is not a directory of shards: {error}") from None

    def _read_json(self, name: str) -> dict:
        path = self.directory / name
        try:
            return json.loads(path.read_bytes())
        except FileNotFoundError:
            raise RunError(f"{path} does not exist: {self.directory} is not a directory of shards, or lacks this one") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise RunError(f"{path} is damaged: {error}") from None
