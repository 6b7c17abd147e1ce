"""The DPO loss of ctrlrl beside TRL's, on random logprobs: values and gradients must be equal to 1e-5.

    pip install --target /some/folder trl datasets        # TRL is not a dependency
    PYTHONPATH=/some/folder .venv/bin/python tests/benchmarks/trl_dpo.py

TRL's `DPOTrainer._compute_loss` is called as it is, with a model that returns given logprobs.
"""

from collections import defaultdict
from types import SimpleNamespace

import torch
import trl
from trl.trainer.dpo_trainer import DPOTrainer

from ctrlrl.data.batches import MicroBatch, TokenOutputs
from ctrlrl.objectives.preference import dpo


def trl_loss(logprobs, mask, reference, beta):
    """TRL's loss of [2P, T] logprobs, chosen rows first."""
    one = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    outputs = SimpleNamespace(log_probs=logprobs * mask, **{name: torch.zeros_like(logprobs) for name in ("entropy", "mean_logits")})
    outputs.is_top1 = torch.zeros_like(mask)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=one, aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True, beta=beta,
        f_divergence_type="reverse_kl", loss_types=["sigmoid"], loss_weights=[1.0], label_smoothing=0.0, use_weighting=False,
        _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    completion = torch.nn.functional.pad(mask, (1, 0))  # TRL's mask has the first token, which is never scored
    inputs = {"input_ids": completion.long(), "attention_mask": completion.long(), "completion_mask": completion.long()}
    inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = reference.chunk(2)
    return DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)


def main():
    worst = worst_gradient = 0.0
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        pairs, width = 1 + seed % 9, 1 + seed % 40
        beta = (0.01, 0.1, 1.0)[seed % 3]
        mask = torch.rand(2 * pairs, width, generator=generator) < 0.7
        mask[:, 0] = True
        logprobs = -5 * torch.rand(2 * pairs, width, generator=generator)
        reference = -3 * width * torch.rand(2 * pairs, generator=generator)
        theirs, ours = logprobs.clone().requires_grad_(), logprobs.clone().requires_grad_()
        expected = trl_loss(theirs, mask, reference, beta)
        expected.backward()
        order = torch.arange(2 * pairs).view(2, pairs).T.flatten()  # ours are interleaved
        batch = MicroBatch(mask[order], {"ref_logprob": reference[order]}, int(mask.sum()), 2 * pairs)
        found, _ = dpo(TokenOutputs(ours[order], torch.zeros(2 * pairs, width)), batch, beta=beta)
        found.backward()
        worst = max(worst, abs(found.item() - expected.item()) / max(1.0, expected.item()))
        worst_gradient = max(worst_gradient, (ours.grad - theirs.grad).abs().max().item())
    print(f"TRL {trl.__version__}, 100 random batches: largest difference of the loss {worst:.1e}, of a gradient {worst_gradient:.1e}")
    assert worst < 1e-5 and worst_gradient < 1e-5


if __name__ == "__main__":
    main()
