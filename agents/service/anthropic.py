"""Anthropic's "Create a Message" and "List Models": what is asked, and how it is answered.

Pure functions of plain values. Source: Anthropic's API reference (Messages, streaming, errors, models),
2026-11.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any, Final

from agents.forms import (
    Asked,
    answer_blocks,
    arguments,
    as_message,
    checked,
    from_anthropic,
    objects,
    read_fields,
    refused,
)
from agents.types import ChatCompletionResponse, Message, StreamEvent, TokenUsage, ToolCall
from LLM import LLMConfigError

_STOP_REASONS: Final = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "function_call": "tool_use",
    "content_filter": "refusal",
}
# Said by a model server of the same dialect, these are passed on.
_NATIVE_REASONS: Final = frozenset(
    {*_STOP_REASONS.values(), "stop_sequence", "pause_turn", "model_context_window_exceeded"}
)

_ERRORS: Final = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}

# What the vendor's own servers would do for the model, and nobody does here.
_SERVED: Final = ("mcp_servers", "container")

# What each kind of block must hold, and as what.
_BLOCKS: Final[Mapping[Any, Mapping[str, type]]] = {
    "text": {"text": str},
    "thinking": {"thinking": str},
    "image": {"source": dict},
    "tool_use": {"id": str, "name": str, "input": dict},
    "tool_result": {"tool_use_id": str},
}


def read(body: Any, *, limited: bool = True) -> Asked:
    """What a request asks.

    Args:
        limited: whether `max_tokens` must be given, as for every answer.

    Raises:
        LLMInvalidRequestError: it cannot be taken as it is; says which field and why.
    """
    fields = read_fields(body)
    for name in ("model", "messages", *(("max_tokens",) if limited else ())):
        if fields.get(name) is None:
            raise refused(f"{name}: Field required", name)
    for name in _SERVED:
        if fields.get(name):
            raise refused(
                f"{name} needs servers of the vendor's own, which this service is not", name
            )
    model = checked(fields.pop("model"), str, "model")
    stream = checked(fields.pop("stream", None), bool, "stream") is True
    messages = _messages(fields.pop("messages"), fields.pop("system", None))
    params = _params(fields)
    return Asked(messages, model, params, stream, include_usage=True)


def _messages(given: Any, system: Any) -> list[Message]:
    turns = objects(given, "messages")
    if not turns:
        raise refused("messages: at least one message is required", "messages")
    said = [] if not system else [{"role": "system", "content": _system(system)}]
    for number, turn in enumerate(turns):
        place = f"messages.{number}"
        if turn.get("role") not in ("user", "assistant"):
            raise refused(f"{place}.role must be 'user' or 'assistant'", "messages")
        content = turn.get("content")
        if not isinstance(content, str):
            if content is None:
                raise refused(f"{place}.content: Field required", "messages")
            _check_blocks(content, f"{place}.content")
        if not content:
            raise refused(f"{place}.content: must not be empty", "messages")
        said.extend(from_anthropic(turn))
    try:
        return [as_message(message, number) for number, message in enumerate(said)]
    except LLMConfigError as error:
        raise refused(str(error), "messages") from None


def _system(system: Any) -> Any:
    """Text if it is no more than that: then every server takes it."""
    if isinstance(system, str):
        return system
    blocks = objects(system, "system")
    _check_blocks(system, "system")
    if all(block.keys() == {"type", "text"} for block in blocks):
        return "\n\n".join(block["text"] for block in blocks)
    return blocks


def _check_blocks(content: Any, place: str) -> None:
    for number, block in enumerate(objects(content, place)):
        kind = checked(block.get("type"), str, f"{place}.{number}.type")
        for name, type_ in _BLOCKS.get(kind, {}).items():
            where = f"{place}.{number}.{name}"
            if block.get(name) is None:
                raise refused(f"{where}: Field required", place)
            checked(block[name], type_, where)
        result = block.get("content") if kind == "tool_result" else None
        if result is not None and not isinstance(result, str):
            _check_blocks(result, f"{place}.{number}.content")


def _params(fields: dict[str, Any]) -> dict[str, Any]:
    params = {name: value for name, value in fields.items() if value is not None}
    if "stop_sequences" in params:
        stop = params.pop("stop_sequences")
        if not isinstance(stop, list) or not all(isinstance(word, str) for word in stop):
            raise refused("stop_sequences must be a list of texts", "stop_sequences")
        if stop:
            params["stop"] = stop
    if "tools" in params:
        tools = objects(params.pop("tools"), "tools")
        if tools:
            params["tools"] = [_tool(tool, f"tools.{n}") for n, tool in enumerate(tools)]
    if "tool_choice" in params:
        params.update(_tool_choice(checked(params.pop("tool_choice"), dict, "tool_choice")))
    metadata = checked(params.pop("metadata", None), dict, "metadata") or {}
    if metadata.get("user_id") is not None:
        params["user"] = checked(metadata["user_id"], str, "metadata.user_id")
    thinking = checked(params.get("thinking"), dict, "thinking")
    if thinking is not None and thinking.get("type") == "disabled":
        del params["thinking"]
    return params


def _tool(tool: Mapping[str, Any], place: str) -> dict[str, Any]:
    if tool.get("type") not in (None, "custom"):
        raise refused(
            f"{place}: {tool['type']!r} is a tool of the vendor's own servers, which are not here; give "
            "one with a name and an input_schema",
            "tools",
        )
    name = checked(tool.get("name"), str, f"{place}.name")
    schema = checked(tool.get("input_schema"), dict, f"{place}.input_schema")
    if name is None or schema is None:
        raise refused(f"{place}: name and input_schema are required", "tools")
    function = {"name": name, "parameters": schema}
    for word in ("description", "strict"):
        if tool.get(word) is not None:
            function[word] = tool[word]
    # What is cached ends at a mark beside the function, in our form too.
    mark = {"cache_control": tool["cache_control"]} if tool.get("cache_control") else {}
    return {"type": "function", "function": function, **mark}


def _tool_choice(choice: Mapping[str, Any]) -> dict[str, Any]:
    kind = choice.get("type")
    words = {"auto": "auto", "any": "required", "none": "none"}
    if kind == "tool":
        name = checked(choice.get("name"), str, "tool_choice.name")
        if name is None:
            raise refused("tool_choice.name: Field required", "tool_choice")
        params: dict[str, Any] = {"tool_choice": {"type": "function", "function": {"name": name}}}
    elif isinstance(kind, str) and kind in words:
        params = {"tool_choice": words[kind]}
    else:
        raise refused("tool_choice.type must be auto, any, tool or none", "tool_choice")
    if choice.get("disable_parallel_tool_use") is True:
        params["parallel_tool_calls"] = False
    return params


class Answer:
    """The answer to one request, whole or piece by piece.

    Args:
        name: names the answer.
        created: seconds since 1970; this dialect does not tell it.
    """

    def __init__(self, name: str, created: int, asked: Asked) -> None:  # noqa: ARG002 - as the other dialect's
        self._name = name
        self._stops = asked.params.get("stop", ())
        self._blocks = 0
        self._open: str | None = None  # kind of the block that is under way
        self._thoughts: list[int] = []  # numbers of the blocks of thoughts, which stay open

    def whole(self, response: ChatCompletionResponse, model: str) -> dict[str, Any]:
        """The body of the answer at once."""
        message = response.choices[0].message
        thoughts = _thoughts(message)
        content: list[Any] = [_thinking(thoughts)] if thoughts else []
        said = answer_blocks(message)
        content += [_text(said)] if isinstance(said, str) and said else said or []
        for number, block in enumerate(content):
            if block.get("type") == "tool_use" and block.get("id") is None:
                content[number] = {**block, "id": self._call_id(number)}
        head = self._head(model)
        return {
            **head,
            "content": content,
            **self._stopped(response),
            "usage": _usage(response.usage),
        }

    def start(self, model: str, known: TokenUsage | None) -> bytes:
        """The first piece."""
        counted = {name: count or 0 for name, count in _usage(known).items()}
        stopped = {"stop_reason": None, "stop_sequence": None}
        message = {**self._head(model), "content": [], **stopped, "usage": counted}
        return _event("message_start", message=message) + _event("ping")

    def piece(self, event: StreamEvent) -> bytes:
        """An event of the stream; empty if it is not told."""
        if event.text_delta is not None:
            head = b"" if self._open == "text" else self._begin("text", _text(""))
            return head + self._delta("text_delta", text=event.text_delta)
        if event.reasoning_delta is not None:
            head = b"" if self._open == "thinking" else self._begin("thinking", _thinking(""))
            return head + self._delta("thinking_delta", thinking=event.reasoning_delta)
        if event.tool_call is not None:
            return self._call(event.tool_call)
        return b""

    def end(self, response: ChatCompletionResponse) -> bytes:
        """The last pieces of an answer that is whole."""
        stopped, counted = self._stopped(response), _usage(response.usage)
        return (
            self._close()
            + self._signed(response.choices[0].message)
            + _event("message_delta", delta=stopped, usage=counted)
            + _event("message_stop")
        )

    def _head(self, model: str) -> dict[str, Any]:
        return {"id": f"msg_{self._name}", "type": "message", "role": "assistant", "model": model}

    def _begin(self, kind: str, block: dict[str, Any]) -> bytes:
        """The end of the block before, and the beginning of this one."""
        closed = self._close()
        self._open = kind
        number, self._blocks = self._blocks, self._blocks + 1
        if kind == "thinking":
            self._thoughts.append(number)
        return closed + _event("content_block_start", index=number, content_block=block)

    def _delta(self, kind: str, **piece: str) -> bytes:
        delta = {"type": kind, **piece}
        return _event("content_block_delta", index=self._blocks - 1, delta=delta)

    def _close(self) -> bytes:
        kind, self._open = self._open, None
        # A server signs the thoughts, and wants them back with their signature; here it is known only when
        # the answer is whole. So their blocks stay open until then.
        if kind in (None, "thinking"):
            return b""
        return _event("content_block_stop", index=self._blocks - 1)

    def _signed(self, message: Message) -> bytes:
        """The end of the blocks of thoughts."""
        native = (message.model_extra or {}).get("content_blocks") or ()
        signatures = [b.get("signature") or "" for b in native if b.get("type") == "thinking"]
        events = b""
        for number, signature in zip_longest(self._thoughts, signatures[: len(self._thoughts)]):
            if signature:
                delta = {"type": "signature_delta", "signature": signature}
                events += _event("content_block_delta", index=number, delta=delta)
            events += _event("content_block_stop", index=number)
        return events

    def _call(self, call: ToolCall) -> bytes:
        name = {"id": call.id or self._call_id(self._blocks), "name": call.name, "input": {}}
        start = self._begin("tool_use", {"type": "tool_use", **name})
        whole = json.dumps(arguments(call.arguments), ensure_ascii=False)
        return start + self._delta("input_json_delta", partial_json=whole) + self._close()

    def _call_id(self, number: int) -> str:
        """Some servers give their calls no id, without which no result can be sent back."""
        return f"toolu_{self._name}_{number}"

    def _stopped(self, response: ChatCompletionResponse) -> dict[str, Any]:
        choice = response.choices[0]
        native, extra = choice.stop_reason, response.model_extra or {}
        if isinstance(native, str) and native in self._stops:  # some servers say which (vLLM)
            return {"stop_reason": "stop_sequence", "stop_sequence": native}
        reason = choice.finish_reason or ("tool_calls" if choice.message.tool_calls else "stop")
        if isinstance(native, str) and native in _NATIVE_REASONS:
            found = native
        else:
            found = _STOP_REASONS.get(reason, reason)
        return {"stop_reason": found, "stop_sequence": extra.get("stop_sequence")}


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _thinking(text: str) -> dict[str, Any]:
    return {"type": "thinking", "thinking": text, "signature": ""}


def _thoughts(message: Message) -> str:
    """What the model thought, unless its own blocks tell it."""
    extra = message.model_extra or {}
    thoughts = None if extra.get("content_blocks") else extra.get("reasoning_content")
    return thoughts if isinstance(thoughts, str) else ""


def _usage(counted: TokenUsage | None) -> dict[str, Any]:
    """Tokens in this form, where those from a cache do not count as input; `None` is unknown."""
    counted = counted or TokenUsage()
    prompt, read_, written = (
        counted.prompt_tokens,
        counted.cached_tokens,
        counted.cache_write_tokens,
    )
    return {
        "input_tokens": None if prompt is None else max(0, prompt - (read_ or 0) - (written or 0)),
        "output_tokens": counted.completion_tokens,
        "cache_read_input_tokens": read_,
        "cache_creation_input_tokens": written,
    }


def _event(kind: str, **fields: Any) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode()


def error(
    status: int,
    message: str,
    *,
    name: str | None = None,
    code: str | None = None,
    param: str | None = None,  # noqa: ARG001 - as the other dialect's
) -> dict[str, Any]:
    """An error; `name` is that of the request, `code` the other dialect's word for it."""
    kind = _ERRORS.get(status) or ("api_error" if status >= 500 else "invalid_request_error")
    if code == "context_length_exceeded":
        message = f"prompt is too long: {message}"  # by these words it is known
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": name}


def error_event(body: dict[str, Any]) -> bytes:
    """An error after the first piece; nothing follows it, so the cut is seen."""
    return f"event: error\ndata: {json.dumps(body)}\n\n".encode()


def models(names: Sequence[str]) -> dict[str, Any]:
    """The list of models, all on one page."""
    first, last = (names[0], names[-1]) if names else (None, None)
    data = [model(name) for name in names]
    return {"data": data, "has_more": False, "first_id": first, "last_id": last}


def model(name: str) -> dict[str, Any]:
    """One of them; when it was made is not known."""
    return {
        "type": "model",
        "id": name,
        "display_name": name,
        "created_at": "1970-01-01T00:00:00Z",
    }
