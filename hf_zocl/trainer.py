"""`ZOCLTrainer`: a `transformers.Trainer` that trains some layers by forward passes alone."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from .training_args import ZOCLTrainingArguments
from .zo import (
    ForwardState,
    HybridOptimizer,
    ParameterSplit,
    PlainEvaluation,
    TowerEvaluation,
    ZOEstimator,
    build_zo_optimizer,
)


logger = logging.get_logger(__name__)


class ZOCLTrainer(Trainer):
    """Trains the zeroth-order layers by loss differences, and all other trainable parameters by backpropagation.

    `args.zo_branch` and `args.zo_layers` choose the layers. A zeroth-order estimate is a gradient: it goes into
    `.grad`, and accumulation, schedulers, callbacks and checkpoints are the `Trainer`'s own. With `zo_branch="none"`
    this is a `Trainer`. It takes the arguments of `Trainer`, with `args` a `ZOCLTrainingArguments`.

    Raises:
        ValueError: If the assignment does not fit the model, or an optimizer is passed in (choose `optim` and
            `zo_optim` instead).
    """

    def __init__(self, model: nn.Module | None = None, args: ZOCLTrainingArguments | None = None, **kwargs):
        args = args if args is not None else ZOCLTrainingArguments(output_dir="tmp_trainer")
        if not isinstance(args, ZOCLTrainingArguments):
            raise TypeError(f"args: expected ZOCLTrainingArguments, got {type(args).__name__}.")
        super().__init__(model=model, args=args, **kwargs)
        self.split: ParameterSplit | None = None
        self._estimator: ZOEstimator | None = None
        # The estimate waits here until the Trainer has clipped the first-order gradients.
        self._waiting: dict[nn.Parameter, torch.Tensor] = {}
        self._micro_step = 0
        self._changes_state: bool | None = None
        # The features of a two-tower model, left by the first-order pass for the zeroth-order one.
        self._features: dict[str, torch.Tensor] | None = None
        self._zo_logs: dict[str, torch.Tensor | float] = {}
        if args.zo_branch == "none":
            return
        if self.optimizer is not None:
            raise ValueError("ZOCLTrainer builds its optimizer over both groups: pass optim and zo_optim, not one.")
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "FSDP and DeepSpeed move parameters about and cannot be used with zeroth-order layers yet."
            )
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs in one process (nn.DataParallel) cannot have zeroth-order layers: start one "
                "process per GPU with `accelerate launch`, or show one GPU with CUDA_VISIBLE_DEVICES."
            )
        if model is not None:
            self._assign_layers()  # fail before any work
        self.add_callback(_InstallEstimate(self))

    @property
    def has_zo_parameters(self) -> bool:
        return self.split is not None and bool(self.split.zo)

    def _split_is_current(self) -> bool:
        """Whether the split is of this model: `model_init` makes a new one."""
        mine = {id(parameter) for parameter in self.model.parameters()}
        return self.split is not None and all(id(parameter) in mine for parameter in self.split.zo_parameters)

    def _assign_layers(self) -> None:
        args: ZOCLTrainingArguments = self.args
        self.split = args.layer_assignment.split(self.model, args.zo_eps, args.zo_eps_vision, args.zo_eps_language)

    def train(self, *args, **kwargs):
        """`Trainer.train`; the zeroth-order parameters take no part in autograd while it runs."""
        try:
            return super().train(*args, **kwargs)
        finally:
            if self.has_zo_parameters:
                _require_grad(self.split.zo_parameters, True)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer over the first-order parameters, and `zo_optim` over the others, as one.

        From here on the zeroth-order parameters require no gradient, so that the first-order pass keeps no activation
        for them and data-parallel wrappers leave them alone.
        """
        if self.args.zo_branch == "none":
            return super().create_optimizer(model)
        if not self._split_is_current():
            self._assign_layers()
        if not self.split.fo and self.accelerator.distributed_type == DistributedType.MULTI_CPU:
            raise ValueError(
                "zo_layers='all' leaves nothing first-order, which several CPU processes cannot train yet."
            )
        args, zo_parameters = self.args, self.split.zo_parameters
        _require_grad(zo_parameters, False)
        if self.optimizer is None:
            zo = build_zo_optimizer(
                self.split.zo, args.zo_optim, args.zo_learning_rate, args.zo_momentum, args.zo_weight_decay
            )
            parts = [super().create_optimizer(model), zo] if self.split.fo else [zo]
            self.optimizer = HybridOptimizer(*parts)
        self._estimator = ZOEstimator(
            self.split.zo,
            estimator=args.zo_estimator,
            queries=args.queries_by_branch,
            # What is judged must be what will be applied.
            sign=args.zo_sign or (args.zo_estimator == "conservative" and args.zo_optim == "sign"),
            direction=args.zo_direction,
            seed=args.seed if args.zo_seed is None else args.zo_seed,
            reduce=self._average_over_ranks,
        )
        return self.optimizer

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """One micro-batch: backpropagation for the first-order parameters, then the zeroth-order estimate.

        Returns:
            The loss at θ, scaled for accumulation as the Trainer scales it; detached.
        """
        if not self.has_zo_parameters:
            return super().training_step(model, inputs, num_items_in_batch)
        inputs = self._prepare_inputs(inputs)
        scale = self._loss_scale(num_items_in_batch)
        self._features = None
        before, after, base_loss = ForwardState(self.args.device, model.buffers()), None, None
        if self.split.fo:
            base_loss = super().training_step(model, inputs, num_items_in_batch) / scale
            after = ForwardState(self.args.device, model.buffers())
            self._changes_state = before != after
        else:
            model.train()
        evaluation = self._evaluation(model, inputs, num_items_in_batch, before, after)
        if base_loss is None:
            base_loss = evaluation(None)
        self._accumulate_estimate(evaluation, base_loss, scale)
        evaluation.close()
        return base_loss * scale

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ):
        """`Trainer.compute_loss`; the towers' features are remembered for the zeroth-order pass."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self.has_zo_parameters and torch.is_grad_enabled() and hasattr(outputs, "tower_features"):
            self._features = {tower: features.detach() for tower, features in outputs.tower_features().items()}
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """`Trainer.log`, with the zeroth-order figures and the model's own `extra_logs` beside the training loss."""
        if "loss" in logs and self._zo_logs:
            logs.update({name: float(value) for name, value in self._zo_logs.items()})
        model = self.accelerator.unwrap_model(self.model)
        if "loss" in logs and hasattr(model, "extra_logs"):
            logs.update(model.extra_logs())
        super().log(logs, start_time)

    def _accumulate_estimate(
        self, evaluation: PlainEvaluation | TowerEvaluation, base_loss: torch.Tensor, scale: float
    ) -> None:
        """Add the estimate of this micro-batch to the one that waits for the optimizer step."""
        parameters = self.split.zo_parameters
        for parameter in parameters:
            parameter.grad = self._waiting.pop(parameter, None)
        estimate = self._estimator.accumulate(
            evaluation,
            step=self.state.global_step,
            micro_step=self._micro_step,
            base_loss=base_loss,
            # FZOO's quotient of losses has no scale of its own.
            scale=1.0 / self.current_gradient_accumulation_steps if self.args.zo_estimator == "fzoo" else scale,
            learning_rate=self._zo_learning_rate,
        )
        # A gradient scaler wants a loss to scale and gradients to look at, even where there is no first-order pass.
        needs_placeholder = self.accelerator.scaler is not None and not self.split.fo
        if needs_placeholder:
            self.accelerator.scaler.scale(base_loss)
        for parameter in parameters:
            self._waiting[parameter] = parameter.grad
            parameter.grad = torch.zeros_like(parameter) if needs_placeholder else None
        self._micro_step += 1
        self._zo_logs["zo_loss_difference"] = torch.cat(list(estimate.differences.values())).abs().mean()
        for branch, variance in estimate.variance.items():
            self._zo_logs["zo_variance" + (f"_{branch}" if branch else "")] = variance

    def _evaluation(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        num_items_in_batch: torch.Tensor | int | None,
        before: ForwardState,
        after: ForwardState | None,
    ) -> PlainEvaluation | TowerEvaluation:
        """The way to L(θ + εΔ): by the towers where the model has them and a pass changes no state, else in full."""

        def forward() -> torch.Tensor:
            with torch.no_grad(), self.compute_loss_context_manager():
                loss = self.compute_loss(model, dict(inputs), num_items_in_batch=num_items_in_batch)
            return loss.mean()

        plain = PlainEvaluation(forward, before, after)
        classifier = self.accelerator.unwrap_model(model)
        own_loss = type(self).compute_loss is not ZOCLTrainer.compute_loss
        if own_loss or self.compute_loss_func or self.label_smoother or not hasattr(classifier, "towers"):
            return plain
        if self._changes_state is None:
            plain(None)
            self._changes_state = plain.after != before
        if self._changes_state:
            logger.warning_once("The forward pass draws random numbers (dropout): every loss is a full forward pass.")
            return plain

        def encode(tower: str) -> torch.Tensor:
            with self.accelerator.autocast():
                return classifier.encode(tower, inputs["pixel_values"])

        def combine(features: dict[str, torch.Tensor]) -> torch.Tensor:
            return classifier.loss(features, inputs["labels"])

        return TowerEvaluation(encode, combine, classifier.towers, self._features)

    def _forget_estimate(self) -> None:
        self._waiting.clear()
        self._micro_step = 0

    def _install_estimate(self) -> None:
        """Hand the estimate to the optimizer: normalised and clipped apart from the first-order gradients."""
        parameters = self.split.zo_parameters
        for parameter in parameters:
            parameter.grad = self._waiting.pop(parameter)
        self._zo_logs["zo_learning_rate"] = self._zo_learning_rate
        self._zo_logs["zo_grad_norm"] = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        self._estimator.normalise()
        if self.args.zo_max_grad_norm > 0:
            nn.utils.clip_grad_norm_(parameters, self.args.zo_max_grad_norm)

    def _loss_scale(self, num_items_in_batch: torch.Tensor | int | None) -> float:
        """What the Trainer multiplies the loss of a micro-batch by (see `Trainer.loss_is_scaled_for_ga`)."""
        is_scaled = self.loss_is_scaled_for_ga
        if is_scaled is None:
            by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            is_scaled = by_model or self.compute_loss_func is not None
        return 1.0 if is_scaled else 1.0 / self.current_gradient_accumulation_steps

    @property
    def _zo_learning_rate(self) -> float:
        return next(group["lr"] for group in self.optimizer.param_groups if "zo_branch" in group)

    def _average_over_ranks(self, losses: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(losses, "mean") if self.accelerator.num_processes > 1 else losses


class _InstallEstimate(TrainerCallback):
    """Installs the estimate between the Trainer's clipping, which must not see it, and `optimizer.step`."""

    def __init__(self, trainer: ZOCLTrainer):
        self.trainer = trainer

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer._forget_estimate()  # what an interrupted step may have left

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer._install_estimate()


def _require_grad(parameters: list[nn.Parameter], value: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(value)
