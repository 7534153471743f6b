"""A directive, ``ratios``: what an agent costs beside peers, as a table, of the figures in benchmarks/README.md.

Figures stand in that file alone, as the programs print them; here they are only read.
"""

import re
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

FIGURES = Path(__file__).parent.parent.parent / "benchmarks" / "README.md"
LINE = re.compile(r"^  (asyncio|trio) +(.+?) +[\d.]+ +([\d.]+)$", re.MULTILINE)
OURS = "parallel_agents"


def ratios(text: str) -> dict[str, dict[str, float]]:
    """Return by peer and backend what an agent here costs, as a share of one there; in the order of the text."""
    found: dict[str, dict[str, float]] = {}
    for backend, name, ratio in LINE.findall(text):
        if not name.startswith(OURS):
            found.setdefault(name, {})[backend] = float(ratio)
    return found


class Ratios(SphinxDirective):
    """Stands for the table."""

    def run(self) -> list[nodes.Node]:
        """Return what stands there."""
        self.env.note_dependency(str(FIGURES))
        lines = ["| Beside | asyncio | trio |", "| --- | ---: | ---: |"]
        for name, by_backend in ratios(FIGURES.read_text("utf-8")).items():
            cells = [f"{by_backend[backend]:.2f}" if backend in by_backend else "" for backend in ("asyncio", "trio")]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        return self.parse_text_to_nodes("\n".join(lines))


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_directive("ratios", Ratios)
    return {"parallel_read_safe": True}
