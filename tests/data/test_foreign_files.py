"""Files that nobody here made: each is read right, or refused in one message that names the file, the line and the remedy."""

import gzip
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctrlrl.data.rejects import Reject, write_rejects
from ctrlrl.data.sources import read_pairs, read_prompts
from ctrlrl.errors import DataError

ASK = {"role": "user", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be brief."}
GOOD, BAD = {"role": "assistant", "content": "Hi"}, {"role": "assistant", "content": "No"}
TURNS = [ASK, GOOD, {"role": "user", "content": "More"}]
CHATML = "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n"
SCENE = "Write a scene.\n\nHuman: Hi\n\nAssistant: Ho"
LETTER = b'prompt,id\n"Dear Anna, thanks,\n\nHi, Bob\nbye ""now""",1\ntwo,2\n'


def line(**row) -> bytes:
    return json.dumps(row).encode() + b"\n"


# --- read right: file name, content, the prompts' last messages ---

READ = {
    "bom of json lines": ("a.jsonl", b"\xef\xbb\xbf" + line(prompt="one") + b"\xef\xbb\xbf" + line(prompt="two"), ["one", "two"]),
    "crlf": ("a.jsonl", b'{"prompt": "one"}\r\n\r\n{"prompt": "two"}\r\n', ["one", "two"]),
    "upper-case suffix": ("A.JSONL", line(prompt="one"), ["one"]),
    "columns nobody asked for": ("a.jsonl", b'{"prompt": "one", "n": NaN, "x": {"a": 1, "a": 2}, "big": 1' + b"0" * 4000 + b"}\n", ["one"]),
    "a prompt of a megabyte": ("a.jsonl", line(prompt="x" * 1_000_000), ["x" * 1_000_000]),
    "messages as prompt": ("a.jsonl", line(prompt=TURNS), ["More"]),
    "messages as text in csv": ("a.csv", b'prompt\n"[{""role"": ""user"", ""content"": ""one""}]"\n', ["one"]),
    "a transcript as prompt": ("a.jsonl", line(prompt="\n\nHuman: a\n\nAssistant: b\n\nHuman: one\n\nAssistant:"), ["one"]),
    "a transcript without its blank lines": ("a.jsonl", line(prompt="Human: one\n\nAssistant:"), ["one"]),
    "white space before prose": ("a.jsonl", line(prompt="\n" * 1_000_000 + "one"), ["\n" * 1_000_000 + "one"]),
    "a user's blank lines": ("a.jsonl", line(prompt="User:" + "\n " * 500_000), ["User:" + "\n " * 500_000]),
    "answers that are no messages": ("a.jsonl", line(prompt="one", chosen=["a"], rejected=["b", "c"]), ["one"]),
    "a marker amid a prompt": ("a.jsonl", line(prompt="What is <|im_start|>assistant?"), ["What is <|im_start|>assistant?"]),
    "a prompt that its messages repeat": ("a.jsonl", line(prompt="one", messages=[{"role": "user", "content": "one"}]), ["one"]),
    "prose about speakers": ("a.jsonl", line(prompt=SCENE), [SCENE]),
    "csv of excel": ("a.csv", b"\xef\xbb\xbfid;prompt\r\n1;one, two\r\n2;\"a;b\"\r\n", ["one, two", "a;b"]),
    "csv by tabs": ("a.csv", b"prompt\tid\none\t1\n", ["one"]),
    "quoted line ends": ("a.csv", LETTER, ['Dear Anna, thanks,\n\nHi, Bob\nbye "now"', "two"]),
    "two lines with a number": ("a.csv", b'id,prompt\n7,"I have\n10,000 apples"\n', ["I have\n10,000 apples"]),
    "a quote amid an unquoted cell": ("a.csv", b'prompt,id\na 5" pipe,1\n', ['a 5" pipe']),
    "two unnamed columns": ("a.csv", b"prompt,,\none,,\n", ["one"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", READ)
def test_it_is_read_right(tmp_path, kind):
    name, content, expected = READ[kind]
    (tmp_path / name).write_bytes(content)
    assert [p.messages[-1]["content"] for p in read_prompts(tmp_path / name)] == expected


# --- refused: file name, content, part of the message; "{}" stands for the file ---

REFUSED = {
    "array": ("a.jsonl", b'[{"prompt": "one"}]', "{}:1: a JSON array.*jq -c '.\\[\\]'"),
    "pretty": ("a.jsonl", b'{\n "prompt": "one"\n}', "{}:1: an object over several lines.*jq -c"),
    "scalar": ("a.jsonl", b"3\n", "{}:1: a row is a JSON object; got 3"),
    "huge integer": ("a.jsonl", b'{"prompt": 1' + b"0" * 5000 + b"}", "{}:1: not a JSON object"),
    "depth": ("a.jsonl", b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "{}:1: .*nested too deeply"),
    "a key twice": ("a.jsonl", b'{"prompt": "a", "prompt": "b"}', '{}:1: an object has the key "prompt" twice'),
    "nan": ("a.jsonl", b'{"prompt": NaN}', '{}:1: "prompt" is a text or a list of messages; got nan'),
    "null and nothing else": ("a.jsonl", b'{"prompt": null}', '{}:1: a row needs "messages"'),
    "number": ("a.jsonl", line(prompt=7), '{}:1: "prompt" is a text'),
    "white space": ("a.jsonl", line(prompt=" \n\t"), "{}:1: the user's message is empty"),
    "half a surrogate in a key": ("a.jsonl", b'{"\\ud800": 1}', "{}:1: a row needs"),
    "half a surrogate in a message": ("a.jsonl", b'{"messages": [{"role": "user", "content": "\\udfff"}]}', "{}:1: .*half a surrogate"),
    "capitals": ("a.jsonl", line(Prompt="one"), "{}:1: .*is 'Prompt' 'prompt'\\?"),
    "capitals in csv": ("a.csv", b"id,Prompts\n1,one\n", "{}:2: .*is 'Prompts' 'prompt'\\?"),
    "capitals between semicolons": ("a.csv", b"id;Prompt\n1;one\n", "{}:2: .*has id, Prompt \\(is 'Prompt' 'prompt'\\?"),
    "role of sharegpt": ("a.jsonl", line(messages=[{"role": "human", "content": "one"}]), "{}:1: .*message 1 of .*is it 'user'"),
    "role in capitals": ("a.jsonl", line(messages=[{"role": "SYSTEM", "content": "one"}, ASK]), "{}:1: .*is it 'system'"),
    "parts": ("a.jsonl", line(messages=[{"role": "user", "content": [{"type": "text", "text": "a"}]}]), '{}:1: .*text "content"'),
    "sharegpt": ("a.jsonl", line(conversations=[{"from": "human", "value": "one"}]), '{}:1: ShareGPT.*write "messages"'),
    "sharegpt in messages": ("a.jsonl", line(messages=[{"from": "human", "value": "one"}]), "{}:1: ShareGPT"),
    "whole conversations": ("a.jsonl", line(messages=[ASK, GOOD]), "{}:1: a prompt ends with the user"),
    "a transcript of others": ("a.jsonl", line(prompt="### Human: one### Assistant: two"), '{}:1: "prompt" holds a transcript'),
    "a transcript in bold": ("a.jsonl", line(prompt="**User:** one\n\n**Assistant:** two"), '{}:1: "prompt" holds a transcript'),
    "a transcript in tags": ("a.jsonl", line(prompt="<human>: one\n<bot>:"), '{}:1: "prompt" holds a transcript'),
    "chatml": ("a.jsonl", line(prompt=CHATML), '{}:1: "prompt" holds what a chat template wrote, .*give its turns as "messages"'),
    "llama 2": ("a.jsonl", line(prompt="<s>[INST] one [/INST]"), '{}:1: "prompt" holds what a chat template wrote'),
    "gemma": ("a.jsonl", line(prompt="<bos><start_of_turn>user\none<end_of_turn>\n<start_of_turn>model\n"), "{}:1: .*chat template wrote"),
    "two prompts": ("a.jsonl", line(prompt="one", messages=[{"role": "user", "content": "two"}]), '{}:1: "prompt" is not what "messages"'),
    "tool calls": ("a.jsonl", line(messages=[ASK, GOOD | {"tool_calls": [{"id": 1}]}, ASK]), "{}:1: message 2 of .* has tool_calls"),
    "user and ai": ("a.jsonl", line(prompt="User: one\nAI: two\nUser: three"), '{}:1: "prompt" holds a transcript'),
    "a transcript that does not alternate": ("a.jsonl", line(prompt="\n\nHuman: a\n\nHuman: b\n\nAssistant:"), "{}:1: turn 2"),
    "python's list": ("a.csv", b"prompt\n\"[{'role': 'user', 'content': 'one'}]\"\n", '{}:2: "prompt" is a list.*write JSON'),
    "utf-16": ("a.jsonl", '{"prompt": "one"}'.encode("utf-16"), "{} is text in UTF-16: save it as UTF-8"),
    "utf-16 csv": ("a.csv", "prompt\none\n".encode("utf-16"), "{} is text in UTF-16"),
    "utf-16 without a mark": ("a.csv", "prompt\none\n".encode("utf-16-le"), "{}:1: .*NUL bytes"),
    "latin-1 csv": ("a.csv", b"prompt\none\ncaf\xe9\n", "{}:3: not CSV in UTF-8"),
    "lfs": ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "{} is a pointer of Git LFS.*git lfs pull"),
    "lfs of parquet": ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "{} is a pointer of Git LFS"),
    "web page": ("a.jsonl", b"\n<!DOCTYPE html><html></html>", "{} is a web page"),
    "gzip without its name": ("a.jsonl", gzip.compress(b"{}"), "{} is compressed by gzip: name it"),
    "no gzip": ("a.jsonl.gz", line(prompt="one"), "{}: cannot be read"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(line(prompt="one" * 999))[:-9], "{}: cannot be read, damaged"),
    "no parquet": ("a.parquet", b"", "{}: cannot be read"),
    "empty": ("a.jsonl", b"", '{}: no prompt found: a row needs "messages"[^;]*$'),
    "open quote": ("a.csv", b'prompt,id\none,1\n"two,2\nthree,3\n', "{}:3: not CSV: a quote.*double those within"),
    "stray quote": ("a.csv", b'prompt,id\n"two,2\nthree,3\n"four",4\n', "{}:2: not CSV: a quote"),
    "quotes by backslash": ("a.csv", b'prompt,id\n"say \\"hi\\"",1\n', "{}:2: not CSV: a quote"),
    "swallowed rows": ("a.csv", b'prompt,id\n"two,2\nthree,3\nfour",4\nfive,5\n', "{}:2: a quoted cell that holds whole rows, to line 4"),
    "swallowed row": ("a.csv", b'id,prompt\n1,"two\n2,three"\n4,five\n', "{}:2: a quoted cell that holds whole rows"),
    "ragged": ("a.csv", b"prompt,id\none,1\ntwo\n", "{}:3: 1 cells under a header of 2"),
    "twice in csv": ("a.csv", b"prompt,id,prompt\na,1,b\n", "{}:1: two columns are named 'prompt'"),
    "kind": ("a.json", b'[{"prompt": "one"}]', "{}: unknown kind"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_it_is_refused_by_name(tmp_path, kind):
    name, content, message = REFUSED[kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match="(?s)" + message.format(tmp_path / name)):
        read_prompts(tmp_path / name)


def test_bad_rows_are_told_together_and_kept_whatever_they_hold(tmp_path):
    path = tmp_path / "a.jsonl"
    odd = [b'{"\\ud800": "\\udfff"}', b"NaN", b'{"text": ' + b"[" * 500 + b"]" * 500 + b"}", b"{}", b"\xff"]
    path.write_bytes(line(prompt="one") + b"\n".join(odd) + b"\n" + line(prompt="two"))
    with pytest.raises(DataError) as caught:
        read_prompts(path)
    text = str(caught.value)
    assert text.startswith(f"{path}:2: ") and f"; {path}:3: " in text and f"{path}:5" not in text
    assert "5 of 7 rows are bad" in text and "--skip-bad-rows" in text and len(text) < 1500
    kept = read_prompts(path, skip_bad_rows=True)
    assert len(kept) == 2 and kept.report.rejected == 5
    others = [Reject(f"{path}:9", "\udcff", json.dumps(b"", default=str)), *kept.report.rejects]
    write_rejects(tmp_path, others)
    found = [json.loads(row) for row in (tmp_path / "rejects.jsonl").read_text("utf-8").splitlines()]
    assert [row["source"] for row in found] == [f"{path}:{n}" for n in (9, 2, 3, 4, 5, 6)]
    assert found[0]["reason"] == "\udcff" and json.loads(found[1]["text"]) == {"\ud800": "\udfff"} and found[5]["text"] == ""


# --- Parquet ---


def test_of_parquet_the_needed_columns_alone_are_read(tmp_path):
    far, path = pa.array([2**60], pa.timestamp("ms")), tmp_path / "a.parquet"
    inner = pa.StructArray.from_arrays(
        [pa.array(["user"]), pa.array(["Hello"]), pa.array([1], pa.timestamp("ns")), pa.array([None], pa.string())],
        ["role", "content", "at", "name"],
    )
    messages = pa.ListArray.from_arrays([0, 1], inner)
    pq.write_table(pa.table({"messages": messages, "far": far, "ns": pa.array([1], pa.timestamp("ns")), "meta": inner}), path)
    assert read_prompts(path).prompts[0].messages == (ASK,)
    with pytest.raises(DataError, match="a.parquet:1: .*this one has a, far"):
        pq.write_table(pa.table({"a": ["x"], "far": far}), path)
        read_prompts(path)


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["Hello", "Bye"], pa.large_string()),
        pa.array(["Hello", "Bye"], pa.string_view()),
        pa.array(["Hello", "Bye"]).dictionary_encode(),
    ],
    ids=lambda column: str(column.type),
)
def test_every_kind_of_text_column_is_read(tmp_path, column):
    pq.write_table(pa.table({"prompt": column}), tmp_path / "a.parquet")
    assert [p.messages[0]["content"] for p in read_prompts(tmp_path / "a.parquet")] == ["Hello", "Bye"]


def test_odd_parquet_is_refused_by_name(tmp_path):
    path = tmp_path / "a.parquet"
    for column in (pa.array([b"Hello"], pa.binary()), pa.array([2**60], pa.timestamp("ms")), pa.array([1], pa.timestamp("ns"))):
        pq.write_table(pa.table({"prompt": column}), path)
        with pytest.raises(DataError, match="a.parquet:1: "):
            read_prompts(path)
    wrong = pa.Array.from_buffers(pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff")])
    pq.write_table(pa.table({"prompt": wrong}), path)  # the second text is not UTF-8
    assert [p.messages[0]["content"] for p in read_prompts(path, skip_bad_rows=True)] == ["a"]
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), path)
    with pytest.raises(DataError, match="no prompt found"):
        read_prompts(path)
    pq.write_table(pa.table({"prompt": ["Hello"] * 9999}), path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match="a.parquet: cannot be read"):
        read_prompts(path)


# --- preferences as lists of messages ---

PAIRS = {
    "explicit prompt": ({"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]}, [ASK]),
    "implicit prompt": ({"chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, [ASK]),
    "several turns": ({"chosen": [*TURNS, GOOD], "rejected": [*TURNS, BAD]}, TURNS),
    "ultrafeedback": (
        {"prompt": "Hello", "chosen": [ASK, GOOD], "rejected": [ASK, BAD], "messages": [ASK, GOOD], "score_chosen": 8.0}, [ASK]),
    "prompt repeats the first turn": ({"prompt": "Hello", "chosen": [*TURNS, GOOD], "rejected": [*TURNS, BAD]}, TURNS),
    "prompt repeats the last turn": ({"prompt": "More", "chosen": [*TURNS, GOOD], "rejected": [*TURNS, BAD]}, TURNS),
    "system inside": ({"prompt": "Hello", "chosen": [SYSTEM, ASK, GOOD], "rejected": [SYSTEM, ASK, BAD]}, [SYSTEM, ASK]),
    "system in the prompt alone": ({"prompt": [SYSTEM, ASK], "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, [SYSTEM, ASK]),
    "system beside": ({"system": "Be brief.", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, [SYSTEM, ASK]),
    "prompt as text": ({"prompt": "Hello", "chosen": [GOOD], "rejected": [BAD]}, [ASK]),
    "answers as texts": ({"prompt": TURNS, "chosen": "Hi", "rejected": "No"}, TURNS),
    "messages and answers": ({"messages": TURNS, "chosen": [GOOD], "rejected": [BAD]}, TURNS),
    "lists as texts": ({"chosen": json.dumps([ASK, GOOD]), "rejected": json.dumps([ASK, BAD])}, [ASK]),
    "transcript as prompt": ({"prompt": "\n\nHuman: Hello\n\nAssistant:", "chosen": "Hi", "rejected": "No"}, [ASK]),
}  # fmt: skip


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_preferences_as_messages(tmp_path, kind, suffix):
    row, messages = PAIRS[kind]
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist([row]), path)
    else:
        path.write_bytes(line(**row))
    (pair,) = read_pairs(path)
    assert (list(pair.messages), pair.chosen, pair.rejected) == (messages, "Hi", "No")
    (prompt,) = read_prompts(path)
    assert list(prompt.messages) == messages


BAD_PAIRS = {
    "no prompt": ({"chosen": [GOOD], "rejected": [BAD]}, "answers without a prompt"),
    "earlier turns differ": ({"chosen": [ASK, GOOD, ASK, GOOD], "rejected": [ASK, BAD, ASK, BAD]}, "share every turn but the last"),
    "other prompt": ({"prompt": "Bye", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, '"prompt" is not what'),
    "other messages": ({"messages": TURNS, "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, '"messages" is not what'),
    "two systems": ({"prompt": [SYSTEM, ASK], "chosen": [{**SYSTEM, "content": "x"}, ASK, GOOD],
                     "rejected": [{**SYSTEM, "content": "x"}, ASK, BAD]}, '"prompt" is not what'),
    "system twice": ({"system": "S", "chosen": [SYSTEM, ASK, GOOD], "rejected": [SYSTEM, ASK, BAD]}, "not in both"),
    "text and list": ({"prompt": "Hello", "chosen": [GOOD], "rejected": "No"}, "both texts or both lists"),
    "ends with the user": ({"chosen": [ASK], "rejected": [ASK]}, "ends with the assistant's answer; this one ends with 'user'"),
    "same answer": ({"chosen": [ASK, GOOD], "rejected": [ASK, GOOD]}, "same answer"),
    "empty": ({"chosen": [ASK, {**GOOD, "content": " "}], "rejected": [ASK, BAD]}, '"chosen" is empty'),
    "sharegpt": ({"chosen": [{"from": "gpt", "value": "a"}], "rejected": [{"from": "gpt", "value": "b"}]}, "ShareGPT"),
    "a dictionary": ({"prompt": "Hello", "chosen": GOOD, "rejected": BAD}, '"chosen" is a text'),
    "transcripts beside a prompt": (
        {"prompt": "Hello", "chosen": "\n\nHuman: Hello\n\nAssistant: Hi", "rejected": "\n\nHuman: Hello\n\nAssistant: No"},
        "is a whole transcript beside a prompt"),
    "one without its blank lines": (
        {"prompt": "Hello", "chosen": "Human: Hello\n\nAssistant: Hi", "rejected": "Human: Hello\n\nAssistant: No"},
        "is a whole transcript beside a prompt"),
    "labelled answers": (
        {"prompt": "\n\nHuman: Hello\n\nAssistant:", "chosen": "\n\nAssistant: Hi", "rejected": "\n\nAssistant: No"},
        "\"chosen\" begins with 'Assistant:'"),
    "an answer as a template writes it": (
        {"prompt": "Hello", "chosen": "Hi", "rejected": "<|im_start|>assistant\nNo<|im_end|>"}, "\"rejected\" begins with '<.im_start"),
    "answers that differ by a space": ({"prompt": "Hello", "chosen": "Hi ", "rejected": "Hi"}, "same answer"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_PAIRS)
def test_preferences_that_cannot_be_meant(tmp_path, kind):
    row, message = BAD_PAIRS[kind]
    (tmp_path / "a.jsonl").write_bytes(line(**row))
    with pytest.raises(DataError, match=f"a.jsonl:1: .*{message}"):
        read_pairs(tmp_path / "a.jsonl")


# --- which files are read ---


def test_hidden_temporary_and_linked_files_are_no_further_data(tmp_path):
    data, elsewhere = tmp_path / "data [1] *", tmp_path / "elsewhere"
    for folder in (data, data / ".ipynb_checkpoints", data / ".git" / "deep", data / "half.part", elsewhere):
        folder.mkdir(parents=True)
        (folder / "a.jsonl").write_bytes(line(prompt=folder.name))
    for name in (".b.jsonl", "b.jsonl~", "b.jsonl.part", "notes.txt"):
        (data / name).write_bytes(line(prompt=name))
    (data / "again.jsonl").symlink_to(data / "a.jsonl")
    (data / "loop").symlink_to(data, target_is_directory=True)
    (data / "mounted").symlink_to(elsewhere, target_is_directory=True)
    found = read_prompts(data)
    assert [p.messages[0]["content"] for p in found] == [data.name, "elsewhere"] and found.report.duplicates == 0
    (data / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match="gone.jsonl cannot be read: No such file"):
        read_prompts(data)


@pytest.mark.parametrize("name", ["b.tsv", "b.jsonl.zst", "b.arrow", "b.csv.gz", "b.pq", "b.jsonl.lz4", "b.csv.zip"])
def test_a_directory_with_data_that_would_not_be_read_is_refused(tmp_path, name):
    for each in ("a.jsonl", name):
        (tmp_path / each).write_bytes(line(prompt="one"))
    with pytest.raises(DataError, match=f"{name} would not be read"):
        read_prompts(tmp_path)


def test_json_beside_other_data_is_refused_if_it_holds_rows(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(line(prompt="one"))
    for about in (b'{"citation": "", "splits": {}}', b'{\n  "prompt": "of the whole set"\n}', b"", b"{", b"\xff\xfe{"):
        (tmp_path / "about.json").write_bytes(about)
        assert len(read_prompts(tmp_path)) == 1
    row = line(prompt="two")
    for rows in (b" [" + row + b"]", b"[\n" + row + b"]", row + row, b"\xef\xbb\xbf" + row):
        (tmp_path / "about.json").write_bytes(rows)
        with pytest.raises(DataError, match="about.json would not be read"):
            read_prompts(tmp_path)


def test_places_that_are_no_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.jsonl")
    os.symlink("self", "self")
    os.symlink("nowhere.jsonl", "link.jsonl")
    os.mkdir("folder")
    cases = {
        "": "names no data", "pipe.jsonl": "is no regular file", "self": "cannot be read", "link.jsonl": "is a link to 'nowhere.jsonl'",
        "x" * 300: "cannot be read", "a\0b": "cannot be read", "~nobody-of-that-name/a.jsonl": "cannot be read",
        "folder": "holds no", "folder/a": "'folder/a' does not exist", "runs/policy": "'runs/policy' does not exist",
        "*.jsonl": "patterns are not expanded", "a\nb.jsonl": "does not exist",
    }  # fmt: skip
    for name, message in cases.items():
        with pytest.raises(DataError, match=message):
            read_prompts(name)


@pytest.mark.parametrize("name", ["with space.jsonl", "größe.jsonl", "[a]*?.jsonl", "a\nb.jsonl", "a:b.jsonl", "\udcff.jsonl"])
def test_any_file_name_is_read_and_can_be_stored(tmp_path, monkeypatch, name):
    (tmp_path / name).write_bytes(line(prompt="one"))
    monkeypatch.setenv("HOME", str(tmp_path))
    (prompt,) = read_prompts(f"~/{name}")
    assert prompt.source.encode().endswith(b".jsonl:1")
