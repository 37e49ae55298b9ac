"""Reinforcement learning: sample actions with their log-probabilities, and compute these with gradient.

Both use one distribution: the softmax over the action tokens alone, after ``temperature`` and ``top_k``.
``loading.attach_methods`` makes ``sample_actions`` and ``action_log_probs`` methods of the model.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..decoding_openvla import positions_of, require_finite
from ..errors_openvla import OpenVLAValueError
from ..parallel_openvla import append_action_placeholders

if TYPE_CHECKING:
    from ..modeling_openvla import OpenVLAForActionPrediction, Prompt
    from ..processing_openvla import OpenVLAProcessor

VALUE_HEAD_FILE = "value_head.safetensors"
VALUE_HEAD_WIDTHS = (512, 128)  # of RLinf's value head


class ValueHead(nn.Module):
    """Value of an observation from a hidden state: a multilayer perceptron of 512 and 128 units with GELU.

    Args:
        hidden_size: Size of the language model's hidden states (``model.config.text_config.hidden_size``).
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        first, second = VALUE_HEAD_WIDTHS
        self.layers = nn.Sequential(
            nn.Linear(hidden_size, first), nn.GELU(), nn.Linear(first, second), nn.GELU(), nn.Linear(second, 1)
        )

    def forward(self, hidden_state: torch.Tensor) -> torch.Tensor:
        """Return float32 values ``(batch,)`` of hidden states ``(batch, hidden)``."""
        return self.layers(hidden_state.to(next(self.parameters()).dtype)).float().squeeze(-1)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``value_head.safetensors`` into a folder, such as that of the model."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        partial = Path(folder) / f".{VALUE_HEAD_FILE}.partial"
        save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, partial)
        os.replace(partial, Path(folder) / VALUE_HEAD_FILE)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ValueHead:
        """Load a head from a folder.

        Raises:
            OpenVLAValueError: The folder has none.
        """
        file = Path(folder) / VALUE_HEAD_FILE
        if not file.is_file():
            raise OpenVLAValueError(f"{folder} has no {VALUE_HEAD_FILE}; ValueHead(hidden_size) makes a new head.")
        weights = load_file(file)
        head = cls(weights["layers.0.weight"].shape[1])
        head.load_state_dict(weights)
        return head


@torch.no_grad()
def sample_actions(
    model: OpenVLAForActionPrediction,
    input_ids: torch.Tensor | None = None,
    pixel_values: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    unnorm_key: str | Sequence[str | None] | None = None,
    *,
    proprio: np.ndarray | torch.Tensor | Sequence[float] | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    value_head: ValueHead | None = None,
) -> tuple[Any, ...]:
    """Sample an action for every observation, for rollouts.

    Args:
        model: The model; in typed code this is a function, else a method of the model.
        input_ids: As in ``predict_action``, as the next three.
        pixel_values: Images.
        attention_mask: Mask of the prompts.
        unnorm_key: Dataset whose statistics give robot units.
        proprio: As in ``predict_action``.
        temperature: Logits are divided by it.
        top_k: Number of likeliest tokens to draw from; None for all action tokens.
        generator: Random generator on the model's device; None for torch's own.
        value_head: Computes values from the hidden state that predicts the first token.

    Returns:
        ``actions``: float64 array ``(batch, action_dim)`` in robot units, of models with chunks ``(batch, chunk,
        action_dim)``. ``tokens``: int64 ``(batch, action_dim)``; parallel decoding ``(batch, chunk, action_dim)``, VQ
        actions ``(batch, rounds)``. ``log_probs``: float32 of the shape of ``tokens``, each token's given those before
        it, in nats, by the pass of ``action_log_probs``: of a model in eval mode both are equal in every bit. With
        ``value_head`` also ``values``: float32 ``(batch,)``. A single sample keeps its batch axis.

    Raises:
        ValueError: Inputs are missing or do not fit the model, ``temperature`` or ``top_k`` is out of range, or the
            model predicts no tokens (L1 and diffusion heads).
        KeyError: Unknown ``unnorm_key``.
    """
    prompt = _checked_prompt(model, input_ids, pixel_values, attention_mask, temperature, top_k)
    keys = model.batch_keys(unnorm_key, len(prompt.input_ids))
    statistics, state = model.batch_statistics(keys), model.normalize_proprio(proprio, keys)
    if model.config.parallel_decoding:
        logits, hidden = _chunk_logits(model, prompt, state)
        tokens = _draw(model, _log_distribution(model, logits, temperature, top_k), generator)
    else:
        embeds, mask, _, _ = model.embed_inputs(*prompt)
        count = model.num_action_tokens(statistics)
        tokens = _sample_tokens(model, embeds, mask, count, temperature, top_k, generator)
        # The pass that training takes: decoding with a cache rounds otherwise.
        logits, hidden = token_logits(model, embeds, mask, tokens)
    log_probs, _ = _log_probs_and_entropy(model, logits, tokens, temperature, top_k)
    normalized = [model.action_tokenizer.decode(ids) for ids in tokens.cpu().numpy()]
    actions = np.stack([entry.unnormalize(values) for entry, values in zip(statistics, normalized)])
    sampled = (actions, tokens, log_probs)
    return sampled if value_head is None else (*sampled, value_head(hidden))


def action_log_probs(
    model: OpenVLAForActionPrediction,
    input_ids: torch.Tensor | None = None,
    pixel_values: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    unnorm_key: str | Sequence[str | None] | None = None,
    *,
    tokens: torch.Tensor,
    proprio: np.ndarray | torch.Tensor | Sequence[float] | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    value_head: ValueHead | None = None,
) -> tuple[torch.Tensor, ...]:
    """Return log-probabilities of sampled tokens and entropies, with gradient.

    Args:
        model: The model; in typed code this is a function, else a method of the model.
        input_ids: As in ``predict_action``, as the next three.
        pixel_values: Images.
        attention_mask: Mask of the prompts.
        unnorm_key: Needed for ``proprio`` of a model with the statistics of several datasets.
        tokens: int64, as ``sample_actions`` returned them for these observations.
        proprio: As in ``predict_action``.
        temperature: As the tokens were sampled, as the next one.
        top_k: A token that is no longer among the ``top_k`` has log-probability minus infinity.
        value_head: As of ``sample_actions``; values have a gradient too.

    Returns:
        ``log_probs`` and ``entropy`` in nats: float32, of the shape of ``tokens``. With ``value_head`` also ``values``:
        float32 ``(batch,)``.

    Raises:
        ValueError: As ``sample_actions``; or ``tokens`` have another shape, or are no action tokens.
    """
    prompt = _checked_prompt(model, input_ids, pixel_values, attention_mask, temperature, top_k)
    tokens = _checked_tokens(model, tokens, len(prompt.input_ids))
    logits, hidden = _logits(model, prompt, unnorm_key, tokens, proprio)
    evaluated = _log_probs_and_entropy(model, logits, tokens, temperature, top_k)
    return evaluated if value_head is None else (*evaluated, value_head(hidden))


def action_log_distribution(
    model: OpenVLAForActionPrediction,
    input_ids: torch.Tensor | None = None,
    pixel_values: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    unnorm_key: str | Sequence[str | None] | None = None,
    *,
    tokens: torch.Tensor | None = None,
    proprio: np.ndarray | torch.Tensor | Sequence[float] | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> torch.Tensor:
    """Return the log-probabilities of all action tokens at every position, with gradient.

    Args:
        model: The model.
        input_ids: As in ``action_log_probs``, as the next three.
        pixel_values: Images.
        attention_mask: Mask of the prompts.
        unnorm_key: Dataset.
        tokens: As in ``action_log_probs``: each position is given the tokens before it. None with parallel decoding,
            where no position depends on another.
        proprio: As in ``predict_action``.
        temperature: Logits are divided by it.
        top_k: Number of likeliest tokens; the others have minus infinity. None for all.

    Returns:
        float32 ``(batch, action_dim, action tokens)``, parallel decoding ``(batch, chunk, action_dim, action tokens)``,
        VQ actions ``(batch, rounds, action tokens)``, in nats; index 0 is the token ``model.action_token_ids.start``.

    Raises:
        ValueError: As ``action_log_probs``; or ``tokens`` are missing, or given with parallel decoding.
    """
    prompt = _checked_prompt(model, input_ids, pixel_values, attention_mask, temperature, top_k)
    if (tokens is None) != model.config.parallel_decoding:
        raise OpenVLAValueError("tokens are needed of a model without parallel decoding, and of no other.")
    if tokens is not None:
        tokens = _checked_tokens(model, tokens, len(prompt.input_ids))
    logits, _ = _logits(model, prompt, unnorm_key, tokens, proprio)
    return _log_distribution(model, logits, temperature, top_k)


def token_logits(
    model: OpenVLAForActionPrediction, embeds: torch.Tensor, mask: torch.Tensor | None, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run embedded prompts followed by action tokens in one pass.

    Args:
        model: A model that predicts token by token.
        embeds: ``(batch, length, hidden)``, of ``embed_inputs``.
        mask: ``(batch, length)``, or None.
        tokens: int64 ``(batch, count)`` on the device of ``embeds``.

    Returns:
        float32 logits ``(batch, count, vocabulary)`` that predict the tokens, and the hidden state that predicts the
        first one, ``(batch, hidden)``.
    """
    count = tokens.shape[1]
    embeds = torch.cat([embeds, model.get_input_embeddings()(tokens[:, :-1]).to(embeds.dtype)], dim=1)
    if mask is not None:
        mask = torch.cat([mask, mask.new_ones(len(mask), count - 1)], dim=1)
    hidden = model.get_decoder()(
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=None if mask is None else positions_of(mask),
        use_cache=False,
        return_dict=True,
    ).last_hidden_state[:, -count:]
    return require_finite(model.get_output_embeddings()(hidden).float()), hidden[:, 0]


def observation_batch(
    processor: OpenVLAProcessor,
    frames: Sequence[Any],
    instructions: Sequence[str],
    states: np.ndarray | Sequence[Any] | None = None,
    *,
    pad_to: int | None = None,
) -> dict[str, Any]:
    """Return model inputs for the observations of several environments.

    Args:
        processor: Processor of the model.
        frames: For each environment its image, uint8 ``(height, width, 3)``, or the list of its cameras' images.
        instructions: For each environment its instruction.
        states: Robot states ``(batch, proprio_dim)`` in the robot's units, for models that take them.
        pad_to: Length of every prompt in tokens, so that all batches have one shape; None pads to the longest.

    Returns:
        Arguments of ``sample_actions``, ``action_log_probs`` and ``predict_action``: ``input_ids`` and
        ``attention_mask`` int64 ``(batch, length)``, ``pixel_values`` float32, and ``proprio`` if there are states.

    Raises:
        ValueError: The numbers of frames, instructions and states differ, or a prompt is longer than ``pad_to``.
    """
    counts = {"frames": len(frames), "instructions": len(instructions)}
    counts |= {} if states is None else {"states": len(states)}
    if len(set(counts.values())) != 1:
        raise OpenVLAValueError(f"Each environment has one of each, got {counts}.")
    padding: dict[str, Any] = {} if pad_to is None else {"padding": "max_length", "max_length": pad_to}
    batch = dict(processor(instruction=list(instructions), images=list(frames), **padding))
    return batch if states is None else {**batch, "proprio": np.asarray(states, dtype=np.float64)}


def _checked_prompt(
    model: OpenVLAForActionPrediction,
    input_ids: torch.Tensor | None,
    pixel_values: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    temperature: float,
    top_k: int | None,
) -> Prompt:
    """Return the prompt of a prediction; raise OpenVLAValueError for arguments that allow no distribution."""
    if input_ids is None or pixel_values is None:
        raise OpenVLAValueError("input_ids and pixel_values are needed.")
    if model.config.action_head is not None:
        raise OpenVLAValueError(
            f"A model with action_head {model.config.action_head!r} has no distribution of tokens; use one that "
            "predicts tokens (action_head null)."
        )
    if not 0 < temperature < float("inf"):
        raise OpenVLAValueError(f"temperature must be positive, got {temperature}; predict_action is greedy.")
    ids = model.action_token_ids
    if top_k is not None and not 1 <= top_k <= ids.stop - ids.start:
        raise OpenVLAValueError(f"top_k must be from 1 to {ids.stop - ids.start}, got {top_k}.")
    return model._prepare_prompt(input_ids, pixel_values, attention_mask)


def _checked_tokens(model: OpenVLAForActionPrediction, tokens: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Return tokens on the device of the embeddings; raise OpenVLAValueError where they are no sampled actions."""
    ids = model.action_token_ids
    shape = (batch_size, *model.chunk_shape) if model.config.parallel_decoding else (batch_size, None)
    if tokens.ndim != len(shape) or any(want not in (None, size) for size, want in zip(tokens.shape, shape)):
        raise OpenVLAValueError(f"tokens must have shape {shape}, got {tuple(tokens.shape)}.")
    if tokens.is_floating_point() or bool(((tokens < ids.start) | (tokens >= ids.stop)).any()):
        raise OpenVLAValueError(f"tokens must be action tokens, integers from {ids.start} to {ids.stop - 1}.")
    embeddings: Any = model.get_input_embeddings()
    return tokens.to(embeddings.weight.device)


def _logits(
    model: OpenVLAForActionPrediction,
    prompt: Prompt,
    unnorm_key: str | Sequence[str | None] | None,
    tokens: torch.Tensor | None,
    proprio: np.ndarray | torch.Tensor | Sequence[float] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits ``(..., vocabulary)`` of the shape of tokens, and the hidden state of the first token."""
    if tokens is None or model.config.parallel_decoding:
        keys = model.batch_keys(unnorm_key, len(prompt.input_ids))
        return _chunk_logits(model, prompt, model.normalize_proprio(proprio, keys))
    model.normalize_proprio(proprio, [""] * len(prompt.input_ids))  # refuses any
    embeds, mask, _, _ = model.embed_inputs(*prompt)
    return token_logits(model, embeds, mask, tokens)


def _chunk_logits(
    model: OpenVLAForActionPrediction, prompt: Prompt, proprio: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits ``(batch, chunk, action_dim, vocabulary)`` and the hidden state of the first token."""
    end_id = model.config.text_config.eos_token_id
    ids, mask, positions = append_action_placeholders(
        prompt.input_ids, prompt.attention_mask, model.tokens_per_chunk, end_id
    )
    obs = model.embed_observation(ids, mask, positions, prompt.pixel_values, proprio)
    logits, hidden = model.chunk_logits(obs)
    return require_finite(logits).unflatten(1, model.chunk_shape), hidden[:, 0]


def _log_distribution(
    model: OpenVLAForActionPrediction, logits: torch.Tensor, temperature: float, top_k: int | None
) -> torch.Tensor:
    """Return float32 log-probabilities ``(..., action tokens)`` of logits ``(..., vocabulary)``."""
    logits = logits[..., model.action_token_ids].float() / temperature
    if top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
    return logits.log_softmax(-1)


def _log_probs_and_entropy(
    model: OpenVLAForActionPrediction, logits: torch.Tensor, tokens: torch.Tensor, temperature: float, top_k: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probabilities of tokens and the entropies of their distributions, of the shape of ``tokens``."""
    log_probs = _log_distribution(model, logits, temperature, top_k)
    index = (tokens.to(log_probs.device) - model.action_token_ids.start)[..., None]
    # A token outside top_k has probability 0; 0 * log(0) is 0, and has no gradient.
    finite = torch.where(log_probs.isfinite(), log_probs, 0.0)
    return log_probs.gather(-1, index).squeeze(-1), -(log_probs.exp() * finite).sum(-1)


def _draw(
    model: OpenVLAForActionPrediction, log_probs: torch.Tensor, generator: torch.Generator | None
) -> torch.Tensor:
    """Draw the id of a token from each of the distributions ``(..., action tokens)``."""
    index = torch.multinomial(log_probs.flatten(0, -2).exp(), 1, generator=generator)
    return index.view(log_probs.shape[:-1]) + model.action_token_ids.start


def _sample_tokens(
    model: OpenVLAForActionPrediction,
    embeds: torch.Tensor,
    mask: torch.Tensor | None,
    count: int,
    temperature: float,
    top_k: int | None,
    generator: torch.Generator | None,
) -> torch.Tensor:
    """Sample ``count`` tokens one by one after embedded prompts: int64 ``(batch, count)``."""

    def draw(scores: torch.Tensor) -> torch.Tensor:
        """Draw the next token, and leave no other to ``generate``, which takes the likeliest."""
        token = _draw(model, _log_distribution(model, require_finite(scores), temperature, top_k), generator)
        return torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0.0)

    settings: dict[str, Any] = {"max_new_tokens": count, "eos_token_id": None, "do_sample": False}
    settings |= {"logits_processor": [lambda _, scores: draw(scores)], "return_dict_in_generate": True}
    return model._generate_from_embeds(embeds, mask, settings).sequences
