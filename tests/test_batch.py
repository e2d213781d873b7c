"""One function over many items: order, bounds, endings, and a journal that survives everything."""

import contextvars
import gc
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
import tracemalloc
from collections import Counter
from decimal import Decimal
from itertools import count, islice

import pytest

from LLM.batch import MapResult, MapRun, Task, ThreadedMap, job_of, tasks
from LLM.errors import (
    LLMAuthenticationError,
    LLMBudgetError,
    LLMCancelledError,
    LLMConfigError,
    LLMNotFoundError,
    LLMQuotaError,
    LLMServerError,
    LLMTimeoutError,
)
from LLM.journal import Journal, JournalError, Mark
from LLM.types import ChatCompletionResponse
from tests.fakes import FakeClock

JOB = {"provider": "p", "model": "m"}


def answer(text="ok", **more):
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 2, "completion_tokens": 1}
    return ChatCompletionResponse(choices=[choice], usage=usage, **more)


def echo(request):
    return answer(request["messages"][0]["content"])


def run(ask, items, journal=None, *, concurrency=4, job=JOB, **more):
    kept = None if journal is None else Journal(journal, job)
    return ThreadedMap(ask, tasks(items), concurrency=concurrency, journal=kept, **more)


def words(number):
    return [f"item {place}" for place in range(number)]


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("LLM map")]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    gc.collect()
    until = time.monotonic() + 5
    while threads() and time.monotonic() < until:
        time.sleep(0.01)
    assert not threads()


# Order and bounds.


def test_results_come_in_the_order_of_the_items_whatever_is_ready_first():
    def ask(request):
        number = int(request["messages"][0]["content"].split()[1])
        time.sleep(0.01 * (3 - number % 4))
        return echo(request)

    results = list(run(ask, words(40), concurrency=8))

    assert [result.text for result in results] == words(40)
    assert [result.index for result in results] == list(range(40))


def test_as_completed_a_slow_item_holds_nobody_up():
    slow = threading.Event()

    def ask(request):
        if request["messages"][0]["content"] == "item 0":
            assert slow.wait(10)
        return echo(request)

    with MapRun(run(ask, words(300), concurrency=2, ordered=False), total=300) as results:
        first = [result.index for result in islice(results, 200)]
        slow.set()
        rest = [result.index for result in results]

    assert 0 not in first
    assert sorted(first + rest) == list(range(300))


@pytest.mark.parametrize("concurrency, ahead", [(4, 1000), (300, 1200)])
def test_in_order_a_thousand_go_on_while_a_slow_item_holds_its_place(concurrency, ahead):
    slow, begun, taken = threading.Event(), [], []

    def ask(request):
        text = request["messages"][0]["content"]
        if text == "item 0":
            assert slow.wait(30)
        begun.append(text)
        if len(begun) == ahead - 1:  # all that may be taken, but the slow one
            slow.set()
        return echo(request)

    def source():
        for text in words(2 * ahead):
            if not slow.is_set():
                taken.append(text)
            yield text

    results = run(ask, source(), concurrency=concurrency)
    assert [result.index for result in results] == list(range(2 * ahead))
    assert len(taken) <= ahead


def test_a_lead_that_a_slow_item_made_is_not_kept():
    slow, taken = threading.Event(), []

    def ask(request):
        if request["messages"][0]["content"] == "item 0":
            assert slow.wait(30)
        return echo(request)

    def source():
        for text in words(5000):
            taken.append(text)
            if len(taken) == 900:
                slow.set()
            yield text

    results = run(ask, source(), concurrency=4)
    handed = [next(results).index for _ in range(2000)]
    results.close()
    assert handed == list(range(2000))
    assert len(taken) < 2000 + 100


def test_no_more_is_asked_at_a_time_than_said():
    now, most, lock = 0, 0, threading.Lock()

    def ask(request):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.002)
        with lock:
            now -= 1
        return echo(request)

    list(run(ask, words(100), concurrency=7))

    assert most == 7


def test_endless_items_are_taken_a_few_ahead_only():
    taken = 0

    def endless():
        nonlocal taken
        for number in count():
            taken += 1
            yield f"item {number}"

    results = run(echo, endless(), concurrency=3)
    first = [next(results).text for _ in range(10)]
    results.close()

    assert first == words(10)
    assert taken <= 10 + 3 * 4


def test_few_items_start_few_threads():
    ready = threading.Barrier(2)

    def ask(request):
        ready.wait(10)
        assert len(threads()) == 2
        return echo(request)

    assert len(list(run(ask, words(2), concurrency=500))) == 2


def test_no_items_give_no_results():
    assert list(run(echo, [])) == []


def test_items_are_taken_in_the_thread_that_iterates():
    seen = set()

    def items():
        for text in words(20):
            seen.add(threading.get_ident())
            yield text

    list(run(echo, items()))

    assert seen == {threading.get_ident()}


def test_results_are_handed_out_while_the_items_come_slowly():
    asked, handed, behind = [threading.Event() for _ in range(100)], [], []

    def ask(request):
        asked[int(request["messages"][0]["content"])].set()
        return echo(request)

    def slow_source():
        for place in range(100):
            if place >= 2:  # the next item is there only when the one before the last is answered
                assert asked[place - 2].wait(10)
                time.sleep(0.001)
            behind.append(place - len(handed))
            yield str(place)

    for result in run(ask, slow_source(), concurrency=16):
        handed.append(result.index)  # noqa: PERF401 - the source looks at it meanwhile

    assert handed == list(range(100))
    assert max(behind) < 16  # of the 64 that may be taken ahead


def test_the_calls_have_the_context_of_the_one_who_made_the_map():
    variable = contextvars.ContextVar("variable", default="none")
    variable.set("mine")

    def ask(request):
        return answer(variable.get())

    results = run(ask, words(20))
    variable.set("another")

    assert {result.text for result in results} == {"mine"}


@pytest.mark.parametrize("ordered", [True, False])
def test_memory_stays_flat_over_many_items(ordered):
    said = answer()

    def measure(number):
        tracemalloc.start()
        try:
            items = (str(place) for place in range(number))
            for _ in MapRun(run(lambda _: said, items, ordered=ordered), total=None):
                pass
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    measure(200)

    # A thousand results wait at the most, of some 250 bytes; held all, these were 5 MB.
    assert measure(20_000) < 1_000_000


# Failures.


def test_a_failed_item_is_a_result_and_the_others_go_on():
    def ask(request):
        if request["messages"][0]["content"] in ("item 3", "item 7"):
            raise LLMServerError("broken", status_code=500)
        return echo(request)

    run_ = MapRun(run(ask, words(10)), total=10)
    results = list(run_)

    assert [result.index for result in results if not result.success] == [3, 7]
    assert isinstance(results[3].error, LLMServerError)
    assert (results[3].response, results[3].text, results[3].usage, results[3].cost) == (
        None, "", None, None,
    )  # fmt: skip
    assert (run_.progress.done, run_.progress.failed) == (10, 2)


def test_the_first_failed_item_can_be_raised():
    def ask(request):
        if request["messages"][0]["content"] == "item 3":
            raise LLMServerError("broken")
        return echo(request)

    seen = []
    with pytest.raises(LLMServerError, match="broken"):
        seen.extend(
            result.index for result in MapRun(run(ask, words(100)), total=100, on_error="raise")
        )

    assert seen == [0, 1, 2]


@pytest.mark.parametrize(
    "error",
    [
        LLMAuthenticationError("wrong key", status_code=401),
        LLMQuotaError("no money", status_code=429),
        LLMBudgetError("no room"),
    ],
)
def test_what_makes_all_others_fail_ends_the_map_after_what_is_under_way(error):
    asked = Counter()

    def ask(request):
        text = request["messages"][0]["content"]
        asked[text] += 1
        if int(text.split()[1]) >= 20:
            raise error
        return echo(request)

    results, seen = run(ask, words(1000)), []
    with pytest.raises(type(error)) as caught:
        seen.extend(results)

    assert caught.value is error
    assert [result.index for result in seen if result.success] == list(range(20))
    assert 1 <= len([result for result in seen if not result.success]) <= 4
    assert len(asked) <= 24
    assert next(results, None) is None


def test_a_refused_or_missing_model_ends_the_map_only_as_long_as_nothing_was_answered():
    for error in (
        LLMNotFoundError("no such model", status_code=404),
        LLMAuthenticationError("not yours", status_code=403),
    ):

        def ask(request, error=error):
            if request["messages"][0]["content"] == "item 0":
                raise error
            return echo(request)

        with pytest.raises(type(error)):
            list(run(ask, words(100), concurrency=1))
        assert len(list(run(ask, ["hello", *words(20)], concurrency=1))) == 21


def test_an_item_with_a_model_of_its_own_fails_alone():
    def ask(request):
        if request.get("model") == "gone":
            raise LLMAuthenticationError("not yours", status_code=401)
        return echo(request)

    items = [{"prompt": "a", "model": "gone"}, "b", "c"]

    assert [result.success for result in run(ask, items, concurrency=1)] == [False, True, True]


def test_a_wrong_key_ends_the_map_also_of_items_with_a_model_for_the_same_place():
    asked = []

    def ask(request):
        asked.append(request)
        raise LLMAuthenticationError("wrong key", status_code=401)

    items = [{"prompt": "x", "model": "m"} for _ in range(100)]
    results = run(ask, items, concurrency=1, elsewhere=lambda _: False)
    with pytest.raises(LLMAuthenticationError):
        list(results)
    assert len(asked) == 1


def test_what_the_items_raise_comes_after_what_is_under_way():
    def items():
        yield from words(30)
        raise OSError("the file is gone")

    seen = []
    with pytest.raises(OSError, match="the file is gone"):
        seen.extend(result.index for result in run(echo, items()))

    assert seen == list(range(30))


def test_an_error_that_is_none_of_ours_is_raised():
    def ask(request):
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError, match="a bug"):
        list(run(ask, words(50)))


def test_what_a_budget_refuses_while_others_are_under_way_is_asked_when_they_are_over():
    room, lock, asked = 3, threading.Lock(), Counter()

    def ask(request):
        nonlocal room
        asked["tries"] += 1
        with lock:
            if not room:
                raise LLMBudgetError("no room while others hold it")
            room -= 1
        time.sleep(0.002)
        with lock:
            room += 1
        return echo(request)

    assert all(result.success for result in run(ask, words(60), concurrency=8))
    assert asked["tries"] > 60


def test_after_the_deadline_nothing_further_is_begun():
    clock = FakeClock()

    def ask(request):
        clock.time += 1
        return echo(request)

    results = run(ask, words(100), concurrency=1, clock=clock, ends_at=clock.now() + 5)
    seen = []
    with pytest.raises(LLMTimeoutError, match="deadline") as caught:
        seen.extend(result.index for result in results)

    assert caught.value.clock == "deadline"
    assert 5 <= len(seen) <= 10


# Ending early.


def test_leaving_the_block_ends_what_is_under_way():
    from LLM.cancel import woken

    started, ended = threading.Barrier(3), []

    def ask(request):
        over = threading.Event()
        with woken(over.set):
            started.wait(10)
            assert over.wait(10)
        ended.append(request)
        raise LLMCancelledError("cancelled")

    before = time.monotonic()
    with MapRun(run(ask, ["a", "b"]), total=2) as results:
        thread = threading.Thread(target=lambda: list(results), daemon=True)
        thread.start()
        started.wait(10)
        results.close()
        thread.join(10)

    assert not thread.is_alive()
    assert time.monotonic() - before < 5
    assert len(ended) == 2
    assert next(results, None) is None


def test_a_map_that_is_dropped_lets_go_of_its_journal(tmp_path):
    """Also without the collector, though an error and its frames hold what the threads share."""
    begun, hold = threading.Event(), threading.Event()

    def ask(request):
        if request["messages"][0]["content"] == "item 0":
            begun.wait(10)
            return answer()
        begun.set()
        hold.wait(10)
        raise LLMServerError("no", status_code=500)

    gc.disable()
    try:
        results = run(ask, words(100), tmp_path / "j", concurrency=2)
        next(results)
        left = threads()
        del results
        hold.set()
        for thread in left:
            thread.join(10)
        run(echo, words(100), tmp_path / "j").close()
        # One of which nothing was taken.
        run(echo, words(100), tmp_path / "j")
        run(echo, words(100), tmp_path / "j").close()
    finally:
        gc.enable()


@pytest.mark.skipif(sys.platform == "win32", reason="a thread cannot be sent a signal")
def test_ctrl_c_twice_leaves_no_journal_locked(tmp_path):
    hold, begun = threading.Event(), threading.Event()

    def ask(_):
        begun.set()
        hold.wait(10)
        return answer()

    results = run(ask, words(10), tmp_path / "j", concurrency=1)
    taker = threading.Thread(target=lambda: [next(results, None)])
    taker.start()
    begun.wait(10)

    def bomb():
        time.sleep(0.1)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    bomber = threading.Thread(target=bomb)
    bomber.start()
    with pytest.raises(KeyboardInterrupt):
        results.close()  # which waits for the thread that is held
    bomber.join()
    try:
        run(echo, words(10), tmp_path / "j").close()
    finally:
        hold.set()
        taker.join(10)


def test_a_map_that_is_dropped_ends_its_threads(tmp_path):
    results = run(echo, words(100), tmp_path / "j")
    next(results)
    assert threads()

    del results
    gc.collect()
    for thread in threads():
        thread.join(10)

    assert not threads()


def test_ctrl_c_ends_it_and_the_same_again_goes_on(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(CHILD)
    child = subprocess.Popen(
        [sys.executable, script, tmp_path, "0.005"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    for _ in range(20):
        child.stdout.readline()
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=10)

    assert b"KeyboardInterrupt" in errors
    finished = [line for line in lines_of(tmp_path / "j")[1:] if line["ok"]]
    assert len(finished) >= 20
    done = subprocess.run(
        [sys.executable, script, tmp_path, "0"], capture_output=True, check=True, timeout=20
    )
    assert done.stdout.split() == [str(place).encode() for place in range(400)]
    # What was in flight at Ctrl-C is the only thing that was asked twice.
    assert len((tmp_path / "asked").read_bytes().split()) <= 400 + 8


# A child that maps 400 items and writes down each call that it makes, before it is made.
CHILD = textwrap.dedent("""
    import os, sys, time
    from LLM.batch import ThreadedMap, tasks
    from LLM.journal import Journal
    from LLM.types import ChatCompletionResponse

    folder, pause = sys.argv[1], float(sys.argv[2])
    asked = os.open(f"{folder}/asked", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def ask(request):
        text = request["messages"][0]["content"]
        os.write(asked, text.encode() + b"\\n")
        time.sleep(pause)
        message = {"role": "assistant", "content": text}
        return ChatCompletionResponse(choices=[{"message": message}])

    journal = Journal(f"{folder}/j", {"model": "m"})
    items = (f"i{place}" for place in range(400))
    for result in ThreadedMap(ask, tasks(items), concurrency=8, journal=journal):
        assert result.text == f"i{result.index}"
        print(result.index, flush=True)
""")


def lines_of(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


# The journal.


def test_finished_items_come_back_from_the_journal_in_their_places(tmp_path):
    path = tmp_path / "j"
    asked = []

    def ask(request):
        asked.append(request["messages"][0]["content"])
        return answer("said " + asked[-1], id="x", model="m")

    first = list(run(ask, words(10), path))
    again = list(run(ask, words(14), path))

    assert sorted(asked) == sorted(words(14))
    assert [result.resumed for result in again] == [True] * 10 + [False] * 4
    assert [result.text for result in again[:10]] == [result.text for result in first]
    assert again[3].response.model_dump() == first[3].response.model_dump()
    assert again[3].usage.total_tokens == 3
    assert again[3].seconds == pytest.approx(first[3].seconds, abs=1e-5)
    assert (again[3].key, again[3].item, again[3].error) == ("3", "item 3", None)
    assert repr(again[3]).startswith("MapResult(index=3, key='3', item='item 3', response=Chat")
    copy = pickle.loads(pickle.dumps(again[4]))
    assert (copy.text, copy.resumed) == ("said item 4", True)
    with pytest.raises(AttributeError):
        again[4].nonsense  # noqa: B018 - that it is not there


def test_an_item_is_in_the_file_before_it_is_handed_out(tmp_path):
    path = tmp_path / "j"
    for result in run(echo, words(50), path, ordered=False):
        assert result.index in [line["key"] for line in lines_of(path)[1:]]


def test_the_cost_of_an_answer_comes_back_as_it_was(tmp_path):
    from LLM.prices import Price, Pricing
    from LLM.types import CallInfo

    def ask(request):
        response = answer()
        info = CallInfo(provider="p", model="m", request_id="r", latency_ms=7.5)
        info.prices = Pricing(Price("2.50", "10"))
        info.fallbacks = (("a", "was down"),)
        response._info = info
        return response

    (first,) = run(ask, ["a"], tmp_path / "j")
    (again,) = run(ask, ["a"], tmp_path / "j")

    assert again.cost == first.cost == Decimal("0.000015")
    assert (again.response.provider, again.response.request_id) == ("p", "r")
    assert (again.response.latency_ms, again.response.fallbacks) == (7.5, (("a", "was down"),))
    assert not again.cached


def test_a_failed_item_is_asked_again(tmp_path):
    path, broken = tmp_path / "j", True

    def ask(request):
        if broken and request["messages"][0]["content"] == "item 2":
            raise LLMServerError("broken", status_code=503)
        return echo(request)

    assert not list(run(ask, words(4), path))[2].success
    failed = lines_of(path)[1:]
    assert [line["error"] for line in failed if not line["ok"]] == [
        {
            "class": "LLMServerError",
            "type": "server_error",
            "status": 503,
            "message": "broken",
        }
    ]
    broken = False
    results = list(run(ask, words(4), path))

    assert [result.resumed for result in results] == [True, True, False, True]
    assert all(result.resumed for result in run(ask, words(4), path))


def test_an_item_that_was_corrected_after_it_failed_is_asked(tmp_path):
    def ask(request):
        if request["messages"][0]["content"] == "wrong":
            raise LLMServerError("broken")
        return echo(request)

    list(run(ask, [{"key": "a", "prompt": "wrong"}], tmp_path / "j"))
    (result,) = run(ask, [{"key": "a", "prompt": "right"}], tmp_path / "j")

    assert (result.text, result.key) == ("right", "a")


@pytest.mark.parametrize(
    "key", ["a", 'q"uote', "back\\", '","hash":"', "ключ", "\ud800", "1", "x" * 5000]
)
def test_any_text_can_be_a_key(tmp_path, key):
    items = [{"key": key, "prompt": "one"}, "two"]

    list(run(echo, items, tmp_path / "j"))
    results = list(run(echo, items, tmp_path / "j"))

    assert [result.key for result in results] == [key, "1"]
    assert all(result.resumed for result in results)


@pytest.mark.parametrize(
    "text", ["line\nbreak", "\u2028 \x00 \x7f", "\ud800 half a pair", "ü" * 100_000]
)
def test_any_answer_can_be_kept(tmp_path, text):
    def say(_):
        return ChatCompletionResponse.model_validate(
            {"choices": [{"message": {"role": "assistant", "content": text}}]}
        )

    list(run(say, ["a"], tmp_path / "j"))
    (again,) = run(echo, ["a"], tmp_path / "j")

    assert again.resumed
    assert again.text == text


def test_a_torn_last_line_is_cut_off_wherever_it_was_torn(tmp_path):
    path = tmp_path / "j"
    list(run(echo, words(3), path, concurrency=1))
    whole = path.read_bytes()
    begins = whole.rindex(b"\n", 0, -1) + 1

    for end in range(begins + 1, len(whole), 7):
        path.write_bytes(whole[:end])
        results = list(run(echo, words(3), path))
        assert [result.resumed for result in results] == [True, True, False]
        assert path.read_bytes().count(b"\n") == 4
        assert all(json.loads(line) for line in path.read_bytes().splitlines())


def test_a_torn_first_line_begins_anew(tmp_path):
    path = tmp_path / "j"
    list(run(echo, words(1), path))
    head = path.read_bytes().split(b"\n")[0]

    for end in (0, 1, 12, len(head)):
        path.write_bytes(head[:end])
        assert [result.resumed for result in run(echo, words(1), path)] == [False]


def test_zeros_after_a_loss_of_power_are_cut_off(tmp_path):
    path = tmp_path / "j"
    list(run(echo, words(3), path))
    path.write_bytes(path.read_bytes() + bytes(5000))

    assert [result.resumed for result in run(echo, words(4), path)] == [True] * 3 + [False]
    assert b"\0" not in path.read_bytes()


def test_damaged_lines_are_asked_anew(tmp_path, caplog):
    path = tmp_path / "j"
    list(run(echo, words(5), path, concurrency=1))
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = b"rubbish\n"
    lines[4] = b'{"key":99999999999999,"hash":"0123456789abcdef","ok":true,"seconds":1}\n'
    path.write_bytes(b"".join(lines))

    assert [result.resumed for result in run(echo, words(5), path)] == [
        True,
        False,
        True,
        False,
        True,
    ]
    assert "2 damaged lines" in caplog.text


@pytest.mark.parametrize("key", [b"\\x", b"a\tb", b"\xff", b"\x00a"])
def test_a_line_with_a_damaged_key_is_asked_anew(tmp_path, caplog, key):
    path = tmp_path / "j"
    items = [{"key": "one", "prompt": "x"}, {"key": "two", "prompt": "x"}]
    list(run(echo, items, path, concurrency=1))
    path.write_bytes(path.read_bytes().replace(b'"key":"two"', b'"key":"%s"' % key))

    assert [result.resumed for result in run(echo, items, path)] == [True, False]
    assert "1 damaged lines" in caplog.text


def test_a_line_that_is_damaged_inside_says_which_when_it_is_read(tmp_path):
    path = tmp_path / "j"
    list(run(echo, words(2), path, concurrency=1))
    path.write_bytes(path.read_bytes().replace(b'"item 1"', b'"item 1\\q'))
    results = list(run(echo, words(2), path))

    assert results[0].text == "item 0"
    with pytest.raises(JournalError, match=r"line of '1' in .*/j is damaged: delete that line"):
        results[1].text  # noqa: B018 - reading is what fails


def test_the_journal_of_another_job_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "j"
    list(run(echo, words(2), path))
    before = path.read_bytes()

    with pytest.raises(JournalError, match=r"another job \(model was 'm' and is 'other'\)"):
        run(echo, words(2), path, job={**JOB, "model": "other"})
    assert path.read_bytes() == before


def test_what_is_no_journal_is_refused_and_left_alone(tmp_path):
    for content in (
        b"my diary\n",
        b"my diary",
        b'{"journal":"LLM.map"}\n',
        b'{"a": 1}',
        bytes(100),
    ):
        path = tmp_path / "j"
        path.write_bytes(content)
        with pytest.raises(JournalError, match="is not a journal: choose another path"):
            Journal(path, JOB)
        assert path.read_bytes() == content


def test_a_journal_of_a_newer_version_is_refused(tmp_path):
    path = tmp_path / "j"
    path.write_bytes(b'{"journal":"LLM.map","version":2,"job":{}}\n')

    with pytest.raises(JournalError, match="version 2, and this library knows 1"):
        Journal(path, JOB)


def test_an_item_that_was_changed_under_its_key_is_refused(tmp_path):
    path = tmp_path / "j"
    list(run(echo, ["a", {"key": "k", "prompt": "b"}], path))

    with pytest.raises(JournalError, match=r"item 1 \('k'\) is not what it was"):
        list(run(echo, ["a", {"key": "k", "prompt": "other"}], path))
    with pytest.raises(JournalError, match="item 0 is not what it was"):
        list(run(echo, ["other"], path))


def test_two_items_with_one_key_are_refused_and_both_named(tmp_path):
    items = [{"key": "k", "prompt": "a"}, "b", {"custom_id": "k", "prompt": "c"}]
    seen = []
    with pytest.raises(JournalError, match="items 0 and 2 have the same key 'k'"):
        seen.extend(result.index for result in run(echo, items, tmp_path / "j"))

    assert seen == [0, 1]


def test_a_place_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (
        tmp_path,
        tmp_path / "missing" / "j",
        tmp_path / "file" / "j",
        "/dev/null",
        "a\0b",
    ):
        with pytest.raises(JournalError, match="choose another path"):
            Journal(path, JOB)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unwritable for root")
def test_a_file_that_may_not_be_written_says_so(tmp_path):
    path = tmp_path / "j"
    path.touch(mode=0o400)
    with pytest.raises(JournalError, match="Permission denied"):
        Journal(path, JOB)


def test_two_runs_cannot_share_a_journal(tmp_path):
    first = Journal(tmp_path / "j", JOB)
    with pytest.raises(JournalError, match="in use by another run"):
        Journal(tmp_path / "j", JOB)
    first.close()
    Journal(tmp_path / "j", JOB).close()


def test_a_journal_that_is_dropped_is_free_again(tmp_path):
    journal = Journal(tmp_path / "j", JOB)
    journal.add(Mark(0, None, 1), ok=True, fields=b'"a":1')
    del journal
    gc.collect()

    Journal(tmp_path / "j", JOB).close()


def test_another_process_cannot_share_a_journal(tmp_path):
    code = f"from LLM.journal import Journal; Journal({str(tmp_path / 'j')!r}, {JOB})"
    journal = Journal(tmp_path / "j", JOB)
    refused = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    journal.close()

    assert b"in use by another run" in refused.stderr
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_forked_child_does_not_unlock_what_its_parent_has(tmp_path):
    journal = Journal(tmp_path / "j", JOB)
    child = os.fork()
    if not child:
        journal.close()
        os._exit(0)
    os.waitpid(child, 0)

    with pytest.raises(JournalError, match="in use"):
        Journal(tmp_path / "j", JOB)
    journal.close()


def test_a_full_disk_ends_the_map_and_loses_nothing(tmp_path):
    path = tmp_path / "j"
    seen, limits = [], resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(JournalError, match=r"cannot be written: .*make room, and start again"):
            seen.extend(run(echo, words(1000), path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    # All that was paid for was handed out, though the last few are not in the file; which is whole.
    assert all(result.success for result in seen)
    kept = {line["key"] for line in lines_of(path)[1:]}
    assert 3 < len(kept) <= len(seen) < 100
    assert kept <= {result.index for result in seen}
    again = list(run(echo, words(1000), path))
    assert {result.index for result in again if result.resumed} == kept
    assert len(again) == 1000


def test_notes_stay_beside_the_items(tmp_path):
    journal = Journal(tmp_path / "j", JOB)
    journal.note({"batch": "b1"})
    journal.add(Mark(0, None, 7), ok=True, fields=b'"a":1')
    journal.note(["ü\ud800"])
    journal.close()
    again = Journal(tmp_path / "j", JOB)

    assert again.notes == [{"batch": "b1"}, ["ü\ud800"]]
    assert json.loads(again.find(Mark(0, None, 7)))["a"] == 1
    assert len(again) == 1
    again.close()
    with pytest.raises(JournalError, match="is closed"):
        again.note(1)


def test_the_file_is_readable_by_its_owner_only(tmp_path):
    Journal(tmp_path / "j", JOB).close()
    assert (tmp_path / "j").stat().st_mode & 0o777 == 0o600


def test_what_is_asked_of_all_stands_in_the_first_line_without_long_values():
    job = job_of("openai", "gpt", {"temperature": 0.5, "system": "s" * 100, "top_p": None})

    assert (job["provider"], job["model"], job["temperature="]) == ("openai", "gpt", 0.5)
    assert len(job["system="]) == 16
    assert "top_p=" not in job


@pytest.mark.parametrize("moment", [0.02, 0.05, 0.11, 0.17])
def test_killed_at_any_moment_it_goes_on_and_asks_only_what_was_in_flight(tmp_path, moment):
    script = tmp_path / "script.py"
    script.write_text(CHILD)
    printed = []
    for _ in range(3):
        child = subprocess.Popen(
            [sys.executable, script, tmp_path, "0.002"], stdout=subprocess.PIPE
        )
        child.stdout.readline()
        time.sleep(moment)
        child.kill()
        printed.append(child.communicate()[0].count(b"\n"))
    last = subprocess.run(
        [sys.executable, script, tmp_path, "0"], capture_output=True, check=True, timeout=30
    )

    assert [int(number) for number in last.stdout.split()] == list(range(400))
    asked = Counter((tmp_path / "asked").read_text().split())
    assert len(asked) == 400
    assert asked.total() - 400 <= 3 * 8
    finished = [line["key"] for line in lines_of(tmp_path / "j")[1:]]
    assert sorted(finished) == list(range(400))


# Items.


@pytest.mark.parametrize(
    "item, request_",
    [
        ("hi", {"messages": [{"role": "user", "content": "hi"}]}),
        ([{"role": "user", "content": "hi"}], {"messages": [{"role": "user", "content": "hi"}]}),
        (
            {"prompt": "hi", "model": "x", "top_p": 0.5, "stream": True},
            {"messages": [{"role": "user", "content": "hi"}], "model": "x", "top_p": 0.5},
        ),
        (
            {
                "custom_id": "a",
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": {
                    "model": "x",
                    "messages": [{"role": "user", "content": "hi"}],
                    "provider": {"order": ["y"]},
                    "timeout": 3,
                },
            },
            {
                "model": "x",
                "messages": [{"role": "user", "content": "hi"}],
                "temperature": None,
                "max_tokens": None,
                "extra_body": {"provider": {"order": ["y"]}, "timeout": 3},
            },
        ),
    ],
)
def test_what_an_item_asks(item, request_):
    (task,) = tasks([item])

    assert task.error is None
    assert task.request == request_


@pytest.mark.parametrize(
    "item, why",
    [
        (7, "is int: it must be a text"),
        (None, "is NoneType"),
        (b"x", "is bytes"),
        ({}, "has neither messages nor prompt"),
        ({"prompt": "a", "messages": []}, "has both messages and prompt"),
        ({"prompt": ["a"]}, "a prompt that is list, not text"),
        ({"messages": "a"}, "messages that are str"),
        ({"messages": ["a"]}, "a message that is str"),
        ({"messages": []}, "an empty list"),
        ({"prompt": "a", 1: 2}, "the field 1, which no call takes"),
        ({"prompt": "a", "self": 2}, "the field 'self'"),
        ({"key": ["a"], "prompt": "a"}, r"the key \['a'\]"),
        ({"body": []}, "a body that is list"),
        ({"body": {}}, "no messages in its body"),
        ({"method": "GET", "body": {}}, "the method 'GET'"),
        ({"url": "/v1/embeddings", "body": {}}, "the url '/v1/embeddings'"),
    ],
)
def test_an_item_that_cannot_be_asked_is_a_result_that_says_why(item, why):
    results = list(run(echo, ["a", item, "b"]))

    assert [result.success for result in results] == [True, False, True]
    with pytest.raises(LLMConfigError, match=r"^item 1( .*)? has .*|^item 1 is .*"):
        raise results[1].error
    with pytest.raises(LLMConfigError, match=why):
        raise results[1].error


def test_prompt_and_key_make_what_is_asked_of_anything():
    found = list(tasks([{"q": "hi", "n": 5}], prompt=lambda row: row["q"], key="n"))

    assert found[0][:2] == (0, "5")
    assert found[0].request == {"messages": [{"role": "user", "content": "hi"}]}
    (task,) = tasks([3], prompt=lambda item: "x" * item, key=lambda item: f"k{item}")
    assert (task.key, task.name) == ("k3", "k3")
    first, second, third = tasks(
        [{"q": 1}, {}, {"q": 2}], prompt=lambda row: f"{row['q']}", key="q"
    )
    assert (first.error, third.error) == (None, None)
    assert "prompt= raised KeyError: 'q'" in str(second.error)
    assert isinstance(second.error.__cause__, KeyError)
    (task,) = tasks([{"prompt": "a"}], key="id")
    assert "has no field 'id' for its key" in str(task.error)


# Progress.


def test_progress_is_told_after_each_result(tmp_path):
    list(run(echo, words(3), tmp_path / "j"))
    clock, told = FakeClock(), []

    def ask(request):
        clock.time += 2
        return echo(request)

    engine = run(ask, words(7), tmp_path / "j", concurrency=1, clock=clock)
    list(MapRun(engine, total=7, progress=told.append, clock=clock))

    assert [progress.done for progress in told] == [1, 2, 3, 4, 5, 6, 7]
    last = told[-1]
    assert (last.resumed, last.failed, last.total, last.tokens) == (3, 0, 7, 12)
    assert (last.cost, last.seconds, last.rate, last.seconds_left) == (None, 8.0, 0.5, 0.0)
    assert told[0].seconds_left is None


def test_a_bar_shows_how_it_goes(capsys):
    run_ = MapRun(run(echo, words(5)), total=5, progress=True)
    list(run_)

    shown = capsys.readouterr().err
    assert "5/5" in shown
    assert "15 tokens" in shown


def test_without_a_terminal_there_is_no_bar(capsys):
    list(MapRun(run(echo, words(5)), total=5))

    assert capsys.readouterr().err == ""


def test_a_bar_without_tqdm_says_what_to_install_and_keeps_no_journal_open(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    engine = run(echo, words(3), tmp_path / "j")

    with pytest.raises(LLMConfigError, match=r"pip install 'requests-llm\[progress\]'"):
        MapRun(engine, total=3, progress=True)
    Journal(tmp_path / "j", JOB).close()


def test_results_are_frozen():
    result = MapResult(0, "0", "a", answer())
    with pytest.raises(AttributeError):
        result.key = "b"
    assert Task(0, None, "a", {}).result(None).key == "0"
