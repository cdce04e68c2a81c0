"""What of a run's folder may be gone on with."""

import json
from dataclasses import fields
from types import SimpleNamespace

import pytest
from transformers import TrainingArguments

from hf_zocl import ZOCLTrainingArguments
from hf_zocl.commands.recipe import parse_recipe
from hf_zocl.continual.run_arguments import RunArguments
from hf_zocl.continual.run_folder import ResumeError, RunFolder
from hf_zocl.models import AdapterArguments
from hf_zocl.report.setting import defines_run


def recipe(tmp_path, *arguments: str) -> dict:
    return json.loads(json.dumps(parse_recipe(["--output_dir", str(tmp_path), *arguments]).to_dict()))


def folder(tmp_path, recipe: dict, **more) -> RunFolder:
    """The folder of a run that has not finished a task."""
    results = {"classes": ["a"], "recipe": recipe, "zero_shot": {}, "held_out": {}, "seconds": 1}
    lists = ("tasks", "accuracy_matrix", "seen_accuracy", "details", "future_accuracy", "training")
    run = RunFolder(tmp_path)
    run.write({**results, **{name: [] for name in lists}, "peak_memory_bytes": 1, **more})
    return run


@pytest.mark.parametrize(
    ("argument", "there", "here"),
    [
        ("lr_scheduler_kwargs", {"num_cycles": 2}, {"num_cycles": 2, "last_epoch": 3}),
        ("adapter_config", {"use_rslora": True}, {"use_rslora": True, "init_lora_weights": "pissa"}),
        ("zo_queries", {"vision": 2}, {"vision": 2, "language": 4}),
    ],
)
def test_a_key_that_only_one_of_two_mappings_has_makes_another_recipe(argument, there, here, tmp_path):
    for before, now in ((there, here), (here, there)):
        with pytest.raises(ResumeError, match=argument):
            folder(tmp_path, {argument: before}).read({argument: now}, ["a"])


@pytest.mark.parametrize("argument", ["zo_layers", "frozen_parameters", "target_modules"])
def test_another_expression_makes_another_recipe_also_if_it_begins_like_a_path(argument, tmp_path):
    with pytest.raises(ResumeError, match=argument):
        folder(tmp_path, {argument: [r"\.layers\.1\."]}).read({argument: [r"\.layers\.2\."]}, ["a"])


def assert_goes_on(run: RunFolder, recipe: dict) -> None:
    assert run.read(recipe, ["a"])["classes"] == ["a"]


@pytest.mark.parametrize("argument", ["activation_checkpointing", "log_level", "project", "ddp_timeout"])
def test_an_argument_that_a_release_adds_or_drops_makes_no_other_run(tmp_path, argument):
    now = recipe(tmp_path)
    before = {name: value for name, value in now.items() if name != argument}
    assert_goes_on(folder(tmp_path, before), now)
    assert_goes_on(folder(tmp_path, now), before)
    assert_goes_on(folder(tmp_path, {**now, "an_argument_of_another_release": 3}), now)
    assert_goes_on(folder(tmp_path, now), {**now, "an_argument_of_another_release": 3})


def test_an_argument_of_the_run_that_was_not_known_then_must_be_left_alone(tmp_path):
    now = recipe(tmp_path)
    before = {name: value for name, value in now.items() if name not in ("zo_learning_rate", "neftune_noise_alpha")}
    assert_goes_on(folder(tmp_path, before), now)
    with pytest.raises(ResumeError, match=r"zo_learning_rate: None there, 0\.5 here"):
        folder(tmp_path, before).read({**now, "zo_learning_rate": 0.5}, ["a"])
    with pytest.raises(ResumeError, match="neftune_noise_alpha: 5 there, None here"):
        folder(tmp_path, {**now, "neftune_noise_alpha": 5}).read(before, ["a"])


def test_a_group_of_arguments_may_get_a_further_one(tmp_path):
    now = recipe(tmp_path)
    config = {**now["accelerator_config"], "of_another_release": True}
    assert_goes_on(folder(tmp_path, now), {**now, "accelerator_config": config})
    split = {**config, "split_batches": True}
    with pytest.raises(ResumeError, match="accelerator_config"):
        folder(tmp_path, now).read({**now, "accelerator_config": split}, ["a"])


@pytest.mark.parametrize(
    "changes",
    [
        *({"learning_rate": 0.5}, {"lr_scheduler_type": "cosine"}, {"optim": "sgd"}, {"num_train_epochs": 9}),
        *({"per_device_train_batch_size": 3}, {"gradient_accumulation_steps": 2}, {"max_grad_norm": 0.1}),
        *({"seed": 7}, {"data_seed": 0}, {"bf16": True}, {"class_order_seed": 0}, {"increment": 3}),
        *({"zo_layers": "all"}, {"zo_seed": 0}, {"lora_rank": 2}, {"adapter": "moe"}, {"moe_top_k": 1}),
    ],
    ids=str,
)
def test_what_defines_a_run_is_compared(tmp_path, changes):
    now = recipe(tmp_path)
    name, value = next(iter(changes.items()))
    with pytest.raises(ResumeError, match=f"{name}: .* there, {value!r} here"):
        folder(tmp_path, now).read({**now, **changes}, ["a"])


# Where a run lies, how it is watched, how it is kept safe, and how fast it is.
FREE = {
    *("dataset_path", "image_cache_gb", "seeds", "num_seeds", "vary_class_order", "resume", "overwrite_output_dir"),
    "preset",  # what it sets defines the run
}


def test_every_argument_of_this_package_defines_the_run_or_is_known_not_to():
    of_transformers = {field.name for field in fields(TrainingArguments)}
    own = {f.name for cls in (RunArguments, AdapterArguments, ZOCLTrainingArguments) for f in fields(cls)}
    assert {name for name in own - of_transformers if not defines_run(name)} == FREE


def test_another_number_of_processes_is_refused_by_name(tmp_path):
    now = recipe(tmp_path)
    run = folder(tmp_path, now, processes=1)
    with pytest.raises(ResumeError, match="a run in 1 process, and 2 would make other batches: expected 1"):
        run.read(now, ["a"], processes=2)
    assert run.read(now, ["a"], processes=1) is not None
    assert folder(tmp_path, now).read(now, ["a"], processes=2) is not None  # of a release that did not say


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_results_hold_no_number_that_json_has_not(tmp_path, number):
    run = folder(tmp_path, {})
    before = (tmp_path / "results.json").read_text()
    with pytest.raises(ValueError, match=r"results\.json: training\.1\.loss is (nan|inf): expected a finite number"):
        run.write({"training": [{"loss": 1.0}, {"loss": number}]})
    assert (tmp_path / "results.json").read_text() == before


def test_an_object_that_json_has_not_is_an_error_of_its_own(tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        RunFolder(tmp_path).write({"a": SimpleNamespace()})
