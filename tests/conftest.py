"""Fixtures: the golden checkpoints laid out as published folders, and tiny models of our own."""

import json
import logging
import os
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from reference import GOLDEN, published_folder

os.environ.setdefault("HF_HUB_OFFLINE", "1")
OLD_SCRIPTS = "`torch_dtype` is deprecated!"  # warning for scripts written for 4.40, which some tests imitate


def pytest_collection_modifyitems(items):
    """Run the tests of the library surface first, so that a changed name is reported before the failures it causes."""
    items.sort(key=lambda item: item.path.name != "test_library_surface.py")


class _Deprecations(logging.Handler):
    """Handler that raises where transformers logs that our code uses something deprecated."""

    def emit(self, record):
        message = record.getMessage()
        if "deprecated" in message and not message.startswith(OLD_SCRIPTS):
            raise DeprecationWarning(message)


@pytest.fixture(autouse=True, scope="session")
def _deprecations_are_errors():
    logging.getLogger("transformers").addHandler(_Deprecations(logging.WARNING))


@pytest.fixture(scope="session", params=["fused", "siglip"])
def golden(request, tmp_path_factory):
    """Return a golden checkpoint: its folder, the loaded model, its inputs and the reference's outputs."""
    from openvla import OpenVLAForActionPrediction

    source = GOLDEN / request.param
    folder = published_folder(request.param, tmp_path_factory.mktemp(request.param) / "published")
    inputs = np.load(source / "inputs.npz")
    return SimpleNamespace(
        name=request.param,
        folder=folder,
        model=OpenVLAForActionPrediction.from_pretrained(folder, torch_dtype=torch.float32).eval(),
        pixel_values=torch.from_numpy(inputs["pixel_values"]),
        images=inputs["images_u8"],
        prompts=[torch.from_numpy(inputs[f"input_ids_{i}_29871"]) for i in range(3)],
        forward=np.load(source / "forward.npz"),
        train=np.load(source / "train.npz"),
        predict=json.loads((source / "predict.json").read_text()),
        tensors=json.loads((source / "state_dict_index.json").read_text()),
    )


@pytest.fixture(scope="session")
def fused_folder(tmp_path_factory):
    return published_folder("fused", tmp_path_factory.mktemp("fused") / "published")


@pytest.fixture
def renderer(monkeypatch):
    """Unset the variables that choose MuJoCo's renderer, for the test alone."""
    for name in ("MUJOCO_GL", "PYOPENGL_PLATFORM"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def small_disk(tmp_path):
    """Mount a file system of 1 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.fixture(scope="session")
def tiny():
    from openvla.tiny import build_tiny

    model, processor = build_tiny()
    return SimpleNamespace(model=model, processor=processor)


@pytest.fixture(scope="session")
def bfloat16_folder(tiny, tmp_path_factory):
    """Save the tiny model in bfloat16, as published ones are; no test writes into the folder."""
    from openvla import OpenVLAForActionPrediction

    folder = tmp_path_factory.mktemp("bfloat16")
    tiny.model.save_pretrained(folder)
    OpenVLAForActionPrediction.from_pretrained(folder, torch_dtype=torch.bfloat16).save_pretrained(folder)
    tiny.processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def frames():
    """Return noise, a black and a white image, uint8 (240, 320, 3)."""
    noise = np.random.RandomState(0).randint(0, 256, (240, 320, 3), dtype=np.uint8)
    return {"noise": noise, "black": np.zeros_like(noise), "white": np.full_like(noise, 255)}


@pytest.fixture(scope="session")
def overrides():
    """Return sizes of the golden checkpoints that no registry has: attention heads and towers."""
    sizes_by_name = {}
    for name in ("fused", "siglip"):
        sizes = json.loads((GOLDEN / name / "tiny_timm_overrides.json").read_text())
        ids = json.loads((GOLDEN / name / "config.json").read_text())["timm_model_ids"]
        sizes_by_name[name] = {"timm_model_kwargs": [sizes[i] for i in ids], "text_config": {"num_attention_heads": 4}}
    return sizes_by_name


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """Save a tokenizer of Llama-2's size: 32000 ids, no padding token, BOS in front."""
    from openvla.tiny import build_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(32000, pad_token=None).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def hub():
    """Run a Hugging Face Hub on loopback."""
    from hub import Hub

    server = Hub()
    yield server
    server.shutdown()


@pytest.fixture
def here(hub, monkeypatch, tmp_path):
    """Let this process use the Hub on loopback."""
    import huggingface_hub.utils
    import transformers.utils.hub
    from hub import TOKEN
    from huggingface_hub import constants, file_download

    # A session that was opened offline stays offline; named reset_sessions before huggingface_hub 1.0.
    for name in ("reset_sessions", "close_session"):
        getattr(huggingface_hub.utils, name, bool)()
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
    for module in (constants, file_download):  # huggingface_hub before 1.0 imports it by name
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)  # a client of the earlier endpoint
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


@pytest.fixture(scope="session")
def server():
    """Run a policy server of a tiny model on loopback."""
    from servers import ServerThread, build_policy

    with ServerThread(build_policy()) as server:
        yield server


@pytest.fixture(scope="session")
def chunks():
    """Run a policy server whose model predicts action chunks from three cameras (ALOHA's) and proprio."""
    from servers import OFT_CONFIG, ServerThread, build_policy

    with ServerThread(build_policy(num_images_in_input=3, **OFT_CONFIG)) as server:
        yield server


@pytest.fixture(scope="session")
def frame():
    """Return noise, uint8 (60, 80, 3)."""
    return np.random.RandomState(0).randint(0, 256, (60, 80, 3), dtype=np.uint8)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """Save a tiny model and its processor, the base of training runs; no test writes into the folder."""
    from openvla.tiny import build_tiny

    folder = tmp_path_factory.mktemp("base")
    for part in build_tiny():
        part.save_pretrained(folder)
    return folder
