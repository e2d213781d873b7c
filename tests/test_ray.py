"""Calls on a real, local Ray cluster: bounded together, and nothing is lost when a worker is killed."""

import json
import os
import pickle
import signal
import sys
import threading
import time
from collections import Counter
from decimal import Decimal
from pathlib import Path

import pytest

from LLM import LLM, Budget, LLMConfig, LLMConfigError, LLMTimeoutError, Price, RateLimiter
from LLM.journal import JournalError
from LLM.policies.budget import active_budgets
from LLM.ray import _Caller, _open_budgets, _parts, _Rows, _Sealed, _shared_policies, map_dataset
from LLM.testing import LocalServer
from tests.redises import start, stop, until

pytest.importorskip("ray.data")
pa = pytest.importorskip("pyarrow")

pytestmark = [
    pytest.mark.xdist_group("ray"),  # one cluster, with `--dist loadgroup`
    # A cluster takes 5 s to start, on a machine that has nothing else to do.
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning:ray"),  # its own affairs
]

SECRET = "sk-only-for-workers"
PRICE = Price(1, 2)


@pytest.fixture(scope="module")
def ray(tmp_path_factory):
    """A cluster of two CPUs, on loopback."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "disabled",
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
            "RAY_DEDUP_LOGS": "0",
        }.items():
            patch.setenv(name, value)
        import ray as module
        import ray.data

        module.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=100 * 1024 * 1024,
            _node_ip_address="127.0.0.1",
            log_to_driver=False,
            logging_level="error",
        )
        try:
            module.cloudpickle.register_pickle_by_value(sys.modules[__name__])
            ray.data.DataContext.get_current().enable_progress_bars = False
            yield module
        finally:
            module.shutdown()


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory):
    process, address = start(tmp_path_factory.mktemp("r"))
    yield f"{address}?socket_timeout=30"
    stop(process)


def config(server, **more):
    return LLMConfig(base_url=server.url, model="m", max_tokens=20, retry_delay=0.01, **more)


def questions(ray, count, **more):
    rows = [{"id": n, "prompt": f"question {n}", **more} for n in range(count)]
    return ray.data.from_items(rows, override_num_blocks=2)


def asked(server):
    return Counter(r.json["messages"][-1]["content"] for r in server.requests)


def rows_of(dataset):
    return sorted(dataset.take_all(), key=lambda row: row["id"])


class TestDataset:
    def test_each_row_gets_its_answer_and_the_key_reaches_the_workers_and_no_log(
        self, ray, redis_url, request
    ):
        with LocalServer(
            lambda r: "to " + r.json["messages"][-1]["content"], api_key=SECRET
        ) as server:
            client = LLM(config(server, api_key=SECRET), price=PRICE)
            with client.budget(requests=50, store=redis_url, name=request.node.name) as budget:
                data = map_dataset(
                    questions(ray, 40), client, concurrency=1, batch_size=8, full=True
                )
            rows = rows_of(data)  # the block's budget holds, whenever that is
            assert budget.spent_requests == 40
            assert SECRET not in repr(data) + repr(data.stats())
            assert len(server.requests) == 40
        assert [row["response"] for row in rows] == [f"to question {n}" for n in range(40)]
        assert {row["response_error"] for row in rows} == {None}
        usage = rows[0]["response_usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] > 0
        taken = usage["prompt_tokens"] + 2 * usage["completion_tokens"]
        assert rows[0]["response_cost"] == Decimal(taken) / 10**6
        assert json.loads(rows[0]["response_json"])["choices"][0]["finish_reason"] == "stop"
        session = Path(ray._private.worker._global_node.get_session_dir_path())
        logs = [path for path in session.rglob("*") if path.is_file()]
        assert logs
        assert [path for path in logs if SECRET.encode() in path.read_bytes()] == []

    def test_one_limit_and_one_budget_hold_for_all_actors(self, ray, server, redis_url, request):
        name = request.node.name
        budget = Budget("0.001", store=redis_url, name=name)
        limited = config(server, requests_per_minute=500, tokens_per_minute=10**6)
        client = LLM(limited, price=PRICE, budget=budget)
        data = map_dataset(
            questions(ray, 100),
            client,
            redis_url=redis_url,
            name=name,
            concurrency=2,
            batch_size=10,
        )
        begun = time.monotonic()
        rows = rows_of(data)
        cost = sum(row["response_cost"] or 0 for row in rows)
        assert budget.spent_usd == cost <= Decimal("0.001")
        assert budget.reserved_usd == 0
        limiter = RateLimiter(500, 10**6, redis_url=redis_url, name=name)
        answered = [row for row in rows if row["response"] is not None]
        assert len(server.requests) == len(answered) < 100
        taken = limiter.get_current_usage().requests
        if time.monotonic() - begun < 60:  # all within the limiter's minute
            assert taken == len(answered)


class TestKilled:
    def kill_one(self, folder, server, after):
        """End a worker, as the kernel would when memory is short, when so many requests were made."""

        killed = threading.Event()

        def work():
            until(lambda: len(server.requests) >= after, 400)
            os.kill(int(next(folder.iterdir()).name), signal.SIGKILL)
            killed.set()

        def answer(_):
            if len(server.requests) >= after:
                killed.wait(400)

        server.reply(answer)
        killer = threading.Thread(target=work)
        killer.start()
        return killer

    def test_nothing_is_lost_and_only_what_was_under_way_is_paid_twice(self, ray, server, tmp_path):
        workers = tmp_path / "workers"
        workers.mkdir()

        def ask(row):
            (workers / str(os.getpid())).touch()
            return row["prompt"]

        dataset = map_dataset(
            questions(ray, 300), config(server), prompt=ask, concurrency=2, per_actor=4, batch_size=75,
            journal=tmp_path / "journal",
        )  # fmt: skip
        killer = self.kill_one(workers, server, 60)
        rows = rows_of(dataset)
        killer.join()
        assert len(list(workers.iterdir())) >= 2  # another went on
        assert [row["id"] for row in rows] == list(range(300))
        assert {row["response_error"] for row in rows} == {None}
        counts = asked(server)
        assert len(counts) == 300
        assert sum(counts.values()) - 300 <= 4  # one for each thread of the killed worker

        # The same rows again, as after a crash of everything: nothing is sent.
        sealed = _Sealed.of(
            (_parts(LLM(config(server)), {}), (), how(journal=str(tmp_path / "journal")))
        )
        assert len(list((tmp_path / "journal").iterdir())) == 4
        again = _Rows(sealed)
        again.prompt, again.output = ask, "response"
        table = pa.Table.from_pylist([{"id": n, "prompt": f"question {n}"} for n in range(75)])
        assert again(table)["response"].to_pylist() == [row["response"] for row in rows[:75]]
        assert sum(asked(server).values()) == sum(counts.values())

    def test_a_map_goes_on_too(self, ray, server):
        server.latency = 0.02
        with LLM(config(server)) as llm, llm.map(
            (f"q{n}" for n in range(200)), engine="ray", concurrency=8
        ) as results:  # fmt: skip
            found = [next(results) for _ in range(30)]
            actors = results._results._crew._actors
            pid = ray.get(actors[0].__ray_call__.remote(lambda _: os.getpid()))
            os.kill(pid, signal.SIGKILL)
            found += results
            assert [result.key for result in found] == [str(n) for n in range(200)]
            assert all(result.success for result in found)
            assert len(asked(server)) == 200
            assert sum(asked(server).values()) <= 208
            assert llm.usage.calls == 200


class TestMap:
    def test_it_is_the_same_map_elsewhere(self, ray, server, tmp_path, redis_url, request):
        store = {"store": redis_url, "name": request.node.name}
        with LLM(config(server), price=PRICE, max_retries=0) as llm:
            journal = tmp_path / "run.jsonl"
            with llm.budget("1.00", **store) as budget:
                with llm.map(
                    ["a", "b", {"prompt": "c", "max_tokens": 3}], engine="ray", journal=journal
                ) as run:
                    first = list(run)
            assert [result.index for result in first] == [0, 1, 2]
            assert llm.usage.cost == sum(result.cost for result in first) == budget.spent_usd > 0
            with llm.map(["a", "b", {"prompt": "c", "max_tokens": 3}, "d"], journal=journal) as run:
                assert [result.resumed for result in run] == [True, True, True, False]
        assert len(server.requests) == 4

    def test_leaving_it_ends_what_is_under_way(self, ray, server):
        server.latency = 100
        with LLM(config(server)) as llm:
            with llm.map(
                (str(n) for n in range(100)), engine="ray", concurrency=4, deadline=150
            ) as run:
                thread = threading.Thread(target=lambda: [None for _ in run])
                thread.start()
                until(lambda: len(server.requests) >= 4, 60)
                actors = run._results._crew._actors
                pids = ray.get(
                    [actor.__ray_call__.remote(lambda _: os.getpid()) for actor in actors]
                )
                run.close()
            thread.join(30)
            assert not thread.is_alive()
        until(lambda: not any(Path(f"/proc/{pid}/cmdline").exists() for pid in pids))


# Without a cluster.


def opened(value):
    return pickle.loads(pickle.dumps(_Sealed.of(value))).open()


def test_a_given_key_travels_and_one_of_the_environment_does_not(monkeypatch):
    given = _Sealed.of(LLMConfig(base_url="http://h", api_key=SECRET))
    assert given.open().api_key.get_secret_value() == SECRET
    assert repr(given) == "<sealed>"
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-openai")
    from_env = LLMConfig.from_env()
    sealed = _Sealed.of(from_env)
    assert b"sk-of-openai" not in sealed._packed
    assert sealed.open().api_key == from_env.api_key


def test_a_redis_with_a_password_travels_sealed():
    url = f"redis://:{SECRET}@host/0"
    budget = opened(Budget(1, store=url))
    assert budget.store._script.url == url
    assert opened(RateLimiter(5, redis_url=url))._shared._script.url == url


class Session:
    def get_adapter(self):
        pass


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"hooks": [print]}, "a client with hooks cannot be sent"),
        ({"session": Session()}, "a session of its own cannot be sent"),
        ({"budget": 5}, "each worker would have the budget for itself"),
        ({"requests_per_minute": 5}, "each worker would keep requests_per_minute"),
        ({"budget": Budget(5)}, "cannot be sent to a Ray cluster: budget 'default' is in memory"),
        ({"rate_limiter": RateLimiter(5)}, "is in memory.*redis_url"),
    ],
)
def test_a_client_that_cannot_be_sent_says_why(ray, settings, told):
    client = LLM(base_url="http://127.0.0.1:9", **settings)
    for use in (
        lambda: map_dataset(questions(ray, 1), client),
        lambda: client.map(["x"], engine="ray"),
    ):
        with pytest.raises(LLMConfigError, match=told):
            use()


@pytest.mark.parametrize(
    "wrong, told",
    [
        ({"prompt": "question"}, "no column 'question', but id, prompt"),
        ({"output": "prompt"}, "has a column 'prompt' already"),
        ({"prompt": 5}, "prompt is int"),
        ({"concurrency": 0}, "concurrency is 0"),
        ({"per_actor": "8"}, "per_actor is '8'"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"stream": True}, "takes no stream="),
        ({"journal": __file__}, "cannot be a directory"),
        ({"budget": 1}, "redis_url="),
    ],
)
def test_what_makes_no_sense_is_said_before_anything_starts(ray, wrong, told):
    with pytest.raises(LLMConfigError, match=told):
        map_dataset(questions(ray, 1), LLMConfig(), **wrong)


def test_what_is_no_dataset_is_refused():
    with pytest.raises(LLMConfigError, match="dataset is list"):
        map_dataset([], LLMConfig())


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray.data", None)
    monkeypatch.setitem(sys.modules, "ray", None)
    for use in (lambda: map_dataset(None, LLMConfig()), lambda: LLM().map(["x"], engine="ray")):
        with pytest.raises(LLMConfigError, match=r"pip install 'requests-llm\[ray\]'"):
            use()


def how(**more):
    basic = {"prompt": "q", "output": "a", "threads": 2, "journal": None, "full": False, "call": {}}
    return {**basic, **more}


def test_a_function_may_ask_and_say_how(server):
    def ask(row):
        return {"prompt": row["q"] * 2, "max_tokens": 5}

    client = LLM(config(server))
    sealed = _Sealed.of((_parts(client, {}), (), how(prompt=ask, call={"temperature": 0.3})))
    assert _Rows(sealed)(pa.table({"q": ["a", "b"]}))["a_error"].to_pylist() == [None, None]
    bodies = sorted((r.json for r in server.requests), key=lambda b: b["messages"][0]["content"])
    assert [b["messages"][0]["content"] for b in bodies] == ["aa", "bb"]
    assert {(b["max_tokens"], b["temperature"]) for b in bodies} == {(5, 0.3)}


def test_equal_batches_at_one_time_have_a_journal_each(server, tmp_path):
    client = LLM(config(server))
    sealed = _Sealed.of((_parts(client, _shared_policies(client)), (), how(journal=str(tmp_path))))
    table = pa.table({"q": ["x", "y"]})
    one, two = _Rows(sealed), _Rows(sealed)
    server.reply(lambda r: two(table) and "other" if len(server.requests) == 1 else "same")
    assert one(table).num_rows == 2
    assert len(list(tmp_path.iterdir())) == 2
    assert len(server.requests) == 4
    assert two(table)["a"].to_pylist() == one(table)["a"].to_pylist()
    assert len(server.requests) == 4


def test_a_journal_that_cannot_be_written_ends_the_job(server, tmp_path):
    client = LLM(config(server))
    folder = tmp_path / "gone"
    sealed = _Sealed.of((_parts(client, {}), (), how(journal=str(folder))))
    with pytest.raises(JournalError, match="cannot be written"):
        _Rows(sealed)(pa.table({"q": ["x"]}))


def test_a_worker_without_its_key_says_so(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-here")
    sealed = _Sealed.of((_parts(LLM(LLMConfig.from_env()), {}), ()))
    monkeypatch.delenv("OPENAI_API_KEY")
    problem = _Caller(sealed).ready()
    assert isinstance(problem, LLMConfigError)
    assert "api_key did not come along" in str(problem)


def test_a_caller_keeps_to_the_budgets_of_the_block(server, tmp_path):
    budget = Budget("0.000035", store=f"sqlite:///{tmp_path}/spend.db")
    caller = _Caller(_Sealed.of((_parts(LLM(config(server), price=PRICE), {}), (budget,))))
    request = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    assert caller.ready() is None
    assert caller.call(request, 10).text
    error = caller.call(request, None)
    assert type(error).__name__ == "LLMBudgetError"
    assert active_budgets() == ()
    assert budget.spent_requests == 1


def test_rows_keep_to_the_budgets_of_the_block_that_the_dataset_is_made_in(server, tmp_path):
    client = LLM(config(server), price=PRICE)
    table = pa.table({"q": ["x", "y"]})
    with client.budget(requests=1, store=f"sqlite:///{tmp_path}/spend.db") as budget:
        sealed = _Sealed.of((_parts(client, {}), _open_budgets(client), how()))
    rows = _Rows(pickle.loads(pickle.dumps(sealed)))(table)
    assert sum(text is not None for text in rows["a"].to_pylist()) == 1
    assert "LLMBudgetError" in "".join(filter(None, rows["a_error"].to_pylist()))
    assert budget.spent_requests == len(server.requests) == 1
    assert active_budgets() == ()


def test_a_dataset_in_a_block_that_cannot_hold_for_it_is_refused(ray, server):
    client = LLM(config(server), price=PRICE)
    with client.deadline(60), pytest.raises(LLMConfigError, match="make it outside"):
        map_dataset(questions(ray, 1), client)
    with client.budget(requests=1), pytest.raises(LLMConfigError, match="is in memory"):
        map_dataset(questions(ray, 1), client)


def test_an_error_comes_back_as_what_it_was(server):
    caller = _Caller(_Sealed.of((_parts(LLM(config(server, max_retries=0)), {}), ())))
    request = {"messages": [{"role": "user", "content": "x"}]}
    server.reply(status=429, headers={"retry-after": "9"})
    error = pickle.loads(pickle.dumps(caller.call(request, None)))
    assert (type(error).__name__, error.suggested_wait) == ("LLMRateLimitError", 9)
    server.latency = 5
    error = caller.call(request, 0.1)
    assert isinstance(error, LLMTimeoutError)
    assert error.clock == "deadline"


def test_a_failed_row_is_a_row_with_its_error(server):
    server.reply(lambda r: {"status": 400} if "3" in r.json["messages"][-1]["content"] else "fine")
    rows = _Rows(_Sealed.of((_parts(LLM(config(server)), {}), (), how())))
    found = rows(pa.table({"q": [f"q{n}" for n in range(10)]})).to_pylist()
    assert [n for n, row in enumerate(found) if row["a"] is None] == [3]
    assert found[3]["a_error"].startswith("LLMInvalidRequestError: ")
    assert found[3]["a_usage"] is found[3]["a_cost"] is None
    assert found[2]["a_cost"] is None  # it has no price


def test_messages_may_come_from_a_column(server):
    talks = [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}],
        [{"role": "user", "content": "b", "name": "Bo"}],
    ]
    rows = _Rows(_Sealed.of((_parts(LLM(config(server)), {}), (), how())))
    found = rows(pa.Table.from_pylist([{"q": talk} for talk in talks]))
    assert found["a_error"].to_pylist() == [None, None]
    assert sorted((r.json["messages"] for r in server.requests), key=len, reverse=True) == talks


def test_what_ends_all_calls_is_the_error_of_the_rest(server, tmp_path):
    budget = Budget("0.0005", store=f"sqlite:///{tmp_path}/spend.db")
    client = LLM(config(server), price=PRICE, budget=budget)
    rows = _Rows(_Sealed.of((_parts(client, _shared_policies(client)), (), how())))
    found = rows(pa.table({"q": [f"q{n}" for n in range(40)]})).to_pylist()
    answered = [row for row in found if row["a"] is not None]
    assert 0 < len(answered) == len(server.requests) < 40
    assert all(row["a_error"].startswith("LLMBudgetError: ") for row in found if not row["a"])
    assert sum(row["a_cost"] for row in answered) == budget.spent_usd <= Decimal("0.0005")
