"""Training loss of tokens from logits at the labels alone, for a fraction of the memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..decoding_openvla import set_argument_names
from ..errors_openvla import OpenVLAValueError
from ..prismatic_openvla import IGNORE_INDEX, PrismaticCausalLMOutputWithPast, PrismaticForConditionalGeneration


def loss_at_labels(
    model: PrismaticForConditionalGeneration,
    labels: torch.Tensor | None,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    settings: dict[str, Any],
) -> PrismaticCausalLMOutputWithPast:
    """Run a training pass that applies the LM head to the positions before a label only.

    Args:
        model: The model; ``loading.attach_package`` makes this its method.
        labels: int64 ``(batch, length)``, -100 on positions without loss. On the host they make no step wait.
        input_ids: As the language model takes them, like the next three; patches are embedded already.
        attention_mask: ``(batch, length)``, or None.
        position_ids: int64 ``(batch, length)``, or None.
        inputs_embeds: ``(batch, length, hidden)``, or None.
        settings: Arguments of ``forward`` that must not be set.

    Returns:
        The loss, and float32 logits ``(labelled positions, padded vocabulary)`` in the order of the labels.

    Raises:
        ValueError: There are no labels, or one of ``settings`` is set.
    """
    unused = set_argument_names(settings)
    if unused:
        raise OpenVLAValueError(f"logits_at_labels gives loss and logits alone; leave it out, or {unused}.")
    if labels is None:
        raise OpenVLAValueError("logits_at_labels needs labels.")
    hidden = model.get_decoder()(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        inputs_embeds=inputs_embeds,
        use_cache=False,
        return_dict=True,
    ).last_hidden_state
    logits, loss = compute_token_loss(labels, hidden, model.get_output_embeddings())
    return PrismaticCausalLMOutputWithPast(loss=loss, logits=logits)


def compute_token_loss(
    labels: torch.Tensor, hidden: torch.Tensor, head: nn.Module
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float32 logits ``(labelled positions, vocabulary)`` that predict the labels, and their cross entropy."""
    samples, positions = (labels[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
    targets = to_device(labels[samples, positions + 1], hidden.device)
    logits = head(hidden[to_device(samples, hidden.device), to_device(positions, hidden.device)]).float()
    return logits, nn.functional.cross_entropy(logits, targets.to(logits.device))


def action_labels(labels: torch.Tensor, action_ids: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where among all labels, in their order, the action tokens are, and those tokens; both int64, on the host.

    Args:
        labels: int64 ``(batch, length)``, -100 on positions without loss.
        action_ids: Ids of the action tokens.
    """
    targets = labels[labels != IGNORE_INDEX]
    positions = ((targets >= action_ids.start) & (targets < action_ids.stop)).nonzero()[:, 0]
    return positions, targets[positions]


def action_token_loss(logits: torch.Tensor, labels: torch.Tensor, action_ids: slice) -> torch.Tensor:
    """Return the cross entropy of action tokens among action tokens alone, as TraceVLA's training computes it.

    The end token has no loss, and logits of other tokens are not seen.

    Args:
        logits: float32 ``(labelled positions, vocabulary)``, of :func:`loss_at_labels`.
        labels: As for :func:`action_labels`.
        action_ids: As for :func:`action_labels`.
    """
    positions, targets = action_labels(labels, action_ids)
    action_logits = logits[to_device(positions, logits.device), action_ids]
    return nn.functional.cross_entropy(action_logits, to_device(targets - action_ids.start, logits.device))


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor to a device; a copy from the host to a GPU waits for nothing."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
