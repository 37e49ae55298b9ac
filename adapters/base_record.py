"""Record of the base model that an adapter was trained on, and the checks against it.

The matrices of an adapter mean something on one base only. So openvla_adapter.json holds the base's id and digests of
its configuration and weights, and a model with other digests is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from safetensors import safe_open
from transformers import PretrainedConfig
from transformers.utils import cached_file, logging

from ..configuration_openvla import optional_file
from ..errors_openvla import OpenVLAValueError
from ..heads_openvla import is_action_head_param
from ..quantization_openvla import is_quantized, quantization_name
from ..saved_folder import INDEX_FILE, SINGLE_FILE
from ..vq_openvla import VQ_MODULE
from .files import LINEAR_SUFFIXES, BaseRecord, LoraAdapter

if TYPE_CHECKING:
    from ..modeling_openvla import OpenVLAForActionPrediction

logger = logging.get_logger(__name__)

# Configuration fields that give the weights their meaning, apart from their shapes.
CONFIG_FIELDS = (
    "timm_model_ids",
    "timm_override_act_layers",
    "image_sizes",
    "image_resize_strategy",
    "vocab_size",
    "prompt_style",
    "empty_token_id",
    "n_action_bins",
)
TEXT_CONFIG_FIELDS = ("model_type", "num_attention_heads", "num_key_value_heads")
DIGEST_SAMPLES = 64  # values of each tensor that go into the digest of the weights
# The share <W, D> / <D, D> of an adapter's change D in a weight W is 1 where D was added to W, else 0 up to noise of
# |W| / sqrt(size of W) / |D|. It counts where the noise is below MAX_NOISE, for one weight or for all together.
MERGED_SHARES, MAX_NOISE = (0.7, 1.3), 0.1


def record_base(model: OpenVLAForActionPrediction) -> BaseRecord:
    """Return the record of a model as the base of an adapter.

    The digest of the weights covers every tensor's name, shape and 64 of its values in bfloat16, without heads and
    FiLM, which adapters carry in full. It is the same for a checkpoint in float32 or bfloat16, in any shards, and also
    when it was quantised at loading: the files are read then. It is None where they cannot be reached.
    """
    stored: BaseRecord | None = getattr(model.config, "quantized_from", None)
    if stored and is_quantized(model):
        return stored.copy()
    source = model.config._name_or_path
    parameters: list[tuple[str, torch.Tensor]] = list(model.named_parameters())
    parameters += [(name, buffer) for name, buffer in model.named_buffers() if name.startswith(f"{VQ_MODULE}.")]
    in_memory = not is_quantized(model) and not any(p.is_meta or p.dtype == torch.float16 for _, p in parameters)
    weights: str | None
    try:
        weights = weights_digest(parameters if in_memory else _read_tensors(source), model.config)
    except OSError:
        weights = None
    return BaseRecord(
        id=os.path.abspath(source) if os.path.isdir(source) else source,
        revision=getattr(model.config, "_commit_hash", None),
        config=config_digest(model.config),
        weights=weights,
        quantization=quantization_name(model),
    )


def config_digest(config: PretrainedConfig) -> str:
    """Return the sha256 of the configuration fields that give the weights their meaning, apart from their shapes."""
    fields = {name: getattr(config, name, None) for name in CONFIG_FIELDS}
    fields["text_config"] = {name: getattr(config.text_config, name, None) for name in TEXT_CONFIG_FIELDS}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def weights_digest(tensors: Iterable[tuple[str, torch.Tensor]], config: PretrainedConfig) -> str:
    """Return the sha256 of every tensor's name, shape and 64 of its values in bfloat16; a tied head counts once."""
    entries: dict[str, tuple[list[int], str]] = {}
    skipped = ["rotary_emb.inv_freq"]  # a computed buffer that old versions saved
    if config.text_config.tie_word_embeddings:
        skipped.append("lm_head.weight")
    for name, tensor in tensors:
        if name.endswith(tuple(skipped)) or is_action_head_param(name):
            continue
        flat = tensor.detach().reshape(-1)
        count = min(DIGEST_SAMPLES, flat.numel())
        indices = torch.linspace(0, flat.numel() - 1, count, dtype=torch.float64).long()
        sample = flat[indices.to(flat.device)].cpu().to(torch.bfloat16).view(torch.int16)
        entries[name] = (list(tensor.shape), hashlib.sha256(sample.numpy().tobytes()).hexdigest())
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def _read_tensors(source: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield names and memory-mapped tensors of the safetensors files that transformers loads from a source.

    Raises:
        OSError: There is no file, or it cannot be reached.
    """
    index = None if optional_file(source, SINGLE_FILE) else optional_file(source, INDEX_FILE)
    if index is None:
        names = [SINGLE_FILE]
    else:
        names = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    for name in names:
        with safe_open(cached_file(source, name), framework="pt") as weights:
            for key in weights.keys():  # noqa: SIM118  no mapping
                yield key, weights.get_tensor(key)


def require_same_base(expected: BaseRecord | None, actual: BaseRecord, adapter: str | os.PathLike[str]) -> None:
    """Raise if an adapter was trained on another base; warn where it cannot be told.

    Args:
        expected: Record in the adapter; None where it has none.
        actual: Record of the model that it shall be loaded on.
        adapter: Its name, for the message.

    Raises:
        ValueError: The digests differ; the message names the expected base.
    """
    if expected is None:
        logger.warning(f"{adapter} does not say which base it was trained on; make sure that it is {actual['id']!r}.")
        return
    parts: tuple[Literal["config"], Literal["weights"]] = ("config", "weights")
    different = [part for part in parts if expected[part] and actual[part] and expected[part] != actual[part]]
    if different:
        raise OpenVLAValueError(
            f"{adapter} was trained on {expected['id']!r}, but this model ({actual['id'] or 'not from a file'!r}) has "
            f"other {' and '.join(different)}. Load that base first, then the adapter."
        )
    if not (expected["weights"] and actual["weights"]):
        logger.warning(f"{adapter} was trained on {expected['id']!r}; could not check that these are its weights.")


def require_not_merged(
    adapter: LoraAdapter, weights: Mapping[str, torch.Tensor], name_or_path: str | os.PathLike[str]
) -> None:
    """Raise where the base holds the adapter already, which would then be added twice.

    Args:
        adapter: The adapter.
        weights: The base's tensors by name, ``X.weight`` for each adapted ``X``; quantised ones are skipped.
        name_or_path: The adapter's name, for the message.

    Raises:
        ValueError: The adapter's change is in the weights to the extent that merging would give.
    """
    shares, total_inner, total_square, total_variance = [], 0.0, 0.0, 0.0
    for module in adapter.target_modules:
        weight, a, b = weights.get(f"{module}.weight"), *(adapter.tensors.get(module + end) for end in LINEAR_SUFFIXES)
        if weight is None or a is None or b is None or not weight.is_floating_point() or weight.is_meta:
            continue
        weight, a, b = (tensor.detach().to(weight.device, torch.float32) for tensor in (weight, a, b))
        inner = adapter.scaling * float(((b.T @ weight) * a).sum())  # <W, D>
        square = adapter.scaling**2 * float(((b.T @ b) * (a @ a.T)).sum())  # <D, D>
        variance = float(weight.pow(2).mean()) * square
        total_inner, total_square = total_inner + inner, total_square + square
        total_variance += variance
        if square and math.sqrt(variance) < MAX_NOISE * square:
            shares.append(inner / square)
    if not shares and total_square and math.sqrt(total_variance) < MAX_NOISE * total_square:
        shares = [total_inner / total_square]
    merged = [share for share in shares if MERGED_SHARES[0] < share < MERGED_SHARES[1]]
    if shares and len(merged) > 0.8 * len(shares):
        raise OpenVLAValueError(
            f"{name_or_path} is merged into these weights already ({len(merged)} of {len(shares)} measured parts "
            "hold it); adding it again would double it. Use the weights as they are, or give the base that it was "
            "trained on."
        )


def quantized_merge_note(base: BaseRecord) -> str:
    """Return what the user has to know of a merge of an adapter that was trained beside quantised weights."""
    return (
        f"The adapter was trained beside {base['quantization']} weights and is merged into the unquantised weights of "
        f"{base['id']}: outputs differ from the trained model's by the quantisation error. Compare them on your data."
    )
