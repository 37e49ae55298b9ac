"""``openvla bench``: latency of action prediction on this machine, and whether the predicted actions are the same.

Weights are random from a seed, built on the device and the same for every backend; nothing is downloaded, and no weight
is written. In every stage all backends run in turn, one call each; a row with medians and quartiles is printed as soon
as the stage is done. The first backend of a stage is the baseline of the speedup and of the equal tokens: the published
code where --reference names it. Every question (an image and an instruction) is asked several times, and the report
counts the questions that got more than one answer. Peak compute and memory rates are measured in the same run.

On a GPU the default is OpenVLA-7B's size in bfloat16, estimated to take less than 6 minutes; on a CPU two smaller sizes
in float32. A backend that fails gets a row that says why.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..conversion.hub_folder import write_config_and_code
from ..errors_openvla import OpenVLAValueError
from . import reference as reference_script
from .backends import (
    CHUNK,
    FAST,
    PLAIN,
    QUANTIZED,
    Benchmark,
    ModelRunner,
    answers_after_warmup,
    build_backends,
    chunk_backends,
    quantized_backends,
)
from .calls import MIN_CALLS, WARMUP_CALLS, call_in_turn, describe_error, release_memory, summarize
from .reference import (
    ACTION,
    BATCHES,
    FIRST_TOKEN,
    PIXELS,
    REFERENCE,
    TOWERS,
    checksums,
    preprocessing_stages,
    profile_call,
)
from .report import Measurement, Report, require_matplotlib
from .roofline import compute_seconds, decode_step_seconds, describe_machine
from .sizes import CHUNK_FIELDS, SIZES, action_token_range
from .worker_process import WorkerProcess

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
        "--repeats-per-question", type=int, default=3, metavar="N", help="how often each question is asked"
    )
    parser.add_argument(
        "--seconds-per-stage",
        type=float,
        default=15.0,
        metavar="S",
        help=f"time of a stage, shared by its backends; each is called at least {MIN_CALLS} times",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="add the backends that wait for the compiler")
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
    report = Report(describe_machine(args.device, args.dtypes, args.threads), args.json, describe_not_run(args))
    report.print_header()
    for size in args.sizes:
        for dtype in args.dtypes:
            SizeBenchmark(size, dtype, args, report).run()
            release_memory()
    report.print_end()
    report.write()
    if args.plot:
        report.draw(args.plot)
    return 0


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


class SizeBenchmark:
    """The benchmark of one model size and dtype.

    Args:
        size: One of ``SIZES``.
        dtype: Name of the model's dtype.
        args: Options of the command.
        report: Where the measurements are added.
    """

    def __init__(self, size: str, dtype: str, args: argparse.Namespace, report: Report) -> None:
        self.size, self.dtype, self.args, self.report = size, dtype, args, report
        self.row = functools.partial(Measurement, size, dtype)
        self.runner = ModelRunner.build(size, dtype=dtype, device=args.device, num_inputs=args.inputs)
        self.num_steps = self.runner.model.get_action_dim() - 1
        self.worker: WorkerProcess | None = None

    def run(self) -> None:
        """Measure all stages and backends."""
        if WARMUP in self.args.stages:  # in a new process, so first
            self.report.add(self.warmup_measurements())
        backends = build_backends(self.runner, self.args.compile)
        if self.args.reference:
            try:
                self.worker = start_reference(self.args, self.runner, self.dtype)
            except Exception as error:
                self.report.add([self.row("all stages", REFERENCE, error=describe_error(error))])
            else:
                self.report.machine["versions"][REFERENCE] = self.worker.info["versions"]
                measure = functools.partial(self.worker.request, "measure")
                backends = {REFERENCE: {s: functools.partial(measure, s) for s in backends[PLAIN]}, **backends}
        try:
            for stage in self.stage_names():
                try:
                    functions = self.stage_functions(stage, backends)
                except Exception as error:  # out of memory, a missing package, or one too old
                    functions = {}
                    self.report.add([self.row(stage, FAST, error=describe_error(error))])
                else:
                    self.report.add(self.measure_stage(stage, functions))
                functions.clear()  # they may hold a model
                release_memory()
                if stage == FIRST_TOKEN:
                    self.report.add(self.decode_step_measurements())
            if self.args.profile:
                self.report.profiles += self.profiles(backends)
                self.report.write()
        finally:
            if self.worker:
                self.worker.stop()

    def stage_names(self) -> list[str]:
        """Return the names of the chosen stages."""
        chosen = self.args.stages
        names = [name for stage in STAGES if stage in chosen for name in STAGES[stage]]
        processor = self.runner.processor.image_processor
        return [*names, *(preprocessing_stages(processor) if PREPROCESSING in chosen else [])]

    def stage_functions(self, stage: str, backends: Mapping[str, Benchmark]) -> Benchmark:
        """Return the functions to measure in a stage by the name of their backend, the baseline first.

        Chunks and quantised weights have a model of their own, built here, which lives as long as the functions.
        """
        if stage == CHUNK:
            device, num_inputs = self.args.device, self.args.inputs
            return chunk_backends(self.size, dtype=self.dtype, device=device, num_inputs=num_inputs)
        if stage in QUANTIZED_STAGES:
            unquantized = {name: backends[name][PIXELS] for name in (REFERENCE, FAST) if name in backends}
            return {**unquantized, **quantized_backends(self.runner, QUANTIZED_STAGES[stage])}
        if stage == PIXELS:
            self.runner.predict_drafts()
        return {name: backend[stage] for name, backend in backends.items() if stage in backend}

    def measure_stage(self, stage: str, functions: Benchmark) -> list[Measurement]:
        """Measure all backends in one stage, in turn; the first that does not fail is the baseline."""
        calls = call_in_turn(
            functions,
            warmup=self.warmup_inputs(stage),
            questions=[index for index in range(self.args.inputs) for _ in range(self.args.repeats_per_question)],
            seconds=self.args.seconds_per_stage,
            device=self.args.device,
            stage=stage,
        )
        baseline = next((name for name, of_backend in calls.items() if of_backend.error is None), "")
        float32: dict[int, Any] = {}
        if stage == ACTION and self.dtype != "float32" and baseline:
            float32 = self.predict_in_float32(sorted({call["index"] for call in calls[baseline].timed}))
            release_memory()
        roofline = None
        if PLAIN in calls and calls[PLAIN].error is None:
            roofline = self.roofline_seconds(stage, functions[PLAIN])
        measurements = []
        for name, of_backend in calls.items():
            row = self.row(stage, name, error=of_backend.error)
            if of_backend.error is None:
                row.baseline = baseline
                summarize(row, of_backend, calls[baseline], float32)
                row.actions_per_second = NUM_ACTIONS[stage] / row.seconds if stage in NUM_ACTIONS else None
                row.roofline_fraction = None if roofline is None else roofline / row.seconds
            measurements.append(row)
        return measurements

    def warmup_inputs(self, stage: str) -> list[int]:
        """Return the inputs of the first calls; on a GPU one of each length of a prompt, as each has a CUDA graph."""
        if not _on_gpu(self.args.device):
            return [0]
        lengths = [prompt.shape[1] for prompt in self.runner.prompts]
        first_of_length = [0] if stage in BATCHES.values() else sorted(lengths.index(length) for length in set(lengths))
        return [index for index in first_of_length for _ in range(WARMUP_CALLS)]

    def predict_in_float32(self, indices: Sequence[int]) -> dict[int, Any]:
        """Return the tokens of inputs in float32, which decide near ties correctly; nothing where memory is short."""
        device, num_inputs = self.args.device, self.args.inputs
        progress = tqdm(indices, desc="in float32", unit="input", leave=False, file=sys.stderr)
        try:
            runner = ModelRunner.build(self.size, dtype="float32", device=device, num_inputs=num_inputs)
            return {index: runner.action(index, fast=False) for index in progress}
        except RuntimeError as error:  # out of memory
            self.report.not_run.append(f"{self.size} in float32, to compare with: {describe_error(error)}")
            return {}

    def roofline_seconds(self, stage: str, plain: Callable[[int], Any]) -> float | None:
        """Return the roofline time of a stage: its arithmetic, and reading the weights for every decode step."""
        if stage not in (*AUTOREGRESSIVE, FIRST_TOKEN, TOWERS, CHUNK):
            return None
        machine = self.report.machine
        seconds = compute_seconds(functools.partial(plain, 0), machine[f"{self.dtype} GFLOP/s"])
        num_steps = self.num_steps if stage in AUTOREGRESSIVE else 0
        return seconds + num_steps * decode_step_seconds(self.runner.model.language_model, machine["read GB/s"])

    def warmup_measurements(self) -> list[Measurement]:
        """Measure the warm-up of a policy, and its first, second and later answers, whose median is the baseline."""
        try:
            warmup, answers = answers_after_warmup(self.runner)
        except Exception as error:
            return [self.row("warm-up", FAST, error=describe_error(error))]
        low, later, high = (float(value) for value in np.quantile(answers[2:], [0.25, 0.5, 0.75]))
        rows = [self.row("warm-up", FAST, seconds=warmup)]
        for name, seconds in (("first answer", answers[0]), ("second answer", answers[1]), ("later answers", later)):
            speedup, stage = later / seconds, f"{name} after warm-up"
            rows.append(self.row(stage, FAST, seconds=seconds, speedup=speedup, baseline="later answers"))
        rows[-1].quartiles = low, high
        return rows

    def decode_step_measurements(self) -> list[Measurement]:
        """Return the mean time of a decode step per backend: (action from pixels - first token) / number of steps."""
        measured = {
            (entry.stage, entry.backend): entry
            for entry in self.report.measurements
            if (entry.size, entry.dtype, entry.error) == (self.size, self.dtype, None)
        }
        machine = self.report.machine
        steps: list[Measurement] = []
        read_seconds = decode_step_seconds(self.runner.model.language_model, machine["read GB/s"])
        for (stage, backend), first_token in measured.items():
            action = measured.get((PIXELS, backend))
            if stage != FIRST_TOKEN or action is None:
                continue
            step = self.row(DECODE_STEP, backend, seconds=(action.seconds - first_token.seconds) / self.num_steps)
            steps.append(step)
            if step.seconds <= 0:
                step.error = "the first token took longer than the action; the machine is busy with other work"
                continue
            first = next(other for other in steps if other.error is None)
            step.baseline, step.speedup = first.backend, first.seconds / step.seconds
            step.roofline_fraction = read_seconds / step.seconds
        return steps

    def profiles(self, backends: Mapping[str, Benchmark]) -> list[dict[str, Any]]:
        """Return the kernels by time of one action of every backend that predicts from an image."""
        entries = []
        for name, backend in backends.items():
            if ACTION not in backend:
                continue
            entry: dict[str, Any] = {"size": self.size, "dtype": self.dtype, "backend": name, "kernels": []}
            try:
                if name == REFERENCE and self.worker is not None:
                    entry["kernels"] = self.worker.request("profile", ACTION, 0)
                else:
                    entry["kernels"] = profile_call(backend[ACTION], 0, self.args.device)
            except Exception as error:
                entry["error"] = describe_error(error)
            entries.append(entry)
        return entries


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
            f"{len(different)} tensors differ between both processes, {different[0]} first: torch {torch.__version__} "
            f"here, torch {worker.info['versions']['torch']} there. Install the same torch in both."
        )
    return worker
