"""``openvla bench``: latency of action prediction on this machine, and whether the predicted actions are the same.

All backends run in turn, one call each, in resident processes; medians and quartiles are reported. Peak compute and
memory rates are measured in the same run. For every backend the report says how many tokens equal those of the first
backend, and in other dtypes than float32 how many equal those of float32. Weights are random from a seed, and the same
for every backend.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tqdm.auto import tqdm

from ..configuration_openvla import write_json
from ..errors_openvla import OpenVLAImportError, OpenVLAValueError
from . import reference as reference_script
from .backends import PLAIN, REFERENCE, Benchmark, ModelRunner, build_backends
from .reference import ACTION, BATCH, FIRST_TOKEN, PIXELS, TOWERS, measure_call, preprocessing_stages
from .roofline import compute_seconds, decode_step_seconds, gemm_rate, read_rate
from .sizes import SIZES, write_model
from .worker_process import WorkerProcess

WARMUP_CALLS = 2  # on a GPU the second captures the CUDA graph
DECODE_STEP = "decode step"
STAGES = {"action": ACTION, "pixels": PIXELS, "first-token": FIRST_TOKEN, "towers": TOWERS, "batch": BATCH}
PREPROCESSING = "preprocessing"


@dataclass
class Measurement:
    """Latency of one backend in one stage.

    Attributes:
        size: Model size, one of ``SIZES``.
        dtype: dtype of the model.
        stage: Part of the prediction that was measured.
        backend: Name of the backend.
        seconds: Median wall time per call.
        cpu_seconds: Median CPU time per call.
        speedup: Median of the baseline's wall time divided by this backend's.
        baseline: Backend that this one is compared with.
        quartiles: First and third quartile of the wall time in seconds.
        warmup_seconds: Wall times of the first calls, which are not part of the medians.
        gpu_bytes: Peak GPU memory in bytes.
        equal: Number of results (tokens, or digests of arrays) that equal the baseline's.
        compared: Number of results that were compared.
        equal_to_float32: Number of tokens that equal those in float32.
        roofline_fraction: Roofline time divided by ``seconds``.
    """

    size: str
    dtype: str
    stage: str
    backend: str
    seconds: float
    cpu_seconds: float
    speedup: float
    baseline: str
    quartiles: tuple[float, float] | None = None
    warmup_seconds: list[float] | None = None
    gpu_bytes: int | None = None
    equal: int | None = None
    compared: int | None = None
    equal_to_float32: int | None = None
    roofline_fraction: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that are not None."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``openvla bench``."""
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["tiny-deep", "eighth"])
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32"])
    parser.add_argument(
        "--stages", nargs="+", choices=[*STAGES, PREPROCESSING], help="default all; on a CPU all but batch"
    )
    parser.add_argument("--repeats", type=int, default=20, help="measured calls per stage and backend")
    parser.add_argument("--inputs", type=int, default=64, help="number of different images and instructions")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="add a backend with compiled pointwise operations")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--reference", type=Path, metavar="DIR", help="published remote code, to compare with")
    parser.add_argument(
        "--reference-python", metavar="PY", help="Python with transformers 4.40.1, timm 0.9.16, torchvision"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw them (needs the extra: openvla[plot])")


def run(args: argparse.Namespace) -> int:
    """Measure, print and write the report; return the exit status."""
    if (args.reference is None) != (args.reference_python is None):
        raise OpenVLAValueError("--reference (the code) and --reference-python (what runs it) belong together.")
    if args.repeats < 1 or args.inputs < 1:
        raise OpenVLAValueError("--repeats and --inputs must be at least 1.")
    if not args.stages:
        args.stages = [stage for stage in (*STAGES, PREPROCESSING) if stage != "batch" or _on_gpu(args.device)]
    torch.set_num_threads(args.threads)
    report: dict[str, Any] = {"machine": describe_machine(args), "measurements": [], "not_run": describe_not_run(args)}
    for size in args.sizes:
        for dtype in args.dtypes:
            with tempfile.TemporaryDirectory() as folder:
                measurements = measure(size, dtype, args, Path(folder), report["machine"])
                report["measurements"] += [measurement.to_dict() for measurement in measurements]
    print("\n".join(format_table(report)))
    if args.json:
        write_json(args.json, report)
    if args.plot:
        draw(report, args.plot)
    return 0


def describe_machine(args: argparse.Namespace) -> dict[str, Any]:
    """Return the device, library versions, and peak rates."""
    info: dict[str, Any] = {
        "device": torch.cuda.get_device_name(args.device) if _on_gpu(args.device) else _cpu_name(),
        "threads": args.threads,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    for dtype in args.dtypes:
        info[f"{dtype} GFLOP/s"] = gemm_rate(args.device, getattr(torch, dtype)) / 1e9
    info["read GB/s"] = read_rate(args.device) / 1e9
    return info


def _cpu_name() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def describe_not_run(args: argparse.Namespace) -> list[str]:
    """Return the comparisons that this run leaves out, with the reason."""
    not_run = []
    if not args.reference:
        not_run.append("beside the published code: --reference and --reference-python were not given")
    if not _on_gpu(args.device):
        reason = "--device was cpu" if torch.cuda.is_available() else "there is none here"
        not_run.append(f"on a GPU: {reason}")
    return not_run


def _on_gpu(device: str) -> bool:
    return device.startswith("cuda")


def measure(
    size: str, dtype: str, args: argparse.Namespace, folder: Path, machine: dict[str, Any]
) -> list[Measurement]:
    """Measure all stages and backends of one model size and dtype.

    Args:
        size: One of ``SIZES``.
        dtype: Name of the model's dtype.
        args: Options of the command.
        folder: Empty folder for the model and the inputs.
        machine: Return value of ``describe_machine``; the versions of the reference are added.
    """
    write_model(size, folder / "model")
    runner = ModelRunner.load(folder / "model", dtype=dtype, device=args.device, num_inputs=args.inputs)
    backends = build_backends(runner, args.compile)
    float32_tokens = None if dtype == "float32" else predict_in_float32(folder / "model", args)
    worker = None
    if args.reference:
        worker = start_reference(args, runner, folder, dtype)
        machine["versions"]["reference"] = worker.info
        reference_stages: Benchmark = {stage: functools.partial(worker.request, stage) for stage in backends[PLAIN]}
        backends = {REFERENCE: reference_stages, **backends}
    stages = [STAGES[stage] for stage in args.stages if stage in STAGES]
    if PREPROCESSING in args.stages:
        stages += preprocessing_stages(runner.processor.image_processor)
    measurements = []
    try:
        for stage in stages:
            measurements += compare_backends(
                {name: backend for name, backend in backends.items() if stage in backend},
                size=size,
                dtype=dtype,
                stage=stage,
                args=args,
                float32_tokens=float32_tokens if stage == ACTION else None,
            )
    finally:
        if worker:
            worker.stop()
    measurements += decode_step_measurements(measurements, runner.model.get_action_dim() - 1)
    rooflines = stage_rooflines(
        runner.model, backends[PLAIN], stages, gflops=machine[f"{dtype} GFLOP/s"], gbytes=machine["read GB/s"]
    )
    for measurement in measurements:
        if measurement.stage in rooflines:
            measurement.roofline_fraction = rooflines[measurement.stage] / measurement.seconds
    return measurements


def predict_in_float32(folder: Path, args: argparse.Namespace) -> list[list[int]]:
    """Return the tokens of every input in float32, which decide near ties correctly."""
    runner = ModelRunner.load(folder, dtype="float32", device=args.device, num_inputs=args.inputs)
    indices = tqdm(range(args.inputs), desc="in float32", unit="input", file=sys.stderr)
    return [runner.action(index, fast=False) for index in indices]


def start_reference(args: argparse.Namespace, runner: ModelRunner, folder: Path, dtype: str) -> WorkerProcess:
    """Start the reference in a worker process with the model and inputs of a runner."""
    inputs: dict[str, Any] = {f"ids_{i}": prompt[0].cpu().numpy() for i, prompt in enumerate(runner.prompts)}
    np.savez(folder / "inputs.npz", images=runner.images, **inputs)
    command = [args.reference_python, reference_script.__file__]
    command += [args.reference, folder / "model", folder / "inputs.npz"]
    return WorkerProcess([*command, "--dtype", dtype, "--device", args.device, "--threads", args.threads])


def compare_backends(
    backends: dict[str, Benchmark],
    *,
    size: str,
    dtype: str,
    stage: str,
    args: argparse.Namespace,
    float32_tokens: list[list[int]] | None = None,
) -> list[Measurement]:
    """Measure all backends in one stage, in turn; the first is the baseline.

    Args:
        backends: Backends that have the stage, by name.
        size: Model size, for the report.
        dtype: dtype, for the report.
        stage: Stage to measure.
        args: Options of the command.
        float32_tokens: Tokens of every input in float32, if they are to be compared.
    """
    calls: dict[str, list[dict[str, Any]]] = {name: [] for name in backends}
    iterations = max(args.repeats + WARMUP_CALLS, args.inputs if stage == ACTION else 0)
    for iteration in tqdm(range(iterations), desc=stage, unit="iteration", file=sys.stderr):
        index = iteration % args.inputs
        for name, backend in backends.items():
            if name == REFERENCE:
                calls[name].append(backend[stage](index))
            else:
                calls[name].append(measure_call(backend[stage], index, args.device))
    baseline = next(iter(backends))
    expected = None
    if float32_tokens is not None:
        expected = [float32_tokens[iteration % args.inputs] for iteration in range(iterations)]
    return [
        _summarize(
            backend_calls,
            calls[baseline],
            expected,
            Measurement(size, dtype, stage, name, seconds=0.0, cpu_seconds=0.0, speedup=0.0, baseline=baseline),
        )
        for name, backend_calls in calls.items()
    ]


def _summarize(
    calls: list[dict[str, Any]],
    baseline_calls: list[dict[str, Any]],
    expected: list[list[int]] | None,
    measurement: Measurement,
) -> Measurement:
    """Fill in the medians of a backend's calls, and the comparison of the results."""
    seconds = np.array([call["seconds"] for call in calls[WARMUP_CALLS:]])
    cpu_seconds = np.array([call["cpu_seconds"] for call in calls[WARMUP_CALLS:]])
    baseline_seconds = np.array([call["seconds"] for call in baseline_calls[WARMUP_CALLS:]])
    low, high = np.quantile(seconds, [0.25, 0.75])
    equal = np.concatenate(
        [
            np.atleast_1d(np.array(call["result"]) == np.array(baseline_call["result"]))
            for call, baseline_call in zip(calls, baseline_calls)
        ]
    )
    measurement.seconds, measurement.cpu_seconds = float(np.median(seconds)), float(np.median(cpu_seconds))
    measurement.speedup = float(np.median(baseline_seconds / seconds))
    measurement.quartiles = float(low), float(high)
    measurement.warmup_seconds = [call["seconds"] for call in calls[:WARMUP_CALLS]]
    measurement.equal, measurement.compared = int(equal.sum()), int(equal.size)
    if "gpu_bytes" in calls[0]:
        measurement.gpu_bytes = max(call["gpu_bytes"] for call in calls)
    if expected is not None:
        tokens = np.array([call["result"] for call in calls])
        measurement.equal_to_float32 = int((tokens == np.array(expected)).sum())
    return measurement


def decode_step_measurements(measurements: Sequence[Measurement], num_steps: int) -> list[Measurement]:
    """Return the mean time of a decode step per backend: (action from pixels - first token) / number of steps."""
    by_stage = {(measurement.stage, measurement.backend): measurement for measurement in measurements}
    steps: list[Measurement] = []
    for (stage, backend), action in by_stage.items():
        first_token = by_stage.get((FIRST_TOKEN, backend))
        if stage != PIXELS or first_token is None:
            continue
        seconds = (action.seconds - first_token.seconds) / num_steps
        steps.append(
            Measurement(
                size=action.size,
                dtype=action.dtype,
                stage=DECODE_STEP,
                backend=backend,
                seconds=seconds,
                cpu_seconds=(action.cpu_seconds - first_token.cpu_seconds) / num_steps,
                speedup=(steps[0].seconds if steps else seconds) / seconds,
                baseline=action.baseline,
            )
        )
    return steps


def stage_rooflines(
    model: Any, plain: Benchmark, stages: Sequence[str], *, gflops: float, gbytes: float
) -> dict[str, float]:
    """Return the roofline time in seconds of every stage: its arithmetic, and reading the weights per decode step."""
    step = decode_step_seconds(model.language_model, gbytes)
    rooflines = {DECODE_STEP: step}
    for stage in set(stages) & set(STAGES.values()):
        num_steps = model.get_action_dim() - 1 if stage in (ACTION, PIXELS, BATCH) else 0
        rooflines[stage] = compute_seconds(functools.partial(plain[stage], 0), gflops) + num_steps * step
    return rooflines


def format_table(report: Mapping[str, Any]) -> list[str]:
    """Return the report as lines of Markdown."""
    lines = [", ".join(f"{name} {_format_value(value)}" for name, value in report["machine"].items()), ""]
    columns = ["size", "dtype", "stage", "backend", "ms (quartiles)", "CPU ms", "speedup", "roofline fraction"]
    columns += ["equal", "equal to float32"]
    columns += ["GPU MB"] * any("gpu_bytes" in measurement for measurement in report["measurements"])
    lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [_format_line(measurement) for measurement in report["measurements"]]
    return [*lines, "", *[f"Not run {reason}." for reason in report["not_run"]]]


def _format_line(measurement: Mapping[str, Any]) -> str:
    latency = f"{1e3 * measurement['seconds']:.1f}"
    if "quartiles" in measurement:
        low, high = measurement["quartiles"]
        latency += f" ({1e3 * low:.1f}-{1e3 * high:.1f})"
    cells = [measurement[name] for name in ("size", "dtype", "stage", "backend")]
    cells += [latency, f"{1e3 * measurement['cpu_seconds']:.1f}", f"{measurement['speedup']:.2f}x"]
    cells += [f"{measurement['roofline_fraction']:.2f}" if "roofline_fraction" in measurement else ""]
    for name in ("equal", "equal_to_float32"):
        cells += [f"{measurement[name]} of {measurement['compared']}" if name in measurement else ""]
    cells += [f"{measurement['gpu_bytes'] / 1e6:.0f}"] if "gpu_bytes" in measurement else []
    return f"| {' | '.join(cells)} |"


def _format_value(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, float) else json.dumps(value) if isinstance(value, dict) else str(value)


def draw(report: Mapping[str, Any], file: Path) -> None:
    """Draw the latencies of an action as bars, a panel per size and dtype, with the roofline time as a line."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OpenVLAImportError('A picture needs matplotlib: pip install "openvla[plot]".') from error
    actions = [measurement for measurement in report["measurements"] if measurement["stage"] == ACTION]
    panels = list(dict.fromkeys((action["size"], action["dtype"]) for action in actions))
    figure = Figure(figsize=(9, 2.6 * len(panels)), layout="constrained")
    for axes, panel in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels):
        shown = [action for action in actions if (action["size"], action["dtype"]) == panel]
        milliseconds = [1e3 * action["seconds"] for action in shown]
        spread = np.abs(1e3 * np.array([action["quartiles"] for action in shown]).T - milliseconds)
        axes.barh([action["backend"] for action in shown], milliseconds, xerr=spread, color="tab:blue")
        axes.axvline(milliseconds[0] * shown[0]["roofline_fraction"], color="tab:red", label="roofline")
        axes.invert_yaxis()
        axes.set(title=f"{ACTION}: {', '.join(panel)}", xlabel="ms")
        axes.legend(loc="lower right")
    figure.savefig(file)
