"""Parameters that are too many to copy: a layer is moved while it runs."""

from contextlib import ExitStack, contextmanager

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import hf_zocl.trainer
import hf_zocl.zo
from hf_zocl import ZOCLTrainer, ZOCLTrainingArguments
from hf_zocl.passes import PlainEvaluation
from hf_zocl.zo import LayerAssignment, StreamedPerturbation, ZOEstimator


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
    assert {model.lm_head.weight} in units


def test_a_block_of_a_stage_is_a_unit_where_it_is_large(monkeypatch):
    stages = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2)])
    assert [len(unit.perturbation.parameters) for unit in streamed(stages).units] == [4, 4]
    monkeypatch.setattr(hf_zocl.zo.streaming, "UNIT_PARAMETERS", 20)
    assert [len(unit.perturbation.parameters) for unit in streamed(stages).units] == [2, 2, 2, 2]


def assert_streamed_equals_whole(model, loss, perturbation=None) -> StreamedPerturbation:
    """The losses of streamed passes are those of passes in which all parameters are moved all the time."""
    perturbation = perturbation or streamed(model)
    points = [{perturbation: perturbation.query(seed)} for seed in (5, 6)]
    found = PlainEvaluation(loss).losses(points)
    for value, point in zip(found, points, strict=True):
        with ExitStack() as stack:
            for unit in perturbation.units:
                stack.enter_context(unit.perturbation.at(unit.own(point[perturbation])))
            expected = loss()
        assert value == expected
        assert value != loss()
    return perturbation


def moving_with_a_layer(perturbation: StreamedPerturbation) -> list[int]:
    return [unit.number for unit in perturbation.units if unit.modules]


def test_the_loss_is_that_of_a_model_moved_as_a_whole():
    model = language_model()
    perturbation = assert_streamed_equals_whole(model, lambda: loss_of(model))
    assert len(moving_with_a_layer(perturbation)) == 3


class Classifier(nn.Module):
    """Four layers between an embedding and task heads; how it runs them is for a test to say."""

    def __init__(self, layers=nn.ModuleList, depth: int = 4):
        super().__init__()
        torch.manual_seed(0)
        made = [nn.Linear(8, 8) for _ in range(depth)]
        self.embedding = nn.Embedding(10, 8)
        self.layers = layers(made) if layers is nn.ModuleList else layers(*made)
        self.heads = nn.ModuleDict({"one": nn.Linear(8, 3), "two": nn.Linear(8, 3)})
        self.prompt = nn.Parameter(torch.randn(1, 8))
        self.double()
        self.called = [True] * depth
        self.bypassed = [False] * depth

    def features(self, ids):
        hidden = self.embedding(ids) + self.prompt
        for number, layer in enumerate(self.layers):
            if self.bypassed[number]:
                hidden = nn.functional.linear(hidden, layer.weight, layer.bias).tanh()
            elif self.called[number]:
                hidden = layer(hidden).tanh()
        return hidden

    @torch.no_grad()
    def loss(self):
        return self.heads["one"](self.features(torch.arange(10))).square().mean()


def test_heads_in_a_dictionary_and_prompts_are_moved():
    model = Classifier()
    perturbation = assert_streamed_equals_whole(model, model.loss)
    assert len(moving_with_a_layer(perturbation)) == 4


def test_a_head_that_the_loss_reads_itself_is_moved():
    model = language_model()
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))

    @torch.no_grad()
    def loss():
        hidden = model.transformer(IDS).last_hidden_state
        return nn.functional.cross_entropy((hidden @ model.lm_head.weight.T).flatten(0, 1), IDS.flatten())

    assert_streamed_equals_whole(model, loss)


def test_a_sequential_is_a_stack_of_layers_whoever_calls_it():
    backbone = Classifier(nn.Sequential)

    @torch.no_grad()
    def loss():  # as `forward_features` of timm: the backbone itself is never called
        return backbone.layers(backbone.embedding.weight).square().mean()

    assert len(moving_with_a_layer(assert_streamed_equals_whole(backbone, loss))) == 4


def test_layers_that_are_never_called_are_moved_for_the_whole_pass(caplog):
    model = Classifier()
    model.bypassed[1] = True
    perturbation = assert_streamed_equals_whole(model, model.loss)
    assert len(moving_with_a_layer(perturbation)) == 3
    assert "1 of 4 layers" in caplog.text and "layers.1.weight" in caplog.text


def test_a_penalty_on_the_weights_is_of_the_moved_weights(caplog):
    model = Classifier()

    @torch.no_grad()
    def loss():
        return model.loss() + sum(layer.weight.view(-1).square().sum() for layer in model.layers[:2])

    assert len(moving_with_a_layer(assert_streamed_equals_whole(model, loss))) == 2
    assert "2 of 4 layers" in caplog.text


def test_a_view_that_was_taken_before_is_a_read_too():
    model = Classifier()
    view = model.layers[2].weight.data.T

    @torch.no_grad()
    def loss():
        return model.loss() + view.square().sum()

    assert len(moving_with_a_layer(assert_streamed_equals_whole(model, loss))) == 3


def test_a_layer_that_later_passes_read_without_calling_it_is_moved_in_them():
    model = Classifier()
    perturbation = assert_streamed_equals_whole(model, model.loss)
    assert len(moving_with_a_layer(perturbation)) == 4
    model.bypassed[3] = True
    assert_streamed_equals_whole(model, model.loss, perturbation)
    assert len(moving_with_a_layer(perturbation)) == 3


def test_a_layer_that_is_dropped_changes_nothing_and_is_stepped_as_unstreamed():
    model = Classifier()
    groups = LayerAssignment("dual", "all").split(model, eps=1e-2).zo
    estimator = ZOEstimator(groups, model=model)
    for number in range(4):
        model.called = [other != number for other in range(4)]
        estimate = estimator.estimate(PlainEvaluation(model.loss), step=number, base_loss=model.loss())
        stepped = [sum(p.grad is not None for p in model.parameters()) for _ in estimator.stream([(estimate, 1.0)])]
        assert sum(stepped) == len(list(model.parameters()))


def test_tied_layers_move_in_the_calls_of_either():
    model = Classifier()
    model.layers[2].weight = model.layers[0].weight
    model.layers[3] = model.layers[1]
    perturbation = assert_streamed_equals_whole(model, model.loss)
    assert len(moving_with_a_layer(perturbation)) == 4
    assert {len(unit.modules) for unit in perturbation.units} == {0, 1, 2}


def test_what_hooks_of_a_layer_read_is_moved():
    model = Classifier()
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda layer, args: (args[0] + layer.bias,))
        layer.register_forward_hook(lambda layer, args, output: output * layer.bias)
    assert len(moving_with_a_layer(assert_streamed_equals_whole(model, model.loss))) == 4


class Regular(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(8, 8).double())

    def forward(self, weight):
        return weight * self.gain


def test_parametrized_layers_move_as_they_run():
    model = Classifier()
    nn.utils.parametrize.register_parametrization(model.layers[0], "weight", Regular())
    nn.utils.parametrizations.weight_norm(model.layers[1])
    assert_streamed_equals_whole(model, model.loss)


@pytest.mark.parametrize("whole", [True, False], ids=["wrapped", "layer by layer"])
def test_compiled_models_move_for_the_whole_pass(whole):
    torch.compiler.reset()
    model = Classifier()
    if whole:
        compiled = torch.compile(nn.Sequential(model.layers[0], model.layers[1]), backend="eager")
    else:
        compiled = nn.Sequential(model.layers[0], model.layers[1])
        model.layers[0].compile(backend="eager")

    @torch.no_grad()
    def loss():
        return compiled(model.embedding.weight).square().mean()

    assert moving_with_a_layer(assert_streamed_equals_whole(model, loss)) == []


def test_before_a_pass_was_watched_everything_moves_for_the_whole_pass():
    model = Classifier()
    model.bypassed[0] = True
    perturbation = streamed(model)
    before = values(model)
    with perturbation.at(perturbation.query(1)):
        assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_a_pass_that_fails_while_it_is_watched_leaves_the_safe_way():
    model = Classifier()
    perturbation = streamed(model)
    with pytest.raises(ZeroDivisionError), perturbation.watching():
        1 / 0  # noqa: B018
    assert not perturbation.is_watched and not moving_with_a_layer(perturbation)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_what_was_moved_in_no_pass_is_named_and_not_stepped(monkeypatch):
    model = Classifier()
    estimator = ZOEstimator(LayerAssignment("dual", "all").split(model, eps=1e-2).zo, model=model)
    list(estimator.stream([(estimator.estimate(PlainEvaluation(model.loss), step=0), 0.0)]))
    monkeypatch.setattr(StreamedPerturbation, "widen", lambda self: False)
    model.bypassed[2] = True
    estimate = estimator.estimate(PlainEvaluation(model.loss), step=1)
    with pytest.raises(
        RuntimeError,
        match=r"2 zeroth-order parameters were not perturbed in any pass.*layers\.2\.weight, layers\.2\.bias",
    ):
        next(estimator.stream([(estimate, 1.0)]))
    assert all(p.grad is None for p in model.parameters())


def test_memory_is_that_of_the_model_what_lies_outside_its_layers_and_one_layer(monkeypatch):
    model, sizes, away = language_model(), [], 0
    plain = hf_zocl.zo.Perturbation.at

    @contextmanager
    def counted(self, offset):
        nonlocal away
        away += len(self)
        sizes.append(away)
        with plain(self, offset):
            yield
        away -= len(self)

    monkeypatch.setattr(hf_zocl.zo.Perturbation, "at", counted)
    perturbation = streamed(model)
    PlainEvaluation(lambda: loss_of(model)).losses([{perturbation: perturbation.query(1)}])
    layer = sum(p.numel() for p in model.transformer.h[0].parameters())
    outside = sum(p.numel() for p in model.parameters()) - 3 * layer
    assert max(sizes) == outside + layer
    assert away == 0


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
    with perturbation.watching():
        loss_of(model)

    def look(*_):
        layers = {p: i for i, layer in enumerate(model.transformer.h) for p in layer.parameters()}
        moved = [p for p, old in zip(model.parameters(), before, strict=True) if not torch.equal(p, old)]
        away.append({layers.get(p) for p in moved})

    for layer in model.transformer.h:
        layer.attn.register_forward_pre_hook(look)
    with perturbation.at(perturbation.query(1)):
        loss_of(model)
    assert away == [{None, 0}, {None, 1}, {None, 2}]


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


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"zo_optim": "adamw"}, {"zo_sign": True}, {"zo_max_grad_norm": 30.0}])
def test_a_whole_model_learns_by_streamed_forward_passes_alone(tmp_path, monkeypatch, options):
    monkeypatch.setattr(hf_zocl.trainer.mixin, "STREAMED_PARAMETERS", 0)
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
