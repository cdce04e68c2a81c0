"""A shortcut that gives other differences than plain passes is switched off by name; one that gives them is used."""

import random
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from hf_zocl import ZOCLTrainer
from hf_zocl.models import CLIPClassifierOutput
from hf_zocl.passes import ForwardState, PlainEvaluation, TowerEvaluation, TowerPlan, candidates, find_towers
from hf_zocl.passes import prompts as packing
from hf_zocl.passes import towers as evaluation
from hf_zocl.private_names import without_autocast
from hf_zocl.zo import LayerAssignment, ZOEstimator
from tests.helpers import arguments, image_batch, image_examples, mini_clip_classifier, slow_but_for
from tests.passes.test_towers import (
    MANY_CLASSES,
    assert_same,
    checked,
    classifier,
    dual_encoder,
    gradients,
    switched_off,
    towers,
)


def wrong_towers(monkeypatch):
    replayed = evaluation._Replay.__call__

    def wrong(self, *args, **kwargs):
        output = replayed(self, *args, **kwargs)
        output.pooler_output = output.pooler_output * torch.linspace(0.99, 1.01, output.pooler_output.shape[-1])
        return output

    monkeypatch.setattr(evaluation._Replay, "__call__", wrong)


def wrong_layers(monkeypatch):
    first = evaluation.Tower.first_layer_of
    monkeypatch.setattr(evaluation.Tower, "first_layer_of", lambda *args: first(*args) + 1)


def wrong_candidates(monkeypatch):
    linear = candidates.stacked_linear
    monkeypatch.setattr(candidates, "stacked_linear", lambda x, weight, bias=None: linear(x, weight.flip(0), bias))


def wrong_prompts(monkeypatch):
    class SeeEachOther(packing.PackedPrompts):
        def __init__(self, *tensors):
            super().__init__(*tensors)
            self.mask = torch.ones_like(self.mask).tril()

    monkeypatch.setattr(packing, "PackedPrompts", SeeEachOther)


@pytest.mark.parametrize(
    ("fault", "branch", "name"),
    slow_but_for(
        [
            (wrong_towers, "vision", "the reuse of towers"),
            (wrong_prompts, "language", "the packing of prompts (language tower)"),
        ],
        [
            (wrong_towers, "vision", "the reuse of towers"),
            (wrong_layers, "vision", "the reuse of layers (vision tower)"),
            (wrong_layers, "language", "the reuse of layers (language tower)"),
            (wrong_candidates, "language", "candidates side by side (language tower)"),
            (wrong_prompts, "language", "the packing of prompts (language tower)"),
        ],
    ),
)
def test_a_fault_in_a_shortcut_is_seen_and_it_alone_is_switched_off(fault, branch, name, monkeypatch, caplog):
    fault(monkeypatch)
    model, inputs = classifier()
    model.set_classes(MANY_CLASSES[:6])
    with pytest.raises(AssertionError):
        assert_same(model, inputs, branch, "suffix-2", towers(), queries=2)
    made = []
    assert_same(model, inputs, branch, "suffix-2", lambda *args: made.append(checked(*args)) or made[0], queries=2)
    assert switched_off(caplog) == {name}
    plan = made[0].plan
    assert len(plan.used) == (0 if fault is wrong_towers else len(plan.shortcuts) - 1)


class Watched(nn.Module):
    """A dual encoder whose loss has a penalty on the inner states of a tower, of a fiftieth of the loss."""

    def __init__(self, model: nn.Module, tower: str, weight: float | None = None):
        super().__init__()
        self.model, self.hidden, self.weight = model, None, weight
        layer = find_towers(model)[tower].layers[-1]
        layer.register_forward_hook(lambda module, args, output: setattr(self, "hidden", output))

    def forward(self, pixel_values, labels):
        loss = self.model(pixel_values, labels).loss
        penalty = self.hidden.square().mean()
        if self.weight is None:
            self.weight = 0.02 * (loss / penalty).item()
        return CLIPClassifierOutput(loss=loss + self.weight * penalty)


@pytest.mark.parametrize(
    "context", [nullcontext, pytest.param(lambda: torch.autocast("cpu", torch.bfloat16), marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("tower", ["vision", "language"])
def test_a_penalty_of_two_percent_on_inner_states_is_noticed(tower, context, caplog):
    model, batch = Watched(mini_clip_classifier(), tower).train(), image_batch(4)
    estimator = ZOEstimator(LayerAssignment("dual", "all").split(model, 1e-3).zo, queries=2)

    @torch.no_grad()
    def forward(rows=None):
        with context():
            return model(**batch).loss

    asked = [{p: p.query(seed)} for p in estimator.perturbations.values() for seed in (1, 2)]
    before = ForwardState(torch.device("cpu"), model.buffers())
    expected = PlainEvaluation(forward, before).losses([{}, *asked])
    plan = TowerPlan(model, estimator.perturbations.values())
    assert TowerEvaluation(plan, forward, before, context).losses([{}, *asked]) == expected
    assert switched_off(caplog) == {"the reuse of towers"}


@pytest.mark.slow
def test_a_resumed_training_switches_off_the_same_and_ends_at_the_same_weights(tmp_path, caplog):
    def run(**options) -> tuple[nn.Module, set[str]]:
        caplog.clear()
        model = Watched(mini_clip_classifier(), "vision", weight=0.01)
        options = {"zo_layers": "hop-even", "max_steps": 3} | options
        trainer = ZOCLTrainer(model=model, args=arguments(tmp_path, **options), train_dataset=image_examples())
        resume = options.get("save_strategy") is None
        trainer.train(resume_from_checkpoint=str(tmp_path / "trainer" / "checkpoint-2") if resume else None)
        return model, switched_off(caplog)

    (whole, off), (resumed, again) = run(save_strategy="steps", save_steps=2), run()
    assert off == again == {"the reuse of towers"}
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))


@pytest.mark.parametrize("limit", [float("inf"), 10.0])
def test_a_loss_that_refuses_weights_without_sense_is_checked_all_the_same(limit, caplog):
    class Guarded(nn.Module):
        def __init__(self, clip):
            super().__init__()
            self.clip = clip

        def forward(self, **inputs):
            weights = [p for name, p in self.clip.named_parameters() if "lora_" in name]
            loss = self.clip(**inputs).loss + 1e-3 * sum(p.square().sum() for p in weights)
            if not loss < limit:
                raise FloatingPointError("the loss is not finite")
            return CLIPClassifierOutput(loss=loss)

    clip, inputs = dual_encoder("clip")
    assert_same(Guarded(clip), inputs, "dual", "all", checked, queries=2)
    assert switched_off(caplog) == {f"weights left as they are ({tower} tower)" for tower in ("vision", "language")}


def test_prompts_are_packed_under_autocast(caplog):
    model, batch = mini_clip_classifier(MANY_CLASSES).train(), image_batch(4)
    estimator = ZOEstimator(LayerAssignment("language", "all").split(model).zo, queries=2)

    def context():
        return torch.autocast("cpu", torch.bfloat16)

    @torch.no_grad()
    def forward(rows=None):
        with context():
            return model(**batch).loss

    plan = TowerPlan(model, estimator.perturbations.values())
    made = TowerEvaluation(plan, forward, ForwardState(torch.device("cpu"), model.buffers()), context)
    estimator.estimate(made, step=0)
    assert made.records["language"].packed is not None
    assert plan.used == set(plan.shortcuts) and not switched_off(caplog)


@pytest.mark.parametrize("adapter", slow_but_for([{}], [{}, {"adapter": "moe"}]))
def test_the_check_leaves_no_trace(adapter):
    model, inputs = classifier(**adapter)
    model.set_classes(MANY_CLASSES[:6])
    found = []
    for make in (towers(), checked):
        random.seed(0)
        model.load_training_state({name: 0 * value for name, value in model.training_state().items()})
        result = gradients(model, inputs, make, "dual", "hop-even", queries=2)
        found.append((*result, model.training_state(), random.random(), dict(model.named_buffers())))
    (losses, grads, state, counts, drawn, _), again = found[0], found[1]
    assert torch.equal(losses, again[0]) and all(map(torch.equal, grads, again[1])) and torch.equal(state, again[2])
    assert all(torch.equal(counts[name], again[3][name]) for name in counts) and drawn == again[4]


def test_the_check_is_made_once_a_training():
    model, inputs = classifier()
    estimator = ZOEstimator(LayerAssignment("vision", "all").split(model, 1e-2).zo)
    plan, passes = TowerPlan(model, estimator.perturbations.values()), []

    @torch.no_grad()
    def forward(rows=None):
        passes.append(1)
        return model(**inputs).loss

    def count(step: int) -> int:
        passes.clear()
        estimator.estimate(TowerEvaluation(plan, forward, ForwardState(torch.device("cpu"), plan.buffers)), step)
        return len(passes)

    assert count(0) > 10
    assert count(1) == count(2) == 2


def test_nothing_is_said_of_a_loss_that_does_not_change():
    model, inputs = classifier()
    estimator = ZOEstimator(LayerAssignment("vision", "all").split(model, 1e-2).zo)
    plan, weight = TowerPlan(model, estimator.perturbations.values()), 0.0

    @torch.no_grad()
    def forward(rows=None):
        return weight * model(**inputs).loss

    def used(step: int) -> set | None:
        estimator.estimate(TowerEvaluation(plan, forward, ForwardState(torch.device("cpu"), plan.buffers)), step)
        return plan.used

    assert used(0) is None
    weight = 1.0
    assert used(1) == set(plan.shortcuts)


def test_without_autocast_there_is_none_around_a_block_nor_within():
    x = torch.randn(2, 2)
    decorated = torch.autocast("cpu", torch.bfloat16)(lambda: (x @ x).dtype)
    with torch.autocast("cpu", torch.bfloat16):
        with without_autocast("cpu"):
            with torch.autocast("cpu", torch.bfloat16):
                assert (x @ x).dtype == decorated() == torch.float32
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == decorated() == torch.bfloat16
    assert (x @ x).dtype == torch.float32
