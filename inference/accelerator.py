"""Accelerator of the package's models: the fast decoder and CUDA graphs, which saved folders do not carry.

``loading.attach_package`` attaches it, so that it is in use wherever the package is installed and its classes
are. A model whose code comes from a saved folder (``trust_remote_code``) runs without it, and predicts the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..actions_openvla import NormalizationStatistics
from ..decoding_openvla import Accelerator, require_finite
from ..modeling_openvla import OpenVLAForActionPrediction, Prompt
from ..vision_openvla import PrismaticVisionBackbone
from .cuda_graphs import Stages, run_graphed, run_on_two_streams
from .fast_decoder import bidirectional_hidden_states, decode_in_stages, encode_draft, unsupported_reason


def predict_tokens(
    model: OpenVLAForActionPrediction,
    prompt: Prompt,
    statistics: Sequence[NormalizationStatistics],
    allowed: slice | None,
    draft: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Predict action tokens with the fast decoder, by CUDA graphs where there are some.

    Args:
        model: The model.
        prompt: Prompts and images, ready for ``embed_inputs``.
        statistics: Statistics of each sample; they give the number of tokens and normalise the draft.
        allowed: Token ids to choose from; None for all.
        draft: As of ``predict_action``; its tokens are verified, not trusted.

    Returns:
        int64 tokens ``(batch, steps)``, which may end early, and the float32 logits ``(batch, steps, vocabulary)`` they
        were chosen from.

    Raises:
        NoActionError: Logits are not finite.
    """
    steps = model.num_action_tokens(statistics)
    draft_tokens = None if draft is None else encode_draft(draft, model.action_tokenizer, statistics)

    def compute(
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        attention_mask: torch.Tensor | None,
        draft_tokens: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...] | Stages:
        embeds, mask, _, _ = model.embed_inputs(input_ids, pixel_values, attention_mask)
        if draft_tokens is not None:
            draft_tokens = draft_tokens.to(embeds.device)
        return decode_in_stages(model.language_model, embeds, mask, steps, allowed, draft_tokens)

    tokens, logits = run_graphed(model, compute, (*prompt, draft_tokens), (steps, str(allowed)))
    return tokens, require_finite(logits.float())


ACCELERATOR = Accelerator(
    unsupported_reason=unsupported_reason,
    predict_tokens=predict_tokens,
    bidirectional_hidden_states=bidirectional_hidden_states,
    run_graphed=run_graphed,
)


def attach_accelerator() -> None:
    """Let the package's models use the fast decoder and CUDA graphs."""
    OpenVLAForActionPrediction.accelerator = ACCELERATOR
    PrismaticVisionBackbone.run_on_two_streams = staticmethod(run_on_two_streams)
