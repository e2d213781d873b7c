"""What an installation brings along."""

from __future__ import annotations

import subprocess

from clients import CLIENTS
from figure import Figure, Goal, Job, Measure, environment

COUNT = """
import os, sysconfig
from importlib.metadata import distributions
folders = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
walked = [found for folder in folders for found in os.walk(folder)]
files = [os.path.join(at, name) for at, _, names in walked for name in names]
# What it takes on disk, as `du` counts: blocks of 512 bytes.
stats = [os.stat(file) for file in files]
size = sum(getattr(s, "st_blocks", -(-s.st_size // 4096) * 8) * 512 for s in stats)
print(len(list(distributions(path=list(folders)))), size)
"""


def installed(job: Job) -> dict[str, float]:
    done = subprocess.run(
        [job.python, "-s", "-c", COUNT],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env=environment(),
    )
    packages, size = map(int, done.stdout.split())
    return {"packages": packages - 1, "bytes": size}


FIGURES = (
    Figure(
        "installed",
        "installed core",
        installed,
        (
            Measure("packages", "packages it brings along", ""),
            Measure("bytes", "size on disk", "MB"),
        ),
        "A fresh environment with nothing but `pip install NAME`: packages besides itself, and the "
        "space on disk "
        "of all files, with the byte code that pip writes.",
        (Goal("packages", 10), Goal("bytes", 15e6)),
        clients=tuple(name for name in CLIENTS if name != "http.client"),
        rounds=0,
        in_parent=True,
    ),
)
