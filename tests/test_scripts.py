"""The commands, run as a user runs them."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]


def launch(*arguments: str) -> subprocess.CompletedProcess:
    flags = [
        "--num_processes",
        "1",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--cpu",
    ]
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags, "scripts/train.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False)


def test_the_quickstart_recipe_runs_through_accelerate_and_ends_with_a_table(tmp_path):
    recipe = ["--recipe", "scripts/recipes/quickstart.yaml", "--output_dir", str(tmp_path), "--increment", "5"]
    done = launch(*recipe, "--initial_increment", "5", "--max_steps", "2", "--max_test_images_per_class", "5")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert [len(row) for row in results["accuracy_matrix"]] == [1, 2]
    assert results["recipe"]["zo_layers"] == "hop-even"
    assert f"after task 2  {100 * results['accuracy_matrix'][1][0]:>6.1f}" in done.stdout
    assert "zero-shot" in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["accuracy_matrix.png", "results.json", "task-01", "task-02"]


def test_a_misspelt_key_ends_the_command_with_one_clear_line(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"output_dir: {tmp_path / 'run'}\nzo_leyers: all\n")
    done = launch("--recipe", str(recipe))
    assert done.returncode != 0
    assert "error: " in done.stderr
    assert "unknown argument 'zo_leyers'. Did you mean 'zo_layers'?" in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_benchmark_of_the_moe_adapter_prints_a_table(capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    script = runpy.run_path(str(ROOT / "scripts" / "benchmark.py"))
    script["MOE_SHAPES"].clear()
    script["MOE_SHAPES"]["small block"] = (4, 5, 16)
    script["benchmark_moe"]("cpu", repeats=1)
    rows = capsys.readouterr().out.splitlines()
    assert [row[:26].strip() for row in rows[1:]] == ["small block, top 2 of 2"] * 2 + ["small block, top 2 of 22"] * 2
    assert all(row.endswith("x") for row in rows[1:])


def test_reproduce_runs_every_cell_once_and_prints_a_table(tmp_path):
    command = [
        sys.executable,
        *("scripts/reproduce.py", "layers", "--recipe", "scripts/recipes/quickstart.yaml", "--seeds", "0", "1"),
    ]
    command += ["--cells", "FO", "language/hop-odd", "--output_dir", str(tmp_path)]
    command += ["--increment", "5", "--initial_increment", "5", "--max_steps", "1", "--max_test_images_per_class", "2"]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = [line for line in first.stdout.splitlines() if line.startswith("|")]
    assert [row.split("|")[1].strip() for row in rows] == ["setting", "---", "zero-shot", "FO", "language/hop-odd"]
    results = tmp_path / "quickstart-lora" / "FO" / "seed-1" / "results.json"
    written = results.stat().st_mtime_ns
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert [line for line in second.stdout.splitlines() if line.startswith("|")] == rows
    assert results.stat().st_mtime_ns == written


def test_several_seeds_end_with_a_comparison_and_a_report_reads_them(tmp_path):
    recipe = ["--recipe", "scripts/recipes/quickstart.yaml", "--output_dir", str(tmp_path / "fo"), "--increment", "5"]
    recipe += ["--max_steps", "1", "--max_train_images_per_class", "8", "--max_test_images_per_class", "4"]
    done = launch(*recipe, "--zo_branch", "none", "--seeds", "1993,1996")
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "fo").iterdir()) == [
        "comparison.md",
        "comparison.tex",
        "seed-1993",
        "seed-1996",
    ]
    assert "| fo | 2 |" in done.stdout
    seeds = [json.loads((tmp_path / "fo" / f"seed-{s}" / "results.json").read_text())["seed"] for s in (1993, 1996)]
    assert seeds == [1993, 1996]
    command = [
        sys.executable,
        "scripts/report.py",
        "--compare",
        str(tmp_path / "fo"),
        "--output_dir",
        str(tmp_path / "r"),
    ]
    report = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert report.returncode == 0, report.stderr
    assert (tmp_path / "r" / "report.html").is_file()


@pytest.mark.slow
def test_the_data_benchmark_prints_a_table(tmp_path):
    command = [sys.executable, "scripts/benchmark_data.py", "--recipe", "scripts/recipes/quickstart.yaml"]
    command += ["--steps", "8", "--max_train_images_per_class", "32", "--max_test_images_per_class", "2"]
    done = subprocess.run(
        [*command, "--output_dir", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.endswith("% |")] == [
        "decoded and processed every time",
        "`image_cache_gb=0`: decoded and resized every time",
        "from the cache",
    ]


def test_the_engines_benchmark_measures_every_kind_of_row(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import benchmark_engine as engine

    tiny = {"hidden_size": 32, "layers": 2, "heads": 2, "patch_size": 112}, {"hidden_size": 32, "heads": 2}
    monkeypatch.setitem(engine.SHAPES, "vit-b-16", tiny)
    rows = [
        engine.Row("inference", "inference"),
        engine.Row("FO", "fo"),
        engine.Row("MeZO", "mezo"),
        engine.Row("dual, two-sided", estimator="two-sided"),
        engine.Row("bare", "bare", estimator="two-sided"),
        engine.Row("language, q=8", branch="language", queries=8),
        engine.Row("  one by one", branch="language", queries=8, without="batches"),
        engine.Row("  without towers", branch="language", queries=8, without="towers"),
    ]
    monkeypatch.setattr(engine, "ROWS", rows)
    monkeypatch.setattr(engine, "SWEEP", engine.SWEEP[:3])
    monkeypatch.setattr(engine, "measure_apart", engine.measure_here)
    engine.run_engine_benchmark(engine.Setting(batch=4, rounds=1, threads=1), "all", tmp_path / "engine.json")
    printed = capsys.readouterr().out
    assert "time, dual vs FO" in printed
    assert "straight line" in printed
    measured = {row["name"]: row["figures"] for row in json.loads((tmp_path / "engine.json").read_text())["rows"]}
    assert set(measured) == {row.name for row in rows}
    assert measured["MeZO"]["passes"] > 2
    # Two passes a tower, of which MeZO's have longer prompts.
    assert measured["dual, two-sided"]["passes"] == pytest.approx(2, abs=0.1)
    assert measured["language, q=8"]["flops"] < measured["  without towers"]["flops"]
    assert (tmp_path / "engine.png").stat().st_size > 10_000
