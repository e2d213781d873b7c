"""llama.cpp's own HTTP server on a GGUF file, from the wheel `xllamacpp` (extra `local`), in this process.

`python -m LLM.engine MODEL.gguf` prints its address in one line, then serves until its standard
input ends. It is native code: a fault in it ends the process, so nothing that matters to anybody
else belongs in the same one.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any


def serve_gguf(
    path: str | Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    alias: str | None = None,
    context: int | None = None,
    slots: int = 1,
    max_tokens: int | None = None,
    api_key: str | None = None,
    ping: int | None = None,
) -> Any:
    """Load `path` and serve it; when this returns, it answers requests in threads of its own.

    Args:
        path: the GGUF file.
        host: address to listen on.
        port: 0 takes a free one; the server's `listening_address` says which.
        alias: the name that `/v1/models` and the answers give the model; left out, the file's name.
        context: tokens that one conversation can hold, prompt and answer together; left out, what
            the model was trained for, divided among the slots.
        slots: conversations that are served at the same time; memory grows with `slots × context`.
        max_tokens: bound of an answer when the request gives none; left out, the context is it.
        api_key: left out, everybody may ask.
        ping: seconds of silence in a stream after which a comment is sent; left out, llama.cpp's.

    Returns:
        The `xllamacpp.Server`. It stops when this object is deleted or the process ends.

    Raises:
        FileNotFoundError: there is no such file.
        RuntimeError: the file could not be loaded or the port opened; the log on stderr says why.
    """
    try:
        import xllamacpp  # 100 MB of native code: only for those who serve
    except ImportError:
        raise RuntimeError("serving a GGUF file needs xllamacpp: pip install xllamacpp") from None

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such model file: {path}")
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.model_alias = {alias or path.stem}
    params.hostnames = [host]  # one `hostname` in older versions of the wheel
    params.port = port
    params.n_parallel = slots
    # llama.cpp divides it among the slots; 0 is the model's own
    params.n_ctx = slots * (context or 0)
    params.n_predict = max_tokens or -1
    params.api_keys = [api_key] if api_key else []
    params.use_jinja = True  # the model's own chat template: without it there are no tool calls
    params.ui = False  # an API, no web page
    # No page of the web may talk to it through a person's browser.
    params.cors_origins = f"http://{host}:{port}"
    if ping is not None:
        params.sse_ping_interval = ping
    return xllamacpp.Server(params)


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve a GGUF file until standard input ends.")
    parser.add_argument("path")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--alias")
    parser.add_argument("--context", type=int)
    parser.add_argument("--slots", type=int, default=1)
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--api-key")
    parser.add_argument("--ping", type=int)
    server = serve_gguf(**vars(parser.parse_args()))
    print(server.listening_address, flush=True)
    sys.stdin.buffer.read()  # the parent never writes: this returns when it is gone
    os._exit(0)  # no unwinding of native threads that may be in the middle of an answer


if __name__ == "__main__":
    main()
