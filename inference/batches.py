"""Predictions for several observations in one pass; every one has the action that it has in a batch of one.

``Policy.act_batch`` and the policy server predict with these functions.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..decoding_openvla import ActionOutput
from ..errors_openvla import OpenVLAError
from ..modeling_openvla import OpenVLAForActionPrediction

logger = logging.getLogger(__name__)

# Only prompts of one length share a batch: padding makes attention use another kernel, which at OpenVLA-7B's depth and
# 1/8 of its width changed logits by 0.14 in bfloat16 (CPU). Without padding they were equal in bfloat16 and differed by
# 1e-6 in float32, where a larger matrix product is summed in another order. If the log-probability of a chosen token
# exceeds that of the second one by less than this margin (nats; for 16 bits two roundings of a logit up to 32), the
# request is predicted again in a batch of one.
MIN_LOG_PROB_MARGIN = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.03125}


@dataclass
class PreparedObservation:
    """An observation as the model takes it.

    Attributes:
        inputs: Output of the processor for one prompt.
        unnorm_key: Dataset whose statistics un-normalise the action.
        proprio: float64 ``(proprio_dim,)``, or None.
        action_dim: Length of an action.
        details: Compute bin probabilities too.
        constrain_actions: Choose among action tokens only.
    """

    inputs: dict[str, torch.Tensor]
    unnorm_key: str
    proprio: np.ndarray | None
    action_dim: int
    details: bool
    constrain_actions: bool

    def can_batch_with(self, other: PreparedObservation) -> bool:
        """Return True if both observations may share a forward pass."""
        return (
            self.inputs["input_ids"].shape == other.inputs["input_ids"].shape
            and self.action_dim == other.action_dim
            and self.constrain_actions == other.constrain_actions
        )


@dataclass
class Prediction:
    """Result for one observation.

    Attributes:
        output: Output of the model, without a batch axis.
        batch_size: Number of observations in the forward pass.
        model_ms: Time of the forward pass in ms.
        constrain_actions: True if the model chose among action tokens only.
        recomputed: True if the observation was predicted again in a batch of one.
    """

    output: ActionOutput
    batch_size: int
    model_ms: float
    constrain_actions: bool
    recomputed: bool = False

    @property
    def actions(self) -> np.ndarray:
        """Return the actions: float64 ``(action_dim,)`` or ``(chunk, action_dim)`` in robot units."""
        assert self.output.actions is not None
        return self.output.actions


def max_batch_size(model: OpenVLAForActionPrediction, requested: int) -> int:
    """Return the number, or 1 for a continuous action head, whose actions a batched pass would round otherwise."""
    return requested if model.config.action_head is None else 1


def predict_batch(
    model: OpenVLAForActionPrediction, observations: Sequence[PreparedObservation], actions: str
) -> list[Prediction | Exception]:
    """Predict for observations that may share a forward pass.

    Args:
        model: The model.
        observations: One or several, of which ``can_batch_with`` is True.
        actions: "all" actions of a chunk, or the "first", see ``predict_action``.

    Returns:
        For each a prediction, whose tokens equal those of a batch of one, or the exception that it raised there: one
        observation does not fail the others.
    """
    if len(observations) == 1:
        return [_predict_one(model, observations[0], actions)]
    try:
        predictions = _predict(model, observations, actions)
    except Exception as error:
        level = logging.INFO if isinstance(error, OpenVLAError) else logging.ERROR
        logger.log(level, "a batch of %d is predicted one by one: %s", len(observations), error)
        return [_predict_one(model, observation, actions) for observation in observations]
    return [
        prediction
        if _is_unambiguous(model, prediction.output)
        else _predict_one(model, observation, actions, recomputed=True)
        for observation, prediction in zip(observations, predictions)
    ]


def predict_all(
    model: OpenVLAForActionPrediction, observations: Sequence[PreparedObservation], actions: str, batch_size: int
) -> list[Prediction | Exception]:
    """Predict for observations of any kind, in batches of those that may share a forward pass, in their order."""
    results: dict[int, Prediction | Exception] = {}
    waiting = list(range(len(observations)))
    while waiting:
        first = observations[waiting[0]]
        batch = [index for index in waiting if first.can_batch_with(observations[index])][:batch_size]
        results |= zip(batch, predict_batch(model, [observations[index] for index in batch], actions))
        waiting = [index for index in waiting if index not in results]
    return [results[index] for index in range(len(observations))]


def _predict_one(
    model: OpenVLAForActionPrediction, observation: PreparedObservation, actions: str, recomputed: bool = False
) -> Prediction | Exception:
    try:
        prediction = _predict(model, [observation], actions)[0]
    except OpenVLAError as error:
        error.__traceback__ = error.__context__ = error.__cause__ = None  # their frames hold the observation's tensors
        return error
    except Exception as error:
        return error
    prediction.recomputed = recomputed
    return prediction


def _predict(
    model: OpenVLAForActionPrediction, observations: Sequence[PreparedObservation], actions: str
) -> list[Prediction]:
    """Run one forward pass."""
    started = time.perf_counter()
    first, batch_size = observations[0], len(observations)
    states = [observation.proprio for observation in observations if observation.proprio is not None]
    inputs: dict[str, Any] = {
        name: torch.cat([observation.inputs[name] for observation in observations]) for name in first.inputs
    }
    output = model.predict_action(
        **inputs,
        unnorm_key=[observation.unnorm_key for observation in observations],
        proprio=np.stack(states) if states else None,
        return_dict=batch_size > 1 or first.details,
        constrain_actions=first.constrain_actions,
        actions=actions,
        strict=batch_size == 1,  # in a batch, observations with other tokens are recomputed: see _is_unambiguous
    )
    if not isinstance(output, ActionOutput):
        output = ActionOutput(actions=output)
    model_ms = (time.perf_counter() - started) * 1000
    outputs = [output] if batch_size == 1 else [_select(output, index) for index in range(batch_size)]
    return [Prediction(output, batch_size, model_ms, first.constrain_actions) for output in outputs]


def _is_unambiguous(model: OpenVLAForActionPrediction, output: ActionOutput) -> bool:
    """Return True if every token is an action token and was chosen by a margin that rounding cannot change."""
    assert output.token_ids is not None
    assert output.bin_probabilities is not None
    action_token_ids = model.action_token_ids
    if (output.token_ids < action_token_ids.start).any() or (output.token_ids >= action_token_ids.stop).any():
        return False
    second, first = np.moveaxis(np.sort(output.bin_probabilities, axis=-1)[..., -2:], -1, 0)
    with np.errstate(divide="ignore"):
        margin = np.log(first) - np.log(second)
    required = MIN_LOG_PROB_MARGIN.get(model.dtype, max(MIN_LOG_PROB_MARGIN.values()))
    return bool((margin > required).all())


def _select(output: ActionOutput, index: int) -> ActionOutput:
    """Return the output of one observation of a batch; ``names`` are common to all."""
    return ActionOutput(**{name: value if name == "names" else value[index] for name, value in output.items()})
