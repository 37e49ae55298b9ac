"""Configuration of ``openvla finetune``: a dataclass, read from a YAML file, command-line options, or both."""

from __future__ import annotations

import argparse
import inspect
import json
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from ..actions_openvla import nearest_name
from ..data.doctor import validate_check_names
from ..data.presets import AUTO
from ..data.remote import local_path
from ..data.utils import parse_yaml
from ..errors_openvla import OpenVLAValueError

# The fine-tuning strategies of the OpenVLA paper (https://arxiv.org/abs/2406.09246, table 1), and QLoRA.
METHODS = ("lora", "qlora", "full", "frozen-vision", "sandwich", "last-layer")
LORA_METHODS = ("lora", "qlora")
# transformers' names, and OpenVLA-OFT's "step".
SCHEDULER_TYPES = ("constant", "constant_with_warmup", "linear", "cosine", "step")
STEP_DECAY_FACTOR = 0.1
TRACKERS = ("tensorboard", "wandb", "trackio")
POSITIVE_INTEGERS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_steps",
    "save_steps",
    "save_total_limit",
    "logging_steps",
)
NON_NEGATIVE_INTEGERS = ("warmup_steps", "shuffle_buffer", "dataloader_num_workers", "num_train_eval_samples", "seed")
MAX_SEED = 2**32 - 1  # numpy's


@dataclass
class FinetuneConfig:
    """Configuration of a fine-tuning run; fields that ``transformers.TrainingArguments`` has too have its names.

    Every field is a key of the YAML file and a command-line option (``max_steps`` is ``--max-steps``).

    Attributes:
        model: Folder or Hub id of the model to fine-tune.
        output_dir: Folder to write. If it holds checkpoints of the same run, training continues from the newest one;
            ``run_fingerprint.FREE_FIELDS`` lists the fields that may differ.
        data: Dataset folder or its URL, or a list of mappings with ``path`` and optionally ``weight`` and arguments of
            ``open_dataset`` (``preset``, ``fields``, ``split``, ``name``).
        preset: Dataset preset, an argument of ``open_dataset``, for entries of ``data`` without their own;
            "none" disables presets.
        method: Fine-tuning strategy, one of ``METHODS``.
        action_config: Arguments of ``enable_parallel_decoding`` for an OpenVLA-OFT model, and optionally ``platform``,
            a key of ``PLATFORMS`` that supplies defaults for them. None keeps the model's action configuration.
        per_device_train_batch_size: Per-process micro-batch size.
        gradient_accumulation_steps: Micro-batches per optimizer step.
        max_steps: Number of optimizer steps.
        learning_rate: Peak AdamW learning rate.
        weight_decay: AdamW weight decay.
        warmup_steps: Optimizer steps over which the learning rate rises linearly from zero.
        lr_scheduler_type: Learning-rate schedule after the warm-up: "constant" (without warm-up),
            "constant_with_warmup", "linear" or "cosine" (to zero at ``max_steps``), or "step" (multiplied by 0.1 from
            ``num_steps_before_decay`` on, as in OpenVLA-OFT).
        num_steps_before_decay: Optimizer step at which the "step" schedule lowers the learning rate.
        max_grad_norm: Maximum gradient norm for clipping.
        lora_rank: LoRA rank.
        lora_alpha: LoRA scaling numerator: updates are scaled by ``lora_alpha / lora_rank``.
        lora_dropout: LoRA dropout probability.
        lora_targets: Modules that get a LoRA adapter, an argument of ``enable_lora``.
        skip_bad: Leave out and count episodes that cannot be read or are invalid; otherwise the first one raises.
        accept: Names of data checks (``data.doctor.CHECKS``) whose certain findings only warn.
        shuffle_buffer: Number of samples in the shuffle buffer.
        pad_last_chunk: Start action chunks at every step and pad them at the end of an episode with its last action.
            False, as in OpenVLA-OFT, starts chunks only where the episode has all of their actions; episodes shorter
            than a chunk are left out. VQ chunks are padded with rest, as in openvla-mini, which trains with True: 0 in
            the normalised dimensions, the last value in the others (the gripper).
        augment: Apply the reference's image augmentation (random crop and colour jitter; for a TraceVLA no crop), alike
            to all moments of a history. The saved processor then
            prepares images as the reference's evaluation does (``image_preset``).
        augment_on_device: Augment on the training's device, with the same parameters and bits, in place of the loader's
            processes: for many samples a second on few cores. A TraceVLA is augmented by the loader nevertheless.
        token_loss: Loss of a model that predicts tokens one by one: "full" (cross entropy of action and end tokens over
            the vocabulary), "action_token_only" (of action tokens, over the action tokens), or "auto": as the authors
            train, "action_token_only" for a TraceVLA and "full" for all others.
        trace_dropout: For a TraceVLA, the fraction of frames with a trace that are shown without it.
        distributed: Strategy for several processes: "ddp" replicates the model, "fsdp" (FSDP2) shards parameters,
            gradients and optimizer state.
        compile: What ``torch.compile`` compiles: "layers" (each kind of layer of the language model and the towers
            once), "none", or "auto": layers on a GPU, nothing on a CPU.
        adapter_dtype: Dtype of LoRA matrices in training: "fp32" under autocast, or "bf16" without it: faster, but an
            update smaller than 1/256 of a weight is lost. "bf16" needs a base in bfloat16, so a GPU.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, slower steps.
        gradient_checkpointing_policy: What is recomputed: "full" layers, or "selective": all but matrix products and
            attention.
        dataloader_num_workers: DataLoader worker processes of each training process.
        save_steps: Optimizer steps between two checkpoints.
        save_total_limit: Number of newest checkpoints to keep.
        logging_steps: Optimizer steps between two lines of metrics.
        report_to: Experiment tracker in addition to metrics.jsonl, one of ``TRACKERS``, or "none".
        num_train_eval_samples: Training samples to predict after training as a memorization check; 0 for none.
        seed: Random seed for data order, augmentation, new weights and dropout.
        use_cpu: Train on the CPU even if a GPU is available.

    Raises:
        OpenVLAValueError: A value is not allowed, or set although the run does not use it.
    """

    model: str
    output_dir: str
    data: Any = None
    preset: str | None = AUTO
    method: str = "lora"
    action_config: dict[str, Any] | None = None
    per_device_train_batch_size: int = 16
    gradient_accumulation_steps: int = 1
    max_steps: int = 10_000
    learning_rate: float = 5e-4
    weight_decay: float = 0.01
    warmup_steps: int = 0
    lr_scheduler_type: str = "constant"
    num_steps_before_decay: int | None = None
    max_grad_norm: float = 1.0
    lora_rank: int = 32
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    lora_targets: str = "all-linear"
    skip_bad: bool = False
    accept: Sequence[str] = ()
    shuffle_buffer: int = 10_000
    pad_last_chunk: bool = False
    augment: bool = True
    augment_on_device: bool = False
    token_loss: str = "auto"
    trace_dropout: float = 0.2
    distributed: str = "ddp"
    compile: str = "auto"
    adapter_dtype: str = "fp32"
    gradient_checkpointing: bool = False
    gradient_checkpointing_policy: str = "full"
    dataloader_num_workers: int = 0
    save_steps: int = 1000
    save_total_limit: int = 2
    logging_steps: int = 10
    report_to: str = "none"
    num_train_eval_samples: int = 64
    seed: int = 0
    use_cpu: bool = False

    def __post_init__(self) -> None:
        """Check everything that can be checked before files are read."""
        self._check_types()
        self._check_choices()
        self._check_combinations()
        self._check_ranges()
        local_path(self.output_dir, "upload its model with openvla publish")

    def _check_types(self) -> None:
        """Check booleans, and convert numbers that YAML 1.1 reads as text, such as ``5e-4``."""
        hints = typing.get_type_hints(type(self))
        for name, value in vars(self).items():
            if hints[name] is bool and not isinstance(value, bool):
                raise OpenVLAValueError(f"{name} must be true or false, got {value!r}.")
            if hints[name] is float and isinstance(value, str):
                try:
                    setattr(self, name, float(value))
                except ValueError:
                    raise OpenVLAValueError(f"{name} must be a number, got {value!r}.") from None

    def _check_choices(self) -> None:
        choices = {
            "method": METHODS,
            "lr_scheduler_type": SCHEDULER_TYPES,
            "distributed": ("ddp", "fsdp"),
            "compile": ("auto", "layers", "none"),
            "adapter_dtype": ("fp32", "bf16"),
            "gradient_checkpointing_policy": ("full", "selective"),
            "token_loss": ("auto", "full", "action_token_only"),
            "report_to": ("none", *TRACKERS),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise OpenVLAValueError(f"Unknown {name} {getattr(self, name)!r}; allowed: {list(allowed)}.")
        if isinstance(self.accept, str):
            raise OpenVLAValueError(f"accept must be a list of names, got {self.accept!r}.")
        self.accept = list(self.accept or ())
        validate_check_names(self.accept)

    def _check_combinations(self) -> None:
        if self.method == "qlora" and self.distributed == "fsdp":
            raise OpenVLAValueError("4-bit weights cannot be sharded; use method: lora, or distributed: ddp.")
        if self.lr_scheduler_type == "step" and self.num_steps_before_decay is None:
            raise OpenVLAValueError("lr_scheduler_type: step needs num_steps_before_decay.")
        used_by: dict[str, tuple[str, tuple[Any, ...]]] = {
            "num_steps_before_decay": ("lr_scheduler_type", ("step",)),
            "warmup_steps": ("lr_scheduler_type", SCHEDULER_TYPES[1:]),
            "gradient_checkpointing_policy": ("gradient_checkpointing", (True,)),
            "augment_on_device": ("augment", (True,)),
            "adapter_dtype": ("method", LORA_METHODS),
        }
        used_by |= {field.name: ("method", LORA_METHODS) for field in fields(self) if field.name.startswith("lora_")}
        for field in fields(self):
            if field.name not in used_by or getattr(self, field.name) == field.default:
                continue
            option, values = used_by[field.name]
            if getattr(self, option) not in values:
                raise OpenVLAValueError(
                    f"{field.name} is {getattr(self, field.name)!r}, which {option}: {getattr(self, option)} does not "
                    f"use; remove it, or use {option}: {values[0]}."
                )

    def _check_ranges(self) -> None:
        minima = {**dict.fromkeys(POSITIVE_INTEGERS, 1), **dict.fromkeys(NON_NEGATIVE_INTEGERS, 0)}
        for name, minimum in minima.items():
            if not isinstance(getattr(self, name), int) or getattr(self, name) < minimum:
                raise OpenVLAValueError(
                    f"{name} must be an integer of at least {minimum}, got {getattr(self, name)!r}."
                )
        if self.seed > MAX_SEED:
            raise OpenVLAValueError(f"seed must be at most {MAX_SEED}, got {self.seed}.")
        if not self.learning_rate > 0 or not self.max_grad_norm > 0:
            raise OpenVLAValueError("learning_rate and max_grad_norm must be positive.")
        if not 0 <= self.trace_dropout <= 1:
            raise OpenVLAValueError(f"trace_dropout must be from 0 to 1, got {self.trace_dropout}.")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one option per field of :class:`FinetuneConfig`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "config", nargs="?", type=Path, metavar="CONFIG.yaml", help="fields by name; options take precedence"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the first samples, what is trained, and memory and time to expect; train nothing",
    )
    hints = typing.get_type_hints(FinetuneConfig)
    types: dict[Any, Any] = {int: int, float: float, int | None: int}
    descriptions = _field_descriptions()
    for field in fields(FinetuneConfig):
        option = f"--{field.name.replace('_', '-')}"
        default = "" if field.default is MISSING else f" Default {field.default}."
        help_text = (descriptions.get(field.name, "") + default).replace("%", "%%")
        if hints[field.name] is bool:
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=None, help=help_text)
        elif field.name == "accept":
            parser.add_argument(
                option, action="append", metavar="NAME", help="continue despite this check's finding; repeatable"
            )
        elif field.name == "action_config":
            parser.add_argument(option, type=json.loads, metavar="JSON", help=help_text)
        else:
            parser.add_argument(option, type=types.get(hints[field.name], str), help=help_text)


def _field_descriptions() -> dict[str, str]:
    """Return what the docstring of ``FinetuneConfig`` says of every field, as help for its option."""
    _, _, attributes = (inspect.getdoc(FinetuneConfig) or "").partition("Attributes:\n")
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", attributes.partition("\n\n")[0], re.MULTILINE)
    return {name: " ".join(text.replace("``", "").split()) for name, text in entries}


def read_yaml(file: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        OpenVLAValueError: The file is a folder or not valid YAML, or holds something else.
    """
    if file.is_dir():
        raise OpenVLAValueError(f"{file} is a folder, where it must be a YAML file of openvla finetune.")
    return parse_yaml(file.read_bytes(), str(file))


def config_from_dict(values: Mapping[str, Any], source: Any = None) -> FinetuneConfig:
    """Create a configuration from fields by name.

    Args:
        values: The fields.
        source: Where they were read, for messages.

    Raises:
        OpenVLAValueError: A field is unknown, missing, or has a value that is not allowed.
    """
    known = [field.name for field in fields(FinetuneConfig)]
    unknown = sorted(set(values) - set(known))
    missing = [name for name in ("model", "output_dir") if values.get(name) is None]
    if unknown or missing:
        nearest = {name: nearest_name(name, known) for name in unknown}
        hints = "".join(f" Did you mean {field} by {name}?" for name, field in nearest.items() if field)
        location = f" in {source}" if source else ""
        raise OpenVLAValueError(f"Unknown fields{location}: {unknown}, missing: {missing}.{hints} Known: {known}.")
    return FinetuneConfig(**values)


def lr_lambda(config: FinetuneConfig, step: int) -> float:
    """Return the factor of the learning rate at an optimizer step (counted from 0)."""
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    kind = config.lr_scheduler_type
    if kind in ("linear", "cosine"):
        decay_steps = max(1, config.max_steps - config.warmup_steps)
        progress = min(1.0, max(0, step - config.warmup_steps) / decay_steps)
        return warmup * (1 - progress if kind == "linear" else 0.5 * (1 + float(np.cos(np.pi * progress))))
    if config.num_steps_before_decay is not None and step >= config.num_steps_before_decay:
        return warmup * STEP_DECAY_FACTOR
    return warmup
