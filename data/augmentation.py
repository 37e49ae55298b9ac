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

import functools
from dataclasses import dataclass

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

BLOCK = 16384  # pixels whose colours are computed together: their intermediate results stay in the processor's cache
ZERO, ONE, SIX = np.float32(0), np.float32(1), np.float32(6)
# Behind the highest channel (red, green, blue): the next one on the circle, the last one, and where the hue begins.
_NEXT, _LAST, _THIRDS = np.array([1, 2, 0]), np.array([2, 0, 1]), np.array([0.0, 2.0 / 6.0, 4.0 / 6.0])
# Sixth of the circle, by the five comparisons of adjust_hue as bits.
_SECTORS = np.array(
    [
        (1 if bits & 2 else 3 if bits & 4 else 2) if bits & 1 else (0 if bits & 8 else 4 if bits & 16 else 5)
        for bits in range(32)
    ],
    np.int8,
)
# Rank of red, green and blue (0 the highest) in each sixth of the circle, and in the seventh.
_RANKS = np.array([[0, 1, 2, 2, 1, 0, 2], [1, 0, 0, 1, 2, 2, 2], [2, 2, 1, 0, 0, 1, 2]])


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
    augmented = np.empty(planes.shape, dtype=np.uint8)
    for start in range(0, planes.shape[1], BLOCK):
        block = planes[:, start : start + BLOCK]
        block = np.clip(adjust_saturation(block, parameters.saturation), 0, 1)
        block = np.clip(adjust_hue(block, parameters.hue), 0, 1)
        augmented[:, start : start + BLOCK] = as_rounded_bytes(block)
    return np.ascontiguousarray(augmented.T).reshape(frames.shape)


def adjust_contrast(planes: np.ndarray, factor: float) -> np.ndarray:
    """Adjust contrast as ``tf.image.adjust_contrast``: scale the distance from each channel's mean.

    Args:
        planes: float32 ``(3, pixels)``, red, green, blue.
        factor: 1 changes nothing.

    Returns:
        float32 ``(3, pixels)``.
    """
    sums, num_left = planes, planes.shape[1]
    while True:  # in TensorFlow's order: add the second half to the first until one pixel is left
        num_right = num_left // 2
        num_left -= num_right
        sums = np.concatenate(
            [sums[:, :num_right] + sums[:, num_left : num_left + num_right], sums[:, num_right:num_left]], axis=1
        )
        if num_left == 1:
            break
    mean = sums * (ONE / np.float32(planes.shape[1]))
    return mean + np.float32(factor) * (planes - mean)


def adjust_saturation(planes: np.ndarray, factor: float) -> np.ndarray:
    """Adjust saturation as ``tf.image.adjust_saturation``, through hue, saturation and value.

    Args:
        planes: float32 ``(3, pixels)`` in [0, 1], red, green, blue.
        factor: 1 changes nothing up to rounding.

    Returns:
        float32 ``(3, pixels)``.
    """
    red, green, blue = planes
    value = np.maximum(red, np.maximum(green, blue))
    spread = value - np.minimum(red, np.minimum(green, blue))
    saturation = spread / (value + (value <= 0))  # 0 where value is 0
    norm = ONE / (SIX * (spread + (spread <= 0)))
    red_most = red == value
    highest = 2 - 2 * red_most.view(np.int8) - (~red_most & (green == value)).view(np.int8)
    # One subtraction per pixel; the thirds of the circle are added in float64, as C's 2.0 / 6.0 makes them.
    first, second = _chosen(planes, _NEXT, highest), _chosen(planes, _LAST, highest)
    hue = (norm * (first - second) + _THIRDS.take(highest)).astype(np.float32)
    hue += hue < 0

    chroma = np.clip(saturation * np.float32(factor), ZERO, ONE) * value
    hue *= SIX
    folded = hue - np.float32(2) * np.floor(hue * np.float32(0.5))
    middle = chroma * (ONE - np.abs(folded - ONE))
    return _by_sector(hue.astype(np.int8), chroma, middle, np.zeros_like(chroma)) + (value - chroma)


def adjust_hue(planes: np.ndarray, turns: float) -> np.ndarray:
    """Adjust hue as ``tf.image.adjust_hue``: rotate the colour circle, keeping the highest and the lowest channel.

    Args:
        planes: float32 ``(3, pixels)`` in [0, 1], red, green, blue.
        turns: 0 changes nothing up to rounding.

    Returns:
        float32 ``(3, pixels)``.
    """
    red, green, blue = planes
    low, high = np.minimum(red, green), np.maximum(red, green)
    middle = np.maximum(low, np.minimum(high, blue))
    low, high = np.minimum(low, blue), np.maximum(high, blue)
    order = [red < green, blue < red, blue > green, blue < green, blue > red]
    sector = _SECTORS.take(sum(test.view(np.int8) << bit for bit, test in enumerate(order)))
    spread = high - low
    is_colour = spread != 0
    share = (middle - low) / (spread + ~is_colour)
    hue = (sector + np.abs((sector & 1) - share)) * is_colour  # of every other sixth 1 - share
    hue += np.float32(turns) * SIX
    while (below := hue < 0).any():
        hue += SIX * below
    while (above := hue >= SIX).any():
        hue -= SIX * above

    sector = hue.astype(np.int8)
    share = hue - sector
    middle = low + np.abs((sector & 1) - share) * spread
    return _by_sector(sector, high, middle, low)


def _by_sector(sector: np.ndarray, high: np.ndarray, middle: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Return red, green and blue, ``(3, pixels)``, from the highest, middle and lowest channel and the hue's sixth.

    A seventh sixth, of a hue just below 0 that was rounded up to the whole circle, is grey, as in TensorFlow.
    """
    ordered = np.stack([high, middle, low])
    return np.stack([_chosen(ordered, ranks, sector) for ranks in _RANKS])


def _chosen(planes: np.ndarray, plane_of: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """Return, ``(pixels,)``, of each pixel the plane ``plane_of[kind]``: ``np.where``, several times faster."""
    num_pixels = planes.shape[1]
    places = (plane_of * num_pixels).take(kinds)
    places += _counted(num_pixels)
    return planes.reshape(-1).take(places)


@functools.lru_cache(maxsize=4)
def _counted(length: int) -> np.ndarray:
    return np.arange(length)


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
