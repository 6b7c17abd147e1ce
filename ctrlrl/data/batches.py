"""Batches of token sequences: what travels to a training or scoring actor, and how it is cut into micro-batches.

Legend of shape suffixes: B sequences of a micro-batch, T scored tokens of its longest sequence.
"""
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class TokenBatch:
    """Ragged sequences with aligned columns; numpy only, so that it crosses processes without a copy.

    tokens: int arrays, prompt and response together. prompt_lengths [B]: leading tokens that are not scored (at least 1, since
    the first token has no logprob). per_token: arrays aligned with the scored tokens of each sequence. per_sequence: arrays [B].
    group: this many consecutive sequences belong together and stay in one micro-batch (2 for preference pairs).
    """

    tokens: list[np.ndarray]
    prompt_lengths: np.ndarray
    per_token: dict[str, list[np.ndarray]]
    per_sequence: dict[str, np.ndarray]
    group: int = 1

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def scored_lengths(self) -> np.ndarray:
        """Number of scored tokens of each sequence, [B]."""
        return np.array([len(t) for t in self.tokens], dtype=np.int64) - self.prompt_lengths

    def select(self, rows: np.ndarray) -> "TokenBatch":
        """The given rows, in the given order."""
        return TokenBatch(
            [self.tokens[i] for i in rows],
            self.prompt_lengths[rows],
            {name: [column[i] for i in rows] for name, column in self.per_token.items()},
            {name: column[rows] for name, column in self.per_sequence.items()},
            self.group,
        )


@dataclass(frozen=True)
class MicroBatch:
    """What a loss sees beside the model's outputs.

    mask_BT: true on scored tokens. columns: per-token [B, T] (0 where masked) or per-sequence [B] tensors. tokens, sequences: the
    counts of the *global* batch (all micro-batches, all ranks), the denominators that make losses independent of the cutting.
    """

    mask_BT: Tensor
    columns: dict[str, Tensor]
    tokens: int
    sequences: int


@dataclass(frozen=True)
class TokenOutputs:
    """A language model's outputs on the scored tokens, 0 where masked: logprobs_BT (differentiable), entropy_BT (not)."""

    logprobs_BT: Tensor
    entropy_BT: Tensor


@dataclass(frozen=True)
class ValueOutputs:
    """A value model's outputs: values_BT[b, t] is the value of the state before scored token t."""

    values_BT: Tensor


@dataclass(frozen=True)
class PolicyValueOutputs:
    """Both, of a model that has two heads."""

    logprobs_BT: Tensor
    entropy_BT: Tensor
    values_BT: Tensor


# Every objective: (outputs, batch) -> (this micro-batch's share of the global loss, shares of stats). Shares add up over
# micro-batches and ranks; a stat whose name ends in `_max` is combined by maximum.
Loss = Callable[[object, MicroBatch], tuple[Tensor, dict[str, Tensor]]]


_WORTH_SHARING = 16  # tokens of a prompt: below, a piece more to attend to costs more than it saves


def shared_prompts(batch: TokenBatch) -> list[bytes | None]:
    """For each row a key of its prompt, the same for the same prompt; None where no other row has it, or it is short."""
    keys = [
        np.ascontiguousarray(tokens[:length], np.int64).tobytes() if length >= _WORTH_SHARING else None
        for tokens, length in zip(batch.tokens, batch.prompt_lengths, strict=True)
    ]
    counts = Counter(keys)
    return [key if key is not None and counts[key] > 1 else None for key in keys]


def plan_batch(batch: TokenBatch, token_budget: int, layout: str, ranks: int = 1) -> list[np.ndarray]:
    """`plan_micro_batches` of a batch for a layout: in "shared" those of the same prompt stay together, and it costs its tokens once.

    ranks: micro-batch i is for rank i % ranks; their number is a multiple of it wherever there are sequences enough, and the largest is
    as small as it can be, to a percent: no rank waits for one that has more to do.
    """
    lengths = np.array([len(t) for t in batch.tokens])
    keys = shared_prompts(batch) if layout == "shared" else []
    if any(key is not None for key in keys):
        cut = partial(_shared_plan, batch, keys, lengths)
    else:
        cut = partial(plan_micro_batches, lengths, group=batch.group, padded=layout == "padded")
    plan = cut(token_budget=token_budget)
    if ranks == 1:
        return plan
    wanted = -(-len(plan) // ranks) * ranks
    low, high = 0, min(token_budget, len(lengths) * int(lengths.max()))  # too small a budget, and one that is large enough
    while high - low > max(1, high // 100):
        middle = (low + high) // 2
        found = cut(token_budget=middle)
        if len(found) > wanted:
            low = middle
        else:
            high, plan = middle, found
    return plan


def _shared_plan(batch: TokenBatch, keys: list[bytes | None], lengths: np.ndarray, token_budget: int) -> list[np.ndarray]:
    pieces: list[list[int]] = []  # groups that share a prompt, as many as the budget takes
    costs: list[int] = []
    latest: dict[bytes, int] = {}
    for g in range(len(batch) // batch.group):
        rows = range(g * batch.group, (g + 1) * batch.group)
        key = keys[rows[0]] if all(keys[r] is not None and keys[r] == keys[rows[0]] for r in rows) else None
        prompt = int(batch.prompt_lengths[rows[0]]) if key is not None else 0
        own = sum(int(lengths[r]) - prompt for r in rows)
        if key in latest and costs[latest[key]] + own <= token_budget:
            pieces[latest[key]].append(g)
            costs[latest[key]] += own
            continue
        if key is not None:
            latest[key] = len(pieces)
        pieces.append([g])
        costs.append(prompt + own)
    plan = plan_micro_batches(np.array(costs), token_budget)
    group = np.arange(batch.group)
    return [np.concatenate([g * batch.group + group for piece in part for g in pieces[piece]]) for part in plan]


def plan_micro_batches(lengths: np.ndarray, token_budget: int, group: int = 1, padded: bool = False) -> list[np.ndarray]:
    """Cut rows into micro-batches of at most `token_budget` tokens (a longer group stands alone), similar lengths together.

    lengths [B]: tokens of each sequence. With `padded` a micro-batch costs rows x longest. Returns row indices; groups of `group`
    consecutive rows are never split; every row appears exactly once; the cut does not depend on the order of equal lengths.
    """
    costs = np.asarray(lengths).reshape(-1, group).max(axis=1) if padded else np.asarray(lengths).reshape(-1, group).sum(axis=1)
    plan, current, spent, longest = [], [], 0, 0
    for g in np.argsort(-costs, kind="stable"):
        cost = int(costs[g])
        longest = max(longest, cost)
        after = longest * (len(current) + 1) * group if padded else spent + cost
        if current and after > token_budget:
            plan.append(current)
            current, spent, longest = [], 0, cost
        current.append(g)
        spent += cost
    if current:
        plan.append(current)
    return [(np.array(groups)[:, None] * group + np.arange(group)).ravel() for groups in plan]


def masked(batch: TokenBatch) -> TokenBatch:
    """The same sequences with nothing scored: a micro-batch that joins the collectives and adds 0."""
    lengths = np.array([len(t) for t in batch.tokens])
    empty = {name: [column[:0] for column in columns] for name, columns in batch.per_token.items()}
    return TokenBatch(batch.tokens, lengths, empty, batch.per_sequence, batch.group)
