"""`zo_learning_rate: auto`, in a training."""

import pytest
import torch

from hf_zocl import ZOCLTrainer
from hf_zocl.trainer.rates import DEFAULT_RATE, check_schedule, chosen_rates
from hf_zocl.zo import ReplayLog
from tests.helpers import Mlp, arguments, mini_clip_classifier, rows, train, training_logs


def chosen(trainer, is_alone: bool = True) -> dict:
    """What the measured derivatives give."""
    count = trainer.args.gradient_accumulation_steps
    return chosen_rates(trainer.args, trainer._estimator, count, 1 / count, is_alone)


def weights_after(trainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"zo_optim": "adamw", "gradient_accumulation_steps": 2},
        {"zo_estimator": "two-sided", "zo_optim": "sgd", "zo_queries": 3},
        {"zo_estimator": "fzoo", "zo_queries": 4},
        {"zo_estimator": "conservative"},
        {"zo_layers": [1]},
        {"zo_estimator": "one-sided", "zo_optim": "sgd", "zo_sign": True, "zo_eps": 1e-3},
    ],
)
def test_auto_trains_as_the_number_that_it_chooses(tmp_path, options):
    options = {"zo_layers": "all", "max_steps": 3, "warmup_steps": 2, "lr_scheduler_type": "linear", **options}
    auto = train(tmp_path, Mlp(), data=rows(), **options)
    (rate,) = chosen(auto, is_alone=options["zo_layers"] == "all").values()
    number = train(tmp_path, Mlp(), data=rows(), zo_learning_rate=rate, **options)
    torch.testing.assert_close(weights_after(auto), weights_after(number), rtol=1e-5, atol=1e-7)
    assert not torch.equal(weights_after(auto), torch.cat([p.detach().flatten() for p in Mlp().parameters()]))
    logged = [[log["zo_learning_rate"] for log in training_logs(trainer)] for trainer in (auto, number)]
    assert logged[0] == pytest.approx(logged[1])


def test_every_tower_has_its_own_rate_and_a_number_stays(tmp_path):
    options = {"zo_layers": "all", "zo_queries": {"vision": 1, "language": 4}, "max_steps": 1}
    trainer = train(tmp_path, mini_clip_classifier(), **options)
    found = chosen(trainer)
    assert trainer._estimates.learning_rates == pytest.approx(found) and len(set(found.values())) == 2
    log = training_logs(trainer)[0]
    assert log["zo_learning_rate_language"] == pytest.approx(found["language"])
    given = {"vision": 1e-5, "language": "auto"}
    trainer = train(tmp_path, mini_clip_classifier(), zo_learning_rate=given, **options)
    assert trainer._estimates.learning_rates == pytest.approx({**found, "vision": 1e-5})


@pytest.mark.parametrize(
    ("options", "objective"),
    [
        ({"zo_estimator": "forward-gradient"}, None),
        ({"zo_eps": 1e-2}, lambda model, inputs, outputs: (outputs["logits"] - inputs["labels"]).abs().mean()),
    ],
)
def test_where_no_derivative_is_measured_it_is_a_modest_number(tmp_path, options, objective):
    class WithObjective(ZOCLTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs, zo_objective=objective)

    trainer = train(tmp_path, Mlp(), WithObjective, data=rows(), zo_layers="all", max_steps=1, **options)
    assert trainer._estimates.learning_rates == {None: DEFAULT_RATE}


def test_a_flat_loss_keeps_the_modest_rate_until_it_moves(tmp_path):
    class FlatAtFirst(Mlp):
        def forward(self, x, labels=None):
            outputs = super().forward(x, labels)
            return {**outputs, "loss": outputs["loss"] * self.weight}

    model = FlatAtFirst()
    model.weight = 0.0
    seen = []

    class Watching(ZOCLTrainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            seen.append(self._estimates.learning_rates[None])
            model.weight = 1.0
            return loss

    trainer = train(tmp_path, model, Watching, data=rows(), zo_layers="all", max_steps=3)
    assert seen[0] == DEFAULT_RATE and seen[1:] == pytest.approx([*chosen(trainer).values()] * 2)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "reduce_lr_on_plateau"])
def test_a_training_that_goes_on_keeps_its_rate(tmp_path, schedule):
    options = {"zo_layers": "all", "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    if schedule == "reduce_lr_on_plateau":
        options |= {"eval_strategy": "steps", "eval_steps": 1}
    options["lr_scheduler_type"] = schedule

    def make(folder, model):
        args = arguments(tmp_path / folder, **options)
        return ZOCLTrainer(model=model, args=args, train_dataset=rows(), eval_dataset=rows(8))

    whole = make("whole", Mlp())
    whole.train()
    trainer = make("again", Mlp())
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "trainer" / "checkpoint-2"))
    assert trainer._estimates.peak_rates == whole._estimates.peak_rates != {None: DEFAULT_RATE}
    assert torch.equal(weights_after(whole), weights_after(trainer))


@pytest.mark.parametrize("queries", [1, {"vision": 1, "language": 4}])
def test_the_log_of_steps_makes_the_same_weights_again(tmp_path, queries):
    model, again = mini_clip_classifier(), mini_clip_classifier()
    options = {"zo_layers": "all", "zo_queries": queries, "max_steps": 3, "lr_scheduler_type": "linear"}
    trainer = train(tmp_path, model, **options)
    read = ReplayLog.from_tensors(trainer.replay_log.settings, trainer.replay_log.tensors())
    read.replay(trainer.args.layer_assignment.split(again).zo)
    assert all(map(torch.equal, model.parameters(), again.parameters()))


class CountsItems(Mlp):
    """A loss that adds up over the micro-batches of a step, as a causal language model's."""

    def forward(self, x, labels=None, num_items_in_batch=None, **kwargs):
        outputs = super().forward(x, labels)
        if num_items_in_batch is not None:
            outputs["loss"] = outputs["loss"] * len(labels) / num_items_in_batch
        return outputs


@pytest.mark.parametrize("rule", ["sgd", "sign", "adamw"])
@pytest.mark.parametrize("estimator", ["one-sided", "two-sided", "fzoo"])
def test_the_rate_is_that_of_the_steps_loss_however_its_micro_batches_count(tmp_path, rule, estimator):
    options = {"zo_layers": "all", "zo_optim": rule, "zo_estimator": estimator, "zo_queries": 2, "max_steps": 1}
    options |= {"gradient_accumulation_steps": 8, "per_device_train_batch_size": 2}
    same = rows(1) * 16
    mean, total = (train(tmp_path, model, data=same, **options) for model in (Mlp(), CountsItems()))
    assert total.model_accepts_loss_kwargs and not mean.model_accepts_loss_kwargs
    rates = [trainer._estimates.learning_rates[None] for trainer in (mean, total)]
    assert rates[0] == pytest.approx(rates[1], rel=0.05)
    torch.testing.assert_close(weights_after(mean), weights_after(total), rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("layers", ["all", [1]])
@pytest.mark.parametrize(
    ("schedule", "given"),
    [("cosine_with_min_lr", {"min_lr": 2e-3}), ("polynomial", {"lr_end": 2e-3})],
)
def test_a_schedule_ends_at_the_rate_that_is_given(tmp_path, layers, schedule, given):
    options = {"lr_scheduler_type": schedule, "lr_scheduler_kwargs": given, "learning_rate": 1e-2, "max_steps": 4}
    trainer = train(tmp_path, Mlp(), data=rows(), zo_layers=layers, zo_learning_rate=1e-2, **options)
    assert trainer._estimates.learning_rates[None] == pytest.approx(2e-3)


@pytest.mark.parametrize("schedule", ["cosine_with_min_lr", "polynomial", "reduce_lr_on_plateau"])
def test_a_rate_to_end_at_needs_one_to_begin_with(tmp_path, schedule):
    name = "lr_end" if schedule == "polynomial" else "min_lr"
    options = {"lr_scheduler_type": schedule, "lr_scheduler_kwargs": {name: 1e-6}, "zo_layers": "all"}
    if schedule == "reduce_lr_on_plateau":
        options |= {"eval_strategy": "steps", "eval_steps": 1}
    trainer = ZOCLTrainer(model=Mlp(), args=arguments(tmp_path, **options), train_dataset=rows(), eval_dataset=rows(8))
    with pytest.raises(ValueError, match=f"{name} is a learning rate, and zo_learning_rate='auto'"):
        trainer.train()


def test_a_schedule_with_bounds_of_its_own_is_refused_beside_auto(tmp_path):
    with pytest.raises(ValueError, match="lr_scheduler_type='greedy' keeps rates between min_lr"):
        check_schedule(arguments(tmp_path, lr_scheduler_type="greedy", eval_strategy="steps"), is_alone=False)


@pytest.mark.parametrize("name", ["zo_queries", "zo_eps", "zo_learning_rate"])
def test_a_value_for_each_tower_is_refused_where_there_is_none(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name}=.*'vision': 1.*: the zeroth-order layers of Mlp are in no tower"):
        train(tmp_path, Mlp(), data=rows(), **{name: {"vision": 1, "language": 1}})
