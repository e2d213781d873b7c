"""The loop: it ends on an answer, a limit or a circle; it can be streamed, cancelled, paused and resumed."""

import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path

import pytest
from pydantic import BaseModel

from agents.agent import Agent, Cancel
from agents.store import ConflictError, Store
from agents.tools import ToolContext, ToolFailed, ToolPending, ToolRetry, tool
from agents.types import (
    AgentCancelledError,
    AgentError,
    AgentLimitError,
    AgentLoopError,
    Message,
)
from LLM import LLM, Budget, LLMConfigError, LLMInvalidRequestError, LLMOutputError, Price
from tests.fakes import AT_ONCE, FakeClock, until

ROOT = Path(__file__).parents[2]


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@tool(effect="read")
def weather(city: str) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


@pytest.fixture
def llm(server):
    with LLM(base_url=server.url, max_retries=0, price=Price(1, 2)) as client:
        yield client


def calls(*named):
    return {"tool_calls": [{"name": name, "arguments": arguments} for name, arguments in named]}


def script(server, *replies):
    for reply in replies:
        server.reply(**(reply if isinstance(reply, dict) else {"text": reply}))


def contents(request):
    return [(message["role"], message.get("content")) for message in request.json["messages"]]


# An answer


def test_an_agent_without_tools_answers(server, llm):
    script(server, "Hi!")
    result = Agent(llm, instructions="Be brief.").run("Hello!")
    assert result.output == "Hi!"
    assert contents(server.requests[0]) == [("system", "Be brief."), ("user", "Hello!")]
    assert [message.role for message in result.messages] == ["system", "user", "assistant"]
    assert "tools" not in server.requests[0].json


def test_tools_are_run_until_there_is_an_answer(server, llm):
    script(server, calls(("add", {"a": 2, "b": 3})), "It is 5.")
    result = Agent(llm, tools=[add]).run("2 + 3?")
    assert result.output == "It is 5."
    assert contents(server.requests[1])[-1] == ("tool", "5")
    assert [len(turn.results) for turn in result.turns] == [1, 0]
    assert result.turns[0].results[0].value == 5
    assert result.usage.total_tokens == sum(t.response.usage.total_tokens for t in result.turns)
    assert result.cost == sum((t.response.cost for t in result.turns), Decimal(0)) > 0


def test_it_works_the_same_on_anthropic(server):
    script(server, calls(("add", {"a": 2, "b": 3}), ("weather", {"city": "Rome"})), "Done.")
    with LLM(base_url=server.url, provider="anthropic", model="claude-sonnet-4-5") as llm:
        result = Agent(llm, tools=[add, weather], instructions="Add.").run("2 + 3?")
    assert result.output == "Done."
    sent = server.requests[1].json
    assert sent["system"] == "Add."
    assert [block["type"] for block in sent["messages"][-1]["content"]] == ["tool_result"] * 2


def test_the_messages_of_a_run_are_the_history_of_the_next(server, llm):
    script(server, calls(("add", {"a": 5, "b": 10})), "15", calls(("add", {"a": 15, "b": 1})), "16")
    agent = Agent(llm, tools=[add], instructions="You add.")
    first = agent.run("5 + 10?")
    second = agent.run("And one more?", history=first.messages)
    assert second.output == "16"
    assert [m.role for m in second.messages].count("system") == 1


def test_what_a_model_can_mend_is_told_to_it(server, llm):
    script(
        server, calls(("ad", {})), calls(("add", "{no json")), calls(("add", {"a": 1, "b": 2})), "3"
    )
    result = Agent(llm, tools=[add]).run("1 + 2?")
    assert result.output == "3"
    outcomes = [turn.results[0].outcome for turn in result.turns[:-1]]
    assert outcomes == ["retry", "retry", "ok"]


def test_calls_without_an_id_of_their_own_get_one(server, llm):
    body = {
        "id": "c1",
        "choices": [
            {
                "message": {
                    "role": "assistant",
                    "tool_calls": [
                        {
                            "id": "same",
                            "function": {"name": "add", "arguments": '{"a": 1, "b": 1}'},
                        },
                        {
                            "id": "same",
                            "function": {"name": "add", "arguments": '{"a": 2, "b": 2}'},
                        },
                        {"function": {"name": "add", "arguments": '{"a": 3, "b": 3}'}},
                    ],
                },
                "finish_reason": "tool_calls",
            }
        ],
    }
    script(server, {"body": body}, "done")
    result = Agent(llm, tools=[add]).run("add")
    assert [r.content for r in result.turns[0].results] == ["2", "4", "6"]
    ids = [
        m.get("tool_call_id") for m in server.requests[1].json["messages"] if m["role"] == "tool"
    ]
    assert len(set(ids)) == 3


def test_tools_get_what_the_program_hands_in(server, llm):
    @tool
    def whoami(context: ToolContext) -> str:
        """Who asks."""
        return context.deps["user"]

    script(server, calls(("whoami", {})), "ok")
    result = Agent(llm, tools=[whoami]).run("Who am I?", deps={"user": "ada"})
    assert result.turns[0].results[0].content == "ada"


def test_an_agent_can_be_the_tool_of_another(server, llm):
    expert = Agent(llm, name="expert", instructions="You know all about birds.")
    assert expert.as_tool().description == "You know all about birds."
    script(server, calls(("expert", {"task": "Do owls fly?"})), "They do.", "Owls fly.")
    result = Agent(llm, tools=[expert.as_tool()]).run("Owls?")
    assert result.output == "Owls fly."
    assert result.turns[0].results[0].content == "They do."


def test_tool_choice_and_other_arguments_pass_through(server, llm):
    script(server, "ok")
    Agent(llm, tools=[add], tool_choice="none", temperature=0, seed=7).run("Hi")
    sent = server.requests[0].json
    assert (sent["tool_choice"], sent["temperature"], sent["seed"]) == ("none", 0, 7)


# An answer of a type


class City(BaseModel):
    name: str
    people: int


def test_the_answer_is_an_instance(server, llm):
    script(server, calls(("final_answer", {"name": "Rome", "people": 3})))
    result = Agent(llm, output_type=City).run("Rome?")
    assert result.output == City(name="Rome", people=3)
    assert server.requests[0].json["tool_choice"]["function"]["name"] == "final_answer"
    assert result.messages[-1].role == "tool"


def test_an_instance_after_tools_and_from_plain_json(server, llm):
    script(server, calls(("weather", {"city": "Rome"})), '{"name": "Rome", "people": 3}')
    result = Agent(llm, tools=[weather], output_type=City).run("Rome?")
    assert result.output.people == 3
    assert "tool_choice" not in server.requests[0].json


def test_an_invalid_answer_is_asked_for_again_with_the_reason(server, llm):
    script(
        server,
        calls(("final_answer", {"name": "Rome"})),
        "Rome has three million.",
        calls(("final_answer", {"name": "Rome", "people": 3})),
    )
    result = Agent(llm, output_type=City).run("Rome?")
    assert result.output.people == 3
    assert "people" in contents(server.requests[1])[-1][1]
    assert contents(server.requests[2])[-1][0] == "user"
    assert len(result.turns) == 3


def test_it_is_not_asked_for_again_for_ever(server, llm):
    script(server, *["no json"] * 3)
    with pytest.raises(LLMOutputError) as caught:
        Agent(llm, output_type=City).run("Rome?")
    assert (caught.value.reason, caught.value.text) == ("invalid", "no json")
    assert caught.value.usage.total_tokens > 0
    assert len(caught.value.result.turns) == 3


@pytest.mark.parametrize(
    "finish_reason, reason", [("length", "cut"), ("content_filter", "refused")]
)
def test_a_cut_or_refused_answer_is_said_so(server, llm, finish_reason, reason):
    script(server, {"text": '{"name": "Ro', "finish_reason": finish_reason})
    with pytest.raises(LLMOutputError) as caught:
        Agent(llm, output_type=City).run("Rome?")
    assert caught.value.reason == reason
    assert len(server.requests) == 1


def test_a_plain_type_is_wrapped_and_unwrapped(server, llm):
    script(server, calls(("final_answer", {"value": [1, 2]})))
    result = Agent(llm, output_type=list[int]).run("Numbers?")
    assert result.output == [1, 2]


# Limits


def test_turns_are_limited(server, llm):
    script(server, *[calls(("add", {"a": n, "b": 0})) for n in range(5)])
    with pytest.raises(AgentLimitError, match="3 turns") as caught:
        Agent(llm, tools=[add], max_turns=3).run("Go on.")
    assert caught.value.limit == "turns"
    assert len(caught.value.result.turns) == 3
    assert len(server.requests) == 3


def test_tool_calls_are_limited_before_they_are_run(server, llm):
    ran = []

    @tool
    def note(text: str) -> str:
        """Note it."""
        ran.append(text)
        return "noted"

    script(
        server,
        calls(("note", {"text": "a"})),
        calls(("note", {"text": "b"}), ("note", {"text": "c"})),
    )
    with pytest.raises(AgentLimitError) as caught:
        Agent(llm, tools=[note], max_tool_calls=2).run("Note.")
    assert (caught.value.limit, ran) == ("tool_calls", ["a"])


def test_tokens_are_limited(server, llm):
    usage = {"prompt_tokens": 60, "completion_tokens": 50}
    script(server, *[{**calls(("add", {"a": n, "b": 0})), "usage": usage} for n in range(5)])
    with pytest.raises(AgentLimitError) as caught:
        Agent(llm, tools=[add], max_total_tokens=200).run("Go on.")
    assert caught.value.limit == "tokens"
    assert caught.value.result.usage.total_tokens == 220


def test_cost_is_limited_before_it_is_spent(server, llm):
    with pytest.raises(AgentLimitError) as caught:
        Agent(llm, budget="0.0001", max_tokens=10).run("word " * 3000)
    assert caught.value.limit == "cost"
    assert server.requests == []


def test_runs_can_share_a_budget(server, llm):
    agent = Agent(llm, budget=Budget(requests=2))
    agent.run("1")
    agent.run("2")
    with pytest.raises(AgentLimitError):
        agent.run("3")


def test_a_budget_holds_for_what_its_tools_ask(server, llm):
    inner = Agent(llm, name="inner")
    script(server, calls(("inner", {"task": "x"})), "done")
    budget = Budget(requests=3)
    Agent(llm, tools=[inner.as_tool()], budget=budget).run("Go.")
    assert budget.spent_requests == 3


def test_a_deadline_bounds_the_whole_run(server):
    clock = FakeClock()

    @tool
    def slow() -> str:
        """Takes long."""
        clock.time += 10
        return "done"

    script(server, calls(("slow", {})), "too late")
    with LLM(base_url=server.url, clock=clock) as llm:
        with pytest.raises(AgentLimitError) as caught:
            Agent(llm, tools=[slow], deadline=5, clock=clock).run("Go.")
    assert caught.value.limit == "deadline"


@pytest.mark.parametrize("limit", ["max_turns", "max_tool_calls", "max_total_tokens", "deadline"])
def test_a_limit_that_is_none_is_refused(llm, limit):
    with pytest.raises(LLMConfigError, match=limit):
        Agent(llm, **{limit: 0})


def test_an_error_of_the_model_ends_the_run_with_all_so_far(server, llm):
    script(server, calls(("add", {"a": 1, "b": 1})), {"status": 400, "text": "too odd"})
    with pytest.raises(LLMInvalidRequestError) as caught:
        Agent(llm, tools=[add]).run("Go.")
    result = caught.value.result
    assert len(result.turns) == 1
    assert result.messages[-1].content == "2"


# Circles


def test_the_same_call_again_and_again_is_told_once_and_then_ends(server, llm):
    server.reply(lambda _: calls(("add", {"a": 1, "b": 1})))
    with pytest.raises(AgentLoopError) as caught:
        Agent(llm, tools=[add], max_turns=50).run("Go.")
    assert len(server.requests) == 6
    told = [m for m in caught.value.result.messages if m.role == "user"]
    assert len(told) == 2


def test_a_circle_of_two_is_seen_too(server, llm):
    turns = iter(range(100))
    server.reply(lambda _: calls(("weather", {"city": "AB"[next(turns) % 2]})))
    with pytest.raises(AgentLoopError):
        Agent(llm, tools=[weather], max_turns=50).run("Go.")
    assert len(server.requests) == 8


def test_the_same_call_with_other_results_is_no_circle(server, llm):
    states = iter(["busy", "busy", "done"])

    @tool(effect="read")
    def poll() -> str:
        """Look."""
        return next(states)

    script(server, *[calls(("poll", {}))] * 3, "Done.")
    assert Agent(llm, tools=[poll]).run("Wait.").output == "Done."


# Turn by turn, and streamed


def test_turns_can_be_looked_at_one_by_one(server, llm):
    script(server, calls(("add", {"a": 1, "b": 1})), "2")
    turns = Agent(llm, tools=[add]).iter("1 + 1?")
    first = next(turns)
    assert (first.number, first.results[0].content, len(server.requests)) == (1, "2", 1)
    assert [turn.number for turn in turns] == [2]


def test_a_run_is_streamed_as_events(server, llm):
    script(server, {**calls(("add", {"a": 1, "b": 1})), "reasoning": "I add."}, "It is two.")
    events = list(Agent(llm, tools=[add]).stream("1 + 1?"))
    kinds = [event.type for event in events if event.type not in ("text", "reasoning")]
    assert "".join(event.text for event in events if event.type == "reasoning") == "I add."
    assert kinds == ["tool_call", "tool_result", "turn", "turn", "result"]
    assert "".join(event.text for event in events if event.type == "text") == "It is two."
    assert events[-1].result.output == "It is two."


def test_a_budget_does_not_hold_the_one_who_iterates(server, llm):
    script(server, calls(("add", {"a": 1, "b": 1})), "2")
    turns = Agent(llm, tools=[add], budget=Budget(requests=1)).iter("1 + 1?")
    next(turns)
    llm.chat_completion([Message(role="user", content="mine")])
    with pytest.raises(AgentLimitError):
        next(turns)


# Cancelling


def test_a_run_that_was_cancelled_asks_nothing(server, llm):
    cancel = Cancel()
    cancel.cancel()
    with pytest.raises(AgentCancelledError):
        Agent(llm).run("Hi", cancel=cancel)
    assert server.requests == []


def test_a_streaming_answer_is_cut_off(server, llm):
    server.token_delay = 0.05
    server.reply(" ".join(["word"] * 400))
    cancel = Cancel()

    def stop():
        until(lambda: server.requests)
        time.sleep(0.1)  # a word or two have come by now, most times
        cancel.cancel()

    threading.Thread(target=stop).start()
    began = time.monotonic()
    with pytest.raises(AgentCancelledError):
        Agent(llm).run("Hi", cancel=cancel)
    assert time.monotonic() - began < AT_ONCE  # all the words take 20 s


def test_a_tool_is_not_waited_for(server, llm):
    cancel, begun, free = Cancel(), threading.Event(), threading.Event()

    @tool
    def hang() -> str:
        """Hangs."""
        begun.set()
        free.wait(60)
        return "late"

    script(server, calls(("hang", {})))
    threading.Thread(target=lambda: (begun.wait(30), cancel.cancel())).start()
    with pytest.raises(AgentCancelledError) as caught:
        Agent(llm, tools=[hang]).run("Hi", cancel=cancel)
    free.set()
    assert isinstance(caught.value, AgentError)


# A person decides


def test_a_run_pauses_for_a_person_and_goes_on(server, llm):
    sent = []

    @tool(approval=True, effect="once")
    def send(to: str) -> str:
        """Send money."""
        sent.append(to)
        return "sent"

    store = Store.open(":memory:")
    script(server, calls(("send", {"to": "bob"}), ("add", {"a": 1, "b": 1})), "Sent.", "Not sent.")
    agent = Agent(llm, tools=[send, add], store=store)
    paused = agent.run("Pay bob.")
    (waiting,) = paused.pending
    assert paused.paused
    assert (waiting.reason, waiting.call.name, sent) == ("approval", "send", [])
    still = agent.resume(paused.run_id)
    assert still.paused
    done = agent.resume(paused.run_id, approvals={waiting.call.id: True})
    assert (done.output, sent) == ("Sent.", ["bob"])
    assert [r.content for r in done.turns[0].results] == ["sent", "2"]
    again = agent.resume(paused.run_id)
    assert (again.output, sent, len(server.requests)) == ("Sent.", ["bob"], 2)
    store.close()


def test_what_a_person_declines_is_told_to_the_model(server, llm):
    @tool(approval=True)
    def send(to: str) -> str:
        """Send money."""
        raise AssertionError

    store = Store.open(":memory:")
    script(server, calls(("send", {"to": "bob"})), "As you wish.")
    agent = Agent(llm, tools=[send], store=store)
    paused = agent.run("Pay bob.")
    done = agent.resume(paused.run_id, approvals={paused.pending[0].call.id: False})
    assert done.output == "As you wish."
    assert "declined" in contents(server.requests[1])[-1][1]
    store.close()


def test_without_a_store_or_a_run_nothing_can_be_resumed(llm):
    with pytest.raises(LLMConfigError, match="store="):
        Agent(llm).resume("x")
    store = Store.open(":memory:")
    with pytest.raises(LLMConfigError, match="no run 'x'"):
        Agent(llm, store=store).resume("x")
    store.close()


@pytest.mark.parametrize("wrong", [[], [42]])
def test_a_prompt_that_is_none_is_refused(llm, wrong):
    with pytest.raises(LLMConfigError):
        Agent(llm).run(wrong)


def test_a_tool_cannot_take_the_name_of_the_answer(llm):
    @tool(name="final_answer")
    def final(x: int) -> int:
        """No."""
        return x

    with pytest.raises(LLMConfigError, match="final_answer"):
        Agent(llm, tools=[final])


# Crashes

CRASH = '''
import json, os, signal, sys
sys.path.insert(0, {root!r})
from LLM import LLM
from agents.agent import Agent
from agents.store import ConflictError, Store
from agents.tools import tool
from pydantic import BaseModel

log = {log!r}
at = int(sys.argv[2])

def note(what):
    with open(log, "a") as file:
        file.write(what + "\\n")

@tool(effect="read")
def look(what: str) -> str:
    """Look."""
    note("look")
    return "seen " + what

@tool(effect="once")
def pay(to: str) -> str:
    """Pay."""
    note("pay " + to)
    return "paid " + to

class Answer(BaseModel):
    text: str

store = Store.open({url!r})
count = 0

def killing(name):
    inner = getattr(store.journal, name)
    def step(*args):
        global count
        for when in ("before", "after"):
            count += 1
            if when == "after":
                inner(*args)
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)
    setattr(store.journal, name, step)

if sys.argv[1] == "run":
    for name in ("append", "finish"):
        killing(name)
llm = LLM(base_url={server!r}, max_retries=0)
agent = Agent(llm, tools=[look, pay], output_type=Answer, store=store)
if sys.argv[1] == "run":
    result = agent.run("Look, then pay bob.", run_id="r")
else:
    result = agent.resume("r")
    if result.paused:
        assert [p.reason for p in result.pending] == ["unknown"]
        result = agent.resume("r", approvals={{result.pending[0].call.id: at == 1}})
print(json.dumps([result.output.text, len(result.turns), [m.role for m in result.messages]]))
'''


def steps_of_the_model(request):
    """What the model says next follows from what it is shown: a deterministic one."""
    tools = [m for m in request.json["messages"] if m["role"] == "tool"]
    if not tools:
        return calls(("look", {"what": "bill"}))
    if len(tools) == 1:
        return calls(("pay", {"to": "bob"}))
    return calls(("final_answer", {"text": tools[1]["content"]}))


# A process that has imported all, and runs each script in a child of its own: none has to import it again.
NURSERY = """
import json, os, runpy, sys, traceback
import agents.agent, agents.store, LLM.client, LLM.transport, sqlalchemy.dialects.sqlite
for line in sys.stdin:
    path, mode, at, out, err = json.loads(line)
    child = os.fork()
    if not child:
        for number, name in ((1, out), (2, err)):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.argv = [path, mode, at]
        try:
            runpy.run_path(path, run_name="__main__")
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        sys.stdout.flush()
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def nursery():
    command = [sys.executable, "-c", NURSERY]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def run_script(nursery, tmp_path):
    """Run a script to its end, or to where it is killed."""
    out, err = tmp_path / "out", tmp_path / "err"

    def run(path, mode, at):
        nursery.stdin.write(json.dumps([str(path), mode, str(at), str(out), str(err)]) + "\n")
        nursery.stdin.flush()
        code = int(nursery.stdout.readline())
        return subprocess.CompletedProcess(path, code, out.read_text(), err.read_text())

    return run


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kill -9 is of POSIX")
@pytest.mark.parametrize("at", range(1, 23))
def test_a_run_survives_being_killed_at_any_step(server, run_script, tmp_path, at):
    """What was written down is not asked again; what may be done once is never done twice silently."""
    log = tmp_path / "log"
    log.touch()
    path = tmp_path / "crash.py"
    url = f"sqlite:///{tmp_path}/runs.db"
    path.write_text(CRASH.format(root=str(ROOT), log=str(log), url=url, server=server.url))
    server.reply(steps_of_the_model)
    killed = run_script(path, "run", at)
    if killed.returncode == 0:
        assert at > 18  # it has no more steps than these
        return
    assert killed.returncode == -9, killed.stderr
    asked = len(server.requests)
    gone_on = run_script(path, "resume", 0)
    assert gone_on.returncode == 0, gone_on.stderr
    text, turns, roles = json.loads(gone_on.stdout)
    assert turns == 3
    assert roles == ["user", "assistant", "tool", "assistant", "tool", "assistant", "tool"]
    done = log.read_text().split("\n")
    assert done.count("pay bob") <= 1
    assert text == "paid bob" or "declined" in text
    # One answer may have come and been lost before it was written down, no more.
    assert len(server.requests) <= 4
    assert asked <= len(server.requests)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kill -9 is of POSIX")
def test_what_may_have_been_done_is_run_again_only_if_a_person_says_so(
    server, run_script, tmp_path
):
    log = tmp_path / "log"
    log.touch()
    path = tmp_path / "crash.py"
    url = f"sqlite:///{tmp_path}/runs.db"
    path.write_text(CRASH.format(root=str(ROOT), log=str(log), url=url, server=server.url))
    server.reply(steps_of_the_model)
    # Killed when "started" of `pay` is written: before the tool ran, but nobody can know that.
    for at in range(8, 16):
        run_script(path, "run", at)
        store = Store.open(url)
        kinds = [step.kind for step in store.journal.steps("r")]
        store.close()
        if kinds and kinds[-1] == "started":
            break
        (tmp_path / "runs.db").unlink()
        for extra in tmp_path.glob("runs.db-*"):
            extra.unlink()
    assert kinds[-1] == "started"
    before = log.read_text().count("pay bob")
    declined = run_script(path, "resume", 0)
    assert "declined" in declined.stdout
    assert log.read_text().count("pay bob") == before


def test_an_error_of_a_tool_is_told_and_not_raised(server, llm):
    @tool
    def broken(x: int) -> int:
        """Breaks."""
        if x > 1:
            raise ToolRetry("x must be 1")
        if x == 1:
            raise ToolFailed("no luck")
        raise RuntimeError("boom")

    script(server, *[calls(("broken", {"x": x})) for x in (2, 1, 0)], "I give up.")
    result = Agent(llm, tools=[broken]).run("Try.")
    assert [t.results[0].outcome for t in result.turns[:3]] == ["retry", "failed", "failed"]
    assert "boom" in result.turns[2].results[0].content


# What was found by trying to break it


@pytest.fixture
def store():
    with Store.open(":memory:") as opened:
        yield opened


@pytest.fixture
def paid():
    return []


@pytest.fixture
def pay(paid):
    @tool(approval=True, effect="once")
    def pay(dollars: int) -> str:
        """Pay."""
        paid.append(dollars)
        return "paid"

    return pay


def call(id_, called="pay", /, **arguments):
    return {"tool_calls": [{"name": called, "arguments": arguments, "id": id_}]}


def open_calls(messages):
    wanted = [c.id for m in messages for c in m.tool_calls or []]
    return [id_ for id_ in wanted if id_ not in [m.tool_call_id for m in messages]]


def test_an_approval_is_used_up_when_the_tool_begins(server, llm, store):
    """After a crash inside the tool nobody knows, and the old yes is no yes to doing it again."""
    tries = []

    @tool(approval=True, effect="once")
    def send(to: str) -> str:
        """Send."""
        tries.append(to)
        raise KeyboardInterrupt

    script(server, call("c1", "send", to="bob"))
    agent = Agent(llm, tools=[send], store=store)
    agent.run("Send.", run_id="r")
    with pytest.raises(KeyboardInterrupt):
        agent.resume("r", approvals={"c1": True})
    again = agent.resume("r")
    assert [p.reason for p in again.pending] == ["unknown"]
    assert tries == ["bob"]
    assert [run.id for run in store.journal.runs("paused")] == ["r"]


def test_an_approval_is_for_one_call_only_though_its_id_comes_again(server, llm, store, pay, paid):
    script(server, call("call_0", dollars=5), call("call_0", dollars=5000), "done")
    agent = Agent(llm, tools=[pay], store=store)
    first = agent.run("Pay.")
    second = agent.resume(first.run_id, approvals={"call_0": True})
    assert second.paused
    assert paid == [5]


@pytest.mark.parametrize("wrong", [{"c1": "no"}, {"c1": 1}, {"c2": True}])
def test_an_approval_that_is_none_is_refused(server, llm, store, pay, paid, wrong):
    script(server, call("c1", dollars=5))
    agent = Agent(llm, tools=[pay], store=store)
    paused = agent.run("Pay.")
    with pytest.raises(LLMConfigError):
        agent.resume(paused.run_id, approvals=wrong)
    assert paid == []
    assert agent.resume(paused.run_id).pending == paused.pending


def test_two_who_resume_at_once_do_not_both_pay(server, llm, store, paid):
    begun, refused = threading.Event(), threading.Event()

    @tool(approval=True, effect="once")
    def pay(dollars: int) -> str:
        """Pay."""
        paid.append(dollars)
        begun.set()
        refused.wait(30)
        return "paid"

    script(server, call("c1", dollars=5), "done", "done")
    agent = Agent(llm, tools=[pay], store=store)
    paused = agent.run("Pay.")

    def resume():
        try:
            return agent.resume(paused.run_id, approvals={"c1": True})
        except (LLMConfigError, ConflictError) as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(resume)
        assert begun.wait(30)
        second = pool.submit(resume).result()
        refused.set()
    assert paid == [5]
    assert first.result().output == "done"
    assert isinstance(second, LLMConfigError)


def test_an_inner_agent_that_waits_for_a_person_has_not_done_it(server, llm, store, pay, paid):
    inner = Agent(llm, name="clerk", tools=[pay], store=store)
    script(server, call("o1", "clerk", task="Pay 5."), call("c1", dollars=5), "I could not.")
    result = Agent(llm, tools=[inner.as_tool()]).run("Pay 5.")
    assert result.turns[0].results[0].outcome == "failed"
    assert "person" in result.turns[0].results[0].content
    assert paid == []


def test_servers_without_ids_pause_nobody(server, llm, paid):
    @tool
    def once(n: int) -> str:
        """Once."""
        paid.append(n)
        return "ok"

    def without_id(n):
        calls = [{"function": {"name": "once", "arguments": json.dumps({"n": n})}}]
        message = {"role": "assistant", "tool_calls": calls}
        return {"body": {"choices": [{"message": message, "finish_reason": "tool_calls"}]}}

    script(server, without_id(1), without_id(2), "done")
    assert Agent(llm, tools=[once]).run("Go.").output == "done"
    assert paid == [1, 2]


def test_the_same_id_of_two_final_answers_mixes_nothing_up(server, llm):
    script(server, call("f", "final_answer", value="x"), call("f", "final_answer", value=3))
    result = Agent(llm, output_type=int).run("3?")
    assert result.output == 3
    assert [m.role for m in result.messages] == ["user", "assistant", "tool", "assistant", "tool"]


def test_arguments_as_deep_as_the_sea_are_mended(server, llm):
    script(
        server,
        {"tool_calls": [{"name": "add", "arguments": "[" * 1100}]},
        "ok",
    )
    result = Agent(llm, tools=[add]).run("Go.")
    assert result.turns[0].results[0].outcome == "retry"


def test_a_final_answer_that_nobody_asked_for_is_answered(server, llm):
    script(server, call("f", "final_answer", value=3), "three")
    result = Agent(llm, tools=[add]).run("Go.")
    assert result.output == "three"
    assert open_calls(result.messages) == []


def test_a_finished_run_stays_as_it_is(server, llm, store, pay):
    script(server, call("c1", dollars=5), "done", "something else")
    agent = Agent(llm, tools=[pay], store=store)
    paused = agent.run("Pay.")
    agent.resume(paused.run_id, approvals={"c1": True})
    assert agent.resume(paused.run_id, approvals={"c1": True}).output == "done"
    assert len(server.requests) == 2


def test_a_run_can_be_resumed_from_its_very_beginning(server, llm, store):
    message = {"role": "user", "content": "Hello!"}
    store.journal.begin("r", "agent", {"messages": [message]})  # and then it broke off
    script(server, "Hi!")
    assert Agent(llm, store=store).resume("r").output == "Hi!"


def test_a_tool_that_asks_for_a_person_itself_did_nothing(server, llm, store):
    @tool(effect="once")
    def ask(what: str) -> str:
        """Ask."""
        raise ToolPending("not without a person")

    script(
        server, {"tool_calls": [{"name": "ask", "arguments": {"what": x}, "id": x} for x in "ab"]}
    )
    agent = Agent(llm, tools=[ask], store=store)
    paused = agent.run("Go.")
    still = agent.resume(paused.run_id, approvals={"a": False})
    assert [(p.call.id, p.reason) for p in still.pending] == [("b", "approval")]


def test_attempts_at_an_output_are_not_given_again(server, llm, store):
    script(server, *["no json"] * 10)
    agent = Agent(llm, output_type=City, store=store)
    with pytest.raises(LLMOutputError) as caught:
        agent.run("Rome?", run_id="r")
    for _ in range(2):
        with pytest.raises(LLMOutputError) as caught:
            agent.resume("r")
    assert len(server.requests) == 3
    assert caught.value.result.turns


def test_the_end_of_an_outer_run_reaches_the_inner_one(server, llm):
    @tool(effect="read")
    def slow(n: int) -> int:
        """Slow."""
        time.sleep(0.2)
        return n

    count = iter(range(1000))

    def answer(request):
        if any(tool["function"]["name"] == "inner" for tool in request.json["tools"]):
            return calls(("inner", {"task": "x"}))
        return calls(("slow", {"n": next(count)}))

    server.reply(answer)
    inner = Agent(llm, name="inner", tools=[slow], max_turns=50)
    with pytest.raises(AgentLimitError):
        Agent(llm, tools=[inner.as_tool()], deadline=0.5).run("Go.")
    asked = len(server.requests)
    time.sleep(0.7)
    assert len(server.requests) <= asked + 1


@pytest.mark.parametrize("options", [{"max_tool_calls": 1}, {"output_type": City}])
def test_the_messages_of_a_failed_run_can_be_gone_on_with(server, llm, options):
    both = ("add", {"a": 1, "b": 1}), ("add", {"a": 2, "b": 2})
    final = call("f", "final_answer", name="Rome")
    script(server, *([final] * 3 if "output_type" in options else [calls(*both)]))
    with pytest.raises((AgentLimitError, LLMOutputError)) as caught:
        Agent(llm, tools=[add], **options).run("Go.")
    assert open_calls(caught.value.result.messages) == []


def test_an_agents_own_instructions_go_before_those_of_the_history(server, llm):
    script(server, "a", "b")
    first = Agent(llm, instructions="A").run("x")
    Agent(llm, instructions="B").run("y", history=first.messages)
    assert [c for r, c in contents(server.requests[1]) if r == "system"] == ["B"]


def test_who_goes_turn_by_turn_sees_the_pause(server, llm, store, pay):
    script(server, call("c1", dollars=5))
    (turn,) = Agent(llm, tools=[pay], store=store).iter("Pay.")
    assert [result.outcome for result in turn.results] == ["pending"]


def test_a_budget_that_is_spent_is_said_at_once_when_resuming(server, llm, store, pay, paid):
    script(
        server, {**call("c1", dollars=5), "usage": {"prompt_tokens": 10, "completion_tokens": 50}}
    )
    paused = Agent(llm, tools=[pay], store=store, max_tokens=100).run("Pay.", run_id="r")
    with pytest.raises(AgentLimitError) as caught:
        Agent(llm, tools=[pay], store=store, max_tokens=100, budget="0.00001").resume("r")
    assert caught.value.result.turns == paused.turns
    assert paid == []


def test_content_parts_are_a_prompt(server, llm):
    script(server, "ok")
    Agent(llm).run([{"type": "text", "text": "hi"}])
    assert server.requests[0].json["messages"][0]["content"] == [{"type": "text", "text": "hi"}]


@pytest.mark.parametrize("wrong", [None, "", {}, {"role": "user"}, 5, [{"role": 5}]])
def test_what_is_no_prompt_is_refused_in_a_line(llm, wrong):
    with pytest.raises(LLMConfigError):
        Agent(llm).run(wrong)
