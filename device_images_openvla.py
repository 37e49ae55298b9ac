"""Images resized and normalised on a device, bit for bit as Pillow and numpy do it on the CPU.

Pillow resizes in two passes, each rounded to bytes: sums of pixels times weights of 22 bits. Such integers are exact in
float64 in whatever order they are added, so a pass is a matrix product. Which pass is the first depends on Pillow's
version and the size: the installed one is asked, with a picture of noise, once a size. What normalisation makes of a
byte is looked up in a table that numpy computes.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from .errors_openvla import OpenVLAValueError
from .images_openvla import as_images, crop_corner, each_tower, normalization_table, padded_size, target_size

WEIGHT_BITS = 22  # Pillow's: a byte, two bits for sums above one, 32 in all
ACROSS, DOWN = "across", "down"


def _triangle(x: float) -> float:
    return max(0.0, 1.0 - abs(x))


def _cubic(x: float) -> float:
    """Keys 1981, with a = -0.5."""
    x, a = abs(x), -0.5
    if x < 1.0:
        return ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2.0 else 0.0


def _lanczos(x: float) -> float:
    """Sinc under the middle of a sinc three times as wide (Duchon 1979)."""
    return _sinc(x) * _sinc(x / 3) if -3.0 <= x < 3.0 else 0.0


def _sinc(x: float) -> float:
    return 1.0 if x == 0.0 else math.sin(x * math.pi) / (x * math.pi)


# By Pillow's resampling codes: how far a filter reaches, and the filter.
FILTERS = {1: (3.0, _lanczos), 2: (1.0, _triangle), 3: (2.0, _cubic)}


def pixels_on(
    images: Any,
    device: torch.device,
    towers: Sequence[tuple[dict, dict, dict]],
    fill: Sequence[int] | None,
    return_tensors: str | None = None,
) -> torch.Tensor | None:
    """Normalised images, made on a device.

    Args:
        images: As the image processor takes them. Bytes that are there already stay there.
        device: Where.
        towers: Of every tower, how to resize, crop and normalise.
        fill: Colour of the border that makes an image square; None for no border.
        return_tensors: "pt" or None.

    Returns:
        float32 ``(batch, 3 * towers, height, width)``; None if some filter or Pillow's is not known here.

    Raises:
        ValueError: Another kind of tensor is asked for.
    """
    if return_tensors not in (None, "pt"):
        raise OpenVLAValueError(
            f"device gives torch tensors, not return_tensors={return_tensors!r}; leave one of them out."
        )
    if getattr(images, "ndim", None) == 4:
        images = list(images)
    images = images if isinstance(images, (list, tuple)) else [images]
    rows = [_transformed(image, device, towers, fill) for image in images or as_images(images)]
    return None if any(row is None for row in rows) else torch.stack(rows)


def _transformed(
    image: Any, device: torch.device, towers: Sequence[tuple[dict, dict, dict]], fill: Sequence[int] | None
) -> torch.Tensor | None:
    pixels, planes = _bytes_on(image, device), []
    if fill is not None:
        pixels = _padded(pixels, fill)

    def prepare(size: Any, resampling: int, crop: Sequence[int]) -> torch.Tensor | None:
        resized = _resized(pixels, size, resampling)
        return None if resized is None else _cropped(resized, crop).long()

    for normalize, prepared in each_tower(towers, prepare):
        if prepared is None:
            return None
        table = _table(tuple(normalize["mean"]), tuple(normalize["std"]), device)
        planes.append(table.gather(1, prepared.flatten(1)).view(prepared.shape))
    return torch.cat(planes)


def _bytes_on(image: Any, device: torch.device) -> torch.Tensor:
    """uint8 ``(3, height, width)``."""
    if torch.is_tensor(image) and image.dtype == torch.uint8 and image.ndim == 3:
        if image.shape[0] == 3:
            return image.to(device)
        if image.shape[0] not in (1, 4) and image.shape[2] == 3:
            return image.to(device).permute(2, 0, 1)
    (checked,) = as_images(image)
    return torch.from_numpy(np.array(checked)).to(device).permute(2, 0, 1)


def _padded(pixels: torch.Tensor, fill: Sequence[int]) -> torch.Tensor:
    _, height, width = pixels.shape
    left, top, (wide, high) = padded_size(width, height)
    padded = torch.tensor(fill, dtype=torch.uint8, device=pixels.device)[:, None, None].repeat(1, high, wide)
    padded[:, top : top + height, left : left + width] = pixels
    return padded


def _resized(pixels: torch.Tensor, size: Any, resampling: int) -> torch.Tensor | None:
    _, height, width = pixels.shape
    target = target_size(width, height, size)
    if target == (width, height):
        return pixels
    order = _order((width, height), target, resampling, pixels.device)
    return None if order is None else _passed(pixels, (width, height), target, resampling, order)


def _passed(
    pixels: torch.Tensor, size: tuple[int, int], target: tuple[int, int], resampling: int, order: Sequence[str]
) -> torch.Tensor:
    """Bytes, as float64, after the passes in this order."""
    x = pixels.double()
    for direction in order:
        axis = 0 if direction == ACROSS else 1
        if size[axis] == target[axis]:
            continue
        weights = _weights(size[axis], target[axis], resampling, pixels.device)
        sums = x @ weights.T if direction == ACROSS else weights @ x
        x = ((sums + 2 ** (WEIGHT_BITS - 1)) / 2**WEIGHT_BITS).floor_().clamp_(0, 255)
    return x


@functools.lru_cache(maxsize=32)
def _order(
    size: tuple[int, int], target: tuple[int, int], resampling: int, device: torch.device
) -> tuple[str, str] | None:
    """The order in which the installed Pillow takes its passes; None if it does something else."""
    if resampling not in FILTERS:
        return None
    noise = np.random.RandomState(0).randint(0, 256, (*size[::-1], 3), dtype=np.uint8)
    expected = torch.from_numpy(np.array(Image.fromarray(noise).resize(target, resampling))).to(device).permute(2, 0, 1)
    pixels = torch.from_numpy(noise).to(device).permute(2, 0, 1)
    for order in ((ACROSS, DOWN), (DOWN, ACROSS)):
        if torch.equal(_passed(pixels, size, target, resampling, order).to(torch.uint8), expected):
            return order
    return None


@functools.lru_cache(maxsize=32)
def _weights(size: int, target: int, resampling: int, device: torch.device) -> torch.Tensor:
    """Integers, float64 ``(target, size)``: how much of every pixel goes into which (Pillow's Resample.c)."""
    reach, kernel = FILTERS[resampling]
    scale = size / target
    stretch = max(scale, 1.0)
    weights = np.zeros((target, size))
    for row in range(target):
        center = (row + 0.5) * scale
        first = max(int(center - reach * stretch + 0.5), 0)
        last = min(int(center + reach * stretch + 0.5), size)
        parts = [kernel((x - center + 0.5) * (1.0 / stretch)) for x in range(first, last)]
        *_, total = itertools.accumulate(parts)  # from Python 3.12 on sum() would round otherwise
        scaled = [part / total * 2**WEIGHT_BITS for part in parts]
        weights[row, first:last] = [int(part + math.copysign(0.5, part)) for part in scaled]
    return torch.from_numpy(weights).to(device)


def _cropped(pixels: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    height, width = size
    left, top = crop_corner(pixels.shape[2], pixels.shape[1], size)
    return pixels[:, top : top + height, left : left + width]


@functools.lru_cache(maxsize=32)
def _table(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(normalization_table(mean, std)).to(device)
