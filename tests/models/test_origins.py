"""A run that goes on with other data or weights than it began with is refused; where they lie and how old they are counts for nothing."""

import json
import os
import shutil

import pyarrow as pa
import pytest

from ctrlrl.errors import RunError
from ctrlrl.models.origins import known_by_content, record_origins, rows_fingerprint, same_origins, table_fingerprint


@pytest.fixture
def run(models, tmp_path):
    """A run that has begun with a copy of the tiny policy; the copy's directory."""
    own = tmp_path / "policy"
    shutil.copytree(models["policy"], own)
    (tmp_path / "run").mkdir()
    record_origins(tmp_path / "run", same_origins(tmp_path / "run", {"policy.model": str(own)}, {"data": "a"}))
    (tmp_path / "run" / "recipe.json").write_text("{}")
    return tmp_path / "run", own


def test_moved_and_touched_is_the_same(run, models, capsys):
    directory, own = run
    os.utime(own / "model.safetensors", (1, 1))
    stored = json.loads((directory / "origins.json").read_text())
    for place in (str(own), models["policy"]):
        assert same_origins(directory, {"policy.model": place}, {"data": "a"}) == stored
    assert not capsys.readouterr().out


def test_what_differs_is_named(run):
    directory, own = run
    weights = own / "model.safetensors"
    content, times = bytearray(weights.read_bytes()), weights.stat()
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(RunError, match="other content of policy.model.model.safetensors: restore it, or start a new run in another out"):
        same_origins(directory, {"policy.model": str(own)}, {"data": "a"})
    with pytest.raises(RunError, match="other content of policy.model.model.safetensors, data:"):
        same_origins(directory, {"policy.model": str(own)}, {"data": "b"})


def test_a_run_that_never_began_or_does_not_say_is_not_held_to_anything(run, capsys):
    directory, own = run
    (directory / "recipe.json").unlink()
    assert same_origins(directory, {"policy.model": str(own)}, {"data": "b"})["data"] == {"data": "b"}
    (directory / "recipe.json").write_text("{}")
    (directory / "origins.json").write_text("[]")
    with pytest.raises(RunError, match="origins.json cannot be read"):
        same_origins(directory, {"policy.model": str(own)}, {"data": "a"})
    (directory / "origins.json").unlink()
    same_origins(directory, {"policy.model": str(own)}, {"data": "b"})
    assert capsys.readouterr().out.count("does not say which data and weights it began with") == 1


def test_the_keys_of_what_is_known_by_content_may_change_their_paths(run):
    directory, _ = run
    assert known_by_content(str(directory), "data", "policy.model") == ("data", "policy.model")
    (directory / "origins.json").unlink()
    assert known_by_content(str(directory), "data") == ()


def test_fingerprints_are_of_rows_in_order():
    table = pa.table({"text": [f"row {i}" for i in range(25_000)], "ids": [[i] * (i % 3) if i % 5 else None for i in range(25_000)]})
    pieces = pa.concat_tables([table.slice(0, 333), table.slice(333)]).replace_schema_metadata({"written": "by another"})
    assert table_fingerprint(pieces) == table_fingerprint(table) != table_fingerprint(table.slice(1))
    assert table_fingerprint(table.slice(333)) == table_fingerprint(pa.Table.from_pylist(table.to_pylist()[333:], schema=table.schema))
    assert rows_fingerprint([["a", "b"], ["c"]]) == rows_fingerprint(iter([("a", "b"), ("c",)])) != rows_fingerprint([["c"], ["a", "b"]])
    assert rows_fingerprint([["a", "b"]]) != rows_fingerprint([["a"], ["b"]])
