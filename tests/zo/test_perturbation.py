import pytest
import torch

from hf_zocl.zo import Combination, LayerAssignment, Perturbation, ZOGroup, direction_seed, draw_direction
from hf_zocl.zo.directions import BLOCK
from hf_zocl.zo.room import Room


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


def test_the_signs_of_a_direction_and_of_others_are_unrelated():
    """Also those that are made of one random number, and those of neighbouring queries, layers and steps."""
    count = 2 * BLOCK + 12345
    one = draw_direction(count, direction_seed(0, 0, 0, 0))
    noise = 5 / count**0.5
    assert abs(one.mean()) < noise
    for distance in (1, 2, 31, 32, 64, BLOCK // 64, BLOCK // 32, BLOCK // 2, BLOCK):
        assert abs((one[distance:] * one[:-distance]).mean()) < noise * 2
    for key in [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]:
        assert abs((one * draw_direction(count, direction_seed(*key))).mean()) < noise


def large() -> Perturbation:
    """More than two blocks; one matrix lies across their border, and one is not contiguous."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(1000, 1000), torch.nn.Linear(1000, 1200), torch.nn.Linear(1200, 3))
    model[1].weight = torch.nn.Parameter(torch.randn(1000, 1200).T)
    return Perturbation(LayerAssignment("dual", "all").split(model, eps=1e-3).zo)


def test_blocks_are_parts_of_one_direction():
    perturbation = large()
    before, direction = values(perturbation), draw_direction(len(perturbation), 1)
    combination = Combination((1, 2), torch.tensor([0.5, -2.0]), scale=3.0)
    expected = 3 * (0.5 * direction - 2 * draw_direction(len(perturbation), 2))
    torch.testing.assert_close(perturbation.vector(combination), expected)
    with perturbation.at(combination):
        for p, old, piece in zip(perturbation.parameters, before, perturbation.pieces(expected), strict=True):
            torch.testing.assert_close(p.detach(), old + piece)
    assert equal(values(perturbation), before)
    moments = perturbation.write([combination, Combination((1,), (1.0,))], sign=True, factor=0.25)
    total = expected + direction
    for parameter, piece in zip(perturbation.parameters, perturbation.pieces(total.sign() / 4), strict=True):
        assert torch.equal(parameter.grad, piece)
    (own,) = moments.values()
    assert own.count == len(total)
    torch.testing.assert_close(own.total, total.sum(), rtol=1e-4, atol=1)
    torch.testing.assert_close(own.squares, total.square().sum())


def test_a_direction_is_the_same_whatever_numbers_torch_makes_by_default():
    expected = draw_direction(100, 1)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(draw_direction(100, 1), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_moments_and_gradients_that_are_lent_are_those_that_are_written():
    perturbation = large()
    combination = Combination((1, 2), torch.tensor([0.5, -2.0]), moved=(1e-3, 0.0))
    moments = perturbation.write([combination])
    written = [parameter.grad for parameter in perturbation.parameters]
    with perturbation.written([combination]):
        assert equal([parameter.grad for parameter in perturbation.parameters], written)
    assert all(parameter.grad is None for parameter in perturbation.parameters)
    assert perturbation.moments([combination]) == moments


def test_coming_back_is_exact_when_a_move_is_cut_off(monkeypatch):
    perturbation = large()
    before, blocks = values(perturbation), []

    def interrupted(self, gradient):
        blocks.append(torch.ones(BLOCK))
        yield blocks[0]
        raise KeyboardInterrupt

    monkeypatch.setattr(Perturbation, "_blocks", interrupted)
    with pytest.raises(KeyboardInterrupt), perturbation.at(perturbation.query(1)):
        pass
    assert blocks and equal(values(perturbation), before)


def test_room_is_used_again_until_it_is_cleared():
    room, one = Room(keeps=True), [torch.empty(3), torch.empty(2, 5, dtype=torch.bfloat16)]
    with room.like(one) as first, room.like(one) as second:
        addresses = {tensor.data_ptr() for tensor in [*first, *second]}
        assert len(addresses) == 4
        assert [(t.shape, t.dtype) for t in first] == [(t.shape, t.dtype) for t in one]
    with room.like(one) as third:
        assert {tensor.data_ptr() for tensor in third} < addresses
    with room.like([torch.empty(1000)]) as larger:
        assert larger[0].shape == (1000,)
    assert [len(buffer) for buffer in room._free] == [128, 4032]
    room.clear()
    assert not room._free


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
