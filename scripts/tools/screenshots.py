"""Screenshots of a run's report for the documentation, taken by a headless Chromium.

    python scripts/tools/screenshots.py runs/quickstart

Writes docs/images/report.webp, the whole page, and docs/images/report_small.webp, the top of it, for the README.
"""

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from hf_zocl.report import write_report


IMAGES = Path(__file__).resolve().parents[2] / "docs" / "images"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def take(page: Path, file: Path, width: int = 1280, height: int = 4000) -> Image.Image:
    """A picture of a page on a light background, without the empty space below it."""
    browser = next(path for name in BROWSERS if (path := shutil.which(name)))
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={file.parent}/profile",
    ]
    flags += ["--blink-settings=preferredColorScheme=1", f"--window-size={width},{height}", f"--screenshot={file}"]
    subprocess.run([browser, *flags, page.resolve().as_uri()], check=True, capture_output=True, timeout=120)
    image = Image.open(file).convert("RGB")
    rows = np.flatnonzero((np.asarray(image) < 250).any(axis=(1, 2)))
    return image.crop((0, 0, image.width, min(image.height, int(rows[-1]) + 24)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        page = write_report([options.run], folder)
        whole = take(page, Path(folder) / "page.png")
        small = whole.crop((0, 0, whole.width, min(whole.height, 1000)))
        small.thumbnail((880, 880))
        for name, image in (("report.webp", whole), ("report_small.webp", small)):
            image.save(IMAGES / name, quality=70, method=6)
            print(f"{IMAGES / name}: {(IMAGES / name).stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
