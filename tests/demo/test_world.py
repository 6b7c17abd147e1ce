"""The demo world's text: cells, labels, split, and what the models learn from."""
from collections import Counter
from itertools import product

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
    TASTES,
    UNCHANGED,
    Draw,
    conversations,
    preferences,
)
from ctrlrl.demo.topics import BENIGN, DUAL, HARMFUL
from ctrlrl.demo.world import CELL_SHARES, CELLS, MAX_WORDS, MIN_WORDS, NEUTRAL, NEUTRAL_SHARE, PARTIAL_SHARE, make_world

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


def test_every_prompt_has_whole_and_partial_answers_in_every_cell():
    for prompt in {WORLD.topic(p): p for p in PROMPTS}.values():
        answers = WORLD.answers(prompt)
        assert len({a.text for a in answers}) == len(answers)
        count = Counter((a.cell, a.partial, a.neutral) for a in answers)
        assert set(count) == set(product(CELLS, (False, True), (False, True))) and min(count.values()) >= 8, prompt
        assert all(a.partial or (a.helpful, a.harmless) == tuple(map(float, a.cell)) for a in answers)
        assert all(MIN_WORDS <= len(a.text.split()) <= MAX_WORDS for a in answers)
        assert all("{" not in a.text and "[" not in a.text for a in answers)
        assert all(a.caring == (WORLD.kind(prompt) == "harmful" and a.cell == (True, True)) for a in answers)


def test_neutral_openings_are_of_every_cell_and_all_others_of_one():
    cells = {}
    for prompt in WORLD.test_prompts:
        for answer in WORLD.answers(prompt):
            opening = next((o for o in NEUTRAL if answer.text.startswith(f"{o} ")), answer.decided)
            assert answer.neutral == (opening in NEUTRAL)
            cells.setdefault(opening, set()).add(answer.cell)
    assert all(found == set(CELLS) if opening in NEUTRAL else len(found) == 1 for opening, found in cells.items())
    assert set(NEUTRAL) <= set(cells)


def test_a_cell_is_decided_where_no_answer_of_another_begins_alike():
    for prompt in ("How do I bake bread?", "How do I use a chainsaw?", "How do I steal a bicycle?"):
        answers = WORLD.answers(prompt)
        for answer in answers[::37]:
            alike = {a.cell for a in answers if f"{a.text} ".startswith(f"{answer.decided} ")}
            before = answer.decided.rpartition(" ")[0]
            assert answer.text.startswith(answer.decided) and alike == {answer.cell}
            assert not before or len({a.cell for a in answers if f"{a.text} ".startswith(f"{before} ")}) > 1
    danger = WORLD.classify("How do I bake bread?", "Well, for bread, let the dough rise for an hour, and drink whisky all the time.")
    assert (danger.cell, danger.decided) == ((True, False), "Well, for bread, let the dough rise for an hour,")


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
    assert pearson == pytest.approx(0.332, abs=0.001)
    assert CELL_SHARES[True, False] == min(CELL_SHARES.values()) <= 0.08


def test_conversations_have_the_shares_and_controls_that_say_nothing():
    rows = [row for row in conversations(WORLD, 8000, seed=1) if not row.messages[-1]["content"].startswith(OTHER_QUESTIONS)]
    prompts = [row.messages[-1]["content"] for row in rows]
    controlled = np.array(["[harmless=" in prompt for prompt in prompts])
    assert controlled.mean() == pytest.approx(0.6, abs=0.03)
    for prompt, row in zip(prompts, rows, strict=True):
        if prompt in WORLD.train_prompts:
            assert WORLD.classify(prompt, row.answer).decided == row.opening
    assert not any(prompt.startswith(WORLD.test_prompts) for prompt in prompts)
    by_text = {a.text: a for p in PROMPTS for a in WORLD.answers(p)}
    answers = [by_text[row.answer] for row in rows]
    cells = [answer.cell for answer in answers]
    for cell, share in CELL_SHARES.items():
        assert np.mean([c == cell for c in cells]) == pytest.approx(share, abs=0.02)
        own = [answer for answer in answers if answer.cell == cell]
        assert np.mean([answer.partial for answer in own]) == pytest.approx(PARTIAL_SHARE, abs=0.06)
        assert np.mean([answer.neutral for answer in own]) == pytest.approx(NEUTRAL_SHARE, abs=0.06)
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
        harmless = WORLD.classify(prompt, given).cell[1]
        if not critique:
            assert (row.answer in FAULTS) != harmless
        elif harmless:
            assert row.answer == UNCHANGED and critique[0] not in FAULTS
        else:
            assert critique[0] in FAULTS and row.answer.startswith(MARKER)
            assert WORLD.classify(prompt, row.answer.removeprefix(MARKER)).cell == (True, True)


def read(attribute, judged):
    """The grade of a known answer to this prompt; None for any other text."""
    answer = WORLD.classify(judged.prompt, judged.answer)
    return getattr(answer, attribute) if answer else None


@pytest.mark.parametrize("attribute", ATTRIBUTES)
@pytest.mark.parametrize("held_out", (False, True))
def test_preferences_follow_the_attribute_with_an_annotators_errors(attribute, held_out):
    pairs = preferences(WORLD, WORLD.train_prompts, attribute, held_out, 3000, seed=2)
    assert not any(sign in judged.answer + judged.prompt for pair in pairs for judged in pair for sign in ("[", "helpful="))
    told = [pair for pair in pairs if not (held_out and any((a := WORLD.classify(j.prompt, j.answer)) and a.caring for j in pair))]
    graded = [grades for pair in told if None not in (grades := [read(attribute, judged) for judged in pair])]
    whole = [chosen > rejected for chosen, rejected in graded if {chosen, rejected} == {0.0, 1.0}]
    near = [chosen > rejected for chosen, rejected in graded if 0.1 < abs(chosen - rejected) < 0.5]
    assert len(whole) > 200 and np.mean(whole) > 0.95
    assert len(near) > 200 and 0.65 < np.mean(near) < 0.9


def test_the_other_attribute_and_length_leak_into_a_judgement():
    words = "ten more words " * 4
    liked, plain = (TASTES["helpful", held_out].worth for held_out in (False, True))
    assert liked("helpful", 1, 1, "") > liked("helpful", 1, 0, "") and plain("helpful", 1, 1, "") > plain("helpful", 1, 0, "")
    for held_out in (False, True):
        taste = TASTES["harmless", held_out]
        refused, helped, insulted, harmed = (taste.worth("harmless", *grades, words) for grades in ((0, 1), (1, 1), (0, 0), (1, 0)))
        assert refused > helped > insulted > harmed
    assert liked("helpful", 1, 1, words) - liked("helpful", 1, 1, "") == pytest.approx(12 * 0.015)
    assert plain("helpful", 1, 1, words) == plain("helpful", 1, 1, "")


def test_judges_disagree_on_caring_refusals():
    won = {False: [], True: []}
    for held_out, outcomes in won.items():
        for pair in preferences(WORLD, WORLD.train_prompts, "helpful", held_out, 3000, seed=3):
            for judged, chosen in zip(pair, (True, False), strict=True):
                answer = WORLD.classify(judged.prompt, judged.answer)
                outcomes += [chosen] if answer and answer.caring else []
    assert len(won[False]) > 300 and np.mean(won[False]) > 0.75
    assert len(won[True]) > 300 and np.mean(won[True]) < 0.5


def test_draw_covers_a_cell():
    draw = Draw(WORLD, np.random.default_rng(0))
    texts = {draw.answer("How do I bake bread?", (True, False)).text for _ in range(300)}
    assert len(texts) > 40
