"""Structured output: schemas of types, instances of texts, and a client that asks until one fits."""

import json
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from enum import Enum
from typing import Annotated, Any, Generic, Literal, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, field_validator
from typing_extensions import TypedDict

from LLM import (
    LLM,
    LLMBudgetError,
    LLMConfigError,
    LLMInvalidRequestError,
    LLMOutputError,
    LLMServerError,
    LLMTimeoutError,
    Price,
    ResponseCache,
)
from LLM.output import InvalidOutputError, Output
from tests.engine.llama_server import LlamaServer
from tests.engine.tiny_model import write_tiny_model
from tests.fakes import FakeClock

T = TypeVar("T")
PRICE = Price(input=1, output=2)  # dollars per million tokens
USAGE = {"prompt_tokens": 1000, "completion_tokens": 500}
COST = Decimal("0.002")  # of USAGE at PRICE
GOOD = '{"name": "Ann", "age": 7}'
BAD = '{"name": "Ann", "age": "seven"}'


class Person(BaseModel):
    """Someone."""

    name: str
    age: int


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Node(BaseModel):
    label: str
    children: list["Node"] = []


class Point(TypedDict):
    x: int
    y: int


@dataclass
class Pair:
    left: Point
    right: Point | None = None


class Order(BaseModel):
    """An order."""

    day: date
    amount: Decimal = Field(gt=0, description="in dollars")
    buyer: Annotated[Person, Field(description="who pays")]
    colour: Colour = Colour.RED
    kind: Literal["new"] = "new"
    title: str = Field("none", max_length=5, pattern="^[a-z]+$")
    tags: list[str] = []
    note: str | None = None


class Cat(BaseModel):
    kind: Literal["cat"]
    value: int


class Dog(BaseModel):
    kind: Literal["dog"]


@pytest.fixture
def llm(server):
    with LLM(base_url=server.url, max_retries=0, price=PRICE, model="m") as client:
        yield client


@pytest.fixture(params=["openai-compatible", "anthropic"])
def either(request, server):
    """A client of each dialect."""
    with LLM(
        base_url=server.url, provider=request.param, model="m", price=PRICE, max_retries=0
    ) as client:
        yield client


def bodies(server):
    return [request.json for request in server.requests]


def objects(schema):
    """Every object in a schema."""
    if isinstance(schema, dict):
        if schema.get("type") == "object":
            yield schema
        for value in schema.values():
            yield from objects(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from objects(value)


# Schemas


def test_the_schema_of_a_model_is_strict():
    output = Output(Person)
    assert output.strict
    assert output.name == "Person"
    assert output.schema == {
        "type": "object",
        "description": "Someone.",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }


@pytest.mark.parametrize(
    "output_type", [Order, Node, Point, Pair, list[Person], Cat | Dog, int, Colour, list[list[int]]]
)
def test_every_object_of_a_strict_schema_names_all_its_properties(output_type):
    output = Output(output_type)
    assert output.strict
    assert output.schema["type"] == "object"
    for node in objects(output.schema):
        assert node["additionalProperties"] is False
        assert node["required"] == list(node["properties"])


def test_bounds_stand_in_the_schema_and_other_constraints_are_told_in_words():
    properties = Output(Order).schema["properties"]
    assert properties["amount"]["description"] == "in dollars"
    assert {"type": "number", "exclusiveMinimum": 0} in properties["amount"]["anyOf"]
    told = "(maxLength: 5, pattern: ^[a-z]+$, default: none)"
    assert properties["title"] == {"type": "string", "description": told}
    assert properties["day"] == {"type": "string", "format": "date"}
    assert properties["kind"] == {
        "type": "string",
        "enum": ["new"],
        "description": "(default: new)",
    }
    wrong = {"day": "2026-01-01", "amount": -1, "buyer": {"name": "A", "age": 1}}
    with pytest.raises(InvalidOutputError, match="amount"):
        Output(Order).read(json.dumps(wrong))


def test_bounds_are_told_in_words_where_a_server_refuses_them():
    narrow = Output(Order).narrow_schema()
    told = {"type": "number", "description": "(exclusiveMinimum: 0.0)"}
    assert told in narrow["properties"]["amount"]["anyOf"]
    assert "exclusiveMinimum" not in narrow["properties"]["amount"]
    assert list(narrow["$defs"]) == ["Colour", "Person"]
    assert Output(dict[str, int]).narrow_schema() == Output(dict[str, int]).schema


def test_a_reference_bears_no_neighbour():
    buyer = Output(Order).schema["properties"]["buyer"]
    assert buyer == {"anyOf": [{"$ref": "#/$defs/Person"}], "description": "who pays"}


def test_a_root_that_is_a_reference_or_no_object_becomes_an_object():
    assert Output(Node).schema["properties"]["children"]["items"] == {"$ref": "#/$defs/Node"}
    assert Output(int).schema["properties"] == {"value": {"type": "integer"}}
    pets = Output(Annotated[Cat | Dog, Field(discriminator="kind")])
    assert len(pets.schema["properties"]["value"]["anyOf"]) == 2


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")


class Patterned(BaseModel):
    model_config = ConfigDict(json_schema_extra={"patternProperties": {"a": {}}})


@pytest.mark.parametrize(
    "output_type", [dict[str, int], dict, Any, tuple[int, str], list, Open, Patterned]
)
def test_what_the_strict_form_cannot_say_keeps_its_own_schema(output_type):
    output = Output(output_type)
    assert not output.strict
    assert output.schema["type"] == "object"


def test_a_schema_of_true_is_not_strict():
    class Odd(BaseModel):
        a: Annotated[
            int, Field(json_schema_extra=lambda schema: schema.update(items=True, type="array"))
        ]

    assert not Output(Odd).strict


@pytest.mark.parametrize(
    "wrong",
    [5, None, "Person", Person(name="A", age=1), list[Person(name="B", age=1)]],  # type: ignore[misc]
)
def test_what_is_no_type_is_refused_in_one_line(wrong):
    with pytest.raises(LLMConfigError, match="output_type is") as caught:
        Output(wrong)
    assert "\n" not in str(caught.value)


class Box(BaseModel, Generic[T]):
    inside: T


def test_the_name_of_a_schema_has_no_odd_characters():
    assert Output(int | str).name == "output"
    assert Output(Box[int]).name == "Box_int_"


TYPES = st.recursive(
    st.sampled_from([int, str, bool, Colour, Person, Literal["a", "b"], date, Decimal, Point, Pair]),
    lambda inner: inner.map(lambda t: list[t]) | inner.map(lambda t: t | None)  # type: ignore[valid-type]
    | inner.map(lambda t: dict[str, t]),  # type: ignore[valid-type]
    max_leaves=3,
)  # fmt: skip


@given(st.data())
def test_an_instance_that_is_written_as_the_schema_says_is_read_again(data):
    output_type = data.draw(TYPES)
    output = Output(output_type)
    adapter = TypeAdapter(output_type)
    value = data.draw(st.from_type(output_type))
    try:
        said = adapter.dump_json(value).decode()
        value = adapter.validate_json(
            said
        )  # what JSON can carry of it: no NaN, no years of 5 digits
    except ValueError:
        return
    if "value" in output.schema.get("properties", ()):
        wrapped = f'{{"value": {said}}}'
        assert output.read(wrapped) == value
        said = wrapped
    assert output.read(said) == output.read(f"Here:\n```json\n{said}\n```") == value
    for node in objects(output.schema) if output.strict else ():
        assert node["required"] == list(node["properties"])


# Texts


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"  {GOOD}\n",
        f"Sure!\n```json\n{GOOD}\n```\nAnything else?",
        f"```\n{GOOD}\n```",
        f"He is {{unknown}}, so: {GOOD} [as asked].",
        f"First {BAD}, no: {GOOD}",
        f'An example: {{"name": "Bob", "age": 1}}. The answer: {GOOD}',
        f"```json\n{BAD}\n```\nmended:\n```json\n{GOOD}\n```",
    ],
)
def test_the_last_json_that_fits_is_the_answer(text):
    assert Output(Person).read(text) == Person(name="Ann", age=7)


@pytest.mark.parametrize(
    "text, problem",
    [
        ("I do not know.", "there is no JSON in it"),
        ('{"name": "Ann", "age": 7,}', "it is not JSON: trailing comma at line 1 column 26"),
        ('```json\n{"name": }\n```', "it is not JSON: expected value at line 1 column 10"),
        (BAD, "age: Input should be a valid integer, unable to parse string as an integer"),
        ("{}", "name: Field required; age: Field required"),
        ("[1]", "Input should be an object"),
        ('{"name": "Ann", "age": NaN}', "it is not JSON: expected value at line 1 column 24"),
        ("", "there is no JSON in it"),
        ("[" * 100_000, "it is not JSON: recursion limit exceeded at line 1 column 202"),
        ("[no] " * 5_000 + GOOD, "it is not JSON: expected ident at line 1 column 3"),
        ("Deep: " + "[" * 300 + "]" * 300, "there is no JSON in it"),
        ("a[" * 5_000, "there is no JSON in it"),
        ("x" + "[" * 100_000, "there is no JSON in it"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(text, problem):
    with pytest.raises(InvalidOutputError) as caught:
        Output(Person).read(text)
    assert str(caught.value) == problem


def test_what_is_wrong_never_repeats_what_was_said():
    with pytest.raises(InvalidOutputError) as caught:
        Output(list[int]).read(json.dumps(["secret" * 1000] * 50))
    assert "secret" not in str(caught.value)
    assert "and 40 more" in str(caught.value)
    assert len(str(caught.value)) < 2000


def test_a_value_without_its_wrapper_is_understood():
    assert Output(list[int]).read("[1, 2]") == [1, 2]
    assert Output(int).read("5") == 5
    assert Output(Cat | Dog).read('{"kind": "cat", "value": 1}') == Cat(kind="cat", value=1)
    with pytest.raises(InvalidOutputError, match="no JSON"):
        Output(int).read("It is 5.")
    with pytest.raises(InvalidOutputError, match=r"^value: Input should be a valid integer"):
        Output(int).read('{"value": "five"}')


def test_a_number_that_is_not_json_is_found_amid_prose_neither():
    with pytest.raises(InvalidOutputError, match="no JSON"):
        Output(dict[str, float]).read('so: {"a": NaN}')


@pytest.mark.parametrize(
    "text, partial",
    [
        ("", None),
        ("Well, ", None),
        ("{no", None),
        ("{", None),
        ('{"name": "An', None),
        ('{"name": "Ann"', {"name": "Ann"}),
        ('{"name": "Ann", "age": 1', {"name": "Ann"}),
        ('{"name": "Ann", "age": 12}', {"name": "Ann", "age": 12}),
        ('```json\n{"name": "Ann", "a', {"name": "Ann"}),
        ('{"name": "Ann"} said', {"name": "Ann"}),
    ],
)
def test_what_is_complete_of_growing_json(text, partial):
    assert Output(Person).partial(text) == partial


def test_the_wrapper_is_not_seen_in_what_is_complete():
    assert Output(list[int]).partial('{"value": [1, 2, 3') == [1, 2]
    assert Output(list[int]).partial('{"value":') is None
    assert Output(list[int]).partial("[1, 2") == [1]


# Asking


def test_an_instance_comes_back(either, server):
    server.reply(GOOD)
    server.reply(tool_calls=[{"name": "Person", "arguments": {"name": "Ann", "age": 7}}])
    assert either.parse("Who?", Person, mode="schema") == Person(name="Ann", age=7)
    assert either.parse([{"role": "user", "content": "Who?"}], Person, mode="tool").age == 7


def test_the_stand_in_model_fills_a_schema_in_every_mode_that_enforces_one(either):
    for mode in ("auto", "schema", "tool"):
        assert isinstance(either.parse("Two!", Pair, mode=mode), Pair)
        assert isinstance(either.parse("All!", list[Person], mode=mode), list)


def test_the_schema_is_asked_for_in_openais_form(llm, server):
    server.reply(GOOD)
    llm.parse("Who?", Person)
    (body,) = bodies(server)
    assert body["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "Person", "strict": True, "schema": Output(Person).schema},
    }
    server.reply("{}")
    assert llm.parse("Who?", dict[str, int]) == {}
    assert bodies(server)[1]["response_format"]["json_schema"]["strict"] is False


def test_the_schema_is_asked_for_in_anthropics_form_beside_what_is_there(server):
    server.reply(GOOD)
    with LLM(base_url=server.url, provider="anthropic", model="m") as llm:
        llm.parse("Who?", Person, mode="schema", output_config={"effort": "low"})
    form = {"type": "json_schema", "schema": Output(Person).schema}
    assert bodies(server)[0]["output_config"] == {"effort": "low", "format": form}


def test_a_tool_is_forced_where_a_schema_may_be_ignored(server):
    with LLM(base_url=server.url, provider="anthropic", model="m") as llm:
        parsed = llm.parsed("Who?", Person)
    (body,) = bodies(server)
    assert body["tool_choice"] == {"type": "tool", "name": "Person"}
    assert body["tools"][0]["input_schema"] == Output(Person).schema
    assert parsed.mode == "tool"


def test_fallbacks_of_the_other_dialect_get_a_tool_which_both_understand(server):
    with LLM(
        base_url=server.url, model="m", fallbacks=["anthropic/claude-3-5-haiku-latest"], api_key="k"
    ) as llm:
        assert llm.parsed("Who?", Person).mode == "tool"


@pytest.mark.parametrize(
    "messages, expected",
    [
        ("Who?", ["system", "user"]),
        ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}], "both"),
        ([{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}], "parts"),
        ([{"role": "system", "content": ""}], ["system"]),
    ],
)
def test_the_prompt_mode_tells_the_schema_in_the_one_system_message(
    llm, server, messages, expected
):
    server.reply(f"Here you are:\n```json\n{GOOD}\n```")
    before = json.dumps(messages)
    assert llm.parse(messages, Person, mode="prompt").name == "Ann"
    assert json.dumps(messages) == before
    (body,) = bodies(server)
    assert "response_format" not in body
    assert "tools" not in body
    assert [m["role"] for m in body["messages"]].count("system") == 1
    content = body["messages"][0]["content"]
    told = content[-1]["text"] if isinstance(content, list) else content
    assert json.dumps(Output(Person).schema) in told
    assert (expected in ("both", "parts")) == ("Be brief." in json.dumps(content))


def test_a_message_object_is_not_changed_by_the_instruction(llm, server):
    from LLM import Message

    server.reply(GOOD)
    messages = (Message(role="system", content="Be brief."), Message(role="user", content="Who?"))
    llm.parse(iter(messages), Person, mode="prompt")
    assert messages[0].content == "Be brief."
    assert bodies(server)[0]["messages"][0]["content"].startswith("Be brief.\n\nAnswer with JSON")


def test_an_invalid_answer_is_asked_for_again_with_what_is_wrong(either, server):
    server.reply(BAD, usage=USAGE)
    server.reply(GOOD, usage=USAGE)
    parsed = either.parsed("Who?", Person, mode="schema")
    assert parsed.output == Person(name="Ann", age=7)
    assert (parsed.attempts, parsed.mode) == (2, "schema")
    assert parsed.usage.total_tokens == 3000
    assert parsed.cost == 2 * COST
    assert parsed.response.text == GOOD
    _, again = bodies(server)
    asked = [m for m in again["messages"] if m["role"] != "system"]
    assert [m["role"] for m in asked] == ["user", "assistant", "user"]
    assert asked[1]["content"] == BAD
    assert "age: Input should be a valid integer" in asked[2]["content"]
    assert "output_config" in again or "response_format" in again


def test_an_invalid_tool_call_is_answered_as_a_tool_is(either, server):
    server.reply(tool_calls=[{"name": "Person", "arguments": {"name": "Ann"}, "id": "c1"}])
    server.reply(tool_calls=[{"name": "Person", "arguments": {"name": "Ann", "age": 7}}])
    assert either.parse("Who?", Person, mode="tool").age == 7
    last = bodies(server)[1]["messages"][-1]
    assert "age: Field required" in json.dumps(last)
    assert "c1" in json.dumps(last)


def test_an_answer_that_stays_invalid_is_an_error_with_everything_it_took(either, server):
    for _ in range(2):
        server.reply(BAD, usage=USAGE)
    with pytest.raises(LLMOutputError, match="not a Person after 2 attempts: age: ") as caught:
        either.parse("Who?", Person, mode="schema", max_attempts=2)
    error = caught.value
    assert (error.reason, error.text) == ("invalid", BAD)
    assert error.usage.total_tokens == 3000
    assert error.cost == 2 * COST
    assert error.model == "m"
    assert not error.retriable
    assert error.partial.text == BAD


def test_a_cut_answer_is_not_asked_for_again(either, server):
    server.reply('{"name": "An', finish_reason="length", usage=USAGE)
    with pytest.raises(LLMOutputError, match="max_tokens") as caught:
        either.parse("Who?", Person, mode="schema")
    assert (caught.value.reason, caught.value.text) == ("cut", '{"name": "An')
    assert caught.value.cost == COST
    assert len(server.requests) == 1


def test_a_refusal_is_not_asked_for_again(either, server):
    server.reply("No.", finish_reason="content_filter")
    with pytest.raises(LLMOutputError) as caught:
        either.parse("Who?", Person)
    assert (caught.value.reason, caught.value.text) == ("refused", "No.")
    assert len(server.requests) == 1


def test_a_refusal_in_its_own_field_is_one(llm, server):
    message = {"role": "assistant", "content": None, "refusal": "I will not."}
    server.reply(body={"choices": [{"message": message, "finish_reason": "stop"}]})
    with pytest.raises(LLMOutputError, match="refused: I will not") as caught:
        llm.parse("Who?", Person)
    assert (caught.value.reason, caught.value.text) == ("refused", "I will not.")
    assert caught.value.usage.total_tokens is None  # unknown is not 0
    assert caught.value.cost is None


def test_an_empty_answer_is_not_sent_back(llm, server):
    server.reply("")
    server.reply(GOOD)
    llm.parse("Who?", Person, mode="schema")
    assert [m["role"] for m in bodies(server)[1]["messages"]] == ["user", "user"]


def test_an_answer_without_choices_is_invalid(llm, server):
    server.reply(body={"choices": []})
    server.reply(GOOD)
    try:
        assert llm.parse("Who?", Person, mode="schema").age == 7
    except LLMServerError:
        raise
    except Exception as error:  # the client itself may refuse it
        assert "choices" in str(error)


def test_usage_that_one_attempt_did_not_say_is_unknown(llm, server):
    choice = {"message": {"content": "no"}, "finish_reason": "stop"}
    server.reply(body={"choices": [choice]})
    server.reply(GOOD, usage=USAGE)
    parsed = llm.parsed("Who?", Person, mode="schema")
    assert parsed.usage.total_tokens is None
    assert parsed.cost is None


def refusing(*fields):
    """A server that answers as a model does, and knows none of these fields."""

    def reply(received):
        for field in fields:
            if field in received.json:
                return {
                    "status": 400,
                    "text": f"{field} (json_schema or tools) is not supported here",
                }
        return None if "tools" in received.json else GOOD

    return reply


def test_a_server_that_refuses_a_schema_is_asked_with_a_tool_and_from_then_on(llm, server):
    server.reply(refusing("response_format"))
    parsed = llm.parsed("Who?", Person)
    assert (parsed.mode, parsed.attempts) == ("tool", 1)
    assert len(server.requests) == 2
    llm.parse("Who?", Order)
    assert len(server.requests) == 3
    assert llm.with_options(temperature=0).parsed("Who?", Person).mode == "tool"
    assert len(server.requests) == 4
    llm.parse("Who?", Person, model="another")  # of another model nothing is known
    assert len(server.requests) == 6


def test_a_server_that_refuses_a_tool_too_is_told_the_schema(llm, server):
    server.reply(refusing("response_format", "tools"))
    assert llm.parsed("Who?", Person).mode == "prompt"
    assert len(server.requests) == 3
    assert llm.parsed("Who?", Person).mode == "prompt"
    assert len(server.requests) == 4


@pytest.mark.parametrize(
    "words",
    [
        "Invalid schema for response_format 'Person': In context=(), no",
        "output_config.format.schema: For 'integer' type, property 'minimum' is not supported",
    ],
)
def test_a_schema_that_is_refused_says_nothing_of_another_one(llm, server, words):
    server.reply(status=400, text=words)
    assert llm.parsed("Who?", Person).mode == "tool"
    assert llm.parsed("Who?", Pair).mode == "schema"


def test_a_mode_that_was_chosen_is_not_left(llm, server):
    server.reply(refusing("response_format"))
    with pytest.raises(LLMInvalidRequestError, match="response_format"):
        llm.parse("Who?", Person, mode="schema")
    assert len(server.requests) == 1


def test_an_error_of_another_kind_is_raised_as_it_is(llm, server):
    server.reply(status=400, text="temperature is too hot")
    with pytest.raises(LLMInvalidRequestError, match="hot"):
        llm.parse("Who?", Person)
    server.reply(status=500, text="response_format broke me")
    with pytest.raises(LLMServerError) as caught:
        llm.parse("Who?", Person)
    assert caught.value.__cause__ is None
    assert len(server.requests) == 2


def test_a_server_that_ignores_a_schema_is_asked_in_another_mode(llm, server):
    server.reply("Her name is Ann.")
    parsed = llm.parsed("Who?", Person)
    assert (parsed.mode, parsed.attempts) == ("tool", 2)
    assert [m["role"] for m in bodies(server)[1]["messages"]] == ["user"]
    assert llm.parsed("Who?", Person).attempts == 1


def test_tools_of_ones_own_leave_schema_and_prompt(llm, server):
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    server.reply(lambda received: GOOD)
    with_tools = llm.parsed("Who?", Person, tools=[tool], tool_choice="none", mode="prompt")
    assert with_tools.mode == "prompt"
    server.clear()
    server.reply(tool_calls=[{"name": "look", "arguments": {}}])
    with pytest.raises(LLMOutputError, match="called a tool") as caught:
        llm.parse("Who?", Person, tools=[tool])
    assert caught.value.partial.tool_calls[0].name == "look"
    server.reply(status=400, text="no response_format, please")
    server.reply(GOOD)
    assert llm.parsed("Who?", Person, tools=[tool]).mode == "prompt"
    assert llm.parsed("Who?", Person).mode == "schema"  # what was learned held for tools only


@pytest.mark.parametrize(
    "change, words",
    [
        ({"output_type": 5}, "output_type is 5"),
        ({"max_attempts": 0}, "max_attempts is 0"),
        ({"max_attempts": True}, "max_attempts is True"),
        ({"mode": "magic"}, "mode is 'magic'"),
        ({"stream": True}, "stream_parsed"),
        ({"on_error": "event"}, "on_error"),
        ({"mode": "tool", "tools": [{}]}, "a tool of its own"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"messages_or_text": 5}, "messages is int"),
        ({"messages_or_text": {"role": "user"}}, "messages is dict"),
        ({"deadline": -1}, "deadline"),
    ],
)
def test_what_cannot_be_asked_is_said_before_anything_is_sent(llm, server, change, words):
    call = {"messages_or_text": "Who?", "output_type": Person, **change}
    with pytest.raises(LLMConfigError, match=words):
        llm.parse(**call)
    with pytest.raises(LLMConfigError, match=words):
        llm.stream_parsed(**call)
    assert server.requests == []


def test_a_budget_ends_the_asking_and_the_error_says_what_was_spent(llm, server):
    server.reply(BAD, usage=USAGE)
    server.reply(GOOD)
    with llm.budget(requests=1), pytest.raises(LLMBudgetError) as caught:
        llm.parse("Who?", Person)
    spent = caught.value.__cause__
    assert isinstance(spent, LLMOutputError)
    assert (spent.reason, spent.cost, spent.text) == ("invalid", COST, BAD)
    assert len(server.requests) == 1


def test_a_deadline_bounds_all_attempts_together(server):
    clock = FakeClock()

    def slow(received):
        clock.time += 3
        return BAD

    server.reply(slow)
    with LLM(base_url=server.url, clock=clock, max_retries=0, deadline=5) as llm:
        with pytest.raises(LLMTimeoutError) as caught:
            llm.parse("Who?", Person, max_attempts=9)
    assert caught.value.clock == "deadline"
    assert isinstance(caught.value.__cause__, LLMOutputError)
    assert len(server.requests) == 2


def test_an_invalid_answer_in_the_cache_is_not_the_last_word(server):
    with LLM(base_url=server.url, cache=ResponseCache(), max_retries=0) as llm:
        server.reply(BAD)
        with pytest.raises(LLMOutputError):
            llm.parse("Who?", Person, temperature=0, max_attempts=1)
        server.reply(BAD)
        with pytest.raises(LLMOutputError):
            llm.parse("Who?", Person, temperature=0, max_attempts=2)
        server.reply(GOOD)
        parsed = llm.parsed("Who?", Person, temperature=0, max_attempts=2)
        assert parsed.output.age == 7
        assert len(server.requests) == 3


def test_a_validator_of_ones_own_is_heard(llm, server):
    class Adult(Person):
        @field_validator("age")
        @classmethod
        def grown(cls, age):
            if age < 18:
                raise ValueError("an adult is wanted")
            return age

    server.reply(GOOD)
    server.reply('{"name": "Bob", "age": 40}')
    assert llm.parse("Who?", Adult).name == "Bob"
    assert "an adult is wanted" in bodies(server)[1]["messages"][-1]["content"]


def test_parsed_is_a_frozen_value(llm):
    parsed = llm.parsed("Who?", Person)
    with pytest.raises(AttributeError):
        parsed.output = None


# Streaming


def test_a_stream_gives_what_is_complete_and_then_the_instance(either, server):
    server.reply('{"name": "Ann of Green", "age": 123}', usage=USAGE)
    stream = either.stream_parsed("Who?", Person, mode="schema")
    assert stream.usage is None
    seen = list(stream)
    assert seen == [{"name": "Ann of Green"}, {"name": "Ann of Green", "age": 123}]
    assert stream.output == Person(name="Ann of Green", age=123)
    assert stream.usage.total_tokens == 1500
    assert (stream.cost, stream.attempts) == (COST, 1)
    assert stream.response.finish_reason == "stop"
    assert stream.parsed.mode == "schema"
    assert bodies(server)[0]["stream"] is True


def test_a_stream_is_read_to_its_end_for_the_instance(either, server):
    server.reply(tool_calls=[{"name": "Person", "arguments": {"name": "Ann", "age": 7}}])
    with either.stream_parsed("Who?", Person, mode="tool") as stream:
        assert stream.output == Person(name="Ann", age=7)
    server.reply(tool_calls=[{"name": "Person", "arguments": {"name": "Ann", "age": 7}}])
    assert list(either.stream_parsed("Who?", Person, mode="tool")) == [{"name": "Ann", "age": 7}]


def test_a_stream_begins_anew_after_an_invalid_answer(llm, server):
    server.reply(BAD, usage=USAGE)
    server.reply(GOOD, usage=USAGE)
    stream = llm.stream_parsed("Who?", Person)
    seen = list(stream)
    assert seen[-1] == {"name": "Ann", "age": 7}
    assert {"name": "Ann", "age": "seven"} in seen
    assert (stream.attempts, stream.cost) == (2, 2 * COST)


def test_a_stream_falls_back_to_a_mode_that_the_server_takes(llm, server):
    server.reply(refusing("response_format", "tools"))
    stream = llm.stream_parsed("Who?", Person)
    assert stream.parsed.mode == "prompt"


def test_a_cut_stream_is_an_error(llm, server):
    server.reply('{"name": "An', finish_reason="length")
    stream = llm.stream_parsed("Who?", Person)
    with pytest.raises(LLMOutputError) as caught:
        list(stream)
    assert caught.value.reason == "cut"


def test_a_refusal_in_a_stream_is_one(llm, server):
    def event(delta, reason=None):
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return f"data: {json.dumps({'choices': [choice]})}\n\n"

    said = event({"role": "assistant", "refusal": "I will "}) + event({"refusal": "not."})
    server.reply(
        body=said + event({}, "stop") + "data: [DONE]\n\n",
        headers={"content-type": "text/event-stream"},
    )
    stream = llm.stream_parsed("Who?", Person, max_attempts=1)
    with pytest.raises(LLMOutputError) as caught:
        stream.output  # noqa: B018
    assert (caught.value.reason, caught.value.text) == ("refused", "I will not.")


def test_a_stream_that_was_closed_has_no_instance(llm, server):
    server.reply('{"name": "Ann", "age": ' + "1" * 500 + "}")
    with llm.stream_parsed("Who?", Person) as stream:
        assert next(stream) == {"name": "Ann"}
    with pytest.raises(LLMOutputError, match="ended before") as caught:
        stream.output  # noqa: B018
    assert caught.value.reason == "cut"
    stream.close()
    unread = llm.stream_parsed("Who?", Person)
    unread.close()
    assert list(unread) == []


# A real server


@pytest.fixture(scope="session")
def engine(tmp_path_factory):
    model = write_tiny_model(tmp_path_factory.mktemp("engine") / "tiny.gguf")
    with LlamaServer(model, context=2048, slots=2) as running:
        yield running


class Choice(BaseModel):
    number: Literal[1, 2]
    colour: Colour
    sure: bool


@pytest.mark.parametrize("provider", ["openai-compatible", "anthropic"])
def test_a_real_server_holds_even_nonsense_to_the_schema(engine, provider):
    """The weights are random: that it fits is the grammar's doing."""
    with LLM(
        base_url=engine.url, provider=provider, model="tiny", temperature=0, max_tokens=200
    ) as llm:
        for output_type in (Choice, list[Choice], Literal["a", "b"], Colour):
            parsed = llm.parsed("Choose.", output_type)
            TypeAdapter(output_type).validate_python(parsed.output)
            assert parsed.attempts == 1
        stream = llm.stream_parsed("Choose.", Choice)
        seen = list(stream)
        assert seen[-1] == stream.output.model_dump(mode="json")
        assert stream.usage.completion_tokens > 0


def test_a_real_server_takes_each_kind_of_schema(engine):
    with LLM(base_url=engine.url, model="tiny", temperature=0, max_tokens=30) as llm:
        for output_type in (Order, Node, Pair, list[Point], Cat | Dog, dict[str, int]):
            try:
                llm.parse("Fill it in.", output_type, mode="schema", max_attempts=1)
            except LLMOutputError as error:  # random weights seldom come to an end
                assert error.reason == "cut"
