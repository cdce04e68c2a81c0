import pytest
import torch

from hf_zocl.zo import LayerAssignment, Perturbation, direction_seed, draw_directions


@pytest.fixture
def groups():
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
    return LayerAssignment("dual", "all").split(model, eps=1e-3).zo


def values(groups) -> list[torch.Tensor]:
    return [p.detach().clone() for group in groups for p in group.parameters]


def test_a_seed_gives_one_direction_and_others_differ(groups):
    first, again = draw_directions(groups, 7), draw_directions(groups, 7)
    other = draw_directions(groups, 8)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_every_part_of_the_key_changes_the_seed():
    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    assert len({direction_seed(*key) for key in keys}) == len(keys)


def test_the_seed_is_the_same_on_every_machine():
    assert direction_seed(1993, 4, 1, 2) == 1856134584132093238


def test_gaussian_directions_are_standard_normal(groups):
    flat = torch.cat([d.flatten() for d in draw_directions(groups, 0)])
    assert abs(flat.mean()) < 0.05
    assert abs(flat.std() - 1) < 0.05


def test_rademacher_directions_are_plus_or_minus_one(groups):
    flat = torch.cat([d.flatten() for d in draw_directions(groups, 0, "rademacher")])
    assert set(flat.tolist()) == {-1.0, 1.0}
    assert abs(flat.mean()) < 0.05


def test_an_unknown_direction_is_named(groups):
    with pytest.raises(ValueError, match="zo_direction='cauchy'"):
        draw_directions(groups, 0, "cauchy")


def test_drawing_leaves_the_global_random_state_alone(groups):
    before = torch.get_rng_state()
    draw_directions(groups, 3)
    assert torch.equal(before, torch.get_rng_state())


def test_perturb_adds_eps_times_the_direction(groups):
    before, directions = values(groups), draw_directions(groups, 1)
    perturbation = Perturbation(groups)
    with perturbation.saved():
        perturbation.perturb(directions, sign=-1)
        for p, old, d in zip(values(groups), before, directions, strict=True):
            torch.testing.assert_close(p, old - 1e-3 * d)


def test_restoring_is_exact_to_the_bit_after_many_perturbations(groups):
    before, perturbation = values(groups), Perturbation(groups)
    with perturbation.saved():
        for seed in range(20):
            perturbation.perturb(draw_directions(groups, seed), sign=(-1) ** seed)
    assert all(torch.equal(a, b) for a, b in zip(values(groups), before, strict=True))


def test_restoring_is_exact_when_the_loss_raises(groups):
    before, perturbation = values(groups), Perturbation(groups)
    with pytest.raises(RuntimeError, match="out of memory"), perturbation.saved():
        perturbation.perturb(draw_directions(groups, 0))
        raise RuntimeError("out of memory")
    assert all(torch.equal(a, b) for a, b in zip(values(groups), before, strict=True))
