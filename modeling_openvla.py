"""OpenVLA: camera images and an instruction in, one robot action or a chunk of them out.

One action, in order: ``predict_action`` aligns the prompts and appends the empty token, ``embed_inputs`` runs the
vision towers and inserts the patches after each BOS token, ``decode_greedily`` chooses one token per action dimension,
``ActionTokenizer`` decodes tokens to bin centres and ``NormalizationStatistics`` un-normalises them to robot units.
For a chunk of OpenVLA-OFT, ``parallel_openvla`` replaces the steps between the first and the last.

Kim et al. 2024, "OpenVLA: An Open-Source Vision-Language-Action Model".
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import GenerationMixin
from transformers.utils import logging

from .publishing_openvla import refuse_two_kinds, require_adapter_keywords, require_own_kind, require_same_code

require_same_code(__name__)

from .actions_openvla import ActionTokenizer, NormalizationStatistics, NormStatsMixin, as_numbers
from .adapter_files_openvla import adapter_source, base_of, base_record, beside_or_above, optional_file, revision_of
from .adapters_openvla import LoraMixin
from .compatibility_openvla import requested_attention
from .configuration_openvla import OpenVLAConfig, write_json
from .decoding_openvla import (
    ActionOutput,
    append_token,
    decode_greedily,
    mask_logits,
    output_from_head,
    output_from_tokens,
    positions_of,
    require_complete_actions,
    require_fast_decoder,
    require_finite,
    require_one_pass,
    set_argument_names,
    use_fast_decoder,
)
from .errors_openvla import OpenVLAValueError
from .heads_openvla import is_action_head_param
from .parallel_openvla import (
    ChunkOutput,
    ParallelDecodingModel,
    append_action_placeholders,
    normalize_proprio,
    proprio_array,
    refuse_loose_parts,
)
from .prismatic_openvla import PrismaticCausalLMOutputWithPast
from .quantization_openvla import is_quantized
from .vision_openvla import PrismaticVisionBackbone  # noqa: F401  transformers up to 5.8 copies direct imports only

logger = logging.get_logger(__name__)

STATISTICS_FILE = "dataset_statistics.json"
# Keywords of generate() with which predict_action decodes greedily itself; with others transformers' generate runs.
GREEDY_KEYWORDS = {"do_sample", "num_beams", "use_cache", "eos_token_id"}


class Prompt(NamedTuple):
    """The inputs of a prediction, left-padded.

    Attributes:
        input_ids: int64 ``(batch, length)``.
        pixel_values: float ``(batch, images * (3 or 6), size, size)``.
        attention_mask: int64 ``(batch, length)``; None where nothing is masked.
    """

    input_ids: torch.Tensor
    pixel_values: torch.Tensor
    attention_mask: torch.Tensor | None


class OpenVLAForActionPrediction(LoraMixin, NormStatsMixin, ParallelDecodingModel, GenerationMixin):
    """OpenVLA: camera images and an instruction in, one robot action, or a chunk of them, out."""

    config_class = OpenVLAConfig  # type: ignore[assignment]  # a subclass of the base's
    config: OpenVLAConfig

    def __init__(self, config: OpenVLAConfig) -> None:
        super().__init__(config)
        self.action_tokenizer = ActionTokenizer(config.vocab_size, config.n_action_bins)
        self.bins, self.bin_centers = self.action_tokenizer.bins, self.action_tokenizer.bin_centers
        self.vocab_size = config.vocab_size
        self.build_heads(config)
        self.post_init()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *model_args: Any, **kwargs: Any
    ) -> Any:
        """Load a checkpoint, with the action statistics in its dataset_statistics.json.

        Entries of that file replace those of config.json under the same key; a single one becomes the default. An
        adapter (LoRA) is loaded on top of the base that it names.
        """
        adapter, hub = adapter_source(pretrained_model_name_or_path, kwargs)
        if adapter is not None:
            refuse_two_kinds(os.path.join(adapter, hub.get("subfolder") or ""))
            return cls._from_adapter(adapter, hub, kwargs)
        refuse_loose_parts(pretrained_model_name_or_path, hub)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if pretrained_model_name_or_path is not None:
            model._read_statistics(pretrained_model_name_or_path, hub)
            # Part of an adapter's record of its base; from 5.2x on transformers does not keep it.
            model.config._commit_hash = revision_of(pretrained_model_name_or_path, hub)
        return loaded

    @classmethod
    def _from_adapter(cls, adapter: str | os.PathLike, hub: dict[str, Any], kwargs: dict[str, Any]) -> Any:
        config = kwargs.pop("config", None)  # read by an Auto class, of adapter or base; the base's is read again
        if requested_attention(config):
            kwargs.setdefault("attn_implementation", requested_attention(config))
        base, kwargs["revision"] = base_of(adapter, hub)
        for name in ("subfolder", "_commit_hash"):  # these describe the adapter, not the base
            kwargs.pop(name, None)
        loaded = cls.from_pretrained(base, **{name: value for name, value in kwargs.items() if value is not None})
        (loaded[0] if isinstance(loaded, tuple) else loaded).load_lora(adapter, **hub)
        return loaded

    def _after_loading(self) -> None:
        super()._after_loading()
        if self.config.parallel_decoding:
            self.require_bidirectional()

    def _read_statistics(self, name_or_path: str | os.PathLike, hub: dict[str, Any], is_adapter: bool = False) -> None:
        file = (beside_or_above if is_adapter else optional_file)(name_or_path, STATISTICS_FILE, hub)
        if file is None and is_adapter and self.norm_stats:
            logger.warning(
                f"{name_or_path} brings no {STATISTICS_FILE}: the model knows {sorted(self.norm_stats)} alone. If it "
                "was trained on another robot, add its statistics: model.add_norm_stats(key, statistics)."
            )
        if file is None:
            return
        try:
            self.config.merge_statistics(json.loads(Path(file).read_text(encoding="utf-8")))
        except ValueError as error:
            raise OpenVLAValueError(
                f"{STATISTICS_FILE} beside the weights of {name_or_path} is not usable: {error}"
            ) from error

    def save_pretrained(  # type: ignore[override]  # other arguments pass through
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, **kwargs: Any
    ) -> Any:
        """Save weights, configuration, code and, in dataset_statistics.json, the action statistics.

        Statistics in the folder for other datasets are kept: the published scripts write the robot's there first, then
        save the merged model. The saved folder has no default dataset then, so that ``unnorm_key`` is needed; a warning
        says so. Entries under a key of this model are replaced, with a warning where they differ.

        A model with an adapter saves the adapter; ``merge_lora()`` first for whole weights.

        Raises:
            ValueError: The folder's dataset_statistics.json is not usable; it holds whole weights and this is an
                adapter, or the reverse; a keyword has no effect on an adapter.
            TypeError: A keyword is unknown, for a model with an adapter.
        """
        if self._lora is not None:
            require_adapter_keywords(kwargs)
        require_own_kind(save_directory, self._hf_peft_config_loaded)
        default = self.config.default_unnorm_key
        if is_main_process and self.norm_stats and not os.path.isfile(save_directory):
            os.makedirs(save_directory, exist_ok=True)
            file = Path(save_directory) / STATISTICS_FILE
            others = self._other_statistics(file)  # of the folder as it is
            write_json(file, {**others, **self.norm_stats})
            if others:
                self.config.default_unnorm_key = None
                logger.warning(
                    f"{file} keeps the statistics of {sorted(others)}, which this model does not know. The saved "
                    "folder has no default dataset: give unnorm_key to predict_action."
                )
        try:
            if self._lora is not None:
                return self.save_lora(save_directory, kwargs.get("state_dict")) if is_main_process else None
            if is_quantized(self):  # so that an adapter trained on the saved folder still knows its base
                self.config.quantized_from = base_record(self)
            return super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        finally:
            self.config.default_unnorm_key = default

    def enable_parallel_decoding(self, **fields: Any) -> None:
        """Make a loaded OpenVLA predict chunks of actions, in place: new heads and FiLM layers are added, untrained.

        Its actions are useless until it is fine-tuned.

        Args:
            **fields: Fields of ``OpenVLAConfig``: ``action_dim`` and what differs from one action in tokens, such as
                ``**PLATFORMS["libero"], action_head="l1", num_images_in_input=2``.

        Raises:
            ValueError: The model has parallel decoding or an adapter already, or fields are unknown or contradict each
                other; the model is unchanged.
        """
        if self.config.parallel_decoding:
            raise OpenVLAValueError(f"This model already has parallel decoding: {self.config.action_config}.")
        if not fields.get("parallel_decoding", True):
            raise OpenVLAValueError(
                "enable_parallel_decoding makes parallel_decoding true; leave parallel_decoding out."
            )
        self._require_no_adapter()
        self._require_masked_attention()
        self.config.set_action_config(**{**fields, "parallel_decoding": True})
        self.build_heads(self.config)
        self.vision_backbone.configure(self.config)
        projection = self.projector.fc1
        weight = projection.weight if projection.weight.is_floating_point() else projection.bias
        for name, module in self.named_modules():
            if is_action_head_param(name):
                module.to(device=weight.device, dtype=weight.dtype)

    # Every argument is named, not collected: transformers' Trainer keeps the columns that it finds in this signature.
    def forward(  # type: ignore[override]  # more arguments than the base's
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_projector_features: bool | None = None,
        return_dict: bool | None = None,
        position_ids: torch.Tensor | None = None,
        logits_at_labels: bool | None = None,
        actions: torch.Tensor | None = None,
        proprio: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        cache: Any = None,
    ) -> PrismaticCausalLMOutputWithPast | ChunkOutput | tuple[Any, ...]:
        """Run one pass: ``PrismaticForConditionalGeneration.forward``, or with parallel decoding a training pass.

        The arguments below are those of parallel decoding.

        Args:
            input_ids: int64 ``(batch, length)``: prompt, the chunk's action tokens, the end token, padding.
            attention_mask: ``(batch, length)``, zero on padding.
            pixel_values: float ``(batch, images * (3 or 6), size, size)``.
            labels: int64 ``(batch, length)``, -100 except on action tokens and the end token. They give the chunk's
                positions; the model does not see ``input_ids`` there.
            inputs_embeds: None, as ``past_key_values``, ``cache`` and ``position_ids``.
            past_key_values: None.
            use_cache: None or False, as the next three; the chunk's hidden states are always returned.
            output_attentions: None or False.
            output_hidden_states: None or False.
            output_projector_features: None or False.
            return_dict: False for a tuple.
            position_ids: None.
            logits_at_labels: None or True; logits are computed at labels only.
            actions: Heads: float ``(batch, chunk, action_dim)``, normalised. None without a head.
            proprio: float ``(batch, proprio_dim)``, normalised.
            noise: Diffusion: ``(batch, chunk, action_dim)``; None draws it from the normal distribution.
            timesteps: Diffusion: int64 ``(batch,)`` noise levels; None draws them uniformly.
            generator: Random generator for noise and levels.
            cache: None.

        Returns:
            ``ChunkOutput``, with the loss.

        Raises:
            ValueError: Inputs are missing, do not fit the model or would not be used.
        """
        if not self.config.parallel_decoding:
            chunk_arguments = {"actions": actions, "proprio": proprio, "noise": noise, "timesteps": timesteps}
            self._require_unset({**chunk_arguments, "generator": generator})
            return super().forward(
                input_ids,
                attention_mask,
                pixel_values,
                labels,
                inputs_embeds,
                past_key_values,
                use_cache=use_cache,
                output_attentions=output_attentions,
                output_hidden_states=output_hidden_states,
                output_projector_features=output_projector_features,
                return_dict=return_dict,
                position_ids=position_ids,
                logits_at_labels=bool(logits_at_labels),
                cache=cache,
            )
        self._require_unset(
            {
                "inputs_embeds": inputs_embeds,
                "past_key_values": past_key_values,
                "cache": cache,
                "position_ids": position_ids,
                "use_cache": use_cache,
                "output_attentions": output_attentions,
                "output_hidden_states": output_hidden_states,
                "logits_at_labels=False": logits_at_labels is False,
                "output_projector_features": output_projector_features,
            }
        )
        output = self.parallel_forward(
            input_ids,
            attention_mask,
            pixel_values,
            labels,
            actions=actions,
            proprio=proprio,
            noise=noise,
            timesteps=timesteps,
            generator=generator,
        )
        return output.to_tuple() if self._returns_tuple(return_dict) else output

    def _require_unset(self, arguments: dict[str, Any]) -> None:
        """Raise ValueError for arguments of ``forward`` that have no effect on this kind of model."""
        unused = set_argument_names(arguments)
        if unused and self.config.parallel_decoding:
            raise OpenVLAValueError(f"A parallel-decoding model's forward takes no {unused}; leave it out.")
        if unused:
            raise OpenVLAValueError(f"This model predicts one action in tokens and takes no {unused}; leave it out.")

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Run ``PrismaticForConditionalGeneration.generate``.

        Raises:
            ValueError: The model was trained for parallel decoding; token by token it would predict wrongly.
        """
        if self.config.parallel_decoding:
            raise OpenVLAValueError("This model predicts a whole chunk in one pass; use predict_action, not generate.")
        return super().generate(*args, **kwargs)

    @torch.no_grad()
    def predict_action(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        unnorm_key: str | Sequence[str | None] | None = None,
        *,
        proprio: np.ndarray | torch.Tensor | Sequence[float] | None = None,
        noise: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        num_inference_steps: int | None = None,
        return_dict: bool = False,
        constrain_actions: bool = False,
        strict: bool = False,
        fast: bool | None = None,
        draft: np.ndarray | Sequence[Any] | None = None,
        **generate_kwargs: Any,
    ) -> np.ndarray | ActionOutput:
        """Predict the robot action, or with parallel decoding the chunk of actions, for images and a prompt.

        Args:
            input_ids: int64 ``(batch, length)``, padded on either side; the empty token is appended where missing.
            pixel_values: float ``(batch, images * (3 or 6), size, size)``, for each prompt the images of one moment.
            attention_mask: ``(batch, length)``; may be left out when there is no padding.
            unnorm_key: Dataset whose statistics give robot units, or one for each sample; None: the only or default
                one.
            proprio: The robot's state in its units, ``(proprio_dim,)`` or ``(batch, proprio_dim)``, for models that
                were trained with it; it is normalised with the statistics of ``unnorm_key``.
            noise: Diffusion head: start of the denoising, ``(batch, chunk, action_dim)``.
            generator: Diffusion head: random generator for the noise where none is given.
            num_inference_steps: Diffusion head: number of denoising steps; None is the checkpoint's.
            return_dict: Return an ``ActionOutput`` with tokens, bin probabilities and entropy, hidden states.
            constrain_actions: Choose among action tokens only.
            strict: Raise for a single token that is no action token, as every ``Policy`` does. Without it, up to
                ``MAX_NON_ACTION_SHARE`` of them decode to the extreme bins, as in the reference, with a warning.
            fast: Use the fast decoder of the installed package: None where the language model allows it, True with a
                warning where it does not (always without the package), False never. The tokens are the same, up to
                rounding. For greedy decoding with a cache.
            draft: A guess of the action in robot units, ``(action_dim,)`` or ``(batch, action_dim)``, such as the
                previous one: leading tokens that it has right need no decode step. Needs the fast decoder.
            **generate_kwargs: Keywords of ``generate`` (sampling, beams, ...); greedy without. With
                ``num_return_sequences=n`` each sample gives n consecutive actions.

        Returns:
            float64 ``(action_dim,)`` for one sample, ``(batch, action_dim)`` for several, in the units of the dataset
            (OpenVLA's robots: metres, radians, gripper 0 closed to 1 open). With parallel decoding
            ``(chunk, action_dim)`` and ``(batch, chunk, action_dim)``.

        Raises:
            ValueError: Inputs are missing, do not fit the model or contradict each other.
            NoActionError: The model ended the sequence early, predicted tokens that are no actions, or is not finite.
            KeyError: Unknown ``unnorm_key``.
        """
        if input_ids is None or pixel_values is None:
            raise OpenVLAValueError(
                "predict_action needs input_ids and pixel_values; without the image it would guess blindly."
            )
        if "max_new_tokens" in generate_kwargs or "max_length" in generate_kwargs:
            raise OpenVLAValueError(
                "predict_action generates one token a dimension; leave out max_new_tokens and max_length."
            )
        diffusion = {"noise": noise, "generator": generator, "num_inference_steps": num_inference_steps}
        self._require_diffusion(diffusion)
        input_ids, attention_mask = self._prepare_prompts(input_ids, attention_mask)
        prompt = Prompt(input_ids, pixel_values, attention_mask)
        keys = self.batch_keys(unnorm_key, len(input_ids))
        statistics = self.batch_statistics(keys)
        if self.config.parallel_decoding:
            require_one_pass(generate_kwargs, draft, constrain_actions, self.config.action_head)
            state = self.normalize_proprio(proprio, keys)
            output = self._predict_chunk(
                prompt, state, statistics, diffusion, constrain_actions, strict, fast, with_details=return_dict
            )
            return output if return_dict else _actions(output)
        if proprio is not None:
            raise OpenVLAValueError("This model was trained without proprio; leave it out.")
        tokens, logits = self._predict_tokens(
            prompt, statistics, generate_kwargs, constrain_actions, fast, draft, return_logits=return_dict
        )
        statistics = [entry for entry in statistics for _ in range(len(tokens) // len(statistics))]
        output = output_from_tokens(tokens, self.action_tokenizer, statistics, logits=logits, strict=strict)
        return output if return_dict else _actions(output)

    def _require_diffusion(self, arguments: dict[str, Any]) -> None:
        """Raise ValueError for arguments of a diffusion head that have no effect."""
        unused = set_argument_names(arguments)
        if unused and self.config.action_head != "diffusion":
            raise OpenVLAValueError(f"{unused}: only for a diffusion head, not for {self.config.action_head!r}.")
        if arguments["noise"] is not None and arguments["generator"] is not None:
            raise OpenVLAValueError("noise is given, so nothing is drawn from the generator; leave one of them out.")

    def _predict_tokens(
        self,
        prompt: Prompt,
        statistics: Sequence[NormalizationStatistics],
        generate_kwargs: dict[str, Any],
        constrain_actions: bool,
        fast: bool | None,
        draft: Any,
        return_logits: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the action tokens ``(batch, action_dim)``, and with ``return_logits`` the logits behind them."""
        steps = statistics[0].dimension
        end_ids = generate_kwargs.pop("eos_token_id", self.generation_config.eos_token_id)
        allowed = self.action_token_ids if constrain_actions else None
        samples = generate_kwargs.get("do_sample") or (generate_kwargs.get("num_beams") or 1) > 1
        greedy = set(generate_kwargs) <= GREEDY_KEYWORDS and not samples
        use_cache = generate_kwargs.get("use_cache") is not False
        length = prompt.input_ids.shape[1] + self.vision_backbone.patches_per_prompt + steps
        require_fast_decoder(fast, draft, greedy and use_cache, self.accelerator, self.language_model, length)
        if not greedy:
            return self._generate_tokens(prompt, steps, end_ids, allowed, generate_kwargs, return_logits)
        if use_cache and use_fast_decoder(fast, self.accelerator, self.language_model, length):
            tokens, logits = self._decode_fast(prompt, steps, allowed, draft, statistics)
            require_complete_actions(tokens, steps, end_ids)
        else:
            embeds, mask, _, _ = self.embed_inputs(*prompt)
            tokens, logits = decode_greedily(self.language_model, embeds, mask, steps, end_ids, allowed, use_cache)
        return tokens, logits if return_logits else None

    def _generate_tokens(
        self,
        prompt: Prompt,
        steps: int,
        end_ids: Any,
        allowed: slice | None,
        generate_kwargs: dict[str, Any],
        return_logits: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return action tokens and logits from transformers' ``generate``: sampling, beams and other keywords."""
        if return_logits and (generate_kwargs.get("num_beams") or 1) > 1:
            raise OpenVLAValueError("Bin probabilities are not defined for beam search; drop num_beams or return_dict.")
        embeds, mask, _, _ = self.embed_inputs(*prompt)
        if allowed is not None:
            processors = generate_kwargs.get("logits_processor") or []
            generate_kwargs["logits_processor"] = [*processors, lambda _, scores: mask_logits(scores, allowed)]
        generate_kwargs.update(eos_token_id=end_ids, max_new_tokens=steps)
        generate_kwargs.update(return_dict_in_generate=True, output_logits=return_logits)
        output = self._generate_from_embeds(embeds, mask, generate_kwargs)
        require_complete_actions(output.sequences, steps, end_ids)
        return output.sequences, torch.stack(output.logits, dim=1).float() if return_logits else None

    def _decode_fast(
        self,
        prompt: Prompt,
        steps: int,
        allowed: slice | None,
        draft: Any,
        statistics: Sequence[NormalizationStatistics],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tokens and finite logits from the accelerator, without a draft by a CUDA graph where it has one."""
        accelerator = self.accelerator
        if accelerator is None:
            raise RuntimeError("use_fast_decoder is False without an accelerator.")
        draft_tokens = None
        if draft is not None:
            draft_tokens = accelerator.encode_draft(draft, self.action_tokenizer, statistics)

        def compute(
            input_ids: torch.Tensor, pixel_values: torch.Tensor, attention_mask: torch.Tensor | None
        ) -> tuple[torch.Tensor, torch.Tensor]:
            embeds, mask, _, _ = self.embed_inputs(input_ids, pixel_values, attention_mask)
            guess = None if draft_tokens is None else draft_tokens.to(embeds.device)
            return accelerator.decode(self.language_model, embeds, mask, steps, allowed, guess)

        if draft is not None:
            tokens, logits = compute(*prompt)
        else:
            tokens, logits = accelerator.run_graphed(self, compute, prompt, (steps, str(allowed)))
        return tokens, require_finite(logits)

    def _predict_chunk(
        self,
        prompt: Prompt,
        proprio: torch.Tensor | None,
        statistics: Sequence[NormalizationStatistics],
        diffusion: dict[str, Any],
        constrain_actions: bool,
        strict: bool,
        fast: bool | None,
        with_details: bool,
    ) -> ActionOutput:
        """Return the chunk of every sample, from one pass or one for each denoising step.

        Bin probabilities and hidden states are returned ``with_details`` only.
        """
        head, end_id = self.config.action_head, self.config.text_config.eos_token_id

        def compute(
            input_ids: torch.Tensor,
            pixel_values: torch.Tensor,
            attention_mask: torch.Tensor | None,
            proprio: torch.Tensor | None,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            with_chunk = append_action_placeholders(input_ids, attention_mask, self.tokens_per_chunk, end_id)
            obs = self.embed_observation(*with_chunk, pixel_values, proprio)
            if head is None:
                return self.chunk_logits(obs, fast)
            return self.predict_normalized_chunk(obs, **diffusion, fast=fast)

        inputs = (*prompt, proprio)
        length = prompt.input_ids.shape[1] + self.vision_backbone.patches_per_prompt + self.tokens_per_chunk
        synchronizes = head == "diffusion" or self.config.use_film
        accelerator = self.accelerator
        graphed = not synchronizes and use_fast_decoder(fast, accelerator, self.language_model, length)
        if graphed and accelerator is not None:
            prediction, hidden = accelerator.run_graphed(self, compute, inputs, "chunk")
        else:
            prediction, hidden = compute(*inputs)
        prediction = require_finite(prediction.float())
        hidden_states = hidden if with_details else None
        if head is not None:
            return output_from_head(prediction, statistics, hidden_states=hidden_states)
        logits = prediction.unflatten(1, (self.config.chunk_length, -1))
        tokens = (mask_logits(logits, self.action_token_ids) if constrain_actions else logits).argmax(-1)
        return output_from_tokens(
            tokens,
            self.action_tokenizer,
            statistics,
            logits=logits if with_details else None,
            hidden_states=hidden_states,
            strict=strict,
        )

    def normalize_proprio(self, proprio: Any, unnorm_keys: list[str]) -> torch.Tensor | None:
        """Normalise robot states, each with its dataset's statistics: float32 ``(batch, proprio_dim)``.

        Raises:
            ValueError: Proprio does not fit the model, or a dataset has no statistics for it.
        """
        states = proprio_array(proprio, len(unnorm_keys))
        self._require_proprio(states, len(unnorm_keys))
        if states is None:
            return None
        return normalize_proprio(states, [self.proprio_statistics(key) for key in unnorm_keys], unnorm_keys)

    @torch.no_grad()
    def score_actions(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        actions: np.ndarray | Sequence[Any] | None = None,
        unnorm_key: str | Sequence[str | None] | None = None,
    ) -> np.ndarray:
        """Return the log-probability of candidate actions, to rank or reject them.

        Args:
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
        if self.config.parallel_decoding:
            raise OpenVLAValueError(
                "score_actions is for models that predict token by token; this one has parallel decoding."
            )
        input_ids, attention_mask = self._prepare_prompts(input_ids, attention_mask)
        statistics = self.batch_statistics(self.batch_keys(unnorm_key, len(input_ids)))
        candidates = as_numbers(actions, "actions")
        if candidates.ndim == 2:
            candidates = np.broadcast_to(candidates, (len(input_ids), *candidates.shape))
        if candidates.ndim != 3 or len(candidates) != len(input_ids) or candidates.shape[1] == 0:
            raise OpenVLAValueError(
                f"actions must have shape (candidates, action_dim) or ({len(input_ids)}, candidates, action_dim) with "
                f"at least one candidate, got {np.shape(actions)}."
            )
        encode, top_edge = self.action_tokenizer.encode_decoded, self.action_tokenizer.first_token_id
        token_ids = np.stack([encode(entry.normalize(group)) for entry, group in zip(statistics, candidates)])
        embeds, mask, _, _ = self.embed_inputs(input_ids, pixel_values, attention_mask)
        _, num_candidates, action_dim = token_ids.shape
        tokens = torch.from_numpy(token_ids).to(embeds.device).flatten(0, 1)
        embeds = embeds.repeat_interleave(num_candidates, dim=0)
        embeds = torch.cat([embeds, self.get_input_embeddings()(tokens[:, :-1]).to(embeds.dtype)], dim=1)
        if mask is not None:
            mask = mask.repeat_interleave(num_candidates, dim=0)
            mask = torch.cat([mask, mask.new_ones(len(mask), action_dim - 1)], dim=1)
        output = self.language_model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=None if mask is None else positions_of(mask),
            use_cache=False,
            return_dict=True,
        )
        # The logits at the prompt's last position and at all action tokens but the last one.
        log_probs = require_finite(output.logits[:, -action_dim:].float()).log_softmax(-1)
        tokens = tokens.to(log_probs.device)
        chosen = log_probs.gather(-1, tokens[..., None]).squeeze(-1)
        chosen = torch.where(tokens == top_edge, torch.logaddexp(chosen, log_probs[..., top_edge + 1]), chosen)
        return chosen.cpu().double().sum(-1).view(-1, num_candidates).numpy()

    def _prepare_prompts(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return left-padded prompts that end in the empty token, as in training."""
        input_ids, attention_mask = self._align_prompts(input_ids, attention_mask)
        if self.config.empty_token_id is None:
            return input_ids, attention_mask
        return append_token(input_ids, attention_mask, int(self.config.empty_token_id), self.pad_token_id)


def _actions(output: ActionOutput) -> np.ndarray:
    return np.asarray(output.actions)
