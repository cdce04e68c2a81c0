"""What the studies measure, where the right answer is known: alignment, sharpness, directions, variance."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_zocl.zo import LayerAssignment
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
