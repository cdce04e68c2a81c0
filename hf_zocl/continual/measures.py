"""The cost and the environment of a run: memory, versions, and what a training logged."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from math import isfinite
from pathlib import Path

import numpy as np
import torch


_PACKAGES = ("hf_zocl", "torch", "transformers", "peft", "datasets", "accelerate", "huggingface_hub")


def means(log_history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of every figure logged while a task was trained, over the entries in which it is finite."""
    logged: dict[str, list[float]] = {}
    for entry in (entry for entry in log_history if "loss" in entry):
        for name in sorted(name for name in entry if name == "loss" or name.startswith("zo_")):
            if isfinite(entry[name]):
                logged.setdefault(name, []).append(entry[name])
    return {name: float(np.mean(values)) for name, values in logged.items()}


def curves(log_history: Sequence[Mapping[str, float]], points: int = 200) -> dict[str, list[float | None]]:
    """The figures logged while a task was trained, as curves: `step`, `loss` and the zeroth-order figures.

    Args:
        log_history: The Trainer's log history.
        points: The most points of a curve; in a longer log, each point is the mean of consecutive entries.

    Returns:
        Name → values, rounded to six digits; None where a figure was not logged, or is not finite. The last entry is
        the task's last step, of which the Trainer logs only a summary.
    """
    entries = [entry for entry in log_history if "loss" in entry]
    names = ["step", "loss", *sorted({name for entry in entries for name in entry if name.startswith("zo_")})]
    parts = [part for part in np.array_split(np.arange(len(entries)), min(points, len(entries)) or 1) if len(part)]

    def mean(name: str, part: np.ndarray) -> float | None:
        values = [entries[i][name] for i in part if name in entries[i] and isfinite(entries[i][name])]
        return float(f"{np.mean(values):.6g}") if values else None

    found = {name: [mean(name, part) for part in parts] for name in names}
    last = max((entry.get("step", 0) for entry in log_history), default=0)
    if last and found["step"][-1:] != [last]:
        found = {name: [*values, float(last) if name == "step" else None] for name, values in found.items()}
    return found


def reset_peak_memory() -> None:
    """Reset the peak, so that it does not include an earlier run of the same process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    # Only Linux can reset a process's peak; elsewhere the peak is over all runs of the process so far.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes() -> int:
    """The run's peak memory so far in bytes: memory allocated on the accelerator, or resident memory on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # not on Windows
        import psutil

        return psutil.Process().memory_info().peak_wset
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}
