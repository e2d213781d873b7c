"""Structured output: an output type → a JSON schema, a text → an instance, and why it failed.

Which keywords the schema modes take: OpenAI, "Structured outputs: supported schemas", and Anthropic,
"Structured outputs: JSON Schema limitations", both as of 2026-11.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Generic, Literal, Protocol, TypeVar, cast, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.errors import PydanticUserError
from pydantic_core import from_json

from LLM.errors import LLMConfigError, LLMContextLengthError, LLMError, LLMOutputError
from LLM.errors import LLMInvalidRequestError as InvalidRequest
from LLM.types import ChatCompletionResponse, Message, TokenUsage

T = TypeVar("T")

OutputMode = Literal["auto", "schema", "tool", "prompt"]
_MODES = get_args(OutputMode)
_LADDER = ("schema", "tool", "prompt")  # from the surest to the one that every server takes

# The formats that both vendors take; another one is told in words.
_FORMATS = frozenset("date-time time date duration email hostname ipv4 ipv6 uuid".split())
# Constraints that OpenAI takes; Anthropic refuses them, and says how to tell the model: in words.
_BOUNDS = "minimum maximum exclusiveMinimum exclusiveMaximum multipleOf minItems maxItems".split()
# What is told in words everywhere, and checked by the type itself.
_TOLD = "minLength maxLength pattern uniqueItems format default".split()

# How a server says that it does not take what a mode sends. (Patterns are compiled when first used: a
# script that only chats does not pay for them.)
_REFUSALS = {
    "schema": r"(?i)response_format|json_schema|output_config|output_format|structured.?output",
    "tool": r"(?i)tool|function",
}
_OF_ONE_SCHEMA = r"(?i)invalid schema|\.schema\b|schema is too"
_FENCE = r"(?is)```[ \t]*(?:json)?[ \t]*\r?\n(.*?)```"
# Openings in prose that are tried: more are no answer but an attempt to keep us busy.
_MAX_STARTS = 1000
_MAX_PROBLEMS = 10
_OF_NUMBERS = "0123456789+-.eE"
_MAX_WORDS = 200  # characters of one message, which a validator of the user's may make of the input

_MEND = "That answer cannot be used: {problem}. Answer again, with JSON that fits and nothing else."
_ASK = "Answer with JSON that fits this JSON schema, and with nothing else:\n{schema}"


class InvalidOutputError(ValueError):
    """A text is not what the output type says; the message is one line that a model can use.

    Attributes:
        found: whether there was any JSON in it.
    """

    def __init__(self, message: str, *, found: bool = True) -> None:
        super().__init__(message)
        self.found = found


class _LooseError(Exception):
    """A schema that the strict form cannot say."""


class Output(Generic[T]):
    """An output type with its JSON schema.

    Args:
        output_type: what pydantic can validate and describe: a model, a dataclass, a `TypedDict`,
            `list[Model]`, `Literal[…]`, an `Enum`, `int`, `dict[str, int]` …

    Attributes:
        name: of the schema: letters, digits, `_` and `-`, at most 64 of them.
        schema: an object's; another root stands as its only property, `value`.
        strict: whether it has the strict form: every property is required and no other allowed. What that
            form cannot say (`dict[str, …]`, `Any`, a tuple, `extra="allow"`) keeps its own schema.

    Raises:
        LLMConfigError: it is not a type, or has no JSON schema.
    """

    def __init__(self, output_type: type[T]) -> None:
        from pydantic import TypeAdapter, create_model  # a script that only chats does without

        problem = ""
        parts = (output_type, *get_args(output_type))
        an_instance = any(isinstance(part, BaseModel) for part in parts)
        if output_type is None or isinstance(output_type, str) or an_instance:
            problem = "it is not a type"
        else:
            try:
                adapter: TypeAdapter[Any] = TypeAdapter(output_type)
                plain = _root(adapter.json_schema())
            except (PydanticUserError, NameError, TypeError) as error:
                problem = re.split(r"\.? *\n|\. ", str(error))[0][:_MAX_WORDS]
        if problem:
            raise LLMConfigError(
                f"output_type is {output_type!r:.80}, which has no JSON schema ({problem}); give a "
                "pydantic model, a dataclass or another type"
            )
        called = getattr(output_type, "__name__", None) or "output"
        self.name = re.sub(r"[^A-Za-z0-9_-]", "_", str(called))[:64]
        self._bare = adapter
        self._wrapper: Any = None
        if plain.get("type") != "object":
            wrapper: Any = create_model(
                self.name, __config__=ConfigDict(extra="forbid"), value=(output_type, ...)
            )
            self._wrapper = TypeAdapter(wrapper)
            plain = self._wrapper.json_schema()
        self.strict = True
        try:
            self.schema = _strict_root(plain, _BOUNDS)
        except _LooseError:
            self.strict, self.schema = False, plain

    def narrow_schema(self) -> dict[str, Any]:
        """The schema with all bounds told in words, for servers that refuse them."""
        return _strict_root(self.schema, ()) if self.strict else self.schema

    def read(self, text: str) -> T:
        """The instance in a text.

        The whole text is JSON, or a fenced block in it is, or an object or array amid prose; where
        several fit, the last one counts. Nothing is repaired: a trailing comma is an error.

        Raises:
            InvalidOutputError: there is no JSON that fits.
        """
        found = list(_candidates(text))
        if not found:
            raise InvalidOutputError(_no_json(text), found=False)
        problems = []
        for candidate in reversed(found):
            try:
                return cast("T", self._validate(candidate))
            except ValidationError as error:
                problems.append(_explain(error))
        raise InvalidOutputError(problems[0])

    def _validate(self, candidate: str) -> Any:
        if self._wrapper is None:
            return self._bare.validate_json(candidate)
        try:
            return self._wrapper.validate_json(candidate).value
        except ValidationError:
            value = from_json(candidate)
            if isinstance(value, dict) and value.keys() == {"value"}:
                raise
            return self._bare.validate_json(candidate)  # a model that says [1, 2] means it

    def partial(self, text: str) -> Any:
        """What is complete of JSON that is still growing, as plain values; `None` if nothing is.

        A string or number that may go on is left out, and nothing is validated.
        """
        start = re.search(r"[{\[]", text)
        if start is None:
            return None
        try:
            # What ends in digits may be half a number.
            value = from_json(text[start.start() :].rstrip(_OF_NUMBERS), allow_partial=True)
        except ValueError:  # also prose behind it
            return None
        if self._wrapper is None or not isinstance(value, dict):
            return value or None
        return value.get("value")


def _root(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema whose root is no reference: that of a recursive model is one."""
    schema = dict(schema)
    if "$ref" in schema:
        target = schema["$defs"][schema.pop("$ref").removeprefix("#/$defs/")]
        schema = {**target, **schema}
    return schema


def _strict_root(plain: dict[str, Any], kept: Sequence[str]) -> dict[str, Any]:
    schema = _strict(plain, kept)
    if plain.get("$defs"):
        schema["$defs"] = {name: _strict(node, kept) for name, node in plain["$defs"].items()}
    return schema


def _strict(node: Any, kept: Sequence[str]) -> dict[str, Any]:
    """The strict form of a schema, with these of the bounds as they are and the others in words."""
    if not isinstance(node, dict):
        raise _LooseError
    told = [name for name in (*_BOUNDS, *_TOLD) if name not in kept and node.get(name) is not None]
    if node.get("format") in _FORMATS:
        told.remove("format")
    description = node.get("description", "")
    if told:
        words = ", ".join(f"{name}: {node[name]}" for name in told)
        description = f"{description} ({words})".lstrip()
    said = {"description": description} if description else {}
    if "$ref" in node:  # which bears no neighbour
        reference = {"$ref": node["$ref"]}
        return {"anyOf": [reference], **said} if said else reference
    for choice in ("anyOf", "oneOf"):
        if choice in node:
            return {"anyOf": [_strict(option, kept) for option in node[choice]], **said}
    strict: dict[str, Any] = {name: node[name] for name in ("type", "enum") if name in node}
    if "const" in node:
        strict["enum"] = [node["const"]]
    if not strict:
        raise _LooseError
    if node.get("format") in _FORMATS:
        strict["format"] = node["format"]
    strict.update({name: node[name] for name in kept if name in node}, **said)
    if node.get("type") == "object":
        # Without a word about properties any are allowed: how older versions of pydantic say `dict`.
        if (
            node.get("additionalProperties", "properties" not in node)
            or "patternProperties" in node
        ):
            raise _LooseError
        properties = node.get("properties", {})
        strict["properties"] = {name: _strict(inner, kept) for name, inner in properties.items()}
        strict["required"] = list(properties)
        strict["additionalProperties"] = False
    elif node.get("type") == "array":
        if "prefixItems" in node:
            raise _LooseError
        strict["items"] = _strict(node.get("items"), kept)
    return strict


def _not_json(constant: str) -> None:
    """Refuse NaN and Infinity, which Python would take."""
    raise ValueError(constant)


_DECODER = json.JSONDecoder(parse_constant=_not_json)


def _is_json(text: str) -> bool:
    try:
        from_json(text, allow_inf_nan=False)
    except ValueError:
        return False
    return True


def _candidates(text: str) -> Iterator[str]:
    """The JSON in a text: all of it; else its fenced blocks; else what stands amid prose."""
    whole = text.strip()
    if _is_json(whole):
        yield whole
        return
    fenced = [block.strip() for block in re.findall(_FENCE, text)]
    fenced = [block for block in fenced if _is_json(block)]
    if fenced:
        yield from fenced
        return
    end = tried = 0
    for start in re.finditer(r"[{\[]", text):
        if start.start() < end:
            continue
        tried += 1
        if tried > _MAX_STARTS:
            return
        try:
            _, end = _DECODER.raw_decode(text, start.start())
        except (ValueError, RecursionError):
            continue
        found = text[start.start() : end]
        if _is_json(found):
            yield found


def _no_json(text: str) -> str:
    """Why nothing was found: where it breaks, if it was meant to be JSON."""
    fenced = re.search(_FENCE, text)
    meant = (fenced[1] if fenced else text).strip()
    if not meant.startswith(("{", "[")):
        return "there is no JSON in it"
    try:
        from_json(meant, allow_inf_nan=False)
    except ValueError as error:
        return f"it is not JSON: {error}"
    return "it is not JSON"  # pragma: no cover - it would have been found


def _explain(error: ValidationError) -> str:
    """Where and why, in one line; never what was said there."""
    errors = error.errors(include_url=False, include_input=False, include_context=False)
    problems = []
    for detail in errors[:_MAX_PROBLEMS]:
        place = ".".join(map(str, detail["loc"]))[:_MAX_WORDS]
        words = " ".join(detail["msg"].split())[:_MAX_WORDS]
        problems.append(f"{place}: {words}" if place else words)
    if len(errors) > _MAX_PROBLEMS:
        problems.append(f"and {len(errors) - _MAX_PROBLEMS} more")
    return "; ".join(problems)


@dataclass(frozen=True)
class Parsed(Generic[T]):
    """What `LLM.parsed` returns.

    Attributes:
        output: the instance.
        response: the last answer.
        usage: tokens of all attempts together; a part is `None` if one of them did not say.
        cost: US dollars of all attempts together; `None` if unknown.
        attempts: how often the model was asked; requests that a server refused are not counted.
        mode: the one that worked: `schema`, `tool` or `prompt`.
    """

    output: T
    response: ChatCompletionResponse
    usage: TokenUsage
    cost: Decimal | None
    attempts: int
    mode: str


class Asking(Generic[T]):
    """A question and the attempts to get an answer of a type: what to send, and what came of it.

    Args:
        output_type: as `Output` takes it.
        messages: the conversation, which is not changed.
        mode: as `LLM.parse` takes it.
        max_attempts: answers of the model in all.
        known: the mode that `auto` begins with.
        remember: is told the mode that `auto` shall begin with next time.
        native: gives the fields that ask for an answer by this name, schema and strictness in the
            server's schema mode.
        more: everything else that the call takes.

    Raises:
        LLMConfigError: it cannot be asked like that.
    """

    def __init__(
        self,
        output_type: type[T],
        messages: Any,
        *,
        mode: str,
        max_attempts: int,
        known: str,
        remember: Callable[[str], None],
        native: Callable[[Output[Any]], dict[str, Any]],
        more: Mapping[str, Any],
    ) -> None:
        self.output = Output(output_type)
        self._native = native
        self._remember = remember
        self._more = dict(more)
        check_asking(mode, max_attempts, self._more)
        self._more.pop("stream", None)
        self._left = max_attempts
        steps = _LADDER[_LADDER.index(known) :] if mode == "auto" else (mode,)
        if self._more.get("tools"):  # theirs and ours would stand side by side
            steps = tuple(step for step in steps if step != "tool")
        self._steps = list(steps)
        if not isinstance(messages, Iterable) or isinstance(messages, Mapping):
            raise LLMConfigError(
                f"messages is {type(messages).__name__}; give a text or a list of messages"
            )
        self._asked = list(messages)
        self._mends: list[Any] = []
        self._problem: LLMOutputError | None = None
        self.usage: TokenUsage | None = None
        self.cost: Decimal | None = Decimal(0)
        self.attempts = 0
        self._lasting = mode == "auto" and not self._more.get("tools")

    @property
    def mode(self) -> str:
        return self._steps[0]

    def request(self) -> dict[str, Any]:
        """The arguments of the next call."""
        output, call = self.output, dict(self._more)
        messages = self._asked
        if self.mode == "schema":
            for name, value in self._native(output).items():
                theirs = call.get(name)
                call[name] = {**theirs, **value} if isinstance(theirs, Mapping) else value
        elif self.mode == "tool":
            function = {
                "name": output.name,
                "description": "Give the answer.",
                "parameters": output.schema,
            }
            call["tools"] = [{"type": "function", "function": function}]
            call["tool_choice"] = {"type": "function", "function": {"name": output.name}}
        else:
            schema = json.dumps(output.schema, ensure_ascii=False)
            messages = _instructed(messages, _ASK.format(schema=schema))
        return {**call, "messages": [*messages, *self._mends]}

    def failed(self, error: LLMError) -> None:
        """A call failed: another mode may do, or it is raised, caused by the invalid answer before."""
        if len(self._steps) > 1 and _refuses(error, self.mode):
            self._step_down()
            # Another type's schema may do well.
            self._lasting = self._lasting and not re.search(_OF_ONE_SCHEMA, str(error))
            self._learn()
            return
        if error.__cause__ is None and self._problem is not None:
            error.__cause__ = self._problem
        raise error

    def answered(self, response: ChatCompletionResponse) -> Parsed[T] | None:
        """What came of an answer; `None`: ask again.

        Raises:
            LLMOutputError: it was cut, refused, or invalid for the last time.
        """
        self.attempts += 1
        self._left -= 1
        usage = response.usage or TokenUsage()
        self.usage = usage if self.usage is None else self.usage + usage
        cost = response.cost
        self.cost = None if self.cost is None or cost is None else self.cost + cost
        text = self._text(response)
        refusal = _refusal(response)
        if refusal is not None:
            said = f": {refusal:.{_MAX_WORDS}}" if refusal else ""
            raise self._error(response, "refused", f"the model refused{said}", refusal or text)
        if response.finish_reason == "length":
            words = "the answer was cut at its limit: raise max_tokens, or ask for less"
            raise self._error(response, "cut", words, text)
        if self.mode != "tool" and response.tool_calls and not text:
            words = (
                "the model called a tool in place of an answer, and parse runs none: use an Agent"
            )
            raise self._error(response, "invalid", words, "")
        try:
            value = self.output.read(text)
        except InvalidOutputError as error:
            words = (
                f"the answer is not a {self.output.name} after {self.attempts} attempts: {error}"
            )
            self._problem = self._error(response, "invalid", words, text)
            if self._left < 1:
                raise self._problem from error
            self._mend(response, error)
            return None
        self._learn()
        return Parsed(value, response, self.usage, self.cost, self.attempts, self.mode)

    def _text(self, response: ChatCompletionResponse) -> str:
        ours = [call for call in response.tool_calls if call.name == self.output.name]
        return ours[0].arguments if self.mode == "tool" and ours else response.text

    def _error(
        self, response: ChatCompletionResponse, reason: str, words: str, text: str
    ) -> LLMOutputError:
        error = LLMOutputError(
            words,
            reason=reason,
            text=text,
            usage=self.usage,
            cost=self.cost,
            provider=response.provider,
            model=response.info.model or response.model,
            request_id=response.request_id,
        )
        error.history = response.history
        error.partial = response
        return error

    def _mend(self, response: ChatCompletionResponse, error: InvalidOutputError) -> None:
        """Prepare to ask again: the answer and what is wrong with it, or another mode."""
        if response.cached and self._more.get("cache", "on") == "on":
            self._more["cache"] = "refresh"  # what was kept is no use, so nothing that follows is
        if not error.found and len(self._steps) > 1:
            self._step_down()  # the server did not heed the mode: some ignore what they do not know
            return
        mend = _MEND.format(problem=error)
        said = response.choices[0].message if response.choices else None
        if said is not None and said.tool_calls:
            answers = [
                Message(role="tool", tool_call_id=call.id, content=mend) for call in said.tool_calls
            ]
            self._mends += [said, *answers]
            return
        # An empty answer is not sent back: there are servers that refuse one.
        self._mends += [said] if said is not None and said.text else []
        self._mends.append(Message(role="user", content=mend))

    def _step_down(self) -> None:
        del self._steps[0]
        self._mends.clear()

    def _learn(self) -> None:
        if self._lasting:
            self._remember(self.mode)


def check_asking(mode: str, max_attempts: int, more: Mapping[str, Any]) -> None:
    """Raise `LLMConfigError` for what cannot be asked."""
    if mode not in _MODES:
        modes = ", ".join(map(repr, _MODES))
        raise LLMConfigError(f"mode is {mode!r}; it must be one of {modes}")
    if type(max_attempts) is not int or max_attempts < 1:
        raise LLMConfigError(f"max_attempts is {max_attempts!r}; it must be a whole number from 1")
    if more.get("stream"):
        raise LLMConfigError("parse gives a whole answer; for stream=True there is stream_parsed")
    if "on_error" in more:
        raise LLMConfigError("on_error is for streams of events; what fails here is raised")
    if more.get("response_format") is not None:
        raise LLMConfigError("response_format is made of output_type; leave it out")
    if mode == "tool" and more.get("tools"):
        raise LLMConfigError(
            "mode='tool' asks with a tool of its own; with tools= give mode 'schema' or 'prompt'"
        )
    if more.get("tool_choice") is not None and not more.get("tools"):
        raise LLMConfigError("tool_choice is given without tools; leave it out")


def _refuses(error: LLMError, mode: str) -> bool:
    if not isinstance(error, InvalidRequest) or isinstance(error, LLMContextLengthError):
        return False
    said = f"{error} {error.param} {error.body}"
    return error.status_code in (400, 422) and bool(re.search(_REFUSALS[mode], said))


def _refusal(response: ChatCompletionResponse) -> str | None:
    """What the model said to refuse; `None` if it did not."""
    message = response.choices[0].message if response.choices else None
    said = (message.model_extra or {}).get("refusal") if message is not None else None
    if isinstance(said, str) and said:
        return said
    return "" if response.finish_reason == "content_filter" else None


def _instructed(messages: Sequence[Any], text: str) -> list[Any]:
    """The messages with an instruction in their system message: many models take only one, in front."""
    first = messages[0] if messages else None
    head = first.model_dump(exclude_unset=True) if isinstance(first, Message) else first
    if not isinstance(head, Mapping) or head.get("role") not in ("system", "developer"):
        return [{"role": "system", "content": text}, *messages]
    content = head.get("content")
    if isinstance(content, list):
        content = [*content, {"type": "text", "text": text}]
    else:
        content = f"{content}\n\n{text}" if content else text
    return [{**head, "content": content}, *messages[1:]]


class Events(Protocol):
    """What a `ParsedStream` reads from; `LLM.stream` gives one."""

    def __iter__(self) -> Iterator[Any]: ...
    @property
    def response(self) -> Any: ...
    def close(self) -> None: ...


class ParsedStream(Generic[T]):
    """An answer of a type, as it grows: an iterator of what is complete so far, and a context manager.

    Each item is a plain value (a `dict`, a list) that replaces the one before; nothing in it is validated,
    and what may still go on is left out. Where an invalid answer is asked for again, the items begin
    anew. In the tool mode there is one item, when the call is whole. The instance is `.output`.
    """

    def __init__(self, asking: Asking[T], ask: Callable[[], Events]) -> None:
        self._asking = asking
        self._ask = ask
        self._events: Events | None = ask()
        self._items = self._read()
        self._parsed: Parsed[T] | None = None

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self._items)

    @property
    def parsed(self) -> Parsed[T]:
        """The instance with what it took; reads the rest of the stream first.

        Raises:
            LLMOutputError: as `LLM.parse`; or the stream was closed before its end.
        """
        for _ in self:
            pass
        if self._parsed is None:
            raise LLMOutputError("the stream ended before the answer was whole", reason="cut")
        return self._parsed

    @property
    def output(self) -> T:
        """The instance; reads the rest of the stream first."""
        return self.parsed.output

    @property
    def response(self) -> ChatCompletionResponse:
        """The last answer; reads the rest of the stream first."""
        return self.parsed.response

    @property
    def usage(self) -> TokenUsage | None:
        """Tokens of the answers that are over; `None` before the first."""
        return self._asking.usage

    @property
    def cost(self) -> Decimal | None:
        """US dollars of the answers that are over; `None` if unknown."""
        return self._asking.cost

    @property
    def attempts(self) -> int:
        """Answers that are over."""
        return self._asking.attempts

    def close(self) -> None:
        """Stop reading."""
        self._items.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> ParsedStream[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> Any:
        while self._parsed is None:
            events = self._events = self._events or self._ask()
            text, last = "", None
            for event in events:
                piece = event.text_delta or ""
                if event.tool_call is not None:
                    text, piece = "", event.tool_call.arguments
                text += piece
                # A value is complete where one of these stands, and nowhere else.
                if any(mark in piece for mark in ',"}]'):
                    partial = self._asking.output.partial(text)
                    if partial is not None and partial != last:
                        last = partial
                        yield partial
            self._events = None
            self._parsed = self._asking.answered(events.response)
