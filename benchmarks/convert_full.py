"""Measure time and memory of converting a full-size (7.5 B parameters) native checkpoint and back, and of a plain copy.

    python benchmarks/convert_full.py WORK_DIR [--dtype bf16|fp32] [--repeat 3]

The weights are seeded noise, the tokenizer is a stand-in of Llama-2's size; every tensor is compared.
WORK_DIR needs 31 GB free for bf16, 62 GB for fp32, and is removed at the end. The memory measured is anonymous memory;
pages of mapped files are not counted, since the system evicts them when it needs memory.

Before each step all data is written to disk and, where the user may (root, on Linux), the page cache is emptied; the
table shows whether. Copies and conversions alternate, so that other load on the machine affects both. One copy is cp
through the page cache, and sync; the other is dd past the page cache (O_DIRECT), as fast as the disk allows. Python's
bytecode is cached beforehand, as pip's installation leaves it; the imports alone are a step of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from openvla.benchmarking.sizes import write_model
from openvla.configuration_openvla import write_json
from openvla.conversion.hub_folder import MANIFEST_FILE
from openvla.conversion.options import DTYPES
from openvla.tiny import build_tokenizer


def empty_page_cache() -> str:
    """Write everything to disk and empty the page cache; return the state of the page cache."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return "as it was"
    return "empty"


def measure(step: str, command: list[str | Path], size: int) -> dict[str, Any]:
    """Run a command that reads ``size`` bytes; return its seconds and its peak of anonymous memory in MB."""
    cache = empty_page_cache()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    started, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = max(peak, int(status.split("RssAnon:")[1].split()[0]))
        except (FileNotFoundError, IndexError, ProcessLookupError):
            pass
        time.sleep(0.02)
    seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{step} failed: {' '.join(map(str, command))}")
    result = {"step": step, "bytes": size, "seconds": seconds, "cache": cache, "MB": peak / 1024}
    print(json.dumps({**result, "load": os.getloadavg()[0]}), flush=True)
    return result


def table(results: list[dict[str, Any]]) -> str:
    """Return a Markdown table with the median and the best run of each step."""
    lines = ["| step | runs | median s | best s | GB/s | page cache before | peak anonymous MB |", "|---" * 7 + "|"]
    for step in dict.fromkeys(result["step"] for result in results):
        runs = [result for result in results if result["step"] == step]
        seconds = [run["seconds"] for run in runs]
        median = statistics.median(seconds)
        cells = [step, len(runs), f"{median:.1f}", f"{min(seconds):.1f}", f"{runs[0]['bytes'] / median / 1e9:.2f}"]
        cells += [runs[0]["cache"], f"{max(run['MB'] for run in runs):.0f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    """Write a Hub folder, convert it to the native layout and back, measure, and compare the tensors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--repeat", type=int, default=3, help="runs of every copy and conversion (default %(default)s)")
    args = parser.parse_args()
    args.work.mkdir(parents=True)
    try:
        hub, native, again = args.work / "hub", args.work / "native", args.work / "again"
        digests = write_model("full", hub, DTYPES[args.dtype])
        write_json(hub / "native_config.json", {"vla": {"base_vlm": "prism-dinosiglip-224px+7b"}})
        openvla = [sys.executable, "-m", "openvla"]
        size = sum(file.stat().st_size for file in hub.glob("*.safetensors"))
        measure("first imports, which cache bytecode", [*openvla, "--version"], 0)
        results = [measure("imports alone", [*openvla, "--version"], 0) for _ in range(args.repeat)]
        results += [measure("Hub folder to native (--reverse)", [*openvla, "convert", hub, native, "--reverse"], size)]
        tokenizer = args.work / "tokenizer"
        build_tokenizer(32000, "<PAD>").save_pretrained(tokenizer)
        shutil.rmtree(hub)
        source, copy = native / "checkpoints" / "latest-checkpoint.pt", args.work / "copy.pt"
        plain = f"cp '{source}' '{copy}' && sync '{copy}'"
        direct = f"dd if='{source}' of='{copy}' bs=16M iflag=direct oflag=direct conv=fsync status=none"
        convert = [*openvla, "convert", native, again, "--tokenizer", tokenizer, "--dtype", args.dtype]
        for _ in range(args.repeat):
            shutil.rmtree(again, ignore_errors=True)
            results.append(measure("plain copy (cp, sync)", ["sh", "-c", plain], size))
            copy.unlink()
            results.append(measure("copy past the cache (dd, O_DIRECT)", ["sh", "-c", direct], size))
            copy.unlink()
            results.append(measure("native to Hub folder", convert, size))
        results.append(measure("openvla verify", [*openvla, "verify", again], size))
        converted = json.loads((again / MANIFEST_FILE).read_text())["tensors"]
        if converted != digests:
            raise SystemExit("the tensors changed in the two conversions")
        print(f"{len(converted)} tensors equal after both conversions, {size / 1e9:.2f} GB in {args.dtype}\n")
        print(table(results))
    finally:
        shutil.rmtree(args.work, ignore_errors=True)


if __name__ == "__main__":
    main()
