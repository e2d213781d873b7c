"""Settings: defaults, checks, the environment, and a key that goes only where it belongs."""

import logging
import pickle
import traceback

import pytest

from LLM import LLM, LLMConfig, LLMConfigError, LLMError
from LLM.config import Environment, checked_base_url, environment_ca_bundle, versioned
from LLM.providers.targets import find_target

SECRET = "sk-hunter2-0123456789"

DEFAULTS: dict = {
    "base_url": "http://127.0.0.1:8000",
    "api_key": None,
    "model": "gpt-4",
    "temperature": 0.7,
    "max_tokens": None,
    "timeout": 30,
    "connect_timeout": 10.0,
    "deadline": None,
    "max_retries": 3,
    "retry_delay": 1.0,
    "retry_jitter": 0.25,
    "max_retry_delay": 60.0,
    "provider": None,
    "api_keys": {},
    "models": {},
    "default_headers": {},
    "pool_size": 64,
    "max_response_bytes": 64 * 1024 * 1024,
    "verify": True,
    "cert": None,
    "proxies": None,
    "requests_per_minute": None,
    "tokens_per_minute": None,
    "budget": None,
    "cache": None,
    "fallbacks": (),
    "usage_store": None,
}


def shown(error):
    """All that anybody could print of an exception, local variables of our own frames included."""
    text = [str(error), repr(error), repr(error.args), *map(str, getattr(error, "__notes__", ()))]
    trace = traceback.TracebackException.from_exception(error, capture_locals=True)
    pending = [trace]
    while pending:
        trace = pending.pop()
        text += [str(frame.locals) for frame in trace.stack if "/LLM/" in frame.filename]
        text += list(trace.format_exception_only())
        pending += [t for t in (trace.__cause__, trace.__context__) if t]
    return "\n".join(text)


def key_of(target):
    return target.key and target.key.get_secret_value()


def test_the_defaults_are_those_of_the_contract():
    config = LLMConfig()
    assert {name: getattr(config, name) for name in LLMConfig.model_fields} == DEFAULTS


def test_a_config_cannot_be_changed():
    config = LLMConfig()
    with pytest.raises(ValueError, match="frozen"):
        config.model = "other"


def test_what_was_given_can_be_told_from_a_default():
    config = LLMConfig(temperature=0.7)
    assert config.is_set("temperature")
    assert not config.is_set("model")


def test_a_changed_config_is_a_new_one_that_was_checked():
    config = LLMConfig(model="a", api_key=SECRET)
    other = config.replace(model="b")
    assert (config.model, other.model) == ("a", "b")
    assert other.api_key == config.api_key
    assert not other.is_set("temperature")
    with pytest.raises(LLMConfigError, match="temperature"):
        config.replace(temperature=3)


@pytest.mark.parametrize(
    "wrong, right",
    [
        ("temprature", "temperature"),
        ("base_uri", "base_url"),
        ("apikey", "api_key"),
        ("max_token", "max_tokens"),
        ("retries", "max_retries"),
        ("header", "default_headers"),
    ],
)
def test_an_unknown_setting_is_refused_with_the_nearest_name(wrong, right):
    with pytest.raises(LLMConfigError) as caught:
        LLMConfig(**{wrong: 1})
    assert wrong in str(caught.value)
    assert right in str(caught.value)


@pytest.mark.parametrize("wrong, right", [("opnai", "openai"), ("antropic", "anthropic")])
@pytest.mark.parametrize("setting", ["provider", "api_keys", "models"])
def test_an_unknown_provider_is_refused_with_the_nearest_name(setting, wrong, right):
    value = wrong if setting == "provider" else {wrong: "x"}
    with pytest.raises(LLMConfigError, match=f"did you mean '{right}'"):
        LLMConfig(**{setting: value})


def test_a_provider_that_resembles_none_is_refused_with_all_names():
    with pytest.raises(LLMConfigError, match=r"known are openai, anthropic, .*lmstudio"):
        LLMConfig(provider="zzz")


@pytest.mark.parametrize(
    "setting, value",
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("timeout", 0),
        ("timeout", -1),
        ("timeout", float("inf")),
        ("timeout", float("nan")),
        ("timeout", "soon"),
        ("connect_timeout", 0),
        ("connect_timeout", None),
        ("deadline", 0),
        ("deadline", -5),
        ("max_retries", -1),
        ("max_retries", 1.5),
        ("max_retries", None),
        ("retry_delay", -1),
        ("retry_delay", float("inf")),
        ("retry_jitter", -0.1),
        ("max_retry_delay", float("nan")),
        ("pool_size", 0),
        ("max_response_bytes", 0),
        ("model", ""),
        ("model", "  "),
        ("model", None),
        ("model", 4),
        ("base_url", None),
        ("base_url", ""),
        ("default_headers", {"a b": "x"}),
        ("default_headers", {"": "x"}),
        ("default_headers", {"X": "a\r\nHost: evil"}),
        ("default_headers", {"X": "€"}),
        ("default_headers", {"Content-Length": "1"}),
        ("default_headers", {"X": 1}),
        ("default_headers", "X: 1"),
        ("api_key", 123),
        ("api_key", b"bytes"),
        ("verify", 3.5),
        ("proxies", "http://proxy"),
    ],
)
def test_a_value_that_cannot_be_used_is_refused_by_name(setting, value):
    with pytest.raises(LLMConfigError) as caught:
        LLMConfig(**{setting: value})
    assert setting in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert not caught.value.retriable


@pytest.mark.parametrize(
    "setting, value",
    [
        ("temperature", 0),
        ("temperature", 2),
        ("temperature", None),
        ("timeout", 0.5),
        ("timeout", 7),
        ("timeout", None),
        ("deadline", 120),
        ("max_retries", 0),
        ("retry_delay", 0),
        ("retry_jitter", 0),
        ("max_retry_delay", 0),
        ("verify", False),
        ("verify", "/etc/ca.pem"),
        ("cert", ("a.pem", "a.key")),
        ("cert", "a.pem"),
        ("default_headers", {"X-Team": "Zürich"}),
        ("proxies", {"https": "http://proxy:3128"}),
    ],
)
def test_a_value_at_the_edge_is_taken(setting, value):
    assert getattr(LLMConfig(**{setting: value}), setting) == value


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(LLMConfigError) as caught:
        LLMConfig(temperature=9, max_retries=-1, modle="x")
    for word in ("temperature", "max_retries", "'model'"):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "given, used",
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000/v1"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000/v1"),
        ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1"),
        ("http://127.0.0.1:8000/v1/", "http://127.0.0.1:8000/v1"),
        ("https://openrouter.ai/api/v1", "https://openrouter.ai/api/v1"),
        ("https://host/openai/deployments/x", "https://host/openai/deployments/x"),
        ("http://[::1]:8000", "http://[::1]:8000/v1"),
        ("  http://host  ", "http://host/v1"),
        ("https://bücher.example/", "https://bücher.example/v1"),
    ],
)
def test_the_version_is_added_only_to_a_url_without_path(given, used):
    assert versioned(checked_base_url(given)) == used
    assert find_target(LLMConfig(base_url=given)).base_url == used


@pytest.mark.parametrize(
    "url, problem",
    [
        ("localhost:8000", "scheme"),
        ("127.0.0.1:8000", "scheme"),
        ("api.example.com/v1", "scheme"),
        ("ftp://host", "scheme"),
        ("//host", "scheme"),
        ("http://", "host"),
        ("http:///v1", "host"),
        ("http://host:99999", "URL"),
        ("http://host:0", "URL"),
        ("http://host:port", "URL"),
        ("http://[::1", "URL"),
        ("http://ho st", "URL"),
        ("http://host/\r\nX: 1", "URL"),
        ("http://host/v1#top", "fragment"),
        ("http://user:pass@host", "credentials"),
        ("http://user@host", "credentials"),
    ],
)
def test_a_base_url_that_is_none_is_refused_and_the_message_says_why(url, problem):
    with pytest.raises(LLMConfigError, match=problem):
        LLMConfig(base_url=url)


@pytest.mark.parametrize(
    "url",
    [
        f"https://user:{SECRET}@host/v1",
        f"https://{SECRET}@host/v1",
        f"https://:{SECRET}@host:port/v1",
        f"user:{SECRET}@host:8000",  # the scheme forgotten
        f"//user:{SECRET}@host",
        f"https://host/v1?key={SECRET}",
        f"https://host/v1#{SECRET}",
        f"https://user:{SECRET}/rest@host/v1",  # a password with a slash
        f"ftp://user:{SECRET}@host",
    ],
)
def test_credentials_in_a_base_url_are_refused_unseen(url):
    with pytest.raises(LLMConfigError) as caught:
        LLMConfig(base_url=url)
    assert SECRET not in str(caught.value)


BAD_KEYS = [
    SECRET + "\n",
    "\r\n" + SECRET,
    SECRET + "\r\nX-Evil: 1",
    SECRET + "€",
    f" {SECRET}",
    SECRET + "\x00",
]


@pytest.mark.parametrize("key", BAD_KEYS, ids=repr)
@pytest.mark.parametrize(
    "settings",
    [lambda key: {"api_key": key}, lambda key: {"api_keys": {"openai": key}}],
    ids=["api_key", "api_keys"],
)
def test_a_key_that_cannot_be_sent_is_refused_unseen(settings, key):
    with pytest.raises(LLMConfigError, match="api_key") as caught:
        LLMConfig(**settings(key))
    assert SECRET not in str(caught.value)
    assert SECRET not in repr(caught.value)


@pytest.mark.parametrize("wrong", [{"temperature": 9}, {"modle": "x"}, {"api_key": SECRET + "\n"}])
def test_the_failure_of_a_config_shows_no_key_even_with_local_variables(wrong):
    with pytest.raises(LLMConfigError) as caught:
        LLMConfig(**{"api_key": SECRET, **wrong})
    assert SECRET not in shown(caught.value)
    assert SECRET.encode() not in pickle.dumps(caught.value)


def test_the_failure_of_the_environment_shows_no_key_even_with_local_variables(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with pytest.raises(LLMConfigError) as caught:
        LLMConfig.from_env(temperature=9)
    assert SECRET not in shown(caught.value)


@pytest.mark.parametrize("key", [key for key in BAD_KEYS if "\x00" not in key], ids=repr)
def test_a_bad_key_of_a_hosts_variable_is_refused_unseen_and_the_variable_is_named(
    monkeypatch, key
):
    monkeypatch.setenv("GROQ_API_KEY", key)
    with pytest.raises(LLMConfigError, match="GROQ_API_KEY") as caught:
        find_target(LLMConfig(model="groq/llama"))
    assert SECRET not in shown(caught.value)


def test_keys_are_in_no_repr_str_or_dump():
    config = LLMConfig(api_key=SECRET, api_keys={"groq": SECRET}, model="openai/x")
    for text in (repr(config), str(config), str(config.model_dump()), config.model_dump_json()):
        assert SECRET not in text
    for target in (find_target(config), find_target(config, model="m", provider="groq")):
        assert key_of(target) == SECRET
        assert SECRET not in repr(target)


def test_a_proxys_password_is_in_no_repr():
    config = LLMConfig(proxies={"https": f"http://user:{SECRET}@proxy:3128"})
    assert SECRET not in repr(config)
    assert SECRET not in str(config)


@pytest.mark.parametrize(
    "name", ["Authorization", "authorization", "X-API-Key", "api-key", "Cookie"]
)
def test_default_headers_may_not_carry_the_credential(name):
    with pytest.raises(LLMConfigError, match="api_key") as caught:
        LLMConfig(default_headers={name: SECRET})
    assert SECRET not in shown(caught.value)


def test_an_empty_key_is_no_key():
    config = LLMConfig(api_key="")
    assert config.api_key is None
    assert config.is_set("api_key")


@pytest.mark.parametrize(
    "variables, overrides, base_url, key, model",
    [
        ({}, {}, "http://127.0.0.1:8000/v1", None, "gpt-4"),
        # our own variables
        ({"LLM_BASE_URL": "http://a", "LLM_API_KEY": "k"}, {}, "http://a/v1", "k", "gpt-4"),
        ({"LLM_BASE_URL": "http://a"}, {}, "http://a/v1", None, "gpt-4"),
        ({"LLM_API_KEY": "k"}, {}, "http://127.0.0.1:8000/v1", "k", "gpt-4"),
        ({"LLM_MODEL": "m", "MODEL_NAME": "n"}, {}, "http://127.0.0.1:8000/v1", None, "m"),
        ({"MODEL_NAME": "n"}, {}, "http://127.0.0.1:8000/v1", None, "n"),
        # a host's variables
        ({"OPENAI_API_KEY": "o"}, {}, "https://api.openai.com/v1", "o", "gpt-4"),
        ({"OPENROUTER_API_KEY": "r"}, {}, "https://openrouter.ai/api/v1", "r", "gpt-4"),
        (
            {"OPENAI_API_KEY": "o", "OPENROUTER_API_KEY": "r"},
            {},
            "https://api.openai.com/v1",
            "o",
            "gpt-4",
        ),
        ({"OPENAI_BASE_URL": "http://a/v1"}, {}, "http://a/v1", None, "gpt-4"),
        (
            {"OPENAI_BASE_URL": "http://a/v1", "OPENAI_API_KEY": "o"},
            {},
            "http://a/v1",
            "o",
            "gpt-4",
        ),
        (
            {"OPENROUTER_BASE_URL": "http://a/v1", "OPENROUTER_API_KEY": "r"},
            {},
            "http://a/v1",
            "r",
            "gpt-4",
        ),
        # a host's key never goes to another's address
        (
            {"LLM_BASE_URL": "http://a", "OPENAI_API_KEY": "o", "OPENROUTER_API_KEY": "r"},
            {},
            "http://a/v1",
            None,
            "gpt-4",
        ),
        ({"OPENAI_BASE_URL": "http://a", "OPENROUTER_API_KEY": "r"}, {}, "http://a/v1", None, None),
        ({"OPENROUTER_BASE_URL": "http://a", "OPENAI_API_KEY": "o"}, {}, "http://a/v1", None, None),
        ({"OPENAI_API_KEY": "o"}, {"base_url": "http://a"}, "http://a/v1", None, "gpt-4"),
        ({"LLM_API_KEY": "k"}, {"base_url": "http://a"}, "http://a/v1", None, "gpt-4"),
        # an argument beats the environment
        (
            {"LLM_BASE_URL": "http://a", "LLM_API_KEY": "k", "LLM_MODEL": "m"},
            {"base_url": "http://b", "api_key": "x", "model": "n"},
            "http://b/v1",
            "x",
            "n",
        ),
        ({"OPENAI_API_KEY": "o"}, {"api_key": "x"}, "https://api.openai.com/v1", "x", "gpt-4"),
        ({"OPENAI_API_KEY": "o"}, {"api_key": None}, "https://api.openai.com/v1", None, "gpt-4"),
        # an empty variable counts as unset
        (
            {"LLM_BASE_URL": "", "LLM_API_KEY": " ", "LLM_MODEL": "", "OPENAI_API_KEY": "o"},
            {},
            "https://api.openai.com/v1",
            "o",
            "gpt-4",
        ),
        # a prefix chooses the host, and the host its key
        (
            {"LLM_MODEL": "groq/x", "GROQ_API_KEY": "g", "OPENAI_API_KEY": "o"},
            {},
            "https://api.groq.com/openai/v1",
            "g",
            None,
        ),
        (
            {"ANTHROPIC_API_KEY": "a", "OPENAI_API_KEY": "o"},
            {"provider": "anthropic", "model": "claude"},
            "https://api.anthropic.com/v1",
            "a",
            "claude",
        ),
    ],
)
def test_argument_beats_environment_beats_default(
    monkeypatch, variables, overrides, base_url, key, model
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    config = LLMConfig.from_env(**overrides)
    target = find_target(config)
    assert (target.base_url, key_of(target)) == (base_url, key)
    assert model is None or config.model == model


def test_only_from_env_reads_settings_from_the_environment(monkeypatch):
    monkeypatch.setenv("LLM_MODEL", "m")
    monkeypatch.setenv("LLM_BASE_URL", "http://a")
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    target = find_target(LLMConfig())
    assert (target.model, target.base_url, target.key) == (
        "gpt-4",
        "http://127.0.0.1:8000/v1",
        None,
    )


@pytest.mark.parametrize("change", ["LLM", "with_options", "replace"])
def test_the_environments_key_does_not_follow_to_another_address(monkeypatch, change):
    """A host's key is never sent to another host, also not when only the address is changed later."""
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    config = LLMConfig.from_env()
    elsewhere = "http://elsewhere.invalid"
    if change == "LLM":
        config = LLM(config, base_url=elsewhere).config
    elif change == "with_options":
        config = LLM(config).with_options(base_url=elsewhere).config
    else:
        config = config.replace(base_url=elsewhere)
    assert find_target(config).base_url == "http://elsewhere.invalid/v1"
    assert find_target(config).key is None


@pytest.mark.parametrize("variable", ["OPENAI_BASE_URL", "ANTHROPIC_BASE_URL"])
@pytest.mark.parametrize(
    "value", ["api.example.com/v1", "localhost", "ftp://host", "http://", "http://host?key=x"]
)
def test_an_address_of_a_variable_that_is_none_is_refused(monkeypatch, variable, value):
    """Else the key would go over plain HTTP to a host that nobody named."""
    monkeypatch.setenv(variable, value)
    with pytest.raises(LLMError):
        find_target(LLMConfig(model=variable.split("_")[0].lower() + "/m"))


@pytest.mark.parametrize("variable", ["OPENAI_BASE_URL", "ANTHROPIC_BASE_URL", "LLM_BASE_URL"])
def test_credentials_in_an_address_of_a_variable_are_refused_unseen(monkeypatch, caplog, variable):
    monkeypatch.setenv(variable, f"https://user:{SECRET}@host.invalid/v1")
    caplog.set_level(logging.DEBUG)
    prefix = variable.split("_")[0].lower()
    with pytest.raises(LLMError) as caught:
        LLM(LLMConfig.from_env() if prefix == "llm" else LLMConfig(model=f"{prefix}/m"))
    assert SECRET not in str(caught.value)
    assert SECRET not in caplog.text


def test_a_dotenv_file_is_beaten_by_the_environment(monkeypatch, tmp_path):
    file = tmp_path / ".env"
    file.write_text("LLM_MODEL=from-file\nLLM_BASE_URL=http://file\nLLM_API_KEY=file-key\n")
    monkeypatch.chdir(tmp_path)
    assert LLMConfig.from_env().model == "gpt-4"
    monkeypatch.setenv("LLM_MODEL", "from-env")
    monkeypatch.setenv("LLM_API_KEY", "")  # an empty variable counts as unset
    for where in (True, file, str(file)):
        config = LLMConfig.from_env(dotenv=where)
        assert (config.model, config.base_url) == ("from-env", "http://file")
        assert key_of(find_target(config)) == "file-key"


def test_a_dotenv_file_that_is_not_there_is_an_error_only_if_it_was_named(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert LLMConfig.from_env(dotenv=True).model == "gpt-4"
    with pytest.raises(LLMConfigError, match=r"no\.env"):
        LLMConfig.from_env(dotenv=tmp_path / "no.env")


def test_a_dotenv_file_changes_nothing_in_the_process(monkeypatch, tmp_path):
    (tmp_path / ".env").write_text("LLM_MODEL=from-file\n")
    monkeypatch.chdir(tmp_path)
    LLMConfig.from_env(dotenv=True)
    assert LLMConfig.from_env().model == "gpt-4"


def test_a_corporate_ca_bundle_is_found(monkeypatch):
    assert environment_ca_bundle() is None
    monkeypatch.setenv("SSL_CERT_FILE", "/b.pem")
    assert environment_ca_bundle() == "/b.pem"
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/a.pem")
    assert environment_ca_bundle() == "/a.pem"


def test_an_environment_shows_no_values():
    env = Environment({"OPENAI_API_KEY": SECRET, "EMPTY": " "})
    assert SECRET not in repr(env)
    assert (dict(env), len(env)) == ({"OPENAI_API_KEY": SECRET}, 1)


def test_the_callers_own_dicts_are_not_the_configs():
    headers = {"X-Team": "a"}
    config = LLMConfig(default_headers=headers)
    headers["X-Team"] = "b"
    assert config.default_headers == {"X-Team": "a"}


def test_the_keyword_shortcuts_are_settings():
    assert LLM(model="m").config == LLMConfig(model="m")
    assert LLM(LLMConfig(model="a", timeout=3), model="b").config == LLMConfig(model="b", timeout=3)
    with pytest.raises(LLMConfigError, match="temperature"):
        LLM(temprature=1)
    with pytest.raises(TypeError, match="LLMConfig"):
        LLM({"model": "m"})
