"""The loop against llama.cpp's own server: a model of random weights, which is the worst of all models."""

import pytest
from pydantic import BaseModel

from agents.agent import Agent
from agents.calculator import calculator
from agents.tools import tool
from LLM import LLM, LLMError, LLMOutputError
from tests.engine.llama_server import LlamaServer
from tests.engine.tiny_model import write_tiny_model

pytest.importorskip("xllamacpp")


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    model = write_tiny_model(tmp_path_factory.mktemp("engine") / "tiny.gguf")
    with LlamaServer(model) as running:
        yield running


@tool(effect="read")
def weather(city: str) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


class City(BaseModel):
    name: str
    people: int


@pytest.mark.parametrize("provider", ["openai-compatible", "anthropic"])
def test_even_nonsense_ends(engine, provider):
    """Forced to call a tool in each turn, a model that knows nothing comes to a limit or to a circle."""
    options = {"base_url": engine.url, "provider": provider, "model": "tiny", "timeout": 20}
    with LLM(**options, temperature=0, max_tokens=256, max_retries=0) as llm:
        agent = Agent(llm, tools=[weather, calculator], tool_choice="required", max_turns=4)
        try:
            result = agent.run("What is 5 x 3, and how is the weather in Rome?")
        except LLMError as error:
            result = error.result
    assert 1 <= len(result.turns) <= 4
    called = [r.call.name for turn in result.turns for r in turn.results]
    assert set(called) <= {"weather", "calculator"}
    assert result.usage.total_tokens > 0


@pytest.mark.parametrize("provider", ["openai-compatible", "anthropic"])
def test_an_answer_of_a_type_is_one_or_is_said_not_to_be(engine, provider):
    options = {"base_url": engine.url, "provider": provider, "model": "tiny", "timeout": 20}
    with LLM(**options, temperature=0, max_tokens=64, max_retries=0) as llm:
        try:
            result = Agent(llm, output_type=City).run("Rome?")
        except LLMOutputError as error:
            assert error.reason in ("cut", "invalid")
            assert error.result.turns
        else:
            assert isinstance(result.output, City)
