"""What `ctrlrl plan` says of a trainer, against the most that its process allocates on the device in an update."""

import numpy as np
import pytest
import torch

from ctrlrl.data.batches import TokenBatch
from ctrlrl.models.footprint import peak, trained
from ctrlrl.models.loading import load_config
from ctrlrl.models.trainer import TrainerConfig
from tests.models.test_trainer import LOSS, start_policy

pytestmark = pytest.mark.cuda
TOKENS = 4096  # of a micro-batch, all of which the batch fills


def full_batch() -> TokenBatch:
    """Two micro-batches of 16 answers."""
    rng, size = np.random.default_rng(0), TOKENS // 16
    return TokenBatch([rng.integers(3, 384, size=size) for _ in range(32)], np.full(32, 8), {}, {})


@pytest.mark.parametrize(
    "train",
    [{"zero_stage": 0, "dtype": "float32"}, *({"zero_stage": stage} for stage in (1, 2, 3)), {"zero_stage": 1, "lora": {"rank": 8}}],
    ids=["z0-fp32", "z1", "z2", "z3", "lora"],
)
def test_a_trainer_takes_what_the_plan_says(device, ray_cluster, part, wide, patient, train):
    train = {"dtype": "bfloat16", "micro_batch_tokens": TOKENS, "gradient_checkpointing": True, "layout": "packed", **train}
    planned = peak(trained(load_config(wide), "policy", TrainerConfig(**train), 1))
    if device.type == "cpu":
        pytest.skip("resident sizes are measured by tests/benchmarks/plan.py")
    policy, place = start_policy(wide, patient, resources=part(1), **train)
    try:
        policy.train(full_batch(), LOSS, [np.arange(32)])
        policy._group.call(lambda trainer: torch.cuda.reset_peak_memory_stats())
        policy.train(full_batch(), LOSS, [np.arange(32)] * 2)
        measured = policy._group.call(lambda trainer: torch.cuda.max_memory_allocated())[0]
    finally:
        policy.close()
        place.release()
    assert measured == pytest.approx(planned, rel=0.15)
