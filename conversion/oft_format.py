"""OpenVLA-OFT's published layout: part files beside the model (``action_head--150000_checkpoint.pt``), in and out."""

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
from .safetensors_io import read_pickle
from .torch_archive import require_intact

TOWERS_PART = "vision_backbone"  # with FiLM the towers lie in a part of their own, with LoRA still beside their weights
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
    """Part files of a folder, by part.

    Args:
        folder: Where they lie.
        step: Which, where there are several: "150000" of ``action_head--150000_checkpoint.pt``.

    Raises:
        ValueError: There are several of one part, or none of that step.
    """
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.iterdir()):
        match = PART_FILE.fullmatch(path.name)
        if match:
            found.setdefault(match[1], {})[match[2]] = path
    chosen = {}
    for part, by_step in found.items():
        if step is None and len(by_step) > 1:
            raise OpenVLAValueError(
                f"{folder} holds several {part} files; pass --checkpoint, one of {sorted(by_step)}."
            )
        if step is not None and step not in by_step:
            raise OpenVLAValueError(f"{folder} holds no {part} of {step!r}; there is {sorted(by_step)}.")
        chosen[part] = by_step[step] if step is not None else next(iter(by_step.values()))
    return chosen


def read_parts(files: Mapping[str, Path], dtype: torch.dtype) -> Tensors:
    """Tensors of part files under the names of the whole model.

    Args:
        files: As :func:`part_files` gives them.
        dtype: Of the model; the reference casts the parts to it too.

    Raises:
        ValueError: A file is damaged or holds anything but tensors.
    """
    tensors = {}
    for part, file in files.items():
        require_intact(file)
        content = {name.removeprefix(DDP_PREFIX): tensor for name, tensor in read_pickle(file).items()}
        if part == TOWERS_PART:
            tensors.update({name: tensor.to(dtype) for name, tensor in _towers(content, file).items()})
        else:
            tensors.update({f"{part}.{name}": tensor.to(dtype) for name, tensor in content.items()})
    return tensors


def _towers(content: Mapping[str, torch.Tensor], file: Path) -> Tensors:
    """The towers of FiLM's part file, LoRA merged into their weights in float32."""
    matrices = {name.removesuffix(end) for name in content for end in MATRICES if name.endswith(end)}
    tensors = {}
    for name, tensor in content.items():
        if name.endswith(MATRICES):
            continue
        module = name.removesuffix(".base_layer.weight")
        if module in matrices:
            down, up = (content[module + end].float() for end in MATRICES)
            lora = LoraAdapter(len(down), min(len(down), MAX_ALPHA))
            tensor = tensor.float() + lora.scaling * (up @ down)
        tensors[FILM_BLOCK.sub(r"\1.", name.replace(".base_layer.", "."))] = tensor
    if not any(name.startswith(f"{TOWERS_PART}.") for name in tensors):
        raise OpenVLAValueError(f"{file} holds no towers: {list(content)[:3]}.")
    return tensors


def read_answer(
    tensors: Mapping[str, torch.Tensor],
    overrides: Mapping[str, Any],
    *,
    preset: str | None = None,
    num_images: int | None = None,
    parallel_decoding: bool = False,
    source: Path,
) -> dict[str, Any] | None:
    """How a model answers, from its tensors' shapes, the preset and what else was given; None for plain OpenVLA.

    Args:
        tensors: Of the whole model.
        overrides: Fields given by --config-overrides.
        preset: A key of ``PLATFORMS``.
        num_images: Cameras.
        parallel_decoding: Whether a model without a head answers in parallel.
        source: Where from, for error messages.

    Returns:
        Fields for ``OpenVLAConfig.set_action_config``.

    Raises:
        ValueError: Something is not known, or the preset contradicts the shapes.
    """
    seen = _seen(tensors)
    if not (seen or parallel_decoding or overrides.get("parallel_decoding")):
        if preset or num_images:
            raise OpenVLAValueError(
                f"{source} holds no part files of OFT; --preset and --num-images are for those, or pass "
                "--parallel-decoding for a model that answers a chunk of tokens in parallel."
            )
        return None
    if preset is not None and preset not in PLATFORMS:
        raise OpenVLAValueError(f"Unknown preset {preset!r}; allowed: {list(PLATFORMS)}.")
    given = {**PLATFORMS.get(preset, {}), **{n: v for n, v in overrides.items() if n in ACTION_CONFIG_FIELDS}}
    if num_images is not None:
        given["num_images_in_input"] = num_images
    wrong = [
        f"{name} {given[name]} ({seen[name]} in the files)"
        for name in ("action_dim", "proprio_dim")
        if name in seen and given.get(name, seen[name]) != seen[name]
    ]
    if wrong:
        raise OpenVLAValueError(f"{source} contradicts --preset {preset} or the overrides: {', '.join(wrong)}.")
    if "proprio_dim" not in seen:
        given.pop("proprio_dim", None)  # a preset's; this model was trained without
    answer = {"parallel_decoding": True, **given, **seen}
    missing = [n for n in ("action_dim", "chunk_length", "normalization", "num_images_in_input") if n not in answer]
    if missing:
        ask = ["--num-images N (cameras it was trained on)"] if "num_images_in_input" in missing else []
        ask += [f"--preset ({', '.join(PLATFORMS)})"] if {*missing} - {"num_images_in_input"} else []
        raise OpenVLAValueError(
            f"{source} does not say {', '.join(missing)}; pass {' and '.join(ask)}, or give them by --config-overrides."
        )
    return answer


def _seen(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """What the shapes of heads and FiLM say."""
    seen: dict[str, Any] = {}
    for head, output in (("l1", "model.fc2"), ("diffusion", "noise_predictor.mlp_resnet.fc2")):
        weight = tensors.get(f"action_head.{output}.weight")
        if weight is not None:
            seen.update(action_head=head, action_dim=weight.shape[0])
    if "proprio_projector.fc1.weight" in tensors:
        seen["proprio_dim"] = tensors["proprio_projector.fc1.weight"].shape[1]
    if any(FILM_LAYER.match(name) for name in tensors):
        seen["use_film"] = True
    return seen


def write_parts(folder: Path, tensors: Mapping[str, torch.Tensor], config: OpenVLAConfig) -> None:
    """Write heads and, with FiLM, the towers as the reference reads them: with LoRA matrices, which are zero."""
    for part in HEAD_MODULES:
        content = {n.removeprefix(f"{part}."): t.clone() for n, t in tensors.items() if n.startswith(f"{part}.")}
        if content:
            torch.save(content, folder / WRITTEN_PART.format(part))
    if config.use_film:
        towers = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{TOWERS_PART}.")}
        torch.save(_film_part(towers), folder / WRITTEN_PART.format(TOWERS_PART))


def _film_part(towers: Mapping[str, torch.Tensor]) -> Tensors:
    """The inverse of :func:`_towers`: every linear layer of the towers has matrices, but FiLM's have none."""
    linear = {
        name.removesuffix(".weight")
        for name, tensor in towers.items()
        if name.endswith(".weight") and tensor.ndim == 2 and not is_action_head_param(name)
    }
    part = {}
    for name, tensor in towers.items():
        old = PLAIN_BLOCK.sub(r"\1.block.", name)
        module, _, leaf = old.rpartition(".")
        if name.rpartition(".")[0] not in linear:
            part[old] = tensor.clone()
            continue
        part[f"{module}.base_layer.{leaf}"] = tensor.clone()
        if leaf == "weight":
            down, up = (LORA_RANK, tensor.shape[1]), (tensor.shape[0], LORA_RANK)
            part.update({module + end: tensor.new_zeros(shape) for end, shape in zip(MATRICES, (down, up))})
    return part


def unmerged_adapter(folder: Path) -> LoraAdapter | None:
    """The adapter of a run that did not merge it into a whole model; None for a folder of whole weights."""
    if (folder / "config.json").is_file() or not (folder / ADAPTER_FOLDER).is_dir():
        return None
    adapter = read_adapter(folder / ADAPTER_FOLDER)
    # With FiLM the towers' matrices, under other names here, are in the towers' part file.
    own = {name: tensor for name, tensor in adapter.tensors.items() if not name.startswith(f"{TOWERS_PART}." * 2)}
    return replace(adapter, tensors=own)
