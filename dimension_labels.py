"""Names and units of action dimensions, for output that people read."""

from __future__ import annotations

# The seven dimensions of an end-effector policy, in order, and their units in the Open X-Embodiment datasets that
# OpenVLA was trained on (and in fine-tuning datasets that follow them).
END_EFFECTOR_DIMENSIONS = ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper")
OPEN_X_UNITS = ("m", "m", "m", "rad", "rad", "rad", "0 closed to 1 open")
OPEN_X_DATASETS = frozenset(
    "fractal20220817_data kuka bridge bridge_orig bridge_oxe taco_play jaco_play "  # noqa: SIM905  30 lines else
    "berkeley_cable_routing roboturk viola berkeley_autolab_ur5 toto "
    "stanford_hydra_dataset_converted_externally_to_rlds "
    "austin_buds_dataset_converted_externally_to_rlds nyu_franka_play_dataset_converted_externally_to_rlds "
    "furniture_bench_dataset_converted_externally_to_rlds ucsd_kitchen_dataset_converted_externally_to_rlds "
    "austin_sailor_dataset_converted_externally_to_rlds austin_sirius_dataset_converted_externally_to_rlds "
    "dlr_edan_shared_control_converted_externally_to_rlds iamlab_cmu_pickup_insert_converted_externally_to_rlds "
    "utaustin_mutex berkeley_fanuc_manipulation cmu_stretch bc_z fmb_dataset dobbe".split()
)


def dimension_labels(action_dim: int, unnorm_key: str) -> list[tuple[str, str]]:
    """Return name and unit of every action dimension.

    Args:
        action_dim: 7 is an end effector; dimensions of any other action are only numbered.
        unnorm_key: The dataset; units other than Open X-Embodiment's are not known here ("dataset units").
    """
    if action_dim != len(END_EFFECTOR_DIMENSIONS):
        return [(f"action[{index}]", "dataset units") for index in range(action_dim)]
    if unnorm_key in OPEN_X_DATASETS:
        return list(zip(END_EFFECTOR_DIMENSIONS, OPEN_X_UNITS))
    # DROID's velocities are its controller's input, from -1 to 1.
    units = "controller units" if unnorm_key.startswith(("libero", "droid")) else "dataset units"
    gripper = OPEN_X_UNITS[-1] if unnorm_key.startswith("droid") else units
    return list(zip(END_EFFECTOR_DIMENSIONS, (*[units] * 6, gripper)))
