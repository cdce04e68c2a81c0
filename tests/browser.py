"""A real, headless browser, driven through its pipe: opened, clicked, asked what it shows and what it complains of."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any


BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe")
QUIET = ("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync")
# Elements that hold text of their own and are seen, two of which lie over each other, neither within the other.
OVERLAPS = """(() => {
  const shown = element => {
    const style = getComputedStyle(element);
    return style.visibility !== "hidden" && style.opacity !== "0" && element.checkVisibility();
  };
  const words = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, parent = node.parentElement;
    if (!node.data.trim() || ["SCRIPT", "STYLE", "NOSCRIPT"].includes(parent.tagName) || !shown(parent)) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    for (const box of range.getClientRects()) {
      let [left, right, top, bottom] = [box.left, box.right, box.top, box.bottom];
      for (let each = parent; each; each = each.parentElement) {  // what overflows is cut off
        if (getComputedStyle(each).overflowX === "visible") continue;
        const own = each.getBoundingClientRect();
        left = Math.max(left, own.left); right = Math.min(right, own.right);
        top = Math.max(top, own.top); bottom = Math.min(bottom, own.bottom);
      }
      if (right - left > 1 && bottom - top > 1) words.push({node, text: node.data.trim(), left, right, top, bottom});
    }
  }
  const over = [];
  words.forEach((a, i) => words.slice(i + 1).forEach(b => {
    const width = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const height = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    if (a.node !== b.node && width > 1.5 && height > 3.5) over.push([a.text, b.text]);
  }));
  const view = document.documentElement.clientWidth;
  const wide = words.filter(word => word.right > view + 0.5).map(word => word.text);
  return {over, wide, words: words.length, page: document.documentElement.scrollWidth, view};
})()"""


class Browser:
    """A context in which a browser runs, with a profile of its own.

    Args:
        folder: Receives the profile.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self) -> Browser:
        # The browser reads commands from descriptor 3, and writes answers to descriptor 4.
        pipes = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for pipe in (os.pipe(), os.pipe()) for end in pipe]
        commands, self._out, self._in, answers = pipes

        def wire() -> None:
            os.dup2(commands, 3)
            os.dup2(answers, 4)

        self._process = subprocess.Popen(
            [str(BROWSER), *FLAGS, *QUIET, f"--user-data-dir={self.folder / 'profile'}", "about:blank"],
            preexec_fn=wire,
            pass_fds=(3, 4),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands), os.close(answers)
        self._buffer, self._number = b"", 0
        self.events: list[dict[str, Any]] = []
        return self

    def __exit__(self, *error) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._out), os.close(self._in)

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Send a command of the DevTools protocol, and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        message |= {"sessionId": session} if session else {}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive(60)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def _receive(self, seconds: float) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while b"\0" not in self._buffer:
            if not select.select([self._in], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError("the browser does not answer")
            read = os.read(self._in, 1 << 20)
            if not read:
                raise RuntimeError("the browser has ended")
            self._buffer += read
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def open(self, url: str, width: int, height: int = 1200, dark: bool = False) -> Page:
        """Open a page in a window of this size."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Log"):
            page.call(f"{domain}.enable")
        page.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", features=[scheme])
        page.call("Page.navigate", url=url)
        return page


class Page:
    """A page that is open."""

    def __init__(self, browser: Browser, session: str):
        self.browser, self.session = browser, session

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **params)

    def ask(self, script: str) -> Any:
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def wait(self, script: str, seconds: float = 60) -> Any:
        """Wait until an expression is true, and return it."""
        end = time.monotonic() + seconds
        # An element itself cannot come here.
        tried = f"(() => {{ try {{ const v = {script}; return v instanceof Node || v }} catch {{ return null }} }})()"
        while not (found := self.ask(tried)):
            if time.monotonic() > end:
                raise TimeoutError(f"{script}; the page: {self.ask('document.body.innerText')[:2000]}")
            time.sleep(0.1)
        return found

    def click(self, selector: str, place: int = 0) -> None:
        """Click into the middle of an element."""
        box = self.ask(
            f"(() => {{ const e = document.querySelectorAll({json.dumps(selector)})[{place}];"
            "e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect();"
            "return [b.left + b.width / 2, b.top + b.height / 2] })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def press(self, key: str) -> None:
        """Press a key where the focus is."""
        code = {"ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35}[key]
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def give_file(self, selector: str, file: Path) -> None:
        """Choose a file in an input of type file."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(file)], nodeId=node)

    def layout(self) -> dict[str, Any]:
        """What does not fit: texts that lie over each other (`over`) or beyond the right edge (`wide`)."""
        return self.ask(OVERLAPS)

    def screenshot(self, file: Path, whole: bool = True) -> Path:
        """Save a picture of the page as PNG."""
        picture = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(picture["data"]))
        return file

    @property
    def errors(self) -> list[str]:
        """What the page's console holds of errors, uncaught ones and failed requests included."""
        self.ask("1")  # what was said before is there now
        found = []
        for event in self.browser.events:
            if event.get("sessionId") != self.session:
                continue
            method, params = event["method"], event["params"]
            if method == "Runtime.exceptionThrown":
                found.append(json.dumps(params["exceptionDetails"])[:500])
            if method == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
                found.append(json.dumps(params["args"])[:500])
            if method == "Log.entryAdded" and params["entry"]["level"] == "error":
                found.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        return found
