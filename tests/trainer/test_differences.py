"""Whether the differences that a training steps by are seen above the rounding of its losses."""

import json
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_zocl import ZOCLTrainer
from hf_zocl.models import in_training_dtype
from hf_zocl.trainer.differences import NOISE_FILE
from hf_zocl.zo import draw_direction
from tests.helpers import Mlp, arguments, image_batch, mini_clip_classifier, rows, train, training_logs


class OneStep(ZOCLTrainer):
    """Keeps its estimate."""

    def _install_estimates(self):
        ((self.estimate, _),) = self._estimates
        super()._install_estimates()


def one_step(tmp_path, model, **options) -> OneStep:
    batch = image_batch(16)
    data = [{name: value[i] for name, value in batch.items()} for i in range(16)]
    options = {"max_steps": 1, "per_device_train_batch_size": 16, "use_cpu": True, **options}
    options |= {"learning_rate": 0.0, "zo_learning_rate": 0.0}  # the derivatives are taken afterwards
    trainer = OneStep(model=model, args=arguments(tmp_path, **options), train_dataset=data)
    trainer.train()
    return trainer


def correlations(trainer: OneStep, model: nn.Module) -> dict[str, float]:
    """Of the difference quotients with the derivatives along the same directions, in float32."""
    found = {}
    for branch, perturbation in trainer._estimator.perturbations.items():
        own = torch.autograd.grad(model(**image_batch(16)).loss, perturbation.parameters, allow_unused=True)
        pieces = [torch.zeros_like(p) if g is None else g for p, g in zip(perturbation.parameters, own, strict=True)]
        whole = torch.cat([piece.flatten() for piece in pieces])
        gradient = trainer.estimate.gradient[branch]
        true = torch.stack([whole @ draw_direction(len(whole), seed) for seed in gradient.seeds])
        found[branch] = torch.stack([gradient.weights, true]).corrcoef()[0, 1].item()
    return found


def randomised(**adapter) -> nn.Module:
    model = mini_clip_classifier(**adapter)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02)
    return model


@pytest.fixture
def warnings(caplog):
    logging.Logger.warning_once.cache_clear()
    logging.getLogger("hf_zocl").propagate = True
    return caplog


@pytest.mark.parametrize(
    ("adapter", "layers"),
    [
        ({}, "all"),
        ({}, "hop-even"),
        ({"adapter": "moe", "moe_noise": False, "moe_dropout": 0.0}, "all"),
        ({"adapter": "moe", "moe_noise": False, "moe_dropout": 0.0}, "hop-even"),
    ],
)
@pytest.mark.slow
def test_bf16_differences_follow_the_derivatives(tmp_path, warnings, adapter, layers):
    model = randomised(**adapter)
    trainer = one_step(tmp_path, model, bf16=True, zo_layers=layers, zo_queries=12)
    assert min(correlations(trainer, model).values()) >= 0.95
    assert trainer._estimator.resolutions["language"].finer
    assert "The language tower: in bf16 no difference of losses is well above their rounding" in warnings.text


@pytest.mark.slow
def test_a_number_that_bf16_hides_is_seen_in_float32(tmp_path, warnings):
    model = randomised()
    trainer = one_step(tmp_path, model, bf16=True, zo_layers="all", zo_queries=12, zo_eps=5e-4)
    assert {own.eps for own in trainer._estimator.resolutions.values()} == {5e-4}
    assert min(correlations(trainer, model).values()) >= 0.95
    assert "at zo_eps=0.0005, so its zeroth-order passes run in float32" in warnings.text


@pytest.mark.slow
def test_two_sided_differences_of_a_bf16_tower_stay_in_bf16(tmp_path):
    model = randomised()
    # A correlation of few differences is one of chance: of 12 it was 0.85, 0.96 and 0.98 with three seeds.
    trainer = one_step(tmp_path, model, bf16=True, zo_layers="all", zo_queries=96, zo_estimator="two-sided")
    assert not trainer._estimator.resolutions["vision"].finer
    assert min(correlations(trainer, model).values()) >= 0.95


@pytest.mark.slow
def test_noise_and_eps_are_logged_beside_the_differences(tmp_path):
    log = training_logs(train(tmp_path, Mlp(), data=rows(), zo_layers="all", max_steps=1))[0]
    assert 1e-9 < log["zo_noise"] < 1e-5
    assert log["zo_noise"] < log["zo_loss_difference"]
    assert 1e-5 <= log["zo_eps"] <= 1e-1
    log = training_logs(train(tmp_path, mini_clip_classifier(), max_steps=1))[0]
    assert log["zo_noise"] == max(log["zo_noise_vision"], log["zo_noise_language"])
    assert {"zo_eps_vision", "zo_eps_language"} <= log.keys()


def test_a_training_that_goes_on_keeps_its_eps_and_ends_the_same(tmp_path):
    options = {"zo_layers": "all", "zo_learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole, resumed = Mlp(), Mlp()
    first = train(tmp_path / "whole", whole, data=rows(), **options)
    checkpoint = tmp_path / "whole" / "trainer" / "checkpoint-2"
    ((branch, asked, stored),) = json.loads((checkpoint / NOISE_FILE).read_text())["measured"]
    assert (branch, asked) == (None, None)
    assert stored["eps"] == first._estimator.perturbations[None].eps
    trainer = ZOCLTrainer(model=resumed, args=arguments(tmp_path / "again", **options), train_dataset=rows())
    trainer._measure_differences = None  # what is measured again would differ
    trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer._estimator.resolutions == first._estimator.resolutions
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_another_eps_than_the_checkpoints_is_measured_anew(tmp_path):
    options = {"zo_layers": "all", "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    train(tmp_path / "whole", Mlp(), data=rows(), **options)
    checkpoint = tmp_path / "whole" / "trainer" / "checkpoint-1"
    args = arguments(tmp_path / "again", zo_eps=0.02, **options)
    trainer = ZOCLTrainer(model=Mlp(), args=args, train_dataset=rows())
    trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer._estimator.resolutions[None].eps == 0.02


def test_measuring_changes_neither_the_loss_nor_the_random_state(tmp_path):
    states = []
    for eps in ("auto", 1e-3):
        model = Mlp(dropout=0.5)
        trainer = train(tmp_path, model, data=rows(), zo_layers=[1], zo_eps=eps, zo_learning_rate=0.0, max_steps=3)
        states.append(([log["loss"] for log in training_logs(trainer)], torch.get_rng_state()))
    assert states[0][0] == states[1][0]
    assert torch.equal(states[0][1], states[1][1])


class OneClass(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 1)])

    def forward(self, x, labels=None):
        logits = self.layers[0](x)
        return {"loss": F.cross_entropy(logits, torch.zeros(len(x), dtype=torch.long)), "logits": logits}


class OnPolicy(OneClass):
    def forward(self, x, labels=None):
        logits = self.layers[0](x)
        ratio = (logits - logits.detach()).exp().squeeze(-1)
        return {"loss": -(ratio * (labels - labels.mean())).mean(), "logits": logits}


class Unused(Mlp):
    def forward(self, x, labels=None):
        return {"loss": (x.sum(dim=1) - labels + 1).square().mean(), "logits": x}


class NotANumber(OneClass):
    def forward(self, x, labels=None):
        logits = self.layers[0](x)
        return {"loss": logits.mean() / 0 - logits.mean() / 0, "logits": logits}


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (NotANumber, "The loss is nan where the training begins."),
        (OneClass, "all differences of losses are exactly zero. The loss is 0 and stays 0, as in a task with a"),
        (
            OnPolicy,
            "all differences of losses are exactly zero. Backpropagation does have a gradient: the loss compares",
        ),
        (Unused, "all differences of losses are exactly zero. The loss does not depend on these weights at all."),
    ],
)
def test_a_loss_that_never_moves_is_named_with_its_reason(tmp_path, warnings, model, reason):
    train(tmp_path, model(), data=rows(), zo_layers="all", max_steps=2)
    assert reason in warnings.text
    assert warnings.text.count("learns nothing, because all differences") == 1


@pytest.mark.slow
def test_a_merged_adapter_is_named(tmp_path, warnings):
    model = mini_clip_classifier()
    model.clip.merge_adapter()
    train(tmp_path, model, zo_layers="all", max_steps=1)
    assert "The vision tower learns nothing, because all differences of losses" in warnings.text
    assert "is merged into the weights: unmerge it to train it." in warnings.text


def test_weights_in_half_precision_are_named(tmp_path, warnings):
    data = [{name: v.bfloat16() if v.is_floating_point() else v for name, v in row.items()} for row in rows()]
    train(tmp_path, Mlp().bfloat16(), data=data, zo_layers="all", zo_eps=1e-4, max_steps=1)
    assert "keeps its weights in bfloat16" in warnings.text


def test_differences_that_fall_below_the_noise_are_named_once(tmp_path, warnings):
    class Fades(Mlp):
        def forward(self, x, labels=None):
            output = super().forward(x, labels)
            return {**output, "loss": output["loss"] * (1.0 if self.is_early else 0.0)}

    model = Fades()
    model.is_early = True

    class Late(ZOCLTrainer):
        def _install_estimates(self):
            super()._install_estimates()
            self.model.is_early = False

    options = {"zo_layers": "all", "zo_queries": 8, "max_steps": 20, "logging_steps": 5}
    Late(model=model, args=arguments(tmp_path, **options), train_dataset=rows()).train()
    assert warnings.text.count("have fallen below the rounding of a loss") == 1


def test_a_model_loaded_in_half_precision_is_trained_in_float32_unless_told():
    assert in_training_dtype(Mlp().half(), "auto").layers[0].weight.dtype == torch.float32
    assert in_training_dtype(Mlp().half(), "float16").layers[0].weight.dtype == torch.float16
    assert in_training_dtype(Mlp().double(), "auto").layers[0].weight.dtype == torch.float64
