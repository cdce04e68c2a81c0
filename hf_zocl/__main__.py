"""The package's commands: `python -m hf_zocl COMMAND …`, or `accelerate launch -m hf_zocl train …`."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable
from importlib import import_module

from .commands.door import is_refusal, one_line


COMMANDS = {
    "train": "learn a stream of tasks (under `accelerate launch -m`, also in several processes)",
    "evaluate": "measure a task's checkpoint, as its run did or on another benchmark",
    "report": "write a report of finished runs, or a comparison of several",
    "demo": "serve a page to try a run with, or push it as a Space",
    "push": "push to the Hub what a run could not push, or a run that was never pushed",
    "tune": "choose learning rates and ε on the first task alone",
    "replay": "rebuild a task's adapter from the log of its zeroth-order steps",
    "recipes": "list the recipes and presets that come with the package",
}


def main() -> None:
    try:
        run = chosen()
    except Exception as error:
        if not is_refusal(error):
            raise
        sys.exit(f"error: {one_line(error)}")
    run()  # each command catches its own errors


def chosen() -> Callable[[], None]:
    """The command that the command line names; `sys.argv` keeps only the command's own arguments.

    Raises:
        ValueError: If it names none.
    """
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("-h", "--help", "help"):
        return print_help
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        given = f"{name!r} is not a command" if name else "a command is missing"
        meant = f"; did you mean {close[0]!r}?" if close else "."
        raise ValueError(f"usage: python -m hf_zocl {'|'.join(COMMANDS)} …: {given}{meant}")
    sys.argv[:2] = [f"hf_zocl {name}"]
    module = "library" if name == "recipes" else name
    return import_module(f".commands.{module}", __package__).main


def print_help() -> None:
    print(__doc__, *(f"  {each:<10}{what}" for each, what in COMMANDS.items()), sep="\n")
    print("\n`python -m hf_zocl COMMAND --help` lists a command's arguments.")


if __name__ == "__main__":
    main()
