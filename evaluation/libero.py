"""Closed-loop evaluation of a policy in the LIBERO simulator, through Ai2's vla-eval harness.

The policy stays in this process and serves actions over loopback; the harness runs simulators in worker processes and
keeps its work queue and results in a database, so that an interrupted evaluation can continue.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import logging
import multiprocessing
import multiprocessing.connection
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from ..configuration_openvla import write_json
from ..data.utils import read_json
from ..errors_openvla import OpenVLAImportError, OpenVLAValueError
from ..inference.policy import Policy
from .checks import require_libero_policy, resolve_image_preset, statistics_warnings, weights_digest
from .harness_database import EVAL_ID, database_path, read_episodes, requeue_unfinished
from .report import draw_contact_sheet, package_versions, success_rate
from .simulator import INSTALL, INSTRUCTION_SOURCES, choose_renderer, instruction_source, open_suite, parse_tasks

if TYPE_CHECKING:
    from .remote_policy import RemotePolicy  # which needs packages of the extra

logger = logging.getLogger(__name__)

DEFAULT_SUITE = "libero_object"
# openvla-mini renders frames of the model's size; the harness's default is 256.
CAMERAS_OF_PRESETS: dict[str, dict[str, int]] = {"minivla-libero": {"camera_size": 224}}
FAILURE_POLL_S = 0.5
ACTION_TIMEOUT_S = 1800.0  # a 7B model on a CPU takes minutes per action


@dataclass(frozen=True)
class EvaluationSettings:
    """Everything that an evaluation's results depend on; the fields of settings.json.

    Attributes:
        model: Name of the policy; the URL of a server.
        weights_digest: Digest of its weights; None for a server of another kind than ``openvla serve``, which says
            nothing of its model, as in the next three.
        unnorm_key: Dataset whose statistics un-normalise its actions.
        image_preset: Preprocessing of the frames, a key of ``IMAGE_PRESETS``.
        constrain_actions: Whether only action tokens are decoded.
        actions: "all" actions of a chunk, or the "first" one alone.
        history_padding: What fills the first steps of an episode, see ``ImageHistory``.
        suite: LIBERO task suite.
        instruction_source: Source of the instructions, one of ``INSTRUCTION_SOURCES``.
        tasks: Task numbers.
        episodes: Episodes per task.
        first_initial_state: Initial state of the first episode of every task.
        max_steps: Control steps after which an episode fails; None is the suite's limit.
        n_action_steps: Actions of a chunk to execute before the next chunk is predicted; None is all.
        seed: Seed of the simulator and of the policy.
        server: For a policy on a server: digest of its metadata, and what it takes and answers; None for a ``Policy``.
    """

    model: str
    weights_digest: str | None
    unnorm_key: str | None
    image_preset: str | None
    constrain_actions: bool | None
    actions: str | None
    history_padding: str | None
    suite: str
    instruction_source: str
    tasks: list[int]
    episodes: int
    first_initial_state: int
    max_steps: int | None
    n_action_steps: int | None
    seed: int
    server: dict[str, Any] | None = None

    @property
    def num_episodes(self) -> int:
        """Return the number of episodes of all tasks."""
        return self.episodes * len(self.tasks)


def evaluate_libero(
    policy: Policy | RemotePolicy,
    *,
    output: Path,
    name: str = "policy",
    suite: str = DEFAULT_SUITE,
    tasks: Sequence[str | int] | None = None,
    episodes: int = 50,
    first_initial_state: int = 0,
    max_steps: int | None = None,
    workers: int = 1,
    seed: int = 0,
    image_preset: str | None = None,
    n_action_steps: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Evaluate a policy in closed loop, or continue an evaluation with the same settings.

    Args:
        policy: Policy with OpenVLA's gripper convention, 0 closed to 1 open; or one on a server of openpi's protocol.
        output: Folder to write.
        name: Name of the policy in the report.
        suite: A suite of LIBERO, or of LIBERO-PRO, whose instructions are those of its BDDL files
            (``simulator.instruction_source``).
        tasks: Task numbers, instructions or parts of them; None is all.
        episodes: Episodes per task; each starts from another initial state.
        first_initial_state: Initial state of the first episode.
        max_steps: Control steps (20 Hz) after which an episode fails; None is the suite's limit.
        workers: Number of simulator processes. They share the policy, which predicts one action at a time. With more
            than one, the random draws of a diffusion head depend on the order of requests.
        seed: Seed of the simulator and of the random draws of a ``Policy``.
        image_preset: A key of ``IMAGE_PRESETS``; None is the processor's, or "libero". Not for a ``RemotePolicy``.
        n_action_steps: Actions of a chunk to execute before the next chunk is predicted; None is all. Not for a
            ``RemotePolicy``, whose convention has it.
        progress: Show a progress bar.

    Returns:
        The content of results.json.

    Raises:
        ImportError: The simulator, its renderer or the harness is not installed.
        ConnectionError: The server of a ``RemotePolicy`` died; its finished episodes are kept.
        ValueError: A setting is out of range, the policy does not fit the robot, ``output`` holds another evaluation,
            or episodes failed to run.
    """
    require_harness()
    opened_suite = open_suite(suite)
    task_ids = parse_tasks(tasks, opened_suite)
    if not isinstance(policy, Policy) and (image_preset is not None or n_action_steps is not None):
        raise OpenVLAValueError("image_preset and n_action_steps belong to the convention of a policy on a server.")
    _validate_settings(
        episodes=episodes,
        first_initial_state=first_initial_state,
        num_initial_states=min(len(opened_suite.get_task_init_states(task_id)) for task_id in task_ids),
        max_steps=max_steps,
        workers=workers,
        n_action_steps=n_action_steps,
        chunk_length=policy.model.config.chunk_length if isinstance(policy, Policy) and policy.actions == "all" else 1,
    )
    if isinstance(policy, Policy):
        description = _describe_policy(policy, name, image_preset, n_action_steps)
    else:
        description = policy.describe()
    warnings = description.pop("warnings")
    for warning in warnings:
        logger.warning(warning)
    settings = EvaluationSettings(
        **description,
        suite=suite,
        instruction_source=instruction_source(suite),
        tasks=task_ids,
        episodes=episodes,
        first_initial_state=first_initial_state,
        max_steps=max_steps,
        seed=seed,
    )
    output = Path(output)
    _prepare_output(output, settings)
    warnings += _run_episodes(policy, settings, output, workers, progress)
    return _write_results(output, settings, opened_suite, warnings)


def require_harness() -> Any:
    """Return the module of the policy server and the benchmark for vla-eval.

    Raises:
        ImportError: vla-eval or an off-screen renderer is not installed; the message says how to install it.
    """
    if importlib.util.find_spec("vla_eval") is None:
        raise OpenVLAImportError(f"openvla evaluate needs the harness vla-eval: {INSTALL}")
    choose_renderer()  # otherwise importing the harness would choose EGL
    try:
        return importlib.import_module(".vla_eval", __package__)
    except ModuleNotFoundError as error:
        raise OpenVLAImportError(f"openvla evaluate needs the harness (no module {error.name}): {INSTALL}") from error


def _validate_settings(
    *,
    episodes: int,
    first_initial_state: int,
    num_initial_states: int,
    max_steps: int | None,
    workers: int,
    n_action_steps: int | None,
    chunk_length: int,
) -> None:
    for option, value in (("episodes", episodes), ("workers", workers), ("max-steps", max_steps)):
        if value is not None and value < 1:
            raise OpenVLAValueError(f"--{option} must be 1 or more, got {value}.")
    last_initial_state = first_initial_state + episodes - 1
    if not 0 <= first_initial_state < num_initial_states or last_initial_state >= num_initial_states:
        raise OpenVLAValueError(
            f"A task has the initial states 0 to {num_initial_states - 1}; {episodes} episodes from "
            f"{first_initial_state} on would need up to {last_initial_state}."
        )
    if n_action_steps is not None and not 1 <= n_action_steps <= chunk_length:
        raise OpenVLAValueError(
            f"--n-action-steps must be 1 to {chunk_length}, the number of predicted actions, got {n_action_steps}."
        )


def _describe_policy(policy: Policy, name: str, image_preset: str | None, n_action_steps: int | None) -> dict[str, Any]:
    """Return the fields of ``EvaluationSettings`` that a policy in this process has, and warnings.

    Raises:
        ValueError: The policy is one of another robot.
    """
    require_libero_policy(policy)
    return {
        "model": name,
        "weights_digest": weights_digest(policy.model),
        "unnorm_key": policy.unnorm_key,
        "image_preset": resolve_image_preset(policy, image_preset),
        "constrain_actions": policy.constrain_actions,
        "actions": policy.actions,
        "history_padding": policy.history_padding,
        "n_action_steps": n_action_steps,
        "warnings": statistics_warnings(policy),
    }


def _prepare_output(output: Path, settings: EvaluationSettings) -> None:
    """Write settings.json, or compare it with the settings of an evaluation that was begun in this folder."""
    file = output / "settings.json"
    current = dataclasses.asdict(settings)
    if not database_path(output).is_file():
        output.mkdir(parents=True, exist_ok=True)
        write_json(file, current)
        return
    # The values of evaluations that were begun before these settings existed.
    former = {"instruction_source": INSTRUCTION_SOURCES[0], "actions": "all", "history_padding": "start"}
    previous = {**former, **read_json(file)}
    changed = [
        f"{key} {previous.get(key)!r} -> {value!r}" for key, value in current.items() if previous.get(key) != value
    ]
    if changed:
        raise OpenVLAValueError(
            f"{output} holds another evaluation ({'; '.join(changed)}); take another --output, or remove the folder."
        )


def _run_episodes(
    policy: Policy | RemotePolicy, settings: EvaluationSettings, output: Path, workers: int, progress: bool
) -> list[str]:
    """Run the episodes that are not done yet, with the image preset of the settings; return warnings."""
    total, done = settings.num_episodes, requeue_unfinished(output)
    torch.manual_seed(settings.seed)
    if done >= total:
        return []
    harness, successes = require_harness(), []
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(total=total, initial=done, desc=settings.suite, unit="episode", disable=not progress)
        )

        def update_progress(result: Mapping[str, Any]) -> None:
            successes.append(bool(result["metrics"]["success"]))
            bar.update()
            bar.set_postfix_str(f"{sum(successes)} of {len(successes)} succeeded")

        if isinstance(policy, Policy):
            stack.callback(setattr, policy.processor, "image_preset", policy.processor.image_preset)
            policy.processor.image_preset = settings.image_preset
            server = harness.PolicyServer(
                policy, n_action_steps=settings.n_action_steps, report_episode_result=update_progress
            )
        else:
            server = harness.RemotePolicyServer(policy, report_episode_result=update_progress)
        _run_workers(server, settings, output, min(workers, total - done))
    for warning in (warnings := server.warnings()):
        logger.warning(warning)
    return warnings


def _run_workers(server: Any, settings: EvaluationSettings, output: Path, workers: int) -> None:
    """Serve the policy over loopback while the harness runs simulators in worker processes; raise its failure."""
    api, harness = importlib.import_module("vla_eval.api"), require_harness()
    context = multiprocessing.get_context("spawn")  # a renderer does not survive a fork
    with api.serve_background(server) as handle:
        config = _harness_config(settings, output, handle.url)
        processes = [
            context.Process(
                target=harness.run_worker,
                kwargs={
                    "config": config,
                    "eval_id": EVAL_ID,
                    "worker": worker,
                    "num_workers": workers,
                    "log_file": output / f"worker-{worker}.log",
                },
                daemon=True,
            )
            for worker in range(workers)
        ]
        try:
            for process in processes:
                process.start()
            while server.failure is None and (running := [process for process in processes if process.is_alive()]):
                multiprocessing.connection.wait([process.sentinel for process in running], FAILURE_POLL_S)
        finally:
            for process in processes:
                if process.is_alive():
                    process.terminate()
    if server.failure is not None:
        logger.error("Finished episodes are kept in %s; the same command runs the others.", output)
        raise server.failure


def _harness_config(settings: EvaluationSettings, output: Path, server_url: str) -> dict[str, Any]:
    """Return the configuration that vla-eval otherwise reads from a YAML file."""
    benchmark = {
        "benchmark": f"{__package__}.vla_eval:LiberoSuite",
        "name": EVAL_ID,
        "episodes_per_task": settings.episodes,
        "params": {
            "suite": settings.suite,
            "task_ids": settings.tasks,
            "first_initial_state": settings.first_initial_state,
            "seed": settings.seed,
            "env_seed": settings.seed,
            "max_steps": settings.max_steps,
            **CAMERAS_OF_PRESETS.get(settings.image_preset or "", {}),
        },
        "recording": {
            "record_video": True,
            "record_step": False,
            "output_dir": str(output.resolve() / "episodes"),
            "filename_stem": "task{task_id:02d}_episode{episode_id:03d}_{status}",
        },
    }
    return {
        "output_dir": str(output.resolve()),
        "render": "cpu" if choose_renderer() == "osmesa" else "gpu",  # the harness's names for OSMesa and EGL
        "benchmarks": [benchmark],
        "server": {"url": server_url, "timeout": ACTION_TIMEOUT_S},
    }


def _max_episode_steps(settings: EvaluationSettings) -> int:
    """Return the number of steps after which the harness ends an episode."""
    suite = require_harness().LiberoSuite(settings.suite, settings.tasks, max_steps=settings.max_steps)
    return suite.get_metadata()["max_steps"]


def _write_results(output: Path, settings: EvaluationSettings, suite: Any, warnings: list[str]) -> dict[str, Any]:
    """Read the episodes from the harness's database, write results.json and the contact sheet, return the results."""
    episodes = read_episodes(output, settings.tasks, settings.first_initial_state)
    if not episodes:
        raise OpenVLAValueError(f"No episode could be run; the reason is in {output / 'worker-0.log'}.")
    errors = [episode for episode in episodes if episode["error"]]
    results = []
    for task_id in settings.tasks:
        runs = [episode for episode in episodes if episode["task"] == task_id]
        results.append(
            {"task": task_id, "instruction": suite.get_task(task_id).language, **success_rate(runs), "runs": runs}
        )
    report = {
        **dataclasses.asdict(settings),
        "max_steps": _max_episode_steps(settings),
        "warnings": warnings,
        "complete": len(episodes) - len(errors) == settings.num_episodes,
        "errors": len(errors),
        "no_action": sum(episode["no_action"] is not None for episode in episodes),
        **success_rate(episodes),
        "interval": "95 %, Wilson score",
        "versions": package_versions(),
        "results": results,
    }
    write_json(output / "results.json", report)
    draw_contact_sheet(output, results, output / "contact_sheet.png")
    if errors:
        raise OpenVLAValueError(
            f"{len(errors)} of {settings.num_episodes} episodes ended in an error, the first: {errors[0]['error']} "
            f"Its log is in {output}; run the same command again for these alone."
        )
    if not report["complete"]:
        raise OpenVLAValueError(
            f"Only {len(episodes)} of {settings.num_episodes} episodes ran; run the same command again. Logs: {output}."
        )
    return report
