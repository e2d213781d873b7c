"""Messages and requests in the vendors' forms: OpenAI's, which is ours, and Anthropic's.

Sources: OpenAI's "Create chat completion" and Anthropic's "Create a Message", 2026-11.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from inspect import signature
from typing import Any, Final, Literal, NamedTuple

from agents.types import Message
from LLM import LLM, LLMConfig, LLMConfigError, LLMInvalidRequestError

Form = Literal["openai", "anthropic"]


class Asked(NamedTuple):
    """A request in a vendor's form, as `LLM.stream` takes it.

    Attributes:
        messages: in our form.
        model: `None`: left out.
        params: further arguments of the call.
        stream: whether the answer is wanted piece by piece.
        include_usage: whether the last piece shall tell the tokens.
    """

    messages: list[Message]
    model: str | None
    params: dict[str, Any]
    stream: bool = False
    include_usage: bool = False


# What the client and its calls are told by the program, and never by a body that came from outside: an
# address, a key, a timeout.
SETTINGS: Final = frozenset(
    {*signature(LLM).parameters, *LLMConfig.model_fields, "self"}
    | signature(LLM.stream).parameters.keys()
) - {"messages", "model", "temperature", "max_tokens", "tools", "stream", "kwargs", "settings"}

# Other fields are a server's own, and another one would refuse them.
_OPENAI_FIELDS: Final = ("role", "content", "name", "refusal", "tool_calls", "tool_call_id")


def _to_openai(system: str | None, history: Sequence[Message]) -> dict[str, Any]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    for message in history:
        said = message.model_dump(exclude_none=True)
        if isinstance(message.content, list):
            said["content"] = [_part(block) for block in message.content]
        messages.append({name: said[name] for name in _OPENAI_FIELDS if name in said})
    return {"messages": messages}


def _to_anthropic(system: str | None, history: Sequence[Message]) -> dict[str, Any]:
    systems = [] if system is None else [system]
    turns: list[dict[str, Any]] = []
    for message in history:
        if message.role in ("system", "developer"):
            systems.append(message.text)
        elif message.role == "tool":
            result: dict[str, Any] = {"type": "tool_result", "tool_use_id": message.tool_call_id}
            if message.content:
                result["content"] = _blocks(message.content)
            last = turns[-1] if turns else None
            if last and _kind(last["content"]) == "tool_result":
                last["content"].append(result)  # those of one answer stand in one message
            else:
                turns.append({"role": "user", "content": [result]})
        elif message.role == "assistant":
            turns.append({"role": "assistant", "content": answer_blocks(message)})
        else:
            turns.append({"role": message.role, "content": _blocks(message.content or "")})
    data: dict[str, Any] = {"messages": turns}
    return {"system": "\n\n".join(systems), **data} if systems else data


_WRITERS: Final = {"openai": _to_openai, "anthropic": _to_anthropic}


def _check_form(form: str) -> None:
    if form not in _WRITERS:
        raise LLMConfigError(f"form is {form!r}; it must be one of {', '.join(_WRITERS)}")


def write_messages(form: Form, system: str | None, history: Sequence[Message]) -> dict[str, Any]:
    """A conversation as a value for JSON, in the form that the vendor's API takes.

    Args:
        system: the system message; `None`: none.

    Raises:
        LLMConfigError: the form is unknown.
    """
    _check_form(form)
    return _WRITERS[form](system, history)


def refused(message: str, param: str | None = None) -> LLMInvalidRequestError:
    """The error for a request that cannot be taken; `param` is the field at fault."""
    return LLMInvalidRequestError(message, status_code=400, param=param)


def read_fields(body: Any) -> dict[str, Any]:
    """The fields of a request's body, none of which is a setting of the client.

    Raises:
        LLMInvalidRequestError: it is no object, or holds such a setting.
    """
    if not isinstance(body, Mapping):
        raise refused(f"the body must be a JSON object, and is {type(body).__name__}")
    settings = SETTINGS & body.keys()
    if settings:
        name = min(settings)
        raise refused(f"{name} cannot be set by a request: leave it out", name)
    return dict(body)


def objects(value: Any, name: str) -> list[Mapping[str, Any]]:
    """The value, which must be a list of objects; `None` is an empty one."""
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise refused(f"{name} must be a list of objects", name)
    return value


_KINDS: Final = {str: "a text", bool: "true or false", int: "a whole number", dict: "an object"}


def checked(value: Any, kind: type, name: str) -> Any:
    """The value, which must be of this type, or `None`."""
    if value is not None and type(value) is not kind:
        raise refused(f"{name} must be {_KINDS[kind]}, and is {type(value).__name__}", name)
    return value


def _kind(content: Any) -> Any:
    """The type of the last block."""
    return content[-1].get("type") if isinstance(content, list) and content else None


def _blocks(content: str | list[Any]) -> Any:
    return content if isinstance(content, str) else [_block(part) for part in content]


def _block(part: Any) -> Any:
    if not isinstance(part, Mapping) or part.get("type") != "image_url":
        return part
    image = part.get("image_url")
    url = str(image.get("url", "") if isinstance(image, Mapping) else image)
    if not url.startswith("data:"):
        return {"type": "image", "source": {"type": "url", "url": url}}
    head, _, data = url.removeprefix("data:").partition(",")
    source = {"type": "base64", "media_type": head.split(";")[0], "data": data}
    return {"type": "image", "source": source}


def _part(block: Any) -> Any:
    source = block.get("source") if isinstance(block, Mapping) else None
    if not isinstance(source, Mapping) or block.get("type") != "image":
        return block
    if source.get("type") == "base64" or "data" in source:
        url = f"data:{source.get('media_type')};base64,{source.get('data')}"
    elif "url" in source:
        url = str(source["url"])
    else:
        return block  # a file of that vendor, which no other knows
    return {"type": "image_url", "image_url": {"url": url}}


def answer_blocks(message: Message) -> Any:
    """The content of an answer in Anthropic's form: blocks, or a text."""
    # Its own blocks, as they came: thinking must go back unchanged with its signature.
    native = (message.model_extra or {}).get("content_blocks")
    if native:
        return native
    if not message.tool_calls:
        return _blocks(message.content or "")
    text, blocks = message.content, []
    if isinstance(text, str) and text:
        blocks.append({"type": "text", "text": text})
    elif isinstance(text, list):
        blocks.extend(_block(part) for part in text)
    for call in message.tool_calls:
        used = {"id": call.id, "name": call.name, "input": arguments(call.arguments)}
        blocks.append({"type": "tool_use", **used})
    return blocks


def arguments(text: str) -> Any:
    """An object, as the form demands; what is none is kept under a name, and found again by it."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {"invalid_json": text}
    return value if isinstance(value, dict) else {"value": value}


def read_messages(data: Any, form: Form | None = None) -> tuple[str | None, list[Message]]:
    """The system message, and the messages, of a conversation in a vendor's form.

    Args:
        data: `{"messages": […]}`, with `"system"` or without, or the list of messages alone.
        form: `None`: found out from the data.

    Raises:
        LLMConfigError: it is none; says which message and why.
    """
    if form is not None:
        _check_form(form)
    body = data if isinstance(data, Mapping) else {"messages": data}
    given = body.get("messages")
    if not isinstance(given, (list, tuple)) or not all(isinstance(m, Mapping) for m in given):
        raise LLMConfigError('data is no conversation; give {"messages": [{"role": …}, …]}')
    if form is None:
        form = "anthropic" if "system" in body or any(map(_is_native, given)) else "openai"
    if form == "anthropic":
        given = [message for turn in given for message in from_anthropic(turn)]
    messages = [as_message(message, number) for number, message in enumerate(given)]
    if "system" in body:
        return _text(body["system"]), messages
    if messages and messages[0].role in ("system", "developer"):
        return messages[0].text, messages[1:]
    return None, messages


def _is_native(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    native = ("image", "document", "thinking", "redacted_thinking", "tool_use", "tool_result")
    return isinstance(content, list) and any(
        isinstance(block, Mapping) and block.get("type") in native for block in content
    )


def _text(content: Any) -> str:
    return Message(role="user", content=content).text


def from_anthropic(turn: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """One message of Anthropic's form as messages in ours: each tool's result is one of its own."""
    role, content = turn.get("role"), turn.get("content")
    if not isinstance(content, list) or not all(isinstance(b, Mapping) for b in content):
        yield {"role": role, "content": content}
        return
    if role == "assistant":
        yield _answer(content)
        return
    rest = []
    for block in content:
        if block.get("type") == "tool_result":
            said = block.get("content", "")
            if isinstance(said, list):
                said = [_part(part) for part in said]
            yield {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": said}
        else:
            rest.append(_part(block))
    if rest:
        yield {"role": role, "content": rest}


def _answer(blocks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    text = "".join(block.get("text", "") for block in blocks if block.get("type") == "text")
    message: dict[str, Any] = {"role": "assistant", "content": text or None}
    calls = [
        {
            "id": block.get("id"),
            "type": "function",
            "function": {
                "name": block.get("name"),
                "arguments": arguments_text(block.get("input")),
            },
        }
        for block in blocks
        if block.get("type") == "tool_use"
    ]
    if calls:
        message["tool_calls"] = calls
    kinds = [block.get("type") for block in blocks]
    if set(kinds) - {"text", "tool_use"} or kinds.count("text") > 1:
        message["content_blocks"] = [dict(block) for block in blocks]
    return message


def arguments_text(value: Any) -> str:
    if isinstance(value, Mapping) and value.keys() == {"invalid_json"}:
        return str(value["invalid_json"])
    return json.dumps(value or {}, ensure_ascii=False)


def as_message(value: Any, number: int) -> Message:
    """A message out of a value; `number` is for the error's text.

    Raises:
        LLMConfigError: it is none.
    """
    problem = ""
    if isinstance(value, Message):
        return value
    try:
        return Message.model_validate(value)
    except ValueError as error:
        problem = str(error).splitlines()[1].strip()
    raise LLMConfigError(f"messages[{number}] is not a message: look at {problem!r}")
