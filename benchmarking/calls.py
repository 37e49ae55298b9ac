"""Calls of the backends of ``openvla bench``, one after the other in turn, and their medians and comparisons."""

from __future__ import annotations

import gc
import json
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..errors_openvla import OpenVLAError
from .backends import Benchmark
from .reference import REFERENCE, measure_call
from .report import Measurement

WARMUP_CALLS = 3  # for every length of a prompt on a GPU: the second captures a CUDA graph, the third replays it
MIN_CALLS = 5  # timed calls of every backend, however long they take


@dataclass
class Calls:
    """Calls of one backend in one stage, each as ``measure_call`` returns it, with its ``index``.

    Attributes:
        warmup: First calls, which may compile and capture.
        timed: The calls after them.
        error: Why the backend failed, if it did.
    """

    warmup: list[dict[str, Any]] = field(default_factory=list)
    timed: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None

    @property
    def seconds(self) -> float:
        """Return the wall time of all timed calls."""
        return sum(call["seconds"] for call in self.timed)


def call_in_turn(
    functions: Benchmark,
    *,
    warmup: Sequence[int],
    questions: Sequence[int],
    seconds: float,
    device: str,
    stage: str,
) -> dict[str, Calls]:
    """Call every backend on the warm-up inputs, then all backends in turn on one question after the other.

    Args:
        functions: A function of the index of an input for every backend.
        warmup: Inputs of the first calls of each backend.
        questions: Inputs of the timed calls.
        seconds: Time of the stage, of which every backend has the same share; one that has used up its share is not
            called again, after ``MIN_CALLS`` calls.
        device: Device of the models.
        stage: Name of the stage, for the progress bar.
    """
    calls = {name: Calls() for name in functions}

    def call(name: str, index: int, of_backend: list[dict[str, Any]]) -> None:
        try:
            measured = (
                functions[name](index) if name == REFERENCE else measure_call(functions[name], index, device)
            )  # the published code is measured in its own process
            of_backend.append({"index": index, **measured})
        except Exception as error:  # out of memory, or a worker that ended: the others go on
            calls[name].error = describe_error(error)
        if calls[name].error is not None:
            release_memory()

    for name, of_backend in calls.items():
        for index in warmup[:1] if name == REFERENCE else warmup:  # the published code compiles and captures nothing
            if of_backend.error is None:
                call(name, index, of_backend.warmup)
    for index in tqdm(questions, desc=stage, unit="question", leave=False, file=sys.stderr):
        for name, of_backend in calls.items():
            has_time = len(of_backend.timed) < MIN_CALLS or of_backend.seconds < seconds / len(functions)
            if has_time and of_backend.error is None:
                call(name, index, of_backend.timed)
    return calls


def summarize(measurement: Measurement, calls: Calls, baseline: Calls, float32: Mapping[int, Any]) -> None:
    """Fill in the medians of a backend's calls, and the comparison of its results.

    Args:
        measurement: The row to fill in.
        calls: Calls of the backend.
        baseline: Calls of the baseline, which begin with the same questions.
        float32: Tokens in float32 by the index of the input; empty where they are not compared.
    """
    seconds, cpu_seconds = (np.array([call[name] for call in calls.timed]) for name in ("seconds", "cpu_seconds"))
    low, high = np.quantile(seconds, [0.25, 0.75])
    measurement.seconds, measurement.cpu_seconds = float(np.median(seconds)), float(np.median(cpu_seconds))
    measurement.quartiles = float(low), float(high)
    measurement.warmup_seconds = [call["seconds"] for call in calls.warmup]
    measurement.calls = len(seconds)
    both = min(len(calls.timed), len(baseline.timed))
    baseline_seconds = np.array([call["seconds"] for call in baseline.timed[:both]])
    measurement.speedup = float(np.median(baseline_seconds / seconds[:both]))
    results, expected = (np.array([call["result"] for call in part.timed[:both]]) for part in (calls, baseline))
    measurement.equal, measurement.compared = int((results == expected).sum()), results.size
    if results.dtype.kind == "f":
        measurement.largest_difference = float(np.abs(results - expected).max())
    if float32:
        exact = np.array([float32[call["index"]] for call in calls.timed[:both]])
        measurement.equal_to_float32 = int((results == exact).sum())
    answers: dict[int, list[str]] = {}
    for call in (*calls.warmup, *calls.timed):
        answers.setdefault(call["index"], []).append(json.dumps(call["result"]))
    measurement.asked_again = sum(len(given) > 1 for given in answers.values())
    measurement.several_answers = sum(len(set(given)) > 1 for given in answers.values())
    if "gpu_bytes" in calls.timed[0]:
        measurement.gpu_bytes = max(call["gpu_bytes"] for call in calls.timed)


def describe_error(error: Exception) -> str:
    """Return the kind of an error and the first line of its message; print the traceback unless it is the user's."""
    if not isinstance(error, OpenVLAError):
        traceback.print_exception(type(error), error, error.__traceback__)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def release_memory() -> None:
    """Free the memory of models that are no longer referenced."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
