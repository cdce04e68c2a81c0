"""A task's checkpoint, on disk and on the Hub."""

from .card import render_task_card
from .checkpoint import save_task_checkpoint, seal_task_checkpoint, write_task_card
from .load import load_task_checkpoint
from .repository import fetch_run


__all__ = [
    "fetch_run",
    "load_task_checkpoint",
    "render_task_card",
    "save_task_checkpoint",
    "seal_task_checkpoint",
    "write_task_card",
]
