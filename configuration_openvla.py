"""Configuration of Prismatic vision-language models and of OpenVLA."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.utils import cached_file

from .publishing_openvla import require_same_code

require_same_code(__name__)

from .actions_openvla import NORMALIZATION_EPSILON, NORMALIZATIONS, nearest_name, validate_norm_stats
from .compatibility_openvla import DTYPE_FIELD
from .errors_openvla import OpenVLAValueError


class VisionTowerId(NamedTuple):
    """A vision tower: timm's architecture, input size in pixels, activation (None keeps timm's GELU)."""

    timm_id: str
    image_size: int
    activation: str | None = None


CLIP_224, CLIP_336 = "vit_large_patch14_clip_224.openai", "vit_large_patch14_clip_336.openai"
DINOV2 = "vit_large_patch14_reg4_dinov2.lvd142m"
SIGLIP_224, SIGLIP_384 = "vit_so400m_patch14_siglip_224", "vit_so400m_patch14_siglip_384"

# The vision backbones of the reference's registry, by their towers.
VISION_BACKBONES: dict[str, list[VisionTowerId]] = {
    "clip-vit-l": [VisionTowerId(CLIP_224, 224, "quick_gelu")],
    "clip-vit-l-336px": [VisionTowerId(CLIP_336, 336, "quick_gelu")],
    "dinov2-vit-l": [VisionTowerId(DINOV2, 224)],
    "in1k-vit-l": [VisionTowerId("vit_large_patch16_224.augreg_in21k_ft_in1k", 224)],
    "siglip-vit-so400m": [VisionTowerId(SIGLIP_224, 224)],
    "siglip-vit-so400m-384px": [VisionTowerId(SIGLIP_384, 384)],
    "dinoclip-vit-l-336px": [VisionTowerId(DINOV2, 336), VisionTowerId(CLIP_336, 336, "quick_gelu")],
    "dinosiglip-vit-so-224px": [VisionTowerId(DINOV2, 224), VisionTowerId(SIGLIP_224, 224)],
    "dinosiglip-vit-so-384px": [VisionTowerId(DINOV2, 384), VisionTowerId(SIGLIP_384, 384)],
}

# Hub id and transformers' model type of the language models in the reference's registry, and of openvla-mini's.
LLM_BACKBONES: dict[str, tuple[str, str]] = {
    "llama2-7b-pure": ("meta-llama/Llama-2-7b-hf", "llama"),
    "llama2-13b-pure": ("meta-llama/Llama-2-13b-hf", "llama"),
    "llama2-7b-chat": ("meta-llama/Llama-2-7b-chat-hf", "llama"),
    "llama2-13b-chat": ("meta-llama/Llama-2-13b-chat-hf", "llama"),
    "vicuna-v15-7b": ("lmsys/vicuna-7b-v1.5", "llama"),
    "vicuna-v15-13b": ("lmsys/vicuna-13b-v1.5", "llama"),
    "mistral-v0.1-7b-pure": ("mistralai/Mistral-7B-v0.1", "mistral"),
    "mistral-v0.1-7b-instruct": ("mistralai/Mistral-7B-Instruct-v0.1", "mistral"),
    "phi-2-3b": ("microsoft/phi-2", "phi"),
    "qwen25-0_5b-pure": ("Qwen/Qwen2.5-0.5B", "qwen2"),
    "qwen25-0_5b-extra": ("Qwen/Qwen2.5-0.5B", "qwen2"),
    "qwen25-1_5b-pure": ("Qwen/Qwen2.5-1.5B", "qwen2"),
    "qwen25-3b-pure": ("Qwen/Qwen2.5-3B", "qwen2"),
}
LLM_MODEL_TYPES = ("llama", "mistral", "phi", "qwen2")

# The prompts that models were trained on: "openvla" is OpenVLA-7B's, "openvla-v01" the Vicuna chat prompt of OpenVLA
# v0.1, "openvla-mini" MiniVLA's (Qwen has no BOS: the image follows <|im_start|>), "openvla-phi" Prismatic's for Phi-2,
# "tracevla" TraceVLA's for a frame and the frame with its trace (for a frame without a trace it is UNTRACED_PROMPT).
# The empty token (below) is appended to the ids, not written here.
PROMPTS = {
    "openvla": "In: What action should the robot take to {instruction}?\nOut:",
    "openvla-v01": (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
        "USER: What action should the robot take to {instruction}? ASSISTANT:"
    ),
    "openvla-mini": (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nWhat action should the robot take to {instruction}?<|im_end|>\n<|im_start|>assistant\n"
    ),
    "openvla-phi": "<|endoftext|>Input: What action should the robot take to {instruction}?\nOutput:",
    "tracevla": (
        "In: You are given two images: one with the original robot observation, and another one marked with historical "
        "traces of the robot end effector and moving objects, separated by a special separator token. "
        "What action should the robot take to {instruction}?\nOut:"
    ),
}
TRACE_PROMPT, UNTRACED_PROMPT = "tracevla", "openvla"
# Prompt style of registered language models, by the beginning of their ids; "openvla" for all others.
PROMPT_STYLES = {"vicuna": "openvla-v01", "qwen25": "openvla-mini", "phi-2": "openvla-phi"}

# Llama-2's "▁", which follows the prompt in every training example because "Out: " ends with a space. Without it the
# prompt is one that the model was never trained on.
LLAMA_EMPTY_TOKEN_ID = 29871

# The fields of the action decoding and head; ``enable_parallel_decoding`` sets them on a loaded model.
ACTION_CONFIG_FIELDS = (
    *("parallel_decoding", "action_head", "chunk_length", "action_dim", "proprio_dim", "use_film"),
    *("num_images_in_input", "normalization", "num_diffusion_steps_train", "num_diffusion_steps"),
)
ACTION_HEADS = (None, "l1", "diffusion")  # None predicts tokens, the others are OpenVLA-OFT's continuous heads
# Sizes of MiniVLA's VQ autoencoders: their default is LIBERO-90's; Bridge's has 256 codes.
ACTION_VQ = {"num_codes": 128, "num_rounds": 7, "latent_dim": 512, "hidden_dim": 128, "act_scale": 1.0}
IMAGE_RESIZE_STRATEGIES = ("resize-naive", "resize-crop", "letterbox")

# OpenVLA-OFT's constants by robot platform (its constants.py).
PLATFORMS: dict[str, dict[str, Any]] = {
    "libero": {"chunk_length": 8, "action_dim": 7, "proprio_dim": 8, "normalization": "q99"},
    "aloha": {"chunk_length": 25, "action_dim": 14, "proprio_dim": 14, "normalization": "bounds"},
    "bridge": {"chunk_length": 5, "action_dim": 7, "proprio_dim": 7, "normalization": "q99"},
}

AUTO = "auto"
# Keywords of from_pretrained that determine where files come from.
HUB_KEYWORDS = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")
ADAPTER_CONFIG_FILE = "adapter_config.json"
StrPath: TypeAlias = str | os.PathLike[str]


class PrismaticConfig(PretrainedConfig):
    """Configuration of a Prismatic vision-language model: one or two vision towers, a projector, a language model.

    Every field of published ``config.json`` files is read. Fields that are None follow from ``vision_backbone_id`` and
    ``llm_backbone_id``.

    Args:
        vision_backbone_id: A key of ``VISION_BACKBONES``, or any name with ``timm_model_ids`` and ``image_sizes``.
        llm_backbone_id: A key of ``LLM_BACKBONES``, or any name where ``text_config`` has a ``model_type``.
        arch_specifier: Kept as published; the projector's shape follows ``use_fused_vision_backbone``.
        use_fused_vision_backbone: Two towers whose features are concatenated. None: as the backbone has them.
        image_resize_strategy: "resize-naive", "resize-crop" or "letterbox".
        text_config: Configuration of the language model (Llama, Mistral, Phi or Qwen2), as dict or config.
        llm_max_length: Longest sequence trained on, in tokens.
        pad_token_id: Padding id; also the default of ``image_token_index``.
        pad_to_multiple_of: Number of padding ids at the end of the vocabulary, behind the action tokens.
        output_projector_states: Kept as published.
        timm_model_ids: Per tower, the timm architecture.
        timm_override_act_layers: Per tower, None or "quick_gelu".
        image_sizes: Per tower, the input size in pixels.
        timm_model_kwargs: Per tower, keywords of ``timm.create_model`` that change its size (depth, embed_dim, ...).
        hf_llm_id: Hub id of the language model.
        image_token_index: Placeholder id that other engines (vLLM) expand; this model inserts patches by itself.
        prompt_style: A key of ``PROMPTS``; "auto" follows from ``llm_backbone_id`` (``PROMPT_STYLES``).
        empty_token_id: Id appended to every prompt, or None for none; "auto" is Llama-2's 29871 for Llama models
            whose vocabulary has it, else None.
        num_images_in_input: Number of images (cameras), stacked on the channel axis of ``pixel_values``.
        image_sequence_len: MiniVLA's number of images of several moments, which sets ``num_images_in_input``: the
            oldest moment first, of each moment the main camera and then, with ``use_wrist_image``, the wrist camera.
        use_wrist_image: Whether every moment of ``image_sequence_len`` has two images.
        **kwargs: Fields of ``PretrainedConfig``.

    Raises:
        ValueError: A field is unknown, contradicts another, or has the wrong number of entries.
    """

    model_type = "prismatic"
    # The model class in a saved folder's code, for ``auto_map``.
    model_reference = "prismatic_openvla.PrismaticForConditionalGeneration"
    use_film = False
    trace_prompting = False

    def __init__(
        self,
        vision_backbone_id: str = "siglip-vit-so400m",
        llm_backbone_id: str = "vicuna-v15-7b",
        arch_specifier: str = "no-align+gelu-mlp",
        use_fused_vision_backbone: bool | None = None,
        image_resize_strategy: str = "letterbox",
        text_config: dict[str, Any] | PretrainedConfig | None = None,
        llm_max_length: int = 2048,
        pad_token_id: int = 32000,
        pad_to_multiple_of: int = 64,
        output_projector_states: bool = False,
        timm_model_ids: list[str] | None = None,
        timm_override_act_layers: list[str | None] | None = None,
        image_sizes: list[int] | None = None,
        timm_model_kwargs: list[dict[str, Any]] | None = None,
        hf_llm_id: str | None = None,
        image_token_index: int | None = None,
        prompt_style: str = AUTO,
        empty_token_id: int | str | None = AUTO,
        num_images_in_input: int = 1,
        image_sequence_len: int | None = None,
        use_wrist_image: bool = False,
        **kwargs: Any,
    ) -> None:
        towers = VISION_BACKBONES.get(vision_backbone_id, [])
        if timm_model_ids is None or image_sizes is None:
            require_known("vision_backbone_id", vision_backbone_id, VISION_BACKBONES)
        require_known("image_resize_strategy", image_resize_strategy, IMAGE_RESIZE_STRATEGIES)
        self.vision_backbone_id = vision_backbone_id
        self.llm_backbone_id = llm_backbone_id
        self.arch_specifier = arch_specifier
        self.output_projector_states = output_projector_states
        self.timm_model_ids = timm_model_ids or [tower.timm_id for tower in towers]
        self.image_sizes = image_sizes or [tower.image_size for tower in towers]
        activations = [tower.activation for tower in towers] or [None] * len(self.timm_model_ids)
        self.timm_override_act_layers = timm_override_act_layers or activations
        self.timm_model_kwargs = timm_model_kwargs or [{} for _ in self.timm_model_ids]
        fused = len(self.timm_model_ids) == 2
        self.use_fused_vision_backbone = fused if use_fused_vision_backbone is None else use_fused_vision_backbone
        count = 2 if self.use_fused_vision_backbone else 1
        for field in ("timm_model_ids", "image_sizes", "timm_override_act_layers", "timm_model_kwargs"):
            values = getattr(self, field)
            if not isinstance(values, (list, tuple)) or len(values) != count:
                raise OpenVLAValueError(
                    f"{field} needs one entry for each of the {count} vision towers "
                    f"(use_fused_vision_backbone={self.use_fused_vision_backbone}), got {values!r}."
                )
        self.image_sizes = [kw.get("img_size", size) for kw, size in zip(self.timm_model_kwargs, self.image_sizes)]
        if len(set(self.image_sizes)) > 1:
            raise OpenVLAValueError(
                f"Both vision towers see one image, so their image_sizes must agree: {self.image_sizes}."
            )
        self.image_resize_strategy = image_resize_strategy
        _require_positive_int("num_images_in_input", num_images_in_input)
        if image_sequence_len is not None or use_wrist_image:
            _require_positive_int("image_sequence_len", image_sequence_len)
            count = image_sequence_len or 1
            if num_images_in_input not in (1, count) or count % (1 + use_wrist_image):
                raise OpenVLAValueError(
                    f"image_sequence_len {image_sequence_len} does not fit num_images_in_input {num_images_in_input} "
                    f"and use_wrist_image {use_wrist_image}; it counts all images of a prompt."
                )
            num_images_in_input = count
        self.num_images_in_input = num_images_in_input
        self.image_sequence_len, self.use_wrist_image = image_sequence_len, use_wrist_image

        self.text_config = _build_text_config(text_config, llm_backbone_id)
        self.hf_llm_id = hf_llm_id or LLM_BACKBONES.get(llm_backbone_id, (None,))[0]
        self.llm_max_length = llm_max_length
        self.pad_to_multiple_of = pad_to_multiple_of
        self.image_token_index = pad_token_id if image_token_index is None else image_token_index

        if prompt_style == AUTO:
            registered = (style for prefix, style in PROMPT_STYLES.items() if llm_backbone_id.startswith(prefix))
            prompt_style = next(registered, "openvla")
        require_known("prompt_style", prompt_style, PROMPTS)
        self.prompt_style = prompt_style
        if empty_token_id == AUTO:
            has_empty_token = self.text_config.model_type == "llama" and self.vocab_size > LLAMA_EMPTY_TOKEN_ID
            empty_token_id = LLAMA_EMPTY_TOKEN_ID if has_empty_token else None
        if not (empty_token_id is None or (isinstance(empty_token_id, int) and 0 <= empty_token_id < self.vocab_size)):
            raise OpenVLAValueError(
                f"empty_token_id {empty_token_id} is outside the vocabulary of {self.vocab_size} ids."
            )
        self.empty_token_id = empty_token_id

        # A published file names its old code here, which must not be saved again.
        kwargs.pop("auto_map", None)
        # As the language model has it. transformers 4.x defaults this to True and would tie Llama's head.
        kwargs.pop("tie_word_embeddings", None)
        kwargs |= {"pad_token_id": pad_token_id, "tie_word_embeddings": bool(self.text_config.tie_word_embeddings)}
        super().__init__(**_with_one_dtype(kwargs))
        self.auto_map = {  # every key that some transformers version looks for
            "AutoConfig": f"configuration_openvla.{type(self).__name__}",
            "AutoModel": self.model_reference,
            "AutoModelForVision2Seq": self.model_reference,  # transformers 4.x
            "AutoModelForImageTextToText": self.model_reference,  # transformers 4.46 and later
        }

    @property
    def vocab_size(self) -> int:
        """Return the size of the unpadded vocabulary (32000 for Llama-2, not 32064); its last ids are action tokens."""
        return self.text_config.vocab_size - self.pad_to_multiple_of

    @property
    def history_length(self) -> int:
        """Return the number of moments that the images of a prompt are of."""
        return 1 if self.image_sequence_len is None else self.image_sequence_len // (1 + self.use_wrist_image)

    @property
    def images_per_moment(self) -> int:
        """Return the number of images (cameras) of one moment."""
        return self.num_images_in_input // self.history_length

    @property
    def film_dim(self) -> int | None:
        """Return the size of the language feature that modulates the vision towers (FiLM); None without FiLM."""
        return self.text_config.hidden_size if self.use_film else None

    def to_diff_dict(self) -> dict[str, Any]:
        """Return what is written to config.json, under the names of transformers 4.40 and of 5.x.

        The language model's fields are compared with the defaults of its class: transformers compares them with *our*
        default language model (a Llama), and would drop a field of Qwen that equals Llama's default.
        """
        text_fields = {**self.text_config.to_diff_dict(), "model_type": self.text_config.model_type}
        for name in ("transformers_version", "_pre_quantization_dtype"):  # the latter left by 4.x, no JSON
            text_fields.pop(name, None)
        output = {**super().to_diff_dict(), "text_config": _for_every_version(text_fields)}
        return _for_every_version({**output, "tie_word_embeddings": self.tie_word_embeddings})


class OpenVLAConfig(PrismaticConfig):
    """Configuration of OpenVLA: a Prismatic model that predicts robot actions.

    OpenVLA predicts one action, token by token. OpenVLA-OFT predicts a chunk of actions in one bidirectional pass
    (``parallel_decoding``), as tokens or through a continuous head; ``PLATFORMS`` holds its constants by platform:
    ``OpenVLAConfig(**PLATFORMS["libero"], parallel_decoding=True, action_head="l1", num_images_in_input=2, ...)``.

    Args:
        norm_stats: Statistics of every dataset, ``{key: {"action": {"q01": [...], "q99": [...], ...}}}``; for a model
            that takes proprio also ``"proprio"``.
        n_action_bins: Number of bin edges.
        default_unnorm_key: The dataset whose statistics ``predict_action`` uses without ``unnorm_key``.
        parallel_decoding: Predict all tokens of a chunk in one pass with bidirectional attention.
        action_head: None (tokens), "l1" or "diffusion"; the heads need ``parallel_decoding``.
        action_vq: MiniVLA: sizes of the VQ autoencoder whose codes the action tokens are (``ACTION_VQ``); each
            ``chunk_length`` actions are ``num_rounds`` tokens. None for bins.
        chunk_length: Number of actions in a chunk.
        action_dim: Length of an action; None takes the dataset's, but not with ``parallel_decoding``.
        proprio_dim: Length of the robot's state that the model takes; None for none.
        use_film: The instruction modulates every block of the vision towers (FiLM).
        normalization: The statistics that become -1 and 1: "q99" (``q01``, ``q99``) or "bounds" (``min``, ``max``).
        num_diffusion_steps_train: Number of noise levels that the diffusion head was trained on.
        num_diffusion_steps: Number of denoising steps of one prediction, at most ``num_diffusion_steps_train``.
        trace_prompting: TraceVLA: two images with a learned separator between them, and two prompts. Written to
            config.json only where True.
        **kwargs: Fields of ``PrismaticConfig``.

    Raises:
        ValueError: Statistics would un-normalise wrongly (the message names dataset and field), or two fields
            contradict each other.
    """

    model_type = "openvla"
    model_reference = "modeling_openvla.OpenVLAForActionPrediction"

    def __init__(
        self,
        norm_stats: dict[str, dict[str, Any]] | None = None,
        n_action_bins: int = 256,
        default_unnorm_key: str | None = None,
        parallel_decoding: bool = False,
        action_head: str | None = None,
        action_vq: dict[str, Any] | None = None,
        chunk_length: int = 1,
        action_dim: int | None = None,
        proprio_dim: int | None = None,
        use_film: bool = False,
        normalization: str = "q99",
        num_diffusion_steps_train: int = 50,
        num_diffusion_steps: int = 50,
        trace_prompting: bool = False,
        **kwargs: Any,
    ) -> None:
        if trace_prompting:
            self.trace_prompting = True
            kwargs = {"num_images_in_input": 2, "prompt_style": TRACE_PROMPT, **kwargs}
        super().__init__(**kwargs)
        self.parallel_decoding = parallel_decoding
        self.action_head = action_head
        self.action_vq = None if action_vq is None else {**ACTION_VQ, **action_vq}
        self.chunk_length = chunk_length
        self.action_dim = action_dim
        self.proprio_dim = proprio_dim
        self.use_film = use_film
        self.normalization = normalization
        self.num_diffusion_steps_train = num_diffusion_steps_train
        self.num_diffusion_steps = num_diffusion_steps
        self.validate_action_config()
        if norm_stats is not None:
            validate_norm_stats(norm_stats, normalization)
        if default_unnorm_key is not None:
            require_known("default_unnorm_key", default_unnorm_key, norm_stats or {})
        if not 2 <= n_action_bins <= self.vocab_size:
            raise OpenVLAValueError(f"n_action_bins must be between 2 and {self.vocab_size}, got {n_action_bins}.")
        self.norm_stats = norm_stats
        self.n_action_bins = n_action_bins
        self.default_unnorm_key = default_unnorm_key

    def validate_action_config(self) -> None:
        """Raise ValueError where a field of ``action_config`` is not allowed, or contradicts another."""
        require_known("action_head", self.action_head, ACTION_HEADS)
        require_known("normalization", self.normalization, NORMALIZATIONS)
        for name in ("chunk_length", "num_images_in_input", "num_diffusion_steps_train", "num_diffusion_steps"):
            _require_positive_int(name, getattr(self, name))
        for name in ("action_dim", "proprio_dim"):
            if getattr(self, name) is not None:
                _require_positive_int(name, getattr(self, name))
        if self.parallel_decoding and self.action_dim is None:
            raise OpenVLAValueError(f"parallel_decoding needs action_dim; those of known platforms: {PLATFORMS}.")
        self._validate_action_vq()
        is_set = {"action_head": self.action_head is not None}
        is_set |= {"chunk_length": self.chunk_length > 1 and self.action_vq is None}
        is_set |= {"proprio_dim": self.proprio_dim is not None, "use_film": bool(self.use_film)}
        names = [name for name, value in is_set.items() if value]
        if names and not self.parallel_decoding:
            raise OpenVLAValueError(
                f"{', '.join(names)} need parallel_decoding=True; OpenVLA itself predicts one action in tokens."
            )
        is_plain = self.parallel_decoding or self.num_images_in_input != 2 or not self.use_fused_vision_backbone
        if self.trace_prompting and is_plain:
            raise OpenVLAValueError(
                "trace_prompting (TraceVLA) needs two vision towers, num_images_in_input=2 (the frame, and with its "
                f"trace) and no parallel_decoding; got use_fused_vision_backbone={self.use_fused_vision_backbone}, "
                f"num_images_in_input={self.num_images_in_input}, parallel_decoding={self.parallel_decoding}."
            )
        if self.prompt_style == TRACE_PROMPT and not self.trace_prompting:
            raise OpenVLAValueError(f"prompt_style {TRACE_PROMPT!r} is TraceVLA's, which needs trace_prompting=True.")
        if self.num_diffusion_steps > self.num_diffusion_steps_train:
            raise OpenVLAValueError(
                f"num_diffusion_steps {self.num_diffusion_steps} is more than the {self.num_diffusion_steps_train} "
                "noise levels that the head was trained on (num_diffusion_steps_train)."
            )

    def _validate_action_vq(self) -> None:
        """Raise ValueError for sizes of a VQ autoencoder that this model cannot have."""
        if self.action_vq is None:
            return
        if self.parallel_decoding or self.action_dim is None or set(self.action_vq) != set(ACTION_VQ):
            raise OpenVLAValueError(
                f"action_vq takes the fields {list(ACTION_VQ)}, and needs action_dim and no parallel_decoding; got "
                f"{self.action_vq}, action_dim={self.action_dim}, parallel_decoding={self.parallel_decoding}."
            )
        for name in ("num_codes", "num_rounds", "latent_dim", "hidden_dim"):
            _require_positive_int(f"action_vq.{name}", self.action_vq[name])
        if self.action_vq["num_codes"] > self.vocab_size:
            raise OpenVLAValueError(f"A vocabulary of {self.vocab_size} ids cannot hold {self.action_vq}.")

    @property
    def normalization_epsilon(self) -> float:
        """Return what un-normalisation adds to a dimension's range: 1e-8 in OFT, 0 in OpenVLA."""
        return NORMALIZATION_EPSILON if self.parallel_decoding else 0.0

    def merge_statistics(self, statistics: dict[str, dict[str, Any]]) -> None:
        """Merge the content of a dataset_statistics.json, which takes precedence; an only key becomes the default."""
        validate_norm_stats(statistics, self.normalization)
        self.norm_stats = {**(self.norm_stats or {}), **statistics}
        if len(statistics) == 1:
            self.default_unnorm_key = next(iter(statistics))

    @property
    def action_config(self) -> dict[str, Any]:
        """Return the fields of the action decoding and head (``ACTION_CONFIG_FIELDS``)."""
        return {name: getattr(self, name) for name in ACTION_CONFIG_FIELDS}


def _build_text_config(text_config: dict[str, Any] | PretrainedConfig | None, llm_backbone_id: str) -> PretrainedConfig:
    """Return the language model's configuration; without a model type it is the backbone's."""
    fields = text_config.to_dict() if isinstance(text_config, PretrainedConfig) else dict(text_config or {})
    _, registered_type = LLM_BACKBONES.get(llm_backbone_id, (None, None))
    model_type: str = fields.pop("model_type", None) or registered_type or ""
    if not model_type:
        require_known("llm_backbone_id", llm_backbone_id, LLM_BACKBONES)
    require_known("text_config.model_type", model_type, LLM_MODEL_TYPES)
    if registered_type not in (None, model_type):
        raise OpenVLAValueError(
            f"llm_backbone_id {llm_backbone_id!r} is a {registered_type} model but text_config.model_type is "
            f"{model_type!r}; change one of them (any other name is allowed as llm_backbone_id)."
        )
    config = CONFIG_MAPPING[model_type](**_with_one_dtype(fields))
    if not hasattr(config, "pad_token_id"):  # Phi on transformers 5.0.0, whose model reads it
        config.pad_token_id = None
    return config


def _with_one_dtype(fields: dict[str, Any]) -> dict[str, Any]:
    """Return fields with dtype or torch_dtype under the name of this transformers version."""
    dtypes = [fields.pop(name, None) for name in ("dtype", "torch_dtype")]
    return {**fields, DTYPE_FIELD: dtypes[0] if dtypes[0] is not None else dtypes[1]}


def _for_every_version(fields: dict[str, Any]) -> dict[str, Any]:
    """Add dtype and rotary fields under the names of transformers 4 and of 5, which renamed them.

    Without this a Qwen model saved on 5.x (``rope_parameters``) would run on 4.x with Llama's rotary base.
    """
    if fields.get(DTYPE_FIELD) is not None:
        fields["dtype"] = fields["torch_dtype"] = fields[DTYPE_FIELD]
    rope = fields.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        fields.update({name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope})
        if rope.get("rope_type", "default") != "default":
            fields.setdefault("rope_scaling", {k: v for k, v in rope.items() if k != "rope_theta"})
    return fields


def _require_positive_int(field: str, value: Any) -> None:
    """Raise ValueError for anything but a whole number of 1 or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OpenVLAValueError(f"{field} must be a whole number, 1 or more, got {value!r}.")


def require_known(field: str, value: Any, known: Collection[Any]) -> None:
    """Raise ValueError for a value that is not among the known ones."""
    if value not in known:
        nearest = nearest_name(str(value), [str(name) for name in known])
        hint = f" Did you mean {nearest!r}?" if nearest else ""
        raise OpenVLAValueError(f"Unknown {field} {value!r}.{hint} Allowed: {list(known)}.")


def hub_keywords(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return those keywords of ``from_pretrained`` that determine where files come from."""
    return {key: kwargs[key] for key in HUB_KEYWORDS if kwargs.get(key) is not None}


def optional_file(name_or_path: StrPath, name: str, hub_kwargs: dict[str, Any] | None = None) -> str | None:
    """Return the path of a file of a folder or Hub repository; None where it does not exist."""
    path: str | None = cached_file(
        name_or_path,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **(hub_kwargs or {}),
    )
    return path


def find_adapter(name_or_path: StrPath | None, kwargs: dict[str, Any]) -> tuple[StrPath | None, dict[str, Any]]:
    """Return the adapter that ``from_pretrained`` is to load, or None, and the call's keywords of the Hub."""
    hub_kwargs = hub_keywords(kwargs)
    adapter_kwargs = kwargs.pop("adapter_kwargs", None) or {}
    adapter = adapter_kwargs.get("_adapter_model_path")
    if adapter is not None:  # set by an Auto class, which may have replaced the adapter's revision by the base's
        hub_kwargs.pop("revision", None)
        return adapter, {**hub_kwargs, **hub_keywords(adapter_kwargs)}
    is_adapter = name_or_path is not None and optional_file(name_or_path, ADAPTER_CONFIG_FILE, hub_kwargs) is not None
    return (name_or_path if is_adapter else None), hub_kwargs


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically: to a temporary name, which is then renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)
