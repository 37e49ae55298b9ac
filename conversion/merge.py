"""``openvla merge``: merge an adapter (LoRA) into its base, one tensor at a time, as a self-contained Hub folder.

Each adapted weight becomes W + alpha / r * B A, in float32 and rounded once to the dtype of W; all other tensors keep
their bytes. The adapter must have been trained on this very base. The target appears under its name only when it is
complete.

Examples:
  openvla merge my-adapter my-openvla
  openvla merge my-adapter my-openvla --base /data/openvla-7b
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ..adapters.base_record import (
    config_digest,
    quantized_merge_note,
    require_not_merged,
    require_same_base,
    weights_digest,
)
from ..adapters.files import BaseRecord, LoraAdapter, find_beside_or_above, locate_base, read_adapter
from ..adapters.parallel_decoding import set_action_config
from ..configuration_openvla import OpenVLAConfig, optional_file
from ..errors_openvla import OpenVLAValueError
from ..heads_openvla import is_action_head_param
from ..modeling_openvla import STATISTICS_FILE
from ..parallel_openvla import refuse_loose_parts
from ..processing_openvla import OpenVLAProcessor
from .console import printed_logs
from .download import local_folder
from .files import atomic_directory, read_json, require_absent
from .hub_folder import model_shapes, write_card, write_config_and_code, write_manifest
from .hub_weights import weight_files
from .options import DEFAULT_SHARD_SIZE
from .processor_files import copy_tokenizer_files, has_tokenizer
from .safetensors_io import parse_size, read_tensors, write_shards

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``openvla merge``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("adapter", metavar="ADAPTER", help="adapter folder or Hub id")
    parser.add_argument("target", type=Path, metavar="OUT", help="folder to write; must not exist without --overwrite")
    parser.add_argument("--base", metavar="DIR_OR_ID", help="the base; default the one that the adapter names")
    parser.add_argument(
        "--statistics",
        metavar="FILE",
        help="dataset_statistics.json of its robot; default the one beside the adapter or in the folder above",
    )
    parser.add_argument(
        "--max-shard-size",
        default=DEFAULT_SHARD_SIZE,
        help="size of a weight file, such as 5GB or 500MB (default %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")


def run(args: argparse.Namespace) -> int:
    """Merge, print the progress, and return the exit status."""
    with printed_logs():
        merge(
            args.adapter,
            args.target,
            base=args.base,
            statistics=args.statistics,
            max_shard_size=args.max_shard_size,
            overwrite=args.overwrite,
        )
    return 0


def merge(
    adapter: str | os.PathLike,
    target: str | os.PathLike,
    *,
    base: str | os.PathLike | None = None,
    statistics: str | os.PathLike | None = None,
    max_shard_size: str = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
) -> None:
    """Merge an adapter into its base; neither is changed.

    Args:
        adapter: Folder or Hub id.
        target: Folder to write.
        base: Folder or Hub id of the base; None takes the one that the adapter names.
        statistics: A dataset_statistics.json of the adapter's robot; None takes the one beside the adapter, or in the
            folder above, where the published scripts leave it.
        max_shard_size: Size of a weight file, such as "5GB".
        overwrite: Replace ``target``.

    Raises:
        ValueError: The adapter was trained on another base, does not fit it, is merged into it already, or has
            OpenVLA-OFT's part files in the folder above; or the base is quantised.
        FileExistsError: The target exists and ``overwrite`` is False.
        FileNotFoundError: There is no adapter, or no base.
    """
    target = Path(target)
    require_absent(target, overwrite)
    lora = read_adapter(adapter)
    source, revision = (str(base), None) if base else locate_base(adapter, {})
    folder = local_folder(source, revision=revision)
    fields = read_json(folder / "config.json")
    if fields.get("quantization_config"):
        raise OpenVLAValueError(f"{source} is quantised; give the plain checkpoint that it was made from with --base.")
    config = OpenVLAConfig.from_dict(fields)
    tensors = dict(read_tensors(weight_files(folder)))
    _require_base(lora, adapter, source, revision, config, tensors)
    if lora.action_config is not None and not config.parallel_decoding:
        set_action_config(config, **lora.action_config)
        tensors.update(_trained_heads(lora, config, next(iter(tensors.values())).dtype))
    if (lora.action_config or config.action_config) != config.action_config:
        raise OpenVLAValueError(f"{adapter} predicts as {lora.action_config}, {source} as {config.action_config}.")
    missing = sorted({*(f"{name}.weight" for name in lora.target_modules), *lora.full_tensors} - set(tensors))
    if missing:
        raise OpenVLAValueError(
            f"{adapter} does not fit {source}, which lacks {len(missing)} of its tensors: {missing[:3]}."
        )
    if lora.base and lora.base.get("quantization"):
        logger.warning(quantized_merge_note(lora.base))
    _merge_statistics(config, adapter, folder, statistics, target)
    if lora.default_unnorm_key in (config.norm_stats or {}):
        config.default_unnorm_key = lora.default_unnorm_key
    with atomic_directory(target) as written:
        digests = write_shards(written, tensors, None, parse_size(max_shard_size), lora.merge_tensor)
        _write_processor(written, [Path(adapter), folder], config)
        write_config_and_code(written, config)
        write_card(written, target.name)
        write_manifest(written, digests)
    logger.info(
        f"{target}: complete, {len(lora.target_modules)} adapted weights in float32 rounded once, "
        "read back and compared"
    )


def _require_base(
    lora: LoraAdapter,
    adapter: str | os.PathLike,
    source: str,
    revision: str | None,
    config: OpenVLAConfig,
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """Raise ValueError if the adapter was trained on another base, or is merged into this one already."""
    weights = weights_digest(tensors.items(), config)
    record = BaseRecord(id=source, revision=revision, config=config_digest(config), weights=weights, quantization=None)
    require_same_base(lora.base, record, adapter)
    if lora.base is None:
        require_not_merged(lora, tensors, adapter)
        if os.path.isdir(adapter):
            refuse_loose_parts(Path(os.path.abspath(adapter)).parent, {})


def _trained_heads(lora: LoraAdapter, config: OpenVLAConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the heads and FiLM layers that an adapter with parallel decoding adds to its base.

    FiLM layers of blocks that never run were not trained; they are zero, as initialized.
    """
    return {
        name: lora.tensors[name].to(dtype) if name in lora.tensors else torch.zeros(shape, dtype=dtype)
        for name, shape in model_shapes(config).items()
        if is_action_head_param(name)
    }


def _merge_statistics(
    config: OpenVLAConfig,
    adapter: str | os.PathLike,
    base_folder: Path,
    statistics: str | os.PathLike | None,
    target: Path,
) -> None:
    """Merge the statistics of the base's folder and of the adapter into the configuration."""
    adapter_file = statistics or find_beside_or_above(adapter, STATISTICS_FILE)
    if adapter_file is None:
        logger.warning(
            f"{adapter} brings no {STATISTICS_FILE}: {target} knows the base's datasets alone, "
            f"{sorted(config.norm_stats or {})}. If it was trained on another robot, give --statistics FILE."
        )
    for file in (optional_file(base_folder, STATISTICS_FILE), adapter_file):
        if file:
            config.merge_statistics(read_json(Path(file)))


def _write_processor(target: Path, folders: Sequence[Path], config: OpenVLAConfig) -> None:
    """Write the processor of the first folder that has one, with the tokenizer's files as they are."""
    for folder in folders:
        if has_tokenizer(folder):
            processor = OpenVLAProcessor.from_pretrained(folder)
            processor.num_images_in_input = config.num_images_in_input
            processor.save_pretrained(target)
            copy_tokenizer_files(folder, target)
            return
    logger.warning("no processor beside adapter or base: save one into the merged folder before using it")
