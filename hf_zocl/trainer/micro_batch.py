"""One micro-batch of a training step: its loss as the host computes it, and the further losses of the estimate."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers.utils import logging

from ..passes import ForwardState, PlainEvaluation, StackEvaluation, TowerEvaluation
from ..passes.random_state import uncounted
from ..private_names import without_autocast
from ..zo import Estimate, Evaluation
from .compat import accumulated_batches, gradient_scaler
from .differences import why_flat
from .inputs import Inputs
from .objective import Objective, value_of
from .quiet import leaving_no_trace


logger = logging.get_logger(__name__)


class MicroBatch:
    """Stands in for the host's loss and backward pass, for one call of its `training_step`.

    Where there are first-order parameters, the host's loss is recorded and backpropagated, and the estimate is made
    after that, when the activations are gone. Otherwise the first pass of the estimate is the host's own.

    Args:
        trainer: The host, a `ZeroOrderMixin`.
        stack: Collects what must be undone after the step.
        loss: The host's `compute_loss`.
        backward: The accelerator's `backward`.
        scale: The scale of the estimate in the step's gradient.

    Attributes:
        estimate: The estimate; None until it is made.
    """

    def __init__(
        self,
        trainer: Any,
        stack: ExitStack,
        loss: Callable[..., Any],
        backward: Callable[..., None],
        scale: float,
    ):
        self.trainer, self.stack, self.scale = trainer, stack, scale
        self.estimate: Estimate | None = None
        self._loss, self._backward = loss, backward
        self._objective: Objective | None = trainer.zo_objective
        self._base_loss: torch.Tensor | None = None
        self._recording = stack.enter_context(ExitStack())
        self._has_begun = self._is_passed_back = self._is_hosts_own = False

    def compute_loss(self, model: nn.Module, inputs: dict[str, torch.Tensor | Any], *args, **kwargs) -> Any:
        """Replaces the host's `compute_loss`."""
        if self._has_begun:
            return self._loss(model, inputs, *args, **kwargs)
        result = self._first_loss(model, inputs, *args, **kwargs)
        self._returned = _scalar(result).detach()
        return result

    def _first_loss(self, model: nn.Module, inputs: dict[str, torch.Tensor | Any], *args, **kwargs) -> Any:
        self._has_begun = True
        self.model, self._args, self._kwargs = model, args, kwargs
        self.inputs = Inputs(inputs, self.trainer._plan.writes_inputs)
        if not self.trainer._has_first_order:
            with torch.autocast(self.device.type, enabled=False):
                self._begin()
                if self._objective is None:
                    self._make_estimate()
                    return (self.estimate.loss, None) if kwargs.get("return_outputs") else self.estimate.loss
            with torch.no_grad():
                result = self._recorded(model, inputs)
            self._recording.close()
            with torch.autocast(self.device.type, enabled=False):
                self._make_estimate()
            return result
        self._begin()
        return self._recorded(model, inputs)

    def _recorded(self, model: nn.Module, inputs: dict[str, torch.Tensor | Any]) -> Any:
        """The host's loss at θ, which is also the base of the differences."""
        self._recording.enter_context(self.evaluation.recording())
        if self._objective is None:
            result = self._loss(model, inputs, *self._args, **self._kwargs)
            self._base_loss = _scalar(result).detach()
            return result
        result = self._loss_and_outputs(model, inputs)
        self._base_loss = self._value(result[1])
        return result if self._kwargs.get("return_outputs") else result[0]

    def _loss_and_outputs(self, model: nn.Module, inputs: dict[str, torch.Tensor | Any]) -> tuple[torch.Tensor, Any]:
        if self._args:
            return self._loss(model, inputs, True, *self._args[1:], **self._kwargs)
        return self._loss(model, inputs, **{**self._kwargs, "return_outputs": True})

    def _value(self, outputs: Any) -> torch.Tensor:
        """The objective, weighted by this process's own examples."""
        value = value_of(self._objective, self._unwrapped(), self.inputs.again(), outputs)
        return value * self.trainer._own_share

    def backward(self, loss: torch.Tensor, **kwargs) -> None:
        """Replaces the accelerator's `backward`."""
        if not self._has_begun or self._is_passed_back:
            raise RuntimeError(
                f"{type(self.trainer).__name__}: its training_step calls accelerator.backward "
                f"{'twice' if self._is_passed_back else 'without compute_loss'}, and a zeroth-order estimate needs to "
                "know its loss: expected one call of each per micro-batch."
            )
        self._is_passed_back = True
        self._check_passed(loss.detach())
        if self.trainer._has_first_order:
            self._backward(loss, **kwargs)
            self._recording.close()
            self._make_estimate()
        elif gradient_scaler(self.trainer.accelerator) is not None:
            self._give_scaler_something_to_see(loss)

    def _check_passed(self, loss: torch.Tensor) -> None:
        """Check that the loss passed back is the one from `compute_loss`, scaled for accumulation or not."""
        returned, scales = self._returned, (1, accumulated_batches(self.trainer))
        # What is added may be small at first: only the rounding of the division is let through.
        rtol = 4 * max(torch.finfo(each.dtype).eps for each in (loss, returned))
        passed = loss.to(returned.dtype)
        if not any(torch.allclose(passed * scale, returned, rtol=rtol, equal_nan=True) for scale in scales):
            raise RuntimeError(
                f"{type(self.trainer).__name__}: its training_step passes back a loss of {float(loss):.5g}, but its "
                f"compute_loss gave {float(self._returned):.5g}: zeroth-order layers would not learn from what was "
                "added. Compute all of the loss in compute_loss."
            )

    @property
    def device(self) -> torch.device:
        return self.trainer.args.device

    @cached_property
    def module(self) -> nn.Module:
        """The module that gives the further losses."""
        if self.trainer._plan.towers:
            # A model compiled as a whole cannot be taken apart; what is compiled inside the towers stays compiled.
            return self._unwrapped(keep_torch_compile=False)
        # A pass through the data-parallel wrapper sends all buffers.
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model

    def _unwrapped(self, **kwargs: Any) -> nn.Module:
        return self.trainer.accelerator.unwrap_model(self.model, **kwargs)

    def _begin(self) -> None:
        self.evaluation = self.trainer._evaluation(self)
        self.stack.callback(self.evaluation.close)

    def _make_estimate(self) -> None:
        trainer = self.trainer
        if not trainer._watch.is_settled:
            trainer._measure_differences(self)
        finer = {branch for branch, own in trainer._estimator.resolutions.items() if own.finer}
        self._is_hosts_own = self._base_loss is None
        self.estimate = trainer._estimator.estimate(
            self.evaluation,
            step=trainer.state.global_step,
            micro_step=len(trainer._estimates),
            base_loss=self._base_loss,
            learning_rate=trainer._estimates.learning_rates,
            finer=partial(self._finer, finer),
        )
        if self._objective is not None and trainer._estimator.formula.is_two_sided:
            self.estimate.loss = trainer._average_over_ranks(self._base_loss)
        self._see_inputs()

    def _see_inputs(self) -> None:
        plan, written = self.trainer._plan, self.inputs.written
        if plan.writes_inputs is None:
            plan.writes_inputs = bool(written)
        elif written and not plan.writes_inputs:
            raise RuntimeError(
                f"The loss wrote into its inputs ({', '.join(written)}), but not in the first step of the training: "
                "they were not copied, so the passes that are compared saw different inputs. Write into a clone."
            )

    def forward(self) -> torch.Tensor:
        """The loss, a scalar, at the current parameters."""
        if self._is_hosts_own:
            self._is_hosts_own = False
            return self._loss_without_gradient(self.module, self.inputs.given)
        with leaving_no_trace(self.trainer):
            return self._loss_without_gradient(self.module, self.inputs.again())

    def _loss_without_gradient(self, module: nn.Module, inputs: Any) -> torch.Tensor:
        with torch.no_grad(), self.trainer.compute_loss_context_manager():
            if self._objective is not None:
                return self._value(self._loss_and_outputs(module, inputs)[1])
            try:
                loss = _scalar(self._loss(module, inputs, *self._args, **self._kwargs))
            except RuntimeError as error:
                if "does not require grad" not in str(error):
                    raise
                raise RuntimeError(
                    "The loss takes a derivative itself, and a zeroth-order pass runs without autograd: take it under "
                    "torch.enable_grad()."
                ) from error
        if loss.dtype.itemsize < 4:
            logger.warning_once(
                f"The loss is {loss.dtype}, which rounds away the small differences that zeroth-order layers learn "
                "from. Load the model in float32 (dtype=torch.float32) and train with bf16=True or fp16=True, or "
                "compute the loss from logits.float()."
            )
        return loss

    def make_evaluation(self) -> PlainEvaluation | StackEvaluation | TowerEvaluation:
        """How L(θ + d) is computed: by towers in a dual encoder, else from the first perturbed layer on."""
        trainer, plan = self.trainer, self.trainer._plan
        devices = tuple(dict.fromkeys([self.device, *plan.devices]))
        if not plan.buffers.is_watched:
            plan.buffers.watch(devices, self.forward)
        self.stack.enter_context(trainer._sharing_buffers(self.model, plan.buffers))
        before = ForwardState(devices, plan.buffers)
        # An objective may be a step function, in which the check of shortcuts sees nothing.
        if self._objective is not None:
            return PlainEvaluation(self.forward, before)
        if not plan.towers:
            # A model compiled as a whole cannot be taken apart.
            if plan.stack is None or trainer.args.torch_compile:
                return PlainEvaluation(self.forward, before)
            return StackEvaluation(plan, self.forward, before)
        return TowerEvaluation(plan, self.forward, before, trainer.accelerator.autocast)

    def _finer(self, towers: set[str | None]) -> Evaluation:
        """The evaluation of the same micro-batch in float32, for perturbations of these towers."""
        in_float32 = partial(without_autocast, self.device.type)
        module = self._unwrapped(keep_torch_compile=False)

        def forward() -> torch.Tensor:
            with in_float32(), leaving_no_trace(self.trainer):
                return self._loss_without_gradient(module, self.inputs.again())

        finer = self.evaluation.finer(forward, in_float32, towers)
        self.stack.callback(finer.close)
        return finer

    def measure_differences(self) -> None:
        """Choose ε and the precision of the zeroth-order passes."""
        trainer, module = self.trainer, self._unwrapped()
        is_half = any(p.dtype.itemsize < 4 for p in module.parameters() if p.dtype.is_floating_point)
        has_finer = trainer.accelerator.mixed_precision in ("bf16", "fp16") and not is_half

        def why(branch: str | None) -> str:
            parameters = trainer._estimator.perturbations[branch].parameters
            return why_flat(module, parameters, lambda: self._loss_with_gradient(module))

        # Full passes: a shortcut may leave out the very part that leaves something behind.
        plain = PlainEvaluation(self.forward, self.evaluation.before)
        with uncounted(module):
            first = plain.losses([{}])
            trainer._watch.settle(self.evaluation, self._finer if has_finer else None, why)
            trainer._watch.check_repeats(*first, *plain.losses([{}]))

    def _loss_with_gradient(self, module: nn.Module) -> torch.Tensor:
        with torch.enable_grad(), leaving_no_trace(self.trainer):
            return _scalar(self._loss(module, self.inputs.again(), *self._args, **self._kwargs))

    def _give_scaler_something_to_see(self, loss: torch.Tensor) -> None:
        """A gradient scaler needs a loss to scale and gradients to inspect, even without a first-order pass."""
        gradient_scaler(self.trainer.accelerator).scale(loss)
        parameter = self.trainer.split.zo_parameters[0]
        parameter.grad = torch.zeros_like(parameter)


def _scalar(result: Any) -> torch.Tensor:
    """The loss in what `compute_loss` returns, as a scalar."""
    return (result[0] if isinstance(result, tuple) else result).mean()
