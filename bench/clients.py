"""The measured clients, each reduced to the same two verbs, written as its documentation does it.

`chat(messages)` makes one call and gives the text of the answer; `deltas()` makes one streaming
call and yields the text of each event. Defaults are left alone: a figure compares what a user gets,
not what can be tuned. A client is imported when it is opened, so that this module can be read in
any environment.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, Protocol

OURS = "LLM"

# Client → what is installed into its environment. None: nothing but Python; "." is this repository.
ENVIRONMENTS: dict[str, str | None] = {
    OURS: ".",
    "http.client": None,
    "urllib3": "urllib3",
    "requests": "requests",
    "httpx": "httpx",
    "openai": "openai",
    "anthropic": "anthropic",
    "litellm": "litellm",
    "ollama": "ollama",
}
# The layers under ours: they come with our own environment, also when no peer is installed.
UNDER_OURS = ("http.client", "urllib3", "requests")


Messages = list[dict[str, str]]
HI: Messages = [{"role": "user", "content": "hi"}]
HEADERS = {"Authorization": "Bearer sk-test", "Content-Type": "application/json"}


class Client(Protocol):
    def chat(self, messages: Messages = HI) -> str: ...
    def deltas(self) -> Iterator[str]: ...


def body(messages: Messages, stream: bool = False) -> dict[str, Any]:
    return {"model": "gpt-4", "messages": messages, "temperature": 0.7, "stream": stream}


class Ours:
    def __init__(self, url: str) -> None:
        from LLM import LLM, LLMConfig

        self.llm = LLM(LLMConfig(base_url=url + "/v1", model="gpt-4", api_key="sk-test"))

    def chat(self, messages: Messages = HI) -> str:
        return self.llm.chat_completion(messages).choices[0].message.content

    def deltas(self) -> Iterator[str]:
        for event in self.llm.stream(HI):
            if event.text_delta:
                yield str(event.text_delta)


class HttpClient:
    def __init__(self, url: str) -> None:
        import http.client
        from urllib.parse import urlsplit

        parts = urlsplit(url)
        self.path = parts.path + "/v1/chat/completions"
        self.connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)

    def post(self, messages: Messages, stream: bool = False) -> Any:
        self.connection.request("POST", self.path, json.dumps(body(messages, stream)), HEADERS)
        return self.connection.getresponse()

    def chat(self, messages: Messages = HI) -> str:
        return json.loads(self.post(messages).read())["choices"][0]["message"]["content"]

    def deltas(self) -> Iterator[str]:
        # Reading on to the end of the body keeps the connection.
        return deltas_of(iter(self.post(HI, True).readline, b""))


class Urllib3:
    def __init__(self, url: str) -> None:
        import urllib3

        self.pool = urllib3.PoolManager()
        self.url = url + "/v1/chat/completions"

    def chat(self, messages: Messages = HI) -> str:
        response = self.pool.request(
            "POST", self.url, body=json.dumps(body(messages)), headers=HEADERS
        )
        return json.loads(response.data)["choices"][0]["message"]["content"]

    def deltas(self) -> Iterator[str]:
        response = self.pool.request(
            "POST",
            self.url,
            body=json.dumps(body(HI, True)),
            headers=HEADERS,
            preload_content=False,
        )
        yield from deltas_of(lines_of(response.stream()))
        response.release_conn()


class Requests:
    def __init__(self, url: str) -> None:
        import requests

        self.session = requests.Session()
        self.session.headers["Authorization"] = "Bearer sk-test"
        self.url = url + "/v1/chat/completions"

    def chat(self, messages: Messages = HI) -> str:
        response = self.session.post(self.url, json=body(messages), timeout=30)
        response.raise_for_status()
        return response.json()["choices"][0]["message"]["content"]

    def deltas(self) -> Iterator[str]:
        with self.session.post(self.url, json=body(HI, True), timeout=30, stream=True) as response:
            response.raise_for_status()
            yield from deltas_of(response.iter_lines())


class Httpx:
    def __init__(self, url: str) -> None:
        import httpx

        self.client = httpx.Client(headers={"Authorization": "Bearer sk-test"}, timeout=30)
        self.url = url + "/v1/chat/completions"

    def chat(self, messages: Messages = HI) -> str:
        response = self.client.post(self.url, json=body(messages))
        response.raise_for_status()
        return response.json()["choices"][0]["message"]["content"]

    def deltas(self) -> Iterator[str]:
        with self.client.stream("POST", self.url, json=body(HI, True)) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                if line.startswith("data: {") and (text := delta_of(line[6:])):
                    yield text


class OpenAI:
    def __init__(self, url: str) -> None:
        from openai import OpenAI

        self.client = OpenAI(base_url=url + "/v1", api_key="sk-test")

    def chat(self, messages: Messages = HI) -> str:
        answer = self.client.chat.completions.create(
            model="gpt-4", messages=messages, temperature=0.7
        )
        return answer.choices[0].message.content

    def deltas(self) -> Iterator[str]:
        stream = self.client.chat.completions.create(
            model="gpt-4", messages=HI, temperature=0.7, stream=True
        )
        for event in stream:
            if event.choices and event.choices[0].delta.content:
                yield event.choices[0].delta.content


class Anthropic:
    def __init__(self, url: str) -> None:
        from anthropic import Anthropic

        self.client = Anthropic(base_url=url, api_key="sk-test")

    def create(self, messages: Messages, **options: Any) -> Any:
        return self.client.messages.create(
            model="claude-3-5-sonnet-20241022", max_tokens=1024, messages=messages, **options
        )

    def chat(self, messages: Messages = HI) -> str:
        return self.create(messages).content[0].text

    def deltas(self) -> Iterator[str]:
        for event in self.create(HI, stream=True):
            if event.type == "content_block_delta":
                yield event.delta.text


class LiteLLM:
    def __init__(self, url: str) -> None:
        import litellm

        self.completion = litellm.completion
        self.options = {
            "model": "openai/gpt-4",
            "api_base": url + "/v1",
            "api_key": "sk-test",
            "temperature": 0.7,
        }

    def chat(self, messages: Messages = HI) -> str:
        return self.completion(messages=messages, **self.options).choices[0].message.content

    def deltas(self) -> Iterator[str]:
        for event in self.completion(messages=HI, stream=True, **self.options):
            if event.choices[0].delta.content:
                yield event.choices[0].delta.content


class Ollama:
    def __init__(self, url: str) -> None:
        from ollama import Client

        self.client = Client(host=url)

    def chat(self, messages: Messages = HI) -> str:
        return self.client.chat(model="llama2", messages=messages).message.content

    def deltas(self) -> Iterator[str]:
        for part in self.client.chat(model="llama2", messages=HI, stream=True):
            if part.message.content:
                yield part.message.content


CLIENTS: dict[str, Callable[[str], Client]] = {
    OURS: Ours,
    "http.client": HttpClient,
    "urllib3": Urllib3,
    "requests": Requests,
    "httpx": Httpx,
    "openai": OpenAI,
    "anthropic": Anthropic,
    "litellm": LiteLLM,
    "ollama": Ollama,
}


def delta_of(data: str | bytes) -> str | None:
    return json.loads(data)["choices"][0]["delta"].get("content")


def deltas_of(lines: Iterator[bytes]) -> Iterator[str]:
    for line in lines:
        if line.startswith(b"data: {") and (text := delta_of(line[6:])):
            yield text


def lines_of(chunks: Iterator[bytes]) -> Iterator[bytes]:
    rest = b""
    for piece in chunks:
        *lines, rest = (rest + piece).split(b"\n")
        yield from lines
