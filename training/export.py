"""Evaluate a fine-tuned model on training samples, and export it to folders that load anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import torch

from ..adapters.lora import merge_lora
from ..compatibility_openvla import DTYPE_FIELD
from ..configuration_openvla import OpenVLAConfig, write_json
from ..conversion.files import atomic_directory
from ..conversion.hub_folder import write_card
from ..decoding_openvla import ActionOutput
from ..modeling_openvla import OpenVLAForActionPrediction
from ..processing_openvla import OpenVLAProcessor
from ..quantization_openvla import is_quantized
from .collator import ActionCollator
from .config import FinetuneConfig
from .datasets import TrainingData


@torch.no_grad()
def evaluate_on_train(
    config: FinetuneConfig,
    model: OpenVLAForActionPrediction,
    processor: OpenVLAProcessor,
    data: TrainingData,
    output_dir: Path,
) -> dict[str, float]:
    """Predict training samples as a memorization check, which reveals a collapsed run.

    Writes feed_back.json, which has in addition ``l1_robot``: the mean absolute error of each action dimension in robot
    units.

    Returns:
        ``l1_loss`` (mean absolute error, in [-1, 1] units), ``distinct`` (distinct predictions per sample) and, for
        tokens, ``token_accuracy``.
    """
    model.eval()
    collator = ActionCollator(processor, model)
    errors, robot_errors, token_accuracies, predictions = [], [], [], set()
    # Restricted to action tokens, a model that has not learnt them yet can be measured too.
    constrain_actions = model.config.action_head is None
    stream = data.stream(model.config.chunk_length, history_length=model.config.history_length)
    for step, _ in zip(stream, range(config.num_train_eval_samples)):
        inputs = processor(instruction=step.instruction, images=collator.images(step))
        output = model.predict_action(
            **inputs,
            unnorm_key=step.dataset,
            proprio=step.proprio if model.config.proprio_dim is not None else None,
            return_dict=True,
            constrain_actions=constrain_actions,
        )
        output = cast(ActionOutput, output)
        predicted, actions = cast(np.ndarray, output.normalized_actions), cast(np.ndarray, output.actions)
        targets = collator.normalized_actions(step).reshape(predicted.shape)
        errors.append(np.abs(predicted - targets).mean())
        robot_error = np.abs(np.atleast_2d(actions) - step.actions)
        # Padding of VQ chunks is not what the episode did.
        robot_errors.append((robot_error if model.config.action_vq is None else robot_error[~step.is_padding]).mean(0))
        if output.token_ids is not None:
            token_accuracies.append((output.token_ids == model.action_tokenizer.encode(targets)).mean())
        predictions.add(predicted.tobytes())
    metrics = {"l1_loss": float(np.mean(errors)), "distinct": len(predictions) / len(errors)}
    if token_accuracies:
        metrics["token_accuracy"] = float(np.mean(token_accuracies))
    l1_robot = np.mean(robot_errors, axis=0).tolist()
    write_json(output_dir / "feed_back.json", {"steps": len(errors), **metrics, "l1_robot": l1_robot})
    summary = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
    print(f"predicted {len(errors)} training samples: {summary}")
    if len(predictions) == 1 and len(errors) > 1:
        print("WARNING: the prediction is the same for every sample. The run has collapsed; lower learning_rate.")
    return metrics


def export(model: OpenVLAForActionPrediction, processor: OpenVLAProcessor, output_dir: Path) -> None:
    """Write the adapter, if there is one, and the complete model, merged once, in the base model's dtype."""
    dtype = stored_dtype(model.config._name_or_path)
    if model.lora_adapter is not None:
        model.save_pretrained(output_dir / "adapter")
        processor.save_pretrained(output_dir / "adapter")
        if not is_quantized(model):
            cast(torch.nn.Module, model).to("cpu")
        model = merge_lora(model)
    with atomic_directory(output_dir / "model") as folder:
        cast(torch.nn.Module, model).to(dtype)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        write_card(folder, output_dir.name)
    print(f"{output_dir / 'model'}: complete")


def stored_dtype(name_or_path: str) -> torch.dtype:
    """Return the dtype that a checkpoint's configuration names; float32 if it names none."""
    dtype = getattr(OpenVLAConfig.from_pretrained(name_or_path), DTYPE_FIELD, None) or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype
