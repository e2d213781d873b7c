"""The same client on a Ray cluster: over a dataset of Ray Data, or behind `map(…, engine="ray")`.

A client is made anew in each actor, of the parts of the one here. What bounds all actors together, limits and
budgets, must stand where all of them see it: in Redis. Importing this module does not import Ray.
"""

from __future__ import annotations

import io
import itertools
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from decimal import Decimal
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final, cast

from LLM.batch import MapResult, Results, Task, ThreadedMap
from LLM.cancel import woken
from LLM.client import LLM, nearest_deadline
from LLM.clock import Clock
from LLM.config import LLMConfig, checked_positive
from LLM.errors import LLMCancelledError, LLMConfigError, LLMConnectionError, LLMError
from LLM.journal import Journal, JournalError
from LLM.policies.budget import Budget, active_budgets, enter, leave
from LLM.policies.ratelimit import RateLimiter
from LLM.policies.redis_script import RedisScript
from LLM.prices import EXACT
from LLM.types import ChatCompletionResponse, TokenUsage

# Of a CPU, for each actor. Calls wait most of the time; with Ray's own choice, a whole one, the actors
# of a small machine leave none to the tasks that read the data, and the job hangs.
CPUS: Final = 0.1

# Rows that an actor gets at a time, for each of its threads: the last of them wait for the slowest.
_ROWS: Final = 16

# Seconds until one actor of a map must have started: an idle cluster takes two or three.
_PATIENCE: Final = 120.0

# Dollars, to the smallest unit that Arrow's widest exact number has room for beside 10^20 of them.
_CENTS: Final = Decimal("1e-18")


def map_dataset(
    dataset: Any,
    config: LLMConfig | LLM,
    *,
    prompt: str | Callable[[dict[str, Any]], Any] = "prompt",
    output: str = "response",
    concurrency: int = 2,
    per_actor: int = 16,
    batch_size: int | None = None,
    redis_url: str | None = None,
    name: str = "default",
    budget: Budget | Decimal | float | str | None = None,
    journal: str | os.PathLike[str] | None = None,
    full: bool = False,
    actor_options: Mapping[str, Any] | None = None,
    **call: Any,
) -> Any:
    """Ask for each row of a Ray dataset. Nothing is asked before the dataset that it gives is consumed.

        answers = map_dataset(ray.data.read_parquet("s3://…"), config, prompt="question")
        answers.write_parquet("s3://…")

    Each row keeps its columns and gets four more: `response` (text), `response_error` (class and message),
    `response_usage` (tokens) and `response_cost` (US dollars, exact); what is unknown is null. A
    failed row is a row with its error. A worker that dies is replaced, and its block is asked again;
    with a journal only what was not finished there.

    Ray Data computes a dataset as often as it is consumed: `materialize()` it, write it once, or give a
    journal, or it is paid for as often.

    The budgets of the `with llm.budget(…)` blocks that this is called in hold for all of it, whenever it is
    consumed; they need a store that all workers reach.

    Args:
        dataset: a `ray.data.Dataset`.
        config: the settings of the clients, or a client whose settings and policies they take. A key that
            came from the environment comes from that of the workers; one that was given travels inside the
            cluster. Neither is in a log.
        prompt: the column with the text or the messages; or a function that makes of a row, a dict, a text,
            messages, or a mapping with further arguments of the call.
        output: name of the first new column, and beginning of the others.
        concurrency: actors.
        per_actor: calls at a time in each, at most; each has a thread.
        batch_size: rows that an actor takes at a time; left out: 16 for each thread.
        redis_url: where the rate limit (`requests_per_minute`, `tokens_per_minute` of the config) and a
            budget in dollars are shared; needed if there is one. The extra `redis`.
        name: of the rate limit: all jobs that give the same one share it.
        budget: US dollars for this job, or a `Budget` with a store that all workers reach, which may be that
            of others, too. `None`: that of the config.
        journal: a directory, made if it is not there, that all workers see: what is finished is written
            there, and not paid for again when a block or the whole job is run again. A batch is known by its
            rows. It holds questions' hashes and answers; nothing removes it.
        full: one more column, `response_json`: the whole response.
        actor_options: further options of Ray for the actors: `num_cpus` (left out: 0.1), `resources`,
            `runtime_env` …
        call: everything else that `chat_completion` takes but `stream`.

    Returns:
        A `ray.data.Dataset`.

    Raises:
        LLMConfigError: Ray is not installed, an argument cannot be used, or the client cannot be sent; or
            it is called inside `with llm.deadline(…)`, which cannot hold for what is consumed later.
    """
    data = _ray("data")
    if nearest_deadline(None) is not None:
        raise LLMConfigError(
            "a dataset is computed when it is consumed, and cannot keep the `with llm.deadline(…)` that it "
            "is made in: make it outside, and give timeout= for each call"
        )
    for argument, number in (("concurrency", concurrency), ("per_actor", per_actor)):
        _check_count(argument, number)
    rows = _ROWS * per_actor if batch_size is None else batch_size
    _check_count("batch_size", rows)
    if not isinstance(dataset, data.Dataset):
        raise LLMConfigError(f"dataset is {type(dataset).__name__}; give a ray.data.Dataset")
    if not isinstance(prompt, str) and not callable(prompt):
        raise LLMConfigError(f"prompt is {type(prompt).__name__}; give a column or a function")
    if "stream" in call:
        raise LLMConfigError("a dataset takes no stream=: its answers come whole")
    known = dataset.schema(fetch_if_missing=False)
    if known is not None:
        _check_columns(known.names, prompt, output)
    client = config if isinstance(config, LLM) else LLM(config)
    _refuse_local(client)
    policies = _shared_policies(client, redis_url, name, budget)
    how = {
        "prompt": prompt,
        "output": output,
        "threads": per_actor,
        "journal": None if journal is None else _folder(journal),
        "full": full,
        "call": call,
    }
    return dataset.map_batches(
        _Rows,
        fn_constructor_args=(_Sealed.of((_parts(client, policies), _open_budgets(client), how)),),
        batch_format="pyarrow",
        batch_size=rows,
        compute=data.ActorPoolStrategy(size=concurrency),
        **{"num_cpus": CPUS, **(actor_options or {})},
    )


class _Rows:
    """What an actor of `map_dataset` does with a batch."""

    def __init__(self, sealed: _Sealed) -> None:
        parts, self.budgets, how = sealed.open()
        self.llm = _client(*parts)
        self.prompt = how["prompt"]
        self.output: str = how["output"]
        self.threads: int = how["threads"]
        self.journal: str | None = how["journal"]
        self.full: bool = how["full"]
        self.call: dict[str, Any] = how["call"]

    def __call__(self, table: Any) -> Any:
        _check_columns(table.column_names, self.prompt, self.output)
        rows = table.to_pylist()
        results: list[MapResult | None] = [None] * len(rows)
        problem: LLMError | None = None
        try:
            with _held(self.budgets), self._map(rows) as answers:
                for result in answers:
                    results[result.index] = result
        except JournalError:
            raise
        except LLMError as error:  # all others would fail as well: a budget, a key
            problem = error
        return _with_columns(table, self.output, results, problem, full=self.full)

    def _map(self, rows: list[dict[str, Any]]) -> Any:
        ask = self.prompt if callable(self.prompt) else _column(self.prompt)
        how = {"prompt": ask, "concurrency": self.threads, "progress": False, **self.call}
        if self.journal is None:
            return self.llm.map(rows, **how)
        told = repr((self.prompt if isinstance(self.prompt, str) else None, rows))
        content = blake2b(told.encode(errors="backslashreplace"), digest_size=16).hexdigest()
        for number in itertools.count(1):
            # The same rows may be in two batches that are under way at once.
            part = "" if number == 1 else f"-{number}"
            try:
                return self.llm.map(rows, journal=f"{self.journal}/{content}{part}.jsonl", **how)
            except JournalError as error:
                if not error.busy:
                    raise
        raise AssertionError  # pragma: no cover - the count has no end


def map_calls(
    llm: LLM,
    arguments: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    source: Iterable[Task],
    *,
    concurrency: int,
    ordered: bool,
    journal: Journal | None,
    clock: Clock,
    ends_at: float | None,
    actors: int | None = None,
) -> Results:
    """What `map(…, engine="ray")` iterates: the same map, whose calls are made by actors of a cluster.

    The items, their order, the journal and the progress stay here, and each call is a round trip to its
    actor, some 1,000 a second: for millions take `map_dataset`.

    Args:
        arguments: those of `chat_completion`, for a task's request.
        source: the tasks; the rest is as `ThreadedMap` takes it.
        actors: left out: one for each CPU of the cluster, not more than calls at a time.

    Raises:
        LLMConfigError: Ray is not installed, the client cannot be sent, or no actor starts.
    """
    try:
        crew = _Crew(llm, concurrency, actors, clock, ends_at)
    except BaseException:
        if journal is not None:
            journal.close()
        raise
    return _CrewMap(
        crew,
        lambda request: crew.ask(arguments(request)),
        source,
        concurrency=concurrency,
        ordered=ordered,
        journal=journal,
        clock=clock,
        ends_at=ends_at,
    )


class _Caller:
    """An actor that makes calls."""

    def __init__(self, sealed: _Sealed) -> None:
        self.problem: LLMError | None = None
        try:
            parts, self.budgets = sealed.open()
            self.llm = _client(*parts)
        except LLMError as error:
            self.problem = error

    def ready(self) -> LLMError | None:
        """What keeps it from calling."""
        return self.problem

    def call(
        self, request: Mapping[str, Any], seconds: float | None
    ) -> ChatCompletionResponse | LLMError:
        """An answer, or why there is none: Ray would wrap an error that is raised in one of its own."""
        try:
            with _held(self.budgets), self.llm.deadline(seconds):
                return cast(ChatCompletionResponse, self.llm.chat_completion(**request))
        except LLMError as error:
            return error


class _Crew:
    """The actors of a map; they end with it."""

    def __init__(
        self, llm: LLM, threads: int, actors: int | None, clock: Clock, ends_at: float | None
    ) -> None:
        self._ray = ray = _ray()
        _refuse_local(llm)
        sealed = _Sealed.of((_parts(llm, _shared_policies(llm)), _open_budgets(llm)))
        if not ray.is_initialized():
            ray.init()
        cpus = int(ray.cluster_resources().get("CPU", 1))
        count = min(threads, max(1, cpus)) if actors is None else actors
        caller = ray.remote(
            num_cpus=CPUS,
            max_concurrency=math.ceil(threads / count) + 1,  # `ready` has room beside them
            # A call whose actor dies is made again by the next.
            max_restarts=-1,
            max_task_retries=-1,
            scheduling_strategy="SPREAD",
        )(_Caller)
        self._actors = [caller.remote(sealed) for _ in range(count)]
        self._turn = itertools.count()
        self._pending: set[Any] = set()
        self._ledger = llm._ledger
        self._clock = clock
        self._ends_at = ends_at
        try:
            self._await_one()
        except BaseException:
            self.close()
            raise

    def ask(self, request: Mapping[str, Any]) -> ChatCompletionResponse:
        """The answer of one of the actors."""
        self._ledger.count()
        left = None if self._ends_at is None else max(1e-3, self._ends_at - self._clock.now())
        actor = self._actors[next(self._turn) % len(self._actors)]
        told = threading.Event()
        with woken(told.set):
            answering = actor.call.remote(request, left)
            self._pending.add(answering)
            try:
                coming = answering.future()
                coming.add_done_callback(lambda _: told.set())
                told.wait()
            finally:
                self._pending.discard(answering)
                if not told.is_set() or not coming.done():
                    self._drop(answering)
        if not coming.done():
            raise LLMCancelledError("the map was ended before the answer was there")
        try:
            answer = coming.result()
        except self._ray.exceptions.RayError as error:
            why = str(error).strip().partition("\n")[0]
            raise LLMConnectionError(f"a worker of the Ray cluster failed: {why}") from error
        if isinstance(answer, LLMError):
            raise answer
        found = cast(ChatCompletionResponse, answer)
        info = found.info
        self._ledger.totals.record(
            info.provider, info.model, found.usage, cost=info.cost, cached=info.cached
        )
        return found

    def close(self) -> None:
        """End the actors, and with them what is under way."""
        for answering in list(self._pending):
            self._drop(answering)
        for actor in self._actors:
            with suppress(Exception):  # the cluster may be gone
                self._ray.kill(actor)

    def _drop(self, answering: Any) -> None:
        """Nobody waits for it: else Ray prints that it failed and will be tried again."""
        with suppress(Exception):  # the cluster may be gone
            self._ray.cancel(answering)

    def _await_one(self) -> None:
        pending = [actor.ready.remote() for actor in self._actors]
        ready, _ = self._ray.wait(pending, timeout=_PATIENCE)
        if not ready:
            raise LLMConfigError(
                f"no worker could start within {_PATIENCE:g} s: the Ray cluster has no free CPU "
                f"({self._ray.available_resources().get('CPU', 0)} of "
                f"{self._ray.cluster_resources().get('CPU', 0)})"
            )
        problem = self._ray.get(ready[0])
        if problem is not None:
            raise problem


class _CrewMap(ThreadedMap):
    def __init__(self, crew: _Crew, *args: Any, **how: Any) -> None:
        super().__init__(*args, **how)
        self._crew = crew

    def close(self) -> None:
        super().close()
        self._crew.close()


# A client, sent.


class _Sealed:
    """Anything, with its keys and passwords; neither is seen when Ray shows or logs it."""

    __slots__ = ("_packed",)

    def __init__(self, packed: bytes) -> None:
        self._packed = packed

    @classmethod
    def of(cls, value: Any) -> _Sealed:
        """Pack a value.

        Raises:
            LLMConfigError: something in it cannot be sent.
        """
        from ray.cloudpickle import CloudPickler

        class Packer(CloudPickler):
            def reducer_override(self, part: Any) -> Any:
                if isinstance(part, LLMConfig):
                    return _config, _with_keys(part)
                if isinstance(part, RedisScript):
                    return RedisScript, (part.url, part.file, part.words)
                return super().reducer_override(part)  # type: ignore[no-untyped-call]  # Ray's own

        packed = io.BytesIO()
        packer: Any = Packer
        try:
            packer(packed).dump(value)
        except Exception as error:
            raise LLMConfigError(f"this cannot be sent to a Ray cluster: {error}") from error
        return cls(packed.getvalue())

    def open(self) -> Any:
        """The value again."""
        from ray import cloudpickle

        return cloudpickle.loads(self._packed)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Sealed, (self._packed,)

    def __repr__(self) -> str:
        return "<sealed>"


def _with_keys(config: LLMConfig) -> tuple[Any, ...]:
    """As a pickle of it, and with the keys that were given."""
    make, (cls, given, variables, lost) = config.__reduce__()
    keys = {} if variables else {name: getattr(config, name) for name in lost}
    return make, (cls, given, variables, () if keys else lost), keys


def _config(make: Any, arguments: tuple[Any, ...], keys: dict[str, Any]) -> LLMConfig:
    config: LLMConfig = make(*arguments)
    return config.replace(**keys) if keys else config


def _parts(llm: LLM, policies: Mapping[str, Any]) -> tuple[Any, ...]:
    return type(llm), llm.config, {**llm._given, **policies}


def _client(kind: type[LLM], config: LLMConfig, given: Mapping[str, Any]) -> LLM:
    config.require_keys()
    policies = {name: policy for name, policy in given.items() if policy is not None}
    return kind(config, **policies)


def _open_budgets(llm: LLM) -> tuple[Budget, ...]:
    """Those of the blocks that this is called in, beside the client's own."""
    return active_budgets() or llm._ledger.budgets


@contextmanager
def _held(budgets: Iterable[Budget]) -> Iterator[None]:
    """Hold the calls inside to budgets."""
    with ExitStack() as stack:
        for budget in budgets:
            stack.callback(leave, enter(budget))
        yield


def _refuse_local(llm: LLM) -> None:
    """What is a part of this process cannot be sent."""
    if llm._transport.given is not None:
        raise LLMConfigError(
            "a client with a session of its own cannot be sent to a Ray cluster: leave session= out"
        )
    if llm._given["hooks"] is not None:
        raise LLMConfigError(
            "a client with hooks cannot be sent to a Ray cluster, where nobody would see what they "
            "do: leave hooks= out"
        )


def _shared_policies(
    llm: LLM,
    redis_url: str | None = None,
    name: str = "default",
    budget: Budget | Decimal | float | str | None = None,
) -> dict[str, Any]:
    """The policies that hold for all workers together, in place of those that each would have."""
    config, given = llm.config, llm._given
    policies: dict[str, Any] = {}
    limits = config.requests_per_minute, config.tokens_per_minute
    if given["rate_limiter"] is None and limits != (None, None):
        if redis_url is None:
            raise LLMConfigError(
                "each worker would keep requests_per_minute and tokens_per_minute by itself: share the "
                "limit through Redis, with redis_url= or a rate_limiter=RateLimiter(…, redis_url=…)"
            )
        policies["rate_limiter"] = RateLimiter(*limits, redis_url=redis_url, name=name)
    if budget is None:
        budget = given["budget"] if given["budget"] is not None else config.budget
    if budget is not None and not isinstance(budget, Budget):
        if redis_url is None:
            raise LLMConfigError(
                "each worker would have the budget for itself: share it through Redis, with redis_url= "
                "or a budget=Budget(…, store='redis://…')"
            )
        # A name of its own: it is for this job, and begins at 0.
        budget = Budget(budget, store=redis_url, name=f"ray-{Clock().new_id()}")
    if budget is not None:
        policies["budget"] = budget
    return policies


# Rows.


def _column(name: str) -> Callable[[dict[str, Any]], Any]:
    """What takes the question out of a row."""

    def take(row: dict[str, Any]) -> Any:
        value = row[name]
        if isinstance(value, list):
            # Arrow gives each message all fields that any of them has.
            return [
                {field: part for field, part in message.items() if part is not None}
                if isinstance(message, dict)
                else message
                for message in value
            ]
        return value

    return take


def _check_columns(columns: Sequence[str], prompt: Any, output: str) -> None:
    if isinstance(prompt, str) and prompt not in columns:
        raise LLMConfigError(
            f"the dataset has no column {prompt!r}, but {', '.join(columns)}: name one with prompt="
        )
    taken = sorted(
        {output, *(f"{output}_{part}" for part in ("error", "usage", "cost", "json"))} & {*columns}
    )
    if taken:
        raise LLMConfigError(
            f"the dataset has a column {taken[0]!r} already: choose another output="
        )


def _with_columns(
    table: Any,
    output: str,
    results: Sequence[MapResult | None],
    problem: LLMError | None,
    *,
    full: bool,
) -> Any:
    import pyarrow as pa  # type: ignore[import-untyped]  # it ships no types

    errors = [
        problem if result is None else result.error for result in results
    ]  # what was not begun has the error that ended the others
    counts = pa.struct([(field, pa.int64()) for field in TokenUsage.model_fields])
    columns: dict[str, tuple[Any, list[Any]]] = {
        "": (pa.string(), [r.text if r and r.success else None for r in results]),
        "_error": (pa.string(), [e and f"{type(e).__name__}: {e}" for e in errors]),
        "_usage": (counts, [r.usage.model_dump() if r and r.usage else None for r in results]),
        "_cost": (pa.decimal128(38, 18), [_exact(r.cost) if r else None for r in results]),
    }
    if full:
        columns["_json"] = (
            pa.string(),
            [r.response.model_dump_json() if r and r.response else None for r in results],
        )
    for name, (kind, values) in columns.items():
        table = table.append_column(f"{output}{name}", pa.array(values, kind))
    return table


def _exact(cost: Decimal | None) -> Decimal | None:
    return None if cost is None else EXACT.quantize(cost, _CENTS)


def _folder(path: str | os.PathLike[str]) -> str:
    folder = Path(path).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LLMConfigError(
            f"journal={str(path)!r} cannot be a directory: {error.strerror or error}"
        ) from error
    return str(folder)


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise LLMConfigError(f"{name} is {value!r:.40}; it must be a whole number above 0")
    problem = ""
    try:
        checked_positive(value)
    except ValueError as error:
        problem = str(error)
    if problem:
        raise LLMConfigError(f"{name} {problem}")


def _ray(part: str = "") -> Any:
    """Ray, or a part of it."""
    from importlib import import_module

    try:
        return import_module(f"ray.{part}" if part else "ray")
    except ImportError as error:
        raise LLMConfigError(
            "a Ray cluster needs the extra ray: pip install 'requests-llm[ray]'"
        ) from error
