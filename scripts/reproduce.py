"""Run one of the paper's tables: every cell with several seeds, then the table beside the paper's own figures.

    python scripts/reproduce.py branch                                   # FO, dual, vision, language
    python scripts/reproduce.py layers --benchmark tiny-imagenet-32 --dataset_path path/to/it --adapter moe
    python scripts/reproduce.py all --seeds 0 1 2                        # branch and layers as one table

Every cell is a folder, shared by the tables; one that is finished is not run again, so the command can be stopped and
repeated. Any further argument goes to every run, as on the command line of scripts/train.py. `--recipe` takes a recipe
of one's own in the place of the benchmark's. Needs SciPy for the paired test.
"""

import argparse
import statistics
import sys
from dataclasses import replace
from pathlib import Path

from scipy import stats
from tqdm.auto import tqdm
from transformers import CLIPConfig

from hf_zocl.continual.recipe import build_scheduler, parse_recipe
from hf_zocl.report import Comparison, RunGroup, compare_groups, load_groups, paired_differences
from hf_zocl.sample import resolve


RECIPES = Path(__file__).parent / "recipes"
BENCHMARKS = {
    "cifar10": "cifar10.yaml",
    "tiny-imagenet-32": "tiny_imagenet_32.yaml",
    "cifar100-inc20": "cifar100_inc20_{adapter}.yaml",
    "cifar100-inc10": "cifar100_inc10_{adapter}.yaml",
    "tiny-imagenet-inc20": "tiny_imagenet_inc20_{adapter}.yaml",
    "imagenet-r-inc20": "imagenet_r_inc20_{adapter}.yaml",
}
TABLES = ("branch", "layers", "all")
BRANCHES = ("vision", "language", "dual")

# The paper (arXiv 2506.12409), MoE adapters: Last and Avg, percent; "best" is its best layer-wise setting.
PAPER = {
    "cifar100-inc20": {
        "FO": (80.47, 86.97), "dual/all": (69.29, 77.36), "vision/all": (76.05, 83.93), "language/all": (80.94, 87.00),
        "best": (82.41, 88.51),
    },
    "cifar100-inc10": {
        "FO": (77.52, 85.21), "dual/all": (67.64, 75.88), "vision/all": (72.98, 82.08), "language/all": (76.74, 85.03),
        "best": (79.39, 87.05),
    },
    "tiny-imagenet-inc20": {
        "FO": (52.13, 60.55), "dual/all": (42.40, 47.64), "vision/all": (49.65, 57.90), "language/all": (49.14, 58.69),
        "best": (52.27, 60.98),
    },
    "imagenet-r-inc20": {
        "FO": (65.36, 71.53), "dual/all": (58.56, 65.92), "vision/all": (62.54, 69.84), "language/all": (64.38, 70.38),
        "best": (65.68, 72.16),
    },
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--benchmark", choices=BENCHMARKS, default="cifar10")
    parser.add_argument("--recipe", help="a recipe instead of the benchmark's")
    parser.add_argument("--adapter", choices=("lora", "moe"), default="lora")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cells", nargs="+", help="only these rows of the table")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/reproduce"))
    options, further = parser.parse_known_args()
    recipe = options.recipe or str(RECIPES / BENCHMARKS[options.benchmark].format(adapter=options.adapter))
    folder = options.output_dir / f"{Path(recipe).stem if options.recipe else options.benchmark}-{options.adapter}"
    common = ["--recipe", recipe, "--adapter", options.adapter, "--disable_tqdm", "true", *further]
    try:
        model = parse_recipe([*common, "--output_dir", str(folder)]).run.model_name_or_path
        cells = choose_cells(options.table, CLIPConfig.from_pretrained(resolve(model)), options.cells)
        # By seed first: a table of fewer seeds is there early.
        runs = [(cell, seed) for seed in options.seeds for cell in cells]
        for cell, seed in tqdm(runs, desc="cells"):
            run_cell([*common, *cells[cell]], folder_of(folder, cell), seed)
        groups = read_cells(folder, cells, options.seeds)
        comparison = with_paper(compare_groups(groups, baseline=next(iter(cells))), groups, options.benchmark)
    except ValueError as error:
        sys.exit(f"error: {error}")
    comparison.write(folder, name=options.table)
    print(comparison.markdown())


def choose_cells(table: str, config: CLIPConfig, wanted: list[str] | None) -> dict[str, list[str]]:
    """The rows of a table, and the arguments of each; FO, the baseline, first.

    Raises:
        ValueError: If `wanted` names a row that the table does not have.
    """
    depth = {"vision": config.vision_config.num_hidden_layers, "language": config.text_config.num_hidden_layers}
    depth["dual"] = min(depth.values())
    layers = {"FO": ("none", "all")}
    if table in ("branch", "all"):
        layers |= {f"{branch}/all": (branch, "all") for branch in ("dual", "vision", "language")}
    if table in ("layers", "all"):
        for branch in BRANCHES:
            half = depth[branch] // 2  # six of twelve, as in the paper
            schemes = ("hop-odd", "hop-even", f"prefix-{half}", f"suffix-{half}")
            layers |= {f"{branch}/{scheme}": (branch, scheme) for scheme in schemes}
    cells = {cell: ["--zo_branch", branch, "--zo_layers", scheme] for cell, (branch, scheme) in layers.items()}
    unknown = sorted(set(wanted or ()) - set(cells))
    if unknown:
        raise ValueError(f"--cells {' '.join(unknown)}: table {table} has {', '.join(cells)}.")
    return {cell: arguments for cell, arguments in cells.items() if wanted is None or cell in wanted}


def folder_of(folder: Path, cell: str) -> Path:
    return folder / cell.replace("/", "-")


def run_cell(arguments: list[str], folder: Path, seed: int) -> None:
    """Run one cell with one seed, or go on with it; a finished one is read, not run."""
    folder = folder / f"seed-{seed}"
    scheduler = build_scheduler(parse_recipe([*arguments, "--seed", str(seed), "--output_dir", str(folder)]))
    scheduler.run(resume=(folder / "results.json").is_file())


def read_cells(folder: Path, cells: dict[str, list[str]], seeds: list[int]) -> list[RunGroup]:
    groups = load_groups([folder_of(folder, cell) for cell in cells])
    named = zip(cells, groups, strict=True)
    return [RunGroup(cell, tuple(run for run in group.runs if run["seed"] in seeds)) for cell, group in named]


def with_paper(comparison: Comparison, groups: list[RunGroup], benchmark: str) -> Comparison:
    """The table with the p-values of the paired differences, and with those of the paper."""
    baseline, *others = groups
    columns = [["p (Last)", "p (Avg)", "paper Δ Last", "paper Δ Avg"], ["", "", "", ""], ["", "", "", ""]]
    for group in others:
        tests = [p_value(group, baseline, name) for name in ("last", "avg")]
        columns.append([*tests, *paper_differences(group.name, benchmark)])
    lines = zip((comparison.headings, *comparison.rows), columns, strict=True)
    headings, *rows = [(*line, *more) for line, more in lines]
    whose = "the paper's" if benchmark in PAPER else "the mean over the paper's four settings"
    note = f"{comparison.note} p: paired t-test, two-sided. paper Δ: {whose}, MoE adapters on ViT-B/16."
    return replace(comparison, headings=headings, rows=tuple(rows), note=note)


def p_value(group: RunGroup, baseline: RunGroup, name: str) -> str:
    differences = paired_differences(group, baseline, name)
    return f"{stats.ttest_1samp(differences, 0.0).pvalue:.3f}" if len(differences) > 1 else "–"


def paper_differences(cell: str, benchmark: str) -> list[str]:
    """How far the paper's row is from its FO: Last, Avg."""
    settings = [PAPER[benchmark]] if benchmark in PAPER else list(PAPER.values())
    if cell not in settings[0]:
        return ["", ""]
    return [f"{statistics.mean(s[cell][i] - s['FO'][i] for s in settings):+.1f}" for i in (0, 1)]


if __name__ == "__main__":
    main()
