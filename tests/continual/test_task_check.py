"""A task that was not what it should have been is not saved as complete."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_zocl.commands.recipe import build_scheduler, parse_recipe
from hf_zocl.continual.measures import means
from hf_zocl.continual.task_check import TaskError
from tests.helpers import small_clip


pytestmark = pytest.mark.usefixtures("quick_pictures")
RUN = """
--class_order 3 8 0 1 --partial_order true --increment 2 --zo_eps 0.01
--max_train_images_per_class 8 --max_test_images_per_class 2 --per_device_train_batch_size 4 --num_train_epochs 1
--report_to none --disable_tqdm true --logging_steps 50 --save_strategy steps --save_steps 2
"""
STEPS = 4


def scheduler(tmp_path, *callbacks: TrainerCallback, arguments: str = ""):
    options = ["--output_dir", str(tmp_path), "--model_name_or_path", small_clip(), *RUN.split(), *arguments.split()]
    built = build_scheduler(parse_recipe(options))
    built.callbacks += callbacks
    return built


class At(TrainerCallback):
    """Does something to the model at the end of a step of the second task."""

    def __init__(self, step: int, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if args.output_dir.endswith("task-02") and state.global_step == self.step:
            self.action(model, control)


def spoil(value: float):
    def action(model, control):
        parameter = next(p for name, p in model.named_parameters() if "lora_B" in name)
        with torch.no_grad():
            parameter.view(-1)[0] = value

    return action


def assert_the_first_task_alone_is_complete(folder) -> None:
    results = json.loads((folder / "results.json").read_text(), parse_constant=pytest.fail)
    assert len(results["accuracy_matrix"]) == len(results["training"]) == 1
    assert not (folder / "task-02").exists()
    weights = load_file(folder / "task-01" / "adapter_model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


@pytest.mark.slow
@pytest.mark.parametrize("branch", ["none", "dual"])
@pytest.mark.parametrize(
    ("step", "message"),
    [
        (1, "task-02 diverged: the loss is not finite at step 2 of 4, with learning_rate="),
        (2, r"task-02 diverged: the weights are not finite after step 2 of 4 \(1 of \d+, first clip\..*lora_B"),
        (4, r"task-02 diverged: the weights are not finite after step 4 of 4"),
    ],
)
def test_a_task_that_diverges_ends_the_run_and_names_the_step(tmp_path, branch, step, message):
    options = f"--zo_branch {branch}"
    with pytest.raises(TaskError, match=message):
        scheduler(tmp_path, At(step, spoil(float("nan"))), arguments=options).run()
    assert_the_first_task_alone_is_complete(tmp_path)
    # A checkpoint of weights that are not finite would be gone on from.
    for file in (tmp_path / "trainer" / "task-02").glob("checkpoint-*/model.safetensors"):
        assert all(value.isfinite().all() for value in load_file(file).values())
    scheduler(tmp_path, arguments=options).run(resume=True)
    assert len(json.loads((tmp_path / "results.json").read_text())["accuracy_matrix"]) == 2


def test_steps_that_are_too_large_end_with_one_error(tmp_path):
    with pytest.raises(TaskError, match=r"task-01 diverged: .* at step \d of 4, with learning_rate=1e\+30"):
        scheduler(tmp_path, arguments="--learning_rate 1e30 --zo_learning_rate 1e30 --zo_sign true").run()
    assert json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)["training"] == []
    assert not (tmp_path / "task-01").exists()


def test_a_task_without_its_steps_is_not_complete(tmp_path):
    built = scheduler(tmp_path)

    class Short(built.trainer_class):  # its data run out
        def _run_epoch(self, *args, **kwargs):
            if self.args.run_name.endswith("task-02"):
                self.control.should_training_stop = True
            else:
                super()._run_epoch(*args, **kwargs)

    built.trainer_class = Short
    with pytest.raises(TaskError, match="task-02 ended after 0 of 4 steps, and is not complete: go on with --resume"):
        built.run()
    assert_the_first_task_alone_is_complete(tmp_path)


def test_a_task_that_a_callback_stops_is_complete(tmp_path):
    stop = At(3, lambda model, control: setattr(control, "should_training_stop", True))
    results = scheduler(tmp_path, stop).run()
    assert len(results["accuracy_matrix"]) == 2


@pytest.mark.parametrize("event", ["on_log", "on_save"])
def test_a_task_that_is_stopped_after_an_epochs_end_is_complete(event, tmp_path):
    """A Trainer logs and saves by epochs after `on_epoch_end`."""

    class StopAt(TrainerCallback):
        pass

    setattr(StopAt, event, lambda self, args, state, control, **kwargs: setattr(control, "should_training_stop", True))
    arguments = "--max_steps -1 --num_train_epochs 2 --logging_strategy epoch --save_strategy epoch"
    results = scheduler(tmp_path, StopAt(), arguments=arguments).run()
    assert len(results["accuracy_matrix"]) == 2


def test_the_means_of_a_task_are_over_what_is_finite():
    history = [
        {"loss": 1.0, "zo_variance": float("inf"), "zo_grad_norm": 2.0},
        {"loss": 3.0, "zo_variance": float("nan"), "zo_grad_norm": float("inf")},
        {"train_loss": 2.0},
    ]
    assert means(history) == {"loss": 2.0, "zo_grad_norm": 2.0}
