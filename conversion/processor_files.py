"""The processor and tokenizer of a Hub folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..configuration_openvla import PrismaticConfig
from ..default_processor import default_processor
from ..errors_openvla import OpenVLAFileNotFoundError, OpenVLAValueError
from ..processing_openvla import OpenVLAImageProcessor
from .files import read_json

PAD_TOKEN = "<PAD>"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # any of them means that a tokenizer is there
COPIED_TOKENIZER_FILES = (
    *TOKENIZER_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
)


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder holds a tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def load_tokenizer(
    source: Path, tokenizer: str | os.PathLike | None, config: PrismaticConfig
) -> PreTrainedTokenizerBase:
    """Load a tokenizer and give it the padding token that the model was trained with.

    Args:
        source: The checkpoint's folder.
        tokenizer: Folder or Hub id; None takes the tokenizer in ``source``.
        config: The model's configuration.

    Raises:
        FileNotFoundError: ``tokenizer`` is None and ``source`` has no tokenizer.
        ValueError: The tokenizer's padding token is not the model's.
    """
    if tokenizer is None and not has_tokenizer(source):
        raise OpenVLAFileNotFoundError(
            f"No tokenizer lies in {source}; pass the language model's own, --tokenizer DIR_OR_ID (here that of "
            f"{config.hf_llm_id}). Another one would give other prompts, and other actions."
        )
    loaded = AutoTokenizer.from_pretrained(source if tokenizer is None else tokenizer, padding_side="right")
    if loaded.pad_token is None:
        loaded.add_special_tokens({"pad_token": PAD_TOKEN})
    if loaded.pad_token_id != config.pad_token_id:
        raise OpenVLAValueError(
            f"The tokenizer pads with {loaded.pad_token_id} but the model with {config.pad_token_id}; this is not "
            f"the tokenizer of {config.hf_llm_id}."
        )
    return loaded


def copy_tokenizer_files(source: Path, folder: Path) -> None:
    """Copy a tokenizer's files as they are, not as the installed transformers would write them."""
    for name in COPIED_TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copy(source / name, folder / name)


def write_processor(
    source: Path,
    folder: Path,
    config: PrismaticConfig,
    tokenizer: str | os.PathLike | None = None,
    image_preset: str | None = None,
) -> None:
    """Write a saved folder's processor in the layout that every transformers version reads.

    Args:
        source: The saved folder.
        folder: Where to write.
        config: The model's configuration, which names the prompt.
        tokenizer: Folder or Hub id of another tokenizer; None takes the one in ``source`` and copies its files.
        image_preset: Preprocessing that evaluation applies to frames; None keeps the one of ``source``.
    """
    processor = default_processor(
        config, load_tokenizer(source, tokenizer, config), OpenVLAImageProcessor.from_pretrained(source)
    )
    old_file = source / "processor_config.json"
    old_preset = read_json(old_file).get("image_preset") if old_file.is_file() else None
    processor.image_preset = image_preset or old_preset
    processor.save_pretrained(folder)
    if tokenizer is None:
        copy_tokenizer_files(source, folder)
