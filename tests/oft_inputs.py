"""Inputs of the golden OpenVLA-OFT models."""

import numpy as np
import torch
from reference import GOLDEN

INPUTS = np.load(GOLDEN / "fused" / "inputs.npz")


def stack_images(indices):
    """Return the pixel values of one sample with the golden images of these indices as its cameras."""
    return torch.from_numpy(np.concatenate([INPUTS["pixel_values"][i] for i in indices]))[None]


def prompt(index, empty=True):
    """Return a golden prompt's input ids and attention mask, with Llama-2's empty token at its end or without."""
    ids = torch.from_numpy(INPUTS[f"input_ids_{index}" + ("_29871" if empty else "")])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def raw_proprio(model, key, normalized):
    """Return the state in the robot's units that is normalized to this one."""
    statistics = model.proprio_statistics(key)
    return 0.5 * (normalized + 1) * (statistics.high - statistics.low + 1e-8) + statistics.low
