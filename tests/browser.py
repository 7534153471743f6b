"""A headless Chromium for tests of pages: Debian's, or the one that Playwright brings."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

FLAGS = [
    "--no-sandbox",  # tests may run as root, and open their own pages alone
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@contextmanager
def chromium() -> Iterator[Browser]:
    """Give a browser that is closed afterwards; the test is skipped where there is none."""
    with sync_playwright() as playwright:
        installed = shutil.which("chromium") or shutil.which("google-chrome") or playwright.chromium.executable_path
        if not Path(installed).exists():
            pytest.skip("no Chromium is installed: apt-get install chromium, or playwright install chromium")
        browser = playwright.chromium.launch(executable_path=installed, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()
