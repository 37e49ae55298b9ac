"""Training pass of parallel decoding (OpenVLA-OFT): losses of tokens, L1 and diffusion heads.

``loading.attach_methods`` makes ``parallel_forward`` a method of the model, whose ``forward`` calls it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers.modeling_outputs import ModelOutput

from ..decoding_openvla import set_argument_names
from ..errors_openvla import OpenVLAValueError
from ..heads_openvla import alphas_cumprod
from ..modeling_openvla import OpenVLAForActionPrediction
from ..parallel_openvla import Observation
from .token_loss import compute_token_loss, to_device


@dataclass
class ChunkOutput(ModelOutput):
    """Output of ``forward`` of a parallel-decoding model.

    Attributes:
        loss: Float scalar: cross entropy of the labelled tokens, L1 of the actions, or squared error of the noise.
        logits: Tokens: ``(labelled positions, padded vocabulary)``, in the order of the labels.
        predictions: Heads: ``(batch, chunk, action_dim)``, normalised actions (L1) or noise (diffusion).
        hidden_states: ``(batch, chunk * action_dim, hidden)``, those that predict the chunk.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    predictions: torch.Tensor | None = None
    hidden_states: torch.Tensor | None = None


def parallel_forward(
    model: OpenVLAForActionPrediction,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    pixel_values: torch.Tensor | None,
    labels: torch.Tensor | None,
    *,
    actions: torch.Tensor | None = None,
    proprio: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    timesteps: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> ChunkOutput:
    """Run one training pass of a model with parallel decoding: its ``forward``, which describes the arguments.

    Raises:
        ValueError: Inputs are missing, do not fit the model or would not be used.
    """
    if input_ids is None or pixel_values is None or labels is None:
        raise OpenVLAValueError(
            "A parallel-decoding model trains on input_ids, pixel_values and labels; all are needed."
        )
    head, sampling = model.config.action_head, {"noise": noise, "timesteps": timesteps, "generator": generator}
    unused = set_argument_names({**({} if head == "diffusion" else sampling), "actions": None if head else actions})
    if unused:
        raise OpenVLAValueError(f"{unused}: not used by a model whose action_head is {head!r}; leave it out.")
    if None not in sampling.values():
        raise OpenVLAValueError("Noise and timesteps are given, so nothing is drawn from the generator; leave it out.")
    mask = None
    if attention_mask is not None and not bool(attention_mask.all()):
        mask = to_device(attention_mask.to(torch.long), input_ids.device)
    positions = to_device(_labelled_positions(model, labels), input_ids.device)
    obs = model.embed_observation(input_ids, mask, positions, pixel_values, proprio)
    if head is None:
        return _token_loss(model, obs, labels)
    shape = (len(input_ids), *model.chunk_shape)
    if actions is None or tuple(actions.shape) != shape:
        got = None if actions is None else tuple(actions.shape)
        raise OpenVLAValueError(f"The {head} head trains on normalised actions of shape {shape}, got {got}.")
    actions = actions.to(device=obs.text.device, dtype=obs.text.dtype)
    if head == "l1":
        hidden = model.action_hidden_states(obs)
        predictions = model.action_head(hidden)
        loss = nn.functional.l1_loss(predictions, actions)
        return ChunkOutput(loss=loss, predictions=predictions, hidden_states=hidden)
    return _noise_loss(model, obs, actions, noise, timesteps, generator)


def _labelled_positions(model: OpenVLAForActionPrediction, labels: torch.Tensor) -> torch.Tensor:
    """Return the positions of the action tokens in labels: int64 ``(batch, chunk * action_dim)``."""
    ids = model.action_token_ids
    is_action = (labels >= ids.start) & (labels < ids.stop)
    counts = is_action.sum(1)
    if bool((counts != model.tokens_per_chunk).any()):
        raise OpenVLAValueError(
            f"Every sample needs {model.tokens_per_chunk} action tokens ({model.config.chunk_length} actions of "
            f"{model.config.action_dim} numbers), got {counts.tolist()}."
        )
    return is_action.nonzero()[:, 1].view(len(labels), -1)


def _token_loss(model: OpenVLAForActionPrediction, obs: Observation, labels: torch.Tensor) -> ChunkOutput:
    """Return the next-token loss over every labelled position, as in the reference."""
    every_position = torch.arange(labels.shape[1], device=obs.text.device).expand(len(labels), -1)
    hidden = model.action_hidden_states(obs, every_position)  # position 0, BOS, is never labelled
    logits, loss = compute_token_loss(labels, hidden[:, 1:], model.get_output_embeddings())
    index = obs.action_positions[..., None].expand(-1, -1, hidden.shape[-1])
    return ChunkOutput(loss=loss, logits=logits, hidden_states=hidden.gather(1, index))


def _noise_loss(
    model: OpenVLAForActionPrediction,
    obs: Observation,
    actions: torch.Tensor,
    noise: torch.Tensor | None,
    timesteps: torch.Tensor | None,
    generator: torch.Generator | None,
) -> ChunkOutput:
    """Return the squared error of the noise that the diffusion head predicts in noisy actions."""
    device = actions.device
    if noise is None:
        noise = torch.randn(actions.shape, generator=generator, device=device, dtype=actions.dtype)
    if timesteps is None:
        num_levels = model.config.num_diffusion_steps_train
        timesteps = torch.randint(num_levels, actions.shape[:1], generator=generator, device=device)
    noise, timesteps = noise.to(actions), timesteps.to(device)
    noisy = add_noise(model.config.num_diffusion_steps_train, actions, noise, timesteps)
    hidden = model.action_hidden_states(obs, noisy=noisy, timesteps=timesteps)
    predictions = model.action_head(hidden)
    loss = nn.functional.mse_loss(predictions, noise)
    return ChunkOutput(loss=loss, predictions=predictions, hidden_states=hidden)


def add_noise(num_levels: int, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """Add noise to actions, as diffusers' ``DDIMScheduler.add_noise``.

    Args:
        num_levels: Number of noise levels in training.
        clean: ``(batch, chunk, action_dim)``.
        noise: Of the same shape.
        timesteps: int64 ``(batch,)``, the noise level of each sample.
    """
    alpha = alphas_cumprod(num_levels).to(device=clean.device, dtype=clean.dtype)[timesteps]
    alpha = alpha[:, None, None]
    return alpha**0.5 * clean + (1 - alpha) ** 0.5 * noise
