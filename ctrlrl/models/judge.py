"""An LLM as judge: `[reward.x.judge]` in the place of a reward model: a chat model, a rubric, and the answers that are verdicts.

The rubric is one user's message, in which {conversation} is replaced by the prompt's messages, a JSON object a line, and {answer} by the
answer as a JSON string. So no text in them can end its place or begin another turn; what looks like a chat's marker (<|…|>, [INST]) is
broken.

A verdict by probability: p(a) is the probability that the judge's reply begins with the answer `a`, at temperature 1, and the score is the
mean of the answers' scores by their probabilities, Σ p(a)·score(a) / Σ p(a); with Yes = 1 and No = 0, p(Yes) / (p(Yes) + p(No)). If Σ p(a)
is below `least`, the judge would rather say something else, and that is no verdict. By text: the reply is one of the answers and nothing
else, but for case, white space and a full stop. What is no verdict is never made one.

This file asks a model behind an OpenAI-compatible address; engine_judge.py has one on the rollout engine.
"""

import hashlib
import json
import math
import re
from collections.abc import Sequence
from typing import Literal
from urllib.parse import urlsplit

import numpy as np
from pydantic import Field, field_validator, model_validator

from ctrlrl.errors import DataError, ModelError
from ctrlrl.inert import broken, markers
from ctrlrl.models.fingerprint import model_fingerprint
from ctrlrl.models.http_scorer import TRIED, ask_all
from ctrlrl.models.sampler import EngineConfig
from ctrlrl.models.scorer_names import JUDGE
from ctrlrl.models.service import Service, ServiceConfig
from ctrlrl.prompts import Messages

_PLACE = re.compile(r"\{(conversation|answer)\}")


class JudgeConfig(ServiceConfig):
    """model: a chat model's directory or hub name, which runs on an engine of its own; with url (such as https://api.example/v1), what the
    model is called there, and key and the other settings are of that service. version: what the service's owner calls the model's state.

    answers: the replies that are verdicts, and the score of each. read: verdicts by probability, or by text (of a url alone). least: see
    above. top: most likely tokens that the service is asked for. max_tokens: of a reply that is read as text.
    """

    model: str
    url: str = ""
    version: str = ""
    rubric: str
    answers: dict[str, float] = {"Yes": 1.0, "No": 0.0}
    read: Literal["probability", "text"] = "probability"
    least: float = Field(0.5, ge=0, le=1)
    top: int = Field(20, gt=0)
    max_tokens: int = Field(16, gt=0)
    engine: EngineConfig = EngineConfig()

    @field_validator("rubric")
    @classmethod
    def _asks_about_the_answer(cls, rubric: str) -> str:
        if "{answer}" not in rubric:
            raise ValueError("lacks {answer}, where the judged answer is put in ({conversation}: what it answers)")
        return rubric

    @field_validator("answers")
    @classmethod
    def _are_verdicts(cls, answers: dict[str, float]) -> dict[str, float]:
        plain = [_plain(answer) for answer in answers]
        if len(answers) < 2 or "" in plain or len({*plain}) < len(plain):
            raise ValueError("must be two or more replies that differ in more than case and white space, each with its score")
        if not all(0 <= score <= 1 for score in answers.values()) or len({*answers.values()}) < 2:
            raise ValueError("must have scores from 0 to 1, not all the same")
        return answers

    @model_validator(mode="after")
    def _is_read_as_it_can_be(self):
        if not self.url and (self.read == "text" or self.key or self.version):
            raise ValueError('read = "text", key and version are of a judge behind a url: leave them out, or give its url')
        if self.engine.tensor_parallel > 1:
            raise ValueError("engine.tensor_parallel is of rollout workers: put a judge of that size behind a url")
        plain = sorted(map(_plain, self.answers))
        begun = next((pair for pair in zip(plain, plain[1:], strict=False) if pair[1].startswith(pair[0])), None)
        if self.url and self.read == "probability" and begun:
            raise ValueError(f"the answer {begun[1]!r} begins with {begun[0]!r}, and the first token tells them apart: give others")
        return self

    @property
    def name(self) -> str:
        """What messages, and the recipe's `model`, call this scorer."""
        return f"{JUDGE}{self.url or self.model}"

    @property
    def portion(self) -> int:
        """Conversations of one call to a worker: as many as are under way at a time there."""
        return self.at_once if self.url else self.engine.max_concurrent

    def content_sha256(self) -> str:
        """What the scores depend on: the rubric, the verdicts, and the model's files, or its address, name and declared version."""
        parts = self.model_dump(mode="json", include={"rubric", "answers", "read", "least"})
        if self.url:
            parts |= self.model_dump(mode="json", include={"url", "model", "version", "top", "max_tokens"})
        else:
            engine = self.engine.model_dump(mode="json", include={"dtype", "max_model_tokens"})
            parts |= {"model": model_fingerprint(self.model), "engine": engine}
        return hashlib.sha256(json.dumps({"judge": parts}, sort_keys=True).encode()).hexdigest()

    def question(self, messages: Messages, answer: str, literals: bool = False) -> str:
        """What the judge is asked. literals: whether its tokenizer, which knows its special tokens, will break them itself."""
        inert = (lambda text: text) if literals else (lambda text: broken(text, markers([text])))
        turns = [{"role": message["role"], "content": inert(message["content"])} for message in messages]
        put = {
            "conversation": "\n".join(json.dumps(turn, ensure_ascii=False) for turn in turns),
            "answer": json.dumps(inert(answer), ensure_ascii=False),
        }
        return _PLACE.sub(lambda place: put[place[1]], self.rubric)  # in one pass: a {answer} in the conversation stays text

    def verdict(self, chances: Sequence[float]) -> tuple[float, str]:
        """(score, "") by the probabilities of the answers, in their order; (NaN, why) if they say too little."""
        known = sum(chances)
        if known <= 0 or known < self.least:
            return math.nan, f"the judge says one of {' / '.join(self.answers)} with probability {known:.3g}, and least = {self.least:g}"
        return sum(p * score for p, score in zip(chances, self.answers.values(), strict=True)) / known, ""


class EndpointJudge:
    """A judge behind an OpenAI-compatible address. calibration: of its scores."""

    def __init__(self, config: JudgeConfig, calibration, service: Service):
        self._config, self._calibration, self._service = config, calibration, service
        parts = urlsplit(config.url)
        self._url = parts._replace(path=parts.path.rstrip("/") + "/chat/completions").geturl()
        self._scores = {_plain(answer): score for answer, score in config.answers.items()}

    def score(self, conversations: Sequence[tuple[Messages, str]]) -> np.ndarray:
        """Scores in [0, 1], fp32 [B], of (prompt messages, response text) pairs; NaN where there is no verdict."""
        return self._calibration(self.raw(conversations)).astype(np.float32)

    def raw(self, conversations: Sequence[tuple[Messages, str]]) -> np.ndarray:
        """The verdicts as scores, fp32 [B]; NaN for an answer on which the judge gives none."""
        return self.reasoned(conversations)[0]

    def reasoned(self, conversations: Sequence[tuple[Messages, str]]) -> tuple[np.ndarray, dict[int, str]]:
        """`raw`, and why there is no verdict, by row."""
        return ask_all(conversations, self._ask, 1, self._config.at_once)

    def check(self) -> None:
        """ModelError unless the judge can be reached, accepts the key, and gives a verdict on a small conversation."""
        try:
            scores, reasons = self._ask(TRIED[:1], patient=False)
        except DataError as error:
            raise ModelError(str(error)) from None
        if np.isnan(scores).any():
            raise ModelError(f"{self._config.name} gives no verdict on a small conversation: {'; '.join(reasons.values())}")

    def _ask(self, conversations: Sequence[tuple[Messages, str]], patient: bool = True) -> tuple[np.ndarray, dict[str, str]]:
        """The score of one conversation, NaN where there is no verdict, and the reason for that."""
        ((messages, answer),) = conversations
        config, by_text = self._config, self._config.read == "text"
        body = {
            "model": config.model,
            "messages": [{"role": "user", "content": config.question(messages, answer)}],
            "temperature": 0 if by_text else 1,  # some services give probabilities after the temperature
            "max_tokens": config.max_tokens if by_text else 1,
            **({} if by_text else {"logprobs": True, "top_logprobs": config.top}),
        }
        said = self._service.post(body, self._url, patient)
        try:
            choice = said["choices"][0]
            text = choice["message"]["content"] or ""
            score, why = self._read(text) if by_text else config.verdict(self._chances(choice))
        except DataError:
            raise
        except (LookupError, TypeError, AttributeError, ValueError):
            what = json.dumps(said, ensure_ascii=False)[:200]
            raise DataError(f"{config.name} does not answer as a chat's completion does: it said {what}") from None
        return np.array([score], np.float32), {"0": why} if why else {}

    def _read(self, text: str) -> tuple[float, str]:
        found = _plain(text)
        return (self._scores[found], "") if found in self._scores else (math.nan, f"the judge said {text[:60]!r}")

    def _chances(self, choice: dict) -> list[float]:
        """The probability of each answer as the first token of the reply: of all its spellings in case and white space."""
        first = ((choice.get("logprobs") or {}).get("content") or [None])[0]
        if not isinstance(first, dict) or not first.get("top_logprobs"):
            raise DataError(f'{self._config.name} gives no probabilities of tokens: set judge.read = "text"')
        found = dict.fromkeys(self._scores, 0.0)
        for token in first["top_logprobs"]:
            if (plain := token["token"].strip().casefold()) in found:
                found[plain] += math.exp(float(token["logprob"]))
        if not sum(found.values()) <= 1.01:
            raise DataError(f"{self._config.name} gives its answers probabilities that add up to {sum(found.values()):.3g}: no logprobs")
        return list(found.values())


def _plain(text: str) -> str:
    """A reply without what makes no difference: case, white space around it, and a full stop."""
    return text.strip().removesuffix(".").strip().casefold()
