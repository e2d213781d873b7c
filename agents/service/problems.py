"""What went wrong, as problem details (RFC 9457): one table from our errors to statuses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from starlette.exceptions import HTTPException

from agents.store import ConflictError, StoreError
from agents.types import AgentCancelledError, AgentLimitError, AgentLoopError
from LLM import (
    LLMAuthenticationError,
    LLMBudgetError,
    LLMCancelledError,
    LLMConfigError,
    LLMConnectionError,
    LLMContentFilterError,
    LLMContextLengthError,
    LLMError,
    LLMInvalidRequestError,
    LLMNotFoundError,
    LLMQuotaError,
    LLMRateLimitError,
    LLMServerError,
    LLMTimeoutError,
)

PROBLEM_JSON: Final = "application/problem+json"


class Problem(HTTPException):
    """An answer that is an error.

    Attributes:
        status_code: of HTTP.
        title: what kind of problem it is, the same each time.
        detail: what is wrong this time, and what to do; safe to show to any caller.
        headers: to send along.
        cause: what only the service's own people may see; it goes into the log, as `logs` tells errors.
    """

    def __init__(
        self,
        status: int,
        title: str,
        detail: str = "",
        *,
        headers: Mapping[str, str] | None = None,
        cause: Exception | None = None,
    ) -> None:
        super().__init__(status, detail, dict(headers or {}))
        self.title = title
        self.cause = cause

    @property
    def status(self) -> int:
        """Of HTTP."""
        return self.status_code

    def body(self, request_id: str | None) -> dict[str, Any]:
        """The problem as a value for JSON."""
        wait = (self.headers or {}).get("retry-after")
        return {
            "type": "about:blank",
            "title": self.title,
            "status": self.status_code,
            "detail": self.detail,
            "request_id": request_id,
            **({} if wait is None else {"retry_after": int(wait)}),
        }


class _Row(NamedTuple):
    kind: type[LLMError]
    status: int
    title: str
    detail: str | None  # None: the error's own words, which say nothing of the service's inside


_OPERATOR: Final = "tell those who run this service"

# The first that fits counts, so a class stands before those that it is made of.
_TABLE: Final = (
    _Row(LLMBudgetError, 402, "Budget used up", None),
    _Row(AgentLoopError, 422, "The model went in circles", None),
    _Row(LLMQuotaError, 503, "The model's quota is used up", _OPERATOR),
    _Row(LLMRateLimitError, 429, "The model is asked too often", "wait, then try again"),
    _Row(LLMContextLengthError, 422, "Too long for the model", "shorten it, or begin anew"),
    _Row(LLMContentFilterError, 422, "Refused by the model's content filter", "ask differently"),
    _Row(
        LLMAuthenticationError,
        502,
        "The model server refuses this service",
        f"its key is not accepted there: {_OPERATOR}",
    ),
    _Row(LLMNotFoundError, 502, "The model server does not know the model", _OPERATOR),
    _Row(LLMInvalidRequestError, 422, "The model server refuses the request", None),
    _Row(AgentCancelledError, 409, "Cancelled", "the answer was stopped"),
    _Row(LLMCancelledError, 409, "Cancelled", "the answer was stopped"),
    _Row(LLMTimeoutError, 504, "The model did not answer in time", "try again, or ask for less"),
    _Row(
        LLMConnectionError,
        502,
        "The model could not be reached, or broke off",
        "what was said is stored: try again",
    ),
    _Row(LLMServerError, 502, "The model server failed", "the fault is there: try again"),
    _Row(ConflictError, 409, "Changed by another writer", "load the conversation again"),
    _Row(LLMConfigError, 400, "Cannot be used", None),
)


def problem_of(error: LLMError) -> Problem:
    """The problem that an error comes to."""
    words = str(error)
    wait = error.suggested_wait
    headers = {} if wait is None else {"retry-after": str(max(1, round(wait)))}
    if isinstance(error, AgentLimitError):
        status = 402 if error.limit == "cost" else 422
        return Problem(status, "A limit was reached", words, headers=headers, cause=error)
    if isinstance(error, StoreError) and not isinstance(error, ConflictError):
        if error.reason == "missing":
            return Problem(404, "Not found", "there is no such conversation", cause=error)
        headers = {"retry-after": "2"} if error.retriable else {}
        detail = "nothing was lost: try again in a moment" if error.retriable else _OPERATOR
        return Problem(503, "The database cannot be used", detail, headers=headers, cause=error)
    for row in _TABLE:
        if isinstance(error, row.kind):
            return Problem(row.status, row.title, row.detail or words, headers=headers, cause=error)
    detail = "its answer could not be understood: try again"
    return Problem(502, "The model could not answer", detail, headers=headers, cause=error)
