"""What a run shows while it trains, and what `report_to` is told of it."""

import logging
import re
import sys
import types
from types import SimpleNamespace

import pytest
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from hf_zocl.commands.recipe import build_scheduler, parse_recipe
from hf_zocl.continual import displays, progress, stream_report
from hf_zocl.continual.displays import NotebookDisplay, aligned, table_rows
from hf_zocl.continual.progress import one_line, without_own_display
from hf_zocl.continual.stream_steps import StreamSteps
from tests.helpers import arguments, mini_clip_classifier, small_clip


pytestmark = pytest.mark.usefixtures("quick_pictures")
RUN = """
--class_order 3 8 0 1 --partial_order true --increment 2 --max_train_images_per_class 10 --max_test_images_per_class 4
--per_device_train_batch_size 4 --num_train_epochs 2 --zo_branch none --report_to none --logging_steps 2
--save_strategy steps --save_steps 3
"""
STEPS = 10  # of each of the two tasks: two epochs of 20 images in batches of 4
BOTH = 2 * STEPS


class Crash(Exception):
    pass


class StopAt(TrainerCallback):
    def __init__(self, task: str, step: int):
        self.task, self.step = task, step

    def on_step_end(self, args, state, control, **kwargs):
        if args.output_dir.endswith(self.task) and state.global_step == self.step:
            raise Crash


def scheduler(folder, *more: str, callbacks=()):
    words = ["--output_dir", str(folder), "--model_name_or_path", small_clip(), *RUN.split(), *more]
    made = build_scheduler(parse_recipe(words))
    made.callbacks += callbacks
    return made


def counts(text: str, unit: str = "steps") -> list[tuple[int, int]]:
    return [(int(a), int(b)) for a, b in re.findall(rf"(\d+)/(\d+) {unit}", text)]


def epoch_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if "epoch" in line]


def test_a_bar_for_the_stream_stands_above_that_of_the_task(tmp_path, capfd):
    scheduler(tmp_path / "run").run()
    out, err = capfd.readouterr()
    assert {total for _, total in counts(err)} == {STEPS, BOTH}
    assert counts(err, "batches")  # of an evaluation
    assert "task 1 of 2" in err and "task 2 of 2" in err and "task-02: " in err
    assert (BOTH, BOTH) in counts(err) and re.search(r"\d\d:\d\d left", err)
    assert "{" not in out + err  # no dictionary of logs
    lines = epoch_lines(out)
    assert [line.split(":")[0] for line in lines] == [f"Task {t} of 2, epoch {e} of 2" for t in (1, 2) for e in (1, 2)]
    assert all(re.fullmatch(r"Task .*: loss \d\S*, 5 steps in \d+\.\d s", line) for line in lines)


def test_the_table_grows_row_by_row_and_stays_aligned(tmp_path, capfd):
    results = scheduler(tmp_path / "run", "--disable_tqdm", "true").run()
    out, err = capfd.readouterr()
    assert not counts(err) and not counts(err, "batches")
    head, first, second = [line for line in out.splitlines() if line.startswith(("accuracy", "after"))]
    assert head.split()[2:] == "zero-shot all seen task 1 task 2".split()
    assert out.index(first) < out.index("Task 2 of 2") < out.index(second)
    assert [f"{100 * value:.1f}" for value in results["accuracy_matrix"][1]] == second.split()[-2:]
    assert len(second) == len(head) and head.index("task 1") + len("task 1") == len(first)
    assert len(epoch_lines(out)) == 4


def test_a_resumed_run_begins_at_what_was_done(tmp_path, capfd):
    with pytest.raises(Crash):
        scheduler(tmp_path / "run", callbacks=[StopAt("task-02", 8)]).run()
    capfd.readouterr()
    scheduler(tmp_path / "run").run(resume=True)
    out, err = capfd.readouterr()
    seen = counts(err)
    assert next(count for count in seen if count[1] == BOTH) == (STEPS, BOTH)  # once the task is loaded: step 6 of it
    assert next(count for count in seen if count[1] == STEPS) == (6, STEPS)
    assert "after task 1" in out and [line.split(":")[0] for line in epoch_lines(out)] == ["Task 2 of 2, epoch 2 of 2"]


@pytest.mark.parametrize("in_notebook", [False, True])
def test_the_time_left_follows_from_the_steps_of_this_process_alone(in_notebook, monkeypatch, notebook):
    """One step in two seconds, after eight that another process took, and six that a callback has left out."""
    now = [100.0]
    monkeypatch.setattr(displays.time, "perf_counter", lambda: now[0])
    display = NotebookDisplay() if in_notebook else displays.BarDisplay()

    def left() -> str:
        if in_notebook:
            return notebook[-1]
        display._stream._time = lambda: display._stream.start_t + now[0] - 100
        return str(display._stream)

    display.begin(0, 30, 2)
    display.begin_task(1, "task-01", 8, 15)
    display.step(8, 30, 8)
    now[0] += 2
    display.step(9, 30, 9)
    assert "9/30 steps" in left() and "00:42 left" in left()
    display.end_task(15)
    display.begin_task(2, "task-02", 0, 15)
    now[0] += 2
    display.step(16, 30, 1)
    assert "16/30 steps" in left() and "00:28 left" in left()
    display.close()


def test_what_is_logged_goes_above_the_bars(tmp_path, capfd):
    class Speaks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            logging.getLogger("somebody").warning(f"said at {state.global_step}")

    scheduler(tmp_path / "run", callbacks=[Speaks()]).run()
    _, err = capfd.readouterr()
    assert re.search(r"[\r\n]said at 3\n", err.replace("\x1b[A", ""))
    assert not any(type(handler).__name__ == "_TqdmLoggingHandler" for handler in logging.getLogger().handlers)


def test_only_the_main_process_draws(tmp_path):
    assert progress.make_display(SimpleNamespace(process_index=1, disable_tqdm=False)) is None


class FakeHandle:
    def __init__(self, seen: list[str]):
        self.seen = seen

    def update(self, content):
        self.seen.append(content)


@pytest.fixture
def notebook(monkeypatch):
    """What a notebook's output was, one entry a drawing; the first entry is of the one `display`."""
    seen: list[str] = []
    module = types.ModuleType("IPython.display")

    def display(content, display_id):
        assert display_id and not seen
        seen.append(content)
        return FakeHandle(seen)

    module.HTML, module.display = str, display
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    monkeypatch.setattr(progress, "is_in_notebook", lambda: True)
    monkeypatch.setattr(NotebookDisplay, "every", 0.0)
    return seen


def test_in_a_notebook_the_same_is_one_output_of_html(tmp_path, capfd, notebook):
    results = scheduler(tmp_path / "run").run()
    out, err = capfd.readouterr()
    assert "steps" not in out + err
    assert any(f'<progress value="13" max="{BOTH}"' in drawn and 'value="3" max="10"' in drawn for drawn in notebook)
    assert any("task 2 of 2" in drawn and " left" in drawn for drawn in notebook)
    assert "epoch 2 of 2: loss" in notebook[-1]
    assert notebook[-1].count("<tr>") == 3 and f"{100 * results['seen_accuracy'][-1]:.1f}</td>" in notebook[-1]


def test_class_names_stay_text_in_html_and_on_one_line_in_a_bar(notebook):
    display = NotebookDisplay()
    display.begin(0, 4, 1)
    display.begin_task(1, "task-01: <script>alert(1)</script>", 0, 4)
    assert "<script>" not in notebook[-1] and "&lt;script&gt;" in notebook[-1]
    assert one_line("a\nb\x1b[31m\tc") == "a b [31m c"
    assert len(one_line("x" * 100)) == progress.LONGEST_TITLE


@pytest.mark.parametrize(
    "options",
    [
        {"num_train_epochs": 2.5},
        {"max_steps": 7},
        {"gradient_accumulation_steps": 3, "num_train_epochs": 2},
        {"dataloader_drop_last": True, "per_device_train_batch_size": 3},
        {"gradient_accumulation_steps": 50},
    ],
)
def test_the_plan_is_what_the_trainer_takes(options, tmp_path):
    args = arguments(tmp_path, **{"max_steps": -1, **options})
    trainer = Trainer(mini_clip_classifier(), args, train_dataset=[{"x": 0}] * 20, data_collator=lambda rows: {})
    batches = len(trainer.get_train_dataloader())
    updates = max(-(-batches // args.gradient_accumulation_steps), 1)
    expected = args.max_steps if args.max_steps > 0 else -(-int(100 * args.num_train_epochs * updates) // 100)
    steps = StreamSteps.planned(args, [20, 8])
    assert steps.of_task[0] == expected and steps.before(2) == expected and steps.total == sum(steps.of_task)


def test_other_callbacks_and_other_trainers_keep_their_bars(tmp_path):
    args = arguments(tmp_path, disable_tqdm=False)
    own = ProgressCallback()
    trainer = Trainer(mini_clip_classifier(), args, callbacks=[own])
    assert [type(each) for each in trainer.callback_handler.callbacks].count(ProgressCallback) == 2
    without_own_display(trainer, [own])
    assert [each for each in trainer.callback_handler.callbacks if isinstance(each, ProgressCallback)] == [own]
    printing = Trainer(mini_clip_classifier(), arguments(tmp_path))
    assert any(isinstance(each, PrinterCallback) for each in printing.callback_handler.callbacks)


def test_rows_that_were_written_stay_right_with_many_tasks():
    matrix = [[0.5] * n for n in range(1, 13)]
    results = {"accuracy_matrix": matrix, "seen_accuracy": [1.0] * 12, "tasks": ["a"] * 12}
    results["zero_shot"] = {"seen_accuracy": [0.25] * 12}
    whole = aligned(table_rows(results), 12)
    for done in range(1, 12):
        assert aligned(table_rows({**results, "accuracy_matrix": matrix[:done]}), 12) == whole[: done + 1]
    assert whole[-1].endswith("50.0") and len(whole[-1]) == len(whole[0])


# What `report_to` is told.


class Tracker(TrainerCallback):
    """Counts runs as the integrations open and close them."""

    def __init__(self):
        self.events: list[tuple] = []

    def on_init_end(self, args, state, control, **kwargs):
        self.events.append(("init", args.output_dir))

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        assert model is not None
        self.events.append(("begin", args.run_name, state.max_steps))

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.events.append(("log", state.global_step, logs))

    def on_save(self, args, state, control, **kwargs):
        self.events.append(("save", args.output_dir.rsplit("/", 1)[1], state.global_step))

    def on_train_end(self, args, state, control, **kwargs):
        self.events.append(("end", state.global_step))

    def of(self, kind: str) -> list[tuple]:
        return [event[1:] for event in self.events if event[0] == kind]


@pytest.fixture
def tracker(monkeypatch):
    tracker = Tracker()
    monkeypatch.setattr(stream_report, "get_reporting_integration_callbacks", lambda names: [lambda: tracker])
    return tracker


def test_a_tracker_gets_one_run_whose_steps_go_on(tracker, tmp_path):
    results = scheduler(tmp_path / "run", "--disable_tqdm", "true").run()
    assert tracker.of("init") == [(str(tmp_path / "run"),)]
    assert tracker.of("begin") == [("cifar10-sample-run", BOTH)]
    assert tracker.of("end") == [(BOTH,)]
    losses = [(step, logs["task"]) for step, logs in tracker.of("log") if "loss" in logs]
    assert losses == [(step, 1 + (step > STEPS)) for step in range(2, BOTH + 1, 2)]
    steps = [step for step, _ in tracker.of("log")]
    assert steps == sorted(steps)
    measured = [(step, logs) for step, logs in tracker.of("log") if "eval_seen_accuracy" in logs]
    assert [(step, logs["task"]) for step, logs in measured] == [(STEPS, 1), (BOTH, 2)]
    assert [logs["eval_seen_accuracy"] for _, logs in measured] == results["seen_accuracy"]
    of_tasks = [measured[1][1][f"eval_accuracy_task_{task:02d}"] for task in (1, 2)]
    assert of_tasks == results["accuracy_matrix"][1] and "eval_accuracy_task_02" not in measured[0][1]
    assert ("task-02", 9) in tracker.of("save")  # its own numbers, by which its folders are called


def test_a_resumed_run_reports_its_steps_under_the_same_numbers(tracker, tmp_path):
    with pytest.raises(Crash):
        scheduler(tmp_path / "run", callbacks=[StopAt("task-02", 8)]).run()
    assert tracker.of("end") == []  # it has failed
    tracker.events.clear()
    scheduler(tmp_path / "run").run(resume=True)
    assert [step for step, logs in tracker.of("log") if "loss" in logs] == [18, 20]
    assert tracker.of("begin") == [("cifar10-sample-run", BOTH)] and tracker.of("end") == [(BOTH,)]


def test_a_run_that_wandb_was_given_is_finished_with_the_stream(tracker, tmp_path, monkeypatch):
    finished = []
    wandb = types.ModuleType("wandb")
    wandb.run = None
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    opened = SimpleNamespace(finish=lambda: finished.append(True))
    monkeypatch.setattr(Tracker, "on_train_begin", lambda *args, **kwargs: setattr(wandb, "run", opened))
    scheduler(tmp_path / "run", "--max_steps", "1").run()
    assert finished == [True]
    scheduler(tmp_path / "other", "--max_steps", "1").run()  # one that the caller has open stays so
    assert finished == [True]


def test_tensorboard_gets_one_folder_of_logs_also_for_a_resumed_run(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with pytest.raises(Crash):
        scheduler(tmp_path / "run", "--report_to", "tensorboard", callbacks=[StopAt("task-02", 8)]).run()
    scheduler(tmp_path / "run", "--report_to", "tensorboard").run(resume=True)
    (logs,) = (tmp_path / "run" / "runs").iterdir()
    assert not list((tmp_path / "run").glob("trainer/**/events.*"))
    read = accumulator.EventAccumulator(str(logs))
    read.Reload()
    assert [event.step for event in read.Scalars("eval/seen_accuracy")] == [STEPS, BOTH]
    losses = {event.step for event in read.Scalars("train/loss")}
    assert losses == set(range(2, BOTH + 1, 2))
