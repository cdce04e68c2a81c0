"""Decisions of one process for all processes of a launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments


def by_main_process(args: TrainingArguments, function: Callable[[], Any]) -> Any:
    """Call `function` in the main process and return its result in every process; every process calls this.

    Args:
        args: The training arguments, which know the processes.
        function: Called only in the main process.

    Raises:
        OSError, ValueError: If `function` raises one. The other processes raise a ValueError with the same text.
    """
    if args.world_size == 1:
        return function()
    outcome: list[Any] = [None, None]
    error = None
    if args.process_index == 0:
        try:
            outcome[0] = function()
        except (OSError, ValueError) as raised:
            error, outcome[1] = raised, str(raised)
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise error or ValueError(outcome[1])
    return outcome[0]
