"""Scorers behind HTTP: `http = "https://…"` in the place of a reward model.

Each request is a POST with a batch of conversations; the answer has as many scores from 0 to 1, in their order:

    {"conversations": [{"messages": [{"role": "user", "content": "…"}], "answer": "…"}, …]}
    {"scores": [0.93, null, …], "reasons": {"1": "too long"}, "version": "2026-11"}

null: that one cannot be scored; it is asked for again on its own, and if it stays so, it is set aside (see unscored.py). reasons and
version may be left out. A version must be the one that the recipe declares, so that no two of them are mixed in one set of scores.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from pydantic import Field

from ctrlrl.errors import DataError, ModelError
from ctrlrl.models.service import Service, ServiceConfig
from ctrlrl.models.unscored import shown
from ctrlrl.prompts import Messages

TRIED = tuple(([{"role": "user", "content": "A question?"}], answer) for answer in ("An answer.", "Another answer."))
ASKED = 3  # times in all for an answer that a service does not score
# Scores of a batch, NaN where there is none, and the reasons for that by the row's number as a text.
Ask = Callable[[Sequence[tuple[Messages, str]]], tuple[np.ndarray, dict[str, str]]]
_SCHEMA = "(jobs/README.md has the schema)"


class HttpConfig(ServiceConfig):
    """A service of scores. version: of what scores there, as the service's owner calls it; part of the scores' identity. batch:
    conversations of one request."""

    version: str = ""
    batch: int = Field(32, gt=0)

    @property
    def name(self) -> str:
        """What messages, and the recipe's `model`, call this scorer."""
        return self.url

    @property
    def portion(self) -> int:
        """Conversations of one call to a worker: as many as it asks for at a time."""
        return self.batch * self.at_once

    def content_sha256(self) -> str:
        """What the scores depend on: the address and the declared version."""
        return hashlib.sha256(json.dumps({"http": self.url, "version": self.version}, sort_keys=True).encode()).hexdigest()


class HttpScorer:
    """A service as a scorer. calibration: of its scores."""

    def __init__(self, config: HttpConfig, calibration, service: Service):
        self._config, self._calibration, self._service = config, calibration, service

    def score(self, conversations: Sequence[tuple[Messages, str]]) -> np.ndarray:
        """Scores in [0, 1], fp32 [B], of (prompt messages, response text) pairs; NaN where there is none."""
        return self._calibration(self.raw(conversations)).astype(np.float32)

    def raw(self, conversations: Sequence[tuple[Messages, str]]) -> np.ndarray:
        """What the service says, fp32 [B]; NaN for an answer that it does not score."""
        return self.reasoned(conversations)[0]

    def reasoned(self, conversations: Sequence[tuple[Messages, str]]) -> tuple[np.ndarray, dict[int, str]]:
        """`raw`, and why there is no score, by row."""
        return ask_all(conversations, self._ask, self._config.batch, self._config.at_once)

    def check(self) -> None:
        """ModelError unless the service can be reached, accepts the key, and scores two small conversations."""
        try:
            scores, reasons = self._ask(TRIED, patient=False)
        except DataError as error:
            raise ModelError(str(error)) from None
        if np.isnan(scores).any():
            raise ModelError(f"{self._config.url} does not score a small conversation: {'; '.join(reasons.values()) or 'without a reason'}")

    def _ask(self, conversations: Sequence[tuple[Messages, str]], patient: bool = True) -> tuple[np.ndarray, dict[str, str]]:
        """Scores of a batch, NaN where there is none, and the reasons for that by the row's number as a text."""
        asked = [{"messages": [{**message} for message in messages], "answer": answer} for messages, answer in conversations]
        said = self._service.post({"conversations": asked}, patient=patient)
        if not isinstance(said, dict) or not isinstance(said.get("scores"), list):
            raise DataError(f"{self._config.url} must answer with an object that has a list of scores {_SCHEMA}: {str(said)[:200]}")
        version = said.get("version")
        if version is not None and str(version) != self._config.version:
            raise DataError(
                f"{self._config.url} scores by version {str(version)[:60]!r}, and http.version = {self._config.version!r}: declare the "
                "version whose scores are wanted; those of another belong into another set"
            )
        scores = said["scores"]
        if len(scores) != len(conversations):
            raise DataError(f"{self._config.url} gave {len(scores)} scores for {len(conversations)} conversations {_SCHEMA}")
        for row, score in enumerate(scores):
            if score is not None and (isinstance(score, bool) or not isinstance(score, (int, float)) or not 0 <= score <= 1):
                given = f"{self._config.url} gave {repr(score)[:60]} for {shown(conversations[row])}"
                raise DataError(f"{given}: a score is a number from 0 to 1, or null")
        reasons = said.get("reasons", {})
        known = {str(row): str(why)[:200] for row, why in reasons.items()} if isinstance(reasons, dict) else {}
        return np.array([np.nan if score is None else score for score in scores], np.float32), known


def ask_all(conversations: Sequence[tuple[Messages, str]], ask: Ask, batch: int, at_once: int) -> tuple[np.ndarray, dict[int, str]]:
    """The scores of all, fp32 [B]: in batches, `at_once` of them at a time; then those without one again, each alone, ASKED times in all.

    NaN for those that stay without; and why, by row.
    """
    scores, left, reasons = np.full(len(conversations), np.nan, np.float32), list(range(len(conversations))), {}
    for asking in range(ASKED):
        size = 1 if asking else batch
        batches = [left[i : i + size] for i in range(0, len(left), size)]
        with ThreadPoolExecutor(at_once) as threads:
            said = threads.map(lambda rows: ask([conversations[i] for i in rows]), batches)
            for rows, (given, why) in zip(batches, said, strict=True):
                scores[rows] = given
                reasons |= {row: why.get(str(i), "without a reason") for i, row in enumerate(rows)}
        left = [row for row in left if np.isnan(scores[row])]
        if not left:
            break
    return scores, {row: f"{reasons[row]} (asked {ASKED} times)" for row in left}
