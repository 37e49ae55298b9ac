"""Convert a native Prismatic run to a Hub folder."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..compatibility_openvla import DTYPE_FIELD
from ..default_processor import default_processor
from .hub_folder import require_matching_tensors, write_config_and_code, write_manifest
from .minivla_format import set_vocabulary
from .options import DTYPES, ConvertedModel, ConvertOptions
from .prismatic_format import native_config, native_tensors, to_hub_name, without_tied_head
from .processor_files import load_tokenizer
from .safetensors_io import write_shards
from .torch_archive import require_intact

NATIVE_CONFIG_FILE = "native_config.json"  # the run's config.json, kept for the reverse conversion


def convert_native_run(source: Path, checkpoint: Path, folder: Path, options: ConvertOptions) -> ConvertedModel:
    """Write a native run as a Hub folder, without its model card.

    Args:
        source: The run.
        checkpoint: The file in its checkpoints/ to convert.
        folder: An empty folder to write to.
        options: Options of the conversion; those of OpenVLA-OFT do not apply.

    Raises:
        ValueError: The run is damaged, holds code, or does not fit its configuration.
        FileNotFoundError: There is no tokenizer, or the run is incomplete.
    """
    state = native_tensors(checkpoint)
    config = native_config(source, state, options.config_overrides)
    tensors = without_tied_head({to_hub_name(name, config): tensor for name, tensor in state.items()}, config)
    require_matching_tensors(tensors, config, checkpoint)
    tokenizer = load_tokenizer(source, options.tokenizer, config)
    set_vocabulary(source, config, tokenizer)
    processor = default_processor(config, tokenizer)
    dtype = DTYPES[options.dtype or "bf16"]
    setattr(config, DTYPE_FIELD, dtype)
    with ThreadPoolExecutor(max_workers=1) as executor:
        intact = executor.submit(require_intact, checkpoint)
        digests = write_shards(folder, tensors, dtype, options.max_shard_bytes)
        intact.result()
    shutil.copy(source / "config.json", folder / NATIVE_CONFIG_FILE)
    processor.image_preset = options.image_preset
    processor.save_pretrained(folder)
    write_config_and_code(folder, config)
    write_manifest(folder, digests)
    return ConvertedModel(tensors, config)
