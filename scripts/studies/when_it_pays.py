"""When forward passes alone pay off: accuracy against memory and time of a step, as a table and a picture.

    python scripts/benchmarks/peers.py --rows pays --output docs/benchmarks/pays.json
    python scripts/studies/reproduce.py pays --output_dir runs/plain
    python scripts/studies/reproduce.py pays --output_dir runs/aligned --classifier_alignment 100
    python scripts/studies/when_it_pays.py docs/benchmarks/pays.json runs/plain/cifar10-lora \\
        --aligned runs/aligned/cifar10-lora --output docs/images/when_it_pays.png

Memory and time are of a step of ViT-B/16 with random weights. Accuracy is of the embedded model, because no full-size
CLIP was trained. A row of the benchmark and the cell of the same name are one setting. Gradient checkpointing computes
FO's gradient, so it has FO's accuracy. The table says how many seeds a cell has.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from reproduce import folder_of

from hf_zocl.commands import Parser, command
from hf_zocl.files import read_json
from hf_zocl.report import Comparison, RunGroup, load_groups
from hf_zocl.report.compare import mean_and_deviation
from hf_zocl.report.figures import save_figure


CHECKPOINTING, TWICE = "FO, gradient checkpointing", "FO, 2e-3"  # rows without cells, cells without a row
# In the picture: the name, the colour, the side of the mark on which the name stands, and how far above it, in points.
STYLES = {
    "FO": ("FO", "#000000", "right", -14),
    TWICE: ("FO, 2e-3", "#882255", "right", 2),
    CHECKPOINTING: (CHECKPOINTING, "#555555", "left", 6),
    "FO, text tower": ("FO, text tower alone", "#009E73", "left", -24),
    "dual/hop-even": ("ZO every second layer", "#CC79A7", "right", 6),
    "hybrid": ("hybrid", "#332288", "left", 6),
    "vision/all": ("ZO vision, FO text", "#0072B2", "right", -24),
    "dual/all": ("ZO both", "#8C510A", "left", 4),
    "FO, norms": ("FO, norms", "#56B4E9", "left", 22),
    "all-zo": ("all-zo", "#D55E00", "left", -46),
    "all-zo, int8": ("all-zo, int8", "#E69F00", "right", 44),
}


@dataclass(frozen=True)
class Setting:
    """A way to train: the memory (bytes) and the time (seconds) of a step, and its runs, plain and aligned."""

    name: str
    memory: float
    seconds: float
    plain: RunGroup
    aligned: RunGroup | None


@command
def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", type=Path, help="what peers.py --rows pays has written")
    parser.add_argument("plain", type=Path, help="the folder of the cells")
    parser.add_argument("--aligned", type=Path, help="that of the cells with classifier alignment")
    parser.add_argument("--output", type=Path, default=Path("when_it_pays.png"), help="the picture")
    options = parser.parse_args()
    rows = {row["name"]: row["figures"] for row in read_json(options.benchmark)["rows"]}
    rows[TWICE] = rows["FO"]
    settings = []
    for name, figures in rows.items():
        plain = cell(name, options.plain)
        if name != "inference" and plain is not None:
            aligned = cell(name, options.aligned) if options.aligned else None
            settings.append(Setting(name, figures["peak_bytes"], figures["seconds"], plain, aligned))
    print(table(settings, rows["inference"]).markdown())
    save_figure(draw(settings, rows["inference"]), options.output)


def cell(name: str, folder: Path) -> RunGroup | None:
    """The runs of a row of the benchmark; None where there are none."""
    runs = folder_of(folder, "FO" if name == CHECKPOINTING else name)
    return load_groups([runs])[0] if runs.is_dir() else None


def table(settings: list[Setting], inference: dict[str, float]) -> Comparison:
    headings = ("setting", "memory, GB", "s a step", "Avg", "Last", "seeds", "aligned: Avg", "Last", "seeds")
    untrained = settings[0].plain.first["zero_shot"]
    zero_shot = ("zero-shot: inference", *measures(inference["peak_bytes"], inference["seconds"]))
    lines = [(*zero_shot, *(f"{100 * untrained[name]:.1f}" for name in ("avg", "last")), "", "", "", "")]
    for setting in settings:
        cost = measures(setting.memory, setting.seconds)
        lines.append((setting.name, *cost, *accuracies(setting.plain), *accuracies(setting.aligned)))
    return Comparison(headings, tuple(lines), "Accuracy in percent, mean ± standard deviation.")


def accuracies(runs: RunGroup | None) -> tuple[str, str, str]:
    if runs is None:
        return "", "", ""
    avg, last = (mean_and_deviation(100 * runs.values(name), 1) for name in ("avg", "last"))
    return avg, last, str(len(runs.runs))


def measures(memory: float, seconds: float) -> tuple[str, str]:
    return f"{memory / 1e9:.2f}", f"{seconds:.1f}"


def draw(settings: list[Setting], inference: dict[str, float]) -> Figure:
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    panels: list[tuple[Axes, str, float, list[float]]] = [
        (left, "peak memory of a step, GB", inference["peak_bytes"] / 1e9, [s.memory / 1e9 for s in settings]),
        (right, "time of a step, s", inference["seconds"], [s.seconds for s in settings]),
    ]
    zero_shot = 100 * settings[0].plain.first["zero_shot"]["last"]
    for axes, title, least, places in panels:
        axes.axvline(least, color="0.6", linewidth=1, linestyle="--")
        axes.axhline(zero_shot, color="0.6", linewidth=1, linestyle=":")
        for setting, place in zip(settings, places, strict=True):
            if setting.name not in STYLES:  # only in the table
                continue
            label, color, side, above = STYLES[setting.name]
            mean, spread = setting.plain.percent("last")
            axes.errorbar(place, mean, spread, marker="o", capsize=3, color=color)
            axes.annotate(
                label, (place, mean), (8 if side == "left" else -8, above),
                textcoords="offset points", ha=side, fontsize=8, color=color,
            )  # fmt: skip
        axes.set(xlabel=f"{title} (dashed: inference)", xlim=(0, 1.15 * max(places)))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
    left.set_ylabel("Last (%), after five tasks; dotted: zero-shot")
    return figure


if __name__ == "__main__":
    main()
