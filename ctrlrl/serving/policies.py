"""The operator's file: which dials there are, which keys may use them, and what a request may cost. One TOML file, read by `load`.

    [keys]
    alice = "sha256:…"            # `ctrlrl serve --new-key alice` prints a key and this line

    [dials.scientist]
    helpful = 1.0
    harmless = 0.2
    keys = ["alice"]

    [operators]
    keys = ["root"]               # may set a dial per request
"""

import difflib
import hashlib
import re
import secrets
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError, field_validator, model_validator

from ctrlrl.attributes import PAPER, Attributes, AttributesSection, enumerated
from ctrlrl.config import Section
from ctrlrl.control import Control
from ctrlrl.prompts import HARMLESS_SYSTEM, prompting_templates

_HASH = re.compile(r"sha256:[0-9a-f]{64}")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
KIND = Literal["tokens", "system", "prompting"]
TEMPLATE = 3  # of the four prompting templates: the first two are spelled as control tokens, which an untrained model does not know


class Dial(Section):
    """One setting of the model: a level of each attribute, by its name, or a system prompt, and the names of the keys that may use it.

    prompting: ask in words, for models that were not trained on control tokens; a number chooses among the four templates.
    rerank: draw so many answers and keep the one whose scores are nearest to the levels.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Any]  # the levels

    attributes: AttributesSection = PAPER  # those of the file
    system: str | None = None
    prompting: bool | Literal[1, 2, 3, 4] = False
    rerank: int = Field(1, ge=1, le=16)
    keys: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _one_of_both(self):
        given, names = self.__pydantic_extra__, self.attributes.names
        if odd := next((name for name in given if name not in names), None):
            near = difflib.get_close_matches(odd, [*names, *type(self).model_fields], n=1, cutoff=0.5)
            told = f"did you mean {near[0]!r}?" if near else f"the attributes are {enumerated(names)}"
            raise ValueError(f"unknown key {odd!r}: {told}")
        if wrong := next((n for n, level in given.items() if isinstance(level, bool) or not isinstance(level, int | float)), None):
            raise ValueError(f"{wrong} = {given[wrong]!r} is not a valid number")
        if (given and len(given) < len(names)) or bool(given) == (self.system is not None):
            raise ValueError(f"a dial is {enumerated(names)} together, or a system prompt: give one of both")
        if given:
            Control(*(given[name] for name in names), attributes=self.attributes)
        elif self.prompting is not False or self.rerank > 1:
            raise ValueError(f"prompting and rerank belong to a dial with {enumerated(names)}")
        return self

    @property
    def control(self) -> Control | None:
        """The levels; None for a system prompt."""
        given = self.__pydantic_extra__
        return Control(*(given[name] for name in self.attributes.names), attributes=self.attributes) if given else None

    @property
    def spelled(self) -> str:
        """A name for a dial that has none of its own."""
        return self.control.name if self.control else "system"

    @property
    def kind(self) -> KIND:
        """By what the dial reaches the model."""
        return "system" if self.system is not None else "prompting" if self.prompting is not False else "tokens"

    @property
    def suffix(self) -> str:
        """What is appended to the last user message."""
        if self.kind == "tokens":
            return self.control.spell()
        template = TEMPLATE if self.prompting is True else self.prompting
        return prompting_templates(self.control)[template - 1] if template else ""


class Operators(Section):
    """Names of the keys that may use every dial and set one per request."""

    keys: tuple[str, ...] = ()


class Limits(Section):
    """What one server takes. requests_per_minute, concurrent_per_key: of each key; 0 is no limit. max_new_tokens: of an answer; 0 is
    what the model has room for. body_s, grace_s: seconds for a body to arrive, and for running answers to end at a stop."""

    max_body_bytes: int = Field(262_144, ge=1024)
    max_messages: int = Field(256, gt=0)
    max_answers: int = Field(8, gt=0)
    max_new_tokens: int = Field(0, ge=0)
    max_temperature: float = Field(2.0, ge=0)
    max_concurrent: int = Field(512, gt=0)
    concurrent_per_key: int = Field(0, ge=0)
    requests_per_minute: int = Field(0, ge=0)
    body_s: float = Field(30.0, gt=0)
    grace_s: float = Field(30.0, ge=0)


class Audit(Section):
    """A line of JSON per request. file: empty is standard output. text: also what was asked and answered, and the prompt's token ids."""

    file: str = ""
    text: bool = False


class Policies(Section):
    """The whole file. kind: by what dials reach this model, where it cannot be told from the dials.

    system_turns: whether a request may hold system turns. constraints: whether it may force or forbid words of the answer (logit_bias,
    response_format and the like), which can undo a dial.
    """

    kind: KIND | None = None
    keys: dict[str, str] = {}
    dials: dict[str, Dial] = {}
    operators: Operators = Operators()
    limits: Limits = Limits()
    audit: Audit = Audit()
    system_turns: Literal["forbidden", "allowed"] = "forbidden"
    constraints: Literal["forbidden", "allowed"] = "forbidden"
    attributes: AttributesSection = PAPER
    rewards: dict[str, str | dict] = {}

    @model_validator(mode="before")
    @classmethod
    def _dials_know_the_attributes(cls, given):
        if not isinstance(given, dict) or "attributes" not in given or not isinstance(given.get("dials"), dict):
            return given
        known = {"attributes": given["attributes"]}
        return given | {"dials": {n: dial | known if isinstance(dial, dict) else dial for n, dial in given["dials"].items()}}

    @field_validator("keys", "dials")
    @classmethod
    def _plain_names(cls, named: dict) -> dict:
        odd = next((name for name in named if not NAME.fullmatch(name)), None)
        if odd is not None:
            raise ValueError(f"{odd!r} is not a name: use letters, digits, '.', '_' and '-'")
        return named

    @model_validator(mode="after")
    def _consistent(self):
        for name, hashed in self.keys.items():
            if not _HASH.fullmatch(hashed):
                raise ValueError(f"keys.{name} is not a hash: make a key with `ctrlrl serve --new-key {name}` and paste its line")
        if len(set(self.keys.values())) < len(self.keys):
            raise ValueError("two keys are the same: give each its own")
        used = [*((f"dials.{name}.keys", dial.keys) for name, dial in self.dials.items()), ("operators.keys", self.operators.keys)]
        for where, names in used:
            unknown = next((name for name in names if name not in self.keys), None)
            if unknown is not None:
                raise ValueError(f"{where} names {unknown!r}, which is not under [keys]")
        kinds = {dial.kind for dial in self.dials.values()} | ({self.kind} if self.kind else set())
        if len(kinds) > 1:
            raise ValueError(f"a model has dials of one kind, but these are {' and '.join(sorted(kinds))}")
        if kinds == {"system"} and self.system_turns == "allowed":
            raise ValueError('system_turns = "allowed" would let requests overrule dials that are system prompts')
        names = self.attributes.names
        if any(dial.attributes != self.attributes for dial in self.dials.values()):
            raise ValueError("attributes are those of the whole file, not of a dial")
        if set(self.rewards) not in (set(), set(names)):
            raise ValueError(f"rewards needs {'both' if len(names) == 2 else 'all'}, {enumerated(names)}")
        if any(dial.rerank > 1 for dial in self.dials.values()) and not self.rewards:
            raise ValueError(f"rerank needs reward models: give {enumerated([f'rewards.{name}' for name in names])}")
        return self


def hashed(key: str) -> str:
    """How a key is stored."""
    return "sha256:" + hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def new_key() -> str:
    """A fresh key of 256 random bits."""
    return "sk-ctrlrl-" + secrets.token_urlsafe(32)


class Caller(Section):
    """Who asks: the key's name, the dials that it may use (the first is its own where it has one), and whether it is an operator's."""

    name: str
    dials: tuple[str, ...]
    operator: bool


def caller_of(policies: Policies, authorization: str | None) -> Caller | None:
    """Who sent this Authorization header; None for a wrong key. Without keys (on this machine alone) everybody is the operator."""
    if not policies.keys:
        return Caller(name="local", dials=tuple(policies.dials), operator=True)
    scheme, _, key = (authorization or "").partition(" ")
    given = hashed(key.strip()) if scheme.lower() == "bearer" else ""
    name = next((name for name, stored in policies.keys.items() if secrets.compare_digest(stored, given)), None)
    if name is None:
        return None
    own = tuple(dial for dial, policy in policies.dials.items() if name in policy.keys)
    operator = name in policies.operators.keys
    return Caller(name=name, dials=own + tuple(d for d in policies.dials if operator and d not in own), operator=operator)


def first_dial(policies: Policies, kind: KIND, caller: Caller) -> tuple[str, Dial] | None:
    """The dial of a request that names none: the key's first; for an operator's key without one of its own, everything high."""
    own = [d for d in caller.dials if caller.name in policies.dials[d].keys]
    if own:
        return own[0], policies.dials[own[0]]
    if not caller.operator:
        return None
    high = {attribute.name: attribute.levels[-1] for attribute in policies.attributes}
    dial = made_dial(kind, {"system": HARMLESS_SYSTEM} if kind == "system" else high, policies.attributes)
    return dial.spelled, dial


def made_dial(kind: KIND, levels: dict, attributes: Attributes = PAPER) -> Dial:
    """An operator's dial for one request; ValueError, which says why, if it is none of this kind."""
    known = ("system",) if kind == "system" else attributes.names
    if not isinstance(levels, dict) or set(levels) != set(known):
        raise ValueError(f"a dial of this model is an object with {enumerated(known)}")
    try:
        return Dial(**levels, attributes=attributes, prompting=kind == "prompting")
    except ValidationError as error:
        raise ValueError("; ".join(item["msg"].removeprefix("Value error, ") for item in error.errors())) from None
