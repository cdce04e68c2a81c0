"""Serve a page to try a run, or push it as a Space: `python scripts/demo.py --help`."""

from hf_zocl.commands.demo import main


if __name__ == "__main__":
    main()
