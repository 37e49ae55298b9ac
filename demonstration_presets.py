"""Fields of known datasets: what OpenVLA and OpenVLA-OFT were trained on, by the name that their statistics carry.

Cameras are the main one and the wrist's, where there is one; the first alone is what a model of one image takes.
Facts are those of the reference's configuration and standardising of Open X-Embodiment; the tests compare. The state is
OpenVLA-OFT's; plain OpenVLA's statistics have a zero more in places, which its models never read.
"""

from __future__ import annotations

from .demonstration_fields import Fields

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

# End effector and both fingers.
_LIBERO_STATE = ("observation.state[:6]", "observation.state[-2:]")
for _suite in ("spatial", "object", "goal", "10"):
    PRESETS[f"libero_{_suite}_no_noops"] = _set(
        "image wrist_image", ("action[:6]", "action[-1:]"), _LIBERO_STATE, gripper="clipped_inverted"
    )
for _name in ("fold_shorts_20", "fold_shirt_30", "scoop_X_into_bowl_45", "put_X_into_pot_300"):
    PRESETS[f"aloha1_{_name}_demos"] = _set(
        "image left_wrist_image right_wrist_image", proprio=("observation.state",), action_mask=BIMANUAL_MASK
    )

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
