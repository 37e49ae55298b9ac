"""``openvla convert-data``: write any dataset that is read as LeRobot v3, and push it to the Hugging Face Hub.

Actions, states and instructions are written as training would get them: converted to OpenVLA's convention by preset or
fields. Images are PNG, which loses nothing. The new dataset is read without a preset.

Examples:
  openvla convert-data bridge_orig/1.0.0 bridge_lerobot --fps 5
  openvla convert-data replay_buffer.zarr pusht --fps 10 --fields '{instruction_text: push the T onto the target}'
  openvla convert-data demos.hdf5 demos --fps 20 --push me/demos --private
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import HfApi
from PIL import Image
from tqdm import tqdm

from ..dimension_labels import dimension_labels
from ..errors_openvla import OpenVLAFileExistsError, OpenVLAValueError
from .columns import dotted
from .episodes import DatasetError, Episode, EpisodeReader, warn_skipped
from .inspect import parse_fields
from .lerobot_writer import VERSION, LeRobotWriter
from .open import open_dataset
from .presets import AUTO
from .remote import local_path

logger = logging.getLogger(__name__)

_CAMERA_PREFIX = "observation.images."
_STATE = "observation.state"
_UPLOAD = "upload it with --push OWNER/NAME (in Python: push_dataset)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``openvla convert-data``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("source", metavar="SRC", help="dataset of any format that is read, or its URL")
    parser.add_argument("target", metavar="DST", help="folder of the new dataset; must not exist")
    parser.add_argument("--fps", type=int, help="steps per second, where the source does not store them")
    parser.add_argument("--preset", default=AUTO, metavar="NAME", help="fields of a known dataset, or none")
    parser.add_argument("--fields", metavar="YAML", help="fields to replace, as for inspect-data")
    parser.add_argument("--split", default="train", help="train, val, ... or all")
    parser.add_argument("--robot-type", help="LeRobot's name of the robot")
    parser.add_argument("--skip-bad", action="store_true", help="leave out and count episodes that cannot be used")
    parser.add_argument("--push", metavar="REPO_ID", help='dataset on the Hub, "name" or "organization/name"')
    parser.add_argument("--private", action="store_true", default=None, help="make a new dataset on the Hub private")
    parser.add_argument("--token", help="access token (default that of `hf auth login`, or $HF_TOKEN)")


def run(args: argparse.Namespace) -> int:
    """Convert, push and return the exit status."""
    if args.push is None and (args.private or args.token):
        raise OpenVLAValueError("--private and --token are for --push REPO_ID.")
    target = local_path(args.target, _UPLOAD)
    reader = open_dataset(args.source, preset=args.preset, fields=parse_fields(args.fields), split=args.split)
    counts = convert_dataset(reader, target, fps=args.fps, robot_type=args.robot_type, skip_bad=args.skip_bad)
    print(f"{target}: {counts['episodes']} episodes, {counts['steps']} steps, {counts['skipped']} skipped")
    if args.push is not None:
        print(push_dataset(target, args.push, private=args.private, token=args.token))
    return 0


def convert_dataset(
    reader: EpisodeReader,
    target: str | os.PathLike,
    *,
    fps: int | None = None,
    robot_type: str | None = None,
    skip_bad: bool = False,
    progress: bool = True,
) -> dict[str, int]:
    """Write a dataset as LeRobot v3; the folder appears when it is complete.

    Args:
        reader: The dataset.
        target: The new folder.
        fps: Steps per second; None takes those that the dataset stores.
        robot_type: LeRobot's name of the robot.
        skip_bad: Leave out and count episodes that cannot be used; otherwise they raise.
        progress: Show a progress bar.

    Returns:
        Number of ``episodes``, ``steps`` and ``skipped`` episodes.

    Raises:
        OpenVLAFileExistsError: The folder exists.
        OpenVLAValueError: The rate is not known, is not a whole number, or contradicts the dataset's; no episode can be
            used; or the target is a URL.
        DatasetError: An episode cannot be used, and ``skip_bad`` is not set.
    """
    target = local_path(target, _UPLOAD)
    if target.exists():
        raise OpenVLAFileExistsError(f"{target} exists; give a new folder, or remove it.")
    rate = _frame_rate(reader, fps)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    skipped: list[str] = []
    try:
        writer = _write_episodes(reader, temporary, rate, robot_type, skipped if skip_bad else None, progress)
        steps = sum(row["length"] for row in writer.episodes)
        (temporary / "README.md").write_text(dataset_card(reader, writer.info, len(writer), steps), encoding="utf-8")
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    warn_skipped(skipped, len(reader), reader.name)
    return {"episodes": len(writer), "steps": steps, "skipped": len(skipped)}


def _frame_rate(reader: EpisodeReader, fps: int | None) -> int:
    stored = reader.frame_rate
    if fps is None and (stored is None or stored != int(stored)):
        raise OpenVLAValueError(
            f"{reader.root} stores {stored or 'no'} steps per second, LeRobot needs a whole number: give fps (--fps)."
        )
    if fps is not None and (fps < 1 or stored not in (None, fps) and stored == int(stored)):
        raise OpenVLAValueError(
            f"fps must be at least 1 and that of the dataset ({stored or 'not stored'}), got {fps}."
        )
    return int(stored or 0) if fps is None else fps


def _usable(reader: EpisodeReader, skipped: list[str] | None) -> Iterator[tuple[Episode, list[tuple[bytes, ...]]]]:
    """Yield every usable episode with its encoded frames; without ``skipped``, one that is not usable raises."""
    sizes = None
    for index in range(len(reader)):
        try:
            episode = reader[index]
            frames, sizes = _encoded_frames(episode, sizes)
        except DatasetError as error:
            if skipped is None:
                raise
            skipped.append(str(error))
        else:
            yield episode, frames


def _encoded_frames(
    episode: Episode, sizes: list[tuple[int, int]] | None
) -> tuple[list[tuple[bytes, ...]], list[tuple[int, int]]]:
    """Return the encoded frames of every step, and the height and width of each camera's.

    Args:
        episode: The episode.
        sizes: Height and width of each camera's frames in earlier episodes; None if there are none.

    Raises:
        DatasetError: A frame cannot be read or has another size.
    """
    frames = []
    for step in range(len(episode)):
        images = episode.images(step)
        shapes = [(image.shape[0], image.shape[1]) for image in images]
        if sizes is not None and shapes != sizes:
            raise DatasetError(
                f"{episode.source}, episode {episode.id}: the frames of step {step} are {shapes} high and wide, those "
                f"before {sizes}; the frames of a LeRobot camera have one size."
            )
        sizes = shapes
        frames.append(tuple(map(_png, images)))
    return frames, sizes or []


def _write_episodes(
    reader: EpisodeReader,
    folder: Path,
    fps: int,
    robot_type: str | None,
    skipped: list[str] | None,
    progress: bool,
) -> LeRobotWriter:
    cameras = camera_names(reader)
    writer = None
    for episode, frames in tqdm(_usable(reader, skipped), total=len(reader), unit="episode", disable=not progress):
        numbers = {"action": episode.actions}
        if episode.proprio is not None:
            numbers[_STATE] = episode.proprio
        if writer is None:
            sizes = {name: image.shape[:2] for name, image in zip(cameras, episode.images(0))}
            labels = [label for label, _ in dimension_labels(reader.action_dim, reader.name)]
            names = {name: [str(i) for i in range(values.shape[1])] for name, values in numbers.items()}
            writer = LeRobotWriter(
                folder,
                fps=fps,
                numbers={**names, "action": labels},
                cameras=sizes,
                robot_type=robot_type,
                number_dtype=_number_dtype(reader),
            )
        images = {name: [shown[index] for shown in frames] for index, name in enumerate(cameras)}
        writer.add_episode([text.strip() for text in episode.instructions], numbers, images)
    if writer is None:
        raise OpenVLAValueError(f"{reader.root}: none of its {len(reader)} episodes can be used.")
    writer.write_statistics(progress=progress)
    return writer


def _number_dtype(reader: EpisodeReader) -> str:
    """Return "float32" if it holds all actions and states exactly, else "float64"."""
    for index in range(len(reader)):
        try:
            episode = reader[index]
        except DatasetError:  # raised, or skipped, when it is written
            continue
        for values in (episode.actions, episode.proprio):
            if values is not None and not np.array_equal(values.astype(np.float32), values):
                return "float64"
    return "float32"


def camera_names(reader: EpisodeReader) -> list[str]:
    """Return LeRobot's names of a dataset's cameras: ``observation.images.`` and the last part of the name."""
    cameras = [dotted(camera).removeprefix(_CAMERA_PREFIX) for camera in reader.fields.cameras]
    last = [camera.rpartition(".")[2] for camera in cameras]
    names = last if len(set(last)) == len(last) else [camera.replace(".", "_") for camera in cameras]
    return [f"{_CAMERA_PREFIX}{name}" for name in names]


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    # Level 1: three times as fast as the default, files a tenth larger.
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def dataset_card(reader: EpisodeReader, info: Mapping[str, Any], episodes: int, steps: int) -> str:
    """Return the text of a dataset card, with the metadata that the Hub and LeRobot read."""
    features = {name: feature["shape"] for name, feature in info["features"].items() if feature["shape"] != [1]}
    preset = f"preset `{reader.preset}`" if reader.preset else "no preset"
    return "\n".join(
        [
            "---",
            "task_categories: [robotics]",
            "tags: [LeRobot, openvla]",
            "configs:",
            "- config_name: default",
            "  data_files: data/*/*.parquet",
            "---",
            f"# {reader.name}",
            "",
            f"LeRobot {VERSION}: {episodes} episodes, {steps} steps at {info['fps']} per second. Written by",
            f"`openvla convert-data` from a dataset in the format {reader.format}, read with {preset}.",
            "",
            f"- cameras of the source: {', '.join(reader.fields.cameras)}",
            f"- action: {reader.action_dim} dimensions; conversion of the gripper: {reader.fields.gripper}",
            "- licence: that of the source; state it here before you share the dataset",
            "",
            "```json",
            json.dumps({name: shape for name, shape in features.items()}, indent=2),
            "```",
            "",
        ]
    )


def push_dataset(folder: Path, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
    """Upload a LeRobot dataset in one commit, and tag it with the format's version, by which LeRobot loads it.

    Args:
        folder: The dataset.
        repo_id: "name" or "organization/name"; created if it does not exist.
        private: Whether a new dataset is private.
        token: Access token; None takes the one of ``hf auth login``.

    Returns:
        The address of the commit.

    Raises:
        OpenVLAValueError: ``private`` contradicts an existing dataset.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True).repo_id
    if private is not None and bool(api.dataset_info(repo_id).private) is not private:
        raise OpenVLAValueError(
            f"{repo_id} exists and is {'public' if private else 'private'}; private={private} is for a new dataset. "
            "Nothing was uploaded."
        )
    commit = api.upload_folder(
        repo_id=repo_id, repo_type="dataset", folder_path=str(folder), commit_message="Upload dataset"
    )
    api.create_tag(repo_id, tag=VERSION, repo_type="dataset", exist_ok=True)
    return commit.commit_url
