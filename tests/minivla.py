"""The golden runs of openvla-mini, laid out as its training writes them, and their conversion."""

import bz2
import io
import json
import shutil
from functools import lru_cache

import numpy as np
import PIL
import pytest
import torch
from openvla.convert_checkpoint import convert
from reference import GOLDEN, write_json

MINIVLA = GOLDEN / "minivla"
SIZES = json.loads((MINIVLA / "sizes.json").read_text())
RUNS = list(SIZES["runs"])
LIBERO_VQ = SIZES["runs"]["vq_libero"]["vq"]
STEP_FILE = "step-150000-epoch-67-loss=0.0934.pt"  # FSDP runs have no latest-checkpoint.pt
END = SIZES["vocabulary_proper"]  # <|endoftext|>
# The golden language model's tokenizer and towers are tiny; the published ones need no overrides.
OVERRIDES = {
    "timm_model_kwargs": list(SIZES["timm_overrides"].values()),
    "pad_token_id": END,
    "text_config": {"bos_token_id": END, "eos_token_id": END},
}

# A tiny model with VQ actions, for tests of how they are predicted and served.
TINY_VQ = {
    "action_vq": {"num_codes": 64, "num_rounds": 5, "latent_dim": 6, "hidden_dim": 8},
    "chunk_length": 4,
    "action_dim": 7,
    "norm_stats": {"made up": {"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7}}},
}


def set_random_vq(model):
    """Give the autoencoder of a tiny model random weights, so that codes decode to different chunks."""
    with torch.no_grad():
        for buffer in model.action_vq.buffers():
            buffer.copy_(torch.randn(buffer.shape, generator=torch.Generator().manual_seed(buffer.numel())))
    return model


TALL_IMAGE = 6


def read_json(name):
    return json.loads((MINIVLA / name).read_text())


def require_golden_pixels(images):
    """Skip where Pillow resizes a tall image in another order of passes than Pillow 13, with which these were made."""
    if TALL_IMAGE in images and int(PIL.__version__.split(".")[0]) < 13:
        pytest.skip("pixels of Pillow 13")


@lru_cache
def weights():
    """The tensors of the golden checkpoint."""
    packed = (MINIVLA / "weights/latest-checkpoint.pt.bz2").read_bytes()
    return torch.load(io.BytesIO(bz2.decompress(packed)), weights_only=True)


def write_run(name, folder):
    """Write a golden run: config.json, statistics, checkpoints/step-*.pt."""
    (folder / "checkpoints").mkdir(parents=True)
    for file in ("config.json", "dataset_statistics.json"):
        shutil.copy(MINIVLA / "runs" / name / file, folder)
    model = {component: dict(part) for component, part in weights()["model"].items()}
    if SIZES["runs"][name]["weights"] == "embedding_last.npz":
        array = np.load(MINIVLA / "weights/embedding_last.npz")["embedding"]
        model["llm_backbone"]["llm.model.embed_tokens.weight"] = torch.from_numpy(array)
    head, embedding = "llm.lm_head.weight", "llm.model.embed_tokens.weight"
    model["llm_backbone"][head] = model["llm_backbone"][embedding]
    torch.save({"model": model}, folder / "checkpoints" / STEP_FILE)
    return folder


def write_vq(folder):
    """Write the VQ folders of openvla-mini's registry; the given folder stands for its vq/."""
    for source in (MINIVLA / "vq").iterdir():
        target = folder / source.name
        (target / "checkpoints").mkdir(parents=True)
        shutil.copy(source / "config.json", target)
        packed = (source / "checkpoints/model.pt.bz2").read_bytes()
        (target / "checkpoints/model.pt").write_bytes(bz2.decompress(packed))
    return folder


def convert_run(name, folder, vq, **kwargs):
    """Convert a golden run in float32, for frames as they are; return the native run and the Hub folder."""
    run = write_run(name, folder / "run")
    kwargs = {
        "dtype": "fp32",
        "image_preset": "none",
        "config_overrides": OVERRIDES,
        "tokenizer": MINIVLA / "llm",
        **kwargs,
    }
    convert(run, folder / name, vq=vq if SIZES["runs"][name]["vq"] else None, **kwargs)
    return run, folder / name


def tiny_json(path, content):
    write_json(path, content)
    return path


def trainable_folder(name, folder, vq):
    """Write an untrained model with a golden run's tokenizer, images and autoencoder, quick to train: 4 patches."""
    from openvla import AutoProcessor, OpenVLAConfig, OpenVLAForActionPrediction
    from openvla.default_processor import default_processor
    from openvla.tiny import TINY_TOWERS, build_model

    _, converted = convert_run(name, folder, vq)
    golden = OpenVLAForActionPrediction.from_pretrained(converted)
    fields = {k: v for k, v in golden.config.to_dict().items() if k not in ("image_sizes", "norm_stats")}
    fields["timm_model_kwargs"] = [{**sizes, "img_size": 28} for sizes in TINY_TOWERS.values()]
    fields["text_config"] = {**fields["text_config"], "hidden_size": 112, "intermediate_size": 256}
    config = OpenVLAConfig.from_dict({**fields, "default_unnorm_key": None})
    model = build_model(config)
    if config.action_vq is not None:
        model.action_vq.load_state_dict(golden.action_vq.state_dict())
    model.save_pretrained(folder / "base")
    default_processor(config, AutoProcessor.from_pretrained(converted).tokenizer).save_pretrained(folder / "base")
    return folder / "base"
