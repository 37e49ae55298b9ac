r"""``openvla assemble``: build an untrained model from pretrained vision towers, a language model and a new projector.

Prismatic and OpenVLA started from such a model: one or two ViTs of timm, a Llama, Mistral, Phi or Qwen2, and between
them an untrained MLP. The result is a folder like any other of this package: it loads on every transformers
version, can be trained and verified, and predicts (at random, before training).

  --towers    one timm id, or two whose features are concatenated in that order; also hf-hub:<repository> and
              local-dir:<folder>. Any plain ViT of timm is accepted. An id as OpenVLA's configuration writes it means
              the weights that OpenVLA used, even where timm has newer ones under it now (SigLIP 2).
  --llm       a folder or Hub id with safetensors and its tokenizer

A <PAD> token is added where the tokenizer has no padding token, and the embedding is padded to a multiple of 64 rows.
Action bins are the last 256 ids of the vocabulary proper or, with --extra-tokens, 256 new tokens, as in MiniVLA. The
projector is initialized as in the reference, with the same seed. Everything else equals the weights of timm and the
language model: each tower's features are compared with timm's bit by bit, and each tensor is read back.

Examples:
  openvla assemble --towers vit_large_patch14_reg4_dinov2.lvd142m vit_so400m_patch14_siglip_224 \
      --llm meta-llama/Llama-2-7b-hf my-prism
  openvla assemble --towers vit_base_patch16_siglip_224.v2_webli --llm Qwen/Qwen2.5-0.5B --extra-tokens my-mini \
      --norm-stats dataset_statistics.json
  openvla assemble --towers local-dir:my-dino/ local-dir:my-siglip/ --llm my-llama/ --dtype bf16 my-model
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from ..configuration_openvla import (
    AUTO,
    DTYPE_FIELD,
    IMAGE_RESIZE_STRATEGIES,
    LLM_BACKBONES,
    LLM_MODEL_TYPES,
    PROMPTS,
    VISION_BACKBONES,
    OpenVLAConfig,
    PrismaticConfig,
)
from ..default_processor import default_processor
from ..errors_openvla import OpenVLAImportError, OpenVLAValueError
from ..processing_openvla import OpenVLAImageProcessor, OpenVLAProcessor
from ..vision_openvla import ARCHITECTURES, PrismaticProjector, TowerArchitecture, VisionTower
from .console import printed_logs
from .download import local_folder
from .files import atomic_directory, read_json, require_absent
from .hub_folder import require_matching_tensors, write_card, write_config_and_code, write_manifest
from .hub_weights import weight_files
from .minivla_format import EXTRA_TOKENS, padded_vocab_size
from .options import DEFAULT_SHARD_SIZE, DTYPES
from .prismatic_format import EMBEDDING, HEAD, without_tied_head
from .prismatic_registry import COMMON, FUSED
from .processor_files import PAD_TOKEN
from .safetensors_io import parse_size, read_tensors, write_shards

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

logger = logging.getLogger(__name__)

REFERENCE_TAG = "webli"  # timm's tag of the SigLIP weights that the reference used; its timm had no others
# Prompt of a language model that is not in the registry, by its type: the prompt must open with a special token.
PROMPT_STYLES = {"phi": "openvla-phi", "qwen2": "openvla-mini"}
LLM_MAX_LENGTH = {"qwen2": 32768}  # by type, from the registry; the others have COMMON's


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``openvla assemble``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--towers", nargs="+", required=True, metavar="TIMM_ID", help="one or two vision towers")
    parser.add_argument("--llm", required=True, metavar="DIR_OR_ID", help="the language model")
    parser.add_argument("target", type=Path, metavar="OUT", help="folder to write; must not exist without --overwrite")
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="size of the images; default OpenVLA's for these towers, else the last tower's own",
    )
    parser.add_argument(
        "--image-resize-strategy",
        choices=IMAGE_RESIZE_STRATEGIES,
        default="resize-naive",
        help="how images become square (default %(default)s, as in OpenVLA)",
    )
    parser.add_argument("--prompt-style", choices=PROMPTS, help="prompt; default that of the language model")
    parser.add_argument("--extra-tokens", action="store_true", help="add 256 tokens <|extra_i|> for the action bins")
    parser.add_argument("--norm-stats", type=Path, metavar="FILE", help="action statistics, dataset_statistics.json")
    parser.add_argument("--vlm", action="store_true", help="build a vision-language model (Prismatic), without actions")
    parser.add_argument(
        "--seed", type=int, help="seed of the projector and of new embedding rows; default the reference's"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="fp32", help="dtype of the weights (default %(default)s, lossless)"
    )
    parser.add_argument(
        "--max-shard-size",
        default=DEFAULT_SHARD_SIZE,
        help="size of a weight file, such as 5GB or 500MB (default %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")


def run(args: argparse.Namespace) -> int:
    """Assemble, print the progress, and return the exit status."""
    with printed_logs():
        assemble(
            args.towers,
            args.llm,
            args.target,
            image_size=args.image_size,
            image_resize_strategy=args.image_resize_strategy,
            prompt_style=args.prompt_style,
            extra_tokens=args.extra_tokens,
            norm_stats=read_json(args.norm_stats) if args.norm_stats else None,
            vlm=args.vlm,
            seed=args.seed,
            dtype=args.dtype,
            max_shard_size=args.max_shard_size,
            overwrite=args.overwrite,
        )
    return 0


def assemble(
    towers: Sequence[str],
    llm: str | os.PathLike,
    target: str | os.PathLike,
    *,
    image_size: int | None = None,
    image_resize_strategy: str = "resize-naive",
    prompt_style: str | None = None,
    extra_tokens: bool = False,
    norm_stats: dict[str, Any] | None = None,
    vlm: bool = False,
    seed: int | None = None,
    dtype: str = "fp32",
    max_shard_size: str = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
) -> None:
    """Assemble a model from pretrained parts. The module's docstring describes them.

    Args:
        towers: One or two timm ids, hf-hub:<repository> or local-dir:<folder>.
        llm: Folder or Hub id of the language model, with safetensors and its tokenizer.
        target: Folder to write.
        image_size: Height and width of the images in pixels; None is OpenVLA's for these towers, else the last tower's.
        image_resize_strategy: How images become square, one of ``IMAGE_RESIZE_STRATEGIES``.
        prompt_style: A key of ``PROMPTS``; None takes the language model's.
        extra_tokens: Add 256 tokens ``<|extra_i|>`` for the action bins.
        norm_stats: Action statistics by dataset.
        vlm: Build a vision-language model (Prismatic), without actions.
        seed: Seed of the projector and of new embedding rows; None is the reference's.
        dtype: "bf16", "fp16" or "fp32".
        max_shard_size: Size of a weight file, such as "5GB".
        overwrite: Replace ``target``.

    Raises:
        ValueError: A part cannot be used, or the parts do not fit each other.
        FileExistsError: The target exists and ``overwrite`` is False.
        ImportError: timm is not installed.
    """
    target, shard_bytes = Path(target), parse_size(max_shard_size)
    require_absent(target, overwrite)
    if len(towers) not in (1, 2):
        raise OpenVLAValueError(f"A model has one or two vision towers, got {len(towers)}: {list(towers)}.")
    if vlm and norm_stats is not None:
        raise OpenVLAValueError("Action statistics belong to a model with actions; leave out --vlm or --norm-stats.")
    _import_timm()  # before anything is downloaded
    folder = local_folder(llm)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
    vocabulary = _vocabulary_fields(_text_config(folder), tokenizer, extra_tokens)
    modules, vision = _load_towers(towers, image_size)
    language = _language_model_fields(str(llm), tokenizer, extra_tokens, prompt_style, vocabulary)
    fields = {
        **vision,
        **language,
        **vocabulary,
        "image_resize_strategy": image_resize_strategy,
        DTYPE_FIELD: DTYPES[dtype],
    }
    config = PrismaticConfig(**fields) if vlm else OpenVLAConfig(norm_stats=norm_stats, **fields)
    processor = default_processor(config, tokenizer)
    _require_special_first_token(processor)
    for index, module in enumerate(modules):
        _require_same_preprocessing(module, config, processor.image_processor, index)
        _require_same_features(module, config, index)
    tensors = _collect_tensors(modules, folder, config, seed)
    require_matching_tensors(tensors, config, folder)
    with atomic_directory(target) as written:
        digests = write_shards(written, tensors, DTYPES[dtype], shard_bytes)
        processor.save_pretrained(written)
        write_config_and_code(written, config)
        write_card(written, target.name)
        write_manifest(written, digests)
    logger.info(f"{target}: {config.vision_backbone_id} and {llm}, {len(tensors)} tensors; the projector is untrained")


def _import_timm() -> Any:
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that was built for another torch
        raise OpenVLAImportError(
            "openvla assemble takes its towers from timm, which cannot be imported here: pip install 'openvla[timm]', "
            f"with the torchvision that belongs to your torch. ({error})"
        ) from error
    return timm


def _create_tower(name: str, **kwargs: Any) -> VisionTransformer:
    """Create a timm model without its classifier."""
    timm = _import_timm()
    try:
        model = timm.create_model(name, num_classes=0, **kwargs)
    except (AssertionError, RuntimeError) as error:
        reason = str(error) or "it does not know this kind of id"
        raise OpenVLAValueError(f"timm {timm.__version__} cannot make {name!r}: {reason}") from error
    if not isinstance(model, timm.models.vision_transformer.VisionTransformer):
        raise OpenVLAValueError(f"{name} is a {type(model).__name__}; a tower must be a VisionTransformer of timm.")
    return model.eval()


def _load_towers(names: Sequence[str], image_size: int | None) -> tuple[list[VisionTransformer], dict[str, Any]]:
    """Load timm's pretrained towers; return them and the fields of the configuration that describe them."""
    names = [_with_tag(name) for name in names]
    pretrained_cfgs = [_create_tower(name).pretrained_cfg for name in names]  # known before any weights are read
    ids = [_known_id(cfg) for cfg in pretrained_cfgs]
    registered_sizes = {
        backbone_id: towers[0][1]
        for backbone_id, towers in VISION_BACKBONES.items()
        if [timm_id for timm_id, _, _ in towers] == ids
    }
    size = image_size or next(iter(registered_sizes.values()), None) or pretrained_cfgs[-1]["input_size"][-1]
    modules, activations = [], []
    for name, cfg in zip(names, pretrained_cfgs):
        if not any(cfg.get(source) for source in ("url", "file", "hf_hub_id")):
            raise OpenVLAValueError(f"timm knows no pretrained weights of {name!r}; name a tag that has some.")
        # OpenAI's CLIPs were trained with QuickGELU, which timm's configuration does not say; the reference does this.
        override = {"act_layer": "quick_gelu"} if cfg.get("tag") == "openai" else {}
        modules.append(_create_tower(name, pretrained=True, img_size=size, **override))
        activations.append(_activation(modules[-1], name))
        logger.info(f"{name}: {cfg['architecture']}, weights {cfg.get('tag') or cfg.get('file')}, {size} pixels")
    matching_id = next((name for name, registered in registered_sizes.items() if registered == size), None)
    return modules, {
        "vision_backbone_id": matching_id or "+".join(ids),
        "timm_model_ids": ids,
        "image_sizes": [size] * len(ids),
        "timm_override_act_layers": activations,
        "timm_model_kwargs": [_model_kwargs(module, timm_id) for module, timm_id in zip(modules, ids)],
        "use_fused_vision_backbone": len(ids) == 2,
        "arch_specifier": (FUSED if len(ids) == 2 else COMMON)["arch_specifier"],
    }


def _with_tag(name: str) -> str:
    """Add the tag of the reference's weights to an id without a tag, whose weights depend on timm's version."""
    return f"{name}.{REFERENCE_TAG}" if name in ARCHITECTURES and "." not in name else name


def _known_id(cfg: Mapping[str, Any]) -> str:
    """Return this package's id of the model of a timm ``pretrained_cfg``, else timm's own."""
    architecture, tag = cfg["architecture"], cfg.get("tag")
    full_id = f"{architecture}.{tag}" if tag else architecture
    other_tags = [timm_id for timm_id in ARCHITECTURES if timm_id.split(".")[0] == architecture]
    for timm_id in (full_id, architecture, *([] if tag else other_tags)):
        if timm_id in ARCHITECTURES:
            return timm_id
    return full_id


def _activation(module: VisionTransformer, name: str) -> str | None:
    """Return ``timm_override_act_layers`` of a tower."""
    kind = type(module.blocks[0].mlp.act).__name__
    if kind not in ("GELU", "QuickGELU"):
        raise OpenVLAValueError(f"{name} has the activation {kind}; a tower here has GELU or QuickGELU.")
    return "quick_gelu" if kind == "QuickGELU" else None


def _model_kwargs(module: VisionTransformer, timm_id: str) -> dict[str, Any]:
    """Return the fields in which a timm tower differs from ``ARCHITECTURES[timm_id]``; all for an unknown id."""
    block, dim = module.blocks[0], module.embed_dim
    hidden = block.mlp.fc1.out_features
    ratio = hidden / dim
    architecture = TowerArchitecture(
        patch_size=module.patch_embed.patch_size[0],
        embed_dim=dim,
        depth=len(module.blocks),
        num_heads=block.attn.num_heads,
        mlp_ratio=ratio if int(dim * ratio) == hidden else (hidden + 0.5) / dim,
        class_token=module.cls_token is not None,
        reg_tokens=module.num_reg_tokens,
        no_embed_class=module.no_embed_class or module.num_prefix_tokens == 0,
        pre_norm=not isinstance(module.norm_pre, nn.Identity),
        layer_scale=not isinstance(block.ls1, nn.Identity),
        attention_pool=module.attn_pool is not None,
        norm_eps=block.norm1.eps,
    )
    if timm_id not in ARCHITECTURES:
        return asdict(architecture)
    known = asdict(ARCHITECTURES[timm_id])
    if int(dim * known["mlp_ratio"]) == hidden:
        known["mlp_ratio"] = architecture.mlp_ratio
    return {name: value for name, value in asdict(architecture).items() if value != known[name]}


def _require_same_preprocessing(
    module: VisionTransformer, config: PrismaticConfig, image_processor: OpenVLAImageProcessor, index: int
) -> None:
    """Raise ValueError if the image processor does not preprocess images as a tower was pretrained."""
    timm_config = _import_timm().data.resolve_model_data_config(module)
    ours = {name: getattr(image_processor, f"{name}s")[index] for name in ("mean", "std", "interpolation")}
    mismatches = [
        f"{name} {timm_config[name]}, not {value}"
        for name, value in ours.items()
        if tuple(timm_config[name]) != tuple(value)
    ]
    if mismatches:
        raise OpenVLAValueError(
            f"The tower {config.timm_model_ids[index]} was pretrained on images of {'; '.join(mismatches)}, which this "
            "package's image processor would give it. Take another tower, or correct the pretrained_cfg in its "
            "config.json if that is wrong."
        )


def _require_same_features(module: VisionTransformer, config: PrismaticConfig, index: int) -> None:
    """Raise ValueError if this package's tower with timm's weights does not give timm's features bit by bit."""
    timm_id, size = config.timm_model_ids[index], config.image_sizes[index]
    with torch.device("meta"):
        ours = VisionTower(
            timm_id, size, config.timm_override_act_layers[index], config.timm_model_kwargs[index]
        ).eval()
    try:
        ours.load_state_dict(_tower_tensors(module), assign=True)
    except RuntimeError as error:
        raise OpenVLAValueError(f"{timm_id} is not a plain ViT, which is all that this package has: {error}") from error
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = module.get_intermediate_layers(pixels, n={len(module.blocks) - 2})[0]
        difference = float((ours(pixels) - expected).abs().max())
    if difference != 0:
        raise OpenVLAValueError(f"{timm_id}: this package's features differ from timm's by up to {difference}.")


def _tower_tensors(module: VisionTransformer) -> dict[str, torch.Tensor]:
    """Return a timm tower's tensors under this package's names."""
    return {name.replace(".gamma", ".scale_factor"): tensor for name, tensor in module.state_dict().items()}


def _text_config(folder: Path) -> dict[str, Any]:
    """Return the language model's configuration without the fields that describe its folder."""
    fields = AutoConfig.from_pretrained(folder).to_dict()
    if fields["model_type"] not in LLM_MODEL_TYPES:
        raise OpenVLAValueError(f"{folder} is a {fields['model_type']} model. Allowed: {list(LLM_MODEL_TYPES)}.")
    if fields.get("quantization_config"):
        raise OpenVLAValueError(f"{folder} is quantised; training starts from unquantised weights.")
    folder_fields = ("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version")
    return {name: value for name, value in fields.items() if name not in folder_fields}


def _vocabulary_fields(
    text_config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, extra_tokens: bool
) -> dict[str, Any]:
    """Add missing tokens to the tokenizer; return the fields of the configuration that describe the vocabulary."""
    if extra_tokens and tokenizer.add_tokens(EXTRA_TOKENS) != len(EXTRA_TOKENS):
        raise OpenVLAValueError(f"The tokenizer already has some of {EXTRA_TOKENS[0]} to {EXTRA_TOKENS[-1]}.")
    end_of_bins = len(tokenizer) if extra_tokens else tokenizer.vocab_size
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    vocab_size, pad_token_id = padded_vocab_size(len(tokenizer)), tokenizer.pad_token_id
    return {
        "text_config": {**text_config, "vocab_size": vocab_size, "pad_token_id": pad_token_id},
        "pad_token_id": pad_token_id,
        "pad_to_multiple_of": vocab_size - end_of_bins,
    }


def _language_model_fields(
    llm: str,
    tokenizer: PreTrainedTokenizerBase,
    extra_tokens: bool,
    prompt_style: str | None,
    vocabulary: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the fields of the configuration that name the language model and its prompt."""
    model_type = vocabulary["text_config"]["model_type"]
    registered_id = next(
        (
            name
            for name, (hub_id, _) in LLM_BACKBONES.items()
            if hub_id == llm and name.endswith("-extra") == extra_tokens
        ),
        None,
    )
    return {
        "llm_backbone_id": registered_id or Path(llm).resolve().name,
        "hf_llm_id": None if Path(llm).is_dir() else llm,
        "llm_max_length": LLM_MAX_LENGTH.get(model_type, COMMON["llm_max_length"]),
        "prompt_style": prompt_style or (AUTO if registered_id else PROMPT_STYLES.get(model_type, "openvla")),
        # The token "▁" of Llama-2; Llama-3, of the same type, has none.
        "empty_token_id": tokenizer.get_vocab().get("▁") if model_type == "llama" else None,
    }


def _require_special_first_token(processor: OpenVLAProcessor) -> None:
    """Raise ValueError unless a prompt begins with BOS or another special token: image patches follow the first."""
    size = processor.image_processor.input_sizes[0][-1]
    ids = processor(instruction="move", images=Image.new("RGB", (size, size)))["input_ids"][0]
    if int(ids[0]) not in processor.tokenizer.all_special_ids:
        raise OpenVLAValueError(
            f"The prompt {processor.prompt('move')!r} opens with token {int(ids[0])}, after which the image would "
            "stand; choose a --prompt-style that opens with a special token of this language model, one of "
            f"{processor.tokenizer.all_special_tokens}."
        )


def _collect_tensors(
    modules: Sequence[VisionTransformer], folder: Path, config: PrismaticConfig, seed: int | None
) -> dict[str, torch.Tensor]:
    """Return every tensor of the model under its published name; the language model's are mapped from disk."""
    prefixes = ("featurizer", "fused_featurizer")
    tensors = {
        f"vision_backbone.{prefix}.{name}": tensor
        for prefix, module in zip(prefixes, modules)
        for name, tensor in _tower_tensors(module).items()
    }
    text_config, vision_dim = config.text_config, sum(module.embed_dim for module in modules)
    language = {
        f"language_model.{name}": tensor
        for name, tensor in read_tensors(weight_files(folder))
        if not name.endswith("rotary_emb.inv_freq")  # a computed buffer that old versions saved
    }
    language = without_tied_head(language, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(vision_dim if seed is None else seed)  # the reference's seed, set right before its projector
        projector = PrismaticProjector(config.use_fused_vision_backbone, vision_dim, text_config.hidden_size)
        tensors |= {f"projector.{name}": tensor for name, tensor in projector.state_dict().items()}
        for name in (EMBEDDING, HEAD, HEAD.replace("weight", "bias")):
            if name in language:
                language[name] = _resize(language[name], text_config.vocab_size, text_config.initializer_range)
    return {**tensors, **language}


def _resize(tensor: torch.Tensor, rows: int, std: float) -> torch.Tensor:
    """Return the first ``rows`` rows; new ones are initialized as transformers does: normal, zero in a bias."""
    new = torch.zeros(max(rows - len(tensor), 0), *tensor.shape[1:])
    if tensor.ndim > 1:
        new.normal_(std=std)
    return torch.cat([tensor[:rows], new.to(tensor.dtype)])
