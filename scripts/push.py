"""Push what a run could not push, or a run that was never pushed: `python scripts/push.py --help`."""

from hf_zocl.commands.push import main


if __name__ == "__main__":
    main()
