"""Fingerprint of a training run, written into every checkpoint and compared when the run continues.

With another base model, another ``lora_alpha`` or other statistics, the same trained weights are a different model. So
only the run that wrote a checkpoint may continue from it, with the statistics that its weights were trained with.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

from ..adapters.base_record import record_base
from ..data.columns import ColumnSpec
from ..data.episodes import DatasetError, EpisodeReader
from ..data.utils import read_json
from ..errors_openvla import OpenVLAValueError
from ..modeling_openvla import OpenVLAForActionPrediction
from ..processing_openvla import OpenVLAProcessor
from .config import FinetuneConfig
from .datasets import TrainingData

RECORD_FILE = "run.json"
# Fields that may change when a run continues: optimization, logging, and the resources of the computation. All other
# fields must stay as they were, including any that are added in the future.
FREE_FIELDS = (
    "max_steps",
    "learning_rate",
    "weight_decay",
    "warmup_steps",
    "lr_scheduler_type",
    "num_steps_before_decay",
    "max_grad_norm",
    "gradient_accumulation_steps",
    "skip_bad",
    "accept",
    "distributed",
    "compile",
    "adapter_dtype",
    "gradient_checkpointing",
    "gradient_checkpointing_policy",
    "dataloader_num_workers",
    "augment_on_device",
    "use_cpu",
    "save_steps",
    "save_total_limit",
    "logging_steps",
    "report_to",
    "num_train_eval_samples",
    "output_dir",
)
# Compared by content: the base's weights, the episodes, the model's action configuration.
FIELDS_BY_CONTENT = ("model", "data", "preset", "action_config")
IMAGE_FIELDS = ("resize_params", "crop_params", "normalize_params", "do_letterbox", "letterbox_fill")
SAMPLED_EPISODES = 8  # per dataset; their actions, proprio and instructions are hashed
# Tolerance of mean colours in grey levels: video decoders differ by less than one between versions.
GREY_LEVELS = 3
# Tolerance of statistics: versions of numpy may sum in different orders.
RTOL = 1e-9


class Difference(NamedTuple):
    """A value of a run that is not as it was."""

    name: str
    before: Any
    now: Any


def run_record(
    config: FinetuneConfig, data: TrainingData, model: OpenVLAForActionPrediction, processor: OpenVLAProcessor
) -> dict[str, Any]:
    """Return the description of a run, as JSON stores it.

    Args:
        config: Configuration of the run.
        data: Training data of the run.
        model: Model before the first step.
        processor: Processor of the base model.
    """
    image_processor = processor.image_processor
    weights = getattr(data, "weights", [])
    record = {
        "config": asdict(config),
        "base": record_base(model) if model.lora_adapter is None else model.lora_adapter.base,
        "images": _digest([getattr(image_processor, f"tvf_{name}") for name in IMAGE_FIELDS]),
        "action_config": model.config.action_config,
        "default_unnorm_key": model.config.default_unnorm_key,
        "datasets": [_dataset_record(reader) for reader in data.readers],
        "weights": [weight / sum(weights) for weight in weights],
        "norm_stats": model.norm_stats,
        "precision": str(model.dtype).removeprefix("torch."),
    }
    return json.loads(json.dumps(record))


def _dataset_record(reader: EpisodeReader) -> dict[str, Any]:
    """Return name, number of episodes, columns and digest of a dataset, but not its location."""
    last = len(reader) - 1
    sampled = sorted({round(index * last / (SAMPLED_EPISODES - 1)) for index in range(SAMPLED_EPISODES)})
    columns = {field.name: getattr(reader.fields, field.name) for field in fields(reader.fields)}
    function = columns.get("standardize")
    columns["standardize"] = function and f"{function.__module__}.{function.__qualname__}"
    return {
        "name": reader.name,
        "episodes": len(reader),
        "fields": columns,
        "pictures": [_mean_colours(reader, index) for index in sampled],
        "digest_of_episodes": _digest([_episode_digest(reader, index) for index in sampled]),
    }


def _mean_colours(reader: EpisodeReader, index: int) -> list[list[float]]:
    """Return height, width and the mean colours of the four quarters of an episode's first image of each camera."""
    try:
        images = reader[index].images(0)
    except DatasetError:
        return []
    summaries = []
    for image in images:
        middle_y, middle_x = image.shape[0] // 2, image.shape[1] // 2
        halves = (image[:middle_y], image[middle_y:])
        quarters = [quarter for half in halves for quarter in (half[:, :middle_x], half[:, middle_x:])]
        colours = [quarter.reshape(-1, 3).mean(axis=0) if quarter.size else [0.0] * 3 for quarter in quarters]
        means = [round(float(value), 1) for colour in colours for value in colour]
        summaries.append([*image.shape[:2], *means])
    return summaries


def _episode_digest(reader: EpisodeReader, index: int) -> str:
    try:
        episode = reader[index]
    except DatasetError:  # skip_bad leaves it out, and the statistics count it
        return "cannot be used"
    arrays = [array.tobytes() for array in (episode.actions, episode.proprio) if array is not None]
    return hashlib.sha256(b"".join([*arrays, json.dumps(list(episode.instructions)).encode()])).hexdigest()


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def require_same_run(
    output_dir: Path, checkpoint: Path | None, record: dict[str, Any], report: Callable[[str], Any] = print
) -> dict[str, Any]:
    """Check that a run may continue from a checkpoint.

    Args:
        output_dir: Folder of the run.
        checkpoint: Its newest checkpoint; None for a new run.
        record: ``run_record`` of the run as it is configured now.
        report: Called with a line about allowed changes.

    Returns:
        The record, with the statistics that the checkpoint's weights were trained with.

    Raises:
        OpenVLAValueError: Something that determines the meaning of the weights changed; the message lists every
            difference with both values.
    """
    if checkpoint is None:
        return record
    file = checkpoint / RECORD_FILE
    before = read_json(file) if file.is_file() else {"config": {}}
    if set(before) != set(record) or set(before["config"]) - set(record["config"]):
        raise OpenVLAValueError(
            f"{checkpoint} is of a development version that recorded other fields of its run than this one, so it "
            f"cannot be continued. Use another output_dir; with model: {output_dir / 'model'}, if that exists, the new "
            "run starts from its weights."
        )
    differences = list(_run_differences(before, record))
    if differences:
        result = output_dir / "model"
        hint = f" (with model: {result} it starts from the weights trained here)" if result.is_dir() else ""
        raise OpenVLAValueError(
            f"{checkpoint} is of another run than the one given: {_listed(differences)}. To continue it, give the "
            f"values as they were. For the new ones, new episodes too, use another output_dir{hint}."
        )
    allowed = [name for name in FREE_FIELDS if name != "output_dir"]
    changed = [*_config_differences(before["config"], record["config"], allowed)]
    changed += _differences(before["precision"], record["precision"], "precision")
    if changed:
        report(f"{checkpoint}: continues with these settings changed, which is allowed: {_listed(changed)}")
    return {**record, "norm_stats": before["norm_stats"]}


def _run_differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[Difference]:
    """Yield every difference between two records that is not allowed."""
    strict = [name for name in now["config"] if name not in (*FREE_FIELDS, *FIELDS_BY_CONTENT)]
    yield from _config_differences(before["config"], now["config"], strict)
    yield from _base_differences(before["base"], now["base"])
    for name in ("images", "action_config", "default_unnorm_key"):
        yield from _differences(before[name], now[name], name)
    names_before, names_now = ([dataset["name"] for dataset in record["datasets"]] for record in (before, now))
    yield from _differences(names_before, names_now, "datasets")
    if names_before == names_now:
        for dataset_before, dataset_now in zip(before["datasets"], now["datasets"]):
            yield from _dataset_differences(dataset_before, dataset_now)
        yield from _differences(before["weights"], now["weights"], "weights of the datasets")
    yield from _statistics_differences(before["norm_stats"], now["norm_stats"])


def _dataset_differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[Difference]:
    """Yield what differs in a dataset: its columns and sizes, else its digest, else its images."""
    name = f"data {now['name']!r}"
    before = {**before, "fields": {**_defaults(ColumnSpec), **before["fields"]}}
    details = [key for key in {**before, **now} if key not in ("pictures", "digest_of_episodes")]
    differences = [d for key in details for d in _differences(before.get(key), now.get(key), f"{name}.{key}")]
    key = "digest_of_episodes"
    differences = differences or list(_differences(before[key], now[key], f"{name}.{key}"))
    yield from differences
    if not differences:
        yield from _image_differences(before.get("pictures"), now.get("pictures"), f"{name}.pictures")


def _image_differences(before: Any, now: Any, name: str) -> Iterator[Difference]:
    """Yield the first image whose size or colours differ; nothing for records of versions that had no images."""
    for episode, (images_before, images_now) in enumerate(zip(before or [], now or [])):
        for camera, (old, new) in enumerate(zip(images_before, images_now)):
            if old[:2] != new[:2] or any(abs(a - b) > GREY_LEVELS for a, b in zip(old[2:], new[2:])):
                location = f"{name}[{episode}][{camera}] (height, width, colours of four quarters)"
                yield Difference(location, old, new)
                return


def _config_differences(
    before: Mapping[str, Any], now: Mapping[str, Any], names: Iterable[str]
) -> Iterator[Difference]:
    before = {**_defaults(FinetuneConfig), **before}  # a field that did not exist yet had today's default
    for name in names:
        yield from _differences(before.get(name), now[name], name)


def _defaults(dataclass: type) -> dict[str, Any]:
    return json.loads(json.dumps({f.name: f.default for f in fields(dataclass) if f.default is not MISSING}))


def _base_differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[Difference]:
    for name in ("weights", "config"):
        if before[name] and now[name] and before[name] != now[name]:
            labels = (f"{base['id']} ({base[name][:12]})" for base in (before, now))
            yield Difference(f"{name} of the base", *labels)
    yield from _differences(before["quantization"], now["quantization"], "quantization")


def _statistics_differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[Difference]:
    """Yield for each dataset its numbers of steps and episodes, and the first other number that differs."""
    for key in {**before, **now}:
        name = f"statistics of {key!r}"
        if key not in before or key not in now:
            yield Difference(name, *("given" if key in statistics else "none" for statistics in (before, now)))
            continue
        differences = list(_differences(before[key], now[key], name))
        counts = [difference for difference in differences if ".num_" in difference.name]
        others = [difference for difference in differences if difference not in counts]
        yield from [*counts, *others[:1]]


def _differences(before: Any, now: Any, name: str) -> Iterator[Difference]:
    """Yield every entry of JSON content that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            yield from _differences(before.get(key), now.get(key), f"{name}.{key}")
    elif _are_numbers(before) and _are_numbers(now) and len(before) == len(now):
        for index, (number_before, number_now) in enumerate(zip(before, now)):
            yield from _differences(number_before, number_now, f"{name}[{index}]")
    elif isinstance(before, float) and isinstance(now, (int, float)):
        if not math.isclose(before, now, rel_tol=RTOL, abs_tol=RTOL):
            yield Difference(name, before, now)
    elif before != now:
        yield Difference(name, before, now)


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) in (int, float) for value in values)


def _listed(differences: Iterable[Difference]) -> str:
    return "; ".join(f"{name}: {before!r} before, {now!r} now" for name, before, now in differences)
