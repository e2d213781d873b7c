"""The exception tree, what it says, and what `classify_error` makes of others' exceptions."""

import asyncio
import copy
import email.message
import pickle
import traceback
import urllib.error
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import pytest
import requests
import urllib3
from hypothesis import given
from hypothesis import strategies as st

import LLM
from LLM.errors import (
    Attempt,
    ErrorType,
    LLMAPIError,
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
    LLMOutputError,
    LLMQuotaError,
    LLMRateLimitError,
    LLMResponseError,
    LLMServerError,
    LLMStreamError,
    LLMTimeoutError,
    classify_error,
    error_class,
    parse_retry_after,
)
from LLM.types import ChatCompletionResponse

# class: (its parent, a built-in that it is too, error_type, retriable)
TREE = {
    LLMConfigError: (LLMError, ValueError, "config_error", False),
    LLMConnectionError: (LLMError, ConnectionError, "connection_error", True),
    LLMTimeoutError: (LLMConnectionError, TimeoutError, "timeout", True),
    LLMStreamError: (LLMConnectionError, ConnectionError, "stream_error", True),
    LLMCancelledError: (LLMConnectionError, ConnectionError, "cancelled", False),
    LLMAPIError: (LLMError, Exception, "unknown", False),
    LLMAuthenticationError: (LLMAPIError, Exception, "auth_error", False),
    LLMNotFoundError: (LLMAPIError, Exception, "not_found", False),
    LLMInvalidRequestError: (LLMAPIError, Exception, "invalid_request", False),
    LLMContextLengthError: (LLMInvalidRequestError, Exception, "context_too_long", False),
    LLMContentFilterError: (LLMAPIError, Exception, "content_filter", False),
    LLMRateLimitError: (LLMAPIError, Exception, "rate_limit", True),
    LLMQuotaError: (LLMRateLimitError, Exception, "quota", False),
    LLMServerError: (LLMAPIError, Exception, "server_error", True),
    LLMResponseError: (LLMAPIError, Exception, "invalid_response", False),
    LLMOutputError: (LLMError, Exception, "output", False),
    LLMBudgetError: (LLMError, Exception, "budget", False),
}
ALL = [LLMError, *TREE]


@pytest.mark.parametrize("cls, row", TREE.items(), ids=lambda x: getattr(x, "__name__", ""))
def test_the_tree_is_that_of_the_contract(cls, row):
    parent, builtin, error_type, retriable = row
    error = cls("m")
    assert issubclass(cls, parent)
    assert issubclass(cls, builtin)
    assert (error.error_type, error.retriable) == (error_type, retriable)
    assert getattr(LLM, cls.__name__) is cls


def test_every_error_class_stands_in_the_table():
    found, pending = set(), [LLMError]
    while pending:
        for cls in pending.pop().__subclasses__():
            if cls.__module__ == "LLM.errors":
                found.add(cls)
                pending.append(cls)
    assert found == set(TREE)


@pytest.mark.parametrize("cls", ALL)
def test_an_error_knows_at_least_nothing(cls):
    error = cls("it failed")
    assert (str(error), error.message) == ("it failed", "it failed")
    assert (error.attempts, error.history, error.partial) == (0, (), None)
    assert (error.provider, error.model, error.request_id) == (None, None, None)
    assert error.suggested_wait is None


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("retriable", [True, False])
def test_an_error_can_be_told_whether_a_retry_helps(cls, retriable):
    assert cls("m", retriable=retriable).retriable is retriable
    assert cls("m").retriable is cls.retriable  # only that one error was told


def full(cls):
    error = cls("it failed", provider="openai", model="m", request_id="r", suggested_wait=2.5)
    error.history = (Attempt(503, "LLMServerError", 0.0, 0.1, "r"),)
    error.partial = ChatCompletionResponse.model_validate(
        {"choices": [{"message": {"content": "so f"}}]}
    )
    for name, value in {"status_code": 503, "code": 7, "clock": "idle", "limit": "tokens"}.items():
        if hasattr(error, name):
            setattr(error, name, value)
    return error


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize(
    "again",
    [
        *(
            lambda e, p=p: pickle.loads(pickle.dumps(e, protocol=p))
            for p in range(2, pickle.HIGHEST_PROTOCOL + 1)
        ),
        copy.copy,
        copy.deepcopy,
    ],
)
def test_errors_survive_pickling_and_copying(cls, again):
    error = full(cls)
    error.__cause__ = ConnectionResetError(104, "reset")
    twin = again(error)
    assert type(twin) is cls
    assert str(twin) == "it failed"
    assert vars(twin) == vars(error)
    assert (type(twin.__cause__), twin.__cause__.args) == (
        ConnectionResetError,
        (104, "reset"),
    )
    assert twin.attempts == 1


def test_an_error_with_a_cause_that_no_pickle_takes_is_pickled_all_the_same():
    """A worker process must be able to send home what went wrong."""
    error = LLMConnectionError("it failed")
    error.__cause__ = ValueError(lambda: None)
    assert str(pickle.loads(pickle.dumps(error))) == "it failed"


def test_an_error_shows_its_message_and_not_an_errno():
    assert str(LLMConnectionError("refused")) == "refused"
    assert str(LLMTimeoutError("late", clock="deadline")) == "late"


@pytest.mark.parametrize("cls", [LLMError, LLMTimeoutError, LLMServerError])
def test_an_error_without_a_message_says_at_least_what_it_is(cls):
    assert str(cls()) == cls.__name__


def test_a_timeout_says_which_clock():
    assert LLMTimeoutError("m").clock == "timeout"
    assert LLMTimeoutError("m", clock="idle", model="x").clock == "idle"


def test_error_types_are_plain_strings():
    for word in (
        "rate_limit auth_error invalid_request server_error connection_error timeout "
        "context_too_long unknown"
    ).split():
        assert str(ErrorType(word)) == word
        assert ErrorType(word) == word
    assert len(set(ErrorType)) == len(ErrorType.__members__)


@pytest.mark.parametrize(
    "status, code, type_, cls",
    [
        (400, None, None, LLMInvalidRequestError),
        (413, None, None, LLMInvalidRequestError),
        (422, None, None, LLMInvalidRequestError),
        (401, None, None, LLMAuthenticationError),
        (403, None, None, LLMAuthenticationError),
        (402, None, None, LLMQuotaError),
        (404, None, None, LLMNotFoundError),
        (408, None, None, LLMServerError),
        (429, None, None, LLMRateLimitError),
        (500, None, None, LLMServerError),
        (503, None, None, LLMServerError),
        (529, None, None, LLMServerError),
        (599, None, None, LLMServerError),
        (418, None, None, None),
        (200, None, None, None),
        (None, None, None, None),
        # the structured code decides before the status
        (400, "context_length_exceeded", "invalid_request_error", LLMContextLengthError),
        (400, 400, "exceed_context_size_error", LLMContextLengthError),
        (429, "insufficient_quota", "insufficient_quota", LLMQuotaError),
        (429, None, "rate_limit_error", LLMRateLimitError),
        (429, "rate_limit_exceeded", "tokens", LLMRateLimitError),
        (400, "content_filter", None, LLMContentFilterError),
        (404, "model_not_found", "invalid_request_error", LLMNotFoundError),
        (400, "model_not_found", None, LLMNotFoundError),
        (529, None, "overloaded_error", LLMServerError),
        (403, None, "permission_error", LLMAuthenticationError),
        # a broad type says less than the status
        (401, None, "invalid_request_error", LLMAuthenticationError),
        (404, None, "invalid_request_error", LLMNotFoundError),
        (400, None, "api_error", LLMInvalidRequestError),
        # inside a stream there is no status
        (None, None, "overloaded_error", LLMServerError),
        (None, None, "invalid_request_error", LLMInvalidRequestError),
        (None, 429, None, LLMRateLimitError),
        (None, "429", None, LLMRateLimitError),
        (None, 500, "server_error", LLMServerError),
        (200, 502, None, LLMServerError),
        (None, "new_code", "new_type", None),
        (None, {"odd": 1}, ["odd"], None),
    ],
)
def test_the_structured_code_decides_then_the_status(status, code, type_, cls):
    assert error_class(status, code, type_) is cls


NOW = datetime(2026, 11, 21, 9, 0, 0, tzinfo=timezone.utc)


@pytest.mark.parametrize(
    "headers, seconds",
    [
        ({}, None),
        ({"retry-after": "2"}, 2.0),
        ({"retry-after": " 2 "}, 2.0),
        ({"retry-after": "2.5"}, 2.5),
        ({"retry-after": "0"}, 0.0),
        ({"retry-after-ms": "1500"}, 1.5),
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
        ({"retry-after-ms": "soon", "retry-after": "9"}, 9.0),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": ""}, None),
        ({"retry-after": "9" * 5000}, None),
        ({"retry-after": "1e400"}, None),
        ({"retry-after": "Sat, 32 Nov 2026 99:99:99 GMT"}, None),
        ({"retry-after": "Sat, 21 Nov 99999 09:00:00 GMT"}, None),
        # a date is measured from the answer's own
        (
            {
                "retry-after": format_datetime(NOW + timedelta(seconds=30), usegmt=True),
                "date": format_datetime(NOW, usegmt=True),
            },
            30.0,
        ),
        (
            {
                "retry-after": format_datetime(NOW - timedelta(days=9), usegmt=True),
                "date": format_datetime(NOW, usegmt=True),
            },
            0.0,
        ),
        ({"retry-after": "Sat, 21 Nov 2015 09:00:00 GMT"}, 0.0),  # past, on any clock
        ({"retry-after": "Sat, 21 Nov 2015 09:00:00", "date": "nonsense"}, 0.0),
    ],
)
def test_retry_after_is_read_as_servers_write_it(headers, seconds):
    assert parse_retry_after(headers) == seconds


@given(
    st.dictionaries(
        st.sampled_from(["retry-after", "retry-after-ms", "date"]),
        st.text(max_size=40)
        | st.text("0123456789.,:+-eE GMTSatNov", max_size=40)
        | st.datetimes().map(lambda d: d.strftime("%a, %d %b %Y %H:%M:%S GMT")),
    )
)
def test_no_retry_after_raises_or_is_negative_or_endless(headers):
    seconds = parse_retry_after(headers)
    assert seconds is None or 0 <= seconds < float("inf")


# Stand-ins with the shapes of other libraries' exceptions, as of their versions of 2026-11.
class Response(requests.Response):
    def __init__(self, status_code, headers=None):
        super().__init__()  # false for an error, so that `if response` is a trap
        self.status_code = status_code
        self.headers.update(headers or {})


class OpenAIError(Exception):
    pass


class APIError(OpenAIError):
    def __init__(self, message, body=None, **attributes):
        super().__init__(message)
        self.body = body
        self.code = body.get("code") if isinstance(body, dict) else None
        self.type = body.get("type") if isinstance(body, dict) else None
        vars(self).update(attributes)


class APIConnectionError(APIError):
    pass


class APITimeoutError(APIConnectionError):
    pass


class APIStatusError(APIError):
    def __init__(self, message, status_code, body=None, headers=None):
        super().__init__(message, body, status_code=status_code)
        self.response = Response(status_code, headers)


class RateLimitError(APIStatusError):
    pass


class BadRequestError(APIStatusError):
    pass


class ContextWindowExceededError(BadRequestError):  # litellm
    pass


class InternalServerError(APIStatusError):
    pass


class HTTPStatusError(Exception):  # httpx
    def __init__(self, message, response):
        super().__init__(message)
        self.response = response


class NetworkError(Exception):  # httpx
    pass


class ReadError(NetworkError):
    pass


class RemoteProtocolError(Exception):  # httpx
    pass


class ClientResponseError(Exception):  # aiohttp
    def __init__(self, status, headers=None):
        super().__init__(f"{status}, message='x'")
        self.status = status
        self.headers = headers


class ThrottlingException(Exception):  # botocore's modelled exceptions
    pass


ANTHROPIC_LONG = {
    "type": "error",
    "error": {"type": "invalid_request_error", "message": "prompt is too long: 9 > 3 tokens"},
}


def _header_message(**headers):
    message = email.message.Message()
    for name, value in headers.items():
        message[name.replace("_", "-")] = value
    return message


@pytest.mark.parametrize(
    "error, error_type, retriable, wait",
    [
        # ours
        (LLMRateLimitError("m", suggested_wait=3), "rate_limit", True, 3),
        (LLMQuotaError("m"), "quota", False, None),
        (LLMServerError("m", retriable=False), "server_error", False, None),
        # openai, anthropic
        (
            RateLimitError("m", 429, {"code": "rate_limit_exceeded"}, {"Retry-After": "7"}),
            "rate_limit",
            True,
            7,
        ),
        (
            RateLimitError("m", 429, {"code": "insufficient_quota", "type": "insufficient_quota"}),
            "quota",
            False,
            None,
        ),
        (
            BadRequestError("m", 400, {"code": "context_length_exceeded"}),
            "context_too_long",
            False,
            None,
        ),
        (
            BadRequestError("prompt is too long", 400, ANTHROPIC_LONG),
            "context_too_long",
            False,
            None,
        ),
        (ContextWindowExceededError("m", 400), "context_too_long", False, None),
        (BadRequestError("m", 400, "text"), "invalid_request", False, None),
        (InternalServerError("m", 500), "server_error", True, None),
        (
            InternalServerError("m", 500, None, {"x-should-retry": "false"}),
            "server_error",
            False,
            None,
        ),
        (APIStatusError("m", 409, None, {"x-should-retry": "true"}), "unknown", True, None),
        (
            APIStatusError("m", 529, {"type": "error", "error": {"type": "overloaded_error"}}),
            "server_error",
            True,
            None,
        ),
        (APIStatusError("m", 501), "server_error", False, None),
        (
            APIStatusError("m", 500, {"type": "exceed_context_size_error"}),
            "context_too_long",
            False,
            None,
        ),
        (APIStatusError("m", 401), "auth_error", False, None),
        (APIStatusError("m", 403), "auth_error", False, None),
        (APIStatusError("m", 404), "not_found", False, None),
        (APIStatusError("m", 422), "invalid_request", False, None),
        (APIStatusError("m", 408), "server_error", True, None),
        (APIConnectionError("Connection error."), "connection_error", True, None),
        (APITimeoutError("Request timed out."), "timeout", True, None),
        (APIError("m", {"code": None, "type": "server_error"}), "server_error", True, None),
        # httpx, aiohttp, botocore
        (
            HTTPStatusError("m", Response(503, {"retry-after-ms": "250"})),
            "server_error",
            True,
            0.25,
        ),
        (ReadError("m"), "connection_error", True, None),
        (RemoteProtocolError("m"), "connection_error", True, None),
        (ClientResponseError(429, {"Retry-After": "1.5"}), "rate_limit", True, 1.5),
        (ClientResponseError(502), "server_error", True, None),
        (ThrottlingException("m"), "rate_limit", True, None),
        # requests, urllib3, urllib
        (
            requests.HTTPError("m", response=Response(429, {"Retry-After": "x"})),
            "rate_limit",
            True,
            None,
        ),
        (requests.HTTPError("m"), "unknown", False, None),
        (requests.ConnectionError("m"), "connection_error", True, None),
        (requests.ConnectTimeout("m"), "timeout", True, None),
        (requests.ReadTimeout("m"), "timeout", True, None),
        (requests.exceptions.ChunkedEncodingError("m"), "connection_error", True, None),
        (urllib3.exceptions.ProtocolError("m"), "connection_error", True, None),
        (urllib3.exceptions.ReadTimeoutError(None, "/", "m"), "timeout", True, None),  # type: ignore[arg-type]
        (
            urllib.error.HTTPError("http://h", 429, "m", _header_message(Retry_After="7"), None),
            "rate_limit",
            True,
            7,
        ),
        # Python's own
        (TimeoutError("m"), "timeout", True, None),
        (asyncio.TimeoutError(), "timeout", True, None),
        (ConnectionResetError("m"), "connection_error", True, None),
        (BrokenPipeError("m"), "connection_error", True, None),
        (ValueError("m"), "unknown", False, None),
        (KeyError("m"), "unknown", False, None),
        (KeyboardInterrupt(), "unknown", False, None),
        # wording, when there is nothing else
        (Exception("Rate limit reached for gpt-4"), "rate_limit", True, None),
        (Exception("You exceeded your current quota"), "quota", False, None),
        (Exception("This model's maximum context length is 4097"), "context_too_long", False, None),
        (Exception("prompt is too long: 5 tokens > 4"), "context_too_long", False, None),
        (Exception("Incorrect API key provided"), "auth_error", False, None),
        (Exception("the request timed out"), "timeout", True, None),
        (RuntimeError("Overloaded"), "server_error", True, None),
        (Exception(), "unknown", False, None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_any_exception_is_described_by_its_shape(error, error_type, retriable, wait):
    found = classify_error(error)
    assert found == (error_type, found.message, retriable, wait)
    assert found.message
    assert "\n" not in found.message


def test_a_description_reads_by_name():
    info = classify_error(LLMRateLimitError("slow down", suggested_wait=2))
    assert info.error_type is ErrorType.RATE_LIMIT
    assert (info.message, info.retriable, info.suggested_wait) == ("slow down", True, 2)


def test_a_message_of_many_lines_becomes_one():
    assert classify_error(Exception("a\n  b\r\nc")).message == "a b c"
    assert classify_error(ZeroDivisionError()).message == "ZeroDivisionError"


class Hostile(Exception):
    def __str__(self):
        raise RuntimeError("no text")

    @property
    def response(self):
        raise RuntimeError("no response")


def test_no_exception_makes_classify_error_raise():
    assert classify_error(Hostile()).error_type == "unknown"


@given(
    st.dictionaries(
        st.sampled_from("status_code status code type body response headers".split()),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text() | st.binary(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            max_leaves=4,
        ),
    )
)
def test_odd_attributes_are_no_obstacle(attributes):
    error = Exception("m")
    vars(error).update(attributes)
    assert isinstance(classify_error(error).retriable, bool)


def test_an_error_prints_its_whole_story_in_a_traceback():
    try:
        try:
            raise OSError(104, "reset by peer")
        except OSError as cause:
            raise LLMConnectionError("the connection broke") from cause
    except LLMError as error:
        text = "".join(traceback.format_exception(error))
    assert "reset by peer" in text
    assert "LLM.errors.LLMConnectionError: the connection broke" in text
