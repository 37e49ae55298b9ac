"""Any image in, an RGB PIL image out, and the resizing that the reference's torchvision does on PIL images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

ImageInput = Any  # a PIL image, a numpy array, a torch tensor, or a path to an image file


def as_images(images: ImageInput | Sequence[ImageInput]) -> list[Image.Image]:
    """RGB PIL images of whatever was given.

    Raises:
        ValueError: Wrong channels, size, dtype or range; no image.
        TypeError: Not an image at all.
        FileNotFoundError: No file at a path.
    """
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        images = list(images)
    if not isinstance(images, (list, tuple)):
        images = [images]
    if not images:
        raise ValueError("Got no image.")
    return [_as_image(image) for image in images]


def _as_image(image: ImageInput) -> Image.Image:
    if isinstance(image, (str, os.PathLike)):
        with Image.open(image) as opened:
            return opened.convert("RGB")
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        if image.ndim == 3 and image.shape[0] in (1, 3, 4):  # channels first, torch's habit
            image = image.permute(1, 2, 0)
        image = image.float().numpy() if image.is_floating_point() else image.numpy()
    if not isinstance(image, np.ndarray):
        raise TypeError(
            f"An image must be a PIL image, a numpy array, a torch tensor or a path, got {type(image).__name__}."
        )
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)) or 0 in image.shape:
        raise ValueError(
            f"An image array must have shape (height, width, 3) (or 1 or 4 channels, or none), got {image.shape}."
        )
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[:, :, 0]
    return Image.fromarray(_as_bytes(image)).convert("RGB")


def _as_bytes(image: np.ndarray) -> np.ndarray:
    if image.dtype == np.uint8:
        return image
    if not np.issubdtype(image.dtype, np.floating):
        raise ValueError(f"An image array must be uint8, or float in [0, 1], got dtype {image.dtype}.")
    if not np.isfinite(image).all() or image.min() < 0 or image.max() > 1:
        raise ValueError(
            f"A float image must lie in [0, 1], got values from {image.min()} to {image.max()}; "
            "divide by 255 or give uint8."
        )
    return np.round(image.astype(np.float64) * 255).astype(np.uint8)


def padded_to_square(image: Image.Image, fill: tuple[int, ...]) -> Image.Image:
    """A border on both sides of the shorter dimension. An odd difference stays one pixel short, as in the reference."""
    width, height = image.size
    left, top = (max(width, height) - width) // 2, (max(width, height) - height) // 2
    padded = Image.new("RGB", (width + 2 * left, height + 2 * top), fill)
    padded.paste(image, (left, top))
    return padded


def resized(image: Image.Image, size: int | Sequence[int], resampling: int) -> Image.Image:
    """To ``(height, width)``, or the shorter side to ``size`` keeping the aspect (torchvision's rounding)."""
    width, height = image.size
    if isinstance(size, int):
        short, long = min(width, height), int(size * max(width, height) / min(width, height))
        target = (width, height) if short == size else ((size, long) if width <= height else (long, size))
    else:
        target = (size[1], size[0]) if len(size) == 2 else (size[0], size[0])
    return image if target == (width, height) else image.resize(target, resampling)


def center_crop(image: Image.Image, size: Sequence[int]) -> Image.Image:
    """The middle ``(height, width)`` (torchvision's rounding)."""
    height, width = size
    if image.size == (width, height):
        return image
    left, top = round((image.width - width) / 2.0), round((image.height - height) / 2.0)
    return image.crop((left, top, left + width, top + height))
