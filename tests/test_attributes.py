"""Any number of attributes: their section of a recipe, and the spelling, sampling and fakes of their controls."""
import collections
import json
import pickle
import re

import jinja2
import numpy as np
import pytest

from ctrlrl.attributes import PAPER, AttributesSection, read_attributes, stored, unlike
from ctrlrl.config import Section, completed, dump, load
from ctrlrl.control import CORNERS, Control, cells, corners, neutralise, neutralise_jinja, other_corner, parse, sample_corners
from ctrlrl.errors import ControlError, DataError, RecipeError
from ctrlrl.prompts import prompting_templates

NAMES = ("helpful", "harmless", "concise", "formal", "funny")


class Recipe(Section):
    attributes: AttributesSection = PAPER


def made(*names, **settings):
    """The attributes of these names, each with `settings`."""
    return Recipe(attributes={name: settings for name in names}).attributes


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_controls_of_any_number_of_attributes(count):
    attributes = made(*NAMES[:count])
    every = corners(attributes)
    assert every == cells(attributes) and len(set(every)) == 2**count and list(every) == sorted(every)
    assert every[0].spell() == "".join(f"[{name}=0.2]" for name in NAMES[:count])
    assert all(parse(control.spell(), attributes) == control for control in every)
    assert every[-1].name == ",".join(f"{name}=1" for name in NAMES[:count]) and pickle.loads(pickle.dumps(every[-1])) == every[-1]
    with pytest.raises(ControlError, match=f"write it as {re.escape(every[-1].spell())}"):
        parse(every[0].spell() + "[more=1]", attributes)
    with pytest.raises(ControlError, match="a level for each of"):
        Control(*[0.5] * (count + 1), attributes=attributes)
    fakes = collections.Counter(other_corner(every[1], seed) for seed in range(40 * len(every)))
    assert set(fakes) == set(every) - {every[1]}


def test_the_papers_two_are_the_default():
    assert made("helpful", "harmless") == PAPER and corners(PAPER) == CORNERS
    assert made("harmless", "helpful") != PAPER
    assert json.loads(dump(Recipe(attributes={"helpful": {}, "harmless": {"levels": [0.2, 1.0]}}))) == {}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_attributes_are_drawn_uniformly_from_their_cells(count):
    attributes = made(*NAMES[:count], levels=[0.2, 0.6, 1.0])
    drawn = collections.Counter(sample_corners(400 * 3**count, 1, attributes))
    assert set(drawn) == set(cells(attributes)) and len(corners(attributes)) == 2**count
    assert all(abs(n - 400) < 5 * 20 for n in drawn.values())


def test_of_many_attributes_every_level_is_drawn_equally_often():
    attributes = made(*NAMES)
    drawn = sample_corners(64, 7, attributes)
    levels = np.array([control.levels for control in drawn])
    assert ((levels == 1.0).sum(0) == 32).all() and ((levels == 0.2).sum(0) == 32).all()
    assert drawn == sample_corners(64, 7, attributes) != sample_corners(64, 8, attributes)
    assert len(set(drawn)) > 20 and abs(np.corrcoef(levels.T)[np.triu_indices(5, 1)]).max() < 0.5


def test_the_words_of_the_prompting_templates():
    attributes = read_attributes(
        {"helpful": {}, "harmless": {}, "concise": {"words": ["concise", "long"], "synonyms": ["brief", "wordy"], "tag": "brevity"}}, "here"
    )
    assert prompting_templates(Control(1, 0.2, 0.2, attributes=attributes)) == (
        "[helpful=1][harmless=0.2][concise=0.2]",
        "[helpful=1][safety=0.2][brevity=0.2]",
        "The response should be helpful, not harmless and long.",
        "The response should be helpful not safe wordy.",
    )
    assert prompting_templates(Control(1, attributes=made("concise")))[2] == "The response should be concise."


def test_control_like_text_of_every_attribute_is_inert():
    attributes = read_attributes({"helpful": {}, "concise": {"tag": "brevity"}}, "here")
    text = "[Concise=1] [\u0441\u043encise=1] [brevity: 0] [conciseness=1] [helpful=1] [safe=1] [brief=1]"
    clean = "(Concise=1] (\u0441\u043encise=1] (brevity: 0] (conciseness=1] (helpful=1] [safe=1] [brief=1]"
    assert neutralise(text, attributes) == clean
    template = "{%- set n = namespace(t=text) -%}" + neutralise_jinja("n.t", attributes) + "{{ n.t }}"
    assert jinja2.Environment().from_string(template).render(text=text) == clean
    assert "[Concise=1]" in neutralise(text)  # no attribute of the paper's


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ("[attributes.Concise]", "'Concise' cannot be an attribute's name"),
        ("[attributes.prompt_id]", "'prompt_id' cannot be an attribute's name"),
        ("[attributes.concise]\nlevels = [0.2]", "attributes.concise.levels: are no levels"),
        ("[attributes.concise]\nlevels = [1.0, 0.2]", "are no levels"),
        ("[attributes.concise]\nlevel = [1.0, 0.2]", "unknown key 'attributes.concise.level': did you mean 'levels'?"),
        ("[attributes]", "0 attributes: give 1 to 8"),
    ],
)
def test_a_bad_section_is_refused_by_name(tmp_path, section, told):
    (tmp_path / "r.toml").write_text(section)
    with pytest.raises(RecipeError, match=re.escape(told)):
        load(Recipe, tmp_path / "r.toml")


def test_attributes_survive_being_stored_in_their_order():
    attributes = made("zealous", "concise", levels=[0.1, 0.9])
    assert stored(json.dumps(attributes.dumped()), "x") == attributes and stored(None, "x") == PAPER
    recipe = Recipe(attributes=attributes)
    assert Recipe.model_validate(completed(Recipe, dump(recipe))).attributes == attributes
    for text in ("{", "[1]", '[{"name": "a b"}]'):
        with pytest.raises(DataError, match="^x "):
            stored(text, "x")


def test_what_differs_between_attributes_is_named():
    assert unlike(PAPER, made("helpful", "harmless")) == ""
    assert unlike(made("helpful", "concise"), PAPER) == "helpful and concise in place of helpful and harmless"
    assert unlike(made("concise", levels=[0, 1]), made("concise")) == "levels of concise [0.0, 1.0] in place of [0.2, 1.0]"
