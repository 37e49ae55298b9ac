"""Collate demonstration steps to training batches, and compute the metrics of a training step."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..actions_openvla import NORMALIZATIONS
from ..data.augmentation import AugmentationParameters, ImageAugmentation, augment_frames
from ..data.batches import StepBatch
from ..data.episodes import Step, neutral_past_end
from ..data.stream import StreamPosition
from ..errors_openvla import OpenVLAKeyError, OpenVLAValueError
from ..inference.image_presets import lanczos3_resized
from ..modeling_openvla import OpenVLAForActionPrediction
from ..prismatic_openvla import IGNORE_INDEX
from ..processing_openvla import OpenVLAProcessor, require_bos
from .device_augmentation import as_rows, augmented_on_device
from .token_loss import action_labels, to_device

# Special token that ends a turn of the chat, between actions and EOS, by prompt.
TURN_ENDS = {"openvla-mini": "<|im_end|>"}
# Grey levels; what an image loses in a video is less. A trace covers a few percent of a frame.
CODEC_LEVELS = 16
KEPT_PROMPTS = 10_000  # most tokenized instructions that are kept, since the steps of an episode have the same


class ActionCollator:
    """Collate function for demonstration steps; holds no weights but a VQ autoencoder's, so workers can copy it.

    A sequence is the prompt with its empty token, the tokens of the normalized actions (bins or VQ codes), the end of
    the chat's turn where the prompt is one, and EOS. It is concatenated from token ids, not tokenized from text. Labels
    cover everything behind the prompt; padding is on the right. Where the padding id is EOS (MiniVLA), the mask hides
    the last token, as in the reference, whose mask is made from the ids.

    Args:
        processor: Processor of the checkpoint.
        model: Model that supplies statistics, action tokenizer and number of cameras.
        augment: Image augmentation, drawn separately for each camera, on frames resized as the reference does. None
            leaves frames unchanged.
        seed: Seed of the augmentation.
        position: Position in the data of the first batch; a resumed run then draws the same augmentations. A
            :class:`~openvla.data.batches.StepBatch` has its own, so that its augmentation depends on its number alone.
        rank: Index of this process.
        world_size: Number of processes.
        pad_to_multiple_of: Sequences are padded to a multiple of this length, so that few lengths occur.
        trace_dropout: TraceVLA: probability that a frame with a trace is shown without it.
        normalize: Make ``pixel_values``. False leaves resizing and normalization to :func:`with_pixel_values`, which
            does it on the model's device, with the same bits: less work and a quarter to an eighth of the memory here.
        augment_on_device: Leave the augmentation to :func:`with_pixel_values` too, with the same parameters and bits;
            for ``normalize=False``. Frames of several sizes, and a TraceVLA's, are augmented here nevertheless.
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
        trace_dropout: float = 0.0,
        normalize: bool = True,
        augment_on_device: bool = False,
    ) -> None:
        config, self.pad_to_multiple_of = model.config, pad_to_multiple_of
        self.processor, self.augment, self.seed = processor, augment, seed
        self.position = position or StreamPosition(world_size=world_size)
        self.rank, self.world_size, self._num_collated = rank, world_size, 0
        self.image_size = config.image_sizes[0]
        self.action_tokenizer: Any = copy.deepcopy(model.action_tokenizer)
        if config.action_vq is not None:
            self.action_tokenizer.vq.to("cpu")  # workers have no GPU
        self.statistics = {key: model.action_statistics(key) for key in model.norm_stats if _is_trainable(model, key)}
        takes_proprio = config.proprio_dim is not None
        self.proprio_statistics = {key: model.proprio_statistics(key) for key in self.statistics if takes_proprio}
        end_ids, self.pad_id = [config.text_config.eos_token_id], model.pad_token_id
        if config.prompt_style in TURN_ENDS and not config.parallel_decoding:
            end_ids.insert(0, processor.tokenizer.get_added_vocab()[TURN_ENDS[config.prompt_style]])
        self.end_ids = torch.tensor(end_ids)
        self.num_hidden = int(end_ids[-1] == self.pad_id and not config.parallel_decoding)
        self.num_images, self.images_per_moment = config.num_images_in_input, config.images_per_moment
        self.trace_prompting, self.trace_dropout = config.trace_prompting, trace_dropout
        # A preset, or a number of images that changes the prompt, needs the processor.
        self.normalize = normalize or config.trace_prompting or processor.image_preset not in (None, "none")
        self.augment_on_device = augment_on_device and augment is not None
        self._prompts: dict[tuple[str, str], torch.Tensor] = {}
        self.rests_past_end = config.action_vq is not None
        self.has_head, self.chunk_length = config.action_head is not None, config.chunk_length

    def __call__(self, steps: Sequence[Step]) -> dict[str, torch.Tensor]:
        """Collate one batch.

        Args:
            steps: Samples with ``images`` (uint8 ``(height, width, 3)`` each, in the order of the cameras, the oldest
                moment first; TraceVLA: the frame, and with its trace), ``instruction``, ``actions``
                ``(chunk, action_dim)`` in robot units, ``dataset`` (its key in the statistics), for VQ actions
                ``is_padding`` ``(chunk,)`` and, for models that take it, ``proprio`` ``(proprio_dim,)`` in the robot's
                units.

        Returns:
            ``input_ids``, ``attention_mask``, ``labels`` int64 ``(batch, length)``; ``pixel_values`` float32
            ``(batch, images * (3 or 6), size, size)``, or ``frames`` uint8 ``(batch * images, height, width, 3)`` if
            they are not normalized here and have one size; for a continuous head ``actions`` float32
            ``(batch, chunk, action_dim)``, normalized; ``proprio`` float32 ``(batch, proprio_dim)``, normalized.

        Raises:
            OpenVLAKeyError: The model has no statistics of a dataset.
            OpenVLAValueError: Number of images, chunk length, or dimension of actions or proprio differs from the
                model's, or proprio is missing.
        """
        input_ids, labels, pixel_values, actions, proprio = [], [], [], [], []
        source = steps.source if isinstance(steps, StepBatch) else self.position.source(self._next_batch())
        generator = np.random.default_rng([self.seed, *source])
        images, parameters = [], []
        for step in steps:
            images.append(self._shown_images(step, generator))
            parameters.append(self._draw(len(images[-1]), generator))
        on_device = self.augment_on_device and not self.normalize and _have_one_shape(images)
        if self.augment is not None and not on_device:
            images = [self._augmented(*drawn) for drawn in zip(images, parameters)]
        normalize = self.normalize or not _have_one_shape(images)
        for step, of_step in zip(steps, images):
            if normalize:
                inputs = self.processor(instruction=step.instruction, images=of_step)
                prompt = inputs["input_ids"][0]
                pixel_values.append(inputs["pixel_values"])
            else:
                prompt = self._prompt_ids(step.instruction)
            normalized = self.normalized_actions(step)
            action_ids = torch.from_numpy(self.action_tokenizer.encode(normalized).reshape(-1))
            targets = torch.cat([action_ids, self.end_ids])
            input_ids.append(torch.cat([prompt, targets]))
            labels.append(torch.cat([torch.full_like(prompt, IGNORE_INDEX), targets]))
            actions.append(torch.from_numpy(normalized).float())
            if self.proprio_statistics:
                proprio.append(torch.from_numpy(self._normalized_proprio(step)).float())
        lengths = torch.tensor([len(ids) for ids in input_ids])
        width = -(-int(lengths.max()) // self.pad_to_multiple_of) * self.pad_to_multiple_of
        batch = {
            "input_ids": _padded(input_ids, width, self.pad_id),
            "attention_mask": (torch.arange(width) < lengths[:, None] - self.num_hidden).long(),
            "labels": _padded(labels, width, IGNORE_INDEX),
        }
        if normalize:
            batch["pixel_values"] = torch.cat(pixel_values)
        else:
            batch["frames"] = torch.from_numpy(np.stack([frame for of_step in images for frame in of_step]))
        if on_device:
            batch["augmentation"] = as_rows([drawn for of_step in parameters for drawn in of_step])
        if self.has_head:
            batch["actions"] = torch.stack(actions)
        if proprio:
            batch["proprio"] = torch.stack(proprio)
        return batch

    def _prompt_ids(self, instruction: str) -> torch.Tensor:
        """Return the ids of a prompt as the processor gives them with an image: int64 ``(length,)``."""
        processor = self.processor
        style = processor._known_prompt_style()
        prompt = style, instruction
        if prompt not in self._prompts:
            inputs = processor._tokenize_instructions([instruction], [style], None, None)
            require_bos(processor.tokenizer, style, inputs["input_ids"], inputs["attention_mask"])
            if len(self._prompts) >= KEPT_PROMPTS:
                self._prompts.clear()
            self._prompts[prompt] = torch.tensor(inputs["input_ids"][0])
        return self._prompts[prompt]

    def _next_batch(self) -> int:
        """Return the number of this batch among those of all processes; DataLoader asks its workers in turn."""
        worker = torch.utils.data.get_worker_info()
        index, count = (0, 1) if worker is None else (worker.id, worker.num_workers)
        batch_of_process = self._num_collated * count + index
        self._num_collated += 1
        return self.position.batches + batch_of_process * self.world_size + self.rank

    def images(self, step: Step, generator: np.random.Generator | None = None) -> list[np.ndarray]:
        """Return the images of a step as the processor takes them: of a TraceVLA one, where it has no trace.

        Args:
            step: The sample.
            generator: Draws the augmentation and which traces are not shown; None: neither happens.
        """
        shown = self._shown_images(step, generator)
        if self.augment is None or generator is None:
            return shown
        return self._augmented(shown, self._draw(len(shown), generator))

    def _shown_images(self, step: Step, generator: np.random.Generator | None) -> list[np.ndarray]:
        """Return the images of a step, not augmented: of a TraceVLA one, where no trace is shown."""
        if len(step.images) != self.num_images:
            moments = self.num_images // self.images_per_moment
            kind = ", the frame and with its trace" if self.trace_prompting else ""
            kind = f" ({self.images_per_moment} of each of {moments} moments)" if moments > 1 else kind
            raise OpenVLAValueError(
                f"The model takes {self.num_images} images{kind}, {step.dataset!r} gives {len(step.images)}: name the "
                "cameras that it should see, in order, in the data's fields ({path: ..., fields: {cameras: [NAME]}})."
            )
        frames = list(step.images)
        if self.trace_prompting:
            is_traced = has_trace(*frames)
            if is_traced and generator is not None and self.trace_dropout:
                is_traced = generator.random() >= self.trace_dropout
            frames = frames if is_traced else frames[:1]
        return frames

    def _draw(self, num_images: int, generator: np.random.Generator) -> list[AugmentationParameters]:
        """Draw the augmentation of a step's images; all moments of a camera get the same."""
        if self.augment is None:
            return []
        per_moment = min(num_images, self.images_per_moment)
        return [self.augment.draw(generator) for _ in range(per_moment)] * (num_images // per_moment)

    def _augmented(self, images: list[np.ndarray], parameters: list[AugmentationParameters]) -> list[np.ndarray]:
        size = (self.image_size, self.image_size)
        images = [image if image.shape[:2] == size else lanczos3_resized(image, size) for image in images]
        return [augment_frames(image, drawn) for image, drawn in zip(images, parameters)]

    def normalized_actions(self, step: Step) -> np.ndarray:
        """Return the actions of a step as training targets: float64 ``(chunk, action_dim)`` in [-1, 1].

        VQ chunks rest beyond the episode's end, as in openvla-mini.
        """
        key, actions = step.dataset, np.asarray(step.actions, dtype=np.float64)
        if key not in self.statistics:
            raise OpenVLAKeyError(
                f"No statistics of {key!r} that fit the model; it has those of {list(self.statistics)}."
            )
        if len(actions) != self.chunk_length:
            raise OpenVLAValueError(f"The model predicts {self.chunk_length} actions; {key!r} gives {len(actions)}.")
        normalized = self.statistics[key].normalize(actions)
        if self.rests_past_end:
            normalized = neutral_past_end(normalized, step.is_padding, self.statistics[key].mask)
        return normalized

    def _normalized_proprio(self, step: Step) -> np.ndarray:
        if step.proprio is None:
            raise OpenVLAValueError(f"The model takes proprio, and a step of {step.dataset!r} has none.")
        return self.proprio_statistics[step.dataset].normalize_proprio(step.proprio)


def with_pixel_values(batch: dict[str, torch.Tensor], processor: OpenVLAProcessor) -> dict[str, torch.Tensor]:
    """Return a batch of :class:`ActionCollator` with ``pixel_values`` made of its ``frames``, on their device.

    Args:
        batch: The batch; without ``frames`` it is returned as it is. With ``augmentation`` frames are augmented.
        processor: Processor of the checkpoint.
    """
    if "frames" not in batch:
        return batch
    batch = dict(batch)
    frames, rows = batch.pop("frames"), batch.pop("augmentation", None)
    image_processor = processor.image_processor
    if rows is not None:
        frames = augmented_on_device(frames, rows, image_processor.input_sizes[0][1])
    pixels = image_processor(frames, device=frames.device)["pixel_values"]
    return {**batch, "pixel_values": pixels.view(len(batch["input_ids"]), -1, *pixels.shape[2:])}


def has_trace(frame: np.ndarray, traced: np.ndarray) -> bool:
    """Return whether the second image of a TraceVLA's sample shows a trace: not black, and not the frame itself.

    Both images are uint8 ``(height, width, 3)``; OpenVLAValueError where the second one is of another camera.
    """
    if traced.max() <= CODEC_LEVELS:
        return False
    if frame.shape != traced.shape or (np.abs(frame.astype(np.int16) - traced) > CODEC_LEVELS).mean() > 0.5:
        raise OpenVLAValueError(
            "The second image of a TraceVLA is the frame with its trace, or black; this one differs from the frame in "
            "size, or in most of its pixels. Name the camera and its traced frames in the data's fields (cameras)."
        )
    return not np.array_equal(frame, traced)


def _have_one_shape(images: Sequence[Sequence[np.ndarray]]) -> bool:
    return len({image.shape for of_step in images for image in of_step}) == 1


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
        (mean absolute error of the decoded actions, in [-1, 1] units; of VQ chunks that of the first action) and, for
        bins, ``l1_bins`` (the same in bins). L1 head:
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
    action_ids, device = model.action_token_ids, output.logits.device
    positions, targets = action_labels(batch["labels"], action_ids)
    predicted = output.logits.detach().argmax(-1)[to_device(positions, device)]
    targets = to_device(targets, device)
    accuracy = (predicted == targets).float().mean()
    if model.config.action_vq is not None:
        num_codes, num_rounds = model.config.action_vq["num_codes"], model.config.action_vq["num_rounds"]
        codes = [(action_ids.stop - 1 - tokens).clamp(0, num_codes - 1) for tokens in (predicted, targets)]
        first, expected = (model.action_vq(code.reshape(-1, num_rounds))[:, 0] for code in codes)
        return {"action_accuracy": accuracy, "l1_loss": (first - expected).abs().mean()}
    num_bins = model.config.n_action_bins
    predicted_bins, target_bins = (
        (action_ids.stop - 1 - tokens).clamp(0, num_bins - 2) for tokens in (predicted, targets)
    )
    centers = to_device(torch.from_numpy(model.bin_centers).float(), device)
    return {
        "action_accuracy": accuracy,
        "l1_loss": (centers[predicted_bins] - centers[target_bins]).abs().mean(),
        "l1_bins": (predicted_bins - target_bins).abs().float().mean(),
    }
