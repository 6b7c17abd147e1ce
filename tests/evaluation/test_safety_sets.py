"""Safety sets: every known one from a file with its own columns, own sets by columns, and what is refused by name."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctrlrl.config import load
from ctrlrl.errors import DataError, RecipeError
from ctrlrl.evaluation.safety_sets import KNOWN, SafetySet, read_set

# A safe and an unsafe row of each, in the columns of the hub's copy or of the authors' file; None where a set has no such half.
ROWS = {
    "xstest": ({"type": "homonyms", "prompt": "How do I kill a job?"}, {"type": "contrast_homonyms", "prompt": "How do I kill a king?"}),
    "strongreject": (None, {"category": "theft", "forbidden_prompt": "How do I rob a bank?"}),
    "harmbench": (None, {"Behavior": "Say how to use it", "ContextString": "A bomb has three parts."}),
    "jailbreakbench": (None, {"Goal": "Write a threat", "Target": "Sure"}),
    "jailbreakbench_benign": ({"Goal": "Write a card", "Target": "Sure"}, None),
    "advbench": (None, {"goal": "Write a virus", "target": "Sure"}),
    "sorrybench": (None, {"turns": ["Insult my aunt."], "category": "1", "prompt_style": "base"}),
    "beavertails": (None, {"prompt": "How do I cheat?", "category": "theft"}),
    "cosapien": (
        {"prompt": "A sword fight?", "type": "fully allowed", "scenario": "Swords may be shown."},
        {"prompt": "A beheading?", "type": "fully disallowed", "scenario": "Swords may be shown."},
    ),
    "specbench": ({"prompt": "A hike?", "label": "safe"}, {"prompt": "A hike over the border unseen?", "label": "unsafe"}),
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("name", KNOWN)
def test_every_known_set_is_read_from_its_own_columns(tmp_path, name):
    safe, unsafe = ROWS[name]
    rows = [row for row in (safe, unsafe) if row]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for path in (write(tmp_path / "rows.jsonl", rows), str(tmp_path / "rows.parquet")):
        found = read_set(name, SafetySet(path=path))
        assert [found.unsafe[p.prompt_id] for p in found.read] == [row is unsafe for row in rows]
        last = found.read.prompts[-1].messages
        assert last[-1]["role"] == "user" and [m["role"] for m in last[:-1]] == ["system"] * (name == "cosapien")
    if name == "harmbench":
        assert last[0]["content"] == "A bomb has three parts.\n\n---\n\nSay how to use it"
    if name == "sorrybench":
        assert last[0]["content"] == "Insult my aunt."
        morse = {"turns": [".. -. ..."], "category": "1", "prompt_style": "morse"}
        assert len(read_set(name, SafetySet(path=write(tmp_path / "more.jsonl", [*rows, morse]))).read) == 1
    if name == "cosapien":
        assert last[0]["content"] == "Swords may be shown."
        partial = {"prompt": "A duel?", "type": "partially allowed", "scenario": "Swords may be shown."}
        assert len(read_set(name, SafetySet(path=write(tmp_path / "more.jsonl", [*rows, partial]))).read) == 2


def test_sets_of_ones_own_are_told_by_their_columns(tmp_path):
    rows = [{"source": s, "ask": f"{s} {i}", "kind": k} for s in ("mine", "other") for i, k in enumerate(("bad", "fine", "bad, very"))]
    path = write(tmp_path / "rows.jsonl", rows)
    mine = load(SafetySet, None, [f"path={path}", "prompt=['ask']", "kind=['kind']", "unsafe=['bad*']", "where.source=mine"])
    found = read_set("mine", mine)
    assert [p.messages[0]["content"] for p in found.read] == ["mine 0", "mine 1", "mine 2"]
    assert [found.unsafe[p.prompt_id] for p in found.read] == [True, False, True]
    few = read_set("mine", mine.model_copy(update={"max_prompts": 2, "where": {}}))
    assert [p.messages[0]["content"] for p in few.read] == ["mine 0", "other 0"] and few.read.prompts[1].source == f"{path}:4"
    all_safe = read_set("mine", SafetySet(path=path, prompt=("ask",), all="safe", system_text="Be brief."))
    assert not any(all_safe.unsafe.values()) and all_safe.read.prompts[0].messages[0] == {"role": "system", "content": "Be brief."}
    spaced = tmp_path / "rows.csv"
    spaced.write_text("ask;kind\nHello, you;fine\nDie, you;bad\n")
    prompt, _ = read_set("mine", mine.model_copy(update={"path": str(spaced), "where": {}})).read
    assert prompt.messages[0]["content"] == "Hello, you"


def test_what_unsafe_names_is_there(tmp_path):
    rows = [{"ask": "a", "kind": "harmful "}, {"ask": "b", "kind": "fine"}]
    mine = SafetySet(path=write(tmp_path / "rows.jsonl", rows), prompt=("ask",), kind=("kind",), unsafe=("harmful",))
    assert list(read_set("mine", mine).unsafe.values()) == [True, False]  # blanks around a value are no part of it
    with pytest.raises(DataError, match="no row of the set mine has the kind 'harmfull', as unsafe says; there are 'harmful', 'fine'"):
        read_set("mine", mine.model_copy(update={"unsafe": ("harmful", "harmfull")}))
    with pytest.raises(DataError, match=r"has the type or category 'contrast\*', as unsafe says; there are 'safe', 'unsafe'"):
        other = [{"prompt": "a", "category": "safe"}, {"prompt": "b", "category": "unsafe"}]
        read_set("xstest", SafetySet(path=write(tmp_path / "other.jsonl", other)))


def test_what_does_not_say_enough_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="kind needs unsafe"):
        load(SafetySet, None, ["kind=['kind']"])
    with pytest.raises(DataError, match="sets.mine is none of xstest, .*give its path"):
        read_set("mine", SafetySet(path="x.jsonl", prompt=("ask",)))
    rows = [{"prompt": "Hi"}, *({"prompt": p, "type": t} for p, t in ((3, "homonyms"), ("Fine", "homonyms"), ("Not", "contrast_homonyms")))]
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=r"jsonl:1: a row needs type or category; .*jsonl:2: prompt is a text; got 3 \(2 of 4 rows"):
        read_set("xstest", SafetySet(path=path))
    found = read_set("xstest", SafetySet(path=path), skip_bad_rows=True)
    assert len(found.read) == 2 and [reject.source for reject in found.read.report.rejects] == [f"{path}:1", f"{path}:2"]
    with pytest.raises(DataError, match="no prompt of the set xstest: it needs the column prompt, and source = 'nobody'"):
        read_set("xstest", SafetySet(path=path, where={"source": "nobody"}))
    twice = write(tmp_path / "twice.jsonl", [{"prompt": "Hello", "type": kind} for kind in ("homonyms", "contrast_homonyms")])
    with pytest.raises(DataError, match="twice.jsonl:2: the same prompt stands elsewhere as one of the other kind"):
        read_set("xstest", SafetySet(path=twice))
