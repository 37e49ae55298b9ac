"""Log-probabilities of candidate actions; ``loading.attach_methods`` makes ``score_actions`` a method of the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..actions_openvla import as_numbers
from ..errors_openvla import OpenVLAValueError
from .fast_decoder import encode_decoded
from .sampling import token_logits

if TYPE_CHECKING:
    from ..modeling_openvla import OpenVLAForActionPrediction


@torch.no_grad()
def score_actions(
    model: OpenVLAForActionPrediction,
    input_ids: torch.Tensor | None = None,
    pixel_values: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    actions: np.ndarray | Sequence[Any] | None = None,
    unnorm_key: str | Sequence[str | None] | None = None,
) -> np.ndarray:
    """Return the log-probability of candidate actions, to rank or reject them.

    Args:
        model: The model; in typed code this is a function, else a method of the model.
        input_ids: As in ``predict_action``.
        pixel_values: As in ``predict_action``.
        attention_mask: As in ``predict_action``.
        actions: Robot units, ``(candidates, action_dim)`` for every sample or ``(batch, candidates, action_dim)``.
        unnorm_key: As in ``predict_action``.

    Returns:
        float64 ``(batch, candidates)``, the sum over dimensions of the log-probability of the candidate's bin
        given the tokens before it, in nats, over the whole vocabulary. (Two tokens decode to the highest bin; the
        next dimension is conditioned on that of the top edge.)

    Raises:
        ValueError: Shapes disagree, values are not finite, or the model has parallel decoding, where the numbers
            of a chunk have no probability given each other.
        KeyError: Unknown ``unnorm_key``.
    """
    if input_ids is None or pixel_values is None or actions is None:
        raise OpenVLAValueError("score_actions needs input_ids, pixel_values and actions.")
    if model.config.parallel_decoding or model.config.action_vq is not None:
        kind = "VQ actions" if model.config.action_vq is not None else "parallel decoding"
        raise OpenVLAValueError(f"score_actions is for models that predict bins token by token; this one has {kind}.")
    prompt = model._prepare_prompt(input_ids, pixel_values, attention_mask)
    batch_size = len(prompt.input_ids)
    statistics = model.batch_statistics(model.batch_keys(unnorm_key, batch_size))
    candidates = as_numbers(actions, "actions")
    if candidates.ndim == 2:
        candidates = np.broadcast_to(candidates, (batch_size, *candidates.shape))
    if candidates.ndim != 3 or len(candidates) != batch_size or candidates.shape[1] == 0:
        raise OpenVLAValueError(
            f"actions must have shape (candidates, action_dim) or ({batch_size}, candidates, action_dim) with "
            f"at least one candidate, got {np.shape(actions)}."
        )
    tokenizer, top_edge = model.action_tokenizer, model.action_tokenizer.first_token_id
    token_ids = np.stack(
        [encode_decoded(tokenizer, entry.normalize(group)) for entry, group in zip(statistics, candidates)]
    )
    embeds, mask, _, _ = model.embed_inputs(*prompt)
    num_candidates = token_ids.shape[1]
    tokens = torch.from_numpy(token_ids).to(embeds.device).flatten(0, 1)
    embeds = embeds.repeat_interleave(num_candidates, dim=0)
    if mask is not None:
        mask = mask.repeat_interleave(num_candidates, dim=0)
    log_probs = token_logits(model, embeds, mask, tokens)[0].log_softmax(-1)
    tokens = tokens.to(log_probs.device)
    chosen = log_probs.gather(-1, tokens[..., None]).squeeze(-1)
    chosen = torch.where(tokens == top_edge, torch.logaddexp(chosen, log_probs[..., top_edge + 1]), chosen)
    return chosen.cpu().double().sum(-1).view(-1, num_candidates).numpy()
