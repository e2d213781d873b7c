"""The messages dialect: Anthropic, and servers that speak it too (llama.cpp, litellm's proxy).

Source: Anthropic's API reference (Messages, streaming, errors, models), 2026-11. Messages, tools and
answers are mapped from and to OpenAI's form, so that the same script talks to both; an answer keeps
its native blocks in `message.content_blocks`, which are sent back as they were.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

from LLM.errors import (
    LLMAPIError,
    LLMConfigError,
    LLMContextLengthError,
    LLMQuotaError,
    LLMResponseError,
)
from LLM.providers import base
from LLM.providers.base import Call, WireRequest, WireResponse
from LLM.types import (
    Answer,
    ChatCompletionResponse,
    CompletionResponse,
    ModelsResponse,
    Name,
    OrNone,
    StreamEvent,
    TokenUsage,
    Value,
    content_text,
)

VERSION = "2023-06-01"  # the only version since; "Versions", 2026-11

# Anthropic demands a limit. The largest that every model it ever served accepts ("Models overview",
# 2026-11: claude-3-opus and -haiku stop at 4,096).
DEFAULT_MAX_TOKENS = 4096

MAX_TEMPERATURE = 1.0  # "Create a Message", 2026-11

_FINISH_REASONS = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}

_TOOL_CHOICES = {"auto": "auto", "required": "any", "any": "any", "none": "none"}

# Both come as `invalid_request_error` and nothing else that a program could read.
_WORDING: tuple[tuple[str, type[LLMAPIError]], ...] = (
    ("prompt is too long", LLMContextLengthError),
    ("exceed context limit", LLMContextLengthError),
    ("exceeds the available context size", LLMContextLengthError),  # llama.cpp
    ("credit balance is too low", LLMQuotaError),
)


def build(call: Call) -> WireRequest:
    """The request for a call."""
    target = call.target
    version = {"Anthropic-Version": VERSION}
    credential = ("X-Api-Key", "")
    if call.endpoint == "models":
        url = f"{target.base_url}/models?limit=1000"
        headers = base.request_headers(call, {"Accept": "application/json", **version})
        return WireRequest("GET", url, headers, None, credential, target.key)
    headers = base.request_headers(call, {**base.post_headers(call), **version})
    url = f"{target.base_url}/messages"
    return WireRequest("POST", url, headers, base.encode(_body(call)), credential, target.key)


def _body(call: Call) -> dict[str, Any]:
    messages = call.subject if call.endpoint == "chat" else _prompt_messages(call.subject)
    plain = base.plain_messages(messages)
    try:
        system, turns = _turns(plain)
    except base.MALFORMED:
        raise LLMConfigError(
            "the messages are not in OpenAI's form: look at their content parts and tool_calls"
        ) from None
    params = {name: value for name, value in call.params.items() if value is not None}
    body: dict[str, Any] = {
        "model": call.target.model,
        "max_tokens": params.pop("max_tokens", DEFAULT_MAX_TOKENS),
    }
    if system:
        body["system"] = system
    body["messages"] = turns
    if "thinking" in params and call.sampled_by_default:
        params.pop("temperature", None)  # the two exclude each other; nobody asked for ours
    temperature = params.get("temperature")
    if temperature is not None and temperature > MAX_TEMPERATURE:
        raise LLMConfigError(
            f"temperature {temperature} is above {MAX_TEMPERATURE}, the most that this dialect takes"
        )
    # `max_completion_tokens` is what a script written for reasoning models says.
    if "max_completion_tokens" in params:
        body["max_tokens"] = params.pop("max_completion_tokens")
    if "stop" in params:
        stop = params.pop("stop")
        body["stop_sequences"] = [stop] if isinstance(stop, str) else stop
    if params.get("tools"):
        body["tools"] = [_tool(base.dump(tool)) for tool in params.pop("tools")]
    choice = _tool_choice(params.pop("tool_choice", None), params.pop("parallel_tool_calls", None))
    if choice is not None:
        body["tool_choice"] = choice
    if "user" in params:
        params.setdefault("metadata", {"user_id": params.pop("user")})
    params.pop("stream_options", None)  # usage always comes
    body.update(params)
    if call.stream:
        body["stream"] = True
    body.update(call.extra_body)
    return body


def _prompt_messages(prompt: Any) -> list[dict[str, Any]]:
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str) or not prompt:
        raise LLMConfigError(
            "this dialect has no completions of lists or tokens: prompt must be one string that is "
            "not empty; call once for each prompt"
        )
    return [{"role": "user", "content": prompt}]


def _turns(messages: list[dict[str, Any]]) -> tuple[Any, list[dict[str, Any]]]:
    """The system prompt (text, blocks if it has any, or None), and the messages without it."""
    system: list[Any] = []
    turns: list[dict[str, Any]] = []
    for message in messages:
        role, content = message["role"], message.get("content")
        if role in ("system", "developer"):
            system.extend([_text_block(content)] if isinstance(content, str) else _blocks(content))
        elif role == "tool":
            result = {"type": "tool_result", "tool_use_id": message.get("tool_call_id")}
            if content:
                blocks = _blocks(content)
                # The mark of a cached prefix belongs to the result, not to a part of it.
                if isinstance(blocks, list) and isinstance(blocks[-1], dict):
                    mark = blocks[-1].get("cache_control")
                    if mark:
                        blocks[-1] = {k: v for k, v in blocks[-1].items() if k != "cache_control"}
                        result["cache_control"] = mark
                result["content"] = blocks
            _append(turns, "user", [result])
        elif role == "assistant":
            _append(turns, role, _assistant_content(message))
        else:
            _append(turns, role, _blocks(content))
    if all(set(block) == {"type", "text"} for block in system):
        return "\n\n".join(block["text"] for block in system) or None, turns
    return system, turns


def _append(turns: list[dict[str, Any]], role: str, content: Any) -> None:
    """Add content; a tool's results must stand together in one user message."""
    last = turns[-1] if turns else None
    if last and last["role"] == role == "user" and _has_results(last["content"]):
        last["content"] += content if isinstance(content, list) else [_text_block(content)]
    else:
        turns.append({"role": role, "content": content})


def _has_results(content: Any) -> bool:
    return bool(content) and isinstance(content, list) and _kind(content[-1]) == "tool_result"


def _kind(block: Any) -> Any:
    return block.get("type") if isinstance(block, dict) else None


def _text_block(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _assistant_content(message: dict[str, Any]) -> Any:
    # Its own blocks, as they came: thinking must go back unchanged with its signature.
    if message.get("content_blocks"):
        return message["content_blocks"]
    content = message.get("content")
    calls = message.get("tool_calls") or []
    if not calls:
        return _blocks(content) if content else ""
    blocks = [_text_block(content)] if isinstance(content, str) and content else list(content or [])
    for call in calls:
        function = call.get("function", {})
        blocks.append(
            {
                "type": "tool_use",
                "id": call.get("id"),
                "name": function.get("name"),
                "input": _arguments(function.get("arguments")),
            }
        )
    return blocks


def _arguments(text: Any) -> Any:
    """Arguments as the object that the wire wants; what is not valid JSON is kept under a name."""
    if not isinstance(text, str):
        return text or {}
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {"invalid_json": text}
    return value if isinstance(value, dict) else {"value": value}


def _blocks(content: Any) -> Any:
    """Content parts in OpenAI's form as blocks; text and native blocks as they are."""
    if not isinstance(content, list):
        return content
    return [_block(part) for part in content]


def _block(part: Any) -> Any:
    if not isinstance(part, dict):
        return _text_block(part) if isinstance(part, str) else part
    if part.get("type") == "image_url":
        image = part.get("image_url")
        url = image.get("url", "") if isinstance(image, dict) else str(image or "")
        return {"type": "image", "source": _image_source(url)}
    return part


def _image_source(url: str) -> dict[str, Any]:
    if not url.startswith("data:"):
        return {"type": "url", "url": url}
    head, _, data = url.removeprefix("data:").partition(",")
    return {"type": "base64", "media_type": head.split(";")[0], "data": data}


def _tool(tool: Any) -> Any:
    if not isinstance(tool, dict) or "function" not in tool:
        return tool  # already in this dialect, or a tool of the server's own
    function = tool["function"]
    schema = function.get("parameters") or {"type": "object", "properties": {}}
    mapped = {"name": function.get("name"), "input_schema": schema}
    if function.get("description"):
        mapped["description"] = function["description"]
    if "cache_control" in tool:
        mapped["cache_control"] = tool["cache_control"]
    return mapped


def _tool_choice(choice: Any, parallel: Any) -> dict[str, Any] | None:
    mapped: dict[str, Any] | None = None
    if isinstance(choice, str):
        if choice not in _TOOL_CHOICES:
            raise LLMConfigError(
                f"tool_choice {choice!r} is unknown: give 'auto', 'required', 'none' or a function"
            )
        mapped = {"type": _TOOL_CHOICES[choice]}
    elif isinstance(choice, dict):
        function = choice.get("function")
        mapped = {"type": "tool", "name": function.get("name")} if function else dict(choice)
    if parallel is False:
        mapped = {**(mapped or {"type": "auto"}), "disable_parallel_tool_use": True}
    return mapped


class _Native(Value):
    """A message as Anthropic sends it; only what is needed of it is named."""

    id: Name = None
    model: Name = None
    role: Name = "assistant"
    content: list[dict[str, Any]]
    stop_reason: Name = None
    usage: Annotated[dict[str, Any] | None, OrNone] = None


class _NativeModels(Value):
    data: list[dict[str, Any]]


def parse(call: Call, response: WireResponse) -> Answer:
    """The value of a 2xx response."""
    value = _NativeModels if call.endpoint == "models" else _Native
    try:
        native = base.validate(value, response, call)
    except LLMResponseError:
        found = base.read_error(response.body)
        if found.found:
            raise base.api_error(call, response, found, _WORDING) from None
        raise
    if isinstance(native, _NativeModels):
        models = [{"object": "model", **model} for model in native.data]
        return ModelsResponse.model_validate({"data": models})
    return _answer(call, native)


def _answer(call: Call, native: _Native) -> Answer:
    """A native message in OpenAI's form, under the convention of `TokenUsage`."""
    finish_reason = _finish_reason(native.stop_reason)
    shared: dict[str, Any] = {**(native.model_extra or {}), "id": native.id, "model": native.model}
    shared.pop("type", None)
    answer: ChatCompletionResponse | CompletionResponse
    if call.endpoint == "completion":
        choice: dict[str, Any] = {
            "text": content_text(native.content),
            "finish_reason": finish_reason,
        }
        choice["stop_reason"] = native.stop_reason
        answer = CompletionResponse.model_validate({**shared, "choices": [choice]})
    else:
        choice = {
            "message": _message(native.content),
            "finish_reason": finish_reason,
            "stop_reason": native.stop_reason,
        }
        answer = ChatCompletionResponse.model_validate({**shared, "choices": [choice]})
    answer.usage = usage(native.usage)
    return answer


def _message(blocks: list[dict[str, Any]]) -> dict[str, Any]:
    texts = [b.get("text") or "" for b in blocks if b.get("type") == "text"]
    thinking = [b.get("thinking") or "" for b in blocks if b.get("type") == "thinking"]
    calls = [
        {
            "id": block.get("id"),
            "function": {
                "name": block.get("name") or "",
                "arguments": json.dumps(block.get("input") or {}, ensure_ascii=False),
            },
        }
        for block in blocks
        if block.get("type") == "tool_use"
    ]
    content = "".join(texts) if texts or not calls else None
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if thinking:
        message["reasoning_content"] = "".join(thinking)
    if calls:
        message["tool_calls"] = calls
    if any(block.get("type") != "text" or len(block) > 2 for block in blocks):
        message["content_blocks"] = blocks
    return message


def _finish_reason(stop_reason: str | None) -> str | None:
    return _FINISH_REASONS.get(stop_reason or "", stop_reason)


def usage(native: dict[str, Any] | None) -> TokenUsage | None:
    """Anthropic's counts under our convention: cached tokens are part of the prompt."""
    if not isinstance(native, dict):
        return None
    names = "input_tokens output_tokens cache_read_input_tokens cache_creation_input_tokens".split()
    counts = (native.get(name) for name in names)
    fresh, output, read, written = (n if type(n) is int else None for n in counts)
    prompt = None if fresh is None else fresh + (read or 0) + (written or 0)
    return TokenUsage(
        prompt_tokens=prompt,
        completion_tokens=output,
        total_tokens=None if prompt is None or output is None else prompt + output,
        cached_tokens=read,
        cache_write_tokens=written,
    )


def error(call: Call, response: WireResponse) -> LLMAPIError:
    """What a response that is not 2xx means."""
    return base.api_error(call, response, base.read_error(response.body), _WORDING)


def decoder(call: Call) -> MessagesDecoder:
    """A fresh decoder for one stream."""
    return MessagesDecoder(call)


def output_limit(call: Call) -> int:
    """The most tokens that it may answer with, its thinking included."""
    return base.limit_in(call, "max_completion_tokens", "max_tokens") or DEFAULT_MAX_TOKENS


class MessagesDecoder:
    """The events of a messages stream as ours; folds its blocks.

    A stream without `message_start`, or a tool's block without `input`, is borne with (llama.cpp).
    """

    def __init__(self, call: Call) -> None:
        self._call = call
        self._head: dict[str, Any] = {}
        self._blocks: dict[int, dict[str, Any]] = {}
        self._pieces: dict[int, base.GrowingText] = {}  # text, thinking or JSON of each block
        self._tools: dict[int, base.PartialToolCall] = {}
        self._usage: dict[str, Any] = {}
        self._stop_reason: str | None = None
        self.progress = 0
        self.ended = False

    @property
    def begun(self) -> bool:
        return bool(self._head or self._blocks or self._stop_reason or self._usage)

    @property
    def complete(self) -> bool:
        return self.ended or self._stop_reason is not None

    @property
    def usage(self) -> TokenUsage | None:
        return usage(self._usage) if self._usage else None

    def feed(self, name: bytes, data: bytes) -> list[StreamEvent]:
        if not data or data.isspace():
            return []
        if len(data) < 16 and data.strip() == b"[DONE]":  # a gateway's habit from the other dialect
            self.ended = True
            return []
        event = self._parse(name, data)
        kind = event.get("type") or name.decode("ascii", "replace")
        if kind == "content_block_delta":
            return self._take_delta(event.get("index") or 0, event.get("delta") or {})
        if kind == "content_block_start":
            return self._start_block(event.get("index") or 0, event.get("content_block") or {})
        if kind == "content_block_stop":
            return self._stop_block(event.get("index") or 0)
        if kind == "message_start":
            message = event.get("message") or {}
            self._head = message
            self._take_usage(message.get("usage"))
        elif kind == "message_delta":
            self._stop_reason = (event.get("delta") or {}).get("stop_reason") or self._stop_reason
            self._take_usage(event.get("usage"))
        elif kind == "message_stop":
            self.ended = True
        return []  # also for `ping` and events of a newer API

    def _parse(self, name: bytes, data: bytes) -> dict[str, Any]:
        response = WireResponse(200, {"content-type": "text/event-stream"}, data)
        try:
            event = base.parse_json(data)
        except ValueError:
            if name != b"error":
                raise base.unexpected(self._call, response, "an event that is not JSON") from None
            event = {"error": data.decode("utf-8", "replace")}
        odd = isinstance(event, dict) and "type" not in event and "detail" in event
        odd = odd or (isinstance(event, dict) and event.get("object") == "error")
        if odd or name == b"error" or not isinstance(event, dict) or event.get("error"):
            found = base.read_error_value(event)
            if found is None and (name == b"error" or isinstance(event, str)):
                found = base.ErrorBody(str(event))
            if found is None:
                raise base.unexpected(self._call, response, "an event that is not an object")
            raise base.api_error(self._call, response, found, _WORDING)
        return event

    def _take_usage(self, counts: Any) -> None:
        # Later counts replace earlier ones: they are cumulative, and some servers send 0 at first.
        if isinstance(counts, dict):
            self._usage.update({name: n for name, n in counts.items() if n is not None})

    def _start_block(self, index: int, block: dict[str, Any]) -> list[StreamEvent]:
        if not isinstance(index, int) or not isinstance(block.get("name", ""), str):
            raise TypeError("a block of odd fields")
        self._blocks[index] = dict(block)
        pieces = self._pieces[index] = base.GrowingText()
        kind = block.get("type")
        if kind == "tool_use":
            self.progress += 1
            self._tools[index] = base.PartialToolCall(block.get("id"), block.get("name") or "")
        for field in ("text", "thinking"):
            if kind == field and block.get(field):
                pieces.write(block[field])
                self.progress += 1
                event = base.text_event if kind == "text" else base.reasoning_event
                return [event(block[field])]
        return []

    def _take_delta(self, index: int, delta: dict[str, Any]) -> list[StreamEvent]:
        kind = delta.get("type")
        if kind == "text_delta":
            text = delta.get("text")
            if text:
                self._piece(index, "text").write(text)
                return [base.text_event(text)]
        elif kind == "thinking_delta":
            text = delta.get("thinking")
            if text:
                self._piece(index, "thinking").write(text)
                return [base.reasoning_event(text)]
        elif kind == "input_json_delta":
            self._piece(index, "tool_use").write(delta.get("partial_json") or "")
        elif kind == "signature_delta":
            block = self._blocks.setdefault(index, {"type": "thinking"})
            block["signature"] = block.get("signature", "") + (delta.get("signature") or "")
        elif kind == "citations_delta":
            block = self._blocks.setdefault(index, {"type": "text"})
            block["citations"] = [*(block.get("citations") or []), delta.get("citation")]
        return []

    def _piece(self, index: int, kind: str) -> base.GrowingText:
        if not isinstance(index, int):
            raise TypeError("a block without a number")
        self.progress += 1
        pieces = self._pieces.get(index)
        if pieces is None:  # the block's start was left out
            self._blocks[index] = {"type": kind}
            pieces = self._pieces[index] = base.GrowingText()
        return pieces

    def _stop_block(self, index: int) -> list[StreamEvent]:
        call = self._tools.get(index)
        if call is None or call.handed_over:
            return []
        # Some servers send the whole input at the start and no deltas.
        whole = json.dumps(self._blocks[index].get("input") or {}, ensure_ascii=False)
        call.arguments = [self._text(index) or whole]
        return [base.tool_event(call)]

    def finish(self) -> list[StreamEvent]:
        events = [event for index in list(self._tools) for event in self._stop_block(index)]
        events.append(base.complete_event(_finish_reason(self._stop_reason), self.usage))
        return events

    def response(self) -> Answer | None:
        if not self.begun:
            return None
        native = _Native.model_validate(
            {
                **self._head,
                "content": [self._whole_block(index) for index in sorted(self._blocks)],
                "stop_reason": self._stop_reason,
                "usage": self._usage or None,
            }
        )
        return _answer(self._call, native)

    def _text(self, index: int) -> str:
        return self._pieces[index].getvalue() if index in self._pieces else ""

    def _whole_block(self, index: int) -> dict[str, Any]:
        block = dict(self._blocks[index])
        text = self._text(index)
        kind = block.get("type")
        if kind in ("text", "thinking"):
            block[kind] = text
        elif kind == "tool_use":
            block["input"] = _arguments(text) if text else block.get("input") or {}
        return block
