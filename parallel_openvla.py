"""Parallel decoding (OpenVLA-OFT): a chunk of actions from one pass in which every position sees every other.

One answer, in order: ``with_action_slots`` puts an empty slot for every number of the chunk, and the end token, behind
the prompt; ``observe`` embeds text, images and proprio; ``hidden_at`` runs the language model with a bidirectional
mask and takes the hidden states that predict the slots; a head, or the language model's own, turns them into actions.

Stock transformers does the rest: the mask is given in four dimensions, as this version's language models read it.
"""

from __future__ import annotations

import contextlib
import copy
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from huggingface_hub import HfApi
from torch import nn
from transformers.modeling_outputs import ModelOutput
from transformers.utils import logging

from .actions_openvla import FAR_STATE, as_numbers
from .compatibility_openvla import attention_implementation
from .configuration_openvla import OpenVLAConfig
from .decoding_openvla import given_names, insert_after_bos, positions_of, require_one_pass
from .errors_openvla import OpenVLAValueError
from .fast_openvla import FastDecoder, goes_fast
from .heads_openvla import (
    HEAD_MODULES,
    DiffusionActionHead,
    FeatureProjector,
    L1RegressionActionHead,
    NoiseSchedule,
    is_action_head_param,
    timestep_embedding,
)
from .prismatic_openvla import logits_before

logger = logging.get_logger(__name__)

PLACEHOLDER_ID = 1  # stands where an action will be; its embedding is replaced
# Which attention takes a mask in four dimensions; flash attention knows only causal and full, of unpadded rows.
MASKED_ATTENTION = ("sdpa", "eager")


@dataclass
class ChunkOutput(ModelOutput):
    """What ``forward`` of a parallel-decoding model gives.

    Attributes:
        loss: Float scalar: cross entropy of the labelled tokens, L1 of the actions, or squared error of the noise.
        logits: Tokens: ``(labelled positions, padded vocabulary)``, row by row as the labels stand.
        predictions: Heads: ``(batch, chunk, action_dim)``, normalised actions (L1) or noise (diffusion).
        hidden_states: ``(batch, chunk * action_dim, hidden)``, those that predict the chunk.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    predictions: torch.FloatTensor | None = None
    hidden_states: torch.FloatTensor | None = None


@dataclass
class Observation:
    """What one chunk is answered from, on the device, embedded.

    Attributes:
        text: ``(batch, length, hidden)``; zero at the slots.
        prefix: ``(batch, prefix, hidden)``: patches of all images, then proprio; goes after BOS.
        mask: int64 ``(batch, length)``, or None if nothing is padding.
        slots: int64 ``(batch, chunk * action_dim)``, the slots' positions in ``text``.
        fast: As of ``predict_action``; False in training, which needs gradients.
    """

    text: torch.Tensor
    prefix: torch.Tensor
    mask: torch.LongTensor | None
    slots: torch.LongTensor
    fast: bool | None = False


def with_action_slots(
    input_ids: torch.LongTensor, mask: torch.LongTensor | None, count: int, end_id: int
) -> tuple[torch.LongTensor, torch.LongTensor | None, torch.LongTensor]:
    """Left-padded prompts followed by ``count`` slots and the end token, their mask, and where the slots are."""
    rows, length = input_ids.shape
    behind = input_ids.new_full((rows, count + 1), PLACEHOLDER_ID)
    behind[:, -1] = end_id
    if mask is not None:
        mask = torch.cat([mask, torch.ones_like(behind)], dim=1)
    slots = torch.arange(length, length + count, device=input_ids.device).expand(rows, -1)
    return torch.cat([input_ids, behind], dim=1), mask, slots


def bidirectional_mask(visible: torch.Tensor, dtype: torch.dtype, added: bool) -> torch.Tensor:
    """Mask ``(batch, 1, length, length)`` of ``(batch, length)``: every query sees every visible key.

    Args:
        visible: bool or int64 ``(batch, length)``.
        dtype: Of the mask.
        added: 0 where a key is visible, the lowest number elsewhere; else 1 and 0.
    """
    length, visible = visible.shape[1], visible.to(torch.bool)
    row = visible.to(dtype)
    if added:
        row = torch.zeros_like(row).masked_fill(~visible, torch.finfo(dtype).min)
    return row[:, None, None, :].expand(-1, 1, length, length)


def refuse_loose_parts(name_or_path: str | os.PathLike | None, hub: dict[str, Any]) -> None:
    """Raise ValueError for OFT as it was published: without the part files it would answer as plain OpenVLA, wrongly.

    Of the Hub only repositories that are called OFT are asked.
    """
    names: list[str] = []
    if name_or_path is not None and os.path.isdir(name_or_path):
        names = os.listdir(os.path.join(name_or_path, hub.get("subfolder", "")))
    elif name_or_path is not None and "oft" in os.fspath(name_or_path).lower():
        with contextlib.suppress(Exception):  # offline (errors of httpx, of requests), no repository: loading will say
            api = HfApi(token=hub.get("token"))
            names = api.list_repo_files(os.fspath(name_or_path), revision=hub.get("revision"))
    parts = sorted(name for name in names if name.startswith(tuple(f"{part}--" for part in HEAD_MODULES)))
    if parts:
        raise OpenVLAValueError(
            f"{name_or_path} holds {', '.join(parts)} beside a model that does not know of them (OpenVLA-OFT as it was "
            f"published). Fold them in first: openvla convert {name_or_path} OUT --preset libero --num-images 2"
        )


class ParallelDecodingMixin:
    """The heads of a parallel-decoding model, its pass and its losses; mixed into ``OpenVLAForActionPrediction``."""

    def build_heads(self, config: OpenVLAConfig) -> None:
        """Add the modules that the configuration names.

        Raises:
            ValueError: The attention implementation takes no bidirectional mask.
        """
        self._mask_is_added: dict[str, bool] = {}  # by attention implementation
        if not config.parallel_decoding:
            return
        self._require_masked_attention()
        hidden = config.text_config.hidden_size
        if config.action_head == "l1":
            self.action_head = L1RegressionActionHead(hidden, config.action_dim)
        if config.action_head == "diffusion":
            self.action_head = DiffusionActionHead(hidden, config.action_dim)
            self.noisy_action_projector = FeatureProjector(1, hidden)
        if config.proprio_dim is not None:
            self.proprio_projector = FeatureProjector(config.proprio_dim, hidden)

    def enable_parallel_decoding(self, **fields: Any) -> None:
        """Make a loaded OpenVLA answer chunks of actions, in place: new heads and FiLM layers are added, untrained.

        From then on it answers nothing useful until it is fine-tuned.

        Args:
            **fields: Of ``OpenVLAConfig``: ``action_dim`` and what differs from one action in tokens, such as
                ``**PLATFORMS["libero"], action_head="l1", num_images_in_input=2``.

        Raises:
            ValueError: The model already answers in parallel or has an adapter, or fields are unknown or contradict
                each other; the model is left as it was.
        """
        if self.config.parallel_decoding:
            raise OpenVLAValueError(f"This model already answers in parallel: {self.config.action_config}.")
        if not fields.get("parallel_decoding", True):
            raise OpenVLAValueError(
                "enable_parallel_decoding makes parallel_decoding true; leave parallel_decoding out."
            )
        self._require_no_adapter()
        self._require_masked_attention()
        self.config.set_action_config(**{**fields, "parallel_decoding": True})
        self.build_heads(self.config)
        self.vision_backbone.configure(self.config)
        like = self.projector.fc1
        weight = like.weight if like.weight.is_floating_point() else like.bias
        for name, module in self.named_modules():
            if is_action_head_param(name):
                module.to(device=weight.device, dtype=weight.dtype)

    @property
    def tokens_per_chunk(self) -> int:
        """Slots of one answer."""
        return self.config.chunk_length * self.config.action_dim

    @property
    def noise_schedule(self) -> NoiseSchedule:
        """Of the diffusion head."""
        return NoiseSchedule(self.config.num_diffusion_steps_train)

    def observe(
        self,
        input_ids: torch.LongTensor,
        mask: torch.LongTensor | None,
        slots: torch.LongTensor,
        pixel_values: torch.Tensor,
        proprio: torch.Tensor | None,
    ) -> Observation:
        """Embed what a chunk is answered from.

        Args:
            input_ids: int64 ``(batch, length)`` with slots.
            mask: ``(batch, length)``, or None.
            slots: int64 ``(batch, chunk * action_dim)``, their positions.
            pixel_values: float ``(batch, images * (3 or 6), size, size)``.
            proprio: float ``(batch, proprio_dim)``, normalised; None for a model without.

        Raises:
            ValueError: Proprio or images do not fit the model.
        """
        if not torch.is_tensor(pixel_values) or len(pixel_values) != len(input_ids):
            got = len(pixel_values) if torch.is_tensor(pixel_values) else pixel_values
            raise OpenVLAValueError(
                f"The batch has {len(input_ids)} prompts but {got} rows of images; give each its images."
            )
        self._require_proprio(proprio, len(input_ids))
        text = self.get_input_embeddings()(input_ids)
        at_slots = torch.zeros_like(input_ids, dtype=torch.bool).scatter(1, slots, True)
        condition = None
        if self.config.use_film:  # the mean of all but slots and padding; the end token counts, as trained
            words = ~at_slots if mask is None else ~at_slots & mask.to(torch.bool)
            # Of each row's own words: zeros in the sum would change its rounding, which diffusion amplifies.
            condition = torch.stack([row[counted].mean(0) for row, counted in zip(text, words)])
        prefix = self.get_image_features(pixel_values, condition).to(device=text.device, dtype=text.dtype)
        if proprio is not None:
            token = self.proprio_projector(proprio.to(device=text.device, dtype=text.dtype))
            prefix = torch.cat([prefix, token.to(text.dtype)[:, None]], dim=1)
        return Observation(text.masked_fill(at_slots[..., None], 0), prefix, mask, slots)

    def hidden_at(
        self,
        seen: Observation,
        predicted: torch.LongTensor,
        noisy: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states that predict the positions ``predicted`` ``(batch, count)`` of the text.

        Args:
            seen: The observation.
            predicted: int64 ``(batch, count)``. A position's prediction stands one before it, as in training.
            noisy: Diffusion: the noisy chunk ``(batch, chunk, action_dim)``, put into the slots.
            timesteps: Diffusion: its noise level ``(batch,)``.

        Returns:
            ``(batch, count, hidden)``.
        """
        text, prefix = seen.text, seen.prefix
        hidden_size = text.shape[-1]
        if noisy is not None:
            features = self.noisy_action_projector(noisy.flatten(1)[..., None]).to(text.dtype)
            text = text.scatter(1, seen.slots[..., None].expand(-1, -1, hidden_size), features)
            time = timestep_embedding(timesteps, hidden_size).to(text.dtype)
            prefix = torch.cat([prefix, time[:, None].expand(len(prefix), -1, -1)], dim=1)
        if seen.mask is None:
            bos = torch.zeros(len(text), dtype=torch.long, device=text.device)
            mask = None
        else:
            bos = seen.mask.to(torch.long).argmax(dim=1)
            mask = insert_after_bos(seen.mask, seen.mask.new_ones(prefix.shape[:2]), bos)
        embeds = insert_after_bos(text, prefix, bos)
        index = (predicted + prefix.shape[1] - 1).to(embeds.device)
        if goes_fast(seen.fast, self.language_model, embeds.shape[1]):
            decoder = FastDecoder(self.language_model, embeds, embeds.shape[1], mask, causal=False)
            return decoder.run(embeds, 0, index)
        hidden = self._bidirectional_pass(embeds, mask)
        index = index.to(hidden.device)
        return hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))

    def _bidirectional_pass(self, embeds: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Last hidden states ``(batch, length, hidden)``, every position seeing every visible one."""
        added = self.require_bidirectional()
        return self._decode(self.language_model.get_decoder(), embeds, mask, added)

    @staticmethod
    def _decode(decoder: nn.Module, embeds: torch.Tensor, mask: torch.Tensor | None, added: bool) -> torch.Tensor:
        visible = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device) if mask is None else mask
        return decoder(
            inputs_embeds=embeds,
            attention_mask=bidirectional_mask(visible, embeds.dtype, added),
            position_ids=None if mask is None else positions_of(mask),
            use_cache=False,
            return_dict=True,
        ).last_hidden_state

    def _require_masked_attention(self) -> str:
        attention = attention_implementation(self.language_model.config)
        if attention not in MASKED_ATTENTION:
            raise OpenVLAValueError(
                f"Parallel decoding needs a bidirectional mask, which {attention} does not take (it would silently be "
                "causal); load with attn_implementation='sdpa' or 'eager'."
            )
        return attention

    @torch.no_grad()
    def require_bidirectional(self) -> bool:
        """How this transformers reads a mask in four dimensions: added to the scores (True), or 1 for visible (4.40).

        Tried, not told by the version: with the right one a later token influences an earlier one, and a masked one
        none. Done once; only the first layer is run.

        Raises:
            RuntimeError: Neither does. A causal language model gives plausible, wrong chunks (LIBERO success falls
                from 97 % to about 56 %).
        """
        attention = self._require_masked_attention()
        if attention not in self._mask_is_added:
            added = next((added for added in (True, False) if self._is_bidirectional(added)), None)
            if added is None:
                raise RuntimeError(
                    f"transformers {transformers.__version__} does not run this {type(self.language_model).__name__} "
                    f"bidirectionally under {attention} attention: a later token does not influence an earlier one, or "
                    "a masked one does. Its chunks would be wrong. Use another transformers version, or "
                    "attn_implementation='eager'."
                )
            self._mask_is_added[attention] = added
        return self._mask_is_added[attention]

    def _is_bidirectional(self, added: bool) -> bool:
        embeddings = self.get_input_embeddings()
        device = torch.device("cpu") if embeddings.weight.device.type == "meta" else embeddings.weight.device
        first, last, other = embeddings(torch.arange(3, 6, device=device))
        shown, changed = torch.stack([first, first, last]), torch.stack([first, first, other])
        embeds = torch.stack([shown, changed, shown, changed])
        mask = torch.ones(4, 3, dtype=torch.long, device=device)
        mask[2:, 2] = 0
        decoder = self.language_model.get_decoder()
        training = decoder.training
        first_layer = copy.copy(decoder)  # another thread may be using the decoder itself
        first_layer._modules = {**decoder._modules, "layers": decoder.layers[:1]}
        try:
            seen, seen_changed, hidden, hidden_changed = self._decode(first_layer.eval(), embeds, mask, added)[:, 0]
        except ValueError:  # transformers 4.40 takes no such mask for some language models under sdpa
            return False
        finally:
            first_layer.train(training)
        finite = bool(torch.isfinite(seen).all())  # weights that are not finite have an error of their own
        return not finite or (not torch.equal(seen, seen_changed) and torch.equal(hidden, hidden_changed))

    def _require_proprio(self, proprio: torch.Tensor | np.ndarray | None, rows: int) -> None:
        needed = self.config.proprio_dim
        if needed is None and proprio is not None:
            raise OpenVLAValueError("This model was trained without proprio; leave it out.")
        if needed is not None and proprio is None:
            raise OpenVLAValueError(
                f"This model was trained with proprio; pass the robot's state, {needed} numbers a row."
            )
        if needed is not None and tuple(proprio.shape) != (rows, needed):
            raise OpenVLAValueError(f"proprio must have shape ({rows}, {needed}), got {tuple(proprio.shape)}.")

    def _require_used(self, given: dict[str, Any]) -> None:
        """Raise ValueError for arguments of ``forward`` that this kind of model has no use for."""
        unused = given_names(given)
        if unused and self.config.parallel_decoding:
            raise OpenVLAValueError(f"A parallel-decoding model's forward takes no {unused}; leave it out.")
        if unused:
            raise OpenVLAValueError(f"This model answers one action in tokens and takes no {unused}; leave it out.")

    def _require_diffusion(self, given: dict[str, Any]) -> None:
        """Raise ValueError for arguments of a diffusion head that would not be used."""
        unused = given_names(given)
        if unused and self.config.action_head != "diffusion":
            raise OpenVLAValueError(f"{unused}: only for a diffusion head, not for {self.config.action_head!r}.")
        if given["noise"] is not None and given["generator"] is not None:
            raise OpenVLAValueError("noise is given, so nothing is drawn from the generator; leave one of them out.")

    def _require_one_pass(self, generate_kwargs: dict[str, Any], draft: Any, constrain_actions: bool) -> None:
        require_one_pass(generate_kwargs, draft, constrain_actions, self.config.action_head)

    def parallel_forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None,
        pixel_values: torch.FloatTensor,
        labels: torch.LongTensor,
        actions: torch.FloatTensor | None = None,
        proprio: torch.FloatTensor | None = None,
        noise: torch.FloatTensor | None = None,
        timesteps: torch.LongTensor | None = None,
        generator: torch.Generator | None = None,
    ) -> ChunkOutput:
        """One training pass; see ``OpenVLAForActionPrediction.forward``."""
        if input_ids is None or pixel_values is None or labels is None:
            raise OpenVLAValueError(
                "A parallel-decoding model trains on input_ids, pixel_values and labels; all are needed."
            )
        head, drawn = self.config.action_head, {"noise": noise, "timesteps": timesteps, "generator": generator}
        unused = given_names({**({} if head == "diffusion" else drawn), "actions": None if head else actions})
        if unused:
            raise OpenVLAValueError(f"{unused}: not used by a model whose action_head is {head!r}; leave it out.")
        if None not in drawn.values():
            raise OpenVLAValueError(
                "Noise and timesteps are given, so nothing is drawn from the generator; leave it out."
            )
        ids = self.action_token_ids
        mask = None if attention_mask is None or bool(attention_mask.all()) else attention_mask.to(torch.long)
        at_slots = (labels >= ids.start) & (labels < ids.stop)
        counts = at_slots.sum(1)
        if bool((counts != self.tokens_per_chunk).any()):
            raise OpenVLAValueError(
                f"Every row needs {self.tokens_per_chunk} action tokens ({self.config.chunk_length} actions of "
                f"{self.config.action_dim} numbers), got {counts.tolist()}."
            )
        slots = at_slots.nonzero()[:, 1].view(len(input_ids), -1)
        seen = self.observe(input_ids, mask, slots, pixel_values, proprio)
        if head is None:
            return self._token_loss(seen, labels)
        shape = (len(input_ids), self.config.chunk_length, self.config.action_dim)
        if actions is None or tuple(actions.shape) != shape:
            got = None if actions is None else tuple(actions.shape)
            raise OpenVLAValueError(f"The {head} head trains on normalised actions of shape {shape}, got {got}.")
        actions = actions.to(device=seen.text.device, dtype=seen.text.dtype)
        if head == "l1":
            hidden = self.hidden_at(seen, seen.slots)
            predictions = self.action_head(hidden)
            return ChunkOutput(nn.functional.l1_loss(predictions, actions), None, predictions, hidden)
        device = actions.device
        if noise is None:
            noise = torch.randn(shape, generator=generator, device=device, dtype=actions.dtype)
        if timesteps is None:
            levels = self.config.num_diffusion_steps_train
            timesteps = torch.randint(levels, shape[:1], generator=generator, device=device)
        noise, timesteps = noise.to(actions), timesteps.to(device)
        hidden = self.hidden_at(seen, seen.slots, self.noise_schedule.add_noise(actions, noise, timesteps), timesteps)
        predictions = self.action_head(hidden)
        return ChunkOutput(nn.functional.mse_loss(predictions, noise), None, predictions, hidden)

    def _token_loss(self, seen: Observation, labels: torch.LongTensor) -> ChunkOutput:
        """Next-token loss over every labelled position, as the reference's."""
        every = torch.arange(labels.shape[1], device=labels.device).expand(len(labels), -1)
        hidden = self.hidden_at(seen, every)  # position 0, BOS, is never labelled
        logits, loss = logits_before(labels, hidden[:, 1:], self.get_output_embeddings())
        at_slots = seen.slots[..., None].expand(-1, -1, hidden.shape[-1])
        return ChunkOutput(loss, logits, None, hidden.gather(1, at_slots))

    def predict_normalized_chunk(
        self,
        seen: Observation,
        noise: torch.FloatTensor | None,
        generator: torch.Generator | None,
        num_inference_steps: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised actions ``(batch, chunk, action_dim)`` of a continuous head, and the hidden states behind them."""
        if self.config.action_head == "l1":
            hidden = self.hidden_at(seen, seen.slots)
            return self.action_head(hidden), hidden
        shape = (len(seen.text), self.config.chunk_length, self.config.action_dim)
        device, dtype = seen.text.device, seen.text.dtype
        if noise is None:
            noise = torch.randn(shape, generator=generator, device=device, dtype=dtype)
        noisy = torch.as_tensor(noise, device=device, dtype=dtype)
        noisy = noisy[None] if noisy.ndim == 2 and shape[0] == 1 else noisy
        if noisy.shape != shape:
            raise OpenVLAValueError(
                f"noise must have shape {shape} (or {shape[1:]} for one row), got {tuple(noisy.shape)}."
            )
        schedule = self.noise_schedule
        num_steps = self.config.num_diffusion_steps if num_inference_steps is None else num_inference_steps
        for timestep in schedule.timesteps(num_steps):
            levels = torch.full(shape[:1], float(timestep), device=device)
            hidden = self.hidden_at(seen, seen.slots, noisy, levels)
            noisy = schedule.step(self.action_head(hidden), timestep, noisy, num_steps).to(dtype)
        return noisy, hidden

    def chunk_logits(self, seen: Observation) -> tuple[torch.Tensor, torch.Tensor]:
        """Token logits of every slot, float32 ``(batch, chunk * action_dim, vocabulary)``, and the hidden states."""
        hidden = self.hidden_at(seen, seen.slots)
        return self.get_output_embeddings()(hidden).float(), hidden

    def normalized_proprio(self, proprio: Any, unnorm_keys: list[str]) -> torch.Tensor | None:
        """Raw states of all rows, each normalised with its dataset's statistics: float32 ``(batch, proprio_dim)``."""
        if torch.is_tensor(proprio):
            proprio = proprio.detach().double().cpu().numpy()
        if proprio is not None:
            proprio = as_numbers(proprio, "proprio")
            proprio = proprio[None] if proprio.ndim == 1 and len(unnorm_keys) == 1 else proprio
        self._require_proprio(proprio, len(unnorm_keys))
        if proprio is None:
            return None
        rows = []
        for key, row in zip(unnorm_keys, proprio):
            statistics = self.proprio_statistics(key)
            rows.append(statistics.normalize_proprio(row))
            far = statistics.far_states(row)
            if far:
                logger.warning_once(
                    f"Numbers {far} of proprio lie more than {FAR_STATE} half ranges from the middle of what {key!r} "
                    "was trained on, and are cut to its ends. Give the state in the units and the order of training "
                    "(m and rad, not mm and degrees)."
                )
        return torch.tensor(np.stack(rows), dtype=torch.float32)
