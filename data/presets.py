"""Fields of known datasets: those that OpenVLA and OpenVLA-OFT were trained on, by the names in their statistics.

Cameras are the main camera and, where there is one, the wrist camera; a model of one image takes the first. Source: the
reference's Open X-Embodiment configs.py and transforms.py, with which the tests compare. The state is OpenVLA-OFT's;
plain OpenVLA's statistics have an additional zero in some datasets, which its models never read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..actions_openvla import nearest_name
from ..errors_openvla import OpenVLAValueError
from .columns import ColumnSpec
from .remote import DataPath

AUTO, NO_PRESET = "auto", "none"

END_EFFECTOR_MASK = (True,) * 6 + (False,)
BIMANUAL_MASK = (True,) * 14
_VECTORS = ("action.world_vector", "action.rotation_delta")
_INSTRUCTION = "observation.natural_language_instruction"
_STATE = ("observation.state[:6]", "observation.state[-1:]")


def _preset(
    cameras: str,
    action: tuple[str | None, ...] = ("action",),
    proprio: tuple[str | None, ...] = (),
    instruction: str = "language_instruction",
    action_mask: tuple[bool, ...] = END_EFFECTOR_MASK,
    gripper: str = "as_is",
    skip_first: int = 0,
    relabel: str | None = None,
) -> ColumnSpec:
    """Return the fields of an RLDS dataset; cameras are names below ``observation``, separated by spaces."""
    return ColumnSpec(
        cameras=tuple(f"observation.{camera}" for camera in cameras.split()),
        action=action,
        proprio=proprio,
        instruction=instruction,
        action_mask=action_mask,
        gripper=gripper,
        skip_first=skip_first,
        relabel=relabel,
    )


PRESETS: dict[str, ColumnSpec] = {
    "bridge_orig": _preset("image_0", proprio=_STATE, gripper="binary", skip_first=1, relabel="observation.state[:6]"),
    "bridge_oxe": _preset(
        "image",
        (*_VECTORS, "action.open_gripper"),
        _STATE,
        _INSTRUCTION,
        skip_first=1,
        relabel="observation.state[:6]",
    ),
    "fractal20220817_data": _preset(
        "image",
        (*_VECTORS, "action.gripper_closedness_action[:1]"),
        ("observation.base_pose_tool_reached", "observation.gripper_closed"),
        _INSTRUCTION,
        gripper="relative",
    ),
    "kuka": _preset(
        "image",
        (*_VECTORS, "action.gripper_closedness_action[:1]"),
        ("observation.clip_function_input/base_pose_tool_reached", "observation.gripper_closed"),
        _INSTRUCTION,
        gripper="relative",
    ),
    "taco_play": _preset(
        "rgb_static rgb_gripper",
        ("action.rel_actions_world[:6]", "action.rel_actions_world[-1:]"),
        ("observation.robot_obs[:6]", None, "observation.robot_obs[7:8]"),
        _INSTRUCTION,
        gripper="clipped",
    ),
    "jaco_play": _preset(
        "image image_wrist",
        ("action.world_vector", None, None, None, "action.gripper_closedness_action[:1]"),
        ("observation.end_effector_cartesian_pos[:6]", None, "observation.end_effector_cartesian_pos[-1:]"),
        _INSTRUCTION,
        gripper="relative",
    ),
    "berkeley_cable_routing": _preset(
        "image wrist45_image", (*_VECTORS, None), ("observation.robot_state", None), _INSTRUCTION
    ),
    "roboturk": _preset(
        "front_rgb",
        (*_VECTORS, "action.gripper_closedness_action"),
        instruction=_INSTRUCTION,
        gripper="clipped_inverted",
    ),
    "viola": _preset(
        "agentview_rgb eye_in_hand_rgb",
        (*_VECTORS, "action.gripper_closedness_action"),
        ("observation.joint_states", "observation.gripper_states"),
        _INSTRUCTION,
        gripper="clipped_inverted",
    ),
    "berkeley_autolab_ur5": _preset(
        "image hand_image",
        (*_VECTORS, "action.gripper_closedness_action"),
        ("observation.robot_state[6:14]",),
        _INSTRUCTION,
        gripper="relative",
    ),
    "toto": _preset("image", (*_VECTORS, "action.open_gripper"), ("observation.state", None), _INSTRUCTION),
    "stanford_hydra_dataset_converted_externally_to_rlds": _preset(
        "image wrist_image",
        proprio=("observation.state[:3]", "observation.state[7:10]", "observation.state[-3:-2]"),
        gripper="inverted",
    ),
    "austin_buds_dataset_converted_externally_to_rlds": _preset(
        "image wrist_image",
        ("action[:6]", "action[-1:]"),
        ("observation.state[:8]",),
        gripper="clipped_inverted",
    ),
    "austin_sailor_dataset_converted_externally_to_rlds": _preset(
        "image wrist_image", ("action[:6]", "action[-1:]"), ("observation.state",), gripper="clipped_inverted"
    ),
    "austin_sirius_dataset_converted_externally_to_rlds": _preset(
        "image wrist_image", ("action[:6]", "action[-1:]"), ("observation.state",), gripper="clipped_inverted"
    ),
    "nyu_franka_play_dataset_converted_externally_to_rlds": _preset(
        "image",
        ("action[-8:-2]", "action[-2:-1]"),
        ("observation.state[-6:]", None, None),
        gripper="clipped",
    ),
    "nyu_rot_dataset_converted_externally_to_rlds": _preset("image", ("action[:7]",), _STATE),
    "ucsd_kitchen_dataset_converted_externally_to_rlds": _preset(
        "image", ("action[:-1]",), ("observation.state[:7]", None)
    ),
    "dlr_edan_shared_control_converted_externally_to_rlds": _preset(
        "image", ("action[:6]", "action[-1:]"), ("observation.state", None), gripper="inverted"
    ),
    "utaustin_mutex": _preset(
        "image wrist_image",
        ("action[:6]", "action[-1:]"),
        ("observation.state[:8]",),
        gripper="clipped_inverted",
    ),
    "berkeley_fanuc_manipulation": _preset(
        "image wrist_image",
        ("action", "observation.state[6:7]"),
        ("observation.state[:6]", None, "observation.state[6:7]"),
        gripper="inverted",
    ),
    "cmu_stretch": _preset(
        "image",
        ("action[:-1]",),
        ("observation.state[:3]", None, None, None, "observation.state[-1:]"),
    ),
    "bc_z": _preset(
        "image",
        (
            "action.future/xyz_residual[:3]",
            "action.future/axis_angle_residual[:3]",
            "action.future/target_close[:1]",
        ),
        ("observation.present/xyz", "observation.present/axis_angle", None, "observation.present/sensed_close"),
        _INSTRUCTION,
        gripper="inverted",
    ),
    "fmb_dataset": _preset(
        "image_side_1 image_wrist_1", proprio=("observation.eef_pose", "observation.state_gripper_pose")
    ),
    "dobbe": _preset("wrist_image", proprio=("observation.state",)),
}
PRESETS["bridge_dataset"] = PRESETS["bridge_orig"]

# DROID's column "action" holds joint velocities; the reference trains on the end effector's velocity in the base frame.
# Its gripper is 0 open, 1 closed.
_DROID_ACTION = ("action_dict.cartesian_velocity", "action_dict.gripper_position")
_DROID_STATE = ("observation.cartesian_position", "observation.gripper_position")
for _name, _camera in (
    ("droid", "exterior_image_1_left"),
    ("droid_100", "exterior_image_1_left"),  # its published sample
    ("droid_wipe", "exterior_image_2_left"),
):
    PRESETS[_name] = _preset(f"{_camera} wrist_image_left", _DROID_ACTION, _DROID_STATE, gripper="inverted")
for _name in (
    "carrot_in_bowl",
    "pour_corn_in_pot",
    "flip_pot_upright",
    "move_object_onto_plate",
    "knock_object_over",
    "cover_object_with_towel",
):
    PRESETS[f"tdroid_{_name}"] = _preset(
        "static_image",
        ("action[:6]", "action[-1:]"),
        ("observation.cartesian_position[:6]", "observation.gripper_position[-1:]"),
        gripper="binary",
    )

# End-effector pose and both fingers.
_LIBERO_STATE = ("observation.state[:6]", "observation.state[-2:]")
for _suite in ("spatial", "object", "goal", "10", "4_task_suites"):
    PRESETS[f"libero_{_suite}_no_noops"] = _preset(
        "image wrist_image", ("action[:6]", "action[-1:]"), _LIBERO_STATE, gripper="clipped_inverted"
    )
for _name in ("fold_shorts_20", "fold_shirt_30", "scoop_X_into_bowl_45", "put_X_into_pot_300"):
    PRESETS[f"aloha1_{_name}_demos"] = _preset(
        "image left_wrist_image right_wrist_image", proprio=("observation.state",), action_mask=BIMANUAL_MASK
    )

# Presets of HDF5 layouts; all other presets are for RLDS.
HDF5_PRESETS = ("libero_hdf5", "aloha_hdf5")
# LIBERO's HDF5 files, in robomimic's layout: images upside down, gripper -1 open to +1 closed.
PRESETS["libero_hdf5"] = ColumnSpec(
    cameras=("obs.agentview_rgb", "obs.eye_in_hand_rgb"),
    action=("actions",),
    proprio=("obs.ee_states", "obs.gripper_states"),
    gripper="clipped_inverted",
    rotate_180=True,
    action_mask=END_EFFECTOR_MASK,
)
# ALOHA's HDF5 files: one file per episode, without an instruction (set instruction_text).
PRESETS["aloha_hdf5"] = ColumnSpec(
    cameras=(
        "observations.images.cam_high",
        "observations.images.cam_left_wrist",
        "observations.images.cam_right_wrist",
    ),
    action=("action",),
    proprio=("observations.qpos",),
    action_mask=BIMANUAL_MASK,
)

# RLDS datasets that the reference names and whose action no preset describes: joint angles, quaternions, movements with
# fewer dimensions, grippers of unknown direction. Read as stored, they would be mistaken for OpenVLA's action.
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


def merge_fields(
    suggested: ColumnSpec | None,
    preset: str | None,
    overrides: Mapping[str, Any] | None,
    root: DataPath,
    available: str = "",
) -> ColumnSpec:
    """Return the fields to use: the user's overrides over the preset, else over what the format suggests.

    Args:
        suggested: The format's suggestion, used without a preset.
        preset: A key of ``PRESETS``, or None.
        overrides: Fields given by the user.
        root: The dataset, for messages.
        available: A sentence that lists the available columns, for the error if none can be chosen.

    Raises:
        ValueError: The preset is unknown, or neither preset, suggestion nor overrides name cameras and action.
    """
    if preset is not None:
        if preset not in PRESETS:
            nearest = nearest_name(preset, list(PRESETS))
            raise OpenVLAValueError(
                f"Unknown preset {preset!r}.{f' Did you mean {nearest!r}?' if nearest else ''} Allowed: "
                f"{[AUTO, NO_PRESET, *sorted(PRESETS)]}."
            )
        suggested = PRESETS[preset]
    overrides = dict(overrides or {})
    if suggested is not None:
        return suggested.replace(overrides)
    if "cameras" not in overrides or not {"action", "standardize"} & set(overrides):
        raise OpenVLAValueError(
            f"{root}: cameras and action cannot be detected; set the fields cameras and action.{available}"
        )
    return ColumnSpec(("?",), ("?",)).replace({"action": (), **overrides})


def select_preset(preset: str | None, *names: str | None) -> str | None:
    """Return, for "auto", the RLDS preset with one of the dataset's names, or None; any other preset unchanged."""
    if preset == AUTO:
        return next((name for name in names if name in PRESETS and name not in HDF5_PRESETS), None)
    return preset
