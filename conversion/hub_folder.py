"""The files of a Hub folder beside its weights: configuration, code, statistics, model card, manifest."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from ..configuration_openvla import OpenVLAConfig, PrismaticConfig, write_json
from ..errors_openvla import OpenVLAValueError
from ..loading import MODEL_CLASSES
from ..modeling_openvla import STATISTICS_FILE
from ..prismatic_openvla import PrismaticForConditionalGeneration
from ..publishing_openvla import mark_code
from .files import file_digest, read_json
from .hub_upload import CARD_FILE, model_card
from .hub_weights import weight_files

MANIFEST_FILE = "openvla_manifest.json"
GENERATION_FILE = "generation_config.json"


def current_config(folder: Path, fields: Mapping[str, Any]) -> PrismaticConfig:
    """Return the configuration of a saved folder in today's form.

    Args:
        folder: The saved folder; its dataset_statistics.json is merged in.
        fields: The fields of its config.json.
    """
    config = MODEL_CLASSES[fields["model_type"]].config_class.from_dict(dict(fields))
    if isinstance(config, OpenVLAConfig) and (folder / STATISTICS_FILE).is_file():
        config.merge_statistics(read_json(folder / STATISTICS_FILE))
    return config


def model_shapes(config: PrismaticConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a model of this configuration."""
    model_class: type[PrismaticForConditionalGeneration] = MODEL_CLASSES[config.model_type]
    with torch.device("meta"):
        model = model_class(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def require_matching_shapes(shapes: Mapping[str, tuple[int, ...]], config: PrismaticConfig, source: Path) -> None:
    """Raise ValueError, naming every tensor, unless a model of this configuration has exactly these tensors.

    Args:
        shapes: Shape of every tensor.
        config: The model's configuration.
        source: Where the tensors come from, for the message.
    """
    expected = model_shapes(config)
    if config.tie_word_embeddings and "language_model.lm_head.weight" not in shapes:
        expected.pop("language_model.lm_head.weight", None)
    problems = {
        "missing": sorted(set(expected) - set(shapes)),
        "surplus": sorted(set(shapes) - set(expected)),
        "of another shape": sorted(
            f"{name} {shapes[name]}, expected {expected[name]}"
            for name in set(shapes) & set(expected)
            if shapes[name] != expected[name]
        ),
    }
    lines = [f"{len(names)} {problem}: {names}" for problem, names in problems.items() if names]
    if lines:
        raise OpenVLAValueError(f"{source} does not fit its configuration. Tensors " + "; ".join(lines) + ".")


def require_matching_tensors(tensors: Mapping[str, torch.Tensor], config: PrismaticConfig, source: Path) -> None:
    """Raise ValueError as :func:`require_matching_shapes` does, for tensors."""
    require_matching_shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()}, config, source)


def write_config_and_code(folder: Path, config: PrismaticConfig) -> None:
    """Write configuration, code and statistics; an existing generation_config.json is kept."""
    config.architectures = [MODEL_CLASSES[config.model_type].__name__]
    config.save_pretrained(folder)
    text_config = config.text_config
    if not (folder / GENERATION_FILE).is_file():
        GenerationConfig(
            bos_token_id=text_config.bos_token_id,
            eos_token_id=text_config.eos_token_id,
            pad_token_id=config.pad_token_id,
        ).save_pretrained(folder)
    for code in sorted(Path(__file__).parents[1].glob("*_openvla.py")):
        shutil.copy(code, folder / code.name)
    mark_code(folder)
    if getattr(config, "norm_stats", None):
        write_json(folder / STATISTICS_FILE, config.norm_stats)


def write_card(folder: Path, name: str) -> None:
    """Write the model card from config.json.

    Args:
        folder: The Hub folder.
        name: The model's name, the card's heading.
    """
    (folder / CARD_FILE).write_text(model_card(read_json(folder / "config.json"), name), encoding="utf-8")


def write_manifest(folder: Path, digests: Mapping[str, str]) -> None:
    """Write the manifest that ``openvla verify`` checks: the sha256 of every tensor and of every other file.

    The model card is left out, since people edit it.

    Args:
        folder: The Hub folder.
        digests: The sha256 of every tensor's bytes.
    """
    weights = {path.name for path in weight_files(folder).values()}
    other_files = sorted(path for path in folder.iterdir() if path.name not in {*weights, CARD_FILE})
    files = {path.name: file_digest(path) for path in other_files}
    write_json(folder / MANIFEST_FILE, {"files": files, "tensors": dict(digests)})
