"""Read and write OpenVLA-OFT's layout: a Hub folder with part files such as ``action_head--150000_checkpoint.pt``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..adapters.files import LoraAdapter, read_adapter
from ..configuration_openvla import ACTION_CONFIG_FIELDS, PLATFORMS, OpenVLAConfig
from ..errors_openvla import OpenVLAValueError
from ..heads_openvla import FILM_LAYER, HEAD_MODULES, is_action_head_param
from .options import OftOptions
from .torch_archive import load_state_dict, require_intact

TOWERS_PART = "vision_backbone"  # with FiLM the towers have a part file of their own, with LoRA matrices not merged
PARTS = (*HEAD_MODULES, TOWERS_PART)
PART_FILE = re.compile(rf"({'|'.join(PARTS)})--(\w+)_checkpoint\.pt")
WRITTEN_PART = "{}--latest_checkpoint.pt"
ADAPTER_FOLDER = "lora_adapter"
DDP_PREFIX = "module."
FILM_BLOCK = re.compile(r"(featurizer\.blocks\.\d+)\.block\.")
PLAIN_BLOCK = re.compile(r"(featurizer\.blocks\.\d+)\.(?!scale\.|shift\.)")
LORA_RANK, MAX_ALPHA = 32, 16  # the reference's default rank; its alpha is the rank, at most 16
MATRICES = (".lora_A.default.weight", ".lora_B.default.weight")

Tensors = dict[str, torch.Tensor]


def part_files(folder: Path, step: str | None = None) -> dict[str, Path]:
    """Return the part files of a folder, by part.

    Args:
        folder: Where they are.
        step: Training step, where there are several: "150000" for ``action_head--150000_checkpoint.pt``.

    Raises:
        ValueError: There are several files of one part, or none of that step.
    """
    files: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.iterdir()):
        match = PART_FILE.fullmatch(path.name)
        if match:
            files.setdefault(match[1], {})[match[2]] = path
    chosen = {}
    for part, by_step in files.items():
        if step is None and len(by_step) > 1:
            raise OpenVLAValueError(
                f"{folder} holds several {part} files; pass --checkpoint, one of {sorted(by_step)}."
            )
        if step is not None and step not in by_step:
            raise OpenVLAValueError(f"{folder} holds no {part} of {step!r}; there is {sorted(by_step)}.")
        chosen[part] = by_step[step] if step is not None else next(iter(by_step.values()))
    return chosen


def read_parts(files: Mapping[str, Path], dtype: torch.dtype) -> Tensors:
    """Read the tensors of part files, under their names in the whole model.

    Args:
        files: The part files (:func:`part_files`).
        dtype: The model's; the reference casts the parts to it too.

    Raises:
        ValueError: A file is damaged or holds anything but tensors.
    """
    tensors = {}
    for part, file in files.items():
        require_intact(file)
        state = {name.removeprefix(DDP_PREFIX): tensor for name, tensor in load_state_dict(file).items()}
        if part == TOWERS_PART:
            tensors.update({name: tensor.to(dtype) for name, tensor in _merge_towers(state, file).items()})
        else:
            tensors.update({f"{part}.{name}": tensor.to(dtype) for name, tensor in state.items()})
    return tensors


def _merge_towers(state: Mapping[str, torch.Tensor], file: Path) -> Tensors:
    """Return the towers of FiLM's part file with LoRA merged into their weights in float32."""
    adapted = {name.removesuffix(end) for name in state for end in MATRICES if name.endswith(end)}
    tensors = {}
    for name, tensor in state.items():
        if name.endswith(MATRICES):
            continue
        module = name.removesuffix(".base_layer.weight")
        if module in adapted:
            down, up = (state[module + end].float() for end in MATRICES)
            lora = LoraAdapter(len(down), min(len(down), MAX_ALPHA))
            tensor = tensor.float() + lora.scaling * (up @ down)
        tensors[FILM_BLOCK.sub(r"\1.", name.replace(".base_layer.", "."))] = tensor
    if not any(name.startswith(f"{TOWERS_PART}.") for name in tensors):
        raise OpenVLAValueError(f"{file} holds no towers: {list(state)[:3]}.")
    return tensors


def read_action_config(
    tensors: Mapping[str, torch.Tensor], overrides: Mapping[str, Any], options: OftOptions, source: Path
) -> dict[str, Any]:
    """Return how a model predicts actions: the fields ``ACTION_CONFIG_FIELDS`` of its configuration.

    They follow from the tensors' shapes, the preset, and the overrides.

    Args:
        tensors: Tensors of the whole model.
        overrides: Fields that replace those of the preset (--config-overrides).
        options: Options of OpenVLA-OFT.
        source: The checkpoint, for messages.

    Returns:
        The fields; none for a plain OpenVLA, which predicts one action in tokens.

    Raises:
        ValueError: A field is unknown, or the preset contradicts the shapes.
    """
    from_shapes = _action_config_from_shapes(tensors)
    if not (from_shapes or options.parallel_decoding or overrides.get("parallel_decoding")):
        if options.preset or options.num_images:
            raise OpenVLAValueError(
                f"{source} holds no part files of OFT; --preset and --num-images are for those, or pass "
                "--parallel-decoding for a model that predicts a chunk of tokens in parallel."
            )
        return {}
    if options.preset is not None and options.preset not in PLATFORMS:
        raise OpenVLAValueError(f"Unknown preset {options.preset!r}; allowed: {list(PLATFORMS)}.")
    fields = dict(PLATFORMS[options.preset]) if options.preset is not None else {}
    fields |= {name: value for name, value in overrides.items() if name in ACTION_CONFIG_FIELDS}
    if options.num_images is not None:
        fields["num_images_in_input"] = options.num_images
    wrong = [
        f"{name} {fields[name]} ({from_shapes[name]} in the files)"
        for name in ("action_dim", "proprio_dim")
        if name in from_shapes and fields.get(name, from_shapes[name]) != from_shapes[name]
    ]
    if wrong:
        raise OpenVLAValueError(f"{source} contradicts --preset {options.preset} or the overrides: {', '.join(wrong)}.")
    if "proprio_dim" not in from_shapes:
        fields.pop("proprio_dim", None)  # the preset's, but this model was trained without proprio
    fields = {"parallel_decoding": True, **fields, **from_shapes}
    missing = [n for n in ("action_dim", "chunk_length", "normalization", "num_images_in_input") if n not in fields]
    if missing:
        needed = ["--num-images N (cameras it was trained on)"] if "num_images_in_input" in missing else []
        needed += [f"--preset ({', '.join(PLATFORMS)})"] if {*missing} - {"num_images_in_input"} else []
        raise OpenVLAValueError(
            f"{source} does not say {', '.join(missing)}; pass {' and '.join(needed)}, or give them by "
            "--config-overrides."
        )
    return fields


def _action_config_from_shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return the fields that the tensors of heads and FiLM show."""
    fields: dict[str, Any] = {}
    for head, output in (("l1", "model.fc2"), ("diffusion", "noise_predictor.mlp_resnet.fc2")):
        weight = tensors.get(f"action_head.{output}.weight")
        if weight is not None:
            fields.update(action_head=head, action_dim=weight.shape[0])
    if "proprio_projector.fc1.weight" in tensors:
        fields["proprio_dim"] = tensors["proprio_projector.fc1.weight"].shape[1]
    if any(FILM_LAYER.match(name) for name in tensors):
        fields["use_film"] = True
    return fields


def write_parts(folder: Path, tensors: Mapping[str, torch.Tensor], config: OpenVLAConfig) -> None:
    """Write part files as the reference reads them; with FiLM also the towers, with LoRA matrices of zeros."""
    for part in HEAD_MODULES:
        prefix = f"{part}."
        state = {name.removeprefix(prefix): t.clone() for name, t in tensors.items() if name.startswith(prefix)}
        if state:
            torch.save(state, folder / WRITTEN_PART.format(part))
    if config.use_film:
        towers = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{TOWERS_PART}.")}
        torch.save(_split_towers(towers), folder / WRITTEN_PART.format(TOWERS_PART))


def _split_towers(towers: Mapping[str, torch.Tensor]) -> Tensors:
    """Invert :func:`_merge_towers`: give every linear layer of the towers, except FiLM's, LoRA matrices of zeros."""
    linear = {
        name.removesuffix(".weight")
        for name, tensor in towers.items()
        if name.endswith(".weight") and tensor.ndim == 2 and not is_action_head_param(name)
    }
    state = {}
    for name, tensor in towers.items():
        reference_name = PLAIN_BLOCK.sub(r"\1.block.", name)
        module, _, leaf = reference_name.rpartition(".")
        if name.rpartition(".")[0] not in linear:
            state[reference_name] = tensor.clone()
            continue
        state[f"{module}.base_layer.{leaf}"] = tensor.clone()
        if leaf == "weight":
            down_shape, up_shape = (LORA_RANK, tensor.shape[1]), (tensor.shape[0], LORA_RANK)
            state.update(
                {module + end: tensor.new_zeros(shape) for end, shape in zip(MATRICES, (down_shape, up_shape))}
            )
    return state


def read_unmerged_adapter(folder: Path) -> LoraAdapter | None:
    """Read the adapter of a run that holds no whole model; return None for a folder of whole weights."""
    if (folder / "config.json").is_file() or not (folder / ADAPTER_FOLDER).is_dir():
        return None
    adapter = read_adapter(folder / ADAPTER_FOLDER)
    # With FiLM the adapter holds the towers' matrices too, under other names; they are in the towers' part file.
    duplicates = f"{TOWERS_PART}." * 2
    tensors = {name: tensor for name, tensor in adapter.tensors.items() if not name.startswith(duplicates)}
    return replace(adapter, tensors=tensors)
