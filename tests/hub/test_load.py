"""What a run begins with: a fresh adapter, or one that has learned something and is trained further."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import normalizers
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers import AutoProcessor, BertConfig, BertModel, BertTokenizer, CLIPModel

from hf_zocl import CLIPClassifier, load_task_checkpoint
from hf_zocl.commands.recipe import build_scheduler, parse_recipe
from hf_zocl.hub.checkpoint import save_task_checkpoint, seal_task_checkpoint
from hf_zocl.hub.load import check_adapter_reloads, load_base_model, load_pretrained
from hf_zocl.hub.untrusted import check_processor
from hf_zocl.models import AdapterArguments, base_digest, check_trained_parameters, trained_adapter
from hf_zocl.sample import sample_path

from ..helpers import mini_clip_classifier
from .checkpoints import CLASSES, adapted_classifier, change_json, put_on_hub, save_checkpoint, task_info


RUN = """
--class_order 3 8 0 1 --partial_order true --increment 2 --max_train_images_per_class 4 --max_test_images_per_class 2
--per_device_train_batch_size 4 --max_steps 1 --zo_branch none --learning_rate 1e-2
--report_to none --disable_tqdm true --save_strategy no
"""
LORA = LoraConfig(target_modules=["q_proj", "v_proj"], r=4)


def scheduler(folder: Path, base: str | Path, *more: str):
    return build_scheduler(
        parse_recipe(["--output_dir", str(folder), "--model_name_or_path", str(base), *RUN.split(), *more])
    )


def logits(model: CLIPClassifier) -> torch.Tensor:
    model.set_classes(CLASSES)
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval()(pixels).logits


def clip() -> CLIPModel:
    return CLIPModel.from_pretrained(sample_path("mini-clip"))


def changed(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["lora", "moe"])
def test_a_checkpoint_is_trained_further_and_its_classes_are_known(adapter, tmp_path):
    folder = save_checkpoint(tmp_path, task=2, adapter=adapter)
    begun = load_task_checkpoint(folder)[0]
    built = scheduler(tmp_path / "run", folder)
    assert torch.equal(logits(built.model), logits(begun))
    assert built.known_classes == CLASSES[:4]  # airplane dog frog ship
    assert built.recipe["adapter"] == adapter
    results = built.run()
    info = json.loads((tmp_path / "run" / "task-01" / "task.json").read_text())
    assert (info["base_model"], info["adapter"]) == ("mini-clip", adapter)
    assert info["classes"] == ["cat", "ship"]
    assert info["known_classes"] == ["airplane", "dog", "frog"]
    last, _ = load_task_checkpoint(tmp_path / "run" / "task-02")
    assert last.class_names == ("cat", "ship", "airplane", "automobile", "dog", "frog")
    assert last.clip.peft_config["default"].base_model_name_or_path == str(sample_path("mini-clip"))
    assert not torch.equal(logits(last), logits(begun))
    assert len(results["accuracy_matrix"]) == 2


def test_known_classes_are_predicted_among(tmp_path):
    known = build_scheduler(parse_recipe(["--output_dir", str(tmp_path), *RUN.split()]))
    known._prepare_images()
    alone = known.evaluator().after(known._images, 1)
    known.known_classes = ("dog", "airplane", "frog")
    together = known.evaluator()
    assert together._names(known._images.evaluations(1)[0]) == ["cat", "ship", "dog", "airplane", "frog"]
    among = together.after(known._images, 1)
    # More to choose from cannot make a right answer of a wrong one.
    assert among["seen"] <= alone["seen"]
    whole = together.zero_shot(known._images)
    assert whole["accuracy_matrix"][0] == among["row"]
    assert whole["accuracy_matrix"][1] == together.after(known._images, 2)["row"]
    assert known.evaluator(is_own=False).known_classes == ()


@pytest.mark.parametrize(
    ("scenario", "classes", "known", "loaded"),
    [
        ("task", ["airplane", "dog"], ["Dog", "cat", "Cat"], ("airplane", "dog", "cat")),
        ("cross-dataset", ["dog", "Dog"], ["frog", "dog"], ("dog", "frog")),
    ],
)
def test_a_class_that_several_runs_or_datasets_share_is_known_once(tmp_path, scenario, classes, known, loaded):
    folder = save_checkpoint(tmp_path, task=1)
    change_json(folder / "task.json", scenario=scenario, classes=classes, known_classes=known)
    seal_task_checkpoint(folder)
    assert load_task_checkpoint(folder)[0].class_names == loaded
    assert load_pretrained(str(folder), AdapterArguments()).known_classes == loaded


def test_any_adapter_of_pefts_is_trained_further(tmp_path):
    begun = changed(get_peft_model(clip(), LORA))
    begun.save_pretrained(tmp_path / "adapter")
    found = load_pretrained(str(tmp_path / "adapter"), AdapterArguments())
    assert (found.known_classes, found.base_model) == ((), str(sample_path("mini-clip")))
    assert (found.adapter["adapter"], found.adapter["lora_rank"]) == ("lora", 4)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    trained = {name.replace(".default", ""): p for name, p in found.clip.named_parameters() if p.requires_grad}
    assert trained.keys() == saved.keys()
    assert all(torch.equal(trained[name], saved[name]) for name in saved)


@pytest.mark.slow
def test_another_method_of_pefts_is_trained_further_too(tmp_path):
    config = IA3Config(target_modules=["k_proj", "fc2"], feedforward_modules=["fc2"])
    changed(get_peft_model(clip(), config)).save_pretrained(tmp_path / "adapter")
    built = scheduler(tmp_path / "run", tmp_path / "adapter")
    before = logits(built.model)
    assert not torch.equal(before, logits(mini_clip_classifier()))
    built.run()
    assert json.loads((tmp_path / "run" / "task-01" / "task.json").read_text())["adapter"] == "ia3"
    assert not torch.equal(logits(load_task_checkpoint(tmp_path / "run" / "task-02")[0]), before)


def test_a_checkpoint_on_the_hub_is_trained_further(tmp_path, monkeypatch):
    folder = save_checkpoint(tmp_path, task=1)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    put_on_hub(tmp_path / "cache", "me/run", main=folder)
    found = load_pretrained("me/run", AdapterArguments())
    model = CLIPClassifier(found.clip, found.processor.tokenizer, CLASSES)
    assert torch.equal(logits(model), logits(load_task_checkpoint(folder)[0]))
    assert found.known_classes == CLASSES[:2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lora_rank": 16}, "lora_rank=16: the adapter of .* has 8; leave lora_rank out, or give merge_into"),
        ({"adapter": "moe"}, "adapter='moe': .* has 'lora'"),
        ({"target_modules": ["q_proj"]}, r"target_modules=\['q_proj'\]"),
    ],
)
def test_another_shape_than_the_adapters_is_refused(arguments, message, tmp_path):
    folder = save_checkpoint(tmp_path, task=1)
    with pytest.raises(ValueError, match=message):
        load_pretrained(str(folder), AdapterArguments(**arguments))


def test_another_value_in_the_adapters_configuration_is_refused(tmp_path):
    folder = save_checkpoint(tmp_path, task=1, adapter="moe", adapter_config={"bottleneck": 8})
    for same in ({"bottleneck": 8}, {"bottleneck": 8, "scale": 0.1}, None):
        found = load_pretrained(str(folder), AdapterArguments("moe", same)).adapter["adapter_config"]
        assert found["bottleneck"] == 8
    with pytest.raises(ValueError, match="adapter_config={'use_rslora': True}: .* has {'use_rslora': None}"):
        load_pretrained(str(folder), AdapterArguments(adapter_config={"use_rslora": True}))
    with pytest.raises(ValueError, match="adapter_config={'bottleneck': 16}: the adapter of .* has {'bottleneck': 8}"):
        load_pretrained(str(folder), AdapterArguments("moe", {"bottleneck": 16}))


def test_a_whole_run_is_no_model_and_says_which_tasks_are(tmp_path):
    folder = save_checkpoint(tmp_path, task=1)
    with pytest.raises(
        ValueError, match=f"is the folder of a run, with task-01 to task-01: name one of them, {folder}"
    ):
        load_pretrained(str(tmp_path), AdapterArguments())


@pytest.mark.parametrize("name", ["no/such/folder", "/no/folder"])
def test_a_model_that_is_nowhere_is_named(name):
    with pytest.raises(ValueError, match=f"{name} is neither a folder nor the name of a repository"):
        load_pretrained(name, AdapterArguments())


def test_a_damaged_checkpoint_is_not_trained_further(tmp_path):
    folder = save_checkpoint(tmp_path, task=1)
    content = bytearray((folder / "adapter_model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="adapter_model.safetensors is damaged"):
        load_pretrained(str(folder), AdapterArguments())


def test_routers_of_another_streams_tasks_are_refused(tmp_path):
    torch.manual_seed(0)
    options = {"adapter": "moe", "moe_router_per_task": True}
    found = load_pretrained("mini-clip", AdapterArguments(**options), num_tasks=3)
    found.clip.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has a router for each of its own stream's 3 tasks"):
        load_pretrained(str(tmp_path), AdapterArguments())


@pytest.mark.slow
def test_a_fresh_adapter_on_the_merged_model_has_an_argument_of_its_own(tmp_path):
    folder = save_checkpoint(tmp_path, task=2)
    merged = tmp_path / "merged"
    built = scheduler(tmp_path / "run", folder, "--merge_into", str(merged), "--lora_rank", "2")
    assert torch.allclose(logits(built.model), logits(load_task_checkpoint(folder)[0]), atol=1e-4)
    assert built.known_classes == ()
    built.run()
    info = json.loads((tmp_path / "run" / "task-02" / "task.json").read_text())
    assert (info["base_model"], info["base_model_is_local"]) == (str(merged), True)
    model, _ = load_task_checkpoint(tmp_path / "run" / "task-02")
    assert model.clip.peft_config["default"].r == 2
    written = (merged / "model.safetensors").stat().st_mtime_ns
    assert scheduler(tmp_path / "run", folder, "--merge_into", str(merged), "--lora_rank", "2").run(resume=True)
    assert (merged / "model.safetensors").stat().st_mtime_ns == written


def test_another_adapter_does_not_train_on_the_model_that_the_first_was_merged_into(tmp_path):
    first, second = (save_checkpoint(tmp_path / name, task=1, lora_rank=rank) for name, rank in (("a", 2), ("b", 4)))
    merged = tmp_path / "merged"
    before = load_pretrained(str(first), AdapterArguments(), merge_into=merged).clip.state_dict()
    again = load_pretrained(str(first), AdapterArguments(), merge_into=merged).clip.state_dict()
    name = next(name for name in before if name.endswith("q_proj.base_layer.weight"))
    assert torch.equal(before[name], again[name])
    with pytest.raises(ValueError, match=f"merge_into='{merged}' holds a model with an adapter other than"):
        load_pretrained(str(second), AdapterArguments(), merge_into=merged)


def test_what_cannot_be_merged_is_refused(tmp_path):
    moe = save_checkpoint(tmp_path, task=1, adapter="moe")
    with pytest.raises(ValueError, match="cannot be merged .MoE adapters are not linear"):
        load_pretrained(str(moe), AdapterArguments(), merge_into=tmp_path / "merged")
    with pytest.raises(ValueError, match="'mini-clip' has no adapter to merge"):
        load_pretrained("mini-clip", AdapterArguments(), merge_into=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    lora = save_checkpoint(tmp_path / "other", task=1)
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "notes.txt").touch()
    with pytest.raises(ValueError, match="holds something else"):
        load_pretrained(str(lora), AdapterArguments(), merge_into=tmp_path / "merged")


def stream_of(adapted: torch.nn.Module, folder: Path):
    """A scheduler over the sample's stream, of another model."""
    built = scheduler(folder, "mini-clip")
    built.model.clip = adapted
    return built


def two(active: str) -> torch.nn.Module:
    model = get_peft_model(clip(), LORA)
    model.add_adapter("second", LORA)
    model.set_adapter(active)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mine", "second", "default"])
def test_the_active_adapter_is_trained_and_saved(name, tmp_path):
    model = get_peft_model(clip(), LORA, adapter_name="mine") if name == "mine" else two(name)
    assert trained_adapter(model) == name
    built = stream_of(model, tmp_path)
    built.run()
    loaded, _ = load_task_checkpoint(tmp_path / "task-02")
    assert torch.equal(logits(loaded), logits(built.model))
    assert not (tmp_path / "task-02" / name).exists()
    again = stream_of(get_peft_model(clip(), LORA, adapter_name="mine") if name == "mine" else two(name), tmp_path)
    again.run(resume=True)
    assert torch.equal(logits(again.model), logits(loaded))


def test_what_no_checkpoint_would_hold_is_refused_before_training(tmp_path):
    both = two("default")
    both.base_model.set_adapter(["default", "second"])
    loose = get_peft_model(clip(), LORA)
    loose.base_model.model.logit_scale.requires_grad_(True)
    still = get_peft_model(clip(), LORA)
    still.requires_grad_(False)
    for model, message in (
        (clip(), r"the model \(CLIPModel\) has no adapter"),
        (both, "active adapters are default, second: expected exactly one"),
        (loose, "logit_scale would be trained but not saved"),
        (still, "no parameter of the active adapter, 'default', requires a gradient"),
    ):
        with pytest.raises(ValueError, match=message):
            check_trained_parameters(model)
    with pytest.raises(ValueError, match="has no adapter"):
        stream_of(clip(), tmp_path / "run").run()
    assert not (tmp_path / "run").exists()


def test_a_base_model_with_other_weights_is_refused(tmp_path):
    model = adapted_classifier()
    info = {**task_info(1), "base_model_sha256": base_digest(model.clip)}
    from hf_zocl.hub import save_task_checkpoint

    folder = save_task_checkpoint(
        tmp_path,
        model,
        AutoProcessor.from_pretrained(sample_path("mini-clip")),
        {**info, "zero_shot": info["zero_shot"]},
    )
    assert torch.equal(logits(load_task_checkpoint(folder)[0]), logits(model))
    other = clip()
    with torch.no_grad():
        other.visual_projection.weight[0, 0] += 1e-3
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="the base model .*other' has changed: its weights are not those"):
        load_task_checkpoint(folder, base_model=tmp_path / "other")


def test_a_base_model_that_was_loaded_in_bfloat16_is_loaded_so_again(tmp_path):
    """By a run in Python, whose recipe does not say it; the stored weights have another precision."""
    half = CLIPModel.from_pretrained(sample_path("mini-clip"), dtype=torch.bfloat16)
    built = stream_of(get_peft_model(half, LORA), tmp_path)
    del built.recipe["dtype"]
    built.run()
    loaded, _ = load_task_checkpoint(tmp_path / "task-02")
    assert torch.equal(logits(loaded), logits(built.model))
    assert load_base_model(tmp_path / "task-02").dtype == torch.bfloat16


def test_the_digest_of_a_base_model_sees_its_weights_alone():
    one, other = get_peft_model(clip(), LORA), changed(get_peft_model(clip(), LORA))
    assert base_digest(one) == base_digest(other) == base_digest(mini_clip_classifier(adapter="moe").clip)
    half = get_peft_model(clip().half(), LORA)
    widened = get_peft_model(clip().half().float(), LORA)
    assert base_digest(half) == base_digest(widened)
    with torch.no_grad():
        one.base_model.model.logit_scale += 1e-4
    assert base_digest(one) != base_digest(other)


def test_the_digest_of_a_quantised_base_is_of_what_its_weights_are_made_of():
    def quantised(scale: float = 1.0) -> PeftModel:
        model = get_peft_model(clip(), LORA)
        layer = model.base_model.model.visual_projection
        weight = layer.weight.detach()
        layer.weight = nn.Parameter(TwoTensor(weight, torch.full_like(weight, scale)), requires_grad=False)
        return model

    assert base_digest(quantised()) == base_digest(quantised()) != base_digest(quantised(0.5))


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


def base_of_another_kind(folder: Path, change) -> Path:
    shutil.copytree(sample_path("mini-clip"), folder)
    change(folder)
    return folder


def without_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def with_nan(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["visual_projection.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def with_words(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join("[PAD] [UNK] [CLS] [SEP] [MASK] a photo of . airplane dog frog ship cat".split()))
    BertTokenizer(str(vocabulary)).save_pretrained(folder)
    vocabulary.unlink()


def test_a_tokenizer_of_more_tokens_than_the_model_has_is_refused():
    tokenizer = AutoProcessor.from_pretrained(sample_path("mini-clip")).tokenizer
    tokenizer.add_tokens(["ship"])
    with pytest.raises(ValueError, match=r"the tokenizer \(CLIPTokenizer\) is another model's: it gives token"):
        CLIPClassifier(clip(), tokenizer, ["cat", "ship"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda folder: BertModel(BertConfig(vocab_size=100, **SMALL)).save_pretrained(folder),
            "model_type='bert': .*CLIP",
        ),
        (lambda folder: change_json(folder / "config.json", model_type="siglip"), "model_type='siglip': .*CLIP"),
        (without_a_weight, "has no visual_projection.weight"),
        (with_nan, "visual_projection.weight holds values that are infinite or NaN"),
    ],
    ids=["bert", "siglip", "a weight is missing", "NaN"],
)
def test_a_base_model_that_no_checkpoint_could_be_loaded_on_is_refused(change, message, tmp_path):
    base = base_of_another_kind(tmp_path / "base", change)
    with pytest.raises(ValueError, match=f"the base model '{re.escape(str(base))}'.*{message}"):
        load_pretrained(str(base), AdapterArguments())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_words, "tokenizer_class='BertTokenizer': expected CLIPTokenizer"),
        (
            lambda folder: change_json(folder / "tokenizer_config.json", added_by_us="x"),
            "tokenizer_config.json: 'added_by_us'='x' is not allowed",
        ),
    ],
    ids=["words", "an unknown key"],
)
def test_a_processor_that_no_checkpoint_could_be_loaded_with_is_refused_before_training(change, message, tmp_path):
    base = base_of_another_kind(tmp_path / "base", change)
    built = scheduler(tmp_path / "run", base)
    with pytest.raises(ValueError, match=message):
        built.run()
    assert not (tmp_path / "run").exists()
    assert built.run(train=False)["accuracy_matrix"]  # measured alone, it leaves no checkpoint


@pytest.mark.parametrize(
    "chosen",
    [
        {"target_modules": r"vision_model.*\.(q_proj|v_proj)"},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": "text_model.*"},
    ],
    ids=["expression", "but for an expression"],
)
def test_modules_that_an_expression_has_chosen_are_loaded_again(chosen, tmp_path):
    adapted = changed(get_peft_model(clip(), LoraConfig(r=4, **chosen)))
    processor = AutoProcessor.from_pretrained(sample_path("mini-clip"))
    model = CLIPClassifier(adapted, processor.tokenizer, CLASSES)
    check_adapter_reloads(adapted)
    folder = save_task_checkpoint(tmp_path, model, processor, task_info())
    loaded, _ = load_task_checkpoint(folder)
    assert torch.equal(logits(loaded), logits(model))
    modules = json.loads((folder / "adapter_config.json").read_text())["target_modules"]
    assert len(modules) == 2 * clip().config.vision_config.num_hidden_layers
    assert all(name.startswith("vision_model.") for name in modules)


@pytest.mark.parametrize(
    ("adapter", "config", "message"),
    [
        ("boft", {"target_modules": ["q_proj"], "boft_block_size": 4}, "adapter_config.json does not fit its base"),
        ("lora", {"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' takes a random part .*: expected 'pissa'"),
    ],
)
def test_an_adapter_that_could_not_be_loaded_again_is_refused_before_training(adapter, config, message, tmp_path):
    more = ["--adapter", adapter, "--adapter_config", json.dumps(config)]
    built = scheduler(tmp_path / "run", sample_path("mini-clip"), *more)
    with pytest.raises(ValueError, match=f"no checkpoint of the adapter 'default' could be loaded again: .*{message}"):
        built.run()
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_that_would_read_prompts_otherwise_once_loaded_is_refused():
    processor = AutoProcessor.from_pretrained(sample_path("mini-clip"))
    size = clip().config.text_config.vocab_size
    check_processor(processor, size, ["Ship", "cat"])
    processor.tokenizer.backend_tokenizer.normalizer = normalizers.NFC()  # CLIP's own has no capitals
    check_processor(processor, size, ["cat"])
    with pytest.raises(ValueError, match="no checkpoint could be loaded again: 'Ship' has the tokens"):
        check_processor(processor, size, ["cat", "Ship"])


def test_the_order_of_modules_asks_for_no_other_adapter(tmp_path):
    modules = {"target_modules": ["v_proj", "q_proj"], "r": 4}
    folder = save_checkpoint(tmp_path, task=1, adapter="vera", adapter_config=modules)
    assert load_pretrained(str(folder), AdapterArguments("vera", modules)).adapter["adapter"] == "vera"
