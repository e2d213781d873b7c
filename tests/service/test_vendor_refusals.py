"""What the guard refuses, and paths that there are not, in the form of the client that asks."""

import pytest

CHAT = "/v1/chat/completions"
MESSAGES = "/v1/messages"

REFUSED = [
    ("POST", {"data": b"x" * 2000}, 413),
    ("POST", {"headers": {"origin": "https://evil.example"}}, 403),
    ("POST", {"headers": {"host": "evil.example"}}, 421),
    ("DELETE", {}, 405),
]


@pytest.mark.parametrize("method, how, status", REFUSED)
@pytest.mark.parametrize("path", [CHAT, f"{MESSAGES}/count_tokens", MESSAGES])
def test_a_refusal_has_the_form_of_the_vendor(tight, path, method, how, status):
    answer = tight.ask(method, path, **how)
    assert answer.status_code == status
    said = answer.json()
    assert set(said["error"]) >= {"message", "type"}
    assert said.get("type") == (None if path == CHAT else "error")
    name = "request-id" if path != CHAT else "x-request-id"
    assert answer.headers[name] == answer.headers["x-request-id"]
    assert answer.headers["content-security-policy"]


def test_a_path_that_there_is_not_is_told_in_the_form_of_the_vendor(tight):
    answer = tight.ask("POST", "/v1/embeddings", json={})
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "invalid_request_error"
    answer = tight.ask("POST", "/v1/files", json={}, headers={"anthropic-version": "2023-06-01"})
    assert answer.json()["error"]["type"] == "not_found_error"


def test_elsewhere_it_is_a_problem(tight):
    answer = tight.ask("POST", "/conversations", data=b"x" * 2000)
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["title"] == "Too large"


@pytest.fixture
def tight(serve):
    return serve(max_body_bytes=1000)
