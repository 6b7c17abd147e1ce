"""Whether the rollout engine computes a model as transformers does: asked when an engine starts, if its architecture was not compared."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from ctrlrl.errors import ModelError
from ctrlrl.models.architectures import compared
from ctrlrl.models.loading import load_policy
from ctrlrl.models.probe import TOLERANCE, allowed_difference, mean_difference, probe_of
from ctrlrl.models.sampler import ENGINE_ERRORS, EngineConfig, reason_of


class Proof:
    """transformers' logprobs of a few sentences. To be made before the engine starts: vLLM changes classes of transformers', and so the
    model is never there twice."""

    def __init__(self, model: str, engine: EngineConfig):
        self._model, self._tolerance = model, TOLERANCE[engine.dtype]
        self.probe = _probe_within(model, engine)
        self._expected = self._by_transformers(engine.dtype)

    @torch.no_grad()
    def _by_transformers(self, dtype: str) -> list[np.ndarray]:
        """On the CPU, one sequence at a time, without padding, which not every model ignores."""
        truth, found = load_policy(self._model, dtype, "eager").eval(), []
        for ids in self.probe:
            logits = truth(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].float()
            found.append(logits.log_softmax(-1)[torch.arange(len(ids) - 1), list(ids[1:])].numpy())
        return found

    def check(self, logprobs: Callable[[Sequence[Sequence[int]]], list[np.ndarray]]) -> None:
        """ModelError if an engine's `logprobs`, at temperature 1, fail or differ by more than rounding does."""
        given = _answer(self._model, logprobs, self.probe)
        error, allowed = mean_difference(given, self._expected), allowed_difference(self._expected, self._tolerance)
        if error > allowed:
            raise ModelError(
                f"the engine's logprobs of {self._model!r} differ by {error:.3g} in the mean from transformers' (rounding may by "
                f"{allowed:.3g}): it does not compute this architecture rightly: use a model of another one"
            )


class Compared:
    """In place of a Proof where the architecture was compared with transformers already: the weights alone are in question."""

    def __init__(self, model: str, engine: EngineConfig):
        self._model, self.probe = model, _probe_within(model, engine)

    def check(self, logprobs: Callable[[Sequence[Sequence[int]]], list[np.ndarray]]) -> None:
        """ModelError if an engine's `logprobs` fail or are not finite."""
        _answer(self._model, logprobs, self.probe)


def proof_of(model: str, engine: EngineConfig) -> Proof | Compared:
    """What an engine with this model has to pass at its start."""
    return Compared(model, engine) if compared(model, engine.tensor_parallel) else Proof(model, engine)


def _answer(model: str, logprobs: Callable, probe: list[Sequence[int]]) -> list[np.ndarray]:
    """What the engine says; ModelError if it cannot, or says nothing finite (it would sample from that, and tell nobody)."""
    try:
        given = logprobs(probe)
    except ENGINE_ERRORS as error:
        raise ModelError(f"the engine cannot run {model!r}: {reason_of(error)}: use a model of another architecture") from None
    if not np.isfinite(np.concatenate(given)).all():
        raise ModelError(
            f"the engine's logprobs of {model!r} are not finite: its weights are broken, or overflow in this dtype: restore them, "
            'or set the engine\'s dtype = "float32"'
        )
    return given


def _probe_within(model: str, engine: EngineConfig) -> list[Sequence[int]]:
    return [ids[: engine.max_model_tokens - 1] for ids in probe_of(model)]  # and one is drawn
