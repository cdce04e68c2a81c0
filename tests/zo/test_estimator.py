import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

from hf_zocl.passes import PlainEvaluation
from hf_zocl.zo import (
    ESTIMATORS,
    LayerAssignment,
    Resolution,
    ZOEstimator,
    build_zo_optimizer,
    direction_seed,
    draw_direction,
)


class Quadratic(nn.Module):
    """L(θ) = ½ (θ−c)ᵀA(θ−c), in float64, so that the estimates can be checked against the formula."""

    def __init__(self, size: int = 6):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        root = torch.randn(size, size, generator=generator, dtype=torch.float64)
        self.matrix, self.centre = root @ root.T, torch.randn(size, generator=generator, dtype=torch.float64)
        self.theta = nn.Parameter(torch.randn(size, generator=generator, dtype=torch.float64))

    def at(self, theta: torch.Tensor) -> torch.Tensor:
        return (theta - self.centre) @ self.matrix @ (theta - self.centre) / 2

    def forward(self) -> torch.Tensor:
        return self.at(self.theta)


EPS = 0.1  # a quadratic has no higher terms


def estimator_of(model: nn.Module, eps: float = EPS, **options) -> ZOEstimator:
    return ZOEstimator(LayerAssignment("dual", "all").split(model, eps=eps).zo, **options)


def directions_of(model: Quadratic, queries: int, step: int = 0) -> list[torch.Tensor]:
    return [draw_direction(len(model.theta), direction_seed(0, step, 0, i)).double() for i in range(queries)]


def accumulate(estimator: ZOEstimator, loss, step: int = 0, **options):
    """One estimate, and its gradient in `.grad`."""
    estimate = estimator.estimate(PlainEvaluation(loss), step=step, **options)
    return estimate, estimator.write([(estimate, 1.0)])


@pytest.mark.parametrize("queries", [1, 3])
def test_one_sided_is_equation_two(queries):
    model = Quadratic()
    accumulate(estimator_of(model, queries=queries), model)
    theta = model.theta.detach()
    expected = sum((model.at(theta + EPS * d) - model.at(theta)) / EPS * d for d in directions_of(model, queries))
    torch.testing.assert_close(model.theta.grad, expected / queries, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("queries", [1, 3])
def test_two_sided_is_spsa(queries):
    model = Quadratic()
    accumulate(estimator_of(model, estimator="two-sided", queries=queries), model)
    slopes = model.matrix @ (model.theta.detach() - model.centre)
    # On a quadratic the central difference is the directional derivative itself.
    expected = sum((slopes @ d) * d for d in directions_of(model, queries)) / queries
    torch.testing.assert_close(model.theta.grad, expected, rtol=1e-6, atol=1e-6)


def test_fzoo_divides_by_the_deviation_of_the_losses():
    model = Quadratic()
    accumulate(estimator_of(model, estimator="fzoo", queries=4), model)
    theta, directions = model.theta.detach(), directions_of(model, 4)
    losses = torch.stack([model.at(theta + EPS * d) for d in directions])
    expected = sum((loss - model.at(theta)) * d for loss, d in zip(losses, directions, strict=True)) / 4 / losses.std()
    torch.testing.assert_close(model.theta.grad, expected, rtol=1e-6, atol=1e-6)


def test_fzoo_leaves_a_query_without_a_finite_loss_out_of_the_deviation():
    model, calls = Quadratic(), []

    def loss():
        calls.append(1)
        return torch.tensor(float("inf")) if len(calls) == 3 else model()

    accumulate(estimator_of(model, estimator="fzoo", queries=4), loss)
    theta, directions = model.theta.detach(), directions_of(model, 4)
    kept = [d for i, d in enumerate(directions) if i != 1]
    losses = torch.stack([model.at(theta + EPS * d) for d in kept])
    expected = sum((loss - model.at(theta)) * d for loss, d in zip(losses, kept, strict=True)) / 4 / losses.std()
    torch.testing.assert_close(model.theta.grad, expected, rtol=1e-6, atol=1e-6)


def test_fzoo_needs_two_queries():
    with pytest.raises(ValueError, match="zo_queries=1.*'fzoo' needs at least 2"):
        estimator_of(Quadratic(), estimator="fzoo")


def test_an_unknown_estimator_is_named():
    with pytest.raises(ValueError, match="zo_estimator='three-sided'"):
        estimator_of(Quadratic(), estimator="three-sided")


def test_the_first_order_loss_is_reused():
    model, calls = Quadratic(), []

    def loss():
        calls.append(1)
        return model()

    accumulate(estimator_of(model, queries=2), loss, base_loss=model().detach())
    assert len(calls) == 2


def test_estimates_accumulate_with_their_scale():
    model = Quadratic()
    estimator = estimator_of(model, estimator="two-sided")
    estimates = [estimator.estimate(PlainEvaluation(model), step=0, micro_step=micro_step) for micro_step in (0, 1)]
    gradients = []
    for estimate in estimates:
        estimator.write([(estimate, 1.0)])
        gradients.append(model.theta.grad)
    first, second = gradients
    estimator.write([(estimate, 0.5) for estimate in estimates])
    torch.testing.assert_close(model.theta.grad, (first + second) / 2)


def test_sign_normalisation_keeps_the_sign_alone():
    model = Quadratic()
    accumulate(estimator_of(model, queries=2), model)
    raw = model.theta.grad
    accumulate(estimator_of(model, queries=2, sign=True), model)
    assert torch.equal(model.theta.grad, raw.sign())


def test_conservative_takes_the_candidate_with_the_lowest_loss():
    model, rate = Quadratic(), 1e-3
    accumulate(estimator_of(model, estimator="conservative", queries=3), model, learning_rate=rate)
    theta, directions = model.theta.detach(), directions_of(model, 3)
    estimates = [(model.at(theta + EPS * d) - model.at(theta)) / EPS * d for d in directions]
    candidates = [torch.zeros_like(theta), *estimates, sum(estimates) / 3]
    best = min(candidates, key=lambda g: model.at(theta - rate * g))
    torch.testing.assert_close(model.theta.grad, best, rtol=1e-6, atol=1e-6)
    assert best.any()


def test_conservative_stands_still_when_every_step_would_climb():
    model = Quadratic()
    with torch.no_grad():
        model.theta.copy_(model.centre)
    accumulate(estimator_of(model, estimator="conservative", queries=3), model, learning_rate=0.1)
    assert not model.theta.grad.any()


@pytest.mark.parametrize("queries", [1, 3])
def test_the_forward_gradient_is_the_derivative_along_each_direction(queries):
    model = Quadratic()
    before = model.theta.detach().clone()
    estimate, _ = accumulate(estimator_of(model, estimator="forward-gradient", queries=queries), model)
    exact = model.matrix @ (before - model.centre)
    directions = directions_of(model, queries)
    torch.testing.assert_close(estimate.differences[None], torch.stack([exact @ d for d in directions]))
    torch.testing.assert_close(model.theta.grad, sum(exact @ d * d for d in directions) / queries)
    assert estimate.loss == model.at(before)
    assert torch.equal(model.theta, before)


def test_the_forward_gradient_of_a_loss_that_does_not_depend_on_the_parameters_is_zero():
    model = Quadratic()
    accumulate(estimator_of(model, estimator="forward-gradient"), lambda: torch.tensor(3.0))
    assert not model.theta.grad.any()


def test_a_tangent_is_gone_after_its_pass_also_when_the_pass_fails():
    model = Quadratic()
    (perturbation,) = estimator_of(model).perturbations.values()

    with forward_ad.dual_level(), torch.no_grad():
        with pytest.raises(RuntimeError), perturbation.at(perturbation.tangent(1)):
            raise RuntimeError
        tangent = forward_ad.unpack_dual(model()).tangent
    assert tangent is None or not tangent.any()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_query_without_a_finite_loss_leaves_the_estimate_finite(estimator, bad):
    model, calls = Quadratic(), []

    def loss():
        calls.append(1)
        return torch.tensor(bad) if len(calls) == 3 else model()

    accumulate(estimator_of(model, estimator=estimator, queries=3), loss, learning_rate=1e-3)
    assert model.theta.grad.isfinite().all()


def test_conservative_never_takes_a_candidate_without_a_finite_loss():
    model, calls = Quadratic(), []

    def loss():
        calls.append(1)
        return model() if len(calls) <= 2 else torch.tensor(float("nan"))

    accumulate(estimator_of(model, estimator="conservative"), loss, learning_rate=1e-3)
    assert not model.theta.grad.any()


class TwoTowers(nn.Module):
    def __init__(self):
        super().__init__()
        self.vision_model = nn.Linear(3, 1, bias=False)
        self.text_model = nn.Linear(3, 1, bias=False)

    def forward(self, perturbed=None):
        return (self.vision_model.weight * self.text_model.weight).sum()


def where(model: TwoTowers, start: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The towers that are not at θ, and how far they are from it."""
    moved = {name: (p - start[name]).flatten() for name, p in model.named_parameters()}
    return {name.split("_")[0]: move for name, move in moved.items() if move.any()}


def moves_of(estimator: str, **options) -> list[dict[str, torch.Tensor]]:
    """Where the parameters are in each forward pass of one estimate."""
    model, seen = TwoTowers(), []
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    groups = LayerAssignment("dual", "all").split(model, {"vision": 1e-3, "language": 1e-1}).zo

    def loss():
        seen.append(where(model, start))
        return model()

    accumulate(ZOEstimator(groups, estimator, **options), loss)
    return seen


def test_the_branches_take_turns_with_their_own_eps_and_directions():
    base, first, second = moves_of("one-sided", seed=1)
    assert (list(base), list(first), list(second)) == ([], ["vision"], ["text"])
    assert first["vision"].norm() * 10 < second["text"].norm()
    assert not torch.allclose(first["vision"] / 1e-3, second["text"] / 1e-1, atol=0.1)


def test_two_sided_branches_are_averaged_over_both_sides_of_the_other():
    points = moves_of("two-sided", queries={"vision": 1, "language": 3})
    assert all(set(point) == {"vision", "text"} for point in points)
    # Four points where the first queries meet, and two sides of vision for each side of two further text queries.
    assert len(points) == 4 + 2 * 2 * 2
    assert torch.stack([point["vision"] for point in points[:4]]).sum(dim=0).abs().max() < 1e-6


def test_two_sided_with_two_branches_is_each_branchs_own_derivative():
    """The loss is bilinear, so averaging over both sides of the other branch leaves no trace of it."""
    model = TwoTowers().double()
    groups = LayerAssignment("dual", "all").split(model, eps=0.3).zo
    accumulate(ZOEstimator(groups, "two-sided"), model)
    vision, text = model.vision_model.weight, model.text_model.weight
    directions = [draw_direction(3, direction_seed(0, 0, 0, i)).double() for i in (0, 1)]
    torch.testing.assert_close(vision.grad[0], (text[0] @ directions[0]) * directions[0])
    torch.testing.assert_close(text.grad[0], (vision[0] @ directions[1]) * directions[1])


def test_every_branch_has_its_own_number_of_queries():
    model = TwoTowers()
    groups = LayerAssignment("dual", "all").split(model).zo
    estimate, _ = accumulate(ZOEstimator(groups, queries={"vision": 1, "language": 5}), model)
    assert {branch: len(d) for branch, d in estimate.differences.items()} == {"vision": 1, "language": 5}


def test_many_queries_align_with_the_true_gradient():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    inputs, labels = torch.randn(32, 6), torch.randint(0, 3, (32,))
    F.cross_entropy(model(inputs), labels).backward()
    true = torch.cat([p.grad.flatten() for p in model.parameters()])
    for estimator in ("one-sided", "two-sided"):
        model.zero_grad()
        accumulate(
            estimator_of(model, eps=1e-3, estimator=estimator, queries=1000),
            lambda: F.cross_entropy(model(inputs), labels),
        )
        estimate = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert F.cosine_similarity(estimate, true, dim=0) >= 0.9


def test_a_zo_sgd_step_is_a_mezo_step():
    """MeZO (Malladi et al., NeurIPS 2023, algorithm 1), written out: in place, Δ drawn anew each time (here ±1)."""
    eps, rate, seed = 1e-3, 0.05, 11

    def network():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 2)).double()

    inputs, labels = torch.randn(16, 5).double(), torch.randint(0, 2, (16,))
    mezo = network()
    parameters = list(mezo.parameters())
    count = sum(p.numel() for p in parameters)

    def move(factor):
        z = draw_direction(count, direction_seed(seed, 0, 0, 0)).split([p.numel() for p in parameters])
        with torch.no_grad():
            for p, piece in zip(parameters, z, strict=True):
                p.add_(factor * piece.view_as(p))

    move(eps)
    plus = F.cross_entropy(mezo(inputs), labels).item()
    move(-2 * eps)
    minus = F.cross_entropy(mezo(inputs), labels).item()
    move(eps)
    move(-rate * (plus - minus) / (2 * eps))

    ours = network()
    groups = LayerAssignment("dual", "all").split(ours, eps=eps).zo
    accumulate(ZOEstimator(groups, estimator="two-sided", seed=seed), lambda: F.cross_entropy(ours(inputs), labels))
    build_zo_optimizer(groups, "sgd", lr=rate).step()
    for a, b in zip(ours.parameters(), parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_variance_is_that_of_the_estimates_coordinates():
    model = Quadratic()
    _, moments = accumulate(estimator_of(model), model)
    torch.testing.assert_close(moments[None, None].variance, model.theta.grad.var(correction=0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("queries", [2, 8])
def test_fzoo_with_no_deviation_is_an_estimate_of_zero(queries):
    """Equal losses under a perturbation, one unit of rounding from that at θ."""
    model, calls = Quadratic(), []

    def loss():
        calls.append(1)
        return torch.tensor(2.3 if len(calls) == 1 else 2.3000002)

    accumulate(estimator_of(model, estimator="fzoo", queries=queries), loss)
    assert not model.theta.grad.any()


def test_fzoo_does_not_divide_by_what_is_below_the_noise():
    model = Quadratic()
    estimator = estimator_of(model, estimator="fzoo", queries=4)
    estimator.settle({None: Resolution(eps=EPS, noise=1e-3, error=0.1, slope=1.0)})
    deviation = float(torch.stack([model.at(model.theta + EPS * d) for d in directions_of(model, 4)]).std())
    accumulate(estimator, model)
    assert model.theta.grad.any()
    estimator.settle({None: Resolution(eps=EPS, noise=1.01 * deviation, error=0.1, slope=1.0)})
    accumulate(estimator, model)
    assert not model.theta.grad.any()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_fzoo_with_two_queries_stays_finite_for_1500_steps(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 10))
    inputs, labels = torch.randn(16, 8), torch.arange(16) % 10
    groups = LayerAssignment().split(model, eps=1e-3).zo
    estimator, rule = ZOEstimator(groups, "fzoo", queries=2, seed=seed), build_zo_optimizer(groups, "sgd", lr=1e-3)
    evaluation = PlainEvaluation(lambda: F.cross_entropy(model(inputs), labels))
    first = float(evaluation.losses([{}])[0])
    for step in range(1500):
        estimator.write([(estimator.estimate(evaluation, step), 1.0)])
        rule.step()
    assert all(p.isfinite().all() and p.abs().max() < 100 for p in model.parameters())
    assert float(evaluation.losses([{}])[0]) < first


class Valley(nn.Module):
    """L = (v + l)²/2: a step of either tower alone descends, and both together land on the other side."""

    def __init__(self, start: float = 1.0):
        super().__init__()
        self.vision_model, self.text_model = nn.Module(), nn.Module()
        self.vision_model.v, self.text_model.l = (nn.Parameter(torch.tensor([start])) for _ in range(2))

    def forward(self):
        return (self.vision_model.v + self.text_model.l).square().sum() / 2


@pytest.mark.parametrize("rate", [0.1, 0.9, 1.2, 3.0])
@pytest.mark.parametrize("finer", [(), ("language",), ("vision", "language")])
def test_conservative_judges_the_step_of_both_branches(rate, finer):
    """At a rate of 0.9 both together climb over 2.56 → 1.28 alone; at 3 every step does."""
    model = Valley()
    groups = LayerAssignment("dual", "all").split(model, eps=1e-3).zo
    estimator, rule = ZOEstimator(groups, "conservative"), build_zo_optimizer(groups, "sgd", lr=rate)
    if finer:
        estimator.settle({b: Resolution(1e-3, 0.0, 0.0, 1.0, b in finer) for b in ("vision", "language")})
    evaluation = PlainEvaluation(model)
    before = float(model())
    estimate = estimator.estimate(evaluation, step=0, learning_rate=rate, finer=lambda: PlainEvaluation(model))
    estimator.write([(estimate, 1.0)])
    rule.step()
    candidates = [((2 - moved * rate * 2) ** 2) / 2 for moved in (0, 1, 2)]  # neither, one, both
    assert float(model()) <= before
    assert float(model()) == pytest.approx(min(candidates), abs=0.02)


def test_a_branch_may_be_evaluated_more_finely_than_the_other():
    """Its L(θ) is then a finer loss too: a constant by which the ways differ enters no difference."""
    model, asked = Valley(), []

    def by(name, offset):
        def loss():
            asked.append(name)
            return model() + offset

        return PlainEvaluation(loss)

    estimator = ZOEstimator(LayerAssignment("dual", "all").split(model, eps=1e-3).zo, queries=2)
    estimator.settle({b: Resolution(1e-3, 0.0, 0.0, 1.0, b == "language") for b in ("vision", "language")})
    base_loss = model().detach() + 5.0
    estimate = estimator.estimate(by("plain", 5.0), step=0, base_loss=base_loss, finer=lambda: by("finer", 7.0))
    assert asked == ["plain"] * 2 + ["finer"] * 3
    for differences in estimate.differences.values():
        torch.testing.assert_close(differences.abs(), torch.full((2,), 2e-3), rtol=1e-2, atol=0)
    assert estimate.loss == base_loss


@pytest.mark.parametrize(
    ("estimator", "passes"), [("one-sided", 3), ("two-sided", 4), ("fzoo", 3), ("conservative", 3 + 3)]
)
def test_branches_that_move_together_share_their_passes(estimator, passes):
    """What is estimated is the gradient of all parameters as one vector."""
    model = TwoTowers().double()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    groups = LayerAssignment("dual", "all").split(model, {"vision": 1e-3, "language": 1e-2}).zo
    seen = []

    def loss():
        seen.append(where(model, start))
        return model()

    estimator = ZOEstimator(groups, estimator, queries=2, together=True)
    estimate = estimator.estimate(PlainEvaluation(loss), step=0, learning_rate=0.1)
    assert len(seen) == passes
    assert all(set(point) in ({"vision", "text"}, set()) for point in seen)
    assert torch.equal(estimate.differences["vision"], estimate.differences["language"])
    vision, text = (start[f"{name}_model.weight"].flatten() for name in ("vision", "text"))
    losses = [((vision + at.get("vision", 0)) * (text + at.get("text", 0))).sum() for at in seen[:3]]
    difference = (losses[0] - losses[1]) / 2 if estimator.formula.is_two_sided else losses[1] - losses[0]
    torch.testing.assert_close(estimate.differences["vision"][0], difference)


def test_together_is_the_gradient_of_both_on_average():
    model = TwoTowers().double()
    groups = LayerAssignment("dual", "all").split(model, 1e-3).zo
    accumulate(ZOEstimator(groups, "two-sided", queries=3000, together=True), model)
    vision, text = model.vision_model.weight, model.text_model.weight
    assert nn.functional.cosine_similarity(vision.grad[0], text[0].detach(), dim=0) > 0.98
    assert nn.functional.cosine_similarity(text.grad[0], vision[0].detach(), dim=0) > 0.98


def test_branches_with_other_numbers_of_queries_take_turns_all_the_same():
    groups = LayerAssignment("dual", "all").split(TwoTowers()).zo
    assert not ZOEstimator(groups, queries={"vision": 1, "language": 2}, together=True).moves_together
