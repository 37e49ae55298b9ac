"""OpenVLA: camera images and an instruction in, one robot action or a chunk of them out.

One action, in order: ``predict_action`` aligns the prompts and appends the empty token, ``embed_inputs`` runs the
towers and puts the patches after each row's BOS, ``decode_greedily`` picks one token per action dimension,
``ActionTokenizer`` turns tokens into bin centres and ``NormalizationStatistics`` stretches them to robot units.
A chunk of OpenVLA-OFT takes the way of ``parallel_openvla`` between the first step and the last.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationMixin
from transformers.utils import logging

from .publishing_openvla import refuse_two_kinds, require_adapter_keywords, require_own_kind, require_same_code

require_same_code(__name__)

from .actions_openvla import ActionTokenizer, NormalizationStatistics, NormStatsMixin, as_numbers
from .adapter_files_openvla import adapter_source, base_of, base_record, beside_or_above, optional_file, revision_of
from .adapters_openvla import LoraMixin
from .answers_openvla import ActionOutput, numbers_answer, tokens_answer
from .compatibility_openvla import requested_attention
from .configuration_openvla import OpenVLAConfig, write_json
from .decoding_openvla import append_token, decode_greedily, only, positions_of, require_finite, require_whole_actions
from .errors_openvla import OpenVLAValueError
from .fast_openvla import decode_fast, draft_tokens, goes_fast, require_fast
from .graphs_openvla import recorded
from .heads_openvla import NoiseSchedule  # noqa: F401
from .own_functions_openvla import head_dim  # noqa: F401
from .parallel_openvla import (
    ChunkOutput,
    ParallelDecodingMixin,
    refuse_loose_parts,
    with_action_slots,
)
from .prismatic_openvla import PrismaticCausalLMOutputWithPast, PrismaticForConditionalGeneration
from .quantization_openvla import is_quantized
from .vision_openvla import PrismaticVisionBackbone  # noqa: F401  transformers up to 5.8 copies direct imports only

logger = logging.get_logger(__name__)

STATISTICS_FILE = "dataset_statistics.json"
# generate() keywords with which predict_action decodes greedily by itself; any other goes to transformers' generate.
GREEDY_KEYWORDS = {"do_sample", "num_beams", "use_cache", "eos_token_id"}


class OpenVLAForActionPrediction(
    LoraMixin, NormStatsMixin, ParallelDecodingMixin, PrismaticForConditionalGeneration, GenerationMixin
):
    """OpenVLA: camera images and an instruction in, one robot action, or a chunk of them, out."""

    config_class = OpenVLAConfig

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
        """Load a checkpoint, and the action statistics that lie beside its weights in dataset_statistics.json.

        The file adds to the statistics in config.json and wins where both have a key; where it holds one key, that
        key becomes the default. An adapter (LoRA) is loaded on top of the base that it names.
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
        config = kwargs.pop("config", None)  # that an Auto class read, of the adapter or the base; the base has its own
        if requested_attention(config):
            kwargs.setdefault("attn_implementation", requested_attention(config))
        base, kwargs["revision"] = base_of(adapter, hub)
        for name in ("subfolder", "_commit_hash"):  # of the adapter
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

    def save_pretrained(self, save_directory: str | os.PathLike, is_main_process: bool = True, **kwargs: Any) -> Any:
        """Save weights, configuration, code and, in dataset_statistics.json, the action statistics.

        Statistics in the folder of datasets that the model does not know stay: the published scripts write the robot's
        there first, then save the merged model. No dataset is then the default of the saved folder, so ``unnorm_key``
        has to be given; a warning says so. Other numbers under a key of this model are replaced, with a warning.

        A model with an adapter saves the adapter; ``merge_lora()`` first for whole weights.

        Raises:
            ValueError: The folder's dataset_statistics.json is not usable; it holds whole weights and this is an
                adapter, or the reverse; a keyword has no effect on an adapter.
            TypeError: Of an adapter: an unknown keyword.
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

    # Every argument is named, not collected: transformers' Trainer keeps the columns that it finds in this signature.
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_projector_features: bool | None = None,
        return_dict: bool | None = None,
        position_ids: torch.LongTensor | None = None,
        logits_at_labels: bool | None = None,
        actions: torch.FloatTensor | None = None,
        proprio: torch.FloatTensor | None = None,
        noise: torch.FloatTensor | None = None,
        timesteps: torch.LongTensor | None = None,
        generator: torch.Generator | None = None,
        cache: Any = None,
    ) -> PrismaticCausalLMOutputWithPast | ChunkOutput | tuple:
        """One pass: of ``PrismaticForConditionalGeneration.forward``, or with parallel decoding a training pass.

        The rest describes parallel decoding, without it, see there.

        Args:
            input_ids: int64 ``(batch, length)``: prompt, the chunk's action tokens, the end token, padding.
            attention_mask: ``(batch, length)``, zero on padding.
            pixel_values: float ``(batch, images * (3 or 6), size, size)``.
            labels: int64 ``(batch, length)``, -100 where there is neither an action token nor the end token. They say
                where the chunk stands; what stands there in ``input_ids`` is not seen.
            inputs_embeds: Must be None, as ``past_key_values``, ``cache`` and ``position_ids``.
            past_key_values: None.
            use_cache: None or False, as the next three; the chunk's own hidden states are always given.
            output_attentions: None or False.
            output_hidden_states: None or False.
            output_projector_features: None or False.
            return_dict: False for a tuple.
            position_ids: None.
            logits_at_labels: None or True; it is always so.
            actions: Heads, and None without: float ``(batch, chunk, action_dim)``, normalised.
            proprio: float ``(batch, proprio_dim)``, normalised.
            noise: Diffusion: ``(batch, chunk, action_dim)``; None draws it from the normal distribution.
            timesteps: Diffusion: int64 ``(batch,)`` noise levels; None draws them evenly.
            generator: What noise and levels are drawn from.
            cache: None.

        Returns:
            ``ChunkOutput``, with the loss.

        Raises:
            ValueError: Inputs are missing, do not fit the model or would not be used.
        """
        if not self.config.parallel_decoding:
            given = {"actions": actions, "proprio": proprio, "noise": noise, "timesteps": timesteps}
            self._require_used({**given, "generator": generator})
            return super().forward(
                input_ids,
                attention_mask,
                pixel_values,
                labels,
                inputs_embeds,
                past_key_values,
                use_cache,
                output_attentions,
                output_hidden_states,
                output_projector_features,
                return_dict,
                position_ids,
                bool(logits_at_labels),
                cache,
            )
        given = {"inputs_embeds": inputs_embeds, "past_key_values": past_key_values, "cache": cache}
        given |= {"position_ids": position_ids, "use_cache": use_cache, "output_attentions": output_attentions}
        given |= {"output_hidden_states": output_hidden_states, "logits_at_labels=False": logits_at_labels is False}
        self._require_used({**given, "output_projector_features": output_projector_features})
        output = self.parallel_forward(
            input_ids, attention_mask, pixel_values, labels, actions, proprio, noise, timesteps, generator
        )
        return output.to_tuple() if self._as_tuple(return_dict) else output

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As ``PrismaticForConditionalGeneration.generate``.

        Raises:
            ValueError: The model was trained for parallel decoding, so that token by token it would answer wrongly.
        """
        if self.config.parallel_decoding:
            raise OpenVLAValueError("This model answers a whole chunk in one pass; use predict_action, not generate.")
        return super().generate(*args, **kwargs)

    @torch.no_grad()
    def predict_action(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        unnorm_key: str | Sequence[str | None] | None = None,
        *,
        proprio: np.ndarray | torch.Tensor | Sequence[float] | None = None,
        noise: torch.FloatTensor | None = None,
        generator: torch.Generator | None = None,
        num_inference_steps: int | None = None,
        return_dict: bool = False,
        constrain_actions: bool = False,
        strict: bool = False,
        fast: bool | None = None,
        draft: np.ndarray | Sequence[Any] | None = None,
        **generate_kwargs: Any,
    ) -> np.ndarray | ActionOutput:
        """The robot action, or with parallel decoding the chunk of actions, for images and a prompt.

        Args:
            input_ids: int64 ``(batch, length)``, padded on either side; the empty token is appended where missing.
            pixel_values: float ``(batch, images * (3 or 6), size, size)``, the images of one moment a prompt.
            attention_mask: ``(batch, length)``; may be left out when there is no padding.
            unnorm_key: Whose statistics give robot units: one key, or one a row. None: the only or default one.
            proprio: The robot's state in its own units, ``(proprio_dim,)`` or ``(batch, proprio_dim)``, for models
                that were trained with it; it is normalised with the statistics of ``unnorm_key``.
            noise: Diffusion head: what denoising starts from, ``(batch, chunk, action_dim)``.
            generator: Diffusion head: what noise is drawn from where none is given.
            num_inference_steps: Diffusion head: denoising steps; None is the checkpoint's.
            return_dict: Give an ``ActionOutput`` with tokens, bin probabilities and entropy, hidden states.
            constrain_actions: Let the model choose among action tokens only.
            strict: Raise for a single token that is no action token, as every ``Policy`` does. Without it, up to
                ``LARGEST_OTHER_SHARE`` of them decode to the extreme bins, as in the reference, with a warning.
            fast: Skip what the answer does not need (``fast_openvla``): None where the language model allows it, True
                with a warning where it does not, False never. The same tokens, up to rounding. Greedy, cached answers.
            draft: A guess of the action in robot units, ``(action_dim,)`` or ``(batch, action_dim)``, such as the last
                one: leading tokens that it has right cost no step of their own. Needs the fast way.
            **generate_kwargs: Of ``generate`` (sampling, beams, ...); greedy without. With
                ``num_return_sequences=n`` each row gives n consecutive rows.

        Returns:
            float64 ``(action_dim,)`` for one row, ``(batch, action_dim)`` for several, in the units of the dataset
            (OpenVLA's robots: metres, radians, gripper 0 closed to 1 open). With parallel decoding
            ``(chunk, action_dim)`` and ``(batch, chunk, action_dim)``.

        Raises:
            ValueError: Inputs are missing, do not fit the model or contradict each other.
            NoActionError: The model ended the sequence early, gave tokens that are no actions, or is not finite.
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
        input_ids, attention_mask = self._prompts(input_ids, attention_mask)
        keys = self.batch_keys(unnorm_key, len(input_ids))
        statistics = self.batch_statistics(keys)
        if self.config.parallel_decoding:
            self._require_one_pass(generate_kwargs, draft, constrain_actions)
            proprio = self.normalized_proprio(proprio, keys)
            prompt = (input_ids, attention_mask, pixel_values, proprio)
            return self._predict_chunk(*prompt, statistics, diffusion, return_dict, constrain_actions, strict, fast)
        if proprio is not None:
            raise OpenVLAValueError("This model was trained without proprio; leave it out.")
        action_dim = statistics[0].dimension
        prompt = (input_ids, pixel_values, attention_mask)
        end_ids = generate_kwargs.pop("eos_token_id", self.generation_config.eos_token_id)
        allowed = self.action_token_ids if constrain_actions else None
        sampled = generate_kwargs.get("do_sample") or (generate_kwargs.get("num_beams") or 1) > 1
        greedy, use_cache = set(generate_kwargs) <= GREEDY_KEYWORDS and not sampled, generate_kwargs.get("use_cache")
        use_cache = use_cache is not False
        length = input_ids.shape[1] + self.vision_backbone.patches_per_prompt + action_dim
        require_fast(fast, draft, greedy and use_cache, self.language_model, length)
        if greedy:
            if use_cache and goes_fast(fast, self.language_model, length):
                guess = None if draft is None else draft_tokens(draft, self.action_tokenizer, statistics)
                tokens, logits = self._decode_fast(prompt, action_dim, allowed, guess)
                require_whole_actions(tokens, action_dim, end_ids)
            else:
                embeds, mask, _, _ = self.embed_inputs(*prompt)
                asked = (self.language_model, embeds, mask, action_dim, end_ids, allowed)
                tokens, logits = decode_greedily(*asked, use_cache)
        else:
            embeds, mask, _, _ = self.embed_inputs(*prompt)
            if return_dict and (generate_kwargs.get("num_beams") or 1) > 1:
                raise OpenVLAValueError(
                    "Bin probabilities are not defined for beam search; drop num_beams or return_dict."
                )
            if allowed is not None:
                processors = generate_kwargs.get("logits_processor") or []
                generate_kwargs["logits_processor"] = [*processors, lambda _, scores: only(scores, allowed)]
            generate_kwargs.update(eos_token_id=end_ids, max_new_tokens=action_dim)
            generate_kwargs.update(return_dict_in_generate=True, output_logits=return_dict)
            output = self._generate_from(embeds, mask, generate_kwargs)
            tokens = output.sequences
            logits = torch.stack(output.logits, dim=1).float() if return_dict else None
            require_whole_actions(tokens, action_dim, end_ids)
        statistics = [row for row in statistics for _ in range(len(tokens) // len(statistics))]
        return tokens_answer(self.action_tokenizer, tokens, logits, statistics, return_dict, strict=strict)

    def _decode_fast(
        self,
        prompt: tuple[torch.Tensor | None, ...],
        steps: int,
        allowed: slice | None,
        draft: torch.LongTensor | None,
    ) -> tuple[torch.LongTensor, torch.FloatTensor]:
        """Tokens and finite logits, from one CUDA graph where the prompt was recorded."""

        def answer(*prompt: torch.Tensor) -> tuple[torch.LongTensor, torch.FloatTensor]:
            embeds, mask, _, _ = self.embed_inputs(*prompt)
            guess = None if draft is None else draft.to(embeds.device)
            return decode_fast(self.language_model, embeds, mask, steps, allowed, guess)

        tokens, logits = answer(*prompt) if draft is not None else recorded(self, answer, prompt, (steps, str(allowed)))
        return tokens, require_finite(logits)

    def _predict_chunk(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor | None,
        pixel_values: torch.FloatTensor,
        proprio: torch.FloatTensor | None,
        statistics: list[NormalizationStatistics],
        diffusion: dict[str, Any],
        return_dict: bool,
        constrain_actions: bool,
        strict: bool,
        fast: bool | None,
    ) -> np.ndarray | ActionOutput:
        """The chunk of every row, in one pass."""
        head, end_id = self.config.action_head, self.config.text_config.eos_token_id

        def answer(*given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            input_ids, attention_mask, pixel_values, proprio = given
            with_slots = with_action_slots(input_ids, attention_mask, self.tokens_per_chunk, end_id)
            seen = self.observe(*with_slots, pixel_values, proprio)
            seen.fast = fast
            return self.chunk_logits(seen) if head is None else self.predict_normalized_chunk(seen, **diffusion)

        given = (input_ids, attention_mask, pixel_values, proprio)
        length = input_ids.shape[1] + self.vision_backbone.patches_per_prompt + self.tokens_per_chunk
        waits = head == "diffusion" or self.config.use_film or not goes_fast(fast, self.language_model, length)
        numbers, hidden = answer(*given) if waits else recorded(self, answer, given, "chunk")
        numbers = require_finite(numbers.float())
        if head is None:
            logits = numbers.unflatten(1, (self.config.chunk_length, -1))
            tokens = (only(logits, self.action_token_ids) if constrain_actions else logits).argmax(-1)
            return tokens_answer(self.action_tokenizer, tokens, logits, statistics, return_dict, hidden, strict)
        return numbers_answer(numbers, statistics, return_dict, hidden)

    @torch.no_grad()
    def score_actions(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        actions: np.ndarray | Sequence[Any] | None = None,
        unnorm_key: str | Sequence[str | None] | None = None,
    ) -> np.ndarray:
        """Log-probability that the model would have answered with each candidate action: rank or reject candidates.

        Args:
            input_ids: As in ``predict_action``.
            pixel_values: As in ``predict_action``.
            attention_mask: As in ``predict_action``.
            actions: Robot units, ``(candidates, action_dim)`` for every row or ``(batch, candidates, action_dim)``.
            unnorm_key: As in ``predict_action``.

        Returns:
            float64 ``(batch, candidates)``, the sum over dimensions of the log-probability of the candidate's bin
            given the tokens before it, in nats, over the whole vocabulary. (Two tokens decode to the highest bin; the
            top edge's is what stands before the next.)

        Raises:
            ValueError: Shapes disagree, values are not finite, or the model answers in parallel, where the numbers of
                a chunk have no probability given each other.
            KeyError: Unknown ``unnorm_key``.
        """
        if input_ids is None or pixel_values is None or actions is None:
            raise OpenVLAValueError("score_actions needs input_ids, pixel_values and actions.")
        if self.config.parallel_decoding:
            raise OpenVLAValueError(
                "score_actions is for models that answer token by token; this one answers in parallel."
            )
        input_ids, attention_mask = self._prompts(input_ids, attention_mask)
        statistics = self.batch_statistics(self.batch_keys(unnorm_key, len(input_ids)))
        candidates = as_numbers(actions, "actions")
        if candidates.ndim == 2:
            candidates = np.broadcast_to(candidates, (len(input_ids), *candidates.shape))
        if candidates.ndim != 3 or len(candidates) != len(input_ids) or candidates.shape[1] == 0:
            raise OpenVLAValueError(
                f"actions must have shape (candidates, action_dim) or ({len(input_ids)}, candidates, action_dim) with "
                f"at least one candidate, got {np.shape(actions)}."
            )
        encode, top = self.action_tokenizer.encode_decoded, self.action_tokenizer.first_token_id
        tokens = np.stack([encode(row.normalize(actions)) for row, actions in zip(statistics, candidates)])
        embeds, mask, _, _ = self.embed_inputs(input_ids, pixel_values, attention_mask)
        _, count, action_dim = tokens.shape
        tokens = torch.from_numpy(tokens).to(embeds.device).flatten(0, 1)
        embeds = embeds.repeat_interleave(count, dim=0)
        embeds = torch.cat([embeds, self.get_input_embeddings()(tokens[:, :-1]).to(embeds.dtype)], dim=1)
        if mask is not None:
            mask = mask.repeat_interleave(count, dim=0)
            mask = torch.cat([mask, mask.new_ones(len(mask), action_dim - 1)], dim=1)
        output = self.language_model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=None if mask is None else positions_of(mask),
            use_cache=False,
            return_dict=True,
        )
        # The logits at the prompt's last position and at all action tokens but the last one.
        logits = require_finite(output.logits[:, -action_dim:].float())
        likely, tokens = logits.log_softmax(-1), tokens.to(logits.device)
        chosen = likely.gather(-1, tokens[..., None]).squeeze(-1)
        chosen = torch.where(tokens == top, torch.logaddexp(chosen, likely[..., top + 1]), chosen)
        return chosen.cpu().double().sum(-1).view(-1, count).numpy()

    def _prompts(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.LongTensor, torch.LongTensor | None]:
        """Left-padded prompts as trained on: ending in the empty token."""
        input_ids, attention_mask = self._aligned(input_ids, attention_mask)
        if self.config.empty_token_id is None:
            return input_ids, attention_mask
        return append_token(input_ids, attention_mask, self.config.empty_token_id, self.pad_token_id)

    @property
    def action_token_ids(self) -> slice:
        """The ids that are action tokens: the last ``n_action_bins`` of the unpadded vocabulary."""
        return slice(self.action_tokenizer.first_token_id, self.action_tokenizer.vocab_size)
