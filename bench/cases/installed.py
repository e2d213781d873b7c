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
# The sizes of the files: what they take on a disk depends on its blocks.
print(len(list(distributions(path=list(folders)))), sum(os.stat(file).st_size for file in files))
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
            Measure("bytes", "size of all files", "MB"),
        ),
        "A fresh environment with nothing but `pip install NAME`: packages besides itself, and the "
        "sizes of all files together, with the byte code that pip writes.",
        (Goal("packages", 10), Goal("bytes", 15e6)),
        clients=tuple(name for name in CLIENTS if name != "http.client"),
        rounds=0,
        in_parent=True,
    ),
)
