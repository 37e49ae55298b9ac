"""Folders of MiniVLA's VQ autoencoders: ``config.json`` and ``checkpoints/model.pt``, in both directions."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import torch
from torch import nn

from ..configuration_openvla import OpenVLAConfig, write_json
from ..errors_openvla import OpenVLAFileNotFoundError, OpenVLAValueError
from ..vq_openvla import VQ_MODULE
from .direct_io import DirectWriter
from .files import read_json
from .safetensors_io import find_mismatches
from .torch_archive import load_torch_file, require_intact

VQ_FOLDER, VQ_FILE = "vq", Path("checkpoints", "model.pt")
NATIVE_VQ_CONFIG_FILE = "native_vq_config.json"  # the folder's config.json, kept for the reverse conversion
# openvla-mini's action tokenizers of VQ codes: whether codes are <|extra_i|> tokens, and the autoencoder's folder.
LIBERO_VQ = "pretrain_vq+mx-libero_90+fach-7+ng-7+nemb-128+nlatent-512"
VQ_TOKENIZERS: dict[str, tuple[bool, str]] = {
    "libero_vq_action_tokenizer": (False, LIBERO_VQ),
    "libero_vq_extra_action_tokenizer": (True, LIBERO_VQ),
    "libero_vq_h0_extra_action_tokenizer": (True, LIBERO_VQ.replace("fach-7", "fach-0")),
    "bridge_vq_extra_action_tokenizer": (
        True,
        "pretrain_modvq+mx-bridge_dataset+fach-7+ng-7+nemb-256+nlatent-512",
    ),
}
# Native layers of encoder and decoder, and of each round's codebook the native name and the one here.
LAYERS = ("encoder.0", "encoder.2", "fc")
CODEBOOKS = {"embed": "codebooks", "embed_avg": "code_sums", "cluster_size": "code_counts"}
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 1e-4  # of the autoencoder's own training


class VQAutoencoder(NamedTuple):
    """A VQ autoencoder: its native config.json, the fields of ``OpenVLAConfig``, its tensors by their Hub names."""

    native_config: dict[str, Any]
    fields: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def find_vq_folder(folder: str | os.PathLike, action_tokenizer: str) -> Path:
    """Return the folder of an action tokenizer's autoencoder: the given one, or the one in it by its native name.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is the folder of another action tokenizer.
    """
    path, name = Path(folder), VQ_TOKENIZERS[action_tokenizer][1]
    if not (path / "config.json").is_file():
        path = path / name
    if not (path / VQ_FILE).is_file() or not (path / "config.json").is_file():
        raise OpenVLAFileNotFoundError(f"{folder} holds neither config.json with {VQ_FILE}, nor a folder {name} with.")
    if path.name != name and path.name in {other for _, other in VQ_TOKENIZERS.values()}:
        raise OpenVLAValueError(f"{action_tokenizer!r} takes the autoencoder {name}, got {path.name}: another one's.")
    return path


def read_vq(folder: Path) -> VQAutoencoder:
    """Read the folder of a VQ autoencoder; the state of its optimizer is left out.

    Raises:
        ValueError: The file is damaged, holds code, or its tensors do not fit config.json.
    """
    native, file = read_json(folder / "config.json"), folder / VQ_FILE
    require_intact(file)
    state = load_torch_file(file)
    try:
        sizes = {name: int(native[name]) for name in ("input_dim_h", "input_dim_w", "n_latent_dims", "vqvae_n_embed")}
        rounds, scale = int(native["vqvae_groups"]), float(native["act_scale"])
        tensors = {
            f"{VQ_MODULE}.{part}_{kind}_{index}": state[part].pop(f"{layer}.{kind}")
            for part in ("encoder", "decoder")
            for index, layer in enumerate(LAYERS)
            for kind in ("weight", "bias")
        }
        embedding = state["vq_embedding"]
        for native_name, name in CODEBOOKS.items():
            parts = [embedding.pop(f"layers.{index}._codebook.{native_name}")[0] for index in range(rounds)]
            tensors[f"{VQ_MODULE}.{name}"] = torch.stack(parts)
        trained = [bool(embedding.pop(f"layers.{index}._codebook.initted")) for index in range(rounds)]
        surplus = sorted(name for part in ("encoder", "decoder", "vq_embedding") for name in state[part])
    except (KeyError, TypeError, AttributeError) as error:
        raise OpenVLAValueError(f"{folder} is no VQ autoencoder of openvla-mini: it lacks {error}.") from error
    if surplus or not all(trained) or any(tensor.dtype != torch.float32 for tensor in tensors.values()):
        raise OpenVLAValueError(
            f"{file} is no trained float32 VQ autoencoder of openvla-mini; tensors that it does not have: {surplus}."
        )
    hidden = len(tensors[f"{VQ_MODULE}.decoder_bias_0"])
    vq: dict[str, float] = {
        "num_codes": sizes["vqvae_n_embed"],
        "num_rounds": rounds,
        "latent_dim": sizes["n_latent_dims"],
    }
    fields: dict[str, Any] = {"action_vq": {**vq, "hidden_dim": hidden, "act_scale": scale}}
    fields |= {"chunk_length": sizes["input_dim_h"], "action_dim": sizes["input_dim_w"]}
    return VQAutoencoder(native, fields, tensors)


def vq_tokenizer_name(config: OpenVLAConfig, is_extra: bool) -> str:
    """Return openvla-mini's name of a model's action tokenizer; ValueError where it has none."""
    vq = config.action_vq or {}
    for name, (uses_extra, folder) in VQ_TOKENIZERS.items():
        future, codes = (int(number) for number in re.findall(r"(?:fach|nemb)-(\d+)", folder))
        if (uses_extra, future + 1, codes) == (is_extra, config.chunk_length, vq.get("num_codes")):
            return name
    raise OpenVLAValueError(
        f"openvla-mini has no action tokenizer for chunks of {config.chunk_length} actions and {vq}; it has "
        f"{list(VQ_TOKENIZERS)}."
    )


def native_vq_config(
    *,
    action_dim: int,
    chunk_length: int,
    latent_dim: int,
    num_codes: int,
    num_rounds: int,
    act_scale: float,
    encoder_loss_multiplier: float = 1.0,
) -> dict[str, Any]:
    """Return the config.json of an autoencoder's folder, as openvla-mini writes it."""
    return {
        "input_dim_w": action_dim,
        "input_dim_h": chunk_length,
        "n_latent_dims": latent_dim,
        "vqvae_n_embed": num_codes,
        "vqvae_groups": num_rounds,
        **{"eval": False, "device": "cuda", "load_dir": None, "encoder_loss_multiplier": encoder_loss_multiplier},
        "act_scale": act_scale,
    }


def write_vq(folder: Path, action_tokenizer: str, hub: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write the folder of a VQ autoencoder, with the optimizer's state as at the start of a training.

    Args:
        folder: The native run; openvla-mini looks for ``vq/`` in the working directory.
        action_tokenizer: Native name of the action tokenizer.
        hub: The Hub folder.
        tensors: The autoencoder's tensors by their Hub names.

    Raises:
        ValueError: What was written does not equal ``tensors``.
    """
    config = OpenVLAConfig.from_dict(read_json(hub / "config.json"))
    vq, native_file = config.action_vq or {}, hub / NATIVE_VQ_CONFIG_FILE
    native = native_vq_config(
        action_dim=config.action_dim or 0,
        chunk_length=config.chunk_length,
        latent_dim=vq["latent_dim"],
        num_codes=vq["num_codes"],
        num_rounds=vq["num_rounds"],
        act_scale=vq["act_scale"],
    )
    state: dict[str, Any] = {
        part: {
            f"{layer}.{kind}": tensors[f"{VQ_MODULE}.{part}_{kind}_{index}"]
            for index, layer in enumerate(LAYERS)
            for kind in ("weight", "bias")
        }
        for part in ("encoder", "decoder")
    }
    parameters = [nn.Parameter(tensor) for part in ("encoder", "decoder") for tensor in state[part].values()]
    state["optimizer"] = torch.optim.Adam(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY).state_dict()
    state["vq_embedding"] = {}
    for index in range(vq["num_rounds"]):
        prefix = f"layers.{index}._codebook."
        state["vq_embedding"][f"{prefix}initted"] = torch.ones(1)
        for name in ("cluster_size", "embed_avg", "embed"):
            state["vq_embedding"][prefix + name] = tensors[f"{VQ_MODULE}.{CODEBOOKS[name]}"][index].clone()[None]
    target = folder / VQ_FOLDER / VQ_TOKENIZERS[action_tokenizer][1]
    (target / VQ_FILE).parent.mkdir(parents=True)
    write_json(target / "config.json", read_json(native_file) if native_file.is_file() else native)
    with DirectWriter(target / VQ_FILE) as file:  # torch.save calls only its write and flush
        torch.save(state, cast(IO[bytes], file))
    wrong = find_mismatches(tensors.items(), read_vq(target).tensors)
    if wrong:
        raise OpenVLAValueError(f"{target / VQ_FILE}: {wrong} differ from {hub}. The disk may be failing.")
