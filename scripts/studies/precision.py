"""How well loss differences give the derivatives, by model, tower and precision: the table in docs/precision.md.

    python scripts/studies/precision.py [--model path/to/a/clip] [--estimator two-sided]

It takes the first batch of the embedded CIFAR-10, adapters fresh or drawn at random, every layer zeroth-order, and 16
directions. `auto` is the ε that a training chooses; the other rows are a given ε in the passes of a training.
"""

import argparse
import tempfile
from collections.abc import Iterator

import torch
from datasets import load_dataset
from torch import nn
from transformers import AutoProcessor, CLIPModel

from hf_zocl import ZOCLTrainer, ZOCLTrainingArguments
from hf_zocl.commands import Parser, command
from hf_zocl.models import AdapterArguments, CLIPClassifier, add_adapter
from hf_zocl.sample import resolve, sample_path
from hf_zocl.zo import Combination, Estimate, draw_direction


QUERIES = 16


class FirstStep(ZOCLTrainer):
    """A training of one step that keeps its estimate and does not apply it."""

    estimate: Estimate

    def _install_estimates(self) -> None:
        ((self.estimate, _),) = self._estimates
        super()._install_estimates()


def classifier(folder: str, adapter: str, is_fresh: bool, names: list[str]) -> CLIPClassifier:
    torch.manual_seed(0)
    arguments = AdapterArguments(adapter=adapter, moe_noise=False, moe_dropout=0.0)
    clip = add_adapter(CLIPModel.from_pretrained(folder), arguments)
    model = CLIPClassifier(clip, AutoProcessor.from_pretrained(folder).tokenizer, names)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.ndim > 1 and not is_fresh:
            nn.init.normal_(parameter, std=0.02)
    return model


def derivatives(model: nn.Module, batch: dict, parameters: list[nn.Parameter], gradient: Combination) -> torch.Tensor:
    """∇L·Δ of every direction, by backpropagation."""
    own = torch.autograd.grad(model(**batch).loss, parameters, allow_unused=True)
    pieces = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, own, strict=True)]
    whole = torch.cat([piece.flatten() for piece in pieces])
    return torch.stack([whole @ draw_direction(len(whole), seed) for seed in gradient.seeds])


def table(options: argparse.Namespace) -> Iterator[str]:
    folder = str(resolve(options.model))
    data = load_dataset(str(sample_path("cifar10-sample")), split="train").shuffle(seed=0)
    names, rows = data.features["label"].names, data[:32]
    images = AutoProcessor.from_pretrained(folder).image_processor(images=rows["img"], return_tensors="pt")
    batch = {"pixel_values": images["pixel_values"], "labels": torch.tensor(rows["label"])}
    examples = [{name: value[i] for name, value in batch.items()} for i in range(32)]
    for adapter in ("lora", "moe"):
        for is_fresh in (True, False):
            for bf16 in (False, True):
                for eps in ("auto", *options.eps):
                    model = classifier(folder, adapter, is_fresh, names)
                    args = ZOCLTrainingArguments(
                        tempfile.mkdtemp(), max_steps=1, per_device_train_batch_size=32, bf16=bf16, use_cpu=True,
                        report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
                        zo_layers="all", zo_estimator=options.estimator, zo_queries=QUERIES, zo_eps=eps,
                        zo_learning_rate=0.0,
                    )  # fmt: skip
                    trainer = FirstStep(model=model, args=args, train_dataset=examples)
                    if eps != "auto":
                        FirstStep._measure_differences = lambda *_: None
                    trainer.train()
                    if eps != "auto":
                        del FirstStep._measure_differences
                    for branch, perturbation in trainer._estimator.perturbations.items():
                        gradient = trainer.estimate.gradient[branch]
                        true = derivatives(model, batch, perturbation.parameters, gradient)
                        both = torch.stack([gradient.weights * QUERIES, true])
                        error = (both[0] - both[1]).square().mean().sqrt() / true.square().mean().sqrt()
                        own = trainer._estimator.resolutions.get(branch)
                        size = f"auto: {own.eps:.1e}" if own else eps
                        passes = "float32" if not bf16 or (own and own.finer) else "bf16"
                        noise = f"{own.noise:.0e}" if own else ""
                        yield (
                            f"| {adapter}, {'fresh' if is_fresh else 'random'} | {branch} | "
                            f"{'bf16' if bf16 else 'float32'} | {size} | {passes} "
                            f"| {noise} | {float(error):.2f} | {float(both.corrcoef()[0, 1]):.3f} |"
                        )


@command
def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini-clip")
    parser.add_argument("--estimator", default="one-sided")
    parser.add_argument("--eps", type=float, nargs="*", default=[1e-3, 1e-2], help="given sizes beside auto")
    print(
        "| adapter | tower | training | ε | passes | noise | error | correlation |\n|---|---|---|---|---|---|---|---|"
    )
    for row in table(parser.parse_args()):
        print(row, flush=True)


if __name__ == "__main__":
    main()
