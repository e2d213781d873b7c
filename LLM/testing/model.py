"""The stand-in model: a pure function from a conversation to a reply.

It is no language model and says so. It greets, remembers a name and the last result of the
conversation, does arithmetic (by a calculator tool when one is offered), repeats, counts, and fills
JSON schemas: enough to show and test every path of a client and of an agent offline. The same
conversation always gets the same reply.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from LLM.testing.arithmetic import Problem, last_number, problems, show

__all__ = [
    "Answer",
    "ToolCall",
    "Usage",
    "completion_tokens",
    "content_text",
    "minimal_instance",
    "prompt_tokens",
    "respond",
    "tokens",
]

Message = Mapping[str, Any]
Tool = Mapping[str, Any]

# Only the beginning of a message is searched for meaning: a prompt of megabytes costs no more.
_UNDERSTOOD_CHARACTERS = 4_000
_MAX_COUNT = 1_000


@dataclass(frozen=True)
class ToolCall:
    """A tool call of the model.

    `arguments` is JSON text; `id` is `None` until the server gives it one.
    """

    name: str
    arguments: str
    id: str | None = None


@dataclass(frozen=True)
class Usage:
    """Tokens of one exchange, in the convention of OpenAI.

    `prompt_tokens` contains `cached_tokens` and `cache_write_tokens`; `completion_tokens` contains
    `reasoning_tokens`.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    reasoning_tokens: int = 0


@dataclass(frozen=True)
class Answer:
    """What a model says: text, tool calls or both, and why it stopped (in the words of OpenAI)."""

    text: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    finish_reason: str = "stop"
    usage: Usage = Usage()
    reasoning: str | None = None
    stop_sequence: str | None = None


def respond(
    messages: Sequence[Message],
    tools: Sequence[Tool] | None = None,
    tool_choice: str | Mapping[str, Any] | None = None,
    *,
    response_format: Mapping[str, Any] | None = None,
    max_tokens: int | None = None,
    stop: Sequence[str] = (),
) -> Answer:
    """The stand-in's reply to a conversation.

    Args:
        messages: The conversation in OpenAI's form, oldest first.
        tools: Tools in OpenAI's form; `None` or empty offers none.
        tool_choice: `"auto"` (as `None`), `"none"`, `"required"`, or a named function.
        response_format: `{"type": "json_object"}` or `{"type": "json_schema", …}` asks for JSON.
        max_tokens: Most tokens of the reply, whose finish reason is then `"length"`; `None` sets
            no limit.
        stop: The reply ends before the first of these strings.

    Returns:
        The reply with its usage. Its tool calls have no id yet.
    """
    calls = _tool_calls(messages, tools or (), tool_choice)
    if calls:
        answer = Answer(tool_calls=calls, finish_reason="tool_calls")
    else:
        answer = _stopped(_formatted(_text(messages), response_format), stop)
    if max_tokens is not None:
        answer = _cut(answer, max_tokens)
    usage = Usage(prompt_tokens(messages, tools), completion_tokens(answer))
    return replace(answer, usage=usage)


_TOKEN = re.compile(r"\s*(?:\w{1,12}|[^\w\s])|\s+")


def tokens(text: str) -> list[str]:
    """Cut `text` in its tokens, which join to it again.

    A token is a word or a punctuation mark with the white space before it; a long word is one for
    each 12 letters. Usage is counted by it in both dialects, and streams say one at a time.
    """
    return _TOKEN.findall(text)


def completion_tokens(answer: Answer) -> int:
    """Tokens of what a model said: text, reasoning, names and arguments of tool calls."""
    calls = sum(_count(call.name, call.arguments) for call in answer.tool_calls)
    return _count(answer.text, answer.reasoning) + calls


def prompt_tokens(messages: Sequence[Message], tools: Sequence[Tool] | None = None) -> int:
    """Tokens of a prompt: texts, names and arguments of tool calls, and the tools as JSON."""
    functions = [call["function"] for message in messages for call in _calls_of(message)]
    return (
        _count(*(content_text(message.get("content")) for message in messages))
        + sum(_count(function["name"], function["arguments"]) for function in functions)
        + _count(json.dumps(tools) if tools else None)
    )


def _count(*texts: str | None) -> int:
    return sum(len(_TOKEN.findall(text)) for text in texts if text)


def _cut(answer: Answer, max_tokens: int) -> Answer:
    if completion_tokens(answer) <= max_tokens:
        return answer
    text = None if answer.text is None else "".join(tokens(answer.text)[:max_tokens])
    calls = tuple(_fitting(answer.tool_calls, max_tokens))
    return Answer(text=text, tool_calls=calls, finish_reason="length")


def _fitting(calls: Sequence[ToolCall], room: int) -> Iterator[ToolCall]:
    """The calls that fit, the last with its arguments cut short, as real models leave them."""
    for call in calls:
        room -= _count(call.name)
        if room <= 0:
            return
        arguments = tokens(call.arguments)
        yield replace(call, arguments="".join(arguments[:room]))
        room -= len(arguments)


def _stopped(text: str, stop: Sequence[str]) -> Answer:
    found = [(text.index(sequence), sequence) for sequence in stop if sequence and sequence in text]
    if not found:
        return Answer(text=text)
    position, sequence = min(found)
    return Answer(text=text[:position], stop_sequence=sequence)


def content_text(content: Any) -> str:
    """The text of a message's content: a string, parts (all but text is skipped), or `None`."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else ()
    texts = [part.get("text") for part in parts if isinstance(part, Mapping)]
    return "\n".join(text for text in texts if isinstance(text, str))


def _understood(message: Message) -> str:
    return content_text(message.get("content"))[:_UNDERSTOOD_CHARACTERS]


def _calls_of(message: Message) -> Sequence[Mapping[str, Any]]:
    return message.get("tool_calls") or ()


_NAME = r"([^\W\d_][\w'\u2019-]*(?: [A-Z][\w'\u2019-]*)*)"
_INTRODUCTION = re.compile(
    rf"\b(?i:my name is|my name's|call me) {_NAME}|\bI(?: am|'m) (?=[A-Z]){_NAME}"
)
_STATED_RESULT = re.compile(r"(?:=|\bis|\bequals) (-?\d[\d,]*(?:\.\d+)?)|^\s*(-?[\d,.]+)\s*$")


@dataclass
class _Memory:
    """What the conversation has told so far: a name, and the last result."""

    name: str | None = None
    result: Fraction | None = None

    def hear(self, message: Message) -> None:
        text = _understood(message)
        if message["role"] == "user":
            self.name = _introduced(text) or self.name
            for problem in problems(text, self.result):
                self.result = problem.value
        elif message["role"] == "tool":
            self._learn(_result_of_tool(text))
        elif message["role"] == "assistant" and (stated := _STATED_RESULT.findall(text)):
            self._learn(last_number("".join(stated[-1])))

    def _learn(self, result: Fraction | None) -> None:
        self.result = self.result if result is None else result


def _introduced(text: str) -> str | None:
    found = _INTRODUCTION.search(text)
    return found and (found[1] or found[2])


def _result_of_tool(text: str) -> Fraction | None:
    """The number a tool gave: of a JSON object its `result`, else the last one in the text."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    return last_number(
        str(value["result"]) if isinstance(value, dict) and "result" in value else text
    )


def _text(messages: Sequence[Message]) -> str:
    results = _tool_results(messages)
    if results:
        return " ".join(results)
    asked, memory = _question(messages)
    return " ".join(_sentences(asked, memory)) or _fallback(asked)


def _question(messages: Sequence[Message]) -> tuple[str, _Memory]:
    """The last user message, and what was known before it."""
    users = [index for index, message in enumerate(messages) if message["role"] == "user"]
    last = users[-1] if users else len(messages)
    memory = _Memory()
    for message in messages[:last]:
        memory.hear(message)
    return (_understood(messages[last]) if users else ""), memory


def _tool_results(messages: Sequence[Message]) -> list[str]:
    """A sentence for each tool result at the end of the conversation, in order."""
    first = len(messages)
    while first and messages[first - 1]["role"] == "tool":
        first -= 1
    functions = {
        call["id"]: call["function"] for message in messages[:first] for call in _calls_of(message)
    }
    return [
        _told(functions.get(message.get("tool_call_id")), content_text(message.get("content")))
        for message in messages[first:]
    ]


def _told(function: Mapping[str, Any] | None, result: str) -> str:
    value = _result_of_tool(result)
    if function and _is_calculator(function["name"]) and value is not None:
        return f"{_asked_of_calculator(function['arguments'])} = {show(value)}."
    return f"The tool {function['name'] if function else ''} answered: {result}"


def _asked_of_calculator(arguments: str) -> str:
    """The expression a calculator was given: the first string among its arguments."""
    try:
        values = json.loads(arguments).values()
    except (ValueError, AttributeError):
        values = ()
    return next((value for value in values if isinstance(value, str)), "The result")


def _sentences(asked: str, memory: _Memory) -> Iterator[str]:
    """Everything the stand-in has to say to a message: nothing, if it understands nothing."""
    repeated = _REPEAT.match(asked)
    if repeated:
        yield repeated[1].strip("\"'\u201c\u201d")
        return
    name = _introduced(asked)
    known = name or memory.name
    for pattern, reply in _SMALL_TALK:
        if pattern.search(asked):
            yield reply.format(name=f", {known}" if known else "")
    if _ASKS_NAME.search(asked):
        yield f"Your name is {known}." if known else "You have not told me your name yet."
    elif name and not _GREETING.search(asked):
        yield f"Nice to meet you, {name}. {_IDENTITY}"
    yield from map(_solved, problems(asked, memory.result))
    counted = _COUNT.search(asked)
    if counted:
        yield ", ".join(map(str, range(1, min(int(counted[1]), _MAX_COUNT) + 1))) + "."


def _solved(problem: Problem) -> str:
    if problem.value is not None:
        return f"{problem.expression} = {show(problem.value)}."
    if problem.solvable:
        return f"{problem.expression} has no value that I can work out."
    return "There is no earlier result in our conversation to go on with."


_IDENTITY = "I am a stand-in model: I follow fixed rules, so that programs can be tested offline."
_GREETING = re.compile(r"(?i)^\W*(?:hello|hi|hey|good (?:morning|afternoon|evening))\b")
_SMALL_TALK = [
    (_GREETING, f"Hello{{name}}! {_IDENTITY}"),
    (re.compile(r"(?i)\b(?:who|what) are you\b|\byour name\b|\bare you (?:an?|real)\b"), _IDENTITY),
    (re.compile(r"(?i)\bhow are you\b"), "I am well, thank you: nothing ever changes here."),
    (
        re.compile(r"(?i)\bwhat can you do\b|\bhelp\b"),
        "I can greet you, remember your name, do arithmetic, count, and repeat what you say.",
    ),
    (
        re.compile(r"(?i)\bjoke\b"),
        "Why did the deterministic model cross the road? For the same reason as last time.",
    ),
    (re.compile(r"(?i)\bthank(?:s| you)\b"), "You are welcome{name}."),
    (re.compile(r"(?i)\b(?:good)?bye\b|\bsee you\b"), "Goodbye{name}!"),
]
_ASKS_NAME = re.compile(r"(?i)\b(?:what|know|remember|recall)\b[^.!]{0,60}\bmy name\b|\bwho am i\b")
_COUNT = re.compile(r"(?i)\bcount (?:from 1 )?(?:up )?to (\d{1,9})\b")
_REPEAT = re.compile(
    r"(?is)^\W*(?:please )?(?:say|echo|repeat(?: after me)?|reply with(?: exactly)?)[: ]+(.+)$"
)


def _fallback(asked: str) -> str:
    said = f' You said: "{asked.strip()}"' if asked.strip() else ""
    return f"I am a stand-in model and have no answer to that.{said}"


def _is_calculator(name: str) -> bool:
    return "calc" in name.lower()


def _tool_calls(
    messages: Sequence[Message],
    tools: Sequence[Tool],
    tool_choice: str | Mapping[str, Any] | None,
) -> tuple[ToolCall, ...]:
    functions = {tool["function"]["name"]: tool["function"] for tool in tools}
    if not functions or tool_choice == "none":
        return ()
    forced = tool_choice == "required"
    if isinstance(tool_choice, Mapping):
        forced = True
        name = tool_choice["function"]["name"]
        functions = {name: functions[name]}
    elif not forced and messages[-1]["role"] == "tool":
        return ()
    calculator = next(filter(_is_calculator, functions), None)
    calls = _calculations(functions[calculator], *_question(messages)) if calculator else ()
    if calls or not forced:
        return calls
    return (_minimal_call(next(iter(functions.values()))),)


def _calculations(function: Mapping[str, Any], asked: str, memory: _Memory) -> tuple[ToolCall, ...]:
    """One call for each problem of the message; "that" is replaced by the result it means."""
    schema = function.get("parameters") or {}
    parameter = _expression_parameter(schema)
    return tuple(
        _call(function, {**_arguments(schema), parameter: problem.expression})
        for problem in problems(asked, memory.result)
        if problem.solvable
    )


def _expression_parameter(schema: Mapping[str, Any]) -> str:
    """The first required string, else the first string, else the first property."""
    properties = schema.get("properties") or {}
    strings = [name for name, value in properties.items() if value.get("type") == "string"]
    required = [name for name in strings if name in schema.get("required", ())]
    return str(next(iter([*required, *strings, *properties, "expression"])))


def _minimal_call(function: Mapping[str, Any]) -> ToolCall:
    return _call(function, _arguments(function.get("parameters") or {}))


def _arguments(schema: Mapping[str, Any]) -> dict[str, Any]:
    value = minimal_instance({"type": "object", **schema})
    return value if isinstance(value, dict) else {}


def _call(function: Mapping[str, Any], arguments: Mapping[str, Any]) -> ToolCall:
    return ToolCall(function["name"], json.dumps(arguments, ensure_ascii=False))


def _formatted(text: str, response_format: Mapping[str, Any] | None) -> str:
    kind = response_format.get("type") if response_format else None
    if response_format and kind == "json_schema":
        value = minimal_instance(response_format["json_schema"].get("schema") or {})
        return json.dumps(value, ensure_ascii=False)
    return json.dumps({"answer": text}, ensure_ascii=False) if kind == "json_object" else text


# A schema that needs more than this to be filled refers to itself without an end.
_MAX_SCHEMA_DEPTH = 16
# Lengths that a schema may demand: enough for tests, and never a gigabyte.
_MAX_SCHEMA_LENGTH = 1_000

_FORMATS = {
    "date": "2000-01-01",
    "date-time": "2000-01-01T00:00:00Z",
    "time": "00:00:00Z",
    "duration": "P1D",
    "email": "someone@example.com",
    "hostname": "example.com",
    "ipv4": "127.0.0.1",
    "ipv6": "::1",
    "uri": "https://example.com/",
    "uuid": "00000000-0000-4000-8000-000000000000",
}


def minimal_instance(schema: Any) -> Any:
    """The least value that a JSON schema accepts, always the same.

    Objects get their required properties only and arrays their least length; of alternatives the
    first is taken. `pattern`, `not` and conditional keywords are beyond it.
    """
    return _instance(schema, schema, 0)


def _instance(schema: Any, root: Any, depth: int) -> Any:
    if not isinstance(schema, Mapping) or depth > _MAX_SCHEMA_DEPTH:
        return None
    for keyword in ("const", "default"):
        if keyword in schema:
            return schema[keyword]
    if schema.get("enum"):
        return schema["enum"][0]
    if "$ref" in schema:
        return _instance(_referred(schema["$ref"], root), root, depth + 1)
    if schema.get("allOf"):
        return _instance(_merged(schema), root, depth + 1)
    for keyword in ("anyOf", "oneOf"):
        if schema.get(keyword):
            return _instance(_chosen(schema[keyword], depth), root, depth + 1)
    make = _MAKERS.get(_kind(schema))
    return make(schema, root, depth) if make else None


def _referred(reference: str, root: Any) -> Any:
    """What a reference within the schema (`#/$defs/…`) points to."""
    value = root
    for key in reference.lstrip("#/").split("/") if reference != "#" else ():
        value = value.get(key.replace("~1", "/").replace("~0", "~")) if value else None
    return value


def _merged(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    merged = {key: value for key, value in schema.items() if key != "allOf"}
    for part in schema["allOf"]:
        properties = {**merged.get("properties", {}), **part.get("properties", {})}
        required = [*merged.get("required", ()), *part.get("required", ())]
        merged = {**merged, **part, "properties": properties, "required": required}
    return merged


def _chosen(options: Sequence[Any], depth: int) -> Any:
    """The first alternative; `null` where there is one, once a schema nests suspiciously deep."""
    null = {"type": "null"}
    return null if depth > _MAX_SCHEMA_DEPTH // 2 and null in options else options[0]


def _kind(schema: Mapping[str, Any]) -> str:
    kind = schema.get("type") or ("array" if "items" in schema else "object")
    return str(kind if isinstance(kind, str) else kind[0])


def _object(schema: Mapping[str, Any], root: Any, depth: int) -> dict[str, Any]:
    properties = schema.get("properties") or {}
    required = schema.get("required", ())
    return {name: _instance(properties.get(name, {}), root, depth + 1) for name in required}


def _array(schema: Mapping[str, Any], root: Any, depth: int) -> list[Any]:
    first = list(schema.get("prefixItems", ()))
    length = min(schema.get("minItems", len(first)), _MAX_SCHEMA_LENGTH)
    items = [*first, *[schema.get("items", {})] * (length - len(first))]
    return [_instance(item, root, depth + 1) for item in items[:length]]


def _string(schema: Mapping[str, Any], root: Any, depth: int) -> str:  # noqa: ARG001 (a maker)
    if schema.get("format") in _FORMATS:
        return _FORMATS[schema["format"]]
    length = min(schema.get("minLength", 0), _MAX_SCHEMA_LENGTH)
    return "text".ljust(length, "t")[: schema.get("maxLength")]


def _integer(schema: Mapping[str, Any], root: Any, depth: int) -> Any:  # noqa: ARG001 (a maker)
    return _least(schema, 1)


def _real(schema: Mapping[str, Any], root: Any, depth: int) -> Any:  # noqa: ARG001 (a maker)
    return _least(schema, 0.5)


def _least(schema: Mapping[str, Any], above: float) -> Any:
    """Zero if it is allowed, else the nearest bound; `above` is the step off an open one."""
    lowest, highest = schema.get("minimum", 0), schema.get("maximum", 0)
    if "exclusiveMinimum" in schema:
        lowest = schema["exclusiveMinimum"] + above
    if "exclusiveMaximum" in schema:
        highest = schema["exclusiveMaximum"] - above
    value = lowest if lowest > 0 else min(0, highest)
    step = schema.get("multipleOf", 0)
    return -(-value // step) * step if step else value


_MAKERS: Mapping[str, Callable[[Mapping[str, Any], Any, int], Any]] = {
    "object": _object,
    "array": _array,
    "string": _string,
    "integer": _integer,
    "number": _real,
    "boolean": lambda _schema, _root, _depth: False,
}
