"""MoE adapters: the layer against a reference written from the description, and the PEFT method around it."""

import copy
from importlib.metadata import version

import pytest
import torch
import torch.nn.functional as F
from packaging.version import Version
from peft import AutoPeftModel, PeftModel, PeftType, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    ViTConfig,
    ViTModel,
)
from transformers.integrations.peft import MIN_PEFT_VERSION

from hf_zocl import LayerAssignment, MoEAdapterConfig, ZOCLTrainer, ZOCLTrainingArguments
from hf_zocl.models import AdapterArguments, CLIPClassifier, add_adapter
from hf_zocl.models.moe_adapter import model as moe_model
from hf_zocl.models.moe_adapter.layer import MoEAdapter, MoEAdapterLayer, Router
from hf_zocl.models.moe_adapter.mixture import ExpertWeights, mix_all, noisy_top_k
from hf_zocl.sample import sample_path
from hf_zocl.zo.assignment import locate
from tests.helpers import image_batch, image_examples, mini_clip_classifier


PROMPTS = torch.tensor([[4512, 5, 6, 4513], [4512, 7, 4513, 4513], [4512, 8, 9, 4513]])
MTIL = {"num_experts": 5, "num_routers": 3, "freeze_experts": 2}
CONFIG = CLIPConfig.from_pretrained(sample_path("mini-clip"))
WIDTHS = {"vision_model": CONFIG.vision_config.hidden_size, "text_model": CONFIG.text_config.hidden_size}


def clip() -> CLIPModel:
    return CLIPModel.from_pretrained(sample_path("mini-clip"))


def moe_clip(scatter: bool = True, **config) -> PeftModel:
    """The mini CLIP with MoE adapters; with `scatter` they have left their start, where they are zero."""
    torch.manual_seed(1)
    model = get_peft_model(clip(), MoEAdapterConfig(**config))
    if scatter:
        for name, parameter in model.named_parameters():
            if "moe_adapter_" in name:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def logits(model, **inputs) -> torch.Tensor:
    inputs = {"input_ids": PROMPTS, "pixel_values": image_batch(4)["pixel_values"], **inputs}
    return model(**inputs).logits_per_image


def adapters(model: nn.Module) -> list[MoEAdapter]:
    return [module for module in model.modules() if isinstance(module, MoEAdapter)]


def moe_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "moe_adapter_" in name}


# The layer against the description of the baseline: sort the pairs of example and expert, split them by expert, run
# each expert on its rows, add the rows up.


def reference_gates(adapter, x, k, noise):
    clean = x[:, 0] @ adapter.routers[0].gate.T
    scores = clean
    if noise is not None:
        scores = clean + noise * (F.softplus(x[:, 0] @ adapter.routers[0].noise.T) + 0.01)
    chosen = scores.sort(dim=-1, descending=True).indices[:, :k]
    gates = torch.zeros_like(scores)
    for row, experts in enumerate(chosen.tolist()):
        gates[row, experts] = torch.softmax(scores[row, experts], dim=0)
    return gates, chosen


def reference_mixture(adapter, x, k, noise=None, mask=None):
    """`mask`: of the hidden units of each example's chosen experts, `(batch, length, k, bottleneck)`."""
    gates, chosen = reference_gates(adapter, x, k, noise)
    slots = torch.arange(adapter.config.num_experts) if k == adapter.config.num_experts else None
    outputs, rows, weights = [], [], []
    for number, expert in enumerate(adapter.experts):
        mine = torch.nonzero(gates[:, number])[:, 0]
        hidden = torch.relu(expert.down(x[mine]))
        if mask is not None:
            slot = slots[number].expand(len(mine)) if slots is not None else (chosen[mine] == number).int().argmax(1)
            hidden = hidden * mask[mine, :, slot]
        outputs.append(0.1 * expert.up(hidden))
        rows.append(mine)
        weights.append(gates[mine, number])
    outputs = torch.cat(outputs) * torch.cat(weights)[:, None, None]
    return torch.zeros_like(x).index_add(0, torch.cat(rows), outputs)


def reference_block(block, h, k, noise=None, mask=None, **kwargs):
    mlp = block.mlp
    x = h + block.self_attn(block.layer_norm1(h), attention_mask=None, **kwargs)[0]
    adapter = mlp.moe_adapter_mixtures["default"]
    return x + mlp.base_layer(block.layer_norm2(x)) + reference_mixture(adapter, x, k, noise, mask)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(("experts", "k"), [(2, 2), (22, 2), (3, 1)])
@pytest.mark.parametrize("tower", ["vision_model", "text_model"])
def test_a_block_equals_the_reference_in_forward_and_gradients(tower, experts, k, mode):
    model = moe_clip(num_experts=experts, top_k=k).train(mode == "train")
    block = getattr(model.base_model.model, tower).encoder.layers[1]
    h = torch.randn(6, 9, WIDTHS[tower], requires_grad=True)
    causal = {"is_causal": True} if tower == "text_model" else {}
    parameters = {n: p for n, p in block.named_parameters() if p.requires_grad}

    torch.manual_seed(3)
    ours = block(h, None, **causal)
    torch.manual_seed(3)
    masks = (None, None)
    if mode == "train":
        masks = torch.randn(6, experts), F.dropout(torch.ones(6, 9, k * 64), 0.1).unflatten(-1, (k, 64))
    theirs = reference_block(block, h, k, *masks, **causal)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)

    weight = torch.randn_like(ours)
    mine, others = (
        torch.autograd.grad((out * weight).sum(), [h, *parameters.values()], allow_unused=True)
        for out in (ours, theirs)
    )
    for name, got, want in zip(["input", *parameters], mine, others, strict=True):
        if want is None:
            assert got is None or not got.any(), name
        else:
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * max(1.0, want.abs().max().item()), msg=name)


def test_the_default_is_the_baseline():
    model = get_peft_model(clip(), MoEAdapterConfig())
    layers = [name for name, module in model.named_modules() if isinstance(module, MoEAdapterLayer)]
    assert [locate(name + ".")[0] for name in layers] == ["language"] * 4 + ["vision"] * 6
    for adapter in adapters(model):
        assert [type(expert.down).__name__ for expert in adapter.experts] == ["Linear", "Linear"]
        bottleneck, width = adapter.experts[0].down.weight.shape
        assert bottleneck == 64
        assert width in WIDTHS.values()
        bound = 1 / width**0.5  # Kaiming-uniform with a = √5
        assert 0.9 * bound < adapter.experts[0].down.weight.abs().max() <= bound
        zero = [p for n, p in adapter.named_parameters() if not n.endswith("down.weight")]
        assert len(zero) == 8
        assert not any(p.any() for p in zero)
        assert (adapter.config.scale, adapter.config.dropout, adapter.config.top_k) == (0.1, 0.1, 2)
        assert len(adapter.routers) == 1


@pytest.mark.skipif(
    Version(version("peft")) < Version(MIN_PEFT_VERSION),
    reason=f"the installed transformers adds adapters of PEFT {MIN_PEFT_VERSION} and later alone",
)
def test_transformers_own_way_to_add_an_adapter_works():
    base, expected = clip().eval(), logits(clip().eval())
    base.add_adapter(MoEAdapterConfig())
    assert torch.equal(logits(base.eval()), expected)
    assert {n for n, p in base.named_parameters() if p.requires_grad} == set(moe_parameters(base))


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("config", [{}, MTIL, {"router_token": "pooled"}])
def test_at_initialisation_the_outputs_are_the_base_models_to_the_last_bit(config, mode):
    base, model = clip().train(mode), moe_clip(scatter=False, **config).train(mode)
    with torch.no_grad():
        assert torch.equal(logits(model), logits(base))
    assert torch.equal(logits(model), logits(base))


def test_the_weights_of_several_candidates_can_be_stacked():
    x, gates = torch.randn(6, 5, 8), torch.rand(6, 2)
    candidates = [[tuple(torch.randn(*s) for s in ((4, 8), (4,), (8, 4), (8,))) for _ in range(2)] for _ in range(3)]
    as_weights = [[ExpertWeights(*expert) for expert in experts] for experts in candidates]
    stacked = [
        ExpertWeights(*(torch.stack(tensors) for tensors in zip(*copies, strict=True)))
        for copies in zip(*candidates, strict=True)
    ]
    apart = [mix_all(x[2 * i : 2 * i + 2], gates[2 * i : 2 * i + 2], as_weights[i]) for i in range(3)]
    torch.testing.assert_close(mix_all(x, gates, stacked), torch.cat(apart))


# The PEFT method.


@pytest.mark.parametrize("config", [{}, MTIL, {"router_token": "pooled"}, {"noise": False, "top_k": 1}])
def test_save_and_load_give_the_same_logits_to_the_last_bit(tmp_path, config):
    model = moe_clip(**config).eval()
    model.begin_task(2)
    model.save_pretrained(tmp_path)
    expected = logits(model)
    assert not torch.equal(expected, logits(clip().eval()))
    for loaded in (
        PeftModel.from_pretrained(clip(), tmp_path),
        PeftModel.from_pretrained(clip(), tmp_path, adapter_name="another", is_trainable=True),
        PeftModel.from_pretrained(clip(), tmp_path, low_cpu_mem_usage=True),
        AutoPeftModel.from_pretrained(tmp_path),
    ):
        assert torch.equal(logits(loaded.eval()), expected)


def test_only_the_adapters_are_trainable_and_printed(capsys):
    model = moe_clip()
    model.print_trainable_parameters()
    count = sum(p.numel() for p in moe_parameters(model).values())
    assert f"trainable params: {count:,}" in capsys.readouterr().out
    assert all("moe_adapter_" in name for name, p in model.named_parameters() if p.requires_grad)


def test_adapters_are_disabled_added_switched_and_deleted():
    model = moe_clip().eval()
    base, first = logits(clip().eval()), logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), first)
    model.add_adapter("other", MoEAdapterConfig(num_experts=3))
    assert torch.equal(logits(model), first)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".other." in n)
    model.set_adapter("other")
    assert torch.equal(logits(model), base)
    assert all((".other." in n) == p.requires_grad for n, p in model.named_parameters() if "moe_adapter_" in n)
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(logits(model), first)
    assert not any(".other." in n for n, _ in model.named_parameters())


def test_merging_is_refused_and_unloading_leaves_the_base_model():
    model = moe_clip().eval()
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match="cannot be merged"):
            merge()
    base = model.unload()
    assert torch.equal(logits(base), logits(clip().eval()))
    assert not any(module._forward_pre_hooks for module in base.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 0}, "num_experts=0"),
        ({"top_k": 3}, "top_k=3: expected 1 to num_experts=2"),
        ({"bottleneck": 0}, "bottleneck=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"router_token": "last"}, "router_token='last'"),
        ({"freeze_experts": 3}, "freeze_experts=3"),
        ({"balance_loss": -1.0}, "balance_loss=-1.0"),
        ({"towers": "dual"}, "towers='dual'"),
        ({"scale": "much"}, "scale='much': expected a number"),
        ({"scale": float("nan")}, "scale=nan: expected a finite number"),
    ],
)
def test_values_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        MoEAdapterConfig(**options)
    (name,) = options
    has_argument = name in ("num_experts", "top_k", "dropout")
    with pytest.raises(ValueError, match=f"moe_{message}" if has_argument else f"adapter_config: {message}"):
        given = {f"moe_{name}": options[name]} if has_argument else {"adapter_config": options}
        AdapterArguments(adapter="moe", **given)


def test_a_peft_that_has_changed_is_named(monkeypatch):
    def closed(*args):
        raise TypeError("the enum is closed")

    monkeypatch.setattr(moe_model, "PEFT_TYPE", "MOE_ADAPTER_AGAIN")
    monkeypatch.setattr(moe_model, "extend_enum", closed)
    with pytest.raises(RuntimeError, match="peft .* does not accept MoE adapters"):
        moe_model.register_with_peft()
    assert PeftType("MOE_ADAPTER") in PeftType


# Where the adapters stand.


@pytest.mark.parametrize("tower", ["vision", "language"])
def test_towers_and_layers_choose_the_blocks(tower):
    model = mini_clip_classifier(adapter="moe", adapter_config={"towers": tower, "layers_to_transform": [1, 2]})
    names = {locate(name) for name, p in model.named_parameters() if p.requires_grad}
    assert names == {(tower, 2), (tower, 3)}


@pytest.mark.parametrize("layers", [[-1], [6], [0, 6], 6])
@pytest.mark.parametrize("adapter", ["lora", "moe"])
def test_layers_that_do_not_exist_are_named(adapter, layers):
    with pytest.raises(ValueError, match=r"layers_to_transform=\[.*6 layers"):
        add_adapter(clip(), AdapterArguments(adapter=adapter, adapter_config={"layers_to_transform": layers}))


@pytest.mark.parametrize("branch", ["dual", "vision", "language"])
@pytest.mark.parametrize("layers", ["all", "hop-odd", "hop-even", "prefix-2", "suffix-2", [1, 3]])
def test_a_blocks_router_and_experts_belong_to_its_layer(branch, layers):
    model = mini_clip_classifier(adapter="moe")
    split = LayerAssignment(branch, layers).split(model)
    for group in split.zo:
        assert group.layer is not None
        assert len(group.names) == 2 * 4 + 2
    assert all("moe_adapter_" in name for name in split.fo)
    assert len(split.fo) + len(split.zo_parameters) == 10 * 10


def tiny(kind: str) -> nn.Module:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    if kind == "vit":
        return ViTModel(ViTConfig(image_size=16, patch_size=8, **shape))
    if kind == "bert":
        return BertModel(BertConfig(vocab_size=50, **shape))
    if kind == "llama":
        return LlamaModel(LlamaConfig(vocab_size=50, **shape))
    return GPT2Model(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2))


@pytest.mark.parametrize(
    ("kind", "target", "norm", "widths"),
    [
        ("vit", None, "layernorm_after", (32, 32)),
        ("llama", None, "post_attention_layernorm", (32, 32)),
        ("gpt2", None, "ln_2", (32, 32)),
        ("bert", ["intermediate"], None, (32, 64)),
    ],
)
def test_other_models_take_the_adapters_too(tmp_path, kind, target, norm, widths):
    base = tiny(kind).eval()
    inputs = (
        {"pixel_values": torch.randn(3, 3, 16, 16)} if kind == "vit" else {"input_ids": torch.arange(15).view(3, 5)}
    )
    expected = base(**inputs).last_hidden_state
    model = get_peft_model(base, MoEAdapterConfig(target_modules=target)).eval()
    assert torch.equal(model(**inputs).last_hidden_state, expected)
    layers = [module for module in model.modules() if isinstance(module, MoEAdapterLayer)]
    assert [layer._reads_norm for layer in layers] == [norm is not None] * 2
    expert = adapters(model)[0].experts[0]
    assert (expert.down.in_features, expert.up.out_features) == widths

    seen = []
    for name, module in model.named_modules():
        if norm is not None and name.endswith(norm):
            module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for adapter in adapters(model):
        adapter.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1)
    changed = model.train()(**inputs).last_hidden_state
    if norm is not None:
        assert all(a is b for a, b in zip(seen[::2], seen[1::2], strict=True))
    changed.pow(2).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.eval().save_pretrained(tmp_path)
    fresh = tiny(kind)
    fresh.load_state_dict(model.unload().state_dict())
    loaded = PeftModel.from_pretrained(fresh, tmp_path).eval()
    assert not torch.equal(loaded(**inputs).last_hidden_state, expected)


def test_a_target_without_a_width_is_named():
    with pytest.raises(ValueError, match=r"target_modules: .*activation_fn .* has no linear layer"):
        get_peft_model(clip(), MoEAdapterConfig(target_modules=["activation_fn"]))


def test_a_norm_that_is_not_called_before_the_mlp_is_named():
    model = moe_clip(state_norms=["layer_norm2"])
    mlp = model.base_model.model.vision_model.encoder.layers[0].mlp
    with pytest.raises(RuntimeError, match="norm next to CLIPMLP was not called before it.*state_norms"):
        mlp(torch.randn(1, 2, WIDTHS["vision_model"]))


def test_nothing_of_a_forward_pass_is_kept():
    model = moe_clip()
    logits(model).sum().backward()
    layers = [module for module in model.modules() if isinstance(module, MoEAdapterLayer)]
    assert all(layer._state is None for layer in layers)


def test_a_copy_works_on_its_own():
    model = moe_clip().eval()
    layer = model.base_model.model.vision_model.encoder.layers[0]
    layer.layer_norm2(
        torch.randn(1, 2, WIDTHS["vision_model"], requires_grad=True) * 1.0
    )  # a pass that ended before the MLP
    twin = copy.deepcopy(model)
    expected = logits(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(logits(twin), expected)


# The token that the router reads.


def test_the_first_text_token_gives_all_prompts_the_same_gates_and_the_pooled_token_does_not():
    def spread(token: str) -> float:
        model, gates = moe_clip(router_token=token).eval(), []
        for name, module in model.named_modules():
            if name.endswith("routers.0") and "text_model" in name:
                module.register_forward_hook(lambda module, args, routing: gates.append(routing.gates))
        logits(model)
        return torch.stack(gates).std(dim=1).max().item()

    assert spread("first") < 1e-6
    assert spread("pooled") > 1e-3


@pytest.mark.parametrize("eos", [4513, 2])
def test_pooled_is_the_token_that_the_text_tower_pools(eos):
    model = moe_clip(router_token="pooled").eval()
    tower = model.base_model.model.text_model
    tower.eos_token_id = eos
    read = []
    layer = tower.encoder.layers[3].mlp
    layer.moe_adapter_mixtures["default"].routers[0].register_forward_pre_hook(lambda m, args: read.append(args[0]))
    adapter = layer.moe_adapter_mixtures["default"]
    states = []
    adapter.register_forward_pre_hook(lambda m, args: states.append(args[0]))
    tower(input_ids=PROMPTS)
    assert torch.equal(read[0], states[0][torch.arange(3), torch.tensor([3, 2, 3])])


def test_pooled_works_with_some_blocks_only_and_needs_a_clip_tower():
    model = moe_clip(router_token="pooled", layers_to_transform=[1])
    logits(model).sum().backward()
    with pytest.raises(ValueError, match="router_token='pooled': .*is in no CLIP tower"):
        get_peft_model(other := tiny("vit"), MoEAdapterConfig(router_token="pooled"))
    assert not any(module._forward_pre_hooks for module in other.modules())
    with pytest.raises(RuntimeError, match="router_token='pooled': .*called without"):
        model.base_model.model.text_model.encoder.layers[1](torch.randn(1, 3, WIDTHS["text_model"]), None)


def test_two_adapters_may_read_different_tokens():
    model = moe_clip(router_token="pooled").eval()
    expected = logits(model)
    model.add_adapter("first", MoEAdapterConfig())
    model.add_adapter("another", MoEAdapterConfig(router_token="pooled"))
    model.base_model.set_adapter(["default", "first", "another"])
    assert torch.equal(logits(model), expected)


# What PyTorch and the Trainer do around it.


def gradients(model, seed=5):
    model.zero_grad()
    torch.manual_seed(seed)
    loss = logits(model).pow(2).mean()
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def checkpoint_activations(model, reentrant):
    """Renamed in transformers 5.24; releases before have the former name alone."""
    is_renamed = hasattr(CLIPModel, "activation_checkpointing_enable")
    enable = model.activation_checkpointing_enable if is_renamed else model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("config", [{}, {"router_token": "pooled", "num_experts": 4}])
def test_gradient_checkpointing_changes_no_gradient(config, reentrant):
    model = moe_clip(**config).train()
    expected = gradients(model)
    model.enable_input_require_grads = lambda: None
    checkpoint_activations(model.base_model.model, reentrant)
    if reentrant:  # such a block needs an input that requires a gradient
        for tower in (model.base_model.model.vision_model, model.base_model.model.text_model):
            tower.embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    checkpointed = gradients(model)
    assert checkpointed.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)


@pytest.mark.parametrize("config", [{}, {"num_experts": 4}])
def test_autocast_to_bfloat16_stays_close(config):
    model = moe_clip(**config).eval()
    with torch.no_grad():
        expected = logits(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            close = logits(model)
    assert close.dtype != torch.float64
    torch.testing.assert_close(close.float(), expected, rtol=0.05, atol=0.3)
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = logits(model).float().mean()
    loss.backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())


def test_a_base_model_in_bfloat16_keeps_its_precision():
    model = get_peft_model(clip().to(torch.bfloat16), MoEAdapterConfig())
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if "moe_adapter_" in n)
    output = model(input_ids=PROMPTS, pixel_values=image_batch(4)["pixel_values"].bfloat16())
    assert output.logits_per_image.dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("config", [{}, {"num_experts": 4}])
def test_torch_compile_sees_a_block_as_one_graph_and_gives_the_same(config):
    block = moe_clip(**config).train().base_model.model.vision_model.encoder.layers[0]
    h = torch.randn(4, 9, WIDTHS["vision_model"])
    outputs, gradients = [], []
    for run in (block, torch.compile(block, backend="aot_eager", fullgraph=True)):
        block.zero_grad()
        torch.manual_seed(5)
        outputs.append(run(h, None))
        outputs[-1].pow(2).mean().backward()
        gradients.append({n: p.grad.clone() for n, p in block.named_parameters() if p.grad is not None})
    torch.testing.assert_close(outputs[1], outputs[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_torch_compile_takes_the_whole_model():
    model = moe_clip(num_experts=4, router_token="pooled").eval()
    with torch.no_grad():
        torch.testing.assert_close(logits(torch.compile(model, backend="eager")), logits(model))


def arguments(tmp_path, **options) -> ZOCLTrainingArguments:
    defaults = {
        "output_dir": str(tmp_path),
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "zo_learning_rate": 1e-2,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    return ZOCLTrainingArguments(**{**defaults, **options})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("branch", "layers"),
    [("dual", "all"), ("language", "hop-even"), ("vision", "hop-odd"), ("dual", "suffix-1"), ("none", "all")],
)
def test_the_trainer_takes_every_assignment(tmp_path, branch, layers):
    model = mini_clip_classifier(adapter="moe")
    before = moe_parameters(model)
    args = arguments(tmp_path, zo_branch=branch, zo_layers=layers, zo_sign=True)
    trainer = ZOCLTrainer(model=model, args=args, train_dataset=image_examples())
    trainer.train()
    after = moe_parameters(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {locate(name) for name in moved} == {locate(name) for name in before}
    logs = next(entry for entry in trainer.state.log_history if "loss" in entry)
    for tower in ("vision", "language"):
        shares = [logs[f"router_usage_{tower}_{expert}"] for expert in (1, 2)]
        assert sum(shares) == pytest.approx(1.0)
        assert min(shares) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"gradient_checkpointing": True}, {"bf16": True, "use_cpu": True}, {"gradient_accumulation_steps": 2}]
)
def test_the_trainers_options_work(tmp_path, options):
    model = mini_clip_classifier(adapter="moe", moe_num_experts=4, adapter_config={"router_token": "pooled"})
    before = moe_parameters(model)
    trainer = ZOCLTrainer(model=model, args=arguments(tmp_path, **options), train_dataset=image_examples())
    trainer.train()
    after = moe_parameters(model)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(torch.isfinite(parameter).all() for parameter in after.values())


@pytest.mark.slow
def test_all_losses_of_an_estimate_see_the_same_routing_noise(tmp_path):
    """With an ε as small as this the gates differ only if the noise does."""
    model, seen = mini_clip_classifier(adapter="moe"), []
    args = arguments(tmp_path, zo_branch="language", zo_layers="all", zo_queries=3, zo_eps=1e-12, max_steps=1)
    for name, module in model.named_modules():
        if name.endswith("text_model.encoder.layers.0.mlp.moe_adapter_mixtures.default.routers.0"):
            module.register_forward_hook(lambda module, args, routing: seen.append(routing.gates.detach().clone()))
    ZOCLTrainer(model=model, args=args, train_dataset=image_examples()).train()
    assert all(torch.equal(gates, seen[0]) for gates in seen[-3:])  # before these, shortcuts are checked
    assert seen[0].std() > 0


# The load-balancing loss.


def test_the_load_is_the_chance_of_being_chosen():
    torch.manual_seed(0)
    clean, std = torch.randn(1, 4), torch.rand(1, 4) + 0.5
    torch.manual_seed(1)
    load = noisy_top_k(clean, std, 2).load[0]
    torch.manual_seed(1)
    logits = clean + torch.randn(1, 4) * std
    for expert in range(4):
        draws = logits.repeat(20_000, 1)
        draws[:, expert] = clean[0, expert] + std[0, expert] * torch.randn(20_000)
        chosen = (draws.topk(2).indices == expert).any(dim=-1).float().mean()
        assert load[expert] == pytest.approx(chosen.item(), abs=0.02)


def test_the_balance_loss_reaches_the_loss_in_training_alone():
    model = mini_clip_classifier(adapter="moe", moe_num_experts=4, adapter_config={"balance_loss": 0.1})
    batch, gates = image_batch(), []
    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda module, args, routing: gates.append(routing))
    output = model.train()(**batch)
    expected = F.cross_entropy(output.logits, batch["labels"])
    for routing in gates:
        for share in (routing.gates.sum(dim=0), routing.load.sum(dim=0)):
            expected = expected + 0.1 * share.var() / share.mean() ** 2
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    assert adapters(model)[0].routers[0].gate.grad.any()
    output = model.eval()(**batch)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, batch["labels"]))
    assert all(adapter.balance_losses is None for adapter in adapters(model))


@pytest.mark.slow
def test_with_a_balance_loss_every_loss_is_a_full_forward_pass(tmp_path):
    model = mini_clip_classifier(adapter="moe", adapter_config={"balance_loss": 0.1}, moe_noise=False, moe_dropout=0.0)
    assert model.couples_towers
    assert not mini_clip_classifier(adapter="moe").couples_towers
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    losses = []
    model.register_forward_hook(lambda module, args, output: losses.append(output.loss.item()))
    ZOCLTrainer(
        model=model,
        args=arguments(tmp_path, zo_branch="dual", zo_layers="all", max_steps=1),
        train_dataset=image_examples(),
    ).train()
    assert len(losses) >= 3


def test_reentrant_checkpointing_with_a_balance_loss_is_refused():
    model = mini_clip_classifier(adapter="moe", adapter_config={"balance_loss": 0.1}).train()
    checkpoint_activations(model, True)
    with pytest.raises(RuntimeError, match="use_reentrant"):
        model(**image_batch())
    checkpoint_activations(model, False)
    model(**image_batch()).loss.backward()
    assert all(adapter.routers[0].gate.grad.any() for adapter in adapters(model))


# Tasks.


def test_every_task_has_its_router_and_the_most_used_experts_are_frozen():
    model = moe_clip(**MTIL).train()
    adapter = adapters(model)[0]
    trains = [router.gate.requires_grad for router in adapter.routers]
    assert trains == [True, False, False]
    model.begin_task(2)
    assert [router.gate.requires_grad for router in adapter.routers] == [False, True, False]
    logits(model)
    chosen, gates = adapter.usage.tolist()
    model.end_task(2)
    used = sorted(range(5), key=lambda e: (chosen[e], gates[e]))[-2:]
    assert sorted(torch.nonzero(adapter.frozen)[:, 0].tolist()) == sorted(used)
    model.set_adapter("default")
    with model.disable_adapter():
        pass
    model.begin_task(3)
    assert [all(p.requires_grad for p in expert.parameters()) for expert in adapter.experts] == [
        number not in used for number in range(5)
    ]
    with pytest.raises(ValueError, match="task=4: there are num_routers=3"):
        model.begin_task(4)


def test_the_text_cache_notices_another_tasks_router():
    model: CLIPClassifier = mini_clip_classifier(adapter="moe", adapter_config={"router_token": "pooled"}).eval()
    with torch.no_grad():
        model(**image_batch())
    assert model._text_cache is not None
    model.begin_task(1)
    assert model._text_cache is None
