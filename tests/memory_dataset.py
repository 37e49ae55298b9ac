"""Datasets in memory whose actions tell episode and step."""

import numpy as np
from openvla.data.torch_dataset import TorchDatasetReader

EPISODE_LENGTHS = (7, 5, 9, 3, 12, 8, 6, 4)
FIELDS = {"cameras": ["image"], "action": "action", "instruction": "task"}


def memory_reader(name="mine", lengths=EPISODE_LENGTHS, width=7, bad_image=None, nan=None):
    """Return a reader of episodes in memory; every action is 100 times the episode plus the step.

    Args:
        name: The dataset's name.
        lengths: Number of steps of every episode.
        width: Number of action dimensions.
        bad_image: Episode and step whose image cannot be decoded.
        nan: The episode whose actions are NaN.
    """
    steps = []
    for episode, length in enumerate(lengths):
        for step in range(length):
            image = np.full((4, 6, 3), episode, np.uint8)
            action = np.full(width, np.nan if episode == nan else 100 * episode + step)
            image = "no image" if (episode, step) == bad_image else image
            steps.append({"image": image, "action": action, "task": "go"})
    return TorchDatasetReader(steps, name, FIELDS, episode_lengths=lengths)
