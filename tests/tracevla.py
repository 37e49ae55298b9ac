"""The golden TraceVLA: the authors' class on tiny random weights, and what it answered."""

import bz2
import json
import shutil

import numpy as np
import torch
from PIL import Image
from reference import GOLDEN, write_json

SOURCE = GOLDEN / "tracevla"
TOWERS = [{"depth": 2, "embed_dim": 32, "num_heads": 2}, {"depth": 3, "embed_dim": 24, "num_heads": 2}]


def read(name):
    """Return a golden JSON file."""
    return json.loads((SOURCE / name).read_text())


def weights():
    """Return the golden weights file."""
    return bz2.decompress((SOURCE / "hub" / "model.safetensors.bz2").read_bytes())


def published_tracevla(folder):
    """Write the golden checkpoint as it would lie on the Hub; the tokenizer is not Llama's, but has its size."""
    from openvla.tiny import build_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {**read("hub/config.json"), "timm_model_kwargs": TOWERS})
    (folder / "model.safetensors").write_bytes(weights())
    for name in ("generation_config.json", "dataset_statistics.json"):
        shutil.copy(SOURCE / "hub" / name, folder)
    preprocessor = {**read("hub/preprocessor_config.json"), "processor_class": "PrismaticProcessor"}
    write_json(folder / "preprocessor_config.json", preprocessor)
    build_tokenizer(32000).save_pretrained(folder)
    return folder


def golden_image(name):
    """Return a golden image: "r0" raw, "o0" the same with its trace."""
    arrays = np.load(SOURCE / "images.npz")
    return Image.fromarray(arrays[{"r": "image", "o": "overlaid"}[name[0]] + name[1:]])


def pixels(processor, case):
    """Return the pixel values of a golden case, float32 (1, images * 6, 224, 224)."""
    stacked = processor.image_processor([golden_image(name) for name in case["images"]], return_tensors="pt")
    return stacked["pixel_values"].flatten(0, 1)[None]


def ids(case):
    """Return the prompt's ids of a golden case, without the empty token."""
    return torch.tensor([case["input_ids"]])


def moving_points(video, *, grid_size=0, queries=None):
    """Return the tracks of points that move by two pixels a frame; a tracker."""
    steps = 2.0 * torch.arange(video.shape[1])[:, None, None]
    if queries is not None:
        return queries[:, None, :, 1:] + (steps - steps[8])[None]
    side = torch.linspace(5, 200, grid_size)
    grid = torch.stack(torch.meshgrid(side, side, indexing="xy"), dim=-1).reshape(1, 1, -1, 2)
    return grid + steps[None]
