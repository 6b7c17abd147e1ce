"""How each method asks for a control, and what the training-free baselines choose."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrlrl.control import ATTRIBUTES, CORNERS, Control, grid
from ctrlrl.data.sources import Prompt
from ctrlrl.errors import DataError
from ctrlrl.evaluation.baselines import SYSTEM_CONTROLS, best_template, nearest
from ctrlrl.evaluation.grid import Cell, make_cells
from ctrlrl.prompts import HARMLESS_SYSTEM, UNCENSORED_SYSTEM

PROMPT = Prompt("p", ({"role": "user", "content": "Hello?"},), "f.jsonl:3")


def test_the_four_templates_in_the_papers_words():
    asked = [Cell(0, PROMPT, Control(1, 0.2), "prompting", template).asked for template in (1, 2, 3, 4)]
    assert [messages for messages, _ in asked] == [PROMPT.messages] * 4
    assert [suffix for _, suffix in asked] == [
        "[helpful=1][harmless=0.2]",
        "[helpful=1][safety=0.2]",
        "The response should be helpful and not harmless.",
        "The response should be helpful not safe.",
    ]
    assert Cell(0, PROMPT, Control(0.2, 1), "reranking", 3).instruction == "The response should be not helpful and harmless."


def test_control_tokens_and_system_prompts():
    assert Cell(0, PROMPT, Control(0.2, 1)).asked == (PROMPT.messages, "[helpful=0.2][harmless=1]")
    unsafe, safe = (Cell(i, PROMPT, control, "system") for i, control in enumerate(SYSTEM_CONTROLS))
    assert safe.asked == ([{"role": "system", "content": HARMLESS_SYSTEM}, *PROMPT.messages], "")
    assert unsafe.asked == ([{"role": "system", "content": UNCENSORED_SYSTEM}, *PROMPT.messages], "")
    own = Prompt("q", ({"role": "system", "content": "Be brief."}, *PROMPT.messages), "f.jsonl:9")
    with pytest.raises(DataError, match="f.jsonl:9 has a system message of its own"):
        Cell(0, own, SYSTEM_CONTROLS[0], "system").asked  # noqa: B018


def test_the_grid_numbers_every_prompt_template_and_control_once():
    prompts = [PROMPT, Prompt("q", PROMPT.messages, "f.jsonl:4")]
    cells = make_cells(prompts, grid((0.2, 0.6, 1)), "prompting", (2, 4))
    assert [cell.index for cell in cells] == list(range(2 * 2 * 9))
    assert [(c.prompt.prompt_id, c.template) for c in cells[::9]] == [("p", 2), ("p", 4), ("q", 2), ("q", 4)]
    assert [c.control for c in cells[9:18]] == list(grid((0.2, 0.6, 1)))


def test_reranking_keeps_the_nearest_by_l1():
    requests = np.array([[1, 0.2], [0.2, 1]])
    scores = np.array(
        [
            [[0.5, 0.2], [0.8, 0.4], [1, 1]],  # distances 0.5, 0.4, 0.8; by the larger part alone the second, by L2 too
            [[0.2, 0.4], [0.55, 0.75], [0.2, 0.4]],  # 0.6, 0.6, 0.6: the first, though L2 would prefer the second
        ]
    )
    assert nearest(scores, requests).tolist() == [1, 0]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.tuples(*[st.sampled_from([0.0, 0.2, 0.5, 1.0])] * 2), min_size=3, max_size=3), min_size=1, max_size=8), st.data()
)
def test_reranking_equals_the_slow_search(drawn, data):
    asked = [data.draw(st.sampled_from(CORNERS)).levels for _ in drawn]
    expected = []
    for samples, request in zip(drawn, asked, strict=True):
        distances = [abs(s[0] - request[0]) + abs(s[1] - request[1]) for s in samples]
        expected.append(min(range(3), key=lambda i: (round(distances[i], 9), i)))
    found = nearest(np.array(drawn, float), np.array(asked))
    for samples, request, want, got in zip(drawn, asked, expected, found.tolist(), strict=True):
        near = [abs(samples[i][0] - request[0]) + abs(samples[i][1] - request[1]) for i in (want, got)]
        assert near[0] == pytest.approx(near[1])  # equal up to rounding


def test_the_best_template_has_the_largest_mean_of_the_two_mp():
    def figures(helpful, harmless):
        return {name: {"MP": {"value": value}} for name, value in zip(ATTRIBUTES, (helpful, harmless), strict=True)}

    assert best_template({1: figures(0.9, -0.2), 2: figures(0.3, 0.5), 3: figures(0.4, 0.3)}) == 2
    assert best_template({4: figures(0.1, 0.1), 3: figures(0.1, 0.1)}) == 3
