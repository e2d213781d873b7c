"""`LocalServer`: a model's HTTP API on this machine, for tests, demonstrations and offline work."""

import errno
import json
import os
import socket
import socketserver
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any

from LLM.testing.batches import BatchDesk
from LLM.testing.dialects import CHAT, COMPLETIONS, MESSAGES, Ask, Dialect, RefusedError, encoded
from LLM.testing.model import (
    Answer,
    ToolCall,
    Usage,
    completion_tokens,
    prompt_tokens,
    respond,
)

__all__ = ["LocalServer", "Received", "serve"]

_MODELS = ("stand-in", "gpt-4", "gpt-4o-mini", "claude-3-5-sonnet-20241022")
_GENERATING = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETIONS,
    "/v1/messages": MESSAGES,
}
_METHODS = {"/health": "GET", "/v1/models": "GET", **dict.fromkeys(_GENERATING, "POST")}

# How long stop() waits for threads that are busy in a scripted function, in seconds.
_JOIN_TIMEOUT = 1.0
# How often the accepting thread looks whether it shall stop, in seconds: stop() takes that long,
# and a look costs some 10 microseconds.
_POLL_INTERVAL = 0.01


@dataclass(frozen=True)
class Received:
    """A request as it arrived.

    `headers` have lower-case names; `json` is the parsed body, or `None` if it is not JSON.
    """

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    json: Any


Function = Callable[[Received], Any]
Scripted = str | Mapping[str, Any] | Function


@dataclass(frozen=True)
class _Script:
    """A scripted reply, as `LocalServer.reply` takes it."""

    text: str | None = None
    tool_calls: Sequence[Mapping[str, Any]] = ()
    finish_reason: str | None = None
    reasoning: str | None = None
    usage: Mapping[str, int] | None = None
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Any = None
    delay: float = 0.0

    @classmethod
    def of(cls, scripted: str | Mapping[str, Any]) -> "_Script":
        """The script of a text or of arguments; raises at once what could never be said."""
        script = cls(text=scripted) if isinstance(scripted, str) else cls(**scripted)
        script.answer((), None)
        return script

    @property
    def raw(self) -> bool:
        """Whether it is an HTTP response as it stands, for any endpoint."""
        return self.body is not None or self.status >= 400

    def answer(self, messages: Sequence[Mapping[str, Any]], tools: Any) -> Answer:
        """What the model shall say; tokens that are not given are counted."""
        calls = tuple(
            ToolCall(call["name"], _arguments_text(call.get("arguments", {})), call.get("id"))
            for call in self.tool_calls
        )
        finish_reason = self.finish_reason or ("tool_calls" if calls else "stop")
        answer = Answer(self.text, calls, finish_reason, reasoning=self.reasoning)
        counted = {
            "prompt_tokens": prompt_tokens(messages, tools),
            "completion_tokens": completion_tokens(answer),
        }
        return replace(answer, usage=Usage(**{**counted, **(self.usage or {})}))

    def response(self, dialect: Dialect, serial: int) -> "_Response":
        """The raw response: the given body, or an error in the dialect's form."""
        if self.body is None:
            error = RefusedError(self.text or _phrase(self.status), status=self.status)
            return _json_response(dialect.error(error, serial), self.status)
        if isinstance(self.body, str | bytes):
            body = self.body.encode() if isinstance(self.body, str) else self.body
            return _Response(self.status, {"content-type": "text/plain; charset=utf-8"}, body)
        return _json_response(self.body, self.status)


def _arguments_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


@dataclass(frozen=True)
class _Response:
    """What goes back: a body at once, or events one by one."""

    status: int
    headers: Mapping[str, str]
    body: bytes = b""
    events: Sequence[bytes] = ()
    delay: float = 0.0
    event_delay: float = 0.0

    def with_headers(self, headers: Mapping[str, str]) -> "_Response":
        lower = {name.lower(): value for name, value in headers.items()}
        return replace(self, headers={**self.headers, **lower})


def _json_response(value: Any, status: int = 200) -> _Response:
    return _Response(status, {"content-type": "application/json"}, encoded(value))


def _phrase(status: int) -> str:
    if status == 529:  # Anthropic's own, of which Python does not know
        return "Overloaded"
    return HTTPStatus(status).phrase if status in set(HTTPStatus) else "Error"


def _script(scripted: Scripted) -> _Script | Function:
    return scripted if callable(scripted) else _Script.of(scripted)


def _scripts(replies: Iterable[Scripted] | Scripted | None) -> Iterator[_Script | Function]:
    """Scripts one by one; a list is checked now, any other iterable may be endless."""
    if isinstance(replies, str | Mapping) or callable(replies):
        replies = [replies]
    scripts = map(_script, replies or ())
    return iter(list(scripts)) if isinstance(replies, list | tuple) else scripts


class LocalServer:
    """A server on loopback that speaks chat completions, completions, models, messages and batches.

    A deterministic stand-in model answers, or what was scripted. Any model name is served::

        with LocalServer(["Hello!"]) as server:
            llm = LLM(base_url=server.url)

    Args:
        replies: Scripted replies, taken one for each answer before the stand-in model speaks: a
            text, a mapping of the arguments of `reply`, or a function of the `Received` request
            that gives one of these, or `None` for the stand-in model. A function stays for all
            requests that follow. An iterable may be endless; it is taken as it is needed.
        host: Address to listen on.
        port: 0 takes a free port, which a later `start` keeps.
        api_key: When given, a request without it, as Bearer token or `x-api-key`, gets a 401.
        models: Names that the list of models shows.
        latency: Seconds before each answer.
        token_delay: Seconds between two events of a stream.

    Attributes:
        batches: How its batches go; see `BatchDesk`.
    """

    def __init__(
        self,
        replies: Iterable[Scripted] | Scripted | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        api_key: str | None = None,
        models: Sequence[str] = _MODELS,
        latency: float = 0.0,
        token_delay: float = 0.0,
    ) -> None:
        self.host = host
        self.port = port
        self.models = tuple(models)
        self.latency = latency
        self.token_delay = token_delay
        self.batches = BatchDesk()
        self._api_key = api_key
        # Re-entrant, for a generator of replies that looks at the requests.
        self._lock = threading.RLock()
        self._queue: deque[_Script] = deque()
        self._replies = _scripts(replies)
        self._function: Function | None = None
        self._requests: list[Received] = []
        self._serial = 0
        self._connections = 0
        self._disconnects = 0
        self._tcp: _TCPServer | None = None

    @property
    def url(self) -> str:
        """The base URL, without a path: `http://127.0.0.1:PORT`."""
        if not self.port:
            raise RuntimeError("the server has no port before it is started")
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    @property
    def requests(self) -> list[Received]:
        """The requests so far, in their order: a copy, safe to keep."""
        with self._lock:
            return list(self._requests)

    @property
    def connections(self) -> int:
        """How many TCP connections were accepted."""
        with self._lock:
            return self._connections

    @property
    def disconnects(self) -> int:
        """How often a client went away before its answer was sent."""
        with self._lock:
            return self._disconnects

    def reply(
        self,
        text: str | Function | None = None,
        *,
        tool_calls: Sequence[Mapping[str, Any]] = (),
        finish_reason: str | None = None,
        reasoning: str | None = None,
        usage: Mapping[str, int] | None = None,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
        body: Any = None,
        delay: float = 0.0,
    ) -> None:
        """Queue one reply, to be given before the rest of `replies` and the stand-in model.

        It serves both dialects, streamed and not, and is given as it stands: `max_tokens` does
        not cut it. One with a `body` or an error status answers the next request whatever its
        endpoint is; any other waits for a request that generates.

        Args:
            text: What the model says; with an error status, the message of the error. A function
                is handed the request, gives a reply as in `replies`, and stays; what is queued
                goes before it.
            tool_calls: `{"name": …, "arguments": …}` each, and an `"id"` if it matters; arguments
                are an object, or a string that is sent as it stands.
            finish_reason: In the words of OpenAI, mapped for Anthropic; other words are sent as
                they stand. Left out, it is `"tool_calls"` or `"stop"`.
            reasoning: What the model thought first.
            usage: Any of `prompt_tokens`, `completion_tokens`, `cached_tokens`,
                `cache_write_tokens`, `reasoning_tokens`; the first two are counted if left out.
            status: HTTP status; from 400 on, without `body`, the error has the dialect's form.
            headers: Added to the response, or put in the place of its own.
            body: The whole body: text or bytes as they stand, or a value to send as JSON.
            delay: Seconds before the answer, on top of `latency`.
        """
        if callable(text):
            self._function = text
            return
        script = _Script.of(
            {
                "text": text,
                "tool_calls": tool_calls,
                "finish_reason": finish_reason,
                "reasoning": reasoning,
                "usage": usage,
                "status": status,
                "headers": headers or {},
                "body": body,
                "delay": delay,
            }
        )
        with self._lock:
            self._queue.append(script)

    def clear(self) -> None:
        """Forget the requests, the scripted replies and the counts."""
        with self._lock:
            self._queue.clear()
            self._replies = iter(())
            self._function = None
            self._requests.clear()
            self._connections = self._disconnects = 0

    def start(self) -> "LocalServer":
        """Listen and answer in the background; one that runs already is left running.

        Raises:
            OSError: The port cannot be had; the message says which and what to do.
        """
        if self._tcp is None:
            try:
                self._tcp = _TCPServer(
                    (self.host, self.port), self._respond, self._connected, self._disconnected
                )
            except OSError as error:
                raise _cannot_listen(self.host, self.port, error) from error
            self.port = self._tcp.server_address[1]
        return self

    def stop(self) -> None:
        """Close the port and every connection, also one with a stream in progress."""
        tcp, self._tcp = self._tcp, None
        if tcp is not None:
            tcp.stop()

    def __enter__(self) -> "LocalServer":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _connected(self) -> None:
        with self._lock:
            self._connections += 1

    def _disconnected(self) -> None:
        with self._lock:
            self._disconnects += 1

    def _respond(self, received: Received) -> _Response:
        with self._lock:
            self._serial += 1
            serial = self._serial
            self._requests.append(received)
        path = received.path.partition("?")[0]
        dialect = _dialect(received, path)
        try:
            response = self._routed(received, path, dialect, serial)
        except RefusedError as error:
            response = _json_response(dialect.error(error, serial), error.status)
            if error.status == HTTPStatus.METHOD_NOT_ALLOWED:
                allowed = self.batches.allowed(path) or (_METHODS[path],)
                response = response.with_headers({"allow": ", ".join(allowed)})
        id_header = {dialect.request_id_header: dialect.request_id(serial)}
        return replace(response, headers={**id_header, **response.headers})

    def _routed(self, received: Received, path: str, dialect: Dialect, serial: int) -> _Response:
        allowed = self.batches.allowed(path)
        if path not in _METHODS and not allowed:
            raise RefusedError(f"Invalid URL ({received.method} {path})", status=404)
        if received.method not in (allowed or (_METHODS[path],)):
            raise RefusedError(f"Not allowed to {received.method} on {path}.", status=405)
        if path == "/health":
            return _json_response({"status": "ok"})
        self._authenticate(received, dialect)
        ask = dialect.read(_parsed(received, dialect)) if path in _GENERATING else None
        script = self._next_script(received, generating=ask is not None)
        if script and script.raw:
            response = script.response(dialect, serial)
        elif ask:
            response = self._generated(ask, script, dialect, serial)
        elif allowed:
            response = self._batched(received, path, dialect)
        else:
            response = _json_response(dialect.models(self.models))
        delay = self.latency + (script.delay if script else 0.0)
        return replace(response, delay=delay).with_headers(script.headers if script else {})

    def _batched(self, received: Received, path: str, dialect: Dialect) -> _Response:
        if dialect is CHAT and path.startswith("/v1/messages"):
            raise RefusedError("anthropic-version: header is required")

        def answer(path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
            """What a request of a batch gets: as if it came alone."""
            single = replace(received, method="POST", path=path, body=encoded(body), json=body)
            dialect = _dialect(single, path)
            with self._lock:
                self._serial += 1
                serial = self._serial
            try:
                if path not in _GENERATING:
                    raise RefusedError(f"Invalid URL (POST {path})", status=404)
                ask = replace(dialect.read(_parsed(single, dialect)), stream=False)
                script = self._next_script(single, generating=True)
                if script and script.raw:
                    response = script.response(dialect, serial)
                else:
                    response = self._generated(ask, script, dialect, serial)
            except RefusedError as error:
                return error.status, dialect.error(error, serial)
            return response.status, _json_or_none(response.body) or {}

        query = received.path.partition("?")[2]
        kind, body = self.batches.respond(
            received.method, path, query, received.headers, received.body, answer
        )
        return _Response(200, {"content-type": kind}, body)

    def _authenticate(self, received: Received, dialect: Dialect) -> None:
        if self._api_key is None:
            return
        bearer = received.headers.get("authorization", "").removeprefix("Bearer ")
        given = bearer or received.headers.get("x-api-key")
        if given != self._api_key:
            missing, wrong = _AUTHENTICATION[dialect is MESSAGES]
            raise RefusedError(wrong if given else missing, status=401)

    def _next_script(self, received: Received, *, generating: bool) -> _Script | None:
        """The scripted reply to this request; one that is queued is used up by it."""
        try:
            with self._lock:
                self._pull()
                if self._queue:
                    usable = generating or self._queue[0].raw
                    return self._queue.popleft() if usable else None
                function = self._function
            outcome = function(received) if function else None
            script = None if outcome is None else _Script.of(outcome)
        except Exception as error:  # of the user's function: whoever reads the answer must learn it
            raise RefusedError(f"the scripted reply failed: {error!r}", status=500) from error
        return script if script and (generating or script.raw) else None

    def _pull(self) -> None:
        if self._queue or self._function:
            return
        script = next(self._replies, None)
        if isinstance(script, _Script):
            self._queue.append(script)
        else:
            self._function = script

    def _generated(
        self, ask: Ask, script: _Script | None, dialect: Dialect, serial: int
    ) -> _Response:
        answers = [
            _answer(ask, script, messages) for messages in ask.conversations for _ in range(ask.n)
        ]
        status = script.status if script else 200
        if not ask.stream:
            return _json_response(dialect.whole(ask, answers, serial), status)
        headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
        events = tuple(dialect.events(ask, answers, serial))
        return _Response(status, headers, events=events, event_delay=self.token_delay)


_AUTHENTICATION = {
    False: (
        "You didn't provide an API key: send it as 'Authorization: Bearer YOUR_KEY'.",
        "Incorrect API key provided.",
    ),
    True: ("x-api-key header is required", "invalid x-api-key"),
}


def _dialect(received: Received, path: str) -> Dialect:
    """Of an endpoint its own; elsewhere the header that only Anthropic's clients send decides."""
    if path in _GENERATING:
        return _GENERATING[path]
    return MESSAGES if "anthropic-version" in received.headers else CHAT


def _parsed(received: Received, dialect: Dialect) -> dict[str, Any]:
    if dialect is MESSAGES and "anthropic-version" not in received.headers:
        raise RefusedError("anthropic-version: header is required")
    if not isinstance(received.json, dict):
        raise RefusedError(
            "We could not parse the JSON body of your request. The API expects a JSON object."
        )
    return received.json


def _answer(ask: Ask, script: _Script | None, messages: Sequence[Mapping[str, Any]]) -> Answer:
    if script:
        return script.answer(messages, ask.tools)
    return respond(
        messages,
        ask.tools,
        ask.tool_choice,
        response_format=ask.response_format,
        max_tokens=ask.max_tokens,
        stop=ask.stop,
    )


def _cannot_listen(host: str, port: int, error: OSError) -> OSError:
    reason = error.strerror or str(error)
    if error.errno == errno.EADDRINUSE:
        reason = "the port is in use: stop the program that uses it, or choose another port"
    return OSError(error.errno, f"cannot listen on {host}:{port}: {reason}")


class _TCPServer(socketserver.ThreadingTCPServer):
    """Accepts in a thread, answers each connection in one, and can end them all."""

    # On Windows the option would let two programs listen on one port.
    allow_reuse_address = os.name == "posix"
    request_queue_size = 128

    def __init__(
        self,
        address: tuple[str, int],
        respond: Callable[[Received], _Response],
        connected: Callable[[], None],
        disconnected: Callable[[], None],
    ) -> None:
        self.respond = respond
        self.connected = connected
        self.disconnected = disconnected
        self.stopping = threading.Event()
        self._live: dict[threading.Thread, socket.socket] = {}
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, _Handler)
        self._accepting = threading.Thread(
            target=self.serve_forever, args=(_POLL_INTERVAL,), name="LocalServer", daemon=True
        )
        self._accepting.start()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer a connection in a thread that is known, so that stop() can wait for it."""
        self.connected()
        thread = threading.Thread(
            target=self.process_request_thread,
            args=(request, client_address),
            name="LocalServer connection",
            daemon=True,
        )
        self._live[thread] = request
        thread.start()

    def shutdown_request(self, request: Any) -> None:
        """Close a connection; its thread is done."""
        super().shutdown_request(request)
        self._live.pop(threading.current_thread(), None)

    def stop(self) -> None:
        """Close the port, end every connection, wait for their threads."""
        self.stopping.set()
        self.shutdown()
        self._accepting.join()
        self.server_close()
        live = list(self._live.items())
        for _, connection in live:
            with suppress(OSError):  # it was closed a moment ago
                connection.shutdown(socket.SHUT_RDWR)
        for thread, _ in live:
            if thread is not threading.current_thread():
                thread.join(_JOIN_TIMEOUT)


class _Handler(BaseHTTPRequestHandler):
    """Reads requests from one connection and writes the responses."""

    server: _TCPServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def handle(self) -> None:
        """Serve until either side closes; a client may do so at any time."""
        with suppress(ConnectionError):
            super().handle()

    def log_message(self, *_: Any) -> None:
        """Say nothing: the log belongs to the program under test."""

    def _exchange(self) -> None:
        body = self._read_body()
        if body is None:
            self.close_connection = True
            self.send_error(HTTPStatus.LENGTH_REQUIRED)
            return
        headers: dict[str, str] = {}
        for written, value in self.headers.items():
            name = written.lower()
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
        received = Received(self.command, self.path, headers, body, _json_or_none(body))
        try:
            self._send(self.server.respond(received))
        except ConnectionError:
            self.close_connection = True
            if not self.server.stopping.is_set():
                self.server.disconnected()

    # The names under which http.server looks for them.
    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _exchange  # noqa: N815

    def _read_body(self) -> bytes | None:
        """The body; `None` if its length is not told."""
        length = self.headers.get("content-length", "0")
        if "transfer-encoding" in self.headers or not length.isdecimal():
            return None
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise ConnectionAbortedError("the client went away within its request")
        return body

    def _send(self, response: _Response) -> None:
        self._pause(response.delay)
        if response.events:
            self._send_events(response)
        else:
            length = {"content-length": str(len(response.body))}
            self.wfile.write(self._head(response, length) + response.body)

    def _send_events(self, response: _Response) -> None:
        """One write for each event, the head with the first and the end with the last."""
        chunked = self.request_version != "HTTP/1.0"
        if not chunked:
            self.close_connection = True
        before = self._head(response, {"transfer-encoding": "chunked"} if chunked else {})
        for number, event in enumerate(response.events, 1):
            framed = b"%x\r\n%b\r\n" % (len(event), event) if chunked else event
            last = chunked and number == len(response.events)
            self.wfile.write(before + framed + (b"0\r\n\r\n" if last else b""))
            before = b""
            if number < len(response.events):
                self._pause(response.event_delay)

    def _head(self, response: _Response, framing: Mapping[str, str]) -> bytes:
        headers = {**framing, **response.headers}
        if self.close_connection:
            headers["connection"] = "close"
        lines = [f"HTTP/1.1 {response.status} {_phrase(response.status)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")

    def _pause(self, seconds: float) -> None:
        """Wait, but no longer than the server runs."""
        if seconds > 0 and self.server.stopping.wait(seconds):
            raise ConnectionAbortedError("the server was stopped")


def _json_or_none(body: bytes) -> Any:
    try:
        return json.loads(body, parse_constant=_not_json)
    except (ValueError, RecursionError):
        return None


def _not_json(constant: str) -> None:
    """Refuse NaN and Infinity, which Python would take."""
    raise ValueError(constant)


def serve(
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    api_key: str | None = None,
    models: Sequence[str] = _MODELS,
    latency: float = 0.0,
    token_delay: float = 0.0,
) -> None:
    """Run a `LocalServer` until Ctrl-C, after printing its address.

    Args:
        host: Address to listen on.
        port: Port to listen on; the default is the one that `LLM` calls by default.
        api_key: When given, requests need it.
        models: Names that the list of models shows.
        latency: Seconds before each answer.
        token_delay: Seconds between two events of a stream.

    Raises:
        OSError: The port cannot be had; the message says which and what to do.
    """
    with (
        suppress(KeyboardInterrupt),
        LocalServer(
            host=host,
            port=port,
            api_key=api_key,
            models=models,
            latency=latency,
            token_delay=token_delay,
        ) as server,
    ):
        sys.stdout.write(f"A stand-in model answers at {server.url} (Ctrl-C ends it)\n")
        sys.stdout.flush()
        # On Windows, Ctrl-C does not interrupt a wait without a limit.
        while True:
            threading.Event().wait(1.0)
