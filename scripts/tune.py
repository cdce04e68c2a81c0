"""Choose learning rates and ε on the first task alone: `python scripts/tune.py --help`."""

from hf_zocl.commands.tune import main


if __name__ == "__main__":
    main()
