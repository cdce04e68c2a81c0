"""The engine's figures as text, as JSON and as a bar chart."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from engine_rows import Row, Setting
from matplotlib.figure import Figure

from hf_zocl.files import write_json


def format_rows(rows: list[Row], setting: Setting) -> str:
    lines = [
        f"{setting.shape}, batch {setting.batch}, {setting.device}, {setting.threads} threads, "
        f"{'bf16 autocast' if setting.bf16 else 'float32'}, torch {torch.__version__}, median of {setting.rounds}",
        "",
        f"{'':<32}{'s/step':>9}{'ZO part':>9}{'passes':>8}{'peak MiB':>10}{'over weights':>14}{'images/s':>10}",
    ]
    for row in rows:
        cells = [("seconds", 9, ".2f", 1), ("zo_seconds", 9, ".2f", 1), ("passes", 8, ".2f", 1)]
        cells += [("peak_bytes", 10, ".0f", 2**20), ("activation_bytes", 14, ".0f", 2**20)]
        cells += [("images_per_second", 10, ".1f", 1)]
        lines.append(f"{row.name:<32}" + "".join(_cell(row.figures, *cell) for cell in cells))
    return "\n".join(lines)


def _cell(figures: dict[str, float], name: str, width: int, form: str, unit: int) -> str:
    return (format(figures[name] / unit, form) if name in figures else "").rjust(width)


def format_bars(bars: list[tuple], rows: dict[str, Row]) -> str:
    lines = [f"{'ratio':<52}{'is':>8}{'at most':>9}"]
    for title, row, beside, figure, limit in bars:
        if row not in rows or beside not in rows:
            continue
        if rows[beside].figures[figure] == 0:  # the model is so small that its pass takes no memory from the system
            lines.append(f"{title:<52}{'–':>8}{limit:>9.3f}")
            continue
        ratio = rows[row].figures[figure] / rows[beside].figures[figure]
        lines.append(f"{title:<52}{ratio:>8.3f}{limit:>9.3f}{'' if ratio <= limit else '   missed'}")
    return "\n".join(lines)


def format_sweep(sweep: dict[str, dict[str, float]]) -> str:
    """Seconds against q, and the straight line through them."""
    queries = torch.tensor([float(name.split("=")[1]) for name in sweep])
    seconds = torch.tensor([figures["seconds"] for figures in sweep.values()])
    design = torch.stack([torch.ones_like(queries), queries], dim=1)
    base, slope = torch.linalg.lstsq(design, seconds).solution.tolist()
    residual = ((seconds - base - slope * queries).square().sum() / (seconds - seconds.mean()).square().sum()).item()
    points = ", ".join(f"q={int(q)}: {s:.2f} s" for q, s in zip(queries, seconds.tolist(), strict=True))
    return f"cost against q: {points}\nstraight line: {base:.2f} s + {slope:.3f} s a query, R² = {1 - residual:.4f}"


def write(output: Path, setting: Setting, rows: list[Row], sweep: dict[str, dict[str, float]]) -> None:
    """The figures as JSON, and a bar chart next to it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "setting": asdict(setting),
        "torch": torch.__version__,
        "rows": [asdict(row) for row in rows],
        "sweep": sweep,
    }
    write_json(output, content)
    figure = Figure(figsize=(11, 0.32 * len(rows) + 1.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    names = [row.name.strip() for row in rows]
    positions = range(len(rows))
    left.barh(positions, [row.figures["seconds"] for row in rows], color="#0072B2")
    left.set(title="seconds a step", yticks=list(positions), yticklabels=names)
    right.barh(positions, [row.figures.get("activation_bytes", 0) / 2**20 for row in rows], color="#D55E00")
    right.set(title="peak memory over the weights (MiB)")
    left.invert_yaxis()
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", color="0.85")
        axes.set_axisbelow(True)
    figure.savefig(output.with_suffix(".png"), dpi=120, metadata={"Software": None})
