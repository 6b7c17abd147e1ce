"""The joint distribution of the two scores, in two passes over any number of samples with a fixed amount of memory."""
import numpy as np
from scipy.special import logit

BINS = 50  # of the picture's histogram, per axis; 0.2 and 0.8 are ends of bins
# Fine bins for ranks, evenly spaced in the logit: scores of a sigmoid lie close to both ends, and those of an untrained one close to 0.5.
_FINE = 1 << 20
_REACH = 25.0  # logits beyond share the last bin


class JointScores:
    """Pearson, Spearman and the 2-D histogram of scores [n, 2]: `count` every sample, then `correlate` every sample once more.

    Spearman is that of scores rounded to 2^20 bins of logit width 5e-5: within a bin they count as tied. With all samples in one bin,
    or fewer than two, both correlations are 0.
    """

    def __init__(self):
        self.histogram = np.zeros((BINS, BINS), np.int64)
        self._fine = np.zeros((2, _FINE), np.int64)
        self._sums = np.zeros(5)  # of u, v, u², v², u·v, with scores counted from 0.5
        self._ranks: np.ndarray | None = None
        self._product = 0.0

    def count(self, scores: np.ndarray) -> None:
        """First pass: scores [n, 2] in [0, 1]."""
        cells = np.minimum((scores * BINS).astype(np.int64), BINS - 1)
        self.histogram += np.bincount(cells[:, 0] * BINS + cells[:, 1], minlength=BINS * BINS).reshape(BINS, BINS)
        for fine, column in zip(self._fine, scores.T, strict=True):
            np.add.at(fine, _fine_bins(column), 1)
        u, v = scores.T - 0.5
        # Not with @: BLAS splits a sum by its number of threads, and the report should not depend on that.
        self._sums += [x.sum() for x in (u, v, u * u, v * v, u * v)]

    def correlate(self, scores: np.ndarray) -> None:
        """Second pass, over the same samples."""
        if self._ranks is None:
            # The middle of the places that a bin's samples take, as a distance from the middle place of all.
            self._ranks = np.cumsum(self._fine, axis=1) - (self._fine - 1) / 2 - (self._fine.sum(axis=1, keepdims=True) + 1) / 2
        a, b = (ranks[_fine_bins(column)] for ranks, column in zip(self._ranks, scores.T, strict=True))
        self._product += float((a * b).sum())

    def correlations(self) -> dict[str, float]:
        """{"pearson", "spearman"} of r_hp and r_sf, after both passes."""
        n = max(int(self.histogram.sum()), 1)
        mu, mv, uu, vv, uv = self._sums / n
        su, sv = uu - mu * mu, vv - mv * mv
        varies = all(np.count_nonzero(fine) > 1 for fine in self._fine)
        if not varies or self._ranks is None:
            return {"pearson": 0.0, "spearman": 0.0}
        spread = [float((fine * ranks**2).sum()) for fine, ranks in zip(self._fine, self._ranks, strict=True)]
        found = {"pearson": (uv - mu * mv) / np.sqrt(su * sv), "spearman": self._product / np.sqrt(spread[0] * spread[1])}
        return {name: float(np.clip(value, -1, 1)) for name, value in found.items()}


def _fine_bins(scores: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):  # 0 and 1 are at infinity, in the last bins
        place = (np.clip(logit(scores), -_REACH, _REACH) + _REACH) * (_FINE / (2 * _REACH))
    return np.minimum(place.astype(np.int64), _FINE - 1)
