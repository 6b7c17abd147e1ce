"""Whether the rollout engine computes a model as transformers does: asked when an engine starts, if its architecture was not compared."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from ctrlrl.errors import ModelError
from ctrlrl.models.architectures import compared
from ctrlrl.models.loading import load_policy
from ctrlrl.models.probe import TOLERANCE, Probe, allowed_difference, mean_difference, probe_of
from ctrlrl.models.sampler import ENGINE_ERRORS, reason_of

Logprobs = Callable[[Sequence[Sequence[int]]], list[np.ndarray]]


def check_computes(model: str, dtype: str, logprobs: Logprobs) -> None:
    """prove, but for models of an architecture that was compared with transformers already: usual ones pay nothing."""
    if not compared(model):
        prove(model, dtype, logprobs)


def prove(model: str, dtype: str, logprobs: Logprobs) -> None:
    """ModelError if an engine's `logprobs`, at temperature 1, of a few sentences are further from transformers' than rounding in `dtype`.

    transformers' model is loaded beside the engine, on the CPU, and freed again.
    """
    probe = probe_of(model)
    expected = _by_transformers(model, dtype, probe)
    try:
        given = logprobs(probe)
    except ENGINE_ERRORS as error:
        raise ModelError(f"the rollout engine cannot run {model!r}: {reason_of(error)}: use a model of another architecture") from None
    error, allowed = mean_difference(given, expected), allowed_difference(expected, TOLERANCE[dtype])
    if error > allowed:
        raise ModelError(
            f"the rollout engine's logprobs of {model!r} differ by {error:.3g} in the mean from transformers' (rounding may by "
            f"{allowed:.3g}): it does not compute this architecture rightly: use a model of another one"
        )


@torch.no_grad()
def _by_transformers(model: str, dtype: str, probe: Probe) -> list[np.ndarray]:
    """One sequence at a time, without padding, which not every model ignores."""
    truth, found = load_policy(model, dtype, "eager").eval(), []
    for ids in probe:
        logits = truth(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].float()
        found.append(logits.log_softmax(-1)[torch.arange(len(ids) - 1), list(ids[1:])].numpy())
    return found
