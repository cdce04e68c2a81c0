"""Images as image processors take them: opened from any source, upright, 8 bits a value."""

from __future__ import annotations

import base64
import os
from http.client import HTTPException
from io import BytesIO
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..checks import shown


# The errors that Pillow raises, by format and by where the file is broken.
CORRUPT = (OSError, SyntaxError, ValueError, TypeError, EOFError, Image.DecompressionBombError)
GREATEST_16_BIT = 65535
PATIENCE = 60  # seconds for a URL
SHORTEST = 64  # characters of an image as base64 text; shorter text is the name of a file


def read_image(image: str | os.PathLike | Image.Image | np.ndarray) -> Image.Image:
    """Read an image as a stream's images are read, before a processor makes it RGB: upright, 8 bits a value.

    Args:
        image: A file, a URL, base64 text, a PIL image, or an array of bytes `(height, width, channels)`.

    Raises:
        ValueError: If it is not an image, cannot be fetched, or its values have no known scale, see `eight_bits`.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise ValueError(f"an array holds {image.dtype}, expected bytes (uint8).")
        return Image.fromarray(image)
    where = "" if isinstance(image, Image.Image) else f"{shown(image)}: "
    try:
        opened = image if isinstance(image, Image.Image) else Image.open(_source(image))
        opened.load()
        return eight_bits(ImageOps.exif_transpose(opened))
    except CORRUPT as error:
        raise ValueError(f"{where}{why_corrupt(error)}") from error


def why_corrupt(error: Exception) -> str:
    """The fault of an image, as text, from one of the errors in `CORRUPT`."""
    # Pillow's own message names the bytes' address in memory.
    return "it is not an image that Pillow can read" if isinstance(error, UnidentifiedImageError) else str(error)


def _source(image: Any) -> str | os.PathLike | BytesIO:
    """The source for Pillow to open: a file, or the content of a URL or of base64 text."""
    if not isinstance(image, (str, os.PathLike)):
        raise ValueError("expected a file, a URL, a PIL image, or an array of bytes.")
    text = os.fspath(image)
    if os.path.isfile(image):
        return image
    if text.startswith(("http://", "https://")):
        return BytesIO(_fetch(text))
    try:
        content = base64.b64decode("".join(text.rpartition(",")[2].split()), validate=True)
    except ValueError:
        content = b""
    if not content or len(text) < SHORTEST:
        raise ValueError("there is no such file.")
    return BytesIO(content)


def _fetch(url: str) -> bytes:
    try:
        with urlopen(Request(url, headers={"User-Agent": "hf_zocl"}), timeout=PATIENCE) as answer:
            return answer.read()
    except (OSError, ValueError, HTTPException) as error:
        raise ValueError(f"it cannot be fetched ({error or type(error).__name__}).") from error


def eight_bits(image: Image.Image) -> Image.Image:
    """Scale an image to 8 bits a value: Pillow would clip 16-bit values at 255, and truncate floats to 0.

    The scale is the same for every image, that of its type: 16-bit values (and 32-bit integers, because some 16-bit
    files are read as these) are scaled from 0–65,535 to 0–255, floats from 0–1. Images of 8 bits stay as they are.

    Raises:
        ValueError: If values are outside that range, so that no scale is known.
    """
    if image.mode == "F":
        greatest, kind = 1, "floats"
    elif image.mode == "I" or image.mode.startswith("I;16"):
        greatest, kind = GREATEST_16_BIT, "whole numbers"
    else:
        return image
    values = np.asarray(image)
    # NaN fails both comparisons.
    if values.size and not (values.min() >= 0 and values.max() <= greatest):
        raise ValueError(
            f"its values are {kind} from {values.min():g} to {values.max():g}; expected 0 to {greatest} "
            "(scale them, or save the image with 8 bits a value)"
        )
    scaled = np.rint(values.astype(np.float64) * (255 / greatest)).astype(np.uint8)
    return Image.fromarray(scaled)
