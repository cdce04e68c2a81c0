"""Images of more than 8 bits a value, as the 8 bits that image processors work on."""

from __future__ import annotations

import numpy as np
from PIL import Image


GREATEST_16_BIT = 65535


def eight_bits(image: Image.Image) -> Image.Image:
    """An image of 8 bits a value: Pillow would clip one of 16 bits at 255, and cut one of floats down to 0.

    The scale is the same for every image, that of its type: 16-bit values (and 32-bit integers, as which some files of
    16 bits are read) are scaled from 0–65,535 to 0–255, floats from 0–1. Images of 8 bits stay as they are.

    Raises:
        ValueError: If values lie outside of that range, so that no scale is known.
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
