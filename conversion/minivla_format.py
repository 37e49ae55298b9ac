"""Native runs of openvla-mini (MiniVLA): their action tokenizers and their vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..configuration_openvla import PrismaticConfig
from ..errors_openvla import OpenVLAValueError
from .files import read_json
from .prismatic_registry import VOCABULARY_MULTIPLE
from .vq_format import VQ_TOKENIZERS

EXTRA_TOKENS = [f"<|extra_{index}|>" for index in range(256)]  # added to the vocabulary, for action bins or codes
# The action tokenizers whose tokens are bins, and whether the bins are <|extra_i|> tokens; ``VQ_TOKENIZERS`` has those
# whose tokens are codes of a VQ autoencoder, which is stored in a folder of its own.
ACTION_TOKENIZERS = {"action_tokenizer": False, "extra_action_tokenizer": True}
# Preprocessing of evaluation's frames, by the beginning of a dataset's or a mixture's name.
IMAGE_PRESETS_BY_DATA = {"libero": "minivla-libero-raw", "bridge": "minivla-simpler"}


def image_fields(vla: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration's fields of a run that was trained on several images at a time.

    Args:
        vla: The "vla" or "model" fields of the run's config.json.
    """
    count, wrist = vla.get("image_sequence_len", 1), vla.get("use_wrist_image", False)
    return {"image_sequence_len": count, "use_wrist_image": wrist} if count != 1 or wrist else {}


def vq_tokenizer(source: Path) -> str | None:
    """Return the name of a native run's action tokenizer if its tokens are codes of a VQ autoencoder."""
    name = (read_json(source / "config.json").get("vla") or {}).get("action_tokenizer")
    return name if name in VQ_TOKENIZERS else None


def image_preset_of(source: Path) -> str | None:
    """Return the preset by which openvla-mini prepares evaluation's frames for a run; None for other runs.

    It follows from the run's mixture of datasets, or where that is not named from the keys of its statistics.
    """
    vla = read_json(source / "config.json").get("vla") or {}
    if "action_tokenizer" not in vla:
        return None
    statistics = source / "dataset_statistics.json"
    names = [vla["data_mix"]] if vla.get("data_mix") else [*read_json(statistics)] if statistics.is_file() else []
    presets = {
        next((preset for start, preset in IMAGE_PRESETS_BY_DATA.items() if name.startswith(start)), None)
        for name in names
    }
    return presets.pop() if len(presets) == 1 else None


def actions_are_extra_tokens(source: Path, vla: Mapping[str, Any], llm_backbone_id: str) -> bool:
    """Return whether action tokens are the ``<|extra_i|>`` tokens instead of the last tokens of the vocabulary.

    Args:
        source: The run, for messages.
        vla: The "vla" fields of its config.json.
        llm_backbone_id: The reference's id of the language model.

    Raises:
        ValueError: The run's action tokenizer is unknown, or its vocabulary has no such tokens.
    """
    name = vla.get("action_tokenizer", "action_tokenizer")
    known = {**ACTION_TOKENIZERS, **{name: is_extra for name, (is_extra, _) in VQ_TOKENIZERS.items()}}
    if name not in known:
        raise OpenVLAValueError(
            f"{source} was trained with the action tokenizer {name!r}; this package decodes {list(known)}. Tokens of "
            "another one would be wrong actions."
        )
    is_extra = known[name]
    if is_extra and not llm_backbone_id.endswith("-extra"):
        raise OpenVLAValueError(
            f"{source}: {name!r} needs the <|extra_i|> tokens, which {llm_backbone_id} does not have."
        )
    return is_extra


def set_vocabulary(source: Path, config: PrismaticConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Add a native run's ``<|extra_i|>`` tokens to the tokenizer, and set ``config.pad_to_multiple_of``.

    ``config.text_config.vocab_size - config.pad_to_multiple_of`` is the id at which the action tokens end. For Llama-2
    and Mistral that is 32000 and nothing changes. For the others it follows from the language model's tokenizer, as in
    openvla-mini: the number of all tokens where actions are ``<|extra_i|>`` tokens, else the size of the vocabulary
    proper, without special and added tokens.

    Args:
        source: The run.
        config: Its configuration.
        tokenizer: The language model's tokenizer.

    Raises:
        ValueError: The checkpoint was not trained with a vocabulary of this size.
    """
    if config.text_config.model_type not in ("phi", "qwen2"):
        return
    is_extra = config.llm_backbone_id.endswith("-extra")
    if is_extra:
        tokenizer.add_tokens(EXTRA_TOKENS)
    size, embedding_rows = len(tokenizer), config.text_config.vocab_size
    first_and_last = tokenizer.convert_tokens_to_ids([EXTRA_TOKENS[0], EXTRA_TOKENS[-1]])
    are_last = first_and_last == [size - len(EXTRA_TOKENS), size - 1]
    if padded_vocab_size(size) != embedding_rows or (is_extra and not are_last):
        raise OpenVLAValueError(
            f"A tokenizer of {size} tokens (with those that {config.llm_backbone_id} adds) has "
            f"{padded_vocab_size(size)} rows in the embedding, but the checkpoint has {embedding_rows}; this is not "
            f"the tokenizer of {config.hf_llm_id}."
        )
    native = read_json(source / "config.json")
    if "vla" in native:
        is_extra = actions_are_extra_tokens(source, native["vla"], config.llm_backbone_id)
    rows_behind = embedding_rows - (size if is_extra else tokenizer.vocab_size)
    if config.pad_to_multiple_of not in (rows_behind, VOCABULARY_MULTIPLE):  # the latter is the default
        raise OpenVLAValueError(
            f"pad_to_multiple_of is overridden as {config.pad_to_multiple_of}, but was {rows_behind} in training."
        )
    config.pad_to_multiple_of = rows_behind


def padded_vocab_size(vocab_size: int) -> int:
    """Return the number of embedding rows that the reference gives a vocabulary."""
    return -(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
