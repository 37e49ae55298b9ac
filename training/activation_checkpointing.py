"""Activation checkpointing in every part of a model, on every version of transformers."""

from __future__ import annotations

from typing import Any


def enable_checkpointing(model: Any) -> None:
    """Compute activations anew in the backward pass, in every part of the model, without reentrance."""
    # 5.24 renamed gradient checkpointing to activation checkpointing; the old methods warn, and go in 6.0.
    old = not hasattr(model, "activation_checkpointing_enable")
    enable = model.gradient_checkpointing_enable if old else model.activation_checkpointing_enable
    enable({"use_reentrant": False})


def disable_checkpointing(model: Any) -> None:
    """Keep activations for the backward pass again."""
    old = not hasattr(model, "activation_checkpointing_disable")
    (model.gradient_checkpointing_disable if old else model.activation_checkpointing_disable)()
