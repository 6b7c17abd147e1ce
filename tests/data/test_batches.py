"""Token batches and the plan of micro-batches."""
import dataclasses
import pickle

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ctrlrl.data.batches import MicroBatch, TokenBatch, TokenOutputs, ValueOutputs, plan_batch, plan_micro_batches


def batch(group=1):
    return TokenBatch(
        tokens=[np.array([1, 2, 3]), np.array([4, 5]), np.array([6, 7, 8, 9]), np.array([1])],
        prompt_lengths=np.array([1, 1, 3, 1]),
        per_token={"advantages": [np.array([0.1, 0.2]), np.array([0.3]), np.array([0.4]), np.array([])]},
        per_sequence={"treated": np.array([1, 0, 1, 0])},
        group=group,
    )


def test_lengths():
    assert len(batch()) == 4 and batch().scored_lengths.tolist() == [2, 1, 1, 0]


def test_select_takes_every_column_in_the_given_order():
    found = batch(group=2).select(np.array([2, 0, 2]))
    assert [tokens.tolist() for tokens in found.tokens] == [[6, 7, 8, 9], [1, 2, 3], [6, 7, 8, 9]]
    assert found.prompt_lengths.tolist() == [3, 1, 3] and found.scored_lengths.tolist() == [1, 2, 1]
    assert [column.tolist() for column in found.per_token["advantages"]] == [[0.4], [0.1, 0.2], [0.4]]
    assert found.per_sequence["treated"].tolist() == [1, 1, 1] and found.group == 2


def test_select_nothing():
    found = batch().select(np.array([], dtype=np.int64))
    assert len(found) == 0 and found.scored_lengths.tolist() == [] and found.per_token == {"advantages": []}


def test_batches_are_frozen_and_ungrouped_unless_told():
    assert TokenBatch([], np.array([], dtype=np.int64), {}, {}).group == 1
    for kind in (TokenBatch, MicroBatch, TokenOutputs, ValueOutputs):
        frozen = kind(*[None] * sum(field.default is dataclasses.MISSING for field in dataclasses.fields(kind)))
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(frozen, dataclasses.fields(kind)[0].name, 1)


def test_batches_cross_processes():
    found = pickle.loads(pickle.dumps(batch()))
    assert found.tokens[2].tolist() == [6, 7, 8, 9] and found.scored_lengths.tolist() == [2, 1, 1, 0]


def plan(*arguments, **options):
    return [rows.tolist() for rows in plan_micro_batches(*arguments, **options)]


def test_a_plan_by_hand():
    lengths = np.array([3, 9, 4, 2, 5, 9])
    # Longest first: 9, 9, 5, 4, 3, 2.
    assert plan(lengths, 10) == [[1], [5], [4, 2], [0, 3]]
    assert plan(lengths, 18) == [[1, 5], [4, 2, 0, 3]]
    assert plan(lengths, 1) == [[1], [5], [4], [2], [0], [3]]
    assert plan(lengths, 10, padded=True) == [[1], [5], [4, 2], [0, 3]]
    # Padded, 9 + 5 cost 18 and 5 + 4 + 3 cost 15.
    assert plan(lengths, 14) == [[1], [5, 4], [2, 0, 3]]
    assert plan(lengths, 14, padded=True) == [[1], [5], [4, 2], [0, 3]]
    assert plan(lengths, 15, padded=True) == [[1], [5], [4, 2, 0], [3]]
    # Pairs (3, 9), (4, 2), (5, 9) cost 12, 6, 14; padded 18, 8, 18.
    assert plan(lengths, 20, group=2) == [[4, 5], [0, 1, 2, 3]]
    assert plan(lengths, 36, group=2, padded=True) == [[0, 1, 4, 5], [2, 3]]
    assert plan(lengths, 35, group=2, padded=True) == [[0, 1], [4, 5], [2, 3]]
    assert plan(np.array([], dtype=np.int64), 10) == []


def cost(lengths, rows, padded):
    return max(lengths[rows]) * len(rows) if padded else sum(lengths[rows])


@settings(deadline=None, derandomize=True, max_examples=300)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=24),
    token_budget=st.integers(1, 120),
    group=st.sampled_from([1, 2, 3]),
    padded=st.booleans(),
)
@example(lengths=[5] * 6, token_budget=30, group=1, padded=True)
def test_any_plan(lengths, token_budget, group, padded):
    lengths = np.array(lengths * group)
    found = plan_micro_batches(lengths, token_budget, group, padded)
    # Every row once; groups whole, and in their order.
    assert sorted(i for rows in found for i in rows) == list(range(len(lengths)))
    for rows in found:
        assert all(members.tolist() == list(range(members[0], members[0] + group)) for members in rows.reshape(-1, group))
        assert (rows.reshape(-1, group)[:, 0] % group == 0).all()
    # Within the budget, unless a group alone exceeds it.
    assert all(cost(lengths, rows, padded) <= token_budget or len(rows) == group for rows in found)
    # Not cut more often than needed: the next group would not have fitted.
    for rows, following in zip(found, found[1:], strict=False):
        assert cost(lengths, np.concatenate([rows, following[:group]]), padded) > token_budget
    # Similar lengths together: costs of groups never rise.
    size = [(max if padded else sum)(lengths[members]) for rows in found for members in rows.reshape(-1, group)]
    assert size == sorted(size, reverse=True)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=16), st.integers(1, 40), st.booleans(), st.randoms(use_true_random=False))
def test_the_lengths_of_a_cut_do_not_depend_on_the_order(lengths, token_budget, padded, random):
    shuffled = random.sample(lengths, len(lengths))
    cuts = [[[order[i] for i in rows] for rows in plan(np.array(order), token_budget, padded=padded)] for order in (lengths, shuffled)]
    assert cuts[0] == cuts[1]


def rows_of(prompts, lengths):
    """A batch whose rows have the prompt of this number, of 20 tokens, and so many tokens after it."""
    tokens = [np.concatenate([np.full(20, prompt), np.arange(n)]) for prompt, n in zip(prompts, lengths, strict=True)]
    return TokenBatch(tokens, np.full(len(tokens), 20), {}, {})


def test_rows_of_one_prompt_stay_together_and_pay_for_it_once():
    batch = rows_of([7, 8, 7, 9, 7], [5, 9, 6, 1, 7])
    # Prompt 7: 20 + 5 + 6 + 7 = 38; 8: 29; 9: 21.
    assert [rows.tolist() for rows in plan_batch(batch, 50, "shared")] == [[0, 2, 4], [1, 3]]
    assert [rows.tolist() for rows in plan_batch(batch, 100, "shared")] == [[0, 2, 4, 1, 3]]
    # Within 31 tokens: 20 + 5 + 6 of prompt 7, then its last row alone with the prompt again.
    assert [rows.tolist() for rows in plan_batch(batch, 31, "shared")] == [[0, 2], [1], [4], [3]]
    assert [rows.tolist() for rows in plan_batch(batch, 50, "packed")] == [[1], [4], [2], [0, 3]]


def test_pairs_of_one_prompt_stay_pairs():
    batch = dataclasses.replace(rows_of([7, 7, 8, 8, 7, 7], [5, 9, 6, 1, 7, 2]), group=2)
    # 20 + 14 + 9 = 43 of prompt 7, 27 of prompt 8; apart they are 54, 47, 49.
    assert [rows.tolist() for rows in plan_batch(batch, 43, "shared")] == [[0, 1, 4, 5], [2, 3]]
    assert [rows.tolist() for rows in plan_batch(batch, 40, "shared")] == [[0, 1], [4, 5], [2, 3]]


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_without_a_common_prompt_the_plan_is_the_plain_one(layout):
    lengths = np.array([3, 9, 4, 2, 5, 9])
    batch = rows_of(range(6), lengths)
    plain = plan_micro_batches(lengths + 20, 60, padded=layout == "padded")
    assert [rows.tolist() for rows in plan_batch(batch, 60, layout)] == [rows.tolist() for rows in plain]


def test_no_rank_waits_for_another_that_has_more_to_do():
    batch = rows_of(range(6), [20, 0, 10, 0, 10, 20])  # 40, 20, 30, 20, 30, 40 tokens
    assert [len(plan_batch(batch, 1000, "packed", ranks)) for ranks in (1, 2, 3, 6, 7)] == [1, 2, 3, 6, 6]
    assert [rows.tolist() for rows in plan_batch(batch, 1000, "packed", 2)] == [[0, 5], [2, 4, 1, 3]]  # 80 and 100, not 180 and 0
    # Three micro-batches by the budget are four for two ranks; the largest is no larger than four can have it.
    assert [rows.tolist() for rows in plan_batch(batch, 80, "packed", 1)] == [[0, 5], [2, 4, 1], [3]]
    assert [rows.tolist() for rows in plan_batch(batch, 80, "packed", 2)] == [[0], [5], [2, 4], [1, 3]]
    # Pairs stay pairs.
    assert [rows.tolist() for rows in plan_batch(dataclasses.replace(batch, group=2), 1000, "packed", 2)] == [[4, 5], [0, 1, 2, 3]]


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(25, 200), st.integers(2, 4), st.sampled_from(["packed", "padded"]))
def test_any_plan_for_ranks(lengths, token_budget, ranks, layout):
    batch, padded = rows_of(range(len(lengths)), lengths), layout == "padded"
    found, plain = plan_batch(batch, token_budget, layout, ranks), plan_batch(batch, token_budget, layout)
    assert sorted(i for rows in found for i in rows) == list(range(len(lengths)))
    assert len(plain) <= len(found) <= -(-len(plain) // ranks) * ranks  # no forward more than the busiest rank has anyway
    costs = [[cost(np.array(lengths) + 20, rows, padded) for rows in plan] for plan in (found, plain)]
    assert max(costs[0]) <= max(costs[1])


def test_rows_that_are_not_whole_groups_are_a_bug():
    with pytest.raises(ValueError, match="reshape"):
        plan_micro_batches(np.array([1, 2, 3]), 10, group=2)
