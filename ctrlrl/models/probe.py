"""The weight handshake: what the trainer says of a few fixed tokens, with which every sampler that takes new weights is compared."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ctrlrl.data.batches import TokenBatch
from ctrlrl.errors import VersionMismatch

# Mean difference of logprobs that the same weights may show in two engines. Measured: 1e-6 to 1e-5 where both are fp32, 0.03 to 0.04 in
# bf16 (the noise of the dtype itself; other models and devices may have more).
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}

Probe = tuple[tuple[int, ...], ...]
# Any tokens will do, since both engines are asked the same; these are in every vocabulary. A probe costs one small forward pass.
PROBE: Probe = (tuple(range(3, 35)), tuple(range(50, 18, -1)), tuple(range(4, 50, 3)))


def probe_batch(probe: Probe) -> TokenBatch:
    """All tokens but the first of each sequence scored."""
    return TokenBatch([np.array(ids, np.int64) for ids in probe], np.ones(len(probe), np.int64), {}, {})


@dataclass(frozen=True)
class Expectation:
    """Logprobs of the probe's tokens at temperature 1 by the trainer: with the published weights, and with those before (None: unknown)."""

    probe: Probe
    published: list[np.ndarray]
    before: list[np.ndarray] | None
    tolerance: float

    @property
    def shift(self) -> float:
        """How far this publish moved the policy."""
        return mean_difference(self.published, self.before) if self.before is not None else 0.0

    def check(self, logprobs: list[np.ndarray], version: int) -> None:
        """VersionMismatch if a sampler that was given `version` is further from it than engines differ."""
        error = mean_difference(logprobs, self.published)
        if error <= self.tolerance:
            return
        stale = self.before is not None and mean_difference(logprobs, self.before) < error
        what = "it still answers with the weights before" if stale else "its weights are wrong"
        raise VersionMismatch(
            f"a sampler that was given policy version {version} differs from the trainer by {error:.3g} in the mean logprob of the probe "
            f"(up to {self.tolerance:g} is allowed): {what}; resume from the last checkpoint, and report this"
        )


def mean_difference(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> float:
    """Mean absolute difference over all tokens; infinite where a value is not finite."""
    difference = np.abs(np.concatenate(list(a)).astype(np.float64) - np.concatenate(list(b)))
    return float(difference.mean()) if np.isfinite(difference).all() else float("inf")
