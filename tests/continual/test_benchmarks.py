"""The registry, and each benchmark's stream from a generated local dataset with the Hub's features."""

import logging
from pathlib import Path

import datasets
import pytest
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

from hf_zocl.continual.benchmarks import BENCHMARKS, get_benchmark


SHARED_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """What a test loads from a folder does not stay in the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def save(folder: Path, column: str = "img", splits=("train", "test"), **labels: ClassLabel) -> Path:
    """One image of every class a split, as parquet files in `folder`."""
    count = max(feature.num_classes for feature in labels.values())
    columns = {column: [PILImage.new("RGB", (2, 2))] * count}
    columns |= {name: [row % feature.num_classes for row in range(count)] for name, feature in labels.items()}
    images = Dataset.from_dict(columns, features=Features({column: Image(), **labels}))
    (folder / "data").mkdir(parents=True)
    for name in splits:
        images.to_parquet(str(folder / "data" / f"{name}-00000-of-00001.parquet"))
    return folder


@pytest.fixture
def cifar10(tmp_path) -> Path:
    return save(tmp_path / "cifar10", label=ClassLabel(names=CIFAR10))


@pytest.fixture
def cifar100(tmp_path) -> Path:
    fine = [f"class_{label}" for label in range(100)]
    return save(tmp_path / "cifar100", fine_label=ClassLabel(names=fine), coarse_label=ClassLabel(num_classes=20))


def test_every_benchmark_is_registered_under_its_name():
    assert list(BENCHMARKS) == ["cifar10", "cifar10-sample", "cifar100", "tiny-imagenet", "imagenet-r"]
    assert all(BENCHMARKS[name].name == name == get_benchmark(name).name for name in BENCHMARKS)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_has_a_prompt_and_a_source(name):
    assert BENCHMARKS[name].prompt_template.format("cat").endswith("photo of a cat.")
    assert any(character.isdigit() for character in BENCHMARKS[name].source)  # a year, of whatever it cites


def test_an_unknown_name_is_an_error_with_the_close_ones_and_all_others():
    with pytest.raises(
        ValueError, match="benchmark='cifar-100' is not registered. Did you mean 'cifar100'.*There are "
    ):
        get_benchmark("cifar-100")


def test_an_unknown_name_like_no_other_lists_all():
    with pytest.raises(ValueError, match="registered. There are 'cifar10', 'cifar10-sample', 'cifar100'"):
        get_benchmark("mnist-xyz")


def test_cifar10_is_five_tasks_of_two_in_the_order_of_seed_1993(cifar10):
    stream = get_benchmark("cifar10").stream(cifar10)
    assert (stream.name, stream.dataset_id) == ("cifar10", "uoft-cs/cifar10")
    assert stream.class_order == (4, 2, 7, 6, 0, 3, 5, 8, 9, 1)
    assert [task.class_names for task in stream][:2] == [("deer", "bird"), ("horse", "frog")]
    assert [len(task.class_ids) for task in stream] == [2] * 5


def test_cifar100_is_ten_tasks_of_ten_fine_classes_in_the_order_of_seed_1993(cifar100):
    stream = get_benchmark("cifar100").stream(str(cifar100))
    assert stream.dataset_id == "uoft-cs/cifar100"
    assert stream.class_order[:10] == (68, 56, 78, 8, 23, 84, 90, 65, 74, 76)
    assert stream[0].class_names[:3] == ("road", "palm tree", "snake")
    assert [len(task.class_ids) for task in stream] == [10] * 10


def test_tiny_imagenet_is_ten_tasks_of_twenty_in_moe_adapters_order(tmp_path):
    wnids = [f"n{label:08}" for label in range(200)]
    folder = save(tmp_path, column="image", splits=("train", "valid"), label=ClassLabel(names=wnids))
    stream = get_benchmark("tiny-imagenet").stream(folder)
    assert stream.class_order[:10] == (31, 40, 0, 112, 161, 138, 144, 72, 128, 71)
    assert stream[0].class_names[:3] == ("Persian cat", "stick insect", "goldfish")
    assert [len(task.class_ids) for task in stream] == [20] * 10


def test_imagenet_r_is_split_eighty_to_twenty_class_by_class_and_named_by_its_own_column(tmp_path):
    wnids = [f"n{label:08}" for label in range(200)] * 10
    rows = {
        "image": [PILImage.new("RGB", (2, 2))] * 2000,
        "wnid": wnids,
        "class_name": [f"great_{int(wnid[1:])}_name" for wnid in wnids],
    }
    features = Features({"image": Image(), "wnid": datasets.Value("string"), "class_name": datasets.Value("string")})
    Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "test-00000-of-00001.parquet"))
    stream = get_benchmark("imagenet-r").stream(tmp_path)
    assert stream.class_order[:10] == (168, 136, 51, 9, 183, 101, 171, 99, 42, 159)
    assert stream[0].class_names[0] == "great 168 name"
    assert [(len(task.train), len(task.test)) for task in stream] == [(160, 40)] * 10
    assert len(set(stream.class_names)) == 200


def test_cifar100s_names_are_the_hubs_with_crab_spelt_right():
    names = BENCHMARKS["cifar100"].class_names
    assert len(set(names)) == 100
    assert list(names) == sorted(names)
    assert {26: names[26], 41: names[41], 81: names[81], 96: names[96]} == {
        26: "crab",
        41: "lawn mower",
        81: "streetcar",
        96: "willow tree",
    }


def test_the_sample_comes_from_the_package_and_has_no_hub_id():
    stream = get_benchmark("cifar10-sample").stream()
    assert (stream.name, stream.dataset_id) == ("cifar10-sample", None)
    assert stream[0].class_names == ("deer", "bird")
    assert [len(task.train) for task in stream] == [400] * 5
    assert [len(task.test) for task in stream] == [100] * 5


def test_without_a_path_the_hub_is_asked(monkeypatch):
    asked = []

    def load_dataset(*args, **more):
        asked.append((args, more))
        raise datasets.exceptions.DatasetNotFoundError("not here")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match="dataset='uoft-cs/cifar10'"):
        get_benchmark("cifar10").stream()
    assert asked == [(("uoft-cs/cifar10", None), {"revision": None})]


def test_a_path_that_does_not_exist_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ValueError, match="dataset_path='.*nowhere': there is no such folder for benchmark 'cifar10'"):
        get_benchmark("cifar10").stream(tmp_path / "nowhere")


def test_an_override_of_none_changes_nothing(cifar10):
    stream = get_benchmark("cifar10").stream(cifar10, increment=None, class_order_seed=None, seed=None)
    assert stream.class_order[:2] == (4, 2)
    assert len(stream) == 5


def test_an_increment_holds_for_the_first_task_too(cifar10):
    stream = get_benchmark("cifar10").stream(cifar10, increment=5)
    assert [len(task.class_ids) for task in stream] == [5, 5]


def test_an_initial_increment_of_ones_own(cifar10, caplog):
    with caplog.at_level(logging.WARNING):
        stream = get_benchmark("cifar10").stream(cifar10, initial_increment=4)
    assert [len(task.class_ids) for task in stream] == [4, 2, 2, 2]
    assert not caplog.records


def test_a_class_order_of_ones_own(cifar10):
    assert get_benchmark("cifar10").stream(cifar10, class_order=[9, 0, 3, 1]).class_order == (9, 0, 3, 1)


def test_a_local_copy_that_does_not_fit_is_an_error(cifar10):
    with pytest.raises(ValueError, match="label_column='fine_label' is not a column"):
        get_benchmark("cifar100").stream(cifar10)


def test_real_cifar10_has_ten_thousand_training_images_a_task():
    if not (SHARED_DATA / "cifar10").is_dir():
        pytest.skip("the shared datasets are not on this machine")
    stream = get_benchmark("cifar10").stream(SHARED_DATA / "cifar10")
    assert [len(task.train) for task in stream] == [10_000] * 5
    assert [len(task.test) for task in stream] == [2_000] * 5
