"""What a fine-tuning run is told: by a YAML file, by flags, or both."""

from __future__ import annotations

import argparse
import json
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from ..data.doctor import validate_check_names
from ..data.presets import AUTO
from ..data.utils import require
from ..errors_openvla import OpenVLAValueError

# The ways of the paper's table; LoRA is one of its adapters' targets, QLoRA the same beside 4-bit weights.
METHODS = ("lora", "qlora", "full", "frozen-vision", "sandwich", "last-layer")
LORA_METHODS = ("lora", "qlora")
DECAYS = ("constant", "cosine", "step")
STEP_DECAY = 0.1  # of "step": OFT's tenfold
PARALLELISMS = ("ddp", "fsdp")
TRACKERS = ("tensorboard", "wandb", "trackio")


@dataclass
class FinetuneConfig:
    """A run. Every field is a key of the YAML file and a flag (``--max-steps``).

    Attributes:
        model: Folder or Hub id of what is fine-tuned.
        data: Folder of demonstrations, or a list of mappings: ``path``, and where needed ``weight`` and what else
            ``open_dataset`` takes (``preset``, ``fields``, ``split``, ``name``).
        preset: As ``open_dataset`` takes it ("none" takes none), of data that has no ``preset`` of its own.
        output: Folder to write; a run that stands there already goes on, if it is the same: ``run_fingerprint`` names
            the fields that may change.
        method: One of ``METHODS``.
        answer: Fields of ``enable_parallel_decoding`` for OpenVLA-OFT, and ``platform`` for those of ``PLATFORMS``;
            None trains what the model is.
        batch_size: Steps of demonstrations a process and pass.
        accumulation: Passes before the weights move.
        max_steps: How often the weights move.
        learning_rate: Of AdamW.
        weight_decay: Of AdamW.
        warmup_steps: Steps over which the rate rises from zero.
        decay: "constant", "cosine" to zero at ``max_steps``, or "step": a tenth from ``decay_step`` on.
        decay_step: Of "step".
        max_grad_norm: Gradients are clipped to it; without, fine-tunes have been seen to collapse.
        lora_rank: Of LoRA.
        lora_alpha: Of LoRA.
        lora_dropout: Of LoRA.
        lora_targets: Of LoRA; as ``enable_lora`` takes them.
        skip_bad: Leave out episodes that cannot be used, and count them; else the first one stops the run.
        accept: Names of checks (``data_doctor.CHECKS``) whose certain findings are to be a warning.
        shuffle_buffer: Samples to shuffle among.
        pad_last_chunk: False: a chunk starts only where the episode still has all its actions, as OpenVLA-OFT trains,
            so that shorter episodes are left out. True: it starts at every step; beyond the episode's end its last
            action repeats and is trained on.
        augment: Crop and colour changes, as the reference trains; the result's processor then prepares images as its
            evaluation does, and else leaves them as they are (``image_preset``).
        parallelism: Of several processes. "ddp": each holds the model. "fsdp" (FSDP2): each holds its share of every
            weight, gradient and moment, and layers are gathered when they run.
        gradient_checkpointing: Less memory, about a third more time.
        workers: Processes that read data.
        save_steps: How often a checkpoint is written.
        keep: Newest checkpoints that stay.
        log_steps: How often metrics are written.
        tracker: One of ``TRACKERS``, beside metrics.jsonl.
        feed_back: Training steps that are answered after the training, to see whether they were learnt.
        seed: Of everything drawn.
        device: "cpu" to stay there; None is the GPU where there is one.
    """

    model: str
    output: str
    data: Any = None
    preset: str | None = AUTO
    method: str = "lora"
    answer: dict[str, Any] | None = None
    batch_size: int = 16
    accumulation: int = 1
    max_steps: int = 10_000
    learning_rate: float = 5e-4
    weight_decay: float = 0.01
    warmup_steps: int = 0
    decay: str = "constant"
    decay_step: int | None = None
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
    parallelism: str = "ddp"
    gradient_checkpointing: bool = False
    workers: int = 0
    save_steps: int = 1000
    keep: int = 2
    log_steps: int = 10
    tracker: str | None = None
    feed_back: int = 64
    seed: int = 0
    device: str | None = None

    def __post_init__(self) -> None:
        """Check what can be checked before anything is read."""
        self._read_numbers()
        choices = {
            "method": METHODS,
            "decay": DECAYS,
            "parallelism": PARALLELISMS,
            "pad_last_chunk": (False, True),
            "tracker": (None, *TRACKERS),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise OpenVLAValueError(f"Unknown {name} {getattr(self, name)!r}; allowed: {list(allowed)}.")
        if isinstance(self.accept, str):
            raise OpenVLAValueError(f"accept must be a list of names, got {self.accept!r}.")
        self.accept = list(self.accept or ())
        validate_check_names(self.accept)
        if self.method == "qlora" and self.parallelism == "fsdp":
            raise OpenVLAValueError(
                "4-bit weights cannot be spread over processes; take method: lora, or parallelism: ddp."
            )
        if self.decay == "step" and self.decay_step is None:
            raise OpenVLAValueError("decay='step' needs decay_step.")
        defaults = {one.name: one.default for one in fields(self)}
        unused = ["decay_step"] if self.decay != "step" else []
        unused += [name for name in defaults if name.startswith("lora_") and self.method not in LORA_METHODS]
        for name in unused:
            if getattr(self, name) != defaults[name]:
                raise OpenVLAValueError(
                    f"{name} is {getattr(self, name)!r}, which method: {self.method} with decay: {self.decay} does not "
                    f"use; leave it out, or take {'decay: step' if name == 'decay_step' else 'method: lora'}."
                )
        for name in ("batch_size", "accumulation", "max_steps", "save_steps", "keep", "log_steps"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise OpenVLAValueError(f"{name} must be a whole number, 1 or more, got {getattr(self, name)!r}.")
        if not self.learning_rate > 0 or not self.max_grad_norm > 0:
            raise OpenVLAValueError("learning_rate and max_grad_norm must be positive.")

    def _read_numbers(self) -> None:
        """Read numbers that YAML gives as text: ``5e-4``, which has no point."""
        for one in fields(self):
            value = getattr(self, one.name)
            if typing.get_type_hints(type(self))[one.name] is float and isinstance(value, str):
                try:
                    setattr(self, one.name, float(value))
                except ValueError:
                    raise OpenVLAValueError(f"{one.name} must be a number, got {value!r}.") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``openvla finetune``: one a field of :class:`FinetuneConfig`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("config", nargs="?", type=Path, metavar="CONFIG.yaml", help="fields by name; flags win")
    hints = typing.get_type_hints(FinetuneConfig)
    for one in fields(FinetuneConfig):
        flag, default = f"--{one.name.replace('_', '-')}", "" if one.default is MISSING else f"default {one.default}"
        if hints[one.name] is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=default)
            continue
        kind = {int: int, float: float, int | None: int}.get(hints[one.name], str)
        if one.name == "accept":
            parser.add_argument(
                flag, action="append", metavar="NAME", help="go on after this check's finding; repeatable"
            )
            continue
        parse = json.loads if one.name == "answer" else kind
        parser.add_argument(flag, type=parse, metavar="JSON" if parse is json.loads else None, help=default)


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    content = require("yaml", "A configuration file").safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise OpenVLAValueError(f"{file} must hold a mapping of fields, got {type(content).__name__}.")
    return content


def as_config(given: Mapping[str, Any], source: Any = None) -> FinetuneConfig:
    """A run of these fields.

    Raises:
        ValueError: A field is unknown or missing.
    """
    known = [one.name for one in fields(FinetuneConfig)]
    unknown = sorted(set(given) - set(known))
    missing = [name for name in ("model", "output") if given.get(name) is None]
    if unknown or missing:
        where = f" in {source}" if source else ""
        raise OpenVLAValueError(f"Unknown fields{where}: {unknown}, missing: {missing}. Known: {known}.")
    return FinetuneConfig(**given)


def rate(config: FinetuneConfig, step: int) -> float:
    """The learning rate's factor at a step."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.decay == "cosine":
        done = min(1.0, max(0, step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps))
        return warm * 0.5 * (1 + float(np.cos(np.pi * done)))
    return warm * (STEP_DECAY if config.decay == "step" and step >= config.decay_step else 1.0)
