"""The numbers that Prometheus reads."""

import os
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from agents.service.metrics import Metrics
from LLM import TokenUsage

ROOT = Path(__file__).parents[2]


def read(text):
    """Each sample by its name and labels."""
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.fixture
def metrics():
    return Metrics()


def samples(metrics):
    return read(metrics.render()[0].decode())


def test_requests_are_counted_by_route_and_timed(metrics):
    metrics.observe_request("GET", "/conversations/{id}", 200, 0.03)
    metrics.observe_request("GET", "/conversations/{id}", 200, 0.3)
    metrics.observe_request("GET", "/conversations/{id}", 404, 0.001)
    found = samples(metrics)
    assert found["agents_requests_total", "/conversations/{id}", "200", "GET"] == 2
    assert found["agents_requests_total", "/conversations/{id}", "404", "GET"] == 1
    assert found["agents_request_seconds_count", "/conversations/{id}", "GET"] == 3
    assert found["agents_request_seconds_sum", "/conversations/{id}", "GET"] == pytest.approx(0.331)


def test_a_method_of_somebody_s_own_makes_no_label(metrics):
    for number in range(100):
        metrics.observe_request(f"X{number}", "other", 405, 0)
    assert samples(metrics)["agents_requests_total", "405", "other", "other"] == 100
    assert b"X1" not in metrics.render()[0]


def test_answers_are_counted_with_their_tokens_and_cost(metrics):
    metrics.answer_began()
    metrics.answer_began()
    assert samples(metrics)["agents_answers_running",] == 2
    metrics.first_token(0.3)
    usage = TokenUsage(prompt_tokens=10, completion_tokens=4, cached_tokens=3)
    metrics.answer_ended("ok", usage, Decimal("0.25"))
    metrics.answer_ended("partial")
    found = samples(metrics)
    assert found["agents_answers_running",] == 0
    assert found["agents_answers_total", "ok"] == 1
    assert found["agents_answers_total", "partial"] == 1
    assert found["agents_answers_total", "error"] == 0
    assert found["agents_tokens_total", "prompt"] == 10
    assert found["agents_tokens_total", "completion"] == 4
    assert found["agents_tokens_total", "cached"] == 3
    assert found["agents_cost_dollars_total",] == 0.25
    assert found["agents_answers_unpriced_total",] == 1
    assert found["agents_first_token_seconds_count",] == 1


def test_two_applications_in_one_process_count_apart(metrics):
    metrics.answer_began()
    assert samples(Metrics())["agents_answers_running",] == 0


def test_what_is_rendered_says_what_it_is(metrics):
    _, kind = metrics.render()
    assert kind.startswith("text/plain; version=")


COUNTING = """
import os, sys
from agents.service.metrics import Metrics
metrics = Metrics()
metrics.observe_request("GET", "/x", 200, 0.1)
metrics.answer_began()
if sys.argv[1:]:
    sys.stdout.buffer.write(metrics.render()[0])
    sys.stdout.flush()
elif os.fork() == 0:  # no longer there when the other one looks
    metrics.answer_began()
    os._exit(0)
else:
    os.wait()
    os._exit(0)
"""


def test_processes_count_together_and_one_that_died_has_no_answers_under_way(tmp_path):
    def count(*argv):
        return subprocess.run(
            [sys.executable, "-c", COUNTING, *argv],
            env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)},
            cwd=ROOT, check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip

    count()
    found = read(count("render"))
    assert found["agents_requests_total", "/x", "200", "GET"] == 2
    assert found["agents_answers_running",] == 1
