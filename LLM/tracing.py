"""Calls as OpenTelemetry spans and metrics, in the conventions for generative AI."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import urlsplit

from LLM.config import Environment
from LLM.errors import LLMConfigError
from LLM.forks import renew_after_fork
from LLM.providers.hosts import HOSTS
from LLM.telemetry import AttemptFailed, CallFinished, CallStarted, Event, Open, Waited, plain
from LLM.version import __version__

# Names, units and bucket boundaries: open-telemetry/semantic-conventions-genai, `gen-ai-spans.md` and
# `gen-ai-metrics.md`, 2026-11 (in development there). It has no name for a list of models.
_OPERATIONS: Mapping[str, str] = {
    "chat": "chat",
    "completion": "text_completion",
    "models": "list_models",
}
_PARAMETERS: Mapping[str, str] = {
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "top_k": "gen_ai.request.top_k",
    "max_tokens": "gen_ai.request.max_tokens",
    "max_completion_tokens": "gen_ai.request.max_tokens",
    "frequency_penalty": "gen_ai.request.frequency_penalty",
    "presence_penalty": "gen_ai.request.presence_penalty",
    "seed": "gen_ai.request.seed",
}
_USAGE: Mapping[str, str] = {
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "completion_tokens": "gen_ai.usage.output_tokens",
    "cached_tokens": "gen_ai.usage.cache_read.input_tokens",
    "cache_write_tokens": "gen_ai.usage.cache_creation.input_tokens",
    "reasoning_tokens": "gen_ai.usage.reasoning.output_tokens",
}
_SECONDS = tuple(0.01 * 2**step for step in range(14))
_TOKENS = tuple(4**step for step in range(14))


def otel(
    *,
    capture_content: bool | None = None,
    tracer_provider: Any = None,
    meter_provider: Any = None,
) -> OpenTelemetry:
    """A hook that makes an OpenTelemetry span of each call, and counts tokens and seconds.

    The span is a child of the one that is current where the call starts. Needs the extra `otel`; until
    an SDK is set up, nothing is recorded.

    Args:
        capture_content: also record the messages, the answer and the error's message. `None`: as the
            environment's `OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT` says, else no.
        tracer_provider: an OpenTelemetry `TracerProvider`; left out, the global one.
        meter_provider: an OpenTelemetry `MeterProvider`; left out, the global one.

    Raises:
        LLMConfigError: the extra is missing.
    """
    try:
        from opentelemetry import metrics, trace
    except ImportError as error:
        raise LLMConfigError(
            "OpenTelemetry needs the extra otel: pip install 'requests-llm[otel]'"
        ) from error
    return OpenTelemetry(
        trace,
        trace.get_tracer("LLM", __version__, tracer_provider),
        metrics.get_meter("LLM", __version__, meter_provider),
        capture_content=_is_asked_for() if capture_content is None else capture_content,
    )


class OpenTelemetry:
    """The hook that `otel` makes."""

    def __init__(self, trace: Any, tracer: Any, meter: Any, *, capture_content: bool) -> None:
        self._trace = trace
        self._tracer = tracer
        self._capture_content = capture_content
        self._tokens = _histogram(
            meter, "gen_ai.client.token.usage", "{token}", "Tokens of the prompt and of the answer", _TOKENS
        )  # fmt: skip
        self._duration = _histogram(
            meter, "gen_ai.client.operation.duration", "s", "From the call to its end", _SECONDS
        )
        self._first = _histogram(
            meter,
            "gen_ai.client.operation.time_to_first_chunk",
            "s",
            "From the call to the first token of a stream",
            _SECONDS,
        )
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        """For a forked child: no calls under way."""
        # The parent's calls end in the parent.
        self._open: Open[tuple[Any, CallStarted]] = Open()

    def __repr__(self) -> str:
        return f"otel(capture_content={self._capture_content})"

    def __call__(self, event: Event) -> None:
        if isinstance(event, CallStarted):
            self._start(event)
            return
        span, started = self._open.get(event.call_id, (None, None))
        if isinstance(event, CallFinished):
            self._open.pop(event.call_id, None)
            try:
                self._measure(event, started)
                if span is not None and span.is_recording():
                    self._describe(span, event)
            finally:
                if span is not None:
                    span.end()
        elif span is not None and span.is_recording():
            span.add_event(*_note(event))

    def _start(self, event: CallStarted) -> None:
        operation = _OPERATIONS.get(event.endpoint, event.endpoint)
        attributes = {**_who(event), **_where(event), **_asked(event)}
        span = self._tracer.start_span(
            operation if event.endpoint == "models" else f"{operation} {event.model}",
            kind=self._trace.SpanKind.CLIENT,
            attributes=attributes,
        )
        if self._capture_content and span.is_recording() and event.messages is not None:
            span.set_attribute("gen_ai.input.messages", _json(_messages(event.messages)))
        forgotten = self._open.remember(event.call_id, (span, event))
        if forgotten is not None:
            forgotten[0].end()

    def _describe(self, span: Any, event: CallFinished) -> None:
        # After a fallback it is another one than was asked first.
        attributes: dict[str, Any] = {**_who(event), **_where(event)}
        if event.fallbacks:
            attributes["llm.tried_before"] = tuple(model for model, _ in event.fallbacks)
        found = {
            "gen_ai.response.model": event.response_model,
            "gen_ai.response.id": event.response_id,
            "gen_ai.response.finish_reasons": event.finish_reason and (event.finish_reason,),
            "gen_ai.response.time_to_first_chunk": event.time_to_first_token_seconds,
            "llm.request_id": event.request_id,
        }
        # Of an answer out of the cache no token was used.
        if event.usage is not None and not event.cached:
            found.update({name: getattr(event.usage, field) for field, name in _USAGE.items()})
        attributes.update({name: value for name, value in found.items() if value is not None})
        attributes["llm.attempts"] = event.attempts
        attributes["llm.cached"] = event.cached
        attributes["llm.complete"] = event.complete
        if self._capture_content:
            answer = event.answer
            if answer is not None:
                attributes["gen_ai.output.messages"] = _json(_answers(answer))
        error = event.error
        if error is not None:
            attributes["error.type"] = str(error.error_type)
            # What the server said may quote what it was sent.
            said = str(error) if self._capture_content else type(error).__name__
            span.set_status(self._trace.Status(self._trace.StatusCode.ERROR, said))
        span.set_attributes(attributes)

    def _measure(self, event: CallFinished, started: CallStarted | None) -> None:
        attributes = _who(event)
        same = started is not None and started.provider == event.provider
        attributes.update(_where(event) or (_where(started) if started and same else {}))
        if event.response_model is not None:
            attributes["gen_ai.response.model"] = event.response_model
        usage = event.usage
        if usage is not None and not event.cached:
            for kind, count in (
                ("input", usage.prompt_tokens),
                ("output", usage.completion_tokens),
            ):
                if count is not None:
                    self._tokens.record(count, {**attributes, "gen_ai.token.type": kind})
        if event.time_to_first_token_seconds is not None:
            self._first.record(event.time_to_first_token_seconds, attributes)
        if event.error is not None:
            attributes["error.type"] = str(event.error.error_type)
        self._duration.record(event.duration_seconds, attributes)


def _histogram(meter: Any, name: str, unit: str, text: str, bounds: tuple[float, ...]) -> Any:
    try:
        return meter.create_histogram(name, unit, text, explicit_bucket_boundaries_advisory=bounds)
    except TypeError:  # older than 1.30: the SDK's own buckets
        return meter.create_histogram(name, unit, text)


def _is_asked_for() -> bool:
    said = Environment.read().get("OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT", "")
    return said.strip().lower() in ("true", "1")


def _name(provider: str) -> str:
    host = HOSTS.get(provider)
    return (host.trace_name if host is not None else None) or provider


def _who(event: CallStarted | CallFinished) -> dict[str, Any]:
    who = {
        "gen_ai.operation.name": _OPERATIONS.get(event.endpoint, event.endpoint),
        "gen_ai.provider.name": _name(event.provider),
    }
    return who if event.endpoint == "models" else {**who, "gen_ai.request.model": event.model}


def _where(event: CallStarted | CallFinished) -> dict[str, Any]:
    address = urlsplit(event.base_url)
    if not address.hostname:
        return {}
    port = address.port or (443 if address.scheme == "https" else 80)
    return {"server.address": address.hostname, "server.port": port}


def _asked(event: CallStarted) -> dict[str, Any]:
    params = event.params
    asked = {
        name: params[field]
        for field, name in _PARAMETERS.items()
        if isinstance(params.get(field), (int, float))
    }
    if event.stream:
        asked["gen_ai.request.stream"] = True
    stop = params.get("stop") or params.get("stop_sequences")
    if stop:
        asked["gen_ai.request.stop_sequences"] = (
            (stop,) if isinstance(stop, str) else tuple(map(str, stop))
        )
    choices = params.get("n")
    if isinstance(choices, int) and choices != 1:
        asked["gen_ai.request.choice.count"] = choices
    form = params.get("response_format")
    if isinstance(form, Mapping):
        asked["gen_ai.output.type"] = "text" if form.get("type") == "text" else "json"
    return asked


def _note(event: AttemptFailed | Waited) -> tuple[str, dict[str, Any]]:
    if isinstance(event, Waited):
        return "llm.waited", {"llm.reason": event.reason, "llm.seconds": event.seconds}
    facts: dict[str, Any] = {
        "llm.attempt": event.attempt,
        "llm.duration_seconds": event.duration_seconds,
        "error.type": str(event.error.error_type),
    }
    if event.status is not None:
        facts["http.response.status_code"] = event.status
    if event.retry_in_seconds is not None:
        facts["llm.retry_in_seconds"] = event.retry_in_seconds
    return "llm.attempt_failed", facts


def _messages(subject: Any) -> list[dict[str, Any]]:
    """Messages, or prompts, in the form of the conventions."""
    if isinstance(subject, str) or not isinstance(subject, Iterable):
        subject = [subject]
    return [_message(one) for one in subject]


def _message(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        message = plain(message)
    if not isinstance(message, Mapping):
        return {"role": "user", "parts": [{"type": "text", "content": message}]}
    content = message.get("content")
    pieces = content if isinstance(content, list) else [content] if content else []
    parts: list[Any] = [
        {"type": "text", "content": piece}
        if isinstance(piece, str)
        else {"type": "text", "content": piece.get("text")}
        if isinstance(piece, Mapping) and piece.get("type") == "text"
        else piece  # a part of another kind as it is: the conventions take any with a `type`
        for piece in pieces
    ]
    if message.get("role") == "tool":
        answer = {"id": message.get("tool_call_id"), "response": content}
        parts = [{"type": "tool_call_response", **answer}]
    for call in message.get("tool_calls") or ():
        called = call if isinstance(call, Mapping) else plain(call)
        function = called.get("function") or {}
        parts.append(
            {
                "type": "tool_call",
                "id": called.get("id"),
                "name": function.get("name"),
                "arguments": function.get("arguments"),
            }
        )
    return {"role": message.get("role", "assistant"), "parts": parts}


def _answers(answer: Any) -> list[dict[str, Any]]:
    answer = answer if isinstance(answer, Mapping) else plain(answer)
    choices = answer.get("choices", ()) if isinstance(answer, Mapping) else ()
    return [
        {
            **_message(choice.get("message") or {"content": choice.get("text")}),
            "finish_reason": choice.get("finish_reason"),
        }
        for choice in choices
    ]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=plain)
