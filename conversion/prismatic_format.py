"""The native Prismatic layout: its registry of models, its tensor names, its files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..configuration_openvla import LLM_BACKBONES, PROMPTS, OpenVLAConfig, PrismaticConfig
from ..errors_openvla import OpenVLAFileNotFoundError, OpenVLAValueError
from ..modeling_openvla import STATISTICS_FILE
from .safetensors_io import read_pickle

CHECKPOINT_FOLDER = "checkpoints"
CHECKPOINT_FILE = "latest-checkpoint.pt"
COMPONENTS = ("vision_backbone", "projector", "llm_backbone")
EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
VOCABULARY_MULTIPLE = 64  # the reference rounds the number of embedding rows up to it
EXTRA_TOKENS = [f"<|extra_{index}|>" for index in range(256)]  # openvla-mini's, for action bins alone

# The reference's registry of base VLMs (prismatic/conf/models.py), as differences from its commonest entry.
COMMON = {
    "vision_backbone_id": "clip-vit-l-336px",
    "llm_backbone_id": "vicuna-v15-7b",
    "arch_specifier": "no-align+gelu-mlp",
    "image_resize_strategy": "letterbox",
    "llm_max_length": 2048,
}
FUSED = {"arch_specifier": "no-align+fused-gelu-mlp"}
TOWERS = {
    "in1k-224px": {"vision_backbone_id": "in1k-vit-l"},
    "dinov2-224px": {"vision_backbone_id": "dinov2-vit-l"},
    "clip-224px": {"vision_backbone_id": "clip-vit-l"},
    "siglip-224px": {"vision_backbone_id": "siglip-vit-so400m"},
    "clip-336px": {},
    "siglip-384px": {"vision_backbone_id": "siglip-vit-so400m-384px"},
    "dinoclip-336px": {"vision_backbone_id": "dinoclip-vit-l-336px", **FUSED},
    "dinosiglip-384px": {"vision_backbone_id": "dinosiglip-vit-so-384px", **FUSED},
    "dinosiglip-224px": {"vision_backbone_id": "dinosiglip-vit-so-224px", **FUSED},
}
STRATEGIES = {f"-{name}": {"image_resize_strategy": name} for name in ("letterbox", "resize-crop", "resize-naive")}
NAIVE = {"image_resize_strategy": "resize-naive"}
LLAMA_7B, LLAMA_13B = {"llm_backbone_id": "llama2-7b-pure"}, {"llm_backbone_id": "llama2-13b-pure"}
PRISMS = {
    "prism-clip": {},
    "prism-siglip": TOWERS["siglip-384px"],
    "prism-dinosiglip": TOWERS["dinosiglip-384px"],
    "prism-dinosiglip-224px": TOWERS["dinosiglip-224px"],
}
COMMON_VLMS = (
    "one-stage",
    "full-ft-one-stage",
    "vicuna-no-cotraining",
    "train-1.25-epochs",
    "train-1.5-epochs",
    "train-2-epochs",
    "train-3-epochs",
    "llava-lvis4v",
    "llava-lrv",
    "llava-lvis4v-lrv",
)
BASE_VLMS: dict[str, dict[str, Any]] = {
    "reproduction-llava-v15+7b": {"arch_specifier": "gelu-mlp"},
    "reproduction-llava-v15+13b": {"arch_specifier": "gelu-mlp", "llm_backbone_id": "vicuna-v15-13b"},
    "full-ft-multi-stage+7b": {"arch_specifier": "gelu-mlp"},
    "one-stage+13b": {"llm_backbone_id": "vicuna-v15-13b"},
    "llama2+7b": LLAMA_7B,
    "llama2+13b": LLAMA_13B,
    "llama2-chat+7b": {"llm_backbone_id": "llama2-7b-chat"},
    "llama2-chat+13b": {"llm_backbone_id": "llama2-13b-chat"},
    "mistral-v0.1+7b": {"llm_backbone_id": "mistral-v0.1-7b-pure"},
    "mistral-instruct-v0.1+7b": {"llm_backbone_id": "mistral-v0.1-7b-instruct"},
    "phi-2+3b": {"llm_backbone_id": "phi-2-3b"},
    "llama2-no-cotraining+7b": LLAMA_7B,
    "prism-siglip+13b": {**NAIVE, **LLAMA_13B},  # sic: the reference's entry keeps CLIP's tower
    **{f"{name}+7b": {} for name in COMMON_VLMS},
    **{f"{tower}+7b": fields for tower, fields in TOWERS.items()},
    **{
        f"{tower}{strategy}+7b": {**fields, **change}
        for tower, fields in TOWERS.items()
        for strategy, change in STRATEGIES.items()
    },
    **{f"{name}{kind}+7b": {**f, **NAIVE, **LLAMA_7B} for name, f in PRISMS.items() for kind in ("", "-controlled")},
    **{
        f"{name}{kind}+13b": {**f, **NAIVE, **LLAMA_13B}
        for name, f in PRISMS.items()
        for kind in ("", "-controlled")
        if (name, kind) != ("prism-siglip", "")
    },
    **{
        f"prism-{kind}-dinosiglip-224px+0_5b": {
            **{**TOWERS["dinosiglip-224px"], **NAIVE, "llm_max_length": 32768},
            "llm_backbone_id": backbone,
        }
        for kind, backbone in (("qwen25", "qwen25-0_5b-pure"), ("qwen25-extra", "qwen25-0_5b-extra"))
    },
}
# openvla-mini's action tokenizers whose tokens are bins, and whether the bins are <|extra_i|>. The tokens of its others
# are codes of a vector-quantised autoencoder (VQ), which lies in files of its own.
ACTION_TOKENIZERS = {"action_tokenizer": False, "extra_action_tokenizer": True}
# Attention heads of the registry's language models; every other size is read off the tensors.
ATTENTION_HEADS = {
    **dict.fromkeys(("llama2-13b-pure", "llama2-13b-chat", "vicuna-v15-13b"), 40),
    **dict.fromkeys(("qwen25-0_5b-pure", "qwen25-0_5b-extra"), 14),
    "qwen25-1_5b-pure": 12,
    "qwen25-3b-pure": 16,
}
COMMON_ATTENTION_HEADS = 32
CHAT_ENDINGS = ("-chat", "-instruct")
# What tensors do not say either, where it is not transformers' default: facts of the language models' own config.json,
# and the padding token that the reference adds (Qwen has one). rms_norm_eps of the Llamas stays at transformers' 1e-6:
# the reference's converter left it there, as every published checkpoint says.
TEXT_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"pad_token_id": 32000},
    "mistral": {"pad_token_id": 32000, "rms_norm_eps": 1e-5, "max_position_embeddings": 32768},
    "phi": {"pad_token_id": 50295, "bos_token_id": 50256, "eos_token_id": 50256, "partial_rotary_factor": 0.4},
    "qwen2": {
        "pad_token_id": 151643,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
    },
}


def renames(config: PrismaticConfig) -> list[tuple[str, str]]:
    """Native and Hub prefixes of a model's tensors; read left to right to convert, right to left to go back."""
    if config.use_fused_vision_backbone:
        second = "clip" if config.vision_backbone_id.startswith("dinoclip") else "siglip"
        towers = [("dino_featurizer.", "featurizer."), (f"{second}_featurizer.", "fused_featurizer.")]
    else:
        towers = [("featurizer.", "featurizer.")]
    layers = ("0", "2", "4") if config.use_fused_vision_backbone else ("0", "2")
    return [
        *((f"vision_backbone.{native}", f"vision_backbone.{hub}") for native, hub in towers),
        *(
            (f"projector.projector.{native}.", f"projector.fc{number}.")
            for number, native in enumerate(layers, start=1)
        ),
        ("llm_backbone.llm.", "language_model."),
    ]


def to_hub_name(native: str, config: PrismaticConfig) -> str:
    """The Hub name of a native tensor; an unknown one is returned as it is."""
    for old, new in renames(config):
        if native.startswith(old):
            return re.sub(r"(\.ls[12])\.gamma$", r"\1.scale_factor", new + native.removeprefix(old))
    return native


def to_native_name(hub: str, config: PrismaticConfig) -> str:
    """The native name of a Hub tensor."""
    for old, new in renames(config):
        if hub.startswith(new):
            return re.sub(r"(\.ls[12])\.scale_factor$", r"\1.gamma", old + hub.removeprefix(new))
    raise OpenVLAValueError(f"Tensor {hub!r} has no place in the native layout.")


def choose_checkpoint(names: Iterable[str], wanted: str | None) -> str:
    """Which file in checkpoints/ to take: the one named, else latest-checkpoint.pt, else the highest step.

    Raises:
        FileNotFoundError: There is none.
    """
    there = sorted(names)
    files = [name for name in there if name.endswith(".pt") and wanted in (None, name)]
    if not files:
        raise OpenVLAFileNotFoundError(f"{CHECKPOINT_FOLDER} holds no {wanted or '*.pt'}; there is {there}.")
    if wanted is None and CHECKPOINT_FILE in files:
        return CHECKPOINT_FILE
    return max(files, key=lambda name: int((re.search(r"step-(\d+)", name) or [0, 0])[1]))


def native_file(source: Path, checkpoint: str | None) -> Path:
    """The checkpoint to take from a run (see :func:`choose_checkpoint`)."""
    folder = source / CHECKPOINT_FOLDER
    try:
        return folder / choose_checkpoint([file.name for file in folder.glob("*")], checkpoint)
    except FileNotFoundError as error:
        raise OpenVLAFileNotFoundError(f"{source}: {error}") from error


def native_tensors(file: Path) -> dict[str, torch.Tensor]:
    """``component.name -> tensor`` of a native checkpoint, mapped from disk."""
    model = read_pickle(file).get("model")
    if not isinstance(model, dict) or any(name not in model for name in COMPONENTS):
        got = sorted(model) if isinstance(model, dict) else "no 'model'"
        raise OpenVLAValueError(f"{file} is no native checkpoint: it needs model/{', '.join(COMPONENTS)}, got {got}.")
    surplus = [name for name, part in model.items() if name not in COMPONENTS and len(part)]
    if surplus:
        raise OpenVLAValueError(f"{file} holds parts that this model does not have: {surplus}.")
    return {
        f"{component}.{name.removeprefix('module.')}": tensor
        for component in COMPONENTS
        for name, tensor in model[component].items()
        if not name.endswith("rotary_emb.inv_freq")  # a computed buffer that old versions saved
    }


def native_config(source: Path, tensors: Mapping[str, torch.Tensor], overrides: dict[str, Any]) -> PrismaticConfig:
    """The configuration of a native run: the registry, sizes from the tensors, then the overrides."""
    native = read_json(source / "config.json")
    if "vla" in native:
        vla = native["vla"] if isinstance(native["vla"], dict) else {}
        fields = {**COMMON, **BASE_VLMS[_base_vlm(source, vla.get("base_vlm"))]}
        _bins_are_extra(source, vla, fields["llm_backbone_id"])
        if fields["llm_backbone_id"].endswith(CHAT_ENDINGS) and "prompt_style" not in overrides:
            raise OpenVLAValueError(
                f"{source}: {fields['llm_backbone_id']} was asked through its chat template, which is none of the "
                f"prompts known here ({list(PROMPTS)}). If the run used one of them, give prompt_style by "
                "--config-overrides."
            )
    else:
        missing = [name for name in COMMON if name not in native["model"]]
        if missing:
            raise OpenVLAValueError(f"{source}/config.json: 'model' lacks {missing}.")
        fields = {name: native["model"][name] for name in COMMON}
    _require_one_image(source, native.get("vla") or native["model"])
    if fields["arch_specifier"].endswith("linear"):
        raise OpenVLAValueError(f"A projector of kind {fields['arch_specifier']!r} has no place in the Hub's model.")
    backbone, text_overrides = fields["llm_backbone_id"], overrides.get("text_config", {})
    known = TEXT_CONFIGS.get(text_overrides.get("model_type") or LLM_BACKBONES.get(backbone, (None, None))[1], {})
    pad = {name: value for name, value in {**known, **overrides}.items() if name == "pad_token_id"}
    heads = text_overrides.get("num_attention_heads") or ATTENTION_HEADS.get(backbone, COMMON_ATTENTION_HEADS)
    text_config = {**_sizes(tensors, heads), **known, **pad, **text_overrides}
    if text_config.get("pad_token_id", 0) >= text_config["vocab_size"]:
        raise OpenVLAValueError(
            f"The checkpoint's embedding has {text_config['vocab_size']} rows, none for {backbone}'s padding token "
            f"{text_config['pad_token_id']}; if its vocabulary is another, give pad_token_id by --config-overrides."
        )
    fields = {**fields, **pad, **overrides, "text_config": text_config}
    if "vla" not in native:
        return PrismaticConfig(**fields)
    return OpenVLAConfig(norm_stats=read_json(source / STATISTICS_FILE), **fields)


def _sizes(tensors: Mapping[str, torch.Tensor], heads: int) -> dict[str, Any]:
    """The language model's sizes, read off its tensors."""
    prefix = "llm_backbone.llm.model."
    embedding = tensors.get(f"{prefix}embed_tokens.weight")
    first = {name.removeprefix(f"{prefix}layers.0."): t for name, t in tensors.items() if f"{prefix}layers.0." in name}
    inner = first.get("mlp.gate_proj.weight", first.get("mlp.fc1.weight"))
    key = first.get("self_attn.k_proj.weight")
    if embedding is None or inner is None or key is None:
        raise OpenVLAValueError("The checkpoint's language model has no embedding or no first layer.")
    layers = {
        int(name.removeprefix(f"{prefix}layers.").split(".")[0]) for name in tensors if f"{prefix}layers." in name
    }
    vocab_size, hidden_size = embedding.shape
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": inner.shape[0],
        "num_hidden_layers": len(layers),
        "num_attention_heads": heads,
        "num_key_value_heads": max(key.shape[0] * heads // hidden_size, 1),
    }


def _base_vlm(source: Path, given: Any) -> str:
    """The registry's name of a run's base VLM, which may be given as the folder that it lay in."""
    name, own = Path(str(given)).name, Path(str(given)) / "config.json"
    if own.is_file():  # as openvla-mini reads it
        model = read_json(own).get("model")
        name = str(model.get("model_id")) if isinstance(model, dict) else name
    name = name.split("+stage-")[0]  # a run's folder is named <model_id>+stage-finetune+x7
    for known in BASE_VLMS:
        if name in (known, known.replace("+", "-")):  # the latter on the Hub, which allows no "+"
            return known
    raise OpenVLAValueError(f"{source}/config.json: unknown base_vlm {given!r}. Known: {sorted(BASE_VLMS)}.")


def _require_one_image(source: Path, vla: Mapping[str, Any]) -> None:
    count, wrist = vla.get("image_sequence_len", 1), vla.get("use_wrist_image", False)
    if count != 1 or wrist:
        raise OpenVLAValueError(
            f"{source} was trained on {count} images at a time (image_sequence_len={count}, use_wrist_image={wrist}); "
            "this package gives a model one image so far, which would not be what it saw. Convert a run with "
            "image_sequence_len=1."
        )


def _bins_are_extra(source: Path, vla: Mapping[str, Any], backbone: str) -> bool:
    """Whether action bins are the ``<|extra_i|>`` tokens, else the last of the vocabulary.

    Raises:
        ValueError: The run's actions are not bins, or its vocabulary has no such tokens.
    """
    name = vla.get("action_tokenizer", "action_tokenizer")
    if name not in ACTION_TOKENIZERS:
        raise OpenVLAValueError(
            f"{source} was trained with the action tokenizer {name!r}; this package decodes {list(ACTION_TOKENIZERS)} "
            "so far. Tokens of a VQ tokenizer are codes of a vector-quantised autoencoder: read as bins they would be "
            "wrong actions."
        )
    extra = ACTION_TOKENIZERS[name]
    if extra and not backbone.endswith("-extra"):
        raise OpenVLAValueError(f"{source}: {name!r} needs the <|extra_i|> tokens, which {backbone} does not have.")
    return extra


def fit_vocabulary(source: Path, config: PrismaticConfig, tokenizer: Any) -> None:
    """Count a native run's action bins, and add its ``<|extra_i|>`` tokens, as openvla-mini does.

    Llama-2's and Mistral's bins end at 32000 and need nothing. Others are counted from the language model's own
    tokenizer: with ``extra_action_tokenizer`` from the end of all its tokens, else from the end of its vocabulary
    proper, in front of the special tokens.

    Raises:
        ValueError: The checkpoint was not trained with a vocabulary of this size.
    """
    if config.text_config.model_type not in ("phi", "qwen2"):
        return
    extra = config.llm_backbone_id.endswith("-extra")
    if extra:
        tokenizer.add_tokens(EXTRA_TOKENS)
    size, rows = len(tokenizer), config.text_config.vocab_size
    ends = tokenizer.convert_tokens_to_ids([EXTRA_TOKENS[0], EXTRA_TOKENS[-1]])
    if padded(size) != rows or (extra and ends != [size - len(EXTRA_TOKENS), size - 1]):
        raise OpenVLAValueError(
            f"A tokenizer of {size} tokens (with those that {config.llm_backbone_id} adds) has {padded(size)} rows in "
            f"the embedding, but the checkpoint has {rows}; this is not the tokenizer of {config.hf_llm_id}."
        )
    native = read_json(source / "config.json")
    if "vla" in native:
        extra = _bins_are_extra(source, native["vla"], config.llm_backbone_id)
    rest = rows - (size if extra else tokenizer.vocab_size)
    if config.pad_to_multiple_of not in (rest, VOCABULARY_MULTIPLE):  # the latter is the configuration's default
        raise OpenVLAValueError(
            f"pad_to_multiple_of is overridden as {config.pad_to_multiple_of}, but was {rest} in training."
        )
    config.pad_to_multiple_of = rest


def padded(vocab_size: int) -> int:
    """Embedding rows that the reference gives a vocabulary."""
    return -(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def without_tied_head(tensors: Mapping[str, torch.Tensor], config: PrismaticConfig) -> dict[str, torch.Tensor]:
    """Hub tensors without a head that is the embedding under a second name, as transformers saves tied models.

    Raises:
        ValueError: The two differ although the configuration says that they are one.
    """
    if not config.tie_word_embeddings or not {HEAD, EMBEDDING} <= set(tensors):
        return dict(tensors)
    if not torch.equal(tensors[HEAD], tensors[EMBEDDING]):
        raise OpenVLAValueError(
            f"{config.hf_llm_id} ties its head to its embedding, but {HEAD} and {EMBEDDING} differ; the checkpoint is "
            "damaged, or was not made by the reference's code."
        )
    return {name: tensor for name, tensor in tensors.items() if name != HEAD}


def native_state(tensors: Iterable[tuple[str, torch.Tensor]], config: PrismaticConfig) -> dict[str, Any]:
    """Hub tensors as the nested dictionary that a native checkpoint holds."""
    model: dict[str, dict[str, torch.Tensor]] = {component: {} for component in COMPONENTS}
    for name, tensor in tensors:
        component, native = to_native_name(name, config).split(".", 1)
        model[component][native] = tensor
        if name == EMBEDDING and config.tie_word_embeddings:  # the reference's files have both names
            model[component][to_native_name(HEAD, config).split(".", 1)[1]] = tensor
    return {"model": model}


def native_run_config(config: PrismaticConfig) -> dict[str, Any]:
    """A native config.json for a model that was not converted from one."""
    fields = {name: getattr(config, name) for name in COMMON}
    if config.model_type != OpenVLAConfig.model_type:
        return {"model": fields}
    base = next((name for name in sorted(BASE_VLMS) if {**COMMON, **BASE_VLMS[name]} == fields), None)
    if base is None:
        raise OpenVLAValueError(f"No base_vlm of the reference's registry has {fields}.")
    if config.text_config.model_type != "qwen2":
        return {"vla": {"base_vlm": base}}
    extra = config.llm_backbone_id.endswith("-extra") and config.pad_to_multiple_of < VOCABULARY_MULTIPLE
    name = next(name for name, is_extra in ACTION_TOKENIZERS.items() if is_extra == extra)
    vla = {"base_vlm": base, "action_tokenizer": name, "image_sequence_len": 1, "use_wrist_image": False}
    return {"vla": vla}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        FileNotFoundError: There is no file.
        ValueError: It holds no JSON object.
    """
    if not path.is_file():
        raise OpenVLAFileNotFoundError(f"{path.parent} has no {path.name}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OpenVLAValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise OpenVLAValueError(f"{path} must hold a JSON object, got {type(content).__name__}.")
    return content
