"""A few test images of every task, and the model's prediction for each after every task."""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from .escape import mathtext
from .figures import TRAINED, ZERO_SHOT
from .predictions import PredictionHistory


GALLERY_FILE = "gallery.json"
GALLERY_PICTURE = "gallery.png"
PER_TASK, IN_ALL = 8, 160
SIDE = 96  # pixels of a small image's longer side
KINDS = {
    "forgotten": "right after an earlier task, wrong now",
    "learned": "wrong before training, right now",
    "wrong": "wrong now, and after every task",
    "kept": "right before training and now",
}


@dataclass(frozen=True)
class Shown:
    """A test image of a gallery.

    Args:
        task: Its task, counted from 1.
        kind: What became of it, one of `KINDS`.
        label: The number of its class.
        said: Moment → the number of the predicted class; moment 0 is zero-shot, the others are tasks.
        webp: The small image.
    """

    task: int
    kind: str
    label: int
    said: Mapping[int, int]
    webp: bytes

    @property
    def uri(self) -> str:
        return f"data:image/webp;base64,{base64.b64encode(self.webp).decode('ascii')}"

    def spans(self) -> list[tuple[int, int, int]]:
        """The predictions as (from, to, class): consecutive tasks with the same prediction are one span."""
        spans: list[tuple[int, int, int]] = []
        for moment, said in self.said.items():
            if spans and spans[-1][2] == said and spans[-1][0] > 0:
                spans[-1] = (spans[-1][0], moment, said)
            else:
                spans.append((moment, moment, said))
        return spans


def kinds(history: PredictionHistory, task: int) -> dict[str, np.ndarray]:
    """The images of a task by what became of them: kind → their positions among the task's test images."""
    labels = history.labels[history.of_task(task)]
    before, *later = (said == labels for said in history.path(task).values())
    if not later:
        return {}
    now, ever = later[-1], np.any(later, axis=0)
    found = {"forgotten": ~now & ever, "learned": now & ~before, "wrong": ~now & ~ever, "kept": now & before}
    return {kind: np.flatnonzero(is_kind) for kind, is_kind in found.items()}


def choose(history: PredictionHistory, tasks: int) -> dict[int, list[int]]:
    """The images that a gallery shows: task → their positions among its test images, the most telling first.

    The kinds take turns, the forgotten first, and within a kind the classes do.

    Args:
        history: The model's predictions.
        tasks: How many tasks are complete.
    """
    most = max(1, min(PER_TASK, IN_ALL // len(history.images)))
    chosen = {}
    for task in range(1, tasks + 1):
        labels = history.labels[history.of_task(task)]
        queues = [_class_by_class(places, labels) for places in kinds(history, task).values()]
        turns = [queue[turn] for turn in range(most) for queue in queues if turn < len(queue)]
        chosen[task] = turns[:most]
    return chosen


def _class_by_class(places: np.ndarray, labels: np.ndarray) -> list[int]:
    """The positions, with the first of every class before the second of any."""
    seen: dict[int, int] = {}
    ranked = []
    for place in places.tolist():
        label = int(labels[place])
        seen[label] = seen.get(label, 0) + 1
        ranked.append((seen[label], place))
    return [place for _, place in sorted(ranked)]


def small_image(pixels: np.ndarray) -> bytes:
    """An image, `(height, width, 3)` of 8 bits, as a small WebP file."""
    image, file = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((SIDE, SIDE))
    image.save(file, format="webp", quality=80, method=4)
    return file.getvalue()


def gallery_bytes(images: Mapping[int, Mapping[int, bytes]]) -> bytes:
    """The content of `gallery.json`.

    Args:
        images: Task → position among its test images → small image.
    """
    tasks = {
        str(task): [{"image": place, "webp": base64.b64encode(webp).decode("ascii")} for place, webp in own.items()]
        for task, own in images.items()
    }
    return (json.dumps({"tasks": tasks}, indent=1) + "\n").encode()


def read_gallery(path: Path, history: PredictionHistory) -> dict[int, list[Shown]]:
    """Read the images of a run's gallery, task by task; within a task by kind, the forgotten first.

    Raises:
        ValueError: If the file is damaged, or not of this run.
    """
    try:
        tasks = json.loads(path.read_text(encoding="utf-8"))["tasks"]
        found: dict[int, list[Shown]] = {}
        for name, images in tasks.items():
            task = int(name)
            if task not in history.after:
                continue
            by_place = {place: kind for kind, places in kinds(history, task).items() for place in places.tolist()}
            labels, said = history.labels[history.of_task(task)], history.path(task)
            shown = [
                Shown(
                    task,
                    by_place[image["image"]],
                    int(labels[image["image"]]),
                    {moment: int(values[image["image"]]) for moment, values in said.items()},
                    _checked(base64.b64decode(image["webp"], validate=True)),
                )
                for image in images
            ]
            found[task] = sorted(shown, key=lambda each: list(KINDS).index(each.kind))
        return dict(sorted(found.items()))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, binascii.Error) as error:
        raise ValueError(
            f"{path} is damaged, or not the gallery of this run: {error}; remove the file to draw no gallery."
        ) from error


def _checked(webp: bytes) -> bytes:
    if webp[:4] != b"RIFF" or webp[8:12] != b"WEBP":
        raise ValueError("an image is not a WebP file")
    return webp


def within(galleries: Sequence[Mapping[int, list[Shown]]], budget: int) -> Iterator[dict[int, list[Shown]]]:
    """The galleries, with as many images per task as fit when all galleries share `budget` bytes."""
    most = next((most for most in range(PER_TASK, 0, -1) if _size(galleries, most) <= budget), 0)
    for gallery in galleries:
        yield {task: shown[:most] for task, shown in gallery.items()}


def _size(galleries: Sequence[Mapping[int, list[Shown]]], most: int) -> int:
    return sum(4 * len(one.webp) // 3 for own in galleries for shown in own.values() for one in shown[:most])


def best_row(gallery: Mapping[int, list[Shown]]) -> list[Shown]:
    """The images of the most telling task: the one with the most forgotten images; of equals, the earliest."""
    counts = {task: sum(one.kind == "forgotten" for one in shown) for task, shown in gallery.items()}
    return gallery[max(counts, key=lambda task: (counts[task], -task))] if counts else []


def draw_row(shown: Sequence[Shown], names: Sequence[str]) -> Figure:
    """One row of the gallery as a picture: the images, their classes, and the predictions over time.

    Args:
        shown: Images of one task.
        names: The name of every class number.
    """
    moments = sorted({0, shown[0].task, max(shown[0].said)})
    heads = ["is", *("zero-shot" if moment == 0 else f"after task {moment}" for moment in moments)]
    cell, line, edge = 1.1, 0.24, 0.1  # inches
    width, height = cell * (1 + len(shown)), cell + line * len(heads) + 2 * edge
    figure = Figure(figsize=(width, height), facecolor="white")

    def write(x: float, row: int, text: str, **style: Any) -> None:
        y = height - edge - cell - line * (row + 0.5)
        figure.text(x / width, y / height, mathtext(text), va="center", fontsize=8.5, **style)

    for row, head in enumerate(heads):
        write(edge, row, head, color="#595959")
    for column, one in enumerate(shown, start=1):
        axes = figure.add_axes((cell * column / width, (height - cell) / height, 1.0 / width, 1.0 / height))
        axes.imshow(Image.open(io.BytesIO(one.webp)))
        axes.set_axis_off()
        middle = cell * column + 0.5
        write(middle, 0, shorten(names[one.label], 13), ha="center", fontweight="bold")
        for row, moment in enumerate(moments, start=1):
            is_right = one.said[moment] == one.label
            mark, color = ("✓", TRAINED["color"]) if is_right else ("✗", ZERO_SHOT["color"])
            write(middle, row, f"{mark} {shorten(names[one.said[moment]], 13)}", ha="center", color=color)
    return figure


def row_png(shown: Sequence[Shown], names: Sequence[str]) -> bytes:
    """`draw_row` as a PNG file of 100 dots per inch."""
    file = io.BytesIO()
    with warnings.catch_warnings():  # a letter that the font lacks is drawn as a frame
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        draw_row(shown, names).savefig(file, format="png", dpi=100, metadata={"Software": None})
    return file.getvalue()


def shorten(text: str, most: int) -> str:
    """A name cut to at most `most` letters; a longer one loses its middle."""
    head = math.ceil((most - 1) / 2)
    return text if len(text) <= most else f"{text[:head]}…{text[len(text) - (most - 1 - head) :]}"
