"""Configuration of the policy type "openvla": where the model is, how it is trained, how its actions are executed."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import snapshot_download
from lerobot.configs import NormalizationMode, PolicyFeature, PreTrainedConfig
from lerobot.optim import AdamWConfig
from lerobot.utils.constants import ACTION, OBS_STATE
from openvla.configuration_openvla import PLATFORMS, require_known
from openvla.errors_openvla import OpenVLAValueError
from openvla.inference.image_presets import IMAGE_PRESETS
from openvla.inference.robot_conventions import robot_convention

if TYPE_CHECKING:
    from openvla.configuration_openvla import OpenVLAConfig as ModelConfig
    from openvla.training.config import FinetuneConfig

# Folder of a LeRobot checkpoint that is a complete folder of the openvla package: a model, or an adapter.
MODEL_FOLDER = "openvla"
METHODS = ("full", "lora", "frozen-vision", "sandwich", "last-layer")


@PreTrainedConfig.register_subclass("openvla")
@dataclass
class OpenVLAConfig(PreTrainedConfig):
    """Configuration of an OpenVLA, OpenVLA-OFT or MiniVLA policy in LeRobot.

    Images, states and actions are not normalised by LeRobot: the model's processor and the model's own statistics do
    that, so that actions are those of ``openvla.Policy.act``.

    Attributes:
        pretrained_openvla: Folder or Hub id of the openvla package's format to start from: a model or an adapter. A
            LeRobot checkpoint (``--policy.path``) holds such a folder itself.
        unnorm_key: Dataset whose statistics (un-)normalise actions. In training None is the dataset's repo_id, whose
            statistics are computed from its data where the model has none under this name. For a trained policy None
            is the model's only or default dataset.
        cameras: Image features in the order in which the model takes them, by their full names or the last part of
            them. None takes all of the dataset's or environment's, if they are as many as the model's.
        instruction: Instruction where an observation has none (its task is empty).
        n_action_steps: Actions of a chunk to execute before the next prediction; None executes all of them.
        temporal_ensemble_coeff: Average the actions that overlapping chunks predict for a step; see
            ``openvla.ActionQueue``. Needs ``n_action_steps=1`` to predict at every step.
        robot_convention: Key of ``openvla``'s ``ROBOT_CONVENTIONS`` into which predicted actions are converted, such as
            "libero" for published LIBERO checkpoints. None leaves them as they are in the training data.
        constrain_actions: Predict action tokens only; see ``predict_action``. None is False, but for the demo policy.
        history_padding: For a model of several moments, see ``openvla.Policy``.
        image_preset: Preparation of images for acting, a key of openvla's ``IMAGE_PRESETS``, such as "libero". None is
            the processor's own, or after training "libero" with augmentation, else "none".
        method: What is trained, as in ``openvla finetune``: one of ``METHODS``.
        lora_rank: Rank of LoRA.
        lora_alpha: LoRA's updates are scaled by ``lora_alpha / lora_rank``.
        lora_targets: Modules with LoRA matrices: "all-linear", "language" or "sandwich".
        action_config: Make an OpenVLA an OpenVLA-OFT model: arguments of ``enable_parallel_decoding``, and optionally
            ``platform``, a key of openvla's ``PLATFORMS``.
        action_mask: Which action dimensions are normalised, for statistics that are computed. None: all but the
            gripper of seven.
        augment: Augment images in training as OpenVLA's training does.
        trained_batches: Batches whose images were augmented so far; a resumed run continues from there.
        pad_last_chunk: Train on chunks that begin at the last steps of an episode, padded with its last action.
        gradient_checkpointing: Recompute layers in the backward pass: less memory, slower steps.
        dtype: "float32", "bfloat16" or "float16": dtype of the weights for acting, and of autocast in training. None is
            bfloat16 (else float16) on a GPU, and the checkpoint's dtype on a CPU.
        optimizer_lr: Learning rate of AdamW; constant, as in the paper.
        optimizer_weight_decay: Weight decay.
        optimizer_grad_clip_norm: Maximum gradient norm.
        normalization_mapping: Left at identity: see above.
    """

    pretrained_openvla: str | None = None
    unnorm_key: str | None = None
    cameras: list[str] | None = None
    instruction: str | None = None
    n_action_steps: int | None = None
    temporal_ensemble_coeff: float | None = None
    robot_convention: str | None = None
    constrain_actions: bool | None = None
    history_padding: str = "start"
    image_preset: str | None = None
    method: str = "full"
    lora_rank: int = 32
    lora_alpha: float = 16
    lora_targets: str = "all-linear"
    action_config: dict[str, Any] | None = None
    action_mask: list[bool] | None = None
    augment: bool = True
    trained_batches: int = 0
    pad_last_chunk: bool = False
    gradient_checkpointing: bool = False
    dtype: str | None = None
    optimizer_lr: float = 5e-4
    optimizer_weight_decay: float = 0.01
    optimizer_grad_clip_norm: float = 1.0
    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: dict.fromkeys(("VISUAL", "STATE", "ACTION"), NormalizationMode.IDENTITY)
    )

    def __post_init__(self) -> None:
        """Choose the device, and check everything that needs no file.

        Raises:
            OpenVLAValueError: A value is not allowed, or would be ignored.
        """
        super().__post_init__()
        if self.method not in METHODS:
            raise OpenVLAValueError(f"Unknown method {self.method!r}; allowed: {list(METHODS)}.")
        if any(mode is not NormalizationMode.IDENTITY for mode in self.normalization_mapping.values()):
            raise OpenVLAValueError(
                "normalization_mapping must stay at IDENTITY: the model normalises by its own statistics "
                f"(unnorm_key), got {self.normalization_mapping}."
            )
        if self.robot_convention is not None:
            robot_convention(self.robot_convention)
        if self.image_preset is not None:
            require_known("image_preset", self.image_preset, tuple(IMAGE_PRESETS))
        if self.n_obs_steps != 1:
            raise OpenVLAValueError(
                f"n_obs_steps must be 1, got {self.n_obs_steps}; a model of several moments keeps its history itself."
            )
        if self.dtype is None and self.device is not None and self.device.startswith("cuda"):
            from openvla.inference.quantization import fast_dtype

            self.dtype = str(fast_dtype()).removeprefix("torch.")
        if self.dtype not in (None, "float32", "bfloat16", "float16"):
            raise OpenVLAValueError(f"dtype must be float32, bfloat16 or float16, got {self.dtype!r}.")

    def openvla_folder(self) -> str:
        """Return the folder or Hub id of the model in the openvla package's format.

        Raises:
            OpenVLAValueError: There is neither a LeRobot checkpoint nor ``pretrained_openvla``.
        """
        if self.pretrained_path is not None:
            return _folder_of_checkpoint(str(self.pretrained_path), self.pretrained_revision)
        if self.pretrained_openvla is None:
            raise OpenVLAValueError(
                "No model: give --policy.pretrained_openvla=FOLDER_OR_HUB_ID (a folder of the openvla package, such as "
                "openvla/openvla-7b), or --policy.path=CHECKPOINT (a folder that LeRobot saved)."
            )
        return self.pretrained_openvla

    def model_config(self) -> ModelConfig:
        """Return the model's configuration, as it is in training and after it.

        Raises:
            OpenVLAValueError: There is no model, or ``action_config`` does not fit it.
        """
        from openvla.adapters.parallel_decoding import set_action_config
        from openvla.configuration_openvla import OpenVLAConfig

        config = OpenVLAConfig.from_pretrained(self.openvla_folder())
        if self.action_config is not None and not config.parallel_decoding:
            fields = dict(self.action_config)
            platform = fields.pop("platform", None)
            if platform is not None:
                require_known("platform", platform, tuple(PLATFORMS))
            set_action_config(config, **{**PLATFORMS.get(platform, {}), **fields, "parallel_decoding": True})
        return config

    def finetune_config(self) -> FinetuneConfig:
        """Return the settings of training that are also those of ``openvla finetune``."""
        from openvla.training.config import FinetuneConfig

        lora = {name: getattr(self, name) for name in ("lora_rank", "lora_alpha", "lora_targets")}
        return FinetuneConfig(
            model=self.openvla_folder(),
            output_dir="",
            method=self.method,
            action_config=self.action_config,
            augment=self.augment,
            **(lora if self.method == "lora" else {}),
        )

    @property
    def observation_delta_indices(self) -> None:
        """Return None: an observation is that of one moment."""
        return

    @property
    def action_delta_indices(self) -> list[int]:
        """Return the steps of a chunk, counted from the observation's."""
        return list(range(self.model_config().chunk_length))

    @property
    def reward_delta_indices(self) -> None:
        """Return None: rewards are not used."""
        return

    @property
    def drop_n_last_frames(self) -> int:
        """Return the number of steps at an episode's end at which LeRobot's sampler begins no chunk."""
        return 0 if self.pad_last_chunk else self.model_config().chunk_length - 1

    def get_optimizer_preset(self) -> AdamWConfig:
        """Return AdamW as in ``openvla finetune``."""
        return AdamWConfig(
            lr=self.optimizer_lr,
            weight_decay=self.optimizer_weight_decay,
            grad_clip_norm=self.optimizer_grad_clip_norm,
        )

    def get_scheduler_preset(self) -> None:
        """Return None: the learning rate is constant."""
        return

    def validate_features(self) -> None:
        """Check the features against the model, and keep those that it takes: cameras, in its order, and state.

        Raises:
            OpenVLAValueError: Cameras, state or action do not fit the model.
        """
        config = self.model_config()
        if config.trace_prompting:
            raise OpenVLAValueError(
                f"{self.openvla_folder()} is a TraceVLA, which needs the traces of every frame; use openvla's "
                "load_policy(tracker=...)."
            )
        self.cameras = self._camera_names(config.images_per_moment)
        state = self.robot_state_feature
        if config.proprio_dim is not None and (state is None or state.shape != (config.proprio_dim,)):
            got = "none" if state is None else f"one of shape {tuple(state.shape)}"
            raise OpenVLAValueError(f"The model takes {OBS_STATE} of shape ({config.proprio_dim},), there is {got}.")
        inputs: dict[str, PolicyFeature] = {name: self.image_features[name] for name in self.cameras}
        if config.proprio_dim is not None:
            inputs[OBS_STATE] = state
        self.input_features = inputs
        action = self.action_feature
        if action is None:
            raise OpenVLAValueError(f"There is no output feature {ACTION!r}; name the dataset's column of actions so.")
        if config.action_dim not in (None, action.shape[0]):
            raise OpenVLAValueError(f"The model predicts {config.action_dim} numbers, {ACTION} has {action.shape[0]}.")
        if self.n_action_steps is not None and not 1 <= self.n_action_steps <= config.chunk_length:
            raise OpenVLAValueError(
                f"n_action_steps must be 1 to {config.chunk_length}, the length of the model's chunks, or None, got "
                f"{self.n_action_steps}."
            )

    def _camera_names(self, count: int) -> list[str]:
        """Return the full names of the cameras that the model takes, in its order."""
        known = list(self.image_features)
        if self.cameras is None:
            if len(known) == count:
                return known
            raise OpenVLAValueError(
                f"The model takes {count} camera(s), and there are {len(known)}: {known}. Name those that it should "
                "see, in the order of its training: --policy.cameras='[NAME, ...]'."
            )
        names = []
        for camera in self.cameras:
            matches = [name for name in known if camera in (name, name.rpartition(".")[2])]
            if len(matches) != 1:
                raise OpenVLAValueError(f"cameras: {camera!r} is not one of the image features {known}.")
            names += matches
        if len(names) != count:
            raise OpenVLAValueError(f"The model takes {count} camera(s), cameras names {len(names)}: {self.cameras}.")
        return names


@lru_cache(maxsize=16)
def _folder_of_checkpoint(checkpoint: str, revision: str | None) -> str:
    """Return the model's folder in a LeRobot checkpoint, a local folder or a Hub repository."""
    root = Path(checkpoint)
    if not root.is_dir():
        root = Path(snapshot_download(checkpoint, revision=revision, allow_patterns=f"{MODEL_FOLDER}/*"))
    folder = root / MODEL_FOLDER
    if not (folder / "config.json").is_file():
        raise OpenVLAValueError(
            f"{checkpoint} is no LeRobot checkpoint of an OpenVLA: it has no {MODEL_FOLDER}/config.json. A folder of "
            "the openvla package goes to --policy.pretrained_openvla, with --policy.type=openvla."
        )
    return str(folder)
