"""The command `batch`: a file of calls in OpenAI's batch format, answered into one of its output format.

Beside the output stands its journal, `OUT.journal`: what is answered is there first, and `--resume` writes
the output anew from it before it asks for the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from decimal import Decimal
from pathlib import Path
from typing import IO, Any, Final

from LLM.commands.shared import FAILED, INTERRUPTED, OK, Failure, connected, program
from LLM.commands.view import complain, one_line
from LLM.errors import LLMAPIError, LLMError
from LLM.journal import finished

STANDARD: Final = "-"  # standard input or output, where a file is named
_MAX_LINE: Final = (
    64 * 1024 * 1024
)  # bytes; a line of OpenAI's is 200 MB at most, with its whole file
_TOLD: Final = 20  # lines that failed and are told one by one


def batch(args: argparse.Namespace) -> int:
    """Answer a file of calls."""
    if args.output is None and not args.dry_run:
        args.parser.error("where do the answers go? -o FILE")
    lines = _Lines(args.input, stops=args.on_bad_line == "stop")
    with connected(args) as client, lines:
        if args.dry_run:
            return _estimate(client, lines, via=args.via)
        return _answer(client, lines, args)


# The input.


class _Lines:
    """The calls of a file, as items of a map. A line that is none is told, and left out or the end."""

    def __init__(self, path: str, *, stops: bool) -> None:
        self.name = "standard input" if path == STANDARD else path
        self.bad = 0
        self._path = path
        self._stops = stops
        self._stack = ExitStack()
        self._places: dict[str, int] = {}  # of each key, the line
        if path == STANDARD and sys.__stdin__ is None:
            raise Failure("standard input is closed: name a file")
        try:
            self._file: IO[bytes] = sys.stdin.buffer
            if path != STANDARD:
                self._file = self._stack.enter_context(Path(path).open("rb"))  # noqa: SIM115 - as said
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise Failure(f"{path} cannot be read: {reason}") from error

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def is_file(self, path: str) -> bool:
        """Whether it is what is read."""
        return Path(path).exists() and os.path.samestat(
            os.fstat(self._file.fileno()), Path(path).stat()
        )

    def __len__(self) -> int:
        """How many lines there are, for the bar; of a pipe that is not known."""
        if self._path == STANDARD or not self._file.seekable():
            raise TypeError
        begin, count, last = self._file.tell(), 0, b"\n"
        while block := self._file.read(1 << 20):
            count, last = count + block.count(b"\n"), block[-1:]
        self._file.seek(begin)
        return count + (last != b"\n")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        number = 0
        while line := self._file.readline(_MAX_LINE + 1):
            number += 1
            if not line.strip():
                continue
            try:
                yield self._item(line, number)
            except ValueError as error:
                self.bad += 1
                problem = f"{self.name}:{number}: {one_line(str(error))}"
                if self._stops:
                    raise Failure(f"{problem}; leave out --on-bad-line stop to go on") from None
                if self.bad <= _TOLD:
                    complain(problem)

    def _item(self, line: bytes, number: int) -> dict[str, Any]:
        if len(line) > _MAX_LINE:
            while line and not line.endswith(b"\n"):
                line = self._file.readline(_MAX_LINE)
            raise ValueError(f"the line is longer than {_MAX_LINE:,} bytes")
        try:
            # A byte order mark is what editors on Windows begin a file with.
            item = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError:
            raise ValueError("it is not UTF-8") from None
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"it is not JSON: {error.msg} at character {error.pos + 1}") from None
        if not isinstance(item, dict):
            raise ValueError(f"it is a JSON {type(item).__name__}, not an object")
        if not {"body", "messages", "prompt"} & item.keys():
            raise ValueError('it has no "body"')
        key = item.get("custom_id", item.get("key"))
        if key is None:
            key = item["custom_id"] = f"line-{number}"
        if isinstance(key, (str, int)) and not isinstance(key, bool):
            first = self._places.setdefault(str(key), number)
            if first != number:
                raise ValueError(f"its custom_id {key!r:.80} is that of line {first}")
        return item


# The answers.


class _Output:
    """Where the answers go; as a file it is made anew, for the journal has what stood in it.

    What stood in it is replaced at the end, or by more: what fails early leaves it as it was.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.journal = None if path == STANDARD else f"{path}.journal"
        self._file: Any = None
        self._beside: Path | None = None  # where it is written while the old one stands
        self._written = 0  # lines

    def open(self, lines: _Lines, *, resume: bool) -> None:
        """Look that nothing is lost, then begin."""
        if self.journal is None:
            if resume:
                raise Failure("--resume needs a file to resume: -o FILE")
            if sys.__stdout__ is None:
                raise Failure("standard output is closed: -o FILE")
            self._file = sys.stdout.buffer
            return
        if Path(self.path).is_dir():
            raise Failure(f"{self.path} is a folder: name a file in it")
        if lines.is_file(self.path) or lines.is_file(self.journal):
            raise Failure(f"{self.path} is also what is read; choose another name for the output")
        there, begun = (
            Path(path).exists() and Path(path).stat().st_size > 0
            for path in (self.path, self.journal)
        )
        if begun and not resume:
            raise Failure(
                f"{self.path} is begun: --resume goes on with it; or delete {self.journal}"
            )
        if there and not begun:
            raise Failure(
                f"{self.path} is there, and no {self.journal} that would tell what is in it: "
                "choose another name, or delete it"
            )
        if there:
            real = Path(self.path).resolve()
            self._beside = real.with_name(f"{real.name}.part")

    def begin(self) -> None:
        """After the journal was found to fit."""
        if self._file is None:
            path = self._beside or Path(self.path)
            try:
                self._file = path.open("wb", buffering=0)  # closed by `close`
            except OSError as error:
                raise Failure(f"{path} cannot be written: {error.strerror or error}") from error

    def write(self, result: Any) -> None:
        try:
            line = json.dumps(_line(result)).encode("ascii") + b"\n"
            while line:  # a disk that is nearly full takes a part, and says why at the next
                line = line[self._file.write(line) :]
            self._file.flush()
            self._written += 1
        except BrokenPipeError:
            raise
        except OSError as error:
            kept = f"; {self.journal} has the answers" if self.journal else ""
            raise Failure(
                f"{self.path} cannot be written: {error.strerror or error}{kept}"
            ) from error

    def close(self, *, whole: bool) -> None:
        """Bring it to the disk.

        Args:
            whole: the run came to its end.
        """
        if self._file is None:
            return
        self._file.flush()
        if self.journal is None:
            return
        os.fsync(self._file.fileno())
        self._file.close()
        if self._beside is None:
            return
        real = Path(self.path).resolve()
        if whole or self._written >= _count(real):
            shutil.copymode(real, self._beside)
            self._beside.replace(real)
        else:
            self._beside.unlink()


def _count(path: Path) -> int:
    """The lines of a file."""
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def _line(result: Any) -> dict[str, Any]:
    """A line of OpenAI's output file."""
    line = {
        "id": f"batch_req_{result.index}",
        "custom_id": result.key,
        "response": None,
        "error": None,
    }
    if result.success:
        response = result.response
        line["response"] = {
            "status_code": 200,
            "request_id": response.request_id,
            "body": response.model_dump(),
        }
        return line
    error = result.error
    code = getattr(error, "code", None) or str(error.error_type)
    if isinstance(error, LLMAPIError) and error.status_code and error.status_code >= 400:
        told = {"message": str(error), "type": error.type, "param": error.param, "code": error.code}
        line["response"] = {
            "status_code": error.status_code,
            "request_id": error.request_id,
            "body": {"error": told},
        }
    else:
        line["error"] = {"code": code, "message": str(error)}
    return line


def _answer(client: Any, lines: _Lines, args: argparse.Namespace) -> int:
    output = _Output(args.output)
    output.open(lines, resume=args.resume)
    how: dict[str, Any] = {
        "journal": output.journal,
        "concurrency": args.concurrency,
        "via": args.via,
    }
    # Said here, they are for lines that do not say; a model is meant for all.
    how.update(
        {name: getattr(args, name) for name in ("temperature", "max_tokens") if name in args}
    )
    if "model" in args:
        how["prompt"] = _for_any_model
    with ExitStack() as stack:
        if args.budget is not None:
            stack.enter_context(client.budget(args.budget, name="batch"))
        results = stack.enter_context(client.map(lines, **how))
        whole = False
        try:
            output.begin()
            for result in results:
                output.write(result)
                if result.error is not None and results.progress.failed <= _TOLD:
                    complain(f"{result.key}: {one_line(str(result.error))}")
            whole = True
        except KeyboardInterrupt:
            results.close()
            _say_how_to_go_on(output)
            return INTERRUPTED
        except (LLMError, Failure):
            results.close()
            _say_how_to_go_on(output)
            raise
        finally:
            _close(output, whole=whole)
    progress = results.progress
    _tell(progress, lines, output)
    return FAILED if progress.failed or lines.bad else OK


def _for_any_model(item: dict[str, Any]) -> dict[str, Any]:
    """The item without a model of its own."""
    if isinstance(item.get("body"), dict):
        return {
            **item,
            "body": {name: part for name, part in item["body"].items() if name != "model"},
        }
    return {name: part for name, part in item.items() if name != "model"}


def _close(output: _Output, *, whole: bool) -> None:
    try:
        output.close(whole=whole)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise Failure(f"{output.path} cannot be written: {error.strerror or error}") from error


def _say_how_to_go_on(output: _Output) -> None:
    if output.journal is None:
        return
    # Not those handed out: of what was under way more may be there, of what the disk refused less.
    print(
        f"{finished(output.journal):,} answered so far, kept in {output.journal}; "
        "the same command with --resume goes on",
        file=sys.stderr,
    )


def _tell(progress: Any, lines: _Lines, output: _Output) -> None:
    from LLM.prices import dollars_text

    parts = [f"{progress.done - progress.failed:,} answered"]
    if progress.resumed:
        parts[0] += f" ({progress.resumed:,} of them before)"
    if progress.failed:
        parts.append(f"{progress.failed:,} failed")
    if lines.bad:
        parts.append(f"{lines.bad:,} bad lines left out")
    parts.append(f"{progress.tokens:,} tokens")
    if progress.cost is not None:
        parts.append(dollars_text(progress.cost))
    print(f"{', '.join(parts)} in {progress.seconds:.1f} s", file=sys.stderr)
    if progress.failed and output.journal is not None:
        print("the same command with --resume asks again for those that failed", file=sys.stderr)


# What it would cost.


def _estimate(client: Any, lines: _Lines, *, via: str) -> int:
    from LLM.batch import tasks
    from LLM.prices import Pricing, add, dollars_text
    from LLM.providers.targets import find_target
    from LLM.tokens import count_tokens

    prices, config = Pricing(), client.config
    batch = via == "batch"
    items = prompt = 0
    answers: int | None = 0
    cost: Decimal | None = Decimal(0)
    unpriced: set[str] = set()
    exact = True
    for task in tasks(lines):
        if task.error is not None:
            lines.bad += 1
            complain(f"{task.name}: {one_line(str(task.error))}")
            continue
        items += 1
        request = task.request
        target = find_target(config, request.get("model"))
        more = request.get("extra_body", {})
        counted = count_tokens(request["messages"], target.model, tools=request.get("tools"))
        exact = exact and counted.exact
        prompt += counted
        most = more.get("max_completion_tokens") or request.get("max_tokens") or config.max_tokens
        answers = None if answers is None or not isinstance(most, int) else answers + most
        part = prices.worst_case(target.host.name, target.model, counted, most or 0, batch=batch)
        if part is None:
            unpriced.add(target.model)
        cost = None if cost is None or part is None else add(cost, part)
    about = "" if exact else "about "
    print(f"{items:,} items, {about}{prompt:,} tokens of prompts")
    print(
        "answers: "
        + ("no max_tokens bounds them" if answers is None else f"{answers:,} tokens at most")
    )
    if cost is None:
        models = ", ".join(sorted(unpriced))
        print(f"cost: unknown, for the price of {models} is (pip install 'requests-llm[cost]')")
    elif answers is None:
        print(f"cost: {dollars_text(cost)} for the prompts, and that of the answers")
    else:
        print(f"cost: {dollars_text(cost)} at most")
    if lines.bad:
        print(f"{lines.bad:,} bad lines")
    print(f"nothing was sent; without --dry-run, `{program()} batch` sends it", file=sys.stderr)
    return FAILED if lines.bad else OK
