"""``openvla convert``: native Prismatic runs and folders of the old remote code into one self-contained Hub folder.

No model is built: tensors are mapped from disk, renamed, cast and written one at a time, then read back and compared.
The target appears under its name only when it is complete.

Sources, told apart by their content, from a folder or by Hub id (organization/name, or organization/name/folder):
  a native run         config.json with "vla" or "model", dataset_statistics.json, checkpoints/*.pt; openvla-mini's too
                       (MiniVLA; --vq names the VQ autoencoder of runs whose actions are its codes)
  a Hub folder         config.json of type openvla or prismatic and safetensors: code, configuration, statistics and
                       processor are made current, weights are linked or copied untouched. pytorch_model.bin files
                       become safetensors. A TraceVLA is recognised by its separator's tensor, here and in native runs.
  an OpenVLA-OFT folder  the same with part files (action_head--150000_checkpoint.pt, proprio_projector,
                       noisy_action_projector, vision_backbone for FiLM), which become part of the weights, or with
                       lora_adapter/ alone, which is merged into its base. Head and dimensions are read from the parts;
                       --preset gives the chunk length and the normalisation, --num-images the number of cameras.

Examples:
  openvla convert runs/my-run my-openvla --tokenizer llama-2-tokenizer/
  openvla convert runs/my-run my-openvla --checkpoint step-080000-epoch-09-loss=0.0987.pt --dtype fp32
  openvla convert openvla/openvla-7b-prismatic my-openvla --tokenizer meta-llama/Llama-2-7b-hf --token hf_...
  openvla convert old-finetune/ my-openvla
  openvla convert someone/openvla-7b-finetuned my-openvla --revision v1.0 --verify
  openvla convert someone/openvla-oft-libero my-oft --preset libero --num-images 2 --image-preset libero
  openvla convert runs/my-minivla my-minivla --tokenizer Qwen/Qwen2.5-0.5B --vq vq/
  openvla convert my-openvla back-to-native --reverse
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .configuration_openvla import PLATFORMS
from .conversion.compare_forward import compare_forward
from .conversion.console import printed_logs
from .conversion.detect import NATIVE_RUN, detect_layout
from .conversion.download import local_folder
from .conversion.files import atomic_directory, read_json, require_absent
from .conversion.from_hub import convert_hub_folder
from .conversion.from_native import convert_native_run
from .conversion.hub_folder import write_card
from .conversion.options import DEFAULT_SHARD_SIZE, DTYPES, ConvertOptions, OftOptions
from .conversion.prismatic_format import native_file
from .conversion.reverse import reverse_convert
from .conversion.safetensors_io import parse_size
from .conversion.vq_format import VQ_FILE
from .errors_openvla import OpenVLAValueError
from .inference.image_presets import IMAGE_PRESETS

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``openvla convert``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("source", metavar="SRC", help="native run directory, Hub folder, or Hub id of either")
    parser.add_argument("target", type=Path, metavar="DST", help="folder to write; must not exist without --overwrite")
    parser.add_argument(
        "--checkpoint",
        help="file in checkpoints/; default latest-checkpoint.pt, else the highest step. For OFT: the step of the part "
        "files, where there are several",
    )
    parser.add_argument("--revision", help="for a Hub id: branch, tag or commit (default main)")
    parser.add_argument("--token", help="for a Hub id: access token (default that of `hf auth login`, or $HF_TOKEN)")
    parser.add_argument(
        "--tokenizer", metavar="DIR_OR_ID", help="the language model's tokenizer; default the one in SRC"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="dtype of the weights; default bf16 for native runs, unchanged for Hub folders"
    )
    parser.add_argument(
        "--max-shard-size",
        default=DEFAULT_SHARD_SIZE,
        help="size of a weight file, such as 5GB or 500MB (default %(default)s)",
    )
    parser.add_argument(
        "--config-overrides", type=Path, metavar="FILE", help="JSON merged into the target's config.json"
    )
    parser.add_argument(
        "--image-preset",
        choices=IMAGE_PRESETS,
        help="preprocessing that evaluation applies to frames, saved in the processor; OFT's checkpoints were "
        "evaluated with libero, as were OpenVLA's fine-tunes on it (default none; for MiniVLA's runs on LIBERO "
        "and Bridge that of its evaluation)",
    )
    parser.add_argument(
        "--vq", metavar="DIR_OR_ID", help="for MiniVLA: folder of the VQ autoencoder, or one that holds it by its name"
    )
    parser.add_argument("--preset", choices=PLATFORMS, help="for OFT: chunk length, normalisation, dimensions")
    parser.add_argument("--num-images", type=int, metavar="N", help="for OFT: number of cameras in training")
    parser.add_argument(
        "--parallel-decoding",
        action="store_true",
        help="for OFT without an action head: the model predicts a chunk of tokens in parallel",
    )
    parser.add_argument("--base", metavar="DIR_OR_ID", help="for OFT with lora_adapter/ alone: its base, if moved")
    parser.add_argument(
        "--verify", action="store_true", help="also run both layouts on one input, where memory allows, and compare"
    )
    parser.add_argument("--reverse", action="store_true", help="from a Hub folder back to the native layout")
    parser.add_argument("--overwrite", action="store_true", help="replace DST")


def run(args: argparse.Namespace) -> int:
    """Convert, print the progress, and return the exit status."""
    with printed_logs():
        convert(
            args.source,
            args.target,
            checkpoint=args.checkpoint,
            revision=args.revision,
            token=args.token,
            tokenizer=args.tokenizer,
            dtype=args.dtype,
            max_shard_size=args.max_shard_size,
            config_overrides=read_json(args.config_overrides) if args.config_overrides else None,
            image_preset=args.image_preset,
            vq=args.vq,
            preset=args.preset,
            num_images=args.num_images,
            parallel_decoding=args.parallel_decoding,
            base=args.base,
            verify=args.verify,
            reverse=args.reverse,
            overwrite=args.overwrite,
        )
    return 0


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    checkpoint: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    tokenizer: str | os.PathLike | None = None,
    dtype: str | None = None,
    max_shard_size: str = DEFAULT_SHARD_SIZE,
    config_overrides: Mapping[str, Any] | None = None,
    image_preset: str | None = None,
    vq: str | os.PathLike | None = None,
    preset: str | None = None,
    num_images: int | None = None,
    parallel_decoding: bool = False,
    base: str | os.PathLike | None = None,
    verify: bool = False,
    reverse: bool = False,
    overwrite: bool = False,
) -> None:
    """Convert a checkpoint; the source is not changed. The module's docstring lists the sources.

    Args:
        source: Folder, or Hub id ("organization/name", or "organization/name/folder").
        target: Folder to write.
        checkpoint: Of a native run, the file in checkpoints/; None takes latest-checkpoint.pt, else the highest step.
            Of an OpenVLA-OFT run, the training step of its part files.
        revision: Branch, tag or commit of a Hub id; None is main.
        token: Access token for a Hub id; None takes the one of ``hf auth login``.
        tokenizer: Folder or Hub id of the language model's tokenizer; None takes the one in the source.
        dtype: "bf16", "fp16" or "fp32"; None is bf16 for native runs, unchanged for Hub folders.
        max_shard_size: Size of a weight file, such as "5GB".
        config_overrides: Fields merged into the target's config.json.
        image_preset: Preprocessing that evaluation applies to frames, a key of ``IMAGE_PRESETS``. None is "none"; for
            MiniVLA's runs on LIBERO and Bridge, that of its evaluation.
        vq: For MiniVLA: folder or Hub id of the VQ autoencoder whose codes the action tokens are.
        preset: For OpenVLA-OFT: robot platform, a key of ``PLATFORMS``.
        num_images: For OpenVLA-OFT: number of cameras.
        parallel_decoding: For OpenVLA-OFT without an action head: predict a chunk of tokens in parallel.
        base: For OpenVLA-OFT with an adapter alone: folder or Hub id of its base.
        verify: Also run both layouts on one input, where memory allows, and compare the outputs.
        reverse: Convert a Hub folder back to the native layout.
        overwrite: Replace ``target``.

    Raises:
        ValueError: The source is not understood, incomplete, damaged or holds code; or what was written differs.
        FileExistsError: The target exists and ``overwrite`` is False.
        FileNotFoundError: There is no source, or no tokenizer.
    """
    target = Path(target)
    require_absent(target, overwrite)
    folder = local_folder(source, checkpoint=checkpoint, revision=revision, token=token)
    layout = detect_layout(folder)
    logger.info(f"{os.fspath(source)}: {layout}")
    if layout == NATIVE_RUN and reverse:
        raise OpenVLAValueError(f"{folder} is already in the native layout.")
    if layout == NATIVE_RUN and (preset or num_images or parallel_decoding):
        raise OpenVLAValueError(
            f"{folder} is a native run; --preset, --num-images and --parallel-decoding are for OFT."
        )
    if vq is not None and (layout != NATIVE_RUN or reverse):
        raise OpenVLAValueError(f"{folder} is no native run; --vq is for MiniVLA's runs.")
    oft = OftOptions(
        preset=preset, num_images=num_images, parallel_decoding=parallel_decoding, step=checkpoint, base=base
    )
    with atomic_directory(target) as written:
        if reverse:
            tensors, config = reverse_convert(folder, written)
        else:
            options = ConvertOptions(
                max_shard_bytes=parse_size(max_shard_size),
                tokenizer=tokenizer,
                dtype=dtype,
                config_overrides=config_overrides or {},
                image_preset=image_preset,
                oft=oft,
                vq=None if vq is None else local_folder(vq, checkpoint=VQ_FILE.name, token=token),
            )
            if layout == NATIVE_RUN:
                tensors, config = convert_native_run(folder, native_file(folder, checkpoint), written, options)
            else:
                tensors, config = convert_hub_folder(folder, written, options)
            write_card(written, target.name)
        if verify:
            logger.info(compare_forward(folder if reverse else written, tensors, config))
    logger.info(f"{target}: complete, every tensor compared with its source")
