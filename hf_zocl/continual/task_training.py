"""The training of one task: its trainer, and its results."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from transformers import ProcessorMixin, TrainerCallback
from transformers.utils import logging

from ..data.images import ImageCollator, PixelCodec
from ..data.stream import TaskStream
from ..data.tasks import Task
from ..models import CLIPClassifier
from ..trainer import ZOCLTrainer
from ..trainer.arguments import ZOCLTrainingArguments
from ..zo import ReplayLog
from .measures import curves, means
from .plugins import TaskPlugin, task_plugins
from .progress import without_own_display
from .run_folder import RunFolder
from .task_check import TaskCheck


logger = logging.get_logger(__name__)


@dataclasses.dataclass(frozen=True)
class Trained:
    """What is kept of a task's training once its trainer is gone.

    Attributes:
        means: The means of the logged figures, by name.
        curves: The logged figures over the steps, by name, see `curves`.
        replay_log: The zeroth-order steps, if they were logged and lead to the final weights.
        earlier_seconds: Seconds of training by earlier processes, up to the checkpoint that this one went on from.
    """

    means: dict[str, float]
    curves: dict[str, list[float | None]]
    replay_log: ReplayLog | None
    earlier_seconds: float


@dataclasses.dataclass(frozen=True)
class TaskTraining:
    """Makes a trainer for each task of a stream, and trains with it.

    Args:
        model, processor, stream, args, trainer_class: As for `ContinualTaskScheduler`.
        folder: The run's folder, in which the trainers work.
        codec: Reads images that are bytes.
    """

    model: CLIPClassifier
    processor: ProcessorMixin
    stream: TaskStream
    args: ZOCLTrainingArguments
    trainer_class: type[ZOCLTrainer]
    folder: RunFolder
    codec: PixelCodec

    def trainer(
        self,
        name: str,
        task: Task | None = None,
        callbacks: Iterable[TrainerCallback] = (),
        zo_seed: int | None = None,
    ) -> ZOCLTrainer:
        """A trainer for one task's images or, without a task, for evaluation."""
        labels = (self.stream.arrival_labels, 0)
        if task is not None:
            labels = (task.arrival_labels, self.stream.training_classes(task.index)[1])
        args = dataclasses.replace(
            self.args,
            output_dir=str(self.folder.trainer_folder(name)),
            run_name=f"{self.args.run_name or self.stream.name}-{name}",
            zo_seed=zo_seed,
            # Every trained parameter is used in every pass, so DDP need not look for unused ones.
            ddp_find_unused_parameters=bool(self.args.ddp_find_unused_parameters),
            logging_nan_inf_filter=False,  # `TaskCheck` must see losses that are not finite
            remove_unused_columns=False,  # the collator makes the model's inputs from the image column
            dataloader_drop_last=self.args.dataloader_drop_last and task is not None,  # every test image counts
            report_to="none",  # `StreamReport` reports the run as a whole
            push_to_hub=False,  # the scheduler pushes each task as a whole
            hub_token=None,  # the Trainer writes its arguments into its checkpoints
        )
        callbacks = list(callbacks)
        trainer = self.trainer_class(
            model=self.model,
            args=args,
            train_dataset=None if task is None else task.train,
            data_collator=ImageCollator(self.processor, *labels, self.codec),
            callbacks=callbacks,
        )
        without_own_display(trainer, callbacks)  # `StreamProgress` shows the whole run
        return trainer

    def train(
        self,
        task: Task,
        checkpoint: Path | None = None,
        begin: Callable[[], None] | None = None,
        callbacks: Iterable[TrainerCallback] = (),
    ) -> Trained:
        """Train on one task, from its beginning or from a checkpoint within it.

        `begin` is called after the first step. Plug-ins among the callbacks act at the task's beginning and end.

        Raises:
            TaskError: If the training diverges, or ends before its last step.
        """
        template = self.model.prompt_template if task.prompt_template is None else task.prompt_template
        # The first of several prompts trains, and all of them predict, as in ZSCL's MTIL.
        names, _ = self.stream.training_classes(task.index)
        if len(names) > len(task.class_names):
            logger.info(f"{task.name} has one class: it is trained among the {len(names)} classes seen.")
        self.model.set_classes(names, template if isinstance(template, str) else template[0])
        # Every task draws its own directions.
        zo_seed = (self.args.seed if self.args.zo_seed is None else self.args.zo_seed) + 1_000_003 * task.index
        callbacks = list(callbacks)
        plugins = task_plugins(callbacks)
        trainer = self.trainer(task.name, task, callbacks, zo_seed)
        for plugin in plugins:
            plugin.begin_task(task, trainer)
        check = TaskCheck(task.name, trainer)
        if begin is not None:
            trainer.add_callback(first_step := _AfterFirstStep(begin))
        trainer.train(resume_from_checkpoint=checkpoint)
        check.finish()
        if begin is not None:
            first_step.call()  # if there was no step
        is_changed = False
        if plugins:
            is_changed = self._end_task(task, trainer, plugins)
            check.check_finite()
        log = trainer.state.log_history
        # If a plug-in changed the weights, the log no longer leads to them.
        replay_log = None if is_changed else trainer.replay_log
        return Trained(means(log), curves(log), replay_log, trainer.earlier_seconds)

    def _end_task(self, task: Task, trainer: ZOCLTrainer, plugins: list[TaskPlugin]) -> bool:
        """Let the plug-ins end the task, and tell whether they have changed a trained weight."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        stepped_to = [parameter.detach().clone() for parameter in trained]
        for plugin in plugins:
            plugin.end_task(task, trainer)
        return not all(map(torch.equal, trained, stepped_to))


class _AfterFirstStep(TrainerCallback):
    """Calls a function once, after the first step, when all that could fail before training has passed."""

    def __init__(self, function: Callable[[], None]):
        self._function: Callable[[], None] | None = function

    def on_step_end(self, args, state, control, **kwargs):
        self.call()

    def call(self) -> None:
        function, self._function = self._function, None
        if function is not None:
            function()
