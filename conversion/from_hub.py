"""Convert a Hub folder of any age, or an OpenVLA-OFT run, to a Hub folder of today's layout."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from ..adapters.base_record import require_not_merged
from ..adapters.files import locate_base
from ..adapters.parallel_decoding import set_action_config
from ..compatibility_openvla import DTYPE_FIELD
from ..configuration_openvla import ACTION_CONFIG_FIELDS, OpenVLAConfig
from .download import local_folder
from .files import read_json
from .hub_folder import (
    GENERATION_FILE,
    current_config,
    require_matching_tensors,
    write_config_and_code,
    write_manifest,
)
from .hub_weights import has_safetensors, link_weights, read_pickled_weights, weight_files
from .oft_format import ADAPTER_FOLDER, part_files, read_action_config, read_parts, read_unmerged_adapter
from .options import DTYPES, ConvertedModel, ConvertOptions
from .processor_files import write_processor
from .safetensors_io import read_tensors, write_shards
from .tracevla_format import with_trace_prompting

logger = logging.getLogger(__name__)


def convert_hub_folder(source: Path, folder: Path, options: ConvertOptions) -> ConvertedModel:
    """Write a saved folder again with today's code and configuration, without its model card.

    OpenVLA-OFT's part files become part of the weights, and its unmerged adapter is merged into its base. Weights that
    need no change are linked, or copied and compared.

    Args:
        source: A folder of the published code or of any openvla.
        folder: An empty folder to write to.
        options: Options of the conversion.

    Raises:
        ValueError: The source is damaged, or does not fit its configuration.
        FileNotFoundError: There is no tokenizer.
    """
    adapter, base_folder = read_unmerged_adapter(source), source
    if adapter is not None:
        base_folder = local_folder(str(options.oft.base or locate_base(source / ADAPTER_FOLDER, {})[0]))
    fields = {**read_json(base_folder / "config.json"), **options.config_overrides}
    parts = {} if fields.get("parallel_decoding") else part_files(source, options.oft.step)
    if parts:
        fields = {name: value for name, value in fields.items() if name not in ACTION_CONFIG_FIELDS}
    files = weight_files(base_folder) if has_safetensors(base_folder) else {}
    tensors = dict(read_tensors(files)) if files else read_pickled_weights(base_folder)
    config = current_config(source, with_trace_prompting(fields, tensors))
    if adapter is not None:
        require_not_merged(adapter, tensors, source)
    tensors.update(read_parts(parts, next(iter(tensors.values())).dtype))
    if isinstance(config, OpenVLAConfig) and not config.parallel_decoding:
        action_config = read_action_config(tensors, options.config_overrides, options.oft, source)
        set_action_config(config, **action_config)
        if action_config and options.image_preset is None:
            logger.info("note: OFT's checkpoints were evaluated on frames prepared as --image-preset libero does")
    require_matching_tensors(tensors, config, source)
    write_processor(source, folder, config, options.tokenizer, options.image_preset)
    if options.dtype is None and files and not parts and adapter is None:
        digests = link_weights(source, folder, files)
    else:
        dtype = None if options.dtype is None else DTYPES[options.dtype]
        if dtype is not None:
            setattr(config, DTYPE_FIELD, dtype)
        change = adapter.merge_tensor if adapter else None
        digests = write_shards(folder, tensors, dtype, options.max_shard_bytes, change)
    if (source / GENERATION_FILE).is_file():
        shutil.copy(source / GENERATION_FILE, folder / GENERATION_FILE)
    write_config_and_code(folder, config)
    write_manifest(folder, digests)
    return ConvertedModel(tensors, config)
