"""What a user installs: the right files, and few others' packages."""

import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGES = ("LLM", "agents")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: building leaves files behind, and other tests read the tree meanwhile."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in (*PACKAGES, "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", copy / "dist"],
        cwd=copy, check=True, capture_output=True,
    )  # fmt: skip
    (built,) = (copy / "dist").glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        yield archive


def test_the_wheel_holds_every_file_of_the_packages_and_no_other(wheel):
    """Pages, data and `py.typed` too; no tests."""
    of_the_tree = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    of_the_wheel = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert of_the_wheel == of_the_tree
    assert {"LLM/py.typed", "agents/py.typed"} <= of_the_wheel


def test_the_wheel_says_what_it_is(wheel):
    import LLM

    (metadata,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    assert metadata == f"requests_llm-{LLM.__version__}.dist-info/METADATA"
    text = wheel.read(metadata).decode()
    assert "\nRequires-Python: >=3.10\n" in text
    assert "\nLicense-Expression: MIT\n" in text
    assert any(name.endswith("/licenses/LICENSE") for name in wheel.namelist())


def closure(name, seen):
    """All distributions that installing `name` without extras brings along, itself included."""
    name = canonicalize_name(name)
    if name not in seen:
        seen[name] = distribution(name)
        for line in seen[name].requires or ():
            requirement = Requirement(line)
            if not requirement.marker or requirement.marker.evaluate({"extra": ""}):
                closure(requirement.name, seen)
    return seen


def test_the_installed_core_is_light(wheel):
    """At most ten other packages; with our own files, the service and its page among them, at most 16 MB."""
    others = closure("requests-llm", {})
    del others["requests-llm"]  # installed editable here, so the wheel tells its size
    assert len(others) <= 10, sorted(others)
    # As they lie on the disk, with the bytecode that installing them has written.
    files = [Path(file.locate()) for other in others.values() for file in other.files]
    sizes = [file.stat().st_size for file in files if file.is_file()]
    sizes += [file.file_size for file in wheel.infolist()]
    assert sum(sizes) <= 16_000_000
