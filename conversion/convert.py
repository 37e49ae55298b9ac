"""``openvla convert``: native Prismatic runs and folders of the old remote code into one self-contained Hub folder.

Nothing is built and nothing initialised: tensors are mapped from disk, renamed, cast and written one at a time, then
read back and compared. The target appears under its name only when it is whole.

Sources, told apart by their content, from a folder or by Hub id (organization/name, or organization/name/folder):
  a native run         config.json with "vla" or "model", dataset_statistics.json, checkpoints/*.pt; openvla-mini's too
                       (one image, no VQ codes)
  a Hub folder         config.json of type openvla or prismatic and safetensors: code, configuration, statistics and
                       processor are made current, weights are linked or copied untouched. pytorch_model.bin files
                       become safetensors.
  an OpenVLA-OFT folder  the same with part files beside it (action_head--150000_checkpoint.pt, proprio_projector,
                       noisy_action_projector, vision_backbone for FiLM), which become part of the weights, or with
                       lora_adapter/ alone, which is merged into its base. Head and dimensions are read off the parts;
                       --preset says the chunk length and the normalisation, --num-images the cameras.

Examples:
  openvla convert runs/my-run my-openvla --tokenizer llama-2-tokenizer/
  openvla convert runs/my-run my-openvla --checkpoint step-080000-epoch-09-loss=0.0987.pt --dtype fp32
  openvla convert openvla/openvla-7b-prismatic my-openvla --tokenizer meta-llama/Llama-2-7b-hf --token hf_...
  openvla convert old-finetune/ my-openvla
  openvla convert someone/openvla-7b-finetuned my-openvla --revision v1.0 --verify
  openvla convert someone/openvla-oft-libero my-oft --preset libero --num-images 2 --image-preset libero
  openvla convert my-openvla back-to-native --reverse
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from ..adapters.base_record import require_not_merged
from ..adapters.files import locate_base
from ..compatibility_openvla import DTYPE_FIELD
from ..configuration_openvla import ACTION_CONFIG_FIELDS, PLATFORMS, OpenVLAConfig, PrismaticConfig, write_json
from ..errors_openvla import OpenVLAFileExistsError, OpenVLAFileNotFoundError, OpenVLAValueError
from ..heads_openvla import is_action_head_param
from ..inference.image_presets import IMAGE_PRESETS
from ..loading import MODEL_CLASSES
from ..modeling_openvla import STATISTICS_FILE
from ..processing_openvla import OpenVLAImageProcessor, OpenVLAProcessor
from ..publishing_openvla import refuse_two_kinds
from .compare_forward import compare_forward
from .direct_io import DirectWriter
from .download import local_folder
from .hub_folder import GENERATION_FILE, appearing_whole, write_card, write_manifest, write_surroundings
from .oft_format import ADAPTER_FOLDER, part_files, read_answer, read_parts, unmerged_adapter, write_parts
from .prismatic_format import (
    CHECKPOINT_FILE,
    CHECKPOINT_FOLDER,
    fit_vocabulary,
    native_config,
    native_file,
    native_run_config,
    native_state,
    native_tensors,
    read_json,
    to_hub_name,
    to_native_name,
    without_tied_head,
)
from .safetensors_io import (
    INDEX_FILE,
    SINGLE_FILE,
    differing,
    digests,
    has_safetensors,
    parse_size,
    pickled_tensors,
    places_of,
    read_tensors,
    require_equal,
    shapes,
    weight_files,
    write_shards,
)
from .torch_archive import records, require_intact

PAD_TOKEN = "<PAD>"
NATIVE_CONFIG_FILE = "native_config.json"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
Converted = tuple[dict[str, torch.Tensor], PrismaticConfig]  # the native or old layout's tensors under Hub names
COPIED_TOKENIZER_FILES = (
    *TOKENIZER_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``openvla convert``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("source", metavar="SRC", help="native run directory, Hub folder, or Hub id of either")
    parser.add_argument("target", type=Path, metavar="DST", help="folder to write; must not exist without --overwrite")
    parser.add_argument(
        "--checkpoint",
        help="file in checkpoints/; default latest-checkpoint.pt, else the highest step. For OFT: the step of the part "
        "files, where there are several",
    )
    parser.add_argument("--revision", help="of a Hub id: branch, tag or commit (default main)")
    parser.add_argument("--token", help="of a Hub id: access token (default that of `hf auth login`, or $HF_TOKEN)")
    parser.add_argument(
        "--tokenizer", metavar="DIR_OR_ID", help="the language model's tokenizer; default beside the source"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the weights; default bf16 for native runs, as it is for folders"
    )
    parser.add_argument("--max-shard-size", default="5GB", help="such as 5GB or 500MB (default %(default)s)")
    parser.add_argument(
        "--config-overrides", type=Path, metavar="FILE", help="JSON merged into the target's config.json"
    )
    parser.add_argument(
        "--image-preset",
        choices=IMAGE_PRESETS,
        help="what evaluation does to frames first, kept in the processor; OFT's checkpoints were evaluated with "
        "libero, as were OpenVLA's fine-tunes on it (default none)",
    )
    parser.add_argument("--preset", choices=PLATFORMS, help="of OFT: chunk length, normalisation, dimensions")
    parser.add_argument("--num-images", type=int, metavar="N", help="of OFT: cameras that it was trained on")
    parser.add_argument(
        "--parallel-decoding", action="store_true", help="of OFT without a head: it answers a chunk of tokens"
    )
    parser.add_argument("--base", metavar="DIR_OR_ID", help="of OFT with lora_adapter/ alone: its base, if moved")
    parser.add_argument(
        "--verify", action="store_true", help="also run both layouts on one input, where memory allows, and compare"
    )
    parser.add_argument("--reverse", action="store_true", help="from a Hub folder back to the native layout")
    parser.add_argument("--overwrite", action="store_true", help="replace DST")


def run(args: argparse.Namespace) -> int:
    """Convert and report; returns the exit status."""
    convert(
        args.source,
        args.target,
        checkpoint=args.checkpoint,
        revision=args.revision,
        token=args.token,
        tokenizer=args.tokenizer,
        dtype=args.dtype,
        max_shard_size=args.max_shard_size,
        config_overrides=json.loads(args.config_overrides.read_text()) if args.config_overrides else None,
        image_preset=args.image_preset,
        preset=args.preset,
        num_images=args.num_images,
        parallel_decoding=args.parallel_decoding,
        base=args.base,
        forward=args.verify,
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
    max_shard_size: str = "5GB",
    config_overrides: dict[str, Any] | None = None,
    image_preset: str | None = None,
    preset: str | None = None,
    num_images: int | None = None,
    parallel_decoding: bool = False,
    base: str | os.PathLike | None = None,
    forward: bool = False,
    reverse: bool = False,
    overwrite: bool = False,
) -> None:
    """Convert a checkpoint; the arguments are the command's (see the module's text).

    Raises:
        ValueError: The source is not understood, incomplete, damaged or holds code; what was written differs.
        FileExistsError: The target exists and ``overwrite`` is not given.
        FileNotFoundError: There is no source, or no tokenizer.
    """
    name, target = os.fspath(source), Path(target)
    if target.exists() and not overwrite:
        raise OpenVLAFileExistsError(f"{target} exists; give another name, or --overwrite to replace it.")
    source = local_folder(name, checkpoint=checkpoint, revision=revision, token=token)
    kind = kind_of(source)
    print(f"{name}: {kind}")
    if reverse and kind == "native run":
        raise OpenVLAValueError(f"{source} is already in the native layout.")
    answer = {"preset": preset, "num_images": num_images, "parallel_decoding": parallel_decoding}
    if kind == "native run" and any(answer.values()):
        raise OpenVLAValueError(
            f"{source} is a native run; --preset, --num-images and --parallel-decoding are for OFT."
        )
    with appearing_whole(target) as folder:
        if reverse:
            oft = read_json(source / "config.json").get("parallel_decoding")
            tensors, config = (_write_oft if oft else _write_native)(source, folder)
        else:
            as_asked = (tokenizer, dtype, parse_size(max_shard_size), config_overrides or {}, image_preset)
            if kind == "native run":
                tensors, config = _write_hub(source, native_file(source, checkpoint), folder, *as_asked)
            else:
                tensors, config = make_current(source, folder, *as_asked, answer, checkpoint, base)
            write_card(folder, target.name)
        if forward:
            print(compare_forward(source if reverse else folder, tensors, config))
    print(f"{target}: complete, every tensor compared with its source")


def kind_of(source: Path) -> str:
    """Return what a source is, in words: a native run, a Hub folder, a run of OpenVLA-OFT.

    Raises:
        FileNotFoundError: It has no config.json.
        ValueError: It is a model of another kind, or an adapter and whole weights.
    """
    refuse_two_kinds(source)
    if unmerged_adapter(source) is not None:
        return "OpenVLA-OFT run with an adapter"
    fields = read_json(source / "config.json")
    if "vla" in fields or "model" in fields:
        return "native run"
    if fields.get("model_type") in MODEL_CLASSES:
        parts = ", ".join(path.name for path in part_files(source).values())
        return f"Hub folder with {parts}" if parts else "Hub folder"
    raise OpenVLAValueError(
        f'{source}/config.json is neither a native Prismatic run\'s ("vla" or "model") nor that of a model of type '
        f"{sorted(MODEL_CLASSES)}."
    )


def require_fit(found: Mapping[str, tuple[int, ...]], config: PrismaticConfig, source: Path) -> None:
    """Raise, naming everything, if a model of this configuration would not take exactly these tensors."""
    with torch.device("meta"):
        model = MODEL_CLASSES[config.model_type](config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings and "language_model.lm_head.weight" not in found:
        expected.pop("language_model.lm_head.weight", None)
    problems = {
        "missing": sorted(set(expected) - set(found)),
        "surplus": sorted(set(found) - set(expected)),
        "of another shape": sorted(
            f"{name} {found[name]}, expected {expected[name]}"
            for name in set(found) & set(expected)
            if found[name] != expected[name]
        ),
    }
    lines = [f"{len(names)} {kind}: {names}" for kind, names in problems.items() if names]
    if lines:
        raise OpenVLAValueError(f"{source} does not fit its configuration. Tensors " + "; ".join(lines) + ".")


def _write_hub(
    source: Path,
    file: Path,
    folder: Path,
    tokenizer: str | os.PathLike | None,
    dtype: str | None,
    shard_bytes: int,
    overrides: dict[str, Any],
    image_preset: str | None,
) -> Converted:
    """A native run as a Hub folder."""
    native = native_tensors(file)
    config = native_config(source, native, overrides)
    tensors = without_tied_head({to_hub_name(name, config): tensor for name, tensor in native.items()}, config)
    require_fit({name: tuple(tensor.shape) for name, tensor in tensors.items()}, config, file)
    found = _tokenizer(source, tokenizer, config)
    fit_vocabulary(source, config, found)
    processor = OpenVLAProcessor.for_config(config, found)
    setattr(config, DTYPE_FIELD, DTYPES[dtype or "bf16"])
    places = records(file, tensors)
    with ThreadPoolExecutor(max_workers=1) as beside:  # what is not checked as it is read, such as the names
        rest = beside.submit(require_intact, file, {place.record for place in places.values()})
        written = write_shards(folder, tensors, DTYPES[dtype or "bf16"], shard_bytes, places=places)
        rest.result()
    shutil.copy(source / "config.json", folder / NATIVE_CONFIG_FILE)
    processor.image_preset = image_preset
    processor.save_pretrained(folder)
    write_surroundings(folder, config)
    write_manifest(folder, written)
    return tensors, config


def make_current(
    source: Path,
    folder: Path,
    tokenizer: str | os.PathLike | None,
    dtype: str | None,
    shard_bytes: int,
    overrides: dict[str, Any],
    image_preset: str | None,
    asked: dict[str, Any],
    step: str | None,
    base: str | os.PathLike | None,
) -> Converted:
    """Write a saved folder again with today's code and configuration; OFT's parts become part of the weights.

    Args:
        source: A folder of the published code or of any openvla.
        folder: An empty folder to write to.
        tokenizer: Another tokenizer than the folder's.
        dtype: Of the weights; None leaves their files as they are, linked or copied.
        shard_bytes: Of the weight files where they are written anew.
        overrides: Fields of config.json.
        image_preset: What evaluation does to frames first; None keeps the folder's.
        asked: Of OFT: preset, num_images and parallel_decoding.
        step: Of OFT: which part files, where there are several.
        base: Of OFT with an adapter alone: its base.

    Returns:
        The tensors by their names, and the configuration.

    Raises:
        ValueError: The source is damaged, or does not fit its configuration.
        FileNotFoundError: There is no tokenizer.
    """
    adapter, whole = unmerged_adapter(source), source
    if adapter is not None:
        whole = local_folder(str(base or locate_base(source / ADAPTER_FOLDER, {})[0]))
    fields = {**read_json(whole / "config.json"), **overrides}
    folded = {} if fields.get("parallel_decoding") else part_files(source, step)
    plain = {name: value for name, value in fields.items() if not folded or name not in ACTION_CONFIG_FIELDS}
    config = current_config(source, plain)
    files = weight_files(whole) if has_safetensors(whole) else {}
    tensors = dict(read_tensors(files)) if files else pickled_tensors(whole)
    if adapter is not None:
        require_not_merged(adapter, tensors, source)
    tensors.update(read_parts(folded, next(iter(tensors.values())).dtype))
    if isinstance(config, OpenVLAConfig) and not config.parallel_decoding:
        answer = read_answer(tensors, overrides, source=source, **asked)
        config.set_action_config(**(answer or {}))
        if answer and image_preset is None:
            print("note: OFT's checkpoints were evaluated on frames prepared as --image-preset libero does")
    require_fit({name: tuple(tensor.shape) for name, tensor in tensors.items()}, config, source)
    write_processor(source, folder, config, tokenizer, image_preset)
    if dtype is None and files and not folded and adapter is None:
        written = link_weights(source, folder, files)
    else:
        if dtype is not None:
            setattr(config, DTYPE_FIELD, DTYPES[dtype])
        change = None if adapter is None else adapter.merge_tensor
        written = write_shards(folder, tensors, dtype and DTYPES[dtype], shard_bytes, change)
    if (source / GENERATION_FILE).is_file():
        shutil.copy(source / GENERATION_FILE, folder / GENERATION_FILE)
    write_surroundings(folder, config)
    write_manifest(folder, written)
    return tensors, config


def current_config(source: Path, fields: dict[str, Any]) -> PrismaticConfig:
    """Return today's configuration of a saved folder: that of its fields, with the statistics that lie beside them."""
    config = MODEL_CLASSES[fields["model_type"]].config_class.from_dict(fields)
    if isinstance(config, OpenVLAConfig) and (source / STATISTICS_FILE).is_file():
        config.merge_statistics(read_json(source / STATISTICS_FILE))
    return config


def link_weights(source: Path, folder: Path, files: Mapping[str, Path]) -> dict[str, str]:
    """Link a folder's weight files into another one, or copy and compare them; return the digests of all tensors."""
    indexed = [] if source / SINGLE_FILE in files.values() else source.glob(INDEX_FILE)
    linked = [link_or_copy(file, folder / file.name) for file in {*files.values(), *indexed}]
    written = digests(places_of(files))
    if not all(linked):
        require_equal(weight_files(folder), written)
    return written


def write_processor(
    source: Path,
    folder: Path,
    config: PrismaticConfig,
    tokenizer: str | os.PathLike | None = None,
    image_preset: str | None = None,
) -> None:
    """Write a saved folder's processor in the layout that every transformers version reads.

    Args:
        source: The folder.
        folder: Where to.
        config: The model's, which says how it is asked.
        tokenizer: Another tokenizer than the folder's, whose own files are copied as they are.
        image_preset: What evaluation does to frames first; None keeps the folder's.
    """
    chosen = _tokenizer(source, tokenizer, config)
    processor = OpenVLAProcessor.for_config(config, chosen, OpenVLAImageProcessor.from_pretrained(source))
    kept = source / "processor_config.json"
    processor.image_preset = image_preset or (read_json(kept).get("image_preset") if kept.is_file() else None)
    processor.save_pretrained(folder)
    if tokenizer is None:  # the trained-on files themselves, not what this version makes of them
        for name in COPIED_TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copy(source / name, folder / name)


def _write_native(source: Path, folder: Path) -> Converted:
    """A Hub folder as a native run directory."""
    fields = read_json(source / "config.json")
    config = MODEL_CLASSES[fields["model_type"]].config_class.from_dict(fields)
    files = weight_files(source)
    require_fit(shapes(files), config, source)
    kept = source / NATIVE_CONFIG_FILE
    write_json(folder / "config.json", read_json(kept) if kept.is_file() else native_run_config(config))
    if isinstance(config, OpenVLAConfig):
        write_json(folder / STATISTICS_FILE, config.norm_stats or {})
    (folder / CHECKPOINT_FOLDER).mkdir()
    written = folder / CHECKPOINT_FOLDER / CHECKPOINT_FILE
    with DirectWriter(written) as file:
        torch.save(native_state(read_tensors(files), config), file)
    again = {to_hub_name(native, config): tensor for native, tensor in native_tensors(written).items()}
    wrong = differing(places_of(files), records(written, again))
    kinds = {name: (tensor.dtype, tensor.shape) for name, tensor in again.items()}
    wrong += [name for name, tensor in read_tensors(files) if kinds.get(name) != (tensor.dtype, tensor.shape)]
    if wrong:
        names = [to_native_name(name, config) for name in wrong]
        raise OpenVLAValueError(f"{written}: {names} do not equal {wrong} of {source}. The disk may be failing.")
    return again, config


def _write_oft(source: Path, folder: Path) -> Converted:
    """A Hub folder of OFT as the reference lays it out: the model, and its parts beside it."""
    config = OpenVLAConfig.from_dict(read_json(source / "config.json"))
    tensors = dict(read_tensors(weight_files(source)))
    require_fit({name: tuple(tensor.shape) for name, tensor in tensors.items()}, config, source)
    write_shards(folder, {n: t for n, t in tensors.items() if not is_action_head_param(n)}, None, parse_size("5GB"))
    write_parts(folder, tensors, config)
    again = read_parts(part_files(folder), next(iter(tensors.values())).dtype)
    wrong = [n for n, t in again.items() if not torch.equal(t.view(torch.uint8), tensors[n].view(torch.uint8))]
    if wrong:
        raise OpenVLAValueError(f"{folder}: {wrong} differ from {source}. The disk may be failing.")
    plain = {
        name: value for name, value in read_json(source / "config.json").items() if name not in ACTION_CONFIG_FIELDS
    }
    OpenVLAProcessor.from_pretrained(source).save_pretrained(folder)
    write_surroundings(folder, OpenVLAConfig.from_dict(plain))
    return {**dict(read_tensors(weight_files(folder))), **again}, config


def _tokenizer(source: Path, given: str | os.PathLike | None, config: PrismaticConfig) -> Any:
    """The tokenizer, with the padding token that the model was trained with.

    Raises:
        FileNotFoundError: None is given and none lies beside the source.
        ValueError: Its padding token is not the model's.
    """
    if given is None and not any((source / name).is_file() for name in TOKENIZER_FILES):
        raise OpenVLAFileNotFoundError(
            f"No tokenizer lies in {source}; pass the language model's own, --tokenizer DIR_OR_ID (here that of "
            f"{config.hf_llm_id}). Another one would give other prompts, and other actions."
        )
    tokenizer = AutoTokenizer.from_pretrained(source if given is None else given, padding_side="right")
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    if tokenizer.pad_token_id != config.pad_token_id:
        raise OpenVLAValueError(
            f"The tokenizer pads with {tokenizer.pad_token_id} but the model with {config.pad_token_id}; this is not "
            f"the tokenizer of {config.hf_llm_id}."
        )
    return tokenizer


def link_or_copy(source: str | os.PathLike, target: str | os.PathLike) -> bool:
    """Make a hard link where the file system allows one, else a copy; return whether it is a link."""
    source = Path(source)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copy2(source, target)
        return False
    return True
