r"""``openvla assemble``: a new model to train, out of pretrained vision towers, a language model, a fresh projector.

This is where Prismatic and OpenVLA started from: one or two ViTs of timm, a Llama, Mistral, Phi or Qwen2 of Hugging
Face, and between them an MLP that nothing has trained yet. The result is a folder like any other of this package: it
loads on every transformers version, predicts (nonsense, before training), trains, and is verified.

  --towers    one timm id, or two whose features are joined, in that order; also hf-hub:<repository> and
              local-dir:<folder>. Any plain ViT of timm is taken. An id as OpenVLA's configuration writes it means the
              weights that OpenVLA took, although timm may have newer ones under it by now (SigLIP 2).
  --llm       a folder or Hub id with safetensors and its tokenizer

A <PAD> token is added where the tokenizer has no padding token, and the embedding gets rows up to a multiple of 64.
Action bins are the last 256 ids of the vocabulary proper or, with --extra-tokens, 256 new tokens, as in MiniVLA. The
projector is drawn as the reference draws it, from the same seed. Everything else is exactly what timm and the language
model hold: each tower's features are compared with timm's in every bit, and each tensor is read back.

Examples:
  openvla assemble --towers vit_large_patch14_reg4_dinov2.lvd142m vit_so400m_patch14_siglip_224 \
      --llm meta-llama/Llama-2-7b-hf my-prism
  openvla assemble --towers vit_base_patch16_siglip_224.v2_webli --llm Qwen/Qwen2.5-0.5B --extra-tokens my-mini \
      --norm-stats dataset_statistics.json
  openvla assemble --towers local-dir:my-dino/ local-dir:my-siglip/ --llm my-llama/ --dtype bf16 my-model
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import AutoConfig, AutoTokenizer

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
from ..errors_openvla import OpenVLAFileExistsError, OpenVLAImportError, OpenVLAValueError
from ..processing_openvla import OpenVLAProcessor
from ..vision_openvla import ARCHITECTURES, PrismaticProjector, TowerArchitecture, VisionTower
from .convert import DTYPES, PAD_TOKEN, require_fit
from .download import local_folder
from .hub_folder import appearing_whole, write_card, write_manifest, write_surroundings
from .prismatic_format import COMMON, EMBEDDING, EXTRA_TOKENS, FUSED, HEAD, padded, read_json, without_tied_head
from .safetensors_io import parse_size, read_tensors, weight_files, write_shards

REFERENCE_TAG = "webli"  # of timm's SigLIP weights; the reference's timm had no others
# How a language model that is not in the registry is asked, by its type: its BOS must not be a word.
PROMPT_STYLES = {"phi": "openvla-phi", "qwen2": "openvla-mini"}
LLM_MAX_LENGTH = {"qwen2": 32768}  # the registry's; others COMMON's


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``openvla assemble``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--towers", nargs="+", required=True, metavar="TIMM_ID", help="one or two vision towers")
    parser.add_argument("--llm", required=True, metavar="DIR_OR_ID", help="the language model")
    parser.add_argument("target", type=Path, metavar="OUT", help="folder to write; must not exist without --overwrite")
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="default OpenVLA's for these towers, else the last tower's own",
    )
    parser.add_argument(
        "--image-resize-strategy",
        choices=IMAGE_RESIZE_STRATEGIES,
        default="resize-naive",
        help="how images become square (default %(default)s, as in OpenVLA)",
    )
    parser.add_argument("--prompt-style", choices=PROMPTS, help="how instructions are asked; default by language model")
    parser.add_argument("--extra-tokens", action="store_true", help="256 new tokens <|extra_i|> for the action bins")
    parser.add_argument("--norm-stats", type=Path, metavar="FILE", help="action statistics, dataset_statistics.json")
    parser.add_argument("--vlm", action="store_true", help="a vision-language model (Prismatic), without actions")
    parser.add_argument("--seed", type=int, help="of the projector and of new embedding rows; default the reference's")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="fp32", help="of the weights (default %(default)s, lossless)"
    )
    parser.add_argument("--max-shard-size", default="5GB", help="such as 5GB or 500MB (default %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")


def run(args: argparse.Namespace) -> int:
    """Assemble and report; returns the exit status."""
    given = {name: value for name, value in vars(args).items() if name not in ("command", "norm_stats")}
    assemble(norm_stats=read_json(args.norm_stats) if args.norm_stats else None, **given)
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
    max_shard_size: str = "5GB",
    overwrite: bool = False,
) -> None:
    """Assemble a model; the arguments are the command's (see the module's text).

    Raises:
        ValueError: A part cannot be used, or the parts do not fit each other.
        FileExistsError: The target exists and ``overwrite`` is not given.
        ImportError: timm is not installed.
    """
    target, shard_bytes = Path(target), parse_size(max_shard_size)
    if target.exists() and not overwrite:
        raise OpenVLAFileExistsError(f"{target} exists; give another name, or --overwrite to replace it.")
    if len(towers) not in (1, 2):
        raise OpenVLAValueError(f"A model has one or two vision towers, got {len(towers)}: {list(towers)}.")
    if vlm and norm_stats is not None:
        raise OpenVLAValueError("Action statistics belong to a model with actions; leave out --vlm or --norm-stats.")
    _timm()  # before anything is downloaded
    folder = local_folder(llm)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
    text = _vocabulary(_text_config(folder), tokenizer, extra_tokens)
    modules, vision = _towers(towers, image_size)
    fields = {**vision, **_language(str(llm), tokenizer, extra_tokens, prompt_style, text), **text}
    fields |= {"image_resize_strategy": image_resize_strategy, DTYPE_FIELD: DTYPES[dtype]}
    config = PrismaticConfig(**fields) if vlm else OpenVLAConfig(norm_stats=norm_stats, **fields)
    processor = OpenVLAProcessor.for_config(config, tokenizer)
    _require_opening(processor)
    for index, module in enumerate(modules):
        _require_same_pixels(module, config, processor.image_processor, index)
        _require_same_features(module, config, index)
    tensors = _tensors(modules, folder, config, seed)
    require_fit({name: tuple(tensor.shape) for name, tensor in tensors.items()}, config, folder)
    with appearing_whole(target) as written:
        digests = write_shards(written, tensors, DTYPES[dtype], shard_bytes)
        processor.save_pretrained(written)
        write_surroundings(written, config)
        write_card(written, target.name)
        write_manifest(written, digests)
    print(f"{target}: {config.vision_backbone_id} and {llm}, {len(tensors)} tensors; the projector is untrained")


def _timm() -> Any:
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that was built for another torch
        raise OpenVLAImportError(
            "openvla assemble takes its towers from timm, which cannot be imported here: pip install 'openvla[timm]', "
            f"with the torchvision that belongs to your torch. ({error})"
        ) from error
    return timm


def _create(name: str, **kwargs: Any) -> nn.Module:
    """A timm model without its classifier; a timm tower is always a plain ViT here."""
    timm = _timm()
    try:
        model = timm.create_model(name, num_classes=0, **kwargs)
    except (AssertionError, RuntimeError) as error:
        reason = str(error) or "it does not know this kind of id"
        raise OpenVLAValueError(f"timm {timm.__version__} cannot make {name!r}: {reason}") from error
    if not isinstance(model, timm.models.vision_transformer.VisionTransformer):
        raise OpenVLAValueError(f"{name} is a {type(model).__name__}; a tower must be a VisionTransformer of timm.")
    return model.eval()


def _towers(names: Sequence[str], image_size: int | None) -> tuple[list[nn.Module], dict[str, Any]]:
    """Timm's pretrained towers, and the fields of the configuration that describe them."""
    names = [_with_tag(name) for name in names]
    cfgs = [_create(name).pretrained_cfg for name in names]  # what timm knows of them, before any weights are read
    ids = [_known_id(cfg) for cfg in cfgs]
    registered = {
        name: towers[0][1] for name, towers in VISION_BACKBONES.items() if [timm_id for timm_id, _, _ in towers] == ids
    }
    size = image_size or next(iter(registered.values()), None) or cfgs[-1]["input_size"][-1]
    modules, activations = [], []
    for name, cfg in zip(names, cfgs):
        if not any(cfg.get(source) for source in ("url", "file", "hf_hub_id")):
            raise OpenVLAValueError(f"timm knows no pretrained weights of {name!r}; name a tag that has some.")
        # The reference's rule: OpenAI's CLIPs were trained with QuickGELU, which timm does not say of them.
        override = {"act_layer": "quick_gelu"} if cfg.get("tag") == "openai" else {}
        modules.append(_create(name, pretrained=True, img_size=size, **override))
        activations.append(_activation(modules[-1], name))
        print(f"{name}: {cfg['architecture']}, weights {cfg.get('tag') or cfg.get('file')}, {size} pixels")
    return modules, {
        "vision_backbone_id": next((name for name, own in registered.items() if own == size), "+".join(ids)),
        "timm_model_ids": ids,
        "image_sizes": [size] * len(ids),
        "timm_override_act_layers": activations,
        "timm_model_kwargs": [_overrides(module, timm_id) for module, timm_id in zip(modules, ids)],
        "use_fused_vision_backbone": len(ids) == 2,
        "arch_specifier": (FUSED if len(ids) == 2 else COMMON)["arch_specifier"],
    }


def _with_tag(name: str) -> str:
    """A tower's id with the weights that the reference took, where the id alone leaves them to timm's version."""
    return f"{name}.{REFERENCE_TAG}" if name in ARCHITECTURES and "." not in name else name


def _known_id(cfg: Mapping[str, Any]) -> str:
    """The id under which this package knows the model of a timm ``pretrained_cfg``, else timm's own."""
    architecture, tag = cfg["architecture"], cfg.get("tag")
    full = f"{architecture}.{tag}" if tag else architecture
    same = [timm_id for timm_id in ARCHITECTURES if timm_id.split(".")[0] == architecture]
    for timm_id in (full, architecture, *([] if tag else same)):
        if timm_id in ARCHITECTURES:
            return timm_id
    return full


def _activation(module: nn.Module, name: str) -> str | None:
    kind = type(module.blocks[0].mlp.act).__name__
    if kind not in ("GELU", "QuickGELU"):
        raise OpenVLAValueError(f"{name} has the activation {kind}; a tower here has GELU or QuickGELU.")
    return "quick_gelu" if kind == "QuickGELU" else None


def _overrides(module: nn.Module, timm_id: str) -> dict[str, Any]:
    """How a timm tower differs from what its id says here; all of it where the id is not known."""
    block, dim = module.blocks[0], module.embed_dim
    hidden = block.mlp.fc1.out_features
    ratio = hidden / dim
    built = TowerArchitecture(
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
        return asdict(built)
    known = asdict(ARCHITECTURES[timm_id])
    if int(dim * known["mlp_ratio"]) == hidden:
        known["mlp_ratio"] = built.mlp_ratio
    return {name: value for name, value in asdict(built).items() if value != known[name]}


def _require_same_pixels(module: nn.Module, config: PrismaticConfig, images: Any, index: int) -> None:
    """Raise if the checkpoint's image processor would not show a tower what it was pretrained on."""
    own = _timm().data.resolve_model_data_config(module)
    ours = {name: getattr(images, f"{name}s")[index] for name in ("mean", "std", "interpolation")}
    differing = [f"{name} {own[name]}, not {ours[name]}" for name in ours if tuple(own[name]) != tuple(ours[name])]
    if differing:
        raise OpenVLAValueError(
            f"The tower {config.timm_model_ids[index]} was pretrained on images of {'; '.join(differing)}, which this "
            "package's image processor would give it. Take another tower, or correct the pretrained_cfg in its "
            "config.json if that is wrong."
        )


def _require_same_features(module: nn.Module, config: PrismaticConfig, index: int) -> None:
    """Raise if this package's tower, with timm's weights, does not give timm's features in every bit."""
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


def _tower_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name.replace(".gamma", ".scale_factor"): tensor for name, tensor in module.state_dict().items()}


def _text_config(folder: Path) -> dict[str, Any]:
    """The language model's own configuration, without what belongs to its folder."""
    fields = AutoConfig.from_pretrained(folder).to_dict()
    if fields["model_type"] not in LLM_MODEL_TYPES:
        raise OpenVLAValueError(f"{folder} is a {fields['model_type']} model. Allowed: {list(LLM_MODEL_TYPES)}.")
    if fields.get("quantization_config"):
        raise OpenVLAValueError(f"{folder} is quantised; training starts from whole weights.")
    own = ("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version")
    return {name: value for name, value in fields.items() if name not in own}


def _vocabulary(text: dict[str, Any], tokenizer: Any, extra_tokens: bool) -> dict[str, Any]:
    """Padding token and embedding rows as the reference gives them: fields of the configuration."""
    if extra_tokens and tokenizer.add_tokens(EXTRA_TOKENS) != len(EXTRA_TOKENS):
        raise OpenVLAValueError(f"The tokenizer already has some of {EXTRA_TOKENS[0]} to {EXTRA_TOKENS[-1]}.")
    end_of_bins = len(tokenizer) if extra_tokens else tokenizer.vocab_size
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    rows, pad = padded(len(tokenizer)), tokenizer.pad_token_id
    return {
        "text_config": {**text, "vocab_size": rows, "pad_token_id": pad},
        "pad_token_id": pad,
        "pad_to_multiple_of": rows - end_of_bins,
    }


def _language(
    llm: str, tokenizer: Any, extra_tokens: bool, prompt_style: str | None, vocabulary: Mapping[str, Any]
) -> dict[str, Any]:
    """Which language model this is and how it is asked: fields of the configuration."""
    model_type = vocabulary["text_config"]["model_type"]
    registered = [
        name for name, (hub_id, _) in LLM_BACKBONES.items() if hub_id == llm and name.endswith("-extra") == extra_tokens
    ]
    return {
        "llm_backbone_id": next(iter(registered), Path(llm).resolve().name),
        "hf_llm_id": None if Path(llm).is_dir() else llm,
        "llm_max_length": LLM_MAX_LENGTH.get(model_type, COMMON["llm_max_length"]),
        "prompt_style": prompt_style or (AUTO if registered else PROMPT_STYLES.get(model_type, "openvla")),
        # Llama-2's "▁"; Llama-3, of the same type, has none.
        "empty_token_id": tokenizer.get_vocab().get("▁") if model_type == "llama" else None,
    }


def _require_opening(processor: OpenVLAProcessor) -> None:
    """Raise if the image would follow a word: a prompt must open with BOS or another special token."""
    size = processor.image_processor.input_sizes[0][-1]
    ids = processor(instruction="move", images=Image.new("RGB", (size, size)))["input_ids"][0]
    if int(ids[0]) not in processor.tokenizer.all_special_ids:
        raise OpenVLAValueError(
            f"The prompt {processor.prompt('move')!r} opens with token {int(ids[0])}, behind which the image would "
            "stand; choose a --prompt-style that opens with a special token of this language model, one of "
            f"{processor.tokenizer.all_special_tokens}."
        )


def _tensors(
    modules: Sequence[nn.Module], folder: Path, config: PrismaticConfig, seed: int | None
) -> dict[str, torch.Tensor]:
    """Every tensor of the model under its published name; the language model's are mapped from disk."""
    prefixes = ("featurizer", "fused_featurizer")
    tensors = {
        f"vision_backbone.{prefix}.{name}": tensor
        for prefix, module in zip(prefixes, modules)
        for name, tensor in _tower_tensors(module).items()
    }
    text, vision_dim = config.text_config, sum(module.embed_dim for module in modules)
    language = {
        f"language_model.{name}": tensor
        for name, tensor in read_tensors(weight_files(folder))
        if not name.endswith("rotary_emb.inv_freq")  # a computed buffer that old versions saved
    }
    language = without_tied_head(language, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(vision_dim if seed is None else seed)  # the reference seeds so, right before its projector
        projector = PrismaticProjector(config.use_fused_vision_backbone, vision_dim, text.hidden_size)
        tensors |= {f"projector.{name}": tensor for name, tensor in projector.state_dict().items()}
        for name in (EMBEDDING, HEAD, HEAD.replace("weight", "bias")):
            if name in language:
                language[name] = _resized(language[name], text.vocab_size, text.initializer_range)
    return {**tensors, **language}


def _resized(tensor: torch.Tensor, rows: int, spread: float) -> torch.Tensor:
    """The first ``rows`` rows; what is missing is drawn as transformers draws embeddings (zero in a bias)."""
    new = torch.zeros(max(rows - len(tensor), 0), *tensor.shape[1:])
    if tensor.ndim > 1:
        new.normal_(std=spread)
    return torch.cat([tensor[:rows], new.to(tensor.dtype)])
