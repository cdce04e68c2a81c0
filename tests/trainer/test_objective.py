"""`zo_objective`: zeroth-order layers learn by a figure that has no gradient."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer

from hf_zocl import ZeroOrderMixin, ZOCLTrainer
from hf_zocl.passes import PlainEvaluation
from hf_zocl.trainer.objective import SIZES, best_size
from tests.helpers import Mlp, arguments, rows, train, training_logs


def the_loss(model, inputs, outputs):
    return outputs["loss"]


def trained(tmp_path, model, objective=None, trainer_class=ZOCLTrainer, data=None, **options):
    args = arguments(tmp_path, **options)
    trainer = trainer_class(model=model, args=args, train_dataset=data or rows(), zo_objective=objective)
    trainer.train()
    return trainer


def weights(trainer):
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("layers", ["all", "hop-odd"])
@pytest.mark.parametrize("estimator", ["one-sided", "two-sided", "fzoo", "conservative"])
def test_an_objective_equal_to_the_loss_trains_to_the_same_bits(tmp_path, estimator, layers):
    options = {"zo_layers": layers, "zo_estimator": estimator, "zo_eps": 1e-2, "zo_queries": 2, "zo_sign": False}
    options |= {"max_steps": 4, "zo_learning_rate": 1e-2, "dropout": 0.5}
    dropout = options.pop("dropout")
    by_loss = trained(tmp_path, Mlp(dropout), **options)
    by_objective = trained(tmp_path, Mlp(dropout), the_loss, **options)
    assert same(by_loss, by_objective)
    assert not same(by_loss, trained(tmp_path, Mlp(dropout), lambda *_: -the_loss(*_), **options))
    logs = training_logs(by_objective)
    assert all(entry["zo_objective"] == pytest.approx(entry["loss"], abs=1e-4) for entry in logs)


class PlainPasses(ZOCLTrainer):
    def _evaluation(self, micro_batch):
        return PlainEvaluation(micro_batch.forward, super()._evaluation(micro_batch).before)


@pytest.mark.slow
@pytest.mark.parametrize("branch", ["dual", "language"])
def test_in_a_dual_encoder_it_trains_as_plain_passes_do(tmp_path, branch):
    options = {"zo_branch": branch, "zo_layers": "all", "zo_eps": 1e-2, "zo_sign": False, "zo_learning_rate": 1e-2}
    by_loss = train(tmp_path, trainer_class=PlainPasses, **options)
    by_objective = train(
        tmp_path, trainer_class=type("Mine", (ZOCLTrainer,), {"zo_objective": staticmethod(the_loss)}), **options
    )
    assert same(by_loss, by_objective)


class Classifier(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(4, classes)])
        self.passes = 0

    def forward(self, x, labels=None):
        self.passes += 1
        logits = self.layers[0](x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def separable(count=96):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 4, generator=generator)
    labels = torch.where(x[:, 0] > 0.5, 0, torch.where(x[:, 1] > 0, 1, 2))
    return [{"x": x[i] + 3 * F.one_hot(labels[i], 4), "labels": int(labels[i])} for i in range(count)]


def macro_f1(predicted, labels, classes=3):
    scores = []
    for label in range(classes):
        hits = ((predicted == label) & (labels == label)).sum()
        scores.append(2 * hits / ((predicted == label).sum() + (labels == label).sum()).clamp(min=1))
    return torch.stack(scores).mean()


@pytest.mark.slow
def test_macro_f1_rises_by_forward_passes_alone(tmp_path):
    data = separable()
    x, labels = torch.stack([row["x"] for row in data]), torch.tensor([row["labels"] for row in data])

    def objective(model, inputs, outputs):
        assert not torch.is_grad_enabled() and not outputs["logits"].requires_grad
        return 1 - macro_f1(outputs["logits"].argmax(-1), inputs["labels"])

    model = Classifier()
    before = macro_f1(model.layers[0](x).argmax(-1), labels)
    options = {"zo_layers": "all", "max_steps": 60, "per_device_train_batch_size": 48, "zo_queries": 8}
    trainer = trained(tmp_path, model, objective, data=data, zo_learning_rate=5e-2, zo_estimator="fzoo", **options)
    after = macro_f1(model.layers[0](x).argmax(-1), labels)
    assert after > 0.9 > before + 0.2
    logs = training_logs(trainer)
    assert logs[-1]["zo_objective"] < 0.1 < logs[0]["zo_objective"]
    assert logs[0]["loss"] != pytest.approx(logs[0]["zo_objective"])


def test_a_value_for_every_example_counts_as_its_mean_and_the_sign_is_the_default(tmp_path):
    def wrong(model, inputs, outputs):
        return outputs["logits"].argmax(-1) != inputs["labels"]

    def error(model, inputs, outputs):
        return 1 - (outputs["logits"].argmax(-1) == inputs["labels"]).float().mean().item()

    options = {"data": separable(), "zo_layers": "all", "zo_eps": 0.3, "zo_learning_rate": 1e-3, "zo_optim": "sgd"}
    trainer = trained(tmp_path, Classifier(), wrong, **options)
    assert same(trainer, trained(tmp_path, Classifier(), error, **options))
    moves = (trainer.model.layers[0].weight - Classifier().layers[0].weight).abs()
    assert torch.allclose(moves.max(), torch.tensor(2e-3), atol=1e-6)  # by the rate at every step, not by 1/ε
    assert not same(trainer, trained(tmp_path, Classifier(), wrong, zo_sign=False, **options))


class TellsPasses(ZOCLTrainer):
    def _measure_differences(self, *_):
        self._watch.tries = 0


@pytest.mark.parametrize(("estimator", "passes"), [("one-sided", 4), ("two-sided", 7), ("fzoo", 4)])
def test_a_step_takes_the_hosts_pass_and_one_for_every_loss(tmp_path, estimator, passes):
    counts, model = [], Classifier()

    def objective(model, inputs, outputs):
        counts.append(model.passes)
        return outputs["loss"]

    options = {"zo_estimator": estimator, "zo_queries": 3, "zo_eps": 1e-2, "zo_layers": "all", "max_steps": 3}
    trained(tmp_path, model, objective, TellsPasses, separable(), **options)
    assert model.passes == 3 * passes == len(counts)


def test_first_order_layers_learn_by_the_loss(tmp_path):
    """And the zeroth-order ones by the objective: without a difference they stay."""
    options = {"zo_layers": [1], "zo_eps": 1e-2, "max_steps": 2}
    trainer = trained(tmp_path, Mlp(), lambda *_: 1.0, **options)
    control = Mlp()
    control.layers[0].requires_grad_(False)
    plain = Trainer(model=control, args=arguments(tmp_path, zo_branch="none", max_steps=2), train_dataset=rows())
    plain.train()
    assert same(trainer, plain)


@pytest.mark.slow
def test_a_shortcut_is_used_for_the_loss_and_none_for_an_objective(tmp_path):
    kinds = []

    class Tells(ZOCLTrainer):
        def _evaluation(self, micro_batch):
            kinds.append(super()._evaluation(micro_batch))
            return kinds[-1]

    options = {"zo_layers": "all", "zo_eps": 1e-2, "max_steps": 1}
    train(tmp_path, trainer_class=Tells, **options)
    assert type(kinds.pop()) is not PlainEvaluation
    train(tmp_path, trainer_class=type("Mine", (Tells,), {"zo_objective": staticmethod(the_loss)}), **options)
    assert type(kinds.pop()) is PlainEvaluation


class Host(Trainer):
    pass


class HostFirst(Host, ZeroOrderMixin):
    def zo_objective(self, model, inputs, outputs):
        return outputs["loss"]


def test_a_method_will_do_in_either_order_of_the_bases(tmp_path):
    options = {"zo_layers": "all", "zo_eps": 1e-2, "zo_learning_rate": 1e-2}
    trainer = HostFirst(model=Mlp(), args=arguments(tmp_path, **options), train_dataset=rows())
    trainer.train()
    assert "zo_objective" in training_logs(trainer)[0]
    assert same(trainer, trained(tmp_path, Mlp(), the_loss, **options))


@pytest.mark.slow
def test_exact_match_of_what_a_small_causal_lm_generates(tmp_path):
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 8}
    quiet = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **quiet, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    data = [{"input_ids": torch.tensor([1 + i % 7, 1 + i % 5]), "labels": torch.tensor([3, 3])} for i in range(32)]

    def misses(model, inputs, outputs):
        mask = torch.ones_like(inputs["input_ids"])
        found = model.generate(inputs["input_ids"], attention_mask=mask, max_new_tokens=2, do_sample=False)[:, 2:]
        return (found != inputs["labels"]).any(dim=1)

    options = {"zo_layers": "all", "zo_estimator": "fzoo", "zo_queries": 16, "zo_learning_rate": 1e-2}
    options |= {"max_steps": 30, "per_device_train_batch_size": 32}
    trainer = trained(tmp_path, model, misses, data=data, **options)
    logs = training_logs(trainer)
    assert logs[-1]["zo_objective"] < 0.2 < 0.7 < logs[0]["zo_objective"]


@pytest.mark.parametrize(("jump", "expected"), [(0.0, {1e-3, 3e-3}), (1e-2, {1e-2, 3e-2})])
def test_eps_is_where_the_changes_are_most_like_a_slopes(jump, expected):
    """Above the jumps of a step function, and below its bend, which from 0.1 on is as large as the slope."""

    def line(number, offsets):
        slopes = (3.0, -2.0, 1.0, -2.5)
        values = torch.tensor([0.37 + slopes[number] * x + 20 * x * x for x in offsets], dtype=torch.float64)
        return (values / jump).round() * jump if jump else values

    found = best_size(line, line(0, [0.0]), SIZES)
    assert found.eps in expected and found.is_seen
    assert best_size(line, line(0, [0.0]), [1e-6]) is None if jump else True


def test_of_an_objective_eps_is_logged_and_no_noise(tmp_path):
    def steps(model, inputs, outputs):
        return torch.stack([p.sum() for p in model.parameters()]).sum().div(0.2).round()

    trainer = trained(tmp_path, Classifier(), steps, data=separable(), zo_layers="all", max_steps=1)
    eps = training_logs(trainer)[0]["zo_eps"]
    assert 1e-2 <= eps <= 1e-1 and "zo_noise" not in training_logs(trainer)[0]


@pytest.mark.parametrize(
    ("objective", "eps", "message"),
    [
        (
            lambda model, inputs, outputs: 0.5,
            "auto",
            "is 0.5 on the first batch and stays so at any zo_eps up to",
        ),
        (
            lambda model, inputs, outputs: outputs["logits"].argmax(-1) != inputs["labels"],
            1e-6,
            "stays so at zo_eps=1e-06: no prediction changes. At zo_eps=",
        ),
    ],
)
def test_what_nothing_can_be_learned_from_is_named_at_once(tmp_path, caplog, objective, eps, message):
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING, logger="transformers"):
        trained(tmp_path, Classifier(), objective, data=separable(), zo_layers="all", zo_eps=eps, max_steps=1)
    assert message in caplog.text


def test_differences_that_become_zero_are_named(tmp_path, caplog):
    calls = []

    def objective(model, inputs, outputs):
        calls.append(0)
        return outputs["loss"] if len(calls) < 60 else torch.zeros(())

    logging.getLogger("transformers").propagate = True
    options = {"data": separable(), "zo_layers": "all", "zo_queries": 16, "zo_eps": 0.0123, "max_steps": 8}
    with caplog.at_level(logging.WARNING, logger="transformers"):
        trained(tmp_path, Classifier(), objective, **options)
    assert "zo_objective did not change in any of" in caplog.text


@pytest.mark.parametrize(
    ("objective", "options", "error", "message"),
    [
        (0.5, {}, TypeError, "zo_objective=0.5: expected a function of"),
        (the_loss, {"zo_estimator": "forward-gradient"}, ValueError, "takes derivatives"),
        (the_loss, {"zo_branch": "none"}, ValueError, "no trained parameter is zeroth-order"),
        (lambda *_: None, {}, TypeError, "zo_objective returned NoneType: expected a number"),
        (lambda *_: "good", {}, TypeError, "zo_objective returned str: expected a number"),
        (lambda *_: torch.empty(0), {}, ValueError, r"zo_objective returned an empty tensor, of shape \(0,\)"),
    ],
)
def test_what_cannot_be_learned_by_is_refused(tmp_path, objective, options, error, message):
    with pytest.raises(error, match=message):
        trained(tmp_path, Mlp(), objective, zo_layers="all", **options)


def test_a_training_goes_on_to_the_bit(tmp_path):
    def train(resume=None):
        options = {"zo_layers": "all", "max_steps": 4, "save_steps": 2, "save_strategy": "steps"}
        args = arguments(tmp_path, **options)
        trainer = ZOCLTrainer(
            model=Classifier(),
            args=args,
            train_dataset=separable(),
            zo_objective=lambda m, i, o: o["loss"].round(decimals=2),
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = train()
    gone_on = train(str(tmp_path / "trainer" / "checkpoint-2"))
    assert same(whole, gone_on)
    assert training_logs(whole)[-1]["zo_eps"] == training_logs(gone_on)[-1]["zo_eps"]


@pytest.mark.parametrize("layers", ["all", [1]])
def test_an_objective_that_calls_eval_leaves_the_passes_as_they_are(tmp_path, layers):
    def squares(model, inputs, outputs):
        return (outputs["logits"] - inputs["labels"]).square()

    def squares_in_eval(model, inputs, outputs):
        model.eval()  # as before generating
        return squares(model, inputs, outputs)

    options = {"zo_layers": layers, "zo_eps": 1e-3, "max_steps": 3}
    one, other = (trained(tmp_path, Mlp(dropout=0.5), each, **options) for each in (squares, squares_in_eval))
    assert same(one, other)
    assert max(log["zo_loss_difference"] for log in training_logs(other)) < 0.1
