"""Measure the variance of zeroth-order gradients by branch and layer while a recipe trains first-order.

    python scripts/studies/variance.py --recipe cifar10 --seeds 0 1 2 --output scripts/studies/notebook/variance.json

Every few steps, each layer is perturbed alone, with many directions, on the first batch of the task. The estimate of a
query is ĝ = [L(θ+εΔ) − L(θ)]/ε · Δ (equation 2 of arXiv 2506.12409). Its total variance is the mean of ‖ĝ − mean ĝ‖²
over the queries; per dimension, that is divided by the layer's number of parameters. The paper says that the variance
is larger in the vision tower. A paired t-test over the seeds, on their mean logarithms, says which is larger and how
surely; a second one, over the moments of training, has more pairs, but from the same few runs. Training is
first-order, so that both towers are seen on the same path. Needs SciPy.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from paper import format_p, p_value
from torch import nn
from tqdm.auto import tqdm
from transformers import TrainerCallback

from hf_zocl.commands import Parser, command, require
from hf_zocl.commands.recipe import build_scheduler, parse_recipe
from hf_zocl.files import write_json
from hf_zocl.passes import ForwardState, TowerEvaluation, TowerPlan
from hf_zocl.report.figures import save_figure
from hf_zocl.zo import LayerAssignment, ZOEstimator


BRANCHES = {"vision": ("#0072B2", "o", "-"), "language": ("#D55E00", "s", "--")}
KINDS = {"total": "in total", "per_dimension": "per dimension"}


@command
def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--every", type=int, default=10, help="steps between two measurements")
    parser.add_argument("--queries", type=int, default=32, help="directions per layer and measurement")
    parser.add_argument("--eps", type=float, default=1e-3, help="ε, the same in both towers")
    parser.add_argument("--output", type=Path, required=True, help="a JSON file; the figure is written beside it")
    options, further = parser.parse_known_args()
    require("scipy", extra="reproduce")
    rows: list[dict[str, Any]] = []
    for seed in tqdm(options.seeds, desc="seeds"):
        with tempfile.TemporaryDirectory(prefix="hf-zocl-variance-") as folder:
            arguments = ["--recipe", options.recipe, *further, "--zo_branch", "none", "--seed", str(seed)]
            recipe = parse_recipe([*arguments, "--output_dir", folder, "--disable_tqdm", "true"])
            scheduler = build_scheduler(recipe)
            probe = Probe(options.every, options.queries, options.eps, seed)
            scheduler.callbacks.append(probe)
            scheduler.run()
            rows += probe.rows
    tests = {kind: compare_branches(rows, kind) for kind in KINDS}
    arguments = {"recipe": Path(options.recipe).name, "queries": options.queries, "eps": options.eps}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.output, {**arguments, "seeds": options.seeds, "tests": tests, "rows": rows})
    save_figure(draw(rows), options.output.with_suffix(".png"))
    print(format_table(rows))
    for kind, test in tests.items():
        print(
            f"variance {KINDS[kind]}: vision's is {test['ratio']:.3g} times language's (geometric mean over "
            f"{test['moments']} moments; greater in {test['share']:.0%} of them; p = {format_p(test['p_seeds'])} by "
            f"{len(options.seeds)} seeds, {format_p(test['p'])} by moments)"
        )


class Probe(TrainerCallback):
    """Measures at a fixed interval of steps in every task, on the task's first batch."""

    def __init__(self, every: int, queries: int, eps: float, seed: int):
        self.every, self.queries, self.eps, self.seed = every, queries, eps, seed
        self.rows: list[dict[str, Any]] = []
        self.task = 0

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        self.task += 1
        random_state = ForwardState(args.device)
        self.batch = {name: value.to(args.device) for name, value in next(iter(train_dataloader)).items()}
        random_state.restore()  # so that measuring does not change the training

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0:
            where = {"seed": self.seed, "task": self.task, "step": state.global_step}
            self.rows += [{**where, **row} for row in measure(model, self.batch, self.queries, self.eps)]


def measure(model: nn.Module, batch: dict[str, torch.Tensor], queries: int, eps: float) -> list[dict[str, Any]]:
    """The variance of every layer's estimate, each layer perturbed alone."""
    rows, device = [], next(model.parameters()).device
    model.train()  # before the first step, the model is still in evaluation mode
    random_state = ForwardState(device, model.buffers())

    @torch.no_grad()
    def forward() -> torch.Tensor:
        return model(**batch).loss

    for group in LayerAssignment("dual", "all").split(model, eps=eps).zo:
        estimator = ZOEstimator([group], queries=queries)
        plan = TowerPlan(model, estimator.perturbations.values())
        estimate = estimator.estimate(TowerEvaluation(plan, forward, random_state), step=0)
        (perturbation,) = estimator.perturbations.values()
        (gradient,) = estimate.gradient.values()
        directions = torch.stack([perturbation.vector(perturbation.query(seed)) for seed in gradient.seeds]) / eps
        estimates = directions * (queries * gradient.weights)[:, None]
        variance = estimates.var(dim=0, correction=1).sum().item()
        rows.append(
            {
                "branch": group.branch,
                "layer": group.layer,
                "parameters": len(perturbation),
                "total": variance,
                "per_dimension": variance / len(perturbation),
            }
        )
    random_state.restore()
    return rows


def by_moment(rows: list[dict[str, Any]], branch: str, kind: str) -> dict[tuple, float]:
    """The branch's variance at every moment: the sum over its layers, or that sum divided by its parameters."""
    sums: dict[tuple, list[float]] = {}
    for row in rows:
        if row["branch"] == branch:
            own = sums.setdefault((row["seed"], row["task"], row["step"]), [0.0, 0])
            own[0] += row["total"]
            own[1] += row["parameters"]
    return {moment: total / (count if kind == "per_dimension" else 1) for moment, (total, count) in sums.items()}


def compare_branches(rows: list[dict[str, Any]], kind: str) -> dict[str, float | None]:
    vision, language = (by_moment(rows, branch, kind) for branch in ("vision", "language"))
    differences = np.log([vision[moment] / language[moment] for moment in vision])
    seeds = np.array([seed for seed, *_ in vision])
    return {
        "ratio": float(np.exp(differences.mean())),
        "share": float((differences > 0).mean()),
        "p": p_value(differences),
        "p_seeds": p_value([differences[seeds == seed].mean() for seed in np.unique(seeds)]),
        "moments": len(differences),
    }


def by_layer(rows: list[dict[str, Any]], branch: str, kind: str) -> dict[int, np.ndarray]:
    layers: dict[int, list[float]] = {}
    for row in rows:
        if row["branch"] == branch and row["layer"] is not None:
            layers.setdefault(row["layer"], []).append(row[kind])
    return {layer: np.array(values) for layer, values in sorted(layers.items())}


def format_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| branch | layer | parameters | variance in total | per dimension |", "|---|---:|---:|---:|---:|"]
    for branch in BRANCHES:
        total, each = (by_layer(rows, branch, kind) for kind in KINDS)
        for layer in total:
            count = next(r["parameters"] for r in rows if (r["branch"], r["layer"]) == (branch, layer))
            means = [np.exp(np.log(values[layer]).mean()) for values in (total, each)]
            lines.append(f"| {branch} | {layer} | {count} | {means[0]:.3g} | {means[1]:.3g} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Draw the variance by layer (above) and over training (below), in total (left) and per dimension (right)."""
    figure = Figure(figsize=(9, 6.4), layout="constrained")
    axes = figure.subplots(2, 2)
    for column, (kind, title) in enumerate(KINDS.items()):
        for branch, (color, marker, line) in BRANCHES.items():
            style = {"color": color, "marker": marker, "linestyle": line, "label": branch}
            layers = by_layer(rows, branch, kind)
            logs = [np.log(values) for values in layers.values()]
            mean, spread = np.array([log.mean() for log in logs]), np.array([log.std() for log in logs])
            low, high = np.exp(mean) - np.exp(mean - spread), np.exp(mean + spread) - np.exp(mean)
            axes[0, column].errorbar(list(layers), np.exp(mean), (low, high), capsize=3, **style)
            moments = by_moment(rows, branch, kind)
            times = sorted({moment[1:] for moment in moments})
            curve = [np.exp(np.mean([np.log(v) for m, v in moments.items() if m[1:] == time])) for time in times]
            axes[1, column].plot(range(len(times)), curve, **style)
        axes[0, column].set(title=f"variance {title}", xlabel="layer, counted from 1")
        axes[0, column].xaxis.set_major_locator(MaxNLocator(integer=True))
        axes[1, column].set(xlabel="measurement, in the order of training")
        for one in axes[:, column]:
            one.set(yscale="log", ylabel="variance of the ZO gradient")
            one.grid(alpha=0.3)
    axes[0, 0].legend()
    return figure


if __name__ == "__main__":
    main()
