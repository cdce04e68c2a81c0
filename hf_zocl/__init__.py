"""Zeroth- and first-order optimisation mixed per layer, and continual learning of CLIP, on Hugging Face's Trainer."""

from .trainer import ZOCLTrainer
from .training_args import ZOCLTrainingArguments
from .zo import LayerAssignment


__version__ = "0.1.0"

__all__ = ["LayerAssignment", "ZOCLTrainer", "ZOCLTrainingArguments"]
