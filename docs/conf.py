"""Sphinx configuration: `make docs` builds with every warning an error."""

import sys

import LLM

project = "requests-llm"
author = "the requests-llm authors"
project_copyright = f"2026, {author}"
version = release = LLM.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"{project} {release}"

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3  # links to headings, as GitHub makes them

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # `Attributes:` as a list; pydantic's fields are members already

# Other projects' names are not looked up: that would ask the network at each build.
nitpick_ignore_regex = [(r"py:.*", r"(?!(LLM|agents)\b).*")]


def find_where_it_is_public(app, env, node, contnode):
    """An annotation names where a class is written; the reference shows it where it is imported."""
    module, _, name = node.get("reftarget", "").rpartition(".")
    if name in LLM.__all__:
        target = f"LLM.{name}"
        domain = env.get_domain("py")
        return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", target, node, contnode)
    # What exists but is not public, like a base class, is named without a link.
    return contnode if hasattr(sys.modules.get(module), name) else None


def setup(app):
    app.connect("missing-reference", find_where_it_is_public)
