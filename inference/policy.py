"""``load_policy``: a checkpoint on a device, ready to act, or an error that says what would fit."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn

from ..adapters.files import locate_base
from ..compatibility_openvla import DTYPE_FIELD
from ..configuration_openvla import OpenVLAConfig, optional_file
from ..decoding_openvla import require_one_pass
from ..errors_openvla import OpenVLAValueError
from ..loading import AutoProcessor
from ..modeling_openvla import OpenVLAForActionPrediction
from ..processing_openvla import OpenVLAImageProcessor, OpenVLAProcessor
from ..publishing_openvla import ADAPTER_CONFIG_FILE
from ..quantization_openvla import UNQUANTIZED_MODULES, VISION_TOWERS, fast_dtype, quantization_config
from .cpu_prepack import prepack as prepack_weights
from .fast_decoder import compile_pointwise

logger = logging.getLogger(__name__)

# Beside the weights: cache, activations, what the allocator does not give back.
HEADROOM = 1.1
# Bytes a weight: the value, and one scale (quantised itself at 4 bits) a block of 64 or a row.
BYTES_OF_BITS = {8: 1.0, 4: 0.5 + 1 / 64 + 4 / (64 * 256)}
# Their README.md say how they were made and what they can do.
EMBEDDED = Path(__file__).resolve().parents[1] / "assets" / "libero"
EMBEDDED_OFT = EMBEDDED.with_name("libero_oft")  # its twin, which answers chunks; judged in float32
EMBEDDED_NAME = "embedded default (4 M parameters, trained on two tasks of LIBERO-Object)"
DTYPES = ("float32", "bfloat16", "float16")
PREPROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


@dataclass
class Policy:
    """A model that acts.

    Attributes:
        model: In eval mode, on its device.
        processor: The checkpoint's own.
        unnorm_key: The dataset whose statistics give robot units.
        constrain_actions: As of ``predict_action``; random weights need it.

    An answer in which a single token is no action raises, since it would drive a joint at full speed.
    """

    model: OpenVLAForActionPrediction
    processor: OpenVLAProcessor
    unnorm_key: str
    constrain_actions: bool = False

    def __post_init__(self) -> None:
        """Refuse constrained tokens of a model that answers in numbers.

        Raises:
            ValueError: ``constrain_actions`` would be ignored.
        """
        require_one_pass({}, None, self.constrain_actions, self.model.config.action_head)

    def act(self, image: Any, instruction: str, proprio: Any = None) -> np.ndarray:
        """The next action, or chunk of actions; ``ActionChunk`` plays a chunk action by action.

        Args:
            image: Camera image, as the processor takes it: PIL, numpy ``(H, W, 3)`` uint8 or float, torch, a path; for
                a model of several cameras the list of their images, in the order of training.
            instruction: What the robot should do.
            proprio: The robot's state in its own units, ``(proprio_dim,)``, for models that were trained with it.

        Returns:
            float64 ``(action_dim,)`` or ``(chunk, action_dim)`` in robot units, as ``predict_action``.

        Raises:
            NoActionError: What the model gave is no action.
            ValueError: Image, instruction or proprio do not fit the model.
        """
        device = self.model.device if self.model.device.type == "cuda" else None
        inputs = self.processor(instruction=instruction, images=image, device=device)
        asked = {"unnorm_key": self.unnorm_key, "constrain_actions": self.constrain_actions, "strict": True}
        return self.model.predict_action(**inputs, **asked, proprio=proprio)

    def reset(self) -> None:
        """Begin an episode. The model remembers nothing from one image to the next."""


def load_policy(
    model: str | os.PathLike | None = None,
    *,
    bits: int | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    unnorm_key: str | None = None,
    prepack: bool = False,
    compile: bool = False,
    constrain_actions: bool | None = None,
) -> Policy:
    """Load a checkpoint, or an adapter on its base, straight onto a device.

    Args:
        model: Folder or Hub id; None is the embedded default, which needs no download.
        bits: 8 or 4 for quantised weights (see ``quantization_config``); None for whole ones, or as saved.
        device: None is the GPU where there is one, else the CPU.
        dtype: None is bfloat16 on a GPU that has it (else float16), and the checkpoint's own on a CPU (float32 for the
            embedded ones: many CPUs have no bfloat16). 4-bit weights are multiplied in it too, where it is given.
        unnorm_key: As for ``predict_action``; settled here, so that a wrong one does not wait for the first action.
        prepack: On a CPU, lay the weights out for its products once (``prepacked_model.prepack``): faster answers, in
            bfloat16 the same in every bit, of a model that can do nothing else.
        compile: Let torch.compile fuse the small operations of an answer (``compile_pointwise``), for a GPU; the first
            answer waits for it.
        constrain_actions: As of ``predict_action``: then the policy has an action to images that it does not know, too.
            None is True for the embedded default, which knows two tasks and is there to be tried, else False.

    Raises:
        ValueError: The model does not fit on the device; the message says what it needs and which ``bits`` would fit.
            Or it is already quantised with other bits, or cannot be prepacked or fused.
        KeyError: Unknown ``unnorm_key``.
        ImportError: A package for ``bits`` or an adapter is missing.
    """
    device = torch.device(device or default_device())
    dtype = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    computed = dtype if isinstance(dtype, torch.dtype) else fast_dtype(device)
    model = EMBEDDED if model is None else model
    if constrain_actions is None:
        constrain_actions = Path(model).resolve() == EMBEDDED
    if dtype is None and device.type == "cpu" and Path(model).resolve() in (EMBEDDED, EMBEDDED_OFT):
        dtype = torch.float32
    is_adapter = optional_file(model, ADAPTER_CONFIG_FILE) is not None
    base, revision = locate_base(model, {}) if is_adapter else (model, None)
    at = {"revision": revision} if revision else {}
    config = OpenVLAConfig.from_pretrained(base, **at)
    require_one_pass({}, None, constrain_actions, config.action_head)
    stored = stored_bits(config)
    if bits is not None and stored not in (None, bits):
        raise OpenVLAValueError(f"{model} is already quantised to {stored} bits; leave bits out, or load its base.")
    quantization = None
    if bits is not None and stored is None:
        quantization = quantization_config(bits, compute_dtype=computed if bits == 4 else None)
    if dtype is None:
        dtype = "auto" if device.type == "cpu" else fast_dtype(device)
    _require_room(model, config, stored or bits, device, dtype)
    keywords = {"device_map": {"": str(device)}, DTYPE_FIELD: dtype}
    if quantization is not None:
        keywords["quantization_config"] = quantization
    loaded = OpenVLAForActionPrediction.from_pretrained(model, **keywords).eval()
    if prepack:
        prepack_weights(loaded)
    if compile:
        compile_pointwise(loaded)
    own_processor = any(optional_file(model, name) for name in PREPROCESSOR_FILES)
    processor = AutoProcessor.from_pretrained(model) if own_processor else AutoProcessor.from_pretrained(base, **at)
    for doubt in processor_doubts(config, processor.image_processor):
        logger.warning(
            "%s: %s; if these are files of another checkpoint, the model sees other images than it was trained with: "
            "take the preprocessor_config.json that was saved with the weights",
            model,
            doubt,
        )
    return Policy(loaded, processor, loaded.resolve_unnorm_key(unnorm_key), constrain_actions)


PIXEL_STATISTICS_TOLERANCE = 0.01  # published ones are rounded to bfloat16, to within 0.001


def processor_doubts(config: OpenVLAConfig, processor: OpenVLAImageProcessor) -> list[str]:
    """Return what an image processor does otherwise than a model's towers were trained with; empty for its own.

    Means and standard deviations are those of timm's towers of the configuration's ids: a model that was trained with
    others is in doubt too.
    """
    trained = OpenVLAImageProcessor.for_config(config)
    doubts = []
    sizes, own_sizes = (
        [tuple(crop["output_size"]) for crop in images.tvf_crop_params] for images in (trained, processor)
    )
    if own_sizes != sizes:
        doubts.append(f"the image processor makes images of {own_sizes}, the towers take {sizes}")
    if processor.image_resize_strategy != trained.image_resize_strategy:
        doubts.append(
            f"the image processor resizes by {processor.image_resize_strategy!r}, the configuration says "
            f"{trained.image_resize_strategy!r}"
        )
    for field in ("mean", "std"):
        values, own_values = (
            [tower[field] for tower in images.tvf_normalize_params] for images in (trained, processor)
        )
        if np.shape(own_values) != np.shape(values) or not np.allclose(
            own_values, values, rtol=0, atol=PIXEL_STATISTICS_TOLERANCE
        ):
            doubts.append(
                f"the image processor's {field} a channel is {np.round(own_values, 3).tolist()}, that of the towers "
                f"{config.timm_model_ids} is {np.round(values, 3).tolist()}"
            )
    return doubts


def add_policy_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of every command that needs a policy."""
    parser.add_argument(
        "--model", metavar="DIR_OR_ID", help="checkpoint folder or Hub id; without it the embedded default"
    )
    parser.add_argument("--unnorm-key", metavar="K", help="dataset whose statistics give robot units")
    parser.add_argument("--bits", type=int, choices=(8, 4), help="quantise the weights (extra: openvla[quant])")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; default cuda where there is one, else cpu")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the computation; default bfloat16 on a GPU, the checkpoint's own on a CPU"
    )
    parser.add_argument(
        "--constrain-actions",
        action=argparse.BooleanOptionalAction,
        help="choose among action tokens only; else what is no action is an error. Default for the embedded default",
    )
    parser.add_argument(
        "--compile", action="store_true", help="let torch.compile fuse small operations; the first answer waits for it"
    )
    parser.add_argument(
        "--prepack", action="store_true", help="lay the weights out for this CPU's products once: faster"
    )


def policy_from(args: argparse.Namespace) -> tuple[Policy, str]:
    """The policy that the options of ``add_policy_arguments`` name, and its name; errors as of ``load_policy``."""
    names = ("bits", "device", "dtype", "unnorm_key", "prepack", "compile", "constrain_actions")
    named = {name: getattr(args, name) for name in names}
    return load_policy(args.model, **named), str(args.model or EMBEDDED_NAME)


def default_device() -> str:
    """The GPU where there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def stored_bits(config: OpenVLAConfig) -> int | None:
    """8 or 4 for the configuration of a checkpoint that was saved quantised, else None."""
    fields = _stored_fields(config)
    return None if fields is None else 8 if fields.get("load_in_8bit") else 4


def _stored_fields(config: OpenVLAConfig) -> dict[str, Any] | None:
    quantization = getattr(config, "quantization_config", None)
    return quantization if quantization is None or isinstance(quantization, dict) else quantization.to_dict()


def without_weights(config: OpenVLAConfig) -> OpenVLAForActionPrediction:
    """The model on torch's meta device: shapes alone."""
    with torch.device("meta"):
        return OpenVLAForActionPrediction(config)


def weight_bytes(
    model: OpenVLAForActionPrediction,
    bits: int | None,
    dtype: torch.dtype,
    kept: Sequence[str] = (VISION_TOWERS, *UNQUANTIZED_MODULES),
) -> int:
    """Memory of a model's weights.

    Args:
        model: Plain, with or without weights.
        bits: 8, 4, or None for whole weights.
        dtype: Of what is not quantised.
        kept: Prefixes or endings of the modules that are not quantised.
    """
    total = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    if bits is None:
        return total
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not (name.startswith(tuple(kept)) or name.endswith(tuple(kept))):
            total -= int(module.weight.numel() * (dtype.itemsize - BYTES_OF_BITS[bits]))
    return total


def free_bytes(device: torch.device) -> int | None:
    """Memory that a new model could take on a device; None where that cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available if device.type == "cpu" else None


def _require_room(model: Any, config: OpenVLAConfig, bits: int | None, device: torch.device, dtype: Any) -> None:
    """Raise ValueError if the weights cannot fit, before any is read."""
    if dtype == "auto":
        dtype = getattr(config, DTYPE_FIELD, None) or torch.float32
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # a configuration on transformers 4.40
    free = free_bytes(device)
    if free is None:
        return
    empty = without_weights(config)
    kept = (_stored_fields(config) or {}).get("llm_int8_skip_modules") or (VISION_TOWERS, *UNQUANTIZED_MODULES)
    needed = {choice: weight_bytes(empty, choice, dtype, kept) * HEADROOM for choice in (None, 8, 4)}
    if needed[bits] <= free:
        return
    fitting = [f"bits={choice} ({needed[choice] / 1e9:.1f} GB)" for choice in (8, 4) if needed[choice] <= free]
    raise OpenVLAValueError(
        f"{model} needs {needed[bits] / 1e9:.1f} GB at {f'{bits} bits' if bits else dtype}, and {device} has "
        f"{free / 1e9:.1f} GB free; {' and '.join(fitting) if fitting else 'neither bits=8 nor bits=4'} would fit."
    )
