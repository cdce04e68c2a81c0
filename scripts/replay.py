"""Rebuild a task's adapter from the log of its zeroth-order steps: `python scripts/replay.py --help`."""

from hf_zocl.commands.replay import main


if __name__ == "__main__":
    main()
