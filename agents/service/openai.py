"""OpenAI's "Create chat completion" and "List models": what is asked, and how it is answered.

Pure functions of plain values. Source: OpenAI's API reference, 2026-11.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Final

from agents.forms import Asked, as_message, checked, objects, read_fields, refused
from agents.types import ChatCompletionResponse, EventType, StreamEvent, TokenUsage
from LLM import LLMConfigError

DONE: Final = b"data: [DONE]\n\n"

# Fields of an answer's message that stand under another name in a stream, or are sent piece by piece.
_STREAMED: Final = ("role", "content", "tool_calls", "reasoning_content")

_CODES: Final = {
    401: "invalid_api_key",
    404: "model_not_found",
    429: "rate_limit_exceeded",
}


def read(body: Any) -> Asked:
    """What a request asks.

    Raises:
        LLMInvalidRequestError: it cannot be taken as it is; says which field and why.
    """
    fields = read_fields(body)
    given = objects(fields.pop("messages", None), "messages")
    if not given:
        raise refused("messages is empty; give at least one message", "messages")
    try:
        messages = [as_message(message, number) for number, message in enumerate(given)]
    except LLMConfigError as error:
        raise refused(str(error), "messages") from None
    model = checked(fields.pop("model", None), str, "model")
    stream = checked(fields.pop("stream", None), bool, "stream") is True
    options = checked(fields.pop("stream_options", None), dict, "stream_options") or {}
    if stream and (checked(fields.get("n"), int, "n") or 1) > 1:
        raise refused("n above 1 is not streamed here: ask again, or without stream", "n")
    _check_tools(fields)
    if fields.get("max_completion_tokens") is not None:
        fields["max_tokens"] = None  # one limit, and not the service's own beside it
    elif fields.get("max_tokens", 0) is None:
        del fields["max_tokens"]
    return Asked(messages, model, fields, stream, options.get("include_usage") is True)


def _check_tools(fields: dict[str, Any]) -> None:
    for number, tool in enumerate(objects(fields.get("tools"), "tools")):
        checked(tool.get("function"), dict, f"tools[{number}].function")
    choice = fields.get("tool_choice")
    if choice is not None and not isinstance(choice, str):
        checked(choice, dict, "tool_choice")
        checked(choice.get("function"), dict, "tool_choice.function")


class Answer:
    """The answer to one request, whole or piece by piece.

    Args:
        name: names the answer.
        created: seconds since 1970.
    """

    def __init__(self, name: str, created: int, asked: Asked) -> None:
        self._asked = asked
        self._name = f"chatcmpl-{name}"
        self._created = created
        self._calls = 0

    def whole(self, response: ChatCompletionResponse, model: str) -> dict[str, Any]:
        """The body of the answer at once."""
        choices = [
            {
                "index": choice.index,
                "message": self._message(choice.message.model_dump(exclude_none=True)),
                "logprobs": (choice.model_extra or {}).get("logprobs"),
                "finish_reason": choice.finish_reason or _finish_reason(choice.message.tool_calls),
            }
            for choice in response.choices
        ]
        head = self._head("chat.completion", model)
        return {**head, "choices": choices, "usage": usage(response.usage)}

    def start(self, model: str, known: TokenUsage | None) -> bytes:  # noqa: ARG002 - as the other dialect's
        """The first piece."""
        head = json.dumps(self._head("chat.completion.chunk", model))
        self._start = f"data: {head[:-1]}, "
        # When usage is asked for, every piece but the last says that it has none.
        self._end = ', "usage": null}\n\n' if self._asked.include_usage else "}\n\n"
        return self._chunk({"role": "assistant", "content": ""})

    def piece(self, event: StreamEvent) -> bytes:
        """An event of the stream; empty if it is not told."""
        if event.text_delta is not None:
            return self._chunk({"content": event.text_delta})
        if event.reasoning_delta is not None:
            return self._chunk({"reasoning_content": event.reasoning_delta})
        if event.type is EventType.TOOL_CALL and event.tool_call is not None:
            call = self._call(event.tool_call.model_dump(exclude_none=True))
            number, self._calls = self._calls, self._calls + 1
            return self._chunk({"tool_calls": [{"index": number, **call}]})
        return b""

    def end(self, response: ChatCompletionResponse) -> bytes:
        """The last pieces of an answer that is whole."""
        choice = response.choices[0]
        # What came beside the text is told at its end: a refusal, annotations, blocks with signatures.
        said = choice.message.model_dump(exclude_none=True)
        delta = {name: value for name, value in said.items() if name not in _STREAMED}
        reason = choice.finish_reason or _finish_reason(choice.message.tool_calls)
        last = self._chunk(delta, reason, (choice.model_extra or {}).get("logprobs"))
        if self._asked.include_usage:
            counted = json.dumps({"choices": [], "usage": usage(response.usage)})
            last += f"{self._start}{counted[1:]}\n\n".encode()
        return last + DONE

    def _head(self, kind: str, model: str) -> dict[str, Any]:
        return {"id": self._name, "object": kind, "created": self._created, "model": model}

    def _chunk(self, delta: dict[str, Any], reason: str | None = None, odds: Any = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": odds, "finish_reason": reason}
        return f'{self._start}"choices": [{json.dumps(choice)}]{self._end}'.encode()

    def _message(self, said: dict[str, Any]) -> dict[str, Any]:
        if "tool_calls" in said:
            said["tool_calls"] = [self._call(call) for call in said["tool_calls"]]
        return {"content": None, "refusal": None, **said}

    def _call(self, call: dict[str, Any]) -> dict[str, Any]:
        """Some servers give their calls no id, without which no result can be sent back."""
        return {"id": f"call_{self._name}_{self._calls}", **call}


def _finish_reason(calls: Any) -> str:
    return "tool_calls" if calls else "stop"


def usage(counted: TokenUsage | None) -> dict[str, Any] | None:
    """Tokens in this form; `None` if nothing is known of them."""
    if counted is None:
        return None
    return {
        "prompt_tokens": counted.prompt_tokens,
        "completion_tokens": counted.completion_tokens,
        "total_tokens": counted.total_tokens,
        "prompt_tokens_details": {"cached_tokens": counted.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": counted.reasoning_tokens},
    }


def error(
    status: int,
    message: str,
    *,
    name: str | None = None,  # noqa: ARG001 - as the other dialect's
    code: str | None = None,
    param: str | None = None,
) -> dict[str, Any]:
    """An error; `code` left out: the one that goes with the status."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    if status == 429:
        kind = "requests"
    if code == "insufficient_quota":
        kind = code
    return {
        "error": {
            "message": message,
            "type": kind,
            "param": param,
            "code": code or _CODES.get(status),
        }
    }


def error_event(body: dict[str, Any]) -> bytes:
    """An error after the first piece; nothing follows it, so the cut is seen."""
    return f"data: {json.dumps(body)}\n\n".encode()


def models(names: Iterable[str]) -> dict[str, Any]:
    """The list of models."""
    return {"object": "list", "data": [model(name) for name in names]}


def model(name: str) -> dict[str, Any]:
    """One of them; when it was made is not known."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "service"}
