"""Datasets as one uint8 tensor, and their augmentation in batches, on the CPU or a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset, Image, load_dataset
from torch import Tensor
from transformers import CLIPProcessor


@dataclass
class ImageSet:
    """Images (N, 3, H, W) in uint8, their labels (N,) and the name of every label."""

    images: Tensor
    labels: Tensor
    class_names: list[str]

    def to(self, device: torch.device) -> ImageSet:
        return ImageSet(self.images.to(device), self.labels.to(device), self.class_names)

    def part(self, rows: Tensor) -> ImageSet:
        return ImageSet(self.images[rows], self.labels[rows], self.class_names)


def find_columns(dataset: Dataset) -> tuple[str, str]:
    """Return the names of the image and label columns, found by type because datasets name them differently."""
    images = [name for name, feature in dataset.features.items() if isinstance(feature, Image)]
    labels = [name for name, feature in dataset.features.items() if isinstance(feature, ClassLabel)]
    if len(images) != 1 or len(labels) != 1:
        raise ValueError(f"expected one Image and one ClassLabel column, found {dataset.features}")
    return images[0], labels[0]


def load_images(path: str, split: str, max_images: int | None = None) -> ImageSet:
    """Decode a split's images (its first `max_images`) into one tensor."""
    dataset = load_dataset(path, split=split)
    image_column, label_column = find_columns(dataset)
    dataset = dataset.select(range(min(len(dataset), max_images or len(dataset))))
    images = [np.asarray(image.convert("RGB")) for image in dataset[image_column]]
    shapes = {image.shape for image in images}
    if len(shapes) != 1:
        raise ValueError(f"images of one size expected in {path!r} ({split}), found the shapes {sorted(shapes)}")
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    labels = torch.tensor(dataset[label_column][:])
    return ImageSet(pixels, labels, dataset.features[label_column].names)


class Normalizer:
    """The image processor's rescaling and normalisation for a batch on the device; images have the model's size."""

    def __init__(self, processor: CLIPProcessor, device: torch.device):
        self.mean = torch.tensor(processor.image_processor.image_mean, device=device).view(3, 1, 1)
        self.std = torch.tensor(processor.image_processor.image_std, device=device).view(3, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


def augment(images: Tensor) -> Tensor:
    """Mildly crop, flip, sharpen or blur, and recolour images in [0, 1], each at random."""
    return colour_jitter(random_sharpness(random_crop_flip(images)))


def random_crop_flip(images: Tensor) -> Tensor:
    """Crop each image at a random place, scale and aspect (padded by reflection beyond its edges), and flip it.

    One resampling does all of this, without a loop over the images.
    """
    n, device = len(images), images.device
    scale = torch.empty(n, device=device).uniform_(0.75, 1.05)
    aspect = torch.empty(n, device=device).uniform_(-0.1, 0.1).exp()
    flip = torch.randint(0, 2, (n,), device=device) * 2 - 1
    theta = torch.zeros(n, 2, 3, device=device)
    theta[:, 0, 0] = scale * aspect * flip
    theta[:, 1, 1] = scale / aspect
    theta[:, :, 2] = torch.empty(n, 2, device=device).uniform_(-0.19, 0.19)  # 3 of 32 pixels
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def random_sharpness(images: Tensor, lowest: float = -0.5, highest: float = 1.5) -> Tensor:
    """Sharpen (factor above 0) or blur (below 0) each image in [0, 1] by a random factor.

    The factor scales the difference between the image and its blur by the kernel (1, 2, 1) / 4 along both axes. The
    sharpness of an image depends on how it was scaled, and the crop's bilinear resampling blurs: without this, a model
    does better on blurred images.
    """
    kernel = torch.tensor([0.25, 0.5, 0.25], device=images.device)
    weight = torch.outer(kernel, kernel).expand(images.shape[1], 1, 3, 3)
    blurred = F.conv2d(F.pad(images, (1, 1, 1, 1), mode="reflect"), weight, groups=images.shape[1])
    factor = torch.empty(len(images), 1, 1, 1, device=images.device).uniform_(lowest, highest)
    return (images + factor * (images - blurred)).clamp(0, 1)


def colour_jitter(images: Tensor, strength: float = 0.3) -> Tensor:
    """Change brightness, contrast and saturation of each image in [0, 1] by random factors."""
    factors = torch.empty(3, len(images), 1, 1, 1, device=images.device).uniform_(1 - strength, 1 + strength)
    images = images * factors[0]
    images = torch.lerp(images.mean((1, 2, 3), keepdim=True), images, factors[1])
    return torch.lerp(images.mean(1, keepdim=True), images, factors[2]).clamp(0, 1)
