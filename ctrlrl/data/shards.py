"""Numbered Parquet shards in a directory, each committed exactly once, with a fingerprint at the start and a manifest at the end.

    store.json                fingerprint (recipe, seeds, model hashes) and how many shards are planned; written first
    shards/000000.parquet     rows
    shards/000000.json        rows, bytes and SHA-256 of the Parquet file, and facts; a shard counts from the moment this file is there
    manifest.json             all of it, written last

Every file appears under its name by a rename after its bytes are on disk, so whoever is killed leaves no half file behind a name.
The scale (number of shards) is no part of the fingerprint: a larger one adds shards and leaves the old ones untouched.
"""
import fcntl
import json
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ctrlrl.config import differences
from ctrlrl.data.atomic import file_sha256, write_atomically, write_json
from ctrlrl.data.keys import prompt_keys, sample_ranks
from ctrlrl.errors import RunError

ROW_GROUP = 32_768  # rows that are read at a time; equal for every shard, so that shards of equal rows have equal groups
_OWN_FILES = {"store.json", "manifest.json", "shards", ".lock"}
_KEY = ["prompt_id", "unit", "index"]
_RECORD = re.compile(r"(\d{6,})\.json")
# Columns of few different values. A shard is small, and read many times: snappy, a dictionary for these columns alone and no statistics
# make reading one twice as fast as zstd and the defaults (tests/benchmarks/distill.py).
_REPEATED = ("prompt_id", "unit", "index", "finish_reason", "policy")
_NAMED = 5  # doubled rows named in a report


@dataclass(frozen=True)
class ShardRecord:
    """What is known of a committed shard: its number, rows, size and SHA-256 of its Parquet file, and what its maker noted."""

    index: int
    rows: int
    bytes: int
    sha256: str
    facts: dict


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


class ShardStore:
    """A directory of numbered shards. Reading needs no more than the directory; writing starts with `open_or_create`."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self._shards = self.directory / "shards"
        self._lock: BinaryIO | None = None
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
        """Numbers of the shards that count: the record and the data are there."""
        names = self._names()
        numbers = (match[1] for name in names if (match := _RECORD.fullmatch(name)))
        return sorted(int(number) for number in numbers if f"{number}.parquet" in names)

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
        """Write shard `index` once and for good; if it is already committed, that one stays and its record is returned."""
        if self._lock is None or self._planned is None:
            raise RunError(f"{self.directory} is open for reading: call open_or_create before commit")
        if not 0 <= index < self._planned:
            raise RunError(f"shard {index} is not one of the {self._planned} planned ones")
        data, record = self.path(index), self.path(index).with_suffix(".json")
        if record.exists():
            if data.exists():
                return self.record(index)
            record.unlink()  # its data was taken away; an old record must not vouch for new data
        repeated = [name for name in _REPEATED if name in table.column_names]
        layout = {"compression": "snappy", "use_dictionary": repeated, "write_statistics": False, "row_group_size": ROW_GROUP}
        write_atomically(data, lambda out: pq.write_table(table, out, **layout))
        entry = ShardRecord(index, table.num_rows, data.stat().st_size, file_sha256(data), facts)
        write_json(record, asdict(entry))
        return entry

    def finish(self, summary: dict) -> dict:
        """Write the manifest, last of all, and return it; raises RunError while planned shards are missing.

        A manifest of a larger scale stays: the smaller one is contained in it.
        """
        if missing := self.missing():
            raise RunError(f"{self.directory} lacks {len(missing)} of {self._planned} shards, such as {missing[0]}: run the command again")
        path = self.directory / "manifest.json"
        if path.exists() and len(self.manifest()["shards"]) >= self._planned:
            return self.manifest()
        records = [asdict(self.record(index)) for index in range(self._planned)]
        rows = sum(record["rows"] for record in records)
        write_json(path, {"fingerprint": self.fingerprint, "rows": rows, "summary": summary, "shards": records})
        return self.manifest()

    def manifest(self) -> dict:
        """fingerprint, rows, summary and shards of a finished directory; RunError says how far an unfinished one is."""
        if not (self.directory / "manifest.json").exists():
            done = f"{len(self.committed())} of {self.planned}"
            raise RunError(f"{self.directory} is not finished, {done} shards are there: run the command that makes it again")
        return self._read_json("manifest.json")

    def verify(self) -> Verification:
        """Check every byte against its hash, and look for gaps, strays and doubled (prompt_id, unit, index)."""
        good, damaged, rows, keys = [], {}, 0, []
        for index in self.committed():
            if problem := self._problem(index):
                damaged[index] = problem
                continue
            good.append(index)
            rows += self.record(index).rows
            keys.extend(ranks for _, ranks in self._keys(index))
        repeated = _repeated(keys)
        doubled = tuple(self._named(good, repeated)) if len(repeated) else ()
        counted = {name for i in self.committed() for name in (self.path(i).name, self.path(i).with_suffix(".json").name)}
        strays = self._names() - counted
        return Verification(len(good), rows, tuple(self.missing()), damaged, len(repeated), doubled, tuple(sorted(strays)))

    def close(self) -> None:
        """Let another process write."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> "ShardStore":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _refuse_other(self, fingerprint: dict) -> bool:
        """Whether the directory is already one of shards; raises RunError if it was made from something else or holds something else."""
        if self.directory.exists() and not self.directory.is_dir():
            raise RunError(f"{self.directory} is a file: give a directory")
        if (self.directory / "store.json").exists():
            if changed := "; ".join(differences(self.fingerprint, fingerprint)):
                self.close()
                raise RunError(f"{self.directory} was made with another recipe: {changed}: use a new directory or the old values")
            return True
        names = {entry.name for entry in os.scandir(self.directory)} if self.directory.exists() else set()
        foreign = sorted(name for name in names - _OWN_FILES if not name.endswith(".tmp"))
        if foreign:
            raise RunError(f"{self.directory} has no store.json but {foreign[0]}: not a directory of shards; give a new or an empty one")
        return False

    def _take_lock(self) -> None:
        """Keep every other process from writing until `close`; the system frees the lock if this process is killed."""
        if self._lock is not None:
            return
        lock = None
        try:
            self._shards.mkdir(parents=True, exist_ok=True)
            lock = open(self.directory / ".lock", "a+b")  # noqa: SIM115 (stays open as long as it is held)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise RunError(f"{self.directory} is being written by {lock.read().decode()}: wait for it, or stop it") from None
        except OSError as error:
            raise RunError(f"{self.directory} cannot be written or locked: {error}: choose another directory") from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        lock.flush()
        self._lock = lock

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

    def _problem(self, index: int) -> str | None:
        record, path = self.record(index), self.path(index)
        if path.stat().st_size != record.bytes or file_sha256(path) != record.sha256:
            return f"{path} is not the file that was committed: delete it and run the same command again"
        if pq.read_metadata(path).num_rows != record.rows:
            return f"{path} has {pq.read_metadata(path).num_rows} rows, its record says {record.rows}"
        return None

    def _keys(self, index: int) -> Iterator[tuple[pa.Table, np.ndarray]]:
        file = pq.ParquetFile(self.path(index))
        if set(_KEY) <= set(file.schema_arrow.names):
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=_KEY)
                prompt = prompt_keys(table["prompt_id"].combine_chunks())
                yield table, sample_ranks(prompt, table["unit"].to_numpy(), table["index"].to_numpy(), 0)

    def _named(self, indices: list[int], repeated: np.ndarray) -> Iterator[str]:
        """The first rows that stand for a repeated key, with their shards."""
        left = _NAMED
        for index in indices:
            for table, ranks in self._keys(index):
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

