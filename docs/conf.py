"""How the documentation is built: ``nox -s docs``."""

import sys
from pathlib import Path

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

import parallel_agents

project = "parallel_agents"
author = "The parallel_agents maintainers"
copyright = "2026, The parallel_agents maintainers"

sys.path.append(str(Path(__file__).parent / "extensions"))
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "picture", "proofs", "ratios"]
exclude_patterns = ["_build", "schema"]
myst_heading_anchors = 3
html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_title = "parallel_agents"

autodoc_member_order = "bysource"
autodoc_mock_imports = ["ray"]  # too large to be installed for its signatures
autodoc_typehints = "signature"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

python_use_unqualified_type_names = True
nitpicky = True
nitpick_ignore_regex = [
    # Other projects' names, and the interpreter's: a build needs no network, so nothing of theirs is looked up.
    (r"py:.*", r"(anyio|attr|attrs|cattrs|collections|contextlib|enum|loguru|os|pathlib|signal|types|typing)\..*"),
    (r"py:.*", r"(agents|httpx2|langgraph|mcp|opentelemetry|pydantic_ai|temporalio)\..*"),
    (r"py:class", r"(bool|bytes|dict|float|int|list|object|str|tuple|type|optional|function)"),
    (r"py:exc", r"[A-Z]\w+(Error|Exit|Interrupt|Group|Exception)"),
]

TYPE_VARIABLES_AND_PRIVATE_TYPES = r"parallel_agents\.\w+(\.\w+)?\.(T|_V|FrozenDict|Template)"
nitpick_ignore_regex.append((r"py:(class|obj)", TYPE_VARIABLES_AND_PRIVATE_TYPES))


def _find_where_users_import_it(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, shown: nodes.TextElement
) -> nodes.reference | None:
    """Resolve a reference to the private module that a public name is written in."""
    module, _, name = node.get("reftarget", "").rpartition(".")
    if not module.startswith("parallel_agents._") or name not in parallel_agents.__all__:
        return None
    document = node["refdoc"]
    return env.domains.python_domain.resolve_xref(
        env, document, app.builder, "obj", f"parallel_agents.{name}", node, shown
    )


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("missing-reference", _find_where_users_import_it)
