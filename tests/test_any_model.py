"""The benchmarks of steps on any model, and of the memory of large bases: they measure what they say."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn


BENCHMARKS = Path(__file__).resolve().parents[1] / "scripts" / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """Runs a benchmark with a command line; without one, returns its names."""

    def run(name: str, *arguments: str) -> dict:
        path = str(BENCHMARKS / f"{name}.py")
        monkeypatch.setattr(sys, "argv", [path, *arguments])
        return runpy.run_path(path, run_name="__main__" if arguments else "any_model")

    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)


def test_mezos_step_is_the_published_one(script):
    names = script("any_model")
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    inputs = torch.randn(5, 4).double()
    before = nn.utils.parameters_to_vector(model.parameters()).detach()
    names["mezo_step"](model)(lambda: model(inputs).square().mean(), rate=0.1, seed=0)
    after = nn.utils.parameters_to_vector(model.parameters()).detach()
    torch.manual_seed(0)
    direction = torch.cat([torch.normal(0.0, 1.0, p.shape, dtype=p.dtype).flatten() for p in model.parameters()])
    nn.utils.vector_to_parameters(before, model.parameters())
    model(inputs).square().mean().backward()
    slope = torch.cat([p.grad.flatten() for p in model.parameters()]) @ direction
    torch.testing.assert_close(after, before - 0.1 * slope * direction, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_a_table_has_a_row_for_every_way_that_is_installed(script, tmp_path, capsys):
    options = "--models minilm --batch 2 --length 8 --rounds 1 --threads 1 --clock cpu --no-memory".split()
    script("any_model", *options, "--output", str(tmp_path / "steps.json"))
    rows = json.loads((tmp_path / "steps.json").read_text(encoding="utf-8"))["rows"]
    assert {"two passes", "full, MeZO", "full, ours", "LoRA, MeZO", "LoRA, ours"} <= {row["way"] for row in rows}
    assert rows[0]["ratio"] == 1 and all(row["seconds"] > 0 for row in rows)
    assert (tmp_path / "steps.png").stat().st_size > 0
    assert "over two passes" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read as Linux shows it")
def test_training_through_a_base_takes_the_memory_of_inference(script, tmp_path):
    options = ["--ways", "memory", "--rounds", "1", "--megabytes", "64", "--batch", "4"]
    script("large_base", *options, "--folder", str(tmp_path), "--output", str(tmp_path / "memory.json"))
    rows = json.loads((tmp_path / "memory.json").read_text(encoding="utf-8"))["rows"]
    peak = {row["task"]: row["peak_bytes"] for row in rows}
    assert peak["inference"] < peak["all-ZO"] < 1.5 * peak["inference"]
