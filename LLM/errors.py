"""The exception tree, by what the caller can do; plain, picklable values that never hold a secret."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from enum import Enum
from typing import Any, NamedTuple

from LLM.clock import utc_now


class ErrorType(str, Enum):
    """What went wrong, as a plain string: `ErrorType.RATE_LIMIT == "rate_limit"`."""

    RATE_LIMIT = "rate_limit"
    QUOTA = "quota"
    AUTH_ERROR = "auth_error"
    NOT_FOUND = "not_found"
    INVALID_REQUEST = "invalid_request"
    CONTEXT_TOO_LONG = "context_too_long"
    CONTENT_FILTER = "content_filter"
    SERVER_ERROR = "server_error"
    INVALID_RESPONSE = "invalid_response"
    CONNECTION_ERROR = "connection_error"
    STREAM_ERROR = "stream_error"
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"
    OUTPUT = "output"
    CONFIG_ERROR = "config_error"
    BUDGET = "budget"
    UNKNOWN = "unknown"

    def __str__(self) -> str:
        return self.value


class Attempt(NamedTuple):
    """One HTTP request of a call.

    Attributes:
        status: HTTP status, or `None` if no answer came.
        error: class name of the failure, or `None` for a success.
        waited: seconds slept before this attempt; 0 before the first.
        seconds: seconds the attempt itself took.
        request_id: the server's id of the request, or `None`.
    """

    status: int | None
    error: str | None
    waited: float
    seconds: float
    request_id: str | None = None


class LLMError(Exception):
    """Every failure of this library.

    Attributes:
        error_type: an `ErrorType`.
        retriable: whether the same call can succeed later.
        suggested_wait: seconds the server asked to wait, or `None` if it did not say.
        provider: name of the host's provider, or `None` if no host was chosen yet.
        model: the model asked for, or `None`.
        request_id: the server's id of the last attempt, or `None`.
        attempts: how many attempts were made; 0 if nothing was sent.
        history: an `Attempt` for each of them.
        partial: of a stream, the response as far as it came (text, tool calls, usage); else `None`.
        maybe_billed: the request went out and no whole answer came: the server may have worked, and may
            charge for it. An error that the server answered with is free.
        unsent: the last attempt was refused on this side, and is not in `history`.
        fallbacks: of a call with fallbacks, what was tried and why it failed, as (model, reason).
    """

    error_type: ErrorType = ErrorType.UNKNOWN
    retriable: bool = False
    maybe_billed: bool = False
    unsent: bool = False
    fallbacks: tuple[tuple[str, str], ...] = ()

    def __init__(
        self,
        message: str = "",
        *,
        retriable: bool | None = None,
        suggested_wait: float | None = None,
        provider: str | None = None,
        model: str | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        if retriable is not None:
            self.retriable = retriable
        self.suggested_wait = suggested_wait
        self.provider = provider
        self.model = model
        self.request_id = request_id
        self.history: tuple[Attempt, ...] = ()
        self.partial: Any = None

    @property
    def attempts(self) -> int:
        return len(self.history)

    @property
    def message(self) -> str:
        return str(self)

    def __str__(self) -> str:
        # OSError, a base of some subclasses, would show its errno instead.
        return (str(self.args[0]) if self.args else "") or type(self).__name__

    def __reduce__(self) -> tuple[Any, ...]:
        cause = self.__cause__
        try:
            pickle.dumps(cause)
        except Exception:  # noqa: BLE001 - whatever it holds: what we say must get home
            cause = RuntimeError(repr(cause))
        return _restore, (type(self), self.args, self.__dict__, cause)


def _restore(
    cls: type[LLMError], args: tuple[Any, ...], state: dict[str, Any], cause: BaseException | None
) -> LLMError:
    error = cls(*args)
    error.__dict__.update(state)
    error.__cause__ = cause
    return error


class LLMConfigError(LLMError, ValueError):
    """The program must be fixed; nothing was sent."""

    error_type = ErrorType.CONFIG_ERROR
    unsent = True


class LLMConnectionError(LLMError, ConnectionError):
    """No complete answer arrived."""

    error_type = ErrorType.CONNECTION_ERROR
    retriable = True


class LLMTimeoutError(LLMConnectionError, TimeoutError):
    """A clock ran out.

    Attributes:
        clock: which one: `connect`, `idle` (no content in a stream), `timeout` or `deadline`.
    """

    error_type = ErrorType.TIMEOUT

    def __init__(self, message: str = "", *, clock: str = "timeout", **details: Any) -> None:
        super().__init__(message, **details)
        self.clock = clock


class LLMStreamError(LLMConnectionError):
    """A stream broke or was cut; what did arrive is in `.partial`."""

    error_type = ErrorType.STREAM_ERROR
    maybe_billed = True


class LLMCancelledError(LLMConnectionError):
    """The caller cancelled or closed the client."""

    error_type = ErrorType.CANCELLED
    retriable = False


class LLMAPIError(LLMError):
    """The server answered with an error.

    Attributes:
        status_code: HTTP status; `None` for an error inside a stream that had begun with 200.
        code: the server's machine-readable code, or `None`.
        type: the server's machine-readable type, or `None`.
        param: the parameter that the server complains about, or `None`.
        body: the answer's text, cut at 64 KiB.
    """

    def __init__(
        self,
        message: str = "",
        *,
        status_code: int | None = None,
        code: str | int | None = None,
        type: str | None = None,  # noqa: A002 - the wire's own name for it
        param: str | None = None,
        body: str = "",
        **details: Any,
    ) -> None:
        super().__init__(message, **details)
        self.status_code = status_code
        self.code = code
        self.type = type
        self.param = param
        self.body = body


class LLMAuthenticationError(LLMAPIError):
    """401, 403: the key is missing, wrong or not allowed to do this."""

    error_type = ErrorType.AUTH_ERROR


class LLMNotFoundError(LLMAPIError):
    """404: no such model or path."""

    error_type = ErrorType.NOT_FOUND


class LLMInvalidRequestError(LLMAPIError):
    """400, 413, 422: the request cannot succeed as it is."""

    error_type = ErrorType.INVALID_REQUEST


class LLMContextLengthError(LLMInvalidRequestError):
    """The messages are longer than the model's context window."""

    error_type = ErrorType.CONTEXT_TOO_LONG


class LLMContentFilterError(LLMAPIError):
    """The provider refused the content."""

    error_type = ErrorType.CONTENT_FILTER


class LLMRateLimitError(LLMAPIError):
    """429: too much, too fast.

    Attributes:
        limit: which limit was hit: `requests`, `tokens`, or `None` if the server did not say.
    """

    error_type = ErrorType.RATE_LIMIT
    retriable = True

    def __init__(self, message: str = "", *, limit: str | None = None, **details: Any) -> None:
        super().__init__(message, **details)
        self.limit = limit


class LLMQuotaError(LLMRateLimitError):
    """The account's money or quota is used up: a retry cannot help."""

    error_type = ErrorType.QUOTA
    retriable = False


class LLMServerError(LLMAPIError):
    """5xx: the server's fault, or 529: overloaded."""

    error_type = ErrorType.SERVER_ERROR
    retriable = True


class LLMResponseError(LLMAPIError):
    """A 2xx answer that is not what was agreed: HTML, cut JSON, no choices."""

    error_type = ErrorType.INVALID_RESPONSE
    maybe_billed = True


class LLMBudgetError(LLMError):
    """The call would not fit the caller's own budget; nothing was sent."""

    error_type = ErrorType.BUDGET
    unsent = True


class LLMOutputError(LLMError):
    """The model answered, but not with what was asked for; see `LLM.parse`.

    Attributes:
        reason: `cut` (the answer reached its `max_tokens`), `refused` (the model would not), or `invalid`
            (it is not what the schema says; also after it was told).
        text: what the model said last.
        usage: tokens of all attempts together; a part is `None` if one of them did not say.
        cost: US dollars of all attempts together; `None` if unknown.
    """

    error_type = ErrorType.OUTPUT

    def __init__(
        self,
        message: str = "",
        *,
        reason: str = "invalid",
        text: str = "",
        usage: Any = None,
        cost: Any = None,
        **details: Any,
    ) -> None:
        super().__init__(message, **details)
        self.reason = reason
        self.text = text
        self.usage = usage
        self.cost = cost


# Statuses where the same request may succeed later. 408 and 409 (lock timeout) as in the official
# clients (openai-python `_base_client.py`, 2026-11), but 409 is left to `x-should-retry`.
RETRIABLE_STATUSES = frozenset({408, 429, 500, 502, 503, 504, 529})

# The structured code or type of an error body decides before its status does. Sources: OpenAI's
# "Error codes", Anthropic's "Errors", llama.cpp's `format_error_response`, all as of 2026-11.
_BY_CODE: Mapping[str, type[LLMAPIError]] = {
    "context_length_exceeded": LLMContextLengthError,
    "exceed_context_size_error": LLMContextLengthError,
    "string_above_max_length": LLMContextLengthError,
    "insufficient_quota": LLMQuotaError,
    "billing_hard_limit_reached": LLMQuotaError,
    "billing_not_active": LLMQuotaError,
    "billing_error": LLMQuotaError,
    "rate_limit_exceeded": LLMRateLimitError,
    "rate_limit_error": LLMRateLimitError,
    "requests": LLMRateLimitError,
    "tokens": LLMRateLimitError,
    "invalid_api_key": LLMAuthenticationError,
    "authentication_error": LLMAuthenticationError,
    "permission_error": LLMAuthenticationError,
    "model_not_found": LLMNotFoundError,
    "not_found_error": LLMNotFoundError,
    "content_filter": LLMContentFilterError,
    "content_policy_violation": LLMContentFilterError,
    "moderation_blocked": LLMContentFilterError,
    "invalid_request_error": LLMInvalidRequestError,
    "request_too_large": LLMInvalidRequestError,
    "overloaded_error": LLMServerError,
    "api_error": LLMServerError,
    "server_error": LLMServerError,
    "internal_server_error": LLMServerError,
    "service_unavailable": LLMServerError,
    "timeout_error": LLMServerError,
}

_BY_STATUS: Mapping[int, type[LLMAPIError]] = {
    400: LLMInvalidRequestError,
    401: LLMAuthenticationError,
    402: LLMQuotaError,
    403: LLMAuthenticationError,
    404: LLMNotFoundError,
    413: LLMInvalidRequestError,
    422: LLMInvalidRequestError,
    429: LLMRateLimitError,
}

# A broad type says less than the status that came with it: OpenAI sends `invalid_request_error` with
# 401 and 404 as well.
_BROAD_TYPES = frozenset({"invalid_request_error", "api_error", "server_error"})


def error_class(
    status: int | None, code: object = None, type_: object = None
) -> type[LLMAPIError] | None:
    """The class for an error answer: its structured code first, then its status.

    Returns:
        `None` if neither says anything (the caller decides; `LLMAPIError` is never wrong).
    """
    words = [str(word).lower() for word in (code, type_) if word is not None]
    for word in words:
        if word in _BY_CODE and word not in _BROAD_TYPES:
            return _BY_CODE[word]
    if status is not None and status >= 400:
        if status in _BY_STATUS:
            return _BY_STATUS[status]
        if status >= 500 or status == 408:
            return LLMServerError
    for word in words:
        if word in _BY_CODE:
            return _BY_CODE[word]
        # A code that is a number is a status (OpenRouter, llama.cpp, litellm's proxy).
        if word.isdecimal() and len(word) == 3 and status != int(word):
            return error_class(int(word))
    return None


def is_retriable(cls: type[LLMAPIError], status: int | None, headers: Mapping[str, str]) -> bool:
    """Whether the same request may succeed later: the server's own word first, then class and status."""
    said = headers.get("x-should-retry")
    if said in ("true", "false"):
        return said == "true"
    if status is None or status < 400:  # an error inside an answer that had begun well
        return cls.retriable
    return status in RETRIABLE_STATUSES and (cls.retriable or cls is LLMAPIError)


def parse_retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait; `None` if it does not say or says nonsense. Never raises.

    `retry-after-ms` wins over `retry-after`, which is seconds (also as a float) or an HTTP date. A
    date is measured from the answer's own `date`, so that a wrong clock on either side does no harm.
    `headers` must have lower-case names.
    """
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    text = headers.get("retry-after")
    if text is None:
        return None
    seconds = _number(text)
    if seconds is not None:
        return seconds
    until = _date(text)
    if until is None:
        return None
    return max(0.0, (until - (_date(headers.get("date")) or utc_now())).total_seconds())


def _date(text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        date = parsedate_to_datetime(text[:64])
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return date if date.tzinfo else date.replace(tzinfo=timezone.utc)


def _number(text: object) -> float | None:
    """A finite number that is not negative. 32 characters are more than any honest wait needs."""
    if not isinstance(text, str) or len(text) > 32:
        return None
    try:
        number = float(text)
    except ValueError:
        return None
    return number if 0 <= number < float("inf") else None


class ErrorInfo(NamedTuple):
    """What `classify_error` says of an exception; `suggested_wait` is in seconds or `None`."""

    error_type: ErrorType
    message: str
    retriable: bool
    suggested_wait: float | None


# Class names of other libraries (openai, anthropic, requests, httpx, urllib3, botocore, google), from
# the most to the least telling; the first that the name of a class of the exception's MRO contains wins.
_BY_NAME: tuple[tuple[str, ErrorType, bool], ...] = (
    ("RateLimit", ErrorType.RATE_LIMIT, True),
    ("TooManyRequests", ErrorType.RATE_LIMIT, True),
    ("Throttl", ErrorType.RATE_LIMIT, True),
    ("ContextWindow", ErrorType.CONTEXT_TOO_LONG, False),
    ("ContextLength", ErrorType.CONTEXT_TOO_LONG, False),
    ("Authentication", ErrorType.AUTH_ERROR, False),
    ("PermissionDenied", ErrorType.AUTH_ERROR, False),
    ("Unauthorized", ErrorType.AUTH_ERROR, False),
    ("NotFound", ErrorType.NOT_FOUND, False),
    ("BadRequest", ErrorType.INVALID_REQUEST, False),
    ("UnprocessableEntity", ErrorType.INVALID_REQUEST, False),
    ("InvalidRequest", ErrorType.INVALID_REQUEST, False),
    ("InternalServer", ErrorType.SERVER_ERROR, True),
    ("ServiceUnavailable", ErrorType.SERVER_ERROR, True),
    ("Overloaded", ErrorType.SERVER_ERROR, True),
    ("Timeout", ErrorType.TIMEOUT, True),
    ("Connection", ErrorType.CONNECTION_ERROR, True),
    ("ConnectError", ErrorType.CONNECTION_ERROR, True),
    ("NetworkError", ErrorType.CONNECTION_ERROR, True),
    ("ProtocolError", ErrorType.CONNECTION_ERROR, True),
    ("ChunkedEncodingError", ErrorType.CONNECTION_ERROR, True),
    ("IncompleteRead", ErrorType.CONNECTION_ERROR, True),
)

# Wording, for exceptions that say nothing else; tried last.
_BY_WORDING: tuple[tuple[str, ErrorType, bool], ...] = (
    ("insufficient_quota", ErrorType.QUOTA, False),
    ("exceeded your current quota", ErrorType.QUOTA, False),
    ("rate limit", ErrorType.RATE_LIMIT, True),
    ("rate_limit", ErrorType.RATE_LIMIT, True),
    ("too many requests", ErrorType.RATE_LIMIT, True),
    ("context length", ErrorType.CONTEXT_TOO_LONG, False),
    ("context_length", ErrorType.CONTEXT_TOO_LONG, False),
    ("prompt is too long", ErrorType.CONTEXT_TOO_LONG, False),
    ("context window", ErrorType.CONTEXT_TOO_LONG, False),
    ("api key", ErrorType.AUTH_ERROR, False),
    ("unauthorized", ErrorType.AUTH_ERROR, False),
    ("timed out", ErrorType.TIMEOUT, True),
    ("connection", ErrorType.CONNECTION_ERROR, True),
    ("overloaded", ErrorType.SERVER_ERROR, True),
    ("internal server error", ErrorType.SERVER_ERROR, True),
)


def classify_error(exc: BaseException) -> ErrorInfo:
    """Describe any exception: ours, another SDK's (by its shape), or none that is known.

    The structured code decides first, the status next, the class name then, the wording last.

    Args:
        exc: any exception; it need not carry a response.

    Returns:
        `ErrorInfo(error_type, message, retriable, suggested_wait)`; never raises.
    """
    try:
        return _classify(exc, _one_line(str(exc)) or type(exc).__name__)
    except Exception:  # noqa: BLE001 - an exception whose own attributes raise
        return ErrorInfo(ErrorType.UNKNOWN, type(exc).__name__, False, None)


def _classify(exc: BaseException, message: str) -> ErrorInfo:
    if isinstance(exc, LLMError):
        return ErrorInfo(exc.error_type, message, exc.retriable, exc.suggested_wait)
    response = getattr(exc, "response", None)
    headers = _lower_case(getattr(response, "headers", None) or getattr(exc, "headers", None))
    wait = parse_retry_after(headers)
    status = _status(exc, response)
    cls = error_class(status, *_structured(exc))
    if cls is LLMInvalidRequestError and _is_about_length(exc, message):
        cls = LLMContextLengthError
    if cls is not None:
        return ErrorInfo(cls.error_type, message, is_retriable(cls, status, headers), wait)
    if headers.get("x-should-retry") in ("true", "false"):
        return ErrorInfo(ErrorType.UNKNOWN, message, headers["x-should-retry"] == "true", wait)
    if isinstance(exc, TimeoutError):
        return ErrorInfo(ErrorType.TIMEOUT, message, True, wait)
    if isinstance(exc, ConnectionError):
        return ErrorInfo(ErrorType.CONNECTION_ERROR, message, True, wait)
    names = [base.__name__ for base in type(exc).__mro__]
    for part, error_type, retriable in _BY_NAME:
        if any(part in name for name in names):
            return ErrorInfo(error_type, message, retriable, wait)
    wording = message.lower()
    for part, error_type, retriable in _BY_WORDING:
        if part in wording:
            return ErrorInfo(error_type, message, retriable, wait)
    return ErrorInfo(ErrorType.UNKNOWN, message, False, wait)


def _is_about_length(exc: BaseException, message: str) -> bool:
    """A 400 that means the context: some say it by their class, some in words only."""
    names = {name for base in type(exc).__mro__ for name in (base.__name__,)}
    named = any("ContextWindow" in name or "ContextLength" in name for name in names)
    said = message.lower()
    worded = any(
        part in said for part, kind, _ in _BY_WORDING if kind is ErrorType.CONTEXT_TOO_LONG
    )
    return named or worded


def _status(exc: BaseException, response: object) -> int | None:
    for holder, name in ((exc, "status_code"), (exc, "status"), (response, "status_code")):
        value = getattr(holder, name, None)
        if isinstance(value, int) and 100 <= value <= 599:
            return value
    return None


def _structured(exc: BaseException) -> tuple[object, object]:
    """`code` and `type` of another SDK's exception, from its attributes or its parsed body."""
    body = getattr(exc, "body", None)
    if isinstance(body, Mapping):
        inner = body.get("error", body)
        if isinstance(inner, Mapping):
            return inner.get("code"), inner.get("type")
    return getattr(exc, "code", None), getattr(exc, "type", None)


def _lower_case(headers: object) -> dict[str, str]:
    items = getattr(headers, "items", None)  # also of an e-mail message, which urllib hands over
    return {str(name).lower(): str(value) for name, value in items()} if callable(items) else {}


def _one_line(text: str) -> str:
    return " ".join(text.split())
