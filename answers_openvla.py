"""What ``predict_action`` gives: tokens or a head's numbers as actions in robot units, and what was behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.modeling_outputs import ModelOutput
from transformers.utils import logging

from .actions_openvla import ActionTokenizer, NormalizationStatistics
from .decoding_openvla import NO_ACTION_REMEDY, NoActionError

logger = logging.get_logger(__name__)

# The share of an answer's tokens that may be no action tokens where an answer is decoded as the reference does it: to
# the extreme bins. Text has no action token at all (a share of 1); the most that an answer of the reference has which
# this package repeats in every bit is 5 of 7 (tests/golden, seeded weights). A strict answer may have none.
LARGEST_OTHER_SHARE = 0.75


@dataclass
class ActionOutput(ModelOutput):
    """What ``predict_action(..., return_dict=True)`` gives; without the batch axis for one row.

    With parallel decoding every array has the axis of the chunk in front of ``action_dim``.

    Attributes:
        actions: float64 ``(batch, action_dim)``, in ``units``.
        normalized_actions: Tokens: float64 ``(batch, action_dim)``, bin centres in (-1, 1). Continuous heads: float32,
            as the head gives them, which may leave [-1, 1].
        token_ids: int64 ``(batch, action_dim)``; None for continuous heads, as the next two.
        bin_probabilities: float64 ``(batch, action_dim, n_action_bins - 1)``: softmax over the action tokens alone,
            aligned with ``ActionTokenizer.bin_centers``; sums to 1.
        entropy: float64 ``(batch, action_dim)``, of those probabilities, in nats; 0 is certain, 5.54 is uniform.
        hidden_states: Parallel decoding: float32 ``(batch, chunk * action_dim, hidden)``, those that predict the chunk.
        names: What the ``action_dim`` numbers are; of every row the same.
        units: Their units, a tuple like ``names`` for every row.
    """

    actions: np.ndarray | None = None
    normalized_actions: np.ndarray | None = None
    token_ids: np.ndarray | None = None
    bin_probabilities: np.ndarray | None = None
    entropy: np.ndarray | None = None
    hidden_states: np.ndarray | None = None
    names: tuple[str, ...] | None = None
    units: tuple[Any, ...] | None = None


def tokens_answer(
    tokenizer: ActionTokenizer,
    tokens: torch.LongTensor,
    logits: torch.FloatTensor | None,
    statistics: Sequence[NormalizationStatistics],
    return_dict: bool,
    hidden: torch.Tensor | None = None,
    strict: bool = False,
) -> np.ndarray | ActionOutput:
    """Return the answer of tokens.

    Args:
        tokenizer: The model's.
        tokens: int64 ``(batch, ..., action_dim)``.
        logits: ``(batch, ..., action_dim, vocabulary)``, that they were chosen from; needed with ``return_dict``.
        statistics: Of every row.
        return_dict: Give an ``ActionOutput``.
        hidden: For it.
        strict: Allow no token that is no action token.

    Raises:
        NoActionError: More tokens of a row than ``LARGEST_OTHER_SHARE``, or with ``strict`` any, are no action tokens,
            or an action is not finite.
    """
    token_ids = tokens.cpu().numpy()
    _require_action_tokens(tokenizer, token_ids, strict)
    normalized = tokenizer.decode(token_ids)
    actions = _in_robot_units(statistics, normalized)
    if not return_dict:
        return _without_batch_of_one(False, statistics, actions)
    # Ids count down as bins count up; the top edge's token shares the last bin.
    of_actions = logits[..., tokenizer.first_token_id : tokenizer.vocab_size]
    by_bin = of_actions.cpu().double().softmax(-1).flip(-1).numpy()
    probabilities = by_bin[..., :-1].copy()
    probabilities[..., -1] += by_bin[..., -1]
    entropy = -(probabilities * np.log(np.where(probabilities > 0, probabilities, 1.0))).sum(-1)
    hidden = None if hidden is None else hidden.float().cpu().numpy()
    return _without_batch_of_one(True, statistics, actions, normalized, token_ids, probabilities, entropy, hidden)


def _require_action_tokens(tokenizer: ActionTokenizer, token_ids: np.ndarray, strict: bool) -> None:
    """Raise NoActionError where a row of int64 ``(batch, ..., action_dim)`` is no action; else warn of other tokens."""
    others = (token_ids < tokenizer.first_token_id) | (token_ids >= tokenizer.vocab_size)
    if not others.any():
        return
    counts, size = others.reshape(len(others), -1).sum(1), others[0].size
    most = int(counts.max())
    if most > (0 if strict else LARGEST_OTHER_SHARE * size):
        raise NoActionError(
            f"{most} of {size} predicted tokens are not action tokens, so this is no action: as one, it would drive "
            f"the robot at full speed. {NO_ACTION_REMEDY} Where the model is to say words first, decode them yourself "
            "with generate."
        )
    logger.warning(
        f"{most} of {size} predicted tokens are not action tokens; they decode to the extreme bins, as in the "
        f"reference. {NO_ACTION_REMEDY} strict=True makes an error of it."
    )


def _in_robot_units(statistics: Sequence[NormalizationStatistics], normalized: np.ndarray) -> np.ndarray:
    """Return float64 actions of normalised ones, one row of statistics for each; raise NoActionError if not finite."""
    actions = np.stack([row.unnormalize(values) for row, values in zip(statistics, normalized)])
    if not np.isfinite(actions).all():
        raise NoActionError(
            f"The action is not finite: {actions.tolist()}. Check the weights, and the statistics of unnorm_key, which "
            "must not span more than a float64 holds."
        )
    return actions


def numbers_answer(
    normalized: torch.Tensor, statistics: Sequence[NormalizationStatistics], return_dict: bool, hidden: torch.Tensor
) -> np.ndarray | ActionOutput:
    """Return the answer of a continuous head: float32 ``(batch, chunk, action_dim)``, normalised; errors as above."""
    normalized = normalized.cpu().numpy()
    actions = _in_robot_units(statistics, normalized)
    hidden = hidden.float().cpu().numpy()
    return _without_batch_of_one(return_dict, statistics, actions, normalized, None, None, None, hidden)


def _without_batch_of_one(return_dict: bool, statistics: Sequence[Any], *fields: Any) -> np.ndarray | ActionOutput:
    """The actions, or all fields of an ActionOutput, of rows with these statistics."""
    fields = (*fields, tuple(row.units for row in statistics))
    if len(statistics) == 1:
        fields = tuple(None if field is None else field[0] for field in fields)
    return ActionOutput(*fields[:-1], statistics[0].dimension_names, fields[-1]) if return_dict else fields[0]
