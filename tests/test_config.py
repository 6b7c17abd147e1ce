"""Recipes: precedence, strictness, errors that name the remedy, dumps and their differences."""
import json
from typing import Literal

import pytest
from pydantic import Field, ValidationError, model_validator

from ctrlrl.config import Section, differences, dump, load
from ctrlrl.errors import RecipeError


class Schedule(Section):
    shape: str = "cosine"


class Optimiser(Section):
    schedule: Schedule = Schedule()
    learning_rate: float = Field(2e-5, gt=0)
    warmup: int = 0


class Scorer(Section):
    model: str
    calibration: Literal["sigmoid", "identity"] = "sigmoid"


class Recipe(Section):
    seed: int = 0
    name: str = "run"
    optimiser: Optimiser = Optimiser()
    scorers: dict[str, Scorer] = {}
    stages: list[Scorer] = []
    pools: dict[str, list[Scorer]] | None = None
    held_out: Scorer | None = None

    @model_validator(mode="after")
    def _no_conflict(self):
        if self.seed == 13:
            raise ValueError("seed = 13 is unlucky: choose another")
        return self


@pytest.fixture
def recipe(tmp_path):
    def write(text):
        path = tmp_path / "recipe.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_defaults_without_a_recipe():
    assert load(Recipe, None) == Recipe()


def test_a_recipe_and_overrides(recipe):
    path = recipe('seed = 3\nname = "π"\n[optimiser]\nwarmup = 10\n[scorers.safe]\nmodel = "a"\n')
    config = load(Recipe, path, ["optimiser.learning_rate=0.5", "scorers.safe.model=b", "scorers.kind.model=c/d", "seed=4"])
    assert config.seed == 4 and config.name == "π"
    assert config.optimiser.model_dump() == {"learning_rate": 0.5, "warmup": 10, "schedule": {"shape": "cosine"}}
    assert {name: scorer.model for name, scorer in config.scorers.items()} == {"safe": "b", "kind": "c/d"}
    assert load(Recipe, str(path)).optimiser.learning_rate == 2e-5


@pytest.mark.parametrize(
    ("override", "name"),
    [("name=plain", "plain"), ('name="quoted"', "quoted"), ("name=", ""),
     ("name=a=b", "a=b"), ("name=/tmp/a b", "/tmp/a b"), (" name =x", "x")],
)
def test_strings_as_people_type_them(override, name):
    assert load(Recipe, None, [override]).name == name


def test_the_last_override_wins():
    assert load(Recipe, None, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize("override", ["seed", "=3", ""])
def test_malformed_overrides(override):
    with pytest.raises(RecipeError, match="not of the form section.key=value"):
        load(Recipe, None, [override])


def test_an_override_below_a_plain_value(recipe):
    with pytest.raises(RecipeError, match="--set 'seed.x=1': 'seed' is not a section"):
        load(Recipe, recipe("seed = 3"), ["seed.x=1"])


def test_missing_and_malformed_files(recipe, tmp_path):
    with pytest.raises(RecipeError, match="nowhere.toml' does not exist"):
        load(Recipe, tmp_path / "nowhere.toml")
    with pytest.raises(RecipeError, match="does not exist"):
        load(Recipe, tmp_path)
    with pytest.raises(RecipeError, match="recipe.toml' is not TOML"):
        load(Recipe, recipe("seed = = 3"))
    (tmp_path / "latin.toml").write_bytes(b'name = "\xe9"')
    with pytest.raises(RecipeError, match="is not TOML"):
        load(Recipe, tmp_path / "latin.toml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sead=1", "unknown key 'sead': did you mean 'seed'?"),
        ("optimiser.learning_rat=1", "unknown key 'optimiser.learning_rat': did you mean 'learning_rate'?"),
        ("optimiser.zzz=1", "unknown key 'optimiser.zzz': known keys: learning_rate, schedule, warmup"),
        ("optimiser.schedule.shap=linear", "unknown key 'optimiser.schedule.shap': did you mean 'shape'?"),
        ("scorers.safe={model='a', calibratoin='sigmoid'}", "unknown key 'scorers.safe.calibratoin': did you mean 'calibration'?"),
        ("stages=[{model='a', modle='b'}]", "unknown key 'stages.0.modle': did you mean 'model'?"),
        ("held_out={model='a', modle='b'}", "unknown key 'held_out.modle': did you mean 'model'?"),
        ("pools={a=[{model='a', modle='b'}]}", "unknown key 'pools.a.0.modle': did you mean 'model'?"),
        ("scorers.safe.calibration=identity", "'scorers.safe.model' is required: set it in the recipe or with --set scorers.safe.model="),
        ("optimiser.learning_rate=-1", "optimiser.learning_rate: Input should be greater than 0 (given: -1)"),
        ("seed=x", "(given: 'x')"),
    ],
)
def test_errors_name_the_remedy(override, message):
    with pytest.raises(RecipeError) as caught:
        load(Recipe, None, [override])
    assert message in str(caught.value) and "recipe" not in str(caught.value).split(":")[0] and "\n" not in str(caught.value)


def test_a_conflict_is_told_in_its_own_words():
    with pytest.raises(RecipeError) as caught:
        load(Recipe, None, ["seed=13"])
    assert str(caught.value) == "seed = 13 is unlucky: choose another"


def test_every_error_is_told_at_once_with_the_recipes_name(recipe):
    path = recipe("sead = 1\n[optimiser]\nwarmup = 0.5\n")
    with pytest.raises(RecipeError) as caught:
        load(Recipe, path)
    text = str(caught.value)
    assert text.startswith(f"recipe {str(path)!r}: ") and "'seed'" in text and "optimiser.warmup" in text


def test_sections_are_frozen_and_know_their_keys():
    with pytest.raises(ValidationError):
        Recipe().seed = 1
    with pytest.raises(ValidationError):
        Recipe(unknown=1)


def test_dump_is_stable_and_complete():
    config = load(Recipe, None, ["scorers.b.model=x", "scorers.a.model=y"])
    text = dump(config)
    assert json.loads(text) == config.model_dump() and list(json.loads(text)) == sorted(json.loads(text))
    assert dump(Recipe.model_validate(json.loads(text))) == text
    assert text == dump(load(Recipe, None, ["scorers.a.model=y", "scorers.b.model=x"]))


def test_differences():
    old = json.loads(dump(Recipe()))
    new = json.loads(dump(load(Recipe, None, ["seed=1", "optimiser.warmup=5", "scorers.a.model=x"])))
    assert differences(old, old) == []
    assert differences(old, new) == [
        "optimiser.warmup: 0 -> 5",
        'scorers.a: null -> {"calibration": "sigmoid", "model": "x"}',
        "seed: 0 -> 1",
    ]
    assert differences({"a": {"b": 1}}, {"a": 2}) == ['a: {"b": 1} -> 2'] and differences({"a": 1}, {}) == ["a: 1 -> null"]
    two, other = [{"b": 1, "c": 2}, {"b": 3}], [{"b": 1, "c": 2}, {"b": 4}]
    assert differences({"a": two}, {"a": other}) == ["a.1.b: 3 -> 4"] and len(differences({"a": two}, {"a": two[:1]})) == 1
    assert differences({"a": [1, 2]}, {"a": [1, 3]}) == ["a: [1, 2] -> [1, 3]"]


class Places(Section):
    out: str = ""
    model: str | None = None
    inputs: dict[str, str] = {}
    scorers: dict[str, Scorer] = {}
    held_out: Scorer | None = None
    many: list[str] = []
    count: int | str = 0


FOLDERS = ["2026-11-25", "20261125", "true", "1e3", "null", "[a]", "[1]", "{ a = 1 }", "1979-05-27T07:32:00Z", "inf", "0x10", "[" * 5000]


@pytest.mark.parametrize("text", FOLDERS, ids=lambda text: text[:20])
def test_where_a_text_is_asked_for_every_text_is_itself(text):
    keys = ("out", "model", "inputs.policy", "scorers.safe.model", "held_out.model")
    config = load(Places, None, [f"{key}={text}" for key in keys])
    assert [config.out, config.model, config.inputs["policy"], config.scorers["safe"].model, config.held_out.model] == [text] * 5
    assert load(Places, None, [f'out="{text}"']).out == text
    assert load(Places, None, ["out=other"], options={"out": text}).out == text


def test_other_fields_take_toml():
    config = load(Places, None, ['many=["a", "b"]', "count=3"])
    assert config.many == ["a", "b"] and config.count == 3
    with pytest.raises(RecipeError, match="many.*valid list"):
        load(Places, None, ["many=[a]"])


def test_a_recipe_with_a_byte_order_mark(tmp_path):
    (tmp_path / "recipe.toml").write_bytes(b"\xef\xbb\xbfseed = 3\n")
    assert load(Recipe, tmp_path / "recipe.toml").seed == 3
