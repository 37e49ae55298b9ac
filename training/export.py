"""What comes of a fine-tuning run: is it learnt, and the folders that everyone can load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..compatibility_openvla import DTYPE_FIELD
from ..configuration_openvla import OpenVLAConfig, write_json
from ..conversion.files import atomic_directory
from ..conversion.hub_folder import write_card
from ..modeling_openvla import OpenVLAForActionPrediction
from ..processing_openvla import OpenVLAProcessor
from ..quantization_openvla import is_quantized
from .collator import ActionCollator
from .config import FinetuneConfig


@torch.no_grad()
def feed_back(
    config: FinetuneConfig, model: OpenVLAForActionPrediction, processor: OpenVLAProcessor, data: Any, output: Path
) -> dict[str, float]:
    """Let the model answer steps that it was trained on, and say how well: a collapsed run shows here.

    Returns:
        ``token_accuracy`` for tokens, ``l1_loss`` in [-1, 1] units, and ``distinct``, the share of different answers.
        In feed_back.json stands too, as ``l1_robot``, the mean distance of every dimension in the robot's own units.
    """
    model.eval()
    collator = ActionCollator(processor, model)
    distances, in_robot_units, right, answers = [], [], [], set()
    # Among action tokens alone, so that a model that has not learnt them is measured too.
    asked = {"return_dict": True, "constrain_actions": model.config.action_head is None}
    for step, _ in zip(data.stream(model.config.chunk_length), range(config.feed_back)):
        inputs = processor(instruction=step.instruction, images=list(step.images))
        proprio = step.proprio if model.config.proprio_dim is not None else None
        answer = model.predict_action(**inputs, unnorm_key=step.dataset, proprio=proprio, **asked)
        wanted = collator.normalized(step).reshape(answer.normalized_actions.shape)
        distances.append(np.abs(answer.normalized_actions - wanted).mean())
        in_robot_units.append(np.abs(np.atleast_2d(answer.actions) - step.actions).mean(0))
        if answer.token_ids is not None:
            right.append((answer.token_ids == model.action_tokenizer.encode(wanted)).mean())
        answers.add(answer.normalized_actions.tobytes())
    found = {"l1_loss": float(np.mean(distances)), "distinct": len(answers) / len(distances)}
    if right:
        found["token_accuracy"] = float(np.mean(right))
    by_dimension = np.mean(in_robot_units, axis=0).tolist()
    write_json(output / "feed_back.json", {"steps": len(distances), **found, "l1_robot": by_dimension})
    print(f"fed back {len(distances)} training steps: " + ", ".join(f"{k} {v:.3f}" for k, v in found.items()))
    if len(answers) == 1 and len(distances) > 1:
        print("WARNING: every frame got the same answer. The run has collapsed; lower learning_rate.")
    return found


def export(model: OpenVLAForActionPrediction, processor: OpenVLAProcessor, output: Path) -> None:
    """Write the adapter, where there is one, and the whole model, merged once, in the base's own dtype."""
    dtype = stored_dtype(model.config._name_or_path)
    if model._lora is not None:
        model.save_pretrained(output / "adapter")
        processor.save_pretrained(output / "adapter")
        model = model.merge_lora() if is_quantized(model) else model.to("cpu").merge_lora()
    with atomic_directory(output / "model") as folder:
        model.to(dtype).save_pretrained(folder)
        processor.save_pretrained(folder)
        write_card(folder, output.name)
    print(f"{output / 'model'}: complete")


def stored_dtype(name_or_path: str) -> torch.dtype:
    """The dtype that a checkpoint's configuration names; float32 where it names none."""
    found = getattr(OpenVLAConfig.from_pretrained(name_or_path), DTYPE_FIELD, None) or torch.float32
    return getattr(torch, found) if isinstance(found, str) else found
