"""A client of `ctrlrl serve`, of the standard library alone, so that it starts at once."""

import http.client
import json
from collections.abc import Iterator
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

from ctrlrl.errors import RecipeError

_PATIENCE_S = 600.0  # between two pieces of an answer: a busy server lets requests wait


class NotAnswered(Exception):
    """A request without an answer, or with half of one; says why, in the server's words where there are any."""


class Client:
    """A server's address and a key for it; every request has a connection of its own."""

    def __init__(self, url: str, key: str = ""):
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise RecipeError(f"--url {url!r}: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or parts.username is not None:
            raise RecipeError(f"--url {url!r} is not a server's address: give one such as http://127.0.0.1:8000")
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connection = lambda: kind(parts.hostname, port, timeout=_PATIENCE_S)
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        self.url = url

    def dials(self) -> dict[str, Any]:
        """What the server tells of its dials to this key."""
        return self._whole("GET", "/v1/dial")

    def score(self, messages: list[dict[str, str]]) -> dict[str, float]:
        """The reward models' scores of a conversation that ends with an answer."""
        return self._whole("POST", "/v1/score", {"messages": messages})

    def stream(self, body: dict[str, Any]) -> Iterator[tuple[str, str | None]]:
        """(piece of text, why it ended or None) of the answer to a chat request, as they come. Closing it stops the answer."""
        with closing(self._connection()) as connection:
            response = self._response(connection, "POST", "/v1/chat/completions", {**body, "stream": True})
            for event in _events(response):
                choice = event["choices"][0] if event.get("choices") else {}
                yield choice.get("delta", {}).get("content") or "", choice.get("finish_reason")

    def _whole(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        with closing(self._connection()) as connection:
            try:
                return json.loads(self._response(connection, method, path, body).read())
            except (OSError, ValueError, http.client.HTTPException) as error:
                raise NotAnswered(f"{self.url}{path} gave no answer of a ctrlrl server: {error}") from None

    def _response(self, connection, method: str, path: str, body: dict[str, Any] | None) -> http.client.HTTPResponse:
        try:
            connection.request(method, self._path + path, None if body is None else json.dumps(body).encode(), self._headers)
            response = connection.getresponse()
            if response.status == 200:
                return response
            text = response.read()
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise NotAnswered(f"{self.url} cannot be reached: {error or type(error).__name__}") from None
        try:
            told = json.loads(text)["error"]["message"]
        except (ValueError, LookupError, TypeError):
            told = f"{self.url}{path}: HTTP {response.status} {response.reason}"
        raise NotAnswered(told)


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The objects of a stream of server-sent events, up to its [DONE]."""
    try:
        for line in response:
            field, _, value = line.decode("utf-8").strip().partition(": ")
            if field != "data":
                continue
            if value == "[DONE]":
                return
            event = json.loads(value)
            if "error" in event:
                raise NotAnswered(event["error"]["message"])
            yield event
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise NotAnswered(f"the answer broke off: {error or type(error).__name__}") from None
    raise NotAnswered("the answer broke off")
