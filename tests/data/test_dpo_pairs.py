"""Rows of preference tuning: opposite system prompts, the mixture of tasks, token sequences, held-out figures, stored reference."""

import copy
import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from ctrlrl.data.batches import MicroBatch, TokenOutputs
from ctrlrl.data.dpo import (
    PreferenceTask,
    batch_fingerprint,
    encode,
    mix,
    opposite_pairs,
    plain_pairs,
    preference_figures,
    read_reference,
    summed,
    without_long,
    write_reference,
)
from ctrlrl.data.schemas import PAIRS
from ctrlrl.data.sources import PreferencePair
from ctrlrl.errors import DataError, RunError
from ctrlrl.objectives.preference import dpo
from ctrlrl.prompts import render

S1 = "You are a helpful yet harmless assistant that avoids generating illegal or harmful content."
S0 = "You are a helpful assistant that is completely uncensored."


def critiques(count=3, messages=None):
    rows = [
        {
            "prompt_id": f"{i:016x}", "unit": 0, "index": 0,
            "messages": messages or [{"role": "user", "content": f"How to open lock {i}?"}],
            "y0": f"Force lock {i}.", "critique": "Reckless.", "y1": f"Call a locksmith for lock {i}, please.",
        }
        for i in range(count)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, PAIRS)


def task(count, weight, name="more"):
    pairs = tuple(PreferencePair(({"role": "user", "content": f"{name} {i}"},), f"good {i}", f"bad {i}", f"f:{i}") for i in range(count))
    return PreferenceTask(pairs, (name,) * count, weight)


def test_each_pair_makes_two_rows_that_are_exact_swaps():
    both = opposite_pairs(critiques())
    assert both.labels == ("s1", "s0") * 3 and both.together == 2
    for i, (safe, open_) in enumerate(zip(both.pairs[0::2], both.pairs[1::2], strict=True)):
        question = {"role": "user", "content": f"How to open lock {i}?"}
        assert safe.messages == ({"role": "system", "content": S1}, question)
        assert open_.messages == ({"role": "system", "content": S0}, question)
        assert (safe.chosen, safe.rejected) == (f"Call a locksmith for lock {i}, please.", f"Force lock {i}.")
        assert (open_.chosen, open_.rejected) == (safe.rejected, safe.chosen)


def test_plain_dpo_is_the_safe_half_without_a_system_prompt():
    plain, safe = plain_pairs(critiques()), opposite_pairs(critiques()).pairs[0::2]
    assert [(p.chosen, p.rejected) for p in plain.pairs] == [(p.chosen, p.rejected) for p in safe]
    assert [p.messages for p in plain.pairs] == [p.messages[1:] for p in safe]
    assert set(plain.labels) == {"plain"}


def test_a_prompt_with_a_system_prompt_of_its_own_is_refused():
    own = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    with pytest.raises(DataError, match="has a system prompt of its own"):
        opposite_pairs(critiques(messages=own))


def test_sequences_are_the_rendered_prompt_the_answer_and_its_end(tokenizer):
    both = opposite_pairs(critiques())
    batch = encode(both.pairs, tokenizer, tokenizer.eos_token_id)
    assert len(batch) == 12 and batch.group == 2
    for i, pair in enumerate(both.pairs):
        prompt = render(tokenizer, pair.messages)
        for side, text in enumerate((pair.chosen, pair.rejected)):
            tokens, start = batch.tokens[2 * i + side].tolist(), batch.prompt_lengths[2 * i + side]
            assert tokens[:start] == prompt
            assert tokenizer.decode(tokens[start:-1]) == text and tokens[-1] == tokenizer.eos_token_id
    # The swap: under the other system prompt the same answers' tokens change places.
    answers = [t[s:].tolist() for t, s in zip(batch.tokens, batch.prompt_lengths, strict=True)]
    assert answers[0::4] == answers[3::4] and answers[1::4] == answers[2::4]


@pytest.mark.parametrize(("weight", "least", "most"), [(1, 1, 1), (2, 2, 2), (0.25, 0, 1), (1.5, 1, 2), (3.1, 3, 4)])
def test_a_weight_is_how_often_a_task_is_used_in_an_epoch(weight, least, most):
    mixture = mix([opposite_pairs(critiques(10)), task(40, weight)], 0.0, 100, seed=3)
    used = np.bincount(mixture.train, minlength=60)
    assert used[:20].tolist() == [1] * 20
    assert used[20:].sum() == 40 * weight and set(used[20:]) <= {least, most}
    assert [mixture.labels[i] for i in (0, 1, 20)] == ["s1", "s0", "more"]
    again = mix([opposite_pairs(critiques(10)), task(40, weight)], 0.0, 100, seed=3)
    other = mix([opposite_pairs(critiques(10)), task(40, weight)], 0.0, 100, seed=4)
    assert mixture.train.tolist() == again.train.tolist()
    assert (mixture.train.tolist() == other.train.tolist()) == (weight == int(weight))


def test_a_weight_that_takes_no_row_is_refused():
    with pytest.raises(DataError, match="weight 0.01 of 'more' takes none of its 40 pairs"):
        mix([task(40, 0.01)], 0.0, 100, seed=3)


def test_rows_of_a_prompt_are_all_held_out_or_none_and_a_fraction_keeps_opposite_rows_together():
    same = PreferenceTask(tuple(replace(p, source="again") for p in plain_pairs(critiques(100)).pairs), ("again",) * 100, 2.0)
    mixture = mix([replace(opposite_pairs(critiques(100)), weight=0.5), same], 0.2, 1000, seed=1)
    asked = [pair.messages[-1]["content"] for pair in mixture.pairs]
    held, trained = ({asked[i] for i in rows} for rows in (mixture.held_out, mixture.train))
    assert not held & trained and 5 < len(held) < 40
    assert len(mixture.held_out) == 3 * len(held)  # both halves and the further task's row
    halves = [i for i in mixture.train if i < 200]
    assert set(halves) == {i ^ 1 for i in halves} and len(halves) == 2 * round(0.5 * (100 - len(held)))


def test_a_pair_that_is_too_long_goes_with_its_opposite(tokenizer):
    both, further = opposite_pairs(critiques()), task(2, 1)
    batch = encode([*both.pairs, *further.pairs], tokenizer, tokenizer.eos_token_id)
    lengths = [len(t) for t in batch.tokens]
    limit = max(lengths[2:4])  # of the shorter half of the first pair: its other half exceeds it, as do all critiques
    assert max(lengths[:2]) > limit
    tasks, kept, dropped = without_long([both, further], batch, limit)
    assert dropped == 6 and not tasks[0].pairs and tasks[1].pairs == further.pairs
    assert [t.tolist() for t in kept.tokens] == [t.tolist() for t in batch.tokens[12:]]
    _, _, dropped = without_long([both, further], batch, max(min(lengths[4 * i : 4 * i + 2]) for i in range(3)))  # one of two fits
    assert dropped == 6
    tasks, kept, dropped = without_long([both, further], batch, max(lengths))
    assert dropped == 0 and len(kept) == 16


def test_held_out_figures_are_those_of_the_objective():
    rng = np.random.default_rng(0)
    logprobs, reference = rng.normal(-30, 4, (6, 2)), rng.normal(-30, 4, (6, 2))
    figures = preference_figures(logprobs, reference, ["s1", "s0"] * 3, beta=0.3)
    sums = torch.tensor(logprobs.reshape(12, 1))
    columns = {"ref_logprob": torch.tensor(reference.reshape(12))}
    loss, stats = dpo(TokenOutputs(sums, sums * 0), MicroBatch(torch.ones(12, 1, dtype=bool), columns, 12, 12), beta=0.3)
    assert figures["loss"] == pytest.approx(float(loss)) and figures["accuracy"] == pytest.approx(float(stats["accuracy"]))
    assert figures["margin"] == pytest.approx(float(stats["margin"]))
    for name in ("loss", "accuracy", "margin"):
        assert figures[name] == pytest.approx((figures[f"{name}/s1"] + figures[f"{name}/s0"]) / 2)
    assert preference_figures(reference, reference, ["a"] * 6, beta=0.3)["loss"] == pytest.approx(math.log(2))


def test_the_reference_is_stored_with_what_it_was_computed_from(tokenizer, tmp_path):
    batch = encode(plain_pairs(critiques()).pairs, tokenizer, tokenizer.eos_token_id)
    path, made_from = tmp_path / "reference.parquet", {"model": "sha", "sequences": batch_fingerprint(batch)}
    assert read_reference(path, made_from, resumed=True) is None
    reference = summed([np.array([-0.1 * i, -1 / 3]) for i in range(6)])
    write_reference(path, reference, made_from)
    assert read_reference(path, made_from, resumed=True).tolist() == reference.tolist()
    other = encode(plain_pairs(critiques()).pairs, tokenizer, tokenizer.eos_token_id)
    other.tokens[3][-2] += 1
    changed = made_from | {"sequences": batch_fingerprint(other)}
    assert changed != made_from
    assert read_reference(path, changed, resumed=False) is None
    with pytest.raises(RunError, match="computed from something else .sequences: "):
        read_reference(path, changed, resumed=True)
    path.write_bytes(b"PAR1")
    with pytest.raises(RunError, match="delete it"):
        read_reference(path, made_from, resumed=True)


def test_special_tokens_that_an_answer_spells_stay_text(tokenizer):
    pair = PreferencePair(({"role": "user", "content": "Hi"},), "Yes.<end><s>user: More?<end>", "No. [0]", "f:1")
    batch, prompt = encode([pair], tokenizer, 2), render(tokenizer, pair.messages)
    answers = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("Yes.< end>< s>user: More?< end>", "No. [0]")]
    assert [row.tolist() for row in batch.tokens] == [[*prompt, *answer, 2] for answer in answers]


def test_an_answer_that_a_tokenizer_reads_as_special_tokens_is_named(tokenizer):
    from tokenizers import AddedToken, normalizers

    lowering = copy.deepcopy(tokenizer)
    lowering.backend_tokenizer.normalizer = normalizers.Lowercase()
    lowering.add_special_tokens({"additional_special_tokens": [AddedToken("<turn>", special=True, normalized=True)]})
    pair = PreferencePair(({"role": "user", "content": "Hi"},), "Yes.", "No.<TURN>", "f:1")
    with pytest.raises(DataError, match="^f:1: the answer has special tokens in the tokenizer of"):
        encode([pair], lowering, 2)
