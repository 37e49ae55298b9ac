"""Memory and latency of 8- and 4-bit weights, and agreement with unquantised ones; also quantised as by transformers.

    python benchmarks/quantization.py [--sizes tiny eighth full] [--inputs 200] [--rows whole torchao ...]

Sizes: "tiny", `openvla.tiny`'s; "eighth", OpenVLA-7B's depth at an eighth of its width; "full", its size. Weights
are random, so the agreement shows the numerical effect of quantisation, not the success of a trained policy; it is
measured in free-running greedy decoding among action tokens, where one different token changes all that follow. Each
configuration runs in a new process. Unquantised weights are bfloat16, computed as such where the hardware supports it,
elsewhere in float32, as ``load_policy`` does. "int8" is LLM.int8 of bitsandbytes, "torchao" is torchao's int8, on a
GPU with float8 products its float8. "everything, fp4" is BitsAndBytesConfig(load_in_4bit=True), the result of
the reference's load_in_4bit.

"full" needs a GPU with 24 GB and 20 GB of disk; without one it is reported as not run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from openvla import OpenVLAForActionPrediction, OpenVLAProcessor, quantization_config
from openvla.benchmarking.sizes import SIZES, sample_inputs, write_model
from openvla.compatibility_openvla import DTYPE_FIELD
from openvla.inference.quantization import fast_dtype
from transformers.utils.quantization_config import QuantizationConfigMixin

BATCH = 10
TIMED = 10
ROWS = ("whole", "int8", "torchao", "nf4", "nf4 + towers", "everything, fp4")


def quantization(row: str, device: str) -> QuantizationConfigMixin | None:
    """Return the quantization with which a configuration's model is loaded."""
    if row == "everything, fp4":
        return transformers.BitsAndBytesConfig(load_in_4bit=True)
    settings = {"int8": {"bits": 8}, "nf4": {"bits": 4}, "nf4 + towers": {"bits": 4, "towers": True}}
    settings["torchao"] = {"bits": 8, "backend": "torchao", "device": device}
    return quantization_config(**settings[row]) if row in settings else None


def inputs(processor: OpenVLAProcessor, count: int) -> list[dict]:
    """Return the benchmark's images and instructions as batches."""
    texts, images = sample_inputs(count)
    return [
        processor(instruction=texts[i : i + BATCH], images=images[i : i + BATCH], padding=True)
        for i in range(0, count, BATCH)
    ]


def held_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of weights and their scales, each storage once."""
    tensors = list(model.buffers())
    for parameter in model.parameters():
        inner = parameter.__tensor_flatten__()[0] if hasattr(parameter, "__tensor_flatten__") else None
        tensors += [parameter] if inner is None else [getattr(parameter, name) for name in inner]
    for module in model.modules():
        state, scale = getattr(getattr(module, "weight", None), "quant_state", None), getattr(module, "state", None)
        if state is not None:
            tensors += [state.absmax, *([state.state2.absmax] if state.nested else [])]
        if getattr(scale, "SCB", None) is not None:
            tensors += [scale.SCB, scale.CB]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if torch.is_tensor(t)}
    return sum(storages.values())


def resident_bytes(field: str) -> int:
    """Return VmRSS or VmHWM (the peak) of this process in bytes."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024


def measure(row: str, folder: str, count: int, device: str) -> dict:
    """Measure one configuration in this process."""
    transformers.utils.logging.disable_progress_bar()
    processor = OpenVLAProcessor.from_pretrained(folder)
    batches = inputs(processor, count)
    before = resident_bytes("VmRSS")
    started = time.perf_counter()
    keywords = {DTYPE_FIELD: fast_dtype(device), "device_map": {"": device}}
    model = OpenVLAForActionPrediction.from_pretrained(
        folder, quantization_config=quantization(row, device), **keywords
    ).eval()
    load_seconds, host_peak = time.perf_counter() - started, resident_bytes("VmHWM") - before
    tokens, seconds, cpu_seconds = [], [], []
    single = {name: value[:1] for name, value in batches[0].items()}
    for i in range(TIMED + 1):
        started, cpu_started = time.perf_counter(), time.process_time()
        model.predict_action(**single, constrain_actions=True)
        if i:  # the first one warms up
            seconds.append(time.perf_counter() - started)
            cpu_seconds.append(time.process_time() - cpu_started)
    on_gpu = device.startswith("cuda")
    at_rest = torch.cuda.memory_allocated() if on_gpu else held_bytes(model)
    for batch in batches:
        tokens += model.predict_action(**batch, constrain_actions=True, return_dict=True).token_ids.tolist()
    peak = torch.cuda.max_memory_allocated() if on_gpu else resident_bytes("VmHWM") - before
    result = {"at rest MB": at_rest / 1e6, "peak MB": peak / 1e6}
    result |= {"ms an action": 1000 * float(np.median(seconds)), "CPU ms": 1000 * float(np.median(cpu_seconds))}
    return result | {"load s": load_seconds, "host peak at load MB": host_peak / 1e6, "tokens": tokens}


def table(size: str, rows: Sequence[str], count: int, device: str, threads: int) -> None:
    """Measure configurations of a size, the unquantised one first, and print them."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        write_model(size, folder)
        results = {}
        for row in rows:
            command = [sys.executable, __file__, "--row", row, str(folder), "--inputs", str(count), "--device", device]
            command += ["--threads", str(threads)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{size}, {row}:\n{done.stderr[-3000:]}")
            results[row] = json.loads(done.stdout.splitlines()[-1])
    reference = np.array(results["whole"].pop("tokens"))
    print(f"\n{size}, {count} inputs, {device}, {threads} threads, computed in {fast_dtype(device)}\n")
    columns = ["weights", *results["whole"], "equal tokens %", "mean bin distance"]
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row, result in results.items():
        found = np.array(result.pop("tokens", reference))
        figures = [f"{value:.1f}" for value in result.values()]
        figures += [f"{100 * (found == reference).mean():.1f}", f"{np.abs(found - reference).mean():.2f}"]
        print("| " + " | ".join([row, *figures]) + " |", flush=True)


def main() -> None:
    """Measure all sizes, or one configuration for the parent process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=SIZES)
    parser.add_argument(
        "--rows", nargs="+", choices=ROWS, default=ROWS, help="configurations besides the unquantised one"
    )
    parser.add_argument("--inputs", type=int, default=200)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--row", nargs=2, metavar=("ROW", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        torch.set_num_threads(args.threads)
        print(json.dumps(measure(*args.row, args.inputs, args.device)))
        return
    versions = {name: __import__(name).__version__ for name in ("torch", "transformers", "bitsandbytes", "torchao")}
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    for size in args.sizes:
        if size == "full" and not args.device.startswith("cuda"):
            print("\nfull: not run (no GPU here)")
        else:
            table(size, list(dict.fromkeys(["whole", *args.rows])), args.inputs, args.device, args.threads)


if __name__ == "__main__":
    main()
