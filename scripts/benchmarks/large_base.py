"""Memory of zeroth-order LoRA through a base that is quantised, or offloaded to disk.

    python scripts/benchmarks/large_base.py [--rounds 3] [--output docs/benchmarks/large_base.json]
    python scripts/benchmarks/large_base.py --limited disk     # trains within half the memory that the base has

The base is a causal language model with random weights. For every way to hold it and every task, a separate process
loads it, runs it once, and then infers, trains with all layers zeroth-order, or trains by backpropagation. The memory
shown is the peak during the task above what was resident before. Ways that need torchao or bitsandbytes are left out
if these are not installed.

`--limited` limits the process's address space (`ulimit -v`) to its size once everything is imported plus `--allowed`,
by default half the size of the base. Then it loads the base, trains, and prints the losses.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import torch
from accelerate import disk_offload, init_empty_weights
from accelerate.utils import offload_state_dict
from peft import LoraConfig, get_peft_model
from torch import nn
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from hf_zocl import ZOCLTrainer, ZOCLTrainingArguments
from hf_zocl.commands import Parser, command
from hf_zocl.files import write_json


# How the base is held, and the package that this needs.
WAYS = {"memory": None, "disk": None, "torchao int8": "torchao", "int8": "bitsandbytes", "NF4": "bitsandbytes"}
TASKS = ("inference", "all-ZO", "FO")
MB, LAYER_MB = 1 << 20, 51.5
OFFLOADED = "offloaded"
M_MMAP_THRESHOLD = -3  # a glibc constant


def build(path: Path, megabytes: int) -> None:
    """Write the base into a folder and, next to its files, the weights as accelerate offloads them."""
    model = base(layers=max(1, round((megabytes - 32) / LAYER_MB)))
    model.save_pretrained(path, max_shard_size="16MB")  # a file stays mapped while one of its tensors is used
    offload_state_dict(path / OFFLOADED, model.state_dict())


def base(layers: int = 1, hidden: int = 1024) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": hidden * 11 // 4, "num_attention_heads": 8}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=layers, vocab_size=4096, use_cache=False))


def load(way: str, path: Path) -> nn.Module:
    """The base, held in one of the ways, with an adapter in memory."""
    options: dict = {}
    if way == "torchao int8":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        options = {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig()), "device_map": {"": "cpu"}}
    elif way in ("int8", "NF4"):
        from transformers import BitsAndBytesConfig

        four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
        config = BitsAndBytesConfig(**({"load_in_8bit": True} if way == "int8" else four))
        options = {"quantization_config": config, "device_map": {"": "cpu"}}
    if way == "disk":  # `from_pretrained` with a device_map works too, but first maps all files
        with init_empty_weights():
            model = LlamaForCausalLM(LlamaConfig.from_pretrained(path))
        disk_offload(model, path / OFFLOADED, execution_device=torch.device("cpu"))
    else:
        model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32, **options)
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))


def rows(count: int, length: int) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(0, 4096, (count, length), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


def train(model: nn.Module, data: list[dict[str, torch.Tensor]], folder: str, task: str, steps: int) -> list[float]:
    """Train for a few steps; returns the losses."""
    args = ZOCLTrainingArguments(
        output_dir=folder,
        zo_branch="none" if task == "FO" else "dual",
        zo_layers="all",
        zo_estimator="two-sided",
        zo_eps=1e-3,
        per_device_train_batch_size=len(data),
        max_steps=steps,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = ZOCLTrainer(model=model, args=args, train_dataset=data)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def infer(model: nn.Module, data: list[dict[str, torch.Tensor]]) -> None:
    batch = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    with torch.no_grad():
        model(**batch)


def measure(way: str, task: str, path: Path, data: list[dict[str, torch.Tensor]], folder: str) -> dict[str, int]:
    """Bytes that a model that has run once keeps resident, and the peak of a task above that."""
    train(get_peft_model(base(hidden=16), LoraConfig()), data[:1], folder, task, 1)  # imports everything
    empty = resident("VmRSS")
    model = load(way, path)
    infer(model, data)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # reset the peak
    if task == "inference":
        infer(model, data)
    else:
        train(model, data, folder, task, 2)
    return {"resident_bytes": before - empty, "peak_bytes": resident("VmHWM") - before}


def limited(way: str, path: Path, data: list[dict[str, torch.Tensor]], folder: str, allowed: int) -> None:
    """Train in an address space of `allowed` bytes more than before anything is loaded."""
    train(get_peft_model(base(hidden=16), LoraConfig()), data[:1], folder, "all-ZO", 1)
    before = resident("VmSize")
    resource.setrlimit(resource.RLIMIT_AS, (before + allowed, before + allowed))
    losses = train(load(way, path), data, folder, "all-ZO", 3)
    print(f"{way}: {before / MB:.0f} MiB of address space before, {allowed / MB:.0f} more allowed")
    print("losses", *(f"{loss:.9g}" for loss in losses))


def resident(name: str) -> int:
    """A memory figure of this process, from /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(name + ":")).split()[1]) * 1024


def sizes(args: argparse.Namespace) -> list[str]:
    """The arguments to pass to a child process."""
    return [f"--{name}={getattr(args, name)}" for name in ("folder", "megabytes", "batch", "length")]


def child(*arguments: str) -> str:
    """Run this script in a child process, and return what it prints."""
    call = [sys.executable, __file__, *arguments]
    return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()


@command
def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", choices=WAYS, nargs="+", default=list(WAYS), help="how the base is held")
    parser.add_argument("--tasks", choices=TASKS, nargs="+", default=["inference", "all-ZO"], help="what is measured")
    parser.add_argument("--megabytes", type=int, default=128, help="size of the base in float32")
    parser.add_argument("--batch", type=int, default=8, help="rows of a batch")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--rounds", type=int, default=3, help="processes a figure, of which the median is shown")
    parser.add_argument("--folder", type=Path, help="where the base is, or will be, kept; default: a temporary folder")
    parser.add_argument("--limited", choices=WAYS, help="train within a limit, instead of measuring")
    parser.add_argument("--allowed", type=int, help="mebibytes that --limited allows; default: half the base's")
    parser.add_argument("--output", type=Path, help="a JSON file")
    parser.add_argument("--build", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "TASK"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)  # so that freed memory goes back to the system at once
    with tempfile.TemporaryDirectory() as folder:
        args.folder = args.folder or Path(folder)
        path = args.folder / f"base-{args.megabytes}"
        if args.build:
            return build(path, args.megabytes)
        if not path.exists():  # in a child process, so that its memory goes back to the system
            child("--build", *sizes(args))
        data = rows(args.batch, args.length)
        if args.measure is not None:
            print(json.dumps(measure(*args.measure, path, data, folder)))
        elif args.limited is not None:
            limited(args.limited, path, data, folder, (args.allowed or args.megabytes // 2) * MB)
        else:
            report(args)


def report(args: argparse.Namespace) -> None:
    found = [way for way in args.ways if WAYS[way] is None or importlib.util.find_spec(WAYS[way]) is not None]
    cells = [(way, task) for way in found for task in args.tasks]
    seen: dict[tuple[str, str], list[dict[str, int]]] = {cell: [] for cell in cells}
    for _ in range(args.rounds):
        for cell in tqdm(cells):
            seen[cell].append(json.loads(child("--measure", *cell, *sizes(args)).splitlines()[-1]))
    rows = []
    for way, task in cells:
        figures = {name: statistics.median(run[name] for run in seen[way, task]) for name in seen[way, task][0]}
        rows.append({"way": way, "task": task, **figures})
    print(f"{date.today()}, {args.batch} × {args.length} tokens, torch {torch.__version__}")
    print(
        f"{'':<14}{'resident MB':>11}"
        + "".join(f"{task + ' MB':>14}" for task in args.tasks)
        + f"{'over inference':>16}"
    )
    for way in found:
        own = {row["task"]: row for row in rows if row["way"] == way}
        held = next(iter(own.values()))["resident_bytes"]
        line = f"{way:<14}{held / 1e6:>11.0f}" + "".join(f"{own[t]['peak_bytes'] / 1e6:>14.0f}" for t in args.tasks)
        if {"inference", "all-ZO"} <= own.keys():
            line += f"{own['all-ZO']['peak_bytes'] / own['inference']['peak_bytes']:>16.3f}"
        print(line)
    for way in args.ways:
        if way not in found:
            print(f"{way}: left out, for {WAYS[way]} is not installed.")
    if args.output is not None:
        setting = {name: getattr(args, name) for name in ("batch", "length", "rounds", "megabytes")}
        write_json(args.output, {"date": str(date.today()), **setting, "rows": rows})


if __name__ == "__main__":
    main()
