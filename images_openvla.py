"""Convert any image to an RGB PIL image; resize and normalise it as the reference's torchvision does on PIL images.

The crop of the preset "center-crop" is TensorFlow's instead, as in the reference's evaluation scripts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageMode
from transformers.utils import logging

from .errors_openvla import OpenVLAFileNotFoundError, OpenVLATypeError, OpenVLAValueError

logger = logging.get_logger(__name__)

ImageInput = Any  # a PIL image, a numpy array, a torch tensor, or a path to an image file
# Preprocessing of a camera frame to RGB before the image processor; given height and width that the model takes.
ImagePreset = Callable[[Image.Image, Sequence[int]], Image.Image]

CENTER_CROP_AREA = 0.9
EXIF_ORIENTATION = 0x0112
# Transposition by which viewers show an EXIF orientation upright; 1, and values that are no orientation, need none.
EXIF_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class TowerTransform(NamedTuple):
    """Preprocessing of one vision tower: arguments of torchvision's transforms, as published files hold them."""

    resize: dict[str, Any]  # size and interpolation (PIL's code)
    crop: dict[str, Any]  # output_size
    normalize: dict[str, Any]  # mean and std


def as_images(images: ImageInput | Sequence[ImageInput]) -> list[Image.Image]:
    """Return one image or several as RGB PIL images.

    A file is turned as its EXIF orientation says. A PIL image is taken as its pixels are stored, as in the reference;
    a warning is logged for one that its EXIF data would turn. What is no image raises ValueError or TypeError.
    """
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        images = list(images)
    if not isinstance(images, (list, tuple)):
        images = [images]
    if not images:
        raise OpenVLAValueError("Got no image.")
    return [_as_image(image) for image in images]


def _as_image(image: ImageInput) -> Image.Image:
    if isinstance(image, (str, os.PathLike)):
        return _from_file(image)
    if isinstance(image, Image.Image):
        return _from_pil(image)
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        if image.ndim == 3 and image.shape[0] in (1, 3, 4):  # channels first, as usual in torch
            image = image.permute(1, 2, 0)
        image = image.float().numpy() if image.is_floating_point() else image.numpy()
    if not isinstance(image, np.ndarray):
        raise OpenVLATypeError(
            f"An image must be a PIL image, a numpy array, a torch tensor or a path, got {type(image).__name__}."
        )
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)) or 0 in image.shape:
        raise OpenVLAValueError(
            f"An image array must have shape (height, width, 3) (or 1 or 4 channels, or none), got {image.shape}."
        )
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[:, :, 0]
    return Image.fromarray(_as_bytes(image)).convert("RGB")


def _from_pil(image: Image.Image) -> Image.Image:
    if 0 in image.size:
        raise OpenVLAValueError(f"A picture must have pixels, got {image.width} x {image.height}.")
    require_eight_bits(image)  # before its EXIF data is asked for, which reads a PNG file
    if _exif_transpose(image) is not None:
        logger.warning_once(
            "A PIL image is taken as its pixels are stored, though its EXIF orientation says that a viewer turns it. "
            "If the camera was held so, give the path, or turn it with PIL.ImageOps.exif_transpose."
        )
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_file(path: str | os.PathLike) -> Image.Image:
    name = f"{os.fspath(path)!r:.300}"
    try:
        with Image.open(path) as opened:
            return upright_rgb(opened)
    except FileNotFoundError as error:
        raise OpenVLAFileNotFoundError(f"No picture at {name}; give the path of a file.") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # raised by Pillow, broken files
        raise OpenVLAValueError(f"{name} must be a picture file that Pillow can read: {error}") from error


def upright_rgb(picture: Image.Image) -> Image.Image:
    """Return a picture that was opened from a file or bytes as RGB, turned as its EXIF data says; drop transparency."""
    require_one_frame(require_eight_bits(picture)).load()  # turns a TIFF file
    transpose = _exif_transpose(picture)
    return (picture if transpose is None else picture.transpose(transpose)).convert("RGB")


def _exif_transpose(picture: Image.Image) -> Image.Transpose | None:
    """Return how viewers turn a picture; None for not at all, and where its EXIF data cannot be read."""
    try:
        return EXIF_TRANSPOSES.get(picture.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:  # broken data raises whatever Pillow's parsers of TIFF and XML raise
        return None


def require_one_frame(picture: Image.Image) -> Image.Image:
    """Return a picture, or raise ValueError for an animation; frames of an MPO file are previews of its first."""
    if getattr(picture, "is_animated", False) and picture.format != "MPO":
        frames = getattr(picture, "n_frames", "several")
        raise OpenVLAValueError(
            f"A picture file must hold one frame, got {frames} ({picture.format}); which is meant is not known. Open "
            "it with PIL, seek to the frame, and give that image."
        )
    return picture


def require_eight_bits(picture: Image.Image) -> Image.Image:
    """Return a picture whose channels have 8 bits, or 1; raise ValueError for others.

    Pillow clips those to black or white, or takes the upper 8 of 16 bits, which leaves 12-bit data black.
    """
    # Raw mode of a file that is not read yet, such as "RGB;16B".
    mode = next(iter(re.findall(r"\w+;16\w*", str(getattr(picture, "tile", "")))), picture.mode)
    if mode != picture.mode or not ImageMode.getmode(mode).typestr.endswith("1"):
        raise OpenVLAValueError(
            f"A picture must have 8 bits a channel, got mode {mode}, whose numbers may mean any brightness (or "
            "depth); give 8-bit RGB or grey, scaled as in training."
        )
    return picture


def _as_bytes(image: np.ndarray) -> np.ndarray:
    """Return uint8 of uint8 or of float in [0, 1]."""
    if image.dtype == np.uint8:
        return image
    if not np.issubdtype(image.dtype, np.floating):
        raise OpenVLAValueError(f"An image array must be uint8, or float in [0, 1], got dtype {image.dtype}.")
    if not np.isfinite(image).all() or image.min() < 0 or image.max() > 1:
        raise OpenVLAValueError(
            f"A float image must lie in [0, 1], got values from {image.min()} to {image.max()}; "
            "divide by 255 or give uint8."
        )
    return np.round(image.astype(np.float64) * 255).astype(np.uint8)


def padded_to_square(image: Image.Image, fill: tuple[int, ...]) -> Image.Image:
    """Pad both sides of the shorter dimension. An odd difference stays one pixel short, as in the reference."""
    left, top, size = padded_size(*image.size)
    padded = Image.new("RGB", size, fill)
    padded.paste(image, (left, top))
    return padded


def padded_size(width: int, height: int) -> tuple[int, int, tuple[int, int]]:
    """Return left and top of an image on its square, and the square's width and height."""
    left, top = (max(width, height) - width) // 2, (max(width, height) - height) // 2
    return left, top, (width + 2 * left, height + 2 * top)


def resized(image: Image.Image, size: int | Sequence[int], resampling: int) -> Image.Image:
    """Resize to ``(height, width)``, or the shorter side to ``size`` keeping the aspect (torchvision's rounding)."""
    target = target_size(*image.size, size)
    return image if target == image.size else image.resize(target, Image.Resampling(resampling))


def target_size(width: int, height: int, size: int | Sequence[int]) -> tuple[int, int]:
    """Return width and height after ``resized``."""
    if not isinstance(size, int):
        return (size[1], size[0]) if len(size) == 2 else (size[0], size[0])
    short, long = min(width, height), int(size * max(width, height) / min(width, height))
    return (width, height) if short == size else ((size, long) if width <= height else (long, size))


def center_crop(image: Image.Image, size: Sequence[int]) -> Image.Image:
    """Crop the middle ``(height, width)`` (torchvision's rounding)."""
    height, width = size
    if image.size == (width, height):
        return image
    left, top = crop_corner(*image.size, size)
    return image.crop((left, top, left + width, top + height))


def crop_corner(width: int, height: int, size: Sequence[int]) -> tuple[int, int]:
    """Return left and top of ``center_crop``."""
    return round((width - size[1]) / 2.0), round((height - size[0]) / 2.0)


def normalized_pixels(image: Image.Image, towers: Sequence[TowerTransform], fill: Sequence[int] | None) -> np.ndarray:
    """Letterbox (with ``fill``), resize, centre crop and normalise RGB: float32 ``(3 * towers, height, width)``."""
    image = image if fill is None else padded_to_square(image, tuple(fill))

    def prepare(size: Any, resampling: int, crop: Sequence[int]) -> np.ndarray:
        return unit_floats(np.asarray(center_crop(resized(image, size, resampling), crop)).transpose(2, 0, 1))

    prepared = list(each_tower(towers, prepare))
    planes = np.empty((len(towers), *prepared[0][1].shape), np.float32)
    for plane, (normalize, unit) in zip(planes, prepared):
        normalized(unit, normalize["mean"], normalize["std"], plane)
    return planes.reshape(-1, *planes.shape[2:])


def each_tower(
    towers: Sequence[TowerTransform], prepare: Callable[[Any, int, Sequence[int]], Any]
) -> Iterator[tuple[dict[str, Any], Any]]:
    """Yield every tower's normalisation and its pixels, made once for towers with the same size, filter and crop."""
    prepared: dict[str, Any] = {}
    for tower in towers:
        arguments = tower.resize["size"], tower.resize["interpolation"], tower.crop["output_size"]
        if str(arguments) not in prepared:
            prepared[str(arguments)] = prepare(*arguments)
        yield tower.normalize, prepared[str(arguments)]


def unit_floats(pixels: np.ndarray) -> np.ndarray:
    """Return uint8 as float32 in [0, 1]."""
    return np.divide(pixels, np.float32(255), out=np.empty(pixels.shape, np.float32), dtype=np.float32)


def normalized(unit: np.ndarray, mean: Sequence[float], std: Sequence[float], out: np.ndarray) -> np.ndarray:
    """Write ``(unit - mean) / std`` of float32 ``(3, height, width)`` into ``out``, and return it."""
    mean_plane, std_plane = (np.array(numbers, dtype=np.float32)[:, None, None] for numbers in (mean, std))
    np.subtract(unit, mean_plane, out=out)
    out /= std_plane
    return out


def center_crop_preset(image: Image.Image, size: Sequence[int]) -> Image.Image:
    """Return the middle 90 % of the area, as for every checkpoint that was fine-tuned with image augmentation."""
    return Image.fromarray(center_cropped(np.array(image), size))


# Presets that need no package: a checkpoint that was fine-tuned with augmentation has image_preset="center-crop".
SHIPPED_IMAGE_PRESETS: dict[str, ImagePreset] = {"center-crop": center_crop_preset}


def center_cropped(pixels: np.ndarray, size: Sequence[int], area: float = CENTER_CROP_AREA) -> np.ndarray:
    """Crop the middle ``area`` of uint8 ``(height, width, channels)``, same aspect: uint8 ``(*size, channels)``."""
    side = np.sqrt(np.float32(area))
    start = (np.float32(1) - side) / np.float32(2)
    cropped = crop_and_resize(as_unit_floats(pixels), (start, start, start + side, start + side), size)
    return as_rounded_bytes(np.clip(cropped, 0, 1))


def crop_and_resize(pixels: np.ndarray, box: Sequence[float], size: Sequence[int]) -> np.ndarray:
    """Crop a box of float32 ``(..., height, width, channels)`` and resize it, as ``tf.image.crop_and_resize``.

    ``box`` is top, left, bottom, right: 0 is the centre of the first row or column and 1 that of the last; where it
    leaves the image the result, float32 ``(..., *size, channels)``, is 0.
    """
    top, left, bottom, right = np.asarray(box, dtype=np.float32)
    columns = _interpolated(np.ascontiguousarray(np.swapaxes(pixels, -2, -3)), left, right, size[1])
    return _interpolated(np.ascontiguousarray(np.swapaxes(columns, -2, -3)), top, bottom, size[0])


def _interpolated(pixels: np.ndarray, start: np.float32, end: np.float32, target: int) -> np.ndarray:
    """Return ``target`` rows ``(..., target, width, channels)`` between the rows of an image; 0 outside of it."""
    before, after, weight, inside = _bilinear_samples(start, end, pixels.shape[-3], target)
    first, second = np.take(pixels, before, axis=-3), np.take(pixels, after, axis=-3)
    second -= first
    second *= weight[:, None, None]
    first += second
    first[..., ~inside, :, :] = 0
    return first


def _bilinear_samples(start: np.float32, end: np.float32, length: int, target: int) -> tuple[np.ndarray, ...]:
    """Return for ``target`` samples from ``start`` to ``end`` both neighbours, the second's weight, and if inside."""
    last = np.float32(length - 1)
    if target > 1:
        step = (end - start) * last / np.float32(target - 1)
        positions = start * last + np.arange(target, dtype=np.float32) * step
    else:
        positions = np.array([0.5 * float(start + end) * (length - 1)], dtype=np.float32)
    inside = (positions >= 0) & (positions <= last)
    before = np.floor(np.where(inside, positions, 0))
    after = np.ceil(np.where(inside, positions, 0))
    weight = (positions - before).astype(np.float32)
    return before.astype(np.int64), after.astype(np.int64), weight, inside


def as_unit_floats(pixels: np.ndarray) -> np.ndarray:
    """Convert uint8 to float32 in [0, 1], as ``tf.image.convert_image_dtype``."""
    return pixels.astype(np.float32) * np.float32(1 / 255)


def as_rounded_bytes(values: np.ndarray) -> np.ndarray:
    """Convert float32 in [0, 1] to uint8, as ``tf.image.convert_image_dtype(saturate=True)``."""
    return np.clip(values * np.float32(255.5), 0, 255).astype(np.uint8)
