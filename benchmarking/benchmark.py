"""``openvla bench``: latency of action prediction on this machine, and whether the predicted actions are the same.

Weights are random from a seed, built on the device and the same for every backend; nothing is downloaded, and no weight
is written. In every stage all backends run in turn, one call each; a row with medians and quartiles is printed as soon
as the stage is done. The first backend of a stage is the baseline of the speedup and of the equal tokens: the published
code where --reference names it. Every question (an image and an instruction) is asked several times, and the report
counts the questions that got more than one answer. Peak compute and memory rates are measured in the same run.

On a GPU the default is OpenVLA-7B's size in bfloat16, which takes about 5 minutes; on a CPU two smaller sizes in
float32. A backend that fails gets a row that says why.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tqdm.auto import tqdm

from ..conversion.hub_folder import write_config_and_code
from ..errors_openvla import OpenVLAValueError
from . import reference as reference_script
from .backends import (
    CHUNK,
    FAST,
    PLAIN,
    QUANTIZED,
    REFERENCE,
    Benchmark,
    ModelRunner,
    answers_after_warmup,
    build_backends,
    chunk_backends,
    quantized_backends,
)
from .reference import (
    ACTION,
    BATCHES,
    FIRST_TOKEN,
    PIXELS,
    TOWERS,
    checksums,
    measure_call,
    preprocessing_stages,
    profile_call,
)
from .report import Measurement, Report, require_matplotlib
from .roofline import compute_seconds, decode_step_seconds, gemm_rate, read_rate
from .sizes import CHUNK_FIELDS, SIZES, action_token_range
from .worker_process import WorkerProcess

WARMUP_CALLS = 3  # on a GPU the second captures a CUDA graph, one for every length of a prompt
MIN_CALLS = 5  # timed calls of every backend, however long they take
DECODE_STEP = "decode step"
WARMUP, PREPROCESSING = "warmup", "preprocessing"
QUANTIZED_STAGES = {f"{PIXELS}, {name}": name for name in QUANTIZED}
# The stages of --stages; that of preprocessing are those of the image processor.
STAGES: dict[str, list[str]] = {
    WARMUP: [],
    "action": [ACTION],
    "pixels": [PIXELS],
    "first-token": [FIRST_TOKEN],
    "towers": [TOWERS],
    "batch": [*BATCHES.values()],
    "chunk": [CHUNK],
    "quantized": [*QUANTIZED_STAGES],
    PREPROCESSING: [],
}
GPU_STAGES = ("batch", "quantized")  # on a CPU only where --stages names them
NUM_ACTIONS = {ACTION: 1, PIXELS: 1, **dict.fromkeys(QUANTIZED_STAGES, 1), CHUNK: CHUNK_FIELDS["chunk_length"]}
NUM_ACTIONS |= {stage: size for size, stage in BATCHES.items()}
AUTOREGRESSIVE = (ACTION, PIXELS, *BATCHES.values())  # stages with decode steps, for the roofline


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``openvla bench``."""
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help="default full on a GPU, else tiny-deep and eighth")
    parser.add_argument(
        "--dtypes", nargs="+", choices=("float32", "bfloat16"), help="default bfloat16 on a GPU, else float32"
    )
    parser.add_argument(
        "--stages",
        nargs="+",
        choices=[*STAGES],
        help=f"default all; on a CPU all but {' and '.join(GPU_STAGES)}. pixels has the draft tokens",
    )
    parser.add_argument("--inputs", type=int, default=20, help="number of questions: images with an instruction")
    parser.add_argument(
        "--repeats-per-question", type=int, default=2, metavar="N", help="how often each question is asked"
    )
    parser.add_argument(
        "--seconds-per-stage",
        type=float,
        default=15.0,
        metavar="S",
        help=f"end a stage before all questions are asked, after at least {MIN_CALLS} calls of each backend",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="add a backend with compiled pointwise operations")
    parser.add_argument("--profile", action="store_true", help="print the kernels of an action by time, per backend")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--reference", type=Path, metavar="DIR", help="published remote code, to compare with")
    parser.add_argument(
        "--reference-python",
        metavar="PY",
        help="Python with transformers 4.40.1, timm 0.9.16, torchvision and the torch of this one",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements, after every stage")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw them (needs the extra: openvla[plot])")


def run(args: argparse.Namespace) -> int:
    """Measure and print the report; return the exit status."""
    if (args.reference is None) != (args.reference_python is None):
        raise OpenVLAValueError("--reference (the code) and --reference-python (what runs it) belong together.")
    if min(args.inputs, args.repeats_per_question) < 1:
        raise OpenVLAValueError("--inputs and --repeats-per-question must be at least 1.")
    if args.plot:
        require_matplotlib()
    on_gpu = _on_gpu(args.device)
    args.sizes = args.sizes or (["full"] if on_gpu else ["tiny-deep", "eighth"])
    args.dtypes = args.dtypes or (["bfloat16"] if on_gpu else ["float32"])
    args.stages = args.stages or [stage for stage in STAGES if on_gpu or stage not in GPU_STAGES]
    torch.set_num_threads(args.threads)
    report = Report(describe_machine(args), args.json, describe_not_run(args))
    report.print_header()
    for size in args.sizes:
        for dtype in args.dtypes:
            measure(size, dtype, args, report)
            release_memory()
    report.print_end()
    report.write()
    if args.plot:
        report.draw(args.plot)
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


def release_memory() -> None:
    """Free the memory of models that are no longer referenced."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def describe_error(error: Exception) -> str:
    """Return the kind of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def measure(size: str, dtype: str, args: argparse.Namespace, report: Report) -> None:
    """Measure all stages and backends of one model size and dtype.

    Args:
        size: One of ``SIZES``.
        dtype: Name of the model's dtype.
        args: Options of the command.
        report: Where the measurements are added.
    """
    runner = ModelRunner.build(size, dtype=dtype, device=args.device, num_inputs=args.inputs)
    if WARMUP in args.stages:
        report.add(warmup_measurements(size, dtype, runner))
    backends = build_backends(runner, args.compile)
    worker = None
    if args.reference:
        try:
            worker = start_reference(args, runner, dtype)
        except Exception as error:
            report.not_run.append(f"{size}, {dtype} beside the published code: {describe_error(error)}")
            print(report.not_run[-1], file=sys.stderr)
        else:
            report.machine["versions"]["reference"] = worker.info["versions"]
            stages = {stage: functools.partial(worker.request, "measure", stage) for stage in backends[PLAIN]}
            backends = {REFERENCE: stages, **backends}
    try:
        for stage in stage_names(args.stages, runner):
            try:
                functions = stage_backends(stage, size, dtype, backends, runner, args)
            except Exception as error:  # out of memory, a missing package, or one too old
                report.add([Measurement(size, dtype, stage, FAST, error=describe_error(error))])
                release_memory()
                continue
            report.add(measure_stage(stage, size, dtype, functions, runner, args, report.machine))
            functions.clear()  # may hold a model
            release_memory()
            if stage == FIRST_TOKEN:
                report.add(decode_step_measurements(size, dtype, runner, report))
        if args.profile:
            report.profiles += profiles(size, dtype, backends, worker, args.device)
    finally:
        if worker:
            worker.stop()


def stage_names(chosen: Sequence[str], runner: ModelRunner) -> list[str]:
    """Return the names of the chosen stages."""
    names = [name for stage in STAGES if stage in chosen for name in STAGES[stage]]
    return [*names, *(preprocessing_stages(runner.processor.image_processor) if PREPROCESSING in chosen else [])]


def stage_backends(
    stage: str,
    size: str,
    dtype: str,
    backends: Mapping[str, Benchmark],
    runner: ModelRunner,
    args: argparse.Namespace,
) -> Benchmark:
    """Return the functions to measure in a stage by the name of their backend, the baseline first.

    Chunks and quantised weights have a model of their own, which is built here and lives as long as the functions.
    """
    if stage == CHUNK:
        return chunk_backends(size, dtype=dtype, device=args.device, num_inputs=args.inputs)
    if stage in QUANTIZED_STAGES:
        unquantized = {name: backends[name][PIXELS] for name in (REFERENCE, FAST) if name in backends}
        return {**unquantized, **quantized_backends(runner, QUANTIZED_STAGES[stage])}
    return {name: backend[stage] for name, backend in backends.items() if stage in backend}


def start_reference(args: argparse.Namespace, runner: ModelRunner, dtype: str) -> WorkerProcess:
    """Start the reference in a worker process, with the weights and inputs of a runner.

    Raises:
        ValueError: The worker drew other weights.
        RuntimeError: The worker ended.
    """
    arrays: dict[str, Any] = {f"ids_{i}": prompt[0].cpu().numpy() for i, prompt in enumerate(runner.prompts)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runner.processor.save_pretrained(folder)
        write_config_and_code(folder, runner.model.config)
        inputs = folder / "inputs.npz"
        np.savez(inputs, images=runner.images, action_tokens=action_token_range(runner.model), **arrays)
        command = [args.reference_python, reference_script.__file__, args.reference, folder, inputs]
        worker = WorkerProcess([*command, "--dtype", dtype, "--device", args.device, "--threads", args.threads])
    drawn = worker.info["checksums"]
    different = [name for name, checksum in checksums(runner.model).items() if drawn.get(name) != checksum]
    if different:
        worker.stop()
        raise OpenVLAValueError(
            f"{len(different)} tensors differ between both processes, {different[0]} first; the random numbers of "
            f"torch {torch.__version__} and {worker.info['versions']['torch']} differ. Install the same torch in both."
        )
    return worker


def warmup_measurements(size: str, dtype: str, runner: ModelRunner) -> list[Measurement]:
    """Measure the warm-up of a policy, and its first, second and later answers, whose median is the baseline."""
    try:
        warmup, answers = answers_after_warmup(runner)
    except Exception as error:
        return [Measurement(size, dtype, "warm-up", FAST, error=describe_error(error))]
    low, later, high = (float(value) for value in np.quantile(answers[2:], [0.25, 0.5, 0.75]))
    row = functools.partial(Measurement, size, dtype, backend=FAST)
    names = {"first": answers[0], "second": answers[1]}
    baseline = "later answers"
    return [
        row(stage="warm-up", seconds=warmup),
        *(
            row(stage=f"{name} answer after warm-up", seconds=seconds, speedup=later / seconds, baseline=baseline)
            for name, seconds in names.items()
        ),
        row(stage="later answers after warm-up", seconds=later, quartiles=(low, high), speedup=1.0, baseline=baseline),
    ]


def measure_stage(
    stage: str,
    size: str,
    dtype: str,
    functions: Benchmark,
    runner: ModelRunner,
    args: argparse.Namespace,
    machine: Mapping[str, Any],
) -> list[Measurement]:
    """Measure all backends in one stage, in turn; the first that does not fail is the baseline."""
    calls = call_in_turn(stage, functions, warmup_indices(stage, runner, args.device), args)
    baseline = next((name for name, of_backend in calls.items() if of_backend.error is None), None)
    float32: dict[int, Any] = {}
    if stage == ACTION and dtype != "float32" and baseline is not None:
        indices = sorted({call["index"] for call in calls[baseline].timed})
        try:
            float32 = predict_in_float32(size, indices, args)
        except Exception as error:
            print(f"no tokens in float32: {describe_error(error)}", file=sys.stderr)
        release_memory()
    seconds = None
    if stage in (*AUTOREGRESSIVE, FIRST_TOKEN, TOWERS, CHUNK) and calls[PLAIN].error is None:
        seconds = compute_seconds(functools.partial(functions[PLAIN], 0), machine[f"{dtype} GFLOP/s"])
        num_steps = runner.model.get_action_dim() - 1 if stage in AUTOREGRESSIVE else 0
        seconds += num_steps * decode_step_seconds(runner.model.language_model, machine["read GB/s"])
    measurements = []
    for name, of_backend in calls.items():
        measurement = Measurement(size, dtype, stage, name, error=of_backend.error)
        if of_backend.error is None and baseline is not None:
            summarize(measurement, of_backend, calls[baseline], float32)
            measurement.baseline = baseline
            measurement.roofline_fraction = None if seconds is None else seconds / measurement.seconds
        measurements.append(measurement)
    return measurements


def warmup_indices(stage: str, runner: ModelRunner, device: str) -> list[int]:
    """Return the inputs of the first calls; on a GPU one of every length of a prompt, which has its own CUDA graph."""
    first_of_length = {prompt.shape[1]: index for index, prompt in reversed(list(enumerate(runner.prompts)))}
    indices = sorted(first_of_length.values()) if _on_gpu(device) and stage not in BATCHES.values() else [0]
    return [index for index in indices for _ in range(WARMUP_CALLS)]


def call_in_turn(stage: str, functions: Benchmark, warmup: Sequence[int], args: argparse.Namespace) -> dict[str, Calls]:
    """Call every backend on the warm-up inputs, then all backends in turn until the stage's time is over."""
    calls = {name: Calls() for name in functions}

    def call(name: str, index: int, of_backend: list[dict[str, Any]]) -> None:
        if calls[name].error is not None:
            return
        try:
            function: Callable[[int], Any] = functions[name]
            measured = function(index) if name == REFERENCE else measure_call(function, index, args.device)
            of_backend.append({"index": index, **measured})
        except Exception as error:  # out of memory, or a worker that ended: the others go on
            calls[name].error = describe_error(error)
            release_memory()

    for name in functions:
        for index in warmup[:1] if name == REFERENCE else warmup:  # the published code compiles and captures nothing
            call(name, index, calls[name].warmup)
    started = time.perf_counter()
    questions = [index for index in range(args.inputs) for _ in range(args.repeats_per_question)]
    for done, index in enumerate(tqdm(questions, desc=stage, unit="call", leave=False, file=sys.stderr)):
        if done >= MIN_CALLS and time.perf_counter() - started > args.seconds_per_stage:
            break
        for name in functions:
            call(name, index, calls[name].timed)
    return calls


def predict_in_float32(size: str, indices: Sequence[int], args: argparse.Namespace) -> dict[int, list[int]]:
    """Return the tokens of inputs in float32, which decide near ties correctly."""
    runner = ModelRunner.build(size, dtype="float32", device=args.device, num_inputs=args.inputs)
    progress = tqdm(indices, desc="in float32", unit="input", leave=False, file=sys.stderr)
    return {index: runner.action(index, fast=False) for index in progress}


def summarize(measurement: Measurement, calls: Calls, baseline: Calls, float32: Mapping[int, Any]) -> None:
    """Fill in the medians of a backend's calls, and the comparison of its results.

    Args:
        measurement: The row to fill in.
        calls: Calls of the backend.
        baseline: Calls of the baseline on the same inputs.
        float32: Tokens in float32 by the index of the input; empty where they are not compared.
    """
    seconds, cpu_seconds = (np.array([call[name] for call in calls.timed]) for name in ("seconds", "cpu_seconds"))
    baseline_seconds = np.array([call["seconds"] for call in baseline.timed])
    low, high = np.quantile(seconds, [0.25, 0.75])
    measurement.seconds, measurement.cpu_seconds = float(np.median(seconds)), float(np.median(cpu_seconds))
    measurement.speedup = float(np.median(baseline_seconds / seconds))
    measurement.quartiles = float(low), float(high)
    measurement.warmup_seconds = [call["seconds"] for call in calls.warmup]
    measurement.calls = len(seconds)
    if measurement.stage in NUM_ACTIONS:
        measurement.actions_per_second = NUM_ACTIONS[measurement.stage] / measurement.seconds
    results, expected = (np.array([call["result"] for call in part.timed]) for part in (calls, baseline))
    measurement.equal, measurement.compared = int((results == expected).sum()), results.size
    if results.dtype.kind == "f":
        measurement.largest_difference = float(np.abs(results - expected).max())
    if float32:
        exact = np.array([float32[call["index"]] for call in calls.timed])
        measurement.equal_to_float32 = int((results == exact).sum())
    answers: dict[int, list[str]] = {}
    for call in (*calls.warmup, *calls.timed):
        answers.setdefault(call["index"], []).append(json.dumps(call["result"]))
    measurement.asked_again = sum(len(given) > 1 for given in answers.values())
    measurement.several_answers = sum(len(set(given)) > 1 for given in answers.values())
    if "gpu_bytes" in calls.timed[0]:
        measurement.gpu_bytes = max(call["gpu_bytes"] for call in calls.timed)


def decode_step_measurements(size: str, dtype: str, runner: ModelRunner, report: Report) -> list[Measurement]:
    """Return the mean time of a decode step per backend: (action from pixels - first token) / number of steps."""
    measured = {
        (entry.stage, entry.backend): entry
        for entry in report.measurements
        if (entry.size, entry.dtype, entry.error) == (size, dtype, None)
    }
    read_seconds = decode_step_seconds(runner.model.language_model, report.machine["read GB/s"])
    num_steps = runner.model.get_action_dim() - 1
    steps: list[Measurement] = []
    for (stage, backend), first_token in measured.items():
        action = measured.get((PIXELS, backend))
        if stage != FIRST_TOKEN or action is None:
            continue
        step = Measurement(size, dtype, DECODE_STEP, backend, baseline=action.baseline)
        step.seconds = (action.seconds - first_token.seconds) / num_steps
        step.speedup = (steps[0].seconds if steps else step.seconds) / step.seconds
        step.roofline_fraction = read_seconds / step.seconds
        steps.append(step)
    return steps


def profiles(
    size: str, dtype: str, backends: Mapping[str, Benchmark], worker: WorkerProcess | None, device: str
) -> list[dict[str, Any]]:
    """Return the kernels by time of one action of every backend that predicts from an image."""
    entries = []
    for name, backend in backends.items():
        if ACTION not in backend:
            continue
        try:
            if name == REFERENCE and worker is not None:
                kernels: Any = worker.request("profile", ACTION, 0)
            else:
                kernels = profile_call(backend[ACTION], 0, device)
        except Exception as error:
            kernels = [{"name": f"not measured: {describe_error(error)}", "calls": 0, "ms": 0.0, "share": 0.0}]
        entries.append({"size": size, "dtype": dtype, "backend": name, "kernels": kernels})
    return entries
