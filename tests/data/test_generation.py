"""The division of self-generation into shards, and its tables."""

import numpy as np
import pyarrow as pa
import pytest

from ctrlrl.data.calibration import Calibration
from ctrlrl.data.generation import Draw, Layout, Plan, judge_mean, prompts_fingerprint, samples_table, score_facts, scores_table
from ctrlrl.data.schemas import SCORES
from ctrlrl.data.shards import ShardStore
from ctrlrl.data.sources import Prompt
from ctrlrl.errors import RunError
from ctrlrl.seeds import derive_seed

IDS = [f"{number:016x}" for number in (7, 3, 2**63 + 5, 11, 1)]


@pytest.mark.parametrize(("samples", "shard", "per_unit"), [(3, 6, 3), (3, 7, 3), (3, 1, 5), (1, 100, 1), (4, 20, 1), (2, 8, 2)])
def test_every_sample_of_every_unit_is_in_exactly_one_shard_with_its_whole_prompt(samples, shard, per_unit):
    plan = Plan(len(IDS), samples, shard, seed=9)
    assert plan.shards_per_unit == per_unit
    blocks = [plan.draws(number, IDS) for number in range(3 * per_unit)]
    found = [(d.unit, d.prompt, d.index) for block in blocks for d in block]
    assert found == [(unit, prompt, index) for unit in range(3) for prompt in range(5) for index in range(samples)]
    assert all(len(block) <= max(shard, samples) for block in blocks)
    assert len({d.seed for block in blocks for d in block}) == len(found)
    for block in blocks:
        assert all([d.prompt for d in block].count(d.prompt) == samples for d in block)


def test_a_seed_belongs_to_the_sample_and_not_to_its_place():
    seeds = {
        (order[d.prompt], d.unit, d.index): d.seed
        for order in (IDS, IDS[::-1], IDS[2:])
        for shard in range(2)
        for d in Plan(len(order), 2, 100, seed=4).draws(shard, order)
    }
    for order, shard in ((IDS, 2), (IDS[::-1], 6)):
        plan = Plan(len(order), 2, shard, seed=4)
        for number in range(2 * plan.shards_per_unit):
            for d in plan.draws(number, order):
                assert seeds[order[d.prompt], d.unit, d.index] == d.seed
    assert seeds[IDS[2], 1, 0] == derive_seed(4, "generate", 2**63 + 5, 1, 0)
    assert Plan(5, 2, 100, seed=5).draws(0, IDS)[0].seed != seeds[IDS[0], 0, 0]


def test_tables_by_hand():
    draws = [Draw(1, 0, 0, 50), Draw(1, 0, 1, 51)]
    tokens = [np.array([4, 2], np.int32), np.array([], np.int32)]
    samples = samples_table(draws, IDS, ["yes", ""], tokens, np.array([True, False]), "abc")
    assert samples.to_pylist() == [
        {"prompt_id": IDS[1], "unit": 0, "index": 0, "seed": 50, "response": "yes", "token_ids": [4, 2], "finish_reason": "stop",
         "token_count": 2, "policy": "abc"},
        {"prompt_id": IDS[1], "unit": 0, "index": 1, "seed": 51, "response": "", "token_ids": [], "finish_reason": "length",
         "token_count": 0, "policy": "abc"},
    ]  # fmt: skip
    scores = scores_table(samples, np.array([0.0, np.log(3)], np.float32), Calibration("sigmoid"))
    assert scores["score"].to_pylist() == pytest.approx([0.5, 0.75]) and scores["raw"].to_pylist() == pytest.approx([0, np.log(3)])
    assert scores.schema.equals(SCORES) and score_facts(scores) == {"mean": pytest.approx(0.625)}
    some = scores_table(samples, np.array([0, np.nan]), Calibration("sigmoid"))
    assert some["score"].to_pylist() == [0.5, None] and some["raw"].to_pylist() == [0, None]
    assert score_facts(some) == {"mean": 0.5, "unscored": 1}
    assert score_facts(scores_table(samples, np.array([np.nan] * 2), Calibration("identity"))) == {"mean": None, "unscored": 2}


def test_a_mean_is_of_the_answers_that_have_scores(tmp_path):
    store, none = ShardStore(tmp_path / "scores"), {"mean": None, "unscored": 2}
    with store.open_or_create({"test": 1}, shards=4):
        for number, (rows, facts) in enumerate([(2, {"mean": 0.5}), (4, {"mean": 0.25, "unscored": 1}), (2, none), (2, none)]):
            store.commit(number, pa.table({"x": [0] * rows}), facts)
    assert judge_mean(store, 8, 3) == (2 * 0.5 + 3 * 0.25) / 5 and judge_mean(store, 2, 1) == 0.5
    with ShardStore(tmp_path / "others") as other:
        other.open_or_create({"test": 1}, shards=1)
        other.commit(0, pa.table({"x": [0, 0]}), none)
        assert judge_mean(other, 2, 1) is None


def test_the_prompts_fingerprint_knows_order_and_content():
    def prompts(*ids):
        return [Prompt(i, ({"role": "user", "content": i},), f"somewhere:{i}") for i in ids]

    first = prompts_fingerprint(prompts(*IDS))
    assert first == prompts_fingerprint(prompts(*IDS)) and first["count"] == 5
    assert len({first["sha256"], *(prompts_fingerprint(prompts(*ids))["sha256"] for ids in (IDS[::-1], IDS[1:]))}) == 3


def test_a_layout_knows_its_sets_of_scores(tmp_path):
    layout = Layout(tmp_path)
    assert layout.score_sets() == {}
    for name, attribute in (("b", "harmless"), ("a", "harmless"), ("a", "helpful")):
        layout.scores(name, attribute).open_or_create({}, shards=1).close()
    assert layout.score_sets() == {"a": ["helpful", "harmless"], "b": ["harmless"]}
    with pytest.raises(RunError, match="no directory of ctrlrl generate"):
        layout.existing()
