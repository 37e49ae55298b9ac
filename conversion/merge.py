"""``openvla merge``: an adapter and its base into one self-contained Hub folder, one tensor at a time.

Each adapted weight becomes W + alpha / r * B A, in float32 and rounded once to the dtype of W; all other tensors keep
their bytes. The adapter must have been trained on this very base. The target appears only when it is whole.

Examples:
  openvla merge my-adapter my-openvla
  openvla merge my-adapter my-openvla --base /data/openvla-7b
"""

from __future__ import annotations

import argparse
import os
import shutil
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
from ..configuration_openvla import OpenVLAConfig, optional_file
from ..errors_openvla import OpenVLAFileExistsError, OpenVLAValueError
from ..heads_openvla import is_action_head_param
from ..inference.policy import init_empty_model
from ..modeling_openvla import STATISTICS_FILE
from ..parallel_openvla import refuse_loose_parts
from ..processing_openvla import OpenVLAProcessor
from .convert import COPIED_TOKENIZER_FILES, TOKENIZER_FILES
from .download import local_folder
from .hub_folder import appearing_whole, write_card, write_manifest, write_surroundings
from .prismatic_format import read_json
from .safetensors_io import parse_size, read_tensors, weight_files, write_shards


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``openvla merge``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("adapter", metavar="ADAPTER", help="adapter folder or Hub id")
    parser.add_argument("target", type=Path, metavar="OUT", help="folder to write; must not exist without --overwrite")
    parser.add_argument("--base", metavar="DIR_OR_ID", help="the base, where it is not what the adapter names")
    parser.add_argument(
        "--statistics",
        metavar="FILE",
        help="dataset_statistics.json of its robot, where it lies elsewhere",
    )
    parser.add_argument("--max-shard-size", default="5GB", help="such as 5GB or 500MB (default %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")


def run(args: argparse.Namespace) -> int:
    """Merge and report; returns the exit status."""
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
    max_shard_size: str = "5GB",
    overwrite: bool = False,
) -> None:
    """Merge an adapter into its base; neither is changed.

    Args:
        adapter: Folder or Hub id.
        target: Folder to write.
        base: Folder or Hub id of the base; None takes the one that the adapter names.
        statistics: A dataset_statistics.json of the adapter's robot; None takes the one beside the adapter, or in the
            folder above, where the published scripts leave it.
        max_shard_size: Such as "5GB".
        overwrite: Replace ``target``.

    Raises:
        ValueError: The adapter was trained on another base, does not fit it, is merged into it already, or has
            OpenVLA-OFT's part files in the folder above; or the base is quantised.
        FileExistsError: The target exists and ``overwrite`` is not given.
        FileNotFoundError: There is no adapter, or no base.
    """
    target = Path(target)
    if target.exists() and not overwrite:
        raise OpenVLAFileExistsError(f"{target} exists; give another name, or --overwrite to replace it.")
    lora = read_adapter(adapter)
    source, revision = (str(base), None) if base else locate_base(adapter, {})
    folder = local_folder(source, revision=revision)
    fields = read_json(folder / "config.json")
    if fields.get("quantization_config"):
        raise OpenVLAValueError(f"{source} is quantised; give the plain checkpoint that it was made from with --base.")
    config = OpenVLAConfig.from_dict(fields)
    files = weight_files(folder)
    tensors = dict(read_tensors(files))
    weights = weights_digest(tensors.items(), config)
    record = BaseRecord(id=source, revision=revision, config=config_digest(config), weights=weights, quantization=None)
    require_same_base(lora.base, record, adapter)
    if lora.base is None:
        require_not_merged(lora, tensors, adapter)
        if os.path.isdir(adapter):
            refuse_loose_parts(Path(os.path.abspath(adapter)).parent, {})
    if lora.answer is not None and not config.parallel_decoding:
        config.set_action_config(**lora.answer)
        tensors.update(_heads(lora, config, next(iter(tensors.values())).dtype))
    if (lora.answer or config.action_config) != config.action_config:
        raise OpenVLAValueError(f"{adapter} answers as {lora.answer}, {source} as {config.action_config}.")
    missing = sorted({*(f"{name}.weight" for name in lora.target_modules), *lora.full_tensors} - set(tensors))
    if missing:
        raise OpenVLAValueError(
            f"{adapter} does not fit {source}, which lacks {len(missing)} of its tensors: {missing[:3]}."
        )
    if lora.base and lora.base.get("quantization"):
        print(quantized_merge_note(lora.base))
    own_statistics = statistics or find_beside_or_above(adapter, STATISTICS_FILE)
    if own_statistics is None:
        print(
            f"{adapter} brings no {STATISTICS_FILE}: {target} knows the base's datasets alone, "
            f"{sorted(config.norm_stats or {})}. If it was trained on another robot, give --statistics FILE."
        )
    for file in (optional_file(folder, STATISTICS_FILE), own_statistics):
        if file:
            config.merge_statistics(read_json(Path(file)))
    if lora.default_unnorm_key in (config.norm_stats or {}):
        config.default_unnorm_key = lora.default_unnorm_key
    with appearing_whole(target) as written:
        digests = write_shards(written, tensors, None, parse_size(max_shard_size), lora.merge_tensor)
        _write_processor(written, [Path(adapter), folder], config)
        write_surroundings(written, config)
        write_card(written, target.name)
        write_manifest(written, digests)
    count = len(lora.target_modules)
    print(f"{target}: complete, {count} adapted weights in float32 rounded once, read back and compared")


def _heads(lora: LoraAdapter, config: OpenVLAConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What an adapter that answers in parallel adds to its base; FiLM of blocks that never run is zero, as new."""
    names = {name: tensor.shape for name, tensor in init_empty_model(config).state_dict().items()}
    return {
        name: lora.tensors[name].to(dtype) if name in lora.tensors else torch.zeros(shape, dtype=dtype)
        for name, shape in names.items()
        if is_action_head_param(name)
    }


def _write_processor(target: Path, places: list[Path], config: OpenVLAConfig) -> None:
    """The processor of the first place that has one: current code, and the tokenizer's own files as they are."""
    for place in places:
        if any((place / name).is_file() for name in TOKENIZER_FILES):
            processor = OpenVLAProcessor.from_pretrained(place)
            processor.num_images_in_input = config.num_images_in_input
            processor.save_pretrained(target)
            for name in COPIED_TOKENIZER_FILES:
                if (place / name).is_file():
                    shutil.copy(place / name, target / name)
            return
    print("no processor beside adapter or base: save one into the merged folder before using it")
