"""Agent: a model, tools, and the loop of turns between them, which always ends."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from decimal import Decimal
from typing import Any, Generic, Protocol, TypeVar

from agents.store import ConflictError
from agents.tools import Tool, Toolbox, ToolContext, ToolFailed
from agents.types import (
    AgentCancelledError,
    AgentEvent,
    AgentLimitError,
    AgentLoopError,
    ChatCompletionResponse,
    EventType,
    Message,
    Pending,
    RunResult,
    ToolCall,
    ToolResult,
    Turn,
)
from LLM import (
    LLM,
    Budget,
    CancelScope,
    Clock,
    InvalidOutputError,
    LLMBudgetError,
    LLMCancelledError,
    LLMConfigError,
    LLMError,
    LLMOutputError,
    LLMTimeoutError,
    Output,
)

T = TypeVar("T")

# How the answer is given when it must be of a type: as the call of a tool that every dialect knows.
FINAL = "final_answer"
_FINAL_SAYS = "Give the final answer of the whole task. Call it alone, once you have what it takes."
_CALL_FINAL = "Give your answer by calling the tool final_answer. {problem}"
MAX_OUTPUT_ATTEMPTS = 3

# The same calls with the same results: three times, or two rounds of a longer circle. Two in a row may be
# a look whether something has changed.
REPEATS = 3
LONGEST_CIRCLE = 3
_IN_CIRCLES = (
    "You have made the same tool calls with the same results several times. Do something else, or "
    "answer with what you know."
)


class Journal(Protocol):
    """Where a run is written down, step by step; the journal of an `agents.store.Store` is one."""

    def begin(self, run_id: str, agent: str, data: Mapping[str, Any]) -> None: ...
    def append(self, run_id: str, number: int, kind: str, payload: Mapping[str, Any]) -> None: ...
    def get(self, run_id: str) -> Any: ...
    def steps(self, run_id: str) -> Sequence[Any]: ...
    def finish(self, run_id: str, status: str) -> None: ...


class Cancel:
    """Ends a run from outside: give it to `run`, and call `cancel()` from any thread or signal handler."""

    def __init__(self, event: threading.Event | None = None) -> None:
        self.event = event or threading.Event()  # that of the outer run, if there is one
        self._callbacks: list[Callable[[], object]] = []

    def cancel(self) -> None:
        """The run ends with `AgentCancelledError` as soon as it can: a stream of the model is cut off."""
        self.event.set()
        for callback in list(self._callbacks):
            callback()

    @contextmanager
    def watching(self, callback: Callable[[], object]) -> Iterator[None]:
        """Call back when it is cancelled inside the block, at once if it was before."""
        self._callbacks.append(callback)
        try:
            if self.event.is_set():
                callback()
            yield
        finally:
            self._callbacks.remove(callback)


class Agent(Generic[T]):
    """A model with tools that goes on until it has an answer, or until a limit ends it.

    Plain and without state of its own: runs may go on in many threads at once.

    Args:
        llm: the client that asks the model.
        tools: functions, `Tool`s or a `Toolbox`.
        instructions: the system message.
        output_type: what the answer must be: a pydantic model, a dataclass, `list[int]` …; left out: text.
        name: for stores, handoffs and messages.
        max_turns: answers of the model, at most; a run that needs more ends in `AgentLimitError`.
        max_tool_calls: tool calls of a run, at most; `None`: no limit.
        max_total_tokens: tokens of a run, prompts and answers together; `None`: no limit.
        budget: US dollars of a run, or a `Budget` that several runs share; `None`: no limit.
        deadline: seconds of a run; `None`: no limit.
        store: a store whose journal keeps each step, so that a run survives a crash; see `resume`.
        tool_choice: as the model takes it: `"auto"`, `"required"`, `"none"` or a function.
        call: what else a call takes: `model=`, `temperature=`, `max_tokens=` of one answer …

    Raises:
        LLMConfigError: a limit is not above 0, two tools share a name, or a tool cannot be described.
    """

    def __init__(
        self,
        llm: LLM,
        *,
        tools: Sequence[Any] | Toolbox = (),
        instructions: str | None = None,
        output_type: type[T] | None = None,
        name: str = "agent",
        max_turns: int = 10,
        max_tool_calls: int | None = None,
        max_total_tokens: int | None = None,
        budget: Budget | Decimal | float | str | None = None,
        deadline: float | None = None,
        store: Any = None,
        tool_choice: Any = None,
        clock: Clock | None = None,
        **call: Any,
    ) -> None:
        for limit, value in (
            ("max_turns", max_turns),
            ("max_tool_calls", max_tool_calls),
            ("max_total_tokens", max_total_tokens),
            ("deadline", deadline),
        ):
            if value is not None and (isinstance(value, bool) or not value > 0):
                raise LLMConfigError(
                    f"{limit} is {value!r}; it must be above 0, or None for no limit"
                )
        self.llm = llm
        self.name = name
        self.instructions = instructions
        self.output_type = output_type
        self.max_turns = max_turns
        self.max_tool_calls = max_tool_calls
        self.max_total_tokens = max_total_tokens
        self.budget = budget
        self.deadline = deadline
        self.tool_choice = tool_choice
        self.toolbox = tools if isinstance(tools, Toolbox) else Toolbox(tools)
        self._clock = clock or Clock()
        self._journal: Journal | None = getattr(store, "journal", store)
        self._call = call
        self._output = None if output_type is None else Output(output_type)
        if FINAL in self.toolbox:
            raise LLMConfigError(f"a tool is called {FINAL}, as the answer's own is; rename it")

    def run(
        self,
        prompt: str | Sequence[Message | Mapping[str, Any]],
        *,
        history: Sequence[Message | Mapping[str, Any]] = (),
        deps: Any = None,
        cancel: Cancel | None = None,
        run_id: str | None = None,
    ) -> RunResult[T]:
        """Go on until there is an answer.

        Args:
            prompt: what the user says; or messages.
            history: what was said before (`result.messages` of an earlier run).
            deps: handed to tools that take a `ToolContext`.
            cancel: ends it from outside.
            run_id: its name in the store; left out: a new one.

        Returns:
            A `RunResult`; one that is `paused` waits for a person, see `resume`.

        Raises:
            AgentLimitError: a limit was reached.
            AgentLoopError: the model goes in circles, also after it was told.
            AgentCancelledError: `cancel` said so.
            LLMError: the model cannot be asked, or its answer is not of the `output_type`. Every error has
                `.result`: everything so far.
        """
        return _last(self._turns(self._begin(prompt, history, deps, cancel, run_id)))

    def iter(
        self,
        prompt: str | Sequence[Message | Mapping[str, Any]],
        *,
        history: Sequence[Message | Mapping[str, Any]] = (),
        deps: Any = None,
        cancel: Cancel | None = None,
        run_id: str | None = None,
    ) -> Iterator[Turn]:
        """The same, turn by turn: a `Turn` for each answer of the model, when its tools have run."""
        events = self._turns(self._begin(prompt, history, deps, cancel, run_id))
        return (event.turn for event in events if event.turn is not None)

    def stream(
        self,
        prompt: str | Sequence[Message | Mapping[str, Any]],
        *,
        history: Sequence[Message | Mapping[str, Any]] = (),
        deps: Any = None,
        cancel: Cancel | None = None,
        run_id: str | None = None,
    ) -> Iterator[AgentEvent]:
        """The same as events: text as it comes, tool calls, their results, turns, and last the result."""
        run = self._begin(prompt, history, deps, cancel, run_id)
        return self._turns(run, streams=True)

    def resume(
        self,
        run_id: str,
        *,
        approvals: Mapping[str, bool] | None = None,
        deps: Any = None,
        cancel: Cancel | None = None,
    ) -> RunResult[T]:
        """Go on with a run that broke off or is paused; nothing that was answered is asked again.

        Args:
            run_id: of `RunResult.run_id`, or as given to `run`.
            approvals: what a person decided, by the id of a call in `RunResult.pending`: `True` runs the
                tool, `False` tells the model that it may not.

        Raises:
            LLMConfigError: there is no store or no such run, or an approval is for a call that does not
                wait, or is neither `True` nor `False`.
            ConflictError: another process goes on with the same run.
        """
        if self._journal is None:
            raise LLMConfigError("there is no store to resume from; give the Agent a store=")
        begun = self._journal.get(run_id)
        if begun is None:
            raise LLMConfigError(f"there is no run {run_id!r} in the store")
        run = _Run(self, deps, cancel, run_id)
        run.restore("begin", begun.data)
        for step in self._journal.steps(run_id):
            run.apply(step.kind, step.payload)
        return _last(self._turns(run, approvals=approvals or {}))

    def as_tool(self, name: str | None = None, description: str | None = None) -> Tool[..., Any]:
        """This agent as a tool of another one: it gets a task as text, and its answer is the result.

        Args:
            name: left out: the agent's.
            description: what the other model is told of it; left out: the first line of the instructions.
        """

        def ask(task: str, context: ToolContext) -> Any:
            result = self.run(task, cancel=Cancel(context.cancelled))
            if result.paused:
                names = ", ".join(waiting.call.name for waiting in result.pending)
                raise ToolFailed(
                    f"{self.name} needs a person's decision ({names}), and cannot get it here"
                )
            return result.output

        told = description or (self.instructions or self.name).splitlines()[0]
        return Tool(
            ask, name=name or self.name, description=told, effect="idempotent", timeout=None
        )

    def _begin(
        self,
        prompt: Any,
        history: Sequence[Any],
        deps: Any,
        cancel: Cancel | None,
        run_id: str | None,
    ) -> _Run:
        said = _said(prompt)
        before = [_message(message) for message in history]
        if self.instructions:
            # Those of the agent that the history is of may be others.
            before = [message for message in before if message.role != "system"]
            before.insert(0, Message(role="system", content=self.instructions))
        messages = {"messages": [_dump(message) for message in (*before, *said)]}
        run = _Run(self, deps, cancel, run_id or self._clock.new_id())
        if self._journal is not None:
            self._journal.begin(run.id, self.name, messages)
        run.restore("begin", messages)
        return run

    # The loop. Nothing is yielded inside a budget: a generator's block would hold its caller too.

    def _turns(
        self,
        run: _Run,
        *,
        streams: bool = False,
        approvals: Mapping[str, bool] | None = None,
    ) -> Iterator[AgentEvent]:
        try:
            if run.unjudged:  # it broke off between a turn and what was to follow from it
                self._judge(run, run.turns[-1])
            if approvals is not None and run.output is None:
                self._take_up(run, approvals)
            while run.output is None:
                if run.answer is None:
                    self._check(run)
                    answer = yield from self._ask(run, streams)
                    run.answered(answer, self._clock.new_id)
                results = yield from self._call_tools(run)
                if run.pending:
                    waiting = [{"id": p.call.id, "reason": p.reason} for p in run.pending]
                    run.write("paused", {"pending": waiting})
                    run.finish("paused")
                    assert run.answer is not None  # noqa: S101 - whose calls wait
                    yield AgentEvent(
                        "turn", turn=Turn(len(run.turns) + 1, run.answer, tuple(results))
                    )
                    yield AgentEvent("result", result=run.result)
                    return
                turn = run.end_turn()
                yield AgentEvent("turn", turn=turn)
                self._judge(run, turn)
            run.finish("finished")
            yield AgentEvent("result", result=run.result)
        except LLMError as error:
            error.result = run.result  # type: ignore[attr-defined]  # any error takes a note
            if not isinstance(error, ConflictError):  # the run is another's now
                with suppress(LLMError):  # of the store; the first error is the one to tell
                    run.finish("failed")
            raise

    def _take_up(self, run: _Run, approvals: Mapping[str, bool]) -> None:
        """Go on with a run of before: what a person decided, what it has cost so far."""
        waiting = {pending.call.id for pending in run.pending}
        for call_id, yes in approvals.items():
            if call_id not in waiting:
                raise LLMConfigError(f"no call {call_id!r} of this run waits for a decision")
            if not isinstance(yes, bool):
                raise LLMConfigError(f"approvals[{call_id!r}] is {yes!r}; give True or False")
        run.finish("running")
        for call_id, yes in approvals.items():
            run.write("decision", {"id": call_id, "yes": yes})
        run.pending = ()
        cost = run.result.cost
        if run.budget is not None and run.budget is not self.budget and cost is not None:
            try:
                run.budget.reserve(cost, 0).settle(cost, 0)
            except LLMBudgetError as error:
                problem = f"{self.name} had spent its budget before it was resumed: {error}"
                raise AgentLimitError(problem, limit="cost") from error

    def _check(self, run: _Run) -> None:
        """Whether the model may be asked once more."""
        if run.cancel is not None and run.cancel.event.is_set():
            raise AgentCancelledError(f"{self.name} was cancelled")
        used = sum(
            turn.response.usage.total_tokens or 0 for turn in run.turns if turn.response.usage
        )
        for limit, reached, most, name in (
            ("turns", len(run.turns), self.max_turns, "max_turns"),
            ("tokens", used, self.max_total_tokens, "max_total_tokens"),
        ):
            if most is not None and reached >= most:
                raise AgentLimitError(
                    f"{self.name} has no answer after {reached:,} {limit}, its limit; raise {name}, "
                    "or ask for less",
                    limit=limit,
                )

    def _left(self, run: _Run) -> float | None:
        """Seconds that are left of the run."""
        if run.ends_at is None:
            return None
        left = run.ends_at - self._clock.now()
        if left <= 0:
            raise AgentLimitError(
                f"{self.name} has no answer after {self.deadline} s, its deadline", limit="deadline"
            )
        return left

    def _ask(self, run: _Run, streams: bool) -> Generator[AgentEvent, None, ChatCompletionResponse]:
        """One answer of the model, in pieces if they are wanted; its value is the response."""
        request = self._request(run)
        try:
            if not streams and run.cancel is None:
                with self.llm.budget(run.budget) if run.budget else nullcontext():
                    whole: ChatCompletionResponse = self.llm.chat_completion(
                        run.messages, **request
                    )
                    return whole
            scope = CancelScope()  # also while it is not open yet: a model may think for long
            watched: AbstractContextManager[None] = nullcontext()
            if run.cancel is not None:
                watched = run.cancel.watching(scope.cancel)
            with watched:
                with scope, self.llm.budget(run.budget) if run.budget else nullcontext():
                    stream = self.llm.stream(run.messages, **request)
                with stream:
                    for event in stream:
                        if streams and event.type == EventType.TEXT_DELTA:
                            yield AgentEvent("text", text=str(event.text_delta))
                        elif streams and event.type == EventType.REASONING_DELTA:
                            yield AgentEvent("reasoning", text=event.reasoning_delta or "")
                    response: ChatCompletionResponse = stream.response
                    return response
        except LLMCancelledError as error:
            if run.cancel is None or not run.cancel.event.is_set():
                raise
            raise AgentCancelledError(f"{self.name} was cancelled") from error
        except LLMBudgetError as error:
            if run.budget is None:
                raise
            raise AgentLimitError(
                f"{self.name} reached its budget: {error}", limit="cost"
            ) from error
        except LLMTimeoutError as error:
            if error.clock == "deadline":
                self._left(run)  # if it is the run's own
            raise

    def _request(self, run: _Run) -> dict[str, Any]:
        tools, choice = self.toolbox.schemas, self.tool_choice
        if self._output is not None:
            function = {
                "name": FINAL,
                "description": _FINAL_SAYS,
                "parameters": self._output.schema,
            }
            tools = [*tools, {"type": "function", "function": function}]
            if choice is None and (not len(self.toolbox) or run.output_attempts):
                choice = {"type": "function", "function": {"name": FINAL}}
        request = {"tools": tools or None, "tool_choice": choice if tools else None, **self._call}
        left = self._left(run)
        return request if left is None else {**request, "deadline": left}

    def _call_tools(self, run: _Run) -> Generator[AgentEvent, None, list[ToolResult]]:
        """Run the calls of the answer that have no result yet; its value are all results so far."""
        final = FINAL if self._output is not None else None
        calls = [call for call in run.calls if call.name != final and call.id not in run.results]
        if not calls:
            return []
        if self.max_tool_calls is not None and run.tool_calls + len(calls) > self.max_tool_calls:
            raise AgentLimitError(
                f"{self.name} wants more than {self.max_tool_calls} tool calls, its limit",
                limit="tool_calls",
            )
        unknown = [call for call in calls if self._is_unknown(run, call)]
        ready = [call for call in calls if call not in unknown]
        for call in ready:
            yield AgentEvent("tool_call", tool_call=call)
        left = self._left(run)
        with ExitStack() as bounds:  # for what the tools ask of a model
            bounds.enter_context(self.llm.deadline(left))
            if run.budget is not None:
                bounds.enter_context(self.llm.budget(run.budget))
            results = self.toolbox.run(
                ready,
                approvals=dict(run.decisions),
                deps=run.deps,
                cancel=run.cancel.event if run.cancel is not None else None,
                deadline=left,
                on_start=lambda call: self._note_start(run, call),
                on_result=run.took,
            )
        for result in results:
            yield AgentEvent("tool_result", tool_result=result)
        waiting = [Pending(result.call) for result in results if result.outcome == "pending"]
        run.pending = (*waiting, *(Pending(call, "unknown") for call in unknown))
        return [
            *run.results.values(),
            *(result for result in results if result.outcome == "pending"),
        ]

    def _effect(self, call: ToolCall) -> str:
        tool = self.toolbox.get(call.name)
        return tool.effect if tool is not None else "read"

    def _note_start(self, run: _Run, call: ToolCall) -> None:
        if self._effect(call) == "once":
            run.write("started", {"id": call.id})

    def _is_unknown(self, run: _Run, call: ToolCall) -> bool:
        """Whether it was under way when the run broke off, and may not be run again just so."""
        again = call.id in run.started and self._effect(call) == "once"
        return again and (call.id or "") not in run.decisions

    def _judge(self, run: _Run, turn: Turn) -> None:
        """Whether the answer is the last one; if not, what the model has to be told."""
        response = turn.response
        finals = [call for call in response.tool_calls if call.name == FINAL]
        final = finals[0] if finals else None
        if self._output is None:
            if not response.tool_calls:
                run.output = (response.text,)
            else:
                self._watch_for_circles(run)
            return
        if final is None and response.tool_calls:
            self._watch_for_circles(run)
            return
        for reason, found in (("cut", "length"), ("refused", "content_filter")):
            if response.finish_reason == found:
                raise self._no_output(f"the answer was {reason}", reason, run, response.text)
        text = final.arguments if final is not None else response.text
        try:
            output = self._output.read(text)
        except InvalidOutputError as error:
            attempts, told = run.output_attempts + 1, str(error)
            if attempts >= MAX_OUTPUT_ATTEMPTS:
                problem = f"no valid answer in {attempts} attempts: {told}"
                raise self._no_output(problem, "invalid", run, text) from None
            for call in finals:
                if call.id not in run.results:
                    run.write("result", {"id": call.id, "content": told, "outcome": "retry"})
            run.write(
                "told",
                {
                    "text": None if finals else _CALL_FINAL.format(problem=told),
                    "attempts": attempts,
                },
            )
            return
        for call in finals:  # so that the messages can be gone on with
            if call.id not in run.results:
                run.write("result", {"id": call.id, "content": "done", "outcome": "ok"})
        run.output = (output,)

    def _no_output(self, problem: str, reason: str, run: _Run, text: str) -> LLMOutputError:
        result = run.result
        return LLMOutputError(
            f"{self.name}: {problem}",
            reason=reason,
            text=text,
            usage=result.usage,
            cost=result.cost,
        )

    def _watch_for_circles(self, run: _Run) -> None:
        if not _goes_in_circles(run.rounds):
            return
        if run.warned:
            raise AgentLoopError(
                f"{self.name} makes the same tool calls with the same results again and again, also "
                "after it was told"
            )
        run.write("told", {"text": _IN_CIRCLES, "circles": True})


class _Run:
    """One run: what was said and done so far. All of it goes through `write`, and so does a resumed one."""

    def __init__(self, agent: Agent[Any], deps: Any, cancel: Cancel | None, run_id: str) -> None:
        self._agent = agent
        self.id = run_id
        self.deps = deps
        self.cancel = cancel
        clock = agent._clock
        self.ends_at = None if agent.deadline is None else clock.now() + agent.deadline
        self.budget: Budget | None = None
        if agent.budget is not None:
            own = not isinstance(agent.budget, Budget)
            self.budget = Budget(agent.budget, clock=clock) if own else agent.budget  # type: ignore[arg-type,assignment]  # as `own` says
        self.messages: list[Message] = []
        self.turns: list[Turn] = []
        self.costs: list[Decimal | None] = []
        self.answer: ChatCompletionResponse | None = None
        self.results: dict[str | None, ToolResult] = {}
        self.started: set[str | None] = set()
        self.decisions: dict[str, bool] = {}
        self.pending: tuple[Pending, ...] = ()
        self.rounds: list[Any] = []
        self.tool_calls = 0
        self.warned = False
        self.output: tuple[Any] | None = None  # in a tuple: it may be None itself
        self.output_attempts = 0
        self.unjudged = False  # a turn is over, and what follows from it is not decided
        self._number = 0

    def answered(self, response: ChatCompletionResponse, new_id: Callable[[], str]) -> None:
        """The model answered."""
        self.write("answer", _answer(response, new_id))
        # The response itself knows more than what was written down: its latency, its request.
        self.answer = response
        self.messages[-1] = response.choices[0].message

    def write(self, kind: str, payload: Mapping[str, Any]) -> None:
        """A step: written down first, then used."""
        journal = self._agent._journal
        if journal is not None:
            journal.append(self.id, self._number, kind, payload)
        self.apply(kind, payload)

    def apply(self, kind: str, payload: Mapping[str, Any]) -> None:
        """The next step, just written or read again."""
        self._number += 1
        self.restore(kind, payload)
        # After these the loop has something to decide; every other step is followed by the next one.
        self.unjudged = self.answer is None and kind in ("turn", "result")

    def restore(self, kind: str, payload: Mapping[str, Any]) -> None:
        """What a step does to the run."""
        if kind == "begin":
            self.messages += [Message.model_validate(message) for message in payload["messages"]]
        elif kind == "answer":
            self.answer = ChatCompletionResponse.model_validate(payload["response"])
            cost = payload.get("cost")
            self.costs.append(None if cost is None else Decimal(cost))
            self.messages.append(self.answer.choices[0].message)
            # An id means a call of this answer only: servers use them again.
            self.results, self.started, self.decisions = {}, set(), {}
        elif kind == "started":
            self.started.add(payload["id"])
            self.decisions.pop(payload["id"], None)  # it was for this once
        elif kind == "held":
            self.started.discard(payload["id"])
        elif kind == "paused":
            reasons = {waiting["id"]: waiting["reason"] for waiting in payload["pending"]}
            self.pending = tuple(
                Pending(call, reasons[call.id]) for call in self.calls if call.id in reasons
            )
        elif kind == "decision":
            self.decisions[payload["id"]] = payload["yes"]
            self.pending = tuple(p for p in self.pending if p.call.id != payload["id"])
        elif kind == "result":
            self._result(payload)
        elif kind == "turn":
            self._turn()
        elif kind == "told":
            self.output_attempts = payload.get("attempts", self.output_attempts)
            if payload["text"] is not None:
                self.messages.append(Message(role="user", content=payload["text"]))
            if payload.get("circles"):
                self.warned = True
                self.rounds.clear()

    @property
    def calls(self) -> list[ToolCall]:
        return self.answer.tool_calls if self.answer is not None else []

    def took(self, result: ToolResult) -> None:
        """A tool's result is there."""
        if result.outcome == "pending":
            if (
                result.call.id in self.started
            ):  # the tool itself asked for a person, and did nothing
                self.write("held", {"id": result.call.id})
        else:
            values = {"id": result.call.id, "content": result.content, "outcome": result.outcome}
            self.write("result", {**values, "seconds": result.seconds})
            # What the tool returned, for the program; it is not written down.
            self.results[result.call.id] = result

    def end_turn(self) -> Turn:
        """The answer and its results are complete."""
        self.write("turn", {})
        return self.turns[-1]

    def _result(self, payload: Mapping[str, Any]) -> None:
        calls = self.calls or (self.turns[-1].response.tool_calls if self.turns else [])
        call = next(call for call in calls if call.id == payload["id"])
        seconds = payload.get("seconds", 0.0)
        result = ToolResult(call, payload["content"], payload["outcome"], seconds)
        self.results[call.id] = result
        if self.answer is None:  # of the final answer, which is judged when the turn is over
            self.messages.append(result.message)
        else:
            self.tool_calls += 1

    def _turn(self) -> None:
        assert self.answer is not None  # noqa: S101 - a turn has an answer
        results = [self.results[call.id] for call in self.calls if call.id in self.results]
        self.messages += [result.message for result in results]
        self.turns.append(Turn(len(self.turns) + 1, self.answer, tuple(results)))
        if results:
            self.rounds.append([(r.call.name, _canonical(r.call), r.content) for r in results])
        self.answer = None
        self.results = {}

    def _closed_messages(self) -> list[Message]:
        """The messages, each call of the last answer answered: no server takes an open one."""
        messages, answered = list(self.messages), set()
        for last in reversed(messages):
            if last.role == "assistant":
                break
            answered.add(last.tool_call_id)
        else:
            return messages
        open_calls = [call for call in last.tool_calls or [] if call.id not in answered]
        texts = {p.call.id: "not run: it waits for a person's decision" for p in self.pending}
        for call in open_calls:
            text = texts.get(call.id, "not run: the run ended before")
            result = self.results.get(call.id) or ToolResult(call, text, "failed")
            messages.append(result.message)
        return messages

    def finish(self, status: str) -> None:
        journal = self._agent._journal
        if journal is not None:
            journal.finish(self.id, status)

    @property
    def result(self) -> RunResult[Any]:
        """Everything so far."""
        responses = [turn.response for turn in self.turns]
        if self.answer is not None:
            responses.append(self.answer)
        usages = [response.usage for response in responses]
        known = [usage for usage in usages if usage is not None]
        cost = None
        if self.costs and None not in self.costs:
            cost = sum((cost for cost in self.costs if cost is not None), Decimal(0))
        return RunResult(
            output=self.output[0] if self.output else None,
            messages=tuple(self._closed_messages()),
            turns=tuple(self.turns),
            usage=sum(known[1:], known[0]) if known and len(known) == len(usages) else None,
            cost=cost,
            pending=self.pending,
            run_id=self.id,
        )


def _said(prompt: Any) -> list[Message]:
    """What the user says: text, content parts, or messages."""
    parts = isinstance(prompt, (list, tuple)) and bool(prompt)
    if parts and all(isinstance(part, Mapping) and "role" not in part for part in prompt):
        prompt = Message(role="user", content=[dict(part) for part in prompt])
    if isinstance(prompt, str) and prompt:
        prompt = Message(role="user", content=prompt)
    if isinstance(prompt, Message):
        return [prompt]
    if not prompt or isinstance(prompt, Mapping) or not isinstance(prompt, Iterable):
        raise LLMConfigError(
            f"prompt is {prompt!r:.60}; say what the agent is to do, as text or as messages"
        )
    return [_message(message) for message in prompt]


def _last(events: Iterable[AgentEvent]) -> RunResult[Any]:
    result = None
    for event in events:
        result = event.result or result
    assert result is not None  # noqa: S101 - a run ends with a result or an error
    return result


def _message(message: Message | Mapping[str, Any]) -> Message:
    if isinstance(message, Message):
        return message
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise LLMConfigError(
            f"a message is a Message, or a dict with a role and content, not {message!r:.60}"
        )
    return Message.model_validate(dict(message))


def _dump(value: Any) -> dict[str, Any]:
    dumped: dict[str, Any] = value.model_dump(mode="json", exclude_none=True)
    return dumped


def _answer(response: ChatCompletionResponse, new_id: Callable[[], str]) -> dict[str, Any]:
    """An answer as a step. Calls without an id of their own get one: results are matched by it."""
    seen: set[str | None] = {None, ""}
    for call in response.tool_calls:
        if call.id in seen:
            call.id = f"call_{new_id()}"
        seen.add(call.id)
    cost = response.cost
    return {
        "response": response.model_dump(mode="json"),
        "cost": None if cost is None else str(cost),
    }


def _canonical(call: ToolCall) -> str:
    try:
        return json.dumps(json.loads(call.arguments or "{}"), sort_keys=True)
    except (ValueError, RecursionError):
        return call.arguments


def _goes_in_circles(rounds: Sequence[Any]) -> bool:
    """Whether the last rounds repeat: one three times, or a circle of two or three twice."""
    for length in range(1, LONGEST_CIRCLE + 1):
        times = REPEATS if length == 1 else 2
        last = rounds[-length * times :]
        if len(last) == length * times and all(
            last[index] == last[index % length] for index in range(len(last))
        ):
            return True
    return False
