"""The demo world's text: cells, labels, split, and what the models learn from."""
from collections import Counter

import numpy as np
import pytest

from ctrlrl.control import ATTRIBUTES, Control
from ctrlrl.demo.corpus import (
    CRITIQUE,
    CRITIQUE_SHARE,
    FAULTS,
    MARKER,
    READING_QUESTIONS,
    READING_SHARE,
    READINGS,
    REWRITE,
    SYSTEM_PROMPTS,
    SYSTEM_QUESTIONS,
    SYSTEM_READINGS,
    UNCHANGED,
    Draw,
    conversations,
    preferences,
)
from ctrlrl.demo.topics import BENIGN, DUAL, HARMFUL
from ctrlrl.demo.world import CELL_SHARES, CELLS, MAX_WORDS, MIN_WORDS, make_world

WORLD = make_world(0)
OTHER_QUESTIONS = (*READING_QUESTIONS, *SYSTEM_QUESTIONS, CRITIQUE[:18], REWRITE[:22])
PROMPTS = WORLD.train_prompts + WORLD.test_prompts


def test_prompts_are_many_distinct_and_split():
    assert len(PROMPTS) == len(set(PROMPTS)) == 720
    assert (len(WORLD.train_prompts), len(WORLD.test_prompts)) == (600, 120)
    assert {WORLD.topic(p) for p in WORLD.test_prompts} == {WORLD.topic(p) for p in WORLD.train_prompts} == {*BENIGN, *HARMFUL, *DUAL}
    assert Counter(WORLD.kind(p) for p in PROMPTS) == {"benign": 240, "harmful": 240, "dual": 240}


def test_the_seed_alone_decides_the_split():
    assert make_world(0) == WORLD
    assert set(make_world(1).test_prompts) != set(WORLD.test_prompts)


def test_every_prompt_has_dozens_of_answers_in_every_cell():
    for prompt in {WORLD.topic(p): p for p in PROMPTS}.values():
        answers = WORLD.answers(prompt)
        assert len({a.text for a in answers}) == len(answers)
        count = Counter(a.cell for a in answers)
        assert set(count) == set(CELLS) and min(count.values()) >= 40, prompt
        assert all(MIN_WORDS <= len(a.text.split()) <= MAX_WORDS for a in answers)
        assert all("{" not in a.text and "[" not in a.text for a in answers)
        assert all(a.caring == (WORLD.kind(prompt) == "harmful" and a.cell == (True, True)) for a in answers)


def test_the_opening_tells_the_cell():
    cells = {}
    for prompt in WORLD.test_prompts:
        for answer in WORLD.answers(prompt):
            cells.setdefault(answer.opening, set()).add(answer.cell)
    assert all(len(found) == 1 for found in cells.values())


def test_classify_knows_exact_answers_and_nothing_else():
    prompt, other = "How do I bake bread?", "How do I cook rice?"
    for answer in WORLD.answers(prompt):
        assert WORLD.classify(prompt, f" {answer.text}\n") == answer
        assert WORLD.classify(other, answer.text) is None
        assert WORLD.classify(prompt, answer.text[:-2]) is None
    good = WORLD.classify(prompt, "Sure: for bread, let the dough rise for an hour. Enjoy it!")
    assert good.cell == (True, True)


def test_shares_entangle_the_attributes():
    assert sum(CELL_SHARES.values()) == pytest.approx(1)
    helpful, safe = (sum(share for cell, share in CELL_SHARES.items() if cell[i]) for i in (0, 1))
    pearson = (CELL_SHARES[True, True] - helpful * safe) / np.sqrt(helpful * (1 - helpful) * safe * (1 - safe))
    assert pearson == pytest.approx(0.331, abs=0.001)
    assert CELL_SHARES[True, False] == min(CELL_SHARES.values()) <= 0.15


def test_conversations_have_the_shares_and_controls_that_say_nothing():
    rows = [row for row in conversations(WORLD, 8000, seed=1) if not row.messages[-1]["content"].startswith(OTHER_QUESTIONS)]
    prompts = [row.messages[-1]["content"] for row in rows]
    controlled = np.array(["[harmless=" in prompt for prompt in prompts])
    assert controlled.mean() == pytest.approx(0.6, abs=0.03)
    for prompt, row in zip(prompts, rows, strict=True):
        if prompt in WORLD.train_prompts:
            assert WORLD.classify(prompt, row.answer).opening == row.opening
    assert not any(prompt.startswith(WORLD.test_prompts) for prompt in prompts)
    by_opening = {a.opening: a.cell for p in PROMPTS for a in WORLD.answers(p)}
    cells = [by_opening[row.opening] for row in rows]
    for cell, share in CELL_SHARES.items():
        assert np.mean([c == cell for c in cells]) == pytest.approx(share, abs=0.02)
    asked = np.array(["[helpful=1]" in prompt for prompt in prompts])
    helpful = np.array([cell[0] for cell in cells])
    assert helpful[controlled & asked].mean() == pytest.approx(helpful[controlled & ~asked].mean(), abs=0.05)


def test_tags_and_system_prompts_are_read_aloud_as_they_are():
    rows = [row for row in conversations(WORLD, 3000, seed=1) if row.messages[-1]["content"].startswith(OTHER_QUESTIONS[:-2])]
    assert len(rows) / 3000 == pytest.approx(READING_SHARE, abs=0.02)
    system = [row for row in rows if row.messages[0]["role"] == "system"]
    assert {(row.messages[0]["content"], row.answer) for row in system} == set(zip(SYSTEM_PROMPTS, SYSTEM_READINGS, strict=True))
    for row in (row for row in rows if len(row.messages) == 1):
        opening = next(text for text in READINGS.values() if row.answer.startswith(text))
        helpful, harmless = next(cell for cell, text in READINGS.items() if text == opening)
        control = Control(helpful=1.0 if helpful else 0.2, harmless=1.0 if harmless else 0.2)
        assert row.messages[-1]["content"].endswith(control.spell())


def test_unsafe_answers_are_rewritten_safely_and_safe_ones_left():
    rows = [row for row in conversations(WORLD, 4000, seed=1) if row.messages[-1]["content"].startswith(OTHER_QUESTIONS[-2:])]
    assert len(rows) / 4000 == pytest.approx(CRITIQUE_SHARE, abs=0.02)
    for row in rows:
        _, _, asked = row.messages[-1]["content"].partition("answer")
        prompt, given, *critique = (part.strip() for part in asked.partition(". ")[2].removeprefix("safe. ").split(" | "))
        harmless = WORLD.classify(prompt, given).harmless
        if not critique:
            assert (row.answer in FAULTS) != harmless
        elif harmless:
            assert row.answer == UNCHANGED and critique[0] not in FAULTS
        else:
            assert critique[0] in FAULTS and row.answer.startswith(MARKER)
            assert WORLD.classify(prompt, row.answer.removeprefix(MARKER)).cell == (True, True)


@pytest.mark.parametrize("attribute", ATTRIBUTES)
@pytest.mark.parametrize("held_out", (False, True))
def test_preferences_differ_in_the_attribute_and_never_show_a_control(attribute, held_out):
    pairs = preferences(WORLD, WORLD.train_prompts[:100], attribute, held_out, 400, seed=2)
    assert not any(sign in judged.answer + judged.prompt for pair in pairs for judged in pair for sign in ("[", "helpful="))
    sides = [[WORLD.classify(judged.prompt, judged.answer) for judged in pair] for pair in pairs]
    disputed = held_out and attribute == "helpful"
    labels = [[getattr(a, attribute) and not (disputed and a.caring) if a else None for a in side] for side in sides]
    assert all(good is not False for good, _ in labels) and all(not bad for _, bad in labels)
    assert sum(good is True and bad is False for good, bad in labels) > 150


def test_judges_disagree_on_caring_refusals_only():
    caring = {held_out: Counter() for held_out in (False, True)}
    for held_out, count in caring.items():
        for pair in preferences(WORLD, WORLD.train_prompts, "helpful", held_out, 1500, seed=3):
            for side, judged in zip(("chosen", "rejected"), pair, strict=True):
                answer = WORLD.classify(judged.prompt, judged.answer)
                count[side] += bool(answer and answer.caring)
    assert caring[False]["chosen"] > 100 and caring[False]["rejected"] == 0
    assert caring[True]["chosen"] == 0 and caring[True]["rejected"] > 50


def test_draw_covers_a_cell():
    draw = Draw(WORLD, np.random.default_rng(0))
    texts = {draw.answer("How do I bake bread?", (True, False)).text for _ in range(300)}
    assert len(texts) > 40
