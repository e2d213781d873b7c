"""How many tokens a prompt has, counted on this machine: exactly where that is known, else estimated."""

from __future__ import annotations

import binascii
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from operator import mul
from types import FunctionType
from typing import Any, NamedTuple

from LLM.errors import LLMConfigError
from LLM.forks import renew_after_fork
from LLM.providers.hosts import host_of_model
from LLM.types import FunctionCall, Message

__all__ = ["TokenCount", "TokenEstimator", "context_window", "count_tokens"]


class TokenCount(int):
    """A number of tokens that knows how far to trust it; for everything else it is an `int`.

    Attributes:
        exact: whether it is known to be what the vendor counts.
        method: `tiktoken` and the name of the vocabulary, or `estimate` and why.
        unknown: what is not in the number, such as `messages[2]: image`; empty if everything is.
        upper: tokens; a bound for budgets. The number itself if exact; else stretched by the estimator's
            worst measured error, with the documented maximum for each image of unknown size. Audio and
            files have no known maximum: with those in `unknown`, nothing bounds the prompt.
    """

    exact: bool
    method: str
    unknown: tuple[str, ...]
    upper: int
    _ratio: float  # what the estimator had multiplied with

    def __new__(
        cls,
        tokens: int,
        *,
        exact: bool = False,
        method: str = "estimate",
        unknown: tuple[str, ...] = (),
        upper: int | None = None,
        ratio: float = 1.0,
    ) -> TokenCount:
        self = int.__new__(cls, tokens)
        self.exact = exact
        self.method = method
        self.unknown = unknown
        self.upper = tokens if upper is None else upper
        self._ratio = ratio
        return self

    def plus(self, other: TokenCount) -> TokenCount:
        """Both together."""
        return TokenCount(
            int(self) + int(other),
            exact=self.exact and other.exact,
            method=self.method,
            unknown=self.unknown + other.unknown,
            upper=self.upper + other.upper,
            ratio=self._ratio,
        )


def count_tokens(
    messages_or_text: object, model: str = "gpt-4o", *, tools: Sequence[Any] | None = None
) -> TokenCount:
    """Count the tokens of a prompt without asking anyone; nothing is fetched.

    Exact, with the extra `[tokens]`, for plain text of OpenAI's models, and for chats of text for those
    whose chat form OpenAI has published (gpt-3.5-turbo, gpt-4, gpt-4o). The first exact count of a
    vocabulary loads it, which takes up to half a second. Everything else is an estimate.

    Args:
        messages_or_text: text or a list of texts, a message or a list of messages (`Message`, or dicts in
            OpenAI's form).
        model: as for a call: `gpt-4o`, `openai/gpt-4o`, `openrouter/openai/gpt-4o`; also `azure/gpt-4o`.
            Capitals do not matter.
        tools: the tool definitions that are sent along; `None` for none. Their count is never exact.

    Returns:
        An `int` with `.exact`, `.method`, `.unknown` and `.upper`.

    Raises:
        LLMConfigError: it is neither text nor messages, or a tool is not a definition.
    """
    facts = _facts(model)
    prompt = _read(messages_or_text)
    counted = _exactly(prompt, tools, facts)
    return _estimated(prompt, tools, facts, facts.why) if counted is None else counted


def context_window(model: str, provider: str | None = None) -> int | None:
    """Tokens that prompt and answer of a model may have, from the price data of the extra `[cost]`.

    Args:
        model: `gpt-4o`, `openai/gpt-4o`, `openrouter/openai/gpt-4o`.
        provider: who serves it; left out, what stands before the model's name, or whoever is known for it.
            What that list lacks is taken from the maker's and from routers', if they agree.

    Returns:
        `None` if the model is unknown or the extra is not installed.

    Raises:
        LLMConfigError: `model` is not a name.
    """
    _check_model(model)
    from LLM.prices import context_window as known

    found = host_of_model(model) if provider is None else None
    if found is not None:
        provider, own = found[0].name, found[1]
    else:
        own = model
    try:
        window = known(own, provider)
        # A host's own list may lack what its maker's has.
        return known(_bare(own.lower())) if window is None else window
    except LLMConfigError:  # the extra is missing
        return None


class TokenEstimator:
    """Estimates that get better: it compares them with the usage that servers return.

    One for each client; safe in threads. For each model it keeps one number, the ratio of the real to
    the estimated count: a running average that weighs long prompts more, lets no single answer move it
    by more than a half, and stays between 1/4 and 4. It remembers the 256 models met last.
    """

    def __init__(self) -> None:
        self._models: OrderedDict[str, _Learned] = OrderedDict()
        self._lock = threading.Lock()
        renew_after_fork(self)

    def after_fork(self) -> None:
        self._lock = threading.Lock()

    def count(
        self,
        messages_or_text: object,
        model: str = "gpt-4o",
        tools: Sequence[Any] | None = None,
        *,
        exact: bool = False,
    ) -> TokenCount:
        """Estimate the tokens of a prompt, in some microseconds.

        Args:
            messages_or_text: as for `count_tokens`.
            model: the name to learn under, and whose vocabulary is estimated.
            tools: the tool definitions that are sent along.
            exact: count with the vocabulary where that is exact, which loads it; left out: never.

        Raises:
            LLMConfigError: it is neither text nor messages, or a tool is not a definition.
        """
        learned = self._models.get(model) if isinstance(model, str) else None
        learned = learned or self._learned(model)
        prompt = _read(messages_or_text)
        if exact:
            counted = _exactly(prompt, tools, learned.facts)
            if counted is not None and counted.exact:
                return counted
        return _estimated(prompt, tools, learned.facts, "estimate", learned.ratio)

    def learn(self, model: str, estimated: int | None, real: int | None) -> None:
        """Compare an estimate with what the server counted.

        An exact count, one with unknown parts, `None` and anything not above 0 teach nothing.

        Args:
            model: the name that `count` was given.
            estimated: what `count` returned.
            real: `prompt_tokens` of the answer's usage.
        """
        counted = estimated if isinstance(estimated, TokenCount) else None
        if estimated is None or real is None or estimated <= 0 or real <= 0:
            return
        if counted is not None and (counted.exact or counted.unknown):
            return
        # Without a lock: of two threads that learn at once one may be forgotten, which no average feels.
        learned = self._models.get(model) or self._learned(model)
        learned.learn(estimated / (counted._ratio if counted else learned.ratio), real)  # noqa: SLF001 - ours

    def ratio(self, model: str) -> float:
        """What estimates for the model are multiplied with; 1.0 before anything was learned."""
        learned = self._models.get(model)
        return learned.ratio if learned else 1.0

    def _learned(self, model: str) -> _Learned:
        facts = _facts(model)
        with self._lock:
            learned = self._models.get(model)
            if learned is None:
                learned = self._models[model] = _Learned(facts)
            self._models.move_to_end(model)
            if len(self._models) > 256:
                self._models.popitem(last=False)
        return learned


class _Learned:
    """What was learned of one model."""

    __slots__ = ("facts", "ratio", "weight")

    def __init__(self, facts: _Facts) -> None:
        self.facts = facts
        self.ratio = 1.0
        self.weight = 0.5  # of the untaught ratio: the first long prompt outweighs it

    def learn(self, plain: float, real: int) -> None:
        seen = min(max(real / plain, self.ratio / 1.5), self.ratio * 1.5)
        # In a short prompt the fixed parts drown the text; 256 tokens say as much as any.
        weight = min(plain / 256, 1.0)
        self.weight = min(self.weight + weight, 16.0)
        self.ratio = min(max(self.ratio + (seen - self.ratio) * weight / self.weight, 0.25), 4.0)


# --- what is known of models ---


class _Tiles(NamedTuple):
    """Images by squares of 512 pixels: `base + tile * squares`. OpenAI, "Images and vision", 2025."""

    base: int
    tile: int

    @property
    def maximum(self) -> int:
        return self.base + 8 * self.tile  # 2048 × 768 pixels, the largest after scaling

    def tokens(self, width: float, height: float) -> int:
        scale = min(1.0, 2048 / max(width, height))
        scale = min(scale, 768 / min(width, height))
        width, height = round(width * scale, 6), round(height * scale, 6)
        return self.base + self.tile * _squares(width, height, 512)


class _Patches(NamedTuple):
    """Images by squares of 32 pixels, at most 1536, each `factor` tokens. The same page."""

    factor: float

    @property
    def maximum(self) -> int:
        return math.ceil(1536 * self.factor)

    def tokens(self, width: float, height: float) -> int:
        if _squares(width, height, 32) > 1536:
            scale = 32 * math.sqrt(1536 / (width * height))
            width, height = width * scale / 32, height * scale / 32
            scale = min(math.floor(width) / width, math.floor(height) / height)
            width, height = width * scale * 32, height * scale * 32
        # Rounded first: after scaling, one side is a whole number of squares but for the last bit.
        return math.ceil(_squares(round(width, 6), round(height, 6), 32) * self.factor)


class _Scaled(NamedTuple):
    """Images by squares of 28 pixels, scaled down to an edge. Anthropic, "Vision", 2026.

    Until 2026 the page said width × height / 750, which is 5 % more.
    """

    edge: int
    maximum: int

    def tokens(self, width: float, height: float) -> int:
        scale = min(1.0, self.edge / max(width, height))
        return min(_squares(width * scale, height * scale, 28), self.maximum)


_Images = _Tiles | _Patches | _Scaled

# An image for a model of which nothing is known: an assumption, above all maxima below but one.
_ANY_IMAGE = 10_000

# The first pattern that matches the start of a model's name counts.
_IMAGES: tuple[tuple[str, _Images], ...] = (
    (r"gpt-4o-mini", _Tiles(2833, 5667)),
    (r"gpt-(4\.1|5)-nano", _Patches(2.46)),
    (r"gpt-(4\.1|5)-mini", _Patches(1.62)),
    (r"o4-mini", _Patches(1.72)),
    (r"(chatgpt-4o|gpt-4o|gpt-4-(turbo|vision)|gpt-4\.[15])", _Tiles(85, 170)),
    (r"o[13](?!-mini)\b", _Tiles(75, 150)),
    (r"gpt-5(?!\.)", _Tiles(70, 140)),
    (r"claude-([123]|instant|\w+-([123]|4(?![-.][7-9](?!\d))))", _Scaled(1568, 1600)),
    (r"claude-", _Scaled(2576, 4784)),
)

# Which vocabulary a model has, for the estimate; tiktoken's own table decides for exact counts.
_VOCABULARIES = (
    (r"(ft:)?(chatgpt-|gpt-4o|gpt-4\.[15]|gpt-[5-9]|gpt-oss|codex|o[1-9]\b)", "o200k_base"),
    (r"(ft:)?(gpt-4|gpt-3\.?5|text-embedding-|davinci-002|babbage-002)", "cl100k_base"),
)

# OpenAI's Cookbook, "How to count tokens with tiktoken" (2024-09): 3 tokens for each message, 1 for a
# name, 3 that begin the answer. It speaks of these models; of later ones nothing is published.
_PUBLISHED_CHAT = r"(ft:)?(gpt-3\.?5-turbo(?!-0301)|gpt-4(?!\.)|gpt-4o)"
_PER_MESSAGE = 3
_PER_NAME = 1
_PER_CHAT = 3

# Not published: a tool call's own tokens beside name and arguments.
_PER_CALL = 8

# Anthropic, "Tool use", 2025: the system prompt that comes with tools has 346 tokens for Claude 4, and
# 530 at most (Claude 3 Opus).
_TOOLS_PROMPT = (346, 530)


class _Facts(NamedTuple):
    """What is known of a model; `vocabulary` is `None` where it is not OpenAI's."""

    name: str
    vocabulary: str | None
    published_chat: bool
    images: _Images | None
    tools_prompt: tuple[int, int]
    weights: tuple[float, ...]
    stretch: float

    @property
    def encoding(self) -> Any:
        """tiktoken's encoding, or a text that says why there is none."""
        return _encoding_of(self.name) if self.vocabulary else _no_vocabulary(self.name)

    @property
    def why(self) -> str:
        """The method of an estimate that was to be a count."""
        encoding = self.encoding
        return encoding if isinstance(encoding, str) else "estimate"


def _check_model(model: object) -> None:
    if not isinstance(model, str) or not model.strip():
        raise LLMConfigError(f"model must be a name such as 'gpt-4o', not {model!r:.60}")


# Who serves OpenAI's models under OpenAI's names, as other libraries write it before the name.
_OTHER_PREFIXES = tuple("azure/ azure_ai/ github/ litellm/ litellm_proxy/".split())


def _bare(model: str) -> str:
    """A model's own name: without hosts before it and a router's variant (`:free`) after it."""
    while True:
        found = host_of_model(model)
        if found is not None:
            model = found[1]
        elif model.startswith(_OTHER_PREFIXES):
            model = model.partition("/")[2]
        else:
            break
    return model if model.startswith("ft:") else model.partition(":")[0]


@lru_cache(maxsize=256)
def _facts_of(name: str) -> _Facts:
    vocabulary = next((v for pattern, v in _VOCABULARIES if re.match(pattern, name)), None)
    own = name.removeprefix("ft:")
    return _Facts(
        name,
        vocabulary,
        bool(re.match(_PUBLISHED_CHAT, name)),
        next((images for pattern, images in _IMAGES if re.match(pattern, own)), None),
        _TOOLS_PROMPT if name.startswith("claude") else (0, 0),
        _WEIGHTS[vocabulary or "cl100k_base"],
        _STRETCH if vocabulary else _STRETCH_OF_OTHERS,
    )


def _facts(model: str) -> _Facts:
    _check_model(model)
    return _facts_of(_bare(model.lower()))


# --- reading a prompt ---


class _Prompt:
    """What stands in a prompt: texts to count, and numbers of what has tokens of its own."""

    __slots__ = ("calls", "chat", "images", "names", "parts", "roles", "texts", "unknown")

    def __init__(self, texts: list[str], *, chat: bool) -> None:
        self.texts = texts
        self.chat = chat
        self.names = 0
        self.calls = 0
        self.parts = False  # whether a content is a list of them
        self.roles: list[str] = []
        self.images: list[tuple[str, Any, str]] = []  # where, its URL, detail
        self.unknown: list[str] = []


def _read(messages_or_text: object) -> _Prompt:
    if isinstance(messages_or_text, str):
        return _Prompt([messages_or_text], chat=False)
    if (
        isinstance(messages_or_text, list)
        and messages_or_text
        and type(messages_or_text[0]) is str
        and all(isinstance(prompt, str) for prompt in messages_or_text)
    ):
        return _Prompt(messages_or_text, chat=False)
    if type(messages_or_text) is not list:  # what it mostly is; the other questions take longer
        messages_or_text = _as_list(messages_or_text)
    texts: list[str] = []
    prompt = _Prompt(texts, chat=True)
    for number, message in enumerate(messages_or_text):
        # A message's own fields: five times as quick as pydantic's attributes.
        kind = type(message)
        if kind is dict:
            values = extra = message
        elif kind is Message or isinstance(message, Message):
            values, extra = message.__dict__, message.__pydantic_extra__
        elif isinstance(message, Mapping):
            values = extra = dict(message)
        else:
            raise LLMConfigError(
                f"messages[{number}] must be a Message or a dict with role and content, "
                f"not {kind.__name__}"
            )
        get = values.get
        role = get("role")
        if not isinstance(role, str):
            raise LLMConfigError(
                f"messages[{number}] must have a role such as 'user', not {role!r:.60}"
            )
        prompt.roles.append(role)
        content = get("content")
        if type(content) is str:
            texts.append(content)
        elif content is not None:
            _read_content(prompt, content, number)
        if name := get("name"):
            texts.append(str(name))
            prompt.names += 1
        if calls := get("tool_calls"):
            _read_calls(prompt, calls, number)
        if extra and (content is None or extra is not values or len(extra) > 2):
            _read_extra(prompt, extra, number)
    return prompt


def _as_list(messages: object) -> list[Any]:
    if isinstance(messages, Message | Mapping):
        return [messages]
    if isinstance(messages, Sequence) and not isinstance(messages, bytes | bytearray):
        return list(messages)
    raise LLMConfigError(
        "tokens are counted of text, a message or a list of messages, "
        f"not of {type(messages).__name__}"
    )


def _read_extra(prompt: _Prompt, extra: dict[str, Any], number: int) -> None:
    """Rare fields: a refusal, the old form of a tool call, audio that a model said."""
    get = extra.get
    if isinstance(refusal := get("refusal"), str):
        prompt.texts.append(refusal)
    if call := get("function_call"):
        _read_calls(prompt, [{"function": call}], number)
    if get("audio"):
        prompt.unknown.append(f"messages[{number}]: audio")


def _read_content(prompt: _Prompt, content: object, number: int) -> None:
    if isinstance(content, str):
        prompt.texts.append(content)
        return
    if not isinstance(content, list | tuple):
        raise LLMConfigError(
            f"the content of messages[{number}] must be text, a list of parts or None, "
            f"not {type(content).__name__}"
        )
    prompt.parts = True
    for part in content:
        if isinstance(part, str):
            prompt.texts.append(part)
        elif isinstance(part, Mapping):
            _read_part(prompt, part, number)
        else:
            prompt.unknown.append(f"messages[{number}]: {type(part).__name__}")


def _read_part(prompt: _Prompt, part: Mapping[str, Any], number: int) -> None:
    kind = part.get("type")
    where = f"messages[{number}]: image"
    if kind in ("image_url", "input_image"):
        image = part.get("image_url")
        if isinstance(image, Mapping):
            prompt.images.append((where, image.get("url"), str(image.get("detail"))))
        else:
            prompt.images.append((where, image, str(part.get("detail"))))
    elif kind == "image":  # Anthropic's form
        source = part.get("source")
        data = source.get("data") if isinstance(source, Mapping) else None
        prompt.images.append((where, f"data:;base64,{data}" if data else None, ""))
    elif kind == "tool_result" and part.get("content") is not None:
        _read_content(prompt, part["content"], number)
    elif kind == "tool_use":
        call = {"name": part.get("name"), "arguments": part.get("input")}
        _read_calls(prompt, [{"function": call}], number)
    else:
        text = next((part[key] for key in ("text", "refusal", "thinking") if key in part), None)
        if isinstance(text, str):
            prompt.texts.append(text)
        else:
            prompt.unknown.append(f"messages[{number}]: {kind or 'part without a type'}")


def _read_calls(prompt: _Prompt, calls: object, number: int) -> None:
    if not isinstance(calls, list | tuple):
        raise LLMConfigError(
            f"the tool_calls of messages[{number}] must be a list, not {type(calls).__name__}"
        )
    for call in calls:
        function = (
            call.get("function") if isinstance(call, Mapping) else getattr(call, "function", 0)
        )
        if isinstance(function, FunctionCall):
            function = function.__dict__
        if not isinstance(function, Mapping) or not function.get("name"):
            prompt.unknown.append(f"messages[{number}]: tool call")  # a custom tool's
            continue
        arguments = function.get("arguments") or ""
        prompt.texts.append(str(function["name"]))
        prompt.texts.append(
            arguments if isinstance(arguments, str) else _json(arguments, f"messages[{number}]")
        )
        prompt.calls += 1


# --- tools ---


def _read_tools(tools: object, facts: _Facts) -> tuple[list[str], list[str]]:
    """The texts that tool definitions become in a prompt, and those that are not known."""
    if not isinstance(tools, list | tuple):
        raise LLMConfigError(f"tools must be a list of definitions, not {type(tools).__name__}")
    texts: list[str] = []
    unknown: list[str] = []
    for number, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise LLMConfigError(
                f"tools[{number}] must be a dict that defines a tool, not {type(tool).__name__}"
            )
        function = tool.get("function", tool)
        if not isinstance(function, Mapping) or "name" not in function:
            unknown.append(f"tools[{number}]: {tool.get('type')}")
            continue
        schema = function.get("parameters", function.get("input_schema")) or {}
        name, about = str(function["name"]), str(function.get("description") or "")
        if facts.vocabulary is None:
            texts.append(f"{name}\n{about}\n{_json(schema, f'tools[{number}]')}")
            continue
        # OpenAI's models see tools as TypeScript; not published, but repeated by the models themselves.
        note = "".join(f"// {line}\n" for line in about.splitlines())
        fields = _typescript(schema, 0)
        argument = "" if fields == "{}" else f"_: {fields}"
        texts.append(f"{note}type {name} = ({argument}) => any;\n")
    if texts and facts.vocabulary is not None:
        texts.insert(0, "# Tools\n\n## functions\n\nnamespace functions {\n")
        texts.append("} // namespace functions")
    return texts, unknown


def _typescript(schema: Any, depth: int) -> str:
    """A JSON Schema as a TypeScript type."""
    if not isinstance(schema, Mapping) or depth > 16:
        return "any"
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            return " | ".join(_typescript(choice, depth + 1) for choice in schema[key])
    if isinstance(schema.get("enum"), list):
        return " | ".join(_json(value, "enum") for value in schema["enum"])
    kind = schema.get("type")
    if kind == "array":
        return f"{_typescript(schema.get('items'), depth + 1)}[]"
    fields = schema.get("properties")
    if not isinstance(fields, Mapping) or not fields:
        if kind == "object" or not schema:
            return "{}"
        return "number" if kind == "integer" else str(kind or "any")
    required = schema.get("required") or ()
    lines = ["{"]
    for name, field in fields.items():
        if isinstance(field, Mapping) and field.get("description"):
            lines.append(f"// {field['description']}")
        mark = "" if name in required else "?"
        lines.append(f"{name}{mark}: {_typescript(field, depth + 1)},")
    return "\n".join([*lines, "}"])


def _json(value: object, where: str) -> str:
    import json  # for tools only

    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise LLMConfigError(f"{where} cannot be written as JSON: {error}") from None


# --- images ---


def _squares(width: float, height: float, side: int) -> int:
    return math.ceil(width / side) * math.ceil(height / side)


def _count_images(prompt: _Prompt, facts: _Facts) -> tuple[int, int, list[str]]:
    """Tokens of the images, a bound for them, and where those of unknown size are."""
    tokens = upper = 0
    unknown = []
    for where, url, detail in prompt.images:
        known = facts.images
        if known is None:
            upper += _ANY_IMAGE
            unknown.append(where)
            continue
        if detail == "low" and isinstance(known, _Tiles):
            count: int | None = known.base
        else:
            size = _image_size(url)
            count = known.tokens(*size) if size else None
        if count is None:
            upper += known.maximum
            unknown.append(where)
        else:
            tokens += count
            upper += math.ceil(count * 1.1)  # two formulas of one vendor differ by 5 %
    return tokens, upper, unknown


def _image_size(url: object) -> tuple[int, int] | None:
    """Width and height in pixels of an image in a `data:` URL, by its header; `None` if not to be read."""
    if not isinstance(url, str) or not url.startswith("data:"):
        return None
    start = url.find(",", 0, 200) + 1
    if not start or not url[:start].endswith(";base64,"):
        return None
    # Most headers are in the first bytes; in a JPEG a preview and a colour profile may stand before.
    for characters in (1024, 1 << 18):
        try:
            head = binascii.a2b_base64(url[start : start + characters])
        except ValueError:
            return None
        size = _size_in(head)
        if size and min(size) > 0:
            return size
    return None


def _size_in(head: bytes) -> tuple[int, int] | None:
    def number(start: int, length: int, order: Any = "little") -> int:
        return int.from_bytes(head[start : start + length], order)

    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return number(16, 4, "big"), number(20, 4, "big")
    if head.startswith((b"GIF87a", b"GIF89a")):
        return number(6, 2), number(8, 2)
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        if head[12:16] == b"VP8X":
            return number(24, 3) + 1, number(27, 3) + 1
        if head[12:16] == b"VP8L":
            bits = number(21, 4)
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        if head[12:16] == b"VP8 ":
            return number(26, 2) & 0x3FFF, number(28, 2) & 0x3FFF
    if head.startswith(b"\xff\xd8"):
        place = 2
        while place + 9 <= len(head) and head[place] == 0xFF:
            marker = head[place + 1]
            # Start of frame, of any kind; C4, C8 and CC in between are something else.
            if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
                return number(place + 7, 2, "big"), number(place + 5, 2, "big")
            place += 1 if marker == 0xFF else 2 + number(place + 2, 2, "big")
    return None


# --- exact counts ---


def _exactly(prompt: _Prompt, tools: object, facts: _Facts) -> TokenCount | None:
    """The count by the model's own vocabulary; `None` where that cannot be had."""
    encoding = facts.encoding
    if isinstance(encoding, str):
        return None
    method = f"tiktoken {encoding.name}"
    tool_texts, unknown = _read_tools(tools, facts) if tools else ([], [])
    total = 0
    for text in (*prompt.texts, *prompt.roles, *tool_texts):
        tokens = _tokens(encoding, text)
        if tokens is None:
            return None
        total += tokens
    if not prompt.chat and not tools:
        return TokenCount(total, exact=True, method=method)
    if prompt.chat:
        total += _PER_CHAT + _PER_MESSAGE * len(prompt.roles) + _PER_NAME * prompt.names
    total += _PER_CALL * prompt.calls
    images, most, unsized = _count_images(prompt, facts)
    unknown = [*prompt.unknown, *unsized, *unknown]
    plain = not (
        tools or prompt.calls or prompt.parts or prompt.images or unknown or "tool" in prompt.roles
    )
    if plain and facts.published_chat:
        return TokenCount(total, exact=True, method=method)
    # The forms that are not published may take some more than those that are.
    slack = 16 + 4 * len(prompt.roles) + 8 * prompt.calls + 8 * len(tool_texts)
    return TokenCount(
        total + images, method=method, unknown=tuple(unknown), upper=total + most + slack
    )


# The regular expressions of tiktoken 0.14 overflow their stack (a panic that no `except Exception`
# holds) on some hundred thousand white-space characters in a row; 100,000 are fine.
_LONGEST_BLANK = 50_000


def _tokens(encoding: Any, text: str) -> int | None:
    """Tokens of a text, what looks like a special token taken as text; `None` if it is too odd."""
    # A run of twice the length covers at least one of these windows.
    if len(text) > _LONGEST_BLANK and any(
        text[start : start + _LONGEST_BLANK].isspace()
        for start in range(0, len(text), _LONGEST_BLANK)
    ):
        return None
    try:
        return len(encoding.encode_ordinary(text))
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            return None
        raise


def _encoding_of(name: str) -> Any:
    """tiktoken's encoding for a model; a text that says why there is none."""
    try:
        from tiktoken.model import encoding_name_for_model
    except ImportError:
        return "estimate: the extra [tokens] is not installed"
    try:
        return _load(encoding_name_for_model(name))
    except KeyError:
        return _no_vocabulary(name)


def _no_vocabulary(name: str) -> str:
    return f"estimate: no vocabulary known for {name:.60}"


@lru_cache(maxsize=8)
def _load(name: str) -> Any:
    """An encoding as tiktoken defines it, its vocabulary read from this machine."""
    try:
        from tiktoken import Encoding, registry

        registry.list_encoding_names()  # binds the table of constructors
        constructor = (registry.ENCODING_CONSTRUCTORS or {})[name]
        # tiktoken's constructors fetch what they lack. So they run as copies, in a namespace where the
        # one function that loads is ours; nothing of tiktoken's own is changed.
        names = {**constructor.__globals__, "load_tiktoken_bpe": _vocabulary}
        names["data_gym_to_mergeable_bpe_ranks"] = _refuse  # gpt2 loads by another
        for key, value in constructor.__globals__.items():
            if isinstance(value, FunctionType) and value.__globals__ is constructor.__globals__:
                names[key] = FunctionType(value.__code__, names, key, value.__defaults__)
        return Encoding(**names[constructor.__name__]())
    except Exception as error:  # noqa: BLE001 - whatever another version does: we can still estimate
        return f"estimate: no intact vocabulary {name} on this machine: {error}"


def _vocabulary(url: str, expected_hash: str | None = None) -> dict[bytes, int]:
    """The ranks in a vocabulary file, from wherever this machine has it, if its hash is right."""
    import base64
    import hashlib

    for data in _copies(url, expected_hash):
        if hashlib.sha256(data).hexdigest() == expected_hash:
            pairs = (line.split() for line in data.splitlines() if line)
            return {base64.b64decode(token): int(rank) for token, rank in pairs}
    raise LookupError("none found that has the right sha256")


def _copies(url: str, expected_hash: str | None) -> Iterator[bytes]:
    import gzip
    import zlib
    from importlib.util import find_spec
    from pathlib import Path

    # A package that carries the files. It is found, not imported: its import takes a second.
    package, folder = "bpe_openai data".split()
    spec = find_spec(package)
    for place in (spec and spec.submodule_search_locations) or ():
        path = Path(place, folder, f"{url.rpartition('/')[2]}.gz")
        try:
            yield gzip.decompress(path.read_bytes())
        except (OSError, EOFError, zlib.error):
            continue
    # What tiktoken fetched once, for another program, is in its cache; only tiktoken knows where.
    from tiktoken import load

    read: Callable[..., bytes] = FunctionType(
        load.read_file_cached.__code__, {**vars(load), "read_file": _refuse}
    )
    try:
        yield read(url, expected_hash)
    except (OSError, LookupError):
        return


def _refuse(*_: object, **__: object) -> Any:
    raise LookupError("nothing is fetched")


# --- estimates ---

# Byte classes. One character is one byte of these, since the bytes that continue a character are
# deleted: a A letters, 0 digits, space, new line, and a letter for each group of first bytes that are a
# script, or some, in UTF-8; the rest are punctuation.
_CONTINUATION = bytes(range(0x80, 0xC0))
_SCRIPTS = {
    "p": (0xC2, 0xC2),  # Latin-1 punctuation
    "l": (0xC3, 0xC9),  # Latin letters with marks
    "m": (0xCA, 0xCD),  # phonetic letters, combining marks
    "g": (0xCE, 0xCF),  # Greek
    "c": (0xD0, 0xD3),  # Cyrillic
    "h": (0xD6, 0xD7),  # Hebrew
    "r": (0xD8, 0xDF),  # Arabic
    "i": (0xE0, 0xE1),  # India's and its neighbours'; Georgian, Ethiopian
    "y": (0xE2, 0xE2),  # symbols
    "k": (0xE3, 0xE3),  # kana
    "z": (0xE4, 0xE9),  # Chinese characters
    "o": (0xEA, 0xED),  # Hangul
    "f": (0xEE, 0xEF),  # full-width and compatibility forms
    "e": (0xF0, 0xFF),  # emoji and rare characters
}
# Of a group with more than one script: first two bytes, whose weight is a difference to the group's.
_PREFIXES = (
    b"\xe0\xb8 \xe0\xb9",  # Thai
    b"\xe0\xa4 \xe0\xa5",  # Devanagari
    b"\xe1\xba \xe1\xbb",  # Vietnamese
    b"\xe2\x80",  # dashes and quotation marks
)


def _class_of(byte: int) -> str:
    character = chr(byte)
    if byte < 0x80:
        if character.isalpha():
            return "a" if character.islower() else "A"
        if character.isdigit():
            return "0"
        if character.isspace():
            return "\n" if character == "\n" else " "
        return "."
    return next((key for key, (low, high) in _SCRIPTS.items() if low <= byte <= high), "i")


_CLASSES = "".join(map(_class_of, range(256))).encode()
# The same for words, whose letters are all one.
_WORDS = bytes(
    {"a": 97, "A": 97, "l": 97, "0": 48, " ": 32, "\n": 32}.get(chr(byte), 46)
    for byte in range(256)
)
# Letters that are rare in English: a text with many is another language, or no words at all.
_COMMON = bytes(byte for byte in range(256) if byte not in b"jkqvwxyzJKQVWXYZ")
_SCRIPT_CLASSES = tuple(key.encode() for key in _SCRIPTS)
_PREFIX_PAIRS = tuple(tuple(prefixes.split()) for prefixes in _PREFIXES)


def _features(data: bytes) -> list[int]:
    """What a text is made of, as counts that C code takes; `data` begins with a new line."""
    classes = data.translate(_CLASSES, _CONTINUATION)
    words = classes.translate(_WORDS)
    count, in_words = classes.count, words.count
    digits = count(b"0")
    found = [
        in_words(b" a"),  # words
        in_words(b".a"),  # words after punctuation
        in_words(b"aaaaa"),  # long ones have more tokens
        len(data.translate(None, _COMMON)),
        count(b"A"),
        count(b"."),
        count(b".."),  # some go together
        count(b"\n "),  # indentation
        in_words(b" " * 8),  # white space, also of lines
        digits,
        count(b"000") if digits else 0,  # three digits are one token
        in_words(b" 0") if digits else 0,
        in_words(b"0a") if digits else 0,
    ]
    if not data.isascii():
        found += map(count, _SCRIPT_CLASSES)
        raw = data.count
        found += [sum(map(raw, pair)) for pair in _PREFIX_PAIRS]
    return found


# Weights for the features in their order, fitted by bench/token_error.py (2026-11) against tiktoken on
# program texts, prose and messages in 30 languages, data and noise; docs/guides/tokens.md has the errors.
_WEIGHTS: Mapping[str, tuple[float, ...]] = {
    "o200k_base": (
        0.632,
        0.316,
        0.73,
        0.627,
        0.187,
        0.741,
        -0.679,
        1.071,
        0.357,
        1.003,
        -1.777,
        0.435,
        0.786,
        1.023,
        0.683,
        1.567,
        0.421,
        0.308,
        0.499,
        0.364,
        0.442,
        1.987,
        0.711,
        0.79,
        0.743,
        1.722,
        2.392,
        0.01,
        -0.051,
        -0.415,
        -0.332,
    ),
    "cl100k_base": (
        0.605,
        0.319,
        0.982,
        0.757,
        0.138,
        0.533,
        -0.356,
        1.224,
        0.271,
        1.223,
        -2.267,
        0.027,
        0.465,
        1.425,
        1.217,
        1.782,
        1.062,
        0.521,
        1.211,
        0.844,
        1.574,
        1.351,
        1.052,
        1.021,
        1.173,
        2.281,
        2.642,
        -0.579,
        -0.346,
        -0.462,
        0.693,
    ),
}

# The worst underestimate of that measurement was 45 % (of white space; of text 36 %): 1 / (1 - 0.45) =
# 1.82. Texts of a few words stray by some tokens. Of other vendors' vocabularies nothing was measured:
# their factor is an assumption.
_STRETCH = 1.85
_STRETCH_OF_OTHERS = 2.5
_STRAY = 8


def _estimated(
    prompt: _Prompt, tools: object, facts: _Facts, method: str, ratio: float = 1.0
) -> TokenCount:
    texts = prompt.texts
    unknown: list[str] | tuple[str, ...] = prompt.unknown
    fixed = most = prompt.calls * _PER_CALL
    if prompt.chat:
        # A role is one token.
        fixed += _PER_CHAT + (_PER_MESSAGE + 1) * len(prompt.roles) + _PER_NAME * prompt.names
        most = fixed + 4 * len(prompt.roles) + 16
    if tools:
        tool_texts, unsaid = _read_tools(tools, facts)
        texts = [*texts, *tool_texts]
        unknown = [*unknown, *unsaid]
        fixed += facts.tools_prompt[0]
        most += facts.tools_prompt[1] + 16 + 8 * len(tool_texts)
    data = "\n".join(["", *texts]).encode("utf-8", "surrogatepass")
    tokens = sum(map(mul, _features(data), facts.weights))
    # Vocabularies like these have a token for each byte, so there are never more tokens than bytes.
    size = len(data) - 1
    tokens = min(tokens, size)
    upper = min(tokens * facts.stretch + _STRAY, size) + most
    total = tokens + fixed
    if prompt.images:
        images, largest, unsized = _count_images(prompt, facts)
        total += images
        upper += largest
        unknown = [*unknown, *unsized]
    total *= ratio
    if ratio > 1:
        upper *= ratio
    return TokenCount(
        # A text has a token.
        max(math.ceil(total - 0.5), 1 if size else 0),
        method=method,
        unknown=tuple(unknown),
        upper=math.ceil(upper),
        ratio=ratio,
    )
