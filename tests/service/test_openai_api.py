"""OpenAI's own client, and ours, against the service; behind it a model server of either dialect."""

import asyncio
import http.client
import json

import hypothesis
import hypothesis.strategies as st
import openai
import pytest

from agents.forms import SETTINGS, Asked
from agents.service import openai as dialect
from agents.service.openai import read
from LLM import LLM, LLMInvalidRequestError, LLMNotFoundError, LLMStreamError, Price
from tests.service.conftest import until

HELLO = [{"role": "user", "content": "Hello"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CUT = 'data: {"id": "x", "choices": [{"index": 0, "delta": {"content": "Half an ans"}}]}\n\n'
EVENTS = {"content-type": "text/event-stream"}


# Behind the service stands a model server of the one dialect, or of the other.
both = pytest.mark.parametrize("upstream", ["openai", "anthropic"], indirect=True)


@pytest.fixture
def upstream(request, server):
    """The service's own client."""
    with LLM(
        provider=getattr(request, "param", "openai"),
        base_url=server.url,
        api_key="sk-the-key-of-the-service",
        model="gpt-4o",
        price=Price("0.15", "0.60"),
        max_retries=0,
    ) as llm:
        yield llm


@pytest.fixture
def service(serve, upstream):
    return serve(llm=upstream)


@pytest.fixture
def client(service):
    with openai.OpenAI(
        base_url=f"{service.url}/v1", api_key="sk-of-the-caller", max_retries=0
    ) as made:
        yield made


def spent(service):
    """The rows of the ledger, once there is one."""
    rows = []
    until(lambda: rows.extend(service.ask("GET", "/usage").json()["days"]) or rows)
    return rows


@both
def test_an_answer_is_given_at_once(client, server):
    server.reply("Hello to you.", usage={"prompt_tokens": 9, "completion_tokens": 4})
    answer = client.chat.completions.create(model="gpt-4o", messages=HELLO)
    assert answer.choices[0].message.content == "Hello to you."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens == 9
    assert answer.usage.completion_tokens == 4
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")


@both
def test_an_answer_is_given_piece_by_piece(client, server):
    server.reply("Hello to you, whoever you are.")
    with client.chat.completions.create(model="gpt-4o", messages=HELLO, stream=True) as stream:
        chunks = list(stream)
    pieces = [chunk.choices[0].delta.content for chunk in chunks]
    assert "".join(piece or "" for piece in pieces) == "Hello to you, whoever you are."
    assert len(pieces) > 4
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks][-2:] == [None, "stop"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


@both
def test_usage_is_streamed_to_those_who_ask(client, server):
    server.reply("Hi", usage={"prompt_tokens": 9, "completion_tokens": 4})
    options = {"include_usage": True}
    *chunks, last = client.chat.completions.create(
        model="gpt-4o", messages=HELLO, stream=True, stream_options=options
    )
    assert last.choices == []
    assert last.usage.total_tokens == 13
    assert all(chunk.usage is None for chunk in chunks)


@both
def test_the_asynchronous_client_is_served(service, server):
    server.reply("One.")
    server.reply("Two, in pieces.")

    async def talk():
        async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="any") as client:
            whole = await client.chat.completions.create(model="gpt-4o", messages=HELLO)
            stream = await client.chat.completions.create(
                model="gpt-4o", messages=HELLO, stream=True
            )
            pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
        return whole.choices[0].message.content, "".join(pieces)

    assert asyncio.run(talk()) == ("One.", "Two, in pieces.")


@pytest.mark.parametrize("stream", [False, True])
@both
def test_tools_go_there_and_back(client, server, stream):
    server.reply(
        tool_calls=[
            {"name": "weather", "arguments": {"city": "Rome"}, "id": "call_1"},
            {"name": "weather", "arguments": {"city": "Oslo"}, "id": "call_2"},
        ]
    )
    server.reply("Warm and cold.")
    if stream:
        with client.chat.completions.stream(model="gpt-4o", messages=HELLO, tools=TOOLS) as events:
            answer = events.get_final_completion()
    else:
        answer = client.chat.completions.create(model="gpt-4o", messages=HELLO, tools=TOOLS)
    said = answer.choices[0]
    assert said.finish_reason == "tool_calls"
    assert [(call.id, call.function.name) for call in said.message.tool_calls] == [
        ("call_1", "weather"),
        ("call_2", "weather"),
    ]
    assert [json.loads(call.function.arguments)["city"] for call in said.message.tool_calls] == [
        "Rome",
        "Oslo",
    ]
    results = [
        {"role": "tool", "tool_call_id": "call_1", "content": "30"},
        {"role": "tool", "tool_call_id": "call_2", "content": "-3"},
    ]
    again = client.chat.completions.create(
        model="gpt-4o", messages=[*HELLO, said.message, *results], tools=TOOLS
    )
    assert again.choices[0].message.content == "Warm and cold."


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_without_an_id_gets_one(stream):
    from agents.types import ChatCompletionResponse, EventType, StreamEvent, ToolCall

    answer = dialect.Answer("1", 0, Asked([], None, {}, stream))
    call = {"function": {"name": "now", "arguments": "{}"}}
    if stream:
        answer.start("m", None)
        event = StreamEvent(EventType.TOOL_CALL, tool_call=ToolCall.model_validate(call))
        chunk = json.loads(answer.piece(event).removeprefix(b"data: "))
        made = chunk["choices"][0]["delta"]["tool_calls"]
    else:
        choice = {"message": {"content": None, "tool_calls": [call]}}
        response = ChatCompletionResponse.model_validate({"choices": [choice]})
        made = answer.whole(response, "m")["choices"][0]["message"]["tool_calls"]
    assert made[0]["id"]


@both
def test_thoughts_are_told(client, server):
    server.reply("42", reasoning="Let me think.")
    server.reply("42", reasoning="Let me think.")
    whole = client.chat.completions.create(model="gpt-4o", messages=HELLO)
    assert whole.choices[0].message.reasoning_content == "Let me think."
    chunks = client.chat.completions.create(model="gpt-4o", messages=HELLO, stream=True)
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == "Let me think."
    assert "".join(delta.content or "" for delta in deltas) == "42"


@both
def test_fields_that_are_not_known_here_are_passed_on(client, server, upstream):
    client.chat.completions.create(
        model="gpt-4o",
        messages=HELLO,
        top_p=0.5,
        stop=["END"],
        max_completion_tokens=77,
        extra_body={"min_p": 0.1},
    )
    sent = server.requests[-1].json
    assert sent["top_p"] == 0.5
    assert sent["min_p"] == 0.1
    native = upstream.config.provider == "anthropic"
    assert sent["stop_sequences" if native else "stop"] == ["END"]
    limits = {name: n for name, n in sent.items() if name.startswith("max_")}
    assert list(limits.values()) == [77]


def test_several_choices_come_at_once_only(serve, server):
    with openai.OpenAI(base_url=f"{serve().url}/v1", api_key="any", max_retries=0) as client:
        answer = client.chat.completions.create(
            model=client.models.list().data[0].id, messages=HELLO, n=2
        )
        assert [choice.index for choice in answer.choices] == [0, 1]
        with pytest.raises(openai.BadRequestError, match="n above 1"):
            client.chat.completions.create(model="gpt-4o", messages=HELLO, n=2, stream=True)


@both
def test_the_callers_key_goes_no_further(client, server):
    client.chat.completions.create(
        model="gpt-4o", messages=HELLO, extra_headers={"x-own": "secret-of-the-caller"}
    )
    sent = server.requests[-1]
    assert "sk-of-the-caller" not in str(sent.headers)
    assert "secret-of-the-caller" not in str(sent.headers)
    assert "sk-the-key-of-the-service" in str(sent.headers)


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_no_setting_of_the_client_comes_with_a_body(name):
    with pytest.raises(LLMInvalidRequestError, match=name) as caught:
        read({"messages": HELLO, name: "http://elsewhere"})
    assert caught.value.param == name


def test_an_address_in_a_body_is_refused_in_the_form_of_the_vendor(client, server):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model="gpt-4o", messages=HELLO, extra_body={"base_url": "http://elsewhere"}
        )
    assert caught.value.param == "base_url"
    assert caught.value.type == "invalid_request_error"
    assert server.requests == []


def test_the_models_are_listed(serve, upstream):
    running = serve(llm=upstream, models=("gpt-4o", "vendor/other"))
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["gpt-4o", "vendor/other"]
        assert client.models.retrieve("vendor/other").id == "vendor/other"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("none")


def test_a_model_that_is_not_offered_is_not_found(client, server):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-5-pro", messages=HELLO)
    assert caught.value.code == "model_not_found"
    assert server.requests == []


def test_without_a_key_nothing_is_answered(service, client, server):
    key = service.service.keys.create("ann")[1]
    for ask in (
        client.models.list,
        lambda: client.chat.completions.create(model="gpt-4o", messages=HELLO),
    ):
        with pytest.raises(openai.AuthenticationError) as caught:
            ask()
        assert caught.value.code == "invalid_api_key"
    assert server.requests == []
    assert client.with_options(api_key=key).models.list().data[0].id == "gpt-4o"


def test_too_many_requests_are_told_to_wait(service):
    key = service.service.keys.create("ann", requests_per_minute=1)[1]
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key=key, max_retries=0) as client:
        client.models.list()
        with pytest.raises(openai.RateLimitError) as caught:
            client.models.list()
    assert caught.value.code == "rate_limit_exceeded"
    assert int(caught.value.response.headers["retry-after"]) >= 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_budget_that_is_used_up_is_not_asked_again(service, server, stream):
    key = service.service.keys.create("ann", budget_usd="0.000001")[1]
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key=key) as client:
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(
                model="gpt-4o", messages=HELLO, max_tokens=1000, stream=stream
            )
    assert caught.value.code == "insufficient_quota"
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert server.requests == []


@pytest.mark.parametrize(
    "status, kind",
    [
        (400, openai.BadRequestError),
        (401, openai.InternalServerError),  # the service's key, not the caller's
        (403, openai.InternalServerError),
        (404, openai.InternalServerError),
        (429, openai.RateLimitError),
        (500, openai.InternalServerError),
        (503, openai.InternalServerError),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
@both
def test_errors_of_the_model_server_have_the_class_of_the_vendor(
    client, server, status, kind, stream
):
    server.reply("bad: sk-the-key-of-the-service", status=status, headers={"retry-after": "7"})
    with pytest.raises(kind) as caught:
        client.chat.completions.create(model="gpt-4o", messages=HELLO, stream=stream)
    assert "sk-the-key" not in caught.value.response.text
    assert caught.value.body["message"]
    if status == 429:
        assert caught.value.response.headers["retry-after"] == "7"


@both
def test_a_prompt_that_is_too_long_has_its_code(client, server, upstream):
    if upstream.config.provider == "anthropic":
        server.reply("prompt is too long: 300000 tokens", status=400)
    else:
        error = {"message": "too long", "code": "context_length_exceeded"}
        server.reply(status=400, body={"error": error})
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="gpt-4o", messages=HELLO)
    assert caught.value.code == "context_length_exceeded"


def test_each_answer_has_the_id_of_its_request(client, service):
    raw = client.chat.completions.with_raw_response.create(model="gpt-4o", messages=HELLO)
    assert raw.request_id
    assert raw.parse()._request_id == raw.request_id
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="none", messages=HELLO)
    assert caught.value.request_id


@pytest.mark.parametrize("body", [b"", b"{", b'{"a": NaN}', b"\xff", b"[" * 100_000, b"[]", b"3"])
def test_a_body_that_is_not_understood_is_refused(service, body):
    for path in ("/v1/chat/completions", "/v1/messages", "/v1/messages/count_tokens"):
        answer = service.ask("POST", path, data=body)
        assert answer.status_code == 400
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_body_that_is_too_large_is_refused(serve, upstream):
    running = serve(llm=upstream, max_body_bytes=10_000)
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0) as client:
        with pytest.raises(openai.APIStatusError) as caught:
            client.chat.completions.create(
                model="gpt-4o", messages=[{"role": "user", "content": "x" * 20_000}]
            )
    assert caught.value.status_code == 413


def test_a_stream_that_was_cut_is_an_error_and_no_short_answer(serve, server):
    running = serve(model="gpt-4o")
    server.reply(body=CUT, headers=EVENTS)
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0) as client:
        stream = client.chat.completions.create(model="gpt-4o", messages=HELLO, stream=True)
        pieces = []
        with pytest.raises(openai.APIError, match="broke off"):
            pieces.extend(chunk.choices[0].delta.content for chunk in stream)
        assert "".join(pieces) == "Half an ans"
    rows = spent(running)
    assert (rows[0]["calls"], rows[0]["interrupted"]) == (1, 1)


def test_a_cut_is_no_whole_answer_either(serve, server):
    running = serve(model="gpt-4o")
    server.reply(body=CUT, headers=EVENTS)
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0) as client:
        with pytest.raises(openai.InternalServerError):
            client.chat.completions.create(model="gpt-4o", messages=HELLO)


@pytest.mark.parametrize("stream", [False, True])
@both
def test_a_client_that_goes_away_stops_the_model(service, server, stream):
    server.token_delay = 0.02
    server.reply("word " * 2000)
    body = {"model": "gpt-4o", "messages": HELLO, "stream": stream}
    caller = http.client.HTTPConnection(service.url.removeprefix("http://"))
    caller.request("POST", "/v1/chat/completions", json.dumps(body))
    until(lambda: server.requests)
    caller.close()
    until(lambda: server.disconnects)
    assert spent(service)[0]["interrupted"] == 1
    until(lambda: not len(service.service.threads))


@pytest.mark.parametrize("stream", [False, True])
@both
def test_what_an_answer_took_is_written_down(client, service, server, stream):
    server.reply("Hi", usage={"prompt_tokens": 1000, "completion_tokens": 500})
    answer = client.chat.completions.create(model="gpt-4o", messages=HELLO, stream=stream)
    if stream:
        list(answer)
    row = spent(service)[0]
    assert (row["prompt_tokens"], row["completion_tokens"]) == (1000, 500)
    assert float(row["cost"]) == pytest.approx(0.00045)
    assert (row["calls"], row["interrupted"], row["model"]) == (1, 0, "gpt-4o")


@both
def test_our_own_client_is_served(service, server):
    server.reply("Whole.", usage={"prompt_tokens": 9, "completion_tokens": 4})
    server.reply("In pieces.", usage={"prompt_tokens": 9, "completion_tokens": 4})
    with LLM(base_url=service.url, model="gpt-4o", max_retries=0) as llm:
        whole = llm.chat_completion(HELLO)
        stream = llm.stream(HELLO)
        assert "".join(stream.text_stream) == "In pieces."
        for answer in (whole, stream.response):
            assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (9, 4)
            assert answer.finish_reason == "stop"
        with pytest.raises(LLMNotFoundError):
            llm.chat_completion(HELLO, model="none")
        with pytest.raises(LLMInvalidRequestError):
            llm.chat_completion(HELLO, extra_body={"timeout": 3})


def test_our_own_client_sees_the_cut(serve, server):
    running = serve(model="gpt-4o")
    server.reply(body=CUT, headers=EVENTS)
    with LLM(base_url=running.url, model="gpt-4o", max_retries=0) as llm:
        stream = llm.stream(HELLO)
        with pytest.raises(Exception, match="broke off") as caught:
            list(stream)
    assert not isinstance(caught.value, LLMStreamError)  # told, and not only cut
    assert caught.value.partial.text == "Half an ans"


ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                "role content type function id text name tool_calls url arguments".split()
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
FIELDS = "messages model stream stream_options n tools tool_choice max_tokens stop user".split()
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool", "system"])},
    optional={"content": ODD, "tool_calls": ODD, "name": ODD, "tool_call_id": ODD},
)


@hypothesis.given(
    ODD
    | st.dictionaries(st.sampled_from(FIELDS), ODD)
    | st.fixed_dictionaries(
        {"messages": st.lists(MESSAGE, min_size=1, max_size=3)},
        optional=dict.fromkeys(FIELDS[1:], ODD),
    )
)
def test_any_body_is_read_or_refused(body):
    try:
        asked = read(body)
    except LLMInvalidRequestError as error:
        assert error.status_code == 400
        assert str(error)
    else:
        assert asked.messages
        assert not SETTINGS & asked.params.keys()


def test_the_documentation_tells_how_callers_are_let_in_and_what_is_refused(chat):
    api = chat.ask("GET", "/openapi.json").json()
    ours = {path: methods for path, methods in api["paths"].items() if path.startswith("/v1/")}
    assert len(ours) == 5
    for path, methods in ours.items():
        for operation in methods.values():
            schemes = [name for one in operation["security"] for name in one]
            kinds = [api["components"]["securitySchemes"][name]["type"] for name in schemes]
            assert kinds == ["http", "apiKey"], path
            assert {"401", "429", "503"} <= operation["responses"].keys(), path
    answered = [
        ours[path]["post"]["responses"] for path in ("/v1/chat/completions", "/v1/messages")
    ]
    assert all({"400", "404", "413", "502", "504"} <= told.keys() for told in answered)
    assert ["402" in told for told in answered] == [False, True]
