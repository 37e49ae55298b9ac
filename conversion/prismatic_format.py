"""The native Prismatic layout: its files, its tensor names, its configuration."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..configuration_openvla import LLM_BACKBONES, PROMPTS, OpenVLAConfig, PrismaticConfig
from ..errors_openvla import OpenVLAFileNotFoundError, OpenVLAValueError
from ..modeling_openvla import STATISTICS_FILE
from ..prismatic_openvla import SEPARATOR
from .files import read_json
from .minivla_format import ACTION_TOKENIZERS, actions_are_extra_tokens, image_fields
from .prismatic_registry import (
    ATTENTION_HEADS,
    BASE_VLMS,
    CHAT_ENDINGS,
    COMMON,
    COMMON_ATTENTION_HEADS,
    TEXT_CONFIGS,
    VOCABULARY_MULTIPLE,
)
from .torch_archive import load_torch_file
from .tracevla_format import with_trace_prompting
from .vq_format import vq_tokenizer_name

CHECKPOINT_FOLDER = "checkpoints"
CHECKPOINT_FILE = "latest-checkpoint.pt"
COMPONENTS = ("vision_backbone", "projector", "llm_backbone")
EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"


def name_prefixes(config: PrismaticConfig) -> list[tuple[str, str]]:
    """Return pairs of a native and a Hub prefix of tensor names."""
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
        *([(SEPARATOR, SEPARATOR)] if config.trace_prompting else []),
    ]


def to_hub_name(native_name: str, config: PrismaticConfig) -> str:
    """Return the Hub name of a native tensor; an unknown name is returned unchanged."""
    for native, hub in name_prefixes(config):
        if native_name.startswith(native):
            return re.sub(r"(\.ls[12])\.gamma$", r"\1.scale_factor", hub + native_name.removeprefix(native))
    return native_name


def to_native_name(hub_name: str, config: PrismaticConfig) -> str:
    """Return the native name of a Hub tensor.

    Raises:
        ValueError: The native layout has no such tensor.
    """
    for native, hub in name_prefixes(config):
        if hub_name.startswith(hub):
            return re.sub(r"(\.ls[12])\.scale_factor$", r"\1.gamma", native + hub_name.removeprefix(hub))
    raise OpenVLAValueError(f"Tensor {hub_name!r} does not exist in the native layout.")


def choose_checkpoint(names: Iterable[str], checkpoint: str | None) -> str:
    """Choose the file in checkpoints/ to convert.

    Args:
        names: Names of the files in checkpoints/.
        checkpoint: The file's name; None takes latest-checkpoint.pt, else the highest step.

    Raises:
        FileNotFoundError: There is no such file.
    """
    available = sorted(names)
    candidates = [name for name in available if name.endswith(".pt") and checkpoint in (None, name)]
    if not candidates:
        raise OpenVLAFileNotFoundError(f"{CHECKPOINT_FOLDER} holds no {checkpoint or '*.pt'}; there is {available}.")
    if checkpoint is None and CHECKPOINT_FILE in candidates:
        return CHECKPOINT_FILE
    return max(candidates, key=_step)


def _step(name: str) -> int:
    match = re.search(r"step-(\d+)", name)
    return int(match[1]) if match else 0


def native_file(source: Path, checkpoint: str | None) -> Path:
    """Return the checkpoint file of a native run to convert (see :func:`choose_checkpoint`)."""
    folder = source / CHECKPOINT_FOLDER
    try:
        return folder / choose_checkpoint([file.name for file in folder.glob("*")], checkpoint)
    except FileNotFoundError as error:
        raise OpenVLAFileNotFoundError(f"{source}: {error}") from error


def native_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a native checkpoint by ``component.name``, mapped from disk.

    Raises:
        ValueError: The file is damaged, holds code, or is no native checkpoint.
    """
    model = load_torch_file(file).get("model")
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


def native_config(
    source: Path,
    tensors: Mapping[str, torch.Tensor],
    overrides: Mapping[str, Any],
    vq_fields: Mapping[str, Any] | None = None,
) -> PrismaticConfig:
    """Return the configuration of a native run.

    Args:
        source: The run; its config.json names an entry of the registry, or holds the fields.
        tensors: Its tensors, which show the language model's sizes.
        overrides: Fields of the configuration that replace those of the run.
        vq_fields: Fields of its VQ autoencoder.

    Raises:
        ValueError: The run is unknown or cannot be represented, or its padding token does not fit its embedding.
        FileNotFoundError: config.json or dataset_statistics.json is missing.
    """
    native = read_json(source / "config.json")
    is_vla = "vla" in native
    fields = _vla_fields(source, native["vla"], overrides) if is_vla else _vlm_fields(source, native["model"])
    fields |= {**image_fields(native.get("vla") or native["model"]), **(vq_fields or {})}
    if fields["arch_specifier"].endswith("linear"):
        raise OpenVLAValueError(f"A projector of kind {fields['arch_specifier']!r} does not exist in the Hub's model.")
    fields |= _language_model_fields(fields["llm_backbone_id"], tensors, overrides)
    if not is_vla:
        return PrismaticConfig(**fields)
    fields = with_trace_prompting({"model_type": OpenVLAConfig.model_type, **fields}, tensors)
    del fields["model_type"]
    return OpenVLAConfig(norm_stats=read_json(source / STATISTICS_FILE), **fields)


def _vla_fields(source: Path, vla: Any, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the registry's fields of the base VLM of a native run with actions."""
    vla = vla if isinstance(vla, dict) else {}
    fields = {**COMMON, **BASE_VLMS[_base_vlm(source, vla.get("base_vlm"))]}
    actions_are_extra_tokens(source, vla, fields["llm_backbone_id"])  # raises where its actions cannot be decoded
    if fields["llm_backbone_id"].endswith(CHAT_ENDINGS) and "prompt_style" not in overrides:
        raise OpenVLAValueError(
            f"{source}: {fields['llm_backbone_id']} was prompted through its chat template, which is none of the "
            f"prompts known here ({list(PROMPTS)}). If the run used one of them, give prompt_style by "
            "--config-overrides."
        )
    return fields


def _vlm_fields(source: Path, model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a native vision-language model, a run without actions."""
    missing = [name for name in COMMON if name not in model]
    if missing:
        raise OpenVLAValueError(f"{source}/config.json: 'model' lacks {missing}.")
    return {name: model[name] for name in COMMON}


def _language_model_fields(
    llm_backbone_id: str, tensors: Mapping[str, torch.Tensor], overrides: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the overrides with text_config, and pad_token_id: the registry's facts and the tensors' sizes."""
    text_overrides = overrides.get("text_config", {})
    model_type = text_overrides.get("model_type") or LLM_BACKBONES.get(llm_backbone_id, (None, None))[1]
    defaults = TEXT_CONFIGS.get(model_type or "", {})
    pad = {name: value for name, value in {**defaults, **overrides}.items() if name == "pad_token_id"}
    num_heads = text_overrides.get("num_attention_heads") or ATTENTION_HEADS.get(
        llm_backbone_id, COMMON_ATTENTION_HEADS
    )
    text_config = {**_language_model_sizes(tensors, num_heads), **defaults, **pad, **text_overrides}
    if text_config.get("pad_token_id", 0) >= text_config["vocab_size"]:
        raise OpenVLAValueError(
            f"The checkpoint's embedding has {text_config['vocab_size']} rows, none for {llm_backbone_id}'s padding "
            f"token {text_config['pad_token_id']}; if its vocabulary is another, give pad_token_id by "
            "--config-overrides."
        )
    return {**pad, **overrides, "text_config": text_config}


def _language_model_sizes(tensors: Mapping[str, torch.Tensor], num_attention_heads: int) -> dict[str, Any]:
    """Return the fields of text_config that the tensors' shapes show."""
    prefix = "llm_backbone.llm.model."
    first_layer = f"{prefix}layers.0."
    first = {name.removeprefix(first_layer): tensor for name, tensor in tensors.items() if first_layer in name}
    embedding = tensors.get(f"{prefix}embed_tokens.weight")
    up_proj = first.get("mlp.gate_proj.weight", first.get("mlp.fc1.weight"))
    k_proj = first.get("self_attn.k_proj.weight")
    if embedding is None or up_proj is None or k_proj is None:
        raise OpenVLAValueError("The checkpoint's language model has no embedding or no first layer.")
    layers = {
        int(name.removeprefix(f"{prefix}layers.").split(".")[0]) for name in tensors if f"{prefix}layers." in name
    }
    vocab_size, hidden_size = embedding.shape
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": up_proj.shape[0],
        "num_hidden_layers": len(layers),
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": max(k_proj.shape[0] * num_attention_heads // hidden_size, 1),
    }


def _base_vlm(source: Path, base_vlm: Any) -> str:
    """Return the registry's name of a run's base VLM, which may be recorded as the path of its folder."""
    name, config_file = Path(str(base_vlm)).name, Path(str(base_vlm)) / "config.json"
    if config_file.is_file():  # as openvla-mini reads it
        model = read_json(config_file).get("model")
        name = str(model.get("model_id")) if isinstance(model, dict) else name
    name = name.split("+stage-")[0]  # a run's folder is named <model_id>+stage-finetune+x7
    for known in BASE_VLMS:
        if name in (known, known.replace("+", "-")):  # the latter on the Hub, which allows no "+"
            return known
    raise OpenVLAValueError(f"{source}/config.json: unknown base_vlm {base_vlm!r}. Known: {sorted(BASE_VLMS)}.")


def without_tied_head(tensors: Mapping[str, torch.Tensor], config: PrismaticConfig) -> dict[str, torch.Tensor]:
    """Return Hub tensors without a head that is tied to the embedding, as transformers saves tied models.

    Raises:
        ValueError: Head and embedding differ although the configuration ties them.
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
    """Return the nested dictionary of a native checkpoint for Hub tensors."""
    model: dict[str, dict[str, torch.Tensor]] = {component: {} for component in COMPONENTS}
    for name, tensor in tensors:
        component, native = to_native_name(name, config).split(".", 1)
        model[component][native] = tensor
        if name == EMBEDDING and config.tie_word_embeddings:  # the reference's files have both names
            model[component][to_native_name(HEAD, config).split(".", 1)[1]] = tensor
    return {"model": model}


def native_run_config(config: PrismaticConfig) -> dict[str, Any]:
    """Return a native config.json for a model that was not converted from a native run.

    Raises:
        ValueError: The reference's registry has no such model.
    """
    fields = {name: getattr(config, name) for name in COMMON}
    if not isinstance(config, OpenVLAConfig):
        return {"model": fields}
    base_vlm = next((name for name in sorted(BASE_VLMS) if {**COMMON, **BASE_VLMS[name]} == fields), None)
    if base_vlm is None:
        raise OpenVLAValueError(f"No base_vlm of the reference's registry has {fields}.")
    if config.text_config.model_type != "qwen2":
        return {"vla": {"base_vlm": base_vlm}}
    is_extra = config.llm_backbone_id.endswith("-extra") and config.pad_to_multiple_of < VOCABULARY_MULTIPLE
    if config.action_vq is not None:
        action_tokenizer = vq_tokenizer_name(config, is_extra)
    else:
        action_tokenizer = next(name for name, uses_extra in ACTION_TOKENIZERS.items() if uses_extra == is_extra)
    return {
        "vla": {
            "base_vlm": base_vlm,
            "action_tokenizer": action_tokenizer,
            "image_sequence_len": config.image_sequence_len or 1,
            "use_wrist_image": config.use_wrist_image,
        }
    }
