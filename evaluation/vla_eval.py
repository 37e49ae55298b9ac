"""Both ends of Ai2's vla-eval harness: a policy as one of its model servers, and its LIBERO benchmark.

Imported where an evaluation runs, never before: vla-eval comes with the extra ``libero``.
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

from ..inference.action_queue import ActionQueue
from ..inference.policy import Policy
from ..inference.robot_conventions import convert_action
from .simulator import make_environment, open_suite

CAMERAS = {"agentview": "agentview", "wrist": "robot0_eye_in_hand"}  # the harness's names, the simulator's


def episode_steps(suite: str) -> int | None:
    """Return after how many steps an episode of a suite has failed: 520 in ``libero_10`` and in ``libero_10_lan``.

    The harness knows the plain suites alone; None stands for the number that it takes for every other (300).
    """
    bases = [name for name in MAX_STEP_MAPPING if suite == name or suite.startswith(f"{name}_")]
    return MAX_STEP_MAPPING[bases[0]] if bases else None


class PolicyServer(PredictModelServer):
    """A policy as a model server of vla-eval; chunks are played action by action, for each connection its own.

    Args:
        policy: What acts; its processor's image preset is for upright frames, which the harness sends.
        steps: Actions played of a chunk before the next is asked for; None plays all of it.
    XX
        finished: Called with the harness's result whenever an episode ends.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        steps: int | None = None,
        blend: float | None = None,
        finished: Callable[[Mapping[str, Any]], None] = lambda result: None,
    ) -> None:
        super().__init__()
        self.policy, self.steps, self.blend, self.finished = policy, steps, blend, finished
        config = policy.model.config
        self.cameras = list(CAMERAS)[: config.num_images_in_input]
        self.takes_proprio = config.proprio_dim is not None
        self.is_chunked = config.chunk_length > 1
        self.players: dict[str, ActionQueue] = {}

    def get_observation_params(self) -> dict[str, Any]:
        """What the benchmark must send."""
        return {"send_wrist_image": len(self.cameras) > 1, "send_state": self.takes_proprio, "quat_no_antipodal": True}

    def get_action_spec(self) -> dict[str, DimSpec]:
        """What the simulator is sent."""
        return {"position": POSITION_DELTA, "rotation": ROTATION_AA, "gripper": GRIPPER_CLOSE_POS}

    def get_observation_spec(self) -> dict[str, DimSpec]:
        """What the policy is shown."""
        spec = {**dict.fromkeys(self.cameras, IMAGE_RGB), "language": LANGUAGE}
        return {**spec, "state": STATE_EEF_POS_AA_GRIP} if self.takes_proprio else spec

    async def on_episode_start(self, config: dict[str, Any], ctx: SessionContext) -> None:
        """Nothing of the episode before is played."""
        await super().on_episode_start(config, ctx)
        self.policy.reset()
        if self.is_chunked:
            self.players[ctx.session_id] = ActionQueue(self.policy, steps=self.steps, blend=self.blend)

    async def on_episode_end(self, result: dict[str, Any], ctx: SessionContext) -> None:
        """Report it."""
        await super().on_episode_end(result, ctx)
        self.players.pop(ctx.session_id, None)
        if result:  # empty where a connection broke
            self.finished(result)

    def predict(self, obs: dict[str, Any], ctx: SessionContext) -> dict[str, Any]:
        """One action, ``{"actions": float32 (7,)}``."""
        images = [np.asarray(obs["images"][camera]) for camera in self.cameras]
        state = np.asarray(obs["states"], np.float64) if self.takes_proprio else None
        actor = self.players[ctx.session_id] if self.is_chunked else self.policy
        action = actor.act(images if len(images) > 1 else images[0], obs["task_description"], state)
        return {"actions": convert_action(action, "libero").astype(np.float32)}


class LiberoSuite(LIBEROBenchmark):
    """vla-eval's LIBERO, with chosen tasks and initial states, and no camera rendered that nobody looks at.

    Args:
        task_ids: Which tasks of the suite.
        first_initial_state: Which of a task's initial states is the first episode's; the others follow.
        **settings: As the harness's own class takes them.
    """

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

    def _init_libero(self) -> None:
        """Open the suite with the instructions that ``open_suite`` settles.

        The harness's own tells every suite's file names, and makes ``torch.load`` unpickle anything, which this
        LIBERO's files do not need.
        """
        if self._task_suite is None:
            self._task_suite = open_suite(self.suite)

    def get_tasks(self) -> list[dict[str, Any]]:
        """The chosen ones."""
        tasks = {task["task_id"]: task for task in super().get_tasks()}
        return [tasks[task_id] for task_id in self.task_ids]

    def reset(self, task: dict[str, Any]) -> Any:
        """The scene of a task in one of its initial states."""
        if self._current_task_id != task["task_id"]:
            self.cleanup()
            cameras = list(CAMERAS.values())[: 1 + self.send_wrist_image]
            self._env = make_environment(
                self._task_suite,
                task["task_id"],
                seed=self.env_seed,
                camera_names=cameras,
                camera_heights=LIBERO_ENV_RESOLUTION,
                camera_widths=LIBERO_ENV_RESOLUTION,
            )
            self._current_task_id = task["task_id"]
        return super().reset({**task, "episode_idx": task["episode_idx"] + self.first_initial_state})


def work(config: dict[str, Any], evaluation: str, worker: int, workers: int, log: Path) -> None:
    """One worker process: episodes of the harness's queue until there are none; exits with 1 where it gave up."""
    stream = log.open("a", encoding="utf-8", buffering=1)
    os.dup2(stream.fileno(), sys.stdout.fileno())
    os.dup2(stream.fileno(), sys.stderr.fileno())
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    warnings.simplefilter("ignore")
    try:
        anyio.run(Orchestrator(config, shard_id=worker, num_shards=workers, eval_id=evaluation).run)
    except Exception:
        logging.exception("worker %d gave up", worker)
        os._exit(1)  # the simulator's renderer may hang a normal exit
