"""``load_policy``: load a checkpoint onto a device as a ``Policy`` that predicts robot actions."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from torch import nn
from transformers import PretrainedConfig

from ..adapters.files import locate_base
from ..compatibility_openvla import DTYPE_FIELD
from ..configuration_openvla import ADAPTER_CONFIG_FILE, OpenVLAConfig, optional_file, require_known
from ..decoding_openvla import NoActionError, require_one_pass
from ..default_processor import default_image_processor
from ..errors_openvla import OpenVLAError, OpenVLAValueError
from ..loading import AutoProcessor, refuse_model_type
from ..modeling_openvla import OpenVLAForActionPrediction
from ..processing_openvla import OpenVLAImageProcessor, OpenVLAProcessor
from .batches import Prediction, PreparedObservation, max_batch_size, predict_all
from .cpu_prepack import prepack as prepack_weights
from .demo_policies import DEMO_NAME, DEMO_OFT_POLICY, DEMO_POLICY, require_demo_policy
from .fast_decoder import compile_pointwise
from .image_history import PADDINGS, ImageHistory
from .merged_products import merge_products
from .quantization import (
    BACKENDS,
    UNQUANTIZED_MODULES,
    VISION_TOWERS,
    default_backend,
    fast_dtype,
    has_float8,
    quantization_config,
)
from .visual_trace import WINDOW_SIZE, WINDOW_SIZES, Tracker, VisualTrace, evaluation_frame

logger = logging.getLogger(__name__)

# Memory for the KV cache, activations and allocator fragmentation, as a factor on the weights.
HEADROOM = 1.1
# Bytes per quantised weight: the value, and a scale per block of 64 (4 bits; scales are quantised too) or per row.
BYTES_OF_BITS = {8: 1.0, 4: 0.5 + 1 / 64 + 4 / (64 * 256)}
# Tolerance when pixel means and standard deviations are compared: published ones are rounded to bfloat16.
PIXEL_STATISTICS_TOLERANCE = 0.01
ACTIONS = ("all", "first")  # of a chunk
OBSERVATION_FIELDS = ("image", "instruction", "proprio", "unnorm_key")  # of Policy.act_batch
DTYPES = ("float32", "bfloat16", "float16")
WARMUP_CALLS = 3  # the first runs eagerly, the second captures a CUDA graph, the third replays it
PREPROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


@dataclass
class Policy:
    """A model and its processor that predict robot actions from an image and an instruction.

    Attributes:
        model: Model in eval mode, on its device.
        processor: Processor of the checkpoint.
        unnorm_key: Dataset whose statistics un-normalise the actions to robot units.
        constrain_actions: Decode action tokens only, see ``predict_action``; needed for untrained weights.
        visual_trace: For a TraceVLA, what draws the traces of one camera's episode; None gives frames without.
        actions: "all" actions of a chunk, or the "first" one alone; see ``predict_action``.
        history_padding: For a model of several moments, what fills the first steps of an episode: "start" or "end", see
            ``ImageHistory``.

    A prediction with a token that is not an action token raises, because it would move a joint at full speed.
    """

    model: OpenVLAForActionPrediction
    processor: OpenVLAProcessor
    unnorm_key: str
    constrain_actions: bool = False
    visual_trace: VisualTrace | None = None
    actions: str = "all"
    history_padding: str = "start"

    def __post_init__(self) -> None:
        """Validate what not every model uses.

        Raises:
            ValueError: The model would ignore ``constrain_actions`` (it has a continuous action head), ``visual_trace``
                (it is no TraceVLA), ``actions`` (it predicts single ones) or ``history_padding`` (it takes one moment).
        """
        config = self.model.config
        require_one_pass({}, None, self.constrain_actions, config.action_head)
        if self.visual_trace is not None and not config.trace_prompting:
            raise OpenVLAValueError(
                "The model is no TraceVLA (trace_prompting in config.json); leave visual_trace out."
            )
        require_known("actions", self.actions, ACTIONS)
        if self.actions == "first" and not self.predicts_chunks:
            raise OpenVLAValueError("The model predicts single actions, not chunks; leave actions='first' out.")
        if self.history_padding != PADDINGS[0] and config.history_length == 1:
            raise OpenVLAValueError(
                f"The model takes images of one moment; leave history_padding={self.history_padding!r} out."
            )
        self.history = self.new_history()

    @property
    def predicts_chunks(self) -> bool:
        """Return whether the model predicts several actions at a time."""
        return self.model.config.parallel_decoding or self.model.config.action_vq is not None

    def new_history(self) -> ImageHistory:
        """Return an empty history of images; every robot that uses this policy at the same time needs its own."""
        return ImageHistory(self.model.config, self.history_padding)

    def act(self, image: Any, instruction: str, proprio: Any = None) -> np.ndarray:
        """Predict the next action or action chunk; ``ActionQueue`` returns the actions of a chunk one by one.

        Args:
            image: Camera image, as the processor takes it: PIL, numpy ``(H, W, 3)`` uint8 or float, torch, a path; for
                a model of several cameras the list of their images, in the order of training; for a TraceVLA what
                ``observe`` takes. For a model of several moments the images of this one, whose history is kept from the
                last ``reset`` on (then every control step needs a call); or all images, the oldest moment first, which
                leave the kept history unused.
            instruction: Instruction for the robot.
            proprio: Robot state in its own units, ``(proprio_dim,)``, for models trained with it.

        Returns:
            float64 ``(action_dim,)`` or ``(chunk, action_dim)`` in robot units.

        Raises:
            NoActionError: The prediction is not an action.
            ValueError: Image, instruction or proprio do not fit the model.
        """
        return self._predict(self.history.append(self.observe(image)), instruction, proprio)

    def observe(self, image: Any) -> Any:
        """Return what the processor gets for the next step of an episode; only for a TraceVLA other images.

        Args:
            image: Camera image or images, as ``act`` takes them. For a TraceVLA the frame of its camera, which is
                prepared as in evaluation (``evaluation_frame``); or, with ``visual_trace=None``, the list
                ``[frame, frame with its trace]``, which is not changed.

        Returns:
            ``image``; for a TraceVLA ``[frame, frame with its trace]``, or the frame alone where there is no trace.

        Raises:
            ValueError: Several images for a TraceVLA that draws the trace itself, or an image that is not usable.
        """
        if not self.model.config.trace_prompting:
            return image
        frames = list(image) if isinstance(image, (list, tuple)) else [image]
        if len(frames) > 1 and self.visual_trace is not None:
            raise OpenVLAValueError("This policy draws the trace itself; give the frame of its camera alone.")
        if len(frames) != 1:
            return image
        frame = evaluation_frame(frames[0])
        traced = None if self.visual_trace is None else self.visual_trace.update(frame)
        return frame if traced is None else [frame, traced]

    def _predict(self, images: Any, instruction: str, proprio: Any) -> np.ndarray:
        device = self.model.device if self.model.device.type == "cuda" else None
        inputs = self.processor(instruction=instruction, images=images, device=device)
        action = self.model.predict_action(
            **inputs,
            unnorm_key=self.unnorm_key,
            proprio=proprio,
            constrain_actions=self.constrain_actions,
            strict=True,
            actions=self.actions,
        )
        assert isinstance(action, np.ndarray)  # an ActionOutput with return_dict=True only
        return action

    def act_batch(
        self, observations: Sequence[Mapping[str, Any]], *, batch_size: int = 16, return_errors: bool = False
    ) -> list[Any]:
        """Predict the next action or chunk of several robots, each equal to that of ``act``.

        Nothing is kept between calls: a model of several moments needs all images of each observation, and a TraceVLA
        the frame or ``[frame, frame with its trace]``.

        Args:
            observations: For each robot a mapping with ``image`` and ``instruction``, and where needed ``proprio`` and
                ``unnorm_key``, as of ``act`` and ``load_policy``.
            batch_size: Maximum number of observations in a forward pass; only prompts of one length share one, and none
                with a continuous action head, whose actions would be rounded otherwise.
            return_errors: Return the error of an observation in its place; False raises the first one.

        Returns:
            For each observation float64 ``(action_dim,)`` or ``(chunk, action_dim)`` in robot units, or its error.

        Raises:
            OpenVLAError: An observation does not fit the model, or its prediction is not an action (``NoActionError``).
        """
        outcomes: list[Any] = []
        for observation in observations:
            try:
                outcomes.append(self._prepare(observation))
            except OpenVLAError as error:
                if not return_errors:
                    raise
                outcomes.append(error)
        prepared = [outcome for outcome in outcomes if not isinstance(outcome, OpenVLAError)]
        predictions = iter(predict_all(self.model, prepared, self.actions, max_batch_size(self.model, batch_size)))
        outcomes = [outcome if isinstance(outcome, OpenVLAError) else next(predictions) for outcome in outcomes]
        for outcome in outcomes:
            if isinstance(outcome, Exception) and not (return_errors and isinstance(outcome, OpenVLAError)):
                raise outcome
        return [outcome.actions if isinstance(outcome, Prediction) else outcome for outcome in outcomes]

    def _prepare(self, observation: Mapping[str, Any]) -> PreparedObservation:
        """Return an observation of ``act_batch`` as the model takes it; raise OpenVLAError where it does not fit."""
        if not {"image", "instruction"} <= set(observation) <= set(OBSERVATION_FIELDS):
            raise OpenVLAValueError(
                f"An observation has image and instruction, and may have {OBSERVATION_FIELDS[2:]}; got "
                f"{list(observation)}."
            )
        model, images = self.model, observation["image"]
        key = model.resolve_unnorm_key(observation.get("unnorm_key") or self.unnorm_key)
        state = model.normalize_proprio(observation.get("proprio"), [key])  # raises where it does not fit
        device = model.device if model.device.type == "cuda" else None
        images = self.without_trace().observe(images)
        return PreparedObservation(
            inputs=dict(self.processor(instruction=observation["instruction"], images=images, device=device)),
            unnorm_key=key,
            proprio=None if state is None else np.asarray(observation["proprio"], dtype=np.float64),
            action_dim=model.get_action_dim(key),
            details=False,
            constrain_actions=self.constrain_actions,
        )

    def without_trace(self) -> Policy:
        """Return this policy without what draws traces, for images that belong to no episode."""
        return replace(self, visual_trace=None)

    def warm_up(self, instructions: Sequence[str]) -> None:
        """Predict for black images until nothing more is compiled or captured, so that the first frame does not wait.

        A CUDA graph belongs to a prompt's length in tokens: give an instruction of every length that will come.

        Args:
            instructions: Instructions for the robot; each costs ``WARMUP_CALLS`` predictions.

        Raises:
            ValueError: An instruction is empty, or the processor does not know the model's prompt.
        """
        config = self.model.config
        frame = Image.new("RGB", (config.image_sizes[0], config.image_sizes[0]))
        proprio = None
        if config.proprio_dim is not None:
            statistics = self.model.proprio_statistics(self.unnorm_key)
            proprio = (statistics.low + statistics.high) / 2
        moments = [[frame] * config.num_images_in_input]
        if config.trace_prompting:  # the same object twice has no trace: its prompt is another
            moments.append([frame, frame.copy()])
        for instruction, images in itertools.product(instructions, moments):
            for _ in range(WARMUP_CALLS):
                with contextlib.suppress(NoActionError):  # of a black image
                    self._predict(images, instruction, proprio)

    def reset(self) -> None:
        """Begin an episode: forget images and trace of the previous one. The model itself keeps no state."""
        self.history.clear()
        if self.visual_trace is not None:
            self.visual_trace.reset()


def load_policy(
    model: str | os.PathLike | None = None,
    *,
    bits: int | None = None,
    backend: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    unnorm_key: str | None = None,
    prepack: bool = False,
    compile: bool = False,
    constrain_actions: bool | None = None,
    actions: str = "all",
    history_padding: str = "start",
    warmup: Sequence[str] = (),
    tracker: Tracker | VisualTrace | None = None,
) -> Policy:
    """Load a checkpoint, or an adapter with its base model, directly onto a device.

    Args:
        model: Folder or Hub id; None is the demo policy, which needs no download.
        bits: 8 or 4 for quantised weights (see ``quantization_config``); None for the dtype, or the quantisation of a
            checkpoint that was saved quantised.
        backend: Library of the quantised weights, "bitsandbytes" or "torchao" (8 bits only). None is for 8 bits torchao
            where it is installed and expected to be faster (``default_backend``), else bitsandbytes; an adapter's base
            is always quantised by bitsandbytes.
        device: None is the GPU if there is one, else the CPU.
        dtype: dtype of the weights and of the computation, also of 4-bit matrix products. None is bfloat16 on a GPU
            that supports it (else float16), and the checkpoint's dtype on a CPU (float32 for the demo policies,
            because many CPUs do not support bfloat16).
        unnorm_key: See ``predict_action``; checked here, so that an unknown key fails before the first action.
        prepack: Repack the weights once for the matrix products of this CPU (``inference.cpu_prepack``): faster, and
            bitwise equal in bfloat16. The model can then only predict.
        compile: Let torch.compile fuse pointwise operations on a GPU (``fast_decoder``); the first prediction waits for
            the compilation.
        constrain_actions: Decode action tokens only (see ``predict_action``), so that images unlike the training data
            give an action, too. None is True for the demo policy, which knows two tasks only, else False.
        actions: See ``Policy``.
        history_padding: See ``Policy``.
        warmup: Instructions to predict for before returning (``Policy.warm_up``), so that the first frames do not wait
            for CUDA graphs or the compiler.
        tracker: For a TraceVLA: the point tracker, such as ``CoTracker3``, or a ``VisualTrace`` with settings of your
            own; the default ones are those of the authors' evaluation for ``unnorm_key``. None gives the model every
            frame without a trace, which it was trained for, too.

    Raises:
        ValueError: The model does not fit on the device (the message says which ``bits`` would), it is already
            quantised with other bits or another back end, or it cannot be prepacked or compiled. Or there is a
            ``tracker`` for a model that is no TraceVLA.
        KeyError: Unknown ``unnorm_key``.
        ImportError: A package for ``bits`` or an adapter is missing, or the demo policy.
    """
    device = torch.device(device or default_device())
    dtype = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    model = require_demo_policy() if model is None else model
    if constrain_actions is None:
        constrain_actions = Path(model).resolve() == DEMO_POLICY
    if dtype is None and device.type == "cpu" and Path(model).resolve() in (DEMO_POLICY, DEMO_OFT_POLICY):
        dtype = torch.float32
    base, base_kwargs = _base_checkpoint(model)
    refuse_model_type(base, OpenVLAConfig.get_config_dict(base, **base_kwargs)[0].get("model_type"))
    config = OpenVLAConfig.from_pretrained(base, **base_kwargs)
    require_one_pass({}, None, constrain_actions, config.action_head)
    if tracker is not None and not config.trace_prompting:
        raise OpenVLAValueError(f"{model} is no TraceVLA (trace_prompting in config.json); leave tracker out.")
    stored = stored_bits(config)
    _require_stored_format(model, config, bits, backend)
    is_adapter = base is not model
    if is_adapter and backend == "torchao":
        raise OpenVLAValueError(f"{model} is an adapter, whose base torchao cannot hold; take backend='bitsandbytes'.")
    kwargs: dict[str, Any] = {"device_map": {"": str(device)}}
    if bits is not None and stored is None:
        compute_dtype = dtype if isinstance(dtype, torch.dtype) else fast_dtype(device)
        backend = backend or ("bitsandbytes" if is_adapter else default_backend(bits, device))
        if backend == "torchao" and has_float8(device) and compute_dtype is not torch.bfloat16:
            raise OpenVLAValueError(
                f"float8 weights compute in bfloat16, not in {dtype}; leave dtype out, or take backend='bitsandbytes'."
            )
        kwargs["quantization_config"] = quantization_config(
            bits,
            backend=backend,
            device=device if backend == "torchao" else None,
            compute_dtype=compute_dtype if bits == 4 else None,
        )
    if dtype is None:
        dtype = "auto" if device.type == "cpu" else fast_dtype(device)
    kwargs[DTYPE_FIELD] = dtype
    _require_memory(model, config, stored or bits, device, dtype)
    loaded = OpenVLAForActionPrediction.from_pretrained(model, **kwargs).eval()
    if device.type == "cuda":
        merge_products(loaded.language_model)
    if prepack:
        prepack_weights(loaded)
    if compile:
        compile_pointwise(loaded)
    has_processor = any(optional_file(model, name) for name in PREPROCESSOR_FILES)
    processor = AutoProcessor.from_pretrained(
        model if has_processor else base, **({} if has_processor else base_kwargs)
    )
    for mismatch in processor_mismatches(config, processor.image_processor):
        logger.warning(
            "%s: %s; if these are files of another checkpoint, the model sees other images than it was trained with: "
            "take the preprocessor_config.json that was saved with the weights",
            model,
            mismatch,
        )
    key = loaded.resolve_unnorm_key(unnorm_key)
    if tracker is not None and not isinstance(tracker, VisualTrace):
        tracker = VisualTrace(tracker, window_size=WINDOW_SIZES.get(key, WINDOW_SIZE))
    policy = Policy(loaded, processor, key, constrain_actions, tracker, actions, history_padding)
    policy.warm_up([warmup] if isinstance(warmup, str) else warmup)
    return policy


def _base_checkpoint(model: str | os.PathLike) -> tuple[str | os.PathLike, dict[str, Any]]:
    """Return the checkpoint that has config and weights, and the arguments of ``from_pretrained`` for it."""
    if optional_file(model, ADAPTER_CONFIG_FILE) is None:
        return model, {}
    base, revision = locate_base(model, {})
    return base, {"revision": revision} if revision else {}


def processor_mismatches(config: OpenVLAConfig, processor: OpenVLAImageProcessor) -> list[str]:
    """Describe how an image processor differs from the preprocessing that the vision towers were trained with.

    The expected means and standard deviations are timm's for the towers of the configuration; a model trained with
    other statistics is reported, too. Returns an empty list if nothing differs.
    """
    expected = default_image_processor(config)
    mismatches = []
    expected_sizes, sizes = (
        [tuple(crop["output_size"]) for crop in images.tvf_crop_params] for images in (expected, processor)
    )
    if sizes != expected_sizes:
        mismatches.append(f"the image processor makes images of {sizes}, the towers take {expected_sizes}")
    if processor.image_resize_strategy != expected.image_resize_strategy:
        mismatches.append(
            f"the image processor resizes by {processor.image_resize_strategy!r}, the configuration says "
            f"{expected.image_resize_strategy!r}"
        )
    for field in ("mean", "std"):
        expected_values, values = (
            [tower[field] for tower in images.tvf_normalize_params] for images in (expected, processor)
        )
        if np.shape(values) != np.shape(expected_values) or not np.allclose(
            values, expected_values, rtol=0, atol=PIXEL_STATISTICS_TOLERANCE
        ):
            mismatches.append(
                f"the image processor's {field} per channel is {np.round(values, 3).tolist()}, that of the towers "
                f"{config.timm_model_ids} is {np.round(expected_values, 3).tolist()}"
            )
    return mismatches


def add_policy_arguments(parser: argparse.ArgumentParser, *, has_episodes: bool = False) -> None:
    """Add the options of every command that loads a policy.

    Args:
        parser: The command's parser.
        has_episodes: Whether the command keeps images of an episode's earlier steps.
    """
    parser.add_argument("--model", metavar="DIR_OR_ID", help="checkpoint folder or Hub id; without it the demo policy")
    parser.add_argument(
        "--unnorm-key", metavar="K", help="dataset whose statistics un-normalise actions to robot units"
    )
    parser.add_argument(
        "--bits", type=int, choices=(8, 4), help="quantise the weights (extras: openvla[quant], openvla[torchao])"
    )
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        help="library for --bits; default: for 8 bits torchao where it is installed and expected to be faster",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; default cuda if available, else cpu")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="dtype of the model; default bfloat16 on a GPU, the checkpoint's on a CPU"
    )
    parser.add_argument(
        "--constrain-actions",
        action=argparse.BooleanOptionalAction,
        help="decode action tokens only; without it other tokens are an error. On for the demo policy",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="fuse pointwise operations with torch.compile; the first action waits for it",
    )
    parser.add_argument(
        "--prepack", action="store_true", help="repack the weights once for this CPU's matrix products: faster"
    )
    parser.add_argument(
        "--actions", choices=ACTIONS, default="all", help="of a chunk: all, or the first alone, as openvla-mini does"
    )
    if has_episodes:
        parser.add_argument(
            "--history-padding",
            choices=PADDINGS,
            default=PADDINGS[0],
            help="for a model of several moments: where an episode's first steps repeat a moment; default start, as in "
            "training (end: as in openvla-mini's evaluation)",
        )


def load_policy_from_args(args: argparse.Namespace, tracker: Tracker | None = None) -> tuple[Policy, str]:
    """Load the policy of the options of ``add_policy_arguments``; return it and its name. Raises as ``load_policy``."""
    policy = load_policy(
        args.model,
        bits=args.bits,
        backend=args.backend,
        device=args.device,
        dtype=args.dtype,
        unnorm_key=args.unnorm_key,
        prepack=args.prepack,
        compile=args.compile,
        constrain_actions=args.constrain_actions,
        actions=args.actions,
        history_padding=getattr(args, "history_padding", PADDINGS[0]),
        tracker=tracker,
    )
    return policy, str(args.model or DEMO_NAME)


def default_device() -> str:
    """Return "cuda" if a GPU is available, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def stored_bits(config: PretrainedConfig) -> int | None:
    """Return 8 or 4 for the configuration of a checkpoint that was saved quantised, else None."""
    fields = _quantization_fields(config)
    if fields is None:
        return None
    return 8 if fields.get("load_in_8bit") or stored_backend(config) == "torchao" else 4


def stored_backend(config: PretrainedConfig) -> str | None:
    """Return the library of a checkpoint that was saved quantised, "bitsandbytes" or "torchao", else None."""
    method = (_quantization_fields(config) or {}).get("quant_method")
    return None if method is None else str(getattr(method, "value", method))


def _require_stored_format(
    model: str | os.PathLike, config: PretrainedConfig, bits: int | None, backend: str | None
) -> None:
    """Raise ValueError where ``bits`` and ``backend`` do not fit each other, or a checkpoint that is quantised."""
    stored = stored_bits(config)
    if bits is None and backend is not None:
        raise OpenVLAValueError(
            f"backend={backend!r} has no effect without bits; give bits=8 or bits=4, or leave it out."
        )
    if bits is None or stored is None:
        return
    if bits != stored:
        raise OpenVLAValueError(f"{model} is already quantised to {stored} bits; leave bits out, or load its base.")
    if backend not in (None, stored_backend(config)):
        raise OpenVLAValueError(
            f"{model} is already quantised by {stored_backend(config)}; leave backend out, or load its base."
        )


def _quantization_fields(config: PretrainedConfig) -> dict[str, Any] | None:
    quantization = getattr(config, "quantization_config", None)
    return quantization if quantization is None or isinstance(quantization, dict) else quantization.to_dict()


def init_empty_model(config: OpenVLAConfig) -> OpenVLAForActionPrediction:
    """Return the model on torch's meta device, without weights."""
    with torch.device("meta"):
        return OpenVLAForActionPrediction(config)


def weight_bytes(
    model: OpenVLAForActionPrediction,
    bits: int | None,
    dtype: torch.dtype,
    skip_modules: Sequence[str] = (VISION_TOWERS, *UNQUANTIZED_MODULES),
) -> int:
    """Return the memory of a model's weights in bytes.

    Args:
        model: Unquantised model, with weights or on the meta device.
        bits: 8, 4, or None for unquantised weights.
        dtype: dtype of the unquantised weights.
        skip_modules: Prefixes or suffixes of the names of modules that are not quantised.
    """
    total = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    if bits is None:
        return total
    skipped = tuple(skip_modules)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not (name.startswith(skipped) or name.endswith(skipped)):
            total -= int(module.weight.numel() * (dtype.itemsize - BYTES_OF_BITS[bits]))
    return total


def free_bytes(device: torch.device) -> int | None:
    """Return the free memory of a device in bytes; None if it is unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available if device.type == "cpu" else None


def _require_memory(
    model: str | os.PathLike, config: OpenVLAConfig, bits: int | None, device: torch.device, dtype: torch.dtype | str
) -> None:
    """Raise ValueError if the weights cannot fit on the device, before any weight is read."""
    if dtype == "auto":
        dtype = getattr(config, DTYPE_FIELD, None) or torch.float32
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # a configuration on transformers 4.40
    free = free_bytes(device)
    if free is None:
        return
    empty = init_empty_model(config)
    fields = _quantization_fields(config) or {}
    skip_modules = fields.get("llm_int8_skip_modules") or fields.get("modules_to_not_convert")
    skip_modules = skip_modules or (VISION_TOWERS, *UNQUANTIZED_MODULES)
    needed = {choice: weight_bytes(empty, choice, dtype, skip_modules) * HEADROOM for choice in (None, 8, 4)}
    if needed[bits] <= free:
        return
    fitting = [f"bits={choice} ({needed[choice] / 1e9:.1f} GB)" for choice in (8, 4) if needed[choice] <= free]
    raise OpenVLAValueError(
        f"{model} needs {needed[bits] / 1e9:.1f} GB at {f'{bits} bits' if bits else dtype}, and {device} has "
        f"{free / 1e9:.1f} GB free; {' and '.join(fitting) if fitting else 'neither bits=8 nor bits=4'} would fit."
    )
