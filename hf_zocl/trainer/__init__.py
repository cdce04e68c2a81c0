"""Zeroth-order training in any `transformers.Trainer`."""

from .arguments import ZeroOrderArguments, ZOCLTrainingArguments
from .factory import zeroth_order
from .mixin import ZeroOrderMixin
from .zocl_trainer import ZOCLTrainer


__all__ = ["ZOCLTrainer", "ZOCLTrainingArguments", "ZeroOrderArguments", "ZeroOrderMixin", "zeroth_order"]
