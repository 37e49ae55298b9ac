"""TraceVLA's visual traces: where points of the scene moved in the last steps, drawn on the camera's frame.

A point tracker follows points through the last frames; five points that moved are drawn as lines with an arrow at the
end. The model sees the frame and the frame with the traces. No tracker is part of this package: ``CoTracker3`` uses
Meta's, which was used in training, where it is installed; any function of the same signature will do.

Zheng et al. 2024, "TraceVLA: Visual Trace Prompting Enhances Spatial-Temporal Awareness for Generalist Robotic
Policies".
"""

from __future__ import annotations

import importlib
import os
from collections import deque
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageDraw

from ..errors_openvla import OpenVLAImportError, OpenVLAValueError
from ..images_openvla import ImageInput, as_images
from .image_presets import jpeg_round_trip, lanczos3_resized

FRAME_SIZE = (256, 256)  # height and width of the frames that are tracked and drawn on, as in training
BUFFER_SIZE = 10  # frames that the tracker sees; the first trace is at this step
GRID_SIZE = 30  # points are found on a grid of 30 x 30
GRID_INTERVAL = 25  # steps between two grids
RETRY_AFTER = 5  # after a grid without enough moving points, the next one is more than so many steps later
# Points must stay within so many pixels. It is more than FRAME_SIZE, as in the authors' code, so points may leave it.
TRACKED_SIZE = 336
MIN_MOTION = 1.0  # pixels a step, |dx| + |dy|: points that moved more may be drawn
WINDOW_SIZES = {"bridge_orig": 10}  # by unnorm_key, as the authors evaluated; WINDOW_SIZE for all others
WINDOW_SIZE = 15
LINE_WIDTH, ARROW_LENGTH, ARROW_ANGLE = 2, 10, 40  # pixels, pixels, degrees
# The knots of matplotlib's colour map "hsv": positions, and the levels of each channel there.
_RED = [(0, 0.158730, 0.174603, 0.333333, 0.349206, 0.666667, 0.682540, 0.841270, 0.857143, 1)]
_RED += [(1, 1, 0.968750, 0.031250, 0, 0, 0.031250, 0.968750, 1, 1)]
_GREEN = [(0, 0.158730, 0.174603, 0.507937, 0.666667, 0.682540, 1), (0, 0.937500, 1, 1, 0.062500, 0, 0)]
_BLUE = [(0, 0.333333, 0.349206, 0.507937, 0.841270, 0.857143, 1), (0, 0, 0.062500, 1, 1, 0.937500, 0.093750)]


class Tracker(Protocol):
    """A function that follows points through a video."""

    def __call__(
        self, video: torch.Tensor, *, grid_size: int = 0, queries: torch.Tensor | None = None
    ) -> torch.Tensor | np.ndarray:
        """Return the points' positions in every frame.

        Args:
            video: float32 ``(1, frames, 3, height, width)``, RGB from 0 to 255, on the CPU.
            grid_size: Follow ``grid_size ** 2`` points on a grid over the first frame; 0 with ``queries``.
            queries: float32 ``(1, points, 3)``: frame, x and y in pixels, where each point is known.

        Returns:
            float ``(1, frames, points, 2)``, x and y in pixels.
        """


class CoTracker3:
    """CoTracker3 (offline), the tracker that TraceVLA was trained and evaluated with, where the user has installed it.

    Its licence (CC BY-NC 4.0, code and weights) forbids commercial use. ``openvla`` contains neither. It needs a GPU
    for more than single predictions: one grid takes about a minute on a CPU core.

    Args:
        checkpoint: File ``scaled_offline.pth`` of ``facebook/cotracker3``; CoTracker unpickles it, so trust its source.
        device: None is the GPU if there is one, else the CPU.

    Raises:
        ImportError: The package ``cotracker`` is not installed.
    """

    def __init__(self, checkpoint: str | os.PathLike[str], device: str | torch.device | None = None) -> None:
        try:
            predictor = importlib.import_module("cotracker.predictor").CoTrackerPredictor
        except (ImportError, AttributeError) as error:
            raise OpenVLAImportError(
                "CoTracker3 needs Meta's package (its licence, CC BY-NC 4.0, forbids commercial use): "
                f"pip install git+https://github.com/facebookresearch/co-tracker ({error})"
            ) from error
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = predictor(checkpoint=os.fspath(checkpoint)).to(self.device)

    @torch.no_grad()
    def __call__(self, video: torch.Tensor, *, grid_size: int = 0, queries: torch.Tensor | None = None) -> torch.Tensor:
        """Return the points' positions, as :class:`Tracker` says."""
        arguments: dict[str, Any] = {"grid_size": grid_size}
        if queries is not None:
            arguments = {"queries": queries.to(self.device)}
        tracks, _ = self.model(video.to(self.device), **arguments)
        return tracks.float().cpu()


class VisualTrace:
    """The traces of one camera over an episode.

    Step 10 of an episode is the first with a trace: points are found on a grid, those that moved are candidates, and
    ``num_points`` of them are drawn by lot. They are followed for a frame at each step. Every 25 steps, and some steps
    after a grid without enough moving points, they are found anew.

    Args:
        tracker: Follows points, see :class:`Tracker`.
        window_size: Steps of a trace that are drawn.
        num_points: Points that are drawn; more than so many must move.
        seed: Seed of the choice among the points that moved. ``reset`` does not begin its numbers again.
    """

    def __init__(self, tracker: Tracker, *, window_size: int = WINDOW_SIZE, num_points: int = 5, seed: int = 0) -> None:
        if num_points < 1 or window_size < 2:
            raise OpenVLAValueError(
                f"num_points must be 1 or more and window_size 2 steps or more, got {num_points} and {window_size}."
            )
        if not callable(tracker):
            raise OpenVLAValueError(f"tracker must be a function (see Tracker), got {tracker!r}.")
        self.tracker, self.window_size, self.num_points = tracker, window_size, num_points
        self.seed = seed
        self.generator = np.random.RandomState(seed)  # numpy keeps its numbers the same in every version
        self.reset()

    def new(self) -> VisualTrace:
        """Return one with the same settings, for another camera; it begins with the seed."""
        return VisualTrace(self.tracker, window_size=self.window_size, num_points=self.num_points, seed=self.seed)

    def reset(self) -> None:
        """Begin an episode: forget all frames and points."""
        self.step = 0
        self.failed_step = 0  # the step of the last grid without enough moving points
        self.is_traced = False  # whether the last grid had enough; points of an earlier one are followed anyway
        self.trace: np.ndarray | None = None  # float (steps, points, 2), x and y in pixels
        self._frames: deque[np.ndarray] = deque(maxlen=BUFFER_SIZE)

    def update(self, frame: Image.Image) -> Image.Image | None:
        """Add the next frame of the episode; return a copy with the traces on it, or None where there is no trace.

        Args:
            frame: RGB, of the same size in all of an episode; ``evaluation_frame`` makes the trained size.

        Raises:
            ValueError: The frame has another size or mode, or the tracker's result is not usable.
        """
        array = np.array(frame)
        if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
            raise OpenVLAValueError(f"A frame must be RGB with 8 bits a channel, got mode {frame.mode!r}.")
        if self._frames and array.shape != self._frames[0].shape:
            raise OpenVLAValueError(
                f"A frame of {array.shape[1]} x {array.shape[0]} pixels follows frames of "
                f"{self._frames[0].shape[1]} x {self._frames[0].shape[0]}; call reset() where an episode begins."
            )
        self._frames.append(array)
        self.step += 1
        if self.step < BUFFER_SIZE:
            return None
        may_retry = not self.is_traced and self.step - self.failed_step > RETRY_AFTER
        if self.step == BUFFER_SIZE or self.step % GRID_INTERVAL == 0 or may_retry:
            self._find_points()
        elif self.trace is not None:
            self._follow_points(self.trace)
        if not self.is_traced or self.trace is None:
            return None
        return draw_trace(frame, self.trace[-self.window_size :])

    def _find_points(self) -> None:
        """Begin a new trace, of ``num_points`` points on a grid that moved; the old one stays where too few moved."""
        tracks = self._tracks(grid_size=GRID_SIZE)
        stays = ((tracks >= 0) & (tracks < TRACKED_SIZE)).all(axis=(0, 2))
        tracks = tracks[:, stays]
        motion = np.abs(tracks[1:] - tracks[:-1]).sum(axis=-1).mean(axis=0)
        candidates = np.flatnonzero(motion > MIN_MOTION)
        self.is_traced = len(candidates) > self.num_points
        if self.is_traced:
            self.trace = tracks[:, self.generator.choice(candidates, size=self.num_points, replace=False)]
        else:
            self.failed_step = self.step

    def _follow_points(self, trace: np.ndarray) -> None:
        """Append the points' positions in the newest frame; their last ones are those in the frame before it."""
        frame_index = np.full((len(trace[-1]), 1), BUFFER_SIZE - 2)
        queries = torch.from_numpy(np.concatenate([frame_index, trace[-1]], axis=1)[None]).float()
        self.trace = np.concatenate([trace, self._tracks(queries=queries)[-1:]])

    def _tracks(self, **points: Any) -> np.ndarray:
        """Return the tracker's positions ``(frames, points, 2)`` for the frames of the buffer."""
        video = torch.from_numpy(np.stack(self._frames)).permute(0, 3, 1, 2).contiguous()[None].float()
        result = torch.as_tensor(self.tracker(video, **points)).detach().cpu().numpy()
        count = points["queries"].shape[1] if "queries" in points else result.shape[2] if result.ndim == 4 else 0
        if result.shape != (1, BUFFER_SIZE, count, 2) or not np.isfinite(result).all():
            raise OpenVLAValueError(
                f"The tracker must return finite positions (1, {BUFFER_SIZE} frames, {count or 'points'}, 2), got "
                f"{result.shape}."
            )
        return np.asarray(result[0])


def evaluation_frame(image: ImageInput) -> Image.Image:
    """Return a camera image as the authors' evaluation prepared it: JPEG, then Lanczos to 256 x 256 pixels."""
    (picture,) = as_images(image)
    return Image.fromarray(lanczos3_resized(jpeg_round_trip(np.array(picture)), FRAME_SIZE))


def draw_trace(
    frame: Image.Image,
    trace: np.ndarray,
    *,
    line_width: int = LINE_WIDTH,
    arrow_length: float = ARROW_LENGTH,
    arrow_angle: float = ARROW_ANGLE,
) -> Image.Image:
    """Return a copy of a frame with the traces of points: for each a line in its colour, and an arrow at its end.

    Exact for Pillow from 11.1 on; older ones set up to six pixels differently.

    Args:
        frame: RGB.
        trace: float ``(steps, points, 2)``, x and y in pixels, of 2 steps or more. A single point has no line.
        line_width: In pixels.
        arrow_length: Length of the arrow's sides in pixels.
        arrow_angle: Angle between the arrow's sides and the line, in degrees.

    Raises:
        ValueError: The trace has another shape.
    """
    if trace.ndim != 3 or trace.shape[2] != 2 or len(trace) < 2:
        raise OpenVLAValueError(f"A trace needs the shape (steps, points, 2) with 2 steps or more, got {trace.shape}.")
    picture = frame.copy()
    draw = ImageDraw.Draw(picture)
    colors = point_colors(trace.shape[1])
    if trace.shape[1] > 1:
        for points, color in zip(trace.swapaxes(0, 1), colors):
            for start, end in zip(points[:-1], points[1:]):
                draw.line([*map(float, start), *map(float, end)], fill=color, width=line_width)
    angle = np.deg2rad(arrow_angle)
    backwards, sideways = arrow_length * np.cos(angle), arrow_length * np.sin(angle)
    for previous, tip, color in zip(trace[-2], trace[-1], colors):
        direction = tip - previous
        length = np.linalg.norm(direction)
        direction = direction / length if length else direction
        normal = np.array([direction[1], -direction[0]])
        base = tip - backwards * direction
        corners = (tip, base + sideways * normal, base - sideways * normal)
        draw.polygon([tuple(map(float, corner)) for corner in corners], fill=color, outline=color)
    return picture


def point_colors(count: int) -> list[tuple[int, int, int]]:
    """Return a colour for each of ``count`` points: matplotlib's "hsv" at ``i / count``, RGB from 0 to 255."""
    positions = np.arange(count) / count
    channels = [(np.interp(positions, *knots) * 255).astype(int).tolist() for knots in (_RED, _GREEN, _BLUE)]
    return list(zip(*channels))
