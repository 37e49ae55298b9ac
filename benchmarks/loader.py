"""Samples a second of our loader and of LeRobot's own, on the same LeRobot v3 dataset with h264 video.

    python benchmarks/loader.py make video          # lerobot 0.6: 20 episodes of 100 frames, 256 x 256, 10 Hz
    python benchmarks/loader.py lerobot video       # lerobot 0.6, in its environment
    python benchmarks/loader.py openvla video

Each line of the output is one measurement as JSON. Run both in turn on one machine. LeRobot's loader gives frames
as uint8 tensors, without resizing, augmentation or tokens; ours gives training batches.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

import numpy as np

BATCH_SIZE, WARM_UP_BATCHES, SIZE = 16, 2, 256


def make(folder: Path) -> None:
    """Write the dataset: a textured picture that moves under the camera."""
    from lerobot.configs.video import RGBEncoderConfig
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    shutil.rmtree(folder, ignore_errors=True)
    features = {name: {"dtype": "float32", "shape": (7,), "names": None} for name in ("action", "observation.state")}
    features["observation.images.image"] = {
        "dtype": "video",
        "shape": (SIZE, SIZE, 3),
        "names": ["height", "width", "channels"],
    }
    encoder = RGBEncoderConfig(vcodec="h264", g=2, crf=23)  # LeRobot's defaults for the distance of key frames
    dataset = LeRobotDataset.create("test/video", fps=10, root=folder, features=features, rgb_encoder=encoder)
    random = np.random.default_rng(0)
    picture = random.integers(0, 256, (64, 64, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    for episode in range(20):
        for step in range(100):
            top, left = (3 * step + 17 * episode) % SIZE, 2 * step % SIZE
            action = random.uniform(-1, 1, 7).astype(np.float32)
            action[6] = float(step > 50)
            frame = {"action": action, "observation.state": random.uniform(-1, 1, 7).astype(np.float32)}
            frame["observation.images.image"] = np.ascontiguousarray(picture[top : top + SIZE, left : left + SIZE])
            dataset.add_frame({**frame, "task": f"pick up block {episode % 4}"})
        dataset.save_episode()
    dataset.finalize()


def measure_lerobot(folder: Path, workers: int, backend: str, seconds: float) -> dict:
    """Return the rate of LeRobotDataset in a shuffling DataLoader."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
    from torch.utils.data import DataLoader

    dataset = LeRobotDataset("test/video", root=folder, video_backend=backend, return_uint8=True)
    loader = DataLoader(dataset, BATCH_SIZE, shuffle=True, num_workers=workers)
    samples = 0
    for number, batch in enumerate(loader, start=1 - WARM_UP_BATCHES):
        if number <= 0:
            start, cpu_start = time.perf_counter(), time.process_time()
            continue
        samples += len(batch["action"])
        elapsed = time.perf_counter() - start
        if elapsed >= seconds:
            break
    measured = {"loader": f"lerobot, {backend}", "workers": workers, "samples": samples}
    measured["samples_per_second"] = round(samples / elapsed, 1)
    if workers == 0:
        measured["cpu_ms"] = round((time.process_time() - cpu_start) / samples * 1000, 2)
    return measured


def main() -> None:
    """Make the dataset, or measure a loader."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("make", "lerobot", "openvla"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--backends", nargs="+", default=["pyav", "torchcodec"], help="LeRobot's video backends")
    parser.add_argument("--seconds", type=float, default=10.0)
    args = parser.parse_args()
    if args.what == "make":
        make(args.folder)
    elif args.what == "lerobot":
        for backend in args.backends:
            for workers in args.workers:
                print(json.dumps(measure_lerobot(args.folder, workers, backend, args.seconds)), flush=True)
    else:
        from openvla.data.open import open_dataset
        from openvla.training.data_rate import data_rates

        for rate in data_rates(open_dataset(args.folder), args.workers, seconds=args.seconds):
            print(json.dumps({"loader": "openvla", **rate}), flush=True)


if __name__ == "__main__":
    main()
