"""Tiny OpenVLA and OpenVLA-OFT policies from scratch: demonstrations, training, evaluation in the simulator.

    pip install '.[libero,train]' && apt-get install -y libegl1 libgl1-mesa-dri libosmesa6
    python examples/train_tiny.py runs/train-tiny        # or: make train-tiny

Two tasks of LIBERO-Object, 100 scripted demonstrations each from the initial states 0 to 24; evaluated on 25 to 49,
with which no demonstration begins. A first training uses 70 of each; the other 30 begin with actions of that first
policy and show the recovery from its mistakes. A second training uses all of them. From its result both policies are
trained for as many steps again, with frozen vision towers. All seeds are fixed. An interrupted run continues. Output:
  demos/            the demonstrations, and demos.png to look at
  base/             the model before training
  first/, second/   the first two trainings
  openvla/, oft/    the two policies; packed/ is the result in bfloat16, which is shipped and evaluated
  judged/           success, videos and a contact sheet of both
  results.json      the numbers of the table at the end, and the seconds of every part
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from openvla.configuration_openvla import write_json
from openvla.data.utils import read_json
from openvla.training.config import read_yaml

HERE = Path(__file__).parent
DATASET = "libero_object_no_noops"  # the preset of columns and gripper goes by this name
TASKS = ("0", "7")
HELD_OUT, STATES = 25, 50  # initial states from the first on are never demonstrated; a task has so many
TRAININGS = {  # what each begins with, its configuration, and the fields in which it departs from that
    "first": ("base", "tiny_libero.yaml", {"max_steps": 1500}),
    "second": ("first", "tiny_libero.yaml", {}),
    "openvla": ("second", "tiny_libero.yaml", {"method": "frozen-vision", "max_steps": 1500}),
    "oft": ("second", "tiny_libero_oft.yaml", {}),
}
JUDGED = ("openvla", "oft")
BEFORE_THE_FIRST = 0.7  # of the demonstrations are collected before the first training
BATCH_SIZE = 32  # of all processes


def parts(args: argparse.Namespace) -> dict[str, list[str | Path]]:
    """Return the commands by their outputs."""
    out, python = args.out, sys.executable
    demos, openvla, workers = out / "demos" / DATASET, [python, "-m", "openvla"], str(args.workers)
    processes = next(count for count in (8, 4, 2, 1) if count <= args.workers)  # whole numbers of steps for each
    launch = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    collect = [python, HERE / "collect_libero.py", demos, "--tasks", *TASKS, "--workers", workers]
    collect += ["--initial-states", "0", str(HELD_OUT), "--cameras", "agentview"]
    first, all_of_them = str(round(args.episodes * BEFORE_THE_FIRST)), str(args.episodes)
    corrections = [*collect, "--episodes", all_of_them, "--policy", out / "first" / "packed"]
    look = [*openvla, "inspect-data", demos, "--fields", "{cameras: [observation.image]}", "--out", out / "demos.png"]
    done = {
        "demonstrations": [*collect, "--episodes", first],
        "model before training": [python, HERE / "tiny_libero.py", demos, out / "base"],
    }
    models = {"base": out / "base"} | {name: out / name / "model" for name in TRAININGS}
    for name, (start, _, _) in TRAININGS.items():
        packed = out / name / "packed"
        run = ["--model", models[start], "--output-dir", out / name]
        run += ["--per-device-train-batch-size", str(BATCH_SIZE // processes)]
        run += ["--max-steps", str(args.steps)] if args.steps else []
        done[f"training {name}"] = [*launch, "-m", "openvla", "finetune", out / f"{name}.yaml", *run]
        done[f"packing {name}"] = [*openvla, "convert", models[name], packed, "--dtype", "bf16"]
        if name in JUDGED:
            held_out = ["--tasks", *TASKS, "--episodes", str(args.judged), "--first-initial-state", str(HELD_OUT)]
            judge = [*openvla, "evaluate", "--model", packed, "--dtype", "float32", "--constrain-actions", *held_out]
            done[f"judging {name}"] = [*judge, "--workers", workers, "--output", out / "judged" / name]
        if name == "first":
            done |= {"corrections of its mistakes": corrections, "picture of the demonstrations": look}
    return done


def write_runs(args: argparse.Namespace) -> None:
    """Write the configurations of the trainings with the path of the demonstrations."""
    for name, (_, file, departures) in TRAININGS.items():
        config = read_yaml(HERE / file) | departures
        config["data"][0]["path"] = str(args.out / "demos" / DATASET)
        write_json(args.out / f"{name}.yaml", config)  # JSON is YAML


def table(out: Path, seconds: dict[str, float]) -> str:
    """Return the table of results."""
    lines = ["| policy | task | success | 95 % interval |", "|---|---|---|---|"]
    for name in JUDGED:
        report = read_json(out / "judged" / name / "results.json")
        for row in (*report["results"], {**report, "instruction": "all"}):
            low, high = row["success_interval"]
            lines.append(
                f"| {name} | {row['instruction']} | {row['successes']}/{row['evaluated']} | {low:.0%} to {high:.0%} |"
            )
    lines += ["", "| part | minutes |", "|---|---|"]
    lines += [f"| {part} | {spent / 60:.1f} |" for part, spent in seconds.items()]
    return "\n".join(lines)


def main() -> int:
    """Run the steps that are not done yet; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="DIR")
    parser.add_argument("--episodes", type=int, default=100, help="demonstrations a task; default 100")
    parser.add_argument("--steps", type=int, help="of each training; default as their files say")
    parser.add_argument("--judged", type=int, default=STATES - HELD_OUT, help="episodes a task and policy; default 25")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="simulators at a time")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    record = args.out / "results.json"
    known = read_json(record) if record.is_file() else {"cores": os.cpu_count(), "parts": {}}
    write_runs(args)
    for part, command in parts(args).items():
        if known["parts"].get(part, {}).get("done"):
            continue
        print(f"--- {part}", flush=True)
        started = time.perf_counter()
        status = subprocess.run(command).returncode
        before = known["parts"].get(part, {}).get("seconds", 0.0)
        known["parts"][part] = {"done": status == 0, "seconds": before + time.perf_counter() - started}
        write_json(record, known)
        if status:
            print(f"{part} ended with status {status}; the same command goes on from here.", file=sys.stderr)
            return status
    print(table(args.out, {part: entry["seconds"] for part, entry in known["parts"].items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
