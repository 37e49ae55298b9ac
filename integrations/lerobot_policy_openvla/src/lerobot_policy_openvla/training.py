"""Load a model to train it on a dataset of LeRobot, with exact statistics of the dataset."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lerobot.utils.constants import ACTION, OBS_STATE
from openvla.adapters.files import locate_base
from openvla.compatibility_openvla import DTYPE_FIELD
from openvla.configuration_openvla import ADAPTER_CONFIG_FILE, optional_file
from openvla.data.lerobot import LeRobotReader
from openvla.data.statistics import compute_statistics
from openvla.errors_openvla import OpenVLAValueError
from openvla.loading import AutoProcessor
from openvla.modeling_openvla import OpenVLAForActionPrediction
from openvla.training.finetune import EVALUATION_PRESET, base_dtype, set_action_config, set_trainable

if TYPE_CHECKING:
    from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
    from openvla.processing_openvla import OpenVLAProcessor

    from .configuration_openvla import OpenVLAConfig


def load_for_training(
    config: OpenVLAConfig, meta: LeRobotDatasetMetadata
) -> tuple[OpenVLAForActionPrediction, OpenVLAProcessor, str]:
    """Load model and processor on the device, with the statistics of the data and what ``config.method`` trains.

    Returns:
        Model, processor, and the key of the statistics.

    Raises:
        OpenVLAValueError: The model cannot be trained, ``config`` contradicts a loaded adapter, or the data is not on
            disk.
    """
    folder, settings = config.openvla_folder(), config.finetune_config()
    device = torch.device(config.device or "cpu")
    _require_trainable_kind(config)
    kwargs: dict[str, Any] = {"device_map": {"": str(device)}, DTYPE_FIELD: base_dtype(settings, device)}
    is_adapter = optional_file(folder, ADAPTER_CONFIG_FILE) is not None
    if is_adapter:
        base, revision = locate_base(folder, {})
        model = OpenVLAForActionPrediction.from_pretrained(base, revision=revision, **kwargs)
        model.load_lora(folder, trainable=True)
        _require_same_adapter(config, model)
    else:
        model = OpenVLAForActionPrediction.from_pretrained(folder, **kwargs)
    if config.action_config is not None:
        set_action_config(model, config.action_config)
    processor = AutoProcessor.from_pretrained(folder)
    processor.num_images_in_input = model.config.num_images_in_input
    # For acting; training has none.
    processor.image_preset = config.image_preset or (EVALUATION_PRESET if config.augment else "none")
    key = config.unnorm_key or meta.repo_id
    if key not in model.norm_stats:
        takes_state = model.config.proprio_dim is not None
        model.add_norm_stats(key, dataset_statistics(config, meta, key, takes_state=takes_state))
    model.action_statistics(key)  # raises if the dimensions do not fit
    model.config.default_unnorm_key = key
    if not is_adapter:
        set_trainable(model, settings)
    return model, processor, key


def _require_trainable_kind(config: OpenVLAConfig) -> None:
    """Raise OpenVLAValueError for models that ``openvla finetune`` does not train either."""
    model = config.model_config()
    if model.action_vq is not None or model.history_length > 1:
        kind = "VQ actions (MiniVLA)" if model.action_vq is not None else "images of several moments"
        raise OpenVLAValueError(
            f"{config.openvla_folder()} has {kind}, which openvla does not train; it can act (lerobot-eval, "
            "lerobot-rollout). Train an OpenVLA or an OpenVLA-OFT."
        )


def _require_same_adapter(config: OpenVLAConfig, model: OpenVLAForActionPrediction) -> None:
    """Raise OpenVLAValueError where the configuration contradicts the adapter that training continues."""
    adapter = model.lora_adapter
    loaded = {"method": "lora", "lora_rank": adapter.r, "lora_alpha": adapter.alpha}
    different = {name: getattr(config, name) for name, value in loaded.items() if getattr(config, name) != value}
    if different:
        raise OpenVLAValueError(
            f"{config.openvla_folder()} is an adapter with {loaded}, and the configuration asks for {different}: "
            "continue it as it is, or merge it first (openvla merge)."
        )


def dataset_statistics(
    config: OpenVLAConfig, meta: LeRobotDatasetMetadata, key: str, *, takes_state: bool
) -> dict[str, Any]:
    """Compute the statistics of a dataset's actions and states from its tables, as ``openvla finetune`` does.

    LeRobot's own statistics are not used: its quantiles of several episodes are weighted means of each episode's.

    Args:
        config: Configuration with cameras and ``action_mask``.
        meta: LeRobot's description of the dataset.
        key: Name of the statistics.
        takes_state: Whether the model takes ``observation.state``.

    Raises:
        OpenVLAValueError: The tables are not on disk (streamed data), or damaged.
    """
    root = Path(meta.root)
    if not any((root / "data").rglob("*.parquet")):
        raise OpenVLAValueError(
            f"{root} has no tables, from which the statistics of {key!r} are computed: download the dataset instead of "
            "streaming it, or name statistics that the model has with --policy.unnorm_key."
        )
    fields: dict[str, Any] = {"cameras": config.cameras, "action": ACTION, "action_mask": config.action_mask}
    fields["proprio"] = OBS_STATE if takes_state else ()
    reader = LeRobotReader(root, preset=None, fields=fields, name=key, split="all")
    return compute_statistics(reader, progress=False)
