"""The application: routes, page and guard around one `Service`."""

from __future__ import annotations

import ipaddress
import json
import logging
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from agents.service.compatible import is_compatible, refusal
from agents.service.compatible import router as compatible_router
from agents.service.core import Service
from agents.service.logs import configure, request_id
from agents.service.middleware import Guard
from agents.service.problems import PROBLEM_JSON, Problem, problem_of
from agents.service.routes import router
from agents.service.settings import Settings
from agents.service.worker import watch
from LLM import LLM, Clock, LLMError, __version__

log = logging.getLogger("agents.service")

STATIC: Final = Path(__file__).parent / "static"

_ABOUT: Final = (
    "Conversations with language models over HTTP: streamed, with tools, kept in SQL, each answer with "
    "its cost. `/v1/chat/completions` and `/v1/messages` speak OpenAI's and Anthropic's own forms."
)


def create_app(
    settings: Settings | None = None,
    *,
    llm: LLM | None = None,
    tools: Iterable[Any] | None = None,
    clock: Clock | None = None,
) -> FastAPI:
    """The chat service as an ASGI application.

    Args:
        settings: left out: from the environment, see `Settings.load`.
        llm: the client that is asked; left out: one made of the settings.
        tools: functions or `Tool`s that the model may call; left out: those that the settings name.
        clock: for tests.

    Raises:
        LLMConfigError: a setting cannot be used.
        StoreError: the database cannot.
    """
    settings = settings or Settings.load()
    service = Service(settings, llm=llm, tools=tools, clock=clock)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.answers.begin()
        yield
        service.close()

    app = FastAPI(
        title="requests-llm chat service",
        summary=_ABOUT,
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # both pages load scripts from elsewhere
        redoc_url=None,
    )
    app.state.service = service
    app.include_router(router)
    app.include_router(compatible_router)
    _add_operations(app, service)
    app.add_exception_handler(HTTPException, _http_problem)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(LLMError, _failed)
    app.add_middleware(
        Guard,
        max_body_bytes=settings.max_body_bytes,
        hosts=_hosts(settings),
        observe=service.metrics.observe_request,
        tell=_tell,
        clock=service.clock,
    )
    return app


def from_environment() -> FastAPI:
    """The application of a worker, all from the environment."""
    settings = Settings.load()
    configure(settings)
    return watch(create_app(settings))


def _add_operations(app: FastAPI, service: Service) -> None:
    app.mount("/static", StaticFiles(directory=STATIC))

    @app.get("/", include_in_schema=False)
    def page() -> FileResponse:
        return FileResponse(STATIC / "index.html", media_type="text/html")

    @app.get("/health", tags=["operations"])
    def health() -> dict[str, str]:
        """The process lives."""
        return {"status": "ok", "version": __version__}

    @app.get("/ready", tags=["operations"])
    def ready() -> JSONResponse:
        """Whether it can answer: its database does."""
        try:
            service.keys.any()
        except LLMError as error:
            problem = problem_of(error)
            log.warning("not ready: %s", error)
            return JSONResponse({"status": "not ready", "reason": problem.title}, 503)
        return JSONResponse({"status": "ready"})

    @app.get("/metrics", tags=["operations"])
    def metrics(request: Request) -> Response:
        """Numbers for Prometheus; from another machine with a key only."""
        if not service.is_local(request):
            service.authenticate(request)
        body, kind = service.metrics.render()
        return Response(body, headers={"content-type": kind})


def _hosts(settings: Settings) -> list[str] | None:
    """The names by which it may be asked; `None`: any, for it listens on every address of the machine."""
    try:
        if ipaddress.ip_address(settings.host).is_unspecified and not settings.public_hosts:
            return None
    except ValueError:  # a name
        pass
    return [settings.host, f"[{settings.host}]", *settings.public_hosts]


def _tell(request: Request, problem: Problem) -> Response:
    """A problem, in the form that the caller reads."""
    if is_compatible(request):
        return refusal(request, problem)
    if problem.cause:
        log.warning("%s: %s", problem.title, problem.cause)
    return JSONResponse(
        problem.body(request_id.get()),
        problem.status_code,
        headers=problem.headers,
        media_type=PROBLEM_JSON,
    )


async def _http_problem(request: Request, error: Exception) -> Response:
    if not isinstance(error, Problem):
        assert isinstance(error, HTTPException)  # noqa: S101 - what it is registered for
        title, detail = {
            404: ("Not found", "there is nothing at this path"),
            405: ("Method not allowed", f"this path takes no {request.method}"),
        }.get(error.status_code, ("Refused", str(error.detail)))
        error = Problem(error.status_code, title, detail, headers=error.headers)
    return _tell(request, error)


async def _failed(request: Request, error: Exception) -> Response:
    assert isinstance(error, LLMError)  # noqa: S101 - what it is registered for
    return await _http_problem(request, problem_of(error))


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - what it is registered for
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    more = len(error.errors()) - 1
    detail = f"{place}: {first['msg']}" + (f" (and {more} more)" if more else "")
    # As JSON text and back: a value that cannot be shown is not.
    return await _http_problem(
        request, Problem(422, "Malformed request", json.loads(json.dumps(detail)))
    )
