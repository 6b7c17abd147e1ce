"""Prompts as a job can ask them: rendered, and, where that is allowed, without those that its chat template or its engine does not take."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from pydantic import Field

from actors.placement import ClusterConfig
from actors.rollout import RolloutConfig
from ctrlrl.attributes import PAPER, Attributes
from ctrlrl.chat import ChatVariables, with_variables
from ctrlrl.config import Section
from ctrlrl.data.rejects import BadRows, Reject
from ctrlrl.data.sources import PreferencePair, Prompt, PromptSet
from ctrlrl.errors import DataError
from ctrlrl.models.conversations import reader_of
from ctrlrl.models.loading import load_tokenizer
from ctrlrl.models.sampler import SamplingConfig, prompt_room
from ctrlrl.prompts import Messages, render

Asked = Callable[[Prompt], Sequence[tuple[Messages, str]]]  # every form in which a prompt will be asked: messages and their suffix


def askable(
    tokenizer, read: PromptSet, room: int, skip: bool, asked: Asked, judges: Iterable[str] = (), attributes: Attributes = PAPER
) -> tuple[list[Prompt], list[list[list[int]]], list[Reject]]:
    """The prompts of which every form can be rendered and has at most `room` tokens, and which the reward models `judges` can read; the
    token ids of their forms; and the others.

    DataError if there are others, unless `skip`; and if no prompt is left.
    """
    prompts, rendered, aside, long = [], [], [], []
    refused, readers = BadRows(aside if skip else None), [reader_of(model) for model in dict.fromkeys(judges)]
    for prompt in read:
        try:
            forms = [render(tokenizer, m, suffix, source=prompt.source, attributes=attributes) for m, suffix in asked(prompt)]
            for reader in readers:
                reader(prompt.messages, prompt.source)
        except DataError as error:
            refused.add(prompt.source, str(error).removeprefix(f"{prompt.source}: "))
            continue
        longest = max(map(len, forms))
        if longest > room:
            reason = f"the prompt has {longest} tokens and leaves no room for an answer: at most {room} fit"
            long.append(Reject(prompt.source, reason, ""))
        else:
            prompts.append(prompt)
            rendered.append(forms)
    refused.refuse(len(read))
    if long and not (skip and prompts):
        raise DataError(
            f"{len(long)} of {len(read)} prompts exceed {room} tokens, the first at {long[0].source}: raise "
            "rollout.engine.max_model_tokens, lower sampling.max_new_tokens, or set them aside with --skip-bad-rows"
        )
    if not prompts:
        raise DataError(f"no prompt is left, the first set aside was {aside[0].source}: {aside[0].reason}")
    return prompts, rendered, [*aside, *long]


def renderable(
    pairs: Sequence[PreferencePair], render_pair: Callable[[PreferencePair], object], rejects: list[Reject]
) -> list[PreferencePair]:
    """The pairs that `render_pair` does not refuse; the others go to `rejects`. DataError if none is left."""
    kept, bad = [], BadRows(rejects)
    for pair in pairs:
        try:
            render_pair(pair)
            kept.append(pair)
        except DataError as error:
            bad.add(pair.source, str(error).removeprefix(f"{pair.source}: "))
    if not kept:
        raise DataError(f"no preference pair is left, the last set aside was {rejects[-1].source}: {rejects[-1].reason}")
    return kept


class DrawnRecipe(Section):
    """What every recipe has by which a policy answers prompts, beside samples_per_prompt, and shard: samples of one engine call and one
    file, whole prompts. prompts: file, directory or hub data set."""

    seed: int = 0
    policy: str
    chat: ChatVariables = {}
    prompts: str
    max_prompts: int | None = Field(None, gt=0)
    skip_bad_rows: bool = False
    cluster: ClusterConfig = ClusterConfig()
    rollout: RolloutConfig = RolloutConfig()
    sampling: SamplingConfig = SamplingConfig()


def fitting(
    config: DrawnRecipe, read: PromptSet, skip: bool, judges: Iterable[str] = (), attributes: Attributes = PAPER
) -> tuple[list[Prompt], list[np.ndarray], list[Reject]]:
    """The prompts that leave room for an answer of config.policy and that the reward models `judges` can read, their token ids without a
    control, and the others; DataError unless `skip`."""
    tokenizer = with_variables(load_tokenizer(config.policy), config.chat)
    room = prompt_room(config.policy, config.rollout.engine, config.sampling)
    prompts, rendered, aside = askable(tokenizer, read, room, skip, lambda prompt: [(prompt.messages, "")], judges, attributes)
    return prompts, [np.array(ids, np.int32) for (ids,) in rendered], aside


def report(read: PromptSet, kept: int, long: int) -> str:
    """What was read, in a line."""
    r = read.report
    files = f"{len(r.files)} file{'s' * (len(r.files) != 1)}"
    return f"prompts: {kept} of {r.rows} rows in {files}; {r.duplicates} repeated, {r.rejected} unreadable and {long} overlong set aside"
