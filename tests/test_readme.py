"""The README's Python runs as it stands."""

import re
from pathlib import Path

import pytest


README = Path(__file__).resolve().parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_a_trainer_of_another_library_takes_the_mixin():
    (block,) = [block for block in BLOCKS if "zeroth_order(" in block]
    names = {}
    exec(block, names)
    assert names["ZOSeq2SeqTrainingArguments"]("unused", zo_layers="all").zo_layers == "all"


@pytest.mark.slow
def test_the_stream_in_python_runs_offline(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (block,) = [block for block in BLOCKS if "ContinualTaskScheduler" in block]
    names = {}
    exec(block.replace('"runs/mine",', '"runs/mine", max_steps=1,'), names)
    assert 0 <= names["results"]["last"] <= 1
    assert (tmp_path / "runs" / "mine" / "task-02" / "README.md").is_file()
