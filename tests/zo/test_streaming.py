"""Parameters that are too many to copy: a layer is moved while it runs."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import hf_zocl.trainer
from hf_zocl import ZOCLTrainer, ZOCLTrainingArguments
from hf_zocl.zo import LayerAssignment, PlainEvaluation, StreamedPerturbation, ZOEstimator


def language_model() -> GPT2LMHeadModel:
    """Its word embeddings are its head too."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=30, n_embd=16, n_layer=3, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).double().eval()


IDS = torch.arange(1, 13).repeat(2, 1)


def loss_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, labels=IDS).loss


def streamed(model) -> StreamedPerturbation:
    return StreamedPerturbation(LayerAssignment("dual", "all").split(model, eps=1e-2).zo, model)


def values(model) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def test_units_are_the_layers_and_what_lies_around_them():
    model = language_model()
    sizes = {p: p.numel() for p in model.parameters()}
    units = [set(unit.perturbation.parameters) for unit in streamed(model).units]
    assert set().union(*units) == set(sizes)
    assert sum(map(len, units)) == len(sizes)
    assert set(model.transformer.h[1].parameters()) in units
    tied = next(unit for unit in streamed(model).units if model.lm_head.weight in set(unit.perturbation.parameters))
    assert {type(module) for module in tied.modules} == {nn.Embedding, nn.Linear}


def test_the_loss_is_that_of_a_model_moved_as_a_whole():
    model, moved = language_model(), language_model()
    perturbation = streamed(model)
    offset = perturbation.query(5)
    with torch.no_grad():
        names = {p: name for name, p in model.named_parameters()}
        for unit in perturbation.units:
            for p, piece in zip(unit.perturbation.parameters, unit.perturbation.pieces(
                unit.perturbation.vector(unit.own(offset))), strict=True):  # fmt: skip
                moved.get_parameter(names[p]).add_(piece)
    before = loss_of(model)
    with perturbation.at(offset):
        found = loss_of(model)
    assert found != before
    torch.testing.assert_close(found, loss_of(moved), rtol=1e-12, atol=0)


def test_everything_is_back_to_the_bit_also_when_a_layer_raises():
    model = language_model()
    before, perturbation = values(model), streamed(model)
    with perturbation.at(perturbation.query(1)):
        loss_of(model)
    handle = model.transformer.h[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), perturbation.at(perturbation.query(2)):
        loss_of(model)
    handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(values(model), before, strict=True))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_one_layer_at_a_time_is_away_from_theta():
    model = language_model()
    before, perturbation, away = values(model), streamed(model), []

    def look(*_):
        layers = {p: i for i, layer in enumerate(model.transformer.h) for p in layer.parameters()}
        moved = [p for p, old in zip(model.parameters(), before, strict=True) if not torch.equal(p, old)]
        away.append({layers.get(p) for p in moved})

    for layer in model.transformer.h:
        layer.attn.register_forward_pre_hook(look)
    with perturbation.at(perturbation.query(1)):
        loss_of(model)
    assert away == [{0}, {1}, {2}]


@pytest.mark.parametrize("estimator", ["one-sided", "two-sided", "conservative", "fzoo"])
def test_the_streamed_gradient_is_the_sum_of_its_directions(estimator):
    model = language_model()
    groups = LayerAssignment("dual", "all").split(model, eps=1e-2).zo
    estimates = ZOEstimator(groups, estimator, queries=2, model=model)
    estimate = estimates.estimate(PlainEvaluation(lambda: loss_of(model)), step=0, learning_rate=1e-2)
    (perturbation,) = estimates.perturbations.values()
    seen = 0
    for unit, _ in zip(perturbation.units, estimates.stream([(estimate, 0.5)]), strict=True):
        own = unit.perturbation
        expected = own.pieces(own.vector(unit.own(estimate.gradient[None])) * 0.5)
        for parameter, piece in zip(own.parameters, expected, strict=True):
            torch.testing.assert_close(parameter.grad, piece)
        seen += 1
        assert sum(p.grad is not None for p in model.parameters()) == len(own.parameters)
    assert seen == len(perturbation.units)


@pytest.mark.parametrize("options", [{}, {"zo_optim": "adamw"}, {"zo_sign": True}, {"zo_max_grad_norm": 30.0}])
def test_a_whole_model_learns_by_streamed_forward_passes_alone(tmp_path, monkeypatch, options):
    monkeypatch.setattr(hf_zocl.trainer, "STREAMED_PARAMETERS", 0)
    arguments = {
        "zo_layers": "all", "zo_estimator": "two-sided", "zo_queries": 4, "zo_learning_rate": 2e-3, "max_steps": 40,
        "lr_scheduler_type": "constant", "logging_steps": 1, "report_to": "none", "save_strategy": "no",
        "disable_tqdm": True, "output_dir": str(tmp_path), "gradient_accumulation_steps": 2,
    }  # fmt: skip
    trainer = ZOCLTrainer(
        model=language_model().float(),
        args=ZOCLTrainingArguments(**{**arguments, **options}),
        train_dataset=[{"input_ids": IDS[0], "labels": IDS[0]}] * 32,
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logs[-1]["loss"] < logs[0]["loss"] - 0.02
    assert logs[0]["zo_grad_norm"] > 0
    assert all(p.grad is None for p in trainer.model.parameters())
