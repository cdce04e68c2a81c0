"""Rebuild a task's adapter from the log of its zeroth-order steps, and compare it with the checkpoint.

    python -m hf_zocl replay runs/all-zeroth-order --task 2

All layers of the run must be zeroth-order: --zo_branch dual --zo_layers all.
"""

import argparse
import sys
from pathlib import Path

from ..continual.replay import rebuild_task
from .door import Parser, command


@command
def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--task", type=int, default=1, help="the task, counted from 1")
    parser.add_argument("--device", default="cpu", help="the device that the run used")
    options = parser.parse_args()
    rebuilt = rebuild_task(options.run, options.task, options.device)
    share = rebuilt.log_bytes / rebuilt.checkpoint_bytes
    print(
        f"{rebuilt.steps} steps in {rebuilt.log_bytes:,} bytes ({rebuilt.log_bytes / max(rebuilt.steps, 1):.0f} a "
        f"step); the checkpoint's weights are {rebuilt.checkpoint_bytes:,} bytes, so the log is {100 * share:.1f} % "
        "of that."
    )
    if rebuilt.different:
        sys.exit(
            f"error: {len(rebuilt.different)} parameters differ, by {rebuilt.largest_difference:.2g} at most; "
            f"the first is {rebuilt.different[0]}."
        )
    print("The rebuilt adapter is that of the checkpoint, bit for bit.")
