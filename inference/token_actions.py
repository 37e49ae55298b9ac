"""Actions from the tokens of another engine that runs an OpenVLA checkpoint, such as vLLM."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..actions_openvla import ActionTokenizer, NormStatsMixin
from ..configuration_openvla import OpenVLAConfig, optional_file
from ..decoding_openvla import NoActionError, output_from_tokens
from ..errors_openvla import OpenVLAValueError
from ..modeling_openvla import STATISTICS_FILE


class _Statistics(NormStatsMixin):
    """Action statistics of a checkpoint, without its weights."""

    def __init__(self, config: OpenVLAConfig) -> None:
        self.config = config


def actions_from_tokens(
    token_ids: Sequence[int] | Sequence[Sequence[int]] | np.ndarray,
    checkpoint: str | os.PathLike[str],
    unnorm_key: str | None = None,
) -> np.ndarray:
    """Return the actions that predicted tokens mean, as ``predict_action`` does.

    Args:
        token_ids: Predicted token ids of one action ``(action_dim,)`` or of several ``(batch, action_dim)``, without
            the prompt. A last token that ends the sequence may follow.
        checkpoint: Folder or Hub id of the model that predicted them; only its configuration is read.
        unnorm_key: See ``predict_action``.

    Returns:
        float64, of the shape of the actions, in robot units.

    Raises:
        NoActionError: A token is not an action token, or there are too few.
        KeyError: Unknown ``unnorm_key``.
        ValueError: The model predicts no tokens one by one, or ``token_ids`` has another shape or dtype.
    """
    config = OpenVLAConfig.from_pretrained(checkpoint)
    if config.parallel_decoding:
        raise OpenVLAValueError(f"{checkpoint} predicts action chunks, not the tokens of one action.")
    if config.action_vq is not None:
        raise OpenVLAValueError(
            f"The tokens of {checkpoint} are VQ codes (MiniVLA), which its weights decode: load it, and use "
            "model.action_tokenizer.decode."
        )
    file = optional_file(checkpoint, STATISTICS_FILE)
    if file is not None:
        config.merge_statistics(json.loads(Path(file).read_text(encoding="utf-8")))
    statistics = _Statistics(config).action_statistics(unnorm_key)
    tokens = np.asarray(token_ids)
    if tokens.ndim not in (1, 2) or tokens.dtype.kind not in "iu":
        raise OpenVLAValueError(
            f"token_ids must be integers of shape (action_dim,) or (batch, action_dim), got {tokens.dtype} of shape "
            f"{tokens.shape}."
        )
    end_id = config.text_config.eos_token_id
    if tokens.shape[-1] == statistics.dimension + 1 and (tokens[..., -1] == end_id).all():
        tokens = tokens[..., :-1]
    if tokens.shape[-1] != statistics.dimension:
        raise NoActionError(
            f"An action of this model has {statistics.dimension} tokens, got {tokens.shape[-1]}; let the engine "
            f"predict exactly {statistics.dimension} (for vLLM max_tokens and ignore_eos)."
        )
    batch = torch.from_numpy(np.atleast_2d(tokens).astype(np.int64))
    tokenizer = ActionTokenizer(config.vocab_size, config.n_action_bins)
    actions = output_from_tokens(batch, tokenizer, [statistics] * len(batch), strict=True).actions
    assert actions is not None
    return actions if tokens.ndim == 1 else actions.reshape(tokens.shape)
