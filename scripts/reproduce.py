"""Run one recipe under every layer assignment of the paper and several seeds, and print mean ± std as a table.

    python scripts/reproduce.py --recipe scripts/recipes/cifar10.yaml --seeds 0 1 2 --output_dir runs/reproduce

Every cell is a folder; one that is finished is not run again, so the command can be stopped and repeated. Any further
argument goes to every run, as on the command line of scripts/train.py.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from hf_zocl.continual.recipe import build_scheduler, parse_recipe


SETTINGS = {
    "FO": ("none", "all"),
    "dual/all": ("dual", "all"),
    "vision/all": ("vision", "all"),
    "language/all": ("language", "all"),
    **{
        f"{branch}/{layers}": (branch, layers)
        for branch in ("vision", "language", "dual")
        for layers in ("hop-even", "hop-odd")
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="SETTING")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/reproduce"))
    options, further = parser.parse_known_args()
    cells = [(setting, seed) for seed in options.seeds for setting in options.settings]
    for setting, seed in tqdm(cells, desc="cells"):
        run_cell(options, setting, seed, further)
    table = markdown_table(
        {s: [read(folder_of(options, s, seed)) for seed in options.seeds] for s in options.settings}
    )
    (options.output_dir / "table.md").write_text(table + "\n", encoding="utf-8")
    print(table)


def run_cell(options: argparse.Namespace, setting: str, seed: int, further: list[str]) -> None:
    """Run one setting with one seed, or go on with it; a finished one is read, not run."""
    folder = folder_of(options, setting, seed)
    branch, layers = SETTINGS[setting]
    arguments = ["--recipe", options.recipe, *further, "--zo_branch", branch, "--zo_layers", layers]
    arguments += ["--seed", str(seed), "--output_dir", str(folder), "--disable_tqdm", "true"]
    try:
        scheduler = build_scheduler(parse_recipe(arguments))
    except ValueError as error:
        sys.exit(f"error: {error}")
    scheduler.run(resume=(folder / "results.json").is_file())


def folder_of(options: argparse.Namespace, setting: str, seed: int) -> Path:
    return options.output_dir / setting.replace("/", "-") / f"seed-{seed}"


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def markdown_table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """A row per setting: mean ± std over the seeds, in percent; zero-shot, which nothing random touches, first."""
    zero_shot = next(iter(runs.values()))[0]["zero_shot"]
    lines = ["| setting | Avg | Last | forgetting | seconds |", "|---|---|---|---|---|"]
    lines.append(f"| zero-shot | {100 * zero_shot['avg']:.1f} | {100 * zero_shot['last']:.1f} | | |")
    for setting, results in runs.items():
        figures = [mean_and_std([100 * result[name] for result in results]) for name in ("avg", "last", "forgetting")]
        seconds = statistics.mean(result["seconds"] for result in results)
        lines.append(f"| {setting} | {' | '.join(figures)} | {seconds:.0f} |")
    return "\n".join(lines)


def mean_and_std(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


if __name__ == "__main__":
    main()
