"""`LLM` against a real server that none of us wrote: llama.cpp's own, with a model of random weights.

The model says nonsense, so nothing here looks at what it says: only at how it is said. Grammars with
a handful of possible answers and temperature 0 keep chance out.
"""

import json
import re
import subprocess
import sys

import pytest

from LLM import LLM, LLMConfig
from LLM.cli import main
from LLM.errors import (
    LLMAuthenticationError,
    LLMContextLengthError,
    LLMError,
    LLMInvalidRequestError,
    LLMNotFoundError,
    LLMServerError,
)
from LLM.types import EventType, Message
from tests.engine.llama_server import LlamaServer
from tests.engine.tiny_model import write_tiny_model

KEY = "sk-of-the-engine"
HI = [{"role": "user", "content": "Hi"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "choose",
        "description": "Choose a number.",
        "parameters": {
            "type": "object",
            "properties": {"number": {"enum": [1, 2]}},
            "required": ["number"],
            "additionalProperties": False,
        },
    },
}
FREE_TEXT = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}


@pytest.fixture(scope="session")
def engine(tmp_path_factory):
    """One server for each worker that runs a test of this file, and none for the others."""
    model = write_tiny_model(tmp_path_factory.mktemp("engine") / "tiny.gguf")
    with LlamaServer(model, context=1024, slots=2, api_key=KEY) as server:
        yield server


@pytest.fixture(params=["openai-compatible", "anthropic"])
def dialect(request):
    return request.param


@pytest.fixture
def llm(engine, dialect):
    config = LLMConfig(
        base_url=engine.url,
        provider=dialect,
        model=engine.model,
        api_key=KEY,
        temperature=0,
        max_tokens=8,
        max_retries=0,
    )
    with LLM(config) as client:
        yield client


def whole_characters(text):
    """`text` without a last character that the limit cut: llama.cpp leaves it out of a stream."""
    return text.rstrip("\ufffd")


def test_a_chat_is_answered(llm, dialect):
    response = llm.chat_completion(HI)
    assert response.text
    assert (response.finish_reason, response.model) == ("length", "tiny")
    assert response.usage.completion_tokens == 8
    assert response.usage.total_tokens == response.usage.prompt_tokens + 8
    assert (response.provider, response.attempts) == (dialect, 1)
    assert response.latency_ms > 0


def test_both_dialects_count_the_same_tokens(engine):
    counts = set()
    for name in ("openai-compatible", "anthropic"):
        with LLM(base_url=engine.url, provider=name, model="tiny", api_key=KEY) as client:
            for _ in range(2):  # the second prompt comes out of the cache
                usage = client.chat_completion(HI, temperature=0, max_tokens=2).usage
                counts.add((usage.prompt_tokens, usage.completion_tokens, usage.total_tokens))
    assert len(counts) == 1


def test_the_same_seed_at_temperature_0_gives_the_same_answer(llm):
    first, second = (llm.chat_completion(HI, seed=7) for _ in range(2))
    assert first.text == second.text


def test_a_stream_says_what_would_have_come_without_it(llm):
    whole = llm.chat_completion(HI, max_tokens=24)
    with llm.stream(HI, max_tokens=24) as stream:
        events = list(stream)
    said = "".join(e.text_delta for e in events if e.type is EventType.TEXT_DELTA)
    assert events[-1].type is EventType.MESSAGE_COMPLETE
    assert said == stream.response.text == whole_characters(whole.text)
    assert stream.response.finish_reason == whole.finish_reason == events[-1].finish_reason
    assert stream.usage.completion_tokens == whole.usage.completion_tokens
    assert stream.time_to_first_token > 0
    assert llm.get_last_response().text == said


def test_the_text_of_a_stream_comes_in_pieces(llm):
    with llm.stream(HI, max_tokens=24) as stream:
        pieces = list(stream.text_stream)
    assert len(pieces) > 2
    assert "".join(pieces) == stream.response.text


def talk(llm):
    """A script that knows nothing of dialects: two turns, streamed, with a system message."""
    messages = [
        Message(role="system", content="You are a model of random weights."),
        Message(role="user", content="My name is Ann."),
    ]
    answers = []
    for question in ("What is my name?", None):
        with llm.stream(messages) as stream:
            answers.append("".join(stream.text_stream))
        messages.append(stream.response.choices[0].message)
        if question:
            messages.append(Message(role="user", content=question))
    return answers, stream.usage.total_tokens, [message.role for message in messages]


def test_the_same_script_talks_in_both_dialects(llm):
    answers, tokens, roles = talk(llm)
    assert all(answers)
    assert tokens > 80  # the whole talk was sent: a token is a byte here
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert llm.get_request_count() == 2


def test_the_dialects_do_not_change_what_is_said(engine):
    said = []
    for name in ("openai-compatible", "anthropic"):
        settings = {"temperature": 0, "max_tokens": 8}
        with LLM(base_url=engine.url, provider=name, api_key=KEY, **settings) as client:
            said.append(talk(client))
    assert said[0] == said[1]


def test_a_text_is_continued(llm):
    response = llm.completion("Once upon", max_tokens=3)
    assert response.choices[0].text == response.text != ""
    assert (response.finish_reason, response.usage.completion_tokens) == ("length", 3)
    with llm.completion("Once upon", max_tokens=3, stream=True) as stream:
        said = "".join(stream.text_stream)
    assert stream.response.choices[0].text == said == whole_characters(response.text)


def test_a_list_of_prompts_has_a_choice_for_each(engine):
    with LLM(base_url=engine.url, model="tiny", api_key=KEY, temperature=0) as client:
        response = client.completion(["One", "Two"], max_tokens=2)
        assert [choice.index for choice in response.choices] == [0, 1]


def test_the_models_are_listed(llm):
    assert [model.id for model in llm.list_models()] == ["tiny"]


def test_a_required_tool_is_called_and_its_result_goes_back(llm):
    ask = {"tools": [TOOL], "max_tokens": 200}
    messages = [Message(role="user", content="Choose.")]
    response = llm.chat_completion(
        messages, tool_choice="required", parallel_tool_calls=False, **ask
    )
    assert response.finish_reason == "tool_calls"
    (call,) = response.tool_calls
    assert call.name == "choose"
    assert json.loads(call.arguments)["number"] in (1, 2)
    messages += [
        response.choices[0].message,
        Message(role="tool", tool_call_id=call.id, content="good"),
    ]
    assert llm.chat_completion(messages, tool_choice="none", tools=[TOOL]).usage.prompt_tokens > 0


def test_a_tool_call_of_a_stream_is_the_one_that_would_have_come_without_it(llm):
    ask = {"tools": [TOOL], "tool_choice": "required", "max_tokens": 200}
    whole = llm.chat_completion(HI, **ask)
    with llm.stream(HI, **ask) as stream:
        calls = [e.tool_call for e in stream if e.type is EventType.TOOL_CALL]
    assert stream.response.finish_reason == whole.finish_reason == "tool_calls"
    expected = [(c.name, json.loads(c.arguments)) for c in whole.tool_calls]
    assert [(c.name, json.loads(c.arguments)) for c in calls] == expected
    folded = stream.response.tool_calls
    assert [(c.name, json.loads(c.arguments)) for c in folded] == expected
    assert len({c.id for c in calls}) == len(calls)


def test_an_answer_can_be_held_to_a_schema(engine):
    schema = TOOL["function"]["parameters"]
    wanted = {"type": "json_schema", "json_schema": {"name": "choice", "schema": schema}}
    with LLM(base_url=engine.url, model="tiny", api_key=KEY, temperature=0) as client:
        response = client.chat_completion(HI, response_format=wanted, max_tokens=60)
        assert json.loads(response.text)["number"] in (1, 2)
        with client.stream(HI, response_format=wanted, max_tokens=60) as stream:
            assert json.loads("".join(stream.text_stream)) == json.loads(response.text)


def test_too_long_a_talk_is_a_context_length_error(llm):
    long = [{"role": "user", "content": "x" * 3000}]
    for ask in (llm.chat_completion, llm.stream):
        with pytest.raises(LLMContextLengthError) as caught:
            ask(long)
        assert not caught.value.retriable
        assert caught.value.attempts == 1
    assert llm.chat_completion(HI).text  # the next call is right


def test_a_wrong_key_is_an_authentication_error_and_is_not_shown(llm):
    stranger = llm.with_options(api_key="sk-wrong-key")
    with pytest.raises(LLMAuthenticationError) as caught:
        stranger.chat_completion(HI)
    assert caught.value.status_code == 401
    assert "sk-wrong-key" not in str(caught.value) + repr(vars(caught.value))


def test_a_wrong_path_is_not_found(llm):
    with pytest.raises(LLMNotFoundError):
        llm.with_options(base_url=llm.config.base_url + "/nowhere").chat_completion(HI)


def test_a_bad_parameter_is_the_callers_fault_or_the_servers_but_always_ours(llm):
    with pytest.raises((LLMInvalidRequestError, LLMServerError)) as caught:
        llm.chat_completion(HI, top_p="hot")
    assert caught.value.attempts == 1
    assert llm.chat_completion(HI).text


def test_an_error_inside_a_tool_stream_is_raised_with_what_came(llm):
    """With free text for arguments llama.cpp's parser now and then refuses what its grammar let through.

    Which prompts do that is up to the weights: every one must end in a whole call or an error of ours.
    """
    tool = {"type": "function", "function": {"name": "f", "parameters": FREE_TEXT}}
    ask = {"tools": [tool], "tool_choice": "required", "max_tokens": 90, "temperature": 0.8}
    for seed in range(8):
        messages = [{"role": "user", "content": str(seed)}]
        events = list(llm.stream(messages, on_error="event", seed=seed, **ask))
        if events[-1].type is EventType.ERROR:
            error = events[-1].error
            assert isinstance(error, LLMError)
            assert error.partial is None or error.partial.choices
            assert EventType.MESSAGE_COMPLETE not in [e.type for e in events]
        else:
            assert events[-1].type is EventType.MESSAGE_COMPLETE
    assert llm.chat_completion(HI).text


def test_a_stream_left_early_leaves_the_client_in_order(llm):
    for _ in range(3):
        with llm.stream(HI, max_tokens=200) as stream:
            next(iter(stream))
    assert stream.response is not None
    assert llm.chat_completion(HI).finish_reason == "length"


def test_generate_answers_and_never_raises(llm):
    reply = llm.generate("Hi", system="Be brief.")
    assert reply.success
    assert (reply.output_tokens, reply.model) == (8, "tiny")
    assert reply.input_tokens + reply.output_tokens == reply.total_tokens
    failed = llm.generate("x" * 3000)
    assert not failed.success
    assert isinstance(failed.error, LLMContextLengthError)
    assert failed.error_message == str(failed.error)


def test_the_command_line_serves_a_model_of_ones_own(tmp_path):
    model = write_tiny_model(tmp_path / "mine.gguf")
    command = [
        sys.executable,
        "-m",
        "LLM",
        "serve",
        "--gguf",
        str(model),
        "--port",
        "0",
        "--context=256",
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as served:
        try:
            url = re.search(r"http://\S+", served.stdout.readline())[0]
            with LLM(base_url=url, model="mine") as llm:
                assert [m.id for m in llm.list_models()] == ["mine"]
                assert (
                    llm.chat_completion(
                        [{"role": "user", "content": "Hi"}], max_tokens=3
                    ).usage.completion_tokens
                    == 3
                )
        finally:
            served.terminate()


def test_a_model_file_that_is_not_there_is_said_in_one_line(capsys):
    assert main(["serve", "--gguf", "nowhere.gguf"]) == 1
    assert capsys.readouterr().err == "error: no such model file: nowhere.gguf\n"
