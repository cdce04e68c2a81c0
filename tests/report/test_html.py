"""The report: what is in it, and how a real browser lays it out."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from hf_zocl.report import load_groups, write_report
from hf_zocl.report.html import report_figures
from hf_zocl.report.plots import (
    DARK,
    LIGHT,
    draw_accuracy,
    draw_forgetting,
    draw_matrix,
    draw_memory,
    draw_settings,
    draw_variance,
    draw_variance_by_layer,
)
from tests.report.test_figures import make_results, visible_texts


BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


def save_run(folder: Path, seed: int, tasks: int = 5, by_layer: bool = False, **recipe) -> Path:
    """A run of some seed, with a training log."""
    rng = np.random.default_rng(seed)
    results = make_results(tasks, **recipe)
    results["seen_accuracy"] = [float(value * rng.uniform(0.9, 1.1)) for value in results["seen_accuracy"]]
    names = ["zo_variance_vision", "zo_variance_language"]
    names += [f"zo_variance_vision_layer_{layer}" for layer in (2, 4, 6)] if by_layer else []
    log = [{"loss": 1.0, **{name: float(rng.uniform(1e-4, 1e-1)) for name in names}} for _ in range(tasks)]
    results |= {"seed": seed, "training": log if recipe.get("zo_branch") != "none" else [{"loss": 1.0}] * tasks}
    results |= {"seconds": 100.0 + seed, "peak_memory_bytes": int(1e9 * rng.uniform(1, 2)), "scenario": "class"}
    results |= {"forgetting": 0.2, "backward_transfer": -0.2, "last": results["seen_accuracy"][-1]}
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))
    return folder


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    """Two settings with three seeds each."""
    for seed in (0, 1, 2):
        save_run(tmp_path / "runs" / "fo" / f"seed-{seed}", seed, zo_branch="none")
        save_run(tmp_path / "runs" / "language hop-odd" / f"seed-{seed}", seed, by_layer=True)
    return [tmp_path / "runs" / "fo", tmp_path / "runs" / "language hop-odd"]


def test_one_file_holds_everything(runs, tmp_path):
    path = write_report(runs, tmp_path / "report", baseline="fo")
    text = path.read_text(encoding="utf-8")
    sources = re.findall(r'(?:src|srcset|href)="([^"]*)"', text)
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "<script" not in text and "url(" not in text
    names = {file.name for file in (tmp_path / "report" / "figures").iterdir()}
    expected = ("settings", "accuracy", "forgetting", "memory", "zo-variance", "zo-variance-by-layer")
    expected += ("accuracy-matrix-1",)
    assert names >= {f"{name}{ending}" for name in expected for ending in (".png", "-dark.png")}
    assert {file.name for file in (tmp_path / "report").iterdir()} >= {
        "comparison.md",
        "comparison.tex",
        "report.html",
    }


def test_the_settings_stand_where_their_means_are(runs):
    groups = load_groups(runs)
    axes = draw_settings(groups, LIGHT).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [group.name for group in groups]
    last, avg = (container.lines[0].get_xdata() for container in axes.containers)
    assert list(last) == pytest.approx([100 * group.values("last").mean() for group in groups])
    assert list(avg) == pytest.approx([100 * group.values("avg").mean() for group in groups])


def test_the_report_names_no_local_path_and_no_token(tmp_path):
    run = save_run(
        tmp_path / "run", 0, model_name_or_path="/srv/private/clip", hub_token="hf_secret", output_dir="/srv/x"
    )
    text = write_report([run], tmp_path).read_text(encoding="utf-8")
    assert "private" not in text and "hf_secret" not in text and "/srv" not in text
    assert "<dt>model_name_or_path</dt><dd>clip</dd>" in text


def test_names_are_escaped(tmp_path):
    run = save_run(tmp_path / "a<b>&c", 0)
    text = write_report([run], tmp_path / "report").read_text(encoding="utf-8")
    assert "a&lt;b&gt;&amp;c" in text and "a<b>" not in text


def test_a_run_of_one_task_and_no_zeroth_order_layer_has_no_empty_figure(tmp_path):
    run = save_run(tmp_path / "run", 0, tasks=1, zo_branch="none")
    names = [figure.name for figure in report_figures(load_groups([run]))]
    assert names == ["accuracy", "memory", "accuracy-matrix"]


def test_error_bars_are_the_standard_deviation_over_seeds(runs):
    figure = draw_accuracy(load_groups(runs), LIGHT)
    curves = 100 * load_groups(runs)[0].curves("seen_accuracy")
    container = figure.axes[0].containers[0]
    (bars,) = container[2]
    lengths = np.array([segment[1][1] - segment[0][1] for segment in bars.get_segments()])
    assert lengths == pytest.approx(2 * curves.std(axis=0, ddof=1))
    assert container[0].get_ydata() == pytest.approx(curves.mean(axis=0))


def test_settings_are_told_apart_without_colour(runs):
    lines = [line for line in draw_accuracy(load_groups(runs), LIGHT).axes[0].lines if len(line.get_xdata()) == 5]
    styles = {(line.get_marker(), line.get_linestyle()) for line in lines if line.get_marker() in "os"}
    assert len(styles) == 2


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=lambda theme: theme.name)
@pytest.mark.parametrize("tasks", [2, 5, 10, 20])
def test_no_text_of_a_figure_is_clipped_or_overlaps(theme, tasks, tmp_path):
    for number, name in enumerate(("first-order", "language hop-odd", "a very long name of a setting " * 3)):
        save_run(tmp_path / name, number, tasks, by_layer=True)
    groups = load_groups(sorted(tmp_path.iterdir()))
    drawn = [draw_matrix(groups[0], theme)]
    drawn += [draw(groups, theme) for draw in (draw_settings, draw_accuracy, draw_forgetting, draw_memory)]
    drawn += [draw(groups, theme) for draw in (draw_variance, draw_variance_by_layer)]
    for figure in drawn:
        texts = visible_texts(figure)
        ticks = [text for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for text in hidden(axis)]
        texts = [(name, box) for name, box in texts if (name, box.x0) not in ticks]
        for name, box in texts:
            assert figure.bbox.x0 - 1 <= box.x0 and box.x1 <= figure.bbox.x1 + 1, name
            assert figure.bbox.y0 - 1 <= box.y0 and box.y1 <= figure.bbox.y1 + 1, name
        for index, (one, box) in enumerate(texts):
            for other, other_box in texts[index + 1 :]:
                assert not box.overlaps(other_box), (one, other)


def hidden(axis: matplotlib.axis.Axis) -> list[tuple[str, float]]:
    """Labels of ticks beyond the axis' ends, which are not drawn."""
    low, high = sorted(axis.get_view_interval())
    outside = [t for t in axis.get_major_ticks() + axis.get_minor_ticks() if not low <= t.get_loc() <= high]
    return [(t.label1.get_text(), t.label1.get_window_extent().x0) for t in outside]


def lay_out(report: Path, width: int, tmp_path: Path) -> dict:
    """Open the report in the browser, and ask it what does not fit."""
    probe = """<script>
    document.querySelectorAll("details").forEach(each => each.open = true);
    addEventListener("load", () => {
      const view = document.documentElement.clientWidth, inside = each => each.closest(".scroll") !== null;
      const boxes = [...document.querySelectorAll("h1,h2,h3,p,figcaption,img,table,dt,dd,summary")];
      const wide = boxes.filter(each => !inside(each) && each.getBoundingClientRect().right > view + 0.5);
      const images = [...document.images];
      const found = {view, page: document.documentElement.scrollWidth,
        wide: wide.map(each => each.outerHTML.slice(0, 80)), images: images.length,
        drawn: images.filter(each => each.complete && each.naturalWidth > 400).length,
        background: getComputedStyle(document.body).backgroundColor};
      document.body.setAttribute("data-found", JSON.stringify(found));
    });</script></body>"""
    page = tmp_path / "probe.html"
    page.write_text(report.read_text(encoding="utf-8").replace("</body>", probe), encoding="utf-8")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    command = [
        BROWSER,
        *flags,
        f"--window-size={width},2000",
        "--virtual-time-budget=10000",
        "--dump-dom",
        page.as_uri(),
    ]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = re.search(r'data-found="([^"]*)"', dom)
    assert found, dom[-500:]
    return json.loads(found.group(1).replace("&quot;", '"').replace("&lt;", "<").replace("&gt;", ">"))


@pytest.mark.skipif(BROWSER is None, reason="no browser is installed")
@pytest.mark.parametrize("width", [1280, 400])
def test_a_real_browser_fits_the_report_to_its_width(width, runs, tmp_path):
    found = lay_out(write_report(runs, tmp_path / "report", baseline="fo"), width, tmp_path)
    assert found["page"] <= found["view"] <= max(width, 500)  # some browsers open no narrower window than 500
    assert found["wide"] == []
    assert found["images"] == found["drawn"] == 8
    assert found["background"] == "rgb(255, 255, 255)"


def test_figures_are_sharp_on_a_screen_of_twice_the_density(runs, tmp_path):
    write_report(runs, tmp_path / "report")
    with Image.open(tmp_path / "report" / "figures" / "accuracy.png") as image:
        assert image.width >= 800


def test_a_missing_run_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere: there is no such folder"):
        write_report([tmp_path / "nowhere"], tmp_path)


def test_folders_without_a_finished_task_are_no_runs(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no results.json with a finished task in .*empty"):
        write_report([tmp_path / "empty"], tmp_path)


def test_a_file_that_is_no_run_is_named(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").write_text('{"seed": 1}')
    with pytest.raises(ValueError, match="run/results.json: no results of a run: accuracy_matrix, seen_accuracy"):
        write_report([tmp_path / "run"], tmp_path)
