"""Clients, configs and errors on their way to other threads, processes and places."""

import copy
import multiprocessing
import pickle

import pytest
import requests

from LLM import LLM, LLMConfig, LLMConfigError, LLMError, LLMTimeoutError
from tests.fakes import FakeClock

HELLO = [{"role": "user", "content": "say hello"}]
KEY = "sk-very-secret-0123456789"


def ask(llm):
    return llm.chat_completion(HELLO).text


def test_a_pickled_client_works_in_another_process(server):
    context = multiprocessing.get_context("spawn")
    with LLM(LLMConfig(base_url=server.url)) as llm:
        assert ask(llm) == "hello"
        with context.Pool(1) as pool:
            assert pool.apply(ask, (llm,)) == "hello"
    assert server.connections == 2


def test_a_pickle_holds_no_key_and_says_so(server):
    config = LLMConfig(base_url=server.url, api_key=KEY, api_keys={"anthropic": KEY})
    dumped = pickle.dumps(LLM(config))
    assert KEY.encode() not in dumped
    with pytest.raises(LLMConfigError, match="api_key and api_keys did not come along"):
        pickle.loads(dumped)
    again = pickle.loads(pickle.dumps(config))
    assert again.base_url == config.base_url
    with LLM(again.replace(api_key=KEY, api_keys={})) as llm:
        ask(llm)
    assert server.requests[0].headers["authorization"] == f"Bearer {KEY}"


def test_a_pickled_config_takes_its_key_from_where_it_came(server, monkeypatch):
    monkeypatch.setenv("LLM_BASE_URL", server.url)
    monkeypatch.setenv("LLM_API_KEY", KEY)
    dumped = pickle.dumps(LLMConfig.from_env())
    assert KEY.encode() not in dumped
    monkeypatch.setenv("LLM_API_KEY", "sk-rotated-987654")
    assert pickle.loads(dumped).api_key.get_secret_value() == "sk-rotated-987654"
    monkeypatch.delenv("LLM_API_KEY")
    with pytest.raises(LLMConfigError, match="never pickled"):
        LLM(pickle.loads(dumped))


def test_a_client_with_a_session_of_its_own_says_why_it_cannot_be_pickled(server):
    with requests.Session() as session, pytest.raises(TypeError, match="session of its own"):
        pickle.dumps(LLM(base_url=server.url, session=session))


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy])
def test_a_copied_client_shares_the_pool(server, way):
    with LLM(base_url=server.url, api_key=KEY) as llm:
        ask(llm)
        assert ask(way(llm)) == "hello"
    assert server.connections == 1
    assert server.requests[1].headers["authorization"] == f"Bearer {KEY}"


def test_a_copied_config_keeps_its_key():
    config = LLMConfig(api_key=KEY)
    for copied in (copy.copy(config), copy.deepcopy(config), config.replace(model="other")):
        assert copied.api_key.get_secret_value() == KEY


def test_an_error_out_of_a_call_survives_a_pickle(server):
    server.reply(lambda _: {"status": 503})
    with LLM(base_url=server.url, api_key=KEY, clock=FakeClock()) as llm:
        with pytest.raises(LLMError) as caught:
            llm.chat_completion(HELLO)
    dumped = pickle.dumps(caught.value)
    again = pickle.loads(dumped)
    assert KEY.encode() not in dumped
    assert (type(again), str(again), again.history) == (
        type(caught.value),
        str(caught.value),
        caught.value.history,
    )


def test_a_deadline_over_a_block_bounds_every_client_in_it(server):
    clock = FakeClock()
    server.reply(lambda _: {"status": 503})
    with LLM(base_url=server.url, clock=clock, retry_jitter=0, max_retries=9) as llm:
        with llm.deadline(5), pytest.raises(LLMError):
            llm.chat_completion(HELLO)
        assert clock.slept == [1, 2]
        with (
            llm.deadline(100),
            llm.deadline(0.5),
            llm.deadline(50),
            pytest.raises(LLMError) as caught,
        ):
            llm.chat_completion(HELLO)
        assert caught.value.attempts == 1
        with llm.deadline(1):
            clock.sleep(2)
            with pytest.raises(LLMTimeoutError, match="before anything was sent") as late:
                llm.chat_completion(HELLO)
        assert late.value.clock == "deadline"
        before = len(server.requests)
        with pytest.raises(LLMError):  # and outside it is over
            llm.chat_completion(HELLO)
        assert len(server.requests) - before == 10
        with pytest.raises(LLMConfigError), llm.deadline(0):
            pass


def test_in_an_outage_calls_stop_retrying(server):
    """500 tokens pay for 35 retries at 14; then a call fails after its first attempt."""
    server.reply(lambda _: {"status": 503})
    attempts = []
    with LLM(base_url=server.url, clock=FakeClock()) as llm:
        for _ in range(15):
            with pytest.raises(LLMError) as caught:
                llm.chat_completion(HELLO)
            attempts.append(caught.value.attempts)
    assert attempts == [4] * 11 + [3, 1, 1, 1]


def test_success_pays_the_quota_back(server):
    down = {"status": 503}
    server.reply(lambda received: down if b"fail" in received.body else "fine")
    with LLM(base_url=server.url, clock=FakeClock()) as llm:
        for _ in range(12):
            with pytest.raises(LLMError):
                llm.chat_completion([{"role": "user", "content": "fail"}])
        for _ in range(14):
            llm.chat_completion(HELLO)
        with pytest.raises(LLMError) as caught:
            llm.chat_completion([{"role": "user", "content": "fail"}])
    assert caught.value.attempts == 2
