"""Convert camera images and an instruction to the tensors that the model was trained on."""

from __future__ import annotations

import json
import math
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import AutoTokenizer
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.processing_utils import ProcessorMixin

from .publishing_openvla import PushToHub, mark_code, require_same_code

require_same_code(__name__)

from .actions_openvla import nearest_name  # noqa: F401  transformers up to 5.8 copies direct imports only
from .compatibility_openvla import TRANSFORMERS_4
from .configuration_openvla import (
    IMAGE_RESIZE_STRATEGIES,
    PROMPTS,
    TRACE_PROMPT,
    UNTRACED_PROMPT,
    OpenVLAConfig,
    hub_keywords,
    write_json,
)
from .errors_openvla import OpenVLAImportError, OpenVLAValueError
from .images_openvla import (
    SHIPPED_IMAGE_PRESETS,
    ImageInput,
    ImagePreset,
    TowerTransform,
    as_images,
    normalized_pixels,
)

# The integers are PIL's (and torchvision's) resampling codes, as saved in preprocessor_config.json.
RESAMPLING = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}
PROCESSOR_FIELDS = ["prompt_style", "empty_token_id", "num_images_in_input", "image_preset"]  # processor_config.json
PLACEHOLDER = "{instruction}"  # in PROMPTS
# Error of code beside a checkpoint for what only the installed package can do.
NEEDS_PACKAGE = "needs the package: pip install openvla, then `import openvla` and load without trust_remote_code"


class OpenVLAImageProcessor(BaseImageProcessor):
    """Image processor that resizes and normalises bit for bit as the reference's torchvision pipeline on PIL images.

    Two towers see the same resized image, each with its own normalisation, stacked on the channel axis. Fields have one
    entry a tower; other numbers of entries, and unknown values, raise ValueError.

    Args:
        use_fused_vision_backbone: Kept as published.
        image_resize_strategy: "resize-naive" (to the square, changing the aspect), "letterbox" (pad to the square
            first) or "resize-crop" (shorter side, then centre crop).
        input_sizes: Per tower ``(3, height, width)`` in pixels.
        interpolations: Per tower "bicubic", "bilinear", ...
        means: Per tower three numbers, subtracted from [0, 1] channels.
        stds: Per tower three numbers, divided by.
        tvf_resize_params: As published, as the other ``tvf_`` fields: values of a file take precedence over the above.
            (Published means and standard deviations are rounded to bfloat16; the models were evaluated so.)
        **kwargs: Fields of transformers' image processors.
    """

    model_input_names = ["pixel_values"]
    # openvla.inference.device_images.pixels_on_device; None without the package.
    device_pixels: ClassVar[Callable[..., torch.Tensor] | None] = None
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
        if unknown := set(self.interpolations) - set(RESAMPLING):
            raise OpenVLAValueError(f"Unknown interpolations {sorted(unknown)}. Allowed: {list(RESAMPLING)}.")
        counts = {field: len(getattr(self, field)) for field in ("input_sizes", "interpolations", "means", "stds")}
        if len(set(counts.values())) > 1:
            raise OpenVLAValueError(f"Every field needs one entry a tower, got {counts}.")

        naive = image_resize_strategy == "resize-naive"
        sizes = ([width, width] if naive else width for _, _, width in self.input_sizes)
        self.tvf_resize_params = tvf_resize_params or [
            {"antialias": True, "interpolation": RESAMPLING[interpolation], "max_size": None, "size": size}
            for size, interpolation in zip(sizes, self.interpolations)
        ]
        self.tvf_crop_params = tvf_crop_params or [{"output_size": list(size[-2:])} for size in self.input_sizes]
        self.tvf_normalize_params = tvf_normalize_params or [
            {"inplace": False, "mean": _as_float32(mean), "std": _as_float32(std)}
            for mean, std in zip(self.means, self.stds)
        ]
        letterbox = image_resize_strategy == "letterbox"
        self.tvf_do_letterbox = letterbox if tvf_do_letterbox is None else tvf_do_letterbox
        # Both towers get the last one's fill, as the published models were evaluated.
        self.tvf_letterbox_fill = tvf_letterbox_fill or ([int(x * 255) for x in self.means[-1]] if letterbox else None)

    def preprocess(
        self,
        images: ImageInput | Sequence[ImageInput],
        return_tensors: str | None = None,
        device: torch.device | str | None = None,
    ) -> BatchFeature:
        """Resize and normalise images.

        Args:
            images: One or several images: PIL; numpy ``(H, W, 3)``, uint8 or float in [0, 1]; torch ``(3, H, W)`` or
                ``(H, W, 3)``, uint8 or float in [0, 1]; a path. Grey, palette and alpha are converted to RGB. A 4-D
                array is a batch. ValueError or TypeError for anything else.
            return_tensors: "pt" for torch, "np" or None for numpy.
            device: Compute on this device, as torch tensors with the same bits; much faster on a GPU. Needs the
                installed package (ImportError).

        Returns:
            ``pixel_values``, float32 ``(batch, 3 * towers, height, width)``.
        """
        parameters = zip(self.tvf_resize_params, self.tvf_crop_params, self.tvf_normalize_params)
        towers = [TowerTransform(*fields) for fields in parameters]
        fill = self.tvf_letterbox_fill if self.tvf_do_letterbox else None
        if device is not None:
            if self.device_pixels is None:
                raise OpenVLAImportError(f"device={str(device)!r} {NEEDS_PACKAGE}.")
            return BatchFeature({"pixel_values": self.device_pixels(images, device, towers, fill, return_tensors)})
        pixels = [normalized_pixels(image, towers, fill) for image in as_images(images)]
        batch: Any = pixels[0][None] if len(pixels) == 1 else np.stack(pixels)
        if return_tensors == "pt":  # BatchFeature would copy an array
            batch = torch.from_numpy(batch)
        return BatchFeature(data={"pixel_values": batch}, tensor_type=return_tensors)

    def __call__(self, images: ImageInput | Sequence[ImageInput], **kwargs: Any) -> BatchFeature:
        """Call ``preprocess``."""
        return self.preprocess(images, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Save the settings and the code."""
        files = super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        mark_code(save_directory)
        return files


class PrismaticImageProcessor(OpenVLAImageProcessor):
    """Image processor under the name in published ``preprocessor_config.json`` files."""


class OpenVLAProcessor(PushToHub, ProcessorMixin):
    """Image processor and tokenizer of a checkpoint, with its prompt.

    Args:
        image_processor: Makes ``pixel_values``.
        tokenizer: The language model's tokenizer.
        prompt_style: A key of ``PROMPTS``; None when unknown. ``from_pretrained`` reads it from the checkpoint.
        empty_token_id: Id appended to every prompt built from an instruction; None for none.
        num_images_in_input: Number of images (cameras) that the model takes with a prompt.
        image_preset: Preprocessing applied to every image before the image processor, a key of
            ``openvla.inference.image_presets.IMAGE_PRESETS``; "libero", "libero-raw": ImportError without the
            package. ``None`` applies none and marks the preset as unspecified; ``openvla evaluate`` uses "libero" then.
    """

    package: ClassVar[Any] = None  # the module openvla.inference.processor_extras; None without the package
    model_input_names = ["input_ids", "attention_mask", "pixel_values"]
    if TRANSFORMERS_4:
        attributes = ["image_processor", "tokenizer"]
        valid_kwargs = PROCESSOR_FIELDS  # 4.41 to 4.49 drop other fields of the JSON
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
        self._find_preset(image_preset)
        super().__init__(image_processor, tokenizer)
        self.prompt_style = prompt_style
        self.empty_token_id = empty_token_id
        self.num_images_in_input = num_images_in_input
        self.image_preset = image_preset

    @classmethod
    def from_pretrained(  # type: ignore[override]  # the names of the keywords differ between versions
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> OpenVLAProcessor:
        """Load a folder or a Hub repository; a published processor's prompt and cameras are in its ``config.json``."""
        hub = hub_keywords(kwargs)
        processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if processor.prompt_style is not None:
            return processor
        try:
            fields, _ = OpenVLAConfig.get_config_dict(pretrained_model_name_or_path, **hub)
        except OSError:  # a processor without a model
            return processor
        if fields.get("model_type") in ("openvla", "prismatic"):
            config = OpenVLAConfig.from_dict({k: v for k, v in fields.items() if k != "norm_stats"})
            processor.prompt_style, processor.empty_token_id = config.prompt_style, config.empty_token_id
            processor.num_images_in_input = config.num_images_in_input
        return processor

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, processor_dict: Any = None, **kwargs: Any
    ) -> list[Any]:
        """Load the parts without AutoImageProcessor, which 5.4 to 5.2x replace where torchvision is not installed."""
        hub = hub_keywords(kwargs)
        image_processor = OpenVLAImageProcessor.from_pretrained(pretrained_model_name_or_path, **hub)
        return [image_processor, AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs)]

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
        """Return model inputs for one or several (prompt, image) pairs.

        Args:
            text: Complete prompts, unchanged, as the published processor takes them. ``predict_action`` appends the
                empty token. A warning is logged for an instruction alone, or a prompt of another style.
            images: One image a prompt, in any form that the image processor takes. For a model of several cameras the
                list of one prompt's images (``[main, wrist]``), or for several prompts a list of such lists. For a
                TraceVLA with an instruction: ``[frame, frame with its trace]``, or the frame alone where there is no
                trace (the same object twice is the same), which the model then sees twice, with the other prompt.
            instruction: What the robot should do ("pick up the red block"). The prompt is written around it in lower
                case, as trained, and ends in the empty token. Special tokens in it (``</s>``) are text.
            padding: As tokenizers take it. None pads instructions of different lengths, and does not pad ``text``.
            truncation: As tokenizers take it, for ``text`` only: an instruction is never truncated.
            max_length: In tokens.
            return_tensors: "pt", "np" or None for lists.
            device: Compute ``pixel_values`` on this device, with the same bits. Needs the package (ImportError).

        Returns:
            ``input_ids`` and ``attention_mask`` int64 ``(batch, length)``, and ``pixel_values`` float32
            ``(batch, cameras * 3 * towers, height, width)`` when there are images. Nothing else.

        Raises:
            ValueError: Arguments contradict each other or would have no effect; an instruction is empty or a complete
                prompt; the number of images is not prompts x cameras; a prompt does not start with BOS; the prompt
                style is unknown.
        """
        _require_used(instruction, images, padding, truncation, max_length, device)
        if (text is None) == (instruction is None):
            raise OpenVLAValueError(
                "Give exactly one of text (the whole prompt) and instruction (what the robot should do)."
            )
        if instruction is not None:
            if images is None:
                raise OpenVLAValueError("An instruction needs an image: processor(instruction=..., images=...).")
            instructions = as_list(instruction)
            styles = [self._known_prompt_style()] * len(instructions)
            if self.prompt_style == TRACE_PROMPT:
                images, styles = _pair_with_traces(images, len(instructions), isinstance(instruction, str))
            inputs = self._tokenize_instructions(instructions, styles, padding, max_length)
        else:
            inputs = self._tokenize_text(text, padding, truncation, max_length, return_tensors)
        data = dict(BatchFeature(data=inputs, tensor_type=return_tensors))
        require_bos(self.tokenizer, self.prompt_style, data["input_ids"], data["attention_mask"])
        if images is not None:
            is_single = isinstance(text if instruction is None else instruction, str)
            data["pixel_values"] = self._pixel_values(
                images,
                batch_size=1 if is_single else len(data["input_ids"]),
                cameras=self.num_images_in_input if instruction is not None else None,
                return_tensors=return_tensors,
                device=device,
            )
        return BatchFeature(data=data)

    def _pixel_values(self, images: Any, *, batch_size: int, cameras: int | None, **kwargs: Any) -> Any:
        """Return the images of all prompts, those of one on the channel axis; None cameras: each stands for itself."""
        nested = isinstance(images, (list, tuple)) and isinstance(next(iter(images), None), (list, tuple))
        if cameras is None:
            several = nested or batch_size == 1 and isinstance(images, (list, tuple))
            cameras = self.num_images_in_input if several else 1
        if cameras > 1 and (batch_size > 1 or nested):
            counts = [len(sample) if isinstance(sample, (list, tuple)) else 1 for sample in images]
            if counts != [cameras] * batch_size:
                raise OpenVLAValueError(
                    f"The model takes {cameras} images a prompt: give {batch_size} lists of {cameras} images, got "
                    f"{counts}."
                )
            images = [image for sample in images for image in sample]
        if preset := self._find_preset(self.image_preset):
            size = self.image_processor.tvf_crop_params[0]["output_size"]
            images = [preset(image, size) for image in as_images(images)]
        pixel_values = self.image_processor(images, **kwargs)["pixel_values"]
        if len(pixel_values) != batch_size * cameras:
            each = "one" if cameras == 1 else f"{cameras} (as a list, in the order of training)"
            raise OpenVLAValueError(
                f"Batch is malformed: {batch_size} prompts but {len(pixel_values)} images; give each prompt {each}."
            )
        _, channels, height, width = np.shape(pixel_values)
        return pixel_values.reshape(batch_size, cameras * channels, height, width)

    def _find_preset(self, name: str | None) -> ImagePreset | None:
        """Return an image preset; None where frames are not changed."""
        if name is None or name == "none":
            return None
        presets = SHIPPED_IMAGE_PRESETS if self.package is None else self.package.IMAGE_PRESETS
        if name in presets:
            return presets[name]
        if self.package is None:
            raise OpenVLAImportError(f"image_preset={name!r} {NEEDS_PACKAGE}.")
        raise OpenVLAValueError(f"Unknown image_preset {name!r}. Allowed: None, or one of {list(presets)}.")

    def prompt(self, instruction: str) -> str:
        """Return the complete prompt for an instruction, in this checkpoint's style, without the empty token.

        TraceVLA's is the one for a frame with a trace.
        """
        instruction = self._clean_instruction(instruction)
        return PROMPTS[self._known_prompt_style()].format(instruction=instruction)

    def _clean_instruction(self, instruction: Any) -> str:
        """Return an instruction as it stands in a prompt, in lower case; ValueError if it says nothing."""
        if isinstance(instruction, bytes):
            raise OpenVLAValueError(
                f"The instruction must be text, got bytes: {instruction!r}; decode them: .decode('utf-8')."
            )
        if not isinstance(instruction, str) or not any(unicodedata.category(char)[0] in "LNS" for char in instruction):
            raise OpenVLAValueError(f"The instruction must say something, got {instruction!r}.")
        require_characters(instruction)
        if self.package is not None:
            self.package.check_instruction(instruction)
        if self.prompt_style == "openvla-mini":  # openvla-mini keeps spaces at both ends
            return instruction.lower().replace("<image>", "")
        return instruction.strip().lower()

    def _tokenize_text(
        self, text: Any, padding: Any, truncation: Any, max_length: int | None, return_tensors: str | None
    ) -> dict[str, Any]:
        """Return ids and mask of complete prompts as lists, nested where tensors are made of them."""
        prompts = as_list(text)
        wrong = [prompt for prompt in prompts if not isinstance(prompt, str) or not prompt]
        if wrong or not prompts:
            got = wrong[0] if wrong else prompts
            raise OpenVLAValueError(f"text must be a whole prompt or a list of them, at least one, got {got!r:.200}.")
        for prompt in prompts:
            require_characters(prompt)
            if self.package is not None:
                self.package.check_prompt(prompt, self.prompt_style)
        is_nested = return_tensors is not None or not isinstance(text, str)
        padding = False if padding is None else padding
        inputs = self.tokenizer(
            prompts if is_nested else text, padding=padding, truncation=truncation, max_length=max_length
        )
        lengths = sorted({len(ids) for ids in inputs["input_ids"]}) if return_tensors is not None else []
        if len(lengths) > 1:
            raise OpenVLAValueError(
                f"The prompts have different lengths in tokens ({lengths}); they need padding=True."
            )
        return {name: inputs[name] for name in ("input_ids", "attention_mask")}

    def _known_prompt_style(self) -> str:
        if self.prompt_style is None:
            raise OpenVLAValueError(
                "This processor does not know its checkpoint's prompt; set processor.prompt_style to one of "
                f"{list(PROMPTS)} and processor.empty_token_id, or pass the whole prompt as text."
            )
        return self.prompt_style

    def _tokenize_instructions(
        self, instructions: list[Any], styles: list[str], padding: bool | str | None, max_length: int | None
    ) -> dict[str, list[list[int]]]:
        """Return ids and mask of padded prompts, each in its style with the empty token after its last word."""
        if not instructions:
            raise OpenVLAValueError("Got an empty list of instructions.")
        instructions = [self._clean_instruction(text) for text in instructions]
        prompts = [
            ids for style, text in zip(styles, instructions) for ids in tokenize_prompts(self.tokenizer, style, [text])
        ]
        if self.empty_token_id is not None:
            prompts = [ids if ids[-1] == self.empty_token_id else [*ids, self.empty_token_id] for ids in prompts]
        longest = max(map(len, prompts))
        limit, name = min(
            (self.tokenizer.model_max_length, "the tokenizer's model_max_length"),
            (math.inf if max_length is None else max_length, "max_length"),
        )
        if longest > limit:
            raise OpenVLAValueError(
                f"A prompt has {longest} tokens, more than {name}={limit}; shorten the instruction."
            )
        length = max_length if padding == "max_length" and max_length is not None else longest
        if any(len(ids) != length for ids in prompts):
            if padding is False or padding == "do_not_pad":
                raise OpenVLAValueError("The instructions have different lengths; they need padding=True.")
            if self.tokenizer.pad_token_id is None:
                raise OpenVLAValueError("The tokenizer has no padding token; set tokenizer.pad_token for a batch.")
        side = self.tokenizer.padding_side
        return {
            "input_ids": _padded(prompts, self.tokenizer.pad_token_id, length, side),
            "attention_mask": _padded([[1] * len(ids) for ids in prompts], 0, length, side),
        }

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Save in the layout that every transformers version from 4.40 reads: two JSON files and the tokenizer's."""
        super().save_pretrained(save_directory, **kwargs if not push_to_hub else {})
        mark_code(save_directory)
        folder = Path(save_directory)
        auto_map = {
            "AutoProcessor": f"processing_openvla.{type(self).__name__}",
            "AutoImageProcessor": f"processing_openvla.{type(self.image_processor).__name__}",
        }
        shared = {"processor_class": type(self).__name__, "auto_map": auto_map}
        image_file, processor_file = folder / "preprocessor_config.json", folder / "processor_config.json"
        write_json(image_file, {**json.loads(self.image_processor.to_json_string()), **shared})
        write_json(processor_file, {**shared, **{name: getattr(self, name) for name in PROCESSOR_FIELDS}})
        if self.package is not None:
            self.package.make_tokenizer_readable(folder)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)
        return [str(image_file), str(processor_file)]

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """Call the tokenizer's ``batch_decode``."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> str:
        """Call the tokenizer's ``decode``."""
        return self.tokenizer.decode(*args, **kwargs)


class PrismaticProcessor(OpenVLAProcessor):
    """Processor under the name in published files."""


def _require_used(
    instruction: Any, images: Any, padding: Any, truncation: Any, max_length: int | None, device: Any
) -> None:
    """Raise ValueError for arguments of the processor that would have no effect."""
    if instruction is not None and truncation not in (None, False, "do_not_truncate"):
        raise OpenVLAValueError(f"truncation={truncation!r}: an instruction is never cut; leave truncation out.")
    if instruction is not None and padding == "max_length" and max_length is None:
        raise OpenVLAValueError("padding='max_length' needs max_length.")
    if images is None and device is not None:
        raise OpenVLAValueError("device is where pixel_values are made, and there are no images; leave it out.")


def _pair_with_traces(images: Any, count: int, is_single: bool) -> tuple[list[list[Any]], list[str]]:
    """Return ``[frame, frame with its trace]`` and the prompt style of each of ``count`` prompts (TraceVLA).

    A prompt with one image has no trace, and gets it twice; ``is_single``: ``images`` are those of one prompt.
    """
    images = list(images) if getattr(images, "ndim", 0) == 4 or isinstance(images, tuple) else images
    nested = isinstance(images, list) and isinstance(next(iter(images), None), (list, tuple))
    samples = images if isinstance(images, list) and (nested or not is_single) else [images]
    pairs = [list(sample) if isinstance(sample, (list, tuple)) else [sample] for sample in samples]
    if len(pairs) != count:
        raise OpenVLAValueError(
            f"{count} instructions but {len(pairs)} images; give for each one frame, or [frame, frame with its trace]."
        )
    pairs = [pair * 2 if len(pair) == 1 else pair for pair in pairs]
    traced = [len(pair) != 2 or pair[0] is not pair[1] for pair in pairs]  # other numbers raise with the pixels
    return pairs, [TRACE_PROMPT if is_traced else UNTRACED_PROMPT for is_traced in traced]


def _as_float32(values: Sequence[float]) -> list[float]:
    return [float(value) for value in np.array(values, dtype=np.float32)]


def _padded(sequences: Sequence[list[int]], value: int, length: int, side: str) -> list[list[int]]:
    """Return sequences padded with a value to a length, on the left or the right side."""
    pads = [[value] * (length - len(sequence)) for sequence in sequences]
    return [pad + sequence if side == "left" else sequence + pad for pad, sequence in zip(pads, sequences)]


def require_characters(text: str) -> None:
    """Raise ValueError where text holds half of a surrogate pair."""
    if half := re.search("[\ud800-\udfff]", text):
        raise OpenVLAValueError(
            f"The text {text!r:.200} holds half of a surrogate pair ({half[0]!r}), which is no character and must be "
            "left out."
        )


def as_list(texts: Any) -> list[Any]:
    """Return one text or several as a list; an unordered collection (a set, a dictionary) is one object, not texts."""
    several = np.ndim(texts) == 1 if isinstance(texts, np.ndarray) else isinstance(texts, Iterable)
    return list(texts) if several and not isinstance(texts, (str, bytes, Mapping, Set)) else [texts]


def tokenize_prompts(tokenizer: Any, style: str, instructions: Sequence[str]) -> list[list[int]]:
    """Return the ids of the prompts of instructions, in a style of ``PROMPTS``.

    Special tokens that an instruction spells out (``</s>``) are text; as tokens they would end the prompt there.
    """
    prompts = tokenizer([PROMPTS[style].format(instruction=instruction) for instruction in instructions])["input_ids"]
    special = tokenizer.get_added_vocab()
    return [
        _tokenize_without_special(tokenizer, special, PROMPTS[style].split(PLACEHOLDER), instruction)
        if any(word in instruction for word in special)
        else list(ids)
        for ids, instruction in zip(prompts, instructions)
    ]


def require_bos(tokenizer: Any, style: str | None, input_ids: Any, attention_mask: Any) -> None:
    """Raise ValueError where a prompt does not begin with BOS, behind which the model puts the image patches.

    Qwen has no BOS; the special token that opens the trained prompt takes its place. ``input_ids`` and
    ``attention_mask`` are one prompt ``(length,)`` or several ``(batch, length)``.
    """
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None and PROMPTS.get(style or "", "").startswith("<|"):
        bos = tokenizer(PROMPTS[style or ""])["input_ids"][0]
    if bos is None:
        return
    nested = np.ndim(input_ids[0]) > 0
    for ids, mask in zip(input_ids, attention_mask) if nested else [(input_ids, attention_mask)]:
        first = next((int(token) for token, visible in zip(ids, mask) if visible), None)
        if first != bos:
            raise OpenVLAValueError(
                f"A prompt starts with token {first} instead of BOS ({bos}), behind which the model puts the "
                "image. Use processor(instruction=...), which writes the trained prompt. If it says this too, the "
                "tokenizer's files were probably re-saved by another transformers version; use the original ones."
            )


def _tokenize_without_special(
    tokenizer: Any, special: dict[str, int], template: list[str], instruction: str
) -> list[int]:
    """Return the ids of a prompt; words of the template may be special tokens, words of the instruction are not."""
    words = "|".join(re.escape(word) for word in sorted(special, key=len, reverse=True))
    before, after = (re.split(f"({words})", part) for part in template)
    # Odd indices are special tokens, even ones the text between them.
    pieces = [*before[:-1], before[-1] + instruction + after[0], *after[1:]]
    encode = _plain_encoder(tokenizer)
    ids = list(tokenizer("")["input_ids"])  # BOS, where the tokenizer puts one in front
    for index, piece in enumerate(pieces):
        ids += [special[piece]] if index % 2 else encode(piece) if piece else []
    return ids


def _plain_encoder(tokenizer: Any) -> Callable[[str], list[int]]:
    """Return a function from text to ids that takes no word for a special token."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a slow tokenizer, of transformers 4
        return lambda text: tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    fields = {**json.loads(backend.to_str()), "added_tokens": [], "truncation": None, "padding": None}
    plain = type(backend).from_str(json.dumps(fields))
    return lambda text: plain.encode(text, add_special_tokens=False).ids
