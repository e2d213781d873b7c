"""What the service's own API takes and says, as pydantic models: its documentation is made of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from decimal import Decimal
from math import isfinite
from typing import Annotated, Any, Final

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from agents.store import Stored, Summary
from agents.types import TokenUsage

MAX_TITLE: Final = 200  # characters
_DEEPEST: Final = 50  # levels of what is nested in a content part

_EXAMPLE_MESSAGE: Final[dict[str, Any]] = {
    "number": 2,
    "role": "assistant",
    "content": "12 × 12 is 144.",
    "status": "ok",
    "model": "gpt-4o-mini",
    "usage": {"prompt_tokens": 57, "completion_tokens": 9, "total_tokens": 66},
    "cost": "0.00001395",
    "created": "2026-11-21T10:00:00Z",
}


class View(BaseModel):
    """A value of the API."""

    model_config = ConfigDict(protected_namespaces=())


class Body(View):
    """What a caller sends; a field that is not known is refused, so that a slip is not lost."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


def _checked(value: Any) -> Any:
    """Refuse what could be stored and never be shown again."""
    _check_depth(value, _DEEPEST)
    if readable(value) != value:
        raise ValueError("holds half a character (a lone surrogate): send whole ones")
    return value


def _check_depth(value: Any, left: int) -> None:
    if not left:
        raise ValueError(f"is nested more than {_DEEPEST} deep")
    if isinstance(value, float) and not isfinite(value):
        raise ValueError("holds a number that is too large, or none")
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for item in inner:
        _check_depth(item, left - 1)


def _said(value: Any) -> Any:
    if isinstance(value, str) and not value.strip():
        raise ValueError("is empty: say something")
    return _checked(value)


def readable(value: Any) -> Any:
    """The same, with a question mark for each half of a character, which no answer could carry."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [readable(item) for item in value]
    if isinstance(value, dict):
        return {readable(name): readable(item) for name, item in value.items()}
    return value


Text = Annotated[str, AfterValidator(_checked)]


class NewConversation(Body):
    """A conversation to begin."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"title": "Sums", "system": "Be brief."}]}
    )

    title: Text | None = Field(None, max_length=MAX_TITLE, description="None: the first question.")
    system: Text | None = Field(None, description="Instructions. None: those of the service.")


class ChangedConversation(Body):
    """What is to change; what is left out stays."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"title": "Sums and products"}]})

    title: Text | None = Field(None, min_length=1, max_length=MAX_TITLE)
    system: Text | None = None


class NewMessage(Body):
    """What the user says."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"content": "What is 12 x 12?"}]})

    content: Annotated[str | list[dict[str, Any]], AfterValidator(_said)] = Field(
        description="Text, or a list of parts in OpenAI's form.", min_length=1
    )
    model: str | None = Field(None, description="One of `GET /models`. None: the default.")


class Again(Body):
    """How the last answer is to be written anew."""

    model_config = ConfigDict(json_schema_extra={"examples": [{}]})

    model: str | None = Field(None, description="One of `GET /models`. None: the default.")


class Branch(Body):
    """Where a branch begins."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"at": 2}]})

    at: int = Field(ge=0, description="Number of the last message that the branch shares; 0: none.")


class Usage(View):
    """Tokens; `None`: unknown."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    cached_tokens: int | None = None


class CallView(View):
    """A tool call that the model made; `arguments` is JSON text, as the model wrote it."""

    id: str | None
    name: str
    arguments: str


class MessageView(View):
    """One message of a conversation."""

    model_config = ConfigDict(json_schema_extra={"examples": [_EXAMPLE_MESSAGE]})

    number: int = Field(description="Its place; grows, and may have gaps.")
    role: str
    content: str | list[Any] | None = None
    tool_calls: list[CallView] | None = None
    tool_call_id: str | None = None
    status: str = Field("ok", description="`partial`: an answer that was cut.")
    model: str | None = None
    usage: Usage | None = None
    cost: str | None = Field(None, description="US dollars; null: unknown, or no answer.")
    created: datetime | None = None


class ConversationView(View):
    """A conversation."""

    id: str
    title: str | None
    created: datetime
    updated: datetime
    revision: int
    parent: str | None = Field(None, description="The conversation that it is a branch of.")
    system: str | None = None
    answering: bool = Field(False, description="An answer is being written.")
    usage: Usage | None = Field(
        None, description="Of all answers; null: unknown, or not asked for."
    )
    cost: str | None = Field(
        None, description="US dollars of all answers, also of replaced ones; null: unknown."
    )
    snippet: str | None = Field(None, description="Of a search: the text around what was found.")
    messages: list[MessageView] | None = Field(None, description="Null in lists.")


class ConversationPage(View):
    """A page of conversations, the last changed first."""

    data: list[ConversationView]
    next: str | None = Field(None, description="What `cursor=` takes for the next page.")


class AnswerView(View):
    """What came of a message."""

    messages: list[MessageView] = Field(description="All that were added.")
    status: str = Field(description="`ok`, or `partial`: it was stopped.")
    model: str | None = None
    usage: Usage | None = None
    cost: str | None = Field(None, description="US dollars of this answer; null: unknown.")


class ProblemView(View):
    """An error, as RFC 9457 has it."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "type": "about:blank",
                    "title": "Not found",
                    "status": 404,
                    "detail": "there is no such conversation",
                    "request_id": "3f0c1c9e6f0a4b1e8d6d2b7f0d9a1c55",
                }
            ]
        }
    )

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    request_id: str | None = None
    retry_after: int | None = Field(None, description="Seconds after which to try again.")


class DayView(View):
    """What one model took on one day (UTC)."""

    day: str
    model: str
    calls: int
    prompt_tokens: int
    completion_tokens: int
    cost: str | None = Field(description="US dollars, as far as prices are known; null: none is.")
    unpriced: int = Field(description="Calls without a known price.")
    interrupted: int = Field(description="Calls whose answer was cut.")


class TotalView(View):
    """The sum of all days."""

    calls: int
    prompt_tokens: int
    completion_tokens: int
    cost: str | None
    unpriced: int
    interrupted: int


class BudgetView(View):
    """What the caller may spend."""

    limit_usd: str
    spent_usd: str
    period: str = Field(description="`day` or `month`, in UTC.")


class UsageView(View):
    """What the caller has spent."""

    days: list[DayView]
    total: TotalView
    budget: BudgetView | None = None


class ModelView(View):
    id: str


class ModelsView(View):
    """The models that may be asked."""

    data: list[ModelView]
    default: str


class SessionView(View):
    """Who is asking, and what there is."""

    owner: str
    keys: bool = Field(description="Whether a key is needed.")
    version: str
    tools: list[str]


class Cancelled(View):
    """Whether there was an answer to stop."""

    cancelled: bool


def money(amount: Decimal | None) -> str | None:
    """Dollars as plain decimal text, without an exponent."""
    if amount is None:
        return None
    text = f"{amount:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def usage_view(usage: TokenUsage | None) -> Usage | None:
    """The tokens that the API shows; `None` if nothing is known."""
    if usage is None:
        return None
    return Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.total_tokens,
        cached_tokens=usage.cached_tokens,
    )


def message_view(stored: Stored) -> MessageView:
    """A message as the API shows it."""
    message = stored.message
    calls = [
        CallView(id=call.id, name=readable(call.name), arguments=readable(call.arguments))
        for call in message.tool_calls or ()
    ]
    return MessageView(
        number=stored.number,
        role=message.role,
        content=readable(message.content),
        tool_calls=calls or None,
        tool_call_id=message.tool_call_id,
        status=stored.status,
        model=stored.model,
        usage=usage_view(stored.usage),
        cost=money(stored.cost),
        created=stored.created,
    )


def total_of(stored: Iterable[Stored]) -> tuple[TokenUsage | None, Decimal | None]:
    """Tokens and dollars of these answers together; `None` if one of them is unknown."""
    paid = [s for s in stored if s.message.role == "assistant" and not _is_free(s)]
    usages = [s.usage or TokenUsage() for s in paid]
    usage = sum(usages[1:], usages[0]) if usages else None
    costs = [s.cost for s in paid]
    known = [cost for cost in costs if cost is not None]
    return usage, sum(known, Decimal(0)) if len(known) == len(costs) else None


def _is_free(stored: Stored) -> bool:
    return stored.usage is None and stored.cost == 0


def conversation_view(
    summary: Summary,
    *,
    answering: bool = False,
    stored: Sequence[Stored] | None = None,
    snippet: str | None = None,
    cost: Decimal | None = None,
) -> ConversationView:
    """A conversation as the API shows it; with messages, if they are given."""
    usage = None if stored is None else total_of(stored)[0]
    return ConversationView(
        id=summary.id,
        title=summary.title,
        created=summary.created,
        updated=summary.updated,
        revision=summary.revision,
        parent=summary.parent,
        system=summary.data.get("system"),
        answering=answering,
        usage=usage_view(usage),
        cost=money(cost),
        snippet=snippet,
        messages=None if stored is None else [message_view(s) for s in stored],
    )
