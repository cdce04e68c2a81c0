import pytest
import torch

from hf_zocl.zo import Combination, LayerAssignment, Perturbation, ZOGroup, direction_seed, draw_direction


def make() -> Perturbation:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
    return Perturbation(LayerAssignment("dual", "all").split(model, eps=1e-3).zo)


@pytest.fixture
def perturbation() -> Perturbation:
    return make()


def values(perturbation) -> list[torch.Tensor]:
    return [p.detach().clone() for p in perturbation.parameters]


def equal(some, others) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def test_a_seed_gives_one_direction_and_others_differ():
    assert torch.equal(draw_direction(100, 7), draw_direction(100, 7))
    assert not torch.equal(draw_direction(100, 7), draw_direction(100, 8))


def test_every_part_of_the_key_changes_the_seed():
    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    assert len({direction_seed(*key) for key in keys}) == len(keys)


def test_the_seed_is_the_same_on_every_machine():
    assert direction_seed(1993, 4, 1, 2) == 1856134584132093238


def test_directions_are_plus_or_minus_one():
    direction = draw_direction(5000, 0)
    assert set(direction.tolist()) == {-1.0, 1.0}
    assert abs(direction.mean()) < 0.05


def test_drawing_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    draw_direction(100, 3)
    assert torch.equal(before, torch.get_rng_state())


def test_a_query_adds_eps_times_its_direction(perturbation):
    before = values(perturbation)
    pieces = perturbation.pieces(draw_direction(len(perturbation), 1))
    with perturbation.at(perturbation.query(1, sign=-1)):
        for p, old, d in zip(values(perturbation), before, pieces, strict=True):
            torch.testing.assert_close(p, old - 1e-3 * d)


def test_a_combination_is_the_weighted_sum_of_its_directions(perturbation):
    a, b = (draw_direction(len(perturbation), seed) for seed in (1, 2))
    combination = Combination((1, 2), torch.tensor([0.5, -2.0]), scale=3.0)
    torch.testing.assert_close(perturbation.vector(combination), 3 * (0.5 * a - 2 * b))
    signed = Combination((1, 2), torch.tensor([0.5, -2.0]), scale=3.0, sign=True)
    assert torch.equal(perturbation.vector(signed), 3 * (0.5 * a - 2 * b).sign())


def test_a_stack_holds_the_parameters_of_every_candidate(perturbation):
    offsets = [perturbation.query(seed) for seed in (1, 2, 3)]
    stacks = perturbation.stack(offsets)
    for i, offset in enumerate(offsets):
        with perturbation.at(offset):
            assert equal([stack[i] for stack in stacks], values(perturbation))


def test_coming_back_is_exact_to_the_bit(perturbation):
    before = values(perturbation)
    for seed in range(20):
        with perturbation.at(perturbation.query(seed, (-1) ** seed)):
            assert not equal(values(perturbation), before)
    assert equal(values(perturbation), before)


def test_coming_back_is_exact_when_the_loss_raises(perturbation):
    before = values(perturbation)
    with pytest.raises(RuntimeError, match="out of memory"), perturbation.at(perturbation.query(0)):
        raise RuntimeError("out of memory")
    assert equal(values(perturbation), before)


def test_groups_of_several_branches_or_sizes_are_refused():
    parameter = torch.nn.Parameter(torch.zeros(2))
    groups = [ZOGroup("vision", 1, 1e-3, ("a",), (parameter,)), ZOGroup("vision", 2, 1e-2, ("b",), (parameter,))]
    with pytest.raises(ValueError, match="share their branch and ε"):
        Perturbation(groups)


def half_precision() -> Perturbation:
    """A norm's weights, all 1, and a matrix of small ones, kept in bfloat16."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.LayerNorm(64, bias=False), torch.nn.Linear(64, 8, bias=False)).bfloat16()
    with torch.no_grad():
        model[1].weight.normal_(std=1e-3)
    return Perturbation(LayerAssignment("dual", "all").split(model, eps=1e-3).zo)


@pytest.mark.parametrize("ends", [(1e-3, 0.0), (1e-3, -1e-3)])
def test_what_half_precision_did_not_move_is_not_stepped(ends):
    perturbation = half_precision()
    perturbation.write([Combination((1,), (2.0,), moved=ends)])
    norm, matrix = perturbation.parameters
    moved = []
    for end in ends:
        with perturbation.at(Combination((1,), (1.0,), end)):
            moved.append(torch.cat([p.detach().float().flatten() for p in perturbation.parameters]))
    expected = 2.0 * (moved[0] - moved[1]) / (ends[0] - ends[1])
    written = torch.cat([p.grad.float().flatten() for p in perturbation.parameters])
    torch.testing.assert_close(written, expected, rtol=1e-2, atol=0)  # a gradient is of its parameter's dtype
    assert not norm.grad[draw_direction(576, 1)[:64] > 0].any()  # 1 + 0.001 is 1
    assert (matrix.grad != 0).all()


def test_full_precision_is_stepped_along_the_direction_itself(perturbation):
    perturbation.write([Combination((1,), (2.0,), moved=(1e-3, 0.0))])
    written = torch.cat([p.grad.flatten() for p in perturbation.parameters])
    assert torch.equal(written, 2.0 * draw_direction(len(perturbation), 1))
