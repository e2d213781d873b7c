"""The providers' batch APIs: a batch of calls to the wire and back, pure functions for each dialect.

Sources, as of 2026-11: OpenAI's API reference ("Batch", "Files") and its guide "Batch API"; Anthropic's
reference ("Message Batches") and its guide "Batch processing".
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, NamedTuple, Protocol
from urllib.parse import quote, urlencode

import pydantic_core

from LLM.errors import LLMAPIError, LLMConfigError
from LLM.providers import base
from LLM.providers.base import Call, ErrorBody, Target, WireRequest, WireResponse

_DONE = frozenset({"completed", "failed", "expired", "cancelled"})

# Words of other servers (Together, vLLM, Mistral's gateway) for the same.
_SAME = {
    "queued": "validating",
    "running": "in_progress",
    "processing": "in_progress",
    "succeeded": "completed",
    "success": "completed",
    "ended": "completed",
    "canceling": "cancelling",
    "canceled": "cancelled",
}


@dataclass(frozen=True)
class BatchCounts:
    """How far the requests of a batch are.

    Attributes:
        total: all of them; a server that has not looked at the file yet says 0.
        succeeded: answered.
        failed: answered with an error.
        cancelled: not begun when the batch was cancelled.
        expired: not begun when its time was over.
    """

    total: int
    succeeded: int
    failed: int
    cancelled: int = 0
    expired: int = 0

    @property
    def processing(self) -> int:
        """Those that are not over."""
        over = self.succeeded + self.failed + self.cancelled + self.expired
        return max(0, self.total - over)


@dataclass(frozen=True)
class Batch:
    """A batch at one moment, whatever the provider.

    Attributes:
        id: the provider's; with it any process can go on.
        provider: name of the host.
        status: `validating`, `in_progress`, `finalizing`, `cancelling`; over: `completed`, `failed` (none
            of it was run, see `problem`), `expired` or `cancelled` (what was answered by then has
            results); or a word of the server's own.
        counts: `None` if the server does not say.
        created: when, in UTC; `None` if the server does not say.
        ended: when it was over; `None` if it is not.
        expires: when it is over at the latest; `None` if the server does not say.
        problem: why it failed, in a line; `""` if it did not.
        raw: the server's own object.
    """

    id: str
    provider: str
    status: str
    counts: BatchCounts | None = None
    created: datetime | None = None
    ended: datetime | None = None
    expires: datetime | None = None
    problem: str = ""
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def done(self) -> bool:
        """Whether it is over: nothing of it is run any more, and its results can be had."""
        return self.status in _DONE


class Frame(NamedTuple):
    """The bytes around the requests of a batch, where it is sent."""

    opening: bytes
    between: bytes
    closing: bytes


class BatchWire(Protocol):
    """What a dialect's batch API is.

    Attributes:
        most_requests: of one batch.
        most_bytes: likewise.
        one_model: all requests of a batch must name the same model.
        uploads: what is sent first is a file, and the batch is made of it.
    """

    most_requests: int
    most_bytes: int
    one_model: bool
    uploads: bool

    def custom_id(self, key: str) -> str:
        """What a key is called on the wire."""

    def key(self, custom_id: str) -> str:
        """The key again; of one that was too long for the wire, its name there."""

    def frame(self, boundary: str) -> Frame:
        """What stands around the requests."""

    def piece(self, custom_id: str, path: str, body: bytes) -> bytes:
        """One request: `body` as the single call would send it to `path`."""

    def send(self, call: Call, body: bytes, boundary: str) -> WireRequest:
        """The upload of the file, or of the batch itself."""

    def create(
        self, call: Call, file: str, path: str, window: str, metadata: Mapping[str, str] | None
    ) -> WireRequest:
        """The batch of a file that was uploaded."""

    def poll(self, call: Call, id_: str) -> WireRequest:
        """How far it is."""

    def cancel(self, call: Call, id_: str) -> WireRequest:
        """End it."""

    def page(self, call: Call, after: str | None) -> WireRequest:
        """A page of the account's batches, the newest first."""

    def results(self, call: Call, batch: Batch) -> list[WireRequest]:
        """The files with its results, a JSON object on each line."""

    def batch(self, call: Call, value: Mapping[str, Any]) -> Batch:
        """The server's object as ours; raises one of `base.MALFORMED` if it is none."""

    def outcome(self, call: Call, line: bytes) -> tuple[str, WireResponse | LLMAPIError]:
        """One line of a results file: its custom id, and the answer, or why there is none.

        Raises:
            Exception: one of `base.MALFORMED`: it is no such line.
        """


def batch_wire(target: Target) -> BatchWire:
    """The batch API of a target's dialect."""
    return _ANTHROPIC if target.host.dialect == "anthropic" else _OPENAI


def batch_path(call: Call, request: WireRequest) -> str:
    """What a batch calls the endpoint of a single call."""
    return "/v1" + request.url.removeprefix(call.target.base_url)


class _OpenAIBatches:
    # "Create batch", 2026-11: "up to 50,000 requests, and can be up to 200 MB in size".
    most_requests = 50_000
    most_bytes = 200_000_000
    one_model = (
        True  # "Each input file can only include requests to a single model", guide, 2026-11
    )
    uploads = True

    def custom_id(self, key: str) -> str:
        return key

    def key(self, custom_id: str) -> str:
        return custom_id

    def frame(self, boundary: str) -> Frame:
        purpose = f'--{boundary}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        file = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="batch.jsonl"\r\n'
            "Content-Type: application/jsonl\r\n\r\n"
        )
        return Frame((purpose + file).encode(), b"", f"\r\n--{boundary}--\r\n".encode())

    def piece(self, custom_id: str, path: str, body: bytes) -> bytes:
        head = base.encode({"custom_id": custom_id, "method": "POST", "url": path})
        return b'%b,"body":%b}\n' % (head[:-1], body)

    def send(self, call: Call, body: bytes, boundary: str) -> WireRequest:
        kind = f"multipart/form-data; boundary={boundary}"
        return _request(call, "/files", body, {"Content-Type": kind})

    def create(
        self, call: Call, file: str, path: str, window: str, metadata: Mapping[str, str] | None
    ) -> WireRequest:
        body: dict[str, Any] = {
            "input_file_id": file,
            "endpoint": path,
            "completion_window": window,
        }
        if metadata:
            body["metadata"] = dict(metadata)
        return _request(call, "/batches", base.encode(body))

    def poll(self, call: Call, id_: str) -> WireRequest:
        return _request(call, f"/batches/{_part(id_)}")

    def cancel(self, call: Call, id_: str) -> WireRequest:
        return _request(call, f"/batches/{_part(id_)}/cancel", b"")

    def page(self, call: Call, after: str | None) -> WireRequest:
        return _request(call, f"/batches?{_query(limit='100', after=after)}")

    def results(self, call: Call, batch: Batch) -> list[WireRequest]:
        files = (batch.raw.get("output_file_id"), batch.raw.get("error_file_id"))
        return [_request(call, f"/files/{_part(file)}/content") for file in files if file]

    def batch(self, call: Call, value: Mapping[str, Any]) -> Batch:
        status = str(value["status"]).lower()
        status = _SAME.get(status, status)
        counts = value.get("request_counts")
        over = (f"{word}_at" for word in ("completed", "failed", "expired", "cancelled"))
        return Batch(
            id=_text(value["id"]),
            provider=call.target.host.name,
            status=status,
            counts=_openai_counts(counts) if isinstance(counts, dict) else None,
            created=_moment(value.get("created_at")),
            ended=next(filter(None, (_moment(value.get(name)) for name in over)), None),
            expires=_moment(value.get("expires_at")),
            problem=base.clean(base.redact(_problem(value.get("errors")), call.target.key)),
            raw=value,
        )

    def outcome(self, call: Call, line: bytes) -> tuple[str, WireResponse | LLMAPIError]:
        value = base.parse_json(line)
        custom_id, response, error = value["custom_id"], value.get("response"), value.get("error")
        if isinstance(response, dict) and response.get("body") is not None:
            body = response["body"]
            headers = {"x-request-id": _text(response.get("request_id") or "")}
            data = body.encode() if isinstance(body, str) else pydantic_core.to_json(body)
            return _text(custom_id), WireResponse(int(response["status_code"]), headers, data)
        found = base.read_error_value({"error": error}) or ErrorBody("no answer, and no reason")
        return _text(custom_id), never_run(call, line, found)


class _AnthropicBatches:
    # "Create a Message Batch" and "Batch processing", 2026-11: 100,000 requests or 256 MB.
    most_requests = 100_000
    most_bytes = 256_000_000
    one_model = False
    uploads = False

    def custom_id(self, key: str) -> str:
        """The key if the API takes it (`[a-zA-Z0-9_-]{1,64}`), else an encoding, else a hash of it."""
        if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", key, re.ASCII) and not key.startswith(_MARKS):
            return key
        data = key.encode("utf-8", "surrogatepass")
        name = _ENCODED + _base64(data)
        return name if len(name) <= 64 else _HASHED + _base64(hashlib.sha256(data).digest())

    def key(self, custom_id: str) -> str:
        if not custom_id.startswith(_ENCODED):
            return custom_id
        text = custom_id.removeprefix(_ENCODED)
        data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
        return data.decode("utf-8", "surrogatepass")

    def frame(self, boundary: str) -> Frame:  # noqa: ARG002 - the other dialect's need
        return Frame(b'{"requests":[', b",", b"]}")

    def piece(self, custom_id: str, path: str, body: bytes) -> bytes:  # noqa: ARG002 - one endpoint
        return b'{"custom_id":%b,"params":%b}' % (base.encode({"": custom_id})[4:-1], body)

    def send(self, call: Call, body: bytes, boundary: str) -> WireRequest:  # noqa: ARG002 - likewise
        return _request(call, "/messages/batches", body)

    def create(
        self, call: Call, file: str, path: str, window: str, metadata: Mapping[str, str] | None
    ) -> WireRequest:
        raise NotImplementedError  # it is sent in one piece

    def poll(self, call: Call, id_: str) -> WireRequest:
        return _request(call, f"/messages/batches/{_part(id_)}")

    def cancel(self, call: Call, id_: str) -> WireRequest:
        return _request(call, f"/messages/batches/{_part(id_)}/cancel", b"")

    def page(self, call: Call, after: str | None) -> WireRequest:
        return _request(call, f"/messages/batches?{_query(limit='1000', after_id=after)}")

    def results(self, call: Call, batch: Batch) -> list[WireRequest]:
        # Not `results_url`: it could name another host, and the key would go there.
        return [_request(call, f"/messages/batches/{_part(batch.id)}/results")]

    def batch(self, call: Call, value: Mapping[str, Any]) -> Batch:
        status = _text(value["processing_status"])
        status = _SAME.get(status, status)
        counts = _anthropic_counts(value.get("request_counts") or {})
        if status == "completed" and counts.expired:
            status = "expired"
        elif status == "completed" and (counts.cancelled or value.get("cancel_initiated_at")):
            status = "cancelled"
        return Batch(
            id=_text(value["id"]),
            provider=call.target.host.name,
            status=status,
            counts=counts,
            created=_moment(value.get("created_at")),
            ended=_moment(value.get("ended_at")),
            expires=_moment(value.get("expires_at")),
            raw=value,
        )

    def outcome(self, call: Call, line: bytes) -> tuple[str, WireResponse | LLMAPIError]:
        value = base.parse_json(line)
        custom_id, result = _text(value["custom_id"]), value["result"]
        if result["type"] == "succeeded":
            return custom_id, WireResponse(200, {}, pydantic_core.to_json(result["message"]))
        if result["type"] == "errored":
            from LLM.providers import anthropic  # a script that never asks it does not pay for it

            error = result.get("error") or {}
            return custom_id, anthropic.error(
                call, WireResponse(200, {}, pydantic_core.to_json(error))
            )
        word = _SAME.get(result["type"], result["type"])
        return custom_id, never_run(call, line, ErrorBody(*_NEVER_RUN.get(word, (str(word),))))


# What Anthropic says in a word, in OpenAI's words and codes.
_NEVER_RUN = {
    "expired": ("the batch expired before this request was run", "batch_expired"),
    "cancelled": ("the batch was cancelled before this request was run", "batch_cancelled"),
}

# How a key begins on the wire that is not the user's own there; one of the user's that does is encoded.
_ENCODED, _HASHED = "key64_", "key256_"
_MARKS = (_ENCODED, _HASHED)

_OPENAI: BatchWire = _OpenAIBatches()
_ANTHROPIC: BatchWire = _AnthropicBatches()


def never_run(call: Call, line: bytes, found: ErrorBody) -> LLMAPIError:
    """The error of a request that the provider did not get to; it costs nothing."""
    error = base.api_error(call, WireResponse(200, {}, line), found, ())
    error.retriable = error.retriable or found.code in ("batch_expired", "request_timeout")
    return error


def _request(
    call: Call, path: str, body: bytes | None = None, ours: Mapping[str, str] | None = None
) -> WireRequest:
    """A GET, or with a body a POST, under the dialect's own headers."""
    headers = {"Accept": "application/json"}
    credential = ("Authorization", "Bearer ")
    if call.target.host.dialect == "anthropic":
        from LLM.providers import anthropic  # as above

        headers["Anthropic-Version"] = anthropic.VERSION
        credential = ("X-Api-Key", "")
    if body is not None:
        headers |= {"Content-Type": "application/json", "Idempotency-Key": call.idempotency_key}
    headers = base.request_headers(call, {**headers, **(ours or {})})
    method = "GET" if body is None else "POST"
    return WireRequest(
        method, call.target.base_url + path, headers, body, credential, call.target.key
    )


def _part(id_: object) -> str:
    """An id as a part of a path, whatever is in it."""
    if not isinstance(id_, str) or not id_.strip(". ") or len(id_) > 500:
        raise LLMConfigError(f"{id_!r:.60} is no id of a batch")
    return quote(id_, safe="")


def _query(**fields: str | None) -> str:
    return urlencode({name: value for name, value in fields.items() if value is not None})


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("text is missing")
    return value


def _count(counts: Mapping[str, Any], name: str) -> int:
    value = counts.get(name)
    return value if type(value) is int and value >= 0 else 0


def _openai_counts(counts: Mapping[str, Any]) -> BatchCounts:
    return BatchCounts(
        _count(counts, "total"), _count(counts, "completed"), _count(counts, "failed")
    )


def _anthropic_counts(counts: Mapping[str, Any]) -> BatchCounts:
    names = ("succeeded", "errored", "canceled", "expired")
    parts = [_count(counts, name) for name in names]
    return BatchCounts(sum(parts) + _count(counts, "processing"), *parts)


def _moment(value: object) -> datetime | None:
    """Seconds since 1970, or a date and time in words; `None` if it is neither."""
    try:
        if isinstance(value, str):
            at = datetime.fromisoformat(value.replace("Z", "+00:00"))
            return at if at.tzinfo else at.replace(tzinfo=timezone.utc)
        if isinstance(value, (int, float)):
            return datetime.fromtimestamp(value, timezone.utc)
    except (ValueError, OverflowError, OSError):
        pass
    return None


def _problem(errors: object) -> str:
    """Why a batch failed: the first of its errors, with its line."""
    found = errors.get("data") if isinstance(errors, dict) else errors
    first = found[0] if isinstance(found, list) and found else None
    if not isinstance(first, dict):
        return str(first or "")[:500]
    line = f"line {first['line']}: " if first.get("line") else ""
    more = f" (and {len(found) - 1:,} more)" if isinstance(found, list) and len(found) > 1 else ""
    return f"{line}{first.get('message') or first.get('code')}"[:500] + more
