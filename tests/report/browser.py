"""A real headless browser, asked how it lays out a page."""

from pathlib import Path

import pytest

from tests.browser import BROWSER, Browser


needs_browser = pytest.mark.skipif(BROWSER is None, reason="no browser is installed")
HOLDS = """({
  images: document.images.length,
  drawn: [...document.images].filter(each => each.complete && each.naturalWidth > 0).length,
  scripts: document.scripts.length,
  charts: document.querySelectorAll("svg.chart").length,
  background: getComputedStyle(document.body).backgroundColor,
  title: document.title,
  planted: window.planted})"""


def lay_out(report: Path, width: int, tmp_path: Path, dark: bool = False) -> dict:
    """Open a page in a window of some width, and ask it what it holds and what does not fit."""
    page = tmp_path / "page.html"
    page.write_text(report.read_text(encoding="utf-8").replace(' loading="lazy"', ""), encoding="utf-8")
    with Browser(tmp_path) as browser:
        opened = browser.open(page.as_uri(), width, dark=dark)
        opened.wait("document.readyState === 'complete' && location.protocol === 'file:'")
        opened.ask("document.querySelectorAll('details').forEach(each => each.open = true)")
        return {**opened.layout(), **opened.ask(HOLDS), "console": opened.errors}
