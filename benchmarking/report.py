"""Report of ``openvla bench``: a Markdown table printed row by row, the same as JSON, and a picture."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..configuration_openvla import write_json
from ..errors_openvla import OpenVLAImportError
from .reference import ACTION, REFERENCE

COLUMNS = [
    *("size", "dtype", "stage", "backend", "ms (quartiles)", "actions/s", "speedup", "roofline fraction", "CPU ms"),
    *("equal", "equal to float32", "questions with several answers", "GPU MB"),
]


@dataclass
class Measurement:
    """Latency of one backend in one stage, or the reason why there is none.

    Attributes:
        size: Model size, one of ``SIZES``.
        dtype: dtype of the model.
        stage: Part of the prediction that was measured.
        backend: Name of the backend.
        error: Why it could not be measured; then the other fields say nothing.
        seconds: Median wall time per call.
        quartiles: First and third quartile of the wall time in seconds.
        cpu_seconds: Median CPU time per call.
        warmup_seconds: Wall times of the first calls, which are not part of the medians.
        calls: Number of calls that the medians are of.
        actions_per_second: Actions per second of wall time, where the stage predicts whole actions.
        baseline: Backend that this one is compared with: the first of the stage.
        speedup: Median of the baseline's wall time divided by this backend's.
        equal: Number of results (tokens, or digests of arrays) that equal the baseline's.
        compared: Number of results that were compared.
        largest_difference: Largest difference from the baseline's continuous actions.
        equal_to_float32: Number of tokens that equal those in float32.
        several_answers: Number of questions (inputs) that got more than one answer.
        asked_again: Number of questions that were asked more than once.
        roofline_fraction: Roofline time divided by ``seconds``.
        gpu_bytes: Peak GPU memory of this process in bytes.
    """

    size: str
    dtype: str
    stage: str
    backend: str
    error: str | None = None
    seconds: float = 0.0
    quartiles: tuple[float, float] | None = None
    cpu_seconds: float | None = None
    warmup_seconds: list[float] | None = None
    calls: int | None = None
    actions_per_second: float | None = None
    baseline: str | None = None
    speedup: float | None = None
    equal: int | None = None
    compared: int | None = None
    largest_difference: float | None = None
    equal_to_float32: int | None = None
    several_answers: int | None = None
    asked_again: int | None = None
    roofline_fraction: float | None = None
    gpu_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that are not None."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    def to_row(self) -> str:
        """Return a row of the Markdown table."""
        row = [self.size, self.dtype, self.stage, self.backend]
        if self.error is not None:
            row += [f"not measured: {self.error}".replace("|", "/"), *[""] * (len(COLUMNS) - 5)]
            return f"| {' | '.join(row)} |"
        latency = f"{1e3 * self.seconds:.1f}"
        if self.quartiles is not None:
            latency += f" ({1e3 * self.quartiles[0]:.1f}-{1e3 * self.quartiles[1]:.1f})"
        equal = "" if self.equal is None else f"{self.equal} of {self.compared}"
        if self.largest_difference is not None:
            equal = f"within {self.largest_difference:.1e}"
        row += [
            latency,
            _formatted("{:.1f}", self.actions_per_second),
            _formatted("{:.2f}x", self.speedup),
            _formatted("{:.2f}", self.roofline_fraction),
            "" if self.cpu_seconds is None else f"{1e3 * self.cpu_seconds:.1f}",
            equal,
            "" if self.equal_to_float32 is None else f"{self.equal_to_float32} of {self.compared}",
            "" if not self.asked_again else f"{self.several_answers} of {self.asked_again}",
            "" if self.gpu_bytes is None else f"{self.gpu_bytes / 1e6:.0f}",
        ]
        return f"| {' | '.join(row)} |"


@dataclass
class Report:
    """Measurements of a run: each is printed, and written to the JSON file, as soon as it is added.

    Attributes:
        machine: Device, library versions and peak rates.
        file: JSON file; None for none.
        not_run: What the run leaves out, with the reason.
        measurements: Rows of the table.
        profiles: Kernels by time: size, dtype, backend and ``kernels``.
    """

    machine: dict[str, Any]
    file: Path | None = None
    not_run: list[str] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)
    profiles: list[dict[str, Any]] = field(default_factory=list)

    def print_header(self) -> None:
        """Print the machine and the head of the table."""
        print(", ".join(f"{name} {_format_value(value)}" for name, value in self.machine.items()))
        print(f"\n| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|", flush=True)

    def add(self, measurements: Sequence[Measurement]) -> None:
        """Print measurements as rows and write the JSON file."""
        for measurement in measurements:
            self.measurements.append(measurement)
            print(measurement.to_row(), flush=True)
        self.write()

    def write(self) -> None:
        """Write everything so far to the JSON file, if there is one."""
        if self.file is None:
            return
        measurements = [measurement.to_dict() for measurement in self.measurements]
        content = {"machine": self.machine, "measurements": measurements, "not_run": self.not_run}
        write_json(self.file, content | ({"profiles": self.profiles} if self.profiles else {}))

    def print_end(self) -> None:
        """Print what follows the table: kernels by time, and what was not run."""
        for profile in self.profiles:
            print(f"\n{profile['size']}, {profile['dtype']}, {ACTION}, {profile['backend']}: kernels by time\n")
            if "error" in profile:
                print(f"not measured: {profile['error']}")
                continue
            print("| ms | share | calls | kernel |\n|---|---|---|---|")
            for kernel in profile["kernels"]:
                name = kernel["name"][:120].replace("|", "/")
                print(f"| {kernel['ms']:.3f} | {kernel['share']:.1%} | {kernel['calls']} | {name} |")
        print()
        if REFERENCE in self.machine["versions"]:
            print(f"The {REFERENCE} ran with {_format_value(self.machine['versions'][REFERENCE])}.")
        for reason in self.not_run:
            print(f"Not run {reason}.", flush=True)

    def draw(self, picture: Path) -> None:
        """Draw the latencies of an action as bars, a panel per size and dtype, with the roofline time as a line."""
        figure_class = require_matplotlib()
        actions = [entry for entry in self.measurements if entry.stage == ACTION and entry.error is None]
        panels = list(dict.fromkeys((action.size, action.dtype) for action in actions))
        figure = figure_class(figsize=(9, 2.6 * max(len(panels), 1)), layout="constrained")
        for axes, panel in zip(figure.subplots(max(len(panels), 1), squeeze=False)[:, 0], panels):
            shown = [action for action in actions if (action.size, action.dtype) == panel]
            milliseconds = [1e3 * action.seconds for action in shown]
            spread = np.abs(1e3 * np.array([action.quartiles for action in shown]).T - milliseconds)
            axes.barh([action.backend for action in shown], milliseconds, xerr=spread, color="tab:blue")
            if shown[0].roofline_fraction is not None:
                axes.axvline(milliseconds[0] * shown[0].roofline_fraction, color="tab:red", label="roofline")
                axes.legend(loc="lower right")
            axes.invert_yaxis()
            axes.set(title=f"{ACTION}: {', '.join(panel)}", xlabel="ms")
        figure.savefig(picture)


def require_matplotlib() -> Any:
    """Return matplotlib's ``Figure``, or raise ImportError."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OpenVLAImportError('A picture needs matplotlib: pip install "openvla[plot]".') from error
    return Figure


def _formatted(template: str, value: float | None) -> str:
    return "" if value is None else template.format(value)


def _format_value(value: Any) -> str:
    if isinstance(value, Mapping):
        return json.dumps(value)
    return f"{value:.1f}" if isinstance(value, float) else str(value)
