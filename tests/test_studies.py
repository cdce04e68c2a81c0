"""What the studies measure, where the right answer is known: alignment, sharpness, directions, variance."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_zocl.zo import LayerAssignment, balanced_rate
from tests.helpers import image_examples, mini_clip_classifier, train


SCRIPTS = Path(__file__).resolve().parents[1] / "scripts" / "studies"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return lambda name: runpy.run_path(str(SCRIPTS / f"{name}.py"))


@pytest.mark.parametrize(
    ("study", "arguments"), [("reproduce", ["branch"]), ("variance", ["--recipe", "x", "--output", "y"])]
)
def test_without_scipy_a_study_says_what_to_install_before_any_work(script, study, arguments, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setattr(sys, "argv", [study, *arguments])
    with pytest.raises(
        SystemExit, match='^error: scipy is missing: pip install scipy, or the package with its extra "reproduce".$'
    ):
        script(study)["main"]()


def cosines(probe) -> dict[str, list[float]]:
    return {branch: [row["cosine"] for row in probe.rows if row["branch"] == branch] for branch in probe.parameters}


def test_a_step_of_plain_sgd_on_the_whole_data_is_the_gradient(script, tmp_path):
    model = mini_clip_classifier()
    probe = script("alignment")["Probe"](model, every=2, batches=1)
    train(tmp_path, model, callbacks=[probe], zo_branch="none", optim="sgd", max_steps=3, data=image_examples(8))
    assert [(row["task"], row["step"]) for row in probe.rows[::2]] == [(1, 0), (1, 2)]
    assert {branch: len(values) for branch, values in cosines(probe).items()} == {"vision": 2, "language": 2}
    assert min(row["cosine"] for row in probe.rows) > 0.999


@pytest.mark.slow
def test_a_step_with_few_queries_is_mostly_noise_and_measuring_changes_no_bit(script, tmp_path):
    measured, alone = mini_clip_classifier(), mini_clip_classifier()
    options = {"zo_layers": "all", "zo_optim": "sgd", "zo_learning_rate": 1e-3, "max_steps": 3}
    options["data"] = image_examples(8)
    probe = script("alignment")["Probe"](measured, every=1, batches=1)
    train(tmp_path, measured, callbacks=[probe], zo_queries={"vision": 1, "language": 64}, **options)
    train(tmp_path, alone, zo_queries={"vision": 1, "language": 64}, **options)
    assert all(torch.equal(a, b) for a, b in zip(measured.parameters(), alone.parameters(), strict=True))
    mean = {branch: sum(values) / len(values) for branch, values in cosines(probe).items()}
    # One query has a cosine of about √(1/d), 64 of √(64/d): 0.009 and 0.09.
    assert 0 < mean["vision"] < 0.03 < mean["language"] < 0.3
    assert all(not p.requires_grad or p.grad is None or torch.isfinite(p.grad).all() for p in measured.parameters())


@pytest.mark.slow
def test_a_rate_of_zero_has_no_cosine(script, tmp_path):
    model = mini_clip_classifier()
    probe = script("alignment")["Probe"](model, every=1, batches=1)
    train(tmp_path, model, callbacks=[probe], zo_layers="all", zo_learning_rate=0.0, data=image_examples(8))
    assert probe.rows == []


def test_the_largest_eigenvalue_is_that_of_the_hessian(script):
    largest = script("landscape")["largest_eigenvalue"]
    weights = [nn.Parameter(torch.tensor([1.0, -2.0])), nn.Parameter(torch.tensor([[0.5]]))]
    curvature = torch.tensor([0.5, 3.0, -7.0])  # of largest magnitude, whatever its sign

    def loss():
        return (curvature * torch.cat([w.flatten() for w in weights]).square()).sum() / 2

    assert largest(loss, weights, 60, torch.Generator().manual_seed(0)) == pytest.approx(-7.0, rel=0.02)


def test_directions_have_the_norms_of_what_they_move_and_the_walk_leaves_it_where_it_was(script):
    landscape = script("landscape")
    weights = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(2, 5))]
    before = [w.detach().clone() for w in weights]
    generator = torch.Generator().manual_seed(0)
    filtered = landscape["filter_normalised_direction"](weights, generator)
    for weight, direction in zip(weights, filtered, strict=True):
        torch.testing.assert_close(direction.norm(dim=1), weight.detach().norm(dim=1))
    plain = landscape["random_direction"](weights, generator)
    assert sum(d.square().sum() for d in plain) == pytest.approx(
        sum(w.square().sum().item() for w in before), rel=1e-5
    )
    losses = landscape["along"](lambda: sum(w.square().sum() for w in weights), weights, plain, [-1.0, 0.0, 1.0])
    assert losses[1] < min(losses[0], losses[2])
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))


@pytest.mark.slow
def test_a_layers_variance_is_that_of_its_estimates(script):
    """For one query of Gaussian Δ, E‖ĝ − g‖² is (d + 1)·‖g‖² (Nesterov & Spokoiny 2017)."""
    model = mini_clip_classifier()
    batch = {
        "pixel_values": torch.stack([example["pixel_values"] for example in image_examples(4)]),
        "labels": torch.tensor([example["labels"] for example in image_examples(4)]),
    }
    rows = script("variance")["measure"](model, batch, queries=48, eps=1e-3)
    layers = LayerAssignment("dual", "all").split(model).zo
    assert [(row["branch"], row["layer"]) for row in rows] == [(group.branch, group.layer) for group in layers]
    for row, group in zip(rows, layers, strict=True):
        gradient = torch.autograd.grad(model(**batch).loss, group.parameters)
        squares = sum(g.square().sum().item() for g in gradient)
        assert row["total"] == pytest.approx((row["parameters"] + 1) * squares, rel=0.5)
        assert row["per_dimension"] == pytest.approx(row["total"] / row["parameters"])


def test_discriminant_analysis_weighs_a_direction_by_its_noise(script):
    discriminant = script("forgetting")["discriminant"]
    statistics = {"means": torch.tensor([[0.0, 0.0], [2.0, 4.0]]), "images": torch.tensor([3, 5])}
    scatter = 8 * torch.diag(torch.tensor([0.9, 8.9]))  # and a ridge of 0.1 · 4.9
    scores = discriminant(torch.tensor([[1.0, 2.0], [3.0, 1.0]]), scatter=scatter, **statistics)
    first, second = 2 / (0.9 + 0.49), 4 / (8.9 + 0.49)
    half = (2 * first + 4 * second) / 2
    expected = [[0, first + 2 * second - half], [0, 3 * first + second - half]]
    assert torch.allclose(scores, torch.tensor(expected, dtype=torch.float64))
    assert scores[0, 1] == pytest.approx(0, abs=1e-6)  # halfway between the means


def test_a_settings_forgetting_stands_beside_that_of_zero_shot(script):
    from hf_zocl.report import RunGroup

    run = {"avg": 0.6, "last": 0.5, "forgetting": 0.25, "seed": 0}
    zero_shot = {"accuracy_matrix": [[0.75], [0.5, 0.5]], "avg": 0.625, "last": 0.5}
    rows = script("forgetting")["rows_of"](RunGroup("FO", ({**run, "zero_shot": zero_shot},)))
    assert rows == [
        ("zero-shot", "", "62.5", "50.0", "25.0", "25.0"),
        ("FO", "1", "60.0", "50.0", "25.0", "25.0"),
    ]


class KnownGradients:
    """Images whose gradients are given: one common part, and a part of each image's own."""

    def __init__(self, noise: float, images: int = 16):
        generator = torch.Generator().manual_seed(0)
        shapes = [(3, 20), (20, 3)]
        common = [torch.randn(1, *shape, generator=generator) for shape in shapes]
        own = [torch.randn(images, *shape, generator=generator) for shape in shapes]
        self.gradients = [c + noise * (o - o.mean(0)) for c, o in zip(common, own, strict=True)]
        self.inputs_of = [torch.randn(images, 5, 20, generator=generator), None]


@pytest.mark.parametrize("kind", ["dense", "low rank", "inputs", "examples", "greedy pool"])
def test_the_more_queries_the_nearer_an_estimate_is_to_the_gradient(script, kind):
    module, task = script("directions"), KnownGradients(noise=0.5)
    few, many = (
        sum(module["cosines"](task, module["KINDS"][kind], queries, batch=16, seed=seed)[0] for seed in range(5)) / 5
        for queries in (4, 400)
    )
    assert 0.6 < many <= 1 and 1.2 * few < many


def test_examples_with_signs_of_their_own_ask_as_many_directions_as_there_are_examples(script):
    module, task = script("directions"), KnownGradients(noise=0.0)
    mean = {
        kind: sum(module["cosines"](task, module["KINDS"][kind], 1, batch=16, seed=seed)[0] for seed in range(20)) / 20
        for kind in ("dense", "examples")
    }
    # √(1/d) and √(n/(n + d)), d = 120 weights and n = 16 examples of one gradient.
    assert mean["dense"] == pytest.approx(120**-0.5, rel=0.4)
    assert mean["examples"] == pytest.approx((16 / 136) ** 0.5, rel=0.15)


def test_directions_within_the_inputs_have_no_part_outside_their_span(script):
    module, task = script("directions"), KnownGradients(noise=0.0)
    basis = torch.linalg.qr(torch.randn(20, 4, generator=torch.Generator().manual_seed(0))).Q
    task.inputs_of[0] = task.inputs_of[0][..., :4] @ basis.T
    found, _ = module["inputs"](task, torch.arange(16), 8, torch.Generator().manual_seed(0))
    assert found.norm() > 0
    assert torch.allclose(found @ basis @ basis.T, found, atol=1e-4)


def test_a_factor_on_auto_multiplies_every_chosen_rate_and_leaves_nothing_behind(script):
    times = script("rates")["times"]
    choose = {"rule": "sign", "momentum": 0.9, "queries": 4, "slope": 1.0}
    free, bound = (balanced_rate(**choose, curvature=curvature) for curvature in (1e3, 1.0))
    with times(4):
        assert balanced_rate(**choose, curvature=1e3) == pytest.approx(4 * free, rel=0.05)
        assert balanced_rate(**choose, curvature=1.0) == pytest.approx(4 * bound)
        assert balanced_rate(**choose, curvature=1e3, is_alone=False) == pytest.approx(0.8 * free, rel=0.05)
    assert balanced_rate(**choose, curvature=1e3) == free


def test_the_table_of_rates_has_the_mean_of_the_seeds_and_marks_the_best(script):
    cells = {"all-zo | texts | 1 | 0": [0.5], "all-zo | texts | 1 | 1": [0.6], "all-zo | texts | 4 | 0": [0.4]}
    assert list(script("rates")["lines"](cells))[2:] == ["| texts | all-zo | accuracy | **55.0** | 40.0 |"]
