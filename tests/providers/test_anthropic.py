"""The messages dialect behind the same calls: the exact request, and what comes back."""

import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from LLM import LLM, errors
from LLM.config import LLMConfig
from LLM.errors import LLMConfigError
from LLM.providers import anthropic
from LLM.providers.base import WireResponse
from LLM.types import (
    ChatCompletionResponse,
    CompletionResponse,
    EventType,
    Message,
    ModelsResponse,
)

MODEL = "anthropic/claude-3-5-sonnet-20241022"
HELLO = {"role": "user", "content": "Hello!"}
CALL = {"id": "t1", "type": "function", "function": {"name": "f", "arguments": '{"city": "Köln"}'}}
USE = {"type": "tool_use", "id": "t1", "name": "f", "input": {"city": "Köln"}}


@pytest.fixture
def claude(call):
    """`claude(messages, **params)`: a call in this dialect."""
    return lambda subject=(HELLO,), **params: call(MODEL, subject, **params)


def body(call):
    return json.loads(anthropic.build(call).body)


def headers(request):
    return {name.lower(): value for name, value in request.headers.items()}


def turns(call):
    return body(call)["messages"]


def test_a_request_is_exactly_this(claude):
    request = anthropic.build(claude(temperature=0.7, max_tokens=None))
    assert (request.method, request.url) == ("POST", "https://api.anthropic.com/v1/messages")
    assert json.loads(request.body) == {
        "model": "claude-3-5-sonnet-20241022",
        "max_tokens": 4096,
        "messages": [{"role": "user", "content": "Hello!"}],
        "temperature": 0.7,
    }
    assert headers(request) == {
        "accept": "application/json",
        "anthropic-version": "2023-06-01",
        "content-type": "application/json",
        "idempotency-key": "id-1",
    }
    assert request.credential is not None
    assert (request.credential[0].lower(), request.credential[1]) == ("x-api-key", "")
    assert request.key is not None
    assert "sk-secret-key" not in repr(request)


def test_a_version_of_the_users_own_wins(claude):
    request = anthropic.build(claude(headers={"anthropic-version": "2099-01-01"}))
    sent = [value for name, value in request.headers.items() if name.lower() == "anthropic-version"]
    assert sent[-1] == "2099-01-01"


def test_a_stream_asks_for_events(claude):
    request = anthropic.build(claude(stream=True, stream_options={"include_usage": True}))
    assert headers(request)["accept"] == "text/event-stream"
    assert json.loads(request.body)["stream"] is True
    assert "stream_options" not in json.loads(request.body)


def test_models_are_asked_for_in_one_page(claude):
    request = anthropic.build(claude(None, endpoint="models"))
    assert (request.method, request.body) == ("GET", None)
    assert request.url == "https://api.anthropic.com/v1/models?limit=1000"


def test_a_prompt_is_sent_as_one_message(claude):
    for prompt in ("Once", ["Once"]):
        assert turns(claude(prompt, endpoint="completion")) == [{"role": "user", "content": "Once"}]


@pytest.mark.parametrize("prompt", ["", [], ["a", "b"], [1, 2], None])
def test_a_prompt_that_this_dialect_cannot_say_is_refused(claude, prompt):
    with pytest.raises(LLMConfigError, match="prompt"):
        anthropic.build(claude(prompt, endpoint="completion"))


@pytest.mark.parametrize(
    "messages, system",
    [
        ([HELLO], None),
        ([{"role": "system", "content": "Be brief."}, HELLO], "Be brief."),
        ([{"role": "developer", "content": "Be brief."}, HELLO], "Be brief."),
        (
            [{"role": "system", "content": "A"}, HELLO, {"role": "system", "content": "B"}],
            "A\n\nB",
        ),
        ([{"role": "system", "content": [{"type": "text", "text": "A"}]}, HELLO], "A"),
        ([{"role": "system", "content": ""}, HELLO], None),
        (
            [
                {"role": "system", "content": "A"},
                {
                    "role": "system",
                    "content": [
                        {"type": "text", "text": "B", "cache_control": {"type": "ephemeral"}}
                    ],
                },
                HELLO,
            ],
            [
                {"type": "text", "text": "A"},
                {"type": "text", "text": "B", "cache_control": {"type": "ephemeral"}},
            ],
        ),
    ],
)
def test_the_system_prompt_is_pulled_out_of_the_messages(claude, messages, system):
    sent = body(claude(messages))
    assert sent.get("system") == system
    assert ("system" in sent) == (system is not None)
    assert sent["messages"] == [HELLO]


TALK = [
    Message(role="user", content="Where?"),
    {"role": "assistant", "content": "I look it up.", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "t1", "content": "here"},
    {"role": "tool", "tool_call_id": "t2", "content": [{"type": "text", "text": "there"}]},
    {"role": "tool", "tool_call_id": "t3", "content": ""},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "Done."},
]


def test_a_talk_with_tools_is_mapped_and_never_changed(claude):
    messages = copy.deepcopy(TALK)
    sent = turns(claude(messages))
    assert messages == TALK
    assert sent == [
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": [{"type": "text", "text": "I look it up."}, USE]},
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": "here"},
                {
                    "type": "tool_result",
                    "tool_use_id": "t2",
                    "content": [{"type": "text", "text": "there"}],
                },
                {"type": "tool_result", "tool_use_id": "t3"},
                {"type": "text", "text": "And?"},
            ],
        },
        {"role": "assistant", "content": "Done."},
    ]


@pytest.mark.parametrize(
    "arguments, sent",
    [
        ('{"a": 1}', {"a": 1}),
        ("", {}),
        (None, {}),
        ({"a": 1}, {"a": 1}),
        ("{cut", {"invalid_json": "{cut"}),
        ("[1]", {"value": [1]}),
    ],
)
def test_arguments_are_sent_as_an_object(claude, arguments, sent):
    call = {"id": "t", "function": {"name": "f", "arguments": arguments}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert turns(claude([HELLO, message]))[1]["content"] == [
        {"type": "tool_use", "id": "t", "name": "f", "input": sent}
    ]


def test_native_blocks_go_back_as_they_came(claude):
    """Thinking must go back unchanged, with its signature."""
    blocks = [{"type": "thinking", "thinking": "hm", "signature": "s=="}, USE]
    message = {"role": "assistant", "content": None, "tool_calls": [CALL], "content_blocks": blocks}
    for given_ in (message, Message.model_validate(message)):
        assert turns(claude([HELLO, given_]))[1] == {"role": "assistant", "content": blocks}


@pytest.mark.parametrize(
    "part, block",
    [
        ({"type": "text", "text": "x"}, {"type": "text", "text": "x"}),
        ("x", {"type": "text", "text": "x"}),
        (
            {"type": "image_url", "image_url": {"url": "https://h/a.png"}},
            {"type": "image", "source": {"type": "url", "url": "https://h/a.png"}},
        ),
        (
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,QUJD"}},
            {
                "type": "image",
                "source": {"type": "base64", "media_type": "image/png", "data": "QUJD"},
            },
        ),
        ({"type": "document", "source": {}}, {"type": "document", "source": {}}),
    ],
)
def test_parts_become_blocks(claude, part, block):
    assert turns(claude([{"role": "user", "content": [part]}]))[0]["content"] == [block]


TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "d", "parameters": {"type": "object"}},
}


@pytest.mark.parametrize(
    "params, sent",
    [
        ({"max_tokens": 9}, {"max_tokens": 9}),
        ({"max_completion_tokens": 9}, {"max_tokens": 9}),
        ({"stop": "END"}, {"stop_sequences": ["END"]}),
        ({"stop": ["a", "b"]}, {"stop_sequences": ["a", "b"]}),
        ({"top_p": 0.5, "top_k": 3}, {"top_p": 0.5, "top_k": 3}),
        ({"user": "u1"}, {"metadata": {"user_id": "u1"}}),
        ({"temperature": 1}, {"temperature": 1}),
        ({"tool_choice": "auto"}, {"tool_choice": {"type": "auto"}}),
        ({"tool_choice": "required"}, {"tool_choice": {"type": "any"}}),
        ({"tool_choice": "none"}, {"tool_choice": {"type": "none"}}),
        (
            {"tool_choice": {"type": "function", "function": {"name": "f"}}},
            {"tool_choice": {"type": "tool", "name": "f"}},
        ),
        (
            {"tool_choice": {"type": "tool", "name": "f"}},
            {"tool_choice": {"type": "tool", "name": "f"}},
        ),
        (
            {"tool_choice": "required", "parallel_tool_calls": False},
            {"tool_choice": {"type": "any", "disable_parallel_tool_use": True}},
        ),
        ({"parallel_tool_calls": True}, {}),
        (
            {"tools": [TOOL]},
            {"tools": [{"name": "f", "description": "d", "input_schema": {"type": "object"}}]},
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f"}}]},
            {"tools": [{"name": "f", "input_schema": {"type": "object", "properties": {}}}]},
        ),
        (
            {"tools": [{"name": "f", "input_schema": {}}, {"type": "web_search_20250305"}]},
            {"tools": [{"name": "f", "input_schema": {}}, {"type": "web_search_20250305"}]},
        ),
        ({"extra_body": {"max_tokens": 1, "x": None}}, {"max_tokens": 1, "x": None}),
    ],
)
def test_parameters_are_said_in_this_dialect(claude, params, sent):
    expected = {"model": MODEL.split("/")[1], "max_tokens": 4096, "messages": [HELLO], **sent}
    assert body(claude(**params)) == expected


@pytest.mark.parametrize(
    "params, problem",
    [({"temperature": 1.5}, "temperature 1.5"), ({"tool_choice": "maybe"}, "tool_choice 'maybe'")],
)
def test_what_this_dialect_cannot_say_is_refused(claude, params, problem):
    with pytest.raises(LLMConfigError, match=problem):
        anthropic.build(claude(**params))


def test_thinking_is_not_spoilt_by_our_default_temperature(claude):
    """Anthropic refuses any temperature beside `thinking` ("Extended thinking", 2026-11)."""
    thinking = {"type": "enabled", "budget_tokens": 1024}
    sent = body(claude(thinking=thinking, temperature=0.7, sampled_by_default=True))
    assert "temperature" not in sent
    assert body(claude(thinking=thinking, temperature=1))["temperature"] == 1


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "Hello",
        [{"role": "user"}],
        [{"role": "user", "content": float("nan")}],
        [{"role": "system", "content": None}, HELLO],
        [{"role": "system", "content": 5}, HELLO],
        [{"role": "system", "content": [{"type": "text", "text": None}]}, HELLO],
        [HELLO, {"role": "assistant", "tool_calls": [{"id": "t", "function": None}]}],
        [HELLO, {"role": "assistant", "tool_calls": ["t"]}],
        [HELLO, {"role": "assistant", "tool_calls": 5}],
        [HELLO, {"role": "assistant", "content": 5, "tool_calls": [CALL]}],
    ],
)
def test_messages_that_cannot_be_said_are_refused(claude, messages):
    with pytest.raises(LLMConfigError):
        anthropic.build(claude(messages))


def test_an_empty_list_of_parts_is_no_obstacle(claude):
    messages = [{"role": "user", "content": []}, HELLO]
    assert turns(claude(messages))[-1]["role"] == "user"


def test_system_parts_may_be_plain_strings_like_all_others(claude):
    assert body(claude([{"role": "system", "content": ["A"]}, HELLO]))["system"] == "A"


# What comes back: recorded from llama.cpp, the rest written by hand in the documented shapes.


def test_an_answer_reads_like_openais(claude, recorded):
    answer = anthropic.parse(claude(), recorded("anthropic/message"))
    assert isinstance(answer, ChatCompletionResponse)
    assert (answer.id, answer.text, answer.finish_reason) == ("msg_1", "Hello", "stop")
    assert answer.choices[0].stop_reason == "end_turn"
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"


def test_cached_tokens_are_part_of_the_prompt_as_at_openai(claude, recorded):
    usage = anthropic.parse(claude(), recorded("anthropic/message")).usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (115, 7, 122)
    assert (usage.cached_tokens, usage.cache_write_tokens) == (100, 5)
    assert usage.reasoning_tokens is None


@pytest.mark.parametrize(
    "native, prompt, completion, total",
    [
        ({"input_tokens": 3, "output_tokens": 2}, 3, 2, 5),
        ({"output_tokens": 2}, None, 2, None),
        ({"input_tokens": 3}, 3, None, None),
        ({"input_tokens": 0, "output_tokens": 0}, 0, 0, 0),
        ({"input_tokens": 1, "cache_read_input_tokens": None, "output_tokens": 1}, 1, 1, 2),
        ({}, None, None, None),
    ],
)
def test_unknown_counts_stay_unknown(native, prompt, completion, total):
    usage = anthropic.usage(native)
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (
        prompt,
        completion,
        total,
    )


def test_no_usage_is_none():
    assert anthropic.usage(None) is None


@pytest.mark.parametrize(
    "stop_reason, finish_reason",
    [
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("max_tokens", "length"),
        ("tool_use", "tool_calls"),
        ("refusal", "content_filter"),
        ("pause_turn", "pause_turn"),
        ("something_new", "something_new"),
        (None, None),
    ],
)
def test_stop_reasons_are_mapped_and_kept(claude, stop_reason, finish_reason):
    native = {"content": [{"type": "text", "text": "x"}], "stop_reason": stop_reason}
    response = WireResponse(200, {}, json.dumps(native).encode())
    choice = anthropic.parse(claude(), response).choices[0]
    assert (choice.finish_reason, choice.stop_reason) == (finish_reason, stop_reason)


def test_blocks_become_text_thinking_and_tool_calls(claude, recorded):
    message = anthropic.parse(claude(), recorded("anthropic/message-tools")).choices[0].message
    assert (message.content, message.reasoning_content) == ("I look it up.", "Let me see.")
    (tool,) = message.tool_calls
    assert (tool.id, tool.name, json.loads(tool.arguments)) == ("toolu_1", "f", {"city": "Köln"})
    assert [block["type"] for block in message.content_blocks] == ["thinking", "text", "tool_use"]


def test_an_answer_goes_back_into_the_talk_as_it_came(claude, recorded):
    response = recorded("anthropic/message-tools")
    message = anthropic.parse(claude(), response).choices[0].message
    assert turns(claude([HELLO, message]))[1]["content"] == json.loads(response.body)["content"]


def test_a_completion_reads_like_openais(claude, recorded):
    answer = anthropic.parse(claude("x", endpoint="completion"), recorded("anthropic/message"))
    assert isinstance(answer, CompletionResponse)
    assert (answer.text, answer.finish_reason, answer.usage.total_tokens) == ("Hello", "stop", 122)


def test_a_list_of_models_reads_like_openais(claude, recorded):
    models = anthropic.parse(claude(None, endpoint="models"), recorded("anthropic/models"))
    assert isinstance(models, ModelsResponse)
    assert [m.id for m in models] == ["claude-3-5-sonnet-20241022"]
    assert models.data[0].display_name == "Claude 3.5 Sonnet"


def test_a_real_answer_of_another_server_is_read(claude, recorded):
    answer = anthropic.parse(claude(), recorded("llamacpp/messages"))
    assert (answer.text, answer.finish_reason) == ("**", "length")
    assert (answer.usage.prompt_tokens, answer.usage.cached_tokens) == (22, 21)
    (tool,) = anthropic.parse(claude(), recorded("llamacpp/messages-tool")).tool_calls
    assert (tool.name, json.loads(tool.arguments)) == ("f", {"a": 2})


@pytest.mark.parametrize(
    "name, cls, status, retriable, wait",
    [
        ("anthropic/error-long", "LLMContextLengthError", 400, False, None),
        ("anthropic/error-credit", "LLMQuotaError", 400, False, None),
        ("anthropic/error-key", "LLMAuthenticationError", 401, False, None),
        ("anthropic/error-model", "LLMNotFoundError", 404, False, None),
        ("anthropic/error-body", "LLMInvalidRequestError", 400, False, None),
        ("anthropic/error-overloaded", "LLMServerError", 529, True, None),
        ("anthropic/error-rate", "LLMRateLimitError", 429, True, 12),
        ("llamacpp/messages-error-no-messages", "LLMServerError", 500, True, None),
        ("llamacpp/error-context", "LLMContextLengthError", 400, False, None),
        ("servers/error-detail", "LLMInvalidRequestError", 422, False, None),
    ],
)
def test_a_real_error_is_one_of_ours(claude, recorded, name, cls, status, retriable, wait):
    error = anthropic.error(claude(), recorded(name))
    assert type(error) is getattr(errors, cls)
    assert (error.status_code, error.retriable, error.suggested_wait) == (status, retriable, wait)
    assert error.provider == "anthropic"
    assert error.request_id == ("req_a" if name.startswith("anthropic") else None)


def test_a_429_says_that_tokens_were_too_many(claude, recorded):
    error = anthropic.error(claude(), recorded("anthropic/error-rate"))
    assert isinstance(error, errors.LLMRateLimitError)
    assert error.limit == "tokens"


@pytest.mark.parametrize(
    "content", [b"", b"<html>", b"null", b"{}", b'{"content": null}', b'{"content": ["x"]}', b"{"]
)
def test_an_answer_that_is_none_is_a_response_error(claude, content):
    with pytest.raises(errors.LLMResponseError) as caught:
        anthropic.parse(claude(), WireResponse(200, {}, content))
    assert not caught.value.retriable


# Streams.


@pytest.mark.parametrize(
    "name, text, finish_reason, counts",
    [
        ("anthropic/stream", "Hello", "stop", (115, 7, 122)),
        ("anthropic/stream-tools", "I look it up.", "tool_calls", (115, 7, 122)),
        ("servers/messages-stream-late-usage", "Hi", "stop", (12, 3, 15)),  # litellm's proxy
        ("llamacpp/messages-stream", "**", "length", (22, 2, 24)),
        ("llamacpp/messages-stream-no-start", "ϩ", "length", (None, 2, None)),
        ("llamacpp/messages-stream-empty", "", "length", (None, 1, None)),
        ("llamacpp/messages-tool-stream", "", "tool_calls", None),
    ],
)
def test_a_real_stream_is_read(claude, recorded, decode, name, text, finish_reason, counts):
    stream = decode(claude(stream=True), recorded(name).body)
    assert stream.error is None
    assert stream.complete
    assert (stream.text, stream.events[-1].finish_reason) == (text, finish_reason)
    usage = stream.events[-1].usage
    assert counts is None or counts == (
        usage.prompt_tokens,
        usage.completion_tokens,
        usage.total_tokens,
    )
    assert (stream.response.text, stream.response.finish_reason) == (text, finish_reason)
    assert stream.response.usage == usage


@pytest.mark.parametrize("name", ["message", "message-tools"])
def test_a_stream_folds_into_what_would_have_come_without_it(claude, recorded, decode, name):
    whole = anthropic.parse(claude(), recorded(f"anthropic/{name}"))
    stream = decode(
        claude(stream=True), recorded(f"anthropic/{name.replace('message', 'stream')}").body
    )
    folded, expected = stream.response.model_dump(), whole.model_dump()
    for answer in (folded, expected):  # said only in the first event, or only at the end
        answer.pop("usage")
    assert folded == expected
    assert stream.response.usage.total_tokens == whole.usage.total_tokens


def test_thinking_text_and_tools_of_a_stream_come_as_they_are(claude, recorded, decode):
    stream = decode(claude(stream=True), recorded("anthropic/stream-tools").body)
    assert (stream.reasoning, stream.text) == ("Let me see.", "I look it up.")
    assert stream.tool_calls == [("toolu_1", "f", '{"city": "Köln"}')]
    kinds = [event.type for event in stream.events]
    assert kinds[-2:] == [EventType.TOOL_CALL, EventType.MESSAGE_COMPLETE]


@pytest.mark.parametrize("name", ["llamacpp/messages-tool-stream", "anthropic/stream-tools"])
def test_a_tool_call_of_a_stream_is_handed_over_once_and_whole(claude, recorded, decode, name):
    stream = decode(claude(stream=True), recorded(name).body)
    ((id_, tool, arguments),) = stream.tool_calls
    assert json.loads(arguments)
    (folded,) = stream.response.tool_calls
    assert (folded.id, folded.name) == (id_, tool)
    assert json.loads(folded.arguments) == json.loads(arguments)


def event(kind, **fields):
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode()


def test_a_whole_input_at_the_start_of_a_block_is_taken(claude, decode):
    sent = event("content_block_start", index=0, content_block=USE)
    sent += event("content_block_stop", index=0) + event("message_stop")
    stream = decode(claude(stream=True), sent)
    assert stream.tool_calls == [("t1", "f", '{"city": "Köln"}')]


@pytest.mark.parametrize(
    "sent, complete",
    [
        (b"", False),
        (event("ping"), False),
        (event("content_block_start", index=0, content_block={"type": "text", "text": "x"}), False),
        (event("message_delta", delta={"stop_reason": None}), False),
        (event("message_delta", delta={"stop_reason": "end_turn"}), True),
        (event("message_stop"), True),
        (b"data: [DONE]\n\n", True),
        (event("something_new", x=1), False),
        (b'data: {"type": "message_stop"}\n\n', True),  # without a name
        (b"event: message_stop\ndata: {}\n\n", True),  # without a type
    ],
)
def test_a_stream_is_complete_with_its_end_mark_or_a_stop_reason(claude, decode, sent, complete):
    stream = decode(claude(stream=True), sent)
    assert (stream.error, stream.complete) == (None, complete)


@pytest.mark.parametrize(
    "sent, cls, said",
    [
        (event("error", error={"type": "overloaded_error", "message": "m"}), "LLMServerError", "m"),
        (
            event("error", error={"type": "rate_limit_error", "message": "m"}),
            "LLMRateLimitError",
            "m",
        ),
        (
            event(
                "error", error={"type": "invalid_request_error", "message": "prompt is too long"}
            ),
            "LLMContextLengthError",
            "too long",
        ),
        (b"event: error\ndata: it broke\n\n", "LLMAPIError", "it broke"),
        (b'event: error\ndata: "it broke"\n\n', "LLMAPIError", "it broke"),
        (b'data: {"error": {"message": "m", "code": 500}}\n\n', "LLMServerError", "m"),
        (b"data: {cut\n\n", "LLMResponseError", "not JSON"),
        (b"data: 5\n\n", "LLMResponseError", "not an object"),
    ],
    ids=lambda value: repr(value)[:50],
)
def test_an_error_inside_a_stream_is_one_of_ours(claude, decode, sent, cls, said):
    text = event("content_block_start", index=0, content_block={"type": "text", "text": "so f"})
    for before in (b"", text):
        stream = decode(claude(stream=True), before + sent)
        assert isinstance(stream.error, getattr(errors, cls))
        assert said in str(stream.error)
        assert before == b"" or stream.response.text == "so f"


@pytest.mark.parametrize(
    "name", ["anthropic/stream-error", "llamacpp/messages-error-in-tool-stream"]
)
def test_a_real_error_inside_a_stream_keeps_what_came(claude, recorded, decode, name):
    stream = decode(claude(stream=True), recorded(name).body)
    assert isinstance(stream.error, errors.LLMServerError)
    assert stream.error.retriable
    assert stream.tool_calls == []  # half a call is not handed over
    assert stream.response.text == stream.text
    assert stream.decoder.usage.prompt_tokens


WHOLE = [
    {"type": "message_start", "message": {"id": "m", "model": "c", "usage": {"input_tokens": 1}}},
    {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": "a"}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "b"}},
    {
        "type": "content_block_start",
        "index": 1,
        "content_block": {"type": "tool_use", "id": "t", "name": "f", "input": {}},
    },
    {
        "type": "content_block_delta",
        "index": 1,
        "delta": {"type": "input_json_delta", "partial_json": "{}"},
    },
    {"type": "content_block_stop", "index": 1},
    {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 2}},
    {"type": "message_stop"},
]
ANSWER = {
    "id": "m",
    "model": "c",
    "content": [{"type": "text", "text": "a"}, USE, {"type": "thinking", "thinking": "hm"}],
    "stop_reason": "end_turn",
    "usage": {"input_tokens": 1, "cache_read_input_tokens": 1, "output_tokens": 2},
}
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 600)
    | st.floats(allow_nan=False)
    | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)


def paths(value, path=()):
    """The way to every place in a JSON value."""
    yield path
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from paths(value[key], (*path, key))


def put(value, path, odd):
    if not path:
        return odd
    twin = copy.copy(value)
    twin[path[0]] = put(value[path[0]], path[1:], odd)
    return twin


@given(st.sampled_from([path for path in paths(WHOLE) if path]), JSON)
def test_an_odd_value_anywhere_in_a_stream_is_borne_with_or_one_of_our_errors(
    call, survive, path, odd
):
    sent = b"".join(b"data: " + json.dumps(e).encode() + b"\n\n" for e in put(WHOLE, path, odd))
    survive.stream(call(MODEL, stream=True), sent)


@given(st.sampled_from(list(paths(ANSWER))), JSON)
def test_an_odd_value_anywhere_in_an_answer_is_borne_with_or_one_of_our_errors(
    call, survive, path, odd
):
    survive.answer(call(MODEL), json.dumps(put(ANSWER, path, odd)).encode())


def test_the_dialect_is_spoken_at_any_address(call):
    config = LLMConfig(base_url="http://127.0.0.1:9", provider="anthropic", model="tiny")
    request = anthropic.build(call(config=config))
    assert (request.url, request.key) == ("http://127.0.0.1:9/v1/messages", None)


def test_the_mark_of_a_cached_prefix_stands_on_the_tools_result(server):
    part = {"type": "text", "text": "5", "cache_control": {"type": "ephemeral"}}
    call = {"id": "t1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "2 + 3?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "t1", "content": [part]},
    ]
    with LLM(base_url=server.url, provider="anthropic", model="m") as llm:
        llm.chat_completion(messages)
    (result,) = server.requests[0].json["messages"][-1]["content"]
    assert result["cache_control"] == {"type": "ephemeral"}
    assert result["content"] == [{"type": "text", "text": "5"}]
    assert "cache_control" in part
