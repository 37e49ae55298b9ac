"""Checks of instructions and prompts: text that is no instruction raises, an untrained prompt gives a warning."""

from __future__ import annotations

import functools
import re

from transformers.utils import logging

from ..configuration_openvla import PROMPTS, TRACE_PROMPT, UNTRACED_PROMPT
from ..errors_openvla import OpenVLAValueError
from ..processing_openvla import PLACEHOLDER

logger = logging.get_logger(__name__)

SHOWN_CHARACTERS = 120
# Characters that text padded with zero bytes, text with a byte-order mark, or wrongly decoded text holds.
NOT_TEXT = re.compile("[\x00-\x08\x0e-\x1f\x7f\ufeff\ufffd]")
# Python's representation of bytes, or of an array or list of texts: b'go', ['go'], [b'go'].
PYTHON_REPR = re.compile(r"""b(['"]).*\1|\[(b?)(['"]).*\3\]""", re.DOTALL)


def _normalize_text(text: str) -> str:
    """Return text in lower case with single spaces."""
    return " ".join(text.lower().split())


def _prompt_parts(prompt: str) -> tuple[str, str, str]:
    """Return a prompt's opening, the question before its instruction, and what follows the question mark."""
    before, after = prompt.split(PLACEHOLDER)
    question = re.split(r"[\n:.]", before)[-1]
    opening = before.removesuffix(question)
    return _normalize_text(opening), _normalize_text(question), _normalize_text(after.removeprefix("?"))


OPENINGS, QUESTIONS, ENDINGS = (tuple(dict.fromkeys(parts)) for parts in zip(*map(_prompt_parts, PROMPTS.values())))


@functools.lru_cache(maxsize=1024)  # a robot gets the same instruction at every step
def check_instruction(instruction: str) -> None:
    """Check that an instruction is plain text that says what the robot should do.

    Raises:
        ValueError: Python's representation of bytes or of a list, characters that no text has, or a complete prompt,
            which would be written into a prompt again.
    """
    if NOT_TEXT.search(instruction):
        raise OpenVLAValueError(
            f"The instruction holds what no text has (a control character, a byte-order mark or U+FFFD): "
            f"{ascii(instruction[:SHOWN_CHARACTERS])}. Give plain text: cut padding of zero bytes, and read files as "
            "encoding='utf-8-sig'."
        )
    text = _normalize_text(instruction)
    if PYTHON_REPR.fullmatch(text):
        raise OpenVLAValueError(
            f"The instruction is what Python shows of bytes or of a list: {instruction[:SHOWN_CHARACTERS]!r}. Give the "
            "text itself: decode bytes with .decode('utf-8'), take the one entry of a list or an array."
        )
    has_question = any(question in text for question in QUESTIONS)
    has_ending = any(re.search(rf"(^|\W){re.escape(end)}$", text) for end in ENDINGS)
    if has_question or has_ending or text.startswith(OPENINGS):
        raise OpenVLAValueError(
            f"The instruction is a whole prompt, or a part of one: {instruction[:SHOWN_CHARACTERS]!r}. The trained "
            "prompt is written around it, so give what the robot should do alone, such as 'pick up the red block'. "
            "(The processor takes a prompt that is whole as text=.)"
        )


def check_prompt(prompt: str, style: str | None) -> None:
    """Warn of text that is no prompt of any model, or of a question for an action that the model was not trained on.

    Args:
        prompt: A whole prompt; questions that do not ask for an action are not checked.
        style: A key of ``PROMPTS``, or None where it is not known.
    """
    normalized = _normalize_text(prompt)
    if not any(part in normalized for part in (*OPENINGS, *QUESTIONS, *ENDINGS)):
        logger.warning(
            f"text={prompt[:SHOWN_CHARACTERS]!r} is no prompt that any model here was trained on, and none is "
            "written around it. If it is what the robot should do, give it as instruction=."
        )
    elif style is not None and any(question in normalized for question in QUESTIONS):
        styles = (style, UNTRACED_PROMPT) if style == TRACE_PROMPT else (style,)
        if not any(_is_prompt(prompt, PROMPTS[known]) for known in styles):
            logger.warning(
                f"text={prompt[-SHOWN_CHARACTERS:]!r} differs from the prompt that this checkpoint was trained on: "
                f"{PROMPTS[style]!r}, the instruction in lower case. Give the instruction alone as instruction=."
            )


def _is_prompt(prompt: str, template: str) -> bool:
    """Return whether a prompt is a template around an instruction in lower case."""
    before, after = template.split(PLACEHOLDER)
    instruction = prompt.rstrip().removeprefix(before).removesuffix(after.rstrip())
    return before + instruction + after.rstrip() == prompt.rstrip() and instruction == instruction.lower()
