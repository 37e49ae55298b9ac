"""Measure the samples a second from a dataset's files to training batches: ``openvla inspect-data --rate``."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

from torch.utils.data import DataLoader

from ..data.augmentation import ImageAugmentation
from ..data.episodes import EpisodeReader
from ..data.statistics import compute_statistics
from ..data.stream import StepStream
from ..errors_openvla import OpenVLAValueError
from ..tiny import build_tiny
from .collator import ActionCollator

BATCH_SIZE = 16
# Batches that are not measured: workers start, files are opened.
_WARM_UP_BATCHES = 2


def data_rates(
    reader: EpisodeReader,
    worker_counts: Sequence[int] = (),
    *,
    seconds: float = 5.0,
    skip_bad: bool = False,
    augment: Sequence[bool] = (False, True),
) -> list[dict[str, Any]]:
    """Return the rates of a dataset's batches, as ``openvla finetune`` makes them.

    Prompts are tokenized, actions normalized, and for augmentation images are resized to 224 pixels: the same work as
    for a 7B model. Pixels are normalized on the training's device, which is not measured.

    Args:
        reader: The dataset.
        worker_counts: Numbers of DataLoader workers; 0 is the main process. Default: 0, and one for each core.
        seconds: Duration of each measurement.
        skip_bad: Skip episodes and images that cannot be used.
        augment: Whether images are augmented, for each measurement.

    Returns:
        For each measurement ``augment``, ``workers``, ``samples``, ``samples_per_second`` and, without workers,
        ``cpu_ms``: processor time of a sample in milliseconds, which other processes on the machine change little.

    Raises:
        OpenVLAValueError: ``seconds`` is not positive, a number of workers is negative, or one would have no episode.
        DatasetError: An episode or image cannot be used, and ``skip_bad`` is not set.
    """
    if not seconds > 0:
        raise OpenVLAValueError(f"seconds must be above 0, got {seconds}.")
    if any(count < 0 for count in worker_counts):
        raise OpenVLAValueError(f"Numbers of workers must be at least 0, got {[*worker_counts]}.")
    model, processor = build_tiny()
    model.add_norm_stats(reader.name, compute_statistics(reader, skip_bad=skip_bad, progress=False))
    model.config.num_images_in_input = processor.num_images_in_input = len(reader.fields.cameras)
    counts = list(worker_counts) or [0, min(os.cpu_count() or 1, len(reader))]
    return [
        _measure(reader, ActionCollator(processor, model, augmentation, normalize=False), workers, seconds, skip_bad)
        for augmentation in (ImageAugmentation() if augmented else None for augmented in augment)
        for workers in dict.fromkeys(counts)
    ]


def _measure(
    reader: EpisodeReader, collator: ActionCollator, workers: int, seconds: float, skip_bad: bool
) -> dict[str, Any]:
    stream = StepStream(reader, skip_bad=skip_bad)
    loader = DataLoader(stream, BATCH_SIZE, collate_fn=collator, num_workers=workers)
    samples, start, cpu_start, elapsed = 0, 0.0, 0.0, 0.0
    for number, batch in enumerate(loader, start=1 - _WARM_UP_BATCHES):
        if number <= 0:
            start, cpu_start = time.perf_counter(), time.process_time()
            continue
        samples += len(batch["input_ids"])
        elapsed = time.perf_counter() - start
        if elapsed >= seconds:
            break
    measured: dict[str, Any] = {"augment": collator.augment is not None, "workers": workers, "samples": samples}
    measured["samples_per_second"] = round(samples / elapsed, 1)
    if workers == 0:
        measured["cpu_ms"] = round((time.process_time() - cpu_start) / samples * 1000, 2)
    return measured
