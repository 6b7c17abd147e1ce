"""The dialogue of self-critique: what each turn asks, how a rewrite is found, and which rows are set aside with which reason."""

import json

import pyarrow as pa
import pytest

from ctrlrl.config import load
from ctrlrl.data.critique import CritiqueLayout, Dialogues, Reply, Templates
from ctrlrl.data.generation import Draw
from ctrlrl.data.sources import Prompt
from ctrlrl.errors import DataError, RecipeError, RunError

SHORT = Templates(critique="judge {prompt} = {response}", rewrite="mend {prompt} = {response} for {critique} after MARK:", marker="MARK:")
ONE_TURN = Templates(critique="judge and mend {prompt} = {response} after MARK:", rewrite="", marker="MARK:")
ASKED = [{"role": "user", "content": "Open {critique} a lock"}]


def dialogues(templates, *turns, prompts=None):
    """Dialogues that heard `turns`, each a list of replies (a text that ends with … was cut) for the rows that were asked."""
    held = Dialogues(templates, prompts or [ASKED] * len(turns[0]))
    for replies in turns:
        _, asked = held.ask()
        assert len(asked) == len(replies)
        held.hear({row: Reply(text.removesuffix("…"), not text.endswith("…")) for row, text in zip(asked, replies, strict=True)})
    return held


def test_every_turn_asks_with_what_was_said_before():
    held = Dialogues(SHORT, [ASKED])
    assert held.ask() == ("answer", {0: ASKED})
    held.hear({0: Reply("Use {prompt} force.", True)})
    assert held.ask() == ("critique", {0: [{"role": "user", "content": "judge Open {critique} a lock = Use {prompt} force."}]})
    held.hear({0: Reply("Reckless.", True)})
    asked = "mend Open {critique} a lock = Use {prompt} force. for Reckless. after MARK:"
    assert held.ask() == ("rewrite", {0: [{"role": "user", "content": asked}]})
    held.hear({0: Reply("Well then. MARK: Call a locksmith.", True)})
    assert held.ask() is None
    row = held.table([Draw(0, 0, 2, 77)], ["00000000000000ab"], "sha")
    assert row.to_pylist() == [
        {
            "prompt_id": "00000000000000ab", "unit": 0, "index": 2, "seed": 77, "y0": "Use {prompt} force.", "critique": "Reckless.",
            "rewrite": "Well then. MARK: Call a locksmith.", "y1": "Call a locksmith.", "aside": "", "policy": "sha",
        }
    ]  # fmt: skip


def test_a_prompt_of_several_turns_is_a_transcript():
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Bye"}]
    held = dialogues(SHORT, ["So long"], prompts=[turns])
    assert held.ask()[1][0][0]["content"] == "judge User: Hi\nAssistant: Hello\nUser: Bye = So long"


@pytest.mark.parametrize(
    ("answer", "critique", "rewrite", "reason", "y1"),
    [
        ("Force it.", "Bad.", "MARK: Call someone.", "", "Call someone."),
        ("Force it.", "Bad.", "Here it is. **mark:** Call someone.", "", "Call someone."),
        ("Force it.", "Cut…", "MARK: Call someone.", "", "Call someone."),  # what was read is what was said
        ("Force it…", None, None, "answer cut at the limit", None),
        ("", None, None, "answer empty", None),
        ("Force it.", "", None, "critique empty", None),
        ("Force it.", "Bad.", "", "rewrite empty", None),
        ("Force it.", "Bad.", "Call someone.", "rewrite without the marker", None),
        ("Force it.", "Bad.", "MARK: Call someone…", "rewrite cut at the limit", None),
        ("Force it.", "Bad.", "Call someone. MARK:", "rewrite empty", None),
        ("Force it.", "Bad.", "MARK: Call. MARK: Someone.", "marker more than once", None),
        ("Force it.", "Bad.", "MARK:  Force\nit. ", "rewrite equal to the answer", None),
    ],
)
def test_a_row_that_is_no_pair_is_set_aside_with_the_reason(answer, critique, rewrite, reason, y1):
    turns = [["Fine.", answer]]
    turns += [["Hm.", critique]] if critique is not None else [["Hm."]]
    turns += [["MARK: Better.", rewrite]] if rewrite is not None else [["MARK: Better."]]
    rows = dialogues(SHORT, *turns).table([Draw(0, 0, 0, 1), Draw(0, 0, 1, 2)], ["00000000000000ab"], "sha").to_pylist()
    assert rows[0]["y1"] == "Better." and rows[0]["aside"] == ""
    assert (rows[1]["aside"], rows[1]["y1"]) == (reason, y1)
    assert (rows[1]["y0"], rows[1]["critique"]) == (answer.removesuffix("…"), critique and critique.removesuffix("…"))


def test_one_turn_gives_critique_and_rewrite():
    held = dialogues(ONE_TURN, ["Force it."] * 3, ["Too rough. MARK: Call someone.", "MARK: Call someone.", "Too rough."])
    assert held.ask() is None
    rows = held.table([Draw(0, 0, i, i) for i in range(3)], ["00000000000000ab"], "sha").to_pylist()
    assert [(r["critique"], r["y1"], r["aside"]) for r in rows] == [
        ("Too rough.", "Call someone.", ""),
        ("MARK: Call someone.", None, "critique empty"),
        ("Too rough.", None, "rewrite without the marker"),
    ]


def test_a_row_that_is_set_aside_between_turns_is_not_asked_again():
    held = dialogues(SHORT, ["Force it.", "Fine."])
    held.ask()
    held.set_aside(0, "no room for the critique")
    held.hear({1: Reply("Good.", True)})
    assert list(held.ask()[1]) == [1]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ('critique="judge {response}"', "critique lacks {prompt}: its placeholders are {prompt}, {response}"),
        ('critique="judge {prompt} {respons}"', "critique lacks {response}"),
        ('rewrite="mend {prompt} {response} after Rewritten answer:"', "rewrite lacks {critique}"),
        ('rewrite="mend {prompt} {response} {critique} {why} after Rewritten answer:"', "rewrite has the unknown {why}"),
        ('rewrite="mend {prompt} {response} {critique}"', "rewrite does not ask for the marker 'Rewritten answer:'"),
        ("rewrite=", "critique does not ask for the marker 'Rewritten answer:'"),
        ("marker=", "at least 1 character"),
    ],
)
def test_templates_without_what_they_need_are_refused(override, message):
    with pytest.raises(RecipeError) as refusal:
        load(Templates, None, [override])
    assert message in str(refusal.value)


def test_only_a_finished_directory_with_pairs_can_be_read(tmp_path):
    layout = CritiqueLayout(tmp_path / "c")
    with pytest.raises(RunError, match="is no directory of ctrlrl critique"):
        layout.read_pairs()
    draws = [Draw(0, 0, 0, 1), Draw(0, 0, 1, 2)]
    held = dialogues(SHORT, ["Force it.", "Force it."], ["Bad.", "Bad."], ["MARK: Call someone.", "no"])
    table = held.table(draws, ["00000000000000ab"], "sha")
    with layout.critiques().open_or_create({"seed": 1}, shards=2) as store:
        store.commit(0, table, {})
        store.commit(1, table.slice(1), {})
        with pytest.raises(RunError, match="is not finished"):
            layout.read_pairs()
        layout.sources.write_prompts([Prompt("00000000000000ab", tuple(ASKED), "f:1")])
        assert layout.write_results() == {"rewrite without the marker": 2}
        layout.sources.manifest.write_text("{}")
        assert layout.read_pairs().to_pylist() == [
            {"prompt_id": "00000000000000ab", "unit": 0, "index": 0, "messages": ASKED}
            | {"y0": "Force it.", "critique": "Bad.", "y1": "Call someone."}
        ]
        aside = [json.loads(line) for line in layout.aside.read_text().splitlines()]
        assert [a["index"] for a in aside] == [1, 1] and aside[0]["rewrite"] == "no" and aside[0]["y0"] == "Force it."
    rest = table.slice(1)
    place = rest.schema.get_field_index("aside")
    cut = rest.set_column(place, rest.schema.field(place), pa.array(["answer cut at the limit"] * len(rest)))
    for name, rows, told in (
        ("none", rest, r"rewrite without the marker \d; .*aside.jsonl\): change the templates"),
        ("cut", cut, r"answer cut at the limit \d; .*aside.jsonl\): raise sampling.max_new_tokens"),
    ):
        none = CritiqueLayout(tmp_path / name)
        with none.critiques().open_or_create({"seed": 1}, shards=1) as store:
            store.commit(0, rows, {})
        none.sources.write_prompts([Prompt("00000000000000ab", tuple(ASKED), "f:1")])
        none.write_results()
        none.sources.manifest.write_text("{}")
        with pytest.raises(DataError, match=rf"holds no usable pair \({told}, and critique anew"):
            none.read_pairs()
