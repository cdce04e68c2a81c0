"""A run keeps what it said of every test image: the figures follow from it, and a resumed run's is the same."""

import json
import shutil

import numpy as np
import pytest
from transformers import TrainerCallback

from hf_zocl.commands.recipe import build_scheduler, parse_recipe
from hf_zocl.report import write_report
from hf_zocl.report.predictions import PredictionHistory
from tests.helpers import draw_quickly, slow_but_for, small_clip


RUN = (
    "--benchmark cifar10-sample --increment 4 --max_train_images_per_class 4 --max_test_images_per_class 3 "
    "--max_steps 2 --per_device_train_batch_size 4 --report_to none --disable_tqdm true --logging_steps 1 --seed 3"
).split()
KEPT = ("predictions.safetensors", "gallery.json")


class Crash(Exception):
    pass


class Stop(TrainerCallback):
    def __init__(self, task: str):
        self.task = task

    def on_optimizer_step(self, args, state, control, **kwargs):
        if args.output_dir.endswith(self.task) and state.global_step == 1:
            raise Crash


def scheduler(folder, *more):
    return build_scheduler(
        parse_recipe(["--output_dir", str(folder), "--model_name_or_path", small_clip(), *RUN, *more])
    )


@pytest.fixture(scope="module")
def patch():
    with pytest.MonkeyPatch.context() as patch:
        draw_quickly(patch)
        yield patch


@pytest.fixture(scope="module")
def done(tmp_path_factory, patch):
    folder = tmp_path_factory.mktemp("run")
    scheduler(folder).run()
    return folder


def check_figures(folder):
    """The accuracies in the results are those that the predictions give."""
    results = json.loads((folder / "results.json").read_text())
    history = PredictionHistory.read(folder / "predictions.safetensors")
    zero_shot = results["zero_shot"]["accuracy_matrix"]
    assert sorted(history.after) == list(range(1, len(results["accuracy_matrix"]) + 1))
    for task, row in enumerate(results["accuracy_matrix"], start=1):
        hits = [history.path(own)[task] == history.labels[history.of_task(own)] for own in range(1, task + 1)]
        assert [float(each.mean()) for each in hits] == pytest.approx(row)
        before = history.path(task)[0] == history.labels[history.of_task(task)]
        assert float(before.mean()) == pytest.approx(zero_shot[task - 1][task - 1])
    return results, history


def test_the_accuracies_follow_from_the_predictions(done):
    _, history = check_figures(done)
    own = [np.unique(history.labels[history.of_task(task)]).tolist() for task in (1, 2, 3)]
    assert history.images.tolist() == [12, 12, 6] and own == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    for task in (1, 2, 3):  # the copy in a task's folder is of that moment
        copy = PredictionHistory.read(done / f"task-0{task}" / "predictions.safetensors")
        assert copy.to_bytes() == history.up_to(task).to_bytes()


@pytest.mark.parametrize("more", [["--scenario", "task"], ["--known", ""]], ids=["task", "untrained"])
def test_other_ways_to_predict_are_kept_as_well(more, tmp_path, patch):
    if more[0] == "--known":
        scheduler(tmp_path).run(train=False)
    else:
        scheduler(tmp_path, *more).run()
    check_figures(tmp_path)
    assert "Confusion after the last task" in write_report([tmp_path], tmp_path).read_text(encoding="utf-8")


def test_known_classes_have_numbers_after_those_of_the_stream(tmp_path, patch):
    built = scheduler(tmp_path)
    built.known_classes = ("zeppelin", built.stream.class_names[-1], "yak")
    built.run(train=False)
    results, history = check_figures(tmp_path)
    names = [*results["classes"], "zeppelin", "yak"]
    assert max(int(said.max()) for said in history.after.values()) < len(names)
    evaluator = built.evaluator()
    assert evaluator._numbers(built.stream, built.stream.evaluations(1)[0], np.array([0, 3, 4, 5, 6])).tolist() == [
        0,
        3,
        names.index("zeppelin"),
        names.index(built.stream.class_names[-1]),
        names.index("yak"),
    ]


@pytest.mark.parametrize("task", slow_but_for(["task-01"], ["task-01", "task-02"]))
def test_a_resumed_run_keeps_the_same_bit_for_bit(task, done, tmp_path, patch):
    stopped = scheduler(tmp_path)
    stopped.callbacks.append(Stop(task))
    with pytest.raises(Crash):
        stopped.run()
    scheduler(tmp_path).run(resume=True)
    for name in (*KEPT, *(f"task-0{t}/{name}" for t in (1, 2, 3) for name in (KEPT[0], "training_log.json"))):
        assert (tmp_path / name).read_bytes() == (done / name).read_bytes(), name


def test_a_run_that_goes_back_forgets_what_came_after(done, tmp_path, patch):
    folder = shutil.copytree(done, tmp_path / "run")
    (folder / "predictions.safetensors").unlink()  # the copy in the task's folder takes its place
    scheduler(folder).run(resume=folder / "task-01")
    assert (folder / "predictions.safetensors").read_bytes() == (done / "predictions.safetensors").read_bytes()


def test_a_run_without_predictions_goes_on_without(done, tmp_path, patch):
    folder = shutil.copytree(done, tmp_path / "run")
    for file in (*folder.glob("predictions.*"), *folder.glob("task-0*/predictions.*"), folder / "gallery.json"):
        file.unlink()
    scheduler(folder).run(resume=folder / "task-02")
    assert not (folder / "predictions.safetensors").exists() and not (folder / "gallery.json").exists()
    assert "Confusion" not in write_report([folder], folder).read_text(encoding="utf-8")


def test_what_a_run_keeps_is_small_and_its_card_shows_a_row_of_public_images(done):
    assert (done / "gallery.json").stat().st_size < 100_000
    assert (done / "task-02" / "gallery.png").stat().st_size < 150_000
    card = (done / "task-02" / "README.md").read_text()
    assert "](gallery.png)" in card and "](accuracy_matrix.png)" in card


def test_no_image_of_a_private_dataset_is_on_a_card(tmp_path, patch):
    from hf_zocl.sample import sample_path

    path = ["--benchmark", "none", "--dataset_path", str(sample_path("cifar10-sample"))]
    scheduler(tmp_path, *path).run()
    assert not list(tmp_path.glob("task-*/gallery.png")) and (tmp_path / "gallery.json").is_file()
    assert "gallery" not in (tmp_path / "task-01" / "README.md").read_text()
