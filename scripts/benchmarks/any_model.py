"""Times zeroth-order steps on models that are no dual encoders, side by side, as multiples of two bare forward passes.

    python scripts/benchmarks/any_model.py [--rounds 5] [--output docs/benchmarks/any_model.json]
    python scripts/benchmarks/any_model.py --models minilm --clock cpu --threads 1     # on a machine that others use

The models are a causal language model of 50 million parameters and a BERT of MiniLM's size, both with random weights.
Our step is compared with MeZO's `zo_step` as published (Malladi et al. 2023), and with torchzero's if it is installed.
Prints a table of medians, and of peak memory in a process each; writes JSON, and a bar chart next to it.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model
from torch import nn
from tqdm.auto import tqdm
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from hf_zocl.commands import Parser, command
from hf_zocl.files import write_json
from hf_zocl.passes import ForwardState, PlainEvaluation, StackEvaluation, TowerPlan
from hf_zocl.zo import HybridOptimizer, LayerAssignment, ZOEstimator, build_zo_optimizer


MODELS = ("lm-50m", "minilm")
EPS, RATE = 1e-3, 1e-9
# Name, whether with LoRA, and for our own steps: layers, estimator and queries.
WAYS = {
    "two passes": (False, None),
    "full, MeZO": (False, None),
    "full, torchzero": (False, None),
    "full, ours": (False, ("all", "two-sided", 1)),
    "LoRA, MeZO": (True, None),
    "LoRA, ours": (True, ("all", "two-sided", 1)),
    "LoRA in the last quarter, q=4, ours": (True, ("quarter", "one-sided", 4)),
}
PEERS = {"full, torchzero": "torchzero"}


def build(name: str, batch: int, length: int) -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    """A model, and a function that gives its loss on a batch, without gradient."""
    torch.manual_seed(0)
    if name == "lm-50m":
        sizes = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 14, "num_attention_heads": 8}
        model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=12000, tie_word_embeddings=True, use_cache=False))
        ids = torch.randint(0, 12000, (batch, length))
        inputs = {"input_ids": ids, "labels": ids}
    else:
        sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12}
        model = BertForSequenceClassification(
            BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        )
        ids = torch.randint(0, 30000, (batch, length))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(batch) % 2}

    @torch.no_grad()
    def loss() -> torch.Tensor:
        return model(**inputs).loss

    return model.train(), loss


def step_of(way: str, name: str, batch: int, length: int) -> Callable[[], None]:
    """A function that takes one step in one of the ways, on a separate model."""
    with_lora, ours = WAYS[way]
    model, loss = build(name, batch, length)
    if with_lora:
        targets = ["q_proj", "v_proj"] if name == "lm-50m" else ["query", "value"]
        depth = model.config.num_hidden_layers
        quarter = ours is not None and ours[0] == "quarter"
        layers = list(range(depth - max(1, depth // 4), depth)) if quarter else None
        # PEFT changes the model in place, so the loss runs through the adapter as well.
        model = get_peft_model(model, LoraConfig(r=8, target_modules=targets, layers_to_transform=layers))
    if way == "two passes":
        return lambda: (loss(), loss())
    if ours is not None:
        return our_step(model, loss, "all" if ours[0] == "quarter" else ours[0], *ours[1:])
    if way == "full, torchzero":
        return torchzero_step(model, loss)
    mezo, seeds = mezo_step(model), itertools.count()
    return lambda: mezo(loss, RATE, next(seeds))


def mezo_step(model: nn.Module, eps: float = EPS) -> Callable[[Callable[[], torch.Tensor], float, int], None]:
    """`zo_step` and `zo_update` of MeZO's Trainer as published: Gaussian, in place, drawn four times.

    A step takes the loss, the learning rate and the seed of its direction.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    @torch.no_grad()
    def step(loss: Callable[[], torch.Tensor], rate: float, seed: int) -> None:
        def perturb(factor: float) -> None:
            torch.manual_seed(seed)
            for parameter in parameters:
                z = torch.normal(mean=0, std=1, size=parameter.data.size(), dtype=parameter.data.dtype)
                parameter.data = parameter.data + factor * z * eps

        perturb(1)
        first = loss()
        perturb(-2)
        gradient = float((first - loss()) / (2 * eps))
        perturb(1)
        torch.manual_seed(seed)
        for parameter in parameters:
            z = torch.normal(mean=0, std=1, size=parameter.data.size(), dtype=parameter.data.dtype)
            parameter.data = parameter.data - rate * (gradient * z)

    return step


def torchzero_step(model: nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    import torchzero as tz

    optimizer = tz.Optimizer(model.parameters(), tz.m.SPSA(h=EPS), tz.m.LR(RATE))
    return lambda: optimizer.step(lambda backward=False: loss())


def our_step(
    model: nn.Module, loss: Callable[[], torch.Tensor], layers: str, estimator: str, queries: int
) -> Callable[[], None]:
    """Our step as in the Trainer: many parameters, as in a whole model, are streamed."""
    split = LayerAssignment("dual", layers).split(model, EPS)
    for parameter in split.zo_parameters:
        parameter.requires_grad_(False)
    is_large = sum(parameter.numel() for parameter in split.zo_parameters) > 1 << 24
    estimates = ZOEstimator(split.zo, estimator, queries, model=model if is_large else None)
    optimizer = HybridOptimizer(build_zo_optimizer(split.zo, "sgd", RATE))
    plan = TowerPlan(model, estimates.perturbations.values())
    steps = iter(range(1 << 30))

    def step() -> None:
        number, before = next(steps), ForwardState(torch.device("cpu"), plan.buffers)
        evaluation = PlainEvaluation(loss, before) if plan.stack is None else StackEvaluation(plan, loss, before)
        estimate = estimates.estimate(evaluation, number)
        evaluation.close()
        if estimates.is_streamed:
            optimizer.stream = estimates.stream([(estimate, 1.0)])
        else:
            estimates.write([(estimate, 1.0)])
        optimizer.step()

    return step


@command
def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", choices=MODELS, nargs="+", default=list(MODELS), help="which models")
    parser.add_argument("--ways", choices=WAYS, nargs="+", default=list(WAYS), help="which rows, beside two passes")
    parser.add_argument("--batch", type=int, default=8, help="rows of a batch")
    parser.add_argument("--length", type=int, default=64, help="tokens of a row")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of all rows, of which the median is shown")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's threads")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: what this process alone has used"
    )
    parser.add_argument("--no-memory", action="store_true", help="leave out the memory, which takes a process a row")
    parser.add_argument("--output", type=Path, help="a JSON file; the chart is written beside it")
    parser.add_argument("--memory-of", nargs=2, metavar=("MODEL", "WAY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of is not None:
        print(peak_memory(*args.memory_of[::-1], args.batch, args.length))
        return
    ways = ["two passes", *(way for way in args.ways if way != "two passes" and is_installed(way))]
    rows = [row for name in args.models for row in measure(name, ways, args)]
    machine = f"{processor()}, {args.threads} of {os.cpu_count()} cores, torch {torch.__version__}"
    print(f"{date.today()}, {machine}, {args.batch} × {args.length} tokens, {args.clock} time")
    print(f"{'model':<10}{'':<38}{'ms':>8}{'over two passes':>17}{'peak MB':>10}")
    for row in rows:
        memory = f"{row['peak_bytes'] / 1e6:>10.0f}" if "peak_bytes" in row else ""
        print(f"{row['model']:<10}{row['way']:<38}{1e3 * row['seconds']:>8.0f}{row['ratio']:>17.2f}{memory}")
    if args.output is not None:
        setting = {name: getattr(args, name) for name in ("batch", "length", "rounds", "clock")}
        write_json(args.output, {"date": str(date.today()), "machine": machine, **setting, "rows": rows})
        draw(rows, args.output.with_suffix(".png"))


def is_installed(way: str) -> bool:
    package = PEERS.get(way)
    if package is None or importlib.util.find_spec(package) is not None:
        return True
    print(f"{way}: left out, for {package} is not installed.")
    return False


def measure(name: str, ways: list[str], args: argparse.Namespace) -> list[dict]:
    """The rows of one model; every round runs all of them, so that other load affects all alike."""
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    steps = {way: step_of(way, name, args.batch, args.length) for way in ways}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for step in tqdm(steps.values(), desc=f"{name}, warm-up"):
        step()
    for _ in tqdm(range(args.rounds), desc=f"{name}, rounds"):
        for way, step in steps.items():
            start = clock()
            step()
            seconds[way].append(clock() - start)
    rows = []
    for way, own in tqdm(seconds.items(), desc=f"{name}, memory", disable=args.no_memory):
        ratio = statistics.median(mine / bare for mine, bare in zip(own, seconds["two passes"], strict=True))
        rows.append({"model": name, "way": way, "seconds": statistics.median(own), "ratio": ratio})
        if not args.no_memory:
            sizes = ["--batch", args.batch, "--length", args.length, "--threads", args.threads]
            call = [sys.executable, __file__, "--memory-of", name, way, *map(str, sizes)]
            child = subprocess.run(call, capture_output=True, text=True, check=True)
            rows[-1]["peak_bytes"] = int(child.stdout.split()[-1])
    return rows


def peak_memory(way: str, name: str, batch: int, length: int) -> int:
    """The peak memory of this process in bytes, after two steps."""
    step = step_of(way, name, batch, length)
    for _ in range(2):
        step()
    status = Path("/proc/self/status")
    if status.exists():  # Linux: getrusage would include the parent's peak
        line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def draw(rows: list[dict], path: Path) -> None:
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(9, 1 + 0.35 * len(rows)), layout="constrained")
    for axes, model in zip(figure.subplots(len(models), squeeze=False)[:, 0], models, strict=True):
        own = [row for row in rows if row["model"] == model][::-1]
        bars = axes.barh([row["way"] for row in own], [row["ratio"] for row in own])
        axes.bar_label(bars, fmt="%.2f", padding=2)
        axes.set_title(f"{model}: time of a step over two bare forward passes")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
