"""LLMConfig: every setting, from arguments or the environment. The only reader of the environment."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from decimal import Decimal
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from LLM.errors import LLMConfigError
from LLM.prices import dollars
from LLM.providers.hosts import (
    COMPATIBLE,
    ENVIRONMENT_HOSTS,
    HOSTS,
    Host,
    address_from_variable,
    host_of_model,
    known_host,
)

MIB = 1024 * 1024

# Names that would carry a credential past `api_key`, where nothing keeps it from being shown.
CREDENTIAL_HEADERS = frozenset(
    {"authorization", "proxy-authorization", "x-api-key", "api-key", "x-goog-api-key", "cookie"}
)
# Names that frame the message: the transport owns them.
_FRAMING_HEADERS = frozenset({"host", "content-length", "transfer-encoding", "connection"})


class LLMConfig(BaseModel):
    """Every setting of a client; frozen, and the same for all its threads.

    Args:
        base_url: where the API is served. `/v1` is added only if the URL has no path of its own.
        api_key: a secret. Left out: for a host that `model` or `provider` names, its environment
            variable; with a `base_url` of your own, none. `None`: no credential is sent at all.
        model: a model, or `provider/model` for a known provider. With an explicit `base_url` or
            `provider` it is passed on as it stands.
        temperature: 0.0 to 2.0; `None` leaves it out of the request.
        max_tokens: largest number of tokens to answer with; `None` leaves it out of the request
            (Anthropic requires one: 4,096 is sent there).
        timeout: seconds. Without streaming, wall-clock limit of one attempt, from connect to last
            byte; in a stream, the longest wait for the first and between two content events
            (keep-alives are not content). `None`: no limit but the deadline.
        connect_timeout: seconds for name, TCP and TLS together; never more than `timeout`.
        deadline: seconds, wall-clock limit of a whole call: attempts, waits, body or stream. `None`: none.
        max_retries: retries after the first attempt; 0 is one attempt.
        retry_delay: seconds before the first retry; doubles with each further one.
        retry_jitter: each wait is stretched by a random factor in [1, 1 + jitter]; 0: exact waits.
        max_retry_delay: seconds, cap of a wait. A `Retry-After` above it is not slept: the error is
            raised at once and says how long the server asked to wait.
        provider: name of a known host: forces its dialect, and its address unless `base_url` is given.
            `None` decides from `model` and `base_url`.
        api_keys: secrets by provider name, for calls that switch provider.
        models: by provider name, the model that a call with `provider=` and without `model=` takes.
        default_headers: added to every request; may not carry a credential.
        pool_size: connections kept for reuse, by host; more may be open at a time.
        max_response_bytes: decoded size at which a response (or one event of a stream) is refused.
        verify: as in `requests`: `True`, `False`, or the path of a CA bundle.
        cert: as in `requests`: path of a client certificate, or (certificate, key).
        proxies: as in `requests`: proxy URL by scheme or `scheme://host`; beats the environment's.
        requests_per_minute: attempts that each address gets in any minute. `None`: no limit.
        tokens_per_minute: tokens, of prompts and answers, likewise. `None`: no limit.
        budget: US dollars that the client may spend in all; a call that might not fit is refused.
            `None`: no limit.
        cache: where answers are kept: `":memory:"` or `"sqlite:///file.db"`. `None`: nowhere.
        fallbacks: models to ask, in this order, when the first one cannot answer.
        usage_store: where what was spent is written down, by day and model: `"sqlite:///file.db"`.
            `None`: nowhere. `from_env` takes it from `LLM_USAGE_STORE`.

    Raises:
        LLMConfigError: a name is unknown or a value cannot be used. (It is a `ValueError` too.)
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    base_url: str = "http://127.0.0.1:8000"
    api_key: SecretStr | None = None
    model: str = "gpt-4"
    temperature: float | None = 0.7
    max_tokens: int | None = None
    timeout: float | None = 30
    connect_timeout: float = 10.0
    deadline: float | None = None
    max_retries: int = 3
    retry_delay: float = 1.0
    retry_jitter: float = 0.25
    max_retry_delay: float = 60.0
    provider: str | None = None
    api_keys: Mapping[str, SecretStr] = {}
    models: Mapping[str, str] = {}
    default_headers: Mapping[str, str] = {}
    pool_size: int = 64
    max_response_bytes: int = 64 * MIB
    verify: bool | str = True
    cert: str | tuple[str, str] | None = None
    proxies: Mapping[str, str] | None = Field(default=None, repr=False)  # may hold a password
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    budget: Decimal | None = None
    cache: str | None = None
    fallbacks: tuple[str, ...] = ()
    usage_store: str | None = None

    # The variables that the key came from; a pickle carries their names and never a key.
    _key_variables: tuple[str, ...] = PrivateAttr(default=())
    _lost_keys: tuple[str, ...] = PrivateAttr(default=())
    _address_is_implied: bool = PrivateAttr(default=False)
    _environment: Any = PrivateAttr(default=None)  # with the values of a .env file, if one was read

    def __init__(self, **settings: Any) -> None:
        _veil(settings)
        problem = None
        try:
            super().__init__(**settings)
        except ValidationError as error:
            problem = _explain(error, type(self).model_fields)
        # Raised out here: pydantic's own error holds the input, and with it the key.
        if problem is not None:
            settings.clear()  # a traceback may show them
            raise LLMConfigError(problem)

    @classmethod
    def from_env(cls, dotenv: bool | str | Path = False, **overrides: Any) -> LLMConfig:
        """Settings from the environment: argument beats environment beats default; empty is unset.

        Read are `LLM_BASE_URL`, `LLM_API_KEY` and `LLM_MODEL` (or `MODEL_NAME`); without ours, those
        of OpenAI and OpenRouter. A key variable belongs to its host: it is never sent to an address
        that came from elsewhere, and only an explicit `api_key` goes to an explicit `base_url`.

        Args:
            dotenv: also read a `.env` file (`True`: the nearest one above the working directory),
                whose values the environment beats; needs the extra `dotenv`.
            overrides: settings by name.
        """
        _veil(overrides)
        env = Environment.read(dotenv)
        settings = dict(overrides)
        if "model" not in settings and (model := env.first("LLM_MODEL", "MODEL_NAME")):
            settings["model"] = model
        if "usage_store" not in settings and (store := env.first("LLM_USAGE_STORE")):
            settings["usage_store"] = store
        if "base_url" not in settings and "provider" not in settings:
            for name, value in env.host_settings(settings.get("model", "")).items():
                settings.setdefault(name, value)
        config = cls(**settings)
        if "api_key" in settings and "api_key" not in overrides:
            config._key_variables = env.names_of(settings["api_key"])
        # The address of a host that only its key named does not keep a prefix from choosing another.
        chosen = env.first(
            "LLM_BASE_URL", *(HOSTS[h].base_url_variable or "" for h in ENVIRONMENT_HOSTS)
        )
        config._environment = env if dotenv else None
        config._address_is_implied = (
            "base_url" in settings and not chosen and "base_url" not in overrides
        )
        return config

    @property
    def environment(self) -> Environment:
        """Where the keys and addresses of known hosts are looked up."""
        return self._environment or Environment.read()

    @property
    def address_is_implied(self) -> bool:
        """Whether nobody gave the `base_url`: it is that of the host whose key was found."""
        return self._address_is_implied

    def __reduce__(self) -> tuple[Any, ...]:
        given = {name: getattr(self, name) for name in self.model_fields_set}
        lost = [name for name in ("api_key", "api_keys") if given.pop(name, None)]
        return _unpickled, (type(self), given, self._key_variables, tuple(lost))

    def require_keys(self) -> None:
        """Raises LLMConfigError if keys were lost on the way through a pickle."""
        if self._lost_keys:
            raise LLMConfigError(
                f"{' and '.join(self._lost_keys)} did not come along: keys are never pickled; "
                "give them again, or make the config with LLMConfig.from_env()"
            )

    @field_validator("base_url")
    @classmethod
    def _check_base_url(cls, url: str) -> str:
        return checked_base_url(url)

    @field_validator("api_key", mode="before")
    @classmethod
    def _check_key_type(cls, key: Any) -> Any:
        if not isinstance(key, (str, SecretStr, type(None))):
            raise ValueError(f"is {type(key).__name__}; it must be a str")
        return key

    @field_validator("api_key", mode="after")
    @classmethod
    def _check_key(cls, key: SecretStr | None) -> SecretStr | None:
        return None if key is None or not key.get_secret_value() else _checked_key(key, "api_key")

    @field_validator("api_keys", mode="after")
    @classmethod
    def _check_keys(cls, keys: Mapping[str, SecretStr]) -> Mapping[str, SecretStr]:
        return {
            known_host(name).name: _checked_key(key, f"api_keys[{name!r}]")
            for name, key in keys.items()
        }

    @field_validator("provider")
    @classmethod
    def _check_provider(cls, name: str | None) -> str | None:
        return None if name is None else known_host(name).name

    @field_validator("models")
    @classmethod
    def _check_models(cls, models: Mapping[str, str]) -> Mapping[str, str]:
        return {known_host(name).name: model for name, model in models.items()}

    @field_validator("model")
    @classmethod
    def _check_model(cls, model: str) -> str:
        if not model.strip():
            raise ValueError("is empty; name the model to ask, e.g. 'gpt-4'")
        return model

    @field_validator("temperature")
    @classmethod
    def _check_temperature(cls, value: float | None) -> float | None:
        return checked_temperature(value)

    @field_validator("timeout", "connect_timeout", "deadline")
    @classmethod
    def _check_seconds(cls, value: float | None) -> float | None:
        return checked_seconds(value)

    @field_validator("retry_delay", "retry_jitter", "max_retry_delay")
    @classmethod
    def _check_not_negative(cls, value: float) -> float:
        if not 0 <= value < math.inf:
            raise ValueError(f"is {value}; it must be 0 or more")
        return value

    @field_validator("max_retries")
    @classmethod
    def _check_retries(cls, value: int) -> int:
        if value < 0:
            raise ValueError(f"is {value}; it must be 0 (one attempt) or more")
        return value

    @field_validator(
        "max_tokens",
        "pool_size",
        "max_response_bytes",
        "requests_per_minute",
        "tokens_per_minute",
    )
    @classmethod
    def _check_positive(cls, value: int | None) -> int | None:
        return checked_positive(value)

    @field_validator("budget", mode="before")
    @classmethod
    def _check_budget(cls, value: Any) -> Decimal | None:
        if value is None:
            return None
        problem = ""
        try:
            amount = dollars(value, "it")
        except LLMConfigError as error:
            problem = str(error).removeprefix("it ")
        if problem:
            raise ValueError(problem)
        if amount == 0:
            raise ValueError("is 0; give US dollars above 0, or None for no limit")
        return amount

    @field_validator("fallbacks", mode="before")
    @classmethod
    def _check_fallbacks(cls, models: Any) -> Any:
        if isinstance(models, str):
            raise ValueError(f"is one string; write [{models!r}]")
        return models

    @field_validator("default_headers")
    @classmethod
    def _check_headers(cls, headers: Mapping[str, str]) -> Mapping[str, str]:
        check_headers(headers)
        return dict(headers)

    @model_validator(mode="after")
    def _check_url_with_provider(self) -> LLMConfig:
        if self.provider == COMPATIBLE.name and not self.is_set("base_url"):
            raise ValueError(
                f"provider={self.provider!r} needs a base_url: only you know where it is"
            )
        return self

    def is_set(self, name: str) -> bool:
        """Whether a setting was given, even with its default's value."""
        return name in self.model_fields_set

    def replace(self, **changes: Any) -> LLMConfig:
        """A config with some settings changed, checked like any other."""
        given = {name: getattr(self, name) for name in self.model_fields_set}
        if self._key_variables and changes.keys() & {"base_url", "provider"}:
            given.pop("api_key", None)  # the environment's key belongs to the address it came with
        kept = "api_key" in given and "api_key" not in changes
        config = type(self)(**{**given, **changes})
        if kept:
            config._key_variables = self._key_variables
        config._environment = self._environment
        config._address_is_implied = self._address_is_implied and "base_url" not in changes
        config._lost_keys = tuple(name for name in self._lost_keys if name not in changes)
        return config


def _unpickled(
    cls: type[LLMConfig],
    given: dict[str, Any],
    variables: tuple[str, ...],
    lost: tuple[str, ...],
) -> LLMConfig:
    """A config out of a pickle: its key comes from where it came from before."""
    key = Environment.read().first(*variables) if variables else None
    if key is not None:
        given, lost = {**given, "api_key": key}, tuple(n for n in lost if n != "api_key")
    config = cls(**given)
    config._key_variables, config._lost_keys = variables, lost
    return config


class Environment(Mapping[str, str]):
    """The environment's variables; an empty one counts as unset."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._variables = {name: value for name, value in variables.items() if value.strip()}

    @classmethod
    def read(cls, dotenv: bool | str | Path = False) -> Environment:
        """The process's, over those of a `.env` file if one is asked for."""
        return cls(
            {**(_dotenv(dotenv) if dotenv else {}), **{k: v for k, v in os.environ.items() if v}}
        )

    def __getitem__(self, name: str) -> str:
        return self._variables[name]

    def __iter__(self) -> Any:
        return iter(self._variables)

    def __len__(self) -> int:
        return len(self._variables)

    def first(self, *names: str) -> str | None:
        """The value of the first of the variables that is set."""
        return next((self[name] for name in names if name in self), None)

    def address(self, host: Host) -> str:
        """Where a known host is: where its variable says, else its own address."""
        name = host.base_url_variable or ""
        if name not in self:
            return host.base_url
        problem = ""
        try:
            return checked_base_url(address_from_variable(host, self[name]))
        except ValueError as error:
            problem = str(error)
        raise LLMConfigError(f"{name} {problem}")

    def key(self, host: Host) -> SecretStr | None:
        """The key that belongs to a known host at that address."""
        name = next((name for name in host.key_variables if name in self), None)
        return None if name is None else _checked_key(SecretStr(self[name]), name)

    def names_of(self, key: SecretStr) -> tuple[str, ...]:
        """The variables that hold a key."""
        return tuple(name for name in self if self[name] == key.get_secret_value())

    def host_settings(self, model: str) -> dict[str, str | SecretStr]:
        """`base_url` and `api_key` of the host that the variables name; an address beats a mere key."""
        hosts = [HOSTS[name] for name in ENVIRONMENT_HOSTS]
        if url := self.get("LLM_BASE_URL"):
            return {"base_url": url} | self._key_setting("LLM_API_KEY")
        for host in hosts:
            if host.base_url_variable in self:
                return {"base_url": self.address(host)} | self._key_setting(*host.key_variables)
        if "LLM_API_KEY" in self:
            return self._key_setting("LLM_API_KEY")
        # A known prefix chooses the host, and the host its key; but who has a key of a router only
        # means the router by `provider/model`.
        found = host_of_model(model)
        theirs = found is not None and (self.key(found[0]) or not found[0].key_variables)
        for host in hosts:
            setting = self._key_setting(*host.key_variables)
            if setting and (found is None or (host.routes and not theirs)):
                return {"base_url": host.base_url} | setting
        return {}

    def _key_setting(self, *names: str) -> dict[str, str | SecretStr]:
        name = next((name for name in names if name in self), None)
        return {} if name is None else {"api_key": SecretStr(self[name])}


def _veil(settings: dict[str, Any]) -> None:
    """Make a secret of a key before anything can fail with it in a variable."""
    if isinstance(settings.get("api_key"), str):
        settings["api_key"] = SecretStr(settings["api_key"])
    if isinstance(settings.get("api_keys"), Mapping):
        settings["api_keys"] = {
            name: SecretStr(key) if isinstance(key, str) else key
            for name, key in settings["api_keys"].items()
        }


def environment_ca_bundle() -> str | None:
    """The CA bundle (a file or folder) that a corporate network's variables name, or `None`."""
    env = Environment.read()
    return env.first("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR")


def checked_base_url(url: str) -> str:
    """A base URL without its last slash, `/v1` added if it has no path of its own.

    Raises:
        ValueError: no scheme, no host, or something in it that does not belong there.
    """
    url = url.strip()
    # What may hold a secret is looked for first, and then the URL is not shown.
    if "@" in url:
        raise ValueError("has credentials in it; give them as api_key, where they stay secret")
    if "?" in url or "#" in url:
        raise ValueError("has a query or fragment; give only scheme, host and path")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ValueError(f"{url!r} is not a URL: {error}") from None
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"{url!r} has no scheme; write 'http://…' or 'https://…'")
    if not parts.hostname:
        raise ValueError(f"{url!r} names no host")
    if parts.path.rstrip("/").endswith(("/chat/completions", "/messages")):
        raise ValueError(f"{url!r} is the address of one call; give what stands before, up to /v1")
    if any(ord(character) <= 32 or ord(character) == 127 for character in url) or port == 0:
        raise ValueError(f"{url!r} is not a URL")
    return url.rstrip("/")


def versioned(base_url: str) -> str:
    """`base_url` with `/v1` if it has no path of its own."""
    return base_url if urlsplit(base_url).path.strip("/") else f"{base_url.rstrip('/')}/v1"


def checked_temperature(value: float | None) -> float | None:
    """Raises ValueError if `value` is neither `None` nor within 0.0–2.0."""
    if value is not None and not (_is_number(value) and 0 <= value <= 2):
        raise ValueError(f"is {value!r}; it must be between 0.0 and 2.0")
    return value


def checked_seconds(value: float | None) -> float | None:
    """Raises ValueError if `value` is neither `None` (no limit) nor a finite number above 0."""
    if value is not None and not (_is_number(value) and 0 < value < math.inf):
        raise ValueError(
            f"is {value!r}; it must be a number of seconds above 0, or None for no limit"
        )
    return value


def checked_positive(value: int | None) -> int | None:
    """Raises ValueError if `value` is neither `None` nor a whole number above 0."""
    if value is not None and not (
        isinstance(value, int) and not isinstance(value, bool) and value > 0
    ):
        raise ValueError(f"is {value!r}; it must be a whole number above 0")
    return value


def check_headers(headers: Mapping[str, str]) -> None:
    """Raises ValueError for a header that cannot be sent, or may not (never showing its value)."""
    for name, value in headers.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise ValueError(f"header {name!r} must be a str with a str value")
        if name.lower() in CREDENTIAL_HEADERS:
            raise ValueError(
                f"may not carry {name!r}; give the key as api_key, where it stays secret"
            )
        if name.lower() in _FRAMING_HEADERS:
            raise ValueError(f"may not set {name!r}; the transport does")
        if not name or not all(
            c.isascii() and (c.isalnum() or c in "!#$%&'*+-.^_`|~") for c in name
        ):
            raise ValueError(f"{name!r} is not the name of a header")
        if not _is_header_text(value):
            raise ValueError(f"the value of {name!r} has a line break or is not Latin-1 text")


def _checked_key(key: SecretStr, name: str) -> SecretStr:
    # The key stands in no variable here: neither this message nor a traceback may show it, and
    # http.client's own message would.
    if not key.get_secret_value().strip():
        raise LLMConfigError(f"{name} is blank")
    if not _is_key_text(key):
        raise LLMConfigError(
            f"{name} has a line break, a blank at an end or a non-ASCII character in it; "
            "copy it again without"
        )
    return key


def _is_key_text(key: SecretStr) -> bool:
    text = key.get_secret_value()
    return text.isascii() and text.isprintable() and text == text.strip()


def _is_header_text(value: str) -> bool:
    return all((32 <= ord(c) < 256 and ord(c) != 127) or c == "\t" for c in value)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _dotenv(path: bool | str | Path) -> dict[str, str]:
    try:
        from dotenv import dotenv_values, find_dotenv
    except ImportError:
        raise LLMConfigError(
            "reading a .env file needs python-dotenv: pip install python-dotenv"
        ) from None
    file = find_dotenv(usecwd=True) if path is True else str(path)
    if path is not True and not Path(file).is_file():
        raise LLMConfigError(f"there is no file {file!r} to read variables from")
    return {name: value for name, value in dotenv_values(file).items() if value}


def _explain(error: ValidationError, fields: Iterable[str]) -> str:
    """pydantic's findings as one line, without any input (it may be a key)."""
    findings = []
    for found in error.errors(include_url=False, include_context=True, include_input=False):
        name = str(found["loc"][0]) if found["loc"] else ""
        if found["type"] == "extra_forbidden":
            near = get_close_matches(name, fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(fields)}"
            findings.append(f"LLMConfig has no setting {name!r}: {hint}")
        else:
            reason = found["msg"].removeprefix("Value error, ")
            # A finding may begin with the name of what it is about.
            subject = "" if reason.startswith(name) else f"{name} "
            findings.append(f"{subject}{reason[:1].lower()}{reason[1:]}".strip())
    return "; ".join(findings)
