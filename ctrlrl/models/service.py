"""A service that is asked over HTTP, JSON in and out: its settings, its key from the environment, and how patiently it is asked.

What may pass is tried again after a wait that doubles (status 408, 425, 429 and 5xx, lost connections, no answer in time); what cannot
pass is an error at once. The key is in the request's header and nowhere else: not in settings, messages or fingerprints.
"""

import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import NoReturn
from urllib.parse import parse_qsl, urlsplit

import httpx
from pydantic import Field, field_validator, model_validator

from ctrlrl.config import Section
from ctrlrl.errors import DataError, ModelError

_FIRST_WAIT_S = 1.0
# What has no part in what a service says.
PATIENCE = ("key", "timeout_s", "attempts", "longest_wait_s", "at_once", "unscored")
# How a parameter of an address is called that nobody else is to read: api_key, access_token, sig; not max_tokens, tokenizer.
_SECRET = re.compile(r"key$|token$|secret|passw|^sig(nature)?$|^auth|credential", re.IGNORECASE)
_SHOWN = 200  # characters of what a service says
_DAY_S = 86_400
_MOST = 2**26  # bytes of an answer


class ServiceConfig(Section):
    """url: http or https. key: the *name* of an environment variable that holds the service's key, sent as a bearer token.

    timeout_s: for one request. attempts: of one request. longest_wait_s: between two; a service that asks for more is an error.
    at_once: requests of one worker at a time. unscored: the share of a run's answers, or of a set of scores, that may stay without a
    score; they are set aside. 0: none may.
    """

    url: str
    key: str = ""
    timeout_s: float = Field(60, gt=0, le=_DAY_S)
    attempts: int = Field(6, gt=0)
    longest_wait_s: float = Field(60, ge=0, le=_DAY_S)
    at_once: int = Field(4, gt=0)
    unscored: float = Field(0.05, ge=0, le=1)

    @model_validator(mode="before")
    @classmethod
    def _keys_are_elsewhere(cls, given):
        """Before the fields themselves are looked at, so that no message shows what may be a key."""
        key = given.get("key", "") if isinstance(given, dict) else ""
        name = isinstance(key, str) and key.isascii() and key.replace("_", "A").isalnum() and key == key.upper() and not key[:1].isdigit()
        if key != "" and not name:
            raise ValueError("key is the name of an environment variable that holds the key, such as SCORER_KEY, never the key itself")
        if isinstance(given, dict) and "@" in str(given.get("url", "")).partition("//")[2].partition("/")[0]:
            raise ValueError("url names a user: put the key into an environment variable, and its name into key")
        query = parse_qsl(str(given.get("url", "")).partition("?")[2], keep_blank_values=True) if isinstance(given, dict) else []
        if secret := [name for name, _ in query if _SECRET.search(name)]:
            raise ValueError(f"url has {secret[0]!r} in its query, and recipes are kept: have the key sent as a bearer token (key)")
        return given

    @field_validator("url")
    @classmethod
    def _is_an_address(cls, url: str) -> str:
        if not url and not cls.model_fields["url"].is_required():
            return url
        try:
            found = urlsplit(url)
            good = found.scheme in ("http", "https") and found.hostname and found.port != 0 and not found.fragment
        except ValueError:
            good = False
        if not good:
            raise ValueError("is not an address: give one such as https://scores.example/v1/score")
        return url

    def secret(self) -> str:
        """The key; empty if the settings name none, ModelError if the variable that they name is not set."""
        if not self.key:
            return ""
        if not (secret := os.environ.get(self.key, "").strip()):
            raise ModelError(f"the key of {self.url} is to come from the environment variable {self.key}, which is not set: set it")
        if not (secret.isascii() and secret.isprintable()):
            raise ModelError(f"the environment variable {self.key} holds what cannot be in a request's header: give it the plain key")
        return secret


@dataclass(frozen=True)
class Answer:
    """What came back. asked: seconds that it asks to wait, if it does; elsewhere: where it says that the service is, if it does."""

    status: int
    reason: str
    content: bytes
    asked: float | None
    elsewhere: str

    @property
    def text(self) -> str:
        """As far as it is legible."""
        return self.content.decode(errors="replace")


class Service:
    """Asks one service; may be used from several threads. secret: its key. sleep: how it waits."""

    def __init__(self, config: ServiceConfig, secret: str, sleep: Callable[[float], None] = time.sleep):
        self._config, self._secret, self._sleep = config, secret, sleep
        headers = {"Authorization": f"Bearer {secret}"} if secret else {}
        self._client = httpx.Client(timeout=config.timeout_s, headers=headers, limits=httpx.Limits(max_connections=config.at_once))

    def post(self, body: object, url: str = "", patient: bool = True) -> object:
        """What the service answers to `body`, read from JSON. url: of the request, by default that of the settings.

        ModelError if it does not accept the key; DataError for other answers than 200 with JSON, and when all attempts have failed.
        patient: false to raise at once if it cannot be reached.
        """
        url, content = url or self._config.url, json.dumps(body).encode()
        for attempt in range(1, self._config.attempts + 1):
            try:
                answer = self._answer(url, content)
            except httpx.RequestError as error:
                why, asked = f"cannot be reached: {type(error).__name__}: {error}", None
                if not patient:
                    break
            except httpx.InvalidURL as error:
                self._refuse(url, f"has no valid address: {error}")
            else:
                if answer.status == 200:
                    return self._read(url, answer)
                why, asked = self._passing(url, answer), answer.asked
            if attempt < self._config.attempts:
                self._wait(url, why, attempt, asked)
        times = f" (tried {self._config.attempts} times)" if patient else ""
        self._refuse(url, f"{why}{times}: see that it runs, and run the same command again")

    def _answer(self, url: str, content: bytes) -> Answer:
        """The whole answer to one request, within `timeout_s`: a service that drips holds up nobody longer."""
        end, parts, size = time.monotonic() + self._config.timeout_s, [], 0
        late = httpx.ReadTimeout(f"no whole answer within {self._config.timeout_s:g} s")
        try:
            with self._client.stream("POST", url, content=content, headers={"Content-Type": "application/json"}) as got:
                for part in got.iter_bytes():
                    parts.append(part)
                    size += len(part)
                    if size > _MOST:
                        self._refuse(url, f"answers more than {_MOST >> 20} MiB")
                    if time.monotonic() > end:
                        raise late
                return Answer(got.status_code, got.reason_phrase, b"".join(parts), _retry_after(got), got.headers.get("Location", ""))
        except httpx.ReadTimeout:
            raise late from None

    def _passing(self, url: str, answer: Answer) -> str:
        """What a failure that may pass is called; raises for others."""
        status, said = answer.status, " ".join(self._clean(answer.text).split())[:_SHOWN]
        why = f"answers {status} {answer.reason}{said and f': {said}'}"
        if 300 <= status < 400 and answer.elsewhere:
            why = f"answers {status} {answer.reason}, to {answer.elsewhere}: if that is the service, give its address"
        if status in (401, 403):
            given = f"the key in {self._config.key}" if self._config.key else "requests without a key: name its environment variable as key"
            raise ModelError(f"{_shown(url)} does not accept {given}; it {why}")
        if status not in (408, 425, 429) and status < 500:
            self._refuse(url, why)
        return why

    def _wait(self, url: str, why: str, attempt: int, asked: float | None) -> None:
        """Before the next attempt: as long as the service asks for, else twice as long as before."""
        if asked is not None and asked > self._config.longest_wait_s:
            self._refuse(url, f"{why}; asks to wait {asked:g} s, and longest_wait_s = {self._config.longest_wait_s:g}")
        self._sleep(min(_FIRST_WAIT_S * 2 ** (attempt - 1), self._config.longest_wait_s) if asked is None else asked)

    def _read(self, url: str, answer: Answer) -> object:
        def no_number(name: str) -> NoReturn:
            raise ValueError(f"{name} is no number of JSON")

        try:
            text = answer.content.decode(json.detect_encoding(answer.content))
            return json.loads(self._clean(text), parse_constant=no_number, object_pairs_hook=_once)
        except (ValueError, RecursionError) as error:
            self._refuse(url, f"does not answer in JSON: {error}: {self._clean(answer.text)[:_SHOWN]!r}")

    def _refuse(self, url: str, why: str) -> NoReturn:
        raise DataError(self._clean(f"{_shown(url)} {why}")) from None

    def _clean(self, text: str) -> str:
        """`text` without the key, which a service may say back."""
        return text.replace(self._secret, "…") if self._secret else text


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object of JSON; of two values of one name most readers would take the last, and say nothing."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


def _shown(url: str) -> str:
    """An address without its query, which may hold a key."""
    address, query, _ = url.partition("?")
    return f"{address}{query and '?…'}"


def _retry_after(answer: httpx.Response) -> float | None:
    """Seconds that a service asks to wait, as a number or a date; None where it does not, or not legibly."""
    said = answer.headers.get("Retry-After", "").strip()
    if said.isascii() and said.isdigit():
        return float(said)
    try:
        return max(0.0, parsedate_to_datetime(said).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None
