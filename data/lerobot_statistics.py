"""Statistics of the columns of a LeRobot v3 dataset, as meta/stats.json and meta/episodes hold them.

Names, shapes and the sample of the images are LeRobot 0.6.1's (datasets/compute_stats.py). LeRobot estimates quantiles
by histograms and averages those of the episodes; here they are numpy's over all values.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .episodes import decode_image

QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
# LeRobot's sample of an episode's frames: length ** 0.75 of them, within these bounds.
_MIN_FRAMES, _MAX_FRAMES, _FRAMES_EXPONENT = 100, 10_000, 0.75
# LeRobot takes every n-th row and column of images whose larger side has 300 pixels or more: about 150 remain.
_LARGE_IMAGE, _SAMPLED_SIZE = 300, 150
_NUM_LEVELS = 256


def number_statistics(values: np.ndarray) -> dict[str, list[Any]]:
    """Return min, max, mean, std, count and ``QUANTILES`` of ``(count, dimensions)``; all but count by dimension."""
    values = values.astype(np.float64)
    statistics = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0)}
    statistics |= dict(zip(QUANTILES, np.quantile(values, list(QUANTILES.values()), axis=0)))
    return {**{key: value.tolist() for key, value in statistics.items()}, "count": [len(values)]}


def sampled_steps(length: int) -> list[int]:
    """Return the steps of an episode whose images are looked at: LeRobot's sample, in order."""
    count = max(min(_MIN_FRAMES, length), min(int(length**_FRAMES_EXPONENT), _MAX_FRAMES))
    return np.linspace(0, length - 1, count).round().astype(int).tolist()


def level_counts(image: bytes) -> np.ndarray:
    """Return how often each level occurs in each channel of an encoded image, int64 ``(3, 256)``."""
    pixels = decode_image(image)
    height, width = pixels.shape[:2]
    if max(height, width) >= _LARGE_IMAGE:
        stride = (width if width > height else height) // _SAMPLED_SIZE
        pixels = pixels[::stride, ::stride]
    return np.stack([np.bincount(channel.ravel(), minlength=_NUM_LEVELS) for channel in np.moveaxis(pixels, 2, 0)])


def image_statistics(counts: np.ndarray, num_images: int) -> dict[str, list[Any]]:
    """Return the statistics of images, from 0 to 1, each of shape (3, 1, 1); ``count`` is the number of images.

    Args:
        counts: The sum of the images' ``level_counts``.
        num_images: Number of images.
    """
    channels = [_level_statistics(channel) for channel in counts]
    statistics = {key: [[[channel[key] / (_NUM_LEVELS - 1)]] for channel in channels] for key in channels[0]}
    return {**statistics, "count": [num_images]}


def _level_statistics(counts: np.ndarray) -> dict[str, float]:
    """Return the statistics of the levels of one channel, from how often each occurs."""
    levels, total, cumulated = np.arange(len(counts)), counts.sum(), counts.cumsum()
    mean = (levels * counts).sum() / total
    present = np.flatnonzero(counts)
    statistics = {"min": present[0], "max": present[-1], "mean": mean}
    statistics["std"] = np.sqrt((counts * (levels - mean) ** 2).sum() / total)
    for name, quantile in QUANTILES.items():  # numpy's: linear between the two nearest of the sorted values
        position = quantile * (total - 1)
        below, above = np.searchsorted(cumulated, [np.floor(position), np.ceil(position)], side="right")
        statistics[name] = below + (above - below) * (position % 1)
    return {name: float(value) for name, value in statistics.items()}
