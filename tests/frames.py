"""Frames of many shapes, as the golden results of TensorFlow's functions were made from."""

import hashlib
import json

import numpy as np
from PIL import Image
from reference import GOLDEN

PREPROCESSING = GOLDEN / "preprocessing"


def frames():
    """By name, uint8 ``(height, width, 3)``: a real LIBERO observation, noise, a pattern, tall, wide, tiny."""
    real = np.array(Image.open(PREPROCESSING / "agentview.png").convert("RGB"))
    noise = np.random.RandomState(0).randint(0, 256, (240, 320, 3), dtype=np.uint8)
    y, x = np.mgrid[:480, :640]
    pattern = np.stack([x * y // 400, x + y, (x - y) ** 2 // 800], axis=-1).astype(np.uint8)
    every = np.arange(256) * 224 // 256
    return {
        "agentview": real,
        "agentview_256": real[every][:, every],
        "noise": noise,
        "pattern": pattern,
        "extremes": np.where(noise[:50, :37] < 128, 0, 255).astype(np.uint8),
        "tall": noise[:201, :5],
        "wide": noise[:3, :250],
        "odd": pattern[:33, :51],
        "tiny": noise[:2, :3],
        "one": noise[:1, :1],
    }


def golden_cases(file):
    """Cases of a JSON file and their names for pytest."""
    cases = json.loads((PREPROCESSING / file).read_text())
    return {"argvalues": cases, "ids": [f"{case['image']}-{case['step']}-{i}" for i, case in enumerate(cases)]}


def digest(array):
    """sha256 of the values in C order."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
