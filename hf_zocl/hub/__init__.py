"""Task checkpoints and their model cards."""

from .checkpoint import load_task_checkpoint, save_task_checkpoint, write_task_card
from .model_card import render_task_card
from .seal import seal, seal_task_checkpoint


__all__ = [
    "load_task_checkpoint",
    "render_task_card",
    "save_task_checkpoint",
    "seal",
    "seal_task_checkpoint",
    "write_task_card",
]
