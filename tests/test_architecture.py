"""The design, asked of the source itself: what import-linter cannot see, and that it is content."""

import ast
import configparser
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for package in ("LLM", "agents")
    for path in sorted((ROOT / package).rglob("*.py"))
}
TREES = {name: ast.parse(path.read_bytes()) for name, path in MODULES.items()}


def breaches(find, *, exempt=()):
    """Where `find` yields a node in a module that is not exempt, with the packages below it."""
    return [
        f"{MODULES[name].relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)[:80]}"
        for name, tree in TREES.items()
        if not any(name == module or name.startswith(module + ".") for module in exempt)
        for node in find(tree)
    ]


def names_used(tree):
    """Every dotted name a module imports or spells out, like `os.environ`, with its node."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{node.module}.{alias.name}", node) for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node), node


def using(pattern):
    wanted = re.compile(pattern)
    return lambda tree: [node for name, node in names_used(tree) if wanted.fullmatch(name)]


def test_the_import_contract_is_kept():
    code = (
        "from importlinter.cli import lint_imports as run; exit(run(no_cache=True, no_logo=True))"
    )
    checked = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_every_module_has_a_rank():
    """A new module without a rank would be bound by nothing."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    ranked = re.findall(r"[\w.]+", setup["importlinter:contract:ranks"]["layers"])
    without = [
        name
        for name, tree in TREES.items()
        if not any(name == module or name.startswith(module + ".") for module in ranked)
        and name not in {"LLM.__init__", "agents.__init__"}
        # The __init__ of a package between ranks may say what the package is for, no more.
        and not all(isinstance(node, ast.Expr) for node in tree.body)
    ]
    assert without == []


def test_only_config_and_the_command_line_read_the_environment():
    environment = r"os\.(environb?|getenvb?|putenv|unsetenv)"
    # The terminal's kind, and whether a virtual environment is active.
    command_line = ["LLM.commands.view", "LLM.commands.shared"]
    # Hands settings on to its workers, and looks for variables that are written wrongly.
    command_line += ["agents.cli"]
    assert breaches(using(environment), exempt=["LLM.config", *command_line]) == []


def test_only_the_clock_knows_time_and_chance():
    """A test, or a user's simulation, hands in one object and holds both."""
    time_and_chance = (
        r"(time|random|secrets)(\.\w+)?"
        r"|uuid\.uuid[14]|os\.urandom|(datetime\.)?(datetime|date)\.(now|utcnow|today)"
    )
    # The secret of a key must not be anybody's to choose.
    assert breaches(using(time_and_chance), exempt=["LLM.clock", "agents.service.keys"]) == []


def test_no_import_is_for_type_checkers_only():
    """An import that would need it is a design fault; the facade's lazy names are the exception."""
    tables = ["LLM.__init__", "agents.__init__"]
    assert breaches(using(r"typing\.TYPE_CHECKING"), exempt=tables) == []


def test_only_providers_name_providers():
    # `testing` plays the other side of both dialects, so it must name them; names of environment
    # variables, which config.py reads before any host is chosen, are not names of providers.
    brands = (
        "anthropic azure deepseek gemini groq lmstudio mistral ollama openai openrouter vllm xai"
    ).split()
    brand = re.compile(rf"(?<![a-z])({'|'.join(brands)})(?![a-z])|together", re.IGNORECASE)

    def find(tree):
        prose = {
            id(node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        }
        for node in ast.walk(tree):
            spelled = ""
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                # What has a space in it is said to a person, not compared with anything.
                told = id(node) in prose or " " in node.value or node.value.isupper()
                spelled = "" if told else node.value
            elif isinstance(node, ast.Name):
                spelled = node.id
            elif isinstance(node, ast.Attribute):
                spelled = node.attr
            elif isinstance(node, ast.ImportFrom):
                spelled = " ".join([node.module or "", *(alias.name for alias in node.names)])
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                spelled = node.name
            found = brand.search(spelled)
            # An English word is a name only where it stands alone.
            if found and (found[0] != "together" or spelled == "together"):
                yield node

    # A conversation is exported in the form of the one or the other, by that name, and the service speaks
    # both.
    forms = ["agents.conversation", "agents.forms", "agents.service"]
    assert breaches(find, exempt=["LLM.providers", "LLM.testing", *forms]) == []


def test_no_module_keeps_state():
    """An empty container at module level waits to be filled, and `global` to be rebound."""
    empty = re.compile(
        r"\{\}|\[\]|(\w+\.)?(dict|list|set|local|deque|defaultdict|\w*(Dict|Dictionary|Set))\(\w*\)"
    )

    def find(tree):
        for node in tree.body:
            assigns = isinstance(node, ast.Assign | ast.AnnAssign) and node.value
            if assigns and empty.fullmatch(ast.unparse(node.value)):
                yield node
        yield from (node for node in ast.walk(tree) if isinstance(node, ast.Global))

    # What a forked child must make anew is known process by process: that is the module's task.
    assert breaches(find, exempt=["LLM.forks"]) == []


def test_the_public_names_are_what_they_say():
    import LLM

    assert LLM.__all__ == sorted(LLM.__all__)
    public = [name for name in dir(LLM) if not name.startswith("_")]
    assert public == [name for name in LLM.__all__ if not name.startswith("_")]
    assert all(hasattr(LLM, name) for name in LLM.__all__)


def test_type_checkers_see_the_public_names():
    """The lazy table is for Python, the imports under TYPE_CHECKING for tools: the same names."""
    import LLM

    seen = {
        alias.asname or alias.name
        for node in ast.walk(TREES["LLM.__init__"])
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("LLM.")
        for alias in node.names
    }
    assert seen - {"__version__"} == set(LLM.__all__)


def test_what_is_exported_is_documented():
    import LLM

    bare = [
        f"{name}.{part}" if part else name
        for name in LLM.__all__
        for thing in [getattr(LLM, name)]
        if not isinstance(thing, LLM.Unset)
        for part in ["", *(p for p, v in vars(thing).items() if inspect.isfunction(v))]
        # What the fork registry calls is no part of the interface.
        if not part.startswith("_")
        and part != "after_fork"
        and not inspect.getdoc(getattr(thing, part) if part else thing)
    ]
    assert bare == []


@pytest.mark.parametrize(
    "module, heavy",
    [
        ("LLM", "requests urllib3 pydantic http.client ssl asyncio"),
        ("LLM.errors", "requests urllib3 pydantic"),
        ("agents", "requests urllib3 pydantic"),
        ("agents.types", "requests urllib3"),
    ],
)
def test_importing_costs_little(module, heavy):
    importlib.import_module(module)  # here an error is easier to read
    code = f"import sys, {module}; print(*(set({heavy.split()}) & set(sys.modules)))"
    fresh = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert fresh.stdout.split() == []
