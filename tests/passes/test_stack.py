"""In a model that is one stack, layers below the first perturbed one run once a step."""

import re
from collections import Counter

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import hf_zocl.trainer
from hf_zocl import ZOCLTrainer, ZOCLTrainingArguments
from hf_zocl.passes import ForwardState, PlainEvaluation, StackEvaluation, TaskAware, TowerPlan
from hf_zocl.zo import LayerAssignment, ZOEstimator
from tests.helpers import slow_but_for


TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}


def make(kind: str, dropout: float = 0.2) -> tuple[nn.Module, dict]:
    torch.manual_seed(0)
    ids = torch.randint(1, 30, (3, 7))
    if kind == "llama":
        config = LlamaConfig(**TINY, vocab_size=30, attention_dropout=dropout)
        return LlamaForCausalLM(config).double().train(), {"input_ids": ids, "labels": ids}
    if kind == "bert":
        config = BertConfig(**TINY, vocab_size=30, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
        labels = torch.tensor([0, 1, 1])
        return BertForSequenceClassification(config).double().train(), {"input_ids": ids, "labels": labels}
    if kind == "vit":
        config = ViTConfig(**TINY, image_size=8, patch_size=4, hidden_dropout_prob=dropout)
        inputs = {"pixel_values": torch.randn(3, 3, 8, 8).double(), "labels": torch.tensor([0, 1, 1])}
        return ViTForImageClassification(config).double().train(), inputs
    config = T5Config(
        vocab_size=30, d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2, dropout_rate=dropout,
        decoder_start_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).double().train(), {"input_ids": ids, "labels": ids}


def losses(model, inputs, layers, evaluate, estimator="one-sided", streams=False, seed=7):
    """Those of an estimate, their differences, the random state left behind, and how often each layer ran."""
    groups = LayerAssignment("dual", layers).split(model, eps=1e-2).zo
    estimates = ZOEstimator(groups, estimator, queries=3, model=model if streams else None)
    ran: Counter[str] = Counter()
    handles = []
    for name, module in model.named_modules():
        if re.search(r"(layers?|block)\.\d+$", name):
            first = module.attention if hasattr(module, "attention") else next(module.children())
            handles.append(first.register_forward_pre_hook(lambda *_, name=name: ran.update([name])))
    torch.manual_seed(seed)

    @torch.no_grad()
    def forward():
        return model(**inputs).loss

    evaluation = evaluate(estimates, forward, ForwardState(torch.device("cpu"), model.buffers()))
    found = []
    original = evaluation.losses
    evaluation.losses = lambda points: found.extend(new := original(points)) or new
    ran.clear()
    (differences,) = estimates.estimate(evaluation, step=2, learning_rate=1e-2).differences.values()
    evaluation.close()
    for handle in handles:
        handle.remove()
    return torch.stack(found), differences, torch.get_rng_state(), ran


def plain(estimates, forward, before):
    return PlainEvaluation(forward, before)


def planned(model, plans=None, checked=False):
    def make(estimates, forward, before):
        plan = TowerPlan(model, estimates.perturbations.values())
        if plans is not None:
            plans.append(plan)
        return StackEvaluation(plan, forward, before, None if checked else plan.shortcuts)

    return make


def assert_same(model, inputs, layers, evaluate, **options) -> Counter:
    expected, differences, state, _ = losses(model, inputs, layers, plain, **options)
    found, own_differences, own_state, ran = losses(model, inputs, layers, evaluate, **options)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(own_differences, differences, rtol=1e-6, atol=0)
    assert len(set(differences.tolist())) == len(differences)
    assert torch.equal(state, own_state)
    return ran


@pytest.mark.parametrize("kind", ["llama", "bert", "vit"])
@pytest.mark.parametrize("estimator", ["one-sided", "two-sided", "forward-gradient"])
def test_losses_and_masks_are_those_of_plain_passes(kind, estimator):
    if estimator == "forward-gradient" and kind == "llama":
        pytest.skip("covered by the others")
    model, inputs = make(kind)
    ran = assert_same(model, inputs, "suffix-1", planned(model), estimator=estimator)
    counts = sorted(ran.values())
    assert counts[:3] == [1, 1, 1] and counts[3] == len(
        losses(model, inputs, "suffix-1", plain, estimator=estimator)[0]
    )


@pytest.mark.parametrize("layers", [[3, 4], [2], "hop-even", "suffix-3"])
def test_any_first_layer_will_do(layers):
    model, inputs = make("llama")
    ran = assert_same(model, inputs, layers, planned(model))
    assert min(ran.values()) == 1 < max(ran.values())


def test_the_self_check_lets_it_pass_and_lets_no_fault_pass(caplog, monkeypatch):
    model, inputs = make("bert")
    plans: list[TowerPlan] = []
    assert_same(model, inputs, "suffix-2", planned(model, plans, checked=True))
    assert plans[0].used == {("the reuse of layers", None)}
    original = StackEvaluation._replay
    monkeypatch.setattr(StackEvaluation, "_replay", lambda *args, **kwargs: original(*args, **kwargs) * (1 + 1e-2))
    assert_same(model, inputs, "suffix-2", planned(model, plans, checked=True))
    assert not plans[1].used and plans[1].stack is None
    assert "Switched off: the reuse of layers, because" in caplog.text


def test_a_loss_that_reads_the_states_below_is_seen(caplog):
    model, inputs = make("llama", dropout=0.0)
    original = model.forward

    def forward(**kwargs):
        output = original(**kwargs, output_hidden_states=True)
        output.loss = output.loss * (1 + output.hidden_states[1].square().mean()) + output.hidden_states[2].sum()
        return output

    model.forward = forward
    assert_same(model, inputs, "suffix-1", planned(model, checked=True))
    assert "Switched off" in caplog.text


def test_both_stacks_of_an_encoder_decoder_run_in_full():
    model, _ = make("t5")
    groups = LayerAssignment("dual", "suffix-1").split(model).zo
    assert TowerPlan(model, ZOEstimator(groups).perturbations.values()).stack is None


def test_a_decoder_alone_is_a_stack():
    model, inputs = make("t5")
    layers = [r"decoder\.block\.2\."]
    assert_same(model, inputs, layers, planned(model))


def test_what_lies_outside_the_layers_moves_all_of_them():
    model, _ = make("llama")
    groups = LayerAssignment("dual", "all").split(model).zo
    assert TowerPlan(model, ZOEstimator(groups).perturbations.values()).stack is None


def test_a_stack_that_runs_otherwise_gets_full_passes():
    model, inputs = make("bert")
    layers = model.bert.encoder.layer
    original = layers[2].forward
    layers[2].forward = lambda hidden, *args, **kwargs: original(layers[0](hidden, *args, **kwargs), *args, **kwargs)
    ran = assert_same(model, inputs, "suffix-1", planned(model))
    assert ran["bert.encoder.layer.0"] == 2 * 4


def test_layers_left_out_at_random_are_the_same_in_all_passes():
    """LayerDrop draws before every layer, the layers below included."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "vocab_size": 30}
    model = OPTForCausalLM(OPTConfig(**shape, max_position_embeddings=16, layerdrop=0.4)).double().train()
    ids, replayed = torch.randint(3, 30, (3, 7)), 0
    for seed in range(12):
        given = model, {"input_ids": ids, "labels": ids}, "suffix-2"
        expected, _, state, _ = losses(*given, plain, seed=seed)
        found, _, own_state, ran = losses(*given, planned(model), seed=seed)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
        assert torch.equal(state, own_state)
        replayed += len(found) > 1 == ran["model.decoder.layers.0"]
    assert replayed > 2


def test_streamed_layers_run_from_the_first_perturbed_one_on():
    model, inputs = make("llama")
    ran = assert_same(model, inputs, "suffix-2", planned(model), streams=True)
    assert sorted(ran.values())[:2] == [2, 2]  # one more is watched for what it reads


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layers", slow_but_for(["suffix-2"], [["lora"], "suffix-2"]))
def test_the_trainer_takes_the_steps_that_plain_passes_give(tmp_path, monkeypatch, layers, checkpointing):
    def weights(shortcut: bool) -> torch.Tensor:
        model, inputs = make("llama")
        targets = {"r": 2, "target_modules": ["q_proj"], "layers_to_transform": [2, 3]}
        model = get_peft_model(model.float(), LoraConfig(**targets)) if layers == ["lora"] else model.float()
        used = []
        if shortcut:
            forward = StackEvaluation._from_the_first_perturbed_layer
            counted = lambda self: used.append(1) or forward(self)  # noqa: E731
            monkeypatch.setattr(StackEvaluation, "_from_the_first_perturbed_layer", counted)
        else:
            monkeypatch.setattr(hf_zocl.passes.plan, "find_stack", lambda *_: None)
        args = ZOCLTrainingArguments(
            output_dir=str(tmp_path), zo_branch="dual", zo_layers=layers, zo_estimator="one-sided", zo_queries=2,
            zo_eps=1e-2, zo_learning_rate=1e-2, max_steps=2, report_to="none", save_strategy="no", disable_tqdm=True,
            gradient_checkpointing=checkpointing, per_device_train_batch_size=3, seed=0,
        )  # fmt: skip
        data = [{"input_ids": row, "labels": row} for row in inputs["input_ids"]]
        ZOCLTrainer(model=model, args=args, train_dataset=data).train()
        monkeypatch.undo()
        assert checkpointing or bool(used) == shortcut
        return nn.utils.parameters_to_vector(model.parameters()).detach()

    torch.testing.assert_close(weights(True), weights(False), rtol=0, atol=1e-5)


class Named(nn.Sequential):
    """A sequence that is not made of its modules, as a `SentenceTransformer` is not."""

    def __init__(self, width: int):
        super().__init__(*(nn.Linear(width, width) for _ in range(4)))


class Summed(nn.Module):
    """The states of the layers as a loss; from the second pass at θ on, also a penalty on the weights of one."""

    def __init__(self, layers: nn.Module, **attributes):
        super().__init__()
        self.layers, self.is_penalised = layers, False
        vars(self).update(attributes)

    def forward(self, x):
        inner = x
        for layer in self.layers:
            inner = layer(inner).tanh()
            if self.is_penalised:
                x = x + inner  # states that were left out
        return inner.square().mean() + x.square().mean() + self.layers[3].weight.square().sum() * self.is_penalised


def test_a_sequence_of_its_own_kind_is_a_stack_like_any_other():
    torch.manual_seed(0)
    model = Summed(Named(6))
    groups = LayerAssignment("dual", ["layers.2", "layers.3"]).split(model, 1e-2).zo
    perturbations = ZOEstimator(groups).perturbations.values()
    assert TowerPlan(model, perturbations).stack.below == tuple(list(model.layers)[:2])


class Coupled(TaskAware, Summed):
    couples_towers = True


@pytest.mark.parametrize("streams", [False, True])
def test_a_loss_that_reads_inner_states_and_weights_later_is_right_where_the_model_says_so(streams):
    torch.manual_seed(0)
    model, x = Coupled(Named(6)).double(), torch.randn(3, 6).double()
    groups = LayerAssignment("dual", ["layers.2", "layers.3"]).split(model, 1e-2).zo

    def estimates(streamed: bool, evaluate) -> list[torch.Tensor]:
        found = []
        estimator = ZOEstimator(groups, queries=3, model=model if streamed else None)
        plan = TowerPlan(model, estimator.perturbations.values())
        for step, model.is_penalised in enumerate((False, True)):
            before = ForwardState(torch.device("cpu"), plan.buffers)
            losses = estimator.estimate(evaluate(plan, lambda: model(x), before), step).differences[None]
            found.append(losses)
        assert plan.stack is None
        return found

    def by_plan(plan, forward, before):
        return PlainEvaluation(forward, before) if plan.stack is None else StackEvaluation(plan, forward, before)

    expected = [estimates(False, lambda plan, forward, before: PlainEvaluation(forward, before))]
    if streams:  # a streamed direction is another for every layer
        model.is_penalised = False
        whole = ZOEstimator(groups, queries=3, model=model)
        for perturbation in whole.perturbations.values():
            perturbation.move_for_whole_passes()
        expected = [[]]
        for step, model.is_penalised in enumerate((False, True)):
            points = [
                {p: p.query(seed)} for p in whole.perturbations.values() for seed in whole.direction_seeds(step)[None]
            ]
            base, *losses = PlainEvaluation(lambda: model(x)).losses([{}, *points])
            expected[0].append(torch.stack(losses) - base)
    for mine, other in zip(estimates(streams, by_plan), expected[0], strict=True):
        torch.testing.assert_close(mine, other)
