"""The registry, and each benchmark's stream from a generated local dataset with the Hub's features."""

import logging
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

from hf_zocl.data.benchmarks import BENCHMARKS, Benchmark, get_benchmark
from hf_zocl.sample.pretraining import pretraining_rows


SHARED_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """What a test loads from a folder does not stay in the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def save(folder: Path, column: str = "img", splits=("train", "test"), images: int = 1, **labels: ClassLabel) -> Path:
    """So many images of every class a split, as parquet files in `folder`."""
    count = max(feature.num_classes for feature in labels.values()) * images
    columns = {name: [row % feature.num_classes for row in range(count)] for name, feature in labels.items()}
    (folder / "data").mkdir(parents=True)
    for number, name in enumerate(splits):
        images_ = {column: [PILImage.new("RGB", (2, 2), (number, row % 256, row // 256)) for row in range(count)]}
        data = Dataset.from_dict({**images_, **columns}, features=Features({column: Image(), **labels}))
        data.to_parquet(str(folder / "data" / f"{name}-00000-of-00001.parquet"))
    return folder


def save_imagenet_r(folder: Path) -> Path:
    """Ten images of every class in one split, with WordNet ids and names as strings."""
    wnids = [f"n{label:08}" for label in range(200)] * 10
    names = [f"great_{int(wnid[1:])}_name" for wnid in wnids]
    pictures = [PILImage.new("RGB", (2, 2), (row % 256, row // 256, 0)) for row in range(len(wnids))]
    rows = {"image": pictures, "wnid": wnids, "class_name": names}
    features = Features({"image": Image(), "wnid": datasets.Value("string"), "class_name": datasets.Value("string")})
    folder.mkdir(exist_ok=True)
    Dataset.from_dict(rows, features=features).to_parquet(str(folder / "test-00000-of-00001.parquet"))
    return folder


CLASSES = {
    "cifar10": 10, "cifar100": 100, "tiny-imagenet": 200, "tiny-imagenet-32": 200, "imagenet-r": 200, "cub-200": 200,
    "stanford-cars": 196, "food-101": 101, "aircraft": 100, "caltech101": 101, "dtd": 47, "eurosat": 10,
    "flowers102": 102, "mnist": 10, "oxford-pet": 37, "sun397": 397,
}  # fmt: skip


def base_of(name: str) -> str:
    """The dataset of a benchmark: the longest name there is that it starts with."""
    return max((dataset for dataset in CLASSES if name.startswith(dataset)), key=len)


def save_like_the_hub(name: str, folder: Path) -> Path:
    """A dataset with the splits, columns and number of classes that the benchmark's Hub copy has."""
    if name.startswith("imagenet-r"):
        return save_imagenet_r(folder)
    benchmark = BENCHMARKS[name]
    names = [f"{'n' if name.startswith('tiny') else 'class_'}{label:08}" for label in range(CLASSES[base_of(name)])]
    if name == "tiny-imagenet-32":
        names = [f"class_{label}" for label in range(200)]
    single = benchmark.test_fraction is not None
    splits = (benchmark.train_split,) if single else (benchmark.train_split, benchmark.test_split)
    label = {benchmark.label_column: ClassLabel(names=names)}
    return save(folder, benchmark.image_column, splits, images=5 if single else 1, **label)


# The first ten ids of each order, as its source has them.
PYCIL = {
    10: (4, 2, 7, 6, 0, 3, 5, 8, 9, 1),
    100: (68, 56, 78, 8, 23, 84, 90, 65, 74, 76),
    101: (68, 56, 78, 8, 23, 84, 90, 65, 74, 76),
    196: (59, 134, 162, 9, 42, 72, 118, 99, 109, 79),
    200: (168, 136, 51, 9, 183, 101, 171, 99, 42, 159),
}
TINY = (31, 40, 0, 112, 161, 138, 144, 72, 128, 71)  # n02123394 Persian cat, n02231487 stick insect, …
ORDERS = {
    "cifar10": PYCIL[10],
    "cifar100": PYCIL[100],
    "cifar100-moe-adapters": (87, 0, 52, 58, 44, 91, 68, 97, 51, 15),
    "tiny-imagenet": TINY,
    "tiny-imagenet-32": PYCIL[200],
    "imagenet-r": PYCIL[200],
    "cub-200": PYCIL[200],
    "stanford-cars": PYCIL[196],
    "food-101": PYCIL[101],
}
SIZES = {
    "cifar10": [2] * 5, "cifar100": [10] * 10, "cifar100-inc2": [2] * 50, "cifar100-inc5": [5] * 20,
    "cifar100-inc10": [10] * 10, "cifar100-inc20": [20] * 5, "cifar100-base50-inc2": [50] + [2] * 25,
    "cifar100-base50-inc5": [50] + [5] * 10, "cifar100-base50-inc10": [50] + [10] * 5,
    "cifar100-moe-adapters": [10] * 10, "tiny-imagenet": [20] * 10, "tiny-imagenet-inc20": [20] * 10,
    "tiny-imagenet-base100-inc5": [100] + [5] * 20, "tiny-imagenet-base100-inc10": [100] + [10] * 10,
    "tiny-imagenet-base100-inc20": [100] + [20] * 5, "tiny-imagenet-32": [20] * 10, "imagenet-r": [20] * 10,
    "imagenet-r-inc10": [10] * 20, "imagenet-r-inc20": [20] * 10, "cub-200": [20] * 10,
    "stanford-cars": [20] * 9 + [16], "food-101": [21] + [20] * 4,
}  # fmt: skip
MTIL = ("aircraft", "caltech101", "cifar100", "dtd", "eurosat", "flowers102", "food-101", "mnist", "oxford-pet",
        "stanford-cars", "sun397")  # fmt: skip
SINGLE = [name for name, one in BENCHMARKS.items() if isinstance(one, Benchmark) and name != "cifar10-sample"]


@pytest.fixture
def cifar10(tmp_path) -> Path:
    return save(tmp_path / "cifar10", label=ClassLabel(names=CIFAR10))


@pytest.fixture
def cifar100(tmp_path) -> Path:
    fine = [f"class_{label}" for label in range(100)]
    return save(tmp_path / "cifar100", fine_label=ClassLabel(names=fine), coarse_label=ClassLabel(num_classes=20))


def test_every_benchmark_is_registered_under_its_name():
    assert all(BENCHMARKS[name].name == name == get_benchmark(name).name for name in BENCHMARKS)
    assert set(SIZES) | set(MTIL) | {"cifar10-sample", "mtil", "mtil-order-2"} == set(BENCHMARKS)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_has_prompts_and_a_source(name):
    prompts = BENCHMARKS[name].prompt_template
    for prompt in (prompts,) if isinstance(prompts, str) else prompts:
        assert "cat" in prompt.format("cat") and prompt.count("{}") == 1
    assert re.search(r"(19|20)\d\d", BENCHMARKS[name].source)  # a year, of whatever it cites


@pytest.mark.parametrize("name", SINGLE)
def test_every_benchmark_builds_its_stream_from_a_local_folder_in_the_order_its_source_states(name, tmp_path, caplog):
    folder = save_like_the_hub(name, tmp_path / "data-of-the-benchmark")
    with caplog.at_level(logging.WARNING):
        stream = get_benchmark(name).stream(folder)
    divides = len(set(SIZES.get(name, [0])[1:])) <= 1
    assert bool(caplog.records) != divides
    assert (stream.name, stream.dataset_id) == (name, BENCHMARKS[name].dataset_id)
    assert [len(task.class_ids) for task in stream] == SIZES.get(name, [CLASSES[base_of(name)]])
    own_order = tuple(range(10))
    expected = ORDERS.get(name) or ORDERS.get(base_of(name), own_order)
    assert stream.class_order[:10] == expected
    assert len(set(stream.class_names)) == len(stream.class_order)
    assert all(len(task.train) and len(task.test) for task in stream)


@pytest.fixture(scope="module")
def mtil(tmp_path_factory) -> Path:
    """A local copy of every dataset of MTIL, each in a folder of its name."""
    folder = tmp_path_factory.mktemp("mtil")
    for name in MTIL:
        save_like_the_hub(name, folder / name)
    return folder


ORDER_II = ("stanford-cars", "food-101", "mnist", "oxford-pet", "flowers102", "sun397", "aircraft", "caltech101",
            "dtd", "eurosat", "cifar100")  # fmt: skip


@pytest.mark.parametrize(("name", "order"), [("mtil", MTIL), ("mtil-order-2", ORDER_II)])
def test_mtil_is_a_stream_of_whole_datasets_each_with_its_own_classes_and_prompts(name, order, mtil):
    stream = get_benchmark(name).stream(mtil)
    assert stream.scenario == "cross-dataset"
    assert tuple(task.title for task in stream) == order
    assert [len(task.class_ids) for task in stream] == [CLASSES[dataset] for dataset in order]
    pets = stream[order.index("oxford-pet")]
    assert pets.prompt_template == "a photo of a {}, a type of pet."
    assert len(stream[order.index("cifar100")].prompt_template) == 18
    assert pets.arrival_labels.tolist() == list(range(pets.first_label, pets.first_label + 37))


def test_mtil_says_what_does_not_apply_to_it(mtil):
    with pytest.raises(ValueError, match="'mtil' is a stream of whole datasets: increment=10 does not apply"):
        get_benchmark("mtil").stream(mtil, increment=10)


def test_mtil_names_the_dataset_that_is_missing(tmp_path):
    with pytest.raises(ValueError, match="aircraft': there is no such folder for benchmark 'aircraft'"):
        get_benchmark("mtil").stream(tmp_path)


def test_a_local_benchmark_asks_for_its_folder():
    with pytest.raises(ValueError, match="'tiny-imagenet-32' is a local dataset: give its folder as dataset_path"):
        get_benchmark("tiny-imagenet-32").stream()


def test_the_two_orders_of_tiny_imagenet_name_the_same_classes_as_their_sources():
    names = BENCHMARKS["tiny-imagenet"].class_names
    order = BENCHMARKS["tiny-imagenet"].class_order
    # By line of wnids.txt the source's order starts 131, 181, 22, 172, 144.
    expected = ["Persian cat", "stick insect", "goldfish", "kimono", "teddy bear"]
    assert [names[label] for label in order[:5]] == expected
    assert sorted(order) == list(range(200))


def test_real_tiny_imagenet_32_has_all_classes_and_the_images_that_the_embedded_model_has_not_seen():
    folder = SHARED_DATA / "tiny-imagenet-32"
    if not folder.is_dir():
        pytest.skip("the shared datasets are not on this machine")
    stream = get_benchmark("tiny-imagenet-32").stream(folder)
    assert [len(task.train) for task in stream] == [2000] * 10
    assert [len(task.test) for task in stream] == [1000] * 10
    assert stream[0].class_names[0] == "umbrella"
    labels = datasets.load_dataset(str(folder), split="train").with_format("numpy")["label"][:]
    seen = pretraining_rows(labels)
    assert len(seen) == 80_000
    assert set(np.bincount(labels[seen])) == {400}
    rows = np.concatenate([task.train_rows for task in stream])
    assert len(np.intersect1d(rows, seen)) == 0


def test_the_rows_of_pretraining_are_four_fifths_of_every_class_and_always_the_same():
    labels = np.arange(2000) % 4
    rows = pretraining_rows(labels)
    assert np.bincount(labels[rows]).tolist() == [400] * 4
    assert np.setdiff1d(np.arange(2000), rows)[:8].tolist() == [11, 14, 17, 19, 25, 31, 36, 46]


def test_an_unknown_name_is_an_error_with_the_close_ones_and_all_others():
    with pytest.raises(
        ValueError, match="benchmark='cifar-100' is not registered. Did you mean 'cifar100'.*Expected one of "
    ):
        get_benchmark("cifar-100")


def test_an_unknown_name_like_no_other_lists_all():
    with pytest.raises(ValueError, match="registered. Expected one of 'cifar10', 'cifar10-sample', 'cifar100'"):
        get_benchmark("quickdraw-xyz")


def test_imagenet_r_is_split_eighty_to_twenty_class_by_class_and_named_by_its_own_column(tmp_path):
    stream = get_benchmark("imagenet-r").stream(save_imagenet_r(tmp_path))
    assert stream[0].class_names[0] == "great 168 name"
    assert [(len(task.train), len(task.test)) for task in stream] == [(160, 40)] * 10
    rows = [(set(task.train_rows.tolist()), set(task.test_rows.tolist())) for task in stream]
    assert not any(train & test for train, test in rows)
    assert [row % 200 for row in stream[0].test_rows.tolist()].count(168) == 2


def test_the_test_share_is_drawn_the_same_way_every_time(tmp_path):
    folder = save_imagenet_r(tmp_path)
    one, two = (get_benchmark("imagenet-r").stream(folder, seed=seed) for seed in (0, 1))
    assert [task.test_rows.tolist() for task in one] == [task.test_rows.tolist() for task in two]


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
    assert [len(task.train) for task in stream] == [800] * 5
    assert [len(task.test) for task in stream] == [100] * 5


def test_a_share_takes_the_place_of_a_benchmarks_test_split():
    (first, *_) = get_benchmark("cifar10-sample").stream(test_fraction=0.25, max_test_images_per_class=100)
    assert len(first.test_rows) == 100 * len(first.class_names) and not set(first.test_rows) & set(first.train_rows)


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
    stream = get_benchmark("cifar10").stream(cifar10, class_order=[9, 0, 3, 1], partial_order=True)
    assert stream.class_order == (9, 0, 3, 1)


def test_a_local_copy_that_does_not_fit_is_an_error(cifar10):
    with pytest.raises(ValueError, match="label_column='fine_label' is not a column"):
        get_benchmark("cifar100").stream(cifar10)


def test_real_cifar10_has_ten_thousand_training_images_a_task():
    if not (SHARED_DATA / "cifar10").is_dir():
        pytest.skip("the shared datasets are not on this machine")
    stream = get_benchmark("cifar10").stream(SHARED_DATA / "cifar10")
    assert [len(task.train) for task in stream] == [10_000] * 5
    assert [len(task.test) for task in stream] == [2_000] * 5


def test_every_benchmark_is_in_the_documentation():
    text = (Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert [name for name in BENCHMARKS if f"| `{name}` |" not in text] == []
