"""Preference pairs: the split by prompt, the batches, and the figures beside the accuracy."""

import numpy as np
import pytest

from ctrlrl.data.preferences import PairExamples, longer_wins, share_interval, split_pairs
from ctrlrl.data.sources import PreferencePair


def pair(question, chosen="yes", rejected="no", system="", turns=()):
    start = [{"role": "system", "content": system}] if system else []
    return PreferencePair((*start, {"role": "user", "content": question}, *turns), chosen, rejected, "x:1")


def test_one_question_stands_on_one_side_whatever_its_system_prompt_and_later_turns():
    more = ({"role": "assistant", "content": "a"}, {"role": "user", "content": "and then?"})
    pairs = []
    for n in range(100):
        pairs += [pair(f"q{n}"), pair(f"q{n}", system="s0"), pair(f"q{n}", system="s1"), pair(f"q{n}", turns=more)]
    kept, held = split_pairs(pairs, 0.3, 1000, 0, "x")
    assert sorted([*kept, *held]) == list(range(400))
    assert not {i // 4 for i in kept} & {i // 4 for i in held} and 60 <= len(held) <= 180


def test_a_batch_holds_whole_pairs():
    examples = PairExamples([np.full(n, n) for n in (3, 4, 5, 6, 7, 9)], np.array([1, 1, 2, 2, 3, 3]), {"ref_logprob": np.arange(6.0)})
    assert examples.lengths.tolist() == [7, 11, 16]
    batch = examples.batch(np.array([2, 0]), 5)
    assert [len(tokens) for tokens in batch.tokens] == [7, 9, 3, 4] and batch.group == 2
    assert batch.prompt_lengths.tolist() == [3, 3, 1, 1] and batch.per_sequence["ref_logprob"].tolist() == [4, 5, 0, 1]


def test_longer_wins_counts_a_tie_as_half():
    assert longer_wins([pair("q", "long", "no"), pair("q", "a", "bb"), pair("q", "abc", "xyz")]) == 0.5
    assert longer_wins([pair("q", "long", "no"), pair("q", "abc", "xyz")]) == 0.75


def test_the_interval_of_wilson():
    # Newcombe (Statistics in Medicine 17, 1998), table I: 81 of 263 gives 0.2553 to 0.3662, 0 of 20 gives 0 to 0.1611.
    assert share_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert share_interval(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)
    assert share_interval(0, 0) == (0.0, 1.0)
