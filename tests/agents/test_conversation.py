"""A talk with a model: what is said is kept, once and whole, or not at all."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.conversation import Conversation
from agents.store import ConflictError, RepeatedError, Store, Stored, StoreError
from agents.types import EventType, Message, TokenUsage
from LLM import (
    LLM,
    LLMConfigError,
    LLMInvalidRequestError,
    LLMServerError,
    LLMStreamError,
    Price,
)
from tests.fakes import FakeClock, chunk, hang_up, raw_server, stream_head

PRICE = Price(input=1, output=2)  # dollars per million tokens
USAGE = {"prompt_tokens": 1000, "completion_tokens": 500}
COST = Decimal("0.002")  # of USAGE at PRICE
CALL = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


@pytest.fixture
def llm(server):
    with LLM(base_url=server.url, max_retries=0, price=PRICE) as client:
        yield client


@pytest.fixture(params=["memory", "sqlite", "postgresql"])
def place(request, tmp_path):
    """Where conversations are kept; in memory one object knows of one conversation and its branches."""
    if request.param == "memory":
        yield None
        return
    url = f"sqlite:///{tmp_path}/chat.db"
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres").new()
    with Store.open(url) as store:
        yield store


@pytest.fixture
def talk(place, llm):
    return Conversation.open(place, "alice", llm=llm)


def said(conversation):
    return [(message.role, message.text) for message in conversation.history]


def sent(server, number=-1):
    return [(m["role"], m["content"]) for m in server.requests[number].json["messages"]]


def again(talk):
    """Another object on the same conversation."""
    return Conversation(talk._conversations, talk.id, llm=talk.llm)


# Talking


def test_a_talk_remembers(server, talk):
    server.reply("15")
    server.reply("5")
    assert talk.say("What is 5 x 3?").text == "15"
    assert talk.say("Now divide that by 3").text == "5"
    asked = [("user", "What is 5 x 3?"), ("assistant", "15"), ("user", "Now divide that by 3")]
    assert sent(server) == asked
    assert said(talk) == [*asked, ("assistant", "5")]
    assert said(again(talk)) == said(talk)
    assert talk.stored == again(talk).stored or talk.stored[0].created is None


def test_the_system_message_goes_first_and_is_kept_beside_the_history(server, place, llm):
    talk = Conversation.open(place, "alice", llm=llm, system="Be kind.")
    talk.say("Hello!")
    assert sent(server)[0] == ("system", "Be kind.")
    assert said(talk)[0] == ("user", "Hello!")
    if place is not None:
        assert Conversation.open(place, "alice", llm=llm).system == "Be kind."
        changed = Conversation.open(place, "alice", llm=llm, system="Be brief.")
        changed.say("Hello again!")
        assert sent(server)[0] == ("system", "Be brief.")
        assert len(changed.history) == 4


def test_parts_and_tool_results_can_be_said(server, talk):
    server.reply(tool_calls=[{"name": "add", "arguments": {"a": 1}, "id": "call_1"}])
    reply = talk.say([{"type": "text", "text": "Add!"}], tools=[])
    assert reply.tool_calls[0].name == "add"
    talk.say([Message(role="tool", tool_call_id="call_1", content="2")])
    talk.say({"role": "user", "content": "Thanks!"})
    assert [
        role for role, _ in said(talk)
    ] == "user assistant tool assistant user assistant".split()
    assert again(talk).history == talk.history
    assert server.requests[1].json["messages"][1]["tool_calls"][0]["id"] == "call_1"


@pytest.mark.parametrize("wrong", [None, 5, b"x", [], [{"role": 5}]])
def test_what_cannot_be_said_is_refused_before_anything_is_sent(server, llm, wrong):
    talk = Conversation.open(llm=llm)
    with pytest.raises(LLMConfigError):
        talk.say(wrong)
    with pytest.raises(LLMConfigError, match=r"use stream\(\)"):
        talk.say("Hi!", stream=True)
    assert server.requests == []


def test_options_go_to_the_call(server, talk):
    talk.say("Hello!", model="other", temperature=0)
    assert server.requests[0].json["model"] == "other"
    if talk._conversations.__class__.__name__ != "_Memory":
        assert again(talk).stored[1].model == "other"


def test_a_context_makes_what_is_sent_but_not_what_is_kept(server, place, llm):
    talk = Conversation.open(place, llm=llm, system="S", context=lambda m: [m[0], m[-1]])
    talk.say("one")
    talk.say("two")
    assert sent(server) == [("system", "S"), ("user", "two")]
    assert len(talk.history) == 4


def test_a_talk_without_a_title_is_called_by_its_first_question(talk):
    assert talk.title is None
    talk.say("  Where  is Rome?\nI wonder. " + "x" * 100)
    assert talk.title == ("Where is Rome? I wonder. " + "x" * 100)[:60]
    talk.title = "Rome"
    talk.say("And Paris?")
    assert talk.title == again(talk).title == "Rome"


def test_a_title_can_be_given(place, llm):
    talk = Conversation.open(place, llm=llm, title="Cities", owner="alice")
    talk.say("Where is Rome?")
    assert (talk.title, talk.owner) == ("Cities", "alice")
    assert "2 messages" in repr(talk)


# Failures


def test_a_failed_call_leaves_the_history_as_it_was(server, talk):
    talk.say("Hello!")
    before = talk.history
    server.reply(status=500)
    with pytest.raises(LLMServerError):
        talk.say("And now?")
    server.reply(status=400)
    with pytest.raises(LLMInvalidRequestError):
        talk.stream("And now?")
    assert talk.history == before == again(talk).history
    talk.say("Once more")
    assert [text for _, text in sent(server)][-1] == "Once more"
    assert len(talk.history) == 4


def test_a_stream_is_kept_when_it_is_whole(server, talk):
    server.reply("Hi there, you", usage=USAGE)
    with talk.stream("Hello!") as stream:
        assert "".join(stream.text_stream) == "Hi there, you"
    assert (stream.cost, stream.usage.total_tokens, stream.error) == (COST, 1500, None)
    assert said(talk) == [("user", "Hello!"), ("assistant", "Hi there, you")]
    assert said(again(talk)) == said(talk)
    assert talk.cost == COST


def test_whoever_has_seen_the_last_event_knows_the_answer_safe(server, talk):
    for event in talk.stream("Hello!"):
        if event.type is EventType.MESSAGE_COMPLETE:
            assert len(again(talk).history) == 2
            break
    else:
        raise AssertionError


def test_the_response_of_a_stream_reads_it_to_its_end(talk):
    stream = talk.stream("Hello!")
    assert stream.response.text == talk.history[-1].text
    assert stream.response.text
    assert len(talk.history) == 2


def test_a_stream_that_is_closed_or_cancelled_leaves_nothing(server, talk):
    server.token_delay = 0.5
    stream = talk.stream("Hello!")
    next(stream)
    stream.close()
    assert list(stream) == []
    stream = talk.stream("Hello!")
    stream.cancel()
    with pytest.raises(Exception, match="cancel"):
        list(stream)
    assert talk.history == again(talk).history == ()


@pytest.mark.parametrize("on_error", ["raise", "event"])
def test_a_stream_that_is_cut_leaves_nothing(on_error):
    def answer(connection, _):
        connection.sendall(stream_head("connection: close") + chunk("Hal"))
        hang_up(connection)

    with raw_server(answer) as raw, LLM(base_url=raw.url, max_retries=0) as llm:
        talk = Conversation.open(llm=llm)
        stream = talk.stream("Hello!", on_error=on_error)
        with pytest.raises(LLMStreamError) as caught:
            list(stream.text_stream)
        assert caught.value.partial.text == "Hal"
        assert talk.history == ()
        assert talk.say


# Usage and cost


def test_a_talk_adds_up_what_it_took(server, talk):
    assert (talk.cost, talk.usage.total_tokens) == (0, 0)
    for _ in range(2):
        server.reply("Hi!", usage=USAGE)
        talk.say("Hello!")
    assert talk.cost == again(talk).cost == 2 * COST
    assert talk.usage.prompt_tokens == again(talk).usage.prompt_tokens == 2000


def test_a_cost_that_is_unknown_of_one_answer_is_unknown_of_all(server, place):
    with LLM(base_url=server.url) as llm:
        talk = Conversation.open(place, llm=llm)
        talk.say("Hello!")
        assert talk.cost is None
        assert talk.usage.total_tokens > 0


def test_an_answer_without_usage_makes_the_sum_unknown(server, talk):
    body = {"choices": [{"message": {"content": "Hi!"}}]}
    server.reply(body=body)
    talk.say("Hello!")
    assert talk.usage.total_tokens is None
    assert talk.cost is None


def test_an_answer_from_the_cache_costs_nothing(server):
    with LLM(base_url=server.url, cache=":memory:", price=PRICE) as llm:
        first, second = Conversation.open(llm=llm), Conversation.open(llm=llm)
        first.say("Hello!")
        assert second.say("Hello!").cached
    assert first.cost > 0
    assert (second.cost, second.usage.total_tokens) == (0, 0)


# Two writers


def test_the_second_writer_is_told_before_it_pays(server, talk):
    other = again(talk)
    talk.say("first")
    count = len(server.requests)
    with pytest.raises(ConflictError, match=r"reload\(\)"):
        other.say("second")
    with pytest.raises(ConflictError):
        other.stream("second")
    assert len(server.requests) == count
    other.reload()
    other.say("second")
    assert [text for role, text in said(other) if role == "user"] == ["first", "second"]


def test_an_answer_that_lost_while_it_was_made_is_on_the_error(server, talk):
    other = again(talk)

    def meanwhile(request):
        if request.json["messages"][-1]["content"] == "slow":
            other.say("quick")
        return "Hi!"

    server.reply(meanwhile)
    with pytest.raises(ConflictError) as caught:
        talk.say("slow")
    assert caught.value.partial.text == "Hi!"
    assert talk.history == ()
    talk.reload()
    assert said(talk)[0] == ("user", "quick")


def test_with_retry_conflict_both_are_kept(server, talk):
    other = again(talk)
    talk._retry_conflict = True

    def meanwhile(request):
        if request.json["messages"][-1]["content"] == "slow":
            other.say("quick")
        return "Hi!"

    server.reply(meanwhile)
    talk.say("slow")
    assert [text for role, text in said(talk) if role == "user"] == ["quick", "slow"]
    assert said(again(talk)) == said(talk)
    other.reload()
    other.say("third")
    talk.say("fourth")  # which knew of the third
    assert [text for role, text in sent(server) if role == "user"][-2:] == ["third", "fourth"]


def test_with_retry_conflict_tool_calls_are_not_torn_from_their_results(server, talk):
    other = again(talk)
    talk._retry_conflict = True
    server.reply(tool_calls=[{"name": "add", "arguments": {}, "id": "1"}])
    other.say("Add!")
    with pytest.raises(ConflictError, match="within a tool call"):
        talk.say("Hello!")


def test_many_threads_with_retry_conflict_lose_nothing(server, place, llm):
    if place is None:
        pytest.skip("in memory an object is a conversation of its own")
    Conversation.open(place, "c", llm=llm)
    both = threading.Barrier(4, timeout=30)

    def write(number):
        talk = Conversation.open(place, "c", llm=llm, retry_conflict=True)
        both.wait()
        for turn in range(3):
            talk.say(f"{number} {turn}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    final = Conversation.open(place, "c", llm=llm)
    assert len(final.history) == 24
    asked = [text for role, text in said(final) if role == "user"]
    assert sorted(asked) == sorted(f"{n} {t}" for n in range(4) for t in range(3))


# Opening, branching, finding, deleting


def test_a_conversation_of_another_owner_is_not_there(place, llm):
    if place is None:
        pytest.skip("in memory nobody else can open it")
    Conversation.open(place, "c", llm=llm, owner="alice")
    with pytest.raises(StoreError, match="'bob' has no conversation") as caught:
        Conversation.open(place, "c", llm=llm, owner="bob")
    assert caught.value.reason == "missing"
    assert Conversation.open(place, "c", llm=llm).owner == "alice"


def test_a_url_is_opened_and_closed_with_the_conversation(tmp_path, llm):
    url = f"sqlite:///{tmp_path}/chat.db"
    with Conversation.open(url, "c", llm=llm, clock=FakeClock()) as talk:
        talk.say("Hello!")
    with Conversation.open(url, "c", llm=llm) as talk:
        assert len(talk.history) == 2
    with pytest.raises(LLMConfigError):
        Conversation.open(url, "", llm=llm)


def test_of_two_that_begin_one_conversation_both_have_it(tmp_path, llm):
    with Store.open(f"sqlite:///{tmp_path}/chat.db") as store:
        get, asked = store.conversations.get, []

        def late(name):
            asked.append(name)
            return get(name) if len(asked) > 1 else None

        store.conversations.create("c", title="theirs")
        store.conversations.get = late
        assert Conversation.open(store, "c", llm=llm).title == "theirs"


def test_a_branch_goes_its_own_way(server, talk):
    server.reply("A", usage=USAGE)
    talk.say("one")
    talk.say("two")
    branch = talk.branch(at=2)
    assert said(branch) == said(talk)[:2]
    assert branch.cost == 0
    branch.say("three")
    assert [text for _, text in sent(server)] == ["one", "A", "three"]
    assert len(talk.history) == len(again(talk).history) == 4
    assert said(talk.branch()) == said(talk)
    assert said(talk.branch(-2)) == said(talk)[:2]
    for wrong in (5, -5):
        with pytest.raises(LLMConfigError, match="4 messages"):
            talk.branch(wrong)


# What was not said through it


def test_what_an_agent_said_can_be_added(server, talk):
    talk.say("Hi!")
    answer = Stored(Message(role="assistant", content="5"), TokenUsage(total_tokens=7), COST, "m")
    kept = talk.add([{"role": "user", "content": "2 + 3?"}, answer], request="r")
    assert [(s.number, s.message.role, s.message.text) for s in kept] == [
        (3, "user", "2 + 3?"),
        (4, "assistant", "5"),
    ]
    assert all(stored.created is not None for stored in kept)
    assert (kept[1].usage, kept[1].cost, kept[1].model) == (answer.usage, COST, "m")
    assert talk.stored[2:] == kept
    assert again(talk).stored[2:] == kept
    assert again(talk).revision == talk.revision == 2
    talk.say("And now?")
    assert [text for _, text in sent(server)][2:] == ["2 + 3?", "5", "And now?"]


def test_what_is_added_twice_is_kept_once(talk):
    other = again(talk)
    talk.add([Message(role="user", content="one")], request="r")
    for late in (talk, other):
        with pytest.raises(RepeatedError) as caught:
            late.add([Message(role="user", content="one")], request="r")
        assert caught.value.number == 1
    assert said(talk) == said(again(talk)) == [("user", "one")]
    with pytest.raises(LLMConfigError, match="needs a message"):
        talk.add([], request="s")


def test_another_writer_keeps_what_is_added_out(talk):
    other = again(talk)
    talk.add([Message(role="user", content="one")])
    with pytest.raises(ConflictError) as caught:
        other.add([Message(role="user", content="two")], replacing=1)
    assert not isinstance(caught.value, RepeatedError)
    assert said(again(talk)) == [("user", "one")]


@pytest.mark.parametrize("wrong", [5, {"role": 5}, "text"])
def test_what_is_no_message_is_not_added(llm, wrong):
    talk = Conversation.open(llm=llm)
    with pytest.raises(LLMConfigError, match=r"messages\[0\] is not a message"):
        talk.add([wrong])
    assert (talk.history, talk.revision) == ((), 0)


def test_a_replaced_answer_leaves_the_history(server, talk):
    server.reply("A", usage=USAGE)
    server.reply("B", usage=USAGE)
    talk.say("one")
    (kept,) = talk.add([Stored(Message(role="assistant", content="C"), cost=COST)], replacing=2)
    assert kept.number == 3
    talk.say("two")
    for seen in (talk, again(talk)):
        assert [text for _, text in said(seen)] == ["one", "C", "two", "B"]
        assert [stored.number for stored in seen.stored] == [1, 3, 4, 5]
        assert seen.search("A") == []
    assert [text for _, text in sent(server)] == ["one", "C", "two"]
    assert said(talk.branch(2)) == said(talk)[:2]
    assert said(talk.branch(0)) == []
    branch = talk.branch(-1)
    assert [stored.number for stored in branch.stored] == [1, 3, 4]
    (added,) = branch.add([Message(role="assistant", content="D")])
    assert added.number == 5


def test_the_first_message_can_be_replaced(talk):
    talk.add([Message(role="user", content="one")])
    talk.add([Message(role="user", content="two")], replacing=1)
    assert said(talk) == said(again(talk)) == [("user", "two")]


def test_a_partial_answer_is_part_of_the_history(server, talk):
    talk.add([Message(role="user", content="one")])
    talk.add([Stored(Message(role="assistant", content="An"), status="partial")])
    talk.say("go on")
    assert [text for _, text in sent(server)] == ["one", "An", "go on"]
    assert again(talk).stored[1].status == "partial"


def test_a_prompt_is_what_would_be_sent(server, place, llm):
    talk = Conversation.open(place, llm=llm, system="S", context=lambda m: [m[0], *m[-2:]])
    talk.add([{"role": "user", "content": "one"}, {"role": "assistant", "content": "A"}])
    prompt = talk.prompt("two")
    assert [message.text for message in prompt] == ["S", "A", "two"]
    assert server.requests == []
    talk.say("two")
    assert sent(server) == [(message.role, message.text) for message in prompt]
    assert [m.text for m in again(talk).prompt([Message(role="user", content="x")])][-1] == "x"


@pytest.mark.parametrize("nothing", [(), []])
def test_a_prompt_of_nothing_new_is_the_history(talk, nothing):
    assert talk.prompt() == []
    talk.add([Message(role="user", content="one")])
    assert talk.prompt(nothing) == list(talk.history)


def test_a_branch_does_not_tear_a_tool_call_from_its_result(server, talk):
    server.reply(tool_calls=[{"name": "add", "arguments": {}, "id": "1"}])
    talk.say("Add!")
    talk.say(Message(role="tool", tool_call_id="1", content="2"))
    with pytest.raises(LLMConfigError, match="between a tool call and its result"):
        talk.branch(2)


def test_what_was_said_can_be_found(server, talk):
    server.reply("It is in Italy.")
    talk.say("Where is Rome?")
    (hit,) = talk.search("rome")
    assert (hit.number, hit.role, hit.snippet) == (1, "user", "Where is Rome?")
    assert [hit.number for hit in talk.search("is")] == [2, 1]
    assert len(talk.search("is", limit=1)) == 1
    assert talk.search("Paris") == talk.search(" ") == []
    assert talk.branch(hit.number).history == talk.history[:1]


def test_a_deleted_conversation_is_gone(talk):
    other = again(talk)
    talk.say("Hello!")
    talk.delete()
    assert talk.history == ()
    for gone in (talk, other):
        with pytest.raises(StoreError, match="deleted"):
            gone.say("Still there?")
        with pytest.raises(StoreError, match="deleted"):
            gone.reload()


def test_in_memory_nothing_that_is_gone_can_be_changed(llm):
    talk = Conversation.open(llm=llm)
    talk.delete()
    with pytest.raises(StoreError, match="no conversation"):
        talk.title = "x"


# Export and import

IMAGE = "data:image/png;base64,iVBORw0KGgo="
WHOLE = [
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "What is this, and 1 + 1?"},
            {"type": "image_url", "image_url": {"url": IMAGE}},
            {"type": "image_url", "image_url": {"url": "https://example.com/cat.png"}},
        ],
    },
    {
        "role": "assistant",
        "content": "Let me see.",
        "tool_calls": [CALL, {**CALL, "id": "call_2"}],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "2"},
    {
        "role": "tool",
        "tool_call_id": "call_2",
        "content": [{"type": "image_url", "image_url": {"url": IMAGE}}],
    },
    {"role": "assistant", "content": "A cat, and 2."},
    {"role": "user", "content": "Thanks!"},
]


@pytest.mark.parametrize("form", ["openai", "anthropic"])
@pytest.mark.parametrize("given", [True, False])
def test_a_conversation_goes_out_and_comes_back(place, llm, form, given):
    data = {"messages": [{"role": "system", "content": "Be kind."}, *WHOLE]}
    first = Conversation.import_(data, place, "a", llm=llm)
    assert first.system == "Be kind."
    exported = json.loads(json.dumps(first.export(form)))
    options = {"form": form} if given else {}
    second = Conversation.import_(exported, place, "b", llm=llm, **options)
    assert second.history == first.history
    assert second.export("openai") == data
    assert (second.cost, second.usage.total_tokens) == (0, 0)
    second.say("Go on")
    assert len(second.history) == len(WHOLE) + 2


def test_the_exported_form_is_the_vendors(llm):
    talk = Conversation.import_(WHOLE, llm=llm)
    data = talk.export("anthropic")
    assert "system" not in data
    question, calls, results, _, _ = data["messages"]
    assert question["content"][1]["source"]["media_type"] == "image/png"
    assert question["content"][2]["source"] == {"type": "url", "url": "https://example.com/cat.png"}
    assert [block["type"] for block in calls["content"]] == ["text", "tool_use", "tool_use"]
    assert calls["content"][1]["input"] == {"a": 1}
    assert [block["tool_use_id"] for block in results["content"]] == ["call_1", "call_2"]
    assert results["role"] == "user"


def test_an_exported_conversation_is_one_that_the_server_takes(llm, server):
    talk = Conversation.import_(WHOLE, llm=llm, system="Be kind.")
    with LLM(base_url=server.url, provider="anthropic", model="claude-sonnet-4-5") as other:
        other.chat_completion(WHOLE)
    body, exported = server.requests[0].json, talk.export("anthropic")
    assert exported == {"system": "Be kind.", "messages": body["messages"]}


def test_thinking_comes_back_unchanged(llm):
    blocks = [
        {"type": "thinking", "thinking": "Hm.", "signature": "abc"},
        {"type": "text", "text": "Yes."},
    ]
    data = {
        "system": [{"type": "text", "text": "Be kind."}],
        "messages": [
            {"role": "user", "content": "Well?"},
            {"role": "assistant", "content": blocks},
        ],
    }
    talk = Conversation.import_(data, llm=llm)
    assert said(talk)[1] == ("assistant", "Yes.")
    assert talk.export("anthropic") == {**data, "system": "Be kind."}
    assert talk.export()["messages"][-1] == {"role": "assistant", "content": "Yes."}


def test_results_and_a_question_in_one_message_are_taken_apart(llm):
    content = [
        {"type": "tool_result", "tool_use_id": "1", "content": "2"},
        {"type": "tool_result", "tool_use_id": "2"},
        {"type": "text", "text": "And?"},
    ]
    talk = Conversation.import_([{"role": "user", "content": content}], llm=llm)
    assert said(talk) == [("tool", "2"), ("tool", ""), ("user", "And?")]


def test_odd_messages_find_their_form(llm):
    odd = [
        {"role": "user", "content": "Hi!"},
        {"role": "developer", "content": "Be brief."},
        {"role": "assistant", "content": [{"type": "text", "text": "So"}], "tool_calls": [CALL]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "2", "function": {"name": "f"}}],
        },
        {"role": "user", "content": [{"type": "image_url", "image_url": "https://x/y.png"}]},
    ]
    data = Conversation.import_(odd, llm=llm, system="S").export("anthropic")
    assert data["system"] == "S\n\nBe brief."
    assert data["messages"][1]["content"][0] == {"type": "text", "text": "So"}
    assert data["messages"][2]["content"][0]["input"] == {}
    assert data["messages"][3]["content"][0]["source"]["url"] == "https://x/y.png"


@given(st.recursive(st.none() | st.integers() | st.text(), st.lists) | st.text())
def test_whatever_the_arguments_are_they_come_back(value):
    with LLM(base_url="http://127.0.0.1:9") as llm:
        text = value if isinstance(value, str) else json.dumps({"a": value}, ensure_ascii=False)
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": text}}
        message = {"role": "assistant", "tool_calls": [call]}
        talk = Conversation.import_([message], llm=llm)
        back = Conversation.import_(talk.export("anthropic"), llm=llm, form="anthropic")
        arguments = back.history[0].tool_calls[0].arguments
    try:
        parsed = json.loads(text or "{}")
    except ValueError:
        assert arguments == text
    else:
        wrapped = parsed if isinstance(parsed, dict) else {"value": parsed}
        assert json.loads(arguments) == wrapped


@pytest.mark.parametrize(
    "data, words",
    [
        (None, "no conversation"),
        ({}, "no conversation"),
        (["Hi!"], "no conversation"),
        ([{"role": "user", "content": "a"}, {"content": "b"}], r"messages\[1\]"),
        ([{"role": "user", "content": 5}], r"messages\[0\]"),
    ],
)
def test_what_is_no_conversation_is_refused(llm, data, words):
    with pytest.raises(LLMConfigError, match=words):
        Conversation.import_(data, llm=llm)


def test_an_unknown_form_is_refused(llm):
    with pytest.raises(LLMConfigError, match="openai, anthropic"):
        Conversation.open(llm=llm).export("yaml")
    with pytest.raises(LLMConfigError, match="openai, anthropic"):
        Conversation.import_([], llm=llm, form="yaml")


def test_an_import_does_not_write_into_another_conversation(tmp_path, llm):
    url = f"sqlite:///{tmp_path}/chat.db"
    Conversation.import_(WHOLE, url, "c", llm=llm).close()
    with pytest.raises(ConflictError, match="'c' already"):
        Conversation.import_(WHOLE, url, "c", llm=llm)


def test_a_store_that_fails_after_the_answer_hands_it_over(tmp_path, server, llm):
    with Store.open(f"sqlite:///{tmp_path}/chat.db") as store:
        talk = Conversation.open(store, "c", llm=llm)
        server.reply(lambda _: store.conversations.delete("c") and "paid for")
        with pytest.raises(StoreError) as caught:
            talk.say("Hello!")
        assert caught.value.partial.text == "paid for"
        assert talk.history == ()


def test_an_answer_kept_as_partial_is_counted(tmp_path, llm):
    with Store.open(f"sqlite:///{tmp_path}/chat.db") as store:
        talk = Conversation.open(store, "c", llm=llm)
        half = Stored(
            Message(role="assistant", content="Hal"), TokenUsage(), None, status="partial"
        )
        store.conversations.append("c", [half], 0)
        talk.reload()
        assert talk.cost is None
        assert talk.stored[0].status == "partial"


def test_a_hundred_turns_of_a_stream_are_quick_enough_to_be_used(server, llm, tmp_path):
    """No turn writes the whole history again: one row for each message."""
    with Store.open(f"sqlite:///{tmp_path}/chat.db") as store:
        talk = Conversation.open(store, "c", llm=llm)
        for number in range(20):
            assert talk.stream(str(number)).response.text
        count = "SELECT max(id) FROM messages"
        assert store.run(lambda c: c.exec_driver_sql(count).scalar()) == 40
