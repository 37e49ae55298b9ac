"""Convert a native Prismatic run to a Hub folder."""

from __future__ import annotations

import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..compatibility_openvla import DTYPE_FIELD
from ..configuration_openvla import write_json
from ..default_processor import default_processor
from ..errors_openvla import OpenVLAValueError
from .hub_folder import require_matching_tensors, write_config_and_code, write_manifest
from .minivla_format import image_preset_of, set_vocabulary, vq_tokenizer
from .options import DTYPES, ConvertedModel, ConvertOptions
from .prismatic_format import native_config, native_tensors, to_hub_name, without_tied_head
from .processor_files import load_tokenizer
from .safetensors_io import write_shards
from .torch_archive import require_intact
from .vq_format import NATIVE_VQ_CONFIG_FILE, VQ_TOKENIZERS, VQAutoencoder, find_vq_folder, read_vq

logger = logging.getLogger(__name__)

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
    vq = _read_vq(source, options)
    config = native_config(source, state, options.config_overrides, None if vq is None else vq.fields)
    tensors = without_tied_head({to_hub_name(name, config): tensor for name, tensor in state.items()}, config)
    tensors |= {} if vq is None else vq.tensors
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
    if vq is not None:
        write_json(folder / NATIVE_VQ_CONFIG_FILE, vq.native_config)
    processor.image_preset = options.image_preset or image_preset_of(source)
    if processor.image_preset is not None and options.image_preset is None:
        logger.info(
            f"note: the folder prepares frames as openvla-mini's evaluation of such a run did, --image-preset "
            f"{processor.image_preset}; give another one (or none) where frames are prepared otherwise"
        )
    processor.save_pretrained(folder)
    write_config_and_code(folder, config)
    write_manifest(folder, digests)
    return ConvertedModel(tensors, config)


def _read_vq(source: Path, options: ConvertOptions) -> VQAutoencoder | None:
    """Return the VQ autoencoder whose codes a run's action tokens are; None for bins."""
    name = vq_tokenizer(source)
    if name is None and options.vq is not None:
        raise OpenVLAValueError(f"{source}: its action tokens are bins, so --vq has no effect; leave it out.")
    if name is not None and options.vq is None:
        raise OpenVLAValueError(
            f"{source} was trained with the action tokenizer {name!r}, whose tokens are codes of a vector-quantised "
            f"autoencoder that the run does not hold. Give its folder, {VQ_TOKENIZERS[name][1]}, by --vq DIR_OR_ID "
            f"(published: --vq Stanford-ILIAD/pretrain_vq/{VQ_TOKENIZERS[name][1]})."
        )
    return None if name is None or options.vq is None else read_vq(find_vq_folder(options.vq, name))
