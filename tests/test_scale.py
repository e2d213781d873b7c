"""docs/scale.md says what its simulation says, and the simulation what arithmetic and measurements say."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def scale():
    spec = importlib.util.spec_from_file_location("scale", ROOT / "bench" / "scale.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["scale"] = module  # where a dataclass looks itself up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["scale"]


def test_the_page_has_the_tables_of_the_script(scale):
    text = scale.PAGE.read_text("utf-8")
    assert scale.page(text) == text, "run python bench/scale.py --write"


@pytest.mark.parametrize("number", range(10))
def test_no_simulated_rate_is_above_its_wall(scale, number):
    setup = scale.SETUPS[number]
    wall = setup.walls[setup.wall]
    rate = scale.simulate(setup, 240 if setup.wall.endswith("minute") else 16)
    assert wall * 0.9 <= rate <= wall * 1.05


def test_all_setups_are_looked_at(scale):
    assert len(scale.SETUPS) == 10


def test_what_was_measured_is_near_what_is_simulated(scale):
    for setup, measured in scale.MEASURED:
        assert 0.6 <= measured / scale.simulate(setup, 4) <= 1.1, setup.name


def test_the_measurement_is_that_of_the_benchmarks(scale):
    text = (ROOT / "docs" / "benchmarks.md").read_text("utf-8")
    (found,) = re.findall(r"32 threads on one client: calls per second \| ([\d,]+)/s", text)
    assert float(found.replace(",", "")) == pytest.approx(1 / scale.WORKER, rel=0.25)
