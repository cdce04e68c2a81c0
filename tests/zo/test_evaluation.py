"""Every shortcut gives the losses and the gradients of the plain forward pass."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from hf_zocl.zo import (
    ForwardState,
    LayerAssignment,
    PlainEvaluation,
    TowerEvaluation,
    TowerPlan,
    ZOEstimator,
    find_towers,
    stacked_linear,
)
from tests.helpers import image_batch, mini_clip_classifier


ASSIGNMENTS = [
    (branch, layers)
    for branch in ("dual", "vision", "language")
    for layers in ("all", "hop-odd", "hop-even", "prefix-2", "suffix-2")
]
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}


def randomise(model: nn.Module) -> nn.Module:
    """LoRA's B is zero at first, which would hide what A does; float64 leaves the differences of losses exact."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model.double().train()


def classifier(dropout: float = 0.0) -> tuple[nn.Module, dict]:
    batch = image_batch(6)
    return randomise(mini_clip_classifier(lora_dropout=dropout)), {
        **batch,
        "pixel_values": batch["pixel_values"].double(),
    }


def dual_encoder(kind: str) -> tuple[nn.Module, dict]:
    """A `CLIPModel` or a `SiglipModel` with its own contrastive loss over a batch of pairs."""
    torch.manual_seed(0)
    text = {**TINY, "vocab_size": 50, "max_position_embeddings": 8, "eos_token_id": 49, "pad_token_id": 49}
    vision = {**TINY, "image_size": 16, "patch_size": 8}
    if kind == "clip":
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    else:
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "fc1"]))
    ids = torch.randint(0, 49, (6, 8), generator=torch.Generator().manual_seed(3))
    ids[:, -1] = 49
    images = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(4)).double()
    return randomise(model), {"input_ids": ids, "pixel_values": images, "return_loss": True}


def gradients(model: nn.Module, inputs: dict, make_evaluation, branch: str, layers: str, **options):
    """The estimate's losses and gradient, and the random state that it leaves behind."""
    groups = LayerAssignment(branch, layers).split(model, eps=1e-2).zo
    estimator = ZOEstimator(groups, **options)
    torch.manual_seed(7)

    def forward():
        with torch.no_grad():
            return model(**inputs).loss

    evaluation = make_evaluation(model, estimator, forward, ForwardState(torch.device("cpu"), model.buffers()))
    losses = []
    original = evaluation.losses
    evaluation.losses = lambda points: losses.extend(result := original(points)) or result
    estimate = estimator.estimate(evaluation, step=3, learning_rate=1e-2)
    evaluation.close()
    estimator.write([(estimate, 1.0)])
    grads = [parameter.grad.clone() for group in groups for parameter in group.parameters]
    return torch.stack(losses), grads, torch.get_rng_state()


def plain(model, estimator, forward, before):
    return PlainEvaluation(forward, before)


def towers(**options):
    def make(model, estimator, forward, before):
        plan = TowerPlan(model, estimator.perturbations.values())
        assert set(plan.towers) == {"vision", "language"}
        return TowerEvaluation(plan, forward, before, **options)

    return make


def packed(model, estimator, forward, before):
    """As `towers`, after two steps: by then the prompts are known to stay the same."""
    plan = TowerPlan(model, estimator.perturbations.values())
    state = torch.get_rng_state()
    for step in (1, 2):
        estimator.estimate(TowerEvaluation(plan, forward, before), step=step, learning_rate=1e-2)
    torch.set_rng_state(state)
    return TowerEvaluation(plan, forward, before)


def assert_same(model, inputs, branch, layers, make_evaluation=None, **options):
    expected = gradients(model, inputs, plain, branch, layers, **options)
    found = gradients(model, inputs, make_evaluation or towers(), branch, layers, **options)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-9, atol=0)
    for mine, theirs in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)
    assert torch.equal(found[2], expected[2])


@pytest.mark.parametrize(("branch", "layers"), ASSIGNMENTS)
@pytest.mark.parametrize("estimator", ["one-sided", "two-sided"])
def test_towers_give_the_plain_losses_and_gradients(branch, layers, estimator):
    model, inputs = classifier()
    assert_same(model, inputs, branch, layers, estimator=estimator, queries=3)


@pytest.mark.parametrize("estimator", ["conservative", "fzoo"])
def test_so_do_the_other_estimators(estimator):
    model, inputs = classifier()
    assert_same(model, inputs, "dual", "hop-even", estimator=estimator, queries=2)


@pytest.mark.parametrize("estimator", ["one-sided", "two-sided"])
@pytest.mark.parametrize(("branch", "layers"), [("dual", "all"), ("vision", "suffix-2"), ("language", "hop-even")])
def test_dropout_masks_are_those_of_the_plain_passes(branch, layers, estimator):
    model, inputs = classifier(dropout=0.3)
    assert_same(model, inputs, branch, layers, estimator=estimator, queries=2)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize(("branch", "layers"), [("dual", "all"), ("language", "hop-even"), ("vision", "suffix-2")])
def test_dual_encoders_of_transformers_work_by_structure(kind, branch, layers):
    model, inputs = dual_encoder(kind)
    assert_same(model, inputs, branch, layers, queries=3)


MANY_CLASSES = [f"{size}{animal}" for animal in ("cat", "great white shark", "dog") for size in ("", "large ", "old ")]


@pytest.mark.parametrize("estimator", ["one-sided", "two-sided"])
@pytest.mark.parametrize("layers", ["all", "hop-even", "suffix-2"])
def test_packed_prompts_give_the_plain_losses_and_gradients(estimator, layers, monkeypatch):
    monkeypatch.setattr("hf_zocl.zo.packing.MAX_ROW_TOKENS", 24)
    model, inputs = classifier()
    model.set_classes(MANY_CLASSES)
    rows = count_calls(model.clip.base_model.model.text_model.encoder.layers[-1])
    assert_same(model, inputs, "language", layers, packed, estimator=estimator, queries=3)
    assert 1 < min(rows) < len(MANY_CLASSES)


def test_prompts_are_not_packed_where_a_token_sees_those_after_it():
    model, inputs = dual_encoder("siglip")
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["input_ids"][:, :6] = 7
    assert_same(model, inputs, "language", "all", packed, queries=2)


def test_prompts_that_change_from_step_to_step_are_not_packed():
    model, inputs = classifier()
    plans = []

    def make(model, estimator, forward, before):
        plans.append(TowerPlan(model, estimator.perturbations.values()))
        for step in (1, 2):
            model.set_classes(MANY_CLASSES)
            estimator.estimate(TowerEvaluation(plans[0], forward, before), step=step)
        model.set_classes(MANY_CLASSES)
        return TowerEvaluation(plans[0], forward, before)

    model.set_classes(MANY_CLASSES)
    assert_same(model, inputs, "language", "all", make, queries=2)
    assert plans[0].packing._prompts is None


@pytest.mark.parametrize(
    "options", [{"batch_candidates": False}, {"reuse_layers": False}, {"pack_prompts": False}], ids=str
)
def test_every_shortcut_can_be_left_out(options):
    model, inputs = classifier()
    assert_same(model, inputs, "dual", "suffix-2", towers(**options), queries=3)


def test_parameters_outside_the_towers_are_perturbed_with_their_branch():
    model, inputs = dual_encoder("clip")
    model.base_model.model.text_projection.weight.requires_grad_(True)
    assert_same(model, inputs, "dual", "all", queries=2)


def count_calls(module: nn.Module) -> list[int]:
    """Batch sizes with which a module is called."""
    calls = []
    module.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    return calls


def test_language_candidates_go_through_their_tower_as_one_batch_and_leave_the_other_alone():
    model, inputs = classifier()
    clip = model.clip.base_model.model
    text, vision = (count_calls(tower.encoder.layers[-1]) for tower in (clip.text_model, clip.vision_model))
    gradients(model, inputs, towers(), "language", "all", queries=8)
    assert (text, vision) == ([3, 3 * 8], [6])


def test_layers_below_the_first_perturbed_one_run_once():
    model, inputs = classifier()
    layers = model.clip.base_model.model.vision_model.encoder.layers
    below, above = count_calls(layers[3]), count_calls(layers[4])
    gradients(model, inputs, towers(), "vision", "suffix-2", queries=4)
    assert (sum(below), sum(above)) == (6, 6 + 4 * 6)


def test_two_sided_dual_needs_two_passes_a_tower():
    model, inputs = classifier()
    clip = model.clip.base_model.model
    text, vision = (count_calls(tower.encoder.layers[0]) for tower in (clip.text_model, clip.vision_model))
    gradients(model, inputs, towers(), "dual", "all", estimator="two-sided")
    assert (sum(text) // 3, sum(vision) // 6) == (2, 2)


def test_the_model_is_as_it_was_afterwards():
    model, inputs = classifier()
    before, names = {n: p.clone() for n, p in model.named_parameters()}, [vars(m).keys() for m in model.modules()]
    gradients(model, inputs, towers(), "dual", "suffix-2", queries=4)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert names == [vars(m).keys() for m in model.modules()]


def test_the_model_is_as_it_was_when_a_pass_raises():
    model, inputs = classifier()
    layer = model.clip.base_model.model.text_model.encoder.layers[2]
    before, names = {n: p.clone() for n, p in model.named_parameters()}, [set(vars(m)) for m in model.modules()]

    def fail(module, args):
        if len(args[0]) > 3:
            raise RuntimeError("out of memory")

    handle = layer.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        gradients(model, inputs, towers(), "dual", "all", queries=4)
    handle.remove()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert names == [set(vars(m)) for m in model.modules()]


def test_a_model_without_two_towers_has_none():
    assert find_towers(nn.Sequential(nn.Linear(2, 2))) == {}
    model, _ = dual_encoder("siglip")
    assert {name: len(tower.layers) for name, tower in find_towers(model).items()} == {"vision": 4, "language": 4}


@pytest.mark.parametrize("has_bias", [False, True])
def test_a_stacked_linear_is_each_candidates_own(has_bias):
    weight, bias = torch.randn(3, 5, 4), torch.randn(3, 5) if has_bias else None
    inputs = torch.randn(6, 7, 4)
    expected = [
        nn.functional.linear(rows, weight[i], bias[i] if has_bias else None) for i, rows in enumerate(inputs.chunk(3))
    ]
    torch.testing.assert_close(stacked_linear(inputs, weight, bias), torch.cat(expected))
