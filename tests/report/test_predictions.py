"""What a model said, worked out by hand: the file, the kinds of images, the gallery's choice, the confusion."""

import json

import numpy as np
import pytest

from hf_zocl.report.confusion import confusion
from hf_zocl.report.gallery import (
    IN_ALL,
    KINDS,
    PER_TASK,
    best_row,
    choose,
    gallery_bytes,
    kinds,
    read_gallery,
    row_png,
    small_image,
)
from hf_zocl.report.predictions import PredictionHistory
from tests.report.runs import random_history


@pytest.fixture
def history() -> PredictionHistory:
    """Two tasks of two classes, with four and two test images."""
    labels, zero_shot = np.array([0, 0, 1, 1, 2, 3]), np.array([1, 1, 0, 1, 2, 1])
    after = {1: np.array([0, 0, 0, 1]), 2: np.array([2, 0, 3, 1, 2, 2])}
    return PredictionHistory(np.array([4, 2]), labels, zero_shot, after)


def test_the_file_holds_the_same_and_is_the_same_every_time(history, tmp_path):
    history.write(tmp_path / "p.safetensors")
    read = PredictionHistory.read(tmp_path / "p.safetensors")
    assert read.to_bytes() == history.to_bytes() == (tmp_path / "p.safetensors").read_bytes()
    assert {task: said.tolist() for task, said in read.after.items()} == {1: [0, 0, 0, 1], 2: [2, 0, 3, 1, 2, 2]}
    assert list(read.up_to(1).after) == [1] and read.is_of([4, 2]) and not read.is_of([2, 4])


def test_a_number_takes_two_bytes():
    content = random_history(tasks=20, classes=10, images=50).to_bytes()
    numbers = 10_000 * 2 + sum(500 * task for task in range(1, 21))
    assert 2 * numbers < len(content) < 2 * numbers + 3000


@pytest.mark.parametrize("place", [-1, -40, 9])
def test_a_changed_byte_is_found(history, tmp_path, place):
    path = tmp_path / "p.safetensors"
    content = bytearray(history.to_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="p.safetensors: not the predictions of a run"):
        PredictionHistory.read(path)


def test_images_are_told_apart_by_what_became_of_them(history):
    assert {kind: places.tolist() for kind, places in kinds(history, 1).items()} == {
        "forgotten": [0],
        "learned": [1],
        "wrong": [2],
        "kept": [3],
    }
    assert {kind: places.tolist() for kind, places in kinds(history, 2).items()} == {
        "forgotten": [],
        "learned": [],
        "wrong": [1],
        "kept": [0],
    }
    assert history.up_to(0).after == {} and kinds(history.up_to(0), 1) == {}


def test_the_gallery_shows_the_forgotten_first_and_every_kind(history):
    assert choose(history, 2) == {1: [0, 1, 2, 3], 2: [1, 0]}
    large = random_history(tasks=3, classes=4, images=20)
    for task, places in choose(large, 3).items():
        found = kinds(large, task)
        assert len(places) == PER_TASK and len(set(places)) == PER_TASK
        here = {kind for kind in KINDS if set(places) & set(found[kind].tolist())}
        assert here == {kind for kind in KINDS if len(found[kind])}


def test_a_gallery_stays_small_however_many_tasks():
    chosen = choose(random_history(tasks=50, classes=2, images=10), 50)
    assert sum(map(len, chosen.values())) <= IN_ALL and min(map(len, chosen.values())) >= 1


def small(seed: int, side: int = 224) -> bytes:
    return small_image(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def test_what_was_said_is_read_with_the_images(history, tmp_path):
    path = tmp_path / "gallery.json"
    path.write_bytes(gallery_bytes({t: {p: small(p) for p in places} for t, places in choose(history, 2).items()}))
    found = read_gallery(path, history)
    first = found[1][0]
    assert (first.kind, first.label, first.said) == ("forgotten", 0, {0: 1, 1: 0, 2: 2})
    assert first.spans() == [(0, 0, 1), (1, 1, 0), (2, 2, 2)]
    assert found[1][1].spans() == [(0, 0, 1), (1, 2, 0)]
    assert best_row(found) == found[1]
    assert row_png(found[1], ["a", "b", "c", "$x$ <b>"]).startswith(b"\x89PNG")


def test_an_image_is_small():
    assert len(small(0)) < 8000  # noise, the hardest to compress


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"tasks": {"x": []}}', '{"tasks": {"1": [{"image": 0, "webp": "AA=="}]}}']
)
def test_a_damaged_gallery_is_named(content, history, tmp_path):
    (tmp_path / "gallery.json").write_text(content)
    with pytest.raises(ValueError, match="gallery.json is damaged, or not the gallery of this run"):
        read_gallery(tmp_path / "gallery.json", history)


def test_confusion_is_counted_and_grouped_by_task(history):
    found = confusion(history, ["a", "b", "c", "d", "known before"])
    assert found.names == ("a", "b", "c", "d") and found.groups == ((1, 0, 2), (2, 2, 2))
    expected = [[0.5, 0, 0.5, 0, 0], [0, 0.5, 0, 0.5, 0], [0, 0, 1, 0, 0], [0, 0, 1, 0, 0]]
    assert found.shares.tolist() == expected and not found.has_others
    assert found.pairs == (("d", "c", 1, 1), ("a", "c", 1, 2), ("b", "d", 1, 2))
    others = history.with_task(2, np.array([4, 0, 3, 1, 2, 2]))
    assert confusion(others, ["a", "b", "c", "d", "e"]).shares[0].tolist() == [0.5, 0, 0, 0, 0.5]


def test_tasks_that_share_their_classes_are_one_group():
    labels = np.array([0, 1, 0, 1])
    history = PredictionHistory(np.array([2, 2]), labels, labels, {1: labels[:2], 2: labels})
    assert confusion(history, ["a", "b"]).groups == ((1, 0, 2),)
    assert json.loads(gallery_bytes({1: {0: b"x"}}))["tasks"]["1"][0]["image"] == 0
