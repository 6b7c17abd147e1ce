"""Prompts as a job can ask them: rendered, and, where that is allowed, without those that its chat template or its engine does not take."""

from collections.abc import Callable, Iterable, Sequence

from ctrlrl.attributes import PAPER, Attributes
from ctrlrl.data.rejects import BadRows, Reject
from ctrlrl.data.sources import PreferencePair, Prompt, PromptSet
from ctrlrl.errors import DataError
from ctrlrl.models.conversations import reader_of
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
