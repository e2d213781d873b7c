"""Calls without a client, and recorded answers as the bytes that a provider is handed."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from LLM.clock import Clock
from LLM.config import LLMConfig
from LLM.errors import LLMError
from LLM.pipeline import Job, parse_answer
from LLM.providers.base import Call, WireResponse
from LLM.providers.targets import find_target, provider_of
from LLM.sse import SSEDecoder
from LLM.stream import Stream
from LLM.types import EventType

DATA = Path(__file__).parents[1] / "data"
HELLO = [{"role": "user", "content": "Hello!"}]


def make_call(
    model="openai/gpt-4o",
    subject=HELLO,
    *,
    endpoint="chat",
    config=None,
    stream=False,
    sampled_by_default=False,
    headers=None,
    extra_body=None,
    **params,
):
    """A call as the client describes it to a provider."""
    return Call(
        endpoint=endpoint,
        target=find_target(config or LLMConfig(model=model, api_key="sk-secret-key")),
        subject=subject,
        params=params,
        sampled_by_default=sampled_by_default,
        stream=stream,
        headers=headers or {},
        extra_body=extra_body or {},
        timeout=30,
        connect_timeout=10,
        deadline_at=None,
        max_response_bytes=1 << 20,
        idempotency_key="id-1",
    )


def response_from(recording):
    """A recorded answer as a `WireResponse`; chunks are joined, as the transport does."""
    head, _, body = recording.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    headers = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    if headers.get("transfer-encoding") == "chunked":
        body = b"".join(_chunks(body))
    return WireResponse(int(status.split()[1]), headers, body)


def _chunks(body):
    while body:
        size, _, body = body.partition(b"\r\n")
        length = int(size, 16)
        yield body[:length]
        body = body[length + 2 :]


class Decoded:
    """A stream decoded to its end, or to its error."""

    def __init__(self, call, body):
        self.decoder = provider_of(call.target).decoder(call)
        self.events = []
        self.error = None
        framing = SSEDecoder()
        try:
            for name, data in [*framing.feed(body), *framing.finish()]:
                self.events += self.decoder.feed(name, data)
                if self.decoder.ended:
                    break
            if self.decoder.complete:
                self.events += self.decoder.finish()
        except Exception as error:
            self.error = error

    @property
    def complete(self):
        return self.decoder.complete

    @property
    def response(self):
        return self.decoder.response()

    @property
    def text(self):
        return "".join(e.text_delta for e in self.events if e.type is EventType.TEXT_DELTA)

    @property
    def reasoning(self):
        return "".join(
            e.reasoning_delta for e in self.events if e.type is EventType.REASONING_DELTA
        )

    @property
    def tool_calls(self):
        return [
            (e.tool_call.id, e.tool_call.name, e.tool_call.arguments)
            for e in self.events
            if e.type is EventType.TOOL_CALL
        ]


class Played:
    """A wire that says what it is told, then ends."""

    status, headers = 200, {"content-type": "text/event-stream"}

    def __init__(self, body):
        self.pieces = [body, b""]

    def read(self):
        return self.pieces.pop(0)

    def expect(self, seconds=None):
        pass

    rest = finish = cancel = close = expect


def survive_stream(call, body):
    """A stream of these bytes ends well or with one of our errors, and can always be folded."""
    clock = Clock()
    try:
        stream = Stream.open(Played(body), provider_of(call.target), call, started=0, clock=clock)
        list(stream)
    except LLMError as error:
        assert str(error).isprintable()
    else:
        stream.response  # noqa: B018 - it must not raise


def survive_answer(call, body):
    """An answer of these bytes is understood, or one of our errors."""
    response = WireResponse(200, {}, body)
    try:
        parse_answer(Job(call, provider_of(call.target), None, 0), response)
    except LLMError as error:
        assert str(error).isprintable()


@pytest.fixture(scope="session")
def survive():
    """`survive.stream(call, body)` and `survive.answer(call, body)`, for bytes of any kind."""
    return SimpleNamespace(stream=survive_stream, answer=survive_answer)


@pytest.fixture(scope="session")
def call():
    """`call(model, subject, endpoint=…, stream=…, **params)` describes a call."""
    return make_call


@pytest.fixture(scope="session")
def recorded():
    """`recorded("llamacpp/chat")` is a recorded answer, as the transport hands it over."""
    return lambda name: response_from((DATA / f"{name}.http").read_bytes())


@pytest.fixture(scope="session")
def decode():
    """`decode(call, body)` is what a stream's bytes say."""
    return Decoded
