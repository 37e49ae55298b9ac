"""Estimate memory and time of a training step from the configuration alone.

Factors are those of steps measured on an H200 (benchmarks/results/training.md); the estimates of memory are within a
tenth of them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import psutil
import torch
from torch import nn

from ..modeling_openvla import OpenVLAForActionPrediction
from .config import FinetuneConfig
from .layers import repeated_layers

# Bytes kept for the backward pass, as multiples of the outputs of the linear layers; compiled, all but these outputs
# and attention's is recomputed.
PLAIN_ACTIVATIONS, COMPILED_ACTIVATIONS = 2.45, 1.75
NF4_BYTES = 0.53  # per weight, with its scales
STEP_EFFICIENCY = 0.5  # time of the matrix products alone / time of a step


def compiles_layers(config: FinetuneConfig) -> bool:
    """Return whether a run compiles its layers."""
    on_gpu = torch.cuda.is_available() and not config.use_cpu
    return config.compile == "layers" or config.compile == "auto" and on_gpu


@dataclass(frozen=True)
class Estimate:
    """Memory and time of a step in one process.

    Attributes:
        trained: Number of trained weights.
        weights: Bytes of the weights that are not trained.
        states: Bytes of trained weights, their gradients and AdamW's moments.
        activations: Bytes kept for the backward pass.
        seconds: Seconds per optimizer step.
        samples: Samples per optimizer step.
    """

    trained: int
    weights: int
    states: int
    activations: int
    seconds: float
    samples: int

    @property
    def total(self) -> int:
        """Return the bytes of all together."""
        return self.weights + self.states + self.activations

    def describe(self, device: torch.device, loader_rate: float) -> str:
        """Return the estimate as text, beside the rate at which one process prepares samples."""
        parts = f"frozen weights {self.weights / 1e9:.2f}, trained weights with gradients and AdamW's state "
        parts += f"{self.states / 1e9:.2f}, activations {self.activations / 1e9:.2f}"
        return (
            f"trains {self.trained / 1e6:.2f} M weights\n"
            f"memory of a process: about {self.total / 1e9:.1f} GB on {device} ({parts})\n"
            f"time: about {self.seconds:.2f} s per optimizer step of {self.samples} samples, "
            f"{self.samples / self.seconds:.1f} samples/s; one process prepares {loader_rate:.0f} samples/s"
        )


def estimate(
    model: OpenVLAForActionPrediction, config: FinetuneConfig, length: int, processes: int, rate: float
) -> Estimate:
    """Estimate a step.

    Args:
        model: Model ready to train, on any device (also "meta").
        config: Configuration of the run.
        length: Tokens of a batch's sequences, without patches.
        processes: Number of processes.
        rate: Multiplications and additions per second of matrix products on a process's device.
    """
    flops, outputs, inputs, largest = 0, 0, 0, 0  # of one sample; outputs and inputs are numbers of values
    for layer, tokens in zip(repeated_layers(model), _tokens(model, length)):
        linear = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
        for module in linear.values():
            passes = 3 if module.weight.requires_grad else 2  # forward, gradient of the input, of the weight
            flops += 2 * passes * tokens * module.in_features * module.out_features
        base = [module for name, module in linear.items() if ".lora_" not in name]
        size = tokens * sum(module.out_features for module in base)
        outputs, inputs, largest = outputs + size, inputs + tokens * base[0].in_features, max(largest, size)
    kept, recomputed = outputs * (COMPILED_ACTIVATIONS if compiles_layers(config) else PLAIN_ACTIVATIONS), 1.0
    if config.gradient_checkpointing and config.gradient_checkpointing_policy == "selective":
        kept = outputs * COMPILED_ACTIVATIONS
    elif config.gradient_checkpointing:
        kept, recomputed = inputs + largest * PLAIN_ACTIVATIONS, 1.5
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    frozen = sum(parameter.nbytes for parameter in model.parameters() if not parameter.requires_grad)
    if config.method == "qlora":
        layers = repeated_layers(model)[: model.config.text_config.num_hidden_layers]
        quantized = [p for layer in layers for p in layer.parameters() if p.ndim == 2 and not p.requires_grad]
        frozen -= int(sum(p.numel() * (p.element_size() - NF4_BYTES) for p in quantized))
    trained_bytes = sum(parameter.nbytes for parameter in trained)
    if config.method == "qlora":  # beside quantised weights adapters are bfloat16; "meta" has none
        trained_bytes = 2 * sum(parameter.numel() for parameter in trained)
    shards = processes if config.distributed == "fsdp" else 1
    samples = config.per_device_train_batch_size * config.gradient_accumulation_steps
    width = 4 if config.use_cpu or not torch.cuda.is_available() else 2
    return Estimate(
        trained=sum(parameter.numel() for parameter in trained),
        weights=frozen // shards,
        states=4 * trained_bytes // shards,
        activations=int(config.per_device_train_batch_size * kept * width),
        seconds=samples * flops * recomputed / (rate * STEP_EFFICIENCY),
        samples=samples * processes,
    )


def _tokens(model: OpenVLAForActionPrediction, length: int) -> list[int]:
    """Return the number of tokens of a sample in each of the repeated layers."""
    backbone = model.vision_backbone
    text = [length + backbone.patches_per_prompt] * model.config.text_config.num_hidden_layers
    image = backbone.num_images * (backbone.featurizer.num_patches + backbone.featurizer.num_prefix_tokens)
    return text + [image] * (len(repeated_layers(model)) - len(text))


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the multiplications and additions per second of matrix products on a device."""
    size = 8192 if device.type == "cuda" else 1024
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        float((matrix @ matrix)[0, 0])  # waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def device_memory(device: torch.device) -> int:
    """Return the bytes of memory that a device has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total
