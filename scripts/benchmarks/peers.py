"""Times this package's parts against a straightforward way to the same result, side by side in one run.

    python scripts/benchmarks/peers.py [--quick] [--output docs/benchmarks/engine.json]  # a step of FO, MeZO and ours
    python scripts/benchmarks/peers.py --moe                                             # the MoE adapter of one block
    python scripts/benchmarks/peers.py --scaling [--output docs/benchmarks/scaling.json]  # what several processes send

The first prints time, arithmetic and memory of a step on a CLIP with random weights at 224×224 (`--shape`, `--batch`)
and the ratios that must hold, and writes JSON and a bar chart. `--rows bars` leaves out the rows that no ratio needs;
`--quick` also takes a small batch.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from engine import run_engine_benchmark
from engine_rows import SHAPES, Setting
from scaling import run_scaling_benchmark

from hf_zocl import MoEAdapterConfig
from hf_zocl.commands import Parser, command
from hf_zocl.models.moe_adapter.layer import MoEAdapter


@command
def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moe", action="store_true", help="only the MoE adapter of one ViT-B/16 block")
    parser.add_argument("--scaling", action="store_true", help="only what several processes send, and their time")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="with --scaling: how many of them")
    parser.add_argument("--compute", type=float, default=0.2, help="with --scaling: seconds of computation a step")
    parser.add_argument("--quick", action="store_true", help="a small batch and fewer rows: about a minute on 2 cores")
    parser.add_argument(
        "--rows",
        choices=("all", "bars", "pays"),
        default="all",
        help="bars: those that the ratios need; pays: those of scripts/studies/when_it_pays.py",
    )
    parser.add_argument("--shape", choices=SHAPES, default="vit-b-16", help="the CLIP's shape")
    parser.add_argument("--batch", type=int, help="images; default: 32 on a CPU, 128 on a GPU, 2 with --quick")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of all rows, of which the median is shown")
    parser.add_argument("--repeats", type=int, default=15, help="the same with --moe")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's threads")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--output", type=Path, help="a JSON file; the chart is written beside it")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.scaling:
        run_scaling_benchmark(tuple(args.processes), args.compute, args.output)
        return
    if args.moe:
        print(f"torch {torch.__version__}, {args.device}, {args.threads} threads, median of {args.repeats} runs")
        benchmark_moe(args.device, args.repeats)
        return
    batch = args.batch or (2 if args.quick else 32 if args.device == "cpu" else 128)
    rounds = 1 if args.quick else args.rounds
    setting = Setting(args.shape, batch, rounds, args.device, args.threads)
    run_engine_benchmark(setting, "quick" if args.quick else args.rows, args.output)


def interleaved_medians(runs: dict[str, Callable[[], None]], repeats: int, device: str) -> dict[str, float]:
    """The median time of each, in milliseconds; every round runs all of them, so that other load affects all alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 2):
        for name, run in runs.items():
            start = _now(device)
            run()
            if repeat >= 2:  # the first two rounds warm up
                times[name].append(1e3 * (_now(device) - start))
    return {name: statistics.median(values) for name, values in times.items()}


def _now(device: str) -> float:
    if device != "cpu":
        torch.get_device_module(device).synchronize()
    return time.perf_counter()


# The MoE adapter.

# (batch, tokens, width): an image batch in a ViT-B/16, and the prompts of 100 classes in its text tower.
MOE_SHAPES = {"ViT-B/16 block": (32, 197, 768), "text block, 100 prompts": (100, 12, 512)}


def benchmark_moe(device: str, repeats: int) -> None:
    """One adapter in training mode: dispatch by sorting and splitting against ours, forward and with backward."""
    print(f"{'MoE adapter':<40}{'pass':<20}{'dispatch':>10}{'ours':>10}{'speed-up':>10}")
    for shape_name, shape in MOE_SHAPES.items():
        for experts in (2, 22):
            torch.manual_seed(0)
            adapter = MoEAdapter(MoEAdapterConfig(num_experts=experts), shape[-1], shape[-1]).to(device)
            for parameter in adapter.parameters():
                torch.nn.init.normal_(parameter, std=0.02)
            x = torch.randn(shape, device=device, requires_grad=True)
            adapter.eval()
            torch.testing.assert_close(adapter(x), dispatch(adapter, x), rtol=1e-4, atol=1e-5)
            adapter.train()
            ways = {"dispatch": lambda a=adapter, x=x: dispatch(a, x), "ours": lambda a=adapter, x=x: a(x)}
            for pass_name, wrap in (("forward", _forward), ("forward + backward", _forward_and_backward)):
                medians = interleaved_medians({n: wrap(way) for n, way in ways.items()}, repeats, device)
                ratio = medians["dispatch"] / medians["ours"]
                title = f"{shape_name}, top 2 of {experts}"
                numbers = f"{medians['dispatch']:>7.1f} ms{medians['ours']:>7.1f} ms{ratio:>9.2f}x"
                print(f"{title:<40}{pass_name:<20}{numbers}", flush=True)


def _forward(way: Callable[[], torch.Tensor]) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            way()

    return run


def _forward_and_backward(way: Callable[[], torch.Tensor]) -> Callable[[], None]:
    def run() -> None:
        y = way()
        y.backward(torch.ones_like(y))

    return run


def dispatch(adapter: MoEAdapter, x: torch.Tensor) -> torch.Tensor:
    """The baseline's scheme: sort the pairs of example and expert, split, run each expert, add the rows up."""
    config = adapter.config
    gates = adapter.routers[0](x[:, 0], config.top_k).gates
    rows, owners = torch.nonzero(gates, as_tuple=True)
    owners, order = owners.sort()
    rows = rows[order]
    sizes = torch.bincount(owners, minlength=config.num_experts).tolist()
    outputs = []
    for expert, part in zip(adapter.experts, x[rows].split(sizes), strict=True):
        hidden = F.dropout(F.relu(expert.down(part)), config.dropout, adapter.training)
        outputs.append(config.scale * expert.up(hidden))
    weighted = torch.cat(outputs) * gates[rows, owners][:, None, None]
    return torch.zeros_like(x).index_add(0, rows, weighted)


if __name__ == "__main__":
    main()
