"""From prompts and image patches to action tokens and actions: sequence layout, greedy decoding, ``ActionOutput``.

Plain functions on tensors and on a language model; nothing here knows about images or configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from transformers.modeling_outputs import ModelOutput
from transformers.utils import logging

from .actions_openvla import ActionTokenizer, NormalizationStatistics
from .compatibility_openvla import CACHE_FIELD, cache_of, cached_length
from .errors_openvla import OpenVLAValueError

logger = logging.get_logger(__name__)

NO_ACTION_REMEDY = (
    "Check that prompt, image and unnorm_key belong to this checkpoint, or pass constrain_actions=True (of the "
    "command: --constrain-actions) to choose among action tokens only."
)
NOT_IDS = "input_ids must be an integer tensor of shape (batch, length)"
# Largest share of a sample's tokens that may be no action tokens, and are decoded to the extreme bins as in the
# reference. Text has a share of 1; the reference's outputs in tests/golden have up to 5 of 7. strict=True allows none.
MAX_NON_ACTION_SHARE = 0.75


class NoActionError(OpenVLAValueError):
    """A prediction that is no action: it ended early, holds words, or numbers that are not finite."""

    code = "no_action"  # names this error for the policy server and its clients


@dataclass(frozen=True)
class Accelerator:
    """Functions of the installed package that compute the same tokens and actions faster, up to rounding.

    A model whose code comes from a saved folder (``trust_remote_code``) has none.
    """

    # Why a language model cannot run that many positions by the functions below; None if it can.
    unsupported_reason: Callable[[nn.Module, int], str | None]
    # Action tokens and their finite logits, for a model, prompt, statistics, allowed ids and draft.
    predict_tokens: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    # Last hidden states (batch, count, hidden), for a language model, embeddings, mask and positions (batch, count).
    bidirectional_hidden_states: Callable[[nn.Module, torch.Tensor, torch.Tensor | None, torch.Tensor], torch.Tensor]
    # compute(*inputs), by a CUDA graph where there is one, for a model, compute, inputs and what else it depends on.
    run_graphed: Callable[..., tuple[torch.Tensor, ...]]


def unsupported_reason(accelerator: Accelerator | None, language_model: nn.Module, length: int) -> str | None:
    """Return why the fast decoder cannot run a language model on ``length`` positions; None if it can."""
    if accelerator is None:
        return "it is part of the package: pip install openvla, and load without trust_remote_code"
    return accelerator.unsupported_reason(language_model, length)


def use_fast_decoder(
    fast: bool | None,
    accelerator: Accelerator | None,
    language_model: nn.Module,
    length: int,
    draft: Any = None,
    decodes_greedily: bool = True,
) -> bool:
    """Return whether to use the fast decoder: None where possible, False never, True with a warning where it is not.

    A draft, or ``fast=True`` for sampling or without a cache, raises ValueError where it would have no effect.
    """
    if not decodes_greedily:
        reason: str | None = "tokens are sampled, searched, or computed without a cache"
    else:
        reason = "fast is False" if fast is False else unsupported_reason(accelerator, language_model, length)
    if reason and (draft is not None or (fast and not decodes_greedily)):
        name = "fast=True" if draft is None else "draft"
        raise OpenVLAValueError(f"{name} has no effect on this call: {reason}. Leave {name} out.")
    if reason and fast:
        logger.warning_once(f"Falling back to the standard decoder: {reason}.")
    return reason is None


def set_argument_names(arguments: Mapping[str, Any]) -> str:
    """Return the names of the arguments that are neither None nor False, comma-separated."""
    return ", ".join(name for name, value in arguments.items() if value is not None and value is not False)


def require_one_pass(
    generate_kwargs: Mapping[str, Any], draft: Any, constrain_actions: bool, action_head: str | None
) -> None:
    """Raise ValueError for arguments of ``predict_action`` that have no effect on parallel decoding."""
    set_names = {name for name, value in generate_kwargs.items() if value and (name, value) != ("num_beams", 1)}
    unused = sorted(set_names - {"use_cache"})
    if unused:
        raise OpenVLAValueError(f"A parallel-decoding model predicts a chunk in one pass, without {', '.join(unused)}.")
    if draft is not None:
        raise OpenVLAValueError("draft is for a model that predicts token by token; leave it out.")
    if constrain_actions and action_head is not None:
        raise OpenVLAValueError(
            f"constrain_actions is for models that predict tokens, not for action_head {action_head!r}; leave it out."
        )


def align_prompts(
    input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, pad_token_id: int | None, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Check prompts ``(batch, length)``, move them to ``device`` and all their padding to the left.

    Return int64 ids and their mask, None where nothing is masked; what is no prompt, or padding without a mask, raises
    ValueError.
    """
    if not isinstance(input_ids, torch.Tensor):
        raise OpenVLAValueError(f"{NOT_IDS}, got {type(input_ids).__name__}.")
    if input_ids.ndim != 2 or input_ids.dtype not in (torch.int64, torch.int32):
        raise OpenVLAValueError(f"{NOT_IDS}, got {input_ids.dtype} {tuple(input_ids.shape)}.")
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
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, token_id: int, pad_token_id: int | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Append ``token_id`` to the left-padded prompts that do not end in it; return ids and mask, left-padded."""
    has_token = input_ids[:, -1:] == token_id
    if bool(has_token.all()):
        return input_ids, attention_mask
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    end = torch.full_like(input_ids[:, -1:], token_id)
    appended, appended_mask = torch.cat([input_ids, end], dim=1), torch.cat([mask, torch.ones_like(end)], dim=1)
    pad = torch.full_like(end, pad_token_id or 0)
    shifted, shifted_mask = torch.cat([pad, input_ids], dim=1), torch.cat([torch.zeros_like(end), mask], dim=1)
    mask = torch.where(has_token, shifted_mask, appended_mask)
    is_masked = attention_mask is not None or bool(has_token.any())
    return torch.where(has_token, shifted, appended), mask if is_masked else None


def insert_after_bos(sequence: torch.Tensor, inserted: torch.Tensor, bos: torch.Tensor) -> torch.Tensor:
    """Insert ``(batch, count, ...)`` after position ``bos`` of each sequence ``(batch, length, ...)``, of its dtype."""
    length, count = sequence.shape[1], inserted.shape[1]
    bos = bos[:, None]
    target = torch.arange(length + count, device=bos.device)
    # The source of each output position in the concatenation of sequence and inserted.
    from_inserted = (target > bos) & (target <= bos + count)
    source = torch.where(from_inserted, length + target - bos - 1, torch.where(target <= bos, target, target - count))
    both = torch.cat([sequence, inserted], dim=1)
    index = source.to(both.device).view(*source.shape, *[1] * (both.ndim - 2)).expand(-1, -1, *both.shape[2:])
    return both.gather(1, index)


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    """Return int64 position ids from the first visible token on; one masked later counts, as in the reference."""
    start = mask.to(torch.long).argmax(dim=1, keepdim=True)
    return (torch.arange(mask.shape[1], device=mask.device) - start).clamp(min=0)


def has_gap(mask: torch.Tensor) -> bool:
    """Return whether a left-padded mask hides a token after a visible one."""
    return bool((mask[:, 1:] < mask[:, :-1]).any())


def require_finite(outputs: torch.Tensor) -> torch.Tensor:
    """Return logits or actions of a model if all are finite; else raise NoActionError."""
    if not bool(torch.isfinite(outputs).all()):
        raise NoActionError(
            "The output of the model is not finite, so no action can be trusted. Check weights and image for NaN; "
            "float16 overflows in Llama-2: use bfloat16 or float32."
        )
    return outputs


def mask_logits(logits: torch.Tensor, allowed: slice) -> torch.Tensor:
    """Return logits ``(..., vocabulary)`` with every id outside ``allowed`` at minus infinity."""
    masked = torch.full_like(logits, -torch.inf)
    masked[..., allowed] = logits[..., allowed]
    return masked


def decode_greedily(
    language_model: nn.Module,
    embeds: torch.Tensor,
    mask: torch.Tensor | None,
    steps: int,
    end_ids: int | Sequence[int] | None,
    allowed: slice | None = None,
    use_cache: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the likeliest token at each of exactly ``steps`` steps; of equal logits the first, as ``generate`` does.

    Embeddings ``(batch, length, hidden)`` and their mask are left-padded; a masked token stays masked to the end.
    ``end_ids`` end a sequence, ``allowed`` are the ids to choose from (None: all). Without a cache each step computes
    the whole sequence again.

    Returns:
        int64 tokens ``(batch, steps)`` and the float32 logits ``(batch, steps, vocabulary)`` they were chosen from.

    Raises:
        NoActionError: Logits are not finite, or a sequence ended before its last step.
    """
    position_ids = None if mask is None else positions_of(mask)
    step_inputs: dict[str, Any] = {"inputs_embeds": embeds}
    cache = None
    tokens: list[torch.Tensor] = []
    logits: list[torch.Tensor] = []
    for step in range(steps):
        step_inputs |= {"attention_mask": mask, "position_ids": position_ids, CACHE_FIELD: cache}
        output = language_model(**step_inputs, use_cache=use_cache, return_dict=True)
        logits.append(require_finite(output.logits[:, -1].float()))
        tokens.append((logits[-1] if allowed is None else mask_logits(logits[-1], allowed)).argmax(-1))
        if step == steps - 1:
            break
        cache = cache_of(output) if use_cache else None
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            position_ids = positions_of(mask)
        if cached_length(cache):
            step_inputs = {"input_ids": tokens[-1][:, None]}
            position_ids = None if position_ids is None else position_ids[:, -1:]
        else:  # also where a requested cache is not returned: gradient checkpointing in training mode
            cache, embed = None, language_model.get_input_embeddings
            new = embed()(tokens[-1][:, None]).to(embeds.dtype)  # type: ignore[operator]
            step_inputs = {"inputs_embeds": torch.cat([step_inputs["inputs_embeds"], new], dim=1)}
    require_complete_actions(torch.stack(tokens, dim=1), steps, end_ids)
    return torch.stack(tokens, dim=1), torch.stack(logits, dim=1)


def require_complete_actions(tokens: torch.Tensor, steps: int, end_ids: int | Sequence[int] | None) -> None:
    """Raise NoActionError if a sequence of generated tokens ``(batch, at most steps)`` ended before its last step."""
    ends = torch.tensor([] if end_ids is None else end_ids, dtype=torch.long).flatten()
    ended = torch.isin(tokens.cpu()[:, : steps - 1], ends).any(dim=0).tolist()
    if len(ended) == steps - 1 and True not in ended:
        return
    count = ended.index(True) + 1 if True in ended else len(ended)
    raise NoActionError(
        f"The model ended the sequence after {count} of {steps} action tokens. (The reference would decode "
        f"prompt tokens as actions here.) {NO_ACTION_REMEDY}"
    )


@dataclass
class ActionOutput(ModelOutput):
    """Output of ``predict_action(..., return_dict=True)``.

    A single sample has no batch axis; with parallel decoding the chunk's axis comes before ``action_dim``.

    Attributes:
        actions: float64 ``(batch, action_dim)``, in ``units``.
        normalized_actions: Tokens: float64 ``(batch, action_dim)``, bin centres in (-1, 1). Continuous heads: float32
            outputs of the head, which may leave [-1, 1].
        token_ids: int64 ``(batch, action_dim)``; None for continuous heads, as the next two.
        bin_probabilities: float64 ``(batch, action_dim, n_action_bins - 1)``: softmax over the action tokens alone,
            aligned with ``ActionTokenizer.bin_centers``; sums to 1.
        entropy: float64 ``(batch, action_dim)``, entropy of those probabilities in nats, 0 (certain) to 5.54 (uniform).
        hidden_states: Parallel decoding: float32 ``(batch, chunk * action_dim, hidden)``, those that predict the chunk.
        names: Names of the ``action_dim`` numbers, the same for every sample; None without the package, as units.
        units: Their units, a tuple of ``action_dim`` strings for every sample.
    """

    actions: np.ndarray | None = None
    normalized_actions: np.ndarray | None = None
    token_ids: np.ndarray | None = None
    bin_probabilities: np.ndarray | None = None
    entropy: np.ndarray | None = None
    hidden_states: np.ndarray | None = None
    names: tuple[str, ...] | None = None
    units: tuple[Any, ...] | None = None
    label_dimensions: ClassVar[Callable[[int, str], list[tuple[str, str]]] | None] = None  # set by the package


def output_from_tokens(
    tokens: torch.Tensor,
    tokenizer: ActionTokenizer,
    statistics: Sequence[NormalizationStatistics],
    *,
    logits: torch.Tensor | None = None,
    hidden_states: torch.Tensor | None = None,
    strict: bool = False,
) -> ActionOutput:
    """Decode action tokens, int64 ``(batch, ..., action_dim)``, to actions in robot units.

    With ``logits`` ``(batch, ..., action_dim, vocabulary)``, from which they were chosen, there are bin probabilities.

    Raises:
        NoActionError: More than ``MAX_NON_ACTION_SHARE`` of a sample's tokens, or with ``strict`` a single one, are no
            action tokens, or an action is not finite.
    """
    token_ids = tokens.cpu().numpy()
    _require_action_tokens(tokenizer, token_ids, strict)
    normalized = np.stack([tokenizer.decode(ids) for ids in token_ids])  # so that a batch rounds as its samples do
    probabilities = entropy = None
    if logits is not None:
        # Ids count down as bins count up; the token of the top edge shares the last bin.
        action_logits = logits[..., tokenizer.first_token_id : tokenizer.vocab_size]
        probabilities = action_logits.cpu().double().softmax(-1).flip(-1).numpy()
        if hasattr(tokenizer, "bins"):  # not VQ codes, each of which has its own token
            probabilities, top_edge = probabilities[..., :-1].copy(), probabilities[..., -1]
            probabilities[..., -1] += top_edge
        entropy = -(probabilities * np.log(np.where(probabilities > 0, probabilities, 1.0))).sum(-1)
    return build_output(
        normalized, statistics, hidden_states, token_ids=token_ids, bin_probabilities=probabilities, entropy=entropy
    )


def build_output(
    normalized: np.ndarray,
    statistics: Sequence[NormalizationStatistics],
    hidden_states: torch.Tensor | None = None,
    **fields: Any,
) -> ActionOutput:
    """Un-normalise each sample by its own statistics; raise NoActionError where an action is not finite."""
    actions = np.stack([entry.unnormalize(values) for entry, values in zip(statistics, normalized)])
    if not np.isfinite(actions).all():
        raise NoActionError(
            f"The action is not finite: {actions.tolist()}. Check the weights, and the statistics of unnorm_key, which "
            "must not span more than a float64 holds."
        )
    fields |= {"actions": actions, "normalized_actions": normalized}
    fields["hidden_states"] = None if hidden_states is None else hidden_states.float().cpu().numpy()
    single = len(statistics) == 1
    if single:
        fields = {name: None if value is None else value[0] for name, value in fields.items()}
    if ActionOutput.label_dimensions is None:
        return ActionOutput(**fields)
    labels = [tuple(zip(*ActionOutput.label_dimensions(entry.dimension, entry.unnorm_key))) for entry in statistics]
    units = tuple(units for _, units in labels)
    return ActionOutput(**fields, names=labels[0][0], units=units[0] if single else units)


def _require_action_tokens(tokenizer: ActionTokenizer, token_ids: np.ndarray, strict: bool) -> None:
    """Raise NoActionError where a sample of int64 ``(batch, ..., action_dim)`` is no action; else warn."""
    others = (token_ids < tokenizer.first_token_id) | (token_ids >= tokenizer.vocab_size)
    if not others.any():
        return
    counts, size = others.reshape(len(others), -1).sum(1), others[0].size
    most = int(counts.max())
    if most > (0 if strict else MAX_NON_ACTION_SHARE * size):
        raise NoActionError(
            f"{most} of {size} predicted tokens are not action tokens, so this is no action: as one, it would drive "
            f"the robot at full speed. {NO_ACTION_REMEDY} If the model generates words first, decode them yourself "
            "with generate."
        )
    logger.warning(
        f"{most} of {size} predicted tokens are not action tokens; they decode to the extreme bins, as in the "
        f"reference. {NO_ACTION_REMEDY} strict=True makes an error of it."
    )
