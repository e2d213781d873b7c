"""Anthropic's own client, and ours, against the service; behind it a model server of either dialect."""

import asyncio

import anthropic
import hypothesis
import hypothesis.strategies as st
import pytest

from agents.forms import SETTINGS, Asked
from agents.service import anthropic as dialect
from agents.service.anthropic import read
from agents.types import ChatCompletionResponse, EventType, StreamEvent, ToolCall
from LLM import LLM, LLMInvalidRequestError, LLMNotFoundError, Price
from tests.service.conftest import until

HELLO = [{"role": "user", "content": "Hello"}]
ASKED = {"model": "gpt-4o", "max_tokens": 100, "messages": HELLO}
TOOLS = [
    {
        "name": "weather",
        "description": "Weather of a city.",
        "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
    }
]
CUT = 'data: {"id": "x", "choices": [{"index": 0, "delta": {"content": "Half an ans"}}]}\n\n'
EVENTS = {"content-type": "text/event-stream"}
IMAGE = {"type": "base64", "media_type": "image/png", "data": "AAAA"}


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
def native(upstream):
    return upstream.config.provider == "anthropic"


@pytest.fixture
def service(serve, upstream):
    return serve(llm=upstream)


@pytest.fixture
def client(service):
    with anthropic.Anthropic(
        base_url=service.url, api_key="sk-of-the-caller", max_retries=0
    ) as made:
        yield made


@both
def test_an_answer_is_given_at_once(client, server):
    usage = {"prompt_tokens": 19, "completion_tokens": 4, "cached_tokens": 10}
    server.reply("Hello to you.", usage=usage)
    answer = client.messages.create(**ASKED)
    assert [block.text for block in answer.content] == ["Hello to you."]
    assert (answer.stop_reason, answer.role, answer.type) == ("end_turn", "assistant", "message")
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (9, 4)
    assert answer.usage.cache_read_input_tokens == 10
    assert answer.id.startswith("msg_")


@both
def test_an_answer_is_given_piece_by_piece(client, server):
    usage = {"prompt_tokens": 19, "completion_tokens": 4, "cached_tokens": 10}
    server.reply("Hello to you, whoever you are.", usage=usage)
    with client.messages.create(**ASKED, stream=True) as stream:
        kinds = [event.type for event in stream]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert len(kinds) > 8
    server.reply("Hello to you, whoever you are.", usage=usage)
    with client.messages.stream(**ASKED) as stream:
        assert "".join(stream.text_stream) == "Hello to you, whoever you are."
        final = stream.get_final_message()
    assert (final.usage.input_tokens, final.usage.output_tokens) == (9, 4)
    assert final.stop_reason == "end_turn"


@both
def test_the_asynchronous_client_is_served(service, server):
    server.reply("One.")
    server.reply("Two, in pieces.")

    async def talk():
        async with anthropic.AsyncAnthropic(base_url=service.url, api_key="any") as client:
            whole = await client.messages.create(**ASKED)
            async with client.messages.stream(**ASKED) as stream:
                pieces = [piece async for piece in stream.text_stream]
        return whole.content[0].text, "".join(pieces)

    assert asyncio.run(talk()) == ("One.", "Two, in pieces.")


@pytest.mark.parametrize("stream", [False, True])
@both
def test_tools_go_there_and_back(client, server, stream):
    server.reply(
        "I look.",
        tool_calls=[
            {"name": "weather", "arguments": {"city": "Rome"}, "id": "toolu_1"},
            {"name": "weather", "arguments": {"city": "Oslo"}, "id": "toolu_2"},
        ],
    )
    server.reply("Warm and cold.")
    if stream:
        with client.messages.stream(**ASKED, tools=TOOLS) as events:
            answer = events.get_final_message()
    else:
        answer = client.messages.create(**ASKED, tools=TOOLS)
    assert answer.stop_reason == "tool_use"
    text, *calls = answer.content
    assert text.text == "I look."
    assert [(call.id, call.name, call.input) for call in calls] == [
        ("toolu_1", "weather", {"city": "Rome"}),
        ("toolu_2", "weather", {"city": "Oslo"}),
    ]
    results = [
        {"type": "tool_result", "tool_use_id": "toolu_1", "content": "30"},
        {
            "type": "tool_result",
            "tool_use_id": "toolu_2",
            "content": [{"type": "text", "text": "-3"}],
        },
    ]
    turns = [
        *HELLO,
        {"role": "assistant", "content": answer.content},
        {"role": "user", "content": [*results, {"type": "text", "text": "And?"}]},
    ]
    again = client.messages.create(**{**ASKED, "messages": turns}, tools=TOOLS)
    assert again.content[0].text == "Warm and cold."


@pytest.mark.parametrize(
    "choice, ours, theirs",
    [
        ({"type": "auto"}, "auto", {"type": "auto"}),
        ({"type": "any"}, "required", {"type": "any"}),
        ({"type": "none"}, "none", {"type": "none"}),
        (
            {"type": "tool", "name": "weather"},
            {"type": "function", "function": {"name": "weather"}},
            {"type": "tool", "name": "weather"},
        ),
    ],
)
@both
def test_the_choice_of_a_tool_is_passed_on(client, server, native, choice, ours, theirs):
    client.messages.create(
        **ASKED, tools=TOOLS, tool_choice={**choice, "disable_parallel_tool_use": True}
    )
    sent = server.requests[-1].json
    if native:
        assert sent["tool_choice"] == {**theirs, "disable_parallel_tool_use": True}
        assert sent["tools"] == TOOLS
    else:
        assert sent["tool_choice"] == ours
        assert sent["parallel_tool_calls"] is False
        assert sent["tools"][0]["function"]["parameters"] == TOOLS[0]["input_schema"]


@both
def test_system_images_and_settings_are_passed_on(client, server, native):
    image = {"type": "image", "source": IMAGE}
    client.messages.create(
        model="gpt-4o",
        max_tokens=77,
        system=[{"type": "text", "text": "Be kind."}, {"type": "text", "text": "Be short."}],
        messages=[{"role": "user", "content": [image, {"type": "text", "text": "What is it?"}]}],
        stop_sequences=["END"],
        metadata={"user_id": "u1"},
        extra_body={"top_k": 3, "top_p": 0.5, "temperature": 0.2},
    )
    sent = server.requests[-1].json
    assert (sent["top_k"], sent["top_p"], sent["temperature"]) == (3, 0.5, 0.2)
    if native:
        assert sent["system"] == "Be kind.\n\nBe short."
        assert sent["messages"][0]["content"][0] == image
        assert sent["stop_sequences"] == ["END"]
        assert sent["metadata"] == {"user_id": "u1"}
        assert sent["max_tokens"] == 77
    else:
        assert sent["messages"][0] == {"role": "system", "content": "Be kind.\n\nBe short."}
        url = {"url": "data:image/png;base64,AAAA"}
        assert sent["messages"][1]["content"][0] == {"type": "image_url", "image_url": url}
        assert sent["stop"] == ["END"]
        assert sent["user"] == "u1"


@both
def test_marks_of_a_cached_prefix_reach_a_server_that_knows_them(client, server, native):
    mark = {"cache_control": {"type": "ephemeral"}}
    client.messages.create(
        model="gpt-4o",
        max_tokens=10,
        system=[{"type": "text", "text": "Be kind.", **mark}],
        messages=[{"role": "user", "content": [{"type": "text", "text": "Hi", **mark}]}],
        tools=[{**TOOLS[0], **mark}],
    )
    sent = server.requests[-1].json
    if native:
        assert sent["system"][0]["cache_control"] == mark["cache_control"]
        assert sent["messages"][0]["content"][0]["cache_control"] == mark["cache_control"]
        assert sent["tools"][0]["cache_control"] == mark["cache_control"]


@pytest.mark.parametrize("stream", [False, True])
@both
def test_thoughts_go_there_and_back_with_their_signature(client, server, native, stream):
    calls = [{"name": "weather", "arguments": {"city": "Rome"}, "id": "toolu_1"}]
    server.reply("I look.", reasoning="Let me think.", tool_calls=calls)
    thinking = {"type": "enabled", "budget_tokens": 1024}
    if stream:
        with client.messages.stream(**ASKED, tools=TOOLS, thinking=thinking) as events:
            answer = events.get_final_message()
    else:
        answer = client.messages.create(**ASKED, tools=TOOLS, thinking=thinking)
    assert [block.type for block in answer.content] == ["thinking", "text", "tool_use"]
    assert answer.content[0].thinking == "Let me think."
    assert bool(answer.content[0].signature) is native
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "30"}
    turns = [
        *HELLO,
        {"role": "assistant", "content": answer.content},
        {"role": "user", "content": [result]},
    ]
    client.messages.create(**{**ASKED, "messages": turns}, tools=TOOLS)
    sent = server.requests[-1].json["messages"][1]
    if native:
        assert sent["content"][0]["signature"] == answer.content[0].signature
    else:
        assert sent["content"] == "I look."


@pytest.mark.parametrize(
    "finish, stop",
    [("length", "max_tokens"), ("content_filter", "refusal"), ("tool_calls", "tool_use")],
)
@pytest.mark.parametrize("stream", [False, True])
@both
def test_the_reason_for_the_end_is_told(client, server, finish, stop, stream):
    server.reply("Half", finish_reason=finish)
    if stream:
        with client.messages.stream(**ASKED) as events:
            answer = events.get_final_message()
    else:
        answer = client.messages.create(**ASKED)
    assert answer.stop_reason == stop


@pytest.mark.parametrize("stream", [False, True])
def test_arguments_that_are_no_json_are_told_as_an_object(client, server, stream):
    server.reply(tool_calls=[{"name": "weather", "arguments": '{"city": ', "id": "toolu_1"}])
    if stream:
        with client.messages.stream(**ASKED, tools=TOOLS) as events:
            answer = events.get_final_message()
    else:
        answer = client.messages.create(**ASKED, tools=TOOLS)
    assert answer.content[0].input == {"invalid_json": '{"city": '}


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_without_an_id_gets_one(stream):
    answer = dialect.Answer("1", 0, Asked([], None, {}, stream))
    call = {"function": {"name": "now", "arguments": "{}"}}
    if stream:
        answer.start("m", None)
        event = StreamEvent(EventType.TOOL_CALL, tool_call=ToolCall.model_validate(call))
        assert b'"id": "toolu_1_0"' in answer.piece(event)
    else:
        choice = {"message": {"content": None, "tool_calls": [call]}}
        response = ChatCompletionResponse.model_validate({"choices": [choice]})
        assert answer.whole(response, "m")["content"][0]["id"]


def test_the_stop_sequence_that_a_server_names_is_told():
    answer = dialect.Answer("1", 0, Asked([], None, {"stop": ["END"]}, False))
    choice = {"message": {"content": "x"}, "finish_reason": "stop", "stop_reason": "END"}
    response = ChatCompletionResponse.model_validate({"choices": [choice]})
    whole = answer.whole(response, "m")
    assert (whole["stop_reason"], whole["stop_sequence"]) == ("stop_sequence", "END")


@pytest.mark.parametrize(
    "changed, word",
    [
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search"),
        ({"mcp_servers": [{"type": "url", "url": "http://elsewhere"}]}, "mcp_servers"),
        ({"max_tokens": None}, "max_tokens"),
        ({"model": None}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "text"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice"),
        ({"stop_sequences": "END"}, "stop_sequences"),
        ({"base_url": "http://elsewhere"}, "base_url"),
    ],
)
def test_what_cannot_be_taken_is_refused(client, server, changed, word):
    body = {name: value for name, value in {**ASKED, **changed}.items() if value is not None}
    with pytest.raises(anthropic.BadRequestError, match=word) as caught:
        client.post("/v1/messages", body=body, cast_to=object)
    assert caught.value.body["error"]["type"] == "invalid_request_error"
    assert caught.value.body["request_id"] == caught.value.request_id
    assert server.requests == []


def test_the_models_are_listed(serve, upstream):
    running = serve(llm=upstream, models=("gpt-4o", "vendor/other"))
    with anthropic.Anthropic(base_url=running.url, api_key="any", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["gpt-4o", "vendor/other"]
        assert client.models.retrieve("vendor/other").display_name == "vendor/other"
        with pytest.raises(anthropic.NotFoundError):
            client.models.retrieve("none")


def test_tokens_are_counted_without_a_model(client, server):
    counted = client.messages.count_tokens(model="gpt-4o", messages=HELLO)
    more = client.messages.count_tokens(
        model="gpt-4o", messages=HELLO, system="Be kind.", tools=TOOLS
    )
    assert 0 < counted.input_tokens < more.input_tokens
    with pytest.raises(anthropic.BadRequestError):
        client.messages.count_tokens(model="gpt-4o", messages=[])
    assert server.requests == []


def test_without_a_key_nothing_is_answered(service, client, server):
    key = service.service.keys.create("ann")[1]
    asks = (
        client.models.list,
        lambda: client.messages.create(**ASKED),
        lambda: client.messages.count_tokens(model="gpt-4o", messages=HELLO),
    )
    for ask in asks:
        with pytest.raises(anthropic.AuthenticationError) as caught:
            ask()
        assert caught.value.body["error"]["type"] == "authentication_error"
    assert server.requests == []
    assert client.with_options(api_key=key).models.list().data[0].id == "gpt-4o"


def test_too_many_requests_are_told_to_wait(service):
    key = service.service.keys.create("ann", requests_per_minute=1)[1]
    with anthropic.Anthropic(base_url=service.url, api_key=key, max_retries=0) as client:
        client.models.list()
        with pytest.raises(anthropic.RateLimitError) as caught:
            client.models.list()
    assert caught.value.body["error"]["type"] == "rate_limit_error"
    assert int(caught.value.response.headers["retry-after"]) >= 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_budget_that_is_used_up_is_not_asked_again(service, server, stream):
    key = service.service.keys.create("ann", budget_usd="0.000001")[1]
    with anthropic.Anthropic(base_url=service.url, api_key=key) as client:
        with pytest.raises(anthropic.APIStatusError) as caught:
            client.messages.create(**ASKED, stream=stream)
    assert caught.value.status_code == 402
    assert caught.value.body["error"]["type"] == "billing_error"
    assert server.requests == []


@pytest.mark.parametrize(
    "status, kind",
    [
        (400, anthropic.BadRequestError),
        (401, anthropic.InternalServerError),  # the service's key, not the caller's
        (404, anthropic.InternalServerError),
        (429, anthropic.RateLimitError),
        (500, anthropic.InternalServerError),
        (529, anthropic.InternalServerError),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
@both
def test_errors_of_the_model_server_have_the_class_of_the_vendor(
    client, server, status, kind, stream
):
    server.reply("bad: sk-the-key-of-the-service", status=status)
    with pytest.raises(kind) as caught:
        client.messages.create(**ASKED, stream=stream)
    assert "sk-the-key" not in caught.value.response.text
    assert caught.value.body["type"] == "error"


def test_a_prompt_that_is_too_long_is_told_in_the_words_of_the_vendor(client, server):
    error = {"message": "too long", "type": "invalid_request_error"}
    server.reply(status=400, body={"error": {**error, "code": "context_length_exceeded"}})
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
        client.messages.create(**ASKED)


def test_each_answer_has_the_id_of_its_request(client):
    raw = client.messages.with_raw_response.create(**ASKED)
    assert raw.headers["request-id"] == raw.headers["x-request-id"]
    assert raw.parse()._request_id == raw.headers["request-id"]
    with pytest.raises(anthropic.NotFoundError) as caught:
        client.messages.create(**{**ASKED, "model": "none"})
    assert caught.value.request_id == caught.value.body["request_id"]
    assert caught.value.body["error"]["type"] == "not_found_error"


def test_a_stream_that_was_cut_is_an_error_and_no_short_answer(serve, server):
    running = serve(model="gpt-4o")
    server.reply(body=CUT, headers=EVENTS)
    with anthropic.Anthropic(base_url=running.url, api_key="any", max_retries=0) as client:
        texts = []
        with pytest.raises(anthropic.APIError, match="broke off"):
            with client.messages.stream(**ASKED) as stream:
                texts.extend(stream.text_stream)
    assert texts == ["Half an ans"]


def test_a_cut_of_the_vendors_own_wire_is_seen(serve, server):
    start = (
        'event: message_start\ndata: {"type": "message_start", "message": {"id": "m", "content": [], '
        '"usage": {"input_tokens": 3, "output_tokens": 1}}}\n\n'
        'event: content_block_delta\ndata: {"type": "content_block_delta", "index": 0, '
        '"delta": {"type": "text_delta", "text": "Half"}}\n\n'
    )
    server.reply(body=start, headers=EVENTS)
    with LLM(provider="anthropic", base_url=server.url, api_key="k", model="gpt-4o") as llm:
        running = serve(llm=llm)
        with anthropic.Anthropic(base_url=running.url, api_key="any", max_retries=0) as client:
            with client.messages.create(**ASKED, stream=True) as stream:
                kinds = []
                with pytest.raises(anthropic.APIError, match="broke off"):
                    kinds.extend(event.type for event in stream)
    assert kinds[-1] == "content_block_delta"
    rows = running.ask("GET", "/usage").json()["days"]
    assert rows[0]["interrupted"] == 1


@both
def test_a_client_that_goes_away_stops_the_model(client, service, server):
    server.token_delay = 0.02
    server.reply("word " * 2000)
    with client.messages.create(**ASKED, stream=True) as events:
        next(iter(events))
    until(lambda: server.disconnects)
    until(lambda: not len(service.service.threads))


@both
def test_our_own_client_is_served(service, server):
    server.reply("Whole.", usage={"prompt_tokens": 19, "completion_tokens": 4, "cached_tokens": 5})
    server.reply("Pieces.", usage={"prompt_tokens": 19, "completion_tokens": 4, "cached_tokens": 5})
    with LLM(
        provider="anthropic", base_url=service.url, api_key="any", model="gpt-4o", max_retries=0
    ) as llm:
        whole = llm.chat_completion(HELLO)
        stream = llm.stream(HELLO)
        assert "".join(stream.text_stream) == "Pieces."
        for answer in (whole, stream.response):
            assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (19, 4)
            assert answer.usage.cached_tokens == 5
            assert answer.finish_reason == "stop"
        with pytest.raises(LLMNotFoundError):
            llm.chat_completion(HELLO, model="none")
        with pytest.raises(LLMInvalidRequestError):
            llm.chat_completion(HELLO, extra_body={"timeout": 3})


WORDS = "type text source id name input tool_use_id content thinking url data role".split()
KINDS = "text image tool_use tool_result thinking server_tool_use document custom tool any".split()
ODD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.sampled_from(KINDS),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=4)
    ),
    max_leaves=12,
)
BLOCK = st.fixed_dictionaries(
    {"type": st.sampled_from(KINDS)}, optional=dict.fromkeys(WORDS[1:], ODD)
)
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant"]), "content": st.lists(BLOCK, max_size=3) | ODD}
)
FIELDS = "system tools tool_choice stop_sequences metadata thinking stream top_k".split()


@hypothesis.given(
    ODD
    | st.fixed_dictionaries(
        {
            "model": st.just("m") | ODD,
            "max_tokens": st.just(1) | ODD,
            "messages": st.lists(TURN, min_size=1, max_size=3) | ODD,
        },
        optional=dict.fromkeys(FIELDS, ODD | st.lists(BLOCK, max_size=2)),
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
