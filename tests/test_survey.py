"""Tiny models of many families, built from their configurations: what a step estimates is right on every one.

They train as they are, with their dropout, their layers that are dropped and their statistics of batches.

`make test` trains one of each kind; the slow tests train them all.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers as hf
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hf_zocl.trainer
from hf_zocl import ZOCLTrainer
from hf_zocl.zo import Combination, Perturbation, StreamedPerturbation

from .helpers import arguments, slow_but_for


SMALL = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "type_vocab_size": 2, "initializer_range": 0.1,
}  # fmt: skip
PATCHES = {"image_size": 16, "patch_size": 4}
SEQ2SEQ = {
    "vocab_size": 40, "d_model": 16, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1, "max_position_embeddings": 64,
}  # fmt: skip
SPEECH = {
    **SMALL, "conv_dim": (8, 8), "conv_stride": (4, 2), "conv_kernel": (8, 4), "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 2, "apply_spec_augment": False,
}  # fmt: skip


def text(**more) -> dict:
    return {"input_ids": torch.arange(3, 19).view(2, 8), **more}


def image(size: int = 16) -> dict:
    return {"pixel_values": torch.randn(2, 3, size, size)}


def seq2seq() -> dict:
    return text(decoder_input_ids=torch.arange(5, 17).view(2, 6))


def speech() -> dict:
    return {"input_values": torch.randn(2, 400)}


def model(name: str, *configs: dict, inputs: Callable[[], dict] = text, prepare=None, **options):
    """A family: the class's name, its configuration's arguments, and a batch."""
    return name, {**{key: value for config in configs for key, value in config.items()}, **options}, inputs, prepare


FAMILIES = {
    "encoder": [
        model("BertForSequenceClassification", SMALL),
        model("RobertaForMaskedLM", SMALL),
        model("DistilBertForMaskedLM", dim=16, n_layers=3, n_heads=2, hidden_dim=24, vocab_size=40),
        model("DebertaV2Model", SMALL, relative_attention=True, pos_att_type=["c2p", "p2c"]),
        model("XLNetLMHeadModel", vocab_size=40, d_model=16, n_layer=3, n_head=2, d_inner=24),
        model("FunnelModel", vocab_size=40, block_sizes=[2, 2], num_decoder_layers=2, d_model=16, n_head=2, d_head=8,
              d_inner=24),
        model("ModernBertForMaskedLM", SMALL),
        model("MPNetModel", SMALL),
    ],
    "decoder": [
        model("GPT2LMHeadModel", SMALL, n_embd=16, n_layer=3, n_head=2, n_positions=64),
        model("LlamaForCausalLM", SMALL),
        model("Gemma2ForCausalLM", SMALL, query_pre_attn_scalar=8),
        model("GPTNeoXForCausalLM", SMALL),
        model("BloomForCausalLM", SMALL, n_layer=3, n_head=2),
        model("OPTForCausalLM", SMALL, ffn_dim=24, word_embed_proj_dim=8),
        model("Qwen3ForCausalLM", SMALL, tie_word_embeddings=True),
        model("PhiForCausalLM", SMALL),
    ],
    "encoder-decoder": [
        model("T5ForConditionalGeneration", vocab_size=40, d_model=16, d_ff=24, d_kv=8, num_layers=3, num_heads=2,
              num_decoder_layers=2, decoder_start_token_id=0, inputs=seq2seq),
        model("BartForConditionalGeneration", SEQ2SEQ, inputs=seq2seq),
        model("LEDForConditionalGeneration", SEQ2SEQ, attention_window=4, inputs=seq2seq),
        model("ProphetNetForConditionalGeneration", vocab_size=40, hidden_size=16, num_encoder_layers=2,
              num_decoder_layers=2, num_encoder_attention_heads=2, num_decoder_attention_heads=2, encoder_ffn_dim=24,
              decoder_ffn_dim=24, max_position_embeddings=64, pad_token_id=0, decoder_start_token_id=1,
              inputs=seq2seq),
    ],
    "vision": [
        model("ViTForImageClassification", SMALL, PATCHES, inputs=image),
        model("SwinForImageClassification", PATCHES, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 2],
              window_size=4, inputs=image),
        model("ConvNextForImageClassification", hidden_sizes=[8, 16], depths=[2, 2], num_stages=2, patch_size=4,
              inputs=image),
        model("ResNetForImageClassification", embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2],
              layer_type="basic", inputs=image),
        model("SegformerForSemanticSegmentation", hidden_sizes=[8, 16], depths=[2, 1], num_attention_heads=[1, 2],
              num_encoder_blocks=2, sr_ratios=[2, 1], patch_sizes=[3, 3], strides=[2, 2], mlp_ratios=[2, 2],
              decoder_hidden_size=16, inputs=image),
        model("Dinov2Model", SMALL, PATCHES, inputs=image),
        model("BeitModel", SMALL, PATCHES, use_relative_position_bias=True, inputs=image),
        model("YolosForObjectDetection", SMALL, image_size=[16, 16], patch_size=4, num_detection_tokens=4,
              use_mid_position_embeddings=False, inputs=image),
        model("DetrForObjectDetection", SEQ2SEQ, use_timm_backbone=False, use_pretrained_backbone=False,
              num_queries=5, backbone=None, inputs=lambda: image(32), prepare=lambda: {
                  "backbone_config": hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1],
                                                     layer_type="basic", out_features=["stage2"])}),
    ],
    "speech": [
        model("Wav2Vec2ForCTC", SPEECH, inputs=speech),
        model("HubertModel", SPEECH, inputs=speech),
        model("WhisperForConditionalGeneration", SEQ2SEQ, num_mel_bins=8, max_source_positions=16,
              max_target_positions=16, suppress_tokens=None, begin_suppress_tokens=None,
              inputs=lambda: {"input_features": torch.randn(2, 8, 32),
                              "decoder_input_ids": torch.arange(5, 17).view(2, 6)}),
        model("ASTForAudioClassification", SMALL, max_length=24, num_mel_bins=16, patch_size=8, frequency_stride=8,
              time_stride=8, inputs=lambda: {"input_values": torch.randn(2, 24, 16)}),
    ],
    "dual encoder": [
        model("CLIPModel", text_config=SMALL, vision_config={**SMALL, **PATCHES}, projection_dim=8,
              inputs=lambda: {**text(), **image()}),
        model("SiglipModel", text_config={**SMALL, "projection_size": 16}, vision_config={**SMALL, **PATCHES},
              inputs=lambda: {**text(), **image()}),
        model("VisionTextDualEncoderModel", projection_dim=8, inputs=lambda: {**text(), **image()}, prepare=lambda: {
            "vision_config": hf.ViTConfig(**{**SMALL, **PATCHES}).to_dict(),
            "text_config": hf.BertConfig(**SMALL).to_dict()}),
    ],
    "VLM": [
        model("LlavaForConditionalGeneration", image_token_index=39, vision_feature_layer=-1,
              inputs=lambda: {"input_ids": torch.tensor([[1, *[39] * 16, 5, 6], [1, *[39] * 16, 7, 8]]), **image()},
              prepare=lambda: {"vision_config": hf.CLIPVisionConfig(**{**SMALL, **PATCHES}),
                               "text_config": hf.LlamaConfig(**SMALL)}),
        model("ViltModel", SMALL, PATCHES, inputs=lambda: {**text(), **image()}),
        model("GitForCausalLM", SMALL, vision_config={**SMALL, **PATCHES}, inputs=lambda: {**text(), **image()}),
    ],
    "state space": [
        model("MambaForCausalLM", SMALL, state_size=4),
        model("Mamba2ForCausalLM", SMALL, state_size=4, num_heads=4, n_groups=1, expand=2, chunk_size=4),
        model("RwkvForCausalLM", SMALL, attention_hidden_size=16, context_length=32),
    ],
    "mixture of experts": [
        model("MixtralForCausalLM", SMALL, num_local_experts=3, num_experts_per_tok=2),
        model("Qwen2MoeForCausalLM", SMALL, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8,
              shared_expert_intermediate_size=8),
        model("OlmoeForCausalLM", SMALL, num_experts=3, num_experts_per_tok=2),
        model("SwitchTransformersForConditionalGeneration", vocab_size=40, d_model=16, d_ff=24, d_kv=8, num_layers=2,
              num_heads=2, num_decoder_layers=2, num_experts=3, num_sparse_encoder_layers=1,
              num_sparse_decoder_layers=1, decoder_start_token_id=0, inputs=seq2seq),
    ],
}  # fmt: skip
EVERY = {name: (name, *rest) for kind in FAMILIES.values() for name, *rest in kind}
IN_FLOAT32 = {"SwitchTransformersForConditionalGeneration"}  # its router is not to be in float64
DROP_LAYERS = {"Wav2Vec2ForCTC", "HubertModel"}
FIRST = [kind[0][0] for kind in FAMILIES.values()]


def build(name: str, options: dict, prepare: Callable[[], dict] | None) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    model_class = getattr(hf, name)
    config = model_class.config_class(**options, **(prepare() if prepare else {}))
    made = model_class._from_config(config, experts_implementation="eager")
    return made if name in IN_FLOAT32 else made.double()


def loss_of(model: torch.nn.Module, inputs: dict) -> torch.Tensor:
    """Some function of what the model predicts, the same for all."""
    outputs = model(**inputs)
    names = ("logits_per_image", "logits", "last_hidden_state")
    values = next(outputs[name] for name in names if outputs.get(name) is not None).double()
    weights = torch.arange(values[0].numel(), dtype=values.dtype).sin().view_as(values[0])
    return (values * weights).square().mean()


class Reads(TorchDispatchMode):
    """Which parameters a model reads, and which of them away from θ."""

    # By which parameters are moved and put back; of a view, it is what reads it that counts.
    OTHERS = {"clone", "detach", "_foreach_add_", "_foreach_copy_", "view", "slice"}

    def __init__(self, parameters: list[torch.nn.Parameter]):
        super().__init__()
        self.theta = {p.untyped_storage().data_ptr(): (p, p.detach().clone()) for p in parameters}
        self.read: set[torch.nn.Parameter] = set()
        self.away: set[torch.nn.Parameter] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        values = [] if func.overloadpacket.__name__ in self.OTHERS else tree_leaves((args, kwargs))
        for value in values:
            if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() in self.theta:
                parameter, old = self.theta[value.untyped_storage().data_ptr()]
                self.read.add(parameter)
                if not torch.equal(parameter.data, old):
                    self.away.add(parameter)
        return func(*args, **(kwargs or {}))


class Watched(ZOCLTrainer):
    """Trains by `loss_of`, and keeps what it was about to step."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return loss_of(model, inputs)

    def training_step(self, *args, **kwargs):
        self.random_state = torch.get_rng_state()
        self.reads = Reads(self.split.zo_parameters)
        with self.reads:
            return super().training_step(*args, **kwargs)

    def _install_estimates(self):
        ((self.estimate, _),) = self._estimates
        super()._install_estimates()


def directions(perturbation: Perturbation, seed: int) -> dict[torch.nn.Parameter, torch.Tensor]:
    """Δ, parameter by parameter."""
    offset = Combination((seed,), (1.0,))
    parts = [(perturbation, offset)]
    if isinstance(perturbation, StreamedPerturbation):
        parts = [(unit.perturbation, unit.own(offset)) for unit in perturbation.units]
    return {
        parameter: piece
        for part, own in parts
        for parameter, piece in zip(part.parameters, part.pieces(part.vector(own)), strict=True)
    }


@torch.no_grad()
def assert_step_is_right(name: str, layers: str, streamed: bool, tmp_path, monkeypatch) -> Watched:
    monkeypatch.setattr(hf_zocl.trainer.mixin, "STREAMED_PARAMETERS", 0 if streamed else 1 << 60)
    monkeypatch.setattr(hf_zocl.trainer.mixin, "STREAMED_FRACTION", 0)
    family, options, inputs, prepare = EVERY[name]
    trained = build(family, options, prepare)
    batch = {key: value.to(trained.dtype) if value.is_floating_point() else value for key, value in inputs().items()}
    theta = {parameter: parameter.clone() for parameter in trained.parameters()}
    eps, rate, precision = 1e-3, 1e-2, 1e-3 if name in IN_FLOAT32 else 1e-6
    options = {"zo_layers": layers, "zo_eps": eps, "zo_learning_rate": rate, "zo_optim": "sgd", "max_steps": 1}
    trainer = Watched(
        model=trained,
        args=arguments(tmp_path, remove_unused_columns=False, **options),
        train_dataset=[0],
        data_collator=lambda rows: batch,
    )
    with torch.enable_grad():
        trainer.train()
    assert trainer._estimator.is_streamed == streamed
    zo = set(trainer.split.zo_parameters)
    assert trainer.reads.away == trainer.reads.read <= zo
    if streamed:
        assert all(unit.was_moved for p in trainer._estimator.perturbations.values() for unit in p.units)
    stepped = {parameter: parameter.clone() for parameter in zo}

    def loss() -> torch.Tensor:
        torch.set_rng_state(trainer.random_state)
        return loss_of(trained, batch)

    torch._foreach_copy_(list(theta), list(theta.values()))
    base, seen = loss(), set()
    all_moves = {
        branch: directions(perturbation, *trainer.estimate.gradient[branch].seeds)
        for branch, perturbation in trainer._estimator.perturbations.items()
    }
    for branch, moves in all_moves.items():
        seen |= set(moves)
        for each in all_moves.values() if trainer._estimator.moves_together else [moves]:
            torch._foreach_add_(list(each), list(each.values()), alpha=eps)
        difference = loss() - base
        torch._foreach_copy_(list(theta), list(theta.values()))
        (found,) = trainer.estimate.differences[branch]
        assert found == pytest.approx(difference.item(), rel=precision, abs=1e-13 * base.item())
        if any(parameter in trainer.reads.read for parameter in moves):
            assert found != 0
        for parameter, move in moves.items():
            expected = theta[parameter] - rate * difference / eps * move
            torch.testing.assert_close(stepped[parameter], expected.to(move), rtol=1e-5, atol=1e-2 * precision)
    assert seen == zo
    return trainer


CASES = [(name, layers, streamed) for name in EVERY for layers in ("all", "hop-even") for streamed in (True, False)]
QUICK = [
    case for case in CASES if case[0] == "GPT2LMHeadModel" or (case[0] in FIRST and case[1:] == ("hop-even", True))
]


@pytest.mark.parametrize(("name", "layers", "streamed"), slow_but_for(QUICK, CASES))
def test_what_is_stepped_was_perturbed_and_by_the_right_estimate(name, layers, streamed, tmp_path, monkeypatch):
    trainer = assert_step_is_right(name, layers, streamed, tmp_path, monkeypatch)
    if streamed and name not in DROP_LAYERS:  # memory: no layer is copied but while it runs
        units = [unit for p in trainer._estimator.perturbations.values() for unit in p.units if unit.scopes]
        assert units and all(unit.modules for unit in units)


@pytest.mark.slow
@pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "CLIPModel"])
def test_a_penalty_on_the_weights_is_part_of_the_estimate(name, streamed, tmp_path, monkeypatch):
    plain = loss_of

    def with_penalty(model, inputs):
        return plain(model, inputs) + 1e-3 * sum(p.double().square().sum() for p in model.parameters())

    monkeypatch.setitem(globals(), "loss_of", with_penalty)
    assert_step_is_right(name, "all", streamed, tmp_path, monkeypatch)


def test_there_are_thirty_families_and_more():
    assert len(EVERY) == sum(map(len, FAMILIES.values())) >= 30
