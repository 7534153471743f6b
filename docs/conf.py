"""How the documentation is built: ``nox -s docs``."""

import parallel_agents

project = "parallel_agents"
author = "The parallel_agents maintainers"
copyright = "2026, The parallel_agents maintainers"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "schema"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "parallel_agents"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": False}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

nitpicky = True
nitpick_ignore_regex = [
    # Other projects' names, and the interpreter's: a build needs no network, so nothing of theirs is looked up.
    (r"py:.*", r"(anyio|attr|attrs|cattrs|collections|contextlib|enum|loguru|os|pathlib|signal|types|typing)\..*"),
    (r"py:class", r"(bool|bytes|dict|float|int|list|object|str|tuple|type|optional|function)"),
    (r"py:exc", r"[A-Z]\w+(Error|Exit|Interrupt|Group|Exception)"),
]

for _name in parallel_agents.__all__:
    # Signatures should name things as users import them, not the private module that they are written in.
    _public = getattr(parallel_agents, _name)
    if getattr(_public, "__module__", "").startswith("parallel_agents._"):
        _public.__module__ = "parallel_agents"
