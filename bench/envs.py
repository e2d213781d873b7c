"""One virtual environment for each client, under `.venv-bench/`, made once and kept.

The environments have no pip of their own, so that all they hold is what the client brings along. A
stamp file says what was installed; ours is stamped with a digest of its sources and installed anew
when they change.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
HOME = REPOSITORY / ".venv-bench"
INSTALL_SECONDS = 600
# Neither installed nor able to change what is.
NOT_SOURCE = shutil.ignore_patterns(
    ".*", "build", "dist", "*.egg-info", "__pycache__", "tests", "docs", "bench", "node_modules"
)


class NotInstalled(Exception):
    """A client's environment could not be made; the message is one line."""


def python_of(home: Path) -> Path:
    return home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def prepare(name: str, requirement: str | None, upgrade: bool = False) -> str:
    """The interpreter of the environment of client `name`, made and filled as needed.

    Args:
        name: the client; also the name of the folder.
        requirement: what pip is asked to install; `None` installs nothing, `"."` this repository.
        upgrade: make it anew even if it is there.

    Raises:
        NotInstalled: pip failed, or took longer than INSTALL_SECONDS.
    """
    home = HOME / name
    stamp = home / "stamp"
    wanted = f"{requirement} on Python {sys.version.split()[0]}"
    if requirement == ".":
        wanted += f" {digest()}"
    if stamp.is_file() and stamp.read_text() == wanted and not upgrade:
        return str(python_of(home))
    try:
        run(sys.executable, "-m", "venv", "--clear", "--without-pip", str(home))
        if requirement:
            with tempfile.TemporaryDirectory() as folder:
                # Built from a copy: setuptools leaves a build folder behind, and would install what
                # is in it.
                source = shutil.copytree(REPOSITORY, Path(folder, "source"), ignore=NOT_SOURCE)
                target = str(source) if requirement == "." else requirement
                run(
                    str(installer()),
                    "-m",
                    "pip",
                    "--python",
                    str(python_of(home)),
                    "install",
                    "--quiet",
                    target,
                )
    except subprocess.CalledProcessError as error:
        lines = [
            line
            for line in (error.stderr or "").splitlines()
            if "Error: " in line or "ERROR: " in line
        ]
        raise NotInstalled(
            lines[-1].strip()[:200] if lines else f"pip ended with {error.returncode}"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise NotInstalled(f"not done after {INSTALL_SECONDS} s") from error
    stamp.write_text(wanted)
    return str(python_of(home))


def installer() -> Path:
    """An interpreter with a pip that can install into other environments (22.3 or newer)."""
    home = HOME / ".installer"
    if not (home / "stamp").is_file():
        run(sys.executable, "-m", "venv", "--clear", str(home))
        run(str(python_of(home)), "-m", "pip", "install", "--quiet", "pip>=22.3")
        (home / "stamp").touch()
    return python_of(home)


def run(*command: str) -> str:
    done = subprocess.run(
        command,
        cwd=REPOSITORY.parent,
        check=True,
        capture_output=True,
        text=True,
        timeout=INSTALL_SECONDS,
    )
    return done.stdout


def digest() -> str:
    """Of all that an installation of this repository is made from."""
    total = hashlib.sha256()
    for path in sorted(
        [
            *REPOSITORY.glob("*.toml"),
            *REPOSITORY.glob("LLM/**/*.py"),
            *REPOSITORY.glob("agents/**/*"),
        ]
    ):
        if path.is_file() and path.suffix != ".pyc":
            total.update(str(path.relative_to(REPOSITORY)).encode() + path.read_bytes())
    return total.hexdigest()[:16]


def version(python: str, name: str) -> str:
    """The installed version of a client; that of Python itself for one of its own modules."""
    source = f"from importlib.metadata import version; print(version({name!r}))"
    if name == "http.client":
        source = "import platform; print('Python', platform.python_version())"
    try:
        return run(python, "-s", "-c", source).strip()
    except subprocess.SubprocessError:
        return "?"
