# /// script
# requires-python = ">=3.10"
# dependencies = ["vla-eval", "openvla"]
#
# [tool.uv.sources]
# openvla = { path = "../..", editable = true }
# ///
"""vla-eval model server for OpenVLA, OpenVLA-OFT and MiniVLA on any transformers from 4.40.1 on.

    vla-eval serve --config integrations/vla_eval/libero.yaml --arg model_path=my-openvla

It takes the place of vla-eval's own servers ``openvla.py`` (transformers 4.40.1, timm 0.9.10) and ``oft.py`` (a fork of
transformers). Chunk length, cameras, proprio and action head come from the checkpoint's ``config.json``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from openvla import Policy, load_policy
from openvla.evaluation.checks import refuse_tracevla, resolve_image_preset
from openvla.inference.image_history import ImageHistory
from openvla.inference.robot_conventions import convert_action
from vla_eval.model_servers.base import SessionContext
from vla_eval.model_servers.predict import PredictModelServer
from vla_eval.specs import (
    GRIPPER_01,
    GRIPPER_CLOSE_NEG,
    GRIPPER_CLOSE_POS,
    IMAGE_RGB,
    LANGUAGE,
    POSITION_DELTA,
    ROTATION_AA,
    ROTATION_EULER,
    STATE_EEF_POS_AA_GRIP,
    DimSpec,
)
from vla_eval.types import Action, Observation

CAMERA_SPECS = ("image", "wrist_image")  # vla-eval's names: third-person and wrist camera
ACTION_SPECS = {
    "libero": {"rotation": ROTATION_AA, "gripper": GRIPPER_CLOSE_POS},
    "simpler_widowx": {"rotation": ROTATION_AA, "gripper": GRIPPER_CLOSE_NEG},
    "raw": {"rotation": ROTATION_EULER, "gripper": GRIPPER_01},
}


class OpenVLAModelServer(PredictModelServer):
    """Model server for every checkpoint that ``openvla.load_policy`` loads, except TraceVLA.

    Args:
        model_path: Folder or Hub id.
        unnorm_key: Dataset whose statistics un-normalise the actions; None if the checkpoint has one.
        image_preset: Preprocessing of the frames, a key of ``openvla.inference.image_presets.IMAGE_PRESETS``; None is
            the checkpoint's own, and without one "libero" (JPEG, Lanczos, centre crop) for ``robot="libero"``.
        robot: Convention of the actions that are sent: "libero", "simpler_widowx", or "raw", the dataset's own (gripper
            0 closed to 1 open).
        constrain_actions: Decode action tokens only; None is False, and True for the demo policy.
        bits: 8 or 4 for quantised weights.
        device: None is the GPU if there is one, else the CPU.
        dtype: "bfloat16", "float16" or "float32"; None is the device's or checkpoint's own.
        chunk_size: Actions of a chunk to execute before the next one is predicted; None is the whole chunk.
        action_ensemble: See ``PredictModelServer``.
        **kwargs: Arguments of ``PredictModelServer``.

    Raises:
        ValueError: ``robot`` is unknown, ``chunk_size`` is longer than the model's chunks, the model is a TraceVLA, or
            it takes more cameras than two.
    """

    def __init__(
        self,
        model_path: str = "openvla/openvla-7b",
        unnorm_key: str | None = None,
        image_preset: str | None = None,
        robot: str = "libero",
        constrain_actions: bool | None = None,
        bits: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
        *,
        chunk_size: int | None = None,
        action_ensemble: str = "newest",
        **kwargs: Any,
    ) -> None:
        if robot not in ACTION_SPECS:
            raise ValueError(f"Unknown robot {robot!r}. Allowed: {list(ACTION_SPECS)}.")
        self.robot = robot
        self.policy: Policy = load_policy(
            model_path,
            unnorm_key=unnorm_key,
            constrain_actions=constrain_actions,
            bits=bits,
            device=device,
            dtype=dtype,
        )
        refuse_tracevla(self.policy)
        if robot == "libero":
            image_preset = resolve_image_preset(self.policy, image_preset)
        self.policy.processor.image_preset = image_preset or self.policy.processor.image_preset
        config = self.policy.model.config
        if config.images_per_moment > len(CAMERA_SPECS):
            raise ValueError(f"vla-eval sends two cameras, but this model takes {config.images_per_moment}.")
        chunk_size = config.chunk_length if chunk_size is None else chunk_size
        if not 1 <= chunk_size <= config.chunk_length:
            raise ValueError(f"chunk_size must be 1 to {config.chunk_length}, the model's, got {chunk_size}.")
        super().__init__(chunk_size=chunk_size, action_ensemble=action_ensemble, **kwargs)
        self.num_cameras, self.takes_state = config.images_per_moment, config.proprio_dim is not None
        self.histories: dict[str, ImageHistory] = {}  # by session

    def get_observation_params(self) -> dict[str, Any]:
        """Return the observations that the benchmark must send; OpenVLA's reference seeds the simulator with 0."""
        params: dict[str, Any] = {"env_seed": 0}
        if self.num_cameras > 1:
            params["send_wrist_image"] = True
        if self.takes_state:
            # As in the training data. Without it vla-eval folds angles above pi, which changes the rotation's sign.
            params |= {"send_state": True, "quat_no_antipodal": True}
        return params

    def get_action_spec(self) -> dict[str, DimSpec]:
        """Return the convention of the actions that are sent."""
        return {"position": POSITION_DELTA, **ACTION_SPECS[self.robot]}

    def get_observation_spec(self) -> dict[str, DimSpec]:
        """Return the convention of the observations that the policy takes."""
        spec = {**dict.fromkeys(CAMERA_SPECS[: self.num_cameras], IMAGE_RGB), "language": LANGUAGE}
        return {**spec, "state": STATE_EEF_POS_AA_GRIP} if self.takes_state else spec

    async def on_episode_start(self, config: dict[str, Any], ctx: SessionContext) -> None:
        """Forget the session's images and chunks."""
        await super().on_episode_start(config, ctx)
        self.histories[ctx.session_id] = self.policy.new_history()

    async def on_episode_end(self, result: dict[str, Any], ctx: SessionContext) -> None:
        """Forget the session."""
        await super().on_episode_end(result, ctx)
        self.histories.pop(ctx.session_id, None)

    async def on_observation(self, obs: Observation, ctx: SessionContext) -> None:
        """Add the images to the session's history, also while a chunk is being executed, and send the next action."""
        images = [np.asarray(image) for image in obs["images"].values()][: self.num_cameras]
        if len(images) < self.num_cameras:
            sent = list(obs["images"])
            raise ValueError(f"The model takes {self.num_cameras} cameras, but the benchmark sends {sent}.")
        images = self.histories[ctx.session_id].append(images if len(images) > 1 else images[0])
        await super().on_observation({**obs, "images": images}, ctx)

    def predict(self, obs: Observation, ctx: SessionContext) -> Action:
        """Return an action ``(7,)`` or a chunk ``(chunk, 7)`` in the robot's convention, float32."""
        state = obs.get("states", obs.get("state")) if self.takes_state else None
        action = self.policy.act(obs["images"], obs["task_description"], state)
        if self.policy.model.config.action_vq is not None:  # a VQ autoencoder's gripper may leave [0, 1]
            action[..., -1] = action[..., -1].clip(0, 1)
        return {"actions": convert_action(action, self.robot).astype(np.float32)}


if __name__ == "__main__":
    from vla_eval.model_servers.serve import run_server

    run_server(OpenVLAModelServer)
