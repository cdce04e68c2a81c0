"""`ZOCLTrainer`: the `Trainer` of transformers with zeroth-order layers."""

from __future__ import annotations

import inspect

from torch import nn
from transformers import Trainer

from .arguments import ZeroOrderArguments, ZOCLTrainingArguments
from .mixin import ZeroOrderMixin


_TRAINER_ARGUMENTS = tuple(inspect.signature(Trainer.__init__).parameters)[1:]


class ZOCLTrainer(ZeroOrderMixin, Trainer):
    """A `transformers.Trainer` whose zeroth-order layers learn by loss differences, all others by backpropagation.

    It takes the arguments of `Trainer`, in the same order, with `args` a `ZOCLTrainingArguments`. Everything else is
    `ZeroOrderMixin`'s; with `zo_branch="none"` this is a `Trainer`.
    """

    def __init__(
        self, model: nn.Module | None = None, args: ZOCLTrainingArguments | None = None, *positional, **kwargs
    ):
        # By name, for another base may have arguments in between.
        if len(positional) > len(_TRAINER_ARGUMENTS) - 2:
            raise TypeError(f"{len(positional) + 2} positional arguments: Trainer takes {len(_TRAINER_ARGUMENTS)}.")
        named = dict(zip(_TRAINER_ARGUMENTS[2:], positional, strict=False))
        args = args if args is not None else ZOCLTrainingArguments(output_dir="tmp_trainer")
        if not isinstance(args, ZeroOrderArguments):
            raise TypeError(f"args: expected ZOCLTrainingArguments, got {type(args).__name__}.")
        super().__init__(model=model, args=args, **named, **kwargs)
