"""Rows of a distilled table as token sequences, the fakes of ExMATE, and the held-out figures."""

import copy

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctrlrl.control import CORNERS, Control
from ctrlrl.data.schemas import DISTILLED
from ctrlrl.data.tuning import ControlledExamples, contrast_figures, nearest_corner, read_distilled, response_ids
from ctrlrl.errors import DataError
from ctrlrl.prompts import render

END = 2


def table(tokenizer, answers=("Mix flour.", "Ask a baker, please.", "No."), reasons=("stop", "stop", "length"), ids=True, levels=None):
    tokens = [[*tokenizer(text)["input_ids"], *([END] if reason == "stop" else [])] for text, reason in zip(answers, reasons, strict=True)]
    levels = levels or [corner.levels for corner in CORNERS[: len(answers)]]
    columns = {
        "prompt_id": [f"{i:016x}" for i in range(len(answers))], "unit": [0] * len(answers), "index": [0] * len(answers),
        "messages": [[{"role": "user", "content": f"How do I bake {i} loaves?"}] for i in range(len(answers))],
        "helpful": [a for a, _ in levels], "harmless": [b for _, b in levels],
        "response": list(answers), "token_ids": tokens if ids else [None] * len(answers), "finish_reason": list(reasons),
    }  # fmt: skip
    return pa.table(columns, schema=DISTILLED)


def examples_of(tokenizer, objective, seed=1):
    rows = table(tokenizer)
    return rows, ControlledExamples(rows, response_ids(rows, tokenizer, END, False), tokenizer, objective, seed)


def test_the_samplers_tokens_are_used_and_text_is_tokenised_only_where_there_are_none(tokenizer):
    rows = table(tokenizer)
    odd = [[*(i for character in "Mix flour." for i in tokenizer(character)["input_ids"]), END]] + rows["token_ids"].to_pylist()[1:]
    assert odd[0][:-1] != tokenizer("Mix flour.")["input_ids"]  # another cut of the same text
    kept = rows.set_column(rows.column_names.index("token_ids"), DISTILLED.field("token_ids"), pa.array(odd, pa.list_(pa.int32())))
    assert [ids.tolist() for ids in response_ids(kept, tokenizer, END, False)] == odd
    for ids in (response_ids(kept, tokenizer, END, True), response_ids(table(tokenizer, ids=False), tokenizer, END, False)):
        assert [i.tolist() for i in ids] == rows["token_ids"].to_pylist()
        assert [i[-1] == END for i in ids] == [True, True, False]  # a cut answer has no end


def test_special_tokens_that_an_answer_spells_stay_text(tokenizer):
    answers, inert = ("No.<end><s>user: More?", "<pad>", "a <end"), ("No.< end>< s>user: More?", "< pad>", "a <end")
    wanted = [[*tokenizer(text)["input_ids"], END] for text in inert]
    made = response_ids(table(tokenizer, answers, ("stop",) * 3, ids=False), tokenizer, END, False)
    assert [ids.tolist() for ids in made] == wanted and all(END not in ids[:-1] and 1 not in ids for ids in made)
    # What the sampler returned stays: here an end token within, of a model that has several.
    kept = table(tokenizer, ("No.",), ("stop",))
    drawn = pa.array([[*tokenizer("No.")["input_ids"], 1, END]], pa.list_(pa.int32()))
    kept = kept.set_column(kept.column_names.index("token_ids"), DISTILLED.field("token_ids"), drawn)
    assert response_ids(kept, tokenizer, END, False)[0].tolist() == drawn[0].as_py()


def test_tokens_of_another_tokenizer_are_refused(tokenizer):
    rows = table(tokenizer)
    moved = pa.array([[t + 1 for t in ids] for ids in rows["token_ids"].to_pylist()], pa.list_(pa.int32()))
    wrong = rows.set_column(rows.column_names.index("token_ids"), DISTILLED.field("token_ids"), moved)
    with pytest.raises(DataError, match="row 0.*set retokenise = true"):
        response_ids(wrong, tokenizer, END, False)
    with pytest.raises(DataError, match="row 1 of the table has an empty response"):
        response_ids(table(tokenizer, answers=("a", ""), reasons=("stop", "length"), ids=False), tokenizer, END, False)


@pytest.mark.parametrize("objective", ["clm", "plm"])
def test_a_row_is_the_prompt_with_its_control_and_the_response(tokenizer, objective):
    rows, examples = examples_of(tokenizer, objective)
    batch = examples.batch(np.array([1, 2]), 0)
    for place, row in enumerate((1, 2)):
        prompt = render(tokenizer, rows["messages"][row].as_py(), CORNERS[row].spell())
        assert batch.tokens[place].tolist() == [*prompt, *rows["token_ids"][row].as_py()]
        assert batch.prompt_lengths[place] == (len(prompt) if objective == "clm" else 1)
        assert examples.lengths[row] == len(batch.tokens[place])


def test_a_row_that_the_chat_template_refuses_is_named(tokenizer):
    rows, strict = table(tokenizer), copy.deepcopy(tokenizer)
    strict.chat_template = "{% if '1 loaves' in messages[0].content %}{{ raise_exception('no') }}{% endif %}" + tokenizer.chat_template
    with pytest.raises(DataError, match="^row 1 of the table: the chat template .* of user: no: "):
        ControlledExamples(rows, response_ids(rows, tokenizer, END, False), strict, "clm", 1)


def test_a_fake_is_another_corner_drawn_for_each_row_and_epoch(tokenizer):
    rows, examples = examples_of(tokenizer, "exmate")
    batch = examples.batch(np.array([2, 0]), 4)
    assert batch.per_sequence["treated"].tolist() == [1, 0, 1, 0] and batch.per_sequence["share"].tolist() == [0.5] * 4
    for place, row in ((0, 2), (2, 0)):
        fake = render(tokenizer, rows["messages"][row].as_py(), examples.fake(row, 4).spell())
        response = rows["token_ids"][row].as_py()
        assert batch.tokens[place][-len(response) :].tolist() == response
        assert batch.tokens[place + 1].tolist() == [*fake, *response] and batch.prompt_lengths[place + 1] == len(fake)
    for row in range(3):
        drawn = [examples.fake(row, epoch) for epoch in range(60)]
        assert set(drawn) == {*CORNERS} - {CORNERS[row]}
        assert drawn == [ControlledExamples(*rows_of(tokenizer, rows), 1).fake(row, epoch) for epoch in range(60)]
    assert [examples.fake(0, e) for e in range(20)] != [ControlledExamples(*rows_of(tokenizer, rows), 2).fake(0, e) for e in range(20)]
    assert examples.lengths.tolist() == (2 * examples.row_lengths).tolist()


def rows_of(tokenizer, rows):
    return rows, response_ids(rows, tokenizer, END, False), tokenizer, "exmate"


def test_held_out_figures_by_hand():
    controls = [CORNERS[0], CORNERS[3], CORNERS[3]]
    logprobs = [np.array(row) for row in ([-1.0, -2.0, -3.0], [-4.0, -4.0, -4.0], [-1.0], [-2.0], [-3.0], [-3.0])]
    figures = contrast_figures(logprobs, controls)
    assert figures["loss"] == pytest.approx(10 / 5) and figures["treated_l"] == pytest.approx(-2.0)
    assert figures["untreated_l"] == pytest.approx(-3.0) and figures["gap"] == pytest.approx(1.0)
    assert figures["loss/helpful=0.2,harmless=0.2"] == 2.0 and figures["gap/helpful=0.2,harmless=0.2"] == 2.0
    assert figures["loss/helpful=1,harmless=1"] == 2.0 and figures["gap/helpful=1,harmless=1"] == 0.5
    assert "loss/helpful=1,harmless=0.2" not in figures
    assert nearest_corner(Control(0.49, 0.5)) == Control(0.2, 1.0)


def test_tables_that_are_none(tokenizer, tmp_path):
    with pytest.raises(DataError, match="gone.*does not exist"):
        read_distilled(tmp_path / "gone")
    (tmp_path / "bad.parquet").write_text("no")
    with pytest.raises(DataError, match="bad.parquet cannot be read"):
        read_distilled(tmp_path / "bad.parquet")
    pq.write_table(table(tokenizer).drop_columns(["helpful"]), tmp_path / "free.parquet")
    with pytest.raises(DataError, match="without helpful"):
        read_distilled(tmp_path / "free.parquet")
    texts = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")])  # not UTF-8
    one = table(tokenizer).slice(0, 1)
    pq.write_table(one.set_column(one.column_names.index("response"), "response", texts), tmp_path / "latin.parquet")
    with pytest.raises(DataError, match="latin.parquet cannot be read.*UTF8"):
        read_distilled(tmp_path / "latin.parquet")
    with pytest.raises(DataError, match="~nobody-of-that-name.*cannot be read"):
        read_distilled("~nobody-of-that-name/distilled")
    pq.write_table(table(tokenizer).slice(0, 0), tmp_path / "train.parquet")
    with pytest.raises(DataError, match="has no rows"):
        read_distilled(tmp_path)
    pq.write_table(table(tokenizer), tmp_path / "train.parquet")
    assert read_distilled(tmp_path).equals(table(tokenizer))
