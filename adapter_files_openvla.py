"""Adapters on disk and in memory: what they hold, which base they belong to, what they add to a weight.

An adapter folder holds what peft reads (adapter_config.json, adapter_model.safetensors), the model's configuration,
code and action statistics, and in openvla_adapter.json which base it belongs to: its id, and digests of its
configuration and weights. The matrices of an adapter mean something on that base only, so another base is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers.utils import CONFIG_NAME, cached_file, logging
from transformers.utils.hub import extract_commit_hash

from .configuration_openvla import PrismaticConfig, hub_keywords
from .errors_openvla import OpenVLAFileNotFoundError, OpenVLAValueError
from .heads_openvla import is_action_head_param
from .publishing_openvla import ADAPTER_CONFIG_FILE, INDEX_FILE, SINGLE_FILE
from .quantization_openvla import is_quantized, quantization_name

logger = logging.get_logger(__name__)

ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
RECORD_FILE = "openvla_adapter.json"
MATRICES = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
PEFT_PREFIX = "base_model.model."
PEFT_DEFAULT = 8  # of r and lora_alpha, where adapter_config.json does not say
# Fields of peft's configuration that leave W + scaling * B A as it is. Any other one that is set (use_dora,
# rank_pattern, alora_invocation_tokens, what a future peft adds) may give the same matrices another meaning: refused.
PLAIN_FIELDS = {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "bias"}
PLAIN_FIELDS |= {"inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights"}
PLAIN_FIELDS |= {"target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"}
# Of a variant that another field switches on.
PLAIN_FIELDS |= {"megatron_core", "qalora_group_size", "eva_config", "loftq_config", "corda_config", "lora_ga_config"}
PLAIN_FIELDS |= {"runtime_config"}
# Ways in which the matrices begin without a change of the base; pissa, olora, corda, loftq and lora_ga change it.
PLAIN_INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal", "mica")
# What in a configuration gives the weights their meaning, apart from their shapes.
CONFIG_FIELDS = ("timm_model_ids", "timm_override_act_layers", "image_sizes", "image_resize_strategy", "vocab_size")
CONFIG_FIELDS += ("prompt_style", "empty_token_id", "n_action_bins")
TEXT_CONFIG_FIELDS = ("model_type", "num_attention_heads", "num_key_value_heads")
# The share <W, D> / <D, D> of an adapter's change D in a weight W is 1 where D was added to W, else 0 up to noise of
# |W| / sqrt(size of W) / |D|. It is believed where the noise is below NOISE, for one weight or for all together.
HELD, NOISE = (0.7, 1.3), 0.1
SAMPLES = 64  # values of each tensor that go into the digest of the weights


@dataclass
class LoraAdapter:
    """An adapter: how it scales, which base it belongs to, its tensors.

    Attributes:
        r: Rank.
        alpha: Numerator of the scaling.
        rslora: Scale by alpha / sqrt(r) instead of alpha / r.
        base: id and digests of the base (``base_record``); None where an adapter, made by peft alone, does not say.
        default_unnorm_key: As in the model's configuration.
        answer: ``OpenVLAConfig.action_config`` where the model decodes in parallel; its heads are trained whole.
        tensors: By peft's names without its prefix: ``X.lora_A.weight`` ``(r, in)`` and ``X.lora_B.weight``
            ``(out, r)`` beside a linear layer, ``X.lora_embedding_A`` ``(r, rows)`` and ``X.lora_embedding_B``
            ``(dim, r)`` beside an embedding; any other name is a tensor that was trained whole.
    """

    r: int
    alpha: float
    rslora: bool = False
    base: dict[str, Any] | None = None
    default_unnorm_key: str | None = None
    answer: dict[str, Any] | None = None
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    @property
    def adapted(self) -> list[str]:
        """Names of the modules that have matrices."""
        return sorted({name.partition(".lora_")[0] for name in self.tensors if ".lora_" in name})

    @property
    def whole(self) -> list[str]:
        """Names of the tensors that were trained whole."""
        return sorted(name for name in self.tensors if ".lora_" not in name)

    def change(self, module: str) -> torch.Tensor | None:
        """What is added to a module's weight, float32 ``(out, in)`` on the CPU; None for a module without matrices.

        Raises:
            ValueError: A matrix is missing or of another rank.
        """
        for a, b in (MATRICES[:2], MATRICES[2:]):
            down, up = self.tensors.get(module + a), self.tensors.get(module + b)
            if down is None and up is None:
                continue
            if down is None or up is None or (down.shape[0], up.shape[1]) != (self.r, self.r):
                raise OpenVLAValueError(f"The adapter's matrices of {module} are not a pair of rank {self.r}.")
            product = up.detach().to("cpu", torch.float32) @ down.detach().to("cpu", torch.float32)
            return self.scaling * (product if a.startswith(".lora_A") else product.T)
        return None

    def merged(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the base with the adapter in it: float32 on the CPU, rounded once to the tensor's dtype.

        Args:
            name: Of the base's tensor, such as ``X.weight``.
            tensor: The base's tensor; returned as it is where the adapter has nothing to say.

        Raises:
            ValueError: Shapes disagree, or the result is not finite.
        """
        change = self.change(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if name in self.tensors:
            merged = self.tensors[name].detach().to("cpu", tensor.dtype)
        elif change is not None and change.shape == tensor.shape:
            merged = tensor.detach().to("cpu", torch.float32).add(change).to(tensor.dtype)
        elif change is None:
            return tensor
        else:
            merged = change
        if merged.shape != tensor.shape:
            got, wanted = tuple(merged.shape), tuple(tensor.shape)
            raise OpenVLAValueError(f"The adapter's {name} is of shape {got}, the base's {wanted}.")
        if not merged.isfinite().all():
            raise OpenVLAValueError(f"{name} with the adapter is not finite in {tensor.dtype}; use an earlier adapter.")
        return merged


def base_record(model: Any) -> dict[str, Any]:
    """Which base an adapter belongs to.

    Returns:
        ``id`` (Hub id or absolute path), ``revision``, and digests: ``config`` of what gives the weights their meaning,
        ``weights`` of every tensor's name, shape and 64 of its values in bfloat16, without heads and FiLM, which
        adapters carry whole. The latter is the same for a
        checkpoint in float32 or bfloat16, in whatever shards, and also when it was quantised at loading: the files are
        read then. It is None where they are out of reach. ``quantization`` says what the adapter is trained beside.
    """
    stored = getattr(model.config, "quantized_from", None)
    if stored and is_quantized(model):
        return dict(stored)
    source = model.config._name_or_path
    parameters = list(model.named_parameters())
    in_memory = not is_quantized(model) and not any(p.is_meta or p.dtype == torch.float16 for _, p in parameters)
    try:
        weights = weights_digest(parameters if in_memory else _tensors_of_files(source), model.config)
    except OSError:
        weights = None
    return {
        "id": os.path.abspath(source) if os.path.isdir(source) else source,
        "revision": getattr(model.config, "_commit_hash", None),
        "config": config_digest(model.config),
        "weights": weights,
        "quantization": quantization_name(model),
    }


def require_same_base(wanted: dict[str, Any] | None, found: dict[str, Any], adapter: Any) -> None:
    """Raise if an adapter was trained on another base; warn where that cannot be told.

    Raises:
        ValueError: The digests differ; the message says which base it wants.
    """
    if wanted is None:
        logger.warning(f"{adapter} does not say which base it was trained on; make sure that it is {found['id']!r}.")
        return
    other = [name for name in ("config", "weights") if wanted[name] and found[name] and wanted[name] != found[name]]
    if other:
        raise OpenVLAValueError(
            f"{adapter} was trained on {wanted['id']!r}, but this model ({found['id'] or 'not from a file'!r}) has "
            f"other {' and '.join(other)}. Load that base first, then the adapter."
        )
    if not (wanted["weights"] and found["weights"]):
        logger.warning(f"{adapter} was trained on {wanted['id']!r}; whether these are its weights could not be told.")


def require_not_merged(lora: LoraAdapter, weights: Mapping[str, torch.Tensor], adapter: Any) -> None:
    """Raise where the base holds an adapter already, which would then be added twice.

    Args:
        lora: The adapter.
        weights: The base's tensors by name, ``X.weight`` for each adapted ``X``; quantised ones are not looked at.
        adapter: Its name, for the message.

    Raises:
        ValueError: The weights lie along the adapter as far as a merge would have moved them.
    """
    shares, inner, size, variance = [], 0.0, 0.0, 0.0
    for module in lora.adapted:
        weight, down, up = weights.get(f"{module}.weight"), *(lora.tensors.get(module + name) for name in MATRICES[:2])
        if weight is None or down is None or up is None or not weight.is_floating_point() or weight.is_meta:
            continue
        weight, down, up = (tensor.detach().to(weight.device, torch.float32) for tensor in (weight, down, up))
        along = lora.scaling * float(((up.T @ weight) * down).sum())
        square = lora.scaling**2 * float(((up.T @ up) * (down @ down.T)).sum())
        noise = float(weight.pow(2).mean()) * square
        inner, size, variance = inner + along, size + square, variance + noise
        if square and math.sqrt(noise) < NOISE * square:
            shares.append(along / square)
    if not shares and size and math.sqrt(variance) < NOISE * size:
        shares = [inner / size]
    inside = [share for share in shares if HELD[0] < share < HELD[1]]
    if shares and len(inside) > 0.8 * len(shares):
        raise OpenVLAValueError(
            f"{adapter} is merged into these weights already ({len(inside)} of {len(shares)} measured parts hold it); "
            "adding it again would double it. Use the weights as they are, or give the base that it was trained on."
        )


def beside_or_above(adapter: str | os.PathLike, name: str, hub: dict[str, Any] | None = None) -> str | None:
    """Return the path of an adapter's file, or of that in the folder above, as published scripts leave it, or None."""
    file = optional_file(adapter, name, hub)
    above = Path(os.path.abspath(adapter)).parent / name
    if file is None and os.path.isdir(adapter) and above.is_file():
        logger.warning(f"{adapter} has no {name}; that of the folder above is used: {above}.")
        return str(above)
    return file


def quantized_merge_note(base: dict[str, Any]) -> str:
    """What merging an adapter that was trained beside quantised weights implies."""
    return (
        f"The adapter was trained beside {base['quantization']} weights and is merged into those of {base['id']}, "
        "which are not rounded so: outputs differ from the trained ones by what quantisation had changed. Compare them "
        "on your data."
    )


def config_digest(config: PrismaticConfig) -> str:
    """sha256 of what in a configuration gives the weights their meaning, apart from their shapes."""
    fields = {name: getattr(config, name, None) for name in CONFIG_FIELDS}
    fields["text_config"] = {name: getattr(config.text_config, name, None) for name in TEXT_CONFIG_FIELDS}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def weights_digest(tensors: Iterable[tuple[str, torch.Tensor]], config: PrismaticConfig) -> str:
    """sha256 of every tensor's name, shape and 64 of its values in bfloat16; a tied head counts once."""
    lines, skipped = {}, ["rotary_emb.inv_freq"]  # a computed buffer that old versions saved
    if config.text_config.tie_word_embeddings:
        skipped.append("lm_head.weight")
    for name, tensor in tensors:
        if name.endswith(tuple(skipped)) or is_action_head_param(name):
            continue
        flat = tensor.detach().reshape(-1)
        chosen = torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel()), dtype=torch.float64).long()
        sample = flat[chosen.to(flat.device)].cpu().to(torch.bfloat16).view(torch.int16)
        lines[name] = [list(tensor.shape), hashlib.sha256(sample.numpy().tobytes()).hexdigest()]
    return hashlib.sha256(json.dumps(lines, sort_keys=True).encode()).hexdigest()


def _tensors_of_files(source: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield names and tensors, mapped from disk, of the safetensors that transformers loads from a source."""
    index = None if optional_file(source, SINGLE_FILE) else optional_file(source, INDEX_FILE)
    if index is None:
        names = [SINGLE_FILE]
    else:
        names = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    for name in names:
        with safe_open(cached_file(source, name), framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118  no mapping
                yield key, opened.get_tensor(key)


def read_adapter(name_or_path: str | os.PathLike, **hub: Any) -> LoraAdapter:
    """An adapter from a folder or Hub repository, made by this package or by peft.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is no plain LoRA, damaged, or a tensor is not finite.
    """
    config_file, file, record_file = (
        optional_file(name_or_path, name, hub) for name in (ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, RECORD_FILE)
    )
    if config_file is None or file is None:
        missing = ADAPTER_WEIGHTS_FILE if config_file else ADAPTER_CONFIG_FILE
        raise OpenVLAFileNotFoundError(f"{name_or_path} is no adapter: it has no {missing}.")
    config = json.loads(Path(config_file).read_text(encoding="utf-8"))
    _require_plain(config, name_or_path)
    record = json.loads(Path(record_file).read_text(encoding="utf-8")) if record_file else {}
    try:
        tensors = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in load_file(file).items()}
    except Exception as error:  # safetensors raises its own error class from Rust
        raise OpenVLAValueError(
            f"{file} is no whole safetensors file: {error}. Copy it again from its source."
        ) from error
    unknown = [name for name in tensors if ".lora_" in name and not name.endswith(MATRICES)]
    if unknown:
        raise OpenVLAValueError(f"{name_or_path} is not plain LoRA ({unknown[:3]}): not supported.")
    infinite = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if infinite:
        raise OpenVLAValueError(
            f"{name_or_path}: {infinite[:3]} is not finite; training diverged. Use an earlier adapter."
        )
    return LoraAdapter(
        config.get("r", PEFT_DEFAULT),
        config.get("lora_alpha", PEFT_DEFAULT),
        bool(config.get("use_rslora")),
        record.get("base"),
        record.get("default_unnorm_key"),
        record.get("answer"),
        tensors,
    )


def _require_plain(config: dict[str, Any], name_or_path: str | os.PathLike) -> None:
    """Raise unless a configuration of peft describes W + scaling * B A on the base as it is."""
    if config.get("peft_type") != "LORA":
        raise OpenVLAValueError(f"{name_or_path} is not plain LoRA ({config.get('peft_type')}): not supported.")
    if config.get("bias", "none") != "none":
        raise OpenVLAValueError(f"{name_or_path} is not plain LoRA (bias={config['bias']!r}): not supported.")
    unusual = sorted(name for name, value in config.items() if value and name not in PLAIN_FIELDS)
    if unusual:
        raise OpenVLAValueError(f"{name_or_path} is not plain LoRA ({unusual}): not supported.")
    start = config.get("init_lora_weights", True)
    if start not in PLAIN_INITIALISATIONS:
        raise OpenVLAValueError(
            f"{name_or_path} was trained from init_lora_weights={start!r}, which also changes the base; on the base as "
            "it is, it would be another model. Convert it to plain LoRA with peft: "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )


def adapter_source(
    name_or_path: str | os.PathLike | None, kwargs: dict[str, Any]
) -> tuple[str | os.PathLike | None, dict[str, Any]]:
    """The adapter that a call of ``from_pretrained`` is for, or None, and where on the Hub its files come from."""
    hub = hub_keywords(kwargs)
    asked = kwargs.pop("adapter_kwargs", None) or {}
    found = asked.get("_adapter_model_path")
    if found is not None:  # by an Auto class, which may have put the base's revision in the place of the adapter's
        hub.pop("revision", None)
        return found, {**hub, **hub_keywords(asked)}
    is_adapter = name_or_path is not None and optional_file(name_or_path, ADAPTER_CONFIG_FILE, hub) is not None
    return (name_or_path if is_adapter else None), hub


def base_of(adapter: str | os.PathLike, hub: dict[str, Any]) -> tuple[str, str | None]:
    """The id or path of an adapter's base, and its revision on the Hub.

    Raises:
        FileNotFoundError: The adapter does not say, or its base was a folder that is not here.
    """
    config = json.loads(Path(optional_file(adapter, ADAPTER_CONFIG_FILE, hub)).read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path")
    if not base or (os.path.isabs(base) and not os.path.isdir(base)):
        raise OpenVLAFileNotFoundError(
            f"The base of {adapter}, {base!r}, is not here. Load it from where it is, then model.load_lora(adapter)."
        )
    return base, None if os.path.isdir(base) else config.get("revision")


def revision_of(name_or_path: str | os.PathLike, hub: dict[str, Any]) -> str | None:
    """The commit that a Hub repository's files are of; None for a folder."""
    return extract_commit_hash(optional_file(name_or_path, CONFIG_NAME, hub), None)


def optional_file(name_or_path: str | os.PathLike, name: str, hub: dict[str, Any] | None = None) -> str | None:
    """A file of a folder or Hub repository, or None if it is not there."""
    return cached_file(
        name_or_path,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **(hub or {}),
    )


def peft_config(lora: LoraAdapter) -> dict[str, Any]:
    """The adapter_config.json that every peft since 0.11 reads."""
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": lora.base["id"] or None,
        "revision": lora.base["revision"],
        "inference_mode": True,
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "use_rslora": lora.rslora,
        "bias": "none",
        "target_modules": lora.adapted,
        "modules_to_save": sorted({name.rpartition(".")[0] for name in lora.whole}) or None,
    }
