"""Prismatic vision-language model (Karamcheti et al. 2024), the base of OpenVLA: loading, forward, text generation."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import is_flash_attn_2_available, logging

from .publishing_openvla import (
    PushToHub,
    mark_code,
    require_same_code,
)

require_same_code(__name__)

from .actions_openvla import ActionTokenizer  # noqa: F401  transformers up to 5.8 copies direct imports only
from .compatibility_openvla import (
    CACHE_FIELD,
    TRANSFORMERS_4,
    attention_implementation,
    cache_of,
    cached_length,
    is_checkpointing,
    language_model_class,
    make_reproducible,
    requested_attention,
    set_attention_implementation,
    tied_weight_names,
)
from .configuration_openvla import PrismaticConfig
from .decoding_openvla import align_prompts, has_gap, insert_after_bos, positions_of
from .errors_openvla import OpenVLAImportError, OpenVLATypeError, OpenVLAValueError
from .heads_openvla import HEAD_MODULES  # noqa: F401
from .quantization_openvla import forbid_repacking, prepare_quantization, require_scales
from .vision_openvla import PrismaticProjector, PrismaticVisionBackbone

logger = logging.get_logger(__name__)

IGNORE_INDEX = -100  # label of positions that do not count in the loss (torch's CrossEntropyLoss default)
SEPARATOR = "vision_backbone.sep_tok.weight"  # the tensor that only a TraceVLA has
DEFAULT_NEW_TOKENS = 20  # transformers' default length, counted in new tokens


@dataclass
class PrismaticCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Output of the language model (``logits``: float ``(batch, patches + text, vocabulary)``) and visual features."""

    projector_features: torch.Tensor | None = None  # (batch, patches, hidden); present with pixel_values


class EmbeddedInputs(NamedTuple):
    """Text and images as the language model takes them."""

    embeds: torch.Tensor  # (batch, length + patches, hidden)
    mask: torch.Tensor | None  # (batch, length + patches); None where nothing is masked
    patches: torch.Tensor  # projected patch features (batch, patches, hidden)
    bos: torch.Tensor  # int64 (batch,), the position of each BOS token


class PrismaticPreTrainedModel(PushToHub, PreTrainedModel):  # type: ignore[misc]  # push_to_hub is wrapped there
    """Base class of the models: what transformers reads from a class, loading and saving.

    Attributes:
        keep_quantized_weights: Called with every loaded model; another function where the package is installed.
        saved_folder: The module ``openvla.saved_folder``; None without the package, as ``loss_at_labels``.
    """

    saved_folder: ClassVar[Any] = None
    loss_at_labels: ClassVar[Callable[..., PrismaticCausalLMOutputWithPast] | None] = None
    keep_quantized_weights: ClassVar[Callable[[nn.Module], None]] = staticmethod(forbid_repacking)

    config_class = PrismaticConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PrismaticProjector", "VisionBlock"]
    _skip_keys_device_placement = [CACHE_FIELD]
    _supports_sdpa = True
    _supports_flash_attn = True  # transformers 4.54 and later
    _supports_flash_attn_2 = True
    _auto_class = "AutoModelForVision2Seq"

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: on several 5.x releases this runs on loaded weights too; modules initialise themselves."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *model_args: Any, **kwargs: Any
    ) -> Any:
        """Load a folder or a Hub repository, with ``PreTrainedModel``'s arguments; a checkpoint must fit the model
        exactly.

        Raises:
            ValueError: Tensors are missing, unexpected or of another shape; all are listed. Or quantisation is
                requested for a checkpoint that is already quantised.
            TypeError: ``load_in_8bit`` or ``load_in_4bit`` where transformers no longer takes them.
            ImportError: Quantisation needs bitsandbytes or torchao, which is missing or cannot be used here.
        """
        _refuse_removed_keywords(kwargs)
        if pretrained_model_name_or_path is not None and cls.saved_folder is not None:
            cls.saved_folder.warn_of_two_sets(
                os.path.join(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
            )
        prepare_quantization(pretrained_model_name_or_path, kwargs)
        _replace_missing_flash_attention(kwargs)
        output_loading_info = kwargs.pop("output_loading_info", False)
        ignore_mismatched_sizes = kwargs.pop("ignore_mismatched_sizes", False)
        loaded: Any = super().from_pretrained(  # with its loading info
            pretrained_model_name_or_path,
            *model_args,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # _require_complete lists them with everything else that does not fit
            **kwargs,
        )
        model, info = loaded
        info["missing_keys"] = sorted({*info["missing_keys"], *_left_empty(model)})
        _require_complete(info, pretrained_model_name_or_path, ignore_mismatched_sizes)
        require_scales(model)
        cls.keep_quantized_weights(model)
        return (model, info) if output_loading_info else model

    def save_pretrained(  # type: ignore[override]  # other arguments pass through
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, **kwargs: Any
    ) -> Any:
        """Save weights, configuration and code; weights of an earlier save in the other layout are removed.

        Raises:
            ValueError: The folder holds an adapter; or whole weights, and this would save an adapter of transformers.
        """
        with contextlib.ExitStack() as stack:
            if self.saved_folder is not None:
                self.saved_folder.require_own_kind(save_directory, self._hf_peft_config_loaded)
                stack.enter_context(self.saved_folder.one_set_of_weights(save_directory, kwargs.get("variant")))
            saved = super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            mark_code(save_directory)
        return saved

    @classmethod
    def _from_config(cls, config: PretrainedConfig, **kwargs: Any) -> PreTrainedModel:
        kwargs["config"] = config
        _replace_missing_flash_attention(kwargs)
        return super()._from_config(kwargs.pop("config"), **kwargs)


class PrismaticForConditionalGeneration(PrismaticPreTrainedModel, GenerationMixin):  # type: ignore[misc]  # as above
    """Vision-language model: images and text in, text out."""

    language_model: Any  # transformers has no common type for causal language models

    def __init__(self, config: PrismaticConfig) -> None:
        make_reproducible()
        super().__init__(config)
        self.vision_backbone = PrismaticVisionBackbone(config)
        self.projector = PrismaticProjector(
            config.use_fused_vision_backbone, self.vision_backbone.embed_dim, config.text_config.hidden_size
        )
        model_class: Any = language_model_class(config.text_config)
        attention = attention_implementation(config)
        if attention == "sdpa" and not model_class._supports_sdpa:  # Phi on transformers 4.40
            attention = "eager"
        set_attention_implementation(config.text_config, attention)
        self.language_model = model_class(config.text_config)
        tied = tied_weight_names(self.language_model)
        if config.text_config.tie_word_embeddings and tied:
            self._tied_weights_keys = [f"language_model.{name}" for name in tied]  # type: ignore[assignment]  # 4.x
        self.vocab_size = config.text_config.vocab_size
        self.pad_token_id = config.pad_token_id
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def get_decoder(self) -> nn.Module:
        return self.language_model.get_decoder()

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize the language model's vocabulary; new entries count as padding, so action tokens keep their ids."""
        unpadded = self.config.vocab_size
        embeddings = self.language_model.resize_token_embeddings(new_num_tokens, *args, **kwargs)
        self.config.text_config.vocab_size = embeddings.num_embeddings
        self.config.pad_to_multiple_of = embeddings.num_embeddings - unpadded
        return embeddings

    def get_image_features(self, pixel_values: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor:
        """Return projected patch features of images, ``(batch, patches of all images, hidden)``.

        Args:
            pixel_values: float ``(batch, images * (3 or 6), size, size)``.
            condition: With FiLM, the instruction's mean embedding ``(batch, hidden)``.
        """
        if not torch.is_tensor(pixel_values) or not pixel_values.is_floating_point():
            got = pixel_values.dtype if torch.is_tensor(pixel_values) else type(pixel_values).__name__
            raise OpenVLATypeError(f"pixel_values must be a floating-point tensor made by the processor, got {got}.")
        weight = self.vision_backbone.featurizer.patch_embed.proj.weight
        device, dtype = weight.device, weight.dtype
        if device.type == "meta":  # offloaded modules are moved by accelerate's hooks
            device = pixel_values.device
        return self.projector(self.vision_backbone(pixel_values.to(device=device, dtype=dtype), condition))

    def embed_inputs(
        self,
        input_ids: torch.Tensor | None,
        pixel_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> EmbeddedInputs:
        """Embed text and insert the image patches after each BOS token.

        Args:
            input_ids: int64 ``(batch, length)``.
            pixel_values: float ``(batch, 3 or 6, size, size)``.
            attention_mask: ``(batch, length)``, zero on padding; leading zeros are left padding, BOS is the first one.
            inputs_embeds: Embeddings ``(batch, length, hidden)`` instead of ``input_ids``.
        """
        text = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        if text.shape[0] != pixel_values.shape[0]:
            raise OpenVLAValueError(
                f"The batch has {text.shape[0]} prompts but {pixel_values.shape[0]} images; give one image a prompt."
            )
        patches = self.get_image_features(pixel_values).to(text.device)
        if attention_mask is None:
            bos = torch.zeros(len(text), dtype=torch.long, device=text.device)
            return EmbeddedInputs(insert_after_bos(text, patches.to(text.dtype), bos), None, patches, bos)
        bos = attention_mask.to(torch.long).argmax(dim=1)
        visible = torch.ones(patches.shape[:2], dtype=attention_mask.dtype, device=attention_mask.device)
        mask = insert_after_bos(attention_mask, visible, bos)
        return EmbeddedInputs(insert_after_bos(text, patches.to(text.dtype), bos), mask, patches, bos)

    def forward(
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
        logits_at_labels: bool = False,
        cache: Any = None,
    ) -> PrismaticCausalLMOutputWithPast | tuple:
        """Run one pass: image and text, text alone, or the continuation of a cached sequence.

        Args:
            input_ids: int64 ``(batch, length)``; with a filled cache only the new tokens.
            attention_mask: ``(batch, length)``, one or True on text. With an image it covers the text only. With a
                filled cache it covers the whole sequence, patches included.
            pixel_values: float ``(batch, 3 or 6, size, size)``; ValueError with a filled cache, since it would not be
                seen.
            labels: int64 ``(batch, length)``, -100 on positions without loss; patches never have one.
            inputs_embeds: ``(batch, length, hidden)`` instead of ``input_ids``.
            past_key_values: KV cache of an earlier pass; may be empty.
            use_cache: Return a cache.
            output_attentions: Return attention weights.
            output_hidden_states: Return all hidden states.
            output_projector_features: Return the projected patches in a tuple output too.
            return_dict: False for a tuple.
            position_ids: int64 ``(batch, length + patches)``; by default left padding is not counted.
            logits_at_labels: Compute logits, and so the loss, at labelled positions only: ``(labelled positions, padded
                vocabulary)``. The loss is the same, for a fraction of the memory; no attention weights, hidden states
                or cache.
            cache: ``past_key_values`` under its name since transformers 5.24; every version takes either.
        """
        mask = attention_mask
        if (input_ids is None) == (inputs_embeds is None):
            raise OpenVLAValueError("Give exactly one of input_ids and inputs_embeds.")
        if cache is not None and past_key_values is not None:
            raise OpenVLAValueError("cache and past_key_values are one argument under two names; give one of them.")
        cache = past_key_values if cache is None else cache
        filled = cached_length(cache) > 0
        if filled and labels is not None:
            raise OpenVLAValueError("labels cannot be used together with a filled cache; train on whole sequences.")
        if filled and pixel_values is not None:
            raise OpenVLAValueError(
                "pixel_values were given together with a filled cache, so the image would not be seen. Give the image "
                "in the first pass only, or start without a cache."
            )
        patches = None
        if pixel_values is not None:
            inputs_embeds, mask, patches, bos = self.embed_inputs(
                input_ids, pixel_values, attention_mask, inputs_embeds
            )
            input_ids = None
            if position_ids is None and mask is not None:
                position_ids = positions_of(mask)
            if labels is not None:
                ignored = labels.new_full(patches.shape[:2], IGNORE_INDEX)
                # Labels on the host, as in training, must not wait for the device.
                start = labels.new_zeros(len(labels)) if mask is None else bos.to(labels.device)
                labels = insert_after_bos(labels, ignored, start)
        returns_tuple = self._returns_tuple(return_dict)
        projector_features = patches if output_projector_features or not returns_tuple else None
        if logits_at_labels:
            if self.loss_at_labels is None:
                raise OpenVLAImportError(
                    "logits_at_labels needs the openvla package: pip install openvla, then `import openvla` and load "
                    "without trust_remote_code"
                )
            settings = {"use_cache": use_cache, "output_attentions": output_attentions, CACHE_FIELD: cache}
            settings["output_hidden_states"] = output_hidden_states
            output = self.loss_at_labels(labels, input_ids, mask, position_ids, inputs_embeds, settings)
            output.projector_features = projector_features
            return output.to_tuple() if returns_tuple else output
        outputs = self.language_model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **{CACHE_FIELD: cache},
        )
        output = PrismaticCausalLMOutputWithPast(
            loss=outputs.loss,
            logits=outputs.logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            projector_features=projector_features,
            **{CACHE_FIELD: cache_of(outputs)},
        )
        return output.to_tuple() if returns_tuple else output

    def _returns_tuple(self, return_dict: bool | None) -> bool:
        """Return whether ``forward`` returns a tuple: by its argument, or else by the configuration."""
        return (getattr(self.config, "return_dict", True) if return_dict is None else return_dict) is False

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate tokens with transformers' ``generate``, after the image was embedded once.

        Args:
            input_ids: int64 ``(batch, length)``, padded on either side.
            pixel_values: float ``(batch, 3 or 6, size, size)``; None for text alone.
            attention_mask: ``(batch, length)``; None if there is no padding.
            **kwargs: Of ``GenerationMixin.generate``. ``max_length`` counts prompt and new tokens, not patches.

        Returns:
            int64 ``(batch, length + new tokens)``, the unchanged prompt and the new tokens; with
            ``return_dict_in_generate=True`` the output of transformers, whose ``sequences`` are these.
        """
        ids, mask = self._align_prompts(input_ids, attention_mask)
        if kwargs.get("max_length") is not None:
            if kwargs.get("max_new_tokens") is not None:
                raise OpenVLAValueError("max_length and max_new_tokens say the same; give one of them.")
            kwargs["max_new_tokens"] = kwargs.pop("max_length") - ids.shape[1]
        if pixel_values is None:
            embeds = self.get_input_embeddings()(ids)
        else:
            embeds, mask, _, _ = self.embed_inputs(ids, pixel_values, mask)
        output = self._generate_from_embeds(embeds, mask, kwargs)
        new_tokens = output if torch.is_tensor(output) else output.sequences
        prompts = torch.as_tensor(input_ids).to(new_tokens.device)
        prompts = prompts.repeat_interleave(len(new_tokens) // len(prompts), dim=0)
        sequences = torch.cat([prompts, new_tokens], dim=1)
        if torch.is_tensor(output):
            return sequences
        output.sequences = sequences
        return output

    def _generate_from_embeds(self, embeds: torch.Tensor, mask: torch.Tensor | None, kwargs: dict[str, Any]) -> Any:
        """Run transformers' ``generate`` on embeddings; its result holds the new tokens only."""
        if self.training and is_checkpointing(self):  # it switches the cache off, and with it the image
            raise OpenVLAValueError("generate() needs model.eval() when gradient checkpointing is enabled.")
        if mask is None:
            mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        elif has_gap(mask):  # transformers would renumber the positions after it
            raise OpenVLAValueError("attention_mask hides a token inside a prompt; leave that token out of input_ids.")
        settings = copy.deepcopy(kwargs.pop("generation_config", None) or self.generation_config)
        other_kwargs = settings.update(**kwargs)
        if settings.max_new_tokens is None:
            settings.max_new_tokens = DEFAULT_NEW_TOKENS
        return self.language_model.generate(
            inputs_embeds=embeds, attention_mask=mask, generation_config=settings, **other_kwargs
        )

    def _align_prompts(
        self, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return checked, left-padded prompts on the device of the embeddings."""
        embeddings: Any = self.get_input_embeddings()
        device = embeddings.weight.device
        if device.type == "meta":  # offloaded modules are moved by accelerate's hooks
            device = torch.device("cpu")
        return align_prompts(input_ids, attention_mask, self.pad_token_id, device)


def _left_empty(model: nn.Module) -> list[str]:
    """Return the names of parameters that loading left empty; transformers 4.40 does not list all of them."""
    if {"cpu", "disk"} & {str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()}:
        return []  # offloaded weights are empty on purpose
    return [name for name, parameter in model.named_parameters() if parameter.is_meta]


def _require_complete(info: dict[str, Any], source: Any, ignore_mismatched_sizes: bool) -> None:
    """Raise ValueError if a checkpoint did not fill the model exactly."""
    if SEPARATOR in (info.get("unexpected_keys") or ()):
        raise OpenVLAValueError(
            f"{source} is a TraceVLA: it holds {SEPARATOR}, but its config.json does not say so. As a plain OpenVLA "
            "it would see one image and give wrong actions. Make a folder that says so: openvla convert SOURCE OUT."
        )
    problems = [("missing", info.get("missing_keys")), ("unexpected", info.get("unexpected_keys"))]
    if not ignore_mismatched_sizes:
        problems.append(("of another shape", info.get("mismatched_keys")))
    problems.append(("not loadable", info.get("error_msgs")))
    lines = [f"{len(names)} {kind}: {sorted(map(str, names))}" for kind, names in problems if names]
    if lines:
        raise OpenVLAValueError(f"The checkpoint {source} does not fit the model. Tensors " + "; ".join(lines) + ".")


def _refuse_removed_keywords(kwargs: dict[str, Any]) -> None:
    """Raise TypeError for load_in_8bit and load_in_4bit where transformers no longer takes them."""
    old = next((name for name in ("load_in_8bit", "load_in_4bit") if kwargs.get(name)), None)
    if old and not TRANSFORMERS_4:
        raise OpenVLATypeError(
            f"transformers 5 removed {old}=True; pass quantization_config=BitsAndBytesConfig({old}=True) instead."
        )


def _replace_missing_flash_attention(kwargs: dict[str, Any]) -> None:
    """Replace flash_attention_2 by sdpa, with a warning, where the package for it is not installed."""
    config = kwargs.get("config")
    requested = kwargs.get("attn_implementation") or requested_attention(config)
    if kwargs.pop("use_flash_attention_2", False):
        requested = "flash_attention_2"
    if requested != "flash_attention_2" or is_flash_attn_2_available():
        return
    logger.warning_once(
        "flash_attention_2 is not installed (package flash-attn); using sdpa, which gives the same tokens."
    )
    if isinstance(config, PretrainedConfig):
        set_attention_implementation(config, "sdpa")
    kwargs["attn_implementation"] = "sdpa"
