"""The vendors' own APIs over the service's models: any client made for them can be pointed at it."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import aclosing
from types import ModuleType
from typing import Any, Final, NamedTuple, NoReturn, TypeVar

from fastapi import APIRouter, Depends, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.security import APIKeyHeader, HTTPBearer
from starlette.requests import ClientDisconnect

from agents.agent import Cancel
from agents.forms import Asked, refused
from agents.service import anthropic, openai
from agents.service.core import Caller, Service
from agents.service.logs import request_id
from agents.service.problems import Problem, problem_of
from agents.types import ChatCompletionResponse, EventType
from LLM import (
    CancelScope,
    LLMBudgetError,
    LLMContentFilterError,
    LLMContextLengthError,
    LLMError,
    LLMInvalidRequestError,
    LLMQuotaError,
    Stream,
    count_tokens,
)

log = logging.getLogger("agents.service")

T = TypeVar("T")

_KEEP_ALIVE: Final = b": keep-alive\n\n"
_GONE: Final = 499  # nginx's own status for a client that did not wait; nobody reads it

# What the vendors' clients look for: a status (`None`: that of the problem) and a code. The first that
# fits counts.
_WORDS: Final[tuple[tuple[type[LLMError], int | None, str | None], ...]] = (
    (LLMBudgetError, None, "insufficient_quota"),
    (LLMQuotaError, None, "insufficient_quota"),
    (LLMContextLengthError, 400, "context_length_exceeded"),
    (LLMContentFilterError, 400, "content_filter"),
    (LLMInvalidRequestError, 400, None),
)

_INTERNAL: Final = Problem(500, "Internal error", "tell those who run this service")

_QUESTION: Final = {"messages": [{"role": "user", "content": "What is 12 × 12?"}]}


def _documented(summary: str, example: dict[str, Any]) -> dict[str, Any]:
    """What the body is, for the documentation: it is read by hand, to be refused in the vendor's form."""
    content = {"application/json": {"schema": {"type": "object"}, "example": example}}
    return {"summary": summary, "requestBody": {"required": True, "content": content}}


_FORM: Final = {
    "application/json": {
        "schema": {
            "type": "object",
            "properties": {"error": {"type": "object"}},
            "required": ["error"],
        }
    }
}


def _refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Errors of these statuses, for the documentation."""
    return {
        status: {"description": f"{_REFUSALS[status]}; in the vendor's form", "content": _FORM}
        for status in statuses
    }


_REFUSALS: Final = {
    400: "The request cannot be used, or the model server refuses it",
    401: "No key, or an unknown one",
    402: "The budget does not allow it, nothing was asked (Anthropic's form)",
    404: "No such model",
    413: "The body is too long",
    429: "Too many requests: `Retry-After` says when; in OpenAI's form also a budget that is used up, "
    "`insufficient_quota`",
    502: "The model server fails",
    503: "Too busy, or the database is away: `Retry-After` says when",
    504: "The model server is too slow",
}
_ANSWER: Final = _refusals(400, 404, 413, 502, 504)


# Either header will do. What is in them is looked at by the service; here they are documented.
_CREDENTIALS: Final = [
    Depends(HTTPBearer(auto_error=False, description="`python -m agents keys create` makes one")),
    Depends(APIKeyHeader(name="x-api-key", auto_error=False, description="The same key")),
]

router = APIRouter(
    prefix="/v1",
    tags=["compatible"],
    dependencies=_CREDENTIALS,
    responses=_refusals(401, 429, 503),
)


@router.post(
    "/chat/completions",
    responses=_ANSWER,
    openapi_extra=_documented(
        "Create chat completion (OpenAI's form)", {"model": "gpt-4o", **_QUESTION}
    ),
)
async def chat_completions(request: Request) -> Response:
    """The answer, whole, or with `"stream": true` as server-sent events that end with `[DONE]`."""
    return await _respond(request, openai)


@router.post(
    "/messages",
    responses={**_ANSWER, **_refusals(402)},
    openapi_extra=_documented(
        "Create a Message (Anthropic's form)",
        {"model": "claude-sonnet-4-5", "max_tokens": 1024, **_QUESTION},
    ),
)
async def messages(request: Request) -> Response:
    """The answer, whole, or with `"stream": true` as server-sent events that end with `message_stop`."""
    return await _respond(request, anthropic)


@router.post(
    "/messages/count_tokens",
    responses=_refusals(400, 413),
    openapi_extra=_documented(
        "Count the tokens of a Message (Anthropic's form)",
        {"model": "claude-sonnet-4-5", **_QUESTION},
    ),
)
async def count(request: Request) -> Response:
    """An estimate: no model is asked."""

    def counted(data: bytes) -> dict[str, int]:
        asked = anthropic.read(_parsed(data), limited=False)
        tools = asked.params.get("tools")
        return {"input_tokens": int(count_tokens(asked.messages, asked.model or "", tools=tools))}

    try:
        await run_in_threadpool(_service(request).authenticate, request)
        body = await run_in_threadpool(counted, await request.body())
    except Exception as error:  # noqa: BLE001 - told in the dialect's form
        return _failed(anthropic, error)
    return JSONResponse(body, headers=_headers(anthropic))


@router.get("/models")
def models(request: Request) -> Response:
    """The models that may be named; in Anthropic's form if `anthropic-version` is among the headers."""
    dialect = _dialect_of(request)
    try:
        _service(request).authenticate(request)
        return JSONResponse(dialect.models(_service(request).models()), headers=_headers(dialect))
    except Exception as error:  # noqa: BLE001 - told in the dialect's form
        return _failed(dialect, error)


@router.get("/models/{name:path}", responses=_refusals(404))
def model(request: Request, name: str) -> Response:
    """One of them."""
    dialect = _dialect_of(request)
    try:
        _service(request).authenticate(request)
        found = _service(request).checked_model(name)
        return JSONResponse(dialect.model(found), headers=_headers(dialect))
    except Exception as error:  # noqa: BLE001 - told in the dialect's form
        return _failed(dialect, error)


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _dialect_of(request: Request) -> ModuleType:
    native = "anthropic-version" in request.headers or _path(request).startswith("/v1/messages")
    return anthropic if native else openai


def _path(request: Request) -> str:
    # Not `request.url`, which is made with the Host header.
    path: str = request.scope["path"]
    return path


def is_compatible(request: Request) -> bool:
    """Whether the caller speaks a vendor's form."""
    return _path(request).startswith("/v1/")


def refusal(request: Request, problem: Problem) -> Response:
    """What is refused before it comes to a route here, or finds none, in the vendor's form."""
    return _failed(_dialect_of(request), problem)


def _headers(dialect: ModuleType) -> dict[str, str]:
    """One vendor's clients look for the request's id under another name."""
    name = request_id.get()
    return {"request-id": name} if dialect is anthropic and name else {}


class _Gone(Exception):
    """The client went away."""


async def _respond(request: Request, dialect: ModuleType) -> Response:
    service = _service(request)
    items: AsyncIterator[Any] | None = None
    try:
        caller = await run_in_threadpool(service.authenticate, request)
        # Read in a thread: a long body takes its time, and the others' answers go on.
        asked = await run_in_threadpool(_asked, dialect, await request.body())
        items = service.answer_in_thread(
            lambda cancel: _answer(service, caller, dialect, asked, cancel)
        )
        # What fails before the first piece is told by the status.
        first = await _unless_gone(request, _first(items))
    except (_Gone, ClientDisconnect):
        return Response(status_code=_GONE)
    except Exception as error:  # noqa: BLE001 - told in the dialect's form
        return _failed(dialect, error)
    headers = _headers(dialect)
    if not asked.stream:
        return JSONResponse(first, headers=headers)
    # nginx would keep the events back in its buffer; others do not know the header.
    headers |= {"cache-control": "no-store", "x-accel-buffering": "no"}
    pieces = _pieces(dialect, first, items)
    return StreamingResponse(pieces, headers=headers, media_type="text/event-stream")


def _asked(dialect: ModuleType, data: bytes) -> Asked:
    asked: Asked = dialect.read(_parsed(data))
    return asked


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data, parse_constant=_no_number)
    except (ValueError, RecursionError):
        raise refused("the body is not valid JSON") from None


def _no_number(name: str) -> NoReturn:
    raise ValueError(name)  # Python reads NaN and Infinity, which JSON does not have


async def _first(items: AsyncIterator[T | None]) -> T:
    async for item in items:
        if item is not None:
            return item
    raise _Gone


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """What comes of it; a client that goes away before ends it."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise _Gone
        return working.result()
    finally:
        watching.cancel()
        working.cancel()


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _pieces(
    dialect: ModuleType, first: bytes, items: AsyncIterator[bytes | None]
) -> AsyncIterator[bytes]:
    try:
        async with aclosing(items):  # type: ignore[type-var]  # an async generator, which can be closed
            yield first
            async for item in items:
                yield _KEEP_ALIVE if item is None else item
    except Exception as error:  # noqa: BLE001 - told in the dialect's form
        yield dialect.error_event(_failure(dialect, error).body)


def _answer(
    service: Service, caller: Caller, dialect: ModuleType, asked: Asked, cancel: Cancel
) -> Iterator[Any]:
    """The pieces of an answer; of one that is not streamed, the whole as the only one."""
    clock = service.clock
    started = clock.now()
    name = service.checked_model(asked.model)
    answer = dialect.Answer(clock.new_id(), int(clock.utc().timestamp()), asked)
    scope = CancelScope()
    with service.asking(caller, name) as llm, cancel.watching(scope.cancel):
        try:
            # Streamed in any case: what was billed is known when it is stopped.
            with scope:
                stream = llm.stream(asked.messages, model=name, **asked.params)
        except LLMError as error:
            if error.maybe_billed:
                service.record(caller.owner, name, None, None, complete=False)
            raise
        with stream:
            service.metrics.first_token(clock.now() - started)
            model = stream.info.model or name
            complete = False
            try:
                if asked.stream:
                    yield answer.start(model, stream.usage)
                    for event in stream:
                        if event.type is EventType.MESSAGE_COMPLETE:
                            break
                        if piece := answer.piece(event):
                            yield piece
                response: ChatCompletionResponse = stream.response
                complete = True
            finally:
                _record(service, caller, name, stream, complete=complete)
    # Written down before it is told: who has seen the end can count on the sum.
    yield answer.end(response) if asked.stream else answer.whole(response, model)


def _record(service: Service, caller: Caller, name: str, stream: Stream, *, complete: bool) -> None:
    usage = None if stream.cached else stream.usage
    service.record(caller.owner, name, usage, stream.cost, complete=complete)


class _Failure(NamedTuple):
    status: int
    body: dict[str, Any]
    headers: dict[str, str]


def _failed(dialect: ModuleType, error: Exception) -> Response:
    failure = _failure(dialect, error)
    headers = {**_headers(dialect), **failure.headers}
    return JSONResponse(failure.body, failure.status, headers=headers)


def _failure(dialect: ModuleType, error: Exception) -> _Failure:
    """An error in the dialect's form; what only the service's own people may see goes into the log."""
    code = param = None
    if isinstance(error, LLMError):
        problem = problem_of(error)
        found = next((row for row in _WORDS if isinstance(error, row[0])), (LLMError, None, None))
        status, code = found[1] or problem.status, found[2]
        param = getattr(error, "param", None)
    else:
        if not isinstance(error, Problem):
            log.error("an answer failed", exc_info=error)
        problem = error if isinstance(error, Problem) else _INTERNAL
        status = problem.status
    if problem.cause:
        log.warning("%s: %s", problem.title, problem.cause)
    headers = dict(problem.headers or {})
    if isinstance(error, LLMError) and not error.retriable:
        headers["x-should-retry"] = "false"  # both vendors' clients heed it
    if status == 402 and dialect is openai:  # this vendor has no word for it but the code
        status = 429
    # Its own words say enough; a general advice needs to say what for.
    own = problem.detail == str(problem.cause)
    message = problem.detail if own else f"{problem.title}: {problem.detail}"
    body = dialect.error(status, message, name=request_id.get(), code=code, param=param)
    return _Failure(status, body, headers)
