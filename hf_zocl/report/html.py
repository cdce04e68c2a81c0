"""The report: one HTML file with everything in it and, for several settings, their table next to it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from ..files import written_whole
from .charts import Chart
from .compare import Comparison, compare_groups
from .comparison_charts import Standing, comparison_charts, standings
from .escape import one_line
from .gallery import KINDS, shorten, within
from .one_run import RunView, view
from .runs import RunGroup, by_benchmark, load_groups


TEMPLATE, STYLE = "report_template.html", "report.css"
MAX_DRAWN = 16  # settings in a chart; more could not be told apart
MAX_LOOKED_INTO = 16  # settings whose gallery and confusion matrix are in the page
IMAGE_BUDGET = 2_500_000  # bytes of all small images together
# An allow-list: a recipe also holds tokens, folders and host names, which must not be published.
SHOWN_ARGUMENTS = re.compile(
    "(zo|lora|moe)_.*|adapter|model_name_or_path|benchmark|scenario|learning|(initial_)?increment|class_order_seed"
    "|max_(train|test)_images_per_class|prompt_template|optim|learning_rate|weight_decay|lr_scheduler_type"
    "|warmup_steps|max_steps|num_train_epochs|per_device_train_batch_size|gradient_accumulation_steps|bf16|fp16"
    "|classifier_alignment(_learning_rate)?|frozen_parameters"
)


@dataclass(frozen=True)
class Compared:
    """Settings that can be compared, and their charts.

    Args:
        name: Their benchmark; empty if there is only one.
        note: How many of them are drawn, if not all.
        standings, top: Last and Avg of each on one scale, and the scale's end.
        charts: Their charts.
    """

    name: str
    note: str
    standings: list[Standing]
    top: float
    charts: list[Chart]


def write_report(folders: Sequence[str | Path], output_dir: str | Path, baseline: str | None = None) -> Path:
    """Write report.html and, for several settings or seeds, comparison.md and comparison.tex.

    Args:
        folders: Runs, see `load_groups`.
        output_dir: Where the files go.
        baseline: The setting that the others are compared with, see `compare_groups`.

    Returns:
        The path of report.html, which needs no other file.

    Raises:
        ValueError: If there is no run to report, a file of a run is damaged, no setting has the baseline's name, or
            one has no seed in common with it.
    """
    groups, output_dir = load_groups(folders), Path(output_dir)
    comparison = compare_groups(groups, baseline)
    text = render_report(groups, comparison)
    if len(groups) > 1 or len(groups[0].runs) > 1:
        comparison.write(output_dir)
    path = output_dir / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as unfinished:
        unfinished.write_bytes(text.encode("utf-8", "replace"))
    return path


def compared(groups: Sequence[RunGroup]) -> list[Compared]:
    """The charts of the settings, benchmark by benchmark."""
    benchmarks = by_benchmark(groups)
    found = []
    for benchmark, members in benchmarks.items():
        drawn = members[:MAX_DRAWN]
        note = f"The first {MAX_DRAWN} of {len(members)} settings." if len(members) > MAX_DRAWN else ""
        name = benchmark if len(benchmarks) > 1 else ""
        found.append(Compared(name, note, *standings(drawn), comparison_charts(drawn)))
    return found


def render_report(groups: Sequence[RunGroup], comparison: Comparison) -> str:
    """The report as HTML text."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters |= {"line": one_line, "short": shorten}
    here = resources.files("hf_zocl.report")
    views = [view(group) for group in groups]
    shown = [each.gallery if number < MAX_LOOKED_INTO else {} for number, each in enumerate(views)]
    return environment.from_string((here / TEMPLATE).read_text(encoding="utf-8")).render(
        style=(here / STYLE).read_text(encoding="utf-8"),
        title=_title(groups),
        comparison=comparison if len(groups) > 1 else None,
        compared=compared(groups),
        kinds=KINDS,
        most_drawn=MAX_DRAWN,
        runs=[
            _run(each, gallery, number < MAX_LOOKED_INTO)
            for number, (each, gallery) in enumerate(zip(views, within(shown, IMAGE_BUDGET), strict=True))
        ],
    )


def _run(each: RunView, gallery: dict, is_looked_into: bool) -> dict[str, Any]:
    group = each.group
    return {
        "view": each,
        "confusion": each.confusion if is_looked_into else None,
        "galleries": each.galleries(gallery),
        "seeds": ", ".join(str(run["seed"]) for run in group.runs),
        "skipped": sum(run.get("skipped_images", 0) for run in group.runs),
        "unfinished": group.unfinished,
        "cost": _cost(group),
        "recipe": _shown(group.first.get("recipe", {})),
        "versions": group.first.get("versions", {}),
    }


def _cost(group: RunGroup) -> str:
    seconds, memory = group.values("seconds"), group.values("peak_memory_bytes")
    parts = [f"{seconds.mean():.0f} s"] if (seconds == seconds).all() else []
    parts += [f"{memory.mean() / 1e9:.2f} GB peak memory"] if (memory == memory).all() else []
    return ", ".join(parts)


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
