"""The HTTP of `ctrlrl serve`: OpenAI's chat completions and models, health and metrics, dials and scores, and the page.

It reads bodies within limits, tells a client that went away from one that waits, and writes errors as OpenAI's clients read them.
"""

import asyncio
import base64
import hashlib
import json
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ctrlrl.serving.asked import Refused, conversation, parse
from ctrlrl.serving.service import Service, Visit

PAGE = Path(__file__).parent / "page.html"
_INLINE = re.compile(r"<(script|style)\b[^>]*>(.*?)</\1>", re.DOTALL)
_HERE = ("localhost", "127.0.0.1", "[::1]")
_DRAINED = 8 << 20  # bytes of a body too large that are read all the same: a client that is still sending does not read why
_GONE = 499  # in the audit: the client went away


def build_app(service: Service) -> Starlette:
    """The application of a server."""

    async def chat(request: Request) -> Response:
        return await _Chat(service, request).respond()

    async def score(request: Request) -> Response:
        visit = Visit(request.url.path)

        async def scored() -> Response:
            if not _caller(service, request, visit).operator:
                raise Refused(403, "scores are the operator's")
            body = parse(await _body(request, service))
            return JSONResponse(await service.score(conversation(body, service.policies)))

        return await _audited(service, visit, scored)

    async def models(request: Request) -> Response:
        caller, name = _known(service, request), service.model.name
        listed = [name, *(f"{name}:{dial}" for dial in caller.dials)]
        return JSONResponse({"object": "list", "data": [{"id": i, "object": "model", "created": 0, "owned_by": "ctrlrl"} for i in listed]})

    async def dial(request: Request) -> Response:
        return JSONResponse(service.dials(_known(service, request)))

    async def metrics(request: Request) -> Response:
        if not _known(service, request).operator:
            raise Refused(403, "metrics are the operator's")
        return Response(service.metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def health(_: Request) -> Response:
        return Response(status_code=200 if service.model.healthy else 503)

    async def page(_: Request) -> Response:
        if not PAGE.exists():
            raise Refused(404, "this server has no page")
        html = PAGE.read_text(encoding="utf-8")
        headers = {"Content-Security-Policy": _allowed(html), "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
        return HTMLResponse(html, headers=headers)

    routes = [
        Route("/v1/chat/completions", chat, methods=["POST"]), Route("/v1/score", score, methods=["POST"]),
        Route("/v1/models", models), Route("/v1/dial", dial), Route("/metrics", metrics), Route("/health", health), Route("/", page),
    ]  # fmt: skip
    return Starlette(routes=routes, exception_handlers={Refused: _refused, HTTPException: _no_such, 500: _broken})


def _allowed(html: str) -> str:
    """The page's Content-Security-Policy: its own script and style, by their hashes, and requests to this server."""
    hashes = {tag: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for tag, text in _INLINE.findall(html)}
    own = "; ".join(f"{tag}-src 'sha256-{digest}'" for tag, digest in hashes.items())
    return (
        f"default-src 'none'; {own}; img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


class _Chat:
    """One chat request."""

    def __init__(self, service: Service, request: Request):
        self._service, self._request, self._visit = service, request, Visit(request.url.path)

    async def respond(self) -> Response:
        """The answer, or a stream of it, or why there is none; each ends with one audit line."""
        return await _audited(self._service, self._visit, self._answer)

    async def _answer(self) -> Response:
        _caller(self._service, self._request, self._visit)
        body = parse(await _body(self._request, self._service))
        answer = await _while_connected(self._request, self._first(body))
        if isinstance(answer, dict):
            return JSONResponse(answer)
        return _Streamed(answer, lambda status: self._service.done(self._visit, status))

    async def _first(self, body: dict) -> dict | AsyncIterator[str]:
        """A whole answer, or a stream whose first event is there, so that an error has a status of its own."""
        answer = await self._service.chat(self._visit, body)
        if isinstance(answer, dict):
            return answer
        first = await anext(answer)
        if first.startswith('data: {"error"'):
            error = json.loads(first.removeprefix("data: "))["error"]
            await answer.aclose()
            raise Refused(error["code"], error["message"], error.get("param"))
        return _rest(first, answer)


async def _rest(first: str, events: AsyncIterator[str]) -> AsyncIterator[str]:
    yield first
    async for event in events:
        yield event


class _Streamed(StreamingResponse):
    """A stream of events that reports its end, however it comes to it."""

    def __init__(self, events: AsyncIterator[str], ended: Callable[[int], None]):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._ended = ended

    async def stream_response(self, send) -> None:
        await super().stream_response(send)
        self.finished = True

    async def __call__(self, scope, receive, send) -> None:
        self.finished = False
        try:
            await super().__call__(scope, receive, send)
        except ClientDisconnect:
            pass
        finally:
            self._ended(200 if self.finished else _GONE)
            await self.body_iterator.aclose()


async def _audited(service: Service, visit: Visit, answer: Callable) -> Response:
    """What `answer` returns, with one audit line; a stream writes its own at its end."""
    try:
        response = await answer()
    except Refused as refused:
        service.done(visit, refused.status, refused.param)
        return _error(refused)
    except (ClientDisconnect, asyncio.CancelledError):
        service.done(visit, _GONE)
        raise
    except BaseException:
        service.done(visit, 500)
        raise
    if not isinstance(response, _Streamed):
        service.done(visit, response.status_code)
    return response


async def _while_connected(request: Request, answer):
    """The result of `answer`, which is given up if the client goes away."""
    task, gone = asyncio.ensure_future(answer), asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect()
        return task.result()
    finally:
        for one in (task, gone):
            if not one.done():
                one.cancel()
                await asyncio.wait((one,))


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request, service: Service) -> bytes:
    """The body, if it is JSON and not too large or too slow."""
    limits = service.policies.limits
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "the body is JSON: send Content-Type: application/json")
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(limits.body_s):
            async for piece in request.stream():
                size += len(piece)
                if size <= limits.max_body_bytes:
                    body += piece
                elif size > limits.max_body_bytes + _DRAINED:
                    break
    except TimeoutError:
        raise Refused(408, f"the body did not arrive within {limits.body_s:g} s") from None
    if size > limits.max_body_bytes:
        raise Refused(413, f"the body is larger than {limits.max_body_bytes} bytes")
    return bytes(body)


def _caller(service: Service, request: Request, visit: Visit):
    _known(service, request)
    return service.admitted(visit, request.headers.get("authorization"))


def _known(service: Service, request: Request):
    if not service.policies.keys:
        _check_same_machine(request)
    return service.known(request.headers.get("authorization"))


def _check_same_machine(request: Request) -> None:
    """Without keys a page of another site could ask through the user's own browser: it gives another Host, or its Origin."""
    host, origin = request.headers.get("host", ""), request.headers.get("origin")
    if host.rpartition(":")[0] not in _HERE and host not in _HERE:
        raise Refused(403, "without keys this server answers to the name localhost alone")
    if origin is not None and origin.partition("://")[2] != host:
        raise Refused(403, "without keys this server answers its own page alone")


def _error(refused: Refused) -> JSONResponse:
    headers = {401: {"WWW-Authenticate": "Bearer"}, 413: {"Connection": "close"}, 408: {"Connection": "close"}, 503: {"Retry-After": "1"}}
    return JSONResponse(refused.body(), refused.status, headers.get(refused.status))


async def _refused(_: Request, refused: Refused) -> Response:
    return _error(refused)


async def _no_such(request: Request, error: HTTPException) -> Response:
    return _error(Refused(error.status_code, f"{request.method} {request.url.path[:100]}: {error.detail}"))


async def _broken(_: Request, __: Exception) -> Response:
    """Starlette raises the error behind this answer, for the log."""
    return _error(Refused(500, "the server made a mistake; its log says which"))
