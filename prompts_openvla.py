"""From an instruction to the ids of the prompt that a model was trained on."""

from __future__ import annotations

import functools
import json
import re
import unicodedata
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np
from transformers.utils import logging

from .configuration_openvla import PROMPTS
from .errors_openvla import OpenVLAValueError

logger = logging.get_logger(__name__)

SLOT = "{instruction}"
SHOWN_CHARACTERS = 120
# What no text holds but what was padded with zero bytes, begins with a byte-order mark, or was decoded wrongly.
NO_TEXT = re.compile("[\x00-\x08\x0e-\x1f\x7f\ufeff\ufffd]")
# What Python writes of bytes, or of an array or list of texts: b'go', ['go'], [b'go'].
WRITTEN_BYTES = re.compile(r"""b(['"]).*\1|\[(b?)(['"]).*\3\]""", re.DOTALL)

# By tokenizer: its size and the special tokens that it had then; its copy without special tokens.
_special_tokens: weakref.WeakKeyDictionary[Any, tuple[int, dict[str, int]]] = weakref.WeakKeyDictionary()
_plain_tokenizers: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def _normal(text: str) -> str:
    """Return text in lower case with single spaces."""
    return " ".join(text.lower().split())


def _parts(prompt: str) -> tuple[str, str, str]:
    """Return what opens a prompt, the question before its instruction, and what follows its question mark."""
    before, after = prompt.split(SLOT)
    question = re.split(r"[\n:]", before)[-1]
    return _normal(before.removesuffix(question)), _normal(question), _normal(after.removeprefix("?"))


OPENINGS, QUESTIONS, ENDINGS = (tuple(dict.fromkeys(parts)) for parts in zip(*map(_parts, PROMPTS.values())))


def bare_instruction(instruction: Any) -> str:
    """Return an instruction as it stands in a prompt: stripped, in lower case.

    Raises:
        ValueError: It is no text, empty, what Python shows of bytes or of a list, or a whole prompt, which would be
            written into a prompt again.
    """
    if isinstance(instruction, bytes):
        raise OpenVLAValueError(
            f"The instruction must be text, got bytes: {instruction!r}; decode them: .decode('utf-8')."
        )
    if not isinstance(instruction, str):
        raise OpenVLAValueError(f"The instruction must say something, got {instruction!r}.")
    return _checked(instruction)


@functools.lru_cache(maxsize=1024)  # a robot is told the same at every step
def _checked(instruction: str) -> str:
    if not any(unicodedata.category(sign)[0] in "LNS" for sign in instruction):
        raise OpenVLAValueError(f"The instruction must say something, got {instruction!r}.")
    _require_characters(instruction)
    if NO_TEXT.search(instruction):
        raise OpenVLAValueError(
            f"The instruction holds what no text has (a control character, a byte-order mark or U+FFFD): "
            f"{ascii(instruction[:SHOWN_CHARACTERS])}. Give plain text: cut padding of zero bytes, and read files as "
            "encoding='utf-8-sig'."
        )
    text = _normal(instruction)
    if WRITTEN_BYTES.fullmatch(text):
        raise OpenVLAValueError(
            f"The instruction is what Python shows of bytes or of a list: {instruction[:SHOWN_CHARACTERS]!r}. Give the "
            "text itself: decode bytes with .decode('utf-8'), take the one entry of a list or an array."
        )
    asks = any(question in text for question in QUESTIONS)
    if asks or text.startswith(OPENINGS) or any(re.search(rf"(^|\W){re.escape(end)}$", text) for end in ENDINGS):
        raise OpenVLAValueError(
            f"The instruction is a whole prompt, or a part of one: {instruction[:SHOWN_CHARACTERS]!r}. The trained "
            "prompt is written around it, so give what the robot should do alone, such as 'pick up the red block'. "
            "(The processor takes a prompt that is whole as text=.)"
        )
    return instruction.strip().lower()


def _require_characters(text: str) -> None:
    if half := re.search("[\ud800-\udfff]", text):
        raise OpenVLAValueError(
            f"The text {text!r:.200} holds half of a surrogate pair ({half[0]!r}), which is no character and must be "
            "left out."
        )


def as_list(texts: Any) -> list[Any]:
    """Return one text or several as a list; what has no order (a set, a dictionary) is one, and so no text."""
    several = np.ndim(texts) == 1 if isinstance(texts, np.ndarray) else isinstance(texts, Iterable)
    return list(texts) if several and not isinstance(texts, (str, bytes, Mapping, Set)) else [texts]


def whole_prompts(text: Any, style: str | None) -> str | list[str]:
    """Return whole prompts as the tokenizer takes them: one, or a list of several.

    A warning is logged for text that is no prompt of any model, or asks for an action otherwise than the checkpoint
    was trained; other questions than those for actions are left alone.

    Args:
        text: One prompt or several.
        style: A key of ``PROMPTS``, or None where it is not known.

    Raises:
        ValueError: They are no texts, or there is none.
    """
    prompts = as_list(text)
    if wrong := [one for one in prompts if not isinstance(one, str) or not one] or [prompts] * (not prompts):
        raise OpenVLAValueError(f"text must be a whole prompt or a list of them, at least one, got {wrong[0]!r:.200}.")
    for one in prompts:
        _require_characters(one)
        normal = _normal(one)
        if not any(part in normal for part in (*OPENINGS, *QUESTIONS, *ENDINGS)):
            logger.warning(
                f"text={one[:SHOWN_CHARACTERS]!r} is no prompt that any model here was trained on, and none is written "
                "around it. If it is what the robot should do, give it as instruction=."
            )
        elif style is not None and any(question in normal for question in QUESTIONS):
            before, after = PROMPTS[style].split(SLOT)
            asked = one.rstrip().removeprefix(before).removesuffix(after.rstrip())
            if before + asked + after.rstrip() != one.rstrip() or asked != asked.lower():
                logger.warning(
                    f"text={one[-SHOWN_CHARACTERS:]!r} asks for an action otherwise than this checkpoint was trained: "
                    f"{PROMPTS[style]!r}, the instruction in lower case. Give the instruction alone as instruction=."
                )
    return text if isinstance(text, str) else prompts


def tokenized_text(
    tokenizer: Any, text: str | list[str], padding: Any, truncation: Any, max_length: int | None, tensors: str | None
) -> dict[str, Any]:
    """Return ids and mask of whole prompts as lists, those of one prompt in a list where tensors are made of them.

    Raises:
        ValueError: Prompts that become one tensor have different lengths.
    """
    padding = False if padding is None else padding
    inputs = tokenizer(text, padding=padding, truncation=truncation, max_length=max_length)
    rows = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    if tensors is not None:
        rows = {name: [row] for name, row in rows.items()} if isinstance(text, str) else rows
        if len(lengths := sorted({len(row) for row in rows["input_ids"]})) > 1:
            raise OpenVLAValueError(
                f"The prompts have different lengths in tokens ({lengths}); they need padding=True."
            )
    return rows


def tokenized_prompts(tokenizer: Any, style: str, instructions: Sequence[str]) -> list[list[int]]:
    """Return the ids of prompts, as the tokenizer gives them, but for special tokens that an instruction spells out.

    Such words (``</s>``) are text there: taken for tokens, they would end the prompt within the instruction.

    Args:
        tokenizer: Of transformers.
        style: A key of ``PROMPTS``.
        instructions: As of ``bare_instruction``.
    """
    rows = tokenizer([PROMPTS[style].format(instruction=instruction) for instruction in instructions])["input_ids"]
    special = _special(tokenizer)
    return [
        _with_text_as_text(tokenizer, special, PROMPTS[style].split(SLOT), instruction)
        if any(word in instruction for word in special)
        else list(row)
        for row, instruction in zip(rows, instructions)
    ]


def require_bos(tokenizer: Any, style: str | None, input_ids: Any, attention_mask: Any) -> None:
    """Raise ValueError where a prompt does not begin with BOS, behind which the model puts the image.

    Without it every patch would stand behind a word. Qwen has no BOS; there the special token that opens the trained
    prompt takes its place.

    Args:
        tokenizer: Of transformers.
        style: A key of ``PROMPTS``, or None.
        input_ids: Of one prompt ``(length,)`` or of several ``(batch, length)``.
        attention_mask: As ``input_ids``.
    """
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None and PROMPTS.get(style or "", "").startswith("<|"):
        bos = tokenizer(PROMPTS[style])["input_ids"][0]
    if bos is None:
        return
    nested = np.ndim(input_ids[0]) > 0
    for row, mask in zip(input_ids, attention_mask) if nested else [(input_ids, attention_mask)]:
        first = next((int(token) for token, seen in zip(row, mask) if seen), None)
        if first != bos:
            raise OpenVLAValueError(
                f"A prompt starts with token {first} instead of BOS ({bos}), behind which the model puts the "
                "image. Use processor(instruction=...), which writes the trained prompt. If it says this too, the "
                "tokenizer's files were probably re-saved by another transformers version; use the original ones."
            )


def _special(tokenizer: Any) -> dict[str, int]:
    """Return the ids of the words that a tokenizer takes for one token wherever they stand."""
    size, special = _special_tokens.get(tokenizer, (None, {}))
    if size != len(tokenizer):
        special = tokenizer.get_added_vocab()
        _special_tokens[tokenizer] = (len(tokenizer), special)
    return special


def _with_text_as_text(tokenizer: Any, special: dict[str, int], template: list[str], instruction: str) -> list[int]:
    """Return the ids of a prompt whose template may hold special tokens, and whose instruction holds none."""
    words = "|".join(re.escape(word) for word in sorted(special, key=len, reverse=True))
    before, after = (re.split(f"({words})", part) for part in template)
    # Special tokens have the odd places, the text between them the even ones.
    pieces = [*before[:-1], before[-1] + instruction + after[0], *after[1:]]
    plain = _plain(tokenizer)
    ids = list(tokenizer("")["input_ids"])  # BOS, where the tokenizer puts one in front
    for place, piece in enumerate(pieces):
        ids += [special[piece]] if place % 2 else plain(piece) if piece else []
    return ids


def _plain(tokenizer: Any) -> Callable[[str], list[int]]:
    """Return what makes ids of text in which no word is a special token."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a slow tokenizer, of transformers 4
        return lambda text: tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    if tokenizer not in _plain_tokenizers:
        fields = {**json.loads(backend.to_str()), "added_tokens": [], "truncation": None, "padding": None}
        _plain_tokenizers[tokenizer] = type(backend).from_str(json.dumps(fields))
    return lambda text: _plain_tokenizers[tokenizer].encode(text, add_special_tokens=False).ids
