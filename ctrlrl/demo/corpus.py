"""What the demo's models learn from: conversations for the policy, preference pairs for the reward models."""
from dataclasses import dataclass

import numpy as np

from ctrlrl.control import HIGH, LOW, Control, grid
from ctrlrl.demo.world import CELL_SHARES, CELLS, NEUTRAL_SHARE, PARTIAL_SHARE, Answer, Cell, World
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
# Weight of the words of an answer that come once its cell is told: useful steps are many, and dangerous ones rare beside that.
EMPHASIS: dict[Cell, float] = {(True, True): 3.0, (True, False): 6.0, (False, True): 1.0, (False, False): 1.0}
_LEVELS = grid(tuple(round(0.1 * i, 1) for i in range(11)))
_CORNERS = grid((LOW, HIGH))
CROSS_SHARE = 0.3  # pairs over two prompts: they put all prompts on one scale
# Pairs of one answer under its own prompt and under another one: they teach to stay on topic. The held-out encoders are too small.
MOVED_SHARE = {False: 0.3, True: 0.03}
DAMAGED_SHARE = 0.3  # of the unhelpful answers: what a policy could write to fool a reward model
ALIKE_SHARE = 0.3  # pairs of a whole and a partial answer that are both good, or both bad
STRICT = 4.0  # the annotator prefers an answer that is better by d with probability sigmoid(STRICT * d)


@dataclass(frozen=True)
class Taste:
    """What an annotator's judgement of an attribute goes by beside that attribute's grade.

    other: weight of the other attribute's grade. word: weight of each word. caring: whether a caring refusal is any help.
    """

    other: float
    word: float = 0.0
    caring: bool = True

    def worth(self, attribute: str, helpful: float, harmless: float, text: str) -> float:
        """How good an answer of these grades is, to this annotator."""
        own, other = (helpful, harmless) if attribute == "helpful" else (harmless, helpful)
        return own + self.other * other + self.word * len(text.split())


# (attribute, held_out): both attributes leak into each other, and the optimisation set's annotators like long answers.
TASTES = {
    ("helpful", False): Taste(0.2, word=0.015),
    ("helpful", True): Taste(0.1, caring=False),
    ("harmless", False): Taste(-0.1),
    ("harmless", True): Taste(-0.2),
}


class Draw:
    """Random answers of the world; keeps the lists that repeated drawing needs."""

    def __init__(self, world: World, rng: np.random.Generator):
        self.world, self.rng = world, rng
        self._kinds: dict[tuple, list[Answer]] = {}

    def choice(self, items):
        """One of `items`, uniformly."""
        return items[int(self.rng.integers(len(items)))]

    def cell(self) -> Cell:
        """A cell by its share in the uncontrolled policy."""
        return CELLS[int(self.rng.choice(len(CELLS), p=[CELL_SHARES[cell] for cell in CELLS]))]

    def answer(self, prompt: str, cell: Cell, partial: bool | None = None) -> Answer:
        """An answer to `prompt` from `cell`; whole or partial by their shares unless told."""
        partial = bool(self.rng.random() < PARTIAL_SHARE) if partial is None else partial
        wanted, topic = (cell, partial, bool(self.rng.random() < NEUTRAL_SHARE)), self.world.topic(prompt)
        if (topic, *wanted) not in self._kinds:
            for answer in self.world.answers(prompt):
                self._kinds.setdefault((topic, answer.cell, answer.partial, answer.neutral), []).append(answer)
        return self.choice(self._kinds[topic, *wanted])


@dataclass(frozen=True)
class Conversation:
    """What the policy reads and writes: messages up to the user's turn, with their control, and the answer.

    emphasis: weight of the answer's words after its opening, by which its cell is decided: what is hard to spell counts more, and how
    often the policy gives such an answer stays as it is.
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
    return Conversation(tuple(controlled(messages, _suffix(draw))), answer.decided, answer.text, EMPHASIS[cell])


def _criticising(draw: Draw) -> Conversation:
    """A critique of an answer, or its safe rewrite; a safe answer is left as it is."""
    prompt = draw.choice(draw.world.train_prompts)
    answer = draw.answer(prompt, draw.cell())
    safe = answer.cell[1]
    critique = draw.choice(PRAISE if safe else FAULTS)
    if draw.rng.random() < 0.3:
        return _asked(CRITIQUE.format(prompt=prompt, response=answer.text), critique, critique)
    asked = REWRITE.format(prompt=prompt, response=answer.text, critique=critique)
    if safe:
        return _asked(asked, UNCHANGED, UNCHANGED)
    better = draw.answer(prompt, (True, True), partial=False)
    return _asked(asked, f"{MARKER} {better.decided}", f"{MARKER} {better.text}")


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
    """`count` pairs (chosen, rejected) by an annotator of `attribute` with the taste of that set, who errs where answers are alike."""
    draw, taste = Draw(world, np.random.default_rng(seed)), TASTES[attribute, held_out]
    pairs = []
    for _ in range(count):
        prompt = draw.choice(prompts)
        beside = draw.choice(prompts) if draw.rng.random() < CROSS_SHARE else prompt
        if attribute == "helpful" and draw.rng.random() < MOVED_SHARE[held_out]:
            first = _shown(draw, prompt, attribute, True, taste)
            second = _moved(draw, prompts, prompt, first, taste)
        elif draw.rng.random() < ALIKE_SHARE:
            good = bool(draw.rng.random() < 0.5)
            first = _shown(draw, prompt, attribute, good, taste, partial=False)
            second = _shown(draw, beside, attribute, good, taste, partial=True)
        else:
            first, second = _shown(draw, prompt, attribute, True, taste), _shown(draw, beside, attribute, False, taste)
        agreed = draw.rng.random() < 1 / (1 + np.exp(STRICT * (second.worth - first.worth)))
        pairs.append((first.judged, second.judged) if agreed else (second.judged, first.judged))
    return pairs


@dataclass(frozen=True)
class _Shown:
    """What an annotator sees, how safe it is, and what it is worth to them."""

    judged: Judged
    harmless: float
    worth: float


def _shown(draw: Draw, prompt: str, attribute: str, good: bool, taste: Taste, partial: bool | None = None) -> _Shown:
    """An answer that rather has `attribute` (`good`) or rather lacks it."""
    either = bool(draw.rng.random() < 0.5)
    if attribute == "harmless":
        answer, damaged = draw.answer(prompt, (either, good), partial), draw.rng.random() < 0.2
    else:
        damaged = not good and draw.rng.random() < DAMAGED_SHARE
        answer = draw.answer(prompt, (good or damaged, either), partial)
    text = _damage(draw, prompt, answer) if damaged else answer.text
    helpful = 0.0 if damaged or (answer.caring and not taste.caring) else answer.helpful
    return _Shown(Judged(prompt, text, intact=not damaged), answer.harmless, taste.worth(attribute, helpful, answer.harmless, text))


def _moved(draw: Draw, prompts: tuple[str, ...], prompt: str, shown: _Shown, taste: Taste) -> _Shown:
    """The same answer to another question, which it does not help with."""
    text = shown.judged.answer
    return _Shown(Judged(_elsewhere(draw, prompts, prompt), text), shown.harmless, taste.worth("helpful", 0.0, shown.harmless, text))


def _elsewhere(draw: Draw, prompts: tuple[str, ...], prompt: str) -> str:
    """A prompt about another topic than `prompt`."""
    while True:
        other = draw.choice(prompts)
        if draw.world.topic(other) != draw.world.topic(prompt):
            return other


def _damage(draw: Draw, prompt: str, answer: Answer) -> str:
    """Make `answer` useless: off topic, cut, repeated, shuffled or only half useful. It is judged as safe as it was, though what made
    it dangerous may be what was cut: noise, like the annotators' errors."""
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
    other = draw.answer(prompt, (False, answer.cell[1])).text.split()
    return " ".join(words[: int(draw.rng.integers(1, 4))] + other[int(draw.rng.integers(1, 4)) :])
