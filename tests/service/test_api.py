"""The service's own API, over a real socket."""

import json
import re

import pytest

from agents.service.settings import Settings
from tests.fakes import hang_up, raw_server, stream_head
from tests.service.conftest import events, until


def test_a_conversation_is_held_and_found_again(chat):
    name = chat.new(title="Sums")
    said = chat.say(name, "What is 12 x 12?")
    assert said.status_code == 200
    answer = said.json()
    assert [m["role"] for m in answer["messages"]] == ["user", "assistant", "tool", "assistant"]
    assert answer["messages"][1]["tool_calls"][0]["name"] == "calculator"
    assert answer["messages"][2]["content"] == "144"
    assert "144" in answer["messages"][3]["content"]
    assert answer["status"] == "ok"
    assert answer["usage"]["total_tokens"] > 0
    assert re.fullmatch(r"0\.0\d+", answer["cost"])
    shown = chat.ask("GET", f"/conversations/{name}").json()
    assert shown["messages"] == answer["messages"]
    assert (shown["title"], shown["answering"], shown["cost"]) == ("Sums", False, answer["cost"])


def test_the_events_of_an_answer_come_in_order_and_end_with_done(chat):
    name = chat.new()
    with chat.streaming(name, "What is 12 x 12?") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        got = list(events(response))
    names = [event for event, _ in got]
    assert names[0] == "message"
    assert names[-1] == "done"
    assert names.index("tool_call") < names.index("tool_result") < names.index("text")
    assert names.count("turn") == 2
    text = "".join(data["text"] for event, data in got if event == "text")
    assert text == chat.messages(name)[-1]["content"]
    done = got[-1][1]
    assert done["status"] == "ok"
    assert done["cost"]
    assert done["usage"]["total_tokens"]


def test_text_comes_as_it_is_written_not_at_the_end(serve, held):
    chat = serve(base_url=held.url)
    with chat.streaming(chat.new(), "Hi") as response:
        reading = events(response)
        next(reading)
        assert next(reading) == ("text", {"text": "Once upon"})
        held.let_go.set()
        assert [event for event, _ in reading] == ["text", "turn", "done"]


def test_conversations_are_listed_in_pages_and_searched(chat):
    names = [chat.new(title=f"Talk {number}") for number in range(5)]
    chat.say(names[0], "the ostrich cannot fly")
    first = chat.ask("GET", "/conversations?limit=3").json()
    assert next(c["id"] for c in first["data"]) == names[0]
    second = chat.ask("GET", "/conversations", params={"limit": 3, "cursor": first["next"]}).json()
    assert second["next"] is None
    listed = [c["id"] for c in (*first["data"], *second["data"])]
    assert sorted(listed) == sorted(names)
    assert listed.count(names[0]) == 1
    found = chat.ask("GET", "/conversations", params={"q": "ostrich"}).json()["data"]
    assert [c["id"] for c in found] == [names[0]]
    assert "ostrich" in found[0]["snippet"]
    found = chat.ask("GET", "/conversations", params={"q": "talk 3"}).json()["data"]
    assert [c["title"] for c in found] == ["Talk 3"]


def test_a_conversation_is_renamed_and_gets_other_instructions(chat, server):
    name = chat.new()
    changed = chat.ask(
        "PATCH", f"/conversations/{name}", json={"title": "New", "system": "Be a pirate."}
    )
    assert (changed.json()["title"], changed.json()["system"]) == ("New", "Be a pirate.")
    chat.say(name, "Hello")
    assert server.requests[-1].json["messages"][0] == {"role": "system", "content": "Be a pirate."}


def test_a_conversation_without_a_title_takes_the_first_question(chat):
    name = chat.new()
    chat.say(name, "Why is the sky blue?")
    assert chat.ask("GET", f"/conversations/{name}").json()["title"] == "Why is the sky blue?"


def test_a_deleted_conversation_is_gone_and_its_cost_stays(chat):
    name = chat.new()
    chat.say(name, "Hello")
    before = chat.ask("GET", "/usage").json()
    assert chat.ask("DELETE", f"/conversations/{name}").status_code == 204
    assert chat.ask("GET", f"/conversations/{name}").status_code == 404
    assert chat.ask("DELETE", f"/conversations/{name}").status_code == 404
    assert chat.ask("GET", "/usage").json() == before
    assert before["total"]["calls"] == 1


def test_regenerating_replaces_the_answer_and_keeps_the_old_one_in_the_database(chat, server):
    name = chat.new()
    server.reply("First.")
    chat.say(name, "Hello")
    server.reply("Second.")
    again = chat.ask("POST", f"/conversations/{name}/regenerate", json={})
    assert [m["content"] for m in again.json()["messages"]] == ["Second."]
    assert [m["content"] for m in chat.messages(name)] == ["Hello", "Second."]
    roles = [m["role"] for m in server.requests[-1].json["messages"]]
    assert roles == ["system", "user"]
    chat.say(name, "More")
    sent = [m["content"] for m in server.requests[-1].json["messages"][1:]]
    assert sent == ["Hello", "Second.", "More"]

    def count(connection):
        return connection.exec_driver_sql(
            "SELECT count(*) FROM messages WHERE replaced = 1"
        ).scalar()

    assert chat.service.store.run(count, write=False) == 1


def test_a_regeneration_that_fails_leaves_the_old_answer(serve, server):
    chat = serve()
    chat.service.llm = chat.service.llm.with_options(max_retries=0)
    name = chat.new()
    server.reply("First.")
    chat.say(name, "Hello")
    server.reply(status=500)
    again = chat.ask("POST", f"/conversations/{name}/regenerate")
    assert again.status_code == 502
    assert [m["content"] for m in chat.messages(name)] == ["Hello", "First."]


def test_there_is_nothing_to_regenerate_in_an_empty_conversation(chat):
    again = chat.ask("POST", f"/conversations/{chat.new()}/regenerate")
    assert (again.status_code, again.json()["title"]) == (409, "Nothing to answer")


def test_a_branch_shares_the_beginning_and_goes_its_own_way(chat):
    name = chat.new(title="Trunk")
    chat.say(name, "One")
    chat.say(name, "Two")
    numbers = [m["number"] for m in chat.messages(name)]
    made = chat.ask("POST", f"/conversations/{name}/branch", json={"at": numbers[1]})
    assert made.status_code == 201
    branch = made.json()
    assert (branch["parent"], len(branch["messages"]), branch["cost"]) == (name, 2, "0")
    chat.say(branch["id"], "Other")
    assert len(chat.messages(name)) == 4
    assert len(chat.messages(branch["id"])) == 4
    empty = chat.ask("POST", f"/conversations/{name}/branch", json={"at": 0}).json()
    assert empty["messages"] == []


def test_a_branch_is_made_once_for_one_idempotency_key(chat):
    name = chat.new()
    chat.say(name, "One")
    headers = {"idempotency-key": "b"}
    path = f"/conversations/{name}/branch"
    made = [chat.ask("POST", path, json={"at": 2}, headers=headers).json() for _ in range(2)]
    assert made[0]["id"] == made[1]["id"]
    assert len(made[1]["messages"]) == 2
    assert len(chat.ask("GET", "/conversations").json()["data"]) == 2
    other = chat.new()
    again = chat.ask("POST", f"/conversations/{other}/branch", json={"at": 0}, headers=headers)
    assert again.status_code == 409


def test_lists_show_what_each_conversation_cost(chat):
    name, empty = chat.new(), chat.new()
    chat.say(name, "What is 12 x 12?")
    listed = {c["id"]: c["cost"] for c in chat.ask("GET", "/conversations").json()["data"]}
    assert listed == {
        name: chat.ask("GET", f"/conversations/{name}").json()["cost"],
        empty: "0",
    }


def test_no_instructions_are_no_message(chat, server):
    chat.say(chat.new(system=""), "Hi")
    assert [m["role"] for m in server.requests[-1].json["messages"]] == ["user"]


def test_a_branch_never_parts_a_tool_call_from_its_result(chat):
    name = chat.new()
    chat.say(name, "What is 12 x 12?")
    made = chat.ask("POST", f"/conversations/{name}/branch", json={"at": 2})
    assert (made.status_code, made.json()["title"]) == (422, "Cannot branch there")


@pytest.mark.parametrize(
    "form,kind,holds",
    [
        ("openai", "application/json", '"tool_call_id"'),
        ("anthropic", "application/json", '"tool_use_id"'),
        ("markdown", "text/markdown", "## assistant"),
    ],
)
def test_a_conversation_is_exported(chat, form, kind, holds):
    name = chat.new()
    chat.say(name, "What is 12 x 12?")
    got = chat.ask("GET", f"/conversations/{name}/export", params={"form": form})
    assert got.headers["content-type"].startswith(kind)
    assert holds in got.text
    assert re.fullmatch(
        r'attachment; filename="conversation-\w{8}\.(json|md)"', got.headers["content-disposition"]
    )


def test_usage_is_told_by_day_and_model_with_what_may_still_be_spent(serve):
    chat = serve(budget_usd="1.50", budget_period="month")
    name = chat.new()
    cost = [chat.say(name, "Hello").json()["cost"] for _ in range(2)]
    usage = chat.ask("GET", "/usage?since=7d").json()
    (day,) = usage["days"]
    assert day["calls"] == 2
    assert day["model"] == "gpt-4"
    assert day["unpriced"] == 0
    assert usage["total"]["cost"] == day["cost"] == usage["budget"]["spent_usd"]
    assert float(day["cost"]) == pytest.approx(sum(map(float, cost)))
    assert (usage["budget"]["limit_usd"], usage["budget"]["period"]) == ("1.5", "month")
    assert chat.ask("GET", "/usage?since=2999-01-01").json()["days"] == []
    assert chat.ask("GET", "/usage?since=soon").status_code == 422


def test_only_the_models_of_the_settings_are_asked(serve, server):
    chat = serve(model="gpt-4", models="gpt-4,gpt-4o-mini")
    listed = chat.ask("GET", "/models").json()
    assert listed == {"data": [{"id": "gpt-4"}, {"id": "gpt-4o-mini"}], "default": "gpt-4"}
    name = chat.new()
    said = chat.say(name, "Hello", model="gpt-4o-mini").json()
    assert said["model"] == "gpt-4o-mini" == server.requests[-1].json["model"]
    refused = chat.say(name, "Hello", model="o3-pro")
    assert (refused.status_code, refused.json()["title"]) == (404, "No such model")
    assert len(chat.messages(name)) == 2


@pytest.mark.parametrize(
    "body,place",
    [
        ("{", "body"),
        ("[]", "body"),
        ("{}", "body.content"),
        ('{"content": ""}', "body.content"),
        ('{"content": 7}', "body.content"),
        ('{"content": "x", "base_url": "http://other"}', "body.base_url"),
        ("[" * 100_000, "body"),
        ('{"content": "half \\ud83d"}', "body.content"),
    ],
)
def test_a_malformed_body_is_refused_and_nothing_is_stored(chat, body, place):
    name = chat.new()
    path = f"/conversations/{name}/messages"
    got = chat.ask("POST", path, data=body, headers={"content-type": "application/json"})
    assert got.status_code in (400, 422), got.text
    assert got.headers["content-type"] == "application/problem+json"
    assert got.json()["title"]
    assert got.json()["request_id"] == got.headers["x-request-id"]
    assert place in got.json()["detail"]
    assert chat.messages(name) == []


def test_half_a_character_of_a_model_does_not_spoil_the_conversation(serve):
    event = (
        b'data: {"id":"c","choices":[{"delta":{"content":"half \\ud83d"},"finish_reason":"stop"}]}'
    )
    with raw_server(lambda c, _: (c.sendall(stream_head("connection: close") + event + b"\n\n"
                                            b"data: [DONE]\n\n"), hang_up(c))) as model:  # fmt: skip
        chat = serve(base_url=model.url)
        name = chat.new()
        said = chat.say(name, "Hi")
        assert said.status_code == 200, said.text
        assert chat.messages(name)[-1]["content"].startswith("half ")


@pytest.mark.parametrize("path", ["/nothing", "/conversations/nope", "/conversations/%00"])
def test_what_is_not_there_is_a_problem_with_the_id_of_the_request(chat, path):
    got = chat.ask("GET", path, headers={"x-request-id": "mine-1"})
    assert got.status_code == 404
    assert got.json() == {
        "type": "about:blank",
        "title": "Not found",
        "status": 404,
        "detail": got.json()["detail"],
        "request_id": "mine-1",
    }
    assert got.headers["x-request-id"] == "mine-1"


def test_a_bad_cursor_is_refused(chat):
    for cursor in ("x", "bm90anNvbg==", "WzEsMl0=", "é"):
        got = chat.ask("GET", "/conversations", params={"cursor": cursor})
        assert (got.status_code, got.json()["title"]) == (422, "Malformed request")


def test_health_and_readiness_and_numbers(chat):
    assert chat.ask("GET", "/health").json()["status"] == "ok"
    assert chat.ask("GET", "/ready").json() == {"status": "ready"}
    chat.say(chat.new(), "Hello")
    numbers = chat.ask("GET", "/metrics").text
    assert 'agents_answers_total{outcome="ok"} 1.0' in numbers
    assert 'route="/conversations/{id}/messages"' in numbers


def test_the_documentation_describes_each_route_with_an_example(chat):
    api = chat.ask("GET", "/openapi.json").json()
    assert "/conversations/{id}/messages" in api["paths"]
    for path, methods in api["paths"].items():
        for method, operation in methods.items():
            assert operation.get("summary"), (method, path)
    bodies = ("NewConversation", "NewMessage", "Branch", "MessageView", "ProblemView")
    assert all(api["components"]["schemas"][body].get("examples") for body in bodies)
    assert json.dumps(api).count("http://") == 0


def test_a_service_of_your_own_tools(serve, server):
    def weather(city: str) -> str:
        """The weather of a city."""
        return f"sunny in {city}"

    chat = serve(tools=[weather])
    assert chat.ask("GET", "/session").json()["tools"] == ["weather"]
    server.reply(tool_calls=[{"name": "weather", "arguments": {"city": "Rome"}}])
    server.reply("Sunny.")
    said = chat.say(chat.new(), "How is it?").json()
    assert said["messages"][2]["content"] == "sunny in Rome"


def test_a_tool_that_needs_a_person_is_said_so(serve, server):
    from agents import tool

    @tool(effect="once", approval=True)
    def launch(place: str) -> str:
        """Launch it."""
        raise AssertionError(place)

    chat = serve(tools=[launch])
    server.reply(tool_calls=[{"name": "launch", "arguments": {"place": "x"}}])
    said = chat.say(chat.new(), "Go")
    assert (said.status_code, said.json()["title"]) == (422, "A tool waits for a person")


def test_settings_that_name_an_unknown_tool_are_refused(server, tmp_path):
    from agents.service.app import create_app
    from LLM import LLMConfigError

    with pytest.raises(LLMConfigError, match="AGENTS_TOOLS"):
        create_app(Settings(database=f"sqlite:///{tmp_path}/x.db", base_url=server.url, tools="rm"))


def test_an_answer_that_is_under_way_is_marked_and_can_be_cancelled(serve, held):
    chat = serve(base_url=held.url)
    name = chat.new()
    with chat.streaming(name, "Tell") as response:
        reading = events(response)
        assert next(reading)[0] == "message"
        assert next(reading)[0] == "text"
        assert chat.ask("GET", f"/conversations/{name}").json()["answering"]
        listed = chat.ask("GET", "/conversations").json()["data"]
        assert [c["answering"] for c in listed] == [True]
        got = chat.ask("POST", f"/conversations/{name}/cancel")
        assert (got.status_code, got.json()) == (202, {"cancelled": True})
        rest = list(reading)
    assert held.gone.wait(30)
    assert rest[-1][0] == "done"
    assert rest[-1][1]["status"] == "partial"
    assert "error" not in [event for event, _ in rest]
    last = chat.messages(name)[-1]
    assert (last["content"], last["status"]) == ("Once upon", "partial")
    until(lambda: not chat.ask("GET", f"/conversations/{name}").json()["answering"])
    assert chat.ask("POST", f"/conversations/{name}/cancel").json() == {"cancelled": False}


def test_calls_of_the_model_are_spans_of_opentelemetry(serve, monkeypatch):
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from agents.service import core
    from LLM import otel

    exporter = InMemorySpanExporter()
    tracers = TracerProvider()
    tracers.add_span_processor(SimpleSpanProcessor(exporter))
    # The global provider can be set once in a process, which other tests share.
    monkeypatch.setattr(core, "otel", lambda: otel(tracer_provider=tracers))
    chat = serve(otel=True)
    chat.say(chat.new(), "Hello")
    (span,) = exporter.get_finished_spans()
    assert span.name == "chat gpt-4"
    assert span.attributes["gen_ai.usage.output_tokens"] > 0
