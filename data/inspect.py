"""``openvla inspect-data``: what a dataset holds, as a table, as JSON, as a picture; what in it cannot be right.

Of a checkpoint, or a file of statistics, what in its statistics cannot be right. The exit status is 0 whatever is
found: ``openvla finetune`` refuses, and the JSON's ``findings`` have a ``severity``.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..actions_openvla import dimension_labels, validate_norm_stats
from ..errors_openvla import OpenVLAValueError
from ..inference.predict import import_pyplot
from .conventions import frozen_frames
from .doctor import FRAME_STEPS, examine_statistics, shifted_frames
from .episodes import (
    DemonstrationError,
    Episode,
    EpisodeReader,
    open_demonstrations,
    read_json,
    require,
    usable_episodes,
)
from .findings import Finding, Recording
from .hdf5 import hdf5_files
from .presets import AUTO
from .rlds import rlds_folder
from .statistics import dimension_names, statistics_and_findings

_FRAMES = 4
_INSTRUCTIONS = 5
_COMPARED_FRAMES = 3 * FRAME_STEPS
_EVERY_PIXEL = 4  # of rows and columns that are compared


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``openvla inspect-data``."""
    parser.add_argument(
        "data",
        type=Path,
        metavar="DIR",
        help="LeRobot, RLDS or HDF5 dataset (or one HDF5 file); or a checkpoint or .json of statistics",
    )
    parser.add_argument(
        "--preset", default=AUTO, metavar="NAME", help="fields of a known dataset; default by its name; none"
    )
    parser.add_argument(
        "--fields", metavar="YAML", help="fields to replace: '{cameras: [observation.images.top], gripper: inverted}'"
    )
    parser.add_argument("--split", default="train", help="train, val, ... or all")
    parser.add_argument(
        "--skip-bad", action="store_true", help="leave out episodes that cannot be used, and count them"
    )
    parser.add_argument("--check-images", action="store_true", help="decode every image, to find damaged ones")
    parser.add_argument("--out", type=Path, metavar="PNG", help="draw frames and histograms (extra: openvla[plot])")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def run(args: argparse.Namespace) -> int:
    """Inspect and report; returns the exit status."""
    held = _held_statistics(args.data)
    if held is not None:
        return _report_statistics(args, held)
    plt = import_pyplot("--out") if args.out else None
    fields = _fields(args.fields)
    reader = open_demonstrations(args.data, preset=args.preset, fields=fields, split=args.split)
    report = inspect(reader, skip_bad=args.skip_bad, check_images=args.check_images, progress=not args.json)
    print(json.dumps(report) if args.json else _table(report))
    if plt:
        _plot(plt, reader, report, args.out)
        if not args.json:
            print(f"picture      {args.out}")
    return 0


def _held_statistics(path: Path) -> dict[str, Any] | None:
    """Return the statistics of a checkpoint's folder or of a file, by dataset; None for anything else."""
    files = [path] if path.suffix == ".json" else [path / "dataset_statistics.json", path / "config.json"]
    if (path / "meta" / "info.json").is_file() or rlds_folder(path) or hdf5_files(path):
        return None  # a dataset, whatever lies beside it
    for file in files:
        if not file.is_file():
            continue
        content = read_json(file)
        if not isinstance(content, dict):
            continue
        content = {file.stem: content} if "action" in content else content.get("norm_stats") or content
        if content and all(isinstance(one, dict) and isinstance(one.get("action"), dict) for one in content.values()):
            return content
    if path.suffix == ".json" and path.is_file():
        raise OpenVLAValueError(
            f"{path} holds no statistics: it needs {{dataset: {{'action': {{'q01': [...], 'q99': [...]}}}}}}."
        )
    return None


def _report_statistics(args: argparse.Namespace, held: dict[str, Any]) -> int:
    given = [name for name in ("fields", "out", "skip_bad", "check_images") if getattr(args, name)]
    given += [name for name, default in (("preset", AUTO), ("split", "train")) if getattr(args, name) != default]
    if given:
        raise OpenVLAValueError(f"{args.data} holds statistics, not data: {given} must be left out.")
    validate_norm_stats(held, "q99" if all(one["action"].get("q01") is not None for one in held.values()) else "bounds")
    found = examine_statistics(held)
    if args.json:
        print(json.dumps({"findings": {name: [one.as_json() for one in findings] for name, findings in found.items()}}))
        return 0
    print(f"statistics   of {', '.join(held)} ({args.data}); what needs every step is not seen")
    for name, findings in found.items():
        print("\n".join([f"\n{name}", *_findings(findings)]))
    return 0


def _fields(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    fields = require("yaml", "--fields").safe_load(text)
    if not isinstance(fields, dict):
        raise OpenVLAValueError(f"--fields must be a mapping such as '{{gripper: inverted}}', got {text!r}.")
    return fields


def inspect(
    reader: EpisodeReader, *, skip_bad: bool = False, check_images: bool = False, progress: bool = True
) -> dict[str, Any]:
    """What a dataset holds.

    Args:
        reader: The dataset.
        skip_bad: As in ``compute_statistics``.
        check_images: Decode every image.
        progress: Show progress bars.

    Returns:
        Name, format, path, fields, counts, lengths of episodes, image sizes by camera, instructions with how many
        episodes begin with each, the statistics, and the ``findings`` (``data_doctor``); with ``check_images`` the
        ``damaged_images``, in words.

    Raises:
        DemonstrationError: An episode cannot be used, without ``skip_bad``.
        ValueError: None can.
    """
    statistics, findings = statistics_and_findings(reader, skip_bad=skip_bad, progress=progress)
    shifted, frozen = _compare_frames(reader, statistics)
    if shifted and all(finding.check != "shifted-actions" for finding in findings):
        findings.append(shifted)
    findings += frozen
    lengths, said, sizes, damaged = [], Counter(), {}, []
    for episode in tqdm(usable_episodes(reader), total=len(reader), unit="episode", disable=not progress):
        lengths.append(len(episode))
        said[episode.instructions[0].strip()] += 1
        for step in range(len(episode)) if check_images else range(0 if sizes else 1):
            try:
                images = episode.images(step)
            except DemonstrationError as error:
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
        "instructions": dict(said.most_common()),
        "damaged_images": damaged,
        "notes": reader.notes(),
        "statistics": statistics,
        "findings": [finding.as_json() for finding in findings],
    }


def _compare_frames(reader: EpisodeReader, statistics: dict[str, Any]) -> tuple[Finding | None, list[Finding]]:
    """Look at a few hundred pictures.

    Returns:
        Whether the first camera's change before they are moved; and which cameras stand still while the arm moves.
    """
    if statistics["num_transitions"] < FRAME_STEPS:
        return None, []
    actions, changes, compared = [], [], 0
    still: dict[str, list[bool]] = {camera: [] for camera in reader.fields.cameras}
    for episode in usable_episodes(reader):
        count = min(len(episode), _COMPARED_FRAMES - compared)
        try:
            differences = list(_differences(episode, count))
        except DemonstrationError:
            continue  # named where images are looked at
        compared += count
        actions.append(episode.actions[:count])
        changes.append(np.array([change for change, _ in differences] + [np.nan]))
        for place, equal in enumerate(still.values()):
            equal += [same[place] for _, same in differences]
        if compared >= _COMPARED_FRAMES:
            break
    recording = Recording(reader.name, statistics["action"], reader.fields, dimension_names(reader), actions)
    return shifted_frames(recording, changes), frozen_frames(recording, still)


def _differences(episode: Episode, count: int) -> Iterator[tuple[float, list[bool]]]:
    """Yield by step how far the first camera's next frame differs, and which cameras' next frame is the same."""
    before = episode.images(0)
    for step in range(1, count):
        after = episode.images(step)
        small = [images[0][::_EVERY_PIXEL, ::_EVERY_PIXEL].astype(np.float32) for images in (before, after)]
        yield float(np.abs(small[1] - small[0]).mean()), [np.array_equal(a, b) for a, b in zip(before, after)]
        before = after


def _table(report: dict[str, Any]) -> str:
    lengths, said = report["episode_length"], report["instructions"]
    skipped = f", {report['skipped_episodes']} skipped" if report["skipped_episodes"] else ""
    cameras = ", ".join(f"{camera} {height}x{width}" for camera, (height, width) in report["cameras"].items())
    lines = [
        f"dataset      {report['name']} ({report['format']}, {report['path']})",
        f"episodes     {report['episodes']}{skipped}; {report['steps']} steps, "
        f"{lengths['min']} to {lengths['max']} an episode, half of them up to {lengths['median']:g}",
        f"cameras      {cameras}",
        f"preset       {report['preset'] or 'none'}",
        f"action       {report['action_dim']} dimensions, gripper {report['gripper'].replace('_', ' ')}",
        f"proprio      {report['proprio_dim'] or 'none'}",
        f"instructions {len(said)}",
    ]
    lines += [f"  {count:>6}  {text}" for text, count in list(said.items())[:_INSTRUCTIONS]]
    lines += [f"          ... {len(said) - _INSTRUCTIONS} more"] if len(said) > _INSTRUCTIONS else []
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
        *_findings([Finding(**{k: v for k, v in one.items() if k != "severity"}) for one in report["findings"]]),
    ]
    if not report["proprio_dim"]:
        lines.append("not seen: poses given for movements, and shifts, against the state (no proprio)")
    if report["damaged_images"]:
        lines += ["", f"damaged images: {len(report['damaged_images'])}. The first: {report['damaged_images'][0]}"]
    return "\n".join(lines)


def _findings(findings: list[Finding]) -> list[str]:
    """Return the findings as lines, the certain ones first."""
    if not findings:
        return ["findings     none"]
    count = sum(finding.certain for finding in findings)
    lines = [f"findings     {count} certain (openvla finetune refuses them), {len(findings) - count} doubtful"]
    for finding in findings:
        lines.append(f"  {finding.severity.upper()} {finding.check}: {finding.saw}")
        lines += [f"      {finding.why}", f"      {finding.mend}"]
    return lines


def _plot(plt: Any, reader: EpisodeReader, report: dict[str, Any], file: Path) -> None:
    """Frames of one episode in each camera above, a histogram of every action dimension below."""
    labels = dimension_labels(report["action_dim"], report["name"])
    cameras, per_row = reader.fields.cameras, min(len(labels), 7)
    rows = -(-len(labels) // per_row)
    figure = plt.figure(figsize=(15, 2.7 * len(cameras) + 2.6 * rows + 0.8), layout="constrained")
    title = f"{report['name']}: {report['episodes']} episodes, {report['steps']} steps"
    found = report["findings"]
    if found:
        title += "\n" + ", ".join(f"{one['check']} ({one['severity']})" for one in found)
    figure.suptitle(title, fontsize=12, color="C3" if any(one["certain"] for one in found) else "black")
    frames, histograms = figure.subfigures(2, 1, height_ratios=[2.7 * len(cameras), 2.6 * rows])
    _plot_frames(frames, reader, cameras)
    actions = np.concatenate([episode.actions for episode in usable_episodes(reader)])
    statistics = report["statistics"]["action"]
    cells = histograms.subplots(rows, per_row, squeeze=False).flat
    for index, ((label, unit), axes) in enumerate(zip(labels, cells)):
        axes.hist(actions[:, index], bins=50, color="C0")
        for quantile in ("q01", "q99"):
            axes.axvline(statistics[quantile][index], color="C3", lw=1, ls="--", label="q01, q99")
        suspect = any(re.search(rf"(?<!\w){re.escape(label)}(?!\w)", one["saw"]) for one in found)
        normalised = "" if statistics["mask"][index] else "\nnot normalised"
        axes.set_title(f"{label} ({unit}){normalised}", fontsize=8, color="C3" if suspect else "black")
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.5)  # half a step: else the smallest bar begins at nothing
        axes.tick_params(labelsize=7)
    for axes in list(cells)[len(labels) :]:
        axes.set_visible(False)
    histograms.axes[0].legend(handles=histograms.axes[0].lines[:1], fontsize=7)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)
    plt.close(figure)


def _plot_frames(figure: Any, reader: EpisodeReader, cameras: tuple[str, ...]) -> None:
    episodes = usable_episodes(reader)
    picked = [episode for episode, _ in zip(episodes, range(2))]
    shown = [(episode, step) for episode in picked for step in (0, len(episode) - 1)][:_FRAMES]
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
                said = episode.instructions[step].strip()
                axes.set_title(f"“{said[:44]}”\n{episode.id[-44:]}, step {step}", fontsize=8)
