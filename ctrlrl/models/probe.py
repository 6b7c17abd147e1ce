"""The weight handshake: what the trainer says of a few fixed tokens, with which every sampler that takes new weights is compared."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ctrlrl.data.batches import TokenBatch
from ctrlrl.errors import VersionMismatch
from ctrlrl.models.loading import load_config, load_tokenizer

# Mean difference of logprobs that the same weights may show in two engines, as a share of the mean |logprob|: rounding grows with the
# logits, so that unlikely tokens differ more. Measured, vLLM against transformers on CPU: at most 1e-5 nats where both are fp32; with
# SmolLM2-135M in bf16 0.017 on the probe (0.05 of 3.1), 0.023 with tokens that it was never trained on (0.22 of 9.6). With a tied head
# that stayed behind it was 0.21 nats on text.
TOLERANCE = {"float32": 3e-4, "bfloat16": 0.035}

Probe = tuple[tuple[int, ...], ...]
# Any tokens will do, since both engines are asked the same, but those of ordinary text have the least noise: on others, which the model
# was never trained on, engines differ most. A probe costs one small forward pass.
_TEXTS = (
    "Bread needs flour, water, salt and yeast. Knead the dough, let it rest for an hour, and bake it until the crust is brown.",
    "I am sorry, but I cannot help with that. If you are in danger, please call someone you trust, or the emergency services.",
    "First open the window, then 2 + 3 = 5; she said: \"Why not?\"",
)


@lru_cache
def probe_of(model: str, exact: bool = False) -> Probe:
    """Fixed sentences in the tokens of a model.

    exact: all who are asked compute in float32. Then there is no noise to take a mean over, every token goes through every weight matrix,
    and the shortest sentence says as much as all, unless the model has experts: the more tokens, the more of these are met.
    """
    tokenizer, experts = load_tokenizer(model), any("expert" in key for key in load_config(model).to_dict())
    texts = [min(_TEXTS, key=len)] if exact and not experts else list(_TEXTS)
    return tuple(tuple(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"])


def probe_batch(probe: Probe) -> TokenBatch:
    """All tokens but the first of each sequence scored."""
    return TokenBatch([np.array(ids, np.int64) for ids in probe], np.ones(len(probe), np.int64), {}, {})


@dataclass(frozen=True)
class Expectation:
    """Logprobs of the probe's tokens at temperature 1 by the trainer: with the published weights, and with those before (None: unknown).

    tolerance: share of the mean |logprob| by which a right sampler may differ.
    """

    probe: Probe
    published: list[np.ndarray]
    before: list[np.ndarray] | None
    tolerance: float

    @property
    def shift(self) -> float:
        """How far this publish moved the policy."""
        return mean_difference(self.published, self.before) if self.before is not None else 0.0

    def check(self, logprobs: list[np.ndarray], version: int) -> None:
        """VersionMismatch if a sampler given `version` is further from it than engines differ, or clearly nearer to the weights before."""
        error = mean_difference(logprobs, self.published)
        allowed = allowed_difference(self.published, self.tolerance)
        # A right sampler is the engines' noise n from `published` and no less from `before`. One that ignored the publish is n from
        # `before` and about the shift from `published`: refused, however small both are, once the shift exceeds about 2 n. Where the
        # publish changed nothing both differences are equal.
        stale = self.before is not None and mean_difference(logprobs, self.before) < error / 2
        if error <= allowed and not stale:
            return
        what = "it still answers with the weights before" if stale else "its weights are wrong"
        raise VersionMismatch(
            f"a sampler that was given policy version {version} differs from the trainer by {error:.3g} in the mean logprob of the probe "
            f"(engines may by {allowed:.3g}): {what}; resume from the last checkpoint, and report this"
        )


def allowed_difference(logprobs: Sequence[np.ndarray], tolerance: float) -> float:
    """Mean difference from `logprobs` that another engine may show: a share of their mean size."""
    return tolerance * float(np.abs(np.concatenate(list(logprobs))).mean())


def mean_difference(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> float:
    """Mean absolute difference over all tokens; infinite where a value is not finite."""
    difference = np.abs(np.concatenate(list(a)).astype(np.float64) - np.concatenate(list(b)))
    return float(difference.mean()) if np.isfinite(difference).all() else float("inf")
