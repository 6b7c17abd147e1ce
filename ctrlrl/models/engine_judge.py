"""A judge that is a chat model on an engine of its own, in the scorer's worker (see judge.py)."""

from collections.abc import Sequence

import numpy as np

from ctrlrl.chat import chat_ids, text_ids
from ctrlrl.errors import DataError, ModelError
from ctrlrl.models.http_scorer import TRIED
from ctrlrl.models.judge import JudgeConfig
from ctrlrl.models.loading import check_policy, load_tokenizer
from ctrlrl.models.proof import proof_of
from ctrlrl.models.sampler import Sampler, SamplingConfig, prompt_room
from ctrlrl.prompts import Messages


class EngineJudge:
    """A chat model as a judge. calibration: of its scores. The engine is started by `start`; without it nothing is scored."""

    def __init__(self, config: JudgeConfig, calibration):
        self._config, self._calibration = config, calibration
        check_policy(config.model)
        self._tokenizer = load_tokenizer(config.model)
        self._answers = text_ids(self._tokenizer, list(config.answers), [config.name] * len(config.answers))
        for one, ids in zip(config.answers, self._answers, strict=True):
            for other, longer in zip(config.answers, self._answers, strict=True):
                if one != other and longer[: len(ids)] == ids:
                    raise ModelError(f"{config.name}: in its tokens the answer {other!r} begins with {one!r}: give others")
        longest = SamplingConfig(max_new_tokens=max(map(len, self._answers)) + 1)  # and one that is drawn in vain
        self._room = prompt_room(config.model, config.engine, longest, "judge")
        self._sampler: Sampler | None = None

    def start(self) -> "EngineJudge":
        """Load the model into an engine; once in a process, with the environment of models.sampler."""
        proof = proof_of(self._config.model, self._config.engine)
        self._sampler = Sampler(self._config.model, self._config.engine)
        proof.check(self._sampler.logprobs)
        return self

    def check(self) -> None:
        """ModelError unless its chat template takes the rubric with small conversations, and there is room for them."""
        for messages, answer in TRIED:
            try:
                too_long = self._asked(messages, answer) is None
            except DataError as error:
                raise ModelError(str(error)) from None
            if too_long:
                raise ModelError(f"{self._config.name}: the rubric leaves no room for a conversation in {self._room} tokens")

    def score(self, conversations: Sequence[tuple[Messages, str]]) -> np.ndarray:
        """Scores in [0, 1], fp32 [B], of (prompt messages, response text) pairs; NaN where there is no verdict."""
        return self._calibration(self.raw(conversations)).astype(np.float32)

    def raw(self, conversations: Sequence[tuple[Messages, str]]) -> np.ndarray:
        """The verdicts as scores, fp32 [B]; NaN for an answer on which the judge gives none."""
        return self.reasoned(conversations)[0]

    def reasoned(self, conversations: Sequence[tuple[Messages, str]]) -> tuple[np.ndarray, dict[int, str]]:
        """`raw`, and why there is no verdict, by row."""
        asked = [self._asked(messages, answer) for messages, answer in conversations]
        fit = [row for row, ids in enumerate(asked) if ids is not None]
        found = self._sampler.logprobs([[*asked[row], *answer] for row in fit for answer in self._answers])
        chances = np.exp([row[-len(answer) :].sum() for row, answer in zip(found, self._answers * len(fit), strict=True)])
        scores = np.full(len(conversations), np.nan, np.float32)
        reasons = {row: f"with the rubric it has more than {self._room} tokens" for row, ids in enumerate(asked) if ids is None}
        for row, given in zip(fit, chances.reshape(-1, len(self._answers)).tolist(), strict=True):
            scores[row], why = self._config.verdict(given)
            reasons |= {row: why} if why else {}
        return scores, reasons

    def _asked(self, messages: Messages, answer: str) -> list[int] | None:
        """Token ids of the question; a conversation that is too long loses its beginning, turn by turn. None if that is not enough."""
        for first in range(len(messages)):
            question = self._config.question(messages[first:], answer, literals=True)
            ids = chat_ids(self._tokenizer, [{"role": "user", "content": question}], prompt=True, source=self._config.name)
            if len(ids) <= self._room:
                return ids
        return None
