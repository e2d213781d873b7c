"""The databases of these tests, and services that run."""

import asyncio
import contextlib
import json
import logging
import socket
import threading
import time

import pytest
import requests
import uvicorn

from agents.service.app import create_app
from agents.service.settings import Settings
from tests.databases import quick_sqlite, store, url
from tests.fakes import RawServer, chunk, hang_up, stream_head, until

__all__ = ["quick_sqlite", "store", "until", "url"]


class Server(uvicorn.Server):
    """uvicorn without its pauses: it looks each tenth of a second whether it shall end, or has ended."""

    def __init__(self, app):
        super().__init__(uvicorn.Config(app, log_config=None))
        self.up = threading.Event()

    async def main_loop(self):
        self._loop, self._told = asyncio.get_running_loop(), asyncio.Event()
        await self.on_tick(0)  # sets the header `date`
        self.up.set()
        await self._told.wait()

    def tell_to_end(self):
        self._loop.call_soon_threadsafe(self._told.set)

    async def shutdown(self, sockets=None):
        """What uvicorn does; answers under way have a second."""
        for listening in self.servers:
            listening.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        end = time.monotonic() + 1
        while self.server_state.connections or self.server_state.tasks:
            if time.monotonic() > end:
                for task in self.server_state.tasks:
                    task.cancel()
                break
            await asyncio.sleep(0.002)
        await self.lifespan.shutdown()


class Running:
    """A service on a loopback port of its own, in a thread of this process."""

    def __init__(self, app):
        self.app = app
        self.service = app.state.service
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as agents.cli does
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.session = requests.Session()
        self.session.trust_env = False
        self.server = Server(app)
        self._thread = threading.Thread(
            target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True
        )
        self._thread.start()
        assert self.server.up.wait(60)

    def ask(self, method, path, *, key=None, **options):
        """A request; the answer, whatever its status."""
        headers = options.pop("headers", {})
        if key is not None:
            headers = {"authorization": f"Bearer {key}", **headers}
        options.setdefault("timeout", 60)
        return self.session.request(method, self.url + path, headers=headers, **options)

    def new(self, *, key=None, **body):
        """The id of a new conversation."""
        answer = self.ask("POST", "/conversations", key=key, json=body)
        assert answer.status_code == 201, answer.text
        return answer.json()["id"]

    def say(self, name, content, *, key=None, headers=None, **body):
        """A message and its whole answer."""
        path = f"/conversations/{name}/messages"
        return self.ask(
            "POST", path, key=key, json={"content": content, **body}, headers=headers or {}
        )

    @contextlib.contextmanager
    def streaming(self, name, content, *, key=None, headers=None, path="messages"):
        """The response of a streamed answer, to be read event by event with `events`."""
        named = {"accept": "text/event-stream", **(headers or {})}
        body = {"content": content} if path == "messages" else {}
        response = self.ask(
            "POST",
            f"/conversations/{name}/{path}",
            key=key,
            json=body,
            headers=named,
            stream=True,
        )
        with response:
            yield response

    def messages(self, name, *, key=None):
        return self.ask("GET", f"/conversations/{name}", key=key).json()["messages"]

    def stop(self):
        self.session.close()
        self.server.tell_to_end()
        self._thread.join(60)
        self.socket.close()
        assert not self._thread.is_alive()


def events(response):
    """Name and data of each server-sent event, as they come."""
    name = None
    for line in response.iter_lines(chunk_size=1, decode_unicode=True):
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


class Held:
    """A model that says `Once upon`, and no more until it is let go; `gone`: its client hung up."""

    def __init__(self):
        self.let_go = threading.Event()
        self.gone = threading.Event()
        self.asked = threading.Semaphore(0)
        self._server = RawServer(self._answer)
        self.url = self._server.url

    @property
    def requests(self):
        return self._server.requests

    def _answer(self, connection, _):
        connection.sendall(stream_head("connection: close") + chunk("Once upon"))
        self.asked.release()
        try:
            while not self.let_go.wait(0.02):
                connection.sendall(b": waiting\n\n")
            usage = b'data: {"id":"c1","choices":[],"usage":{"prompt_tokens":7,"completion_tokens":4}}\n\n'
            last = chunk(" a time", finish_reason="stop") + usage + b"data: [DONE]\n\n"
            connection.sendall(last)
        except OSError:
            self.gone.set()
        hang_up(connection)

    def close(self):
        self.let_go.set()
        self._server.close()


@pytest.fixture
def logging_as_before():
    """Puts logging back, which the service sets up."""
    names = (None, "agents", "LLM", "uvicorn", "uvicorn.error", "uvicorn.access")
    loggers = [logging.getLogger(name) for name in names]
    before = [(each, each.level, list(each.handlers), each.propagate) for each in loggers]
    yield
    for each, level, handlers, propagate in before:
        each.setLevel(level)
        each.handlers[:] = handlers
        each.propagate = propagate


@pytest.fixture
def held():
    """A model in the middle of an answer."""
    model = Held()
    yield model
    model.close()


@pytest.fixture
def serve(server, tmp_path):
    """Start a service: `serve(**settings)`; by default with the stand-in model and a file of its own."""
    started = []

    def start(*, llm=None, tools=None, clock=None, **settings):
        chosen = {
            "database": f"sqlite:///{tmp_path}/chat.db",
            "base_url": server.url,
            "input_price": "0.15",
            "output_price": "0.60",
            "requests_per_minute": None,
            **settings,
        }
        app = create_app(Settings(**chosen), llm=llm, tools=tools, clock=clock)
        running = Running(app)
        started.append(running)
        return running

    yield start
    for running in started:
        running.stop()


@pytest.fixture
def chat(serve):
    """A service with the stand-in model."""
    return serve()
