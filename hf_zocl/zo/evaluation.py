"""The cheapest way to a loss under a perturbation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch


class ForwardState:
    """What a forward pass reads and changes besides its parameters: torch's global generators, and a model's buffers.

    Args:
        device: Its generator is kept beside the CPU's.
        buffers: For example the running statistics of batch normalisation.
    """

    def __init__(self, device: torch.device, buffers: Iterable[torch.Tensor] = ()):
        self.device = device
        self.buffers = [(buffer, buffer.clone()) for buffer in buffers]
        self.cpu = torch.get_rng_state()
        self.accelerator = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)

    def restore(self) -> None:
        for buffer, value in self.buffers:
            buffer.copy_(value)
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            torch.get_device_module(self.device).set_rng_state(self.accelerator, self.device)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ForwardState):
            return NotImplemented
        pairs = [(mine, theirs) for (_, mine), (_, theirs) in zip(self.buffers, other.buffers, strict=True)]
        pairs.append((self.cpu, other.cpu))
        if self.accelerator is not None:
            pairs.append((self.accelerator, other.accelerator))
        return all(torch.equal(mine, theirs) for mine, theirs in pairs)

    __hash__ = None


class PlainEvaluation:
    """Every loss by one full forward pass, all of them from the same state.

    Args:
        forward: Returns the loss, a scalar, at the present parameters.
        before: The state in which the step's first forward pass started: every evaluation starts there too, so that
            dropout masks do not differ between the losses of one estimate.
        after: The state that a single pass leaves behind, to which `close` returns, so that the number of queries does
            not change what the next step draws; by default, the state after the first evaluation.
    """

    def __init__(self, forward: Callable[[], torch.Tensor], before: ForwardState, after: ForwardState | None = None):
        self.forward, self.before, self.after = forward, before, after

    def __call__(self, perturbed: str | None) -> torch.Tensor:
        self.before.restore()
        loss = self.forward()
        if self.after is None:
            self.after = ForwardState(self.before.device, [buffer for buffer, _ in self.before.buffers])
        return loss

    def close(self) -> None:
        if self.after is not None:
            self.after.restore()


class TowerEvaluation:
    """The loss of a two-tower model: only the perturbed tower is run again.

    The towers meet in the last product alone, so the other tower's features are computed once a step and reused. It
    stands only where a forward pass leaves the state as it was: it draws no random numbers and changes no buffer.

    Args:
        encode: The features of one tower, given its name, at the present parameters.
        combine: The loss, a scalar, from the features of all towers.
        towers: The names of the towers.
        features: The features at θ that are there already, from a first-order pass.
    """

    def __init__(
        self,
        encode: Callable[[str], torch.Tensor],
        combine: Callable[[Mapping[str, torch.Tensor]], torch.Tensor],
        towers: Sequence[str],
        features: Mapping[str, torch.Tensor] | None = None,
    ):
        self.encode, self.combine, self.towers = encode, combine, towers
        self.features = dict(features or {})

    def __call__(self, perturbed: str | None) -> torch.Tensor:
        features = {}
        for tower in self.towers:
            if tower == perturbed:
                features[tower] = self.encode(tower)
            else:
                if tower not in self.features:
                    self.features[tower] = self.encode(tower)
                features[tower] = self.features[tower]
        return self.combine(features)

    def close(self) -> None:
        self.features.clear()
