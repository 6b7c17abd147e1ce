"""What a server does with a request between its HTTP and its engine: who asks, for what, by which prompt, within which limits."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, Protocol

from ctrlrl.attributes import HIGH, LOW, unlike
from ctrlrl.errors import CtrlrlError, DataError
from ctrlrl.prompts import HARMLESS_SYSTEM, UNCENSORED_SYSTEM, Messages, render
from ctrlrl.serving.asked import Asked, Refused, asked
from ctrlrl.serving.audit import AuditLog
from ctrlrl.serving.limits import Gate
from ctrlrl.serving.policies import KIND, Caller, Dial, Policies, caller_of
from ctrlrl.serving.rerank import as_events, candidates, chosen

_SHORT = 2000  # characters
Scores = Callable[[Messages, Sequence[str]], list[dict[str, float | None]]]  # None where a scorer gives none


class Model(Protocol):
    """What answers: models.served.ServedModel."""

    name: str
    max_model_tokens: int
    healthy: bool

    async def answer(self, fields: dict, prompt_ids: Sequence[int], salt: str) -> tuple[Any, Any]: ...

    def metrics(self) -> bytes: ...


@dataclass
class Visit:
    """One request from its arrival to its audit line."""

    path: str
    began: float = field(default_factory=time.monotonic)
    caller: Caller | None = None
    asked: Asked | None = None
    drawn: Any = None
    held: ExitStack = field(default_factory=ExitStack)  # its place among the requests under way


class Service:
    """A model behind an operator's policies. tokenizer: the model's; scores: of answers, by the two reward models, where there are any."""

    def __init__(self, model: Model, tokenizer, policies: Policies, kind: KIND, scores: Scores | None = None):
        self.model, self.kind, self.policies = model, kind, policies
        self.gate, self.counts = Gate(), Counter()
        self._tokenizer, self._scores = tokenizer, scores
        self._audit = AuditLog(policies.audit)
        # One thread each: neither a tokenizer nor a reward model is used by two at a time, and the event loop goes on meanwhile.
        self._rendering, self._scoring = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._tokenizing = Lock()

    @property
    def has_scores(self) -> bool:
        """Whether reward models are there."""
        return self._scores is not None

    def take(self, policies: Policies) -> None:
        """Go on under other policies, and with a new audit file; requests under way keep theirs. CtrlrlError: the old ones stay."""
        check_kind(policies, self.kind)
        if policies.rewards != self.policies.rewards:
            raise DataError("rewards cannot change while the server runs: start it anew")
        if other := unlike(policies.attributes, self.policies.attributes):
            raise DataError(f"attributes cannot change while the server runs ({other}): start it anew")
        log = AuditLog(policies.audit)
        self._audit, old = log, self._audit
        self.policies = policies
        old.close()

    def known(self, authorization: str | None) -> Caller:
        """Who asks; Refused for a wrong key."""
        caller = caller_of(self.policies, authorization)
        if caller is None:
            raise Refused(401, "give a key that this server knows: Authorization: Bearer KEY")
        return caller

    def admitted(self, visit: Visit, authorization: str | None) -> Caller:
        """Who asks for an answer; Refused for a wrong key, or one whose requests are spent."""
        visit.caller = self.known(authorization)
        self.gate.spend(visit.caller.name, self.policies.limits)
        return visit.caller

    async def chat(self, visit: Visit, body: dict[str, Any]) -> dict | AsyncIterator[str]:
        """The answer to a chat request: an object, or events where it asks for a stream. Refused where it may not be answered."""
        policies, caller = self.policies, visit.caller
        request = visit.asked = asked(body, policies, self.kind, caller, self.model.name)
        visit.held.enter_context(self.gate.entered(caller.name, policies.limits))
        ids = await self._ids(request.messages, request.dial)
        fields = {**request.fields, "max_tokens": self._room(request, len(ids), policies)}
        if request.dial.rerank > 1:
            return await self._best(visit, fields, ids)
        answer, visit.drawn = await self._answered(fields, ids, caller.name)
        return answer

    async def score(self, messages: list[dict[str, str]]) -> dict[str, float]:
        """The reward models' scores of a conversation that ends with an answer."""
        if self._scores is None:
            raise Refused(404, "this server has no reward models: give [rewards] in its file")
        scores = (await self._scored(messages[:-1], [messages[-1]["content"]]))[0]
        if lacking := [name for name, score in scores.items() if score is None]:
            raise Refused(400, f"what scores {' and '.join(lacking)} gives this answer no score", "messages")
        return scores

    def done(self, visit: Visit, status: int, param: str | None = None) -> None:
        """Give the request's place back, and write its audit line."""
        visit.held.close()
        dial, drawn = visit.asked.dial_name if visit.asked else None, visit.drawn
        self.counts[dial or "", status] += 1
        line = {
            "key": visit.caller.name if visit.caller else None, "path": visit.path, "dial": dial, "status": status,
            "prompt_tokens": len(drawn.prompt_ids) if drawn else 0, "completion_tokens": drawn.completion_tokens if drawn else 0,
            "seconds": round(time.monotonic() - visit.began, 3), **({"param": param} if param else {}),
        }  # fmt: skip
        if self._audit.text and drawn:
            answers = [drawn.texts[i] for i in sorted(drawn.texts)]
            line |= {"messages": visit.asked.messages, "prompt_ids": drawn.prompt_ids, "answers": answers}
        self._audit.write(**line)

    def dials(self, caller: Caller) -> dict[str, Any]:
        """What a client may know of the dials."""
        system = self.kind == "system"
        return {
            "model": self.model.name, "kind": self.kind, "attributes": [] if system else list(self.policies.attributes.names),
            **({"systems": [HARMLESS_SYSTEM, UNCENSORED_SYSTEM]} if system else {}),
            "levels": {"low": LOW, "high": HIGH}, "dials": list(caller.dials), "operator": caller.operator, "scores": self.has_scores,
        }  # fmt: skip

    def metrics(self) -> bytes:
        """The engine's metrics, and requests by dial and status."""
        lines = ["# HELP ctrlrl_requests_total Requests by dial and HTTP status.", "# TYPE ctrlrl_requests_total counter"]
        named = set(self.policies.dials) | {""}
        counts: Counter = Counter()
        for (dial, status), count in self.counts.items():
            counts[dial if dial in named else "operator", status] += count
        lines += [f'ctrlrl_requests_total{{dial="{d}",status="{s}"}} {count}' for (d, s), count in sorted(counts.items())]
        lines += ["# HELP ctrlrl_requests_running Requests under way.", "# TYPE ctrlrl_requests_running gauge"]
        return self.model.metrics() + "\n".join([*lines, f"ctrlrl_requests_running {self.gate.running}", ""]).encode()

    def close(self) -> None:
        """Close the audit file and end the threads."""
        self._audit.close()
        self._rendering.shutdown(wait=False, cancel_futures=True)
        self._scoring.shutdown(wait=False, cancel_futures=True)

    async def _ids(self, messages: Messages, dial: Dial) -> list[int]:
        """The prompt by the code that training renders it by."""
        whole = [{"role": "system", "content": dial.system}, *messages] if dial.system is not None else list(messages)
        suffix = "" if dial.system is not None else dial.suffix
        try:
            if sum(len(m["content"]) for m in whole) < _SHORT and self._tokenizing.acquire(blocking=False):
                try:  # in less time than it takes to hand it to another thread
                    return render(self._tokenizer, whole, suffix, attributes=self.policies.attributes)
                finally:
                    self._tokenizing.release()
            return await asyncio.get_running_loop().run_in_executor(self._rendering, self._rendered, whole, suffix)
        except CtrlrlError as error:
            raise Refused(400, str(error), "messages") from None

    def _rendered(self, messages: Messages, suffix: str) -> list[int]:
        with self._tokenizing:
            return render(self._tokenizer, messages, suffix, attributes=self.policies.attributes)

    def _room(self, request: Asked, prompt: int, policies: Policies) -> int:
        """Tokens of the answer; Refused if the prompt, or the prompt and what is asked for, are more than the model takes."""
        most = self.model.max_model_tokens
        room = most - prompt
        if room < 1:
            raise Refused(400, f"messages are {prompt} tokens, and the model has {most} for them and its answer", "messages")
        if request.max_tokens is not None and request.max_tokens > room:
            raise Refused(400, f"max_tokens = {request.max_tokens}, but the prompt of {prompt} tokens leaves {room}", "max_tokens")
        return request.max_tokens or min(room, policies.limits.max_new_tokens or room)

    async def _answered(self, fields: dict, ids: list[int], key: str):
        try:
            return await self.model.answer(fields, ids, key)
        except ValueError as error:
            raise Refused(400, str(error), getattr(error, "param", None)) from None
        except RuntimeError as error:
            raise Refused(500 if self.model.healthy else 503, f"the engine failed: {error}") from None

    async def _best(self, visit: Visit, fields: dict, ids: list[int]) -> dict | AsyncIterator[str]:
        """Of several answers the one whose scores are nearest to the dial; a stream gets it in one piece."""
        dial = visit.asked.dial
        answer, visit.drawn = await self._answered(candidates(fields, dial.rerank), ids, visit.caller.name)
        scores = await self._scored(visit.asked.messages, [choice["message"].get("content") or "" for choice in answer["choices"]])
        best = chosen(answer, scores, dial.control)
        return as_events(best, fields) if visit.asked.stream else best

    async def _scored(self, messages: Messages, answers: Sequence[str]) -> list[dict[str, float | None]]:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._scoring, self._scores, messages, answers)
        except DataError as error:
            raise Refused(400, str(error), "messages") from None


def check_kind(policies: Policies, kind: KIND) -> None:
    """Raise DataError if the policies have dials of another kind than the model's."""
    odd = next((name for name, dial in policies.dials.items() if dial.kind != kind), None)
    if odd is not None:
        raise DataError(f"dials.{odd} is of kind {policies.dials[odd].kind!r}, but this model has dials of kind {kind!r}")
