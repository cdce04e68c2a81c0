"""Every pass of a micro-batch sees the inputs that the host handed over, also if a loss writes into them."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import BatchEncoding

from hf_zocl import ZOCLTrainer
from hf_zocl.trainer.inputs import Inputs
from hf_zocl.zo import draw_direction
from tests.helpers import Mlp, arguments, rows


class Estimates(ZOCLTrainer):
    """Keeps the estimates, and the number of the step."""

    taken: list

    def _install_estimates(self):
        self.__dict__.setdefault("taken", []).append(next(iter(self._estimates))[0])
        super()._install_estimates()


class Masking(Estimates):
    """Masks in place, at random."""

    first = 0  # the first step in which it does

    def compute_loss(self, model, inputs, *args, **kwargs):
        if self.state.global_step >= self.first:
            inputs["x"][torch.rand(inputs["x"].shape) < 0.4] = 0.0
        return super().compute_loss(model, inputs, *args, **kwargs)


def batch(size: int = 8) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows(size)]) for name in ("x", "labels")}


@pytest.mark.parametrize("layers", ["all", [1]])
@pytest.mark.parametrize("eps", [1e-2, "auto"])
def test_a_loss_that_masks_in_place_is_estimated_as_one_that_does_not(tmp_path, layers, eps):
    model = Mlp()
    untouched, states = copy.deepcopy(model), []

    class Watching(Masking):
        def compute_loss(self, *args, **kwargs):
            states.append(torch.get_rng_state())
            return super().compute_loss(*args, **kwargs)

    options = {"zo_layers": layers, "zo_eps": eps, "zo_queries": 4, "max_steps": 1}
    trainer = Watching(model, arguments(tmp_path, **options), train_dataset=rows(8), data_collator=lambda _: batch())
    trainer.train()
    (estimate,) = trainer.taken
    gradient, size = estimate.gradient[None], trainer._estimator.perturbations[None].eps
    parameters = list((untouched if layers == "all" else untouched.layers[0]).parameters())

    @torch.no_grad()
    def loss() -> torch.Tensor:
        torch.set_rng_state(states[0])
        inputs = batch()
        inputs["x"][torch.rand(inputs["x"].shape) < 0.4] = 0.0
        return untouched(**inputs)["loss"]

    base, expected = loss(), []
    for seed in gradient.seeds:
        direction = draw_direction(sum(p.numel() for p in parameters), seed)
        pieces = direction.split([p.numel() for p in parameters])
        with torch.no_grad():
            for parameter, piece in zip(parameters, pieces, strict=True):
                parameter.add_(size * piece.view_as(parameter))
        expected.append((loss() - base) / size / 4)
        untouched.load_state_dict(Mlp().state_dict())
    torch.testing.assert_close(gradient.weights, torch.stack(expected), rtol=2e-3, atol=2e-4)


def test_a_loss_that_begins_to_write_later_is_refused_by_name(tmp_path):
    class Later(Masking):
        first = 1

    trainer = Later(Mlp(), arguments(tmp_path, zo_layers="all"), train_dataset=rows())
    with pytest.raises(RuntimeError, match=r"wrote into its inputs \(x\), but not in the first step"):
        trainer.train()


def test_nothing_is_copied_where_nothing_is_written(tmp_path):
    seen = []

    class Watching(Estimates):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.append((self.state.global_step, inputs["x"].data_ptr()))
            return super().compute_loss(model, inputs, *args, **kwargs)

    trainer = Watching(Mlp(), arguments(tmp_path, zo_layers="all", zo_queries=3), train_dataset=rows())
    trainer.train()
    assert len({address for step, address in seen if step == 1}) == 1
    assert len([step for step, _ in seen if step == 1]) == 4
    assert trainer._plan.writes_inputs is False


def test_containers_are_made_anew_and_keep_their_kind():
    given = BatchEncoding(
        {"a": torch.zeros(2), "nested": {"b": [torch.zeros(1), None]}, "text": ["x"], "pair": (1, 2)}
    )
    for is_written in (None, False, True):
        inputs = Inputs(given, is_written)
        one, other = inputs.again(), inputs.again()
        assert type(one) is BatchEncoding and one.keys() == given.keys()
        del one["nested"]["b"], one["text"]
        assert other["nested"]["b"][1] is None and given["text"] == other["text"] == ["x"]
        assert (other["a"] is given["a"]) is (is_written is False)
    other["a"].add_(1)
    given["nested"]["b"][0].add_(1)
    assert inputs.written == ["nested.b.0", "a"]


def test_an_object_of_another_kind_is_another_for_every_pass():
    given = SimpleNamespace(x=torch.zeros(2), labels=torch.ones(2))
    inputs = Inputs(given, False)
    one = inputs.again()
    del one.labels
    labels = given.labels
    del given.labels  # by the host's own pass
    assert one.x is given.x and inputs.again().labels is labels


class LossWithin(nn.Module):
    """A loss of a host, whose centre moves with every call."""

    def __init__(self):
        super().__init__()
        self.register_buffer("centre", torch.zeros(()))

    def forward(self, loss):
        self.centre.mul_(0.9).add_(0.1)
        return loss * (1 + self.centre)


class Counting(Mlp):
    steps = 0

    def forward(self, x, labels=None):
        self.steps += 1
        output = super().forward(x, labels)
        return {**output, "loss": output["loss"] * (1 + 0.1 * self.steps)}


class Following(Mlp):
    """A frozen copy follows the trained layer in every pass, as a momentum encoder does."""

    def __init__(self):
        super().__init__()
        self.teacher = copy.deepcopy(self.layers[0]).requires_grad_(False)
        nn.init.zeros_(self.teacher.weight)

    def forward(self, x, labels=None):
        output = super().forward(x, labels)
        with torch.no_grad():
            self.teacher.weight.lerp_(self.layers[0].weight, 0.1)
        return {**output, "loss": output["loss"] + (self.layers[0](x) - self.teacher(x)).square().mean()}


@pytest.mark.parametrize("case", ["the host's loss", "a plain counter", "a momentum encoder"])
@pytest.mark.parametrize("layers", ["all", [1]])
def test_what_a_pass_leaves_behind_outside_the_models_buffers_is_refused(tmp_path, case, layers):
    within = LossWithin()

    class Host(Estimates):
        def compute_loss(self, *args, **kwargs):
            return within(super().compute_loss(*args, **kwargs))

    host = Host if case == "the host's loss" else Estimates
    model = {"a plain counter": Counting, "a momentum encoder": Following}.get(case, Mlp)()
    trainer = host(model, arguments(tmp_path, zo_layers=layers), train_dataset=rows())
    with pytest.raises(RuntimeError, match="a pass leaves a state behind .*register_buffer"):
        trainer.train()


def test_the_same_in_a_buffer_of_the_model_is_put_back(tmp_path):
    class Centred(Mlp):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros((), dtype=torch.int64))

        def forward(self, x, labels=None):
            self.count.data += 1  # which torch does not count as a change
            output = super().forward(x, labels)
            return {**output, "loss": output["loss"] * (1 + 0.1 * self.count)}

    model = Centred()
    Estimates(model, arguments(tmp_path, zo_layers="all", max_steps=3), train_dataset=rows()).train()
    assert model.count == 3
