"""Preference pairs for training and judging: the split by prompt, and how good "the longer answer wins" would be.

The pairs themselves (JSONL, CSV, Parquet, HH transcripts, rows with a system prompt) are read by data.sources.read_pairs.
"""

import math
from collections.abc import Sequence

import numpy as np

from ctrlrl.data.batches import TokenBatch
from ctrlrl.data.epochs import hold_out
from ctrlrl.data.sources import PreferencePair

Z_95 = 1.959964  # two-sided 95 % quantile of the normal distribution


def opening(pair: PreferencePair) -> str:
    """What puts a pair on one side of a split: the user's first message. System prompts and later turns of a conversation share it."""
    return next(m["content"] for m in pair.messages if m["role"] == "user")


class PairExamples:
    """Preference pairs as token sequences (see data.epochs): two rows an example, chosen and rejected.

    tokens, starts: interleaved (chosen, rejected, chosen, …), [2N]; starts: tokens of each row before the answer, at least 1.
    columns: further numbers of each row, [2N]. lengths [N]: tokens of both rows of a pair.
    """

    def __init__(self, tokens: Sequence[np.ndarray], starts: np.ndarray, columns: dict[str, np.ndarray] | None = None):
        self._whole = TokenBatch(list(tokens), np.asarray(starts), {}, columns or {}, group=2)
        self.lengths = np.array([len(row) for row in tokens]).reshape(-1, 2).sum(1)

    def batch(self, rows: np.ndarray, epoch: int) -> TokenBatch:
        """The pairs `rows`, in that order; the same in every epoch."""
        return self._whole.select((np.asarray(rows)[:, None] * 2 + np.arange(2)).ravel())


def split_pairs(pairs: Sequence[PreferencePair], share: float, limit: int, seed: int, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of the pairs to train on, and of at most `limit` pairs of held-out prompts; see epochs.hold_out."""
    return hold_out([opening(pair) for pair in pairs], share, limit, seed, what)


def longer_wins(pairs: Sequence[PreferencePair]) -> float:
    """Accuracy of preferring the longer answer, in characters; equal lengths count as half."""
    lengths = np.array([[len(pair.chosen), len(pair.rejected)] for pair in pairs])
    return float(((1 + np.sign(lengths[:, 0] - lengths[:, 1])) / 2).mean())


def share_interval(hits: float, trials: int) -> tuple[float, float]:
    """The 95 % interval of Wilson (JASA 22, 1927) for a share of independent trials; (0, 1) without any."""
    if not trials:
        return 0.0, 1.0
    share, spread = hits / trials, Z_95**2 / trials
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
    return middle - half, middle + half
