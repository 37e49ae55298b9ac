"""Images of the last moments, for models that take several moments at a time (MiniVLA with a history)."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

import numpy as np

from ..configuration_openvla import PrismaticConfig, require_known
from ..errors_openvla import OpenVLAValueError

PADDINGS = ("start", "end")


class ImageHistory:
    """The images of an episode's last moments, oldest first, as a model takes them.

    Args:
        config: The model's configuration: ``history_length`` moments of ``images_per_moment`` images.
        padding: What fills the first steps of an episode: at the "start", repetitions of the first moment, as in
            training; at the "end", repetitions of the newest one, as openvla-mini's evaluation does. They differ for
            three moments and more.
    """

    def __init__(self, config: PrismaticConfig, padding: str = "start") -> None:
        require_known("history_padding", padding, PADDINGS)
        self.length, self.num_cameras, self.padding = config.history_length, config.images_per_moment, padding
        self._moments: deque[list[Any]] = deque(maxlen=self.length)
        self._lock = threading.Lock()

    def clear(self) -> None:
        """Begin an episode."""
        with self._lock:
            self._moments.clear()

    def append(self, image: Any) -> Any:
        """Add the images of this moment; return all images that the model takes.

        Args:
            image: One image, or the list of the cameras' images. A list of all images of all moments is returned as it
                is and not kept, and so is everything for a model of one moment.

        Raises:
            ValueError: The number of images is another.
        """
        several = isinstance(image, (list, tuple)) or getattr(image, "ndim", 0) == 4
        images = list(image) if several else [image]
        if self.length == 1 or len(images) == self.length * self.num_cameras:
            return image
        if len(images) != self.num_cameras:
            raise OpenVLAValueError(
                f"The model takes {self.num_cameras} image(s) a moment, of {self.length} moments: give those of this "
                f"moment, or all {self.length * self.num_cameras}, the oldest moment first; got {len(images)}."
            )
        # A camera may write every frame into one array.
        images = [image.copy() if isinstance(image, np.ndarray) else image for image in images]
        with self._lock:
            self._moments.append(images)
            moments = list(self._moments)
        missing = self.length - len(moments)
        moments = [moments[0]] * missing + moments if self.padding == "start" else moments + [moments[-1]] * missing
        return [image for moment in moments for image in moment]
