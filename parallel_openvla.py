"""Parallel decoding (OpenVLA-OFT): a chunk of actions from one pass in which every position attends to every other.

One prediction, in order: ``append_action_placeholders`` appends one placeholder for every number of the chunk, and the
end token, to the prompt; ``embed_observation`` embeds text, images and proprio; ``action_hidden_states`` runs the
language model with a bidirectional mask and returns the hidden states that predict the chunk; an action head, or the
LM head, turns them into actions. The language model is that of transformers, given a four-dimensional mask.

Kim, Finn, Liang 2025, "Fine-Tuning Vision-Language-Action Models: Optimizing Speed and Success".
"""

from __future__ import annotations

import contextlib
import copy
import os
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import transformers
from huggingface_hub import HfApi
from torch import nn
from transformers.utils import logging

from .actions_openvla import FAR_STATE, ActionTokenizer, NormalizationStatistics, as_numbers
from .compatibility_openvla import attention_implementation
from .configuration_openvla import OpenVLAConfig
from .decoding_openvla import Accelerator, insert_after_bos, positions_of, use_fast_decoder
from .errors_openvla import OpenVLAValueError
from .heads_openvla import (
    HEAD_MODULES,
    DiffusionActionHead,
    FeatureProjector,
    L1RegressionActionHead,
    NoiseSchedule,
    timestep_embedding,
)
from .prismatic_openvla import PrismaticForConditionalGeneration

logger = logging.get_logger(__name__)

PLACEHOLDER_ID = 1  # its embedding is replaced
# Attention implementations that take a four-dimensional mask; flash attention is causal or full, without padding.
MASKED_ATTENTION = ("sdpa", "eager")


@dataclass(frozen=True)
class Observation:
    """The embedded inputs that a chunk is predicted from."""

    text: torch.Tensor  # (batch, length, hidden); zero at the action positions
    prefix: torch.Tensor  # (batch, prefix, hidden): patches of all images, then proprio; inserted after BOS
    mask: torch.Tensor | None  # int64 (batch, length), or None if nothing is padding
    action_positions: torch.Tensor  # int64 (batch, chunk * action_dim), the placeholders' positions in text


def append_action_placeholders(
    input_ids: torch.Tensor, mask: torch.Tensor | None, count: int, end_id: int
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Append ``count`` placeholders and the end token to left-padded prompts; return ids, mask and their positions."""
    batch, length = input_ids.shape
    appended = input_ids.new_full((batch, count + 1), PLACEHOLDER_ID)
    appended[:, -1] = end_id
    if mask is not None:
        mask = torch.cat([mask, torch.ones_like(appended)], dim=1)
    action_positions = torch.arange(length, length + count, device=input_ids.device).expand(batch, -1)
    return torch.cat([input_ids, appended], dim=1), mask, action_positions


def bidirectional_mask(visible: torch.Tensor, dtype: torch.dtype, is_additive: bool) -> torch.Tensor:
    """Return a mask ``(batch, 1, length, length)`` with which every query attends to every ``visible`` key.

    Visible keys are 0 and others the lowest number where ``is_additive``; else 1 and 0.
    """
    length, visible = visible.shape[1], visible.to(torch.bool)
    keys = visible.to(dtype)
    if is_additive:
        keys = torch.zeros_like(keys).masked_fill(~visible, torch.finfo(dtype).min)
    return keys[:, None, None, :].expand(-1, 1, length, length)


def refuse_loose_parts(name_or_path: str | os.PathLike[str] | None, hub: dict[str, Any]) -> None:
    """Raise ValueError for OpenVLA-OFT's published layout: without the part files it would act as plain OpenVLA.

    Of Hub repositories only those with "oft" in their name are checked.
    """
    names: list[str] = []
    if name_or_path is not None and os.path.isdir(name_or_path):
        names = os.listdir(os.path.join(name_or_path, hub.get("subfolder", "")))
    elif name_or_path is not None and "oft" in os.fspath(name_or_path).lower():
        # Offline (errors of httpx or requests) or no such repository: loading raises the error for it.
        with contextlib.suppress(Exception):
            api = HfApi(token=hub.get("token"))
            names = api.list_repo_files(os.fspath(name_or_path), revision=hub.get("revision"))
    parts = sorted(name for name in names if name.startswith(tuple(f"{part}--" for part in HEAD_MODULES)))
    if parts:
        raise OpenVLAValueError(
            f"{name_or_path} holds {', '.join(parts)} beside a model that does not load them (OpenVLA-OFT as it was "
            f"published). Fold them in first: openvla convert {name_or_path} OUT --preset libero --num-images 2"
        )


class ParallelDecodingModel(PrismaticForConditionalGeneration):
    """Prismatic model with action heads that predicts a chunk of actions in one bidirectional pass."""

    config: OpenVLAConfig
    config_class = OpenVLAConfig  # type: ignore[assignment]  # a subclass of the base's
    accelerator: ClassVar[Accelerator | None] = None  # set by the installed package
    action_tokenizer: ActionTokenizer  # set by the subclass

    def build_heads(self, config: OpenVLAConfig) -> None:
        """Add the modules that the configuration names; ValueError for an attention without bidirectional masks."""
        self._mask_is_additive: dict[str, bool] = {}  # by attention implementation
        if not config.parallel_decoding or config.action_dim is None:
            return
        self._require_masked_attention()
        hidden = config.text_config.hidden_size
        if config.action_head == "l1":
            self.action_head: nn.Module = L1RegressionActionHead(hidden, config.action_dim)
        if config.action_head == "diffusion":
            self.action_head = DiffusionActionHead(hidden, config.action_dim)
            self.noisy_action_projector = FeatureProjector(1, hidden)
        if config.proprio_dim is not None:
            self.proprio_projector = FeatureProjector(config.proprio_dim, hidden)

    @property
    def action_token_ids(self) -> slice:
        """Return the ids that are action tokens: the last ``n_action_bins`` of the unpadded vocabulary."""
        return slice(self.action_tokenizer.first_token_id, self.action_tokenizer.vocab_size)

    @property
    def chunk_shape(self) -> tuple[int, int]:
        """Return the shape of a chunk, ``(chunk_length, action_dim)``."""
        if self.config.action_dim is None:
            raise RuntimeError("A model without parallel decoding has no chunk.")
        return self.config.chunk_length, self.config.action_dim

    @property
    def tokens_per_chunk(self) -> int:
        """Return the number of tokens of a chunk, one for each of its numbers."""
        return self.chunk_shape[0] * self.chunk_shape[1]

    def embed_observation(
        self,
        input_ids: torch.Tensor,
        mask: torch.Tensor | None,
        action_positions: torch.Tensor,
        pixel_values: torch.Tensor,
        proprio: torch.Tensor | None,
    ) -> Observation:
        """Embed the inputs that a chunk is predicted from.

        Args:
            input_ids: int64 ``(batch, length)`` with placeholders or action tokens.
            mask: ``(batch, length)``, or None.
            action_positions: int64 ``(batch, chunk * action_dim)``, the positions of those.
            pixel_values: float ``(batch, images * (3 or 6), size, size)``.
            proprio: float ``(batch, proprio_dim)``, normalised; None for a model without.
        """
        if not torch.is_tensor(pixel_values) or len(pixel_values) != len(input_ids):
            got = len(pixel_values) if torch.is_tensor(pixel_values) else pixel_values
            raise OpenVLAValueError(
                f"The batch has {len(input_ids)} prompts but images of {got} samples; give each prompt its images."
            )
        self._require_proprio(proprio, len(input_ids))
        text = self.get_input_embeddings()(input_ids)
        is_action = torch.zeros_like(input_ids, dtype=torch.bool).scatter(1, action_positions, True)
        condition = None
        if self.config.use_film:  # the mean of all but actions and padding; the end token counts, as in training
            if mask is None:  # indices of a known number: a mask would wait for the device
                num_words = text.shape[1] - action_positions.shape[1]
                words = is_action.long().argsort(dim=1, stable=True)[:, :num_words]
            else:
                words = ~is_action & mask.to(torch.bool)
            # Sample by sample: zeros in the sum would change its rounding, which diffusion amplifies.
            condition = torch.stack([sample[chosen].mean(0) for sample, chosen in zip(text, words)])
        prefix = self.get_image_features(pixel_values, condition).to(device=text.device, dtype=text.dtype)
        if proprio is not None:
            token = self.proprio_projector(proprio.to(device=text.device, dtype=text.dtype))
            prefix = torch.cat([prefix, token.to(text.dtype)[:, None]], dim=1)
        return Observation(text.masked_fill(is_action[..., None], 0), prefix, mask, action_positions)

    def action_hidden_states(
        self,
        obs: Observation,
        positions: torch.Tensor | None = None,
        *,
        noisy: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        fast: bool | None = False,
    ) -> torch.Tensor:
        """Return the hidden states that predict some positions of the text, ``(batch, count, hidden)``.

        A position is predicted by the hidden state one before it, as in training.

        Args:
            obs: The observation.
            positions: int64 ``(batch, count)``; None for the action positions.
            noisy: Diffusion: the noisy chunk ``(batch, chunk, action_dim)``, embedded at the action positions.
            timesteps: Diffusion: its noise level ``(batch,)``.
            fast: As of ``predict_action``; False in training, which needs gradients.
        """
        positions = obs.action_positions if positions is None else positions
        text, prefix = obs.text, obs.prefix
        hidden_size = text.shape[-1]
        if noisy is not None and timesteps is not None:
            features = self.noisy_action_projector(noisy.flatten(1)[..., None]).to(text.dtype)
            text = text.scatter(1, obs.action_positions[..., None].expand(-1, -1, hidden_size), features)
            time = timestep_embedding(timesteps, hidden_size).to(text.dtype)
            prefix = torch.cat([prefix, time[:, None].expand(len(prefix), -1, -1)], dim=1)
        if obs.mask is None:
            bos = torch.zeros(len(text), dtype=torch.long, device=text.device)
            mask = None
        else:
            bos = obs.mask.to(torch.long).argmax(dim=1)
            mask = insert_after_bos(obs.mask, obs.mask.new_ones(prefix.shape[:2]), bos)
        embeds = insert_after_bos(text, prefix, bos)
        index = (positions + prefix.shape[1] - 1).to(embeds.device)
        accelerator = self.accelerator
        if use_fast_decoder(fast, accelerator, self.language_model, embeds.shape[1]) and accelerator is not None:
            return accelerator.bidirectional_hidden_states(self.language_model, embeds, mask, index)
        hidden = self._decode(self.get_decoder(), embeds, mask, self.require_bidirectional())
        index = index.to(hidden.device)
        return hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))

    @staticmethod
    def _decode(decoder: nn.Module, embeds: torch.Tensor, mask: torch.Tensor | None, is_additive: bool) -> torch.Tensor:
        """Return last hidden states ``(batch, length, hidden)`` under a bidirectional mask."""
        visible = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device) if mask is None else mask
        return decoder(
            inputs_embeds=embeds,
            attention_mask=bidirectional_mask(visible, embeds.dtype, is_additive),
            position_ids=None if mask is None else positions_of(mask),
            use_cache=False,
            return_dict=True,
        ).last_hidden_state

    def _require_masked_attention(self) -> str:
        attention = str(attention_implementation(self.language_model.config))
        if attention not in MASKED_ATTENTION:
            raise OpenVLAValueError(
                f"Parallel decoding needs a bidirectional mask, which {attention} does not take (it would silently be "
                "causal); load with attn_implementation='sdpa' or 'eager'."
            )
        return attention

    @torch.no_grad()
    def require_bidirectional(self) -> bool:
        """Return how this transformers reads a four-dimensional mask: True additive, False 1 for visible (4.40).

        Both are tried, once, on the first layer: with the right one a later token influences an earlier one, and a
        masked token influences none. Where neither works it raises RuntimeError: a causal language model would predict
        plausible, wrong chunks (success on LIBERO falls from 97 % to about 56 %).
        """
        attention = self._require_masked_attention()
        if attention not in self._mask_is_additive:
            is_additive = next((form for form in (True, False) if self._is_bidirectional(form)), None)
            if is_additive is None:
                raise RuntimeError(
                    f"transformers {transformers.__version__} does not run this {type(self.language_model).__name__} "
                    f"bidirectionally under {attention} attention: a later token does not influence an earlier one, or "
                    "a masked one does. Its chunks would be wrong. Use another transformers version, or "
                    "attn_implementation='eager'."
                )
            self._mask_is_additive[attention] = is_additive
        return self._mask_is_additive[attention]

    def _is_bidirectional(self, is_additive: bool) -> bool:
        """Return whether the first layer is bidirectional under one form of mask, and heeds padding."""
        embeddings: Any = self.get_input_embeddings()
        device = torch.device("cpu") if embeddings.weight.device.type == "meta" else embeddings.weight.device
        first, last, other = embeddings(torch.arange(3, 6, device=device))
        original, changed = torch.stack([first, first, last]), torch.stack([first, first, other])
        embeds = torch.stack([original, changed, original, changed])
        mask = torch.ones(4, 3, dtype=torch.long, device=device)
        mask[2:, 2] = 0
        decoder: Any = self.get_decoder()
        training = decoder.training
        first_layer = copy.copy(decoder)  # another thread may be using the decoder itself
        first_layer._modules = {**decoder._modules, "layers": decoder.layers[:1]}
        try:
            hidden = self._decode(first_layer.eval(), embeds, mask, is_additive)[:, 0]
        except ValueError:  # transformers 4.40 takes no such mask for some language models under sdpa
            return False
        finally:
            first_layer.train(training)
        visible, visible_changed, masked, masked_changed = hidden
        finite = bool(torch.isfinite(visible).all())  # weights that are not finite have an error of their own
        return not finite or (not torch.equal(visible, visible_changed) and torch.equal(masked, masked_changed))

    def _require_proprio(self, proprio: torch.Tensor | np.ndarray | None, batch: int) -> None:
        dim = self.config.proprio_dim
        if dim is None and proprio is not None:
            raise OpenVLAValueError("This model was trained without proprio; leave it out.")
        if dim is None:
            return
        if proprio is None:
            raise OpenVLAValueError(
                f"This model was trained with proprio; pass the robot's state, {dim} numbers a sample."
            )
        if tuple(proprio.shape) != (batch, dim):
            raise OpenVLAValueError(f"proprio must have shape ({batch}, {dim}), got {tuple(proprio.shape)}.")

    def initial_noise(
        self, input_ids: torch.Tensor, noise: torch.Tensor | None, generator: torch.Generator | None
    ) -> torch.Tensor:
        """Return where the denoising starts, ``(batch, chunk, action_dim)``: the given noise, or drawn noise."""
        embeddings: Any = self.get_input_embeddings()
        shape, device, dtype = (len(input_ids), *self.chunk_shape), input_ids.device, embeddings.weight.dtype
        if noise is None:
            return torch.randn(shape, generator=generator, device=device, dtype=dtype)
        noise = torch.as_tensor(noise, device=device, dtype=dtype)
        noise = noise[None] if noise.ndim == 2 and shape[0] == 1 else noise
        if noise.shape != shape:
            raise OpenVLAValueError(
                f"noise must have shape {shape} (or {shape[1:]} for one sample), got {tuple(noise.shape)}."
            )
        return noise

    def predict_normalized_chunk(
        self, obs: Observation, noisy: torch.Tensor | None, num_inference_steps: int | None, fast: bool | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return normalised actions ``(batch, chunk, action_dim)`` of a continuous head, and their hidden states."""
        if noisy is None or self.config.action_head == "l1":
            hidden = self.action_hidden_states(obs, fast=fast)
            return self.action_head(hidden), hidden
        schedule = NoiseSchedule(self.config.num_diffusion_steps_train)
        num_steps = self.config.num_diffusion_steps if num_inference_steps is None else num_inference_steps
        for timestep in schedule.timesteps(num_steps):
            levels = torch.full((len(noisy),), float(timestep), device=noisy.device)
            hidden = self.action_hidden_states(obs, noisy=noisy, timesteps=levels, fast=fast)
            noisy = schedule.step(self.action_head(hidden), timestep, noisy, num_steps).to(noisy.dtype)
        return noisy, hidden

    def chunk_logits(self, obs: Observation, fast: bool | None = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Return token logits, float32 ``(batch, chunk * action_dim, vocabulary)``, and their hidden states."""
        hidden = self.action_hidden_states(obs, fast=fast)
        return self.get_output_embeddings()(hidden).float(), hidden


def normalize_proprio(
    proprio: np.ndarray, statistics: list[NormalizationStatistics], unnorm_keys: list[str]
) -> torch.Tensor:
    """Return robot states normalised by their datasets' statistics, float32 ``(batch, proprio_dim)``."""
    normalized = []
    for key, entry, state in zip(unnorm_keys, statistics, proprio):
        normalized.append(entry.normalize_proprio(state))
        far = entry.far_states(state)
        if far:
            logger.warning_once(
                f"Numbers {far} of proprio lie more than {FAR_STATE} half ranges from the middle of what {key!r} "
                "was trained on, and are cut to its ends. Give the state in the units and the order of training "
                "(m and rad, not mm and degrees)."
            )
    return torch.tensor(np.stack(normalized), dtype=torch.float32)


def proprio_array(proprio: Any, batch: int) -> np.ndarray | None:
    """Return robot states as float64 ``(batch, proprio_dim)``, a single one with its batch axis."""
    if proprio is None:
        return None
    if torch.is_tensor(proprio):
        proprio = proprio.detach().double().cpu().numpy()
    array = as_numbers(proprio, "proprio")
    return array[None] if array.ndim == 1 and batch == 1 else array
