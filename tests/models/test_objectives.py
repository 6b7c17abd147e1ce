"""Objectives through a whole model: loss and gradient do not depend on layout, micro-batch size or a ragged last micro-batch."""

from functools import partial

import numpy as np
import pytest
import torch

from ctrlrl.data.batches import TokenBatch
from ctrlrl.models.forward import PolicyModule, RewardModule, lay_out, micro_batch
from ctrlrl.models.layout import settle
from ctrlrl.models.loading import load_classifier, load_policy
from ctrlrl.objectives.exmate import exmate, exmate_columns
from ctrlrl.objectives.likelihood import likelihood, sequence_likelihood
from ctrlrl.objectives.preference import bradley_terry, dpo

ROWS = 10  # five pairs: neither 3 nor 8 divides it
COLUMNS = exmate_columns(np.tile([1, 0], ROWS // 2)) | {"ref_logprob": np.linspace(-40, -20, ROWS)}


def batch_of(group):
    rng = np.random.default_rng(3)
    lengths, prompts = rng.integers(6, 30, size=ROWS), rng.integers(1, 5, size=ROWS)
    return TokenBatch([rng.integers(3, 384, size=n) for n in lengths], prompts, {}, COLUMNS, group)


def loss_and_gradient(module, loss, batch, layout, size):
    """`size` rows (whole pairs: the even number above) a micro-batch, in order."""
    total, size = 0.0, -(-size // batch.group) * batch.group
    for start in range(0, len(batch), size):
        part = batch.select(np.arange(start, min(start + size, len(batch))))
        inputs = lay_out(part, layout, torch.device("cpu"))
        share, _ = loss(module.outputs_type(*module(inputs)), micro_batch(part, inputs, int(batch.scored_lengths.sum()), len(batch)))
        share.backward()
        total += share.item()
    return total, {name: p.grad for name, p in module.model.named_parameters()}


LOSSES = {"clm": (likelihood, 1), "sequence": (sequence_likelihood, 1), "exmate": (partial(exmate, weight=0.7), 1), "dpo": (dpo, 2)}


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_do_not_depend_on_layout_and_cut(models, name):
    loss, group = LOSSES[name]
    batch = batch_of(group)

    def result(layout, size):
        module = PolicyModule(load_policy(models["policy"], "float32"), 1.0)
        settle(module, "policy", layout, torch.device("cpu"))
        return loss_and_gradient(module, loss, batch, layout, size)

    wanted, gradient = result("padded", ROWS)
    assert max(g.abs().max() for g in gradient.values()) > 1e-3
    for layout in ("packed", "padded"):
        for size in (1, 3, 8):
            found, grads = result(layout, size)
            assert found == pytest.approx(wanted, abs=1e-5)
            assert max((grads[n] - gradient[n]).abs().max() for n in gradient) < 1e-5


def test_bradley_terry_does_not_depend_on_padding_and_cut(models):
    batch, results = batch_of(2), []
    for size in (ROWS, 1, 3, 8):
        module = RewardModule(load_classifier(models["helpful"], "float32"), token_types=False)
        results.append(loss_and_gradient(module, bradley_terry, batch, "padded", size))
    wanted, gradient = results[0]
    for found, grads in results[1:]:
        assert found == pytest.approx(wanted, abs=1e-5)
        assert max((grads[n] - gradient[n]).abs().max() for n in gradient) < 1e-5
