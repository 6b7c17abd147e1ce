"""Dials of any attributes: by name in the operator's file, and per request."""
import pytest

from ctrlrl.attributes import PAPER, read_attributes
from ctrlrl.config import load
from ctrlrl.control import Control
from ctrlrl.errors import RecipeError
from ctrlrl.serving.policies import Caller, Policies, first_dial, made_dial
from ctrlrl.serving.rerank import chosen

THREE = read_attributes({"helpful": {}, "harmless": {}, "concise": {}}, "here")
FILE = """
[attributes.helpful]
[attributes.harmless]
[attributes.concise]

[dials.short]
helpful = 1.0
harmless = 1.0
concise = 1.0
"""


def read(tmp_path, text):
    (tmp_path / "dials.toml").write_text(text)
    return load(Policies, tmp_path / "dials.toml")


def test_a_dial_has_a_level_of_each_attribute(tmp_path):
    policies = read(tmp_path, FILE)
    assert policies.attributes == THREE and policies.dials["short"].control == Control(1, 1, 1, attributes=THREE)
    assert policies.dials["short"].suffix == "[helpful=1][harmless=1][concise=1]"
    operator = Caller(name="root", dials=(), operator=True)
    assert first_dial(policies, "tokens", operator)[1].control.levels == (1, 1, 1)
    asked = made_dial("tokens", {"concise": 0.2, "helpful": 1, "harmless": 0.6}, policies.attributes)
    assert asked.suffix == "[helpful=1][harmless=0.6][concise=0.2]" and asked.spelled == "helpful=1,harmless=0.6,concise=0.2"
    assert read(tmp_path, "[dials.x]\nhelpful = 1.0\nharmless = 0.2").dials["x"].attributes == PAPER


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (FILE.replace("concise = 1.0\n", ""), "a dial is helpful, harmless and concise together"),
        (FILE.replace("concise = 1.0", "concize = 1.0"), "unknown key 'concize': did you mean 'concise'"),
        (FILE.replace("concise = 1.0", "concise = 1.5"), "concise = 1.5 is not a level"),
        (FILE + "rerank = 2", "give rewards.helpful, rewards.harmless and rewards.concise"),
        (FILE + '\n[rewards]\nhelpful = "a"\nharmless = "b"', "rewards needs all, helpful, harmless and concise"),
        ("[dials.x]\nhelpful = 1.0\nharmless = 0.2\nconcise = 1.0", "unknown key 'concise': the attributes are helpful and harmless"),
    ],
)
def test_a_dial_of_other_attributes_is_refused(tmp_path, text, told):
    with pytest.raises(RecipeError, match=told):
        read(tmp_path, text)


def test_an_answer_is_chosen_by_all_attributes():
    completion = {"choices": [{"index": i, "message": {"content": str(i)}} for i in range(2)]}
    scores = [{"concise": 0.1, "helpful": 1.0, "harmless": 1.0}, {"concise": 0.9, "helpful": 0.8, "harmless": 0.9}]
    assert chosen(completion, scores, Control(1, 1, 1, attributes=THREE))["choices"][0]["message"]["content"] == "1"
    assert chosen(completion, scores, Control(1, 1, 0.2, attributes=THREE))["choices"][0]["message"]["content"] == "0"
