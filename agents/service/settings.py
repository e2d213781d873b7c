"""Settings of the chat service: arguments beat the environment, which beats a TOML file."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from decimal import Decimal
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from LLM import LLMConfig, LLMConfigError, Price

PREFIX = "AGENTS_"
CONFIG_VARIABLE = "AGENTS_CONFIG"
_NOTHING = "none"  # how a variable or a TOML file, which have no null, says None


class Settings(BaseSettings):
    """Every setting of the chat service; frozen.

    Each can be given as an argument, as the variable `AGENTS_<NAME>`, or in the TOML file that
    `AGENTS_CONFIG` names, and is looked for in this order. An empty variable counts as unset; the word
    `none` switches off what can be switched off; a list is written with commas.

    Raises:
        LLMConfigError: a name is unknown or a value cannot be used; one line that names the setting
            and its variable, and never shows what was given (it may hold a password).
    """

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_prefix=PREFIX, env_ignore_empty=True
    )

    host: str = Field(
        default="127.0.0.1",
        min_length=1,
        description="Address to listen on. Beyond loopback the service starts only if a key exists.",
    )
    port: int = Field(
        default=8080, ge=0, le=65535, description="TCP port to listen on; 0: a free one."
    )
    database: str = Field(
        default="sqlite:///chat.db",
        min_length=1,
        description="Where conversations, keys and spending are kept: `sqlite:///file.db` or "
        "`postgresql://user@host/database`.",
    )
    workers: int = Field(
        default=1, ge=1, le=256, description="Processes that answer; more than 1 needs PostgreSQL."
    )
    model: str | None = Field(
        default=None,
        description="The model that answers, or `provider/model`. None: the first of `models`, else "
        "what `LLM_MODEL` says.",
    )
    base_url: str | None = Field(
        default=None,
        description="Where the model's API is served, without a key; with one, set `LLM_BASE_URL` and "
        "`LLM_API_KEY`. None: as these and the other variables of the library say.",
    )
    provider: str | None = Field(
        default=None,
        description="A host that the library knows by name. None: `model` and `base_url` decide.",
    )
    models: tuple[str, ...] = Field(
        default=(),
        description="Models that callers may name; the first is the default, unless `model` is another "
        "of them. Empty: the default model only.",
    )
    local: bool = Field(
        default=False,
        description="Answer with the stand-in model of this library, in a process of its own.",
    )
    system: str | None = Field(
        default="You are a helpful assistant.",
        description="Instructions of conversations that have none of their own. None: no instructions.",
    )
    tools: tuple[str, ...] = Field(
        default=("calculator",), description="Tools that the model may call. None: no tools."
    )
    temperature: float | None = Field(
        default=None, ge=0, le=2, description="0.0 to 2.0. None: the model's own."
    )
    max_tokens: int | None = Field(
        default=1024, ge=1, description="Longest answer, in tokens. None: the model's own limit."
    )
    max_turns: int = Field(
        default=10,
        ge=1,
        description="Calls of the model in one answer; each round of tools takes one.",
    )
    timeout: float | None = Field(
        default=60.0,
        gt=0,
        allow_inf_nan=False,
        description="Seconds, the longest wait for the first and between two pieces of an answer. None: "
        "no limit but `deadline`.",
    )
    deadline: float | None = Field(
        default=300.0,
        gt=0,
        allow_inf_nan=False,
        description="Seconds that one call of the model may take in all. None: no limit.",
    )
    budget_usd: Decimal | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="US dollars that a key without a budget of its own may spend in a `budget_period`; "
        "whoever needs no key counts as one of them. None: no limit.",
    )
    budget_period: Literal["day", "month"] = Field(
        default="day", description="`day` or `month`, in UTC: what `budget_usd` is for."
    )
    conversation_budget_usd: Decimal | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="US dollars that one conversation may cost. None: no limit.",
    )
    requests_per_minute: int | None = Field(
        default=120,
        ge=1,
        description="Requests that a key without a limit of its own may make in a minute; whoever needs "
        "no key counts as one of them. None: no limit.",
    )
    input_price: Decimal | None = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        description="US dollars for a million tokens of prompts; goes with `output_price`. None: the "
        "price data (extra `cost`).",
    )
    output_price: Decimal | None = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        description="US dollars for a million tokens of answers; goes with `input_price`. None: the "
        "price data.",
    )
    max_body_bytes: int = Field(
        default=1_000_000, ge=1, description="Bytes of a request's body; a larger one is refused."
    )
    max_answers: int = Field(
        default=256,
        ge=1,
        description="Answers under way at once in one process; more get status 503.",
    )
    grace: float = Field(
        default=20.0,
        ge=0,
        allow_inf_nan=False,
        description="Seconds that a stop waits for running answers before it marks them as partial.",
    )
    log_format: Literal["text", "json"] = Field(
        default="text", description="`text` for people, `json` for machines: an object a line."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="The least that is logged: `debug`, `info`, `warning`, `error`."
    )
    otel: bool = Field(
        default=False, description="Hand calls of the model to OpenTelemetry (extra `otel`)."
    )
    redis_url: str | None = Field(
        default=None,
        description="`redis://host`: one rate limit for all workers (extra `redis`). None: one for "
        "each worker.",
    )
    public_hosts: tuple[str, ...] = Field(
        default=(),
        description="Names that requests may give as their host, besides loopback and `host`: for a "
        "service behind a proxy.",
    )

    def __init__(self, _file: tuple[Path, Collection[str]] | None = None, **given: Any) -> None:
        # _file: the one that was read, and the names of the settings that come from it.
        problem = ""
        try:
            super().__init__(**given)
        except ValidationError as error:
            problem = _explain(error, *(_file or ()))
        # Raised out here: pydantic's own error holds the input, and with it passwords.
        if problem:
            given.clear()  # a traceback may show them
            raise LLMConfigError(problem)

    @classmethod
    def load(cls, config: str | Path | None = None, **overrides: Any) -> Settings:
        """Settings from arguments, the environment and a file.

        Args:
            config: a TOML file. `None`: the one that `AGENTS_CONFIG` names, else none.
            overrides: settings by name; they beat everything else.

        Raises:
            LLMConfigError: the file cannot be read, a name is unknown, a value cannot be used.
        """
        environment = _Environment(cls)
        file = config or environment.env_vars.get(CONFIG_VARIABLE.lower())
        if not file:
            return cls(**{**environment(), **overrides})
        from_file, above = _read(Path(file)), {**environment(), **overrides}
        return cls((Path(file), from_file.keys() - above.keys()), **{**from_file, **above})

    @classmethod
    def settings_customise_sources(  # type: ignore[override]  # called by name
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        **_: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments, then variables; `load` brings the file."""
        return init_settings, _Environment(settings_cls)

    @field_validator("models", "tools", "public_hosts", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = () if _is_nothing(value) else value.split(",")
        if isinstance(value, (list, tuple)):
            return tuple(
                part for each in value if (part := each.strip() if isinstance(each, str) else each)
            )
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _read_none(cls, value: Any, info: Any) -> Any:
        optional = type(None) in getattr(
            cls.model_fields[info.field_name].annotation, "__args__", ()
        )
        empty = isinstance(value, str) and (not value.strip() or _is_nothing(value))
        return None if optional and empty else value

    @field_validator("log_level", "log_format", "budget_period", mode="before")
    @classmethod
    def _lower(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value

    @model_validator(mode="after")
    def _agree(self) -> Settings:
        if (self.input_price is None) != (self.output_price is None):
            missing = "input_price" if self.input_price is None else "output_price"
            raise ValueError(f"{_named(missing)} is missing: both prices are needed, or none")
        if self.model is not None and self.models and self.model not in self.models:
            raise ValueError(
                f"{_named('model')} is {self.model!r}, which is none of {_named('models')}: "
                "add it there, or leave one of them out"
            )
        if self.workers > 1 and self.is_sqlite:
            raise ValueError(
                f"{_named('workers')} is {self.workers}, and SQLite is for one process: give "
                f"{_named('database')} as postgresql://user@host/database, or have one worker"
            )
        return self

    def replace(self, **changes: Any) -> Settings:
        """These settings with some changed, checked like any other; the environment is not asked again."""
        return type(self)(**{**self.model_dump(), **changes})

    @property
    def is_sqlite(self) -> bool:
        """Whether the database is a SQLite file, which one process writes to."""
        return not self.database.startswith("postgres")

    def offered(self) -> tuple[str, ...]:
        """The models that callers may name, the default one first."""
        default = self.llm_config().model
        return (default, *(model for model in self.models if model != default))

    def llm_config(self) -> LLMConfig:
        """Settings of the client that asks the models; its key comes from the environment.

        Raises:
            LLMConfigError: a setting does not fit; or `local` is set, and nobody started the stand-in.
        """
        if self.local and self.base_url is None:
            raise LLMConfigError(
                f"{_named('local')} is set, but only `python -m agents serve` starts the stand-in model"
            )
        given: dict[str, Any] = {"base_url": self.base_url, "provider": self.provider}
        given["model"] = self.model or next(iter(self.models), None)
        return LLMConfig.from_env(
            temperature=self.temperature,
            max_tokens=self.max_tokens,
            timeout=self.timeout,
            deadline=self.deadline,
            **{name: value for name, value in given.items() if value is not None},
        )

    def price(self) -> Price | None:
        """What tokens cost, if the settings say so; `None`: the price data knows."""
        if self.input_price is None or self.output_price is None:
            return None
        return Price(self.input_price, self.output_price)

    def shown(self) -> dict[str, Any]:
        """All settings as plain values, without passwords."""
        values = self.model_dump(mode="json")
        for name in ("database", "base_url", "redis_url"):
            values[name] = without_password(values[name])
        return values

    def __repr_args__(self) -> Any:
        return self.shown().items()

    def environment(self) -> dict[str, str]:
        """The variables that give another process these settings, whatever files there are."""
        values = self.model_dump(mode="json")
        return {
            CONFIG_VARIABLE: "",
            **{PREFIX + name.upper(): _as_variable(value) for name, value in values.items()},
        }


class _Environment(EnvSettingsSource):
    """Variables as they stand: lists are split by the settings themselves."""

    def decode_complex_value(self, field_name: str, field: Any, value: Any) -> Any:  # noqa: ARG002 - the base's signature
        return value


def without_password(url: str | None) -> str | None:
    """A URL of a database, to be shown: what may be a password is left out.

    No parser: one may take `user:pass` of an odd URL for something else, and show it.
    """
    if url is None or url.startswith("sqlite"):
        return url
    scheme, mark, rest = url.partition("://")
    if not mark:
        return "(not shown)"
    login, at, place = rest.rpartition("@")
    user = re.match(r"[\w.%+-]*", login)
    shown = f"{user[0]}{':***' if login != user[0] else ''}@" if at and user else ""
    return f"{scheme}://{shown}{place.partition('?')[0]}"


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise LLMConfigError(f"there is no settings file {str(file)!r}")
    try:
        values: Mapping[str, Any] = TomlConfigSettingsSource(Settings, toml_file=file)()
    except (ValueError, OSError) as error:  # a TOMLDecodeError is a ValueError
        raise LLMConfigError(f"the settings file {str(file)!r} cannot be read: {error}") from None
    unknown = [name for name in values if name not in Settings.model_fields]
    if unknown:
        raise LLMConfigError(
            f"the settings file {str(file)!r} has unknown names: "
            + ", ".join(f"{name!r}{_hint(name)}" for name in unknown)
        )
    return dict(values)


def _hint(name: str) -> str:
    near = get_close_matches(name.lower(), Settings.model_fields, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _explain(error: ValidationError, file: Path | None = None, its: Collection[str] = ()) -> str:
    findings = []
    for found in error.errors(include_url=False, include_context=False, include_input=False):
        reason = found["msg"].removeprefix("Value error, ")
        if not found["loc"]:  # of several settings, which their text names
            used = [name for name in its if re.search(rf"\b{name} \(", reason)]
            findings.append(reason + (f" ({file} gives {', '.join(sorted(used))})" if used else ""))
            continue
        name = str(found["loc"][0])
        if found["type"] == "extra_forbidden":
            findings.append(f"there is no setting {name!r}{_hint(name)}")
        else:
            named = f"{name} (in {file})" if name in its else _named(name)
            findings.append(f"{named}: {reason[:1].lower()}{reason[1:]}")
    return "; ".join(findings)


def _named(name: str) -> str:
    return f"{name} ({PREFIX}{name.upper()})"


def _is_nothing(text: str) -> bool:
    return text.strip().lower() == _NOTHING


def _as_variable(value: Any) -> str:
    if value is None or value == []:
        return _NOTHING
    return ",".join(value) if isinstance(value, list) else str(value)
