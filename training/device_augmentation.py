"""Resize and augment frames on a training's device, with the bits of ``data.augmentation`` on the CPU.

Every step is a float32 operation that IEEE 754 defines, in the same order, so a GPU rounds as a CPU does. Nothing is
divided by a number: PyTorch's CUDA kernels would multiply by its rounded reciprocal.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from ..data.augmentation import AugmentationParameters, adjust_contrast, adjust_hue, adjust_saturation
from ..inference.image_presets import lanczos3_spans

FRAMES_AT_ONCE = 32  # whose float32 intermediate results, 20 MB each at 224 pixels, are in memory together
WHOLE_IMAGE = (0.0, 0.0, 1.0, 1.0)
_HEIGHT, _WIDTH = 2, 3  # axes of planes (3, frames, height, width)


def as_rows(parameters: Sequence[AugmentationParameters]) -> torch.Tensor:
    """Return parameters for :func:`augmented_on_device`: float32 ``(frames, 8)``."""
    rows = [(*(p.box or WHOLE_IMAGE), p.brightness, p.contrast, p.saturation, p.hue) for p in parameters]
    return torch.tensor(rows, dtype=torch.float32)


def augmented_on_device(frames: torch.Tensor, rows: torch.Tensor, size: int) -> torch.Tensor:
    """Return frames that are resized by ``lanczos3_resized``, then augmented as ``augment_frames`` does.

    Args:
        frames: uint8 ``(frames, height, width, 3)``.
        rows: Each frame's parameters, of :func:`as_rows`, on the same device.
        size: Height and width of the result in pixels, at least 2.

    Returns:
        uint8 ``(frames, size, size, 3)``.
    """
    pairs = zip(frames.split(FRAMES_AT_ONCE), rows.split(FRAMES_AT_ONCE))
    return torch.cat([_augmented(some, of_them, size) for some, of_them in pairs])


def _augmented(frames: torch.Tensor, rows: torch.Tensor, size: int) -> torch.Tensor:
    planes = frames.permute(3, 0, 1, 2).contiguous().float()
    if planes.shape[_HEIGHT:] != (size, size):
        planes = _weighted_sums(_weighted_sums(planes, _HEIGHT, size), _WIDTH, size).round_().clamp_(0, 255)
    planes = planes * (1 / 255)
    top, left, bottom, right, brightness, contrast, saturation, hue = rows.T[:, :, None]
    planes = _interpolated(_interpolated(planes, _WIDTH, left, right), _HEIGHT, top, bottom)
    planes = planes.clamp_(0, 1).flatten(_HEIGHT)
    planes = (planes + brightness).clamp_(0, 1)
    planes = adjust_contrast(planes, contrast).clamp_(0, 1)
    planes = adjust_saturation(planes, saturation).clamp_(0, 1)
    planes = adjust_hue(planes, hue).clamp_(0, 1)
    as_bytes = (planes * 255.5).clamp_(0, 255).to(torch.uint8)
    return as_bytes.view(3, len(frames), size, size).permute(1, 2, 3, 0)


def _weighted_sums(planes: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    """Resize one axis by Lanczos, tap by tap, as ``image_presets.lanczos3``."""
    length = planes.shape[axis]
    starts, weights = _spans(length, size, planes.device)
    sums: torch.Tensor | float = 0.0
    for tap, weight in enumerate(weights):
        term = planes.index_select(axis, (starts + tap).clamp(max=length - 1))
        term *= weight[:, None] if axis == _HEIGHT else weight
        sums = sums + term
    return torch.as_tensor(sums)


@functools.lru_cache(maxsize=32)
def _spans(length: int, size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    starts, weights = lanczos3_spans(length, size)
    return torch.from_numpy(starts).to(device), torch.from_numpy(weights).to(device)


def _interpolated(planes: torch.Tensor, axis: int, start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """Stretch the part of one axis from ``start`` to ``end``, both ``(frames, 1)``, as ``crop_and_resize``."""
    length = planes.shape[axis]
    last = torch.full_like(start, length - 1)
    positions = start * last + torch.arange(length, device=planes.device) * ((end - start) * last / last)
    inside = (positions >= 0) & (positions <= last)
    positions = positions * inside
    before = positions.floor()
    shape = (1, len(start), length, 1) if axis == _HEIGHT else (1, len(start), 1, length)
    first, second = (
        planes.gather(axis, index.long().view(shape).expand_as(planes)) for index in (before, positions.ceil())
    )
    second -= first
    second *= (positions - before).view(shape)
    return (first + second) * inside.view(shape)
