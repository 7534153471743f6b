"""A directive, ``run-picture``: the picture of the run in docs/run.json, as ``parallel-agents timeline`` draws it.

The image is made twice, as Furo's readers choose light or dark for themselves; the page beside it follows their system.
"""

import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from parallel_agents import ParallelExecutionResult
from parallel_agents._timeline.page import page
from parallel_agents._timeline.svg import svg
from parallel_agents.serialization import read_report

DARK = re.compile(r"@media\(prefers-color-scheme:dark\)\{((?:[^{}]*\{[^{}]*\})*)\s*\}")


def recorded() -> ParallelExecutionResult[Any]:
    """Return the result that the picture is of."""
    return read_report(Path(__file__).parent.parent / "run.json").result


def both(image: str) -> tuple[str, str]:
    """Return the image as it is for readers of light and of dark pages.

    Raises:
        ValueError: If it has no colours for dark pages.
    """
    if len(DARK.findall(image)) != 1:
        raise ValueError("the image does not tell its colours for dark pages as this expects it")
    return DARK.sub("", image), DARK.sub(r"\1", image)


class RunPicture(SphinxDirective):
    """Stands for the picture, which leads to the page of the same run."""

    def run(self) -> list[nodes.Node]:
        """Return what stands there."""
        result = recorded()
        alt = (
            f"A bar for each of {len(result.outcomes)} agents over {result.total_duration_seconds:.0f} seconds, four "
            f"at a time: {result.agents_succeeded} succeeded, one failed and one ran out of time. "
            "Above them, how many ran and how many waited."
        )
        images = "".join(
            f'<img class="only-{kind}" src="_static/run-{kind}.svg" alt="{alt}" width="1000">'
            for kind in ("light", "dark")
        )
        return [nodes.raw("", f'<a class="run-picture" href="_static/run.html">{images}</a>', format="html")]


def _draw(app: Sphinx) -> None:
    folder = Path(app.doctreedir, "run-picture")
    folder.mkdir(parents=True, exist_ok=True)
    result = recorded()
    light, dark = both(svg(result))
    for name, text in {"run-light.svg": light, "run-dark.svg": dark, "run.html": page(result)}.items():
        (folder / name).write_text(text, "ascii")
    app.config.html_static_path.append(str(folder))


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_directive("run-picture", RunPicture)
    app.connect("builder-inited", _draw)
    return {"parallel_read_safe": True}
