"""Tools: a typed function becomes one that a model can call, and a `Toolbox` runs what it calls."""

from __future__ import annotations

import copy
import functools
import inspect
import json
import logging
import queue
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, ParamSpec, TypeVar, get_args, overload

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import to_jsonable_python

from agents.types import Outcome, ToolCall, ToolResult
from LLM import UNSET, Clock, LLMConfigError, Unset

log = logging.getLogger("agents")

P = ParamSpec("P")
R = TypeVar("R")

Effect = Literal["read", "idempotent", "once"]
Approval = bool | Callable[[dict[str, Any]], bool]

# What OpenAI takes as a function's name (API reference, 2026-11); Anthropic takes at least these.
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")

_MAX_ERROR_CHARS = 500
_MAX_COMPLAINTS = 5  # of one call's arguments: the model mends these first
# How often a caller's `cancel` is looked at, in seconds: an event and a queue cannot be awaited at once.
_POLL = 0.02


class ToolRetry(Exception):
    """Raised by a tool: the model should mend its call and try again; the message says how."""


class ToolFailed(Exception):
    """Raised by a tool: it did not work, and the model should know why."""


class ToolPending(Exception):
    """Raised by a tool: a person must decide; the message says what. The call counts as not run."""


@dataclass(frozen=True)
class ToolContext:
    """What a tool gets that has a parameter of this type; the model does not see the parameter.

    Attributes:
        call: the call that is being run.
        deps: what the program handed in for its tools.
        timeout: seconds that the call may take in all; `None`: no limit.
        cancelled: set when nobody waits for the result any more: the time is over, or the run was
            cancelled. A long tool looks at it now and then, and ends.
        approved: whether a person has approved this call.
    """

    call: ToolCall
    deps: Any = None
    timeout: float | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)
    approved: bool = False


class _Schema(GenerateJsonSchema):
    """Without what costs tokens and says nothing: a title that repeats the name."""

    # A default that JSON cannot say is the function's own affair: the parameter is optional.
    ignored_warning_kinds = GenerateJsonSchema.ignored_warning_kinds | {"non-serializable-default"}

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002 - pydantic's signature
        return False


class Tool(Generic[P, R]):
    """A function that a model can call; made by `tool`. Called itself, it is the function.

    Attributes:
        name: what the model calls it.
        description: what the model reads about it.
        parameters: the JSON Schema of its arguments.
        effect: what running it twice means; see `tool`.
        timeout: seconds; `None`: no limit; `UNSET`: the toolbox decides.
        approval: whether a person must approve a call, or what decides that by the arguments.
        function: the function itself.
    """

    def __init__(
        self,
        function: Callable[P, R],
        *,
        name: str | None = None,
        description: str | None = None,
        effect: Effect = "once",
        timeout: float | Unset | None = UNSET,
        approval: Approval = False,
    ) -> None:
        source: Any = function
        while isinstance(source, functools.partial):
            source = source.func
        self.function = function
        self.name = getattr(source, "__name__", "") if name is None else name
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise LLMConfigError(
                f"a tool cannot be called {self.name!r}: give name=, of 1 to 64 letters, digits, _ and -"
            )
        if effect not in get_args(Effect):
            raise LLMConfigError(
                f"effect of tool {self.name} is {effect!r}; it must be one of {get_args(Effect)}"
            )
        if not isinstance(approval, bool) and not callable(approval):
            raise LLMConfigError(
                f"approval of tool {self.name} is {approval!r}; give True, False or a function"
            )
        self.effect = effect
        self.timeout = timeout if timeout is UNSET else _seconds(f"tool {self.name}", timeout)
        self.approval = approval
        told, of_parameters = _documented(inspect.getdoc(source) or "")
        self.description = told if description is None else description
        annotations, self._context = self._annotated(function)
        self._names = {f"p{number}": name for number, name in enumerate(annotations)}
        self._defaults = {n: p.default for n, p in annotations.items() if p.default is not p.empty}
        self._model = self._built(annotations)
        self.parameters = self._model.model_json_schema(schema_generator=_Schema)
        self.parameters.pop("title", None)
        self.parameters.setdefault("properties", {})
        for parameter, schema in self.parameters["properties"].items():
            if parameter in of_parameters:
                schema.setdefault("description", of_parameters[parameter])
        functools.update_wrapper(self, source, updated=())

    def _annotated(
        self, function: Callable[..., Any]
    ) -> tuple[dict[str, inspect.Parameter], str | None]:
        """The parameters that the model fills, and the name of the one that takes the context."""
        try:
            signature = inspect.signature(function, eval_str=True)
        except Exception as error:
            raise LLMConfigError(
                f"tool {self.name}: the annotations cannot be read ({_one_line(error)}); "
                "a type that they name must be known in the function's module"
            ) from error
        found: dict[str, inspect.Parameter] = {}
        context = None
        for name, parameter in signature.parameters.items():
            where = f"tool {self.name}: parameter {name!r}"
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                raise LLMConfigError(f"{where} takes any number of values; name each one")
            if parameter.kind is parameter.POSITIONAL_ONLY:
                raise LLMConfigError(
                    f"{where} is positional-only; a model gives names: remove the /"
                )
            if parameter.annotation is parameter.empty:
                of_class = "; of a method make a tool when it is bound: tool(thing.method)"
                raise LLMConfigError(
                    f"{where} has no annotation; say its type{of_class if name == 'self' else ''}"
                )
            if parameter.annotation in (ToolContext, ToolContext | None):
                context = name
            else:
                found[name] = parameter
        return found, context

    def _built(self, parameters: Mapping[str, inspect.Parameter]) -> type[BaseModel]:
        # Fields have names of ours: a parameter may be called `schema`, `copy` or `_x`, a field not.
        fields: Any = {
            own: (parameter.annotation, Field(alias=name, **_default(parameter)))
            for (own, name), parameter in zip(self._names.items(), parameters.values(), strict=True)
        }
        try:
            model: type[BaseModel] = create_model(
                self.name, __config__=ConfigDict(extra="forbid"), **fields
            )
            model.model_json_schema(schema_generator=_Schema)
        except Exception as error:
            for name, parameter in parameters.items():
                try:
                    TypeAdapter(parameter.annotation).json_schema()
                except Exception as cause:
                    raise LLMConfigError(
                        f"tool {self.name}: parameter {name!r} has a type that JSON cannot say: "
                        f"{inspect.formatannotation(parameter.annotation)}"
                    ) from cause
            raise LLMConfigError(
                f"tool {self.name}: no schema can be made of its parameters: {_one_line(error)}"
            ) from error
        return model

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function, as if it were no tool."""
        return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"Tool({self.name}: {', '.join(self._names.values())})"

    @property
    def schema(self) -> dict[str, Any]:
        """OpenAI's form, which `tools=` takes for every provider."""
        function = {"name": self.name, "parameters": copy.deepcopy(self.parameters)}
        if self.description:
            function["description"] = self.description
        return {"type": "function", "function": function}

    @property
    def messages_schema(self) -> dict[str, Any]:
        """Anthropic's form, for programs that speak to its messages API without `LLM`."""
        form = {"name": self.name, "input_schema": copy.deepcopy(self.parameters)}
        if self.description:
            form["description"] = self.description
        return form

    def validate(self, arguments: str) -> dict[str, Any]:
        """The arguments as the function gets them, defaults included.

        Args:
            arguments: JSON text as a model wrote it. Nothing at all and `null` are no arguments; an
                object that was turned into a JSON string once too often is taken out of it.

        Raises:
            ToolRetry: they do not fit; the message says what to mend.
        """
        try:
            given = self._model.model_validate_json(_unwrapped(arguments))
        except ValidationError as error:
            raise ToolRetry(self._complaint(error)) from None
        values = {}
        for own, name in self._names.items():
            left_out = own not in given.model_fields_set and name in self._defaults
            # The very object, which may be a sentinel; pydantic would hand over a copy.
            values[name] = self._defaults[name] if left_out else getattr(given, own)
        return values

    def _complaint(self, error: ValidationError) -> str:
        problems = error.errors(include_url=False, include_context=False)
        if problems[0]["type"] == "json_invalid":
            return f"the arguments of {self.name} are not JSON: {_bounded(problems[0]['msg'])}"
        lines = []
        for problem in problems[:_MAX_COMPLAINTS]:
            where = ".".join(map(str, problem["loc"])) or "arguments"
            kind, said = problem["type"], problem["msg"]
            if kind == "missing":
                lines.append(f"{where} is missing")
            elif kind == "extra_forbidden":
                lines.append(f"{where} is not known")
            else:
                lines.append(f"{where}: {said}, not {_bounded(repr(problem['input']), 60)}")
        if len(problems) > _MAX_COMPLAINTS:
            lines.append(f"and {len(problems) - _MAX_COMPLAINTS} more")
        takes = ", ".join(self._names.values()) or "no arguments"
        return f"{self.name} cannot take these arguments: {_bounded('; '.join(lines))} (it takes {takes})"

    def needs_approval(self, arguments: dict[str, Any]) -> bool:
        """Whether a person must approve a call with these arguments."""
        return self.approval(arguments) if callable(self.approval) else self.approval

    def bind(self, arguments: Mapping[str, Any], context: ToolContext) -> Callable[[], Any]:
        """The call of the function, ready to be made; the context is added if the function takes it."""
        function: Callable[..., Any] = self.function
        added = {self._context: context} if self._context else {}
        return functools.partial(function, **arguments, **added)


@overload
def tool(function: Callable[P, R], /) -> Tool[P, R]: ...
@overload
def tool(
    *,
    name: str | None = ...,
    description: str | None = ...,
    effect: Effect = ...,
    timeout: float | Unset | None = ...,
    approval: Approval = ...,
) -> Callable[[Callable[P, R]], Tool[P, R]]: ...
@overload
def tool(
    function: Callable[P, R],
    /,
    *,
    name: str | None = ...,
    description: str | None = ...,
    effect: Effect = ...,
    timeout: float | Unset | None = ...,
    approval: Approval = ...,
) -> Tool[P, R]: ...
def tool(function: Any = None, /, **options: Any) -> Any:
    """Make a tool of a typed function: `@tool`, `@tool(effect="read")` or `tool(thing.method)`.

    The signature becomes the JSON Schema; the docstring (Google, NumPy or reST) describes the tool and
    its parameters. Without the extra `[agents]` the whole docstring is the description.

    A parameter of type `ToolContext` is not shown to the model. An `async` function is run to its end
    in the thread of its call, with an event loop of its own.

    Args:
        function: the function, or a bound method.
        name: left out: the function's.
        description: left out: the docstring's.
        effect: what running it twice means. `"read"`: nothing is changed; `"idempotent"`: twice is as
            good as once; `"once"` (left out): a run that broke off in the middle of it does not run it
            again on its own, a person decides.
        timeout: seconds; `None`: no limit; left out: the toolbox's.
        approval: `True`: each call waits for a person; or a function of the arguments that says so.

    Raises:
        LLMConfigError: the function cannot be a tool; the message names the parameter.
    """
    if function is None:
        return functools.partial(tool, **options)
    if isinstance(function, Tool):
        raise LLMConfigError(
            f"{function.name} is a tool already; make the other one of its .function"
        )
    if not callable(function):
        raise LLMConfigError(f"{function!r:.80} is no function, so no tool can be made of it")
    return Tool(function, **options)


@dataclass
class _Job:
    """A call that can be run. `stop` ends an async function; a thread cannot be ended."""

    call: ToolCall
    tool: Tool[..., Any]
    arguments: dict[str, Any]
    approved: bool
    timeout: float | None
    context: ToolContext | None = None
    end: float | None = None
    stop: Callable[[], object] | None = None

    def abandon(self) -> None:
        if self.context is not None:
            self.context.cancelled.set()
        if self.stop is not None:
            with suppress(RuntimeError):  # its loop has just ended
                self.stop()


class Toolbox:
    """Tools, and what runs the calls that a model makes of them.

    It keeps nothing between two runs: all threads may share it, and a fork does not matter to it.

    Args:
        tools: tools, functions, or other toolboxes.
        max_workers: calls that run at the same time.
        timeout: seconds for a call whose tool does not say; `None`: no limit.
        max_result_chars: longer results are cut, with a remark that says so.
        clock: for tests: what measures how long a call ran.

    Raises:
        LLMConfigError: a function cannot be a tool, two have one name, or a number makes no sense.
    """

    def __init__(
        self,
        tools: Iterable[Tool[..., Any] | Callable[..., Any] | Toolbox] = (),
        *,
        max_workers: int = 8,
        timeout: float | None = 60.0,
        max_result_chars: int = 100_000,
        clock: Clock | None = None,
    ) -> None:
        for name, number in (("max_workers", max_workers), ("max_result_chars", max_result_chars)):
            if type(number) is not int or number < 1:
                raise LLMConfigError(f"{name} is {number!r}; give a whole number above 0")
        if isinstance(tools, (str, Mapping)) or not isinstance(tools, Iterable):
            raise LLMConfigError(f"tools is one {type(tools).__name__}; give a list")
        self.max_workers = max_workers
        self.max_result_chars = max_result_chars
        self.timeout = _seconds("the toolbox", timeout)
        self._clock = clock or Clock()
        self._tools: dict[str, Tool[..., Any]] = {}
        for given in tools:
            for each in given if isinstance(given, Toolbox) else [given]:
                made = each if isinstance(each, Tool) else tool(each)
                if made.name in self._tools:
                    raise LLMConfigError(
                        f"two tools are called {made.name}; give one of them another name="
                    )
                self._tools[made.name] = made

    def __iter__(self) -> Iterator[Tool[..., Any]]:
        return iter(self._tools.values())

    def __len__(self) -> int:
        return len(self._tools)

    def __contains__(self, name: object) -> bool:
        return name in self._tools

    def __repr__(self) -> str:
        return f"Toolbox({', '.join(self._tools)})"

    def get(self, name: str) -> Tool[..., Any] | None:
        """The tool of this name, or `None`."""
        return self._tools.get(name)

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """What `tools=` takes, in the order in which the tools were given."""
        return [each.schema for each in self]

    def run(
        self,
        calls: Sequence[ToolCall],
        *,
        approvals: Mapping[str, bool] | None = None,
        deps: Any = None,
        cancel: threading.Event | None = None,
        deadline: float | None = None,
        on_start: Callable[[ToolCall], object] | None = None,
        on_result: Callable[[ToolResult], object] | None = None,
    ) -> list[ToolResult]:
        """Run the calls of one answer, several at a time; the results have the order of the calls.

        Each call runs in a thread of its own, which has the context (`contextvars`) of this one, so
        that budgets and deadlines hold. A thread cannot be ended: of a call that takes too long the
        result is dropped, and its thread does not keep the process alive. What a tool raises is a
        result too; only what is no `Exception`, like `KeyboardInterrupt`, passes through.

        Args:
            calls: as the model made them.
            approvals: what a person decided, by the id of the call: `True` runs it, `False` declines.
            deps: for the tools that take a `ToolContext`.
            cancel: when it is set, no call is begun and none is waited for any more.
            deadline: seconds for all the calls together; left out: no limit. (A `with llm.deadline(…)`
                holds for what the tools ask of an `LLM`, but is not seen here.)
            on_start: told of each call just before it is run, in this thread.
            on_result: told of each result as soon as it is there, in this thread.
        """
        results: dict[int, ToolResult] = {}

        def settle(index: int, result: ToolResult) -> None:
            results[index] = result
            if on_result is not None:
                on_result(result)

        def take(index: int, outcome: ToolResult | BaseException) -> None:
            if index not in running:
                return  # it was given up, and comes too late
            if isinstance(outcome, BaseException):
                raise outcome
            del running[index]
            settle(index, outcome)

        waiting: deque[tuple[int, _Job]] = deque()
        for index, call in enumerate(calls):
            prepared = self._prepared(call, approvals or {})
            if isinstance(prepared, _Job):
                waiting.append((index, prepared))
            else:
                settle(index, prepared)
        end = None if deadline is None else self._clock.now() + deadline
        running: dict[int, _Job] = {}
        done: queue.SimpleQueue[tuple[int, ToolResult | BaseException]] = queue.SimpleQueue()
        try:
            while waiting or running:
                halted = self._halted(cancel, end, deadline)
                if halted:
                    while not done.empty():  # what has come to its end is not called left
                        take(*done.get())
                    for index, job in [*running.items(), *waiting]:
                        began = "left at work" if index in running else "not run"
                        text = f"{job.tool.name} was {began}: {halted}"
                        settle(index, ToolResult(job.call, text, "failed"))
                    break
                while waiting and len(running) < self.max_workers:
                    index, job = waiting.popleft()
                    if on_start is not None:
                        on_start(job.call)
                    problem = self._begin(index, job, deps, end, done)
                    if problem:
                        settle(index, ToolResult(job.call, problem, "failed"))
                    else:
                        running[index] = job
                if not running:  # none could be begun
                    continue
                for finished in self._finished(running, done, end, polled=cancel is not None):
                    take(*finished)
        finally:
            for job in running.values():
                job.abandon()
        return [results[index] for index in range(len(calls))]

    def _prepared(self, call: ToolCall, approvals: Mapping[str, bool]) -> _Job | ToolResult:
        found = self._tools.get(call.name)
        if found is None:
            return ToolResult(call, self._unknown(call.name), "retry")
        decided = None if call.id is None else approvals.get(call.id)
        try:
            arguments = found.validate(call.arguments)
            if decided is False:
                return ToolResult(call, f"{found.name} was not run: declined by the user", "failed")
            if decided is None and found.needs_approval(arguments):
                return ToolResult(call, f"{found.name} waits for a person's approval", "pending")
        except ToolRetry as error:
            return ToolResult(call, str(error), "retry")
        except Exception as error:  # noqa: BLE001 - of a validator, or of what decides the approval
            return self._failure(call, error)
        timeout = self.timeout if isinstance(found.timeout, Unset) else found.timeout
        return _Job(call, found, arguments, bool(decided), timeout)

    def _unknown(self, name: str) -> str:
        from difflib import get_close_matches

        close = get_close_matches(name[:100], self._tools, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        known = _bounded(", ".join(self._tools)) or "none"
        return f"there is no tool {_bounded(name, 100)!r}{hint} (tools: {known})"

    def _halted(
        self, cancel: threading.Event | None, end: float | None, deadline: float | None
    ) -> str:
        if cancel is not None and cancel.is_set():
            return "the run was cancelled"
        if end is not None and self._clock.now() >= end:
            return f"the deadline of {deadline:g} s is over"
        return ""

    def _begin(
        self,
        index: int,
        job: _Job,
        deps: Any,
        end: float | None,
        done: queue.SimpleQueue[tuple[int, ToolResult | BaseException]],
    ) -> str:
        """Start the thread of a call; if there is none to be had, say so."""
        now = self._clock.now()
        left = None if end is None else end - now
        bounds = [seconds for seconds in (job.timeout, left) if seconds is not None]
        job.end = None if job.timeout is None else now + job.timeout
        job.context = context = ToolContext(
            job.call, deps, min(bounds, default=None), approved=job.approved
        )

        def work() -> None:
            try:
                done.put((index, self._result(job, context)))
            except BaseException as error:  # noqa: BLE001 - raised again where the caller waits
                done.put((index, error))

        name = f"tool {job.tool.name}"
        thread = threading.Thread(target=copy_context().run, args=(work,), name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            return f"{job.tool.name} was not run: {_one_line(error)}"
        return ""

    def _finished(
        self,
        running: Mapping[int, _Job],
        done: queue.SimpleQueue[tuple[int, ToolResult | BaseException]],
        end: float | None,
        *,
        polled: bool,
    ) -> list[tuple[int, ToolResult | BaseException]]:
        """The next result, or the calls whose time is over; nothing if it is time to look around."""
        ends = [job.end for job in running.values() if job.end is not None]
        due = min([*ends, *([] if end is None else [end])], default=None)
        # A wait without a limit cannot be interrupted by Ctrl-C on Windows.
        pause = 1.0 if due is None else max(0.0, due - self._clock.now())
        try:
            return [done.get(timeout=min(pause, _POLL) if polled else pause)]
        except queue.Empty:
            now = self._clock.now()
            late = [
                (i, job) for i, job in running.items() if job.end is not None and job.end <= now
            ]
            return [(index, self._late(job)) for index, job in late]

    def _late(self, job: _Job) -> ToolResult:
        job.abandon()
        text = (
            f"{job.tool.name} took longer than {job.timeout:g} s and was left; "
            "it may still be at work"
        )
        return ToolResult(job.call, text, "failed", seconds=job.timeout or 0.0)

    def _result(self, job: _Job, context: ToolContext) -> ToolResult:
        started = self._clock.now()
        value: Any = None
        outcome: Outcome = "ok"
        try:
            value = job.tool.bind(job.arguments, context)()
            if inspect.isawaitable(value):
                value = _awaited(value, job)
            content = self._text(value)
        except ToolRetry as error:
            content, outcome = str(error) or "try again", "retry"
        except ToolPending as error:
            content, outcome = str(error) or "a person must decide", "pending"
        except Exception as error:  # noqa: BLE001 - whatever a tool raises, the model is told
            return self._failure(job.call, error, self._clock.now() - started)
        seconds = self._clock.now() - started
        return ToolResult(
            job.call, self._cut(content), outcome, seconds, value if outcome == "ok" else None
        )

    def _failure(self, call: ToolCall, error: Exception, seconds: float = 0.0) -> ToolResult:
        log.debug("tool %s failed", call.name, exc_info=error)
        said = _one_line(error)
        if isinstance(error, ToolFailed):
            said = said.removeprefix("ToolFailed: ")
        return ToolResult(call, said, "failed", seconds)

    def _text(self, value: Any) -> str:
        """What the model reads of a value."""
        if value is None:
            return "done"  # some servers refuse an empty message
        if isinstance(value, (bytes, bytearray, memoryview)):
            raise ToolFailed(
                "the tool returned bytes, which a model cannot read; it must return text"
            )
        try:
            plain = value if isinstance(value, str) else to_jsonable_python(value)
        except ValueError as error:  # pydantic_core's own is one
            kind = type(value).__name__
            raise ToolFailed(f"the tool returned {kind}, which JSON cannot say: {error}") from error
        return plain if isinstance(plain, str) else json.dumps(plain, ensure_ascii=False)

    def _cut(self, text: str) -> str:
        text = text.encode("utf-8", "replace").decode()  # half a surrogate pair could not be sent
        most = self.max_result_chars
        if len(text) <= most:
            return text
        return f"{text[:most]}\n[cut: the first {most} of {len(text)} characters]"


def _awaited(value: Any, job: _Job) -> Any:
    """Run a coroutine to its end, here."""
    import asyncio

    async def main() -> Any:
        task = asyncio.ensure_future(value)
        loop = asyncio.get_running_loop()
        job.stop = functools.partial(loop.call_soon_threadsafe, task.cancel)
        if job.context is not None and job.context.cancelled.is_set():
            task.cancel()  # it was given up before it could be stopped
        return await task

    try:
        return asyncio.run(main())
    except asyncio.CancelledError:
        raise ToolFailed("the tool was cancelled") from None


def _default(parameter: inspect.Parameter) -> dict[str, Any]:
    return {} if parameter.default is parameter.empty else {"default": parameter.default}


def _seconds(whose: str, timeout: Any) -> float | None:
    if timeout is None:
        return None
    real = isinstance(timeout, (int, float)) and not isinstance(timeout, bool)
    if not real or not 0 < timeout < threading.TIMEOUT_MAX:
        raise LLMConfigError(f"timeout of {whose} is {timeout!r}; give seconds above 0, or None")
    return float(timeout)


def _unwrapped(arguments: str) -> str:
    text = arguments.strip()
    if text.startswith('"'):
        with suppress(ValueError):
            text = json.loads(text).strip()
    return "{}" if text in ("", "null") else text


def _bounded(text: str, most: int = _MAX_ERROR_CHARS) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _one_line(error: BaseException) -> str:
    """`Type: message`."""
    try:
        said = " ".join(str(error).split())
    except Exception:  # noqa: BLE001 - an error that cannot say what it is still has a name
        said = ""
    text = f"{type(error).__name__}: {said}" if said else type(error).__name__
    return _bounded(text).encode("utf-8", "replace").decode()


def _documented(text: str) -> tuple[str, dict[str, str]]:
    """The description in a docstring, and those of the parameters by name."""
    try:
        import docstring_parser
    except ImportError:
        return text, {}
    try:
        parsed = docstring_parser.parse(text)
    except Exception:  # noqa: BLE001 - 0.18 raises IndexError for ":param: x", and who knows what else
        return text, {}
    told = "\n\n".join(part for part in (parsed.short_description, parsed.long_description) if part)
    described = {
        each.arg_name: " ".join(each.description.split())
        for each in parsed.params
        if each.description
    }
    return told, described
