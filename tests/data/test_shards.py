"""Shards are committed exactly once, whoever is killed when; a larger scale only adds; damage is found."""
import json
import os
import random
import signal
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctrlrl.data import atomic, keys
from ctrlrl.data.schemas import SCORES, conform
from ctrlrl.data.shards import ROW_GROUP, ShardStore
from ctrlrl.errors import DataError, RunError

FINGERPRINT = {"recipe": {"k": 4, "temperature": 0.5}, "seeds": (1, 2), "policy": "abc"}


def shard(index, rows=6):
    """Rows that depend on the shard's number alone."""
    ids = [f"{index:08x}{row // 2:08x}" for row in range(rows)]
    units = pa.array([0] * rows, pa.int32())
    columns = {"prompt_id": ids, "unit": units, "index": [r % 2 for r in range(rows)], "score": [index + r / 8 for r in range(rows)]}
    return conform(pa.table(columns), SCORES, "scores")


def filled(directory, shards, fingerprint=FINGERPRINT):
    store = ShardStore(directory).open_or_create(fingerprint, shards=shards)
    for index in store.missing():
        store.commit(index, shard(index), {"seconds": 0.5})
    store.finish({"tokens": 10 * shards})
    return store


def contents(directory):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (directory / "shards").iterdir()}


def test_a_store_from_start_to_manifest(tmp_path):
    store = ShardStore(tmp_path / "deep" / "run").open_or_create(FINGERPRINT, shards=3)
    assert store.missing() == [0, 1, 2]
    record = store.commit(1, shard(1), {"worker": "w"})
    assert (record.index, record.rows, record.facts) == (1, 6, {"worker": "w"})
    assert record.sha256 == atomic.file_sha256(store.path(1)) and record.bytes == store.path(1).stat().st_size
    assert store.missing() == [0, 2] and store.committed() == [1] and store.read(1).equals(shard(1))
    with pytest.raises(RunError, match="lacks 2 of 3 shards, such as 0"):
        store.finish({})
    with pytest.raises(RunError, match="not finished, 1 of 3"):
        store.manifest()
    store.commit(0, shard(0), {})
    store.commit(2, shard(2), {})
    manifest = store.finish({"tokens": 7})
    assert manifest["rows"] == 18 and manifest["summary"] == {"tokens": 7} and [s["index"] for s in manifest["shards"]] == [0, 1, 2]
    assert manifest["fingerprint"] == {"recipe": {"k": 4, "temperature": 0.5}, "seeds": [1, 2], "policy": "abc"}
    found = ShardStore(store.directory).verify()
    assert found.ok and (found.shards, found.rows, found.strays) == (3, 18, ())
    with pytest.raises(RunError, match="shard 3 is not one of the 3"):
        store.commit(3, shard(3), {})
    with pytest.raises(RunError, match="open for reading"):
        ShardStore(store.directory).commit(0, shard(0), {})


def test_the_first_commit_of_a_shard_wins(tmp_path):
    store = ShardStore(tmp_path).open_or_create(FINGERPRINT, shards=2)
    first = store.commit(0, shard(0), {"worker": "a"})
    before = contents(tmp_path)
    assert store.commit(0, shard(9), {"worker": "b"}) == first
    assert contents(tmp_path) == before


def test_a_larger_scale_adds_and_leaves_the_old_shards_untouched(tmp_path):
    filled(tmp_path, 2).close()
    before = contents(tmp_path)
    with ShardStore(tmp_path).open_or_create(FINGERPRINT, shards=16) as store:
        assert store.missing() == list(range(2, 16))
        assert len(store.manifest()["shards"]) == 2  # the smaller scale stays readable meanwhile
    filled(tmp_path, 16).close()
    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before and len(after) == 32
    # The smaller scale is contained in the larger one, whose manifest stays.
    store = filled(tmp_path, 2)
    assert len(store.manifest()["shards"]) == 16 and store.planned == 16


def test_an_interrupted_extension_can_be_finished_at_the_smaller_scale(tmp_path):
    with ShardStore(tmp_path).open_or_create(FINGERPRINT, shards=8) as store:
        for index in (0, 1, 5):
            store.commit(index, shard(index), {})
    assert len(filled(tmp_path, 2).manifest()["shards"]) == 2
    assert ShardStore(tmp_path).verify().missing == (2, 3, 4, 6, 7)


def test_another_recipe_or_directory_is_refused_and_nothing_changes(tmp_path):
    filled(tmp_path / "run", 1).close()
    before = contents(tmp_path / "run")
    changed = {**FINGERPRINT, "recipe": {"k": 8, "temperature": 0.5}, "policy": "xyz"}
    with pytest.raises(RunError, match=r'another recipe: policy: "abc" -> "xyz"; recipe.k: 4 -> 8: use a new directory'):
        ShardStore(tmp_path / "run").open_or_create(changed, shards=1)
    assert contents(tmp_path / "run") == before
    ShardStore(tmp_path / "run").open_or_create(FINGERPRINT, shards=1)  # the refusal left no lock behind
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    with pytest.raises(RunError, match=r"no store.json but thesis.tex"):
        ShardStore(tmp_path / "other").open_or_create(FINGERPRINT, shards=1)
    assert os.listdir(tmp_path / "other") == ["thesis.tex"]
    with pytest.raises(RunError, match="is a file"):
        ShardStore(tmp_path / "other" / "thesis.tex").open_or_create(FINGERPRINT, shards=1)
    for call in (ShardStore.verify, ShardStore.missing, ShardStore.committed, ShardStore.manifest):
        with pytest.raises(RunError, match="not a directory of shards"):
            call(ShardStore(tmp_path / "nowhere"))


def test_two_writers_are_refused(tmp_path):
    store = ShardStore(tmp_path).open_or_create(FINGERPRINT, shards=1)
    with pytest.raises(RunError, match=f"being written by process {os.getpid()} on "):
        ShardStore(tmp_path).open_or_create(FINGERPRINT, shards=1)
    store.close()
    ShardStore(tmp_path).open_or_create(FINGERPRINT, shards=1).commit(0, shard(0), {})


def test_a_directory_that_another_process_has_just_made_is_refused(tmp_path, monkeypatch):
    """Between our first look and our lock, another process creates it with another recipe, and ends."""
    take = ShardStore._take_lock

    def late(store):
        take(store)
        (tmp_path / "store.json").write_text(json.dumps({"fingerprint": {"other": 1}, "shards": 1}))

    monkeypatch.setattr(ShardStore, "_take_lock", late)
    refused = ShardStore(tmp_path)
    with pytest.raises(RunError, match="other: 1 -> null"):
        refused.open_or_create(FINGERPRINT, shards=1)
    monkeypatch.undo()
    ShardStore(tmp_path).open_or_create({"other": 1}, shards=1)  # the refused one gave its lock back


class Killed(BaseException):
    """Stands for a SIGKILL at this line: nothing in the library catches it."""


def dies_at(monkeypatch, step):
    """From now on the given flush of a file or rename kills; returns what was called before."""
    real, calls = {"fsync": os.fsync, "replace": os.replace}, []

    def dying(name):
        def call(*args):
            if name == "replace" or not os.path.isdir(f"/proc/self/fd/{args[0]}"):
                if len(calls) == step:
                    raise Killed
                calls.append(name)
            return real[name](*args)

        return call

    for name in real:
        monkeypatch.setattr(atomic.os, name, dying(name))
    return calls


STEPS = ["fsync", "replace", "fsync", "replace"]  # data on disk, data named, record on disk, record named


def test_a_commit_has_four_steps(tmp_path, monkeypatch):
    store = ShardStore(tmp_path).open_or_create(FINGERPRINT, shards=1)
    calls = dies_at(monkeypatch, 99)
    store.commit(0, shard(0), {})
    assert calls == STEPS


@pytest.mark.parametrize("step", range(4))
def test_killed_at_each_step_of_a_commit(tmp_path, monkeypatch, step):
    """Only after the last step the shard counts; until then it is as if nothing had been written."""
    store = ShardStore(tmp_path).open_or_create(FINGERPRINT, shards=1)
    calls = dies_at(monkeypatch, step)
    with pytest.raises(Killed):
        store.commit(0, shard(7), {})
    assert calls == STEPS[:step]
    monkeypatch.undo()
    store.close()
    found = ShardStore(tmp_path).verify()
    assert (found.shards, found.rows, found.missing, found.damaged) == (0, 0, (0,), {})
    assert found.strays == ((".000000.parquet.tmp",) if step < 2 else (".000000.json.tmp", "000000.parquet"))
    with ShardStore(tmp_path).open_or_create(FINGERPRINT, shards=1):
        assert not list((tmp_path / "shards").glob(".*"))  # the half-written file is gone
    again = filled(tmp_path, 1)
    assert again.read(0).equals(shard(0)) and again.verify().strays == ()


def test_an_old_record_does_not_vouch_for_new_data(tmp_path, monkeypatch):
    store = filled(tmp_path, 1)
    store.path(0).unlink()
    assert store.missing() == [0]
    dies_at(monkeypatch, 2)
    with pytest.raises(Killed):
        store.commit(0, shard(7), {})
    assert store.path(0).exists() and store.missing() == [0]


WRITER = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from test_shards import FINGERPRINT, shard
from ctrlrl.data.shards import ShardStore
store = ShardStore(sys.argv[1]).open_or_create(FINGERPRINT, shards=100)
print("open", flush=True)
for index in store.missing():
    store.commit(index, shard(index, 400), {{}})
store.finish({{}})
"""


def test_kill_9_at_random_moments_loses_and_doubles_nothing(tmp_path):
    here = os.path.dirname(__file__)
    script = WRITER.format(root=os.path.dirname(os.path.dirname(here)), tests=here)
    moments, kills, done = random.Random(0), 0, []
    for _ in range(100):
        process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"open\n"
        if kills < 6:
            time.sleep(moments.uniform(0, 0.02))
            process.send_signal(signal.SIGKILL)
        code = process.wait(timeout=60)
        process.stdout.close()
        found = ShardStore(tmp_path).verify()
        assert not found.damaged and not found.duplicates and found.rows == 400 * found.shards
        assert set(done) <= set(ShardStore(tmp_path).committed())  # what was committed stays
        done = ShardStore(tmp_path).committed()
        if code == 0:
            break
        kills += 1
    assert kills >= 3 and found.ok and found.shards == 100 and found.strays == ()
    assert all(ShardStore(tmp_path).read(index).equals(shard(index, 400)) for index in range(100))


def test_verify_finds_damage_gaps_strays_and_doubled_rows(tmp_path):
    with ShardStore(tmp_path).open_or_create(FINGERPRINT, shards=6) as store:
        for index in (0, 1, 2, 4):
            store.commit(index, shard(index), {})
        store.commit(5, pa.concat_tables([shard(2).slice(3, 1), shard(5)]), {})
    flipped = bytearray(store.path(1).read_bytes())
    flipped[40] ^= 1
    store.path(1).write_bytes(flipped)
    record = store.path(4).with_suffix(".json")
    record.write_text(record.read_text().replace('"rows": 6', '"rows": 5'))
    (tmp_path / "shards" / "000003.parquet").write_bytes(b"half")
    found = ShardStore(tmp_path).verify()
    assert not found.ok and found.missing == (3,) and found.strays == ("000003.parquet",) and found.shards == 3
    assert set(found.damaged) == {1, 4} and "not the file that was committed" in found.damaged[1] and "has 6 rows" in found.damaged[4]
    assert found.duplicates == 1
    assert found.doubled == ("prompt 0000000200000001, unit 0, index 1 (shard 2)", "prompt 0000000200000001, unit 0, index 1 (shard 5)")
    # The remedy of the message: delete the file and run again.
    store.path(1).unlink()
    with ShardStore(tmp_path).open_or_create(FINGERPRINT, shards=2) as store:
        assert store.missing() == [1]
        store.commit(1, shard(1), {})
    assert 1 not in ShardStore(tmp_path).verify().damaged
    record.write_text("{")
    with pytest.raises(RunError, match="000004.json is damaged"):
        ShardStore(tmp_path).verify()


def test_a_full_disk_is_a_clear_error(tmp_path, monkeypatch):
    store = ShardStore(tmp_path).open_or_create(FINGERPRINT, shards=1)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(RunError, match="000000.parquet cannot be written.*No space left"):
        store.commit(0, shard(0), {})
    assert store.missing() == [0] and not list((tmp_path / "shards").iterdir())  # what was begun gives its space back


def test_shards_have_row_groups_of_a_fixed_size(tmp_path):
    store = ShardStore(tmp_path).open_or_create(FINGERPRINT, shards=1)
    store.commit(0, pa.table({"x": range(ROW_GROUP + 1)}), {})
    assert [pq.ParquetFile(store.path(0)).metadata.row_group(g).num_rows for g in range(2)] == [ROW_GROUP, 1]
    assert json.loads((tmp_path / "shards" / "000000.json").read_text())["rows"] == ROW_GROUP + 1


def test_conform_names_what_differs():
    table = shard(0)
    assert conform(table.select([3, 2, 1, 0]), SCORES, "scores").schema == SCORES
    with pytest.raises(DataError, match="scores has the columns .* got one without unit, score and with unknown x"):
        conform(pa.table({"prompt_id": ["a"], "index": [0], "x": [1]}), SCORES, "scores")
    with pytest.raises(DataError, match="column score .* 1 empty values"):
        conform(table.slice(0, 1).set_column(3, "score", pa.array([None], pa.float64())), SCORES, "scores")
    with pytest.raises(DataError, match="column unit .* is int32; got string"):
        conform(table.slice(0, 1).set_column(1, "unit", pa.array(["one"])), SCORES, "scores")


def test_keys_are_the_numbers_that_ids_spell():
    ids = pa.array(["x", "00000000000000ff", "fedcba9876543210", "8000000000000000"])
    assert keys.prompt_keys(ids.slice(1)).tolist() == [255, 0xFEDCBA9876543210, 1 << 63]
    assert keys.prompt_keys(ids.slice(1).dictionary_encode()).tolist() == [255, 0xFEDCBA9876543210, 1 << 63]
    assert keys.prompt_keys(pa.array([], pa.string())).tolist() == []
    for wrong in ("x", "00000000000000fg", "0" * 17, "0" * 14 + "  "):
        with pytest.raises(DataError, match=f"prompt_id {wrong} is not"):
            keys.prompt_keys(pa.array(["0" * 16, wrong]))
