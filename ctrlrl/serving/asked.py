"""What a request may hold, by an allow-list: everything that could touch the prompt is refused with the field's name."""

import json
from dataclasses import dataclass
from typing import Any

from ctrlrl.serving.policies import KIND, Caller, Dial, Policies, first_dial, made_dial

# Fields that say how an answer is drawn and shown; what is asked stays as it is.
DRAWING = frozenset({
    "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty", "seed", "n", "stop",
    "max_tokens", "max_completion_tokens", "logprobs", "top_logprobs", "stream", "stream_options",
})  # fmt: skip
LABELS = frozenset({"user", "metadata", "safety_identifier"})  # of the client's own book-keeping: taken, and not looked at
# These force or forbid words of an answer, and can undo a dial: an answer that must begin with "Sure" is no refusal.
CONSTRAINTS = frozenset({
    "logit_bias", "response_format", "structured_outputs", "bad_words", "allowed_token_ids", "stop_token_ids", "min_tokens", "ignore_eos",
    "include_stop_str_in_output",
})  # fmt: skip
OPERATORS = frozenset({"dial", "return_token_ids"})
# Values that say nothing: clients that send every field they know send these.
NEUTRAL = {
    "tools": [], "functions": [], "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"], "store": False,
    "parallel_tool_calls": True, "add_generation_prompt": True, "continue_final_message": False, "add_special_tokens": False,
    "echo": False, "service_tier": "auto", "logit_bias": {},
}  # fmt: skip
_ALTERNATIVES = 20  # of a token, in logprobs: as many as OpenAI's API and vLLM give
_STOPS = 16  # each is looked for in every token that is drawn
_ROLES = ("user", "assistant")
_SYSTEM = ("system", "developer")


class Refused(Exception):
    """A request that is not answered: HTTP status, message, and the field that is at fault."""

    def __init__(self, status: int, message: str, param: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param = status, message, param

    def body(self) -> dict:
        """The error as OpenAI's clients read it."""
        kind = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.status}}


@dataclass(frozen=True)
class Asked:
    """A request that may be answered. fields: those of DRAWING and its like, for the engine."""

    messages: tuple[dict[str, str], ...]
    dial_name: str
    dial: Dial
    fields: dict[str, Any]

    @property
    def stream(self) -> bool:
        """Whether the answer is wanted in pieces."""
        return bool(self.fields.get("stream"))

    @property
    def max_tokens(self) -> int | None:
        """Tokens that the answer may have; None for as many as there is room for."""
        return self.fields.get("max_tokens")


def parse(body: bytes) -> dict[str, Any]:
    """The JSON object of a body. Refused: anything else, a key given twice, NaN, and text that is not Unicode."""
    try:
        value = json.loads(body.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_constant)
        if b"\\ud" in body.lower():
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeError:
        raise Refused(400, "the body is not UTF-8 text, or holds half a surrogate pair") from None
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise Refused(400, "the body is not a JSON object")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise Refused(400, f"{_short(twice)} is given twice", _short(twice))
    return found


def _no_constant(name: str):
    raise ValueError(f"{name} is not JSON")


def asked(body: dict[str, Any], policies: Policies, kind: KIND, caller: Caller, model: str) -> Asked:
    """What `body` asks for. Refused, naming the field, where it asks for anything that is not the caller's to ask."""
    given = {name: value for name, value in body.items() if value is not None}
    known = {"messages", "model"} | DRAWING | LABELS
    known |= CONSTRAINTS if policies.constraints == "allowed" else set()
    for name, value in given.items():
        if name in known or (name in OPERATORS and caller.operator) or _same(value, NEUTRAL.get(name)):
            continue
        raise Refused(400, _why_not(name), _short(name))
    name, dial = _dial(given, policies, kind, caller, model)
    fields = {name: value for name, value in given.items() if name in DRAWING | (CONSTRAINTS & known) | {"return_token_ids"}}
    _check_drawing(fields, policies, dial)
    return Asked(tuple(_messages(given.get("messages"), policies)), name, dial, fields)


def _why_not(name: str) -> str:
    if name in OPERATORS:
        return f"{name} is the operator's to set"
    if name in CONSTRAINTS:
        return f"{name} forces or forbids words of the answer, which this server does not allow"
    return f"{_short(name)} is not a field that a request may set here"


def _same(value: Any, neutral: Any) -> bool:
    return neutral is not None and json.dumps(value) == json.dumps(neutral)


def _short(name: str) -> str:
    """A field's name, fit for a message: ASCII, and not long."""
    return name[:64].encode("ascii", "backslashreplace").decode()


def _dial(given: dict, policies: Policies, kind: KIND, caller: Caller, model: str) -> tuple[str, Dial]:
    """The name and the dial of a request. A dial that is not the caller's is as unknown as one that does not exist."""
    name = given.get("model", model)
    if not isinstance(name, str):
        raise Refused(400, "model is a text", "model")
    base, colon, chosen = name.partition(":")
    if base != model or (colon and chosen not in caller.dials):
        raise Refused(404, f"there is no model {_short(name)!r} for this key", "model")
    if "dial" in given:
        if colon:
            raise Refused(400, "give dial, or a dial's name behind the model's, not both", "dial")
        try:
            dial = made_dial(kind, given["dial"], policies.attributes)
        except ValueError as error:
            raise Refused(400, f"dial: {error}", "dial") from None
        return dial.spelled, dial
    if colon:
        return chosen, policies.dials[chosen]
    first = first_dial(policies, kind, caller)
    if first is None:
        raise Refused(403, "this key may use no dial")
    return first


def _check_drawing(fields: dict, policies: Policies, dial: Dial) -> None:
    """Limits of what is drawn; `max_completion_tokens` becomes `max_tokens`. All other checks of values are the engine's."""
    limits = policies.limits
    lengths = {name: fields.pop(name) for name in ("max_tokens", "max_completion_tokens") if name in fields}
    for name, length in lengths.items():
        fields["max_tokens"] = _whole(length, name, 1, limits.max_new_tokens or None)
    if len(set(lengths.values())) > 1:
        raise Refused(400, "max_tokens and max_completion_tokens differ: give one", "max_completion_tokens")
    if "n" in fields:
        _whole(fields["n"], "n", 1, 1 if dial.rerank > 1 else limits.max_answers)
    if "top_logprobs" in fields:
        _whole(fields["top_logprobs"], "top_logprobs", 0, _ALTERNATIVES)
    if isinstance(fields.get("stop"), list) and len(fields["stop"]) > _STOPS:
        raise Refused(400, f"stop has {_STOPS} texts at most", "stop")
    for name in ("stream", "logprobs", "return_token_ids"):
        if not isinstance(fields.get(name, False), bool):
            raise Refused(400, f"{name} is true or false", name)
    temperature = fields.get("temperature", 0)
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)) or not 0 <= temperature <= limits.max_temperature:
        raise Refused(400, f"temperature is a number from 0 to {limits.max_temperature:g}", "temperature")
    if dial.rerank > 1 and (shown := sorted({"logprobs", "return_token_ids"} & {name for name, value in fields.items() if value})):
        raise Refused(400, f"{shown[0]} is not given with a dial that chooses among answers", shown[0])


def _whole(value: Any, name: str, low: int, high: int | None) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        raise Refused(400, f"{name} is a whole number from {low}" + (f" to {high}" if high is not None else ""), name)
    return value


def _messages(messages: Any, policies: Policies) -> list[dict[str, str]]:
    """The conversation as roles and texts; Refused for anything in it that would not be kept as it is."""
    if not isinstance(messages, list) or not messages:
        raise Refused(400, "messages is a list of at least one message", "messages")
    if len(messages) > policies.limits.max_messages:
        raise Refused(400, f"messages may be {policies.limits.max_messages} at most", "messages")
    return [_message(message, f"messages[{i}]", policies, i == len(messages) - 1) for i, message in enumerate(messages)]


def _message(message: Any, where: str, policies: Policies, last: bool) -> dict[str, str]:
    if not isinstance(message, dict):
        raise Refused(400, f"{where} is not an object", where)
    odd = next((name for name, value in message.items() if name not in ("role", "content") and value not in (None, "", [], {})), None)
    if odd is not None:
        raise Refused(400, f"{where}.{_short(odd)} is not something that a message may hold here", f"{where}.{_short(odd)}")
    role = message.get("role")
    if role in _SYSTEM and policies.system_turns == "forbidden":
        raise Refused(400, f"{where}.role: system turns are the operator's to set", f"{where}.role")
    if role not in _ROLES + _SYSTEM:
        raise Refused(400, f"{where}.role is user or assistant", f"{where}.role")
    if last and role != "user":
        raise Refused(400, "messages end with the user's: an answer cannot be begun for the model", f"{where}.role")
    return {"role": "system" if role in _SYSTEM else role, "content": _text(message.get("content"), f"{where}.content")}


def _text(content: Any, where: str) -> str:
    """A message's text; parts of type text are joined by line breaks."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise Refused(400, f"{where} is a text, or a list of parts of type text", where)
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str) or len(part) > 2:
            raise Refused(400, f"{where}[{i}] is not a part of type text", f"{where}[{i}]")
    return "\n".join(part["text"] for part in content)


def conversation(body: dict[str, Any], policies: Policies) -> list[dict[str, str]]:
    """The messages of a request for scores, which end with an answer."""
    odd = next((name for name in body if name != "messages"), None)
    if odd is not None:
        raise Refused(400, f"{_short(odd)} is not a field of a request for scores", _short(odd))
    messages = body.get("messages")
    if not isinstance(messages, list) or len(messages) < 2 or not isinstance(messages[-1], dict) or messages[-1].get("role") != "assistant":
        raise Refused(400, "messages are a conversation that ends with the assistant's answer", "messages")
    open_to_all = policies.model_copy(update={"system_turns": "allowed"})
    answer = _text(messages[-1].get("content"), f"messages[{len(messages) - 1}].content")
    return [*_messages(messages[:-1], open_to_all), {"role": "assistant", "content": answer}]
