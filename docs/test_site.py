"""The built site shows what it should, also on a phone: ``nox -s docs`` builds it and runs this."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import chromium
from picture import both
from playwright.sync_api import Browser
from proofs import TESTS, proofs, sentence
from ratios import FIGURES, OURS, ratios
from test_promises import PROMISES, promised, proved_by_file

SITE = Path(__file__).parent / "_build" / "html"
PAGES = [page for page in sorted(SITE.glob("**/*.html")) if "_static" not in page.parts]
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as one:
        yield one


def test_the_site_was_built() -> None:
    assert {"index.html", "promises.html", "comparison.html", "security.html"} <= {page.name for page in PAGES}


@pytest.mark.parametrize("viewport", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_no_page_scrolls_sideways(browser: Browser, viewport: dict[str, int]) -> None:
    tab = browser.new_page(viewport=viewport)  # type: ignore[arg-type]
    too_wide = []
    for page in PAGES:
        tab.goto(page.as_uri())
        if tab.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth"):
            too_wide.append(page.relative_to(SITE).as_posix())
    tab.close()
    assert too_wide == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_first_page_shows_a_run_in_the_readers_colours(browser: Browser, scheme: str) -> None:
    context = browser.new_context(color_scheme=scheme)  # type: ignore[arg-type]
    tab = context.new_page()
    tab.goto((SITE / "index.html").as_uri())
    shown = [image for image in tab.locator(".run-picture img").all() if image.is_visible()]
    assert [image.get_attribute("src") for image in shown] == [f"_static/run-{scheme}.svg"]
    assert shown[0].evaluate("image => image.naturalWidth") == 1000
    tab.locator(".run-picture").click()
    assert tab.locator(".row").count() == 10
    context.close()


def test_each_promise_tells_which_tests_prove_it() -> None:
    page = (SITE / "promises.html").read_text("utf-8")
    found = proofs(TESTS)
    for promise in promised(PROMISES.read_text("utf-8")):
        item = page[page.index(f'id="{promise.lower()}"') :]
        assert f"<strong>{promise}</strong>" in item
        told = item[: item.index("</details>")]
        assert re.findall(r"<li>(.+?) <code>", told) == [sentence(name) for _, name in found[promise]]


def test_no_mark_is_overlooked() -> None:
    assert set(proofs(TESTS)) == set().union(*proved_by_file().values())


def test_marks_count_for_all_that_they_hold_for(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        """
pytestmark = [pytest.mark.anyio, pytest.mark.proves("X1")]
def helper(): ...
async def test_a(): ...
@pytest.mark.proves("X2", "X1")
class TestIt:
    @pytest.mark.parametrize("a", [pytest.param(1, marks=pytest.mark.proves("X3"))])
    def test_b(self, a): ...
""",
        "utf-8",
    )
    file = f"{tmp_path.name}/test_it.py"
    assert proofs(tmp_path) == {
        "X1": [(file, "test_a"), (file, "test_b")],
        "X2": [(file, "test_b")],
        "X3": [(file, "test_b")],
    }


def test_ratios_are_those_of_the_figures() -> None:
    text = FIGURES.read_text("utf-8")
    found = ratios(text)
    assert {"asyncio.gather + Semaphore", "aiometer.run_all", "LangGraph Send"} <= set(found)
    assert not any(name.startswith(OURS) for name in found)
    for name, by_backend in found.items():
        for backend, ratio in by_backend.items():
            assert re.search(rf"{backend} +{re.escape(name)} .* {ratio:.3f}$", text, flags=re.MULTILINE)


def test_an_image_without_colours_for_dark_pages_is_refused() -> None:
    with pytest.raises(ValueError, match="dark"):
        both("<svg><style>text{fill:red}</style></svg>")
