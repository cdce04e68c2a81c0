"""Look at the loss around what runs have learned: sharpness, and the loss along random directions.

    python scripts/studies/landscape.py runs/fo/seed-0 runs/dual-all/seed-0 \\
        --output scripts/studies/notebook/landscape.json

Each folder is a finished run. The loss is that of its last checkpoint on training images of the last task, among that
task's classes. Sharpness is the largest eigenvalue of the Hessian in the adapter's parameters, by power iteration on
Hessian-vector products. The loss is shown along random directions, plain (‖d‖ = ‖θ‖) and filter-normalised (Li et al.,
NeurIPS 2018: every row of the direction has the norm of the weight row that it moves).
"""

import argparse
import json
import statistics
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from hf_zocl import load_task_checkpoint
from hf_zocl.commands import Parser, command
from hf_zocl.continual.run_arguments import RunArguments, build_stream
from hf_zocl.data.images import ImageCollator
from hf_zocl.files import write_json
from hf_zocl.report.figures import save_figure


@command
def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--dataset_path", help="a local copy of the dataset; default: the run's own")
    parser.add_argument("--images", type=int, default=128, help="training images of the last task")
    parser.add_argument("--iterations", type=int, default=30, help="of the power method, at most")
    parser.add_argument("--directions", type=int, default=3, help="random directions of each kind")
    parser.add_argument("--radius", type=float, default=1.0, help="the farthest point, in norms of the parameters")
    parser.add_argument("--output", type=Path, required=True, help="a JSON file; the figure is written beside it")
    options = parser.parse_args()
    looks = [look(run, options) for run in tqdm(options.runs, desc="runs")]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.output, {"runs": looks})
    save_figure(draw(looks), options.output.with_suffix(".png"))
    print(format_table(looks))


def look(run: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The sharpness and the loss curves of one run."""
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    model, processor = load_task_checkpoint(run, task=len(results["accuracy_matrix"]))
    inputs = training_images(results["recipe"], model, processor, options)
    parameters = [p for name, p in model.named_parameters() if "lora_" in name or "moe" in name]
    for parameter in parameters:
        parameter.requires_grad_(True)

    def loss() -> torch.Tensor:
        return model(**inputs).loss

    # What acts only in training, such as a router's noise, is not part of this loss.
    gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
    parameters = [p for p, gradient in zip(parameters, gradients, strict=True) if gradient is not None]
    generator = torch.Generator().manual_seed(0)
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
        sharpness = largest_eigenvalue(loss, parameters, options.iterations, generator)
    steps = np.linspace(-options.radius, options.radius, 21)
    curves = {
        kind: [along(loss, parameters, direction(parameters, generator), steps) for _ in range(options.directions)]
        for kind, direction in DIRECTIONS.items()
    }
    with torch.no_grad():
        name = f"{run.parent.name}/{run.name}" if run.name.startswith("seed-") else run.name
        return {"run": name, "loss": loss().item(), "sharpness": sharpness, "steps": steps.tolist(), "curves": curves}


def training_images(
    recipe: dict[str, Any], model: nn.Module, processor: Any, options: argparse.Namespace
) -> dict[str, Any]:
    """A batch of the last task's training images; the model is set to that task's classes."""
    own = {one.name: recipe[one.name] for one in fields(RunArguments) if one.name in recipe}
    run = RunArguments(**{**own, "dataset_path": options.dataset_path or own["dataset_path"]})
    task = build_stream(run, seed=recipe.get("data_seed") or 0)[0][-1]
    model.set_classes(task.class_names)
    rows = np.random.default_rng(0).permutation(len(task.train))[: options.images]
    collator = ImageCollator(processor, task.arrival_labels, task.first_label)
    return collator([task.train[int(row)] for row in rows])


def largest_eigenvalue(loss, parameters: list[nn.Parameter], iterations: int, generator: torch.Generator) -> float:
    """The Hessian's eigenvalue of largest magnitude, to 1 % or as close as the iterations get."""
    gradients = torch.autograd.grad(loss(), parameters, create_graph=True)
    vector = [torch.randn(p.shape, generator=generator) for p in parameters]
    value = 0.0
    for _ in range(iterations):
        norm = torch.sqrt(sum(v.square().sum() for v in vector))
        vector = [v / norm for v in vector]
        product = torch.autograd.grad(gradients, parameters, vector, retain_graph=True)
        before, value = value, sum((v * h).sum() for v, h in zip(vector, product, strict=True)).item()
        if abs(value - before) <= 0.01 * abs(value):
            break
        vector = [h.detach() for h in product]
    return value


def random_direction(parameters: list[nn.Parameter], generator: torch.Generator) -> list[torch.Tensor]:
    """A Gaussian direction whose norm is that of all parameters together."""
    drawn = [torch.randn(p.shape, generator=generator) for p in parameters]
    norms = [torch.sqrt(sum(t.detach().square().sum() for t in tensors)) for tensors in (parameters, drawn)]
    return [d * norms[0] / norms[1] for d in drawn]


def filter_normalised_direction(parameters: list[nn.Parameter], generator: torch.Generator) -> list[torch.Tensor]:
    """A Gaussian direction in which every row of a matrix has the norm of the row that it moves."""
    drawn = [torch.randn(p.shape, generator=generator) for p in parameters]
    pairs = zip(drawn, (p.detach() for p in parameters), strict=True)
    return [d * p.norm(dim=-1, keepdim=True) / d.norm(dim=-1, keepdim=True).clamp_min(1e-12) for d, p in pairs]


DIRECTIONS = {"random": random_direction, "filter-normalised": filter_normalised_direction}


@torch.no_grad()
def along(loss, parameters: list[nn.Parameter], direction: list[torch.Tensor], steps: np.ndarray) -> list[float]:
    """The loss at θ + s·d for every s."""
    start, losses = [p.clone() for p in parameters], []
    for step in steps:
        for parameter, origin, d in zip(parameters, start, direction, strict=True):
            parameter.copy_(origin + float(step) * d)
        losses.append(loss().item())
    torch._foreach_copy_(parameters, start)
    return losses


def format_table(looks: list[dict[str, Any]]) -> str:
    lines = ["| run | loss | sharpness | loss at the radius, filter-normalised |", "|---|---:|---:|---:|"]
    for one in looks:
        ends = statistics.mean(end for curve in one["curves"]["filter-normalised"] for end in (curve[0], curve[-1]))
        lines.append(f"| {one['run']} | {one['loss']:.3f} | {one['sharpness']:.3g} | {ends:.3f} |")
    return "\n".join(lines)


def draw(looks: list[dict[str, Any]]) -> Figure:
    """Draw the rise of the loss above its value at the solution: mean over seeds and directions, and quartiles."""
    settings: dict[str, list[dict[str, Any]]] = {}
    for one in looks:
        settings.setdefault(one["run"].split("/seed-")[0], []).append(one)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, kind in zip(figure.subplots(1, len(DIRECTIONS)), DIRECTIONS, strict=True):
        for (name, own), (color, line) in zip(settings.items(), STYLES * len(settings), strict=False):
            rises = np.array([np.array(curve) - one["loss"] for one in own for curve in one["curves"][kind]])
            axes.plot(own[0]["steps"], rises.mean(axis=0), color=color, linestyle=line, label=name)
            low, high = np.percentile(rises, (25, 75), axis=0)
            axes.fill_between(own[0]["steps"], low, high, color=color, alpha=0.15, linewidth=0)
        axes.set(title=f"{kind} directions", xlabel="distance, in norms of the parameters", ylabel="rise of the loss")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


STYLES = [("#0072B2", "-"), ("#D55E00", "--"), ("#007a59", "-."), ("#a8487c", ":"), ("#1a1a1a", "-")]


if __name__ == "__main__":
    main()
