"""Measure time and memory of converting a full-size (7.5 B) native checkpoint and back, compared with a plain copy.

    python benchmarks/convert_full.py WORK_DIR [--dtype bf16|fp32] [--repeat 3]

The weights are seeded noise, the tokenizer has Llama-2's size; every tensor is compared.
WORK_DIR needs 31 GB free for bf16, 62 GB for fp32, and is removed at the end. Anonymous memory excludes pages of mapped
files, which the system can reclaim.

Before each step all files are written to disk and, where permitted (root, on Linux), the page cache is emptied; the
table says so. Copies and conversions alternate, so that a disturbance affects both. The plain copy is cp, through the
cache, and sync; the other is dd past the cache (O_DIRECT), as fast as the disk allows. Python's bytecode is cached
beforehand, as pip does on installation; the time of the imports is reported separately.
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

from openvla.benchmarking.sizes import write_full
from openvla.configuration_openvla import write_json
from openvla.conversion.convert import DTYPES
from openvla.conversion.hub_folder import MANIFEST_FILE
from openvla.tiny import build_tokenizer


def emptied_cache() -> str:
    """Write all files to disk and empty the page cache; return "empty", or "as it was" where that is not permitted."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return "as it was"
    return "empty"


def measured(label: str, command: list[str], size: int) -> dict:
    """Run a command; return its seconds and its peak anonymous memory."""
    cache = emptied_cache()
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
        raise SystemExit(f"{label} failed: {' '.join(map(str, command))}")
    row = {"step": label, "bytes": size, "seconds": seconds, "cache": cache, "MB": peak / 1024}
    print(json.dumps({**row, "load": os.getloadavg()[0]}), flush=True)
    return row


def table(rows: list[dict]) -> str:
    """Return a line for each step: median and best of its runs."""
    lines = ["| step | runs | median s | best s | GB/s | page cache before | peak anonymous MB |", "|---" * 7 + "|"]
    for label in dict.fromkeys(row["step"] for row in rows):
        runs = [row for row in rows if row["step"] == label]
        seconds = [row["seconds"] for row in runs]
        median = statistics.median(seconds)
        cells = [label, len(runs), f"{median:.1f}", f"{min(seconds):.1f}", f"{runs[0]['bytes'] / median / 1e9:.2f}"]
        cells += [runs[0]["cache"], f"{max(row['MB'] for row in runs):.0f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    """Build, reverse, copy, convert, verify, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--repeat", type=int, default=3, help="of copies and conversions (default %(default)s)")
    args = parser.parse_args()
    args.work.mkdir(parents=True)
    try:
        hub, native, again = args.work / "hub", args.work / "native", args.work / "again"
        digests = write_full(hub, DTYPES[args.dtype])
        write_json(hub / "native_config.json", {"vla": {"base_vlm": "prism-dinosiglip-224px+7b"}})
        openvla = [sys.executable, "-m", "openvla"]
        size = sum(file.stat().st_size for file in hub.glob("*.safetensors"))
        measured("first imports, which cache bytecode", [*openvla, "--version"], 0)
        rows = [measured("imports alone", [*openvla, "--version"], 0) for _ in range(args.repeat)]
        rows += [measured("Hub folder to native (--reverse)", [*openvla, "convert", hub, native, "--reverse"], size)]
        tokenizer = args.work / "tokenizer"
        build_tokenizer(32000, "<PAD>").save_pretrained(tokenizer)
        shutil.rmtree(hub)
        source, copy = native / "checkpoints" / "latest-checkpoint.pt", args.work / "copy.pt"
        plain = f"cp '{source}' '{copy}' && sync '{copy}'"
        direct = f"dd if='{source}' of='{copy}' bs=16M iflag=direct oflag=direct conv=fsync status=none"
        convert = [*openvla, "convert", native, again, "--tokenizer", tokenizer, "--dtype", args.dtype]
        for _ in range(args.repeat):
            shutil.rmtree(again, ignore_errors=True)
            rows.append(measured("plain copy (cp, sync)", ["sh", "-c", plain], size))
            copy.unlink()
            rows.append(measured("copy past the cache (dd, O_DIRECT)", ["sh", "-c", direct], size))
            copy.unlink()
            rows.append(measured("native to Hub folder", convert, size))
        rows.append(measured("openvla verify", [*openvla, "verify", again], size))
        found = json.loads((again / MANIFEST_FILE).read_text())["tensors"]
        if found != digests:
            raise SystemExit("the tensors are not what they were")
        print(f"{len(found)} tensors equal after there and back, {size / 1e9:.2f} GB in {args.dtype}\n")
        print(table(rows))
    finally:
        shutil.rmtree(args.work, ignore_errors=True)


if __name__ == "__main__":
    main()
