"""OpenVLA: camera images and an instruction in, one robot action or a chunk of them out.

One action, in order: ``predict_action`` aligns the prompts and appends the empty token, ``embed_inputs`` runs the
vision towers and inserts the patches after each BOS token, ``decode_greedily`` chooses one token per action dimension,
``ActionTokenizer`` decodes tokens to bin centres and ``NormalizationStatistics`` un-normalises them to robot units.
For a chunk of OpenVLA-OFT, ``parallel_openvla`` replaces the steps between the first and the last.

Kim et al. 2024, "OpenVLA: An Open-Source Vision-Language-Action Model".
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import GenerationMixin
from transformers.utils import CONFIG_NAME, logging
from transformers.utils.hub import extract_commit_hash

from .publishing_openvla import require_same_code

require_same_code(__name__)

from .actions_openvla import ActionTokenizer, NormalizationStatistics, NormStatsMixin
from .compatibility_openvla import CACHE_FIELD  # noqa: F401  transformers up to 5.8 copies direct imports only
from .configuration_openvla import OpenVLAConfig, find_adapter, optional_file, write_json
from .decoding_openvla import (
    ActionOutput,
    append_token,
    build_output,
    decode_greedily,
    mask_logits,
    output_from_tokens,
    require_complete_actions,
    require_finite,
    require_one_pass,
    set_argument_names,
    use_fast_decoder,
)
from .errors_openvla import OpenVLAImportError, OpenVLAValueError
from .heads_openvla import HEAD_MODULES  # noqa: F401
from .parallel_openvla import (
    ParallelDecodingModel,
    append_action_placeholders,
    normalize_proprio,
    proprio_array,
    refuse_loose_parts,
)
from .prismatic_openvla import IGNORE_INDEX  # noqa: F401
from .quantization_openvla import is_quantized
from .vision_openvla import PrismaticVisionBackbone  # noqa: F401
from .vq_openvla import ActionVQ, VQActionTokenizer, restore_float32

logger = logging.get_logger(__name__)

STATISTICS_FILE = "dataset_statistics.json"
# Keywords of generate() with which predict_action decodes greedily itself; with others transformers' generate runs.
GREEDY_KEYWORDS = {"do_sample", "num_beams", "use_cache", "eos_token_id"}


class Prompt(NamedTuple):
    """Left-padded inputs of a prediction, as ``embed_inputs`` takes them; no mask where nothing is masked."""

    input_ids: torch.Tensor
    pixel_values: torch.Tensor
    attention_mask: torch.Tensor | None


def require_package(feature: str) -> Any:
    """Set the methods of the installed package, or raise ImportError; return its module ``openvla.adapters.lora``."""
    try:
        importlib.import_module("openvla.loading").attach_methods(OpenVLAForActionPrediction)
    except (ImportError, AttributeError) as error:  # AttributeError: another folder is called openvla
        raise OpenVLAImportError(
            f"{feature} needs the openvla package, which is more than the code in a saved folder: "
            f"pip install openvla ({error})"
        ) from error
    return importlib.import_module("openvla.adapters.lora")


def _method_of_package(name: str) -> Callable[..., Any]:
    """Return a method that the installed package implements; the first call puts the package's in its place."""

    def method(self: OpenVLAForActionPrediction, *args: Any, **kwargs: Any) -> Any:
        require_package(f"{name}()")
        return getattr(OpenVLAForActionPrediction, name)(self, *args, **kwargs)

    return method


class OpenVLAForActionPrediction(NormStatsMixin, ParallelDecodingModel, GenerationMixin):  # type: ignore[misc]
    """OpenVLA: camera images and an instruction in, one robot action, or a chunk of them, out."""

    config_class = OpenVLAConfig  # type: ignore[assignment]  # a subclass of the base's
    config: OpenVLAConfig
    lora_adapter: Any = None  # settings of the adapter in use: openvla.adapters.files.LoraAdapter without tensors

    # Implemented in openvla/adapters and openvla/inference; saved folders do not carry them.
    enable_lora = _method_of_package("enable_lora")
    load_lora = _method_of_package("load_lora")
    save_lora = _method_of_package("save_lora")
    merge_lora = _method_of_package("merge_lora")
    disable_adapters = _method_of_package("disable_adapters")
    enable_adapters = _method_of_package("enable_adapters")
    enable_parallel_decoding = _method_of_package("enable_parallel_decoding")
    loss_at_labels = _method_of_package("loss_at_labels")
    parallel_forward = _method_of_package("parallel_forward")
    score_actions = _method_of_package("score_actions")
    sample_actions = _method_of_package("sample_actions")
    action_log_probs = _method_of_package("action_log_probs")

    def __init__(self, config: OpenVLAConfig) -> None:
        config.validate_action_config()  # keywords of from_pretrained are set after it was built
        super().__init__(config)
        self.action_tokenizer: Any = ActionTokenizer(config.vocab_size, config.n_action_bins)
        if config.action_vq is not None:
            self.action_vq = ActionVQ(config)
            self.action_tokenizer = VQActionTokenizer(config.vocab_size, self.action_vq)
        self.bins, self.bin_centers = (getattr(self.action_tokenizer, name, None) for name in ("bins", "bin_centers"))
        self.vocab_size = config.vocab_size
        self.build_heads(config)
        self.post_init()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *model_args: Any, **kwargs: Any
    ) -> Any:
        """Load a checkpoint, with the action statistics in its dataset_statistics.json.

        Entries of that file replace those of config.json under the same key; a single one becomes the default. An
        adapter (LoRA) is loaded on top of the base that it names, which needs the installed package.
        """
        adapter, hub_kwargs = find_adapter(pretrained_model_name_or_path, kwargs)
        if adapter is not None:
            return require_package("An adapter (LoRA)").load_base_and_adapter(cls, adapter, hub_kwargs, kwargs)
        refuse_loose_parts(pretrained_model_name_or_path, hub_kwargs)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.config.parallel_decoding:
            model.require_bidirectional()
        if pretrained_model_name_or_path is not None:
            if model.config.action_vq is not None and model.dtype != torch.float32:
                restore_float32(model.action_vq, pretrained_model_name_or_path, hub_kwargs)
            file = optional_file(pretrained_model_name_or_path, STATISTICS_FILE, hub_kwargs)
            if file is not None:
                model._read_statistics(file, pretrained_model_name_or_path)
            # An adapter records the commit of its base; from 5.2x on transformers does not keep it.
            config_file = optional_file(pretrained_model_name_or_path, CONFIG_NAME, hub_kwargs)
            model.config._commit_hash = extract_commit_hash(config_file, None)
        return loaded

    def _read_statistics(self, file: str, name_or_path: str | os.PathLike[str]) -> None:
        """Add the action statistics in a file to the configuration."""
        try:
            self.config.merge_statistics(json.loads(Path(file).read_text(encoding="utf-8")))
        except ValueError as error:
            raise OpenVLAValueError(
                f"{STATISTICS_FILE} beside the weights of {name_or_path} is not usable: {error}"
            ) from error

    def save_pretrained(  # type: ignore[override]  # other arguments pass through
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, **kwargs: Any
    ) -> Any:
        """Save weights, or the adapter of a model that has one, configuration, code and dataset_statistics.json.

        Statistics that the folder has for other datasets are kept; it has no default dataset then, so that
        ``unnorm_key`` is needed. Those under a key of this model are replaced. Warnings say so.

        Raises:
            ValueError: The folder's dataset_statistics.json is not usable; it holds whole weights and this is an
                adapter, or the reverse; a keyword has no effect on an adapter.
            TypeError: A keyword is unknown, for a model with an adapter.
        """
        if self.lora_adapter is not None:
            require_package("An adapter (LoRA)").require_save_keywords(kwargs)
        if self.saved_folder is not None:
            self.saved_folder.require_own_kind(save_directory, self._hf_peft_config_loaded)
        default = self.config.default_unnorm_key
        if is_main_process and self.norm_stats and not os.path.isfile(save_directory):
            os.makedirs(save_directory, exist_ok=True)
            file = Path(save_directory) / STATISTICS_FILE
            others = {}  # statistics of the folder as it is
            if self.saved_folder is not None:
                others = self.saved_folder.other_statistics(self, file)
            elif file.is_file():
                in_folder = json.loads(file.read_text(encoding="utf-8"))
                others = {key: entry for key, entry in in_folder.items() if key not in self.norm_stats}
            write_json(file, {**others, **self.norm_stats})
            if others:
                self.config.default_unnorm_key = None
                logger.warning(
                    f"{file} keeps the statistics of {sorted(others)}, which this model does not know. The saved "
                    "folder has no default dataset: give unnorm_key to predict_action."
                )
        try:
            if self.lora_adapter is not None:
                return self.save_lora(save_directory, kwargs.get("state_dict")) if is_main_process else None
            if is_quantized(self):
                self._record_quantized_base()
            return super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        finally:
            self.config.default_unnorm_key = default

    def _record_quantized_base(self) -> None:
        """Record in the configuration what was quantised: the base of adapters that are trained on the saved folder."""
        try:
            self.config.quantized_from = require_package("The record of the base").record_base(self)
        except OpenVLAImportError as error:
            if getattr(self.config, "quantized_from", None) is None:
                logger.warning(
                    "The saved folder does not record which weights were quantised, so adapters that are trained on it "
                    f"cannot be merged. {error}"
                )

    # Every argument is named, not collected: transformers' Trainer keeps the columns that it finds in this signature.
    def forward(  # type: ignore[override]  # more arguments than the base's  # noqa: D417  and all of those
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
    ) -> Any:
        """Run one pass: ``PrismaticForConditionalGeneration.forward``, or with parallel decoding a training pass.

        Parallel decoding takes the arguments below, and computes logits at labels only.

        Args:
            input_ids: int64 ``(batch, length)``: prompt, the chunk's action tokens, the end token, padding.
            attention_mask: ``(batch, length)``, zero on padding.
            pixel_values: float ``(batch, images * (3 or 6), size, size)``.
            labels: int64 ``(batch, length)``, -100 except on action tokens and the end token. They give the chunk's
                positions; the model does not see ``input_ids`` there.
            return_dict: False for a tuple.
            actions: Heads: float ``(batch, chunk, action_dim)``, normalised. None without a head.
            proprio: float ``(batch, proprio_dim)``, normalised.
            noise: Diffusion: ``(batch, chunk, action_dim)``; None draws it from the normal distribution.
            timesteps: Diffusion: int64 ``(batch,)`` noise levels; None draws them uniformly.
            generator: Random generator for noise and levels.

        Returns:
            ``openvla.training.parallel_loss.ChunkOutput``, with the loss.

        Raises:
            ValueError: Inputs are missing, do not fit the model or would not be used.
        """
        text_arguments: dict[str, Any] = {"inputs_embeds": inputs_embeds, "past_key_values": past_key_values}
        text_arguments |= {"cache": cache, "position_ids": position_ids, "use_cache": use_cache}
        text_arguments |= {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        text_arguments |= {"output_projector_features": output_projector_features}
        chunk_arguments: dict[str, Any] = {"actions": actions, "proprio": proprio, "noise": noise}
        chunk_arguments |= {"timesteps": timesteps, "generator": generator}
        inputs = (input_ids, attention_mask, pixel_values, labels)
        if not self.config.parallel_decoding:
            self._require_unset(chunk_arguments)
            return super().forward(
                *inputs, return_dict=return_dict, logits_at_labels=bool(logits_at_labels), **text_arguments
            )
        self._require_unset({**text_arguments, "logits_at_labels=False": logits_at_labels is False})
        output = self.parallel_forward(*inputs, **chunk_arguments)
        return output.to_tuple() if self._returns_tuple(return_dict) else output

    def _require_unset(self, arguments: dict[str, Any]) -> None:
        """Raise ValueError for arguments of ``forward`` that have no effect on this kind of model."""
        unused = set_argument_names(arguments)
        if unused and self.config.parallel_decoding:
            raise OpenVLAValueError(f"A parallel-decoding model's forward takes no {unused}; leave it out.")
        if unused:
            raise OpenVLAValueError(f"This model predicts one action in tokens and takes no {unused}; leave it out.")

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Run ``PrismaticForConditionalGeneration.generate``; raise ValueError for a model with parallel decoding."""
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
        actions: str = "all",
        **generate_kwargs: Any,
    ) -> np.ndarray | ActionOutput:
        """Predict the robot action, or with parallel decoding the chunk of actions, for images and a prompt.

        Args:
            input_ids: int64 ``(batch, length)``, padded on either side; the empty token is appended where missing.
            pixel_values: float ``(batch, images * (3 or 6), size, size)``, for each prompt the images of one moment.
            attention_mask: ``(batch, length)``; may be left out when there is no padding.
            unnorm_key: Dataset whose statistics give robot units, or one a sample; None: the only or default one.
            proprio: The robot's state in its units, ``(proprio_dim,)`` or ``(batch, proprio_dim)``, for models that
                were trained with it; it is normalised with the statistics of ``unnorm_key``.
            noise: Diffusion head: start of the denoising, ``(batch, chunk, action_dim)``.
            generator: Diffusion head: random generator for the noise where none is given.
            num_inference_steps: Diffusion head: number of denoising steps; None is the checkpoint's.
            return_dict: Return an ``ActionOutput`` with tokens, bin probabilities and entropy, hidden states.
            constrain_actions: Choose among action tokens only.
            strict: Raise for a single token that is no action token, as every ``Policy`` does. Without it, up to
                ``MAX_NON_ACTION_SHARE`` of them decode to the extreme bins, as in the reference, with a warning.
            fast: Use the package's fast decoder, for greedy decoding with a cache and the same tokens up to rounding:
                None where the language model allows it, True with a warning where it does not, False never.
            draft: A guess of the action in robot units, ``(action_dim,)`` or ``(batch, action_dim)``, such as the
                previous one: leading tokens that it has right need no decode step. Needs the fast decoder.
            actions: "all" actions of a chunk, or its "first" one, which is what openvla-mini executes.
            **generate_kwargs: Keywords of ``generate`` (sampling, beams, ...); greedy without. With
                ``num_return_sequences=n`` each sample gives n consecutive actions.

        Returns:
            float64 ``(action_dim,)`` for one sample, ``(batch, action_dim)`` for several, in the units of the dataset
            (OpenVLA's robots: metres, radians, gripper 0 closed to 1 open). With parallel decoding, or VQ actions,
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
                "predict_action knows how many tokens an action has; leave out max_new_tokens and max_length."
            )
        has_chunk = self.config.parallel_decoding or self.config.action_vq is not None
        if actions not in ("all", "first") or (actions == "first" and not has_chunk):
            raise OpenVLAValueError(f"actions is 'all', or of a chunk the 'first' one, got {actions!r}.")
        if draft is not None and self.config.action_vq is not None:
            raise OpenVLAValueError("draft is for a model whose tokens are bins; leave it out.")
        diffusion = {"noise": noise, "generator": generator, "num_inference_steps": num_inference_steps}
        self._require_diffusion(diffusion)
        prompt = self._prepare_prompt(input_ids, pixel_values, attention_mask)
        keys = self.batch_keys(unnorm_key, len(prompt.input_ids))
        statistics = self.batch_statistics(keys)
        if self.config.parallel_decoding:
            require_one_pass(generate_kwargs, draft, constrain_actions, self.config.action_head)
        state = self.normalize_proprio(proprio, keys)
        if self.config.parallel_decoding:
            output = self._predict_chunk(
                prompt, state, statistics, diffusion, constrain_actions, strict, fast, with_details=return_dict
            )
        else:
            tokens, logits = self._predict_tokens(
                prompt, statistics, generate_kwargs, constrain_actions, fast, draft, return_logits=return_dict
            )
            statistics = [entry for entry in statistics for _ in range(len(tokens) // len(statistics))]
            output = output_from_tokens(tokens, self.action_tokenizer, statistics, logits=logits, strict=strict)
        if actions == "first" and output.actions is not None and output.normalized_actions is not None:
            output.actions = output.actions[..., 0, :]
            output.normalized_actions = output.normalized_actions[..., 0, :]
        return output if return_dict else np.asarray(output.actions)

    def _prepare_prompt(
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> Prompt:
        """Return left-padded prompts that end in the empty token, as in training, with their images."""
        ids, mask = self._align_prompts(input_ids, attention_mask)
        if self.config.empty_token_id is not None:
            ids, mask = append_token(ids, mask, int(self.config.empty_token_id), self.pad_token_id)
        return Prompt(ids, pixel_values, mask)

    def _require_diffusion(self, arguments: dict[str, Any]) -> None:
        """Raise ValueError for arguments of a diffusion head that have no effect."""
        unused = set_argument_names(arguments)
        if unused and self.config.action_head != "diffusion":
            raise OpenVLAValueError(f"{unused}: only for a diffusion head, not for {self.config.action_head!r}.")
        if arguments["noise"] is not None and arguments["generator"] is not None:
            raise OpenVLAValueError("noise is given, so nothing is drawn from the generator; leave one of them out.")

    def num_action_tokens(self, statistics: Sequence[NormalizationStatistics]) -> int:
        """Return the number of tokens of a prediction: one a dimension, or one a round of the VQ autoencoder."""
        vq = self.config.action_vq
        return statistics[0].dimension if vq is None else int(vq["num_rounds"])

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
        """Return the action tokens ``(batch, steps)``, and with ``return_logits`` the logits behind them."""
        steps = self.num_action_tokens(statistics)
        end_ids = generate_kwargs.pop("eos_token_id", self.generation_config.eos_token_id)
        allowed = self.action_token_ids if constrain_actions else None
        samples = generate_kwargs.get("do_sample") or (generate_kwargs.get("num_beams") or 1) > 1
        greedy = set(generate_kwargs) <= GREEDY_KEYWORDS and not samples
        use_cache = generate_kwargs.get("use_cache") is not False
        length = prompt.input_ids.shape[1] + self.vision_backbone.patches_per_prompt + steps
        accelerator, language_model = self.accelerator, self.language_model
        is_fast = use_fast_decoder(fast, accelerator, language_model, length, draft, greedy and use_cache)
        if not greedy:
            generate_kwargs |= {"eos_token_id": end_ids, "max_new_tokens": steps}
            tokens, logits = self._generate_tokens(prompt, allowed, generate_kwargs, return_logits)
            require_complete_actions(tokens, steps, end_ids)
        elif is_fast and accelerator is not None:
            tokens, logits = accelerator.predict_tokens(self, prompt, statistics, allowed, draft)
            require_complete_actions(tokens, steps, end_ids)
        else:
            embeds, mask, _, _ = self.embed_inputs(*prompt)
            tokens, logits = decode_greedily(language_model, embeds, mask, steps, end_ids, allowed, use_cache)
        return tokens, logits if return_logits else None

    def _generate_tokens(
        self, prompt: Prompt, allowed: slice | None, generate_kwargs: dict[str, Any], return_logits: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return action tokens and logits from transformers' ``generate``: sampling, beams and other keywords."""
        if return_logits and (generate_kwargs.get("num_beams") or 1) > 1:
            raise OpenVLAValueError("Bin probabilities are not defined for beam search; drop num_beams or return_dict.")
        embeds, mask, _, _ = self.embed_inputs(*prompt)
        if allowed is not None:
            processors = generate_kwargs.get("logits_processor") or []
            generate_kwargs["logits_processor"] = [*processors, lambda _, scores: mask_logits(scores, allowed)]
        generate_kwargs |= {"return_dict_in_generate": True, "output_logits": return_logits}
        output = self._generate_from_embeds(embeds, mask, generate_kwargs)
        return output.sequences, torch.stack(output.logits, dim=1).float() if return_logits else None

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
        """Return the chunk of every sample, with bin probabilities and hidden states ``with_details`` only."""
        head, end_id = self.config.action_head, self.config.text_config.eos_token_id
        noise, num_steps = None, diffusion["num_inference_steps"]
        if head == "diffusion":
            noise = self.initial_noise(prompt.input_ids, diffusion["noise"], diffusion["generator"])

        def compute(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
            ids, pixels, mask, state, noise = inputs
            with_chunk = append_action_placeholders(ids, mask, self.tokens_per_chunk, end_id)
            obs = self.embed_observation(*with_chunk, pixels, state)
            if head is None:
                return self.chunk_logits(obs, fast)
            return self.predict_normalized_chunk(obs, noise, num_steps, fast)

        length = prompt.input_ids.shape[1] + self.vision_backbone.patches_per_prompt + self.tokens_per_chunk
        synchronizes = self.config.use_film and prompt.attention_mask is not None  # words are counted on the host
        accelerator = self.accelerator
        graphed = not synchronizes and use_fast_decoder(fast, accelerator, self.language_model, length)
        if graphed and accelerator is not None:
            inputs = (*prompt, proprio, noise)
            prediction, hidden = accelerator.run_graphed(self, compute, inputs, ("chunk", num_steps))
        else:
            prediction, hidden = compute(*prompt, proprio, noise)
        prediction = require_finite(prediction.float())
        if head is not None:
            return build_output(prediction.cpu().numpy(), statistics, hidden if with_details else None)
        logits = prediction.unflatten(1, (self.config.chunk_length, -1))
        tokens = (mask_logits(logits, self.action_token_ids) if constrain_actions else logits).argmax(-1)
        details = {"logits": logits, "hidden_states": hidden} if with_details else {}
        return output_from_tokens(tokens, self.action_tokenizer, statistics, **details, strict=strict)

    def normalize_proprio(self, proprio: Any, unnorm_keys: list[str]) -> torch.Tensor | None:
        """Normalise robot states by their datasets' statistics: float32 ``(batch, proprio_dim)``; None for none."""
        states = proprio_array(proprio, len(unnorm_keys))
        self._require_proprio(states, len(unnorm_keys))
        if states is None:
            return None
        return normalize_proprio(states, [self.proprio_statistics(key) for key in unnorm_keys], unnorm_keys)
