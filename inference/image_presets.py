"""Preprocessing of camera frames before the image processor (``image_preset``), equal to TensorFlow's in every pixel.

OpenVLA's evaluation scripts wrote a frame with ``tf.image.encode_jpeg`` (quality 95, chroma subsampled 4:2:0), read it
with ``tf.io.decode_image``, resized it with Lanczos and cropped its middle. TensorFlow is not needed here: all steps
are numpy, and float32 results have the same bits.

Pillow writes the same JPEG bytes but reads them differently: TensorFlow decodes with libjpeg's fast integer inverse
DCT, Pillow with the accurate one, and two values in three differ, by up to 13 grey levels. So the lossy steps are
computed here; the lossless ones (Huffman codes) are left out. Tables and constants are those of the JPEG standard
(ITU T.81) and of libjpeg's fixed-point arithmetic.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from PIL import Image

from ..images_openvla import CENTER_CROP_AREA, SHIPPED_IMAGE_PRESETS, ImagePreset, center_cropped

BLOCK = 64  # rows that are resized together: their sums stay in the processor's cache
# glibc's polynomials of sinf, close to the Taylor series.
_SINE = [float.fromhex(c) for c in ("-0x1.555545995a603p-3", "0x1.1107605230bc4p-7", "-0x1.994eb3774cf24p-13")]
_COSINE = [
    float.fromhex(c)
    for c in ("-0x1.ffffffd0c621cp-2", "0x1.55553e1068f19p-5", "-0x1.6c087e89a359dp-10", "0x1.99343027bf8c3p-16")
]

# ITU T.81, tables K.1 and K.2, scaled to quality 95.
_LUMA = [
    [16, 11, 10, 16, 24, 40, 51, 61],
    [12, 12, 14, 19, 26, 58, 60, 55],
    [14, 13, 16, 24, 40, 57, 69, 56],
    [14, 17, 22, 29, 51, 87, 80, 62],
    [18, 22, 37, 56, 68, 109, 103, 77],
    [24, 35, 55, 64, 81, 104, 113, 92],
    [49, 64, 78, 87, 103, 121, 120, 101],
    [72, 92, 95, 98, 112, 100, 103, 99],
]
_CHROMA = [
    [17, 18, 24, 47, 99, 99, 99, 99],
    [18, 21, 26, 66, 99, 99, 99, 99],
    [24, 26, 56, 99, 99, 99, 99, 99],
    [47, 66, 99, 99, 99, 99, 99, 99],
    *([99] * 8 for _ in range(4)),
]
_QUALITY_PERCENT = 200 - 2 * 95
_LUMA_STEPS, _CHROMA_STEPS = (
    np.clip((np.array(table, np.int32) * _QUALITY_PERCENT + 50) // 100, 1, 255) for table in (_LUMA, _CHROMA)
)
# libjpeg's fast inverse DCT folds its first multiplications into the quantisation steps: 14 bits, of which 2 remain.
_AAN = np.array([1.0, *(np.sqrt(2) * np.cos(np.arange(1, 8) * np.pi / 16))])
_AAN_SCALES = np.round(np.outer(_AAN, _AAN) * 2**14).astype(np.int32)


def unchanged(image: Image.Image, size: Sequence[int]) -> Image.Image:
    """Return the frame unchanged, whatever size the model takes: for models trained on frames as they are."""
    del size
    return image


def libero_preset(image: Image.Image, size: Sequence[int]) -> Image.Image:
    """Apply JPEG and Lanczos to the model's size (unless the frame has that size), then the preset "center-crop"."""
    pixels = np.array(image)
    if pixels.shape[:2] != tuple(size):
        pixels = lanczos3_resized(jpeg_round_trip(pixels), size)
    return Image.fromarray(center_cropped(pixels, size))


def libero_raw_preset(image: Image.Image, size: Sequence[int]) -> Image.Image:
    """Rotate the simulator's own frame by 180 degrees, then apply JPEG, Lanczos and the crop, whatever its size."""
    pixels = np.array(image)[::-1, ::-1]
    return Image.fromarray(center_cropped(lanczos3_resized(jpeg_round_trip(pixels), size), size))


def minivla_libero_preset(image: Image.Image, size: Sequence[int]) -> Image.Image:
    """Mirror an upright frame left to right, then as "minivla-libero-raw": openvla-mini saw LIBERO mirrored."""
    return _minivla_prepared(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), size)


def minivla_libero_raw_preset(image: Image.Image, size: Sequence[int]) -> Image.Image:
    """Flip the simulator's own frame upside down, without mirroring it; resize by Lanczos, crop, all by Pillow."""
    return _minivla_prepared(image.transpose(Image.Transpose.FLIP_TOP_BOTTOM), size)


def _minivla_prepared(image: Image.Image, size: Sequence[int]) -> Image.Image:
    """Resize and crop as openvla-mini's evaluation: in Pillow, the crop's side and corner rounded down to pixels."""
    height, width = size
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    side = np.sqrt(CENTER_CROP_AREA)
    crop_width, crop_height = int(width * side), int(height * side)
    left, top = int((width - crop_width) / 2), int((height - crop_height) / 2)
    cropped = image.crop((left, top, left + crop_width, top + crop_height))
    return cropped.resize((width, height), Image.Resampling.BILINEAR)


def minivla_simpler_preset(image: Image.Image, size: Sequence[int]) -> Image.Image:
    """Apply JPEG, then Lanczos to 128 pixels and from there, unrounded, to the model's size, without a crop."""
    small = lanczos3(jpeg_round_trip(np.array(image)), (128, 128))
    return Image.fromarray(_as_rounded_uint8(lanczos3(small, size)))


# Values of ``OpenVLAProcessor.image_preset``: each takes an RGB frame and (height, width) of the model's input, and
# returns RGB of that size ("none": of the frame's size).
IMAGE_PRESETS: dict[str, ImagePreset] = {
    "none": unchanged,
    **SHIPPED_IMAGE_PRESETS,
    "libero": libero_preset,
    "libero-raw": libero_raw_preset,
    "minivla-libero": minivla_libero_preset,
    "minivla-libero-raw": minivla_libero_raw_preset,
    "minivla-simpler": minivla_simpler_preset,
}


def lanczos3_resized(pixels: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Resize as ``tf.image.resize(method="lanczos3", antialias=True)``, and round.

    Args:
        pixels: uint8 ``(height, width, channels)``.
        size: Height and width of the result.

    Returns:
        uint8 ``(*size, channels)``.
    """
    return _as_rounded_uint8(lanczos3(pixels, size))


def lanczos3(pixels: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Resize as ``lanczos3_resized``, unrounded: float32 ``(*size, channels)``, which may leave 0 to 255."""
    resized = _weighted_sums(pixels, *lanczos3_spans(pixels.shape[0], size[0]))
    columns = np.ascontiguousarray(resized.swapaxes(0, 1))
    return _weighted_sums(columns, *lanczos3_spans(pixels.shape[1], size[1])).swapaxes(0, 1)


def _as_rounded_uint8(values: np.ndarray) -> np.ndarray:
    return np.clip(np.round(values), 0, 255).astype(np.uint8)


@functools.lru_cache(maxsize=32)
def lanczos3_spans(length: int, target: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first input of each output, int64 ``(target,)``, and float32 weights ``(taps, target)``.

    All arithmetic is float32, in TensorFlow's order.
    """
    one, half, radius, pi = (np.float32(number) for number in (1, 0.5, 3, np.pi))
    inverse_scale = one / (np.float32(target) / np.float32(length))
    stretch = max(inverse_scale, one)  # a low-pass filter, when shrinking only
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
    for tap_weights in weights:
        total += tap_weights
    return starts, (weights * (one / total))[: weights.any(axis=1).nonzero()[0][-1] + 1]


def _sine(x: np.ndarray) -> np.ndarray:
    """Compute C's ``sinf`` as glibc does, for float32 from 0 to 100; one value in eighty is not the nearest float.

    A float64 polynomial of the sine or the cosine, on the quarter turn around the nearest multiple of pi / 2.
    """
    quarter = (x.astype(np.float64) * (2 / np.pi) + 0.5).astype(np.int64)
    rest = x.astype(np.float64) - quarter * (np.pi / 2)
    square = rest * rest
    cube, fourth = rest * square, square * square
    sine = rest + cube * _SINE[0] + cube * square * (_SINE[1] + square * _SINE[2])
    cosine = 1 + square * _COSINE[0] + fourth * _COSINE[1] + fourth * square * (_COSINE[2] + square * _COSINE[3])
    values = np.where(quarter % 2, cosine, sine)
    return np.where(quarter & 2, -values, values).astype(np.float32)


def _weighted_sums(pixels: np.ndarray, starts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return weighted sums along the first axis, added tap by tap: float32 ``(target, ...)``."""
    result = np.zeros((len(starts), *pixels.shape[1:]), np.float32)
    pixels = pixels.astype(np.float32, copy=False)
    for first in range(0, len(starts), BLOCK):
        block = slice(first, first + BLOCK)
        term = np.empty_like(result[block])
        for tap, weight in enumerate(weights[:, block]):
            np.take(pixels, starts[block] + tap, axis=0, out=term, mode="clip")
            term *= weight[:, None, None]
            result[block] += term
    return result


def jpeg_round_trip(pixels: np.ndarray) -> np.ndarray:
    """Encode as JPEG and decode again, as TensorFlow does.

    Args:
        pixels: uint8 ``(height, width, 3)``, RGB.

    Returns:
        uint8, the same shape.
    """
    height, width, _ = pixels.shape
    luma, *chroma = _luma_and_chroma(pixels)
    luma = _quantized(_padded_to_blocks(luma), _LUMA_STEPS)[:height, :width]
    half_size = (-(-height // 2), -(-width // 2))
    cb, cr = (_chroma_round_trip(plane, half_size)[:height, :width] - 128 for plane in chroma)
    half = 1 << 15
    red = luma + ((91881 * cr + half) >> 16)
    green = luma + ((-22554 * cb - 46802 * cr + half) >> 16)
    blue = luma + ((116130 * cb + half) >> 16)
    return np.clip(np.stack([red, green, blue], axis=-1), 0, 255).astype(np.uint8)


def _luma_and_chroma(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the planes Y, Cb and Cr, int32 0 to 255, computed in 16-bit fixed point."""
    red, green, blue = (pixels[:, :, channel].astype(np.int32) for channel in range(3))
    luma = (19595 * red + 38470 * green + 7471 * blue + (1 << 15)) >> 16
    offset = (128 << 16) + (1 << 15) - 1
    cb = (-11059 * red - 21709 * green + 32768 * blue + offset) >> 16
    cr = (32768 * red - 27439 * green - 5329 * blue + offset) >> 16
    return luma, cb, cr


def _chroma_round_trip(plane: np.ndarray, half_size: tuple[int, int]) -> np.ndarray:
    """Subsample, quantise and upsample a chroma plane; ``half_size`` is its size without padding to blocks."""
    quantized = _quantized(_padded_to_blocks(_subsampled(plane)), _CHROMA_STEPS)
    return _upsampled(quantized[: half_size[0], : half_size[1]])


def _padded_to_blocks(plane: np.ndarray) -> np.ndarray:
    """Repeat the last row and column up to whole blocks of 8 by 8."""
    return np.pad(plane, [(0, -length % 8) for length in plane.shape], mode="edge")


def _subsampled(plane: np.ndarray) -> np.ndarray:
    """Return means of 2 by 2 pixels, rounded down in even columns and up in odd ones.

    The last column is repeated up to whole blocks *before* the means, the last row up to an even number only.
    """
    height, width = plane.shape
    plane = np.pad(plane, [(0, height % 2), (0, -width % 16)], mode="edge")
    sums = plane[::2, ::2] + plane[::2, 1::2] + plane[1::2, ::2] + plane[1::2, 1::2]
    sums[:, ::2] += 1
    sums[:, 1::2] += 2
    return sums >> 2


def _upsampled(plane: np.ndarray) -> np.ndarray:
    """Double height and width: weights 9, 3, 3, 1 of the four nearest pixels (libjpeg's "fancy" upsampling)."""
    if plane.shape[1] <= 2:
        return plane.repeat(2, axis=0).repeat(2, axis=1)
    rows = np.empty((2 * plane.shape[0], plane.shape[1]), np.int32)
    rows[::2] = 3 * plane + np.concatenate([plane[:1], plane[:-1]])
    rows[1::2] = 3 * plane + np.concatenate([plane[1:], plane[-1:]])
    both = np.empty((rows.shape[0], 2 * rows.shape[1]), np.int32)
    both[:, ::2] = (3 * rows + np.concatenate([rows[:, :1], rows[:, :-1]], axis=1) + 8) >> 4
    both[:, 1::2] = (3 * rows + np.concatenate([rows[:, 1:], rows[:, -1:]], axis=1) + 7) >> 4
    return both


def _quantized(plane: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Transform int32 0 to 255 (accurate DCT), round to the quantisation steps, transform back (fast inverse DCT)."""
    height, width = plane.shape
    blocks = plane.reshape(height // 8, 8, width // 8, 8).transpose(1, 3, 0, 2) - 128  # (row, column, block, block)
    blocks = np.stack(_forward(blocks.swapaxes(0, 1), first=True)).swapaxes(0, 1)
    blocks = np.stack(_forward(blocks, first=False))
    divisors = 8 * steps[:, :, None, None]  # the forward DCT scales by 8
    coefficients = np.sign(blocks) * ((np.abs(blocks) + divisors // 2) // divisors)
    blocks = coefficients * ((steps * _AAN_SCALES + (1 << 11)) >> 12)[:, :, None, None]
    blocks = np.stack(_inverse(blocks))
    blocks = np.stack(_inverse(blocks.swapaxes(0, 1))).swapaxes(0, 1)
    return np.clip((blocks >> 5) + 128, 0, 255).transpose(2, 0, 3, 1).reshape(height, width)


def _forward(x: np.ndarray, first: bool) -> list[np.ndarray]:
    """Compute the DCT along the first axis, in 13-bit fixed point (Loeffler, Ligtenberg and Moschytz 1989).

    The first of two passes keeps 2 bits of fraction.
    """
    shift = 11 if first else 15
    half = 1 << (shift - 1)
    s0, s1, s2, s3 = (x[i] + x[7 - i] for i in range(4))
    d0, d1, d2, d3 = (x[i] - x[7 - i] for i in range(4))
    e0, e3, e1, e2 = s0 + s3, s0 - s3, s1 + s2, s1 - s2
    flat, alternating = e0 + e1, e0 - e1
    flat, alternating = (4 * flat, 4 * alternating) if first else ((flat + 2) >> 2, (alternating + 2) >> 2)
    z1 = (e2 + e3) * 4433 + half
    two, six = (z1 + e3 * 6270) >> shift, (z1 - e2 * 15137) >> shift
    z5 = (d0 + d1 + d2 + d3) * 9633 + half
    z3, z4 = (d3 + d1) * -16069 + z5, (d2 + d0) * -3196 + z5
    z1, z2 = (d3 + d0) * -7373, (d2 + d1) * -20995
    one, three = (d0 * 12299 + z1 + z4) >> shift, (d1 * 25172 + z2 + z3) >> shift
    five, seven = (d2 * 16819 + z2 + z4) >> shift, (d3 * 2446 + z1 + z3) >> shift
    return [flat, one, two, three, alternating, five, six, seven]


def _inverse(x: np.ndarray) -> list[np.ndarray]:
    """Compute the fast inverse DCT along the first axis, in 8-bit fixed point (Arai, Agui and Nakajima 1988)."""
    even, odd = x[0] + x[4], x[0] - x[4]
    t13 = x[2] + x[6]
    t12 = ((x[2] - x[6]) * 362 >> 8) - t13
    a0, a3, a1, a2 = even + t13, even - t13, odd + t12, odd - t12
    z13, z10, z11, z12 = x[5] + x[3], x[5] - x[3], x[1] + x[7], x[1] - x[7]
    b7 = z11 + z13
    z5 = (z10 + z12) * 473 >> 8
    b6 = (z10 * -669 >> 8) + z5 - b7
    b5 = ((z11 - z13) * 362 >> 8) - b6
    b4 = (z12 * 277 >> 8) - z5 + b5
    return [a0 + b7, a1 + b6, a2 + b5, a3 - b4, a3 + b4, a2 - b5, a1 - b6, a0 - b7]
