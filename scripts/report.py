"""Write a report of finished runs: `python scripts/report.py --help`."""

from hf_zocl.commands.report import main


if __name__ == "__main__":
    main()
