"""The closing table of a run, from `results.json` alone."""

from typing import Any


def format_results(results: dict[str, Any]) -> str:
    """The accuracy matrix in percent, and the run's figures next to zero-shot, as text for a terminal."""
    matrix, zero_shot = results["accuracy_matrix"], results["zero_shot"]
    columns = [f"task {i + 1}" for i in range(len(matrix))]
    rows = [["accuracy (%)", *columns, "all seen", "zero-shot"]]
    for index, row in enumerate(matrix):
        cells = [percent(value) for value in row] + [""] * (len(matrix) - len(row))
        seen, untrained = results["seen_accuracy"][index], zero_shot["seen_accuracy"][index]
        rows.append([f"after task {index + 1}", *cells, percent(seen), percent(untrained)])
    figures = [
        ("Last", f"{percent(results['last'])} %  (zero-shot {percent(zero_shot['last'])} %)"),
        ("Avg", f"{percent(results['avg'])} %  (zero-shot {percent(zero_shot['avg'])} %)"),
        ("forgetting", f"{percent(results['forgetting'])} points"),
        ("backward transfer", f"{percent(results['backward_transfer'])} points"),
        *_further(results),
        ("time", f"{results['seconds']:.1f} s"),
        ("peak memory", f"{results['peak_memory_bytes'] / 2**20:.0f} MiB"),
    ]
    return "\n".join([*_align(rows), "", *(f"{name:<18}{value}" for name, value in figures)])


def _further(results: dict[str, Any]) -> list[tuple[str, str]]:
    """The figures that only some runs measure."""
    mtil = results.get("mtil", {})
    values = [
        ("forward transfer", results.get("forward_transfer"), "points"),
        ("MTIL Transfer", mtil.get("transfer"), "%"),
        ("MTIL Avg", mtil.get("avg"), "%"),
        ("kept on held-out", results.get("zero_shot_retention"), "% of zero-shot"),
        ("images left out", results.get("skipped_images") or None, ""),
    ]
    shown = [(name, value, unit) for name, value, unit in values if value is not None]
    return [(name, f"{percent(value)} {unit}" if unit else str(value)) for name, value, unit in shown]


def format_evaluation(measured: dict[str, Any]) -> str:
    """The figures of `python -m hf_zocl evaluate` in percent, as text for a terminal."""
    row, details = measured["accuracy_row"], measured["details"]
    by_class = [value for value in details["per_class_accuracy"] if value is not None]
    figures = [
        ("benchmark", f"{measured['benchmark']}, after task {measured['task']}, scenario {measured['scenario']}"),
        ("accuracy", f"{percent(measured['seen_accuracy'])} %"),
        ("by task", "  ".join(percent(value) for value in row)),
        ("top-5", f"{percent(details['top_5_accuracy'])} %"),
        ("worst class", f"{percent(min(by_class))} %"),
        ("calibration error", f"{percent(details['calibration_error'])} points"),
    ]
    if measured["skipped_images"]:
        figures.append(("left out", f"{measured['skipped_images']} images that cannot be decoded"))
    return "\n".join(f"{name:<18}{value}" for name, value in figures)


def percent(fraction: float | None) -> str:
    return "–" if fraction is None else f"{100 * fraction:.1f}"


def _align(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    head, *lines = (in_columns(row, widths) for row in rows)
    return [head, "  ".join("─" * width for width in widths), *lines]


def in_columns(row: list[str], widths: list[int]) -> str:
    """One line of a table, the first cell left-aligned and the others right-aligned; the last ones may be missing."""
    cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=False)]
    return "  ".join([row[0].ljust(widths[0]), *cells[1:]])
