"""The chat-completions dialect: the exact request, and what comes back from real servers."""

import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from LLM import errors
from LLM.config import LLMConfig
from LLM.errors import LLMConfigError, LLMError
from LLM.providers import openai
from LLM.providers.base import WireResponse
from LLM.types import (
    ChatCompletionResponse,
    CompletionResponse,
    EventType,
    Message,
    ModelsResponse,
    ToolCall,
)

KEY = "sk-secret-key"  # of every call here
HELLO = {"role": "user", "content": "Hello!"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def body(call):
    return json.loads(openai.build(call).body)


def headers(request):
    return {name.lower(): value for name, value in request.headers.items()}


def test_a_chat_request_is_exactly_this(call):
    request = openai.build(call(temperature=0.7, max_tokens=None, tools=None))
    assert (request.method, request.url) == ("POST", "https://api.openai.com/v1/chat/completions")
    assert request.body == (
        b'{"model":"gpt-4o","messages":[{"role":"user","content":"Hello!"}],"temperature":0.7}'
    )
    assert headers(request) == {
        "accept": "application/json",
        "content-type": "application/json",
        "idempotency-key": "id-1",
    }


def test_a_key_is_beside_the_request_and_never_in_it(call):
    request = openai.build(call())
    assert request.credential is not None
    name, before = request.credential
    assert (name.lower(), before) == ("authorization", "Bearer ")
    assert request.key is not None
    assert request.key.get_secret_value() == KEY
    assert KEY not in repr(request)
    assert openai.build(call(config=LLMConfig())).key is None


def test_a_stream_asks_for_events_and_for_its_usage(call):
    request = openai.build(call(stream=True))
    assert headers(request)["accept"] == "text/event-stream"
    assert json.loads(request.body)["stream"] is True
    assert json.loads(request.body)["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize("given, sent", [({"include_usage": False}, {"include_usage": False})])
def test_a_users_own_stream_options_win(call, given, sent):
    assert body(call(stream=True, stream_options=given))["stream_options"] == sent
    assert "stream_options" not in body(call(stream=True, stream_options=None))


def test_a_host_that_refuses_stream_options_is_not_sent_them(call):
    assert "stream_options" not in body(call("mistral/m", stream=True))


def test_models_are_asked_for_without_a_body(call):
    request = openai.build(call(endpoint="models", subject=None))
    assert (request.method, request.url) == ("GET", "https://api.openai.com/v1/models")
    assert (request.body, headers(request)) == (None, {"accept": "application/json"})


@pytest.mark.parametrize("prompt", ["Once", ["a", "b"], [1, 2], [[1], [2]]])
def test_a_completion_request_is_exactly_this(call, prompt):
    request = openai.build(call(endpoint="completion", subject=prompt, max_tokens=5))
    assert request.url == "https://api.openai.com/v1/completions"
    assert json.loads(request.body) == {"model": "gpt-4o", "prompt": prompt, "max_tokens": 5}


@pytest.mark.parametrize("prompt", ["", [], None, 4, {"a": 1}, b"x", [None], [b"x"]])
def test_a_prompt_that_is_none_is_refused(call, prompt):
    with pytest.raises(LLMConfigError, match="prompt"):
        openai.build(call(endpoint="completion", subject=prompt))


def test_what_is_none_is_left_out_and_all_else_is_sent(call):
    sent = body(call(top_p=None, seed=0, stop=[], logprobs=False, user=""))
    assert sent == {
        "model": "gpt-4o",
        "messages": [HELLO],
        "seed": 0,
        "stop": [],
        "logprobs": False,
        "user": "",
    }


def test_extra_body_goes_over_everything(call):
    sent = body(call(temperature=0.7, extra_body={"temperature": None, "model": "x", "new": [1]}))
    assert (sent["temperature"], sent["model"], sent["new"]) == (None, "x", [1])


@pytest.mark.parametrize(
    "model, default, sent",
    [
        ("openai/gpt-4o", True, {"temperature": 0.7, "max_tokens": 9}),
        ("openai/o3-mini", True, {"max_completion_tokens": 9}),
        ("openai/o3-mini", False, {"temperature": 0.7, "max_completion_tokens": 9}),
        ("groq/o3-mini", True, {"temperature": 0.7, "max_tokens": 9}),
    ],
)
def test_reasoning_models_are_asked_as_they_want(call, model, default, sent):
    asked = body(call(model, sampled_by_default=default, temperature=0.7, max_tokens=9))
    assert {k: v for k, v in asked.items() if k not in ("model", "messages")} == sent


def test_a_reasoning_model_at_an_unknown_server_keeps_the_old_name_of_its_limit(call):
    config = LLMConfig(base_url="http://h", model="o3-mini")
    asked = body(call(config=config, sampled_by_default=True, temperature=0.7, max_tokens=9))
    assert asked == {"model": "o3-mini", "messages": [HELLO], "max_tokens": 9}


def test_a_completion_keeps_the_old_name_of_its_limit(call):
    asked = body(call("openai/o3", "x", endpoint="completion", max_tokens=9))
    assert asked["max_tokens"] == 9


MESSAGES = [
    Message(role="system", content="Be brief."),
    {"role": "user", "content": [{"type": "text", "text": "Köln\u2028"}], "name": "ann"},
    Message(role="assistant", content=None, tool_calls=[ToolCall.model_validate(CALL)]),
    {"role": "tool", "tool_call_id": "c1", "content": "4"},
    {"role": "assistant", "tool_calls": [ToolCall.model_validate(CALL)]},
]


def test_messages_and_dicts_are_sent_alike_and_never_changed(call):
    messages = copy.deepcopy(MESSAGES)
    sent = body(call(subject=messages))["messages"]
    assert messages == MESSAGES
    assert sent[0] == {"role": "system", "content": "Be brief."}
    assert sent[1] == MESSAGES[1]
    assert sent[2]["tool_calls"] == [CALL]
    assert sent[3] == MESSAGES[3]
    assert sent[4] == {"role": "assistant", "tool_calls": [CALL]}


def test_text_is_sent_as_utf_8_and_not_escaped(call):
    assert (
        "Köln\u2028😀".encode()
        in openai.build(call(subject=[{**HELLO, "content": "Köln\u2028😀"}])).body
    )


def test_an_answer_is_sent_back_without_what_only_an_answer_has(call):
    answer = {
        "role": "assistant",
        "content": "x",
        "reasoning_content": "hm",
        "annotations": [],
        "refusal": None,
        "content_blocks": [{"type": "text", "text": "x"}],
    }
    expected = [HELLO, {"role": "assistant", "content": "x"}]
    assert body(call(subject=[HELLO, answer]))["messages"] == expected
    response = ChatCompletionResponse.model_validate({"choices": [{"message": answer}]})
    assert body(call(subject=[HELLO, response.choices[0].message]))["messages"] == expected


def test_tools_may_be_values(call):
    assert body(call(tools=[TOOL]))["tools"] == [TOOL]


@pytest.mark.parametrize(
    "messages, problem",
    [
        ([], "empty"),
        ("Hello", "list of messages, not str"),
        (b"Hello", "bytes"),
        ({"role": "user", "content": "x"}, "dict"),
        (None, "NoneType"),
        (5, "int"),
        (["Hello"], r"messages\[0\] is a str"),
        ([HELLO, None], r"messages\[1\]"),
        ([{"content": "x"}], r"messages\[0\] has no role"),
        ([{"role": "", "content": "x"}], "role"),
        ([{"role": None, "content": "x"}], "role"),
        ([{"role": "user"}], "no content"),
        ([HELLO, {"role": "user", "content": float("nan")}], r"messages\[1\]\.content .*finite"),
        ([{"role": "user", "content": b"x"}], r"messages\[0\]\.content \(bytes\)"),
        ([{"role": "user", "content": [{"a": {1, 2}}]}], r"content\[0\]\.a \(set\)"),
        ([{"role": "user", "content": "\ud800"}], "surrogate"),
        ([{"role": "user", "content": [{(1, 2): 3}]}], "not JSON"),
    ],
)
def test_messages_that_cannot_be_sent_are_refused_and_the_place_is_named(call, messages, problem):
    with pytest.raises(LLMConfigError, match=problem):
        openai.build(call(subject=messages))


def test_a_message_that_contains_itself_is_refused(call):
    cycle = []
    cycle.append(cycle)
    with pytest.raises(LLMConfigError, match="contains itself"):
        openai.build(call(subject=[{"role": "user", "content": cycle}]))


@pytest.mark.parametrize("value", [float("inf"), b"x", {1}, object()])
def test_a_parameter_that_is_not_json_is_refused_by_name(call, value):
    with pytest.raises(LLMConfigError, match="metadata"):
        openai.build(call(metadata=value))


def test_a_users_own_idempotency_key_wins(call):
    sent = openai.build(call(headers={"idempotency-key": "mine"})).headers.items()
    assert [value for name, value in sent if name.lower() == "idempotency-key"] == ["mine"]


# Recorded from llama.cpp; the other servers' answers are written by hand in the shapes that they document.


def test_a_real_chat_answer_is_read(call, recorded):
    answer = openai.parse(call(), recorded("llamacpp/chat"))
    assert isinstance(answer, ChatCompletionResponse)
    assert (answer.text, answer.finish_reason, answer.model) == ("**", "length", "tiny")
    assert answer.usage is not None
    assert (answer.usage.total_tokens, answer.usage.cached_tokens) == (24, 0)
    assert answer.timings["prompt_n"] == 22


def test_a_real_tool_call_is_read(call, recorded):
    answer = openai.parse(call(), recorded("llamacpp/chat-tool"))
    assert answer.finish_reason == "tool_calls"
    (tool,) = answer.tool_calls
    assert (tool.name, json.loads(tool.arguments)["a"] in (1, 2)) == ("f", True)
    two = openai.parse(call(), recorded("llamacpp/chat-two-tools")).tool_calls
    assert len({tool.id for tool in two}) == 2


def test_a_real_completion_and_a_real_list_are_read(call, recorded):
    answer = openai.parse(call(endpoint="completion"), recorded("llamacpp/completion"))
    assert isinstance(answer, CompletionResponse)
    assert (answer.text, answer.usage.total_tokens) == ("jj", 5)
    models = openai.parse(call(endpoint="models"), recorded("llamacpp/models"))
    assert isinstance(models, ModelsResponse)
    assert [model.id for model in models] == ["tiny"]


@pytest.mark.parametrize(
    "name, cls, status, retriable, said",
    [
        ("llamacpp/error-key", "LLMAuthenticationError", 401, False, "Invalid API Key"),
        ("llamacpp/error-path", "LLMNotFoundError", 404, False, "File Not Found"),
        ("llamacpp/error-json", "LLMInvalidRequestError", 400, False, "parse error"),
        ("llamacpp/error-no-messages", "LLMInvalidRequestError", 400, False, "'messages'"),
        ("llamacpp/error-no-role", "LLMServerError", 500, True, "Missing 'role'"),
        ("llamacpp/error-context", "LLMContextLengthError", 400, False, "620 tokens"),
        ("llamacpp/error-in-tool", "LLMServerError", 500, True, "peg-native"),
        ("openai/error-key", "LLMAuthenticationError", 401, False, "Incorrect API key"),
        ("openai/error-model", "LLMNotFoundError", 404, False, "does not exist"),
        ("openai/error-context", "LLMContextLengthError", 400, False, "128000 tokens"),
        ("openai/error-quota", "LLMQuotaError", 429, False, "current quota"),
        ("openai/error-rate-tokens", "LLMRateLimitError", 429, True, "tokens per min"),
        ("servers/error-detail", "LLMInvalidRequestError", 422, False, "Extra inputs"),
        ("servers/error-text", "LLMServerError", 500, True, "Internal Server Error"),
        ("servers/error-html", "LLMServerError", 502, True, "502 Bad Gateway"),
        ("servers/error-string", "LLMNotFoundError", 404, False, "model 'x' not found"),
        ("servers/error-timeout", "LLMServerError", 408, True, "Timeout"),
    ],
)
def test_a_real_error_is_one_of_ours_and_says_what_to_do(
    call, recorded, name, cls, status, retriable, said
):
    error = openai.error(call(), recorded(name))
    assert type(error) is getattr(errors, cls)
    assert (error.status_code, error.retriable) == (status, retriable)
    assert said in str(error)
    assert str(status) in str(error)
    assert "\n" not in str(error)
    assert said in error.body
    assert (error.provider, error.model) == ("openai", "gpt-4o")


def test_an_error_keeps_all_that_the_server_said(call, recorded):
    error = openai.error(call(), recorded("openai/error-rate-tokens"))
    assert isinstance(error, errors.LLMRateLimitError)
    assert (error.limit, error.suggested_wait, error.request_id) == ("tokens", 1.5, "req_1")
    assert (error.code, error.type) == ("rate_limit_exceeded", "tokens")
    error = openai.error(call(), recorded("openai/error-context"))
    assert (error.code, error.param) == ("context_length_exceeded", "messages")
    error = openai.error(call(), recorded("llamacpp/error-key"))
    assert (error.code, error.type) == (401, "authentication_error")


def answered(status, content, content_type="application/json", **headers):
    if not isinstance(content, bytes):
        content = json.dumps(content).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return WireResponse(status, {"content-type": content_type, **named}, content)


@pytest.mark.parametrize(
    "headers, text, limit",
    [
        ({"x_ratelimit_remaining_requests": "0"}, "", "requests"),
        ({"x_ratelimit_remaining_tokens": "0"}, "", "tokens"),
        ({"x_ratelimit_remaining_tokens": "-1"}, "", None),
        ({}, "Limit 3 requests per min", "requests"),
        ({}, "Limit 40000 tokens per min", "tokens"),
        ({}, "slow down", None),
    ],
)
def test_a_429_says_which_limit_was_hit(call, headers, text, limit):
    error = openai.error(call(), answered(429, {"error": {"message": text}}, **headers))
    assert isinstance(error, errors.LLMRateLimitError)
    assert error.limit == limit


@pytest.mark.parametrize(
    "status, should_retry, retriable",
    [
        (503, None, True),
        (503, "false", False),
        (400, "true", True),
        (409, "true", True),
        (409, None, False),
        (501, None, False),
        (500, "maybe", True),
    ],
)
def test_the_servers_word_on_retrying_is_obeyed(call, status, should_retry, retriable):
    headers = {} if should_retry is None else {"x_should_retry": should_retry}
    assert openai.error(call(), answered(status, b"", **headers)).retriable is retriable


def test_a_redirect_is_not_followed_and_says_where_to(call):
    error = openai.error(call(), answered(307, b"", location="https://login.example/\x1b[31m"))
    assert type(error) is errors.LLMAPIError
    assert "https://login.example/" in str(error)
    assert "\x1b" not in str(error)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html><title>Sign in</title>",
        b'{"choices": [',
        b"null",
        b"[]",
        b"{}",
        b'{"choices": []}',
        b'{"choices": null}',
        b'{"choices": [{}]}',
        b'{"choices": [{"message": "text"}]}',
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"choices": [{"message": {"content": 5}}]}',
    ],
    ids=lambda content: repr(content[:40]),
)
def test_an_answer_that_is_none_is_a_response_error_and_is_not_retried(call, content):
    with pytest.raises(errors.LLMResponseError) as caught:
        openai.parse(call(), answered(200, content, "text/html", x_request_id="r1"))
    error = caught.value
    assert (error.status_code, error.retriable, error.request_id) == (200, False, "r1")
    assert "https://api.openai.com/v1" in str(error)


def test_a_login_page_is_named_by_its_title(call):
    with pytest.raises(errors.LLMResponseError, match="Sign in"):
        openai.parse(call(), answered(200, b"<html><title>Sign in</title>", "text/html"))


@pytest.mark.parametrize(
    "content",
    [
        b'\xef\xbb\xbf{"choices": [{"message": {"content": "x"}}]}',
        '{"choices": [{"message": {"content": "x"}}]}'.encode("utf-16"),
        b'{"choices": [{"message": {"content": "x"}}], "new": ' + b"9" * 5000 + b"}",
        b'{"choices": [{"message": {"content": "x"}, "x": "\\ud800"}]}',
        b'{"choices": [{"message": {"content": "x"}, "x": "\xff"}]}',
        b'{"choices": [{"message": {"content": "x"}, "x": NaN}]}',
    ],
)
def test_what_is_harmless_in_an_answer_is_borne_with(call, content):
    assert openai.parse(call(), answered(200, content)).text == "x"


def test_half_a_character_can_be_printed(call):
    content = b'{"choices": [{"message": {"content": "a\\ud83d"}}]}'
    openai.parse(call(), answered(200, content)).text.encode()


@pytest.mark.parametrize(
    "content, cls",
    [
        ({"error": {"message": "m", "code": 429}}, errors.LLMRateLimitError),
        ({"error": {"message": "m", "type": "server_error", "code": 500}}, errors.LLMServerError),
        ({"error": "overloaded"}, errors.LLMAPIError),
        ({"detail": "m"}, errors.LLMAPIError),
    ],
)
def test_an_error_inside_a_200_is_that_error(call, content, cls):
    with pytest.raises(cls) as caught:
        openai.parse(call(), answered(200, content))
    assert type(caught.value) is cls


ECHOES = [
    {"error": {"message": f"bad key {KEY}"}},
    {"error": {"message": "x" * 490 + KEY}},
    {"error": {"message": "m", "code": KEY, "type": KEY, "param": KEY}},
    {"detail": KEY},
    {KEY: KEY},
]


@pytest.mark.parametrize(
    "content",
    [*ECHOES, b"x" * (64 * 1024 - 8) + KEY.encode()],
    ids=["message", "cut", "code", "detail", "name", "long"],
)
@pytest.mark.parametrize("status", [200, 401])
def test_a_key_that_the_server_echoes_is_nowhere_on_the_error(call, content, status):
    response = answered(status, content, f"text/{KEY}", location=KEY)
    if status == 401:
        error = openai.error(call(), response)
    else:
        with pytest.raises(LLMError) as caught:
            openai.parse(call(), response)
        error = caught.value
    assert KEY[:8] not in str(error)
    assert KEY[:8] not in repr(vars(error))


def test_control_characters_of_a_server_reach_no_terminal(call):
    error = openai.error(call(), answered(400, {"error": {"message": "a\x1b[2J\r\nb\x07\u202e"}}))
    assert str(error).isprintable()


def test_an_errors_body_is_cut(call):
    error = openai.error(call(), answered(500, b"x" * 1_000_000, "text/plain"))
    assert len(error.body) == 64 * 1024
    assert len(str(error)) < 1000


# Streams.


@pytest.mark.parametrize(
    "name, text, finish_reason, total",
    [
        ("llamacpp/chat-stream-usage", "**", "length", 24),
        ("llamacpp/chat-stream-no-role", None, None, None),
        ("llamacpp/chat-stream-ping", None, "length", None),
        ("openai/stream", "Hello there", "stop", 11),
        ("servers/stream-no-done", "Hi", "stop", 5),  # transformers serve
        ("servers/stream-usage-with-choices", "Hi", "stop", 5),  # litellm's proxy
        ("servers/stream-null-finish", "Hi", None, None),  # Ollama
        ("servers/stream-crlf", "Hi", "stop", None),
    ],
)
def test_a_real_stream_is_read(call, recorded, decode, name, text, finish_reason, total):
    stream = decode(call(stream=True), recorded(name).body)
    assert stream.error is None
    assert stream.complete
    assert stream.events[-1].type is EventType.MESSAGE_COMPLETE
    assert [e.type for e in stream.events].count(EventType.MESSAGE_COMPLETE) == 1
    assert stream.text == stream.response.text
    assert text is None or stream.text == text
    if finish_reason is not None:
        assert stream.events[-1].finish_reason == finish_reason == stream.response.finish_reason
    if total is not None:
        assert stream.events[-1].usage.total_tokens == total == stream.response.usage.total_tokens


def test_a_stream_folds_into_what_would_have_come_without_it(call, recorded, decode):
    stream = decode(call(stream=True), recorded("openai/stream").body)
    response = stream.response
    assert (response.id, response.model, response.object) == (
        "chatcmpl-1",
        "gpt-4o-2024-08-06",
        "chat.completion",
    )
    assert response.system_fingerprint == "fp_1"
    assert response.choices[0].message.role == "assistant"
    assert response.usage.cached_tokens == 0


@pytest.mark.parametrize(
    "name, calls",
    [
        ("llamacpp/chat-tool-stream", None),
        ("openai/stream-tools", [("c1", "f", '{"city": "Köln"}'), ("c2", "g", "{}")]),
        ("servers/stream-tools-stop", [("c1", "f", '{"a":1}')]),  # litellm's proxy
        ("servers/stream-tools-same-index", [("c1", "f", "{}"), ("c2", "g", "{}")]),  # Gemini
    ],
)
def test_tool_calls_of_a_stream_come_whole_and_once(call, recorded, decode, name, calls):
    stream = decode(call(stream=True), recorded(name).body)
    assert stream.error is None
    folded = [(c.id, c.name, c.arguments) for c in stream.response.tool_calls]
    assert stream.tool_calls == folded
    assert calls is None or folded == calls
    for _, _, arguments in folded:
        json.loads(arguments)


def chunk(delta=None, finish_reason=None, **fields):
    choice = {"index": 0, "delta": delta or {}, "finish_reason": finish_reason}
    return {"id": "x", "object": "chat.completion.chunk", "choices": [choice], **fields}


def sent(*chunks, done=True):
    lines = [c if isinstance(c, bytes) else b"data: " + json.dumps(c).encode() for c in chunks]
    return b"".join(line + b"\n\n" for line in [*lines, *([b"data: [DONE]"] if done else [])])


def test_pieces_of_two_calls_may_come_by_turns(call, decode):
    """What is handed over must be what the response has: a call with half its arguments is none."""
    pieces = [
        (0, "c1", "f", '{"a"'),
        (1, "c2", "g", '{"b"'),
        (0, None, None, ":1}"),
        (1, None, None, ":2}"),
    ]
    chunks = [
        chunk(
            {
                "tool_calls": [
                    {"index": index, "id": id_, "function": {"name": name, "arguments": text}}
                ]
            }
        )
        for index, id_, name, text in pieces
    ]
    stream = decode(call(stream=True), sent(*chunks, chunk(finish_reason="tool_calls")))
    assert stream.tool_calls == [("c1", "f", '{"a":1}'), ("c2", "g", '{"b":2}')]


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_thinking_is_told_from_text(call, decode, field):
    chunks = [chunk({field: "h"}), chunk({field: "m"}), chunk({"content": "Yes"}, "stop")]
    stream = decode(call(stream=True), sent(*chunks))
    assert (stream.reasoning, stream.text) == ("hm", "Yes")
    assert stream.response.choices[0].message.reasoning_content == "hm"


def test_thinking_under_both_its_names_is_said_once(call, decode):
    """vLLM sends the new name and the deprecated one, with the same text."""
    both = chunk({"reasoning": "hm", "reasoning_content": "hm"})
    stream = decode(call(stream=True), sent(both, chunk({"content": "Yes"}, "stop")))
    assert stream.reasoning == "hm"
    assert stream.response.choices[0].message.reasoning_content == "hm"


@pytest.mark.parametrize(
    "chunks, complete",
    [
        ([chunk({"content": "a"})], False),
        ([chunk({"content": "a"}, "stop")], True),
        ([chunk({"content": "a"}, "")], False),  # an empty finish reason is none
        ([b"data: [DONE]"], True),
        ([b"data: "], False),
        ([], False),
        ([{"choices": [], "usage": {"prompt_tokens": 1}}], False),
    ],
)
def test_a_stream_is_complete_with_its_end_mark_or_a_finish_reason(call, decode, chunks, complete):
    assert decode(call(stream=True), sent(*chunks, done=False)).complete is complete


def test_nothing_counts_after_the_end_mark(call, decode):
    stream = decode(
        call(stream=True), sent(chunk({"content": "a"}, "stop")) + sent(chunk({"content": "b"}))
    )
    assert stream.text == "a"


def test_events_come_from_the_first_choice_and_the_others_are_folded(call, decode):
    chunks = [
        {"choices": [{"index": index, "delta": {"content": text}, "finish_reason": None}]}
        for index, text in [(1, "b"), (0, "a"), (1, "B"), (0, "A")]
    ]
    ends = [{"choices": [{"index": i, "delta": {}, "finish_reason": "stop"}]} for i in (0, 1)]
    stream = decode(call(stream=True, n=2), sent(*chunks, *ends))
    assert stream.text == "aA"
    assert [c.message.content for c in stream.response.choices] == ["aA", "bB"]


def test_unknown_fields_of_a_delta_are_folded(call, decode):
    chunks = [
        chunk({"content": "a", "citations": [1], "audio": {"data": "x"}}),
        chunk({"content": "b", "citations": [2], "audio": {"data": "y"}}, "stop"),
    ]
    message = decode(call(stream=True), sent(*chunks)).response.choices[0].message
    assert (message.citations, message.audio) == ([1, 2], {"data": "xy"})


def test_a_real_completion_stream_is_read(call, recorded, decode):
    asked = call(endpoint="completion", subject="Hi", stream=True)
    stream = decode(asked, recorded("llamacpp/completion-stream").body)
    assert isinstance(stream.response, CompletionResponse)
    assert (stream.text, stream.response.text) == ("jj", "jj")
    assert (stream.response.finish_reason, stream.response.usage.total_tokens) == ("length", 5)


@pytest.mark.parametrize(
    "event, cls, said",
    [
        ({"error": {"message": "m", "type": "server_error", "code": 500}}, "LLMServerError", "m"),
        ({"error": {"message": "m", "code": 429}}, "LLMRateLimitError", "m"),
        (
            {"error": {"message": "m", "code": "context_length_exceeded"}},
            "LLMContextLengthError",
            "m",
        ),
        ({"error": "it broke"}, "LLMAPIError", "it broke"),
        (b'event: error\ndata: {"message": "m", "code": 503}', "LLMAPIError", "m"),
        (b"event: error\ndata: it broke", "LLMAPIError", "it broke"),
        (b'data: "it broke"', "LLMAPIError", "it broke"),
        (b"data: {cut", "LLMResponseError", "not JSON"),
        (b"data: 5", "LLMResponseError", "not an object"),
        (b"data: [" + b"[" * 100_000, "LLMResponseError", "not JSON"),
    ],
    ids=lambda value: repr(value)[:40],
)
@pytest.mark.parametrize("before", [[], [chunk({"content": "so f"})]], ids=["first", "later"])
def test_an_error_inside_a_stream_is_one_of_ours(call, decode, event, cls, said, before):
    stream = decode(call(stream=True), sent(*before, event))
    assert isinstance(stream.error, getattr(errors, cls))
    assert said in str(stream.error)
    assert stream.text == ("so f" if before else "")
    assert before == [] or stream.response.text == "so f"


def test_a_real_error_inside_a_tool_stream_keeps_what_came(call, recorded, decode):
    stream = decode(call(stream=True), recorded("llamacpp/error-in-tool-stream").body)
    assert isinstance(stream.error, errors.LLMServerError)
    assert stream.error.retriable
    assert not stream.complete
    assert stream.tool_calls == []  # half a call is not handed over
    assert stream.response.tool_calls[0].name == "f"


def test_a_real_empty_stream_is_an_empty_answer(call, recorded, decode):
    stream = decode(call(stream=True), recorded("llamacpp/chat-stream-empty").body)
    assert (stream.text, stream.response.text) == ("", "")
    assert stream.response.finish_reason == "length"


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
WHOLE = chunk(
    {
        "role": "assistant",
        "content": "a",
        "reasoning": "r",
        "tool_calls": [{"index": 0, "id": "c", "function": {"name": "f", "arguments": "{}"}}],
    },
    "stop",
    created=1,
    model="m",
    usage={"prompt_tokens": 1, "prompt_tokens_details": {"cached_tokens": 0}},
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


@given(st.sampled_from(list(paths(WHOLE))), JSON)
def test_an_odd_value_anywhere_in_a_stream_is_borne_with_or_one_of_our_errors(
    call, survive, path, odd
):
    asked = call(stream=True)
    survive.stream(asked, sent(chunk({"content": "a"}), put(WHOLE, path, odd)))


ANSWER = {
    "id": "x",
    "created": 1,
    "model": "m",
    "choices": [{"index": 0, "message": WHOLE["choices"][0]["delta"], "finish_reason": "stop"}],
    "usage": WHOLE["usage"],
}


@given(st.sampled_from(list(paths(ANSWER))), JSON)
def test_an_odd_value_anywhere_in_an_answer_is_borne_with_or_one_of_our_errors(
    call, survive, path, odd
):
    survive.answer(call(), json.dumps(put(ANSWER, path, odd)).encode())


@given(st.integers(100, 599), JSON | st.binary(max_size=20))
def test_any_error_answer_is_one_of_our_errors(call, status, content):
    error = openai.error(call(), answered(status, content))
    assert str(error).isprintable()
