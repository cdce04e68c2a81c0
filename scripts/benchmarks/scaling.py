"""The bytes that processes send each other in a step, and the time that a step takes; see docs/scaling.md.

They are measured for a few processes on this machine, with the embedded mini CLIP, and calculated for many ranks and
slow links. `scripts/benchmarks/peers.py --scaling` runs it.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from transformers import AutoProcessor, CLIPModel, TrainerCallback

from hf_zocl import ZOCLTrainer, ZOCLTrainingArguments
from hf_zocl.commands import command
from hf_zocl.files import write_json
from hf_zocl.models import AdapterArguments, CLIPClassifier, add_adapter
from hf_zocl.sample import sample_path
from hf_zocl.trainer.data_parallel import leave_process_group


METHODS = {
    "FO-DDP": {"zo_branch": "none"},
    "hybrid": {"zo_branch": "dual", "zo_layers": "hop-even"},
    "all-ZO": {"zo_branch": "dual", "zo_layers": "all"},
}
COLOURS = {"FO-DDP": "#D55E00", "hybrid": "#009E73", "all-ZO": "#0072B2"}
WARM_UP, STEPS, BATCH = 3, 20, 16
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Link:
    """The link between any two ranks: bytes per second, and the seconds until the first byte arrives."""

    name: str
    bandwidth: float
    latency: float

    def all_reduce(self, size: int, ranks: int) -> float:
        """Seconds of an all-reduce by recursive halving and doubling (Rabenseifner 2004).

        There are 2·⌈log₂ N⌉ messages one after another, in which every rank sends 2·(N−1)/N times the payload.
        """
        if ranks == 1 or size == 0:
            return 0.0
        return 2 * math.ceil(math.log2(ranks)) * self.latency + 2 * (ranks - 1) / ranks * size / self.bandwidth


# Ethernet within a rack; and homes or clouds far apart, 20 ms one way, 100 Mbit/s.
LINKS = (Link("10 Gbit/s", 1.25e9, 50e-6), Link("internet, 20 ms", 12.5e6, 20e-3))


@dataclass(frozen=True)
class Job:
    """The sizes of a model's adapter.

    Args:
        adapter: How many trainable parameters it has.
        zeroth_order: How many of them are zeroth-order in the hybrid.
        queries: Queries per step, in both branches together.
    """

    name: str
    adapter: int
    zeroth_order: int
    queries: int = 2

    def messages(self, method: str) -> list[int]:
        """The bytes of a step's all-reduces: gradients in float32, and L(θ) with the queries' losses."""
        first_order = {"FO-DDP": self.adapter, "hybrid": self.adapter - self.zeroth_order, "all-ZO": 0}[method]
        losses = 0 if method == "FO-DDP" else 1 + self.queries
        return [4 * count for count in (first_order, losses) if count]


# ViT-B/16: 12 blocks per tower, widths 768 and 512. LoRA of rank 8 on q and v; two experts of 64 units and a router.
_LORA = 12 * 2 * 2 * 8 * (768 + 512)
_MOE = 12 * sum(2 * (2 * 64 * width + 64 + width) + 4 * width for width in (768, 512))
JOBS = (
    Job("ViT-B/16, LoRA", _LORA, _LORA // 2),
    Job("ViT-B/16, MoE adapters", _MOE, _MOE // 2),
    Job("ViT-B/16, all weights", 149_620_737, 149_620_737 // 2),
)


class CountingGroup(dist.ProcessGroup):
    """A gloo process group that counts the bytes that this rank hands to collectives, without headers.

    It counts at a level so low that DDP's own reducer passes through it too.
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
    """Make a `CountingGroup` the default group of this process, which a launcher started."""
    dist.Backend.register_backend("counting", CountingGroup, devices=["cpu"])
    dist.init_process_group("counting")
    return dist.group.WORLD


# Measuring, in the processes that torchrun starts.


class Watch(TrainerCallback):
    """Records the time and the bytes of every step, without the Trainer's own gathering of the loss for its log."""

    def __init__(self, group: CountingGroup):
        self.group, self.seconds, self.bytes = group, [], []

    def on_step_begin(self, *args, **kwargs):
        self.group.payload.clear()
        self.start = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        self.seconds.append(time.perf_counter() - self.start)
        self.bytes.append(sum(size for sizes in self.group.payload.values() for size in sizes))


def measure(group: CountingGroup) -> dict[str, dict[str, float]]:
    """Bytes and seconds of a step of every method; the batch per process is the same for any number of processes."""
    folder = sample_path("mini-clip")
    figures = {}
    for method, options in METHODS.items():
        torch.manual_seed(0)
        clip = add_adapter(CLIPModel.from_pretrained(folder), AdapterArguments())
        model = CLIPClassifier(clip, AutoProcessor.from_pretrained(folder).tokenizer, ["cat", "dog", "ship"])
        examples = [
            {"pixel_values": torch.randn(3, 32, 32), "labels": number % 3}
            for number in range(BATCH * dist.get_world_size())
        ]
        with tempfile.TemporaryDirectory() as output_dir:
            args = ZOCLTrainingArguments(
                output_dir=output_dir,
                use_cpu=True,
                max_steps=WARM_UP + STEPS,
                per_device_train_batch_size=BATCH,
                learning_rate=1e-4,
                zo_learning_rate=1e-5,
                logging_steps=1000,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
                ddp_find_unused_parameters=False,
                **options,
            )
            watch = Watch(group)
            trainer = ZOCLTrainer(model=model, args=args, train_dataset=examples, callbacks=[watch])
            trainable = [p.numel() for p in model.parameters() if p.requires_grad]
            trainer.train()
        figures[method] = {
            "bytes": watch.bytes[-1],
            "seconds": statistics.median(watch.seconds[WARM_UP:]),
            "adapter": sum(trainable),
            "first_order": sum(trainable)
            if trainer.split is None
            else sum(p.numel() for p in trainer.split.fo.values()),
        }
    return figures


def measure_with(processes: int) -> dict[str, dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "figures.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        done = subprocess.run(
            [*command, __file__, str(output)], capture_output=True, text=True, env=environment, check=False
        )
        if done.returncode:
            sys.exit(f"error: the measurement with {processes} processes failed:\n{done.stderr}")
        return json.loads(output.read_text())


# Calculating and showing.


def step_seconds(job: Job, method: str, link: Link, ranks: int, compute: float) -> float:
    """A step's time if no communication overlaps with computation."""
    return compute + sum(link.all_reduce(size, ranks) for size in job.messages(method))


def format_measured(measured: dict[int, dict[str, dict[str, float]]]) -> str:
    lines = [
        "| method | bytes a step | "
        + " | ".join(f"{count} process{'es' if count > 1 else ''}" for count in measured)
        + " |"
    ]
    lines += ["|---" * (2 + len(measured)) + "|"]
    for method in METHODS:
        sizes = max(figures[method]["bytes"] for figures in measured.values())
        times = " | ".join(f"{1e3 * figures[method]['seconds']:.0f} ms" for figures in measured.values())
        lines.append(f"| {method} | {sizes:,} | {times} |")
    return "\n".join(lines)


def format_reckoned(compute: float) -> str:
    lines = ["| job | method | bytes a step |" + "".join(f" {link.name}, 1,024 ranks |" for link in LINKS)]
    lines += ["|---" * (3 + len(LINKS)) + "|"]
    for job in JOBS:
        for method in METHODS:
            cells = []
            for link in LINKS:
                seconds = step_seconds(job, method, link, 1024, compute)
                cells.append(f" {seconds - compute:.3g} s, {compute / seconds:.0%} busy |")
            lines.append(f"| {job.name} | {method} | {sum(job.messages(method)):,} |" + "".join(cells))
    return "\n".join(lines)


def draw(job: Job, compute: float, path: Path) -> None:
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, *others = figure.subplots(1, 1 + len(LINKS), width_ratios=[0.7, 1, 1])
    sizes = [sum(job.messages(method)) for method in METHODS]
    left.bar(list(METHODS), sizes, color=[COLOURS[method] for method in METHODS])
    left.set(title="bytes a step and rank", yscale="log")
    for axes, link in zip(others, LINKS, strict=True):
        for method in METHODS:
            seconds = [step_seconds(job, method, link, ranks, compute) for ranks in RANKS]
            axes.plot(RANKS, seconds, color=COLOURS[method], marker="o", markersize=3, label=method)
        axes.set(title=f"seconds a step, {link.name}", xscale="log", xlabel="ranks")
        axes.set_ylim(bottom=0)
        axes.set_xticks([1, 4, 16, 64, 256, 1024], ["1", "4", "16", "64", "256", "1,024"])
        axes.minorticks_off()
    others[0].legend(frameon=False, loc="lower left")
    for axes in (left, *others):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.85")
        axes.set_axisbelow(True)
    figure.suptitle(f"{job.name}: {job.queries} queries, {compute:g} s of computation a step")
    figure.savefig(path, dpi=120, metadata={"Software": None})


def run_scaling_benchmark(processes: tuple[int, ...], compute: float, output: Path | None) -> None:
    """Measure, calculate, print both as tables, and write JSON and a chart.

    Args:
        processes: Numbers of processes to measure with, on this machine.
        compute: Seconds of computation per step and rank, for the calculation.
        output: A JSON file; the chart is written next to it.
    """
    measured = {count: measure_with(count) for count in processes}
    print(f"mini CLIP, LoRA, batch {BATCH} a process, {os.cpu_count()} cores, loopback, torch {torch.__version__}")
    print(format_measured(measured))
    print(f"\nReckoned, {compute:g} s of computation a step")
    print(format_reckoned(compute))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        setting = {"batch": BATCH, "steps": STEPS, "cores": os.cpu_count(), "torch": torch.__version__}
        setting |= {"compute": compute, "links": [asdict(link) for link in LINKS], "jobs": [asdict(j) for j in JOBS]}
        write_json(output, {"setting": setting, "measured": measured})
        draw(JOBS[1], compute, output.with_suffix(".png"))


@command
def main() -> None:
    """Measure in the processes of this launch: `measure_with` runs it."""
    if len(sys.argv) != 2 or "LOCAL_RANK" not in os.environ:
        raise ValueError("scripts/benchmarks/peers.py --scaling runs this file, in several processes; run that.")
    counting = start_counting()
    found = measure(counting)
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    leave_process_group()


if __name__ == "__main__":
    main()
