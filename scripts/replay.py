"""Make a task's adapter again from the log of its zeroth-order steps: `python scripts/replay.py --help`."""

from hf_zocl.commands.replay import main


if __name__ == "__main__":
    main()
