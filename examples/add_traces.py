"""Draw the visual traces of TraceVLA on every frame of a dataset, and write both as a LeRobot v3 dataset.

    pip install 'openvla[train]' git+https://github.com/facebookresearch/co-tracker
    python examples/add_traces.py my-demonstrations my-traced --checkpoint scaled_offline.pth
    python -m openvla finetune --model my-tracevla --data my-traced --output-dir runs/my-tracevla --method lora

Frames are those of the dataset's first camera, prepared as `Policy` prepares them (JPEG, Lanczos to 256 x 256 pixels);
they become the camera `observation.images.frame`. `observation.images.trace` is the frame with its trace, and black
where there is none. Actions and proprio are the standardised ones. An interrupted run can be continued. CoTracker's
licence (CC BY-NC 4.0) forbids commercial use; it needs a GPU to be fast.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import numpy as np
from openvla.data.episodes import EpisodeReader
from openvla.data.lerobot_writer import LeRobotWriter
from openvla.data.open import open_dataset
from openvla.inference.visual_trace import FRAME_SIZE, WINDOW_SIZE, CoTracker3, VisualTrace, evaluation_frame
from PIL import Image
from tqdm import tqdm

FRAME, TRACE = "observation.images.frame", "observation.images.trace"
FRAME_RATE = 5  # Hz, Bridge's, where the dataset does not say it


def png(image: Image.Image) -> bytes:
    """Encode without loss."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def add_traces(reader: EpisodeReader, target: str | Path, visual_trace: VisualTrace) -> int:
    """Write the episodes that the target does not hold yet.

    Args:
        reader: The dataset.
        target: Folder to write.
        visual_trace: Draws the traces.

    Returns:
        The number of frames written that have a trace.
    """
    columns = {"action": reader.action_dim, "observation.state": reader.proprio_dim}
    numbers = {name: [str(index) for index in range(dim)] for name, dim in columns.items() if dim}
    fps = round(reader.frame_rate or FRAME_RATE)
    writer = LeRobotWriter(target, fps=fps, numbers=numbers, cameras={FRAME: FRAME_SIZE, TRACE: FRAME_SIZE})
    black, num_traced = png(Image.new("RGB", FRAME_SIZE[::-1])), 0
    for index in tqdm(range(len(writer), len(reader)), unit="episode"):
        episode = reader[index]
        visual_trace.reset()
        frames, traces = [], []
        for step in range(len(episode)):
            frame = evaluation_frame(episode.images(step)[0])
            traced = visual_trace.update(frame)
            frames.append(png(frame))
            traces.append(black if traced is None else png(traced))
            num_traced += traced is not None
        values = {"action": episode.actions, "observation.state": episode.proprio}
        arrays = {name: np.asarray(values[name]) for name in numbers}
        writer.add_episode(episode.instructions[0].strip(), arrays, {FRAME: frames, TRACE: traces})
    writer.write_statistics()
    return num_traced


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="dataset: LeRobot, RLDS or HDF5")
    parser.add_argument("target", help="folder to write")
    parser.add_argument("--checkpoint", required=True, help="CoTracker3's scaled_offline.pth")
    parser.add_argument("--fields", type=json.loads, help="fields of the dataset, as JSON")
    parser.add_argument("--window-size", type=int, default=WINDOW_SIZE, help="steps of a trace that are drawn")
    args = parser.parse_args()
    source = open_dataset(args.source, fields=args.fields)
    count = add_traces(source, args.target, VisualTrace(CoTracker3(args.checkpoint), window_size=args.window_size))
    print(f"{args.target}: {len(source)} episodes, {count} frames with a trace")
