"""Training on a GPU against the plain PyTorch loop on the processors, by the same steps as tests/models/test_trainer.py."""

import numpy as np
import pytest

from tests.models.test_trainer import HALF, LOSS, STEPS, plain_loop, ppo_batch, start_policy, weights_of

pytestmark = pytest.mark.cuda


@pytest.fixture(scope="module")
def by_hand(models):
    """Losses, gradient norms and final weights of the plain loop, and how far its steps moved a weight in the mean."""
    from ctrlrl.models.loading import load_policy

    losses, norms, weights = plain_loop(models["policy"], ppo_batch())
    began = dict(load_policy(models["policy"], "float32").named_parameters())
    moved = np.mean([(weights[name] - began[name].detach()).abs().mean().item() for name in weights])
    return losses, norms, weights, moved


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_training_in_float32_equals_that_on_the_processors(gpus, ray_cluster, part, models, patient, by_hand, stage):
    losses, norms, weights, moved = by_hand
    ranks, layout = min(2, gpus), "padded" if stage == 1 else "auto"
    policy, place = start_policy(
        models["policy"], patient, ranks, resources=part(1), zero_stage=stage, layout=layout, micro_batch_tokens=70
    )
    try:
        stats = policy.train(ppo_batch(), LOSS, STEPS)
        trained = weights_of(policy, ray_cluster)
    finally:
        policy.close()
        place.release()
    assert [s["loss"] for s in stats] == pytest.approx(losses, abs=1e-4)
    assert [s["grad_norm_max"] for s in stats] == pytest.approx(norms, rel=5e-3)
    assert trained.keys() == weights.keys()
    # Adam makes a whole step of a gradient that is rounding alone, so single weights may differ by one: the mean may not.
    assert np.mean([(trained[name] - weights[name]).abs().mean().item() for name in weights]) < 1e-2 * moved


@pytest.mark.parametrize("layout", ["auto", "packed", "padded"])
def test_bf16_follows_float32_in_every_layout(device, ray_cluster, part, models, patient, by_hand, layout, tmp_path):
    losses, norms, _, _ = by_hand
    policy, place = start_policy(
        models["policy"], patient, resources=part(1), zero_stage=1, dtype="bfloat16", layout=layout, gradient_checkpointing=True
    )
    try:
        assert policy._group.call(lambda trainer: trainer.device.type) == [device.type]
        assert policy._group.call(lambda trainer: trainer.layout) == ["shared" if layout == "auto" else layout]
        stats = policy.train(ppo_batch(), LOSS, STEPS[:HALF])
        policy.save(tmp_path)
        stats += policy.train(ppo_batch(), LOSS, STEPS[HALF:])
        policy.load(tmp_path)
        again = policy.train(ppo_batch(), LOSS, STEPS[HALF:])
    finally:
        policy.close()
        place.release()
    assert [s["loss"] for s in stats] == pytest.approx(losses, abs=3e-2)
    assert [s["grad_norm_max"] for s in stats] == pytest.approx(norms, rel=0.1)
    assert [s["loss"] for s in again] == pytest.approx([s["loss"] for s in stats[HALF:]], abs=3e-3)  # sums on GPUs have no fixed order
