"""Which directions a zeroth-order step should take: the cosine of its estimate with the gradient, at equal passes.

    python scripts/studies/directions.py runs/cifar10 --dataset_path path/to/cifar10

It takes the run's first checkpoint, with LoRA, and training images of its second task; the weights are the LoRA
matrices of the vision tower. Differences of losses are replaced by their limit, gradient times direction, so that
neither ε nor rounding affects the figures. All estimates take equally many passes, and are compared with the gradient
over all of the task's images:

    dense          ±1 in every weight
    low rank       u·vᵀ of Gaussians for every matrix (LOZO, arXiv 2410.07698)
    inputs         ±1, with the rows of A projected on the span of its inputs: the principal directions that hold 95 %
                   of the batch's variance (arXiv 2601.17261)
    examples       ±1, with row and column signs for each example (Flipout, arXiv 1803.04386; GRZO, arXiv 2606.02857):
                   a direction for every example, in the passes of one direction
    greedy pool    the half of the dense directions with the lowest loss

Each estimate is compared as it is, by its sign, and with all singular values of a matrix made equal, the limit of
Newton-Schulz iterations (ZO-Muon, arXiv 2602.17155); after one step, and after ten with a momentum of 0.9.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_zocl import CLIPClassifier, load_task_checkpoint
from hf_zocl.commands import Parser, command
from hf_zocl.continual.checkpoint_evaluation import run_arguments_of
from hf_zocl.continual.run_arguments import build_stream
from hf_zocl.data.images import ImageCollator, PixelCodec
from hf_zocl.files import read_json


VARIANCE = 0.95
MOMENTUM, STEPS = 0.9, 10
Matrices = list[Tensor]


class Task:
    """The second task of a run and the gradients of its images, example by example, at the first checkpoint.

    Args:
        run: The run's folder.
        dataset_path: The dataset, if it is not where the run had it.
        images: How many of the task's training images are used.
    """

    def __init__(self, run: Path, dataset_path: str | None, images: int):
        info = read_json(run / "task-01" / "task.json")
        model, processor = load_task_checkpoint(run / "task-01")
        stream, _ = build_stream(run_arguments_of(info["recipe"], {"dataset_path": dataset_path}, is_own=True))
        task = stream[1]
        model.set_classes(task.class_names)
        collate = ImageCollator(
            processor, task.arrival_labels, task.first_label, PixelCodec(processor.image_processor)
        )
        chosen = np.random.RandomState(0).permutation(len(task.train))[:images]
        self.batch = collate([task.train[int(row)] for row in chosen])
        named = [(n, p) for n, p in model.named_parameters() if "vision_model" in n and "lora_" in n]
        self.inputs_of = [self._inputs(model, name) if "lora_A" in name else None for name, _ in named]
        self.gradients = self._gradients(model, [parameter for _, parameter in named])

    def _gradients(self, model: CLIPClassifier, parameters: list[nn.Parameter]) -> Matrices:
        """The gradient of every example: a tensor `(examples, rows, columns)` for each matrix."""
        model.eval().requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        found = []
        for row in tqdm(range(len(self.batch["labels"])), desc="gradients"):
            example = {name: value[row : row + 1] for name, value in self.batch.items()}
            found.append(torch.autograd.grad(model(**example).loss, parameters))
        return [torch.stack(each) for each in zip(*found, strict=True)]

    @torch.no_grad()
    def _inputs(self, model: CLIPClassifier, name: str) -> Tensor:
        """The inputs that the matrix is multiplied with, `(examples, tokens, columns)`."""
        seen: list[Tensor] = []
        module = model.get_submodule(name.removesuffix(".weight"))
        handle = module.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
        model(pixel_values=self.batch["pixel_values"])
        handle.remove()
        return seen[0]


def signs(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, shape, generator=generator).mul_(2).sub_(1).float()


def along(gradients: Matrices, directions: Matrices) -> float:
    """The derivative of the loss along a direction."""
    return sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))


def estimate(task: Task, rows: Tensor, queries: int, draw: Callable[[], Matrices]) -> Matrices:
    gradients = [g[rows].mean(0) for g in task.gradients]
    total = [torch.zeros_like(g) for g in gradients]
    for _ in range(queries):
        direction = draw()
        torch._foreach_add_(total, direction, alpha=along(gradients, direction) / queries)
    return total


def dense(task: Task, rows: Tensor, queries: int, generator: torch.Generator) -> Matrices:
    return estimate(task, rows, queries, lambda: [signs(g.shape[1:], generator) for g in task.gradients])


def low_rank(task: Task, rows: Tensor, queries: int, generator: torch.Generator) -> Matrices:
    def draw() -> Matrices:
        return [torch.outer(*(torch.randn(n, generator=generator) for n in g.shape[1:])) for g in task.gradients]

    return estimate(task, rows, queries, draw)


def inputs(task: Task, rows: Tensor, queries: int, generator: torch.Generator) -> Matrices:
    spans = [None if x is None else span(x[rows].flatten(0, 1)) for x in task.inputs_of]

    def draw() -> Matrices:
        drawn = [signs(g.shape[1:], generator) for g in task.gradients]
        return [d if basis is None else d @ basis @ basis.T for d, basis in zip(drawn, spans, strict=True)]

    return estimate(task, rows, queries, draw)


def span(x: Tensor) -> Tensor:
    """The principal directions that hold most of the rows' (uncentred) variance, `(columns, directions)`."""
    values, vectors = torch.linalg.eigh(x.T @ x)
    parts = values.flip(0).cumsum(0) / values.sum()
    return vectors.flip(1)[:, : int((parts < VARIANCE).sum()) + 1]


def examples(task: Task, rows: Tensor, queries: int, generator: torch.Generator) -> Matrices:
    gradients = [g[rows] for g in task.gradients]
    total = [torch.zeros_like(g[0]) for g in gradients]
    for _ in range(queries):
        directions = []
        for g in gradients:
            count, height, width = g.shape
            flips = signs((count, height, 1), generator) * signs((count, 1, width), generator)
            directions.append(signs((height, width), generator) * flips)
        slopes = sum((g * d).sum((1, 2)) for g, d in zip(gradients, directions, strict=True))
        for each, d in zip(total, directions, strict=True):
            each += (slopes[:, None, None] * d).mean(0) / queries
    return total


def greedy_pool(task: Task, rows: Tensor, queries: int, generator: torch.Generator) -> Matrices:
    gradients = [g[rows].mean(0) for g in task.gradients]
    pool = [[signs(g.shape, generator) for g in gradients] for _ in range(queries)]
    pool.sort(key=lambda direction: along(gradients, direction))
    chosen = pool[: max(1, queries // 2)]
    return [-torch.stack(each).mean(0) for each in zip(*chosen, strict=True)]


KINDS = {"dense": dense, "low rank": low_rank, "inputs": inputs, "examples": examples, "greedy pool": greedy_pool}


def orthogonal(matrix: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh


FORMS: dict[str, Callable[[Tensor], Tensor]] = {"as it is": lambda m: m, "sign": torch.sign, "singular": orthogonal}


def flat(matrices: Matrices) -> Tensor:
    return torch.cat([matrix.flatten() for matrix in matrices])


def cosines(task: Task, kind: Callable, queries: int, batch: int, seed: int) -> list[float]:
    """The cosines of all forms of the estimate after one step, then those after all steps."""
    generator = torch.Generator().manual_seed(seed)
    gradient = flat([g.mean(0) for g in task.gradients])
    momentum, found = [torch.zeros_like(g[0]) for g in task.gradients], []
    for step in range(STEPS):
        rows = torch.randperm(len(task.gradients[0]), generator=generator)[:batch]
        estimated = kind(task, rows, queries, generator)
        momentum = [MOMENTUM * m + e for m, e in zip(momentum, estimated, strict=True)]
        if step in (0, STEPS - 1):
            for form in FORMS.values():
                step_taken = flat([form(m) for m in momentum])
                found.append(float(nn.functional.cosine_similarity(step_taken, gradient, dim=0)))
    return found


@command
def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's folder, with LoRA and two tasks at least")
    parser.add_argument("--dataset_path", help="the dataset, if it is not where the run had it")
    parser.add_argument("--queries", type=int, default=2, help="passes beside the one at θ")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--images", type=int, default=192, help="training images of the task")
    parser.add_argument("--trials", type=int, default=20)
    options = parser.parse_args()
    task = Task(options.run, options.dataset_path, options.images)
    count = sum(g[0].numel() for g in task.gradients)
    print(f"{count} weights; a direction at random has a cosine of 0 ± {count**-0.5:.4f}.\n")
    steps = [f"{form}, {number}" for number in ("one step", f"{STEPS} steps") for form in FORMS]
    print(f"| directions | {' | '.join(steps)} |\n|---" + "|---" * len(steps) + "|")
    for name, kind in KINDS.items():
        found = np.array([cosines(task, kind, options.queries, options.batch, s) for s in range(options.trials)])
        error = found.std(axis=0, ddof=1) / len(found) ** 0.5
        cells = [f"{mean:.4f} ± {each:.4f}" for mean, each in zip(found.mean(axis=0), error, strict=True)]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
