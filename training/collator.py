"""From demonstration steps to the tensors that a model trains on, and what its answers to them are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..actions_openvla import NORMALIZATIONS
from ..data.augmentation import ImageAugmentation
from ..errors_openvla import OpenVLAKeyError, OpenVLAValueError
from ..inference.image_presets import lanczos3_resized
from ..modeling_openvla import OpenVLAForActionPrediction
from ..prismatic_openvla import IGNORE_INDEX
from ..processing_openvla import OpenVLAProcessor


class ActionCollator:
    """Makes a batch of demonstration steps; holds no weights, so that data loader workers can carry it.

    Each row is the prompt with its empty token, the tokens of the normalised actions, and the end token: built from
    ids, never by way of text. Labels stand on the actions and the end token; rows are padded on the right.

    Args:
        processor: Of the checkpoint.
        model: Whose statistics, bins and cameras count.
        augment: Crop and colour changes, each camera's drawn anew, on frames resized as the reference does; None leaves
            frames as they are.
        seed: Of what is drawn, with the number of the batch, so that a run which goes on draws what it would have.
        first_batch: The number of the first batch to come.
    """

    def __init__(
        self,
        processor: OpenVLAProcessor,
        model: OpenVLAForActionPrediction,
        augment: ImageAugmentation | None = None,
        seed: Sequence[int] = (0,),
        first_batch: int = 0,
    ) -> None:
        config = model.config
        self.processor, self.augment, self.seed = processor, augment, list(seed)
        self.image_size, self.first_batch, self._made = config.image_sizes[0], first_batch, 0
        self.action_tokenizer = model.action_tokenizer
        self.statistics = {key: model.action_statistics(key) for key in model.norm_stats if _fits(model, key)}
        takes_proprio = config.proprio_dim is not None
        self.proprio_statistics = {key: model.proprio_statistics(key) for key in self.statistics if takes_proprio}
        self.end_id, self.pad_id = config.text_config.eos_token_id, model.pad_token_id
        self.cameras = config.num_images_in_input
        self.has_head, self.chunk_length = config.action_head is not None, config.chunk_length

    def __call__(self, steps: Sequence[Any]) -> dict[str, torch.Tensor]:
        """One batch.

        Args:
            steps: Samples of ``demonstrations``: ``images`` (uint8 ``(height, width, 3)`` each, in the order of the
                cameras), ``instruction``, ``actions`` ``(chunk, action_dim)`` in robot units, ``dataset`` (its key in
                the statistics) and, for models that take it, ``proprio`` ``(proprio_dim,)`` in the robot's units.

        Returns:
            ``input_ids``, ``attention_mask``, ``labels`` int64 ``(batch, length)``; ``pixel_values`` float32
            ``(batch, images * (3 or 6), size, size)``; for a continuous head ``actions`` float32
            ``(batch, chunk, action_dim)``, normalised; ``proprio`` float32 ``(batch, proprio_dim)``, normalised.

        Raises:
            KeyError: A dataset without statistics.
            ValueError: A chunk of another length, actions or proprio of another dimension, no proprio.
        """
        rows, labels, pixels, actions, proprio = [], [], [], [], []
        generator = np.random.default_rng([*self.seed, self._batch_number()])
        for step in steps:
            if len(step.images) != self.cameras:
                raise OpenVLAValueError(
                    f"The model takes {self.cameras} images, {step.dataset!r} gives {len(step.images)}: name the "
                    "cameras that it should see, in order, in the data's fields ({path: ..., fields: {cameras: []}})."
                )
            images = list(step.images) if self.augment is None else self._augmented(step.images, generator)
            inputs = self.processor(instruction=step.instruction, images=images)
            normalized = self.normalized(step)
            tokens = torch.from_numpy(self.action_tokenizer.encode(normalized).reshape(-1))
            answer = torch.cat([tokens, torch.tensor([self.end_id])])
            prompt = inputs["input_ids"][0]
            rows.append(torch.cat([prompt, answer]))
            labels.append(torch.cat([torch.full_like(prompt, IGNORE_INDEX), answer]))
            pixels.append(inputs["pixel_values"])
            actions.append(torch.from_numpy(normalized).float())
            if self.proprio_statistics:
                proprio.append(torch.from_numpy(self._proprio(step)).float())
        pad = torch.nn.utils.rnn.pad_sequence
        lengths = torch.tensor([len(row) for row in rows])
        batch = {
            "input_ids": pad(rows, batch_first=True, padding_value=self.pad_id),
            "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
            "labels": pad(labels, batch_first=True, padding_value=IGNORE_INDEX),
            "pixel_values": torch.cat(pixels),
        }
        if self.has_head:
            batch["actions"] = torch.stack(actions)
        if proprio:
            batch["proprio"] = torch.stack(proprio)
        return batch

    def _batch_number(self) -> int:
        """The number of this batch: a data loader asks its workers in turn."""
        worker = torch.utils.data.get_worker_info()
        index, count = (0, 1) if worker is None else (worker.id, worker.num_workers)
        self._made += 1
        return self.first_batch + (self._made - 1) * count + index

    def _augmented(self, images: Sequence[np.ndarray], generator: np.random.Generator) -> list[np.ndarray]:
        size = (self.image_size, self.image_size)
        frames = [image if image.shape[:2] == size else lanczos3_resized(image, size) for image in images]
        return [self.augment(frame, generator) for frame in frames]

    def normalized(self, step: Any) -> np.ndarray:
        """A step's actions as the model is trained on them: float64 ``(chunk, action_dim)`` in [-1, 1]."""
        key, actions = step.dataset, np.asarray(step.actions, dtype=np.float64)
        if key not in self.statistics:
            raise OpenVLAKeyError(
                f"No statistics of {key!r} that fit the model; it has those of {list(self.statistics)}."
            )
        if len(actions) != self.chunk_length:
            raise OpenVLAValueError(
                f"The model answers with {self.chunk_length} actions; {key!r} gives {len(actions)}."
            )
        return self.statistics[key].normalize(actions)

    def _proprio(self, step: Any) -> np.ndarray:
        if step.proprio is None:
            raise OpenVLAValueError(f"The model takes proprio, and a step of {step.dataset!r} has none.")
        return self.proprio_statistics[step.dataset].normalize_proprio(step.proprio)


def _fits(model: OpenVLAForActionPrediction, key: str) -> bool:
    """Whether a dataset is one that the model can be trained on: a base may know many other robots."""
    low, _ = NORMALIZATIONS[model.config.normalization]
    statistics = model.norm_stats[key]
    has_proprio = model.config.proprio_dim is None or "proprio" in statistics
    return has_proprio and model.config.action_dim in (None, len(statistics["action"][low]))


def model_inputs(batch: Mapping[str, torch.Tensor], model: OpenVLAForActionPrediction) -> Mapping[str, torch.Tensor]:
    """What of a batch a training pass needs.

    Padding stands on the right, where a causal model never looks back from: it needs no mask, and without one attention
    takes its causal kernel, which skips half of the products. Parallel decoding looks both ways and keeps it.

    Args:
        batch: As :class:`ActionCollator` made it.
        model: Not wrapped.
    """
    if model.config.parallel_decoding:
        return batch
    return {name: tensor for name, tensor in batch.items() if name != "attention_mask"}


def answer_metrics(
    output: Any, batch: Mapping[str, torch.Tensor], model: OpenVLAForActionPrediction
) -> dict[str, torch.Tensor]:
    """What a training pass was worth, under the reference's names; tensors on the device, so that nothing waits.

    Args:
        output: Of ``model(**batch, logits_at_labels=True)``.
        batch: As :class:`ActionCollator` made it.
        model: Not wrapped.

    Returns:
        For tokens ``action_accuracy`` (share of action tokens that are right), ``l1_loss`` (mean distance of the
        decoded actions, in [-1, 1] units) and ``l1_bins`` (the same in bins); for an L1 head ``curr_action_l1_loss``
        and ``next_actions_l1_loss``.
    """
    if model.config.action_head == "diffusion":
        return {}
    if model.config.action_head == "l1":
        distance = (output.predictions.detach().float() - batch["actions"]).abs()
        found = {"curr_action_l1_loss": distance[:, 0].mean()}
        return {**found, "next_actions_l1_loss": distance[:, 1:].mean()} if distance.shape[1] > 1 else found
    ids = model.action_token_ids
    wanted = batch["labels"][batch["labels"] != IGNORE_INDEX]
    is_action = (wanted >= ids.start) & (wanted < ids.stop)
    predicted, wanted = output.logits.detach().argmax(-1)[is_action], wanted[is_action]
    bins = [(ids.stop - 1 - tokens).clamp(0, model.config.n_action_bins - 2) for tokens in (predicted, wanted)]
    centers = torch.from_numpy(model.bin_centers).to(device=predicted.device, dtype=torch.float32)
    return {
        "action_accuracy": (predicted == wanted).float().mean(),
        "l1_loss": (centers[bins[0]] - centers[bins[1]]).abs().mean(),
        "l1_bins": (bins[0] - bins[1]).abs().float().mean(),
    }
