"""The page: an image, a slider over the tasks, and the model's predictions. Needs Gradio."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # Gradio reads it when it is imported

import gradio as gr
import torch
from PIL import Image

from ..hub.series import TaskSeries
from .pictures import Picture, test_pictures
from .view import CSS, heading, message, render


SMALLEST = 160  # pixels of a picture's longer side; smaller pictures are enlarged
SYSTEM_FONTS = ("system-ui", "sans-serif")
ASK = "Drop an image, or pick a test image."


def make_page(path: str | Path, dataset_path: str | None = None, **hub_kwargs: Any) -> gr.Blocks:
    """Make the page of a run; `launch_page` serves it.

    Args:
        path: The run's folder, or its repository on the Hub.
        dataset_path: A local copy of the run's dataset, for the test images.
        hub_kwargs: As for `load_task_checkpoint`.

    Raises:
        ValueError: As `TaskSeries.load`.
    """
    series = TaskSeries.load(path, **hub_kwargs)
    if torch.accelerator.is_available():
        series.model.to(torch.accelerator.current_accelerator())
    is_own, note = Path(path).is_dir(), ""
    try:
        pictures = test_pictures(series, is_own, dataset_path)
    except (ValueError, OSError) as error:
        pictures, note = [], f"No test images: {' '.join(str(error).split())}"
    return _blocks(series, Path(path).absolute().name if is_own else str(path), pictures, note)


def launch_page(
    page: gr.Blocks, server_name: str | None = None, server_port: int | None = None, **options: Any
) -> Any:
    """Serve a page, with system fonts, so that it loads nothing from elsewhere.

    Args:
        page: The page.
        server_name: The address; default: Gradio's own, 127.0.0.1 unless GRADIO_SERVER_NAME says otherwise.
        server_port: The port; default: the first free one from 7860 on.
        options: Further options for `gr.Blocks.launch`.
    """
    theme = gr.themes.Default(
        primary_hue="emerald", neutral_hue="slate", font=SYSTEM_FONTS, font_mono=("ui-monospace", "monospace")
    )
    own = {"share": False, "ssr_mode": False, "footer_links": ["gradio", "settings"]}
    return page.launch(server_name=server_name, server_port=server_port, theme=theme, css=CSS, **{**own, **options})


def _blocks(series: TaskSeries, name: str, pictures: list[Picture], note: str) -> gr.Blocks:
    last = len(series.stages) - 1
    first = pictures[0] if pictures else None
    with gr.Blocks(title=f"{name} · hf_zocl", analytics_enabled=False) as page:
        gr.HTML(heading(series, name, note))
        # The present image's probabilities and true class; None: no image; text: an error message.
        state = gr.State(None if first is None else (first.probabilities.tolist(), first.truth))
        with gr.Row():
            with gr.Column(min_width=300, elem_id="zocl-left"):
                image = gr.Image(
                    None if first is None else _enlarged(first.image),
                    type="filepath", image_mode=None, label="Image", height=260, sources=["upload", "clipboard"],
                    buttons=[],
                )  # fmt: skip
                with gr.Column(visible=bool(pictures), elem_id="zocl-pictures"):
                    gr.HTML(message("Test images · ✗: known once, forgotten since"))
                    gallery = gr.Gallery(
                        [(_enlarged(picture.image), _caption(series, picture)) for picture in pictures],
                        show_label=False, height="auto", object_fit="contain", allow_preview=False, buttons=[],
                        elem_id="zocl-gallery",
                    )  # fmt: skip
            with gr.Column(min_width=300, elem_id="zocl-right"):
                slider = gr.Slider(0, last, last, step=1, label="After task (0: zero-shot)", buttons=[])
                said = gr.HTML(
                    message(ASK) if first is None else render(series, first.probabilities, last, first.truth)
                )

        def show(held: tuple | None, place: int) -> str:
            if held is None:
                return message(ASK)
            return held if isinstance(held, str) else render(series, torch.tensor(held[0]), int(place), held[1])

        def look(file: str | None, place: int) -> tuple[Any, str]:
            if file is None:
                return None, message(ASK)
            try:
                (probabilities,) = series.probabilities([file])
            except ValueError as error:
                held = message(str(error).removeprefix("predict: ").partition(": ")[2] or str(error))
                return held, held
            found = (probabilities.tolist(), None)
            return found, show(found, place)

        def pick(place: int, event: gr.SelectData) -> tuple[Any, Any, str]:
            picture = pictures[event.index]
            held = (picture.probabilities.tolist(), picture.truth)
            return _enlarged(picture.image), held, show(held, place)

        slider.change(show, [state, slider], said, show_progress="hidden", queue=False, trigger_mode="always_last")
        # Not `input`, because picking a picture from the gallery triggers that too.
        image.upload(look, [image, slider], [state, said])
        image.clear(lambda: (None, message(ASK)), None, [state, said], show_progress="hidden")
        gallery.select(pick, [slider], [image, state, said], show_progress="hidden")
    return page


def _caption(series: TaskSeries, picture: Picture) -> str:
    name = series.classes[picture.truth]
    return f"✗ {name}" if picture.is_forgotten else name


def _enlarged(image: Image.Image) -> Image.Image:
    """A small image enlarged by a whole factor, because a browser would blur it."""
    factor = -(-SMALLEST // max(image.size))
    return (
        image if factor <= 1 else image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    )
