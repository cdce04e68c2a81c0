import itertools

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from hf_zocl.report.figures import draw_accuracy_matrix, plot_accuracy_matrix
from tests.helpers import slow_but_for


def make_results(tasks: int, top: float = 0.95, **recipe) -> dict:
    rng = np.random.default_rng(0)
    matrix = [[float(top * rng.uniform(0.3, 1)) for _ in range(row + 1)] for row in range(tasks)]
    seen = [sum(row) / len(row) for row in matrix]
    zero_shot = [top * 0.6 / (1 + 0.1 * t) for t in range(tasks)]
    return {
        "benchmark": "cifar100",
        "accuracy_matrix": matrix,
        "seen_accuracy": seen,
        "zero_shot": {"seen_accuracy": zero_shot, "avg": sum(zero_shot) / tasks, "last": zero_shot[-1]},
        "last": seen[-1],
        "avg": sum(seen) / tasks,
        "recipe": {"adapter": "lora", "zo_branch": "dual", "zo_layers": "hop-even", **recipe},
    }


def visible_texts(figure) -> list[tuple[str, object]]:
    """(text, box in pixels) of everything written in a drawn figure."""
    FigureCanvasAgg(figure).draw()
    texts = [text for text in figure.findobj(matplotlib.text.Text) if text.get_text().strip() and text.get_visible()]
    return [(text.get_text(), text.get_window_extent()) for text in texts]


@pytest.mark.parametrize("tasks", slow_but_for([2, 20], [1, 2, 5, 10, 11, 20, 45]))
def test_no_text_is_clipped_or_overlaps(tasks):
    figure = draw_accuracy_matrix(make_results(tasks, top=1.0))
    texts = visible_texts(figure)
    for name, box in texts:
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, name
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1, name
    for (one, box), (other, other_box) in itertools.combinations(texts, 2):
        assert not box.overlaps(other_box), (one, other)


def test_long_title_stays_inside_the_figure():
    figure = draw_accuracy_matrix(make_results(5, zo_layers=[f"encoder.layers.{i}.attention" for i in range(12)]))
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 for _, box in visible_texts(figure))


def test_cells_show_percent_and_the_upper_triangle_is_empty():
    results = make_results(3)
    heatmap = draw_accuracy_matrix(results).axes[0]
    cells = {tuple(map(int, text.get_position())): text.get_text() for text in heatmap.texts}
    expected = {
        (i, t): f"{100 * value:.1f}" for t, row in enumerate(results["accuracy_matrix"]) for i, value in enumerate(row)
    }
    assert cells == expected


@pytest.mark.parametrize("tasks", [5, 20])
def test_cell_text_contrasts_with_its_cell(tasks):
    heatmap = draw_accuracy_matrix(make_results(tasks)).axes[0]
    image = heatmap.images[0]
    for text in heatmap.texts:
        column, row = map(int, text.get_position())
        rgb = np.array(
            [image.cmap(image.norm(image.get_array()[row, column]))[:3], matplotlib.colors.to_rgb(text.get_color())]
        )
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        dark, light = sorted(linear @ [0.2126, 0.7152, 0.0722])
        assert (light + 0.05) / (dark + 0.05) >= 4.5  # WCAG 2, level AA


def test_too_many_tasks_have_no_cell_text():
    assert len(draw_accuracy_matrix(make_results(30)).axes[0].texts) == 0


def test_curves_are_trained_and_zero_shot_of_the_tasks_done():
    results = make_results(3)
    results["zero_shot"]["seen_accuracy"] += [0.1, 0.1]
    trained, zero_shot = draw_accuracy_matrix(results).axes[1].lines
    assert trained.get_ydata() == pytest.approx(100 * np.array(results["seen_accuracy"]))
    assert zero_shot.get_ydata() == pytest.approx(100 * np.array(results["zero_shot"]["seen_accuracy"][:3]))
    assert trained.get_linestyle() != zero_shot.get_linestyle() and trained.get_marker() != zero_shot.get_marker()


def test_title_shows_no_local_path():
    results = make_results(2, dataset_path="/srv/private/flowers") | {"benchmark": "none"}
    title = draw_accuracy_matrix(results).get_suptitle()
    assert title.startswith("flowers") and "private" not in title


def test_png_is_written_and_nothing_else(tmp_path):
    path = plot_accuracy_matrix(make_results(2), tmp_path / "run" / "accuracy_matrix.png")
    assert [file.name for file in path.parent.iterdir()] == ["accuracy_matrix.png"]
    with Image.open(path) as image:
        assert image.format == "PNG" and image.width > 1000


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "accuracy_matrix.png"
    path.write_bytes(b"old")

    def fail(self, target, **_):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        plot_accuracy_matrix(make_results(2), path)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_same_results_give_the_same_bytes(tmp_path):
    one, two = (plot_accuracy_matrix(make_results(2), tmp_path / name).read_bytes() for name in ("a.png", "b.png"))
    assert one == two


@pytest.mark.parametrize(("rows", "message"), [([], "empty"), ([[0.5], [0.5]], "row 2 has 1 entries, expected 2")])
def test_malformed_matrix_is_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        draw_accuracy_matrix(make_results(2) | {"accuracy_matrix": rows})
