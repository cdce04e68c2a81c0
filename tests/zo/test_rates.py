"""The learning rate by slope and curvature: free of scales, and near the best on a bowl."""

import math

import pytest
import torch
from torch import nn

from hf_zocl.zo import ZOGroup, balanced_rate, build_zo_optimizer, draw_direction
from hf_zocl.zo.rates import MAX_MOVE


RULES = [("sign", 0.9), ("sign", 0.0), ("adamw", 0.0), ("sgd", 0.0), ("sgd", 0.9)]


@pytest.mark.parametrize(("rule", "momentum"), RULES)
@pytest.mark.parametrize("options", [{}, {"is_sign": True}, {"has_scale": False}])
def test_the_same_weights_move_alike_whatever_the_loss_is_multiplied_by(rule, momentum, options):
    one, hundred = (
        balanced_rate(rule, momentum, 4, slope=scale * 0.3, curvature=scale * 500.0, **options) for scale in (1, 100)
    )
    # The estimate of plain SGD is a hundred times as long.
    expected = one / 100 if rule == "sgd" and not options else one
    assert hundred == pytest.approx(expected, rel=0.06)


@pytest.mark.parametrize("rule", ["sign", "adamw"])
def test_weights_of_another_size_move_in_proportion(rule):
    small, large = (balanced_rate(rule, 0.9, 1, slope=0.3 / size, curvature=500.0 / size**2) for size in (1.0, 3.0))
    assert large / small == pytest.approx(3, rel=0.06)


def test_more_queries_and_fewer_alike_steps_allow_more():
    one = balanced_rate("sign", 0.9, 1, 0.3, 500.0)
    assert balanced_rate("sign", 0.9, 16, 0.3, 500.0) == pytest.approx(4 * one, rel=0.06)
    assert balanced_rate("sign", 0.0, 1, 0.3, 500.0) == pytest.approx(math.sqrt(19) * one, rel=0.06)


def test_beside_first_order_layers_a_fifth_of_that():
    alone, beside = (balanced_rate("sign", 0.9, 1, 0.3, 500.0, is_alone=alone) for alone in (True, False))
    assert beside == pytest.approx(alone / 5, rel=0.06)


def test_no_weight_moves_by_more_than_the_derivatives_may_be_trusted():
    assert balanced_rate("sign", 0.9, 1, slope=1.0, curvature=1e-9) == MAX_MOVE
    assert balanced_rate("sgd", 0.0, 1, slope=2.0, curvature=1e-9) == pytest.approx(MAX_MOVE / 2)


class Bowl:
    """½ Σ hᵢ θᵢ², with curvatures of very different size."""

    def __init__(self, size: int):
        generator = torch.Generator().manual_seed(0)
        self.curvatures = 10 * torch.rand(size, generator=generator) ** 4
        self.start = torch.randn(size, generator=generator)

    def loss(self, point: torch.Tensor) -> float:
        return float((self.curvatures * point.detach().square()).sum() / 2)

    def derivatives(self) -> tuple[float, float]:
        directions = torch.stack([draw_direction(len(self.start), seed) for seed in range(8)])
        slopes = directions @ (self.curvatures * self.start)
        bends = directions.square() @ self.curvatures
        return float(slopes.square().mean().sqrt()), float(bends.square().mean().sqrt())

    def after(self, rule: str, momentum: float, queries: int, rate: float, steps: int = 100) -> float:
        """The loss after training over that before."""
        point = nn.Parameter(self.start.clone())
        optimizer = build_zo_optimizer([ZOGroup(None, None, 1e-3, ("point",), (point,))], rule, rate, momentum)
        for step in range(steps):
            gradient = self.curvatures * point.detach()
            directions = torch.stack([draw_direction(len(point), 1000 * step + i) for i in range(queries)])
            point.grad = (directions @ gradient) @ directions / queries
            optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
            optimizer.step()
        return self.loss(point) / self.loss(self.start)


@pytest.mark.parametrize(("rule", "momentum", "queries"), [("sign", 0.9, 1), ("sign", 0.9, 8), ("adamw", 0.0, 1)])
def test_on_a_bowl_the_rate_is_near_the_best(rule, momentum, queries):
    bowl = Bowl(3000)
    rate = balanced_rate(rule, momentum, queries, *bowl.derivatives())
    found = {part: bowl.after(rule, momentum, queries, part * rate) for part in (0.1, 1 / 3, 1, 3, 10)}
    gains = {part: 1 - left for part, left in found.items()}
    assert gains[1] > 0.4 * max(gains.values()) and gains[1] > max(gains[0.1], gains[1 / 3], gains[10])


@pytest.mark.parametrize(("momentum", "queries"), [(0.0, 1), (0.9, 4)])
def test_plain_sgd_stays_on_the_safe_side(momentum, queries):
    bowl = Bowl(3000)
    rate = balanced_rate("sgd", momentum, queries, *bowl.derivatives())
    gains = [1 - bowl.after("sgd", momentum, queries, part * rate) for part in (0.3, 1, 3)]
    assert 0 < gains[0] < gains[1] < gains[2]
