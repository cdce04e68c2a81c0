"""A log of zeroth-order steps gives the weights again."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

import hf_zocl.trainer.mixin
import hf_zocl.zo.streaming
from hf_zocl import ZOCLTrainer
from hf_zocl.passes import PlainEvaluation
from hf_zocl.trainer.replay_file import load_replay_log, save_replay_log
from hf_zocl.zo import LayerAssignment, ReplayLog, ReplaySettings, ZOEstimator, build_zo_optimizer
from tests.helpers import Mlp, arguments, rows, train


def trained(
    optimizer: str, micro_steps: tuple[int, ...] = (1, 2, 2), **options
) -> tuple[nn.Module, nn.Module, ReplayLog]:
    """A model before and after a few steps, and their log."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    before = deepcopy(model)
    inputs, targets = torch.randn(16, 6).double(), torch.randn(16, 1).double()
    groups = LayerAssignment().split(model).zo
    sign = options.pop("sign", False)
    settings = ReplaySettings(((None, 3),), seed=5, sign=sign, optimizer=optimizer, **options)
    estimator, log = ZOEstimator(groups, queries=3, sign=sign, seed=5), ReplayLog(settings)
    rule = build_zo_optimizer(groups, optimizer, 0.1, settings.momentum, settings.weight_decay)
    evaluation = PlainEvaluation(lambda: nn.functional.mse_loss(model(inputs), targets))
    for step, count in enumerate(micro_steps):
        estimates = [(estimator.estimate(evaluation, step, micro), 1 / count) for micro in range(count)]
        rule.param_groups[0]["lr"] = 0.1 / (step + 1)
        log.record(step, estimates, [rule.param_groups[0]["lr"]])
        estimator.write(estimates)
        if settings.max_norm > 0:
            nn.utils.clip_grad_norm_(model.parameters(), settings.max_norm)
        rule.step()
    return before, model, log


def weights(model: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "sgd", "momentum": 0.9},
        {"optimizer": "sign", "weight_decay": 0.1},
        {"optimizer": "adamw", "sign": True},
        {"optimizer": "sgd", "max_norm": 0.01},
    ],
    ids=str,
)
def test_a_log_gives_the_weights_again_to_the_last_bit(options):
    before, after, log = trained(**options)
    read = ReplayLog.from_tensors(log.settings, log.tensors())
    read.replay(LayerAssignment().split(before).zo)
    assert not torch.equal(weights(after), weights(trained(**options)[0]))
    assert torch.equal(weights(before), weights(after))


def test_what_is_the_same_in_all_steps_is_kept_once():
    tensors = trained("sgd", micro_steps=(2, 2, 2, 2))[2].tensors()
    sizes = {name: len(tensor) for name, tensor in tensors.items()}
    assert sizes == {"step": 4, "learning_rate": 4, "scale": 1, "micro_steps": 1, "projected_gradients": 4 * 2 * 3}


def test_a_log_with_one_rate_for_all_branches_is_read():
    """Logs written before branches had rates of their own."""
    before, after, log = trained("sgd")
    tensors = log.tensors()
    tensors["learning_rate"] = tensors["learning_rate"].flatten()
    ReplayLog.from_tensors(log.settings, tensors).replay(LayerAssignment().split(before).zo)
    assert torch.equal(weights(before), weights(after))


def test_a_log_without_a_step_changes_nothing():
    before, _, log = trained("sgd", micro_steps=())
    expected = weights(before)
    ReplayLog.from_tensors(log.settings, log.tensors()).replay(LayerAssignment().split(before).zo)
    assert torch.equal(weights(before), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"zo_optim": "sgd", "zo_momentum": 0.9, "gradient_accumulation_steps": 2},
        {"zo_optim": "adamw", "zo_max_grad_norm": 0.1},
        {"zo_optim": "sign", "zo_sign": True, "zo_max_grad_norm": 0.1},
    ],
    ids=str,
)
def test_the_log_of_streamed_parameters_gives_them_again(tmp_path, monkeypatch, options):
    monkeypatch.setattr(hf_zocl.trainer.mixin, "STREAMED_PARAMETERS", 0)
    monkeypatch.setattr(hf_zocl.zo.streaming, "UNIT_PARAMETERS", 0)
    torch.manual_seed(0)
    model = Mlp()
    before = deepcopy(model)
    trainer = train(tmp_path, model, data=rows(), zo_layers="all", zo_queries=2, max_steps=4, **options)
    assert len(trainer._estimator.perturbations[None].units) > 1
    save_replay_log(trainer.replay_log, tmp_path / "log" / "steps.safetensors")
    log = load_replay_log(tmp_path / "log" / "steps.safetensors")
    groups = LayerAssignment().split(before).zo
    with pytest.raises(ValueError, match="were streamed: its replay needs the model"):
        log.replay(groups)
    assert not torch.equal(weights(before), weights(model))
    log.replay(groups, before)
    assert torch.equal(weights(before), weights(model))


class Before(TrainerCallback):
    """Calls a function just before the optimizer's step."""

    def __init__(self, call):
        self.call = call

    def on_pre_optimizer_step(self, args, state, control, model, optimizer, **kwargs):
        self.call(model, optimizer)


def replayed(log: ReplayLog) -> torch.Tensor:
    model = Mlp()
    log.replay(LayerAssignment().split(model).zo)
    return weights(model)


def test_the_log_has_the_learning_rate_that_was_stepped_by(tmp_path):
    raise_it = Before(lambda model, optimizer: optimizer.param_groups[0].update(lr=0.1))
    trainer = train(tmp_path, Mlp(), data=rows(), callbacks=[raise_it], zo_layers="all", zo_learning_rate=1e-3)
    assert torch.equal(replayed(trainer.replay_log), weights(trainer.model))


@pytest.mark.parametrize(
    "change",
    [
        lambda model, optimizer: model.layers[0].weight.grad.mul_(-1),
        lambda model, optimizer: setattr(model.layers[0].weight, "grad", None),
    ],
)
def test_no_log_is_kept_of_estimates_that_a_callback_has_changed(tmp_path, change):
    trainer = train(tmp_path, Mlp(), data=rows(), callbacks=[Before(change)], zo_layers="all")
    assert trainer.replay_log is None


def test_the_log_is_that_of_the_best_weights_where_they_are_loaded(tmp_path):
    saving = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 1, "eval_steps": 1, "max_steps": 3}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "step", "greater_is_better": False}
    args = arguments(tmp_path, zo_layers="all", **saving, **best)
    trainer = ZOCLTrainer(
        Mlp(),
        args,
        train_dataset=rows(),
        eval_dataset=rows(8),
        compute_metrics=lambda _: {"step": trainer.state.global_step},
    )
    trainer.train()
    assert len(trainer.replay_log.steps) == 1
    assert torch.equal(replayed(trainer.replay_log), weights(trainer.model))


class Clipping(TrainerCallback):
    """Keeps the weights small, at one of the Trainer's events."""

    def __init__(self, event: str):
        setattr(self, event, self.clip)

    @torch.no_grad()
    def clip(self, args, state, control, model, **kwargs):
        for parameter in model.parameters():
            parameter.clamp_(-0.1, 0.1)


@pytest.mark.parametrize("max_steps", [1, 3])
@pytest.mark.parametrize("event", ["on_optimizer_step", "on_step_end"])
def test_no_log_is_kept_where_a_callback_changes_the_weights(tmp_path, event, max_steps):
    trainer = train(tmp_path, Mlp(), data=rows(), callbacks=[Clipping(event)], zo_layers="all", max_steps=max_steps)
    assert trainer.replay_log is None


class OutOfMemory(ZOCLTrainer):
    """Has no room for the third step of eight examples."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        if self.state.global_step == 2 and len(inputs["labels"]) == 8:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().compute_loss(model, inputs, *args, **kwargs)


def test_no_log_is_kept_of_the_second_of_two_tries(tmp_path):
    options = {"zo_layers": "all", "zo_optim": "sgd", "per_device_train_batch_size": 8, "auto_find_batch_size": True}
    trainer = OutOfMemory(Mlp(), arguments(tmp_path, max_steps=4, **options), train_dataset=rows())
    trainer.train()
    assert trainer.state.global_step == 4 and trainer.replay_log is None
