"""The wire formats the local server speaks: JSON of a request → `Ask`, `Answer` → JSON or events.

Pure functions of plain values; the shapes are those of the vendors' API references (2026-11).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from LLM.testing.model import Answer, ToolCall, Usage, content_text, tokens

__all__ = ["CHAT", "COMPLETIONS", "MESSAGES", "Ask", "Dialect", "RefusedError", "encoded"]

Json = dict[str, Any]
Messages = Sequence[Mapping[str, Any]]

# A fixed point in time: the same requests in the same order get the same bytes.
_FIRST_CREATED = 1_700_000_000
_FIRST_CREATED_TEXT = "2023-11-14T22:13:20Z"


class RefusedError(Exception):
    """A request that is answered with an error: the status, and what the body says.

    Args:
        message: For people.
        status: HTTP status.
        param: The parameter at fault, where the dialect names it.
        code: The vendor's word for the fault; `None` takes the one that goes with the status.
    """

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param
        self.code = code


@dataclass(frozen=True)
class Ask:
    """What a request asks, in any dialect; there is one conversation for each prompt."""

    model: str
    conversations: Sequence[Messages]
    n: int = 1
    tools: Messages | None = None
    tool_choice: str | Mapping[str, Any] | None = None
    response_format: Mapping[str, Any] | None = None
    max_tokens: int | None = None
    stop: Sequence[str] = ()
    stream: bool = False
    include_usage: bool = False


class Dialect(Protocol):
    """One wire format; `serial` is the number of the request, of which ids and times are made."""

    request_id_header: str

    def request_id(self, serial: int) -> str:
        """The value of the request id's header."""

    def read(self, body: Json) -> Ask:
        """What the request asks; raises `RefusedError` where the vendor would refuse it."""

    def whole(self, ask: Ask, answers: Sequence[Answer], serial: int) -> Json:
        """The body of a response at once."""

    def events(self, ask: Ask, answers: Sequence[Answer], serial: int) -> Iterator[bytes]:
        """The server-sent events of a streamed response."""

    def models(self, names: Sequence[str]) -> Json:
        """The body of the list of models."""

    def error(self, error: RefusedError, serial: int) -> Json:
        """The body of an error."""


def encoded(value: Any) -> bytes:
    """Compact JSON in UTF-8, as vendors send it; half a surrogate pair becomes a question mark."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")


def _data(value: Any) -> bytes:
    return b"data: %b\n\n" % encoded(value)


def _total(ask: Ask, answers: Sequence[Answer]) -> Usage:
    """Usage of all choices: a prompt is read once, however many choices it gets."""
    prompts = [answer.usage for answer in answers[:: ask.n]]
    said = [answer.usage for answer in answers]
    return Usage(
        sum(usage.prompt_tokens for usage in prompts),
        sum(usage.completion_tokens for usage in said),
        sum(usage.cached_tokens for usage in prompts),
        sum(usage.cache_write_tokens for usage in prompts),
        sum(usage.reasoning_tokens for usage in said),
    )


class _OpenAI:
    """What the endpoints of OpenAI's dialect share."""

    request_id_header = "x-request-id"

    def request_id(self, serial: int) -> str:
        return f"req_{serial:032x}"

    def models(self, names: Sequence[str]) -> Json:
        model = {"object": "model", "created": _FIRST_CREATED, "owned_by": "stand-in"}
        return {"object": "list", "data": [{"id": name, **model} for name in names]}

    def error(self, error: RefusedError, serial: int) -> Json:  # noqa: ARG002 (not in the body here)
        kind, code = _OPENAI_ERRORS.get(error.status, (None, None))
        if kind is None:
            kind = "server_error" if error.status >= 500 else "invalid_request_error"
        body = {
            "message": error.message,
            "type": kind,
            "param": error.param,
            "code": error.code or code,
        }
        return {"error": body}


_OPENAI_ERRORS = {
    401: ("invalid_request_error", "invalid_api_key"),
    404: ("invalid_request_error", None),
    405: ("invalid_request_error", "method_not_supported"),
    429: ("requests", "rate_limit_exceeded"),
}


class _Chat(_OpenAI):
    """`POST /v1/chat/completions`."""

    def read(self, body: Json) -> Ask:
        messages = _checked_messages(body)
        _check_pairs(messages, _OPENAI_ORPHAN, _OPENAI_UNANSWERED)
        tools = body.get("tools")
        response_format = body.get("response_format")
        return Ask(
            model=_model(body),
            conversations=[messages],
            n=_count(body, "n") or 1,
            tools=_checked_tools(tools),
            tool_choice=_checked_choice(body.get("tool_choice"), tools),
            response_format=_checked_format(response_format),
            max_tokens=_count(body, "max_completion_tokens") or _count(body, "max_tokens"),
            stop=_stop(body),
            **_streaming(body),
        )

    def whole(self, ask: Ask, answers: Sequence[Answer], serial: int) -> Json:
        choices = [
            {
                "index": index,
                "message": self._message(answer, f"call_{serial:018x}{index:03x}"),
                "logprobs": None,
                "finish_reason": answer.finish_reason,
            }
            for index, answer in enumerate(answers)
        ]
        envelope = self._envelope("chat.completion", ask, serial)
        return {**envelope, "choices": choices, "usage": _openai_usage(ask, answers)}

    def _message(self, answer: Answer, call_id: str) -> Json:
        message: Json = {"role": "assistant", "content": answer.text, "refusal": None}
        if answer.reasoning is not None:
            message["reasoning_content"] = answer.reasoning
        if answer.tool_calls:
            message["tool_calls"] = [
                _openai_call(call, id_, call.arguments)
                for id_, call in _identified(answer.tool_calls, call_id)
            ]
        return message

    def events(self, ask: Ask, answers: Sequence[Answer], serial: int) -> Iterator[bytes]:
        envelope = self._envelope("chat.completion.chunk", ask, serial)
        # When usage is asked for, every chunk but the last says that it has none.
        no_usage = {"usage": None} if ask.include_usage else {}
        for index, answer in enumerate(answers):
            choice = {"index": index, "logprobs": None, "finish_reason": None}
            for delta in self._deltas(answer, f"call_{serial:018x}{index:03x}"):
                yield _data({**envelope, "choices": [{**choice, "delta": delta}], **no_usage})
            last: Json = {**choice, "delta": {}, "finish_reason": answer.finish_reason}
            yield _data({**envelope, "choices": [last], **no_usage})
        if ask.include_usage:
            yield _data({**envelope, "choices": [], "usage": _openai_usage(ask, answers)})
        yield b"data: [DONE]\n\n"

    def _deltas(self, answer: Answer, call_id: str) -> Iterator[Json]:
        yield {
            "role": "assistant",
            "content": None if answer.text is None else "",
            "refusal": None,
        }
        for piece in tokens(answer.reasoning or ""):
            yield {"reasoning_content": piece}
        for piece in tokens(answer.text or ""):
            yield {"content": piece}
        for index, (id_, call) in enumerate(_identified(answer.tool_calls, call_id)):
            yield {"tool_calls": [{"index": index, **_openai_call(call, id_, "")}]}
            for piece in tokens(call.arguments):
                yield {"tool_calls": [{"index": index, "function": {"arguments": piece}}]}

    def _envelope(self, kind: str, ask: Ask, serial: int) -> Json:
        return {
            "id": f"chatcmpl-{serial:029x}",
            "object": kind,
            "created": _FIRST_CREATED + serial,
            "model": ask.model,
            "service_tier": "default",
            "system_fingerprint": "fp_standin",
        }


class _Completions(_OpenAI):
    """`POST /v1/completions`: text goes on from text, without roles."""

    def read(self, body: Json) -> Ask:
        return Ask(
            model=_model(body),
            conversations=[[{"role": "user", "content": text}] for text in _prompts(body)],
            n=_count(body, "n") or 1,
            max_tokens=_count(body, "max_tokens"),
            stop=_stop(body),
            **_streaming(body),
        )

    def whole(self, ask: Ask, answers: Sequence[Answer], serial: int) -> Json:
        choices = [
            self._choice(index, answer.text or "", answer.finish_reason)
            for index, answer in enumerate(answers)
        ]
        envelope = self._envelope(ask, serial)
        return {**envelope, "choices": choices, "usage": _openai_usage(ask, answers)}

    def events(self, ask: Ask, answers: Sequence[Answer], serial: int) -> Iterator[bytes]:
        envelope = self._envelope(ask, serial)
        no_usage = {"usage": None} if ask.include_usage else {}
        for index, answer in enumerate(answers):
            for piece in tokens(answer.text or ""):
                yield _data({**envelope, "choices": [self._choice(index, piece)], **no_usage})
            last = self._choice(index, "", answer.finish_reason)
            yield _data({**envelope, "choices": [last], **no_usage})
        if ask.include_usage:
            yield _data({**envelope, "choices": [], "usage": _openai_usage(ask, answers)})
        yield b"data: [DONE]\n\n"

    def _choice(self, index: int, text: str, finish_reason: str | None = None) -> Json:
        return {"text": text, "index": index, "logprobs": None, "finish_reason": finish_reason}

    def _envelope(self, ask: Ask, serial: int) -> Json:
        return {
            "id": f"cmpl-{serial:029x}",
            "object": "text_completion",
            "created": _FIRST_CREATED + serial,
            "model": ask.model,
            "system_fingerprint": "fp_standin",
        }


class _Messages:
    """`POST /v1/messages` of Anthropic's dialect."""

    request_id_header = "request-id"

    def request_id(self, serial: int) -> str:
        return f"req_01{serial:022x}"

    def read(self, body: Json) -> Ask:
        for field in ("model", "messages", "max_tokens"):
            if field not in body:
                raise RefusedError(f"{field}: Field required")
        messages = _openai_messages(body)
        _check_pairs(messages, _ANTHROPIC_ORPHAN, _ANTHROPIC_UNANSWERED)
        tools = [_openai_tool(tool) for tool in _objects(body.get("tools") or [], "tools")]
        return Ask(
            model=_model(body),
            conversations=[messages],
            tools=_checked_tools(tools),
            tool_choice=_checked_choice(_openai_choice(body.get("tool_choice")), tools),
            response_format=_output_format(body),
            max_tokens=_count(body, "max_tokens"),
            stop=_strings(body.get("stop_sequences"), "stop_sequences"),
            stream=body.get("stream") is True,
        )

    def whole(self, ask: Ask, answers: Sequence[Answer], serial: int) -> Json:
        (answer,) = answers
        content = [{**start, **end} for start, _, end in self._blocks(answer, serial)]
        return {
            **self._envelope(ask, serial),
            "content": content,
            **self._stopped(answer),
            "usage": _anthropic_usage(answer.usage),
        }

    def events(self, ask: Ask, answers: Sequence[Answer], serial: int) -> Iterator[bytes]:
        (answer,) = answers
        usage = _anthropic_usage(answer.usage)
        message = {
            **self._envelope(ask, serial),
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            # The first token has been made when the stream opens.
            "usage": {**usage, "output_tokens": min(1, answer.usage.completion_tokens)},
        }
        yield _event("message_start", message=message)
        for index, (start, deltas, _) in enumerate(self._blocks(answer, serial)):
            yield _event("content_block_start", index=index, content_block=start)
            if index == 0:
                yield _event("ping")
            for delta in deltas:
                yield _event("content_block_delta", index=index, delta=delta)
            yield _event("content_block_stop", index=index)
        yield _event("message_delta", delta=self._stopped(answer), usage=usage)
        yield _event("message_stop")

    def _blocks(self, answer: Answer, serial: int) -> Iterator[tuple[Json, list[Json], Json]]:
        """Each content block: as it starts, its deltas, and the fields it ends with."""
        if answer.reasoning is not None:
            thoughts = _pieces("thinking_delta", "thinking", answer.reasoning)
            signed: Json = {"signature": f"standin{serial:x}"}
            deltas = [*thoughts, {"type": "signature_delta", **signed}]
            start: Json = {"type": "thinking", "thinking": "", "signature": ""}
            yield start, deltas, {"thinking": answer.reasoning, **signed}
        if answer.text:
            deltas = _pieces("text_delta", "text", answer.text)
            yield {"type": "text", "text": ""}, deltas, {"text": answer.text}
        for id_, call in _identified(answer.tool_calls, f"toolu_01{serial:017x}"):
            first = {"type": "input_json_delta", "partial_json": ""}
            deltas = [first, *_pieces("input_json_delta", "partial_json", call.arguments)]
            start = {"type": "tool_use", "id": id_, "name": call.name, "input": {}}
            yield start, deltas, {"input": _parsed_arguments(call.arguments)}

    def models(self, names: Sequence[str]) -> Json:
        data = [
            {"type": "model", "id": name, "display_name": name, "created_at": _FIRST_CREATED_TEXT}
            for name in names
        ]
        first, last = (names[0], names[-1]) if names else (None, None)
        return {"data": data, "has_more": False, "first_id": first, "last_id": last}

    def error(self, error: RefusedError, serial: int) -> Json:
        kind = _ANTHROPIC_ERRORS.get(error.status)
        if kind is None:
            kind = "api_error" if error.status >= 500 else "invalid_request_error"
        return {
            "type": "error",
            "error": {"type": kind, "message": error.message},
            "request_id": self.request_id(serial),
        }

    def _envelope(self, ask: Ask, serial: int) -> Json:
        kind = {"type": "message", "role": "assistant"}
        return {"id": f"msg_01{serial:022x}", **kind, "model": ask.model}

    def _stopped(self, answer: Answer) -> Json:
        reason = _STOP_REASONS.get(answer.finish_reason, answer.finish_reason)
        if answer.stop_sequence is not None:
            reason = "stop_sequence"
        return {"stop_reason": reason, "stop_sequence": answer.stop_sequence}


_ANTHROPIC_ERRORS = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}
_STOP_REASONS = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "content_filter": "refusal",
}

CHAT: Dialect = _Chat()
COMPLETIONS: Dialect = _Completions()
MESSAGES: Dialect = _Messages()


def _event(kind: str, **fields: Any) -> bytes:
    return b"event: %b\n%b" % (kind.encode(), _data({"type": kind, **fields}))


def _pieces(kind: str, field: str, text: str) -> list[Json]:
    return [{"type": kind, field: piece} for piece in tokens(text)]


def _identified(calls: Sequence[ToolCall], prefix: str) -> Iterator[tuple[str, ToolCall]]:
    for index, call in enumerate(calls):
        yield call.id or f"{prefix}{index:03x}", call


def _openai_call(call: ToolCall, id_: str, arguments: str) -> Json:
    function = {"name": call.name, "arguments": arguments}
    return {"id": id_, "type": "function", "function": function}


def _parsed_arguments(arguments: str) -> Any:
    """The input of a tool call as JSON; arguments that were cut short are an empty object."""
    try:
        return json.loads(arguments)
    except ValueError:
        return {}


def _openai_usage(ask: Ask, answers: Sequence[Answer]) -> Json:
    usage = _total(ask, answers)
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": usage.reasoning_tokens,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def _anthropic_usage(usage: Usage) -> Json:
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens - usage.cache_write_tokens,
        "cache_creation_input_tokens": usage.cache_write_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }


def _refused(message: str, param: str, code: str = "invalid_value") -> RefusedError:
    return RefusedError(message, param=param, code=code)


def _missing(param: str) -> RefusedError:
    return _refused(f"Missing required parameter: '{param}'.", param, "missing_required_parameter")


def _mistyped(param: str, expected: str) -> RefusedError:
    return _refused(f"Invalid type for '{param}': expected {expected}.", param, "invalid_type")


def _model(body: Json) -> str:
    if not isinstance(body.get("model"), str):
        raise RefusedError("you must provide a model parameter")
    return str(body["model"])


def _count(body: Json, field: str) -> int | None:
    value = body.get(field)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        raise _mistyped(field, "an integer")
    if value < 1:
        message = f"Invalid '{field}': integer below minimum value. Expected a value >= 1"
        raise _refused(f"{message}, but got {value} instead.", field, "integer_below_min_value")
    return value


def _stop(body: Json) -> Sequence[str]:
    stop = body.get("stop")
    return [stop] if isinstance(stop, str) else _strings(stop, "stop")


def _strings(value: Any, param: str) -> Sequence[str]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise _mistyped(param, "an array of strings")
    return value


def _objects(value: Any, param: str) -> list[Json]:
    if not isinstance(value, list):
        raise _mistyped(param, "an array of objects")
    for index, item in enumerate(value):
        if not isinstance(item, dict):
            raise _mistyped(f"{param}[{index}]", "an object")
    return value


def _streaming(body: Json) -> dict[str, Any]:
    stream = body.get("stream") is True
    options = body.get("stream_options")
    if options is None:
        return {"stream": stream}
    if not isinstance(options, dict):
        raise _mistyped("stream_options", "an object")
    if not stream:
        message = "The 'stream_options' parameter is only allowed when 'stream' is enabled."
        raise RefusedError(message, param="stream_options")
    return {"stream": stream, "include_usage": options.get("include_usage") is True}


def _prompts(body: Json) -> list[str]:
    """Each prompt as text; one given as tokens is told by its numbers."""
    prompt = body.get("prompt")
    if prompt is None or prompt == []:
        raise _missing("prompt")
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list):
        raise _mistyped("prompt", "a string or an array")
    if all(isinstance(item, int) for item in prompt):
        return [" ".join(map(str, prompt))]
    return [item if isinstance(item, str) else " ".join(map(str, item)) for item in prompt]


_ROLES = ("system", "assistant", "user", "function", "tool", "developer")


def _checked_messages(body: Json) -> list[Json]:
    if body.get("messages") is None:
        raise _missing("messages")
    messages = _objects(body["messages"], "messages")
    if not messages:
        told = "Invalid 'messages': empty array. Expected an array with minimum length 1"
        raise _refused(f"{told}, but got an empty array instead.", "messages", "empty_array")
    for index, message in enumerate(messages):
        _check_message(message, f"messages[{index}]")
    return messages


def _check_message(message: Json, where: str) -> None:
    if "role" not in message:
        raise _missing(f"{where}.role")
    if message["role"] not in _ROLES:
        known = ", ".join(f"'{role}'" for role in _ROLES)
        told = f"Invalid value: {message['role']!r}. Supported values are: {known}."
        raise _refused(told, f"{where}.role")
    if not isinstance(message.get("content"), str | list | None):
        raise _mistyped(f"{where}.content", "a string or an array")
    for index, call in enumerate(_objects(message.get("tool_calls") or [], f"{where}.tool_calls")):
        function = call.get("function")
        function = function if isinstance(function, dict) else {}
        for field, value in [("id", call.get("id")), *_fields(function, "name", "arguments")]:
            if not isinstance(value, str):
                raise _missing(f"{where}.tool_calls[{index}].{field}")


def _fields(function: Json, *names: str) -> list[tuple[str, Any]]:
    return [(f"function.{name}", function.get(name)) for name in names]


_OPENAI_ORPHAN = (
    "Invalid parameter: messages with role 'tool' must be a response to a preceeding message with"
    " 'tool_calls'."
)
_OPENAI_UNANSWERED = (
    "An assistant message with 'tool_calls' must be followed by tool messages responding to each"
    " 'tool_call_id'. The following tool_call_ids did not have response messages: {ids}"
)
_ANTHROPIC_ORPHAN = (
    "messages: unexpected `tool_use_id` found in `tool_result` blocks: {ids}. Each `tool_result`"
    " block must have a corresponding `tool_use` block in the previous message."
)
_ANTHROPIC_UNANSWERED = (
    "messages: `tool_use` ids were found without `tool_result` blocks immediately after: {ids}."
)


def _check_pairs(messages: Messages, orphan: str, unanswered: str) -> None:
    """Vendors take a tool result only after its call, and nothing else before all have come."""
    waiting: list[str] = []
    for index, message in enumerate([*messages, {"role": "end"}]):
        where = f"messages[{index}].role"
        if message["role"] == "tool":
            id_ = message.get("tool_call_id")
            if id_ not in waiting:
                raise _refused(orphan.format(ids=id_), where)
            waiting.remove(id_)
        elif waiting:
            raise _refused(unanswered.format(ids=", ".join(waiting)), where)
        else:
            waiting = []
            for number, call in enumerate(message.get("tool_calls") or ()):
                if not isinstance(call.get("id"), str):
                    raise _missing(f"messages[{index}].tool_calls[{number}].id")
                waiting.append(call["id"])


def _checked_tools(tools: Any) -> Messages | None:
    for index, tool in enumerate(_objects(tools or [], "tools")):
        function = tool.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _missing(f"tools[{index}].function.name")
        if not isinstance(function.get("parameters"), dict | None):
            raise _mistyped(f"tools[{index}].function.parameters", "an object")
    return tools or None


def _checked_choice(choice: Any, tools: Any) -> Any:
    """A tool choice that can be kept: a word of OpenAI, or a tool that is offered."""
    if choice in (None, "none", "auto"):
        return choice
    if not tools:
        message = "'tool_choice' is only allowed when 'tools' are specified."
        raise RefusedError(message, param="tool_choice")
    function = choice.get("function") if isinstance(choice, dict) else None
    if isinstance(function, dict):
        if function.get("name") in [tool["function"]["name"] for tool in tools]:
            return choice
        message = f"Tool choice '{function.get('name')}' not found in 'tools' parameter."
        raise RefusedError(message, param="tool_choice")
    if choice != "required":
        raise _refused(f"Invalid value: {choice!r} for 'tool_choice'.", "tool_choice")
    return choice


def _checked_format(response_format: Any) -> Json | None:
    if response_format is None:
        return None
    if not isinstance(response_format, dict):
        raise _mistyped("response_format", "an object")
    schema = response_format.get("json_schema")
    if response_format.get("type") == "json_schema" and not isinstance(schema, dict):
        raise _missing("response_format.json_schema")
    return response_format


def _openai_messages(body: Json) -> list[Json]:
    """Anthropic's messages in OpenAI's form: system and tool results are messages."""
    messages = _objects(body["messages"], "messages")
    if not messages:
        raise RefusedError("messages: at least one message is required")
    system = content_text(body.get("system"))
    converted = [{"role": "system", "content": system}] if system else []
    for index, message in enumerate(messages):
        role = message.get("role")
        if role not in {"user", "assistant"}:
            told = "Input should be 'user' or 'assistant'"
            raise RefusedError(f"messages.{index}.role: {told}")
        content = message.get("content")
        if isinstance(content, str):
            converted.append({"role": role, "content": content})
        else:
            blocks = _objects(content, f"messages.{index}.content")
            converted += _said_by_user(blocks) if role == "user" else [_said_by_model(blocks)]
    return converted


def _said_by_user(blocks: Sequence[Json]) -> list[Json]:
    results = [
        {
            "role": "tool",
            "tool_call_id": block.get("tool_use_id"),
            "content": content_text(block.get("content")),
        }
        for block in blocks
        if block.get("type") == "tool_result"
    ]
    rest = [block for block in blocks if block.get("type") != "tool_result"]
    return [*results, {"role": "user", "content": rest}] if rest else results


def _said_by_model(blocks: Sequence[Json]) -> Json:
    calls = [
        {
            "id": block.get("id"),
            "type": "function",
            "function": {
                "name": str(block.get("name")),
                "arguments": json.dumps(block.get("input"), ensure_ascii=False),
            },
        }
        for block in blocks
        if block.get("type") == "tool_use"
    ]
    text = content_text([block for block in blocks if block.get("type") == "text"])
    return {"role": "assistant", "content": text, "tool_calls": calls}


def _openai_tool(tool: Json) -> Json:
    function = {"name": tool.get("name"), "parameters": tool.get("input_schema")}
    return {"type": "function", "function": function}


def _openai_choice(choice: Any) -> Any:
    kind = choice.get("type") if isinstance(choice, dict) else choice
    if kind == "tool":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return "required" if kind == "any" else kind


def _output_format(body: Json) -> Json | None:
    """Anthropic's structured output in OpenAI's form."""
    config = body.get("output_config")
    wanted = config.get("format") if isinstance(config, dict) else body.get("output_format")
    if not isinstance(wanted, dict) or wanted.get("type") != "json_schema":
        return None
    return {"type": "json_schema", "json_schema": {"schema": wanted.get("schema")}}
