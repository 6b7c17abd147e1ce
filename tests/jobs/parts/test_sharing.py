"""Devices that kinds of workers share: which places are reserved, who has which, what Ray counts, and what does not go with turns."""

from pathlib import Path

import pytest

from actors.placement import Placement, Resources
from actors.turns import at_once
from ctrlrl.config import load
from ctrlrl.errors import RecipeError
from jobs.parts.cast import PPORecipe, demands_of
from jobs.parts.sharing import Sharing, kinds_of, placed, with_shares
from jobs.ppo_overlap import OverlapRecipe

RECIPE = str(Path(__file__).parents[3] / "jobs" / "recipes" / "ppo_node_shared.toml")


def test_a_device_holds_one_worker_of_each_kind_that_has_so_many():
    changes = ["rollout.workers=6", "reward.helpful.workers=2", "rollout.resources.custom={fast=0.5}", "reference.workers=1"]
    config = load(PPORecipe, RECIPE, [*changes, "reward.harmless.resources={cpus=3,gpus=0}", "reward.harmless.workers=2"])
    demands = demands_of(config)
    all_six = {"CPU": 16, "GPU": 1, "fast": 0.5}  # of 8 policy and value ranks, 6 rollout workers, 2 judges, 1 reference
    five = {"CPU": 14, "GPU": 1, "fast": 0.5}
    assert demands["devices"] == [all_six, five, *[{"CPU": 12, "GPU": 1, "fast": 0.5}] * 4, *[{"CPU": 8, "GPU": 1}] * 2]
    assert {name: places for name, places in demands.items() if name != "devices"} == {"reward.harmless": [{"CPU": 3}] * 2}

    kinds = kinds_of(config)
    place = placed(Placement(None, {"devices": 0, "reward.harmless": 8}, {"devices": 8, "reward.harmless": 2}), kinds)
    at = {name: [place.offsets[name] + index for index in range(place.counts[name])] for name in kinds}
    assert at["policy"] == at["value"] == list(range(8)) and at["rollout"] == list(range(6)) and at["reference"] == [0]
    assert at["reward.harmless"] == [8, 9] and place.at("rollout", 6) == "DEFAULT"

    shares = with_shares(config, kinds)
    assert shares.policy.resources == Resources(cpus=4, gpus=0.2) and shares.reward["helpful"].resources.gpus == 0.2
    assert shares.reward["harmless"].resources.gpus == 0 and shares.policy.train == config.policy.train
    three = with_shares(config, {name: kinds[name] for name in ("policy", "value", "rollout")})
    assert three.rollout.resources.gpus == 0.3333  # of which Ray counts ten thousandths: three fit


def test_separate_places_are_as_they_were(ppo_overrides):
    config = load(PPORecipe, None, ppo_overrides)
    names = ["policy", "value", "rollout", "reward.helpful", "reward.harmless", "reference"]
    assert demands_of(config) == dict.fromkeys(names, [{"CPU": 1}])
    shared = config.model_copy(update={"placement": "shared"})
    assert demands_of(shared) == demands_of(config)  # without GPUs nothing is shared but turns
    apart, turns = (Sharing(kinds_of(config), here) for here in (False, True))
    assert all(apart.turn(name) is at_once for name in names) and not any(turns.turn(name) is at_once for name in names)


def test_where_some_have_gpus_the_others_need_no_turn():
    config = load(PPORecipe, RECIPE, ["reward.helpful.resources.gpus=0", "reference.resources.gpus=0"])
    sharing = Sharing(kinds_of(config), True)
    assert [name for name in kinds_of(config) if sharing.turn(name) is at_once] == ["reward.helpful", "reference"]


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        (PPORecipe, ["sync=gloo"], 'sync = "gloo" has trainers and rollout workers at work at once: set sync = "auto"'),
        (PPORecipe, ["rollout.workers={min=1,max=2}"], "come and go have no device to share: give rollout.workers one number"),
        (PPORecipe, ["evaluation.every=1", "evaluation.prompts=x"], "set evaluation.every = 0, and evaluate the model afterwards"),
        (PPORecipe, ["rollout.engine.tensor_parallel=2"], "tensor_parallel = 2: an engine shares one device: set it to 1"),
        (PPORecipe, ["policy.resources.gpus=0.5"], "policy.resources.gpus = 0.5: where a device is shared, give 1"),
        (PPORecipe, [f"reward.helpful.judge.{key}" for key in ("model=m", "rubric={answer}?")], "judge is an engine, which does not rest"),
        (OverlapRecipe, [], "here both work at once: use ctrlrl ppo"),
    ],
)
def test_what_does_not_go_with_turns_is_refused(kind, changes, said, ppo_overrides):
    given = ppo_overrides if not any("judge" in change for change in changes) else [o for o in ppo_overrides if "reward.helpful" not in o]
    load(PPORecipe, None, [*given, *changes]) if kind is PPORecipe else None  # goes with places of their own
    with pytest.raises(RecipeError, match=said):
        load(kind, None, [*given, *changes, "placement=shared"])


def test_weights_go_from_device_to_device_where_these_are_shared(ppo_overrides):
    given = [*ppo_overrides, "sync=ipc"]
    assert load(PPORecipe, None, [*given, "placement=shared"]).sync == "ipc"
    for fewer in ["rollout.workers=2"], ["policy.resources.gpus=1"]:
        with pytest.raises(RecipeError, match="of . workers not each has one .policy.ranks = 1.: set sync = .auto."):
            load(PPORecipe, None, [*given, "placement=shared", *fewer])
