"""The command `demo`: the stand-in model at work, through a server on this machine."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from decimal import Decimal
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from LLM.commands.shared import (
    FAILED,
    OK,
    READING_PACE,
    Answer,
    Failure,
    Said,
    milliseconds,
    program,
    show_answer,
    user,
)
from LLM.commands.view import Live, Screen, bar, screen_for
from LLM.errors import LLMBudgetError, LLMError
from LLM.providers.hosts import ENVIRONMENT_HOSTS, HOSTS


def demo(args: argparse.Namespace) -> int:
    show, _ = DEMOS[args.which]
    return show(args)


# A short talk.

_QUESTIONS = (
    "Hello, my name is Ada. What is 5 x 3?",
    "Now divide that by 3. And what is my name?",
)


def _talk(args: argparse.Namespace) -> int:
    from LLM.client import LLM
    from LLM.testing import LocalServer

    screen = screen_for(args)
    screen.say("A talk with a stand-in model, through a server on this machine.", "dim")
    said: list[Said] = []
    with (
        LocalServer(token_delay=READING_PACE) as server,
        LLM(base_url=server.url, model=server.models[0]) as client,
    ):
        for question in _QUESTIONS:
            screen.say(f"\n> {question}", "bold")
            said.append(user(question))
            answer = show_answer(client, said, screen)
            said.append({"role": "assistant", "content": answer.text})
            screen.say(f"({_measured(answer)})", "dim")
    screen.say(_next_steps())
    return OK


def _measured(answer: Answer) -> str:
    usage, seconds = answer.response.usage, answer.first_token
    first = "" if seconds is None else f"first token after {milliseconds(seconds * 1000)}, "
    tokens = (usage.prompt_tokens, usage.completion_tokens) if usage else (None, None)
    read, written = ("?" if count is None else count for count in tokens)
    return f"{first}{read} tokens in, {written} out"


def _next_steps() -> str:
    me = program()
    host = HOSTS[ENVIRONMENT_HOSTS[0]]
    own = next(host.name for host in HOSTS.values() if not host.key_variables)
    steps = [
        (f"{me} chat --local", "talk to the stand-in yourself"),
        (f"{me} chat --model {own}/llama3.2", "talk to a model that runs on this machine"),
        (f"{host.key_variables[0]}=… {me} chat", "talk to a hosted one"),
        (f"{me} doctor", "see what is set up here"),
    ]
    width = max(len(command) for command, _ in steps)
    lines = [f"  {command:{width}}  {about}" for command, about in steps]
    return "\n".join(["\nThat worked. Next:", *lines])


# Many calls: paced, budgeted, cached and counted.

_THREADS = 4
_REPEATS = 4  # one call in so many asks what was asked before
_WINDOWS = 5  # in how many of the limiter's minutes the calls are sent
_AFFORDED = 0.92  # the part of what has to be sent that the budget is made for
_DOLLARS = ("2.50", "10.00")  # for a million tokens of prompts, and of answers
_MAX_TOKENS = 8
_ROW = 40  # marks in a line
_GLANCE = 0.1  # seconds between two looks at how it goes
_MARKS = {
    ".": "sent",
    "w": "sent after a wait",
    "c": "from the cache",
    "x": "refused by the budget",
}


class _Watch:
    """A hook: what came of each call, and how long calls had to wait for the limiter."""

    def __init__(self) -> None:
        # Appending and setting are atomic: threads need no lock for them.
        self.marks: list[str] = []
        self.errors: dict[str, LLMError] = {}  # the first of each mark
        self.waits: dict[str, float] = {}  # seconds, by call
        self.warnings: list[str] = []

    def __call__(self, event: Any) -> None:
        from LLM.telemetry import CallFinished, Waited

        if isinstance(event, Waited) and event.reason == "rate_limit":
            self.waits[event.call_id] = event.seconds
        elif isinstance(event, CallFinished):
            mark = self._mark(event)
            if event.error is not None:
                self.errors.setdefault(mark, event.error)
            self.marks.append(mark)

    def warn(self, budget: Any) -> None:
        self.warnings.append(str(budget))

    def _mark(self, event: Any) -> str:
        if event.error is not None:
            return "x" if isinstance(event.error, LLMBudgetError) else "!"
        if event.cached:
            return "c"
        return "w" if event.call_id in self.waits else "."


def _budget(args: argparse.Namespace) -> int:
    from LLM.client import LLM
    from LLM.policies.cache import ResponseCache
    from LLM.policies.ratelimit import RateLimiter
    from LLM.prices import Price
    from LLM.testing import LocalServer

    screen, watch, cache = screen_for(args), _Watch(), ResponseCache()
    questions = [f"What is {_asked(number)} x 3?" for number in range(args.calls)]
    to_send = len(set(questions))
    limit = max(1, round(to_send * _AFFORDED / _WINDOWS))

    class Hurried(RateLimiter):
        MINUTE = args.seconds / (_WINDOWS - 1)

    limiter = Hurried(requests_per_minute=limit, tokens_per_minute=1000 * limit)
    # So slow that the requests of a window take half of it, and the other half is waited.
    latency = Hurried.MINUTE / 2 * _THREADS / limit
    with (
        LocalServer(latency=latency) as server,
        LLM(
            base_url=server.url,
            model=server.models[0],
            max_tokens=_MAX_TOKENS,
            rate_limiter=limiter,
            cache=cache,
            price=Price(*_DOLLARS),
            hooks=watch,
        ) as client,
    ):
        # What a call costs is seen from the first one, before the budget is made.
        cost: Any = client.chat_completion([user(questions[0])]).cost
        usd = cost * max(1, round(to_send * _AFFORDED))
        _introduce(screen, args.calls, limiter, cost, usd)
        with (
            screen.live() as live,
            client.budget(usd, name="demo", on_warn=watch.warn) as budget,
            _asking(client, questions[1:]) as threads,
        ):
            _follow(threads, args.calls, watch, live, lambda: _standing(limiter, budget))
        if "!" in watch.errors:
            raise Failure(f"a call failed: {watch.errors['!']}")
        _report(screen, client, limiter, budget, cache, watch)
        return _check(screen, client, len(server.requests), watch)


def _asked(number: int) -> int:
    """Which question a call asks: one of its own, or one from before."""
    return _asked(number // 2) if number % _REPEATS == _REPEATS - 1 else number + 1


def _introduce(screen: Screen, calls: int, limiter: Any, cost: Decimal, usd: Decimal) -> None:
    from LLM.prices import dollars_text

    minute = f"{limiter.MINUTE:.1f} s"
    screen.say(f"{calls} calls from {_THREADS} threads to a stand-in model on this machine.", "dim")
    rows = (
        (
            "limiter",
            f"{limiter.requests_per_minute} requests a minute; its minute is {minute} here",
        ),
        ("price", f"${_DOLLARS[0]} in, ${_DOLLARS[1]} out per million tokens"),
        ("budget", f"{dollars_text(usd)}; the first call cost {dollars_text(cost)}"),
        ("cache", f"one call in {_REPEATS} asks what was asked before"),
    )
    screen.table("Policies", [(True, *row) for row in rows])
    screen.say(f"\n{', '.join(f'{mark} {what}' for mark, what in _MARKS.items())}", "dim")


@contextmanager
def _asking(client: Any, questions: Sequence[str]) -> Iterator[list[threading.Thread]]:
    """Threads that ask all the questions, each what is next."""
    left = deque(questions)

    def work() -> None:
        while True:
            try:
                question = left.popleft()
            except IndexError:
                return
            with suppress(LLMError):  # the hook sees it
                client.chat_completion([user(question)])

    threads = [threading.Thread(target=work, daemon=True) for _ in range(_THREADS)]
    for thread in threads:
        thread.start()
    try:
        yield threads
    finally:
        left.clear()


def _follow(
    threads: Sequence[threading.Thread],
    total: int,
    watch: _Watch,
    live: Live,
    standing: Callable[[], str],
) -> None:
    """Show how it goes until all threads are done."""
    shown = warned = 0
    refused = False

    def show() -> None:
        nonlocal shown, warned, refused
        while len(watch.marks) - shown >= _ROW or shown < len(watch.marks) == total:
            row = "".join(watch.marks[shown : shown + _ROW])
            shown += len(row)
            live.say(f"{row:{_ROW}}  {shown:>{len(str(total))}}/{total}  {standing()}")
        for warning in watch.warnings[warned:]:
            warned += 1
            live.say(f"warned: {warning}", "yellow")
        if not refused and "x" in watch.errors:
            refused = True
            live.say(f"refused: {watch.errors['x']}", "yellow")
        done = len(watch.marks)
        live.update(f"{bar(done / total, 20):20}  {done}/{total}  {standing()}")

    for thread in threads:
        while thread.is_alive():
            thread.join(_GLANCE)
            show()
    show()
    live.update("")


def _standing(limiter: Any, budget: Any) -> str:
    from LLM.prices import dollars_text

    now, spent = limiter.state(), budget.state()
    wait = f", {now.waiting} waiting" if now.waiting else ""
    return f"{dollars_text(spent.spent.usd)} spent{wait}"


def _report(
    screen: Screen, client: Any, limiter: Any, budget: Any, cache: Any, watch: _Watch
) -> None:
    from LLM.prices import dollars_text

    rows = [
        (
            name,
            f"{used.calls:,}",
            f"{used.cached:,}",
            f"{used.known.prompt_tokens:,}",
            f"{used.known.completion_tokens:,}",
            dollars_text(used.cost),
        )
        for name, used in client.usage.by_model.items()
    ]
    head = ("answered by", "calls", "from cache", "prompt", "completion", "cost")
    screen.grid(head, rows)
    pace, spent, stats = limiter.state(), budget.state(), cache.stats()
    waits = list(watch.waits.values())
    waited = f"{len(waits)} calls waited, {sum(waits):.1f} s in all"
    money = f"{dollars_text(spent.spent.usd)} of {dollars_text(spent.limit_usd)} spent"
    told = (
        ("limiter", f"{waited}; {pace.requests} of {pace.requests_per_minute} in its last minute"),
        ("budget", f"{money} after the first call; {watch.marks.count('x')} calls refused"),
        ("cache", f"{stats.hits} hits; {stats.entries} answers kept, {stats.bytes:,} bytes"),
    )
    screen.table("In the end", [(True, *row) for row in told])


def _check(screen: Screen, client: Any, seen: int, watch: _Watch) -> int:
    """Whether the server's own log agrees with what the policies say."""
    calls, hits, refused = client.get_request_count(), client.usage.cached, watch.marks.count("x")
    equation = f"{calls} calls − {hits} from the cache − {refused} refused"
    if seen != calls - hits - refused:
        screen.problem(f"the server saw {seen} requests, which is not {equation}")
        return FAILED
    screen.say(f"\nThe server saw {seen} requests = {equation}.", "bold")
    return OK


# Many prompts: killed half-way, and resumed.

_CONCURRENCY = 16
# What is run, and killed, and run again. The bar is tqdm's, if that is installed.
_MAP = """
import os, signal, sys
from LLM.client import LLM

url, journal, items, last = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
questions = [f"What is {number} x 3?" for number in range(items)]
try:
    import tqdm
except ImportError:
    bar = None
else:
    bar = True
resumed = 0
with LLM(base_url=url) as client:
    with client.map(questions, journal=journal, concurrency=%d, progress=bar) as results:
        for number, result in enumerate(results):
            if result.index == last:
                os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
            assert result.text == f"{number} * 3 = {number * 3}.", result
            resumed += result.resumed
print(items, resumed)
"""


def _batch(args: argparse.Namespace) -> int:
    from LLM.testing import LocalServer

    screen, items = screen_for(args), args.items
    screen.say(
        f"{items:,} prompts, {_CONCURRENCY} at a time, to a stand-in model on this machine.", "dim"
    )
    with LocalServer() as server, TemporaryDirectory() as folder:
        journal = Path(folder) / "run.jsonl"
        screen.say(f"\nThe first run kills itself at item {items // 2:,}.", "bold")
        first = _mapped(server.url, journal, items, items // 2)
        lines = max(0, len(_finished(journal)))
        before = len(server.requests)
        screen.say(
            f"Signal {-first.returncode} ended it after {before:,} requests, "
            f"with {lines:,} answers in the journal."
        )
        screen.say("\nThe same again:", "bold")
        second = _mapped(server.url, journal, items, -1)
        if second.returncode:
            screen.problem(f"the second run failed: {second.stdout.decode(errors='replace')}")
            return FAILED
        done, resumed = map(int, second.stdout.split())
        screen.say(f"It handed out {done:,} answers, {resumed:,} of them from the journal.")
        asked = Counter(request.json["messages"][-1]["content"] for request in server.requests)
        return _add_up(screen, items, asked, _finished(journal))


def _mapped(url: str, journal: Path, items: int, last: int) -> subprocess.CompletedProcess[bytes]:
    program = [sys.executable, "-c", _MAP % _CONCURRENCY, url, str(journal), str(items), str(last)]
    sys.stdout.flush()
    return subprocess.run(program, stdout=subprocess.PIPE, check=False)  # noqa: S603 - our own


def _finished(journal: Path) -> list[int]:
    """The items in a journal; a line that was torn by the kill is none."""
    lines = journal.read_bytes().split(b"\n")[1:-1]
    return [json.loads(line)["key"] for line in lines]


def _add_up(screen: Screen, items: int, asked: Counter[str], finished: list[int]) -> int:
    """Whether each item was answered once, by the server's own count."""
    requests, twice = asked.total(), sum(times > 1 for times in asked.values())
    once = sorted(finished) == list(range(items))
    screen.say(
        f"\nThe server saw {requests:,} requests = {items:,} items + {requests - items:,} again, "
        f"which were in flight at the kill (at most {_CONCURRENCY}).",
        "bold",
    )
    if len(asked) != items or requests - items != twice or twice > _CONCURRENCY or not once:
        screen.problem("an item is missing, or was answered more than once")
        return FAILED
    screen.say(f"The journal holds each of the {items:,} answers once.", "bold")
    return OK


# Each: what shows it, and what it is.
DEMOS: Mapping[str, tuple[Callable[[argparse.Namespace], int], str]] = {
    "talk": (_talk, "a short talk; the default"),
    "budget": (_budget, "many calls, paced, budgeted, cached and counted"),
    "batch": (_batch, "many prompts, killed half-way and resumed"),
}
