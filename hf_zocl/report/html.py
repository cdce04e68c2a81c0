"""The report: one HTML file with everything in it, and its figures as PNG files next to it."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure

from ..files import written_whole
from .compare import Comparison, compare_groups
from .plots import (
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
from .runs import RunGroup, by_benchmark, load_groups


TEMPLATE = "report_template.html"
MAX_DRAWN = 16  # settings in a figure; more are no longer told apart, and take minutes to draw
# An allow-list: a recipe also holds tokens, folders and host names, which must not be published.
SHOWN_ARGUMENTS = re.compile(
    "(zo|lora|moe)_.*|adapter|model_name_or_path|benchmark|scenario|learning|(initial_)?increment|class_order_seed"
    "|max_(train|test)_images_per_class|prompt_template|optim|learning_rate|weight_decay|lr_scheduler_type"
    "|warmup_steps|max_steps|num_train_epochs|per_device_train_batch_size|gradient_accumulation_steps|bf16|fp16"
)


@dataclass(frozen=True)
class ReportFigure:
    """A figure of the report, on a light and on a dark background.

    Args:
        name: Its file's name, without the ending.
        title: Its title.
        caption: A sentence on how to read it.
        light, dark: PNG files.
    """

    name: str
    title: str
    caption: str
    light: bytes
    dark: bytes

    @property
    def light_uri(self) -> str:
        return _data_uri(self.light)

    @property
    def dark_uri(self) -> str:
        return _data_uri(self.dark)


def write_report(folders: Sequence[str | Path], output_dir: str | Path, baseline: str | None = None) -> Path:
    """Write report.html, figures/*.png, and, for several settings, comparison.md and comparison.tex.

    Args:
        folders: Runs, see `load_groups`.
        output_dir: Where the files go.
        baseline: The setting that the others are compared with, see `compare_groups`.

    Returns:
        The path of report.html, which needs no other file.

    Raises:
        ValueError: If there is no run to report, or no setting has the baseline's name.
    """
    groups, output_dir = load_groups(folders), Path(output_dir)
    comparison = compare_groups(groups, baseline)
    figures = report_figures(groups)
    for figure in figures:
        _write(output_dir / "figures" / f"{figure.name}.png", figure.light)
        _write(output_dir / "figures" / f"{figure.name}-dark.png", figure.dark)
    if len(groups) > 1 or len(groups[0].runs) > 1:
        comparison.write(output_dir)
    path = output_dir / "report.html"
    _write(path, render_report(groups, figures, comparison).encode("utf-8", "replace"))
    return path


def report_figures(groups: Sequence[RunGroup]) -> list[ReportFigure]:
    """Draw all figures that these runs have the data for, benchmark by benchmark."""
    benchmarks, figures = by_benchmark(groups), []
    for number, (benchmark, compared) in enumerate(benchmarks.items(), start=1):
        drawn = _figures_of(compared[:MAX_DRAWN], f"-of-{number}" if len(benchmarks) > 1 else "")
        left = f" The first {MAX_DRAWN} of {len(compared)} settings." if len(compared) > MAX_DRAWN else ""
        where = f": {benchmark}" if len(benchmarks) > 1 else ""
        figures += [replace(each, title=each.title + where, caption=each.caption + left) for each in drawn]
    return figures


def _figures_of(groups: Sequence[RunGroup], suffix: str) -> list[ReportFigure]:
    """The figures of settings that can be compared; the suffix ends the names of their files."""
    bars = " Bars: one standard deviation over the seeds." if any(len(group.runs) > 1 for group in groups) else ""
    span = " Bars: from the least to the greatest seed." if bars else ""
    drawn = [
        ("settings", "Avg and Last of every setting", f"Lines: the first setting and zero-shot.{bars}", draw_settings),
        ("accuracy", "Accuracy over tasks", f"On the test images of all classes seen.{bars}", draw_accuracy),
        (
            "forgetting",
            "Forgetting of each task",
            f"Best accuracy before the end minus the last.{bars}",
            draw_forgetting,
        ),
        ("memory", "Memory against accuracy", f"Up and to the left is better.{bars}", draw_memory),
        (
            "zo-variance",
            "Variance of the ZO gradient by branch",
            f"As logged in training, the mean of each task.{span}",
            draw_variance,
        ),
        (
            "zo-variance-by-layer",
            "Variance of the ZO gradient by layer",
            f"Mean over tasks.{span}",
            draw_variance_by_layer,
        ),
    ]
    figures = [_figure(name + suffix, title, caption, draw, groups) for name, title, caption, draw in drawn]
    for number, group in enumerate(groups, start=1):
        seeds = f", mean of {len(group.runs)} seeds" if len(group.runs) > 1 else ""
        caption = f"Row: after which task; column: on whose test images; percent{seeds}."
        name = "accuracy-matrix" if len(groups) == 1 else f"accuracy-matrix-{number}"
        figures.append(_figure(name + suffix, f"Accuracy matrix: {group.name}", caption, draw_matrix, group))
    return [figure for figure in figures if figure is not None]


def render_report(groups: Sequence[RunGroup], figures: Sequence[ReportFigure], comparison: Comparison) -> str:
    """The HTML text."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    template = (resources.files("hf_zocl.report") / TEMPLATE).read_text(encoding="utf-8")
    return environment.from_string(template).render(
        title=_title(groups),
        comparison=comparison,
        figures=figures,
        light=LIGHT,
        dark=DARK,
        groups=[
            {
                "name": group.name,
                "tasks": group.first.get("tasks") or [f"task {i}" for i in range(1, group.tasks + 1)],
                "matrix": [[f"{100 * v:.1f}" for v in row if v == v] for row in group.matrix().tolist()],
                "seeds": ", ".join(str(run["seed"]) for run in group.runs),
                "recipe": _shown(group.first.get("recipe", {})),
                "versions": group.first.get("versions", {}),
                "skipped": sum(run.get("skipped_images", 0) for run in group.runs),
            }
            for group in groups
        ],
    )


def _figure(name: str, title: str, caption: str, draw, data) -> ReportFigure | None:
    light, dark = draw(data, LIGHT), draw(data, DARK)
    return None if light is None else ReportFigure(name, title, caption, _png(light), _png(dark))


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=160, facecolor=figure.get_facecolor(), metadata={"Software": None})
    return file.getvalue()


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def _title(groups: Sequence[RunGroup]) -> str:
    names = dict.fromkeys(Path(str(group.first.get("benchmark", ""))).name or "local dataset" for group in groups)
    scenarios = dict.fromkeys(group.first.get("scenario", "class") for group in groups)
    return f"{', '.join(names)} ({', '.join(scenarios)}-incremental)"


def _shown(recipe: dict[str, Any]) -> dict[str, str]:
    shown = {name: value for name, value in recipe.items() if value is not None and SHOWN_ARGUMENTS.fullmatch(name)}
    # Only the last component of a path.
    return {name: re.split(r"[\\/]", str(v))[-1] if _is_path(v) else str(v) for name, v in sorted(shown.items())}


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and bool(re.match(r"[\\/~.]|[A-Za-z]:[\\/]", value))


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as unfinished:
        unfinished.write_bytes(content)
