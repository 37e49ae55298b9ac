"""Plan a run: its samples from each dataset of the mixture, and the cores of its loader (``inspect-data --plan``)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..data.remote import file_size
from ..errors_openvla import OpenVLAValueError
from .config import FinetuneConfig, config_from_dict, read_yaml
from .data_rate import data_rates
from .datasets import Demonstrations

# Samples per second of a 7B model on an H100: 40 to 50.
GPU_RATE = 45.0


def read_plan_config(file: Path) -> FinetuneConfig:
    """Read the YAML file of a run; ``model`` and ``output_dir`` may be missing, a plan uses neither.

    Raises:
        OpenVLAValueError: A field is unknown or has a value that is not allowed.
    """
    return config_from_dict({"model": "?", "output_dir": "?", **read_yaml(file)}, file)


def mixture_plan(
    config: FinetuneConfig, *, gpu_rate: float = GPU_RATE, num_gpus: int = 1, seconds: float = 5.0
) -> dict[str, Any]:
    """Return the share of each dataset in a run, and the cores that its loader needs.

    The statistics of each dataset are computed, or read from their cache. A sample is a frame: a model with action
    chunks has, with ``pad_last_chunk: false``, fewer samples at the end of each episode.

    Args:
        config: The run; ``data``, ``preset``, ``skip_bad``, ``augment``, ``augment_on_device``, ``max_steps``,
            ``dataloader_num_workers`` and the two batch sizes are used.
        gpu_rate: Samples per second that one GPU trains on.
        num_gpus: Number of GPUs.
        seconds: How long each dataset's loader is measured.

    Returns:
        ``samples`` (of the run), ``gpu_rate``, ``num_gpus``, ``cores_per_gpu`` (hours of a core's time per hour of one
        GPU), ``dataloader_num_workers`` of the run, and ``datasets``: for each ``name``, ``weight``, ``share`` of the
        samples, ``episodes``, ``frames``, ``bytes`` of the files that are read, ``epochs``, ``samples_per_second`` of
        the loader in one process, ``cpu_ms`` of processor time for a sample, and ``cores_per_gpu``.

    Raises:
        OpenVLAValueError: ``gpu_rate`` or ``num_gpus`` is not positive, or as ``Demonstrations`` and ``data_rates``.
    """
    if not gpu_rate > 0 or math.isinf(gpu_rate) or num_gpus < 1:
        raise OpenVLAValueError(f"The rate and number of GPUs must be positive, got {gpu_rate} and {num_gpus}.")
    data = Demonstrations(config)
    stream = data.stream(chunk_length=1)
    augment = config.augment and not config.augment_on_device
    samples = config.max_steps * config.per_device_train_batch_size * config.gradient_accumulation_steps * num_gpus
    datasets = []
    for reader, weight, stream_weight in zip(stream.readers, data.weights, stream.weights):
        share = stream_weight / sum(stream.weights)
        statistics = data.statistics[reader.name]
        (rate,) = data_rates(reader, (0,), seconds=seconds, skip_bad=config.skip_bad, augment=(augment,))
        datasets.append(
            {
                "name": reader.name,
                "weight": weight,
                "share": share,
                "episodes": statistics["num_trajectories"],
                "frames": statistics["num_transitions"],
                "bytes": sum(map(file_size, reader.files)),
                "epochs": samples * share / statistics["num_transitions"],
                "samples_per_second": rate["samples_per_second"],
                "cpu_ms": rate["cpu_ms"],
                "cores_per_gpu": gpu_rate * share * rate["cpu_ms"] / 1000,
            }
        )
    return {
        "samples": samples,
        "gpu_rate": gpu_rate,
        "num_gpus": num_gpus,
        "cores_per_gpu": sum(dataset["cores_per_gpu"] for dataset in datasets),
        "dataloader_num_workers": config.dataloader_num_workers,
        "datasets": datasets,
    }


def describe_plan(plan: dict[str, Any]) -> str:
    """Return a plan as a table."""
    datasets = plan["datasets"]
    width = max(len("dataset"), *(len(dataset["name"]) for dataset in datasets))
    header = ("weight", "share", "episodes", "frames", "size", "epochs", "samples/s", "ms", "cores")
    lines = [f"{'dataset':<{width}}" + "".join(f"{name:>10}" for name in header)]
    for dataset in datasets:
        cells = (
            f"{dataset['weight']:g}",
            f"{dataset['share']:.1%}",
            f"{dataset['episodes']}",
            f"{dataset['frames']}",
            _in_bytes(dataset["bytes"]),
            f"{dataset['epochs']:.2f}",
            f"{dataset['samples_per_second']:.1f}",
            f"{dataset['cpu_ms']:.1f}",
            f"{dataset['cores_per_gpu']:.2f}",
        )
        lines.append(f"{dataset['name']:<{width}}" + "".join(f"{cell:>10}" for cell in cells))
    cores, workers = plan["cores_per_gpu"], plan["dataloader_num_workers"]
    total = sum(dataset["bytes"] for dataset in datasets)
    gpus = "1 GPU" if plan["num_gpus"] == 1 else f"{plan['num_gpus']} GPUs"
    lines += [
        "",
        f"The run: {plan['samples']} samples on {gpus}, from {_in_bytes(total)} of files.",
        f"An hour of one GPU at {plan['gpu_rate']:g} samples/s takes {cores:.2f} hours of a core like this machine's.",
    ]
    if workers < cores:
        lines.append(
            f"dataloader_num_workers is {workers}, so the GPU will wait for data: set it to {math.ceil(cores)} or "
            "more, with as many cores for each GPU."
        )
    return "\n".join(lines)


def _in_bytes(count: float) -> str:
    """Return a number of bytes in a unit that fits it."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
