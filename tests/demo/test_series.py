"""A run's model at every stage is that of the task's own checkpoint; the test images that a page offers."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, CLIPModel

from hf_zocl import load_task_checkpoint
from hf_zocl.commands.push import push_run
from hf_zocl.demo.pictures import Picture
from hf_zocl.demo.pictures import test_pictures as some_pictures
from hf_zocl.demo.view import heading
from hf_zocl.hub.series import TaskSeries, tasks_of
from hf_zocl.models import CLIPClassifier
from hf_zocl.sample import sample_path
from tests.demo.runs import CLASSES, save_run
from tests.helpers import image_batch
from tests.hub.conftest import client, hub  # noqa: F401


@pytest.fixture(scope="module", params=["lora", "moe"])
def run(request, tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("runs") / "run", adapter=request.param)


def pictures() -> list:
    pixels = image_batch(2)["pixel_values"].clamp(0, 1).mul(255).byte().permute(0, 2, 3, 1).numpy()
    return list(pixels)


def test_every_stage_predicts_as_its_own_checkpoint(run):
    series = TaskSeries.load(run)
    found = series.probabilities(pictures())
    assert found.shape == (2, 4, 6)
    for task in (3, 1, 2):
        model, _ = load_task_checkpoint(run, task=task)
        _, expected = model.predict(pictures())
        known = list(series.stages[task].known)
        assert [series.classes[place] for place in known] == list(model.class_names) == CLASSES[: 2 * task]
        torch.testing.assert_close(found[:, task, known], expected)
        assert found[:, task].sum(dim=-1) == pytest.approx([1.0, 1.0])
    assert (found[:, 3] - found[:, 0]).abs().max() > 0.01  # the adapters do something
    torch.testing.assert_close(series.probabilities(pictures()), found)  # and leave nothing behind


def test_before_any_task_it_is_the_base_model(run):
    folder = sample_path("mini-clip")
    processor = AutoProcessor.from_pretrained(folder)
    base = CLIPClassifier(CLIPModel.from_pretrained(folder), processor.tokenizer, CLASSES)
    base.image_processor = processor.image_processor
    _, expected = base.predict(pictures())
    torch.testing.assert_close(TaskSeries.load(run).probabilities(pictures())[:, 0], expected)


@pytest.mark.parametrize("config", [{"bias": "all"}, {"init_lora_weights": "pissa"}], ids=["biases", "PiSSA"])
def test_before_any_task_it_is_the_base_model_also_where_the_adapter_changes_that(config, tmp_path):
    test_before_any_task_it_is_the_base_model(save_run(tmp_path / "run", adapter_config=config))


@pytest.mark.slow
def test_tasks_of_another_run_are_refused(tmp_path):
    run = save_run(tmp_path / "run")
    other = save_run(tmp_path / "other", adapter="moe")
    (run / "task-02").rename(tmp_path / "away")
    (other / "task-02").rename(run / "task-02")
    with pytest.raises(
        ValueError, match="task-02 does not belong here: it is not of the run of task-03: another adapter"
    ):
        TaskSeries.load(run)
    (run / "task-02").rename(other / "task-02")
    (run / "task-01").rename(run / "task-02")
    with pytest.raises(ValueError, match=r"task-02/task.json does not belong here: it is of task 1, expected task-02"):
        TaskSeries.load(run)


def test_a_checkpoint_in_the_place_of_its_run_is_told(tmp_path):
    run = save_run(tmp_path / "run", tasks=1)
    with pytest.raises(ValueError, match=f"It is a checkpoint of a run: give {run}"):
        tasks_of(run / "task-01")
    with pytest.raises(ValueError, match="neither a folder nor the name of a repository"):
        tasks_of("no/such/thing")


def test_a_repository_is_loaded_by_its_tags(tmp_path, client):  # noqa: F811
    run = save_run(tmp_path / "run", tasks=2)
    push_run(run, "tester/run", None, None)
    series = TaskSeries.load("tester/run")
    torch.testing.assert_close(series.probabilities(pictures()), TaskSeries.load(run).probabilities(pictures()))
    client.delete_tag("tester/run", tag="task-01")
    assert [stage.task for stage in TaskSeries.load("tester/run").stages] == [0, 2]


def test_test_images_come_from_every_task_with_the_forgotten_ones_first(tmp_path):
    series = TaskSeries.load(save_run(tmp_path / "run"))
    found = some_pictures(series, is_own=False, shown=9)
    assert [picture.task for picture in found] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    for task in (1, 2, 3):
        own = [picture for picture in found if picture.task == task]
        assert {picture.truth // 2 + 1 for picture in own} == {task}
        assert sorted(own, key=lambda picture: not picture.is_forgotten) == own
    torch.testing.assert_close(series.probabilities([found[4].image])[0], found[4].probabilities)


def test_a_test_image_that_cannot_be_decoded_is_left_out(tmp_path):
    for split in ("train", "test"):
        for label in range(10):
            (tmp_path / "data" / split / str(label)).mkdir(parents=True)
            for number in range(2):
                pixels = np.random.default_rng((label, number, len(split))).integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / str(label) / f"{number}.png")
    (tmp_path / "data" / "test" / "5" / "0.png").write_bytes(b"no image")
    run = save_run(tmp_path / "run", benchmark="none", dataset_path=str(tmp_path / "data"))
    found = some_pictures(TaskSeries.load(run), is_own=True, shown=12)
    assert [CLASSES[picture.truth] for picture in found].count(CLASSES[1]) == 1 and len(found) == 11


def test_forgotten_is_what_was_known_after_a_task_and_is_not_after_the_last():
    def picture(*said: int, task: int = 1) -> Picture:
        return Picture(None, 0, task, torch.nn.functional.one_hot(torch.tensor(said), 2).float())

    assert picture(0, 0, 1).is_forgotten
    assert not picture(0, 1, 1).is_forgotten  # zero-shot alone knew it
    assert not picture(0, 0, 1, 0).is_forgotten
    assert not picture(0, 0, 1, task=2).is_forgotten


def test_of_a_strangers_repository_no_path_is_read_and_nothing_is_downloaded(tmp_path):
    series = TaskSeries.load(save_run(tmp_path / "run", benchmark="cifar10", dataset_path="/etc"))
    with pytest.raises(ValueError, match="a repository does not hold its dataset: give --dataset_path"):
        some_pictures(series, is_own=False)
    series.info["recipe"]["dataset_path"] = str(tmp_path / "gone")
    with pytest.raises(ValueError, match="gone does not exist: give --dataset_path"):
        some_pictures(series, is_own=True)


def test_the_heading_counts_the_runs_tasks_and_says_where_the_run_was_tested_otherwise():
    stages = [SimpleNamespace(task=0), SimpleNamespace(task=5)]  # a repository may have the last task alone
    series = SimpleNamespace(info={"benchmark": "pets"}, classes=CLASSES, stages=stages)
    assert "6 classes, 5 tasks, pets" in heading(series, "run") and "Here" not in heading(series, "run")
    for scenario, own in (("task", "task"), ("cross-dataset", "dataset")):
        series.info["scenario"] = scenario
        assert f"the run was tested among those of its own {own}. No images" in heading(series, "run", "No images")
