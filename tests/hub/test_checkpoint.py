"""Checkpoints saved, found and loaded: from a folder, from a run, and from the Hub's cache."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPProcessor, pipeline

from hf_zocl import load_task_checkpoint
from hf_zocl.continual.checkpoint_evaluation import evaluate_checkpoint
from hf_zocl.hub import seal_task_checkpoint
from hf_zocl.sample import sample_path
from tests.helpers import image_batch
from tests.hub.checkpoints import CLASSES, adapted_classifier, change_json, put_on_hub, save_checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of three tasks."""
    output_dir = tmp_path_factory.mktemp("run")
    for task in (1, 2, 3):
        save_checkpoint(output_dir, task)
    return output_dir


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (3, 40, 48, 3), dtype=np.uint8)
    return [Image.fromarray(image) for image in noise]


@pytest.fixture(scope="module")
def hub(run, tmp_path_factory) -> Path:
    """A cache with `user/base`, `user/stream` on top of it, and `user/whole`, whose base model lies beside."""
    cache, pushed = tmp_path_factory.mktemp("hub"), tmp_path_factory.mktemp("pushed")
    put_on_hub(cache, "user/base", main=sample_path("mini-clip"))
    for repository, base_model in {"user/stream": "user/base", "user/whole": "user/whole"}.items():
        folders = {}
        for task in (1, 2, 3):
            folder = folders[f"task_{task:02d}"] = pushed / repository / f"task-{task:02d}"
            shutil.copytree(run / folder.name, folder)
            change_json(folder / "adapter_config.json", base_model_name_or_path=base_model)
            change_json(folder / "task.json", base_model=base_model, base_model_is_local=False)
            if base_model == repository:
                for name in ("config.json", "model.safetensors"):
                    shutil.copyfile(sample_path("mini-clip") / name, folder / name)
            seal_task_checkpoint(folder)
        put_on_hub(cache, repository, main=folders["task_03"], **folders)
    return cache


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(image_batch()["pixel_values"]).logits


def test_a_checkpoint_holds_the_figure_the_card_and_a_checksum_of_every_file_that_is_loaded(run):
    names = {path.name for path in (run / "task-03").iterdir()}
    assert {"README.md", "accuracy_matrix.png", "task.json", "adapter_model.safetensors"} <= names
    task = json.loads((run / "task-03" / "task.json").read_text())
    assert {"adapter_config.json", "adapter_model.safetensors", "processor_config.json", "tokenizer.json"} <= set(
        task["files"]
    )
    assert task["files"]["tokenizer.json"]["bytes"] == (run / "task-03" / "tokenizer.json").stat().st_size


@pytest.mark.parametrize(
    "options",
    [{"adapter": "lora"}, {"adapter": "moe", "adapter_config": {"freeze_experts": 1}, "moe_router_per_task": True}],
)
def test_a_loaded_checkpoint_is_the_model_that_was_saved(tmp_path, options):
    expected = logits(adapted_classifier(**options).eval())
    model, _ = load_task_checkpoint(save_checkpoint(tmp_path, **options))
    assert torch.equal(logits(model), expected)


def test_best_is_the_task_with_the_greatest_gain_over_zero_shot(run, hub):
    assert load_task_checkpoint(run, task="best")[0].class_names == CLASSES[:4]
    assert load_task_checkpoint("user/stream", task="best", cache_dir=hub)[0].class_names == CLASSES[:4]
    shutil.copytree(run / "task-01", run / "task-01-copy")  # a name that is no task's
    assert load_task_checkpoint(run, task="best")[0].class_names == CLASSES[:4]


def test_a_run_folder_says_which_tasks_it_holds(run, tmp_path):
    with pytest.raises(ValueError, match="It holds task-01 to task-03: give task"):
        load_task_checkpoint(run)
    with pytest.raises(ValueError, match="holds no task checkpoints"):
        load_task_checkpoint(tmp_path, task="best")
    with pytest.raises(ValueError, match="task='last'"):
        load_task_checkpoint(run, task="last")


@pytest.mark.parametrize("repository", ["user/stream", "user/whole"])
def test_a_task_a_revision_and_the_newest_load_from_the_hub(run, hub, repository):
    expected = logits(load_task_checkpoint(run, task=3)[0])
    for which in ({"task": 3}, {"revision": "task-03"}, {}):
        model, processor = load_task_checkpoint(repository, **which, cache_dir=hub)
        assert torch.equal(logits(model), expected)
        assert isinstance(processor, CLIPProcessor)
    assert load_task_checkpoint(repository, task=1, cache_dir=hub)[0].class_names == CLASSES[:2]


def test_a_checkpoint_without_checksums_as_the_first_release_wrote_it_loads(run, tmp_path):
    folder = tmp_path / "old"
    shutil.copytree(run / "task-03", folder)
    task = json.loads((folder / "task.json").read_text())
    task = {name: value for name, value in task.items() if name not in ("files", "sha256", "task_titles", "scenario")}
    (folder / "task.json").write_text(json.dumps({**task, "format_version": 1}))
    assert torch.equal(logits(load_task_checkpoint(folder)[0]), logits(load_task_checkpoint(run, task=3)[0]))


def test_predict_takes_files_images_arrays_and_pixel_values(run, images, tmp_path):
    model, processor = load_task_checkpoint(run, task=3)
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    files = [tmp_path / "0.png", str(tmp_path / "1.png"), tmp_path / "2.png"]
    names, probabilities = model.predict(files)
    assert names == [CLASSES[i] for i in probabilities.argmax(dim=-1)]
    torch.testing.assert_close(probabilities.sum(dim=-1), torch.ones(3))
    pixel_values = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    for same in (images, [np.asarray(image) for image in images], pixel_values):
        assert torch.equal(model.predict(same)[1], probabilities)
    torch.testing.assert_close(model.predict(images, batch_size=2)[1], probabilities)
    torch.testing.assert_close(model.predict(files[0])[1], probabilities[:1])
    assert model.predict([])[0] == []


def test_predict_says_what_it_cannot_read(run, images):
    model, _ = load_task_checkpoint(run, task=1)
    with pytest.raises(ValueError, match="an array holds float64, expected bytes"):
        model.predict(np.zeros((4, 4, 3)))
    model.image_processor = None
    with pytest.raises(ValueError, match="set image_processor"):
        model.predict(images)


@pytest.mark.parametrize(
    ("repository", "revision"),
    [("user/whole", {"revision": "task-03"}), ("user/stream", {"adapter_kwargs": {"revision": "task-03"}})],
)
def test_transformers_loads_a_lora_checkpoint_from_the_hub_by_itself(hub, images, repository, revision):
    ours, _ = load_task_checkpoint(repository, task=3, cache_dir=hub)
    model = CLIPModel.from_pretrained(repository, **revision, cache_dir=hub)
    processor = CLIPProcessor.from_pretrained(repository, revision="task-03", cache_dir=hub)
    classify = pipeline(
        "zero-shot-image-classification",
        model=model,
        tokenizer=processor.tokenizer,
        image_processor=processor.image_processor,
    )
    names, probabilities = ours.predict(images)
    found = classify(images, candidate_labels=list(CLASSES), hypothesis_template="a photo of a {}.")
    assert [answer[0]["label"] for answer in found] == names
    scores = [{each["label"]: each["score"] for each in answer} for answer in found]
    expected = [dict(zip(CLASSES, row.tolist(), strict=True)) for row in probabilities]
    assert scores == [pytest.approx(row, abs=1e-5) for row in expected]


def test_a_base_model_that_has_moved_can_be_given(run, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(run / "task-03", folder)
    change_json(folder / "task.json", base_model="somewhere/clip")
    change_json(folder / "adapter_config.json", base_model_name_or_path=str(tmp_path / "gone"))
    seal_task_checkpoint(folder)
    with pytest.raises(ValueError, match="the base model .*gone"):
        load_task_checkpoint(folder)
    model, _ = load_task_checkpoint(folder, base_model=sample_path("mini-clip"))
    assert torch.equal(logits(model), logits(load_task_checkpoint(run, task=3)[0]))


def test_a_pickled_adapter_is_never_read(run, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(run / "task-03", folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    with pytest.raises(ValueError, match="adapter_model.safetensors is missing"):
        load_task_checkpoint(folder)


def test_a_pickled_base_model_is_never_read(run, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    shutil.copyfile(sample_path("mini-clip") / "config.json", base / "config.json")
    torch.save(load_file(sample_path("mini-clip") / "model.safetensors"), base / "pytorch_model.bin")
    with pytest.raises(ValueError, match="the base model .* cannot be read"):
        load_task_checkpoint(run, task=3, base_model=base)


def test_a_base_model_that_lacks_weights_is_refused(run, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    shutil.copyfile(sample_path("mini-clip") / "config.json", base / "config.json")
    tensors = load_file(sample_path("mini-clip") / "model.safetensors")
    tensors.pop("logit_scale")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="has no logit_scale"):
        load_task_checkpoint(run, task=3, base_model=base)


@pytest.mark.parametrize("name", ["/etc", "../base", "user/base/more", "tests", None, ["user/base"]])
def test_a_name_from_the_hub_never_becomes_a_path(hub, tmp_path, name):
    snapshots = hub / "models--user--stream" / "snapshots"
    source = next(path for path in snapshots.iterdir() if json.loads((path / "task.json").read_text())["task"] == 3)
    folder = tmp_path / "models--user--evil" / "snapshots" / "0"
    shutil.copytree(source, folder)
    change_json(folder / "adapter_config.json", base_model_name_or_path=name)
    seal_task_checkpoint(folder)
    with pytest.raises(ValueError, match=r"adapter_config\.json: .*(give|as) base_model"):
        load_task_checkpoint(folder)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("processor_config.json", {"auto_map": {"AutoProcessor": "evil.Evil"}}),
        ("processor_config.json", {"processor_class": "Evil"}),
        ("processor_config.json", {"audio_tokenizer": {"audio_tokenizer_name_or_path": "evil/model"}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}),
        ("tokenizer_config.json", {"tokenizer_class": "Evil"}),
        ("tokenizer_config.json", {"vocab_file": "../secret.json"}),
        ("tokenizer_config.json", {"tokenizer_file": "/etc/hostname"}),
        ("adapter_config.json", {"auto_mapping": {"base_model_class": "system", "parent_library": "os"}}),
        ("adapter_config.json", {"megatron_config": {"x": 1}}),
        ("adapter_config.json", {"runtime_config": {"path": "/etc"}}),
    ],
)
def test_what_names_code_or_another_place_is_refused_by_name(run, tmp_path, name, changes):
    folder = tmp_path / "checkpoint"
    shutil.copytree(run / "task-03", folder)
    (folder / "evil.py").write_text("raise SystemExit('it ran')\nclass Evil: ...\n")
    change_json(folder / name, **changes)
    seal_task_checkpoint(folder)
    with pytest.raises(ValueError, match=f"{name}: .*{min(changes)}"):
        load_task_checkpoint(folder)


def test_a_file_that_no_part_of_the_processor_reads_is_not_followed(run, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(run / "task-03", folder)
    (folder / "audio_tokenizer_config.json").write_text('{"audio_tokenizer_name_or_path": "evil/model"}')
    seal_task_checkpoint(folder)
    assert torch.equal(logits(load_task_checkpoint(folder)[0]), logits(load_task_checkpoint(run, task=3)[0]))


def test_a_damaged_checkpoint_is_not_measured(run, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(run / "task-03", folder)
    with (folder / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is damaged: it has 100 bytes, expected"):
        evaluate_checkpoint(folder, benchmark="cifar10-sample", max_test_images_per_class=1)


def test_the_code_of_the_documentation_runs(run, hub, images, tmp_path, monkeypatch):
    text = (Path(__file__).resolve().parents[2] / "docs" / "loading.md").read_text(encoding="utf-8")
    shutil.copytree(run, tmp_path / "runs" / "quickstart")
    for name in ("cat.png", "dog.png"):
        images[0].save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    names = {}
    for source in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(source.replace("user/quickstart", "user/stream").replace("user/stream", "user/whole"), names)
    assert names["names"] == load_task_checkpoint(run, task="best")[0].predict(images[:1] * 2)[0]
