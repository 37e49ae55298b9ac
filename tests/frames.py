"""Test images of many shapes; the golden results of TensorFlow's functions were computed from them."""

import hashlib
import json

import numpy as np
from PIL import Image
from reference import GOLDEN

PREPROCESSING = GOLDEN / "preprocessing"


def frames():
    """Return images by name, uint8 ``(height, width, 3)``: a LIBERO observation, noise, a pattern, extreme sizes."""
    real = np.array(Image.open(PREPROCESSING / "agentview.png").convert("RGB"))
    noise = np.random.RandomState(0).randint(0, 256, (240, 320, 3), dtype=np.uint8)
    y, x = np.mgrid[:480, :640]
    pattern = np.stack([x * y // 400, x + y, (x - y) ** 2 // 800], axis=-1).astype(np.uint8)
    indices = np.arange(256) * 224 // 256
    return {
        "agentview": real,
        "agentview_256": real[indices][:, indices],
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
    """Return the cases of a JSON file and their ids, for ``pytest.mark.parametrize``."""
    cases = json.loads((PREPROCESSING / file).read_text())
    return {"argvalues": cases, "ids": [f"{case['image']}-{case['step']}-{i}" for i, case in enumerate(cases)]}


def digest(array):
    """Return the sha256 of the values in C order."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
