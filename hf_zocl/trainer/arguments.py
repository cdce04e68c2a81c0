"""The zeroth-order arguments: as a base for those of any Trainer, and together with `transformers.Trainer`'s."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments

from ..checks import WrongTypeError, check_fields, check_finite, shown
from ..zo import LayerAssignment
from ..zo.assignment import BRANCHES, LAYER_SCHEMES
from ..zo.estimator import ESTIMATORS
from ..zo.optimizer import ZO_OPTIMIZERS
from .ranges import check_ranges


HUB_STRATEGIES = ("every_task", "end", "every_save", "checkpoint", "all_checkpoints")
TOWERS = ("vision", "language")
# What may be set for each tower separately, and the type of its values.
PER_TOWER = {"zo_queries": int, "zo_eps": float, "zo_learning_rate": float}
MEASURED = ("zo_eps", "zo_learning_rate")  # where `auto` is a value


def _choices(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown: expected one of {', '.join(choices)}.")


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1", "yes")


_WHY_NOT = {
    "FSDP": "every loss would gather all weights again, (queries + 1) times the model's bytes a step, and its "
    "parameters are shards, to which no estimate is written. A frozen base can be sharded by torch's "
    "fully_shard.",
    "DeepSpeed": "its engine owns the gradients and the optimizer's step, and never sees an estimate in .grad.",
    "parallelism_config": "ranks that hold parts of one model would each perturb their own part in a different way.",
}


if TYPE_CHECKING:
    OnePerTower = float | str | Mapping[str, float | str]
    Layers = str | int | list[int] | list[str]
else:
    # For HfArgumentParser: a command line may say "auto" or "vision=2,language=16".
    OnePerTower = str
    Layers = str | list[str]


@dataclass(repr=False, kw_only=True)  # the repr of TrainingArguments shows no token
class ZeroOrderArguments:
    """Arguments of the zeroth-order (ZO) side of a training, a base class next to any `TrainingArguments`.

        @dataclass
        class ZOSFTConfig(ZeroOrderArguments, SFTConfig): ...

    `learning_rate`, `optim`, `weight_decay`, `max_grad_norm` and the like apply to the first-order (FO) parameters,
    the arguments below to the zeroth-order ones; `lr_scheduler_type` and `warmup_steps` apply to both.

    Args:
        zo_branch: Where the zeroth-order layers are: `none`, `vision`, `language` or `dual` (every tower).
        zo_layers: Which layers of the branch: `all`, `hop-odd`, `hop-even`, `prefix-N`, `suffix-N`, a list of layer
            numbers counted from 1, stack by stack, or a list of regular expressions over parameter names
            (`LayerAssignment`).
        zo_estimator: `one-sided` (equation 2 of arXiv 2506.12409), `two-sided` (SPSA), `conservative`, `fzoo` or
            `forward-gradient` (the derivative along the direction, without ε; twice the memory of inference).
        zo_queries: Directions per branch and step; their estimates are averaged. Use many where a pass is cheap. This,
            `zo_eps` and `zo_learning_rate` take one value, or one per tower: `vision=2,language=16`, or a mapping.
        zo_eps: ε, the size of the perturbation; `auto` measures the rounding noise of the loss as a training begins,
            and takes the ε at which truncation and rounding are least.
        zo_sign: Step by the sign of the estimate, not by its magnitude (MoZO). Default: on where the size of a step
            would follow the scale of a `zo_objective`, which says nothing about that of the weights.
        zo_optim: `sign` (of the momentum: every weight moves by the learning rate, whatever the scale of the loss),
            `sgd` or `adamw`; default: `sign`, but `sgd` with `fzoo`, whose steps do not depend on that scale.
        zo_learning_rate: The peak learning rate of the zeroth-order parameters; `auto` takes it from the slope and
            the curvature of the loss along random directions, measured as a training begins (`hf_zocl.zo.rates`).
            Where nothing is measured, with `forward-gradient` or a `zo_objective`, it is 3e-4.
        zo_momentum: Momentum of `sgd` and `sign`; default: 0.9 with `sign`, but 0 where `conservative` judges its
            steps, and 0 with `sgd`.
        zo_weight_decay: Weight decay of the zeroth-order parameters.
        zo_max_grad_norm: Clips the zeroth-order estimate, separately from the first-order gradient; 0 does not clip.
        zo_seed: Keys the directions; default `seed`.

    Raises:
        TypeError: If a value has a type that it cannot have.
        ValueError: If a choice is unknown or a number is out of its range, which the message names; or if FSDP,
            DeepSpeed or another sharding of the model is asked for, which zeroth-order layers cannot have.
    """

    zo_branch: str = field(default="dual", metadata={"help": f"Zeroth-order branch: {', '.join(BRANCHES)}."})
    zo_layers: Layers = field(
        default_factory=lambda: "hop-even",  # HfArgumentParser reads a list's default only from its factory
        metadata={"help": f"Zeroth-order layers: {', '.join(LAYER_SCHEMES)}, numbers from 1, or regular expressions."},
    )
    zo_estimator: str = field(default="one-sided", metadata={"help": f"Estimator: {', '.join(ESTIMATORS)}."})
    zo_queries: OnePerTower = field(
        default=1, metadata={"help": "Directions per branch and step; or vision=2,language=16."}
    )
    zo_eps: OnePerTower = field(default="auto", metadata={"help": "Size of the perturbation, or auto: measured."})
    zo_sign: bool | None = field(
        default=None, metadata={"help": "Step by the sign of the estimate (MoZO); default: with a zo_objective."}
    )
    zo_optim: str | None = field(
        default=None,
        metadata={"help": f"Zeroth-order rule: {', '.join(ZO_OPTIMIZERS)}; default: sign, with fzoo sgd."},
    )
    zo_learning_rate: OnePerTower = field(
        default="auto", metadata={"help": "Peak learning rate of the zeroth-order rule, or auto: measured."}
    )
    zo_momentum: float | None = field(
        default=None, metadata={"help": "Momentum of zo_optim=sgd (default: 0) and sign (default: 0.9)."}
    )
    zo_weight_decay: float = field(default=0.0, metadata={"help": "Weight decay of the zeroth-order parameters."})
    zo_max_grad_norm: float = field(default=0.0, metadata={"help": "Clips the zeroth-order estimate; 0: no clipping."})
    zo_seed: int | None = field(default=None, metadata={"help": "Seed of the directions; default: seed."})

    def __init_subclass__(cls, **kwargs: Any):
        """Check these arguments first, in any order of bases: a host's `__post_init__` may not call `super`."""
        super().__init_subclass__(**kwargs)
        own = vars(cls).get("__post_init__")

        def __post_init__(self) -> None:
            self._check_zero_order()
            if own is not None:
                own(self)
            elif hasattr(super(cls, self), "__post_init__"):
                super(cls, self).__post_init__()

        cls.__post_init__ = __post_init__

    def _check_zero_order(self) -> None:
        """Normalise arguments that may be given in several forms, and refuse invalid ones; may be called again."""
        own = [each.name for each in fields(ZeroOrderArguments)]
        check_fields(self, own, but=("zo_layers", *PER_TOWER, "zo_eps_vision", "zo_eps_language"))
        self.zo_layers = parse_layers(self.zo_layers)
        LayerAssignment(self.zo_branch, self.zo_layers)  # an unknown branch or scheme fails here
        _choices("zo_estimator", self.zo_estimator, ESTIMATORS)
        if self.zo_optim is not None:
            _choices("zo_optim", self.zo_optim, ZO_OPTIMIZERS)
        for name in PER_TOWER:
            setattr(self, name, self._per_tower(name))
        least = ESTIMATORS[self.zo_estimator].least_queries
        for name, value in self._values("zo_queries"):
            if value < least:
                raise ValueError(
                    f"{name}={value!r}: zo_estimator={self.zo_estimator!r} needs an integer of at least {least}."
                )
        for name, value in self._values("zo_eps"):
            if value != "auto" and not 0 < value < float("inf"):
                raise ValueError(f"{name}={value}: the size of the perturbation must be greater than 0.")
        others = [(name, getattr(self, name)) for name in ("zo_momentum", "zo_weight_decay", "zo_max_grad_norm")]
        for name, value in [*self._values("zo_learning_rate"), *others]:
            if value not in (None, "auto") and not value >= 0:
                raise ValueError(f"{name}={value}: expected 0 or more.")
        if self.zo_momentum is not None and self.zo_momentum >= 1:
            raise ValueError(
                f"zo_momentum={self.zo_momentum}: expected less than 1, or a step's effect would never fade."
            )
        if self.zo_branch != "none" and ESTIMATORS[self.zo_estimator].judges_steps:
            self._check_judged_step()
        if self.zo_branch != "none" and self.sharding is not None:
            raise ValueError(
                f"{self.sharding} cannot train zeroth-order layers (zo_branch={self.zo_branch!r}): "
                f"{_WHY_NOT[self.sharding]} Use data parallelism, which sends a few numbers a step and keeps no state "
                "of the frozen weights (docs/scaling.md), or zo_branch='none'."
            )
        if self.zo_branch != "none" and ("lomo" in self.optim or "layerwise" in self.optim):
            raise ValueError(f"optim={self.optim!r} steps within the backward pass, before the zeroth-order losses.")

    @property
    def sharding(self) -> str | None:
        """The sharding that an argument or the launcher asks for: `FSDP`, `DeepSpeed` or `parallelism_config`."""
        asked = {
            "FSDP": self.fsdp or _is_on("ACCELERATE_USE_FSDP"),
            "DeepSpeed": self.deepspeed or _is_on("ACCELERATE_USE_DEEPSPEED"),
            "parallelism_config": self.parallelism_config or _is_on("ACCELERATE_USE_PARALLELISM_CONFIG"),
        }
        return next((name for name, value in asked.items() if value), None)

    def _per_tower(self, name: str) -> Any:
        """Read one value, or one for each tower as a mapping; a tower that is not named has the default."""
        given, kind, words = getattr(self, name), PER_TOWER[name], ("auto",) if name in MEASURED else ()
        by_tower = given
        if isinstance(given, str) and "=" in given:
            by_tower = dict(part.strip().split("=", 1) if "=" in part else (part, None) for part in given.split(","))
        if not isinstance(by_tower, Mapping):
            return _number(name, given, kind, words)
        if not by_tower or set(by_tower) - set(TOWERS) or None in by_tower.values():
            raise ValueError(
                f"{name}={shown(given)}: expected one value, or one for each tower, such as vision=…,language=…."
            )
        default = ZeroOrderArguments.__dataclass_fields__[name].default
        return {tower: _number(f"{name} ({tower})", by_tower.get(tower, default), kind, words) for tower in TOWERS}

    def _values(self, name: str) -> list[tuple[str, Any]]:
        """The values of an argument that may have one for each tower, with their names."""
        value = getattr(self, name)
        if not isinstance(value, Mapping):
            return [(name, value)]
        return [(f"{name} ({tower})", own) for tower, own in value.items()]

    def _check_judged_step(self) -> None:
        """Refuse any step but those that the estimator judges: plain SGD steps along one micro-batch's estimate."""
        others = {
            "zo_max_grad_norm": (0.0, "it judges its steps unclipped"),
            "zo_momentum": (0.0, "it judges a step without what earlier ones add to it"),
            "zo_weight_decay": (0.0, "it judges a step without decay"),
            "gradient_accumulation_steps": (1, "it judges the step of one micro-batch"),
        }
        for name, (expected, why) in others.items():
            if getattr(self, name) not in (None, expected):
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: zo_estimator='conservative' applies the step that it has "
                    f"judged, and {why}; expected {expected}."
                )
        if self.zo_optim == "adamw":
            raise ValueError(
                "zo_optim='adamw': zo_estimator='conservative' applies the step that it has judged, which is one of "
                "SGD or of its sign; expected 'sgd' or 'sign'."
            )

    @property
    def zo_rule(self) -> str:
        """`zo_optim`, or the one that suits the estimator."""
        return self.zo_optim or ("sign" if ESTIMATORS[self.zo_estimator].has_scale else "sgd")

    @property
    def zo_rule_momentum(self) -> float:
        """`zo_momentum`, or the one that suits the rule."""
        if self.zo_momentum is not None:
            return self.zo_momentum
        return 0.9 if self.zo_rule == "sign" and not ESTIMATORS[self.zo_estimator].judges_steps else 0.0

    @property
    def eps_by_branch(self) -> dict[str | None, float | None]:
        """ε of each tower; None where it is to be measured."""
        return self._by_branch("zo_eps")

    @property
    def queries_by_branch(self) -> dict[str | None, int]:
        """The number of queries of each tower; the key None stands for the only tower of a model."""
        return self._by_branch("zo_queries")

    @property
    def rates_by_branch(self) -> dict[str | None, float | None]:
        """The peak zeroth-order learning rate of each tower; None where it is to be measured."""
        return self._by_branch("zo_learning_rate")

    def _by_branch(self, name: str) -> dict[str | None, Any]:
        """An argument's value by branch; the key None stands for a model's only branch, the value None for `auto`."""
        value = getattr(self, name)
        if not isinstance(value, Mapping):
            value = dict.fromkeys((None, *TOWERS), value)
        value = {None: ZeroOrderArguments.__dataclass_fields__[name].default, **value}
        return {branch: None if own == "auto" else own for branch, own in value.items()}

    @property
    def layer_assignment(self) -> LayerAssignment:
        return LayerAssignment(self.zo_branch, self.zo_layers)


@dataclass(repr=False)
class ZOCLTrainingArguments(ZeroOrderArguments, TrainingArguments):
    """Arguments of a run that mixes zeroth-order and first-order optimisation: those of both bases.

    Args:
        hub_strategy: What `push_to_hub` pushes of a stream of tasks (docs/hub.md): the checkpoint of every task
            (`every_task`), only the last one (`end`), or every task's and also what is saved within a task, as the
            Trainer does: `every_save`, `checkpoint`, `all_checkpoints`. Outside a stream `every_task` is `every_save`.

    Raises:
        TypeError: If a value has a type that it cannot have.
        ValueError: As `ZeroOrderArguments`; or if several processes were started that do not know of one another.
    """

    hub_strategy: str = field(default="every_task", metadata={"help": f"What to push: {', '.join(HUB_STRATEGIES)}."})

    def __post_init__(self):
        # HfArgumentParser gives None for `debug`.
        check_fields(self, but=("debug", "fsdp", *(each.name for each in fields(ZeroOrderArguments))))
        check_ranges(self)
        started = int(os.environ.get("WORLD_SIZE", 1))
        is_on_cpu = self.use_cpu or _is_on("ACCELERATE_USE_CPU")
        if started > 1 and not is_on_cpu and not torch.accelerator.is_available():
            raise ValueError(
                f"{started} processes were started, but without an accelerator they would train {started} separate "
                "models: on CPUs, pass --use_cpu."
            )
        hub_strategy = self.hub_strategy
        _choices("hub_strategy", hub_strategy, HUB_STRATEGIES)
        self.hub_strategy = "every_save"  # the Trainer's own enumeration is closed, and compares as text
        super().__post_init__()
        self.hub_strategy = str(getattr(hub_strategy, "value", hub_strategy))


def _number(name: str, value: Any, kind: type, words: tuple[str, ...]) -> Any:
    """Read a number, given as such or as text, or one of the words."""
    if value in words:
        return value
    try:
        number = kind(value)
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or isinstance(value, bool) or not (isinstance(value, str) or number == value):
        expected = "an integer" if kind is int else "a number"
        raise ValueError(f"{name}={shown(value)}: expected {' or '.join([expected, *words])}.")
    check_finite(name, number)
    return number


def parse_layers(layers: str | int | list) -> str | list[int] | list[str]:
    """Read `zo_layers` as a recipe or a command line gives it: `["hop-even"]`, `"2,4"`, `["2", "4"]`, `[2, 4]`."""
    items = list(layers) if isinstance(layers, (list, tuple)) else [layers]
    if not items or not all(isinstance(item, (str, int)) and not isinstance(item, bool) for item in items):
        raise WrongTypeError(f"zo_layers={shown(layers)}: expected a scheme, layer numbers or regular expressions.")
    if len(items) == 1 and isinstance(items[0], str) and all(part.strip().isdigit() for part in items[0].split(",")):
        items = items[0].split(",")
    if items and all(str(item).strip().isdigit() for item in items):
        return [int(item) for item in items]
    # A command line gives a list even for one scheme; no parameter's name has a hyphen, so that is no expression.
    is_scheme = len(items) == 1 and (
        isinstance(layers, str) or items[0] == "all" or re.fullmatch(r"[a-z]+-\w*", str(items[0]))
    )
    return items[0] if is_scheme else items
