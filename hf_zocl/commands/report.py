"""Write a report of finished runs, from the files in their folders alone.

    python -m hf_zocl report runs/quickstart
    python -m hf_zocl report --compare runs/hop runs/fo --baseline fo --output_dir runs/report

A run is a folder with results.json, or with a folder for each seed. The report.html of one run goes into its folder.
Several runs are compared in a table (comparison.md and comparison.tex), with paired differences to the baseline.
"""

import argparse
from pathlib import Path

from ..report import write_report
from .door import Parser, command


@command
def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help="folders of runs")
    parser.add_argument("--compare", nargs="+", default=[], metavar="RUN", help="more folders of runs")
    parser.add_argument("--baseline", help="the name of the run that the others are compared with")
    parser.add_argument("--output_dir", type=Path, help="default: the run's folder, or runs/report for several runs")
    options = parser.parse_args()
    folders = [*options.runs, *options.compare]
    if not folders:
        parser.error("name at least one run")
    output_dir = options.output_dir or (Path(folders[0]) if len(folders) == 1 else Path("runs/report"))
    path = write_report(folders, output_dir, options.baseline)
    table = output_dir / "comparison.md"
    if table.is_file():
        print(table.read_text(encoding="utf-8"))
    print(f"Written to {path}")
