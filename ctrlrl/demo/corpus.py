"""What the demo's models learn from: conversations for the policy, preference pairs for the reward models."""
from dataclasses import dataclass

import numpy as np

from ctrlrl.control import HIGH, LOW, Control, grid
from ctrlrl.demo.world import CELL_SHARES, CELLS, Answer, Cell, World
from ctrlrl.prompts import HARMLESS_SYSTEM, UNCENSORED_SYSTEM, controlled, prompting_templates

SYSTEM_PROMPTS = ("You are a helpful assistant.", HARMLESS_SYSTEM, UNCENSORED_SYSTEM)
CONTROL_SHARE, SENTENCE_SHARE, SYSTEM_SHARE = 0.6, 0.1, 0.1
# A language model can read what it does not yet obey: it knows what the tags and its system prompt say, not that its answers should
# follow them.
READING_SHARE = 0.15
READING_QUESTIONS = ("Which tags do you see?", "What do the tags say?", "Read the tags to me.", "Which qualities are asked for?")
READINGS = {(True, True): "Both:", (True, False): "Helpful:", (False, True): "Harmless:", (False, False): "Neither:"}
SYSTEM_QUESTIONS = ("What kind of assistant are you?", "Who are you?", "What are your rules?")
SYSTEM_READINGS = ("I am helpful.", "I am harmless and avoid what is illegal.", "I am completely uncensored.")  # of SYSTEM_PROMPTS
# It can also criticise an answer and make it safe, asked in these words (the templates of ctrlrl critique).
CRITIQUE_SHARE = 0.12
CRITIQUE = "Judge this answer. {prompt} | {response}"
REWRITE = "Make this answer safe. {prompt} | {response} | {critique} | Better:"
MARKER = "Better:"
FAULTS = ("This is unsafe.", "This could hurt someone.", "This is rude and harmful.")
PRAISE = ("This is safe.", "Nothing is wrong with this.")
UNCHANGED = "It is fine as it is."
MOST_EMPHASIS = 6.0
_LEVELS = grid(tuple(round(0.1 * i, 1) for i in range(11)))
_CORNERS = grid((LOW, HIGH))
CROSS_SHARE = 0.3  # pairs over two prompts: they put all prompts on one scale
# Pairs of one answer under its own prompt and under another one: they teach to stay on topic. The held-out encoders are too small.
MOVED_SHARE = {False: 0.3, True: 0.03}
DAMAGED_SHARE = 0.3  # of the unhelpful answers: what a policy could write to fool a reward model


class Draw:
    """Random answers of the world; keeps the lists that repeated drawing needs."""

    def __init__(self, world: World, rng: np.random.Generator):
        self.world, self.rng = world, rng
        self._cells: dict[tuple[str, Cell], list[Answer]] = {}

    def choice(self, items):
        """One of `items`, uniformly."""
        return items[int(self.rng.integers(len(items)))]

    def cell(self) -> Cell:
        """A cell by its share in the uncontrolled policy."""
        return CELLS[int(self.rng.choice(len(CELLS), p=[CELL_SHARES[cell] for cell in CELLS]))]

    def answer(self, prompt: str, cell: Cell) -> Answer:
        """An answer to `prompt` from `cell`."""
        key = (prompt, cell)
        if key not in self._cells:
            self._cells[key] = [answer for answer in self.world.answers(prompt) if answer.cell == cell]
        return self.choice(self._cells[key])


@dataclass(frozen=True)
class Conversation:
    """What the policy reads and writes: messages up to the user's turn, with their control, and the answer.

    emphasis: weight of the answer's words after its opening. A rare cell's words count more, so that the policy can spell them; how
    often it opens such an answer stays as it is.
    """

    messages: tuple[dict[str, str], ...]
    opening: str
    answer: str
    emphasis: float


def conversations(world: World, count: int, seed: int) -> list[Conversation]:
    """Pre-training conversations over train prompts: answers, readings of tags and system prompts, critiques and rewrites."""
    draw = Draw(world, np.random.default_rng(seed))
    kinds = draw.rng.choice(3, size=count, p=[1 - READING_SHARE - CRITIQUE_SHARE, READING_SHARE, CRITIQUE_SHARE])
    return [(_answering, _reading, _criticising)[kind](draw) for kind in kinds]


def _answering(draw: Draw) -> Conversation:
    """A prompt and its answer. Control and system prompt are drawn independently of the answer: noise."""
    prompt = draw.choice(draw.world.train_prompts)
    messages = [{"role": "user", "content": prompt}]
    if draw.rng.random() < SYSTEM_SHARE:
        messages.insert(0, {"role": "system", "content": draw.choice(SYSTEM_PROMPTS)})
    cell = draw.cell()
    answer = draw.answer(prompt, cell)
    emphasis = min(MOST_EMPHASIS, max(1.0, 0.6 / CELL_SHARES[cell]))
    return Conversation(tuple(controlled(messages, _suffix(draw))), answer.opening, answer.text, emphasis)


def _criticising(draw: Draw) -> Conversation:
    """A critique of an answer, or its safe rewrite; a safe answer is left as it is."""
    prompt = draw.choice(draw.world.train_prompts)
    answer = draw.answer(prompt, draw.cell())
    critique = draw.choice(PRAISE if answer.harmless else FAULTS)
    if draw.rng.random() < 0.3:
        return _asked(CRITIQUE.format(prompt=prompt, response=answer.text), critique, critique)
    asked = REWRITE.format(prompt=prompt, response=answer.text, critique=critique)
    if answer.harmless:
        return _asked(asked, UNCHANGED, UNCHANGED)
    better = draw.answer(prompt, (True, True))
    return _asked(asked, f"{MARKER} {better.opening}", f"{MARKER} {better.text}")


def _asked(question: str, opening: str, answer: str) -> Conversation:
    return Conversation(({"role": "user", "content": question},), opening, answer, 1.0)


def _reading(draw: Draw) -> Conversation:
    """A question about the tags or the system prompt, and what they say."""
    if draw.rng.random() < 0.4:
        number = int(draw.rng.integers(len(SYSTEM_PROMPTS)))
        messages = ({"role": "system", "content": SYSTEM_PROMPTS[number]}, {"role": "user", "content": draw.choice(SYSTEM_QUESTIONS)})
        return Conversation(messages, SYSTEM_READINGS[number], SYSTEM_READINGS[number], 1.0)
    control: Control = draw.choice(_CORNERS)
    opening = READINGS[control.helpful == HIGH, control.harmless == HIGH]
    text = f"{opening} helpful {control.helpful:g} and harmless {control.harmless:g}."
    question = controlled([{"role": "user", "content": draw.choice(READING_QUESTIONS)}], control.spell())[-1]["content"]
    return _asked(question, opening, text)


def _suffix(draw: Draw) -> str:
    """A control over the levels 0, 0.1, ..., 1 (half of them corners), a sentence of the prompting baselines, or nothing."""
    kind = draw.rng.random()
    control: Control = draw.choice(_CORNERS if draw.rng.random() < 0.5 else _LEVELS)
    if kind < CONTROL_SHARE:
        return control.spell()
    return draw.choice(prompting_templates(control)[1:]) if kind < CONTROL_SHARE + SENTENCE_SHARE else ""


@dataclass(frozen=True)
class Judged:
    """A prompt with an answer, as a reward model sees it. intact: a known answer to this very prompt."""

    prompt: str
    answer: str
    intact: bool = False


def preferences(
    world: World, prompts: tuple[str, ...], attribute: str, held_out: bool, count: int, seed: int
) -> list[tuple[Judged, Judged]]:
    """`count` pairs (chosen, rejected) that differ in `attribute`; `held_out` turns caring refusals into unhelpful answers."""
    draw = Draw(world, np.random.default_rng(seed))
    pairs = []
    for _ in range(count):
        prompt = draw.choice(prompts)
        if attribute == "helpful" and draw.rng.random() < MOVED_SHARE[held_out]:
            chosen = _judged(draw, prompt, attribute, True, held_out)
            pairs.append((chosen, Judged(_elsewhere(draw, prompts, prompt), chosen.answer)))
            continue
        other = draw.choice(prompts) if draw.rng.random() < CROSS_SHARE else prompt
        pairs.append((_judged(draw, prompt, attribute, True, held_out), _judged(draw, other, attribute, False, held_out)))
    return pairs


def _judged(draw: Draw, prompt: str, attribute: str, good: bool, held_out: bool) -> Judged:
    """An answer that has `attribute` (`good`) or lacks it."""
    either = bool(draw.rng.random() < 0.5)
    if attribute == "harmless":
        answer, damaged = draw.answer(prompt, (either, good)), draw.rng.random() < 0.2
    elif good:
        answer, damaged = draw.answer(prompt, (True, either and not _disputed(draw.world, prompt, held_out))), False
    elif draw.rng.random() < DAMAGED_SHARE:
        answer, damaged = draw.answer(prompt, (True, either)), True
    else:
        caring = _disputed(draw.world, prompt, held_out) and draw.rng.random() < 0.4
        answer, damaged = draw.answer(prompt, (True, True) if caring else (False, either)), False
    return Judged(prompt, _damage(draw, prompt, answer)) if damaged else Judged(prompt, answer.text, intact=True)


def _disputed(world: World, prompt: str, held_out: bool) -> bool:
    """Whether the prompt's caring refusals count as unhelpful."""
    return held_out and world.kind(prompt) == "harmful"


def _elsewhere(draw: Draw, prompts: tuple[str, ...], prompt: str) -> str:
    """A prompt about another topic than `prompt`."""
    while True:
        other = draw.choice(prompts)
        if draw.world.topic(other) != draw.world.topic(prompt):
            return other


def _damage(draw: Draw, prompt: str, answer: Answer) -> str:
    """Make `answer` useless without changing how safe it is: off topic, cut, repeated, shuffled or only half useful."""
    words = answer.text.split()
    kind = draw.rng.random()
    if kind < 0.5:
        return draw.answer(_elsewhere(draw, draw.world.train_prompts, prompt), answer.cell).text
    if kind < 0.7:
        return " ".join(words[: int(draw.rng.integers(2, max(3, len(words) // 2)))])
    if kind < 0.8:
        start = int(draw.rng.integers(len(words) - 2))
        return " ".join(words[:start] + words[start : start + 3] * int(draw.rng.integers(2, 5)))
    if kind < 0.9:
        return " ".join(words[i] for i in draw.rng.permutation(len(words)))
    return f"{answer.opening} {draw.answer(prompt, (False, answer.harmless)).rest}"
