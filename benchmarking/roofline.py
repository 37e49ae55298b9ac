"""Peak compute and memory rates of a device, and the time that they allow for a computation (roofline model)."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .reference import measure_call

ATTEMPTS = 5  # the fastest counts


def gemm_rate(device: str, dtype: torch.dtype) -> float:
    """Return the floating-point operations per second of a large matrix product."""
    size = 8192 if device.startswith("cuda") else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(measure_call(lambda _: a @ b, 0, device)["seconds"] for _ in range(ATTEMPTS))


def read_rate(device: str) -> float:
    """Return the bytes per second of reading a large tensor from memory."""
    data = torch.ones(2**28 if device.startswith("cuda") else 2**27, device=device)
    return data.nbytes / min(measure_call(lambda _: data.sum(), 0, device)["seconds"] for _ in range(ATTEMPTS))


def describe_machine(device: str, dtypes: Sequence[str], threads: int) -> dict[str, Any]:
    """Return the device, library versions, and peak rates for some dtypes."""
    info: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else _cpu_name(),
        "threads": threads,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    for dtype in dtypes:
        info[f"{dtype} GFLOP/s"] = gemm_rate(device, getattr(torch, dtype)) / 1e9
    info["read GB/s"] = read_rate(device) / 1e9
    return info


def _cpu_name() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def compute_seconds(run: Callable[[], Any], gflops: float) -> float:
    """Return the seconds that the floating-point operations of ``run`` take at a peak rate (GFLOP/s)."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / gflops / 1e9


def decode_step_seconds(language_model: nn.Module, gbytes: float) -> float:
    """Return the seconds that reading the weights once takes at a peak rate (GB/s), as every decode step must."""
    return sum(parameter.nbytes for parameter in language_model.parameters()) / gbytes / 1e9


def roofline_seconds(model: Any, run: Callable[[], Any], gflops: float, gbytes: float) -> float:
    """Return the least seconds for an action (or chunk): its arithmetic, and reading the weights for every decode step.

    Args:
        model: The model; without parallel decoding it needs ``action_dim - 1`` decode steps.
        run: Predicts one action or chunk.
        gflops: Peak compute rate in GFLOP/s.
        gbytes: Peak memory rate in GB/s.
    """
    num_steps = 0 if model.config.parallel_decoding else model.get_action_dim() - 1
    return compute_seconds(run, gflops) + num_steps * decode_step_seconds(model.language_model, gbytes)
