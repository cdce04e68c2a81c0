"""`ZOCLTrainer`: the `Trainer` of transformers with zeroth-order layers."""

from __future__ import annotations

import inspect

from torch import nn
from transformers import Trainer

from .arguments import ZeroOrderArguments, ZOCLTrainingArguments
from .mixin import ZeroOrderMixin


_TRAINER_ARGUMENTS = tuple(inspect.signature(Trainer.__init__).parameters)[1:]


class ZOCLTrainer(ZeroOrderMixin, Trainer):
    """A `transformers.Trainer` whose zeroth-order layers learn from loss differences, all others by backpropagation.

    It takes the arguments of `Trainer`, in the same order, with `args` a `ZOCLTrainingArguments`. For everything else
    see `ZeroOrderMixin`; with `zo_branch="none"` it trains as a `Trainer` does.
    """

    def __init__(
        self, model: nn.Module | None = None, args: ZOCLTrainingArguments | None = None, *positional, **kwargs
    ):
        # By name, because another base may have arguments in between.
        if len(positional) > len(_TRAINER_ARGUMENTS) - 2:
            raise TypeError(f"{len(positional) + 2} positional arguments: Trainer takes {len(_TRAINER_ARGUMENTS)}.")
        named = dict(zip(_TRAINER_ARGUMENTS[2:], positional, strict=False))
        args = args if args is not None else ZOCLTrainingArguments(output_dir="tmp_trainer")
        if not isinstance(args, ZeroOrderArguments):
            raise TypeError(f"args: expected ZOCLTrainingArguments, got {type(args).__name__}.")
        super().__init__(model=model, args=args, **named, **kwargs)
