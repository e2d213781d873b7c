"""No one in who does not belong: each promise, and an attempt to break it."""

import itertools
import logging
import socket
import threading

import pytest
import requests

from agents.service import middleware
from tests.fakes import http, raw_server, stream_head
from tests.service.conftest import events, until


@pytest.fixture
def guarded(serve):
    """A service with two keys, Ada's and Bob's."""
    chat = serve()
    chat.ada = chat.service.keys.create("ada")[1]
    chat.bob = chat.service.keys.create("bob")[1]
    return chat


OWN = [
    ("GET", ""),
    ("PATCH", ""),
    ("DELETE", ""),
    ("POST", "/messages"),
    ("POST", "/regenerate"),
    ("POST", "/branch"),
    ("POST", "/cancel"),
    ("GET", "/export"),
]
BODIES = {"/messages": {"content": "Hi"}, "/branch": {"at": 0}, "": {"title": "Mine"}}
ALL = [
    ("GET", "/conversations"),
    ("POST", "/conversations"),
    ("GET", "/usage"),
    ("GET", "/models"),
    ("GET", "/session"),
    ("GET", "/v1/models"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/messages"),
    *((method, "/conversations/x" + path) for method, path in OWN),
]


class TestKeys:
    @pytest.mark.parametrize("key", [None, "llm-0-wrong", "", "x" * 5000, "' OR 1=1 --"])
    def test_without_a_known_key_nothing_is_told(self, guarded, key):
        for method, path in ALL:
            got = guarded.ask(method, path, key=key, json={"content": "Hi", "messages": []})
            assert got.status_code == 401, (path, got.text)
            assert got.headers["www-authenticate"] == "Bearer"
            told = got.json()
            words = str(told.get("detail") or told["error"]["message"])
            assert "ada" not in words
            assert guarded.ada not in got.text

    def test_a_key_works_as_a_bearer_or_as_anthropics_clients_send_it(self, guarded):
        assert guarded.ask("GET", "/session", key=guarded.ada).json()["owner"] == "ada"
        shown = {"x-api-key": guarded.ada}
        assert guarded.ask("GET", "/session", headers=shown).json()["owner"] == "ada"

    def test_nobody_reaches_the_conversation_of_another_nor_learns_that_it_is_there(self, guarded):
        name = guarded.new(key=guarded.ada, title="Secret of Ada")
        guarded.say(name, "the ostrich", key=guarded.ada)
        before = guarded.ask("GET", f"/conversations/{name}", key=guarded.ada).json()
        for method, path in OWN:
            body = {"json": BODIES[path]} if method != "GET" and path in BODIES else {}
            got = guarded.ask(method, f"/conversations/{name}{path}", key=guarded.bob, **body)
            none = guarded.ask(method, f"/conversations/nothing{path}", key=guarded.bob, **body)
            assert got.status_code == none.status_code == 404, (method, path)
            assert got.json()["detail"] == none.json()["detail"]
        assert guarded.ask("GET", f"/conversations/{name}", key=guarded.ada).json() == before

    def test_lists_searches_and_usage_show_ones_own_alone(self, guarded):
        name = guarded.new(key=guarded.ada, title="Secret of Ada")
        guarded.say(name, "the ostrich", key=guarded.ada)
        for query in ({}, {"q": "secret"}, {"q": "ostrich"}, {"q": "%"}, {"q": "_"}):
            got = guarded.ask("GET", "/conversations", key=guarded.bob, params=query)
            assert got.json() == {"data": [], "next": None}
        assert guarded.ask("GET", "/usage", key=guarded.bob).json()["total"]["calls"] == 0
        assert guarded.ask("GET", "/usage", key=guarded.ada).json()["total"]["calls"] == 1

    def test_the_same_idempotency_key_of_another_is_another_conversation(self, guarded):
        headers = {"idempotency-key": "same"}
        made = {
            guarded.ask("POST", "/conversations", key=key, headers=headers, json={}).json()["id"]
            for key in (guarded.ada, guarded.bob)
        }
        assert len(made) == 2

    def test_a_revoked_key_is_out_at_once_and_the_door_stays_shut(self, guarded):
        assert guarded.ask("GET", "/session", key=guarded.ada).ok
        guarded.service.keys.revoke("ada")
        assert guarded.ask("GET", "/session", key=guarded.ada).status_code == 401
        guarded.service.keys.revoke("bob")
        assert guarded.ask("GET", "/session").status_code == 401

    def test_the_first_key_shuts_the_door_at_once(self, chat):
        assert chat.ask("GET", "/session").json() == {
            "owner": "local",
            "keys": False,
            "version": chat.ask("GET", "/health").json()["version"],
            "tools": ["calculator"],
        }
        chat.service.keys.create("ada")
        assert chat.ask("GET", "/session").status_code == 401

    def test_no_key_is_in_the_database_in_the_log_or_in_an_answer(self, guarded, tmp_path, caplog):
        caplog.set_level(logging.DEBUG)
        guarded.say(guarded.new(key=guarded.ada), "Hi", key=guarded.ada)
        guarded.ask("GET", "/session", key=guarded.ada + "x")
        secret = guarded.ada.rpartition("-")[2]
        files = b"".join(file.read_bytes() for file in tmp_path.glob("chat.db*"))
        assert b"ada" in files
        assert secret.encode() not in files
        assert secret not in caplog.text
        assert secret not in guarded.ask("GET", "/metrics").text

    def test_without_keys_a_proxy_on_this_machine_lets_nobody_in(self, chat):
        for header in ("x-forwarded-for", "forwarded", "x-real-ip", "via"):
            got = chat.ask("GET", "/session", headers={header: "127.0.0.1"})
            assert got.status_code == 401, header

    def test_the_numbers_are_for_this_machine_or_for_a_key(self, guarded):
        assert guarded.ask("GET", "/metrics").status_code == 200
        away = {"x-forwarded-for": "203.0.113.9"}
        assert guarded.ask("GET", "/metrics", headers=away).status_code == 401
        assert guarded.ask("GET", "/metrics", headers=away, key=guarded.ada).status_code == 200


class TestLimits:
    def test_a_key_has_its_requests_a_minute(self, serve):
        chat = serve(requests_per_minute=3)
        _, slow = chat.service.keys.create("slow")
        _, quick = chat.service.keys.create("quick", requests_per_minute=100)
        assert [chat.ask("GET", "/models", key=slow).status_code for _ in range(4)] == [
            200, 200, 200, 429,
        ]  # fmt: skip
        refused = chat.ask("GET", "/models", key=slow)
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert refused.json()["retry_after"] == int(refused.headers["retry-after"])
        assert chat.ask("GET", "/models", key=quick).status_code == 200

    def test_guessing_keys_is_slowed_down_and_does_not_lock_out_who_has_one(self, guarded):
        codes = {guarded.ask("GET", "/models", key=f"llm-{n}-x").status_code for n in range(70)}
        assert codes == {401, 429}
        assert guarded.ask("GET", "/models", key=guarded.ada).status_code == 200

    def test_a_body_that_is_too_long_is_refused(self, serve):
        chat = serve(max_body_bytes=1000)
        name = chat.new()
        path = f"/conversations/{name}/messages"
        told = chat.say(name, "x" * 2000)
        assert (told.status_code, told.json()["title"]) == (413, "Too large")
        pieces = iter([b'{"content": "', *[b"x" * 100] * 20, b'"}'])
        headers = {"content-type": "application/json"}
        untold = chat.ask("POST", path, data=pieces, headers=headers)
        assert (untold.status_code, untold.json()["title"]) == (413, "Too large")
        assert chat.ask("POST", "/v1/chat/completions", json={"x": "x" * 2000}).status_code == 413
        assert chat.messages(name) == []

    def test_a_body_that_does_not_come_ends(self, chat, monkeypatch):
        monkeypatch.setattr(middleware, "BODY_SECONDS", 0.2)
        host, port = chat.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), 30) as connection:
            head = f"POST /conversations HTTP/1.1\r\nhost: {host}\r\ncontent-length: 9\r\n\r\n{{"
            connection.sendall(head.encode())
            connection.settimeout(30)
            assert b" 408 " in connection.recv(1000)

    def test_what_may_be_spent_is_held_and_told(self, serve, server):
        chat = serve(max_tokens=100)
        _, poor = chat.service.keys.create("poor", budget_usd="0.0002")
        _, rich = chat.service.keys.create("rich", budget_usd="10")
        name = chat.new(key=poor)
        codes = [chat.say(name, "Hello", key=poor).status_code for _ in range(8)]
        assert codes[0] == 200
        assert codes[-1] == 402
        asked = len(server.requests)
        refused = chat.say(name, "Hello", key=poor)
        assert refused.json()["title"] == "Budget used up"
        assert "$0.0002" in refused.json()["detail"]
        assert len(server.requests) == asked
        body = {
            "messages": [{"role": "user", "content": "Hi"}],
            "model": "gpt-4",
            "max_tokens": 900,
        }
        assert chat.ask("POST", "/v1/chat/completions", key=poor, json=body).status_code == 429
        assert chat.ask("POST", "/v1/chat/completions", key=rich, json=body).status_code == 200
        assert chat.say(chat.new(key=rich), "Hello", key=rich).status_code == 200

    def test_a_conversation_has_its_own(self, serve):
        chat = serve(conversation_budget_usd="0.0002", max_tokens=100)
        name, other = chat.new(), chat.new()
        codes = [chat.say(name, "Hello").status_code for _ in range(8)]
        assert (codes[0], codes[-1]) == (200, 402)
        assert chat.say(other, "Hello").status_code == 200

    def test_budgets_of_answers_under_way_at_once_do_not_mix(self, serve, held):
        chat = serve(base_url=held.url, max_tokens=100, budget_usd="0.0002")
        _, poor = chat.service.keys.create("poor")
        _, rich = chat.service.keys.create("rich", budget_usd="10")
        got = []

        def ask(key, name):
            got.append((key, chat.say(name, "Hi", key=key).status_code))

        names = [chat.new(key=key) for key in (poor, rich, rich, rich)]
        keys = (poor, rich, rich, rich)
        threads = [
            threading.Thread(target=ask, args=pair) for pair in zip(keys, names, strict=True)
        ]
        for thread in threads:
            thread.start()
            held.asked.acquire(timeout=30)
        held.let_go.set()
        for thread in threads:
            thread.join(60)
        assert sorted(got) == sorted([(poor, 200), *[(rich, 200)] * 3])


class TestPage:
    """What a browser may do, and what other sites can make it do."""

    def test_every_answer_forbids_what_the_page_does_not_need(self, chat):
        for path in ("/", "/static/index.html", "/conversations", "/nothing", "/v1/models"):
            headers = chat.ask("GET", path).headers
            policy = headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert "*" not in policy
            assert "require-trusted-types-for 'script'" in policy
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["x-frame-options"] == "DENY"
            assert headers["referrer-policy"] == "no-referrer"

    def test_another_site_cannot_use_it(self, chat):
        origins = (
            "https://evil.example",
            "null",
            "http://127.0.0.1.evil.example",
            "http://127.0.0.1:1",
        )
        foreign = [{"origin": origin} for origin in origins]
        foreign += [{"sec-fetch-site": site} for site in ("cross-site", "same-site")]
        for headers, method in itertools.product(foreign, ("POST", "GET", "OPTIONS")):
            got = chat.ask(method, "/conversations", headers=headers)
            assert got.status_code == 403, (headers, method)
            assert not [name for name in got.headers if name.lower().startswith("access-control")]
        assert chat.ask("GET", "/conversations").json()["data"] == []

    def test_a_link_from_another_site_opens_the_page(self, chat):
        came = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
        assert chat.ask("GET", "/", headers=came).status_code == 200
        assert chat.ask("POST", "/conversations", headers=came).status_code == 403

    def test_its_own_page_can(self, chat):
        own = {"origin": chat.url, "sec-fetch-site": "same-origin"}
        assert chat.ask("POST", "/conversations", headers=own, json={}).status_code == 201

    def test_a_name_that_was_led_here_is_not_answered(self, chat):
        for host in ("evil.example", "evil.example:80", "", "127.0.0.1.evil"):
            got = chat.ask("GET", "/conversations", headers={"host": host})
            assert got.status_code in (400, 421), host

    def test_its_own_names_are(self, serve):
        chat = serve(public_hosts="chat.example")
        for host in ("localhost", "127.0.0.1:9", "[::1]:8080", "chat.example"):
            got = chat.ask("GET", "/conversations", headers={"host": host})
            assert got.status_code == 200, host

    def test_no_file_beside_the_page_is_served(self, chat):
        for path in ("../app.py", "%2e%2e/app.py", "..%2fapp.py", "/etc/passwd"):
            host, port = chat.url.removeprefix("http://").split(":")
            with socket.create_connection((host, int(port)), 30) as connection:
                connection.settimeout(30)
                connection.sendall(f"GET /static/{path} HTTP/1.1\r\nhost: {host}\r\n\r\n".encode())
                assert b" 404 " in connection.recv(200)

    @pytest.mark.parametrize("html", ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>"])
    def test_what_a_model_says_is_never_sent_as_html(self, chat, server, html):
        server.reply(html)
        name = chat.new(title=html)
        chat.say(name, html)
        for path in ("", "/export?form=openai", "/export?form=markdown", "/export?form=anthropic"):
            got = chat.ask("GET", f"/conversations/{name}{path}")
            assert "html" not in got.headers["content-type"]
            assert html.split()[0] in got.text
            if "export" in path:
                assert got.headers["content-disposition"].startswith("attachment")
        server.reply(html)
        with chat.streaming(name, html) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            assert all(event != "error" for event, _ in events(response))


class TestInput:
    def test_sql_is_only_text(self, guarded):
        name = guarded.new(key=guarded.ada, title="Plain")
        guarded.say(name, "kept", key=guarded.ada)
        hostile = (
            "'; DROP TABLE messages; --",
            "' OR '1'='1",
            '" OR ""="',
            "%",
            "_",
            "\0",
            "a:b",
            "*",
            "(",
        )
        for text in hostile:
            got = guarded.ask("GET", "/conversations", key=guarded.bob, params={"q": text})
            assert got.status_code == 200, text
            assert got.json()["data"] == [], text
            for path in (f"/conversations/{requests.utils.quote(text, safe='')}", "/usage"):
                params = {"since": text} if path == "/usage" else {}
                got = guarded.ask("GET", path, key=guarded.bob, params=params)
                assert got.status_code in (404, 422), (text, got.text)
        for text in hostile:
            headers = {"idempotency-key": text} if text != "\0" else {}
            body = {"title": text}
            made = guarded.ask(
                "POST", "/conversations", key=guarded.bob, json=body, headers=headers
            )
            assert made.status_code == 201, text
        assert len(guarded.messages(name, key=guarded.ada)) == 2

    def test_an_id_of_a_request_cannot_write_into_headers_or_the_log(self, chat, caplog):
        caplog.set_level(logging.INFO)
        for given in ("a b", "x" * 65, '{"x":1}', "é"):
            got = chat.ask("GET", "/health", headers={"x-request-id": given.encode()})
            assert got.headers["x-request-id"] != given
            assert len(got.headers["x-request-id"]) == 32
        got = chat.ask("GET", "/health", headers={"x-request-id": "ok-1"})
        assert got.headers["x-request-id"] == "ok-1"

    def test_a_body_cannot_turn_the_client_elsewhere(self, serve, server):
        chat = serve()
        body = {"model": "gpt-4", "messages": [{"role": "user", "content": "Hi"}]}
        for name, value in (
            ("base_url", "http://127.0.0.1:9"), ("api_key", "x"), ("provider", "openai"),
            ("extra_body", {"a": 1}), ("extra_headers", {"a": "b"}), ("timeout", 9), ("cache", "off"),
        ):  # fmt: skip
            got = chat.ask("POST", "/v1/chat/completions", json={**body, name: value})
            assert got.status_code == 400, name
        assert server.requests == []


class TestInside:
    def test_what_the_model_server_says_of_keys_and_addresses_stays_inside(self, serve):
        def refuse(connection, _):
            body = b'{"error": {"message": "Incorrect API key provided: sk-secret123"}}'
            connection.sendall(http(body, "401 Unauthorized"))

        with raw_server(refuse) as model:
            chat = serve(base_url=model.url)
            said = chat.say(chat.new(), "Hi")
            assert said.status_code == 502
            assert "sk-secret123" not in said.text
            assert model.url not in said.text
            body = {"model": "gpt-4", "messages": [{"role": "user", "content": "Hi"}]}
            got = chat.ask("POST", "/v1/chat/completions", json=body)
            assert got.status_code == 502
            assert "sk-secret123" not in got.text

    def test_nobody_learns_where_a_server_is_that_is_down(self, serve):
        chat = serve(base_url="http://127.0.0.1:9")
        chat.service.llm = chat.service.llm.with_options(max_retries=0)
        assert "127.0.0.1:9" not in chat.say(chat.new(), "Hi").text

    def test_the_callers_key_is_not_handed_on(self, guarded, server):
        guarded.say(guarded.new(key=guarded.ada), "Hi", key=guarded.ada)
        assert guarded.ada not in str(server.requests[-1].headers)

    def test_an_error_of_ours_shows_nothing_of_itself(self, chat, monkeypatch):
        def broken(*_):
            raise ZeroDivisionError("the secret of the house")

        monkeypatch.setattr(chat.service.keys, "any", broken)
        got = chat.ask("GET", "/conversations")
        assert (got.status_code, got.json()["title"]) == (500, "Internal error")
        assert "secret" not in got.text
        assert got.json()["request_id"]

    def test_a_model_that_never_ends_is_ended(self, serve):
        gone = threading.Event()

        def endless(connection, _):
            connection.sendall(stream_head("connection: close"))
            try:
                while not gone.wait(0.01):
                    connection.sendall(b": on and on\n\n")
            except OSError:
                gone.set()

        with raw_server(endless) as model:
            chat = serve(base_url=model.url, deadline=0.5)
            said = chat.say(chat.new(), "Hi")
            assert (said.status_code, said.json()["title"]) == (
                504,
                "The model did not answer in time",
            )
            until(gone.is_set)
