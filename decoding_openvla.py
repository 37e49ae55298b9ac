"""From prompts and image patches to action tokens: how sequences are laid out and how tokens are chosen.

Plain functions on tensors and on a language model; nothing here knows about images, configuration or robots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .compatibility_openvla import CACHE_FIELD, cache_of, cached_length
from .errors_openvla import OpenVLAValueError

NO_ACTION_REMEDY = (
    "Check that prompt, image and unnorm_key belong to this checkpoint, or pass constrain_actions=True (of the "
    "command: --constrain-actions) to choose among action tokens only."
)


class NoActionError(OpenVLAValueError):
    """An answer of a model that is no action: it ended early, holds words, or numbers that are not finite.

    Attributes:
        code: "no_action", by which the policy server and its clients name this error.
    """

    code = "no_action"


def given_names(arguments: Mapping[str, Any]) -> str:
    """Return the names of the arguments that ask for something: those that are neither None nor False."""
    return ", ".join(name for name, value in arguments.items() if value is not None and value is not False)


def require_one_pass(
    generate_kwargs: Mapping[str, Any], draft: Any, constrain_actions: bool, action_head: str | None
) -> None:
    """Raise ValueError for arguments of ``predict_action`` that parallel decoding has no use for."""
    asked = {name for name, value in generate_kwargs.items() if value and (name, value) != ("num_beams", 1)}
    unused = sorted(asked - {"use_cache"})
    if unused:
        raise OpenVLAValueError(f"A parallel-decoding model answers a chunk in one pass, without {', '.join(unused)}.")
    if draft is not None:
        raise OpenVLAValueError("draft is for a model that answers token by token; leave it out.")
    if constrain_actions and action_head is not None:
        raise OpenVLAValueError(
            f"constrain_actions is for answers in tokens, not for action_head {action_head!r}; leave it out."
        )


def align_prompts(
    input_ids: torch.LongTensor, attention_mask: torch.Tensor | None, pad_token_id: int | None, device: torch.device
) -> tuple[torch.LongTensor, torch.LongTensor | None]:
    """Checked prompts on ``device`` with every row's padding moved to its left.

    Args:
        input_ids: Integer ``(batch, length)``, padded on either side.
        attention_mask: ``(batch, length)``, zero on padding; None if there is none.
        pad_token_id: What padding looks like, to notice padding without a mask.
        device: Where the model takes tokens.

    Returns:
        int64 ids ``(batch, length)`` and mask of the same shape, None where nothing is masked.

    Raises:
        ValueError: Wrong rank or type, a mask of another shape, padding without a mask, a row of nothing but padding.
    """
    if not torch.is_tensor(input_ids) or input_ids.ndim != 2 or input_ids.dtype not in (torch.int64, torch.int32):
        got = f"{input_ids.dtype} {tuple(input_ids.shape)}" if torch.is_tensor(input_ids) else type(input_ids).__name__
        raise OpenVLAValueError(f"input_ids must be an integer tensor of shape (batch, length), got {got}.")
    input_ids = input_ids.to(device=device, dtype=torch.long)
    if input_ids.numel() == 0:
        raise OpenVLAValueError(f"input_ids are empty: shape {tuple(input_ids.shape)}.")
    if attention_mask is None:
        if len(input_ids) > 1 and pad_token_id is not None and bool((input_ids == pad_token_id).any()):
            raise OpenVLAValueError(
                f"input_ids hold the padding token {pad_token_id} but there is no attention_mask; pass the one that "
                "the processor returned."
            )
        return input_ids, None
    if attention_mask.shape != input_ids.shape:
        raise OpenVLAValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)} but input_ids {tuple(input_ids.shape)}."
        )
    attention_mask = attention_mask.to(device=device, dtype=torch.long)
    if bool(attention_mask.all()):
        return input_ids, None
    if not bool(attention_mask.any(dim=1).all()):
        raise OpenVLAValueError("attention_mask hides a whole prompt.")
    trailing = attention_mask.flip(1).argmax(dim=1, keepdim=True)
    order = (torch.arange(input_ids.shape[1], device=device) - trailing) % input_ids.shape[1]
    return input_ids.gather(1, order), attention_mask.gather(1, order)


def append_token(
    input_ids: torch.LongTensor, attention_mask: torch.LongTensor | None, token_id: int, pad_token_id: int | None
) -> tuple[torch.LongTensor, torch.LongTensor | None]:
    """Left-padded prompts that all end in ``token_id``: it is appended, with its mask, to the rows that lack it."""
    has = input_ids[:, -1:] == token_id
    if bool(has.all()):
        return input_ids, attention_mask
    end = torch.full_like(input_ids[:, -1:], token_id)
    appended = torch.cat([input_ids, end], dim=1)
    if not bool(has.any()):
        one = torch.ones_like(end)
        return appended, None if attention_mask is None else torch.cat([attention_mask, one], dim=1)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    shifted = torch.cat([torch.full_like(end, pad_token_id or 0), input_ids], dim=1)
    mask_of_shifted = torch.cat([torch.zeros_like(end), mask], dim=1)
    mask_of_appended = torch.cat([mask, torch.ones_like(end)], dim=1)
    return torch.where(has, shifted, appended), torch.where(has, mask_of_shifted, mask_of_appended)


def insert_after_bos(sequence: torch.Tensor, inserted: torch.Tensor, bos: torch.LongTensor) -> torch.Tensor:
    """``inserted`` put after position ``bos`` of every row of ``sequence``.

    Args:
        sequence: ``(batch, length, ...)``.
        inserted: ``(batch, count, ...)``, same trailing shape and dtype.
        bos: int64 ``(batch,)``, each row's position.

    Returns:
        ``(batch, length + count, ...)``.
    """
    length, count = sequence.shape[1], inserted.shape[1]
    bos = bos[:, None]
    target = torch.arange(length + count, device=bos.device)
    # Where each output position comes from, in [sequence, inserted] laid end to end.
    from_inserted = (target > bos) & (target <= bos + count)
    source = torch.where(from_inserted, length + target - bos - 1, torch.where(target <= bos, target, target - count))
    both = torch.cat([sequence, inserted], dim=1)
    index = source.to(both.device).view(*source.shape, *[1] * (both.ndim - 2)).expand(-1, -1, *both.shape[2:])
    return both.gather(1, index)


def positions_of(mask: torch.Tensor) -> torch.LongTensor:
    """Position ids ``(batch, length)`` that count from each row's first visible token.

    A token masked later keeps its place, as in the reference; only left padding is not counted.
    """
    start = mask.to(torch.long).argmax(dim=1, keepdim=True)
    return (torch.arange(mask.shape[1], device=mask.device) - start).clamp(min=0)


def has_gap(mask: torch.Tensor) -> bool:
    """Whether a left-padded mask hides a token after a visible one."""
    return bool((mask[:, 1:] < mask[:, :-1]).any())


def require_finite(logits: torch.Tensor) -> torch.Tensor:
    """Return what the model gave, logits or actions, if every number is finite; else raise NoActionError."""
    if not bool(torch.isfinite(logits).all()):
        raise NoActionError(
            "What the model gave is not finite, so no action can be trusted. Check weights and image for NaN; float16 "
            "overflows in Llama-2: use bfloat16 or float32."
        )
    return logits


def only(scores: torch.FloatTensor, allowed: slice) -> torch.FloatTensor:
    """Scores ``(..., vocabulary)`` with every id outside ``allowed`` at minus infinity."""
    masked = torch.full_like(scores, -torch.inf)
    masked[..., allowed] = scores[..., allowed]
    return masked


def decode_greedily(
    language_model: nn.Module,
    embeds: torch.Tensor,
    mask: torch.LongTensor | None,
    steps: int,
    end_ids: int | Sequence[int] | None,
    allowed: slice | None = None,
    use_cache: bool = True,
) -> tuple[torch.LongTensor, torch.FloatTensor]:
    """The likeliest token at each of exactly ``steps`` steps; of equal logits the first wins, as in ``generate``.

    Args:
        language_model: A causal language model of transformers.
        embeds: ``(batch, length, hidden)``, left-padded.
        mask: int64 ``(batch, length)``; None if nothing is masked. A masked token stays masked to the end.
        steps: Number of tokens.
        end_ids: Ids that end a sequence.
        allowed: Ids to choose from; None for all.
        use_cache: False computes the whole sequence anew at each step.

    Returns:
        int64 tokens ``(batch, steps)`` and the float32 logits ``(batch, steps, vocabulary)`` they were chosen from.

    Raises:
        NoActionError: Logits are not finite, or a sequence ended before its last step.
    """
    ends = _as_tensor(end_ids, embeds.device)
    positions = None if mask is None else positions_of(mask)
    step_inputs, past, tokens, logits = {"inputs_embeds": embeds}, None, [], []
    for step in range(steps):
        output = language_model(
            **step_inputs,
            attention_mask=mask,
            position_ids=positions,
            use_cache=use_cache,
            return_dict=True,
            **{CACHE_FIELD: past},
        )
        logits.append(require_finite(output.logits[:, -1].float()))
        tokens.append((logits[-1] if allowed is None else only(logits[-1], allowed)).argmax(-1))
        if step == steps - 1:
            break
        _require_going_on(tokens[-1][:, None], ends, step, steps)
        past = cache_of(output) if use_cache else None
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            positions = positions_of(mask)
        if cached_length(past):
            step_inputs = {"input_ids": tokens[-1][:, None]}
            positions = None if mask is None else positions[:, -1:]
        else:  # also where a cache was asked for but none came: gradient checkpointing in training mode
            past, new = None, language_model.get_input_embeddings()(tokens[-1][:, None])
            step_inputs = {"inputs_embeds": torch.cat([step_inputs["inputs_embeds"], new.to(embeds.dtype)], dim=1)}
    return torch.stack(tokens, dim=1), torch.stack(logits, dim=1)


def require_whole_actions(tokens: torch.LongTensor, steps: int, end_ids: int | Sequence[int] | None) -> None:
    """Raise NoActionError if a row of generated tokens ``(rows, at most steps)`` ended before its last step."""
    tokens = tokens.cpu()  # at once: the device is waited for a single time
    ends = _as_tensor(end_ids, tokens.device)
    for step in range(steps - 1):
        _require_going_on(tokens[:, step : step + 1], ends, step, steps)


def _require_going_on(token: torch.LongTensor, ends: torch.LongTensor, step: int, steps: int) -> None:
    if token.numel() and not bool(torch.isin(token, ends).any()):
        return
    said = step + 1 if token.numel() else step
    raise NoActionError(
        f"The model ended the sequence after {said} of {steps} action tokens. (The reference would decode "
        f"prompt tokens as actions here.) {NO_ACTION_REMEDY}"
    )


def _as_tensor(ids: int | Sequence[int] | None, device: torch.device) -> torch.LongTensor:
    return torch.tensor([] if ids is None else ids, dtype=torch.long, device=device).flatten()
