"""The batch APIs of the local server: files and batches in memory, in OpenAI's form and in Anthropic's.

The shapes are those of the vendors' API references (2026-11).
"""

import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, Literal

from LLM.clock import Clock
from LLM.testing.dialects import RefusedError, encoded

__all__ = ["BatchDesk"]

Json = dict[str, Any]

# Answers one request of a batch: its path and its body, to the status and the body of the answer.
Answer = Callable[[str, Json], tuple[int, Json]]

_CREATED = 1_700_000_000
_MOST = {"openai": 50_000, "anthropic": 100_000}
_FILE = "/v1/files"
_OPENAI = "/v1/batches"
_ANTHROPIC = "/v1/messages/batches"
_PATHS = re.compile(rf"({_FILE}|{_OPENAI}|{_ANTHROPIC})(?:/([^/]+))?(?:/(content|cancel|results))?")
_METHODS = {
    (_FILE, False, None): ("POST",),
    (_FILE, True, None): ("GET",),
    (_FILE, True, "content"): ("GET",),
    (_OPENAI, False, None): ("POST", "GET"),
    (_OPENAI, True, None): ("GET",),
    (_OPENAI, True, "cancel"): ("POST",),
    (_ANTHROPIC, False, None): ("POST", "GET"),
    (_ANTHROPIC, True, None): ("GET",),
    (_ANTHROPIC, True, "cancel"): ("POST",),
    (_ANTHROPIC, True, "results"): ("GET",),
}


@dataclass
class _Batch:
    """A batch: its requests are answered when its results are asked for."""

    id: str
    serial: int
    requests: Sequence[Json]
    about: Json
    due: float
    polls: int
    cancelled: bool = False
    ending: str | None = None
    problem: Json | None = None
    created: int = 0
    lines: tuple[bytes, bytes, int] | None = (
        None  # what was answered, what was not, how many failed
    )


@dataclass
class BatchDesk:
    """The batches of a `LocalServer`, and how they shall go; each setting may be changed at any time.

    Attributes:
        polls: how often one is looked at before it is over; 0: it is over at the first look.
        delay: seconds before it is over, at the earliest.
        ending: `"completed"`; or `"expired"` or `"failed"`: what becomes of those that are over from now on.
        answered: requests that are answered before a batch expires or is cancelled, the first of them.
        clock: tells `delay`.
    """

    polls: int = 0
    delay: float = 0.0
    ending: Literal["completed", "expired", "failed"] = "completed"
    answered: int = 0
    clock: Clock = field(default_factory=Clock)
    _files: dict[str, bytes] = field(default_factory=dict, repr=False)
    _batches: dict[str, _Batch] = field(default_factory=dict, repr=False)
    _lock: Any = field(default_factory=threading.RLock, repr=False)

    def allowed(self, path: str) -> tuple[str, ...]:
        """The methods of a path; none: it is not of a batch API."""
        found = _PATHS.fullmatch(path)
        if found is None:
            return ()
        return _METHODS.get((found[1], found[2] is not None, found[3]), ())

    def respond(
        self,
        method: str,
        path: str,
        query: str,
        headers: Mapping[str, str],
        body: bytes,
        answer: Answer,
    ) -> tuple[str, bytes]:
        """The content type and the body of the response.

        Raises:
            RefusedError: what was asked cannot be had.
        """
        found = _PATHS.fullmatch(path)
        assert found is not None  # noqa: S101 - `allowed` said so
        kind, id_, verb = found.groups()
        with self._lock:
            if kind == _FILE:
                if id_ is None:
                    return _json(self._upload(headers, body))
                content = self._found(self._files, id_)
                if verb == "content":
                    return "application/octet-stream", content
                return _json(_file(id_, content))
            if id_ is None and method == "POST":
                batch = self._create(kind, body)
            elif id_ is None:
                return _json(self._list(kind, query))
            else:
                batch = self._found(self._batches, id_)
                if (batch.about.get("object") == "batch") != (kind == _OPENAI):
                    raise RefusedError(f"No such batch: {id_}", status=404)
                if verb == "cancel":
                    self._cancel(batch)
                elif verb == "results":
                    return "application/x-jsonl", self._results(batch, answer)
                else:
                    self._look(batch)
                if batch.ending is not None:
                    self._answered(batch, answer)
            return _json(self._shown(batch))

    def _found(self, values: Mapping[str, Any], id_: str) -> Any:
        if id_ not in values:
            raise RefusedError(f"No such object: {id_}", status=404)
        return values[id_]

    def _upload(self, headers: Mapping[str, str], body: bytes) -> Json:
        fields = _multipart(headers.get("content-type", ""), body)
        if fields.get("purpose") != b"batch" or "file" not in fields:
            raise RefusedError("a file needs a 'file' and a 'purpose', which must be 'batch'")
        id_ = f"file-{len(self._files) + 1:024x}"
        self._files[id_] = fields["file"]
        return _file(id_, fields["file"])

    def _create(self, kind: str, body: bytes) -> _Batch:
        try:
            asked = json.loads(body)
        except ValueError:
            asked = None
        if not isinstance(asked, dict):
            raise RefusedError("We could not parse the JSON body of your request.")
        problem = None
        if kind == _OPENAI:
            for name in ("input_file_id", "endpoint", "completion_window"):
                if not isinstance(asked.get(name), str):
                    raise RefusedError(f"Missing required parameter: '{name}'.", param=name)
            if asked["completion_window"] != "24h":
                raise RefusedError("Invalid value: 'completion_window' must be '24h'.")
            data = self._found(self._files, asked["input_file_id"])
            requests, problem = _openai_requests(data, asked["endpoint"])
            about = {"object": "batch", **asked}
        else:
            requests = _anthropic_requests(asked)
            about = {"type": "message_batch"}
        serial = len(self._batches) + 1
        prefix = "batch_" if kind == _OPENAI else "msgbatch_01"
        batch = _Batch(
            f"{prefix}{serial:022x}",
            serial,
            requests,
            about,
            self.clock.now() + self.delay,
            self.polls,
            problem=problem,
            created=int(self.clock.utc().timestamp()),
        )
        self._batches[batch.id] = batch
        return batch

    def _list(self, kind: str, query: str) -> Json:
        limit = re.search(r"(?:^|&)limit=(\d+)", query)
        after = re.search(r"(?:^|&)after(?:_id)?=([^&]+)", query)
        ours = [
            batch
            for batch in reversed(self._batches.values())
            if (batch.about.get("object") == "batch") == (kind == _OPENAI)
        ]
        if after is not None:
            ids = [batch.id for batch in ours]
            ours = ours[ids.index(after[1]) + 1 :] if after[1] in ids else []
        size = int(limit[1]) if limit is not None else 20
        page = [self._shown(batch) for batch in ours[:size]]
        ends = (page[0]["id"], page[-1]["id"]) if page else (None, None)
        more = {"has_more": len(ours) > size, "first_id": ends[0], "last_id": ends[1]}
        return {"object": "list", "data": page, **more}

    def _look(self, batch: _Batch) -> None:
        """Be asked how far it is: that is also how time goes by."""
        if batch.ending is not None:
            return
        if batch.cancelled:
            batch.ending = "cancelled"
        elif batch.problem is not None:
            batch.ending = "failed"
        elif batch.polls > 0 or self.clock.now() < batch.due:
            batch.polls -= 1
        else:
            batch.ending = self.ending
            if batch.ending == "failed":
                batch.problem = {
                    "code": "invalid_json_line",
                    "line": 1,
                    "message": "This line is not parseable as valid JSON.",
                    "param": None,
                }

    def _cancel(self, batch: _Batch) -> None:
        if batch.ending is not None:
            raise RefusedError(f"Cannot cancel a batch with status '{batch.ending}'.", status=409)
        batch.cancelled = True

    def _answered(self, batch: _Batch, answer: Answer) -> tuple[bytes, bytes, int]:
        """Its results: what was answered, what was not, and how many were refused."""
        if batch.lines is None:
            whole = batch.ending == "completed"
            reached = batch.requests if whole else batch.requests[: self.answered]
            reached = () if batch.ending == "failed" else reached
            openai = batch.about.get("object") == "batch"
            lines = (_openai_line if openai else _anthropic_line)(batch, reached, answer)
            good: list[bytes] = []
            bad: list[bytes] = []
            for ok, line in lines:
                (good if ok else bad).append(line)
            failed = len(bad)
            if batch.ending in ("expired", "cancelled"):
                bad += [
                    _not_reached(batch, request, batch.ending)
                    for request in batch.requests[len(reached) :]
                ]
            # Nothing promises an order: so it is another.
            batch.lines = b"".join(reversed(good)), b"".join(reversed(bad)), failed
        return batch.lines

    def _results(self, batch: _Batch, answer: Answer) -> bytes:
        if batch.ending is None:
            raise RefusedError(f"Batch {batch.id} has no available results.", status=404)
        good, bad, _ = self._answered(batch, answer)
        return good + bad

    def _shown(self, batch: _Batch) -> Json:
        return self._openai(batch) if "object" in batch.about else _anthropic(batch)

    def _openai(self, batch: _Batch) -> Json:
        status = batch.ending or ("cancelling" if batch.cancelled else "in_progress")
        total = len(batch.requests)
        shown: Json = {
            "id": batch.id,
            **batch.about,
            "status": status,
            "created_at": batch.created,
            "expires_at": batch.created + 86_400,
            "errors": {"object": "list", "data": [batch.problem]} if batch.problem else None,
            "output_file_id": None,
            "error_file_id": None,
            "request_counts": {"total": total, "completed": 0, "failed": 0},
        }
        if batch.ending is not None:
            shown[f"{batch.ending}_at"] = batch.created + 60
        if batch.lines is not None:
            good, bad, failed = batch.lines
            answered = good.count(b"\n")
            shown["request_counts"] = {"total": total, "completed": answered, "failed": failed}
            for name, content in (("output_file_id", good), ("error_file_id", bad)):
                if content:
                    file = f"file-{name[:-8]}-{batch.serial:016x}"
                    self._files[file] = content
                    shown[name] = file
        return shown


def _json(value: Json) -> tuple[str, bytes]:
    return "application/json", encoded(value)


def _file(id_: str, content: bytes) -> Json:
    about = {
        "object": "file",
        "created_at": _CREATED,
        "filename": "batch.jsonl",
        "purpose": "batch",
    }
    return {"id": id_, "bytes": len(content), **about}


def _multipart(content_type: str, body: bytes) -> dict[str, bytes]:
    """The fields of a form, by name."""
    boundary = re.search(r'boundary="?([^";]+)', content_type)
    if boundary is None:
        raise RefusedError("the request is no multipart/form-data", status=415)
    fields = {}
    for part in body.split(b"--" + boundary[1].encode()):
        head, separator, content = part.partition(b"\r\n\r\n")
        name = re.search(rb'name="([^"]*)"', head)
        if separator and name is not None:
            fields[name[1].decode()] = content.removesuffix(b"\r\n")
    return fields


def _openai_requests(data: bytes, endpoint: str) -> tuple[list[Json], Json | None]:
    """The requests of a file, or what is wrong with it."""
    requests: list[Json] = []
    ids: set[str] = set()
    model = None
    for number, line in enumerate(data.splitlines(), 1):
        try:
            request = json.loads(line)
            id_, url, body = request["custom_id"], request["url"], request["body"]
        except (ValueError, KeyError, TypeError):
            return [], _problem("invalid_json_line", number, "This line is not valid.")
        if id_ in ids:
            told = f"The custom_id '{id_}' for this request has already been used."
            return [], _problem("duplicate_custom_id", number, told)
        if url != endpoint:
            told = f"The URL '{url}' does not match the batch's endpoint."
            return [], _problem("mismatched_url", number, told)
        if model not in (None, body.get("model")):
            told = "The batch contains requests for several models; it may have one."
            return [], _problem("mismatched_model", number, told)
        model = body.get("model")
        ids.add(id_)
        requests.append(request)
    if not requests:
        return [], _problem("empty_file", None, "The input file is empty.")
    if len(requests) > _MOST["openai"]:
        return [], _problem("too_many_tasks", None, "The batch has more than 50000 requests.")
    return requests, None


def _problem(code: str, line: int | None, message: str) -> Json:
    return {"code": code, "line": line, "message": message, "param": None}


def _anthropic_requests(asked: Json) -> list[Json]:
    requests = asked.get("requests")
    if not isinstance(requests, list) or not requests:
        raise RefusedError("requests: Field required")
    if len(requests) > _MOST["anthropic"]:
        raise RefusedError("requests: at most 100000 items", status=413)
    ids: set[str] = set()
    for index, request in enumerate(requests):
        id_ = request.get("custom_id") if isinstance(request, dict) else None
        if not isinstance(id_, str) or not re.fullmatch("[a-zA-Z0-9_-]{1,64}", id_):
            pattern = "String should match pattern '^[a-zA-Z0-9_-]{1,64}$'"
            raise RefusedError(f"requests.{index}.custom_id: {pattern}")
        if id_ in ids:
            raise RefusedError(f"requests.{index}.custom_id: must be unique")
        if not isinstance(request.get("params"), dict):
            raise RefusedError(f"requests.{index}.params: Field required")
        ids.add(id_)
    return requests


def _openai_line(
    batch: _Batch, requests: Sequence[Json], answer: Answer
) -> Iterator[tuple[bool, bytes]]:
    for number, request in enumerate(requests):
        status, body = answer(request["url"], request["body"])
        line = {
            "id": f"batch_req_{batch.serial:012x}{number:012x}",
            "custom_id": request["custom_id"],
            "response": {"status_code": status, "request_id": f"req_{number:032x}", "body": body},
            "error": None,
        }
        yield status < 400, encoded(line) + b"\n"


def _anthropic_line(
    _: _Batch, requests: Sequence[Json], answer: Answer
) -> Iterator[tuple[bool, bytes]]:
    for request in requests:
        status, body = answer("/v1/messages", request["params"])
        ok = status < 400
        result = (
            {"type": "succeeded", "message": body} if ok else {"type": "errored", "error": body}
        )
        yield ok, encoded({"custom_id": request["custom_id"], "result": result}) + b"\n"


_WHY = {
    "expired": "This request could not be executed before the completion window expired.",
    "cancelled": "This request could not be executed because the batch was cancelled.",
}


def _not_reached(batch: _Batch, request: Json, ending: str) -> bytes:
    custom_id = request["custom_id"]
    if "object" not in batch.about:
        word = "canceled" if ending == "cancelled" else ending
        return encoded({"custom_id": custom_id, "result": {"type": word}}) + b"\n"
    error = {"code": f"batch_{ending}", "message": _WHY[ending]}
    line = {"id": f"batch_req_{batch.serial:x}", "custom_id": custom_id, "response": None}
    return encoded({**line, "error": error}) + b"\n"


def _text(at: int) -> str:
    return datetime.fromtimestamp(at, timezone.utc).isoformat()


def _anthropic(batch: _Batch) -> Json:
    total = len(batch.requests)
    counts = dict.fromkeys(("processing", "succeeded", "errored", "canceled", "expired"), 0)
    if batch.ending is None:
        counts["processing"] = total
    elif batch.lines is not None:
        good, bad, failed = batch.lines
        counts["succeeded"], counts["errored"] = good.count(b"\n"), failed
        rest = "canceled" if batch.ending == "cancelled" else "expired"
        counts[rest] = bad.count(b"\n") - failed
    status = "canceling" if batch.cancelled else "in_progress"
    return {
        "id": batch.id,
        "type": "message_batch",
        "processing_status": "ended" if batch.ending else status,
        "request_counts": counts,
        "created_at": _text(batch.created),
        "expires_at": _text(batch.created + 86_400),
        "ended_at": _text(batch.created + 60) if batch.ending else None,
        "cancel_initiated_at": _text(batch.created + 30) if batch.cancelled else None,
        "archived_at": None,
        "results_url": f"https://api.anthropic.com{_ANTHROPIC}/{batch.id}/results"
        if batch.ending
        else None,
    }
