"""First fine-tuning run without a download: 20 demonstrations of a toy robot, and an untrained model.

    python examples/toy.py
    python -m openvla finetune examples/toy.yaml

writes toy/data (HDF5) and toy/base, then toy/run/model. In each episode a white hand moves over the table to a red or
a blue block, turning, and closes its gripper on arrival; the image determines the action.
"""

from __future__ import annotations

import sys
from pathlib import Path

import h5py
import numpy as np
from openvla.tiny import build_tiny

EPISODES, STEPS, SIZE = 20, 6, 64
COLORS = {"red": (220, 40, 40), "blue": (40, 60, 220)}


def picture(hand: np.ndarray, block: np.ndarray, color: str) -> np.ndarray:
    """Draw the table, the block, and the hand above it: uint8 ``(64, 64, 3)``."""
    image = np.full((SIZE, SIZE, 3), 90, dtype=np.uint8)
    for (x, y), paint, half in ((block, COLORS[color], 7), (hand, (255, 255, 255), 5)):
        x, y = int(x), int(y)
        image[max(0, y - half) : y + half, max(0, x - half) : x + half] = paint
    return image


def demonstrations(folder: Path) -> None:
    """Write the episodes to ``folder/toy.hdf5``."""
    random = np.random.RandomState(0)
    folder.mkdir(parents=True, exist_ok=True)
    with h5py.File(folder / "toy.hdf5", "w") as file:
        for index in range(EPISODES):
            color = list(COLORS)[index % 2]
            start, block = random.randint(8, SIZE - 8, (2, 2))
            path = np.linspace(start, block, STEPS)
            move = (block - start) / SIZE
            turn = np.array([move[1], -move[0], move[0] - move[1]])
            closed = np.arange(STEPS) == STEPS - 1
            actions = [np.concatenate([move, [-0.5 + shut], turn, [1.0 - shut]]) for shut in closed]
            episode = file.create_group(f"data/demo_{index}")
            episode.attrs["language_instruction"] = f"pick up the {color} block"
            episode["actions"] = np.array(actions, dtype=np.float32)
            episode["images"] = np.stack([picture(hand, block, color) for hand in path])


def base(folder: str | Path) -> str | Path:
    """Write the untrained model of `openvla.tiny` and return the folder."""
    for part in build_tiny():
        part.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    place = Path(sys.argv[1] if len(sys.argv) > 1 else "toy")
    demonstrations(place / "data")
    base(place / "base")
    print(f"{place}: {EPISODES} episodes and a base to train")
