"""The demo in a real browser: it slides, it looks at files, it fits, and it complains of nothing."""

import subprocess
import sys
from html import unescape

import pytest
import torch
from PIL import Image

from tests.browser import BROWSER, Browser
from tests.demo.runs import CLASSES, NAMES, save_run


gradio = pytest.importorskip("gradio")
from hf_zocl.demo.page import launch_page, make_page  # noqa: E402
from hf_zocl.hub.series import TaskSeries  # noqa: E402


NOW = "document.querySelector('[data-stage]')"
SLIDER = "input[type=range]"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def page(run):
    made = make_page(run)
    launch_page(made, "127.0.0.1", prevent_thread_lock=True, quiet=True)
    yield made
    made.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if BROWSER is None:
        pytest.skip("no browser is installed")
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


def shown(tab, stage: int) -> list[str]:
    """The rows of probabilities at a stage, once it is shown."""
    tab.wait(f"{NOW}.dataset.stage === '{stage}'")
    return tab.ask("[...document.querySelectorAll('.zocl .row')].map(each => each.innerText)")


@pytest.mark.parametrize("width", [1280, 400])
def test_sliding_shows_what_was_forgotten_and_everything_fits(width, page, run, browser, tmp_path):
    tab = browser.open(page.local_url, width)
    stages = {3: shown(tab, 3)}
    tab.wait(f"(document.querySelector('{SLIDER}').focus(), true)")
    for stage in (2, 1, 0):
        tab.press("ArrowLeft")
        stages[stage] = shown(tab, stage)
    assert all(stages[stage] != stages[stage + 1] for stage in (0, 1, 2))
    assert len(stages[1]) == 2 and len(stages[0]) == 6  # the classes that are known by then
    tab.press("ArrowRight")
    assert shown(tab, 1) == stages[1]

    tab.click("#zocl-gallery button.thumbnail-item", 4)
    tab.wait("document.querySelector('.zocl .true')")

    picture = tmp_path / "mine.png"
    generator = torch.Generator().manual_seed(1)
    Image.fromarray(torch.randint(0, 256, (40, 30, 3), generator=generator, dtype=torch.uint8).numpy()).save(picture)
    tab.click("button[aria-label='Remove Image']")
    tab.wait("document.body.innerText.includes('Drop an image, or pick')")
    tab.wait("document.querySelector('input[type=file]')")
    tab.give_file("input[type=file]", picture)
    tab.wait(f"{NOW} && !document.querySelector('.zocl .true')")
    stage = int(tab.ask(f"{NOW}.dataset.stage"))
    expected = TaskSeries.load(run).probabilities([str(picture)])[0, stage]
    said = tab.ask("document.querySelector('.says').innerText")
    place = int(expected.argmax())
    assert said == f"{CLASSES[place]} {100 * float(expected[place]):.1f} %"

    layout = tab.layout()
    assert layout["over"] == [] and layout["wide"] == [] and layout["page"] <= layout["view"] == width
    assert layout["words"] > 30
    assert tab.ask("document.title") == "run · hf_zocl"  # no class name has run
    assert tab.ask("document.querySelectorAll('.zocl img, .zocl script').length") == 0
    text = unescape(tab.ask("document.body.innerHTML"))
    assert all(NAMES[label] in text for label in (0, 5, 6)) and "a 2 4 name" not in text
    assert tab.errors == []


def test_the_browser_sees_what_overlaps_and_what_fails(browser, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        "<p style='position:absolute;top:9px'>one text</p><p style='position:absolute;top:12px'>another</p>"
        "<p style='position:absolute;left:390px;width:99px'>wide</p><script>console.error('bad'); nothing()</script>"
    )
    tab = browser.open(page.as_uri(), 400)
    tab.wait("document.readyState === 'complete'")
    layout = tab.layout()
    assert ["one text", "another"] in layout["over"] and layout["wide"] == ["wide"]
    assert len(tab.errors) == 2


def test_without_gradio_one_line_says_what_to_install(tmp_path):
    script = "import sys; sys.modules['gradio'] = None; sys.argv = ['hf_zocl', 'demo', 'run'];"
    script += "from hf_zocl.__main__ import main; main()"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1].startswith("error: gradio is missing: pip install gradio, or")
