"""The report of ``openvla inspect-data``: a dataset as a table, JSON or a figure, and the checks of its numbers.

``training.inspect_data`` is the command.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from ..actions_openvla import validate_norm_stats
from ..dimension_labels import dimension_labels
from ..errors_openvla import OpenVLAValueError
from ..inference.predict import import_pyplot
from .conventions import check_frozen_frames
from .doctor import FRAME_STEPS, check_shifted_frames, check_statistics
from .episodes import DatasetError, Episode, EpisodeReader, usable_episodes
from .findings import CheckInput, Finding
from .hdf5 import hdf5_files
from .open import open_dataset
from .presets import AUTO
from .remote import is_remote, local_path
from .replay_buffer import replay_buffer
from .rlds import rlds_folder
from .statistics import action_column_names, statistics_and_findings
from .utils import parse_yaml, read_json

_NUM_SHOWN_FRAMES = 4
_NUM_SHOWN_INSTRUCTIONS = 5
_NUM_COMPARED_FRAMES = 3 * FRAME_STEPS
_PIXEL_STRIDE = 4  # frames are compared at every fourth row and column


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``openvla inspect-data``."""
    parser.add_argument(
        "data",
        metavar="DIR",
        help="LeRobot, RLDS, HDF5 or zarr dataset, or the URL of one; or a checkpoint or .json file of statistics",
    )
    parser.add_argument(
        "--preset", default=AUTO, metavar="NAME", help="fields of a known dataset (default: by its name), or none"
    )
    parser.add_argument(
        "--fields", metavar="YAML", help="fields to replace: '{cameras: [observation.images.top], gripper: inverted}'"
    )
    parser.add_argument("--split", default="train", help="train, val, ... or all")
    parser.add_argument("--skip-bad", action="store_true", help="skip and count episodes that cannot be used")
    parser.add_argument("--check-images", action="store_true", help="decode every image, to find damaged ones")
    parser.add_argument("--out", metavar="PNG", help="save a figure of frames and histograms (extra: openvla[plot])")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def run(args: argparse.Namespace) -> int:
    """Inspect a dataset or statistics, print the report and return the exit status."""
    norm_stats = _read_statistics(args.data)
    if norm_stats is not None:
        return _report_statistics(args, norm_stats)
    out = local_path(args.out) if args.out else None
    plt = import_pyplot("--out") if out else None
    fields = parse_fields(args.fields)
    reader = open_dataset(args.data, preset=args.preset, fields=fields, split=args.split)
    report = inspect(reader, skip_bad=args.skip_bad, check_images=args.check_images, progress=not args.json)
    print(json.dumps(report) if args.json else _format_report(report))
    if out:
        _save_figure(plt, reader, report, out)
        if not args.json:
            print(f"figure       {out}")
    return 0


def _read_statistics(data: str) -> dict[str, Any] | None:
    """Return the statistics of a checkpoint's folder or of a file by dataset; None for anything else."""
    if is_remote(data):
        return None
    path = Path(data)
    files = [path] if path.suffix == ".json" else [path / "dataset_statistics.json", path / "config.json"]
    if (path / "meta" / "info.json").is_file() or rlds_folder(path) or hdf5_files(path) or replay_buffer(path):
        return None  # a dataset, even if its folder also has statistics
    for file in files:
        if not file.is_file():
            continue
        content = read_json(file)
        if not isinstance(content, dict):
            continue
        content = {file.stem: content} if "action" in content else content.get("norm_stats") or content
        if content and all(
            isinstance(entry, dict) and isinstance(entry.get("action"), dict) for entry in content.values()
        ):
            return content
    if path.suffix == ".json" and path.is_file():
        raise OpenVLAValueError(
            f"{path} has no statistics: it needs {{dataset: {{'action': {{'q01': [...], 'q99': [...]}}}}}}."
        )
    return None


def _report_statistics(args: argparse.Namespace, norm_stats: dict[str, Any]) -> int:
    options = [name for name in ("fields", "out", "skip_bad", "check_images") if getattr(args, name)]
    options += [name for name, default in (("preset", AUTO), ("split", "train")) if getattr(args, name) != default]
    if options:
        raise OpenVLAValueError(f"{args.data} holds statistics, not data: the options {options} do not apply.")
    has_quantiles = all(statistics["action"].get("q01") is not None for statistics in norm_stats.values())
    validate_norm_stats(norm_stats, "q99" if has_quantiles else "bounds")
    findings = check_statistics(norm_stats)
    if args.json:
        as_json = {name: [finding.as_json() for finding in entries] for name, entries in findings.items()}
        print(json.dumps({"findings": as_json}))
        return 0
    print(f"statistics   of {', '.join(norm_stats)} ({args.data}); checks that need every step are not possible")
    for name, entries in findings.items():
        print("\n".join([f"\n{name}", *_format_findings(entries)]))
    return 0


def parse_fields(text: str | None) -> dict[str, Any] | None:
    """Return the fields in the YAML of ``--fields``; None without it."""
    if text is None:
        return None
    return parse_yaml(text, f"--fields {text!r}")


def inspect(
    reader: EpisodeReader, *, skip_bad: bool = False, check_images: bool = False, progress: bool = True
) -> dict[str, Any]:
    """Return a JSON-serializable summary of a dataset.

    Args:
        reader: The dataset.
        skip_bad: As in ``compute_statistics``.
        check_images: Decode every image.
        progress: Show progress bars.

    Returns:
        Name, format, path, fields, counts, lengths of episodes, image sizes by camera, instructions with the number of
        episodes that begin with each, the ``statistics``, the ``findings`` of the checks and, with ``check_images``,
        error messages of ``damaged_images``.

    Raises:
        DatasetError: An episode cannot be used and ``skip_bad`` is not set.
        ValueError: No episode can be used.
    """
    statistics, findings = statistics_and_findings(reader, skip_bad=skip_bad, progress=progress)
    shifted, frozen = _compare_frames(reader, statistics)
    if shifted and all(finding.check != "shifted-actions" for finding in findings):
        findings.append(shifted)
    findings += frozen
    lengths: list[int] = []
    damaged: list[str] = []
    instructions: Counter[str] = Counter()
    sizes: dict[str, list[int]] = {}
    for episode in tqdm(usable_episodes(reader), total=len(reader), unit="episode", disable=not progress):
        lengths.append(len(episode))
        instructions[episode.instructions[0].strip()] += 1
        for step in range(len(episode)) if check_images else range(0 if sizes else 1):
            try:
                images = episode.images(step)
            except DatasetError as error:
                if not (skip_bad or check_images):
                    raise
                damaged.append(str(error))
                continue
            sizes = sizes or {camera: list(image.shape[:2]) for camera, image in zip(reader.fields.cameras, images)}
    return {
        "name": reader.name,
        "format": reader.format,
        "path": str(reader.root),
        "cameras": sizes,
        "action_dim": reader.action_dim,
        "proprio_dim": reader.proprio_dim,
        "preset": reader.preset,
        "gripper": reader.fields.gripper,
        "episodes": statistics["num_trajectories"],
        "skipped_episodes": statistics["num_skipped"],
        "steps": statistics["num_transitions"],
        "episode_length": {"min": min(lengths), "median": float(np.median(lengths)), "max": max(lengths)},
        "instructions": dict(instructions.most_common()),
        "damaged_images": damaged,
        "notes": reader.notes(),
        "statistics": statistics,
        "findings": [finding.as_json() for finding in findings],
    }


def _compare_frames(reader: EpisodeReader, statistics: dict[str, Any]) -> tuple[Finding | None, list[Finding]]:
    """Compare a few hundred frames with their next ones.

    Returns:
        A finding if the first camera's frames change too early, and findings for cameras whose frames do not change.
    """
    if statistics["num_transitions"] < FRAME_STEPS:
        return None, []
    actions, changes, num_compared = [], [], 0
    unchanged: dict[str, list[bool]] = {camera: [] for camera in reader.fields.cameras}
    for episode in usable_episodes(reader):
        count = min(len(episode), _NUM_COMPARED_FRAMES - num_compared)
        try:
            differences = list(_frame_differences(episode, count))
        except DatasetError:
            continue  # reported when the images are decoded
        num_compared += count
        actions.append(episode.actions[:count])
        changes.append(np.array([difference.change for difference in differences] + [np.nan]))
        for index, equal in enumerate(unchanged.values()):
            equal += [difference.unchanged[index] for difference in differences]
        if num_compared >= _NUM_COMPARED_FRAMES:
            break
    data = CheckInput(reader.name, statistics["action"], reader.fields, action_column_names(reader), actions)
    return check_shifted_frames(data, changes), check_frozen_frames(data, unchanged)


class _FrameDifference(NamedTuple):
    """Mean absolute difference of the first camera's frame and its next one; per camera, whether they are equal."""

    change: float
    unchanged: list[bool]


def _frame_differences(episode: Episode, count: int) -> Iterator[_FrameDifference]:
    """Yield the differences of the first ``count`` frames to their next ones."""
    previous = episode.images(0)
    for step in range(1, count):
        images = episode.images(step)
        first = [frames[0][::_PIXEL_STRIDE, ::_PIXEL_STRIDE].astype(np.float32) for frames in (previous, images)]
        change = float(np.abs(first[1] - first[0]).mean())
        yield _FrameDifference(change, [np.array_equal(a, b) for a, b in zip(previous, images)])
        previous = images


def _format_report(report: dict[str, Any]) -> str:
    lengths, instructions = report["episode_length"], report["instructions"]
    skipped = f", {report['skipped_episodes']} skipped" if report["skipped_episodes"] else ""
    cameras = ", ".join(f"{camera} {height}x{width}" for camera, (height, width) in report["cameras"].items())
    lines = [
        f"dataset      {report['name']} ({report['format']}, {report['path']})",
        f"episodes     {report['episodes']}{skipped}; {report['steps']} steps, "
        f"{lengths['min']} to {lengths['max']} per episode, median {lengths['median']:g}",
        f"cameras      {cameras}",
        f"preset       {report['preset'] or 'none'}",
        f"action       {report['action_dim']} dimensions, gripper {report['gripper'].replace('_', ' ')}",
        f"proprio      {report['proprio_dim'] or 'none'}",
        f"instructions {len(instructions)}",
    ]
    lines += [f"  {count:>6}  {text}" for text, count in list(instructions.items())[:_NUM_SHOWN_INSTRUCTIONS]]
    if len(instructions) > _NUM_SHOWN_INSTRUCTIONS:
        lines.append(f"          ... {len(instructions) - _NUM_SHOWN_INSTRUCTIONS} more")
    lines += [f"note         {note}" for note in report["notes"]]
    columns = ("mean", "std", "min", "q01", "q99", "max")
    action = report["statistics"]["action"]
    lines += ["", f"  {'action':<12}" + "".join(f"{column:>11}" for column in columns) + "  normalised"]
    labels = dimension_labels(report["action_dim"], report["name"])
    for index, (label, _) in enumerate(labels):
        values = "".join(f"{action[column][index]:>+11.4f}" for column in columns)
        lines.append(f"  {label:<12}{values}  {'yes' if action['mask'][index] else 'no'}")
    lines += [
        "",
        *_format_findings([_finding_from_json(entry) for entry in report["findings"]]),
    ]
    if not report["proprio_dim"]:
        lines.append("not checked against the state: absolute poses and shifted actions (no proprio)")
    if report["damaged_images"]:
        lines += ["", f"damaged images: {len(report['damaged_images'])}. The first: {report['damaged_images'][0]}"]
    return "\n".join(lines)


def _finding_from_json(entry: dict[str, Any]) -> Finding:
    return Finding(**{key: value for key, value in entry.items() if key != "severity"})


def _format_findings(findings: list[Finding]) -> list[str]:
    """Return the findings as lines of text."""
    if not findings:
        return ["findings     none"]
    count = sum(finding.certain for finding in findings)
    lines = [f"findings     {count} certain (openvla finetune stops at them), {len(findings) - count} doubtful"]
    for finding in findings:
        lines.append(f"  {finding.severity.upper()} {finding.check}: {finding.evidence}")
        lines += [f"      {finding.reason}", f"      {finding.fix}"]
    return lines


def _save_figure(plt: Any, reader: EpisodeReader, report: dict[str, Any], file: Path) -> None:
    """Save a figure: frames of two episodes from every camera, and a histogram of every action dimension."""
    labels = dimension_labels(report["action_dim"], report["name"])
    cameras, num_columns = reader.fields.cameras, min(len(labels), 7)
    num_rows = -(-len(labels) // num_columns)
    figure = plt.figure(figsize=(15, 2.7 * len(cameras) + 2.6 * num_rows + 0.8), layout="constrained")
    title = f"{report['name']}: {report['episodes']} episodes, {report['steps']} steps"
    findings = report["findings"]
    if findings:
        title += "\n" + ", ".join(f"{finding['check']} ({finding['severity']})" for finding in findings)
    figure.suptitle(title, fontsize=12, color="C3" if any(finding["certain"] for finding in findings) else "black")
    frames, histograms = figure.subfigures(2, 1, height_ratios=[2.7 * len(cameras), 2.6 * num_rows])
    _plot_frames(frames, reader, cameras)
    _plot_histograms(histograms.subplots(num_rows, num_columns, squeeze=False).flat, reader, report)
    histograms.axes[0].legend(handles=histograms.axes[0].lines[:1], fontsize=7)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)
    plt.close(figure)


def _plot_histograms(grid: Any, reader: EpisodeReader, report: dict[str, Any]) -> None:
    """Plot a histogram of every action dimension; those that a finding mentions have a red title."""
    labels = dimension_labels(report["action_dim"], report["name"])
    actions = np.concatenate([episode.actions for episode in usable_episodes(reader)])
    statistics = report["statistics"]["action"]
    evidence = [finding["evidence"] for finding in report["findings"]]
    for index, ((label, unit), axes) in enumerate(zip(labels, grid)):
        axes.hist(actions[:, index], bins=50, color="C0")
        for quantile in ("q01", "q99"):
            axes.axvline(statistics[quantile][index], color="C3", lw=1, ls="--", label="q01, q99")
        suspect = any(re.search(rf"(?<!\w){re.escape(label)}(?!\w)", text) for text in evidence)
        normalised = "" if statistics["mask"][index] else "\nnot normalised"
        axes.set_title(f"{label} ({unit}){normalised}", fontsize=8, color="C3" if suspect else "black")
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.5)  # so that bars of one step are visible
        axes.tick_params(labelsize=7)
    for axes in list(grid)[len(labels) :]:
        axes.set_visible(False)


def _plot_frames(figure: Any, reader: EpisodeReader, cameras: tuple[str, ...]) -> None:
    """Plot the first and the last frame of two episodes, one row per camera."""
    episodes = [episode for episode, _ in zip(usable_episodes(reader), range(2))]
    shown = [(episode, step) for episode in episodes for step in (0, len(episode) - 1)][:_NUM_SHOWN_FRAMES]
    grid = figure.subplots(len(cameras), len(shown), squeeze=False)
    for column, (episode, step) in enumerate(shown):
        for row, image in enumerate(episode.images(step)):
            axes = grid[row, column]
            axes.imshow(image)
            axes.set_xticks([])
            axes.set_yticks([])
            if column == 0:
                axes.set_ylabel(cameras[row], fontsize=8)
            if row == 0:
                instruction = episode.instructions[step].strip()
                axes.set_title(f"“{instruction[:44]}”\n{episode.id[-44:]}, step {step}", fontsize=8)
