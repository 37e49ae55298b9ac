"""Convert a Hub folder back to the layout of the code that trained it: a native Prismatic run or an OpenVLA-OFT run."""

from __future__ import annotations

from pathlib import Path
from typing import IO, cast

import torch

from ..configuration_openvla import ACTION_CONFIG_FIELDS, OpenVLAConfig, write_json
from ..errors_openvla import OpenVLAValueError
from ..heads_openvla import is_action_head_param
from ..loading import MODEL_CLASSES
from ..modeling_openvla import STATISTICS_FILE
from ..processing_openvla import OpenVLAProcessor
from ..vq_openvla import VQ_MODULE
from .direct_io import DirectWriter
from .files import read_json
from .from_native import NATIVE_CONFIG_FILE
from .hub_folder import require_matching_shapes, require_matching_tensors, write_config_and_code
from .hub_weights import weight_files
from .oft_format import part_files, read_parts, write_parts
from .options import DEFAULT_SHARD_SIZE, ConvertedModel
from .prismatic_format import (
    CHECKPOINT_FILE,
    CHECKPOINT_FOLDER,
    native_run_config,
    native_state,
    native_tensors,
    to_hub_name,
    to_native_name,
)
from .safetensors_io import find_mismatches, parse_size, read_tensors, tensor_shapes, write_shards
from .vq_format import write_vq


def reverse_convert(source: Path, folder: Path) -> ConvertedModel:
    """Write a Hub folder as an OpenVLA-OFT run if it decodes in parallel, else as a native run.

    Args:
        source: The Hub folder.
        folder: An empty folder to write to.

    Raises:
        ValueError: The source does not fit its configuration or has no counterpart in the other layout, or what was
            written does not equal it.
    """
    if read_json(source / "config.json").get("parallel_decoding"):
        return _write_oft_run(source, folder)
    return _write_native_run(source, folder)


def _write_native_run(source: Path, folder: Path) -> ConvertedModel:
    fields = read_json(source / "config.json")
    config = MODEL_CLASSES[fields["model_type"]].config_class.from_dict(fields)
    files = weight_files(source)
    require_matching_shapes(tensor_shapes(files), config, source)
    native_config_file = source / NATIVE_CONFIG_FILE
    write_json(
        folder / "config.json",
        read_json(native_config_file) if native_config_file.is_file() else native_run_config(config),
    )
    if isinstance(config, OpenVLAConfig):
        write_json(folder / STATISTICS_FILE, config.norm_stats or {})
    (folder / CHECKPOINT_FOLDER).mkdir()
    checkpoint = folder / CHECKPOINT_FOLDER / CHECKPOINT_FILE
    vq_tensors = {name: tensor for name, tensor in read_tensors(files) if name.startswith(f"{VQ_MODULE}.")}
    with DirectWriter(checkpoint) as file:  # torch.save calls only its write and flush
        others = ((name, tensor) for name, tensor in read_tensors(files) if name not in vq_tensors)
        torch.save(native_state(others, config), cast(IO[bytes], file))
    if vq_tensors:
        write_vq(folder, read_json(folder / "config.json")["vla"]["action_tokenizer"], source, vq_tensors)
    tensors = vq_tensors | {to_hub_name(name, config): tensor for name, tensor in native_tensors(checkpoint).items()}
    wrong = find_mismatches(read_tensors(files), tensors)
    if wrong:
        native_names = [to_native_name(name, config) for name in wrong]
        raise OpenVLAValueError(
            f"{checkpoint}: {native_names} do not equal {wrong} of {source}. The disk may be failing."
        )
    return ConvertedModel(tensors, config)


def _write_oft_run(source: Path, folder: Path) -> ConvertedModel:
    """Write the model and its part files into one folder, as the reference does."""
    fields = read_json(source / "config.json")
    config = OpenVLAConfig.from_dict(fields)
    tensors = dict(read_tensors(weight_files(source)))
    require_matching_tensors(tensors, config, source)
    model_tensors = {name: tensor for name, tensor in tensors.items() if not is_action_head_param(name)}
    write_shards(folder, model_tensors, None, parse_size(DEFAULT_SHARD_SIZE))
    write_parts(folder, tensors, config)
    parts = read_parts(part_files(folder), next(iter(tensors.values())).dtype)
    wrong = find_mismatches(parts.items(), tensors)
    if wrong:
        raise OpenVLAValueError(f"{folder}: {wrong} differ from {source}. The disk may be failing.")
    plain_fields = {name: value for name, value in fields.items() if name not in ACTION_CONFIG_FIELDS}
    OpenVLAProcessor.from_pretrained(source).save_pretrained(folder)
    write_config_and_code(folder, OpenVLAConfig.from_dict(plain_fields))
    return ConvertedModel({**dict(read_tensors(weight_files(folder))), **parts}, config)
