"""Any PEFT method by name, with its configuration as a mapping."""

import json

import pytest
import torch
from transformers import CLIPModel

from hf_zocl import MoEAdapterConfig
from hf_zocl.commands.recipe import build_scheduler, parse_recipe
from hf_zocl.hub import load_task_checkpoint
from hf_zocl.models import AdapterArguments, adapter_arguments, add_adapter
from tests.helpers import small_clip


METHODS = {
    "lora": {"use_rslora": True},
    "moe": {"bottleneck": 8},
    "vera": {"target_modules": ["q_proj"], "r": 4},
    "fourierft": {"target_modules": ["v_proj"], "n_frequency": 16},
    "ln_tuning": {"target_modules": ["layer_norm1", "layer_norm2"]},
    "ia3": {"target_modules": ["fc2", "k_proj"], "feedforward_modules": ["fc2"]},
}


def adapted(adapter: str, config: dict):
    return add_adapter(CLIPModel.from_pretrained(small_clip()), AdapterArguments(adapter, config))


@pytest.mark.parametrize("adapter", METHODS)
def test_the_arguments_of_an_adapter_make_it_again(adapter):
    config = adapted(adapter, METHODS[adapter]).peft_config["default"]
    found = adapter_arguments(config)
    assert found["adapter"] == adapter
    assert {name: found["adapter_config"][name] for name in METHODS[adapter]} == METHODS[adapter]
    again = AdapterArguments(**json.loads(json.dumps(found)))
    assert (
        adapter_arguments(add_adapter(CLIPModel.from_pretrained(small_clip()), again).peft_config["default"]) == found
    )


def test_the_order_of_a_list_is_part_of_the_shape():
    norms = list(reversed(MoEAdapterConfig().state_norms))
    found = adapter_arguments(adapted("moe", {"state_norms": norms}).peft_config["default"])
    assert found["adapter_config"]["state_norms"] == norms


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter": "lorra"}, "adapter='lorra' is unknown: expected one of lora, moe, "),
        ({"adapter": "prompt_tuning"}, "adapter='prompt_tuning' adds virtual tokens"),
        ({"adapter_config": "{r: 4"}, "adapter_config='{r: 4' is not JSON"),
        ({"adapter_config": [1]}, r"adapter_config=\[1\]: expected a mapping"),
        ({"adapter_config": {"r": 4}}, "adapter_config has 'r', which has its own argument: lora_rank"),
        ({"adapter_config": {"bottleneck": 4}}, "adapter_config has 'bottleneck', which LoraConfig does not accept"),
        ({"adapter": "moe", "adapter_config": {"peft_type": "LORA"}}, "'peft_type', which MoEAdapterConfig does not"),
        ({"adapter": "moe", "moe_top_k": 3}, "moe_top_k=3: expected 1 to num_experts=2"),
        ({"adapter": "vera", "adapter_config": {"r": 0}}, "r"),
    ],
)
def test_what_cannot_be_taken_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        add_adapter(CLIPModel.from_pretrained(small_clip()), AdapterArguments(**options))


def test_a_method_that_lacks_something_says_what():
    with pytest.raises(ValueError, match="adapter='fourierft' does not fit CLIPModel: .*target_modules"):
        adapted("fourierft", {})


def stream(tmp_path, adapter: str, config: dict, more: str = "--increment 5"):
    options = f"--output_dir {tmp_path / 'run'} --model_name_or_path {small_clip()} --adapter {adapter} {more}"
    options += " --max_train_images_per_class 4 --max_test_images_per_class 2 --max_steps 2 --report_to none"
    options += " --zo_learning_rate 1e-2 --learning_rate 1e-2 --use_cpu true --disable_tqdm true"
    return build_scheduler(parse_recipe([*options.split(), "--adapter_config", json.dumps(config)]))


@pytest.mark.usefixtures("quick_pictures")
@pytest.mark.parametrize(
    "adapter", ["ln_tuning", *(pytest.param(name, marks=pytest.mark.slow) for name in ("vera", "fourierft", "ia3"))]
)
def test_a_stream_is_learned_saved_and_loaded_again(adapter, tmp_path):
    scheduler = stream(tmp_path, adapter, METHODS[adapter])
    before = {name: p.detach().clone() for name, p in scheduler.model.named_parameters() if p.requires_grad}
    results = scheduler.run()
    after = {name: p for name, p in scheduler.model.named_parameters() if name in before}
    assert before and all(not torch.equal(p, before[name]) for name, p in after.items())
    assert results["recipe"]["adapter_config"] == METHODS[adapter]
    model, _ = load_task_checkpoint(tmp_path / "run" / "task-02")
    loaded = dict(model.named_parameters())
    assert all(torch.equal(loaded[name], p) for name, p in after.items())
    assert f"`adapter` | {adapter}" in (tmp_path / "run" / "task-02" / "README.md").read_text()


@pytest.mark.usefixtures("quick_pictures")
def test_a_stream_is_learned_by_the_last_norms_alone(tmp_path):
    """None of the trained layers has a number."""
    last = {"target_modules": ["final_layer_norm", "post_layernorm"]}
    stream(tmp_path, "ln_tuning", last, "--increment 5 --zo_branch dual --zo_layers all --zo_queries 4").run()
    card = (tmp_path / "run" / "task-01" / "README.md").read_text()
    assert "All 2 layers drawn below were trained by zeroth-order (ZO) optimisation" in card
