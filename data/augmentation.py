"""The image augmentation of OpenVLA's and OpenVLA-OFT's fine-tuning, and the matching evaluation crop; no TensorFlow.

The reference (dlimp on TensorFlow) crops 90 % of the area, then changes brightness, contrast, saturation and hue in
float32, clipped to [0, 1] after each. Given the same parameters the result is equal in every pixel. Parameters are
drawn once for all steps of a window, and separately for every camera:

    augment = ImageAugmentation()
    generator = np.random.default_rng(seed)
    frames = {camera: augment(steps, generator) for camera, steps in frames.items()}

A model trained with it is evaluated with ``ImageAugmentation.center_crop`` (the processor's
``image_preset="center-crop"``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors_openvla import OpenVLATypeError, OpenVLAValueError
from ..images_openvla import (
    CENTER_CROP_AREA,
    as_rounded_bytes,
    as_unit_floats,
    center_cropped,
    crop_and_resize,
)

TINY = 2.0**-126  # added to divisors, so that 0 / 0 is 0; divisors above 2**-102 stay the same
THIRD = 1.0 / 3.0  # of the colour circle
Planes = Any  # float32 channels, red, green, blue: a numpy array or a torch tensor


@dataclass(frozen=True)
class AugmentationParameters:
    """Parameters of the augmentation of one camera's frames.

    Attributes:
        box: Top, left, bottom, right of the crop, as fractions of the image; None for no crop.
        brightness: Added to the channels, which are in [0, 1].
        contrast: Factor of the distance from the channel's mean.
        saturation: Factor of the saturation.
        hue: Added to the hue, in turns of the colour circle, -1 to 1.
    """

    box: tuple[float, float, float, float] | None = None
    brightness: float = 0.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0


@dataclass(frozen=True)
class ImageAugmentation:
    """Random crop and colour jitter, with the reference's ranges as defaults.

    Attributes:
        area: Fraction of the image's area that the crop keeps, at the same aspect ratio.
        brightness: Drawn from [-brightness, brightness].
        contrast: Lowest and highest factor.
        saturation: Lowest and highest factor.
        hue: Drawn from [-hue, hue], in turns, at most 1.
        diagonal_crops: The crop's offsets from the left and from the top are equal, as in the reference, which draws
            both from one seed; False draws each separately.

    Raises:
        ValueError: A range is invalid.
    """

    area: float = CENTER_CROP_AREA
    brightness: float = 0.2
    contrast: tuple[float, float] = (0.8, 1.2)
    saturation: tuple[float, float] = (0.8, 1.2)
    hue: float = 0.05
    diagonal_crops: bool = True

    def __post_init__(self) -> None:
        """Validate the ranges."""
        if not 0 < self.area <= 1:
            raise OpenVLAValueError(f"area must lie in (0, 1], got {self.area}.")
        if not self.brightness >= 0 or not 0 <= self.hue <= 1:
            raise OpenVLAValueError(
                f"brightness must be 0 or more and hue 0 to 1, got {self.brightness} and {self.hue}."
            )
        for name in ("contrast", "saturation"):
            low, high = getattr(self, name)
            if not 0 <= low <= high:
                raise OpenVLAValueError(f"{name} must be (lowest, highest), 0 or more, got {(low, high)}.")

    def draw(self, generator: np.random.Generator | torch.Generator) -> AugmentationParameters:
        """Draw parameters for the frames of one camera. Each call takes six numbers from the generator."""
        top, left, brightness, contrast, saturation, hue = _six_uniform(generator)
        side = float(np.sqrt(np.float32(self.area)))
        top, left = top * (1 - side), (top if self.diagonal_crops else left) * (1 - side)
        return AugmentationParameters(
            box=(top, left, top + side, left + side),
            brightness=self.brightness * (2 * brightness - 1),
            contrast=self.contrast[0] + contrast * (self.contrast[1] - self.contrast[0]),
            saturation=self.saturation[0] + saturation * (self.saturation[1] - self.saturation[0]),
            hue=self.hue * (2 * hue - 1),
        )

    def __call__(self, frames: np.ndarray, generator: np.random.Generator | torch.Generator) -> np.ndarray:
        """Return augmented frames of one camera.

        Args:
            frames: uint8 ``(height, width, 3)`` or ``(steps, height, width, 3)``, at the size that the model takes:
                resize first, as the reference does.
            generator: numpy's or torch's (on the CPU).

        Returns:
            uint8, the same shape.

        Raises:
            ValueError: The frames have another shape or dtype.
            TypeError: ``generator`` is not a generator.
        """
        return augment_frames(frames, self.draw(generator))

    def center_crop(self, frames: np.ndarray) -> np.ndarray:
        """Return frames for evaluation: the center crop of the same area, with unchanged colours.

        Args:
            frames: As for ``__call__``.

        Returns:
            uint8, the same shape.

        Raises:
            ValueError: The frames have another shape or dtype.
        """
        _require_frames(frames)
        return center_cropped(frames, frames.shape[-3:-1], self.area)


def augment_frames(frames: np.ndarray, parameters: AugmentationParameters) -> np.ndarray:
    """Return frames that are augmented with the given parameters.

    Args:
        frames: uint8 ``(height, width, 3)`` or ``(steps, height, width, 3)``; all steps are changed alike.
        parameters: The parameters.

    Returns:
        uint8, the same shape.

    Raises:
        ValueError: The frames have another shape or dtype.
    """
    _require_frames(frames)
    if frames.ndim == 4:
        return np.stack([augment_frames(frame, parameters) for frame in frames]) if len(frames) else frames.copy()
    # Planes (3, height, width): separate channels are several times faster.
    planes = as_unit_floats(np.ascontiguousarray(frames.transpose(2, 0, 1)))
    if parameters.box is not None:
        planes = np.clip(crop_and_resize(planes[..., None], parameters.box, frames.shape[:2]), 0, 1)
    planes = planes.reshape(3, -1)
    planes = np.clip(planes + np.float32(parameters.brightness), 0, 1)
    planes = np.clip(adjust_contrast(planes, parameters.contrast), 0, 1)
    planes = np.clip(adjust_saturation(planes, parameters.saturation), 0, 1)
    planes = np.clip(adjust_hue(planes, parameters.hue), 0, 1)
    return np.stack(list(as_rounded_bytes(planes)), axis=-1).reshape(frames.shape)


def adjust_contrast(planes: Planes, factor: Planes | float) -> Planes:
    """Adjust contrast as ``tf.image.adjust_contrast``: scale the distance from each channel's mean.

    Args:
        planes: float32 ``(3, pixels)`` or ``(3, frames, pixels)``, red, green, blue.
        factor: 1 changes nothing; of several frames float32 ``(frames, 1)``.

    Returns:
        float32, the same shape.
    """
    sums, num_left = planes, planes.shape[-1]
    while True:  # in TensorFlow's order: add the second half to the first until one pixel is left
        num_right = num_left // 2
        num_left -= num_right
        halves = [sums[..., :num_right] + sums[..., num_left : num_left + num_right], sums[..., num_right:num_left]]
        sums = _library(planes).concatenate(halves, axis=-1)
        if num_left == 1:
            break
    mean = sums * (np.float32(1) / np.float32(planes.shape[-1]))
    return mean + (planes - mean) * factor


def adjust_saturation(planes: Planes, factor: Planes | float) -> Planes:
    """Adjust saturation as ``tf.image.adjust_saturation``, through hue, saturation and value.

    Args:
        planes: float32 ``(3, pixels)`` or ``(3, frames, pixels)`` in [0, 1], red, green, blue.
        factor: 1 changes nothing up to rounding; of several frames float32 ``(frames, 1)``.

    Returns:
        float32, the same shape.
    """
    library = _library(planes)
    low, middle, value, sector = _ordered(planes)
    spread = value - low
    chroma = library.clip(spread / (value + TINY) * factor, 0, 1) * value
    # Even sixths follow a primary colour and odd ones lead to the next; the thirds are added in float64, as in C.
    distance = 1 / (6 * (spread + TINY)) * ((middle - low) * (1 - 2 * (sector & 1)))
    hue = _as_float32(distance + THIRD * _as_float64(((sector + 1) >> 1) * (sector != 5)))
    hue += hue < 0
    hue *= 6
    lowest = value - chroma
    chroma *= hue < 6  # a hue just below 0 that was rounded up to the whole circle is grey, as in TensorFlow
    hue = 1 - (1 - hue)  # TensorFlow's rounding between red and yellow; changes nothing elsewhere
    adjusted = library.empty_like(planes)
    for channel, share in enumerate(_shares(hue)):
        library.add(share * chroma, lowest, out=adjusted[channel])
    return adjusted


def adjust_hue(planes: Planes, turns: Planes | float) -> Planes:
    """Adjust hue as ``tf.image.adjust_hue``: rotate the colour circle, keeping the highest and the lowest channel.

    Args:
        planes: float32 ``(3, pixels)`` or ``(3, frames, pixels)`` in [0, 1], red, green, blue.
        turns: -1 to 1; 0 changes nothing up to rounding. Of several frames float32 ``(frames, 1)``.

    Returns:
        float32, the same shape.
    """
    library = _library(planes)
    low, middle, high, sector = _ordered(planes)
    spread = high - low
    hue = sector + library.abs((sector & 1) - (middle - low) / (spread + TINY))
    hue += library.asarray(turns, dtype=library.float32) * library.asarray(6, dtype=library.float32)
    hue -= library.floor(hue * (1 / 6)) * 6
    below_1, below_3, below_5 = hue < 1, hue < 3, hue < 5
    is_highest = (below_1 | ~below_5, below_3 & ~below_1, below_5 & ~below_3)
    rest = high - (low + spread)  # rounding error of the sum, for the highest channel
    rotated = library.empty_like(planes)
    for channel, share in enumerate(_shares(hue)):
        library.add(low + share * spread, rest * is_highest[channel], out=rotated[channel])
    return rotated


def _ordered(planes: Planes) -> tuple[Planes, ...]:
    """Return the lowest, middle and highest channel of each pixel, and its sixth of the colour circle, int8 0 to 5."""
    library = _library(planes)
    red, green, blue = planes
    low, high = library.minimum(red, green), library.maximum(red, green)
    middle = library.maximum(low, library.minimum(high, blue))
    low, high = library.minimum(low, blue), library.maximum(high, blue)
    green_over_red, blue_under_red, blue_over_green, blue_under_green, blue_over_red = (
        test.view(library.int8) for test in (green > red, blue < red, blue > green, blue < green, blue > red)
    )
    sector = green_over_red * (2 - blue_under_red + blue_over_green)
    sector += (1 - green_over_red) * (5 - 5 * blue_under_green - blue_over_red)
    return low, middle, high, sector


def _shares(hue: Planes) -> tuple[Planes, ...]:
    """Return how far red, green and blue are from the lowest to the highest channel, 0 to 1.

    ``hue`` is in sixths of the colour circle, 0 to 6.
    """
    library = _library(hue)
    distances = library.maximum(2 - hue, hue - 4), library.minimum(hue, 4 - hue), library.minimum(hue - 2, 6 - hue)
    return tuple(library.clip(distance, 0, 1) for distance in distances)


def _library(planes: Planes) -> Any:
    """Return the library of an array: numpy or torch, whose functions used here have the same names."""
    return torch if torch.is_tensor(planes) else np


def _as_float32(values: Planes) -> Planes:
    return values.float() if torch.is_tensor(values) else values.astype(np.float32)


def _as_float64(values: Planes) -> Planes:
    return values.double() if torch.is_tensor(values) else values.astype(np.float64)


def _six_uniform(generator: np.random.Generator | torch.Generator) -> list[float]:
    if isinstance(generator, np.random.Generator):
        return generator.random(6).tolist()
    if isinstance(generator, torch.Generator):
        return torch.rand(6, dtype=torch.float64, generator=generator).tolist()
    raise OpenVLATypeError(
        f"generator must be numpy.random.default_rng(seed) or torch.Generator(), got {type(generator).__name__}."
    )


def _require_frames(frames: np.ndarray) -> None:
    if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8:
        raise OpenVLAValueError(f"Frames must be a uint8 array, got {getattr(frames, 'dtype', type(frames).__name__)}.")
    if frames.ndim not in (3, 4) or frames.shape[-1] != 3 or 0 in frames.shape[-3:]:
        raise OpenVLAValueError(
            f"Frames must have shape (height, width, 3) or (steps, height, width, 3), got {frames.shape}."
        )
