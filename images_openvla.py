"""Any image in, an RGB PIL image out; the resizing that the reference's torchvision does on PIL images, and what its
TensorFlow does to frames before that (``IMAGE_PRESETS``), pixel for pixel.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageMode
from transformers.utils import logging

from .errors_openvla import OpenVLAFileNotFoundError, OpenVLATypeError, OpenVLAValueError
from .jpeg_openvla import jpeg_round_trip

logger = logging.get_logger(__name__)

ImageInput = Any  # a PIL image, a numpy array, a torch tensor, or a path to an image file

# What was done to camera frames in evaluation, before the image processor.
IMAGE_PRESETS = {
    "none": "nothing: for what was trained on frames as they are",
    "center-crop": "the middle 90 % of the area, as for every checkpoint fine-tuned with image augmentation",
    "libero": "JPEG and Lanczos to the model's size (unless the frame has it already), then center-crop",
    "libero-raw": "the simulator's own frames: turned by 180 degrees and never skipped, else as libero",
}
CENTER_CROP_AREA = 0.9
EXIF_ORIENTATION = 0x0112
# How viewers turn a picture, by its EXIF orientation; 1, and whatever is no orientation, is not at all.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# glibc's polynomials of sinf, close to the Taylor series.
_SINE = [float.fromhex(c) for c in ("-0x1.555545995a603p-3", "0x1.1107605230bc4p-7", "-0x1.994eb3774cf24p-13")]
_COSINE = [
    float.fromhex(c)
    for c in ("-0x1.ffffffd0c621cp-2", "0x1.55553e1068f19p-5", "-0x1.6c087e89a359dp-10", "0x1.99343027bf8c3p-16")
]


def as_images(images: ImageInput | Sequence[ImageInput]) -> list[Image.Image]:
    """Return RGB PIL images of whatever was given.

    A file is turned as its EXIF orientation says, as viewers show it. A PIL image is taken as its pixels lie, as the
    reference takes it; one that was opened from a file and not turned (``PIL.ImageOps.exif_transpose``) is warned of.

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
        raise OpenVLAValueError("Got no image.")
    return [_as_image(image) for image in images]


def _as_image(image: ImageInput) -> Image.Image:
    if isinstance(image, (str, os.PathLike)):
        return _from_file(image)
    if isinstance(image, Image.Image):
        if 0 in image.size:
            raise OpenVLAValueError(f"A picture must have pixels, got {image.width} x {image.height}.")
        require_eight_bits(image)  # before its EXIF data is asked for, which reads a PNG file
        if _turn(image) is not None:
            logger.warning_once(
                "A PIL image is taken as its pixels lie, though its EXIF orientation says that a viewer turns it. If "
                "the camera was held so, give the path, or turn it with PIL.ImageOps.exif_transpose. (Said once.)"
            )
        return image if image.mode == "RGB" else image.convert("RGB")
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        if image.ndim == 3 and image.shape[0] in (1, 3, 4):  # channels first, torch's habit
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


def _from_file(path: str | os.PathLike) -> Image.Image:
    try:
        with Image.open(path) as opened:
            return upright_rgb(opened)
    except FileNotFoundError as error:
        raise OpenVLAFileNotFoundError(f"No picture at {os.fspath(path)!r:.300}; give the path of a file.") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow's, of broken files
        raise OpenVLAValueError(
            f"{os.fspath(path)!r:.300} must be a picture file that Pillow can read: {error}"
        ) from error


def upright_rgb(picture: Image.Image) -> Image.Image:
    """Return a picture that was opened from a file or bytes as viewers show it: RGB, turned as its EXIF says.

    Transparency is dropped: the colours are what the camera saw.
    """
    require_one_frame(require_eight_bits(picture)).load()  # a TIFF file turns itself then
    turn = _turn(picture)
    return (picture if turn is None else picture.transpose(turn)).convert("RGB")


def _turn(picture: Image.Image) -> Image.Transpose | None:
    """Return how viewers turn a picture; None for not at all, also where its EXIF data cannot be read."""
    try:
        return TURNS.get(picture.getexif().get(EXIF_ORIENTATION))
    except Exception:  # broken data raises whatever Pillow's parsers of TIFF and XML raise
        return None


def require_one_frame(picture: Image.Image) -> Image.Image:
    """Return a picture of a file if it is the only one there; an MPO file's others are previews of its first."""
    if getattr(picture, "is_animated", False) and picture.format != "MPO":
        raise OpenVLAValueError(
            f"A picture file must hold one frame, got {picture.n_frames} ({picture.format}); which is meant is not "
            "known. Open it with PIL, seek to the frame, and give that image."
        )
    return picture


def require_eight_bits(picture: Image.Image) -> Image.Image:
    """Return a picture whose channels have 8 bits or 1; ValueError for others, which Pillow clips to black or white.

    Of 16 bits a channel in colour Pillow keeps the upper 8 where a file is read, which leaves 12-bit data black.
    """
    # How a file that is not read yet lays its pixels out, such as "RGB;16B".
    mode = next(iter(re.findall(r"\w+;16\w*", str(getattr(picture, "tile", "")))), picture.mode)
    if mode != picture.mode or not ImageMode.getmode(mode).typestr.endswith("1"):
        raise OpenVLAValueError(
            f"A picture must have 8 bits a channel, got mode {mode}, whose numbers may mean any brightness (or "
            "depth); give 8-bit RGB or grey, scaled as in training."
        )
    return picture


def _as_bytes(image: np.ndarray) -> np.ndarray:
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
    """A border on both sides of the shorter dimension. An odd difference stays one pixel short, as in the reference."""
    left, top, size = padded_size(*image.size)
    padded = Image.new("RGB", size, fill)
    padded.paste(image, (left, top))
    return padded


def padded_size(width: int, height: int) -> tuple[int, int, tuple[int, int]]:
    """Where an image lies on its square, left and top, and the square's width and height."""
    left, top = (max(width, height) - width) // 2, (max(width, height) - height) // 2
    return left, top, (width + 2 * left, height + 2 * top)


def resized(image: Image.Image, size: int | Sequence[int], resampling: int) -> Image.Image:
    """To ``(height, width)``, or the shorter side to ``size`` keeping the aspect (torchvision's rounding)."""
    target = target_size(*image.size, size)
    return image if target == image.size else image.resize(target, resampling)


def target_size(width: int, height: int, size: int | Sequence[int]) -> tuple[int, int]:
    """Width and height that ``resized`` gives."""
    if not isinstance(size, int):
        return (size[1], size[0]) if len(size) == 2 else (size[0], size[0])
    short, long = min(width, height), int(size * max(width, height) / min(width, height))
    return (width, height) if short == size else ((size, long) if width <= height else (long, size))


def center_crop(image: Image.Image, size: Sequence[int]) -> Image.Image:
    """The middle ``(height, width)`` (torchvision's rounding)."""
    height, width = size
    if image.size == (width, height):
        return image
    left, top = crop_corner(*image.size, size)
    return image.crop((left, top, left + width, top + height))


def crop_corner(width: int, height: int, size: Sequence[int]) -> tuple[int, int]:
    """Left and top of ``center_crop``."""
    return round((width - size[1]) / 2.0), round((height - size[0]) / 2.0)


def require_used(
    instruction: Any, images: Any, padding: Any, truncation: Any, max_length: int | None, device: Any
) -> None:
    """Raise ValueError for arguments of a processor that would have no effect."""
    if instruction is not None and truncation not in (None, False, "do_not_truncate"):
        raise OpenVLAValueError(f"truncation={truncation!r}: an instruction is never cut; leave truncation out.")
    if instruction is not None and padding == "max_length" and max_length is None:
        raise OpenVLAValueError("padding='max_length' needs max_length.")
    if images is None and device is not None:
        raise OpenVLAValueError("device is where pixel_values are made, and there are no images; leave it out.")


def normalized_pixels(
    image: Image.Image, towers: Sequence[tuple[dict, dict, dict]], fill: Sequence[int] | None
) -> np.ndarray:
    """Letterbox, resize, centre crop, normalise, as torchvision does.

    Args:
        image: RGB.
        towers: Of every tower, how to resize, crop and normalise: fields of torchvision's transforms.
        fill: Colour of the border that makes the image square; None for no border.

    Returns:
        float32 ``(3 * towers, height, width)``.
    """
    image = image if fill is None else padded_to_square(image, tuple(fill))
    planes = None

    def prepare(size: Any, resampling: int, crop: Sequence[int]) -> np.ndarray:
        return _unit(np.asarray(center_crop(resized(image, size, resampling), crop)).transpose(2, 0, 1))

    for index, (normalize, unit) in enumerate(each_tower(towers, prepare)):
        if planes is None:
            planes = np.empty((len(towers), *unit.shape), np.float32)
        _normalized(unit, normalize["mean"], normalize["std"], planes[index])
    return planes.reshape(-1, *planes.shape[2:])


def each_tower(towers: Sequence[tuple[dict, dict, dict]], prepare: Callable) -> Iterator[tuple[dict, Any]]:
    """Every tower's normalisation, and its pixels: towers of one model mostly want the same, which are made once.

    Args:
        towers: As of ``normalized_pixels``.
        prepare: Makes pixels of a size, a resampling filter and the size of the crop.
    """
    prepared = {}
    for resize, crop, normalize in towers:
        wanted = resize["size"], resize["interpolation"], crop["output_size"]
        if str(wanted) not in prepared:
            prepared[str(wanted)] = prepare(*wanted)
        yield normalize, prepared[str(wanted)]


def normalization_table(mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """What ``normalized_pixels`` makes of every byte: float32 ``(3, 256)``."""
    unit = np.broadcast_to(_unit(np.arange(256, dtype=np.uint8)), (3, 1, 256))
    return _normalized(unit, mean, std, np.empty(unit.shape, np.float32))[:, 0]


def _unit(pixels: np.ndarray) -> np.ndarray:
    return np.divide(pixels, np.float32(255), out=np.empty(pixels.shape, np.float32), dtype=np.float32)


def _normalized(unit: np.ndarray, mean: Sequence[float], std: Sequence[float], out: np.ndarray) -> np.ndarray:
    mean, std = (np.array(numbers, dtype=np.float32)[:, None, None] for numbers in (mean, std))
    np.subtract(unit, mean, out=out)
    out /= std
    return out


def preset_image(image: Image.Image, preset: str, size: Sequence[int]) -> Image.Image:
    """A camera frame as the reference's evaluation gives it to the image processor.

    Args:
        image: RGB.
        preset: A key of ``IMAGE_PRESETS``.
        size: Height and width that the model takes.

    Returns:
        RGB, of that size but for "none", which leaves it as it is.
    """
    if preset == "none":
        return image
    pixels = np.array(image)
    if preset == "libero-raw":
        pixels = pixels[::-1, ::-1]
    if preset == "libero-raw" or (preset == "libero" and pixels.shape[:2] != tuple(size)):
        pixels = lanczos3_resized(jpeg_round_trip(pixels), size)
    return Image.fromarray(center_cropped(pixels, size))


def lanczos3_resized(pixels: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """``tf.image.resize(method="lanczos3", antialias=True)``, rounded.

    Args:
        pixels: uint8 ``(height, width, channels)``.
        size: Height and width to come.

    Returns:
        uint8 ``(*size, channels)``.
    """
    resized = _gathered(pixels, *_lanczos3_spans(pixels.shape[0], size[0]))
    resized = _gathered(resized.swapaxes(0, 1), *_lanczos3_spans(pixels.shape[1], size[1])).swapaxes(0, 1)
    return np.clip(np.round(resized), 0, 255).astype(np.uint8)


def _lanczos3_spans(length: int, target: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each output reads: the first input int64 ``(target,)``, and float32 weights ``(taps, target)``.

    All arithmetic is float32, in TensorFlow's order.
    """
    one, half, radius, pi = (np.float32(number) for number in (1, 0.5, 3, np.pi))
    inverse_scale = one / (np.float32(target) / np.float32(length))
    stretch = max(inverse_scale, one)  # only a shrinking image is low-passed
    taps = min(2 * int(np.ceil(radius * stretch)) + 1, length)
    centers = (np.arange(target, dtype=np.float32) + half) * inverse_scale
    starts = np.clip(np.ceil(centers - radius * stretch - half).astype(np.int64), 0, length - 1)
    ends = np.clip(np.floor(centers + radius * stretch - half).astype(np.int64), 0, length - 1)
    sources = starts + np.arange(taps)[:, None]
    x = np.abs((sources.astype(np.float32) + half - centers) * (one / stretch))
    with np.errstate(invalid="ignore"):
        weights = radius * _sine(pi * x) * _sine(pi * x / radius) / (pi * pi * x * x)
    weights = np.where(x <= 1e-3, one, weights)
    weights = np.where((x > radius) | (sources > ends), np.float32(0), weights)
    total = np.zeros(target, np.float32)
    for row in weights:
        total += row
    return starts, weights * (one / total)


def _sine(x: np.ndarray) -> np.ndarray:
    """C's ``sinf`` as glibc computes it (one rounding in eighty is not the nearest), for float32 from 0 to 100.

    A polynomial in float64 on the quarter turn around the nearest multiple of pi / 2: of the sine or of the cosine.
    """
    quarter = (x.astype(np.float64) * (2 / np.pi) + 0.5).astype(np.int64)
    rest = x.astype(np.float64) - quarter * (np.pi / 2)
    square = rest * rest
    cube, fourth = rest * square, square * square
    sine = rest + cube * _SINE[0] + cube * square * (_SINE[1] + square * _SINE[2])
    cosine = 1 + square * _COSINE[0] + fourth * _COSINE[1] + fourth * square * (_COSINE[2] + square * _COSINE[3])
    values = np.where(quarter % 2, cosine, sine)
    return np.where(quarter & 2, -values, values).astype(np.float32)


def _gathered(pixels: np.ndarray, starts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted sums along the first axis, tap by tap: float32 ``(target, ...)``."""
    result = np.zeros((len(starts), *pixels.shape[1:]), np.float32)
    pixels = pixels.astype(np.float32)
    for tap, weight in enumerate(weights):
        result += weight[:, None, None] * pixels[np.minimum(starts + tap, len(pixels) - 1)]
    return result


def center_cropped(pixels: np.ndarray, size: Sequence[int], area: float = CENTER_CROP_AREA) -> np.ndarray:
    """The middle ``area`` of an image, bilinear, as ``tf.image.crop_and_resize`` does it in float32.

    Args:
        pixels: uint8 ``(height, width, channels)``.
        size: Height and width to come.
        area: Share of the image's area; the aspect stays.

    Returns:
        uint8 ``(*size, channels)``.
    """
    side = np.sqrt(np.float32(area))
    start = (np.float32(1) - side) / np.float32(2)
    cropped = crop_and_resize(as_unit_floats(pixels), (start, start, start + side, start + side), size)
    return as_rounded_bytes(np.clip(cropped, 0, 1))


def crop_and_resize(pixels: np.ndarray, box: Sequence[float], size: Sequence[int]) -> np.ndarray:
    """``tf.image.crop_and_resize``, bilinear.

    Args:
        pixels: float32 ``(..., height, width, channels)``.
        box: Top, left, bottom, right; 0 is the middle of the first row or column and 1 that of the last.
        size: Height and width to come.

    Returns:
        float32 ``(..., *size, channels)``; 0 where the box leaves the image.
    """
    top, left, bottom, right = np.asarray(box, dtype=np.float32)
    before, after, share, inside = _bilinear_positions(left, right, pixels.shape[-2], size[1])
    first = pixels[..., before, :]
    columns = np.where(inside[:, None], first + (pixels[..., after, :] - first) * share[:, None], np.float32(0))
    before, after, share, inside = _bilinear_positions(top, bottom, pixels.shape[-3], size[0])
    first = columns[..., before, :, :]
    rows = first + (columns[..., after, :, :] - first) * share[:, None, None]
    return np.where(inside[:, None, None], rows, np.float32(0))


def _bilinear_positions(start: np.float32, end: np.float32, length: int, target: int) -> tuple[np.ndarray, ...]:
    """The two neighbours of every output, the share of the second, and whether the output lies inside."""
    last = np.float32(length - 1)
    if target > 1:
        step = (end - start) * last / np.float32(target - 1)
        positions = start * last + np.arange(target, dtype=np.float32) * step
    else:
        positions = np.array([0.5 * float(start + end) * (length - 1)], dtype=np.float32)
    inside = (positions >= 0) & (positions <= last)
    before = np.floor(np.where(inside, positions, 0))
    after = np.ceil(np.where(inside, positions, 0))
    return before.astype(np.int64), after.astype(np.int64), (positions - before).astype(np.float32), inside


def as_unit_floats(pixels: np.ndarray) -> np.ndarray:
    """uint8 as float32 in [0, 1], as ``tf.image.convert_image_dtype`` does it."""
    return pixels.astype(np.float32) * np.float32(1 / 255)


def as_rounded_bytes(values: np.ndarray) -> np.ndarray:
    """float32 in [0, 1] as uint8, as ``tf.image.convert_image_dtype(saturate=True)`` does it."""
    return np.clip(values * np.float32(255.5), 0, 255).astype(np.uint8)
