"""The joint distribution of the scores, pair by pair, in two passes over any number of samples with a fixed amount of memory."""
from collections.abc import Sequence
from itertools import combinations

import numpy as np
from scipy.special import logit

BINS = 50  # of the picture's histogram, per axis; 0.2 and 0.8 are ends of bins
# Fine bins for ranks, evenly spaced in the logit: scores of a sigmoid lie close to both ends, and those of an untrained one close to 0.5.
_FINE = 1 << 20
_REACH = 25.0  # logits beyond share the last bin


class JointScores:
    """Pearson, Spearman and the 2-D histogram of every pair of columns of scores [n, A]: `count` every sample, then `correlate` every
    sample once more.

    Spearman is that of scores rounded to 2^20 bins of logit width 5e-5: within a bin they count as tied. With all samples in one bin,
    or fewer than two, both correlations are 0.
    """

    def __init__(self, names: Sequence[str] = ("helpful", "harmless")):
        self._names, self._pairs = tuple(names), list(combinations(range(len(names)), 2))
        self._histograms = np.zeros((len(self._pairs), BINS, BINS), np.int64)
        self._marginals = np.zeros((len(names), BINS), np.int64)
        self._fine = np.zeros((len(names), _FINE), np.int64)
        self._sums = np.zeros((len(self._pairs), 5))  # of u, v, u², v², u·v, with scores counted from 0.5
        self._ranks: np.ndarray | None = None
        self._products = np.zeros(len(self._pairs))

    @property
    def histogram(self) -> np.ndarray:
        """That of the first two columns, [BINS, BINS]."""
        return self._histograms[0]

    def count(self, scores: np.ndarray) -> None:
        """First pass: scores [n, A] in [0, 1]."""
        cells = np.minimum((scores * BINS).astype(np.int64), BINS - 1)
        for fine, column, marginal, cell in zip(self._fine, scores.T, self._marginals, cells.T, strict=True):
            np.add.at(fine, _fine_bins(column), 1)
            marginal += np.bincount(cell, minlength=BINS)
        for number, (a, b) in enumerate(self._pairs):
            self._histograms[number] += np.bincount(cells[:, a] * BINS + cells[:, b], minlength=BINS * BINS).reshape(BINS, BINS)
            u, v = scores.T[a] - 0.5, scores.T[b] - 0.5
            # Not with @: BLAS splits a sum by its number of threads, and the report should not depend on that.
            self._sums[number] += [x.sum() for x in (u, v, u * u, v * v, u * v)]

    def correlate(self, scores: np.ndarray) -> None:
        """Second pass, over the same samples."""
        if self._ranks is None:
            # The middle of the places that a bin's samples take, as a distance from the middle place of all.
            self._ranks = np.cumsum(self._fine, axis=1) - (self._fine - 1) / 2 - (self._fine.sum(axis=1, keepdims=True) + 1) / 2
        placed = [ranks[_fine_bins(column)] for ranks, column in zip(self._ranks, scores.T, strict=True)]
        for number, (a, b) in enumerate(self._pairs):
            self._products[number] += float((placed[a] * placed[b]).sum())

    def correlations(self, pair: int = 0) -> dict[str, float]:
        """{"pearson", "spearman"} of a pair of columns, the first by default, after both passes."""
        n = max(int(self._histograms[pair].sum()), 1)
        mu, mv, uu, vv, uv = self._sums[pair] / n
        su, sv = uu - mu * mu, vv - mv * mv
        fine, ranks = self._fine[list(self._pairs[pair])], None if self._ranks is None else self._ranks[list(self._pairs[pair])]
        varies = all(np.count_nonzero(one) > 1 for one in fine)
        if not varies or ranks is None:
            return {"pearson": 0.0, "spearman": 0.0}
        spread = [float((one * rank**2).sum()) for one, rank in zip(fine, ranks, strict=True)]
        found = {"pearson": (uv - mu * mv) / np.sqrt(su * sv), "spearman": self._products[pair] / np.sqrt(spread[0] * spread[1])}
        return {name: float(np.clip(value, -1, 1)) for name, value in found.items()}

    def report(self) -> dict:
        """For report.json: "entanglement" and "histogram" of the two columns; of more or fewer columns both by pair, as "a with b", and
        the "marginals" by name."""
        if len(self._names) == 2:
            return {"entanglement": self.correlations(), "histogram": self.histogram.tolist()}
        pairs = {f"{self._names[a]} with {self._names[b]}": number for number, (a, b) in enumerate(self._pairs)}
        return {
            "entanglement": {pair: self.correlations(number) for pair, number in pairs.items()},
            "histogram": {pair: self._histograms[number].tolist() for pair, number in pairs.items()},
            "marginals": dict(zip(self._names, self._marginals.tolist(), strict=True)),
        }


def _fine_bins(scores: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):  # 0 and 1 are at infinity, in the last bins
        place = (np.clip(logit(scores), -_REACH, _REACH) + _REACH) * (_FINE / (2 * _REACH))
    return np.minimum(place.astype(np.int64), _FINE - 1)
