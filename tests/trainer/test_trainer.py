"""The traps of a Trainer that mixes zeroth- and first-order layers, one test each."""

import copy
import logging
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers import (
    BatchEncoding,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from hf_zocl import ZeroOrderArguments, ZOCLTrainer, ZOCLTrainingArguments
from hf_zocl.zo import ESTIMATORS, ReplayLog, SignSGD
from tests.helpers import Mlp, arguments, mini_clip_classifier, rows, slow_but_for, train, training_logs


def trainable(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


class Watch(TrainerCallback):
    """Collects what `look(trainer)` returns just before every optimizer step."""

    def __init__(self, look):
        self.look, self.seen, self.trainer = look, [], None

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.seen.append(self.look())


@pytest.fixture
def unmeasured(monkeypatch):
    """The passes of a step are a step's own: ε is not measured at the first."""
    monkeypatch.setattr(ZOCLTrainer, "_measure_differences", lambda *_: None)


@pytest.mark.slow
def test_branch_none_is_a_plain_trainer_to_the_last_bit(tmp_path):
    options = {"max_steps": 6, "gradient_accumulation_steps": 2, "warmup_steps": 2, "lr_scheduler_type": "cosine"}
    ours = train(tmp_path, zo_branch="none", **options)
    plain = train(tmp_path, trainer_class=Trainer, cls=TrainingArguments, **options)
    assert all(
        torch.equal(a, b) for a, b in zip(trainable(ours.model).values(), trainable(plain.model).values(), strict=True)
    )
    assert [e["loss"] for e in training_logs(ours)] == [e["loss"] for e in training_logs(plain)]
    assert [e["grad_norm"] for e in training_logs(ours)] == [e["grad_norm"] for e in training_logs(plain)]


def test_both_groups_learn_and_frozen_weights_stay(tmp_path):
    model = mini_clip_classifier()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = train(tmp_path, model, zo_branch="dual", zo_layers="hop-even", zo_learning_rate=1e-2)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert all("lora_" in name for name in moved)
    # LoRA's A has no gradient while B is zero, so of the first-order group the Bs have surely moved.
    assert {name for name in trainer.split.fo if "lora_B" in name} <= moved
    assert {name for group in trainer.split.zo for name in group.names} <= moved


def test_zo_parameters_take_no_part_in_autograd_during_training_and_do_again_after(tmp_path):
    model = Mlp()
    trainer = train(tmp_path, model, data=rows(), zo_layers=[1])
    assert not any(model.forwards)
    assert all(p.requires_grad for p in trainer.split.zo_parameters)


def test_zo_parameters_require_a_gradient_again_after_a_failure(tmp_path):
    class Fails(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    model = Mlp()
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, model, data=rows(), zo_layers=[1], callbacks=[Fails()])
    assert all(p.requires_grad for p in model.parameters())


def test_what_is_frozen_after_the_trainer_was_made_stays(tmp_path):
    model = Mlp()
    trainer = ZOCLTrainer(model=model, args=arguments(tmp_path, zo_layers="all"), train_dataset=rows())
    for _ in range(2):
        frozen = model.layers[0].weight.requires_grad_(False)
        before = frozen.detach().clone()
        trainer.train()
        assert torch.equal(frozen, before)
        assert not frozen.requires_grad


def test_a_batch_keeps_its_type_in_every_pass(tmp_path):
    seen = []

    class Reads(ZOCLTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            seen.append(type(inputs))
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def collate(examples):
        return BatchEncoding({"x": torch.stack([e["x"] for e in examples]), "labels": torch.zeros(len(examples))})

    args = arguments(tmp_path, zo_layers=[1])
    Reads(model=Mlp(), args=args, train_dataset=rows(), data_collator=collate).train()
    assert set(seen) == {BatchEncoding}


@pytest.mark.slow
def test_the_optimizer_and_pefts_saving_see_the_zo_parameters(tmp_path):
    model = mini_clip_classifier()
    seen = {}

    class Saves(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            seen["saved"] = set(get_peft_model_state_dict(model.clip))
            seen["optimized"] = {id(p) for group in optimizer.param_groups for p in group["params"]}

    trainer = train(tmp_path, model, callbacks=[Saves()], zo_layers="hop-odd")
    assert len(seen["saved"]) == len(trainable(model))
    assert seen["optimized"] == {id(p) for n, p in model.named_parameters() if "lora_" in n}
    assert trainer.split.zo


def test_the_estimate_is_clipped_apart_from_the_gradient(tmp_path):
    """The Trainer's clipping must see the first-order gradients alone, or the long estimate would crush them."""
    model, watch = Mlp(), None

    def look():
        fo = torch.stack([p.grad.norm() for p in model.layers[1].parameters()]).norm()
        zo = torch.stack([p.grad.norm() for p in model.layers[0].parameters()]).norm()
        return fo.item(), zo.item()

    watch = Watch(look)
    options = {"data": rows(), "zo_layers": [1], "max_grad_norm": 0.01, "zo_max_grad_norm": 0.5, "max_steps": 3}
    trainer = ZOCLTrainer(model=model, args=arguments(tmp_path, **{k: v for k, v in options.items() if k != "data"}),
                          train_dataset=options["data"], callbacks=[])  # fmt: skip
    trainer.add_callback(watch)
    trainer.train()
    for (fo, zo), log in zip(watch.seen, training_logs(trainer), strict=True):
        assert fo == pytest.approx(0.01, rel=1e-3)
        assert zo <= 0.5 * 1.001
        assert log["grad_norm"] > 0.01
        assert log["zo_grad_norm"] > 0.5


def test_queries_do_not_change_the_data_order_or_the_dropout(tmp_path):
    def losses(queries: int) -> list[float]:
        model = Mlp(dropout=0.5)
        trainer = train(
            tmp_path, model, data=rows(), zo_layers=[1], zo_queries=queries, zo_learning_rate=0.0, max_steps=6
        )
        return [entry["loss"] for entry in training_logs(trainer)]

    assert losses(1) == losses(5)


@pytest.mark.parametrize("layers", [[1], "all"])
def test_all_losses_of_one_estimate_are_taken_under_the_same_masks(tmp_path, unmeasured, layers):
    """With ε as small as this the losses differ only if the dropout masks do."""
    model = Mlp(dropout=0.5)
    train(tmp_path, model, data=rows(), zo_layers=layers, zo_queries=4, zo_eps=1e-12, max_steps=1)
    assert len(model.losses) >= 5
    assert len(set(model.losses)) == 1


def test_masks_change_from_step_to_step(tmp_path, unmeasured):
    model = Mlp(dropout=0.5)
    data = rows(8)
    train(tmp_path, model, data=data, zo_layers="all", zo_eps=1e-12, zo_learning_rate=0.0, max_steps=4)
    assert len(set(model.losses)) == 4


def test_parameters_come_back_when_the_forward_pass_raises(tmp_path):
    class Breaks(Mlp):
        def forward(self, x, labels=None):
            if not torch.is_grad_enabled() and len(self.losses) >= 2:
                raise RuntimeError("a perturbed forward pass broke")
            return super().forward(x, labels)

    model = Breaks()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="perturbed forward"):
        train(tmp_path, model, data=rows(), zo_layers=[1], zo_queries=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("layers", [[1], "all"])
def test_accumulation_scales_the_estimate_like_the_loss(tmp_path, layers):
    """Two micro-batches of the same examples and a deterministic slope: the installed estimate is their mean."""

    def estimates(accumulation: int) -> torch.Tensor:
        model, seen = Mlp(), []
        micro = []

        trainer = ZOCLTrainer(
            model=model,
            args=arguments(
                tmp_path, zo_layers=layers, zo_queries=16, max_steps=1, gradient_accumulation_steps=accumulation
            ),
            train_dataset=rows(8) * accumulation,
        )
        original = trainer._install_estimates

        def spy():
            micro.extend(scale for _, scale in trainer._estimates)
            original()

        trainer._install_estimates = spy
        trainer.add_callback(Watch(lambda: seen.append(model.layers[0].weight.grad.clone())))
        trainer.train()
        assert micro == [1 / accumulation] * accumulation
        return seen[0]

    single, double = estimates(1), estimates(2)
    assert single.shape == double.shape
    # Other directions for the second micro-batch: the mean of two estimates, about 1/√2 as long.
    assert not torch.allclose(single, double)
    assert double.norm() < 1.5 * single.norm()


def test_language_queries_do_not_run_the_vision_tower(tmp_path, unmeasured):
    model, calls = mini_clip_classifier(), {"vision_model": 0, "text_model": 0}
    for name in calls:
        tower = getattr(model.clip.base_model.model, name)
        tower.encoder.layers[0].register_forward_pre_hook(
            lambda _, args, name=name: calls.__setitem__(name, calls[name] + len(args[0]))
        )

    class CountAnew(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            calls.update(vision_model=0, text_model=0)

    options = {"zo_branch": "language", "zo_layers": "all", "zo_queries": 8}
    train(tmp_path, model, callbacks=[CountAnew()], max_steps=2, **options)  # the first checks the shortcuts
    # Three prompts at θ; packed, they are one row of each of the eight candidates.
    assert calls == {"vision_model": 8, "text_model": 3 + 8}


@pytest.mark.slow
def test_the_logs_carry_the_zeroth_order_figures(tmp_path):
    log = training_logs(train(tmp_path, zo_learning_rate=3e-3))[0]
    names = {"loss", "grad_norm", "learning_rate", "zo_loss_difference", "zo_grad_norm", "zo_learning_rate"}
    assert names | {"zo_variance_vision", "zo_variance_language"} <= set(log)
    assert log["learning_rate"] == 1e-2
    assert log["zo_learning_rate"] == 3e-3
    assert log["zo_grad_norm"] > 0
    assert log["zo_variance_vision"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["one-sided", "conservative"])
def test_a_tower_may_have_a_learning_rate_of_its_own(tmp_path, estimator):
    model, rates = mini_clip_classifier(), {"vision": 1e-3, "language": 5e-3}
    start, again = trainable(model), mini_clip_classifier()
    options = {"zo_layers": "all", "zo_optim": "sign", "zo_learning_rate": {"vision": 1e-3, "language": 5e-3}}
    trainer = train(tmp_path, model, zo_estimator=estimator, max_steps=1, **options)
    for group in trainer.split.zo:
        for name, parameter in zip(group.names, group.parameters, strict=True):
            step = (parameter.detach() - start[name]).abs()
            moved = step[step > 0]  # the conservative rule may stand still
            torch.testing.assert_close(moved, torch.full_like(moved, rates[group.branch]), rtol=1e-3, atol=1e-7)
    log = training_logs(trainer)[0]
    assert {log["zo_learning_rate_vision"], log["zo_learning_rate_language"]} == set(rates.values())
    assert "zo_learning_rate" not in log
    # Each branch has its own rate in the log of steps, too.
    read = ReplayLog.from_tensors(trainer.replay_log.settings, trainer.replay_log.tensors())
    read.replay(trainer.args.layer_assignment.split(again).zo)
    assert all(torch.equal(a, b) for a, b in zip(trainable(again).values(), trainable(model).values(), strict=True))


@pytest.mark.parametrize(("options", "kept"), [({"zo_momentum": 0.9}, False), ({"zo_momentum": 0.0}, True)])
def test_a_second_training_has_a_log_only_if_the_rule_keeps_nothing_of_the_first(tmp_path, options, kept):
    trainer = train(tmp_path, Mlp(), data=rows(), zo_layers="all", zo_optim="sgd", **options)
    assert len(trainer.replay_log.steps) == 2
    before = copy.deepcopy(trainer.model)
    trainer.train()
    assert (trainer.replay_log is not None) == kept
    if kept:
        trainer.replay_log.replay(trainer.args.layer_assignment.split(before).zo)
        assert all(map(torch.equal, before.parameters(), trainer.model.parameters()))


@pytest.mark.slow
def test_the_history_alone_carries_the_variance_of_every_layer(tmp_path, capsys):
    log = training_logs(train(tmp_path, zo_layers="hop-even"))[0]
    names = {name for name in log if "_layer_" in name}
    assert names == {f"zo_variance_vision_layer_{n}" for n in (2, 4, 6)} | {
        f"zo_variance_language_layer_{n}" for n in (2, 4)
    }
    own = [log[f"zo_variance_vision_layer_{n}"] for n in (2, 4, 6)]
    # Layers of one size, whose means are small: the branch's variance is the mean of theirs.
    assert sum(own) / 3 == pytest.approx(log["zo_variance_vision"], rel=1e-2)
    printed = capsys.readouterr().out
    assert "zo_variance_vision" in printed
    assert "_layer_" not in printed


@pytest.mark.slow
def test_tensorboard_receives_the_zeroth_order_figures(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    train(tmp_path, report_to="tensorboard")
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert "train/zo_loss_difference" in events.Tags()["scalars"]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("optim", slow_but_for(["sgd"], ["sgd", "sign", "adamw"]))
def test_every_estimator_and_rule_learns_by_forward_passes_alone(tmp_path, estimator, optim):
    if (estimator, optim) == ("conservative", "adamw"):
        pytest.skip("refused: it judges steps of SGD")
    rates = {"sgd": 0.02, "sign": 0.01, "adamw": 0.02}
    trainer = train(
        tmp_path,
        Mlp(),
        data=rows(),
        zo_layers="all",
        zo_estimator=estimator,
        zo_queries=4,
        zo_optim=optim,
        zo_learning_rate=rates[optim],
        max_steps=60,
        per_device_train_batch_size=32,
    )
    logs = training_logs(trainer)
    assert logs[-1]["loss"] < 0.8 * logs[0]["loss"]


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor"])
def test_the_first_order_group_takes_any_optim(tmp_path, optim):
    model = Mlp()
    before = model.layers[1].weight.detach().clone()
    trainer = train(tmp_path, model, data=rows(), zo_layers=[1], optim=optim)
    assert not torch.equal(model.layers[1].weight, before)
    kind = type(trainer.optimizer.optimizer.parts[0]).__name__.lower()
    assert kind == optim.removesuffix("_torch")


def test_one_scheduler_drives_both_groups(tmp_path):
    logs = training_logs(train(tmp_path, Mlp(), data=rows(), zo_layers=[1], zo_learning_rate=1.0, max_steps=4,
                               lr_scheduler_type="linear"))  # fmt: skip
    assert [entry["zo_learning_rate"] for entry in logs] == [1.0, 0.75, 0.5, 0.25]
    assert [entry["learning_rate"] for entry in logs] == pytest.approx([0.01, 0.0075, 0.005, 0.0025])


def test_a_second_call_of_train_works(tmp_path):
    trainer = train(tmp_path, Mlp(), data=rows(), zo_layers=[1])
    trainer.train()
    assert trainer.state.global_step == 2


class _Fp16(TrainerCallback):
    """accelerate refuses fp16 on a CPU; this makes it scale and unscale as on a GPU, without the autocast."""

    def __init__(self, trainer):
        self.accelerator = trainer.accelerator

    def on_train_begin(self, args, state, control, **kwargs):
        self.accelerator.native_amp = True
        self.accelerator.state._mixed_precision = "fp16"

    def on_train_end(self, args, state, control, **kwargs):
        self.accelerator.state._mixed_precision = "no"


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
@pytest.mark.parametrize("layers", ["all", [1]])
def test_a_gradient_scaler_never_divides_the_estimate(tmp_path, layers, max_grad_norm):
    """fp16: the scaler unscales what it finds before clipping, or in its step; the estimate is never divided."""
    options = {"zo_layers": layers, "max_steps": 1, "zo_optim": "sgd", "max_grad_norm": max_grad_norm}
    seen = {}
    for name, scaler in [("plain", None), ("scaled", torch.amp.GradScaler("cpu", init_scale=1024.0))]:
        model = Mlp()
        trainer = ZOCLTrainer(model=model, args=arguments(tmp_path, **options), train_dataset=rows(8))
        trainer.accelerator.scaler = scaler
        if scaler is not None:
            trainer.add_callback(_Fp16(trainer))
        trainer.add_callback(Watch(lambda m=model, n=name: seen.__setitem__(n, m.layers[0].weight.grad.clone())))
        trainer.train()
        seen[name + " weights"] = model.layers[0].weight.detach().clone()
    assert torch.equal(seen["plain"], seen["scaled"])
    assert torch.equal(seen["plain weights"], seen["scaled weights"])


def test_an_overflow_in_a_query_does_not_spoil_the_weights(tmp_path):
    class Overflows(Mlp):
        def forward(self, x, labels=None):
            output = super().forward(x, labels)
            if not torch.is_grad_enabled() and len(self.losses) == 3:
                output["loss"] = output["loss"] * torch.inf
            return output

    model = Overflows()
    train(tmp_path, model, data=rows(), zo_layers=[1], zo_queries=3, max_steps=3)
    assert all(p.isfinite().all() for p in model.parameters())


def test_an_interrupted_step_leaves_nothing_for_the_next_run(tmp_path):
    class Interrupts(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    options = {"zo_layers": [1], "gradient_accumulation_steps": 2, "max_steps": 1, "zo_learning_rate": 0.0}
    options["learning_rate"] = 0.0
    expected = training_logs(train(tmp_path, Mlp(), data=rows(), **options))[0]["zo_grad_norm"]
    interrupts = Interrupts()
    trainer = ZOCLTrainer(
        model=Mlp(), args=arguments(tmp_path, **options), train_dataset=rows(), callbacks=[interrupts]
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(interrupts)
    torch.manual_seed(trainer.args.seed)  # the data order of a fresh trainer
    trainer.train()
    assert training_logs(trainer)[-1]["zo_grad_norm"] < 2 * expected


class OwnNorm(nn.Module):
    """Batch normalisation by torch's function, with buffers of a module of its own."""

    def __init__(self, size):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(size))
        self.register_buffer("running_var", torch.ones(size))

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, training=True)


class Normalised(Mlp):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x, labels=None):
        return super().forward(self.norm(x), labels)


@pytest.mark.parametrize("layers", [[1], "all"])
@pytest.mark.parametrize("estimator", ["one-sided", "two-sided", "forward-gradient"])
@pytest.mark.parametrize("make", [nn.BatchNorm1d, OwnNorm])
def test_queries_do_not_touch_running_statistics(tmp_path, layers, estimator, make):
    norms = [make(4) for _ in range(2)]
    options = {"zo_layers": layers, "zo_estimator": estimator, "zo_queries": 5, "learning_rate": 0.0}
    options |= {"zo_learning_rate": 0.0, "max_steps": 3}
    train(tmp_path, Normalised(norms[0]), data=rows(), **options)
    train(tmp_path, Normalised(norms[1]), data=rows(), zo_branch="none", learning_rate=0.0, max_steps=3)
    assert not torch.equal(norms[0].running_mean, torch.zeros(4))
    for (name, mine), theirs in zip(norms[0].named_buffers(), norms[1].buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=name)


def test_running_statistics_that_begin_to_move_later_are_put_back(tmp_path):
    class Thaws(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            model.norm.training = state.global_step >= 2

    class Frozen(Normalised):
        def train(self, mode=True):
            training = self.norm.training
            super().train(mode)
            self.norm.train(mode and training)
            return self

    norms = [nn.BatchNorm1d(4).eval() for _ in range(2)]
    options = {"data": rows(), "callbacks": [Thaws()], "learning_rate": 0.0, "max_steps": 4}
    train(tmp_path, Frozen(norms[0]), zo_layers="all", zo_learning_rate=0.0, **options)
    train(tmp_path, Frozen(norms[1]), zo_branch="none", **options)
    assert norms[1].num_batches_tracked == 2
    for (name, mine), theirs in zip(norms[0].named_buffers(), norms[1].buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=name)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_fzoo_is_averaged_over_micro_batches_when_the_loss_counts_items(tmp_path, accumulation):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0)
    sentence = torch.arange(1, 13)
    trainer = train(
        tmp_path,
        GPT2LMHeadModel(config),
        data=[{"input_ids": sentence, "labels": sentence}] * 16,
        zo_layers="all",
        zo_estimator="fzoo",
        zo_queries=4,
        max_steps=1,
        per_device_train_batch_size=16 // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    count = sum(p.numel() for p in trainer.split.zo_parameters)
    # Four independent estimates, averaged: half as long; summed they would be twice as long.
    assert training_logs(trainer)[0]["zo_grad_norm"] < count**0.5 * {1: 1.5, 4: 0.75}[accumulation]


@pytest.mark.slow
def test_gradient_checkpointing_gives_the_same_weights(tmp_path):
    plain = train(tmp_path, zo_layers="hop-even")
    checkpointed = train(tmp_path, zo_layers="hop-even", gradient_checkpointing=True)
    weights = zip(trainable(plain.model).values(), trainable(checkpointed.model).values(), strict=True)
    for a, b in weights:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("schedule", ["polynomial", "cosine_with_restarts", "constant_with_warmup"])
def test_schedulers_that_read_the_optimizers_defaults_work(tmp_path, schedule):
    trainer = train(tmp_path, Mlp(), data=rows(), zo_layers=[1], lr_scheduler_type=schedule)
    assert trainer.state.global_step == 2


def test_plain_training_arguments_are_refused(tmp_path):
    with pytest.raises(TypeError, match="expected ZOCLTrainingArguments, got TrainingArguments"):
        ZOCLTrainer(Mlp(), arguments(tmp_path, cls=TrainingArguments))


def test_a_given_optimizer_is_refused(tmp_path):
    model = Mlp()
    with pytest.raises(ValueError, match="pass optim, zo_optim"):
        ZOCLTrainer(model, arguments(tmp_path), optimizers=(torch.optim.SGD(model.parameters()), None))


def test_a_given_schedule_is_refused(tmp_path):
    """It would be that of an optimizer which takes no step."""
    schedule = torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD(Mlp().parameters()))
    with pytest.raises(ValueError, match="pass optim, zo_optim and lr_scheduler_type"):
        ZOCLTrainer(Mlp(), arguments(tmp_path), optimizers=(None, schedule))


def test_a_bad_assignment_fails_when_the_trainer_is_made(tmp_path):
    with pytest.raises(ValueError, match="language tower, which has 4 layers"):
        ZOCLTrainer(mini_clip_classifier(), arguments(tmp_path, zo_layers="prefix-5"))


def test_a_loss_in_half_precision_is_warned_of(tmp_path, caplog):
    logging.Logger.warning_once.cache_clear()
    logging.getLogger("hf_zocl").propagate = True
    data = [{name: v.bfloat16() if v.is_floating_point() else v for name, v in row.items()} for row in rows()]
    train(tmp_path, Mlp().bfloat16(), data=data, max_steps=1)
    assert "The loss is torch.bfloat16, which rounds away the small differences" in caplog.text


def test_an_optimizer_over_all_parameters_gets_the_first_order_ones_alone(tmp_path, monkeypatch):
    def over_all(self, model=None):  # as GaLore's
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        return self.optimizer

    monkeypatch.setattr(Trainer, "create_optimizer", over_all)
    trainer = train(tmp_path, Mlp(), data=rows(), zo_layers=[1], max_steps=2)
    held = [parameter for group in trainer.optimizer.param_groups for parameter in group["params"]]
    assert len(held) == len({id(parameter) for parameter in held}) == len(list(trainer.model.parameters()))


def test_a_bert_sequence_classifier_learns_with_hop_even(tmp_path):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, num_labels=2
    )
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(2, 50, (64, 12), generator=generator)
    labels = torch.arange(64) % 2
    ids[:, 1] = labels  # the label can be read off one token
    data = [{"input_ids": i, "attention_mask": torch.ones_like(i), "labels": int(i[1])} for i in ids]
    trainer = train(
        tmp_path,
        BertForSequenceClassification(config),
        data=data,
        zo_layers="hop-even",
        zo_queries=2,
        learning_rate=2e-3,
        max_steps=40,
        per_device_train_batch_size=32,
    )
    logs = training_logs(trainer)
    assert [group.layer for group in trainer.split.zo] == [2, 4]
    assert all(name.startswith("classifier") or ".layer.1." not in name for name in trainer.split.fo)
    assert logs[-1]["loss"] < 0.3 < logs[0]["loss"]


def test_a_peft_wrapped_causal_lm_learns(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=30, n_embd=32, n_layer=4, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0)
    model = get_peft_model(
        GPT2LMHeadModel(config), LoraConfig(r=4, target_modules=["c_attn", "c_fc"], task_type="CAUSAL_LM")
    )
    sentence = torch.arange(1, 13)
    data = [{"input_ids": sentence, "labels": sentence} for _ in range(32)]
    trainer = train(tmp_path, model, data=data, zo_layers="hop-odd", learning_rate=5e-2, max_steps=40,
                    gradient_accumulation_steps=2, zo_queries=2)  # fmt: skip
    logs = training_logs(trainer)
    assert [group.layer for group in trainer.split.zo] == [1, 3]
    assert logs[-1]["loss"] < logs[0]["loss"] - 0.3
    trainer.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "rule", "momentum"),
    [
        ({}, SignSGD, 0.9),
        ({"zo_momentum": 0.5}, SignSGD, 0.5),
        ({"zo_momentum": 0.0}, SignSGD, 0.0),
        ({"zo_optim": "sgd"}, torch.optim.SGD, 0.0),
        ({"zo_optim": "sgd", "zo_momentum": 0.9}, torch.optim.SGD, 0.9),
        ({"zo_estimator": "conservative"}, SignSGD, 0.0),  # which judges a step without what earlier ones add
        ({"zo_estimator": "fzoo", "zo_queries": 2}, torch.optim.SGD, 0.0),  # whose steps have a scale already
        ({"zo_estimator": "fzoo", "zo_queries": 2, "zo_optim": "sign"}, SignSGD, 0.9),
    ],
)
def test_the_rule_and_its_momentum_suit_the_estimator(tmp_path, options, rule, momentum):
    trainer = train(tmp_path, Mlp(), data=rows(), zo_layers="all", **options)
    (part,) = trainer.optimizer.optimizer.parts
    assert type(part) is rule
    assert part.param_groups[0]["momentum"] == momentum
    # What was asked for is what is recorded.
    assert (trainer.args.zo_optim, trainer.args.zo_momentum) == (options.get("zo_optim"), options.get("zo_momentum"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zo_branch": "both"}, "zo_branch='both'"),
        ({"zo_layers": "every-other"}, "zo_layers='every-other'"),
        ({"zo_eps": 0.0}, "zo_eps=0.0"),
        ({"zo_eps": {"vision": -1.0}}, r"zo_eps \(vision\)=-1.0"),
        ({"zo_queries": 0}, "zo_queries=0"),
        ({"zo_queries": "vision=2.5"}, r"zo_queries \(vision\)='2.5'"),
        ({"zo_estimator": "fzoo"}, "zo_queries=1: zo_estimator='fzoo' needs an integer of at least 2"),
        ({"zo_estimator": "forward"}, "zo_estimator='forward'"),
        ({"zo_optim": "lion"}, "zo_optim='lion'"),
        ({"zo_learning_rate": -1.0}, "zo_learning_rate=-1.0"),
        ({"zo_learning_rate": {"vision": -1.0}}, r"zo_learning_rate \(vision\)=-1.0"),
        ({"zo_estimator": "conservative", "zo_max_grad_norm": 1.0}, "'conservative' .*it judges its steps unclipped"),
        ({"zo_estimator": "conservative", "zo_momentum": 0.9}, "zo_momentum=0.9: zo_estimator='conservative' applies"),
        ({"zo_estimator": "conservative", "zo_weight_decay": 0.1}, "zo_weight_decay=0.1: .*a step without decay"),
        ({"zo_estimator": "conservative", "gradient_accumulation_steps": 2}, "gradient_accumulation_steps=2: "),
        ({"zo_estimator": "conservative", "zo_optim": "adamw"}, "zo_optim='adamw': .*expected 'sgd' or 'sign'"),
        ({"zo_eps": "small"}, "zo_eps='small': expected a number or auto"),
        ({"zo_eps": float("inf")}, "zo_eps=inf"),
        ({"zo_eps": "vision=1e-3,text=1e-2"}, "zo_eps='vision=1e-3,text=1e-2': expected one value, or one for each"),
        ({"zo_queries": "vision=2,language"}, "zo_queries='vision=2,language': expected one value"),
        ({"zo_estimator": "fzoo", "zo_queries": {"vision": 2}}, r"zo_queries \(language\)=1: zo_estimator='fzoo'"),
        ({"zo_learning_rate": True}, "zo_learning_rate=True: expected a number"),
        ({"zo_learning_rate": "small"}, "zo_learning_rate='small': expected a number or auto"),
        ({"zo_momentum": 1.0}, "zo_momentum=1.0: expected less than 1"),
        ({"optim": "lomo"}, "steps within the backward pass"),
    ],
)
def test_bad_arguments_are_named_before_anything_else(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **options)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("hop-even", "hop-even"),
        (["hop-even"], "hop-even"),
        (["all"], "all"),
        (["hop-evn"], "hop-evn"),
        ([r"layer\.[0-3]\."], [r"layer\.[0-3]\."]),
        ("2,4", [2, 4]),
        (["2", "4"], [2, 4]),
        ([2, 4], [2, 4]),
        (3, [3]),
        ([r"encoder\.layer\.0"], [r"encoder\.layer\.0"]),
    ],
)
def test_layers_are_read_as_recipes_and_command_lines_write_them(given, expected):
    from hf_zocl.trainer.arguments import parse_layers

    assert parse_layers(given) == expected


class Classifier(nn.Module):
    """A loss with parameters of its own, as sentence-transformers' SoftmaxLoss has."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(1, 1)


class Host(Trainer):
    """A trainer of another project: its optimizer trains its loss as well as its model."""

    def get_optimizer_cls_and_kwargs(self, args, model=None):
        cls, options = super().get_optimizer_cls_and_kwargs(args, model)
        own = [p for p in [*self.model.parameters(), *self.classifier.parameters()] if p.requires_grad]
        return cls, {**options, "optimizer_dict": [{"params": own}]}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = (self.classifier.head(outputs["logits"][:, None])[:, 0] - inputs["labels"]).square().mean()
        return (loss, outputs) if return_outputs else loss


class HostFirst(Host, ZOCLTrainer):
    pass


class HostLast(ZOCLTrainer, Host):
    pass


def hosted(tmp_path, cls, **options):
    torch.manual_seed(1)
    trainer = cls(model=Mlp(), args=arguments(tmp_path, **options), train_dataset=rows())
    trainer.classifier = Classifier()
    return trainer


@pytest.mark.parametrize("cls", [HostFirst, HostLast])
@pytest.mark.parametrize("layers", ["all", "hop-even"])
def test_what_the_host_trains_and_the_model_lacks_is_trained(tmp_path, cls, layers):
    trainer = hosted(tmp_path, cls, zo_layers=layers)
    before = [p.detach().clone() for p in [*trainer.model.parameters(), *trainer.classifier.parameters()]]
    trainer.train()
    after = [*trainer.model.parameters(), *trainer.classifier.parameters()]
    assert [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if torch.equal(a, b)] == []
    assert trainer.replay_log is None  # it would lack the first-order steps
    assert len(trainer.optimizer.optimizer.parts) == 2


def test_what_the_host_trains_goes_on_from_a_checkpoint(tmp_path):
    options = {"zo_layers": "all", "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = hosted(tmp_path, HostFirst, **options)
    whole.train()
    again = hosted(tmp_path, HostFirst, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "trainer" / "checkpoint-2"))
    assert torch.equal(whole.classifier.head.weight, again.classifier.head.weight)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True))


class AddsGroup(ZOCLTrainer):
    """Adds its loss's parameters to whatever optimizer there is."""

    def create_optimizer(self, model=None):
        optimizer = super().create_optimizer(model)
        optimizer.add_param_group({"params": list(self.classifier.parameters())})
        return optimizer

    compute_loss = Host.compute_loss


def test_a_group_that_is_added_to_the_optimizer_is_trained_or_refused(tmp_path):
    trainer = hosted(tmp_path, AddsGroup, zo_layers=[1])
    before = trainer.classifier.head.weight.detach().clone()
    trainer.train()
    assert not torch.equal(trainer.classifier.head.weight, before)
    with pytest.raises(ValueError, match="All parameters are zeroth-order: no other group can be added"):
        hosted(tmp_path, AddsGroup, zo_layers="all").train()


def test_a_model_with_nothing_to_train_is_evaluated_and_predicted_with(tmp_path):
    frozen = Mlp().requires_grad_(False)
    trainer, plain = (
        cls(model=frozen, args=arguments(tmp_path, cls=args), eval_dataset=rows())
        for cls, args in ((ZOCLTrainer, ZOCLTrainingArguments), (Trainer, TrainingArguments))
    )
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    assert (trainer.predict(rows()).predictions == plain.predict(rows()).predictions).all()
    trainer.train_dataset = rows()
    with pytest.raises(ValueError, match="The model has no parameter that requires a gradient"):
        trainer.train()


@pytest.mark.parametrize("cls", [ZOCLTrainer, HostLast])
def test_the_trainers_arguments_are_taken_by_position(tmp_path, cls):
    collator, callback = default_data_collator, TrainerCallback()
    given = (collator, rows(), rows(8), None, None, None, None, [callback])
    trainer = cls(Mlp(), arguments(tmp_path), *given)
    assert trainer.data_collator is collator
    assert (len(trainer.train_dataset), len(trainer.eval_dataset)) == (32, 8)
    assert callback in trainer.callback_handler.callbacks
    with pytest.raises(TypeError, match="data_collator"):
        cls(Mlp(), arguments(tmp_path), collator, data_collator=collator)


@pytest.mark.parametrize("layers", ["all", "hop-even"])
def test_a_callback_of_the_constructor_sees_the_estimate(tmp_path, layers):
    model = Mlp()
    watch = Watch(lambda: [p.grad is not None and bool(p.grad.any()) for p in model.parameters()])
    train(tmp_path, model, data=rows(), callbacks=[watch], zo_layers=layers)
    assert watch.seen == [[True] * 4] * 2


@dataclass
class HostArguments(TrainingArguments):
    """Other defaults than the Trainer's, as TRL's have."""

    learning_rate: float = 2e-5
    logging_steps: float = 10
    temperature: float = 0.5


@dataclass
class ZOFirst(ZeroOrderArguments, HostArguments):
    pass


@dataclass
class HostArgumentsFirst(HostArguments, ZeroOrderArguments):
    pass


@dataclass
class Own(ZeroOrderArguments, HostArguments):
    logging_steps: float = 3


def test_another_bases_defaults_hold_in_either_order(tmp_path):
    given = {"output_dir": str(tmp_path), "report_to": "none"}
    plain, ours = HostArguments(**given).to_dict(), ZOCLTrainingArguments(**given).to_dict()
    for cls in (ZOFirst, HostArgumentsFirst):
        both = cls(**given).to_dict()
        assert {name for name in plain if both[name] != plain[name]} == set()
        assert {name: both[name] for name in ours if name not in plain} == {
            name: ours[name] for name in ours if name not in plain
        }
    assert (Own(**given).logging_steps, Own(**given).learning_rate) == (3, 2e-5)
    assert ZOFirst(**given, learning_rate=0.5).learning_rate == 0.5


@pytest.mark.parametrize("cls", [ZOFirst, HostArgumentsFirst, Own])
def test_zeroth_order_arguments_are_checked_in_either_order(tmp_path, cls):
    assert cls(str(tmp_path), zo_layers="2,4", zo_queries="vision=2,language=16").zo_layers == [2, 4]
    with pytest.raises(ValueError, match="zo_branch='left' is unknown"):
        cls(str(tmp_path), zo_branch="left")


class CountGraphs(TrainerCallback):
    """How many graphs torch.compile has made by the end of every step."""

    def __init__(self):
        self.graphs: list[int] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(
    ("how", "layers"),
    [("torch_compile", "hop-even"), ("torch_compile", "all"), ("layers", "hop-even"), ("layers", "all")],
)
@pytest.mark.slow
def test_a_compiled_model_is_not_compiled_again_when_weights_are_perturbed(tmp_path, how, layers):
    options = {"zo_layers": layers, "zo_queries": 2, "max_steps": 4}
    eager = training_logs(train(tmp_path, **options))
    count, model = CountGraphs(), mini_clip_classifier()
    if how == "layers":
        clip = model.clip.base_model.model
        for layer in [*clip.vision_model.encoder.layers, *clip.text_model.encoder.layers]:
            layer.compile(backend="eager")
    else:
        options |= {"torch_compile": True, "torch_compile_backend": "eager"}
    compiled = training_logs(train(tmp_path, model, callbacks=[count], **options))
    assert len(set(count.graphs[1:])) == 1
    assert count.graphs[0] > 0 or layers == "all"
    assert [e["loss"] for e in compiled] == pytest.approx([e["loss"] for e in eager], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layers", ["hop-even", "all"])
def test_bf16_autocast_holds_for_every_pass_of_a_step(tmp_path, unmeasured, layers):
    seen, model = set(), mini_clip_classifier()
    for tower in (model.clip.base_model.model.vision_model, model.clip.base_model.model.text_model):
        tower.encoder.layers[1].mlp.fc1.register_forward_hook(lambda m, i, output: seen.add(output.dtype))

    class SeeAnew(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            seen.clear()  # of the first step, where shortcuts are checked in float32

    options = {"zo_layers": layers, "zo_queries": 3, "bf16": True, "use_cpu": True}
    log = training_logs(train(tmp_path, model, callbacks=[SeeAnew()], **options))[0]
    assert seen == {torch.bfloat16}
    full = training_logs(train(tmp_path, **{**options, "bf16": False}))[0]
    assert log["loss"] == pytest.approx(full["loss"], rel=0.02)
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
