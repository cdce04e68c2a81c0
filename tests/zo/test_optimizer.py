import copy

import pytest
import torch
from torch import nn

from hf_zocl.zo import HybridOptimizer, LayerAssignment, SignSGD, build_zo_optimizer


def parts(model: nn.Module, name: str = "sgd", **options):
    split = LayerAssignment("dual", [r"^1\."]).split(model)
    fo = torch.optim.AdamW(split.fo.values(), lr=0.01)
    return fo, build_zo_optimizer(split.zo, name, **options)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))


def run(model: nn.Module, optimizer, steps: int = 3) -> list[torch.Tensor]:
    for step in range(steps):
        for number, p in enumerate(model.parameters()):
            p.grad = torch.full_like(p, 0.1 * (step + 1) * (-1) ** number)
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def test_both_parts_step_by_their_own_rule():
    reference, model = network(), network()
    fo, zo = parts(reference, lr=0.5, momentum=0.9)
    for step in range(3):
        for number, p in enumerate(reference.parameters()):
            p.grad = torch.full_like(p, 0.1 * (step + 1) * (-1) ** number)
        fo.step()
        zo.step()
    result = run(model, HybridOptimizer(*parts(model, lr=0.5, momentum=0.9)))
    assert all(torch.equal(a, b) for a, b in zip(result, reference.parameters(), strict=True))


def test_one_scheduler_drives_both_learning_rates():
    optimizer = HybridOptimizer(*parts(network(), lr=0.5))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.005, 0.25]
    assert [part.param_groups[0]["lr"] for part in optimizer.parts] == [0.005, 0.25]


def test_the_state_round_trips_and_training_goes_on_as_if_uninterrupted():
    whole = network()
    expected = run(whole, HybridOptimizer(*parts(whole, "adamw", lr=0.1)), steps=4)

    first = network()
    optimizer = HybridOptimizer(*parts(first, "adamw", lr=0.1))
    run(first, optimizer, steps=2)
    state = copy.deepcopy(optimizer.state_dict())
    second = copy.deepcopy(first)
    resumed = HybridOptimizer(*parts(second, "adamw", lr=0.1))
    resumed.load_state_dict(state)
    for step in (2, 3):
        for number, p in enumerate(second.parameters()):
            p.grad = torch.full_like(p, 0.1 * (step + 1) * (-1) ** number)
        resumed.step()
    assert all(torch.equal(a, b) for a, b in zip(second.parameters(), expected, strict=True))


def test_the_state_dict_has_the_usual_form():
    optimizer = HybridOptimizer(*parts(network(), lr=0.5, momentum=0.9))
    assert set(optimizer.state_dict()) == {"state", "param_groups"}
    assert [group["params"] for group in optimizer.state_dict()["param_groups"]] == [[0, 1], [2, 3]]


def test_a_state_of_other_layers_is_refused():
    model = network()
    saved = HybridOptimizer(*parts(model)).state_dict()
    split = LayerAssignment("dual", [r"^0\."]).split(model)
    other = HybridOptimizer(torch.optim.AdamW(split.fo.values(), lr=0.01), build_zo_optimizer(split.zo))
    with pytest.raises(ValueError, match="another zo_branch or zo_layers"):
        other.load_state_dict(saved)


def test_zero_grad_clears_both_parts():
    model = network()
    optimizer = HybridOptimizer(*parts(model))
    run(model, optimizer, steps=1)
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_sign_moves_every_coordinate_by_the_learning_rate():
    p = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    p.grad = torch.tensor([1e-6, -50.0, 0.0])
    SignSGD([p], lr=0.25).step()
    assert p.tolist() == [0.75, 2.25, 3.0]


def test_sign_decays_weights_apart_from_the_step():
    p = nn.Parameter(torch.tensor([2.0]))
    p.grad = torch.tensor([1.0])
    SignSGD([p], lr=0.5, weight_decay=0.5).step()
    assert p.item() == 2.0 * 0.75 - 0.5


def test_sign_with_momentum_follows_the_running_sum():
    p = nn.Parameter(torch.tensor([0.0]))
    optimizer = SignSGD([p], lr=1.0, momentum=0.9)
    for gradient, expected in [(1.0, -1.0), (-0.5, -2.0), (-0.5, -1.0)]:
        p.grad = torch.tensor([gradient])
        optimizer.step()
        assert p.item() == expected


def test_an_unknown_rule_is_named():
    with pytest.raises(ValueError, match="zo_optim='lion'.*sgd, sign, adamw"):
        parts(network(), "lion")


class EightBit(torch.optim.SGD):
    """Keeps a state of bytes, as bitsandbytes does, and loads it by a rule of its own."""

    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter].setdefault("codes", torch.zeros_like(parameter, dtype=torch.uint8)).add_(1)

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state["codes"] = state["codes"].to(torch.uint8)


def test_every_part_loads_its_state_by_its_own_rule():
    def build(model):
        split = LayerAssignment("dual", [r"^1\."]).split(model)
        return HybridOptimizer(EightBit(split.fo.values()), build_zo_optimizer(split.zo, "sign", momentum=0.9))

    model = network()
    optimizer = build(model)
    run(model, optimizer, steps=2)
    again = build(network())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    states = list(again.state.values())
    assert [state["codes"].dtype for state in states[:2]] == [torch.uint8] * 2
    assert all((state["codes"] == 2).all() for state in states[:2])
    assert all("momentum_buffer" in state for state in states[2:])
    with pytest.raises(ValueError, match="another zo_branch or zo_layers"):
        again.load_state_dict({"state": {}, "param_groups": optimizer.state_dict()["param_groups"][:1]})
