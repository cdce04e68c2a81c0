"""A run that is stopped anywhere and resumed ends as one that never stopped, bit for bit."""

import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_zocl.commands.recipe import build_scheduler, parse_recipe
from hf_zocl.continual import scheduler as scheduler_module
from hf_zocl.continual.replay import rebuild_task
from hf_zocl.continual.run_folder import ResumeError
from hf_zocl.trainer.resumable import SaveError, last_checkpoint
from tests.helpers import slow_but_for, small_clip


pytestmark = pytest.mark.usefixtures("quick_pictures")
ROOT = Path(__file__).resolve().parents[2]
STEPS = 5
RUN = f"""
--class_order 3 8 0 1 --partial_order true --increment 2
--max_train_images_per_class 24 --max_test_images_per_class 4
--per_device_train_batch_size 4 --max_steps {STEPS} --learning_rate 1e-2 --zo_learning_rate 1e-2 --zo_sign true
--report_to none --disable_tqdm true --logging_steps 3 --save_strategy steps --save_steps 2 --save_total_limit 2
"""
HYBRID = "--zo_layers hop-even --lora_dropout 0.2 --zo_optim sign --zo_momentum 0.9"
ALL_ZO = "--zo_layers all --zo_optim adamw --zo_queries vision=1,language=3"
MOE = """--adapter moe --zo_layers hop-odd --moe_num_experts 3 --moe_top_k 1 --adapter_config {"freeze_experts":1}
--moe_router_per_task true"""
ACCUMULATED = """--zo_layers all --gradient_accumulation_steps 2 --zo_estimator two-sided --zo_sign false
--zo_max_grad_norm 1 --zo_weight_decay 0.1"""
ALIGNED = f"{HYBRID} --classifier_alignment 3"
# Its optimizer's state is larger than any other file of a run.
LARGE = f"{HYBRID} --lora_rank 64"
# Where each is stopped, in the middle of a step: step 5, when steps 2 and 4 were saved, or earlier.
STOPS = {
    HYBRID: ("task-02", 5),
    ALIGNED: ("task-02", 5),
    LARGE: ("task-02", 5),
    ALL_ZO: ("task-02", 5),
    MOE: ("task-02", 5),
    ACCUMULATED: ("task-01", 4),
}


class Crash(Exception):
    pass


class Stop(TrainerCallback):
    def __init__(self, task: str, step: int):
        self.task, self.step = task, step

    def on_optimizer_step(self, args, state, control, **kwargs):
        if args.output_dir.endswith(self.task) and state.global_step + 1 == self.step:
            raise Crash


class Count(TrainerCallback):
    steps = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1


def command(output_dir: Path, kind: str, *arguments: str) -> list[str]:
    model = ("--model_name_or_path", small_clip())
    return ["--output_dir", str(output_dir), *model, *RUN.split(), *kind.split(), *arguments]


def recipe(output_dir: Path, kind: str, *arguments: str):
    return parse_recipe(command(output_dir, kind, *arguments))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of a run that nothing stops; one of each kind."""
    folders = {}

    def run(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp("undisturbed")
            build_scheduler(recipe(folders[kind], kind)).run()
        return folders[kind]

    return run


@pytest.fixture(scope="module")
def _stopped(tmp_path_factory):
    folders = {}

    def run(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp("stopped")
            scheduler = build_scheduler(recipe(folders[kind], kind))
            scheduler.callbacks.append(Stop(*STOPS[kind]))
            with pytest.raises(Crash):
                scheduler.run()
        return folders[kind]

    return run


@pytest.fixture
def stopped(_stopped, tmp_path):
    """A run that was stopped, in a folder of the test's own."""
    return lambda kind: Path(shutil.copytree(_stopped(kind), tmp_path / "run"))


def resume(folder: Path, kind: str, how: bool | str = True) -> int:
    """Go on, and return how many steps were taken."""
    scheduler = build_scheduler(recipe(folder, kind))
    scheduler.callbacks.append(count := Count())
    scheduler._start = None  # what was measured before training is known
    scheduler.run(resume=how)
    return count.steps


def outcome(folder: Path) -> dict:
    results = json.loads((folder / "results.json").read_text())
    return {name: results[name] for name in results if name not in ("seconds", "peak_memory_bytes", "recipe")}


def weights(folder: Path, task: int = 2) -> dict[str, torch.Tensor]:
    return load_file(folder / f"task-{task:02d}" / "adapter_model.safetensors")


def assert_same_run(first: Path, second: Path) -> None:
    assert outcome(first) == outcome(second)
    mine, theirs = weights(first), weights(second)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    assert sorted(path.name for path in first.iterdir()) == sorted(path.name for path in second.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "steps"),
    [(HYBRID, 1), (ALL_ZO, 1), (MOE, 1), (ACCUMULATED, STEPS + 3)],
    ids=["hop-even with dropout", "all zeroth-order, adamw", "moe", "accumulation, in the first task"],
)
def test_a_run_that_stopped_within_a_task_goes_on_at_the_saved_step_to_the_same_end(kind, steps, undisturbed, stopped):
    folder = stopped(kind)
    assert resume(folder, kind) == steps
    assert_same_run(undisturbed(kind), folder)


@pytest.mark.parametrize("loses_its_place", [False, True], ids=["within a task", "after a task"])
def test_an_aligned_run_goes_on_with_the_statistics_of_the_classes_before(loses_its_place, undisturbed, stopped):
    folder = stopped(ALIGNED)
    if loses_its_place:
        shutil.rmtree(folder / "trainer")
    assert resume(folder, ALIGNED) == (STEPS if loses_its_place else 1)
    assert_same_run(undisturbed(ALIGNED), folder)
    mine, theirs = (load_file(run / "task-02" / "plugins.safetensors") for run in (undisturbed(ALIGNED), folder))
    assert len(mine["ClassifierAlignment.means"]) == 4
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_an_aligned_run_goes_on_with_the_same_alignment_or_not_at_all(stopped):
    with pytest.raises(ResumeError, match=r"recipe \(classifier_alignment: 3 there, 4 here\)"):
        resume(stopped(ALIGNED), f"{HYBRID} --classifier_alignment 4")


def test_saving_within_tasks_changes_nothing_and_leaves_nothing(undisturbed, tmp_path):
    build_scheduler(recipe(tmp_path, HYBRID, "--save_strategy", "no")).run()
    assert_same_run(undisturbed(HYBRID), tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    expected = ["accuracy_matrix.png", "gallery.json", "predictions.safetensors", "results.json", "task-01", "task-02"]
    assert names == expected


def test_without_a_checkpoint_the_task_begins_again(undisturbed, stopped):
    folder = stopped(HYBRID)
    shutil.rmtree(folder / "trainer")
    assert resume(folder, HYBRID) == STEPS
    assert_same_run(undisturbed(HYBRID), folder)


@pytest.mark.parametrize(
    "moment",
    slow_but_for(["before the results"], ["after training", "before the results", "before the cleaning"]),
)
def test_a_run_that_stopped_while_a_task_was_finished_goes_on(moment, undisturbed, stopped, monkeypatch):
    folder = stopped(MOE)
    scheduler = build_scheduler(recipe(folder, MOE))
    owner, name = {
        "after training": (scheduler, "_evaluate"),
        "before the results": (scheduler.folder, "write"),
        "before the cleaning": (scheduler.folder, "remove_checkpoints"),
    }[moment]
    original = getattr(owner, name)

    def crash(*arguments):
        if arguments == ("task-01",):  # cleaned anew as a run goes on
            return original(*arguments)
        raise Crash

    monkeypatch.setattr(owner, name, crash)
    with pytest.raises(Crash):
        scheduler.run(resume=True)
    assert resume(folder, MOE) == 0
    assert_same_run(undisturbed(MOE), folder)


def test_a_half_checkpoint_is_passed_over_for_the_one_before(undisturbed, stopped):
    folder = stopped(HYBRID)
    checkpoints = folder / "trainer" / "task-02"
    assert last_checkpoint(checkpoints).name == "checkpoint-4"
    state = checkpoints / "checkpoint-4" / "trainer_state.json"
    state.write_text(state.read_text().strip()[:-1])
    (checkpoints / "checkpoint-4" / "optimizer.pt").write_bytes(b"")
    assert last_checkpoint(checkpoints).name == "checkpoint-2"
    assert resume(folder, HYBRID) == STEPS - 2
    assert_same_run(undisturbed(HYBRID), folder)


def test_a_checkpoint_within_a_task_holds_what_is_trained_alone(stopped):
    folder = stopped(HYBRID)
    saved = load_file(folder / "trainer" / "task-02" / "checkpoint-4" / "model.safetensors")
    assert {name.split(".")[-3] for name in saved} == {"lora_A", "lora_B"}
    assert len(saved) == len(weights(folder, 1))


def test_a_chosen_checkpoint_is_gone_on_from(undisturbed, stopped):
    folder = stopped(HYBRID)
    chosen = str(folder / "trainer" / "task-02" / "checkpoint-2")
    given = recipe(folder, HYBRID, "--resume_from_checkpoint", chosen).resume
    assert given == chosen
    assert resume(folder, HYBRID, given) == STEPS - 2
    assert_same_run(undisturbed(HYBRID), folder)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), False),
        (("--resume",), True),
        (("--resume_from_checkpoint", "True"), True),
        (("--resume_from_checkpoint", "false", "--resume"), False),
    ],
)
def test_resume_from_checkpoint_is_resume_by_the_trainers_name(arguments, expected, tmp_path):
    assert recipe(tmp_path, "", *arguments).resume is expected


def test_a_checkpoint_of_elsewhere_is_refused(stopped, tmp_path):
    folder = stopped(HYBRID)
    with pytest.raises(ResumeError, match="expected true, the run's folder .* checkpoint of the task in progress"):
        resume(folder, HYBRID, str(tmp_path / "checkpoint-2"))
    with pytest.raises(ResumeError, match="there is no run in"):
        resume(tmp_path / "other", HYBRID, str(folder / "trainer" / "task-02" / "checkpoint-2"))


def test_how_often_is_saved_is_not_the_run_and_everything_else_is(stopped):
    with pytest.raises(ResumeError, match=r"recipe \(zo_eps: 'auto' there, 0.5 here\)"):
        resume(stopped(HYBRID), f"{HYBRID} --zo_eps 0.5 --save_steps 3")


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def as_pickle(file: Path) -> None:
    torch.save(load_file(file), file.with_name("adapter_model.bin"))
    file.unlink()


DAMAGES = {
    "flipped": (flip, "task-01/adapter_model.safetensors is damaged"),
    "a pickle": (as_pickle, "task-01/adapter_model.safetensors is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_not_gone_on_from(damage, stopped):
    folder = stopped(HYBRID)
    spoil, message = DAMAGES[damage]
    spoil(folder / "task-01" / "adapter_model.safetensors")
    with pytest.raises(ResumeError, match=message):
        resume(folder, HYBRID)


def test_another_tasks_checkpoint_is_not_gone_on_from(undisturbed, stopped):
    folder = stopped(HYBRID)
    shutil.rmtree(folder / "task-01")
    shutil.copytree(undisturbed(HYBRID) / "task-02", folder / "task-01")
    with pytest.raises(ResumeError, match=r"task-01/task\.json does not belong here: it is of task 2"):
        resume(folder, HYBRID)


def test_a_scheduler_that_is_run_again_begins_with_the_untrained_adapter(undisturbed, tmp_path):
    """In a notebook: stopped within the first task and gone on with, then begun anew, by one scheduler."""
    built = build_scheduler(recipe(tmp_path, ACCUMULATED, "--save_strategy", "no"))
    stop = Stop("task-01", 4)
    built.callbacks.append(stop)
    with pytest.raises(Crash):
        built.run()
    built.callbacks.remove(stop)
    for how in ({"resume": True}, {"overwrite_output_dir": True}):
        built.run(**how)
        assert_same_run(undisturbed(ACCUMULATED), tmp_path)


CHANGES = {
    "prompt_template": lambda built: setattr(built.model, "prompt_template", "a sketch of a {}."),
    "held_out": lambda built: built.held_out.update(other=built.stream),
    "evaluate_future": lambda built: setattr(built, "evaluate_future", True),
    "known_classes": lambda built: setattr(built, "known_classes", ("tram",)),
    "the adapter has changed": lambda built: setattr(built.model.clip.peft_config["default"], "lora_alpha", 99),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_run_in_python_goes_on_as_it_began_or_not_at_all(name, stopped):
    """A recipe would say what differs; a run in Python has none."""
    folder = stopped(HYBRID)
    before = outcome(folder)
    built = build_scheduler(recipe(folder, HYBRID))
    CHANGES[name](built)
    with pytest.raises(ResumeError, match=f"resume: {name}.*can only go on with what it began with"):
        built.run(resume=True)
    assert outcome(folder) == before


def test_a_run_that_cannot_be_fetched_does_not_begin_anew(tmp_path):
    pushed = ("--push_to_hub", "true", "--hub_model_id", "tester/run")
    with pytest.raises(ResumeError, match=r"tester/run: the run cannot be fetched .* Without --resume"):
        build_scheduler(recipe(tmp_path, HYBRID, *pushed)).run(resume=True)  # the Hub is switched off for the tests
    assert not list(tmp_path.iterdir())


def test_what_was_being_pushed_when_the_run_was_killed_is_removed(stopped):
    folder = stopped(HYBRID)
    scratch = folder / "trainer" / "task-01" / ".push-checkpoint-2"
    scratch.mkdir(parents=True)
    resume(folder, HYBRID)
    assert not scratch.exists()


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_damaged_results_are_named(content, stopped):
    folder = stopped(HYBRID)
    (folder / "results.json").write_text(content)
    with pytest.raises(ResumeError, match=r"results\.json is damaged"):
        resume(folder, HYBRID)


@pytest.mark.parametrize("task", [1, 2])
@pytest.mark.parametrize("kind", [ALL_ZO, ACCUMULATED], ids=["adamw", "sgd, accumulated, clipped"])
def test_the_log_of_zeroth_order_steps_makes_the_adapter_again(kind, task, undisturbed):
    rebuilt = rebuild_task(undisturbed(kind), task)
    assert (rebuilt.different, rebuilt.steps) == ((), STEPS)
    assert rebuilt.log_bytes < 1200 < rebuilt.checkpoint_bytes / 20


def test_the_log_survives_a_stop_within_the_task(stopped):
    folder = stopped(ALL_ZO)
    resume(folder, ALL_ZO)
    rebuilt = rebuild_task(folder, 2)
    assert (rebuilt.different, rebuilt.steps) == ((), STEPS)


def test_the_replay_command_says_how_many_bytes_that_was(undisturbed, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["replay.py", str(undisturbed(ALL_ZO)), "--task", "2"])
    runpy.run_path(str(ROOT / "scripts" / "replay.py"), run_name="__main__")
    assert re.search(r"5 steps in [\d,]+ bytes .* weights are [\d,]+ bytes", output := capsys.readouterr().out)
    assert "bit for bit" in output


def test_a_run_without_a_log_says_which_runs_have_one(undisturbed):
    with pytest.raises(ValueError, match=r"task-01\.safetensors.*zo_layers=all"):
        rebuild_task(undisturbed(HYBRID), 1)


@pytest.mark.parametrize(
    ("module", "name", "what"),
    [
        (scheduler_module, "save_task_checkpoint", "task-02"),
        pytest.param(scheduler_module, "plot_accuracy_matrix", "task-02", marks=pytest.mark.slow),
        pytest.param(torch, "save", "checkpoint-5", marks=pytest.mark.slow),
    ],
)
def test_a_disk_that_fills_stops_the_run_with_advice_and_loses_nothing(
    module, name, what, undisturbed, stopped, monkeypatch
):
    folder = stopped(HYBRID)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(SaveError, match=what) as raised:
        patch.setattr(module, name, full)
        build_scheduler(recipe(folder, HYBRID)).run(resume=True)
    assert "No space left on device" in str(raised.value)
    assert "make room, then go on with --resume" in str(raised.value)
    resume(folder, HYBRID)
    assert_same_run(undisturbed(HYBRID), folder)


LIMITED = """
import resource, runpy, sys
size = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_a_command_whose_files_may_not_grow_ends_with_one_line(undisturbed, stopped):
    """The operating system's own refusal, in the middle of a file."""
    folder = stopped(LARGE)
    whole = (folder / "trainer" / "task-02" / "checkpoint-4" / "optimizer.pt").stat().st_size
    arguments = command(folder, LARGE, "--resume")
    # The processor is written before, and is not as large.
    train = [sys.executable, "-c", LIMITED, str(whole * 9 // 10), str(ROOT / "scripts" / "train.py"), *arguments]
    done = subprocess.run(train, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "checkpoint-5 could not be saved" in last
    assert "make room, then go on with --resume" in last
    assert not (folder / "trainer" / "task-02" / "checkpoint-5").exists()
    resume(folder, LARGE)
    assert_same_run(undisturbed(LARGE), folder)


@pytest.mark.slow
def test_runs_that_are_killed_end_as_the_undisturbed_one(tmp_path):
    command = [sys.executable, "scripts/benchmarks/chaos.py", "--runs", "3", "--output_dir", str(tmp_path / "chaos")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 of 3 runs" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "ended"),
    [("pairs", "3 of 3 pairs: one ran"), ("damage", "3 of 3 runs ended as the undisturbed run, or said")],
)
def test_pairs_of_runs_and_damaged_files_end_as_they_must(what, ended, tmp_path):
    command = [
        sys.executable,
        "scripts/benchmarks/chaos.py",
        "--what",
        what,
        "--runs",
        "3",
        "--output_dir",
        str(tmp_path / "chaos"),
    ]
    command += ["--max_steps", "3", "--save_steps", "1", "--max_train_images_per_class", "8"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ended in done.stdout


def test_the_peak_memory_is_that_of_the_processes_before_too(tmp_path, monkeypatch):
    peak = [1]

    class Grow(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            peak[0] = 10**15

    monkeypatch.setattr(scheduler_module, "peak_memory_bytes", lambda: peak[0])
    stopped = build_scheduler(recipe(tmp_path, HYBRID))
    stopped.callbacks += [Grow(), Stop("task-01", 4)]
    with pytest.raises(Crash):
        stopped.run()
    peak[0] = 2
    assert build_scheduler(recipe(tmp_path, HYBRID)).run(resume=True)["peak_memory_bytes"] == 10**15
