"""Measure how much of a step is gradient and how much is noise, by branch, while a recipe trains.

    python scripts/studies/alignment.py --recipe cifar10 --zo_layers all --output runs/alignment.json

Every few steps, the gradient over several batches of the task is computed by backpropagation and compared with the
step that the optimizer then takes: the cosine of the two, over the parameters of each tower. It is 1 for a step along
the gradient, and 0 ± 1/√d in d parameters for a step of noise alone, which still moves the weights by its full length:
then a smaller `zo_learning_rate` for that tower, or more queries, is worth a try. Further arguments are those of
`python -m hf_zocl train`. The figures are of training images.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import TrainerCallback

from hf_zocl.commands import Parser, command
from hf_zocl.commands.recipe import build_scheduler, parse_recipe
from hf_zocl.data import TaskStream
from hf_zocl.files import write_json
from hf_zocl.passes import ForwardState
from hf_zocl.zo import LayerAssignment


@command
def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--tasks", type=int, help="only the first so many tasks")
    parser.add_argument("--every", type=int, default=5, help="steps between two measurements")
    parser.add_argument("--batches", type=int, default=6, help="batches of the task that the gradient is taken over")
    parser.add_argument("--output", type=Path, help="a JSON file with every measurement")
    options, further = parser.parse_known_args()
    rows: list[dict[str, Any]] = []
    for seed in tqdm(options.seeds, desc="seeds"):
        with tempfile.TemporaryDirectory(prefix="hf-zocl-alignment-") as folder:
            arguments = ["--recipe", options.recipe, *further, "--seed", str(seed), "--output_dir", folder]
            scheduler = build_scheduler(parse_recipe([*arguments, "--disable_tqdm", "true"]))
            stream = scheduler.stream
            scheduler.stream = TaskStream(list(stream)[: options.tasks], stream.name, scenario=stream.scenario)
            probe = Probe(scheduler.model, options.every, options.batches)
            scheduler.callbacks.append(probe)
            scheduler.run()
            rows += [{"seed": seed, **row} for row in probe.rows]
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.output, {"recipe": Path(options.recipe).name, "arguments": further, "rows": rows})
    print(format_table(rows))


class Probe(TrainerCallback):
    """Compares steps, at a fixed interval, with the gradient over the first batches of the task.

    Args:
        model: The model before its training, while all trained parameters require a gradient.
        every: Steps between two measurements.
        batches: How many batches the gradient is taken over.
    """

    def __init__(self, model: nn.Module, every: int, batches: int):
        self.every, self.count = every, batches
        self.parameters: dict[str, list[nn.Parameter]] = {}
        for group in LayerAssignment("dual", "all").split(model).zo:
            self.parameters.setdefault(group.branch or "model", []).extend(group.parameters)
        self.rows: list[dict[str, Any]] = []
        self.task = 0
        self.batches: list[dict[str, torch.Tensor]] = []
        self.before: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        self.task += 1
        random_state = ForwardState(args.device)
        self.batches = [batch for _, batch in zip(range(self.count), train_dataloader, strict=False)]
        random_state.restore()  # so that measuring does not change the training

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0:
            random_state = ForwardState(args.device, model.buffers())
            self.before = {
                branch: (_flat(own), gradient)
                for (branch, own), gradient in zip(self.parameters.items(), self._gradients(model, args), strict=True)
            }
            random_state.restore()

    def on_optimizer_step(self, args, state, control, **kwargs):
        for branch, (start, gradient) in self.before.items():
            step = start - _flat(self.parameters[branch])
            row = {"task": self.task, "step": state.global_step, "branch": branch, "parameters": len(step)}
            # The first steps of a warm-up may have a rate of zero.
            if step.norm() > 0 and gradient.norm() > 0:
                cosine = torch.nn.functional.cosine_similarity(step, gradient, dim=0).item()
                self.rows.append({**row, "cosine": cosine, "length": step.norm().item()})
        self.before = {}

    def _gradients(self, model: nn.Module, args) -> list[torch.Tensor]:
        """The gradient of the mean loss, one vector for each branch."""
        parameters = [parameter for own in self.parameters.values() for parameter in own]
        required = [parameter.requires_grad for parameter in parameters]
        for parameter in parameters:
            parameter.requires_grad_(True)
        total = [torch.zeros_like(parameter) for parameter in parameters]
        model.train()  # before the first step, the model is still in evaluation mode
        for batch in self.batches:
            loss = model(**{name: value.to(args.device) for name, value in batch.items()}).loss
            gradient = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
            torch._foreach_add_(total, gradient)
        for parameter, value in zip(parameters, required, strict=True):
            parameter.requires_grad_(value)
        pieces = iter(total)
        return [torch.cat([next(pieces).flatten() for _ in own]) for own in self.parameters.values()]


def _flat(parameters: list[nn.Parameter]) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in parameters])


def format_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| branch | parameters | cosine with the gradient | of noise | length of a step |"]
    lines += ["|---|---:|---:|---:|---:|"]
    for branch in dict.fromkeys(row["branch"] for row in rows):
        own = [row for row in rows if row["branch"] == branch]
        cosine, length = (statistics.mean(row[name] for row in own) for name in ("cosine", "length"))
        count = own[0]["parameters"]
        lines.append(f"| {branch} | {count} | {cosine:.4f} | ± {count**-0.5:.4f} | {length:.3g} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
