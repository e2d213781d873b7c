"""A real model server for the tests: llama.cpp's, in a process of its own, on 127.0.0.1."""

from __future__ import annotations

import http.client
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit


class LlamaServer:
    """Context manager: a server that answers when the block begins and is gone when it ends.

    ```python
    with LlamaServer(write_tiny_model(tmp_path / "tiny.gguf")) as server:
        LLM(LLMConfig(base_url=server.url, model=server.model))
    ```

    Args:
        model_path: the GGUF file.
        context: tokens of one slot, prompt and answer together; llama.cpp rounds up to a multiple
            of 256. The tiny model has a token for each byte, so 256 is soon too small: that is how
            to provoke `exceed_context_size_error`.
        slots: requests that are answered at the same time; more of them wait.
        max_tokens: bound of an answer when the request gives none: a random model seldom stops by
            itself, and a tool call takes 60 and more.
        alias: the model's name.
        api_key: the key that the server wants; left out, none.
        ping: seconds between the comments in a silent stream; left out, llama.cpp's 30.
        start_timeout: seconds that the start may take. Measured: 0.1 to 0.4 s with the tiny model.

    Raises:
        RuntimeError: from the `with`: the server ended, or did not answer in time; the message
            ends with its log.
    """

    def __init__(
        self,
        model_path: str | Path,
        *,
        context: int = 4096,
        slots: int = 4,
        max_tokens: int = 256,
        alias: str = "tiny",
        api_key: str | None = None,
        ping: int | None = None,
        start_timeout: float = 50.0,
    ) -> None:
        self.model = alias
        self.url = ""  # http://127.0.0.1:PORT inside the block
        self._start_timeout = start_timeout
        self._command = [sys.executable, "-m", "LLM.engine", str(model_path), f"--alias={alias}"]
        self._command += [f"--context={context}", f"--slots={slots}", f"--max-tokens={max_tokens}"]
        if api_key is not None:
            self._command += [f"--api-key={api_key}"]
        if ping is not None:
            self._command += [f"--ping={ping}"]

    def __enter__(self) -> LlamaServer:
        due = time.monotonic() + self._start_timeout
        # Files, not pipes: nobody has to read them for the server to go on.
        self._folder = tempfile.TemporaryDirectory(prefix="llama-server-")
        self._out = Path(self._folder.name, "out")
        self._log = Path(self._folder.name, "log")
        # The pipe to its standard input is never written to: the system closes it when this process
        # is gone, however it ended, and the child takes that as its own end.
        with self._out.open("wb") as out, self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=log,
                # Several servers' threads, each as many as there are cores, would fight over them.
                env={**os.environ, "OMP_THREAD_LIMIT": "1"},
            )
        try:
            while not self._healthy():
                if self._process.poll() is not None:
                    raise RuntimeError(
                        f"the server ended with {self._process.returncode}:\n{self.log()}"
                    )
                if time.monotonic() > due:
                    raise RuntimeError(f"no server after {self._start_timeout} s:\n{self.log()}")
                time.sleep(0.01)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # nothing to save: its state is the model file, which it only reads
        self._process.communicate()
        self._folder.cleanup()

    @property
    def pid(self) -> int:
        return self._process.pid

    def log(self) -> str:
        """The last 4 KB of what the server wrote to stderr."""
        return self._log.read_text(errors="replace")[-4096:]

    def _healthy(self) -> bool:
        self.url, newline, _ = self._out.read_text().partition("\n")
        if not newline:
            return False
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=10)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()
