"""Nothing in a folder is lost that a run did not write, nor what it wrote without being asked."""

import hashlib
import json
import logging
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PILImage
from transformers import TrainerCallback

from hf_zocl.commands.recipe import build_scheduler, parse_recipe
from hf_zocl.continual.folder_lock import FolderInUseError, FolderLock
from hf_zocl.continual.run_folder import ResumeError, RunFolder, RunFolderError
from hf_zocl.data import TaskStream
from hf_zocl.hub.checkpoint import remove_task_checkpoint
from tests.helpers import small_clip


pytestmark = pytest.mark.usefixtures("quick_pictures")
RUN = """
--class_order 3 8 0 1 --partial_order true --increment 2 --max_train_images_per_class 4 --max_test_images_per_class 2
--per_device_train_batch_size 4 --max_steps 1 --zo_branch none --learning_rate 1e-2
--report_to none --disable_tqdm true --save_strategy no
"""
OF_A_RUN = ["accuracy_matrix.png", "gallery.json", "predictions.safetensors", "results.json"]
MINE = (
    "task-2024-notes/n.md",
    "task-01-old/a.txt",
    "task-03/task.json",
    "task-01/notes.txt",
    "task-01/.env",
    "replay/exemplars/a.txt",
    "trainer/other/checkpoint-9/x",
    "trainer/task-01/log.txt",
    ".keep.tmp/x",
    ".keep.7.tmp",
    ".task-2024.tmp/x",
    "results.json.bak",
)


def recipe(folder: Path, *more: str):
    return parse_recipe(["--output_dir", str(folder), "--model_name_or_path", small_clip(), *RUN.split(), *more])


def scheduler(folder: Path, *more: str, callbacks=()):
    built = build_scheduler(recipe(folder, *more))
    built.callbacks += callbacks
    return built


@pytest.fixture(scope="module")
def _done(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("done") / "run"
    scheduler(folder).run()
    return folder


@pytest.fixture
def done(_done, tmp_path) -> Path:
    """A finished run of two tasks, in a folder of the test's own."""
    return Path(shutil.copytree(_done, tmp_path / "run"))


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def lay(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"my {name}")


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_a_folder_that_holds_a_run_is_refused_unless_it_is_said_what_becomes_of_it(done):
    before = contents(done)
    with pytest.raises(RunFolderError, match=r"holds a run \(results.json\): --resume .*, --overwrite_output_dir "):
        scheduler(done, "--seed", "3").run()
    with pytest.raises(RunFolderError, match="both given: pass one"):
        scheduler(done).run(resume=True, overwrite_output_dir=True)
    with pytest.raises(RunFolderError, match="holds a run"):
        scheduler(done, "--learning", "none").run(train=False)
    assert contents(done) == before


def test_a_run_whose_results_are_lost_is_still_a_run(done):
    (done / "results.json").unlink()
    before = contents(done)
    with pytest.raises(RunFolderError, match=r"holds a run \(results.json\)"):
        scheduler(done).run()
    assert contents(done) == before
    scheduler(done, "--seed", "3").run(overwrite_output_dir=True)
    assert results(done)["seed"] == 3


def test_overwriting_removes_what_the_run_wrote_and_nothing_else(done):
    lay(done, *MINE)
    scheduler(done, "--seed", "3").run(overwrite_output_dir=True)
    assert {name: (done / name).read_text() for name in MINE} == {name: f"my {name}" for name in MINE}
    assert [json.loads((done / f"task-0{t}" / "task.json").read_text())["seed"] for t in (1, 2)] == [3, 3]
    assert results(done)["seed"] == 3
    scheduler(done).run(resume=False, overwrite_output_dir=True)  # beside them once more
    assert {name for name in contents(done) if name in MINE} == set(MINE)


def test_a_shorter_run_leaves_no_task_of_a_longer_one(done):
    scheduler(done, "--increment", "4").run(overwrite_output_dir=True)
    assert sorted(path.name for path in done.iterdir()) == [*OF_A_RUN, "task-01"]


def test_a_first_run_leaves_everything_that_is_there(tmp_path):
    lay(tmp_path, *MINE)
    scheduler(tmp_path).run()
    assert {name: (tmp_path / name).read_text() for name in MINE} == {name: f"my {name}" for name in MINE}


@pytest.mark.parametrize(
    "name",
    [
        "accuracy_matrix.png",
        "gallery.json",
        "predictions.safetensors",
        "push_queue.json",
        "task-02/README.md",
        "task-01/config.json",
        "task-01/.eval_results/x.yaml",
        "task-01",
        "replay/task-02.safetensors",
        "trainer/task-01/checkpoint-3/x",
    ],
)
@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite_output_dir": True}], ids=["new", "resume", "over"])
def test_a_file_in_the_way_is_named_and_stays(name, how, tmp_path):
    folder = tmp_path / "run"
    lay(folder, name)
    built = scheduler(folder)
    built._start = None
    with pytest.raises(RunFolderError, match=r"already exists, and no results.json says that a run wrote it"):
        built.run(**how)
    assert contents(folder) == {name: hashlib.sha256(f"my {name}".encode()).hexdigest()}


@pytest.mark.parametrize(
    "name",
    ["task-01/model.safetensors", "task-02/config.json", "task-02/vocab.json", "task-01/.eval_results/mine.yaml"],
)
def test_a_file_that_was_added_to_a_checkpoint_is_named_and_stays(name, done):
    lay(done, name)
    before = contents(done)
    with pytest.raises(RunFolderError, match=f"{name} was not written by the run there"):
        scheduler(done, "--seed", "3").run(overwrite_output_dir=True)
    assert contents(done) == before
    remove_task_checkpoint(done / name.split("/")[0])
    assert (done / name).read_text() == f"my {name}"


@pytest.mark.parametrize("manifest", [None, '{"files": {"trainer_state.json": {}}}', "mine"], ids=str)
def test_a_file_in_a_checkpoint_within_a_task_is_named_and_stays(manifest, done):
    lay(done, name := "trainer/task-02/checkpoint-7/mine.bin")
    if manifest is not None:
        (done / name).with_name("manifest.json").write_text(manifest)
    before = contents(done)
    with pytest.raises(RunFolderError, match="task-02/checkpoint-7/(mine.bin|manifest.json) is not known to be of"):
        scheduler(done, "--seed", "3").run(overwrite_output_dir=True)
    assert contents(done) == before


class Adds(TrainerCallback):
    """Adds a file to every checkpoint within a task."""

    def on_save(self, args, state, control, **kwargs):
        lay(Path(args.output_dir), f"checkpoint-{state.global_step}/mine/notes.txt")


def test_a_file_added_to_a_checkpoint_outlives_its_task(tmp_path):
    scheduler(tmp_path, "--save_steps", "1", "--save_strategy", "steps", callbacks=[Adds()]).run()
    left = {name for name in contents(tmp_path) if name.startswith("trainer/")}
    assert left and all(name.endswith("/mine/notes.txt") for name in left)


def test_what_a_killed_save_left_is_overwritten(done):
    lay(done, "trainer/task-02/checkpoint-7/model.safetensors")
    (done / "trainer/task-02/checkpoint-7/manifest.json").write_text('{"files": {}}')
    scheduler(done, "--seed", "3").run(overwrite_output_dir=True)
    assert not (done / "trainer").exists()


def test_what_is_no_log_of_steps_is_not_removed_as_one(done):
    lay(done, "replay/task-02.safetensors")
    before = contents(done)
    with pytest.raises(RunFolderError, match=r"replay/task-02.safetensors is not of the run that is there"):
        scheduler(done, "--seed", "3").run(overwrite_output_dir=True)
    assert contents(done) == before


@pytest.mark.parametrize("text", ["mine", "[]", '{"accuracy": 1}'])
def test_results_that_are_no_runs_are_not_overwritten(text, tmp_path):
    (tmp_path / "results.json").write_text(text)
    for how, message in (({}, "holds a run"), ({"overwrite_output_dir": True}, "not known which files the run wrote")):
        with pytest.raises(RunFolderError, match=message):
            scheduler(tmp_path).run(**how)
    assert (tmp_path / "results.json").read_text() == text
    assert len(contents(tmp_path)) == 1


class Fails(TrainerCallback):
    def __init__(self, event: str):
        setattr(self, event, self.fail)

    def fail(self, *args, **kwargs):
        raise KeyError("a callback's own")


@pytest.mark.parametrize("event", ["on_train_begin", "on_epoch_begin", "on_step_begin", "on_step_end"])
def test_a_callback_that_fails_before_a_step_is_done_costs_nothing(event, done):
    before = contents(done)
    with pytest.raises(KeyError, match="a callback's own"):
        scheduler(done, "--seed", "3", callbacks=[Fails(event)]).run(overwrite_output_dir=True)
    assert contents(done) == before
    assert sorted(path.name for path in done.iterdir()) == [*OF_A_RUN, "task-01", "task-02"]


@pytest.mark.parametrize("more", [("--report_to", "wandb"), ("--per_device_train_batch_size", "0")])
def test_arguments_that_fail_as_training_begins_cost_nothing(more, done):
    before = contents(done)
    with pytest.raises((RuntimeError, ValueError, ImportError)):
        scheduler(done, "--seed", "3", *more).run(overwrite_output_dir=True)
    assert contents(done) == before


def test_a_run_that_fails_before_its_first_step_leaves_no_folder(tmp_path):
    with pytest.raises(KeyError):
        scheduler(tmp_path / "run", callbacks=[Fails("on_train_begin")]).run()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("how", [{}, {"resume": True}], ids=["new", "resume"])
def test_a_run_that_is_cut_off_before_its_first_results_can_be_given_again(how, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write", lambda *_: sys.exit("cut off"))
        with pytest.raises(SystemExit, match="cut off"):
            scheduler(tmp_path).run()
    assert list(contents(tmp_path)) == ["predictions.safetensors"]
    scheduler(tmp_path).run(**how)
    assert (tmp_path / "task-02").is_dir()


def test_a_folder_in_use_is_refused_also_with_resume_and_overwrite(done):
    before = contents(done)
    with FolderLock(done):
        for how in ({"resume": True}, {"overwrite_output_dir": True}):
            with pytest.raises(FolderInUseError, match="is in use by another run"):
                scheduler(done).run(**how)
    assert contents(done) == before


def test_the_folder_is_locked_from_the_first_measurement_to_the_end(tmp_path):
    seen = []

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            with pytest.raises(FolderInUseError):
                FolderLock(tmp_path).__enter__()
            seen.append(args.output_dir)

    scheduler(tmp_path, callbacks=[Look()]).run()
    assert len(seen) == 2
    with FolderLock(tmp_path):
        pass


def test_lost_results_come_back_from_the_last_tasks_copy(done, caplog):
    logging.getLogger("hf_zocl").propagate = True
    before = contents(done)
    (done / "results.json").unlink()
    scheduler(done).run(resume=True)
    assert contents(done) == before
    assert f"{done / 'task-02' / 'results.json'} is used instead" in caplog.text


def spoil(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_damaged_last_task_is_refused_with_the_way_back_which_is_one(done):
    whole = contents(done)
    spoil(done / "task-02" / "adapter_model.safetensors")
    before = contents(done)
    way_back = done / "task-01"
    with pytest.raises(
        ResumeError, match=rf"task-02/adapter.*damaged.*--resume_from_checkpoint {way_back} goes on after task 1"
    ):
        scheduler(done).run(resume=True)
    assert contents(done) == before
    scheduler(done).run(resume=recipe(done, "--resume_from_checkpoint", str(way_back)).resume)
    assert contents(done)["task-02/adapter_model.safetensors"] == whole["task-02/adapter_model.safetensors"]
    spoil(done / "task-02" / "adapter_model.safetensors")
    spoil(way_back / "adapter_model.safetensors")
    with pytest.raises(ResumeError, match="--overwrite_output_dir starts again"):
        scheduler(done).run(resume=True)


def test_a_way_back_that_is_refused_takes_nothing_back(done, monkeypatch):
    monkeypatch.setattr("hf_zocl.continual.scheduler.stream_digest", lambda stream: "another")
    (done / "task-02" / "checkpoint-1").mkdir()
    (done / "task-02" / "checkpoint-1" / "trainer_state.json").write_text("{}")
    before = contents(done)
    with pytest.raises(ResumeError, match="the images have changed"):
        scheduler(done).run(resume=recipe(done, "--resume_from_checkpoint", str(done / "task-01")).resume)
    assert contents(done) == before


def test_a_damaged_earlier_task_is_named_and_the_run_goes_on(done, caplog):
    logging.getLogger("hf_zocl").propagate = True
    (done / "task-01" / "adapter_model.safetensors").unlink()
    before = contents(done)
    scheduler(done).run(resume=True)
    assert f"{done / 'task-01' / 'adapter_model.safetensors'} is missing" in caplog.text
    assert contents(done) == before


@pytest.mark.parametrize("name", ["images", "base_model", "adapter"])
def test_a_run_does_not_go_on_with_another_base_or_other_images(name, done):
    changed = results(done)
    assert set(changed["fingerprints"]) == {"images", "base_model", "adapter"}
    changed["fingerprints"][name] = "another"
    (done / "results.json").write_text(json.dumps(changed))
    with pytest.raises(ResumeError, match=f"the {name.replace('_', ' ')} ha.* changed since the run"):
        scheduler(done).run(resume=True)


def pets(seed: int) -> TaskStream:
    rng = np.random.default_rng(seed)
    rows = {"image": [PILImage.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(4)]}
    features = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog"])})
    data = Dataset.from_dict({**rows, "label": [0, 1, 0, 1]}, features)
    return TaskStream.from_dataset(DatasetDict(train=data, test=data), increment="all", allow_shared_images=True)


def test_a_run_does_not_go_on_with_other_held_out_images(tmp_path):
    first, same, other = (scheduler(tmp_path) for _ in range(3))
    first.held_out, same.held_out, other.held_out = ({"pets": pets(seed)} for seed in (0, 0, 1))
    found = first.run()
    assert same.run(resume=True)["held_out"] == found["held_out"]
    with pytest.raises(ResumeError, match="the held out pets has changed since the run"):
        other.run(resume=True)
