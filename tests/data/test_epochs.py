"""Batches of an epoch as a function of the step, and the split into training and held-out prompts."""

import numpy as np
import pytest
from pydantic import ValidationError

from ctrlrl.data.batches import TokenBatch
from ctrlrl.data.epochs import BatchConfig, Epochs, Subset, cut_epoch, hold_out
from ctrlrl.errors import DataError, RecipeError

LENGTHS = np.array([5, 9, 2, 30, 7, 4, 4, 11, 3, 6, 8])


@pytest.mark.parametrize("batch", [BatchConfig(sequences=4), BatchConfig(tokens=20)])
def test_every_row_is_used_exactly_once_an_epoch_in_a_new_order(batch):
    plan = Epochs(LENGTHS, batch, epochs=3, seed=7)
    steps = [plan.at(step) for step in range(plan.total)]
    for epoch in range(3):
        rows = np.concatenate([rows for e, rows in steps if e == epoch])
        assert sorted(rows) == list(range(11))
    orders = [np.concatenate([rows for e, rows in steps if e == epoch]).tolist() for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 3
    again = Epochs(LENGTHS, batch, epochs=3, seed=7)  # a resumed run asks for later steps first
    for step in (plan.total - 1, 0, 2):
        assert again.at(step)[0] == steps[step][0] and np.array_equal(again.at(step)[1], steps[step][1])
    assert any(not np.array_equal(a, b[1]) for a, b in zip(cut_epoch(LENGTHS, batch, 8, 0), steps, strict=False))


def test_a_batch_of_sequences_keeps_the_ragged_tail():
    assert [len(rows) for rows in cut_epoch(LENGTHS, BatchConfig(sequences=4), 0, 0)] == [4, 4, 3]


def test_a_batch_of_tokens_is_as_full_as_the_order_allows_and_a_longer_row_stands_alone():
    cut = cut_epoch(LENGTHS, BatchConfig(tokens=20), 0, 0)
    for rows, following in zip(cut, [*cut[1:], None], strict=True):
        assert LENGTHS[rows].sum() <= 20 or rows.tolist() == [3]
        assert following is None or LENGTHS[rows].sum() + LENGTHS[following[0]] > 20
    assert [3] in [rows.tolist() for rows in cut]


def test_a_batch_is_counted_in_one_unit():
    for wrong in ({}, {"sequences": 3, "tokens": 4}):
        with pytest.raises(ValidationError, match="exactly one of the two"):
            BatchConfig(**wrong)


def test_fewer_steps_end_early_and_more_are_refused():
    batch = BatchConfig(sequences=4)
    assert Epochs(LENGTHS, batch, epochs=2, seed=0).total == 6
    assert Epochs(LENGTHS, batch, epochs=2, seed=0, steps=4).total == 4
    with pytest.raises(RecipeError, match="steps = 7.*6 steps of epochs = 2"):
        Epochs(LENGTHS, batch, epochs=2, seed=0, steps=7)


def test_a_subset_numbers_its_rows_anew():
    class Numbers:
        lengths = LENGTHS

        def batch(self, rows, epoch):
            return TokenBatch([np.array([row, epoch]) for row in rows], np.ones(len(rows), int), {}, {})

    subset = Subset(Numbers(), np.array([8, 3, 5]))
    assert subset.lengths.tolist() == [3, 30, 4]
    assert [tokens.tolist() for tokens in subset.batch(np.array([2, 0]), 6).tokens] == [[5, 6], [8, 6]]


def test_a_prompts_side_depends_on_itself_alone():
    keys = [f"{i % 200}" for i in range(600)]  # three rows a prompt
    kept, held = hold_out(keys, 0.2, 10_000, 3, "x")
    assert sorted([*kept, *held]) == list(range(600))
    sides = {keys[i] for i in kept}, {keys[i] for i in held}
    assert not sides[0] & sides[1] and 25 <= len(sides[1]) <= 55
    grown_kept, grown_held = hold_out([*keys, "new"], 0.2, 10_000, 3, "x")
    assert set(kept) <= set(grown_kept) and set(held) <= set(grown_held)
    assert not np.array_equal(hold_out(keys, 0.2, 10_000, 4, "x")[1], held)
    few_kept, few = hold_out(keys, 0.2, 9, 3, "x")
    assert len(few) == 9 and set(few) <= set(held) and np.array_equal(few_kept, kept)
    assert [len(side) for side in hold_out(keys, 0.0, 9, 3, "x")] == [600, 0]


def test_a_side_may_not_be_empty():
    with pytest.raises(DataError, match="'t' has 1 prompts.*change validation.share"):
        hold_out(["a", "a"], 0.5, 10, 0, "'t'")
