"""The service's own API: conversations, answers, usage."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import json
from collections.abc import Callable, Coroutine
from datetime import date, datetime, timedelta
from decimal import Decimal
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Body, Depends, Header, Path, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer

from agents.conversation import Conversation
from agents.service.answers import Answer, Event
from agents.service.core import Caller, Service
from agents.service.feed import FeedResponse, all_of
from agents.service.problems import PROBLEM_JSON, Problem
from agents.service.views import (
    Again,
    AnswerView,
    Branch,
    BudgetView,
    Cancelled,
    ChangedConversation,
    ConversationPage,
    ConversationView,
    DayView,
    ModelsView,
    ModelView,
    NewConversation,
    NewMessage,
    ProblemView,
    SessionView,
    TotalView,
    UsageView,
    conversation_view,
    money,
    readable,
)
from agents.store import ConflictError, Summary
from LLM import LLMConfigError, __version__

EVENT_STREAM: Final = "text/event-stream"
_MOST_KEY: Final = 200  # characters of an Idempotency-Key
_MOST_DAYS: Final = 3660

_PROBLEMS: Final[dict[int | str, dict[str, Any]]] = {
    status: {
        "description": description,
        "content": {PROBLEM_JSON: {"schema": {"$ref": "#/components/schemas/ProblemView"}}},
    }
    for status, description in (
        (401, "No key, or an unknown one"),
        (404, "No such conversation of the caller's"),
        (409, "An answer is being written there, or another writer was quicker"),
        (422, "The request cannot be used"),
        (429, "Too many requests"),
        (503, "Too busy, or the database is away: nothing was lost, try again"),
    )
}
_ANSWERED: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "description": "The answer, whole; or its events, if `Accept: text/event-stream` asks for them: "
        "`message`, `text`, `reasoning`, `tool_call`, `tool_result`, `turn`, `error`, and last `done`. "
        "A stream without `done` was cut.",
        "content": {
            EVENT_STREAM: {
                "schema": {"type": "string"},
                "example": 'event: text\ndata: {"text": "12 × 12"}\n\n'
                'event: done\ndata: {"status": "ok", "usage": null, "cost": null, "revision": 2}\n\n',
            }
        },
    },
    402: {
        "description": "The budget does not allow it; nothing was asked",
        "content": {PROBLEM_JSON: {"schema": {"$ref": "#/components/schemas/ProblemView"}}},
    },
}

_bearer: Final = HTTPBearer(
    auto_error=False, description="`python -m agents keys create` makes one"
)


class _Door(APIRoute):
    """Looks at the key before anything else is read: a stranger's body is not even parsed."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handled(request: Request) -> Response:
            service = _service(request)
            request.state.caller = await run_in_threadpool(service.authenticate, request)
            return await handle(request)

        return handled


async def _caller(request: Request, _: Annotated[Any, Depends(_bearer)]) -> Caller:
    caller: Caller = request.state.caller
    return caller


Asking = Annotated[Caller, Depends(_caller)]

router = APIRouter(
    responses={**_PROBLEMS, 400: {"model": ProblemView, "description": "Malformed"}},
    dependencies=[Depends(_caller)],  # so that the documentation says that a key is needed
    route_class=_Door,
)

Id = Annotated[str, Path(max_length=100, description="Of a conversation.")]
IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=_MOST_KEY,
        description="A name that the caller gives to the request: sent again, it is not done again.",
    ),
]


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


@router.post("/conversations", status_code=201, tags=["conversations"])
def create(
    request: Request,
    caller: Asking,
    body: Annotated[NewConversation | None, Body()] = None,
    key: IdempotencyKey = None,
) -> ConversationView:
    """Begin a conversation."""
    service, wanted = _service(request), body or NewConversation(title=None, system=None)
    system = service.settings.system if wanted.system is None else wanted.system
    data = {} if system is None else {"system": system}
    name = _named(caller, key)
    conversations = service.store.conversations
    try:
        made = conversations.create(name, title=wanted.title, owner=caller.owner, data=data)
    except ConflictError:
        found = conversations.get(name or "")
        if found is None or found.owner != caller.owner:
            raise
        made = found
    return conversation_view(made, stored=[], cost=Decimal(0))


def _named(caller: Caller, key: str | None) -> str | None:
    """The id of what a request with an `Idempotency-Key` makes: the same again if it is sent again."""
    return None if key is None else hashlib.sha256(f"{caller.owner}\0{key}".encode()).hexdigest()


@router.get("/conversations", tags=["conversations"])
def find(
    request: Request,
    caller: Asking,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: Annotated[str | None, Query(max_length=500, description="`next` of a page.")] = None,
    q: Annotated[
        str | None, Query(max_length=500, description="Words of a title or of a message.")
    ] = None,
) -> ConversationPage:
    """The caller's conversations, the last changed first."""
    service = _service(request)
    owner = caller.owner
    conversations = service.store.conversations
    before = None if cursor is None else _read_cursor(cursor)
    found = conversations.list(owner, limit=limit + 1, before=before, query=q or None)
    page, more = found[:limit], len(found) > limit
    snippets: dict[str, str] = {}
    if q and before is None:
        known = {summary.id for summary in page}
        for hit in conversations.search(q, owner, limit=limit):
            snippets.setdefault(hit.conversation, hit.snippet)
        others = [conversations.get(name) for name in snippets if name not in known]
        page = [*page, *(summary for summary in others if summary is not None)]
    names = [summary.id for summary in page]
    running, costs = service.leases.running(names), conversations.costs(names)
    return ConversationPage(
        data=[
            conversation_view(
                s, answering=s.id in running, snippet=snippets.get(s.id), cost=costs[s.id]
            )
            for s in page
        ],
        next=_cursor(found[limit - 1]) if more else None,
    )


@router.get("/conversations/{id}", tags=["conversations"])
def show(request: Request, caller: Asking, id: Id) -> ConversationView:  # noqa: A002 - what the path calls it
    """A conversation with its messages."""
    service = _service(request)
    return _shown(service, service.conversation(caller, id))


def _shown(service: Service, conversation: Conversation) -> ConversationView:
    running = service.leases.running([conversation.id])
    costs = service.store.conversations.costs([conversation.id])
    return conversation_view(
        conversation.summary,
        answering=bool(running),
        stored=conversation.stored,
        cost=costs[conversation.id],
    )


@router.patch("/conversations/{id}", tags=["conversations"])
def change(request: Request, caller: Asking, id: Id, body: ChangedConversation) -> ConversationView:  # noqa: A002
    """Rename it, or give it other instructions."""
    service = _service(request)
    conversation = service.conversation(caller, id)
    data = conversation.summary.data
    if body.system is not None:
        data = {**data, "system": body.system}
    service.store.conversations.update(id, title=body.title, data=data)
    conversation.reload()
    return _shown(service, conversation)


@router.delete("/conversations/{id}", status_code=204, tags=["conversations"])
def delete(request: Request, caller: Asking, id: Id) -> Response:  # noqa: A002
    """Forget it, with its messages; what it cost stays in the usage."""
    service = _service(request)
    conversation = service.conversation(caller, id)
    service.answers.cancel(id)
    conversation.delete()
    return Response(status_code=204)


@router.post(
    "/conversations/{id}/messages",
    tags=["answers"],
    response_model=AnswerView,
    responses=_ANSWERED,
)
async def say(
    request: Request,
    caller: Asking,
    id: Id,  # noqa: A002
    body: NewMessage,
    key: IdempotencyKey = None,
) -> Response:
    """Say something, and get the answer: whole, or as events."""
    service, loop = _service(request), asyncio.get_running_loop()

    def begin() -> Answer:
        conversation = service.summary(caller, id)
        model = service.checked_model(body.model)
        return service.answers.say(
            caller, conversation, body.content, model=model, request=key, loop=loop
        )

    return await _answered(request, begin)


@router.post(
    "/conversations/{id}/regenerate",
    tags=["answers"],
    response_model=AnswerView,
    responses=_ANSWERED,
)
async def regenerate(
    request: Request,
    caller: Asking,
    id: Id,  # noqa: A002
    body: Annotated[Again | None, Body()] = None,
    key: IdempotencyKey = None,
) -> Response:
    """Answer the last message anew; the old answer is kept in the database, and shown no more."""
    service, loop = _service(request), asyncio.get_running_loop()

    def begin() -> Answer:
        conversation = service.summary(caller, id)
        model = service.checked_model(body.model if body else None)
        return service.answers.regenerate(caller, conversation, model=model, loop=loop, request=key)

    return await _answered(request, begin)


@router.post("/conversations/{id}/branch", status_code=201, tags=["conversations"])
def branch(
    request: Request,
    caller: Asking,
    id: Id,  # noqa: A002
    body: Branch,
    key: IdempotencyKey = None,
) -> ConversationView:
    """A new conversation that begins with the first messages of this one."""
    service = _service(request)
    conversation = service.conversation(caller, id)
    stored = conversation.stored
    shared = sum(s.number <= body.at for s in stored)
    try:
        new = conversation.branch(shared, id=_named(caller, key))
    except LLMConfigError as error:
        raise Problem(422, "Cannot branch there", str(error)) from error
    return _shown(service, service.conversation(caller, new.id))


@router.post("/conversations/{id}/cancel", status_code=202, tags=["answers"])
def cancel(request: Request, caller: Asking, id: Id) -> Cancelled:  # noqa: A002
    """Stop the answer that is being written; what there is of it is stored as `partial`."""
    service = _service(request)
    service.summary(caller, id)
    return Cancelled(cancelled=service.answers.cancel(id))


@router.get("/conversations/{id}/export", tags=["conversations"])
def export(
    request: Request,
    caller: Asking,
    id: Id,  # noqa: A002
    form: Literal["openai", "anthropic", "markdown"] = "openai",
) -> Response:
    """The conversation as a file: in the form of OpenAI's or Anthropic's API, or to be read."""
    service = _service(request)
    conversation = service.conversation(caller, id)
    if form == "markdown":
        body: Response = PlainTextResponse(_markdown(conversation), media_type="text/markdown")
        ending = "md"
    else:
        body, ending = JSONResponse(conversation.export(form)), "json"
    # The id has been found, so it is one of ours: no quotes, no line ends.
    name = f"conversation-{hashlib.sha256(id.encode()).hexdigest()[:8]}.{ending}"
    body.headers["content-disposition"] = f'attachment; filename="{name}"'
    return body


@router.get("/usage", tags=["usage"])
def usage(
    request: Request,
    caller: Asking,
    since: Annotated[
        str, Query(max_length=20, description="A day, `2026-11-01`, or the last days, `7d`.")
    ] = "30d",
) -> UsageView:
    """What the caller has spent, by day (UTC) and model, and what may still be spent."""
    service = _service(request)
    today = service.clock.utc().date()
    rows = service.ledger.by_day_and_model(caller.owner, _first_day(since, today))
    counts = ("calls", "prompt_tokens", "completion_tokens", "unpriced", "interrupted")
    total: dict[str, Any] = {name: sum(getattr(row, name) for row in rows) for name in counts}
    return UsageView(
        days=[
            DayView(
                day=str(row.day),
                model=row.model,
                cost=_known(row.cost, row.calls, row.unpriced),
                **{name: getattr(row, name) for name in counts},
            )
            for row in rows
        ],
        total=TotalView(
            cost=_known(
                sum((row.cost for row in rows), Decimal(0)), total["calls"], total["unpriced"]
            ),
            **total,
        ),
        budget=_budget(service, caller),
    )


def _known(cost: Decimal, calls: int, unpriced: int) -> str | None:
    """Dollars; `None` if nothing is known of them."""
    return None if calls and calls == unpriced else money(cost)


def _budget(service: Service, caller: Caller) -> BudgetView | None:
    budget = service.budget_of(caller)
    if budget is None or budget.usd is None:
        return None
    return BudgetView(
        limit_usd=money(budget.usd) or "0",
        spent_usd=money(budget.spent_usd) or "0",
        period=budget.period or "all",
    )


@router.get("/models", tags=["session"])
def models(request: Request) -> ModelsView:
    """The models that may be asked."""
    service = _service(request)
    names = service.models()
    return ModelsView(data=[ModelView(id=name) for name in names], default=names[0])


@router.get("/session", tags=["session"])
def session(request: Request, caller: Asking) -> SessionView:
    """Who is asking, and what there is."""
    service = _service(request)
    return SessionView(
        owner=caller.owner,
        keys=caller.key is not None,
        version=__version__,
        tools=[schema["function"]["name"] for schema in service.toolbox.schemas],
    )


async def _answered(request: Request, begin: Callable[[], Answer]) -> Response:
    """The answer that `begin` begins, in the form that the caller asked for."""
    answer = await run_in_threadpool(begin)
    if EVENT_STREAM in request.headers.get("accept", ""):
        return FeedResponse(answer.feed, Event.encode)
    return _whole(await all_of(answer.feed, request.receive))


def _whole(events: list[Event]) -> Response:
    """An answer's events as one value; an error, if that is what it came to."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        by_name.setdefault(event.name, []).append(event.data)
    messages = [
        *by_name.get("message", []),
        *(m for t in by_name.get("turn", []) for m in t["messages"]),
    ]
    done = by_name.get("done", [{}])[-1]
    if "error" in by_name:
        problem = by_name["error"][-1]
        return JSONResponse(
            {**problem, "messages": messages}, problem["status"], media_type=PROBLEM_JSON
        )
    return JSONResponse(
        {
            "messages": messages,
            "status": done.get("status", "partial"),
            "model": next((m["model"] for m in reversed(messages) if m["model"]), None),
            "usage": done.get("usage"),
            "cost": done.get("cost"),
        }
    )


def _cursor(last: Summary) -> str:
    text = json.dumps([last.updated.isoformat(), last.id])
    return base64.urlsafe_b64encode(text.encode()).decode()


def _read_cursor(cursor: str) -> Summary:
    try:
        moment, name = json.loads(base64.urlsafe_b64decode(cursor.encode()))
        updated = datetime.fromisoformat(moment)
        if not isinstance(name, str) or readable(name) != name or updated.tzinfo is None:
            raise ValueError
    except (ValueError, TypeError, binascii.Error):
        raise Problem(422, "Malformed request", "cursor is not one of a page's `next`") from None
    return Summary(name, None, None, updated, updated, 0)


def _first_day(since: str, today: date) -> date:
    try:
        if since.endswith("d") and since[:-1].isascii() and since[:-1].isdigit():
            days = min(max(int(since[:-1]), 1), _MOST_DAYS)
            return today - timedelta(days=days - 1)
        return date.fromisoformat(since)
    except ValueError:
        detail = f"since is {since!r}; give a day like 2026-11-01, or days like 7d"
        raise Problem(422, "Malformed request", detail) from None


def _markdown(conversation: Conversation) -> str:
    lines = [f"# {conversation.title or 'Conversation'}", ""]
    for stored in conversation.stored:
        message = stored.message
        cut = " (cut off)" if stored.status == "partial" else ""
        lines += [f"## {message.role}{cut}", ""]
        if message.role == "tool":
            lines += ["```", message.text, "```", ""]
        elif message.text:
            lines += [message.text, ""]
        for call in message.tool_calls or ():
            lines += [f"- calls `{call.name}` with `{call.arguments}`", ""]
    return "\n".join(lines)
