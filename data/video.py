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
# How far before a frame to seek at first, if the GOP of the key frame before it does not give it.
_BACK_SECONDS = 0.25


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
        self.reformatter = self.av.video.reformatter.VideoReformatter()  # one for all frames: it keeps its tables
        self.frames: Iterator[Any] = iter(())
        self.last: Any = None
        self.must_seek = True

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
        return self.reformatter.reformat(frame, format="rgb24").to_ndarray()

    def _find(self, seconds: float) -> Any:
        """Return the frame at a time, the first one after it where there is none, or None at the end."""
        ahead = float("-inf") if self.last is None else seconds - self.last.time
        if abs(ahead) <= TIME_TOLERANCE:
            return self.last
        in_order = 0 < ahead <= _NEAR_SECONDS
        if in_order and not self.must_seek:
            frame, _ = self._next_frame(seconds)
            return frame
        self.must_seek, back = not in_order, 0.0
        start = float((self.stream.start_time or 0) * self.stream.time_base)
        while True:
            target = max(start, seconds - back)
            self.container.seek(round(target / self.stream.time_base), stream=self.stream, backward=True)
            self.frames = (
                self.container.decode(self.stream) if in_order else _decode_until(self.container, self.stream, seconds)
            )
            frame, is_first = self._next_frame(seconds)
            # Frames that are shown before a key frame but stored after it (an open GOP, usual for HEVC) need the GOP
            # before it, and FFmpeg leaves them out.
            if not is_first or target == start or frame.time <= seconds + TIME_TOLERANCE:
                return frame
            back = 4 * back or _BACK_SECONDS

    def _next_frame(self, seconds: float) -> tuple[Any, bool]:
        """Return the next decoded frame at a time or after it, None at the end; and whether it was decoded first."""
        self.last, is_first = None, True
        for frame in self.frames:
            if frame.time >= seconds - TIME_TOLERANCE:
                self.last = frame
                return frame, is_first
            is_first = False
        return None, False


def _decode_until(container: Any, stream: Any, seconds: float) -> Iterator[Any]:
    """Yield the frames up to the one at a time; then the decoder takes nothing before it seeks.

    A decoder gives a frame when the next packets show that no other comes first. Told that the stream ends, it gives it
    at once; that saves decoding those packets.
    """
    unit = float(stream.time_base)
    for packet in container.demux(stream):
        yield from packet.decode()
        if packet.pts is not None and abs(packet.pts * unit - seconds) <= TIME_TOLERANCE:
            for frame in stream.codec_context.decode(None):
                frame.time_base = stream.time_base  # which a frame without a packet lacks
                yield frame
            return
