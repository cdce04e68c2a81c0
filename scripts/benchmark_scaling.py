"""What several processes send each other in a step, and how long a step takes; see docs/scaling.md.

Measured for a few processes on this machine, with the embedded mini CLIP; then carried on by arithmetic to many ranks
and slow links. `scripts/benchmark.py --scaling` runs it.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from transformers import AutoProcessor, CLIPModel, TrainerCallback

from hf_zocl import ZOCLTrainer, ZOCLTrainingArguments
from hf_zocl.hub.checkpoint import write_json
from hf_zocl.models import AdapterArguments, CLIPClassifier, add_adapter
from hf_zocl.sample import sample_path


METHODS = {
    "FO-DDP": {"zo_branch": "none"},
    "hybrid": {"zo_branch": "dual", "zo_layers": "hop-even"},
    "all-ZO": {"zo_branch": "dual", "zo_layers": "all"},
}
COLOURS = {"FO-DDP": "#D55E00", "hybrid": "#009E73", "all-ZO": "#0072B2"}
WARM_UP, STEPS, BATCH = 3, 12, 16


class CountingGroup(dist.ProcessGroup):
    """A gloo process group that counts the bytes handed to it: what one rank gives to collectives, headers left out.

    It counts at the lowest place that DDP's own reducer goes through as well.
    """

    def __init__(self, store, rank: int, size: int, timeout):
        super().__init__(rank, size)
        self.inner = dist.ProcessGroupGloo(store, rank, size, timeout)
        self.payload: dict[str, list[int]] = {}

    def count(self, name: str, tensors: Any) -> None:
        flat = [t for part in tensors for t in (part if isinstance(part, list) else [part])]
        self.payload.setdefault(name, []).append(sum(t.numel() * t.element_size() for t in flat))

    def getBackendName(self) -> str:
        return "counting"

    def allreduce(self, tensors, opts=None):
        self.count("all_reduce", tensors)
        return self.inner.allreduce(tensors, opts or dist.AllreduceOptions())

    def broadcast(self, tensors, opts=None):
        self.count("broadcast", tensors)
        return self.inner.broadcast(tensors, opts or dist.BroadcastOptions())

    def allgather(self, outputs, inputs, opts=None):
        self.count("all_gather", inputs)
        return self.inner.allgather(outputs, inputs, opts or dist.AllgatherOptions())

    def barrier(self, opts=None):
        return self.inner.barrier(opts or dist.BarrierOptions())


def start_counting() -> CountingGroup:
    """Make a `CountingGroup` this process's default group, where a launcher started it."""
    dist.Backend.register_backend("counting", CountingGroup, devices=["cpu"])
    dist.init_process_group("counting")
    return dist.group.WORLD


if __name__ == "__main__":
    g = start_counting()
    print(type(g))
    x = torch.ones(3); dist.all_reduce(x); print(x, g.payload)
    m = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4,4))
    print(g.payload); g.payload.clear()
    m(torch.ones(2,4)).sum().backward()
    print(g.payload)
    dist.barrier()
