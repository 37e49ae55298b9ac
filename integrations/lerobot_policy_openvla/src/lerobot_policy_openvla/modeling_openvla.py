"""An OpenVLA, OpenVLA-OFT or MiniVLA model as a policy of LeRobot: it trains, predicts chunks and selects actions."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.constants import ACTION, OBS_STATE
from openvla.data.augmentation import ImageAugmentation
from openvla.data.episodes import Step
from openvla.data.stream import StreamPosition
from openvla.errors_openvla import OpenVLAKeyError, OpenVLATypeError, OpenVLAValueError
from openvla.images_openvla import as_images
from openvla.inference.action_queue import ActionQueue
from openvla.inference.policy import Policy, load_policy
from openvla.inference.robot_conventions import ActionConverter, convert_action
from openvla.training.checkpointing import trained_parameters
from openvla.training.collator import ActionCollator, compute_metrics, model_inputs
from openvla.training.finetune import HOST_TENSORS
from openvla.training.layers import prepared_layers
from torch import Tensor

from .configuration_openvla import MODEL_FOLDER, OpenVLAConfig
from .training import load_for_training

if TYPE_CHECKING:
    from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata

Batch = Mapping[str, Any]


class OpenVLAPolicy(PreTrainedPolicy):
    """Policy of LeRobot whose model, processor and actions are those of the openvla package.

    A batch holds what LeRobot's preprocessor returns: image features as float ``(batch, 3, height, width)`` in [0, 1]
    or uint8, ``observation.state`` ``(batch, proprio_dim)`` in the robot's units for models that take it, and ``task``,
    the instructions; for training ``action`` ``(batch, chunk, action_dim)`` in the robot's units.

    Args:
        config: Configuration with the features of dataset or environment.
        dataset_stats: LeRobot's statistics; not used, since their quantiles are means over episodes.
        dataset_meta: LeRobot's description of the training data, which makes this a policy to train. None loads a
            policy to act.

    Raises:
        OpenVLAValueError: The model does not fit the features, or cannot be trained here.
        OpenVLAKeyError: There are no statistics under ``config.unnorm_key``.
    """

    config_class = OpenVLAConfig
    name = "openvla"
    config: OpenVLAConfig

    def __init__(
        self,
        config: OpenVLAConfig,
        dataset_stats: Mapping[str, Any] | None = None,
        dataset_meta: LeRobotDatasetMetadata | None = None,
    ) -> None:
        super().__init__(config)
        config.validate_features()
        if dataset_meta is None:
            self._policy = load_policy(
                config.openvla_folder(),
                device=config.device,
                dtype=config.dtype,
                unnorm_key=config.unnorm_key,
                constrain_actions=config.constrain_actions,
                history_padding=config.history_padding,
            )
            if config.image_preset is not None:
                self._policy.processor.image_preset = config.image_preset
        else:
            model, processor, key = load_for_training(config, dataset_meta)
            self._policy = Policy(
                model, processor, key, bool(config.constrain_actions), history_padding=config.history_padding
            )
        self.model = self._policy.model
        self._require_action_dimension()
        self._is_trainable = dataset_meta is not None
        self._training_processor = copy.deepcopy(self._policy.processor)
        self._training_processor.image_preset = None  # none in training
        self.reset()

    def _require_action_dimension(self) -> None:
        """Raise OpenVLAValueError where the model's statistics have other dimensions than the feature "action"."""
        key, feature = self._policy.unnorm_key, self.config.action_feature
        dimension = len(self.model.action_statistics(key).low)
        if feature is None or feature.shape != (dimension,):
            raise OpenVLAValueError(
                f"The statistics of {key!r} have {dimension} action dimensions, the feature {ACTION!r} is {feature}; "
                "choose others of the model's statistics with --policy.unnorm_key: "
                f"{list(self.model.norm_stats)}."
            )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_name_or_path: str | Path,
        *,
        config: PreTrainedConfig | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> OpenVLAPolicy:
        """Load a policy from a LeRobot checkpoint, a folder or a Hub repository, in eval mode.

        Args:
            pretrained_name_or_path: Checkpoint that ``save_pretrained`` wrote.
            config: Configuration to use instead of the checkpoint's.
            revision: Revision on the Hub.
            **kwargs: Further arguments of the policy: ``dataset_stats``, ``dataset_meta``.
        """
        if config is None:
            config = PreTrainedConfig.from_pretrained(pretrained_name_or_path, revision=revision)
        if not isinstance(config, OpenVLAConfig):
            raise OpenVLATypeError(f"{pretrained_name_or_path} is a policy of type {config.type!r}, not an OpenVLA.")
        config.pretrained_path, config.pretrained_revision = Path(pretrained_name_or_path), revision
        return cls(config, **kwargs).eval()

    def _save_pretrained(self, save_directory: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write LeRobot's config.json, and beside it the folder "openvla": the model, or its adapter, and processor."""
        self.config._save_pretrained(save_directory)
        folder = save_directory / MODEL_FOLDER
        weights: dict[str, Any] = {}
        if state_dict is not None:
            weights["state_dict"] = {name.removeprefix("model."): tensor for name, tensor in state_dict.items()}
        self.model.save_pretrained(folder, **weights)
        self._policy.processor.save_pretrained(folder)

    def get_optim_params(self) -> list[torch.nn.Parameter]:
        """Return the parameters that ``config.method`` trains."""
        self._require_trainable()
        return list(trained_parameters(self.model).values())

    def wrap_with_peft(self, peft_config: Any = None, peft_cli_overrides: dict | None = None) -> PreTrainedPolicy:
        """Refuse LeRobot's adapters, which leave out action heads and would train modules that never run.

        Raises:
            OpenVLAValueError: Always; the message names the option for LoRA.
        """
        raise OpenVLAValueError("For LoRA use --policy.method=lora (--policy.lora_rank, ...) and leave --peft out.")

    def _require_trainable(self) -> None:
        if not self._is_trainable:
            raise OpenVLAValueError(
                "This policy was loaded to act. To train it, give LeRobot's dataset_meta: make_policy(config, "
                "ds_meta=dataset.meta), as lerobot-train does."
            )

    def reset(self) -> None:
        """Begin an episode: drop the rest of every chunk and the history of images."""
        self._queues: list[tuple[ActionQueue, ActionConverter]] = []

    def forward(self, batch: Batch, reduction: str = "mean") -> tuple[Tensor, dict[str, float]]:
        """Return the loss of a training batch, and the metrics of ``openvla finetune``.

        Args:
            batch: See the class.
            reduction: Only "mean".

        Raises:
            OpenVLAValueError: The batch does not fit the model, or the policy was loaded to act.
        """
        self._require_trainable()
        if reduction != "mean":
            raise OpenVLAValueError(f"reduction {reduction!r}: only the mean over a batch; leave sample_weighting out.")
        collator = self._collator(self.config.augment and self.training)
        inputs = {
            name: tensor if name in HOST_TENSORS else tensor.to(self.model.device)
            for name, tensor in collator(self._steps(batch)).items()
        }
        checkpointing = "full" if self.config.gradient_checkpointing and self.training else None
        with prepared_layers(self.model, checkpointing=checkpointing):
            output = self.model(**model_inputs(inputs, self.model), logits_at_labels=True)
        metrics = compute_metrics(output, inputs, self.model)
        return output.loss, {name: float(value) for name, value in metrics.items()}

    def _collator(self, augments: bool) -> ActionCollator:
        """Return the collator of the next batch; augmentations depend on the run's seed and the batches before."""
        if not augments:
            return ActionCollator(self._training_processor, self.model)
        position = StreamPosition(batches=self.config.trained_batches)
        self.config.trained_batches += 1
        return ActionCollator(
            self._training_processor,
            self.model,
            ImageAugmentation(),
            seed=torch.initial_seed(),
            position=position,
        )

    def _steps(self, batch: Batch) -> list[Step]:
        """Return the samples of a training batch as the collator takes them."""
        if ACTION not in batch:
            raise OpenVLAKeyError(f"A training batch needs {ACTION!r}, got {sorted(map(str, batch))}.")
        chunks = batch[ACTION].cpu().double().numpy()
        is_padding = batch.get(f"{ACTION}_is_pad")
        padding = np.zeros(chunks.shape[:2], bool) if is_padding is None else is_padding.cpu().numpy()
        return [
            Step(tuple(images), instruction, chunks[row], padding[row], state, self._policy.unnorm_key, str(row), 0)
            for row, (images, instruction, state) in enumerate(self._observations(batch))
        ]

    def _observations(self, batch: Batch) -> list[tuple[list[np.ndarray], str, np.ndarray | None]]:
        """Return images uint8 ``(height, width, 3)``, instruction and state of every row of a batch."""
        missing = [name for name in self.config.cameras or () if name not in batch]
        takes_state = self.model.config.proprio_dim is not None
        missing += [OBS_STATE] if takes_state and OBS_STATE not in batch else []
        if missing:
            raise OpenVLAKeyError(f"The observation lacks {missing}; it has {sorted(map(str, batch))}.")
        cameras = [batch[name] for name in self.config.cameras or ()]
        for name, images in zip(self.config.cameras or (), cameras, strict=True):
            if images.ndim != 4 or images.shape[1] != 3:
                raise OpenVLAValueError(f"{name} must be (batch, 3, height, width), got {tuple(images.shape)}.")
        tasks = batch.get("task")
        tasks = [tasks or ""] * len(cameras[0]) if tasks is None or isinstance(tasks, str) else tasks
        rows = []
        for row, task in enumerate(tasks):
            instruction = task or self.config.instruction
            if not instruction:
                raise OpenVLAValueError(
                    "The observation has no task, and an OpenVLA needs an instruction: give --policy.instruction=TEXT."
                )
            images = [np.asarray(as_images(camera[row])[0]) for camera in cameras]
            rows.append((images, instruction, batch[OBS_STATE][row].cpu().numpy() if takes_state else None))
        return rows

    @torch.no_grad()
    def predict_action_chunk(self, batch: Batch, **kwargs: Any) -> Tensor:
        """Predict a chunk of actions for each observation, one after the other, exactly as ``openvla.Policy.act``.

        Args:
            batch: See the class.
            **kwargs: None are taken.

        Returns:
            float64 ``(batch, chunk, action_dim)`` in the units of the statistics, or of ``config.robot_convention``.

        Raises:
            OpenVLAValueError: The model takes images of several moments, for which ``select_action`` keeps a history.
            NoActionError: A prediction is not an action.
        """
        if kwargs:
            raise OpenVLATypeError(f"predict_action_chunk takes no {', '.join(kwargs)}.")
        if self.model.config.history_length > 1:
            raise OpenVLAValueError(
                f"The model takes images of {self.model.config.history_length} moments; call select_action at every "
                "control step."
            )
        chunks = [np.atleast_2d(self._policy.act(*row)) for row in self._observations(batch)]
        if self.config.robot_convention is not None:
            chunks = [convert_action(chunk, self.config.robot_convention) for chunk in chunks]
        return torch.from_numpy(np.stack(chunks))

    @torch.no_grad()
    def select_action(self, batch: Batch, **kwargs: Any) -> Tensor:
        """Return the next action of each environment, exactly as ``openvla.ActionQueue.act``; predict where needed.

        Args:
            batch: See the class; a row is the same environment in every call until ``reset``.
            **kwargs: None are taken.

        Returns:
            float64 ``(batch, action_dim)`` in the units of the statistics, or of ``config.robot_convention``.

        Raises:
            OpenVLAValueError: The number of rows changed without ``reset``.
            NoActionError: A prediction is not an action.
        """
        if kwargs:
            raise OpenVLATypeError(f"select_action takes no {', '.join(kwargs)}.")
        rows = self._observations(batch)
        if not self._queues:
            self._queues = [(self._new_queue(), self._new_converter()) for _ in rows]
        if len(rows) != len(self._queues):
            raise OpenVLAValueError(
                f"The batch has {len(rows)} rows, the one before had {len(self._queues)}; call reset() between "
                "episodes."
            )
        actions = [queue.act(*row) for row, (queue, _) in zip(rows, self._queues, strict=True)]
        if self.config.robot_convention is not None:
            actions = [converter.convert(action) for action, (_, converter) in zip(actions, self._queues, strict=True)]
        return torch.from_numpy(np.stack(actions))

    def _new_queue(self) -> ActionQueue:
        return ActionQueue(
            ChunkPolicy(self._policy),
            n_action_steps=self.config.n_action_steps,
            temporal_ensemble_coeff=self.config.temporal_ensemble_coeff,
        )

    def _new_converter(self) -> ActionConverter:
        return ActionConverter(self.config.robot_convention or "raw")


class ChunkPolicy:
    """A policy for ``ActionQueue`` whose single actions are chunks of one."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.new_history = policy, policy.new_history

    def act(self, image: Any, instruction: str, proprio: Any = None) -> np.ndarray:
        """Return ``Policy.act`` as a chunk, float64 ``(chunk, action_dim)``."""
        return np.atleast_2d(self.policy.act(image, instruction, proprio))
