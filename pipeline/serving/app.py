"""The HTTP layer: routes, errors in OpenAI's format, the API key, a limit on request sizes."""

import asyncio
import contextlib
import hmac
import ipaddress
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.console import say
from pipeline.serving.engine import Busy, EngineError
from pipeline.serving.protocol import (
    Answer,
    Asked,
    ChatRequest,
    ClassifyRequest,
    CompletionRequest,
    Delta,
    label_form,
)
from pipeline.serving.writer import Writer

MAX_BODY_BYTES = 4 * 2**20
JSON = "application/json"
LOCAL = (".localhost", ".internal")  # domains that nobody can register (RFC 6761, ICANN)
HUNG_UP = 499  # nginx's status for a client that disconnected; nobody reads it
# line ends for clients that split events by `str.splitlines`, as httpx's `iter_lines` does
LINE_ENDS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}
T = TypeVar("T")


Labelled = tuple[list[float], bool]  # probabilities (K,) of a text, and whether it was truncated


class Labels(NamedTuple):
    """A classifier; it handles one request at a time, as each uses all cores."""

    names: list[str]
    of: Callable[[Sequence[str]], Future[list[Labelled]]]


def make_app(name: str, served: Writer | Labels, key: str, *, local: bool = False) -> FastAPI:
    """The app that serves a model as `name`; clients must send the key, if there is one.

    If `local` without a key, requests' host must be an IP address, localhost or of `LOCAL`.
    """
    # FastAPI's documentation pages would load third-party scripts, and ask for no key
    app = FastAPI(title=name, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_bounded)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(ValueError, lambda _, error: failure(400, str(error)))
    app.add_exception_handler(Busy, lambda _, error: failure(429, str(error)))
    app.add_exception_handler(EngineError, lambda _, error: failure(503, str(error)))

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    check = _is_local if local and not key else _needs(key)
    kept = APIRouter(dependencies=[Depends(check)])
    _add_models(kept, name)
    if isinstance(served, Writer):
        _add_completions(kept, name, served)
    else:
        _add_labels(kept, name, served)
    app.include_router(kept)
    return app


def failure(status: int, message: str, *, param: str | None = None) -> JSONResponse:
    """An error response in OpenAI's format."""
    headers = {"Retry-After": "1"} if status == 429 else None
    return JSONResponse(_error(status, message, param), status, headers)


def _error(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


def _add_models(router: APIRouter, name: str) -> None:
    card = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "gpt-pipeline"}

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @router.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        _check_name(model, name)
        return card


def _add_completions(router: APIRouter, name: str, writer: Writer) -> None:
    async def complete(request: Request, asked: Asked) -> Response:
        _check_name(asked.model, name)
        answer = Answer(name, is_chat=isinstance(asked, ChatRequest))
        prompts = await run_in_threadpool(writer.prompts, asked)
        answer.n_prompt = sum(map(len, prompts))
        deltas = writer.write(prompts, writer.settings(asked), asked)
        if asked.stream:
            first = await _unless_gone(request, anext(deltas))  # an error here gets a status
            events = _events(first, deltas, answer, asked.stream_options.include_usage)
            return StreamingResponse(events, media_type="text/event-stream")
        return JSONResponse(answer.whole(await _unless_gone(request, _collect(deltas, answer))))

    @router.post("/v1/chat/completions")
    async def chat(request: Request, asked: ChatRequest) -> Response:
        return await complete(request, asked)

    @router.post("/v1/completions")
    async def text(request: Request, asked: CompletionRequest) -> Response:
        return await complete(request, asked)


def _add_labels(router: APIRouter, name: str, labels: Labels) -> None:
    @router.post("/classify")
    async def classify(request: Request, asked: ClassifyRequest) -> Response:
        _check_name(asked.model, name)
        labelled = await _unless_gone(request, asyncio.wrap_future(labels.of(asked.input)))
        return JSONResponse(label_form(name, labels.names, labelled))


async def _collect(deltas: AsyncGenerator[Delta, None], answer: Answer) -> list[Delta]:
    """Joins the deltas of every choice."""
    choices: dict[int, Delta] = {}
    try:
        async for delta in deltas:
            answer.count(delta)
            if so_far := choices.get(delta.number):
                text, tokens = so_far.text + delta.text, so_far.tokens + delta.tokens
                delta = delta._replace(text=text, tokens=tokens)
            choices[delta.number] = delta
    finally:
        if choices:  # else it was refused
            _note(answer)
    return [choices[number] for number in sorted(choices)]


async def _events(
    first: Delta, deltas: AsyncGenerator[Delta, None], answer: Answer, include_usage: bool
) -> AsyncGenerator[str, None]:
    """Server-sent events; an error on the way is the last of them."""
    no_usage = {"usage": None} if include_usage else {}  # as in OpenAI's events

    def events_of(delta: Delta) -> str:
        answer.count(delta)
        if not (delta.text or delta.ended or delta.tokens):  # part of a character
            return ""
        return _event({**answer.event(delta), **no_usage})

    try:
        async with contextlib.aclosing(deltas):
            yield events_of(first)
            async for delta in deltas:
                yield events_of(delta)
        if include_usage:
            yield _event({**answer.event(), "usage": answer.usage()})
        yield "data: [DONE]\n\n"
    except EngineError as error:
        yield _event(_error(503, str(error)))
    finally:
        _note(answer)


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False).translate(LINE_ENDS)}\n\n"


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled if the client disconnects."""

    async def hang_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(work), asyncio.create_task(hang_up())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise HTTPException(HUNG_UP, "the client hung up.")
        return task.result()
    finally:
        gone.cancel()
        task.cancel()


def _check_name(asked: str | None, name: str) -> None:
    if asked not in (None, name):
        raise HTTPException(404, f"this server has no model {asked!r}, only {name!r}.")


def _needs(key: str) -> Callable[[Request], None]:
    """A check of `Authorization: Bearer KEY` that takes equally long for every wrong key."""

    def check(request: Request) -> None:
        scheme, _, shown = request.headers.get("Authorization", "").partition(" ")
        is_it = hmac.compare_digest(shown.encode(), key.encode())
        if key and not (is_it and scheme.lower() == "bearer"):
            raise HTTPException(401, "the key is missing or wrong; send Authorization: Bearer KEY.")

    return check


def _is_local(request: Request) -> None:
    """Refuses other hosts: a website could make its own name resolve to here (DNS rebinding)."""
    asked = request.headers.get("Host", "")
    host = urlsplit(f"//{asked}").hostname or ""
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(host)
        return
    if not f".{host}".endswith(LOCAL):
        raise HTTPException(
            403,
            f"this server is not {asked!r}; ask for localhost, or start it with --api_key_env.",
        )


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = error.detail
    if message == "Not Found":
        known = ", ".join(request.app.openapi()["paths"])
        message = f"{request.url.path} is not here; there are {known}."
    answer = failure(error.status_code, message)
    answer.headers.update(error.headers or {})  # a 405's Allow
    return answer


def _invalid(request: Request, error: Exception) -> Response:
    """A response that names the first invalid key of a request, and why it is invalid."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"][1:]) or "body"
    said = first["msg"]
    if first["type"] == "json_invalid":
        key, said = "body", f"not valid JSON from character {key} on ({first['ctx']['error']})"
    elif first["type"] == "extra_forbidden":
        said = "this server does not offer it; leave it out"
    elif key == "body" and not request.headers.get("Content-Type", "").startswith(JSON):
        said = f"it is not sent as {JSON}; say so in the header Content-Type"
    return failure(400, f"{key}: {said}.", param=key)


def _note(answer: Answer) -> None:
    elapsed_s, n_written = time.monotonic() - answer.began, answer.n_completion
    say(
        f"{answer.n_prompt} tokens read ({answer.n_cached} were known), {n_written} written in "
        f"{elapsed_s:.1f} s, {n_written / elapsed_s:.0f} tokens/s"
    )


def _bounded(app: ASGIApp) -> ASGIApp:
    """Refuses bodies of more than MAX_BODY_BYTES, whatever their headers say.

    FastAPI's own limit answers in plain text, not in OpenAI's format.
    """

    async def bounded(scope: Scope, receive: Receive, send: Send) -> None:
        n_bytes = 0

        async def counted() -> Message:
            nonlocal n_bytes
            message = await receive()
            n_bytes += len(message.get("body", b""))
            if n_bytes > MAX_BODY_BYTES:
                raise HTTPException(413, f"the request is larger than {MAX_BODY_BYTES} bytes.")
            return message

        await app(scope, counted, send)

    return bounded
