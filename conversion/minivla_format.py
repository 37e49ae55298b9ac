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

EXTRA_TOKENS = [f"<|extra_{index}|>" for index in range(256)]  # added to the vocabulary, one token per action bin
# The action tokenizers whose tokens are bins, and whether the bins are <|extra_i|> tokens. The tokens of the others are
# codes of a vector-quantised autoencoder (VQ), which is stored in files of its own.
ACTION_TOKENIZERS = {"action_tokenizer": False, "extra_action_tokenizer": True}


def require_single_image(source: Path, vla: Mapping[str, Any]) -> None:
    """Raise ValueError if a run was trained on several images at a time.

    Args:
        source: The run, for the message.
        vla: The "vla" or "model" fields of its config.json.
    """
    count, wrist = vla.get("image_sequence_len", 1), vla.get("use_wrist_image", False)
    if count != 1 or wrist:
        raise OpenVLAValueError(
            f"{source} was trained on {count} images at a time (image_sequence_len={count}, use_wrist_image={wrist}); "
            "this package gives such a model one image so far, which is not what it was trained on. Convert a run with "
            "image_sequence_len=1."
        )


def bins_are_extra_tokens(source: Path, vla: Mapping[str, Any], llm_backbone_id: str) -> bool:
    """Return whether action bins are the ``<|extra_i|>`` tokens instead of the last tokens of the vocabulary.

    Args:
        source: The run, for messages.
        vla: The "vla" fields of its config.json.
        llm_backbone_id: The reference's id of the language model.

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
    is_extra = ACTION_TOKENIZERS[name]
    if is_extra and not llm_backbone_id.endswith("-extra"):
        raise OpenVLAValueError(
            f"{source}: {name!r} needs the <|extra_i|> tokens, which {llm_backbone_id} does not have."
        )
    return is_extra


def set_vocabulary(source: Path, config: PrismaticConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Add a native run's ``<|extra_i|>`` tokens to the tokenizer, and set ``config.pad_to_multiple_of``.

    ``config.text_config.vocab_size - config.pad_to_multiple_of`` is the id at which the action bins end. For Llama-2
    and Mistral that is 32000 and nothing changes. For the others it follows from the language model's tokenizer, as in
    openvla-mini: the number of all tokens with ``extra_action_tokenizer``, else the size of the vocabulary proper,
    without special and added tokens.

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
        is_extra = bins_are_extra_tokens(source, native["vla"], config.llm_backbone_id)
    rows_after_bins = embedding_rows - (size if is_extra else tokenizer.vocab_size)
    if config.pad_to_multiple_of not in (rows_after_bins, VOCABULARY_MULTIPLE):  # the latter is the default
        raise OpenVLAValueError(
            f"pad_to_multiple_of is overridden as {config.pad_to_multiple_of}, but was {rows_after_bins} in training."
        )
    config.pad_to_multiple_of = rows_after_bins


def padded_vocab_size(vocab_size: int) -> int:
    """Return the number of embedding rows that the reference gives a vocabulary."""
    return -(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
