"""The chat-completions dialect: OpenAI, and every server that is compatible with it.

Source: OpenAI's API reference (chat, completions, models), 2026-11; differences of real servers are
beside the code that bears with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from pydantic import ValidationError

from LLM.errors import (
    LLMAPIError,
    LLMConfigError,
    LLMContentFilterError,
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
    StreamEvent,
    TokenUsage,
    content_text,
)

_PATHS = {"chat": "/chat/completions", "completion": "/completions", "models": "/models"}
_VALUES: Mapping[str, type[Answer]] = {
    "chat": ChatCompletionResponse,
    "completion": CompletionResponse,
    "models": ModelsResponse,
}

# What compatible servers say where they give no code of their own for it.
_WORDING: tuple[tuple[str, type[LLMAPIError]], ...] = (
    ("maximum context length", LLMContextLengthError),  # vLLM, Mistral, older OpenAI
    ("exceeds the available context size", LLMContextLengthError),  # llama.cpp
    ("context window exceeded", LLMContextLengthError),  # litellm's proxy
    ("context length exceeded", LLMContextLengthError),  # LM Studio
    ("insufficient balance", LLMQuotaError),  # DeepSeek
    ("exceeded your current quota", LLMQuotaError),  # Gemini
    ("content management policy", LLMContentFilterError),  # Azure's filter behind a gateway
)

# Fields of an answer's message that only another dialect, or nobody, takes back.
_NOT_SENT_BACK = ("content_blocks", "reasoning_content", "reasoning", "annotations", "refusal")


def build(call: Call) -> WireRequest:
    """The request for a call."""
    target = call.target
    url = target.base_url + _PATHS[call.endpoint]
    credential = ("Authorization", "Bearer ")
    if call.endpoint == "models":
        headers = base.request_headers(call, {"Accept": "application/json"})
        return WireRequest("GET", url, headers, None, credential, target.key)
    headers = base.request_headers(call, base.post_headers(call))
    return WireRequest("POST", url, headers, base.encode(_body(call)), credential, target.key)


def _body(call: Call) -> dict[str, Any]:
    target = call.target
    body: dict[str, Any] = {"model": target.model}
    if call.endpoint == "chat":
        body["messages"] = [_message(m) for m in base.plain_messages(call.subject)]
    else:
        body["prompt"] = checked_prompt(call.subject)
    quirk = target.host.quirk(target.model)
    for name, value in call.params.items():
        if value is None:
            continue
        if name == "temperature" and quirk.refuses_temperature and call.sampled_by_default:
            continue
        if name == "max_tokens":
            name = quirk.max_tokens_name if call.endpoint == "chat" else name  # noqa: PLW2901
        body[name] = [base.dump(item) for item in value] if isinstance(value, list) else value
    if call.stream:
        body["stream"] = True
        if target.host.stream_usage and "stream_options" not in call.params:
            body["stream_options"] = {"include_usage": True}
    body.update(call.extra_body)
    return body


def _message(message: dict[str, Any]) -> dict[str, Any]:
    if message["role"] == "assistant":
        for name in _NOT_SENT_BACK:
            message.pop(name, None)
    return message


def checked_prompt(prompt: Any) -> Any:
    """A prompt that `/completions` takes.

    Raises:
        LLMConfigError: it is neither a string nor a list of them (or of token numbers).
    """
    if isinstance(prompt, str) and prompt:
        return prompt
    if isinstance(prompt, list) and prompt and all(isinstance(p, (str, int, list)) for p in prompt):
        return prompt
    what = "empty" if not prompt and isinstance(prompt, (str, list)) else type(prompt).__name__
    raise LLMConfigError(f"prompt must be a string or a list of strings, and is {what}")


def parse(call: Call, response: WireResponse) -> Answer:
    """The value of a 2xx response."""
    answer: Answer
    try:
        answer = base.validate(_VALUES[call.endpoint], response, call)
    except LLMResponseError:
        # Some gateways answer 200 with an error inside.
        found = base.read_error(response.body)
        if found.found:
            raise base.api_error(call, response, found, _WORDING) from None
        raise
    if not isinstance(answer, ModelsResponse) and not answer.choices:  # type: ignore[attr-defined]
        raise base.unexpected(call, response, "without any choices")
    return answer


def error(call: Call, response: WireResponse) -> LLMAPIError:
    """What a response that is not 2xx means."""
    return base.api_error(call, response, base.read_error(response.body), _WORDING)


def decoder(call: Call) -> ChatDecoder:
    """A fresh decoder for one stream."""
    return ChatDecoder(call)


def output_limit(call: Call) -> int | None:
    """The most tokens that it may answer with: of all choices, of all prompts."""
    limit = base.limit_in(call, "max_completion_tokens", "max_tokens")
    if limit is None:
        return None
    choices = max(base.limit_in(call, "n") or 1, base.limit_in(call, "best_of") or 1)
    prompts = 1
    if call.endpoint == "completion" and isinstance(call.subject, list):
        prompts = sum(not isinstance(part, int) for part in call.subject) or 1
    return limit * choices * prompts


class _ChoiceFold:
    """One choice of a stream, as far as it came."""

    __slots__ = ("extra", "finish_reason", "reasoning", "text", "tools")

    def __init__(self) -> None:
        self.text = base.GrowingText()
        self.reasoning = base.GrowingText()
        self.tools: dict[Any, base.PartialToolCall] = {}
        self.finish_reason: str | None = None
        self.extra: dict[str, Any] = {}  # fields of the delta that we do not know, folded


class ChatDecoder:
    """Chunks of chat completions, and of completions, as events; folds all choices.

    Events come from the first choice only: with `n` above 1 the others are in the response.
    """

    def __init__(self, call: Call) -> None:
        self._call = call
        self._head: dict[str, Any] = {}
        self._choices: dict[int, _ChoiceFold] = {}
        self._first = self._choices.setdefault(0, _ChoiceFold())
        self._usage: Any = None
        self.progress = 0
        self.ended = False

    @property
    def usage(self) -> TokenUsage | None:
        with suppress(ValidationError):
            return TokenUsage.model_validate(self._usage) if self._usage else None
        return None

    @property
    def begun(self) -> bool:
        return bool(self._head)

    @property
    def complete(self) -> bool:
        return self.ended or any(c.finish_reason is not None for c in self._choices.values())

    def feed(self, name: bytes, data: bytes) -> list[StreamEvent]:
        if len(data) < 16 and data.strip() == b"[DONE]":
            self.ended = True
            return []
        if not data or data.isspace():
            return []
        chunk = self._parse(name, data)
        choices = chunk.get("choices")
        if chunk.get("usage"):
            self._usage = chunk["usage"]
        if not self._head:
            self._head = chunk
        if not choices:
            if choices is None:
                self._raise_if_error(chunk, data)
            return []
        if not isinstance(choices, list):
            raise TypeError("choices that are no list")
        text = _only_text(choices)
        if text:
            self._first.text.write(text)
            self.progress += 1
            return [base.text_event(text)]
        events: list[StreamEvent] = []
        for choice in choices:
            if isinstance(choice, dict):
                self._take_choice(choice, events)
        return events

    def _parse(self, name: bytes, data: bytes) -> dict[str, Any]:
        try:
            chunk = base.parse_json(data)
        except ValueError:
            if name == b"error":
                chunk = {"error": data.decode("utf-8", "replace")}
            else:
                raise self._unexpected(data, "not JSON") from None
        if isinstance(chunk, dict) and not chunk.get("error") and name != b"error":
            return chunk
        found = base.read_error_value(chunk)
        if found is None and (name == b"error" or isinstance(chunk, str)):
            found = base.ErrorBody(str(chunk))
        if found is None:
            raise self._unexpected(data, "not an object")
        raise base.api_error(self._call, WireResponse(200, {}, data), found, _WORDING)

    def _raise_if_error(self, chunk: dict[str, Any], data: bytes) -> None:
        """Some servers report an error like any other object: FastAPI's `detail`, vLLM's `object`."""
        if "detail" in chunk or chunk.get("object") == "error":
            found = base.read_error_value(chunk)
            if found is not None:
                raise base.api_error(self._call, WireResponse(200, {}, data), found, _WORDING)

    def _unexpected(self, data: bytes, problem: str) -> LLMResponseError:
        response = WireResponse(200, {"content-type": "text/event-stream"}, data)
        return base.unexpected(self._call, response, f"an event that is {problem}")

    def _take_choice(self, choice: dict[str, Any], events: list[StreamEvent]) -> None:
        index = choice.get("index") or 0
        if not isinstance(index, int):
            raise TypeError("a choice without a number")
        fold = self._choices.get(index)
        if fold is None:
            fold = self._choices[index] = _ChoiceFold()
        heard = events if fold is self._first else []
        delta = choice.get("delta") or choice.get("message") or {}
        if isinstance(choice.get("text"), str):  # a completion's chunk
            delta = {"content": choice["text"]}
        for name, value in delta.items():
            if value is None or name == "role":
                continue
            if name == "content":
                self._take_text(content_text(value), fold, heard)
            elif name == "reasoning" and delta.get("reasoning_content") == value:
                continue  # the same under two names (vLLM)
            elif name in ("reasoning_content", "reasoning") and isinstance(value, str):
                self._take_reasoning(value, fold, heard)
            elif name == "tool_calls":
                self._take_tools(value if isinstance(value, list) else [], fold)
            else:
                _merge(fold.extra, name, value)
        if choice.get("logprobs"):
            _merge(fold.extra, "logprobs", choice["logprobs"])
        if choice.get("finish_reason"):  # an empty one is none
            fold.finish_reason = str(choice["finish_reason"])
            self._hand_over_tools(fold, heard)

    def _take_text(self, text: str, fold: _ChoiceFold, events: list[StreamEvent]) -> None:
        if text:
            fold.text.write(text)
            self.progress += 1
            events.append(base.text_event(text))

    def _take_reasoning(self, text: str, fold: _ChoiceFold, events: list[StreamEvent]) -> None:
        if text:
            fold.reasoning.write(text)
            self.progress += 1
            events.append(base.reasoning_event(text))

    def _take_tools(self, calls: list[Any], fold: _ChoiceFold) -> None:
        for piece in calls:
            if not isinstance(piece, dict):
                continue
            self.progress += 1
            function = piece.get("function") or {}
            index = piece.get("index", len(fold.tools) if piece.get("id") else len(fold.tools) - 1)
            call = fold.tools.get(index)
            # Gemini gives several whole calls the same index; a new id is a new call.
            if call is not None and piece.get("id") and call.id not in (None, piece["id"]):
                index = (index, len(fold.tools))
                call = None
            if call is None:
                call = fold.tools[index] = base.PartialToolCall()
            call.id = piece.get("id") or call.id
            call.name += function.get("name") or ""
            arguments = function.get("arguments")
            if arguments:
                call.arguments.append(
                    arguments if isinstance(arguments, str) else base.encode(arguments).decode()
                )
            for name, value in piece.items():
                if name not in ("id", "index", "type", "function") and value is not None:
                    call.extra[name] = value

    def _hand_over_tools(self, fold: _ChoiceFold, events: list[StreamEvent]) -> None:
        if fold is self._first:
            events.extend(base.tool_event(c) for c in fold.tools.values() if not c.handed_over)

    def finish(self) -> list[StreamEvent]:
        events: list[StreamEvent] = []
        self._hand_over_tools(self._first, events)
        events.append(base.complete_event(self._first.finish_reason, self.usage))
        return events

    def response(self) -> Answer | None:
        if not self.begun:
            return None
        head = {k: v for k, v in self._head.items() if k not in ("choices", "usage", "object")}
        chat = self._call.endpoint == "chat"
        choices = [
            _chat_choice(index, fold) if chat else _completion_choice(index, fold)
            for index, fold in sorted(self._choices.items())
        ]
        value = _VALUES[self._call.endpoint]
        try:
            answer = value.model_validate({**head, "choices": choices})
        except ValidationError:  # an odd field beside what was said
            answer = value.model_validate({"choices": choices})
        answer.usage = self.usage  # type: ignore[attr-defined]  # both values have one
        return answer


def _only_text(choices: Any) -> str | None:
    """The text of a chunk that says nothing else: nearly all are like that, so they are met first."""
    if type(choices) is not list or len(choices) != 1 or type(choices[0]) is not dict:
        return None
    get = choices[0].get
    delta = get("delta")
    if type(delta) is not dict or len(delta) != 1 or get("index"):
        return None
    text = delta.get("content")
    bare = get("finish_reason") is None and get("logprobs") is None
    return text if bare and type(text) is str else None


def _chat_choice(index: int, fold: _ChoiceFold) -> dict[str, Any]:
    extra = dict(fold.extra)
    choice: dict[str, Any] = {"index": index, "finish_reason": fold.finish_reason}
    if "logprobs" in extra:
        choice["logprobs"] = extra.pop("logprobs")
    message: dict[str, Any] = {**extra, "content": fold.text.getvalue() or None}
    if reasoning := fold.reasoning.getvalue():
        message["reasoning_content"] = reasoning
    if fold.tools:
        message["tool_calls"] = [call.whole() for call in fold.tools.values()]
    elif message["content"] is None:
        message["content"] = ""
    return {**choice, "message": message}


def _completion_choice(index: int, fold: _ChoiceFold) -> dict[str, Any]:
    return {
        **fold.extra,
        "index": index,
        "text": fold.text.getvalue(),
        "finish_reason": fold.finish_reason,
    }


def _merge(into: dict[str, Any], name: str, value: Any) -> None:
    """Fold a field that we do not know: text and lists grow, objects merge, the rest is replaced."""
    old = into.get(name)
    if isinstance(old, str) and isinstance(value, str):
        into[name] = old + value
    elif isinstance(old, list) and isinstance(value, list):
        old.extend(value)
    elif isinstance(old, dict) and isinstance(value, dict):
        for key, inner in value.items():
            _merge(old, key, inner)
    else:
        into[name] = value
