"""`ZeroOrderMixin` beside Trainers with a step, a loss and metrics of their own."""

from collections import defaultdict
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from transformers import Trainer

from hf_zocl import ZeroOrderMixin, ZOCLTrainer
from tests.helpers import Mlp, arguments, rows, slow_but_for, train


class Host(Trainer):
    """A Trainer as TRL's are: it makes its inputs itself, and counts and collects in its loss."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.prepared = self.tokens = 0
        self.metrics = {"train": defaultdict(list)}

    def _prepare_inputs(self, inputs):
        self.prepared += 1
        return super()._prepare_inputs(inputs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.tokens += len(inputs["x"])
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self.metrics["train"]["loss"].append(loss.detach().mean())
        return (loss, outputs) if return_outputs else loss


class ZOFirst(ZeroOrderMixin, Host):
    pass


class HostFirst(Host, ZeroOrderMixin):
    pass


def training(folder, cls, **options):
    torch.manual_seed(0)
    options = {"max_steps": 4, "gradient_accumulation_steps": 2, **options}
    trainer = cls(model=Mlp(), args=arguments(folder, **options), train_dataset=rows())
    trainer.train()
    return trainer


@pytest.mark.parametrize("layers", ["all", "hop-even"])
@pytest.mark.parametrize("estimator", slow_but_for(["one-sided"], ["one-sided", "two-sided", "forward-gradient"]))
@pytest.mark.parametrize("cls", [ZOFirst, HostFirst])
def test_a_hosts_hooks_run_once_a_micro_batch(tmp_path, cls, estimator, layers):
    control = training(tmp_path / "control", Host, zo_branch="none")
    trainer = training(tmp_path / "zo", cls, zo_layers=layers, zo_estimator=estimator, zo_queries=3)
    assert (trainer.prepared, trainer.tokens) == (control.prepared, control.tokens)
    found, expected = trainer.metrics["train"]["loss"], control.metrics["train"]["loss"]
    assert len(found) == len(expected) == 8
    # Two-sided differences have no pass at θ: the host sees the first of theirs.
    assert torch.allclose(found[0], expected[0], atol=1e-2 if estimator == "two-sided" else 1e-6)


@pytest.mark.parametrize("cls", [ZOFirst, HostFirst])
def test_beside_a_host_it_trains_as_alone(tmp_path, cls):
    alone = training(tmp_path / "alone", ZOCLTrainer, zo_layers="hop-even", zo_learning_rate=1e-2)
    beside = training(tmp_path / "beside", cls, zo_layers="hop-even", zo_learning_rate=1e-2)
    pairs = zip(alone.model.parameters(), beside.model.parameters(), strict=True)
    assert all(torch.equal(mine, other) for mine, other in pairs)


class OwnBackward(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        if loss.requires_grad:
            loss.backward()
        return loss.detach()


class Twice(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        halves = [{name: value[part] for name, value in inputs.items()} for part in (slice(0, 4), slice(4, 8))]
        losses = [self.compute_loss(model, self._prepare_inputs(half)) for half in halves]
        for loss in losses:
            self.accelerator.backward(loss)
        return sum(losses).detach()


class NoStep(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        return torch.zeros(())


class OwnStep(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        self.accelerator.backward(loss)
        return loss.detach()


class OwnOptimizer(Trainer):
    def create_optimizer(self, model=None):
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        return self.optimizer


@pytest.mark.parametrize(
    ("host", "mixin_first", "message"),
    [
        (OwnBackward, True, "OwnBackward: its training_step made no zeroth-order estimate"),
        (OwnBackward, False, "OwnBackward: its training_step made no zeroth-order estimate"),
        (NoStep, True, "NoStep: its training_step made no zeroth-order estimate"),
        (NoStep, False, "NoStep: its training_step made no zeroth-order estimate"),
        (Twice, True, "Twice: its training_step calls accelerator.backward twice"),
        (Twice, False, "Twice: its training_step made no zeroth-order estimate"),
        (OwnOptimizer, False, "OwnOptimizer: its create_optimizer does not call super"),
    ],
)
def test_a_host_that_leaves_no_room_for_the_estimate_is_refused(tmp_path, host, mixin_first, message):
    bases = (ZeroOrderMixin, host) if mixin_first else (host, ZeroOrderMixin)
    cls = type(f"ZO{host.__name__}", bases, {})
    with pytest.raises(RuntimeError, match=message):
        training(tmp_path, cls, zo_layers="hop-even", gradient_accumulation_steps=1)


@pytest.mark.parametrize("layers", ["all", "hop-even"])
def test_a_step_in_the_place_of_the_mixins_own_is_refused(tmp_path, layers):
    cls = type("ZOOwnStep", (OwnStep, ZeroOrderMixin), {})
    with pytest.raises(RuntimeError, match="ZOOwnStep: its .* overrides ZeroOrderMixin's must call super"):
        training(tmp_path, cls, zo_layers=layers, gradient_accumulation_steps=1)


class CallsEval(Trainer):
    """Its loss leaves the model in evaluation mode, as after generating for a metric."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        model.eval()
        return result


@pytest.mark.parametrize("layers", ["all", [1]])
@pytest.mark.parametrize("estimator", slow_but_for(["one-sided"], ["one-sided", "two-sided", "forward-gradient"]))
def test_a_loss_that_calls_eval_leaves_the_passes_as_they_are(tmp_path, estimator, layers):
    """Else the pass at θ alone would have dropout, and differences were of the dropout."""
    options = {"zo_layers": layers, "zo_estimator": estimator, "max_steps": 3}
    one, other = (
        train(tmp_path, Mlp(dropout=0.5), type("ZO", bases, {}), data=rows(), **options)
        for bases in ((ZOCLTrainer,), (ZeroOrderMixin, CallsEval))
    )
    assert all(map(torch.equal, one.model.parameters(), other.model.parameters()))


def test_a_host_that_loads_checkpoints_in_its_own_way_goes_on(tmp_path):
    """sentence-transformers overrides the Trainer's method with fewer arguments."""

    class Loading(Trainer):
        loaded: list

        def _load_from_checkpoint(self, checkpoint_path):
            self.loaded = [checkpoint_path]
            super()._load_from_checkpoint(checkpoint_path)

    class ZOLoading(ZeroOrderMixin, Loading): ...

    def run(folder, **options):
        args = arguments(tmp_path / folder, zo_layers=[1], save_strategy="steps", save_steps=1, max_steps=2)
        trainer = ZOLoading(model=Mlp(), args=args, train_dataset=rows())
        trainer.train(**options)
        return trainer

    whole, checkpoint = run("whole"), str(tmp_path / "whole" / "trainer" / "checkpoint-1")
    again = run("again", resume_from_checkpoint=checkpoint)
    assert again.loaded == [checkpoint]
    assert all(map(torch.equal, whole.model.parameters(), again.model.parameters()))


class Slope(nn.Module):
    """u′ = u with u(0) = 1: the loss takes a derivative itself."""

    def __init__(self, mode):
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.mode = nn.ModuleList([nn.Linear(1, 8), nn.Linear(8, 1)]), mode

    def u(self, x):
        return self.layers[1](self.layers[0](x).tanh())

    def forward(self, x, labels=None):
        with self.mode():
            x = x.detach().requires_grad_()
            u = self.u(x)
            (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return {"loss": (slope - u).square().mean() + (self.u(torch.zeros(1, 1)) - 1).square().mean(), "logits": u}


@pytest.mark.parametrize("layers", ["all", [1]])
def test_a_loss_that_takes_a_derivative_itself_does_so_with_autograd(tmp_path, layers):
    data = [{"x": torch.rand(1), "labels": torch.zeros(1)} for _ in range(32)]
    options = {"data": data, "zo_layers": layers, "max_steps": 1}
    with pytest.raises(RuntimeError, match=r"takes a derivative itself.*under torch\.enable_grad"):
        train(tmp_path, Slope(nullcontext), **options)
    model = Slope(torch.enable_grad)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    trainer = train(tmp_path, model, zo_queries=4, **options)
    assert trainer._estimates.estimator.resolutions[None].is_seen
    assert all(not torch.equal(old, new) for old, new in zip(before[:2], model.layers[0].parameters(), strict=True))


class AddsToTheLoss(Trainer):
    """Its loss is more than `compute_loss` gives: a penalty, or that of other inputs."""

    weight = 1.0

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        inputs = self._prepare_inputs(inputs)
        loss = self.compute_loss(model, inputs)
        loss = loss + self.weight * sum(parameter.square().sum() for parameter in self.model.parameters())
        self.accelerator.backward(loss)
        return loss.detach()


class AddsALittle(AddsToTheLoss):
    weight = 1e-5


class ScalesTheLoss(AddsToTheLoss):
    weight = 0.0


class TwoLosses(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        inputs = self._prepare_inputs(inputs)
        loss = self.compute_loss(model, inputs) + self.compute_loss(model, {**inputs, "labels": -inputs["labels"]})
        self.accelerator.backward(loss)
        return loss.detach()


@pytest.mark.parametrize("layers", ["all", [1]])
@pytest.mark.parametrize("host", [AddsToTheLoss, AddsALittle, TwoLosses])
def test_a_loss_that_is_more_than_compute_loss_gives_is_refused(tmp_path, host, layers):
    cls = type("ZOHost", (ZeroOrderMixin, host), {})
    with pytest.raises(RuntimeError, match="passes back a loss of .* zeroth-order layers would not learn from what"):
        training(tmp_path, cls, zo_layers=layers, gradient_accumulation_steps=1)


@pytest.mark.parametrize("layers", ["all", [1]])
def test_a_step_of_the_hosts_own_trains_where_it_passes_back_what_compute_loss_gives(tmp_path, layers):
    cls = type("ZOHost", (ZeroOrderMixin, ScalesTheLoss), {})
    assert training(tmp_path, cls, zo_layers=layers).state.global_step == 4
