"""Task checkpoints and their model cards."""

from .checkpoint import load_task_checkpoint, save_task_checkpoint
from .model_card import render_task_card


__all__ = ["load_task_checkpoint", "render_task_card", "save_task_checkpoint"]
