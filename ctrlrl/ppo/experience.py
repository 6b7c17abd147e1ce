"""One PPO step's bookkeeping between sampling and training: what to ask, and what was learned from the answers.

Legend of shape suffixes: B sequences, T response tokens of the longest, A attributes.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from ctrlrl.attributes import PAPER, Attributes
from ctrlrl.config import Section
from ctrlrl.control import cells, sample_corners
from ctrlrl.data.batches import TokenBatch
from ctrlrl.data.sources import Prompt
from ctrlrl.errors import DataError
from ctrlrl.ppo.advantage import gae, grpo, rloo
from ctrlrl.ppo.loss import explained_variance, importance_weights
from ctrlrl.ppo.reward import (
    EQUAL,
    KLConfig,
    Weights,
    agreement,
    binding_fractions,
    control_reward,
    kl_k1,
    kl_k3,
    shaped_rewards,
    weighted_reward,
)
from ctrlrl.ppo.types import Experience, Query, Scored
from ctrlrl.prompts import render
from ctrlrl.seeds import derive_seed
from ctrlrl.tensors import masked_mean, pad_rows, whiten


class ClipRange(Section):
    """How far the ratio may go down and up before it earns no more: it is clipped to [1 - low, 1 + high]."""

    low: float = Field(0.2, gt=0)
    high: float = Field(0.2, gt=0)


class AlgorithmConfig(Section):
    """PPO's numbers (METHOD: [SH] 2.4 and [PPO]).

    queries_per_step: draws of (x, ζ); each is answered samples_per_query times. truncated: what a response cut at the length limit
    earns: "zero" (it did not answer) or "score" (its reward like any other). combine: "min", "mean" or "product" of the agreements with
    the control; or "weighted", the sum of the scores by `weights`, asked without a control: the baseline that nobody can dial.
    old_logprobs: of the samples, by the trainer's own forward, or as the rollout engine gave them when it drew (a forward less; in float32
    they agree to 1e-5, in bfloat16 the ratio has the engines' mismatch in it).
    clip: ε, or { low, high }. ratio: of each token, or of the sequence (GSPO). mean: of the loss over all tokens, over sequences (each
    its own mean), or over sequences of the fixed length sampling.max_new_tokens.
    """

    queries_per_step: int = Field(256, gt=0)
    samples_per_query: int = Field(1, gt=0)
    epochs: int = Field(1, gt=0)
    minibatches: int = Field(4, gt=0)
    combine: Literal["min", "mean", "product", "weighted"] = "min"
    weights: Weights = EQUAL
    advantage: Literal["gae", "rloo", "grpo"] = "gae"
    deviation: bool = Field(True, description="grpo: divide by the standard deviation of the group")
    old_logprobs: Literal["trainer", "engine"] = "trainer"
    truncated: Literal["zero", "score"] = "zero"
    gamma: float = Field(1.0, ge=0, le=1)
    lam: float = Field(0.95, ge=0, le=1)
    clip: Annotated[float, Field(gt=0)] | ClipRange = 0.2
    ratio: Literal["token", "sequence"] = "token"
    mean: Literal["token", "sequence", "fixed"] = "token"
    value_clip: float = Field(0.2, gt=0)
    value_factor: float = Field(0.5, gt=0)
    kl: KLConfig = KLConfig()

    @model_validator(mode="after")
    def _enough_samples(self):
        if self.advantage != "gae" and self.samples_per_query < 2:
            raise ValueError(f'advantage = "{self.advantage}" compares samples of the same query: set samples_per_query to 2 or more')
        return self

    @model_validator(mode="after")
    def _deviation_is_used(self):
        if not self.deviation and self.advantage != "grpo":
            raise ValueError(f'deviation is for advantage = "grpo", not for "{self.advantage}": leave it out, or change advantage')
        return self

    @model_validator(mode="after")
    def _weights_are_used(self):
        if self.controlled and self.weights != EQUAL:
            raise ValueError(f'weights are for combine = "weighted", not for {self.combine!r}: leave them out, or change combine')
        return self

    @property
    def clip_range(self) -> tuple[float, float]:
        """(low, high)."""
        return (self.clip.low, self.clip.high) if isinstance(self.clip, ClipRange) else (self.clip, self.clip)

    @property
    def controlled(self) -> bool:
        """Whether queries ask for a control."""
        return self.combine != "weighted"


def draw_queries(
    prompts: Sequence[Prompt], tokenizer, step: int, config: AlgorithmConfig, seed: int, attributes: Attributes = PAPER
) -> list[Query]:
    """The queries of step `step`: prompts in a new seeded order each pass over them, ζ uniform over the corners (or none at all; of
    attributes with more levels over all of these: control.sample_corners).

    A pure function of its arguments: a resumed run asks what an undisturbed one would have asked.
    """
    count = config.queries_per_step
    controls = sample_corners(count, derive_seed(seed, "controls", step), attributes) if config.controlled else [None] * count
    orders: dict[int, np.ndarray] = {}
    queries = []
    for i, control in enumerate(controls):
        epoch, place = divmod(step * count + i, len(prompts))
        if epoch not in orders:
            orders[epoch] = np.random.default_rng(derive_seed(seed, "prompt-order", epoch)).permutation(len(prompts))
        prompt = prompts[orders[epoch][place]]
        ids = tuple(render(tokenizer, prompt.messages, control.spell() if control else "", attributes=attributes))
        queries += [
            Query(prompt.messages, control, ids, i, derive_seed(seed, "rollout", step, i, k)) for k in range(config.samples_per_query)
        ]
    return queries


def minibatch_rows(count: int, step: int, config: AlgorithmConfig, seed: int) -> list[np.ndarray]:
    """Rows of every optimiser step of one PPO step: each epoch uses every sample exactly once, in a new seeded order of the queries, whose
    samples stay together (they share the prompt, which is computed once)."""
    steps, queries = [], count // config.samples_per_query
    rows = np.arange(count).reshape(queries, config.samples_per_query)
    for epoch in range(config.epochs):
        order = np.random.default_rng(derive_seed(seed, "minibatches", step, epoch)).permutation(queries)
        steps += [rows[np.sort(part)].ravel() for part in np.array_split(order, min(config.minibatches, queries))]
    return steps


def make_experience(
    scored: Scored, config: AlgorithmConfig, beta: float, correction: float = 0.0, attributes: Attributes = PAPER
) -> Experience:
    """Rewards, advantages and returns of one step (METHOD, "RLHF"), whitened over the global batch, with the step's statistics.

    correction: cap of the importance weights of samples that an earlier policy drew (METHOD, "Off-policy correction"); 0 for none.

    A sample that lacks a score (NaN) has no reward: it takes part in no baseline, its advantages are 0, its returns the old values and its
    reference in a loss the old logprobs, so that it teaches nothing. The figures of scores and rewards leave it out, and reward/unscored
    counts such samples if there are any. DataError if all are such.
    """
    samples = scored.samples
    scores_BA = torch.as_tensor(scored.scores_BA, dtype=torch.float64)
    rewarded_B = ~scores_BA.isnan().any(1)
    if not rewarded_B.any():
        raise DataError(f"none of the {len(rewarded_B)} samples of this step has its scores: see what the scorers say of them")
    known_BA = torch.where(rewarded_B[:, None], scores_BA, 0)  # what stands in a row without a score has no effect
    if config.controlled:
        levels_BA = torch.tensor([q.control.levels for q in samples.queries], dtype=torch.float64)
        reward_B, binding_B = control_reward(levels_BA, known_BA, combine=config.combine)
    else:
        reward_B = weighted_reward(known_BA, tuple(config.weights[name] for name in attributes.names))
    finished_B = torch.as_tensor(samples.finished)
    earned_B = torch.where(finished_B, reward_B, 0) if config.truncated == "zero" else reward_B
    old_BT, ref_BT, values_BT = (pad_rows(rows).double() for rows in (scored.old_logprobs, scored.ref_logprobs, scored.values))
    mask_BT = pad_rows([np.ones(len(r), bool) for r in samples.response_ids]).bool()
    taught_BT = mask_BT & rewarded_B[:, None]

    in_loss = config.kl.place == "loss"
    rewards_BT = shaped_rewards(earned_B, old_BT, ref_BT, mask_BT, beta=0 if in_loss else beta, estimator=config.kl.estimator)
    pulled_BT = torch.where(rewarded_B[:, None], ref_BT, old_BT)  # from where they are, the others are pulled nowhere
    columns, corrected = {"old_logprobs": old_BT, **({"ref_logprobs": pulled_BT} if in_loss else {})}, {}
    if correction:
        columns["weights"], corrected = importance_weights(old_BT, pad_rows(samples.sampler_logprobs).double(), mask_BT, cap=correction)
    if config.advantage == "gae":
        advantages_BT, returns_BT = gae(rewards_BT, values_BT, mask_BT, gamma=config.gamma, lam=config.lam)
        returns_BT = torch.where(rewarded_B[:, None], returns_BT, values_BT)
        columns |= {"advantages": whiten(advantages_BT, taught_BT), "returns": returns_BT, "old_values": values_BT}
    else:
        groups_B, total_B = torch.tensor([q.group for q in samples.queries]), torch.where(rewarded_B, rewards_BT.sum(1), torch.nan)
        advantages_B = rloo(total_B, groups_B) if config.advantage == "rloo" else grpo(total_B, groups_B, deviation=config.deviation)
        columns |= {"advantages": advantages_B[:, None].expand_as(rewards_BT)}
    lengths = [len(r) for r in samples.response_ids]
    per_token = {name: [grid[i, :n].float().numpy() for i, n in enumerate(lengths)] for name, grid in columns.items()}
    tokens = samples.token_batch()
    stats = {
        **_reward_stats(scores_BA[rewarded_B], earned_B[rewarded_B], attributes),
        **(_control_stats(*(x[rewarded_B] for x in (levels_BA, scores_BA, earned_B, binding_B)), attributes) if config.controlled else {}),
        **({} if rewarded_B.all() else {"reward/unscored": int((~rewarded_B).sum())}),
        **_token_stats(scored, old_BT, ref_BT, mask_BT),
        **corrected,
        "beta": beta,
        "response/length": float(np.mean(lengths)),
        "response/truncated": float(1 - finished_B.double().mean()),
    }
    if config.advantage == "gae":
        stats["value/explained_variance"] = float(explained_variance(values_BT, columns["returns"], taught_BT))
    return Experience(TokenBatch(tokens.tokens, tokens.prompt_lengths, per_token, {}), stats)


def _reward_stats(scores_BA, earned_B, attributes: Attributes) -> dict[str, float]:
    stats = {"reward/mean": float(earned_B.mean()), "reward/std": float(earned_B.std(correction=0))}
    return stats | {f"score/{name}": float(scores_BA[:, a].mean()) for a, name in enumerate(attributes.names)}


def _control_stats(levels_BA, scores_BA, earned_B, binding_B, attributes: Attributes) -> dict[str, float]:
    """How near the scores came to the control, which attribute bound, and the reward of each cell that was asked."""
    agreement_BA = agreement(levels_BA, scores_BA)
    stats, bound = {}, binding_fractions(binding_B, attributes)
    for a, name in enumerate(attributes.names):
        stats |= {f"agreement/{name}": float(agreement_BA[:, a].mean()), f"binding/{name}": bound[name]}
    for cell in cells(attributes):
        of_cell = (levels_BA == torch.tensor(cell.levels, dtype=levels_BA.dtype)).all(1)
        if of_cell.any():
            stats[f"reward/{cell.name}"] = float(earned_B[of_cell].mean())
    return stats


def _token_stats(scored: Scored, old_BT, ref_BT, mask_BT) -> dict[str, float]:
    """KL estimates a sequence and a token, and how far the sampler's logprobs lie from the trainer's."""
    k1_BT, k3_BT = (torch.where(mask_BT, kl(old_BT, ref_BT), 0) for kl in (kl_k1, kl_k3))
    difference_BT = pad_rows(scored.samples.sampler_logprobs).double() - old_BT
    return {
        "kl/k1": float(k1_BT.sum(1).mean()),
        "kl/k3": float(k3_BT.sum(1).mean()),
        "kl/k1_token": float(masked_mean(k1_BT, mask_BT)),
        "mismatch/mean": float(masked_mean(difference_BT.abs(), mask_BT)),
        "mismatch/max": float(torch.where(mask_BT, difference_BT.abs(), 0).max()),
    }
