"""ctrlrl plan: shipped recipes fit the GPUs that they are for, and what it tells to change makes others fit."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ctrlrl.cli import app
from ctrlrl.config import load
from ctrlrl.errors import RecipeError
from jobs.parts.cast import PPORecipe, demands_of
from jobs.parts.rooms import Worker, devices_of, gpus_of, used
from jobs.plan import plan

RECIPES = Path(__file__).parents[2] / "jobs" / "recipes"
WIDE = "hidden=8192,layers=2,heads=64,kv_heads=8,vocabulary=32000,intermediate=98304"  # large, and metered at once
SIZES = {"ppo": (8, 80), "ppo_node": (8, 80), "ppo_node_shared": (8, 80), "ppo_cluster": (20, 80), "ppo_70b": (18, 80),
         "ppo_one_gpu": (1, 24)}
SMALL = "hidden=2048,layers=2,heads=32,kv_heads=8,vocabulary=128256,intermediate=8192,tied=true"
IDLE = {"ppo_node": 0.25}  # of the GPU that the frozen models share


@pytest.mark.parametrize("name", SIZES)
def test_a_shipped_recipe_fits_its_gpus(name, capsys):
    gpus, gib = SIZES[name]
    recipe = str(RECIPES / f"{name}.toml")
    assert plan(recipe, [], gib, gpus, 1.5, []) == 0
    assert "Everything fits." in capsys.readouterr().out
    assert sum(bundle["GPU"] for places in demands_of(load(PPORecipe, recipe)).values() for bundle in places) == gpus - IDLE.get(name, 0)


def advice(output: str) -> list[list[str]]:
    """The first change that each line of trouble names, as overrides."""
    lines = [line for line in output.splitlines() if line.startswith("DOES NOT FIT")]
    return [re.findall(r"--set (\S+)", line.split("; or ")[0]) for line in lines]


def test_what_does_not_fit_is_told_with_changes_that_make_it_fit(capsys):
    recipe, alone = str(RECIPES / "ppo_node.toml"), ["policy.ranks=1", "value.ranks=1", "policy.train.zero_stage=1"]
    assert plan(recipe, alone, 6.5, 0, 1.5, [SMALL]) == 1
    changes = advice(capsys.readouterr().out)
    assert len(changes) == 4 and all(changes)  # policy, value, rollout, and the GPU that three workers share
    assert changes[:3] == [["policy.train.zero_stage=3", "policy.ranks=4"], ["value.ranks=2"], ["rollout.engine.kv_cache_gib=2"]]
    assert plan(recipe, [*alone, *(override for change in changes for override in change)], 6.5, 0, 1.5, [SMALL]) == 0


def test_with_no_gpu_to_spare_those_that_share_one_change_together(capsys):
    recipe = str(RECIPES / "ppo_one_gpu.toml")
    assert plan(recipe, [], 18.3, 1, 1.5, []) == 1
    (changes,) = advice(capsys.readouterr().out)
    assert changes[:2] == ["rollout.engine.kv_cache_gib=0.5", "policy.train.micro_batch_tokens=2048"]  # and no other GPU
    assert (plan(recipe, changes, 18.3, 1, 1.5, []), plan(recipe, changes[:-1], 18.3, 1, 1.5, [])) == (0, 1)


def test_the_command_says_where_sizes_are_from_and_ends_with_1_if_there_are_too_few_gpus(ppo_overrides):
    ranks = [f"{group}.ranks=1" for group in ("policy", "value")]
    given = [part for override in (*ppo_overrides, *ranks, "value.resources.gpus=2") for part in ("--set", override)]
    result = CliRunner().invoke(app, ["plan", str(RECIPES / "ppo.toml"), *given, "--gpus", "2"])
    assert result.exit_code == 1, result.output
    assert result.output.count("its config.json") == 5
    assert "TOO FEW GPUS: 7 are asked for, 2 are there: --set value=head (5 GPUs)" in result.output
    for size, message in (("policy.model=huge", "describes no model"), ("value.model=1b", "value.model is no model of this recipe")):
        mistaken = CliRunner().invoke(app, ["plan", str(RECIPES / "ppo_one_gpu.toml"), "--sizes", size])
        assert mistaken.exit_code == 2 and message in mistaken.output


def test_a_model_under_two_keys_has_one_size(capsys):
    sizes = [f"policy.model={SMALL}", "reward.harmless.model=135m"]
    assert plan(str(RECIPES / "ppo_node.toml"), ["sync=gloo"], 80, 0, 1.5, sizes) == 0
    output = capsys.readouterr().out
    assert "GiB of memory of the policy's rank 0 and of each rollout worker" in output
    sizes = re.findall(r"^(\S+\.model) +([\d.]+)B", output, re.MULTILINE)
    assert sizes == [
        ("policy.model", "0.38"), ("reference.model", "0.38"), ("value.model", "0.38"),
        ("reward.helpful.model", "8.03"), ("reward.harmless.model", "0.13"),
    ]  # fmt: skip


def test_workers_that_take_turns_need_the_largest_turn_and_what_stays_of_the_others():
    def worker(name, turn, count=1, phase="score", **parts):
        return Worker(name, count, 0, 1, {phase: {**parts, "CUDA": 1}}, turn)

    workers = [
        worker("policy", "train", 2, weights=10, optimiser=20, buffers=3),
        worker("value", "train", weights=5),
        worker("reward", "judge", weights=30),
        worker("rollout", "draw", 2, "generate", weights=12, cache=20, buffers=4),
    ]
    first, second = devices_of(workers)
    assert [worker.name for worker in second] == ["policy", "rollout"] and len(first) == 4 and gpus_of(workers) == 2
    assert used(first) == 33 + 5 + 4 + 4  # policy and value train; CUDA of all four; the graphs of the engine that rests
    assert used(second) == 33 + 2 + 4
    assert [worker.aside for worker in workers] == [30, 5, 30, 12]  # no cache: it is forgotten


def test_a_shared_node_that_is_too_small_is_told_what_to_change(capsys):
    recipe = str(RECIPES / "ppo_node_shared.toml")
    assert plan(recipe, [], 80, 8, 1.5, [SMALL]) == 0  # a search for what would fit meters each change: with 8B it takes long
    told = capsys.readouterr().out
    assert "They take turns: policy + value; rollout; reward.helpful + reward.harmless + reference." in told
    assert plan(recipe, [], 48, 8, 1.5, [SMALL]) == 1
    changes = advice(capsys.readouterr().out)
    assert changes and plan(recipe, changes[0], 48, 8, 1.5, [SMALL]) == 0


def test_where_weights_stay_on_the_device_both_models_are_there_at_once(capsys):
    assert plan(str(RECIPES / "ppo_node_shared.toml"), ["sync=ipc"], 80, 8, 1.5, []) == 0
    told = capsys.readouterr().out
    # A rank's eighth of 8.03 billion parameters in bfloat16, as much of gradients, six times that of optimiser; then all of them for the
    # engine, and four times the embedding (128,256 x 4,096).
    row = re.search(r"^ +publish +([\d.]+) +([\d.]+) +([\d.]+) +- +- +([\d.]+) +1.5", told, re.MULTILINE)
    weights, gradients, optimiser, buffers = map(float, row.groups())
    assert (weights, gradients, optimiser) == pytest.approx((1.9, 1.9, 11.2), abs=0.06)
    assert buffers == pytest.approx((2 * 8.03e9 + 4 * 2 * 128_256 * 4_096) / 2**30, abs=0.06) and "A publish takes" not in told


def test_an_engine_on_several_devices_has_a_part_of_the_model_on_each(capsys):
    recipe, several = str(RECIPES / "ppo_node.toml"), ["rollout.engine.tensor_parallel=2", "rollout.resources.gpus=2", "rollout.workers=1"]
    assert plan(recipe, several, 80, 0, 1.5, []) == 0
    output = capsys.readouterr().out
    assert "1 x rollout (1/2)" in output and "(1/2) is what each of the 2 devices of a rollout worker has." in output
    assert re.search(r"rollout \(1/2\) +generate +2 +7.5 +- +- +[\d.]+ +20.0 ", output)  # half of 15.0 of weights, and of 40 of cache
    assert "2 GPUs with rollout: " in output
    alone = ["rollout.engine.kv_cache_gib=1", "policy.ranks=8", "value.ranks=8"]
    assert plan(recipe, alone, 14, 0, 1.5, [WIDE]) == 1  # 10.5 of weights do not fit beside 8.7 of others
    more = "rollout needs 19.2 of 14.0 GiB: --set rollout.engine.tensor_parallel=2 --set rollout.resources.gpus=2 (13.4 GiB)"
    assert more in capsys.readouterr().out
    with pytest.raises(RecipeError, match=r"num_attention_heads = 32, intermediate_size = 14336, .*_heads = 8, which it does not divide"):
        plan(recipe, ["rollout.engine.tensor_parallel=3", "rollout.resources.gpus=3"], 80, 0, 1.5, [])


def test_parts_of_a_gpu_are_filled_up_in_order():
    def worker(name, gpus, count=1):
        return Worker(name, count, 0, gpus, {"score": {"weights": 1}})

    workers = [worker("a", 0.5), worker("b", 1), worker("c", 0.25, 3), worker("d", 0), worker("e", 2)]
    names = [[member.name for member in sharing] for sharing in devices_of(workers)]
    assert names == [["a", "c", "c"], ["b"], ["c"], ["e"]]
    assert gpus_of(workers) == 5
    split = Worker("f", 2, 0, 4, {"generate": {"weights": 1}}, parts=4)
    assert [member.name for sharing in devices_of([split]) for member in sharing] == ["f"] * 8 and gpus_of([split]) == 8
