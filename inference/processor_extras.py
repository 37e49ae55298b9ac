"""Functions that the installed package adds to processors: image presets, checks of prompts, readable tokenizer files.

``loading.attach_package`` gives this module to the processors (``OpenVLAProcessor.package``).
"""

from __future__ import annotations

import json
from pathlib import Path

from ..configuration_openvla import write_json
from .image_presets import IMAGE_PRESETS
from .prompt_checks import check_instruction, check_prompt

__all__ = ["IMAGE_PRESETS", "check_instruction", "check_prompt", "make_tokenizer_readable"]


def make_tokenizer_readable(folder: Path) -> None:
    """Rewrite what transformers 5 and tokenizers 0.20 write into the tokenizer's files and 4.40 cannot read."""
    config_file, tokenizer_file = folder / "tokenizer_config.json", folder / "tokenizer.json"
    if config_file.is_file():
        config = json.loads(config_file.read_text(encoding="utf-8"))
        if config.get("tokenizer_class") == "TokenizersBackend":
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
            write_json(config_file, config)
    if tokenizer_file.is_file():
        tokenizer = json.loads(tokenizer_file.read_text(encoding="utf-8"))
        merges = tokenizer["model"].get("merges") or []
        if merges and not isinstance(merges[0], str) and not any(" " in part for pair in merges for part in pair):
            tokenizer["model"]["merges"] = [" ".join(pair) for pair in merges]
            write_json(tokenizer_file, tokenizer)
