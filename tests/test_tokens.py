"""Counting tokens: exact where it is said to be, honest where it is not, and never over the network."""

import base64
import copy
import gzip
import importlib.util
import json
import pickle
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import LLM.tokens as module
from LLM.errors import LLMConfigError
from LLM.tokens import TokenCount, TokenEstimator, context_window, count_tokens
from LLM.types import Message, ToolCall
from tests.fakes import needs_price_data

TEXTS = sorted((Path(__file__).parent / "data" / "tokens").glob("*.txt"))

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Name of the city"},
                "unit": {"type": "string", "enum": ["c", "f"]},
                "days": {"type": "array", "items": {"type": "integer"}},
                "place": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                "more": {"type": "object", "properties": {"x": {}}},
                "odd": "no schema",
            },
            "required": ["city"],
        },
    },
}


def user(content, **fields):
    return {"role": "user", "content": content, **fields}


@pytest.fixture
def fresh():
    """What was loaded before does not count, nor does what the test loads."""
    module._load.cache_clear()
    yield
    module._load.cache_clear()


# --- exact ---


@pytest.mark.parametrize(
    "model, text, tokens",
    [
        ("gpt-4o", "", 0),
        ("gpt-4o", "Hello, world!", 4),
        ("gpt-4", "Hello, world!", 4),
        ("gpt-4o", "Привет, мир!", 5),
        ("gpt-4", "Привет, мир!", 7),
        ("gpt-4o", "<|endoftext|>", 7),  # a text, not the sign that it looks like
        ("gpt-5-mini", "Hello, world!", 4),
        ("openrouter/openai/gpt-4o", "Hello, world!", 4),
        ("openai/gpt-oss-20b:free", "Hello, world!", 4),
        ("text-embedding-3-small", "Hello, world!", 4),
        ("ft:gpt-4o-mini:org::id", "Hello, world!", 4),
    ],
)
def test_plain_text_is_counted_exactly(model, text, tokens):
    counted = count_tokens(text, model)
    assert (counted, counted.exact, counted.upper, counted.unknown) == (tokens, True, tokens, ())
    assert counted.method.startswith("tiktoken ")


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
@pytest.mark.parametrize("model, name", [("gpt-4o", "o200k_base"), ("gpt-4", "cl100k_base")])
def test_a_count_is_what_tiktoken_counts(path, model, name):
    text = path.read_text(encoding="utf-8")
    assert count_tokens(text, model) == len(module._load(name).encode(text, disallowed_special=()))


def test_a_chat_has_the_published_tokens_beside_its_text():
    chat = [Message(role="system", content="Be brief."), user("Hello, world!", name="ada")]
    counted = count_tokens(chat, "gpt-4o")
    texts = sum(
        count_tokens(text) for text in ("system", "Be brief.", "user", "Hello, world!", "ada")
    )
    assert counted.exact
    assert counted == texts + 2 * 3 + 1 + 3
    assert count_tokens(chat[1], "gpt-4") == count_tokens([chat[1]], "gpt-4")
    assert count_tokens(tuple(chat), "gpt-4o") == counted


@pytest.mark.parametrize("model", ["gpt-5", "o3", "gpt-4.1", "gpt-oss-20b", "gpt-3.5-turbo-0301"])
def test_a_chat_whose_form_is_not_published_is_not_called_exact(model):
    counted = count_tokens([user("Hello")], model)
    assert not counted.exact
    assert counted.method.startswith("tiktoken ")
    assert counted.upper > counted > 0


@pytest.mark.parametrize(
    "message",
    [
        {"role": "tool", "content": "18 degrees", "tool_call_id": "c1"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": {}}},
        user([{"type": "input_audio", "input_audio": {"data": ""}}]),
        user([{"type": "text", "text": "one of two"}, {"type": "text", "text": "parts"}]),
    ],
)
def test_nothing_beyond_text_is_called_exact(message):
    assert not count_tokens([user("Hello"), message], "gpt-4o").exact


def test_a_list_of_prompts_is_the_sum_of_them():
    prompts = ["Hello, world!", "Good night."]
    assert count_tokens(prompts) == sum(map(count_tokens, prompts))


def test_a_text_that_tiktoken_cannot_take_is_estimated():
    """A million blanks overflow the stack of its regular expressions: a panic, not an exception."""
    counted = count_tokens("a" + "\t" * 1_000_000)
    assert not counted.exact
    assert counted <= 1_000_000
    assert counted.upper >= 62_500


@pytest.mark.parametrize("piece", ["a", "中", ".", "aA", " a"])
def test_long_monotony_is_counted_in_time(piece):
    assert count_tokens(piece * 100_000).exact


def test_a_panic_of_tiktoken_is_survived_and_an_interrupt_is_not():
    class Encoding:
        def encode_ordinary(self, text):
            raise type("PanicException" if text == "x" else "Interrupt", (BaseException,), {})

    assert module._tokens(Encoding(), "x") is None
    try:
        module._tokens(Encoding(), "y")
    except BaseException as error:
        assert type(error).__name__ == "Interrupt"
    else:
        pytest.fail("the interrupt was swallowed")


# --- no vocabulary ---


def test_nothing_is_fetched_and_nothing_heavy_imported():
    code = (
        "import sys\n"
        "from LLM.tokens import count_tokens\n"
        "import requests\n"
        "def fetched(*_, **__): raise SystemExit('fetched')\n"
        "requests.get = requests.Session.request = fetched\n"
        "assert 'tiktoken' not in sys.modules\n"
        "assert count_tokens('Hello', 'gpt-4o').exact and count_tokens('Hello', 'gpt-4').exact\n"
        "assert not count_tokens('Hello', 'gpt2').exact\n"
        "assert not count_tokens('Hello', 'davinci').exact\n"
        "assert not any(name.startswith('bpe') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.fixture
def no_package(monkeypatch, tmp_path, fresh):
    """Without the package that carries the vocabularies, and with an empty cache of tiktoken's."""
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name.startswith("bpe") else real(name)
    )
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    return tmp_path


def test_without_a_vocabulary_it_is_an_estimate_that_says_so(no_package):
    counted = count_tokens("Hello, world!", "gpt-4o")
    assert not counted.exact
    assert counted.method.startswith("estimate: no intact vocabulary o200k_base")
    assert list(no_package.iterdir()) == []


def test_a_vocabulary_in_tiktokens_cache_is_used(no_package):
    import hashlib

    folder = Path(sys.modules["tiktoken"].__file__).parent.parent / "bpe_openai" / "data"
    data = gzip.decompress((folder / "cl100k_base.tiktoken.gz").read_bytes())
    url = "https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken"
    (no_package / hashlib.sha1(url.encode()).hexdigest()).write_bytes(data)
    assert count_tokens("Hello, world!", "gpt-4").exact


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: gzip.compress(gzip.decompress(data)[:-9]),
        lambda data: data[:1000],
        lambda data: b"not gzip at all",
    ],
)
def test_a_damaged_vocabulary_is_refused(monkeypatch, tmp_path, fresh, damage):
    real = importlib.util.find_spec("bpe_openai")
    original = Path(real.submodule_search_locations[0], "data", "cl100k_base.tiktoken.gz")
    package = tmp_path / "bpe_openai"
    (package / "data").mkdir(parents=True)
    (package / "data" / original.name).write_bytes(damage(original.read_bytes()))
    spec = importlib.util.spec_from_loader("bpe_openai", None, is_package=True)
    spec.submodule_search_locations = [str(package)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "none"))
    counted = count_tokens("Hello, world!", "gpt-4")
    assert not counted.exact
    assert "cl100k_base" in counted.method
    assert "sha256" in counted.method


def test_a_vocabulary_without_a_hash_is_refused():
    with pytest.raises(LookupError):
        module._vocabulary("https://host.invalid/new.tiktoken")


def test_another_tiktoken_that_fails_is_an_estimate(monkeypatch, fresh):
    import tiktoken.registry

    monkeypatch.setattr(tiktoken.registry, "ENCODING_CONSTRUCTORS", {})
    assert count_tokens("Hello", "gpt-4o").method.startswith("estimate: no intact vocabulary")


def test_without_the_extra_it_is_an_estimate_that_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken.model", None)
    counted = count_tokens("Hello, world!", "gpt-4o")
    assert counted.method == "estimate: the extra [tokens] is not installed"
    assert 0 < counted <= counted.upper


@pytest.mark.parametrize(
    "model", ["claude-sonnet-4-5", "llama-3", "someone/gpt-4-x", "gpt-9", "gpt2"]
)
def test_a_vocabulary_that_is_not_public_is_estimated(model):
    counted = count_tokens("Hello, world!", model)
    assert not counted.exact
    assert counted.method == f"estimate: no vocabulary known for {model}"


@needs_price_data
@pytest.mark.parametrize(
    "model",
    ["GPT-4o", "OpenAI/GPT-4o", "openrouter/OpenAI/gpt-4o", "azure/gpt-4o", "Azure/openai/GPT-4O"],
)
def test_a_name_is_known_however_it_is_written(model):
    counted = count_tokens("Hello, world!", model)
    assert (counted, counted.exact, counted.method) == (4, True, "tiktoken o200k_base")
    assert count_tokens([user("Hello")], model).exact
    assert context_window(model) == 128_000


def test_azures_own_name_of_an_old_model_is_known():
    assert count_tokens([user("Hello")], "azure/gpt-35-turbo").method == "tiktoken cl100k_base"
    assert count_tokens([user("Hello")], "azure/gpt-35-turbo").exact


# --- estimates ---


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
@pytest.mark.parametrize("model", ["gpt-4o", "gpt-4"])
def test_an_estimate_is_as_good_as_documented(path, model):
    text = path.read_text(encoding="utf-8")
    real = count_tokens(text, model)
    guess = TokenEstimator().count(text, model)
    assert abs(guess / real - 1) <= 0.25
    assert real <= guess.upper


@pytest.mark.parametrize("model", ["gpt-4o", "gpt-4"])
def test_estimates_are_good_on_average(model):
    errors = []
    for path in TEXTS:
        text = path.read_text(encoding="utf-8")
        errors.append(abs(TokenEstimator().count(text, model) / count_tokens(text, model) - 1))
    assert sum(errors) / len(errors) <= 0.1


@given(st.text(max_size=300))
def test_any_text_has_an_estimate_within_its_bytes(text):
    counted = TokenEstimator().count(text)
    size = len(text.encode("utf-8", "surrogatepass"))
    assert min(size, 1) <= counted <= counted.upper <= size


@given(st.text(alphabet="ab zX09.\n\té中", max_size=200), st.text(alphabet="ab 9.", max_size=50))
def test_more_text_is_never_fewer_tokens(text, more):
    """But for what grows together at the seam."""
    estimator = TokenEstimator()
    assert estimator.count(f"{text}\n{more}") >= estimator.count(text) - 2


def test_lone_surrogates_are_counted():
    assert count_tokens("a\ud800b") > 0
    assert TokenEstimator().count("a\ud800b") > 0


def test_the_longest_text_is_estimated_within_its_bytes():
    counted = TokenEstimator().count("\n" * 1_000_000)
    assert 62_500 <= counted.upper <= 1_000_000


def test_an_estimator_counts_exactly_only_when_told():
    estimator = TokenEstimator()
    assert not estimator.count("Hello, world!").exact
    assert estimator.count("Hello, world!", exact=True).exact
    assert not estimator.count("Hello, world!", "claude-3", exact=True).exact
    assert not estimator.count([user("Hello")], "gpt-5", exact=True).exact


# --- learning ---


def test_an_estimator_learns_from_usage():
    estimator = TokenEstimator()
    text = "The sea is warm. " * 200
    before = estimator.count(text, "claude-x")
    for _ in range(20):
        estimator.learn("claude-x", estimator.count(text, "claude-x"), int(before * 1.4))
    after = estimator.count(text, "claude-x")
    assert after == pytest.approx(before * 1.4, rel=0.03)
    assert after.upper > before.upper
    assert estimator.count(text, "llama-x") == before
    assert estimator.ratio("claude-x") == pytest.approx(1.4, rel=0.03)
    assert estimator.ratio("llama-x") == estimator.ratio("never seen") == 1.0


def test_plain_numbers_teach_too():
    estimator = TokenEstimator()
    for _ in range(20):
        estimator.learn("m", int(1000 * estimator.ratio("m")), 800)
    assert estimator.ratio("m") == pytest.approx(0.8, rel=0.03)


def test_a_smaller_ratio_lowers_the_estimate_and_not_the_bound():
    estimator = TokenEstimator()
    text = "The sea is warm. " * 200
    before = estimator.count(text, "m")
    estimator.learn("m", before, int(before * 0.7))
    after = estimator.count(text, "m")
    assert after < before
    assert after.upper == before.upper


@given(st.lists(st.tuples(st.integers(1, 10**6), st.integers(1, 10**6)), max_size=40))
def test_the_ratio_stays_sane(answers):
    estimator = TokenEstimator()
    for estimated, real in answers:
        estimator.learn("m", estimated, real)
    assert 0.25 <= estimator.ratio("m") <= 4


def test_one_wild_answer_moves_little():
    estimator = TokenEstimator()
    for _ in range(20):
        estimator.learn("m", 1000, 1000)
    estimator.learn("m", 1000, 10**9)
    assert estimator.ratio("m") < 1.05


@pytest.mark.parametrize(
    "estimated, real",
    [
        (0, 10),
        (10, 0),
        (None, 10),
        (10, None),
        (TokenCount(10, exact=True), 20),
        (TokenCount(10, unknown=("messages[0]: image",)), 20),
    ],
)
def test_what_cannot_teach_is_ignored(estimated, real):
    estimator = TokenEstimator()
    estimator.learn("m", estimated, real)
    assert estimator.ratio("m") == 1.0


def test_an_estimator_forgets_the_oldest_model():
    estimator = TokenEstimator()
    estimator.learn("first", 1000, 2000)
    for number in range(300):
        estimator.count("Hello", f"model-{number}")
    assert estimator.ratio("first") == 1.0
    assert len(estimator._models) == 256


def test_threads_share_an_estimator():
    estimator = TokenEstimator()

    def work():
        for number in range(300):
            estimator.learn(f"m{number % 300}", estimator.count("Hello " * 50, f"m{number}"), 100)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(estimator._models) == 256


def test_a_fork_in_the_middle_of_learning_leaves_no_lock():
    estimator = TokenEstimator()
    with estimator._lock:
        estimator.after_fork()
        estimator.learn("m", 100, 100)


# --- images, audio, files ---


def png(width, height):
    return b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + struct.pack(">II", width, height) + b"\x08\x06"


def jpeg(width, height, before=b""):
    frame = b"\xff\xc0\x00\x11\x08" + struct.pack(">HH", height, width) + b"\x03"
    return b"\xff\xd8" + before + frame + b"\x00" * 12


def segment(size):
    return b"\xff\xe1" + struct.pack(">H", size + 2) + b"\x00" * size


def webp(kind, body):
    return b"RIFF\x00\x00\x00\x00WEBP" + kind + b"\x00\x00\x00\x00" + body


def data_url(data, kind="png"):
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def image(url, **fields):
    return user([{"type": "image_url", "image_url": {"url": url, **fields}}])


IMAGES = {
    "png": png(640, 480),
    "gif": b"GIF89a" + struct.pack("<HH", 640, 480),
    "jpeg": jpeg(640, 480),
    "jpeg with a profile": jpeg(640, 480, b"\xff" + segment(60_000) + segment(5)),
    "webp lossy": webp(b"VP8 ", b"\x00" * 6 + struct.pack("<HH", 640, 480)),
    "webp lossless": webp(b"VP8L", b"\x2f" + struct.pack("<I", 639 | 479 << 14)),
    "webp extended": webp(b"VP8X", b"\x00" * 4 + b"\x7f\x02\x00" + b"\xdf\x01\x00"),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_an_images_size_is_read_from_its_header(kind):
    assert module._image_size(data_url(IMAGES[kind])) == (640, 480)


@pytest.mark.parametrize(
    "url",
    [
        None,
        7,
        "https://host.invalid/a.png",
        "data:image/png,plain",
        "data:image/png;base64",
        "data:image/png;base64,A",
        "data:image/png;base64,####",
        data_url(b"no image"),
        data_url(b"RIFF\x00\x00\x00\x00WEBPVP9 " + b"\x00" * 20),
        data_url(png(0, 5)),
        data_url(b"\xff\xd8\xff\xc4\x00\x04\x00\x00\x00\x00\x00\x00"),
    ],
)
def test_an_unreadable_image_has_no_size(url):
    assert module._image_size(url) is None


@pytest.mark.parametrize(
    "model, size, tokens",
    [
        ("gpt-4o", (1024, 1024), 765),  # the documented examples
        ("gpt-4o", (2048, 4096), 1105),
        ("gpt-4.1-mini", (1024, 1024), 1659),
        ("gpt-4.1-mini", (1800, 2400), 2353),  # 1452 squares × 1.62
        ("gpt-4o-mini", (512, 512), 2833 + 5667),
        ("o1", (512, 512), 225),
        ("gpt-5", (512, 512), 210),
        ("claude-sonnet-4-5", (1092, 1092), 1521),
        ("claude-sonnet-4-5", (3000, 2000), 1600),
        ("claude-opus-4-7", (2576, 1449), 4784),
        ("anthropic/claude-3-haiku", (28, 28), 1),
    ],
)
def test_images_cost_what_their_vendor_says(model, size, tokens):
    without = count_tokens(user([]), model)
    counted = count_tokens(image(data_url(png(*size))), model)
    assert counted - without == tokens
    assert (counted.exact, counted.unknown) == (False, ())
    assert counted.upper >= counted


@given(st.integers(1, 20_000), st.integers(1, 20_000))
def test_no_image_costs_more_than_the_documented_maximum(width, height):
    for _, images in module._IMAGES:
        assert 0 < images.tokens(width, height) <= images.maximum


def test_an_image_of_low_detail_costs_the_same_whatever_its_size():
    counted = count_tokens(image("https://host.invalid/a.png", detail="low"), "gpt-4o")
    assert counted - count_tokens(user([]), "gpt-4o") == 85
    assert counted.unknown == ()


@pytest.mark.parametrize(
    "model, most", [("gpt-4o", 1445), ("claude-opus-4-7", 4784), ("llama-3-vision", 10_000)]
)
def test_an_image_of_unknown_size_is_said_to_be_unknown_and_bounded(model, most):
    for remote in (
        image("https://host.invalid/a.png"),
        user([{"type": "image_url", "image_url": "https://host.invalid/a.png"}]),
        user([{"type": "image", "source": {"type": "url", "url": "https://host.invalid/a.png"}}]),
    ):
        counted = count_tokens([user("Look:"), remote], model)
        without = count_tokens([user("Look:"), user([])], model)
        assert counted.unknown == ("messages[1]: image",)
        assert counted == without
        assert counted.upper >= without + most


def test_an_image_in_anthropics_form_is_counted():
    part = {"type": "image", "source": {"data": base64.b64encode(png(28, 56)).decode()}}
    with_image = count_tokens(user([part]), "claude-3-haiku")
    assert with_image == count_tokens(user([]), "claude-3-haiku") + 2


@pytest.mark.parametrize(
    "part, name",
    [
        ({"type": "input_audio", "input_audio": {}}, "input_audio"),
        ({"type": "file", "file": {}}, "file"),
        ({"type": "text", "text": 7}, "text"),
        ({}, "part without a type"),
        (7, "int"),
    ],
)
def test_what_cannot_be_counted_is_named(part, name):
    counted = count_tokens([user("Hello"), user([part])])
    assert counted.unknown == (f"messages[1]: {name}",)


def test_audio_that_a_model_said_is_named():
    said = {"role": "assistant", "content": None, "audio": {"id": "a1"}}
    assert count_tokens([said]).unknown == ("messages[0]: audio",)
    assert count_tokens([Message(**said)]).unknown == ("messages[0]: audio",)


def test_all_parts_of_text_count():
    text = user([{"type": "text", "text": "Hello, "}, "world!"])
    assert count_tokens(text) == count_tokens(user("Hello, ")) + count_tokens("world!")
    result = user([{"type": "tool_result", "content": "18 degrees"}, {"type": "tool_result"}])
    assert count_tokens(result, "claude-3") > count_tokens(user([]), "claude-3")
    refusal = {"role": "assistant", "refusal": "I cannot help with that."}
    assert count_tokens(refusal) > count_tokens({"role": "assistant"})


class Text(str):
    """As a template engine returns it."""

    __slots__ = ()


def test_a_kind_of_string_is_text():
    assert count_tokens(user(Text("Hello"))) == count_tokens(user("Hello"))


# --- tools ---


@pytest.mark.parametrize("model", ["gpt-4o", "claude-sonnet-4-5"])
def test_tools_and_their_calls_count_and_are_never_exact(model):
    plain = count_tokens(user("Weather?"), model)
    counted = count_tokens(user("Weather?"), model, tools=[TOOL])
    assert counted > plain + 20
    assert not counted.exact
    assert counted.upper > counted
    call = ToolCall(id="c", function={"name": "get_weather", "arguments": '{"city": "Berlin"}'})
    called = Message(role="assistant", tool_calls=[call])
    same = json.loads(called.model_dump_json())
    native = {
        "role": "assistant",
        "content": [{"type": "tool_use", "name": "get_weather", "input": {"city": "Berlin"}}],
    }
    first, second, third = (
        count_tokens([user("Weather?"), m], model) for m in (called, same, native)
    )
    assert first == second == third > plain + 10


def test_tools_with_a_text_count_too():
    assert not count_tokens("Weather?", tools=[TOOL]).exact


def test_tools_are_seen_as_typescript():
    [_, text, _], unknown = module._read_tools([TOOL], module._facts("gpt-4o"))
    assert unknown == []
    assert text == (
        "// Get the weather of a city\ntype get_weather = (_: {\n// Name of the city\ncity: string,\n"
        'unit?: "c" | "f",\ndays?: number[],\nplace?: string | null,\nmore?: {\nx?: {},\n},\n'
        "odd?: any,\n}) => any;\n"
    )


def test_a_tool_without_parameters_has_none():
    [_, text, _], _ = module._read_tools([{"name": "now"}], module._facts("gpt-4o"))
    assert text == "type now = () => any;\n"


def test_a_schema_that_contains_itself_ends():
    schema = {"type": "array"}
    schema["items"] = schema
    assert count_tokens("a", tools=[{"name": "f", "parameters": schema}]) > 0
    with pytest.raises(LLMConfigError, match=r"^tools\[0\] cannot be written as JSON: "):
        count_tokens("a", "claude-3", tools=[{"name": "f", "parameters": schema}])


def test_a_vendors_own_tool_is_unknown():
    for model in ("gpt-4o", "claude-3"):
        assert count_tokens("a", model, tools=[{"type": "web"}]).unknown == ("tools[0]: web",)


def test_a_custom_tools_call_is_unknown():
    called = {"role": "assistant", "tool_calls": [{"type": "custom", "custom": {}}, 7]}
    assert count_tokens(called).unknown == ("messages[0]: tool call",) * 2
    message = Message(role="assistant", tool_calls=[{"id": "c", "type": "custom"}])
    assert count_tokens(message).unknown == ("messages[0]: tool call",)


# --- the rest ---


class Row(dict):
    """A dict of one's own."""


def test_any_mapping_is_a_message():
    from types import MappingProxyType

    plain = count_tokens(user("Hello"))
    assert (
        count_tokens([Row(user("Hello"))]) == count_tokens(MappingProxyType(user("Hello"))) == plain
    )


@pytest.mark.parametrize(
    "wrong, model, message",
    [
        (7, "m", "tokens are counted of text, a message or a list of messages, not of int"),
        (b"text", "m", "tokens are counted of text, a message or a list of messages, not of bytes"),
        (
            [user("a"), 7],
            "m",
            "messages[1] must be a Message or a dict with role and content, not int",
        ),
        (["a", 7], "m", "messages[0] must be a Message or a dict with role and content, not str"),
        ([{"text": "a"}], "m", "messages[0] must have a role such as 'user', not None"),
        (
            [user(7)],
            "m",
            "the content of messages[0] must be text, a list of parts or None, not int",
        ),
        ([user("a", tool_calls=7)], "m", "the tool_calls of messages[0] must be a list, not int"),
        ("a", 7, "model must be a name such as 'gpt-4o', not 7"),
        ("a", "", "model must be a name such as 'gpt-4o', not ''"),
        ("a", [], "model must be a name such as 'gpt-4o', not []"),
    ],
)
def test_what_is_no_prompt_is_refused_in_one_line(wrong, model, message):
    for count in (count_tokens, TokenEstimator().count):
        with pytest.raises(LLMConfigError) as caught:
            count(wrong, model)
        assert str(caught.value) == message


@pytest.mark.parametrize(
    "tools, message",
    [
        ("f", "tools must be a list of definitions, not str"),
        ([print], "tools[0] must be a dict that defines a tool, not builtin_function_or_method"),
    ],
)
def test_what_is_no_tool_is_refused_in_one_line(tools, message):
    with pytest.raises(LLMConfigError) as caught:
        count_tokens("a", tools=tools)
    assert str(caught.value) == message


@pytest.mark.parametrize("again", [lambda c: pickle.loads(pickle.dumps(c)), copy.deepcopy])
def test_a_count_is_a_plain_value(again):
    twin = again(TokenCount(5, method="m", unknown=("x",), upper=9))
    assert (twin, twin.exact, twin.method, twin.unknown, twin.upper) == (5, False, "m", ("x",), 9)
    assert f"{twin:,} {twin + 1}" == "5 6"


@needs_price_data
@pytest.mark.parametrize("model", ["gpt-4o", "openai/gpt-4o", "openrouter/openai/gpt-4o"])
def test_the_context_window_comes_from_the_price_data(model):
    assert context_window(model) == context_window("gpt-4o", "openai") == 128_000


@needs_price_data
@pytest.mark.parametrize(
    "model", ["gemini-2.5-pro", "gemini/gemini-2.5-pro", "google/gemini-2.5-pro"]
)
def test_a_window_that_the_makers_list_lacks_is_found_in_others(model):
    assert context_window(model) == 1_048_576


def test_an_unknown_window_is_none_and_a_model_without_a_name_an_error(monkeypatch):
    assert context_window("no-such-model") is None
    with pytest.raises(LLMConfigError):
        context_window("")
    import LLM.prices

    def missing(*_):
        raise LLMConfigError("needs the extra")

    monkeypatch.setattr(LLM.prices, "context_window", missing)
    assert context_window("gpt-4o") is None
