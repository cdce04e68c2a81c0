"""Every shortcut gives the losses and the gradients of the plain forward pass."""

import random
import re
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BertConfig,
    CLIPConfig,
    CLIPModel,
    SiglipConfig,
    SiglipModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    ViTConfig,
)

from hf_zocl.models import CLIPClassifierOutput
from hf_zocl.passes import (
    ForwardState,
    PlainEvaluation,
    TowerEvaluation,
    TowerPlan,
    candidates,
    find_towers,
    stacked_linear,
)
from hf_zocl.passes import prompts as packing
from hf_zocl.zo import ESTIMATORS, LayerAssignment, ZOEstimator
from tests.helpers import image_batch, mini_clip_classifier, slow_but_for


ASSIGNMENTS = [
    (branch, layers)
    for branch in ("dual", "vision", "language")
    for layers in ("all", "hop-odd", "hop-even", "prefix-2", "suffix-2")
]
MANY_CLASSES = [f"{size}{animal}" for animal in ("cat", "great white shark", "dog") for size in ("", "large ", "old ")]
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}


def randomise(model: nn.Module) -> nn.Module:
    """LoRA's B is zero at first, which would hide what A does; float64 leaves the differences of losses exact."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model.double().train()


def classifier(**adapter) -> tuple[nn.Module, dict]:
    batch = image_batch(6)
    inputs = {**batch, "pixel_values": batch["pixel_values"].double()}
    return randomise(mini_clip_classifier(**adapter)), inputs


def dual_encoder(kind: str) -> tuple[nn.Module, dict]:
    """A `CLIPModel`, a `SiglipModel` or a pair of others, with its own contrastive loss over a batch of pairs."""
    torch.manual_seed(0)
    text = {**TINY, "vocab_size": 50, "max_position_embeddings": 8, "eos_token_id": 49, "pad_token_id": 49}
    vision = {**TINY, "image_size": 16, "patch_size": 8}
    if kind == "clip":
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    elif kind == "siglip":
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
    else:
        configs = ViTConfig(**vision), BertConfig(**{**text, "pad_token_id": 0})
        model = VisionTextDualEncoderModel(
            VisionTextDualEncoderConfig.from_vision_text_configs(*configs, projection_dim=16)
        )
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "fc1", "query"]))
    ids = torch.randint(0, 49, (6, 8), generator=torch.Generator().manual_seed(3))
    ids[:, -1] = 49
    images = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(4)).double()
    return randomise(model), {"input_ids": ids, "pixel_values": images, "return_loss": True}


def gradients(model: nn.Module, inputs: dict, make_evaluation, branch: str, layers: str, eps=1e-2, **options):
    """The estimate's losses and gradient, and the random state that it leaves behind."""
    groups = LayerAssignment(branch, layers).split(model, eps=eps).zo
    estimator = ZOEstimator(groups, **options)
    torch.manual_seed(7)

    def forward():
        with torch.no_grad():
            return model(**inputs).loss

    evaluation = make_evaluation(model, estimator, forward, ForwardState(torch.device("cpu"), model.buffers()))
    losses = []
    original = evaluation.losses
    evaluation.losses = lambda *points: losses.extend(result := original(*points)) or result
    estimate = estimator.estimate(evaluation, step=3, learning_rate=1e-2)
    evaluation.close()
    estimator.write([(estimate, 1.0)])
    grads = [parameter.grad.clone() for group in groups for parameter in group.parameters]
    return torch.stack(losses), grads, torch.get_rng_state()


def plain(model, estimator, forward, before):
    return PlainEvaluation(forward, before)


def towers(**options):
    """By every shortcut, whatever the self-check would say of it."""

    def make(model, estimator, forward, before):
        plan = TowerPlan(model, estimator.perturbations.values())
        assert set(plan.towers) == {"vision", "language"}
        return TowerEvaluation(plan, forward, before, used=plan.shortcuts, **options)

    return make


def packed(model, estimator, forward, before):
    """As `towers`, after a step: what was packed then is used again."""
    plan = TowerPlan(model, estimator.perturbations.values())
    state = torch.get_rng_state()
    estimator.estimate(TowerEvaluation(plan, forward, before, used=plan.shortcuts), step=1, learning_rate=1e-2)
    torch.set_rng_state(state)
    return TowerEvaluation(plan, forward, before, used=plan.shortcuts)


def checked(model, estimator, forward, before):
    """By the shortcuts that the self-check lets pass, as a training has it."""
    return TowerEvaluation(TowerPlan(model, estimator.perturbations.values()), forward, before)


def assert_same(model, inputs, branch, layers, make_evaluation=None, **options):
    expected = gradients(model, inputs, plain, branch, layers, **options)
    found = gradients(model, inputs, make_evaluation or towers(), branch, layers, **options)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-9, atol=0)
    for mine, theirs in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)
    assert torch.equal(found[2], expected[2])


@pytest.mark.parametrize(
    ("branch", "layers", "estimator"),
    slow_but_for(
        [("dual", "hop-even", "one-sided"), ("vision", "suffix-2", "one-sided"), ("dual", "all", "two-sided")],
        [(*each, estimator) for each in ASSIGNMENTS for estimator in ("one-sided", "two-sided")],
    ),
)
def test_towers_give_the_plain_losses_and_gradients(branch, layers, estimator):
    model, inputs = classifier()
    assert_same(model, inputs, branch, layers, estimator=estimator, queries=3)


QUIET = {"adapter": "moe", "moe_noise": False, "moe_dropout": 0.0}
MOE = {
    "baseline, with noise and dropout": {"adapter": "moe"},
    "without": QUIET,
    "pooled": {**QUIET, "adapter_config": {"router_token": "pooled"}},
    "1 of 3": {**QUIET, "moe_num_experts": 3, "moe_top_k": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", MOE)
@pytest.mark.parametrize(("branch", "layers"), [("dual", "all"), ("language", "hop-even"), ("vision", "suffix-2")])
def test_moe_adapters_give_them_too(kind, branch, layers):
    model, inputs = classifier(**MOE[kind])
    model.set_classes(MANY_CLASSES)
    assert_same(model, inputs, branch, layers, packed, queries=3)


def test_moe_candidates_go_through_the_language_tower_as_one_batch_of_packed_prompts():
    model, inputs = classifier(**QUIET)
    model.set_classes(MANY_CLASSES)
    text = count_calls(model.clip.base_model.model.text_model.encoder.layers[-1])
    gradients(model, inputs, packed, "language", "all", queries=6)
    assert text[-1] == 6


@pytest.mark.parametrize("layers", [["experts.0"], ["routers"]])
def test_experts_that_are_partly_perturbed_go_one_by_one(layers):
    model, inputs = classifier(**QUIET)
    assert_same(model, inputs, "language", layers, queries=3)


@pytest.mark.parametrize("estimator", slow_but_for(["fzoo"], ["conservative", "fzoo", "forward-gradient"]))
def test_so_do_the_other_estimators(estimator):
    model, inputs = classifier()
    assert_same(model, inputs, "dual", "hop-even", estimator=estimator, queries=2)


@pytest.mark.parametrize("estimator", slow_but_for(["one-sided"], ["one-sided", "two-sided"]))
@pytest.mark.parametrize(("branch", "layers"), [("dual", "all"), ("vision", "suffix-2"), ("language", "hop-even")])
def test_dropout_masks_are_those_of_the_plain_passes(branch, layers, estimator):
    model, inputs = classifier(lora_dropout=0.3)
    assert_same(model, inputs, branch, layers, estimator=estimator, queries=2)


@pytest.mark.parametrize("adapter", slow_but_for([{"lora_dropout": 0.3}], [{"adapter": "moe"}, {"lora_dropout": 0.3}]))
def test_candidates_side_by_side_are_under_the_masks_and_noise_of_one(adapter, monkeypatch):
    model, inputs = classifier(**adapter)
    rows = count_calls(model.clip.base_model.model.text_model.encoder.layers[-1])
    assert_same(model, inputs, "language", "all", queries=6)
    assert max(rows) == 3 * 6
    # The comparison can fail: rows that draw for themselves have other masks.
    monkeypatch.setattr(
        candidates.SharedDraws, "__torch_dispatch__", lambda self, func, _, args, kwargs: func(*args, **kwargs)
    )
    with pytest.raises(AssertionError):
        assert_same(model, inputs, "language", "all", queries=6)


def test_draws_that_candidates_cannot_share_leave_them_one_by_one(caplog):
    model, inputs = classifier(lora_dropout=0.3)
    layer = model.clip.base_model.model.text_model.encoder.layers[-1]
    layer.register_forward_hook(lambda _, args, output: output + 0.01 * torch.rand(output.shape[-1]).to(output))
    assert_same(model, inputs, "language", "all", checked, queries=3)
    assert switched_off(caplog) == {"candidates side by side (language tower)"}
    assert "cannot share" in caplog.text


@pytest.mark.parametrize("kind", ["clip", "siglip", "vit and bert"])
@pytest.mark.parametrize(("branch", "layers"), [("dual", "all"), ("language", "hop-even"), ("vision", "suffix-2")])
def test_dual_encoders_of_transformers_work_by_structure(kind, branch, layers):
    model, inputs = dual_encoder(kind)
    assert_same(model, inputs, branch, layers, queries=3)


@pytest.mark.parametrize("estimator", slow_but_for(["one-sided"], ["one-sided", "two-sided"]))
@pytest.mark.parametrize("layers", ["all", "hop-even", "suffix-2"])
def test_packed_prompts_give_the_plain_losses_and_gradients(estimator, layers, monkeypatch):
    monkeypatch.setattr("hf_zocl.passes.prompts.MAX_ROW_TOKENS", 24)
    model, inputs = classifier()
    model.set_classes(MANY_CLASSES)
    rows = count_calls(model.clip.base_model.model.text_model.encoder.layers[-1])
    assert_same(model, inputs, "language", layers, packed, estimator=estimator, queries=3)
    # At most six candidates side by side, each of three rows: prompts as they are would be nine.
    assert len(MANY_CLASSES) <= max(rows) <= 6 * 3


def switched_off(caplog) -> set[str]:
    """The shortcuts that a warning named."""
    found = [re.match("Switched off: (.*?), because ", record.message) for record in caplog.records]
    return {match[1] for match in found if match}


def test_prompts_are_not_packed_where_a_token_sees_those_after_it(caplog):
    model, inputs = dual_encoder("siglip")
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["input_ids"][:, :6] = 7
    for name in ("input_ids", "attention_mask"):
        model.register_buffer(name, inputs[name], persistent=False)
    with pytest.raises(AssertionError):
        assert_same(model, inputs, "language", "all", packed, queries=2)
    assert_same(model, inputs, "language", "all", checked, queries=2)
    assert switched_off(caplog) == {"the packing of prompts (language tower)"}


def test_prompts_are_packed_from_the_first_step_on():
    """Else a run that is resumed would round otherwise in its first step than one that never stopped."""
    model, inputs = classifier()
    model.set_classes(MANY_CLASSES)
    first = gradients(model, inputs, towers(), "language", "all", queries=3)
    later = gradients(model, inputs, packed, "language", "all", queries=3)
    assert torch.equal(first[0], later[0])
    assert all(map(torch.equal, first[1], later[1]))


def test_prompts_of_a_batch_are_not_packed():
    model, inputs = dual_encoder("clip")
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    plans = []

    def make(model, estimator, forward, before):
        plans.append(TowerPlan(model, estimator.perturbations.values()))
        return TowerEvaluation(plans[0], forward, before, used=plans[0].shortcuts)

    assert_same(model, inputs, "language", "all", make, queries=2)
    assert plans[0].packing._prompts is None


def test_prompts_that_are_set_anew_to_the_same_are_packed_once(monkeypatch):
    model, inputs = classifier()
    model.set_classes(MANY_CLASSES)
    made, pack = [], packing.PackedPrompts
    monkeypatch.setattr(packing, "PackedPrompts", lambda *tensors: made.append(tensors) or pack(*tensors))

    def make(model, estimator, forward, before):
        evaluation = packed(model, estimator, forward, before)
        model.set_classes(MANY_CLASSES)
        return evaluation

    gradients(model, inputs, make, "language", "all", queries=2)
    assert len(made) == 1


@pytest.mark.parametrize(
    "options",
    slow_but_for(
        [{"reuse_layers": False}], [{"batch_candidates": False}, {"reuse_layers": False}, {"pack_prompts": False}]
    ),
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
    gradients(model, inputs, towers(pack_prompts=False), "language", "all", queries=8)
    assert (text, vision) == ([3, 3 * 8], [6])


class OfFeatures(nn.Module):
    """A loss of image features that are there already: one tower alone is run."""

    def __init__(self, classifier: nn.Module):
        super().__init__()
        self.classifier = classifier

    def forward(self, image_embeds, labels):
        logits = self.classifier.logits(image_embeds, self.classifier.encode("language"))
        return CLIPClassifierOutput(loss=F.cross_entropy(logits, labels))


def finer(model, estimator, forward, before):
    """As `towers`, of what another evaluation has recorded."""
    evaluation = towers()(model, estimator, forward, before)
    with evaluation.recording():
        forward()
    return evaluation.finer(forward, nullcontext, ["language"])


@pytest.mark.parametrize("layers", ["all", "suffix-2"])
@pytest.mark.parametrize("make", [towers(), checked, finer])
def test_a_tower_runs_by_every_shortcut_where_the_other_is_not_asked(make, layers):
    model, inputs = classifier()
    inputs["image_embeds"] = model.encode("vision", inputs.pop("pixel_values")).detach()
    model = OfFeatures(model).double().train()
    assert_same(model, inputs, "language", layers, make, queries=4)
    text = count_calls(model.classifier.clip.base_model.model.text_model.encoder.layers[-1])
    gradients(model, inputs, towers(pack_prompts=False), "language", layers, queries=8)
    assert text == [3, 3 * 8]


def test_layers_below_the_first_perturbed_one_run_once():
    model, inputs = classifier()
    layers = model.clip.base_model.model.vision_model.encoder.layers
    below, above = count_calls(layers[3]), count_calls(layers[4])
    gradients(model, inputs, towers(), "vision", "suffix-2", queries=4)
    assert (sum(below), sum(above)) == (6, 6 + 4 * 6)


@pytest.mark.parametrize(
    ("kind", "branch", "behind"),
    [
        ("clip", "vision", "vision_model.post_layernorm"),
        ("clip", "language", "text_model.final_layer_norm"),
        ("siglip", "vision", r"vision_model.(post_layernorm|head)"),
        ("siglip", "language", r"text_model.(final_layer_norm|head)"),
    ],
)
def test_no_layer_runs_again_for_what_stands_behind_all_of_them(kind, branch, behind):
    model, inputs = dual_encoder(kind)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(re.search(behind, name) is not None)
    assert_same(model, inputs, branch, "all", queries=4)
    tower = {"vision": "vision_model", "language": "text_model"}[branch]
    calls = count_calls(model.base_model.model.get_submodule(tower).encoder.layers[-1])
    gradients(model, inputs, towers(), branch, "all", queries=4)
    assert sum(calls) == 6


def test_layers_run_for_what_stands_in_front_of_them():
    model, inputs = dual_encoder("clip")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layrnorm" in name or "post_layernorm" in name)  # the first is CLIP's own spelling
    assert_same(model, inputs, "vision", "all", queries=4)


def test_two_sided_dual_needs_two_passes_a_tower():
    model, inputs = classifier()
    clip = model.clip.base_model.model
    text, vision = (count_calls(tower.encoder.layers[0]) for tower in (clip.text_model, clip.vision_model))
    gradients(model, inputs, towers(pack_prompts=False), "dual", "all", estimator="two-sided")
    assert (sum(text) // 3, sum(vision) // 6) == (2, 2)


class CountSyncs(TorchDispatchMode):
    """How often a value is read back, for which an accelerator's queue would have to run dry."""

    def __init__(self):
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # The random state lies on the CPU always: comparing it waits for nothing.
        is_state = func == torch.ops.aten.equal.default and args[0].dtype == torch.uint8
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default) and not is_state:
            self.reads += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_no_query_waits_for_the_accelerator(estimator):
    """transformers reads the mask of a plain text pass; a step has one such pass, however many queries."""
    model, inputs = classifier()
    model.set_classes(MANY_CLASSES)

    def reads(queries: int) -> int:
        def make(model, estimator, forward, before):
            evaluation = packed(model, estimator, forward, before)
            original = evaluation.losses

            def losses(*asked):
                with count:
                    return original(*asked)

            evaluation.losses = losses
            return evaluation

        count = CountSyncs()
        gradients(model, inputs, make, "dual", "hop-even", estimator=estimator, queries=queries)
        return count.reads

    assert reads(8) == reads(2)


def test_the_model_is_as_it_was_afterwards():
    model, inputs = classifier()
    before, names = {n: p.clone() for n, p in model.named_parameters()}, [vars(m).keys() for m in model.modules()]
    gradients(model, inputs, towers(), "dual", "suffix-2", queries=4)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert names == [vars(m).keys() for m in model.modules()]


def test_the_model_is_as_it_was_when_a_pass_raises():
    model, inputs = classifier()
    layer, calls = model.clip.base_model.model.text_model.encoder.layers[2], []
    before, names = {n: p.clone() for n, p in model.named_parameters()}, [set(vars(m)) for m in model.modules()]

    def fail(module, args):
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("out of memory")

    handle = layer.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        gradients(model, inputs, towers(), "dual", "all", queries=4)
    handle.remove()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert names == [set(vars(m)) for m in model.modules()]


class Head(nn.Module):
    """A model around the classifier, with what a user's own may do before and after the towers."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.dropout = model, nn.Dropout(0.3)

    def forward(self, pixel_values, labels):
        output = self.model(pixel_values * (1 + 0.1 * np.random.rand()), labels)
        logits = self.dropout(output.logits) * (1 + 0.1 * torch.rand(1)) + random.random()
        return CLIPClassifierOutput(loss=nn.functional.cross_entropy(logits, labels))


@pytest.mark.parametrize("dropout", slow_but_for([0.3], [0.0, 0.3]))
def test_what_is_drawn_before_and_after_the_towers_is_drawn_again(dropout):
    model, inputs = classifier(lora_dropout=dropout)
    np.random.seed(0)
    random.seed(0)
    states = []

    def gradients_of(make):
        np.random.seed(0)
        random.seed(0)
        result = gradients(Head(model), inputs, make, "dual", "hop-even", queries=2)
        states.append((np.random.rand(), random.random()))
        return result

    (expected, expected_grads, _), (found, grads, _) = gradients_of(plain), gradients_of(towers())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    for mine, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)
    assert states[0] == states[1]


def test_tied_weights_are_perturbed_wherever_they_are_used():
    model, inputs = classifier()
    layers = model.clip.base_model.model.text_model.encoder.layers
    layers[2].self_attn.q_proj.lora_A.default.weight = layers[0].self_attn.q_proj.lora_A.default.weight
    assert_same(model, inputs, "language", "all", queries=3)


def test_prompts_that_are_overwritten_in_place_are_packed_anew():
    model, inputs = classifier()
    model.set_classes(MANY_CLASSES)

    def make(model, estimator, forward, before):
        evaluation = packed(model, estimator, forward, before)
        model.input_ids.copy_(model.input_ids.flip(0))
        model.attention_mask.copy_(model.attention_mask.flip(0))
        return evaluation

    found = gradients(model, inputs, make, "language", "all", queries=3)
    expected = gradients(model, inputs, plain, "language", "all", queries=3)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-9, atol=0)


def test_a_hook_that_changes_a_towers_output_is_applied_once():
    model, inputs = dual_encoder("clip")

    def squash(module, args, output):
        output.pooler_output = output.pooler_output.tanh()
        return output

    model.base_model.model.text_model.register_forward_hook(squash)
    assert_same(model, inputs, "dual", "all", queries=3)


def test_a_model_that_reads_more_than_pooled_features_takes_full_passes(caplog):
    class ReadsHidden(nn.Module):
        def __init__(self, clip):
            super().__init__()
            self.clip = clip

        def forward(self, pixel_values, input_ids, return_loss):
            states = self.clip.base_model.model.vision_model(pixel_values=pixel_values).last_hidden_state
            text = self.clip.base_model.model.text_model(input_ids=input_ids).pooler_output
            return CLIPClassifierOutput(loss=(states[:, :, 0].mean(dim=1) * text[:, 0]).sum())

    clip, inputs = dual_encoder("clip")
    assert_same(ReadsHidden(clip), inputs, "dual", "all", checked, queries=2)
    assert switched_off(caplog) == {"the reuse of towers"}
    assert "Every loss is a full forward pass" in caplog.text


@pytest.mark.parametrize("estimator", slow_but_for(["one-sided"], ["one-sided", "two-sided", "forward-gradient"]))
@pytest.mark.parametrize("branch", ["dual", "vision"])
def test_a_penalty_on_the_weights_of_a_tower_counts(branch, estimator, caplog):
    class Penalised(nn.Module):
        def __init__(self, clip):
            super().__init__()
            self.clip = clip

        def forward(self, **inputs):
            named = self.clip.named_parameters()
            penalty = sum(p.square().sum() for name, p in named if "lora_" in name and "vision" in name)
            return CLIPClassifierOutput(loss=self.clip(**inputs).loss + 10 * penalty)

    made = []

    def make_evaluation(*args):
        made.append(checked(*args))
        return made[0]

    clip, inputs = dual_encoder("clip")
    assert_same(Penalised(clip), inputs, branch, "all", make_evaluation, queries=2, estimator=estimator)
    assert made[0].plain is None
    assert switched_off(caplog) == {"weights left as they are (vision tower)"}


def test_biases_beside_frozen_weights_are_stacked():
    torch.manual_seed(0)
    model, inputs = dual_encoder("clip")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("text_model" in name and "fc1" in name and name.endswith("bias"))
    # As many candidates as a prompt has tokens.
    assert_same(model, inputs, "language", "all", queries=8)


@pytest.mark.parametrize("ending", ["", "weight", "bias"])
def test_layer_norms_are_stacked(ending):
    model, inputs = dual_encoder("clip")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("text_model" in name and "norm" in name and name.endswith(ending))
    assert_same(model, inputs, "language", "all", queries=8)
    text = count_calls(model.base_model.model.text_model.encoder.layers[-1])
    gradients(model, inputs, towers(), "language", "all", queries=8)
    assert text == [6, 6 * 8]


def test_weights_that_another_module_reads_go_one_by_one():
    model, inputs = dual_encoder("siglip")
    model.base_model.model.vision_model.head.attention.out_proj.weight.requires_grad_(True)
    assert_same(model, inputs, "vision", "all", queries=3)


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


def test_a_stacked_bias_beside_a_shared_weight_is_each_candidates_own():
    weight, bias, inputs = torch.randn(5, 4), torch.randn(3, 5), torch.randn(6, 3, 4)
    expected = [nn.functional.linear(rows, weight, bias[i]) for i, rows in enumerate(inputs.chunk(3))]
    torch.testing.assert_close(stacked_linear(inputs, weight, bias), torch.cat(expected))
