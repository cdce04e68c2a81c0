"""An image is read in one way, wherever it comes from: as a stream's images are."""

import base64
import http.server
import io
import threading

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from hf_zocl.sample import sample_path
from tests.helpers import mini_clip_classifier


RAMP = np.tile(np.linspace(0, 1, 32), (32, 1))
ROTATED = 6


def transparent() -> Image.Image:
    array = np.full((32, 32, 4), 255, dtype=np.uint8)
    array[:16] = 0  # black, and not to be seen
    return Image.fromarray(array)


def turned() -> Image.Image:
    image = Image.fromarray((RAMP * 255).astype(np.uint8))
    image.getexif()[0x0112] = ROTATED
    return image


def palette() -> Image.Image:
    image = Image.fromarray((RAMP * 255).astype(np.uint8)).convert("P")
    image.info["transparency"] = 0
    return image


IMAGES = {
    "16-bit": lambda: Image.fromarray((RAMP * 65535).astype(np.uint16)),
    "transparent": transparent,
    "turned": turned,
    "palette": palette,
    "grey": lambda: Image.fromarray((RAMP * 255).astype(np.uint8)),
}


@pytest.fixture(scope="module")
def model():
    model = mini_clip_classifier().eval()
    model.image_processor = AutoProcessor.from_pretrained(sample_path("mini-clip")).image_processor
    return model


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A folder and its address."""
    folder = tmp_path_factory.mktemp("served")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("name", IMAGES)
def test_predict_sees_what_a_stream_shows(name, model, served):
    folder, address = served
    image, file = IMAGES[name](), folder / f"{name}.png"
    image.save(file, exif=image.getexif())
    content = file.read_bytes()
    # As a stream's images come: decoded by datasets, made RGB by the processor.
    decoded = datasets.Image().decode_example({"bytes": content, "path": None})
    if name == "16-bit":
        decoded = Image.fromarray((RAMP * 255).round().astype(np.uint8))
    expected = model.image_processor([decoded], return_tensors="pt").pixel_values
    if name == "transparent":
        assert expected[0, 0, 0, 0] == expected[0, 0, -1, -1]  # white, both
    same = [file, str(file), f"{address}/{name}.png", Image.open(file), base64.b64encode(content).decode()]
    same.append(f"data:image/png;base64,{same[-1]}")
    for each in same:
        torch.testing.assert_close(model._pixel_values([each]), expected, atol=0.03, rtol=0)
    torch.testing.assert_close(model.predict(same)[1], model.predict(expected)[1].expand(6, -1), atol=5e-3, rtol=0)


def test_what_is_no_image_is_one_line_that_names_it(model, served):
    folder, address = served
    (folder / "text.png").write_text("no image")
    (folder / "float.tiff").write_bytes(tiff(RAMP.astype(np.float32) * 300))
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:2000])
    for image, message in {
        "none.png": "'none.png': there is no such file",
        str(folder / "text.png"): "text.png': it is not an image that Pillow can read",
        f"{address}/none.png": "none.png': it cannot be fetched .*404",
        "http://127.0.0.1:9/none.png": "none.png': it cannot be fetched",
        "QUJD" * 40: "it is not an image that Pillow can read",
        str(folder / "float.tiff"): "float.tiff': its values are floats from 0 to 300",
        str(folder / "cut.png"): "cut.png': ",
        3: "3: expected a file, a URL, a PIL image",
    }.items():
        with pytest.raises(ValueError, match=f"^predict: .*{message}") as error:
            model.predict([image])
        assert len(str(error.value)) < 400 and "\n" not in str(error.value)


def tiff(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "TIFF")
    return file.getvalue()
