"""Frames of a video by their time, through PyAV (its wheels bring FFmpeg along, AV1 included)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors_openvla import OpenVLAValueError
from .episodes import DemonstrationError, require

# How far a frame may lie from the time that the table says, in seconds (LeRobot's own tolerance).
TIME_TOLERANCE = 1e-4
# Up to here decoding on is cheaper than looking for a key frame.
_NEAR_SECONDS = 1.0


class Video:
    """An open video. Frames in order are decoded once; any other is looked for from the key frame before it.

    Raises:
        DemonstrationError: The file is damaged, or no video.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.av = path, require("av", "Reading video")
        try:
            self.container = self.av.open(str(path))
            self.stream = self.container.streams.video[0]
            # FFmpeg's own threads do not survive a fork; data loader workers are what runs beside each other here.
            self.stream.codec_context.thread_count = 1
        except (self.av.error.FFmpegError, OSError, IndexError) as error:
            raise DemonstrationError(f"{path} cannot be opened as a video: {error}.") from error
        self.frames: Iterator[Any] = iter(())
        self.last: Any = None

    def close(self) -> None:
        """Close the file."""
        self.container.close()

    def frame(self, seconds: float) -> np.ndarray:
        """The frame of a time, uint8 ``(height, width, 3)`` RGB.

        Raises:
            ValueError: There is none, or it is damaged.
        """
        try:
            frame = self._find(seconds)
        except self.av.error.FFmpegError as error:
            self.last = None
            raise OpenVLAValueError(f"{self.path} is damaged near {seconds:.3f} s: {error}") from error
        if frame is None or abs(frame.time - seconds) > TIME_TOLERANCE:
            near = "the video ends before" if frame is None else f"the nearest is at {frame.time:.4f} s"
            raise OpenVLAValueError(f"{self.path} has no frame at {seconds:.4f} s: {near}")
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
