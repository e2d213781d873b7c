"""Values: what a user reads, adds, prints, pickles and copies."""

import copy
import json
import pickle

import pytest

from LLM.errors import Attempt, LLMStreamError
from LLM.types import (
    UNSET,
    CallInfo,
    ChatCompletionResponse,
    CompletionResponse,
    EventType,
    Message,
    ModelsResponse,
    Reply,
    StreamEvent,
    TextDelta,
    TokenUsage,
    ToolCall,
)

CHAT = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1795250832,
    "model": "gpt-4",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hi", "refusal": None},
            "finish_reason": "stop",
            "logprobs": None,
        }
    ],
    "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    "service_tier": "default",
}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}


def test_a_response_reads_as_documented():
    response = ChatCompletionResponse.model_validate(CHAT)
    assert response.choices[0].message.content == "Hi"
    assert (response.text, response.finish_reason, response.tool_calls) == ("Hi", "stop", [])
    assert response.usage is not None
    assert response.usage.total_tokens == 5


def test_fields_of_a_newer_server_are_kept():
    response = ChatCompletionResponse.model_validate(CHAT)
    assert response.service_tier == "default"
    assert response.model_dump()["service_tier"] == "default"


def test_a_new_finish_reason_is_no_error():
    choice = {**CHAT["choices"][0], "finish_reason": "insufficient_system_resource"}
    response = ChatCompletionResponse.model_validate({**CHAT, "choices": [choice]})
    assert response.finish_reason == "insufficient_system_resource"


@pytest.mark.parametrize("missing", ["id", "object", "created", "model", "usage"])
def test_an_answer_without_its_decoration_is_an_answer(missing):
    chat = {name: value for name, value in CHAT.items() if name != missing}
    assert ChatCompletionResponse.model_validate(chat).text == "Hi"


def test_a_response_that_no_client_made_knows_nothing_of_its_call():
    response = ChatCompletionResponse.model_validate(CHAT)
    assert (response.attempts, response.history) == (0, ())
    assert (response.provider, response.request_id, response.latency_ms) == (None, None, None)


def test_what_a_call_took_is_on_the_response_and_not_in_its_fields():
    response = ChatCompletionResponse.model_validate(CHAT)
    history = (Attempt(503, "LLMServerError", 0.0, 0.1, "r1"), Attempt(200, None, 1.0, 0.2, "r2"))
    response._info = CallInfo("openai", "gpt-4o", "r2", history, 1300.0)
    assert (response.attempts, response.history[1].waited) == (2, 1.0)
    assert (response.provider, response.request_id, response.latency_ms) == ("openai", "r2", 1300)
    assert "r2" not in response.model_dump_json()


def test_a_model_list_is_iterated_and_counted():
    models = ModelsResponse.model_validate({"data": [{"id": "a"}, {"id": "b", "owned_by": "x"}]})
    assert [model.id for model in models] == ["a", "b"]
    assert (len(models), models.data[1].owned_by) == (2, "x")


def test_the_text_of_a_response_without_choices_is_empty():
    for value in (ChatCompletionResponse, CompletionResponse):
        response = value(choices=[])
        assert (response.text, response.finish_reason) == ("", None)


@pytest.mark.parametrize(
    "content, text",
    [
        ("plain", "plain"),
        (None, ""),
        ([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}], "a"),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab"),
        ([], ""),
        (["odd", {"type": "text", "text": None}], ""),
    ],
)
def test_the_text_of_a_message_is_its_text_parts_joined(content, text):
    assert Message(role="user", content=content).text == text


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool", "developer", "critic"])
def test_roles_are_plain_strings(role):
    assert Message(role=role, content="x").role == role


def test_a_message_needs_a_role():
    with pytest.raises(ValueError, match="role"):
        Message(content="x")


def test_a_message_from_json_is_the_message_that_was_dumped():
    message = Message(
        role="assistant", tool_calls=[ToolCall.model_validate(CALL)], name="n", beta={"x": [1]}
    )
    assert Message.model_validate_json(message.model_dump_json()) == message


def test_a_servers_message_without_role_is_the_assistants():
    choice = {"message": {"content": "Hi"}}
    response = ChatCompletionResponse.model_validate({"choices": [choice]})
    assert response.choices[0].message.role == "assistant"


@pytest.mark.parametrize(
    "sent, arguments",
    [('{ "a" : 1}', '{ "a" : 1}'), ({"a": 1}, '{"a": 1}'), (None, ""), ([1], "[1]"), ("", "")],
)
def test_tool_arguments_are_json_text_as_the_model_wrote_it(sent, arguments):
    call = ToolCall.model_validate({"id": "c", "function": {"name": "f", "arguments": sent}})
    assert (call.name, call.arguments, call.type) == ("f", arguments, "function")


def test_tool_arguments_keep_their_language():
    call = ToolCall.model_validate({"function": {"name": "f", "arguments": {"city": "Köln"}}})
    assert "Köln" in call.arguments


def test_a_custom_tool_call_of_a_newer_server_loses_nothing():
    # OpenAI's custom tools (API reference, "Chat completions", 2025-08) have no `function`.
    custom = {"id": "c", "type": "custom", "custom": {"name": "sql", "input": "SELECT 1"}}
    message = {"role": "assistant", "content": None, "tool_calls": [custom]}
    response = ChatCompletionResponse.model_validate({"choices": [{"message": message}]})
    assert response.tool_calls[0].model_dump()["custom"] == custom["custom"]


@pytest.mark.parametrize(
    "sent, expected",
    [
        ({}, (None, None, None, None, None)),
        ({"prompt_tokens": 3, "completion_tokens": 2}, (3, 2, 5, None, None)),
        ({"prompt_tokens": 3}, (3, None, None, None, None)),
        ({"prompt_tokens": 3, "completion_tokens": None}, (3, None, None, None, None)),
        ({"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 9}, (3, 2, 9, None, None)),
        (
            {
                "prompt_tokens": 30,
                "completion_tokens": 20,
                "total_tokens": 50,
                "prompt_tokens_details": {"cached_tokens": 10, "audio_tokens": 0},
                "completion_tokens_details": {"reasoning_tokens": 15},
            },
            (30, 20, 50, 10, 15),
        ),
        ({"prompt_tokens_details": None, "completion_tokens_details": None}, (None,) * 5),
        ({"prompt_tokens_details": {"cached_tokens": 0}}, (None, None, None, 0, None)),
        (  # DeepSeek
            {"prompt_tokens": 9, "completion_tokens": 1, "prompt_cache_hit_tokens": 4},
            (9, 1, 10, 4, None),
        ),
    ],
)
def test_usage_in_every_shape_and_unknown_is_not_zero(sent, expected):
    usage = TokenUsage.model_validate(sent)
    assert expected == (
        usage.prompt_tokens,
        usage.completion_tokens,
        usage.total_tokens,
        usage.cached_tokens,
        usage.reasoning_tokens,
    )


def test_the_details_of_a_usage_are_kept_as_sent():
    details = {"cached_tokens": 1, "audio_tokens": 7}
    usage = TokenUsage.model_validate({"prompt_tokens": 3, "prompt_tokens_details": details})
    assert usage.prompt_tokens_details == details


def test_reading_a_usage_does_not_change_what_was_read():
    sent = {"prompt_tokens": 3, "completion_tokens": 2}
    TokenUsage.model_validate(sent)
    assert sent == {"prompt_tokens": 3, "completion_tokens": 2}


def test_usages_are_added_field_by_field():
    one = TokenUsage(prompt_tokens=1, completion_tokens=2, cached_tokens=1)
    total = sum([one, one, one])
    assert isinstance(total, TokenUsage)
    assert (total.prompt_tokens, total.completion_tokens, total.total_tokens) == (3, 6, 9)
    assert total.cached_tokens == 3
    assert (one + one).prompt_tokens == 2
    assert one.prompt_tokens == 1  # the parts stay as they were


def test_a_sum_with_an_unknown_part_is_unknown():
    known = TokenUsage(prompt_tokens=1, completion_tokens=2)
    total = known + TokenUsage(prompt_tokens=1)
    assert (total.prompt_tokens, total.completion_tokens, total.total_tokens) == (2, None, None)
    assert (TokenUsage(prompt_tokens=0) + known).prompt_tokens == 1  # 0 is known


def test_a_sum_of_one_usage_is_that_usage():
    one = TokenUsage(prompt_tokens=1)
    assert sum([one]) == one


@pytest.mark.parametrize("other", [1, None, "x", {"prompt_tokens": 1}])
def test_a_usage_is_added_to_nothing_else(other):
    with pytest.raises(TypeError):
        TokenUsage(prompt_tokens=1) + other


def test_event_types_are_plain_strings():
    assert [str(kind) for kind in EventType] == [
        "text_delta",
        "reasoning_delta",
        "tool_call",
        "message_complete",
        "error",
    ]
    assert EventType.TEXT_DELTA == "text_delta"
    assert f"{EventType.ERROR}" == "error"
    assert json.dumps(EventType.TOOL_CALL) == '"tool_call"'
    assert EventType("error") is EventType.ERROR
    assert len({*EventType}) == 5  # all different


def test_a_text_delta_is_its_text():
    delta = TextDelta("so")
    assert (str(delta), f"{delta}", delta.text, delta + "!") == ("so", "so", "so", "so!")
    assert type(str(delta)) is str
    assert type(delta.text) is str
    assert "".join(iter([delta, delta])) == "soso"


def test_an_event_has_only_what_belongs_to_its_type():
    event = StreamEvent(EventType.TEXT_DELTA, text_delta=TextDelta("x"))
    assert (event.tool_call, event.reasoning_delta, event.error) == (None, None, None)
    assert (event.finish_reason, event.usage) == (None, None)


def test_a_failed_reply_is_false_and_a_good_one_true():
    error = LLMStreamError("cut")
    assert Reply(content="")
    assert not Reply(success=False, error=error, error_message="cut")


def test_a_reply_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        Reply().content = "x"


def test_replies_do_not_share_their_lists():
    Reply().tool_calls.append(ToolCall.model_validate(CALL))
    assert Reply().tool_calls == []


def test_left_out_is_false_has_a_name_and_stays_one_of_a_kind():
    assert not UNSET
    assert repr(UNSET) == "UNSET"
    assert pickle.loads(pickle.dumps(UNSET)) is UNSET
    assert copy.deepcopy(UNSET) is UNSET
    assert UNSET is not None


def _response():
    response = ChatCompletionResponse.model_validate(CHAT)
    response._info = CallInfo("openai", "r", (Attempt(200, None, 0.0, 0.1, "r"),), 9.0)
    return response


VALUES = [
    _response(),
    CompletionResponse.model_validate({"choices": [{"text": "x"}]}),
    ModelsResponse.model_validate({"data": [{"id": "a", "new": 1}]}),
    Message(role="user", content=[{"type": "text", "text": "x"}]),
    ToolCall.model_validate(CALL),
    TokenUsage(prompt_tokens=1),
    StreamEvent(EventType.TEXT_DELTA, TextDelta("x")),
    StreamEvent(EventType.TOOL_CALL, tool_call=ToolCall.model_validate(CALL)),
    TextDelta("x"),
    Reply(content="x"),
    Attempt(200, None, 0.0, 0.1),
    CallInfo("openai"),
    EventType.ERROR,
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize(
    "again", [lambda v: pickle.loads(pickle.dumps(v)), copy.copy, copy.deepcopy]
)
def test_values_survive_pickling_and_copying(value, again):
    twin = again(value)
    assert twin == value
    assert type(twin) is type(value)
    assert getattr(twin, "history", None) == getattr(value, "history", None)


def test_a_failed_reply_keeps_its_error_in_a_pickle():
    reply = Reply(success=False, error=LLMStreamError("cut", provider="openai"))
    error = pickle.loads(pickle.dumps(reply)).error
    assert (type(error), str(error), error.provider) == (LLMStreamError, "cut", "openai")
