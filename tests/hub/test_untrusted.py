"""Checkpoints of strangers: what names code, other places or no number is refused; what lies beside is not pushed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_zocl import load_task_checkpoint
from hf_zocl.hub import seal_task_checkpoint
from hf_zocl.hub.public import public_files
from hf_zocl.hub.push import PushQueue
from hf_zocl.hub.untrusted import check_known, check_model_config
from hf_zocl.sample import sample_path
from tests.hub.checkpoints import change_json, save_checkpoint, task_info


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("run"))


@pytest.fixture
def checkpoint(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "task-03"))


def image_options(folder: Path, **changes) -> None:
    file = folder / "processor_config.json"
    content = json.loads(file.read_text())
    content["image_processor"].update(changes)
    file.write_text(json.dumps(content))


def weights(folder: Path, value: float) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors[min(tensors)].view(-1)[3] = value
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def adapter(**changes):
    return lambda folder: change_json(folder / "adapter_config.json", **changes)


def tokenizer(**changes):
    return lambda folder: change_json(folder / "tokenizer_config.json", **changes)


def processor(**changes):
    return lambda folder: image_options(folder, **changes)


def unknown_token(folder: Path) -> None:
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"]["</evil>"] = 10**6
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (adapter(target_modules="(a+)+$"), r"target_modules='\(a\+\)\+\$' is not allowed"),
        (adapter(target_modules=["(.*)*q_proj"]), "target_modules=.* is not allowed"),
        (adapter(exclude_modules="(a|a)*b"), "exclude_modules=.* is not allowed"),
        (adapter(rank_pattern={"(x+)+y": 4}), "rank_pattern.* is not allowed"),
        (adapter(layers_pattern=["(a+)+"]), "layers_pattern=.* is not allowed"),
        (adapter(lora_alpha=float("nan")), "lora_alpha=nan: expected a finite number"),
        (adapter(lora_alpha=10**400), "lora_alpha.*at most 64 bits"),
        (adapter(revision="a;b"), "revision='a;b' is not allowed"),
        (adapter(auto_mapping={"parent_library": "os", "base_model_class": "x"}), "auto_mapping=.* is not allowed"),
        (adapter(eva_config={"path": "../../x"}), "eva_config.*is not allowed"),
        (processor(image_mean=[float("nan")] * 3), "image_mean=nan: expected a finite number"),
        (processor(image_std=[0, 0, 0]), r"image_std=\[0, 0, 0\]: expected numbers from 1e-06"),
        (processor(rescale_factor="x"), "rescale_factor='x': expected a number greater than 0"),
        (processor(size={"shortest_edge": 10**9}), "size=.*: expected sides from 1 to 16384"),
        (processor(do_resize="yes"), "do_resize='yes': expected true or false"),
        (processor(resample="evil"), "resample='evil'"),
        (processor(image_processor_type="Evil"), "image_processor_type='Evil': expected CLIP's"),
        (processor(custom_processor="a/b"), "custom_processor='?a/b"),
        (tokenizer(chat_template="{{ x }}"), "chat_template.* is not allowed"),
        (tokenizer(padding_side="up"), "padding_side='up'"),
        (unknown_token, "tokenizer.json does not belong here: '</evil>' is token 1000000 of 4514"),
        (lambda folder: weights(folder, float("inf")), "adapter_model.safetensors is damaged: .* infinite or NaN"),
        (lambda folder: weights(folder, float("nan")), "adapter_model.safetensors is damaged: .* infinite or NaN"),
    ],
)
def test_a_hostile_checkpoint_is_refused_by_name_though_its_checksums_are_right(checkpoint, change, message):
    change(checkpoint)
    seal_task_checkpoint(checkpoint)
    with pytest.raises(ValueError, match=message) as error:
        load_task_checkpoint(checkpoint)
    assert str(checkpoint) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers=1000000000 is not allowed: expected 0 to"),
        ({"vision_config": {"image_size": 10**6}}, "image_size=1000000 is not allowed"),
        ({"auto_map": {"AutoModel": "evil.Evil"}}, "auto_map=.*it points outside it"),
        ({"attn_implementation": "evil/kernels"}, "attn_implementation='evil/kernels'.*it points outside it"),
        ({"text_config": {"_attn_implementation": "evil/kernels"}}, "_attn_implementation='evil/kernels'"),
        ({"quantization_config": {"quant_method": "x"}}, "quantization_config=.*it points outside it"),
        ({"vision_config": {"hidden_act": "evil"}}, "hidden_act='evil' is not an activation"),
        ({"logit_scale_init_value": float("inf")}, "logit_scale_init_value=inf: expected a finite number"),
    ],
)
def test_the_configuration_of_a_base_model_is_bounded_before_a_model_is_made(checkpoint, tmp_path, changes, message):
    base = Path(shutil.copytree(sample_path("mini-clip"), tmp_path / "base"))
    content = json.loads((base / "config.json").read_text())
    for key, value in changes.items():
        content[key] = {**content[key], **value} if isinstance(content.get(key), dict) else value
    (base / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load_task_checkpoint(checkpoint, base_model=base)


def test_a_base_model_of_no_numbers_is_refused(checkpoint, tmp_path):
    base = Path(shutil.copytree(sample_path("mini-clip"), tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    tensors["text_projection.weight"][0, 0] = torch.nan
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="the base model '.*base' is damaged: text_projection.weight holds values"):
        load_task_checkpoint(checkpoint, base_model=base)


def test_what_is_known_passes():
    check_model_config(json.loads((sample_path("mini-clip") / "config.json").read_text()), "config.json")
    check_known({"a": [1, 2.5, None, True, "any text / at all"]}, "file")


def test_the_results_of_a_checkpoint_are_sealed(original, tmp_path):
    from transformers import AutoProcessor

    from hf_zocl.hub.checkpoint import save_task_checkpoint
    from tests.hub.checkpoints import adapted_classifier

    folder = save_task_checkpoint(
        tmp_path, adapted_classifier(), AutoProcessor.from_pretrained(sample_path("mini-clip")), task_info(),
        {"recipe": {}, "last": 0.5},
    )  # fmt: skip
    load_task_checkpoint(folder)
    change_json(folder / "results.json", last=0.9)
    with pytest.raises(ValueError, match="results.json is damaged"):
        load_task_checkpoint(folder)


def test_what_this_package_did_not_write_is_not_pushed(checkpoint, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("x")
    written = set(public_files(checkpoint, "me/repo"))
    for name in (".env", "notes.md", "id_rsa", "train.log", "data.json", ".eval_results/x.txt", "sub/README.md"):
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_text("secret")
    (checkpoint / "linked").symlink_to(secret)
    assert set(public_files(checkpoint, "me/repo")) == written
    assert {"task.json", "README.md", "adapter_model.safetensors", "tokenizer.json"} <= written


@pytest.mark.parametrize("name", ["accuracy_matrix.png", "README.md", "results.json", ".eval_results/a.yaml"])
def test_a_link_is_not_followed_to_be_pushed(checkpoint, tmp_path, name):
    secret = tmp_path / "secret"
    secret.write_text("{}")
    (checkpoint / name).parent.mkdir(exist_ok=True)
    (checkpoint / name).unlink(missing_ok=True)
    (checkpoint / name).symlink_to(secret)
    with pytest.raises(ValueError, match=f"{name} does not belong here: it is a link out of the checkpoint's folder"):
        public_files(checkpoint, "me/repo")


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "{}", "[]", '{"repo_id": 3}', '{"repo_id": "a", "pending": [1]}', '{"repo_id": "a", "x": 1}'],
)
def test_a_queue_of_a_wrong_kind_is_refused_by_name(tmp_path, text):
    (tmp_path / "push_queue.json").write_text(text)
    with pytest.raises(ValueError, match="push_queue.json: expected a queue of tasks to push"):
        PushQueue.read(tmp_path)
