"""Prompts and pairs from every kind of file, and what a bad row says."""
import csv
import gzip
import json
import sys
import types

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctrlrl.data.rows import parse_transcript
from ctrlrl.data.sources import prompt_id, read_pairs, read_prompts
from ctrlrl.errors import DataError

HELLO = [{"role": "user", "content": "Hello"}]
CONTEXT = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: What is\n\na pen?"
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}, {"role": "user", "content": "What is\n\na pen?"}]
HH_ROW = {"chosen": CONTEXT + "\n\nAssistant: A tool.", "rejected": CONTEXT + "\n\nAssistant: No idea."}


def write(path, rows, opener=open):
    with opener(path, "wt", encoding="utf-8") as out:
        out.writelines((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    return path


def test_prompt_id_is_the_hash_of_roles_and_contents():
    assert prompt_id(HELLO) == "b0ae8b0f316e2f14"  # printf "[[\"user\",\"Hello\"]]" | sha256sum
    assert prompt_id([{"content": "Hello", "role": "user", "name": "ignored"}]) == prompt_id(HELLO)
    others = ([{"role": "user", "content": "Hello "}], [{"role": "system", "content": "Hello"}], [*HELLO, *HELLO])
    assert len({prompt_id(HELLO), *map(prompt_id, others)}) == 4


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_prompts(tmp_path, kind):
    path, texts = tmp_path / f"set.{kind}", ["Hello", 'comma, quote " and\nline', "déjà vu", "Hello"]
    if kind == "csv":
        with open(path, "w", newline="", encoding="utf-8-sig") as out:
            csv.writer(out).writerows([["prompt", "id"], *([t, str(i)] for i, t in enumerate(texts))])
    elif kind == "parquet":
        pq.write_table(pa.table({"prompt": texts}), path)
    else:
        write(path, [{"prompt": t} for t in texts], gzip.open if kind.endswith("gz") else open)
    found = read_prompts(path)
    assert [p.messages for p in found] == [({"role": "user", "content": t},) for t in texts[:3]]
    assert found.prompts[0].prompt_id == prompt_id(HELLO)
    # The second text spans two lines of the CSV, whose header is line 1.
    assert [p.source for p in found] == [f"{path}:{n}" for n in ((2, 3, 5) if kind == "csv" else (1, 2, 3))]
    assert (found.report.files, found.report.rows, found.report.duplicates, found.report.rejected) == ((str(path),), 4, 1, 0)


def test_directory_reads_its_files_in_order_and_counts_duplicates_across_them(tmp_path):
    write(tmp_path / "b.jsonl", [{"prompt": "two"}, {"prompt": "one"}])
    (tmp_path / "deep").mkdir()
    write(tmp_path / "deep" / "c.jsonl.gz", [{"prompt": "three"}], gzip.open)
    write(tmp_path / "a.jsonl", [{"prompt": "one"}])
    write(tmp_path / "README.md", ["no data"])
    found = read_prompts(tmp_path)
    assert [p.messages[0]["content"] for p in found] == ["one", "two", "three"]
    assert len(found.report.files) == 3 and found.report.duplicates == 1 and found.report.rows == 4


def test_messages_system_and_limit(tmp_path):
    rows = [{"messages": TURNS}, {"prompt": "Hello", "system": "Be brief."}, {"prompt": "late"}]
    found = read_prompts(write(tmp_path / "a.jsonl", rows), limit=2)
    assert [list(p.messages) for p in found] == [TURNS, [{"role": "system", "content": "Be brief."}, *HELLO]]
    path = tmp_path / "m.csv"
    with open(path, "w", newline="") as out:
        csv.writer(out).writerows([["messages"], [json.dumps(TURNS)]])
    assert read_prompts(path).prompts[0].messages == tuple(TURNS)


def test_hh_transcripts_become_messages_and_keep_every_turn(tmp_path):
    assert parse_transcript(HH_ROW["chosen"]) == [*TURNS, {"role": "assistant", "content": "A tool."}]
    path = write(tmp_path / "hh.jsonl", [HH_ROW])
    assert read_prompts(path).prompts[0].messages == tuple(TURNS)
    (pair,) = read_pairs(path)
    assert (pair.messages, pair.chosen, pair.rejected, pair.source) == (tuple(TURNS), "A tool.", "No idea.", f"{path}:1")


def test_pairs_with_plain_answers_and_system(tmp_path):
    rows = [{"prompt": "Hello", "chosen": "Hi", "rejected": ""}, {"system": "S", "messages": HELLO, "chosen": "a", "rejected": "b"}]
    first, second = read_pairs(write(tmp_path / "p.jsonl", rows))
    assert (list(first.messages), first.chosen, first.rejected) == (HELLO, "Hi", "")
    assert list(second.messages) == [{"role": "system", "content": "S"}, *HELLO]
    assert len(read_pairs(tmp_path / "p.jsonl", limit=1)) == 1


BAD = [
    ("{broken", "not a JSON object"),
    ("[1, 2]", "a row is a JSON object"),
    ({"text": "Hello"}, 'needs "messages"'),
    ({"prompt": "  "}, "message is empty"),
    ({"prompt": 3}, '"prompt" is a text'),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "ends with the user"),
    ({"messages": [{"role": "robot", "content": "a"}]}, '"role"'),
    ({"messages": "Hello"}, "not JSON"),
    ({"messages": {"role": "user", "content": "a"}}, "is a list of"),
    ({"messages": [{"role": "system", "content": "a"}, *HELLO], "system": "b"}, "not in both"),
    ('{"prompt": "\\ud800"}', "surrogate"),
    ({"chosen": "\n\nHuman: a\n\nHuman: b\n\nAssistant: c", "rejected": "x"}, "turn 2"),
    ({"chosen": "Hi", "rejected": "Ho"}, "transcript starts"),
    ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: z\n\nAssistant: b"}, "share every turn"),
]


@pytest.mark.parametrize(("row", "says"), BAD, ids=[says for _, says in BAD])
def test_a_bad_row_stops_with_file_and_line_or_is_set_aside(tmp_path, row, says):
    path = write(tmp_path / "set.jsonl", [{"prompt": "good"}, "", row, {"prompt": "also good"}])
    with pytest.raises(DataError, match=says) as caught:
        read_prompts(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    found = read_prompts(path, skip_bad_rows=True)
    assert len(found) == 2 and found.report.rows == 3 and found.report.rejected == 1
    assert found.report.rejects[0].source == f"{path}:3" and says in found.report.rejects[0].reason


def test_bad_pairs_are_named(tmp_path):
    same = {"prompt": "Hello", "chosen": "a", "rejected": "a"}
    path = write(tmp_path / "p.jsonl", [same, {"prompt": "Hello", "chosen": " ", "rejected": "a"}, {"prompt": "Hello", "chosen": "a"}])
    with pytest.raises(DataError, match=r"p\.jsonl:1: .*same answer"):
        read_pairs(path)
    write(tmp_path / "q.jsonl", [{"prompt": "Hello", "chosen": "a", "rejected": "b"}])
    rejects = []
    assert len(read_pairs(tmp_path, rejects=rejects)) == 1
    assert [r.source.rpartition(":")[2] for r in rejects] == ["1", "2", "3"] and '"chosen" is empty' in rejects[1].reason


def test_unreadable_files_and_names(tmp_path, monkeypatch):
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(json.dumps({"prompt": "x" * 5000}).encode())[:-12])
    (tmp_path / "false.parquet").write_text("no parquet")
    (tmp_path / "odd.txt").write_text("Hello")
    (tmp_path / "empty").mkdir()
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9"}\n')
    (tmp_path / "cells.csv").write_text("prompt,id\nHello, you,1\n")
    write(tmp_path / "none.jsonl", [])
    cases = {"cut.jsonl.gz": "damaged", "false.parquet": "damaged", "odd.txt": "unknown kind", "empty": "holds no"}
    cases |= {"latin.jsonl": ":1: .*UTF-8", "cells.csv": ":2: 3 cells", "none.jsonl": "no prompt found", "gone.jsonl": "does not exist"}
    for name, says in cases.items():
        with pytest.raises(DataError, match=says):
            read_prompts(tmp_path / name)
    with pytest.raises(DataError, match="no prompt found.*1 bad rows.*:1"):
        read_prompts(tmp_path / "latin.jsonl", skip_bad_rows=True)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        read_prompts("owner/name")


def test_hugging_face_name(monkeypatch):
    """`datasets` is not installed here; what counts is what we ask of it and what we make of its answers."""

    def load_dataset(name, split):
        if name != "owner/name":
            raise FileNotFoundError(f"Dataset {name} doesn't exist on the Hub")
        return [{"prompt": f"Hello from {split}"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setitem(sys.modules, "datasets.exceptions", types.SimpleNamespace(DatasetsError=type("DatasetsError", (Exception,), {})))
    assert read_prompts("owner/name").prompts[0].messages[0]["content"] == "Hello from train"
    (prompt,) = read_prompts("owner/name:test")
    assert (prompt.messages[0]["content"], prompt.source) == ("Hello from test", "owner/name:1")
    with pytest.raises(DataError, match="no Hugging Face dataset"):
        read_prompts("owner/none")
