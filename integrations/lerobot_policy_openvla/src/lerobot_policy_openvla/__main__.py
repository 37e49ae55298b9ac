"""Write a LeRobot checkpoint of a model of the openvla package, for commands that need ``--policy.path``.

python -m lerobot_policy_openvla FOLDER_OR_HUB_ID CHECKPOINT --cameras front wrist
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lerobot.configs import FeatureType, PolicyFeature
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE

from .configuration_openvla import MODEL_FOLDER, OpenVLAConfig


def write_checkpoint(
    model: str | os.PathLike[str], checkpoint: str | os.PathLike[str], cameras: Sequence[str], **settings: Any
) -> OpenVLAConfig:
    """Write a LeRobot checkpoint of a model of the openvla package; the weights are copied.

    Args:
        model: Folder or Hub id of a model, or of an adapter.
        checkpoint: Folder to write; it must not exist.
        cameras: The robot's or environment's cameras, in the order of the model's training; a name without a dot stands
            for ``observation.images.NAME``.
        **settings: Fields of ``OpenVLAConfig``.

    Returns:
        The checkpoint's configuration.

    Raises:
        OpenVLAFileExistsError: The folder exists.
        OpenVLAValueError: The cameras or a setting do not fit the model.
    """
    from openvla.conversion.files import atomic_directory
    from openvla.errors_openvla import OpenVLAFileExistsError
    from openvla.inference.policy import load_policy

    from .processor_openvla import make_openvla_pre_post_processors

    checkpoint = Path(checkpoint)
    if checkpoint.exists():
        raise OpenVLAFileExistsError(f"{checkpoint} exists; name a new folder.")
    policy = load_policy(model, device="cpu", dtype="auto", unnorm_key=settings.get("unnorm_key"))
    names = [name if "." in name else f"{OBS_IMAGES}.{name}" for name in cameras]
    size = policy.model.config.image_sizes[0]
    inputs = {name: PolicyFeature(type=FeatureType.VISUAL, shape=(3, size, size)) for name in names}
    if policy.model.config.proprio_dim is not None:
        inputs[OBS_STATE] = PolicyFeature(type=FeatureType.STATE, shape=(policy.model.config.proprio_dim,))
    dimension = len(policy.model.action_statistics(policy.unnorm_key).low)
    outputs = {ACTION: PolicyFeature(type=FeatureType.ACTION, shape=(dimension,))}
    # As the model's default, not in the configuration: training on other data then takes that data's statistics.
    policy.model.config.default_unnorm_key = policy.unnorm_key
    settings = {**settings, "pretrained_openvla": str(model), "unnorm_key": None, "cameras": names}
    config = OpenVLAConfig(input_features=inputs, output_features=outputs, device="cpu", push_to_hub=False, **settings)
    config.validate_features()
    with atomic_directory(checkpoint) as folder:
        for pipeline in make_openvla_pre_post_processors(config):
            pipeline.save_pretrained(folder)
        config.device = None  # chosen where it is loaded
        config._save_pretrained(folder)
        policy.model.save_pretrained(folder / MODEL_FOLDER)
        policy.processor.save_pretrained(folder / MODEL_FOLDER)
    return config


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m lerobot_policy_openvla", description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="FOLDER_OR_HUB_ID", help="model or adapter in the openvla package's format")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder to write")
    parser.add_argument("--cameras", nargs="+", required=True, metavar="NAME", help="in the order of the training")
    parser.add_argument("--unnorm-key", metavar="K", help="dataset whose statistics un-normalise actions")
    parser.add_argument("--n-action-steps", type=int, metavar="N", help="actions of a chunk to execute; default all")
    parser.add_argument("--robot-convention", metavar="NAME", help="convention to convert actions to, such as libero")
    parser.add_argument("--instruction", metavar="TEXT", help="instruction where an observation has none")
    args = parser.parse_args(arguments)
    write_checkpoint(**vars(args))
    print(f"{args.checkpoint}: --policy.path={args.checkpoint}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
