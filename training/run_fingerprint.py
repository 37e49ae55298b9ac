"""Record the meaning of a run's trained weights: written into every checkpoint, compared when the run goes on.

The same trained numbers are another model beside another base, under another ``lora_alpha`` or with other statistics.
So a run that goes on must be the one that began; the statistics in the checkpoint are those of its weights.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

from ..adapters.base_record import record_base
from ..data.columns import ColumnSpec
from ..data.episodes import DatasetError
from ..data.utils import read_json
from ..errors_openvla import OpenVLAValueError
from ..modeling_openvla import STATISTICS_FILE, OpenVLAForActionPrediction
from ..processing_openvla import OpenVLAProcessor
from .config import FinetuneConfig

RECORD_FILE = "run.json"
# Fields of a run that may change when it goes on: how far and how fast the weights move, where and how often is
# written, what the computation takes. Every other field has to be as it was, also one that is added in future.
FREE_FIELDS = ("max_steps", "learning_rate", "weight_decay", "warmup_steps", "decay", "decay_step", "max_grad_norm")
FREE_FIELDS += ("accumulation", "skip_bad", "accept", "parallelism", "gradient_checkpointing", "workers", "device")
FREE_FIELDS += ("save_steps", "keep", "log_steps", "tracker", "feed_back", "output")
# Compared by what they stand for: the base's weights, the episodes, the model's configuration.
FIELDS_BY_CONTENT = ("model", "data", "preset", "answer")
IMAGE_FIELDS = ("resize_params", "crop_params", "normalize_params", "do_letterbox", "letterbox_fill")
SAMPLED_EPISODES = 8  # of each dataset: their actions, proprio and instructions are in its digest
# Means of colours that differ by less are one picture: decoders' versions differ by less than a grey level.
GREY_LEVELS = 3
# Statistics are equal to this: another numpy may add up in another order.
RTOL = 1e-9


def run_record(
    config: FinetuneConfig, data: Any, model: OpenVLAForActionPrediction, processor: OpenVLAProcessor
) -> dict[str, Any]:
    """Return what the weights of a run mean, as JSON holds it.

    Args:
        config: The run.
        data: Its data, as ``finetune`` takes it.
        model: As ``build`` made it, before any step.
        processor: Of the base.
    """
    image_processor = processor.image_processor
    record = {
        "config": asdict(config),
        "base": record_base(model) if model.lora_adapter is None else model.lora_adapter.base,
        "images": _digest([getattr(image_processor, f"tvf_{name}") for name in IMAGE_FIELDS]),
        "answer": model.config.action_config,
        "default_unnorm_key": model.config.default_unnorm_key,
        "datasets": [_dataset_record(reader) for reader in data.readers],
        "weights": _shares(getattr(data, "weights", [])),
        "norm_stats": model.norm_stats,
        "precision": str(model.dtype).removeprefix("torch."),
    }
    return json.loads(json.dumps(record))


def _dataset_record(reader: Any) -> dict[str, Any]:
    """Return name, number of episodes, fields and digest of a dataset; not where it lies."""
    chosen = sorted({round(place * (len(reader) - 1) / (SAMPLED_EPISODES - 1)) for place in range(SAMPLED_EPISODES)})
    columns = {field.name: getattr(reader.fields, field.name) for field in fields(reader.fields)}
    function = columns.get("standardize")
    columns["standardize"] = function and f"{function.__module__}.{function.__qualname__}"
    return {
        "name": reader.name,
        "episodes": len(reader),
        "fields": columns,
        "pictures": [_pictures(reader, index) for index in chosen],
        "digest_of_episodes": _digest([_episode_digest(reader, index) for index in chosen]),
    }


def _pictures(reader: Any, index: int) -> list[list[float]]:
    """Return of an episode's first pictures, one a camera: height, width, and the mean colours of its four quarters."""
    try:
        images = reader[index].images(0)
    except DatasetError:
        return []
    out = []
    for image in images:
        high, wide = image.shape[0] // 2, image.shape[1] // 2
        parts = [part for half in (image[:high], image[high:]) for part in (half[:, :wide], half[:, wide:])]
        colours = [part.reshape(-1, 3).mean(axis=0) if part.size else [0.0] * 3 for part in parts]
        out.append([*image.shape[:2], *(round(float(value), 1) for colour in colours for value in colour)])
    return out


def _episode_digest(reader: Any, index: int) -> str:
    try:
        episode = reader[index]
    except DatasetError:  # left out by skip_bad, which counts it in the statistics
        return "cannot be used"
    tables = [table.tobytes() for table in (episode.actions, episode.proprio) if table is not None]
    return hashlib.sha256(b"".join([*tables, json.dumps(list(episode.instructions)).encode()])).hexdigest()


def _shares(weights: list[float]) -> list[float]:
    return [weight / sum(weights) for weight in weights]


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def require_same_run(
    output: Path, checkpoint: Path | None, record: dict[str, Any], say: Callable[[str], Any] = print
) -> dict[str, Any]:
    """Check that a run may go on from a checkpoint.

    Args:
        output: The run's folder.
        checkpoint: The newest one in it; None for a run that begins.
        record: ``run_record`` of the run as it is given now.
        say: Takes a line about what has changed and may.

    Returns:
        The record, with the statistics that the checkpoint's weights were trained with.

    Raises:
        ValueError: What gives the weights their meaning is not as it was; the message names every difference, with
            both values.
    """
    if checkpoint is None:
        return record
    if not (checkpoint / RECORD_FILE).is_file():
        return _require_same_as_old(output, checkpoint, record)
    before = read_json(checkpoint / RECORD_FILE)
    _require_none(list(_differences_of_runs(before, record)), output, checkpoint)
    changed = [*_config_differences(before, record, FREE_FIELDS[:-1])]
    changed += _differences(before["precision"], record["precision"], "precision")
    if changed:
        say(f"{checkpoint}: goes on with other settings, as is allowed: {_listed(changed)}")
    return {**record, "norm_stats": before["norm_stats"]}


def _require_same_as_old(output: Path, checkpoint: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Compare with what a run from before checkpoints had a record left in its folder."""
    config_file = output / "finetune.json"
    differences, compared = [], []
    if config_file.is_file():
        compared.append(str(config_file))
        before = {"config": read_json(config_file)}
        differences += _config_differences(before, record, FIELDS_BY_CONTENT)
        differences += _config_differences(before, record, _strict_fields(record))
    files = [output / part / STATISTICS_FILE for part in ("model", "adapter")]
    file = next((file for file in files if file.is_file()), None)
    if file is not None:
        compared.append(str(file))
        statistics = read_json(file)  # an adapter's folder may hold those of other runs too
        known = {key: statistics[key] for key in record["norm_stats"] if key in statistics}
        differences += _statistics_differences(known, record["norm_stats"])
    _require_none(differences, output, checkpoint)
    warnings.warn(
        f"{checkpoint} was written before checkpoints recorded what their weights mean. Compared with "
        f"{' and '.join(compared) or 'nothing'}; not with its base's weights, its columns and its episodes"
        f"{'' if file else ', nor its statistics'}. You need to know that they are as they were, else begin in another "
        "output folder.",
        stacklevel=2,
    )
    return record


def _require_none(differences: list[tuple[str, Any, Any]], output: Path, checkpoint: Path) -> None:
    if not differences:
        return
    result = output / "model"
    learnt = f" (with model: {result} it begins with what was learnt here)" if result.is_dir() else ""
    raise OpenVLAValueError(
        f"{checkpoint} is of another run than the one given: {_listed(differences)}. To go on, give the values as they "
        f"were. For the new ones, new episodes too, begin in another output folder{learnt}."
    )


def _differences_of_runs(before: dict[str, Any], now: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield what is not as it was: its name and both values."""
    yield from _config_differences(before, now, _strict_fields(now))
    yield from _base_differences(before["base"], now["base"])
    for name in ("images", "answer", "default_unnorm_key"):
        yield from _differences(before[name], now[name], name)
    names = [[dataset["name"] for dataset in record["datasets"]] for record in (before, now)]
    yield from _differences(*names, "datasets")
    if names[0] == names[1]:
        for then, dataset in zip(before["datasets"], now["datasets"]):
            then = {**then, "fields": {**_defaults(ColumnSpec), **then["fields"]}}
            pictures = [record.get("pictures") for record in (then, dataset)]
            then, dataset = ({k: v for k, v in one.items() if k != "pictures"} for one in (then, dataset))
            different = list(_differences(then, dataset, f"data {dataset['name']!r}"))
            yield from different[
                : max(1, len(different) - (then["digest_of_episodes"] != dataset["digest_of_episodes"]))
            ]  # that comes last
            if not different:
                yield from _picture_differences(*pictures, f"data {dataset['name']!r}.pictures")
        yield from _differences(before["weights"], now["weights"], "weights of the datasets")
    yield from _statistics_differences(before["norm_stats"], now["norm_stats"])


def _picture_differences(before: Any, now: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield the first camera whose size or colours differ; nothing where a record does not have them yet."""
    for episode, pair in enumerate(zip(before or [], now or [])):
        for camera, (then, today) in enumerate(zip(*pair)):
            if then[:2] != today[:2] or any(abs(a - b) > GREY_LEVELS for a, b in zip(then[2:], today[2:])):
                yield f"{name}[{episode}][{camera}] (height, width, colours of four quarters)", then, today
                return


def _strict_fields(record: Mapping[str, Any]) -> list[str]:
    return [name for name in record["config"] if name not in (*FREE_FIELDS, *FIELDS_BY_CONTENT)]


def _config_differences(before: Any, now: Any, names: Any) -> Iterator[tuple[str, Any, Any]]:
    then = {**_defaults(FinetuneConfig), **before["config"]}  # a field that is newer was as it is by default
    for name in names:
        yield from _differences(then.get(name), now["config"][name], name)


def _defaults(kind: type) -> dict[str, Any]:
    return json.loads(json.dumps({f.name: f.default for f in fields(kind) if f.default is not MISSING}))


def _base_differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for name in ("weights", "config"):
        if before[name] and now[name] and before[name] != now[name]:
            yield f"{name} of the base", *(f"{one['id']} ({one[name][:12]})" for one in (before, now))
    yield from _differences(before["quantization"], now["quantization"], "quantization")


def _statistics_differences(before: Any, now: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield for each dataset its numbers of steps and episodes, and the first other number that differs."""
    for key in [*before, *(key for key in now if key not in before)]:
        if key not in before or key not in now:
            yield f"statistics of {key!r}", *("given" if key in one else "none" for one in (before, now))
            continue
        different = list(_differences(before[key], now[key], f"statistics of {key!r}"))
        counts = [one for one in different if ".num_" in one[0]]
        yield from [*counts, *[one for one in different if one not in counts][:1]]


def _differences(before: Any, now: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield name and both values of every entry of JSON content that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(key for key in now if key not in before)]:
            yield from _differences(before.get(key), now.get(key), f"{name}.{key}")
    elif _are_numbers(before) and _are_numbers(now) and len(before) == len(now):
        for index, pair in enumerate(zip(before, now)):
            yield from _differences(*pair, f"{name}[{index}]")
    elif isinstance(before, float) and isinstance(now, (int, float)):
        if not math.isclose(before, now, rel_tol=RTOL, abs_tol=RTOL):
            yield name, before, now
    elif before != now:
        yield name, before, now


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) in (int, float) for value in values)


def _listed(differences: list[tuple[str, Any, Any]]) -> str:
    return "; ".join(f"{name}: {before!r} before, {now!r} now" for name, before, now in differences)
