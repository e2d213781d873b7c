"""Record what llama.cpp's server really sends, as tests/data/llamacpp/*.http.

Each file is one response as it came from the socket: status line, headers, body, chunk borders and
all. Recorded once and kept, for the tests that feed bytes to a dialect. After a change of the
pinned `xllamacpp` run `python -m tests.engine.record` (a minute) and read the difference; ids,
dates and timings always differ, and the rare answers are others of their kind.
"""

from __future__ import annotations

import json
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.engine.llama_server import LlamaServer
from tests.engine.tiny_model import write_tiny_model

FOLDER = Path(__file__).parents[1] / "data" / "llamacpp"
KEY = "k"

CHAT, COMPLETIONS, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/messages"
HI = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Hi"}],
    "temperature": 0,
    "max_tokens": 2,
}
STREAM = {"stream": True}
USAGE = {"stream": True, "stream_options": {"include_usage": True}}
SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": [1, 2]}},
    "required": ["a"],
    "additionalProperties": False,
}
FORMAT = {
    "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}},
    "max_tokens": 40,
}
BAD = {"schema": {"type": "nonsense"}}
TEXT = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
LONG = {**HI, "messages": [{"role": "user", "content": "x" * 600}]}


def tool(schema: dict[str, Any]) -> dict[str, Any]:
    function = {"name": "f", "parameters": schema}
    return {
        "tools": [{"type": "function", "function": function}],
        "tool_choice": "required",
        "max_tokens": 90,
    }


def anthropic_tool(schema: dict[str, Any]) -> dict[str, Any]:
    return {
        "tools": [{"name": "f", "input_schema": schema}],
        "tool_choice": {"type": "any"},
        "max_tokens": 90,
    }


# Name of the file: method, path, body.
ANSWERS: dict[str, tuple[str, str, Any]] = {
    "models": ("GET", "/v1/models", None),
    "chat": ("POST", CHAT, HI),
    "chat-stream-usage": ("POST", CHAT, {**HI, **USAGE}),
    "chat-tool": ("POST", CHAT, {**HI, **tool(SCHEMA)}),
    "chat-tool-stream": ("POST", CHAT, {**HI, **tool(SCHEMA), **STREAM}),
    "chat-tool-cut": ("POST", CHAT, {**HI, **tool(SCHEMA), "max_tokens": 36}),
    "chat-schema": ("POST", CHAT, {**HI, **FORMAT}),
    "chat-schema-stream": ("POST", CHAT, {**HI, **FORMAT, **STREAM}),
    "completion": ("POST", COMPLETIONS, {"prompt": "Hi", "max_tokens": 2, "temperature": 0}),
    "completion-stream": (
        "POST",
        COMPLETIONS,
        {"prompt": "Hi", "max_tokens": 2, "temperature": 0, **STREAM},
    ),
    "messages": ("POST", MESSAGES, HI),
    "messages-stream": ("POST", MESSAGES, {**HI, **STREAM}),
    "messages-tool": ("POST", MESSAGES, {**HI, **anthropic_tool(SCHEMA)}),
    "messages-tool-stream": ("POST", MESSAGES, {**HI, **anthropic_tool(SCHEMA), **STREAM}),
    "messages-count-tokens": ("POST", f"{MESSAGES}/count_tokens", HI),
    "error-path": ("POST", "/v1/nothing", {}),
    "error-json": ("POST", CHAT, '{"messages": ['),
    "error-no-messages": ("POST", CHAT, {}),
    "error-no-role": ("POST", CHAT, {"messages": [{"content": "Hi"}]}),
    "error-type": ("POST", CHAT, {**HI, "temperature": "hot"}),
    "error-schema": (
        "POST",
        CHAT,
        {**HI, "response_format": {"type": "json_schema", "json_schema": BAD}},
    ),
    "error-image": (
        "POST",
        CHAT,
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "data:image/png,"}}],
                }
            ]
        },
    ),
    "error-context": ("POST", CHAT, LONG),
    "messages-error-no-messages": ("POST", MESSAGES, {"model": "tiny", "max_tokens": 1}),
}

# What happens only now and then: drawn again, with another prompt, until it is there.
RARE: dict[str, tuple[str, Any, Callable[[bytes], bool]]] = {
    # the first token was a part of a character
    "chat-stream-no-role": (
        CHAT,
        STREAM,
        lambda answer: b'"delta":{"content"' in answer and b'"role"' not in answer,
    ),
    "chat-stream-empty": (
        CHAT,
        {**STREAM, "max_tokens": 1},
        lambda answer: b'"content"' not in answer,
    ),
    "messages-stream-no-start": (
        MESSAGES,
        STREAM,
        lambda answer: b"content_block_start" in answer and b"message_start" not in answer,
    ),
    "messages-stream-empty": (
        MESSAGES,
        {**STREAM, "max_tokens": 1},
        lambda answer: b"content_block_start" not in answer and b"message_start" not in answer,
    ),
    # llama.cpp's parser refuses what its grammar let through
    "error-in-tool": (CHAT, tool(TEXT), lambda answer: b"peg-native" in answer),
    "error-in-tool-stream": (
        CHAT,
        {**tool(TEXT), **STREAM},
        lambda answer: b"peg-native" in answer[-400:],
    ),
    "messages-error-in-tool-stream": (
        MESSAGES,
        {**anthropic_tool(TEXT), **STREAM},
        lambda answer: b"peg-native" in answer[-400:],
    ),
    "chat-two-tools": (
        CHAT,
        {**tool(SCHEMA), "max_tokens": 200},
        lambda answer: (
            b'"finish_reason":"tool_calls"' in answer and answer.count(b'"type":"function"') == 2
        ),
    ),
}


def ask(url: str, method: str, path: str, body: Any = None, key: str | None = KEY) -> bytes:
    """Send one request on a connection of its own; return every byte that came back."""
    data = b"" if body is None else (body if isinstance(body, str) else json.dumps(body)).encode()
    address = urlsplit(url)
    host, port = address.hostname or "", address.port or 0
    head = [f"{method} {path} HTTP/1.1", f"Host: {address.netloc}", "Connection: close"]
    head += [f"Authorization: Bearer {key}"] if key else []
    head += ["Content-Type: application/json", f"Content-Length: {len(data)}"] if data else []
    with socket.create_connection((host, port), timeout=60) as connection:
        connection.sendall("\r\n".join(head).encode() + b"\r\n\r\n" + data)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def rare(url: str, path: str, extra: dict[str, Any], wanted: Callable[[bytes], bool]) -> bytes:
    """The shortest of the wanted answers to 120 prompts."""
    found = []
    for number in range(120):
        messages = [{"role": "user", "content": str(number)}]
        chance = {"temperature": 0.8, "seed": number, "messages": messages}
        answer = ask(url, "POST", path, {**HI, **extra, **chance})
        if wanted(answer):
            found.append(answer)
    return min(found, key=len)


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    recorded: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = write_tiny_model(Path(folder, "tiny.gguf"))
        with LlamaServer(model, context=512, slots=1, api_key=KEY) as server:
            for name, (method, path, body) in ANSWERS.items():
                recorded[name] = ask(server.url, method, path, body)
            recorded["error-key"] = ask(server.url, "POST", CHAT, HI, key=None)
            for name, (path, extra, wanted) in RARE.items():
                recorded[name] = rare(server.url, path, extra, wanted)
        with LlamaServer(model, context=16384, slots=1, ping=1) as server:
            slow = [{"role": "user", "content": "x" * 14000}]  # takes seconds to read
            body = {**HI, **STREAM, "max_tokens": 1, "messages": slow}
            recorded["chat-stream-ping"] = ask(server.url, "POST", CHAT, body)
    for name, answer in recorded.items():
        (FOLDER / f"{name}.http").write_bytes(answer)
    print(len(recorded), "files,", sum(map(len, recorded.values())), "bytes")


if __name__ == "__main__":
    main()
