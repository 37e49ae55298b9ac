"""Fields of known datasets: what OpenVLA and OpenVLA-OFT were trained on, by the name that their statistics carry.

Cameras are the main one and the wrist's, where there is one; the first alone is what a model of one image takes.
Facts are those of the reference's configuration and standardising of Open X-Embodiment; the tests compare. The state is
OpenVLA-OFT's; plain OpenVLA's statistics have a zero more in places, which its models never read.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..actions_openvla import END_EFFECTOR_DIMENSIONS, nearest_name
from ..errors_openvla import OpenVLAValueError
from .columns import Fields

if TYPE_CHECKING:
    from .episodes import EpisodeReader

AUTO, NO_PRESET = "auto", "none"

END_EFFECTOR_MASK = (True,) * 6 + (False,)
BIMANUAL_MASK = (True,) * 14
_VECTORS = ("action.world_vector", "action.rotation_delta")
_SPOKEN = "observation.natural_language_instruction"
_STATE = ("observation.state[:6]", "observation.state[-1:]")


def _set(
    cameras: str,
    action: tuple[str | None, ...] = ("action",),
    proprio: tuple[str | None, ...] = (),
    instruction: str = "language_instruction",
    **more: object,
) -> Fields:
    named = tuple(f"observation.{camera}" for camera in cameras.split())
    return Fields(named, action, proprio, instruction, **{"action_mask": END_EFFECTOR_MASK, **more})


PRESETS: dict[str, Fields] = {
    "bridge_orig": _set("image_0", proprio=_STATE, gripper="binary", skip_first=1, relabel="observation.state[:6]"),
    "bridge_oxe": _set(
        "image",
        (*_VECTORS, "action.open_gripper"),
        _STATE,
        _SPOKEN,
        skip_first=1,
        relabel="observation.state[:6]",
    ),
    "fractal20220817_data": _set(
        "image",
        (*_VECTORS, "action.gripper_closedness_action[:1]"),
        ("observation.base_pose_tool_reached", "observation.gripper_closed"),
        _SPOKEN,
        gripper="relative",
    ),
    "kuka": _set(
        "image",
        (*_VECTORS, "action.gripper_closedness_action[:1]"),
        ("observation.clip_function_input/base_pose_tool_reached", "observation.gripper_closed"),
        _SPOKEN,
        gripper="relative",
    ),
    "taco_play": _set(
        "rgb_static rgb_gripper",
        ("action.rel_actions_world[:6]", "action.rel_actions_world[-1:]"),
        ("observation.robot_obs[:6]", None, "observation.robot_obs[7:8]"),
        _SPOKEN,
        gripper="clipped",
    ),
    "jaco_play": _set(
        "image image_wrist",
        ("action.world_vector", None, None, None, "action.gripper_closedness_action[:1]"),
        ("observation.end_effector_cartesian_pos[:6]", None, "observation.end_effector_cartesian_pos[-1:]"),
        _SPOKEN,
        gripper="relative",
    ),
    "berkeley_cable_routing": _set(
        "image wrist45_image", (*_VECTORS, None), ("observation.robot_state", None), _SPOKEN
    ),
    "roboturk": _set(
        "front_rgb",
        (*_VECTORS, "action.gripper_closedness_action"),
        instruction=_SPOKEN,
        gripper="clipped_inverted",
    ),
    "viola": _set(
        "agentview_rgb eye_in_hand_rgb",
        (*_VECTORS, "action.gripper_closedness_action"),
        ("observation.joint_states", "observation.gripper_states"),
        _SPOKEN,
        gripper="clipped_inverted",
    ),
    "berkeley_autolab_ur5": _set(
        "image hand_image",
        (*_VECTORS, "action.gripper_closedness_action"),
        ("observation.robot_state[6:14]",),
        _SPOKEN,
        gripper="relative",
    ),
    "toto": _set("image", (*_VECTORS, "action.open_gripper"), ("observation.state", None), _SPOKEN),
    "stanford_hydra_dataset_converted_externally_to_rlds": _set(
        "image wrist_image",
        proprio=("observation.state[:3]", "observation.state[7:10]", "observation.state[-3:-2]"),
        gripper="inverted",
    ),
    "austin_buds_dataset_converted_externally_to_rlds": _set(
        "image wrist_image",
        ("action[:6]", "action[-1:]"),
        ("observation.state[:8]",),
        gripper="clipped_inverted",
    ),
    "austin_sailor_dataset_converted_externally_to_rlds": _set(
        "image wrist_image", ("action[:6]", "action[-1:]"), ("observation.state",), gripper="clipped_inverted"
    ),
    "austin_sirius_dataset_converted_externally_to_rlds": _set(
        "image wrist_image", ("action[:6]", "action[-1:]"), ("observation.state",), gripper="clipped_inverted"
    ),
    "nyu_franka_play_dataset_converted_externally_to_rlds": _set(
        "image",
        ("action[-8:-2]", "action[-2:-1]"),
        ("observation.state[-6:]", None, None),
        gripper="clipped",
    ),
    "nyu_rot_dataset_converted_externally_to_rlds": _set("image", ("action[:7]",), _STATE),
    "ucsd_kitchen_dataset_converted_externally_to_rlds": _set(
        "image", ("action[:-1]",), ("observation.state[:7]", None)
    ),
    "dlr_edan_shared_control_converted_externally_to_rlds": _set(
        "image", ("action[:6]", "action[-1:]"), ("observation.state", None), gripper="inverted"
    ),
    "utaustin_mutex": _set(
        "image wrist_image",
        ("action[:6]", "action[-1:]"),
        ("observation.state[:8]",),
        gripper="clipped_inverted",
    ),
    "berkeley_fanuc_manipulation": _set(
        "image wrist_image",
        ("action", "observation.state[6:7]"),
        ("observation.state[:6]", None, "observation.state[6:7]"),
        gripper="inverted",
    ),
    "cmu_stretch": _set(
        "image",
        ("action[:-1]",),
        ("observation.state[:3]", None, None, None, "observation.state[-1:]"),
    ),
    "bc_z": _set(
        "image",
        (
            "action.future/xyz_residual[:3]",
            "action.future/axis_angle_residual[:3]",
            "action.future/target_close[:1]",
        ),
        ("observation.present/xyz", "observation.present/axis_angle", None, "observation.present/sensed_close"),
        _SPOKEN,
        gripper="inverted",
    ),
    "fmb_dataset": _set(
        "image_side_1 image_wrist_1", proprio=("observation.eef_pose", "observation.state_gripper_pose")
    ),
    "dobbe": _set("wrist_image", proprio=("observation.state",)),
}
PRESETS["bridge_dataset"] = PRESETS["bridge_orig"]

# DROID: the column "action" holds joint velocities; the reference trains on the end effector's, in the base frame. Its
# gripper is 0 open, 1 closed.
_DROID_ACTION = ("action_dict.cartesian_velocity", "action_dict.gripper_position")
_DROID_STATE = ("observation.cartesian_position", "observation.gripper_position")
for _name, _camera in (
    ("droid", "exterior_image_1_left"),
    ("droid_100", "exterior_image_1_left"),  # its published sample
    ("droid_wipe", "exterior_image_2_left"),
):
    PRESETS[_name] = _set(f"{_camera} wrist_image_left", _DROID_ACTION, _DROID_STATE, gripper="inverted")
for _name in (
    "carrot_in_bowl",
    "pour_corn_in_pot",
    "flip_pot_upright",
    "move_object_onto_plate",
    "knock_object_over",
    "cover_object_with_towel",
):
    PRESETS[f"tdroid_{_name}"] = _set(
        "static_image",
        ("action[:6]", "action[-1:]"),
        ("observation.cartesian_position[:6]", "observation.gripper_position[-1:]"),
        gripper="binary",
    )

# End effector and both fingers.
_LIBERO_STATE = ("observation.state[:6]", "observation.state[-2:]")
for _suite in ("spatial", "object", "goal", "10", "4_task_suites"):
    PRESETS[f"libero_{_suite}_no_noops"] = _set(
        "image wrist_image", ("action[:6]", "action[-1:]"), _LIBERO_STATE, gripper="clipped_inverted"
    )
for _name in ("fold_shorts_20", "fold_shirt_30", "scoop_X_into_bowl_45", "put_X_into_pot_300"):
    PRESETS[f"aloha1_{_name}_demos"] = _set(
        "image left_wrist_image right_wrist_image", proprio=("observation.state",), action_mask=BIMANUAL_MASK
    )

# Presets of HDF5 layouts; all others are of RLDS.
HDF5_PRESETS = ("libero_hdf5", "aloha_hdf5")
# LIBERO's own HDF5 files (and robomimic's layout of them): upside down, gripper -1 open to +1 closed.
PRESETS["libero_hdf5"] = Fields(
    cameras=("obs.agentview_rgb", "obs.eye_in_hand_rgb"),
    action=("actions",),
    proprio=("obs.ee_states", "obs.gripper_states"),
    gripper="clipped_inverted",
    rotate_180=True,
    action_mask=END_EFFECTOR_MASK,
)
# ALOHA's recordings: one file an episode, no instruction inside (set instruction_text).
PRESETS["aloha_hdf5"] = Fields(
    cameras=(
        "observations.images.cam_high",
        "observations.images.cam_left_wrist",
        "observations.images.cam_right_wrist",
    ),
    action=("action",),
    proprio=("observations.qpos",),
    action_mask=BIMANUAL_MASK,
)

# RLDS datasets that the reference names, and whose action no preset describes: joint angles, quaternions, movements of
# fewer dimensions, grippers of unknown direction. Read as they are, they would be taken for OpenVLA's action.
WITHOUT_PRESET = frozenset(
    [
        "asu_table_top_converted_externally_to_rlds",
        "berkeley_gnm_cory_hall",
        "berkeley_gnm_recon",
        "berkeley_gnm_sac_son",
        "berkeley_mvp_converted_externally_to_rlds",
        "berkeley_rpt_converted_externally_to_rlds",
        "bridge",
        "cmu_franka_exploration_dataset_converted_externally_to_rlds",
        "cmu_play_fusion",
        "cmu_playing_with_food",
        "columbia_cairlab_pusht_real",
        "dlr_sara_grid_clamp_converted_externally_to_rlds",
        "dlr_sara_pour_converted_externally_to_rlds",
        "furniture_bench_dataset_converted_externally_to_rlds",
        "iamlab_cmu_pickup_insert_converted_externally_to_rlds",
        "imperialcollege_sawyer_wrist_cam",
        "kaist_nonprehensile_converted_externally_to_rlds",
        "language_table",
        "maniskill_dataset_converted_externally_to_rlds",
        "nyu_door_opening_surprising_effectiveness",
        "ppgm",
        "ppgm_static",
        "ppgm_wrist",
        "rh20t",
        "robo_net",
        "roboset",
        "stanford_kuka_multimodal_dataset_converted_externally_to_rlds",
        "stanford_mask_vit_converted_externally_to_rlds",
        "stanford_robocook_converted_externally_to_rlds",
        "tokyo_u_lsmo_converted_externally_to_rlds",
        "ucsd_pick_and_place_dataset_converted_externally_to_rlds",
        "uiuc_d3field",
        "utokyo_pr2_opening_fridge_converted_externally_to_rlds",
        "utokyo_pr2_tabletop_manipulation_converted_externally_to_rlds",
        "utokyo_xarm_bimanual_converted_externally_to_rlds",
        "utokyo_xarm_pick_and_place_converted_externally_to_rlds",
    ]
)

# How a gripper is stored, as far as its values tell.
SIGNED, ABSOLUTE = "signed", "absolute"
_SLACK = 0.05
# Episodes that are looked at.
_LOOKED_AT = 3


def stored_gripper(reader: EpisodeReader) -> str | None:
    """Return how the first episodes store the last of seven action dimensions.

    Returns:
        ``SIGNED``: it goes below 0, as -1 to +1 does. ``ABSOLUTE``: it stays from 0 to 1 and reaches both. None:
        neither can be told.
    """
    plain = dataclasses.replace(reader.fields, gripper="as_is", relabel=None, skip_first=0)
    low, high = np.inf, -np.inf
    for index in range(min(_LOOKED_AT, len(reader))):
        try:
            actions, _ = plain.tables(reader._read(index).columns)
        except (ValueError, IndexError):  # met and named when the episode is used
            continue
        if actions.shape[1] != len(END_EFFECTOR_DIMENSIONS):
            continue
        if len(actions):
            low, high = min(low, actions[:, -1].min()), max(high, actions[:, -1].max())
        if low < -_SLACK:
            return SIGNED
    return ABSOLUTE if low < _SLACK and 1 - _SLACK < high < 1 + _SLACK else None


def require_raw_gripper(reader: EpisodeReader, given: Mapping[str, Any] | None) -> None:
    """Refuse, or warn of, a preset that would turn a gripper which is 0 closed, 1 open already.

    Args:
        reader: The dataset, opened.
        given: Fields that the user gave; with ``gripper`` nothing is checked.

    Raises:
        ValueError: LIBERO's preset by its name: LIBERO's own gripper is never 0.
    """
    if reader.preset is None or "gripper" in (given or {}) or reader.fields.gripper != "clipped_inverted":
        return
    if stored_gripper(reader) != ABSOLUTE:
        return
    message = (
        f"{reader.root}: the preset {reader.preset!r} ({reader.preset_reason}) turns a gripper of -1 open, +1 closed, "
        "but the stored one stays from 0 to 1. If that is 0 closed, 1 open, it would be learnt inverted: take no "
        "preset (preset: none, --preset none), or give gripper in fields."
    )
    if reader.preset.startswith("libero") and reader.preset not in HDF5_PRESETS:
        raise OpenVLAValueError(message)
    warnings.warn(message, stacklevel=4)


def merged_fields(
    found: Fields | None, preset: str | None, config: Mapping[str, Any] | None, root: Path, seen: str = ""
) -> Fields:
    """Return what is asked for, over the preset, over what the format itself suggests.

    Args:
        found: What the format suggests.
        preset: A key of ``PRESETS``.
        config: Fields to replace.
        root: The dataset, for messages.
        seen: A sentence on the columns that there are, for the message where none can be chosen.

    Raises:
        ValueError: The preset is unknown, or nothing says what the action is.
    """
    if preset is not None:
        if preset not in PRESETS:
            near = nearest_name(preset, list(PRESETS))
            raise OpenVLAValueError(
                f"Unknown preset {preset!r}.{f' Did you mean {near!r}?' if near else ''} Allowed: "
                f"{[AUTO, NO_PRESET, *sorted(PRESETS)]}."
            )
        found = PRESETS[preset]
    config = dict(config or {})
    if found is not None:
        return found.changed(config)
    if "cameras" not in config or not {"action", "standardize"} & set(config):
        raise OpenVLAValueError(
            f"{root}: what is camera and what is action cannot be told; give cameras and action.{seen}"
        )
    return Fields(("?",), ("?",)).changed({"action": (), **config})


def known_preset(preset: str | None, *names: str | None) -> str | None:
    """Return, with "auto", the preset of RLDS that bears one of the dataset's names, where there is one."""
    if preset == AUTO:
        return next((name for name in names if name in PRESETS and name not in HDF5_PRESETS), None)
    return preset
