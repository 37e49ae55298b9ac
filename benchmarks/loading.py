"""Time and memory of loading a model, compared with the published code, each time in a new process.

    python benchmarks/loading.py [--sizes eighth full] [--rounds 5] [--reference DIR --reference-python PY]

"eighth" is OpenVLA-7B's depth at an eighth of its width, "full" its size (15 GB of disk, and of memory on a CPU). The
folder is in the system's cache, as far as it fits. "host peak" is the increase of the process's anonymous memory
(RssAnon, sampled every few milliseconds), so mapped files do not count. "weights equal" compares digests of about forty
evenly chosen weights. With --device cuda the model is loaded directly onto the GPU; the published code is loaded as its
README says, and then moved.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
REFERENCE_SCRIPT = HERE.parent / "benchmarking/reference.py"
SEEN_EVERY = 0.002  # s
DIGESTED = 40  # weights, evenly chosen


def held() -> int:
    """Return the anonymous memory of this process in bytes."""
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024


def watched(work: Callable[[], Any]) -> tuple[Any, float, int]:
    """Call ``work``; return its result, its seconds and the peak increase of memory."""
    before, most, done = held(), [0], threading.Event()

    def look() -> None:
        while not done.wait(SEEN_EVERY):
            most[0] = max(most[0], held())

    watcher = threading.Thread(target=look)
    watcher.start()
    started = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    return result, seconds, max(most[0], held()) - before


def digests(model: torch.nn.Module) -> dict[str, str]:
    """Return digests of some weights, by name."""
    weights = sorted(model.state_dict().items())
    some = weights[:: max(1, len(weights) // DIGESTED)]
    return {
        name: hashlib.sha256(value.cpu().contiguous().view(torch.uint8).numpy()).hexdigest() for name, value in some
    }


def worker(args: argparse.Namespace) -> None:
    """Load once in this process and print one line of JSON."""
    torch.set_num_threads(args.threads)
    if args.worker == "openvla":
        from openvla import OpenVLAForActionPrediction
        from openvla.compatibility_openvla import DTYPE_FIELD

        placed = {} if args.device == "cpu" else {"device_map": {"": args.device}}

        def load() -> torch.nn.Module:
            return OpenVLAForActionPrediction.from_pretrained(args.folder, **{DTYPE_FIELD: torch.bfloat16}, **placed)
    else:
        specification = importlib.util.spec_from_file_location("benchmark_reference", REFERENCE_SCRIPT)
        reference = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(reference)
        reference.import_reference(args.reference)  # as this package is, before the clock runs

        def load() -> torch.nn.Module:
            return reference.load_reference(args.reference, args.folder, "bfloat16", args.device)[0]

    model, seconds, peak = watched(load)
    print("LOADED " + json.dumps({"seconds": seconds, "peak": peak, "digests": digests(model)}))


def loading(side: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Load once in a new process and return its report."""
    python = sys.executable if side == "openvla" else args.reference_python
    command = [python, __file__, "--worker", side, "--folder", folder, "--device", args.device]
    command += ["--threads", args.threads, *(["--reference", args.reference] if args.reference else [])]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{side}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.split("LOADED ")[1])


def main() -> int:
    """Measure and print; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=("eighth", "full"), default=["eighth"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--reference", type=Path, metavar="DIR", help="the published remote code")
    parser.add_argument("--reference-python", metavar="PY", help="its Python, as of openvla bench")
    parser.add_argument("--worker", choices=("openvla", "reference"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return 0
    from openvla.benchmarking.sizes import write_model
    from tqdm.auto import tqdm

    sides = ["openvla", *(["reference"] if args.reference else [])]
    print("| size | side | s | ratio | host peak MB | ratio | weights equal |\n|---|---|---|---|---|---|---|")
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as place:
            write_model(size, Path(place) / "model")
            seen: dict[str, list] = {side: [] for side in sides}
            for _ in tqdm(range(args.rounds), desc=size, unit="round"):
                for side in sides:
                    seen[side].append(loading(side, Path(place) / "model", args))
        medians = {
            side: tuple(statistics.median(one[field] for one in loadings) for field in ("seconds", "peak"))
            for side, loadings in seen.items()
        }
        theirs = medians[sides[-1]]
        for side, (seconds, peak) in medians.items():
            ours, other = (seen[name][0]["digests"] for name in (side, sides[-1]))
            both = ours.keys() & other.keys()
            equal = f"{sum(ours[name] == other[name] for name in both)} of {len(both)}"
            ratios = f"{seconds / theirs[0]:.2f}x", f"{peak / theirs[1]:.2f}x"
            print(f"| {size} | {side} | {seconds:.2f} | {ratios[0]} | {peak / 1e6:.0f} | {ratios[1]} | {equal} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
