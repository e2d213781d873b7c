"""A request as a command line: what it sends is what was sent, and the key is not in it."""

import json
import re
import shutil
import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from LLM.curl import as_curl
from tests.fakes import http, raw_server

KEY = "sk-secret-0123456789"
BEARER = ("Authorization", "Bearer ")
JSON = {"Content-Type": "application/json"}
URL = "https://api.example.com/v1/chat/completions"

# In place of curl: what the shell made of its arguments, and what came through the pipe.
STAND_IN = """
import json, sys
piped = sys.stdin.buffer.read() if "@-" in sys.argv else b""
print(json.dumps([sys.argv[1:], piped.hex()]))
"""


@pytest.fixture(scope="module")
def in_shell(tmp_path_factory):
    """Run a command line in `sh` with a `curl` that tells what it was given."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "stand_in.py").write_text(STAND_IN)
    curl = folder / "curl"
    curl.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "{folder}/stand_in.py" "$@"\n')
    curl.chmod(0o755)

    def run(command):
        environment = {"PATH": f"{folder}:/usr/bin:/bin", "API_KEY": KEY, "LC_ALL": "C.UTF-8"}
        ran = subprocess.run(
            ["sh"], input=command.encode(), env=environment, capture_output=True, check=False
        )
        assert (ran.returncode, ran.stderr) == (0, b"")
        arguments, piped = json.loads(ran.stdout)
        return arguments, bytes.fromhex(piped)

    return run


def sent(arguments, piped):
    """The body that curl would send."""
    if "--data-raw" in arguments:
        return arguments[arguments.index("--data-raw") + 1].encode()
    return piped if "--data-binary" in arguments else None


def headers(arguments):
    return [value for flag, value in pairwise(arguments) if flag == "-H"]


def test_the_command_is_laid_out_to_be_read():
    body = b'{"model":"m","messages":[]}'
    assert as_curl("POST", URL, JSON, body, BEARER, "OPENAI_API_KEY") == (
        f"curl '{URL}' \\\n"
        '  -H "Authorization: Bearer $OPENAI_API_KEY" \\\n'
        "  -H 'Content-Type: application/json' \\\n"
        '  --data-raw \'{\n  "model": "m",\n  "messages": []\n}\''
    )


def test_the_key_comes_from_the_variable(in_shell):
    arguments, _ = in_shell(as_curl("GET", URL, {}, None, BEARER))
    assert headers(arguments) == [f"Authorization: Bearer {KEY}"]


@pytest.mark.parametrize(
    "name, value, shown",
    [
        ("Authorization", f"Bearer {KEY}", "Authorization: Bearer $API_KEY"),
        ("authorization", f"Basic {KEY}", "authorization: Basic $API_KEY"),
        ("x-api-key", KEY, "x-api-key: $API_KEY"),
        ("Api-Key", KEY, "Api-Key: $API_KEY"),
        ("Cookie", f"session={KEY}", "Cookie: $API_KEY"),
    ],
)
def test_a_secret_among_the_headers_becomes_the_variable(name, value, shown):
    command = as_curl("GET", URL, {name: value}, None, None)
    assert KEY not in command
    assert f'-H "{shown}"' in command


def test_the_credentials_own_header_is_said_once():
    command = as_curl("GET", URL, {"X-API-Key": KEY}, None, ("x-api-key", ""))
    assert KEY not in command
    assert command.lower().count("x-api-key") == 1


@pytest.mark.parametrize(
    "query",
    [f"key={KEY}", f"a=1&api_key={KEY}&b=2", f"api-key={KEY}&b=2", f"access_token={KEY}#part"],
)
def test_a_secret_in_the_address_becomes_the_variable(in_shell, query):
    command = as_curl("GET", f"{URL}?{query}", {}, None, None)
    assert KEY not in command
    arguments, _ = in_shell(command)
    assert arguments == [f"{URL}?{query}"]


def test_what_is_about_one_call_or_one_connection_is_left_out():
    left_out = {
        "Idempotency-Key": "1",
        "Content-Length": "27",
        "Host": "h",
        "Accept-Encoding": "gzip",
        "Connection": "keep-alive",
        "Transfer-Encoding": "chunked",
    }
    arguments = as_curl("POST", URL, {**left_out, **JSON}, b"{}", None)
    assert re.findall(r"-H '([^:]+)", arguments) == ["Content-Type"]


@pytest.mark.parametrize(
    "method, body, said",
    [
        ("GET", None, None),
        ("POST", b"{}", None),
        ("POST", None, "POST"),
        ("GET", b"{}", "GET"),
        ("DELETE", None, "DELETE"),
    ],
)
def test_a_method_is_said_where_curl_would_take_another(in_shell, method, body, said):
    arguments, _ = in_shell(as_curl(method, URL, JSON, body, None))
    assert (arguments[arguments.index("-X") + 1] if "-X" in arguments else None) == said


def test_a_body_without_a_type_is_not_called_a_form(in_shell):
    arguments, _ = in_shell(as_curl("POST", URL, {}, b"{}", None))
    assert headers(arguments) == ["Content-Type:"]


def test_an_empty_header_is_sent(in_shell):
    arguments, _ = in_shell(as_curl("GET", URL, {"X-Empty": ""}, None, None))
    assert headers(arguments) == ["X-Empty;"]


@pytest.mark.parametrize("url", ["http://[::1]:8000/v1", "https://h/{a,b}", "https://h/[1-9]"])
def test_brackets_in_an_address_are_no_pattern(in_shell, url):
    arguments, _ = in_shell(as_curl("GET", url, {}, None, None))
    assert arguments == ["--globoff", url]


def test_a_stream_is_shown_as_it_comes():
    assert "--no-buffer" in as_curl("POST", URL, JSON, b'{"stream":true}', None)
    assert "--no-buffer" not in as_curl("POST", URL, JSON, b'{"stream":false}', None)


@pytest.mark.parametrize("variable", ["", "1KEY", "A-B", "A B", "$(id)", "Ä", "A\n"])
def test_a_name_that_is_no_variable_is_refused(variable):
    with pytest.raises(ValueError, match="no name of a shell variable"):
        as_curl("GET", URL, {}, None, BEARER, variable)


@pytest.mark.parametrize(
    "body",
    [
        b'{"a":1.10}',
        b'{"a": 1}',
        b'{"a":1,"a":2}',
        b'{"a":1e400}',
        b"NaN",
        b'{"a":"\\ud800"}',
        b'{"a":"Hello!"}',
        b"not JSON",
        b"",
        b"@/etc/passwd",
        b"[" * 3000,
        b"\xff\x00\x01%\\",
        b"nul \x00 byte",
    ],
)  # fmt: skip
def test_what_another_layout_could_change_stays_as_it_is(in_shell, body):
    command = as_curl("POST", URL, JSON, body, None)
    assert sent(*in_shell(command)) == body


@pytest.mark.parametrize("text", ["a", "it's", "ü", "!"])
def test_a_large_body_does_not_break_the_line(in_shell, text):
    """Linux refuses an argument of more than 128 KiB."""
    body = json.dumps({"text": text * 300_000}, ensure_ascii=False).encode()
    assert sent(*in_shell(as_curl("POST", URL, JSON, body, BEARER))) == body


def test_a_line_that_bash_might_search_its_history_for_is_not_begun():
    """An interactive bash expands `!word` in each line, whatever quote an earlier one opened."""
    command = as_curl("POST", URL, JSON, b'{"a":["Hi!ls",1]}', None)
    assert not any("!" in line and "'" not in line for line in command.splitlines())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
in_a_shell = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@in_a_shell
@given(st.dictionaries(st.text(), json_values, max_size=4))
def test_any_json_arrives_as_it_was(in_shell, value):
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    try:
        body = text.encode()
    except UnicodeEncodeError:
        body = json.dumps(value).encode()
    got = sent(*in_shell(as_curl("POST", URL, JSON, body, BEARER)))
    assert json.dumps(json.loads(got)) == json.dumps(json.loads(body))


@in_a_shell
@given(st.binary(max_size=300))
def test_any_bytes_arrive_as_they_were(in_shell, body):
    assert sent(*in_shell(as_curl("POST", URL, JSON, body, None))) == body


printable = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=40)


@in_a_shell
@given(printable, printable, printable)
def test_nothing_in_a_header_or_an_address_reaches_the_shell(in_shell, value, path, prefix):
    value, url = f"v{value}", f"https://h/{path}"
    command = as_curl("GET", url, {"X-Title": value}, None, ("X-Key", prefix))
    arguments, _ = in_shell(command)
    assert headers(arguments) == [f"X-Key: {prefix}{KEY}", f"X-Title: {value}"]
    assert url in arguments or re.search(r"[?&][\w-]*(key|token|sig\w*)=", url, re.IGNORECASE)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize(
    "body",
    [b'{"model":"m","n":[1,"it\'s $HOME `x` \\\\"]}', b'"' + b"a" * 200_000 + b'"', b"\xff\x00"],
)
def test_the_real_curl_sends_what_was_sent(body):
    with raw_server(lambda connection, number: connection.sendall(http(b"{}"))) as server:
        sends = {"X-Title": "ü 'quoted' $HOME", **JSON}
        command = as_curl("POST", f"{server.url}/v1/chat", sends, body, BEARER)
        assert KEY not in command
        environment = {"PATH": "/usr/bin:/bin", "API_KEY": KEY, "HOME": "/nonexistent"}
        ran = subprocess.run(
            ["sh"],
            input=f"{command} --silent --show-error".encode(),
            env=environment, capture_output=True, timeout=30, check=False,
        )  # fmt: skip
        assert (ran.returncode, ran.stdout) == (0, b"{}"), ran.stderr
        head, _, got = server.requests[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/chat HTTP/1.1\r\n")
    for line in (f"Authorization: Bearer {KEY}", "X-Title: ü 'quoted' $HOME"):
        assert f"\r\n{line}".encode() in head
    assert got == body or json.loads(got) == json.loads(body)
