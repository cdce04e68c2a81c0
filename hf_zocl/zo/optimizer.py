"""One torch optimizer over the first-order and the zeroth-order groups."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from .assignment import ZOGroup, in_branch


ZO_OPTIMIZERS = ("sgd", "sign", "adamw")
BETAS = (0.9, 0.999)
# In a zeroth-order group: the factor by which a step multiplies `lr`, the scheduled rate.
RATE_FACTOR = "zo_rate_factor"


def rate_factor(group: Mapping[str, Any]) -> float:
    return group.get(RATE_FACTOR, 1.0)


class SignSGD(torch.optim.Optimizer):
    """θ ← θ − η·sign(m) − η·λ·θ with m ← μ·m + g (Signum, Bernstein et al. 2018; ZO-SignSGD, Liu et al. 2019).

    Args:
        params: Parameters or groups.
        lr: η.
        momentum: μ.
        weight_decay: λ, decoupled.
    """

    def __init__(self, params, lr: float = 1e-3, momentum: float = 0.0, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                update = parameter.grad
                if group["momentum"]:
                    state = self.state[parameter]
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = torch.zeros_like(parameter)
                    update = state["momentum_buffer"].mul_(group["momentum"]).add_(update)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.sign(), alpha=-group["lr"])
        return loss


def build_zo_optimizer(
    groups: Sequence[ZOGroup],
    name: str = "sgd",
    lr: float | Mapping[str | None, float] = 1e-3,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = BETAS,
) -> torch.optim.Optimizer:
    """The rule for the zeroth-order parameters: one parameter group per branch, marked by its key `zo_branch`.

    A group holds its parameters' names as well, so that a state is not loaded into other layers.

    Args:
        groups: The zeroth-order parameters.
        name: `sgd`, `sign` or `adamw`.
        lr: η; one number, or one per branch.
        momentum: μ of `sgd` and `sign`.
        weight_decay: λ.
        betas: β₁ and β₂ of `adamw`.

    Raises:
        ValueError: If `name` is none of `sgd`, `sign`, `adamw`.
    """
    branches: dict[str | None, dict] = {}
    for group in groups:
        fresh: dict[str, Any] = {
            "params": [],
            "lr": in_branch(lr, group.branch),
            "zo_branch": group.branch,
            "zo_names": [],
            "zo_rule": name,
        }
        branch = branches.setdefault(group.branch, fresh)
        branch["params"].extend(group.parameters)
        branch["zo_names"].extend(group.names)
    params = list(branches.values())
    highest = max(branch["lr"] for branch in params)  # a schedule's lowest rate is a fraction of it
    if name == "sgd":
        return torch.optim.SGD(params, highest, momentum=momentum, weight_decay=weight_decay)
    if name == "sign":
        return SignSGD(params, highest, momentum=momentum, weight_decay=weight_decay)
    if name == "adamw":
        return torch.optim.AdamW(params, highest, betas=betas, weight_decay=weight_decay)
    raise ValueError(f"zo_optim={name!r} is unknown: expected one of {', '.join(ZO_OPTIMIZERS)}.")


class HybridOptimizer(torch.optim.Optimizer):
    """Several optimizers that look like one.

    The parts keep their own rules, while the parameter groups and the state live here and the parts share them: a
    scheduler, `state_dict`, `zero_grad` and accelerate see an ordinary optimizer.

    Args:
        parts: The optimizers, first-order first; their groups keep their order.

    Attributes:
        stream: If set, it writes the last part's gradients one layer after another; that part steps once for each.
    """

    def __init__(self, *parts: torch.optim.Optimizer):
        self.parts = parts
        self.stream: Iterator[None] | None = None
        self._sizes: list[int] = []
        super().__init__([group for part in parts for group in part.param_groups], defaults={})
        self._sizes = [len(part.param_groups) for part in parts]
        self.defaults = dict(parts[0].defaults)  # some schedulers read the learning rate here
        self._share()

    def _share(self) -> None:
        """Let the parts see these groups and this state (state is keyed by parameter, so it needs no splitting)."""
        for part, groups in self._by_part(self.param_groups):
            part.param_groups, part.state = groups, self.state

    def _by_part(self, groups: list[dict]) -> Iterator[tuple[torch.optim.Optimizer, list[dict]]]:
        first = 0
        for part, size in zip(self.parts, self._sizes, strict=True):
            yield part, groups[first : first + size]
            first += size

    def add_param_group(self, param_group: dict) -> None:
        """Add a group to the first part.

        Raises:
            ValueError: If that part is the zeroth-order one: nothing says in which layers the parameters are.
        """
        if not self._sizes:  # called by `Optimizer.__init__`
            return super().add_param_group(param_group)
        first = self.parts[0]
        if any("zo_branch" in group for group in first.param_groups):
            raise ValueError("All parameters are zeroth-order: no other group can be added.")
        first.add_param_group(param_group)
        self.param_groups.insert(self._sizes[0], first.param_groups[-1])
        self._sizes[0] += 1
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        *others, last = self.parts
        for part in others:
            part.step()
        scheduled = [group["lr"] for group in last.param_groups]
        try:
            for group in last.param_groups:
                group["lr"] *= rate_factor(group)
            for _ in [None] if self.stream is None else self.stream:
                last.step()
        finally:
            for group, rate in zip(last.param_groups, scheduled, strict=True):
                group["lr"] = rate
        self.stream = None
        return loss

    def load_state_dict(self, state_dict: dict) -> None:
        """As `torch.optim.Optimizer.load_state_dict`, each part by its own rules (8-bit states stay 8-bit).

        Raises:
            ValueError: If the state was saved under another layer assignment or another `zo_optim`.
        """
        groups = state_dict["param_groups"]
        if [group.get("zo_names") for group in groups] != [group.get("zo_names") for group in self.param_groups]:
            raise ValueError(
                "The optimizer state was saved with another zo_branch or zo_layers than the current ones."
            )
        for saved, present in zip(groups, self.param_groups, strict=True):
            if (rule := saved.get("zo_rule", present.get("zo_rule"))) != present.get("zo_rule"):
                raise ValueError(
                    f"The optimizer state was saved with another zo_optim than the current one: {rule!r}, not "
                    f"{present['zo_rule']!r}."
                )
        self.state = defaultdict(dict)
        for part, own in self._by_part(groups):
            numbers = {number for group in own for number in group["params"]}
            state = {number: value for number, value in state_dict["state"].items() if number in numbers}
            part.load_state_dict({"state": state, "param_groups": own})
            self.state.update(part.state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        self._share()

    def train(self) -> None:
        """Call the parts' `train`, if they have one: schedule-free optimizers switch between two sets of weights."""
        self._call_parts("train")

    def eval(self) -> None:
        self._call_parts("eval")

    def _call_parts(self, method: str) -> None:
        for part in self.parts:
            if callable(getattr(part, method, None)):
                getattr(part, method)()
