"""A small run from recipe to checkpoints, and what must hold of it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor, Trainer, TrainingArguments

from hf_zocl import CLIPClassifier, load_task_checkpoint
from hf_zocl.commands.recipe import Recipe, build_scheduler, parse_recipe
from hf_zocl.continual.measures import curves, peak_memory_bytes, reset_peak_memory
from hf_zocl.data.images import ImageCollator
from hf_zocl.sample import sample_path
from tests.helpers import draw_quickly, small_clip


def small_recipe(output_dir: Path, *arguments: str) -> Recipe:
    """Two tasks, of two and one classes, on the embedded sample."""
    options = {
        "output_dir": output_dir,
        "model_name_or_path": small_clip(),
        "class_order": "3 8 0",
        "partial_order": "true",
        "increment": 2,
        "max_train_images_per_class": 24,
        "max_test_images_per_class": 10,
        "per_device_train_batch_size": 16,
        "num_train_epochs": 1,
        "learning_rate": 1e-2,
        "zo_layers": "hop-even",
        "zo_learning_rate": 1e-2,
        "zo_sign": "true",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": "true",
        "logging_steps": 100,
    }
    flat = [part for name, value in options.items() for part in (f"--{name}", *str(value).split())]
    return parse_recipe([*flat, *arguments])


@pytest.fixture(autouse=True)
def _quick_pictures(monkeypatch):
    """But `run`, which is made before, has its own."""
    draw_quickly(monkeypatch)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, dict]:
    output_dir = tmp_path_factory.mktemp("run")
    results = build_scheduler(small_recipe(output_dir)).run()
    return output_dir, results


def accuracies(results: dict) -> list:
    names = ("accuracy_matrix", "seen_accuracy", "last", "avg", "forgetting", "backward_transfer")
    return [results[name] for name in names] + [results["zero_shot"]]


def test_a_run_writes_what_the_contract_says(run):
    output_dir, results = run
    names = {entry.name for entry in output_dir.iterdir()}
    assert {"results.json", "accuracy_matrix.png", "task-01", "task-02"} <= names
    written = json.loads((output_dir / "results.json").read_text())
    assert written == json.loads(json.dumps(results))
    expected = "benchmark recipe zero_shot accuracy_matrix seen_accuracy last avg forgetting backward_transfer seconds"
    assert set(expected.split()) | {"peak_memory_bytes", "seed", "versions"} <= set(written)
    assert set(written["zero_shot"]) >= {"per_task", "seen_accuracy", "avg", "last"}
    assert [len(row) for row in written["accuracy_matrix"]] == [1, 2]
    assert len(written["zero_shot"]["per_task"]) == len(written["zero_shot"]["seen_accuracy"]) == 2
    assert written["seconds"] > 0
    assert written["peak_memory_bytes"] > 10**8
    assert (output_dir / "accuracy_matrix.png").read_bytes().startswith(b"\x89PNG")


def test_no_unfinished_file_is_left(run):
    assert not [path for path in run[0].rglob("*") if ".tmp" in path.name]


def test_a_checkpoint_is_complete(run):
    folder = run[0] / "task-01"
    names = {entry.name for entry in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "task.json", "README.md"} <= names
    assert {"processor_config.json", "tokenizer.json", "results.json", "accuracy_matrix.png"} <= names
    assert json.loads((folder / "results.json").read_text())["seen_accuracy"] == run[1]["seen_accuracy"][:1]
    task = json.loads((folder / "task.json").read_text())
    assert (task["classes"], task["class_order"], task["task"]) == (["cat", "ship"], [3, 8], 1)
    assert task["prompt_template"] == "a photo of a {}."
    assert task["assignment"]["towers"]["vision"] == {str(i): "zo" if i % 2 == 0 else "fo" for i in range(1, 7)}
    assert task["metrics"]["seen_accuracy"] == run[1]["seen_accuracy"][:1]


def test_the_card_carries_the_results(run):
    card = ModelCard((run[0] / "task-02" / "README.md").read_text())
    values = [result.metric_value for result in card.data.eval_results]
    assert values == [run[1]["last"], run[1]["avg"], *run[1]["accuracy_matrix"][-1]]


def test_no_path_of_this_machine_is_in_a_card(run):
    assert str(run[0]) not in (run[0] / "task-02" / "README.md").read_text()


def correct(model, processor, task, arrival_labels, names) -> float:
    batch = ImageCollator(processor, arrival_labels)(list(task.test))
    with torch.no_grad():
        predictions = model.eval()(batch["pixel_values"]).logits.argmax(dim=-1)
    assert len(model.class_names) == names
    return (predictions == batch["labels"]).float().mean().item()


@pytest.mark.parametrize("number", [1, 2])
def test_load_task_checkpoint_gives_the_accuracy_of_the_results(run, number):
    output_dir, results = run
    stream = build_scheduler(small_recipe(output_dir / "unused")).stream
    model, processor = load_task_checkpoint(output_dir / f"task-{number:02d}")
    for index in range(number):
        accuracy = correct(
            model, processor, stream[index], stream.arrival_labels, len(stream.seen_class_names(number))
        )
        assert accuracy == pytest.approx(results["accuracy_matrix"][number - 1][index])


def test_a_run_folder_and_a_task_name_a_checkpoint_too(run):
    model, _ = load_task_checkpoint(run[0], task=1)
    assert model.class_names == ("cat", "ship")


@pytest.mark.slow
def test_a_checkpoint_loads_without_hf_zocl(tmp_path):
    """In a process of its own, which must not import hf_zocl; the accuracy is the one in results.json."""
    script = tmp_path / "load.py"
    script.write_text(
        """
import json, sys
import torch
from datasets import load_dataset
from peft import PeftConfig, PeftModel
from transformers import CLIPModel, CLIPProcessor
folder, data = sys.argv[1:]
base = PeftConfig.from_pretrained(folder).base_model_name_or_path
model = PeftModel.from_pretrained(CLIPModel.from_pretrained(base), folder).eval()
processor = CLIPProcessor.from_pretrained(folder)
task = json.load(open(folder + "/task.json"))
prompts = [task["prompt_template"].format(name) for name in task["classes"]]
test = load_dataset(data, split="test").filter(lambda row: row["label"] in task["class_order"])
inputs = processor(text=prompts, images=list(test["img"]), return_tensors="pt", padding=True)
with torch.no_grad():
    predictions = model(**inputs).logits_per_image.argmax(dim=-1)
labels = torch.tensor([task["class_order"].index(label) for label in test["label"]])
assert "hf_zocl" not in sys.modules
print((predictions == labels).float().mean().item())
"""
    )
    # A run over all test images of the sample, so that the script needs no choice of images.
    whole = build_scheduler(small_recipe(tmp_path / "run", "--max_test_images_per_class", "50")).run()
    command = [sys.executable, str(script), str(tmp_path / "run" / "task-02"), str(sample_path("cifar10-sample"))]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert float(output.split()[-1]) == pytest.approx(whole["seen_accuracy"][1])


def test_the_same_seed_gives_the_same_accuracies_and_weights(run, tmp_path):
    output_dir, results = run
    again = build_scheduler(small_recipe(tmp_path)).run()
    assert accuracies(again) == accuracies(results)
    first, second = (load_file(folder / "task-02" / "adapter_model.safetensors") for folder in (output_dir, tmp_path))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_seed_gives_other_weights(run, tmp_path):
    build_scheduler(small_recipe(tmp_path, "--seed", "1")).run()
    first, second = (load_file(folder / "task-02" / "adapter_model.safetensors") for folder in (run[0], tmp_path))
    assert not all(torch.equal(first[name], second[name]) for name in first)


def test_branch_none_equals_plain_trainers_to_the_last_bit(tmp_path):
    build_scheduler(small_recipe(tmp_path / "ours", "--zo_branch", "none")).run()

    scheduler = build_scheduler(small_recipe(tmp_path / "plain", "--zo_branch", "none"))
    model, stream, args = scheduler.model, scheduler.stream, scheduler.args
    own = ("zo_", "hub_strategy")  # whose every_task the Trainer does not know
    plain = {name: value for name, value in args.to_dict().items() if not name.startswith(own)}
    for task in stream:
        names, first_label = stream.training_classes(task.index)
        model.set_classes(names)
        Trainer(
            model=model,
            args=TrainingArguments(**{**plain, "remove_unused_columns": False}),
            train_dataset=task.train,
            data_collator=ImageCollator(scheduler.processor, stream.arrival_labels, first_label),
        ).train()
    ours = load_file(tmp_path / "ours" / "task-02" / "adapter_model.safetensors")
    theirs = {name.replace(".default", ""): p for name, p in model.clip.named_parameters() if p.requires_grad}
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_zero_shot_is_the_untrained_model_by_the_same_protocol(run, tmp_path):
    _, results = run
    untrained = build_scheduler(small_recipe(tmp_path, "--learning_rate", "0", "--zo_learning_rate", "0")).run()
    assert untrained["accuracy_matrix"] == results["zero_shot"]["accuracy_matrix"]
    assert untrained["seen_accuracy"] == results["zero_shot"]["seen_accuracy"]
    assert untrained["accuracy_matrix"][-1] == results["zero_shot"]["per_task"]


def test_an_interrupted_run_resumes_after_its_last_complete_task(run, tmp_path):
    output_dir = tmp_path / "run"
    shutil.copytree(run[0], output_dir)
    stopped = json.loads((output_dir / "results.json").read_text())
    stopped["recipe"]["output_dir"] = str(output_dir)
    for name in ("accuracy_matrix", "seen_accuracy"):
        stopped[name] = stopped[name][:1]
    (output_dir / "results.json").write_text(json.dumps(stopped))
    shutil.rmtree(output_dir / "task-02")
    resumed = build_scheduler(small_recipe(output_dir)).run(resume=True)
    assert accuracies(resumed) == accuracies(run[1])
    assert (output_dir / "task-02" / "task.json").is_file()


def test_resuming_another_recipe_names_the_difference(run):
    scheduler = build_scheduler(small_recipe(run[0], "--zo_layers", "hop-odd"))
    with pytest.raises(ValueError, match="zo_layers: 'hop-even' there, 'hop-odd' here"):
        scheduler.run(resume=True)


def test_a_new_run_leaves_a_task_that_no_run_there_has_written(tmp_path):
    (tmp_path / "task-09").mkdir(parents=True)
    scheduler = build_scheduler(small_recipe(tmp_path, "--max_steps", "1"))
    scheduler.run()
    assert sorted(p.name for p in tmp_path.glob("task-*")) == ["task-01", "task-02", "task-09"]


def test_every_task_draws_directions_of_its_own(tmp_path, monkeypatch):
    scheduler = build_scheduler(small_recipe(tmp_path, "--max_steps", "1"))
    seeds = []
    original = scheduler.trainer_class.create_optimizer
    monkeypatch.setattr(
        scheduler.trainer_class,
        "create_optimizer",
        lambda self, *a: seeds.append(self.args.zo_seed) or original(self, *a),
    )
    scheduler.run()
    assert len(set(seeds)) == 2


def test_the_collator_counts_labels_from_the_tasks_first_class():
    arrival = np.array([2, -1, -1, 0, -1, -1, -1, -1, 1, -1])
    processor, image = AutoProcessor.from_pretrained(sample_path("mini-clip")), Image.new("RGB", (32, 32))
    batch = ImageCollator(processor, arrival, first_label=0)([{"image": image, "label": 8}])
    assert batch["labels"].tolist() == [1]
    assert batch["pixel_values"].shape == (1, 3, 32, 32)
    assert ImageCollator(processor, arrival, first_label=2)([{"image": image, "label": 0}])["labels"] == 0


@pytest.mark.parametrize(("name", "text"), [("task.json", None), ("task.json", '{"format_version": 99}')])
def test_a_folder_that_is_no_checkpoint_is_named(tmp_path, name, text):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=r"task\.json"):
        load_task_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["task-77", "no/such/folder"])
def test_a_missing_folder_is_named(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} is neither a folder nor the name of a repository"):
        load_task_checkpoint(tmp_path / name)


def test_task_and_revision_together_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"task=1 and revision='main'"):
        load_task_checkpoint(tmp_path, task=1, revision="main")


def test_the_loaded_model_is_a_classifier(run):
    assert isinstance(load_task_checkpoint(run[0] / "task-01")[0], CLIPClassifier)


@pytest.mark.slow
def test_evaluation_leaves_no_test_image_out(tmp_path):
    drop = "--dataloader_drop_last true --per_device_eval_batch_size 7 --per_device_train_batch_size 4"
    results = build_scheduler(small_recipe(tmp_path, *drop.split())).run()
    assert len(results["accuracy_matrix"]) == len(results["tasks"])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux alone forgets a process's peak")
def test_the_peak_of_an_earlier_run_is_not_this_runs():
    taken = torch.ones(50_000_000)
    before = peak_memory_bytes()
    del taken
    reset_peak_memory()
    assert peak_memory_bytes() < before - 100_000_000


def test_the_curves_of_a_task_end_at_its_last_step():
    log = [{"loss": 2.0, "step": 3}, {"loss": 1.0, "zo_noise": 0.5, "step": 6}, {"train_loss": 1.4, "step": 8}]
    assert curves(log) == {"step": [3, 6, 8], "loss": [2, 1, None], "zo_noise": [None, 0.5, None]}
    assert curves(log, points=1) == {"step": [4.5, 8], "loss": [1.5, None], "zo_noise": [0.5, None]}
    assert curves(log[:2]) == {"step": [3, 6], "loss": [2, 1], "zo_noise": [None, 0.5]}
    assert curves(log[2:]) == {"step": [8], "loss": [None]}
