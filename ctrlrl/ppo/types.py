"""The stages of a PPO step, one frozen type each, every field filled: Query -> Samples -> Scored -> Experience.

Legend of shape suffixes: B sequences, A attributes (in the order of the recipe).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ctrlrl.control import Control
from ctrlrl.data.batches import TokenBatch
from ctrlrl.prompts import Messages


@dataclass(frozen=True)
class Query:
    """One (x, ζ) to answer. control: None where x is asked without one. group: equal for the samples of the same draw of (x, ζ). seed: of
    this sample alone."""

    messages: Messages
    control: Control | None
    prompt_ids: tuple[int, ...]
    group: int
    seed: int


@dataclass(frozen=True)
class Samples:
    """Queries with their drawn responses: token ids as the sampler returned them, its own logprobs, whether the end token was drawn,
    and the version of the policy that drew them."""

    queries: tuple[Query, ...]
    response_ids: tuple[np.ndarray, ...]
    sampler_logprobs: tuple[np.ndarray, ...]
    finished: np.ndarray
    version: int

    def token_batch(self) -> TokenBatch:
        """Prompt and response tokens, the response scored."""
        tokens = [np.concatenate([np.array(q.prompt_ids, np.int64), r]) for q, r in zip(self.queries, self.response_ids, strict=True)]
        return TokenBatch(tokens, np.array([len(q.prompt_ids) for q in self.queries]), {}, {})


@dataclass(frozen=True)
class Scored:
    """Samples with what the frozen and trained models say of them: scores [B, A]; one array of response tokens a sequence of
    logprobs under the policy that drew them (recomputed by the trainer), under the reference, and of values (0 without value model)."""

    samples: Samples
    scores_BA: np.ndarray
    old_logprobs: tuple[np.ndarray, ...]
    ref_logprobs: tuple[np.ndarray, ...]
    values: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Experience:
    """What the trainers take: response tokens with advantages (and returns), and the step's statistics so far."""

    batch: TokenBatch
    stats: dict[str, float]


def concatenate(parts: Sequence[tuple[np.ndarray, Scored]]) -> Scored:
    """All chunks of a step as one, in the order of the queries; parts are (query numbers, chunk), in any order."""
    order = np.argsort(np.concatenate([rows for rows, _ in parts]))
    chunks = [scored for _, scored in parts]

    def ragged(lists) -> tuple:
        flat = [row for part in lists for row in part]
        return tuple(flat[i] for i in order)

    samples = Samples(
        ragged(c.samples.queries for c in chunks),
        ragged(c.samples.response_ids for c in chunks),
        ragged(c.samples.sampler_logprobs for c in chunks),
        np.concatenate([c.samples.finished for c in chunks])[order],
        chunks[0].samples.version,
    )
    return Scored(
        samples,
        np.concatenate([c.scores_BA for c in chunks])[order],
        ragged(c.old_logprobs for c in chunks),
        ragged(c.ref_logprobs for c in chunks),
        ragged(c.values for c in chunks),
    )
