"""What JPEG leaves of an image, pixel for pixel as TensorFlow encodes and decodes it; numpy integers only.

The models saw frames that ``tf.image.encode_jpeg`` had written (quality 95, chroma halved both ways) and
``tf.io.decode_image`` had read. Pillow writes the same bytes, but cannot read them alike: TensorFlow decodes with
libjpeg's fast integer inverse transform, Pillow with the accurate one, and two values in three differ, by up to 13 grey
levels. So the lossy steps are done here; the lossless ones (Huffman codes) are left out.

Numbers are those of the JPEG standard (ITU T.81) and of libjpeg's fixed-point arithmetic.
"""

from __future__ import annotations

import numpy as np

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
# The fast inverse transform takes its first multiplications into the quantisation steps: 14 bits, of which 2 stay.
_AAN = np.array([1.0, *(np.sqrt(2) * np.cos(np.arange(1, 8) * np.pi / 16))])
_AAN_SCALES = np.round(np.outer(_AAN, _AAN) * 2**14).astype(np.int32)


def jpeg_round_trip(pixels: np.ndarray) -> np.ndarray:
    """Encoded and decoded.

    Args:
        pixels: uint8 ``(height, width, 3)``, RGB.

    Returns:
        uint8, the same shape.
    """
    height, width, _ = pixels.shape
    luma, *chroma = _luma_and_chroma(pixels)
    luma = _quantized(_padded(luma), _LUMA_STEPS)[:height, :width]
    small = (-(-height // 2), -(-width // 2))
    cb, cr = (
        _doubled(_quantized(_padded(_halved(plane)), _CHROMA_STEPS)[: small[0], : small[1]])[:height, :width] - 128
        for plane in chroma
    )
    half = 1 << 15
    red = luma + ((91881 * cr + half) >> 16)
    green = luma + ((-22554 * cb - 46802 * cr + half) >> 16)
    blue = luma + ((116130 * cb + half) >> 16)
    return np.clip(np.stack([red, green, blue], axis=-1), 0, 255).astype(np.uint8)


def _luma_and_chroma(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Planes Y, Cb, Cr, int32 0 to 255, in 16-bit fixed point."""
    red, green, blue = (pixels[:, :, channel].astype(np.int32) for channel in range(3))
    luma = (19595 * red + 38470 * green + 7471 * blue + (1 << 15)) >> 16
    offset = (128 << 16) + (1 << 15) - 1
    cb = (-11059 * red - 21709 * green + 32768 * blue + offset) >> 16
    cr = (32768 * red - 27439 * green - 5329 * blue + offset) >> 16
    return luma, cb, cr


def _padded(plane: np.ndarray) -> np.ndarray:
    """Whole blocks of 8 by 8: the last row and column repeated."""
    return np.pad(plane, [(0, -length % 8) for length in plane.shape], mode="edge")


def _halved(plane: np.ndarray) -> np.ndarray:
    """Means of 2 by 2, rounded down and up in turn from column to column.

    The last column is repeated up to whole blocks *before* the means, the last row up to an even number only.
    """
    height, width = plane.shape
    plane = np.pad(plane, [(0, height % 2), (0, -width % 16)], mode="edge")
    sums = plane[::2, ::2] + plane[::2, 1::2] + plane[1::2, ::2] + plane[1::2, 1::2]
    sums[:, ::2] += 1
    sums[:, 1::2] += 2
    return sums >> 2


def _doubled(plane: np.ndarray) -> np.ndarray:
    """Twice the height and width: weights 9, 3, 3, 1 of the four nearest (libjpeg's "fancy" upsampling)."""
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
    """int32 0 to 255 of whole blocks, there (accurate transform), rounded to the steps, and back (fast transform)."""
    height, width = plane.shape
    blocks = plane.reshape(height // 8, 8, width // 8, 8).transpose(1, 3, 0, 2) - 128  # (row, column, block, block)
    blocks = np.stack(_forward(blocks.swapaxes(0, 1), first=True)).swapaxes(0, 1)
    blocks = np.stack(_forward(blocks, first=False))
    divisors = 8 * steps[:, :, None, None]  # the forward transform's own scale
    coefficients = np.sign(blocks) * ((np.abs(blocks) + divisors // 2) // divisors)
    blocks = coefficients * ((steps * _AAN_SCALES + (1 << 11)) >> 12)[:, :, None, None]
    blocks = np.stack(_inverse(blocks))
    blocks = np.stack(_inverse(blocks.swapaxes(0, 1))).swapaxes(0, 1)
    return np.clip((blocks >> 5) + 128, 0, 255).transpose(2, 0, 3, 1).reshape(height, width)


def _forward(x: np.ndarray, first: bool) -> list[np.ndarray]:
    """The forward transform along the first axis, in 13-bit fixed point (Loeffler, Ligtenberg and Moschytz).

    The first pass leaves 2 bits of fraction to the second.
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
    """The fast inverse transform along the first axis, in 8-bit fixed point (Arai, Agui and Nakajima)."""
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
