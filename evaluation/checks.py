"""Checks that a policy fits LIBERO's robot, before it is evaluated."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from ..dimension_labels import END_EFFECTOR_DIMENSIONS, OPEN_X_DATASETS
from ..errors_openvla import OpenVLAValueError
from ..inference.image_presets import IMAGE_PRESETS
from ..inference.policy import Policy

LIBERO_ACTION_DIM = 7
LIBERO_PROPRIO_DIM = 8
GRIPPERS = ("libero", "openvla")  # -1 open to +1 closed; 0 closed to 1 open
LIBERO_PRESET = "libero"  # every published LIBERO checkpoint was evaluated with it
# LIBERO's demonstrations command up to 0.94 of the controller's range in each of dx, dy, dz.
MIN_TRANSLATION = 0.1


def weights_digest(model: torch.nn.Module) -> str:
    """Return a hex digest of the first 16 values of every tensor; it differs between training runs."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        start = tensor.detach().flatten()[:16].cpu().contiguous()
        digest.update(
            f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + start.view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()[:16]


def resolve_image_preset(policy: Policy, image_preset: str | None) -> str:
    """Return the preset of the frames: the argument, else the processor's, else LIBERO's.

    The harness rotates the frames before it sends them, so "libero-raw" becomes "libero". MiniVLA's default is its own.

    Raises:
        ValueError: The preset is unknown.
    """
    default = "minivla-libero" if policy.model.config.prompt_style == "openvla-mini" else LIBERO_PRESET
    preset = (image_preset or policy.processor.image_preset or default).removesuffix("-raw")
    if preset not in IMAGE_PRESETS:
        raise OpenVLAValueError(f"Unknown image_preset {preset!r}. Allowed: {list(IMAGE_PRESETS)}.")
    return preset


def refuse_tracevla(policy: Policy) -> None:
    """Raise ValueError for a TraceVLA, for which a second camera's frame would be the first one's trace."""
    if policy.model.config.trace_prompting:
        raise OpenVLAValueError(
            "A TraceVLA takes the frame of one camera and the traces on it, but this evaluation gives frames of two "
            "cameras; call load_policy(..., tracker=...).act in a loop of your own."
        )


def require_libero_policy(policy: Policy) -> None:
    """Raise ValueError for a policy of another robot, or of another gripper convention."""
    model, key = policy.model, policy.unnorm_key
    action_dim, config = model.get_action_dim(key), model.config
    if action_dim != LIBERO_ACTION_DIM:
        raise OpenVLAValueError(
            f"LIBERO's arm takes {LIBERO_ACTION_DIM} numbers per action, but those of {key!r} have {action_dim}: a "
            "policy of another robot. Pass the unnorm_key of a dataset of an arm like LIBERO's, or another model."
        )
    refuse_tracevla(policy)
    if config.images_per_moment > 2 or config.proprio_dim not in (None, LIBERO_PROPRIO_DIM):
        raise OpenVLAValueError(
            f"LIBERO has 2 cameras (third-person and wrist) and a state of {LIBERO_PROPRIO_DIM} numbers, but this "
            f"model takes {config.images_per_moment} images and {config.proprio_dim or 'no'} numbers of proprio."
        )
    minimum = model.get_action_stats(key).get("min")
    if minimum is not None and minimum[-1] < -0.5:
        raise OpenVLAValueError(
            f"The gripper of {key!r} goes down to {minimum[-1]:g}: the simulator's convention (-1 open, +1 close), "
            "not OpenVLA's (0 closed, 1 open), from which every action is converted here. Train with the preset "
            "libero_object_no_noops or the field gripper: clipped_inverted."
        )


def statistics_warnings(policy: Policy) -> list[str]:
    """Return reasons why the action statistics may be those of another robot; empty if there are none.

    LIBERO's controller takes fractions of its range, -1 to 1. Statistics cannot be proven to be in these units, but
    other units often show.
    """
    key = policy.unnorm_key
    if key in OPEN_X_DATASETS:
        return [
            f"The actions of {key!r} are metres and radians, which LIBERO's controller would take for fractions of its "
            "range: the arm hardly moves. Take a LIBERO dataset's unnorm_key."
        ]
    statistics = policy.model.action_statistics(key)
    reach = np.maximum(np.abs(statistics.low), np.abs(statistics.high))[:6]
    warnings = []
    if reach[:3].max() < MIN_TRANSLATION:
        warnings.append(
            f"The statistics of {key!r} reach {reach[:3].max():.3g} of the controller's range in dx, dy, dz, LIBERO's "
            "own 0.9: if they are metres, they are another robot's, and the arm hardly moves. Take those that the "
            "model was trained with."
        )
    if reach.max() > 1.01:
        name = END_EFFECTOR_DIMENSIONS[int(reach.argmax())]
        warnings.append(
            f"The statistics of {key!r} reach {reach.max():.4g} in {name}, and LIBERO's controller clips at 1: if they "
            "are of other units, they are another robot's. Take those that the model was trained with."
        )
    return warnings
