"""Measure any task's checkpoint: `python scripts/evaluate.py --help`."""

import importlib
import sys
from pathlib import Path


if __name__ == "evaluate":
    # A script's folder comes first on sys.path, so `import evaluate` finds this file: hand over to the library.
    searched, here = list(sys.path), Path(__file__).resolve().parent
    sys.path[:] = [folder for folder in searched if Path(folder).resolve() != here]
    del sys.modules["evaluate"]
    importlib.import_module("evaluate")
    sys.path[:] = searched

if __name__ == "__main__":
    from hf_zocl.commands.evaluate import main

    main()
