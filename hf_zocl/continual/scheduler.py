"""`ContinualTaskScheduler`: train, evaluate, checkpoint, task by task."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from transformers import ProcessorMixin, TrainerCallback
from transformers.utils import logging

from ..checks import check_type
from ..data.fingerprint import stream_digest
from ..data.images import DEFAULT_CACHE_GB, PixelCodec, prepare_images
from ..data.stream import TaskStream
from ..data.tasks import Task
from ..hub.checkpoint import FIGURE, complete_tasks, save_task_checkpoint
from ..hub.load import check_adapter_reloads, read_adapter_weights
from ..hub.push import HubPusher, PushOnSave
from ..hub.repository import fetch_run
from ..hub.task_info import task_folder
from ..hub.untrusted import check_processor
from ..models import (
    CLIPClassifier,
    adapter_digest,
    adapter_weights,
    base_digest,
    check_templates,
    check_trained_parameters,
    trained_adapter,
)
from ..passes import task_aware
from ..report import plot_accuracy_matrix
from ..trainer import ZOCLTrainer
from ..trainer.arguments import ZOCLTrainingArguments
from ..trainer.replay_file import save_replay_log
from ..trainer.resumable import saving
from .evaluation import StreamEvaluator
from .folder_lock import FolderLock
from .measures import peak_memory_bytes, reset_peak_memory, versions
from .metrics import forward_transfer, mtil_summary, summarise, zero_shot_retention
from .plugins import load_plugins, plugin_file, plugin_names, task_plugins
from .processes import by_main_process
from .report_files import ReportFiles
from .run_checks import check_batches, check_fingerprints, check_measurable, check_measuring
from .run_folder import RESULTS_FILE, ResumeError, RunFolder
from .run_monitor import RunMonitor
from .task_record import task_info
from .task_training import TaskTraining, Trained


logger = logging.get_logger(__name__)


class ContinualTaskScheduler:
    """Runs a stream of tasks: each is trained on its own classes and evaluated on all classes seen.

    A task with a single class is trained among all classes seen, because a loss over one class is zero.

    Args:
        model: The classifier; its CLIP is wrapped by PEFT, and parameters that require a gradient are trained.
        processor: The CLIP model's processor.
        stream: The tasks.
        args: The training arguments of every task; `output_dir` receives `results.json`, `accuracy_matrix.png` and a
            folder per task.
        recipe: The arguments of the run, as `results.json` and the model cards state them; default: `args`.
        callbacks: Handed to every task's trainer; a `TaskPlugin` also acts at the beginning and end of every task.
        trainer_class: `ZOCLTrainer` or a subclass.
        held_out: Streams that are never trained on; the first task of each is measured before and after every task.
        evaluate_future: Also measure future tasks after every task, as forward transfer and the MTIL figures need;
            default: only in the `cross-dataset` scenario.
        image_cache_gb, skip_corrupt: See `prepare_images`.
        base_model: The base model's name in the checkpoints; default: the recipe's model, or the model's own name.
        known_classes: Classes that the model learned before: in the `class` scenario, images are predicted among them
            as well, and the checkpoints keep them.

    Raises:
        TypeError: If `stream` is not a `TaskStream`, or `args` not a `ZOCLTrainingArguments`.
        ValueError: If the layer assignment does not fit the model, or the model cannot tell two classes apart.
    """

    def __init__(
        self,
        model: CLIPClassifier,
        processor: ProcessorMixin,
        stream: TaskStream,
        args: ZOCLTrainingArguments,
        recipe: dict[str, Any] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        trainer_class: type[ZOCLTrainer] = ZOCLTrainer,
        held_out: Mapping[str, TaskStream] | None = None,
        evaluate_future: bool | None = None,
        image_cache_gb: float = DEFAULT_CACHE_GB,
        skip_corrupt: bool = False,
        base_model: str | None = None,
        known_classes: Sequence[str] = (),
    ):
        check_type("stream", stream, TaskStream, "a TaskStream")
        check_type("args", args, ZOCLTrainingArguments, "ZOCLTrainingArguments")
        check_measurable(args)
        self.model, self.processor, self.stream, self.args = model, processor, stream, args
        self.recipe = recipe if recipe is not None else args.to_dict()
        self.callbacks, self.trainer_class = list(callbacks), trainer_class
        self.held_out = dict(held_out or {})
        self.evaluate_future = stream.scenario == "cross-dataset" if evaluate_future is None else evaluate_future
        self.image_cache_gb, self.skip_corrupt = image_cache_gb, skip_corrupt
        self.base_model = base_model or self.recipe.get("model_name_or_path") or model.config.name_or_path
        self.known_classes = tuple(known_classes)
        self._codec, self._monitor = PixelCodec(processor.image_processor), RunMonitor(args, stream)
        self.output_dir, self.folder = Path(args.output_dir), RunFolder(args.output_dir)
        self._fingerprints: dict[str, str] = {}  # filled in the main process, which writes
        self._untrained: dict[str, torch.Tensor] | None = None  # the adapter that a run begins with
        for each in (stream, *self.held_out.values()):
            for evaluation in each.evaluations(len(each)):
                model.check_classes(evaluation.class_names, evaluation.prompt_template)
        split = args.layer_assignment.split(model)
        self._assignment = {"branch": args.zo_branch, "layers": args.zo_layers, "towers": split.describe()}
        self._kept = ReportFiles(self.output_dir, self._codec)
        # Last, because it may create a repository.
        pushes = args.push_to_hub and args.process_index == 0
        self._pusher = HubPusher.from_arguments(args) if pushes else None

    def run(
        self, resume: bool | str | Path = False, train: bool = True, overwrite_output_dir: bool = False
    ) -> dict[str, Any]:
        """Run the stream; meanwhile no other run may use `output_dir`.

        A run that starts anew starts from the adapter that the model had when `run` was first called to train.

        Args:
            resume: Go on where the run in `output_dir` stopped: after its last complete task, or at the last saved
                step of the next one. The folder of a checkpoint or of a complete task goes on from there instead. The
                result is that of a run that never stopped. Without a run in `output_dir`, start from the beginning.
            train: False measures the model as it is: zero-shot, the lower bound, as a separate run.
            overwrite_output_dir: Replace the run in `output_dir`. Its files are removed once the first step of this
                run is done; everything else in the folder stays.

        Returns:
            The content of `results.json`; accuracies are fractions.

        Raises:
            FolderInUseError: If another run uses `output_dir`.
            ValueError: If the model has no adapter or several active ones, or trains parameters that no checkpoint
                would hold.
            RunFolderError: If `output_dir` holds a run, and neither or both of `resume` and `overwrite_output_dir` are
                given; or if it holds no run, but files with names that this run would write.
            ResumeError: If `output_dir` holds a run with another recipe or number of processes, or no such checkpoint.
            TaskError: If a task's training diverges, or ends before its last step.
            SaveError: If something cannot be saved, for example on a full disk.
            ValueError: If an image cannot be decoded, or a checkpoint with this processor could not be loaded again.
        """
        if train:
            check_trained_parameters(self.model.clip)
            check_adapter_reloads(self.model.clip)
            texts = (*self.model.class_names, *check_templates(self.model.prompt_template))
            check_processor(self.processor, self.model.clip.config.text_config.vocab_size, texts)
            for task in self.stream:
                self.stream.training_classes(task.index)  # raises for a task that could learn nothing
            check_batches(self.args, self.stream)
            for plugin in task_plugins(self.callbacks):
                plugin.begin_run(self.stream, self.model)
        with ExitStack() as stack:
            results = by_main_process(self.args, lambda: self._take_folder(stack, resume, overwrite_output_dir))
            stack.enter_context(self._monitor)
            return self._run(results, resume, train)

    def _take_folder(self, stack: ExitStack, resume: bool | str | Path, overwrite: bool) -> dict[str, Any] | None:
        """Lock `output_dir` until the stack is closed, and read the results of the run to go on with, if any.

        Only the main process does this.
        """
        stack.enter_context(FolderLock(self.output_dir))
        stack.callback(self.folder.remove_empty_folders, len(self.stream))
        self.folder.check(bool(resume), overwrite)
        if resume:
            self._fetch_run()
        self._fingerprints = {"images": stream_digest(self.stream)}
        self._fingerprints |= {f"held_out {name}": stream_digest(each) for name, each in self.held_out.items()}
        if isinstance(self.model.clip, PeftModel):
            self._fingerprints["base_model"] = base_digest(self.model.clip)
            self._fingerprints["adapter"] = adapter_digest(self.model.clip)
        results = self._read_results(None if isinstance(resume, bool) else resume) if resume else None
        if results is None:
            if overwrite and self.folder.holds_run:
                self.folder.check_removable()
            else:
                self.folder.check_free(len(self.stream))
        return results

    def _run(self, results: dict[str, Any] | None, resume: bool | str | Path, train: bool) -> dict[str, Any]:
        """Run the stream from its beginning, or go on from `results`."""
        reset_peak_memory()
        if results is not None and not train and results["accuracy_matrix"]:
            return results
        self._prepare_images()
        checkpoint, begin = None, None
        if train:
            self._take_untrained()
        if results is None or not train:
            results = self._start()
            load_plugins(task_plugins(self.callbacks), None)
            begin = partial(self._begin, results)
        else:
            checkpoint = self._go_on(results, None if isinstance(resume, bool) else resume)
            self._push(*complete_tasks(self.output_dir))  # what was pushed already stays as it is
        if not train:
            begin()
            return self._finish_untrained(results)
        self._monitor.begin(self._images, results, goes_on=begin is None)
        started = time.perf_counter() - results["seconds"]
        for task in self._images[len(results["accuracy_matrix"]) :]:
            logger.info(f"Task {task.index} of {len(self.stream)}: {task.title or ', '.join(task.class_names)}")
            task_aware(self.model).begin_task(task.index)  # before the trainer asks which parameters are trainable
            trained = self._training.train(task, checkpoint, begin, self._callbacks(task, results))
            checkpoint = begin = None
            started -= trained.earlier_seconds
            results["training"].append(trained.means)
            task_aware(self.model).end_task(task.index)
            self._evaluate(task, results)
            self._monitor.measured(results)
            results["seconds"] = time.perf_counter() - started
            results["peak_memory_bytes"] = max(results["peak_memory_bytes"], peak_memory_bytes())
            self._save(task, results, trained)
            self._push(task.index)
        if self._pusher is not None:
            self._pusher.finish()
        return results

    def _push(self, *tasks: int) -> None:
        if self._pusher is not None:
            at_end_only = self.args.hub_strategy == "end"
            self._pusher.push(*(task for task in tasks if not at_end_only or task == len(self.stream)))

    def _fetch_run(self) -> None:
        """Fetch the run from its repository, to go on from it, if `output_dir` holds no run."""
        if self._pusher is not None and not self.folder.holds_run:
            try:
                fetch_run(self._pusher.queue.repo_id, self.output_dir, token=self.args.hub_token)
            except (OSError, ValueError) as error:  # starting anew would replace what is in the repository
                raise ResumeError(f"resume: {error} Without --resume the run starts from the beginning.") from error

    def _prepare_images(self) -> None:
        """Decode and resize images ahead; the first process fills the cache for the others."""
        with self.args.main_process_first(desc="decoding images"):
            options = {
                "cache_gb": self.image_cache_gb,
                "skip_corrupt": self.skip_corrupt,
                "workers": self.args.dataloader_num_workers,
            }
            self._images, self._skipped = prepare_images(self.stream, self._codec, **options)
            held_out = {name: prepare_images(stream, self._codec, **options) for name, stream in self.held_out.items()}
        self._held_out_images = {name: images for name, (images, _) in held_out.items()}

    def _start(self) -> dict[str, Any]:
        """Measure zero-shot, and return the results that a run begins with."""
        started = time.perf_counter()
        zero_shot = self.evaluator().zero_shot(self._images)
        self._kept.start(self._images, zero_shot.pop("labels"), zero_shot.pop("predicted"))
        others = self.evaluator(is_own=False)
        held_out = {name: others.after(images, 1)["seen"] for name, images in self._held_out_images.items()}
        return {
            "benchmark": self.stream.name,
            "scenario": self.stream.scenario,
            "recipe": self.recipe,
            "tasks": [task.title or task.name for task in self.stream],
            "classes": list(self.stream.class_names),
            **({"known_classes": list(self.known_classes)} if self.known_classes else {}),
            "prompt_template": self.model.prompt_template,
            "evaluate_future": self.evaluate_future,
            "fingerprints": self._fingerprints,
            "assignment": self._assignment,
            "zero_shot": zero_shot,
            "accuracy_matrix": [],
            "seen_accuracy": [],
            "details": [],
            "future_accuracy": [],
            "held_out": {name: {"zero_shot": accuracy, "after": []} for name, accuracy in held_out.items()},
            "training": [],
            "skipped_images": self._skipped,
            "seconds": time.perf_counter() - started,
            "peak_memory_bytes": peak_memory_bytes(),
            "seed": self.args.seed,
            "processes": self.args.world_size,
            "versions": versions(),
        }

    def _begin(self, results: dict[str, Any]) -> None:
        """Take over the folder from an earlier run."""
        if self.args.should_save:
            with saving(self.output_dir / RESULTS_FILE):
                self.folder.start(results, self._kept.predictions)

    def _go_on(self, results: dict[str, Any], chosen: str | Path | None) -> Path | None:
        """Restore the adapter of the last complete task, and return the checkpoint within the next one, if any."""
        done = len(results["accuracy_matrix"])
        if done:
            self._load_adapter(done)
        load_plugins(task_plugins(self.callbacks), self.output_dir / task_folder(done) if done else None)
        if self.args.should_save:
            self._kept.go_on(self._images, done)
            self.folder.remove_scratch(len(self.stream))
            for task in self.stream[:done]:  # a killed run may have left some behind
                self.folder.remove_checkpoints(task.name)
        if done == len(self.stream):
            logger.info(f"The run in {self.output_dir} is complete (--overwrite_output_dir runs it again).")
            return None
        if chosen is not None and self.folder.task_of(chosen) is not None:
            chosen = None
        checkpoint = self.folder.checkpoint(self.stream[done].name, chosen)
        logger.info(f"Going on after task {done}" + (f", from {checkpoint}" if checkpoint else ""))
        return checkpoint

    def _finish_untrained(self, results: dict[str, Any]) -> dict[str, Any]:
        """Finish a run without training: its accuracies are those of zero-shot."""
        zero_shot = results["zero_shot"]
        results.update({name: zero_shot[name] for name in ("accuracy_matrix", "seen_accuracy")})
        results.update(summarise(results["accuracy_matrix"], results["seen_accuracy"]))
        results["assignment"] = {**self._assignment, "towers": {}}  # no layer was trained
        self._kept.finish_untrained()
        if self.args.should_save:
            with saving(self.output_dir / RESULTS_FILE):
                self._kept.write(self._images)
                plot_accuracy_matrix(results, self.output_dir / FIGURE)
                self.folder.write(results)
        return results

    def evaluator(self, is_own: bool = True) -> StreamEvaluator:
        """The evaluator of the model on this stream or, without `known_classes`, on another stream."""
        known = self.known_classes if is_own and self.stream.scenario == "class" else ()
        return StreamEvaluator(
            self.model,
            self.processor,
            self._training.trainer("evaluation", callbacks=[*self.callbacks, *self._monitor.callbacks()]),
            self._codec,
            known,
        )

    def _evaluate(self, task: Task, results: dict[str, Any]) -> None:
        """Measure the model after `task`, and add the figures to the results."""
        evaluator = self.evaluator()
        measured = evaluator.after(self._images, task.index)
        results["accuracy_matrix"].append(measured["row"])
        results["seen_accuracy"].append(measured["seen"])
        results["details"].append(measured["details"])
        self._kept.add(task.index, measured["predicted"])
        results.update(summarise(results["accuracy_matrix"], results["seen_accuracy"]))
        if self.evaluate_future:
            results["future_accuracy"].append(evaluator.future(self._images, task.index))
            rows = [a + b for a, b in zip(results["accuracy_matrix"], results["future_accuracy"], strict=True)]
            # A task is measured among the classes known when it arrives; so zero-shot is here as well.
            on_arrival = [row[-1] for row in results["zero_shot"]["accuracy_matrix"]]
            results["forward_transfer"] = forward_transfer(rows, on_arrival)
            if self.stream.scenario == "cross-dataset":
                results["mtil"] = mtil_summary(rows)
        held_out = results["held_out"]
        others = self.evaluator(is_own=False)
        for name, images in self._held_out_images.items():
            held_out[name]["after"].append(others.after(images, 1)["seen"])
        if held_out:
            before = [record["zero_shot"] for record in held_out.values()]
            results["zero_shot_retention"] = zero_shot_retention(before, [r["after"][-1] for r in held_out.values()])

    @property
    def _training(self) -> TaskTraining:
        parts = self.model, self.processor, self.stream, self.args, self.trainer_class, self.folder, self._codec
        return TaskTraining(*parts)

    def _callbacks(self, task: Task, results: dict[str, Any]) -> list[TrainerCallback]:
        """The callbacks for a task's trainer: the caller's, the run's and, if saves are pushed, `PushOnSave`."""
        pushes = self._pusher is not None and self.args.hub_strategy not in ("every_task", "end")
        own = [PushOnSave(self._pusher, self.args.hub_strategy, task.index)] if pushes else []
        return [*self.callbacks, *self._monitor.callbacks(task), _PeakOnSave(self.folder, results), *own]

    def _save(self, task: Task, results: dict[str, Any], trained: Trained) -> None:
        """Save a complete task's files; the results come last, because they say that the rest is there."""
        if not self.args.should_save:
            return
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        with saving(self.output_dir / task.name, parameters):
            self._kept.write(self._images)
            info, files = self._kept.row(results)
            info, files = self._task_info(task, results) | info, self._kept.of_task(trained.curves) | files
            files = files | plugin_file(task_plugins(self.callbacks))
            save_task_checkpoint(self.output_dir, self.model, self.processor, info, results, files)
            if trained.replay_log is not None:
                save_replay_log(trained.replay_log, self.folder.replay_file(task.name))
            plot_accuracy_matrix(results, self.output_dir / FIGURE)
            self.folder.write(results)
        self.folder.remove_checkpoints(task.name)

    def _task_info(self, task: Task, results: dict[str, Any]) -> dict[str, Any]:
        of_run = self.stream, self.model, self._assignment, self.base_model, self.known_classes
        return task_info(task, *of_run, plugin_names(task_plugins(self.callbacks)), results)

    def _read_results(self, chosen: str | Path | None) -> dict[str, Any] | None:
        """The results of the complete tasks in `output_dir`, if a run is there."""
        is_local, processes = Path(self.model.config.name_or_path).exists(), self.args.world_size
        after = None if chosen is None else self.folder.task_of(chosen)
        results = self.folder.read(self.recipe, self.stream.class_names, is_local, after, processes)
        if results is None and chosen is not None:
            raise ResumeError(f"resume_from_checkpoint={str(chosen)!r}: there is no run in {self.output_dir}.")
        if results is None:
            logger.warning(f"resume: there is no run in {self.output_dir}, so it starts from the beginning.")
            return None
        check_fingerprints(self._fingerprints, results.get("fingerprints", {}), self.output_dir)
        here = {
            "prompt_template": self.model.prompt_template,
            "known_classes": list(self.known_classes),
            "held_out": sorted(self.held_out),
            "evaluate_future": self.evaluate_future,
        }
        there = {"known_classes": [], **results, "held_out": sorted(results["held_out"])}
        check_measuring(here, there, self.output_dir)
        done = len(results["accuracy_matrix"])
        self.folder.check_tasks(done)
        if after is not None:
            # Last: by now nothing can refuse the run any more, not even a plug-in's saved state.
            load_plugins(task_plugins(self.callbacks), self.output_dir / task_folder(done) if done else None)
            self.folder.take_back(results)
        return results

    def _take_untrained(self) -> None:
        """Give the model its untrained adapter back, which an earlier run of this scheduler may have trained."""
        if self._untrained is None:
            weights = adapter_weights(self.model.clip)
            self._untrained = {name: tensor.detach().cpu().clone() for name, tensor in weights.items()}
        else:
            self._set_adapter(self._untrained)

    def _load_adapter(self, task: int) -> None:
        try:
            weights = read_adapter_weights(self.output_dir / task_folder(task))
        except ValueError as error:
            raise ResumeError(f"resume: {error}") from error
        self._set_adapter(weights)

    def _set_adapter(self, weights: dict[str, torch.Tensor]) -> None:
        set_peft_model_state_dict(self.model.clip, weights, adapter_name=trained_adapter(self.model.clip))


class _PeakOnSave(TrainerCallback):
    """Keeps the peak memory so far with a checkpoint: a process that goes on from there has a peak of its own."""

    def __init__(self, folder: RunFolder, results: dict[str, Any]):
        self._folder, self._results = folder, results

    def on_save(self, args, state, control, **kwargs):
        before, now = self._results["peak_memory_bytes"], peak_memory_bytes()
        if args.should_save and now > before:
            self._results["peak_memory_bytes"] = now
            with saving(self._folder.path / RESULTS_FILE):
                self._folder.write(self._results)
