"""OpenVLA: camera images and an instruction in, one robot action or a chunk of them out.

One action, in order: ``predict_action`` aligns the prompts and appends the empty token, ``embed_inputs`` runs the
towers and puts the patches after each row's BOS, ``decode_greedily`` picks one token per action dimension,
``ActionTokenizer`` turns tokens into bin centres and ``NormalizationStatistics`` stretches them to robot units.
A chunk of OpenVLA-OFT takes the way of ``parallel_openvla`` between the first step and the last.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from transformers import GenerationMixin, PretrainedConfig
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import logging

from .saved_folder_openvla import mark_code, refuse_two_kinds, require_one_code, require_own_kind

require_one_code(__name__)

from .actions_openvla import ActionTokenizer, NormalizationStatistics, as_numbers
from .answers_openvla import ActionOutput, numbers_answer, tokens_answer
from .compatibility_openvla import require_peft_of_transformers
from .configuration_openvla import OpenVLAConfig, commit_of, find_adapter, optional_file, write_json
from .decoding_openvla import append_token, decode_greedily, only, positions_of, require_finite, require_whole_actions
from .errors_openvla import OpenVLAImportError, OpenVLAValueError
from .fast_openvla import decode_fast, draft_tokens, goes_fast, require_fast
from .graphs_openvla import recorded
from .heads_openvla import NoiseSchedule  # noqa: F401
from .norm_stats_openvla import NormStatsMixin
from .own_functions_openvla import head_dim  # noqa: F401
from .parallel_openvla import (
    ChunkOutput,
    ParallelDecodingMixin,
    refuse_loose_parts,
    with_action_slots,
)
from .prismatic_openvla import PrismaticCausalLMOutputWithPast, PrismaticForConditionalGeneration
from .publishing_openvla import PushToHub  # noqa: F401
from .quantization_openvla import is_quantized
from .vision_openvla import PrismaticVisionBackbone  # noqa: F401  transformers up to 5.8 copies direct imports only

logger = logging.get_logger(__name__)

STATISTICS_FILE = "dataset_statistics.json"
# generate() keywords with which predict_action decodes greedily by itself; any other goes to transformers' generate.
GREEDY_KEYWORDS = {"do_sample", "num_beams", "use_cache", "eos_token_id"}
ADAPTER_NAME = "default"
NO_ADAPTER = "This model has no adapter; call enable_lora() or load_lora(folder) first."


class AdapterFunctions(Protocol):
    """Functions behind the adapter methods of ``OpenVLAForActionPrediction``: ``openvla.adapters.lora``."""

    def enable_lora(
        self,
        model: OpenVLAForActionPrediction,
        r: int,
        alpha: float,
        dropout: float,
        targets: str | Sequence[str],
        modules_to_save: Sequence[str],
    ) -> None: ...

    def load_lora(
        self,
        model: OpenVLAForActionPrediction,
        name_or_path: str | os.PathLike[str],
        trainable: bool,
        hub_kwargs: dict[str, Any],
    ) -> None: ...

    def load_base_and_adapter(
        self,
        model_class: type[OpenVLAForActionPrediction],
        adapter: str | os.PathLike[str],
        hub_kwargs: dict[str, Any],
        kwargs: dict[str, Any],
    ) -> Any: ...

    def save_lora(
        self,
        model: OpenVLAForActionPrediction,
        folder: str | os.PathLike[str],
        state_dict: Mapping[str, torch.Tensor] | None,
    ) -> None: ...

    def require_save_keywords(self, kwargs: Mapping[str, Any]) -> None: ...

    def merge_lora(self, model: OpenVLAForActionPrediction) -> OpenVLAForActionPrediction: ...

    def switch_adapters(self, model: OpenVLAForActionPrediction, enabled: bool) -> None: ...

    def record_base(self, model: OpenVLAForActionPrediction) -> Mapping[str, Any]: ...


class OpenVLAForActionPrediction(
    NormStatsMixin, ParallelDecodingMixin, PrismaticForConditionalGeneration, GenerationMixin
):
    """OpenVLA: camera images and an instruction in, one robot action, or a chunk of them, out.

    Attributes:
        adapter_functions: LoRA, set by the installed package; None in the code of a saved folder, until it is used.
        lora_adapter: Settings of the adapter in use (``openvla.adapters.files.LoraAdapter``, without tensors), or None.
    """

    config_class = OpenVLAConfig
    adapter_functions: ClassVar[AdapterFunctions | None] = None
    lora_adapter: Any = None

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
        adapter, hub_kwargs = find_adapter(pretrained_model_name_or_path, kwargs)
        if adapter is not None:
            refuse_two_kinds(os.path.join(adapter, hub_kwargs.get("subfolder") or ""))
            return cls._installed_adapter_functions().load_base_and_adapter(cls, adapter, hub_kwargs, kwargs)
        refuse_loose_parts(pretrained_model_name_or_path, hub_kwargs)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if pretrained_model_name_or_path is not None:
            file = optional_file(pretrained_model_name_or_path, STATISTICS_FILE, hub_kwargs)
            model._read_statistics(file, pretrained_model_name_or_path)
            # An adapter records the commit of its base; from 5.2x on transformers does not keep it.
            model.config._commit_hash = commit_of(pretrained_model_name_or_path, hub_kwargs)
        return loaded

    def _after_loading(self) -> None:
        super()._after_loading()
        if self.config.parallel_decoding:
            self.require_bidirectional()

    def _read_statistics(self, file: str | None, name_or_path: str | os.PathLike[str]) -> None:
        """Add the action statistics in a file, where there is one, to the configuration."""
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
        if self.lora_adapter is not None:
            self._installed_adapter_functions().require_save_keywords(kwargs)
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
            if self.lora_adapter is not None:
                return self.save_lora(save_directory, kwargs.get("state_dict")) if is_main_process else None
            if is_quantized(self):
                self._record_quantized_base()
            return super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        finally:
            self.config.default_unnorm_key = default

    # Adapters (LoRA). The work is done by the installed package; saved folders carry no more than these methods.

    def enable_lora(
        self,
        r: int = 32,
        alpha: float = 16,
        dropout: float = 0.0,
        targets: str | Sequence[str] = "all-linear",
        modules_to_save: Sequence[str] = (),
    ) -> None:
        """Freeze the model and add trainable LoRA matrices to some of its weights, in place.

        Outputs do not change until the matrices are trained: A starts normally distributed with standard deviation
        1 / r and B as zero (for an embedding A as zero), as in the reference. They are float32, or bfloat16 beside
        quantised weights.

        Args:
            r: Rank.
            alpha: The change of a weight is scaled by alpha / r.
            dropout: Dropout probability of the matrices' inputs in training.
            targets: "all-linear", as in the reference: every linear layer of vision towers, projector and language
                model, without the LM head. "language": the linear layers of the language model alone (the paper found
                frozen towers much worse). "sandwich": what the paper's sandwich fine-tuning trains: towers, projector,
                token embedding, last decoder layer, LM head. Or a list of names of linear layers and embeddings, or of
                their endings. Modules that never run (each tower's last block and pooling head) are left out.
            modules_to_save: Full names of modules to train in full; they are saved with the adapter. Action heads,
                their projectors and FiLM always are.

        Raises:
            ValueError: A number is out of range, a name is unknown, or the model already has an adapter.
            ImportError: peft, or in the code of a saved folder the openvla package, is not installed.
        """
        self._installed_adapter_functions().enable_lora(self, r, alpha, dropout, targets, modules_to_save)

    def load_lora(self, name_or_path: str | os.PathLike[str], *, trainable: bool = False, **hub_kwargs: Any) -> None:
        """Load a saved adapter on this model, its base, with the action statistics beside it.

        An adapter of a model with parallel decoding brings its heads: this model then decodes in parallel too.

        Args:
            name_or_path: Adapter folder or Hub repository.
            trainable: Continue training it.
            **hub_kwargs: revision, token, ... as for ``from_pretrained``.

        Raises:
            ValueError: The adapter belongs to another base, is merged into it already, is damaged, or its OpenVLA-OFT
                heads are in part files in the folder above; the model is then unchanged.
            FileNotFoundError: There is no adapter.
            TypeError: A keyword is unknown.
            ImportError: peft, or in the code of a saved folder the openvla package, is not installed.
        """
        self._installed_adapter_functions().load_lora(self, name_or_path, trainable, hub_kwargs)

    def save_lora(self, folder: str | os.PathLike[str], state_dict: Mapping[str, torch.Tensor] | None = None) -> None:
        """Write the adapter's folder; ``save_pretrained`` does this for a model that has an adapter.

        Args:
            folder: Folder to write; created where it does not exist.
            state_dict: The model's state dict, where a trainer has gathered it; None takes the model's parameters.

        Raises:
            ValueError: The model has no adapter, or the folder holds the weights of a whole model.
            ImportError: This is the code of a saved folder, and the openvla package is not installed.
        """
        self._installed_adapter_functions().save_lora(self, folder, state_dict)

    def merge_lora(self) -> OpenVLAForActionPrediction:
        """Return the plain model with the adapter in its weights, equal in every bit to that of ``openvla merge``.

        Each weight becomes ``W + alpha / r * B A``, computed in float32 on the CPU and rounded once to the dtype of W,
        one weight at a time and in place: in bfloat16 a weight differs from the exact sum by at most 2^-9 of its size.

        A quantised model is not changed: the adapter is merged into the files that it was quantised from, loaded on
        the CPU in their own dtype. The adapter was trained beside quantised weights, so the merged model differs from
        the trained one by the quantisation error.

        Returns:
            This model, or for a quantised one a new model.

        Raises:
            ValueError: There is no adapter, or a result would not be finite; the model is then unchanged.
            ImportError: This is the code of a saved folder, and the openvla package is not installed.
        """
        return self._installed_adapter_functions().merge_lora(self)

    def disable_adapters(self) -> None:
        """Predict as the base does, heads included, until ``enable_adapters``.

        Raises:
            ValueError: There is no adapter.
            ImportError: This is the code of a saved folder, and the openvla package is not installed.
        """
        self._installed_adapter_functions().switch_adapters(self, enabled=False)

    def enable_adapters(self) -> None:
        """Predict with the adapter again, modules that were trained in full included.

        transformers' own method (seen up to 5.24) leaves those switched off.

        Raises:
            ValueError: There is no adapter.
            ImportError: This is the code of a saved folder, and the openvla package is not installed.
        """
        self._installed_adapter_functions().switch_adapters(self, enabled=True)

    def active_adapters(self) -> list[str]:
        """Return the names of the adapters in use: of this package, or of transformers' ``add_adapter``.

        Raises:
            ValueError: There is no adapter.
        """
        if not self._hf_peft_config_loaded:
            raise OpenVLAValueError(NO_ADAPTER)
        return [ADAPTER_NAME] if self.lora_adapter is not None else super().active_adapters()

    def add_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """Do as transformers' own method; ``enable_lora`` needs no particular version of peft."""
        require_peft_of_transformers("add_adapter", "enable_lora")
        return super().add_adapter(*args, **kwargs)

    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """Do as transformers' own method; ``load_lora`` needs no particular version of peft."""
        require_peft_of_transformers("load_adapter", "load_lora")
        return super().load_adapter(*args, **kwargs)

    def set_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """Do as transformers' own method; ``load_lora`` needs no particular version of peft."""
        require_peft_of_transformers("set_adapter", "load_lora")
        return super().set_adapter(*args, **kwargs)

    def delete_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """Do as transformers' own method; ``merge_lora`` needs no particular version of peft."""
        require_peft_of_transformers("delete_adapter", "merge_lora")
        return super().delete_adapter(*args, **kwargs)

    def get_adapter_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Do as transformers' own method; ``save_lora`` needs no particular version of peft."""
        require_peft_of_transformers("get_adapter_state_dict", "save_lora")
        return super().get_adapter_state_dict(*args, **kwargs)

    @classmethod
    def _installed_adapter_functions(cls) -> AdapterFunctions:
        """Return the package's adapter functions; the code of a saved folder takes them where it is installed.

        Raises:
            ImportError: It is not installed.
        """
        if cls.adapter_functions is not None:
            return cls.adapter_functions
        try:
            package = importlib.import_module("openvla")
            functions: AdapterFunctions = package.OpenVLAForActionPrediction.adapter_functions
        except (ImportError, AttributeError) as error:  # AttributeError: another folder is called openvla
            raise OpenVLAImportError(
                "Adapters (LoRA) need the openvla package, which is more than the code in a saved folder: "
                f"pip install openvla ({error})"
            ) from error
        cls.adapter_functions = functions
        return functions

    def _require_no_adapter(self) -> None:
        if self.lora_adapter is not None:
            raise OpenVLAValueError("This model already has an adapter; call merge_lora(), or load the base again.")

    def _record_quantized_base(self) -> None:
        """Record in the configuration what was quantised: the base of adapters that are trained on the saved folder."""
        try:
            self.config.quantized_from = dict(self._installed_adapter_functions().record_base(self))
        except OpenVLAImportError as error:
            if getattr(self.config, "quantized_from", None) is None:
                logger.warning(
                    "The saved folder does not record which weights were quantised, so adapters that are trained on it "
                    f"cannot be merged. {error}"
                )

    def _save_code(self, folder: Path, config: PretrainedConfig) -> None:
        """Save this model's code files into a folder and name them in the configuration."""
        custom_object_save(self, folder, config=config)  # type: ignore[arg-type]  # annotated as a dictionary
        mark_code(folder)

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
        keys = self.row_keys(unnorm_key, len(input_ids))
        statistics = self.row_statistics(keys)
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
        statistics = self.row_statistics(self.row_keys(unnorm_key, len(input_ids)))
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
