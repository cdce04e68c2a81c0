"""`ZeroOrderMixin`: any `transformers.Trainer`, with some layers trained by forward passes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.utils import logging

from ..passes import TowerPlan, find_towers, task_aware
from ..passes.structure import shadowed
from ..private_names import version
from ..zo import (
    ESTIMATORS,
    Evaluation,
    HybridOptimizer,
    LayerAssignment,
    ParameterSplit,
    ReplayLog,
    ReplaySettings,
    ZOEstimator,
    build_zo_optimizer,
)
from .arguments import PER_TOWER, ZeroOrderArguments
from .compat import accumulated_batches, put_first, scales_loss
from .data_parallel import DataParallelTrainer
from .differences import DEFAULT_EPS, DifferenceWatch
from .micro_batch import MicroBatch
from .objective import Objective, ObjectiveWatch, check_objective
from .pending import PendingEstimates
from .placement import check_placement
from .rates import check_schedule, chosen_rates, first_rates
from .replay_file import earlier_log, save_replay_log
from .resumable import ResumableTrainer


logger = logging.get_logger(__name__)

# If there are more zeroth-order parameters than this, in number and as a part of the model, they are streamed.
STREAMED_PARAMETERS = 1 << 24
STREAMED_FRACTION = 0.1
REPLAY_FILE = "zo_replay.safetensors"


class ZeroOrderMixin(ResumableTrainer, DataParallelTrainer):
    """Trains the zeroth-order layers from loss differences, and all other trainable parameters by backpropagation.

    A base class next to any Trainer, in either order, with arguments that have `ZeroOrderArguments` as a base:

        class ZOSFTTrainer(ZeroOrderMixin, SFTTrainer): ...

        @dataclass
        class ZOSFTConfig(ZeroOrderArguments, SFTConfig): ...

    `args.zo_branch` and `args.zo_layers` choose the layers. A zeroth-order estimate is made where the host calls the
    backward pass, and goes into `.grad` like a gradient; accumulation, schedulers, callbacks and checkpoints are the
    host's own. Its `training_step`, `compute_loss` and metrics run once per micro-batch. With `zo_branch="none"` it
    trains as the host does.

    Parameters that a subclass's optimizer trains and the model lacks, such as a loss's own classifier, are first-order
    whatever `zo_layers` says. A model with nothing to train can still evaluate and predict. Which parameters are
    zeroth-order is settled as a training begins. None of them requires a gradient from then on, so freezing one midway
    (`requires_grad_(False)` in a callback) does not stop its steps. Make it first-order instead, or train twice.

    An objective without a gradient can be learned as well: with `zo_objective` the zeroth-order layers learn from its
    values, and first-order layers, if any, from the loss. It is called with the loss in every pass, without gradient,
    and returns one number, or one for every example; lower is better. `inputs` are what `compute_loss` got, `outputs`
    what it returned. It can also be a method of a subclass:

        def zo_objective(self, model, inputs, outputs):
            return outputs.logits.argmax(-1) != inputs["labels"]

    Several processes train as one does (`DataParallelTrainer`), and a training that goes on from a checkpoint ends as
    one that never stopped (`ResumableTrainer`).

    Args:
        zo_objective: The objective. If a base that does not know it comes first, make it a method or an attribute.
        *positional, **kwargs: The host's.

    Attributes:
        split: Which parameters are zeroth-order and which first-order; None with `zo_branch="none"`.
        replay_log: The steps so far, if all parameters are zeroth-order and none is in half precision (see
            `ReplayLog`); else None.

    Raises:
        TypeError: If `args` has no `ZeroOrderArguments` as a base.
        ValueError: If the assignment does not fit the model, or an optimizer is passed in (choose `optim` and
            `zo_optim` instead).
    """

    zo_objective: Objective | None = None
    _estimator: ZOEstimator
    _watch: DifferenceWatch
    _plan: TowerPlan
    _hybrid: HybridOptimizer
    _assignment: LayerAssignment  # that the split was made from

    def __init__(self, *positional, zo_objective: Objective | None = None, **kwargs):
        super().__init__(*positional, **kwargs)  # in the host's own order
        args: Any = self.args
        if not isinstance(args, ZeroOrderArguments):
            raise TypeError(f"args: expected arguments with ZeroOrderArguments as a base, got {type(args).__name__}.")
        if zo_objective is not None:
            self.zo_objective = zo_objective
        self.split: ParameterSplit | None = None
        self._is_detached = False
        self._rule: tuple | None = None  # with which the optimizer was built
        self._estimates: PendingEstimates | None = None  # None until there is an optimizer
        self.replay_log: ReplayLog | None = None
        self._stepped: list[int] | None = None  # the weights' versions after the last logged step
        put_first(self, _InstallEstimate(self))  # callbacks that look at gradients must see the estimate
        if args.zo_branch == "none":
            self._check_objective()
            return
        if self.optimizer is not None or self.lr_scheduler is not None:
            raise ValueError(
                f"optimizers: {type(self).__name__} builds its own optimizer, over both groups of parameters, and the "
                "schedule: pass optim, zo_optim and lr_scheduler_type instead."
            )
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs in one process (nn.DataParallel) cannot have zeroth-order layers: start one "
                "process per GPU with `accelerate launch`, or show one GPU with CUDA_VISIBLE_DEVICES."
            )
        # A host may have made the model, or wrapped it in an adapter.
        if self.model is not None and any(parameter.requires_grad for parameter in self.model.parameters()):
            self._assign_layers()  # fail before any work
            self._check_objective()

    @property
    def _has_many_zo_parameters(self) -> bool:
        """Whether the zeroth-order parameters are too many to be copied: then they are streamed."""
        count = sum(parameter.numel() for parameter in self.split.zo_parameters)
        whole = sum(parameter.numel() for parameter in self.model.parameters())
        return count > STREAMED_PARAMETERS and count > STREAMED_FRACTION * whole

    @property
    def has_zo_parameters(self) -> bool:
        return self.split is not None and bool(self.split.zo)

    @property
    def _has_first_order(self) -> bool:
        return len(self._hybrid.parts) > 1

    def _split_is_current(self) -> bool:
        """Whether the split still fits the arguments and the trained parameters of the model.

        Between two calls of `train`, `model_init` may make a new model, parameters get frozen, and arguments change.
        """
        if self.split is None or self._assignment != self.args.layer_assignment:
            return False
        mine = {id(parameter) for parameter in self.model.parameters() if parameter.requires_grad}
        return mine == {id(parameter) for parameter in [*self.split.fo.values(), *self.split.zo_parameters]}

    def _detach_zo_parameters(self, value: bool) -> None:
        """Take the zeroth-order parameters out of autograd, or put them back."""
        for parameter in self.split.zo_parameters:
            parameter.requires_grad_(not value)
        self._is_detached = value

    def _check_objective(self) -> None:
        if self.zo_objective is not None:
            name = self.args.zo_estimator
            check_objective(self.zo_objective, name, ESTIMATORS[name].has_eps, self.has_zo_parameters)

    def _assign_layers(self) -> None:
        args: ZeroOrderArguments = self.args
        # Where ε is to be measured, that happens at the first step.
        eps = {name: eps or DEFAULT_EPS for name, eps in args.eps_by_branch.items()}
        self._assignment = args.layer_assignment
        self.split = self._assignment.split(self.model, eps)
        if self.split.zo and all(group.branch is None for group in self.split.zo):
            self._check_no_towers()
        check_placement(self.model)

    def _check_no_towers(self) -> None:
        """Refuse values per tower, which would apply to no layer."""
        for name in PER_TOWER:
            if isinstance(value := getattr(self.args, name), Mapping):
                raise ValueError(
                    f"{name}={dict(value)}: the zeroth-order layers of {type(self.model).__name__} are in no tower; "
                    "expected one value."
                )

    def train(self, *args, **kwargs):
        """`ResumableTrainer.train`; the zeroth-order parameters take no part in autograd while it runs."""
        try:
            return super().train(*args, **kwargs)
        except RuntimeError as error:
            if self._is_detached and not self._estimates and "does not require grad" in str(error):
                raise self._no_estimate() from error
            raise
        finally:
            if self._is_detached:
                self._detach_zo_parameters(False)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer over the first-order parameters, and `zo_optim` over the others, as one.

        From here on the zeroth-order parameters require no gradient, so that the first-order pass keeps no activation
        for them and data-parallel wrappers leave them alone.
        """
        if self._is_detached:  # called again within `train`, for example with a smaller batch
            self._detach_zo_parameters(False)
        else:
            self._stepped = None
        self.args._check_zero_order()  # a search sets arguments, with numbers as text where "auto" was
        if self.args.zo_branch == "none":
            if self.split is not None:  # from an earlier call, or trial of the search
                self.optimizer = self.split = self._estimates = self.replay_log = None
            self._check_objective()
            return super().create_optimizer(model)
        if not self._split_is_current():
            self._assign_layers()
            self.optimizer = None
        args = self.args
        rule = (args.zo_rule, args.zo_rule_momentum, args.zo_weight_decay, args.rates_by_branch, self.zo_objective)
        if rule != self._rule:  # arguments change between two calls of train
            self._rule, self.optimizer = rule, None
        self._check_objective()
        self._detach_zo_parameters(True)
        if self.optimizer is None:
            zo = build_zo_optimizer(
                self.split.zo, args.zo_rule, first_rates(args), args.zo_rule_momentum, args.zo_weight_decay
            )
            first_order = self._first_order_optimizer(model)
            # A subclass's may hold parameters of its own, although the model's are all zeroth-order.
            parts = [first_order, zo] if any(group["params"] for group in first_order.param_groups) else [zo]
            check_schedule(args, is_alone=len(parts) == 1)
            self._hybrid = self.optimizer = HybridOptimizer(*parts)
        module = self.accelerator.unwrap_model(self.model)
        self._estimator = ZOEstimator(
            self.split.zo,
            estimator=args.zo_estimator,
            queries=args.queries_by_branch,
            sign=self._goes_by_sign,
            seed=args.seed if args.zo_seed is None else args.zo_seed,
            reduce=self._average_over_ranks,
            model=self.model if self._has_many_zo_parameters else None,
            together=not find_towers(module),
        )
        watch = DifferenceWatch if self.zo_objective is None else ObjectiveWatch
        self._watch = watch(self._estimator, args.eps_by_branch, self.accelerator.mixed_precision)
        perturbations = self._estimator.perturbations.values()
        self._plan = TowerPlan(module, perturbations, self._average_over_ranks)
        self._estimates = PendingEstimates(self.split, self._estimator, self._hybrid, args.zo_max_grad_norm)
        # What half precision rounds away of a move depends on ε, which a log does not store.
        is_rounded = any(perturbation.is_rounded for perturbation in perturbations)
        # A second call of `train` goes on with the optimizer's state, and a second try with the steps of the first, of
        # which a new log knows nothing.
        is_replayable = not (self._has_first_order or is_rounded or self._hybrid.state or self._stepped)
        self.replay_log = ReplayLog(self._replay_settings()) if is_replayable else None
        return self.optimizer

    @property
    def _goes_by_sign(self) -> bool:
        args, formula = self.args, ESTIMATORS[self.args.zo_estimator]
        if formula.judges_steps and args.zo_rule == "sign":
            return True  # what is judged must be what will be applied
        if args.zo_sign is None:
            return self.zo_objective is not None and formula.has_scale and args.zo_rule == "sgd"
        return args.zo_sign

    def _first_order_optimizer(self, model: nn.Module | None) -> torch.optim.Optimizer:
        """The Trainer's, only over what requires a gradient: GaLore's and APOLLO's groups hold all parameters."""
        optimizer = super().create_optimizer(model)
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]
        return optimizer

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """The host's training step, with the zeroth-order estimate made where it calls the backward pass.

        So the host prepares its inputs, computes its loss and collects its metrics once per micro-batch. The further
        losses of the estimate leave no trace in the Trainer.

        Returns:
            The loss at θ, scaled for accumulation as the host scales it; detached.

        Raises:
            RuntimeError: If the host does not call `compute_loss` and `accelerator.backward`, once each.
        """
        if not self.has_zo_parameters:
            return super().training_step(model, inputs, num_items_in_batch)
        with ExitStack() as stack:
            scale = self._estimate_scale(num_items_in_batch)
            micro_batch = MicroBatch(self, stack, self.compute_loss, self.accelerator.backward, scale)
            stack.enter_context(shadowed(self, compute_loss=micro_batch.compute_loss))
            stack.enter_context(shadowed(self.accelerator, backward=micro_batch.backward))
            loss = super().training_step(model, inputs, num_items_in_batch)
        if micro_batch.estimate is None:
            raise self._no_estimate()
        self._watch.see(micro_batch.estimate)
        self._estimates.add(micro_batch.estimate, scale)
        for parameter in self.split.zo_parameters:
            if parameter.requires_grad:  # PEFT sets this whenever a loss enables its adapter again
                parameter.requires_grad_(False)
                parameter.grad = None
        return loss

    def _no_estimate(self) -> RuntimeError:
        return RuntimeError(
            f"{type(self).__name__}: its training_step made no zeroth-order estimate. One that overrides "
            "ZeroOrderMixin's must call super().training_step; one of a later base may instead call self.compute_loss "
            "and self.accelerator.backward, once each."
        )

    def _evaluation(self, micro_batch: MicroBatch) -> Evaluation:
        return micro_batch.make_evaluation()

    def _measure_differences(self, micro_batch: MicroBatch) -> None:
        micro_batch.measure_differences()
        count, is_alone = accumulated_batches(self), not self._has_first_order
        rates = chosen_rates(self.args, self._estimator, count, micro_batch.scale, is_alone)
        self._estimates.set_peak_rates(rates)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """`Trainer.log`, with the zeroth-order figures and a model's own (`TaskAware.extra_logs`) next to the loss."""
        is_of_training, estimates = "loss" in logs, self._estimates
        if is_of_training:
            if estimates is not None:
                logs.update(estimates.figures())
                logs.update(self._watch.logs())
            logs.update(task_aware(self.model).extra_logs())
        super().log(logs, start_time)
        if is_of_training and estimates is not None:
            self.state.log_history[-1].update(estimates.figures_by_layer())

    def _install_estimates(self) -> None:
        """Hand the estimate to the optimizer."""
        if not self._estimates:
            raise self._no_estimate()
        self._see_that_weights_stayed()
        taken = list(self._estimates)
        self._estimates.install()
        if self.replay_log is not None:
            self._installed = taken, self._gradients()

    def _gradients(self) -> list[tuple[int, int]]:
        """Which tensors the estimate stands in, and how often each was changed; none where it is streamed."""
        gradients = [parameter.grad for parameter in self.split.zo_parameters]
        return [(id(gradient), version(gradient)) for gradient in gradients if gradient is not None]

    def _take_note_of_step(self) -> None:
        """Log the step that was taken, for replay."""
        if self.replay_log is None or self.accelerator.optimizer_step_was_skipped:
            return
        taken, gradients = self._installed
        if self._gradients() != gradients:
            logger.warning("A callback has changed the zeroth-order estimate, so no log of the steps is kept.")
            self.replay_log = None
            return
        rates = list(self._estimates.learning_rates.values())
        self.replay_log.record(self.state.global_step, taken, rates)
        self._stepped = self._versions()

    def _versions(self) -> list[int]:
        return [version(parameter) for parameter in self.split.zo_parameters]

    def _see_that_weights_stayed(self) -> None:
        """Keep no log if anything but its steps has changed the weights, such as a callback that clips them."""
        writes = not self._estimator.formula.has_eps  # tangents are written into the parameters themselves
        if self.replay_log is not None and not writes and self._stepped not in (None, self._versions()):
            logger.warning("The weights were changed between two steps, so no log of the steps is kept.")
            self.replay_log = None

    def _replay_settings(self) -> ReplaySettings:
        args, estimator = self.args, self._estimator
        return ReplaySettings(
            queries=tuple(estimator.queries.items()),
            seed=estimator.seed,
            sign=estimator.sign,
            optimizer=args.zo_rule,
            momentum=args.zo_rule_momentum,
            weight_decay=args.zo_weight_decay,
            max_norm=args.zo_max_grad_norm,
            streamed=estimator.is_streamed,
        )

    # Hooks of the two bases.

    @property
    def _gradient_free_parameters(self) -> Sequence[nn.Parameter]:
        return self.split.zo_parameters if self.split is not None else []

    @property
    def _foreign_parameters(self) -> Sequence[nn.Parameter]:
        groups = self._hybrid.param_groups if self._estimates is not None else []
        own = {id(parameter) for parameter in self.model.parameters()}
        return [parameter for group in groups for parameter in group["params"] if id(parameter) not in own]

    @property
    def _leaves_out_frozen(self) -> bool:
        return self.args.zo_branch != "none" or super()._leaves_out_frozen

    def _save_progress(self, folder: Path) -> None:
        super()._save_progress(folder)
        if self.args.should_save and self._estimates is not None:
            self._watch.save(folder)
            self._see_that_weights_stayed()
        if self.replay_log is not None and self.args.should_save:
            save_replay_log(self.replay_log, folder / REPLAY_FILE)

    def _restore_progress(self, folder: Path) -> None:
        super()._restore_progress(folder)
        if self._estimates is not None:
            self._watch.load(folder)
        self._take_log_of(folder)

    def _has_loaded_best(self, folder: Path) -> None:
        super()._has_loaded_best(folder)
        self._stepped = None
        self._take_log_of(folder)

    def _take_log_of(self, folder: Path) -> None:
        """Go on with the log of the steps that led to a checkpoint."""
        if self.replay_log is not None:
            self.replay_log = earlier_log(folder / REPLAY_FILE, self._replay_settings())

    def _estimate_scale(self, num_items_in_batch: torch.Tensor | int | None) -> float:
        """The scale of a micro-batch's estimate: the factor by which the Trainer multiplies its loss."""
        # A quotient of losses has no scale of its own, and an objective counts no items.
        is_as_loss = self._estimator.formula.has_scale and self.zo_objective is None
        is_summed = is_as_loss and scales_loss(self, num_items_in_batch)
        return 1.0 if is_summed else 1.0 / accumulated_batches(self)

    def _average_over_ranks(self, losses: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(losses, "mean") if self.accelerator.num_processes > 1 else losses


class _InstallEstimate(TrainerCallback):
    """Installs the estimate between the Trainer's clipping, which must not see it, and `optimizer.step`."""

    def __init__(self, trainer: ZeroOrderMixin):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if self.trainer.has_zo_parameters and self.trainer._estimates is None:
            raise RuntimeError(
                f"{type(self.trainer).__name__}: its create_optimizer does not call super().create_optimizer, which "
                "adds the zeroth-order rule."
            )
        self._clear_foreign_gradients()

    def on_step_begin(self, args, state, control, **kwargs):
        if self.trainer._estimates is not None:
            self.trainer._estimates.clear()  # what an interrupted step may have left

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.trainer.has_zo_parameters:
            self.trainer._install_estimates()

    def on_step_end(self, args, state, control, **kwargs):
        self._clear_foreign_gradients()

    def on_train_end(self, args, state, control, **kwargs):
        if self.trainer.has_zo_parameters:
            self.trainer._see_that_weights_stayed()

    def _clear_foreign_gradients(self) -> None:
        for parameter in self.trainer._foreign_parameters:  # the Trainer clears only the model's
            parameter.grad = None

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.trainer._take_note_of_step()
