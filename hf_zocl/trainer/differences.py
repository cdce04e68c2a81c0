"""Checks that differences of losses exceed their rounding: measured as a training begins, and watched after that."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn
from transformers.utils import logging

from ..files import written_whole
from ..zo import Combination, Estimate, Evaluation, Resolution, ZOEstimator, direction_seed
from ..zo.estimators.base import wide
from ..zo.noise import Line, measure, two_sided_would_do


logger = logging.get_logger(__name__)

NOISE_FILE = "zo_noise.json"
# ε where the loss does not change at any ε.
DEFAULT_EPS = 1e-3
# A loss may be flat at first, as an on-policy one is: it is measured at up to this many steps.
TRIES = 4
# This many differences are enough to compare their mean with the noise.
ENOUGH = 32

MakeFiner = Callable[[set[str | None]], Evaluation]


class DifferenceWatch:
    """Chooses ε and the precision of the zeroth-order passes, and warns where differences are lost in rounding.

    Args:
        estimator: The estimator, which adopts what is measured.
        eps: ε of every branch; None where it is to be chosen.
        precision: The precision of the training, such as `bf16`, for messages.
    """

    def __init__(self, estimator: ZOEstimator, eps: Mapping[str | None, float | None], precision: str):
        self.estimator, self.precision = estimator, precision
        self.eps = {branch: eps[branch] for branch in estimator.queries}
        self.tries = TRIES if estimator.formula.has_eps else 0
        self._seen: dict[str | None, tuple[torch.Tensor | float, int]] = {}

    @property
    def _of(self) -> list:
        """What a measured ε is valid for, as saved in a checkpoint."""
        return [self.estimator.formula.is_two_sided, type(self).__name__]

    @property
    def is_settled(self) -> bool:
        return self.tries == 0

    def settle(
        self, evaluation: Evaluation, make_finer: MakeFiner | None, why_flat: Callable[[str | None], str]
    ) -> None:
        """Measure every branch on a micro-batch.

        Args:
            evaluation: Computes its losses by the training's own passes.
            make_finer: Makes an evaluation in which some branches are perturbed in full precision; None if none can.
            why_flat: Says why no perturbation of a branch changes the loss.
        """
        is_two_sided, found = self.estimator.formula.is_two_sided, {}
        for branch, eps in self.eps.items():
            line, finer = self._line(evaluation, branch), None
            if make_finer is not None:
                evaluation.losses([{}])  # a finer one reuses what this one has recorded
                finer = self._line(make_finer({branch}), branch)
            resolution = measure(line, finer, is_two_sided, eps)
            if resolution.slope == 0:
                resolution = Resolution(eps or DEFAULT_EPS, resolution.noise, math.inf, 0.0)
            found[branch] = resolution
            if resolution.finer:
                hint = ""
                if not is_two_sided and two_sided_would_do(resolution.training_noise, finer):
                    hint = f" zo_estimator=two-sided would work in {self.precision}."
                logger.warning_once(
                    f"{of_branch(branch)}: in {self.precision} no difference of losses is well above their "
                    f"rounding{' at zo_eps=' + str(eps) if eps else ''}, so its zeroth-order passes run in "
                    f"float32.{hint}"
                )
        is_seen = {branch: resolution.is_seen for branch, resolution in found.items()}
        self.tries = 0 if all(is_seen.values()) else self.tries - 1
        for branch, resolution in found.items():
            if not is_seen[branch]:
                logger.warning_once(f"{of_branch(branch)} {self._why_unseen(branch, resolution, why_flat)}")
        self.estimator.settle(found)
        logger.info("Zeroth-order passes: " + "; ".join(_described(*item) for item in found.items()) + ".")

    def check_repeats(self, first: torch.Tensor, again: torch.Tensor) -> None:
        """Check that passes leave nothing behind that changes the losses of later ones.

        Args:
            first, again: The loss at θ before and after the passes of `settle`.

        Raises:
            RuntimeError: If they differ by more than rounding, and more than a part of the differences to be measured.
        """
        estimator = self.estimator
        before, after = estimator.reduce(wide(torch.stack([first, again]))).tolist()  # the same in all processes
        parts = [max(0.1 * own.eps * own.slope, 10 * own.noise) for own in estimator.resolutions.values()]
        if abs(after - before) > max(min(parts), 16 * torch.finfo(torch.float32).eps * abs(before)):
            raise RuntimeError(
                f"Two passes at the same weights give losses of {before:.7g} and {after:.7g}: a pass leaves a state "
                "behind that changes later losses, so differences of losses would not come from the weights alone. "
                "Only random states and the model's buffers are restored: keep the state in a buffer "
                "(register_buffer), and draw from the global generators."
            )

    def see(self, estimate: Estimate) -> None:
        """Take note of a step's differences."""
        for branch, differences in estimate.differences.items():
            total, count = self._seen.get(branch, (0.0, 0))
            self._seen[branch] = (total + differences.abs().sum(), count + len(differences))

    def logs(self) -> dict[str, float]:
        """σ and ε of every branch, for the log; warns if a branch's differences since the last check are below σ."""
        logs: dict[str, float] = {}
        for branch, resolution in self.estimator.resolutions.items():
            suffix = f"_{branch}" if branch else ""
            logs |= {f"zo_noise{suffix}": resolution.noise, f"zo_eps{suffix}": resolution.eps}
            total, count = self._seen.get(branch, (0.0, 0))
            if count >= ENOUGH:
                del self._seen[branch]
                if resolution.is_seen and float(total) / count < resolution.noise:
                    logger.warning_once(
                        f"{of_branch(branch)}: the differences of losses have fallen below the rounding of a loss "
                        f"({resolution.noise:.1e}): the zeroth-order estimate is now only noise."
                    )
        if len(logs) > 2:
            logs["zo_noise"] = max(resolution.noise for resolution in self.estimator.resolutions.values())
        return logs

    def save(self, folder: Path) -> None:
        """Write what was measured into a checkpoint, so that a training that goes on keeps it."""
        if self.estimator.resolutions:
            measured = [[branch, self.eps[branch], asdict(own)] for branch, own in self.estimator.resolutions.items()]
            content = {"tries": self.tries, "measured": measured, "of": self._of}
            with written_whole(folder / NOISE_FILE) as unfinished:
                Path(unfinished).write_text(json.dumps(content), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Adopt what `save` wrote, unless another ε is asked for now."""
        file = folder / NOISE_FILE
        if self.is_settled or not file.is_file():
            return
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, list):  # of an earlier release, which wrote it once all was settled
            content = {"tries": 0, "measured": content}
        is_of_this = content.get("of", self._of) == self._of  # earlier releases did not say
        if is_of_this and {branch: eps for branch, eps, _ in content["measured"]} == self.eps:
            self.estimator.settle({branch: Resolution(**own) for branch, _, own in content["measured"]})
            self.tries = content["tries"]

    def _line(self, evaluation: Evaluation, branch: str | None) -> Line:
        """The losses of an evaluation along random directions of a branch, averaged over all processes."""
        estimator, perturbation = self.estimator, self.estimator.perturbations[branch]

        @torch.no_grad()
        def line(number: int, offsets) -> torch.Tensor:
            seed = direction_seed(estimator.seed, -1, 0, number)
            points = [{perturbation: Combination((seed,), (1.0,), offset)} if offset else {} for offset in offsets]
            losses = torch.stack(evaluation.losses(points))
            return estimator.reduce(wide(losses))

        return line

    def _why_unseen(self, branch: str | None, resolution: Resolution, why_flat: Callable[[str | None], str]) -> str:
        perturbation = self.estimator.perturbations[branch]
        if perturbation.is_rounded:
            dtype = str(next(p.dtype for p in perturbation.parameters if p.dtype.itemsize < 4)).removeprefix("torch.")
            return (
                f"keeps its weights in {dtype}, which mostly rounds away moves by zo_eps={resolution.eps} and their "
                "effect: load the model in float32 (dtype=torch.float32) and train with bf16=True."
            )
        if resolution.slope == 0:
            return f"learns nothing, because all differences of losses are exactly zero. {why_flat(branch)}"
        return (
            f"learns next to nothing: at zo_eps={resolution.eps} the differences of losses are about "
            f"{resolution.eps * resolution.slope:.1e}, and the rounding of a loss is {resolution.noise:.1e}. The loss "
            "is flat where the training begins, or computed too coarsely."
        )


def _described(branch: str | None, resolution: Resolution) -> str:
    precision = ", in float32" if resolution.finer else ""
    return f"{branch or 'model'} ε {resolution.eps:.2g}, rounding noise {resolution.noise:.1e}{precision}"


def of_branch(branch: str | None) -> str:
    return f"The {branch} tower" if branch else "The model"


def why_flat(
    module: nn.Module, parameters: Sequence[nn.Parameter], loss_with_gradient: Callable[[], torch.Tensor]
) -> str:
    """Why no perturbation of some parameters changes the loss.

    Args:
        module: The model.
        parameters: The perturbed parameters.
        loss_with_gradient: Computes the loss with autograd on.
    """
    mine = {id(parameter) for parameter in parameters}
    for name, layer in module.named_modules():
        if mine.isdisjoint(id(parameter) for parameter in layer.parameters()):
            continue
        for state, undo in (("merged", "unmerge it"), ("disable_adapters", "enable it")):
            if getattr(layer, state, False) is True:
                what = "merged into the weights" if state == "merged" else "disabled"
                return f"The adapter of {name} is {what}: {undo} to train it."
    if any(parameter.is_meta for parameter in module.parameters()):  # a backward pass needs all of the base in memory
        return "The loss does not depend on these weights, or compares the model with itself, as on-policy losses do."
    for parameter in parameters:
        parameter.requires_grad_(True)
    value: float | None = None
    gradients: tuple[torch.Tensor | None, ...] = ()
    try:
        loss = loss_with_gradient()
        value = float(loss.detach())
        if loss.requires_grad:
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    except RuntimeError as error:  # no memory for a backward pass, or an operation without one
        logger.info(f"No gradient to compare the differences with: {error}")
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
    if value is not None and not math.isfinite(value):
        return f"The loss is {value} where the training begins."
    if any(gradient is not None and bool((gradient != 0).any()) for gradient in gradients):
        return (
            "Backpropagation does have a gradient: the loss compares the model with itself, as on-policy losses do "
            "(GRPO with num_iterations=1), so its value is the same for any weights."
        )
    if value == 0:
        return "The loss is 0 and stays 0, as in a task with a single class."
    return "The loss does not depend on these weights at all."
