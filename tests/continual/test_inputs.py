"""What a dataset says is what a model is trained and tested on: folders, digits, commas, images in both splits."""

import io
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage
from transformers import AutoProcessor

from hf_zocl.checks import WrongTypeError
from hf_zocl.data.image_folders import image_folder_files
from hf_zocl.data.images import PixelCodec
from hf_zocl.data.stream import TaskStream
from hf_zocl.models.pixels import eight_bits
from hf_zocl.sample import sample_path


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def picture(seed: int) -> PILImage.Image:
    return PILImage.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8))


def folder(root: Path, folders, images: int = 2) -> str:
    for place, name in enumerate(folders):
        (root / name).mkdir(parents=True)
        for number in range(images):
            picture(100 * place + number).save(root / name / f"{number}.png")
    return str(root)


def both(names) -> list[str]:
    return [f"{split}/{name}" for split in ("train", "test") for name in names]


def paths(images: Dataset) -> set[str]:
    return {row["path"] for row in images.cast_column("image", Image(decode=False))["image"]}


def split(labels, first: int, feature=None) -> Dataset:
    columns = {"image": [picture(first + row) for row in range(len(labels))], "label": list(labels)}
    return Dataset.from_dict(columns, Features({"image": Image(), "label": feature or Value("int64")}))


def dataset(labels=(0, 1, 2, 3), feature=None) -> DatasetDict:
    return DatasetDict(train=split(labels, 0, feature), test=split(labels, 1000, feature))


# Folders


@pytest.mark.parametrize("name", ["train", "test", "val", "train-station", "training", "[x]"])
def test_a_class_may_be_called_like_a_split(tmp_path, name):
    root = folder(tmp_path / "data [v2]", both([name, "bus", "car"]))
    (task,) = TaskStream.from_dataset(root, increment=3, class_order_seed=None)
    assert set(task.class_names) == {name.replace("_", " "), "bus", "car"}
    assert all("/train/" in path.removeprefix(root) and len(paths(task.train)) == 6 for path in paths(task.train))
    assert {path.removeprefix(root).split("/")[1] for path in paths(task.train)} == {"train"}
    assert {path.removeprefix(root).split("/")[1] for path in paths(task.test)} == {"test"}


def test_folders_of_classes_without_splits_are_all_classes_though_one_is_called_train(tmp_path):
    root = folder(tmp_path / "flat", ["train", "bus", "car"], images=4)
    stream = TaskStream.from_dataset(root, increment=3, test_fraction=0.25, class_order_seed=None)
    assert stream.class_names == ("bus", "car", "train")
    assert [len(stream[0].train), len(stream[0].test)] == [9, 3]


@pytest.mark.parametrize("name", ["train", "test"])
def test_a_class_may_be_called_like_a_split_in_a_folder_of_several(tmp_path, name):
    root = folder(tmp_path, both(["vehicles/" + name, "vehicles/bus", "animals/cat"]))
    (task,) = TaskStream.from_dataset(root, increment=3, class_order_seed=None)
    assert set(task.class_names) == {name, "bus", "cat"}
    for images, split in ((task.train, "train"), (task.test, "test")):
        names = images.features["label"].names
        rows = images.cast_column("image", Image(decode=False))
        places = [row["image"]["path"].removeprefix(root).split("/") for row in rows]
        assert {place[1] for place in places} == {split} and len(images) == 6
        assert [place[3] for place in places] == [names[label] for label in rows["label"]]


def test_folders_of_several_classes_without_splits_are_all_classes(tmp_path):
    root = folder(tmp_path, ["vehicles/train", "vehicles/bus", "animals/cat"], images=4)
    stream = TaskStream.from_dataset(root, increment=3, test_fraction=0.25, class_order_seed=None)
    assert stream.class_names == ("bus", "cat", "train")
    assert [len(stream[0].train), len(stream[0].test)] == [9, 3]


@pytest.mark.parametrize(
    "folders",
    [
        ["some/train/cat", "some/test/cat"],  # splits in a folder of their own
        ["cat/train", "cat/test", "dog/train", "dog/test"],  # splits within the classes
        ["photos/train/cat", "photos/test/cat", "sketches/train/cat", "sketches/test/cat"],
        ["train/cat", "train/animals/dog", "test/cat"],  # classes at two depths
        ["train", "test"],
    ],
)
def test_folders_of_other_kinds_are_left_to_datasets(tmp_path, folders):
    assert image_folder_files(folder(tmp_path, folders)) is None


def test_an_empty_folder_is_no_class(tmp_path):
    root = folder(tmp_path, both(["train", "bus"]))
    (tmp_path / "train" / "empty").mkdir()
    assert TaskStream.from_dataset(root, increment=2)[0].train.features["label"].names == ["bus", "train"]


def test_a_folder_that_may_be_a_split_or_hold_classes_is_refused(tmp_path):
    root = folder(tmp_path, ["train/steam", "train/diesel", "boat/sail"])
    with pytest.raises(
        ValueError, match="its folder 'train' may be a split, or hold classes as 'boat' does; expected"
    ):
        TaskStream.from_dataset(root, increment=3, test_fraction=0.5)


def test_a_link_to_a_folder_above_itself_ends(tmp_path):
    root = folder(tmp_path, both(["bus", "car"]))
    (tmp_path / "train" / "again").symlink_to(tmp_path)
    assert image_folder_files(root) is None


@pytest.mark.parametrize("depth", ["", "animals/"])
def test_classes_whose_folders_are_links_count(tmp_path, depth):
    names = [f"{depth}{name}" for name in ("cat", "dog", "[ox]")]
    root, elsewhere = (Path(folder(tmp_path / where, both(names))) for where in ("data", "elsewhere"))
    for split in ("train", "test"):
        for linked, kept in (("eel", "dog"), ("fox", "[ox]")):
            (root / split / depth / linked).symlink_to(elsewhere / split / depth / kept)
    for number, path in enumerate(elsewhere.rglob("*.png")):  # other images than the classes' own
        picture(5000 + number).save(path)
    (task,) = TaskStream.from_dataset(root, increment=5, class_order_seed=None)
    assert task.class_names == ("[ox]", "cat", "dog", "eel", "fox")
    assert np.bincount(task.train["label"]).tolist() == np.bincount(task.test["label"]).tolist() == [2] * 5
    (root / "test" / depth / "fox").rename(root / "test" / depth / "f*x")
    with pytest.raises(ValueError, match=r"its folder '.*/f\*x' is a link.*rename it"):
        TaskStream.from_dataset(root, increment=5)


def test_classes_whose_folders_are_all_links_count(tmp_path):
    elsewhere = Path(folder(tmp_path / "elsewhere", both(["cat", "dog"])))
    for split in ("train", "test"):
        (tmp_path / "data" / split).mkdir(parents=True)
        for name in ("cat", "dog"):
            (tmp_path / "data" / split / name).symlink_to(elsewhere / split / name)
    stream = TaskStream.from_dataset(tmp_path / "data", increment=2)
    assert sorted(stream.class_names) == ["cat", "dog"] and len(stream[0].train) == len(stream[0].test) == 4


def test_one_file_in_both_splits_is_refused_by_name(tmp_path):
    root = Path(folder(tmp_path / "data", both("ab")))
    (root / "test" / "a" / "again.png").write_bytes((root / "train" / "b" / "1.png").read_bytes())
    with pytest.raises(ValueError, match=r"train/b/1.png.* and .*test/a/again.png.* are the same image; 1 of 5 test"):
        TaskStream.from_dataset(str(root), increment=2)


def test_where_a_folder_is_taken_for_a_split_the_way_out_is_said(tmp_path):
    root = folder(tmp_path, ["some/train/bus", "some/train/train", "some/test/bus", "some/test/train"])
    with pytest.raises(ValueError, match=r"/train/\d.png is in both splits, because .*like train/CLASS/1.png"):
        TaskStream.from_dataset(root, increment=2)


def test_one_content_in_both_splits_is_refused_unless_it_was_published_so(caplog):
    data = DatasetDict(train=split([0, 1, 0, 1], 0), test=split([1, 0], 3))
    with pytest.raises(
        ValueError, match="row 3 of split 'train' and row 0 of split 'test' are the same image; 1 of 2"
    ):
        TaskStream.from_dataset(data, increment=2)
    assert len(TaskStream.from_dataset(data, increment=2, allow_shared_images=True)[0].test) == 2
    assert "are the same image" in caplog.text


def test_images_of_one_size_and_one_beginning_are_no_one_image():
    one, other = (np.zeros((64, 64, 3), dtype=np.uint8) for _ in range(2))
    other[32, 32] = 1
    files = []
    for array in (one, other):
        file = io.BytesIO()
        PILImage.fromarray(array).save(file, "BMP")
        files.append({"bytes": file.getvalue(), "path": None})
    assert len(files[0]["bytes"]) == len(files[1]["bytes"])
    features = Features({"image": Image(), "label": Value("int64")})
    rows = [Dataset.from_dict({"image": [f, {"bytes": b"x" * n, "path": None}], "label": [0, 1]}, features)
            for n, f in enumerate(files, start=3)]  # fmt: skip
    assert TaskStream.from_dataset(DatasetDict(train=rows[0], test=rows[1]), increment=2)


# Names


def test_folders_of_digits_are_in_numeric_order(tmp_path):
    words = "zero one two three four five six seven eight nine ten eleven".split()
    root = folder(tmp_path / "digits", both([str(number) for number in range(12)]), images=1)
    stream = TaskStream.from_dataset(root, increment=12, class_order_seed=None, class_names=words)
    names = stream[0].train.features["label"].names
    assert names == [str(number) for number in range(12)] and stream.class_names == tuple(words)
    for images in (stream[0].train, stream[0].test):
        rows = images.cast_column("image", Image(decode=False))
        assert [Path(row["path"]).parent.name for row in rows["image"]] == [names[label] for label in rows["label"]]


def test_strings_of_digits_are_in_numeric_order():
    strings = ["10", "9", "1", "-2"]
    stream = TaskStream.from_dataset(dataset(strings, Value("string")), increment=4, class_order_seed=None)
    assert stream.class_names == ("-2", "1", "9", "10")
    assert list(stream[0].train["label"]) == [3, 2, 1, 0]


@pytest.mark.parametrize("names", [["10", "2", "1"], ["1", "10", "2"]])
def test_the_ids_of_a_dataset_in_memory_are_kept(names):
    """`class_names` and `class_order` go by them, and whoever gives them has seen them."""
    data = dataset((0, 1, 2), ClassLabel(names=names))
    assert TaskStream.from_dataset(data, increment=3, class_order_seed=None).class_names == tuple(names)
    given = [f"flower {name}" for name in names]
    stream = TaskStream.from_dataset(data, increment=1, class_order=[1, 2, 0], class_names=given)
    assert stream.class_names == (given[1], given[2], given[0])
    assert [task.train_rows.tolist() for task in stream] == [[1], [2], [0]]


def test_a_comma_cuts_a_name_only_where_names_are_lists_of_synonyms(monkeypatch):
    names = ["tench, Tinca tinca", "1,000 yen"]
    data = dataset((0, 1), ClassLabel(names=names))
    options = {"increment": 2, "class_order_seed": None}
    assert TaskStream.from_dataset(data, **options).class_names == tuple(names)
    for name, cut in (("ILSVRC/imagenet-1k", True), ("timm/imagenet-1k-wds", True), ("someone/not-imagenet", False)):
        stream = TaskStream.from_dataset(data, dataset_id=name, **options)
        assert stream.class_names == (("tench", "1") if cut else tuple(names))


# Types


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_names": [1, 2, 3, 4]}, r"class_names\[0\]=1: expected text, got int"),
        ({"class_names": "abcd"}, "class_names='abcd': expected a list of texts, got str"),
        ({"class_names": ["a", "b", "c", "\ud800"]}, r"class_names\[3\]='\\ud800': it contains half a character"),
        ({"class_order": ["a"]}, r"class_order\[0\]='a': expected a label id, got str"),
        ({"class_order_seed": "x"}, "class_order_seed='x': expected a whole number"),
        ({"class_order_seed": -1}, "class_order_seed=-1: expected a whole number from 0"),
        ({"seed": -1}, "seed=-1: expected a whole number from 0"),
        ({"increment": "2"}, "increment='2': expected a whole number"),
        ({"increment": True}, "increment=True: expected a whole number"),
        ({"max_train_images_per_class": 1.5}, "max_train_images_per_class=1.5: expected at least 1"),
        ({"test_fraction": "0.2"}, "test_fraction='0.2': expected a share"),
        ({"test_fraction": 0.2}, "test_fraction=0.2 takes at least one image of every class"),
    ],
)
def test_a_wrong_argument_is_an_error_that_names_it(options, message):
    with pytest.raises(ValueError, match=message) as error:
        TaskStream.from_dataset(dataset(), **{"increment": 2, **options})
    is_type = "got" in message or "'" in message.split(":")[0] or "True" in message or "1.5" in message
    assert isinstance(error.value, TypeError) == (is_type and "half" not in message)
    assert not isinstance(error.value, TypeError) or isinstance(error.value, WrongTypeError)


# Tasks of a single class


def test_a_task_of_one_class_is_trained_among_those_seen_or_refused():
    stream = TaskStream.from_dataset(dataset(), initial_increment=2, increment=1, class_order_seed=None)
    assert [stream.training_classes(task) for task in (1, 2, 3)] == [
        (("0", "1"), 0), (("0", "1", "2"), 0), (("0", "1", "2", "3"), 0),
    ]  # fmt: skip
    alone = TaskStream.from_dataset(dataset(), increment=1, class_order_seed=None)
    with pytest.raises(
        ValueError, match="task 1 of .* has the single class '0', and it is the first.*initial_increment"
    ):
        alone.training_classes(1)
    own = TaskStream.from_dataset(dataset(), initial_increment=2, increment=1, scenario="task")
    with pytest.raises(ValueError, match="scenario='task' adds no others"):
        own.training_classes(2)


# Images of more than 8 bits

RAMP = np.tile(np.linspace(0, 1, 64), (64, 1))


def pixels(array: np.ndarray, kind: str) -> np.ndarray:
    file = io.BytesIO()
    PILImage.fromarray(array).save(file, kind)
    decoded = Image().decode_example({"bytes": file.getvalue(), "path": None})
    codec = PixelCodec(AutoProcessor.from_pretrained(sample_path("mini-clip")).image_processor)
    return np.frombuffer(codec.pixels(decoded), np.uint8).astype(int)


@pytest.mark.parametrize(
    ("array", "kind"),
    [
        ((RAMP * 65535).astype(np.uint16), "PNG"),
        ((RAMP * 65535).astype(np.uint16), "TIFF"),
        ((RAMP * 65535).astype(np.int32), "TIFF"),
        (RAMP.astype(np.float32), "TIFF"),
    ],
    ids=["16-bit PNG", "16-bit TIFF", "32-bit TIFF", "float TIFF"],
)
def test_images_of_more_bits_look_as_those_of_eight(array, kind):
    expected = pixels(np.rint(RAMP * 255).astype(np.uint8), "PNG")
    assert np.abs(pixels(array, kind) - expected).max() <= 1


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (RAMP.astype(np.float32) * 255, "floats from 0 to 255; expected 0 to 1"),
        (RAMP.astype(np.float32) - 0.5, "floats from -0.5 to 0.5; expected 0 to 1"),
        (np.full((4, 4), np.nan, np.float32), "floats from nan to nan"),
        (np.full((4, 4), 70000, np.int32), "whole numbers from 70000 to 70000; expected 0 to 65535"),
    ],
)
def test_images_of_an_unknown_scale_are_refused(array, message):
    with pytest.raises(ValueError, match=message):
        eight_bits(PILImage.fromarray(array))


def test_images_of_eight_bits_stay_as_they_are():
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK"):
        image = PILImage.new(mode, (4, 4))
        assert eight_bits(image) is image


def test_a_processor_whose_images_differ_in_size_is_refused():
    processor = AutoProcessor.from_pretrained(sample_path("mini-clip")).image_processor
    processor.do_center_crop = False
    with pytest.raises(ValueError, match="images of several sizes .*do_center_crop=False"):
        PixelCodec(processor)
