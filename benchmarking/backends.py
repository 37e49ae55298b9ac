"""Backends of ``openvla bench``: the ways in which this package, and transformers, run a model.

To add a backend, add its name and its stages to ``build_backends``; a stage is a function of the index of an input that
returns token ids, an array of features, or the values of continuous actions.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from ..compatibility_openvla import DTYPE_FIELD
from ..decoding_openvla import decode_greedily
from ..inference.cpu_prepack import has_matmul, prepack
from ..inference.cuda_graphs import drop_graphs, run_graphed
from ..inference.fast_decoder import compile_pointwise, decode_fast
from ..inference.merged_products import merge_products
from ..inference.policy import Policy
from ..inference.predict import SAMPLE_IMAGE
from ..inference.quantization import quantization_config
from ..modeling_openvla import OpenVLAForActionPrediction
from ..processing_openvla import OpenVLAProcessor
from .reference import ACTION, BATCHES, FIRST_TOKEN, PIXELS, TOWERS, batch_indices, measure_call, preprocessing_stages
from .sizes import CHUNK_FIELDS, INSTRUCTIONS, build_model, sample_inputs

PLAIN, FAST = "openvla, fast=False", "openvla"
DRAFT_CORRECT, DRAFT_WRONG = "openvla, correct draft", "openvla, wrong draft"
PREPACKED = "openvla, prepack"
COMPILED = "openvla, compile"
STATIC_CACHE = "transformers, static cache"  # transformers' own fast path
CHUNK = "OFT chunk: LIBERO, L1, 2 images, proprio"
# Quantised backends by name: the arguments of quantization_config.
QUANTIZED: dict[str, dict[str, Any]] = {
    "nf4": {"bits": 4},
    "8 bits": {"bits": 8},
    "8 bits, torchao": {"bits": 8, "backend": "torchao"},
}
FRAME_SIZE = (640, 480)  # of a camera, for the answers after warm-up
NUM_ANSWERS = 10

# Stages of a backend by name.
Benchmark = dict[str, Callable[[int], Any]]


class ModelRunner:
    """Runs the stages of the benchmark with one model.

    Args:
        model: The model.
        processor: Its processor.
        prompts: int64 ``(1, length)`` per input.
        images: uint8 ``(inputs, height, width, 3)``.
    """

    def __init__(
        self,
        model: OpenVLAForActionPrediction,
        processor: OpenVLAProcessor,
        prompts: list[torch.LongTensor],
        images: np.ndarray,
    ) -> None:
        self.model, self.processor, self.prompts, self.images = model, processor, prompts, images
        self.pixels = [self.preprocess(image) for image in images]
        self.actions: dict[int, np.ndarray] = {}  # of every input, from which drafts are made

    @classmethod
    def build(cls, size: str, *, dtype: str, device: str, num_inputs: int) -> ModelRunner:
        """Build a model of a size on its device, and inputs for it."""
        model, processor = build_model(size, device, getattr(torch, dtype))
        if model.device.type == "cuda":
            merge_products(model.language_model)
        texts, images = sample_inputs(num_inputs)
        prompts = [processor(instruction=text, images=images[0])["input_ids"].to(device) for text in texts]
        return cls(model, processor, prompts, images)

    def with_model(self, model: OpenVLAForActionPrediction) -> ModelRunner:
        """Return a runner of another model on the same inputs."""
        runner = copy.copy(self)
        runner.model = model
        return runner

    def preprocess(self, image: np.ndarray) -> torch.FloatTensor:
        """Return an image as pixel values ``(1, channels, size, size)`` of the model's device and dtype."""
        pixel_values = self.processor.image_processor(image, return_tensors="pt")["pixel_values"]
        return pixel_values.to(self.model.device, self.model.dtype)

    def action(self, index: int, **options: Any) -> list[int]:
        """Predict the action of an image and a prompt; ``options`` are those of ``predict_action``."""
        pixels = self.preprocess(self.images[index])
        output: Any = self.model.predict_action(self.prompts[index], pixels, return_dict=True, **options)
        return output.token_ids.tolist()

    def action_from_pixels(self, index: int, **options: Any) -> list[int]:
        """Predict the action of pixel values and a prompt; ``options`` are those of ``predict_action``."""
        output: Any = self.model.predict_action(self.prompts[index], self.pixels[index], return_dict=True, **options)
        return output.token_ids.tolist()

    def predict_drafts(self) -> None:
        """Predict the action of every input that the model confirms when it is the draft.

        Verifying a draft may round otherwise than decoding one token after the other, so the first prediction may not
        be confirmed. Every round confirms at least one token more.
        """
        for index, (ids, pixels) in enumerate(zip(self.prompts, self.pixels)):
            action = np.asarray(self.model.predict_action(ids, pixels))
            for _ in action:
                draft, action = action, np.asarray(self.model.predict_action(ids, pixels, draft=action))
                if np.array_equal(draft, action):
                    break
            self.actions[index] = action

    def action_from_correct_draft(self, index: int) -> list[int]:
        """Predict with the action of ``predict_drafts`` as the draft."""
        return self.action_from_pixels(index, draft=self.actions[index], fast=True)

    def action_from_wrong_draft(self, index: int) -> list[int]:
        """Predict with a draft that differs from the action of ``predict_drafts`` in every dimension."""
        return self.action_from_pixels(index, draft=-self.actions[index] + 0.013, fast=True)

    def batch(self, index: int, *, size: int, fast: bool) -> list[list[int]]:
        """Predict the actions of a batch of pixel values."""
        indices = batch_indices(index, len(self.prompts), size)
        prompts = [self.prompts[i][0] for i in indices]
        ids: Any = pad_sequence(prompts, batch_first=True, padding_value=self.model.pad_token_id)
        mask = pad_sequence([torch.ones_like(prompt) for prompt in prompts], batch_first=True)
        pixels: Any = torch.cat([self.pixels[i] for i in indices])
        output: Any = self.model.predict_action(ids, pixels, mask, return_dict=True, fast=fast)
        return output.token_ids.tolist()

    @torch.no_grad()
    def first_token(self, index: int, *, fast: bool) -> list[int]:
        """Predict the first token of pixel values (the prefill)."""

        def compute(ids: torch.LongTensor, pixel_values: torch.FloatTensor) -> tuple[torch.Tensor, torch.Tensor]:
            embeddings: Any = self.model.embed_inputs(ids, pixel_values)
            embeds, mask = embeddings[:2]
            if fast:
                return decode_fast(self.model.language_model, embeds, mask, 1)
            return decode_greedily(self.model.language_model, embeds, mask, 1, end_ids=None)

        inputs = self.prompts[index], self.pixels[index]
        tokens, _ = run_graphed(self.model, compute, inputs, FIRST_TOKEN) if fast else compute(*inputs)
        return tokens[0].tolist()

    @torch.no_grad()
    def towers(self, index: int, *, fast: bool) -> np.ndarray:
        """Compute the features of the vision towers."""

        def compute(pixel_values: torch.Tensor) -> tuple[torch.Tensor]:
            return (self.model.vision_backbone(pixel_values),)

        pixels = self.pixels[index]
        (features,) = run_graphed(self.model, compute, [pixels], TOWERS) if fast else compute(pixels)
        return features.float().cpu().numpy()

    def stages(self, *, fast: bool) -> Benchmark:
        """Return all stages, with the fast decoder or without."""
        methods: dict[str, Callable[..., Any]] = {
            ACTION: self.action,
            PIXELS: self.action_from_pixels,
            FIRST_TOKEN: self.first_token,
            TOWERS: self.towers,
            **{stage: functools.partial(self.batch, size=size) for size, stage in BATCHES.items()},
        }
        return {stage: functools.partial(method, fast=fast) for stage, method in methods.items()}


def build_backends(runner: ModelRunner, compiled: bool) -> dict[str, Benchmark]:
    """Return the backends of this package and of transformers by name, plain decoding first.

    Args:
        runner: Runner of the model.
        compiled: Add a backend whose pointwise operations are compiled, and on a GPU transformers' static cache.
    """
    backends: dict[str, Benchmark] = {
        PLAIN: {**runner.stages(fast=False), **preprocessing_stages(runner.processor.image_processor)},
        FAST: runner.stages(fast=True),
        DRAFT_CORRECT: {PIXELS: runner.action_from_correct_draft},
        DRAFT_WRONG: {PIXELS: runner.action_from_wrong_draft},
    }
    model = runner.model
    if compiled or model.device.type == "cpu":  # on a GPU transformers compiles it
        backends[STATIC_CACHE] = {ACTION: functools.partial(runner.action, cache_implementation="static")}
    if compiled:
        fused = copy.copy(model)  # shares the weights
        fused._modules = {**model._modules, "language_model": copy.copy(model.language_model)}
        compile_pointwise(fused)
        backends[COMPILED] = {ACTION: functools.partial(runner.with_model(fused).action, fast=True)}
    if model.device.type == "cpu" and has_matmul(model.dtype):
        prepacked = copy.deepcopy(model)
        prepack(prepacked)
        backends[PREPACKED] = {ACTION: functools.partial(runner.with_model(prepacked).action, fast=True)}
    return backends


def quantized_backends(runner: ModelRunner, name: str) -> Benchmark:
    """Return backends of a copy of the model with 8- or 4-bit weights, each a function of the index of an input.

    Nothing is written: the weights on the device are quantised as those of a checkpoint are while it loads.

    Args:
        runner: Runner of the unquantised model.
        name: One of ``QUANTIZED``.
    """
    model = runner.model
    kwargs: dict[str, Any] = {DTYPE_FIELD: model.dtype}
    quantized = OpenVLAForActionPrediction.from_pretrained(
        None,
        config=copy.deepcopy(model.config),
        state_dict=model.state_dict(),
        quantization_config=quantization_config(**QUANTIZED[name]),
        device_map={"": str(model.device)},
        **kwargs,
    ).eval()
    predict = runner.with_model(quantized).action_from_pixels
    return {
        f"openvla, {name}, fast=False": functools.partial(predict, fast=False),
        f"openvla, {name}": predict,
    }


def chunk_backends(size: str, *, dtype: str, device: str, num_inputs: int) -> Benchmark:
    """Return backends of OpenVLA-OFT's model for LIBERO: functions of the index of an input that predict a chunk.

    Args:
        size: Model size.
        dtype: Name of the model's dtype.
        device: Device of the model.
        num_inputs: Number of inputs; each has two different images and a robot state.
    """
    model, processor = build_model(size, device, getattr(torch, dtype), **CHUNK_FIELDS)
    if model.device.type == "cuda":
        merge_products(model.language_model)
    texts, images = sample_inputs(num_inputs + 1)
    inputs = [
        processor(instruction=text, images=[images[i], images[i + 1]]) for i, text in enumerate(texts[:num_inputs])
    ]
    pixels = [one["pixel_values"].to(device, model.dtype) for one in inputs]
    states = np.random.RandomState(0).uniform(-1, 1, (num_inputs, CHUNK_FIELDS["proprio_dim"]))

    def chunk(index: int, **options: Any) -> list[list[float]]:
        ids: Any = inputs[index]["input_ids"].to(device)
        action: Any = model.predict_action(ids, pixels[index], proprio=states[index], **options)
        return action.tolist()

    return {PLAIN: functools.partial(chunk, fast=False), FAST: chunk}


def answers_after_warmup(runner: ModelRunner) -> tuple[float, list[float]]:
    """Warm up a policy of the model, then act on camera frames; return seconds of the warm-up and of every answer."""
    drop_graphs(runner.model)
    policy = Policy(runner.model, runner.processor, runner.model.resolve_unnorm_key(None), constrain_actions=True)
    frame = Image.open(SAMPLE_IMAGE).convert("RGB").resize(FRAME_SIZE)
    device = str(runner.model.device)
    warmup = measure_call(lambda _: policy.warm_up(INSTRUCTIONS[:1]), 0, device)["seconds"]
    answers = [measure_call(lambda _: policy.act(frame, INSTRUCTIONS[0]), 0, device) for _ in range(NUM_ANSWERS)]
    return warmup, [answer["seconds"] for answer in answers]
