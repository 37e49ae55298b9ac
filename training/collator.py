"""Collate demonstration steps to training batches, and compute the metrics of a training step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..actions_openvla import NORMALIZATIONS
from ..data.augmentation import ImageAugmentation
from ..data.episodes import Step
from ..data.stream import StreamPosition
from ..errors_openvla import OpenVLAKeyError, OpenVLAValueError
from ..inference.image_presets import lanczos3_resized
from ..modeling_openvla import OpenVLAForActionPrediction
from ..prismatic_openvla import IGNORE_INDEX
from ..processing_openvla import OpenVLAProcessor
from .token_loss import to_device


class ActionCollator:
    """Collate function for demonstration steps; holds no weights, so DataLoader workers can copy it.

    A sequence is the prompt with its empty token, the tokens of the normalized actions, and EOS. It is concatenated
    from token ids, not tokenized from text. Labels cover actions and EOS; padding is on the right.

    Args:
        processor: Processor of the checkpoint.
        model: Model that supplies statistics, action tokenizer and number of cameras.
        augment: Image augmentation, drawn separately for each camera, on frames resized as the reference does. None
            leaves frames unchanged.
        seed: Seed of the augmentation.
        position: Position in the data of the first batch; a resumed run then draws the same augmentations.
        rank: Index of this process.
        world_size: Number of processes.
        pad_to_multiple_of: Sequences are padded to a multiple of this length, so that few lengths occur.
    """

    def __init__(
        self,
        processor: OpenVLAProcessor,
        model: OpenVLAForActionPrediction,
        augment: ImageAugmentation | None = None,
        *,
        seed: int = 0,
        position: StreamPosition | None = None,
        rank: int = 0,
        world_size: int = 1,
        pad_to_multiple_of: int = 1,
    ) -> None:
        config, self.pad_to_multiple_of = model.config, pad_to_multiple_of
        self.processor, self.augment, self.seed = processor, augment, seed
        self.position = position or StreamPosition(world_size=world_size)
        self.rank, self.world_size, self._num_collated = rank, world_size, 0
        self.image_size = config.image_sizes[0]
        self.action_tokenizer = model.action_tokenizer
        self.statistics = {key: model.action_statistics(key) for key in model.norm_stats if _is_trainable(model, key)}
        takes_proprio = config.proprio_dim is not None
        self.proprio_statistics = {key: model.proprio_statistics(key) for key in self.statistics if takes_proprio}
        self.end_id, self.pad_id = config.text_config.eos_token_id, model.pad_token_id
        self.num_cameras = config.num_images_in_input
        self.has_head, self.chunk_length = config.action_head is not None, config.chunk_length

    def __call__(self, steps: Sequence[Step]) -> dict[str, torch.Tensor]:
        """Collate one batch.

        Args:
            steps: Samples with ``images`` (uint8 ``(height, width, 3)`` each, in the order of the cameras),
                ``instruction``, ``actions`` ``(chunk, action_dim)`` in robot units, ``dataset`` (its key in the
                statistics) and, for models that take it, ``proprio`` ``(proprio_dim,)`` in the robot's units.

        Returns:
            ``input_ids``, ``attention_mask``, ``labels`` int64 ``(batch, length)``; ``pixel_values`` float32
            ``(batch, images * (3 or 6), size, size)``; for a continuous head ``actions`` float32
            ``(batch, chunk, action_dim)``, normalized; ``proprio`` float32 ``(batch, proprio_dim)``, normalized.

        Raises:
            OpenVLAKeyError: The model has no statistics of a dataset.
            OpenVLAValueError: Number of images, chunk length, or dimension of actions or proprio differs from the
                model's, or proprio is missing.
        """
        input_ids, labels, pixel_values, actions, proprio = [], [], [], [], []
        generator = np.random.default_rng([self.seed, *self.position.source(self._next_batch())])
        for step in steps:
            inputs = self.processor(instruction=step.instruction, images=self._images(step, generator))
            normalized = self.normalized_actions(step)
            action_ids = torch.from_numpy(self.action_tokenizer.encode(normalized).reshape(-1))
            targets = torch.cat([action_ids, torch.tensor([self.end_id])])
            prompt = inputs["input_ids"][0]
            input_ids.append(torch.cat([prompt, targets]))
            labels.append(torch.cat([torch.full_like(prompt, IGNORE_INDEX), targets]))
            pixel_values.append(inputs["pixel_values"])
            actions.append(torch.from_numpy(normalized).float())
            if self.proprio_statistics:
                proprio.append(torch.from_numpy(self._normalized_proprio(step)).float())
        lengths = torch.tensor([len(ids) for ids in input_ids])
        width = -(-int(lengths.max()) // self.pad_to_multiple_of) * self.pad_to_multiple_of
        batch = {
            "input_ids": _padded(input_ids, width, self.pad_id),
            "attention_mask": (torch.arange(width) < lengths[:, None]).long(),
            "labels": _padded(labels, width, IGNORE_INDEX),
            "pixel_values": torch.cat(pixel_values),
        }
        if self.has_head:
            batch["actions"] = torch.stack(actions)
        if proprio:
            batch["proprio"] = torch.stack(proprio)
        return batch

    def _next_batch(self) -> int:
        """Return the number of this batch among those of all processes; DataLoader asks its workers in turn."""
        worker = torch.utils.data.get_worker_info()
        index, count = (0, 1) if worker is None else (worker.id, worker.num_workers)
        batch_of_process = self._num_collated * count + index
        self._num_collated += 1
        return self.position.batches + batch_of_process * self.world_size + self.rank

    def _images(self, step: Step, generator: np.random.Generator) -> list[np.ndarray]:
        if len(step.images) != self.num_cameras:
            raise OpenVLAValueError(
                f"The model takes {self.num_cameras} images, {step.dataset!r} gives {len(step.images)}: name the "
                "cameras that it should see, in order, in the data's fields ({path: ..., fields: {cameras: []}})."
            )
        if self.augment is None:
            return list(step.images)
        size = (self.image_size, self.image_size)
        frames = [image if image.shape[:2] == size else lanczos3_resized(image, size) for image in step.images]
        return [self.augment(frame, generator) for frame in frames]

    def normalized_actions(self, step: Step) -> np.ndarray:
        """Return the actions of a step as training targets: float64 ``(chunk, action_dim)`` in [-1, 1]."""
        key, actions = step.dataset, np.asarray(step.actions, dtype=np.float64)
        if key not in self.statistics:
            raise OpenVLAKeyError(
                f"No statistics of {key!r} that fit the model; it has those of {list(self.statistics)}."
            )
        if len(actions) != self.chunk_length:
            raise OpenVLAValueError(f"The model predicts {self.chunk_length} actions; {key!r} gives {len(actions)}.")
        return self.statistics[key].normalize(actions)

    def _normalized_proprio(self, step: Step) -> np.ndarray:
        if step.proprio is None:
            raise OpenVLAValueError(f"The model takes proprio, and a step of {step.dataset!r} has none.")
        return self.proprio_statistics[step.dataset].normalize_proprio(step.proprio)


def _padded(sequences: Sequence[torch.Tensor], width: int, value: int) -> torch.Tensor:
    """Stack sequences, padded on the right."""
    return torch.stack([torch.nn.functional.pad(ids, (0, width - len(ids)), value=value) for ids in sequences])


def _is_trainable(model: OpenVLAForActionPrediction, key: str) -> bool:
    """Return True if a dataset has the model's dimensions; a base model may hold statistics of many other robots."""
    low, _ = NORMALIZATIONS[model.config.normalization]
    statistics = model.norm_stats[key]
    has_proprio = model.config.proprio_dim is None or "proprio" in statistics
    return has_proprio and model.config.action_dim in (None, len(statistics["action"][low]))


def model_inputs(batch: Mapping[str, torch.Tensor], model: OpenVLAForActionPrediction) -> Mapping[str, torch.Tensor]:
    """Return the arguments of the model's forward pass for a batch.

    A causal model never attends to padding on the right, so it needs no mask; without one, attention uses its causal
    kernel, which skips half of the products. Parallel decoding attends in both directions and keeps the mask.

    Args:
        batch: Batch of :class:`ActionCollator`.
        model: Model, not wrapped.
    """
    if model.config.parallel_decoding:
        return batch
    return {name: tensor for name, tensor in batch.items() if name != "attention_mask"}


def compute_metrics(
    output: Any, batch: Mapping[str, torch.Tensor], model: OpenVLAForActionPrediction
) -> dict[str, torch.Tensor]:
    """Compute the metrics of a training step, under the reference's names, without synchronising the device.

    Args:
        output: Output of ``model(**batch, logits_at_labels=True)``.
        batch: Batch of :class:`ActionCollator`.
        model: Model, not wrapped.

    Returns:
        Scalars on the device. Tokens: ``action_accuracy`` (fraction of action tokens predicted correctly), ``l1_loss``
        (mean absolute error of the decoded actions, in [-1, 1] units) and ``l1_bins`` (the same in bins). L1 head:
        ``curr_action_l1_loss`` and, for chunks, ``next_actions_l1_loss``. Diffusion head: none.
    """
    if model.config.action_head == "diffusion":
        return {}
    if model.config.action_head == "l1":
        error = (output.predictions.detach().float() - batch["actions"]).abs()
        metrics = {"curr_action_l1_loss": error[:, 0].mean()}
        if error.shape[1] > 1:
            metrics["next_actions_l1_loss"] = error[:, 1:].mean()
        return metrics
    action_ids = model.action_token_ids
    targets, device = batch["labels"][batch["labels"] != IGNORE_INDEX], output.logits.device
    is_action = ((targets >= action_ids.start) & (targets < action_ids.stop)).nonzero()[:, 0]
    predicted = output.logits.detach().argmax(-1)[to_device(is_action, device)]
    targets = to_device(targets[is_action], device)
    num_bins = model.config.n_action_bins
    predicted_bins, target_bins = (
        (action_ids.stop - 1 - tokens).clamp(0, num_bins - 2) for tokens in (predicted, targets)
    )
    centers = to_device(torch.from_numpy(model.bin_centers).float(), device)
    return {
        "action_accuracy": (predicted == targets).float().mean(),
        "l1_loss": (centers[predicted_bins] - centers[target_bins]).abs().mean(),
        "l1_bins": (predicted_bins - target_bins).abs().float().mean(),
    }
