"""A real headless browser, asked how it lays out a page."""

import html
import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.browser import BROWSER


needs_browser = pytest.mark.skipif(BROWSER is None, reason="no browser is installed")
PROBE = """<script>
document.querySelectorAll("details").forEach(each => each.open = true);
addEventListener("load", () => {
  const view = document.documentElement.clientWidth, inside = each => each.closest(".scroll") !== null;
  const boxes = [...document.querySelectorAll("h1,h2,h3,p,figcaption,img,svg,table,dt,dd,summary,li,div,strong")];
  const wide = boxes.filter(each => !inside(each) && each.getBoundingClientRect().right > view + 0.5);
  const texts = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode;
    const holder = node.parentNode;
    if (!node.data.trim() || ["SCRIPT", "STYLE"].includes(holder.nodeName) || inside(holder)) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const visible = node.parentNode.closest("th") ? node.parentNode.closest("th").getBoundingClientRect() : null;
    for (const box of range.getClientRects()) {
      // A name that its cell cuts off is seen as far as the cell goes.
      const seen = visible === null ? box : {
        left: Math.max(box.left, visible.left), right: Math.min(box.right, visible.right),
        top: Math.max(box.top, visible.top), bottom: Math.min(box.bottom, visible.bottom)};
      const {left, right, top, bottom} = seen;
      texts.push({node, text: node.data.trim(), left, right, top, bottom});
    }
  }
  const overlaps = [];
  for (let i = 0; i < texts.length; i++) for (let j = i + 1; j < texts.length; j++) {
    const a = texts[i], b = texts[j];
    const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    if (a.node !== b.node && across > 1 && down > 4)
      overlaps.push([a.text, b.text]);
  }
  const found = {view, page: document.documentElement.scrollWidth, wide: wide.map(each => each.outerHTML.slice(0, 90)),
    overlaps: overlaps.slice(0, 5), texts: texts.length, images: document.images.length,
    drawn: [...document.images].filter(each => each.complete && each.naturalWidth > 0).length,
    scripts: document.scripts.length, charts: document.querySelectorAll("svg.chart").length,
    background: getComputedStyle(document.body).backgroundColor, title: document.title, planted: window.planted};
  parent.postMessage(JSON.stringify(found), "*");
});</script></body>"""


def lay_out(report: Path, width: int, tmp_path: Path, dark: bool = False) -> dict:
    """Open a page in a window of some width, and ask it what does not fit; `console` has what it complains of."""
    text = report.read_text(encoding="utf-8").replace(' loading="lazy"', "")
    (tmp_path / "page.html").write_text(text.replace("</body>", PROBE), encoding="utf-8")
    outer = tmp_path / "outer.html"
    outer.write_text(
        "<!doctype html><body><script>addEventListener('message', e => document.body.dataset.found = e.data)</script>"
        f"<iframe src='page.html' style='width:{width}px;height:4000px;border:0'></iframe></body>"
    )
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    command = [BROWSER, *flags, "--window-size=1400,4000", "--virtual-time-budget=10000", "--dump-dom", outer.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    found = re.search(r'data-found="([^"]*)"', done.stdout)
    assert found, done.stdout[-500:] + done.stderr[-500:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return {**json.loads(html.unescape(found.group(1))), "console": console}
