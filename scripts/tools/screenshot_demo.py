"""Take the demo's picture for the docs: `python scripts/tools/screenshot_demo.py RUN docs/images/demo.png`."""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for the tests' browser
from hf_zocl.demo.page import launch_page, make_page
from tests.browser import Browser


def screenshot_demo(run: Path, file: Path, width: int = 1100, height: int = 760) -> None:
    """Save a picture of a run's page, with 64 colours to keep it small."""
    page = make_page(run)
    launch_page(page, "127.0.0.1", prevent_thread_lock=True, quiet=True)
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, Browser(Path(folder)) as browser:
            tab = browser.open(page.local_url, width, height)
            tab.wait("document.querySelector('[data-stage]') && document.querySelector('input[type=range]')")
            time.sleep(1)  # until the images are loaded
            tab.screenshot(file, whole=False)
    finally:
        page.close()
    with Image.open(file) as picture:
        small = picture.convert("RGB").quantize(64)
    small.save(file, optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("file", type=Path)
    options = parser.parse_args()
    screenshot_demo(options.run, options.file)
