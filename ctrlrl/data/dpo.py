"""Rows of direct preference optimisation: opposite system prompts, further tasks mixed by weight, and the reference's logprobs.

Sources: [CST] Gallego, arXiv 2404.00495; [DPO] Rafailov et al., arXiv 2305.18290.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ctrlrl.chat import text_ids
from ctrlrl.config import differences
from ctrlrl.data.atomic import write_atomically
from ctrlrl.data.batches import TokenBatch
from ctrlrl.data.epochs import hold_out
from ctrlrl.data.preferences import opening
from ctrlrl.data.sources import PreferencePair
from ctrlrl.errors import DataError, RunError
from ctrlrl.prompts import HARMLESS_SYSTEM, UNCENSORED_SYSTEM, render
from ctrlrl.seeds import derive_seed

REFERENCE = pa.schema([pa.field(name, pa.float64(), nullable=False) for name in ("chosen", "rejected")])
_FINGERPRINT = b"ctrlrl.fingerprint"  # key in the metadata of the stored table


@dataclass(frozen=True)
class PreferenceTask:
    """Preference pairs of one kind. labels: what each pair is called in figures; weight: how often it is used in an epoch, on average.

    together: so many consecutive pairs are used or left out as one.
    """

    pairs: tuple[PreferencePair, ...]
    labels: tuple[str, ...]
    weight: float = 1.0
    together: int = 1


def opposite_pairs(table: pa.Table) -> PreferenceTask:
    """Two rows of each self-critique pair (schema PAIRS), [CST]: under s1 the rewrite y1 is preferred, under s0 the answer y0."""
    pairs = []
    for row in table.to_pylist():
        source = f"critique of {row['prompt_id']}, {row['index']}"
        if row["messages"][0]["role"] == "system":
            raise DataError(
                f"{source}: the prompt has a system prompt of its own, and [CST] needs its place: take it out and critique anew"
            )
        for system, chosen, rejected in ((HARMLESS_SYSTEM, "y1", "y0"), (UNCENSORED_SYSTEM, "y0", "y1")):
            messages = ({"role": "system", "content": system}, *row["messages"])
            pairs.append(PreferencePair(messages, row[chosen], row[rejected], source))
    return PreferenceTask(tuple(pairs), ("s1", "s0") * table.num_rows, together=2)


def plain_pairs(table: pa.Table) -> PreferenceTask:
    """The baseline of [CST]: the s1 half alone, without a system prompt."""
    rows = table.to_pylist()
    pairs = [PreferencePair(tuple(r["messages"]), r["y1"], r["y0"], f"critique of {r['prompt_id']}, {r['index']}") for r in rows]
    return PreferenceTask(tuple(pairs), ("plain",) * len(rows))


@dataclass(frozen=True)
class Mixture:
    """All pairs, in the order of the tasks; which to train on, in which multiplicity; and which belong to held-out prompts."""

    pairs: tuple[PreferencePair, ...]
    labels: tuple[str, ...]
    train: np.ndarray
    held_out: np.ndarray


def mix(tasks: Sequence[PreferenceTask], share: float, limit: int, seed: int) -> Mixture:
    """Split all tasks by prompt (see epochs.hold_out), then take each task's training pairs by its weight.

    Weight 2 takes every pair twice an epoch, 0.5 a seeded half of them, 1.5 all of them and a seeded half once more. Held-out pairs are
    never repeated. DataError if a task has no pair left.
    """
    pairs = tuple(pair for task in tasks for pair in task.pairs)
    kept, held = hold_out([opening(pair) for pair in pairs], share, limit, seed, "the preference data")
    train, start = [], 0
    for number, task in enumerate(tasks):
        end = start + len(task.pairs)
        own = kept[(kept >= start) & (kept < end)]
        train.append(_weighted(own, task, derive_seed(seed, "mix", number)))
        start = end
    return Mixture(pairs, tuple(label for task in tasks for label in task.labels), np.concatenate(train), held)


def _weighted(rows: np.ndarray, task: PreferenceTask, seed: int) -> np.ndarray:
    """`rows` of a task as often as its weight says. Rows that stay together share their prompt, so a split never parts them."""
    units = rows.reshape(-1, task.together)
    whole = int(task.weight)
    part = np.random.default_rng(seed).permutation(len(units))[: round((task.weight - whole) * len(units))]
    taken = np.concatenate([units] * whole + [units[np.sort(part)]]).ravel()
    if not len(taken):
        raise DataError(f"weight {task.weight:g} of {task.labels[0]!r} takes none of its {len(units)} pairs: raise it, or drop the task")
    return taken


def encode(pairs: Sequence[PreferencePair], tokenizer, end: int) -> TokenBatch:
    """Token sequences, two a pair (chosen, rejected): the rendered prompt, the answer's text, and the token `end`; answers are scored."""
    tokens, starts = [], []
    texts = [text for pair in pairs for text in (pair.chosen, pair.rejected)]
    answers = text_ids(tokenizer, texts, [pair.source for pair in pairs for _ in range(2)])
    for i, pair in enumerate(pairs):
        prompt = render(tokenizer, pair.messages, source=pair.source)
        for answer in answers[2 * i : 2 * i + 2]:
            tokens.append(np.array([*prompt, *answer, end], np.int32))
            starts.append(len(prompt))
    return TokenBatch(tokens, np.array(starts), {}, {}, group=2)


def without_long(tasks: Sequence[PreferenceTask], batch: TokenBatch, limit: int) -> tuple[list[PreferenceTask], TokenBatch, int]:
    """Tasks and `batch`, their pairs encoded in order, without pairs of which a sequence exceeds `limit` tokens; and how many those are."""
    longest = np.array([len(t) for t in batch.tokens]).reshape(-1, 2).max(1)
    kept, fitting, start = [], [], 0
    for task in tasks:
        own = longest[start : start + len(task.pairs)].reshape(-1, task.together).max(1)
        rows = np.flatnonzero(np.repeat(own <= limit, task.together))
        fitting.append(replace(task, pairs=tuple(task.pairs[i] for i in rows), labels=tuple(task.labels[i] for i in rows)))
        kept.append(start + rows)
        start += len(task.pairs)
    rows = np.concatenate(kept)
    return fitting, batch.select((2 * rows[:, None] + np.arange(2)).ravel()), len(longest) - len(rows)


def preference_figures(logprobs: np.ndarray, reference: np.ndarray, labels: Sequence[str], beta: float) -> dict[str, float]:
    """Held-out figures, over all pairs and by label: loss ([DPO] eq. 7), accuracy (positive margins) and margin r⁺ - r⁻.

    logprobs, reference: float64 [N, 2], summed logprobs of chosen and rejected answers under the policy and under the reference.
    """
    reward = beta * (logprobs - reference)
    margin = reward[:, 0] - reward[:, 1]
    names = np.array(labels)
    groups = {"": np.ones(len(names), bool)} | {f"/{name}": names == name for name in dict.fromkeys(labels)}
    figures = {}
    for suffix, chosen in groups.items():
        own = margin[chosen]
        loss = np.logaddexp(0, -own).mean()
        figures |= {f"loss{suffix}": float(loss), f"accuracy{suffix}": float((own > 0).mean()), f"margin{suffix}": float(own.mean())}
    return figures


def summed(logprobs: Sequence[np.ndarray]) -> np.ndarray:
    """Summed logprobs, float64 [N, 2], of interleaved sequences."""
    return np.array([row.sum(dtype=np.float64) for row in logprobs]).reshape(-1, 2)


def batch_fingerprint(batch: TokenBatch) -> str:
    """SHA-256 of the sequences and of where their answers begin."""
    digest = hashlib.sha256(np.asarray(batch.prompt_lengths, np.int64).tobytes())
    for tokens in batch.tokens:
        digest.update(np.int64(len(tokens)).tobytes() + tokens.astype(np.int32).tobytes())
    return digest.hexdigest()


def write_reference(path: Path, reference: np.ndarray, fingerprint: dict) -> None:
    """Store the reference's logprobs, float64 [N, 2], with what they were computed from."""
    schema = REFERENCE.with_metadata({_FINGERPRINT: json.dumps(fingerprint)})
    table = pa.table([pa.array(reference[:, 0]), pa.array(reference[:, 1])], schema=schema)
    write_atomically(path, lambda out: pq.write_table(table, out))


def read_reference(path: Path, fingerprint: dict, *, resumed: bool) -> np.ndarray | None:
    """The stored logprobs, float64 [N, 2]; None if there are none, or if a run that never began left those of something else.

    RunError if a run that is `resumed` computed them from something else (model or data changed behind an unchanged recipe).
    """
    if not path.exists():
        return None
    try:
        table = pq.read_table(path)
        stored = json.loads(table.schema.metadata[_FINGERPRINT])
    except (OSError, pa.ArrowException, TypeError, KeyError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}: delete it, and it is computed again") from None
    if changed := "; ".join(differences(stored, fingerprint)):
        if resumed:
            raise RunError(f"{path} was computed from something else ({changed}): restore it, or start a new run")
        return None
    return np.stack([table[name].to_numpy() for name in REFERENCE.names], axis=1)
