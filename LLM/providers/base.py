"""What a provider is: pure functions from a call to the wire and back. And the values they exchange."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

import pydantic_core
from pydantic import SecretStr, ValidationError

from LLM.errors import (
    LLMAPIError,
    LLMConfigError,
    LLMContextLengthError,
    LLMQuotaError,
    LLMRateLimitError,
    LLMResponseError,
    error_class,
    is_retriable,
    parse_retry_after,
)
from LLM.providers.hosts import Host
from LLM.types import (
    Answer,
    EventType,
    Message,
    StreamEvent,
    TextDelta,
    TokenUsage,
    ToolCall,
)

# What comes of looking into a value that has not the promised shape.
MALFORMED = (AttributeError, TypeError, ValueError, KeyError, IndexError)

# How much of an error's body is kept; enough for any message, little enough for any log.
MAX_ERROR_BODY = 64 * 1024
_MAX_MESSAGE = 500
_LARGE = 1024 * 1024


class Target(NamedTuple):
    """Where a call goes: a host at an address, a model there, and the key for it."""

    host: Host
    base_url: str
    model: str
    key: SecretStr | None


class Call(NamedTuple):
    """What the user asked for.

    Attributes:
        endpoint: `chat`, `completion` or `models`.
        subject: the messages or the prompt; `None` for `models`.
        params: body fields as given; those that are `None` are left out.
        sampled_by_default: the temperature is only our default, not the user's wish.
        timeout: seconds for one attempt, or between content events of a stream; `None`: no limit.
        deadline_at: the clock's time at which the whole call must be over, or `None`.
        idempotency_key: the same for all attempts.
    """

    endpoint: str
    target: Target
    subject: Any
    params: Mapping[str, Any]
    sampled_by_default: bool
    stream: bool
    headers: Mapping[str, str]
    extra_body: Mapping[str, Any]
    timeout: float | None
    connect_timeout: float
    deadline_at: float | None
    max_response_bytes: int
    idempotency_key: str


class WireRequest(NamedTuple):
    """One HTTP request, but for its credential, which only the transport puts in."""

    method: str
    url: str
    headers: Mapping[str, str]
    body: bytes | None
    credential: tuple[str, str] | None = None  # (header, what stands before the key)
    key: SecretStr | None = None
    once: bool = False  # never sent twice, not even where a pooled connection was stale


class WireResponse(NamedTuple):
    """One HTTP response, read whole; names of `headers` are lower-case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def __repr__(self) -> str:
        # A traceback may show it, and a server may have echoed the key.
        return f"WireResponse(status={self.status}, {len(self.body)} bytes)"


class EventDecoder(Protocol):
    """Turns the server-sent events of one stream into ours, and remembers what came.

    Attributes:
        ended: the end marker has come; nothing after it counts.
        complete: the end marker or a finish reason has come.
        begun: anything of an answer has come.
        progress: grows with every piece of content, also of calls that are not whole yet.
    """

    ended: bool

    @property
    def complete(self) -> bool: ...

    @property
    def begun(self) -> bool: ...

    @property
    def progress(self) -> int: ...

    @property
    def usage(self) -> TokenUsage | None: ...

    def feed(self, name: bytes, data: bytes) -> list[StreamEvent]:
        """The events in one server-sent event.

        Raises:
            LLMAPIError: the server reports an error, or sends what is not an event.
        """
        ...

    def finish(self) -> list[StreamEvent]:
        """The last events, once the stream is complete."""
        ...

    def response(self) -> Answer | None:
        """What came so far, folded into a response; `None` if nothing did."""
        ...


class Provider(Protocol):
    """A dialect."""

    def build(self, call: Call) -> WireRequest:
        """The request for a call.

        Raises:
            LLMConfigError: the call cannot be said in this dialect.
        """
        ...

    def parse(self, call: Call, response: WireResponse) -> Answer:
        """The value of a 2xx response.

        Raises:
            LLMResponseError: it is not what was agreed.
        """
        ...

    def error(self, call: Call, response: WireResponse) -> LLMAPIError:
        """What any other response means."""
        ...

    def decoder(self, call: Call) -> EventDecoder:
        """A fresh decoder for one stream."""
        ...

    def output_limit(self, call: Call) -> int | None:
        """The most tokens that it may answer with, all choices together; `None` if nothing limits it."""
        ...


def limit_in(call: Call, *names: str) -> int | None:
    """A whole number of the request, under the first of the names that it has."""
    fields = {**call.params, **call.extra_body} if call.extra_body else call.params
    for name in names:
        limit = fields.get(name)
        if type(limit) is int:
            return limit
    return None


def request_headers(call: Call, ours: Mapping[str, str]) -> dict[str, str]:
    """Our headers under the user's own, under whatever spelling."""
    theirs = {name.lower() for name in call.headers}
    headers = {name: value for name, value in ours.items() if name.lower() not in theirs}
    headers.update(call.headers)
    return headers


def post_headers(call: Call) -> dict[str, str]:
    """What every request with a body says of itself."""
    return {
        "Accept": "text/event-stream" if call.stream else "application/json",
        "Content-Type": "application/json",
        "Idempotency-Key": call.idempotency_key,
    }


def encode(body: Mapping[str, Any]) -> bytes:
    """`body` as JSON.

    Raises:
        LLMConfigError: something in it is not JSON; the message says where.
    """
    if _is_plain(body):
        with suppress(ValueError):
            return pydantic_core.to_json(body)
    # A str that is an enumeration, a key that is a number: odd, and json knows what to do.
    with suppress(TypeError, ValueError, RecursionError):
        return json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    raise LLMConfigError(f"{_not_json(body, '')} is not JSON and cannot be sent")


_PLAIN = frozenset({str, int, bool, type(None)})


def _is_plain(value: Any) -> bool:
    """Whether it is JSON to the letter. pydantic's serializer is four times as quick, and trusts us."""
    rest = [value]
    for _ in range(1_000_000):  # more is a cycle
        if not rest:
            return True
        item = rest.pop()
        kind = type(item)
        if kind in _PLAIN:
            continue
        if kind is dict:
            if not all(type(key) is str for key in item):
                return False
            rest.extend(item.values())
        elif kind is list:
            rest.extend(item)
        elif kind is not float or item - item != 0:
            return False
    return False


def _not_json(value: Any, path: str, depth: int = 0) -> str:
    """Where in `value` the first thing is that JSON cannot say, and what it is."""
    if depth > 50:  # deeper than any request; a cycle
        return f"{path[:60]}… (it contains itself, or is nested too deeply)"
    items: Any = ()
    if isinstance(value, Mapping):
        items = ((f"{path}.{key}" if path else str(key), inner) for key, inner in value.items())
    elif isinstance(value, (list, tuple)):
        items = ((f"{path}[{index}]", inner) for index, inner in enumerate(value))
    else:
        what = "a number that is not finite" if isinstance(value, float) else type(value).__name__
        what = "text with half a surrogate pair" if isinstance(value, str) else what
        return f"{path} ({what})"
    for inner_path, inner in items:
        try:
            json.dumps(inner, ensure_ascii=False, allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError):
            return _not_json(inner, inner_path, depth + 1)
    return path  # a key that is not a string


def plain_messages(messages: Any) -> list[dict[str, Any]]:
    """The caller's messages as new plain dicts; the caller's own are never touched.

    Raises:
        LLMConfigError: they are not messages; says which one and why.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not hasattr(messages, "__iter__"):
        raise LLMConfigError(
            f"messages must be a list of messages, not {type(messages).__name__}; "
            'write [{"role": "user", "content": "…"}]'
        )
    plain = [plain_message(message, index) for index, message in enumerate(messages)]
    if not plain:
        raise LLMConfigError("messages is empty; give at least one message")
    return plain


def plain_message(message: Any, index: int) -> dict[str, Any]:
    if isinstance(message, Message):
        given = message.model_dump(exclude_none=True)
    elif isinstance(message, Mapping):
        given = {
            key: [dump(item) for item in value] if isinstance(value, list) else value
            for key, value in message.items()
        }
    else:
        raise LLMConfigError(
            f"messages[{index}] is a {type(message).__name__}, not a Message or a dict"
        )
    content = given.get("content")
    if not isinstance(content, (str, list, tuple, type(None))):
        endless = isinstance(content, float) and not math.isfinite(content)
        what = "a number that is not finite" if endless else type(content).__name__
        raise LLMConfigError(
            f"messages[{index}].content ({what}) is neither text nor a list of parts"
        )
    role = given.get("role")
    if not isinstance(role, str) or not role:
        raise LLMConfigError(f"messages[{index}] has no role; give 'user', 'assistant' or 'system'")
    if content is None and not given.get("tool_calls"):
        if role != "assistant":
            raise LLMConfigError(f"messages[{index}] (role {role!r}) has no content")
        given["content"] = None
    return given


def dump(value: Any) -> Any:
    """A pydantic value as a plain one; anything else as it is."""
    return value.model_dump(exclude_none=True) if hasattr(value, "model_dump") else value


def parse_json(data: bytes) -> Any:
    """JSON as real servers send it.

    Raises:
        ValueError: it is none; also where `json` raises RecursionError.
    """
    try:
        return pydantic_core.from_json(data)
    except ValueError:
        pass
    # What the quick parser refuses though it is harmless: a byte order mark, UTF-16, broken UTF-8,
    # half a surrogate pair (which would only fail later, in `print`), a very long integer.
    try:
        text = data.decode(json.detect_encoding(data), "replace").removeprefix("\ufeff")
        return mend_surrogates(json.loads(text, parse_int=_lenient_int))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _lenient_int(digits: str) -> int | float:
    return int(digits) if len(digits) < 4000 else float(digits)


def mend_surrogates(value: Any) -> Any:
    """`value` with each half surrogate pair replaced by U+FFFD, as a decoder would."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [mend_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {mend_surrogates(key): mend_surrogates(item) for key, item in value.items()}
    return value


def validate(model: type[Any], response: WireResponse, call: Call) -> Any:
    """The body as an instance of `model`.

    Raises:
        LLMResponseError: it is not one; says what came instead.
    """
    # Quickest for a small body; of a large one it would make a copy of its own.
    if len(response.body) < _LARGE:
        with suppress(ValidationError):
            return model.model_validate_json(response.body)
    try:
        value = parse_json(response.body)
    except ValueError:
        raise unexpected(call, response, "not JSON") from None
    try:
        return model.model_validate(value)
    except ValidationError as error:
        found = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, found["loc"])) or "the answer"
        problem = f"{where}: {found['msg']}"
    raise unexpected(call, response, problem)


def unexpected(call: Call, response: WireResponse, problem: str) -> LLMResponseError:
    """The error for a 2xx answer that is not what was agreed."""
    found = read_error(response.body)
    kind = redact(response.headers.get("content-type", "no content type"), call.target.key)
    # Never a part of an answer: it may be logged. `.body` holds it.
    is_text = found.found or response.body.lstrip()[:1] not in (b"{", b"[", b'"', b"d", b"e", b":")
    shown = clean(redact(found.message, call.target.key))[:200] if is_text else "see .body"
    message = f"{call.target.base_url} answered {response.status} ({clean(kind)[:60]}), {problem}"
    return LLMResponseError(
        redact(f"{message}: {shown}" if shown else f"{message} (empty body)", call.target.key),
        status_code=response.status,
        body=error_text(response.body, call.target.key),
        **origin(call, response.headers),
    )


class ErrorBody(NamedTuple):
    """What an error answer says of itself; `None` and `""` where it does not."""

    message: str
    code: str | int | None = None
    type: str | None = None
    param: str | None = None
    found: bool = False  # it is one of the known shapes of an error


def read_error(body: bytes) -> ErrorBody:
    """An error answer in any of the shapes that real servers send. Never raises."""
    text = body[: 2 * MAX_ERROR_BODY].decode("utf-8", "replace").strip()
    try:
        value = parse_json(body[: 2 * MAX_ERROR_BODY])
    except ValueError:
        return ErrorBody(_html_title(text) or text)
    return read_error_value(value) or ErrorBody(text)


def read_error_value(value: Any) -> ErrorBody | None:
    """The same for parsed JSON; `None` if it is no error."""
    if isinstance(value, list) and value:  # Gemini wraps its error in a list
        value = value[0]
    if not isinstance(value, dict):
        return None
    for name in ("error", "errors", "detail", "message"):
        inner = value.get(name)
        if isinstance(inner, list) and inner and name != "message":  # FastAPI's validation errors
            inner = inner[0]
        if isinstance(inner, str) and inner:
            return ErrorBody(inner, value.get("code"), _text(value.get("type")), None, True)
        if isinstance(inner, dict) and inner:
            message = inner.get("message") or inner.get("msg") or inner.get("detail") or ""
            code = inner.get("code")
            return ErrorBody(
                message
                if isinstance(message, str) and message
                else json.dumps(inner)[:_MAX_MESSAGE],
                code if isinstance(code, (str, int)) else None,
                _text(inner.get("type")) or _text(inner.get("status")),
                _text(inner.get("param")),
                True,
            )
    return None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _html_title(text: str) -> str | None:
    lower = text[:4096].lower()
    if not lower.startswith(("<!doctype", "<html", "<head")):
        return None
    start, end = lower.find("<title>"), lower.find("</title>")
    title = text[start + 7 : end].strip() if 0 <= start < end else ""
    return f"an HTML page{f' titled {title!r}' if title else ''}"


def api_error(
    call: Call,
    response: WireResponse,
    found: ErrorBody,
    wording: tuple[tuple[str, type[LLMAPIError]], ...],
) -> LLMAPIError:
    """An error answer as the right exception: structured code, then status, then wording.

    Args:
        wording: what a dialect's servers say where they give no code, and what it means.
    """
    status, headers, key = response.status, response.headers, call.target.key
    in_answer = 200 <= status < 300  # the error came inside what had begun well
    cls = error_class(None if in_answer else status, found.code, found.type) or LLMAPIError
    if not issubclass(cls, (LLMContextLengthError, LLMQuotaError)):
        said = found.message.lower()
        cls = next((meant for words, meant in wording if words in said), cls)
    details: dict[str, Any] = {}
    if issubclass(cls, LLMRateLimitError):
        details["limit"] = _which_limit(found, headers)
    if 300 <= status < 400:
        place = redact(headers.get("location", "nowhere"), call.target.key)
        text = f"redirected to {clean(place)[:200]}, which is not followed; set base_url to it if it is right"
    else:
        text = clean(redact(found.message, call.target.key))[:_MAX_MESSAGE] or "no message"
    prefix = call.target.host.name if in_answer else f"{call.target.host.name} {status}"
    if (
        status == 404
    ):  # which of the two is not there, the model or the path, only the address tells
        prefix += f" at {call.target.base_url}"
    return cls(
        redact(f"{prefix}: {text}", call.target.key),
        status_code=None if in_answer else status,
        code=redact(found.code, key) if isinstance(found.code, str) else found.code,
        type=redact(found.type, key) if found.type else found.type,
        param=redact(found.param, key) if found.param else found.param,
        body=error_text(response.body, call.target.key),
        retriable=is_retriable(cls, status, headers),
        suggested_wait=parse_retry_after(headers),
        **origin(call, headers),
        **details,
    )


def _which_limit(found: ErrorBody, headers: Mapping[str, str]) -> str | None:
    for word in (found.type, found.code):
        if word in ("requests", "tokens"):
            return str(word)
    for limit in ("requests", "tokens", "input-tokens", "output-tokens"):
        for prefix in ("x-ratelimit-remaining-", "anthropic-ratelimit-"):
            suffix = "" if prefix.startswith("x-") else "-remaining"
            if headers.get(f"{prefix}{limit}{suffix}") == "0":
                return "tokens" if "tokens" in limit else "requests"
    said = found.message.lower()
    for words, limit in (("tokens per", "tokens"), ("requests per", "requests")):
        if words in said:
            return limit
    return None


def origin(call: Call, headers: Mapping[str, str]) -> dict[str, Any]:
    """Who answered, for an error."""
    return {
        "provider": call.target.host.name,
        "model": call.target.model,
        "request_id": request_id(headers),
    }


def request_id(headers: Mapping[str, str]) -> str | None:
    return headers.get("x-request-id") or headers.get("request-id")


def clean(text: str) -> str:
    """A server's text on one line, its control characters made visible and harmless."""
    text = " ".join(text.split())
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def redact(text: str, key: SecretStr | None) -> str:
    """`text` without the key, should a server echo it."""
    secret = key.get_secret_value() if key else ""
    return text.replace(secret, "***") if len(secret) >= 4 else text


def error_text(body: bytes, key: SecretStr | None) -> str:
    """What is kept of an error's body."""
    # Cut a little later than asked, then redacted, then cut: a key at the edge would be half a key.
    return redact(body[: 2 * MAX_ERROR_BODY].decode("utf-8", "replace"), key)[:MAX_ERROR_BODY]


class PartialToolCall:
    """A tool call whose arguments are still coming."""

    def __init__(self, id_: str | None = None, name: str = "") -> None:
        self.id = id_
        self.name = name
        self.arguments: list[str] = []
        self.extra: dict[str, Any] = {}
        self.handed_over = False

    def whole(self) -> ToolCall:
        function = {"name": self.name, "arguments": "".join(self.arguments)}
        return ToolCall.model_validate({**self.extra, "id": self.id, "function": function})


class GrowingText:
    """Text that comes in small pieces, kept in blocks.

    A list of all pieces costs more than the text, and a buffer that grows leaves holes behind.
    """

    __slots__ = ("_blocks", "_pieces")

    def __init__(self) -> None:
        self._blocks: list[str] = []
        self._pieces: list[str] = []

    def write(self, text: str) -> None:
        if not isinstance(text, str):
            raise TypeError("a piece of text that is none")
        pieces = self._pieces
        pieces.append(text)
        if len(pieces) >= 512:
            self._blocks.append("".join(pieces))
            pieces.clear()

    def getvalue(self) -> str:
        return "".join((*self._blocks, *self._pieces))


_TEXT_DELTA = (
    EventType.TEXT_DELTA
)  # an enumeration is slow to ask, and this is asked for every token


def text_event(text: str) -> StreamEvent:
    return StreamEvent(_TEXT_DELTA, TextDelta(text))


def reasoning_event(text: str) -> StreamEvent:
    return StreamEvent(EventType.REASONING_DELTA, reasoning_delta=text)


def tool_event(call: PartialToolCall) -> StreamEvent:
    call.handed_over = True
    return StreamEvent(EventType.TOOL_CALL, tool_call=call.whole())


def complete_event(finish_reason: str | None, usage: TokenUsage | None) -> StreamEvent:
    return StreamEvent(EventType.MESSAGE_COMPLETE, finish_reason=finish_reason, usage=usage)
