"""Read frames of a video by time, through PyAV (its wheels include FFmpeg with AV1)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors_openvla import OpenVLAValueError
from .episodes import DatasetError
from .utils import require

# Largest difference between a frame's time and the requested time, in seconds (LeRobot's tolerance).
TIME_TOLERANCE = 1e-4
# Up to this distance ahead, decoding on is cheaper than seeking to a key frame.
_NEAR_SECONDS = 1.0


class Video:
    """An open video. Frames read in order are decoded once; for any other, the reader seeks to the key frame before it.

    Raises:
        DatasetError: The file is damaged or not a video.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.av = path, require("av", "Reading video")
        try:
            self.container = self.av.open(str(path))
            self.stream = self.container.streams.video[0]
            # FFmpeg's threads do not survive a fork; data loader workers provide the parallelism.
            self.stream.codec_context.thread_count = 1
        except (self.av.error.FFmpegError, OSError, IndexError) as error:
            raise DatasetError(f"{path} cannot be opened as a video: {error}.") from error
        self.frames: Iterator[Any] = iter(())
        self.last: Any = None

    def close(self) -> None:
        """Close the file."""
        self.container.close()

    def frame(self, seconds: float) -> np.ndarray:
        """Return the frame at a time in seconds, uint8 ``(height, width, 3)`` RGB.

        Raises:
            ValueError: The video has no such frame, or the frame is damaged.
        """
        try:
            frame = self._find(seconds)
        except self.av.error.FFmpegError as error:
            self.last = None
            raise OpenVLAValueError(f"{self.path} is damaged near {seconds:.3f} s: {error}") from error
        if frame is None or abs(frame.time - seconds) > TIME_TOLERANCE:
            detail = "the video ends before" if frame is None else f"the nearest is at {frame.time:.4f} s"
            raise OpenVLAValueError(f"{self.path} has no frame at {seconds:.4f} s: {detail}")
        if frame.is_corrupt:
            raise OpenVLAValueError(f"{self.path} is damaged: the frame at {seconds:.3f} s is corrupt")
        return frame.to_ndarray(format="rgb24")

    def _find(self, seconds: float) -> Any:
        ahead = None if self.last is None else seconds - self.last.time
        if ahead is None or ahead < -TIME_TOLERANCE or ahead > _NEAR_SECONDS:
            self.last = None
            self.container.seek(round(seconds / self.stream.time_base), stream=self.stream, backward=True)
            self.frames = self.container.decode(self.stream)
        elif ahead <= TIME_TOLERANCE:
            return self.last
        for frame in self.frames:
            self.last = frame
            if frame.time >= seconds - TIME_TOLERANCE:
                return frame
        self.last = None
        return None
