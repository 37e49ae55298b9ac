"""From a camera image and an instruction to the tensors that the model was trained on."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.processing_utils import ProcessorMixin
from transformers.utils import logging

from .saved_folder_openvla import MarksCode, require_one_code

require_one_code(__name__)

from .actions_openvla import nearest_name  # noqa: F401  transformers up to 5.8 copies direct imports only
from .compatibility_openvla import TRANSFORMERS_4
from .configuration_openvla import (
    IMAGE_RESIZE_STRATEGIES,
    PROMPTS,
    OpenVLAConfig,
    PrismaticConfig,
    hub_keywords,
    write_json,
)
from .device_images_openvla import pixels_on
from .errors_openvla import OpenVLAValueError
from .images_openvla import (
    IMAGE_PRESETS,
    ImageInput,
    as_images,
    normalized_pixels,
    preset_image,
    require_used,
)
from .jpeg_openvla import jpeg_round_trip  # noqa: F401  as nearest_name
from .prompts_openvla import (
    as_list,
    bare_instruction,
    require_bos,
    tokenized_prompts,
    tokenized_text,
    whole_prompts,
)
from .publishing_openvla import PushToHub

logger = logging.get_logger(__name__)

# The integers are PIL's (and torchvision's) resampling codes, as saved in preprocessor_config.json.
RESAMPLING = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}

# Channel means and standard deviations that timm's towers were trained with, by what stands in their ids; others took
# (0.5, 0.5, 0.5) for both.
HALF = (0.5, 0.5, 0.5)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
PIXEL_STATISTICS = {"dinov2": IMAGENET, ".openai": OPENAI_CLIP}


class OpenVLAImageProcessor(MarksCode, BaseImageProcessor):
    """Resizes and normalises images, bit for bit like the reference's torchvision pipeline on PIL images.

    With two towers both see the same resized image, each normalised its own way, stacked on the channel axis.

    Args:
        use_fused_vision_backbone: Kept as published.
        image_resize_strategy: "resize-naive" (to the square, changing the aspect), "letterbox" (pad to the square
            first) or "resize-crop" (shorter side, then centre crop).
        input_sizes: Per tower ``(3, height, width)`` in pixels.
        interpolations: Per tower "bicubic", "bilinear", ...
        means: Per tower three numbers, subtracted from [0, 1] channels.
        stds: Per tower three numbers, divided by.
        tvf_resize_params: As published; whatever a file says wins over the above, and so for the other ``tvf_``
            fields. (Published means and standard deviations are rounded to bfloat16; the models were evaluated so.)
        tvf_crop_params: As published.
        tvf_normalize_params: As published.
        tvf_do_letterbox: As published.
        tvf_letterbox_fill: As published: the grey of the padding, 0 to 255 a channel.
        **kwargs: Fields of transformers' image processors.

    Raises:
        ValueError: Unknown strategy or interpolation.
    """

    model_input_names = ["pixel_values"]
    _auto_class = "AutoImageProcessor"

    def __init__(
        self,
        use_fused_vision_backbone: bool = False,
        image_resize_strategy: str = "letterbox",
        input_sizes: list[tuple[int, int, int]] | None = None,
        interpolations: list[str] | None = None,
        means: list[tuple[float, float, float]] | None = None,
        stds: list[tuple[float, float, float]] | None = None,
        tvf_resize_params: list[dict[str, Any]] | None = None,
        tvf_crop_params: list[dict[str, Any]] | None = None,
        tvf_normalize_params: list[dict[str, Any]] | None = None,
        tvf_do_letterbox: bool | None = None,
        tvf_letterbox_fill: list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if image_resize_strategy not in IMAGE_RESIZE_STRATEGIES:
            raise OpenVLAValueError(
                f"Image resize strategy {image_resize_strategy!r} is not supported. Allowed: {IMAGE_RESIZE_STRATEGIES}."
            )
        self.use_fused_vision_backbone = use_fused_vision_backbone
        self.image_resize_strategy = image_resize_strategy
        self.input_sizes = [(3, 224, 224)] if input_sizes is None else input_sizes
        self.interpolations = ["bicubic"] * len(self.input_sizes) if interpolations is None else interpolations
        self.means = [(0.5, 0.5, 0.5)] * len(self.input_sizes) if means is None else means
        self.stds = [(0.5, 0.5, 0.5)] * len(self.input_sizes) if stds is None else stds
        unknown = set(self.interpolations) - set(RESAMPLING)
        if unknown:
            raise OpenVLAValueError(f"Unknown interpolations {sorted(unknown)}. Allowed: {list(RESAMPLING)}.")
        counts = {field: len(getattr(self, field)) for field in ("input_sizes", "interpolations", "means", "stds")}
        if len(set(counts.values())) > 1:
            raise OpenVLAValueError(f"Every field needs one entry a tower, got {counts}.")

        naive = image_resize_strategy == "resize-naive"
        self.tvf_resize_params = tvf_resize_params or [
            {
                "antialias": True,
                "interpolation": RESAMPLING[interpolation],
                "max_size": None,
                "size": [width, width] if naive else width,
            }
            for (_, _, width), interpolation in zip(self.input_sizes, self.interpolations)
        ]
        self.tvf_crop_params = tvf_crop_params or [{"output_size": list(size[-2:])} for size in self.input_sizes]
        self.tvf_normalize_params = tvf_normalize_params or [
            {"inplace": False, "mean": _as_float32(mean), "std": _as_float32(std)}
            for mean, std in zip(self.means, self.stds)
        ]
        letterbox = image_resize_strategy == "letterbox"
        self.tvf_do_letterbox = letterbox if tvf_do_letterbox is None else tvf_do_letterbox
        # One fill for both towers, the last one's: as the published models were evaluated.
        self.tvf_letterbox_fill = tvf_letterbox_fill or ([int(x * 255) for x in self.means[-1]] if letterbox else None)

    @classmethod
    def for_config(cls, config: PrismaticConfig) -> OpenVLAImageProcessor:
        """The image processor that a model's towers were trained with."""
        statistics = [
            next((known for part, known in PIXEL_STATISTICS.items() if part in timm_id), (HALF, HALF))
            for timm_id in config.timm_model_ids
        ]
        return cls(
            use_fused_vision_backbone=config.use_fused_vision_backbone,
            image_resize_strategy=config.image_resize_strategy,
            input_sizes=[(3, size, size) for size in config.image_sizes],
            interpolations=["bicubic"] * len(config.image_sizes),
            means=[mean for mean, _ in statistics],
            stds=[std for _, std in statistics],
        )

    def preprocess(
        self,
        images: ImageInput | Sequence[ImageInput],
        return_tensors: str | None = None,
        device: torch.device | str | None = None,
    ) -> BatchFeature:
        """Normalised images.

        Args:
            images: One or several images: PIL; numpy ``(H, W, 3)``, uint8 or float in [0, 1]; torch ``(3, H, W)`` or
                ``(H, W, 3)``, uint8 or float in [0, 1]; a path. Grey, palette and alpha are converted to RGB. A 4-D
                array is a batch.
            return_tensors: "pt" for torch, "np" or None for numpy.
            device: Make them there, the same bits, and as torch: on a GPU that is much faster.

        Returns:
            ``pixel_values``, float32 ``(batch, 3 * towers, height, width)``.

        Raises:
            ValueError: Wrong channels, size, dtype or range; no image.
            TypeError: Not an image at all.
            FileNotFoundError: No file at a path.
        """
        towers = list(zip(self.tvf_resize_params, self.tvf_crop_params, self.tvf_normalize_params))
        fill = self.tvf_letterbox_fill if self.tvf_do_letterbox else None
        if device is not None:
            pixel_values = pixels_on(images, torch.device(device), towers, fill, return_tensors)
            if pixel_values is not None:
                return BatchFeature(data={"pixel_values": pixel_values})
        rows = [normalized_pixels(image, towers, fill) for image in as_images(images)]
        pixel_values = rows[0][None] if len(rows) == 1 else np.stack(rows)
        if device is not None or return_tensors == "pt":  # BatchFeature would copy an array
            pixel_values = torch.from_numpy(pixel_values).to(device or "cpu")
        return BatchFeature(data={"pixel_values": pixel_values}, tensor_type=return_tensors)

    def __call__(self, images: ImageInput | Sequence[ImageInput], **kwargs: Any) -> BatchFeature:
        return self.preprocess(images, **kwargs)


class PrismaticImageProcessor(OpenVLAImageProcessor):
    """The name that published ``preprocessor_config.json`` files carry."""


class OpenVLAProcessor(MarksCode, PushToHub, ProcessorMixin):
    """Image processor and tokenizer together; knows how the checkpoint wants an instruction to be asked.

    Args:
        image_processor: Makes ``pixel_values``.
        tokenizer: The language model's.
        prompt_style: A key of ``PROMPTS``; None when unknown. ``from_pretrained`` reads it from the checkpoint.
        empty_token_id: Id appended to every prompt built from an instruction; None for none.
        num_images_in_input: Images of one moment (cameras) that the model takes with a prompt.
        image_preset: A key of ``IMAGE_PRESETS``, done to every image before the image processor. None is
            nothing too, but of a checkpoint that does not say so: LIBERO's evaluation then takes its own.

    Raises:
        ValueError: Unknown prompt style or image preset.
    """

    if TRANSFORMERS_4:
        attributes = ["image_processor", "tokenizer"]
        # 4.41 to 4.49 drop other fields of the JSON.
        valid_kwargs = ["prompt_style", "empty_token_id", "num_images_in_input", "image_preset"]
        image_processor_class = "AutoImageProcessor"
        tokenizer_class = "AutoTokenizer"
    _auto_class = "AutoProcessor"

    def __init__(
        self,
        image_processor: BaseImageProcessor | None = None,
        tokenizer: Any = None,
        prompt_style: str | None = None,
        empty_token_id: int | None = None,
        num_images_in_input: int = 1,
        image_preset: str | None = None,
    ) -> None:
        if prompt_style is not None and prompt_style not in PROMPTS:
            raise OpenVLAValueError(f"Unknown prompt_style {prompt_style!r}. Allowed: {list(PROMPTS)}.")
        _require_image_preset(image_preset)
        super().__init__(image_processor, tokenizer)
        self.prompt_style = prompt_style
        self.empty_token_id = empty_token_id
        self.num_images_in_input = num_images_in_input
        self.image_preset = image_preset

    @classmethod
    def for_config(
        cls, config: PrismaticConfig, tokenizer: Any, image_processor: OpenVLAImageProcessor | None = None
    ) -> OpenVLAProcessor:
        """The processor of a model with this configuration; an image processor of its own may be given."""
        image_processor = image_processor or OpenVLAImageProcessor.for_config(config)
        asked = (config.prompt_style, config.empty_token_id, config.num_images_in_input)
        return cls(image_processor, tokenizer, *asked)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> OpenVLAProcessor:
        """Load from a folder or a Hub repository, published ones included.

        Published processors do not say how the model wants to be asked; that is read from ``config.json`` beside them.
        """
        hub = hub_keywords(kwargs)
        processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if processor.prompt_style is None:
            processor._read_config(pretrained_model_name_or_path, hub)
        return processor

    @classmethod
    def _get_arguments_from_pretrained(cls, name_or_path: str | os.PathLike, *_: Any, **kwargs: Any) -> list[Any]:
        """The parts, as transformers loads them, but not by way of AutoImageProcessor.

        transformers 5.4 to 5.2x put a placeholder in its place where torchvision is not installed.
        """
        hub = hub_keywords(kwargs)
        image_processor = OpenVLAImageProcessor.from_pretrained(name_or_path, **hub)
        return [image_processor, AutoTokenizer.from_pretrained(name_or_path, **kwargs)]

    def _read_config(self, name_or_path: str | os.PathLike, hub: dict[str, Any]) -> None:
        try:
            fields, _ = OpenVLAConfig.get_config_dict(name_or_path, **hub)
        except OSError:  # a processor without a model beside it
            return
        if fields.get("model_type") in ("openvla", "prismatic"):
            config = OpenVLAConfig.from_dict({k: v for k, v in fields.items() if k != "norm_stats"})
            self.prompt_style, self.empty_token_id = config.prompt_style, config.empty_token_id
            self.num_images_in_input = config.num_images_in_input

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        images: ImageInput | Sequence[ImageInput] | None = None,
        instruction: str | Sequence[str] | None = None,
        padding: bool | str | None = None,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        return_tensors: str | None = "pt",
        device: torch.device | str | None = None,
    ) -> BatchFeature:
        """Model inputs for one or several (prompt, image) pairs.

        Args:
            text: Whole prompts, as they are; the form of the published processor. ``predict_action`` adds the empty
                token. An instruction alone, or a prompt of another style, is warned of.
            images: One image a prompt, in any form that the image processor takes. For a model of several cameras
                the list of one prompt's images (``[main, wrist]``), or for several prompts a list of such lists.
            instruction: What the robot should do ("pick up the red block"). The prompt is written around it in lower
                case, as trained, and ends in the empty token. Special tokens in it (``</s>``) are text.
            padding: As tokenizers take it. None: pad instructions of different lengths, leave ``text`` alone.
            truncation: As tokenizers take it, for ``text`` only: an instruction is never cut.
            max_length: In tokens.
            return_tensors: "pt", "np" or None for lists.
            device: Where ``pixel_values`` are made, the same bits: the model's GPU saves most of the time they take.

        Returns:
            ``input_ids`` and ``attention_mask`` int64 ``(batch, length)``, and ``pixel_values`` float32
            ``(batch, cameras * 3 * towers, height, width)`` when there are images. Nothing else.

        Raises:
            ValueError: Neither or both of text and instruction; an instruction that is empty or a whole prompt; as many
                prompts as images are not given, or other than the model's number of cameras; no BOS in front; the
                checkpoint's prompt style is unknown.
        """
        require_used(instruction, images, padding, truncation, max_length, device)
        if (text is None) == (instruction is None):
            raise OpenVLAValueError(
                "Give exactly one of text (the whole prompt) and instruction (what the robot should do)."
            )
        if instruction is not None:
            if images is None:
                raise OpenVLAValueError("An instruction needs an image: processor(instruction=..., images=...).")
            inputs = self._tokenized_instructions(instruction, padding, max_length, return_tensors)
        else:
            inputs = tokenized_text(
                self.tokenizer, whole_prompts(text, self.prompt_style), padding, truncation, max_length, return_tensors
            )
            inputs = BatchFeature(data=inputs, tensor_type=return_tensors)
        data = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        require_bos(self.tokenizer, self.prompt_style, data["input_ids"], data["attention_mask"])
        if images is not None:
            rows = 1 if isinstance(text if instruction is None else instruction, str) else len(data["input_ids"])
            cameras = self.num_images_in_input if instruction is not None else None
            data["pixel_values"] = self._pixel_values(images, rows, cameras, return_tensors, device)
        return BatchFeature(data=data)

    def _pixel_values(
        self, images: Any, rows: int, cameras: int | None, return_tensors: str | None, device: Any
    ) -> Any:
        """Images of all rows, those of one row stacked on the channel axis.

        Published scripts prepare one camera at a time and stack by themselves: that is what cameras=None allows.
        """
        nested = isinstance(images, (list, tuple)) and isinstance(next(iter(images), None), (list, tuple))
        if cameras is None:
            cameras = self.num_images_in_input if nested or rows == 1 and isinstance(images, (list, tuple)) else 1
        if cameras > 1 and (rows > 1 or nested):
            counts = [len(row) if isinstance(row, (list, tuple)) else 1 for row in images]
            if counts != [cameras] * rows:
                raise OpenVLAValueError(
                    f"The model takes {cameras} images a prompt: give {rows} lists of {cameras} images, got {counts}."
                )
            images = [image for row in images for image in row]
        if self.image_preset is not None:
            _require_image_preset(self.image_preset)
            size = self.image_processor.tvf_crop_params[0]["output_size"]
            images = [preset_image(image, self.image_preset, size) for image in as_images(images)]
        pixel_values = self.image_processor(images, return_tensors=return_tensors, device=device)["pixel_values"]
        if len(pixel_values) != rows * cameras:
            each = "one" if cameras == 1 else f"{cameras} (as a list, in the order of training)"
            raise OpenVLAValueError(
                f"Batch is malformed: {rows} prompts but {len(pixel_values)} images; give each prompt {each}."
            )
        _, channels, height, width = np.shape(pixel_values)
        return pixel_values.reshape(rows, cameras * channels, height, width)

    def prompt(self, instruction: str) -> str:
        """The whole prompt for an instruction, in this checkpoint's style, without the empty token.

        Raises:
            ValueError: The instruction is empty, no text or a whole prompt, or the style is not known.
        """
        instruction = bare_instruction(instruction)
        self._require_prompt_style()
        return PROMPTS[self.prompt_style].format(instruction=instruction)

    def _require_prompt_style(self) -> None:
        if self.prompt_style is None:
            raise OpenVLAValueError(
                "This processor does not know its checkpoint's prompt; set processor.prompt_style to one of "
                f"{list(PROMPTS)} and processor.empty_token_id, or pass the whole prompt as text."
            )

    def _tokenized_instructions(
        self,
        instruction: str | Sequence[str],
        padding: bool | str | None,
        max_length: int | None,
        return_tensors: str | None,
    ) -> dict[str, Any]:
        """Ids and mask of prompts, the empty token at the end of every row before any padding."""
        instructions = as_list(instruction)
        if not instructions:
            raise OpenVLAValueError("Got an empty list of instructions.")
        instructions = [bare_instruction(one) for one in instructions]
        self._require_prompt_style()
        rows = tokenized_prompts(self.tokenizer, self.prompt_style, instructions)
        if self.empty_token_id is not None:
            rows = [row if row[-1] == self.empty_token_id else [*row, self.empty_token_id] for row in rows]
        longest = max(map(len, rows))
        limit, name = min(
            (self.tokenizer.model_max_length, "the tokenizer's model_max_length"),
            (math.inf if max_length is None else max_length, "max_length"),
        )
        if longest > limit:
            raise OpenVLAValueError(
                f"A prompt has {longest} tokens, more than {name}={limit}; shorten the instruction."
            )
        length = max_length if padding == "max_length" and max_length is not None else longest
        if any(len(row) != length for row in rows):
            if padding is False or padding == "do_not_pad":
                raise OpenVLAValueError("The instructions have different lengths; they need padding=True.")
            if self.tokenizer.pad_token_id is None:
                raise OpenVLAValueError("The tokenizer has no padding token; set tokenizer.pad_token for a batch.")
        left = self.tokenizer.padding_side == "left"
        input_ids, attention_mask = [], []
        for row in rows:
            pads = [self.tokenizer.pad_token_id] * (length - len(row))
            seen, unseen = [1] * len(row), [0] * len(pads)
            input_ids.append(pads + row if left else row + pads)
            attention_mask.append(unseen + seen if left else seen + unseen)
        data = {"input_ids": input_ids, "attention_mask": attention_mask}
        return dict(BatchFeature(data=data, tensor_type=return_tensors))

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Save in the layout that every transformers version from 4.40 reads: two JSON files and the tokenizer's."""
        super().save_pretrained(save_directory, **kwargs if not push_to_hub else {})
        folder = Path(save_directory)
        auto_map = {
            "AutoProcessor": f"processing_openvla.{type(self).__name__}",
            "AutoImageProcessor": f"processing_openvla.{type(self.image_processor).__name__}",
        }
        shared = {"processor_class": type(self).__name__, "auto_map": auto_map}
        image_fields = {**json.loads(self.image_processor.to_json_string()), **shared}
        own_fields = {
            **shared,
            "prompt_style": self.prompt_style,
            "empty_token_id": self.empty_token_id,
            "num_images_in_input": self.num_images_in_input,
            "image_preset": self.image_preset,
        }
        write_json(folder / "preprocessor_config.json", image_fields)
        write_json(folder / "processor_config.json", own_fields)
        _make_tokenizer_readable(folder)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)
        return [str(folder / name) for name in ("preprocessor_config.json", "processor_config.json")]

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """The tokenizer's ``batch_decode``."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> str:
        """The tokenizer's ``decode``."""
        return self.tokenizer.decode(*args, **kwargs)

    model_input_names = ["input_ids", "attention_mask", "pixel_values"]


class PrismaticProcessor(OpenVLAProcessor):
    """The name that published processor files carry."""


def _require_image_preset(image_preset: str | None) -> None:
    if image_preset is not None and image_preset not in IMAGE_PRESETS:
        raise OpenVLAValueError(
            f"Unknown image_preset {image_preset!r}. Allowed: None, or one of {list(IMAGE_PRESETS)}."
        )


def _as_float32(values: Sequence[float]) -> list[float]:
    return np.array(values, dtype=np.float32).tolist()


def _make_tokenizer_readable(folder: Path) -> None:
    """Undo, in the tokenizer's files, what transformers 5 and tokenizers 0.20 write and 4.40 cannot read."""
    config_file, tokenizer_file = folder / "tokenizer_config.json", folder / "tokenizer.json"
    if config_file.is_file():
        config = json.loads(config_file.read_text(encoding="utf-8"))
        if config.get("tokenizer_class") == "TokenizersBackend":
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
            write_json(config_file, config)
    if tokenizer_file.is_file():
        tokenizer = json.loads(tokenizer_file.read_text(encoding="utf-8"))
        merges = tokenizer["model"].get("merges") or []
        if merges and not isinstance(merges[0], str) and not any(" " in part for pair in merges for part in pair):
            tokenizer["model"]["merges"] = [" ".join(pair) for pair in merges]
            write_json(tokenizer_file, tokenizer)
