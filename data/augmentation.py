"""The image augmentation that OpenVLA and OpenVLA-OFT were fine-tuned with, and its twin for evaluation; no TensorFlow.

The reference (dlimp on TensorFlow, as both call it) crops 90 % of the area, then changes brightness, contrast,
saturation and hue, in float32, clipped to [0, 1] after each. Given the same parameters the result
is the same in every pixel. Parameters are drawn once for all steps of a window, and anew for every camera:

    augment = ImageAugmentation()
    generator = np.random.default_rng(seed)
    frames = {camera: augment(steps, generator) for camera, steps in frames.items()}

A model trained so is evaluated with ``ImageAugmentation.evaluated`` (the processor's ``image_preset="center-crop"``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..errors_openvla import OpenVLATypeError, OpenVLAValueError
from ..inference.image_presets import (
    CENTER_CROP_AREA,
    as_rounded_bytes,
    as_unit_floats,
    center_cropped,
    crop_and_resize,
)

ZERO, ONE, SIX = np.float32(0), np.float32(1), np.float32(6)

# Of red, green and blue in every sixth of the colour circle: highest (0), middle (1) or lowest (2). A seventh, where a
# hue just under 0 was rounded up to the whole circle, gets no colour, as in TensorFlow.
ORDER = np.array([[0, 1, 2, 2, 1, 0, 2], [1, 0, 0, 1, 2, 2, 2], [2, 2, 1, 0, 0, 1, 2]])


@dataclass(frozen=True)
class AugmentationParameters:
    """What is done to the frames of one camera.

    Attributes:
        box: Top, left, bottom, right of the crop, as shares of the image; None for no crop.
        brightness: Added to channels in [0, 1].
        contrast: Factor of the distance from the channel's mean.
        saturation: Factor.
        hue: Added, in turns of the colour circle, -1 to 1.
    """

    box: tuple[float, float, float, float] | None = None
    brightness: float = 0.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0


@dataclass(frozen=True)
class ImageAugmentation:
    """Random crop and colours, with the reference's ranges.

    Attributes:
        area: Share of the image's area that the crop keeps; the aspect stays.
        brightness: Drawn from plus or minus this.
        contrast: Lowest and highest factor.
        saturation: Lowest and highest factor.
        hue: Drawn from plus or minus this, in turns, at most 1.
        diagonal_crops: The crop is as far from the left as from the top. So it is in the reference, which draws both
            from one seed; False draws each by itself.

    Raises:
        ValueError: A range that makes no sense.
    """

    area: float = CENTER_CROP_AREA
    brightness: float = 0.2
    contrast: tuple[float, float] = (0.8, 1.2)
    saturation: tuple[float, float] = (0.8, 1.2)
    hue: float = 0.05
    diagonal_crops: bool = True

    def __post_init__(self) -> None:
        """Check the ranges."""
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
        """Parameters for the frames of one camera. Each call takes six numbers from the generator."""
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
        """Augmented frames of one camera.

        Args:
            frames: uint8 ``(height, width, 3)``, or with steps in front ``(steps, height, width, 3)``, at the size that
                the model takes: resize first, as the reference does.
            generator: numpy's or torch's (on the CPU).

        Returns:
            uint8, the same shape.

        Raises:
            ValueError: Another shape or dtype.
            TypeError: No generator.
        """
        return augmented(frames, self.draw(generator))

    def evaluated(self, frames: np.ndarray) -> np.ndarray:
        """The same frames for evaluation: the middle crop of the same area, colours as they are.

        Args:
            frames: As for the call.

        Returns:
            uint8, the same shape.

        Raises:
            ValueError: Another shape or dtype.
        """
        _require_frames(frames)
        return center_cropped(frames, frames.shape[-3:-1], self.area)


def augmented(frames: np.ndarray, parameters: AugmentationParameters) -> np.ndarray:
    """Frames changed by given parameters.

    Args:
        frames: uint8 ``(height, width, 3)`` or ``(steps, height, width, 3)``; all steps alike.
        parameters: What to do.

    Returns:
        uint8, the same shape.

    Raises:
        ValueError: Another shape or dtype.
    """
    _require_frames(frames)
    if frames.ndim == 4:
        return np.stack([augmented(frame, parameters) for frame in frames]) if len(frames) else frames.copy()
    pixels = as_unit_floats(frames)
    if parameters.box is not None:
        pixels = np.clip(crop_and_resize(pixels, parameters.box, frames.shape[:2]), 0, 1)
    planes = np.ascontiguousarray(pixels.reshape(-1, 3).T)  # (3, pixels): channels apart are several times faster
    planes = np.clip(planes + np.float32(parameters.brightness), 0, 1)
    planes = np.clip(adjust_contrast(planes, parameters.contrast), 0, 1)
    planes = np.clip(adjust_saturation(planes, parameters.saturation), 0, 1)
    planes = np.clip(adjust_hue(planes, parameters.hue), 0, 1)
    return np.ascontiguousarray(as_rounded_bytes(planes).T).reshape(frames.shape)


def adjust_contrast(planes: np.ndarray, factor: float) -> np.ndarray:
    """``tf.image.adjust_contrast``: away from, or closer to, each channel's mean.

    Args:
        planes: float32 ``(3, pixels)``, red, green, blue.
        factor: 1 changes nothing.

    Returns:
        float32 ``(3, pixels)``.
    """
    sums, left = planes, planes.shape[1]
    while True:  # in TensorFlow's order: the second half onto the first, until one pixel is left
        right = left // 2
        left -= right
        sums = np.concatenate([sums[:, :right] + sums[:, left : left + right], sums[:, right:left]], axis=1)
        if left == 1:
            break
    mean = sums * (ONE / np.float32(planes.shape[1]))
    return mean + np.float32(factor) * (planes - mean)


def adjust_saturation(planes: np.ndarray, factor: float) -> np.ndarray:
    """``tf.image.adjust_saturation``, through hue, saturation and value.

    Args:
        planes: float32 ``(3, pixels)`` in [0, 1], red, green, blue.
        factor: 1 changes nothing but roundings.

    Returns:
        float32 ``(3, pixels)``.
    """
    red, green, blue = planes
    value = np.maximum(red, np.maximum(green, blue))
    spread = value - np.minimum(red, np.minimum(green, blue))
    grey = spread <= 0
    saturation = spread / np.where(value > 0, value, ONE)  # 0 where value is 0
    norm = ONE / (SIX * np.where(grey, ONE, spread))
    red_most = red == value
    green_most = ~red_most & (green == value)
    # One subtraction a pixel; the thirds of the circle are added in float64, as C's 2.0 / 6.0 makes them.
    first = np.where(red_most, green, np.where(green_most, blue, red))
    second = np.where(red_most, blue, np.where(green_most, red, green))
    third = np.where(red_most, 0.0, np.where(green_most, 2.0 / 6.0, 4.0 / 6.0))
    hue = (norm * (first - second) + third).astype(np.float32)
    hue[grey] = 0
    hue = np.where(hue < 0, hue + ONE, hue)

    chroma = np.clip(saturation * np.float32(factor), ZERO, ONE) * value
    hue = hue * SIX
    folded = hue - np.float32(2) * np.floor(hue * np.float32(0.5))
    middle = chroma * (ONE - np.abs(folded - ONE))
    return _by_sector(hue.astype(np.intp), chroma, middle, np.zeros_like(chroma)) + (value - chroma)


def adjust_hue(planes: np.ndarray, turns: float) -> np.ndarray:
    """``tf.image.adjust_hue``: along the colour circle, keeping the highest and the lowest channel.

    Args:
        planes: float32 ``(3, pixels)`` in [0, 1], red, green, blue.
        turns: 0 changes nothing but roundings.

    Returns:
        float32 ``(3, pixels)``.
    """
    red, green, blue = planes
    low, high = np.minimum(red, green), np.maximum(red, green)
    middle = np.maximum(low, np.minimum(high, blue))
    low, high = np.minimum(low, blue), np.maximum(high, blue)
    sector = np.where(
        red < green,
        np.where(blue < red, 1, np.where(blue > green, 3, 2)),
        np.where(blue < green, 0, np.where(blue > red, 4, 5)),
    ).astype(np.int8)
    spread = high - low
    grey = spread == 0
    share = (middle - low) / np.where(grey, ONE, spread)
    hue = sector.astype(np.float32) + np.where(sector & 1, ONE - share, share)
    hue[grey] = 0
    hue += np.float32(turns) * SIX
    while (below := hue < 0).any():
        hue[below] += SIX
    while (above := hue >= SIX).any():
        hue[above] -= SIX

    sector = hue.astype(np.intp)
    share = hue - sector.astype(np.float32)
    middle = low + np.where(sector & 1, ONE - share, share) * spread
    return _by_sector(sector, high, middle, low)


def _by_sector(sector: np.ndarray, high: np.ndarray, middle: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Red, green and blue, ``(3, pixels)``, where these are the channels of the hue's sixth of the colour circle."""
    count = len(sector)
    return np.concatenate([high, middle, low])[(ORDER * count)[:, sector] + np.arange(count)]


def _six_uniform(generator: np.random.Generator | torch.Generator) -> list[float]:
    if isinstance(generator, np.random.Generator):
        return generator.random(6).tolist()
    if isinstance(generator, torch.Generator):
        return torch.rand(6, dtype=torch.float64, generator=generator).tolist()
    raise OpenVLATypeError(
        "Randomness must come from a generator of yours, numpy.random.default_rng(seed) or torch.Generator(), got "
        f"{type(generator).__name__}."
    )


def _require_frames(frames: np.ndarray) -> None:
    if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8:
        raise OpenVLAValueError(f"Frames must be a uint8 array, got {getattr(frames, 'dtype', type(frames).__name__)}.")
    if frames.ndim not in (3, 4) or frames.shape[-1] != 3 or 0 in frames.shape[-3:]:
        raise OpenVLAValueError(
            f"Frames must have shape (height, width, 3) or (steps, height, width, 3), got {frames.shape}."
        )
