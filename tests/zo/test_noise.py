import math

import pytest
import torch

from hf_zocl.zo import rounding_noise
from hf_zocl.zo.noise import Shape, best_eps, measure, measure_noise, relative_error


def noisy(function, sigma: float, seed: int = 0):
    """The losses of a function along its only direction, each with an error of its own."""
    generator = torch.Generator().manual_seed(seed)

    def line(number, offsets):
        x = torch.tensor(list(offsets), dtype=torch.float64)
        return function(x) + sigma * torch.randn(len(x), generator=generator, dtype=torch.float64)

    return line


def bowl(x):
    return 2 + 0.3 * x + 5 * x.square() / 2 + 40 * x**3 / 6


@pytest.mark.parametrize("sigma", [1e-3, 1e-5, 1e-8])
def test_the_noise_of_a_function_is_found_under_its_shape(sigma):
    found = [measure_noise(noisy(bowl, sigma, seed)) for seed in range(20)]
    assert 0.5 * sigma < sum(found) / 20 < 2 * sigma


def test_points_too_far_apart_or_too_near_say_nothing():
    x = torch.arange(7, dtype=torch.float64)
    assert rounding_noise((x / 2).exp()) is None
    assert rounding_noise(torch.full((7,), 2.5)) is None


def test_points_go_apart_until_a_coarse_loss_moves():
    coarse = measure_noise(lambda number, offsets: (bowl(torch.tensor(offsets)) * 100).round() / 100)
    assert 1e-3 < coarse < 1e-2  # rounding to 0.01 has a deviation of 0.0029


def test_a_loss_that_does_not_move_has_no_noise():
    assert measure_noise(lambda number, offsets: torch.zeros(len(offsets))) == 0


@pytest.mark.parametrize(("is_two_sided", "bend"), [(False, 5.0), (True, 40.0)])
def test_truncation_and_rounding_are_least_at_the_best_eps(is_two_sided, bend):
    noise, shape = 1e-6, Shape(slope=0.3, bend=bend)
    best = best_eps(noise, shape, is_two_sided)
    errors = {eps: relative_error(eps, noise, shape, is_two_sided) for eps in (best / 2, best, 2 * best)}
    assert min(errors, key=errors.get) == best
    expected = (3 * noise / bend) ** (1 / 3) if is_two_sided else 8**0.25 * math.sqrt(noise / bend)
    assert best == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("is_two_sided", [False, True])
def test_the_chosen_eps_is_as_good_as_it_is_said_to_be(is_two_sided):
    found = measure(noisy(bowl, 1e-5), None, is_two_sided)
    line, quotients = noisy(bowl, 1e-5, seed=1), []
    for _ in range(200):
        ahead, back = line(0, [found.eps, -found.eps if is_two_sided else 0.0])
        quotients.append((ahead - back) / found.eps / (2 if is_two_sided else 1))
    error = (torch.stack(quotients) - 0.3).square().mean().sqrt() / 0.3
    assert found.is_seen
    assert not found.finer
    assert error == pytest.approx(found.error, rel=0.7)


def test_finer_passes_are_taken_where_the_trainings_own_see_too_little_and_not_elsewhere():
    finer = noisy(bowl, 1e-8)
    assert measure(noisy(bowl, 1e-2), finer, False).finer
    assert not measure(noisy(bowl, 1e-6), finer, False).finer
    # One-sided differences lose to truncation what two-sided ones do not.
    assert measure(noisy(bowl, 8e-4), finer, False).finer
    assert not measure(noisy(bowl, 8e-4), finer, True).finer


def test_a_given_eps_is_kept_and_judged():
    assert measure(noisy(bowl, 1e-4), noisy(bowl, 1e-8), False, eps=1e-4).finer
    found = measure(noisy(bowl, 1e-4), None, False, eps=1e-4)
    assert found.eps == 1e-4
    assert not found.is_seen
    assert measure(noisy(bowl, 1e-4), None, False, eps=1e-2).is_seen


def test_what_does_not_depend_on_the_weights_is_not_seen():
    found = measure(lambda number, offsets: torch.full((len(offsets),), 3.0), None, False)
    assert found.slope == 0
    assert not found.is_seen
    assert found.error == math.inf
