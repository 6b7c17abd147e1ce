"""From a reward model's raw output to a score in [0, 1] (METHOD, score calibration).

`sigmoid` for Bradley-Terry heads, `identity` for a head that gives probabilities, `quantile` for a monotone map fitted on the raw
outputs of self-generated samples: the score is the share of them that lies below. Stored as JSON with a hash of the content.

Of stored samples also by their place among the answers to their own prompt (WithinPrompts), which no fixed map can tell.
"""
import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
from scipy.special import expit

from ctrlrl.data.atomic import write_json
from ctrlrl.data.keys import row_keys
from ctrlrl.data.shards import ShardStore
from ctrlrl.errors import DataError

KINDS = ("sigmoid", "identity", "quantile")


@dataclass(frozen=True)
class Calibration:
    """A monotone map to [0, 1]. knots, scores: the fitted points of `quantile`, strictly rising; empty for the other kinds.

    model: the fingerprint of the reward model whose outputs it was fitted on; empty where that is not known.
    """

    kind: str
    knots: tuple[float, ...] = ()
    scores: tuple[float, ...] = ()
    model: str = ""

    def __post_init__(self):
        if self.kind not in KINDS:
            raise DataError(f"calibration {self.kind!r} is unknown: use one of {', '.join(KINDS)}")
        fits = len(self.knots) == len(self.scores) and _rising(self.knots) and _rising(self.scores)
        if not fits or bool(self.knots) != (self.kind == "quantile"):
            raise DataError(f"a {self.kind} calibration was given {len(self.knots)} knots: quantile alone has some, from fit_quantile")

    def __call__(self, raw: np.ndarray) -> np.ndarray:
        """Scores in [0, 1], float64, of the shape of `raw`; NaN, of an answer without a score, stays NaN. DataError for identity outside
        [0, 1]."""
        raw = np.asarray(raw, np.float64)
        if self.kind == "sigmoid":
            return expit(raw)
        if self.kind == "quantile":
            scores = np.interp(raw, self.knots, self.scores)
            above = np.searchsorted(self.knots, raw).clip(max=len(self.knots) - 1)
            return np.minimum(scores, np.take(self.scores, above))  # rounding may lift a score above that of the next knot
        if ((raw < 0) | (raw > 1)).any():
            ends = f"{np.nanmin(raw):g} to {np.nanmax(raw):g}"
            raise DataError(f"identity calibration needs outputs in [0, 1]; got {ends}: use sigmoid or quantile")
        return raw

    def at(self, start: int, raw: np.ndarray) -> np.ndarray:
        """The same; start: where these rows begin in their store, which does not matter here."""
        return self(raw)

    @property
    def content_hash(self) -> str:
        """SHA-256 of kind and points; part of the fingerprint of every score made with it."""
        return hashlib.sha256(json.dumps({k: v for k, v in asdict(self).items() if k != "model"}, sort_keys=True).encode()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write the calibration and its hash as JSON, atomically."""
        write_json(Path(path), asdict(self) | {"content_hash": self.content_hash})


def load_calibration(path: str | Path) -> Calibration:
    """The calibration that `save` wrote; raises DataError if the file is missing, malformed or not what was saved."""
    try:
        stored = json.loads(Path(path).read_bytes())
        calibration = Calibration(stored["kind"], tuple(stored["knots"]), tuple(stored["scores"]), stored.get("model", ""))
        expected = stored["content_hash"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a stored calibration: {error}") from None
    if calibration.content_hash != expected:
        raise DataError(f"{path} was changed after it was saved (hash {calibration.content_hash[:12]}, not {expected[:12]}): fit it again")
    return calibration


def fit_quantile(raw: Iterable[float], *, points: int = 1001, model: str = "") -> Calibration:
    """The quantile map of `raw` outputs [samples]: score = (share below + share below or equal) / 2, between samples linear.

    The map is kept at `points` evenly spaced quantiles; outputs beyond the fitted ones get the score of the nearest end. NaN, of answers
    without a score, is left out. Raises DataError for fewer than two different outputs.
    """
    raw = np.asarray(raw, np.float64)
    raw = raw[~np.isnan(raw)] if raw.ndim == 1 else raw
    values, counts = np.unique(raw, return_counts=True)
    if raw.ndim != 1 or not np.isfinite(raw).all() or len(values) < 2:
        raise DataError(f"a quantile calibration is fitted on a list of finite outputs; got shape {raw.shape}, {len(values)} different")
    middle = (np.cumsum(counts) - counts / 2) / len(raw)
    if len(values) > points:
        keep = np.unique(np.linspace(0, len(values) - 1, points).round().astype(int))
        values, middle = values[keep], middle[keep]
    return Calibration("quantile", tuple(values.tolist()), tuple(middle.tolist()), model)


def fit_to_store(store: ShardStore) -> Calibration | None:
    """The quantile map of all raw outputs that a finished store of scores keeps; None if it keeps none, or all are the same."""
    raw = raw_outputs(store)
    if raw is None or len(np.unique(raw)) < 2:
        return None
    return fit_quantile(raw, model=store.fingerprint.get("reward", {}).get("sha256", ""))


@dataclass(frozen=True)
class WithinPrompts:
    """Scores of the rows of one store, float64 [N] in [0, 1], by the place of each raw output among those of its prompt."""

    scores: np.ndarray
    kind: ClassVar[str] = "prompt"

    def at(self, start: int, raw: np.ndarray) -> np.ndarray:
        """The scores of the rows from `start`, in the place of their raw outputs [n]."""
        return self.scores[start : start + len(raw)]

    @property
    def content_hash(self) -> str:
        """SHA-256 of the scores."""
        return hashlib.sha256(b"prompt" + self.scores.tobytes()).hexdigest()


def within_prompts(prompts: np.ndarray, raw: np.ndarray) -> np.ndarray:
    """The place of each raw output among those of its prompt, float64 [N]: 0 the lowest, 1 the highest, even steps between, equal ones in
    the middle of theirs; 0.5 for one that has no other. NaN, of an answer without a score, stays NaN and takes no place.

    prompts: a number for each row, equal for those of one prompt, in any order. raw: float [N].
    """
    found = np.full(len(raw), np.nan)
    known = np.flatnonzero(~np.isnan(raw))
    order = known[np.lexsort((raw[known], prompts[known]))]
    prompts, raw = prompts[order], raw[order]
    new = np.ones(len(order), bool)
    new[1:] = prompts[1:] != prompts[:-1]
    other = new.copy()
    other[1:] |= raw[1:] != raw[:-1]
    first, size = _runs(new)
    start, equal = _runs(other)  # of which neighbours are equal
    found[order] = np.where(size > 1, (start - first + (equal - 1) / 2) / np.maximum(size - 1, 1), 0.5)
    return found


def _runs(begins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each element where its run begins, and how long that is."""
    starts = np.flatnonzero(begins)
    run = np.cumsum(begins) - 1
    sizes = np.diff(np.append(starts, len(begins)))
    return starts[run], sizes[run]


def fit_within_prompts(store: ShardStore) -> WithinPrompts | None:
    """The places of all raw outputs of a finished store of scores; None if it does not keep them. Takes some 60 bytes of memory a row."""
    if (shards := _with_raw(store, "prompt_id")) is None:
        return None
    keys = np.concatenate([row_keys(shard["prompt_id"]) for shard in shards])
    return WithinPrompts(within_prompts(keys, np.concatenate([shard["raw"].to_numpy().astype(np.float64) for shard in shards])))


def raw_outputs(store: ShardStore) -> np.ndarray | None:
    """Every raw output of a finished store of scores, without the answers that have no score; None if it does not keep them."""
    shards = _with_raw(store)
    return None if shards is None else np.concatenate([shard["raw"].drop_null().to_numpy() for shard in shards])


def _with_raw(store: ShardStore, *more: str) -> list[pa.Table] | None:
    """The shards of a finished store, with score, raw and `more` columns; None if it has none, or keeps no raw output for each score."""
    shards = [store.read(record["index"], [*more, "score", "raw"]) for record in store.manifest()["shards"]]
    if not shards or any(not shard["raw"].is_null().equals(shard["score"].is_null()) for shard in shards):
        return None
    return shards


def _rising(values: tuple[float, ...]) -> bool:
    return all(a < b for a, b in zip(values, values[1:], strict=False))
