"""Encode small images for datasets."""

import io

import numpy as np
from PIL import Image


def jpeg(value, size=(8, 8)):
    """Return a JPEG of one grey level."""
    return _encode(Image.new("RGB", size, (value,) * 3), "JPEG")


def png(frame):
    """Return a PNG of a frame, uint8 ``(height, width, 3)``."""
    return _encode(Image.fromarray(np.asarray(frame)), "PNG")


def _encode(image, kind):
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()
