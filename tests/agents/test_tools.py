"""Tools: what a function's signature tells a model, and what comes of the calls that a model makes."""

# mypy: disable-error-code="untyped-decorator"

import asyncio
import contextvars
import enum
import functools
import json
import logging
import sys
import threading
import time
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from typing import Annotated, Any, Literal, Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import AfterValidator, BaseModel, Field

from agents.calculator import calculator
from agents.tools import (
    Tool,
    Toolbox,
    ToolContext,
    ToolFailed,
    ToolPending,
    ToolRetry,
    tool,
)
from agents.types import Message, ToolCall
from LLM import LLM, LLMConfigError, LLMTimeoutError
from LLM.testing import LocalServer
from tests.engine.llama_server import LlamaServer
from tests.engine.tiny_model import write_tiny_model
from tests.fakes import FakeClock, patiently, within


def call_of(name, arguments="{}", call_id="c1"):
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return ToolCall(id=call_id, function={"name": name, "arguments": text})


def run_one(function, arguments="{}", *, box=None, **options):
    made = function if isinstance(function, Tool) else tool(function)
    (result,) = Toolbox([made], **(box or {})).run([call_of(made.name, arguments)], **options)
    return result


@tool(effect="read")
def weather(city: str, unit: Literal["C", "F"] = "C") -> str:
    """Tell the weather.

    For today only.

    Args:
        city: the name of the city,
            in English
        unit: of the temperature

    Returns:
        a sentence
    """
    return f"21 {unit} in {city}"


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Address(BaseModel):
    street: str
    number: int | None = None


@dataclass
class Point:
    x: int
    y: int = 0


DOCSTRING_PIECES = [
    *("Args:", "\n", "    ", "a:", ":param", " a", ":", "Parameters\n----------", "x", "Returns:"),
    *("Raises:", "----", "@param a", ":returns:", "(int, optional)", "Example:", "a : int", "\n\n"),
]


# The schema


def test_a_function_becomes_the_schema_that_a_model_reads():
    assert weather.schema == {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tell the weather.\n\nFor today only.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "the name of the city, in English"},
                    "unit": {
                        "type": "string",
                        "enum": ["C", "F"],
                        "default": "C",
                        "description": "of the temperature",
                    },
                },
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }


def test_the_same_tool_has_the_form_of_the_messages_api():
    form = weather.messages_schema
    assert form["name"] == "weather"
    assert form["input_schema"] == weather.parameters
    assert form["description"].startswith("Tell the weather.")


def test_a_schema_that_is_changed_changes_nothing_else():
    weather.schema["function"]["parameters"]["properties"].clear()
    assert set(weather.parameters["properties"]) == {"city", "unit"}


def test_a_tool_is_still_the_function():
    assert weather("Oslo", unit="F") == "21 F in Oslo"
    assert weather.__name__ == "weather"
    assert repr(weather) == "Tool(weather: city, unit)"


@pytest.mark.parametrize(
    "docstring",
    [
        "Add.\n\nArgs:\n    a: the first\n    b (int): the second",
        "Add.\n\nParameters\n----------\na : int\n    the first\nb : int\n    the second",
        "Add.\n\n:param a: the first\n:param int b: the second\n:returns: the sum",
    ],
    ids=["google", "numpy", "rest"],
)
def test_every_style_of_docstring_describes_the_parameters(docstring):
    def add(a: int, b: int) -> int:
        return a + b

    add.__doc__ = docstring
    made = tool(add)
    assert made.description == "Add."
    said = {name: p["description"] for name, p in made.parameters["properties"].items()}
    assert said == {"a": "the first", "b": "the second"}


def test_without_the_extra_the_whole_docstring_is_the_description(monkeypatch):
    monkeypatch.setitem(sys.modules, "docstring_parser", None)
    made = tool(weather.function)
    assert made.description.startswith("Tell the weather.")
    assert "city: the name" in made.description


def test_a_function_without_a_docstring_has_no_description():
    def bare(a: int) -> None: ...

    assert "description" not in tool(bare).schema["function"]
    assert "description" not in tool(bare).messages_schema


@given(st.text() | st.lists(st.sampled_from(DOCSTRING_PIECES)).map("".join))
def test_no_docstring_breaks_a_tool(docstring):
    def f(a: int = 0) -> None: ...

    f.__doc__ = docstring
    assert "a" in tool(f).parameters["properties"]


def test_types_say_what_they_take():
    def f(
        color: Color,
        address: Address,
        points: list[Point],
        maybe: Optional[int],  # noqa: UP045
        tags: dict[str, float],
        when: date,
        many: Annotated[int, Field(ge=1, le=9, description="how many")] = 3,
        schema: str = "x",
        _copy: bool = False,
    ) -> str:
        """Do it.

        Args:
            many: said twice
            when: the day
        """
        return repr((color, address, points, maybe, tags, when, many, schema, _copy))

    made = tool(f)
    properties = made.parameters["properties"]
    assert list(properties) == [
        *"color address points maybe tags when many schema _copy".split(),
    ]
    assert made.parameters["required"] == "color address points maybe tags when".split()
    many = {"type": "integer", "minimum": 1, "maximum": 9, "default": 3, "description": "how many"}
    assert properties["many"] == many
    assert properties["maybe"]["anyOf"] == [{"type": "integer"}, {"type": "null"}]
    assert made.parameters["$defs"]["Address"]["required"] == ["street"]
    assert '"title": "Street"' not in json.dumps(made.parameters)

    given = {
        "color": "red",
        "address": {"street": "Main"},
        "points": [{"x": 1}],
        "maybe": None,
        "tags": {"a": 1},
        "when": "2026-11-21",
        "_copy": True,
    }
    result = run_one(made, given)
    values = (Color.RED, Address(street="Main"), [Point(1)], None, {"a": 1.0}, date(2026, 11, 21))
    assert result.content == repr((*values, 3, "x", True))


def test_a_default_that_json_cannot_say_is_handed_over_as_it_is():
    missing: Any = object()

    def f(a: int = missing) -> str:
        return str(a is missing)

    assert run_one(f).content == "True"
    assert "default" not in tool(f).parameters["properties"]["a"]


def test_a_field_can_carry_the_default():
    def f(a: Annotated[int, Field(default=7)]) -> int:
        return a

    assert run_one(f).content == "7"


def test_a_bound_method_a_partial_and_a_callable_object_can_be_tools():
    class Shop:
        def __init__(self):
            self.sold = []

        def sell(self, item: str) -> str:
            """Sell it."""
            self.sold.append(item)
            return "sold"

        def __call__(self, item: str) -> str:
            return f"called {item}"

    shop = Shop()
    assert run_one(shop.sell, {"item": "hat"}).content == "sold"
    assert shop.sold == ["hat"]
    assert tool(shop.sell).description == "Sell it."
    assert run_one(tool(shop, name="shop"), {"item": "hat"}).content == "called hat"
    partial = tool(functools.partial(weather.function, unit="F"))
    assert (partial.name, partial.description[:4]) == ("weather", "Tell")
    assert run_one(partial, {"city": "Rome"}).content == "21 F in Rome"


def variadic(*numbers: int) -> None: ...
def keywords(**numbers: int) -> None: ...
def positional(number: int, /) -> None: ...
def unannotated(number) -> None: ...
def method(self, number: int) -> None: ...
def lock(number: threading.Lock) -> None: ...
def callback(good: int, number: type[threading.Thread] | Any = None, *, bad: object()) -> None: ...  # type: ignore[valid-type]
def unknown(number: "Nowhere") -> None: ...  # type: ignore[name-defined]  # noqa: F821


@pytest.mark.parametrize(
    "function, complaint",
    [
        (variadic, "'numbers' takes any number"),
        (keywords, "'numbers' takes any number"),
        (positional, "'number' is positional-only"),
        (unannotated, "'number' has no annotation"),
        (method, "'self' has no annotation.*when it is bound"),
        (lock, "'number' has a type that JSON cannot say"),
        (callback, "'bad' has a type that JSON cannot say"),
        (unknown, "Nowhere.*must be known"),
        (lambda: None, "cannot be called '<lambda>': give name="),
        (weather, "is a tool already"),
        (7, "is no function"),
    ],
)
def test_what_cannot_be_a_tool_is_refused_where_it_is_made(function, complaint):
    with pytest.raises(LLMConfigError, match=complaint):
        tool(function)


def test_a_parameter_whose_default_and_type_disagree_is_refused():
    def f(a: Annotated[int, Field(default_factory=int)] = 3) -> None: ...

    with pytest.raises(LLMConfigError, match="no schema can be made of its parameters"):
        tool(f)


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({"name": "two words"}, "cannot be called 'two words'"),
        ({"name": ""}, "cannot be called ''"),
        ({"effect": "maybe"}, "must be one of"),
        ({"timeout": 0}, "seconds above 0"),
        ({"timeout": "1"}, "seconds above 0"),
        ({"timeout": True}, "seconds above 0"),
        ({"approval": "yes"}, "True, False or a function"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, complaint):
    with pytest.raises(LLMConfigError, match=complaint):
        tool(weather.function, **options)


def test_a_function_that_does_not_say_runs_only_once():
    assert tool(weather.function).effect == "once"
    assert tool(weather.function, description="Other.").description == "Other."


# The toolbox


def test_a_toolbox_takes_tools_functions_and_toolboxes():
    def now() -> str:
        return "noon"

    box = Toolbox([now, Toolbox([weather, calculator])])
    assert [
        schema["function"]["name"] for schema in box.schemas
    ] == "now weather calculator".split()
    assert len(box) == 3
    assert "now" in box
    assert box.get("weather") is weather
    assert box.get("other") is None
    assert repr(box) == "Toolbox(now, weather, calculator)"


@pytest.mark.parametrize(
    "tools, options, complaint",
    [
        ([weather, weather], {}, "two tools are called weather"),
        ([{"type": "function"}], {}, "is no function"),
        (weather, {}, "tools is one Tool"),
        ("weather", {}, "tools is one str"),
        ([], {"max_workers": 0}, "max_workers is 0"),
        ([], {"max_result_chars": 1.5}, "max_result_chars is 1.5"),
        ([], {"timeout": -1}, "timeout of the toolbox"),
    ],
)
def test_a_toolbox_that_makes_no_sense_is_refused(tools, options, complaint):
    with pytest.raises(LLMConfigError, match=complaint):
        Toolbox(tools, **options)


def test_no_calls_have_no_results():
    assert Toolbox().run([]) == []


def test_results_have_the_order_of_the_calls_and_answer_them():
    def echo(n: int) -> int:
        return n

    calls = [call_of("echo", {"n": n}, f"c{n}") for n in range(20)]
    results = Toolbox([echo], max_workers=3).run(calls)
    assert [result.value for result in results] == list(range(20))
    assert results[7].message == Message(role="tool", tool_call_id="c7", content="7")


def test_calls_run_side_by_side_but_no_more_than_the_limit():
    together, lock, inside, most = threading.Barrier(3, timeout=30), threading.Lock(), [0], [0]

    def meet() -> str:
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        together.wait()
        with lock:
            inside[0] -= 1
        return "met"

    results = Toolbox([meet], max_workers=3).run([call_of("meet", "{}", str(n)) for n in range(6)])
    assert [result.content for result in results] == ["met"] * 6
    assert most == [3]


def test_the_program_is_told_of_each_call_and_result_in_its_own_thread():
    told = []
    here = threading.get_ident()

    def note(kind):
        return lambda what: told.append((kind, threading.get_ident() == here, what))

    calls = [call_of("weather", {"city": "Oslo"}, "a"), call_of("nothing", "{}", "b")]
    results = Toolbox([weather]).run(calls, on_start=note("start"), on_result=note("result"))
    assert ("start", True, calls[0]) in told
    assert ("result", True, results[0]) in told
    assert ("result", True, results[1]) in told
    assert len(told) == 3


def test_what_a_callback_raises_ends_the_run():
    def refuse(_):
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="disk"):
        run_one(weather, {"city": "Oslo"}, on_start=refuse)


def test_a_result_says_how_long_it_took():
    clock = FakeClock()

    def work() -> None:
        clock.sleep(3)

    assert run_one(work, box={"clock": clock}).seconds == 3


# Arguments


@pytest.mark.parametrize("arguments", ["", "  ", "null", "{}", '"{}"', '""'])
def test_no_arguments_may_be_said_in_many_ways(arguments):
    def now() -> str:
        return "noon"

    assert run_one(now, arguments).content == "noon"
    assert tool(now).parameters["properties"] == {}


def test_arguments_that_are_json_twice_are_understood():
    assert run_one(weather, json.dumps(json.dumps({"city": "Oslo"}))).content == "21 C in Oslo"


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ('{"city": "Os', "the arguments of weather are not JSON: Invalid JSON: EOF"),
        ('{"city"', "are not JSON"),
        ('"{', "are not JSON"),
        ('"plain text"', "are not JSON"),
        ("[" * 5000, "are not JSON"),
        ('"\\ud800"', "as a unicode string"),
        ("{}", "city is missing (it takes city, unit)"),
        ("[1]", "arguments: "),
        ('{"city": 5}', "city: Input should be a valid string, not 5"),
        ('{"city": "a", "unit": "K"}', "unit: Input should be 'C' or 'F', not 'K'"),
        ('{"city": "a", "day": 1}', "day is not known (it takes city, unit)"),
        (json.dumps({f"n{n}": "x" * 900 for n in range(9)}), "and 5 more"),
    ],
)
def test_wrong_arguments_become_a_line_that_the_model_can_mend(arguments, complaint):
    result = run_one(weather, arguments)
    assert result.outcome == "retry"
    assert complaint in result.content
    assert "\n" not in result.content
    assert len(result.content) < 700


@given(
    st.text() | st.text().map(json.dumps) | st.dictionaries(st.text(), st.text()).map(json.dumps)
)
def test_no_arguments_at_all_break_a_run(arguments):
    assert run_one(weather, arguments).outcome in ("ok", "retry")


def test_an_unknown_tool_is_answered_with_the_nearest_name():
    (result,) = Toolbox([weather, calculator]).run([call_of("get_weather")])
    expected = "there is no tool 'get_weather'; did you mean weather? (tools: weather, calculator)"
    assert (result.outcome, result.content) == ("retry", expected)
    (result,) = Toolbox().run([call_of("x" * 5000)])
    assert "tools: none" in result.content
    assert len(result.content) < 200


def test_a_validator_that_breaks_is_a_failure_and_no_crash():
    def broken(_):
        raise KeyError("oops")

    def f(a: Annotated[int, AfterValidator(broken)]) -> int:
        return a

    result = run_one(f, {"a": 1})
    assert (result.outcome, result.content) == ("failed", "KeyError: 'oops'")


# What a tool returns


@pytest.mark.parametrize(
    "value, content",
    [
        ("plain \n text", "plain \n text"),
        (None, "done"),
        (7, "7"),
        (True, "true"),
        (Decimal("1.50"), "1.50"),
        (date(2026, 11, 21), "2026-11-21"),
        ({"ä": [1, None]}, '{"ä": [1, null]}'),
        (Address(street="Main"), '{"street": "Main", "number": null}'),
        ([Point(1, 2)], '[{"x": 1, "y": 2}]'),
        (Color.BLUE, "blue"),
        ("half \ud800", "half ?"),
        ("", ""),
    ],
)
def test_a_value_is_text_for_the_model_and_itself_for_the_program(value, content):
    def f() -> Any:
        return value

    result = run_one(f)
    assert (result.outcome, result.content) == ("ok", content)
    assert result.value is value


@pytest.mark.parametrize("value", [b"png", object(), {"a": threading.Lock()}, {"a": b"\xff"}])
def test_a_value_that_no_model_can_read_is_a_failure(value):
    def f() -> Any:
        return value

    result = run_one(f)
    assert result.outcome == "failed"
    assert result.content.startswith("the tool returned ")
    assert result.value is None


def test_a_long_result_is_cut_and_says_so():
    def f() -> str:
        return "x" * 1000

    result = run_one(f, box={"max_result_chars": 10})
    assert result.content == "xxxxxxxxxx\n[cut: the first 10 of 1000 characters]"
    assert len(result.value) == 1000


# What a tool raises


class MuteError(Exception):
    def __str__(self):
        raise RuntimeError


@pytest.mark.parametrize(
    "error, outcome, content",
    [
        (ToolRetry("give a year"), "retry", "give a year"),
        (ToolRetry(), "retry", "try again"),
        (ToolFailed("no such file"), "failed", "no such file"),
        (ToolPending("may I?"), "pending", "may I?"),
        (ToolPending(), "pending", "a person must decide"),
        (ValueError("two\n lines"), "failed", "ValueError: two lines"),
        (KeyError(), "failed", "KeyError"),
        (MuteError(), "failed", "MuteError"),
        (asyncio.CancelledError(), None, None),
        (KeyboardInterrupt(), None, None),
        (SystemExit(3), None, None),
    ],
)
def test_what_a_tool_raises_is_an_outcome_unless_it_ends_the_program(error, outcome, content):
    def f() -> None:
        raise error

    if outcome is None:
        with pytest.raises(type(error)):
            run_one(f)
    else:
        result = run_one(f)
        assert (result.outcome, result.content, result.value) == (outcome, content, None)


def test_an_error_is_bounded_for_the_model_and_whole_in_the_log(caplog):
    def f() -> None:
        raise ValueError("x" * 5000)

    with caplog.at_level(logging.DEBUG, logger="agents"):
        assert len(run_one(f).content) == 500
    assert "x" * 5000 in caplog.text
    assert caplog.records[0].exc_info


# Time


def test_a_call_that_takes_too_long_is_left_and_the_others_are_not():
    free = threading.Event()

    @tool(timeout=0.05)
    def hang(context: ToolContext) -> str:
        assert context.timeout == 0.05
        context.cancelled.wait(30)
        free.set()
        return "late"

    calls = [call_of("hang"), call_of("weather", {"city": "Oslo"}, "c2")]
    late, good = Toolbox([hang, weather], max_workers=1).run(calls)
    assert late.outcome == "failed"
    assert "took longer than 0.05 s" in late.content
    assert good.content == "21 C in Oslo"
    assert free.wait(30)  # the tool could see that nobody waits for it


def test_a_late_result_is_dropped():
    done = threading.Event()

    @tool(timeout=0.05)
    def hang(context: ToolContext) -> str:
        context.cancelled.wait(30)
        done.set()
        return "late"

    @tool(timeout=None)
    def wait() -> str:
        done.wait(30)
        time.sleep(0.05)  # so that the late result comes first
        return "good"

    results = Toolbox([hang, wait]).run([call_of("hang"), call_of("wait", "{}", "c2")])
    assert [result.outcome for result in results] == ["failed", "ok"]


def test_the_toolbox_bounds_what_does_not_say_and_none_switches_off():
    stop = threading.Event()

    def hang() -> None:
        stop.wait(30)

    assert "longer than 0.05 s" in run_one(hang, box={"timeout": 0.05}).content
    stop.set()
    seen = []

    @tool(timeout=None)
    def unbounded(context: ToolContext | None = None) -> None:
        seen.append(context and context.timeout)

    assert run_one(unbounded, box={"timeout": 0.05}).outcome == "ok"
    assert seen == [None]


def test_a_hung_tool_does_not_keep_the_process_alive():
    seen = []

    def look() -> None:
        seen.append(threading.current_thread().daemon)

    run_one(look)
    assert seen == [True]


def test_a_deadline_ends_the_wait_for_all_calls():
    stop = threading.Event()

    def hang() -> None:
        stop.wait(30)

    def show(deadline):
        calls = [call_of("hang", "{}", "a"), call_of("hang", "{}", "b")]
        first, second = Toolbox([hang], max_workers=1).run(calls, deadline=deadline)
        assert (first.outcome, second.outcome) == ("failed", "failed")
        assert first.content == f"hang was left at work: the deadline of {deadline} s is over"
        assert second.content == f"hang was not run: the deadline of {deadline} s is over"

    patiently(show, 0.05, 5)
    stop.set()
    assert "not run" in run_one(hang, deadline=0).content


def test_a_cancelled_run_begins_nothing_and_waits_for_nothing():
    cancel, ended = threading.Event(), threading.Event()

    def hang(context: ToolContext) -> None:
        cancel.set()
        context.cancelled.wait(30)
        ended.set()

    calls = [call_of("hang", "{}", "a"), call_of("hang", "{}", "b")]
    first, second = Toolbox([hang], max_workers=1).run(calls, cancel=cancel)
    assert first.content == "hang was left at work: the run was cancelled"
    assert second.content == "hang was not run: the run was cancelled"
    assert ended.wait(30)


@within(0.1)  # or the other's result may not be there
def test_what_has_come_to_its_end_is_reported_though_the_run_is_cancelled():
    cancel, ended = threading.Event(), threading.Event()

    def work() -> str:
        ended.set()
        return "worked"

    def stop(context: ToolContext) -> None:
        ended.wait(30)
        time.sleep(0.05)  # until the other's result is there
        cancel.set()
        context.cancelled.wait(30)

    def hold(result):
        # While the program is busy with one result, the next comes, and then the cancellation.
        if result.content == "worked":
            cancel.wait(30)

    calls = [call_of("work", "{}", "a"), call_of("work", "{}", "b"), call_of("stop", "{}", "c")]
    results = Toolbox([work, stop]).run(calls, cancel=cancel, on_result=hold)
    assert [result.outcome for result in results] == ["ok", "ok", "failed"]


def test_a_thread_that_cannot_be_had_is_a_failure(monkeypatch):
    def refuse(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    result = run_one(weather, {"city": "Oslo"})
    assert result.outcome == "failed"
    assert "was not run: RuntimeError: can't start new thread" in result.content


# Async functions


def test_an_async_function_is_run_to_its_end():
    @tool
    async def fetch(url: str) -> str:
        await asyncio.sleep(0)
        return f"got {url}"

    assert run_one(fetch, {"url": "x"}).content == "got x"
    assert asyncio.run(fetch("y")) == "got y"


def test_an_async_function_that_takes_too_long_is_really_stopped():
    def show(seconds):
        begun, stopped = threading.Event(), threading.Event()

        @tool(timeout=seconds)
        async def hang() -> None:
            begun.set()
            try:
                await asyncio.sleep(60)
            finally:
                stopped.set()

        assert "took longer" in run_one(hang).content
        assert begun.is_set()
        assert stopped.wait(30)

    patiently(show, 0.05, 5)


def test_what_was_given_up_is_not_awaited_any_more():
    stopped = threading.Event()

    @tool(timeout=0.05)
    def slow(context: ToolContext) -> Any:
        async def rest() -> None:
            stopped.set()

        context.cancelled.wait(30)
        return rest()

    assert "took longer" in run_one(slow).content
    assert not stopped.wait(0.05)


def test_an_async_function_that_is_cancelled_from_within_failed():
    async def f() -> None:
        raise asyncio.CancelledError

    result = run_one(f)
    assert (result.outcome, result.content) == ("failed", "the tool was cancelled")


# A person decides


def test_a_call_that_needs_approval_waits_is_run_or_is_declined():
    paid = []

    @tool(approval=lambda arguments: arguments["amount"] > 100)
    def pay(amount: int = 500) -> str:
        paid.append(amount)
        return "paid"

    box = Toolbox([pay])
    ask = [call_of("pay")]
    (waiting,) = box.run(ask)
    assert (waiting.outcome, waiting.content) == ("pending", "pay waits for a person's approval")
    assert paid == []
    (declined,) = box.run(ask, approvals={"c1": False})
    expected = ("failed", "pay was not run: declined by the user")
    assert (declined.outcome, declined.content) == expected
    assert paid == []
    (run,) = box.run(ask, approvals={"c1": True})
    assert (run.outcome, run.content, paid) == ("ok", "paid", [500])
    (small,) = box.run([call_of("pay", {"amount": 5})])
    assert small.outcome == "ok"


def test_an_approval_that_cannot_be_decided_runs_nothing():
    @tool(approval=lambda arguments: arguments["nothing"])
    def pay() -> str:
        raise AssertionError

    result = run_one(pay)
    assert (result.outcome, result.content) == ("failed", "KeyError: 'nothing'")


def test_wrong_arguments_are_mended_before_anybody_is_asked():
    assert run_one(tool(approval=True)(weather.function), "{}").outcome == "retry"
    assert run_one(tool(approval=True)(weather.function), {"city": "Oslo"}).outcome == "pending"


def test_a_call_without_an_id_cannot_be_approved():
    made = tool(weather.function, approval=True)
    call = call_of("weather", {"city": "Oslo"}, None)
    (result,) = Toolbox([made]).run([call], approvals={"c1": True})
    assert result.outcome == "pending"


def test_a_tool_that_asks_by_itself_sees_the_answer():
    def delete(path: str, context: ToolContext) -> str:
        if not context.approved:
            raise ToolPending(f"delete {path}?")
        return f"deleted for {context.deps['user']} ({context.call.id})"

    assert "context" not in tool(delete).parameters["properties"]
    asked = run_one(delete, {"path": "a"})
    assert (asked.outcome, asked.content) == ("pending", "delete a?")
    done = run_one(delete, {"path": "a"}, approvals={"c1": True}, deps={"user": "Ann"})
    assert done.content == "deleted for Ann (c1)"


# With a client


def test_the_context_of_the_caller_holds_in_a_tool():
    who = contextvars.ContextVar("who", default="nobody")

    def ask() -> str:
        return who.get()

    who.set("Ann")
    assert run_one(ask).content == "Ann"


def test_the_deadline_of_the_caller_holds_for_what_a_tool_asks(server):
    with LLM(base_url=server.url, max_retries=0) as llm:

        def ask() -> str:
            server.reply("late", delay=5)
            return llm.chat_completion([Message(role="user", content="Hi")]).text

        with llm.deadline(0.1):
            result = run_one(ask)
    assert result.outcome == "failed"
    assert result.content.startswith(LLMTimeoutError.__name__)


@pytest.mark.parametrize("provider", ["openai-compatible", "anthropic"])
def test_a_model_calls_tools_and_reads_their_results(provider):
    box = Toolbox([weather, calculator])
    wanted = [
        {"name": "weather", "arguments": {"city": "Oslo"}},
        {"name": "calculator", "arguments": {"expression": "5 x 3"}},
    ]
    with LocalServer() as server, LLM(base_url=server.url, provider=provider, model="m") as llm:
        messages = [Message(role="user", content="Weather in Oslo, and 5 x 3?")]
        server.reply(tool_calls=wanted)
        answer = llm.chat_completion(messages, tools=box.schemas, max_tokens=100)
        results = box.run(answer.tool_calls)
        messages += [answer.choices[0].message, *(result.message for result in results)]
        server.reply("21 C, and 15.")
        last = llm.chat_completion(messages, tools=box.schemas, max_tokens=100)
        sent = server.requests[0].json["tools"]
        seen = json.dumps(server.requests[1].json, ensure_ascii=False)
    assert [result.content for result in results] == ["21 C in Oslo", "15"]
    assert last.text == "21 C, and 15."
    assert "21 C in Oslo" in seen
    forms = {"anthropic": [each.messages_schema for each in box]}
    assert sent == forms.get(provider, box.schemas)


# Against a server that none of us wrote: its grammar holds the random weights to the schema.


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    model = write_tiny_model(tmp_path_factory.mktemp("engine") / "tiny.gguf")
    with LlamaServer(model, context=2048, slots=1) as running:
        yield running


@pytest.mark.parametrize("provider", ["openai-compatible", "anthropic"])
def test_a_real_server_takes_the_schema_and_its_call_is_run(engine, provider):
    seen = []

    def paint(color: Color, size: Literal[1, 2], where: Literal["in", "out"] = "in") -> str:
        """Paint it.

        Args:
            color: of the paint
        """
        seen.append((color, size, where))
        return "painted"

    box = Toolbox([paint])
    with LLM(base_url=engine.url, provider=provider, model="tiny", temperature=0) as llm:
        answer = llm.chat_completion(
            [Message(role="user", content="Paint.")],
            tools=box.schemas,
            tool_choice="required",
            parallel_tool_calls=False,
            max_tokens=300,
        )
        (result,) = box.run(answer.tool_calls)
        assert (result.outcome, result.content) == ("ok", "painted")
        ((color, size, where),) = seen
        assert isinstance(color, Color)
        assert size in (1, 2)
        assert where in ("in", "out")
        messages = [
            Message(role="user", content="Paint."),
            answer.choices[0].message,
            result.message,
        ]
        last = llm.chat_completion(messages, tools=box.schemas, tool_choice="none", max_tokens=4)
        assert last.usage.prompt_tokens > 0
