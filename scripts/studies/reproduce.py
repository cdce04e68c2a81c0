"""Run one of the paper's tables: every cell with several seeds, then the table next to the paper's own figures.

    python scripts/studies/reproduce.py branch                          # FO, dual, vision, language
    python scripts/studies/reproduce.py layers --benchmark tiny-imagenet-32 --dataset_path path/to/it --adapter moe
    python scripts/studies/reproduce.py all --seeds 0 1 2               # branch and layers as one table
    python scripts/studies/reproduce.py mozo --retention path/to/known  # dual/hop-even, MoZO's parts on and off
    python scripts/studies/reproduce.py variants --retention path/to/known
    python scripts/studies/reproduce.py queries                         # preset all-zo by its queries a step
    python scripts/studies/reproduce.py pays                            # the accuracies of when_it_pays.py
    python scripts/studies/reproduce.py seeds                           # what the seeds alone do to a figure
    python scripts/studies/reproduce.py memory                          # memory of a training step of ViT-B/16

Every cell is a folder, shared by the tables. A finished cell is not run again, so the command can be stopped and
repeated. The table and its picture are written next to the cells. Any further argument goes to every run, as to
`train`. `--recipe` takes your own recipe in place of the benchmark's. The paired test needs SciPy.

The steps of the `mozo` and `variants` cells differ in scale, so each cell has its own ZO learning rate: the one with
the greatest √(A·R) on the first task alone (`python -m hf_zocl tune --help` says what A and R are; first seed, one
pass) or, with `--keep`, the one with the greatest A among those with at least that R. The choice is written to
`chosen.json` in the cell's folder, with every candidate. All other cells have the recipe's rate.
"""

import argparse
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from paper import ACCURACIES, PEAK_GB, compare_with_findings, format_p, p_value, paper_differences
from tqdm.auto import tqdm
from transformers import CLIPConfig

from hf_zocl.commands import Parser, command, require
from hf_zocl.commands.recipe import build_scheduler, parse_recipe
from hf_zocl.commands.tune import FirstTask, add_judge_arguments, mark_best, markdown_table, retention_stream
from hf_zocl.files import read_json, write_json
from hf_zocl.report import Comparison, RunGroup, compare_groups, load_groups, paired_differences
from hf_zocl.report.escape import mathtext
from hf_zocl.report.figures import save_figure
from hf_zocl.sample import resolve


sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
from engine import Row, Setting, measure_apart, quantise


BENCHMARKS = {
    "cifar10": "cifar10",
    "tiny-imagenet-32": "tiny_imagenet_32",
    "cifar100-inc20": "cifar100_inc20_{adapter}",
    "cifar100-inc10": "cifar100_inc10_{adapter}",
    "tiny-imagenet-inc20": "tiny_imagenet_inc20_{adapter}",
    "imagenet-r-inc20": "imagenet_r_inc20_{adapter}",
}
BRANCHES = ("vision", "language", "dual")
QUERIES = (16, 64, 256, 1024)
POINTS = 0.5  # the difference, in points, that the `seeds` table is about


@dataclass(frozen=True)
class Cell:
    """A row of a table.

    Args:
        arguments: Arguments to add to the recipe.
        rates: Candidates for its ZO learning rate; empty: the recipe's rate.
        int8: Whether the base's weights are int8 (torchao).
    """

    arguments: tuple[str, ...]
    rates: tuple[str, ...] = ()
    int8: bool = False


@command
def main() -> None:
    options, further = parse_arguments()
    if options.table == "memory":
        if further:
            sys.exit(
                f"error: {' '.join(further)}: memory trains no recipe, and takes --adapter and --output_dir alone."
            )
        comparison = memory_table(options.adapter)
        comparison.write(options.output_dir, name=f"memory-{options.adapter}")
        return print(comparison.markdown())
    require("scipy", extra="reproduce")
    recipe = options.recipe or BENCHMARKS[options.benchmark].format(adapter=options.adapter)
    folder = options.output_dir / f"{Path(recipe).stem if options.recipe else options.benchmark}-{options.adapter}"
    common = ["--adapter", options.adapter, "--disable_tqdm", "true", *further]
    model = parse_recipe(["--recipe", recipe, *common, "--output_dir", str(folder)]).run.model_name_or_path
    cells = choose_cells(options.table, CLIPConfig.from_pretrained(resolve(model)), options.cells)
    judge = functools.cache(lambda: first_task(recipe, options))
    cells = {
        name: with_rate(cell, folder_of(folder, name), common, judge, options.keep) for name, cell in cells.items()
    }
    # By seed first, so that a table of fewer seeds is available early.
    runs = [(cell, seed) for seed in options.seeds for cell in cells]
    for cell, seed in tqdm(runs, desc="cells"):
        arguments = ["--recipe", recipe, *common, *cells[cell].arguments]
        run_cell(arguments, folder_of(folder, cell), seed, cells[cell].int8)
    groups = read_cells(folder, cells, options.seeds)
    comparison = with_paper(compare_groups(groups, baseline=next(iter(cells))), groups, options.benchmark)
    if options.table == "seeds":
        comparison = seeds_table(groups)
    comparison.write(folder, name=options.table)
    print(comparison.markdown())
    figure = draw_queries(groups) if options.table == "queries" else draw_settings(groups)
    if figure is not None:
        save_figure(figure, folder / f"{options.table}.png")
    findings = compare_with_findings(groups, options.table)
    if findings.rows:
        findings.write(folder, name=f"{options.table}-findings")
        print("\n" + findings.markdown())


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--benchmark", choices=BENCHMARKS, default="cifar10")
    parser.add_argument("--recipe", help="a recipe instead of the benchmark's")
    parser.add_argument("--adapter", choices=("lora", "moe"), default="lora")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cells", nargs="+", help="only these rows of the table")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/reproduce"))
    add_judge_arguments(parser, required=False)
    parser.set_defaults(repetitions=1)
    return parser.parse_known_args()


def branch_cells(config: CLIPConfig) -> dict[str, Cell]:
    return {"FO": assigned("none"), **{f"{branch}/all": assigned(branch) for branch in ("dual", "vision", "language")}}


def layer_cells(config: CLIPConfig) -> dict[str, Cell]:
    depth = {"vision": config.vision_config.num_hidden_layers, "language": config.text_config.num_hidden_layers}
    depth["dual"] = min(depth.values())
    cells = {"FO": assigned("none")}
    for branch in BRANCHES:
        half = depth[branch] // 2  # six of twelve, as in the paper
        schemes = ("hop-odd", "hop-even", f"prefix-{half}", f"suffix-{half}")
        cells |= {f"{branch}/{scheme}": assigned(branch, scheme) for scheme in schemes}
    return cells


def mozo_cells(config: CLIPConfig) -> dict[str, Cell]:
    """The cells of `mozo`: dual/hop-even with one ε and no sign; with the sign; with an ε per tower; with both."""
    common = assigned("dual", "hop-even", "--zo_optim", "sgd", "--zo_momentum", "0.9").arguments
    one_eps = ("--zo_eps", "1e-2")
    two_eps = ("--zo_eps", "vision=5e-3,language=1e-2")
    magnitude = (("--zo_sign", "false"), ("3e-3", "1e-2", "3e-2"))
    sign = (("--zo_sign", "true"), ("3e-4", "1e-3", "3e-3"))
    return {
        name: Cell((*common, *kind, *eps), rates)
        for name, (kind, rates), eps in (
            ("plain", magnitude, one_eps),
            ("sign", sign, one_eps),
            ("small ε_v", magnitude, two_eps),
            ("MoZO", sign, two_eps),
        )
    }


def variant_cells(config: CLIPConfig) -> dict[str, Cell]:
    """The cells of `variants`: no momentum, two queries in each tower, so that only the estimators differ."""
    common = assigned("dual", "all", "--zo_queries", "2").arguments
    plain = (*common, "--zo_sign", "false", "--zo_momentum", "0", "--zo_optim")
    single = ("--zo_queries", "1")
    by_magnitude = ("3e-2", "5e-2", "7e-2", "1e-1")
    return {
        "aggressive": Cell((*plain, "sgd", *single), by_magnitude),
        "conservative": Cell((*plain, "sgd", "--zo_estimator", "conservative"), by_magnitude),
        "conservative + sign": Cell((*plain, "sign", "--zo_estimator", "conservative"), ("1e-2", "2e-2", "4e-2")),
        "FZOO": Cell((*plain, "sgd", "--zo_estimator", "fzoo"), ("1e-3", "2e-3", "3e-3", "5e-3")),
        "ZO-Adam": Cell((*plain, "adamw"), ("5e-3", "1e-2", "2e-2", "4e-2")),
        "forward gradient": Cell((*plain, "sgd", "--zo_estimator", "forward-gradient"), by_magnitude),
    }


def queries_cells(config: CLIPConfig) -> dict[str, Cell]:
    arguments = {f"all-zo, q={q}": (*ALL_ZO.arguments, "--zo_queries", str(q)) for q in QUERIES}
    return {"FO": assigned("none"), **{name: Cell(own) for name, own in arguments.items()}}


def pays_cells(config: CLIPConfig) -> dict[str, Cell]:
    """The cells of `pays`, named like the benchmark's rows; FO's cell stands for gradient checkpointing too."""
    return {
        "FO": assigned("none"),
        "FO, text tower": assigned("none", "all", "--frozen_parameters", "vision_model"),
        "dual/hop-even": assigned("dual", "hop-even"),
        "FO, 2e-3": Cell((*assigned("none").arguments, "--learning_rate", "2e-3")),
        "hybrid": HYBRID,
        "vision/all": assigned("vision"),
        "dual/all": assigned("dual"),
        "FO, norms": norms("none"),
        "vision/all, norms": norms("vision"),
        "all-zo": ALL_ZO,
        "all-zo, int8": replace(ALL_ZO, int8=True),
    }


def assigned(branch: str, layers: str = "all", *more: str) -> Cell:
    return Cell(("--zo_branch", branch, "--zo_layers", layers, *more))


# They name the adapter again, because the table's own --adapter would override the preset's.
HYBRID = Cell(("--preset", "hybrid", "--adapter", "lora", "--learning_rate", "2e-3"))
ALL_ZO = Cell(("--preset", "all-zo", "--adapter", "ln_tuning"))


def norms(branch: str) -> Cell:
    """The preset's norms, zeroth-order in `branch` alone; the notebook lists the other first-order rates tried."""
    return replace(ALL_ZO, arguments=(*ALL_ZO.arguments, "--zo_branch", branch, "--learning_rate", "1e-2"))


# The rows of a table, the baseline first.
TABLES: dict[str, Callable[[CLIPConfig], dict[str, Cell]] | None] = {
    "branch": branch_cells,
    "layers": layer_cells,
    "all": lambda config: branch_cells(config) | layer_cells(config),
    "mozo": mozo_cells,
    "variants": variant_cells,
    "queries": queries_cells,
    "pays": pays_cells,
    "seeds": lambda config: branch_cells(config) | layer_cells(config),
    "memory": None,
}


def choose_cells(table: str, config: CLIPConfig, wanted: list[str] | None) -> dict[str, Cell]:
    """The rows of a table, or the wanted ones; the baseline first.

    Raises:
        ValueError: If `wanted` names a row that the table does not have.
    """
    cells = TABLES[table](config)
    unknown = sorted(set(wanted or ()) - set(cells))
    if unknown:
        raise ValueError(f"--cells {' '.join(unknown)}: table {table} has {', '.join(cells)}.")
    return {name: cell for name, cell in cells.items() if wanted is None or name in wanted}


def first_task(recipe: str, options: argparse.Namespace) -> FirstTask:
    if options.retention is None:
        raise ValueError(f"{options.table} chooses learning rates on the first task: --retention DATASET is needed.")
    stream = retention_stream(options.retention, options.retention_classes, options.retention_images)
    return FirstTask(recipe, tuple(options.seeds[:1]), options.held_out, stream, options.repetitions)


def with_rate(cell: Cell, folder: Path, common: list[str], judge: Callable[[], FirstTask], keep: float | None) -> Cell:
    """The cell with its ZO learning rate, chosen on the first task; measurements of an earlier call are kept."""
    if not cell.rates:
        return cell
    file, arguments = folder / "chosen.json", [*common, *cell.arguments]
    known = read_json(file) if file.is_file() else {}
    rows = known["candidates"] if known.get("arguments") == arguments else []
    missing = [rate for rate in cell.rates if rate not in {row["candidate"].get("zo_learning_rate") for row in rows}]
    if missing:
        zero_shot, *measured = rows or [judge().zero_shot(arguments)]
        measured += judge().measure_all({"zo_learning_rate": missing}, arguments)
        rows = [zero_shot, *sorted(measured, key=lambda row: float(row["candidate"]["zo_learning_rate"]))]
    best = mark_best(rows, keep)
    chosen = {"arguments": arguments, "keep": keep, "candidates": rows}
    if chosen != known:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, chosen)
    print(f"{folder.name}:\n{markdown_table(rows)}")
    return replace(cell, arguments=(*cell.arguments, "--zo_learning_rate", best["candidate"]["zo_learning_rate"]))


def folder_of(folder: Path, cell: str) -> Path:
    return folder / cell.replace("/", "-")


def run_cell(arguments: list[str], folder: Path, seed: int, int8: bool = False) -> None:
    """Run one cell with one seed, or go on with it; a finished one is read, not run."""
    folder = folder / f"seed-{seed}"
    own = ["--seed", str(seed), "--output_dir", str(folder), "--push_to_hub", "false"]  # cells are not pushed
    scheduler = build_scheduler(parse_recipe([*arguments, *own]))
    if int8:
        quantise(scheduler.model.clip)
    scheduler.run(resume=True)


def read_cells(folder: Path, cells: dict[str, Cell], seeds: list[int]) -> list[RunGroup]:
    groups = load_groups([folder_of(folder, cell) for cell in cells])
    named = zip(cells, groups, strict=True)
    return [RunGroup(cell, tuple(run for run in group.runs if run["seed"] in seeds)) for cell, group in named]


def with_paper(comparison: Comparison, groups: list[RunGroup], benchmark: str) -> Comparison:
    """The table with p-values of the paired differences, and with the paper's differences."""
    baseline, *others = groups
    columns = [["p (Last)", "p (Avg)", "paper Δ Last", "paper Δ Avg"], ["", "", "", ""], ["", "", "", ""]]
    for group in others:
        tests = [format_p(p_value(paired_differences(group, baseline, name))) for name in ("last", "avg")]
        columns.append([*tests, *paper_differences(group.name, benchmark)])
    lines = zip((comparison.headings, *comparison.rows), columns, strict=True)
    headings, *rows = [(*line, *more) for line, more in lines]
    whose = "the paper's" if benchmark in ACCURACIES else "the mean over the paper's four settings"
    note = f"{comparison.note} p: paired t-test, two-sided. paper Δ: {whose}, MoE adapters on ViT-B/16."
    return replace(comparison, headings=headings, rows=tuple(rows), note=note)


def seeds_table(groups: list[RunGroup]) -> Comparison:
    """The figures of every seed, and how many seeds it takes to see half a point against the baseline."""
    baseline, numbers = groups[0], [run["seed"] for run in groups[0].runs]
    headings = ["setting"]
    headings += [f"{title}, seed {seed}" for title in ("Last", "Avg") for seed in numbers]
    headings += ["std Last", "std Avg", "seeds for Last", "seeds for Avg"]
    rows = []
    for group in groups:
        values = [100 * group.values(name) for name in ("last", "avg")]
        row = [f"{value:.1f}" for figure in values for value in figure]
        row += [f"{figure.std(ddof=1):.1f}" if len(figure) > 1 else "–" for figure in values]
        for name in ("last", "avg"):
            differences = 100 * paired_differences(group, baseline, name)
            needed = (2.8 * differences.std(ddof=1) / POINTS) ** 2 if len(differences) > 1 else np.nan
            row.append("" if group is baseline or np.isnan(needed) else f"{max(2, int(np.ceil(needed)))}")
        rows.append((group.name, *row))
    note = (
        f"Percent. Seeds for: how many pairs make a difference of {POINTS} points to {baseline.name} significant at "
        f"5 % in 80 % of all trials, (2.8·σ/{POINTS})², σ the standard deviation of the paired differences seen here."
    )
    return Comparison(tuple(headings), tuple(rows), note)


def draw_settings(groups: list[RunGroup]) -> Figure | None:
    """Draw Avg and Last of every setting, mean and standard deviation over the seeds; lines: the first setting."""
    if len(groups) == 1:
        return None
    figure = Figure(figsize=(5.4, 1.4 + 0.3 * len(groups)), layout="constrained")
    axes = figure.subplots()
    for number, (name, title, color, marker) in enumerate(
        (("last", "Last", "#0072B2", "o"), ("avg", "Avg", "#D55E00", "s"))
    ):
        means, spread = zip(*(group.percent(name) for group in groups), strict=True)
        rows = np.arange(len(groups)) + 0.2 * (0.5 - number)
        axes.errorbar(means, rows, xerr=spread, color=color, marker=marker, linestyle="", capsize=3, label=title)
        axes.axvline(means[0], color=color, linestyle="--", linewidth=1.2, zorder=1)
        axes.axvline(100 * groups[0].first["zero_shot"][name], color=color, linestyle=":", linewidth=1.2, zorder=1)
    axes.set_yticks(range(len(groups)), [mathtext(group.name) for group in groups])
    axes.invert_yaxis()
    axes.set(xlabel="accuracy (%); dotted: zero-shot")
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def draw_queries(groups: list[RunGroup]) -> Figure:
    """Draw Avg and Last against the queries of a step, on a logarithmic axis; FO as lines."""
    baseline, others = groups[0], groups[1:]
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axes = figure.subplots()
    queries = [int(group.name.split("=")[1]) for group in others]
    for name, title, style in (("avg", "Avg", ("#0072B2", "o", "-")), ("last", "Last", ("#D55E00", "s", "--"))):
        color, marker, line = style
        means, spread = zip(*(group.percent(name) for group in others), strict=True)
        axes.errorbar(
            queries, means, spread,
            color=color, marker=marker, linestyle=line, capsize=3, label=f"all-zo, {title}",
        )  # fmt: skip
        axes.axhline(baseline.percent(name)[0], color=color, linestyle=":", label=f"FO, {title}")
    axes.set(xlabel="queries a step", ylabel="accuracy (%)", xscale="log")
    axes.set_xticks(queries, [str(q) for q in queries])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def memory_table(adapter: str) -> Comparison:
    """The peak memory of a training step, each in a separate process, next to the paper's figures."""
    is_gpu = torch.cuda.is_available()
    setting = Setting(batch=128, device="cuda") if is_gpu else Setting()
    rows = [Row("FO", "fo", adapter=adapter)]
    rows += [Row(f"{branch}/all", adapter=adapter, branch=branch) for branch in ("dual", "vision", "language")]
    rows += [
        Row(f"{b}/hop-even", adapter=adapter, branch=b, layers="hop-even") for b in ("dual", "vision", "language")
    ]
    rows += [Row("inference", "inference", adapter=adapter)]
    peaks = {row.name: measure_apart(row, setting)["peak_bytes"] / 1e9 for row in tqdm(rows, desc="memory")}
    paper = PEAK_GB[adapter]

    def beside(name: str) -> tuple[str, str]:
        if name not in paper:
            return "", ""
        return f"{paper[name]:.2f}", f"{paper[name] / paper['FO'] - 1:+.1%}"

    cells = [(name, f"{peak:.2f}", f"{peak / peaks['FO'] - 1:+.1%}", *beside(name)) for name, peak in peaks.items()]
    where = "on the GPU, bf16 autocast" if is_gpu else "of the process (resident), float32"
    note = (
        f"Peak memory {where}; ViT-B/16 of random weights, {adapter} adapters, batch {setting.batch}, 20 classes. The "
        "paper: on a GPU, batch 128. Batch and precision differ, so compare the columns against FO."
    )
    headings = ("setting", "peak, GB", "against FO", "paper, GB", "paper, against FO")
    return Comparison(headings, tuple(cells), note)


if __name__ == "__main__":
    main()
