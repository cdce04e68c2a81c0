"""Images decoded once: bit for bit what the processor makes, cached, and corrupt ones named or left out."""

import io
import logging
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PILImage
from torch.utils.data import DataLoader
from transformers import AutoProcessor

from hf_zocl.data.fingerprint import stream_digest
from hf_zocl.data.images import ImageCollator, LazyImages, PixelCodec, prepare_images
from hf_zocl.data.stream import TaskStream
from hf_zocl.sample import sample_path


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(sample_path("mini-clip"))


def png(seed: int, mode: str = "RGB") -> bytes:
    size = np.random.default_rng(seed)
    array = size.integers(0, 256, (20 + seed % 30, 50 - seed % 20, 3), dtype=np.uint8)
    file = io.BytesIO()
    PILImage.fromarray(array).convert(mode).save(file, "PNG")
    return file.getvalue()


def dataset(corrupt: tuple[int, ...] = (), count: int = 24) -> DatasetDict:
    """Images of several sizes and modes, of three classes; those in the rows of `corrupt` cannot be decoded."""
    images = [{"bytes": png(row, ("RGB", "L", "RGBA")[row // 3 % 3]), "path": None} for row in range(count)]
    for row in corrupt:
        images[row]["bytes"] = images[row]["bytes"][:60]
    features = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog", "ship"])})
    rows = {"image": images, "label": [row % 3 for row in range(count)]}
    split = Dataset.from_dict(rows, features=features)
    others = [{"bytes": png(1000 + row), "path": None} for row in range(count)]
    good = Dataset.from_dict({**rows, "image": others}, features)
    return DatasetDict(train=split, test=good)


def stream(**options) -> TaskStream:
    return TaskStream.from_dataset(dataset(**options), increment=2, class_order=[2, 0, 1], name="pets")


def batches(images, processor, task, codec=None) -> list[dict[str, torch.Tensor]]:
    collator = ImageCollator(processor, task.arrival_labels, task.first_label, codec)
    return list(DataLoader(images, batch_size=5, collate_fn=collator))


@pytest.mark.parametrize("cache_gb", [1.0, 0.0])
def test_batches_are_the_processors_own_to_the_last_bit(processor, cache_gb):
    codec, tasks = PixelCodec(processor.image_processor), stream()
    prepared, skipped = prepare_images(tasks, codec, cache_gb)
    assert skipped == 0
    assert isinstance(prepared[0].train, Dataset if cache_gb else LazyImages)
    for task, ready in zip(tasks, prepared, strict=True):
        for one, other in (
            (task.train, ready.train),
            (task.test, ready.test),
        ):
            for expected, batch in zip(
                batches(one, processor, task), batches(other, processor, task, codec), strict=True
            ):
                assert torch.equal(expected["pixel_values"], batch["pixel_values"])
                assert torch.equal(expected["labels"], batch["labels"])


def test_test_images_of_several_tasks_go_task_by_task_with_and_without_a_cache(processor):
    codec, tasks = PixelCodec(processor.image_processor), stream()
    cached, lazy = (prepare_images(tasks, codec, gb)[0].seen_test(2) for gb in (1.0, 0.0))
    assert [row["label"] for row in cached] == [lazy[i]["label"] for i in range(len(lazy))]
    assert [row["image"] for row in cached] == [lazy[i]["image"] for i in range(len(lazy))]


def test_the_cache_is_an_arrow_file_that_a_second_run_finds(processor, tmp_path, monkeypatch):
    for name, split in dataset().items():
        split.to_parquet(str(tmp_path / f"{name}.parquet"))
    codec = PixelCodec(processor.image_processor)

    def prepare():
        return prepare_images(TaskStream.from_dataset(tmp_path, increment=3), codec)[0][0].train

    first = prepare()
    assert first.cache_files and first.cache_files[0]["filename"].endswith(".arrow")
    monkeypatch.setattr(PixelCodec, "pixels", lambda *_: pytest.fail("an image was decoded again"))
    assert prepare()["image"][:] == first["image"][:]


def test_images_are_decoded_by_several_processes(processor):
    codec, tasks = PixelCodec(processor.image_processor), stream()
    alone, together = (prepare_images(tasks, codec, workers=workers)[0] for workers in (0, 2))
    assert alone[0].train["image"][:] == together[0].train["image"][:]


@pytest.mark.parametrize("cache_gb", [1.0, 0.0])
def test_workers_load_the_same_batches(processor, cache_gb):
    codec = PixelCodec(processor.image_processor)
    task = prepare_images(stream(), codec, cache_gb)[0][0]
    collator = ImageCollator(processor, task.arrival_labels, task.first_label, codec)
    alone, workers = (DataLoader(task.train, 5, collate_fn=collator, num_workers=n) for n in (0, 2))
    for one, other in zip(alone, workers, strict=True):
        assert torch.equal(one["pixel_values"], other["pixel_values"]) and torch.equal(one["labels"], other["labels"])


@pytest.mark.parametrize("cache_gb", [1.0, 0.0])
def test_a_corrupt_image_is_an_error_that_names_its_row(processor, cache_gb):
    codec, tasks = PixelCodec(processor.image_processor), stream(corrupt=(10,))
    with pytest.raises(
        ValueError, match="pets, task 2, train images: the image in row 10 cannot be decoded .*skip_corrupt"
    ) as error:
        prepared, _ = prepare_images(tasks, codec, cache_gb)
        batches(prepared[1].train, processor, prepared[1], codec)
    assert "object at" not in str(error.value)


@pytest.mark.parametrize("cache_gb", [1.0, 0.0])
def test_a_missing_image_is_as_a_corrupt_one(processor, cache_gb):
    codec, data = PixelCodec(processor.image_processor), dataset()
    rows = {"image": data["train"]["image"][:], "label": data["train"]["label"][:]}
    rows["image"][10] = None
    data["train"] = Dataset.from_dict(rows, data["train"].features)
    tasks = TaskStream.from_dataset(data, increment=2, class_order=[2, 0, 1], name="pets")
    with pytest.raises(
        ValueError, match="pets, task 2, train images: the image in row 10 .*it is missing.*skip_corrupt"
    ):
        prepared, _ = prepare_images(tasks, codec, cache_gb)
        batches(prepared[1].train, processor, prepared[1], codec)
    prepared, skipped = prepare_images(tasks, codec, cache_gb, skip_corrupt=True)
    assert skipped == 1 and [len(task.train) for task in prepared] == [16, 7]


@pytest.mark.parametrize("cache_gb", [1.0, 0.0])
def test_a_dataset_that_leaves_decoding_to_its_user_is_decoded(processor, cache_gb):
    codec, data = PixelCodec(processor.image_processor), dataset()
    undecoded = data.cast_column("image", Image(decode=False))
    both = [TaskStream.from_dataset(each, increment=3) for each in (data, undecoded)]
    assert both[1][0].test[0]["image"].size == both[0][0].test[0]["image"].size
    own, other = (prepare_images(tasks, codec, cache_gb)[0][0].train for tasks in both)
    assert [own[row]["image"] for row in range(len(own))] == [other[row]["image"] for row in range(len(other))]


@pytest.mark.parametrize("cache_gb", [1.0, 0.0])
def test_skip_corrupt_leaves_corrupt_images_out_and_counts_them(processor, cache_gb, caplog):
    codec, tasks = PixelCodec(processor.image_processor), stream(corrupt=(10, 11))
    logging.getLogger("hf_zocl").propagate = True
    with caplog.at_level(logging.WARNING, logger="hf_zocl"):
        prepared, skipped = prepare_images(tasks, codec, cache_gb, skip_corrupt=True)
    assert skipped == 2
    assert [len(task.train) for task in prepared] == [15, 7]
    assert sum(len(batch["labels"]) for batch in batches(prepared[0].train, processor, prepared[0], codec)) == 15


@pytest.mark.parametrize("cache_gb", [1.0, 0.0])
def test_a_class_of_which_nothing_is_left_is_an_error(processor, cache_gb):
    codec, tasks = PixelCodec(processor.image_processor), stream(corrupt=tuple(range(1, 24, 3)))
    with pytest.raises(ValueError, match="skip_corrupt: pets, task 2, train images: no image of 'dog'"):
        prepare_images(tasks, codec, cache_gb, skip_corrupt=True)


def test_a_held_out_stream_without_training_images_is_prepared(processor):
    codec = PixelCodec(processor.image_processor)
    empty = stream().map_tasks(lambda task: replace(task, train=task.train.select([]), train_rows=None))
    for cache_gb, skip_corrupt in ((1.0, False), (0.0, True), (1.0, True)):
        prepared, _ = prepare_images(empty, codec, cache_gb, skip_corrupt)
        assert [(len(task.train), len(task.test)) for task in prepared] == [(0, 16), (0, 8)]


def on_disk() -> TaskStream:
    options = {"increment": 5, "max_train_images_per_class": 4, "max_test_images_per_class": 2}
    return TaskStream.from_dataset(str(sample_path("cifar10-sample")), **options)


def zero_half(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:200])


@pytest.mark.parametrize("damage", [zero_half, cut_short, lambda file: file.with_name(f"{file.name}.xxh3").unlink()])
def test_a_damaged_cache_is_made_anew(processor, damage, caplog):
    logging.getLogger("hf_zocl").propagate = True
    codec = PixelCodec(processor.image_processor)
    before = prepare_images(on_disk(), codec)[0]
    expected = [task.train["image"][:] for task in before]
    files = {
        Path(each["filename"]) for task in before for part in (task.train, task.test) for each in part.cache_files
    }
    assert len(files) == 4
    del before
    for file in files:
        damage(file)
    after = prepare_images(on_disk(), codec)[0]
    assert [task.train["image"][:] for task in after] == expected
    assert caplog.text.count("the cache of decoded images is damaged, or has no checksum; it is made again") == 4
    caplog.clear()
    assert [task.train["image"][:] for task in prepare_images(on_disk(), codec)[0]] == expected
    assert "made anew" not in caplog.text


def test_a_stream_that_is_only_tested_on_warns_of_no_damage(processor, caplog):
    logging.getLogger("hf_zocl").propagate = True
    tested = on_disk().map_tasks(lambda task: replace(task, train=task.train.select([]), train_rows=None))
    after, _ = prepare_images(tested, PixelCodec(processor.image_processor))
    assert [len(task.train) for task in after] == [0, 0]
    assert "damaged" not in caplog.text


def test_the_digest_of_a_stream_sees_images_and_labels_and_not_where_they_lie(tmp_path):
    one = stream_digest(stream())
    assert stream_digest(stream()) == one
    other = dataset()
    images = [
        *other["train"].cast_column("image", Image(decode=False))["image"][:-1],
        {"bytes": png(99), "path": None},
    ]
    other["train"] = Dataset.from_dict({"image": images, "label": other["train"]["label"][:]}, other["train"].features)
    assert stream_digest(TaskStream.from_dataset(other, increment=2, class_order=[2, 0, 1], name="pets")) != one
    assert stream_digest(TaskStream.from_dataset(dataset(), increment=2, class_order=[2, 1, 0], name="pets")) != one
    for place in ("here", "there"):
        for split, names in (("train", "cd"), ("test", "cd")):
            for row, name in enumerate(names):
                folder = tmp_path / place / split / name
                folder.mkdir(parents=True)
                (folder / "0.png").write_bytes(png(row + 2 * (split == "test")))
    moved = [stream_digest(TaskStream.from_dataset(str(tmp_path / p), increment=2)) for p in ("here", "there")]
    assert moved[0] == moved[1]
    file = tmp_path / "there" / "test" / "d" / "0.png"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert stream_digest(TaskStream.from_dataset(str(tmp_path / "there"), increment=2)) != moved[0]


def test_images_replaced_under_their_names_are_decoded_anew(tmp_path, processor):
    codec, rows = PixelCodec(processor.image_processor), "image,label\n"
    for row in range(6):
        PILImage.new("RGB", (32, 32), (10, 10, row)).save(tmp_path / f"{row}.png")
        rows += f"{tmp_path / f'{row}.png'},{'ab'[row % 2]}\n"
    (tmp_path / "rows.csv").write_text(rows)

    def first_image() -> np.ndarray:
        data = datasets.load_dataset("csv", data_files=str(tmp_path / "rows.csv"), split="train")
        data = DatasetDict(train=data, test=data).cast_column("image", Image())
        tasks = TaskStream.from_dataset(data, increment=2, class_order_seed=None, allow_shared_images=True)
        prepared, _ = prepare_images(tasks, codec)
        return np.asarray(prepared[0].train[0]["image"])

    before = first_image()
    assert np.array_equal(first_image(), before)
    for row in range(6):
        PILImage.new("RGB", (32, 32), (200, 10, row)).save(tmp_path / f"{row}.png")
    after = first_image()
    assert not np.array_equal(after, before)
