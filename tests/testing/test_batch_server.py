"""The local server's batch APIs, as the official clients and a plain socket see them."""

import json

import pytest
import requests

from LLM.testing import LocalServer

anthropic = pytest.importorskip("anthropic")
openai = pytest.importorskip("openai")

LINE = {"method": "POST", "url": "/v1/chat/completions"}


def body(text="What is 1 + 1?", **more):
    return {"model": "gpt-4", "messages": [{"role": "user", "content": text}], **more}


def lines(*items):
    return b"\n".join(json.dumps(item).encode() for item in items)


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0) as made:
        yield made


def submit(client, data, **how):
    file = client.files.create(file=("in.jsonl", data), purpose="batch")
    fields = {"endpoint": "/v1/chat/completions", "completion_window": "24h", **how}
    return client.batches.create(input_file_id=file.id, **fields)


def test_the_official_client_of_openai_runs_a_batch(server, client):
    server.batches.polls = 1
    data = lines(
        {"custom_id": "a", **LINE, "body": body()},
        {"custom_id": "b", **LINE, "body": {"model": "gpt-4"}},
    )
    batch = submit(client, data, metadata={"k": "v"})
    assert (batch.status, batch.metadata) == ("in_progress", {"k": "v"})
    assert client.files.retrieve(batch.input_file_id).bytes == len(data)
    assert client.batches.retrieve(batch.id).status == "in_progress"
    over = client.batches.retrieve(batch.id)
    assert over.status == "completed"
    assert over.request_counts.model_dump() == {"completed": 1, "failed": 1, "total": 2}
    (good,) = client.files.content(over.output_file_id).text.splitlines()
    said = json.loads(good)
    assert said["custom_id"] == "a"
    assert said["response"]["body"]["choices"][0]["message"]["content"] == "1 + 1 = 2."
    (bad,) = client.files.content(over.error_file_id).text.splitlines()
    assert json.loads(bad)["response"]["status_code"] == 400
    assert [known.id for known in client.batches.list()] == [batch.id]


def test_the_official_client_of_anthropic_runs_a_batch(server):
    server.batches.polls = 1
    params = {"model": "claude", "max_tokens": 50, "messages": body()["messages"]}
    with anthropic.Anthropic(base_url=server.url, api_key="k", max_retries=0) as client:
        batches = client.messages.batches
        batch = batches.create(requests=[{"custom_id": "a", "params": params}])
        assert batch.processing_status == "in_progress"
        assert batches.retrieve(batch.id).request_counts.processing == 1
        over = batches.retrieve(batch.id)
        assert (over.processing_status, over.request_counts.succeeded) == ("ended", 1)
        assert over.ended_at > over.created_at
        assert [known.id for known in batches.list()] == [batch.id]
        # Its own client follows `results_url`, which names the vendor's host: so it is asked plainly.
        url = f"{server.url}/v1/messages/batches/{batch.id}/results"
        answer = requests.get(url, headers={"anthropic-version": "2023-06-01"}, timeout=30)
        result = json.loads(answer.text)
        assert result["custom_id"] == "a"
        assert result["result"]["message"]["content"][0]["text"] == "1 + 1 = 2."


def test_it_is_cancelled(server, client):
    server.batches.polls, server.batches.answered = 9, 1
    items = [{"custom_id": key, **LINE, "body": body()} for key in "abc"]
    batch = submit(client, lines(*items))
    assert client.batches.cancel(batch.id).status == "cancelling"
    over = client.batches.retrieve(batch.id)
    assert (over.status, over.request_counts.completed) == ("cancelled", 1)
    not_run = [json.loads(line) for line in client.files.content(over.error_file_id).iter_lines()]
    assert {line["custom_id"]: line["error"]["code"] for line in not_run} == {
        "b": "batch_cancelled",
        "c": "batch_cancelled",
    }
    with pytest.raises(openai.ConflictError):
        client.batches.cancel(batch.id)


@pytest.mark.parametrize(
    "data, code",
    [
        (b"", "empty_file"),
        (b"no json", "invalid_json_line"),
        (lines({"custom_id": "a"}), "invalid_json_line"),
        (lines(*[{"custom_id": "a", **LINE, "body": body()}] * 2), "duplicate_custom_id"),
        (lines({"custom_id": "a", "url": "/v1/x", "body": {}}), "mismatched_url"),
        (
            lines(*({"custom_id": m, **LINE, "body": body() | {"model": m}} for m in "ab")),
            "mismatched_model",
        ),
    ],
)
def test_a_file_that_is_wrong_fails_as_a_whole(server, client, data, code):
    batch = client.batches.retrieve(submit(client, data).id)
    assert batch.status == "failed"
    assert batch.errors.data[0].code == code


def test_scripted_replies_answer_the_requests_of_a_batch(server, client):
    server.reply("scripted")
    batch = submit(client, lines({"custom_id": "a", **LINE, "body": body()}))
    over = client.batches.retrieve(batch.id)
    assert "scripted" in client.files.content(over.output_file_id).text


@pytest.mark.parametrize(
    "request_, status",
    [
        ({"custom_id": "a b", "params": {}}, 400),
        ({"custom_id": "a" * 65, "params": {}}, 400),
        ({"custom_id": "a"}, 400),
        ("a", 400),
        (None, 400),
    ],
)
def test_what_anthropic_refuses_is_refused(server, request_, status):
    answer = requests.post(
        f"{server.url}/v1/messages/batches",
        json={"requests": [request_] if request_ else []},
        headers={"anthropic-version": "2023-06-01"},
        timeout=30,
    )
    assert answer.status_code == status
    assert answer.json()["type"] == "error"


def test_what_is_not_there_is_not_found_and_other_methods_are_not_allowed(server):
    ask = requests.request
    assert ask("GET", f"{server.url}/v1/batches/x", timeout=30).status_code == 404
    assert ask("GET", f"{server.url}/v1/files/x/content", timeout=30).status_code == 404
    assert ask("POST", f"{server.url}/v1/batches/x/results", timeout=30).status_code == 404
    refused = ask("DELETE", f"{server.url}/v1/batches", timeout=30)
    assert (refused.status_code, refused.headers["allow"]) == (405, "POST, GET")
    assert ask("POST", f"{server.url}/v1/files", data=b"x", timeout=30).status_code == 415


def test_a_batch_of_the_one_api_is_not_one_of_the_other(server, client):
    batch = submit(client, lines({"custom_id": "a", **LINE, "body": body()}))
    answer = requests.get(
        f"{server.url}/v1/messages/batches/{batch.id}",
        headers={"anthropic-version": "2023-06-01"},
        timeout=30,
    )
    assert answer.status_code == 404


def test_batches_need_the_key_where_there_is_one():
    with LocalServer(api_key="right") as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError):
                client.batches.retrieve("b")


def test_a_batch_takes_its_time(server, client):
    server.batches.delay = 1000.0
    batch = submit(client, lines({"custom_id": "a", **LINE, "body": body()}))
    assert client.batches.retrieve(batch.id).status == "in_progress"
