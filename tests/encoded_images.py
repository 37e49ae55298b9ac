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


def write_video(file, levels, rate):
    """Write a video of frames of one grey level each (``shown_level`` reads them), at a number of frames a second."""
    import av

    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"qp": "0"})
        stream.width, stream.height = 96, 64
        for level in levels:
            frame = av.VideoFrame.from_ndarray(np.full((64, 96, 3), level, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def shown_level(image, step):
    """Return the multiple of ``step`` that is nearest to a frame's grey level."""
    return int(round(float(np.mean(np.asarray(image))) / step)) * step


def _encode(image, kind):
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()
