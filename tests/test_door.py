"""What is refused ends a command with one line, however many processes it has and wherever it is met."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from hf_zocl.commands import command, door


ROOT = Path(__file__).parents[1]
REFUSED = """
import os, sys, time
from hf_zocl.commands import command

@command
def main():
    if os.environ["LOCAL_RANK"] in sys.argv[1]:
        raise ValueError(f"seed={os.environ['LOCAL_RANK']}: refused")
    time.sleep(120)

main()
"""


@command
def refused() -> None:
    raise ValueError("seed=-1:\nexpected 0")


def test_the_first_process_speaks_at_once_and_another_one_after_a_while(monkeypatch):
    waited = []
    monkeypatch.setattr(door.time, "sleep", waited.append)
    monkeypatch.setattr(sys, "argv", [__file__])  # whose folder is where errors are worded
    for rank, expected in ((None, []), ("0", []), ("1", [door.PATIENCE])):
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        if rank is not None:
            monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit, match="^error: seed=-1: expected 0$"):
            refused()
        assert waited == expected


def test_an_interruption_is_said_once(monkeypatch, capsys):
    @command
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["train.py"])
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit) as end:
            interrupted()
        assert end.value.code == 130
    assert capsys.readouterr().err == "error: interrupted\n"


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "speaker"), [("01", "0"), ("1", "1")])
def test_two_processes_say_one_line_of_what_both_meet_or_one(ranks, speaker, tmp_path):
    script = tmp_path / "refused.py"
    script.write_text(REFUSED)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, str(script), ranks], env=environment, capture_output=True, text=True, check=False
    )
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and said == [f"error: seed={speaker}: refused"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["benchmarks/engine.py"], "scripts/benchmarks/peers.py runs this file"),
        (["benchmarks/engine.py", "{", "{}"], "Expecting property name"),
        (["benchmarks/scaling.py"], "scripts/benchmarks/peers.py --scaling runs this file"),
        (["benchmarks/chaos.py", "--runs", "many"], "argument --runs: invalid int value: 'many'"),
        (["benchmarks/chaos.py", "--output_dir", "MINE"], "holds 'notes.md', which is not of this script"),
        (["studies/precision.py", "--eps", "small"], "argument --eps: invalid float value: 'small'"),
    ],
)
def test_every_script_is_behind_the_door(arguments, message, tmp_path, monkeypatch):
    (tmp_path / "notes.md").write_text("mine")
    script, *given = (str(tmp_path) if argument == "MINE" else argument for argument in arguments)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(sys, "argv", [f"scripts/{script}", *given])
    monkeypatch.syspath_prepend(str((ROOT / "scripts" / script).parent))
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
    said = str(end.value)
    assert said.startswith("error: ") and message in said and "\n" not in said
    assert (tmp_path / "notes.md").read_text() == "mine"
