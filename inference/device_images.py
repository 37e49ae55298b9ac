"""Resize and normalise images on a device, bit for bit as Pillow and numpy do on the CPU.

Pillow resizes in two passes (horizontal, vertical), each rounded to bytes: sums of pixels times weights of 22 bits.
Such integers are exact in float64 in any order of addition, so a pass is a matrix product. Which pass comes first
depends on Pillow's version and the size; it is found out with a noise image, once a size. Normalisation is a table
lookup by byte, with a table that numpy computes.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from ..errors_openvla import OpenVLAValueError
from ..images_openvla import (
    TowerTransform,
    as_images,
    crop_corner,
    each_tower,
    normalized,
    normalized_pixels,
    padded_size,
    target_size,
    unit_floats,
)

WEIGHT_BITS = 22  # as in Pillow's 32-bit sums: 8 bits for a byte, 2 for sums above one
HORIZONTAL, VERTICAL = "horizontal", "vertical"


def _triangle(x: float) -> float:
    return max(0.0, 1.0 - abs(x))


def _cubic(x: float) -> float:
    """Return Keys' cubic convolution kernel (1981) with a = -0.5."""
    x, a = abs(x), -0.5
    if x < 1.0:
        return ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2.0 else 0.0


def _lanczos(x: float) -> float:
    """Return the Lanczos kernel of radius 3 (Duchon 1979)."""
    return _sinc(x) * _sinc(x / 3) if -3.0 <= x < 3.0 else 0.0


def _sinc(x: float) -> float:
    return 1.0 if x == 0.0 else math.sin(x * math.pi) / (x * math.pi)


# Radius and kernel of each filter, by Pillow's resampling code.
FILTERS = {1: (3.0, _lanczos), 2: (1.0, _triangle), 3: (2.0, _cubic)}


class Resize(NamedTuple):
    """One resizing of Pillow; sizes are (width, height), ``resampling`` is Pillow's code."""

    size: tuple[int, int]
    target: tuple[int, int]
    resampling: int


def pixels_on_device(
    images: Any,
    device: torch.device | str,
    towers: Sequence[TowerTransform],
    fill: Sequence[int] | None,
    return_tensors: str | None,
) -> torch.Tensor:
    """Resize and normalise images on a device, bit for bit as ``normalized_pixels``.

    Pillow does it, on the CPU, where its result for a filter is not known here.

    Args:
        images: As the image processor takes them. uint8 tensors that are on the device stay there.
        device: Where the pixels are made.
        towers: The preprocessing of every tower.
        fill: Colour of the border that makes an image square; None for no border.
        return_tensors: "pt" or None.

    Returns:
        float32 ``(batch, 3 * towers, height, width)`` on the device.

    Raises:
        ValueError: Another kind of tensors.
    """
    if return_tensors not in (None, "pt"):
        raise OpenVLAValueError(
            f"device gives torch tensors, not return_tensors={return_tensors!r}; leave one of them out."
        )
    if getattr(images, "ndim", None) == 4:
        images = list(images)
    images = images if isinstance(images, (list, tuple)) else [images]
    batch = []
    for image in images or as_images(images):  # as_images raises where there is none
        pixels = _transformed(image, torch.device(device), towers, fill)
        if pixels is None:
            by_pillow = [normalized_pixels(image, towers, fill) for image in as_images(images)]
            return torch.from_numpy(np.stack(by_pillow)).to(device)
        batch.append(pixels)
    return torch.stack(batch)


def _transformed(
    image: Any, device: torch.device, towers: Sequence[TowerTransform], fill: Sequence[int] | None
) -> torch.Tensor | None:
    pixels = _bytes_on(image, device)
    if fill is not None:
        pixels = _padded(pixels, fill)

    def prepare(size: Any, resampling: int, crop: Sequence[int]) -> torch.Tensor | None:
        resized = _resized(pixels, size, resampling)
        return None if resized is None else _cropped(resized, crop).long()

    planes = []
    for normalize, prepared in each_tower(towers, prepare):
        if prepared is None:
            return None
        table = _table(tuple(normalize["mean"]), tuple(normalize["std"]), device)
        planes.append(table.gather(1, prepared.flatten(1)).view(prepared.shape))
    return torch.cat(planes)


def _bytes_on(image: Any, device: torch.device) -> torch.Tensor:
    """Return one image as uint8 ``(3, height, width)`` on the device."""
    if torch.is_tensor(image) and image.dtype == torch.uint8 and image.ndim == 3:
        if image.shape[0] == 3:
            return image.to(device)
        if image.shape[0] not in (1, 4) and image.shape[2] == 3:
            return image.to(device).permute(2, 0, 1)
    (checked,) = as_images(image)
    return torch.from_numpy(np.array(checked)).to(device).permute(2, 0, 1)


def _padded(pixels: torch.Tensor, fill: Sequence[int]) -> torch.Tensor:
    """Pad uint8 ``(3, height, width)`` to a square."""
    _, height, width = pixels.shape
    left, top, (padded_width, padded_height) = padded_size(width, height)
    color = torch.tensor(fill, dtype=torch.uint8, device=pixels.device)[:, None, None]
    padded = color.repeat(1, padded_height, padded_width)
    padded[:, top : top + height, left : left + width] = pixels
    return padded


def _resized(pixels: torch.Tensor, size: Any, resampling: int) -> torch.Tensor | None:
    """Resize uint8 ``(3, height, width)`` as Pillow does; None where that is not known."""
    _, height, width = pixels.shape
    resize = Resize((width, height), target_size(width, height, size), resampling)
    if resize.target == resize.size:
        return pixels
    order = _pass_order(resize, pixels.device)
    return None if order is None else _apply_passes(pixels, resize, order)


def _apply_passes(pixels: torch.Tensor, resize: Resize, order: Sequence[str]) -> torch.Tensor:
    """Return bytes, as float64, after the passes in this order."""
    x = pixels.double()
    for direction in order:
        axis = 0 if direction == HORIZONTAL else 1
        if resize.size[axis] == resize.target[axis]:
            continue
        weights = _weights(resize.size[axis], resize.target[axis], resize.resampling, pixels.device)
        sums = x @ weights.T if direction == HORIZONTAL else weights @ x
        x = ((sums + 2 ** (WEIGHT_BITS - 1)) / 2**WEIGHT_BITS).floor_().clamp_(0, 255)
    return x


@functools.lru_cache(maxsize=32)
def _pass_order(resize: Resize, device: torch.device) -> tuple[str, str] | None:
    """Return the order of the installed Pillow's passes; None where its result is that of neither order."""
    if resize.resampling not in FILTERS:
        return None
    noise = np.random.RandomState(0).randint(0, 256, (*resize.size[::-1], 3), dtype=np.uint8)
    by_pillow = np.array(Image.fromarray(noise).resize(resize.target, Image.Resampling(resize.resampling)))
    expected = torch.from_numpy(by_pillow).to(device).permute(2, 0, 1)
    pixels = torch.from_numpy(noise).to(device).permute(2, 0, 1)
    for order in ((HORIZONTAL, VERTICAL), (VERTICAL, HORIZONTAL)):
        if torch.equal(_apply_passes(pixels, resize, order).to(torch.uint8), expected):
            return order
    return None


@functools.lru_cache(maxsize=32)
def _weights(size: int, target: int, resampling: int, device: torch.device) -> torch.Tensor:
    """Return Pillow's weights of inputs for outputs (its Resample.c): integers as float64 ``(target, size)``."""
    radius, kernel = FILTERS[resampling]
    scale = size / target
    stretch = max(scale, 1.0)
    weights = np.zeros((target, size))
    for output in range(target):
        center = (output + 0.5) * scale
        first = max(int(center - radius * stretch + 0.5), 0)
        last = min(int(center + radius * stretch + 0.5), size)
        values = [kernel((x - center + 0.5) * (1.0 / stretch)) for x in range(first, last)]
        *_, total = itertools.accumulate(values)  # sum() rounds differently from Python 3.12 on
        scaled = [value / total * 2**WEIGHT_BITS for value in values]
        weights[output, first:last] = [int(value + math.copysign(0.5, value)) for value in scaled]
    return torch.from_numpy(weights).to(device)


def _cropped(pixels: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Crop the middle ``(height, width)``."""
    height, width = size
    left, top = crop_corner(pixels.shape[2], pixels.shape[1], size)
    return pixels[:, top : top + height, left : left + width]


@functools.lru_cache(maxsize=32)
def _table(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Return the normalised value of every byte: float32 ``(3, 256)`` on the device."""
    return torch.from_numpy(_normalization_table(mean, std)).to(device)


def _normalization_table(mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Return what ``normalized_pixels`` makes of every byte: float32 ``(3, 256)``."""
    unit = np.broadcast_to(unit_floats(np.arange(256, dtype=np.uint8)), (3, 1, 256))
    return normalized(unit, mean, std, np.empty(unit.shape, np.float32))[:, 0]
