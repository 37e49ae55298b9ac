"""Start-up times of the command and of imports, each in new processes.

    python benchmarks/startup.py [--repeats 20] [--json startup.json]

All cases run in turn, after a first round that fills the file cache and is not counted; medians and quartiles of wall
and CPU time are printed. The yardsticks are an empty Python process, and the import of torch and transformers.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from openvla.configuration_openvla import write_json
from tqdm import tqdm

COMMAND = str(Path(sys.executable).with_name("openvla"))
CASES = {
    'python -c "pass"': [sys.executable, "-c", "pass"],
    'python -c "import transformers, torch"': [sys.executable, "-c", "import transformers, torch"],
    "openvla --version": [COMMAND, "--version"],
    "openvla --help": [COMMAND, "--help"],
    "import openvla": [sys.executable, "-c", "import openvla"],
    "from openvla import PolicyClient": [sys.executable, "-c", "from openvla import PolicyClient"],
    "from openvla import load_policy": [sys.executable, "-c", "from openvla import load_policy"],
}


@dataclass
class StartupTimes:
    """Times of the processes of one case, in seconds."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def measure(self, command: list[str]) -> None:
        """Run the command once and add its times."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        self.wall.append(time.perf_counter() - started)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.cpu.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)

    def summarize(self) -> dict[str, Any]:
        """Return medians and quartiles."""
        low, high = np.quantile(self.wall, [0.25, 0.75])
        return {
            "seconds": float(np.median(self.wall)),
            "quartiles": [float(low), float(high)],
            "cpu_seconds": float(np.median(self.cpu)),
            "processes": len(self.wall),
        }


def describe_machine() -> dict[str, Any]:
    """Return the processor, the load, and the versions."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    versions = {"python": platform.python_version()}
    versions |= {package: importlib.metadata.version(package) for package in ("openvla", "torch", "transformers")}
    return {
        "device": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "versions": versions,
    }


def format_table(measurements: list[dict[str, Any]]) -> str:
    """Return the measurements as a Markdown table."""
    lines = ["| process | ms (quartiles) | CPU ms |", "|---|---|---|"]
    for measurement in measurements:
        low, high = (1e3 * quartile for quartile in measurement["quartiles"])
        lines.append(
            f"| `{measurement['case']}` | {1e3 * measurement['seconds']:.0f} ({low:.0f}-{high:.0f}) "
            f"| {1e3 * measurement['cpu_seconds']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure all cases in turn and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20, help="processes per case")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements")
    args = parser.parse_args()
    machine = describe_machine()
    times = {case: StartupTimes() for case in CASES}
    for repeat in tqdm(range(-1, args.repeats), desc="start-up", unit="repeat"):
        for case, command in CASES.items():
            (StartupTimes() if repeat < 0 else times[case]).measure(command)
    measurements = [{"case": case, **case_times.summarize()} for case, case_times in times.items()]
    print(f"{machine}, medians of {args.repeats} processes\n\n{format_table(measurements)}")
    if args.json:
        write_json(args.json, {"machine": machine, "measurements": measurements})


if __name__ == "__main__":
    main()
