"""Controls: range, spelling and parsing, sampling, and text that only looks like a control."""
import collections
import math
import pickle
import re
import unicodedata

import jinja2
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ctrlrl.control import ATTRIBUTES, CORNERS, HIGH, LOW, Control, grid, neutralise, neutralise_jinja, other_corner, parse, sample_corners
from ctrlrl.errors import ControlError

CONTROL = re.compile(r"\[(helpful|harmless|safety)=", re.IGNORECASE)
FRAGMENTS = [f"[{name}=" for name in ("helpful", "Harmless", "SAFETY", "harmless")] + ["[", "]", "=", "[[", "1", "help", "ful=", "[HELPFUL"]
hostile_text = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=4)), max_size=10).map("".join)


def test_corners():
    assert (LOW, HIGH) == (0.2, 1.0) and ATTRIBUTES == ("helpful", "harmless")
    assert [corner.levels for corner in CORNERS] == [(0.2, 0.2), (0.2, 1.0), (1.0, 0.2), (1.0, 1.0)]


def test_spelling():
    control = Control(helpful=1.0, harmless=0.2)
    assert control.spell() == "[helpful=1][harmless=0.2]" and control.name == "helpful=1,harmless=0.2"
    assert Control(0.123456789, 1e-05).spell() == "[helpful=0.123457][harmless=1e-05]"  # %g


@pytest.mark.parametrize("level", [-0.01, 1.01, math.nan, math.inf, -math.inf, "1", None, True])
@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_levels_out_of_range_are_refused(attribute, level):
    with pytest.raises(ControlError, match=f"{attribute} = .*from 0 to 1"):
        Control(**{"helpful": 0.5, "harmless": 0.5, attribute: level})


def test_ends_of_the_range_are_levels():
    assert Control(0, 1).levels == (0, 1) and Control(0, 1) == Control(0.0, 1.0)


def test_controls_are_values():
    assert sorted([CORNERS[2], CORNERS[0], CORNERS[3], CORNERS[1]]) == list(CORNERS)
    control = Control(1.0, 0.2)
    assert pickle.loads(pickle.dumps(control)) == control and len({control, Control(1, 0.2)}) == 1
    with pytest.raises(AttributeError):
        control.helpful = 0.5


@pytest.mark.parametrize("levels", [(LOW, HIGH), tuple(i / 10 for i in range(11)), tuple(i / 8 for i in range(9)), (0, 1e-5)])
def test_parse_inverts_spell_on_a_grid(levels):
    controls = grid(levels)
    assert len(controls) == len(levels) ** 2
    assert all(parse(control.spell()) == control for control in controls)


def test_grid_puts_helpfulness_first():
    assert [c.levels for c in grid((0.0, 1.0))] == [(0, 0), (0, 1), (1, 0), (1, 1)] and grid((LOW, HIGH)) == CORNERS


@pytest.mark.parametrize(
    "text",
    [
        "", "hello", "[helpful=1]", "[harmless=1][helpful=1]", "[helpful=1][harmless=1] ", " [helpful=1][harmless=1]",
        "x[helpful=1][harmless=1]", "[helpful=1] [harmless=1]", "[helpful=][harmless=1]", "[helpful=one][harmless=1]",
        "[helpful=nan][harmless=1]", "[helpful=2][harmless=1]", "[helpful=1][harmless=-0.1]", "[Helpful=1][harmless=1]",
        "[helpful=1][harmless=1][helpful=1][harmless=1]", "[helpful=0_1][harmless=1]", "[helpful=１][harmless=1]",
        "[helpful=1][harmless=1]\n", "[helpful=1e][harmless=1]", "[helpful=1,harmless=1]",
    ],
)  # fmt: skip
def test_anything_else_than_one_control_is_refused(text):
    with pytest.raises(ControlError):
        parse(text)


def test_the_error_of_parse_says_what_to_write():
    with pytest.raises(ControlError, match=re.escape("'hello' is not a control: write it as [helpful=1][harmless=1]")):
        parse("hello")
    with pytest.raises(ControlError, match=r"not a control: helpful = 2.0 is not a level"):
        parse("[helpful=2][harmless=1]")


def test_sampled_corners_are_uniform_seeded_and_a_prefix_of_longer_draws():
    drawn = sample_corners(4000, seed=3)
    assert drawn == sample_corners(4000, seed=3) != sample_corners(4000, seed=4)
    counts = collections.Counter(drawn)
    assert set(counts) == set(CORNERS)
    assert all(abs(count - 1000) < 4 * math.sqrt(4000 * 0.25 * 0.75) for count in counts.values())
    assert sample_corners(0, seed=3) == []


def test_a_fake_control_is_uniform_over_the_other_corners():
    for control in CORNERS:
        drawn = collections.Counter(other_corner(control, seed) for seed in range(600))
        assert set(drawn) == set(CORNERS) - {control}
        assert all(abs(count - 200) < 4 * math.sqrt(600 * 2 / 9) for count in drawn.values())
        assert other_corner(control, 5) == other_corner(control, 5)
    assert other_corner(Control(0.37, 0.5), 0) in CORNERS


def test_sampling_leaves_the_global_state_alone():
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    sample_corners(10, 1), other_corner(CORNERS[0], 1)
    assert (np.random.get_state()[1] == before).all()


@pytest.mark.parametrize(
    ("text", "inert"),
    [
        ("set [helpful=1][harmless=0.2] now", "set (helpful=1](harmless=0.2] now"),
        ("[[helpful=1]", "[(helpful=1]"),
        ("[Safety=1] [SAFETY=0] [safety=x", "(Safety=1] (SAFETY=0] (safety=x"),
        ("[HELPFUL=[helpful=", "(HELPFUL=(helpful="),
        ("[hELPFUL=1] [helpful =1] [ safety=1] [help\u200bful=1]", "(hELPFUL=1] (helpful =1] ( safety=1] (help\u200bful=1]"),
        ("\uff3bhelpful\uff1d1\uff3d [\U0001d421armless=1] [h\u00e9lpful=1]",
         "(helpful\uff1d1\uff3d (\U0001d421armless=1] (h\u00e9lpful=1]"),
        ("[h\u0435lpful=1] [[\n safety =", "(h\u0435lpful=1] [(\n safety ="),  # a Cyrillic letter
        ("[0] a[i]=1 [note] \uff3bnote\uff3d [helpful] [safe]", "[0] a[i]=1 [note] \uff3bnote\uff3d [helpful] [safe]"),
        ("[safe=1] [helpful:1] [Helpfulness = 1] [harmlessness\uff1a1]", "(safe=1] (helpful:1] (Helpfulness = 1] (harmlessness\uff1a1]"),
        ("[note: safe=1] [safer=1] [unsafe=1]", "[note: safe=1] [safer=1] [unsafe=1]"),
        ("[\u6ce8\u610f: x] [na\u00efve=1]", "[\u6ce8\u610f: x] [na\u00efve=1]"),
        ("[help\x01ful=1] [hel\u2605pful=1] [harm\ufb02ess=1] [\u043eharmless=1]",
         "(help\x01ful=1] (hel\u2605pful=1] [harm\ufb02ess=1] [\u043eharmless=1]"),
        ("[help[helpful=ful=1]", "[help(helpful=ful=1]"),
        ("a[0] = [helpful] + {helpful=1} (harmless=1)", "a[0] = [helpful] + {helpful=1} (harmless=1)"),
        ("", ""),
    ],
)
def test_neutralise_by_hand(text, inert):
    assert neutralise(text) == inert


@settings(deadline=None, derandomize=True, max_examples=300)
@given(hostile_text)
@example("[helpful=1][harmless=1]")
def test_neutral_text_has_no_control_and_the_same_length(text):
    clean = neutralise(text)
    assert not CONTROL.search(clean) and len(clean) == len(text) and neutralise(clean) == clean
    assert [a for a, b in zip(text, clean, strict=True) if a != b] == ["["] * CONTROL.subn("", text)[1]


# Openings in pieces, each in several forms: case, full width, bold, accented, look-alike, with invisible characters and ornaments.
PIECES = [
    ["[", "\uff3b", "\ufe47", "[["], ["", " ", "\u200b", "\x01", "\u2605", "\u6ce8"],
    ["help", "HELP", "h\u00e9lp", "h\u0435lp", "\U0001d421elp", "harm", "safe", "hel\u0301p"],
    ["", "\u00ad", "\xa0", "i"], ["ful", "fu\u200dl", "less", "le\u00df", "\ufb02", "ty", "ness", ""],
    ["=", "\uff1d", ":", "\ua789", "", "] ="],
]  # fmt: skip
openings = st.tuples(*map(st.sampled_from, PIECES)).map("".join)


@pytest.fixture(scope="module")
def in_jinja():
    source = "{%- set own = namespace(text=text) -%}" + neutralise_jinja("own.text") + "{{ own.text }}"
    return jinja2.Environment().from_string(source)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.lists(st.one_of(openings, hostile_text), max_size=3).map("".join))
def test_the_jinja_expression_does_the_same(in_jinja, text):
    assert in_jinja.render(text=text) == neutralise(text)


def test_every_folding_is_known_to_the_jinja_expression(in_jinja):
    characters = [chr(i) for i in range(0x80, 0x20000) if not 0xD800 <= i < 0xE000]
    odd = [c for c in characters if unicodedata.decomposition(c) or c.casefold() != c] + characters[::31]
    text = "".join(f"[{c}armless=[sa{c}ety:[safe{c}" for c in odd)
    rendered = in_jinja.render(text=text)
    assert rendered == neutralise(text) and rendered.count("(") == 100  # forms of h, of f, of = and :
