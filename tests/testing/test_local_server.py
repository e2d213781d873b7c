"""The local server, asked over real sockets by a client that is not ours."""

import contextlib
import errno
import http.client
import itertools
import json
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from LLM.testing import LocalServer, Received
from LLM.testing.arithmetic import evaluate
from tests.fakes import AT_ONCE, until

ROOT = Path(__file__).parents[2]
CHAT, COMPLETIONS, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/messages"
ANTHROPIC = {"anthropic-version": "2023-06-01"}
CALCULATOR = {
    "type": "object",
    "properties": {"precision": {"type": "integer"}, "formula": {"type": "string"}},
    "required": ["precision", "formula"],
}
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "unit": {"enum": ["C", "F"]}},
    "required": ["city", "unit"],
}


class Client:
    """One kept-alive connection that sends JSON."""

    def __init__(self, server):
        self.connection = http.client.HTTPConnection(server.host, server.port, timeout=30)

    def send(self, method, path, body=None, headers=None):
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        self.connection.request(method, path, data, headers or {})
        return self.connection.getresponse()

    def json(self, method, path, body=None, headers=None, status=200):
        response = self.send(method, path, body, headers)
        value = json.loads(response.read())
        assert response.status == status, value
        return value

    def chat(self, messages, **params):
        return self.json("POST", CHAT, chat_body(messages, **params))

    def said(self, *texts, **params):
        """The answer to a talk in which user and assistant take turns."""
        roles = itertools.cycle(["user", "assistant"])
        talk = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
        return self.chat(talk, **params)["choices"][0]["message"]["content"]

    def message(self, messages, **params):
        return self.json("POST", MESSAGES, message_body(messages, **params), ANTHROPIC)

    def events(self, path, body, headers=None):
        """The events of a stream, as (name, data) with data parsed."""
        response = self.send("POST", path, {**body, "stream": True}, headers)
        assert response.status == 200
        assert response.getheader("transfer-encoding") == "chunked"
        assert response.getheader("content-type").startswith("text/event-stream")
        return [parsed(block) for block in response.read().decode().split("\n\n") if block]


def parsed(block):
    fields = dict(line.split(": ", 1) for line in block.split("\n"))
    data = fields["data"]
    return fields.get("event"), data if data == "[DONE]" else json.loads(data)


def user(text):
    return [{"role": "user", "content": text}]


def chat_body(messages, **params):
    messages = user(messages) if isinstance(messages, str) else messages
    return {"model": "gpt-4", "messages": messages, **params}


def message_body(messages, **params):
    return {"max_tokens": 500, **chat_body(messages, **params)}


def function(name, parameters):
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def calls_of(reply):
    calls = reply["choices"][0]["message"]["tool_calls"]
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]


@pytest.fixture
def server():
    with LocalServer() as running:
        yield running


@pytest.fixture
def client(server):
    client = Client(server)
    yield client
    client.connection.close()


def test_a_chat_completion_has_the_shape_of_the_real_one(server, client):
    reply = client.chat("Hello!")
    assert reply["object"] == "chat.completion"
    assert reply["id"].startswith("chatcmpl-")
    assert reply["model"] == "gpt-4"
    (choice,) = reply["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["role"] == "assistant"
    assert "I am a stand-in model" in choice["message"]["content"]
    usage = reply["usage"]
    assert usage["prompt_tokens"] == 2
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_a_chat_stream_says_the_same_in_pieces(client):
    body = chat_body("Hello!", stream_options={"include_usage": True})
    whole = client.chat("Hello!")
    *chunks, usage, (_, done) = client.events(CHAT, body)
    assert done == "[DONE]"
    first, *middle, last = [chunk["choices"][0] for _, chunk in chunks]
    assert first["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert len(middle) > 10
    text = "".join(choice["delta"]["content"] for choice in middle)
    assert text == whole["choices"][0]["message"]["content"]
    assert last["delta"] == {}
    assert last["finish_reason"] == "stop"
    assert all(chunk["usage"] is None for _, chunk in chunks)
    assert usage[1]["choices"] == []
    assert usage[1]["usage"] == whole["usage"]


def test_usage_is_streamed_only_when_asked_for(client):
    chunks = client.events(CHAT, chat_body("Hello!"))
    assert not any("usage" in data for _, data in chunks[:-1])


def test_several_choices(client):
    once = client.chat("Hello!")
    reply = client.chat("Hello!", n=2)
    assert [choice["index"] for choice in reply["choices"]] == [0, 1]
    assert reply["usage"]["prompt_tokens"] == once["usage"]["prompt_tokens"]
    assert reply["usage"]["completion_tokens"] == 2 * once["usage"]["completion_tokens"]


def test_a_message_has_the_shape_of_the_real_one(client):
    reply = client.message("Hello!", system=[{"type": "text", "text": "Be kind."}])
    assert reply["id"].startswith("msg_01")
    assert (reply["type"], reply["role"]) == ("message", "assistant")
    (block,) = reply["content"]
    assert block["type"] == "text"
    assert "I am a stand-in model" in block["text"]
    assert reply["stop_reason"] == "end_turn"
    assert reply["stop_sequence"] is None
    assert reply["usage"]["input_tokens"] == 5


def test_a_message_stream_has_the_events_of_the_real_one(client):
    whole = client.message("Hello!")
    events = client.events(MESSAGES, message_body("Hello!"), ANTHROPIC)
    assert all(name == data["type"] for name, data in events)
    names = [name for name, _ in itertools.groupby(name for name, _ in events)]
    assert names == [
        *("message_start", "content_block_start", "ping", "content_block_delta"),
        *("content_block_stop", "message_delta", "message_stop"),
    ]
    text = "".join(data["delta"]["text"] for _, data in events if "text" in data.get("delta", {}))
    assert text == whole["content"][0]["text"]
    start, end = events[0][1]["message"], events[-2][1]
    assert start["content"] == []
    assert start["stop_reason"] is None
    assert start["usage"]["input_tokens"] == whole["usage"]["input_tokens"]
    assert end["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert end["usage"]["output_tokens"] == whole["usage"]["output_tokens"]


def test_completions_answer_each_prompt(client):
    body = {"model": "gpt-4", "prompt": ["Say one", "Say two"]}
    reply = client.json("POST", COMPLETIONS, body)
    assert reply["object"] == "text_completion"
    assert [choice["text"] for choice in reply["choices"]] == ["one", "two"]
    *chunks, (_, done) = client.events(COMPLETIONS, {**body, "prompt": "Say one or two"})
    assert done == "[DONE]"
    choices = [chunk["choices"][0] for _, chunk in chunks]
    assert "".join(choice["text"] for choice in choices) == "one or two"
    assert [choice["finish_reason"] for choice in choices] == [None, None, None, "stop"]
    counted = {**body, "stream_options": {"include_usage": True}}
    assert client.events(COMPLETIONS, counted)[-2][1]["usage"] == reply["usage"]
    tokens = client.json("POST", COMPLETIONS, {"model": "gpt-4", "prompt": [1, 2]})
    assert '"1 2"' in tokens["choices"][0]["text"]


def test_models_are_listed_in_both_dialects():
    with LocalServer(models=["small", "large"]) as server:
        client = Client(server)
        listed = client.json("GET", "/v1/models")
        assert listed["object"] == "list"
        assert [model["id"] for model in listed["data"]] == ["small", "large"]
        listed = client.json("GET", "/v1/models", headers=ANTHROPIC)
        assert (listed["first_id"], listed["last_id"]) == ("small", "large")
        client.connection.close()


def test_health_needs_nothing(client):
    assert client.json("GET", "/health") == {"status": "ok"}


def test_it_remembers_a_name(client):
    greeting = client.said("My name is Ada.")
    assert "Ada" in greeting
    assert client.said("My name is Ada.", greeting, "What is my name?") == "Your name is Ada."
    assert "not told me" in client.said("What is my name?")


def test_it_remembers_a_result(client):
    """The two turns of the tutorial, in both dialects."""
    first = client.said("What is 5 x 3?")
    assert first == "5 * 3 = 15."
    assert client.said("What is 5 x 3?", first, "Now divide that by 3") == "15 / 3 = 5."
    talk = [
        *user("What is 5 x 3?"),
        {"role": "assistant", "content": [{"type": "text", "text": "15"}]},
        *user("Now divide that by 3"),
    ]
    assert client.message(talk)["content"][0]["text"] == "15 / 3 = 5."


@pytest.mark.parametrize(
    "asked, answer",
    [
        ("How much is (2 + 3) * 4?", "(2 + 3) * 4 = 20."),
        ("2 to the power of 10", "2 ** 10 = 1024."),
        ("-2 ^ 2", "-2 ** 2 = -4."),
        ("What is 15% of 80?", "15 / 100 * 80 = 12."),
        ("Add 3 to 1,000", "1000 + 3 = 1003."),
        ("double 7, then subtract 20 from that", "2 * 7 = 14. 14 - 20 = -6."),
        ("0.1 + 0.2", "0.1 + 0.2 = 0.3."),
        ("square root of 16", "16 ** 0.5 = 4."),
        ("five times three", "5 * 3 = 15."),
        ("(what is 2(3+4))", "2 * (3 + 4) = 14."),
        ("2 / 3", "2 / 3 = 0.6666666667."),
        ("2 plus +3", "2 + + 3 = 5."),
        ("square root of 2 - 20", "2 ** 0.5 - 20 = -18.58578644."),
        ("(0 - 4) ** 0.5", "(0 - 4) ** 0.5 has no value that I can work out."),
        ("10 mod 4", "10 % 4 = 2."),
        (
            "9999999999 ** 30 * 9999999999",
            "9999999999 ** 30 * 9999999999 has no value that I can work out.",
        ),
        ("5 / 0", "5 / 0 has no value that I can work out."),
        ("9 ** 9 ** 9", "9 ** 9 ** 9 has no value that I can work out."),
        ("Divide that by 3", "There is no earlier result in our conversation to go on with."),
        ("Count to 3", "1, 2, 3."),
        ('Say "hi"', "hi"),
    ],
)
def test_it_understands(client, asked, answer):
    assert client.said(asked) == answer


@pytest.mark.parametrize("expression", ["", "2 +", "(2", "2 2", "x", "2 * )", "1" + "+1" * 60])
def test_only_arithmetic_is_evaluated(expression):
    with pytest.raises(ValueError, match=r"expected|unexpected|closed|at most"):
        evaluate(expression)


@pytest.mark.parametrize(
    "asked",
    [
        "2024-01-05",
        "gpt-4 and gpt-3",
        "((1)",
        "5 * )(",
        "5 * / 3",
        "1" * 3000 + "+1",
        "1+" * 99 + "1",
    ],
)
def test_it_does_not_take_everything_for_arithmetic(client, asked):
    assert "=" not in client.said(asked)


def test_the_same_conversation_gets_the_same_bytes():
    def transcript():
        with LocalServer() as server:
            client = Client(server)
            bodies = [
                chat_body("What is 2 + 2?", tools=[function("calculate", {})]),
                chat_body("Hi"),
            ]
            got = [client.send("POST", CHAT, body).read() for body in bodies]
            client.connection.close()
            return got

    assert transcript() == transcript()


def test_a_calculator_is_called_and_its_result_told(client):
    tools = [function("get_weather", WEATHER), function("calculator", CALCULATOR)]
    asked = user("What is 5 x 3, and 10 / 4?")
    reply = client.chat(asked, tools=tools)
    assert reply["choices"][0]["finish_reason"] == "tool_calls"
    assert reply["choices"][0]["message"]["content"] is None
    assert calls_of(reply) == [
        ("calculator", {"precision": 0, "formula": "5 * 3"}),
        ("calculator", {"precision": 0, "formula": "10 / 4"}),
    ]
    called = reply["choices"][0]["message"]
    ids = [call["id"] for call in called["tool_calls"]]
    assert len(set(ids)) == 2
    results = [
        {"role": "tool", "tool_call_id": id_, "content": content}
        for id_, content in zip(ids, ["15", '{"result": 2.5, "places": 1}'], strict=True)
    ]
    talk = [*asked, called, *results]
    told = client.chat(talk, tools=tools)["choices"][0]["message"]
    assert told["content"] == "5 * 3 = 15. 10 / 4 = 2.5."
    next_call = client.chat([*talk, told, *user("double that")], tools=tools)
    assert calls_of(next_call) == [("calculator", {"precision": 0, "formula": "2 * 2.5"})]


def test_tool_calls_are_streamed_in_pieces(client):
    body = chat_body("What is 5 x 3?", tools=[function("calculator", CALCULATOR)])
    events = client.events(CHAT, body)
    deltas = [
        data["choices"][0]["delta"]["tool_calls"][0]
        for _, data in events[:-1]
        if "tool_calls" in data["choices"][0]["delta"]
    ]
    assert deltas[0]["id"].startswith("call_")
    assert deltas[0]["function"] == {"name": "calculator", "arguments": ""}
    assert len(deltas) > 3
    arguments = "".join(delta["function"]["arguments"] for delta in deltas)
    assert json.loads(arguments) == {"precision": 0, "formula": "5 * 3"}
    assert events[-2][1]["choices"][0]["finish_reason"] == "tool_calls"


def test_tools_in_the_messages_dialect(client):
    tools = [{"name": "calculator", "input_schema": CALCULATOR}]
    asked = user("What is 5 x 3?")
    reply = client.message(asked, tools=tools)
    assert reply["stop_reason"] == "tool_use"
    (block,) = reply["content"]
    assert block["id"].startswith("toolu_01")
    assert block["input"] == {"precision": 0, "formula": "5 * 3"}
    result = {"type": "tool_result", "tool_use_id": block["id"], "content": "15"}
    talk = [
        *asked,
        {"role": "assistant", "content": [block]},
        {"role": "user", "content": [result]},
    ]
    assert client.message(talk, tools=tools)["content"][0]["text"] == "5 * 3 = 15."

    events = client.events(MESSAGES, message_body(asked, tools=tools), ANTHROPIC)
    (start,) = [data for name, data in events if name == "content_block_start"]
    assert start["content_block"]["input"] == {}
    pieces = [
        data["delta"]["partial_json"] for name, data in events if name.endswith("block_delta")
    ]
    assert pieces[0] == ""
    assert json.loads("".join(pieces)) == block["input"]


def test_tool_choice_is_kept(client):
    tools = [function("get_weather", WEATHER), function("calculator", CALCULATOR)]
    weather = ("get_weather", {"city": "text", "unit": "C"})
    named = {"type": "function", "function": {"name": "get_weather"}}
    assert calls_of(client.chat("Hi", tools=tools, tool_choice="required")) == [weather]
    assert calls_of(client.chat("2 + 2", tools=tools, tool_choice=named)) == [weather]
    assert client.said("2 + 2", tools=tools, tool_choice="none") == "2 + 2 = 4."
    tools = [{"name": "get_weather", "input_schema": WEATHER}]
    for choice in {"type": "any"}, {"type": "tool", "name": "get_weather"}:
        (block,) = client.message("Hi", tools=tools, tool_choice=choice)["content"]
        assert (block["name"], block["input"]) == weather
    assert client.message("Hi", tools=tools, tool_choice={"type": "none"})["content"][0]["text"]


def test_json_answers_fit_their_schema(client):
    schema = {
        "type": "object",
        "required": ["id", "kind", "size", "tags", "next", "pair", "when", "both", "note", "less"],
        "properties": {
            "id": {"type": "integer", "exclusiveMinimum": 4, "multipleOf": 3},
            "kind": {"enum": ["a", "b"]},
            "size": {"type": "number", "maximum": -1.5},
            "tags": {"type": "array", "items": {"type": "string", "minLength": 6}, "minItems": 2},
            "next": {"$ref": "#/$defs/node"},
            "pair": {"prefixItems": [{"const": 1}, {"type": "boolean"}], "type": "array"},
            "when": {"type": "string", "format": "date"},
            "less": {"type": "integer", "minimum": -5, "exclusiveMaximum": 0},
            "both": {"allOf": [{"properties": {"x": {"type": "null"}}, "required": ["x"]}]},
            "note": {"type": ["string", "null"], "maxLength": 2},
            "optional": {"type": "string"},
        },
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
                "required": ["next"],
            }
        },
    }
    response_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    value = json.loads(client.said("Go", response_format=response_format))
    node = value.pop("next")
    while node is not None:
        node = node["next"]
    assert value == {
        "id": 6,
        "kind": "a",
        "size": -1.5,
        "tags": ["texttt", "texttt"],
        "pair": [1, False],
        "when": "2000-01-01",
        "less": -1,
        "both": {"x": None},
        "note": "te",
    }
    output = {"format": {"type": "json_schema", "schema": {"const": 7}}}
    assert client.message("Go", output_config=output)["content"][0]["text"] == "7"
    answer = client.said("2 + 2", response_format={"type": "json_object"})
    assert json.loads(answer) == {"answer": "2 + 2 = 4."}


def test_max_tokens_and_stop_cut_the_answer(client):
    whole = client.said("Hello!")
    for field in "max_tokens", "max_completion_tokens":
        cut = client.chat("Hello!", **{field: 3})
        assert cut["choices"][0]["finish_reason"] == "length"
        assert cut["usage"]["completion_tokens"] == 3
        assert whole.startswith(cut["choices"][0]["message"]["content"])
    assert client.said("Count to 9", stop=["5", "4"]) == "1, 2, 3, "
    message = client.message("Count to 9", stop_sequences=["4"])
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", "4")
    assert client.message("Hello!", max_tokens=1)["stop_reason"] == "max_tokens"
    tools = [function("calculator", CALCULATOR)]
    cut = client.chat("What is 5 x 3, and 2 + 2?", tools=tools, max_tokens=8)["choices"][0]
    assert cut["finish_reason"] == "length"
    (call,) = cut["message"]["tool_calls"]
    with pytest.raises(ValueError, match=r"Expecting|Unterminated"):
        json.loads(call["function"]["arguments"])


def test_a_scripted_reply_serves_both_dialects_streamed_or_not(server, client):
    for _ in range(4):
        server.reply(
            "It is sunny.",
            tool_calls=[{"name": "look", "arguments": {"at": "sky"}, "id": "call_1"}],
            reasoning="Look up first.",
            usage={"prompt_tokens": 50, "cached_tokens": 40, "completion_tokens": 9},
            headers={"X-Note": "scripted"},
        )
    response = client.send("POST", CHAT, chat_body("Weather?"))
    assert response.getheader("x-note") == "scripted"
    reply = json.loads(response.read())
    message = reply["choices"][0]["message"]
    assert message["content"] == "It is sunny."
    assert message["reasoning_content"] == "Look up first."
    assert calls_of(reply) == [("look", {"at": "sky"})]
    assert reply["usage"]["prompt_tokens"] == 50
    assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] == 40

    deltas = [data["choices"][0]["delta"] for _, data in client.events(CHAT, chat_body("?"))[:-1]]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Look up first."
    assert "".join(delta.get("content") or "" for delta in deltas) == "It is sunny."

    reply = client.message("Weather?")
    thinking, text, use = reply["content"]
    assert (thinking["thinking"], text["text"]) == ("Look up first.", "It is sunny.")
    assert thinking["signature"]
    assert (use["id"], use["input"]) == ("call_1", {"at": "sky"})
    assert reply["stop_reason"] == "tool_use"
    assert reply["usage"]["input_tokens"] == 10
    assert reply["usage"]["cache_read_input_tokens"] == 40

    events = client.events(MESSAGES, message_body("?"), ANTHROPIC)
    kinds = [data["delta"]["type"] for name, data in events if name == "content_block_delta"]
    assert [kind for kind, _ in itertools.groupby(kinds)] == [
        *("thinking_delta", "signature_delta", "text_delta", "input_json_delta")
    ]
    assert "stand-in" in client.said("Hello!")


def test_replies_are_texts_arguments_or_functions():
    def shout(received):
        text = received.json["messages"][-1]["content"]
        return None if text == "Hello!" else {"text": text.upper(), "finish_reason": "pause_turn"}

    with LocalServer(["one", {"tool_calls": [{"name": "f", "arguments": "{"}]}, shout]) as server:
        client = Client(server)
        assert client.said("Hi") == "one"
        call = client.chat("Hi")["choices"][0]["message"]["tool_calls"][0]
        assert call["function"]["arguments"] == "{"
        assert client.said("two") == "TWO"
        assert client.message("three")["stop_reason"] == "pause_turn"
        server.reply(tool_calls=[{"name": "f", "arguments": "{"}])
        assert client.message("Hi")["content"][0]["input"] == {}
        server.reply("queued goes first")
        assert client.said("four") == "queued goes first"
        assert client.said("five") == "FIVE"
        assert "stand-in" in client.said("Hello!")
        server.reply(lambda received: received.method)
        assert client.said("six") == "POST"
        client.connection.close()


def test_replies_may_be_endless_or_one():
    with LocalServer(itertools.cycle(["a", "b"])) as server:
        client = Client(server)
        assert [client.said("Hi") for _ in range(3)] == ["a", "b", "a"]
        client.connection.close()
    with LocalServer("only this") as server:
        client = Client(server)
        assert client.said("Say more") == "only this"
        assert client.said("Say more") == "more"
        client.connection.close()


def test_a_wrong_script_is_told_at_once(server):
    for wrong in {"txt": "typo"}, {"tool_calls": [{"arguments": {}}]}, {"usage": {"tokens": 1}}:
        with pytest.raises((TypeError, KeyError)):
            LocalServer([wrong])
    with pytest.raises(TypeError):
        server.reply(usage={"tokens": 1})


def test_a_failing_function_is_told_in_the_answer(server, client):
    server.reply(lambda received: received.json["absent"])
    error = client.json("POST", CHAT, chat_body("Hi"), status=500)["error"]
    assert error["type"] == "server_error"
    assert "KeyError('absent')" in error["message"]


def test_scripted_errors_have_the_form_of_the_dialect(server, client):
    server.reply("Slow down", status=429, headers={"retry-after": "7"})
    response = client.send("POST", CHAT, chat_body("Hi"))
    assert (response.status, response.getheader("retry-after")) == (429, "7")
    error = json.loads(response.read())["error"]
    assert (error["message"], error["code"]) == ("Slow down", "rate_limit_exceeded")
    server.reply(status=529)
    error = client.json("POST", MESSAGES, message_body("Hi"), ANTHROPIC, status=529)
    assert error["type"] == "error"
    assert error["error"] == {"type": "overloaded_error", "message": "Overloaded"}
    server.reply(status=503)
    assert client.json("GET", "/v1/models", status=503)["error"]["type"] == "server_error"


@pytest.mark.parametrize(
    "body, sent",
    [
        ({"detail": "no"}, b'{"detail":"no"}'),
        ("<html>Sign in</html>", b"<html>Sign in</html>"),
        (b"\xff\x00", b"\xff\x00"),
    ],
)
def test_a_scripted_body_is_sent_as_it_stands(server, client, body, sent):
    server.reply(body=body, headers={"content-type": "text/x-test"})
    response = client.send("POST", CHAT, chat_body("Hi", stream=True))
    assert (response.status, response.getheader("content-type")) == (200, "text/x-test")
    assert response.read() == sent


def test_a_text_waits_for_a_request_that_generates(server, client):
    server.reply("for a chat")
    assert client.json("GET", "/v1/models")["data"]
    assert client.said("Hi") == "for a chat"


@pytest.mark.parametrize(
    "body, param, words",
    [
        (b"{", None, "could not parse"),
        (b"[]", None, "could not parse"),
        (b'{"a": NaN}', None, "could not parse"),
        (b"[" * 100_000, None, "could not parse"),
        ({"model": "m"}, "messages", "Missing"),
        ({"messages": user("Hi")}, None, "model"),
        (chat_body([]), "messages", "empty"),
        (chat_body(["Hi"]), "messages[0]", "object"),
        (chat_body([{"content": "Hi"}]), "messages[0].role", "Missing"),
        (chat_body([{"role": "boss"}]), "messages[0].role", "'boss'"),
        (chat_body([{"role": "user", "content": 1}]), "messages[0].content", "string"),
        (
            chat_body([{"role": "assistant", "tool_calls": [{"id": "a"}]}]),
            "messages[0].tool_calls[0].function.name",
            "Missing",
        ),
        (chat_body([{"role": "tool", "content": ""}]), "messages[0].role", "must be a response"),
        (chat_body("Hi", max_tokens=0), "max_tokens", ">= 1"),
        (chat_body("Hi", n="2"), "n", "integer"),
        (chat_body("Hi", stop=[1]), "stop", "strings"),
        (chat_body("Hi", tools="all"), "tools", "array"),
        (chat_body("Hi", tools=[{}]), "tools[0].function.name", "Missing"),
        (chat_body("Hi", tool_choice="required"), "tool_choice", "only allowed"),
        (chat_body("Hi", response_format="json"), "response_format", "object"),
        (
            chat_body("Hi", response_format={"type": "json_schema"}),
            "response_format.json_schema",
            "Missing",
        ),
        (chat_body("Hi", stream=True, stream_options=1), "stream_options", "object"),
        (chat_body("Hi", stream_options={}), "stream_options", "only allowed"),
    ],
)
def test_a_malformed_request_is_refused_as_by_openai(client, body, param, words):
    error = client.json("POST", CHAT, body, status=400)["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert words in error["message"]


def test_a_tool_that_is_not_offered_cannot_be_chosen(client):
    tools = [function("calculator", CALCULATOR)]
    for choice in "always", {"type": "function", "function": {"name": "absent"}}:
        body = chat_body("Hi", tools=tools, tool_choice=choice)
        assert client.json("POST", CHAT, body, status=400)["error"]["param"] == "tool_choice"


def test_completions_need_a_prompt(client):
    for prompt, words in [([], "Missing"), ({}, "string or an array")]:
        body = {"model": "gpt-4", "prompt": prompt}
        error = client.json("POST", COMPLETIONS, body, status=400)["error"]
        assert error["param"] == "prompt"
        assert words in error["message"]


def test_every_tool_call_must_be_answered(client):
    call = {"id": "call_7", "function": {"name": "f", "arguments": "{}"}}
    talk = [*user("Hi"), {"role": "assistant", "tool_calls": [call]}, *user("Well?")]
    error = client.json("POST", CHAT, chat_body(talk), status=400)["error"]
    assert "call_7" in error["message"]
    use = {"type": "tool_use", "id": "toolu_7", "name": "f", "input": {}}
    talk = [*user("Hi"), {"role": "assistant", "content": [use]}, *user("Well?")]
    error = client.json("POST", MESSAGES, message_body(talk), ANTHROPIC, status=400)["error"]
    assert "toolu_7" in error["message"]


@pytest.mark.parametrize(
    "body, words",
    [
        (b"{", "could not parse"),
        (chat_body("Hi"), "max_tokens: Field required"),
        ({"model": "m", "max_tokens": 1}, "messages: Field required"),
        (message_body([]), "at least one message"),
        (message_body([{"role": "system", "content": "Hi"}]), "messages.0.role"),
        (message_body([{"role": "user"}]), "messages.0.content"),
    ],
)
def test_a_malformed_request_is_refused_as_by_anthropic(client, body, words):
    response = client.send("POST", MESSAGES, body, ANTHROPIC)
    reply = json.loads(response.read())
    assert response.status == 400
    assert reply["type"] == "error"
    assert reply["error"]["type"] == "invalid_request_error"
    assert words in reply["error"]["message"]
    assert reply["request_id"] == response.getheader("request-id")


def test_anthropic_wants_its_version(client):
    error = client.json("POST", MESSAGES, message_body("Hi"), status=400)["error"]
    assert "anthropic-version" in error["message"]


def test_the_wrong_tool_result_is_told_as_it_stands(client):
    """A calculator that fails, and a tool that is none, with arguments that are no object."""
    calls = [
        {"id": "1", "function": {"name": "calculator", "arguments": '{"e": "5 / 0"}'}},
        {"id": "2", "function": {"name": "calculator", "arguments": "[]"}},
        {"id": "3", "function": {"name": "get_weather", "arguments": "{}"}},
    ]
    results = [
        {"role": "tool", "tool_call_id": id_, "content": content}
        for id_, content in [("1", "division by zero"), ("2", "7"), ("3", "sunny")]
    ]
    talk = [*user("Go"), {"role": "assistant", "tool_calls": calls}, *results]
    assert client.chat(talk)["choices"][0]["message"]["content"] == (
        "The tool calculator answered: division by zero The result = 7."
        " The tool get_weather answered: sunny"
    )


def test_unknown_paths_and_methods(client):
    assert "/v1/absent" in client.json("GET", "/v1/absent", status=404)["error"]["message"]
    error = client.json("GET", "/v2", headers=ANTHROPIC, status=404)["error"]
    assert error["type"] == "not_found_error"
    response = client.send("GET", CHAT)
    assert (response.status, response.getheader("allow")) == (405, "POST")
    assert json.loads(response.read())["error"]["code"] == "method_not_supported"
    assert client.json("POST", "/v1/messages?beta=true", message_body("Hi"), ANTHROPIC)["id"]


def test_a_key_is_asked_for_in_either_header():
    with LocalServer(api_key="sk-right") as server:
        client = Client(server)
        body = chat_body("Hi")
        missing = client.json("POST", CHAT, body, status=401)["error"]
        wrong = client.json("POST", CHAT, body, {"authorization": "Bearer sk-bad"}, status=401)
        assert "didn't provide" in missing["message"]
        assert wrong["error"]["code"] == "invalid_api_key"
        assert "sk-" not in wrong["error"]["message"]
        error = client.json(
            "POST", MESSAGES, message_body("Hi"), {**ANTHROPIC, "x-api-key": "bad"}, status=401
        )
        assert error["error"] == {"type": "authentication_error", "message": "invalid x-api-key"}
        assert client.json("POST", CHAT, body, {"authorization": "Bearer sk-right"})["id"]
        assert client.json("GET", "/v1/models", headers={"x-api-key": "sk-right"})["data"]
        client.connection.close()


def test_requests_and_connections_are_recorded(server, client):
    client.said("Hi")
    client.send("POST", CHAT, b"\xff", {"X-Note": "raw"}).read()
    first, second = server.requests
    assert isinstance(first, Received)
    assert (first.method, first.path, first.json["model"]) == ("POST", CHAT, "gpt-4")
    assert json.loads(first.body) == first.json
    assert (second.body, second.json, second.headers["x-note"]) == (b"\xff", None, "raw")
    assert server.connections == 1
    server.reply("forgotten")
    server.clear()
    assert (server.requests, server.connections) == ([], 0)
    assert client.said("Say that") == "that"


def test_each_response_has_an_id(client):
    ids = set()
    for _ in range(2):
        response = client.send("POST", CHAT, chat_body("Hi"))
        ids |= {response.getheader("x-request-id"), json.loads(response.read())["id"]}
    assert len(ids) == 4


def test_text_that_is_no_unicode_and_text_beyond_ascii(client):
    assert client.said("Say Grüße, 世界 🎉") == "Grüße, 世界 🎉"
    assert client.said("Say \ud83d") == "?"


def test_many_threads_get_their_own_answers():
    with LocalServer() as server:

        def ask(number):
            client = Client(server)
            answers = [client.said(f"Say {number}-{turn}") for turn in range(5)]
            client.connection.close()
            return answers == [f"{number}-{turn}" for turn in range(5)]

        with ThreadPoolExecutor(32) as pool:
            assert all(pool.map(ask, range(32)))
        assert server.connections == 32
        assert len(server.requests) == 160


def test_http_1_0_gets_a_stream_that_ends_with_the_connection(server):
    body = json.dumps(chat_body("Hi", stream=True)).encode()
    head = f"POST {CHAT} HTTP/1.0\r\ncontent-length: {len(body)}\r\nconnection: keep-alive\r\n\r\n"
    with socket.create_connection((server.host, server.port), timeout=30) as connection:
        connection.sendall(head.encode() + body)
        received = connection.makefile("rb").read()
    assert b"transfer-encoding" not in received
    assert received.endswith(b"data: [DONE]\n\n")


def test_a_body_without_a_length_is_refused(server):
    with socket.create_connection((server.host, server.port), timeout=30) as connection:
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n".encode())
        assert connection.makefile("rb").read().startswith(b"HTTP/1.1 411 ")


def opened_stream(server):
    """A stream of which the first piece has arrived."""
    client = Client(server)
    response = client.send("POST", CHAT, chat_body("Count to 900", stream=True))
    response.read1(10)
    return client, response


def test_stop_ends_a_stream_and_idle_connections_at_once():
    server = LocalServer(token_delay=0.05).start()
    idle = Client(server)
    idle.said("Hi")
    streaming, response = opened_stream(server)
    begin = time.perf_counter()
    server.stop()
    assert time.perf_counter() - begin < AT_ONCE  # and not when the stream is over
    with pytest.raises((http.client.IncompleteRead, ConnectionError)):
        response.read()
    with pytest.raises(OSError, match=r"refused|closed|reset"):
        Client(server).said("Hi")
    assert server.disconnects == 0
    until(lambda: all(t.name != "LocalServer connection" for t in threading.enumerate()))
    for client in idle, streaming:
        client.connection.close()
    response.close()


def test_a_client_that_leaves_is_counted_quietly(capfd):
    with LocalServer(token_delay=0.05) as server:
        client, response = opened_stream(server)
        response.close()
        client.connection.close()
        until(lambda: server.disconnects)
        assert server.disconnects == 1
        with socket.create_connection((server.host, server.port)) as connection:
            connection.sendall(b"POST / HTTP/1.1\r\ncontent-length: 9\r\n\r\nhalf")
    assert capfd.readouterr() == ("", "")


def test_latency_delay_and_token_delay_are_waited():
    with LocalServer([{"text": "a b", "delay": 0.02}], latency=0.02, token_delay=0.01) as server:
        client = Client(server)
        begin = time.perf_counter()
        client.events(CHAT, chat_body("Hi"))
        assert time.perf_counter() - begin >= 0.07
        client.connection.close()


def test_a_scripted_function_may_stop_the_server(server, client):
    server.reply(lambda received: server.stop())
    with pytest.raises((http.client.HTTPException, ConnectionError)):
        client.chat("Hi")


def test_it_starts_again_on_the_same_port():
    server = LocalServer()
    with pytest.raises(RuntimeError, match="started"):
        _ = server.url
    server.stop()  # one that never ran
    urls = set()
    for _ in range(2):
        with server.start() as running:
            urls.add(running.url)
            client = Client(server)
            client.said("Hi")
            client.connection.close()
    assert len(urls) == 1
    assert len(server.requests) == 2


def test_a_port_in_use_is_told_clearly(server):
    from LLM.testing import serve

    with pytest.raises(OSError, match=rf"127\.0\.0\.1:{server.port}: the port is in use") as caught:
        serve(port=server.port)
    assert caught.value.errno == errno.EADDRINUSE
    with pytest.raises(OSError, match=r"cannot listen on 192\.0\.2\.1:"):
        LocalServer(host="192.0.2.1").start()


def test_it_listens_on_ipv6():
    server = LocalServer(host="::1")
    with contextlib.suppress(OSError):
        server.start()
    if not server.port:
        pytest.skip("this machine has no IPv6")
    with server:
        assert server.url.startswith("http://[::1]:")
        client = Client(server)
        assert client.said("Say hi") == "hi"
        client.connection.close()


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C cannot be sent to one process")
def test_serve_prints_its_address_and_ends_with_ctrl_c():
    import signal

    code = "from LLM.testing import serve; serve(port=0)"
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        line = process.stdout.readline()
        assert "http://127.0.0.1:" in line
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, "")


def test_the_names_are_imported_when_used():
    import LLM.testing

    assert LLM.testing.__all__ == sorted(LLM.testing.__all__) == dir(LLM.testing)
    with pytest.raises(AttributeError, match="absent"):
        _ = LLM.testing.absent
    code = "import sys, LLM.testing; print('http.server' in sys.modules)"
    command = [sys.executable, "-c", code]
    fresh = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert fresh.stdout.strip() == "False"


def test_a_tool_call_without_an_id_is_refused_as_vendors_do(server):
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    for id_ in ({}, {"id": None}):
        messages = [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "tool_calls": [{**call, **id_}]},
            {"role": "user", "content": "Well?"},
        ]
        answer = requests.post(
            f"{server.url}/v1/chat/completions",
            json={"model": "m", "messages": messages},
            timeout=30,
        )
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "messages[1].tool_calls[0].id"
