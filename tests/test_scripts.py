"""The commands, run as a user runs them."""

import json
import os
import runpy
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from hf_zocl.commands import train, tune
from hf_zocl.commands.recipe import parse_recipe
from hf_zocl.commands.tune import FirstTask, first_task_stream, mark_best
from hf_zocl.continual.folder_lock import FolderInUseError
from hf_zocl.continual.run_arguments import build_stream
from hf_zocl.continual.run_folder import RunFolderError
from hf_zocl.data.benchmark import BenchmarkSequence
from hf_zocl.data.benchmarks import BENCHMARKS
from hf_zocl.report import RunGroup
from tests.helpers import small_clip


pytestmark = pytest.mark.usefixtures("quick_pictures")
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


@pytest.fixture
def script(monkeypatch, capsys):
    """Runs a script in this process, as its command line would; returns what it prints."""

    def run(path: str, *arguments: str) -> str:
        monkeypatch.chdir(ROOT)
        monkeypatch.syspath_prepend(str((ROOT / path).parent))
        monkeypatch.setattr(sys, "argv", [path, *arguments])
        runpy.run_path(str(ROOT / path), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.slow
def test_the_quickstart_recipe_runs_through_accelerate_and_ends_with_a_table(tmp_path):
    recipe = ["--recipe", "scripts/recipes/quickstart.yaml", "--output_dir", str(tmp_path), "--increment", "5"]
    done = launch(*recipe, "--initial_increment", "5", "--max_steps", "2", "--max_test_images_per_class", "5")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert [len(row) for row in results["accuracy_matrix"]] == [1, 2]
    assert results["recipe"]["zo_layers"] == "hop-even"
    assert f"after task 2  {100 * results['accuracy_matrix'][1][0]:>6.1f}" in done.stdout
    assert "zero-shot" in done.stdout
    names = ["accuracy_matrix.png", "gallery.json", "predictions.safetensors", "results.json", "task-01", "task-02"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names


@pytest.mark.slow
def test_a_misspelt_key_ends_the_command_with_one_clear_line(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"output_dir: {tmp_path / 'run'}\nzo_leyers: all\n")
    done = launch("--recipe", str(recipe))
    assert done.returncode != 0
    assert "error: " in done.stderr
    assert "unknown argument 'zo_leyers'. Did you mean 'zo_layers'?" in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_benchmark_of_the_moe_adapter_prints_a_table(capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "benchmarks"))
    script = runpy.run_path(str(ROOT / "scripts" / "benchmarks" / "peers.py"))
    script["MOE_SHAPES"].clear()
    script["MOE_SHAPES"]["small block"] = (4, 5, 16)
    script["benchmark_moe"]("cpu", repeats=1)
    rows = capsys.readouterr().out.splitlines()
    assert [row[:26].strip() for row in rows[1:]] == ["small block, top 2 of 2"] * 2 + ["small block, top 2 of 22"] * 2
    assert all(row.endswith("x") for row in rows[1:])


@pytest.mark.slow
def test_reproduce_runs_every_cell_once_and_prints_a_table(tmp_path, script):
    command = ["scripts/studies/reproduce.py", "layers", "--recipe", "scripts/recipes/quickstart.yaml"]
    command += ["--seeds", "0", "1", "--model_name_or_path", small_clip()]
    command += ["--cells", "FO", "language/hop-odd", "--output_dir", str(tmp_path)]
    command += ["--increment", "5", "--initial_increment", "5", "--max_steps", "1", "--max_test_images_per_class", "2"]
    rows = [line for line in script(*command).splitlines() if line.startswith("|")]
    table = ["setting", "---", "zero-shot", "FO", "language/hop-odd"]
    findings = ["finding", "---", *["the best hybrid ≥ FO (language/hop-odd)"] * 2]
    assert [row.split("|")[1].strip() for row in rows] == table + findings
    width, height = Image.open(tmp_path / "quickstart-lora" / "layers.png").size
    assert width > 600 and height > 200
    results = tmp_path / "quickstart-lora" / "FO" / "seed-1" / "results.json"
    written = results.stat().st_mtime_ns
    assert [line for line in script(*command).splitlines() if line.startswith("|")] == rows
    assert results.stat().st_mtime_ns == written


SMALL_STREAM = "--increment 5 --initial_increment 5 --max_steps 2 --max_train_images_per_class 6"
JUDGED = "--retention hf_zocl/sample/cifar10-sample --retention_images 2 --held_out 4 --repetitions 2"


@pytest.mark.slow
def test_tune_judges_every_candidate_by_the_first_task_and_marks_the_best(tmp_path):
    command = [sys.executable, "scripts/tune.py", "--recipe", "scripts/recipes/quickstart.yaml", "--seeds", "0"]
    command += [*SMALL_STREAM.split(), *JUDGED.split(), "--grid", "zo_learning_rate=1e-3,1e-1"]
    file = tmp_path / "rows.json"
    done = subprocess.run([*command, "--output", str(file)], cwd=ROOT, capture_output=True, text=True, check=True)
    rows = json.loads(file.read_text())
    assert [row["candidate"] for row in rows] == [{}, {"zo_learning_rate": "1e-3"}, {"zo_learning_rate": "1e-1"}]
    assert all(row["score"] == pytest.approx((row["first_task"] * row["retained"]) ** 0.5) for row in rows)
    (best,) = (row for row in rows if row["chosen"])
    assert best["score"] == max(row["score"] for row in rows[1:])
    assert sum("| chosen |" in line for line in done.stdout.splitlines()) == 1


def test_tune_trains_with_the_plug_ins_of_the_recipe():
    retention = build_stream(parse_recipe(["--recipe", "quickstart"]).run)
    judge = FirstTask("quickstart", (0,), 4, retention, 1)
    more = ["--model_name_or_path", small_clip(), *SMALL_STREAM.split(), "--classifier_alignment", "5"]
    with judge._scheduler(more) as (scheduler, tasks):
        assert [each.steps for each in scheduler.callbacks] == [5] and tasks == 2
        again = judge._over(scheduler.stream, scheduler.args, scheduler)
        assert again.callbacks == scheduler.callbacks and again.recipe == scheduler.recipe


def test_tune_has_the_prompts_and_the_image_options_of_the_run(monkeypatch):
    one = replace(BENCHMARKS["cifar10-sample"], prompt_template=("a satellite photo of {}.", "a sketch of {}."))
    pair = BenchmarkSequence("pair", (replace(one, name="one"), replace(one, name="two")), source="")
    monkeypatch.setitem(BENCHMARKS, "pair", pair)
    recipe = parse_recipe(["--benchmark", "pair", "--max_train_images_per_class", "8", "--output_dir", "x"])
    stream, _ = build_stream(recipe.run)
    assert first_task_stream(stream, recipe, 2)[0].prompt_template == stream[0].prompt_template == one.prompt_template
    judge = FirstTask("quickstart", (0,), 4, stream, 1)
    more = [
        "--model_name_or_path",
        small_clip(),
        *SMALL_STREAM.split(),
        "--image_cache_gb",
        "0",
        "--skip_corrupt",
        "true",
    ]
    with judge._scheduler(more) as (scheduler, _):
        for each in (scheduler, judge._over(scheduler.stream, scheduler.args, scheduler)):
            assert (each.image_cache_gb, each.skip_corrupt) == (0, True)


def test_tune_takes_a_value_for_each_tower_as_one_candidate(monkeypatch):
    grid = [
        "zo_queries=vision=1,language=8,vision=2,language=16",
        "learning_rate=1e-3,2e-3",
        "zo_eps=auto,vision=1e-3",
    ]
    command = ["tune", "--recipe", "quickstart", "--retention", "x"]
    monkeypatch.setattr(sys, "argv", [*command, *(word for item in grid for word in ("--grid", item))])
    assert tune.parse_arguments()[0].grid == {
        "zo_queries": ["vision=1,language=8", "vision=2,language=16"],
        "learning_rate": ["1e-3", "2e-3"],
        "zo_eps": ["auto", "vision=1e-3"],
    }


@pytest.mark.parametrize("words", [["--grid", "seed=1,2"], ["--seed", "5"], ["--output_dir=x"], ["--output-dir=x"]])
def test_tune_refuses_what_it_sets_itself(monkeypatch, words):
    command = ["tune", "--recipe", "quickstart", "--retention", "x", "--grid", "learning_rate=1e-3"]
    monkeypatch.setattr(sys, "argv", [*command, *words])
    with pytest.raises(SystemExit, match="--(seed|output_dir): every candidate gets its own .*leave it out"):
        tune.main()


def test_tune_measures_retention_among_that_datasets_classes_alone(monkeypatch):
    own, other, known = object(), [object()], []
    evaluator = SimpleNamespace(after=lambda stream, index: {"seen": 0.5})
    scheduler = SimpleNamespace(stream=own, evaluator=lambda is_own=True: known.append(is_own) or evaluator)
    assert tune.accuracy(scheduler, other) == 0.5 and known == [False]


def test_tune_keeps_what_it_measured_if_no_candidate_can_be_chosen(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tune, "retention_stream", lambda *options: None)
    monkeypatch.setattr(FirstTask, "zero_shot", lambda judge, further: tune.as_row({}, [0.5], [0.5]))
    monkeypatch.setattr(
        FirstTask, "measure_all", lambda judge, grid, further: [tune.as_row({"learning_rate": "1e-3"}, [0.6], [0.4])]
    )
    file = tmp_path / "rows.json"
    command = ["tune", "--recipe", "quickstart", "--retention", "x", "--keep", "0.9", "--output", str(file)]
    monkeypatch.setattr(sys, "argv", [*command, "--grid", "learning_rate=1e-3"])
    with pytest.raises(SystemExit, match="--keep 0.9: no candidate retains that much"):
        tune.main()
    assert "| learning_rate=1e-3 | 60.0 | 40.0 | 49.0 |  |" in capsys.readouterr().out
    assert [row["first_task"] for row in json.loads(file.read_text())] == [0.5, 0.6]
    monkeypatch.setattr(sys, "argv", [*command, "--grid", "learning_rate=1e-3", "--grid", "learning_rate=2e-3"])
    with pytest.raises(SystemExit, match="learning_rate, learning_rate: expected each argument once"):
        tune.main()


def test_with_a_floor_of_retention_the_fastest_learner_wins():
    rows = [{"first_task": a, "retained": r, "score": (a * r) ** 0.5} for a, r in ((9, 9), (1, 8), (4, 3), (6, 1))]
    assert mark_best(rows) is rows[2]
    assert mark_best(rows, keep=1) is rows[3]
    assert mark_best(rows, keep=2) is rows[2]
    assert [row["chosen"] for row in rows] == [False, False, True, False]
    with pytest.raises(ValueError, match="--keep 9.5: no candidate retains that much; the most is 8.0000"):
        mark_best(rows, keep=9.5)


@pytest.mark.slow
def test_reproduce_chooses_rates_on_the_first_task_once(tmp_path, script):
    command = ["scripts/studies/reproduce.py", "mozo", "--recipe", "scripts/recipes/quickstart.yaml"]
    command += ["--cells", "MoZO", "--model_name_or_path", small_clip()]
    command += [*SMALL_STREAM.split(), "--max_test_images_per_class", "2", "--output_dir", str(tmp_path)]
    command += ["--seeds", "0"]
    with pytest.raises(SystemExit, match="--retention DATASET is needed"):
        script(*command)
    command += [*JUDGED.split(), "--repetitions", "1"]
    printed = script(*command)
    file = tmp_path / "quickstart-lora" / "MoZO" / "chosen.json"
    rows = json.loads(file.read_text())["candidates"]
    (best,) = (row["candidate"]["zo_learning_rate"] for row in rows if row["chosen"])
    run = json.loads((file.parent / "seed-0" / "results.json").read_text())
    assert run["recipe"]["zo_learning_rate"] == float(best)
    written = file.stat().st_mtime_ns
    printed += script(*command)
    assert file.stat().st_mtime_ns == written
    assert printed.count("| MoZO | 1 |") == 2


def make_groups(**last: list[float]) -> list[RunGroup]:
    return [
        RunGroup(name, tuple({"seed": seed, "last": value, "avg": value} for seed, value in enumerate(values)))
        for name, values in last.items()
    ]


def test_findings_are_decided_by_paired_differences(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "studies"))
    paper = runpy.run_path(str(ROOT / "scripts" / "studies" / "paper.py"))
    groups = make_groups(
        **{"FO": [0.30, 0.40, 0.50], "dual/all": [0.10, 0.21, 0.30], "vision/all": [0.28, 0.37, 0.47],
           "language/all": [0.25, 0.45, 0.46]}
    )  # fmt: skip
    rows = paper["compare_with_findings"](groups, "branch").rows
    assert [(row[0], row[1]) for row in rows[:2]] == [
        ("dual/all is the worst: the next worst is above it (vision/all)", figure) for figure in ("Last", "Avg")
    ]
    assert rows[0][2:] == ("+17.0 ± 1.0", "0.001", "holds")
    assert rows[2][2] == "+1.3 ± 5.9"
    assert rows[2][4] == "not decided"
    worse = make_groups(plain=[0.30, 0.40, 0.50], MoZO=[0.20, 0.30, 0.39])
    assert paper["compare_with_findings"](worse, "mozo").rows[0][4] == "does not hold"


def test_the_seeds_table_says_how_many_seeds_half_a_point_takes(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "studies"))
    script = runpy.run_path(str(ROOT / "scripts" / "studies" / "reproduce.py"))
    table = script["seeds_table"](make_groups(**{"FO": [0.30, 0.40, 0.50], "vision/all": [0.31, 0.40, 0.52]}))
    assert table.headings[1:4] == ("Last, seed 0", "Last, seed 1", "Last, seed 2")
    # Differences of 1, 0 and 2 points: σ = 1, (2.8 / 0.5)² = 31.36.
    assert table.rows[1] == ("vision/all", *["31.0", "40.0", "52.0"] * 2, "10.5", "10.5", "32", "32")


@pytest.mark.slow
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
    command = [sys.executable, "scripts/benchmarks/data.py", "--recipe", "scripts/recipes/quickstart.yaml"]
    command += ["--steps", "8", "--max_train_images_per_class", "32", "--max_test_images_per_class", "2"]
    done = subprocess.run(
        [*command, "--output_dir", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.endswith("% |")] == [
        "decoded and processed every time",
        "`image_cache_gb=0`: decoded and resized every time",
        "from the cache",
    ]


@pytest.mark.slow
def test_the_engines_benchmark_measures_every_kind_of_row(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "benchmarks"))
    import engine

    tiny = {"hidden_size": 32, "layers": 2, "heads": 2, "patch_size": 112}, {"hidden_size": 32, "heads": 2}
    monkeypatch.setitem(engine.SHAPES, "vit-b-16", tiny)
    rows = [
        engine.Row("inference", "inference"),
        engine.Row("FO", "fo"),
        engine.Row("FO, gradient checkpointing", "fo-checkpointing"),
        engine.Row("MeZO", "mezo"),
        engine.Row("dual, two-sided", estimator="two-sided"),
        engine.Row("bare", "bare", estimator="two-sided"),
        engine.Row("language, q=8", branch="language", queries=8),
        engine.Row("  one by one", branch="language", queries=8, without="batches"),
        engine.Row("  without towers", branch="language", queries=8, without="towers"),
    ]
    monkeypatch.setattr("engine_rows.ROWS", rows)
    monkeypatch.setattr(engine, "SWEEP", engine.SWEEP[:3])
    monkeypatch.setattr(engine, "measure_apart", engine.measure_here)
    engine.run_engine_benchmark(engine.Setting(batch=4, rounds=1, threads=1), "all", tmp_path / "engine.json")
    printed = capsys.readouterr().out
    assert "time, dual vs FO" in printed
    assert "straight line" in printed
    measured = {row["name"]: row["figures"] for row in json.loads((tmp_path / "engine.json").read_text())["rows"]}
    assert set(measured) == {row.name for row in rows}
    assert measured["MeZO"]["passes"] > 2
    # Two passes a tower, whose prompts are packed; MeZO's are padded.
    assert measured["dual, two-sided"]["passes"] == pytest.approx(1.65, abs=0.1)
    assert measured["language, q=8"]["flops"] < measured["  without towers"]["flops"]
    assert (tmp_path / "engine.png").stat().st_size > 10_000


@pytest.mark.parametrize("which", ["all", "bars", "pays"])
def test_every_row_of_the_engines_benchmark_is_counted_in_passes(which, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts" / "benchmarks")
    from engine import count_passes
    from engine_rows import BARS, choose_rows

    rows = [
        replace(row, figures={"flops": 2.0 if row.kind == "inference" else 6.0}) for row in choose_rows(which, BARS)
    ]
    count_passes(rows)  # no inference of the preset's adapter is measured
    assert {row.figures["passes"] for row in rows if row.kind != "inference"} == {3.0}


def test_candidates_are_judged_with_the_class_names_of_the_benchmark(tmp_path):
    names = [f"thing {letter}" for letter in "abcdefghij"]
    recipe = parse_recipe(["--output_dir", str(tmp_path), "--increment", "2", "--class_names", *names])
    stream, _ = build_stream(recipe.run)
    first = first_task_stream(stream, recipe, held_out=3)
    assert first.class_names == stream[0].class_names
    assert set(first.class_names) < set(names)


def test_the_hub_is_asked_about_every_seed_before_the_first_one_runs(tmp_path, monkeypatch):
    asked = []

    def from_arguments(args):
        asked.append(args.hub_model_id)
        if args.hub_model_id.endswith("-3"):
            raise ValueError("the Hub refuses it")

    monkeypatch.setattr("hf_zocl.hub.push.HubPusher.from_arguments", from_arguments)
    pushed = ["--push_to_hub", "true", "--hub_model_id", "me/run"]
    recipe = parse_recipe(["--output_dir", str(tmp_path / "run"), "--seeds", "1,2,3", *pushed])
    with ExitStack() as stack, pytest.raises(ValueError, match="the Hub refuses it"):
        train.prepare(recipe, recipe.per_seed(), stack)
    assert asked == ["me/run-seed-1", "me/run-seed-2", "me/run-seed-3"]
    assert not (tmp_path / "run").exists()


def test_several_seeds_lock_the_folder_above_them_and_replace_no_comparison_unasked(tmp_path):
    recipe = parse_recipe(["--output_dir", str(tmp_path), "--seeds", "1,2"])
    with ExitStack() as stack:
        train.prepare(recipe, recipe.per_seed(), stack)
        with ExitStack() as second, pytest.raises(FolderInUseError):
            train.prepare(recipe, recipe.per_seed(), second)
    (tmp_path / "comparison.md").write_text("mine")
    with ExitStack() as stack, pytest.raises(RunFolderError, match="comparison.md already exists"):
        train.prepare(recipe, recipe.per_seed(), stack)
    (tmp_path / "comparison.md").unlink()
    (tmp_path / "seed-2").mkdir()
    (tmp_path / "seed-2" / "results.json").write_text("{}")
    with ExitStack() as stack, pytest.raises(RunFolderError, match="seed-2' holds a run"):
        train.prepare(recipe, recipe.per_seed(), stack)


def test_processes_that_are_started_anew_go_on_with_what_their_launch_began(tmp_path, monkeypatch):
    recipe = parse_recipe(["--output_dir", str(tmp_path), "--overwrite_output_dir", "true"])
    asked = train.resume_of(recipe), train.overwrites(recipe)
    assert asked == (False, True)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    file = tmp_path / "results.json"
    file.write_text("{}")
    assert (train.resume_of(recipe), train.overwrites(recipe)) == (True, False)
    os.utime(file, (1, 1))  # of long before this launch
    assert (train.resume_of(recipe), train.overwrites(recipe)) == asked
