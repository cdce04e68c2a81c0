"""A checkpoint measured again: the numbers of its run, bit for bit; and on other benchmarks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_zocl import CLIPClassifier, load_task_checkpoint
from hf_zocl.commands import evaluate
from hf_zocl.commands.recipe import build_scheduler, parse_recipe
from hf_zocl.continual.checkpoint_evaluation import evaluate_checkpoint
from hf_zocl.continual.replay import rebuild_task
from tests.helpers import small_clip


pytestmark = pytest.mark.usefixtures("quick_pictures")
ROOT = Path(__file__).resolve().parents[2]


def train(output_dir: Path, *arguments: str) -> dict:
    options = f"--model_name_or_path {small_clip()} --class_order 3 8 0 --partial_order true --increment 2"
    options += " --max_train_images_per_class 24 --max_test_images_per_class 10"
    options += " --max_steps 3 --learning_rate 1e-2 --zo_learning_rate 1e-2 --zo_sign true --report_to none"
    options += " --save_strategy no --disable_tqdm true"
    return build_scheduler(parse_recipe(["--output_dir", str(output_dir), *options.split(), *arguments])).run()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, dict]:
    output_dir = tmp_path_factory.mktemp("run")
    return output_dir, train(output_dir)


@pytest.mark.parametrize("number", [1, 2])
def test_the_numbers_are_those_of_the_run(run, number):
    output_dir, results = run
    measured = evaluate_checkpoint(output_dir / f"task-{number:02d}")
    assert measured["task"] == number
    assert measured["accuracy_row"] == results["accuracy_matrix"][number - 1]
    assert measured["seen_accuracy"] == results["seen_accuracy"][number - 1]
    assert measured["details"] == results["details"][number - 1]


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["lora", "moe"])
@pytest.mark.parametrize(("dtype", "adapters_own"), [("bfloat16", torch.float32), ("float64", torch.float64)])
def test_a_checkpoint_is_loaded_in_the_dtype_of_its_run(tmp_path, dtype, adapters_own, adapter):
    results = train(tmp_path, "--dtype", dtype, "--adapter", adapter, "--zo_branch", "dual", "--zo_layers", "all")
    model, _ = load_task_checkpoint(tmp_path, task=2)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert dtypes["clip.base_model.model.visual_projection.weight"] == getattr(torch, dtype)
    assert {own for name, own in dtypes.items() if "lora_" in name or "experts" in name} == {adapters_own}
    assert evaluate_checkpoint(tmp_path, task=2)["details"] == results["details"][1]
    assert rebuild_task(tmp_path, task=2).different == ()


def test_a_task_of_a_run_and_a_revision_on_the_hub_name_a_checkpoint(run, monkeypatch):
    output_dir, results = run
    assert evaluate_checkpoint(output_dir, task=2)["accuracy_row"] == results["accuracy_matrix"][1]
    asked = []

    def download(repository, patterns, revision, **more):
        asked.append((repository, revision))
        return output_dir / revision

    monkeypatch.setattr("hf_zocl.hub.checkpoint.download", download)
    measured = evaluate_checkpoint("someone/stream", revision="task-01")
    assert asked == [("someone/stream", "task-01")]
    assert (measured["checkpoint"], measured["accuracy_row"]) == ("someone/stream", results["accuracy_matrix"][0])


def test_another_benchmark_is_measured_whole_with_its_own_prompts_and_classes(run):
    measured = evaluate_checkpoint(run[0] / "task-01", benchmark="cifar10-sample", max_test_images_per_class=3)
    assert (measured["task"], len(measured["classes"]), len(measured["accuracy_row"])) == (5, 10, 5)


def test_another_scenario_asks_among_other_classes(run):
    measured = evaluate_checkpoint(run[0] / "task-02", scenario="task")
    assert measured["scenario"] == "task"
    assert measured["accuracy_row"][1] == 1.0  # the second task has one class


@pytest.mark.slow
def test_every_scenario_gives_the_same_numbers(tmp_path):
    four = ("--class_order", "3", "8", "0", "1")
    results = train(tmp_path, "--scenario", "task", *four, "--prompt_template", "a photo of a {}.", "a {}.")
    measured = evaluate_checkpoint(tmp_path, task=2)
    assert measured["accuracy_row"] == results["accuracy_matrix"][1]
    assert measured["details"] == results["details"][1]


def test_another_prompt_is_measured_with(run, monkeypatch):
    asked = []
    set_classes = CLIPClassifier.set_classes
    monkeypatch.setattr(
        CLIPClassifier,
        "set_classes",
        lambda self, *rest: [set_classes(self, *rest), asked.append(self.prompt_template)],
    )
    evaluate_checkpoint(run[0] / "task-01", prompt_template=["a sketch of a {}."])
    assert asked[-1] == "a sketch of a {}."


def test_classes_that_are_not_the_streams_are_an_error(run):
    with pytest.raises(ValueError, match="its classes .cat, ship. are not those of TaskStream"):
        evaluate_checkpoint(run[0] / "task-01", class_order=[1, 2, 3], partial_order=True)


@pytest.mark.slow
def test_the_command_prints_and_writes_what_was_measured(run, tmp_path):
    output_dir, results = run
    command = [
        sys.executable,
        "scripts/evaluate.py",
        str(output_dir),
        "--task",
        "2",
        "--output",
        str(tmp_path / "new" / "e.json"),
    ]
    done = subprocess.run([*command, "--disable_tqdm"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"accuracy          {100 * results['seen_accuracy'][1]:.1f} %" in done.stdout
    assert json.loads((tmp_path / "new" / "e.json").read_text())["accuracy_row"] == results["accuracy_matrix"][1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere/at/all"], "error: nowhere/at/all is neither a folder nor"),
        (["{run}", "--task", "1", "--benchmrak", "cifar10"], "--benchmrak is not an argument of an evaluation"),
    ],
)
def test_the_command_ends_with_one_clear_line(run, arguments, message, monkeypatch):
    arguments = [argument.replace("{run}", str(run[0])) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["evaluate", *arguments])
    with pytest.raises(SystemExit) as end:
        evaluate.main()
    assert message in str(end.value) and "\n" not in str(end.value)


@pytest.mark.parametrize("argument", ["dtype", "held_out", "model_name_or_path", "merge_into", "num_seeds"])
def test_an_argument_that_would_change_nothing_is_refused(argument):
    with pytest.raises(ValueError, match=f"--{argument} is not an argument of an evaluation"):
        evaluate.recipe_arguments([f"--{argument}", "1"])
