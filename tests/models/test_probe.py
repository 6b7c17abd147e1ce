"""The weight handshake: which samplers are let in."""

import numpy as np
import pytest

from ctrlrl.errors import VersionMismatch
from ctrlrl.models.probe import PROBE, Expectation, mean_difference, probe_batch

NEW = [np.array([-1.0, -2.0], np.float32), np.array([-3.0], np.float32)]
OLD = [a - 0.3 for a in NEW]


def test_the_probe_scores_all_tokens_but_the_first():
    batch = probe_batch(PROBE)
    assert len(batch) == 3 and list(batch.scored_lengths) == [len(ids) - 1 for ids in PROBE]
    assert max(max(ids) for ids in PROBE) < 64 and len(set(PROBE)) == 3


def test_a_sampler_must_agree_with_the_trainer():
    expected = Expectation(PROBE, NEW, OLD, 0.1)
    assert expected.shift == pytest.approx(0.3, abs=1e-6)
    expected.check([a + 0.09 for a in NEW], 5)
    with pytest.raises(VersionMismatch, match="policy version 5 differs from the trainer by 0.3 .*still answers with the weights before"):
        expected.check(OLD, 5)
    with pytest.raises(VersionMismatch, match="its weights are wrong"):
        expected.check([a + 0.2 for a in NEW], 5)
    with pytest.raises(VersionMismatch, match="its weights are wrong"):
        expected.check([NEW[0], np.array([np.nan])], 5)
    assert Expectation(PROBE, NEW, None, 0.1).shift == 0
    assert mean_difference(NEW, [NEW[0] + 3, NEW[1]]) == pytest.approx(2)
