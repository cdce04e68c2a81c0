"""`TaskCheck`: checks that a task's training went well before any of it is saved."""

from __future__ import annotations

import torch
from transformers import TrainerCallback
from transformers.utils import logging

from ..trainer import ZOCLTrainer
from ..trainer.compat import pending_loss


logger = logging.get_logger(__name__)


class TaskError(ValueError):
    """A task's training diverged or ended too early; none of it is saved as complete."""


class TaskCheck(TrainerCallback):
    """Stops a training that has diverged, and one that ends before its last step.

    It checks the loss of every step, and the trained weights before anything is logged or saved. Each process learns
    what the others found.

    Args:
        name: The task's name, for the errors.
        trainer: The task's trainer, with `logging_nan_inf_filter=False`. This becomes its last callback.
    """

    def __init__(self, name: str, trainer: ZOCLTrainer):
        self.name, self.trainer = name, trainer
        self._bad_step = torch.full((1,), -1, device=trainer.args.device)
        self._epoch_began = 0
        self._was_asked_to_stop = False
        trainer.add_callback(self)

    def on_step_end(self, args, state, control, **kwargs):
        is_first = ~pending_loss(self.trainer).isfinite() & (self._bad_step < 0)
        self._bad_step = torch.where(is_first, state.global_step, self._bad_step)
        if control.should_log or control.should_save or control.should_training_stop:
            self.check_finite()

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._epoch_began = state.global_step

    def on_epoch_end(self, args, state, control, **kwargs):
        """Note whether a callback asked to stop; on logs and saves too, because they come after an epoch's end."""
        # A Trainer that has run out of data stops too, but after an epoch without a step.
        stops = control.should_training_stop or control.should_epoch_stop
        self._was_asked_to_stop |= stops and state.global_step > self._epoch_began

    on_log = on_save = on_evaluate = on_epoch_end

    def finish(self) -> None:
        """Check the training after its end.

        Raises:
            TaskError: If it took too few steps and no callback asked it to stop, or a weight is not finite.
        """
        state = self.trainer.state
        self.check_finite()
        if state.global_step == state.max_steps:
            return
        ended = f"{self.name} ended after {state.global_step} of {state.max_steps} steps"
        if not self._was_asked_to_stop or self.trainer.args.enable_jit_checkpoint:
            raise TaskError(f"{ended}, and is not complete: go on with --resume.")
        logger.warning(f"{ended}: a callback stopped it.")

    def check_finite(self) -> None:
        """Check the losses so far, and the weights as they are now.

        Raises:
            TaskError: If one is not finite.
        """
        step = self.trainer.state.global_step
        names, are_finite = self._weights()
        found = torch.stack([self._bad_step[0], torch.where(are_finite.all(), -1, step)])
        found = self.trainer.accelerator.gather(found.unsqueeze(0))
        losses, weights = ([int(value) for value in column if value >= 0] for column in found.T)
        if not losses and not weights:
            return
        if losses:
            what, which = f"the loss is not finite at step {min(losses)}", ""
        else:
            bad = [name for name, is_finite in zip(names, are_finite.tolist(), strict=True) if not is_finite]
            which = f" ({len(bad)} of {len(names)}, first {bad[0]})" if bad else ""
            what = f"the weights are not finite after step {step}"
        args = self.trainer.args
        rates = f"learning_rate={args.learning_rate:g}"
        if args.zo_branch != "none":
            rates += f" and zo_learning_rate={args.zo_learning_rate}"
        raise TaskError(
            f"{self.name} diverged: {what} of {self.trainer.state.max_steps}{which}, with {rates}. It is not saved as "
            "complete; the tasks before it are whole."
        )

    def _weights(self) -> tuple[list[str], torch.Tensor]:
        """The trained parameters' names, and whether each is finite."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        free = {id(parameter) for parameter in self.trainer._gradient_free_parameters}
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad or id(p) in free}
        return list(trained), torch.stack([parameter.isfinite().all() for parameter in trained.values()])
